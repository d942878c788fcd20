"""Which image a gateway scrubs, and what it keeps of it."""

import random
from collections.abc import Mapping
from typing import Any

import pytest

from etcd import keys
from etcd.interface import Delete, Put
from etcd.memory import Fault, MemoryEtcd
from etcd.records import LeaseRecord
from etcd.scrubs import BadBlocks, ScrubRecord
from shard.ids import ImageId
from shard.scrub import ScrubLimits
from tests.unit.samples import NODES
from tests.unit.vmstore.test_catalog import node
from vmstore.catalog import Catalog
from vmstore.names import ImageName
from vmstore.scrubbing import RotLog, Scrubber, may_be_opened

NAME = ImageName("vms", "web")
DAY_MS = 86_400_000


class FakeImages:
    """The gateway's open images, as a test says."""

    def __init__(self) -> None:
        self.open: dict[ImageId, ImageName] = {}
        self.maintained: list[ImageName] = []
        self.begun: list[tuple[ImageId, int, int, int]] = []
        self.ended: list[int] = []
        self.let_go: list[ImageId] = []

    def serving(self) -> Mapping[ImageId, ImageName]:
        return dict(self.open)

    def maintain(self, name: ImageName, *, scrub: bool = False) -> None:
        assert scrub
        self.maintained.append(name)

    def scrub(
        self, image: ImageId, attempt: int, shards: tuple[int, int], _limits: ScrubLimits
    ) -> None:
        self.begun.append((image, attempt, *shards))

    def end_scrub(self, _image: ImageId, attempt: int) -> None:
        self.ended.append(attempt)

    def scrubbed(self, image: ImageId) -> None:
        self.let_go.append(image)


class Gateway:
    """A scrubber with its surroundings."""

    def __init__(self, catalog: Catalog, limits: ScrubLimits | None = None) -> None:
        self.catalog = catalog
        self.images = FakeImages()
        self.rot = RotLog()
        self.state: dict[str, Any] | None = None
        self.now_s = 1000.0
        self.now_ms = 100 * DAY_MS
        self.scrubber = Scrubber(
            catalog, self.images, self.rot, lambda _image: self.state,
            limits or ScrubLimits(every_s=0), random.Random(1),
        )  # fmt: skip

    def pass_s(self, seconds: float) -> None:
        self.now_s += seconds
        self.now_ms += int(seconds * 1000)
        self.scrubber.look(self.now_s, self.now_ms)

    def end(self, image: ImageId, status: str | None = None, **more: int) -> None:
        event = {"event": "scrub_ended", "status": status, "report": state(**more)}
        assert self.rot.on_event(image, str(NAME), event, NODES)


def state(**more: Any) -> dict[str, Any]:
    counts = ("attempt", "next_shard", "shards_left", "shards_done", "read_bytes", "found",
              "repaired", "given_up", "undecided")  # fmt: skip
    nothing = {"missed": [], "missed_shards": None}
    return {**dict.fromkeys(counts, 0), **nothing, "attempt": 1, **more}


@pytest.fixture
def catalog() -> Catalog:
    etcd = MemoryEtcd()
    catalog = Catalog(etcd)
    for number in (1, 2, 3):
        catalog.announce_node(node(number), etcd.grant_lease(10))
    catalog.create_pool("vms")
    return catalog


@pytest.fixture
def image(catalog: Catalog) -> ImageId:
    return catalog.create_image(NAME, 64 << 20).record.id


def record(catalog: Catalog, image: ImageId) -> ScrubRecord:
    return catalog.scrub_of(image)


def test_an_open_image_is_scrubbed_where_it_is_open(catalog: Catalog, image: ImageId) -> None:
    gateway = Gateway(catalog)
    gateway.images.open[image] = NAME
    gateway.pass_s(1)
    assert not gateway.images.begun
    catalog.ask_for_scrub(image, gateway.now_ms)
    gateway.pass_s(60)
    gateway.pass_s(1)
    assert gateway.images.begun == [(image, 1, 0, 0)] and not gateway.images.maintained
    gateway.end(image, read_bytes=4096, found=2, repaired=2, shards_done=3)
    gateway.pass_s(1)
    found = record(catalog, image)
    assert not found.times.is_under_way and found.finished_ms
    assert (found.last.found, found.last.repaired, found.shards_done) == (2, 2, 3)
    assert gateway.images.let_go == [image]


