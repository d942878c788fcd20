"""A gateway that loses etcd and nothing else: it serves until another one takes the image over."""

from __future__ import annotations

import time

import pytest

from tests.faults.test_fencing import LEASE_S, begin, must_fail
from tests.faults.test_silent import open_at
from tests.hosts.cluster import HostCluster


@pytest.mark.parametrize("direction", ["to", "from"])
def test_gateway_that_loses_etcd_only_is_fenced_by_the_nodes(
    hosts: HostCluster, direction: str
) -> None:
    with begin(hosts, f"no-etcd-{direction}") as old:
        ends = (["gateway1"], hosts.etcds) if direction == "to" else (hosts.etcds, ["gateway1"])
        hosts.network.cut(*ends)
        # Nobody else has it yet: it is served, past the lease's time as well.
        with open_at(hosts, "gateway2", f"no-etcd-{direction}") as new:
            late = [old.submit("read", 0, 64), old.submit("write", 0, 64, 2)]
            assert new.call("read", 0, 64) == [1] * 64
            new.call("write", 0, 64, 3)
            new.call("flush")
            late += [old.submit("read", 0, 64), old.submit("write", 0, 64, 4)]
            must_fail(*late)
            assert new.call("read", 0, 64) == [3] * 64
            hosts.network.mend()
            must_fail(old.submit("read", 0, 64), old.submit("write", 0, 64, 5))
            assert new.call("read", 0, 64) == [3] * 64
    hosts.must_be_equal(f"no-etcd-{direction}")


def test_gateway_that_loses_etcd_serves_while_nobody_else_takes_the_image(
    hosts: HostCluster,
) -> None:
    with begin(hosts, "alone") as session:
        hosts.network.part(["gateway1"], hosts.etcds)
        end = time.monotonic() + LEASE_S + 3
        version = 1
        while time.monotonic() < end:
            version += 1
            session.call("write", 0, 64, version)
            assert session.call("read", 0, 64) == [version] * 64
            time.sleep(0.2)
        hosts.network.mend()
        session.call("flush")
        assert session.call("read", 0, 64) == [version] * 64
    hosts.must_be_equal("alone")
