"""`LostHistory`: what a gateway says of an etcd that is behind what it holds."""

from collections.abc import Iterator

import pytest

from etcd import keys
from etcd.errors import LeaseNotFound
from etcd.interface import Delete
from tests.unit.vmstore.gateway import ScriptedGateway, scripted_gateway


@pytest.fixture
def gateway() -> Iterator[ScriptedGateway]:
    with scripted_gateway() as started:
        yield started


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


@pytest.mark.parametrize("confirmed", [False, True])
def test_image_that_was_deleted_as_it_was_healed_is_let_go(
    gateway: ScriptedGateway, confirmed: bool
) -> None:
    # No node was asked any more, which would have said so: it was healed for ever.
    gateway.catalog.init_cluster("c" * 32)
    gateway.exports.maintain(gateway.name, scrub=True)
    gateway.until(lambda: bool(gateway.exports.serving()), "it is not opened")
    channel, image = gateway.exports.snapshot()[0].channel, gateway.record.id
    for member in gateway.catalog.delete_image(gateway.name).awaits or ():
        if confirmed:
            gateway.catalog.confirm_deleted(image, member)
    gateway.engine.emit("replica_down", channel=channel, node=0, blocking=True)
    gateway.until(lambda: not gateway.exports.snapshot(), "it is not let go")
    assert gateway.catalog.lost() is None


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
