"""A cluster on which a scenario is played by hand: nothing happens that is not told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest

from tests.sim.cluster import Cluster
from tests.sim.defects import breaking
from tests.sim.guest import Guest, Life
from tests.sim.oracle import SECTOR_BYTES, Violation
from tests.sim.shape import SHARD_BYTES, Shape

BLOCK = 8
"""Sectors of a block."""


class Stage:
    """Hosts with nodes and gateways; a guest runs on the first, and asks nothing by itself."""

    def __init__(self, seed: int = 1, **shape: Any) -> None:
        self.cluster = cluster = Cluster(seed, Shape(**shape))
        cluster.build()
        cluster.supervised = cluster.site.supervised = False
        for guest in cluster.guests:
            guest.busy, guest.lazy = False, True
        self.serve(0)

    @property
    def guest(self) -> Guest:
        """The guest of the first host."""
        return self.cluster.guests[0]

    def run(self, seconds: float) -> None:
        """Let time pass."""
        self.cluster.run_for(seconds)

    def until(self, done: Callable[[], bool], what: str, limit_s: float = 30.0) -> None:
        """Let time pass until something is so. Raises Violation: it never is."""
        if not self.cluster.run_for(limit_s, done):
            raise Violation(f"stuck: {what} is not so after {limit_s:g} s")

    def serve(self, host: int, limit_s: float = 30.0) -> None:
        """Boot the guest of a host, and wait until it is served."""
        guest = self.cluster.guests[host]
        self.cluster.boot(host)
        self.until(lambda: guest.life is Life.RUNNING, f"{guest.name} is served", limit_s)

    # What guests ask

    @staticmethod
    def at(shard: int, block: int = 0) -> int:
        """Return the first sector of a block of a shard."""
        return shard * SHARD_BYTES // SECTOR_BYTES + block * BLOCK

    def write(self, first: int, sectors: int = BLOCK, host: int = 0) -> None:
        """Have a guest write, and wait for its answer."""
        self.cluster.guests[host].write(first, sectors)
        self.answered(host)

    def flush(self, host: int = 0) -> None:
        """Have a guest flush, and wait for its answer."""
        self.cluster.guests[host].flush()
        self.answered(host)

    def read(self, first: int, sectors: int = BLOCK, host: int = 0) -> None:
        """Have a guest read, and wait for its answer, which is judged."""
        self.cluster.guests[host].read(first, sectors)
        self.answered(host)

    def answered(self, host: int = 0, limit_s: float = 30.0) -> None:
        """Wait until a guest has all its answers."""
        guest = self.cluster.guests[host]
        self.until(lambda: guest.in_flight == 0, f"{guest.name} is answered", limit_s)
        if guest.life is Life.FAILED:
            raise Violation(f"{guest.name} has lost its image")
        # What is asked next has surely begun after that.
        self.run(0.001)

    # What befalls them

    def kill(self, *nodes: int) -> None:
        """Kill nodes' processes."""
        for node in nodes:
            self.cluster.nodes.stop(node, power=False)

    def cut(self, *nodes: int) -> None:
        """Cut nodes' power."""
        for node in nodes:
            self.cluster.nodes.stop(node, power=True)

    def start(self, *nodes: int) -> None:
        """Start nodes."""
        for node in nodes:
            self.cluster.nodes.start(node)

    def hold(self, gateway: int, *nodes: int) -> None:
        """Hold back what a gateway sends to nodes."""
        for node in nodes:
            self.cluster.world.set_path(gateway, node, True, False)

    def let_go(self, gateway: int, *nodes: int) -> None:
        """Let it arrive."""
        for node in nodes:
            self.cluster.world.set_path(gateway, node, True, True)

    def hear_nothing(self, gateway: int, *nodes: int) -> None:
        """Hold back what nodes answer to a gateway."""
        for node in nodes:
            self.cluster.world.set_path(gateway, node, False, False)

    def hear_again(self, gateway: int, *nodes: int) -> None:
        """Let it arrive."""
        for node in nodes:
            self.cluster.world.set_path(gateway, node, False, True)

    def part_nodes(self, node: int) -> None:
        """Have a node hear nothing of others: what it is to be given comes through a gateway."""
        for other in range(self.cluster.shape.nodes):
            self.cluster.world.set_peer_path(other, node, False)

    def slow(self, gateway: int, node: int, milliseconds: int) -> None:
        """Have each frame between a gateway and a node take so long."""
        self.cluster.set_latency(gateway, node, *[milliseconds * 1_000_000] * 2)

    def isolate(self, host: int, *, etcd: bool = True) -> None:
        """Cut a host off with its own node."""
        cluster = self.cluster
        for gateway in range(cluster.shape.gateways):
            for node in range(cluster.shape.nodes):
                if (gateway == host) != (node == host):
                    cluster.world.set_path(gateway, node, True, False)
                    cluster.world.set_path(gateway, node, False, False)
        if etcd:
            for path in (cluster.gateway_paths[host], cluster.node_paths[host]):
                path.there = path.back = False

    def move_to(self, host: int) -> None:
        """Wait until the first lease has lapsed, and have the image served from another host."""
        self.run(11.0)
        self.serve(host)
        self.run(0.1)

    def stale(self) -> set[str]:
        """Return the nodes that are stale."""
        record = self.cluster.record
        assert record is not None
        return {node for nodes in record.stale.values() for node in nodes}

    def await_stale(self, *nodes: int) -> None:
        """Wait until exactly these nodes are stale."""
        names = {self.cluster.names[node] for node in nodes}
        self.until(lambda: self.stale() == names, f"{sorted(names)} are stale")

    # The end

    def settle(self) -> None:
        """End all faults: all must become level, be read as it was written, and be equal."""
        cluster = self.cluster
        cluster.mend()
        self.until(cluster.liveness.all_level, "all is level", 90.0)
        guest = cluster.serving()[0]
        for shard in range(cluster.shape.shards):
            guest.read(self.at(shard), BLOCK)
        self.until(lambda: guest.in_flight == 0, "all is read")
        cluster.safety.check()
        cluster.safety.check_all_replicas()


@contextmanager
def broken(
    *rules: str, patch: Callable[[], AbstractContextManager[Any]] = nullcontext, match: str = "."
) -> Iterator[None]:
    """Break rules, and expect the oracle to notice within."""
    with breaking(*rules), patch(), pytest.raises(Violation, match=match) as caught:
        yield
    print(f"noticed: {caught.value}")
