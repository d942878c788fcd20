"""The arbiter's vote: which sets of in-sync nodes may go on without the others.

Per image and replica set the arbiter holds the last *confirmed* set, which etcd has taken, and at
most one *prepared* set, which was granted and may or may not have come to etcd. Pure: the caller
makes each new state durable before it answers.

    state                event                                       answer
    empty                prepare                                     refused: not filled yet
    any                  an older epoch, an epoch of two holders     refused
    confirmed g          prepare above g, a member of it in set g    granted, prepared
    confirmed g          prepare above g, all of it stale by set g   refused
    confirmed g          prepare exactly what is confirmed           granted, unchanged
    confirmed g          prepare at or below g, else                 refused
    prepared             prepare by the same or a later epoch        judged by the confirmed set
    any                  confirm above g                             confirmed; a prepared set stays
                                                                     if above and not stale by it
    confirmed g          confirm exactly what is confirmed           unchanged
    confirmed g          confirm at or below g, else                 refused: etcd lost history

A prepared set may be replaced, because the commit point is etcd's transaction: an opener first
confirms what etcd holds, and a holder learns the outcome of its own change before the next one.
"""

from dataclasses import dataclass, replace
from enum import Enum


@dataclass(frozen=True, slots=True)
class Ballot:
    """The nodes in sync at a generation, as the holder of an epoch states them."""

    epoch: int
    holder: str
    generation: int
    in_sync: frozenset[str]

    def __post_init__(self) -> None:
        assert self.epoch >= 1, "a holder has an epoch"
        assert self.generation >= 1, "generations begin at 1"
        assert self.in_sync, "a set in sync has a member"


@dataclass(frozen=True, slots=True)
class Vote:
    """What the arbiter holds of one image and replica set."""

    confirmed: Ballot | None = None
    prepared: Ballot | None = None
    epoch: int = 0
    holder: str | None = None


class Refusal(Enum):
    """Why a request is refused; the value is told to the asker."""

    NOT_FILLED = "this arbiter does not know the image yet; it is filled from etcd first"
    OLDER_EPOCH = "a later holder has been here"
    EPOCH_OF_TWO_HOLDERS = "another holder has been here with the same epoch"
    OLDER_GENERATION = "a later change of the nodes in sync is confirmed"
    GENERATION_OF_TWO_SETS = "another set of nodes is confirmed with the same generation"
    STALE_SET = "all nodes of the set are stale by the confirmed one"
    OTHER_SETS = "the image has another number of replica sets here"


Answer = Refusal | None
"""None where the request is granted."""


def prepare(vote: Vote, ballot: Ballot) -> tuple[Vote, Answer]:
    """Judge a change that a holder wants to make in etcd; return the new state and the answer."""
    refusal = _refusal_by_epoch(vote, ballot)
    if refusal is None:
        refusal = _refusal_by_confirmed(vote.confirmed, ballot)
    if refusal is not None:
        return vote, refusal
    seen = replace(vote, epoch=ballot.epoch, holder=ballot.holder)
    if vote.confirmed is not None and vote.confirmed.generation == ballot.generation:
        return _checked(vote, seen), None
    return _checked(vote, replace(seen, prepared=ballot)), None


def confirm(vote: Vote, ballot: Ballot) -> tuple[Vote, Answer]:
    """Take what etcd holds for confirmed; return the new state and the answer."""
    refusal = _refusal_by_epoch(vote, ballot)
    confirmed, prepared = vote.confirmed, vote.prepared
    if refusal is None and confirmed is not None:
        refusal = _refusal_by_generation(confirmed, ballot)
    if refusal is not None:
        return vote, refusal
    if prepared is not None and not (
        prepared.generation > ballot.generation and prepared.in_sync & ballot.in_sync
    ):
        prepared = None
    return _checked(vote, Vote(ballot, prepared, ballot.epoch, ballot.holder)), None


def check(vote: Vote) -> None:
    """Assert what holds of every state."""
    if vote.prepared is not None:
        assert vote.confirmed is not None, "nothing is granted before something is confirmed"
        assert vote.prepared.generation > vote.confirmed.generation, "a grant is above"
        assert vote.prepared.in_sync & vote.confirmed.in_sync, "a grant is not stale"
    for ballot in (vote.confirmed, vote.prepared):
        assert ballot is None or ballot.epoch <= vote.epoch, "the epoch is the highest seen"


def _checked(before: Vote, after: Vote) -> Vote:
    check(after)
    assert after.epoch >= before.epoch, "epochs never decrease"
    if before.confirmed is not None:
        assert after.confirmed is not None, "what is confirmed stays known"
        assert after.confirmed.generation >= before.confirmed.generation, "nor do generations"
    return after


def _refusal_by_epoch(vote: Vote, ballot: Ballot) -> Answer:
    if ballot.epoch < vote.epoch:
        return Refusal.OLDER_EPOCH
    if ballot.epoch == vote.epoch and ballot.holder != vote.holder:
        return Refusal.EPOCH_OF_TWO_HOLDERS
    return None


def _refusal_by_confirmed(confirmed: Ballot | None, ballot: Ballot) -> Answer:
    if confirmed is None:
        return Refusal.NOT_FILLED
    refusal = _refusal_by_generation(confirmed, ballot)
    if refusal is None and not ballot.in_sync & confirmed.in_sync:
        return Refusal.STALE_SET
    return refusal


def _refusal_by_generation(confirmed: Ballot, ballot: Ballot) -> Answer:
    if ballot.generation < confirmed.generation:
        return Refusal.OLDER_GENERATION
    if ballot.generation == confirmed.generation and ballot.in_sync != confirmed.in_sync:
        return Refusal.GENERATION_OF_TWO_SETS
    return None
