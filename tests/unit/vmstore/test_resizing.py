"""Resizing an image: who may be there meanwhile, one at a time, and how it ends."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from etcd.memory import Fault
from shard.errors import HciError
from tests.unit.vmstore.gateway import GIB, WAIT_S, ScriptedGateway, scripted_gateway
from vmstore import resizing
from vmstore.errors import BeingClosed, BeingResized, InUse, ShrinkRefused
from vmstore.standing import Phase


@pytest.fixture
def gateway() -> Iterator[ScriptedGateway]:
    with scripted_gateway() as started:
        yield started


def resize(gateway: ScriptedGateway, size_bytes: int, *, force: bool = True) -> "Future[None]":
    """Ask for a new size, as the control service does: from a thread that waits."""
    asked: Future[None] = Future()

    def ask() -> None:
        try:
            gateway.exports.resize(gateway.name, size_bytes, force=force)
        except BaseException as error:  # noqa: BLE001 - it is the caller's
            asked.set_exception(error)
        else:
            asked.set_result(None)

    threading.Thread(target=ask, daemon=True).start()
    return asked


def shrinking(gateway: ScriptedGateway) -> "tuple[Future[None], int]":
    """A shrink that has begun to discard, and the image's channel."""
    asked = resize(gateway, GIB // 2)
    gateway.until(lambda: bool(gateway.engine.named("zero")), "nothing is discarded")
    (channel, offset, length), _ = gateway.engine.named("zero")[0]
    assert (offset, length) == (GIB // 2, GIB // 2)
    return asked, channel


def test_client_that_comes_during_a_shrink_is_refused_and_let_in_after(
    gateway: ScriptedGateway,
) -> None:
    # Whether clients were there was asked once, before the zeroing, by the thread of the caller. A
    # client that was let in meanwhile wrote and flushed to what was then zeroed and cut off.
    asked, channel = shrinking(gateway)
    gateway.connect(1)
    kind, (code, why) = gateway.answer(1)
    assert (kind, code) == ("error", "refused")
    assert "is being resized" in why
    assert not asked.done()
    gateway.engine.emit("zeroed", channel=channel, done=True)
    asked.result(timeout=WAIT_S)
    assert gateway.record.size_bytes == GIB // 2
    gateway.connect(2)
    assert gateway.answer(2)[0] == "export"


def test_shrink_with_a_client_there_is_refused(gateway: ScriptedGateway) -> None:
    gateway.connect(1)
    assert gateway.answer(1)[0] == "export"
    with pytest.raises(InUse):
        resize(gateway, GIB // 2).result(timeout=WAIT_S)
    assert not gateway.engine.named("zero")
    resize(gateway, 2 * GIB, force=False).result(timeout=WAIT_S)
    assert gateway.record.size_bytes == 2 * GIB


def test_shrink_that_is_not_forced_is_refused(gateway: ScriptedGateway) -> None:
    with pytest.raises(ShrinkRefused):
        resize(gateway, GIB // 2, force=False).result(timeout=WAIT_S)
    gateway.until(lambda: gateway.open_images == 0, "the image stays open")


def test_second_resize_of_an_image_is_refused_and_the_first_ends_well(
    gateway: ScriptedGateway,
) -> None:
    # The second one's future took the first one's place: one caller waited for ten minutes, and
    # the answer that came twice ended the gateway.
    first, channel = shrinking(gateway)
    with pytest.raises(BeingResized):
        resize(gateway, GIB // 4).result(timeout=WAIT_S)
    gateway.engine.emit("zeroed", channel=channel, done=True)
    first.result(timeout=WAIT_S)
    gateway.engine.emit("zeroed", channel=channel, done=True)
    gateway.until(lambda: gateway.open_images == 0, "the image is not given back")
    resize(gateway, GIB, force=False).result(timeout=WAIT_S)
    assert gateway.record.size_bytes == GIB


@pytest.mark.parametrize("discarded", [False, True])
def test_resize_of_an_image_that_is_lost_meanwhile_fails_at_once(
    gateway: ScriptedGateway, discarded: bool
) -> None:
    # The caller waited for an answer of an image that was gone, and the size was stored into the
    # record of whoever had it then.
    asked, channel = shrinking(gateway)
    if discarded:
        # It waits for a change of membership that never ends.
        gateway.exports.snapshot()[0].holder.paused = True
        gateway.engine.emit("zeroed", channel=channel, done=True)
    gateway.give_to_another_gateway()
    gateway.engine.emit("fenced", channel=channel, node=0)
    with pytest.raises(HciError, match="knows a later holder"):
        asked.result(timeout=WAIT_S)
    gateway.until(lambda: gateway.open_images == 0, "the image is not let go")
    assert gateway.record.size_bytes == GIB


def begin_to_close(gateway: ScriptedGateway) -> int:
    """Have the last client leave an image that does not get rid of what it has to flush."""
    gateway.engine.closes = False
    gateway.connect(1)
    _, channel = gateway.answer(1)
    gateway.leave(1)
    gateway.until(
        lambda: gateway.exports.snapshot()[0].holder.phase is Phase.CLOSING, "it does not close"
    )
    assert isinstance(channel, int)
    return channel


def test_resize_of_an_image_that_does_not_close_says_so(
    gateway: ScriptedGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resizing, "CLOSING_S", 0.3)
    begin_to_close(gateway)
    with pytest.raises(BeingClosed):
        resize(gateway, 2 * GIB).result(timeout=WAIT_S)


def test_resize_right_after_the_last_client_left_waits_until_the_image_is_closed(
    gateway: ScriptedGateway,
) -> None:
    # It failed: a guest that was shut down is closed a moment later.
    channel = begin_to_close(gateway)
    asked = resize(gateway, 2 * GIB)
    time.sleep(0.3)
    assert not asked.done()
    gateway.engine.closes = True
    gateway.engine.emit("closed", channel=channel, clean=True)
    asked.result(timeout=WAIT_S)
    assert gateway.record.size_bytes == 2 * GIB


def test_image_that_grows_tells_how_many_connections_go_by_the_former_size(
    gateway: ScriptedGateway,
) -> None:
    for client in (1, 2):
        gateway.connect(client)
        gateway.answer(client)
    assert gateway.exports.resize(gateway.name, 2 * GIB, force=False) == 2
    assert gateway.engine.named("reconnect") == []


def test_clients_that_are_asked_to_connect_anew_are_let_in_with_the_new_size(
    gateway: ScriptedGateway,
) -> None:
    gateway.connect(1)
    _, channel = gateway.answer(1)
    told_before = gateway.exports.resize(gateway.name, 2 * GIB, force=False, reconnect=True)
    assert told_before == 0
    assert gateway.engine.named("reconnect") == [((channel,), {})]
    gateway.leave(1)
    gateway.connect(2)
    assert gateway.answer(2) == ("export", channel), "it stayed open in between"
    answers = gateway.engine.named("answer_export")
    assert answers[-1][1]["size_bytes"] == 2 * GIB


def test_resize_whose_outcome_stayed_unknown_costs_no_guest_its_image(
    gateway: ScriptedGateway,
) -> None:
    # etcd had the new size and nobody heard it. The gateway went on by the former record: with the
    # next lost node etcd refused the change, and the guest was told that its image is another's.
    gateway.connect(1, "10:111")
    channel = gateway.answer(1)[1]
    gateway.etcd.fail_next(Fault.ANSWER_LOST, *[Fault.REQUEST_LOST] * 3)
    asked = resize(gateway, 2 * GIB)
    gateway.until(lambda: gateway.record.size_bytes == 2 * GIB, "etcd has not taken it")
    gateway.engine.emit("replica_down", channel=channel, node=0, blocking=True)
    asked.result(timeout=WAIT_S)
    gateway.until(lambda: bool(gateway.engine.named("reconfigure")), "the change is not made")
    assert gateway.engine.named("kill") == []
    assert (gateway.record.generation, gateway.record.size_bytes) == (2, 2 * GIB)
