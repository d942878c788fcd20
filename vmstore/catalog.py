"""The catalog: nodes, pools and images of the cluster, as records in etcd.

Every change is one transaction that compares what it read. Names are made and go with their
images; an id is drawn at random and never reused. A deleted image leaves a tombstone here until all
that keep something of it have confirmed that it is gone; each node keeps one of its own for ever.
"""

import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from etcd import keys
from etcd.gateways import GatewayRecord
from etcd.images import ImageRecord, Layer, Snapshot, awaited_members
from etcd.interface import Compare, Delete, Etcd, KeyAbsent, Operation, Put
from etcd.records import (
    AliveRecord,
    ArbiterRecord,
    ClusterRecord,
    ImportRecord,
    LeaseRecord,
    NameRecord,
    NodeRecord,
    PlacementRecord,
    PoolRecord,
    TombstoneRecord,
)
from shard.errors import BadValue, TooFewDomains
from shard.geometry import IMAGE_BYTES_MAX, SHARD_BYTES_DEFAULT, check_image_size, check_shard_size
from shard.ids import ImageId, image_id_from_bytes, pool_name
from shard.membership import FIRST_GENERATION, Policy, WhenFull
from shard.placement import (
    Candidate,
    FailureDomain,
    choose_replica_sets,
    spread_candidates,
    suggested_replica_sets,
)
from vmstore.arbiters import ArbiterRecords
from vmstore.errors import (
    ArbiterBesideData,
    ArbiterNotNeeded,
    ForeignStore,
    ImageExists,
    InUse,
    NoArbiter,
    NoCluster,
    OtherCluster,
    PoolExists,
    RecordChanged,
    ShrinkRefused,
    StoreBehind,
    StoreCopied,
    TooFewNodes,
    UnknownImage,
    UnknownPool,
    UnknownSnapshot,
)
from vmstore.holding import INTACT
from vmstore.names import ImageName, SnapshotName
from vmstore.record_size import RECORD_BYTES_MAX, longest_bytes
from vmstore.scrubs import ScrubRecords
from vmstore.set_back import seen_later
from vmstore.snapshot_errors import HasSnapshots
from vmstore.stored import R, Stored, commit, decided_anew, put_found, read, stored

REPLICA_SETS_MAX = 1024
"""Bounds the records: each image repeats the replica sets of its pool."""

FIRST_LAYER = 1


@dataclass(frozen=True, slots=True)
class ImageEntry:
    """A line of a listing."""

    name: ImageName
    image: Stored[ImageRecord]


def _random_image_id() -> ImageId:
    return image_id_from_bytes(secrets.token_bytes(16))


