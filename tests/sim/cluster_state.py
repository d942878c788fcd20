"""etcd as the processes of the simulation reach it: over paths that delay, lose and cut.

One `MemoryEtcd` stands for the cluster. Each process has a `Door` to it. A call travels there, is
carried out, and its answer travels back; either way may be cut. A request that was cut off may
still arrive, long after its sender has given up, or died.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from etcd.errors import EtcdError, EtcdUnavailable, OutcomeUnknown
from etcd.interface import (
    Compare,
    KeyValue,
    Listing,
    Notice,
    OnNotice,
    Operation,
    Outcome,
    Watch,
)
from etcd.lease import Session
from etcd.memory import MemoryEtcd
from tests.sim.clock import SECOND_NS, Clock, Process

TIMEOUT_S = 2.0
"""As the real client's, for one call."""

LEASE_TICK_S = 0.25
"""Leases end within so much of their time."""

LATE_S = 1.0
"""A request that was held back is tried again so often."""


@dataclass(slots=True)
class Path:
    """The way of one host to etcd."""

    there: bool = True
    back: bool = True
    slow: bool = False


@dataclass(slots=True)
class State:
    """etcd, whether it runs, and how it is reached."""

    clock: Clock
    random: random.Random
    memory: MemoryEtcd = field(default_factory=MemoryEtcd)
    up: bool = True
    on_change: Callable[[], None] = lambda: None

    def begin(self) -> None:
        """Let leases end in time, from now on."""
        self.keep_time()
        self.clock.after(LEASE_TICK_S, self.begin)

    def keep_time(self) -> None:
        """Bring etcd's own clock up to now. While it is down it grants leases their time."""
        behind_s = self.clock.now_s - self.memory.now_s
        if behind_s > 0:
            self.memory.advance(behind_s)

    def perform(self, call: Callable[[MemoryEtcd], Any]) -> tuple[Any, EtcdError | None]:
        """Carry a call out now."""
        self.keep_time()
        # What ended by itself.
        self.on_change()
        try:
            result = call(self.memory)
        except EtcdError as error:
            return None, error
        self.on_change()
        return result, None


class Door:
    """The etcd client of one process. Every call waits: only fibers may make one."""

    def __init__(self, state: State, path: Path, process: Process) -> None:
        self._state = state
        self._path = path
        self._process = process

    def get(self, key: str) -> KeyValue | None:
        """See `etcd.interface.Etcd`."""
        return self._ask(lambda etcd: etcd.get(key))

    def get_prefix(self, prefix: str) -> Listing:
        """See `etcd.interface.Etcd`."""
        return self._ask(lambda etcd: etcd.get_prefix(prefix))

    def transaction(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> Outcome:
        """See `etcd.interface.Etcd`."""
        return self._ask(lambda etcd: etcd.transaction(compares, operations), change=True)

    def grant_lease(self, ttl_s: int) -> int:
        """See `etcd.interface.Etcd`."""
        return self._ask(lambda etcd: etcd.grant_lease(ttl_s))

    def refresh_lease(self, lease: int) -> int:
        """See `etcd.interface.Etcd`."""
        return self._ask(lambda etcd: etcd.refresh_lease(lease))

    def revoke_lease(self, lease: int) -> None:
        """See `etcd.interface.Etcd`."""
        return self._ask(lambda etcd: etcd.revoke_lease(lease))

    def watch(self, prefix: str, on_notice: OnNotice, from_revision: int | None = None) -> Watch:
        """See `etcd.interface.Etcd`; notices wait while the way back is cut."""
        waiting: list[Notice] = []

        def hand_over() -> None:
            if not (self._state.up and self._path.back):
                self._state.clock.after(LATE_S, hand_over, self._process)
                return
            while waiting:
                on_notice(waiting.pop(0))

        def heard(notice: Notice) -> None:
            waiting.append(notice)
            if len(waiting) == 1:
                self._state.clock.after(self._latency_s(), hand_over, self._process)

        return self._state.memory.watch(prefix, heard, from_revision)

    def close(self) -> None:
        """Nothing to close."""

    def _latency_s(self) -> float:
        slow = self._path.slow and self._state.random.random() < 0.5
        return self._state.random.uniform(0.0005, 1.5 if slow else 0.01)

    def _ask(self, call: Callable[[MemoryEtcd], Any], *, change: bool = False) -> Any:
        state, path, process = self._state, self._path, self._process
        if not state.up and state.random.random() < 0.7:
            # Nobody listens: the request surely never left.
            state.clock.sleep(0.01, process)
            raise EtcdUnavailable(("etcd",), "connection refused")

        def arrange(settle: Callable[[Any], None]) -> None:
            def arrive(attempt: int = 0) -> None:
                if not (state.up and path.there):
                    if attempt < 30 and state.random.random() < 0.7:
                        state.clock.after(LATE_S, lambda: arrive(attempt + 1))
                    return
                answer = state.perform(call)
                if path.back:
                    state.clock.after(self._latency_s(), lambda: settle(answer), process)

            state.clock.after(self._latency_s(), arrive)
            state.clock.after(TIMEOUT_S, lambda: settle(None), process)

        answer = state.clock.wait(arrange)
        if answer is None:
            if change:
                raise OutcomeUnknown("etcd", "no answer in time")
            raise EtcdUnavailable(("etcd",), "no answer in time")
        result, error = answer
        if error is not None:
            raise error
        return result


class SimSession(Session):
    """An etcd lease whose turns the simulated clock brings."""

    def __init__(
        self,
        etcd: Door,
        clock: Clock,
        process: Process,
        *,
        on_lost: Callable[[], None],
        on_renewed: Callable[[float], None] = lambda _deadline_s: None,
    ) -> None:
        self._sim_clock = clock
        self._process = process
        super().__init__(
            etcd, on_lost=on_lost, on_renewed=on_renewed, clock_s=lambda: clock.now_ns / SECOND_NS
        )

    def start(self) -> SimSession:
        """Begin to renew the lease."""
        self._next(self.first_pause_s())
        return self

    def _next(self, pause_s: float | None) -> None:
        if pause_s is not None:
            self._sim_clock.after(pause_s, self._begin_turn, self._process)

    def _begin_turn(self) -> None:
        if not self._closed.is_set():
            self._sim_clock.start(self._process, self.turn, self._next)
