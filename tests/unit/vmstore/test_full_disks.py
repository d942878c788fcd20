"""`FullDisks`: what a gateway tells its engine while disks are full."""

from collections.abc import Callable, Iterator

import pytest

from etcd.records import PoolRecord
from shard.membership import WhenFull
from tests.unit.vmstore.gateway import ScriptedGateway, scripted_gateway
from vmstore import full_disks, space
from vmstore.stored import Stored


@pytest.fixture
def gateway() -> Iterator[ScriptedGateway]:
    with scripted_gateway() as started:
        yield started


def test_writes_are_refused_while_disks_are_full_and_the_pool_says_so(
    gateway: ScriptedGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(space, "FULL_S", 0.2)
    monkeypatch.setattr(full_disks, "FULL_ASK_S", 0.1)
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
    fill_until(lambda: len(refused()) >= 1, "an open image does not follow")
    assert refused()[0] == ((channel, [0]), {})
    gateway.until(lambda: len(refused()) >= 2, "room is not noticed")
    assert refused()[1] == ((channel, []), {})
