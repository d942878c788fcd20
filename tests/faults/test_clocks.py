"""Daemons whose clocks tell another time since boot than before, and than everybody else's.

Leases and the grace of nodes are counted on clocks that count from boot. A time namespace gives a
daemon that is started again any such clock, as another kernel would. The clock on the wall cannot
be moved for one process alone: that nothing asks it is what `tests/unit/test_clocks.py` holds.
"""

from __future__ import annotations

from random import Random

import pytest

from tests.faults.load import drawn_seed
from tests.faults.nbd_session import NbdError, NbdSession
from tests.faults.test_partition import STALL_S, await_stale, stale
from tests.hosts.cluster import HostCluster

LEASE_S = 10.0
FAR_S = 100 * 86400


def at(boot_s: int, monotonic_s: int) -> list[str]:
    """What to put before a command so that its clocks are so far ahead."""
    return [
        *("unshare", "--time", f"--boottime={boot_s}", f"--monotonic={monotonic_s}"),
        *("--fork", "--kill-child=SIGKILL", "--"),
    ]


def test_members_whose_clocks_jump_with_a_restart_keep_leases_and_replicas(
    hosts: HostCluster,
) -> None:
    chance = Random(drawn_seed())
    jumps = [chance.randrange(FAR_S) for _ in range(4)]
    hosts.create("jumps", "16M")
    with NbdSession(hosts.url_at("gateway2", "jumps"), 1) as session:
        session.call("write", 0, 64, 1)
        session.call("flush")
    hosts.kill_together(["gateway2", "node3"])
    hosts.run_together(["node3"], at(jumps[0], jumps[1]))
    hosts.run_together(["gateway2"], at(jumps[2], jumps[3]))
    with NbdSession(hosts.url_at("gateway2", "jumps"), 1) as session:
        assert stale(hosts, "jumps") == set()
        version = session.go_on(LEASE_S + 2, 64)
        # Its lease lives, by etcd's clock as by its own.
        with pytest.raises(NbdError):
            NbdSession(hosts.url_at("gateway1", "jumps"), 1)
        # Back again: time went backwards between two runs of one node.
        hosts.kill("node3")
        session.submit("write", 64, 64, 1).result(timeout=STALL_S)
        assert stale(hosts, "jumps") == {"node3"}
        hosts.run("node3")
        await_stale(hosts, "jumps", set())
    hosts.kill("gateway2")
    hosts.run("gateway2")
    with NbdSession(hosts.url_at("gateway2", "jumps"), 1) as session:
        assert session.call("read", 0, 128) == [version] * 64 + [1] * 64
    hosts.must_be_equal("jumps")
