"""`make bench`: each measure in turn, several rounds, medians.

Bounded in time: each run has a limit, as has the whole, and what was started is stopped whatever
happens. What was measured before the limit, or before something failed, is shown and kept.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.markup import escape

from bench import plot, reference, report
from bench.failures import Failures
from bench.fio import MeasurementError
from bench.first_writes import FirstWrites
from bench.goals import tally
from bench.guest import InGuest
from bench.many_images import ManyImages
from bench.measure import Measure, Setting, SkippedError
from bench.opening import Opening
from bench.rows import Rows
from bench.systems import SYSTEMS
from bench.workloads import WORKLOADS
from tests.devcluster import CommandError
from tests.e2e.guest.kernel import GuestBuildError
from tests.e2e.guest.machine import MachineError
from tests.faults.nbd_session import NbdError
from tests.tools.guest_speed import TooShortError

RESULTS = Path(__file__).with_name("results")
MEASURES: dict[str, type[Measure]] = {
    kind.name: kind for kind in (Rows, ManyImages, FirstWrites, Failures, Opening, InGuest)
}
QUIET = 0.5
"""A load average, of each core, up to which nothing is said of it."""
LIMIT_MINUTES = 40.0
"""Well above what all of it takes on two cores, which is under 25."""
EXPECTED = (
    MeasurementError,
    CommandError,
    GuestBuildError,
    MachineError,
    NbdError,
    TooShortError,
    EOFError,
    OSError,
    subprocess.SubprocessError,
)
"""How a measure fails where that is no defect of its own."""
console = Console(highlight=False, stderr=True)


class OverTimeError(Exception):
    """The limit of the whole run has passed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the measurements; the exit code is 1 where a run failed or is slower than it was."""
    options = _options(arguments)
    signal.signal(signal.SIGTERM, _end_on_sigterm)
    chosen = [w for w in WORKLOADS if not options.workloads or w.name in options.workloads]
    began_s = time.monotonic()
    load = os.getloadavg()[0]
    try:
        # Not /tmp, which may be kept in memory: all systems share one real file system.
        with tempfile.TemporaryDirectory(prefix="hci-bench-", dir=options.directory) as scratch:
            setting = Setting(
                scratch=Path(scratch),
                rounds=options.rounds,
                runtime_s=options.runtime,
                window_s=options.window,
                systems=options.systems,
                workloads=chosen,
                console=console,
            )
            measures = [MEASURES[name](setting) for name in MEASURES if name in options.only]
            _run(measures, setting, began_s + options.limit * 60)
    except KeyboardInterrupt:
        console.print("[yellow]Interrupted: everything was stopped and removed.[/]")
        return 130
    sections = [section for measure in measures if (section := measure.section()) is not None]
    result = _result(options, setting, sections) | {
        "took_s": round(time.monotonic() - began_s),
        "load_before": round(load, 2),
    }
    file = _keep(result)
    if not options.compare:
        _show(options, sections, _about(result))
    for name, reason in setting.skipped.items():
        console.print(f"[yellow]{name} was skipped:[/] {escape(reason)}")
    for failure in setting.failures:
        console.print(f"[red]failed:[/] {escape(failure)}")
    if load > QUIET * (os.cpu_count() or 1):
        console.print(
            f"[yellow]The machine was busy with something else before (load average {load:.1f}): "
            "these figures say little.[/]",
            soft_wrap=True,
        )
    console.print(f"[dim]{file}[/]", soft_wrap=True)
    is_slower = _against_reference(options, result)
    return 1 if setting.failures or "hci" in setting.skipped or is_slower else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    measures = ", ".join(f"{kind.name}: {kind.what}" for kind in MEASURES.values())
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=f"{__doc__} The measures: {measures}."
    )
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument(
        "--runtime", type=int, default=5, metavar="SECONDS", help="of a run of the rows"
    )
    parser.add_argument(
        "--window", type=int, default=3, metavar="SECONDS", help="of a run of the other measures"
    )
    parser.add_argument(
        "--limit", type=float, default=LIMIT_MINUTES, metavar="MINUTES", help="of the whole"
    )
    parser.add_argument(
        "--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="of the rows"
    )
    parser.add_argument(
        "--workloads",
        nargs="+",
        choices=[workload.name for workload in WORKLOADS],
        metavar="NAME",
        help="of the rows",
    )
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"), help="where to store")
    parser.add_argument("--markdown", action="store_true", help="print for docs/benchmarks.md")
    parser.add_argument(
        "--compare",
        action="store_true",
        help=f"fail where a row is slower, beside nbdkit, than in {reference.FILE.name}",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=reference.TOLERANCE,
        metavar="PART",
        help="with --compare: of its former ratio, what a row is to keep at least",
    )
    parser.add_argument(
        "--write-reference",
        action="store_true",
        help="make this run's rows the ones that others are compared with",
    )
    options = parser.parse_args(arguments)
    if min(options.rounds, options.runtime, options.window) < 1 or options.limit <= 0:
        parser.error("--rounds, --runtime and --window are at least 1, and --limit is above 0")
    if not 0 < options.tolerance <= 1:
        parser.error("--tolerance is above 0, and 1 at most")
    needed = {"hci", "nbdkit"} - set(options.systems)
    if (options.compare or options.write_reference) and (needed or "rows" not in options.only):
        parser.error("a comparison with former ratios takes the rows of hci and nbdkit")
    if options.write_reference and options.workloads:
        parser.error("--write-reference takes all workloads")
    return options


def _run(measures: Sequence[Measure], setting: Setting, deadline_s: float) -> None:
    for measure in measures:
        began_s = time.monotonic()
        try:
            with contextlib.ExitStack() as stack, _within(deadline_s - began_s):
                measure.run(stack)
        except SkippedError as reason:
            setting.skipped[measure.name] = str(reason)
        except OverTimeError:
            setting.failures.append(f"{measure.name}: the time for all of it is over (--limit)")
        except EXPECTED as failure:
            setting.failures.append(f"{measure.name}: {failure}")
        except Exception as defect:  # noqa: BLE001 - it is shown, and what others measured is kept
            setting.console.print_exception()
            setting.failures.append(f"{measure.name}: {defect!r}")
        setting.say(f"{measure.name} took {time.monotonic() - began_s:.0f} s")


@contextlib.contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Raises OverTimeError, wherever the main thread is, after so long."""
    if seconds <= 0:
        raise OverTimeError
    before = signal.signal(signal.SIGALRM, _end_on_sigalrm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _result(
    options: argparse.Namespace, setting: Setting, sections: Sequence[report.Section]
) -> dict[str, Any]:
    """What is kept of a run: how it was taken, every figure and every goal."""
    result: dict[str, Any] = {
        "taken": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": report.commit(),
        "machine": report.machine(),
        "rounds": options.rounds,
        "runtime_s": options.runtime,
        "window_s": options.window,
        "skipped": setting.skipped,
        "failures": setting.failures,
        "goals": [verdict.as_json() for section in sections for verdict in section.verdicts],
    }
    for section in sections:
        result |= section.figures
    return result


def _keep(result: dict[str, Any]) -> Path:
    """Writes the figures, and a picture of the rows beside them."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / time.strftime("%Y%m%dT%H%M%SZ.json", time.gmtime())
    file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    try:
        plot.write(result, file.with_suffix(".svg"))
    except plot.NoPlotError as reason:
        console.print(f"[yellow]no plot:[/] {escape(str(reason))}", soft_wrap=True)
    return file


def _show(options: argparse.Namespace, sections: Sequence[report.Section], about: str) -> None:
    if options.markdown:
        print(report.markdown(about, sections), end="")
        return
    out = Console(width=None if sys.stdout.isatty() else 160)
    for section in sections:
        verdicts = f" {tally(section.verdicts)}." if section.verdicts else ""
        out.print(f"\n[bold]{section.title}[/]\n{escape(section.about)}{escape(verdicts)}")
        for table in section.tables:
            out.print(report.terminal(table))


def _against_reference(options: argparse.Namespace, result: dict[str, Any]) -> bool:
    """Compares with the former ratios, then replaces them, as asked; True: that has failed."""
    has_failed = False
    if options.compare:
        compared = reference.compare(reference.load(reference.FILE), result, options.tolerance)
        Console(width=None if sys.stdout.isatty() else 160).print(report.terminal(compared.table))
        console.print(escape(compared.about), soft_wrap=True)
        has_failed = compared.is_slower
    if options.write_reference:
        try:
            reference.FILE.write_text(reference.text(reference.of_result(result)))
        except ValueError as nothing:
            console.print(f"[red]{reference.FILE} stays as it was:[/] {nothing}")
            return True
        console.print(f"{reference.FILE} has the ratios of this run.")
    return has_failed


def _about(result: dict[str, Any]) -> str:
    machine = result["machine"]
    programs = ("fio", "nbdkit", "gluster", "qemu-nbd")
    versions = ", ".join(machine[key] for key in programs if key in machine)
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"Linux {machine['kernel']}; {versions}. Commit {result['commit']}, "
        f"{result['taken'][:10]}. Medians of {result['rounds']} rounds, of {result['runtime_s']} s "
        f"for the rows and {result['window_s']} s for the rest, what is compared in turn, all on "
        "one file system of one machine."
    )


def _end_on_sigterm(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _end_on_sigalrm(_number: int, _frame: FrameType | None) -> None:
    raise OverTimeError


if __name__ == "__main__":
    sys.exit(main())
