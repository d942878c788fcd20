"""The design's history about snapshots: it passes, and is noticed with its rules broken."""

from __future__ import annotations

from tests.sim.defects import planted_by_name
from tests.sim.oracle import Violation
from tests.sim.snapshots import Known
from tests.sim.stage import Stage, broken


def take(stage: Stage, gateway: int = 0) -> Known:
    """Have a snapshot begun, by the gateway that holds the image."""
    known = stage.cluster.snapshots.take(gateway)
    assert known is not None
    return known


def taken(stage: Stage, gateway: int = 0) -> Known:
    """Have a snapshot taken."""
    known = take(stage, gateway)
    stage.until(lambda: known.told is not None, "it is told what became of the snapshot")
    if known.told:
        raise Violation(known.told)
    return known


def read(stage: Stage, known: Known, gateway: int) -> str:
    """Have a snapshot read at a gateway, and judged; return why it was not."""
    reader = stage.cluster.snapshots.read(known.name, gateway)
    assert reader is not None
    stage.until(lambda: reader.over, "the snapshot is read")
    return reader.refused


def read_everywhere(stage: Stage, known: Known) -> None:
    """Have a snapshot read at all gateways, and compared on all nodes."""
    for gateway in range(stage.cluster.shape.gateways):
        refused = read(stage, known, gateway)
        if refused:
            raise Violation(refused)
    stage.cluster.safety.check()


def take_with_a_write_in_flight() -> None:
    """History 13: a write has come to some nodes as the layers change, and to others not yet.

    Each begins when another one of the same block is answered, so that one is always under way.
    """
    stage = Stage()
    stage.write(stage.at(1))
    stage.slow(0, 1, 20)
    for _ in range(8):
        stage.guest.write(stage.at(1), 8)
    stage.run(0.001)
    known = take(stage)
    stage.until(lambda: known.told is not None, "it is told what became of the snapshot")
    assert known.told == ""
    stage.answered()
    read_everywhere(stage, known)
    stage.write(stage.at(1))
    read_everywhere(stage, known)
    stage.settle()


def test_write_in_flight_is_in_a_snapshot_on_all_nodes() -> None:
    take_with_a_write_in_flight()


def test_snapshot_that_does_not_wait_for_writes_is_noticed() -> None:
    with broken("SnapshotsWaitForWrites", match="read as|differs"):
        take_with_a_write_in_flight()


def take_and_lose_all_power() -> None:
    """History 13: what nodes had not synced as etcd took the record is gone there."""
    stage = Stage(seed=2)
    stage.write(stage.at(1))

    def cut(_gateway: int, kind: str, _node: str) -> None:
        if kind == "frozen":
            stage.cut(0, 1, 2)

    stage.cluster.on_event = cut
    known = take(stage)
    stage.run(1.0)
    stage.start(0, 1, 2)
    stage.until(lambda: known.told is not None, "it is told what became of the snapshot")
    assert known.told == ""
    read_everywhere(stage, known)
    stage.settle()


def test_snapshot_is_durable_on_all_nodes() -> None:
    take_and_lose_all_power()


def test_snapshot_that_is_not_flushed_is_noticed() -> None:
    with broken("SnapshotsAreFlushed", match="read as"):
        take_and_lose_all_power()


def late_etcd(stage: Stage) -> Known:
    """etcd takes a snapshot's record, and the holder does not hear of it."""
    path = stage.cluster.gateway_paths[0]
    frozen: list[int] = []

    def cut(_gateway: int, kind: str, _node: str) -> None:
        if kind == "frozen":
            frozen.append(1)
            path.back = False

    stage.cluster.on_event = cut
    known = take(stage)
    stage.until(lambda: bool(frozen), "the image is frozen")
    stage.cluster.on_event = lambda _gateway, _kind, _node: None
    stage.until(lambda: _is_named(stage, known), "etcd has the record")
    return known


def _is_named(stage: Stage, known: Known) -> bool:
    record = stage.cluster.record
    return record is not None and record.snapshot(known.name) is not None


def take_while_etcd_is_late_and_lose_the_gateway() -> None:
    """History 13: clients went on without etcd's word, and what they wrote is below the new layer.

    The next holder finds a record that names a snapshot of it.
    """
    stage = Stage()
    stage.write(stage.at(1))
    known = late_etcd(stage)
    stage.guest.write(stage.at(1), 8)
    stage.run(2.0)
    assert known.told is not None and "etcd did not answer" in known.told
    # The write has waited no longer.
    stage.answered()
    stage.hold(0, 1)
    stage.guest.write(stage.at(1), 8)
    stage.run(0.05)
    stage.cluster.stop_gateway(0, host=False)
    stage.let_go(0, 1)
    stage.move_to(1)
    if _is_named(stage, known):
        # Whoever serves it now has all nodes in sync hold it.
        read_everywhere_but_at(stage, known, 1)
        raise Violation(f"{known.name} is there, and was said not to be taken")
    stage.settle()


def read_everywhere_but_at(stage: Stage, known: Known, gateway: int) -> None:
    """Have it read where it can be: the other gateway is gone."""
    refused = read(stage, known, gateway)
    if refused:
        raise Violation(refused)


