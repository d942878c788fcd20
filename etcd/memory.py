"""A fake etcd in memory, for tests and simulations. The contract tests run on it and on a real one.

Time passes only by `advance`. Faults are asked for one by one: `fail_next`. Notices are delivered
by the thread that made the change, after the change and without locks held, so that a program with
one thread is deterministic.
"""

import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from etcd.errors import ClientClosed, EtcdUnavailable, LeaseNotFound, OutcomeUnknown
from etcd.interface import (
    Changed,
    Changes,
    Compare,
    Delete,
    KeyAbsent,
    KeyValue,
    LeaseEquals,
    Listing,
    ModRevisionEquals,
    Notice,
    OnNotice,
    Operation,
    Outcome,
    Put,
    RangeEmpty,
    Reread,
    ValueEquals,
)

HISTORY_MAX = 20_000
"""Changes kept for watches that begin in the past; the older half is forgotten beyond this."""

_ENDPOINT = "memory"


class Fault(Enum):
    """What happens to a call instead of an answer. Those of a lost message befall transactions."""

    UNAVAILABLE = "nothing is changed, and the caller is told so"
    ANSWER_LOST = "the change is made, and the caller is told that its outcome is unknown"
    REQUEST_LOST = "nothing is changed, and the caller is told that the outcome is unknown"


@dataclass(slots=True)
class _Lease:
    ttl_s: int
    expires_s: float


@dataclass(frozen=True, slots=True)
class Backup:
    """All that the fake held at one time."""

    items: Mapping[str, KeyValue]
    revision: int
    leases: Mapping[int, _Lease]


class MemoryWatch:
    """A running watch of the fake."""

    def __init__(self, etcd: "MemoryEtcd", prefix: str, on_notice: OnNotice) -> None:
        self.prefix = prefix
        self.on_notice = on_notice
        self.pending: deque[Notice] = deque()
        self.delivering: int | None = None
        self.cancelled = False
        self._etcd = etcd

    def cancel(self) -> None:
        """End the watch and wait until no notice is being delivered."""
        self._etcd.cancel(self)


