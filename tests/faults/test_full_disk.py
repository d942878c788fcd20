"""One node's disk is full: the guest goes on with the others, and people are told.

Its connection was held, waiting for room that never came, and every write of every image with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from tests.devcluster import DevCluster

SIZE_MIB = 400
DISK_MIB = 300
"""Less than what is written, more than the log segments that a new store reserves."""


@pytest.fixture
def small_disk() -> Iterator[DevCluster]:
    """A cluster whose node1 lives on a small file system of its own."""
    assert os.geteuid() == 0, "mounting needs root"
    with DevCluster() as cluster:
        cluster.hci("dev", "stop")
        folder, aside = cluster.directory / "node1", cluster.directory / "aside"
        folder.rename(aside)
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}M", "hci-test", str(folder)]
        subprocess.run(mount, check=True)
        try:
            shutil.copytree(aside, folder, dirs_exist_ok=True)
            cluster.start()
            yield cluster
        finally:
            cluster.try_hci("dev", "stop")
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _qemu_io(url: str, *commands: str) -> str:
    arguments = [part for command in commands for part in ("-c", command)]
    done = subprocess.run(
        ["qemu-io", "-f", "raw", *arguments, url], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_full_disk_leaves_its_node_behind_and_writes_go_on(small_disk: DevCluster) -> None:
    cluster = small_disk
    cluster.create("web", f"{SIZE_MIB}M")
    url = cluster.url("web")
    steps = [f"write -P 7 {at}M 50M" for at in range(0, SIZE_MIB, 50)]
    out = _qemu_io(url, *steps, "flush", f"read -P 7 0 {SIZE_MIB}M")
    assert "verification failed" not in out.lower()
    assert [entry["node"] for entry in cluster.info("web")["stale"]] == ["node1"]
    status = cluster.json("status")
    assert status["health"] == "degraded"
    assert "disk is full" in str(status)
    cluster.must_be_equal("web")
