"""The judge of a guest's disk: it passes what was acknowledged, and finds every kind of damage."""

from __future__ import annotations

import hashlib
import random
import subprocess
from pathlib import Path

import pytest

from tests.e2e.guest.evidence import RECORD_BYTES, DamageError, check_file_system, check_files

CONTENT = random.Random(4).randbytes(300_000)
RECORDS = random.Random(5).randbytes(2 * RECORD_BYTES)
FILES = {0: hashlib.sha256(CONTENT).hexdigest()}
COMMITTED = {
    number: hashlib.sha256(RECORDS[number * RECORD_BYTES :][:RECORD_BYTES]).hexdigest()
    for number in (0, 1)
}


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A clean ext4 disk as the guest leaves it, with one file and two records."""
    root = tmp_path / "root"
    (root / "data").mkdir(parents=True)
    (root / "journal").mkdir()
    (root / "data" / "file-0").write_bytes(CONTENT)
    (root / "journal" / "records").write_bytes(RECORDS)
    raw = tmp_path / "disk.raw"
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", root, raw, "16M"], check=True, timeout=60)
    return raw


def test_disk_as_it_was_left_passes(disk: Path) -> None:
    check_file_system(disk)
    assert check_files(disk, FILES, COMMITTED) == 3


def test_one_wrong_byte_of_a_file_is_found(disk: Path) -> None:
    image = bytearray(disk.read_bytes())
    image[image.index(CONTENT[4096:8192]) + 100] ^= 1
    disk.write_bytes(image)
    with pytest.raises(DamageError, match="file-0 was synced"):
        check_files(disk, FILES, COMMITTED)


def test_wrong_record_is_found(disk: Path) -> None:
    image = bytearray(disk.read_bytes())
    image[image.index(RECORDS[RECORD_BYTES:])] ^= 1
    disk.write_bytes(image)
    with pytest.raises(DamageError, match="record 1"):
        check_files(disk, FILES, COMMITTED)


def test_missing_file_is_found(disk: Path) -> None:
    with pytest.raises(DamageError, match="file-1 was synced and is gone"):
        check_files(disk, {**FILES, 1: FILES[0]}, COMMITTED)


def test_damaged_file_system_is_found(disk: Path) -> None:
    image = bytearray(disk.read_bytes())
    # The block bitmap and the inode table of the first group follow the descriptors.
    image[8 * 1024 : 64 * 1024] = bytes(56 * 1024)
    disk.write_bytes(image)
    with pytest.raises(DamageError, match="e2fsck"):
        check_file_system(disk)
