"""`Serving`: what becomes of the effects of a holder, with an engine that the test speaks for."""

from collections.abc import Iterator

import pytest

from tests.unit.vmstore.gateway import ScriptedGateway, scripted_gateway
from vmstore.errors import LeaseMoved
from vmstore.holding import Held


@pytest.fixture
def gateway() -> Iterator[ScriptedGateway]:
    with scripted_gateway() as started:
        yield started


def test_change_that_met_a_lease_taken_again_is_asked_for_anew(gateway: ScriptedGateway) -> None:
    # The session ended while etcd was out of reach and a write waited for a lost node. The lease
    # was taken again, and the change, made under the former one, was refused: its guest was told
    # that the image is another's, and barred.
    gateway.connect(1)
    channel = gateway.answer(1)[1]
    original = gateway.catalog.change
    asked: list[Held] = []

    def change(held: Held, *given: object, **named: object) -> Held:
        asked.append(held)
        if len(asked) == 1:
            raise LeaseMoved(held.record.id)
        return original(held, *given, **named)  # type: ignore[arg-type]

    gateway.catalog.change = change  # type: ignore[method-assign]
    gateway.engine.emit("replica_down", channel=channel, node=0, blocking=True)
    gateway.until(lambda: len(gateway.engine.named("reconfigure")) == 1, "the change is not made")
    assert len(asked) == 2
    assert gateway.open_images == 1
    assert gateway.engine.named("kill") == []
