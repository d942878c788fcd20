"""A node that keeps clients waiting: left behind where that is safe, healed when it has rested."""

from __future__ import annotations

from engine._engine import Simulation
from tests.sim.stage import Stage

SYNC_NS = 3_000_000_000
QUICK_NS = (100_000, 4_000_000)


def working(seed: int, **shape: object) -> Stage:
    """Return a stage with a guest that writes and flushes all the time."""
    stage = Stage(seed, **shape)
    stage.guest.busy, stage.guest.lazy, stage.guest.pause_s = True, False, 0.05
    return stage


def set_speed(world: Simulation, node: int, *, slow: bool) -> None:
    """Have each sync of a node's disk take seconds, or as long as those of others."""
    world.set_disk_speed(node, *((SYNC_NS, SYNC_NS) if slow else QUICK_NS))


def test_slow_disk_is_left_behind_and_healed_when_it_is_quick_again() -> None:
    stage = working(1)
    stage.run(1.0)
    set_speed(stage.cluster.world, 1, slow=True)
    stage.await_stale(1)
    before = stage.guest.answers
    stage.run(2.0)
    assert stage.guest.answers - before > 20, "nobody waits for it any more"
    # It is tried again, found to be slow, and rests for longer each time.
    stage.run(30.0)
    set_speed(stage.cluster.world, 1, slow=False)
    stage.until(lambda: not stage.stale(), "it is in sync again", 90.0)
    stage.guest.busy = False
    stage.settle()


def test_slow_disk_does_not_flap() -> None:
    stage = working(2)
    set_speed(stage.cluster.world, 1, slow=True)
    stage.await_stale(1)
    record = stage.cluster.record
    assert record is not None
    before = record.generation
    stage.run(100.0)
    record = stage.cluster.record
    assert record is not None
    changes = record.generation - before
    assert changes <= 8, f"{changes} changes of membership in 100 s: rests do not grow"
    stage.guest.busy = False
    stage.settle()


def test_slow_disk_at_the_quorum_is_waited_for() -> None:
    stage = working(3)
    stage.cluster.nodes.keep_down(2, power=False)
    stage.await_stale(2)
    set_speed(stage.cluster.world, 1, slow=True)
    stage.run(30.0)
    assert stage.stale() == {"node-2"}
    stage.guest.busy = False
    stage.settle()


def test_slow_node_of_a_pair_is_left_behind_by_the_arbiters_grant() -> None:
    stage = working(4, nodes=2, arbiter=True)
    set_speed(stage.cluster.world, 1, slow=True)
    stage.await_stale(1)
    set_speed(stage.cluster.world, 1, slow=False)
    stage.until(lambda: not stage.stale(), "it is in sync again", 90.0)
    stage.guest.busy = False
    stage.settle()
