"""The daemons of the simulated cluster: what `hci node serve` and `hci gateway serve` do.

Each runs the product's own policy, with the engine's simulation in place of the engine, and without
sockets or threads.
"""

from __future__ import annotations

import pathlib
import random
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from engine._engine import Simulation
from etcd import keys
from etcd.errors import EtcdError
from etcd.interface import Notice, Reread
from etcd.records import NodeRecord
from shard.errors import HciError
from shard.ids import ImageId, image_id
from shard.scrub import ScrubLimits
from tests.sim.arbiters import CLUSTER_ID, SimVoters, Site
from tests.sim.clock import Clock, Process
from tests.sim.cluster_state import Door, Path, SimSession, State
from tests.sim.recovery import SimHistory, holdings
from tests.sim.shape import IMAGE, POOL
from vmstore.caretaker import Caretaker
from vmstore.catalog import Catalog
from vmstore.deciding import TICK_S
from vmstore.errors import ForeignStore, OtherCluster, StoreBehind
from vmstore.exports import Exports
from vmstore.healing import HealLimits
from vmstore.history import Member
from vmstore.ledger import Ledger
from vmstore.names import ImageName
from vmstore.open_image import RemovalOrder, Resize, RollbackOrder, SnapshotOrder
from vmstore.scrubbing import Scrubber
from vmstore.served import Served, ServedFile
from vmstore.set_back import may_run_elsewhere, only_here, seen_later
from vmstore.slowness import SlowLimits

if TYPE_CHECKING:
    from tests.sim.guest import Guest
    from tests.sim.snapshots import Reader

RETRY_S = 1.0
POLL_S = 0.5
CUTTER = (1 << 64) - 1
"""The client that zeroes what a smaller size cuts off."""
SECTOR_BYTES = 512


SLOW = SlowLimits(report_ms=100, leave_behind_ms=800, for_s=4.0, back_after_s=3.0)
"""Times that fit a history."""


class SimDeciding:
    """`vmstore.deciding.Deciding` on the simulated clock."""

    def __init__(self, clock: Clock, process: Process) -> None:
        self._clock = clock
        self._process = process
        self.calls = 0
        """Calls that are under way."""
        self.on_event: Callable[[dict[str, Any]], None] = lambda _event: None

    def now_s(self) -> float:
        """See `Deciding`."""
        return self._clock.now_s

    def start(
        self,
        on_event: Callable[[dict[str, Any]], None],
        tick: Callable[[], None],
        failed: Callable[[str], None],
    ) -> None:
        """See `Deciding`."""
        self.on_event = on_event

        def ticks() -> None:
            tick()
            self._clock.after(TICK_S, ticks, self._process)

        self._clock.after(TICK_S, ticks, self._process)

    def put(self, work: Callable[[], None]) -> None:
        """See `Deciding`."""
        self._clock.after(0, work, self._process)

    def after(self, pause_s: float, work: Callable[[], None]) -> None:
        """See `Deciding`."""
        self._clock.after(pause_s, work, self._process)

    def call(
        self,
        call: Callable[[], Any],
        then: Callable[[Any], None],
        failed: Callable[[HciError], None],
    ) -> None:
        """See `Deciding`."""

        def work() -> Callable[[], None]:
            try:
                result = call()
            except HciError as error:
                why = error
                return lambda: failed(why)
            return lambda: then(result)

        def done(outcome: Callable[[], None]) -> None:
            self.calls -= 1
            self.put(outcome)

        self.calls += 1
        self._clock.start(self._process, work, done)

    def stop(self) -> None:
        """See `Deciding`."""


