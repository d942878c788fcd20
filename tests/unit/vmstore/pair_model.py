"""A pair of nodes, an arbiter, etcd and gateways in one process, driven in any order.

The vote rule, the procedure of `vmstore.granting` and the records are the real ones; etcd is the
verified fake. Nodes and gateways are modelled by what matters to membership: which record a node
has stored, and whether it holds every answered write. `current` is the truth that nobody in the
cluster knows: the nodes that hold all answered writes.
"""

import random
from dataclasses import dataclass, field, replace

from arbiter.errors import ArbiterError, ArbiterUnreachable, VoteRefused
from arbiter.exchange import Addressee
from arbiter.statement import Statement, Votes, confirm_image, prepare_image
from etcd import keys
from etcd.errors import EtcdError, EtcdUnavailable
from etcd.images import ImageRecord
from etcd.interface import Delete, Operation, Outcome, Put
from etcd.memory import Fault, MemoryEtcd
from etcd.records import ArbiterRecord
from shard.errors import HciError
from shard.ids import ImageId
from shard.membership import Change, Policy, lose, rejoin
from tests.unit.samples import node_record
from vmstore import granting
from vmstore.catalog import Catalog
from vmstore.errors import Conflict, InUse
from vmstore.granter import Granter
from vmstore.granting import Steps
from vmstore.holding import Held
from vmstore.names import ImageName

NODES = ("a", "b")


class Violation(Exception):
    """An answered write or a read used a node that lacks an answered write."""


class Arbiter:
    """An arbiter's votes, which survive; a `Voter` that can be away or lose answers."""

    def __init__(self) -> None:
        self.up = True
        self.lose_answers = 0
        self.votes: Votes = ()
        self.changes = 0

    def at(self, name: str, address: str) -> "Arbiter":
        return self

    def prepare(self, to: Addressee, image: ImageId, known: Statement, wanted: Statement) -> int:
        return self._vote(image, *prepare_image(self.votes, known, wanted))

    def confirm(self, to: Addressee, image: ImageId, stated: Statement) -> int:
        return self._vote(image, *confirm_image(self.votes, stated))

    def _vote(self, image: ImageId, votes: Votes, refusal: object) -> int:
        if not self.up:
            raise ArbiterUnreachable("w", "w:1", "down")
        if refusal is not None:
            raise VoteRefused("w", image, refusal)  # type: ignore[arg-type]
        if votes != self.votes:
            self.votes, self.changes = votes, self.changes + 1
        if self.lose_answers:
            self.lose_answers -= 1
            raise ArbiterUnreachable("w", "w:1", "answer lost")
        return self.changes


class Etcd(MemoryEtcd):
    """The fake, which can be down altogether."""

    up = True

    def transaction(self, compares, operations) -> Outcome:  # type: ignore[no-untyped-def]
        self._require()
        return super().transaction(compares, operations)

    def get(self, key: str):  # type: ignore[no-untyped-def]
        self._require()
        return super().get(key)

    def happen(self, *operations: Operation) -> None:
        """Something changes without anybody asking: a lease ends, an old copy is put back."""
        faults = list(self._faults)
        self.clear_faults()
        super().transaction([], operations)
        self.fail_next(*faults)

    def seen(self, key: str) -> bytes:
        """What stands at a key, whoever may ask or not."""
        return self._items[key].value

    def _require(self) -> None:
        if not self.up:
            raise EtcdUnavailable(("etcd",), "down")


@dataclass
class Node:
    """What a node has stored of the image; a record is refused if it is lower or differs."""

    up: bool = True
    epoch: int = 0
    holder: str | None = None
    generation: int = 0
    digest: bytes = b""

    def knows_better(self, record: ImageRecord) -> bool:
        return (
            self.epoch > record.epoch
            or (self.epoch == record.epoch and self.holder != record.holder)
            or self.generation > record.generation
            or (self.generation == record.generation and self.digest != record.digest)
        )

    def store(self, record: ImageRecord) -> None:
        self.epoch, self.holder = record.epoch, record.holder
        self.generation, self.digest = record.generation, record.digest


