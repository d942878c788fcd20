"""fio with its nbd engine: random load that carries its own checksums.

Covers random writes with fsync and verification by crc32c at several block sizes and depths, odd
block sizes, mixed reads, and trims alone and between writes.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., str]
Fio = Callable[..., dict[str, Any]]


@pytest.fixture
def fio(run: Run, nbd_uri: str, tmp_path: Path) -> Fio:
    """Runs one fio job on the export; returns its report, in which no error stands."""

    def run_job(**options: str | int) -> dict[str, Any]:
        lines = ["[job]", "ioengine=nbd", f"uri={nbd_uri}", "allrandrepeat=1", "thread=1"]
        # Else fio leaves a file where the tests run.
        lines.append("verify_state_save=0")
        lines += [f"{name}={value}" for name, value in options.items()]
        job = tmp_path / "job.fio"
        job.write_text("\n".join(lines) + "\n")
        told = run("fio", "--output-format=json", job, timeout_s=250)
        report: dict[str, Any] = json.loads(told[told.index("{") :])
        for done in report["jobs"]:
            assert done["error"] == 0, done
        return report

    return run_job


def _operations(report: dict[str, Any], kind: str) -> int:
    return sum(int(job[kind]["total_ios"]) for job in report["jobs"])


@pytest.mark.parametrize(
    ("block", "depth", "fsync"), [("4k", 1, 1), ("4k", 32, 16), ("64k", 16, 32), ("1m", 8, 0)]
)
def test_fio_random_writes_with_fsync_verify(fio: Fio, block: str, depth: int, fsync: int) -> None:
    report = fio(
        rw="randwrite",
        bs=block,
        iodepth=depth,
        fsync=fsync,
        size="256m",
        io_size="8m" if depth == 1 else "64m",
        verify="crc32c",
        verify_fatal=1,
    )
    assert _operations(report, "write") > 0
    assert _operations(report, "read") > 0


def test_fio_odd_block_sizes_verify(fio: Fio) -> None:
    report = fio(
        rw="randwrite",
        bsrange="512-70k",
        bs_unaligned=1,
        iodepth=16,
        size="64m",
        io_size="64m",
        verify="crc32c",
        verify_fatal=1,
        verify_backlog=64,
        serialize_overlap=1,
    )
    assert _operations(report, "read") > 0


def test_fio_mixed_reads_and_writes_verify(fio: Fio) -> None:
    report = fio(
        rw="randrw",
        rwmixread=70,
        bs="4k",
        iodepth=32,
        size="64m",
        verify="crc32c",
        verify_fatal=1,
        verify_backlog=256,
    )
    assert _operations(report, "read") > 0
    assert _operations(report, "write") > 0


def test_fio_random_trims_end_without_errors(fio: Fio) -> None:
    report = fio(rw="randtrim", bs="64k", iodepth=16, size="256m", io_size="128m")
    assert _operations(report, "trim") > 0


def test_fio_trims_before_writes_verify(fio: Fio) -> None:
    report = fio(
        rw="randtrimwrite",
        bs="16k",
        iodepth=1,
        size="64m",
        verify="crc32c",
        verify_fatal=1,
        fsync=32,
    )
    assert _operations(report, "trim") > 0
    assert _operations(report, "write") > 0
