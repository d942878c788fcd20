"""Processes that fall silent without dying, and come back to a world that went on."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator

import pytest

from tests.devcluster import DevCluster
from tests.faults.nbd_session import NbdError, NbdSession
from tests.waiting import stop

# Longer than a lease lives, also where another leader of etcd gives it all its time again.
TAKE_OVER_TIMEOUT_S = 60.0


@pytest.fixture
def two() -> Iterator[DevCluster]:
    """A cluster with two gateways."""
    with DevCluster(gateways=2) as started:
        yield started


@contextlib.contextmanager
def silenced(cluster: DevCluster, member: str) -> Iterator[None]:
    """Stops a member's process for a while, without a word to anybody."""
    pid = int(cluster.members()[member]["pid"])
    stop(pid)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def open_at(cluster: DevCluster, gateway: str, image: str) -> NbdSession:
    """Opens an image whose lease another gateway may hold for a while yet."""
    deadline = time.monotonic() + TAKE_OVER_TIMEOUT_S
    while True:
        try:
            return NbdSession(cluster.url_at(gateway, image), 1)
        except NbdError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.3)


def test_silent_node_is_left_behind_and_not_read_before_it_is_level(cluster: DevCluster) -> None:
    cluster.create("silent", "16M")
    with NbdSession(cluster.url("silent"), 1) as session:
        session.call("write", 0, 64, 1)
        session.call("flush")
        with silenced(cluster, "node1"):
            session.call("write", 0, 64, 2)
            session.call("flush")
            assert session.call("read", 0, 64) == [2] * 64
            assert [entry["node"] for entry in cluster.info("silent")["stale"]] == ["node1"]
        for version in range(3, 8):
            session.call("write", 0, 64, version)
            assert session.call("read", 0, 64) == [version] * 64
            time.sleep(0.2)
        session.call("flush")
    cluster.must_be_equal("silent")
    with NbdSession(cluster.url("silent"), 1) as session:
        assert session.call("read", 0, 64) == [7] * 64


def test_silent_gateway_is_fenced_and_its_client_told(two: DevCluster) -> None:
    two.create("fenced", "16M")
    with NbdSession(two.url_at("gateway1", "fenced"), 1) as old:
        old.call("write", 0, 64, 1)
        old.call("flush")
        with silenced(two, "gateway1"):
            # Sent before the other gateway took over, read by its process only afterwards.
            late = [old.submit("write", 0, 64, 2), old.submit("read", 0, 64)]
            new = open_at(two, "gateway2", "fenced")
            assert new.call("read", 0, 64) == [1] * 64
            new.call("write", 0, 64, 3)
            new.call("flush")
        with new:
            for answer in (*late, old.submit("write", 0, 64, 4), old.submit("flush")):
                with pytest.raises(NbdError):
                    answer.result(timeout=60)
            assert new.call("read", 0, 64) == [3] * 64
            new.call("write", 64, 64, 5)
            assert new.call("read", 0, 128) == [3] * 64 + [5] * 64
    two.must_be_equal("fenced")


def test_all_nodes_silent_for_a_while_gives_no_error(cluster: DevCluster) -> None:
    cluster.create("pause", "16M")
    with NbdSession(cluster.url("pause"), 1) as session:
        session.call("write", 0, 64, 1)
        with contextlib.ExitStack() as stack:
            for node in cluster.nodes:
                stack.enter_context(silenced(cluster, node))
            waiting = session.submit("write", 0, 64, 2)
            time.sleep(7)
            assert not waiting.done()
        assert waiting.result(timeout=60) == []
        session.call("flush")
        assert session.call("read", 0, 64) == [2] * 64
    cluster.must_be_equal("pause")
    with NbdSession(cluster.url("pause"), 1) as session:
        assert session.call("read", 0, 64) == [2] * 64
