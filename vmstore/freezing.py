"""How the layers of an image that serves are changed, from the order to its end. Pure.

A snapshot changes them, a rollback to one, and the end of a merge (`layer_changes`).

`Holder` drives it, and says what each step does.

    stage      means                                             left by
    none       nobody asked for a change, or it has ended        an order
    waiting    nodes in sync are away, or not level, or a        all are well: freeze
               change of the record is made
    freezing   the engine flushes what was answered, then holds  frozen: the record is proposed;
               changes back, answers and flushes the rest        a failure: told, none
    changing   changes of clients wait for etcd                  taken: the nodes store it;
                                                                 refused or late: thaw, told, none
    storing    etcd has it, the nodes in sync store it           stored: told, none

Changes of clients wait from `Holding` on, while it changes and stores, and at no other time. Where
etcd is late they go on under the former top, and what etcd may have taken is *withdrawn* when that
is known: a record one generation higher is without the snapshot and its layer. So does a new holder
that finds a snapshot which no node in sync has stored. Nobody was told of such a one, nothing was
written to its layer, and what is below that may not be the same everywhere.

A rollback is of an image without clients. It is never withdrawn: what it has on top is empty, and
what is below has been frozen for long. So it waits for etcd until that has answered.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto

from etcd.images import ImageRecord
from vmstore.events import Peeked
from vmstore.layer_changes import (
    EmptiedLayers,
    LayerChange,
    NewSnapshot,
    Rollback,
    Withdrawable,
)

WAIT_LIMIT_S = 20.0
"""How long a snapshot waits for nodes that are away, with nothing held up."""

LEVEL_LIMIT_S = 600.0
"""How long it waits for nodes that are there and are being made level."""

HELD_LIMIT_S = 1.5
"""How long changes of clients wait for freezes that come to nothing, all together; then it is given
up. The engine itself ends one after 2 s."""

THAW_AFTER_S = 1.0
"""How long changes of clients wait for etcd: less than any guest's patience, and more than etcd
takes to write to a disk that is busy."""


class Stage(Enum):
    """See the module's table."""

    NONE = auto()
    WAITING = auto()
    FREEZING = auto()
    CHANGING = auto()
    STORING = auto()


@dataclass(slots=True)
class Freezing:
    """The change of the layers of one image that is being made, if one is."""

    stage: Stage = Stage.NONE
    change: LayerChange | None = None
    attempt: int = 0
    """Of the last freeze: each has its own."""
    ordered_s: float = 0.0
    since_s: float = 0.0
    """When the stage began."""
    not_before_s: float = 0.0
    """When it may be tried to freeze again."""
    holding_s: float | None = None
    """Since when clients wait for the freeze of now; None: they do not yet."""
    held_s: float = 0.0
    """How long clients waited for freezes that came to nothing."""
    missing_s: float | None = None
    """Since when a node in sync is missing."""
    withdraws: Withdrawable | None = None
    """A change that was given up, and that etcd may have taken."""

    @property
    def holds(self) -> bool:
        """Whether changes of clients wait for it."""
        return self.stage in (Stage.FREEZING, Stage.CHANGING, Stage.STORING)

    @property
    def awaited(self) -> str:
        """What it is, as the subject of a sentence."""
        match self.change:
            case Rollback():
                return "a rollback"
            case EmptiedLayers():
                return "the end of a merge"
        return "a snapshot"

    @property
    def withdrawable(self) -> Withdrawable | None:
        """The change, if clients go on where etcd is late, and what it took is withdrawn."""
        change = self.change
        return change if isinstance(change, NewSnapshot | EmptiedLayers) else None

    @property
    def is_ordered(self) -> bool:
        """Whether somebody waits to hear of it."""
        return self.change is not None and not isinstance(self.change, EmptiedLayers)

    @property
    def drops_layers(self) -> bool:
        """Whether there are layers now that there will not be then."""
        return isinstance(self.change, Rollback)

    def order(self, change: LayerChange, now_s: float) -> None:
        """Begin."""
        assert self.stage is Stage.NONE, "one at a time"
        self.change = change
        self.ordered_s = self.not_before_s = now_s
        self.held_s, self.missing_s = 0.0, None
        self._enter(Stage.WAITING, now_s)

    def freeze(self, now_s: float) -> int:
        """Begin to freeze; return the number of the attempt."""
        assert self.stage is Stage.WAITING, "what is awaited is there"
        self.attempt += 1
        self.holding_s = None
        self._enter(Stage.FREEZING, now_s)
        return self.attempt

    def is_of_now(self, attempt: int) -> bool:
        """Whether the freeze of this number is under way."""
        return self.stage is Stage.FREEZING and attempt == self.attempt

    def wait(self, now_s: float, pause_s: float = 0.0) -> None:
        """Wait again: the freeze has ended, with nothing proposed."""
        assert self.stage is Stage.FREEZING, "nothing is proposed"
        self.not_before_s = now_s + pause_s
        self.held_s += 0.0 if self.holding_s is None else now_s - self.holding_s
        self.holding_s = None
        self._enter(Stage.WAITING, now_s)

    def holds_since(self, now_s: float) -> None:
        """What was answered before is on stable storage; clients wait from now on."""
        self.holding_s = now_s

    def propose(self, record: ImageRecord, now_s: float) -> ImageRecord:
        """Return the record to propose; all is frozen."""
        assert self.stage is Stage.FREEZING and self.change is not None, "changes wait"
        self._enter(Stage.CHANGING, now_s)
        return self.change.applied_to(record)

    def store(self, now_s: float) -> None:
        """Etcd has taken it."""
        assert self.stage is Stage.CHANGING, "it was proposed"
        self._enter(Stage.STORING, now_s)

    def end(self) -> None:
        """It is made, or given up."""
        self.stage, self.change = Stage.NONE, None

    def look(self, missing: Iterable[str], levelling: Iterable[str], now_s: float) -> str:
        """Return why it has taken too long, empty where it has not.

        `missing` are nodes in sync that are not there, `levelling` those that are not level.
        """
        if self.stage is Stage.CHANGING and self.withdrawable:
            if now_s - self.since_s < THAW_AFTER_S:
                return ""
            return (
                f"etcd did not answer within {THAW_AFTER_S:.0f} s, and clients were not to wait "
                "any longer; try again when it does"
            )
        if self.stage is not Stage.WAITING:
            return ""
        nodes = ", ".join(sorted(missing))
        if not nodes:
            self.missing_s = None
        elif self.missing_s is None:
            self.missing_s = now_s
        elif now_s - self.missing_s >= WAIT_LIMIT_S:
            return f"{nodes} is not there, and all nodes in sync have to be; start it, or try again"
        if now_s - self.ordered_s >= LEVEL_LIMIT_S:
            nodes = ", ".join(sorted(levelling)) or "the nodes in sync"
            return f"{nodes} is not level with the others after {LEVEL_LIMIT_S:.0f} s; try again"
        return ""

    def _enter(self, stage: Stage, now_s: float) -> None:
        self.stage, self.since_s = stage, now_s


def is_unstored(record: ImageRecord, heard: Iterable[Peeked]) -> bool:
    """Whether none of these nodes in sync has stored the newest snapshot, under the top layer.

    Then no write was answered in that layer: all nodes in sync store it before. They have stored
    the record before it. Nodes that are further behind have lost something, and tell nothing.
    """
    newest = record.newest_snapshot
    known = [peeked.record.generation for peeked in heard if peeked.record is not None]
    return newest is not None and max(known, default=0) == newest.generation - 1
