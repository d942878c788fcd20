"""Incremental backups: `hci image export --from` and `hci image import --onto`, real processes."""

from __future__ import annotations

import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.test_changes import blocks_of, diff, qemu_io
from tests.cluster.test_snapshots import closed, copied, is_refused, take, url_at
from tests.devcluster import POOL, DevCluster
from tests.faults.flushed_writer import FlushedWriter
from tests.faults.nbd_session import NbdSession
from tests.waiting import until

BLOCK, MIB = 4096, 1 << 20
ROUNDS = 30


@pytest.fixture(scope="module")
def two() -> Iterator[DevCluster]:
    """A cluster with two gateways, for all tests of this module."""
    with DevCluster(gateways=2) as started:
        yield started


def export(cluster: DevCluster, name: str, since: str, file: Path, *more: str) -> str:
    return cluster.hci("image", "export", f"{POOL}/{name}", str(file), "--from", since, *more)


def put(cluster: DevCluster, file: Path, image: str) -> str:
    return cluster.hci("image", "import", str(file), "--onto", f"{POOL}/{image}")


def restored(cluster: DevCluster, image: str, snapshot: str, onto: str, file: Path) -> None:
    """Make a copy of a snapshot, by a whole export, under another name."""
    cluster.hci("image", "export", f"{POOL}/{image}@{snapshot}", str(file), "--force")
    cluster.hci("image", "import", str(file), f"{POOL}/{onto}")
    closed(cluster, onto)
    take(cluster, f"{onto}@{snapshot}")
    closed(cluster, onto)


@pytest.mark.timeout(900)
def test_thirty_increments_under_load_restore_to_exactly_their_snapshots(
    two: DevCluster, tmp_path: Path
) -> None:
    two.create("busy", "32M")
    enough = threading.Event()
    with NbdSession(url_at(two, "gateway1", "busy"), 5) as session:
        writer = FlushedWriter(session.blocks, 5)
        running = threading.Thread(target=writer.run, args=(session, enough.is_set))
        running.start()
        take(two, "busy@0")
        for number in range(1, ROUNDS + 1):
            take(two, f"busy@{number}")
            file = tmp_path / f"{number}.inc"
            export(two, f"busy@{number}", str(number - 1), file)
            changed = diff(two, f"busy@{number - 1}", f"busy@{number}")
            content = sum(length for _, length, kind in changed if kind == "data")
            assert changed, "nothing was written meanwhile"
            # Nothing else is in it: of each record a head and a digest.
            assert content <= file.stat().st_size < content + 64 * len(changed) + 4096
        assert running.is_alive()
        enough.set()
        running.join()
        assert writer.error is None
    closed(two, "busy")
    restored(two, "busy", "0", "back", tmp_path / "whole.raw")
    for number in range(1, ROUNDS + 1):
        put(two, tmp_path / f"{number}.inc", "back")
        held = copied(url_at(two, "gateway2", f"busy@{number}"), tmp_path / "held")
        assert copied(url_at(two, "gateway2", f"back@{number}"), tmp_path / "back") == held
    names = [each["name"] for each in two.info("back")["snapshots"]]
    assert names == [str(number) for number in range(ROUNDS + 1)]


