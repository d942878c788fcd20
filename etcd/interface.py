"""What the project asks of etcd: one small interface, kept by the client and by the fake.

Reads are linearizable. A change is a transaction that compares what its caller read. Every call
returns or raises within a bounded time; the errors are those of `etcd.errors`, never others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class KeyValue:
    """A key as it was read. `lease` is 0 where it is bound to none."""

    key: str
    value: bytes
    mod_revision: int
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Listing:
    """All keys with a prefix, in order, as they were at one revision."""

    revision: int
    items: tuple[KeyValue, ...]


@dataclass(frozen=True, slots=True)
class KeyAbsent:
    """Holds where the key does not exist."""

    key: str


@dataclass(frozen=True, slots=True)
class ValueEquals:
    """Holds where the key exists with exactly this value."""

    key: str
    value: bytes


@dataclass(frozen=True, slots=True)
class ModRevisionEquals:
    """Holds where the key was last changed at this revision, that is, not since it was read."""

    key: str
    mod_revision: int


@dataclass(frozen=True, slots=True)
class LeaseEquals:
    """Holds where the key exists and is bound to this etcd lease."""

    key: str
    lease: int


@dataclass(frozen=True, slots=True)
class RangeEmpty:
    """Holds where there is no key from `key` on and below `end`, in byte order."""

    key: str
    end: str


Compare = KeyAbsent | ValueEquals | ModRevisionEquals | LeaseEquals | RangeEmpty


@dataclass(frozen=True, slots=True)
class Put:
    """Sets a key; with a lease, the key goes when the lease does."""

    key: str
    value: bytes
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    """Removes a key if it exists."""

    key: str


Operation = Put | Delete


@dataclass(frozen=True, slots=True)
class Outcome:
    """Whether a transaction's compares held, and the revision it left or found.

    After a committed transaction `revision` is the mod revision of the keys it put.
    """

    committed: bool
    revision: int


@dataclass(frozen=True, slots=True)
class Changed:
    """One change seen by a watch: `value` is None where the key went."""

    key: str
    value: bytes | None
    mod_revision: int
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Changes:
    """Changes since the last notice, in order; `revision` is that of the last one."""

    revision: int
    changes: tuple[Changed, ...]


@dataclass(frozen=True, slots=True)
class Reread:
    """All there is now: the history between was missed, so forget what earlier notices said.

    Where `revision` is below that of an earlier notice, etcd lost history: it was restored.
    """

    revision: int
    items: tuple[KeyValue, ...]


Notice = Changes | Reread
OnNotice = Callable[[Notice], None]


class Watch(Protocol):
    """A running watch."""

    def cancel(self) -> None:
        """End the watch: when this returns, no notice is being or will be delivered.

        Called from within the notice itself, it returns at once and that notice is the last.
        """


class Etcd(Protocol):
    """Cluster state. Safe to use from several threads."""

    def get(self, key: str) -> KeyValue | None:
        """Return a key, or None where it does not exist. Raises EtcdUnavailable."""

    def get_prefix(self, prefix: str) -> Listing:
        """Return all keys that begin with `prefix`. Raises EtcdUnavailable."""

    def transaction(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> Outcome:
        """Apply all operations at once if all compares hold, else nothing.

        No two operations name one key. Raises EtcdUnavailable (nothing was changed),
        OutcomeUnknown (read again), LeaseNotFound (a put named a lease that is gone; nothing was
        changed), EtcdRefused.
        """

    def grant_lease(self, ttl_s: int) -> int:
        """Return the id of a new etcd lease that lives `ttl_s` seconds unless refreshed.

        Raises EtcdUnavailable; a lease granted nevertheless expires by itself.
        """

    def refresh_lease(self, lease: int) -> int:
        """Give a lease its whole time again and return it in seconds, counted from sending.

        Raises LeaseNotFound, or EtcdUnavailable (it may have been refreshed).
        """

    def revoke_lease(self, lease: int) -> None:
        """End a lease and delete its keys; one that is gone already is no error.

        Raises EtcdUnavailable (it may have been revoked; if not it expires by itself).
        """

    def watch(self, prefix: str, on_notice: OnNotice, from_revision: int | None = None) -> Watch:
        """Report every change of keys that begin with `prefix`, in order, until cancelled.

        Without `from_revision` the first notice is a Reread; with it, changes at or after that
        revision follow. Outages are ridden out; where history was missed a Reread comes.
        `on_notice` is called from one thread at a time, without locks held.
        """

    def close(self) -> None:
        """End all watches and connections. Later calls raise ClientClosed."""
