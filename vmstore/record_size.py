"""How long an image's record may become: nodes refuse one that is longer than they keep.

It is longest with a node of each replica set left behind, and that is when it must be stored; so
what makes it longer is refused while it would still fit.
"""

from dataclasses import replace

from etcd.images import SNAPSHOTS_MAX, Grant, ImageRecord, Recovered, Use
from vmstore.snapshot_errors import SnapshotExists, TooManySnapshots

RECORD_BYTES_MAX = 64 << 10
"""An image's record that a node takes; `engine/core/src/store/images.rs` has the same."""

_MOST = 10**9
"""More than any number in a record grows to, but for sizes and times."""


def longest_bytes(record: ImageRecord) -> int:
    """Return how long a record may become while its snapshots stay as they are."""
    longest = replace(
        record,
        epoch=_MOST,
        holder="0" * 32,
        generation=_MOST,
        stale={
            index: {max(members, key=len): _MOST - 1} for index, members in enumerate(record.sets)
        },
        grant=Grant(arbiter="0" * 32, changes=_MOST),
        used=Use(epoch=_MOST, holder="0" * 32),
        recovered=Recovered(recovery=_MOST, epoch=_MOST, generation=_MOST),
    )
    return len(longest.encode())


def check_snapshot(record: ImageRecord, image: str, name: str, created_s: int) -> None:
    """Raise SnapshotExists or TooManySnapshots where a snapshot cannot be added to a record."""
    count, merging = len(record.snapshots), len(record.merging)
    if record.snapshot(name) is not None:
        raise SnapshotExists(image, name)
    if count < SNAPSHOTS_MAX <= count + merging:
        why = f"{merging} that were removed are still being merged, which takes a while"
        raise TooManySnapshots(image, count, why)
    if count >= SNAPSHOTS_MAX:
        raise TooManySnapshots(image, count, "an image has no more than that")
    if longest_bytes(record.with_snapshot(name, created_s)) > RECORD_BYTES_MAX:
        raise TooManySnapshots(
            image, count, "its record has no room for another one: shorter names would take less"
        )