def pair(cluster: DevCluster, image: str, tmp_path: Path, *, seed: int) -> Path:
    """An image with snapshots a and b, an increment between them, and a copy of a as IMAGE-copy."""
    chance = random.Random(seed)
    cluster.create(image, "8M")
    qemu_io(cluster, image, "write -P 1 0 8M")
    take(cluster, f"{image}@a")
    closed(cluster, image)
    blocks = sorted(chance.sample(range(8 * MIB // BLOCK), 40))
    qemu_io(cluster, image, *(f"write -P 2 {block * BLOCK} 4k" for block in blocks))
    qemu_io(cluster, image, "write -z -u 1M 1M")
    take(cluster, f"{image}@b")
    closed(cluster, image)
    file = tmp_path / f"{image}.inc"
    export(cluster, f"{image}@b", "a", file)
    restored(cluster, image, "a", f"{image}-copy", tmp_path / "whole.raw")
    return file


def test_increment_brings_sizes_and_zeroes_along(two: DevCluster, tmp_path: Path) -> None:
    two.create("sizes", "4M")
    qemu_io(two, "sizes", "write -P 1 0 4M")
    take(two, "sizes@a")
    closed(two, "sizes")
    two.hci("image", "resize", f"{POOL}/sizes", "6M")
    qemu_io(two, "sizes", "write -z -u 0 1M", "write -P 2 5M 1M")
    take(two, "sizes@b")
    closed(two, "sizes")
    two.hci("image", "resize", f"{POOL}/sizes", "2M", "--force")
    take(two, "sizes@c")
    restored(two, "sizes", "a", "sizes-copy", tmp_path / "whole.raw")
    for newer, older in (("b", "a"), ("c", "b")):
        file = tmp_path / f"{newer}.inc"
        export(two, f"sizes@{newer}", older, file)
        assert f"has the snapshot {POOL}/sizes-copy@{newer}" in put(two, file, "sizes-copy")
        held = copied(url_at(two, "gateway2", f"sizes@{newer}"), tmp_path / "held")
        assert copied(url_at(two, "gateway2", f"sizes-copy@{newer}"), tmp_path / "back") == held
    assert (tmp_path / "b.inc").stat().st_size < 1.1 * MIB


def test_increment_that_is_damaged_or_has_a_wrong_base_changes_nothing(
    two: DevCluster, tmp_path: Path
) -> None:
    file = pair(two, "strict", tmp_path, seed=2)
    copy, command = f"{POOL}/strict-copy", ("image", "import")

    def refused(path: Path, onto: str = copy) -> str:
        said = is_refused(two, *command, str(path), "--onto", onto)
        assert diff(two, "strict-copy@a") == []
        assert [each["name"] for each in two.info("strict-copy")["snapshots"]] == ["a"]
        closed(two, "strict-copy")
        return said

    content = file.read_bytes()
    bad = tmp_path / "bad.inc"
    bad.write_bytes(content[:-1])
    assert "is cut short" in refused(bad) or "is damaged" in refused(bad)
    bad.write_bytes(content[:9000] + bytes([content[9000] ^ 1]) + content[9001:])
    assert "is damaged; nothing was changed" in refused(bad)
    assert "is no increment" in refused(tmp_path / "whole.raw")
    assert "cannot be read" in refused(tmp_path / "none")
    two.create("strange", "8M")
    assert "has no snapshot a" in refused(file, f"{POOL}/strange")
    take(two, "strange@a")
    closed(two, "strange")
    assert "holds something else than" in refused(file, f"{POOL}/strange")
    assert "has a snapshot b already" in refused(file, f"{POOL}/strict")
    two.create("small", "4M")
    take(two, "small@a")
    closed(two, "small")
    assert "is not the state that" in refused(file, f"{POOL}/small")
    qemu_io(two, "strict-copy", "write -P 9 0 4k")
    said = is_refused(two, *command, str(file), "--onto", copy)
    assert f"was written since {copy}@a: go back first" in said
    closed(two, "strict-copy")
    two.hci("snapshot", "rollback", f"{copy}@a")
    put(two, file, "strict-copy")
    assert blocks_of(diff(two, "strict-copy@a", "strict-copy@b")) == blocks_of(
        diff(two, "strict@a", "strict@b")
    )


def test_exports_of_increments_that_make_no_sense_leave_no_file(
    two: DevCluster, tmp_path: Path
) -> None:
    two.create("odd", "1M")
    for name in "ab":
        take(two, f"odd@{name}")
    folder = tmp_path / "to"
    folder.mkdir()
    command = ("image", "export", f"{POOL}/odd@a", str(folder / "file"), "--from")
    assert "is newer than" in is_refused(two, *command, "b")
    assert "has no snapshot c" in is_refused(two, *command, "c")
    assert list(folder.iterdir()) == []
    export(two, "odd@b", "a", folder / "file")
    again = is_refused(two, "image", "export", f"{POOL}/odd@b", str(folder / "file"), "--from", "a")
    assert "exists; remove it, or give --force" in again
    assert list(folder.iterdir()) == [folder / "file"]


def test_import_that_is_interrupted_leaves_the_image_at_its_base(
    two: DevCluster, tmp_path: Path
) -> None:
    two.create("cut", "256M")
    take(two, "cut@a")
    closed(two, "cut")
    qemu_io(two, "cut", "write -P 5 0 256M")
    take(two, "cut@b")
    file = tmp_path / "cut.inc"
    export(two, "cut@b", "a", file)
    two.create("cut-copy", "256M")
    take(two, "cut-copy@a")
    closed(two, "cut-copy")
    importing = subprocess.Popen(
        two.command("image", "import", str(file), "--onto", f"{POOL}/cut-copy"),
        env=two.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    until("something was written", lambda: two.info("cut-copy")["open_on"] is not None, 60)
    time.sleep(0.5)
    importing.send_signal(signal.SIGINT)
    importing.communicate(timeout=120)
    if importing.returncode == 0:
        pytest.fail("it was through before it was interrupted")
    assert [each["name"] for each in two.info("cut-copy")["snapshots"]] == ["a"]
    assert diff(two, "cut-copy@a") == []
