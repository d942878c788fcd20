"""How a change of membership becomes valid: asked of the arbiter, taken by etcd, confirmed.

Pure: a procedure is a generator of steps. Whoever runs it makes each step and sends in its result,
or throws in the error it met; the generator returns the lease as it is held then. It may be dropped
between any two steps, as a gateway that is killed drops it, and begun again from the start.

    step       what it does                                    after a crash behind it
    Look       reads image, pool, arbiter from etcd            nothing has changed
    Prepare    the arbiter takes what etcd holds for           a grant that etcd never took: the
               confirmed, and grants what follows it           next one replaces it
    Commit     etcd takes the change: it is valid              the next holder finds it in etcd,
                                                               and has it confirmed first
    Confirm    the arbiter takes it for confirmed              all is done

Only when the last step is done does the holder hear of the change, and answers writes by it. So of
two nodes that each believe to be alone in sync one is refused, be it that etcd was put back to an
older state: the arbiter has confirmed what the other's writes were answered by.

A pool without an arbiter has the step Commit alone. So has a change of layers that leaves nobody
behind and takes nobody in: the next one has its generation confirmed first (`known` of `Prepare`).
"""

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any

from arbiter.errors import ArbiterBehind, ArbiterFailed, ArbiterUnreachable, OtherArbiter
from arbiter.statement import Statement
from etcd.errors import EtcdError, EtcdUnavailable
from etcd.images import Grant, ImageRecord
from etcd.records import ArbiterRecord, PoolRecord
from shard.errors import HciError
from shard.ids import ImageId
from vmstore.errors import (
    ArbiterNotFilled,
    ArbiterRetired,
    LeaseMoved,
    NoArbiter,
    RecordChanged,
    UnknownArbiter,
    UnknownPool,
)
from vmstore.holding import Held
from vmstore.stored import Stored

COMMIT_ATTEMPTS = 3
"""Times a change is asked for while the pool's arbiter changes under our eyes."""


@dataclass(frozen=True, slots=True)
class Look:
    """Read an image, its pool, and the pool's arbiter, if any, from etcd."""

    image: ImageId
    pool: str


@dataclass(frozen=True, slots=True)
class Found:
    """What `Look` found; the arbiter is read after the pool."""

    image: Stored[ImageRecord]
    pool: Stored[PoolRecord]
    arbiter: ArbiterRecord | None


@dataclass(frozen=True, slots=True)
class Prepare:
    """Ask the arbiter to grant `wanted`; its result is the image's count of changes."""

    arbiter: ArbiterRecord
    image: ImageId
    changes: int
    known: Statement
    wanted: Statement


@dataclass(frozen=True, slots=True)
class Commit:
    """Have etcd take `after` in place of what is held; its result is what is held then.

    With a grant only while the pool is what it was when the arbiter was asked.
    """

    held: Held
    after: ImageRecord
    grant: Grant | None
    pool: Stored[PoolRecord] | None


@dataclass(frozen=True, slots=True)
class Confirm:
    """Have the arbiter take `stated` for confirmed; its result is the image's count of changes."""

    arbiter: ArbiterRecord
    image: ImageId
    changes: int
    stated: Statement


Step = Look | Prepare | Commit | Confirm
Steps = Generator[Step, Any, Held]


@dataclass(slots=True)
class Progress:
    """How far a change came: unless it is `maybe_taken` etcd surely holds nothing of it."""

    maybe_taken: bool = False


