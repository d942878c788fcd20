"""Faults that follow one another: some rules count only where one meets what another left behind.

Each is struck at a moment that the cluster itself gives (a node is let in, a flush is answered, the
arbiter has granted), and what comes next is drawn by chance.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tests.sim.arbiter_faults import ArbiterFaults
from tests.sim.guest import BLOCK_BYTES, Guest, Life
from tests.sim.heal_faults import HealFaults
from tests.sim.oracle import SECTOR_BYTES
from tests.sim.shape import SHARD_BYTES

LOOK_S = 0.01
"""Between two looks at what a strike waits for."""
BURST = 14
"""Requests that a burst has under way: less than what a history takes for too many."""


class Strikes(HealFaults, ArbiterFaults):
    """See the module."""

    def _running(self) -> Guest | None:
        return next((g for g in self.cluster.guests if g.life is Life.RUNNING), None)

    def _later(self, pause_s: float, act: Callable[[], None]) -> None:
        self.cluster.clock.after(pause_s, lambda: self._over or act())

    def _when(self, is_so: Callable[[], bool], act: Callable[[], None], limit_s: float) -> None:
        """Act as soon as something is so; give up after `limit_s`."""
        until_s = self.cluster.clock.now_s + limit_s

        def look() -> None:
            if self._over or self.cluster.clock.now_s > until_s:
                return
            if is_so():
                act()
            else:
                self.cluster.clock.after(LOOK_S, look)

        look()

    def _rest(self, length_s: float) -> None:
        """Guests ask for nothing by themselves for a while: nobody has to be left behind."""
        for guest in self.cluster.guests:
            guest.busy = False

        def undo() -> None:
            for guest in self.cluster.guests:
                guest.busy = True

        self.cluster.clock.after(length_s, undo)

    def _slow_to(self, node: int, most_ns: int, length_s: float) -> None:
        cluster = self.cluster
        for gateway in range(cluster.shape.gateways):
            cluster.set_latency(gateway, node, most_ns // 4, most_ns)

        def undo() -> None:
            for gateway in range(cluster.shape.gateways):
                cluster.set_latency(gateway, node, 50_000, 1_000_000)

        cluster.clock.after(length_s, undo)

    def _away(self, node: int, length_s: float, *, power: bool) -> None:
        self.cluster.nodes.keep_down(node, power=power)
        self.cluster.clock.after(length_s, partial(self.cluster.nodes.start, node))

    def _flushed(self, then: Callable[[], None], limit_s: float = 4.0) -> None:
        """Have a guest flush; go on when that is answered."""
        guest = self._running()
        if guest is None:
            return
        before = set(guest.unanswered())
        guest.flush()
        tokens = set(guest.unanswered()) - before

        def is_answered() -> bool:
            return not tokens & set(guest.unanswered())

        self._when(is_answered, then, limit_s)

    # Pulls

    def strike_pull(self) -> None:
        """What a healed node fetches stays on its way; its holder begins again with others."""
        self.leave_behind()
        self._strikes.append(self._hold_pull)

    def _hold_pull(self, healed: str) -> None:
        cluster, guest = self.cluster, self._running()
        if guest is None or self._over:
            return
        gateway, target = cluster.guests.index(guest), cluster.names.index(healed)
        # Most often the first one gives what all have.
        source, length_s = self._others(target)[0], self.chance.uniform(0.6, 2.0)
        slow_ns = 20_000_000
        cluster.world.set_peer_latency(source, target, slow_ns, slow_ns)

        def hold() -> None:
            cluster.say(f"what {healed} fetches from {cluster.names[source]} is held back")
            self._cut_peers(source, target, "there", length_s)
            # The node is not taken in meanwhile.
            cluster.world.set_disk_speed(target, 2_000_000_000, 2_000_000_000)
            self._later(0.01, lambda: cluster.world.reset(gateway, source))

        def undo() -> None:
            cluster.world.set_disk_speed(target, 100_000, 4_000_000)
            cluster.world.set_peer_latency(source, target, 50_000, 1_000_000)

        def is_asked() -> bool:
            return cluster.world.pulls(target) > 0

        self._when(is_asked, lambda: self._later(self.chance.uniform(0.0, 0.03), hold), 4.0)
        cluster.clock.after(4.0 + length_s, undo)

    # Levelling

    def strike_levelling(self) -> None:
        """A node comes back without its memory; as it is levelled something befalls the others."""
        cluster, node = self.cluster, self._node()
        length_s = self.chance.uniform(3.0, 6.0)
        cluster.say(f"{cluster.names[node]} is levelled slowly")
        self._rest(self.chance.choice((1.5, 4.0)))
        self._later(0.05, lambda: self._away(node, self.chance.uniform(0.1, 0.6), power=True))
        self._slow_to(node, self.chance.choice((20_000_000, 150_000_000, 400_000_000)), length_s)

        def strike(gateway: int, _node: str) -> None:
            strikes = (
                self._lose_who_stayed,
                self._kill_who_stayed,
                self._kill_between_copies,
                self._end_holder_after_flushes,
            )
            self.chance.choice(strikes)(gateway, node)

        self._at_event.setdefault("admitted", []).append(strike)

    def _others(self, node: int) -> list[int]:
        return [other for other in range(self.cluster.shape.nodes) if other != node]

    def _lose_who_stayed(self, _gateway: int, node: int) -> None:
        """A flush is answered; those who surely have what it covers lose power, and stay away."""

        def lose() -> None:
            self.cluster.say("those who stayed are lost")
            for other in self._others(node):
                self._away(other, self.chance.uniform(5.0, 9.0), power=True)

        self._flushed(lose)

    def _kill_who_stayed(self, gateway: int, node: int) -> None:
        """The sources are killed between two copies; they are back at once."""

        def kill() -> None:
            self.cluster.say("those who stayed are killed")
            for other in self._others(node):
                self._away(other, self.chance.choice((0.1, 0.4)), power=False)
            if self.chance.random() < 0.3:
                self.cluster.stop_gateway(gateway, host=False)

        self._later(self.chance.uniform(0.05, 1.5), kill)

    def _kill_between_copies(
        self, _gateway: int, node: int, also: Callable[[], None] = lambda: None
    ) -> None:
        """The sources are killed when of some shard one copy has arrived, and another has not."""
        cluster = self.cluster
        record = cluster.record
        assert record is not None
        layers = record.layer_ids

        def contents(of: int, shard: int) -> list[int | None]:
            return cluster.world.shard_digests(of, cluster.image, layers, shard) or []

        sources = {
            shard: {source: contents(source, shard) for source in self._others(node)}
            for shard in cluster.world.dirty(node, cluster.image)
        }
        before = {shard: contents(node, shard) for shard in sources}

        def is_half_copied(shard: int) -> bool:
            now = contents(node, shard)
            wanted = next((found for found in sources[shard].values() if found), [])
            return bool(now) and now != before[shard] and now != wanted

        def kill() -> None:
            cluster.say("those who stayed are killed between two copies")
            also()
            for other in self._others(node):
                self._away(other, self.chance.choice((0.1, 0.4)), power=False)

        self._when(lambda: any(is_half_copied(shard) for shard in sources), kill, 2.0)

    def _end_holder_after_flushes(self, gateway: int, _node: int) -> None:
        """Two flushes are answered, the second with what the first one clears; the holder ends."""

        def end() -> None:
            self.cluster.stop_gateway(gateway, host=False)

        self._flushed(lambda: self._flushed(end))

    def lose_memory_but_one(self) -> None:
        """All nodes go; one alone keeps its memory, and is the last to return."""
        cluster = self.cluster
        nodes = list(range(cluster.shape.nodes))
        last = self.chance.choice(nodes)
        cluster.say(f"all nodes go, {cluster.names[last]} with its memory")
        self._rest(3.0)

        def lose() -> None:
            for node in nodes:
                if node != last:
                    self._away(node, self.chance.uniform(0.1, 0.3), power=True)
            self._away(last, self.chance.uniform(0.8, 2.5), power=False)

        self._later(0.05, lose)

    # Flushes

    def flush_first(self) -> None:
        """All that a new holder is asked is a flush; then all nodes lose power."""
        cluster, guest = self.cluster, self._running()
        if guest is None:
            return
        gateway = cluster.guests.index(guest)
        cluster.say("a new holder is asked for a flush")
        self._rest(4.0)

        def cut() -> None:
            for node in range(cluster.shape.nodes):
                self._away(node, self.chance.uniform(0.1, 1.0), power=True)

        self._later(0.1, lambda: cluster.stop_gateway(gateway, host=False))

        def flush() -> None:
            self._flushed(cut)

        self._later(0.12, lambda: self._when(lambda: guest.life is Life.RUNNING, flush, 8.0))

    def refuse_and_flush(self) -> None:
        """A node has no room and refuses writes, takes flushes, and cannot be left behind."""
        cluster, guest, node = self.cluster, self._running(), self._node()
        if guest is None or not cluster.state.up:
            return
        length_s = self.chance.uniform(4.0, 7.0)
        cluster.say(f"{cluster.names[node]} has no room, and etcd is down")
        cluster.state.up = False
        cluster.world.set_free_bytes(node, 0)
        self._rest(length_s)

        def undo() -> None:
            cluster.state.up = True
            cluster.world.set_free_bytes(node, None)

        cluster.clock.after(length_s, undo)

        client = guest.client

        def burst(left: int) -> None:
            if guest.life is not Life.RUNNING or guest.client != client or left == 0:
                return
            if guest.in_flight < BURST:
                region = self.chance.choice(guest.regions)
                first = self.chance.randrange(region.start, region.stop)
                guest.write(first, min(20, region.stop - first))
                if left % 20 == 0:
                    guest.flush()
            self._later(0.02, lambda: burst(left - 1))

        burst(120)
        gateway = cluster.guests.index(guest)
        self._later(
            length_s - self.chance.uniform(0.2, 1.0),
            lambda: cluster.stop_gateway(gateway, host=False),
        )

    def refuse_by_rot(self) -> None:
        """Rot keeps a node from a write; what was flushed is cleared, and the holder ends."""
        cluster, guest, victim = self.cluster, self._running(), self._victim
        block = self.chance.choice((0, 1, 2, 252, 253, 254))
        place = block * BLOCK_BYTES + self.chance.randrange(BLOCK_BYTES)
        found = cluster.world.corrupt(victim, self.chance.randrange(100), place)
        if guest is None or found is None:
            return
        cluster.damaged = True
        cluster.say(f"{cluster.names[victim]}: rot in {found}; a write will meet it")
        per_block, per_shard = BLOCK_BYTES // SECTOR_BYTES, SHARD_BYTES // SECTOR_BYTES
        first = int(found[0].rsplit("/", 1)[1]) * per_shard + block * per_block
        self._rest(8.0)
        gateway = cluster.guests.index(guest)
        others = self._others(victim)

        def cut(passable: bool) -> None:
            for node in others:
                cluster.world.set_path(gateway, node, False, passable)

        def write() -> None:
            if guest.life is not Life.RUNNING:
                return
            self._slow_to(victim, self.chance.choice((20_000_000, 40_000_000)), 5.0)
            # The rest of the rotten block cannot be merged; the block behind it is whole.
            guest.write(first + 4, 4 + per_block)
            guest.flush()
            self._later(self.chance.choice((0.02, 0.03)), lambda: cut(False))
            self._later(
                self.chance.uniform(2.4, 3.4), lambda: cluster.stop_gateway(gateway, host=False)
            )
            cluster.clock.after(3.6, lambda: cut(True))

        self._later(0.5, lambda: self._flushed(lambda: self._later(0.5, write)))

    # Who holds

    def restore_under_two(self) -> None:
        """etcd is put back to before the present holder came, and gives its epoch to another."""
        cluster, guest = self.cluster, self._running()
        if guest is None:
            return
        former = cluster.guests.index(guest)
        other = self.chance.choice([g for g in range(cluster.shape.gateways) if g != former])
        backup = cluster.state.memory.backup()
        cluster.say(f"etcd is backed up; the image moves to gate-{other}")
        guest.stop()

        def restore() -> None:
            cluster.say("etcd is restored from the backup")
            cluster.rolled_back = True
            cluster.state.memory.restore(backup)
            if self.chance.random() < 0.7:
                path = cluster.gateway_paths[other]
                path.there = path.back = False
                cluster.clock.after(6.0, partial(_open, path))
            cluster.stop_gateway(former, host=False)
            self._later(2.5, lambda: cluster.boot(former))

        def move() -> None:
            cluster.boot(other)
            moved = cluster.guests[other]
            self._when(
                lambda: moved.life is Life.RUNNING,
                lambda: self._later(self.chance.uniform(0.0, 0.5), restore),
                12.0,
            )

        # The former holder gives its lease back first, or the next one has to wait for its end.
        self._later(self.chance.choice((1.0, 4.0)), move)

    def come_back(self) -> None:
        """A guest's process outlives its lease, and sends again what it got no answer to."""
        cluster, guest = self.cluster, self._running()
        if guest is None or guest.peer is None or cluster.clock.now_s < self._away_until_s:
            return
        gateway = cluster.guests.index(guest)
        other = self.chance.choice([g for g in range(cluster.shape.gateways) if g != gateway])
        self._away_until_s = cluster.clock.now_s + 30.0
        cluster.say(f"guest-{gateway} will come back")
        for node in range(cluster.shape.nodes):
            cluster.world.set_path(gateway, node, True, False)
        region = self.chance.choice(guest.regions)
        first = self.chance.randrange(region.start, region.stop - 7)
        guest.write(first, 8)
        stamp = max(guest.unanswered()) << 8 | 1
        self._later(0.1, lambda: cluster.pause_gateway(gateway))
        self._later(self.chance.uniform(11.0, 12.5), lambda: cluster.boot(other))
        self._later(self.chance.uniform(15.0, 16.0), cluster.guests[other].stop)

        def go_on() -> None:
            for node in range(cluster.shape.nodes):
                cluster.world.set_path(gateway, node, True, True)
            cluster.continue_gateway(gateway)

        cluster.clock.after(20.0, go_on)

        def again() -> None:
            process = cluster.gateways[gateway]
            if guest.life is not Life.FAILED or process is None:
                return
            peer = guest.peer

            def came() -> bool:
                # One that is started anew is another process, and has nothing to send again.
                return guest.life is Life.RUNNING and guest.peer == peer

            guest.start(process)
            self._when(came, send_again, 6.0)
            cluster.clock.after(7.0, lambda: came() or guest.peer != peer or guest.stop())

        def send_again() -> None:
            if guest.channel is not None:
                token = 1 << 40 | stamp
                cluster.world.write(
                    gateway, guest.channel, guest.client, token, first, 8, stamp, False
                )
                self._later(0.5, lambda: guest.read(first, 8))

        self._later(22.0, again)

    def second_process(self) -> None:
        """A gateway is given another one's name by mistake, and asked for its image."""
        cluster, guest = self.cluster, self._running()
        if guest is None:
            return
        gateway = cluster.guests.index(guest)
        other = self.chance.choice([g for g in range(cluster.shape.gateways) if g != gateway])
        process = cluster.gateways[other]
        if process is not None:
            cluster.say(f"gate-{other} has the name of gate-{gateway}")
            process.rename(f"gate-{gateway}")
            cluster.boot(other)

    # Sizes and scrubs

    def shrink(self) -> None:
        """All guests leave, and somebody makes the image smaller."""
        cluster = self.cluster
        if cluster.size_shards() < cluster.shape.shards:
            return
        self.guests_leave()
        gateway = self._gateway()
        shards = self.chance.randrange(2, cluster.shape.shards)
        if self.chance.random() < 0.5:
            # What is discarded is in flight as the node goes.
            self._later(self.chance.uniform(0.0, 2.5), self.kill_node)
        self._later(
            self.chance.uniform(0.0, 2.0), lambda: _drop(cluster.operator.resize(gateway, shards))
        )

    def grow(self) -> None:
        """Somebody makes it as large as it was."""
        cluster = self.cluster
        if cluster.size_shards() < cluster.shape.shards:
            _drop(cluster.operator.resize(self._gateway(), cluster.shape.shards))

    def ask_scrub(self) -> None:
        """Somebody wants all to be read."""
        self.cluster.say("a scrub is asked for")
        self.cluster.operator.ask_for_scrub()

    # Votes

    def strike_vote(self) -> None:
        """A node is lost; when the arbiter has granted that, or has heard of it, others go."""
        self.leave_behind()
        method = self.chance.choice(("Prepare", "Prepare", "Confirm"))
        self.cluster.site.at_vote.append((method, self._strike_vote))

    def strike_heal_vote(self) -> None:
        """A stale node is healed; as the arbiter is asked about that, it or the holder goes."""
        self.leave_behind()

        def at_heal(_gateway: int, _node: str) -> None:
            method = self.chance.choice(("Prepare", "Confirm"))
            self.cluster.site.at_vote.append((method, self._strike_vote))

        self._at_event.setdefault("healed", []).append(at_heal)

    def _strike_vote(self) -> None:
        if self._over:
            return
        cluster, site = self.cluster, self.cluster.site
        cluster.say("a vote is struck")
        guest = self._running()
        holder = cluster.guests.index(guest) if guest is not None else 0
        node = self._node()

        def down_etcd() -> None:
            cluster.state.up = False
            cluster.say("etcd is down")

            def undo() -> None:
                cluster.state.up = True
                cluster.say("etcd is up")

            cluster.clock.after(self.chance.uniform(0.5, 3.0), undo)

        strikes: list[Callable[[], None]] = [
            down_etcd,
            lambda: cluster.stop_gateway(holder, host=self.chance.random() < 0.3),
            lambda: site.stop(power=True),
            lambda: self._away(node, self.chance.uniform(2.0, 6.0), power=False),
        ]
        for strike in self.chance.sample(strikes, self.chance.choice((1, 2, 2, 3))):
            # Not from within the vote itself.
            cluster.clock.after(self.chance.choice((0.0, 0.0, 0.005, 0.05)), strike)


def _open(path: object) -> None:
    path.there = path.back = True  # type: ignore[attr-defined]


def _drop(_done: object) -> None:
    """Whoever asked does not wait."""
