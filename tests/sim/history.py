"""One random history: what happens to a cluster, all of it from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from etcd.memory import Backup
from tests.sim.cluster import BLOCK_BYTES, SHARD_BYTES, Cluster, Shape
from tests.sim.guest import Life
from tests.sim.oracle import Violation
from tests.sim.processes import SimNode

SETTLE_S = 90.0
"""Until everything works again after the last fault: opening takes 20 s at most, leases 10."""

CHECK_S = 0.7


@dataclass(frozen=True, slots=True)
class Kind:
    """What befalls a cluster, and how often one thing rather than another."""

    name: str
    faults: dict[str, int]
    shapes: tuple[Shape, ...] = (
        Shape(),
        Shape(nodes=4, gateways=3, replica_sets=2),
        Shape(nodes=5, gateways=2, replica_sets=3, shards=4),
    )
    may_stall: bool = False
    """It may end with writes that wait for a heal, or for a person."""


SMALL_LOG = Shape(log_bytes=512 << 10)
"""Soon full: checkpoints put the data into shard files all the time."""

KINDS = (
    Kind("kills", {"kill_node": 6, "kill_gateway": 3, "crash_node": 2, "reset": 3}),
    Kind(
        "power",
        {"cut_node": 5, "cut_all": 2, "crash_node": 3, "cut_host": 2, "kill_gateway": 1},
    ),
    Kind(
        "network",
        {"partition": 5, "isolate": 3, "reset": 4, "slow_path": 3, "kill_node": 1, "pause_node": 2},
    ),
    Kind(
        "holders",
        {"pause_gateway": 5, "second": 4, "cut_host": 2, "kill_gateway": 2, "cut_etcd": 3,
         "partition": 2, "split": 4},
    ),
    Kind(
        "etcd",
        {"etcd_down": 4, "cut_etcd": 4, "slow_etcd": 2, "kill_node": 4, "kill_gateway": 2,
         "second": 1},
    ),
    Kind(
        "disks",
        {"slow_disk": 3, "full_disk": 3, "fail_sync": 2, "crash_node": 3, "cut_node": 2,
         "kill_gateway": 1},
    ),
    Kind(
        "rot",
        {"rot": 8, "kill_node": 4, "cut_node": 2, "kill_gateway": 2, "cut_host": 1},
        (SMALL_LOG,),
        # Part of a rotten block cannot be written before it is repaired, which is not built.
        may_stall=True,
    ),
    Kind(
        "swapped",
        {"snapshot": 6, "roll_back": 6, "kill_node": 2, "kill_gateway": 3, "cut_node": 1},
        # One of two nodes in sync is not believed any more: its set waits, and cannot be healed.
        may_stall=True,
    ),
    Kind(
        "restored",
        {"back_up": 4, "restore_etcd": 3, "second": 3, "cut_host": 2, "kill_gateway": 3,
         "kill_node": 4, "pause_gateway": 2},
        may_stall=True,
    ),
    Kind(
        "everything",
        {"kill_node": 4, "cut_node": 3, "cut_all": 1, "crash_node": 2, "pause_node": 2,
         "kill_gateway": 2, "cut_host": 1, "pause_gateway": 2, "second": 2, "partition": 3,
         "isolate": 2, "reset": 3, "slow_path": 2, "etcd_down": 2, "cut_etcd": 2, "slow_etcd": 1,
         "slow_disk": 1, "full_disk": 1, "fail_sync": 1},
    ),
)  # fmt: skip


@dataclass(slots=True)
class Outcome:
    """How a history went."""

    seed: int
    kind: str
    lines: list[str] = field(default_factory=list)
    steps: int = 0
    answers: int = 0
    reads: int = 0
    trace: int = 0
    simulated_s: float = 0.0
    error: BaseException | None = None

    def text(self) -> str:
        """Return the history, for people, and for a byte-for-byte comparison."""
        head = f"seed {self.seed}, {self.kind}"
        tail = (
            f"{self.steps} steps, {self.answers} answers, {self.reads} reads checked, "
            f"trace {self.trace:016x}"
        )
        return "\n".join([head, *self.lines, tail])


class History:
    """Plays one seed."""

    def __init__(self, seed: int, *, frames: bool = False) -> None:
        self.seed = seed
        self._frames = frames
        self.chance = random.Random(f"history {seed}")
        self.kind = KINDS[seed % len(KINDS)]
        self.cluster = Cluster(self.chance.getrandbits(63), self.chance.choice(self.kind.shapes))
        if frames:
            self.cluster.world.tell_all()
        self.pause_s = self.chance.choice((0.6, 2.0, 5.0))
        self.length_s = self.chance.uniform(10, 45)
        self._over = False
        self._leaving = False
        self._victim = self.chance.randrange(self.cluster.shape.nodes)
        """The one node whose disk may rot, or be swapped."""
        self._snapshot_of: SimNode | None = None
        self._backup: Backup | None = None

    def play(self) -> Outcome:
        """Run it to its end; a violation is in the outcome."""
        outcome = Outcome(self.seed, self.kind.name)
        cluster = self.cluster
        logs = structlog.get_config()
        structlog.configure(processors=[self._logged], cache_logger_on_first_use=False)
        try:
            self._play()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 (a panic of the engine is no `Exception`)
            outcome.error = error
            cluster.say(f"VIOLATION: {type(error).__name__}: {error}")
        finally:
            structlog.configure(**logs)
            for process in (*cluster.gateways, *cluster.nodes):
                if process is not None:
                    cluster.clock.end(process.process)
        outcome.lines = cluster.lines
        if self._frames:
            told = cluster.world.take_told()
            outcome.lines += [f"{at_ns / 1e9:10.4f} {words}" for at_ns, words in told]
            outcome.lines.sort(key=lambda line: float(line[:10]))
        outcome.steps = cluster.steps
        outcome.answers = sum(guest.answers for guest in cluster.guests)
        outcome.reads = cluster.oracle.reads
        outcome.trace = cluster.world.trace
        outcome.simulated_s = cluster.clock.now_s
        return outcome

    def _logged(self, _logger: object, level: str, event: dict[str, object]) -> str:
        """Take what the product logs into the history."""
        name = event.pop("event")
        event.pop("image", None)
        if name not in ("replica_lost", "replicas_level", "node_connected", "node_disconnected"):
            details = " ".join(f"{key}={value}" for key, value in event.items())
            self.cluster.say(f"  {level}: {name} {details}")
        raise structlog.DropEvent

    def _play(self) -> None:
        cluster = self.cluster
        cluster.build()
        for guest in cluster.guests:
            guest.pause_s = self.chance.choice((0.015, 0.06, 0.2))
        cluster.boot(0)
        cluster.run_for(1.0)
        cluster.clock.after(CHECK_S, self._check)
        self._next_fault()
        cluster.clock.after(0.5, self._keep_guests)
        cluster.run_for(self.length_s)
        self._over = True
        self.mended()

    def _check(self) -> None:
        self.cluster.check()
        self.cluster.clock.after(CHECK_S, self._check)

    def _keep_guests(self) -> None:
        """Whoever keeps guests running boots one where none runs."""
        if self._leaving:
            return
        cluster = self.cluster
        wanted = (Life.CONNECTING, Life.RUNNING)
        if not any(guest.life in wanted for guest in cluster.guests):
            hosts = [i for i, gateway in enumerate(cluster.gateways) if gateway is not None]
            if hosts:
                cluster.boot(self.chance.choice(hosts))
        cluster.clock.after(0.5, self._keep_guests)

    def _next_fault(self) -> None:
        if self._over:
            return
        faults = self.kind.faults
        name = self.chance.choices(list(faults), list(faults.values()))[0]
        act: Callable[[], None] = getattr(self, "_" + name)
        act()
        pause_s = self.chance.expovariate(1 / self.pause_s)
        self.cluster.clock.after(pause_s, self._next_fault)

    def mended(self) -> None:
        """End all faults; everything must work again, and hold what it should. Raises Violation."""
        cluster = self.cluster
        cluster.mend()
        # Leases that lapsed are taken, by whoever comes first; then one guest is left.
        cluster.run_for(15.0)
        cluster.run_for(30.0, lambda: bool(cluster.serving()))
        self._leaving = True
        for guest in cluster.guests:
            guest.busy = False
            if guest.life is not Life.RUNNING and cluster.serving():
                guest.stop()
        if not cluster.run_for(SETTLE_S, cluster.all_level):
            if self.kind.may_stall:
                cluster.say(f"stalled, as it may: {self._stuck()}")
                return
            raise Violation(f"stuck: {self._stuck()}")
        cluster.say("all is level")
        self._read_everything()
        self._leave_cleanly()

    def _stuck(self) -> str:
        parts = [
            f"{guest.name} {guest.life.name}, {guest.in_flight} unanswered"
            for guest in self.cluster.guests
        ]
        for process in self.cluster.gateways:
            for image in process.exports.snapshot() if process is not None else ():
                states = self.cluster.world.replica_states(process.index, image.channel)
                parts.append(
                    f"{process.name}: {image.holder.phase.name}, {image.holder.trouble!r}, "
                    f"missing {image.holder.missing()}, {states}, "
                    f"{self.cluster.world.queues(process.index, image.channel)}"
                )
        return "; ".join(parts)

    def _read_everything(self) -> None:
        cluster = self.cluster
        guest = cluster.serving()[0]
        guest.flush()
        for region in guest.regions:
            guest.read(region.start, len(region))
        if not cluster.run_for(30.0, lambda: guest.in_flight == 0):
            raise Violation(f"the last reads are not answered: {self._stuck()}")
        cluster.check()

    def _leave_cleanly(self) -> None:
        """The last guest leaves: the image closes clean, and replicas are equal throughout."""
        cluster = self.cluster
        # An open whose guest has left is given up.
        cluster.run_for(4.0)
        for guest in cluster.guests:
            guest.stop()

        def closed() -> bool:
            record = cluster.record
            return (
                record is not None
                and record.clean
                and not any(
                    process.exports.snapshot()
                    for process in cluster.gateways
                    if process is not None
                )
            )

        if not cluster.run_for(30.0, closed):
            if self.kind.may_stall:
                return
            raise Violation(f"the image does not close clean: {self._stuck()}")
        cluster.check_all_replicas()

    # Faults. Each ends by itself, at the latest when all are mended.

    def _node(self) -> int:
        return self.chance.randrange(self.cluster.shape.nodes)

    def _gateway(self) -> int:
        return self.chance.randrange(self.cluster.shape.gateways)

    def _for_a_while(self, undo: Callable[[], None], *choices: float) -> None:
        self.cluster.clock.after(self.chance.choice(choices), undo)

    def _kill_node(self) -> None:
        self.cluster.stop_node(self._node(), power=False)

    def _cut_node(self) -> None:
        self.cluster.stop_node(self._node(), power=True)

    def _cut_all(self) -> None:
        for node in range(self.cluster.shape.nodes):
            self.cluster.stop_node(node, power=True)

    def _crash_node(self) -> None:
        """Somewhere in the midst of what its store does."""
        node, power = self._node(), self.chance.random() < 0.5
        self.cluster.world.crash_after(node, self.chance.randrange(1, 60), power)

    def _pause_node(self) -> None:
        node = self._node()
        self.cluster.pause_node(node)
        self._for_a_while(lambda: self.cluster.continue_node(node), 0.5, 3.0, 6.0)

    def _kill_gateway(self) -> None:
        self.cluster.stop_gateway(self._gateway(), host=False)

    def _cut_host(self) -> None:
        self.cluster.stop_gateway(self._gateway(), host=True)

    def _pause_gateway(self) -> None:
        gateway = self._gateway()
        self.cluster.pause_gateway(gateway)
        self._for_a_while(lambda: self.cluster.continue_gateway(gateway), 1.0, 5.0, 12.0, 20.0)

    def _second(self) -> None:
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

    def _partition(self) -> None:
        ways = self.chance.choice(("both", "there", "back"))
        length_s = self.chance.choice((0.3, 2.0, 5.0, 12.0))
        self._cut_path(self._gateway(), self._node(), ways, length_s)

    def _isolate(self) -> None:
        """A host's gateway reaches its own node only, or not even that."""
        gateway, length_s = self._gateway(), self.chance.choice((2.0, 6.0, 15.0))
        ways = self.chance.choice(("both", "there", "back"))
        for node in range(self.cluster.shape.nodes):
            if node != gateway or self.chance.random() < 0.2:
                self._cut_path(gateway, node, ways, length_s)
        if self.chance.random() < 0.5:
            self._cut_etcd_of(self.cluster.gateway_paths[gateway], f"gate-{gateway}", length_s)

    def _split(self) -> None:
        """A host is alone with its node; its guest is started elsewhere once the lease is over."""
        cluster, alone = self.cluster, self._gateway()
        serving = [host for host, guest in enumerate(cluster.guests) if guest.life is Life.RUNNING]
        if serving and self.chance.random() < 0.8:
            alone = serving[0]
        length_s = self.chance.choice((8.0, 20.0, 30.0))
        for gateway in range(cluster.shape.gateways):
            for node in range(cluster.shape.nodes):
                if (gateway == alone) != (node == alone):
                    self._cut_path(gateway, node, "both", length_s)
        self._cut_etcd_of(cluster.gateway_paths[alone], f"gate-{alone}", length_s)
        self._cut_etcd_of(cluster.node_paths[alone], cluster.names[alone], length_s)
        other = (alone + 1) % cluster.shape.gateways
        cluster.clock.after(1.0, lambda: cluster.boot(other))

    def _reset(self) -> None:
        """A connection breaks; short enough for nobody to notice more than that."""
        self.cluster.world.reset(self._gateway(), self._node())

    def _slow_path(self) -> None:
        cluster, gateway, node = self.cluster, self._gateway(), self._node()
        slow_ns = self.chance.choice((5_000_000, 60_000_000, 600_000_000))
        cluster.say(f"gate-{gateway} to {cluster.names[node]}: up to {slow_ns / 1e6:.0f} ms")
        cluster.world.set_latency(gateway, node, 50_000, slow_ns)
        self._for_a_while(
            lambda: cluster.world.set_latency(gateway, node, 50_000, 1_000_000), 2.0, 8.0
        )

    def _cut_etcd_of(self, path: object, name: str, length_s: float) -> None:
        there, back = self.chance.choice(((False, False), (False, True), (True, False)))
        self.cluster.say(f"{name} is cut off from etcd (there {there}, back {back})")
        path.there, path.back = there, back  # type: ignore[attr-defined]

        def undo() -> None:
            path.there = path.back = True  # type: ignore[attr-defined]

        self.cluster.clock.after(length_s, undo)

    def _cut_etcd(self) -> None:
        gateway = self._gateway()
        length_s = self.chance.choice((1.0, 4.0, 9.0, 16.0))
        self._cut_etcd_of(self.cluster.gateway_paths[gateway], f"gate-{gateway}", length_s)

    def _slow_etcd(self) -> None:
        path = self.cluster.gateway_paths[self._gateway()]
        path.slow = True

        def undo() -> None:
            path.slow = False

        self._for_a_while(undo, 3.0, 10.0)

    def _etcd_down(self) -> None:
        state = self.cluster.state
        state.up = False
        self.cluster.say("etcd is down")

        def undo() -> None:
            state.up = True
            self.cluster.say("etcd is up")

        self._for_a_while(undo, 0.5, 3.0, 8.0, 15.0)

    def _slow_disk(self) -> None:
        world, node = self.cluster.world, self._node()
        slow_ns = self.chance.choice((50_000_000, 800_000_000, 6_000_000_000))
        self.cluster.say(f"{self.cluster.names[node]}: syncs take up to {slow_ns / 1e6:.0f} ms")
        world.set_disk_speed(node, slow_ns // 4, slow_ns)
        self._for_a_while(lambda: world.set_disk_speed(node, 100_000, 4_000_000), 3.0, 10.0)

    def _full_disk(self) -> None:
        world, node = self.cluster.world, self._node()
        free = self.chance.choice((0, 8192, 100_000))
        self.cluster.say(f"{self.cluster.names[node]} has {free} bytes left on its disk")
        world.set_free_bytes(node, free)
        self._for_a_while(lambda: world.set_free_bytes(node, None), 2.0, 8.0)

    def _fail_sync(self) -> None:
        node = self._node()
        self.cluster.say(f"a sync of {self.cluster.names[node]} will fail")
        self.cluster.world.fail_sync(node, self.chance.randrange(3))

    def _rot(self) -> None:
        """A byte of a block that is used changes on one node's disk."""
        world, near = self.cluster.world, 2 * BLOCK_BYTES
        place = self.chance.choice((0, SHARD_BYTES - near)) + self.chance.randrange(near)
        found = world.corrupt(self._victim, self.chance.randrange(100), place)
        if found is not None:
            self.cluster.damaged = True
            self.cluster.say(f"{self.cluster.names[self._victim]}: rot in {found}")

    def _snapshot(self) -> None:
        """Somebody takes a snapshot of a node's disk."""
        node = self.cluster.nodes[self._victim]
        if node is not None:
            self._snapshot_of = node
            self.cluster.world.snapshot_disk(self._victim)
            self.cluster.say(f"a snapshot of {node.name}'s disk is taken")

    def _roll_back(self) -> None:
        """… and puts it back, within the same run of the node: its start counter tells nothing."""
        cluster, victim = self.cluster, self._victim
        if self._snapshot_of is None or cluster.nodes[victim] is not self._snapshot_of:
            return
        self._snapshot_of = None
        cluster.stop_node(victim, power=False)
        cluster.world.restore_disk(victim)
        cluster.judge_memory()
        cluster.say(f"{cluster.names[victim]}: the disk's snapshot is put back")
        cluster.start_node(victim)

    def _back_up(self) -> None:
        """Somebody backs etcd up."""
        self._backup = self.cluster.state.memory.backup()
        self.cluster.say("etcd is backed up")

    def _restore_etcd(self) -> None:
        """… and restores the backup."""
        if self._backup is not None:
            self.cluster.say("etcd is restored from the backup")
            self.cluster.rolled_back = True
            self.cluster.state.memory.restore(self._backup)
