"""`Leases`: how a gateway takes images and gives them back, with an etcd in memory."""

import time
from collections.abc import Iterator
from typing import Any

import pytest

from etcd.errors import LeaseNotFound
from etcd.memory import Fault
from tests.unit.vmstore.gateway import ScriptedGateway, scripted_gateway
from vmstore.calls import RELEASE_RETRY_S
from vmstore.holding import Held


@pytest.fixture
def gateway() -> Iterator[ScriptedGateway]:
    with scripted_gateway() as started:
        yield started


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
