"""What is done to the layers of an image while it is frozen: each is a change of its record. Pure.

change      the record then                             where etcd's answer is late
snapshot    names the former top, with a new one on it  clients go on, it is withdrawn
rollback    has a new top on a snapshot's layers, and   there are no clients: it is asked for
            nothing above them                          until its outcome is known
emptied     is without layers that all nodes have       clients go on, the layers are put back
            merged                                      and go some other time
"""

from dataclasses import dataclass

from etcd.images import ImageRecord


@dataclass(frozen=True, slots=True)
class NewSnapshot:
    """What the image holds is to be kept under a name that it has not given yet."""

    name: str
    created_s: int

    def applied_to(self, record: ImageRecord) -> ImageRecord:
        """Return the record to propose."""
        return record.with_snapshot(self.name, self.created_s)

    def withdrawn_from(self, record: ImageRecord) -> ImageRecord:
        """Return the record to propose where etcd took it too late."""
        return record.without_newest_snapshot()

    def is_between(self, before: ImageRecord, after: ImageRecord) -> bool:
        """Whether this change is made by going from one record to the other."""
        return after.next_layer > before.next_layer


@dataclass(frozen=True, slots=True)
class Rollback:
    """The image is to hold what the snapshot of this name does."""

    name: str

    def applied_to(self, record: ImageRecord) -> ImageRecord:
        """See `NewSnapshot`."""
        snapshot = record.snapshot(self.name)
        assert snapshot is not None, "snapshots go by their image's holder alone"
        return record.rolled_back(snapshot)

    def is_between(self, before: ImageRecord, after: ImageRecord) -> bool:
        """See `NewSnapshot`."""
        return after.next_layer > before.next_layer


@dataclass(frozen=True, slots=True)
class EmptiedLayers:
    """Layers of removed snapshots are to go, in which no node has anything any more."""

    layers: frozenset[int]

    def applied_to(self, record: ImageRecord) -> ImageRecord:
        """See `NewSnapshot`."""
        return record.without_merged(self.layers)

    def withdrawn_from(self, record: ImageRecord) -> ImageRecord:
        """See `NewSnapshot`."""
        return record.with_merged(self.layers)

    def is_between(self, before: ImageRecord, after: ImageRecord) -> bool:
        """See `NewSnapshot`."""
        return len(after.layers) < len(before.layers) and after.snapshots == before.snapshots


LayerChange = NewSnapshot | Rollback | EmptiedLayers

Withdrawable = NewSnapshot | EmptiedLayers
"""After these clients go on where etcd is late."""
