"""A client that never stops asking, and how long it had to wait.

Requests are sent one after the other whether those before are answered or not, up to a bound, as
a guest with several programs does: half of them writes, the rest reads, a flush now and then. The
wait of a request is from when it was sent to when it was answered; one that is not answered yet
waits until now.
"""

from __future__ import annotations

import random
import threading
import time
from types import TracebackType
from typing import Self

from tests.faults.nbd_session import Answer, NbdSession

PAUSE_S = 0.005
IN_FLIGHT = 12  # QEMU's client has room for 16
FLUSH_EVERY = 40
LONGEST_BLOCKS = 8


class SteadyLoad:
    """Load on a session, in a thread of its own, between entering and leaving."""

    def __init__(self, session: NbdSession, seed: int) -> None:
        self._session = session
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._in_flight: dict[Answer, float] = {}
        self._worst_s = 0.0
        self._answered = 0
        self._errors: list[str] = []
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="steady-load")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Sends nothing more; what is in flight is left to its fate."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join()

    def begin(self) -> None:
        """Forgets the waits so far."""
        with self._lock:
            self._worst_s = 0.0
            self._answered = 0

    @property
    def worst_s(self) -> float:
        """The longest wait since `begin`, of requests that were still unanswered by then too."""
        with self._lock:
            now_s = time.monotonic()
            waiting = [now_s - sent_s for sent_s in self._in_flight.values()]
            return max([self._worst_s, *waiting])

    @property
    def answered(self) -> int:
        """How many requests were answered since `begin`."""
        with self._lock:
            return self._answered

    @property
    def errors(self) -> list[str]:
        """What requests ended with instead of an answer, ever."""
        with self._lock:
            return list(self._errors)

    def settle(self, quiet_s: float, timeout_s: float) -> None:
        """Returns when nothing that was sent `quiet_s` ago is unanswered; raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        time.sleep(quiet_s)
        while True:
            with self._lock:
                oldest_s = min(self._in_flight.values(), default=time.monotonic())
                errors = list(self._errors)
            if errors:
                raise TimeoutError(f"requests failed, the first with: {errors[0]}")
            if time.monotonic() - oldest_s < quiet_s:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"a request is not answered after {timeout_s:.0f} s")
            time.sleep(0.02)

    def _run(self) -> None:
        count = 0
        while not self._ending.wait(PAUSE_S):
            with self._lock:
                full = len(self._in_flight) >= IN_FLIGHT
            if not full:
                count += 1
                self._send(count)

    def _send(self, count: int) -> None:
        length = self._random.randint(1, LONGEST_BLOCKS)
        block = self._random.randrange(self._session.blocks - length)
        op = "flush" if count % FLUSH_EVERY == 0 else ("write", "read")[count % 2]
        sent_s = time.monotonic()
        answer = self._session.submit(op, block, length, count)
        with self._lock:
            self._in_flight[answer] = sent_s
        answer.add_done_callback(self._done)

    def _done(self, answer: Answer) -> None:
        now_s = time.monotonic()
        failed = answer.exception()
        with self._lock:
            sent_s = self._in_flight.pop(answer)
            self._worst_s = max(self._worst_s, now_s - sent_s)
            if failed is None:
                self._answered += 1
            else:
                self._errors.append(str(failed))