class Catalog(ArbiterRecords, ScrubRecords):
    """Reads and changes the records of one cluster.

    All methods raise EtcdUnavailable (nothing changed: try again), changing ones also
    OutcomeUnknown (look whether it was made), RecordChanged (try again) and RecordsLost (etcd lost
    history: tell a person).
    """

    def __init__(self, etcd: Etcd, new_image_id: Callable[[], ImageId] = _random_image_id) -> None:
        super().__init__(etcd)
        self._new_image_id = new_image_id

    def init_cluster(self, cluster_id: str) -> ClusterRecord:
        """Make the cluster, or find it made. Raises OtherCluster where etcd holds another."""
        record = ClusterRecord(id=cluster_id)
        put = Put(keys.CLUSTER, record.encode())
        absent = [KeyAbsent(keys.CLUSTER)]
        if commit(self._etcd, absent, [put], put_found(self._etcd, put)) is not None:
            return record
        return self.cluster(cluster_id)

    def cluster(self, expected_id: str | None = None) -> ClusterRecord:
        """Return the cluster's record. Raises NoCluster, or OtherCluster than `expected_id`."""
        found = self.stored_cluster()
        if found is None:
            raise NoCluster
        if expected_id is not None and found.record.id != expected_id:
            raise OtherCluster(expected_id, found.record.id)
        return found.record

    def check_cluster(self, expected_id: str) -> None:
        """Raise OtherCluster where etcd holds another cluster than `expected_id`."""
        found = self.stored_cluster()
        if found is not None and found.record.id != expected_id:
            raise OtherCluster(expected_id, found.record.id)

    def stored_cluster(self) -> Stored[ClusterRecord] | None:
        """Return the cluster's record as it stands in etcd, or None."""
        return read(self._etcd, ClusterRecord, keys.CLUSTER)

    def nodes(self) -> dict[str, NodeRecord]:
        """Return all registered nodes by name."""
        return {name: item.record for name, item in self._all(NodeRecord, keys.NODES).items()}

    def alive(self) -> dict[str, AliveRecord]:
        """Return the nodes that run, by name."""
        return {name: item.record for name, item in self._all(AliveRecord, keys.ALIVE).items()}

    def announce_node(self, record: NodeRecord, etcd_lease: int, run: str | None = None) -> None:
        """Register a node that started, and say that it is alive as long as the lease lives.

        `run` tells its process from all others. Raises ForeignStore where its name stands for
        another store, StoreBehind where a later start of its store was registered, and StoreCopied
        where a process with a copy of its store runs; it must not serve then.
        """
        former = read(self._etcd, NodeRecord, record.key)
        if former is not None and former.record.store_id != record.store_id:
            raise ForeignStore(record.name, former.record.store_id, record.store_id)
        running = read(self._etcd, AliveRecord, keys.alive(record.name))
        # Each start of a store has a number of its own.
        same = running is not None and running.record.start_counter == record.start_counter
        if running is not None and same and running.record.run not in (None, run):
            raise StoreCopied(record.name, record.start_counter)
        compares: tuple[Compare, ...] = (KeyAbsent(record.key),)
        if former is not None:
            compares, known = former.unchanged, former.record
            if seen_later(known, record):
                raise StoreBehind(record.name, known.start_counter, record.start_counter)
            record = replace(record, extra={**known.extra, **record.extra})
        alive = AliveRecord(start_counter=record.start_counter, run=run)
        put = Put(record.key, record.encode())
        operations = [put, Put(keys.alive(record.name), alive.encode(), etcd_lease)]
        if commit(self._etcd, compares, operations, put_found(self._etcd, put)) is None:
            raise RecordChanged(f"node {record.name}")

    def announce_gateway(self, record: GatewayRecord, etcd_lease: int) -> None:
        """Say that a gateway runs as long as the lease lives. Raises LeaseNotFound."""
        put = Put(record.key, record.encode(), etcd_lease)
        commit(self._etcd, [], [put], put_found(self._etcd, put))

    def gateways(self) -> dict[str, GatewayRecord]:
        """Return the gateways that run, on all hosts, by name."""
        found = self._all(GatewayRecord, keys.GATEWAYS)
        return {name: item.record for name, item in found.items()}

    @decided_anew
    def create_pool(
        self,
        name: str,
        *,
        policy: Policy = Policy.REPLICA_3,
        shard_bytes: int = SHARD_BYTES_DEFAULT,
        replica_sets: int | None = None,
        failure_domain: FailureDomain = FailureDomain.HOST,
        arbiter: str | None = None,
        when_full: WhenFull = WhenFull.STALL,
    ) -> PoolRecord:
        """Make a pool and place it on the nodes that are up.

        Without `replica_sets`, as many as give each node a share. `arbiter` names the thin arbiter
        of a policy that has one. Raises BadValue for what breaks a limit, PoolExists, TooFewNodes,
        NoArbiter, ArbiterNotNeeded, UnknownArbiter, ArbiterRetired, ArbiterBesideData.
        """
        pool_name(name)
        check_shard_size(shard_bytes)
        self.check_history()
        if replica_sets is not None and not 1 <= replica_sets <= REPLICA_SETS_MAX:
            raise BadValue(f"a pool has 1 to {REPLICA_SETS_MAX} replica sets, not {replica_sets}")
        if policy.has_arbiter and arbiter is None:
            raise NoArbiter(policy.value)
        if arbiter is not None and not policy.has_arbiter:
            raise ArbiterNotNeeded(policy.value, arbiter)
        voter = self.arbiter(arbiter) if arbiter is not None else None
        candidates = spread_candidates(self._candidates(), failure_domain)
        count = replica_sets or suggested_replica_sets(len(candidates), policy.members)
        record = PoolRecord(
            name=name,
            policy=policy,
            shard_bytes=shard_bytes,
            replica_sets=min(count, REPLICA_SETS_MAX),
            failure_domain=failure_domain,
            arbiter=arbiter,
            when_full=when_full,
        )
        self._check_absent(record)
        placement = self._place(record, candidates)
        _check_fits(record, placement)
        if voter is not None:
            _check_apart(voter.record, record, placement, candidates)
        self._create_pool(record, placement, voter.unchanged if voter is not None else ())
        return record

    @decided_anew
    def set_when_full(self, name: str, when_full: WhenFull) -> PoolRecord:
        """Change what clients of a pool see while disks are full; holders hear it within seconds.

        Raises UnknownPool.
        """
        former = self.pool(name)
        record = replace(former.record, when_full=when_full)
        put = Put(record.key, record.encode())
        compares = [*former.unchanged, INTACT]
        if commit(self._etcd, compares, [put], put_found(self._etcd, put)) is None:
            self.check_history()
            raise RecordChanged(f"pool {name}")
        return record

    def pools(self) -> dict[str, PoolRecord]:
        """Return all pools by name."""
        return {name: item.record for name, item in self._all(PoolRecord, keys.POOLS).items()}

    def placement(self, pool: str) -> Stored[PlacementRecord]:
        """Return the current placement of a pool. Raises UnknownPool."""
        found = read(self._etcd, PlacementRecord, keys.placement(pool))
        if found is None:
            raise UnknownPool(pool)
        return found

    def check_apart(self, pool: PoolRecord, arbiter: ArbiterRecord) -> None:
        """Raise ArbiterBesideData where losing one host would lose two of a pool's three votes."""
        placement = self.placement(pool.name).record
        _check_apart(arbiter, pool, placement, self.nodes().values())

    @decided_anew
    def create_image(
        self, name: ImageName, size_bytes: int, *, imported_by: str | None = None
    ) -> Stored[ImageRecord]:
        """Make an empty image. Raises BadSize, UnknownPool, ImageExists.

        With `imported_by` it counts as unfinished until `finish_import`.
        """
        check_image_size(size_bytes)
        pool, placement = self.pool(name.pool), self.placement(name.pool)
        image_id = self._new_image_id()
        record = ImageRecord(
            id=image_id,
            pool=name.pool,
            policy=pool.record.policy,
            size_bytes=size_bytes,
            shard_bytes=pool.record.shard_bytes,
            placement_key=image_id,
            placement_version=placement.record.version,
            sets=placement.record.sets,
            layers=(Layer(id=FIRST_LAYER),),
        )
        name_key = keys.name(name.pool, name.name)
        compares = [
            KeyAbsent(name_key),
            KeyAbsent(record.key),
            KeyAbsent(keys.tombstone(image_id)),
            *pool.unchanged,
            *placement.unchanged,
            INTACT,
        ]
        put = Put(record.key, record.encode())
        operations = [put, Put(name_key, NameRecord(image=image_id).encode())]
        if imported_by is not None:
            unfinished = ImportRecord(by=imported_by)
            operations.append(Put(keys.unfinished_import(image_id), unfinished.encode()))
        revision = commit(self._etcd, compares, operations, put_found(self._etcd, put))
        if revision is None:
            self.check_history()
            if self._etcd.get(name_key) is not None:
                raise ImageExists(str(name))
            raise RecordChanged(f"pool {name.pool}")
        return Stored(record.key, record, put.value, revision)

    def images(self, pool: str | None = None) -> list[ImageEntry]:
        """Return all images, or those of one pool, by name. Raises UnknownPool."""
        if pool is not None:
            self.pool(pool)
        prefix = keys.NAMES if pool is None else keys.names(pool)
        by_id = self._all(ImageRecord, keys.IMAGES)
        entries = []
        for item in self._etcd.get_prefix(prefix).items:
            # An image made or deleted between the two readings has no entry.
            image = by_id.get(NameRecord.decode(item.key, item.value).image)
            if image is not None:
                entries.append(ImageEntry(ImageName(*keys.split_name(item.key)), image))
        return sorted(entries, key=lambda entry: entry.name)

    def leases(self) -> dict[ImageId, LeaseRecord]:
        """Return who holds which image."""
        return {
            ImageId(image): item.record
            for image, item in self._all(LeaseRecord, keys.LEASES).items()
        }

    def find(self, name: ImageName) -> Stored[ImageRecord]:
        """Return an image by its name. Raises UnknownPool, UnknownImage."""
        return self._find(name)[1]

    def find_snapshot(self, name: SnapshotName) -> tuple[ImageRecord, Snapshot]:
        """Return a snapshot and the record of its image.

        Raises UnknownPool, UnknownImage, UnknownSnapshot.
        """
        self.check_history()
        record = self.find(name.image).record
        snapshot = record.snapshot(name.name)
        if snapshot is None:
            raise UnknownSnapshot(str(name.image), name.name)
        return record, snapshot

    def comparable(self, name: ImageName | SnapshotName) -> list[Snapshot]:
        """Return the snapshots that came before what a name means, the oldest first.

        Raises UnknownPool, UnknownImage, UnknownSnapshot.
        """
        if isinstance(name, ImageName):
            return list(self.find(name).record.snapshots)
        record, upto = self.find_snapshot(name)
        return [each for each in record.snapshots if each.generation < upto.generation]

    @decided_anew
    def grow_image(self, name: ImageName, size_bytes: int) -> Stored[ImageRecord]:
        """Make an image larger that nobody has open.

        Raises BadSize, InUse (let its holder `resize`), and ShrinkRefused: a shrink is made by a
        holder, which first discards what is cut off.
        """
        check_image_size(size_bytes)
        image = self.find(name)
        if size_bytes < image.record.size_bytes:
            raise ShrinkRefused(str(name), image.record.size_bytes, size_bytes)
        if size_bytes == image.record.size_bytes:
            return image
        record = replace(image.record, size_bytes=size_bytes)
        put = Put(image.key, record.encode())
        compares = [*image.unchanged, KeyAbsent(keys.lease(image.record.id)), INTACT]
        revision = commit(self._etcd, compares, [put], put_found(self._etcd, put))
        if revision is None:
            self.check_history()
            self._check_not_in_use(name, image.record.id)
            raise RecordChanged(f"image {name}")
        return Stored(image.key, record, put.value, revision)

    @decided_anew
    def delete_image(
        self, name: ImageName, only: ImageId | None = None, *, with_snapshots: bool = False
    ) -> TombstoneRecord:
        """Delete an image that nobody has open, `with_snapshots` or only where it has none.

        Raises UnknownPool, UnknownImage, HasSnapshots, InUse.
        With `only` that image alone: one that was made since under its name is not it.
        """
        name_item, image = self._find(name)
        if only is not None and image.record.id != only:
            raise UnknownImage(str(name))
        if image.record.snapshots and not with_snapshots:
            raise HasSnapshots(str(name), [each.name for each in image.record.snapshots])
        lease = self.lease_of(image.record.id)
        if lease is not None and not lease.record.maintenance:
            raise InUse(str(name), lease.record.gateway)
        tombstone = self._tombstone(image.record)
        put = Put(tombstone.key, tombstone.encode())
        compares = [
            *name_item.unchanged,
            *image.unchanged,
            *((KeyAbsent(keys.lease(image.record.id)),) if lease is None else lease.unchanged),
            INTACT,
        ]
        operations: list[Operation] = [
            Delete(name_item.key),
            Delete(image.key),
            Delete(keys.unfinished_import(image.record.id)),
            put,
        ]
        if lease is not None:
            operations.append(Delete(lease.key))
        if commit(self._etcd, compares, operations, put_found(self._etcd, put)) is None:
            self.check_history()
            raise RecordChanged(f"image {name}")
        return tombstone

    def finish_import(self, image: ImageId) -> None:
        """Note that an image is filled."""
        self._etcd.transaction([], [Delete(keys.unfinished_import(image))])

    def unfinished_imports(self) -> dict[ImageId, ImportRecord]:
        """Return the images that are being filled, or whose import was interrupted."""
        return {
            ImageId(image): item.record
            for image, item in self._all(ImportRecord, keys.IMPORTS).items()
        }

    def bury_unknown(self, image: ImageId, members: Sequence[str]) -> None:
        """Write a tombstone for an image that etcd does not know, which these nodes keep data of.

        Raises RecordChanged where it knows the image, or its tombstone.
        """
        record = TombstoneRecord(id=image, generation=FIRST_GENERATION, awaits=tuple(members))
        put = Put(record.key, record.encode())
        compares = [KeyAbsent(keys.image(image)), KeyAbsent(record.key), INTACT]
        if commit(self._etcd, compares, [put], put_found(self._etcd, put)) is None:
            self.check_history()
            raise RecordChanged(f"image {image}")

    def confirm_deleted(self, image: ImageId, member: str) -> None:
        """Note that a node or arbiter has durably deleted an image.

        With the last one that is awaited the tombstone goes. Raises RecordChanged.
        """
        found = read(self._etcd, TombstoneRecord, keys.tombstone(image))
        if found is None or found.record.awaits is None or member not in found.record.awaits:
            return
        left = tuple(each for each in found.record.awaits if each != member)
        put = Put(found.key, replace(found.record, awaits=left).encode())
        operation = put if left else Delete(found.key)
        if not self._etcd.transaction([*found.unchanged, INTACT], [operation]).committed:
            raise RecordChanged(f"the tombstone of image {image}")

    def _tombstone(self, image: ImageRecord) -> TombstoneRecord:
        """Return the tombstone of an image: all that may hold something of it are awaited."""
        found = read(self._etcd, PoolRecord, keys.pool(image.pool))
        arbiter = found.record.arbiter if found is not None else None
        awaits = awaited_members(image, arbiter)
        return TombstoneRecord(id=image.id, generation=image.generation, awaits=awaits)

    def tombstones(self) -> dict[ImageId, TombstoneRecord]:
        """Return all images that were deleted."""
        return {
            ImageId(image): item.record
            for image, item in self._all(TombstoneRecord, keys.TOMBSTONES).items()
        }

    def _all(self, record_type: type[R], prefix: str) -> dict[str, Stored[R]]:
        return {
            item.key.removeprefix(prefix): stored(record_type, item)
            for item in self._etcd.get_prefix(prefix).items
        }

    def _find(self, name: ImageName) -> tuple[Stored[NameRecord], Stored[ImageRecord]]:
        name_item = read(self._etcd, NameRecord, keys.name(name.pool, name.name))
        if name_item is not None:
            image = read(self._etcd, ImageRecord, keys.image(name_item.record.image))
            if image is not None:
                return name_item, image
        self.pool(name.pool)
        self.check_history()
        raise UnknownImage(str(name))

    def _check_not_in_use(self, name: ImageName, image: ImageId) -> None:
        lease = self.lease_of(image)
        if lease is not None:
            raise InUse(str(name), lease.record.gateway)

    def _candidates(self) -> list[Candidate]:
        alive = self.alive()
        return [
            Candidate(
                name=node.name,
                host=node.host,
                zone=node.zone,
                labels=node.labels,
                weight=max(1, node.capacity_bytes),
            )
            for node in self.nodes().values()
            if node.name in alive
        ]

    def _place(self, pool: PoolRecord, candidates: list[Candidate]) -> PlacementRecord:
        try:
            sets = choose_replica_sets(
                candidates,
                replica_sets=pool.replica_sets,
                members=pool.policy.members,
                failure_domain=pool.failure_domain,
            )
        except TooFewDomains as error:
            raise TooFewNodes(pool.policy.value, error.needed, error.found, error.domain) from None
        return PlacementRecord(pool=pool.name, version=1, sets=sets)

    def _check_absent(self, pool: PoolRecord) -> None:
        if self._etcd.get(pool.key) is not None:
            raise PoolExists(pool.name)

    def _create_pool(
        self, pool: PoolRecord, placement: PlacementRecord, as_long_as: Sequence[Compare]
    ) -> None:
        put = Put(pool.key, pool.encode())
        compares = [KeyAbsent(pool.key), KeyAbsent(placement.key), *as_long_as, INTACT]
        operations = [put, Put(placement.key, placement.encode())]
        if commit(self._etcd, compares, operations, put_found(self._etcd, put)) is None:
            self.check_history()
            self._check_absent(pool)
            raise RecordChanged(f"arbiter {pool.arbiter}")


