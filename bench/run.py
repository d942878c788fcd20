"""`make bench`: every workload on every system in turn, several rounds, medians.

Bounded in time: each run has a limit, and what was started is stopped whatever happens.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.markup import escape

from bench import report
from bench.fio import Measurement, MeasurementError, fill, measure
from bench.systems import SYSTEMS, SkippedError, System
from bench.workloads import WORKLOADS, Workload

RESULTS = Path(__file__).with_name("results")
console = Console(highlight=False, stderr=True)


def main() -> int:
    """Runs the measurements; the exit code is 1 where a run failed."""
    arguments = _arguments()
    signal.signal(signal.SIGTERM, _end_on_sigterm)
    workloads = [w for w in WORKLOADS if not arguments.workloads or w.name in arguments.workloads]
    try:
        with contextlib.ExitStack() as stack:
            # Not /tmp, which may be kept in memory: all systems share one real file system.
            scratch = Path(
                stack.enter_context(
                    tempfile.TemporaryDirectory(prefix="hci-bench-", dir=arguments.directory)
                )
            )
            systems, skipped = _start(stack, scratch, arguments.systems)
            taken, failures = _measure(systems, workloads, arguments.rounds, arguments.runtime)
    except KeyboardInterrupt:
        console.print("[yellow]Interrupted: everything was stopped and removed.[/]")
        return 130
    names = [system.name for system in systems]
    found = report.rows(workloads, names, taken)
    machine = report.machine()
    result = {
        "taken": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine,
        "rounds": arguments.rounds,
        "runtime_s": arguments.runtime,
        "skipped": skipped,
        "failures": failures,
        "rows": [asdict(row) for row in found],
    }
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / time.strftime("%Y%m%dT%H%M%SZ.json", time.gmtime())
    file.write_text(json.dumps(result, indent=1) + "\n")
    about = _about(machine, arguments.rounds, arguments.runtime)
    if arguments.markdown:
        print(report.markdown(workloads, names, found, about), end="")
    else:
        out = Console(width=None if sys.stdout.isatty() else 120)
        for table in report.tables(workloads, names, found):
            out.print(table)
    for name, reason in skipped.items():
        console.print(f"[yellow]{name} was skipped:[/] {escape(reason)}")
    for failure in failures:
        console.print(f"[red]failed:[/] {escape(failure)}")
    console.print(f"[dim]{file}[/]")
    return 1 if failures or "hci" in skipped else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--runtime", type=int, default=5, metavar="SECONDS", help="of one run")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument(
        "--workloads", nargs="+", choices=[workload.name for workload in WORKLOADS], metavar="NAME"
    )
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"), help="where to store")
    parser.add_argument("--markdown", action="store_true", help="print for docs/benchmarks.md")
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.runtime < 1:
        parser.error("--rounds and --runtime are at least 1")
    return arguments


def _start(
    stack: contextlib.ExitStack, scratch: Path, names: Sequence[str]
) -> tuple[list[System], dict[str, str]]:
    """Starts and fills every system; returns those that run and why others do not."""
    running: list[System] = []
    skipped: dict[str, str] = {}
    for name in names:
        system = SYSTEMS[name](scratch / name)
        stack.callback(system.stop)
        try:
            with console.status(f"starting {name} and filling its image"):
                system.start()
                fill(system.fio_arguments())
            running.append(system)
        except (SkippedError, MeasurementError) as reason:
            skipped[name] = str(reason)
            system.stop()
    return running, skipped


def _measure(
    systems: Sequence[System], workloads: Sequence[Workload], rounds: int, runtime_s: int
) -> tuple[dict[tuple[str, str], list[Measurement]], list[str]]:
    taken: dict[tuple[str, str], list[Measurement]] = defaultdict(list)
    failures: list[str] = []
    for number in range(1, rounds + 1):
        for workload in workloads:
            for system in systems:
                what = f"round {number} of {rounds}: {workload.name} on {system.name}"
                try:
                    with console.status(what):
                        arguments = system.fio_arguments()
                        one = measure(workload, arguments, system.pids(), runtime_s)
                except MeasurementError as failure:
                    failures.append(f"{what}: {failure}")
                    continue
                taken[workload.name, system.name].append(one)
                console.print(
                    f"{what}: {one.iops:,.0f} IOPS, {one.mb_per_s:,.0f} MB/s, "
                    f"p99 {one.p99_us:,.0f} µs, {one.cpu_us_per_op:,.0f} µs CPU an operation",
                    soft_wrap=True,
                )
    return taken, failures


def _about(machine: dict[str, str], rounds: int, runtime_s: int) -> str:
    versions = ", ".join(machine[key] for key in ("fio", "nbdkit", "gluster") if key in machine)
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"Linux {machine['kernel']}; {versions}. Medians of {rounds} rounds of {runtime_s} s, "
        "systems in turn, all on one file system of one machine. IOPS unless MB/s is said."
    )


def _end_on_sigterm(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
