"""What is done to the layers of an image while it is frozen: each is a change of its record. Pure.

change      the record then                             where etcd's answer is late
snapshot    names the former top, with a new one on it  clients go on, it is withdrawn
rollback    has a new top on a snapshot's layers, and   there are no clients: it is asked for
            nothing above them                          until its outcome is known
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


@dataclass(frozen=True, slots=True)
class Rollback:
    """The image is to hold what the snapshot of this name does."""

    name: str

    def applied_to(self, record: ImageRecord) -> ImageRecord:
        """Return the record to propose."""
        snapshot = record.snapshot(self.name)
        assert snapshot is not None, "snapshots go by their image's holder alone"
        return record.rolled_back(snapshot)


LayerChange = NewSnapshot | Rollback
