"""From what fio said to the rows: medians, ratios to the peers, goals. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from bench.fio import Measurement
from bench.goals import Verdict, at_least, at_most
from bench.report import Table
from bench.workloads import Workload

Measurements = Mapping[tuple[str, str], Mapping[int, Measurement]]
"""By workload and system, then by round."""


@dataclass(frozen=True)
class Row:
    """Medians of one workload on one system; ratios are None where the peer was not measured."""

    workload: str
    system: str
    iops: float
    mb_per_s: float
    median_us: float
    p99_us: float
    cpu_us_per_op: float
    ratio_nbdkit: float | None
    ratio_gluster: float | None
    round_ratios_nbdkit: tuple[float, ...]
    """Of each round in which both were measured."""


def rows(workloads: Sequence[Workload], systems: Sequence[str], taken: Measurements) -> list[Row]:
    """One row for each workload and system that was measured at least once."""
    found = []
    for workload in workloads:
        runs = {system: taken.get((workload.name, system), {}) for system in systems}
        medians = {system: median(list(one.values())) for system, one in runs.items() if one}
        for system, figures in medians.items():
            ratios = [_ratio(figures, medians.get(peer)) for peer in ("nbdkit", "gluster")]
            peer = runs.get("nbdkit", {})
            each = [
                one.iops / peer[number].iops
                for number, one in sorted(runs[system].items())
                if number in peer
            ]
            found.append(
                Row(
                    workload.name,
                    system,
                    **asdict(figures),
                    ratio_nbdkit=ratios[0],
                    ratio_gluster=ratios[1],
                    round_ratios_nbdkit=tuple(each),
                )
            )
    return found


def median(taken: Sequence[Measurement]) -> Measurement:
    """The median of each figure by itself; `taken` is not empty."""
    columns = [asdict(measurement) for measurement in taken]
    return Measurement(**{key: statistics.median(c[key] for c in columns) for key in columns[0]})


def verdicts(workloads: Sequence[Workload], found: Sequence[Row]) -> list[Verdict]:
    """Every goal of every workload, in the order of the tables."""
    judged = []
    for workload in workloads:
        ours = _ours(found, workload)
        judged += [_against_nbdkit(workload, ours), _against_gluster(workload, ours)]
        judged += [each for each in (_p99(workload, ours), _cpu(workload, ours)) if each]
    return judged


def tables(
    workloads: Sequence[Workload], systems: Sequence[str], found: Sequence[Row]
) -> list[Table]:
    """The comparison: speed beside the peers, then latency, then what an operation costs."""
    return [
        _speed(workloads, systems, found),
        _latency(workloads, systems, found),
        _cost(workloads, systems, found),
    ]


def _speed(workloads: Sequence[Workload], systems: Sequence[str], found: Sequence[Row]) -> Table:
    header = ["workload", *systems, "÷ nbdkit", "goal", "÷ gluster", "goal"]
    lines = []
    for workload in workloads:
        ours = _ours(found, workload)
        line = [workload.name]
        line += _cells(workload, systems, found, partial(_speed_of, workload))
        for verdict in (_against_nbdkit(workload, ours), _against_gluster(workload, ours)):
            line += [_times(verdict.figure), verdict.text]
        lines.append(line)
    return Table(header, lines)


def _latency(workloads: Sequence[Workload], systems: Sequence[str], found: Sequence[Row]) -> Table:
    header = ["latency, µs", *(f"median {system}" for system in systems)]
    header += [*(f"p99 {system}" for system in systems), "hci: p99 ÷ median", "goal"]
    lines = []
    for workload in workloads:
        ours = _ours(found, workload)
        line = [workload.name]
        line += _cells(workload, systems, found, lambda row: f"{row.median_us:,.0f}")
        line += _cells(workload, systems, found, lambda row: f"{row.p99_us:,.0f}")
        verdict = _p99(workload, ours)
        line += [_times(_spread(ours)), verdict.text if verdict else ""]
        lines.append(line)
    return Table(header, lines)


def _cost(workloads: Sequence[Workload], systems: Sequence[str], found: Sequence[Row]) -> Table:
    header = ["CPU an operation, µs", *systems, "goal"]
    lines = []
    for workload in workloads:
        line = [workload.name]
        line += _cells(workload, systems, found, lambda row: f"{row.cpu_us_per_op:,.0f}")
        verdict = _cpu(workload, _ours(found, workload))
        lines.append([*line, verdict.text if verdict else ""])
    return Table(header, lines)


def _speed_of(workload: Workload, row: Row) -> str:
    return f"{row.mb_per_s:,.0f} MB/s" if workload.unit == "mb_per_s" else f"{row.iops:,.0f}"


def _cells(
    workload: Workload, systems: Sequence[str], found: Sequence[Row], text: Callable[[Row], str]
) -> list[str]:
    by_system = {row.system: row for row in found if row.workload == workload.name}
    return [text(by_system[name]) if name in by_system else "-" for name in systems]


def _ours(found: Sequence[Row], workload: Workload) -> Row | None:
    ours = (row for row in found if (row.workload, row.system) == (workload.name, "hci"))
    return next(ours, None)


def _against_nbdkit(workload: Workload, ours: Row | None) -> Verdict:
    ratio = ours.ratio_nbdkit if ours else None
    return at_least(f"{workload.name} ÷ nbdkit", ratio, workload.goal_nbdkit)


def _against_gluster(workload: Workload, ours: Row | None) -> Verdict:
    ratio = ours.ratio_gluster if ours else None
    return at_least(f"{workload.name} ÷ gluster", ratio, workload.goal_gluster)


def _p99(workload: Workload, ours: Row | None) -> Verdict | None:
    if workload.most_p99 is None:
        return None
    return at_most(f"{workload.name}: p99 ÷ median", _spread(ours), workload.most_p99)


def _cpu(workload: Workload, ours: Row | None) -> Verdict | None:
    if workload.most_cpu_us is None:
        return None
    spent = ours.cpu_us_per_op if ours else None
    return at_most(f"{workload.name}: µs CPU an operation", spent, workload.most_cpu_us)


def _spread(row: Row | None) -> float | None:
    return row.p99_us / row.median_us if row is not None and row.median_us else None


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def _ratio(ours: Measurement, theirs: Measurement | None) -> float | None:
    # Requests have one size within a workload: the ratio of IOPS is that of MB/s.
    return ours.iops / theirs.iops if theirs is not None else None
