"""Real disks go in and come out unchanged, and stay as thin as they were."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.devcluster import POOL, DevCluster, used_bytes
from tests.waiting import stop

DISK_BYTES = 4 << 30
DATA_BYTES = 96 << 20
# Log, checksums and partly filled shards come on top of the data itself.
SLACK_BYTES = 48 << 20


def test_sparse_qcow2_of_gigabytes_imported_and_exported_is_equal_and_thin(
    shared: DevCluster, tmp_path: Path
) -> None:
    disk = tmp_path / "disk.qcow2"
    _scattered_qcow2(disk, tmp_path)
    shared.hci("image", "import", str(disk), f"{POOL}/big")
    assert shared.info("big")["size_bytes"] == DISK_BYTES
    _compare(disk, "qcow2", shared.url("big"), "raw")
    shared.must_be_equal("big")
    used = shared.info("big")["used_bytes"]
    assert len(used) == 3
    assert used_bytes(shared.info("big")) < DATA_BYTES + SLACK_BYTES, used

    for name in ("out.qcow2", "out.raw"):
        exported = tmp_path / name
        shared.hci("image", "export", f"{POOL}/big", str(exported))
        _compare(disk, "qcow2", str(exported), exported.suffix[1:])
        assert exported.stat().st_blocks * 512 < DATA_BYTES + SLACK_BYTES


@pytest.mark.parametrize("form", ["raw", "qcow2", "vmdk", "vdi"])
def test_every_format_imported_and_exported_is_equal(
    shared: DevCluster, tmp_path: Path, form: str
) -> None:
    raw = tmp_path / "source"
    raw.write_bytes(random.Random(form).randbytes(3 << 20) + bytes(1 << 20))
    source = tmp_path / f"disk.{form}"
    _run("qemu-img", "convert", "-f", "raw", "-O", form, str(raw), str(source))
    shared.hci("image", "import", str(source), f"{POOL}/in-{form}")
    _compare(str(raw), "raw", shared.url(f"in-{form}"), "raw")
    exported = tmp_path / f"out.{form}"
    shared.hci("image", "export", f"{POOL}/in-{form}", str(exported))
    _compare(str(raw), "raw", str(exported), form)


def test_raw_file_of_odd_length_is_padded_with_zeroes(shared: DevCluster, tmp_path: Path) -> None:
    source = tmp_path / "odd.raw"
    content = random.Random(1).randbytes(1_000_001)
    source.write_bytes(content)
    shared.hci("image", "import", str(source), f"{POOL}/odd")
    size = shared.info("odd")["size_bytes"]
    assert size == 1_000_448
    exported = tmp_path / "out.raw"
    shared.hci("image", "export", f"{POOL}/odd", str(exported))
    assert exported.read_bytes() == content + bytes(size - len(content))


def test_truncated_file_is_refused_and_leaves_no_image(shared: DevCluster, tmp_path: Path) -> None:
    disk = tmp_path / "whole.qcow2"
    raw = tmp_path / "whole.raw"
    raw.write_bytes(os.urandom(8 << 20))
    _run("qemu-img", "convert", "-O", "qcow2", str(raw), str(disk))
    cut = tmp_path / "cut.qcow2"
    cut.write_bytes(disk.read_bytes()[: 2 << 20])
    done = shared.try_hci("image", "import", str(cut), f"{POOL}/cut")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert f"{POOL}/cut" not in _names(shared)


def test_interrupted_import_leaves_no_image(shared: DevCluster, tmp_path: Path) -> None:
    source = tmp_path / "long.raw"
    source.write_bytes(os.urandom(64 << 20))
    node = int(shared.members()["node1"]["pid"])
    # Writes wait for a node that is silent, so the import is under way for as long.
    stop(node)
    try:
        running = subprocess.Popen(
            shared.command("image", "import", str(source), f"{POOL}/interrupted"),
            env=shared.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while f"{POOL}/interrupted" not in _names(shared):
            assert running.poll() is None, "the import ended before it could be interrupted"
        running.terminate()
        # A second one ended the import before it had taken its image away.
        time.sleep(0.5)
        running.terminate()
        assert running.wait(timeout=60) != 0
        assert f"{POOL}/interrupted" not in _names(shared)
    finally:
        os.kill(node, signal.SIGCONT)
    shared.await_health("ok")


def test_export_over_a_file_without_force_is_refused(shared: DevCluster, tmp_path: Path) -> None:
    shared.create("small", "1M")
    there = tmp_path / "there.raw"
    there.write_text("precious")
    done = shared.try_hci("image", "export", f"{POOL}/small", str(there))
    assert done.returncode == 1
    assert there.read_text() == "precious"


def _scattered_qcow2(disk: Path, directory: Path) -> None:
    """A disk with data of all sizes strewn over it, at offsets that fit no block of anybody."""
    chance = random.Random(20)
    raw = directory / "scattered.raw"
    with raw.open("wb") as file:
        file.truncate(DISK_BYTES)
        left = DATA_BYTES
        while left > 0:
            length = min(left, chance.choice([512, 4096, 5120, 65536, 300_032, 1 << 20, 6 << 20]))
            file.seek(chance.randrange(0, DISK_BYTES - length) // 512 * 512)
            file.write(chance.randbytes(length))
            left -= length
        file.seek(DISK_BYTES - 512)
        file.write(chance.randbytes(512))
    _run("qemu-img", "convert", "-O", "qcow2", str(raw), str(disk))
    raw.unlink()


def _names(cluster: DevCluster) -> list[str]:
    return [image["name"] for image in cluster.json("image", "ls")]


def _compare(one: str | Path, one_format: str, other: str, other_format: str) -> None:
    _run("qemu-img", "compare", "-f", one_format, "-F", other_format, str(one), other)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
