"""`Space`: when disks are full, and when clients may hear of it."""

from shard.membership import Membership, Policy
from tests.unit.samples import NODES
from vmstore.space import FULL_S, Space

FULL_FOR_S = 2.5
MEMBERSHIP = Membership(Policy.REPLICA_3, (NODES,), {}, 1, 1)


def refused(space: Space, nodes: tuple[str, ...], *seconds: float) -> None:
    for now_s in seconds:
        for node in nodes:
            space.refused(node, now_s)
        space.look(MEMBERSHIP, now_s)


def test_set_whose_quorum_is_full_has_no_room_after_a_while_and_not_before() -> None:
    space = Space(FULL_FOR_S)
    refused(space, NODES[:2], 0.0, FULL_S)
    assert space.full(FULL_S) == set(NODES[:2])
    assert not space.without(FULL_S - 0.1)
    assert space.without(FULL_S) == {0}


def test_node_that_refused_nothing_for_a_while_has_room() -> None:
    space = Space(FULL_FOR_S)
    refused(space, NODES[:2], 0.0)
    space.look(MEMBERSHIP, FULL_FOR_S)
    assert not space.full(FULL_FOR_S)
    assert not space.without(FULL_FOR_S)


def test_full_node_that_can_be_left_behind_leaves_every_set_its_room() -> None:
    space = Space(FULL_FOR_S)
    refused(space, NODES[:1], *map(float, range(10)))
    assert not space.without(10.0)


def test_of_a_lost_node_it_is_not_known_whether_it_is_full() -> None:
    space = Space(FULL_FOR_S)
    refused(space, NODES[:2], 0.0)
    space.gone(NODES[0])
    assert space.full(0.0) == {NODES[1]}
