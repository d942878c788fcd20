"""Simulated time: what is due, in order, and code that waits in the midst of itself.

A `Process` is what ends at once when it is killed and does nothing while it is paused. A fiber is a
call of the product's own code that waits for something outside (etcd): it stops where it waits and
goes on when that is there, in no thread of its own.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import greenlet

SECOND_NS = 1_000_000_000

Work = Callable[[], None]


class Ended(BaseException):
    """The process of a fiber has ended, and the fiber with it."""


@dataclass(slots=True, eq=False)
class Process:
    """Something that runs, may stand still, and ends."""

    name: str
    alive: bool = True
    paused: bool = False
    held: list[Work] = field(default_factory=list)
    fibers: list[greenlet.greenlet] = field(default_factory=list)


class Clock:
    """Time, and what it brings. `now_ns` is moved by whoever drives."""

    def __init__(self) -> None:
        self.now_ns = 0
        self._due: list[tuple[int, int, Process | None, Work]] = []
        self._serial = itertools.count()
        self._main = greenlet.getcurrent()

    @property
    def now_s(self) -> float:
        """Seconds since the beginning."""
        return self.now_ns / SECOND_NS

    def after(self, pause_s: float, work: Work, process: Process | None = None) -> None:
        """Have something done later, by a process if it then lives."""
        due_ns = self.now_ns + int(pause_s * SECOND_NS)
        heapq.heappush(self._due, (due_ns, next(self._serial), process, work))

    def next_ns(self) -> int | None:
        """When something is due next."""
        return self._due[0][0] if self._due else None

    def run_due(self) -> bool:
        """Do what is due first, if that is now; return whether there was something."""
        if not self._due or self._due[0][0] > self.now_ns:
            return False
        _, _, process, work = heapq.heappop(self._due)
        self.do(work, process)
        return True

    def do(self, work: Work, process: Process | None) -> None:
        """Do something now, if its process can."""
        if process is None:
            work()
        elif process.alive:
            if process.paused:
                process.held.append(work)
            else:
                work()

    # Processes

    def end(self, process: Process) -> None:
        """Kill a process."""
        process.alive = False
        process.held.clear()
        fibers, process.fibers = process.fibers, []
        for fiber in fibers:
            if not fiber.dead:
                fiber.throw(Ended)

    def go_on(self, process: Process) -> None:
        """Let a paused process run again."""
        process.paused = False
        held, process.held = process.held, []
        for work in held:
            self.after(0, work, process)

    # Fibers

    def start(
        self, process: Process, call: Callable[[], Any], done: Callable[[Any], None] | None = None
    ) -> None:
        """Run `call`, which may wait; `done` gets what it returns. Its errors end the run."""

        def run() -> None:
            try:
                result = call()
            except Ended:
                return
            if done is not None:
                done(result)

        assert greenlet.getcurrent() is self._main, "a fiber starts no other: it would not go on"
        fiber = greenlet.greenlet(run, parent=self._main)
        process.fibers = [other for other in process.fibers if not other.dead]
        process.fibers.append(fiber)
        fiber.switch()

    def wait(self, arrange: Callable[[Callable[[Any], None]], None]) -> Any:
        """Stop the present fiber until what `arrange` is given is called; return its argument."""
        fiber = greenlet.getcurrent()
        assert fiber is not self._main, "only a fiber waits"
        settled = False

        def settle(value: Any) -> None:
            nonlocal settled
            if not settled and not fiber.dead:
                settled = True
                fiber.switch(value)

        arrange(settle)
        return self._main.switch()

    def sleep(self, pause_s: float, process: Process) -> None:
        """Have the present fiber wait for a while."""
        self.wait(lambda settle: self.after(pause_s, lambda: settle(None), process))
