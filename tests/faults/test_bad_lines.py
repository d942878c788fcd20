"""Lines that are slow, or lose, double and reorder packets: slower, and nothing else."""

from __future__ import annotations

import time
from random import Random

import pytest

from tests.faults.load import drawn_seed, rounds
from tests.faults.nbd_session import NbdSession
from tests.faults.test_partition import STALL_S, await_stale, stale
from tests.faults.writing import await_progress, writing
from tests.hosts.cluster import HostCluster
from tests.hosts.line import Line

WRITE_S = 4.0


def worsen(hosts: HostCluster, line: Line, member: str, *others: str) -> None:
    """Makes the lines between a member and others bad, both directions."""
    hosts.network.set(line, [member], others)
    hosts.network.set(line, others, [member])


@pytest.mark.parametrize("delay_ms", [100, 500])
def test_far_node_is_waited_for_and_stays_in_sync(hosts: HostCluster, delay_ms: int) -> None:
    """Where slowness is no reason to leave a node behind: here a write may take seconds on it."""
    image, seed = f"far-{delay_ms}", drawn_seed()
    hosts.create(image, "16M")
    with (
        hosts.configured("[slow]\nleave_behind_ms = 0\n", "gateway1"),
        NbdSession(hosts.url_at("gateway1", image), seed) as session,
    ):
        worsen(hosts, Line(delay_ms=delay_ms), "node3", "gateway1", *hosts.etcds)
        with writing(session, seed) as writer:
            time.sleep(WRITE_S)
            await_progress(writer)
        assert stale(hosts, image) == set()
        assert writer.verify(session) == []
        # It is lost and comes back over the same line.
        hosts.kill("node3")
        session.submit("write", 0, 64, 1 << 20).result(timeout=STALL_S)
        hosts.run("node3")
        await_stale(hosts, image, set())
        hosts.network.mend()
    hosts.must_be_equal(image)


def test_lost_doubled_and_reordered_packets_cost_time_only(hosts: HostCluster) -> None:
    hosts.create("noise", "16M")
    for number in range(rounds(1)):
        seed = drawn_seed(number)
        loss = Random(seed).uniform(0.01, 0.05)
        line = Line(delay_ms=2, jitter_ms=1, loss=loss, duplicate=0.02, reorder=0.05)
        print(f"  {line}")
        with NbdSession(hosts.url_at("gateway1", "noise"), seed) as session:
            everybody = [name for name in hosts.members() if name != "gateway1"]
            worsen(hosts, line, "gateway1", *everybody)
            # What an earlier round left is not of this seed.
            for first in range(0, session.blocks, 1024):
                session.call("zero", first, 1024)
            with writing(session, seed) as writer:
                time.sleep(WRITE_S)
                print(f"  flushes are answered after {await_progress(writer):.2f} s")
            hosts.network.mend()
            await_stale(hosts, "noise", set())
            assert writer.verify(session) == []
        hosts.must_be_equal("noise")


def test_far_etcd_does_not_slow_requests_and_changes_go_through(hosts: HostCluster) -> None:
    hosts.create("far-etcd", "16M")
    with NbdSession(hosts.url_at("gateway1", "far-etcd"), 1) as session:
        for number, member in enumerate(hosts.etcds):
            worsen(hosts, Line(delay_ms=100), member, "gateway1", *hosts.etcds[number + 1 :])
        # Longer than its lease lives without a refresh.
        end = time.monotonic() + 12
        while time.monotonic() < end:
            session.call("write", 0, 64, 1)
            session.call("flush")
            time.sleep(0.2)
        hosts.kill("node2")
        session.submit("write", 0, 64, 2).result(timeout=STALL_S)
        assert stale(hosts, "far-etcd") == {"node2"}
        hosts.run("node2")
        await_stale(hosts, "far-etcd", set())
        assert session.call("read", 0, 64) == [2] * 64
    hosts.network.mend()
    hosts.must_be_equal("far-etcd")
