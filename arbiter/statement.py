"""What a holder states of a whole image, and the votes of its replica sets cast together.

A change of an image's membership is one change of one record, so the arbiter grants it for all
replica sets of the image or for none: a refusal of one set leaves the votes of all as they were.
Every statement names every set, those that do not change too. So an etcd that lost history of any
set is noticed at the next change of any other.
"""

from collections.abc import Callable
from dataclasses import dataclass

from arbiter.vote import Answer, Ballot, Refusal, Vote, confirm, prepare

SETS_MAX = 1024
"""Replica sets of an image; bounds what the arbiter takes in and keeps."""

Votes = tuple[Vote, ...]
"""One vote per replica set, by index; empty where the arbiter does not know the image."""


@dataclass(frozen=True, slots=True)
class Statement:
    """Which nodes of each replica set are in sync in a generation, as a holder states it."""

    epoch: int
    holder: str
    generation: int
    in_sync: tuple[frozenset[str], ...]

    def __post_init__(self) -> None:
        assert 1 <= len(self.in_sync) <= SETS_MAX, "an image has replica sets, a bounded number"
        for index in range(len(self.in_sync)):
            self.ballot(index)

    def ballot(self, index: int) -> Ballot:
        """Return what is stated of one replica set."""
        return Ballot(self.epoch, self.holder, self.generation, self.in_sync[index])


def confirm_image(votes: Votes, stated: Statement) -> tuple[Votes, Answer]:
    """Take what etcd holds for confirmed, in all sets or in none."""
    return _cast(votes, stated, lambda vote, index: confirm(vote, stated.ballot(index)))


def prepare_image(votes: Votes, known: Statement, wanted: Statement) -> tuple[Votes, Answer]:
    """Take `known` for confirmed, which etcd holds, and judge `wanted` by it.

    An arbiter that was away has missed changes that etcd took without it knowing, those of heals
    too. Judging by what it last heard would refuse a healed node for ever; so whoever asks tells
    first what etcd holds.
    """
    assert (known.epoch, known.holder) == (wanted.epoch, wanted.holder), "one holder asks"
    assert len(known.in_sync) == len(wanted.in_sync), "a change moves no data"
    after, refusal = confirm_image(votes, known)
    if refusal is None:
        after, refusal = _cast(
            after, wanted, lambda vote, index: prepare(vote, wanted.ballot(index))
        )
    return (after, None) if refusal is None else (votes, refusal)


def _cast(
    votes: Votes, stated: Statement, cast: Callable[[Vote, int], tuple[Vote, Answer]]
) -> tuple[Votes, Answer]:
    before = votes or tuple(Vote() for _ in stated.in_sync)
    if len(before) != len(stated.in_sync):
        return votes, Refusal.OTHER_SETS
    after = []
    for index, vote in enumerate(before):
        next_vote, refusal = cast(vote, index)
        if refusal is not None:
            return votes, refusal
        after.append(next_vote)
    return tuple(after), None
