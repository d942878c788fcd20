"""`State`: what the holder of an image knows of it and its nodes, and what follows from that.

Pure: who is lost, who is well, and when a lost node is left behind. What is done about it is said
in `vmstore/holder.py`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, auto

from etcd.images import ImageRecord
from vmstore.ancestry import Ancestry
from vmstore.events import Peeked
from vmstore.freezing import Freezing, Stage
from vmstore.healing import Heals
from vmstore.merging import Merging
from vmstore.slowness import Slowness
from vmstore.space import Space

GRACE_S = 3.0
"""How long a new holder waits for nodes in sync that do not answer before it goes on without them:
longer than a node takes to start beside it, shorter than a person waits. The time that a node has
been lost to the gateway counts: a guest that is restarted elsewhere does not wait again for what
went with its host."""

FAILING_S = 2.5
"""A node counts as failing so long after it failed a request: it is asked again each second."""


class Phase(Enum):
    """See `vmstore/holder.py`."""

    TAKING = auto()
    GATHERING = auto()
    JOINING = auto()
    SERVING = auto()
    CLOSING = auto()
    RELEASING = auto()
    ENDED = auto()


class Standing(Enum):
    """How far a node has come."""

    AWAY = auto()
    ASKED = auto()
    """Connected, and asked for its record again."""
    WAITING = auto()
    JOINING = auto()
    HEALING = auto()
    """In sync nowhere, and being made level."""
    UP = auto()


@dataclass(slots=True)
class NodeState:
    """One node, as the holder of an image knows it."""

    standing: Standing = Standing.AWAY
    instance: int | None = None
    """Of the session that is or waits to be."""
    served_as: int | None = None
    """The instance that was last up: only it resumes."""
    failed_at_s: float | None = None
    """When it last failed a request."""
    away_since_s: float | None = None
    """Since when it has been lost, where that was before the image was opened."""
    peeked: "Peeked | None" = None
    """What it said last, while it is connected."""


@dataclass(slots=True)
class State:
    """One image, as its holder knows it."""

    holder: str
    now_s: float
    phase: Phase = Phase.TAKING
    record: ImageRecord | None = None
    proposal: ImageRecord | None = None
    nodes: dict[str, NodeState] = field(default_factory=dict)
    emptied: set[str] = field(default_factory=set)
    blocking: set[str] = field(default_factory=set)
    levelling: set[str] = field(default_factory=set)
    """Nodes in sync that may lack what was answered and not flushed, until they are level."""
    undecided: bool = False
    """Whether etcd may have taken the proposal: then it is made until its outcome is known."""
    heals: Heals = field(default_factory=Heals)
    slowness: Slowness = field(default_factory=Slowness)
    too_slow: str | None = None
    """Whom the proposal leaves behind although it is there."""
    space: Space = field(default_factory=lambda: Space(FAILING_S))
    freezing: Freezing = field(default_factory=Freezing)
    merging: Merging = field(default_factory=Merging)
    ancestry: Ancestry = field(default_factory=Ancestry)
    storing: bool = False
    paused: bool = False
    """Another change of the record is under way: none is proposed."""
    waiting_since_s: float | None = None
    opened_s: float = 0.0
    retry_at_s: float | None = None
    trouble: str = ""

    def missing(self) -> list[str]:
        """Return the nodes in sync that do not serve."""
        if self.record is None:
            return []
        in_sync = self.record.membership.all_in_sync()
        return sorted(n for n in in_sync if self.nodes[n].standing is not Standing.UP)

    def _is_well(self, name: str) -> bool:
        node = self.nodes[name]
        return node.standing is Standing.UP and not self._is_failing(node)

    def _is_told(self, name: str) -> bool:
        """Whether the record says of a store that is not the one it was that nothing on it counts.

        A change may have been on its way that left its node behind as one that was merely lost.
        """
        assert self.record is not None
        stale = self.record.membership.stale.values()
        return name not in self.emptied or all(nodes.get(name, 0) == 0 for nodes in stale)

    # Who is lost

    def _is_lost(self, name: str) -> bool:
        node = self.nodes[name]
        return node.standing is Standing.AWAY or self._is_failing(node) or name in self.emptied

    def _is_failing(self, node: NodeState) -> bool:
        return node.failed_at_s is not None and self.now_s - node.failed_at_s < FAILING_S

    def _is_due(self, lost: set[str]) -> bool:
        """A serving image leaves nodes behind when requests wait; an opening one after a grace."""
        waits = bool(lost & (self.blocking | self.emptied)) or self._keep_others_out(lost)
        waits = waits or (bool(lost) and self.freezing.stage is not Stage.NONE)
        if self.phase in (Phase.SERVING, Phase.CLOSING) and self._is_founded(self._in_sync_names()):
            if waits and self._others_are_level(lost):
                return True
            return waits and self._grace_is_over(lost)
        return self._grace_is_over(lost) or lost <= self.emptied

    def _keep_others_out(self, lost: set[str]) -> bool:
        """Whether requests wait for a node that comes in only when lost ones are left behind."""
        assert self.record is not None
        sets = self.record.membership.in_sync_sets()
        concerned = [of_set for of_set in sets if of_set & lost and of_set & self.blocking]
        return not all(map(self._is_founded, concerned))

    def _is_founded(self, names: Iterable[str]) -> bool:
        """Whether one of these is up, to tell level from stale by."""
        return any(self.nodes[name].standing is Standing.UP for name in names)

    def _others_are_level(self, lost: set[str]) -> bool:
        """Whether of each set that can go on another node surely has all that was answered.

        Where none has, a lost one may have it alone.
        """
        assert self.record is not None
        membership = self.record.membership
        well = {name for name in self._in_sync_names() - self.levelling if self._is_well(name)}
        left = [of_set - lost for of_set in membership.in_sync_sets() if of_set & lost]
        go_on = [of_set for of_set in left if len(of_set) >= membership.policy.quorum]
        return bool(well) and all(of_set & well for of_set in go_on)

    def _grace_is_over(self, lost: set[str]) -> bool:
        """A node that was away long before anybody asked for it has had its time."""
        waiting_s = self.waiting_since_s
        if waiting_s is None:
            return False
        away = [self.nodes[name].away_since_s for name in lost]
        began = [waiting_s if away_s is None else min(away_s, waiting_s) for away_s in away]
        return all(self.now_s - since_s >= GRACE_S for since_s in began)

    def _in_sync_names(self) -> frozenset[str]:
        assert self.record is not None
        return self.record.membership.all_in_sync()

    def _in_sync_nodes(self) -> list[NodeState]:
        return [self.nodes[name] for name in self._in_sync_names()]
