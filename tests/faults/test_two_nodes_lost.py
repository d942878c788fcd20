"""Two of three nodes are lost: writes wait, reads go on, and all resumes by itself."""

from __future__ import annotations

import time
from concurrent.futures import TimeoutError as StillWaiting

import pytest

from tests.devcluster import DevCluster
from tests.faults.nbd_session import NbdSession

# Longer than the time after which a silent node is declared lost.
WAIT_S = 6.0


def test_writes_wait_while_two_nodes_are_down_and_resume_when_one_is_back(
    cluster: DevCluster,
) -> None:
    cluster.create("quorum", "16M")
    with NbdSession(cluster.url("quorum"), 5) as session:
        session.call("write", 0, 64, 1)
        session.call("flush")
        cluster.kill("node2")
        session.call("write", 0, 32, 2)
        cluster.kill("node3")
        waiting = session.submit("write", 0, 16, 3)
        with pytest.raises(StillWaiting):
            waiting.result(timeout=WAIT_S)
        assert session.call("read", 16, 32) == [2] * 16 + [1] * 16
        assert cluster.health() == "unavailable"
        cluster.run("node3")
        assert waiting.result(timeout=60) == []
        session.call("flush")
        assert session.call("read", 0, 64) == [3] * 16 + [2] * 16 + [1] * 32
        assert [entry["node"] for entry in cluster.info("quorum")["stale"]] == ["node2"]
    cluster.must_be_equal("quorum")
    with NbdSession(cluster.url("quorum"), 5) as session:
        assert session.call("read", 0, 64) == [3] * 16 + [2] * 16 + [1] * 32


def test_flush_waits_while_two_nodes_are_down(cluster: DevCluster) -> None:
    cluster.create("flush", "16M")
    with NbdSession(cluster.url("flush"), 6) as session:
        session.call("write", 0, 16, 1)
        cluster.kill("node1")
        cluster.kill("node2")
        waiting = session.submit("flush")
        with pytest.raises(StillWaiting):
            waiting.result(timeout=WAIT_S)
        cluster.run("all")
        assert waiting.result(timeout=60) == []
        assert session.call("read", 0, 16) == [1] * 16


def test_stale_node_that_comes_back_is_not_read_before_it_is_level(cluster: DevCluster) -> None:
    cluster.create("old", "16M")
    with NbdSession(cluster.url("old"), 7) as session:
        session.call("write", 0, 64, 1)
        session.call("flush")
        cluster.kill("node1")
        session.call("write", 0, 64, 2)
        session.call("flush")
        cluster.run("node1")
        cluster.await_nodes("up", "node1")
        for _ in range(5):
            assert session.call("read", 0, 64) == [2] * 64
            time.sleep(0.2)
    with NbdSession(cluster.url("old"), 7) as session:
        assert session.call("read", 0, 64) == [2] * 64