def test_a_closed_image_is_opened_for_it_and_let_go(catalog: Catalog, image: ImageId) -> None:
    gateway = Gateway(catalog)
    catalog.ask_for_scrub(image, gateway.now_ms)
    gateway.pass_s(1)
    assert gateway.images.maintained == [NAME] and not gateway.images.begun
    gateway.images.open[image] = NAME
    gateway.pass_s(1)
    assert gateway.images.begun == [(image, 1, 0, 0)]
    gateway.end(image)
    gateway.pass_s(1)
    assert gateway.images.let_go == [image] and not gateway.scrubber.under_way()


def test_another_gateway_goes_on_where_one_was_lost(catalog: Catalog, image: ImageId) -> None:
    first, second = Gateway(catalog), Gateway(catalog)
    catalog.ask_for_scrub(image, first.now_ms)
    first.images.open[image] = NAME
    first.pass_s(1)
    first.pass_s(1)
    first.state = state(next_shard=7, shards_done=7, found=1, repaired=1)
    first.pass_s(11)
    del first, second.images.open
    second.images.open = {image: NAME}
    second.pass_s(60)
    second.pass_s(1)
    assert second.images.begun == [(image, 1, 7, 0)]
    second.end(image, next_shard=16, shards_done=9, found=2, repaired=2)
    second.pass_s(1)
    found = record(catalog, image)
    assert (found.last.found, found.shards_done) == (3, 16)


def test_an_image_that_is_lost_has_its_scrub_kept_for_later(
    catalog: Catalog, image: ImageId
) -> None:
    gateway = Gateway(catalog)
    catalog.ask_for_scrub(image, gateway.now_ms)
    gateway.images.open[image] = NAME
    gateway.pass_s(1)
    gateway.pass_s(1)
    gateway.state = state(next_shard=5)
    gateway.pass_s(1)
    gateway.images.open.clear()
    gateway.state = None
    gateway.pass_s(1)
    assert not gateway.scrubber.under_way()
    found = record(catalog, image)
    assert found.times.is_under_way and found.next_shard == 5


def test_a_scrub_that_is_stopped_ends_and_is_not_begun_again(
    catalog: Catalog, image: ImageId
) -> None:
    gateway = Gateway(catalog)
    catalog.ask_for_scrub(image, gateway.now_ms)
    gateway.images.open[image] = NAME
    gateway.pass_s(1)
    gateway.pass_s(1)
    assert catalog.stop_scrub(image, gateway.now_ms)
    gateway.state = state()
    gateway.pass_s(1)
    assert gateway.images.ended == [1]
    gateway.end(image, status="NoSession")
    gateway.pass_s(1)
    gateway.pass_s(60)
    assert len(gateway.images.begun) == 1
    assert not catalog.stop_scrub(image, gateway.now_ms)


def test_the_schedule_begins_when_an_image_is_first_seen(catalog: Catalog, image: ImageId) -> None:
    gateway = Gateway(catalog, ScrubLimits(every_s=86_400))
    gateway.images.open[image] = NAME
    gateway.pass_s(1)
    assert record(catalog, image).seen_ms == gateway.now_ms
    gateway.pass_s(3600)
    gateway.pass_s(1)
    assert not gateway.images.begun
    gateway.pass_s(86_400)
    gateway.pass_s(1)
    assert gateway.images.begun == [(image, 1, 0, 0)]


