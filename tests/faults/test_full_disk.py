"""Disks that are full: guests go on, wait or are told, and all is well again once there is room."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import TimeoutError as StillWaiting
from pathlib import Path

import pytest

from tests.devcluster import POOL, DevCluster
from tests.faults.nbd_session import NbdError, NbdSession
from tests.faults.stamps import BLOCK_BYTES
from tests.waiting import until

SIZE_MIB = 400
DISK_MIB = 300
"""Less than what is written, more than the log segments that a new store reserves."""

SMALL_LOG = 'log_bytes = "32M"\n'
SMALL_DISK_MIB = 96
SMALL_IMAGE = "160M"
MIB = (1 << 20) // BLOCK_BYTES
"""Blocks of a mebibyte, which is written at a time."""
STALLED_S = 12.0
"""A write that is not answered for so long waits for something."""
TOLD_S = 30.0
"""Within this a client hears that there is no room: a hang detector."""
NO_ROOM = "No space left on device"


@contextlib.contextmanager
def small(folder: Path, size_mib: int) -> Iterator[None]:
    """Has a folder that is there on a small file system of its own, empty."""
    assert os.geteuid() == 0, "mounting needs root"
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_mib}M", "hci-test", str(folder)]
    subprocess.run(mount, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def make_room(cluster: DevCluster, nodes: list[str], size_mib: int) -> None:
    for node in nodes:
        resize = ["mount", "-o", f"remount,size={size_mib}M", str(cluster.directory / node)]
        subprocess.run(resize, check=True)


def full_nodes(cluster: DevCluster) -> list[str]:
    problems = [each["what"] for each in cluster.json("status")["problems"]]
    full = [what for what in problems if "disk is full" in what]
    return [node for node in cluster.nodes if any(node in what for what in full)]


@pytest.fixture
def small_disk() -> Iterator[DevCluster]:
    """A cluster whose node1 lives on a small file system of its own."""
    with DevCluster() as cluster, contextlib.ExitStack() as mounts:
        cluster.hci("dev", "stop")
        folder, aside = cluster.directory / "node1", cluster.directory / "aside"
        folder.rename(aside)
        folder.mkdir()
        mounts.enter_context(small(folder, DISK_MIB))
        mounts.callback(cluster.try_hci, "dev", "stop")
        shutil.copytree(aside, folder, dirs_exist_ok=True)
        cluster.start()
        yield cluster


@pytest.fixture
def small_disks() -> Iterator[DevCluster]:
    """A cluster all of whose nodes have small disks, and logs that are small beside them."""
    with DevCluster() as cluster, contextlib.ExitStack() as mounts:
        cluster.hci("dev", "stop")
        text = cluster.config.read_text()
        for node in cluster.nodes:
            text = text.replace(f"[node.{node}]\n", f"[node.{node}]\n{SMALL_LOG}")
        cluster.config.write_text(text)
        # A store keeps the segments it was made with: all begins anew.
        for folder in ("etcd", *cluster.nodes):
            shutil.rmtree(cluster.directory / folder)
        for node in cluster.nodes:
            (cluster.directory / node).mkdir()
            mounts.enter_context(small(cluster.directory / node, SMALL_DISK_MIB))
        mounts.callback(cluster.try_hci, "dev", "stop")
        cluster.start()
        yield cluster


def _qemu_io(url: str, *commands: str) -> subprocess.CompletedProcess[str]:
    arguments = [part for command in commands for part in ("-c", command)]
    return subprocess.run(
        ["qemu-io", "-f", "raw", *arguments, url], capture_output=True, text=True, timeout=200
    )


def test_a_full_disk_leaves_its_node_behind_until_it_has_room(small_disk: DevCluster) -> None:
    """Its connection was held, waiting for room that never came, and every write of every image
    with it."""
    cluster = small_disk
    before = cluster.members()["node1"]["pid"]
    cluster.create("web", f"{SIZE_MIB}M")
    url = cluster.url("web")
    steps = [f"write -P 7 {at}M 50M" for at in range(0, SIZE_MIB, 50)]
    done = _qemu_io(url, *steps, "flush", f"read -P 7 0 {SIZE_MIB}M")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verification failed" not in done.stdout.lower()
    assert [entry["node"] for entry in cluster.info("web")["stale"]] == ["node1"]
    status = cluster.json("status")
    assert status["health"] == "degraded"
    assert "disk is full" in str(status)
    cluster.must_be_equal("web")

    make_room(cluster, ["node1"], 3 * SIZE_MIB)
    # A heal that found no room is tried again a minute later at most.
    cluster.await_health("ok", timeout_s=150)
    assert cluster.members()["node1"]["pid"] == before
    assert cluster.info("web")["stale"] == []
    cluster.must_be_equal("web")


def fill(session: NbdSession) -> int:
    """Writes until a write waits, or fails for want of room; returns the first such block."""
    for block in range(0, session.blocks, MIB):
        answer = session.submit("write", block, MIB, 1)
        try:
            answer.result(timeout=STALLED_S)
        except (StillWaiting, NbdError):
            return block
        if block % (8 * MIB) == 0:
            session.call("flush")
    raise AssertionError("the image found room where there is none")


def test_writes_wait_while_all_disks_are_full_and_go_on_by_themselves(
    small_disks: DevCluster,
) -> None:
    cluster = small_disks
    cluster.create("web", SMALL_IMAGE)
    with NbdSession(cluster.url("web"), 1) as session:
        block = fill(session)
        waiting = [session.submit("write", at, MIB, 2) for at in (block + MIB, block + 2 * MIB)]
        until("two nodes say that they are full", lambda: len(full_nodes(cluster)) >= 2)
        # What needs no room goes on.
        assert session.call("read", 0, MIB) == [1] * MIB
        session.call("flush")
        time.sleep(3)
        assert not any(answer.done() for answer in waiting)

        make_room(cluster, cluster.nodes, 3 * SMALL_DISK_MIB)
        for answer in waiting:
            answer.result(timeout=60)
        session.call("write", block + 3 * MIB, MIB, 2)
        session.call("flush")
        assert session.call("read", block, 4 * MIB) == [1] * MIB + [2] * 3 * MIB
        for at in range(0, block, MIB):
            assert session.call("read", at, MIB) == [1] * MIB
    cluster.await_health("ok", timeout_s=150)
    cluster.must_be_equal("web")


def write_where_there_is_room(session: NbdSession, block: int, version: int) -> None:
    def succeeds() -> bool:
        error = session.submit("write", block, MIB, version).exception(timeout=TOLD_S)
        assert error is None or NO_ROOM in str(error), error
        return error is None

    until("writes succeed where there is room", succeeds)


def test_writes_fail_while_all_disks_are_full_where_the_pool_says_so(
    small_disks: DevCluster,
) -> None:
    cluster = small_disks
    cluster.create("old", "24M")
    done = _qemu_io(cluster.url("old"), "write -P 3 0 24M", "flush")
    assert done.returncode == 0, done.stdout + done.stderr
    cluster.create("web", SMALL_IMAGE)
    with NbdSession(cluster.url("web"), 1) as session:
        block = fill(session)
        stuck = session.submit("write", block + MIB, MIB, 2)
        time.sleep(3)
        assert not stuck.done(), "by default writes wait"
        # The setting is followed by what waits already.
        cluster.hci("pool", "set", POOL, "--when-full", "enospc")
        with pytest.raises(NbdError, match=NO_ROOM):
            stuck.result(timeout=TOLD_S)
        began = time.monotonic()
        with pytest.raises(NbdError, match=NO_ROOM):
            session.call("write", block + 2 * MIB, MIB, 2)
        assert time.monotonic() - began < TOLD_S
        assert session.call("read", 0, MIB) == [1] * MIB
        session.call("flush")
    # A guest that is started now sees the same, and reads.
    url = cluster.url("web")
    done = _qemu_io(url, "write -P 9 150M 1M", "read 4M 1M")
    assert NO_ROOM in done.stdout + done.stderr
    assert "read 1048576/1048576 bytes at offset 4194304" in done.stdout

    # An image that is deleted makes room.
    cluster.remove("old")
    with NbdSession(url, 1) as session:
        write_where_there_is_room(session, block, 3)
        make_room(cluster, cluster.nodes, 3 * SMALL_DISK_MIB)
        for at in range(block, block + 3 * MIB, MIB):
            write_where_there_is_room(session, at, 4)
        session.call("flush")
        assert session.call("read", block, 3 * MIB) == [4] * 3 * MIB
        for at in range(0, block, MIB):
            assert session.call("read", at, MIB) == [1] * MIB
    cluster.await_health("ok", timeout_s=150)
    cluster.must_be_equal("web")
