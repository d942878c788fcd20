"""Snapshots of a simulated cluster's image: taken, read through any gateway, and judged.

Where the engine says that all is frozen nothing is under way: what a read could return just then is
what the snapshot holds, and no write counts that is not answered. What it was read as once it is
read as ever after, at every gateway, and holds on every node in sync.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from etcd.images import ImageRecord
from tests.sim.oracle import SECTOR_BYTES, TORN, Violation
from tests.sim.shape import IMAGE_NAME
from vmstore.open_image import SnapshotOrder, TakenSnapshot
from vmstore.orders import Answer

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster
    from tests.sim.processes import SimGateway

READ_LIMIT_S = 20.0
"""Until a reader gives up: its gateway may be cut off from all that have the snapshot."""

IN_FLIGHT_MAX = 8
"""Reads that one reader has under way."""


@dataclass(slots=True)
class Known:
    """What is known of one snapshot."""

    name: str
    possible: dict[int, frozenset[int]] = field(default_factory=dict)
    """Of each sector that is used, what it may hold; as it was frozen last."""
    content: dict[int, int] = field(default_factory=dict)
    """Of each sector, what it was read as."""
    told: str | None = None
    """Empty: whoever asked was told that it is taken; else why not; None: was told nothing."""
    dropped: bool = False
    """Somebody had the image rolled back past it."""

    def contents(self) -> dict[int, frozenset[int]]:
        """Return what each sector may hold, by all that is known of it."""
        return {
            sector: frozenset({self.content[sector]}) if sector in self.content else stamps
            for sector, stamps in self.possible.items()
        }


class Snapshots:
    """See the module."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.known: dict[str, Known] = {}
        self.reads = 0
        """Sectors of snapshots that were read and judged."""
        self.readers = 0
        """Readers that are at work."""

    def take(self, gateway: int) -> Known | None:
        """Have a gateway take one, if it runs."""
        process = self._cluster.gateways[gateway]
        if process is None or not process.started or process.process.paused:
            return None
        known = Known(f"s{len(self.known) + 1}")
        self.known[known.name] = known
        self._cluster.say(f"{process.name} is asked for the snapshot {known.name}")
        done: Answer[TakenSnapshot] = Answer()
        done.add_done_callback(lambda future: self._ended(known, future))
        process.take_snapshot(SnapshotOrder(known.name, int(self._cluster.clock.now_s), done))
        return known

    def _ended(self, known: Known, done: Future[TakenSnapshot]) -> None:
        error = done.exception()
        known.told = "" if error is None else str(error)
        self._cluster.say(f"{known.name}: {known.told or 'taken'}")

    def frozen(self, process: SimGateway, channel: int) -> None:
        """All is frozen for what is being taken: note what a read could return now."""
        for image in process.exports.snapshot():
            if image.channel == channel and image.snapshot is not None:
                cluster, record = self._cluster, image.holder.record
                assert record is not None
                known = self.known[image.snapshot.name]
                known.possible = {
                    sector: cluster.oracle.at_rest(sector, record.epoch, cluster.clock.now_s)
                    for region in cluster.used
                    for sector in region
                }

    def read(self, name: str, gateway: int) -> Reader | None:
        """Have somebody read a snapshot at a gateway, if that runs."""
        process = self._cluster.gateways[gateway]
        if process is None or not process.started:
            return None
        return Reader(self._cluster, self, process, self.known[name])

    def check_sector(self, known: Known, sector: int, stamp: int) -> None:
        """Judge what a sector was read as. Raises Violation."""
        self.reads += 1
        if known.possible and stamp not in known.possible[sector]:
            what = "a mixture" if stamp == TORN else f"{stamp:x}"
            may = ", ".join(f"{each:x}" for each in sorted(known.possible[sector]))
            raise Violation(f"{known.name}: sector {sector} read as {what}, it may hold {may}")
        former = known.content.setdefault(sector, stamp)
        if former != stamp:
            raise Violation(
                f"{known.name}: sector {sector} read as {stamp:x}, and as {former:x} before"
            )

    def there(self, record: ImageRecord) -> list[Known]:
        """Return those that a record names, of which somebody was told that they are taken."""
        known = (self.known.get(each.name) for each in record.snapshots)
        return [each for each in known if each is not None and each.told == ""]

    def check_names(self) -> None:
        """Check that the record names what was taken, and nothing that surely was not."""
        record = self._cluster.record
        assert record is not None
        names = {each.name for each in record.snapshots}
        for known in self.known.values():
            if known.told == "" and known.name not in names and not known.dropped:
                raise Violation(f"{known.name} was taken, and is gone")
            if known.told and "it is not known whether" not in known.told and known.name in names:
                raise Violation(f"{known.name} is there, and was said not to be taken")


class Reader:
    """Somebody who reads a whole snapshot over one connection, and leaves."""

    def __init__(
        self, cluster: Cluster, snapshots: Snapshots, process: SimGateway, known: Known
    ) -> None:
        self._cluster = cluster
        self._snapshots = snapshots
        self._process = process
        self._known = known
        self._asked: dict[int, range] = {}
        self._left = list(cluster.used)
        self.client = next(cluster.numbers)
        self.channel: int | None = None
        self.over = False
        self.refused = ""
        """Why it has not read all; empty where it has, or still does."""
        snapshots.readers += 1
        process.engine.guests[self.client] = self
        name = f"{IMAGE_NAME}@{known.name}"
        asked = {"event": "asked", "client": self.client, "query": "go", "name": name}
        process.hear(asked)
        cluster.clock.after(READ_LIMIT_S, lambda: self._end("it takes too long"))

    # What the gateway says: see `tests.sim.guest.Guest`

    def let_in(self, client: int, channel: int, size_bytes: int) -> None:
        """The snapshot is open."""
        self.channel = channel
        size = size_bytes // SECTOR_BYTES
        self._left = [region for region in self._left if region.stop <= size]
        self._ask()

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
        if how in ("failed", "shutdown"):
            self._end(f"a read ends with {how}")
            return
        assert stamps is not None and len(stamps) == len(asked), "a whole answer"
        for sector, stamp in zip(asked, stamps, strict=True):
            self._snapshots.check_sector(self._known, sector, stamp)
        self._ask()

    def _ask(self) -> None:
        world, index = self._cluster.world, self._process.index
        assert self.channel is not None
        while self._left and len(self._asked) < IN_FLIGHT_MAX:
            region = self._left.pop()
            token = next(self._cluster.numbers)
            self._asked[token] = region
            if not world.read(index, self.channel, self.client, token, region.start, len(region)):
                self._end("the gateway has no such snapshot")
                return
        if not self._asked:
            self._end("")

    def _end(self, why: str) -> None:
        if self.over:
            return
        self.over, self.refused = True, why
        self._snapshots.readers -= 1
        if why:
            self._cluster.say(f"{self._known.name} is not read at {self._process.name}: {why}")
        if self._process.engine.guests.pop(self.client, None) is not None:
            left: dict[str, Any] = {"event": "client_gone", "client": self.client}
            self._process.hear({**left, "channel": self.channel})
