"""Turns measurements into rows, a table, Markdown and JSON."""

from __future__ import annotations

import os
import platform
import re
import shutil
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from bench.fio import Measurement
from bench.workloads import Workload

Measurements = Mapping[tuple[str, str], Sequence[Measurement]]  # by workload and system


@dataclass(frozen=True)
class Row:
    """Medians of one workload on one system; ratios are None where the peer was not measured."""

    workload: str
    system: str
    iops: float
    mb_per_s: float
    p99_us: float
    cpu_us_per_op: float
    ratio_nbdkit: float | None
    ratio_gluster: float | None


def rows(workloads: Sequence[Workload], systems: Sequence[str], taken: Measurements) -> list[Row]:
    """One row for each workload and system that was measured at least once."""
    found = []
    for workload in workloads:
        medians = {
            system: _median(taken[workload.name, system])
            for system in systems
            if taken.get((workload.name, system))
        }
        for system, median in medians.items():
            ratios = [_ratio(median, medians.get(peer)) for peer in ("nbdkit", "gluster")]
            found.append(
                Row(
                    workload.name,
                    system,
                    **asdict(median),
                    ratio_nbdkit=ratios[0],
                    ratio_gluster=ratios[1],
                )
            )
    return found


def tables(
    workloads: Sequence[Workload], systems: Sequence[str], found: Sequence[Row]
) -> list[Table]:
    """The comparison for a terminal: speed, then what it costs."""
    made = []
    for header, lines in (_speed(workloads, systems, found), _cost(workloads, systems, found)):
        table = Table()
        for number, title in enumerate(header):
            table.add_column(title, justify="right" if number else "left")
        for line in lines:
            table.add_row(*line)
        made.append(table)
    return made


def markdown(
    workloads: Sequence[Workload], systems: Sequence[str], found: Sequence[Row], about: str
) -> str:
    """The comparison for the documentation, the machine described above it."""
    text = [about]
    for header, lines in (_speed(workloads, systems, found), _cost(workloads, systems, found)):
        text += ["", "| " + " | ".join(header) + " |"]
        text.append("| --- |" + " ---: |" * (len(header) - 1))
        text += ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join(text) + "\n"


def machine() -> dict[str, str]:
    """What the figures were taken on, and with which versions of the peers."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    described = {
        "processor": cpu.group(1) if cpu else platform.machine(),
        "cores": str(os.cpu_count()),
        "memory_gib": f"{int(memory.group(1)) / (1 << 20):.0f}" if memory else "unknown",
        "kernel": platform.release(),
    }
    for program in ("fio", "nbdkit", "gluster", "etcd"):
        if shutil.which(program):
            done = subprocess.run(
                [program, "--version"], check=False, capture_output=True, text=True, timeout=30
            )
            described[program] = (done.stdout.strip().splitlines() or ["unknown"])[0]
    return described


def _speed(
    workloads: Sequence[Workload], systems: Sequence[str], found: Sequence[Row]
) -> tuple[list[str], list[list[str]]]:
    by_name = {(row.workload, row.system): row for row in found}
    header = ["workload", *systems, "÷ nbdkit", "÷ gluster", "goal"]
    lines = []
    for workload in workloads:
        cells = [by_name.get((workload.name, system)) for system in systems]
        ours = by_name.get((workload.name, "hci"))
        unit = " MB/s" if workload.unit == "mb_per_s" else ""
        line = [workload.name]
        line += [f"{getattr(row, workload.unit):,.0f}{unit}" if row else "-" for row in cells]
        line.append(_times(ours.ratio_nbdkit if ours else None))
        line.append(_times(ours.ratio_gluster if ours else None))
        line.append(_goal(workload, ours))
        lines.append(line)
    return header, lines


def _cost(
    workloads: Sequence[Workload], systems: Sequence[str], found: Sequence[Row]
) -> tuple[list[str], list[list[str]]]:
    by_name = {(row.workload, row.system): row for row in found}
    header = ["µs", *(f"p99 {system}" for system in systems)]
    header += [f"CPU/op {system}" for system in systems]
    lines = []
    for workload in workloads:
        cells = [by_name.get((workload.name, system)) for system in systems]
        line = [workload.name]
        line += [f"{row.p99_us:,.0f}" if row else "-" for row in cells]
        line += [f"{row.cpu_us_per_op:,.0f}" if row else "-" for row in cells]
        lines.append(line)
    return header, lines


def _goal(workload: Workload, ours: Row | None) -> str:
    goal = f"{workload.goal_gluster:g} x gluster"
    if ours is None or ours.ratio_gluster is None:
        return goal
    return f"{goal}: {'met' if ours.ratio_gluster >= workload.goal_gluster else 'missed'}"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def _median(taken: Sequence[Measurement]) -> Measurement:
    columns = [asdict(measurement) for measurement in taken]
    return Measurement(**{key: statistics.median(c[key] for c in columns) for key in columns[0]})


def _ratio(ours: Measurement, theirs: Measurement | None) -> float | None:
    # Requests have one size within a workload: the ratio of IOPS is that of MB/s.
    return ours.iops / theirs.iops if theirs is not None else None
