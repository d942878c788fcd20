"""Faults, each with what ends it. A history calls them by their names in its kind.

Those that meet a heal or an admission stand in `heal_faults.py`, the arbiter's in
`arbiter_faults.py`, and faults that follow one another in `strikes.py`.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from etcd.memory import Backup
from tests.sim.cluster import Cluster
from tests.sim.guest import BLOCK_BYTES, Life
from tests.sim.processes import SimNode
from tests.sim.shape import SHARD_BYTES


class Faults:
    """What may befall a cluster. Each ends by itself, at the latest when all are mended."""

    def __init__(self, cluster: Cluster, chance: random.Random) -> None:
        self.cluster = cluster
        self.chance = chance
        self._victim = chance.randrange(cluster.shape.nodes)
        """The one node whose disk may rot, or be swapped."""
        self._snapshot_of: SimNode | None = None
        self._backup: Backup | None = None
        self._away_until_s = 0.0
        """Until when no guest is booted."""
        self._over = False
        """No more faults begin."""
        self._strikes: list[Callable[[str], None]] = []
        """What waits for a heal to begin; each gets the name of the node that is healed."""
        self._at_event: dict[str, list[Callable[[int, str], None]]] = {}
        """What waits for an event of an engine; each gets the gateway and the event's node."""
        cluster.on_heal = self._heal_begins
        cluster.on_event = self._event

    def _heal_begins(self, node: str) -> None:
        strikes, self._strikes = self._strikes, []
        for strike in strikes:
            pause_s = self.chance.choice((0.004, 0.02, 0.1, 0.5)) * self.chance.random()
            self.cluster.clock.after(pause_s, lambda strike=strike: strike(node))

    def _event(self, gateway: int, kind: str, node: str) -> None:
        if not self._over:
            for strike in self._at_event.pop(kind, []):
                strike(gateway, node)

    def _soon(self, act: Callable[[], None], at_most_s: float) -> None:
        pause_s = self.chance.random() * at_most_s
        self.cluster.clock.after(pause_s, lambda: self._over or act())

    def _node(self) -> int:
        return self.chance.randrange(self.cluster.shape.nodes)

    def _gateway(self) -> int:
        return self.chance.randrange(self.cluster.shape.gateways)

    def _for_a_while(self, undo: Callable[[], None], *choices: float) -> None:
        self.cluster.clock.after(self.chance.choice(choices), undo)

    def kill_node(self) -> None:
        self.cluster.nodes.stop(self._node(), power=False)

    def cut_node(self) -> None:
        self.cluster.nodes.stop(self._node(), power=True)

    def cut_all(self) -> None:
        for node in range(self.cluster.shape.nodes):
            self.cluster.nodes.stop(node, power=True)

    def crash_node(self) -> None:
        """Somewhere in the midst of what its store does."""
        node, power = self._node(), self.chance.random() < 0.5
        self.cluster.world.crash_after(node, self.chance.randrange(1, 60), power)

    def pause_node(self) -> None:
        node = self._node()
        self.cluster.nodes.pause(node)
        self._for_a_while(lambda: self.cluster.nodes.go_on(node), 0.5, 3.0, 6.0)

    def kill_gateway(self) -> None:
        self.cluster.stop_gateway(self._gateway(), host=False)

    def cut_host(self) -> None:
        self.cluster.stop_gateway(self._gateway(), host=True)

    def pause_gateway(self) -> None:
        gateway = self._gateway()
        self.cluster.pause_gateway(gateway)
        self._for_a_while(lambda: self.cluster.continue_gateway(gateway), 1.0, 5.0, 12.0, 20.0)

    def second(self) -> None:
        """A guest is started on another host although one may run."""
        self.cluster.boot(self._gateway())

    def _cut_path(self, gateway: int, node: int, ways: str, length_s: float) -> None:
        cluster = self.cluster
        cluster.say(f"gate-{gateway} and {cluster.names[node]} are cut off ({ways})")
        for to_node in (True, False):
            if ways in ("both", "there" if to_node else "back"):
                cluster.world.set_path(gateway, node, to_node, False)

        def undo() -> None:
            cluster.world.set_path(gateway, node, True, True)
            cluster.world.set_path(gateway, node, False, True)

        cluster.clock.after(length_s, undo)

    def _cut_peers(self, node: int, other: int, ways: str, length_s: float) -> None:
        cluster = self.cluster
        cluster.say(f"{cluster.names[node]} and {cluster.names[other]} are cut off ({ways})")
        for asking, asked in ((node, other), (other, node)):
            if ways in ("both", "there" if asking == node else "back"):
                cluster.world.set_peer_path(asking, asked, False)

        def undo() -> None:
            cluster.world.set_peer_path(node, other, True)
            cluster.world.set_peer_path(other, node, True)

        cluster.clock.after(length_s, undo)

    def partition_peers(self) -> None:
        """Two nodes do not reach each other, while gateways reach both."""
        ways = self.chance.choice(("both", "there", "back"))
        length_s = self.chance.choice((0.3, 2.0, 5.0, 12.0))
        self._cut_peers(self._node(), self._node(), ways, length_s)

    def slow_peers(self) -> None:
        """What a node fetches from another one takes long."""
        cluster, asking, asked = self.cluster, self._node(), self._node()
        slow_ns = self.chance.choice((5_000_000, 60_000_000, 600_000_000))
        cluster.say(
            f"{cluster.names[asking]} from {cluster.names[asked]}: up to {slow_ns / 1e6:.0f} ms"
        )
        cluster.world.set_peer_latency(asked, asking, 50_000, slow_ns)
        self._for_a_while(
            lambda: cluster.world.set_peer_latency(asked, asking, 50_000, 1_000_000), 2.0, 8.0
        )

    def partition(self) -> None:
        ways = self.chance.choice(("both", "there", "back"))
        length_s = self.chance.choice((0.3, 2.0, 5.0, 12.0))
        self._cut_path(self._gateway(), self._node(), ways, length_s)

    def isolate(self) -> None:
        """A host's gateway reaches its own node only, or not even that."""
        gateway, length_s = self._gateway(), self.chance.choice((2.0, 6.0, 15.0))
        ways = self.chance.choice(("both", "there", "back"))
        for node in range(self.cluster.shape.nodes):
            if node != gateway or self.chance.random() < 0.2:
                self._cut_path(gateway, node, ways, length_s)
        if self.chance.random() < 0.5:
            self._cut_etcd_of(self.cluster.gateway_paths[gateway], f"gate-{gateway}", length_s)

    def split(self) -> None:
        """A host is alone with its node; its guest is started elsewhere once the lease is over."""
        cluster, alone = self.cluster, self._gateway()
        serving = [host for host, guest in enumerate(cluster.guests) if guest.life is Life.RUNNING]
        if serving and self.chance.random() < 0.8:
            alone = serving[0]
        length_s = self.chance.choice((8.0, 25.0, 30.0))
        for gateway in range(cluster.shape.gateways):
            for node in range(cluster.shape.nodes):
                if (gateway == alone) != (node == alone):
                    self._cut_path(gateway, node, "both", length_s)
        for node in range(cluster.shape.nodes):
            if node != alone:
                self._cut_peers(alone, node, "both", length_s)
        self._cut_etcd_of(cluster.gateway_paths[alone], f"gate-{alone}", length_s)
        self._cut_etcd_of(cluster.node_paths[alone], cluster.names[alone], length_s)
        other = (alone + 1) % cluster.shape.gateways
        cluster.clock.after(1.0, lambda: cluster.boot(other))

    def reset(self) -> None:
        """A connection breaks; short enough for nobody to notice more than that."""
        self.cluster.world.reset(self._gateway(), self._node())

    def slow_path(self) -> None:
        cluster, gateway, node = self.cluster, self._gateway(), self._node()
        slow_ns = self.chance.choice((5_000_000, 60_000_000, 600_000_000))
        cluster.say(f"gate-{gateway} to {cluster.names[node]}: up to {slow_ns / 1e6:.0f} ms")
        cluster.set_latency(gateway, node, 50_000, slow_ns)
        self._for_a_while(lambda: cluster.set_latency(gateway, node, 50_000, 1_000_000), 2.0, 8.0)

    def _cut_etcd_of(self, path: object, name: str, length_s: float) -> None:
        there, back = self.chance.choice(((False, False), (False, True), (True, False)))
        self.cluster.say(f"{name} is cut off from etcd (there {there}, back {back})")
        path.there, path.back = there, back  # type: ignore[attr-defined]

        def undo() -> None:
            path.there = path.back = True  # type: ignore[attr-defined]

        self.cluster.clock.after(length_s, undo)

    def cut_etcd(self) -> None:
        gateway = self._gateway()
        length_s = self.chance.choice((1.0, 4.0, 9.0, 16.0))
        self._cut_etcd_of(self.cluster.gateway_paths[gateway], f"gate-{gateway}", length_s)

    def slow_etcd(self) -> None:
        path = self.cluster.gateway_paths[self._gateway()]
        path.slow = True

        def undo() -> None:
            path.slow = False

        self._for_a_while(undo, 3.0, 10.0)

    def etcd_down(self) -> None:
        state = self.cluster.state
        state.up = False
        self.cluster.say("etcd is down")

        def undo() -> None:
            state.up = True
            self.cluster.say("etcd is up")

        self._for_a_while(undo, 0.5, 3.0, 8.0, 15.0)

    def slow_disk(self) -> None:
        world, node = self.cluster.world, self._node()
        slow_ns = self.chance.choice((50_000_000, 800_000_000, 6_000_000_000))
        self.cluster.say(f"{self.cluster.names[node]}: syncs take up to {slow_ns / 1e6:.0f} ms")
        world.set_disk_speed(node, slow_ns // 4, slow_ns)
        self._for_a_while(lambda: world.set_disk_speed(node, 100_000, 4_000_000), 3.0, 10.0)

    def full_disk(self) -> None:
        world, node = self.cluster.world, self._node()
        free = self.chance.choice((0, 8192, 100_000))
        self.cluster.say(f"{self.cluster.names[node]} has {free} bytes left on its disk")
        world.set_free_bytes(node, free)
        self._for_a_while(lambda: world.set_free_bytes(node, None), 2.0, 8.0)

    def fail_sync(self) -> None:
        node = self._node()
        self.cluster.say(f"a sync of {self.cluster.names[node]} will fail")
        self.cluster.world.fail_sync(node, self.chance.randrange(3))

    def rot(self) -> None:
        """A byte of a block that is used changes on one node's disk."""
        world, near = self.cluster.world, 2 * BLOCK_BYTES
        place = self.chance.choice((0, SHARD_BYTES - near)) + self.chance.randrange(near)
        found = world.corrupt(self._victim, self.chance.randrange(100), place)
        if found is not None:
            self.cluster.damaged = True
            self.cluster.say(f"{self.cluster.names[self._victim]}: rot in {found}")

    def snapshot(self) -> None:
        """Somebody takes a snapshot of a node's disk."""
        node = self.cluster.nodes.processes[self._victim]
        if node is not None:
            self._snapshot_of = node
            self.cluster.world.snapshot_disk(self._victim)
            self.cluster.say(f"a snapshot of {node.name}'s disk is taken")

    def roll_back(self) -> None:
        """… and puts it back, within the same run of the node: its start counter tells nothing."""
        cluster, victim = self.cluster, self._victim
        if self._snapshot_of is None or cluster.nodes.processes[victim] is not self._snapshot_of:
            return
        self._snapshot_of = None
        cluster.nodes.stop(victim, power=False)
        cluster.nodes.put_back_disk(victim)
        cluster.say(f"{cluster.names[victim]}: the disk's snapshot is put back")
        cluster.nodes.start(victim)

    def set_back(self) -> None:
        """A snapshot of any former run is put back: the start counter is behind, or as it was."""
        cluster, victim = self.cluster, self._victim
        if self._snapshot_of is None:
            self.snapshot()
            return
        self._snapshot_of = None
        cluster.nodes.keep_down(victim, power=False)
        cluster.nodes.put_back_disk(victim)
        cluster.say(f"{cluster.names[victim]}: an older copy of its disk is put back")
        self._for_a_while(lambda: cluster.nodes.start(victim), 0.0, 0.5, 4.0)

    def back_up(self) -> None:
        """Somebody backs etcd up."""
        self._backup = self.cluster.state.memory.backup()
        self.cluster.say("etcd is backed up")

    def restore_etcd(self) -> None:
        """… and restores the backup."""
        if self._backup is not None:
            self.cluster.say("etcd is restored from the backup")
            self.cluster.rolled_back = True
            self.cluster.state.memory.restore(self._backup)

    # Several parts at once

    def leave_behind(self) -> None:
        """A node is away until it is stale, and comes back."""
        node, power = self._node(), self.chance.random() < 0.4
        cluster = self.cluster
        cluster.nodes.keep_down(node, power=power)
        self._for_a_while(lambda: cluster.nodes.start(node), 2.0, 5.0, 9.0)

    def late_frames(self) -> None:
        """A holder stands still with writes under way; they arrive when another has the image."""
        cluster = self.cluster
        serving = [host for host, guest in enumerate(cluster.guests) if guest.life is Life.RUNNING]
        if not serving:
            return
        host = serving[0]
        nodes = range(cluster.shape.nodes)
        held = self.chance.sample(nodes, self.chance.randint(1, len(nodes)))
        names = ", ".join(cluster.names[node] for node in held)
        cluster.say(f"what gate-{host} sends to {names} is held back")
        for node in held:
            cluster.world.set_path(host, node, True, False)
        other = self.chance.choice([g for g in range(cluster.shape.gateways) if g != host])
        cluster.clock.after(self.chance.choice((0.02, 0.2, 0.6)),
                            lambda: self._over or cluster.pause_gateway(host))  # fmt: skip
        cluster.clock.after(1.0, lambda: self._over or cluster.boot(other))

        def let_go() -> None:
            for node in held:
                cluster.world.set_path(host, node, True, True)

        self._for_a_while(let_go, 11.0, 12.5, 14.0)
        self._for_a_while(lambda: cluster.continue_gateway(host), 15.0, 18.0)

    def lose_with_write(self) -> None:
        """A node is lost with writes to it under way."""
        cluster, node = self.cluster, self._node()
        for gateway in range(cluster.shape.gateways):
            cluster.world.set_path(gateway, node, True, False)

        def lose() -> None:
            cluster.nodes.keep_down(node, power=self.chance.random() < 0.3)
            for gateway in range(cluster.shape.gateways):
                cluster.world.set_path(gateway, node, True, True)

        cluster.clock.after(self.chance.choice((0.1, 0.3, 1.0)), lose)
        self._for_a_while(lambda: cluster.nodes.start(node), 5.0, 8.0)

    def vanish(self) -> None:
        """A write reaches the holder's own node only, and goes with its host."""
        cluster = self.cluster
        serving = [host for host, guest in enumerate(cluster.guests) if guest.life is Life.RUNNING]
        if not serving:
            return
        host = serving[0]
        for node in range(cluster.shape.nodes):
            if node != host:
                self._cut_path(host, node, "there", 3.0)
        self._soon(lambda: cluster.stop_gateway(host, host=True), 0.6)
        other = (host + 1) % cluster.shape.gateways
        cluster.clock.after(1.0, lambda: self._over or cluster.boot(other))

    def _stand_still(self, gateway: int) -> None:
        self.cluster.pause_gateway(gateway)
        self._for_a_while(lambda: self.cluster.continue_gateway(gateway), 1.0, 5.0, 14.0)

    def _guest_comes(self) -> None:
        self._away_until_s = 0.0
        self.second()

    def guests_leave(self) -> None:
        """Nobody has the image open for a while: heals are for maintenance."""
        cluster = self.cluster
        cluster.say("all guests are switched off")
        for guest in cluster.guests:
            guest.stop()
        self._away_until_s = cluster.clock.now_s + self.chance.choice((2.0, 8.0, 20.0))
