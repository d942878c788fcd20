"""Where a gateway's decisions run: one thread that decides, workers that wait for etcd, timers.

The deciding thread takes the engine's events, the outcomes of calls and what timers bring, in the
order in which they come, and never waits for anything. What decides is handed to it as plain
functions and knows no thread: a simulator runs the same functions on its own clock.
"""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import structlog

from shard.errors import HciError

log = structlog.get_logger()

TICK_S = 0.1
"""Between two ticks."""

WORKERS = 8
"""Calls that wait at once; more of them queue."""

Work = Callable[[], None]


class Deciding(Protocol):
    """Runs work one after the other. `put` is for any thread, all else for the work itself."""

    def now_s(self) -> float:
        """Return the seconds of a clock that only grows."""

    def start(
        self,
        on_event: Callable[[dict[str, Any]], None],
        tick: Work,
        failed: Callable[[str], None],
    ) -> None:
        """Begin: the engine's events and ticks arrive from now on; `failed` hears of the end."""

    def put(self, work: Work) -> None:
        """Have it done next."""

    def after(self, pause_s: float, work: Work) -> None:
        """Have it done later."""

    def call(
        self,
        call: Callable[[], Any],
        then: Callable[[Any], None],
        failed: Callable[[HciError], None],
    ) -> None:
        """Make a call that waits, elsewhere; what comes of it is done here."""

    def stop(self) -> None:
        """End, once what is under way is done."""


class DecidingThread:
    """Deciding in threads. `next_event` waits for the engine's next event, so many ms at most."""

    def __init__(self, next_event: Callable[[int], dict[str, Any] | None]) -> None:
        self._next_event = next_event
        self._queue: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="exports-etcd")
        self._threads: list[threading.Thread] = []
        self._stopping = False

    def now_s(self) -> float:
        """See `Deciding`."""
        return time.monotonic()

    def start(
        self,
        on_event: Callable[[dict[str, Any]], None],
        tick: Work,
        failed: Callable[[str], None],
    ) -> None:
        """See `Deciding`."""
        for name, run in (
            ("exports", lambda: self._decide(tick, failed)),
            ("exports-events", lambda: self._carry(on_event, failed)),
        ):
            thread = threading.Thread(target=run, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

    def put(self, work: Work) -> None:
        """See `Deciding`."""
        self._queue.put(work)

    def after(self, pause_s: float, work: Work) -> None:
        """See `Deciding`."""
        timer = threading.Timer(pause_s, lambda: self._queue.put(work))
        timer.daemon = True
        timer.start()

    def call(
        self,
        call: Callable[[], Any],
        then: Callable[[Any], None],
        failed: Callable[[HciError], None],
    ) -> None:
        """See `Deciding`."""

        def work() -> None:
            try:
                result = call()
            except HciError as error:
                self._queue.put(lambda error=error: failed(error))  # type: ignore[misc]
            except Exception as error:
                log.exception("etcd_call_failed")
                why = HciError(f"internal error: {error!r}")
                self._queue.put(lambda: failed(why))
            else:
                self._queue.put(lambda: then(result))

        self._workers.submit(work)

    def stop(self) -> None:
        """See `Deciding`."""
        self._stopping = True
        self._queue.put(None)
        for thread in self._threads:
            thread.join(timeout=2)
        self._workers.shutdown(wait=True, cancel_futures=True)

    def _carry(
        self, on_event: Callable[[dict[str, Any]], None], failed: Callable[[str], None]
    ) -> None:
        while not self._stopping:
            try:
                event = self._next_event(200)
            except RuntimeError as error:
                if not self._stopping:
                    failed(str(error))
                return
            if event is not None:
                self._queue.put(lambda event=event: on_event(event))  # type: ignore[misc]

    def _decide(self, tick: Work, failed: Callable[[str], None]) -> None:
        next_tick_s = time.monotonic() + TICK_S
        while True:
            try:
                work = self._queue.get(timeout=max(0.0, next_tick_s - time.monotonic()))
            except queue.Empty:
                work = _nothing
            if work is None:
                return
            try:
                work()
                if time.monotonic() >= next_tick_s:
                    next_tick_s = time.monotonic() + TICK_S
                    tick()
            except Exception:
                # A defect. Going on would risk wrong answers; the supervisor starts us again.
                log.exception("exports_failed")
                failed("a defect in the gateway's decisions; see the log")
                raise


def _nothing() -> None:
    """Time has passed."""
