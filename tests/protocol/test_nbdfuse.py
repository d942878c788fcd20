"""nbdfuse: the export as a file, read and written by programs that know nothing of NBD.

Covers direct I/O of aligned blocks, buffered I/O of odd ones, and fsync through the kernel.
"""

import mmap
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

MIB = 1 << 20
SIZE = 64 * MIB
START_S = 30.0

pytestmark = pytest.mark.skipif(
    shutil.which("nbdfuse") is None or os.geteuid() != 0 or not Path("/dev/fuse").exists(),
    reason="needs nbdfuse, and root with /dev/fuse to mount it",
)


@pytest.fixture
def disk(new_export: Callable[[int], str], tmp_path: Path) -> Iterator[Path]:
    """The export as a file."""
    file = tmp_path / "mounted" / "disk"
    file.parent.mkdir()
    process = subprocess.Popen(["nbdfuse", str(file), new_export(SIZE)])
    try:
        deadline = time.monotonic() + START_S
        while not file.exists():
            assert process.poll() is None, "nbdfuse ended"
            assert time.monotonic() < deadline, "nbdfuse does not begin"
            time.sleep(0.05)
        yield file
    finally:
        subprocess.run(["umount", str(file.parent)], check=False)
        try:
            process.wait(timeout=START_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def aligned(content: bytes) -> mmap.mmap:
    """Memory that direct I/O takes: it begins at a page."""
    memory = mmap.mmap(-1, len(content))
    memory[:] = content
    return memory


def test_nbdfuse_direct_io_reads_back_what_it_wrote(disk: Path) -> None:
    assert disk.stat().st_size == SIZE
    chance = random.Random(21)
    mirror = bytearray(SIZE)
    descriptor = os.open(disk, os.O_RDWR | os.O_DIRECT)
    try:
        for _ in range(60):
            length = 4096 * chance.choice([1, 2, 16, 64, 256])
            offset = 4096 * chance.randrange((SIZE - length) // 4096)
            content = chance.randbytes(length)
            assert os.pwrite(descriptor, aligned(content), offset) == length
            mirror[offset : offset + length] = content
        os.fsync(descriptor)
        for offset in range(0, SIZE, MIB):
            found = mmap.mmap(-1, MIB)
            assert os.preadv(descriptor, [found], offset) == MIB
            assert found[:] == mirror[offset : offset + MIB], offset
    finally:
        os.close(descriptor)


def test_nbdfuse_buffered_io_of_odd_pieces_and_direct_io_agree(disk: Path) -> None:
    chance = random.Random(22)
    mirror = bytearray(MIB)
    with disk.open("r+b", buffering=0) as file:
        for _ in range(200):
            length = chance.randrange(1, 9000)
            offset = chance.randrange(MIB - length)
            content = chance.randbytes(length)
            file.seek(offset)
            file.write(content)
            mirror[offset : offset + length] = content
        os.fsync(file.fileno())
    descriptor = os.open(disk, os.O_RDONLY | os.O_DIRECT)
    try:
        found = mmap.mmap(-1, MIB)
        assert os.preadv(descriptor, [found], 0) == MIB
        assert found[:] == mirror
    finally:
        os.close(descriptor)