def test_a_clock_that_was_years_ahead_does_not_end_the_schedule(
    catalog: Catalog, image: ImageId
) -> None:
    gateway = Gateway(catalog, ScrubLimits(every_s=86_400))
    gateway.images.open[image] = NAME
    gateway.now_ms += 1000 * DAY_MS
    gateway.pass_s(1)
    gateway.now_ms -= 1000 * DAY_MS
    gateway.pass_s(3600)
    assert record(catalog, image).seen_ms == gateway.now_ms
    gateway.pass_s(86_400)
    gateway.pass_s(1)
    assert gateway.images.begun == [(image, 1, 0, 0)]


def test_what_stays_bad_is_noted_whoever_found_it(catalog: Catalog, image: ImageId) -> None:
    gateway = Gateway(catalog)
    bad = {"event": "unrepairable", "shard": 3, "block": 7, "blocks": 1}
    differ = {"event": "undecided", "shard": 3, "block": 9, "blocks": 2, "nodes": [0, 2]}
    for event in (bad, differ):
        assert gateway.rot.on_event(image, str(NAME), event, NODES)
    gateway.pass_s(1)
    expected = (BadBlocks(3, 7), BadBlocks(3, 9, 2, ("node1", "node3")))
    assert record(catalog, image).bad == expected
    assert gateway.rot.counts() == {(str(NAME), "unrepairable"): 1, (str(NAME), "undecided"): 2}


def test_the_record_of_a_deleted_image_goes(catalog: Catalog, image: ImageId) -> None:
    gateway = Gateway(catalog)
    catalog.ask_for_scrub(image, gateway.now_ms)
    catalog.delete_image(NAME)
    gateway.pass_s(1)
    assert not catalog.scrubs()


def test_only_an_image_whose_nodes_in_sync_all_run_is_opened(
    catalog: Catalog, image: ImageId
) -> None:
    stored = catalog.find(NAME).record
    members = set(stored.sets[0])
    assert may_be_opened(stored, {}, members)
    assert not may_be_opened(stored, {}, set(sorted(members)[1:]))
    lease = LeaseRecord(gateway="other", holder="0" * 32, epoch=1)
    assert not may_be_opened(stored, {image: lease}, members)


def test_what_a_node_missed_is_scrubbed_again_when_it_is_in_sync_again(
    catalog: Catalog, image: ImageId
) -> None:
    gateway = Gateway(catalog)
    gateway.images.open[image] = NAME
    catalog.ask_for_scrub(image, gateway.now_ms)
    gateway.pass_s(60)
    gateway.pass_s(1)
    gateway.end(image, missed=["node3"], missed_shards=(2, 5), found=1, repaired=1, read_bytes=10)
    away = catalog.etcd.get(keys.alive("node3"))
    assert away is not None
    catalog.etcd.transaction([], [Delete(keys.alive("node3"))])
    gateway.pass_s(60)
    gateway.pass_s(60)
    assert len(gateway.images.begun) == 1, "it is away"
    catalog.etcd.transaction([], [Put(keys.alive("node3"), away.value)])
    gateway.pass_s(60)
    gateway.pass_s(1)
    assert gateway.images.begun[1:] == [(image, 2, 2, 5)]
    gateway.end(image, attempt=2, read_bytes=4)
    gateway.pass_s(60)
    found = record(catalog, image)
    assert found.last.missed == () and found.last.read_bytes == 14 and not found.missed_end
    gateway.pass_s(60)
    assert len(gateway.images.begun) == 2, "nothing is left to be read again"


def test_what_stays_bad_is_kept_for_later_where_etcd_is_away(
    catalog: Catalog, image: ImageId
) -> None:
    # Of several images with bad blocks all but the one that could not be saved were forgotten.
    gateway = Gateway(catalog)
    other = catalog.create_image(ImageName("vms", "other"), 1 << 30).record.id
    for each in (image, other):
        event = {"event": "unrepairable", "shard": 3, "block": 5}
        assert gateway.rot.on_event(each, "vms/some", event, ())
    etcd = catalog.etcd
    assert isinstance(etcd, MemoryEtcd)
    etcd.fail_next(*[Fault.REQUEST_LOST] * 4)
    for _ in range(4):
        gateway.pass_s(60)
    assert [bad.block for each in (image, other) for bad in record(catalog, each).bad] == [5, 5]
