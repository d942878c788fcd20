"""Clones in the records: how one is made, what it keeps from going, and what it is made of."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from etcd import keys
from etcd.images import ImageRecord
from etcd.interface import Compare, Operation, Outcome, Put
from etcd.memory import Fault, MemoryEtcd
from shard.ids import ImageId
from tests.unit.samples import GIB, node_record
from vmstore import clones
from vmstore.catalog import Catalog
from vmstore.clone_errors import ChainTooLong, CloneElsewhere, HasClones, LayersTooMany
from vmstore.errors import ImageExists, UnknownImage, UnknownSnapshot
from vmstore.holding import Held
from vmstore.names import ImageName, SnapshotName

TEMPLATE = ImageName("vms", "template")
SOURCE = SnapshotName(TEMPLATE, "s")
COPY = ImageName("vms", "copy")


@pytest.fixture
def etcd() -> MemoryEtcd:
    return MemoryEtcd()


@pytest.fixture
def catalog(etcd: MemoryEtcd) -> Catalog:
    """Three nodes, a pool, and an image with two snapshots."""
    made = Catalog(etcd)
    for number in (1, 2, 3):
        made.announce_node(node_record(number), etcd.grant_lease(10))
    made.create_pool("vms")
    made.create_image(TEMPLATE, GIB)
    for name in ("s", "t"):
        snapshot(made, TEMPLATE, name)
    return made


def held(catalog: Catalog, name: ImageName) -> Held:
    lease = catalog.etcd.grant_lease(1000)
    return catalog.take_lease(catalog.find(name), gateway="g", holder="a" * 32, etcd_lease=lease)


def changed(
    catalog: Catalog, name: ImageName, change: Callable[[ImageRecord], ImageRecord]
) -> None:
    """Make a change as the holder of an image makes it."""
    now = held(catalog, name)
    try:
        now = catalog.change(now, change(now.record))
    finally:
        catalog.release(now, clean=True)


def snapshot(catalog: Catalog, image: ImageName, name: str) -> None:
    changed(catalog, image, lambda record: record.with_snapshot(name, 5))


def without(name: str) -> Callable[[ImageRecord], ImageRecord]:
    def change(record: ImageRecord) -> ImageRecord:
        found = record.snapshot(name)
        assert found is not None
        return record.without_snapshot(found)

    return change


def back_to(name: str) -> Callable[[ImageRecord], ImageRecord]:
    def change(record: ImageRecord) -> ImageRecord:
        found = record.snapshot(name)
        assert found is not None
        return record.rolled_back(found)

    return change


def test_clone_begins_empty_on_the_snapshot_beside_its_data(catalog: Catalog) -> None:
    parent = catalog.find(TEMPLATE).record
    catalog.grow_image(TEMPLATE, 2 * GIB)
    clone = catalog.clone_image(SOURCE, COPY).record
    assert clone == catalog.find(COPY).record
    assert clone.parent is not None
    assert clone.parent.image == clone.placement_key == parent.id != clone.id
    assert (clone.parent.layer, clone.parent.generation) == (1, parent.snapshots[0].generation)
    assert clone.parent.size_bytes == clone.size_bytes == GIB
    assert (clone.layer_ids, clone.snapshots, clone.generation, clone.epoch) == ([1], (), 1, 0)
    assert (clone.sets, clone.shard_bytes, clone.policy) == (
        parent.sets,
        parent.shard_bytes,
        parent.policy,
    )
    assert [each.name for each in catalog.clones_of(parent.id)] == ["vms/copy"]
    assert str(catalog.origin_of(clone)) == "vms/template@s"
    assert catalog.origin_of(parent) is None


def test_digest_tells_clones_of_two_snapshots_apart(catalog: Catalog) -> None:
    clone = catalog.clone_image(SOURCE, COPY).record
    assert clone.parent is not None
    other = replace(clone, parent=replace(clone.parent, layer=2))
    assert clone.digest != other.digest
    assert clone.digest != replace(clone, parent=None).digest


def test_clone_of_a_clone_lies_where_its_oldest_ancestor_lies(catalog: Catalog) -> None:
    catalog.clone_image(SOURCE, COPY)
    snapshot(catalog, COPY, "u")
    second = catalog.clone_image(SnapshotName(COPY, "u"), ImageName("vms", "second")).record
    oldest, parent = catalog.find(TEMPLATE).record, catalog.find(COPY).record
    assert second.placement_key == oldest.id
    assert catalog.ancestors(second) == [parent, oldest]


@pytest.mark.parametrize(("since", "lacks"), [(0, True), (1, True), (2, True), (3, False)])
def test_clone_begins_with_the_stale_nodes_that_may_lack_the_snapshot(
    catalog: Catalog, since: int, lacks: bool
) -> None:
    """Of the snapshot in generation 2: who was left behind later has all of it."""
    record = catalog.find(TEMPLATE).record
    assert record.snapshots[0].generation == 2
    stale = replace(record, generation=9, stale={0: {"node2": since}})
    catalog.etcd.transaction([], [Put(record.key, stale.encode())])
    clone = catalog.clone_image(SOURCE, COPY).record
    assert clone.stale == ({0: {"node2": 0}} if lacks else {})
    assert catalog.lacking(clone) == clone.stale
    catalog.etcd.transaction([], [Put(record.key, replace(stale, stale={}).encode())])
    assert catalog.lacking(clone) == {}


def test_node_that_lacks_a_grandparent_lacks_the_clone(catalog: Catalog) -> None:
    catalog.clone_image(SOURCE, COPY)
    snapshot(catalog, COPY, "u")
    second = catalog.clone_image(SnapshotName(COPY, "u"), ImageName("vms", "second")).record
    record = catalog.find(TEMPLATE).record
    stale = replace(record, generation=9, stale={0: {"node3": 0}})
    catalog.etcd.transaction([], [Put(record.key, stale.encode())])
    assert catalog.lacking(second) == {0: {"node3": 0}}


def test_what_cannot_be_cloned_is_refused(catalog: Catalog) -> None:
    with pytest.raises(UnknownSnapshot):
        catalog.clone_image(SnapshotName(TEMPLATE, "none"), COPY)
    with pytest.raises(UnknownImage):
        catalog.clone_image(SnapshotName(COPY, "s"), TEMPLATE.__class__("vms", "new"))
    with pytest.raises(CloneElsewhere, match="export it and import it"):
        catalog.clone_image(SOURCE, ImageName("other", "copy"))
    with pytest.raises(ImageExists):
        catalog.clone_image(SOURCE, TEMPLATE)
    with pytest.raises(UnknownSnapshot):
        catalog.clone_image(SOURCE, COPY, only_layer=2)


def test_chain_of_clones_has_an_end(catalog: Catalog) -> None:
    source = SOURCE
    for number in range(clones.CHAIN_MAX - 1):
        name = ImageName("vms", f"clone{number}")
        catalog.clone_image(source, name)
        snapshot(catalog, name, "s")
        source = SnapshotName(name, "s")
    with pytest.raises(ChainTooLong, match="the last of 16 images"):
        catalog.clone_image(source, COPY)


def test_clone_begins_on_no_more_layers_than_one_image_may_have(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clones, "INHERITED_LAYERS_MAX", 3)
    catalog.clone_image(SnapshotName(TEMPLATE, "t"), COPY)
    snapshot(catalog, COPY, "u")
    catalog.clone_image(SnapshotName(COPY, "u"), ImageName("vms", "fits"))
    snapshot(catalog, COPY, "v")
    with pytest.raises(LayersTooMany, match="has 4 layers below it"):
        catalog.clone_image(SnapshotName(COPY, "v"), ImageName("vms", "too many"))


def test_image_with_clones_is_not_removed_and_with_none_it_is(catalog: Catalog) -> None:
    for number in range(7):
        catalog.clone_image(SOURCE, ImageName("vms", f"copy{number}"))
    with pytest.raises(
        HasClones, match=r"7 clones begin .*vms/copy0, .*vms/copy4, …\); remove them"
    ):
        catalog.delete_image(TEMPLATE, with_snapshots=True)
    for number in range(7):
        catalog.delete_image(ImageName("vms", f"copy{number}"))
    assert catalog.all_clones() == {}
    catalog.delete_image(TEMPLATE, with_snapshots=True)
    assert catalog.images() == []


def test_snapshot_with_a_clone_neither_goes_nor_is_gone_back_behind(catalog: Catalog) -> None:
    catalog.clone_image(SnapshotName(TEMPLATE, "t"), COPY)
    before = catalog.find(TEMPLATE).record
    for change in (without("t"), back_to("s")):
        with pytest.raises(HasClones):
            changed(catalog, TEMPLATE, change)
    now = catalog.find(TEMPLATE).record
    assert (now.layers, now.snapshots) == (before.layers, before.snapshots)
    changed(catalog, TEMPLATE, back_to("t"))
    changed(catalog, TEMPLATE, without("s"))
    catalog.delete_image(COPY)
    changed(catalog, TEMPLATE, without("t"))
    assert catalog.find(TEMPLATE).record.snapshots == ()


class Racing(MemoryEtcd):
    """An etcd in which something happens just before the next transaction."""

    def __init__(self) -> None:
        super().__init__()
        self.before: Callable[[], object] | None = None

    def transaction(self, compares: list[Compare], operations: list[Operation]) -> Outcome:  # type: ignore[override]
        happening, self.before = self.before, None
        if happening is not None:
            happening()
        return super().transaction(compares, operations)


@pytest.fixture
def racing() -> tuple[Racing, Catalog]:
    etcd = Racing()
    made = Catalog(etcd)
    for number in (1, 2, 3):
        made.announce_node(node_record(number), etcd.grant_lease(10))
    made.create_pool("vms")
    made.create_image(TEMPLATE, GIB)
    snapshot(made, TEMPLATE, "s")
    return etcd, made


def test_snapshot_that_is_removed_meanwhile_is_not_cloned(racing: tuple[Racing, Catalog]) -> None:
    etcd, catalog = racing
    etcd.before = lambda: changed(catalog, TEMPLATE, without("s"))
    with pytest.raises(UnknownSnapshot):
        catalog.clone_image(SOURCE, COPY)
    assert catalog.all_clones() == {}


def test_snapshot_that_is_cloned_meanwhile_is_not_removed(racing: tuple[Racing, Catalog]) -> None:
    etcd, catalog = racing
    now = held(catalog, TEMPLATE)
    etcd.before = lambda: catalog.clone_image(SOURCE, COPY)
    with pytest.raises(HasClones):
        catalog.change(now, without("s")(now.record))
    assert catalog.find(TEMPLATE).record.snapshots != ()


def test_image_that_is_cloned_meanwhile_is_not_removed(racing: tuple[Racing, Catalog]) -> None:
    etcd, catalog = racing
    etcd.before = lambda: catalog.clone_image(SOURCE, COPY)
    with pytest.raises(HasClones):
        catalog.delete_image(TEMPLATE, with_snapshots=True)


def test_clones_made_at_one_time_do_not_meet(racing: tuple[Racing, Catalog]) -> None:
    etcd, catalog = racing
    tried = 0

    def another() -> None:
        nonlocal tried
        tried += 1
        if tried < 5:
            etcd.before = another
        catalog.clone_image(SOURCE, ImageName("vms", f"other{tried}"))

    etcd.before = another
    before = catalog.find(TEMPLATE)
    catalog.clone_image(SOURCE, COPY)
    assert len(catalog.clones_of(before.record.id)) == 6
    assert catalog.find(TEMPLATE) == before


def test_clone_whose_parent_changes_meanwhile_begins_with_its_stale_nodes(
    racing: tuple[Racing, Catalog],
) -> None:
    etcd, catalog = racing
    record = catalog.find(TEMPLATE).record
    stale = replace(record, generation=9, stale={0: {"node1": 0}})
    etcd.before = lambda: etcd.transaction([], [Put(record.key, stale.encode())])
    assert catalog.clone_image(SOURCE, COPY).record.stale == {0: {"node1": 0}}


@pytest.mark.parametrize("fault", [Fault.ANSWER_LOST, Fault.REQUEST_LOST])
def test_clone_whose_answer_is_lost_is_made_once(
    etcd: MemoryEtcd, catalog: Catalog, fault: Fault
) -> None:
    etcd.fail_next(fault)
    made = catalog.clone_image(SOURCE, COPY).record
    assert [each.image for each in catalog.clones_of(catalog.find(TEMPLATE).record.id)] == [made.id]


def test_clone_without_its_parents_record_says_so(catalog: Catalog) -> None:
    clone = catalog.clone_image(SOURCE, COPY).record
    gone = replace(clone, parent=replace(clone.parent, image=ImageId("e" * 32)))  # type: ignore[type-var]
    with pytest.raises(UnknownImage):
        catalog.lacking(gone)


def test_key_of_a_clone_is_in_the_order_of_layers() -> None:
    first, second = ImageId("a" * 32), ImageId("b" * 32)
    key = keys.clone(first, 9, second)
    assert key == f"/hci/clones/{first}/0000000009/{second}"
    assert keys.split_clone(key) == (first, 9, second)
    assert keys.clone(first, 9, second) < keys.clone(first, 10, second)
    assert key < keys.end_of(keys.clones_of_layer(first, 9)) < keys.clone(first, 10, second)
