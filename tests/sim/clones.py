"""Clones of a simulated cluster's image: made, written, read through any gateway, and judged.

A clone holds what its snapshot does, but for what was written to it since. Whoever uses one reads
all of it, writes here and there, flushes, and reads again. Of a sector that was written and flushed
there is one content that is right; of one whose write was not flushed, what it held before as well.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from etcd import keys
from etcd.errors import EtcdError
from etcd.images import ImageRecord
from shard.errors import HciError
from shard.ids import ImageId, image_id_from_bytes
from tests.sim.clock import Process
from tests.sim.cluster_state import Door, Path
from tests.sim.oracle import Violation
from tests.sim.shape import IMAGE, POOL, SHARD_BYTES
from tests.sim.snapshots import Known
from vmstore.catalog import Catalog
from vmstore.names import ImageName, SnapshotName
from vmstore.orders import Answer

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster
    from tests.sim.processes import SimGateway

USE_LIMIT_S = 25.0
"""Until a user gives up: the clone may be open elsewhere, or wait for nodes."""

IN_FLIGHT_MAX = 6
"""Requests that one user has under way."""

WRITES = 4
"""That one user makes between reading all and reading all again."""


@dataclass(slots=True)
class Clone:
    """What is known of one clone."""

    name: str
    source: Known
    image: ImageId | None = None
    """None until etcd was heard to have it."""
    written: dict[int, set[int]] = field(default_factory=dict)
    """Of each sector that was written to it what it may hold, but for what the snapshot holds."""
    surely: set[int] = field(default_factory=set)
    """Sectors of which a write was flushed: the snapshot does not show there any more."""
    user: User | None = None
    told: str | None = None
    """Empty: whoever asked was told that it is there; else why not; None: was told nothing."""


class Clones:
    """See the module."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.known: dict[str, Clone] = {}
        self.reads = 0
        """Sectors of clones that were read and judged."""

    def make(self, source: Known, gateway: int) -> Clone | None:
        """Have somebody clone a snapshot, as the command line does.

        Who does asks a gateway first whether it lasts, unless it has a clone.
        """
        process = self._cluster.gateways[gateway]
        if process is None or not process.started or process.process.paused:
            return None
        clone = Clone(f"c{len(self.known) + 1}", source)
        self.known[clone.name] = clone
        if any(each.source is source for each in self.there()):
            self._make(clone, None)
            return clone
        self._cluster.say(f"{process.name} is asked whether {source.name} lasts, for {clone.name}")
        done: Answer[int] = Answer()
        done.add_done_callback(lambda future: self._confirmed(clone, future))
        process.confirm_snapshot(source.name, done)
        return clone

    def _confirmed(self, clone: Clone, done: Future[int]) -> None:
        error = done.exception()
        if error is not None:
            clone.told = str(error)
            self._cluster.say(f"{clone.name}: {clone.told}")
        else:
            self._make(clone, done.result())

    def _make(self, clone: Clone, layer: int | None) -> None:
        cluster = self._cluster
        operator = Process("operator")
        drawn = image_id_from_bytes(cluster.clone_chance.randbytes(16))
        catalog = Catalog(Door(cluster.state, Path(), operator), lambda: drawn)
        source = SnapshotName(ImageName(POOL, IMAGE), clone.source.name)

        def make() -> str:
            try:
                made = catalog.clone_image(source, ImageName(POOL, clone.name), layer)
            except (HciError, EtcdError) as error:
                return str(error) or type(error).__name__
            clone.image = made.record.id
            return ""

        def told(how: str) -> None:
            clone.told = how
            cluster.say(f"{clone.name}: {how or f'is a clone of {clone.source.name}'}")

        cluster.clock.start(operator, make, told)

    def there(self) -> list[Clone]:
        """Return the clones that are there."""
        return [clone for clone in self.known.values() if clone.image]

    def record(self, clone: Clone) -> ImageRecord:
        """Return a clone's record, as etcd has it."""
        assert clone.image is not None, "it is there"
        item = self._cluster.state.memory.get(keys.image(clone.image))
        if item is None:
            raise Violation(f"{clone.name} is gone")
        return ImageRecord.decode(item.key, item.value)

    def record_changed(self, former: ImageRecord, record: ImageRecord) -> None:
        """Judge a record of the parent: what clones begin on stays."""
        gone = {each.name for each in former.snapshots} - {each.name for each in record.snapshots}
        for clone in self.there():
            if clone.source.name in gone and not self._cluster.rolled_back:
                raise Violation(f"{clone.source.name} goes, and {clone.name} begins on it")

    def use(self, clone: Clone, gateway: int) -> User | None:
        """Have somebody use a clone at a gateway, if that runs and nobody else does."""
        process = self._cluster.gateways[gateway]
        if process is None or not process.started or process.process.paused:
            return None
        if clone.user is not None and not clone.user.has_ended:
            return None
        clone.user = User(self._cluster, self, process, clone)
        return clone.user

    def check_sector(self, clone: Clone, sector: int, stamp: int) -> None:
        """Judge what a sector was read as. Raises Violation."""
        self.reads += 1
        written = clone.written.get(sector, set())
        if stamp in written:
            return
        if sector in clone.surely:
            may = ", ".join(f"{each:x}" for each in sorted(written))
            raise Violation(f"{clone.name}: sector {sector} read as {stamp:x}, it may hold {may}")
        try:
            self._cluster.snapshots.check_sector(clone.source, sector, stamp)
        except Violation as violation:
            raise Violation(f"{clone.name}, a clone: {violation}") from violation

    def all_level(self) -> bool:
        """Whether all nodes of all clones are in sync."""
        return not any(self.record(clone).stale for clone in self.there())

    def check_all_replicas(self) -> None:
        """All replicas in sync of all clones are equal, with what shows of their parent."""
        cluster = self._cluster
        for clone in self.there():
            record = self.record(clone)
            for shard in range(cluster.shape.shards):
                in_sync = record.membership.in_sync(cluster.set_of(shard))
                digests = {
                    name: cluster.world.shard_digests(
                        cluster.names.index(name), record.id, record.layer_ids, shard
                    )
                    for name in in_sync
                }
                found = {name: known for name, known in digests.items() if known is not None}
                if len({tuple(known) for known in found.values()}) > 1:
                    raise Violation(f"shard {shard} of {clone.name} differs on {sorted(found)}")


