"""Runs fio once and reads its answer."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.processes import processor_time_s
from bench.workloads import FILL, FILLS, IMAGE_BYTES

FILL_TIMEOUT_S = 180
GRACE_S = 60


class MeasurementError(Exception):
    """A measurement could not be taken; the message says why, for fio in its last words."""


@dataclass(frozen=True)
class Measurement:
    """One run of one workload on one system."""

    iops: float
    mb_per_s: float
    median_us: float
    p99_us: float
    cpu_us_per_op: float


def fill(target: Sequence[str], size_bytes: int = IMAGE_BYTES) -> None:
    """Writes the whole image, so that no read finds a hole and no write grows the system."""
    for _ in range(FILLS):
        _run([f"--size={size_bytes}", *FILL], [target], FILL_TIMEOUT_S)


def measure(
    workload: Sequence[str],
    targets: Sequence[Sequence[str]],
    pids: Sequence[int],
    runtime_s: int,
    size_bytes: int = IMAGE_BYTES,
) -> Measurement:
    """Runs `workload` on all `targets` at once, for `runtime_s`.

    A target is what names an image to fio. Processor time is that of `pids` and of fio itself.
    """
    timed = (f"--size={size_bytes}", "--time_based", f"--runtime={runtime_s}")
    return _measured([*workload, *timed], targets, pids, runtime_s + GRACE_S)


def measure_amount(
    workload: Sequence[str], target: Sequence[str], pids: Sequence[int], timeout_s: int
) -> Measurement:
    """Runs `workload`, which says itself how much it is, to its end and a last flush."""
    return _measured([*workload, "--end_fsync=1"], [target], pids, timeout_s)


def _measured(
    options: Sequence[str], targets: Sequence[Sequence[str]], pids: Sequence[int], timeout_s: int
) -> Measurement:
    # What the system before left in the page cache is not this one's to write back.
    os.sync()
    before = processor_time_s(pids)
    jobs, fio_s = _run(options, targets, timeout_s)
    return account(jobs, processor_time_s(pids) - before + fio_s)


def account(jobs: Sequence[dict[str, Any]], spent_s: float) -> Measurement:
    """What fio's jobs did together; raises MeasurementError where they did nothing.

    A row has one latency: that of reads, writes or syncs, of whichever job, that is worst at the
    99th percentile. The median is of the same ones.
    """
    sides = [job[side] for job in jobs for side in ("read", "write")]
    operations = sum(side["total_ios"] for side in sides)
    if operations == 0:
        raise MeasurementError("fio did not complete a single request")
    latencies = [side["clat_ns"] for side in sides] + [job["sync"]["lat_ns"] for job in jobs]
    worst = max(latencies, key=lambda latency: _percentile_ns(latency, "99.000000"))
    return Measurement(
        iops=sum(side["iops"] for side in sides),
        mb_per_s=sum(side["bw_bytes"] for side in sides) / 1e6,
        median_us=_percentile_ns(worst, "50.000000") / 1e3,
        p99_us=_percentile_ns(worst, "99.000000") / 1e3,
        cpu_us_per_op=spent_s * 1e6 / operations,
    )


def jobs_of(text: str) -> list[dict[str, Any]]:
    """The jobs in fio's JSON, around which engines print notes.

    Raises MeasurementError where there is none, or a job failed.
    """
    start, end = text.find("\n{" if not text.startswith("{") else "{"), text.rfind("}")
    if start < 0:
        raise MeasurementError(f"fio: {_last_line(text)}")
    jobs: list[dict[str, Any]] = json.loads(text[start : end + 1])["jobs"]
    for job in jobs:
        if job["error"]:
            raise MeasurementError(f"fio: {os.strerror(job['error'])}")
    return jobs


def _percentile_ns(latency: dict[str, Any], percentile: str) -> float:
    return float(latency.get("percentile", {}).get(percentile, 0))


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def _run(
    options: Sequence[str], targets: Sequence[Sequence[str]], timeout_s: float
) -> tuple[list[dict[str, Any]], float]:
    """fio's account of a job for each target, and the processor time that fio used."""
    # What stands before the first job's name holds for all of them.
    command = ["fio", "--direct=1", "--thread", "--output-format=json", *options]
    for number, target in enumerate(targets):
        command += [f"--name=bench{number}", *target]
    with tempfile.TemporaryDirectory(prefix="fio-") as scratch:
        out = Path(scratch) / "out"
        # coreutils' timeout: waiting with wait4 for fio's own usage leaves no room for ours.
        with out.open("w") as stdout:
            process = subprocess.Popen(
                ["timeout", "--kill-after=5", str(int(timeout_s)), *command],
                cwd=scratch,  # where fio leaves its state files
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=subprocess.STDOUT,
            )
            try:
                _, status, usage = os.wait4(process.pid, 0)
            except BaseException:
                process.terminate()
                process.wait()
                raise
        process.returncode = os.waitstatus_to_exitcode(status)
        text = out.read_text(errors="replace")
    if process.returncode != 0:
        last = _last_line(text)
        if process.returncode == 124:
            last = f"no end after {timeout_s:.0f} s"
        raise MeasurementError(f"fio: exit {process.returncode}: {last}")
    return jobs_of(text), usage.ru_utime + usage.ru_stime
