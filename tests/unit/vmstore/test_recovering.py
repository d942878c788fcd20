"""What is proof that etcd lost history, and what is planned to be written instead."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from etcd import keys
from etcd.images import ImageRecord, Parent
from etcd.interface import KeyValue, Put
from etcd.memory import MemoryEtcd
from etcd.records import (
    CloneRecord,
    ClusterRecord,
    LostRecord,
    NameRecord,
    PoolRecord,
    TombstoneRecord,
)
from hci.known import known_parts, member_of
from shard.ids import ImageId
from shard.membership import Policy
from shard.placement import FailureDomain
from tests.unit.samples import image_record
from vmstore.errors import RecoveryRefused
from vmstore.history import FORCED_STEP, HeldRecord, Known, Member, judge
from vmstore.ledger import Ledger
from vmstore.rebuilding import carry_out
from vmstore.recovering import Plan, plan
from vmstore.told import Sources, Voted, Witness

IMAGE = ImageId("ab" * 16)
NAME = keys.name("vms", "disk")
CLUSTER = ClusterRecord(id="c" * 32)
HOLDER = "d" * 32
SETS = (("node1", "node2", "node3"),)


def record(epoch: int, generation: int, stale: Mapping[str, int] | None = None) -> ImageRecord:
    return image_record(
        IMAGE,
        epoch=epoch,
        holder=HOLDER if epoch else None,
        generation=generation,
        stale={0: dict(stale)} if stale else {},
    )


def held(image: ImageRecord) -> HeldRecord:
    digest = image.digest
    return HeldRecord(IMAGE, image.epoch, image.holder or "", image.generation, digest, image)


def items(*image: ImageRecord, named: bool = True) -> dict[str, KeyValue]:
    found = {keys.CLUSTER: KeyValue(keys.CLUSTER, CLUSTER.encode(), 1)}
    for each in image:
        found[each.key] = KeyValue(each.key, each.encode(), 2)
        if named:
            found[NAME] = KeyValue(NAME, NameRecord(image=each.id).encode(), 2)
    return found


def node(name: str, stored: ImageRecord | None, **known: object) -> Member:
    records = items(stored) if stored is not None else {}
    store = {IMAGE: held(stored)} if stored is not None else {}
    made = Known(name, held=store, records=records)
    return Member(name, "e" * 32, 1, replace(made, **known))  # type: ignore[arg-type]


def sources(now: dict[str, KeyValue], *members: Member) -> Sources:
    heard = {member.name: member for member in members}
    away = {name: "it does not answer" for name in SETS[0] if name not in heard}
    return Sources(CLUSTER.id, heard, {}, away, now)


def written(found: Plan) -> ImageRecord:
    (value,) = [w.values[keys.image(IMAGE)] for w in found.writes if keys.image(IMAGE) in w.values]
    assert value is not None
    return ImageRecord.decode(keys.image(IMAGE), value)


@pytest.mark.parametrize(
    ("now", "lost"),
    [
        (items(record(5, 3)), ""),
        (items(record(6, 3)), ""),
        (items(record(4, 3)), "epoch 4"),
        (items(record(5, 2)), "generation 2"),
        (items(replace(record(5, 3), holder="f" * 32)), "another holder"),
        (items(record(5, 3, {"node1": 1})), "another holder"),
        (items(), "is stored here and is not in it"),
        ({}, "nothing of this cluster"),
    ],
)
def test_etcd_behind_a_store_has_lost_history(now: dict[str, KeyValue], lost: str) -> None:
    verdict = judge(node("node1", record(5, 3)).known, {k: i.value for k, i in now.items()})
    assert lost in "; ".join(verdict.lost) if lost else not verdict.lost
    assert not verdict.contested


def test_image_deleted_here_is_no_loss_where_its_tombstone_has_gone_already() -> None:
    now = {keys.CLUSTER: CLUSTER.encode()}
    copied = items(record(5, 3))
    known = node("node1", None, records=copied, deleted=frozenset({IMAGE})).known
    assert not judge(known, now).lost
    assert judge(replace(known, deleted=frozenset()), now).lost
    assert judge(known, {key: item.value for key, item in copied.items()}).lost


def test_etcd_that_was_recovered_meanwhile_leaves_the_image_contested() -> None:
    recovered = items(record(4, 3))
    cluster = replace(CLUSTER, recoveries=1)
    recovered[keys.CLUSTER] = KeyValue(keys.CLUSTER, cluster.encode(), 3)
    now = {key: item.value for key, item in recovered.items()}
    verdict = judge(node("node1", record(5, 3)).known, now)
    assert not verdict.lost
    assert set(verdict.contested) == {IMAGE}


def test_highest_record_of_two_nodes_counts_and_rises_by_two() -> None:
    found = plan(
        sources({}, node("node1", record(4, 2)), node("node2", record(5, 3, {"node1": 2}))), HOLDER
    )
    assert found.needed and not found.missing
    made = written(found)
    assert (made.epoch, made.generation, made.holder) == (7, 5, HOLDER)
    assert made.stale == {0: {"node1": 2}}
    assert not made.clean
    assert made.last_use == record(5, 3).last_use


def test_one_node_of_three_is_not_enough_unless_forced() -> None:
    found = plan(sources({}, node("node1", record(5, 3))), HOLDER)
    (missing,) = found.missing
    assert "node2, node3 missing" in missing.missing[0]
    assert missing.losses
    assert written(found).generation == 3 + FORCED_STEP


def test_node_whose_store_was_set_back_counts_for_nothing() -> None:
    # node1 and node3 had left node2 behind. node1's disk was put back to before that, node3 was
    # away, and node1 with node2 passed for a quorum: node2 was in sync again without a person's
    # word, and what had been answered since was lost.
    back = node("node1", None, distrusted=frozenset({IMAGE}))
    found = plan(sources({}, back, node("node2", record(5, 3))), HOLDER)
    (missing,) = found.missing
    assert "only node2 of replica set 0 was heard" in missing.missing[0]
    assert missing.heard == ("node2",)
    known = plan(
        sources({}, back, node("node2", record(5, 3)), node("node3", record(5, 4))), HOLDER
    )
    assert known.missing == ()
    assert member_of(known_parts(back.known, "e" * 32, 1)) == back


def test_tombstone_of_any_node_keeps_an_image_deleted() -> None:
    old = items(record(2, 1))
    deleted = node("node2", None, deleted=frozenset({IMAGE}))
    found = plan(sources(old, node("node1", None), deleted), HOLDER)
    values = {key: value for write in found.writes for key, value in write.values.items()}
    assert values[keys.image(IMAGE)] is None and values[NAME] is None
    tombstone = values[keys.tombstone(IMAGE)]
    assert tombstone is not None
    awaits = TombstoneRecord.decode(keys.tombstone(IMAGE), tombstone).awaits
    assert awaits == ("node1", "node2", "node3")


def test_arbiter_with_votes_of_a_deleted_image_is_told_of_the_delete() -> None:
    # All nodes had confirmed it, so no record was left. The arbiter said after each recovery again
    # that etcd lacks the image.
    now = items()
    mark = LostRecord(by="arbiter w", why="a test")
    now[keys.LOST] = KeyValue(keys.LOST, mark.encode(), 3)
    voted = Witness("w", "f" * 32, 1, {IMAGE: Voted(5, ((3, frozenset({"node1"})),))})
    member = node("node1", None, deleted=frozenset({IMAGE}), records=items())
    found = plan(replace(sources(now, member), witnesses={"w": voted}), HOLDER)
    (tombstone,) = [w.values[keys.tombstone(IMAGE)] for w in found.writes]
    assert tombstone is not None
    record = TombstoneRecord.decode(keys.tombstone(IMAGE), tombstone)
    assert record.awaits == ("arbiter/w",)


def test_recovery_is_carried_out_once() -> None:
    etcd = MemoryEtcd()
    members = (node("node1", record(5, 3)), node("node2", record(5, 3)))

    def now() -> dict[str, KeyValue]:
        return {item.key: item for item in etcd.get_prefix(keys.PREFIX).items}

    first = sources(now(), *members)
    found = plan(first, HOLDER)
    carry_out(etcd, first, found)
    assert etcd.get(keys.LOST) is None
    item = etcd.get(keys.image(IMAGE))
    assert item is not None
    made = ImageRecord.decode(item.key, item.value)
    assert (made.epoch, made.generation) == (7, 5)
    assert not plan(sources(now(), *members), HOLDER).needed
    with pytest.raises(RecoveryRefused, match="run `hci cluster recover` again"):
        carry_out(etcd, first, found)


def test_interrupted_recovery_keeps_what_it_wrote() -> None:
    etcd = MemoryEtcd()
    members = (node("node1", record(5, 3)), node("node2", record(5, 3)))
    first = sources({}, *members)
    found = plan(first, HOLDER)
    with pytest.raises(KeyboardInterrupt):
        carry_out(etcd, first, found, progress=_interrupt)
    marked = {item.key: item for item in etcd.get_prefix(keys.PREFIX).items}
    assert keys.LOST in marked
    again = plan(sources(marked, *members), "f" * 32)
    assert again.recovery == found.recovery
    carry_out(etcd, sources(marked, *members), again)
    item = etcd.get(keys.image(IMAGE))
    assert item is not None
    assert ImageRecord.decode(item.key, item.value).generation == 5


def _interrupt(done: float) -> None:
    if done < 1.0:
        raise KeyboardInterrupt


def test_ledger_is_what_etcd_said_after_a_restart(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    ledger.take(items(record(5, 3)).values(), {})
    ledger.close()
    again = Ledger(tmp_path / "ledger")
    assert again.records() == items(record(5, 3))
    again.close()


def test_damaged_ledger_is_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    path.write_bytes(b"not a database" * 1000)
    ledger = Ledger(path)
    assert ledger.records() == {}
    assert path.with_name("ledger.damaged").exists()
    ledger.close()


def test_nothing_begins_while_etcd_is_marked_as_lost() -> None:
    from vmstore.catalog import Catalog
    from vmstore.errors import RecordsLost
    from vmstore.names import ImageName

    etcd = MemoryEtcd()
    for key, item in items(record(5, 3)).items():
        etcd.transaction([], [Put(key, item.value)])
    catalog = Catalog(etcd)
    image = catalog.find(ImageName("vms", "disk"))
    catalog.mark_lost("node1", "it is older", catalog.stored_cluster())
    lease = etcd.grant_lease(10)
    with pytest.raises(RecordsLost, match="node1 found that it is older"):
        catalog.take_lease(image, gateway="gateway1", holder=HOLDER, etcd_lease=lease)
    with pytest.raises(RecordsLost):
        catalog.delete_image(ImageName("vms", "disk"))


def test_recovery_keeps_a_snapshot_that_one_node_knows_and_gives_no_layer_twice() -> None:
    taken = record(5, 3).with_snapshot("s", 0)
    known = node("node1", taken), node("node2", record(5, 3))
    made = written(plan(sources(items(record(4, 2)), *known), HOLDER))
    assert made.snapshots == taken.snapshots
    assert made.layers == taken.layers
    assert made.generation == taken.generation + 2
    # Layer 3 may be on a node that was not heard.
    assert made.next_layer > taken.next_layer


def test_records_of_one_generation_with_other_snapshots_are_a_conflict() -> None:
    """etcd was put back while a snapshot was taken, and another one was taken then."""
    one, other = (record(5, 3).with_snapshot(name, 0) for name in ("one", "other"))
    found = plan(sources({}, node("node1", one), node("node2", other)), HOLDER)
    (image,) = found.missing
    assert "different nodes in sync, or different snapshots" in " ".join(image.missing)


@pytest.mark.parametrize(("voted", "is_missing"), [(4, False), (5, True)])
def test_pair_of_which_one_went_on_alone_for_longer_is_not_rebuilt_without_it(
    voted: int, is_missing: bool
) -> None:
    """A node and the arbiter were heard, and the other had taken a snapshot since. Its top layer
    was not in the record that was rebuilt, nor what was written to it."""
    stored = replace(
        record(5, 3), policy=Policy.THIN_ARBITER, sets=(("node1", "node2"),), next_layer=2
    )
    pool = PoolRecord(
        name="vms",
        policy=Policy.THIN_ARBITER,
        shard_bytes=stored.shard_bytes,
        replica_sets=1,
        failure_domain=FailureDomain.HOST,
        arbiter="w",
    )
    now = {**items(), pool.key: KeyValue(pool.key, pool.encode(), 2)}
    witness = Witness("w", "f" * 32, 1, {IMAGE: Voted(5, ((voted, frozenset({"node1"})),))})
    heard = replace(sources(now, node("node2", stored)), witnesses={"w": witness})
    marked = LostRecord(by="node2", why="a test")
    now[keys.LOST] = KeyValue(keys.LOST, marked.encode(), 3)
    found = plan(heard, HOLDER)
    assert bool(found.missing) is is_missing
    if is_missing:
        (image,) = found.missing
        assert "node1 went on to generation 5" in " ".join(image.missing)
        assert "snapshots that were taken since" in " ".join(image.losses)
    assert written(found).stale == {0: {"node2": 0}}


def test_recovery_gives_a_clone_its_parent_and_the_parent_its_clone() -> None:
    parent = ImageId("3" * 32)
    clone = replace(
        record(5, 3),
        placement_key=parent,
        parent=Parent(image=parent, layer=9, generation=2, size_bytes=1 << 30),
    )
    found = plan(sources({}, node("node1", clone), node("node2", clone)), HOLDER)
    assert written(found).parent == clone.parent
    key = keys.clone(parent, 9, IMAGE)
    assert [w.values[key] for w in found.writes if key in w.values] == [CloneRecord().encode()]


def test_recovery_forgets_a_clone_that_was_deleted() -> None:
    """etcd was put back to when it was there: its parent could never have been removed."""
    parent = ImageId("3" * 32)
    clone = replace(
        record(5, 3),
        placement_key=parent,
        parent=Parent(image=parent, layer=9, generation=2, size_bytes=1 << 30),
    )
    key = keys.clone(parent, 9, IMAGE)
    now = {**items(clone), key: KeyValue(key, CloneRecord().encode(), 2)}
    gone = node("node1", None, deleted=frozenset({IMAGE}))
    found = plan(sources(now, gone, node("node2", clone)), HOLDER)
    assert [w.values[key] for w in found.writes if key in w.values] == [None]
