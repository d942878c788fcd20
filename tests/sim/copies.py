"""Faults in the midst of copies from node to node: of a level shard's part, of a rotten block."""

from __future__ import annotations

from tests.sim.guest import BLOCK_BYTES, IN_FLIGHT_MAX, Life
from tests.sim.oracle import SECTOR_BYTES
from tests.sim.shape import SHARD_BYTES
from tests.sim.snapshot_faults import SnapshotFaults

PER_SHARD, PER_BLOCK = SHARD_BYTES // SECTOR_BYTES, BLOCK_BYTES // SECTOR_BYTES
ROTTEN_BLOCKS = (0, 1, 2, 252, 253, 254)
"""Of a shard: guests use those near its ends."""


class Copies(SnapshotFaults):
    """See the module."""

    _struck_until_s = 0.0
    """Until when a strike that wants to be alone is under way."""

    def strike_half_copied(self) -> None:
        """A node has part of a shard, the newest of it perhaps, when all others are killed."""
        cluster, guest, node = self.cluster, self._running(), self._node()
        if guest is None or cluster.clock.now_s < self._struck_until_s:
            return
        self._struck_until_s = cluster.clock.now_s + 6.0
        cluster.say(f"{cluster.names[node]} will have part of a shard")
        self._rest(4.0)
        shard = self.chance.randrange(1, cluster.shape.shards)
        of_shard = range(shard * PER_SHARD, (shard + 1) * PER_SHARD)
        firsts = [
            first
            for region in guest.regions
            for first in range(region.start, region.stop, PER_BLOCK)
            if first in of_shard
        ]
        # The newest is copied first, more often than not.
        chosen = sorted(self.chance.sample(firsts, min(len(firsts), 6)), reverse=True)

        def write() -> None:
            for first in chosen:
                if guest.life is Life.RUNNING and guest.in_flight < IN_FLIGHT_MAX:
                    guest.write(first, PER_BLOCK)

        def read() -> None:
            for first in chosen:
                if guest.life is Life.RUNNING and guest.in_flight < IN_FLIGHT_MAX:
                    guest.read(first, PER_BLOCK)

        def kill_it_too() -> None:
            # What is under way to it is lost.
            self._away(node, 0.1, power=False)
            self._later(0.5, read)

        def lose() -> None:
            self._slow_to(node, self.chance.choice((5_000_000, 20_000_000, 80_000_000)), 3.0)
            self._away(node, self.chance.uniform(0.1, 0.6), power=True)
            self._at_event.setdefault("admitted", []).append(
                lambda gateway, _: self._kill_between_copies(gateway, node, kill_it_too)
            )

        self._later(0.3, write)
        self._later(0.4, lose)

    def strike_repair(self) -> None:
        """Rot is found, slowly repaired, and written over as that goes on."""
        cluster, guest, victim = self.cluster, self._running(), self._victim
        if guest is None or cluster.clock.now_s < self._struck_until_s:
            return
        if cluster.guests.index(guest) != victim:
            # Whoever runs beside the rot finds it.
            self._struck_until_s = cluster.clock.now_s + 4.0
            guest.stop()
            self._later(1.0, lambda: cluster.boot(victim % cluster.shape.gateways))
            return
        block = self.chance.choice(ROTTEN_BLOCKS)
        place = block * BLOCK_BYTES + self.chance.randrange(BLOCK_BYTES)
        found = cluster.world.corrupt(victim, self.chance.randrange(100), place)
        if found is None:
            return
        self._struck_until_s = cluster.clock.now_s + 4.0
        cluster.damaged = True
        cluster.say(f"{cluster.names[victim]}: rot in {found}; it is read, and written over")
        first = int(found[0].rsplit("/", 1)[1]) * PER_SHARD + block * PER_BLOCK
        self._rest(2.5)

        def read() -> None:
            for node in self._others(victim):
                self._slow_to(node, self.chance.choice((20_000_000, 100_000_000)), 1.5)
            if guest.life is Life.RUNNING and guest.in_flight < IN_FLIGHT_MAX:
                guest.read(first, PER_BLOCK)
            self._later(self.chance.uniform(0.0, 0.5), write)

        def write() -> None:
            if guest.life is Life.RUNNING and guest.in_flight < IN_FLIGHT_MAX:
                guest.write(first, PER_BLOCK)
                self._later(0.5, read_again)

        def read_again() -> None:
            if guest.life is Life.RUNNING and guest.in_flight < IN_FLIGHT_MAX:
                guest.read(first, PER_BLOCK)

        self._later(0.3, read)
