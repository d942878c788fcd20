"""Snapshots that clients read through a gateway: no lease, one channel for all, and how it ends."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.unit.vmstore.gateway import GIB, ScriptedGateway, scripted_gateway
from vmstore.exports import Permission, Visitor


@pytest.fixture
def gateway() -> Iterator[ScriptedGateway]:
    with scripted_gateway() as started:
        add_snapshot(started, "s")
        yield started


def add_snapshot(gateway: ScriptedGateway, name: str) -> None:
    """Another gateway has taken one, and made the image larger since."""
    catalog = gateway.catalog
    held = catalog.take_lease(
        catalog.find(gateway.name),
        gateway="gateway2",
        holder="ef" * 16,
        etcd_lease=gateway.etcd.grant_lease(1000),
    )
    held = catalog.change(held, held.record.with_snapshot(name, 0))
    catalog.release(catalog.resize(held, held.record.size_bytes + GIB), clean=True)


def ask(gateway: ScriptedGateway, client: int, name: str = "vms/a@s", query: str = "go") -> None:
    gateway.engine.emit("asked", client=client, query=query, name=name)


def opened(gateway: ScriptedGateway, times: int = 1) -> int:
    """The channel of the last reader that the engine was asked for."""
    calls = gateway.engine.named
    gateway.until(lambda: len(calls("open_reader")) == times, "no reader is opened")
    return int(calls("open_reader")[-1][0][0])


def test_snapshot_is_read_without_a_lease_by_all_clients_over_one_channel(
    gateway: ScriptedGateway,
) -> None:
    before = gateway.record
    ask(gateway, 1)
    channel = opened(gateway)
    (_, values) = gateway.engine.named("open_reader")[0]
    (snapshot,) = before.snapshots
    assert values["snapshot"] == (snapshot.layer, snapshot.generation)
    assert (values["image"], values["size_bytes"]) == (before.id, GIB)
    assert (values["nodes"], values["in_sync"]) == (list(before.sets[0]), [[0, 1, 2]])
    assert gateway.engine.answer_to(1) is None
    gateway.engine.emit("reader_open", channel=channel)
    assert gateway.answer(1) == ("export", channel)
    ask(gateway, 2)
    assert gateway.answer(2) == ("export", channel)
    answers = [values for _, values in gateway.engine.named("answer_export")]
    assert [(each["read_only"], each["size_bytes"]) for each in answers] == [(True, GIB)] * 2
    assert gateway.exports.snapshots_open() == 1
    for client in (1, 2):
        assert gateway.engine.named("close") == []
        gateway.leave(client)
    gateway.until(lambda: gateway.exports.snapshots_open() == 0, "it stays open")
    assert gateway.engine.named("forget") == [((channel,), {})]
    assert gateway.record == before
    assert gateway.lease_of_image() is None


def test_stale_node_is_not_asked(gateway: ScriptedGateway) -> None:
    held = gateway.catalog.take_lease(
        gateway.catalog.find(gateway.name),
        gateway="gateway2",
        holder="ef" * 16,
        etcd_lease=gateway.etcd.grant_lease(1000),
    )
    record = held.record
    stale = {0: {record.sets[0][1]: record.generation}}
    gateway.catalog.change(held, replace(record, generation=record.generation + 1, stale=stale))
    ask(gateway, 1)
    opened(gateway)
    assert gateway.engine.named("open_reader")[0][1]["in_sync"] == [[0, 2]]


def test_snapshot_beside_its_open_image_leaves_that_alone(gateway: ScriptedGateway) -> None:
    gateway.connect(1)
    assert gateway.answer(1)[0] == "export"
    ask(gateway, 2)
    channel = opened(gateway)
    gateway.engine.emit("reader_open", channel=channel)
    assert gateway.answer(2) == ("export", channel)
    gateway.leave(2)
    gateway.until(lambda: gateway.exports.snapshots_open() == 0, "it stays open")
    assert gateway.open_images == 1


def test_snapshot_that_no_node_gives_is_refused_with_the_reason(gateway: ScriptedGateway) -> None:
    ask(gateway, 1)
    channel = opened(gateway)
    gateway.engine.emit("reader_failed", channel=channel, why="no node of set 0 has it")
    kind, (code, why) = gateway.answer(1)
    assert (kind, code) == ("error", "refused")
    assert why == "vms/a@s cannot be read: no node of set 0 has it"
    assert gateway.engine.named("forget") == [((channel,), {})]
    ask(gateway, 2)
    assert opened(gateway, 2) != channel


def test_reader_that_ends_sends_its_clients_away(gateway: ScriptedGateway) -> None:
    ask(gateway, 1)
    channel = opened(gateway)
    gateway.engine.emit("reader_open", channel=channel)
    gateway.answer(1)
    gateway.engine.emit("reader_failed", channel=channel, why="the image was deleted")
    gateway.until(lambda: gateway.exports.snapshots_open() == 0, "it stays open")
    assert gateway.engine.named("disconnect") == [((channel,), {})]
    gateway.leave(1)
    ask(gateway, 2)
    opened(gateway, 2)


def test_client_that_comes_while_its_snapshot_is_closed_has_it_opened_anew(
    gateway: ScriptedGateway,
) -> None:
    gateway.engine.closes = False
    ask(gateway, 1)
    channel = opened(gateway)
    gateway.engine.emit("reader_open", channel=channel)
    gateway.answer(1)
    gateway.leave(1)
    gateway.until(lambda: bool(gateway.engine.named("close")), "it is not closed")
    ask(gateway, 2)
    ask(gateway, 3)
    gateway.leave(3)
    gateway.engine.emit("closed", channel=channel, clean=True)
    again = opened(gateway, 2)
    gateway.engine.emit("reader_open", channel=again)
    assert gateway.answer(2) == ("export", again)
    assert gateway.engine.answer_to(3) is None


def test_client_that_leaves_before_its_snapshot_is_open_closes_it(
    gateway: ScriptedGateway,
) -> None:
    ask(gateway, 1)
    opened(gateway)
    gateway.leave(1)
    gateway.until(lambda: gateway.exports.snapshots_open() == 0, "it stays open")


def test_client_that_only_looks_is_told_its_size_and_nothing_is_opened(
    gateway: ScriptedGateway,
) -> None:
    ask(gateway, 1, query="info")
    assert gateway.answer(1) == ("export", None)
    assert gateway.engine.named("answer_export")[0][1]["size_bytes"] == GIB
    assert not gateway.engine.named("open_reader")


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        ("vms/a@no", "unknown", "vms/a has no snapshot no"),
        ("vms/no@s", "unknown", "there is no image vms/no"),
        ("no/a@s", "unknown", "there is no pool no"),
        ("vms/a@a@b", "unknown", "has an '@'"),
        ("vms/a@", "unknown", "is empty"),
    ],
)
def test_snapshot_that_is_not_there_is_unknown(
    gateway: ScriptedGateway, name: str, code: str, says: str
) -> None:
    ask(gateway, 1, name)
    kind, (found, why) = gateway.answer(1)
    assert (kind, found) == ("error", code)
    assert says in why


def test_nothing_is_read_by_an_etcd_that_lost_history(gateway: ScriptedGateway) -> None:
    gateway.catalog.mark_lost("node1", "a test says so", None)
    ask(gateway, 1)
    kind, (_, why) = gateway.answer(1)
    assert kind == "error"
    assert "etcd lost history" in why


def test_gateway_that_stops_lets_its_readers_go(gateway: ScriptedGateway) -> None:
    ask(gateway, 1)
    channel = opened(gateway)
    gateway.engine.emit("reader_open", channel=channel)
    gateway.answer(1)
    gateway.stop()
    assert gateway.engine.named("disconnect")[0] == ((channel,), {})
    assert gateway.engine.named("close") == [((channel,), {})]


def test_who_may_not_read_an_image_may_not_read_its_snapshots() -> None:
    allowed = {"vms/a": Permission.READ}

    def permitted(_visitor: Visitor, name: str) -> Permission:
        return allowed.get(name, Permission.NONE)

    with scripted_gateway(permitted=permitted) as gateway:
        add_snapshot(gateway, "s")
        ask(gateway, 1)
        gateway.engine.emit("reader_open", channel=opened(gateway))
        assert gateway.answer(1)[0] == "export"
        allowed.clear()
        ask(gateway, 2)
        assert gateway.answer(2) == ("error", ("refused", "you may not open vms/a@s"))


def test_client_that_asks_for_contexts_is_told_of_older_snapshots_only(
    gateway: ScriptedGateway,
) -> None:
    add_snapshot(gateway, "t")
    first, second = gateway.record.snapshots

    def told(client: int, name: str) -> list[tuple[str, int, int]]:
        ask(gateway, client, name, "snapshots")
        calls = gateway.engine.named
        gateway.until(lambda: len(calls("answer_snapshots")) == client, "no answer")
        (asked_by, snapshots), _ = calls("answer_snapshots")[-1]
        assert asked_by == client
        return list(snapshots)

    of_first = ("s", first.layer, first.generation)
    assert told(1, "vms/a") == [of_first, ("t", second.layer, second.generation)]
    assert told(2, "vms/a@t") == [of_first]
    assert told(3, "vms/a@s") == []
    ask(gateway, 4, "vms/a@u", "snapshots")
    gateway.until(lambda: gateway.engine.answer_to(4) is not None, "no answer")
    assert gateway.engine.answer_to(4)[1][0] == "unknown"
    assert gateway.engine.named("open") == gateway.engine.named("open_reader") == []
