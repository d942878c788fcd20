"""Clusters of several hosts, for faults of the network.

As with the clusters of one machine, starting one takes seconds, so that tests hand theirs on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.conftest import failed
from tests.faults.befalling import hosts_with_a_disk
from tests.faults.test_failing_disk import Disk
from tests.hosts.cluster import HostCluster


@pytest.fixture(scope="module")
def _kept_hosts() -> Iterator[dict[str, HostCluster]]:
    kept: dict[str, HostCluster] = {}
    yield kept
    for left in kept.values():
        _end(left)


@pytest.fixture
def hosts(
    request: pytest.FixtureRequest, _kept_hosts: dict[str, HostCluster]
) -> Iterator[HostCluster]:
    """Three hosts with etcd and a node each, two of them with a gateway, all lines whole."""
    yield from _lent(request, _kept_hosts, "three", lambda: HostCluster(gateways=2))


@pytest.fixture
def hosts_and_disk() -> Iterator[tuple[HostCluster, Disk]]:
    """The same for one test alone, whose third node has a disk that can fail."""
    with hosts_with_a_disk() as found:
        yield found


@pytest.fixture
def arbiter_hosts(
    request: pytest.FixtureRequest, _kept_hosts: dict[str, HostCluster]
) -> Iterator[HostCluster]:
    """Two hosts with etcd, a node and a gateway each; on a third etcd and the arbiter."""
    yield from _lent(
        request,
        _kept_hosts,
        "arbiter",
        lambda: HostCluster(nodes=2, gateways=2, arbiter=True),
    )


def _lent(
    request: pytest.FixtureRequest,
    kept: dict[str, HostCluster],
    kind: str,
    make: Callable[[], HostCluster],
) -> Iterator[HostCluster]:
    lent = kept.pop(kind, None)
    if lent is None:
        lent = make()
    try:
        if not lent.config.exists():
            lent.start()
        yield lent
        if not failed(request.node):
            lent.mend()
            kept[kind] = lent
            return
    except BaseException:
        lent.print_logs()
        lent.close()
        raise
    lent.print_logs()
    _end(lent)


def _end(cluster: HostCluster) -> None:
    cluster.close()
    assert cluster.processes() == [], "the cluster left processes behind"
