"""Two hosts with data and a third one with the arbiter, and the lines between them."""

from __future__ import annotations

import time
from concurrent.futures import TimeoutError as StillWaiting

import pytest

from tests.faults.nbd_session import NbdSession
from tests.faults.test_bad_lines import worsen
from tests.faults.test_fencing import LEASE_S, must_fail, must_not_be_answered
from tests.faults.test_partition import STALL_S, await_stale, stale
from tests.faults.test_silent import open_at
from tests.hosts.cluster import HostCluster
from tests.hosts.line import Line

WAIT_S = 4.0


@pytest.mark.parametrize("direction", ["to", "from"])
def test_arbiter_out_of_reach_is_missed_only_when_a_node_is_lost(
    arbiter_hosts: HostCluster, direction: str
) -> None:
    hosts, image = arbiter_hosts, f"votes-{direction}"
    hosts.create(image, "16M")
    with NbdSession(hosts.url_at("gateway1", image), 1) as session:
        ends = (["gateway1"], ["arbiter"]) if direction == "to" else (["arbiter"], ["gateway1"])
        hosts.network.cut(*ends)
        session.call("write", 0, 64, 1)
        session.call("flush")
        hosts.kill("node2")
        waiting = session.submit("write", 0, 64, 2)
        with pytest.raises(StillWaiting):
            waiting.result(timeout=WAIT_S)
        assert session.call("read", 64, 1) == [0]
        hosts.network.mend()
        assert waiting.result(timeout=STALL_S) == []
        assert stale(hosts, image) == {"node2"}
        hosts.run("node2")
        await_stale(hosts, image, set())
        assert session.call("read", 0, 64) == [2] * 64
    hosts.must_be_equal(image)


def test_far_arbiter_grants_in_time(arbiter_hosts: HostCluster) -> None:
    hosts = arbiter_hosts
    hosts.create("far", "16M")
    with NbdSession(hosts.url_at("gateway1", "far"), 1) as session:
        worsen(hosts, Line(delay_ms=500, loss=0.02), "arbiter", "gateway1", "gateway2")
        hosts.kill("node2")
        session.submit("write", 0, 64, 1).result(timeout=STALL_S)
        assert stale(hosts, "far") == {"node2"}
        hosts.run("node2")
        await_stale(hosts, "far", set())
    hosts.network.mend()
    hosts.must_be_equal("far")


def test_other_host_cut_off_is_left_behind_with_the_arbiters_grant(
    arbiter_hosts: HostCluster,
) -> None:
    hosts = arbiter_hosts
    hosts.create("other", "16M")
    with NbdSession(hosts.url_at("gateway1", "other"), 1) as session:
        session.call("write", 0, 64, 1)
        hosts.isolate(hosts.host("host2"))
        session.submit("write", 0, 64, 2).result(timeout=STALL_S)
        session.submit("flush").result(timeout=STALL_S)
        hosts.network.mend()
        await_stale(hosts, "other", set())
        assert session.call("read", 0, 64) == [2] * 64
    hosts.must_be_equal("other")


def test_own_host_cut_off_answers_nothing_and_the_other_one_goes_on(
    arbiter_hosts: HostCluster,
) -> None:
    """Both sides have one node; only the side with the arbiter may go on."""
    hosts = arbiter_hosts
    hosts.create("split", "16M")
    with NbdSession(hosts.url_at("gateway1", "split"), 1) as old:
        old.call("write", 0, 64, 1)
        old.call("flush")
        hosts.isolate(hosts.host("host1"))
        waiting = [old.submit("write", 0, 64, 2)]
        with open_at(hosts, "gateway2", "split") as new:
            waiting += [old.submit("read", 0, 64), old.submit("write", 64, 64, 4)]
            assert new.call("read", 0, 64) == [1] * 64
            new.call("write", 0, 64, 3)
            new.call("flush")
            time.sleep(1.5)
            must_not_be_answered(*waiting)
            hosts.network.mend()
            must_fail(*waiting, old.submit("read", 0, 64))
            await_stale(hosts, "split", set())
            assert new.call("read", 0, 128) == [3] * 64 + [0] * 64
    hosts.must_be_equal("split")


def test_data_hosts_cut_off_from_each_other_go_on_where_the_guest_is(
    arbiter_hosts: HostCluster,
) -> None:
    """Both reach arbiter and etcd. The holder of the lease leaves the other's node behind."""
    hosts = arbiter_hosts
    hosts.create("between", "16M")
    with NbdSession(hosts.url_at("gateway1", "between"), 1) as session:
        session.call("write", 0, 64, 1)
        hosts.network.part(hosts.host("host1"), hosts.host("host2"))
        session.submit("write", 0, 64, 2).result(timeout=STALL_S)
        time.sleep(LEASE_S / 2)
        session.call("write", 0, 64, 3)
        session.call("flush")
        assert stale(hosts, "between") == {"node2"}
        hosts.network.mend()
        await_stale(hosts, "between", set())
        assert session.call("read", 0, 64) == [3] * 64
    hosts.must_be_equal("between")
