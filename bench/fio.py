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
from bench.workloads import FILL, FILLS, IMAGE_BYTES, Workload

FILL_TIMEOUT_S = 180
GRACE_S = 60


class MeasurementError(Exception):
    """fio ended with an error; the message is its last words."""


@dataclass(frozen=True)
class Measurement:
    """One run of one workload on one system."""

    iops: float
    mb_per_s: float
    p99_us: float
    cpu_us_per_op: float


def fill(arguments: Sequence[str]) -> None:
    """Writes the whole image, so that no read finds a hole and no write grows the system."""
    for _ in range(FILLS):
        _run([*arguments, *FILL], FILL_TIMEOUT_S)


def measure(
    workload: Workload, arguments: Sequence[str], pids: list[int], runtime_s: int
) -> Measurement:
    """Runs `workload` for `runtime_s`; processor time is that of `pids` and of fio itself."""
    # What the system before left in the page cache is not this one's to write back.
    os.sync()
    before = processor_time_s(pids)
    timed = ("--time_based", f"--runtime={runtime_s}")
    job, fio_s = _run([*arguments, *workload.fio, *timed], runtime_s + GRACE_S)
    spent_s = processor_time_s(pids) - before + fio_s
    sides = [job["read"], job["write"]]
    operations = sum(side["total_ios"] for side in sides)
    if operations == 0:
        raise MeasurementError("fio did not complete a single request")
    latencies = [*(side["clat_ns"] for side in sides), job["sync"]["lat_ns"]]
    return Measurement(
        iops=sum(side["iops"] for side in sides),
        mb_per_s=sum(side["bw_bytes"] for side in sides) / 1e6,
        # The worst of reads, writes and syncs: a row has one figure.
        p99_us=max(_p99_ns(latency) for latency in latencies) / 1e3,
        cpu_us_per_op=spent_s * 1e6 / operations,
    )


def _p99_ns(latency: dict[str, Any]) -> float:
    return float(latency.get("percentile", {}).get("99.000000", 0))


def _run(arguments: Sequence[str], timeout_s: float) -> tuple[dict[str, Any], float]:
    """fio's account of its one job, and the processor time that fio used."""
    command = ["fio", "--name=bench", "--direct=1", "--thread", "--output-format=json"]
    command += [f"--size={IMAGE_BYTES}", *arguments]
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
    # Engines print notes around the JSON.
    start, end = text.find("\n{" if not text.startswith("{") else "{"), text.rfind("}")
    if process.returncode != 0 or start < 0:
        last = (text.strip().splitlines() or ["no message"])[-1]
        if process.returncode == 124:
            last = f"no end after {timeout_s:.0f} s"
        raise MeasurementError(f"fio: exit {process.returncode}: {last}")
    job: dict[str, Any] = json.loads(text[start : end + 1])["jobs"][0]
    if job["error"]:
        raise MeasurementError(f"fio: {os.strerror(job['error'])}")
    return job, usage.ru_utime + usage.ru_stime
