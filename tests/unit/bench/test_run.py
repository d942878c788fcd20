"""The command line, and how measures end, with measures that do nothing."""

from __future__ import annotations

import contextlib
import io
import time

import pytest

from bench import run
from bench.fio import MeasurementError
from bench.measure import Measure, Setting, SkippedError
from bench.report import Section


class Recorded(Measure):
    """Does what `act` says, and tells whether what it started was stopped."""

    name = "recorded"
    what = "nothing"

    def __init__(
        self, setting: Setting, act: BaseException | None = None, naps_s: float = 0
    ) -> None:
        super().__init__(setting)
        self.act, self.naps_s, self.stopped = act, naps_s, False

    def run(self, stack: contextlib.ExitStack) -> None:
        stack.callback(setattr, self, "stopped", True)
        time.sleep(self.naps_s)
        if self.act is not None:
            raise self.act

    def section(self) -> Section | None:
        return None


def run_all(setting: Setting, *measures: Recorded, limit_s: float = 60) -> None:
    run._run(measures, setting, time.monotonic() + limit_s)
    assert all(measure.stopped for measure in measures[:1])


def test_measure_that_fails_leaves_the_others_their_turn(setting: Setting) -> None:
    last = Recorded(setting)
    run_all(setting, Recorded(setting, MeasurementError("no disk")), last)
    assert setting.failures == ["recorded: no disk"]
    assert last.stopped


def test_measure_that_cannot_be_done_here_is_no_failure(setting: Setting) -> None:
    run_all(setting, Recorded(setting, SkippedError("no qemu")))
    assert (setting.failures, setting.skipped) == ([], {"recorded": "no qemu"})


def test_limit_ends_the_measure_and_those_after_it(setting: Setting) -> None:
    never = Recorded(setting)
    run_all(setting, Recorded(setting, naps_s=60), never, limit_s=1.0)
    assert len(setting.failures) == 2
    assert all("--limit" in failure for failure in setting.failures)
    assert not never.stopped


def test_defect_is_shown_and_costs_only_its_measure(setting: Setting) -> None:
    last = Recorded(setting)
    run_all(setting, Recorded(setting, AssertionError("impossible")), last)
    assert setting.failures == ["recorded: AssertionError('impossible')"]
    assert last.stopped
    assert isinstance(setting.console.file, io.StringIO)
    assert "Traceback" in setting.console.file.getvalue()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--rounds", "0"],
        ["--tolerance", "0"],
        ["--only", "nothing"],
        ["--compare", "--systems", "hci"],
        ["--compare", "--only", "guest"],
        ["--write-reference", "--workloads", "randread 4k depth 1"],
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run.main(arguments)
    assert end.value.code == 2
