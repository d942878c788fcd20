"""What to write into an etcd that lost history, from what nodes and arbiters know. Pure.

Of each record the latest that anyone knows counts (`vmstore/told.py`). For an image that is the one
with the highest generation, then epoch, where a quorum of each of its replica sets was heard: any
two of three nodes, or two of both nodes and the arbiter. A write was answered only when all nodes
in sync had stored the record by which it was, so one of those heard has it. Epoch and generation go
up by `RECOVERY_STEP`, above all that may be under way still, and so does the id of the next layer:
that of one which nobody was heard of is not given again.

What was deleted stays deleted: a tombstone anywhere is enough. Without a quorum an image is only
recovered where that is forced; it then goes up by `FORCED_STEP`, so that a node which was not heard
and knows a later record is told by it when it comes back.

A second run finds nothing to do: what it reads agrees. One that follows an interrupted run keeps
what that wrote. After a recovery it brings in nodes that were not heard before: an image that
nobody has used since follows them; of another one it is said what would be lost.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from etcd import keys
from etcd.images import ImageRecord, Recovered, awaited_members
from etcd.records import (
    CloneRecord,
    ClusterRecord,
    LostRecord,
    NameRecord,
    TombstoneRecord,
    awaited_arbiter,
)
from shard.ids import ImageId
from shard.membership import FIRST_GENERATION, Stale, problem_of
from vmstore.history import (
    FORCED_STEP,
    RECOVERY_STEP,
    HeldRecord,
    decoded,
    is_missed,
    judge,
    problem_of_held,
)
from vmstore.told import Sources, Told, record_of


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
        self._told = Told(sources)
        self._refusals: list[str] = []

    def plan(self) -> Plan:
        if not self._full and not self._contested:
            return Plan(needed=False, away=self._sources.away)
        ids = self._told.image_ids() if self._full else set(self._contested)
        self._told.find_pools(ids)
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

    # Images

    def _image(self, image: ImageId) -> tuple[ImagePlan, Write | None]:
        if self._told.is_deleted(image):
            return self._deleted(image)
        now = decoded(ImageRecord, keys.image(image), self._now)
        candidates = self._told.candidates(image)
        if not candidates:
            missing = ("no record of it can be read on any node that answers",)
            losses = ("the image: etcd will not know it; its data stays, as a leftover",)
            shown = self._told.shown(image)
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
            if used or self._told.missing(now)[0]:
                return self._raised(image, now)
            # Nobody has used what was rebuilt: what is known better now takes its place.
            others = [c for c in candidates if c[0].recovered != now.recovered]
            return self._recovered(image, others or candidates, floor=now)
        return self._recovered(image, candidates, floor=now)

    def _kept(self, image: ImageId, now: ImageRecord) -> ImagePlan:
        numbers = (now.epoch, now.generation)
        return ImagePlan(
            image,
            self._told.shown(image),
            "keep",
            self._told.heard(now),
            numbers,
            numbers,
            _in_sync(now),
        )

    def _deleted(self, image: ImageId) -> tuple[ImagePlan, Write | None]:
        key, tombstone = keys.image(image), keys.tombstone(image)
        candidates = [record for record, _ in self._told.candidates(image)]
        values: dict[str, bytes | None] = {}
        if key in self._now:
            values[key] = None
            values[keys.lease(image)] = None
        for name, item in self._sources.now.items():
            if name.startswith(keys.NAMES):
                record = record_of(NameRecord, item)
                if record is not None and record.image == image:
                    values[name] = None
        values |= {key: None for key in self._now if _is_clone(key, image)}
        kept = next((item.value for item in self._told.tombstones() if item.key == tombstone), None)
        voters = {
            awaited_arbiter(witness.name)
            for witness in self._sources.witnesses.values()
            if image in witness.images
        }
        if tombstone not in self._now and (kept is not None or candidates or voters):
            generation = max([FIRST_GENERATION, *(record.generation for record in candidates)])
            pools = {record.pool: self._told.pools.get(record.pool) for record in candidates}
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
        return ImagePlan(image, self._told.shown(image), action), write

    def _recovered(
        self,
        image: ImageId,
        candidates: list[tuple[ImageRecord, int]],
        floor: ImageRecord | None,
    ) -> tuple[ImagePlan, Write]:
        base, _ = max(candidates, key=lambda c: (c[0].generation, c[0].epoch, c[1]))
        latest = max((record for record, _ in candidates), key=lambda record: record.epoch)
        stale, voted_generation, voted_epoch = self._told.voted(image, base)
        helds = [m.known.held[image] for m in self._sources.members.values()
                 if image in m.known.held]  # fmt: skip
        found_epoch = max([latest.epoch, voted_epoch, *(held.epoch for held in helds)])
        found_generation = max(
            [base.generation, voted_generation, *(held.generation for held in helds)]
        )
        missing, losses = self._told.missing(base)
        unheard = _layers_unheard(base, voted_generation, stale)
        if unheard:
            missing.append(unheard)
            losses.append("snapshots that were taken since, and all that was written after them")
        conflict = _conflict(candidates, base)
        if conflict:
            missing.append(conflict)
            losses.append("what was written by the other record")
        step = FORCED_STEP if missing else RECOVERY_STEP
        epoch, generation = found_epoch, found_generation
        if floor is not None:
            epoch, generation = max(epoch, floor.epoch), max(generation, floor.generation)
        opened = epoch > 0
        next_layer = max(record.next_layer for record, _ in candidates)
        record = replace(
            base,
            epoch=epoch + step if opened else 0,
            holder=self._holder if opened else None,
            generation=generation + step,
            next_layer=next_layer + step,
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
            self._told.shown(image, base.pool),
            "recover",
            self._told.heard(base),
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
        other = {
            name
            for name, held in late.items()
            if held.generation > now.generation
            or (held.generation == now.generation and held.digest != now.digest)
            or is_missed(now, 0, held.generation)
        }
        stale = {index: dict(nodes) for index, nodes in now.stale.items()}
        for index, members in enumerate(now.sets):
            for name in sorted(other & set(members)):
                stale.setdefault(index, {})[name] = 0
        epoch = max([now.epoch, *(held.epoch for held in late.values())]) + RECOVERY_STEP
        generation = max([now.generation, *(held.generation for held in late.values())])
        generation += RECOVERY_STEP
        shown, numbers = self._told.shown(image, now.pool), (now.epoch, now.generation)
        if problem_of(now.policy, now.sets, stale, generation, epoch) is not None:
            self._refusals.append(
                f"{shown}: {', '.join(sorted(other))} hold other content than what was written "
                "since the recovery, and it has too few copies without them: export it, remove it, "
                "and import it again"
            )
            return ImagePlan(image, shown, "keep", self._told.heard(now), numbers), None
        by = replace(now.recovered, recovery=self._recovery) if now.recovered else None
        record = replace(
            now,
            epoch=epoch,
            holder=self._holder,
            generation=generation,
            next_layer=now.next_layer + RECOVERY_STEP,
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
            self._told.heard(now),
            numbers,
            (epoch, generation),
            _in_sync(record),
            missing,
            losses,
        )
        return planned, self._image_write(record)

    def _image_write(self, record: ImageRecord) -> Write:
        values: dict[str, bytes | None] = {record.key: record.encode()}
        names = [key for key, (_, image) in self._told.names.items() if image == record.id]
        if not names:
            names = [keys.name(record.pool, self._told.other_name(record))]
        for name in names:
            if name not in self._now or self._told.names.get(name) is not None:
                values[name] = NameRecord(image=record.id).encode()
        parent = record.parent
        if parent is not None:
            key = keys.clone(parent.image, parent.layer, record.id)
            values[key] = self._now.get(key, CloneRecord().encode())
        values = {key: value for key, value in values.items() if self._now.get(key) != value}
        compared = tuple(values)
        return Write({**values, keys.lease(record.id): None}, compared)

    # All other records

    def _other_records(self) -> tuple[list[Write], dict[str, int]]:
        """Return the writes of nodes, arbiters, pools and placements that etcd does not have so."""
        wanted: dict[str, bytes] = {node.key: node.encode() for node in self._told.nodes.values()}
        wanted |= {arbiter.key: arbiter.encode() for arbiter in self._told.arbiters.values()}
        wanted |= {pool.key: pool.encode() for pool in self._told.pools.values()}
        wanted |= {each.key: each.encode() for each in self._told.latest_placements()}
        changed = {key: value for key, value in wanted.items() if self._now.get(key) != value}
        kinds = {"nodes": keys.NODES, "arbiters": keys.ARBITERS, "pools": keys.POOLS,
                 "placements": keys.PLACEMENTS}  # fmt: skip
        counts = {
            kind: sum(key.startswith(prefix) for key in changed) for kind, prefix in kinds.items()
        }
        return [Write({key: value}, (key,)) for key, value in changed.items()], counts


def _is_clone(key: str, image: ImageId) -> bool:
    """Whether this key says that the image is a clone."""
    return key.startswith(keys.CLONES) and keys.split_clone(key)[2] == image


def _is_from_before(held: HeldRecord, by: Recovered) -> bool:
    """Whether a node stored this before that recovery, of which it so knows nothing."""
    former = held.record.recovered if held.record is not None else None
    return former is None or former.recovery < by.recovery


def _layers_unheard(base: ImageRecord, voted_generation: int, stale: Stale) -> str:
    """Return where a snapshot may be known to nobody who was heard.

    An arbiter knows who is in sync and not which layers there are: where it has voted on more than
    the one change after the latest record that was heard, the others may have added layers.
    """
    if voted_generation <= base.generation + 1:
        return ""
    latest = replace(base, stale=stale, generation=voted_generation)
    names = ", ".join(sorted(latest.membership.all_in_sync()))
    return (
        f"{names} went on to generation {voted_generation}, and the latest record that was heard "
        f"is of generation {base.generation}: which snapshots there are they alone know"
    )


def _conflict(candidates: list[tuple[ImageRecord, int]], base: ImageRecord) -> str:
    """Return where two records of the highest generation say other things."""
    for record, _ in candidates:
        if record.generation == base.generation and record.digest != base.digest:
            return (
                f"two records of generation {base.generation} name different nodes in sync, or "
                "different snapshots"
            )
    return ""


def _in_sync(record: ImageRecord) -> tuple[tuple[str, ...], ...]:
    membership = record.membership
    return tuple(membership.in_sync(index) for index in range(len(record.sets)))
