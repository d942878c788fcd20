"""Snapshots that are removed: what is left holds what it held, however far nodes have merged."""

from __future__ import annotations

import pytest

from tests.sim.oracle import Violation
from tests.sim.snapshots import Known
from tests.sim.stage import Stage, broken
from tests.sim.test_scenarios_of_rollbacks import end, gone_back, leave
from tests.sim.test_scenarios_of_snapshots import read, read_everywhere, taken


def remove(stage: Stage, known: Known, gateway: int = 0) -> None:
    """Have a snapshot removed."""
    removals = stage.cluster.removals
    assert removals.ask(known.name, gateway)
    stage.until(lambda: known.name in removals.told, "it is told what became of the removal")
    if removals.told[known.name]:
        raise Violation(removals.told[known.name])


def merged(stage: Stage) -> None:
    """Wait until all layers of removed snapshots are gone."""
    stage.until(stage.cluster.removals.all_merged, "all is merged", 120.0)
    stage.cluster.removals.check()


def three(stage: Stage) -> list[Known]:
    """Take three snapshots, with writes between them, over one another and beside."""
    known = []
    for number in range(3):
        stage.write(stage.at(1))
        stage.write(stage.at(2, number))
        known.append(taken(stage))
    stage.write(stage.at(1))
    return known


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_snapshots_removed_in_any_order_leave_the_others_as_they_were(
    order: tuple[int, ...],
) -> None:
    stage = Stage(log_bytes=512 << 10)
    known = three(stage)
    left = list(known)
    for index in order:
        remove(stage, known[index])
        left.remove(known[index])
        stage.write(stage.at(2, 4 + index))
        for each in left:
            read_everywhere(stage, each)
    merged(stage)
    for shard in (1, 2):
        stage.read(stage.at(shard))
    for each in left:
        read_everywhere(stage, each)
    assert stage.cluster.record is not None
    assert stage.cluster.record.layer_ids == [4]
    end(stage)


def test_layer_goes_from_an_image_that_nobody_has_open() -> None:
    stage = Stage()
    first = three(stage)[0]
    leave(stage)
    remove(stage, first, 1)
    merged(stage)
    stage.serve(0)
    stage.read(stage.at(1))
    end(stage)


def remove_while_a_node_is_away() -> None:
    """History 10: a node that was away has not merged, and has missed writes since."""
    stage = Stage(log_bytes=512 << 10)
    known = three(stage)
    stage.flush()
    stage.kill(2)
    stage.write(stage.at(1))
    stage.write(stage.at(2, 1))
    stage.await_stale(2)
    remove(stage, known[1])
    remove(stage, known[2])
    stage.run(5.0)
    assert not stage.cluster.removals.all_merged(), "its layers stay while a node has them"
    stage.start(2)
    stage.until(lambda: not stage.stale(), "the node is healed")
    merged(stage)
    stage.kill(0, 1)
    assert read(stage, known[0], 1) == ""
    stage.start(0, 1)
    for shard in (1, 2):
        stage.read(stage.at(shard))
    end(stage)
    read_everywhere(stage, known[0])


def test_layer_that_was_merged_does_not_come_back_with_a_node_that_was_away() -> None:
    remove_while_a_node_is_away()


def remove_with_blocks_that_were_written_since() -> None:
    """What a layer holds that was written again above it must not come up."""
    stage = Stage(log_bytes=512 << 10)
    known = three(stage)
    remove(stage, known[2])
    merged(stage)
    for shard in (1, 2):
        stage.read(stage.at(shard))
    read_everywhere(stage, known[1])
    end(stage)


def test_merge_leaves_what_was_written_since() -> None:
    remove_with_blocks_that_were_written_since()


def test_merge_that_overwrites_is_noticed() -> None:
    with broken("MergesFillGaps", match="read as|differs"):
        remove_with_blocks_that_were_written_since()


def test_end_of_a_merge_that_etcd_takes_too_late_is_put_back_and_guests_go_on() -> None:
    stage = Stage()
    known = three(stage)
    path = stage.cluster.gateway_paths[0]

    def cut(_gateway: int, kind: str, _node: str) -> None:
        if kind == "frozen":
            path.back = False

    stage.cluster.on_event = cut
    remove(stage, known[0])
    record = stage.cluster.record
    assert record is not None
    stage.until(lambda: stage.cluster.removals.merged == 1, "etcd has taken the layer out")
    stage.cluster.on_event = lambda _gateway, _kind, _node: None
    stage.guest.write(stage.at(1), 8)
    stage.run(2.0)
    stage.answered()
    path.back = True
    stage.until(lambda: not stage.cluster.removals.all_merged(), "the layer is put back")
    merged(stage)
    stage.read(stage.at(1))
    end(stage)


def test_gateway_that_dies_as_a_merge_ends_leaves_it_to_the_next_one() -> None:
    stage = Stage()
    known = three(stage)

    def kill(_gateway: int, kind: str, _node: str) -> None:
        if kind == "frozen":
            stage.cluster.clock.after(0.002, lambda: stage.cluster.stop_gateway(0, host=False))

    stage.cluster.on_event = kill
    remove(stage, known[2])
    stage.until(lambda: stage.cluster.gateways[0] is None, "its gateway is dead")
    stage.cluster.on_event = lambda _gateway, _kind, _node: None
    stage.move_to(1)
    merged(stage)
    stage.read(stage.at(1), host=1)
    end(stage)


@pytest.mark.parametrize("target", [0, 1])
def test_image_goes_back_past_layers_that_are_not_merged_yet(target: int) -> None:
    stage = Stage(log_bytes=512 << 10)
    known = three(stage)
    stage.kill(2)
    stage.await_stale(2)
    remove(stage, known[1 - target])
    remove(stage, known[2])
    leave(stage)
    gone_back(stage, known[target])
    stage.serve(0)
    for shard in (1, 2):
        stage.read(stage.at(shard))
    stage.start(2)
    stage.until(lambda: not stage.stale(), "the node is healed")
    merged(stage)
    read_everywhere(stage, known[target])
    end(stage)
