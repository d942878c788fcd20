"""The design's histories about the thin arbiter: each passes, and is noticed when broken."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest

from arbiter import statement, voting
from arbiter.exchange import Addressee, Reply
from arbiter.statement import Statement, Votes
from arbiter.vote import Answer, Vote
from arbiter.vote import prepare as prepare_vote
from tests.sim.arbiters import Site
from tests.sim.defects import planted_by_name
from tests.sim.stage import Stage, broken
from vmstore import granting


def pair(seed: int = 1) -> Stage:
    """Return a guest on two hosts and an arbiter, with something written."""
    stage = Stage(seed, nodes=2, arbiter=True)
    stage.write(stage.at(1))
    stage.flush()
    return stage


# Every order of losing and regaining

PARTS = ("node-0", "node-1", "arbiter", "etcd")


def lose(stage: Stage, part: str) -> None:
    """Lose one of four."""
    if part == "arbiter":
        stage.cluster.site.stop(power=True)
    elif part == "etcd":
        stage.cluster.state.up = False
    else:
        stage.kill(int(part[-1]))


def regain(stage: Stage, part: str) -> None:
    """Have it back."""
    if part == "arbiter":
        stage.cluster.site.start()
    elif part == "etcd":
        stage.cluster.state.up = True
    else:
        stage.start(int(part[-1]))


@pytest.mark.parametrize("last_lost_is", ["first back", "last back"])
@pytest.mark.parametrize("order", list(itertools.permutations(PARTS)), ids="-".join)
def test_pair_goes_on_after_losing_its_parts_in_any_order(
    order: tuple[str, ...], last_lost_is: str
) -> None:
    """While two of three agree and etcd has its majority writes go on; after it all is level."""
    stage = pair()
    guest = stage.guest
    lost: set[str] = set()
    for part in order:
        lose(stage, part)
        lost.add(part)
        guest.write(stage.at(1), 8)
        stage.run(6.0)
        # Whether a change of membership that this needs has been made before is part of the order.
        if lost <= {"arbiter", "etcd"} or lost in ({"node-0"}, {"node-1"}):
            assert guest.in_flight == 0, f"without {lost} writes go on"
        if {"node-0", "node-1"} <= lost:
            assert guest.in_flight > 0, f"without {lost} nothing is answered"
    for part in reversed(order) if last_lost_is == "first back" else order:
        regain(stage, part)
        lost.discard(part)
        stage.run(8.0)
        if {"node-0", "node-1"} <= lost:
            assert guest.in_flight > 0, f"without {lost} nothing is answered"
        if not lost & {"arbiter", "etcd"} and {"node-0", "node-1"} - stage.stale() - lost:
            assert guest.in_flight == 0, f"with {lost} still away writes go on again"
    assert guest.in_flight == 0
    stage.settle()


# 9: the arbiter refuses a healed node for ever


def judged_by_what_it_last_heard() -> Any:
    """What etcd holds is not confirmed before a change is judged."""

    def prepare_image(votes: Votes, _known: Statement, wanted: Statement) -> tuple[Votes, Answer]:
        def cast(vote: Vote, index: int) -> tuple[Vote, Answer]:
            ballot = wanted.ballot(index)
            if vote.confirmed is None:
                vote = replace(vote, confirmed=replace(ballot, generation=1))
            return prepare_vote(vote, ballot)

        return statement._cast(votes, wanted, cast)

    return mock.patch.object(voting, "prepare_image", prepare_image)


def lose_one_then_the_other_with_the_arbiter_away() -> None:
    """The heal of one is not confirmed where the arbiter was; the other is lost next."""
    stage = pair(3)
    stage.kill(1)
    stage.write(stage.at(1))
    assert stage.stale() == {"node-1"}
    stage.start(1)
    stage.await_stale()
    stage.kill(0)
    stage.guest.write(stage.at(1), 8)
    stage.answered()
    assert stage.stale() == {"node-0"}
    stage.start(0)
    stage.settle()


def test_healed_node_of_a_pair_stands_alone_when_the_other_is_lost() -> None:
    lose_one_then_the_other_with_the_arbiter_away()


def test_arbiter_that_never_hears_of_a_heal_is_noticed() -> None:
    """It judges by the set before the heal, and the healed node waits for ever."""
    with (
        mock.patch.object(granting, "_confirm", _confirm_losses_only),
        broken(patch=judged_by_what_it_last_heard),
    ):
        lose_one_then_the_other_with_the_arbiter_away()


def _confirm_losses_only(held: Any, arbiter: Any) -> Any:
    """A heal is not confirmed."""
    if held.record.stale:
        counted = granting._changes_known(held.record, arbiter)
        yield granting.Confirm(arbiter, held.record.id, counted, granting.statement(held.record))


# 9: it is stuck on a grant whose node died


def lose_the_node_that_was_granted_to_be_alone() -> None:
    """The arbiter granted {B}; that never came to etcd, and B is gone."""
    stage = pair(4)
    cluster = stage.cluster
    stage.kill(0)
    stage.guest.write(stage.at(1), 8)
    # The grant is given, and etcd does not answer any more.
    granted: list[bool] = []

    def prepared(votes: Votes, known: Statement, wanted: Statement) -> tuple[Votes, Answer]:
        granted.append(True)
        cluster.state.up = False
        return statement.prepare_image(votes, known, wanted)

    with mock.patch.object(voting, "prepare_image", prepared):
        stage.until(lambda: bool(granted), "the arbiter has granted")
    stage.kill(1)
    cluster.stop_gateway(0, host=False)
    cluster.state.up = True
    stage.start(0)
    cluster.start_gateway(0)
    stage.until(lambda: cluster.guests[0].life.name == "RUNNING", "node 0 serves alone", 60.0)
    stage.write(stage.at(1, 1))
    stage.settle()


def test_grant_that_never_came_to_etcd_gives_way_to_the_other_node() -> None:
    lose_the_node_that_was_granted_to_be_alone()


def test_arbiter_stuck_on_a_grant_is_noticed() -> None:
    with broken(patch=planted_by_name("a grant may be replaced"), match="stuck"):
        lose_the_node_that_was_granted_to_be_alone()


# 9: it replaces a grant that etcd committed; etcd is put back to before that


def believe_the_one_that_was_left_behind() -> None:
    """A was left behind; etcd is restored to before, B is away: A is not believed alone."""
    stage = pair(5)
    cluster = stage.cluster
    backup = cluster.state.memory.backup()
    stage.kill(0)
    stage.write(stage.at(1))
    stage.flush()
    assert stage.stale() == {"node-0"}
    cluster.stop_gateway(0, host=False)
    stage.kill(1)
    cluster.rolled_back = True
    cluster.state.memory.restore(backup)
    stage.start(0)
    cluster.boot(1)
    stage.run(25.0)
    guest = cluster.guests[1]
    if guest.life.name == "RUNNING":
        guest.write(stage.at(1, 1), 8)
        guest.read(stage.at(1), 8)
        stage.run(5.0)


def test_node_left_behind_is_not_believed_alone_after_etcd_was_restored() -> None:
    believe_the_one_that_was_left_behind()


def test_write_answered_before_the_arbiter_confirmed_is_noticed() -> None:
    with broken(patch=planted_by_name("confirmed before the answer"), match="alone"):
        believe_the_one_that_was_left_behind()


# 9: it has lost its disk


def lose_the_arbiters_disk() -> None:
    """Emptied, it would grant anything; nobody asks it under its name any more."""
    stage = pair(6)
    cluster = stage.cluster
    backup = cluster.state.memory.backup()
    stage.kill(0)
    stage.write(stage.at(1))
    stage.flush()
    cluster.stop_gateway(0, host=False)
    stage.kill(1)
    cluster.site.empty()
    cluster.rolled_back = True
    cluster.state.memory.restore(backup)
    stage.start(0)
    cluster.boot(1)
    stage.run(25.0)
    guest = cluster.guests[1]
    if guest.life.name == "RUNNING":
        guest.read(stage.at(1), 8)
        stage.run(5.0)


def any_arbiter_will_do() -> Any:
    """Whom a request is meant for, and what it was seen to know, does not matter."""
    judged = voting.Voting._judged

    def patched(own: voting.Voting, to: Addressee, image: Any, judge: Any) -> Reply:
        return judged(own, Addressee(own._record.identity.id), image, judge)

    return mock.patch.object(voting.Voting, "_judged", patched)


def test_emptied_arbiter_grants_nothing() -> None:
    lose_the_arbiters_disk()


def test_emptied_arbiter_that_is_believed_is_noticed() -> None:
    with (
        mock.patch.object(Site, "refuse"),
        broken(patch=any_arbiter_will_do, match="has lost its disk"),
    ):
        lose_the_arbiters_disk()


def test_arbiter_whose_disk_was_put_back_is_replaced_and_the_pair_goes_on() -> None:
    stage = pair(7)
    site = stage.cluster.site
    site.snapshot()
    stage.kill(1)
    stage.write(stage.at(1))
    stage.start(1)
    stage.await_stale()
    site.roll_back()
    stage.run(3.0)
    site.care(stage.cluster.nodes.up)
    stage.kill(0)
    stage.guest.write(stage.at(1), 8)
    stage.answered(limit_s=60.0)
    stage.start(0)
    stage.settle()
