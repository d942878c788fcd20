"""BLAKE3 digests of shards, and which replicas disagree.

A digest covers the whole shard as a guest sees it: all its bytes in order, holes and what lies past
the image's end as zeroes, so that replicas are equal however sparse their files are.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from blake3 import blake3

from shard.membership import Membership

DIGEST_BYTES = 32

UNREADABLE = b""
"""Reported in place of the digest of a shard that a node has and cannot read."""


@dataclass(frozen=True, slots=True, order=True)
class Difference:
    """A shard whose replicas are not equal, and the nodes that are not with the majority.

    Without a majority `nodes` names every node compared: none of them can be trusted by counting.
    Those of `nodes` that cannot read the shard are in `unreadable` too; the majority is that of the
    others.
    """

    shard: int
    nodes: tuple[str, ...]
    unreadable: tuple[str, ...] = ()


def digest(chunks: Iterable[bytes]) -> bytes:
    """Return the digest of a shard from its content in order, cut anywhere."""
    hasher = blake3()
    for chunk in chunks:
        hasher.update(chunk)
    return hasher.digest()


def digest_of_zeroes(shard_bytes: int) -> bytes:
    """Return the digest of a shard that was never written."""
    return digest([bytes(shard_bytes)])


def compare(digests: Mapping[str, Mapping[int, bytes]], zeroes: bytes) -> list[Difference]:
    """Return the shards on which nodes differ, in order of their index.

    `digests` is {node: {shard: digest}} as the nodes in sync of one replica set reported them. A
    shard that a node did not report has no data there and counts with the digest `zeroes`; one
    that is UNREADABLE equals no other.
    """
    differences = []
    for shard in sorted({shard for reported in digests.values() for shard in reported}):
        found = {node: reported.get(shard, zeroes) for node, reported in digests.items()}
        unreadable = tuple(sorted(node for node, value in found.items() if value == UNREADABLE))
        readable = [value for value in found.values() if value != UNREADABLE]
        value, votes = Counter(readable).most_common(1)[0] if readable else (UNREADABLE, 0)
        if votes == len(found):
            continue
        majority = value if votes * 2 > len(readable) else None
        nodes = tuple(sorted(node for node, value in found.items() if value != majority))
        differences.append(Difference(shard, nodes, unreadable))
    return differences


def state_digest(
    membership: Membership,
    layers: Sequence[int],
    snapshots: Iterable[Sequence[str | int]],
    merging: Sequence[int] = (),
    parent: Sequence[str | int] | None = None,
) -> bytes:
    """Return what tells two records of one generation apart: sets, who is stale, and layers.

    `layers` with the top first; `snapshots` as (name, layer, size, time, generation); `merging` the
    layers that are being merged into those above them; `parent` of a clone as (image, layer,
    generation, size).
    Nodes store it beside the generation and refuse an equal generation with another digest. Part of
    the wire and disk formats: BLAKE3 of JSON with sorted keys and no spaces.
    """
    document = {
        "sets": [list(members) for members in membership.sets],
        "stale": {str(index): dict(nodes) for index, nodes in membership.stale.items()},
        "layers": list(layers),
        "snapshots": [list(snapshot) for snapshot in snapshots],
        "merging": list(merging),
        **({} if parent is None else {"parent": list(parent)}),
    }
    return digest([json.dumps(document, sort_keys=True, separators=(",", ":")).encode()])
