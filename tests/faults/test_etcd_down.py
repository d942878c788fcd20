"""etcd is off the healthy path: while it is down, I/O that needs no membership change goes on."""

from __future__ import annotations

import time

from tests.devcluster import DevCluster
from tests.faults.nbd_session import NbdSession

# Past the lease time, after which a holder must ask its nodes before it answers a read.
OUTAGE_S = 13.0


def test_open_image_is_served_while_etcd_is_down_and_after_it_is_back(cluster: DevCluster) -> None:
    cluster.create("calm", "16M")
    with NbdSession(cluster.url("calm"), 9) as session:
        session.call("write", 0, 16, 1)
        cluster.kill("etcd")
        version = session.go_on(OUTAGE_S, 16)
        cluster.run("etcd")
        cluster.await_health("ok")
        session.call("write", 16, 16, 1)
        session.call("flush")
        cluster.kill("node3")
        session.call("write", 32, 16, 1)
        assert session.call("read", 0, 48) == [version] * 16 + [1] * 32
        assert [entry["node"] for entry in cluster.info("calm")["stale"]] == ["node3"]


def test_node_lost_while_etcd_is_down_stalls_writes_until_etcd_is_back(cluster: DevCluster) -> None:
    cluster.create("blind", "16M")
    with NbdSession(cluster.url("blind"), 10) as session:
        session.call("write", 0, 16, 1)
        cluster.kill("etcd")
        cluster.kill("node3")
        waiting = session.submit("write", 0, 16, 2)
        time.sleep(3)
        assert not waiting.done(), "answered although the record still calls node3 in sync"
        cluster.run("etcd")
        assert waiting.result(timeout=60) == []
        assert session.call("read", 0, 16) == [2] * 16
        assert [entry["node"] for entry in cluster.info("blind")["stale"]] == ["node3"]
