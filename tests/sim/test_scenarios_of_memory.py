"""Answered, unflushed writes whose last memory went, while their guest lives on: it must hear."""

from __future__ import annotations

from tests.sim.defects import breaking
from tests.sim.oracle import Violation
from tests.sim.stage import Stage

ALL = (0, 1, 2)


def unflushed(seed: int) -> Stage:
    """Return a stage on which a guest has written blocks that it has not flushed."""
    stage = Stage(seed)
    stage.write(stage.at(1))
    stage.flush()
    for block in range(6):
        stage.write(stage.at(1, block))
    return stage


def losses(stage: Stage) -> int:
    """Return how many flushes have failed."""
    return stage.cluster.oracle.losses_told


def power_of_all(seed: int) -> Stage:
    """All lose their power; the guest flushes, reads, and flushes again."""
    stage = unflushed(seed)
    stage.cut(*ALL)
    stage.start(*ALL)
    stage.flush()
    for block in range(6):
        stage.read(stage.at(1, block))
    stage.flush()
    return stage


def test_flush_fails_once_where_all_have_lost_their_power() -> None:
    for seed in range(4):
        stage = power_of_all(seed)
        assert losses(stage) == 1
        stage.settle()


def test_flush_that_succeeds_over_lost_writes_is_noticed() -> None:
    noticed = 0
    for seed in range(8):
        try:
            with breaking("LossIsTold"):
                power_of_all(seed)
        except Violation as violation:
            print(violation)
            noticed += 1
    assert noticed, "what chance leaves on a disk is lost at least once"


def test_killed_processes_and_one_node_with_power_lose_nothing() -> None:
    for stays in ALL:
        stage = unflushed(10 + stays)
        stage.cut(*(node for node in ALL if node != stays))
        stage.kill(stays)
        stage.start(*ALL)
        # Nobody asks for anything before they are back, so nobody is left behind.
        stage.run(5.0)
        stage.flush()
        assert losses(stage) == 0
        stage.settle()


def test_loss_is_told_when_the_one_that_remembers_is_left_behind() -> None:
    stage = unflushed(20)
    stage.cut(0, 1)
    stage.cluster.nodes.keep_down(2, power=False)
    stage.start(0, 1)
    stage.run(1.0)
    stage.flush()
    stage.await_stale(2)
    assert losses(stage) == 1
    stage.settle()
    assert losses(stage) == 1


def test_failed_sync_of_the_last_node_counts_as_lost_memory() -> None:
    stage = unflushed(30)
    stage.cut(1, 2)
    stage.run(0.1)
    stage.cluster.world.fail_sync(0, 0)
    stage.guest.flush()
    stage.run(2.0)
    stage.start(*ALL)
    stage.answered()
    assert losses(stage) == 1
    stage.settle()
