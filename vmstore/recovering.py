"""What to write into an etcd that lost history, from what nodes and arbiters know. Pure.

Of each record the latest that anyone knows counts. For an image that is the one with the highest
generation, then epoch, where a quorum of each of its replica sets was heard: any two of three
nodes, or two of both nodes and the arbiter. A write was answered only when all nodes in sync had
stored the record by which it was, so one of those heard has it. Epoch and generation go up by
`RECOVERY_STEP`, above all that may be under way still.

What was deleted stays deleted: a tombstone anywhere is enough. Without a quorum an image is only
recovered where that is forced; it then goes up by `FORCED_STEP`, so that a node which was not heard
and knows a later record is told by it when it comes back.

A second run finds nothing to do: what it reads agrees. One that follows an interrupted run keeps
what that wrote. After a recovery it brings in nodes that were not heard before: an image that
nobody has used since follows them; of another one it is said what would be lost.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from etcd import keys
from etcd.errors import RecordError
from etcd.interface import KeyValue
from etcd.records import (
    ArbiterRecord,
    ClusterRecord,
    ImageRecord,
    LostRecord,
    NameRecord,
    NodeRecord,
    PlacementRecord,
    PoolRecord,
    Recovered,
    TombstoneRecord,
    awaited_arbiter,
    awaited_members,
)
from shard.digest import membership_digest
from shard.ids import ImageId
from shard.membership import FIRST_GENERATION, Stale, problem_of
from shard.placement import FailureDomain
from vmstore.history import (
    FORCED_STEP,
    RECOVERY_STEP,
    HeldRecord,
    Known,
    R,
    decoded,
    is_missed,
    judge,
    problem_of_held,
)

SUFFIX_DIGITS = 8
"""Of an image's id, in the name that it gets where its own is not known or is another's."""


@dataclass(frozen=True, slots=True)
class Member:
    """A node that was heard."""

    name: str
    store_id: str
    start_counter: int
    known: Known


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


@dataclass(frozen=True, slots=True)
class Write:
    """Keys that change together, each with what stands there now (None: nothing).

    `values` of None go; `compared` says which keys must be as they were read.
    """

    values: Mapping[str, bytes | None]
    compared: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """What becomes of one image: `action` is keep, recover, raise or delete."""

    image: ImageId
    name: str
    action: str
    heard: tuple[str, ...] = ()
    found: tuple[int, int] | None = None
    """The highest epoch and generation that anyone knows."""
    written: tuple[int, int] | None = None
    in_sync: tuple[tuple[str, ...], ...] = ()
    missing: tuple[str, ...] = ()
    """Why it cannot be recovered for sure; each sentence names nodes."""
    losses: tuple[str, ...] = ()
    """What is lost where it is recovered all the same."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a recovery will do. Where `needed` is false there is nothing to do."""

    needed: bool
    why: tuple[str, ...] = ()
    recovery: int = 0
    images: tuple[ImagePlan, ...] = ()
    writes: tuple[Write, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    """Records of each other kind that are written."""
    away: Mapping[str, str] = field(default_factory=dict)
    refusals: tuple[str, ...] = ()
    """What cannot be done, forced or not."""

    @property
    def missing(self) -> tuple[ImagePlan, ...]:
        """The images that only force recovers."""
        return tuple(image for image in self.images if image.missing)


def plan(sources: Sources, holder: str) -> Plan:
    """Return what a recovery by `holder`, a fresh id, writes; `Plan.missing` needs to be forced."""
    return _Planning(sources, holder).plan()


class _Planning:
    """One plan in the making."""

    def __init__(self, sources: Sources, holder: str) -> None:
        self._sources = sources
        self._holder = holder
        self._now = {key: item.value for key, item in sources.now.items()}
        self._marked = decoded(LostRecord, keys.LOST, self._now)
        verdicts = {name: judge(m.known, self._now) for name, m in sources.members.items()}
        self._lost = tuple(
            f"{name}: {why}" for name, verdict in verdicts.items() for why in verdict.lost
        )
        self._contested = {
            image: f"{name}: {why}"
            for name, verdict in verdicts.items()
            for image, why in verdict.contested.items()
        }
        cluster = decoded(ClusterRecord, keys.CLUSTER, self._now)
        former = [member.known.recoveries for member in sources.members.values()]
        highest = max([cluster.recoveries if cluster is not None else 0, *former])
        begun = self._marked.recovery if self._marked is not None else 0
        self._recovery = begun or highest + 1
        self._full = self._marked is not None or bool(self._lost)
        self._nodes = self._latest_nodes()
        self._arbiters = self._latest_arbiters()
        self._trusted = {name for name, m in sources.members.items() if self._is_trusted(m)}
        self._names = self._latest_names()
        self._refusals: list[str] = []

    def plan(self) -> Plan:
        if not self._full and not self._contested:
            return Plan(needed=False, away=self._sources.away)
        ids = self._image_ids() if self._full else set(self._contested)
        self._pools = self._latest_pools(ids)
        planned = [self._image(image) for image in sorted(ids)]
        records, counts = self._other_records() if self._full else ((), {})
        why = [f"{self._marked.by}: {self._marked.why}"] if self._marked is not None else []
        why += [*self._lost, *self._contested.values()]
        return Plan(
            needed=True,
            why=tuple(dict.fromkeys(why)),
            recovery=self._recovery,
            images=tuple(sorted((image for image, _ in planned), key=lambda each: each.name)),
            writes=(*records, *(write for _, write in planned if write is not None)),
            counts=counts,
            away=self._sources.away,
            refusals=tuple(self._refusals),
        )

    # Who was heard

    def _is_trusted(self, member: Member) -> bool:
        """Whether a node counts: it is the one that was registered, and not an older copy of it."""
        record = self._nodes.get(member.name)
        if record is None:
            return True
        return member.store_id == record.store_id and member.start_counter >= record.start_counter

    def _counts(self, node: str, image: ImageId) -> bool:
        """Whether a node was heard that knows whether it has stored a later record of an image."""
        if node not in self._trusted:
            return False
        return image not in self._sources.members[node].known.distrusted

    def _copies(self) -> Iterator[tuple[str, Mapping[str, KeyValue]]]:
        """Every copy of the records there is: etcd's, those of the nodes."""
        yield "etcd", self._sources.now
        for name, member in self._sources.members.items():
            yield name, member.known.records
            yield name, member.known.former

    def _all(self, prefix: str) -> Iterator[KeyValue]:
        for _, copy in self._copies():
            yield from (item for key, item in copy.items() if key.startswith(prefix))

    def _latest_nodes(self) -> dict[str, NodeRecord]:
        found: dict[str, NodeRecord] = {}
        for item in self._all(keys.NODES):
            record = _decode(NodeRecord, item)
            if record is None:
                continue
            former = found.get(record.name)
            if former is None or record.start_counter > former.start_counter:
                found[record.name] = record
        return found

    def _latest_arbiters(self) -> dict[str, ArbiterRecord]:
        found: dict[str, ArbiterRecord] = {}
        for item in self._all(keys.ARBITERS):
            record = _decode(ArbiterRecord, item)
            if record is None:
                continue
            former = found.get(record.name)
            if former is None or (record.retired, record.start_counter) > (
                former.retired,
                former.start_counter,
            ):
                found[record.name] = record
        return found

    def _latest_pools(self, ids: Iterable[ImageId]) -> dict[str, PoolRecord]:
        found: dict[str, tuple[int, PoolRecord]] = {}
        for item in self._all(keys.POOLS):
            record = _decode(PoolRecord, item)
            if record is None:
                continue
            former = found.get(record.name)
            if former is None or item.mod_revision > former[0]:
                found[record.name] = (item.mod_revision, record)
        pools = {name: record for name, (_, record) in found.items()}
        for image in ids:
            for candidate, _ in self._candidates(image):
                if candidate.pool not in pools and not self._is_deleted(image):
                    pools[candidate.pool] = self._rebuilt_pool(candidate)
        return pools

    def _rebuilt_pool(self, image: ImageRecord) -> PoolRecord:
        """Return a pool of which nobody has a record, by one of its images."""
        voting = [a.name for a in self._arbiters.values() if not a.retired]
        arbiter = voting[0] if image.policy.has_arbiter and len(voting) == 1 else None
        return PoolRecord(
            name=image.pool,
            policy=image.policy,
            shard_bytes=image.shard_bytes,
            replica_sets=len(image.sets),
            failure_domain=FailureDomain.HOST,
            arbiter=arbiter,
        )

    def _latest_names(self) -> dict[str, tuple[int, ImageId]]:
        """Return {key: (revision, image)} of names of images that are not deleted."""
        found: dict[str, tuple[int, ImageId]] = {}
        for item in self._all(keys.NAMES):
            record = _decode(NameRecord, item)
            if record is None or self._is_deleted(record.image):
                continue
            former = found.get(item.key)
            if former is None or item.mod_revision > former[0]:
                found[item.key] = (item.mod_revision, record.image)
        return found

    # Images

    def _image_ids(self) -> set[ImageId]:
        """Every image that etcd, a copy or a store has a record of, deleted ones too."""
        ids = {ImageId(item.key.removeprefix(keys.IMAGES)) for item in self._all(keys.IMAGES)}
        ids |= {ImageId(item.key.removeprefix(keys.TOMBSTONES)) for item in self._tombstones()}
        for member in self._sources.members.values():
            ids |= member.known.held.keys()
        # An arbiter that still has votes of a deleted image would say again that it is missing.
        voted = (witness.images for witness in self._sources.witnesses.values())
        ids |= {image for images in voted for image in images if self._is_deleted(image)}
        return ids

    def _tombstones(self) -> Iterator[KeyValue]:
        return self._all(keys.TOMBSTONES)

    def _is_deleted(self, image: ImageId) -> bool:
        key = keys.tombstone(image)
        return any(key in copy for _, copy in self._copies()) or any(
            image in member.known.deleted for member in self._sources.members.values()
        )

    def _candidates(self, image: ImageId) -> list[tuple[ImageRecord, int]]:
        """Return all records of an image, with their revisions in etcd (0: as a store holds it)."""
        key = keys.image(image)
        found = []
        for _, copy in self._copies():
            item = copy.get(key)
            record = _decode(ImageRecord, item) if item is not None else None
            if item is not None and record is not None:
                found.append((record, item.mod_revision))
        for member in self._sources.members.values():
            held = member.known.held.get(image)
            if held is not None and held.record is not None:
                found.append((held.record, 0))
        return found

    def _image(self, image: ImageId) -> tuple[ImagePlan, Write | None]:
        if self._is_deleted(image):
            return self._deleted(image)
        now = decoded(ImageRecord, keys.image(image), self._now)
        candidates = self._candidates(image)
        if not candidates:
            missing = ("no record of it can be read on any node that answers",)
            losses = ("the image: etcd will not know it; its data stays, as a leftover",)
            shown = self._shown(image)
            return ImagePlan(image, shown, "leave out", missing=missing, losses=losses), None
        if now is None or now.recovered is None:
            return self._recovered(image, candidates, floor=now)
        helds = [m.known.held[image] for m in self._sources.members.values()
                 if image in m.known.held]  # fmt: skip
        contradicting = [held for held in helds if problem_of_held(held, now) is not None]
        if not contradicting and now.recovered.recovery == self._recovery:
            return self._kept(image, now), None
        if contradicting and all(_is_from_before(held, now.recovered) for held in contradicting):
            used = any(held.record is not None and held.record.recovered == now.recovered
                       for held in helds)  # fmt: skip
            if used or self._missing(now)[0]:
                return self._raised(image, now)
            # Nobody has used what was rebuilt: what is known better now takes its place.
            others = [c for c in candidates if c[0].recovered != now.recovered]
            return self._recovered(image, others or candidates, floor=now)
        return self._recovered(image, candidates, floor=now)

    def _kept(self, image: ImageId, now: ImageRecord) -> ImagePlan:
        numbers = (now.epoch, now.generation)
        return ImagePlan(
            image,
            self._shown(image),
            "keep",
            self._heard(now),
            numbers,
            numbers,
            _in_sync(now),
        )

    def _deleted(self, image: ImageId) -> tuple[ImagePlan, Write | None]:
        key, tombstone = keys.image(image), keys.tombstone(image)
        candidates = [record for record, _ in self._candidates(image)]
        values: dict[str, bytes | None] = {}
        if key in self._now:
            values[key] = None
            values[keys.lease(image)] = None
        for name, item in self._sources.now.items():
            if name.startswith(keys.NAMES):
                record = _decode(NameRecord, item)
                if record is not None and record.image == image:
                    values[name] = None
        kept = next((item.value for item in self._tombstones() if item.key == tombstone), None)
        voters = {
            awaited_arbiter(witness.name)
            for witness in self._sources.witnesses.values()
            if image in witness.images
        }
        if tombstone not in self._now and (kept is not None or candidates or voters):
            generation = max([FIRST_GENERATION, *(record.generation for record in candidates)])
            pools = {record.pool: self._pools.get(record.pool) for record in candidates}
            awaits = voters | {
                member
                for record in candidates
                for pool in [pools[record.pool]]
                for member in awaited_members(record, pool.arbiter if pool is not None else None)
            }
            made = TombstoneRecord(id=image, generation=generation, awaits=tuple(sorted(awaits)))
            values[tombstone] = kept or made.encode()
        compared = tuple(each for each in values if not each.startswith(keys.LEASES))
        write = Write(values, compared) if values else None
        action = "delete" if key in self._now else "keep deleted"
        return ImagePlan(image, self._shown(image), action), write

    def _recovered(
        self,
        image: ImageId,
        candidates: list[tuple[ImageRecord, int]],
        floor: ImageRecord | None,
    ) -> tuple[ImagePlan, Write]:
        base, _ = max(candidates, key=lambda c: (c[0].generation, c[0].epoch, c[1]))
        latest = max((record for record, _ in candidates), key=lambda record: record.epoch)
        stale, voted_generation, voted_epoch = self._voted(image, base)
        helds = [m.known.held[image] for m in self._sources.members.values()
                 if image in m.known.held]  # fmt: skip
        found_epoch = max([latest.epoch, voted_epoch, *(held.epoch for held in helds)])
        found_generation = max(
            [base.generation, voted_generation, *(held.generation for held in helds)]
        )
        missing, losses = self._missing(base)
        conflict = _conflict(candidates, base)
        if conflict:
            missing.append(conflict)
            losses.append("what was written by the other record")
        step = FORCED_STEP if missing else RECOVERY_STEP
        epoch, generation = found_epoch, found_generation
        if floor is not None:
            epoch, generation = max(epoch, floor.epoch), max(generation, floor.generation)
        opened = epoch > 0
        record = replace(
            base,
            epoch=epoch + step if opened else 0,
            holder=self._holder if opened else None,
            generation=generation + step,
            clean=base.clean and not opened,
            stale=stale,
            used=latest.last_use,
            recovered=Recovered(
                recovery=self._recovery,
                epoch=found_epoch,
                generation=found_generation,
                forced=bool(missing),
            ),
        )
        planned = ImagePlan(
            image,
            self._shown(image, base.pool),
            "recover",
            self._heard(base),
            (found_epoch, found_generation),
            (record.epoch, record.generation),
            _in_sync(record),
            tuple(missing),
            tuple(losses),
        )
        return planned, self._image_write(record)

    def _raised(self, image: ImageId, now: ImageRecord) -> tuple[ImagePlan, Write | None]:
        """Lift an image that was used since it was recovered above what late nodes know.

        Those that know of another membership have content of their own: they are stale since 0.
        """
        helds = {
            name: member.known.held[image]
            for name, member in self._sources.members.items()
            if image in member.known.held
        }
        late = {name: held for name, held in helds.items() if problem_of_held(held, now)}
        digest = membership_digest(now.membership)
        other = {
            name
            for name, held in late.items()
            if held.generation > now.generation
            or (held.generation == now.generation and held.digest != digest)
            or is_missed(now, 0, held.generation)
        }
        stale = {index: dict(nodes) for index, nodes in now.stale.items()}
        for index, members in enumerate(now.sets):
            for name in sorted(other & set(members)):
                stale.setdefault(index, {})[name] = 0
        epoch = max([now.epoch, *(held.epoch for held in late.values())]) + RECOVERY_STEP
        generation = max([now.generation, *(held.generation for held in late.values())])
        generation += RECOVERY_STEP
        shown, numbers = self._shown(image, now.pool), (now.epoch, now.generation)
        if problem_of(now.policy, now.sets, stale, generation, epoch) is not None:
            self._refusals.append(
                f"{shown}: {', '.join(sorted(other))} hold other content than what was written "
                "since the recovery, and it has too few copies without them: export it, remove it, "
                "and import it again"
            )
            return ImagePlan(image, shown, "keep", self._heard(now), numbers), None
        by = replace(now.recovered, recovery=self._recovery) if now.recovered else None
        record = replace(
            now,
            epoch=epoch,
            holder=self._holder,
            generation=generation,
            clean=False,
            stale=stale,
            used=now.last_use,
            recovered=by,
        )
        names = ", ".join(sorted(other))
        missing = (f"{names}: came back with content of before the recovery",) if other else ()
        losses = (f"what only {names} hold, from before the recovery",) if other else ()
        planned = ImagePlan(
            image,
            shown,
            "raise",
            self._heard(now),
            numbers,
            (epoch, generation),
            _in_sync(record),
            missing,
            losses,
        )
        return planned, self._image_write(record)

    def _voted(self, image: ImageId, base: ImageRecord) -> tuple[Stale, int, int]:
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

    def _witness_of(self, image: ImageRecord) -> Witness | None:
        pool = self._pools.get(image.pool)
        if pool is None or pool.arbiter is None or not pool.filled:
            return None
        witness = self._sources.witnesses.get(pool.arbiter)
        record = self._arbiters.get(pool.arbiter)
        if witness is None or (
            record is not None
            and (record.id != witness.id or record.start_counter > witness.start_counter)
        ):
            return None
        return witness

    def _missing(self, base: ImageRecord) -> tuple[list[str], list[str]]:
        """Return what is missing of a quorum of each replica set, and what that may lose."""
        missing, losses = [], []
        has_arbiter = base.policy.has_arbiter
        witness = int(has_arbiter and self._witness_of(base) is not None)
        for index, members in enumerate(base.sets):
            heard = [node for node in members if self._counts(node, base.id)]
            if len(heard) + witness >= 2:
                continue
            silent = [node for node in members if node not in heard]
            if has_arbiter and not witness:
                pool = self._pools.get(base.pool)
                silent.append(f"arbiter {pool.arbiter if pool is not None else ''}".strip())
            among = f"{', '.join(heard) or 'no node'} of replica set {index}"
            missing.append(f"only {among} was heard; {', '.join(silent)} missing, two are needed")
            losses.append(f"what {', '.join(silent)} may know that is later")
        return missing, losses

    def _heard(self, record: ImageRecord) -> tuple[str, ...]:
        placed = dict.fromkeys(node for members in record.sets for node in members)
        return tuple(node for node in placed if self._counts(node, record.id))

    def _image_write(self, record: ImageRecord) -> Write:
        values: dict[str, bytes | None] = {record.key: record.encode()}
        names = [key for key, (_, image) in self._names.items() if image == record.id]
        if not names:
            names = [keys.name(record.pool, self._other_name(record))]
        for name in names:
            if name not in self._now or self._names.get(name) is not None:
                values[name] = NameRecord(image=record.id).encode()
        values = {key: value for key, value in values.items() if self._now.get(key) != value}
        compared = tuple(values)
        return Write({**values, keys.lease(record.id): None}, compared)

    def _other_name(self, record: ImageRecord) -> str:
        """Return a name for an image whose own is unknown, or another's by now."""
        lost = next(
            (
                keys.split_name(item.key)[1]
                for item in self._all(keys.NAMES)
                if (name := _decode(NameRecord, item)) is not None and name.image == record.id
            ),
            "",
        )
        suffix = f"recovered-{record.id[:SUFFIX_DIGITS]}"
        return f"{lost}.{suffix}" if lost else suffix

    def _shown(self, image: ImageId, pool: str = "") -> str:
        for key, (_, named) in self._names.items():
            if named == image:
                return "/".join(keys.split_name(key))
        for item in self._all(keys.NAMES):
            record = _decode(NameRecord, item)
            if record is not None and record.image == image:
                return "/".join(keys.split_name(item.key))
        return f"{pool}/{image}" if pool else image

    # All other records

    def _other_records(self) -> tuple[list[Write], dict[str, int]]:
        """Return the writes of nodes, arbiters, pools and placements that etcd does not have so."""
        wanted: dict[str, bytes] = {node.key: node.encode() for node in self._nodes.values()}
        wanted |= {arbiter.key: arbiter.encode() for arbiter in self._arbiters.values()}
        wanted |= {pool.key: pool.encode() for pool in self._pools.values()}
        wanted |= {each.key: each.encode() for each in self._latest_placements()}
        changed = {key: value for key, value in wanted.items() if self._now.get(key) != value}
        kinds = {"nodes": keys.NODES, "arbiters": keys.ARBITERS, "pools": keys.POOLS,
                 "placements": keys.PLACEMENTS}  # fmt: skip
        counts = {
            kind: sum(key.startswith(prefix) for key in changed) for kind, prefix in kinds.items()
        }
        return [Write({key: value}, (key,)) for key, value in changed.items()], counts

    def _latest_placements(self) -> list[PlacementRecord]:
        found: dict[str, PlacementRecord] = {}
        for item in self._all(keys.PLACEMENTS):
            record = _decode(PlacementRecord, item)
            if record is not None:
                former = found.get(record.pool)
                if former is None or record.version > former.version:
                    found[record.pool] = record
        for image in sorted(self._image_ids()):
            if self._is_deleted(image):
                continue
            for candidate, _ in self._candidates(image):
                former = found.get(candidate.pool)
                if former is None or candidate.placement_version > former.version:
                    found[candidate.pool] = PlacementRecord(
                        pool=candidate.pool,
                        version=candidate.placement_version,
                        sets=candidate.sets,
                    )
        return list(found.values())


def _is_from_before(held: HeldRecord, by: Recovered) -> bool:
    """Whether a node stored this before that recovery, of which it so knows nothing."""
    former = held.record.recovered if held.record is not None else None
    return former is None or former.recovery < by.recovery


def _conflict(candidates: list[tuple[ImageRecord, int]], base: ImageRecord) -> str:
    """Return where two records of the highest generation name other nodes in sync."""
    for record, _ in candidates:
        if record.generation == base.generation and (record.sets, dict(record.stale)) != (
            base.sets,
            dict(base.stale),
        ):
            return f"two records of generation {base.generation} name different nodes in sync"
    return ""


def _in_sync(record: ImageRecord) -> tuple[tuple[str, ...], ...]:
    membership = record.membership
    return tuple(membership.in_sync(index) for index in range(len(record.sets)))


def _decode(record_type: type[R], item: KeyValue) -> R | None:
    try:
        return record_type.decode(item.key, item.value)
    except RecordError:
        return None