class SimEngine:
    """The engine's `Gateway`, as one process of the simulation has it."""

    def __init__(self, world: Simulation, gateway: int, on_heal: Callable[[str], None]) -> None:
        self._world = world
        self._gateway = gateway
        self._on_heal = on_heal
        self.node_names: dict[int, list[str]] = {}
        """Of each channel's nodes."""
        self.guests: dict[int, Guest | Reader] = {}
        """By the number of their connection."""
        self.cutting: dict[int, int] = {}
        """Of ranges that are being zeroed the channels, by the token of the request."""
        self._zeroing = 0
        self.on_cut: Callable[[int, int, int], None] = lambda _token, _first, _sectors: None
        self.on_cut_done: Callable[[int, bool], None] = lambda _token, _done: None

    def next_event(self, timeout_ms: int) -> dict[str, Any] | None:
        """Events come by `SimDeciding.on_event`."""
        raise AssertionError("nobody waits for events here")

    def open(self, channel: int, **how: Any) -> None:
        """See `engine.Gateway`, as all that follow."""
        self.node_names[channel] = how["nodes"]
        self._world.open(self._gateway, channel, **how)

    def peek(self, channel: int, node: int) -> None:
        """Ask a node for its record."""
        self._world.peek(self._gateway, channel, node)

    def admit(self, channel: int, nodes: list[tuple[int, int]], *, resume: bool) -> None:
        """Let nodes in."""
        self._world.admit(self._gateway, channel, nodes, resume=resume)

    def reconfigure(self, channel: int, **how: Any) -> None:
        """Go by another record."""
        self._world.reconfigure(self._gateway, channel, **how)

    def freeze(self, channel: int, attempt: int) -> None:
        """Have changes wait for a snapshot."""
        self._world.freeze(self._gateway, channel, attempt)

    def thaw(self, channel: int, attempt: int) -> None:
        """Have them wait no longer."""
        self._world.thaw(self._gateway, channel, attempt)

    def ask_emptied(self, channel: int) -> None:
        """Ask all nodes what they have merged."""
        self._world.ask_emptied(self._gateway, channel)

    def open_reader(self, channel: int, **how: Any) -> None:
        """Read a snapshot."""
        self._world.open_reader(self._gateway, channel, **how)

    def refuse_writes(self, channel: int, sets: list[int]) -> None:
        """Tell clients that these replica sets have no room."""
        self._world.refuse_writes(self._gateway, channel, sets)

    def set_lease_deadline(self, channel: int, deadline_ns: int) -> None:
        """Know until when the lease lives."""
        self._world.set_lease_deadline(self._gateway, channel, deadline_ns)

    def heal(self, channel: int, **how: Any) -> None:
        """Heal a stale node."""
        self._world.heal(self._gateway, channel, **how)
        self._on_heal(self.node_names[channel][how["node"]])

    def writes_lost(self, channel: int, sets: list[int]) -> None:
        """Have the next flush of a client fail."""
        self._world.writes_lost(self._gateway, channel, sets)

    def scrub(self, channel: int, **how: Any) -> None:
        """Read and compare all replicas."""
        self._world.scrub(self._gateway, channel, **how)

    def end_scrub(self, channel: int, attempt: int) -> None:
        """End that."""
        self._world.end_scrub(self._gateway, channel, attempt)

    def zero(self, channel: int, offset: int, length: int) -> None:
        """Make a range read as zeroes, as a client of its own; `zeroed` tells."""
        self._zeroing += 1
        first, sectors = offset // SECTOR_BYTES, length // SECTOR_BYTES
        self.cutting[self._zeroing] = channel
        self.on_cut(self._zeroing, first, sectors)
        self._world.zero(
            self._gateway, channel, CUTTER, self._zeroing, first, sectors, False, False
        )

    def cut(self, token: int, how: str) -> dict[str, Any]:
        """Take the answer to that; return what the engine tells."""
        done = how == "done"
        self.on_cut_done(token, done)
        return {"event": "zeroed", "channel": self.cutting.pop(token), "done": done}

    def end_heal(self, channel: int, attempt: int) -> None:
        """End that."""
        self._world.end_heal(self._gateway, channel, attempt)

    def resize(self, channel: int, size_bytes: int, body: bytes) -> None:
        """Take another size."""
        self._world.resize(self._gateway, channel, size_bytes, body)

    def close(self, channel: int) -> None:
        """Flush, clear, let go."""
        self._world.close(self._gateway, channel)

    def kill(self, channel: int) -> None:
        """Fail everything."""
        self._world.kill(self._gateway, channel)

    def forget(self, channel: int) -> None:
        """Drop an image; its clients go with it."""
        self._world.forget(self._gateway, channel)
        self.disconnect(channel)

    def disconnect(self, channel: int) -> None:
        """End the connections of its clients."""
        for client, guest in list(self.guests.items()):
            if guest.channel == channel:
                guest.disconnected(client, "the gateway ended the connection")

    def stop_listening(self) -> None:
        """Let nobody in any more."""

    def answer_snapshots(self, client: int, snapshots: list[tuple[str, int, int]]) -> None:
        """Nobody asks for contexts here."""

    def answer_names(self, client: int, names: list[str]) -> None:
        """Nobody asks for lists here."""

    def answer_export(
        self,
        client: int,
        *,
        name: str,
        size_bytes: int,
        read_only: bool,
        channel: int | None = None,
    ) -> None:
        """Let a guest in."""
        guest = self.guests.get(client)
        if guest is not None and channel is not None:
            guest.let_in(client, channel, size_bytes)

    def answer_error(self, client: int, kind: str, message: str) -> None:
        """Send a guest away."""
        guest = self.guests.get(client)
        if guest is not None:
            guest.sent_away(client, kind, message)


