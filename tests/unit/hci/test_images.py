"""What the command line does with an image whose state is about to change."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from etcd import keys
from etcd.gateways import GatewayRecord
from etcd.images import ImageRecord
from etcd.interface import Put
from etcd.memory import MemoryEtcd
from etcd.records import LeaseRecord
from hci import control, images
from hci import control_pb2 as pb
from hci.config import ClusterConfig, Config, Endpoint, GatewayConfig
from hci.control_pb2_grpc import GatewayControlServicer, add_GatewayControlServicer_to_server
from hci.errors import OpenElsewhere
from shard.ids import ImageId
from tests.cluster.etcd_server import free_ports
from tests.unit.samples import GIB, node_record
from vmstore import transfer
from vmstore.catalog import Catalog
from vmstore.errors import InUse, UnknownImage
from vmstore.names import ImageName
from vmstore.stored import Stored
from vmstore.transfer import Source, TransferFailed

DISK = ImageName("vms", "disk")
NOWHERE = "127.0.0.1:1"


@pytest.fixture
def etcd() -> MemoryEtcd:
    return MemoryEtcd()


@pytest.fixture
def catalog(etcd: MemoryEtcd) -> Catalog:
    """Three nodes, none of which answers, and a pool."""
    made = Catalog(etcd)
    for number in (1, 2, 3):
        made.announce_node(node_record(number, control=NOWHERE), etcd.grant_lease(10))
    made.create_pool("vms")
    return made


@pytest.fixture
def config() -> Config:
    return Config(Path("hci.toml"), ClusterConfig(id="c" * 32, etcd=()), {}, {}, {}, None)


def taken(etcd: MemoryEtcd, catalog: Catalog) -> int:
    """The etcd lease of a gateway that has the image."""
    lease = etcd.grant_lease(60)
    image = catalog.create_image(DISK, GIB).record
    record = LeaseRecord(gateway="gateway1", holder="a" * 32, epoch=1)
    etcd.transaction([], [Put(keys.lease(image.id), record.encode(), lease)])
    return lease


def test_image_that_is_given_back_a_moment_later_is_removed(
    etcd: MemoryEtcd, catalog: Catalog, config: Config
) -> None:
    # A guest that was shut down just now was said to have its image open.
    lease = taken(etcd, catalog)
    threading.Timer(0.3, etcd.revoke_lease, [lease]).start()
    images.remove(config, catalog, DISK)
    assert catalog.images() == []


def test_image_that_somebody_has_open_is_not_removed(
    etcd: MemoryEtcd, catalog: Catalog, config: Config
) -> None:
    taken(etcd, catalog)
    with pytest.raises(InUse):
        images.remove(config, catalog, DISK)
    assert [entry.name for entry in catalog.images()] == [DISK]


class Elsewhere(GatewayControlServicer):
    """A gateway of another host."""

    def __init__(self, holder: str) -> None:
        self.holder = holder
        self.resized: list[tuple[str, int]] = []

    def Status(self, request: Any, context: Any) -> pb.GatewayStatus:  # noqa: N802
        return pb.GatewayStatus(name="gateway1", holder_id=self.holder)

    def Resize(self, request: Any, context: Any) -> pb.ResizeReply:  # noqa: N802
        self.resized.append((request.image_id, request.size_bytes))
        return pb.ResizeReply(size_bytes=request.size_bytes, connections_to_renew=3)


@contextmanager
def elsewhere(etcd: MemoryEtcd, catalog: Catalog, answering: str) -> Iterator[Elsewhere]:
    """A gateway that etcd knows to run as the process `a…a`; who answers in its place is given."""
    address = Endpoint("127.0.0.1", free_ports(1)[0])
    record = GatewayRecord(name="gateway1", host="host7", control=str(address), holder="a" * 32)
    etcd.transaction([], [Put(record.key, record.encode(), etcd.grant_lease(60))])
    gateway = Elsewhere(answering)
    server = control.server(
        "gateway1", address, lambda server: add_GatewayControlServicer_to_server(gateway, server)
    )
    try:
        yield gateway
    finally:
        server.stop(None).wait(10)


def resized(config: Config, catalog: Catalog) -> int:
    return images.resize(config, catalog, DISK, 2 * GIB, force=False)


def test_image_that_is_open_on_another_host_is_resized_by_its_gateway(
    etcd: MemoryEtcd, catalog: Catalog, config: Config
) -> None:
    # Whoever had it open was to be stopped, which is what growing a disk is there to avoid.
    taken(etcd, catalog)
    with elsewhere(etcd, catalog, "a" * 32) as gateway:
        assert resized(config, catalog) == 3
    assert gateway.resized == [(catalog.find(DISK).record.id, 2 * GIB)]


def test_gateway_that_answers_in_anothers_place_is_not_asked_to_resize(
    etcd: MemoryEtcd, catalog: Catalog, config: Config
) -> None:
    taken(etcd, catalog)
    with elsewhere(etcd, catalog, "b" * 32) as gateway:
        with pytest.raises(
            OpenElsewhere, match="vms/disk is open at gateway1 on host7, .* on host7"
        ):
            resized(config, catalog)
    assert gateway.resized == []


def test_image_whose_gateway_cannot_be_asked_is_resized_on_its_host(
    etcd: MemoryEtcd, catalog: Catalog, config: Config
) -> None:
    taken(etcd, catalog)
    with elsewhere(etcd, catalog, "a" * 32):
        pass
    with pytest.raises(OpenElsewhere, match="run this command on host7"):
        resized(config, catalog)


def test_image_of_a_gateway_that_is_gone_is_in_use_until_its_lease_ends(
    etcd: MemoryEtcd, catalog: Catalog, config: Config
) -> None:
    lease = taken(etcd, catalog)
    with pytest.raises(InUse):
        resized(config, catalog)
    etcd.revoke_lease(lease)
    assert resized(config, catalog) == 0
    assert catalog.find(DISK).record.size_bytes == 2 * GIB


class InterruptedCatalog(Catalog):
    """Has its process interrupted when etcd has an image, and has not said so."""

    def create_image(
        self, name: ImageName, size_bytes: int, *, imported_by: str | None = None
    ) -> Stored[ImageRecord]:
        made = super().create_image(name, size_bytes, imported_by=imported_by)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        return made


@pytest.mark.usefixtures("catalog")
def test_import_that_is_interrupted_while_its_image_is_made_leaves_none(
    etcd: MemoryEtcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "fill", lambda *_: pytest.fail("it goes on"))
    records = InterruptedCatalog(etcd)
    with pytest.raises(KeyboardInterrupt):
        images.import_file(records, DISK, Source(Path("disk"), "raw", GIB), "nbd:", print)
    assert records.images() == []


class Levelling(GatewayControlServicer):
    """A gateway at which an image is opened, and has fewer shards to level as time goes by."""

    def __init__(self, answers: Sequence[pb.OpenImage]) -> None:
        self.left = list(answers)

    def Status(self, request: Any, context: Any) -> pb.GatewayStatus:  # noqa: N802
        return pb.GatewayStatus(images=[self.left.pop(0)])


def test_check_keeps_an_image_open_until_its_replicas_are_level(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # It opened it for a moment: what was not level yet was said to differ.
    image = "ab" * 16
    serving = {"image_id": image, "state": pb.OpenImage.STATE_SERVING, "clients": 1}
    gateway = Levelling(
        [
            pb.OpenImage(image_id=image, state=pb.OpenImage.STATE_CLOSING),
            pb.OpenImage(image_id=image, state=pb.OpenImage.STATE_OPENING, clients=1),
            pb.OpenImage(**serving, counters={"levelling_shards_left": 7}),
            pb.OpenImage(**serving, counters={"levelling_shards_left": 7}),
            pb.OpenImage(**serving, counters={"levelling_shards_left": 2}),
            pb.OpenImage(**serving),
            pb.OpenImage(),
        ]
    )
    held: list[str] = []

    @contextmanager
    def held_open(uri: str) -> Iterator[Callable[[], bool]]:
        held.append(uri)
        yield lambda: True
        held.append("closed")

    monkeypatch.setattr(transfer, "held_open", held_open)
    control_at = Endpoint("127.0.0.1", free_ports(1)[0])
    server = control.server(
        "gateway1",
        control_at,
        lambda server: add_GatewayControlServicer_to_server(gateway, server),
    )
    try:
        section = GatewayConfig(
            *("gateway1", "host1", control_at, Path("nbd.sock"), None, Path("run"), None)
        )
        images._level(section, "nbd:", ImageId(image))
    finally:
        server.stop(None).wait(10)
    assert held == ["nbd:", "closed"]
    assert gateway.left == [pb.OpenImage()]


def failing(
    monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], object]
) -> Callable[[Catalog], None]:
    """Return an import that fails, behind what happens meanwhile."""

    def fill(*_given: object) -> None:
        meanwhile()
        raise TransferFailed("the gateway is gone")

    monkeypatch.setattr(transfer, "fill", fill)
    source = Source(Path("some.raw"), "raw", GIB)
    return lambda found: images.import_file(found, DISK, source, "nbd:", lambda _done: None)


def test_import_that_fails_leaves_no_image(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TransferFailed):
        failing(monkeypatch, lambda: None)(catalog)
    with pytest.raises(UnknownImage):
        catalog.find(DISK)


def test_import_that_fails_removes_no_image_but_its_own(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Somebody had removed the half-filled image and made another one under its name.
    def replace() -> None:
        catalog.delete_image(DISK)
        catalog.create_image(DISK, 2 * GIB)

    with pytest.raises(TransferFailed, match="the gateway is gone"):
        failing(monkeypatch, replace)(catalog)
    assert catalog.find(DISK).record.size_bytes == 2 * GIB


def test_import_that_fails_behind_the_removal_of_its_image_says_why_it_failed(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TransferFailed, match="the gateway is gone"):
        failing(monkeypatch, lambda: catalog.delete_image(DISK))(catalog)
