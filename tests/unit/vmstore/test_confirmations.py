"""Whether snapshots last, as a gateway says before one is cloned; and clones as it serves them."""

import random
import threading
from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from etcd.images import ImageRecord
from shard.scrub import ScrubLimits
from tests.unit.vmstore.gateway import WAIT_S, ScriptedGateway, scripted_gateway
from tests.unit.vmstore.test_removals import remove
from tests.unit.vmstore.test_rollbacks import with_snapshots
from vmstore.errors import RecordsLost, UnknownSnapshot
from vmstore.names import ImageName, SnapshotName
from vmstore.scrubbing import Scrubber
from vmstore.snapshot_errors import RemovalFailed


@pytest.fixture
def gateway() -> Iterator[ScriptedGateway]:
    with scripted_gateway() as started:
        with_snapshots(started, "s", "t")
        yield started


def confirm(gateway: ScriptedGateway, name: str = "s") -> "Future[int]":
    """Ask, as the control service does: from a thread that waits."""
    asked: Future[int] = Future()

    def ask() -> None:
        try:
            asked.set_result(gateway.exports.confirm_snapshot(gateway.name, name))
        except BaseException as error:  # noqa: BLE001 - it is the caller's
            asked.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    return asked


def cloned(gateway: ScriptedGateway) -> ImageRecord:
    source = SnapshotName(gateway.name, "s")
    return gateway.catalog.clone_image(source, ImageName("vms", "copy")).record


def test_snapshots_of_a_closed_image_last_once_it_was_opened(gateway: ScriptedGateway) -> None:
    epoch = gateway.record.epoch
    assert confirm(gateway).result(timeout=WAIT_S) == 1
    gateway.until(lambda: gateway.open_images == 0, "the image stays open")
    assert (gateway.record.epoch, gateway.record.clean) == (epoch + 1, True)


def test_several_are_answered_while_clients_have_the_image(gateway: ScriptedGateway) -> None:
    gateway.connect(1)
    assert gateway.answer(1)[0] == "export"
    asked = [confirm(gateway, name) for name in ("s", "t", "s")]
    assert [each.result(timeout=WAIT_S) for each in asked] == [1, 2, 1]
    with pytest.raises(UnknownSnapshot):
        confirm(gateway, "none").result(timeout=WAIT_S)
    assert gateway.open_images == 1


def test_snapshot_counts_only_when_all_nodes_have_stored_it(gateway: ScriptedGateway) -> None:
    gateway.connect(1)
    gateway.answer(1)
    taking = threading.Thread(
        target=lambda: gateway.exports.take_snapshot(gateway.name, "u", 5), daemon=True
    )
    taking.start()
    gateway.until(lambda: bool(gateway.engine.named("freeze")), "nothing is frozen")
    ((channel, attempt), _) = gateway.engine.named("freeze")[0]
    gateway.engine.emit("frozen", channel=channel, attempt=attempt)
    gateway.until(lambda: gateway.record.snapshot("u") is not None, "etcd does not have it")
    asked = confirm(gateway, "u")
    with pytest.raises(TimeoutError):
        asked.result(timeout=0.5)
    gateway.engine.emit("stored", channel=channel, generation=gateway.record.generation)
    assert asked.result(timeout=WAIT_S) == 3
    taking.join(WAIT_S)


def test_nothing_is_confirmed_by_an_etcd_that_lost_history(gateway: ScriptedGateway) -> None:
    gateway.catalog.mark_lost("node1", "a test says so", None)
    with pytest.raises(RecordsLost):
        confirm(gateway).result(timeout=WAIT_S)


def test_removal_that_meets_a_clone_fails_and_the_image_goes_on(gateway: ScriptedGateway) -> None:
    """The command line looks first; who clones just then is found by etcd's compare."""
    gateway.connect(1)
    gateway.answer(1)
    cloned(gateway)
    before = gateway.record
    with pytest.raises(RemovalFailed, match="a clone begins .*vms/copy"):
        remove(gateway).result(timeout=WAIT_S)
    assert gateway.record == before
    assert gateway.open_images == 1
    assert remove(gateway, "t").result(timeout=WAIT_S) == 2


def test_clone_is_opened_with_its_parent_once_etcd_was_asked(gateway: ScriptedGateway) -> None:
    clone = cloned(gateway)
    gateway.engine.known = None
    gateway.connect(1, name="vms/copy")
    assert gateway.answer(1)[0] == "export"
    (_, values) = gateway.engine.named("open")[-1]
    assert clone.parent is not None
    assert values["parent"] == (
        clone.parent.image,
        clone.parent.layer,
        clone.parent.generation,
        clone.parent.size_bytes,
    )
    assert values["placement_key"] == gateway.record.id


def test_damage_in_an_ancestor_has_that_one_scrubbed(gateway: ScriptedGateway) -> None:
    cloned(gateway)
    gateway.engine.known = None
    gateway.connect(1, name="vms/copy")
    gateway.answer(1)
    parent = gateway.record.id
    ((channel,), _) = gateway.engine.named("open")[-1]
    rot = {"channel": channel, "node": 1, "image": parent, "shard": 3, "block": 7}
    gateway.engine.emit("parent_rot", **rot)
    log = gateway.exports.rot_log
    gateway.until(log.news.is_set, "nobody hears of it")
    assert log.ancestors() == [parent]
    scrubber = Scrubber(
        gateway.catalog,
        gateway.exports,
        log,
        lambda _image: None,
        ScrubLimits(every_s=0),
        random.Random(1),
    )
    for now_s in (0.0, 10.0, 20.0):
        scrubber.look(now_s, 1000)
    times = gateway.catalog.scrub_of(parent).times
    assert times.is_asked or times.is_under_way
    assert log.ancestors() == []


def test_parent_that_a_node_has_lost_is_opened_to_be_healed(gateway: ScriptedGateway) -> None:
    cloned(gateway)
    gateway.engine.known, gateway.engine.parent_missing = None, {2}
    gateway.connect(1, name="vms/copy")
    gateway.until(lambda: len(gateway.engine.named("open")) == 2, "its parent is not opened")
    opened = [values["image"] for _, values in gateway.engine.named("open")]
    assert opened[1] == gateway.record.id