def _heal_limits(chance: random.Random) -> HealLimits:
    """Limits by chance: none at all in some histories, or few would see what comes after heals."""
    bytes_per_second = chance.choice((0, 1 << 20, 64 << 20))
    share_percent = HealLimits().share_percent if bytes_per_second else 100
    return HealLimits(bytes_per_second=bytes_per_second, share_percent=share_percent)


class KeptServed(ServedFile):
    """What a gateway's processes leave for the next one, until their host goes down."""

    def __init__(self) -> None:
        super().__init__(pathlib.Path("served.json"))
        self._text: str | None = None

    def read(self) -> str | None:
        """See `ServedFile`."""
        return self._text

    def write(self, text: str) -> None:
        """See `ServedFile`."""
        self._text = text


class SimGateway:
    """A gateway's process."""

    def __init__(
        self,
        clock: Clock,
        world: Simulation,
        state: State,
        path: Path,
        chance: random.Random,
        *,
        index: int,
        name: str,
        node: int,
        node_name: str,
        nodes: int,
        site: Site,
        served: KeptServed,
        on_heal: Callable[[str], None],
        scrubs: bool = False,
    ) -> None:
        self.process = Process(name)
        self.index = index
        self.name = name
        self.started = False
        self.scrubs = scrubs
        """Whether it scrubs: it asks etcd now and then."""
        self._clock = clock
        self.holder = f"{chance.getrandbits(128):032x}"
        self._etcd = etcd = Door(state, path, self.process)
        self.engine = SimEngine(world, index, on_heal)
        self.deciding = SimDeciding(clock, self.process)
        self.catalog = Catalog(etcd)
        self.exports = Exports(
            self.engine,  # type: ignore[arg-type]
            self.catalog,
            gateway=name,
            holder=self.holder,
            local_node=lambda: node_name,
            lease=lambda lost, renewed: SimSession(
                etcd, clock, self.process, on_lost=lost, on_renewed=renewed
            ),
            served=Served(self.holder, file=served, lives=lambda _peer: True),
            voters=SimVoters(site, site.ways[name], self.process),
            heal_limits=_heal_limits(chance),
            slow_limits=SLOW,
            lock=f"lock-{index}",
            deciding=self.deciding,
        )
        self.caretaker = Caretaker(
            self.catalog,
            self.exports.maintain,
            self.exports.maintained,
            random.Random(chance.getrandbits(63)),
        )
        self.scrubber = Scrubber(
            self.catalog,
            self.exports,
            self.exports.rot_log,
            self._scrub_of,
            ScrubLimits(every_s=0, bytes_per_second=chance.choice((0, 4 << 20))),
            random.Random(chance.getrandbits(63)),
        )
        self._world = world
        world.start_gateway(index)
        # The node of the same host is reached first, as by its socket.
        for other in sorted(range(nodes), key=lambda other: other != node):
            world.link(index, other)
        clock.start(self.process, self._begin)

    def _begin(self) -> None:
        """As `GatewayDaemon`: begin as soon as etcd answers."""
        while True:
            try:
                self.catalog.init_cluster(CLUSTER_ID)
                self.exports.start()
                self.caretaker.watch()
                self._etcd.watch(keys.LOST, self._on_mark)
                if self.scrubs:
                    self.scrubber.watch()
            except EtcdError:
                self._clock.sleep(RETRY_S, self.process)
            else:
                self.started = True
                break
        while True:
            self._clock.sleep(POLL_S, self.process)
            self.caretaker.look(self._clock.now_s)
            if self.scrubs:
                self.scrubber.look(self._clock.now_s, int(self._clock.now_s * 1000) + 1)

    def _on_mark(self, notice: Notice) -> None:
        """As `GatewayDaemon`: a recovery may have raised the epochs of its images."""
        items = notice.items if isinstance(notice, Reread) else notice.changes
        if not any(item.value is not None for item in items):
            self.exports.look_again()

    def _scrub_of(self, image: ImageId) -> dict[str, Any] | None:
        channel = next((i.channel for i in self.exports.snapshot() if i.image == image), None)
        return None if channel is None else self._world.scrub_state(self.index, channel)

    def resize(self, name: ImageName, size_bytes: int) -> Future[None]:
        """Have the image resized, as the control service does."""
        resize = Resize(size_bytes, True, Future())
        self.deciding.put(lambda: self.exports._find_to_resize(name, resize))
        return resize.done

    def take_snapshot(self, order: SnapshotOrder) -> None:
        """Have a snapshot of the image taken, as the control service does."""
        name = ImageName(POOL, IMAGE)
        self.deciding.put(lambda: self.exports._find_to_freeze(name, order))

    def roll_back(self, order: RollbackOrder) -> None:
        """Have the image rolled back, as the control service does."""
        name = ImageName(POOL, IMAGE)
        self.deciding.put(lambda: self.exports._find_to_roll_back(name, order))

    def remove_snapshot(self, order: RemovalOrder) -> None:
        """Have a snapshot removed, as the control service does."""
        name = ImageName(POOL, IMAGE)
        self.deciding.put(lambda: self.exports._find_to_remove(name, order))

    def rename(self, name: str) -> None:
        """Be given another gateway's name by mistake: leases are taken in it."""
        self.exports._leases._gateway = name

    def hear(self, event: dict[str, Any]) -> None:
        """Take an event of the engine."""
        self.deciding.put(lambda: self.deciding.on_event(event))


