"""An image's record: the rules it keeps, what stays of newer versions, which one is behind."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etcd.errors import MalformedRecord, RecordError
from etcd.images import ImageRecord
from tests.unit.samples import IMAGE


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
        ({"snapshots": [{"name": "x", "layer": 9}]}, "names a layer"),
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
    ],
)
def test_record_lower_or_equal_and_different_is_behind(
    offered: ImageRecord, is_behind: bool
) -> None:
    assert offered.is_behind(IMAGE) is is_behind


def test_image_record_gives_its_membership() -> None:
    assert IMAGE.membership.in_sync(0) == ("a", "c")
    assert IMAGE.membership.epoch == 3