class User:
    """Somebody who uses a clone over one connection, and leaves."""

    def __init__(self, cluster: Cluster, clones: Clones, process: SimGateway, clone: Clone) -> None:
        self._cluster = cluster
        self._clones = clones
        self._process = process
        self.clone = clone
        self._stages = [self._read_all, self._write_some, self._flush, self._read_all]
        self._asked: dict[int, tuple[str, range, int]] = {}
        self._left: list[tuple[str, range, int]] = []
        self._writes: list[tuple[range, int]] = []
        self.client = next(cluster.numbers)
        self.channel: int | None = None
        self.over = False
        self.refused = ""
        """Why it has not done all; empty where it has, or is still at it."""
        process.engine.guests[self.client] = self
        asked = {"event": "asked", "client": self.client, "query": "go",
                 "name": f"{POOL}/{clone.name}"}  # fmt: skip
        process.hear(asked)
        cluster.clock.after(USE_LIMIT_S, lambda: self._end("it takes too long"))

    @property
    def has_ended(self) -> bool:
        """Whether nothing more comes of it."""
        return self.over or not self._process.process.alive

    # What the gateway says: see `tests.sim.guest.Guest`

    def let_in(self, client: int, channel: int, size_bytes: int) -> None:
        """The clone is open."""
        size = self._cluster.shape.shards * SHARD_BYTES
        assert size_bytes == size, "it is as large as its snapshot"
        self.channel = channel
        self._cluster.say(f"{self.clone.name} is served by {self._process.name}")
        self._next()

    def sent_away(self, client: int, kind: str, message: str) -> None:
        """It cannot be opened, or not now."""
        self._end(message)

    def disconnected(self, client: int, why: str) -> None:
        """The gateway has ended the connection."""
        self._end(why)

    def answered(self, token: int, how: str, stamps: list[int] | None) -> None:
        """Take an answer. Raises Violation."""
        asked = self._asked.pop(token, None)
        if asked is None or self.over:
            return
        kind, sectors, _ = asked
        if how in ("failed", "shutdown", "full"):
            self._end(f"a {kind} ends with {how}")
            return
        if kind == "read":
            assert stamps is not None and len(stamps) == len(sectors), "a whole answer"
            for sector, found in zip(sectors, stamps, strict=True):
                self._clones.check_sector(self.clone, sector, found)
        elif kind == "flush":
            for written, content in self._writes:
                for sector in written:
                    self.clone.written[sector] = {content}
                    self.clone.surely.add(sector)
        self._go_on()

    # What it does

    def _next(self) -> None:
        if self._stages:
            self._stages.pop(0)()
            self._go_on()
        else:
            self._end("")

    def _read_all(self) -> None:
        self._left = [("read", region, 0) for region in self._cluster.used]

    def _write_some(self) -> None:
        chance = self._cluster.clone_chance
        regions = chance.sample(self._cluster.used, min(WRITES, len(self._cluster.used)))
        for region in regions:
            first = chance.randrange(region.start, region.stop)
            if chance.random() < 0.5:
                first = first // 8 * 8
            sectors = range(first, min(region.stop, first + chance.choice((3, 8, 8, 16))))
            kind = chance.choice(("write", "write", "write", "zero"))
            stamp = next(self._cluster.numbers) << 8 | 1 if kind == "write" else 0
            for sector in sectors:
                self.clone.written.setdefault(sector, set()).add(stamp)
            self._writes.append((sectors, stamp))
            self._left.append((kind, sectors, stamp))

    def _flush(self) -> None:
        self._left = [("flush", range(0), 0)]

    def _go_on(self) -> None:
        world, index = self._cluster.world, self._process.index
        assert self.channel is not None
        while self._left and len(self._asked) < IN_FLIGHT_MAX and not self.over:
            kind, sectors, stamp = self._left.pop()
            token = next(self._cluster.numbers)
            self._asked[token] = (kind, sectors, stamp)
            arguments: tuple[Any, ...] = ()
            if kind == "read":
                arguments = (sectors.start, len(sectors))
            elif kind == "write":
                arguments = (sectors.start, len(sectors), stamp, False)
            elif kind == "zero":
                arguments = (sectors.start, len(sectors), bool(token % 2), False)
            if not getattr(world, kind)(index, self.channel, self.client, token, *arguments):
                self._end("the gateway has no such image")
                return
        if not self._asked and not self._left and not self.over:
            self._next()

    def _end(self, why: str) -> None:
        if self.over:
            return
        self.over, self.refused = True, why
        if why:
            self._cluster.say(f"{self.clone.name} is not used at {self._process.name}: {why}")
        if self._process.engine.guests.pop(self.client, None) is not None:
            left: dict[str, Any] = {"event": "client_gone", "client": self.client}
            self._process.hear({**left, "channel": self.channel})