@dataclass
class Gateway:
    """A holder's process: what it holds, and the procedure that is under way, if any."""

    id: str
    held: Held | None = None
    steps: Steps | None = None
    proposal: ImageRecord | None = None
    pending: object = None
    progress: granting.Progress = field(default_factory=granting.Progress)
    undecided: bool = False
    healing: str | None = None
    serving: bool = False
    gone: bool = False

    @property
    def record(self) -> ImageRecord:
        assert self.held is not None
        return self.held.record

    @property
    def in_sync(self) -> set[str]:
        return set(self.record.membership.in_sync(0))


@dataclass
class World:
    """All of it, and the actions that can happen."""

    chance: random.Random
    etcd: Etcd = field(default_factory=Etcd)
    arbiter: Arbiter = field(default_factory=Arbiter)
    nodes: dict[str, Node] = field(default_factory=lambda: {name: Node() for name in NODES})
    gateways: list[Gateway] = field(default_factory=list)
    current: set[str] = field(default_factory=lambda: set(NODES))
    writes: int = 0
    opened: int = 0
    rolled_back: bool = False

    def __post_init__(self) -> None:
        self.catalog = Catalog(self.etcd)
        self.granter = Granter(self.catalog, self.arbiter)
        lease = self.etcd.grant_lease(1 << 30)
        for name in NODES:
            node = node_record(1, name=name, host=name)
            self.catalog.announce_node(node, lease)
        witness = ArbiterRecord(name="w", id="f" * 32, address="w:1", host="w", start_counter=1)
        self.catalog.announce_arbiter(witness, lease)
        self.catalog.create_pool("p", policy=Policy.THIN_ARBITER, arbiter="w")
        self.image = self.catalog.create_image(ImageName("p", "i"), 1 << 20).record.id
        self.past = [self.stored()]

    def stored(self) -> bytes:
        return self.etcd.seen(keys.image(self.image))

    # What can happen

    def act(self, *, rollback: bool) -> None:
        """Let one thing happen, drawn by chance; what has happened to etcd may be undone."""
        live = [each for each in self.gateways if not each.gone]
        actions = [self.toggle_node, self.toggle_arbiter, self.toggle_etcd, self.fault, self.open]
        if rollback:
            actions.append(self.roll_back)
        weights = [0.8, 0.4, 0.2, 0.5, 0.6, 0.3][: len(actions)]
        for gateway in live:
            for action, weight in ((self.go_on, 8.0), (self.write, 4.0), (self.crash, 0.3)):
                actions.append(lambda action=action, gateway=gateway: action(gateway))  # type: ignore[misc]
                weights.append(weight / len(live))
        self.chance.choices(actions, weights)[0]()
        if (value := self.stored()) != self.past[-1]:
            self.past.append(value)

    def toggle_node(self) -> None:
        node = self.nodes[self.chance.choice(NODES)]
        node.up = not node.up

    def toggle_arbiter(self) -> None:
        self.arbiter.up = not self.arbiter.up

    def toggle_etcd(self) -> None:
        self.etcd.up = not self.etcd.up

    def fault(self) -> None:
        self.etcd.clear_faults()
        if self.chance.random() < 0.5:
            self.etcd.fail_next(self.chance.choice(list(Fault)))
        else:
            self.arbiter.lose_answers = 1

    def roll_back(self) -> None:
        """etcd is restored from a copy: the image as it was once, and no lease."""
        if not self.etcd.up:
            return
        self.rolled_back = True
        self.put_back(self.chance.choice(self.past))

    def put_back(self, value: bytes) -> None:
        """etcd is restored from a copy in which the image's record was `value`."""
        self.etcd.happen(Put(keys.image(self.image), value), Delete(keys.lease(self.image)))

    def open(self) -> Gateway | None:
        """Another gateway takes the image; the lease of the former holder has ended."""
        self.opened += 1
        gateway = Gateway(f"{self.opened:032x}")
        try:
            if self.chance.random() < 0.7:
                self.gateways.clear()
            self.etcd.happen(Delete(keys.lease(self.image)))
            lease = self.etcd.grant_lease(1 << 30)
            gateway.held = self.catalog.take_lease(
                self.catalog.image(self.image),
                gateway=gateway.id, holder=gateway.id, etcd_lease=lease,
            )  # fmt: skip
        except (EtcdError, Conflict, InUse):
            return None
        gateway.steps = granting.opening(gateway.held)
        self.gateways.append(gateway)
        return gateway

    def crash(self, gateway: Gateway) -> None:
        gateway.gone = True

    def go_on(self, gateway: Gateway) -> None:
        """Make the next step of what a gateway does; begin something where nothing is under way."""
        if gateway.gone:
            return
        if gateway.steps is not None:
            self._step(gateway)
        elif gateway.proposal is not None:
            assert gateway.held is not None
            gateway.progress = granting.Progress()
            gateway.steps = granting.change(gateway.held, gateway.proposal, gateway.progress)
        elif not self._judge(gateway):
            gateway.gone = True
        else:
            self._propose(gateway)

    def write(self, gateway: Gateway) -> bool:
        """Answer a write where the rules allow it; return whether it was answered."""
        if gateway.gone or not gateway.serving or not self._writable(gateway):
            return False
        answering = gateway.in_sync | ({gateway.healing} if gateway.healing else set())
        if not all(self.nodes[name].up for name in answering):
            return False
        if any(self.nodes[name].knows_better(gateway.record) for name in gateway.in_sync):
            gateway.gone = True
            return False
        for name in gateway.in_sync:
            self.nodes[name].store(gateway.record)
        if not gateway.in_sync <= self.current:
            raise Violation(f"{gateway.in_sync} answered a write, {self.current} are current")
        self.current = answering
        self.writes += 1
        return True

    # Inside

    def _writable(self, gateway: Gateway) -> bool:
        return gateway.proposal is None or gateway.healing is not None

    def _step(self, gateway: Gateway) -> None:
        assert gateway.steps is not None
        try:
            if gateway.pending is None:
                gateway.pending = next(gateway.steps)
                return
            try:
                result = self.granter.make(gateway.pending)  # type: ignore[arg-type]
            except HciError as error:
                gateway.pending = gateway.steps.throw(error)
            else:
                gateway.pending = gateway.steps.send(result)
        except StopIteration as end:
            gateway.held = end.value
            self._finished(gateway)
        except HciError as error:
            self._failed(gateway, error)

    def _finished(self, gateway: Gateway) -> None:
        gateway.steps = gateway.pending = gateway.proposal = gateway.healing = None
        gateway.undecided = False

    def _failed(self, gateway: Gateway, error: HciError) -> None:
        gateway.steps = gateway.pending = None
        if not granting.may_pass(error):
            gateway.gone = True
            assert isinstance(error, Conflict | ArbiterError), error
        elif gateway.proposal is None:
            assert gateway.held is not None
            gateway.steps = granting.opening(gateway.held)
        else:
            gateway.undecided = gateway.undecided or gateway.progress.maybe_taken
            if not gateway.undecided:
                gateway.proposal = gateway.healing = None

    def _judge(self, gateway: Gateway) -> bool:
        """As a holder does of the nodes in sync that it reaches: give up where one knows better."""
        reached = [self.nodes[name] for name in gateway.in_sync if self.nodes[name].up]
        return not any(node.knows_better(gateway.record) for node in reached)

    def _propose(self, gateway: Gateway) -> None:
        up = {name for name in NODES if self.nodes[name].up}
        missing, stale = gateway.in_sync - up, set(NODES) - gateway.in_sync
        membership = gateway.record.membership
        plan = None
        if missing and gateway.in_sync & up:
            plan = lose(membership, missing)
        elif not missing:
            gateway.serving = True
            for name in gateway.in_sync:
                self.nodes[name].store(gateway.record)
            if stale & up:
                healed = min(stale & up)
                plan = rejoin(membership, {0: [healed]})
                # Levelled: from here on writes wait for it too.
                if gateway.in_sync <= self.current:
                    self.current.add(healed)
                gateway.healing = healed
        if isinstance(plan, Change):
            gateway.proposal = replace(
                gateway.record,
                generation=plan.membership.generation,
                stale=plan.membership.stale,
            )

    # The end of faults

    def calm(self, *, a: bool, b: bool, arbiter: bool, etcd: bool = True) -> None:
        """End all faults; let just these be there."""
        self.etcd.clear_faults()
        self.arbiter.lose_answers = 0
        self.nodes["a"].up, self.nodes["b"].up = a, b
        self.arbiter.up, self.etcd.up = arbiter, etcd

    def can_write(self) -> bool:
        """Whether a gateway that opens the image now has a write answered, in a bounded time."""
        gateway = self.open()
        if gateway is None:
            return False
        for _ in range(40):
            self.go_on(gateway)
            if self.write(gateway):
                return True
        return False
