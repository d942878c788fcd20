"""The rows: every workload on every system in turn, several rounds."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from dataclasses import asdict

from bench import comparison
from bench.fio import Measurement, MeasurementError, fill, measure
from bench.measure import Measure, Setting, SkippedError
from bench.report import Section
from bench.systems import SYSTEMS, System
from bench.workloads import Workload

ABOUT = (
    "IOPS unless MB/s is said; hci and gluster keep three copies, nbdkit one. CPU is that of all "
    "processes of a system and of fio. Latency is that of reads, writes or syncs, whichever is "
    "worst at the 99th percentile."
)


class Rows(Measure):
    """This project beside its peers."""

    name = "rows"
    what = "eight workloads beside nbdkit and Gluster"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._names: list[str] = []
        self._taken: dict[tuple[str, str], dict[int, Measurement]] = defaultdict(dict)

    def run(self, stack: contextlib.ExitStack) -> None:
        self.directory.mkdir()
        systems = self._start(stack)
        self._names = [system.name for system in systems]
        for number in range(1, self.setting.rounds + 1):
            for workload in self.setting.workloads:
                for system in systems:
                    self._take(number, workload, system)

    def rows(self) -> list[comparison.Row]:
        """Medians of what was taken until now."""
        return comparison.rows(self.setting.workloads, self._names, self._taken)

    def section(self) -> Section | None:
        workloads, found = self.setting.workloads, self.rows()
        if not found:
            return None
        return Section(
            title="Beside nbdkit and Gluster",
            about=ABOUT,
            tables=comparison.tables(workloads, self._names, found),
            verdicts=comparison.verdicts(workloads, found),
            figures={
                "rows": [asdict(row) for row in found],
                "rows_by_round": [
                    {"workload": workload, "system": system, "round": number, **asdict(one)}
                    for (workload, system), taken in self._taken.items()
                    for number, one in taken.items()
                ],
            },
        )

    def _start(self, stack: contextlib.ExitStack) -> list[System]:
        """Starts and fills every system; returns those that run and notes why others do not."""
        running: list[System] = []
        for name in self.setting.systems:
            system = SYSTEMS[name](self.directory / name)
            stack.callback(system.stop)
            try:
                with self.setting.status(f"starting {name} and filling its image"):
                    system.start()
                    fill(system.fio_arguments())
                running.append(system)
            except (SkippedError, MeasurementError) as reason:
                self.setting.skipped[name] = str(reason)
                system.stop()
        return running

    def _take(self, number: int, workload: Workload, system: System) -> None:
        setting = self.setting
        what = f"round {number} of {setting.rounds}: {workload.name} on {system.name}"
        try:
            with setting.status(what):
                target = system.fio_arguments()
                one = measure(workload.fio, [target], system.pids(), setting.runtime_s)
        except MeasurementError as failure:
            setting.failures.append(f"{what}: {failure}")
            return
        self._taken[workload.name, system.name][number] = one
        setting.say(
            f"{what}: {one.iops:,.0f} IOPS, {one.mb_per_s:,.0f} MB/s, median {one.median_us:,.0f} "
            f"and p99 {one.p99_us:,.0f} µs, {one.cpu_us_per_op:,.0f} µs CPU an operation"
        )
