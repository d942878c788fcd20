"""`Sessions`: the etcd lease of a gateway ends, and what it tells its engine then."""

import threading
from collections.abc import Iterator

import pytest

from etcd.errors import EtcdUnavailable, LeaseNotFound
from tests.unit.vmstore.gateway import ScriptedGateway, scripted_gateway
from vmstore.holding import Held


@pytest.fixture
def gateway() -> Iterator[ScriptedGateway]:
    with scripted_gateway() as started:
        yield started


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
