"""What a node says that its store takes."""

from pathlib import Path

from hci.usage import FolderUsage


def test_usage_is_that_of_the_folder_and_not_of_its_file_system(tmp_path: Path) -> None:
    # `hci node ls` showed what everything on the disk took, of other programs too.
    (tmp_path / "shards" / "1").mkdir(parents=True)
    (tmp_path / "log").write_bytes(bytes(1 << 20))
    (tmp_path / "shards" / "1" / "a").write_bytes(b"x" * 4096)
    with open(tmp_path / "shards" / "1" / "sparse", "wb") as sparse:
        sparse.truncate(1 << 40)
    (tmp_path / "away").symlink_to("/nowhere")
    counted = FolderUsage(tmp_path).count()
    assert counted is not None
    assert (1 << 20) + 4096 <= counted < (1 << 20) + (1 << 18)


def test_usage_of_a_folder_that_is_gone_is_nothing(tmp_path: Path) -> None:
    assert FolderUsage(tmp_path / "none").count() == 0


def test_usage_is_not_counted_at_each_question(tmp_path: Path) -> None:
    usage = FolderUsage(tmp_path)
    assert usage.count() == 0
    (tmp_path / "a").write_bytes(b"x" * 4096)
    assert usage.count() == 0, "a moment ago it was counted"
