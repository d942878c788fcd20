"""`Exports`: who is let in, with an etcd in memory and an engine that the test speaks for."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from etcd import keys
from etcd.errors import EtcdUnavailable, LeaseNotFound
from etcd.interface import Delete
from etcd.memory import Fault
from etcd.records import ImageRecord, PoolRecord
from shard.membership import WhenFull
from tests.unit.vmstore.gateway import ScriptedGateway, scripted_gateway
from vmstore import exports, serving
from vmstore import holder as holder_rules
from vmstore.errors import ClientBarred, LeaseMoved
from vmstore.holder import Phase
from vmstore.holding import Held
from vmstore.names import ImageName
from vmstore.served import Served
from vmstore.serving import RELEASE_RETRY_S
from vmstore.stored import Stored

GUEST, OTHER = "10:111", "20:222"


@pytest.fixture
def gateway() -> Iterator[ScriptedGateway]:
    served = Served("a1" * 16, lives=lambda _peer: True)
    with scripted_gateway(served=served) as started:
        yield started


def test_guest_of_a_lost_image_is_not_let_in_again(gateway: ScriptedGateway) -> None:
    # A gateway that was stopped past its lease went on: it killed the image that another one had
    # taken and closed, the client reconnected, the image was opened anew for it, and what it had
    # been given no answer to was written over the other guest's data.
    gateway.connect(1, GUEST)
    assert gateway.answer(1)[0] == "export"
    channel = gateway.answer(1)[1]
    theirs = gateway.give_to_another_gateway()
    gateway.engine.emit("fenced", channel=channel, node=0)
    gateway.until(lambda: gateway.open_images == 0, "the image is not let go")
    gateway.leave(1)
    gateway.connect(2, GUEST)
    kind, (code, why) = gateway.answer(2)
    assert (kind, code) == ("error", "refused")
    assert "end this process" in why
    assert gateway.record == theirs, "nothing was opened for it"
    gateway.connect(3, OTHER)
    assert gateway.answer(3)[0] == "export"
    gateway.connect(4, GUEST)
    assert gateway.answer(4)[0] == "error", "nor while the image is open"


def test_client_that_left_by_itself_comes_back_after_another_gateway(
    gateway: ScriptedGateway,
) -> None:
    gateway.connect(1, GUEST)
    assert gateway.answer(1)[0] == "export"
    gateway.leave(1)
    gateway.until(lambda: gateway.open_images == 0, "the image is not closed")
    gateway.give_to_another_gateway()
    gateway.connect(2, GUEST)
    assert gateway.answer(2)[0] == "export"


def test_guest_that_a_stop_sent_away_is_remembered(tmp_path: Path) -> None:
    # Its unanswered requests come with it, to a successor that must know what happened meanwhile.
    def served(holder: str) -> Served:
        return Served(holder, path=tmp_path / "served.json", lives=lambda _peer: True)

    with scripted_gateway(served=served("a1" * 16)) as gateway:
        gateway.connect(1, GUEST)
        assert gateway.answer(1)[0] == "export"
        gateway.stop()
        gateway.leave(1)
        held = gateway.record
    successor = served("a2" * 16)
    successor.check(gateway.name, GUEST, held)
    with pytest.raises(ClientBarred):
        successor.check(gateway.name, GUEST, replace(held, epoch=2, holder="ef" * 16))


def test_client_of_an_image_that_cannot_be_closed_hears_why(
    gateway: ScriptedGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two nodes were down, the last client left with writes that were not flushed, and the next
    # client waited without a word until its own patience ended.
    monkeypatch.setattr(exports, "OPEN_LIMIT_S", 0.3)
    gateway.engine.closes = False
    gateway.connect(1)
    channel = gateway.answer(1)[1]
    gateway.leave(1)
    gateway.until(
        lambda: gateway.exports.snapshot()[0].holder.phase is Phase.CLOSING, "it does not close"
    )
    for index in (0, 1):
        gateway.engine.emit("replica_down", channel=channel, node=index, blocking=True)
    gateway.connect(2)
    kind, (code, why) = gateway.answer(2)
    assert (kind, code) == ("error", "refused")
    assert "is being closed" in why
    assert gateway.exports.snapshot()[0].holder.stalled_by()[0] in why
    # Once it is closed the next one is let in.
    gateway.engine.emit("closed", channel=channel, clean=False)
    gateway.until(lambda: gateway.open_images == 0, "it does not close")
    gateway.connect(3)
    assert gateway.answer(3)[0] == "export"


def test_writes_are_refused_while_disks_are_full_and_the_pool_says_so(
    gateway: ScriptedGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holder_rules, "FULL_S", 0.2)
    monkeypatch.setattr(serving, "FULL_ASK_S", 0.1)
    refused = lambda: gateway.engine.named("refuse_writes")  # noqa: E731
    gateway.connect(1)
    channel = gateway.answer(1)[1]
    asked: list[str] = []
    original = gateway.catalog.pool

    def pool(name: str) -> Stored[PoolRecord]:
        asked.append(name)
        return original(name)

    gateway.catalog.pool = pool  # type: ignore[method-assign]

    def fill_until(holds: Callable[[], bool], what: str) -> None:
        def filled() -> bool:
            for node in range(3):
                gateway.engine.emit("replica_failed", channel=channel, node=node, status="NoSpace")
            return holds()

        gateway.until(filled, what)

    fill_until(lambda: len(asked) > 2, "the pool is not asked")
    assert refused() == []
    gateway.catalog.set_when_full("vms", WhenFull.ENOSPC)
    fill_until(lambda: len(refused()) == 1, "an open image does not follow")
    assert refused()[0] == ((channel, [0]), {})
    gateway.until(lambda: len(refused()) == 2, "room is not noticed")
    assert refused()[1] == ((channel, []), {})


def test_change_that_met_a_lease_taken_again_is_asked_for_anew(gateway: ScriptedGateway) -> None:
    # The session ended while etcd was out of reach and a write waited for a lost node. The lease
    # was taken again, and the change, made under the former one, was refused: its guest was told
    # that the image is another's, and barred.
    gateway.connect(1)
    channel = gateway.answer(1)[1]
    original = gateway.catalog.change_membership
    asked: list[Held] = []

    def change(held: Held, *given: object, **named: object) -> Held:
        asked.append(held)
        if len(asked) == 1:
            raise LeaseMoved(held.record.id)
        return original(held, *given, **named)  # type: ignore[arg-type]

    gateway.catalog.change_membership = change  # type: ignore[method-assign]
    gateway.engine.emit("replica_down", channel=channel, node=0, blocking=True)
    gateway.until(lambda: len(gateway.engine.named("reconfigure")) == 1, "the change is not made")
    assert len(asked) == 2
    assert gateway.open_images == 1
    assert gateway.engine.named("kill") == []


def test_deadline_moves_on_only_where_the_lease_was_taken_again(gateway: ScriptedGateway) -> None:
    # The session's end ended the image's lease. A new session was renewed, and its deadline was
    # told for the image too, whose own lease nobody had taken again: it answered reads that
    # another gateway's writes might have passed.
    gateway.connect(1)
    channel = gateway.answer(1)[1]
    refused = threading.Event()
    original = gateway.catalog.retake_lease

    def retake(held: Held, etcd_lease: int) -> Held:
        if not refused.is_set():
            refused.set()
            raise EtcdUnavailable(("e:1",), "a test")
        gateway.until(may_retake.is_set, "it may never be taken again")
        return original(held, etcd_lease)

    may_retake = threading.Event()
    gateway.catalog.retake_lease = retake  # type: ignore[method-assign]
    gateway.etcd.advance(11)
    with pytest.raises(LeaseNotFound):
        gateway.sessions[0].renew()
    gateway.until(refused.is_set, "the lease is not asked for again")
    told = len(gateway.engine.named("set_lease_deadline"))
    assert gateway.sessions[1].renew()
    gateway.connect(2)
    assert gateway.answer(2)[0] == "export", "what the renewal brought is decided"
    assert len(gateway.engine.named("set_lease_deadline")) == told
    may_retake.set()
    gateway.until(
        lambda: len(gateway.engine.named("set_lease_deadline")) > told, "no deadline is told"
    )
    (told_channel, deadline_ns), _ = gateway.engine.named("set_lease_deadline")[-1]
    assert told_channel == channel
    assert deadline_ns == int(gateway.sessions[1].deadline_s * 1e9)


def lapse(gateway: ScriptedGateway) -> None:
    """The gateway stood still for longer than its lease."""
    gateway.etcd.advance(11)


def go_on(gateway: ScriptedGateway) -> None:
    with pytest.raises(LeaseNotFound):
        gateway.sessions[0].renew()


def test_image_that_was_deleted_while_its_gateway_stood_still_is_no_lost_history(
    gateway: ScriptedGateway,
) -> None:
    # A host hung, its image was deleted, and the nodes had all confirmed that, so the tombstone was
    # gone. When the host went on, its gateway had the whole cluster marked as having lost history,
    # a moment before a node could tell it of the delete.
    gateway.catalog.init_cluster("c" * 32)
    gateway.connect(1)
    channel = gateway.answer(1)[1]
    lapse(gateway)
    image = gateway.record.id
    for member in gateway.catalog.delete_image(gateway.name).awaits or ():
        gateway.catalog.confirm_deleted(image, member)
    assert gateway.catalog.tombstones() == {}
    go_on(gateway)
    held = gateway.exports.snapshot()[0]
    gateway.until(lambda: bool(held.holder.trouble), "it has not asked for its lease")
    gateway.connect(2)
    assert gateway.answer(2)[0] == "error", "what came of it is decided"
    assert gateway.catalog.lost() is None
    gateway.engine.emit("fenced", channel=channel, node=0)
    gateway.until(lambda: gateway.open_images == 0, "the image is not let go")


@pytest.mark.parametrize("wiped", [False, True])
def test_gateway_says_that_etcd_is_behind_what_it_holds(
    gateway: ScriptedGateway, wiped: bool
) -> None:
    gateway.catalog.init_cluster("c" * 32)
    before = gateway.etcd.backup()
    gateway.connect(1)
    assert gateway.answer(1)[0] == "export"
    gateway.etcd.restore(before)
    lapse(gateway)
    if wiped:
        found = gateway.etcd.get_prefix(keys.PREFIX).items
        gateway.etcd.transaction([], [Delete(item.key) for item in found])
    go_on(gateway)
    gateway.until(lambda: gateway.catalog.lost() is not None, "it does not say so")
    assert gateway.open_images == 1, "it is served as it is"
    gateway.etcd.transaction([], [Delete(keys.LOST)])


@pytest.mark.parametrize(
    ("lock", "taken_over"),
    [("boot1:8:17", True), (None, True), ("boot1:8:18", False), ("boot2:8:17", False)],
)
def test_lease_of_the_same_name_is_taken_over_only_under_the_same_lock(
    lock: str | None, taken_over: bool
) -> None:
    # Two hosts had been given the same name for their gateways, and each took the other's leases
    # for those of its own dead predecessor: two holders threw each other out for ever.
    with scripted_gateway(lock="boot1:8:17") as gateway:
        gateway.leave_lease(lock=lock)
        gateway.connect(1)
        kind, told = gateway.answer(1)
        assert kind == ("export" if taken_over else "error")
        lease = gateway.lease_of_image()
        assert lease is not None
        assert (lease.holder == gateway.holder) is taken_over
        if not taken_over:
            assert "in use on gateway gateway1 (another one of this name" in told[1]
        else:
            assert lease.lock == "boot1:8:17"


def test_guest_comes_back_to_an_image_that_was_healed_elsewhere_meanwhile(tmp_path: Path) -> None:
    served = Served("a1" * 16, path=tmp_path / "served.json", lives=lambda _peer: True)
    with scripted_gateway(served=served) as gateway:
        gateway.connect(1, GUEST)
        assert gateway.answer(1)[0] == "export"
        image = gateway.exports.snapshot()[0]
        # Our process dies here: what follows is another one's, with the same file.
        gateway.stop()
        healed = gateway.give_to_another_gateway(maintenance=True)
    assert healed.last_use is not None
    assert (healed.epoch, healed.last_use.epoch) == (2, 1)
    assert image.image == healed.id
    successor = Served("a2" * 16, path=tmp_path / "served.json", lives=lambda _peer: True)
    successor.check(gateway.name, GUEST, healed)


def test_image_that_is_claimed_from_maintenance_is_known_as_used(gateway: ScriptedGateway) -> None:
    gateway.exports.maintain(gateway.name)
    gateway.until(lambda: gateway.record.epoch == 1, "it is not opened")
    gateway.connect(1, GUEST)
    assert gateway.answer(1)[0] == "export"
    assert gateway.record.used is None
    lease = gateway.lease_of_image()
    assert lease is not None
    assert not lease.maintenance


def test_claim_whose_outcome_stayed_unknown_costs_no_client_its_image(
    gateway: ScriptedGateway,
) -> None:
    # etcd had the claimed lease and nobody heard it. A change that followed under the former one
    # was refused as that of a gateway which has lost the image, to itself.
    gateway.exports.maintain(gateway.name, scrub=True)
    gateway.until(lambda: bool(gateway.exports.serving()), "it is not opened")
    channel = gateway.exports.snapshot()[0].channel
    gateway.etcd.fail_next(Fault.ANSWER_LOST, *[Fault.REQUEST_LOST] * 3)
    gateway.connect(1)

    def is_claimed() -> bool:
        lease = gateway.lease_of_image()
        return lease is not None and not lease.maintenance

    gateway.until(is_claimed, "etcd has not taken it")
    gateway.engine.emit("replica_down", channel=channel, node=0, blocking=True)
    assert gateway.answer(1) == ("export", channel)
    gateway.until(lambda: bool(gateway.engine.named("reconfigure")), "the change is not made")
    assert gateway.engine.named("kill") == []


def test_client_is_let_in_when_etcd_is_back(gateway: ScriptedGateway) -> None:
    # A guest that was started while etcd elected a leader was refused.
    gateway.etcd.fail_next(*[Fault.UNAVAILABLE] * 3)
    gateway.connect(1)
    assert gateway.answer(1)[0] == "export"


def test_client_is_let_in_when_the_gateways_etcd_lease_is_a_new_one(
    gateway: ScriptedGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A gateway that had been cut off from etcd refused everybody until it had a new lease.
    take, refusals = gateway.catalog.take_lease, [LeaseNotFound(1)] * 2

    def take_lease(*given: Any, **named: Any) -> Held:
        if refusals:
            raise refusals.pop()
        return take(*given, **named)

    monkeypatch.setattr(gateway.catalog, "take_lease", take_lease)
    gateway.connect(1)
    assert gateway.answer(1)[0] == "export"


def test_client_is_refused_where_etcd_stays_away(
    gateway: ScriptedGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exports, "OPEN_LIMIT_S", 1.0)

    def find(_name: ImageName) -> Stored[ImageRecord]:
        raise EtcdUnavailable(("etcd1",), "no connection")

    monkeypatch.setattr(gateway.catalog, "find", find)
    gateway.connect(1)
    kind, (code, why) = gateway.answer(1)
    assert (kind, code) == ("error", "unavailable")
    assert "check that its members run" in why


def test_lease_that_was_taken_unheard_is_given_back(gateway: ScriptedGateway) -> None:
    # The client was refused and its guest started on another host, where the image was in use: by
    # a gateway that did not know of it, for as long as that ran.
    gateway.etcd.fail_next(Fault.ANSWER_LOST, *[Fault.REQUEST_LOST] * 3)
    gateway.connect(1)
    assert gateway.answer(1)[0] == "error"
    assert gateway.lease_of_image() is not None
    gateway.leave(1)
    gateway.until(lambda: gateway.lease_of_image() is None, "it is not given back")
    gateway.connect(2)
    assert gateway.answer(2)[0] == "export"


def test_lease_that_was_taken_unheard_is_kept_where_it_was_asked_for_again(
    gateway: ScriptedGateway,
) -> None:
    gateway.etcd.fail_next(Fault.ANSWER_LOST, *[Fault.REQUEST_LOST] * 3)
    gateway.connect(1)
    assert gateway.answer(1)[0] == "error"
    gateway.connect(2)
    assert gateway.answer(2)[0] == "export"
    time.sleep(1.5 * RELEASE_RETRY_S)
    assert gateway.lease_of_image() is not None
    assert gateway.open_images == 1


def test_client_that_left_while_its_image_was_looked_up_has_nothing_opened(
    gateway: ScriptedGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Those who had left were remembered, up to a number of them, then forgotten all at once: an
    # image that was being looked up for one of them was opened, and nobody was left to close it.
    looked_up, find = threading.Event(), gateway.catalog.find

    def slow_find(name: ImageName) -> Stored[ImageRecord]:
        assert looked_up.wait(20)
        return find(name)

    monkeypatch.setattr(gateway.catalog, "find", slow_find)
    gateway.connect(1)
    gateway.leave(1)
    for client in range(100, 10_200):
        gateway.leave(client)
    looked_up.set()
    gateway.connect(2)
    assert gateway.answer(2)[0] == "export"
    gateway.leave(2)
    gateway.until(lambda: gateway.open_images == 0, "the image stays open for who has left")
