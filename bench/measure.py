"""What every measure is: it takes figures one after another, and shows what it has at any time."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from rich.console import Console

from bench.report import Section
from bench.workloads import Workload


class SkippedError(Exception):
    """This cannot be measured here; the message says why."""


@dataclass
class Setting:
    """Where, how long and how often is measured, and what went wrong."""

    scratch: Path
    """On a real file system, the same for all that is compared."""
    rounds: int
    runtime_s: int
    """Of a run of the rows."""
    window_s: int
    """Of a run of anything else that is measured for a time."""
    systems: Sequence[str]
    workloads: Sequence[Workload]
    console: Console
    skipped: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def say(self, line: str) -> None:
        """A line to follow the run by."""
        self.console.print(line, soft_wrap=True, markup=False)

    def status(self, what: str) -> contextlib.AbstractContextManager[object]:
        """Shows on a terminal what is being done."""
        return self.console.status(what)


class Measure(ABC):
    """One part of the benchmark, chosen by its name."""

    name: ClassVar[str]
    what: ClassVar[str]
    """A few words, for `--help`."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.directory = setting.scratch / self.name

    @abstractmethod
    def run(self, stack: contextlib.ExitStack) -> None:
        """Takes all figures; what it starts is stopped by `stack`, also where it is cut short.

        Raises SkippedError where it cannot be done here. What it took until then is kept.
        """

    @abstractmethod
    def section(self) -> Section | None:
        """What was found until now; None where that is nothing."""
