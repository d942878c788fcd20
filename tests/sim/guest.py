"""A guest: one disk over one connection to one gateway, and a program that writes and checks.

It does what QEMU does: with `reconnect-delay` it comes back to the gateway of its host when that is
there again, and what was unanswered is asked anew. An image that its gateway has lost ends it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING

from engine._engine import Simulation
from tests.sim.clock import Clock
from tests.sim.oracle import SECTOR_BYTES, Oracle, Written
from vmstore.errors import ClientBarred

if TYPE_CHECKING:
    from tests.sim.processes import SimGateway

BLOCK_BYTES = 4096
IN_FLIGHT_MAX = 12
CHANGES_IN_FLIGHT_MAX = 5
"""What waits for a lost node must not keep a guest from reading."""
SECTORS_MAX = 20


class Life(Enum):
    """What a guest does."""

    OFF = auto()
    CONNECTING = auto()
    RUNNING = auto()
    FAILED = auto()
    """It got an I/O error, or its image is another host's: it is never let in again."""


@dataclass(slots=True)
class _Asked:
    kind: str
    client: int
    begun: float
    epoch: int
    first: int = 0
    sectors: int = 0
    stamp: int = 0
    durable: bool = False
    covered: list[Written] | None = None


@dataclass(frozen=True, slots=True)
class Shared:
    """What all guests of an image have in common."""

    clock: Clock
    world: Simulation
    chance: random.Random
    oracle: Oracle
    regions: tuple[range, ...]
    """Sectors that are used."""
    say: Callable[[str], None]
    next_number: Callable[[], int]
    on_answer: Callable[[_Asked, int], None]
    """Judges a write that is answered: (request, gateway)."""
    on_served: Callable[[int, str], None]
    """Judges that a holder serves in an epoch."""
    may_fail: Callable[[], bool]
    """Whether a read may end in EIO: blocks were damaged."""
    tells_full: bool
    """Whether what needs room may end in ENOSPC."""


