"""What is measured: the fio workloads whose figures are compared."""

from __future__ import annotations

from dataclasses import dataclass

IMAGE_BYTES = 512 << 20


@dataclass(frozen=True)
class Workload:
    """One row: fio's arguments, the unit it is judged in, and the goal against Gluster."""

    name: str
    fio: tuple[str, ...]
    unit: str  # "iops" or "mb_per_s"
    goal_gluster: float  # how many times Gluster's figure this release aims at


def _row(name: str, mode: str, size: str, depth: int, *more: str, goal: float) -> Workload:
    unit = "mb_per_s" if size == "1m" else "iops"
    fio = (f"--rw={mode}", f"--bs={size}", f"--iodepth={depth}", *more)
    return Workload(name, fio, unit, goal)


WORKLOADS = (
    _row("randwrite 4k depth 1", "randwrite", "4k", 1, goal=3),
    _row("randread 4k depth 1", "randread", "4k", 1, goal=3),
    _row("randwrite 4k depth 32", "randwrite", "4k", 32, goal=3),
    _row("randread 4k depth 32", "randread", "4k", 32, goal=3),
    _row("randrw 70/30 4k depth 32", "randrw", "4k", 32, "--rwmixread=70", goal=3),
    _row("write 1m depth 8", "write", "1m", 8, goal=1),
    _row("read 1m depth 8", "read", "1m", 8, goal=1),
    _row("randwrite 4k fsync each depth 1", "randwrite", "4k", 1, "--fsync=1", goal=2),
)
# Twice the image's size in sequence, as SNIA's Performance Test Specification (Solid State Storage,
# "workload independent preconditioning") has it: no row measures a system that is still growing.
FILLS = 2
FILL = ("--rw=write", "--bs=1m", "--iodepth=8", "--end_fsync=1", "--refill_buffers")
