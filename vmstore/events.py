"""What the holder of an image hears: of nodes, of etcd, of clients, of time."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from etcd.images import ImageRecord
from shard.membership import Stale
from vmstore.layer_changes import LayerChange


@dataclass(frozen=True, slots=True)
class LeaseTaken:
    """etcd has the lease key and this record, whose epoch is ours.

    `away` are nodes that the gateway has lost, and since when, by the clock of `Tick`.
    """

    record: ImageRecord
    away: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Peeked:
    """A connected node told its record of the image, and which instance of which store it is."""

    node: str
    instance: int
    flush_number: int
    deleted: bool
    record: "NodeRecordView | None"
    serial: int = 0
    """Names this answer when the node is admitted."""
    parent_missing: bool = False
    """The node does not have what the image, a clone, begins on."""


@dataclass(frozen=True, slots=True)
class NodeRecordView:
    """What a node holds of an image's record, and what it heard of its peers' flushes."""

    epoch: int
    holder: str
    generation: int
    digest: bytes
    peers: Mapping[str, int]
    dirty: int = 0
    """Number of shards in the node's dirty map."""
    distrusted: bool = False
    """The node's store was set back to an older state: nothing that it has of the image counts."""


@dataclass(frozen=True, slots=True)
class ReplicaDown:
    """The connection to a node is gone. `blocking`: requests wait for it."""

    node: str
    blocking: bool


@dataclass(frozen=True, slots=True)
class ReplicaBlocking:
    """Requests wait for a node that does not serve."""

    node: str


@dataclass(frozen=True, slots=True)
class ReplicaFailed:
    """A node cannot do what it is asked (no space, a failing disk)."""

    node: str
    status: str


@dataclass(frozen=True, slots=True)
class Lags:
    """So many milliseconds later than the quickest nodes answered in the last second."""

    lags: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Admitted:
    """The nodes asked for by `Admit` serve; of all that do, `levelling` are not level yet."""

    levelling: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Levelled:
    """A node in sync that was not level with the others yet is."""

    node: str


@dataclass(frozen=True, slots=True)
class AdmitFailed:
    """A node was lost, or failed, on the way; all that were asked for wait to be admitted again."""

    node: str


@dataclass(frozen=True, slots=True)
class Healed:
    """A stale node is level, and gets what is written; the record may take it in."""

    node: str
    attempt: int


@dataclass(frozen=True, slots=True)
class HealFailed:
    """A heal has ended early; the node is as stale as before."""

    node: str
    attempt: int
    status: str


@dataclass(frozen=True, slots=True)
class Stored:
    """All nodes in sync of the changed sets hold this generation."""

    generation: int


@dataclass(frozen=True, slots=True)
class Fenced:
    """A node refused us for a later holder or membership."""

    node: str


@dataclass(frozen=True, slots=True)
class MembershipChanged:
    """etcd took the proposal."""

    record: ImageRecord


@dataclass(frozen=True, slots=True)
class MembershipDelayed:
    """The change waits for what `why` says.

    Unless it is `maybe_taken` it surely did not come to etcd: another one may be proposed instead,
    or none where the node that was lost is back.
    """

    why: str = "etcd does not answer"
    maybe_taken: bool = True


@dataclass(frozen=True, slots=True)
class ChangeLayers:
    """Somebody wants a snapshot, of a name that the image has not given, or a rollback to one that
    it has, while no client is there."""

    change: LayerChange


@dataclass(frozen=True, slots=True)
class RemoveSnapshot:
    """Somebody wants the image's snapshot of this name to go."""

    name: str


@dataclass(frozen=True, slots=True)
class Emptied:
    """A node has nothing of these layers that its record says are merged, durably."""

    node: str
    layers: frozenset[int]


@dataclass(frozen=True, slots=True)
class Holding:
    """What was answered before is on stable storage; changes wait from here."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Frozen:
    """All that was answered is on stable storage of all nodes in sync, and nothing is in flight."""

    attempt: int


@dataclass(frozen=True, slots=True)
class FreezeFailed:
    """The engine has given that freeze up, and changes go on."""

    attempt: int
    why: str


@dataclass(frozen=True, slots=True)
class AncestorsSeen:
    """What etcd says of the ancestors of a clone, asked for by the look of this number.

    `lacking` are the nodes that may lack what the clone begins on.
    """

    look: int
    lacking: Stale


@dataclass(frozen=True, slots=True)
class AncestorsUnseen:
    """That look came to nothing."""

    look: int
    why: str


@dataclass(frozen=True, slots=True)
class ChangeRefused:
    """The proposed change of layers cannot be made: clones begin on what would go."""

    why: str


@dataclass(frozen=True, slots=True)
class Lost:
    """The lease or the record is another's now."""

    reason: str


@dataclass(frozen=True, slots=True)
class Close:
    """The last client has left."""


@dataclass(frozen=True, slots=True)
class Closed:
    """The engine has let go."""

    clean: bool


@dataclass(frozen=True, slots=True)
class Released:
    """The lease key is gone, or will end by itself."""


@dataclass(frozen=True, slots=True)
class Fail:
    """The image could not be taken: unknown, in use, etcd not reachable."""

    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Seconds on a clock that only grows."""

    now_s: float


Event = (
    LeaseTaken | Peeked | ReplicaDown | ReplicaBlocking | ReplicaFailed | Lags | Admitted
    | AdmitFailed | Levelled | Healed | HealFailed | Stored | Fenced | MembershipChanged
    | MembershipDelayed | ChangeLayers | RemoveSnapshot | Emptied | Holding | Frozen
    | FreezeFailed | AncestorsSeen | AncestorsUnseen | ChangeRefused | Lost | Close
    | Closed | Released | Fail | Tick
)  # fmt: skip
