"""The votes of all replica sets of an image, cast together: all or none."""

from arbiter.statement import Statement, Votes, confirm_image, prepare_image
from arbiter.vote import Refusal


def stated(generation: int, *in_sync: str, epoch: int = 1) -> Statement:
    sets = tuple(frozenset(nodes) for nodes in in_sync)
    return Statement(epoch, f"g{epoch}", generation, sets)


def confirmed(*statements: Statement) -> Votes:
    votes: Votes = ()
    for each in statements:
        votes, refusal = confirm_image(votes, each)
        assert refusal is None
    return votes


def test_prepare_tells_an_arbiter_that_knows_nothing_what_etcd_holds() -> None:
    votes, refusal = prepare_image((), stated(4, "ab"), stated(5, "a"))
    assert refusal is None
    assert votes[0].confirmed == stated(4, "ab").ballot(0)
    assert votes[0].prepared == stated(5, "a").ballot(0)


def test_prepare_after_a_heal_that_the_arbiter_missed_is_granted() -> None:
    """Judged by what it last heard, the healed node would be refused for ever."""
    votes = confirmed(stated(2, "a"))
    after, refusal = prepare_image(votes, stated(3, "ab"), stated(4, "b"))
    assert refusal is None
    assert after[0].prepared == stated(4, "b").ballot(0)


def test_prepare_after_a_grant_that_etcd_took_unheard_does_not_replace_it() -> None:
    votes, _ = prepare_image((), stated(1, "ab"), stated(2, "a"))
    after, refusal = prepare_image(votes, stated(1, "ab", epoch=2), stated(2, "b", epoch=2))
    assert refusal is None, "etcd still held the former state: the grant never came to it"
    votes, _ = confirm_image(after, stated(2, "b", epoch=2))
    assert prepare_image(votes, stated(2, "a", epoch=3), stated(3, "a", epoch=3)) == (
        votes,
        Refusal.GENERATION_OF_TWO_SETS,
    )


def test_refusal_of_one_set_changes_no_other() -> None:
    votes = confirmed(stated(2, "ab", "c"))
    wanted = stated(3, "a", "d")
    assert prepare_image(votes, stated(2, "ab", "c"), wanted) == (votes, Refusal.STALE_SET)


def test_rolled_back_etcd_is_noticed_by_a_set_that_does_not_change() -> None:
    votes = confirmed(stated(2, "ab", "c"))
    older = prepare_image(votes, stated(1, "ab", "cd"), stated(2, "a", "cd"))
    assert older == (votes, Refusal.OLDER_GENERATION)


def test_another_number_of_sets_is_refused() -> None:
    votes = confirmed(stated(1, "ab", "cd"))
    assert confirm_image(votes, stated(2, "ab")) == (votes, Refusal.OTHER_SETS)
