"""Which gateway is asked for a snapshot or a rollback, and what is said of what it answers."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from etcd import keys
from etcd.errors import EtcdUnavailable
from etcd.gateways import GatewayRecord
from etcd.interface import Delete, Put
from etcd.memory import Fault, MemoryEtcd
from etcd.records import LeaseRecord
from hci import clones, control, snapshots
from hci import control_pb2 as pb
from hci.config import ClusterConfig, Config, Endpoint
from hci.control_pb2_grpc import GatewayControlServicer, add_GatewayControlServicer_to_server
from hci.errors import Refused, Undecided
from shard.errors import HciError
from tests.cluster.etcd_server import free_ports
from tests.unit.samples import GIB, node_record
from vmstore.catalog import Catalog
from vmstore.clone_errors import HasClones
from vmstore.errors import ImageExists, UnknownSnapshot
from vmstore.names import ImageName, parse_snapshot_name

NAME = parse_snapshot_name("vms/disk@s")
Replying = Callable[[grpc.ServicerContext], pb.SnapshotReply]
CONFIG = Config(Path("hci.toml"), ClusterConfig(id="c" * 32, etcd=()), {}, {}, {}, None)


class Asked(GatewayControlServicer):
    """A gateway of another host; what it answers is given."""

    def __init__(self, name: str, holder: str, answer: Replying) -> None:
        self.name = name
        self.holder = holder
        self.answer = answer
        self.asked: list[tuple[str, str]] = []

    def Status(self, request: Any, context: Any) -> pb.GatewayStatus:  # noqa: N802
        return pb.GatewayStatus(name=self.name, holder_id=self.holder)

    def Snapshot(self, request: Any, context: Any) -> pb.SnapshotReply:  # noqa: N802
        self.asked.append((request.image_id, request.name))
        return self.answer(context)

    def RemoveSnapshot(self, request: Any, context: Any) -> pb.RemoveSnapshotReply:  # noqa: N802
        self.asked.append((request.image_id, request.name))
        return pb.RemoveSnapshotReply(layer=1)

    def ConfirmSnapshot(self, request: Any, context: Any) -> pb.ConfirmSnapshotReply:  # noqa: N802
        self.asked.append((request.image_id, request.name))
        return pb.ConfirmSnapshotReply(layer=1)

    def Rollback(self, request: Any, context: Any) -> pb.RollbackReply:  # noqa: N802
        self.asked.append((request.image_id, request.name))
        return pb.RollbackReply(created_s=5, dropped=["t"] if request.force else [])


@pytest.fixture
def etcd() -> MemoryEtcd:
    return MemoryEtcd()


@pytest.fixture
def catalog(etcd: MemoryEtcd) -> Catalog:
    made = Catalog(etcd)
    for number in (1, 2, 3):
        made.announce_node(node_record(number), etcd.grant_lease(1000))
    made.create_pool("vms")
    made.create_image(NAME.image, GIB)
    return made


def held_by(etcd: MemoryEtcd, catalog: Catalog, gateway: str, *, maintenance: bool = False) -> None:
    """A gateway has the image, for clients or for maintenance."""
    image = catalog.find(NAME.image).record.id
    lease = LeaseRecord(gateway=gateway, holder="a" * 32, epoch=1, maintenance=maintenance)
    etcd.transaction([], [Put(keys.lease(image), lease.encode(), etcd.grant_lease(1000))])


@contextmanager
def running(etcd: MemoryEtcd, name: str, answer: Replying) -> Iterator[Asked]:
    address = Endpoint("127.0.0.1", free_ports(1)[0])
    record = GatewayRecord(name=name, host="host7", control=str(address), holder="a" * 32)
    etcd.transaction([], [Put(record.key, record.encode(), etcd.grant_lease(1000))])
    gateway = Asked(name, "a" * 32, answer)
    server = control.server(
        name, address, lambda server: add_GatewayControlServicer_to_server(gateway, server)
    )
    try:
        yield gateway
    finally:
        server.stop(None).wait(10)


def taken(_context: grpc.ServicerContext) -> pb.SnapshotReply:
    return pb.SnapshotReply(layer=1, held_ms=3)


def refused(_context: grpc.ServicerContext) -> pb.SnapshotReply:
    raise HciError("no snapshot vms/disk@s was taken: node2 is not there")


def test_gateway_that_has_the_image_is_asked(etcd: MemoryEtcd, catalog: Catalog) -> None:
    held_by(etcd, catalog, "far")
    with running(etcd, "far", taken) as far:
        assert snapshots.create(CONFIG, catalog, NAME).held_ms == 3
    assert far.asked == [(catalog.find(NAME.image).record.id, "s")]


def test_snapshot_that_may_have_been_taken_is_not_asked_for_elsewhere(
    etcd: MemoryEtcd, catalog: Catalog
) -> None:
    """The next gateway said that it exists, and to choose another name."""
    held_by(etcd, catalog, "first")

    def moved(context: grpc.ServicerContext) -> pb.SnapshotReply:
        etcd.transaction([], [Delete(keys.lease(catalog.find(NAME.image).record.id))])
        held_by(etcd, catalog, "second")
        context.abort(grpc.StatusCode.ABORTED, "it is not known whether vms/disk@s was taken")

    with running(etcd, "first", moved) as first, running(etcd, "second", taken) as second:
        with pytest.raises(Undecided, match="first: it is not known whether"):
            snapshots.create(CONFIG, catalog, NAME)
    assert (len(first.asked), len(second.asked)) == (1, 0)


def test_reason_of_the_gateway_is_shown(etcd: MemoryEtcd, catalog: Catalog) -> None:
    held_by(etcd, catalog, "far")
    with running(etcd, "far", refused) as far:
        with pytest.raises(Refused, match="far: no snapshot vms/disk@s was taken: node2 is not"):
            snapshots.create(CONFIG, catalog, NAME)
    assert len(far.asked) == 1


def test_reason_of_the_gateway_is_shown_also_where_etcd_is_silent(
    etcd: MemoryEtcd, catalog: Catalog
) -> None:
    """The command said that it could not reach etcd, and not that the snapshot had failed."""
    held_by(etcd, catalog, "far")

    def refused_without_etcd(context: grpc.ServicerContext) -> pb.SnapshotReply:
        etcd.fail_next(Fault.UNAVAILABLE)
        return refused(context)

    with running(etcd, "far", refused_without_etcd):
        with pytest.raises(Refused, match="no snapshot vms/disk@s was taken"):
            snapshots.create(CONFIG, catalog, NAME)
    etcd.fail_next(Fault.UNAVAILABLE)
    with pytest.raises(EtcdUnavailable):
        snapshots.create(CONFIG, catalog, NAME)


def test_gateway_that_took_the_image_over_meanwhile_is_asked_next(
    etcd: MemoryEtcd, catalog: Catalog
) -> None:
    held_by(etcd, catalog, "first")

    def moved(context: grpc.ServicerContext) -> pb.SnapshotReply:
        etcd.transaction([], [Delete(keys.lease(catalog.find(NAME.image).record.id))])
        held_by(etcd, catalog, "second")
        return refused(context)

    with running(etcd, "first", moved) as first, running(etcd, "second", taken) as second:
        assert snapshots.create(CONFIG, catalog, NAME).held_ms == 3
    assert (len(first.asked), len(second.asked)) == (1, 1)


def test_gateway_that_has_the_image_is_asked_to_roll_it_back(
    etcd: MemoryEtcd, catalog: Catalog
) -> None:
    held = catalog.take_lease(
        catalog.find(NAME.image),
        gateway="far",
        holder="a" * 32,
        etcd_lease=etcd.grant_lease(1000),
    )
    catalog.change(held, held.record.with_snapshot("s", 5))
    with running(etcd, "far", taken) as far:
        assert list(snapshots.roll_back(CONFIG, catalog, NAME, force=True).dropped) == ["t"]
        assert not snapshots.roll_back(CONFIG, catalog, NAME, force=False).dropped
    assert far.asked == [(held.record.id, "s")] * 2


def test_rollback_to_what_is_not_there_asks_no_gateway(catalog: Catalog) -> None:
    with pytest.raises(UnknownSnapshot):
        snapshots.roll_back(CONFIG, catalog, NAME, force=True)


def test_gateway_that_waits_for_merges_of_an_image_is_asked_for_what_a_person_wants(
    etcd: MemoryEtcd, catalog: Catalog
) -> None:
    """Several snapshots were removed one after the other: a gateway elsewhere had the image for
    the merge of the first, and the second was refused."""
    held_by(etcd, catalog, "far", maintenance=True)
    with running(etcd, "far", taken) as far:
        assert snapshots.create(CONFIG, catalog, NAME).held_ms == 3
    assert len(far.asked) == 1


def test_removed_snapshot_is_waited_for_until_its_layer_is_merged_or_its_image_gone(
    etcd: MemoryEtcd, catalog: Catalog
) -> None:
    held = catalog.take_lease(
        catalog.find(NAME.image),
        gateway="far",
        holder="a" * 32,
        etcd_lease=etcd.grant_lease(1000),
    )
    held = catalog.change(held, held.record.with_snapshot("s", 5))
    with running(etcd, "far", taken):
        image, layer = snapshots.remove(CONFIG, catalog, NAME)
    assert (image, layer) == (held.record.id, 1)
    removed = catalog.change(held, held.record.without_snapshot(held.record.snapshots[0]))
    assert list(snapshots.merging(catalog, "vms/disk")) == [(NAME.image, 1)]
    ends = threading.Timer(
        0.3, lambda: catalog.change(removed, removed.record.without_merged({layer}))
    )
    ends.start()
    snapshots.await_merge(catalog, image, layer)
    ends.join()
    assert catalog.find(NAME.image).record.merging == ()
    assert list(snapshots.merging(catalog, None)) == []


def with_snapshot(etcd: MemoryEtcd, catalog: Catalog) -> None:
    """The image has the snapshot, and the gateway `far` has the image."""
    lease = etcd.grant_lease(1000)
    image = catalog.find(NAME.image)
    held = catalog.take_lease(image, gateway="far", holder="a" * 32, etcd_lease=lease)
    catalog.change(held, held.record.with_snapshot("s", 5))


def test_gateway_is_asked_before_a_snapshot_is_cloned_for_the_first_time(
    etcd: MemoryEtcd, catalog: Catalog
) -> None:
    with_snapshot(etcd, catalog)
    with running(etcd, "far", taken) as far:
        for name in ("b", "c"):
            assert clones.create(CONFIG, catalog, NAME, ImageName("vms", name)) == GIB
    assert len(far.asked) == 1
    assert len(catalog.clones_of(catalog.find(NAME.image).record.id)) == 2


def test_what_has_clones_is_refused_before_any_gateway_is_asked(
    etcd: MemoryEtcd, catalog: Catalog
) -> None:
    with_snapshot(etcd, catalog)
    catalog.clone_image(NAME, ImageName("vms", "b"))
    with running(etcd, "far", taken) as far:
        with pytest.raises(HasClones, match=r"vms/disk@s cannot go: a clone begins .*vms/b"):
            snapshots.remove(CONFIG, catalog, NAME)
        assert snapshots.roll_back(CONFIG, catalog, NAME, force=True)
    assert len(far.asked) == 1


def test_clone_of_a_name_that_exists_asks_no_gateway(etcd: MemoryEtcd, catalog: Catalog) -> None:
    with_snapshot(etcd, catalog)
    with pytest.raises(ImageExists):
        clones.create(CONFIG, catalog, NAME, NAME.image)
