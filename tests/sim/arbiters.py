"""Arbiters of the simulation: the product's record, votes and messages, without gRPC's transport.

A `SimVoter` is the product's client but for the connection: what it sends arrives late, twice as
late, or never, at whoever runs under that address then.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NoReturn

from arbiter import arbiter_pb2 as pb
from arbiter.client import DEADLINE_S, ArbiterClient
from arbiter.errors import ArbiterFailed, ArbiterUnreachable, RecordError
from arbiter.record import Record
from arbiter.server import _Service
from arbiter.statement import Votes
from arbiter.voting import Voting
from etcd import keys
from etcd.errors import EtcdError
from etcd.interface import Notice, Reread
from etcd.records import ArbiterRecord
from shard.errors import HciError
from shard.ids import ImageId, image_id
from tests.sim.arbiter_disk import ArbiterDisk, Crash, Tree
from tests.sim.clock import Clock, Process
from tests.sim.cluster_state import LATE_S, Door, Path, SimSession, State
from vmstore.catalog import Catalog
from vmstore.errors import (
    ArbiterRetired,
    ArbiterRolledBack,
    ForeignArbiter,
    OtherCluster,
    ReplaceRefused,
)
from vmstore.replacing import replace_arbiter

CLUSTER_ID = "c1" * 16
POLL_S = 0.5
OPERATOR_S = 2.0
"""Between two tries of whoever replaces an arbiter."""
PATIENCE = 3
"""Refusals after which they insist."""


class _Refused(Exception):
    """The service found a request malformed."""


class _Context:
    """As much of a gRPC context as the service uses."""

    def abort(self, _code: object, details: str) -> NoReturn:
        """See `grpc.ServicerContext`."""
        raise _Refused(details)


class SimArbiter:
    """An arbiter's process: votes, registers, forgets what was deleted, as `ArbiterDaemon` does."""

    def __init__(self, site: Site, name: str, disk: ArbiterDisk) -> None:
        self.name = name
        self.process = Process(name)
        self.registered = False
        self._site = site
        self._disk = disk
        self.record = Record(
            disk.root,
            name=name,
            cluster=CLUSTER_ID,
            sync=disk.sync,
            new_id=lambda: f"{site.chance.getrandbits(128):032x}",
        )
        self.voting = Voting(self.record)
        self._service = _Service(self.voting, self._status)
        self._etcd = Door(site.state, site.path, self.process)
        self._catalog = Catalog(self._etcd)
        self._watching = False
        self._session: SimSession | None = None
        site.clock.start(self.process, self._look_after)

    def answer(self, method: str, request: Any) -> Any:
        """Answer a message of a gateway. Raises Crash, ArbiterFailed."""
        try:
            reply = getattr(self._service, method)(request, _Context())
        except _Refused as error:
            raise ArbiterFailed(self.name, str(error)) from error
        reply.detail = self._disk.plain(reply.detail)
        return reply

    def _status(self) -> pb.ArbiterStatus:
        return pb.ArbiterStatus(name=self.name, arbiter_id=self.record.identity.id)

    def _look_after(self) -> None:
        clock = self._site.clock
        while True:
            if not self.registered:
                self._register()
            clock.sleep(POLL_S, self.process)

    def _register(self) -> None:
        identity = self.record.identity
        record = ArbiterRecord(
            name=self.name,
            id=identity.id,
            address=f"{self.name}:1",
            host="witness",
            start_counter=identity.start_counter,
        )
        try:
            self._catalog.init_cluster(CLUSTER_ID)
            if self._session is not None:
                self._session.close()
            self._session = session = SimSession(
                self._etcd, self._site.clock, self.process, on_lost=self._lost
            )
            self._catalog.announce_arbiter(record, session.lease)
            session.start()
            if not self._watching:
                self._etcd.watch(keys.ARBITERS, self._on_arbiters)
                self._etcd.watch(keys.TOMBSTONES, self._on_tombstones)
                self._watching = True
        except (OtherCluster, ForeignArbiter, ArbiterRolledBack, ArbiterRetired) as error:
            self._site.refuse(self.name, str(error))
        except HciError:
            return
        else:
            self.registered = True

    def _lost(self) -> None:
        self.registered = False

    def _on_arbiters(self, notice: Notice) -> None:
        for item in notice.items if isinstance(notice, Reread) else notice.changes:
            ours = item.key == keys.arbiter(self.name) and item.value is not None
            if ours and ArbiterRecord.decode(item.key, item.value or b"").retired:
                self._site.refuse(self.name, "it was replaced")

    def _on_tombstones(self, notice: Notice) -> None:
        found = notice.items if isinstance(notice, Reread) else notice.changes
        deleted = {item.key.removeprefix(keys.TOMBSTONES) for item in found if item.value}
        try:
            for image in sorted(deleted):
                self.voting.drop(image_id(image))
        except Crash:
            self._site.crashed(self.name)


