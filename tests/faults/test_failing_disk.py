"""A disk that fails under a node that runs: its process ends, guests go on, it heals once mended.

The disk is a file that another process serves over FUSE, with a loop device and ext4 on it. Where
that process dies every request to the device fails with EIO, as of a disk that has gone. Device
mapper would do it with less, but kernels without it exist, and this asks for nothing special.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import reaper
from tests.devcluster import DevCluster
from tests.faults.nbd_session import NbdSession
from tests.waiting import until

DISK_BYTES = 1 << 30
BLOCKS = 256
MENDED_S = 120.0
"""A hang detector."""


def run(*command: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout.strip()


class Disk:
    """A file system at `folder` whose disk fails and is mended at will."""

    def __init__(self, folder: Path, mounted_at: Path, size_bytes: int = DISK_BYTES) -> None:
        self.folder = folder
        self.mounted_at = mounted_at
        self.content, self.export = folder / "content", folder / "export"
        self.content.touch()
        os.truncate(self.content, size_bytes)
        self.export.touch()
        run("mkfs.ext4", "-q", "-F", self.content)
        self._undo = contextlib.ExitStack()
        self._pid: int | None = None

    def attach(self) -> None:
        pid_file = self.folder / "pid"
        run(
            *("qemu-storage-daemon", "--daemonize", "--pidfile", pid_file),
            *("--blockdev", f"driver=file,node-name=file,filename={self.content}"),
            *("--blockdev", "driver=raw,node-name=disk,file=file"),
            *("--export", f"fuse,id=e,node-name=disk,mountpoint={self.export},writable=on"),
        )
        self._pid = int(pid_file.read_text())
        self._undo.callback(run, "umount", "--lazy", self.export)
        self._undo.callback(self.fail)
        device = run("losetup", "--find", "--show", self.export)
        self._undo.callback(run, "losetup", "--detach", device)
        run("mount", "-t", "ext4", device, self.mounted_at)
        self._undo.callback(run, "umount", "--lazy", self.mounted_at)

    def fail(self) -> None:
        """From now on every request to the disk fails."""
        if self._pid is not None:
            os.kill(self._pid, signal.SIGKILL)
            self._pid = None

    def fill(self) -> None:
        """From now on the disk has no room."""
        with self._filler.open("ab") as filler:
            space = os.statvfs(self.mounted_at)
            piece = space.f_bfree * space.f_frsize
            while piece >= space.f_frsize:
                try:
                    os.posix_fallocate(filler.fileno(), os.fstat(filler.fileno()).st_size, piece)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    piece //= 2

    def make_room(self) -> None:
        """It has again."""
        self._filler.unlink(missing_ok=True)

    @property
    def _filler(self) -> Path:
        return self.mounted_at / "filler"

    def detach(self) -> None:
        """Nobody uses it any more."""
        self._undo.close()


@pytest.fixture
def on_a_disk() -> Iterator[tuple[DevCluster, Disk]]:
    """A cluster, and the disk that its node1 lives on."""
    assert os.geteuid() == 0, "mounting needs root"
    with DevCluster() as cluster, contextlib.ExitStack() as ends:
        cluster.hci("dev", "stop")
        place, aside = cluster.directory / "node1", cluster.directory / "aside"
        place.rename(aside)
        place.mkdir()
        folder = Path(tempfile.mkdtemp(prefix="hci-disk-"))
        ends.callback(shutil.rmtree, folder)
        reaper.watch(folder, remove=True)
        disk = Disk(folder, place)
        ends.callback(disk.detach)
        disk.attach()
        ends.callback(cluster.try_hci, "dev", "stop")
        shutil.copytree(aside, place, dirs_exist_ok=True)
        cluster.start()
        yield cluster, disk


def test_a_failing_disk_ends_its_node_which_heals_once_it_is_mended(
    on_a_disk: tuple[DevCluster, Disk],
) -> None:
    cluster, disk = on_a_disk
    cluster.create("web", "64M")
    with NbdSession(cluster.url("web"), 1) as session:
        version = session.go_on(2, BLOCKS)
        disk.fail()
        version = session.go_on(5, BLOCKS, version)
        until("its process ends", lambda: cluster.members()["node1"]["state"] != "running")
        log = Path(cluster.members()["node1"]["log"]).read_text()
        # ext4 that could not write its own journal may be the first to notice.
        assert "Input/output error" in log or "Read-only file system" in log, log[-2000:]
        stale = [entry["node"] for entry in cluster.info("web")["stale"]]
        assert stale == ["node1"]
        assert cluster.health() == "degraded"
        version = session.go_on(2, BLOCKS, version)

        disk.detach()
        disk.attach()
        cluster.run("node1")
        cluster.await_health("ok", timeout_s=MENDED_S)
        version = session.go_on(2, BLOCKS, version)
        assert session.call("read", 0, BLOCKS) == [version] * BLOCKS
    assert cluster.info("web")["stale"] == []
    cluster.must_be_equal("web")
