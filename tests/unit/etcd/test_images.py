"""An image's record: the rules it keeps, what stays of newer versions, which one is behind."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etcd.errors import MalformedRecord, RecordError
from etcd.images import SNAPSHOTS_MAX, ImageRecord, Layer, Snapshot
from tests.unit.samples import IMAGE

FROZEN = json.loads(IMAGE.encode())["snapshots"][0]


def test_fields_of_a_newer_program_within_layers_are_written_back() -> None:
    document = json.loads(IMAGE.encode())
    document["layers"][1]["parent_image"] = "x"
    document["snapshots"][0]["made"] = 5
    decoded = ImageRecord.decode("/hci/x", json.dumps(document).encode())
    changed = replace(decoded, generation=8)
    assert json.loads(changed.encode()) == {**document, "generation": 8}


def broken(**changes: Any) -> bytes:
    return json.dumps({**json.loads(IMAGE.encode()), **changes}).encode()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"size_bytes": 100}, "size_bytes .*multiple of 512"),
        ({"shard_bytes": 1000}, "shard_bytes .*not a shard size"),
        ({"policy": "raid-5"}, "policy .*does not know"),
        ({"id": "A" * 32}, "id .*no image id"),
        ({"sets": []}, "sets is empty"),
        ({"sets": [["a", "b"]], "stale": {}}, "as many members"),
        ({"sets": [["a", "b", "B!"]]}, "sets .*not a node name"),
        ({"layers": []}, "has layers"),
        ({"layers": [{"id": 1}, {"id": 2}]}, "newest first"),
        ({"snapshots": [{**FROZEN, "layer": 9}]}, "names a layer"),
        ({"snapshots": [{**FROZEN, "layer": 2}]}, "below the top"),
        ({"snapshots": [FROZEN, FROZEN]}, "names of snapshots are unique"),
        ({"snapshots": [{**FROZEN, "name": f"{n}"} for n in range(257)]}, "at most 256 snapshots"),
        ({"snapshots": [{**FROZEN, "name": "a/b"}]}, "snapshots.name .*has a slash"),
        ({"snapshots": [{**FROZEN, "size_bytes": 0}]}, "snapshots.size_bytes"),
        ({"merging": [1]}, "without a snapshot"),
        ({"merging": [2]}, "one below the top"),
        ({"merging": [1, 1], "snapshots": []}, "named once"),
        ({"merging": [True]}, "merging is not a whole number"),
        ({"merging": 1}, "merging is not a list"),
        ({"next_layer": 2}, "the next layer is above all others"),
        ({"holder": None}, "an epoch has a holder"),
        ({"epoch": 0}, "an epoch has a holder"),
        ({"generation": 0}, "generation is not within 1"),
        ({"stale": {"0": {"z": 1}}}, "member of its set"),
        ({"stale": {"1": {"a": 1}}}, "names a replica set"),
        ({"stale": {"00": {"a": 1}}}, "no index"),
        ({"stale": {"9" * 5000: {"a": 1}}}, "no index"),
        ({"stale": {"0": {"a": 7}}}, "former generation"),
        ({"stale": {"0": {"a": 1, "b": 1}}}, "below its quorum"),
        ({"stale": {"0": {"a": -1}}}, "stale is not within 0"),
        ({"layers": [{"id": True}]}, "layers.id is not a whole number"),
        ({"epoch": 1 << 63}, "epoch is not within"),
    ],
)
def test_image_record_that_breaks_a_rule_is_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(MalformedRecord, match=problem):
        ImageRecord.decode("/hci/x", broken(**changes))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def test_record_of_before_layers_were_counted_goes_on_above_its_top() -> None:
    document = json.loads(IMAGE.encode())
    del document["next_layer"]
    decoded = ImageRecord.decode("/hci/x", json.dumps(document).encode())
    assert decoded.next_layer == 3


def test_snapshot_freezes_the_top_and_puts_a_new_layer_on_it() -> None:
    taken = replace(IMAGE, next_layer=7).with_snapshot("b", 1_800_000_000)
    assert taken.layer_ids == [7, 2, 1]
    assert taken.next_layer == 8
    assert taken.generation == IMAGE.generation + 1
    assert taken.snapshots[:-1] == IMAGE.snapshots
    assert taken.snapshots[-1] == Snapshot(
        name="b",
        layer=2,
        size_bytes=IMAGE.size_bytes,
        created_s=1_800_000_000,
        generation=IMAGE.generation + 1,
    )
    assert (taken.stale, taken.epoch, taken.holder) == (IMAGE.stale, IMAGE.epoch, IMAGE.holder)
    assert ImageRecord.decode("/hci/x", taken.encode()) == taken
    assert not taken.is_behind(IMAGE)
    assert IMAGE.is_behind(taken)


def test_snapshot_is_found_by_its_name_with_the_layers_below_it() -> None:
    taken = IMAGE.with_snapshot("b", 0)
    first, second = taken.snapshot("before upgrade"), taken.snapshot("b")
    assert first is not None
    assert second is not None
    assert taken.chain(first) == [1]
    assert taken.chain(second) == [2, 1]
    assert taken.snapshot("c") is None


def test_newest_snapshot_goes_with_its_layer_whose_id_is_not_used_again() -> None:
    taken = IMAGE.with_snapshot("b", 0)
    assert taken.newest_snapshot == taken.snapshots[-1]
    gone = taken.without_newest_snapshot()
    assert gone.generation == IMAGE.generation + 2
    assert (gone.layers, gone.snapshots) == (IMAGE.layers, IMAGE.snapshots)
    assert gone.with_snapshot("b", 0).layer_ids == [4, 2, 1]
    assert replace(IMAGE, snapshots=()).newest_snapshot is None


def test_removed_snapshot_leaves_its_layer_to_be_merged() -> None:
    taken = IMAGE.with_snapshot("b", 0).with_snapshot("c", 0)
    first, second, third = taken.snapshots
    removed = taken.without_snapshot(first).without_snapshot(third)
    assert (removed.snapshots, removed.merging) == ((second,), (3, 1))
    assert removed.layers == taken.layers
    assert removed.generation == taken.generation + 2
    assert removed.newest_snapshot is None
    assert ImageRecord.decode("/hci/x", removed.encode()) == removed
    assert taken.is_behind(removed)
    assert replace(removed, merging=()).digest != removed.digest
    assert removed.rolled_back(second).merging == (1,)
    gone = removed.without_merged({3})
    assert (gone.layer_ids, gone.merging) == ([4, 2, 1], (1,))
    assert replace(gone.with_merged({3}), generation=removed.generation) == removed
    with pytest.raises(AssertionError, match="they were merged"):
        removed.without_merged({2})


def test_rollback_puts_a_new_layer_on_those_of_the_snapshot_at_its_size() -> None:
    taken = replace(IMAGE.with_snapshot("b", 0), size_bytes=2 * IMAGE.size_bytes)
    taken = taken.with_snapshot("c", 0)
    first, second, third = taken.snapshots
    assert taken.newer_than(first) == (second, third)
    back = taken.rolled_back(first)
    assert (back.layer_ids, back.next_layer) == ([5, 1], 6)
    assert (back.snapshots, back.size_bytes) == ((first,), first.size_bytes)
    assert back.generation == taken.generation + 1
    assert (back.stale, back.epoch, back.holder) == (IMAGE.stale, IMAGE.epoch, IMAGE.holder)
    assert ImageRecord.decode("/hci/x", back.encode()) == back
    assert taken.is_behind(back)
    assert taken.newer_than(third) == ()
    last = taken.rolled_back(third)
    assert (last.layer_ids, last.snapshots) == ([5, 3, 2, 1], taken.snapshots)
    assert last.size_bytes == 2 * IMAGE.size_bytes


def test_no_snapshot_is_taken_of_a_name_that_is_there_or_beyond_the_bound() -> None:
    with pytest.raises(AssertionError, match="unique"):
        IMAGE.with_snapshot("before upgrade", 0)
    full = IMAGE
    for number in range(SNAPSHOTS_MAX - 1):
        full = full.with_snapshot(f"{number}", 0)
    assert ImageRecord.decode("/hci/x", full.encode()) == full
    with pytest.raises(AssertionError, match="room"):
        full.with_snapshot("one more", 0)


@given(st.sampled_from(sorted(json.loads(IMAGE.encode()))), JSON)
def test_any_field_of_an_image_decodes_or_is_refused(name: str, value: Any) -> None:
    """Nothing but a RecordError comes of a value that another program wrote."""
    try:
        record = ImageRecord.decode("/hci/x", broken(**{name: value}))
    except RecordError:
        return
    assert ImageRecord.decode("/hci/x", record.encode()) == record
    assert record.membership.generation == record.generation


@pytest.mark.parametrize(
    ("offered", "is_behind"),
    [
        (IMAGE, False),
        (replace(IMAGE, size_bytes=20 << 30), False),
        (replace(IMAGE, epoch=4, holder="e" * 32), False),
        (replace(IMAGE, generation=8, stale={}), False),
        (replace(IMAGE, epoch=2), True),
        (replace(IMAGE, epoch=4, holder="e" * 32, generation=6, stale={}), True),
        (replace(IMAGE, epoch=2, generation=9), True),
        (replace(IMAGE, holder="e" * 32), True),
        (replace(IMAGE, stale={}), True),
        (replace(IMAGE, epoch=4, holder="e" * 32, stale={0: {"c": 6}}), True),
        (replace(IMAGE, sets=(("a", "b", "d"),)), True),
        (replace(IMAGE, layers=(Layer(id=3), *IMAGE.layers), next_layer=4), True),
        (replace(IMAGE, snapshots=(replace(IMAGE.snapshots[0], name="another"),)), True),
        (IMAGE.with_snapshot("b", 0), False),
    ],
)
def test_record_lower_or_equal_and_different_is_behind(
    offered: ImageRecord, is_behind: bool
) -> None:
    assert offered.is_behind(IMAGE) is is_behind


def test_image_record_gives_its_membership() -> None:
    assert IMAGE.membership.in_sync(0) == ("a", "c")
    assert IMAGE.membership.epoch == 3
