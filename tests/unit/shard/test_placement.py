"""The choice of replica sets, and the hash that maps shards to them."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shard.errors import TooFewDomains
from shard.ids import ImageId
from shard.placement import (
    NODES_MAX,
    Candidate,
    FailureDomain,
    choose_replica_sets,
    replica_set_index,
    replica_set_of,
    spread_candidates,
    suggested_replica_sets,
)


def nodes(count: int, *, per_host: int = 1, weight: int = 1) -> list[Candidate]:
    return [
        Candidate(f"node{n}", f"host{n // per_host}", f"zone{n % 3}", weight=weight)
        for n in range(count)
    ]


def test_three_nodes_give_one_set_of_all() -> None:
    chosen = choose_replica_sets(nodes(3), replica_sets=1, members=3)
    assert sorted(chosen[0]) == ["node0", "node1", "node2"]


def test_too_few_hosts_are_refused_with_both_numbers() -> None:
    with pytest.raises(TooFewDomains, match="needs 3 nodes of different hosts, only 2 usable"):
        choose_replica_sets(nodes(4, per_host=2), replica_sets=1, members=3)


def test_failure_domain_node_allows_one_host() -> None:
    chosen = choose_replica_sets(
        nodes(3, per_host=3), replica_sets=1, members=3, failure_domain=FailureDomain.NODE
    )
    assert len(set(chosen[0])) == 3


def test_a_pool_spreads_over_no_more_nodes_than_the_engine_counts() -> None:
    """An image over 66 nodes ended every gateway that opened it."""
    many = spread_candidates(nodes(66, per_host=33))
    assert len(many) == NODES_MAX
    assert Counter(node.host for node in many) == {"host0": 32, "host1": 32}
    assert spread_candidates(nodes(5)) == nodes(5)
    heavy = Candidate("big", "host0", weight=9)
    assert spread_candidates([*nodes(66, per_host=33), heavy])[0] == heavy


def test_order_of_candidates_does_not_matter() -> None:
    candidates = nodes(7)
    one = choose_replica_sets(candidates, replica_sets=7, members=3)
    assert one == choose_replica_sets(candidates[::-1], replica_sets=7, members=3)


@given(
    st.integers(3, 12),
    st.integers(1, 24),
    st.integers(1, 3),
    st.sampled_from([FailureDomain.NODE, FailureDomain.HOST]),
)
def test_any_choice_keeps_domains_apart_and_loads_evenly(
    hosts: int, replica_sets: int, per_host: int, domain: FailureDomain
) -> None:
    candidates = nodes(hosts * per_host, per_host=per_host)
    chosen = choose_replica_sets(
        candidates, replica_sets=replica_sets, members=3, failure_domain=domain
    )
    by_name = {candidate.name: candidate for candidate in candidates}
    assert len(chosen) == replica_sets
    for members in chosen:
        assert len({by_name[name].domain(domain) for name in members}) == 3
    load = Counter(name for members in chosen for name in members)
    assert max(load.values()) - min(load[name] for name in by_name) <= 2


def test_heavier_nodes_hold_more() -> None:
    candidates = [*nodes(5), Candidate("big", "host-big", weight=2)]
    chosen = choose_replica_sets(candidates, replica_sets=14, members=3)
    load = Counter(name for members in chosen for name in members)
    assert load["big"] == 12
    assert all(load[f"node{n}"] == 6 for n in range(5))


def test_node_of_weight_zero_gets_nothing_new_and_keeps_what_it_has() -> None:
    former = (("node0", "node1", "drained"),)
    candidates = [*nodes(4), Candidate("drained", "host-d", weight=0)]
    chosen = choose_replica_sets(candidates, replica_sets=2, members=3, former=former)
    assert chosen[0] == former[0]
    assert "drained" not in chosen[1]


@given(st.integers(5, 10), st.integers(1, 12), st.data())
def test_removed_node_moves_only_its_own_places(
    count: int, replica_sets: int, data: st.DataObject
) -> None:
    candidates = nodes(count)
    former = choose_replica_sets(candidates, replica_sets=replica_sets, members=3)
    gone = data.draw(st.sampled_from(candidates)).name
    left = [candidate for candidate in candidates if candidate.name != gone]
    chosen = choose_replica_sets(left, replica_sets=replica_sets, members=3, former=former)
    for before, after in zip(former, chosen, strict=True):
        for old, new in zip(before, after, strict=True):
            assert new != gone
            assert old in (new, gone)


def test_added_nodes_move_nothing() -> None:
    former = choose_replica_sets(nodes(4), replica_sets=4, members=3)
    chosen = choose_replica_sets(nodes(8), replica_sets=6, members=3, former=former)
    assert chosen[:4] == former
    assert {name for members in chosen[4:] for name in members} > {"node7"}


def test_members_that_came_to_share_a_host_are_parted() -> None:
    candidates = [
        Candidate("a", "host1"),
        Candidate("b", "host1"),
        Candidate("c", "host2"),
        Candidate("d", "host3"),
    ]
    former = (("a", "b", "c"),)
    chosen = choose_replica_sets(candidates, replica_sets=1, members=3, former=former)
    assert chosen == (("a", "d", "c"),)


def test_suggested_replica_sets_put_every_node_in_some() -> None:
    assert suggested_replica_sets(3, 3) == 1
    assert suggested_replica_sets(5, 3) == 5


KEY = ImageId("00112233445566778899aabbccddeeff")


@pytest.mark.parametrize(
    ("key", "shard", "replica_sets", "index"),
    [
        ("00112233445566778899aabbccddeeff", 0, 3, 1),
        ("00112233445566778899aabbccddeeff", 1, 3, 2),
        ("00112233445566778899aabbccddeeff", 2, 7, 3),
        ("00000000000000000000000000000000", 0, 5, 0),
        ("ffffffffffffffffffffffffffffffff", 67108863, 12, 1),
        ("0123456789abcdef0123456789abcdef", 18446744073709551615, 1000003, 722284),
        ("0123456789abcdef0123456789abcdef", 9, 1, 0),
    ],
)
def test_replica_set_index_is_the_formats(
    key: str, shard: int, replica_sets: int, index: int
) -> None:
    """Golden values of the placement format, computed by the engine's function."""
    assert replica_set_index(ImageId(key), shard, replica_sets) == index


def test_replica_set_of_names_the_nodes() -> None:
    sets = (("a", "b", "c"), ("d", "e", "f"))
    spread = Counter(replica_set_of(KEY, shard, sets) for shard in range(4000))
    assert set(spread) == set(sets)
    assert all(1850 < count < 2150 for count in spread.values())
