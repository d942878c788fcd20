"""`OpenImage`: what a gateway keeps of an image while it is open, opening or closing.

Written on the deciding thread only (`vmstore/deciding.py`). Who is in sync, and what is done about
it, is its holder's business; here is what stands around that: the lease, clients, what the engine
told.
"""

from dataclasses import dataclass, field

from etcd.images import Snapshot
from shard.ids import ImageId
from vmstore.holder import Holder
from vmstore.holding import Held
from vmstore.names import ImageName
from vmstore.orders import Answer


@dataclass(slots=True)
class Resize:
    """A change of size that was asked for."""

    size_bytes: int
    force: bool
    done: Answer[int]
    reconnect: bool = False
    shrinks: bool = False
    """Whether data is being discarded: no client is let in."""


@dataclass(frozen=True, slots=True)
class TakenSnapshot:
    """A snapshot that was taken, and how long clients' changes waited for it."""

    snapshot: Snapshot
    held_ms: int


@dataclass(slots=True)
class SnapshotOrder:
    """A snapshot that was asked for. `pin` stands for who asked, among the users of the image."""

    name: str
    created_s: int
    done: Answer[TakenSnapshot]
    pin: int = 0
    begun: bool = False
    """Whether the image's holder knows of it."""
    held_since_s: float | None = None
    """Since when changes of clients wait for it; of the last attempt."""


@dataclass(frozen=True, slots=True)
class RolledBack:
    """A rollback that was made: to which snapshot, from which size, and what newer ones went."""

    snapshot: Snapshot
    former_bytes: int
    dropped: tuple[Snapshot, ...]


@dataclass(slots=True)
class RollbackOrder:
    """A rollback that was asked for, to the snapshot of this name; with `force` newer ones go.

    `pin` is as of `SnapshotOrder`.
    """

    name: str
    force: bool
    done: Answer[RolledBack]
    pin: int = 0
    begun: RolledBack | None = None
    """What it comes to, once the image's holder knows of it: no client is let in from then on."""


@dataclass(slots=True)
class RemovalOrder:
    """A snapshot, of this name, that was asked to be removed; its answer is its layer.

    `pin` is as of `SnapshotOrder`.
    """

    name: str
    done: Answer[int]
    pin: int = 0
    layer: int | None = None
    """Once the image's holder knows of it."""


@dataclass(slots=True)
class ConfirmOrder:
    """Somebody who wants to know that a snapshot lasts, to have its layer.

    `pin` is as of `SnapshotOrder`.
    """

    name: str
    done: Answer[int]
    pin: int


@dataclass(slots=True)
class OpenImage:
    """An image that is open, opening or closing."""

    image: ImageId
    name: ImageName
    channel: int
    holder: Holder
    held: Held | None = None
    maintenance: bool = False
    """Open to be healed, for no client: the next gateway that is asked may take it over."""
    claiming: bool = False
    node_names: tuple[str, ...] = ()
    waiting: list[tuple[int, ImageName]] = field(default_factory=list)
    """Clients that are answered when it is open."""
    users: set[int] = field(default_factory=set)
    sent_away: set[int] = field(default_factory=set)
    """Users who were asked to connect anew: their processes come back, with what they had asked."""
    resize: Resize | None = None
    """A change of its size that is under way."""
    snapshot: SnapshotOrder | None = None
    """A snapshot of it that is being taken."""
    rollback: RollbackOrder | None = None
    """A rollback of it that is being made."""
    removal: RemovalOrder | None = None
    """A snapshot of it that is being removed."""
    confirmations: list[ConfirmOrder] = field(default_factory=list)
    """Snapshots of which it is asked whether they last."""
    boots: dict[str, str] = field(default_factory=dict)
    """Of its nodes: which memory holds what they answered and have not synced."""
    late: dict[int, float] = field(default_factory=dict)
    """Since when clients wait for it to be closed."""
    slow: dict[str, int] = field(default_factory=dict)
    """Nodes that were told to be slow, and by how many milliseconds."""
    slow_left_behind: int = 0
    """How often a node was left behind because it was slow."""
    refusing: frozenset[int] = frozenset()
    """Replica sets where clients are told that disks are full."""
    full_asked_s: float | None = None
    """When the pool was asked for that, while disks are full."""
    writes_lost: int = 0
    """How often answered writes were lost with the power of all nodes in sync."""
    behind: bool = False
    """Whether etcd was found to have lost history of it."""
    last_trouble: str = ""
