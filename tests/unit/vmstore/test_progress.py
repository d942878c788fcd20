"""`HealLog`: who could not fetch from whom, as gateways count it."""

from collections.abc import Iterator

import pytest

from tests.unit.vmstore.gateway import ScriptedGateway, scripted_gateway


@pytest.fixture
def gateway() -> Iterator[ScriptedGateway]:
    with scripted_gateway() as started:
        yield started


def test_pulls_that_reached_nobody_are_counted_by_source_and_target(
    gateway: ScriptedGateway,
) -> None:
    gateway.connect(1)
    channel = gateway.answer(1)[1]
    log = gateway.exports.heal_log
    assert log.pulls_unreached() == {}
    for source, target in ((0, 2), (1, 2), (0, 2)):
        gateway.engine.emit("pull_unreached", channel=channel, source=source, target=target)
    first, second, third = gateway.record.sets[0]
    wanted = {(first, third): 2, (second, third): 1}
    gateway.until(lambda: log.pulls_unreached() == wanted, "they are not counted")
