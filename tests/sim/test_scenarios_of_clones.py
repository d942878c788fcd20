"""Clones: read through a parent that is whole, written apart from it, and never of what is gone."""

from __future__ import annotations

import pytest

from tests.sim.clones import Clone
from tests.sim.defects import planted_by_name
from tests.sim.oracle import Violation
from tests.sim.snapshots import Known
from tests.sim.stage import Stage, broken
from tests.sim.test_scenarios_of_removals import merged, remove
from tests.sim.test_scenarios_of_rollbacks import end, leave
from tests.sim.test_scenarios_of_snapshots import read_everywhere, taken


def cloned(stage: Stage, known: Known, gateway: int = 0) -> Clone:
    """Have a snapshot cloned."""
    clone = stage.cluster.clones.make(known, gateway)
    assert clone is not None
    stage.until(lambda: clone.told is not None, "it is told what became of the clone")
    if clone.told:
        raise Violation(clone.told)
    return clone


def use(stage: Stage, clone: Clone, gateway: int) -> str:
    """Have a clone read, written and read again at a gateway; return why it was not."""
    user = stage.cluster.clones.use(clone, gateway)
    assert user is not None
    stage.until(lambda: user.over, "the clone is used")
    stage.run(1.0)
    return user.refused


def use_everywhere(stage: Stage, clone: Clone) -> None:
    """Have it used at all gateways, each of which reads from the node of its host."""
    for gateway in range(stage.cluster.shape.gateways):
        refused = use(stage, clone, gateway)
        if refused:
            raise Violation(refused)
    stage.cluster.clones.check_all_replicas()


def test_clones_and_their_parent_are_written_apart_from_each_other() -> None:
    stage = Stage(gateways=3)
    stage.write(stage.at(1))
    known = taken(stage)
    first, second = cloned(stage, known), cloned(stage, known, 1)
    for clone in (first, second, first):
        use_everywhere(stage, clone)
        stage.write(stage.at(1))
        stage.read(stage.at(1))
    read_everywhere(stage, known)
    end(stage)


def test_clone_of_an_image_that_nobody_has_open_is_made_and_used() -> None:
    stage = Stage(gateways=3)
    stage.write(stage.at(1))
    known = taken(stage)
    leave(stage)
    use_everywhere(stage, cloned(stage, known, 2))


def test_snapshot_with_a_clone_is_not_removed_and_its_neighbours_are() -> None:
    stage = Stage(gateways=3, log_bytes=512 << 10)
    known = []
    for number in range(3):
        stage.write(stage.at(1))
        stage.write(stage.at(2, number))
        known.append(taken(stage))
    clone = cloned(stage, known[1])
    use_everywhere(stage, clone)
    removals = stage.cluster.removals
    assert removals.ask(known[1].name, 0)
    stage.until(lambda: known[1].name in removals.told, "it is told what became of the removal")
    assert "a clone begins" in removals.told[known[1].name]
    remove(stage, known[0])
    remove(stage, known[2])
    merged(stage)
    use_everywhere(stage, clone)
    read_everywhere(stage, known[1])
    end(stage)


def remove_what_has_a_clone() -> None:
    stage = Stage(gateways=3)
    stage.write(stage.at(1))
    known = taken(stage)
    cloned(stage, known)
    assert stage.cluster.removals.ask(known.name, 0)
    stage.run(2.0)


def test_removal_of_what_has_a_clone_is_noticed() -> None:
    patch = planted_by_name("what has clones stays")
    with broken(patch=patch, match="goes, and c1 begins on it"):
        remove_what_has_a_clone()


def test_etcd_that_loses_answers_leaves_a_clone_whole_or_none() -> None:
    stage = Stage(gateways=3)
    stage.write(stage.at(1))
    known = taken(stage)
    stage.cluster.gateway_paths[0].back = False
    clone = stage.cluster.clones.make(known, 0)
    assert clone is not None
    stage.run(3.0)
    stage.cluster.stop_gateway(0, host=False)
    stage.cluster.gateway_paths[0].back = True
    stage.cluster.start_gateway(0)
    stage.run(12.0)
    assert clone.image is None or not use(stage, clone, 1)
    second = cloned(stage, known)
    use_everywhere(stage, second)


def clone_with_a_parent_that_is_stale_on_a_node() -> None:
    """History 11: node-2 is being healed for the parent, and has its record, as the clone opens."""
    stage = Stage(gateways=3)
    stage.write(stage.at(1))
    stage.flush()
    stage.kill(2)
    stage.write(stage.at(1))
    stage.write(stage.at(2))
    stage.await_stale(2)
    known = taken(stage)
    clone = cloned(stage, known)
    # It stores the parent's record, and what it is to be given does not come.
    stage.part_nodes(2)
    stage.start(2)
    world, image = stage.cluster.world, stage.cluster.image

    def has_record() -> bool:
        found = world.node_record(2, image)
        record = stage.cluster.record
        return found is not None and record is not None and found[2] == record.generation

    stage.until(has_record, "node-2 has the parent's record")
    stage.hold(0, 2)
    assert stage.stale() == {"node-2"}
    use(stage, clone, 2)
    stage.let_go(0, 2)
    stage.start(2)
    stage.until(lambda: not stage.stale(), "node-2 is healed", 120.0)
    stage.until(stage.cluster.clones.all_level, "the clone is healed", 120.0)
    use_everywhere(stage, clone)
    end(stage)


def test_clone_is_not_read_through_a_parent_that_is_stale_there() -> None:
    clone_with_a_parent_that_is_stale_on_a_node()


def test_clone_that_is_read_through_a_stale_parent_is_noticed() -> None:
    patch = planted_by_name("ancestors are healed first")
    with broken(patch=patch, match="read as|differs"):
        clone_with_a_parent_that_is_stale_on_a_node()


def clone_with_a_disk_that_was_put_back(*, used_before: bool) -> None:
    """Nobody has the parent open, so that nobody knows that node-2 has lost it, as it is cloned."""
    stage = Stage(gateways=3)
    stage.cluster.world.snapshot_disk(2)
    for _ in range(2):
        stage.kill(2)
        stage.start(2)
        stage.until(stage.cluster.liveness.all_level, "the node is back")
        stage.write(stage.at(1))
        stage.flush()
    known = taken(stage)
    leave(stage)
    clone = cloned(stage, known)
    if used_before:
        assert use(stage, clone, 0) == ""
    stage.kill(2)
    # The etcd lease of its last run is over, or it might run elsewhere.
    stage.run(12.0)
    stage.cluster.nodes.put_back_disk(2)
    stage.start(2)
    stage.run(6.0)
    use(stage, clone, 2)
    stage.until(lambda: not stage.stale(), "the parent is whole", 120.0)
    stage.until(stage.cluster.clones.all_level, "the clone is whole", 120.0)
    use_everywhere(stage, clone)
    read_everywhere(stage, known)


@pytest.mark.parametrize("used_before", [False, True])
def test_clone_finds_that_its_parent_was_lost_and_both_are_healed(used_before: bool) -> None:
    clone_with_a_disk_that_was_put_back(used_before=used_before)


def test_clone_that_is_read_through_a_parent_that_was_lost_is_noticed() -> None:
    with broken("ParentIsWhole", match="read as|differs"):
        clone_with_a_disk_that_was_put_back(used_before=False)
