"""The simulated cluster: how its parts are put together, how time passes, and its gateways.

What etcd says of the image is followed here, as are writes that may be gone with nodes' memory. The
nodes stand in `nodes.py`, what is checked in `safety.py` and `liveness.py`, and what persons ask in
`operators.py`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Collection, Iterator
from typing import Any

from engine._engine import Simulation
from etcd import keys
from etcd.images import ImageRecord
from etcd.memory import MemoryEtcd
from etcd.records import LeaseRecord
from shard.ids import ImageId, image_id_from_bytes
from shard.membership import Policy, WhenFull
from shard.placement import FailureDomain, replica_set_index
from tests.sim.arbiters import Site
from tests.sim.clock import SECOND_NS, Clock, Process
from tests.sim.clones import Clones
from tests.sim.cluster_state import Door, Path, State
from tests.sim.guest import BLOCK_BYTES, Guest, Life, Shared
from tests.sim.liveness import Liveness
from tests.sim.nodes import Nodes
from tests.sim.operators import Operator
from tests.sim.oracle import SECTOR_BYTES, UNDER_WAY_S, Oracle
from tests.sim.processes import CUTTER, KeptServed, SimGateway
from tests.sim.removals import Removals
from tests.sim.rollbacks import Rollbacks
from tests.sim.safety import Safety
from tests.sim.shape import IMAGE, IMAGE_NAME, POOL, SHARD_BYTES, Shape
from tests.sim.snapshots import Snapshots
from vmstore.catalog import Catalog
from vmstore.names import ImageName


class Cluster:
    """See the module. Every host has a node; the first ones have gateways too."""

    def __init__(self, seed: int, shape: Shape) -> None:
        self.shape = shape
        self.chance = random.Random(seed)
        self.clock = Clock()
        self.lines: list[str] = []
        names = [f"node-{index}" for index in range(shape.nodes)]
        self.names = names
        self.world = Simulation(
            self.chance.getrandbits(63),
            nodes=names,
            gateways=shape.gateways,
            log_bytes=shape.log_bytes,
            segment_bytes=shape.segment_bytes,
        )
        self.state = State(self.clock, random.Random(self.chance.getrandbits(63)))
        self.state.on_change = self._etcd_changed
        self.site = Site(
            self.clock, self.state, random.Random(self.chance.getrandbits(63)), self.say
        )
        self.node_paths = [Path() for _ in names]
        self.gateway_paths = [Path() for _ in range(shape.gateways)]
        self._served = [KeptServed() for _ in range(shape.gateways)]
        self.nodes = Nodes(self)
        self.gateways: list[SimGateway | None] = [None] * shape.gateways
        self.guests: list[Guest] = []
        self.operator = Operator(self)
        self.safety = Safety(self)
        self.snapshots = Snapshots(self)
        self.rollbacks = Rollbacks(self)
        self.removals = Removals(self)
        self.clones = Clones(self)
        self.clone_chance = random.Random(f"clones {seed}")
        """For clones alone: what else happens is not drawn from it."""
        self.liveness = Liveness(self)
        self.numbers = itertools.count(1)
        self.oracle = Oracle(SHARD_BYTES // SECTOR_BYTES)
        self.image: ImageId = ImageId("")
        self.record: ImageRecord | None = None
        """As etcd has it."""
        self._record_value = b""
        self._latest: ImageRecord | None = None
        self.deleted = False
        """Somebody wanted the image to be deleted."""
        self.damaged = False
        """Blocks rot: a read may fail."""
        self.rolled_back = False
        """etcd was restored: its records may be lower than they were."""
        self.steps = 0
        self.supervised = True
        self.on_heal: Callable[[str], None] = lambda _node: None
        """Hears that the heal of a node begins."""
        self.on_event: Callable[[int, str, str], None] = lambda _gateway, _kind, _node: None
        """Hears what an engine tells of a node: (gateway, kind of event, node)."""
        self.processes = False
        """Whether gateways know the processes of their guests, a new one at each boot."""
        self._lease: LeaseRecord | None = None
        """As etcd has it."""
        self._latencies_s: dict[tuple[int, int], float] = {}
        """How long a frame may be under way to or from a node, where that was changed."""
        self._former_s: list[tuple[float, float]] = []
        """Until when how long a frame of before a change may be under way."""
        self._used: tuple[range, ...] = ()
        """The sectors that guests use."""
        self._cuts: dict[tuple[int, int], list[int]] = {}
        self.scrubs = False
        """Whether gateways scrub."""

    # Time

    def say(self, text: str) -> None:
        """Add a line to the history."""
        self.lines.append(f"{self.clock.now_s:10.4f} {text}")

    def run_until(self, until_s: float, done: Callable[[], bool] = lambda: False) -> bool:
        """Let time pass; stop early when `done`. Raises Violation, or what a defect raises."""
        clock, world = self.clock, self.world
        until_ns = int(until_s * SECOND_NS)
        while True:
            next_ns = clock.next_ns()
            goal_ns = until_ns if next_ns is None else min(next_ns, until_ns)
            happening = world.run(goal_ns)
            clock.now_ns = world.now_ns
            if happening is not None:
                self._happened(happening)
            elif not clock.run_due():
                return False
            self.steps += 1
            if done():
                return True

    def run_for(self, seconds: float, done: Callable[[], bool] = lambda: False) -> bool:
        """Let so much time pass."""
        return self.run_until(self.clock.now_s + seconds, done)

    def _happened(self, happening: tuple[Any, ...]) -> None:
        kind = happening[0]
        if kind == "answer":
            _, gateway, client, token, how, stamps = happening
            process = self.gateways[gateway]
            guest = process.engine.guests.get(client) if process is not None else None
            if process is not None and client == CUTTER:
                process.hear(process.engine.cut(token, how))
            elif guest is not None:
                guest.answered(token, how, stamps)
        elif kind == "event":
            _, gateway, event = happening
            process = self.gateways[gateway]
            if process is not None:
                self._heard(process, event)
                process.hear(event)
        else:
            _, node, power, why = happening
            self.nodes.ended(node, power=power, why=why)
        self.safety.happened()
        self.rollbacks.check()

    def _heard(self, gateway: SimGateway, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind in ("link_up", "link_down", "peeked", "client_gone", "asked"):
            return
        told = {k: v for k, v in event.items() if k not in ("event", "channel")}
        self.say(f"{gateway.name}: {kind} {told}")
        names = gateway.engine.node_names.get(event.get("channel", 0), [])
        node = names[event["node"]] if "node" in event else ""
        if kind == "frozen":
            self.snapshots.frozen(gateway, event["channel"])
        if kind == "replica_down":
            self.oracle.noticed(node)
        self.on_event(gateway.index, kind, node)

    # The beginning

    def build(self) -> None:
        """Start everything, and make a pool and an image."""
        self.state.begin()
        for node in range(self.shape.nodes):
            self.nodes.start(node)
        for gateway in range(self.shape.gateways):
            self.site.ways[f"gate-{gateway}"] = Path()
            self.start_gateway(gateway)
        if self.shape.arbiter:
            self.site.start()
            self.run_for(2.0, self.site.replaceable)
        self.run_for(2.0, lambda: all(n is not None and n.registered for n in self.nodes.processes))
        operator = Process("operator")
        ids = self._ids()
        catalog = Catalog(Door(self.state, Path(), operator), lambda: next(ids))

        def make() -> None:
            catalog.create_pool(
                POOL,
                policy=Policy.THIN_ARBITER if self.shape.arbiter else Policy.REPLICA_3,
                arbiter=self.site.current if self.shape.arbiter else None,
                shard_bytes=SHARD_BYTES,
                replica_sets=self.shape.replica_sets,
                failure_domain=FailureDomain.HOST,
                when_full=self.shape.when_full,
            )
            size = self.shape.shards * SHARD_BYTES
            self.image = catalog.create_image(ImageName(POOL, IMAGE), size).record.id

        self.clock.start(operator, make)
        made = self.run_for(2.0, lambda: bool(self.image))
        assert made, "a healthy cluster makes an image"
        self._etcd_changed()
        assert self.record is not None
        self._used = tuple(self._regions())
        shared = Shared(
            clock=self.clock,
            world=self.world,
            chance=random.Random(self.chance.getrandbits(63)),
            oracle=self.oracle,
            regions=self._used,
            say=self.say,
            next_number=lambda: next(self.numbers),
            on_answer=self.safety.check_answer,
            on_served=self.safety.check_epoch,
            may_fail=lambda: self.damaged,
            tells_full=self.shape.when_full is WhenFull.ENOSPC,
        )
        self.guests = [
            Guest(f"guest-{index}", IMAGE_NAME, shared) for index in range(self.shape.gateways)
        ]
        sets = [",".join(members) for members in self.record.sets]
        self.say(f"image {self.image[:8]} on {sets}")

    def _ids(self) -> Iterator[ImageId]:
        while True:
            yield image_id_from_bytes(self.chance.randbytes(16))

    def _regions(self) -> Iterator[range]:
        """Blocks on either side of each shard's end: few, which are fought for, or many."""
        per_shard = SHARD_BYTES // SECTOR_BYTES
        near = self.chance.choice((1, 2, 2, 8)) * BLOCK_BYTES // SECTOR_BYTES
        for shard in range(1, self.shape.shards):
            yield range(shard * per_shard - near, shard * per_shard + near)

    def recovered(self) -> None:
        """Take note that etcd's records are as high as they ever were again."""
        self.rolled_back = False

    def close(self) -> None:
        """End all processes: it is over."""
        for process in (*self.gateways, *self.nodes.processes):
            if process is not None:
                self.clock.end(process.process)
        self.site.end()
        self.nodes.close_ledgers()

    def judge_memory(self) -> None:
        """Find out whether unflushed writes may be gone."""
        if self.record is None:
            return
        lost, excused = set(), set()
        # A holder may go on by the record that a restored etcd has lost.
        for record in (self.record, self._latest or self.record):
            for index in range(len(record.sets)):
                holders = [self.names.index(name) for name in record.membership.in_sync(index)]
                if not any(self.world.remembers(node, self.image) for node in holders):
                    lost.add(index)
                    if any((self.names[node], index) in self.liveness.doubted for node in holders):
                        # Its memory is that of its process; only flushes tell an older disk.
                        excused.add(index)
        per_shard = SHARD_BYTES // SECTOR_BYTES
        for sets, is_told in ((lost - excused, True), (excused, False)):
            if sets:
                self.oracle.memory_lost(
                    lambda sector, sets=sets: self.set_of(sector // per_shard) in sets,  # type: ignore[misc]
                    self.clock.now_s,
                    is_told=is_told,
                )

    def set_of(self, shard: int) -> int:
        """Return the replica set of a shard."""
        assert self.record is not None
        return replica_set_index(self.record.placement_key, shard, len(self.record.sets))

    def set_latency(self, gateway: int, node: int, min_ns: int, max_ns: int) -> None:
        """Have each frame between a gateway and a node take so long from now on."""
        former_s = self._latencies_s.get((gateway, node), 0.0)
        latest_s = self._latencies_s[gateway, node] = max_ns / SECOND_NS
        self.world.set_latency(gateway, node, min_ns, max_ns)
        if former_s > latest_s:
            # What was sent before is still under way.
            self._former_s.append((self.clock.now_s + former_s, former_s))
            self.clock.after(former_s, self._reckon_latency)
        self._reckon_latency()

    def _reckon_latency(self) -> None:
        now_s = self.clock.now_s
        self._former_s = [each for each in self._former_s if each[0] > now_s]
        known_s = [*self._latencies_s.values(), *(former_s for _, former_s in self._former_s)]
        self.oracle.under_way_s = max(UNDER_WAY_S, 1.1 * max(known_s, default=0.0))

    # Gateways

    def start_gateway(self, gateway: int) -> None:
        """Start a gateway's process; guests of its host come back to it."""
        if self.gateways[gateway] is not None:
            return
        name = f"gate-{gateway}"
        self.say(f"{name} starts")
        process = SimGateway(
            self.clock,
            self.world,
            self.state,
            self.gateway_paths[gateway],
            self.chance,
            index=gateway,
            name=name,
            node=gateway,
            node_name=self.names[gateway],
            nodes=self.shape.nodes,
            site=self.site,
            served=self._served[gateway],
            on_heal=self._heal_begins,
            scrubs=self.scrubs,
        )
        process.engine.on_cut = lambda token, first, sectors: self._cut(
            gateway, token, first, sectors
        )
        process.engine.on_cut_done = lambda token, done: self._cut_done(gateway, token, done)
        self.gateways[gateway] = process
        guest = self.guests[gateway] if self.guests else None
        if guest is not None and guest.life is Life.CONNECTING:
            guest.start(process)

    @property
    def used(self) -> tuple[range, ...]:
        """The sectors that guests use."""
        return self._used

    def size_shards(self) -> int:
        """Return how large the image is."""
        assert self.record is not None
        return self.record.size_bytes // SHARD_BYTES

    def _cut(self, gateway: int, token: int, first: int, sectors: int) -> None:
        """What is cut off is zeroed: as by a guest."""
        epoch = self.record.epoch if self.record is not None else 0
        tokens = []
        for region in self._used:
            cut = range(max(region.start, first), min(region.stop, first + sectors))
            if cut:
                tokens.append(next(self.numbers))
                now = self.clock.now_s
                self.oracle.begin(tokens[-1], cut.start, len(cut), 0, epoch, now)
        self._cuts[gateway, token] = tokens

    def _cut_done(self, gateway: int, token: int, done: bool) -> None:
        for number in self._cuts.pop((gateway, token), []):
            if done:
                self.oracle.answered(number, self.clock.now_s, durable=False)
            else:
                self.oracle.orphan(number)

    def stop_gateway(self, gateway: int, *, host: bool) -> None:
        """Kill a gateway's process, or its whole host with the guest (and its node)."""
        process = self.gateways[gateway]
        if process is None:
            return
        self.say(f"{process.name} {'loses its host' if host else 'is killed'}")
        self.clock.end(process.process)
        for token in process.engine.cutting:
            self._cut_done(gateway, token, False)
        self.world.stop_gateway(gateway, host)
        self.gateways[gateway] = None
        guest = self.guests[gateway]
        if host:
            self._served[gateway] = KeptServed()
            guest.host_gone()
            self.nodes.stop(gateway, power=True)
        else:
            guest.gateway_gone()
        if self.supervised:
            pause_s = self.chance.choice((0.2, 0.5, 2.0)) + (5.0 if host else 0.0)
            self.clock.after(pause_s, lambda: self.start_gateway(gateway))

    def pause_gateway(self, gateway: int) -> None:
        """Stop a gateway's process as SIGSTOP does."""
        process = self.gateways[gateway]
        if process is not None and not process.process.paused:
            process.process.paused = True
            self.world.pause_gateway(gateway)
            self.say(f"{process.name} stands still")

    def continue_gateway(self, gateway: int) -> None:
        """Let it go on."""
        process = self.gateways[gateway]
        if process is not None and process.process.paused:
            self.world.continue_gateway(gateway)
            self.clock.go_on(process.process)
            self.say(f"{process.name} goes on")

    def boot(self, guest: int) -> None:
        """Start a guest on its host, whether another one still runs elsewhere or not."""
        process = self.gateways[guest]
        if process is not None and self.guests[guest].life in (Life.OFF, Life.FAILED):
            self.say(f"guest-{guest} boots")
            if self.processes:
                self.guests[guest].peer = f"{next(self.numbers)}:1"
            self.guests[guest].start(process)

    def serving(self) -> list[Guest]:
        """Guests that are served."""
        return [guest for guest in self.guests if guest.life is Life.RUNNING]

    def _heal_begins(self, node: str) -> None:
        self.on_heal(node)

    # What etcd says

    def _etcd_changed(self) -> None:
        if not self.image:
            return
        lease, self._lease = self._lease, self._lease_in_etcd()
        if lease is not None and self._lease is not None:
            self.safety.check_lease(lease, self._lease)
        item = _stored(self.state.memory, keys.image(self.image))
        if item is None or item == self._record_value:
            return
        record = ImageRecord.decode(keys.image(self.image), item)
        former, self.record, self._record_value = self.record, record, item
        latest = self._latest
        if latest is None or (record.epoch, record.generation) >= (latest.epoch, latest.generation):
            self._latest = record
        if former is None:
            return
        if not self.rolled_back:
            self.safety.check_record(former, record)
        self.liveness.record_changed(former, record)
        self.rollbacks.record_changed(former, record)
        self.removals.record_changed(former, record)
        self.clones.record_changed(former, record)
        if record.stale != former.stale:
            self.say(f"etcd: generation {record.generation}, stale {_plain(record.stale)}")
            self.judge_memory()

    def _lease_in_etcd(self) -> LeaseRecord | None:
        item = _stored(self.state.memory, keys.lease(self.image))
        return None if item is None else LeaseRecord.decode(keys.lease(self.image), item)

    # The end

    def open_peer_paths(self) -> None:
        """Let nodes reach each other, in the usual time."""
        for asking in range(self.shape.nodes):
            for asked in range(self.shape.nodes):
                self.world.set_peer_path(asking, asked, True)
                self.world.set_peer_latency(asking, asked, 50_000, 1_000_000)

    def mend(self, away: Collection[int] = (), *, arbiter: bool = True) -> None:
        """End all faults, but that some nodes, or the arbiter, stay away."""
        self.say("all faults end" if arbiter and not away else "all faults end but for some")
        self.state.up = True
        paths = (self.site.path, *self.site.ways.values())
        for path in (*self.node_paths, *self.gateway_paths, *paths):
            path.there = path.back = True
            path.slow = False
        for gateway in range(self.shape.gateways):
            for node in range(self.shape.nodes):
                self.world.set_path(gateway, node, True, True)
                self.world.set_path(gateway, node, False, True)
                self.set_latency(gateway, node, 50_000, 1_000_000)
        self.open_peer_paths()
        for node in range(self.shape.nodes):
            self.nodes.go_on(node)
            self.world.set_free_bytes(node, None)
            self.world.set_disk_speed(node, 100_000, 4_000_000)
            if node in away:
                self.nodes.keep_down(node, power=False)
            else:
                self.nodes.start(node)
        if self.shape.arbiter:
            self.site.go_on()
            if arbiter:
                self.site.start()
            else:
                self.site.keep_down(power=False)
        for gateway in range(self.shape.gateways):
            self.continue_gateway(gateway)
            self.start_gateway(gateway)


def _stored(etcd: MemoryEtcd, key: str) -> bytes | None:
    found = etcd.get(key)
    return None if found is None else found.value


def _plain(stale: Any) -> dict[int, dict[str, int]]:
    return {index: dict(nodes) for index, nodes in stale.items()}
