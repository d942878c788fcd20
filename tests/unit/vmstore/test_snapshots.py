"""Snapshots that a gateway is asked for: who else is there meanwhile, and how each one ends."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from etcd.images import ImageRecord
from etcd.memory import Fault
from shard.errors import HciError
from tests.unit.vmstore.gateway import GIB, WAIT_S, ScriptedGateway, scripted_gateway
from vmstore import orders
from vmstore.errors import BeingResized, RecordsLost, TooManyOrders
from vmstore.names import ImageName, parse_image_name
from vmstore.open_image import TakenSnapshot
from vmstore.snapshot_errors import (
    BeingSnapshotted,
    SnapshotExists,
    SnapshotFailed,
    TooManySnapshots,
)
from vmstore.stored import Stored


@pytest.fixture
def gateway() -> Iterator[ScriptedGateway]:
    with scripted_gateway() as started:
        yield started


def take(gateway: ScriptedGateway, name: str = "s") -> "Future[TakenSnapshot]":
    """Ask for a snapshot, as the control service does: from a thread that waits."""
    asked: Future[TakenSnapshot] = Future()

    def ask() -> None:
        try:
            asked.set_result(gateway.exports.take_snapshot(gateway.name, name, 1_800_000_000))
        except BaseException as error:  # noqa: BLE001 - it is the caller's
            asked.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    return asked


def freezing(gateway: ScriptedGateway, times: int = 1) -> tuple[int, int]:
    """The channel and attempt of a freeze that the engine was asked for."""
    gateway.until(lambda: len(gateway.engine.named("freeze")) == times, "nothing is frozen")
    (channel, attempt), _ = gateway.engine.named("freeze")[-1]
    return channel, attempt


def frozen(gateway: ScriptedGateway, times: int = 1, reconfigured: int = 0) -> int:
    """A snapshot that etcd has, and whose record is being stored; its channel."""
    channel, attempt = freezing(gateway, times)
    gateway.engine.emit("holding", channel=channel, attempt=attempt)
    gateway.engine.emit("frozen", channel=channel, attempt=attempt)
    wanted = reconfigured or times
    gateway.until(lambda: len(gateway.engine.named("reconfigure")) == wanted, "etcd is not asked")
    return channel


def stored(gateway: ScriptedGateway, channel: int) -> None:
    generation = gateway.engine.named("reconfigure")[-1][1]["generation"]
    gateway.engine.emit("stored", channel=channel, generation=generation)


def test_snapshot_of_an_open_image_is_taken_when_its_nodes_have_stored_it(
    gateway: ScriptedGateway,
) -> None:
    gateway.connect(1)
    assert gateway.answer(1)[0] == "export"
    asked = take(gateway)
    channel = frozen(gateway)
    values = gateway.engine.named("reconfigure")[-1][1]
    assert (values["layers"], values["digest"]) == ([2, 1], gateway.record.digest)
    assert values["body"] == gateway.record.encode()
    assert not asked.done()
    stored(gateway, channel)
    taken = asked.result(timeout=WAIT_S)
    (snapshot,) = gateway.record.snapshots
    assert taken.snapshot == snapshot
    assert (snapshot.name, snapshot.layer, snapshot.size_bytes) == ("s", 1, GIB)
    assert snapshot.created_s == 1_800_000_000
    assert not gateway.engine.named("thaw")
    assert gateway.open_images == 1


def test_closed_image_is_opened_for_its_snapshot_as_for_maintenance_and_closed(
    gateway: ScriptedGateway,
) -> None:
    asked = take(gateway)
    channel = frozen(gateway)
    lease = gateway.lease_of_image()
    assert lease is not None
    assert lease.maintenance
    stored(gateway, channel)
    asked.result(timeout=WAIT_S)
    gateway.until(lambda: gateway.open_images == 0, "the image stays open")
    assert gateway.lease_of_image() is None
    assert gateway.record.clean


def test_client_that_comes_during_a_snapshot_is_let_in_after_it(gateway: ScriptedGateway) -> None:
    # The claim would have changed the lease under the snapshot's transaction.
    asked = take(gateway)
    channel, attempt = freezing(gateway)
    gateway.connect(1)
    gateway.until(lambda: bool(gateway.exports.snapshot()[0].waiting), "the client does not wait")
    gateway.engine.emit("frozen", channel=channel, attempt=attempt)
    gateway.until(lambda: bool(gateway.engine.named("reconfigure")), "etcd is not asked")
    assert gateway.engine.answer_to(1) is None
    stored(gateway, channel)
    asked.result(timeout=WAIT_S)
    assert gateway.answer(1)[0] == "export"
    lease = gateway.lease_of_image()
    assert lease is not None
    assert not lease.maintenance


def test_second_snapshot_at_once_is_refused_and_the_first_ends_well(
    gateway: ScriptedGateway,
) -> None:
    first = take(gateway)
    freezing(gateway)
    with pytest.raises(BeingSnapshotted):
        take(gateway, "t").result(timeout=WAIT_S)
    stored(gateway, frozen(gateway))
    first.result(timeout=WAIT_S)


def test_orders_do_not_heap_up_while_etcd_is_slow(gateway: ScriptedGateway) -> None:
    """Each kept a call of its own waiting, until none was left for anything else."""
    going_on = threading.Event()
    find = gateway.catalog.find
    looks: list[ImageName] = []

    def slow(name: ImageName) -> Stored[ImageRecord]:
        looks.append(name)
        going_on.wait(WAIT_S)
        return find(name)

    gateway.catalog.find = slow  # type: ignore[method-assign]
    first = take(gateway)
    gateway.until(lambda: bool(looks), "etcd is not asked")
    with pytest.raises(BeingSnapshotted):
        take(gateway, "t").result(timeout=WAIT_S)
    gateway.catalog.find = find  # type: ignore[method-assign]
    going_on.set()
    stored(gateway, frozen(gateway))
    first.result(timeout=WAIT_S)
    assert len(looks) == 1


def test_size_does_not_change_while_a_snapshot_is_taken_nor_the_other_way(
    gateway: ScriptedGateway,
) -> None:
    asked = take(gateway)
    freezing(gateway)
    with pytest.raises(BeingSnapshotted):
        gateway.exports.resize(gateway.name, 2 * GIB, force=False)
    stored(gateway, frozen(gateway))
    asked.result(timeout=WAIT_S)
    gateway.until(lambda: gateway.open_images == 0, "the image stays open")
    resized = threading.Thread(
        target=lambda: gateway.exports.resize(gateway.name, GIB // 2, force=True)
    )
    resized.start()
    gateway.until(lambda: bool(gateway.engine.named("zero")), "nothing is discarded")
    with pytest.raises(BeingResized):
        take(gateway, "t").result(timeout=WAIT_S)
    (channel, _, _), _ = gateway.engine.named("zero")[0]
    gateway.engine.emit("zeroed", channel=channel, done=True)
    resized.join(WAIT_S)
    assert gateway.record.size_bytes == GIB // 2


def test_snapshot_of_a_name_that_is_there_is_refused_and_nothing_is_held_up(
    gateway: ScriptedGateway,
) -> None:
    gateway.connect(1)
    gateway.answer(1)
    asked = take(gateway)
    stored(gateway, frozen(gateway))
    asked.result(timeout=WAIT_S)
    with pytest.raises(SnapshotExists):
        take(gateway).result(timeout=WAIT_S)
    assert len(gateway.engine.named("freeze")) == 1


def test_snapshots_whose_names_fill_the_record_are_refused(gateway: ScriptedGateway) -> None:
    """Nodes would refuse the record when it is changed next, be it to leave a node behind."""
    gateway.connect(1)
    gateway.answer(1)

    def taken(number: int) -> None:
        asked = take(gateway, f"{number:03}" + "\U0001f600" * 63)
        freezes = gateway.engine.named
        gateway.until(lambda: asked.done() or len(freezes("freeze")) > number, "nothing happens")
        if not asked.done():
            stored(gateway, frozen(gateway, number + 1))
        asked.result(timeout=WAIT_S)

    def taken_until_refused() -> None:
        for number in range(257):
            taken(number)

    with pytest.raises(TooManySnapshots, match="no room for another one: shorter names"):
        taken_until_refused()
    assert 100 < len(gateway.record.snapshots) < 256
    assert gateway.failures == []


def test_freeze_that_fails_is_told_with_its_reason(gateway: ScriptedGateway) -> None:
    asked = take(gateway)
    for attempt in range(1, 20):
        if asked.done():
            break
        gateway.until(
            lambda: asked.done() or len(gateway.engine.named("freeze")) == attempt,  # noqa: B023
            "it is not tried again",
        )
        if not asked.done():
            channel, number = gateway.engine.named("freeze")[-1][0]
            gateway.engine.emit("holding", channel=channel, attempt=number)
            threading.Event().wait(0.8)
            gateway.engine.emit(
                "freeze_failed", channel=channel, attempt=number, why="nodes took too long"
            )
    with pytest.raises(SnapshotFailed, match="nodes took too long; try again"):
        asked.result(timeout=WAIT_S)
    assert gateway.record.snapshots == ()


def test_snapshot_that_etcd_cannot_be_asked_for_thaws_and_leaves_nothing(
    gateway: ScriptedGateway,
) -> None:
    gateway.connect(1)
    gateway.answer(1)
    asked = take(gateway)
    channel, attempt = freezing(gateway)
    gateway.etcd.fail_next(Fault.UNAVAILABLE)
    gateway.engine.emit("frozen", channel=channel, attempt=attempt)
    with pytest.raises(SnapshotFailed):
        asked.result(timeout=WAIT_S)
    assert gateway.engine.named("thaw") == [((channel, attempt), {})]
    assert gateway.record.snapshots == ()
    assert gateway.open_images == 1


def test_image_that_is_lost_meanwhile_tells_who_wanted_the_snapshot(
    gateway: ScriptedGateway,
) -> None:
    asked = take(gateway)
    channel, _ = freezing(gateway)
    gateway.give_to_another_gateway()
    gateway.engine.emit("fenced", channel=channel, node=0)
    with pytest.raises(SnapshotFailed, match="knows a later holder"):
        asked.result(timeout=WAIT_S)
    gateway.until(lambda: gateway.open_images == 0, "the image is not let go")


def test_image_that_another_gateway_has_is_refused_with_its_name(gateway: ScriptedGateway) -> None:
    gateway.catalog.take_lease(
        gateway.catalog.find(gateway.name),
        gateway="gateway2",
        holder="ef" * 16,
        etcd_lease=gateway.etcd.grant_lease(1000),
    )
    with pytest.raises(SnapshotFailed, match="in use on gateway gateway2"):
        take(gateway).result(timeout=WAIT_S)


def test_no_snapshot_is_begun_by_an_etcd_that_lost_history(gateway: ScriptedGateway) -> None:
    gateway.connect(1)
    gateway.answer(1)
    gateway.catalog.mark_lost("node1", "a test says so", None)
    with pytest.raises(RecordsLost):
        take(gateway).result(timeout=WAIT_S)
    assert not gateway.engine.named("freeze")


def test_gateway_that_stops_tells_who_waits_for_a_snapshot(gateway: ScriptedGateway) -> None:
    asked = take(gateway)
    freezing(gateway)
    gateway.stop()
    with pytest.raises(SnapshotFailed, match="being closed"):
        asked.result(timeout=WAIT_S)
    with pytest.raises(HciError, match="the gateway is stopping"):
        take(gateway, "t").result(timeout=WAIT_S)


def test_gateway_that_stops_while_etcd_is_asked_answers_who_waits(
    gateway: ScriptedGateway,
) -> None:
    """Its process waited for the caller as it ended, and that one for an answer: ten minutes."""
    going_on, asked_for = threading.Event(), threading.Event()
    find = gateway.catalog.find

    def slow(name: ImageName) -> Stored[ImageRecord]:
        asked_for.set()
        going_on.wait(WAIT_S)
        return find(name)

    gateway.catalog.find = slow  # type: ignore[method-assign]
    waiting = [take(gateway)]
    resized = threading.Thread(target=lambda: resize(gateway, waiting))
    resized.start()
    assert asked_for.wait(WAIT_S)
    threading.Timer(0.3, going_on.set).start()
    gateway.stop()
    resized.join(WAIT_S)
    assert len(waiting) == 2
    for order in waiting:
        with pytest.raises(HciError, match="the gateway is stopping"):
            order.result(timeout=WAIT_S)


def resize(gateway: ScriptedGateway, into: "list[Future[TakenSnapshot]]") -> None:
    answered: Future[TakenSnapshot] = Future()
    try:
        gateway.exports.resize(gateway.name, 2 * GIB, force=False)
    except HciError as error:
        answered.set_exception(error)
    into.append(answered)


def test_orders_leave_threads_for_other_commands(gateway: ScriptedGateway) -> None:
    """Eight snapshots that waited for levelling kept `hci status` from being answered."""
    names = [parse_image_name(f"vms/{number}") for number in range(orders.AT_ONCE)]
    asked = []
    for name in names:
        gateway.catalog.create_image(name, GIB)
        gateway.name = name
        asked.append(take(gateway))
    gateway.until(lambda: len(gateway.engine.named("freeze")) == len(names), "not all are begun")
    gateway.name = parse_image_name("vms/a")
    with pytest.raises(TooManyOrders):
        take(gateway).result(timeout=WAIT_S)


def test_name_of_a_snapshot_that_no_node_has_stored_is_free(gateway: ScriptedGateway) -> None:
    """etcd had it, its gateway died; the command said that it exists, and nothing settled that."""
    gateway.engine.known = {"epoch": 0, "holder": "ef" * 16, "generation": 1, "digest": b"",
                            "flush_number": 0, "peers": [], "dirty": 0,
                            "distrusted": False}  # fmt: skip
    held = gateway.catalog.take_lease(
        gateway.catalog.find(gateway.name),
        gateway="gateway2",
        holder="ef" * 16,
        etcd_lease=gateway.etcd.grant_lease(10),
    )
    held = gateway.catalog.change(held, held.record.with_snapshot("s", 0))
    gateway.catalog.release(held, clean=False)
    asked = take(gateway)
    channel = frozen(gateway, reconfigured=2)
    stored(gateway, channel)
    taken = asked.result(timeout=WAIT_S)
    assert gateway.record.snapshots == (taken.snapshot,)
    assert taken.snapshot.created_s == 1_800_000_000
    assert gateway.record.layer_ids == [3, 1]
