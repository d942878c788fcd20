"""`Told`: what nodes and arbiters told of the cluster's records, for a recovery. Pure.

Of each record the latest that anyone knows counts, be it etcd, a node's copy of it or, of images, a
node's store. Not everybody counts: a node is heard whose store is the registered one and was not
set back, an arbiter where its votes are not older than its record. What is to be written is not
said here.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from etcd import keys
from etcd.errors import RecordError
from etcd.images import ImageRecord
from etcd.interface import KeyValue
from etcd.records import (
    ArbiterRecord,
    NameRecord,
    NodeRecord,
    PlacementRecord,
    PoolRecord,
)
from shard.ids import ImageId
from shard.membership import Stale
from shard.placement import FailureDomain
from vmstore.history import Member, R

SUFFIX_DIGITS = 8
"""Of an image's id, in the name that it gets where its own is not known or is another's."""


@dataclass(frozen=True, slots=True)
class Voted:
    """What an arbiter has confirmed of an image: (generation, nodes in sync) per replica set."""

    epoch: int
    sets: tuple[tuple[int, frozenset[str]], ...]


@dataclass(frozen=True, slots=True)
class Witness:
    """An arbiter that was heard."""

    name: str
    id: str
    start_counter: int
    images: Mapping[ImageId, Voted]


@dataclass(frozen=True, slots=True)
class Sources:
    """All that was heard, and what etcd says now. `away` tells why nodes were not heard."""

    cluster: str
    members: Mapping[str, Member]
    witnesses: Mapping[str, Witness]
    away: Mapping[str, str]
    now: Mapping[str, KeyValue]


class Told:
    """All that was heard: the latest of each record, and whose word counts.

    `nodes` and `arbiters` are by name, `names` are keys with the images that they name, and
    revisions. `pools` are there once `find_pools` was called.
    """

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self.nodes = self._latest_nodes()
        self.arbiters = self._latest_arbiters()
        self._trusted = {name for name, m in sources.members.items() if self._is_trusted(m)}
        self.names = self._latest_names()
        self.pools: dict[str, PoolRecord] = {}

    # Who was heard

    def _is_trusted(self, member: Member) -> bool:
        """Whether a node counts: it is the one that was registered, and not an older copy of it."""
        record = self.nodes.get(member.name)
        if record is None:
            return True
        return member.store_id == record.store_id and member.start_counter >= record.start_counter

    def counts(self, node: str, image: ImageId) -> bool:
        """Whether a node was heard that knows whether it has stored a later record of an image."""
        if node not in self._trusted:
            return False
        return image not in self._sources.members[node].known.distrusted

    def heard(self, record: ImageRecord) -> tuple[str, ...]:
        """Return the nodes of an image that were heard and count."""
        placed = dict.fromkeys(node for members in record.sets for node in members)
        return tuple(node for node in placed if self.counts(node, record.id))

    def _witness_of(self, image: ImageRecord) -> Witness | None:
        pool = self.pools.get(image.pool)
        if pool is None or pool.arbiter is None or not pool.filled:
            return None
        witness = self._sources.witnesses.get(pool.arbiter)
        record = self.arbiters.get(pool.arbiter)
        if witness is None or (
            record is not None
            and (record.id != witness.id or record.start_counter > witness.start_counter)
        ):
            return None
        return witness

    def missing(self, base: ImageRecord) -> tuple[list[str], list[str]]:
        """Return what is missing of a quorum of each replica set, and what that may lose."""
        missing, losses = [], []
        has_arbiter = base.policy.has_arbiter
        witness = int(has_arbiter and self._witness_of(base) is not None)
        for index, members in enumerate(base.sets):
            heard = [node for node in members if self.counts(node, base.id)]
            if len(heard) + witness >= 2:
                continue
            silent = [node for node in members if node not in heard]
            if has_arbiter and not witness:
                pool = self.pools.get(base.pool)
                silent.append(f"arbiter {pool.arbiter if pool is not None else ''}".strip())
            among = f"{', '.join(heard) or 'no node'} of replica set {index}"
            missing.append(f"only {among} was heard; {', '.join(silent)} missing, two are needed")
            losses.append(f"what {', '.join(silent)} may know that is later")
        return missing, losses

    def _copies(self) -> Iterator[tuple[str, Mapping[str, KeyValue]]]:
        """Every copy of the records there is: etcd's, those of the nodes."""
        yield "etcd", self._sources.now
        for name, member in self._sources.members.items():
            yield name, member.known.records
            yield name, member.known.former

    def all_of(self, prefix: str) -> Iterator[KeyValue]:
        """Yield what stands under a prefix, in every copy."""
        for _, copy in self._copies():
            yield from (item for key, item in copy.items() if key.startswith(prefix))

    def _latest_nodes(self) -> dict[str, NodeRecord]:
        found: dict[str, NodeRecord] = {}
        for item in self.all_of(keys.NODES):
            record = record_of(NodeRecord, item)
            if record is None:
                continue
            former = found.get(record.name)
            if former is None or record.start_counter > former.start_counter:
                found[record.name] = record
        return found

    def _latest_arbiters(self) -> dict[str, ArbiterRecord]:
        found: dict[str, ArbiterRecord] = {}
        for item in self.all_of(keys.ARBITERS):
            record = record_of(ArbiterRecord, item)
            if record is None:
                continue
            former = found.get(record.name)
            if former is None or (record.retired, record.start_counter) > (
                former.retired,
                former.start_counter,
            ):
                found[record.name] = record
        return found

    # Records

    def find_pools(self, ids: Iterable[ImageId]) -> None:
        """Find the pools; those of these images that nobody has a record of are rebuilt."""
        found: dict[str, tuple[int, PoolRecord]] = {}
        for item in self.all_of(keys.POOLS):
            record = record_of(PoolRecord, item)
            if record is None:
                continue
            former = found.get(record.name)
            if former is None or item.mod_revision > former[0]:
                found[record.name] = (item.mod_revision, record)
        pools = {name: record for name, (_, record) in found.items()}
        for image in ids:
            for candidate, _ in self.candidates(image):
                if candidate.pool not in pools and not self.is_deleted(image):
                    pools[candidate.pool] = self._rebuilt_pool(candidate)
        self.pools = pools

    def _rebuilt_pool(self, image: ImageRecord) -> PoolRecord:
        """Return a pool of which nobody has a record, by one of its images."""
        voting = [a.name for a in self.arbiters.values() if not a.retired]
        arbiter = voting[0] if image.policy.has_arbiter and len(voting) == 1 else None
        return PoolRecord(
            name=image.pool,
            policy=image.policy,
            shard_bytes=image.shard_bytes,
            replica_sets=len(image.sets),
            failure_domain=FailureDomain.HOST,
            arbiter=arbiter,
        )

    def latest_placements(self) -> list[PlacementRecord]:
        """Return the placement of each pool."""
        found: dict[str, PlacementRecord] = {}
        for item in self.all_of(keys.PLACEMENTS):
            record = record_of(PlacementRecord, item)
            if record is not None:
                former = found.get(record.pool)
                if former is None or record.version > former.version:
                    found[record.pool] = record
        for image in sorted(self.image_ids()):
            if self.is_deleted(image):
                continue
            for candidate, _ in self.candidates(image):
                former = found.get(candidate.pool)
                if former is None or candidate.placement_version > former.version:
                    found[candidate.pool] = PlacementRecord(
                        pool=candidate.pool,
                        version=candidate.placement_version,
                        sets=candidate.sets,
                    )
        return list(found.values())

    def _latest_names(self) -> dict[str, tuple[int, ImageId]]:
        """Return {key: (revision, image)} of names of images that are not deleted."""
        found: dict[str, tuple[int, ImageId]] = {}
        for item in self.all_of(keys.NAMES):
            record = record_of(NameRecord, item)
            if record is None or self.is_deleted(record.image):
                continue
            former = found.get(item.key)
            if former is None or item.mod_revision > former[0]:
                found[item.key] = (item.mod_revision, record.image)
        return found

    # Images

    def image_ids(self) -> set[ImageId]:
        """Every image that etcd, a copy or a store has a record of, deleted ones too."""
        ids = {ImageId(item.key.removeprefix(keys.IMAGES)) for item in self.all_of(keys.IMAGES)}
        ids |= {ImageId(item.key.removeprefix(keys.TOMBSTONES)) for item in self.tombstones()}
        for member in self._sources.members.values():
            ids |= member.known.held.keys()
        # An arbiter that still has votes of a deleted image would say again that it is missing.
        voted = (witness.images for witness in self._sources.witnesses.values())
        ids |= {image for images in voted for image in images if self.is_deleted(image)}
        return ids

    def tombstones(self) -> Iterator[KeyValue]:
        """Yield the tombstones, in every copy."""
        return self.all_of(keys.TOMBSTONES)

    def is_deleted(self, image: ImageId) -> bool:
        """Whether anybody knows that an image was deleted."""
        key = keys.tombstone(image)
        return any(key in copy for _, copy in self._copies()) or any(
            image in member.known.deleted for member in self._sources.members.values()
        )

    def candidates(self, image: ImageId) -> list[tuple[ImageRecord, int]]:
        """Return all records of an image, with their revisions in etcd (0: as a store holds it)."""
        key = keys.image(image)
        found = []
        for _, copy in self._copies():
            item = copy.get(key)
            record = record_of(ImageRecord, item) if item is not None else None
            if item is not None and record is not None:
                found.append((record, item.mod_revision))
        for member in self._sources.members.values():
            held = member.known.held.get(image)
            if held is not None and held.record is not None:
                found.append((held.record, 0))
        return found

    def voted(self, image: ImageId, base: ImageRecord) -> tuple[Stale, int, int]:
        """Return who is stale by what the arbiter has confirmed, and up to what it has voted."""
        witness = self._witness_of(base)
        voted = witness.images.get(image) if witness is not None else None
        if voted is None or len(voted.sets) != len(base.sets):
            return base.stale, 0, 0
        generation = max(confirmed for confirmed, _ in voted.sets)
        if generation <= base.generation:
            return base.stale, generation, voted.epoch
        stale: dict[int, dict[str, int]] = {}
        for index, (_, in_sync) in enumerate(voted.sets):
            left = [node for node in base.sets[index] if node not in in_sync]
            if left and in_sync & set(base.sets[index]):
                known = base.stale.get(index, {})
                stale[index] = {node: known.get(node, 0) for node in left}
        return stale, generation, voted.epoch

    def shown(self, image: ImageId, pool: str = "") -> str:
        """Return what people call an image."""
        for key, (_, named) in self.names.items():
            if named == image:
                return "/".join(keys.split_name(key))
        for item in self.all_of(keys.NAMES):
            record = record_of(NameRecord, item)
            if record is not None and record.image == image:
                return "/".join(keys.split_name(item.key))
        return f"{pool}/{image}" if pool else image

    def other_name(self, record: ImageRecord) -> str:
        """Return a name for an image whose own is unknown, or another's by now."""
        lost = next(
            (
                keys.split_name(item.key)[1]
                for item in self.all_of(keys.NAMES)
                if (name := record_of(NameRecord, item)) is not None and name.image == record.id
            ),
            "",
        )
        suffix = f"recovered-{record.id[:SUFFIX_DIGITS]}"
        return f"{lost}.{suffix}" if lost else suffix


def record_of(record_type: type[R], item: KeyValue) -> R | None:
    """Return the record that stands somewhere, or None where it cannot be read."""
    try:
        return record_type.decode(item.key, item.value)
    except RecordError:
        return None
