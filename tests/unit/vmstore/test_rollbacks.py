"""Rollbacks that a gateway is asked for: who else is there, and how each one ends."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace

import pytest

from etcd.images import ImageRecord
from etcd.memory import Fault
from shard.errors import HciError
from tests.unit.vmstore.gateway import GIB, WAIT_S, ScriptedGateway, scripted_gateway
from vmstore.errors import InUse, RecordsLost, UnknownSnapshot
from vmstore.open_image import RolledBack
from vmstore.served import Served
from vmstore.snapshot_errors import (
    BeingRolledBack,
    NewerSnapshots,
    RollbackFailed,
    RollbackUnknown,
)

LIVES = "1234:5678"


@pytest.fixture
def served() -> Served:
    return Served("a1" * 16, lives=lambda peer: peer == LIVES)


@pytest.fixture
def gateway(served: Served) -> Iterator[ScriptedGateway]:
    with scripted_gateway(served=served) as started:
        with_snapshots(started, "s")
        yield started


def with_snapshots(gateway: ScriptedGateway, *names: str) -> ImageRecord:
    """The image has these, and its nodes have stored that."""
    etcd_lease = gateway.etcd.grant_lease(10)
    held = gateway.catalog.take_lease(
        gateway.catalog.find(gateway.name),
        gateway="gateway2",
        holder="ef" * 16,
        etcd_lease=etcd_lease,
        maintenance=True,
    )
    for name in names:
        held = gateway.catalog.change(held, held.record.with_snapshot(name, 1_800_000_000))
    gateway.catalog.release(held, clean=True)
    gateway.engine.known = {
        "epoch": held.record.epoch,
        "holder": held.record.holder,
        "generation": held.record.generation,
        "digest": held.record.digest,
        "flush_number": 0,
        "peers": [],
        "dirty": 0,
        "distrusted": False,
    }
    return held.record


def roll_back(
    gateway: ScriptedGateway, name: str = "s", *, force: bool = False
) -> "Future[RolledBack]":
    """Ask for a rollback, as the control service does: from a thread that waits."""
    asked: Future[RolledBack] = Future()

    def ask() -> None:
        try:
            asked.set_result(gateway.exports.roll_back(gateway.name, name, force=force))
        except BaseException as error:  # noqa: BLE001 - it is the caller's
            asked.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    return asked


def freezing(gateway: ScriptedGateway) -> tuple[int, int]:
    """The channel and attempt of a freeze that the engine was asked for."""
    gateway.until(lambda: bool(gateway.engine.named("freeze")), "nothing is frozen")
    (channel, attempt), _ = gateway.engine.named("freeze")[-1]
    return channel, attempt


def frozen(gateway: ScriptedGateway) -> int:
    """A rollback that etcd has, and whose record is being stored; its channel."""
    channel, attempt = freezing(gateway)
    gateway.engine.emit("holding", channel=channel, attempt=attempt)
    gateway.engine.emit("frozen", channel=channel, attempt=attempt)
    gateway.until(lambda: bool(gateway.engine.named("reconfigure")), "etcd is not asked")
    return channel


def stored(gateway: ScriptedGateway, channel: int) -> None:
    generation = gateway.engine.named("reconfigure")[-1][1]["generation"]
    gateway.engine.emit("stored", channel=channel, generation=generation)


def test_closed_image_is_opened_as_for_a_client_rolled_back_and_closed(
    gateway: ScriptedGateway,
) -> None:
    with_snapshots(gateway, "t")
    asked = roll_back(gateway, force=True)
    channel = frozen(gateway)
    lease = gateway.lease_of_image()
    assert lease is not None
    # Else another gateway took it over, and a client's process that it served was let in again.
    assert not lease.maintenance
    assert gateway.record.used is None
    values = gateway.engine.named("reconfigure")[-1][1]
    assert (values["layers"], values["digest"]) == ([4, 1], gateway.record.digest)
    assert not asked.done()
    stored(gateway, channel)
    done = asked.result(timeout=WAIT_S)
    assert (done.snapshot.name, done.former_bytes) == ("s", GIB)
    assert [each.name for each in done.dropped] == ["t"]
    gateway.until(lambda: gateway.open_images == 0, "the image stays open")
    assert gateway.lease_of_image() is None
    assert gateway.record.clean
    assert [each.name for each in gateway.record.snapshots] == ["s"]


def test_size_is_that_of_the_snapshot_also_for_the_next_client(gateway: ScriptedGateway) -> None:
    gateway.exports.resize(gateway.name, 2 * GIB, force=False)
    gateway.until(lambda: gateway.open_images == 0, "the image stays open")
    gateway.engine.calls.clear()
    asked = roll_back(gateway)
    channel = frozen(gateway)
    stored(gateway, channel)
    assert asked.result(timeout=WAIT_S).former_bytes == 2 * GIB
    assert gateway.record.size_bytes == GIB
    (((resized, size_bytes, body), _),) = gateway.engine.named("resize")
    assert (resized, size_bytes) == (channel, GIB)
    assert body == gateway.engine.named("reconfigure")[-1][1]["body"]


def test_image_that_a_client_has_is_not_rolled_back(gateway: ScriptedGateway) -> None:
    gateway.connect(1)
    gateway.answer(1)
    with pytest.raises(InUse, match="in use on gateway gateway1"):
        roll_back(gateway).result(timeout=WAIT_S)
    assert not gateway.engine.named("freeze")
    assert gateway.open_images == 1


def test_image_whose_process_may_come_back_is_not_rolled_back(
    gateway: ScriptedGateway, served: Served
) -> None:
    """A gateway was restarted: its guest had lost its connection, and went on after the rollback
    with what it knew of the disk from before."""
    record = replace(gateway.record, used=None)
    served.admit(gateway.name, LIVES, record)
    with pytest.raises(InUse):
        roll_back(gateway).result(timeout=WAIT_S)
    served.left(record.id, LIVES)
    asked = roll_back(gateway)
    stored(gateway, frozen(gateway))
    asked.result(timeout=WAIT_S)


def test_client_that_comes_meanwhile_is_sent_away_and_let_in_after_it(
    gateway: ScriptedGateway,
) -> None:
    asked = roll_back(gateway)
    channel, attempt = freezing(gateway)
    gateway.connect(1)
    kind, (_, why) = gateway.answer(1)
    assert kind == "error"
    assert "is being rolled back" in why
    gateway.engine.emit("frozen", channel=channel, attempt=attempt)
    gateway.until(lambda: bool(gateway.engine.named("reconfigure")), "etcd is not asked")
    stored(gateway, channel)
    asked.result(timeout=WAIT_S)
    gateway.connect(2)
    assert gateway.answer(2)[0] == "export"


def test_newer_snapshots_are_named_and_go_only_if_that_is_forced(gateway: ScriptedGateway) -> None:
    with_snapshots(gateway, "t", "u")
    with pytest.raises(NewerSnapshots, match=r"with what they hold \(t, u\); use --force"):
        roll_back(gateway).result(timeout=WAIT_S)
    gateway.until(lambda: gateway.open_images == 0, "the image stays open")
    assert len(gateway.record.snapshots) == 3
    assert not gateway.engine.named("freeze")


def test_snapshot_that_is_not_there_is_refused(gateway: ScriptedGateway) -> None:
    with pytest.raises(UnknownSnapshot):
        roll_back(gateway, "none").result(timeout=WAIT_S)
    gateway.until(lambda: gateway.open_images == 0, "the image stays open")


def test_nothing_else_is_ordered_while_an_image_is_rolled_back(gateway: ScriptedGateway) -> None:
    asked = roll_back(gateway)
    freezing(gateway)
    with pytest.raises(BeingRolledBack):
        roll_back(gateway).result(timeout=WAIT_S)
    with pytest.raises(BeingRolledBack):
        gateway.exports.take_snapshot(gateway.name, "t", 0)
    with pytest.raises(BeingRolledBack):
        gateway.exports.resize(gateway.name, 2 * GIB, force=False)
    stored(gateway, frozen(gateway))
    asked.result(timeout=WAIT_S)


def test_rollback_that_etcd_cannot_be_asked_for_changes_nothing(gateway: ScriptedGateway) -> None:
    before = gateway.record
    asked = roll_back(gateway)
    channel, attempt = freezing(gateway)
    gateway.etcd.fail_next(Fault.UNAVAILABLE)
    gateway.engine.emit("frozen", channel=channel, attempt=attempt)
    with pytest.raises(RollbackFailed, match="nothing was rolled back to vms/a@s"):
        asked.result(timeout=WAIT_S)
    assert gateway.engine.named("thaw") == [((channel, attempt), {})]
    assert gateway.record.layers == before.layers


def test_image_that_is_lost_as_nodes_store_it_tells_that_it_is_not_known(
    gateway: ScriptedGateway,
) -> None:
    asked = roll_back(gateway)
    channel = frozen(gateway)
    gateway.give_to_another_gateway()
    gateway.engine.emit("fenced", channel=channel, node=0)
    with pytest.raises(RollbackUnknown, match="run the command again"):
        asked.result(timeout=WAIT_S)
    gateway.until(lambda: gateway.open_images == 0, "the image is not let go")


def test_image_that_another_gateway_has_is_refused_with_its_name(gateway: ScriptedGateway) -> None:
    gateway.catalog.take_lease(
        gateway.catalog.find(gateway.name),
        gateway="gateway2",
        holder="ef" * 16,
        etcd_lease=gateway.etcd.grant_lease(1000),
    )
    with pytest.raises(RollbackFailed, match="in use on gateway gateway2"):
        roll_back(gateway).result(timeout=WAIT_S)


def test_nothing_is_rolled_back_by_an_etcd_that_lost_history(gateway: ScriptedGateway) -> None:
    gateway.catalog.mark_lost("node1", "a test says so", None)
    with pytest.raises(RecordsLost):
        roll_back(gateway).result(timeout=WAIT_S)


def test_gateway_that_stops_tells_who_waits_for_a_rollback(gateway: ScriptedGateway) -> None:
    asked = roll_back(gateway)
    freezing(gateway)
    gateway.stop()
    with pytest.raises(RollbackFailed, match="being closed"):
        asked.result(timeout=WAIT_S)
    with pytest.raises(HciError, match="the gateway is stopping"):
        roll_back(gateway, "t").result(timeout=WAIT_S)
