"""A node that answers, and much later than the others: reported, past a limit left behind, healed.

Its process is stopped and continued all the time, each time for less than would count as silent:
what is asked of it waits as for a disk that is worn out.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.devcluster import DevCluster
from tests.faults.nbd_session import NbdSession
from tests.waiting import until, wants_a_processor

pytestmark = pytest.mark.timeout(900)

STOPPED_S = 0.8
RUNNING_S = 0.02
LET_RUN_S = 0.3
VICTIM = "node2"
# Rests grow each time that the node is still slow when it is healed.
WITHIN_S = 180.0


@contextlib.contextmanager
def slow(cluster: DevCluster, node: str) -> Iterator[None]:
    """Has a node's process run for a moment now and then."""
    pid = int(cluster.members()[node]["pid"])
    enough = threading.Event()

    def pulse() -> None:
        while not enough.is_set():
            os.kill(pid, signal.SIGSTOP)
            time.sleep(STOPPED_S)
            os.kill(pid, signal.SIGCONT)
            time.sleep(RUNNING_S)
            # It would count as silent where a busy machine never lets it run in between.
            deadline = time.monotonic() + LET_RUN_S
            while wants_a_processor(pid) and time.monotonic() < deadline:
                time.sleep(0.005)

    pulsing = threading.Thread(target=pulse)
    pulsing.start()
    try:
        yield
    finally:
        enough.set()
        pulsing.join()


def limits(cluster: DevCluster, leave_behind_ms: int) -> contextlib.AbstractContextManager[None]:
    """What counts as slow, so that a test need not wait for it."""
    chosen = f"report_ms = 100\nleave_behind_ms = {leave_behind_ms}\nfor_s = 4\nback_after_s = 5\n"
    return cluster.configured(f"[slow]\n{chosen}", "gateway1")


@contextlib.contextmanager
def writing(session: NbdSession) -> Iterator[list[float]]:
    """Writes and flushes all the time; yields how long each round took."""
    took_s: list[float] = []
    failed: list[BaseException] = []
    enough = threading.Event()

    def write() -> None:
        version = 0
        try:
            while not enough.is_set():
                version += 1
                began_s = time.monotonic()
                session.call("write", 0, 64, version)
                session.call("flush")
                took_s.append(time.monotonic() - began_s)
                assert session.call("read", 0, 64) == [version] * 64
        except BaseException as error:  # noqa: BLE001 - it is the test's
            failed.append(error)

    running = threading.Thread(target=write)
    running.start()
    try:
        yield took_s
    finally:
        enough.set()
        running.join()
        assert not failed, failed


def stale(cluster: DevCluster) -> list[str]:
    return [entry["node"] for entry in cluster.info("disk")["stale"]]


def logged(cluster: DevCluster, event: str) -> int:
    """How often the gateway has told this of the victim."""
    log = Path(cluster.members()["gateway1"]["log"]).read_text()
    return sum(f"event={event} " in line and VICTIM in line for line in log.splitlines())


def test_slow_node_is_reported_and_stays(cluster: DevCluster) -> None:
    cluster.create("disk", "16M")
    with limits(cluster, 0), NbdSession(cluster.url("disk"), 1) as session, writing(session):
        with slow(cluster, VICTIM):
            told = f"{VICTIM} is slow"
            until("status tells it", lambda: told in cluster.hci("status"), WITHIN_S)
            assert cluster.health() == "degraded"
            assert stale(cluster) == []
        # While there are writes: an image that is let go tells nothing any more.
        until("it is quick again", lambda: logged(cluster, "replica_not_slow") > 0, WITHIN_S)
        until("status tells it", lambda: told not in cluster.hci("status"), WITHIN_S)
    assert logged(cluster, "replica_slow")
    cluster.await_health("ok")
    cluster.must_be_equal("disk")


def test_too_slow_node_is_left_behind_and_healed_when_it_is_quick_again(
    cluster: DevCluster,
) -> None:
    cluster.create("disk", "16M")
    with limits(cluster, 300), NbdSession(cluster.url("disk"), 1) as session:
        with writing(session) as took_s:
            with slow(cluster, VICTIM):
                until("it is left behind", lambda: stale(cluster) == [VICTIM], WITHIN_S)
                before = len(took_s)
                until("clients go on", lambda: len(took_s) >= before + 20, WITHIN_S)
                assert min(took_s[before:]) < STOPPED_S / 4, "nobody waits for it"
            until("it is healed", lambda: stale(cluster) == [], WITHIN_S)
            before = len(took_s)
            until("clients go on", lambda: len(took_s) >= before + 20, WITHIN_S)
        assert logged(cluster, "slow_replica_left_behind")
    cluster.await_health("ok")
    cluster.must_be_equal("disk")
