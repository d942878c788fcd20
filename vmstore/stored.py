"""Records together with what was read of them, and transactions whose outcome becomes known."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Generic, ParamSpec, TypeVar

from etcd.errors import EtcdUnavailable, OutcomeUnknown
from etcd.interface import (
    Compare,
    Etcd,
    KeyValue,
    ModRevisionEquals,
    Operation,
    Put,
    ValueEquals,
)
from etcd.records import Record
from vmstore.errors import RecordChanged

COMMIT_ATTEMPTS = 4
"""Times one proposal is sent while its outcome stays unknown; then the caller is told."""

DECISIONS = 8
"""Times that a change is decided anew: each time somebody else's change was made, so all go on."""

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R", bound=Record)


@dataclass(frozen=True, slots=True)
class Stored(Generic[R]):
    """A record as it stands in etcd: the bytes are kept, so that a change can compare them."""

    key: str
    record: R
    value: bytes
    mod_revision: int

    @property
    def unchanged(self) -> tuple[Compare, ...]:
        """Compares that hold while the record is as it was read.

        The revision tells apart what has equal bytes; the bytes tell apart what has an equal
        revision in an etcd that was restored.
        """
        return (ModRevisionEquals(self.key, self.mod_revision), ValueEquals(self.key, self.value))


def stored(record_type: type[R], item: KeyValue) -> Stored[R]:
    """Return the record of a key that was read. Raises RecordError where it is none."""
    record = record_type.decode(item.key, item.value)
    return Stored(item.key, record, item.value, item.mod_revision)


def read(etcd: Etcd, record_type: type[R], key: str) -> Stored[R] | None:
    """Return the record at `key`, or None where there is none."""
    item = etcd.get(key)
    return None if item is None else stored(record_type, item)


def commit(
    etcd: Etcd,
    compares: Sequence[Compare],
    operations: Sequence[Operation],
    found: Callable[[], int | None],
) -> int | None:
    """Make a change, and find out its outcome where the answer is lost.

    `found` reads whether the proposal stands in etcd, and returns its revision if so: then the
    compares do not hold because it was made already, by a lost answer or an earlier call. Sending
    a proposal again is safe, since one that comes late fails the compares of the other.

    Returns the revision of the change, or None where the compares do not hold. Raises
    OutcomeUnknown where it stays unknown (calling again with the same arguments asks again), and
    EtcdUnavailable only where nothing was changed.
    """
    unknown: OutcomeUnknown | None = None
    for _ in range(COMMIT_ATTEMPTS):
        try:
            outcome = etcd.transaction(compares, operations)
            if outcome.committed:
                return outcome.revision
            return found()
        except OutcomeUnknown as error:
            unknown = error
        except EtcdUnavailable:
            if unknown is None:
                raise
            break
    assert unknown is not None, "an attempt ends the loop unless its outcome is unknown"
    raise unknown


def decided_anew(change: Callable[P, T]) -> Callable[P, T]:
    """Have a change that reads what it decides by made again where that changed meanwhile.

    Raises RecordChanged only where others were quicker `DECISIONS` times in a row.
    """

    @wraps(change)
    def until_made(*args: P.args, **kwargs: P.kwargs) -> T:
        for _ in range(DECISIONS - 1):
            try:
                return change(*args, **kwargs)
            except RecordChanged:
                pass
        return change(*args, **kwargs)

    return until_made


def put_found(etcd: Etcd, put: Put) -> Callable[[], int | None]:
    """Return the `found` of a proposal that is recognised by one value, which only it writes."""

    def found() -> int | None:
        item = etcd.get(put.key)
        return item.mod_revision if item is not None and item.value == put.value else None

    return found
