"""fio with its nbd engine: random load that carries its own checksums.

Covers random writes with fsync and verification by crc32c at several block sizes and depths, odd
block sizes, mixed reads, and trims alone and between writes. What fio itself checks of trims passes
on a server that ignores them: jobs behind them read for zeroes, and the export has to show holes.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

MIB = 1 << 20

Run = Callable[..., str]
Report = dict[str, Any]
Jobs = Callable[[Mapping[str, Mapping[str, str | int]]], Report]
Fio = Callable[..., Report]


@pytest.fixture
def fio_jobs(run: Run, nbd_uri: str, tmp_path: Path) -> Jobs:
    """Runs fio jobs on the export, one after the other; returns its report, without an error."""

    def run_jobs(jobs: Mapping[str, Mapping[str, str | int]]) -> Report:
        lines = ["[global]", "ioengine=nbd", f"uri={nbd_uri}", "allrandrepeat=1", "thread=1"]
        # Else fio leaves a file where the tests run.
        lines.append("verify_state_save=0")
        for name, options in jobs.items():
            lines += [f"[{name}]", "stonewall=1"]
            lines += [f"{option}={value}" for option, value in options.items()]
        job = tmp_path / "job.fio"
        job.write_text("\n".join(lines) + "\n")
        told = run("fio", "--output-format=json", job, timeout_s=250)
        report: Report = json.loads(told[told.index("{") :])
        assert [done["jobname"] for done in report["jobs"]] == list(jobs)
        for done in report["jobs"]:
            assert done["error"] == 0, done
        return report

    return run_jobs


@pytest.fixture
def fio(fio_jobs: Jobs) -> Fio:
    """Runs one fio job on the export."""
    return lambda **options: fio_jobs({"job": options})


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


def test_fio_random_trims_leave_zeroes_and_holes_and_their_neighbours(
    fio_jobs: Jobs, run: Run, nbd_uri: str
) -> None:
    def reads(offset_mib: int, size_mib: int, pattern: str) -> dict[str, str | int]:
        place = {"offset": f"{offset_mib}m", "size": f"{size_mib}m"}
        verify: dict[str, str | int] = {"verify": "pattern", "verify_pattern": pattern}
        return {"rw": "randread", "bs": "64k", "iodepth": 16, "verify_fatal": 1, **verify, **place}

    # A random trim takes each block of its range once.
    trim = {"rw": "randtrim", "bs": "64k", "iodepth": 16, "offset": "16m", "size": "96m"}
    report = fio_jobs(
        {
            "fill": {"rw": "write", "bs": "1m", "size": "128m", "buffer_pattern": "0xa5"},
            "trim": trim,
            "zero": reads(16, 96, "0x00"),
            "below": reads(0, 16, "0xa5"),
            "above": reads(112, 16, "0xa5"),
        }
    )
    assert _operations(report, "trim") == 96 * 16
    assert _operations(report, "read") == 128 * 16
    extents = json.loads(run("nbdinfo", "--json", "--map", nbd_uri))
    holes = {
        place // MIB
        for extent in extents
        if extent["type"] == 3
        for place in range(extent["offset"], extent["offset"] + extent["length"], MIB)
    }
    assert holes & set(range(128)) == set(range(16, 112))


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
    assert _operations(report, "read") >= _operations(report, "write")