def change(held: Held, after: ImageRecord, progress: Progress) -> Steps:
    """Take the image from the record that is held to `after`; return what is held then.

    After an error that `may_pass` the same change may be asked for again, and must be where
    `progress` says that etcd may have taken it.
    """
    if not after.policy.has_arbiter or after.stale == held.record.stale:
        return (yield from _without_arbiter(held, after, progress))
    found, arbiter = yield from _look(held)
    for _ in range(COMMIT_ATTEMPTS):
        if is_same_but_for_grant(found.image.record, after):
            # Taken before: in a call whose answer was lost, or that ended before it was confirmed.
            progress.maybe_taken = True
            held = replace(held, image=found.image)
            break
        counted = _changes_known(held.record, arbiter)
        known, wanted = statement(held.record), statement(after)
        changes = yield Prepare(arbiter, held.record.id, counted, known, wanted)
        assert isinstance(changes, int), "a grant counts the changes"
        grant = Grant(arbiter=arbiter.id, changes=changes)
        try:
            held = yield from _commit(Commit(held, after, grant, found.pool), progress)
            break
        except LeaseMoved:
            raise
        except RecordChanged:
            # By ourselves, unheard, or the pool has another arbiter now: that one is asked.
            found, arbiter = yield from _look(held)
    else:
        raise RecordChanged(f"image {held.record.id} or its pool")
    yield from _confirm(held, arbiter)
    return held


def opening(held: Held) -> Steps:
    """Have confirmed what etcd holds of an image that was just taken, where a node is stale.

    Its former holder may have ended between `Commit` and `Confirm`. Where all nodes are in sync the
    arbiter is not asked: nothing can be answered then without all of them.
    """
    if needs_arbiter_to_open(held.record):
        _, arbiter = yield from _look(held)
        yield from _confirm(held, arbiter)
    return held


def needs_arbiter_to_open(record: ImageRecord) -> bool:
    """Whether an image is served only after its arbiter has confirmed who is in sync."""
    return record.policy.has_arbiter and bool(record.stale)


def may_pass(error: HciError) -> bool:
    """Whether what was asked may succeed later, by itself or when a person has mended something."""
    return isinstance(
        error,
        EtcdError | ArbiterUnreachable | ArbiterFailed | OtherArbiter | ArbiterBehind
        | ArbiterNotFilled | ArbiterRetired | UnknownArbiter | UnknownPool | NoArbiter,
    )  # fmt: skip


def statement(record: ImageRecord) -> Statement:
    """Return what a record of a holder states to the arbiter."""
    assert record.holder is not None, "somebody holds the image, or did"
    membership = record.membership
    sets = range(len(record.sets))
    in_sync = tuple(frozenset(membership.in_sync(index)) for index in sets)
    return Statement(record.epoch, record.holder, record.generation, in_sync)


def is_same_but_for_grant(found: ImageRecord, wanted: ImageRecord) -> bool:
    """Whether a record is the one that was wanted; each attempt has a grant of its own."""
    return replace(found, grant=None) == replace(wanted, grant=None)


def _commit(commit: Commit, progress: Progress) -> Steps:
    try:
        taken = yield commit
    except EtcdUnavailable:
        raise
    except HciError:
        progress.maybe_taken = True
        raise
    progress.maybe_taken = True
    assert isinstance(taken, Held), "a commit gives what is held"
    return taken


def _without_arbiter(held: Held, after: ImageRecord, progress: Progress) -> Steps:
    try:
        return (yield from _commit(Commit(held, after, None, None), progress))
    except RecordChanged:
        # Perhaps by ourselves, in a call whose answer was lost.
        found = yield Look(held.record.id, held.record.pool)
        assert isinstance(found, Found), "a look finds or fails"
        if found.image.record != after:
            raise
        return replace(held, image=found.image)


def _look(held: Held) -> Generator[Step, Any, tuple[Found, ArbiterRecord]]:
    found = yield Look(held.record.id, held.record.pool)
    assert isinstance(found, Found), "a look finds or fails"
    if found.arbiter is None:
        raise NoArbiter(held.record.policy.value)
    if not found.pool.record.filled:
        raise ArbiterNotFilled(found.arbiter.name, held.record.pool)
    return found, found.arbiter


def _confirm(held: Held, arbiter: ArbiterRecord) -> Generator[Step, Any, None]:
    counted = _changes_known(held.record, arbiter)
    yield Confirm(arbiter, held.record.id, counted, statement(held.record))


def _changes_known(record: ImageRecord, arbiter: ArbiterRecord) -> int:
    """Return how many changes of the image's votes this arbiter was seen to know."""
    grant = record.grant
    return grant.changes if grant is not None and grant.arbiter == arbiter.id else 0