class SimNode:
    """A node's process: registers, and buries images that were deleted, as `NodeDaemon` does."""

    def __init__(
        self,
        clock: Clock,
        world: Simulation,
        state: State,
        path: Path,
        *,
        index: int,
        name: str,
        store_id: str,
        start_counter: int,
        run: str,
        refused: Callable[[str, bool], None],
        set_back: Callable[[int], None],
        ledger: Ledger | None = None,
    ) -> None:
        self.process = Process(name)
        self.index = index
        self.name = name
        self.registered = False
        self.session: SimSession | None = None
        self._watching = False
        self._clock = clock
        self._world = world
        self._etcd = Door(state, path, self.process)
        self._catalog = Catalog(self._etcd)
        self._store_id = store_id
        self.start_counter = start_counter
        self._run = run
        self._refused = refused
        self._set_back = set_back
        self.may_serve = False
        self.history: SimHistory | None = None
        """Where the node keeps a copy of the cluster's records, and judges etcd by it."""
        if ledger is not None:
            self.history = SimHistory(
                name,
                self._etcd,
                ledger,
                clock,
                self.process,
                lambda: holdings(world, index),
                lambda images: [self._bury(image) for image in images].clear(),
            )
        clock.start(self.process, self._look_after)

    def _look_after(self) -> None:
        while True:
            if self.registered:
                self._check_history()
            if not self.registered:
                self._register()
            self._clock.sleep(POLL_S, self.process)

    def member(self) -> Member:
        """Return what it tells a recovery."""
        assert self.history is not None, "it keeps a copy of the records"
        distrusted = self._world.inventory(self.index)["distrusted"]
        known = replace(
            self.history.known(), distrusted=frozenset(ImageId(image) for image in distrusted)
        )
        return Member(self.name, self._store_id, self.start_counter, known)

    def _check_history(self) -> None:
        try:
            believed = self.history is None or self.history.check_if_due()
        except EtcdError:
            return
        if not believed:
            self.registered = False
            if self.session is not None:
                self.session.close()

    def _lost(self) -> None:
        self.registered = False

    def _register(self) -> None:
        try:
            record = NodeRecord(
                name=self.name,
                address=f"{self.name}:1",
                control=f"{self.name}:2",
                socket=None,
                host=f"host-{self.index}",
                zone="zone",
                labels={},
                capacity_bytes=1 << 40,
                store_id=self._store_id,
                start_counter=self.start_counter,
                run=self._run,
            )
            if not self._judge(record) or (self.history is not None and not self.history.check()):
                return
            self._catalog.init_cluster(CLUSTER_ID)
            if self.session is not None:
                self.session.close()
            self.session = session = SimSession(
                self._etcd, self._clock, self.process, on_lost=self._lost
            )
            self._catalog.announce_node(record, session.lease, self._run)
            session.start()
            if not self._watching:
                self._etcd.watch(keys.TOMBSTONES, self._on_tombstones)
                self._watching = True
            for image in self._catalog.tombstones():
                self._bury(image)
        except (OtherCluster, ForeignStore, StoreBehind) as error:
            self._refused(str(error), True)
        except EtcdError:
            self.may_serve = True
        except HciError:
            return
        else:
            self.registered = True

    def _judge(self, own: NodeRecord) -> bool:
        """As `NodeDaemon._may_serve`."""
        known = self._catalog.nodes().get(own.name)
        if known is None or not seen_later(known, own):
            self.may_serve = True
            return True
        alive = self._catalog.alive()
        if may_run_elsewhere(alive.get(own.name), own):
            return False
        images = (entry.image.record for entry in self._catalog.images())
        lonely = only_here(images, own.name, alive)
        if lonely:
            behind = StoreBehind(own.name, known.start_counter, own.start_counter, lonely)
            self._refused(str(behind), False)
        else:
            self._set_back(known.start_counter)
        return False

    def _on_tombstones(self, notice: Notice) -> None:
        found = notice.items if isinstance(notice, Reread) else notice.changes
        for item in found:
            if item.value is not None:
                self._bury(image_id(item.key.removeprefix(keys.TOMBSTONES)))

    def _bury(self, image: ImageId) -> None:
        self._world.delete_image(self.index, image)