class Site:
    """The arbiter's host: which arbiters run there, their disks, and how it is reached."""

    def __init__(
        self, clock: Clock, state: State, chance: random.Random, say: Callable[[str], None]
    ) -> None:
        self.clock = clock
        self.state = state
        self.chance = chance
        self.path = Path()
        """Its way to etcd."""
        self.ways: dict[str, Path] = {}
        """The ways of gateways to it, by name."""
        self.latency_s = chance.choice((0.002, 0.002, 0.15))
        self.current = "arb-1"
        """Who votes, or would."""
        self.processes: dict[str, SimArbiter] = {}
        """Arbiters that run: while one is replaced, two."""
        self.refused: dict[str, str] = {}
        """Arbiters that must not vote, and why."""
        self.supervised = True
        self.forgetful = False
        """An older state of a disk was put back: its start counter may not tell."""
        self.confirmed: dict[tuple[ImageId, int], tuple[int, frozenset[str]]] = {}
        """The last set in sync that was confirmed, of an image's replica set: (generation, set)."""
        self.at_vote: list[tuple[str, Callable[[], None]]] = []
        """What waits for a vote: (method, strike); each is struck once."""
        self._say = say
        self._disks: dict[str, ArbiterDisk] = {}
        self._snapshot: Tree | None = None
        self._count = 1
        self._replacing = False
        self._kept_down = False

    @property
    def running(self) -> SimArbiter | None:
        """The present arbiter, where it runs."""
        return self.processes.get(self.current)

    def disk(self, name: str) -> ArbiterDisk:
        """Return the disk of an arbiter."""
        if name not in self._disks:
            self._disks[name] = ArbiterDisk()
        return self._disks[name]

    # The process

    def start(self, name: str | None = None) -> None:
        """Start an arbiter, the present one if none is named, unless it runs or may not."""
        name = name or self.current
        self._kept_down = False
        if name in self.processes or name in self.refused:
            return
        disk = self.disk(name)
        try:
            started = SimArbiter(self, name, disk)
        except Crash:
            self._ended(name, power=self.chance.random() < 0.5, why="as it starts")
        except RecordError as error:
            self._say(f"{name} cannot start: {disk.plain(str(error))}")
            self.refused[name] = "its record cannot be used"
        else:
            self.processes[name] = started
            self._say(f"{name} starts, instance {started.record.identity.start_counter}")

    def stop(self, *, power: bool) -> None:
        """Kill the present one, or cut its host's power."""
        if self.running is not None:
            self._ended(self.current, power=power, why="loses power" if power else "is killed")

    def crashed(self, name: str) -> None:
        """An arbiter has met the end that was planned for it."""
        power = self.chance.random() < 0.5
        self._ended(name, power=power, why="in the midst of what it did")

    def _ended(self, name: str, *, power: bool, why: str) -> None:
        process = self.processes.pop(name, None)
        if process is not None:
            process.record.close()
            self.clock.end(process.process)
        disk = self.disk(name)
        disk.crash_in = None
        if power:
            disk.power_cut(self.chance)
        self._say(f"{name} ends: {why}{' (unsynced is lost)' if power else ''}")
        if self.supervised:
            pause_s = self.chance.choice((0.3, 1.0, 4.0, 9.0))
            self.clock.after(pause_s, lambda: self._restart(name))

    def _restart(self, name: str) -> None:
        if not self._kept_down:
            self.start(name)

    def keep_down(self, *, power: bool) -> None:
        """Stop the present one, and do not start it again before somebody does."""
        self._kept_down = True
        self.stop(power=power)

    def refuse(self, name: str, why: str) -> None:
        """It may not vote: its process ends, and is not started again."""
        self._say(f"{name} may not vote: {why}")
        self.refused[name] = why

        def end() -> None:
            if name in self.processes:
                self._ended(name, power=False, why="is stopped")

        self.clock.after(0, end)

    def pause(self) -> None:
        """Stop it as SIGSTOP does."""
        if self.running is not None and not self.running.process.paused:
            self.running.process.paused = True
            self._say(f"{self.current} stands still")

    def go_on(self) -> None:
        """Let it go on."""
        if self.running is not None and self.running.process.paused:
            self.clock.go_on(self.running.process)
            self._say(f"{self.current} goes on")

    # Its disk

    def crash_soon(self) -> None:
        """Have it end in the midst of what it writes next."""
        self.disk(self.current).crash_in = self.chance.randrange(4)

    def empty(self) -> None:
        """Put an empty disk in place of its own."""
        self.stop(power=False)
        self._snapshot = None
        self.disk(self.current).put_back({})
        self._say(f"{self.current} has an empty disk")
        self.start()

    def snapshot(self) -> None:
        """Take a snapshot of its disk."""
        if self.running is not None:
            self._snapshot = self.disk(self.current).tree()
            self._say(f"a snapshot of {self.current}'s disk is taken")

    def roll_back(self) -> None:
        """Put it back."""
        if self._snapshot is None:
            return
        self.stop(power=False)
        self.disk(self.current).put_back(self._snapshot)
        self._snapshot = None
        self.forgetful = True
        self._say(f"{self.current}: the disk's snapshot is put back")
        self.start()

    # Votes

    def take(self, address: str, method: str, request: Any, answer: Callable[[Any], None]) -> None:
        """Have who listens at an address answer; None: nobody does."""
        arbiter = self.processes.get(address.removesuffix(":1"))
        if arbiter is None:
            answer(None)
            return
        image = request.image_id

        def work() -> None:
            try:
                reply = arbiter.answer(method, request)
            except ArbiterFailed as error:
                answer(error)
            except Crash:
                self.crashed(arbiter.name)
            else:
                self._note(ImageId(image), arbiter.record.read(ImageId(image)).votes)
                answer(reply)
                self._strike(method)
                if reply.verdict == pb.VoteReply.VERDICT_BEHIND and arbiter.name == self.current:
                    # `hci status` says so, and a person replaces it.
                    self.refuse(arbiter.name, reply.detail)

        self.clock.do(work, arbiter.process)

    def _strike(self, method: str) -> None:
        struck = [strike for name, strike in self.at_vote if name == method]
        self.at_vote = [each for each in self.at_vote if each[0] != method]
        for strike in struck:
            strike()

    def _note(self, image: ImageId, votes: Votes) -> None:
        for index, vote in enumerate(votes):
            if vote.confirmed is not None:
                known = self.confirmed.get((image, index), (0, frozenset()))
                if vote.confirmed.generation >= known[0]:
                    stated = (vote.confirmed.generation, vote.confirmed.in_sync)
                    self.confirmed[image, index] = stated

    # The person who replaces it

    def care(self, up: Callable[[], set[str]]) -> None:
        """Look now and then whether the arbiter has to be replaced, and do it."""
        if self.current in self.refused:
            self.replace(up)
        self.clock.after(OPERATOR_S, lambda: self.care(up))

    def replace(self, up: Callable[[], set[str]]) -> None:
        """Replace the arbiter, be it dead or not. `up` tells which nodes answer."""
        if not self._replacing:
            self._replacing = True
            operator = Process("operator")
            self.clock.start(operator, lambda: self._replace(operator, up))

    def replaceable(self) -> bool:
        """Whether an arbiter runs that may vote, and none is being replaced."""
        return self.running is not None and self.running.registered and not self._replacing

    def _replace(self, operator: Process, up: Callable[[], set[str]]) -> None:
        old, way = self.current, Path()
        self._snapshot = None
        self._next()
        catalog = Catalog(Door(self.state, way, operator))
        refusals = 0
        while True:
            self.clock.sleep(OPERATOR_S, operator)
            try:
                if self.current in self.refused:
                    # It went the same way. Pools may name it already.
                    named = {pool.arbiter for pool in catalog.pools().values()}
                    old = self.current if self.current in named else old
                    self._next()
                    continue
                done = replace_arbiter(
                    catalog,
                    old,
                    self.current,
                    lambda record: SimVoter(self, way, operator, record.name, record.address),
                    up=up,
                    forced=self._tell_forced if refusals >= PATIENCE else None,
                )
            except ReplaceRefused as error:
                refusals += 1
                self._say(f"  operator: {error}")
            except ArbiterRetired:
                # By an earlier try, whose answer was lost.
                break
            except (HciError, EtcdError) as error:
                self._say(f"  operator: {error}")
            else:
                self._say(f"{self.current} votes in place of {old}: {done}")
                break
        self._replacing = False

    def _tell_forced(self, refusal: ReplaceRefused) -> None:
        self._say(f"  operator forces: {refusal.why}")

    def end(self) -> None:
        """The simulation is over."""
        for arbiter in self.processes.values():
            arbiter.record.close()
            self.clock.end(arbiter.process)
        for disk in self._disks.values():
            disk.remove()

    def _next(self) -> None:
        self._count += 1
        name = self.current = f"arb-{self._count}"
        # Not from within the operator's fiber: one fiber starts no other.
        self.clock.after(0, lambda: self.start(name))


