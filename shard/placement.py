"""Where a pool's data lives: which nodes form its replica sets, and which set a shard falls into.

A pool has N replica sets of M members each; the members of one set stand in different failure
domains. The choice is deterministic, moves no more than it must against the former placement, and
loads nodes in proportion to their weights. `replica_set_index` is part of the placement format
and equals the engine's.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import zip_longest

from shard.errors import TooFewDomains
from shard.ids import ImageId

ReplicaSet = tuple[str, ...]
"""The ordered names of the nodes that hold a group of shards."""

NODES_MAX = 64
"""Nodes over which one pool spreads: the engine counts an image's nodes in one word."""

_MASK_64 = (1 << 64) - 1
_FNV_OFFSET = 0xCBF29CE484222325
_FNV_PRIME = 0x100000001B3


class FailureDomain(StrEnum):
    """What the members of one replica set do not share."""

    NODE = "node"
    HOST = "host"
    ZONE = "zone"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node that may be placed on.

    `weight` is its share relative to the others (its capacity in bytes, say). A weight of zero
    keeps what the node has and gives it nothing more.
    """

    name: str
    host: str
    zone: str = "default"
    labels: Mapping[str, str] = field(default_factory=dict)
    weight: int = 1

    def domain(self, failure_domain: FailureDomain) -> str:
        """Return the name of the failure domain this node stands in."""
        return {
            FailureDomain.NODE: self.name,
            FailureDomain.HOST: self.host,
            FailureDomain.ZONE: self.zone,
        }[failure_domain]


def spread_candidates(
    candidates: Iterable[Candidate], failure_domain: FailureDomain = FailureDomain.HOST
) -> list[Candidate]:
    """Return at most NODES_MAX of the nodes: the heaviest of each domain, domain by domain."""
    of_domain: dict[str, list[Candidate]] = {}
    for node in sorted(candidates, key=lambda node: (-node.weight, node.name)):
        of_domain.setdefault(node.domain(failure_domain), []).append(node)
    rounds = zip_longest(*of_domain.values())
    return [node for nodes in rounds for node in nodes if node is not None][:NODES_MAX]


def suggested_replica_sets(candidates: int, members: int) -> int:
    """Return how many replica sets spread a pool over so many nodes: each node in `members`."""
    return 1 if candidates <= members else candidates


def choose_replica_sets(
    candidates: Iterable[Candidate],
    *,
    replica_sets: int,
    members: int,
    failure_domain: FailureDomain = FailureDomain.HOST,
    former: Sequence[ReplicaSet] = (),
) -> tuple[ReplicaSet, ...]:
    """Return the members of each replica set of a pool.

    Set i of the result keeps the members of `former[i]` that are still candidates and still stand
    in different failure domains; every other place goes to the node with the least load for its
    weight. Sets are never removed: `former` has at most `replica_sets`.

    Raises TooFewDomains where the nodes stand in fewer domains than a set has members.
    """
    assert replica_sets >= 1, "a pool has at least one replica set"
    assert members >= 1, "a replica set has at least one member"
    assert len(former) <= replica_sets, "replica sets are never removed"
    by_name = {candidate.name: candidate for candidate in candidates}
    chooser = _Chooser(by_name, failure_domain)
    kept = [chooser.keep(members_before) for members_before in former]
    kept += [{} for _ in range(replica_sets - len(former))]
    for index, places in enumerate(kept):
        chooser.fill(index, places, members)
    return tuple(tuple(places[place] for place in range(members)) for places in kept)


_Cost = tuple[float, int, int, str]


class _Chooser:
    """Counts how often each node was chosen while places are given out one by one."""

    def __init__(self, nodes: Mapping[str, Candidate], failure_domain: FailureDomain) -> None:
        self._nodes = nodes
        self._failure_domain = failure_domain
        self._load: Counter[str] = Counter()
        self._together: Counter[tuple[str, str]] = Counter()

    def keep(self, members_before: ReplicaSet) -> dict[int, str]:
        """Return {place: node} of what stays of a former set."""
        places: dict[int, str] = {}
        for place, name in enumerate(members_before):
            if name in self._nodes and self._domain(name) not in self._domains(places):
                self._put(places, place, name)
        return places

    def fill(self, index: int, places: dict[int, str], members: int) -> None:
        """Give every empty place of replica set `index` to the best node left."""
        for place in (place for place in range(members) if place not in places):
            taken = self._domains(places)
            free = [
                name
                for name, node in self._nodes.items()
                if node.weight > 0 and self._domain(name) not in taken
            ]
            if not free:
                raise TooFewDomains(members, len(taken), self._failure_domain.value)
            best = min(free, key=lambda name: self._cost(index, places, name))
            self._put(places, place, best)

    def _put(self, places: dict[int, str], place: int, name: str) -> None:
        for other in places.values():
            self._together[min(name, other), max(name, other)] += 1
        self._load[name] += 1
        places[place] = name

    def _cost(self, index: int, places: Mapping[int, str], name: str) -> _Cost:
        """Least loaded first; then seldom together (a heal has many sources); then a hash."""
        together = sum(
            self._together[min(name, other), max(name, other)] for other in places.values()
        )
        load = (self._load[name] + 1) / self._nodes[name].weight
        return load, together, _hash(f"{index}/{name}".encode()), name

    def _domain(self, name: str) -> str:
        return self._nodes[name].domain(self._failure_domain)

    def _domains(self, places: Mapping[int, str]) -> set[str]:
        return {self._domain(name) for name in places.values()}


def replica_set_index(placement_key: ImageId, shard: int, replica_sets: int) -> int:
    """Return the replica set of a shard: FNV-1a over the key and the index, mixed by SplitMix64.

    Part of the placement format, equal to `replica_set_index` of the engine: never change it.
    """
    assert replica_sets > 0, "an image has at least one replica set"
    assert 0 <= shard <= _MASK_64, "a shard index has 64 bits"
    if replica_sets == 1:
        return 0
    return _hash(bytes.fromhex(placement_key) + shard.to_bytes(8, "little")) % replica_sets


def replica_set_of(
    placement_key: ImageId, shard: int, replica_sets: Sequence[ReplicaSet]
) -> ReplicaSet:
    """Return the nodes that hold a shard."""
    return replica_sets[replica_set_index(placement_key, shard, len(replica_sets))]


def _hash(data: bytes) -> int:
    value = _FNV_OFFSET
    for byte in data:
        value = ((value ^ byte) * _FNV_PRIME) & _MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)
