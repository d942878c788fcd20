"""Rollbacks: what an image holds then, wherever one is struck, and what is left of what it held."""

from __future__ import annotations

import pytest

from tests.sim.guest import Life
from tests.sim.oracle import Violation
from tests.sim.rollbacks import Asked
from tests.sim.snapshots import Known
from tests.sim.stage import Stage, broken
from tests.sim.test_scenarios_of_snapshots import read, read_everywhere, taken


def ask(stage: Stage, known: Known, gateway: int = 0, *, force: bool = False) -> Asked:
    """Have a gateway asked to go back to a snapshot."""
    asked = stage.cluster.rollbacks.ask(known.name, gateway, force=force)
    assert asked is not None
    return asked


def told(stage: Stage, asked: Asked) -> str:
    """Wait for what is said of it; empty: it is done."""
    stage.until(lambda: asked.told is not None, "it is told what became of the rollback")
    assert asked.told is not None
    return asked.told


def gone_back(stage: Stage, known: Known, gateway: int = 0) -> None:
    """Have the image rolled back."""
    said = told(stage, ask(stage, known, gateway, force=True))
    if said:
        raise Violation(said)


def leave(stage: Stage, host: int = 0) -> None:
    """The guest of a host is switched off, and the image closed."""
    cluster = stage.cluster
    cluster.guests[host].stop()
    stage.until(lambda: bool(cluster.record and cluster.record.clean), "the image is closed")


def end(stage: Stage) -> None:
    """All is well again, and nothing is left of what was dropped."""
    stage.settle()
    stage.cluster.run_for(20.0, stage.cluster.rollbacks.all_dropped)
    stage.cluster.rollbacks.check_dropped()


def go_back_and_write_again() -> None:
    """An image is written, kept, written, rolled back, and written again."""
    stage = Stage(log_bytes=512 << 10)
    stage.write(stage.at(1))
    first = taken(stage)
    stage.write(stage.at(1))
    second = taken(stage)
    stage.write(stage.at(2))
    leave(stage)
    said = told(stage, ask(stage, first))
    assert f"newer snapshots would go with what they hold ({second.name})" in said
    gone_back(stage, first)
    assert read(stage, first, 1) == ""
    stage.serve(1)
    for shard in (1, 2):
        stage.read(stage.at(shard), host=1)
    stage.write(stage.at(1), host=1)
    stage.read(stage.at(1), host=1)
    end(stage)
    read_everywhere(stage, first)
    assert stage.cluster.record is not None
    assert stage.cluster.record.layer_ids == [4, 1]


def test_image_that_is_rolled_back_holds_what_its_snapshot_does() -> None:
    go_back_and_write_again()


def test_image_that_somebody_has_is_not_rolled_back() -> None:
    stage = Stage()
    stage.write(stage.at(1))
    first = taken(stage)
    stage.write(stage.at(1))
    assert "in use on gateway gate-0" in told(stage, ask(stage, first))
    assert "in use on gateway gate-0" in told(stage, ask(stage, first, 1))
    stage.read(stage.at(1))
    assert stage.guest.life is Life.RUNNING
    end(stage)


def go_back_while_a_node_is_away() -> None:
    """History 10: a node that was away has layers that were dropped, and blocks of those that stay
    that it has missed."""
    stage = Stage(log_bytes=512 << 10)
    for shard in (1, 2):
        stage.write(stage.at(shard))
    first = taken(stage)
    stage.write(stage.at(1))
    stage.flush()
    stage.kill(2)
    stage.write(stage.at(2))
    stage.await_stale(2)
    leave(stage)
    gone_back(stage, first)
    stage.serve(0)
    stage.write(stage.at(2, 1))
    stage.start(2)
    stage.until(lambda: not stage.stale(), "the node is healed")
    stage.kill(0)
    stage.await_stale(0)
    leave(stage)
    stage.serve(1)
    for shard in (1, 2):
        stage.read(stage.at(shard), host=1)
    end(stage)
    read_everywhere(stage, first)


def test_layer_that_was_dropped_does_not_come_back_with_a_node_that_was_away() -> None:
    go_back_while_a_node_is_away()


def test_dropped_layer_that_a_node_keeps_is_noticed() -> None:
    with broken("DroppedLayersGo", match="keeps layers|differs|read as"):
        go_back_while_a_node_is_away()


