"""What a member durably knows of the cluster's records, judged against what etcd says. Pure.

Records in etcd only ever move on: epochs, generations and counters grow, an image goes only with a
tombstone. A member that knows more than etcd says has proof that etcd lost history: it was put back
to an older copy, or is another one. Then nobody may go by it before it was recovered.

    etcd, for what a member knows                       means
    agrees, or says later things                        it is believed
    says earlier things, of the same recovery           it lost history
    says earlier things of an image, after a recovery   the image is contested: the recovery did not
    that the member did not see                         hear this member

What a node has no part in is not judged: an image may be made and deleted while it is away.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from etcd import keys
from etcd.errors import RecordError
from etcd.images import ImageRecord
from etcd.interface import KeyValue
from etcd.records import (
    ArbiterRecord,
    ClusterRecord,
    NameRecord,
    NodeRecord,
    PlacementRecord,
    Record,
)
from shard.ids import ImageId

R = TypeVar("R", bound=Record)

RECOVERY_STEP = 2
"""Added to epoch and generation by a recovery: one change may have been under way."""

FORCED_STEP = 1 << 20
"""Added by a forced one, which may have missed any number of changes: what a node that it did not
hear has stored since lies between, and is told by that."""


@dataclass(frozen=True, slots=True)
class HeldRecord:
    """An image's record as a node's store holds it; `record` is None where it cannot be read."""

    image: ImageId
    epoch: int
    holder: str
    generation: int
    digest: bytes
    record: ImageRecord | None


@dataclass(frozen=True, slots=True)
class Known:
    """What one member knows: its store, and its copy of what etcd said.

    `recoveries` counts those that it knows of, `contested` names the images of which it knows
    another record than the last one rebuilt. `former` are records of before that. `distrusted`
    names the images of which its store, that was set back, knows nothing that counts.
    """

    member: str
    recoveries: int = 0
    held: Mapping[ImageId, HeldRecord] = field(default_factory=dict)
    deleted: frozenset[ImageId] = frozenset()
    records: Mapping[str, KeyValue] = field(default_factory=dict)
    former: Mapping[str, KeyValue] = field(default_factory=dict)
    contested: frozenset[ImageId] = frozenset()
    distrusted: frozenset[ImageId] = frozenset()


@dataclass(frozen=True, slots=True)
class Member:
    """A node that was heard."""

    name: str
    store_id: str
    start_counter: int
    known: Known


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why etcd has lost history, most telling first; and contested images, with the reason."""

    lost: tuple[str, ...] = ()
    contested: Mapping[ImageId, str] = field(default_factory=dict)


Now = Mapping[str, bytes]
"""All keys of the cluster in etcd, at one revision."""


def judge(known: Known, now: Now) -> Verdict:
    """Judge what etcd says by what a member knows."""
    cluster = decoded(ClusterRecord, keys.CLUSTER, now)
    recovered = cluster is not None and cluster.recoveries > known.recoveries
    contested: dict[ImageId, str] = {}
    lost: list[str] = []
    if not recovered:
        # Deleted here: its tombstone in etcd may be gone before the copy hears that it was there.
        buried = {keys.image(image) for image in known.deleted}
        copied = {key: item for key, item in known.records.items() if key not in buried}
        lost += judge_copy(known.member, copied, now)
    for image, why in _problems_of_store(known, now):
        if recovered or image in known.contested:
            contested[image] = why
        else:
            lost.append(why)
    return Verdict(tuple(lost), contested)


def judge_copy(member: str, records: Mapping[str, KeyValue], now: Now) -> Iterator[str]:
    """Yield how etcd is behind a copy of what it said before."""
    if not records:
        return
    if keys.CLUSTER in records and keys.CLUSTER not in now:
        yield "it holds nothing of this cluster"
        return
    for key, item in records.items():
        for prefix, problem_of in _JUDGES.items():
            if key.startswith(prefix):
                try:
                    problem = problem_of(member, key, item.value, now)
                except RecordError:
                    # What nobody can read proves nothing.
                    problem = None
                if problem is not None:
                    yield problem
                break


def judge_votes(
    voted: Iterable[tuple[ImageId, int, int]], now: Now, contested: frozenset[ImageId] = frozenset()
) -> Iterator[str]:
    """Yield how etcd is behind what an arbiter has voted on: (image, epoch, generation)."""
    for image, epoch, generation in voted:
        if image in contested or keys.tombstone(image) in now:
            continue
        found = decoded(ImageRecord, keys.image(image), now)
        if keys.image(image) not in now:
            yield f"image {image}, on which was voted, is not in it"
        elif found is not None and (found.epoch < epoch or found.generation < generation):
            yield (
                f"image {image} is at epoch {found.epoch}, generation {found.generation} in it, "
                f"and epoch {epoch}, generation {generation} was voted on"
            )


