"""Compares the replicas of an image: BLAKE3 digests per shard over the nodes in sync.

Pure but for the digests, which the caller fetches. While an image is written, a digest of one node
can be older than that of another: shards that differ are asked for again, and only those that keep
differing are reported.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from etcd.images import ImageRecord
from shard import digest
from shard.digest import Difference
from shard.geometry import Geometry
from shard.placement import replica_set_index

BATCH_SHARDS = 256
"""Shards asked for at once: enough to keep disks busy, few enough to show progress."""

BATCHES_MAX = 1000
"""An image may have millions of shards, most of them empty: batches grow to keep to this number."""

ATTEMPTS = 5
"""Times that a differing shard is compared."""

Digests = Callable[[Collection[str], int, int], Mapping[str, Mapping[int, bytes]]]
"""Digests of the shards of a range that have data, by node: (nodes, first shard, count)."""


@dataclass(frozen=True)
class Report:
    """The outcome. `compared` names the nodes per replica set, `missing` those in sync that are not
    up."""

    shards: int
    compared: Sequence[Sequence[str]]
    missing: Sequence[str]
    different: Sequence[Difference]
    snapshot: str = ""
    """Of which snapshot's content; empty: of what the image holds now."""

    @property
    def not_compared(self) -> Sequence[int]:
        """The replica sets with fewer than two nodes to compare."""
        return [index for index, nodes in enumerate(self.compared) if len(nodes) < 2]

    @property
    def equal(self) -> bool:
        """Whether two replicas or more of each set were compared, and all of these are equal."""
        return not self.different and not self.not_compared


def compare(
    record: ImageRecord,
    up: Iterable[str],
    digests: Digests,
    progress: Callable[[float], None],
    pause: Callable[[int], None],
) -> Report:
    """Compare all shards of an image on those nodes in sync that are `up`.

    `pause` is called before each further attempt, with its number. Errors of `digests` pass
    through.
    """
    there = frozenset(up)
    members = [
        tuple(node for node in nodes if node in there and node not in record.stale.get(index, {}))
        for index, nodes in enumerate(record.sets)
    ]
    in_sync = record.membership.all_in_sync()
    shards = Geometry(record.size_bytes, record.shard_bytes).shards
    zeroes = digest.digest_of_zeroes(record.shard_bytes)
    batch = max(BATCH_SHARDS, -(-shards // BATCHES_MAX))
    different: list[Difference] = []
    for first in range(0, shards, batch):
        count = min(batch, shards - first)
        found = _differing(record, members, first, count, digests, zeroes)
        for attempt in range(1, ATTEMPTS):
            if not found:
                break
            pause(attempt)
            found = [
                again
                for each in found
                for again in _differing(record, members, each.shard, 1, digests, zeroes)
            ]
        different += found
        progress((first + count) / shards)
    return Report(shards, members, sorted(in_sync - there), different)


def _differing(
    record: ImageRecord,
    members: Sequence[Sequence[str]],
    first: int,
    count: int,
    digests: Digests,
    zeroes: bytes,
) -> list[Difference]:
    nodes = sorted({node for nodes in members for node in nodes})
    by_set: list[dict[str, dict[int, bytes]]] = [{node: {} for node in of} for of in members]
    for node, reported in digests(nodes, first, count).items():
        for shard, value in reported.items():
            index = replica_set_index(record.placement_key, shard, len(members))
            # A node may still have a shard of a replica set that it is stale for, or has left.
            if node in by_set[index]:
                by_set[index][node][shard] = value
    return sorted(each for of_set in by_set for each in digest.compare(of_set, zeroes))
