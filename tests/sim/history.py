"""One random history: what happens to a cluster, all of it from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from tests.sim.clones import Clone
from tests.sim.cluster import Cluster
from tests.sim.copies import Copies
from tests.sim.guest import Life
from tests.sim.kinds import kind_of
from tests.sim.oracle import Violation

SETTLE_S = 90.0
"""Until everything works again after the last fault: opening takes 20 s at most, leases 10."""

OVERDUE_S = 12.0
"""What can be answered is answered within this time when no fault begins: a silent node is given up
after 4 s, a lost one left behind after 3 more."""

CHECK_S = (0.02, 0.7)
"""Between two checks of all, drawn between these."""

AFTER = ("stored", "admitted", "levelled", "healed", "repaired")
"""Events of an engine after which all is checked as well, more often than not."""


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


class History(Copies):
    """Plays one seed."""

    def __init__(self, seed: int, *, frames: bool = False, length_s: float | None = None) -> None:
        self.seed = seed
        self._frames = frames
        self.chance = random.Random(f"history {seed}")
        self.kind = kind_of(seed)
        shape = self.chance.choice(self.kind.shapes)
        super().__init__(Cluster(self.chance.getrandbits(63), shape), self.chance)
        if frames:
            self.cluster.world.tell_all()
        self.pause_s = self.chance.choice((0.6, 2.0, 5.0))
        drawn_s = self.chance.uniform(10, 45)
        self.length_s = drawn_s if length_s is None else length_s
        self._leaving = False
        self._looks = random.Random(f"looks {seed}")
        """When all is checked: what else happens is not drawn from it."""

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
            cluster.close()
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
        cluster.scrubs, cluster.processes = self.kind.scrubs, self.kind.processes
        if self.kind.ledgers:
            self._backup = cluster.state.memory.backup()
            cluster.nodes.keep_ledgers()
        cluster.build()
        if cluster.shape.arbiter:
            cluster.site.care(cluster.nodes.up)
        for guest in cluster.guests:
            guest.pause_s = self.chance.choice((0.015, 0.06, 0.2))
            guest.lazy = self.chance.random() < 0.3
            if self.kind.sparse:
                guest.pause_s, guest.lazy = self.chance.choice((0.05, 0.15)), True
        cluster.boot(0)
        cluster.run_for(1.0)
        self._check()
        self._next_fault()
        cluster.clock.after(0.5, self._keep_guests)
        cluster.run_for(self.length_s)
        self._over = True
        if self.kind.some_away:
            self.mended_but_for_some()
        self.mended()

    def _check(self) -> None:
        self.cluster.safety.check()
        self.cluster.clock.after(self._looks.uniform(*CHECK_S), self._check)

    def _event(self, gateway: int, kind: str, node: str) -> None:
        super()._event(gateway, kind, node)
        if kind in AFTER and self._looks.random() < 0.6:
            pause_s = self._looks.choice((0.0, 0.002, 0.05)) * self._looks.random()
            self.cluster.clock.after(pause_s, self.cluster.safety.check)

    def _keep_guests(self) -> None:
        """Whoever keeps guests running boots one where none runs."""
        if self._leaving:
            return
        cluster = self.cluster
        away = cluster.clock.now_s < self._away_until_s and not self._over
        wanted = (Life.CONNECTING, Life.RUNNING)
        if not away and not any(guest.life in wanted for guest in cluster.guests):
            hosts = [i for i, gateway in enumerate(cluster.gateways) if gateway is not None]
            if hosts:
                cluster.boot(self.chance.choice(hosts))
        cluster.clock.after(0.5, self._keep_guests)

    def _next_fault(self) -> None:
        if self._over:
            return
        faults = self.kind.faults
        name = self.chance.choices(list(faults), list(faults.values()))[0]
        act: Callable[[], None] = getattr(self, name)
        act()
        pause_s = self.chance.expovariate(1 / self.pause_s)
        self.cluster.clock.after(pause_s, self._next_fault)

    def mended_but_for_some(self) -> None:
        """Some stay away, all else ends: who can go on without them does. Raises Violation."""
        cluster = self.cluster
        nodes, arbiter = self._choose_away()
        cluster.mend(nodes, arbiter=arbiter)
        # As in `mended`; what is asked meanwhile is judged when it has had its time.
        cluster.run_for(15.0)
        cluster.run_for(30.0, lambda: bool(cluster.serving()))
        cluster.run_for(OVERDUE_S)
        if not cluster.run_for(SETTLE_S, lambda: not cluster.liveness.overdue(OVERDUE_S)):
            raise Violation(f"{cluster.liveness.overdue(OVERDUE_S)}: {self._stuck()}")
        cluster.say("all that can go on does")

    def _choose_away(self) -> tuple[frozenset[int], bool]:
        """Return the nodes that stay away, and whether the arbiter is there."""
        shape = self.cluster.shape
        if shape.arbiter and self.chance.random() < 0.2:
            return frozenset(), False
        most = 2 if shape.replica_sets > 1 and not shape.arbiter else 1
        count = self.chance.randint(1, most)
        return frozenset(self.chance.sample(range(shape.nodes), count)), True

    def mended(self) -> None:
        """End all faults; everything must work again, and hold what it should. Raises Violation."""
        cluster = self.cluster
        for guest in cluster.guests:
            guest.pause_s = max(guest.pause_s, 0.2)
        cluster.mend()
        if "shrink" in self.kind.faults:
            self._grow_back()
        # Leases that lapsed are taken, by whoever comes first; then one guest is left.
        cluster.run_for(15.0)
        cluster.run_for(30.0, lambda: bool(cluster.serving()))
        self._leaving = True
        for guest in cluster.guests:
            guest.busy = False
            if guest.life is not Life.RUNNING and cluster.serving():
                guest.stop()
        if not cluster.run_for(SETTLE_S, cluster.liveness.all_level):
            self._stalled(f"stuck: {self._stuck()}")
            return
        cluster.say("all is level")
        self._read_everything()
        if self.kind.snapshots:
            self._read_snapshots()
        if self.kind.removals:
            cluster.run_for(120.0, cluster.removals.all_merged)
            cluster.removals.check()
            self._read_snapshots()
        if self.kind.clones:
            self._use_clones()
        if self.kind.rollbacks:
            cluster.rollbacks.check()
            cluster.run_for(20.0, cluster.rollbacks.all_dropped)
            cluster.rollbacks.check_dropped()
        if self.kind.scrubs:
            self._scrub_everything()
        self._leave_cleanly()

    def _stalled(self, how: str) -> None:
        """Something waits for a person, or must not; all that can go on does. Raises Violation."""
        cluster = self.cluster
        excuse = cluster.liveness.excuse()
        if not excuse:
            raise Violation(how)
        cluster.say(f"it may wait, {excuse}: {how}")
        for guest in cluster.serving():
            for region in guest.regions:
                guest.read(region.start, len(region))
        # What is answered is judged, here as ever.
        cluster.run_for(OVERDUE_S)
        if not cluster.rolled_back and cluster.liveness.overdue(OVERDUE_S):
            raise Violation(f"{cluster.liveness.overdue(OVERDUE_S)}: {self._stuck()}")
        cluster.safety.check()

    def _grow_back(self) -> None:
        """Whoever made the image smaller makes it as large as it was."""
        cluster, shards = self.cluster, self.cluster.shape.shards
        for attempt in range(12):
            if cluster.size_shards() == shards:
                return
            cluster.operator.resize(attempt % cluster.shape.gateways, shards)
            cluster.run_for(10.0, lambda: cluster.size_shards() == shards)
            for guest in cluster.guests:
                # Whoever came before sees the former size.
                guest.stop()
        raise Violation(f"the image does not grow: {self._stuck()}")

    def _scrub_everything(self) -> None:
        """A scrub leaves no rot on any node in sync, unless there is nobody to repair it from."""
        cluster = self.cluster
        for ask in (False, True):
            if ask:
                cluster.operator.ask_for_scrub()
                cluster.run_for(1.0)
            if not cluster.run_for(90.0, cluster.operator.is_scrubbed):
                found = cluster.operator.scrub_record()
                raise Violation(f"a scrub does not end: {found}, {self._stuck()}")
        found = cluster.operator.scrub_record()
        if not (found.last.unrepairable or found.bad or found.last.missed):
            cluster.run_for(2.0)
            cluster.safety.check_no_rot()

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
        cluster.safety.check()

    def _read_snapshots(self) -> None:
        """Each snapshot is what it was, at every gateway."""
        cluster = self.cluster
        assert cluster.record is not None
        cluster.snapshots.check_names()
        for snapshot in cluster.record.snapshots:
            for gateway in range(cluster.shape.gateways):
                reader = cluster.snapshots.read(snapshot.name, gateway)
                assert reader is not None, "all gateways run"
                if not cluster.run_for(30.0, lambda reader=reader: reader.over) or reader.refused:
                    raise Violation(f"{snapshot.name} is not read: {reader.refused or 'stuck'}")
        cluster.safety.check_all_replicas()

    def _use_clones(self) -> None:
        """Each clone is whole on all of its nodes, and holds what it should at every gateway."""
        cluster = self.cluster
        if not cluster.run_for(120.0, cluster.clones.all_level):
            stale = {each.name: dict(cluster.clones.record(each).stale)
                     for each in cluster.clones.there()}  # fmt: skip
            raise Violation(f"clones are never level: {stale}, {self._stuck()}")
        for clone in cluster.clones.there():
            for gateway in range(cluster.shape.gateways):
                self._use_clone(clone, gateway)
        cluster.run_for(1.0)
        cluster.clones.check_all_replicas()

    def _use_clone(self, clone: Clone, gateway: int) -> None:
        cluster = self.cluster
        for _ in range(10):
            cluster.run_for(30.0, lambda: clone.user is None or clone.user.has_ended)
            user = cluster.clones.use(clone, gateway)
            assert user is not None, "all gateways run"
            cluster.run_for(30.0, lambda user=user: user.over)
            if not user.refused:
                return
            # Another gateway may not have closed it yet.
            cluster.run_for(2.0)
        raise Violation(f"{clone.name} is not served: {user.refused}, {self._stuck()}")

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
            self._stalled(f"the image does not close clean: {self._stuck()}")
            return
        cluster.safety.check_all_replicas()
        if self.kind.resizes:
            self._delete_with_a_node_away()

    def _delete_with_a_node_away(self) -> None:
        """Nothing of a deleted image is left, nor comes back with a node that was away."""
        cluster, away = self.cluster, self._node()
        cluster.nodes.keep_down(away, power=self.chance.random() < 0.5)
        if not cluster.operator.delete_image():
            raise Violation("an image that nobody has open cannot be deleted")
        cluster.run_for(2.0)
        cluster.nodes.start(away)

        def kept() -> list[int]:
            nodes = range(cluster.shape.nodes)
            return [node for node in nodes if cluster.world.has_image(node, cluster.image)]

        if not cluster.run_for(20.0, lambda: not kept()):
            raise Violation(f"a deleted image is left on nodes {kept()}")
        if cluster.operator.make_image_of_id(cluster.image) != "refused":
            raise Violation("the id of a deleted image is given again")
