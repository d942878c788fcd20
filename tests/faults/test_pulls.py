"""Heals whose data goes from node to node, and lines between nodes that fail."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.devcluster import DevCluster
from tests.faults.nbd_session import NbdSession
from tests.faults.test_heal import (
    BLOCK_BYTES,
    RUN_BLOCKS,
    await_in_sync,
    copies,
    fill,
    healed,
    slow_heal,
    stale,
)
from tests.faults.test_metrics import Metrics
from tests.faults.test_partition import await_stale
from tests.faults.test_silent import open_at
from tests.hosts.cluster import HostCluster
from tests.waiting import until

SIZE = "64M"
BLOCKS = (64 << 20) // BLOCK_BYTES
ASK = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1]).read().decode())"


class HostMetrics(Metrics):
    """What a member says when it is asked from outside all hosts."""

    def __init__(self, hosts: HostCluster, kind: str, name: str) -> None:
        super().__init__(hosts, kind, name)
        self._command = [*hosts.around(), sys.executable, "-c", ASK, self._url]

    def text(self) -> str:
        return subprocess.run(
            self._command, capture_output=True, check=True, text=True, timeout=60
        ).stdout


def pulled_and_copied(node: Metrics) -> tuple[float, float]:
    """Bytes that a node has had of others since it started: by itself, and in all."""
    pulled = node.of("hci_node_pulled_bytes_total")
    copied = node.of("hci_node_copied_bytes_total")
    assert pulled is not None and copied is not None
    return pulled, copied


def served_to_peers(cluster: DevCluster) -> float:
    """What the nodes that stay up have given to others."""
    said = [Metrics(cluster, "node", name) for name in ("node1", "node3")]
    return sum(node.of("hci_node_served_to_peers_bytes_total") or 0 for node in said)


def test_heal_moves_no_data_through_the_gateway(cluster: DevCluster) -> None:
    cluster.create("direct", SIZE)
    with NbdSession(cluster.url("direct"), 1) as session:
        fill(session, 1, blocks=BLOCKS)
        served = served_to_peers(cluster)
        cluster.kill("node2")
        fill(session, 2, blocks=BLOCKS, every=2)
        cluster.run("node2")
        await_in_sync(cluster, "direct")
        moved = healed(cluster, "direct")["bytes_done"]
        node = Metrics(cluster, "node", "node2")
        pulled = node.of("hci_node_pulled_bytes_total") or 0
        # A busy machine may be late once; all else came from the others by itself.
        assert pulled >= 0.9 * moved >= 0.9 * (64 << 20) / 2
        assert node.of("hci_node_copied_bytes_total") == moved
        assert pulled <= served_to_peers(cluster) - served <= 1.1 * moved
    cluster.must_be_equal("direct")


@pytest.mark.parametrize("ways", ["both", "to", "from"])
def test_node_that_does_not_reach_the_others_is_healed_through_the_gateway(
    hosts: HostCluster, ways: str
) -> None:
    image = f"apart-{ways}"
    hosts.create(image, SIZE)
    with NbdSession(hosts.url_at("gateway1", image), 1) as session:
        fill(session, 1, blocks=BLOCKS)
        hosts.kill("node2")
        fill(session, 2, blocks=BLOCKS, every=2)
        assert stale(hosts, image) == ["node2"]
        others = ["node1", "node3"]
        if ways in ("both", "to"):
            hosts.network.cut(["node2"], others)
        if ways in ("both", "from"):
            hosts.network.cut(others, ["node2"])
        hosts.run("node2")
        await_stale(hosts, image, set())
        pulled, copied = pulled_and_copied(HostMetrics(hosts, "node", "node2"))
        assert pulled == 0 < copied
        gateway, unreached = (
            HostMetrics(hosts, "gateway", "gateway1"),
            "hci_gateway_pulls_unreached_total",
        )
        assert any(gateway.above_zero(unreached, source=s, target="node2") for s in others)
        hosts.network.mend()
        for first in range(0, BLOCKS, RUN_BLOCKS):
            version = 2 if first % (2 * RUN_BLOCKS) == 0 else 1
            assert session.call("read", first, RUN_BLOCKS) == [version] * RUN_BLOCKS
    hosts.must_be_equal(image)


def test_line_between_nodes_that_fails_in_the_midst_of_a_heal_does_not_stop_it(
    hosts: HostCluster,
) -> None:
    hosts.create("midst", SIZE)
    with slow_heal(hosts, "4M"):
        with NbdSession(hosts.url_at("gateway1", "midst"), 1) as session:
            fill(session, 1, blocks=BLOCKS)
            hosts.kill("node2")
            fill(session, 2, blocks=BLOCKS, every=2)
            hosts.run("node2")
            until("a heal is under way", lambda: copies(hosts, "midst"))
            hosts.network.part(["node2"], ["node1", "node3"])
            # Beside it a client writes, to shards that are level and to others.
            for first in range(0, BLOCKS, 16 * RUN_BLOCKS):
                session.call("write", first, 1, 3)
            await_stale(hosts, "midst", set())
            pulled, copied = pulled_and_copied(HostMetrics(hosts, "node", "node2"))
            # It was under way as the line failed, and went on through the gateway.
            assert 0 < pulled < copied
            hosts.network.mend()
    hosts.must_be_equal("midst")


def test_holder_that_dies_in_a_heal_from_node_to_node_is_followed_by_one_that_ends_it() -> None:
    with DevCluster(gateways=2) as two:
        two.create("taken", SIZE)
        with slow_heal(two, "8M"):
            with NbdSession(two.url("taken"), 1) as session:
                fill(session, 1, blocks=BLOCKS)
                two.kill("node2")
                fill(session, 2, blocks=BLOCKS)
                two.run("node2")
                until("a heal is under way", lambda: copies(two, "taken"))
                pulled, _ = pulled_and_copied(Metrics(two, "node", "node2"))
                assert pulled > 0
                two.kill("gateway1")
            with open_at(two, "gateway2", "taken") as session:
                fill(session, 3, blocks=BLOCKS, every=4)
                await_in_sync(two, "taken")
                two.kill("node1")
                for first in range(0, BLOCKS, RUN_BLOCKS):
                    version = 3 if first % (4 * RUN_BLOCKS) == 0 else 2
                    assert session.call("read", first, RUN_BLOCKS) == [version] * RUN_BLOCKS
                two.run("node1")
            two.run("gateway1")
        two.await_health("ok")
        two.must_be_equal("taken")
