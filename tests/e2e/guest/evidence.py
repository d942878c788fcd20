"""Judges a guest's disk from outside: the file system's own check, then every checksum.

Reads a raw file with e2fsck and debugfs, never by mounting: no root, no kernel in between.
"""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

RECORD_BYTES = 4096


class DamageError(Exception):
    """The disk does not hold what the guest was told is stored."""


def check_file_system(raw: Path) -> str:
    """Runs `e2fsck -fn`; returns its last line, raises DamageError unless it is clean."""
    done = subprocess.run(
        ["e2fsck", "-f", "-n", str(raw)], capture_output=True, text=True, timeout=300
    )
    if done.returncode != 0:
        raise DamageError(f"e2fsck -fn: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout.strip().splitlines()[-1]


def check_files(raw: Path, files: Mapping[int, str], records: Mapping[int, str]) -> int:
    """Compares every acknowledged file and record; returns how many, raises DamageError."""
    with tempfile.TemporaryDirectory(prefix="evidence-", dir=raw.parent) as scratch:
        _dump(raw, "/data", Path(scratch))
        _dump(raw, "/journal", Path(scratch))
        for number, expected in files.items():
            _compare(Path(scratch) / "data" / f"file-{number}", expected)
        if records:
            _check_records(Path(scratch) / "journal" / "records", records)
    return len(files) + len(records)


def _check_records(journal: Path, records: Mapping[int, str]) -> None:
    content = journal.read_bytes() if journal.exists() else b""
    for number, expected in records.items():
        record = content[number * RECORD_BYTES : (number + 1) * RECORD_BYTES]
        if hashlib.sha256(record).hexdigest() != expected:
            raise DamageError(f"record {number} of the journal is not what was committed")


def _compare(file: Path, expected: str) -> None:
    if not file.exists():
        raise DamageError(f"{file.name} was synced and is gone")
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != expected:
        raise DamageError(f"{file.name} was synced with {expected} and reads as {found}")


def _dump(raw: Path, directory: str, into: Path) -> None:
    # debugfs ends with 0 whatever happens; a file that it could not read is found missing.
    subprocess.run(
        ["debugfs", "-R", f'rdump {directory} "{into}"', str(raw)],
        check=True,
        capture_output=True,
        timeout=300,
    )
