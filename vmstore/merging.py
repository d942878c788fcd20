"""How layers of removed snapshots go: each node merges them, and the record follows. Pure.

A snapshot that is removed leaves its layer, which the record then names as *merging*: each node
puts what is in it into the layer above, in its own time, whether the image is open or not. The
layer goes from the record when all nodes of the image say, asked at one time, that nothing of it is
left on them, stale ones too: what one of them still has there it could not name any more. Until
then it is harmless.
"""

from dataclasses import dataclass, field

from etcd.images import ImageRecord

ASK_S = 3.0
"""Between questions to the nodes of an image that has layers to be merged. What one has not said by
the next it has not said: a heal may have given it something meanwhile."""

AGAIN_S = 60.0
"""Until it is tried again to take layers out, where that failed: changes of clients waited for it.
"""


@dataclass(slots=True)
class Merging:
    """What the holder of an image knows of its merges."""

    removes: str = ""
    """The snapshot that somebody wants to be removed; empty: none."""
    emptied: dict[str, frozenset[int]] = field(default_factory=dict)
    """Of each node the layers of which it has nothing, as it said when it was asked last."""
    ask_at_s: float = 0.0
    not_before_s: float = 0.0

    def asks(self, record: ImageRecord, now_s: float) -> bool:
        """Whether the nodes are asked now, all of them anew."""
        if not record.merging or now_s < self.ask_at_s:
            return False
        self.ask_at_s = now_s + ASK_S
        self.emptied.clear()
        return True

    def emptied_everywhere(self, record: ImageRecord) -> frozenset[int]:
        """Return the layers of which no node of the image has anything."""
        found = frozenset(record.merging)
        for members in record.sets:
            for node in members:
                found &= self.emptied.get(node, frozenset())
        return found
