"""Which stale node of an image is healed, and when. Pure; `Holder` asks and tells.

One heal at a time for each image. A node that fails one is tried again after a pause that doubles,
up to a bound; a node that comes anew is tried at once.

    no heal     a stale node is there, and its sets have a node that serves    under way
    under way   HealFailed                                                     no heal, a pause
    under way   Healed                                                         healed
    healed      the record takes the node in                                   no heal
    healed      the node is lost before that was asked for                     no heal
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from shard.membership import Membership

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
"""What keeps a heal from ending (a full disk, a failing source) lasts minutes; tries are cheap."""


@dataclass(frozen=True, slots=True)
class HealLimits:
    """How much of the hosts the heals of a gateway may take, all together.

    The rate leaves most of a 10 Gbit/s network and of any SSD to guests; a few shards at once hide
    the time that each waits for answers.
    """

    bytes_per_second: int = 128 << 20
    """0: as fast as it goes."""
    shards_at_once: int = 4
    """Dealt out among the images that are healed; each has one at least."""
    share_percent: int = 25
    """Of the time, while guests want something: they keep the rest, and the budget is 70 %."""


@dataclass(slots=True)
class Underway:
    """The heal of one node, in all replica sets that it is stale in."""

    node: str
    attempt: int
    instance: int | None
    sets: Mapping[int, int]
    """{replica set: generation at which the node was left behind}."""
    healed: bool = False


@dataclass(slots=True)
class Heals:
    """The heals of one image."""

    now: Underway | None = None
    attempts: int = 0
    _failures: dict[str, int] = field(default_factory=dict)
    _not_before_s: dict[str, float] = field(default_factory=dict)

    def begin(
        self,
        membership: Membership,
        ready: Callable[[str], bool],
        instance: Callable[[str], int | None],
        serving: set[str],
        now_s: float,
        lacks: Callable[[str, int], bool] = lambda _node, _index: False,
    ) -> Underway | None:
        """Begin the next heal that is due.

        `ready` says whether a node can be healed now, `serving` which nodes can be sources, and
        `lacks` which node has to wait, in a replica set, for something else to be healed there.
        """
        if self.now is not None:
            return None
        stale = sorted({node for nodes in membership.stale.values() for node in nodes})
        # One that failed often keeps no other from being healed.
        for node in sorted(stale, key=lambda name: self._failures.get(name, 0)):
            if not ready(node) or now_s < self._not_before_s.get(node, now_s):
                continue
            sets = {
                index: nodes[node]
                for index, nodes in membership.stale.items()
                if node in nodes
                and serving & set(membership.in_sync(index))
                and not lacks(node, index)
            }
            if sets:
                self.attempts += 1
                self.now = Underway(node, self.attempts, instance(node), sets)
                return self.now
        return None

    def came(self, node: str) -> None:
        """A node has connected: what went wrong before is forgotten."""
        self._failures.pop(node, None)
        self._not_before_s.pop(node, None)

    def healed(self, attempt: int) -> None:
        """Note that the node is level, and gets what is written."""
        if self.now is not None and self.now.attempt == attempt:
            self.now.healed = True

    def failed(self, attempt: int, now_s: float) -> str | None:
        """Note that a heal ended early; return its node, if it was the one under way."""
        if self.now is None or self.now.attempt != attempt:
            return None
        node, self.now = self.now.node, None
        failures = self._failures[node] = self._failures.get(node, 0) + 1
        pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(failures - 1, 16))
        self._not_before_s[node] = now_s + pause_s
        return node

    def to_take_in(self) -> dict[int, set[str]]:
        """Return what the record may take in now: {replica set: nodes}."""
        if self.now is None or not self.now.healed:
            return {}
        return {index: {self.now.node} for index in self.now.sets}

    def taken_in(self, membership: Membership) -> Underway | None:
        """A record is in force; return the heal that it ends, if it takes the healed node in."""
        ended = self.now
        if ended is None or any(ended.node in membership.stale.get(i, {}) for i in ended.sets):
            return None
        self.now = None
        self.came(ended.node)
        return ended
