"""What the holder of a clone knows of the clone's ancestors on its nodes. Pure.

A clone is read through its ancestors, by each node from what it keeps of them itself. So a node
counts as in sync for the clone only where etcd says that it is, or was, for all that the clone
begins on: ancestors are healed first. Who holds an ancestor says in etcd that a node is stale for
it before it gives that node anything to store. Hence what etcd says is right for a node from the
moment on that the node told what it has: only a *look* counts that was begun after that.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from shard.membership import Stale

AGAIN_S = 3.0
"""Until etcd, and a node, are asked again while an ancestor is not whole there."""

RETRY_S = 0.5
"""Until etcd is asked again where it did not answer."""


@dataclass(slots=True)
class Ancestry:
    """See the module. Looks have numbers; one is under way at a time."""

    lacking: Mapping[int, frozenset[str]] = field(default_factory=dict)
    """By the look that was seen last: {replica set: nodes}."""
    blamed: set[str] = field(default_factory=set)
    """Nodes that count as emptied for this alone."""
    asked_s: float = 0.0
    """When nodes that lacked something were asked anew."""
    _begun: int = 0
    _seen: int = 0
    _under_way: bool = False
    _not_before_s: float = 0.0
    _needs: dict[str, int] = field(default_factory=dict)
    """The first look that counts for a node."""

    def forget(self, node: str) -> None:
        """What etcd said before does not count for a node any more."""
        self._needs[node] = self._begun + 1

    def knows(self, node: str) -> bool:
        """Whether it is known what a node lacks."""
        return self._needs.get(node, 1) <= self._seen

    def lacks(self, node: str, index: int) -> bool:
        """Whether a node may lack what the clone begins on, of a replica set."""
        return node in self.lacking.get(index, ())

    def lacks_any(self, node: str) -> bool:
        """Whether it may, of any replica set."""
        return any(node in nodes for nodes in self.lacking.values())

    def look(self, now_s: float) -> int | None:
        """Begin a look, unless one is under way or has just failed; return its number."""
        if self._under_way or now_s < self._not_before_s:
            return None
        self._begun += 1
        self._under_way = True
        return self._begun

    def saw(self, look: int, lacking: Stale) -> bool:
        """Take what a look found; return whether it is the one under way."""
        if not self._under_way or look != self._begun:
            return False
        self._under_way, self._seen = False, look
        self.lacking = {index: frozenset(nodes) for index, nodes in lacking.items()}
        return True

    def failed(self, look: int, now_s: float) -> None:
        """A look came to nothing: another one is begun after a while."""
        if look == self._begun:
            self._under_way = False
            self._not_before_s = now_s + RETRY_S
