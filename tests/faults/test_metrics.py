"""What daemons tell Prometheus of a heal, a levelling and a scrub, as they go on and afterwards."""

from __future__ import annotations

import time
import tomllib
import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from tests.devcluster import POOL, DevCluster
from tests.faults.nbd_session import NbdSession
from tests.waiting import stop, until

IMAGE = f"{POOL}/told"
SIZE = "32M"
RUN_BLOCKS = 256
RUNS = 32
"""Of a mebibyte each: the whole image."""

SLOWLY = """
[heal]
bytes_per_second = "2M"
shards_at_once = 1

[scrub]
bytes_per_second = "8M"
"""
"""So that they are under way for some seconds."""

A_WHILE_S = 600.0
"""What was through in this test was not through longer ago."""


class Metrics:
    """What a member says when it is asked."""

    def __init__(self, cluster: DevCluster, kind: str, name: str) -> None:
        address = tomllib.loads(cluster.config.read_text())[kind][name]["metrics"]
        self._url = f"http://{address}/metrics"

    def of(self, metric: str, **labels: str) -> float | None:
        """One value; None where it is not told."""
        for family in text_string_to_metric_families(self.text()):
            for sample in family.samples:
                if sample.name == metric and sample.labels == labels:
                    return float(sample.value)
        return None

    def text(self) -> str:
        """All that it says."""
        with urllib.request.urlopen(self._url, timeout=60) as answer:
            said: str = answer.read().decode()
        return said

    def above_zero(self, metric: str, **labels: str) -> bool:
        """Whether it is told, and something."""
        return (self.of(metric, **labels) or 0) > 0


def fill(session: NbdSession, version: int, every: int = 1) -> None:
    """Writes each `every`th run of the image, and flushes."""
    for run in range(0, RUNS, every):
        session.call("write", run * RUN_BLOCKS, RUN_BLOCKS, version)
    session.call("flush")


def test_heal_levelling_and_scrub_are_told_as_they_go_on(cluster: DevCluster) -> None:
    cluster.create("told", SIZE)
    with cluster.configured(SLOWLY, "gateway1"):
        gateway = Metrics(cluster, "gateway", "gateway1")
        node = Metrics(cluster, "node", "node2")
        assert gateway.of("hci_gateway_registered") == 1
        assert gateway.of("hci_gateway_images_lost_total") == 0
        assert node.of("hci_node_registered") == 1
        _heal(cluster, gateway, node)
        _level(cluster, gateway)
        _scrub(cluster, gateway)
        cluster.must_be_equal("told")


def _heal(cluster: DevCluster, gateway: Metrics, node: Metrics) -> None:
    with NbdSession(cluster.url("told"), 1) as session:
        fill(session, 1)
        cluster.kill("node2")
        fill(session, 2, every=2)
        assert gateway.of("hci_gateway_link_up", node="node2") == 0
        assert gateway.of("hci_image_stale", image=IMAGE, node="node2") == 1
        generation = gateway.of("hci_image_generation", image=IMAGE)
        cluster.run("node2")
        whose = {"image": IMAGE, "node": "node2"}
        until("a heal copies", lambda: gateway.above_zero("hci_heal_bytes_done", **whose))
        assert gateway.above_zero("hci_heal_bytes_left", **whose)
        until("it is done", lambda: gateway.of("hci_heals_total", end="done") == 1)
        assert generation is not None
        assert gateway.of("hci_image_generation", image=IMAGE) == generation + 1
        assert gateway.of("hci_image_stale", **whose) is None
        missed_bytes = RUNS / 2 * (1 << 20)
        copied = gateway.of("hci_heal_copied_bytes_total")
        assert copied is not None and missed_bytes <= copied <= 1.1 * missed_bytes
        assert node.of("hci_node_copied_bytes_total") == copied
        pulled = node.of("hci_node_pulled_bytes_total")
        assert pulled is not None and pulled > 0.9 * copied


def _level(cluster: DevCluster, gateway: Metrics) -> None:
    """The gateway dies with writes that one node has not heard of, which dies too."""
    before = Metrics(cluster, "node", "node1").of("hci_node_bytes_total", direction="written") or 0
    session = NbdSession(cluster.url("told"), 1)
    try:
        session.call("write", 0, 1, 3)
        stop(int(cluster.members()["node3"]["pid"]))
        for run in range(0, RUNS, 2):
            session.submit("write", run * RUN_BLOCKS, RUN_BLOCKS, 3)
        written = RUNS / 2 * (1 << 20)
        node1 = Metrics(cluster, "node", "node1")
        until(
            "the others have them",
            lambda: (
                (node1.of("hci_node_bytes_total", direction="written") or 0) - before >= written
            ),
        )
        cluster.kill("gateway1")
        cluster.kill("node3")
    finally:
        session.close()
    cluster.run("node3")
    cluster.run("gateway1")
    with NbdSession(cluster.url("told"), 1):
        left = "hci_levelling_shards_left"
        until("shards are levelled", lambda: gateway.above_zero(left, image=IMAGE))
        until("all are", lambda: not gateway.above_zero(left, image=IMAGE))


def _scrub(cluster: DevCluster, gateway: Metrics) -> None:
    cluster.await_health("ok")
    finished = "hci_scrub_finished_timestamp_seconds"
    assert not gateway.above_zero(finished, image=IMAGE)
    cluster.hci("scrub", "start", IMAGE)
    until("it reads", lambda: gateway.above_zero("hci_scrub_read_bytes", image=IMAGE))
    assert gateway.above_zero("hci_scrub_shards_left", image=IMAGE)
    until("it is through", lambda: gateway.above_zero(finished, image=IMAGE))
    at = gateway.of(finished, image=IMAGE)
    assert at is not None and abs(time.time() - at) < A_WHILE_S
    for kind in ("unrepairable", "undecided"):
        assert gateway.of("hci_scrub_bad_blocks", image=IMAGE, kind=kind) == 0
