"""The durable record: whole after any crash, and refused where it is not what was stored."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arbiter.errors import ArbiterFailed, ForeignRecord, RecordBusy, RecordDamaged
from arbiter.record import ImageVotes, Record
from arbiter.statement import Statement, confirm_image, prepare_image
from shard.ids import image_id

CLUSTER = "c" * 32
IMAGE = image_id("1" * 32)
OTHER = image_id("2" * 32)


def opened(path: Path, sync: Callable[[int], None] = os.fsync) -> Record:
    return Record(path, name="arbiter", cluster=CLUSTER, sync=sync)


def votes(generation: int = 1, changes: int = 1) -> ImageVotes:
    known = Statement(3, "a" * 32, generation, (frozenset("ab"), frozenset("cd")))
    wanted = Statement(3, "a" * 32, generation + 1, (frozenset("a"), frozenset("cd")))
    after, refusal = prepare_image(confirm_image((), known)[0], known, wanted)
    assert refusal is None
    return ImageVotes(changes, after)


def test_votes_are_there_after_a_restart(tmp_path: Path) -> None:
    record = opened(tmp_path)
    assert record.read(IMAGE) == ImageVotes()
    record.store(IMAGE, votes())
    record.close()
    again = opened(tmp_path)
    assert again.read(IMAGE) == votes()
    assert again.images() == [IMAGE]
    assert again.damaged() == []
    again.drop(IMAGE)
    assert again.read(IMAGE) == ImageVotes()
    again.close()


def test_each_start_counts_and_keeps_the_id(tmp_path: Path) -> None:
    first = opened(tmp_path)
    first.close()
    second = opened(tmp_path)
    assert second.identity.id == first.identity.id
    assert (first.identity.start_counter, second.identity.start_counter) == (1, 2)


def test_emptied_directory_is_another_arbiter(tmp_path: Path) -> None:
    first = opened(tmp_path / "a")
    second = opened(tmp_path / "b")
    assert first.identity.id != second.identity.id


def test_second_process_on_one_directory_is_refused(tmp_path: Path) -> None:
    record = opened(tmp_path)
    with pytest.raises(RecordBusy, match="another process uses"):
        opened(tmp_path)
    record.close()
    opened(tmp_path).close()


def test_record_of_another_cluster_or_arbiter_is_refused(tmp_path: Path) -> None:
    opened(tmp_path).close()
    with pytest.raises(ForeignRecord, match="the record of cluster c"):
        Record(tmp_path, name="arbiter", cluster="d" * 32)
    with pytest.raises(ForeignRecord, match="the record of arbiter arbiter, the configuration"):
        Record(tmp_path, name="arbiter2", cluster=CLUSTER)
    assert opened(tmp_path).identity.start_counter == 2, "a refused start changes nothing"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_file_that_is_cut_or_changed_anywhere_is_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("record")
    record = opened(folder)
    record.store(IMAGE, votes())
    record.store(OTHER, votes(7))
    path = folder / "votes" / IMAGE
    content = path.read_bytes()
    if data.draw(st.booleans(), "cut"):
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    else:
        place = data.draw(st.integers(0, len(content) - 1))
        changed = content[place] ^ data.draw(st.integers(1, 255))
        path.write_bytes(content[:place] + bytes([changed]) + content[place + 1 :])
    with pytest.raises(RecordDamaged, match="is not believed"):
        record.read(IMAGE)
    assert len(record.damaged()) == 1
    assert record.read(OTHER) == votes(7)
    record.close()


def test_file_of_another_image_or_arbiter_is_refused(tmp_path: Path) -> None:
    first, second = opened(tmp_path / "a"), opened(tmp_path / "b")
    for record in (first, second):
        record.store(IMAGE, votes())
    (tmp_path / "a" / "votes" / OTHER).write_bytes((tmp_path / "a/votes" / IMAGE).read_bytes())
    with pytest.raises(RecordDamaged, match="of another arbiter or image"):
        first.read(OTHER)
    (tmp_path / "a" / "votes" / IMAGE).write_bytes((tmp_path / "b/votes" / IMAGE).read_bytes())
    with pytest.raises(RecordDamaged, match="of another arbiter or image"):
        first.read(IMAGE)


def test_votes_without_an_identity_are_refused(tmp_path: Path) -> None:
    record = opened(tmp_path)
    record.store(IMAGE, votes())
    record.close()
    (tmp_path / "arbiter").unlink()
    with pytest.raises(RecordDamaged, match="it is missing, though there are votes"):
        opened(tmp_path)


def test_file_that_was_being_written_when_the_process_ended_is_ignored(tmp_path: Path) -> None:
    record = opened(tmp_path)
    record.store(IMAGE, votes())
    record.close()
    (tmp_path / "votes" / f"{IMAGE}.new").write_bytes(b"half")
    (tmp_path / "votes" / f"{OTHER}.new").write_bytes(b"half")
    again = opened(tmp_path)
    assert again.images() == [IMAGE]
    assert again.read(IMAGE) == votes()
    again.store(OTHER, votes(2))
    assert again.read(OTHER) == votes(2)


class Disk:
    """Counts syncs, and fails the one that is asked for."""

    def __init__(self) -> None:
        self.synced: list[str] = []
        self.fail = False

    def sync(self, descriptor: int) -> None:
        if self.fail:
            raise OSError(5, "Input/output error")
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        self.synced.append("folder" if is_folder else "file")


def test_file_is_synced_before_its_name_and_its_name_before_the_answer(tmp_path: Path) -> None:
    disk = Disk()
    record = opened(tmp_path, disk.sync)
    disk.synced.clear()
    record.store(IMAGE, votes())
    assert disk.synced == ["file", "folder"]


def test_dropped_votes_stay_away_after_a_power_cut(tmp_path: Path) -> None:
    # That they are gone was said in etcd, where the tombstone went; then the arbiter's power failed
    # and they came back. So etcd seemed to have lost an image, and the whole cluster went by that.
    disk = Disk()
    record = opened(tmp_path, disk.sync)
    record.store(IMAGE, votes())
    disk.synced.clear()
    assert record.drop(IMAGE)
    assert disk.synced == ["folder"]
    assert not record.drop(IMAGE), "nothing is left"
    assert disk.synced == ["folder"]


def test_failed_sync_is_not_tried_again(tmp_path: Path) -> None:
    """The kernel reports a lost write once: a second try would look well and not be."""
    disk = Disk()
    record = opened(tmp_path, disk.sync)
    record.store(IMAGE, votes())
    disk.fail = True
    with pytest.raises(ArbiterFailed, match="its disk failed: Input/output error"):
        record.store(IMAGE, votes(5, 2))
    disk.fail = False
    with pytest.raises(ArbiterFailed):
        record.store(OTHER, votes())
    assert "Input/output error" in record.failure
    assert record.read(IMAGE) == votes(), "what was answered is what is there"
