"""`Space`: which nodes' disks are full, and which replica sets have no room for writes. Pure.

A set is short of space while its nodes in sync that lately had room are no quorum. Only after a
while are its writes said to wait for room. What clients are told then is not decided here.
"""

from dataclasses import dataclass, field

from shard.membership import Membership, short_of_space

NO_SPACE = "NoSpace"
"""What the engine says of a node whose disk is full."""

FULL_S = 2.0
"""How long the disks of too many nodes are full before clients may hear of it: longer than leaving
one of them behind takes, and than a checkpoint that makes room."""


@dataclass(slots=True)
class Space:
    """The room that the nodes of one image have. One counts as full for `full_for_s`."""

    full_for_s: float
    full_at_s: dict[str, float] = field(default_factory=dict)
    """When a node last failed a request because its disk is full."""
    short_since_s: dict[int, float] = field(default_factory=dict)
    """Since when replica sets have been short of space: too many of their nodes are full."""

    def refused(self, node: str, now_s: float) -> None:
        """A node failed a request because its disk is full."""
        self.full_at_s[node] = now_s

    def gone(self, node: str) -> None:
        """A node is lost: nothing is known of its disk."""
        self.full_at_s.pop(node, None)

    def look(self, membership: Membership, now_s: float) -> None:
        """Look which sets are short of space."""
        short = short_of_space(membership, self.full(now_s))
        self.short_since_s = {
            index: self.short_since_s.get(index, now_s) for index in sorted(short)
        }

    def full(self, now_s: float) -> frozenset[str]:
        """Return the nodes that lately had no space for what was asked of them."""
        return frozenset(
            name for name, at_s in self.full_at_s.items() if now_s - at_s < self.full_for_s
        )

    def without(self, now_s: float) -> frozenset[int]:
        """Return the replica sets whose writes wait for room, and not for just a moment."""
        since_s = self.short_since_s.items()
        return frozenset(index for index, at_s in since_s if now_s - at_s >= FULL_S)
