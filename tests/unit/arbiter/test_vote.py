"""The vote rule, by example and over arbitrary histories."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arbiter.vote import Ballot, Refusal, Vote, check, confirm, prepare


def ballot(generation: int, in_sync: str, *, epoch: int = 1, holder: str = "g1") -> Ballot:
    return Ballot(epoch, holder, generation, frozenset(in_sync))


def confirmed(*ballots: Ballot) -> Vote:
    vote = Vote()
    for each in ballots:
        vote, answer = confirm(vote, each)
        assert answer is None
    return vote


def granted(vote: Vote, asked: Ballot) -> Vote:
    after, answer = prepare(vote, asked)
    assert answer is None
    return after


def test_prepare_on_an_empty_arbiter_is_refused() -> None:
    """One that lost its disk must not grant what its former self has refused."""
    assert prepare(Vote(), ballot(2, "a")) == (Vote(), Refusal.NOT_FILLED)


def test_prepare_above_the_confirmed_set_is_granted() -> None:
    before = confirmed(ballot(1, "ab"))
    after = granted(before, ballot(2, "a"))
    assert after.prepared == ballot(2, "a")
    assert after.confirmed == before.confirmed


def test_prepare_of_a_set_that_is_stale_is_refused() -> None:
    vote = confirmed(ballot(1, "ab"), ballot(2, "a"))
    assert prepare(vote, ballot(3, "b", epoch=2, holder="g2")) == (vote, Refusal.STALE_SET)


def test_prepare_of_a_healed_node_is_granted() -> None:
    """An arbiter that refuses a healed node would leave the pair without redundancy for ever."""
    assert granted(confirmed(ballot(2, "a")), ballot(3, "ab")).prepared == ballot(3, "ab")


def test_prepare_again_after_a_lost_answer_is_granted() -> None:
    vote = granted(confirmed(ballot(1, "ab")), ballot(2, "a"))
    assert granted(vote, ballot(2, "a")) == vote
    done, answer = confirm(vote, ballot(2, "a"))
    assert answer is None
    assert granted(done, ballot(2, "a")) == done


def test_prepared_set_is_replaced_by_a_later_epoch() -> None:
    """A grant whose node died before it came to etcd must not block the other node for ever."""
    vote = granted(confirmed(ballot(1, "ab")), ballot(2, "a"))
    after = granted(vote, ballot(2, "b", epoch=2, holder="g2"))
    assert after.prepared == ballot(2, "b", epoch=2, holder="g2")
    assert prepare(after, ballot(2, "a"))[1] is Refusal.OLDER_EPOCH


def test_prepared_set_that_etcd_took_is_not_replaced_once_confirmed() -> None:
    """The next opener confirms what etcd holds before it asks for its own."""
    vote = granted(confirmed(ballot(1, "ab")), ballot(2, "a"))
    vote, answer = confirm(vote, ballot(2, "a", epoch=2, holder="g2"))
    assert answer is None
    assert prepare(vote, ballot(3, "b", epoch=2, holder="g2"))[1] is Refusal.STALE_SET


@pytest.mark.parametrize(
    ("asked", "refusal"),
    [
        (ballot(6, "a", epoch=3), Refusal.OLDER_EPOCH),
        (ballot(6, "a", epoch=4, holder="g2"), Refusal.EPOCH_OF_TWO_HOLDERS),
        (ballot(4, "a", epoch=4), Refusal.OLDER_GENERATION),
        (ballot(5, "a", epoch=4), Refusal.GENERATION_OF_TWO_SETS),
    ],
)
def test_ballot_below_or_beside_what_is_known_is_refused(asked: Ballot, refusal: Refusal) -> None:
    vote = confirmed(ballot(5, "ab", epoch=4))
    assert prepare(vote, asked) == (vote, refusal)
    assert confirm(vote, asked) == (vote, refusal)


def test_confirm_keeps_a_grant_above_it() -> None:
    """An opener confirms the old record while a change it granted is on its way to etcd."""
    vote = granted(confirmed(ballot(1, "ab")), ballot(2, "a"))
    after, answer = confirm(vote, ballot(1, "ab"))
    assert answer is None
    assert after.prepared == ballot(2, "a")


def test_confirm_drops_a_grant_that_it_makes_stale() -> None:
    vote = granted(confirmed(ballot(1, "ab")), ballot(3, "b"))
    after, answer = confirm(vote, ballot(2, "a"))
    assert answer is None
    assert after.prepared is None


BALLOTS = st.builds(
    lambda epoch, generation, in_sync: Ballot(epoch, f"g{epoch}", generation, in_sync),
    st.integers(1, 4),
    st.integers(1, 6),
    st.frozensets(st.sampled_from("ab"), min_size=1),
)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.booleans(), BALLOTS), max_size=25))
def test_any_history_keeps_the_rules(history: list[tuple[bool, Ballot]]) -> None:
    vote = Vote()
    for preparing, asked in history:
        before = vote
        vote, answer = (prepare if preparing else confirm)(vote, asked)
        check(vote)
        if answer is not None:
            assert vote == before
        elif preparing:
            known = vote.confirmed
            assert known is not None
            repeated = (known.generation, known.in_sync) == (asked.generation, asked.in_sync)
            assert repeated or vote.prepared == asked
            assert asked.in_sync & known.in_sync
        else:
            assert vote.confirmed == asked