def test_gateway_that_dies_when_etcd_has_the_rollback_leaves_it_to_the_next_one() -> None:
    stage = Stage()
    stage.write(stage.at(1))
    first = taken(stage)
    stage.write(stage.at(1))
    leave(stage)
    path = stage.cluster.gateway_paths[0]

    def cut(_gateway: int, kind: str, _node: str) -> None:
        if kind == "frozen":
            path.back = False

    stage.cluster.on_event = cut
    ask(stage, first)
    stage.until(lambda: stage.cluster.rollbacks.made == 1, "etcd has the record")
    stage.cluster.stop_gateway(0, host=False)
    stage.cluster.on_event = lambda _gateway, _kind, _node: None
    stage.move_to(1)
    stage.read(stage.at(1), host=1)
    end(stage)


def test_gateway_that_dies_before_etcd_has_the_rollback_leaves_the_image_as_it_was() -> None:
    stage = Stage()
    stage.write(stage.at(1))
    first = taken(stage)
    stage.write(stage.at(1))
    leave(stage)

    def kill(gateway: int, kind: str, _node: str) -> None:
        if kind == "frozen":
            stage.cluster.gateway_paths[gateway].there = False
            stage.cluster.clock.after(0.1, lambda: stage.cluster.stop_gateway(0, host=False))

    stage.cluster.on_event = kill
    ask(stage, first)
    stage.until(lambda: stage.cluster.gateways[0] is None, "its gateway is dead")
    stage.cluster.on_event = lambda _gateway, _kind, _node: None
    stage.move_to(1)
    stage.read(stage.at(1), host=1)
    assert stage.cluster.rollbacks.made == 0
    end(stage)


def test_etcd_that_is_late_is_waited_for_and_guests_come_back_after_it() -> None:
    stage = Stage()
    stage.write(stage.at(1))
    first = taken(stage)
    stage.write(stage.at(1))
    leave(stage)
    path = stage.cluster.gateway_paths[0]

    def cut(_gateway: int, kind: str, _node: str) -> None:
        if kind == "frozen":
            path.back = False

    stage.cluster.on_event = cut
    asked = ask(stage, first)
    stage.until(lambda: stage.cluster.rollbacks.made == 1, "etcd has the record")
    stage.run(3.0)
    assert asked.told is None
    path.back = True
    assert told(stage, asked) == ""
    stage.serve(0)
    stage.read(stage.at(1))
    end(stage)


def test_guest_of_a_holder_that_stood_still_sees_nothing_of_a_rollback_and_ends() -> None:
    """It may hear what it asked before; what it asks then nobody answers from older layers."""
    stage = Stage()
    stage.write(stage.at(1))
    first = taken(stage)
    stage.write(stage.at(1))
    stage.cluster.pause_gateway(0)
    stage.run(12.0)
    gone_back(stage, first, 1)
    stage.cluster.continue_gateway(0)
    stage.guest.read(stage.at(1), 8)
    stage.until(lambda: stage.guest.life is Life.FAILED, "the guest is told")
    stage.serve(1)
    stage.read(stage.at(1), host=1)
    end(stage)


def test_node_lost_as_others_store_a_rollback_has_it_when_it_is_back() -> None:
    stage = Stage()
    stage.write(stage.at(1))
    first = taken(stage)
    stage.write(stage.at(1))
    leave(stage)

    def cut(_gateway: int, kind: str, _node: str) -> None:
        if kind == "frozen":
            stage.cut(2)

    stage.cluster.on_event = cut
    gone_back(stage, first)
    stage.cluster.on_event = lambda _gateway, _kind, _node: None
    stage.await_stale(2)
    stage.start(2)
    stage.serve(0)
    stage.until(lambda: not stage.stale(), "it is healed")
    stage.kill(0)
    stage.await_stale(0)
    stage.read(stage.at(1))
    end(stage)


@pytest.mark.parametrize("pause_s", [0.0, 0.0005, 0.002, 0.01])
def test_all_power_lost_as_an_image_is_rolled_back_leaves_one_or_the_other(pause_s: float) -> None:
    stage = Stage(seed=3)
    stage.write(stage.at(1))
    first = taken(stage)
    stage.write(stage.at(1))
    leave(stage)

    def cut(_gateway: int, kind: str, _node: str) -> None:
        if kind == "frozen":
            stage.cluster.clock.after(pause_s, lambda: stage.cut(0, 1, 2))

    stage.cluster.on_event = cut
    asked = ask(stage, first)
    stage.run(2.0)
    stage.cluster.on_event = lambda _gateway, _kind, _node: None
    stage.start(0, 1, 2)
    told(stage, asked)
    stage.serve(0)
    stage.read(stage.at(1))
    end(stage)
