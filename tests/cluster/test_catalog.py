"""The catalog and the lease holder's transactions on a real etcd, from end to end."""

import contextlib
import threading
import time

import pytest

from etcd.client import EtcdClient
from etcd.errors import EtcdUnavailable, LeaseNotFound
from etcd.interface import Notice, Reread
from etcd.lease import Session
from etcd.records import NodeRecord
from shard.membership import Change, lose
from tests.cluster.etcd_server import EtcdServer
from tests.unit.etcd.contract import HANG_S, Notices, put
from vmstore.catalog import Catalog
from vmstore.errors import InUse, LeaseLost, UnknownImage
from vmstore.names import parse_image_name

GIB = 1 << 30


def node(number: int) -> NodeRecord:
    return NodeRecord(
        name=f"node{number}",
        address=f"127.0.0.1:{7100 + number}",
        control=f"127.0.0.1:{7200 + number}",
        socket=f"/run/node{number}.sock",
        host=f"host{number}",
        zone="default",
        labels={},
        capacity_bytes=1 << 40,
        store_id=f"{number:032x}",
        start_counter=1,
    )


def test_image_from_creation_to_deletion(etcd_server: EtcdServer) -> None:
    with contextlib.closing(EtcdClient([etcd_server.endpoint])) as etcd:
        catalog = Catalog(etcd)
        catalog.init_cluster("c" * 32)
        for number in (1, 2, 3):
            catalog.announce_node(node(number), etcd.grant_lease(60))
        catalog.create_pool("vms")
        name = parse_image_name("vms/guests/größe")
        image = catalog.create_image(name, GIB)
        assert catalog.find(name) == image

        first = etcd.grant_lease(60)
        held = catalog.take_lease(image, gateway="gateway1", holder="1" * 32, etcd_lease=first)
        with pytest.raises(InUse, match="gateway1"):
            catalog.delete_image(name)
        plan = lose(held.record.membership, {"node2"})
        assert isinstance(plan, Change)
        held = catalog.change_membership(held, plan.membership)
        held = catalog.resize(held, 2 * GIB)
        assert catalog.find(name) == held.image

        etcd.revoke_lease(first)
        with pytest.raises(LeaseLost):
            catalog.resize(held, 3 * GIB)
        second = etcd.grant_lease(60)
        held = catalog.retake_lease(held, second)
        catalog.release(held, clean=True)
        assert catalog.find(name).record.clean
        assert catalog.leases() == {}

        catalog.delete_image(name)
        with pytest.raises(UnknownImage):
            catalog.find(name)
        assert list(catalog.tombstones()) == [image.record.id]


def test_session_outlives_a_restart_of_etcd(etcd_server: EtcdServer) -> None:
    lost, renewed = threading.Event(), threading.Semaphore(0)
    with contextlib.closing(EtcdClient([etcd_server.endpoint])) as etcd:
        session = Session(
            etcd, on_lost=lost.set, on_renewed=lambda _: renewed.release(), ttl_s=3
        ).start()
        put(etcd, "/hci/alive/n", b"1", session.lease)
        assert renewed.acquire(timeout=HANG_S)
        etcd_server.kill()
        with pytest.raises(EtcdUnavailable):
            etcd.refresh_lease(session.lease)
        etcd_server.start()
        while renewed.acquire(blocking=False):
            pass
        assert renewed.acquire(timeout=HANG_S)
        assert session.remaining_s() > 0
        assert etcd.get("/hci/alive/n") is not None
        session.close()
        assert etcd.get("/hci/alive/n") is None
    assert not lost.is_set()


def test_session_whose_lease_is_revoked_is_told(etcd_server: EtcdServer) -> None:
    lost = threading.Event()
    with contextlib.closing(EtcdClient([etcd_server.endpoint])) as etcd:
        session = Session(etcd, on_lost=lost.set, ttl_s=3).start()
        etcd.revoke_lease(session.lease)
        assert lost.wait(HANG_S)
        with pytest.raises(LeaseNotFound):
            etcd.refresh_lease(session.lease)
        session.close()


def test_lease_never_ends_in_etcd_before_its_session_says(etcd_server: EtcdServer) -> None:
    """The session counts from sending, so its end comes first."""
    gone_s: list[float] = []
    seen = Notices()

    def on_notice(notice: Notice) -> None:
        if not isinstance(notice, Reread) and any(c.value is None for c in notice.changes):
            gone_s.append(time.clock_gettime(time.CLOCK_BOOTTIME))
        seen(notice)

    with contextlib.closing(EtcdClient([etcd_server.endpoint])) as etcd:
        session = Session(etcd, on_lost=lambda: None, ttl_s=4)
        put(etcd, "/hci/alive/n", b"1", session.lease)
        etcd.watch("/hci/alive/", on_notice)
        assert session.renew()
        seen.wait_for_content({"/hci/alive/n": b"1"})
        seen.wait_for_content({})
        assert session.deadline_s <= gone_s[0]