def test_snapshot_that_nobody_has_stored_is_withdrawn_by_the_next_holder() -> None:
    take_while_etcd_is_late_and_lose_the_gateway()


def test_snapshot_that_nobody_has_stored_and_is_kept_is_noticed() -> None:
    kept = planted_by_name("snapshots that nobody stored go")
    with broken(patch=kept, match="read as|differs"):
        take_while_etcd_is_late_and_lose_the_gateway()


def store_in_one_set_and_lose_the_gateway() -> None:
    """History 13: one replica set has stored the new layer, and answers writes to it.

    The next holder hears the other set alone, which has not stored it.
    """
    stage = Stage(nodes=6, replica_sets=2, shards=6)
    cluster = stage.cluster
    record = cluster.record
    assert record is not None
    for shard in range(1, 6):
        stage.write(stage.at(shard))
    stored, deaf = 0, 1
    quiet = [cluster.names.index(name) for name in record.sets[deaf]]

    def cut(_gateway: int, kind: str, _node: str) -> None:
        if kind == "frozen":
            stage.hold(0, *quiet)

    cluster.on_event = cut
    known = take(stage)
    shard = next(s for s in range(1, 6) if cluster.set_of(s) == stored)
    stage.until(lambda: _is_named(stage, known), "etcd has the record")
    stage.write(stage.at(shard))
    cluster.stop_gateway(0, host=False)
    away = [cluster.names.index(name) for name in record.sets[stored]]
    stage.kill(*away)
    cluster.boot(1)
    stage.run(16.0)
    stage.start(*away)
    stage.settle()
    read_everywhere(stage, known)


def test_snapshot_that_one_set_has_stored_is_kept() -> None:
    store_in_one_set_and_lose_the_gateway()


def test_snapshot_that_one_set_has_stored_and_is_withdrawn_is_noticed() -> None:
    withdrawn = planted_by_name("each set says that a snapshot is not stored")
    with broken(patch=withdrawn, match="read as"):
        store_in_one_set_and_lose_the_gateway()


def test_snapshot_that_etcd_took_too_late_is_withdrawn_by_its_holder() -> None:
    stage = Stage()
    stage.write(stage.at(1))
    known = late_etcd(stage)
    stage.run(2.0)
    stage.write(stage.at(1))
    stage.cluster.gateway_paths[0].back = True
    stage.until(lambda: not _is_named(stage, known), "it is withdrawn")
    again = taken(stage)
    read_everywhere(stage, again)
    assert stage.cluster.record is not None
    assert stage.cluster.record.layer_ids == [3, 1]
    stage.settle()


def read_what_is_not_stored() -> None:
    """etcd names a snapshot, and its nodes still write to what it names."""
    stage = Stage()
    stage.write(stage.at(1))
    known = late_etcd(stage)
    stage.run(2.0)
    stage.write(stage.at(1))
    assert _is_named(stage, known)
    assert read(stage, known, 1), "it is refused"


def test_snapshot_that_no_node_has_stored_is_not_read() -> None:
    read_what_is_not_stored()


def test_reader_of_a_layer_that_is_written_is_noticed() -> None:
    with broken("ReadersReadFrozenLayers", match="read as"):
        read_what_is_not_stored()


def test_snapshot_is_read_while_its_image_is_written_healed_and_moves() -> None:
    stage = Stage()
    stage.write(stage.at(1))
    known = taken(stage)
    stage.kill(2)
    stage.write(stage.at(1))
    stage.await_stale(2)
    read_everywhere(stage, known)
    later = taken(stage)
    stage.write(stage.at(2))
    stage.start(2)
    stage.until(lambda: not stage.stale(), "the node is healed")
    stage.kill(0, 1)
    # It was away when the second one was taken, and has it from its heal.
    for each in (known, later):
        assert read(stage, each, 1) == ""
    stage.start(0, 1)
    stage.settle()


def test_node_lost_while_a_snapshot_is_taken_does_not_hold_clients_up() -> None:
    stage = Stage()
    stage.write(stage.at(1))

    def cut(_gateway: int, kind: str, _node: str) -> None:
        if kind == "frozen":
            stage.kill(1)

    stage.cluster.on_event = cut
    known = take(stage)
    stage.guest.write(stage.at(1), 8)
    stage.answered(limit_s=8.0)
    stage.until(lambda: known.told is not None, "it is told what became of the snapshot")
    assert known.told == ""
    stage.await_stale(1)
    stage.start(1)
    stage.settle()
    read_everywhere(stage, known)


def test_snapshot_of_a_pair_needs_no_arbiter_while_both_are_well() -> None:
    stage = Stage(nodes=2, arbiter=True)
    stage.write(stage.at(1))
    stage.cluster.site.keep_down(power=False)
    known = taken(stage)
    stage.cluster.site.start()
    stage.kill(1)
    stage.write(stage.at(1))
    stage.await_stale(1)
    read_everywhere(stage, known)
    stage.start(1)
    stage.settle()
    read_everywhere(stage, known)
