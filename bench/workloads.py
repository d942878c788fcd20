"""What the rows measure: the fio workloads whose figures are compared, and their goals."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20
IMAGE_BYTES = 512 * MIB
MOST_P99 = 4.0
"""At depth 1, the 99th percentile of latency over its median."""


@dataclass(frozen=True)
class Workload:
    """One row: fio's arguments, the unit that it is judged in, and its goals."""

    name: str
    fio: tuple[str, ...]
    unit: str  # "iops" or "mb_per_s"
    goal_nbdkit: float  # of nbdkit's figure: one copy, without a network
    goal_gluster: float  # of Gluster's: three copies
    most_p99: float | None = None  # times the median
    most_cpu_us: float | None = None  # an operation, over all processes


def _row(
    name: str,
    mode: str,
    size: str,
    depth: int,
    *more: str,
    goals: tuple[float, float],
    most_cpu_us: float | None = None,
) -> Workload:
    return Workload(
        name,
        (f"--rw={mode}", f"--bs={size}", f"--iodepth={depth}", *more),
        "mb_per_s" if size == "1m" else "iops",
        *goals,
        most_p99=MOST_P99 if depth == 1 else None,
        most_cpu_us=most_cpu_us,
    )


WORKLOADS = (
    _row("randwrite 4k depth 1", "randwrite", "4k", 1, goals=(0.45, 5)),
    _row("randread 4k depth 1", "randread", "4k", 1, goals=(0.5, 6)),
    _row("randwrite 4k depth 32", "randwrite", "4k", 32, goals=(0.7, 8), most_cpu_us=80),
    _row("randread 4k depth 32", "randread", "4k", 32, goals=(0.65, 10), most_cpu_us=25),
    _row("randrw 70/30 4k depth 32", "randrw", "4k", 32, "--rwmixread=70", goals=(0.7, 9)),
    _row("write 1m depth 8", "write", "1m", 8, goals=(0.35, 1.7)),
    _row("read 1m depth 8", "read", "1m", 8, goals=(0.7, 1.7)),
    _row("randwrite 4k fsync each depth 1", "randwrite", "4k", 1, "--fsync=1", goals=(0.45, 3)),
)
# Twice the image's size in sequence, as SNIA's Performance Test Specification (Solid State Storage,
# "workload independent preconditioning") has it: no row measures a system that is still growing.
FILLS = 2
FILL = ("--rw=write", "--bs=1m", "--iodepth=8", "--end_fsync=1", "--refill_buffers")