def _check_fits(pool: PoolRecord, placement: PlacementRecord) -> None:
    """Raise BadValue where nodes would refuse a record of the pool's images for its length.

    An eighth is left for snapshots.
    """
    record = ImageRecord(
        id=ImageId("0" * 32),
        pool=pool.name,
        policy=pool.policy,
        size_bytes=IMAGE_BYTES_MAX,
        shard_bytes=pool.shard_bytes,
        placement_key=ImageId("0" * 32),
        placement_version=10**9,
        sets=placement.sets,
        layers=(Layer(id=FIRST_LAYER),),
    )
    length = longest_bytes(record)
    if length > RECORD_BYTES_MAX * 7 // 8:
        fewer = max(1, len(placement.sets) * RECORD_BYTES_MAX * 3 // (4 * length))
        raise BadValue(
            f"{len(placement.sets)} replica sets of nodes with names such as "
            f"{placement.sets[0][0]} are more than an image's record has room for; {fewer} would do"
        )


def _check_apart(
    arbiter: ArbiterRecord,
    pool: PoolRecord,
    placement: PlacementRecord,
    nodes: Iterable[Candidate | NodeRecord],
) -> None:
    """Raise ArbiterBesideData where an arbiter shares its host with a node that it decides on."""
    if pool.failure_domain is FailureDomain.NODE:
        return
    placed = {node for members in placement.sets for node in members}
    for node in nodes:
        if node.name in placed and node.host == arbiter.host:
            raise ArbiterBesideData(arbiter.name, arbiter.host, node.name)
