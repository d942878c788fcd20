"""The rules of who is in sync, by example and over arbitrary histories."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shard.membership import (
    Change,
    Membership,
    Plan,
    Policy,
    Ready,
    Stale,
    Wait,
    check_successor,
    lose,
    open_plan,
    quorum_met,
    rejoin,
    short_of_space,
)

ABC, CDE = ("a", "b", "c"), ("c", "d", "e")


def replica_3(
    stale: Stale | None = None, *, sets: tuple[tuple[str, ...], ...] = (ABC,), generation: int = 5
) -> Membership:
    return Membership(Policy.REPLICA_3, sets, stale or {}, generation, epoch=2)


def pair(stale: Stale | None = None, generation: int = 5) -> Membership:
    return Membership(Policy.THIN_ARBITER, (("a", "b"),), stale or {}, generation, epoch=2)


def changed(plan: Plan) -> Change:
    assert isinstance(plan, Change)
    return plan


def test_lose_one_of_three_marks_it_stale_since_the_old_generation() -> None:
    change = changed(lose(replica_3(), {"b"}))
    assert change.membership.generation == 6
    assert change.membership.stale == {0: {"b": 5}}
    assert change.membership.in_sync(0) == ("a", "c")
    assert change.changed == {0}
    assert not change.waiting
    assert not change.needs_grant


def test_lose_a_second_of_three_waits() -> None:
    assert lose(replica_3({0: {"b": 4}}), {"c"}) == Wait({0: frozenset("c")})


def test_lose_two_of_three_at_once_keeps_both_in_sync() -> None:
    assert lose(replica_3(), {"a", "c"}) == Wait({0: frozenset("ac")})


def test_short_of_space_where_those_with_room_are_no_quorum() -> None:
    assert short_of_space(replica_3(), {"a", "z"}) == frozenset()
    assert short_of_space(replica_3(), {"a", "b"}) == {0}
    assert short_of_space(replica_3({0: {"c": 4}}), {"a"}) == {0}
    assert short_of_space(replica_3({0: {"c": 4}}), {"c"}) == frozenset()
    assert short_of_space(replica_3(sets=(ABC, CDE)), {"c", "d"}) == {1}
    assert short_of_space(pair(), {"a"}) == frozenset()
    assert short_of_space(pair(), {"a", "b"}) == {0}
    assert short_of_space(pair({0: {"a": 4}}), {"b"}) == {0}


def test_lose_a_stale_or_foreign_node_changes_nothing() -> None:
    assert lose(replica_3({0: {"b": 4}}), {"b", "z"}) == Ready()
    assert lose(replica_3(), ()) == Ready()


def test_lose_a_node_of_two_sets_changes_only_the_set_that_keeps_its_quorum() -> None:
    before = replica_3({1: {"d": 3}}, sets=(ABC, CDE))
    change = changed(lose(before, {"c"}))
    assert change.membership.stale == {0: {"c": 5}, 1: {"d": 3}}
    assert change.changed == {0}
    assert change.waiting == {1: frozenset("c")}


def test_lose_a_node_of_two_sound_sets_is_one_change() -> None:
    change = changed(lose(replica_3(sets=(ABC, CDE)), {"c"}))
    assert change.membership.generation == 6
    assert change.changed == {0, 1}


def test_lose_one_of_a_pair_needs_the_grant() -> None:
    change = changed(lose(pair(), {"b"}))
    assert change.membership.stale == {0: {"b": 5}}
    assert change.needs_grant == {0}


def test_lose_the_last_of_a_pair_waits() -> None:
    assert lose(pair({0: {"b": 4}}), {"a"}) == Wait({0: frozenset("a")})
    assert lose(pair(), {"a", "b"}) == Wait({0: frozenset("ab")})


def test_open_with_all_in_sync_nodes_there_is_ready() -> None:
    assert open_plan(replica_3({0: {"b": 4}}), {"a", "c"}) == Ready()


def test_open_with_a_node_missing_takes_it_out_first() -> None:
    change = changed(open_plan(replica_3(), {"a", "b"}))
    assert change.membership.stale == {0: {"c": 5}}


def test_open_below_quorum_waits_for_what_is_missing() -> None:
    assert open_plan(replica_3(), {"a"}) == Wait({0: frozenset("bc")})


def test_open_with_one_set_below_quorum_opens_the_other() -> None:
    """A dead pair in one replica set must not stall the others."""
    change = changed(open_plan(replica_3(sets=(ABC, CDE)), {"a", "b", "e"}))
    assert change.changed == {0}
    assert change.waiting == {1: frozenset("cd")}


def test_rejoin_takes_the_node_in_at_the_next_generation() -> None:
    change = changed(rejoin(replica_3({0: {"b": 3}}), {0: ["b"]}))
    assert change.membership.stale == {}
    assert change.membership.generation == 6


def test_rejoin_lets_a_missing_node_go_in_the_same_change() -> None:
    change = changed(rejoin(replica_3({0: {"b": 3}}), {0: ["b"]}, lost=["c"]))
    assert change.membership.stale == {0: {"c": 5}}
    assert change.membership.in_sync(0) == ("a", "b")


def test_rejoin_of_a_node_that_is_lost_again_leaves_it_stale() -> None:
    assert rejoin(replica_3({0: {"b": 3}}), {0: ["b"]}, lost=["b"]) == Ready()


def test_rejoin_of_a_pair_needs_the_grant_too() -> None:
    assert changed(rejoin(pair({0: {"b": 3}}), {0: ["b"]})).needs_grant == {0}


def test_rejoin_of_a_node_in_sync_is_a_programmers_error() -> None:
    with pytest.raises(AssertionError, match="only a stale node rejoins"):
        rejoin(replica_3(), {0: ["b"]})


def test_quorum_is_met_only_with_all_in_sync_nodes_there() -> None:
    before = replica_3({0: {"b": 3}})
    assert quorum_met(before, 0)
    assert quorum_met(before, 0, {"a", "c"})
    assert not quorum_met(before, 0, {"a", "b"})


@pytest.mark.parametrize(
    ("sets", "stale", "generation", "message"),
    [
        ((ABC,), {0: {"a": 1, "b": 1}}, 5, "never falls below its quorum"),
        ((ABC,), {0: {"z": 1}}, 5, "member of its set"),
        ((ABC,), {0: {"a": 5}}, 5, "former generation"),
        ((ABC,), {0: {}}, 5, "no entry"),
        ((ABC,), {1: {"a": 1}}, 5, "names a replica set"),
        ((ABC,), {}, 0, "begin at 1"),
        ((("a", "b"),), {}, 5, "as many members"),
        ((("a", "b", "a"),), {}, 5, "in a set once"),
        ((), {}, 5, "at least one replica set"),
    ],
)
def test_broken_membership_fails_loudly(
    sets: tuple[tuple[str, ...], ...], stale: Stale, generation: int, message: str
) -> None:
    with pytest.raises(AssertionError, match=message):
        Membership(Policy.REPLICA_3, sets, stale, generation, epoch=0)


def test_membership_does_not_share_the_callers_dictionaries() -> None:
    stale = {0: {"a": 1}}
    membership = replica_3(stale)
    stale[0]["b"] = 1
    assert membership.stale == {0: {"a": 1}}


NODES = st.frozensets(st.sampled_from("abcde"))


@settings(max_examples=300)
@given(
    st.sampled_from(
        [
            Membership(Policy.REPLICA_3, (ABC, CDE, ("e", "a", "d")), {}, 1, 0),
            Membership(Policy.THIN_ARBITER, (("a", "b"), ("c", "d")), {}, 1, 0),
        ]
    ),
    st.lists(st.tuples(st.booleans(), NODES, NODES), max_size=30),
)
def test_any_history_keeps_the_invariants(
    membership: Membership, history: list[tuple[bool, frozenset[str], frozenset[str]]]
) -> None:
    """A node in sync has every generation's writes: it was in sync in each, or was healed."""
    level = {
        (index, node): membership.generation
        for index, members in enumerate(membership.sets)
        for node in members
    }
    for losing, lost, healed in history:
        healing = {
            index: [node for node in stale if node in healed]
            for index, stale in membership.stale.items()
        }
        plan = lose(membership, lost) if losing else rejoin(membership, healing, lost)
        if isinstance(plan, Wait):
            for index, missing in plan.waiting.items():
                assert missing <= set(membership.in_sync(index)) & lost
        if not isinstance(plan, Change):
            continue
        check_successor(membership, plan.membership)
        for index, missing in plan.waiting.items():
            assert missing <= set(plan.membership.in_sync(index))
        for index in range(len(membership.sets)):
            before, after = membership.in_sync(index), plan.membership.in_sync(index)
            assert (index in plan.changed) == (before != after)
            assert set(after) - set(before) <= set(healing.get(index, []))
            for node in after:
                level[index, node] = plan.membership.generation
            for node, since in plan.membership.stale.get(index, {}).items():
                assert level[index, node] == since
        membership = plan.membership
