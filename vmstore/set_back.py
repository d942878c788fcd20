"""Stores that were set back: an older copy of a node's disk was put in place of the present one.

etcd has seen a later start of such a store, so nothing that it holds of an image counts. The node
goes on as a new instance, above all that were seen, and says of each of these images that it is
distrusted (`Marks`), over all its starts, until a holder has had etcd say that the node is stale
since 0 and heals it. Whoever was set back proves nothing about etcd either: its copy of the records
is as old.

It may do so only where another node in sync is there for each of its replica sets. If the disks of
all of them were put back together nobody would be left to say so, and older content would pass for
new.
"""

import json
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from etcd.images import ImageRecord
from etcd.records import AliveRecord, NodeRecord
from shard.errors import HciError
from shard.ids import ImageId, image_id


def seen_later(known: NodeRecord | None, own: NodeRecord) -> bool:
    """Whether the cluster has seen a later start of this store, or this one by another run."""
    if known is None or known.store_id != own.store_id:
        return False
    other_run = None not in (known.run, own.run) and known.run != own.run
    return known.start_counter > own.start_counter or (
        known.start_counter == own.start_counter and other_run
    )


def may_run_elsewhere(alive: AliveRecord | None, own: NodeRecord) -> bool:
    """Whether another process may run with this store, or a copy of it."""
    return alive is not None and alive.run != own.run


def only_here(
    images: Iterable[ImageRecord], node: str, alive: Collection[str]
) -> tuple[ImageId, ...]:
    """Return the images of which `node` is in sync in a set whose other nodes in sync are away."""
    others = set(alive) - {node}

    def is_alone(record: ImageRecord) -> bool:
        sets = (set(record.membership.in_sync(index)) for index in range(len(record.sets)))
        return any(node in in_sync and not in_sync & others for in_sync in sets)

    return tuple(sorted(record.id for record in images if record.epoch > 0 and is_alone(record)))


class MarksFailed(HciError):
    """What is distrusted on a node could not be read or written."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path}, which says what is distrusted here, cannot be used: {why}")


@dataclass(slots=True)
class Marks:
    """The images that are distrusted on a node, in a file of its `data_dir`.

    The file may name more than the store does, never less: a heal that has begun is crossed out a
    moment later, and one that is begun twice only compares once more.
    """

    path: Path
    seen_counter: int = 0
    """The highest start counter that was seen of the store when it was set back."""
    images: frozenset[ImageId] = field(default_factory=frozenset)

    @classmethod
    def load(cls, path: Path) -> "Marks":
        """Read them; there are none where there is no file. Raises MarksFailed."""
        try:
            read = json.loads(path.read_bytes())
            images = frozenset(image_id(image) for image in read["images"])
            return cls(path, int(read["seen_counter"]), images)
        except FileNotFoundError:
            return cls(path)
        except (OSError, ValueError, KeyError, TypeError, HciError) as error:
            raise MarksFailed(path, str(error)) from error

    def save(self, seen_counter: int, images: Collection[ImageId]) -> None:
        """Keep these, durably, in place of what there was. Raises MarksFailed."""
        aside = self.path.with_name(self.path.name + ".new")
        text = json.dumps({"seen_counter": seen_counter, "images": sorted(images)})
        try:
            if images or seen_counter:
                with aside.open("w") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
                aside.replace(self.path)
            else:
                self.path.unlink(missing_ok=True)
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise MarksFailed(self.path, error.strerror or str(error)) from error
        self.seen_counter, self.images = seen_counter, frozenset(images)
