"""Snapshots that a gateway is asked to remove: how each order ends, and what follows by itself."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from etcd.memory import Fault
from shard.errors import HciError
from tests.unit.samples import NODES
from tests.unit.vmstore.gateway import GIB, WAIT_S, ScriptedGateway, scripted_gateway
from tests.unit.vmstore.test_rollbacks import frozen, stored, with_snapshots
from vmstore.errors import RecordsLost, UnknownSnapshot
from vmstore.snapshot_errors import BeingRemoved, RemovalFailed


@pytest.fixture
def gateway() -> Iterator[ScriptedGateway]:
    with scripted_gateway() as started:
        with_snapshots(started, "s", "t")
        yield started


def remove(gateway: ScriptedGateway, name: str = "s") -> "Future[int]":
    """Ask for a removal, as the control service does: from a thread that waits."""
    asked: Future[int] = Future()

    def ask() -> None:
        try:
            asked.set_result(gateway.exports.remove_snapshot(gateway.name, name))
        except BaseException as error:  # noqa: BLE001 - it is the caller's
            asked.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    return asked


def test_snapshot_of_an_open_image_is_removed_and_nobody_waits(gateway: ScriptedGateway) -> None:
    gateway.connect(1)
    assert gateway.answer(1)[0] == "export"
    assert remove(gateway).result(timeout=WAIT_S) == 1
    values = gateway.engine.named("reconfigure")[-1][1]
    assert (values["layers"], values["merging"]) == ([3, 2, 1], [1])
    assert [each.name for each in gateway.record.snapshots] == ["t"]
    assert not gateway.engine.named("freeze")
    assert gateway.open_images == 1


def test_closed_image_is_opened_for_a_removal_and_closed(gateway: ScriptedGateway) -> None:
    assert remove(gateway, "t").result(timeout=WAIT_S) == 2
    gateway.until(lambda: gateway.open_images == 0, "the image stays open")
    assert gateway.lease_of_image() is None
    assert (gateway.record.clean, gateway.record.merging) == (True, (2,))


def test_layer_goes_when_all_nodes_say_that_they_have_merged_it(gateway: ScriptedGateway) -> None:
    gateway.connect(1)
    gateway.answer(1)
    remove(gateway).result(timeout=WAIT_S)
    gateway.until(lambda: bool(gateway.engine.named("ask_emptied")), "nobody is asked")
    ((channel,), _) = gateway.engine.named("ask_emptied")[0]
    generation = gateway.record.generation
    gateway.engine.emit("stored", channel=channel, generation=generation)
    for node in range(len(NODES)):
        gateway.engine.emit("emptied", channel=channel, node=node, layers=[1])
    gateway.engine.calls.clear()
    stored(gateway, frozen(gateway))
    assert (gateway.record.layer_ids, gateway.record.merging) == ([3, 2], ())
    assert gateway.open_images == 1


def test_snapshot_that_is_not_there_is_not_removed(gateway: ScriptedGateway) -> None:
    with pytest.raises(UnknownSnapshot):
        remove(gateway, "none").result(timeout=WAIT_S)
    gateway.until(lambda: gateway.open_images == 0, "the image stays open")


def test_nothing_else_is_ordered_while_a_snapshot_is_removed(gateway: ScriptedGateway) -> None:
    gateway.connect(1)
    gateway.answer(1)
    change, going_on = gateway.catalog.change, threading.Event()

    def slow(*arguments: object, **values: object) -> object:
        going_on.wait(WAIT_S)
        return change(*arguments, **values)  # type: ignore[arg-type]

    gateway.catalog.change = slow  # type: ignore[method-assign, assignment]
    asked = remove(gateway)
    gateway.until(lambda: gateway.exports.snapshot()[0].removal is not None, "nothing happens")
    with pytest.raises(BeingRemoved, match="vms/a@s is being removed"):
        gateway.exports.resize(gateway.name, 2 * GIB, force=False)
    with pytest.raises(BeingRemoved):
        remove(gateway, "t").result(timeout=WAIT_S)
    going_on.set()
    asked.result(timeout=WAIT_S)


def test_removal_that_etcd_cannot_be_asked_for_changes_nothing(gateway: ScriptedGateway) -> None:
    gateway.connect(1)
    gateway.answer(1)
    before = gateway.record
    change = gateway.catalog.change

    def failing(*arguments: object, **values: object) -> object:
        gateway.catalog.change = change  # type: ignore[method-assign]
        gateway.etcd.fail_next(Fault.UNAVAILABLE)
        return change(*arguments, **values)  # type: ignore[arg-type]

    gateway.catalog.change = failing  # type: ignore[method-assign, assignment]
    with pytest.raises(RemovalFailed, match="vms/a@s is not removed"):
        remove(gateway).result(timeout=WAIT_S)
    assert gateway.record == before
    assert gateway.open_images == 1


def test_nothing_is_removed_by_an_etcd_that_lost_history(gateway: ScriptedGateway) -> None:
    gateway.catalog.mark_lost("node1", "a test says so", None)
    with pytest.raises(RecordsLost):
        remove(gateway).result(timeout=WAIT_S)


def test_gateway_that_stops_removes_nothing_more(gateway: ScriptedGateway) -> None:
    gateway.stop()
    with pytest.raises(HciError, match="the gateway is stopping"):
        remove(gateway).result(timeout=WAIT_S)
