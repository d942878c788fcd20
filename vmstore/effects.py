"""What the holder of an image wants done, in the order in which it says so."""

from dataclasses import dataclass

from etcd.images import ImageRecord


@dataclass(frozen=True, slots=True)
class OpenImage:
    """Have the engine connect the image to its nodes, by this record."""

    record: ImageRecord


@dataclass(frozen=True, slots=True)
class Admit:
    """Let these nodes in; `resume`: the instances that were in before.

    `serials` are those of the answers they were judged by.
    """

    nodes: tuple[str, ...]
    resume: bool
    serials: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Peek:
    """Ask a connected node for its record again."""

    node: str


@dataclass(frozen=True, slots=True)
class Heal:
    """Have the engine make a stale node level in `sets`: (replica set, stale since)."""

    node: str
    serial: int
    attempt: int
    sets: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class EndHeal:
    """The record does not take the node of this heal in: nobody waits for it."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Freeze:
    """Have changes wait, those in flight answered, and all of it flushed on all nodes in sync."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Thaw:
    """Let what waits for that freeze go on."""

    attempt: int


@dataclass(frozen=True, slots=True)
class TellLayers:
    """Tell who wanted other layers what came of it; `failed`: they are as they were, and why.

    Where it is `unknown` they may have changed.
    """

    failed: str | None = None
    unknown: bool = False


@dataclass(frozen=True, slots=True)
class AskEmptied:
    """Ask all nodes that are connected which layers they have merged."""


@dataclass(frozen=True, slots=True)
class LookAtAncestors:
    """Have etcd asked who may lack what the image, a clone, begins on."""

    look: int


@dataclass(frozen=True, slots=True)
class MendParent:
    """Have the image that a clone begins on opened: a node has lost it, and etcd is not told."""


@dataclass(frozen=True, slots=True)
class ChangeMembership:
    """Have etcd take `after` in place of `before`, under our lease."""

    before: ImageRecord
    after: ImageRecord


@dataclass(frozen=True, slots=True)
class Reconfigure:
    """Have the engine go by this record."""

    record: ImageRecord


@dataclass(frozen=True, slots=True)
class Serve:
    """The image is open: let waiting clients in."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """Tell waiting clients why not."""

    reason: str


@dataclass(frozen=True, slots=True)
class CloseImage:
    """Have the engine flush, clear and let go."""


@dataclass(frozen=True, slots=True)
class KillImage:
    """Have the engine fail everything at once."""


@dataclass(frozen=True, slots=True)
class Release:
    """Give the lease back."""

    record: ImageRecord
    clean: bool


@dataclass(frozen=True, slots=True)
class Forget:
    """The end: drop the image from the engine, and this state machine."""


Effect = (
    OpenImage | Admit | Peek | Heal | EndHeal | Freeze | Thaw | TellLayers | AskEmptied
    | LookAtAncestors | MendParent | ChangeMembership | Reconfigure | Serve | Refuse | CloseImage
    | KillImage | Release | Forget
)  # fmt: skip