def problem_of_held(held: HeldRecord, found: ImageRecord) -> str | None:
    """Return how etcd's record of an image contradicts the one that a node holds, if it does."""
    later = (
        held.epoch > found.epoch
        or (held.epoch == found.epoch and held.holder != found.holder)
        or held.generation > found.generation
        or (held.generation == found.generation and held.digest != found.digest)
    )
    if later or is_missed(found, held.epoch, held.generation):
        return (
            f"image {found.id} is at epoch {found.epoch}, generation {found.generation} in it, and "
            f"epoch {held.epoch}, generation {held.generation} or another holder is stored here"
        )
    return None


def is_missed(found: ImageRecord, epoch: int, generation: int) -> bool:
    """Whether a forced recovery of a record did not hear of this epoch and generation."""
    by = found.recovered
    if by is None or not by.forced:
        return False
    return (
        by.epoch < epoch < by.epoch + FORCED_STEP
        or by.generation < generation < by.generation + FORCED_STEP
    )


def decoded(record_type: type[R], key: str, now: Now) -> R | None:
    """Return the record at a key, None where there is none that can be read."""
    value = now.get(key)
    if value is None:
        return None
    try:
        return record_type.decode(key, value)
    except RecordError:
        return None


def _problems_of_store(known: Known, now: Now) -> Iterator[tuple[ImageId, str]]:
    for image, held in known.held.items():
        key = keys.image(image)
        if key not in now:
            if keys.tombstone(image) not in now:
                yield image, f"image {image} is stored here and is not in it"
            continue
        found = decoded(ImageRecord, key, now)
        problem = problem_of_held(held, found) if found is not None else None
        if problem is not None:
            yield image, problem
    for image in known.deleted:
        if keys.image(image) in now:
            yield image, f"image {image} is in it, and was deleted here"


def _cluster(_member: str, key: str, value: bytes, now: Now) -> str | None:
    known, found = ClusterRecord.decode(key, value), decoded(ClusterRecord, key, now)
    if found is not None and found.recoveries < known.recoveries:
        return (
            f"it is from before recovery {known.recoveries}, "
            f"and there were {found.recoveries} of them in it"
        )
    return None


def _node(_member: str, key: str, value: bytes, now: Now) -> str | None:
    known, found = NodeRecord.decode(key, value), decoded(NodeRecord, key, now)
    if key not in now:
        return f"node {known.name} is not in it"
    if found is not None and found.start_counter < known.start_counter:
        return (
            f"node {known.name} is at its start {found.start_counter} in it, "
            f"and start {known.start_counter} was registered"
        )
    return None


def _arbiter(_member: str, key: str, value: bytes, now: Now) -> str | None:
    known, found = ArbiterRecord.decode(key, value), decoded(ArbiterRecord, key, now)
    if key not in now:
        return f"arbiter {known.name} is not in it"
    if found is None:
        return None
    if found.start_counter < known.start_counter or (known.retired and not found.retired):
        return f"arbiter {known.name} is in it as it was before"
    return None


def _pool(_member: str, key: str, _value: bytes, now: Now) -> str | None:
    return None if key in now else f"pool {key.removeprefix(keys.POOLS)} is not in it"


def _placement(_member: str, key: str, value: bytes, now: Now) -> str | None:
    known, found = PlacementRecord.decode(key, value), decoded(PlacementRecord, key, now)
    if key not in now or (found is not None and found.version < known.version):
        return f"the placement of pool {known.pool} is not in it, or an older one"
    return None


def _name(_member: str, key: str, value: bytes, now: Now) -> str | None:
    image = NameRecord.decode(key, value).image
    if key in now or keys.image(image) not in now:
        return None
    return f"image {'/'.join(keys.split_name(key))} has lost its name in it"


def _image(member: str, key: str, value: bytes, now: Now) -> str | None:
    known, found = ImageRecord.decode(key, value), decoded(ImageRecord, key, now)
    if key not in now:
        # Who has no part in an image may miss its tombstone, which goes when the others have it.
        placed = any(member in members for members in known.sets)
        gone = keys.tombstone(known.id) in now
        return f"image {known.id} is not in it" if placed and not gone else None
    if found is not None and found.is_behind(known):
        return (
            f"image {known.id} is at epoch {found.epoch}, generation {found.generation} in it, and "
            f"was at epoch {known.epoch}, generation {known.generation}"
        )
    return None


def _tombstone(_member: str, key: str, _value: bytes, now: Now) -> str | None:
    image = key.removeprefix(keys.TOMBSTONES)
    return f"image {image} is in it, and was deleted" if keys.IMAGES + image in now else None


_JUDGES: Mapping[str, Callable[[str, str, bytes, Now], str | None]] = {
    keys.CLUSTER: _cluster,
    keys.NODES: _node,
    keys.ARBITERS: _arbiter,
    keys.POOLS: _pool,
    keys.PLACEMENTS: _placement,
    keys.NAMES: _name,
    keys.IMAGES: _image,
    keys.TOMBSTONES: _tombstone,
}