class MemoryEtcd:
    """See `etcd.interface.Etcd` for what each method promises."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._items: dict[str, KeyValue] = {}
        self._revision = 1
        self._compacted = 0
        self._history: list[tuple[int, Changed]] = []
        self._now_s = 0.0
        self._leases: dict[int, _Lease] = {}
        self._last_lease = 0
        self._watches: list[MemoryWatch] = []
        self._faults: deque[Fault] = deque()
        self._closed = False

    @property
    def now_s(self) -> float:
        """The fake's own time, which only `advance` moves."""
        with self._lock:
            return self._now_s

    def fail_next(self, *faults: Fault) -> None:
        """Let the next calls that can meet these faults meet them, in order."""
        with self._lock:
            self._faults.extend(faults)

    def clear_faults(self) -> None:
        """Forget the faults that no call has met yet."""
        with self._lock:
            self._faults.clear()

    def advance(self, seconds: float) -> None:
        """Let time pass; leases that end in it expire."""
        with self._lock:
            self._now_s += seconds
            ended = [
                lease for lease, state in self._leases.items() if state.expires_s <= self._now_s
            ]
            for lease in ended:
                self._end_lease(lease)
        self._deliver()

    def backup(self) -> Backup:
        """Return what there is now, to be restored later."""
        with self._lock:
            leases = {lease: replace(state) for lease, state in self._leases.items()}
            return Backup(dict(self._items), self._revision, leases)

    def restore(self, backup: Backup) -> None:
        """Go back to what there was; watches read all anew. Leases get their whole time again."""
        with self._lock:
            self._items = dict(backup.items)
            self._revision = self._compacted = backup.revision
            self._history.clear()
            self._leases = {
                lease: _Lease(state.ttl_s, self._now_s + state.ttl_s)
                for lease, state in backup.leases.items()
            }
            for watch in self._watches:
                listing = self._listing(watch.prefix)
                watch.pending.append(Reread(listing.revision, listing.items))
        self._deliver()

    def compact(self) -> None:
        """Forget all history before now."""
        with self._lock:
            self._compacted = self._revision
            self._history.clear()

    def get(self, key: str) -> KeyValue | None:
        """Return a key, or None."""
        with self._lock:
            self._begin(change=False)
            return self._items.get(key)

    def get_prefix(self, prefix: str) -> Listing:
        """Return all keys that begin with `prefix`."""
        with self._lock:
            self._begin(change=False)
            return self._listing(prefix)

    def transaction(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> Outcome:
        """Apply all operations at once if all compares hold."""
        keys = [operation.key for operation in operations]
        assert len(set(keys)) == len(keys), "no two operations name one key"
        with self._lock:
            answer_lost = self._begin(change=True)
            outcome = self._transaction(compares, operations)
        self._deliver()
        if answer_lost:
            raise OutcomeUnknown(_ENDPOINT, "answer lost")
        return outcome

    def grant_lease(self, ttl_s: int) -> int:
        """Return the id of a new lease."""
        with self._lock:
            self._begin(change=False)
            self._last_lease += 1
            self._leases[self._last_lease] = _Lease(ttl_s, self._now_s + ttl_s)
            return self._last_lease

    def refresh_lease(self, lease: int) -> int:
        """Give a lease its whole time again and return it in seconds."""
        with self._lock:
            self._begin(change=False)
            state = self._lease(lease)
            state.expires_s = self._now_s + state.ttl_s
            return state.ttl_s

    def revoke_lease(self, lease: int) -> None:
        """End a lease and delete its keys."""
        with self._lock:
            self._begin(change=False)
            if lease in self._leases:
                self._end_lease(lease)
        self._deliver()

    def watch(
        self, prefix: str, on_notice: OnNotice, from_revision: int | None = None
    ) -> MemoryWatch:
        """Report every change of keys that begin with `prefix` until cancelled."""
        watch = MemoryWatch(self, prefix, on_notice)
        with self._lock:
            if self._closed:
                raise ClientClosed
            if from_revision is None or not (self._compacted < from_revision <= self._revision + 1):
                listing = self._listing(prefix)
                watch.pending.append(Reread(listing.revision, listing.items))
            else:
                past = [pair for pair in self._history if pair[0] >= from_revision]
                self._notify([watch], past)
            self._watches.append(watch)
        self._deliver()
        return watch

    def cancel(self, watch: MemoryWatch) -> None:
        """End a watch; see `MemoryWatch.cancel`."""
        with self._lock:
            watch.cancelled = True
            watch.pending.clear()
            if watch in self._watches:
                self._watches.remove(watch)
            this_thread = threading.get_ident()
            self._lock.wait_for(lambda: watch.delivering in (None, this_thread))

    def close(self) -> None:
        """End all watches. Later calls raise ClientClosed."""
        with self._lock:
            self._closed = True
            watches = list(self._watches)
        for watch in watches:
            watch.cancel()

    def _begin(self, *, change: bool) -> bool:
        """Let a call meet its fault, if one is due; return whether its answer will be lost."""
        if self._closed:
            raise ClientClosed
        if not self._faults or not (change or self._faults[0] is Fault.UNAVAILABLE):
            return False
        fault = self._faults.popleft()
        if fault is Fault.UNAVAILABLE:
            raise EtcdUnavailable((_ENDPOINT,), "fault asked for")
        if fault is Fault.REQUEST_LOST:
            raise OutcomeUnknown(_ENDPOINT, "request lost")
        return True

    def _transaction(self, compares: Iterable[Compare], operations: Sequence[Operation]) -> Outcome:
        if not all(self._holds(compare) for compare in compares):
            return Outcome(False, self._revision)
        for operation in operations:
            if isinstance(operation, Put) and operation.lease:
                self._lease(operation.lease)
        self._apply(operations)
        return Outcome(True, self._revision)

    def _apply(self, operations: Iterable[Operation]) -> None:
        effective = [
            operation
            for operation in operations
            if isinstance(operation, Put) or operation.key in self._items
        ]
        if not effective:
            return
        self._revision += 1
        changes = []
        for operation in effective:
            if isinstance(operation, Delete):
                del self._items[operation.key]
                change = Changed(operation.key, None, self._revision)
            else:
                key, value, lease = operation.key, operation.value, operation.lease
                self._items[key] = KeyValue(key, value, self._revision, lease)
                change = Changed(key, value, self._revision, lease)
            changes.append((self._revision, change))
        self._history += changes
        if len(self._history) > HISTORY_MAX:
            self._compacted = self._history[HISTORY_MAX // 2][0]
            self._history = [pair for pair in self._history if pair[0] > self._compacted]
        self._notify(self._watches, changes)

    def _notify(
        self, watches: Iterable[MemoryWatch], changes: Iterable[tuple[int, Changed]]
    ) -> None:
        for watch in watches:
            of_watch = tuple(c for _, c in changes if c.key.startswith(watch.prefix))
            if of_watch:
                watch.pending.append(Changes(of_watch[-1].mod_revision, of_watch))

    def _deliver(self) -> None:
        """Deliver what is pending, unless another call is at it, which then delivers this too."""
        while True:
            with self._lock:
                due = next((w for w in self._watches if w.pending and w.delivering is None), None)
                if due is None:
                    return
                notice = due.pending.popleft()
                due.delivering = threading.get_ident()
            try:
                due.on_notice(notice)
            finally:
                with self._lock:
                    due.delivering = None
                    self._lock.notify_all()

    def _holds(self, compare: Compare) -> bool:
        item = self._items.get(compare.key)
        match compare:
            case KeyAbsent():
                return item is None
            case ValueEquals(value=value):
                return item is not None and item.value == value
            case ModRevisionEquals(mod_revision=mod_revision):
                return item is not None and item.mod_revision == mod_revision
            case LeaseEquals(lease=lease):
                return item is not None and item.lease == lease
            case RangeEmpty(key=key, end=end):
                return not any(key.encode() <= k.encode() < end.encode() for k in self._items)

    def _listing(self, prefix: str) -> Listing:
        found = (item for key, item in self._items.items() if key.startswith(prefix))
        return Listing(self._revision, tuple(sorted(found, key=lambda item: item.key.encode())))

    def _lease(self, lease: int) -> _Lease:
        state = self._leases.get(lease)
        if state is None:
            raise LeaseNotFound(lease)
        return state

    def _end_lease(self, lease: int) -> None:
        del self._leases[lease]
        bound = sorted(key for key, item in self._items.items() if item.lease == lease)
        self._apply([Delete(key) for key in bound])