class Guest:
    """See the module."""

    def __init__(self, name: str, image: str, shared: Shared) -> None:
        self.name = name
        self.life = Life.OFF
        self.channel: int | None = None
        self.busy = True
        """Whether it asks for anything by itself."""
        self.pause_s = 0.05
        self.lazy = False
        """Whether it hardly ever flushes."""
        self.refused = 0
        """Requests that found disks full."""
        self.peer: str | None = None
        """Its process, as its host's kernel tells it."""
        self._image = image
        self._shared = shared
        self._gateway: SimGateway | None = None
        self._client = 0
        self._asked: dict[int, _Asked] = {}
        self._working = False
        self.answers = 0
        self.epoch = 0
        self.size_sectors = 1 << 60
        """How large the image was when it was let in."""

    @property
    def gateway(self) -> SimGateway | None:
        """Where it is connected, or tries to be."""
        return self._gateway

    @property
    def regions(self) -> tuple[range, ...]:
        """The sectors that it uses."""
        regions, size = self._shared.regions, self.size_sectors
        if size >= regions[-1].stop:
            return regions
        return tuple(region for region in regions if region.stop <= size)

    @property
    def client(self) -> int:
        """The number of its connection."""
        return self._client

    def unanswered(self) -> list[int]:
        """Return the tokens of requests that are not answered."""
        return list(self._asked)

    def waiting(self) -> list[tuple[str, float, range]]:
        """Return what is not answered: what it is, when it was asked, and the blocks it is of."""
        per_block = BLOCK_BYTES // SECTOR_BYTES
        return [
            (
                asked.kind,
                asked.begun,
                range(asked.first // per_block, -(-(asked.first + asked.sectors) // per_block)),
            )
            for asked in self._asked.values()
        ]

    @property
    def in_flight(self) -> int:
        """Requests that are not answered."""
        return len(self._asked)

    def start(self, gateway: SimGateway) -> None:
        """Boot on the host of this gateway, or come back to it."""
        self._gateway = gateway
        self.life = Life.CONNECTING
        self._connect()
        if not self._working:
            self._working = True
            self._shared.clock.after(self.pause_s, self._work)

    def stop(self) -> None:
        """The guest is switched off; its gateway sees the connection end."""
        if self.life in (Life.CONNECTING, Life.RUNNING):
            self._leave()
        self._abandon()
        self.life = Life.OFF
        self.channel = None

    def _leave(self) -> None:
        gateway, client = self._gateway, self._client
        if gateway is not None and gateway.engine.guests.pop(client, None) is not None:
            gateway.hear({"event": "client_gone", "client": client, "channel": self.channel})

    def _connect(self) -> None:
        gateway = self._gateway
        if self.life is not Life.CONNECTING or gateway is None or not gateway.process.alive:
            return
        if self._client in gateway.engine.guests:
            return
        if not gateway.started:
            self._shared.clock.after(0.1, self._connect)
            return
        self._client = self._shared.next_number()
        gateway.engine.guests[self._client] = self
        asked = {"event": "asked", "client": self._client, "query": "go", "name": self._image}
        gateway.hear(asked if self.peer is None else {**asked, "peer": self.peer})

    # What the gateway says

    def let_in(self, client: int, channel: int, size_bytes: int) -> None:
        """The image is open, and so large; another size is seen by who comes later."""
        if client != self._client or self.life is not Life.CONNECTING or self._gateway is None:
            return
        images = self._gateway.exports.snapshot()
        record = next(image.holder.record for image in images if image.channel == channel)
        assert record is not None
        self.epoch = record.epoch
        self.channel, self.life = channel, Life.RUNNING
        self.size_sectors = size_bytes // SECTOR_BYTES
        shared = self._shared
        shared.on_served(record.epoch, record.holder or "")
        shared.oracle.settle(record.epoch, shared.clock.now_s)
        shared.say(f"{self.name} is served by {self._gateway.name}, epoch {record.epoch}")

    def sent_away(self, client: int, kind: str, message: str) -> None:
        """The image cannot be opened now; whoever keeps guests running tries again."""
        if client != self._client or self._gateway is None:
            return
        self._shared.say(f"{self.name} is refused by {self._gateway.name}: {message}")
        self._gateway.engine.guests.pop(client, None)
        if self.life is Life.RUNNING or message == str(ClientBarred(self._image)):
            # The latter has to be started anew.
            self.fail(message)
        elif self.life is Life.CONNECTING:
            self._shared.clock.after(1.0, self._connect)

    def disconnected(self, client: int, why: str) -> None:
        """The gateway ended the connection, on purpose."""
        gateway = self._gateway
        if client != self._client or gateway is None:
            return
        gateway.engine.guests.pop(client, None)
        gateway.hear({"event": "client_gone", "client": client, "channel": self.channel})
        if self.life is Life.RUNNING:
            self.fail(why)

    def fail(self, why: str) -> None:
        """It saw an error: it is over with it."""
        self._shared.say(f"{self.name} fails: {why}")
        self._leave()
        self._abandon()
        self.life, self.channel = Life.FAILED, None

    def gateway_gone(self) -> None:
        """The process at the other end died; wait for the next one on this host."""
        self._abandon()
        self.channel = None
        if self.life is Life.RUNNING:
            self.life = Life.CONNECTING

    def host_gone(self) -> None:
        """The host died, and the guest with it."""
        self._abandon()
        self.life, self.channel = Life.OFF, None

    def _abandon(self) -> None:
        for token, asked in self._asked.items():
            if asked.kind in ("write", "zero"):
                self._shared.oracle.orphan(token)
            self._shared.oracle.read_ends(token)
        self._asked.clear()

    # What it does

    def _work(self) -> None:
        shared = self._shared
        if self.life in (Life.OFF, Life.FAILED):
            self._working = False
            return
        burst = shared.chance.randrange(2, 6) if shared.chance.random() < 0.2 else 1
        for _ in range(burst):
            if self.life is Life.RUNNING and self.busy and len(self._asked) < IN_FLIGHT_MAX:
                self.ask()
        shared.clock.after(shared.chance.expovariate(1 / self.pause_s), self._work)

    def ask(self) -> None:
        """Ask for something."""
        chance = self._shared.chance
        region = chance.choice(self.regions)
        first = chance.randrange(region.start, region.stop)
        sectors = 1 + chance.randrange(min(region.stop - first, SECTORS_MAX))
        if chance.random() < 0.3:
            # Whole blocks, as file systems do.
            first, sectors = first // 8 * 8, 8 * (1 + chance.randrange(2))
            sectors = min(sectors, region.stop - first)
        draw = chance.random()
        changes = sum(asked.kind != "read" for asked in self._asked.values())
        if draw < 0.35 or changes >= CHANGES_IN_FLIGHT_MAX:
            self.read(first, sectors)
        elif draw < (0.92 if self.lazy else 0.8):
            self.write(first, sectors)
        elif draw < (0.99 if self.lazy else 0.88):
            self.zero(first, sectors)
        else:
            self.flush()

    def read(self, first: int, sectors: int) -> None:
        """Read some sectors."""
        token = self._begin("read", first, sectors)
        self._shared.oracle.read_begins(token, self._shared.clock.now_s)
        self._send(token, "read", first, sectors)

    def write(self, first: int, sectors: int) -> None:
        """Write a stamp of its own over some sectors."""
        durable = not self.lazy and self._shared.chance.random() < 0.15
        token = self._begin("write", first, sectors, durable=durable)
        stamp = token << 8 | 1
        asked = self._asked[token]
        asked.stamp = stamp
        now = self._shared.clock.now_s
        self._shared.oracle.begin(token, first, sectors, stamp, asked.epoch, now)
        self._send(token, "write", first, sectors, stamp, durable)

    def zero(self, first: int, sectors: int, *, keep: bool | None = None) -> None:
        """Zero some sectors, with a hole or without (`keep`); None: by chance."""
        keep = self._shared.chance.random() < 0.5 if keep is None else keep
        token = self._begin("zero", first, sectors)
        now = self._shared.clock.now_s
        self._shared.oracle.begin(token, first, sectors, 0, self._asked[token].epoch, now)
        self._send(token, "zero", first, sectors, keep, False)

    def flush(self) -> None:
        """Have all that was answered made durable."""
        token = self._begin("flush")
        self._asked[token].covered = self._shared.oracle.flush_begins()
        self._send(token, "flush")

    def _begin(self, kind: str, first: int = 0, sectors: int = 0, *, durable: bool = False) -> int:
        token = self._shared.next_number()
        now = self._shared.clock.now_s
        asked = _Asked(kind, self._client, now, self.epoch, first, sectors, durable=durable)
        self._asked[token] = asked
        return token

    def _send(self, token: int, kind: str, *arguments: int | bool) -> None:
        assert self._gateway is not None and self.channel is not None
        submit = getattr(self._shared.world, kind)
        if not submit(self._gateway.index, self.channel, self._client, token, *arguments):
            self.fail("the gateway has no such image")

    def answered(self, token: int, how: str, stamps: list[int] | None) -> None:
        """Take an answer. Raises Violation."""
        asked = self._asked.pop(token, None)
        if asked is None:
            return
        shared, now = self._shared, self._shared.clock.now_s
        if how == "shutdown":
            if asked.kind in ("write", "zero"):
                shared.oracle.orphan(token)
            shared.oracle.read_ends(token)
            if self.peer is None:
                self.fail("its image is gone")
            # QEMU tells its guest of errors, and stays until it is sent away.
            return
        if how == "full":
            assert asked.kind != "read" and shared.tells_full, f"a {asked.kind} had no room"
            if asked.kind in ("write", "zero"):
                # It may be there later, or never.
                shared.oracle.orphan(token)
            self.refused += 1
            return
        if how == "failed":
            shared.oracle.read_ends(token)
            if asked.kind == "flush":
                shared.oracle.flush_failed(asked.covered or [], asked.begun, now)
                shared.say(f"{self.name} hears that what it wrote may be gone")
                return
            partial = asked.first % 8 or asked.sectors % 8
            assert shared.may_fail(), f"a {asked.kind} failed with EIO"
            if asked.kind in ("write", "zero"):
                # What is merged needs the rest of its block.
                assert partial, f"a {asked.kind} of whole blocks failed with EIO"
                shared.oracle.orphan(token)
            return
        self.answers += 1
        assert self._gateway is not None
        shared.on_answer(asked, self._gateway.index)
        if asked.kind == "read":
            assert stamps is not None and len(stamps) == asked.sectors, "a whole answer"
            shared.oracle.check_read(asked.first, stamps, asked.begun, now)
            shared.oracle.read_ends(token)
        elif asked.kind == "flush":
            shared.oracle.flushed(asked.covered or [], now)
        else:
            shared.oracle.answered(token, now, durable=asked.durable)