class SimVoter(ArbiterClient):
    """The product's client of an arbiter, over a simulated way. Only fibers may ask."""

    def __init__(self, site: Site, way: Path, process: Process, name: str, address: str) -> None:
        super().__init__(name, address)
        self._site = site
        self._way = way
        self._process = process
        methods = {name: partial(self._send, name) for name in ("Prepare", "Confirm")}
        self._stub = SimpleNamespace(**methods)

    def _ask(self, call: Callable[[Any, float], Any]) -> Any:
        answer = call(self._stub, DEADLINE_S)
        self._silent = ""
        return answer

    def _latency_s(self) -> float:
        site, slow = self._site, self._way.slow and self._site.chance.random() < 0.5
        return site.chance.uniform(0.0005, 3.0 if slow else site.latency_s)

    def _send(self, method: str, request: Any, timeout: float) -> Any:
        site, way, process = self._site, self._way, self._process
        sent = type(request).FromString(request.SerializeToString())

        def arrange(settle: Callable[[Any], None]) -> None:
            def answer(reply: Any) -> None:
                if way.back:
                    told = "nobody listens" if reply is None else reply
                    site.clock.after(self._latency_s(), lambda: settle(told), process)

            def arrive(attempt: int = 0) -> None:
                if way.there:
                    site.take(self.address, method, sent, answer)
                elif attempt < 30 and site.chance.random() < 0.7:
                    # A kernel goes on resending, also what its sender has given up.
                    site.clock.after(LATE_S, lambda: arrive(attempt + 1))

            site.clock.after(self._latency_s(), arrive)
            site.clock.after(timeout, lambda: settle(None), process)

        reply = site.clock.wait(arrange)
        if isinstance(reply, ArbiterFailed):
            raise reply
        if reply is None or isinstance(reply, str):
            self._silent = reply or f"no answer in {timeout:g} s"
            raise ArbiterUnreachable(self.name, self.address, self._silent)
        return reply


class SimVoters:
    """The clients of one gateway."""

    def __init__(self, site: Site, way: Path, process: Process) -> None:
        self._site = site
        self._way = way
        self._process = process
        self._clients: dict[tuple[str, str], SimVoter] = {}

    def at(self, name: str, address: str) -> SimVoter:
        """Return the client of an arbiter."""
        client = self._clients.get((name, address))
        if client is None:
            client = SimVoter(self._site, self._way, self._process, name, address)
            self._clients[name, address] = client
        return client

    def close(self) -> None:
        """Nothing to close."""
