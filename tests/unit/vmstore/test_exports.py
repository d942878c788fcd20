"""`Exports`: who is let in, with an etcd in memory and an engine that the test speaks for."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from etcd.errors import EtcdUnavailable
from etcd.images import ImageRecord
from etcd.memory import Fault
from tests.unit.vmstore.gateway import ScriptedGateway, scripted_gateway
from vmstore import exports
from vmstore.errors import ClientBarred
from vmstore.names import ImageName
from vmstore.served import Served, ServedFile
from vmstore.standing import Phase
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
        return Served(holder, file=ServedFile(tmp_path / "served.json"), lives=lambda _peer: True)

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


def test_guest_comes_back_to_an_image_that_was_healed_elsewhere_meanwhile(tmp_path: Path) -> None:
    served = Served("a1" * 16, file=ServedFile(tmp_path / "served.json"), lives=lambda _peer: True)
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
    successor = Served(
        "a2" * 16, file=ServedFile(tmp_path / "served.json"), lives=lambda _peer: True
    )
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


def test_image_that_another_had_since_it_was_opened_for_maintenance_is_let_go(
    gateway: ScriptedGateway,
) -> None:
    # The other one took the lease, and gave it back: it looked as if ours had merely lapsed, and a
    # client waited for ever while it was claimed again and again.
    gateway.exports.maintain(gateway.name, scrub=True)
    gateway.until(lambda: bool(gateway.exports.serving()), "it is not opened")
    gateway.give_to_another_gateway()
    gateway.connect(1)
    kind, *_ = gateway.answer(1)
    assert kind == "error"
    gateway.until(lambda: not gateway.exports.snapshot(), "it is not let go")


def test_client_is_let_in_when_etcd_is_back(gateway: ScriptedGateway) -> None:
    # A guest that was started while etcd elected a leader was refused.
    gateway.etcd.fail_next(*[Fault.UNAVAILABLE] * 3)
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
