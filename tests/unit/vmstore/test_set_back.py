"""Which stores were set back, and what is remembered of it."""

from dataclasses import replace
from pathlib import Path

import pytest

from etcd.images import ImageRecord
from etcd.records import AliveRecord
from shard.ids import ImageId
from tests.unit.vmstore.test_catalog import node
from tests.unit.vmstore.test_holder import record
from vmstore.errors import StoreBehind
from vmstore.set_back import Marks, MarksFailed, may_run_elsewhere, only_here, seen_later

RUN, OTHER = "a" * 32, "b" * 32
IMAGES = (ImageId("1" * 32), ImageId("2" * 32))


def test_a_later_start_or_another_run_of_this_one_tells_that_a_store_was_set_back() -> None:
    own = replace(node(1), start_counter=5, run=RUN)
    assert not seen_later(None, own)
    assert not seen_later(replace(own, start_counter=4, run=OTHER), own)
    assert not seen_later(own, own), "it has registered before"
    assert not seen_later(replace(own, run=None), own), "of a version that did not say"
    assert seen_later(replace(own, start_counter=6), own)
    assert seen_later(replace(own, run=OTHER), own)
    assert not seen_later(replace(own, start_counter=6, store_id="c" * 32), own), "another store"


def test_a_lease_of_another_run_may_be_of_one_that_lives() -> None:
    own = replace(node(1), run=RUN)
    assert not may_run_elsewhere(None, own)
    assert not may_run_elsewhere(AliveRecord(start_counter=1, run=RUN), own)
    assert may_run_elsewhere(AliveRecord(start_counter=1, run=OTHER), own)


def images(**changes: object) -> list[ImageRecord]:
    return [replace(record(), epoch=3, **changes)]  # type: ignore[arg-type]


def test_an_image_needs_another_node_in_sync_that_runs() -> None:
    alive = {"node1", "node2", "node3"}
    assert only_here(images(), "node1", alive) == ()
    assert only_here(images(), "node1", {"node1"}) == (record().id,)
    assert only_here(images(), "node9", {"node9"}) == (), "it has no part in it"
    stale = {"generation": 4, "stale": {0: {"node2": 1}}}
    assert only_here(images(**stale), "node1", alive - {"node3"}) == (record().id,)
    assert only_here(images(**stale), "node2", {"node2"}) == (), "nothing on it counts anyway"


def test_what_is_distrusted_is_remembered_until_it_is_crossed_out(tmp_path: Path) -> None:
    path = tmp_path / "set-back"
    marks = Marks.load(path)
    assert (marks.seen_counter, marks.images) == (0, frozenset())
    marks.save(7, IMAGES)
    assert Marks.load(path) == Marks(path, 7, frozenset(IMAGES))
    marks.save(7, IMAGES[:1])
    assert Marks.load(path).images == frozenset(IMAGES[:1])
    marks.save(0, ())
    assert not path.exists()


def test_marks_that_cannot_be_read_let_nothing_pass_for_trusted(tmp_path: Path) -> None:
    path = tmp_path / "set-back"
    for text in ("", "{}", '{"seen_counter": 1, "images": ["x"]}', "[]"):
        path.write_text(text)
        with pytest.raises(MarksFailed, match="set-back"):
            Marks.load(path)


def test_who_cannot_be_healed_says_what_to_start() -> None:
    error = StoreBehind("node1", 5, 3).where_alone(IMAGES)
    assert f"no other node in sync of image {IMAGES[0]} and 1 more images runs" in str(error)
    assert "start those first" in str(error)
