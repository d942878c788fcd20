"""`ImageRecord`: the record of an image, and what it is made of.

One for each image, at `keys.image`; the nodes in sync keep it too. It alone tells a node or a
gateway all that they need of the image. See `etcd/records.py` for what all records share.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Self

from etcd import keys
from etcd.fields import (
    Fields,
    Json,
    policy_of,
    sets_json,
    sets_of,
    shard_bytes_of,
)
from etcd.records import Record, awaited_arbiter
from shard.digest import state_digest
from shard.errors import BadValue
from shard.geometry import check_image_size
from shard.ids import ImageId, holder_id, image_id, pool_name, snapshot_name
from shard.membership import FIRST_GENERATION, Membership, Policy, Stale, problem_of
from shard.placement import ReplicaSet

_INDEX = re.compile(r"0|[1-9][0-9]{0,8}")

SNAPSHOTS_MAX = 256
"""Of an image: a read of its top may pass through as many layers, and its record names each."""

LAYER_MAX = (1 << 32) - 1
"""Ids of layers have 32 bits on the wire and on disks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer(Record):
    """One layer of an image; ids grow and are never reused within the image."""

    id: int

    def _fields(self) -> dict[str, Json]:
        return {"id": self.id}

    @classmethod
    def _take(cls, fields: Fields) -> Self:
        return cls(id=fields.number("id", 1), extra=fields.rest())


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot(Record):
    """A named state of an image: the content of its layers up to and with `layer`.

    `size_bytes` is how large the image was then, `created_s` when that was, in seconds since 1970,
    `generation` that of the first record which names it.
    """

    name: str
    layer: int
    size_bytes: int
    created_s: int
    generation: int

    def _fields(self) -> dict[str, Json]:
        return {
            "name": self.name,
            "layer": self.layer,
            "size_bytes": self.size_bytes,
            "created_s": self.created_s,
            "generation": self.generation,
        }

    @classmethod
    def _take(cls, fields: Fields) -> Self:
        return cls(
            name=fields.text("name", snapshot_name),
            layer=fields.number("layer", 1),
            size_bytes=_image_bytes(fields),
            created_s=fields.number("created_s"),
            generation=fields.number("generation", FIRST_GENERATION),
            extra=fields.rest(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent(Record):
    """What a clone begins on: what a snapshot of another image holds, named by its layer.

    `generation` is that of the first record which named the snapshot. `size_bytes` is how large
    that image was then: what lies beyond is zeroes for the clone.
    """

    image: ImageId
    layer: int
    generation: int
    size_bytes: int

    def _fields(self) -> dict[str, Json]:
        return {
            "image": self.image,
            "layer": self.layer,
            "generation": self.generation,
            "size_bytes": self.size_bytes,
        }

    @classmethod
    def _take(cls, fields: Fields) -> Self:
        return cls(
            image=fields.text("image", image_id),
            layer=fields.number("layer", 1),
            generation=fields.number("generation", FIRST_GENERATION),
            size_bytes=_image_bytes(fields),
            extra=fields.rest(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant(Record):
    """Which arbiter granted an image's last change, and how often the votes had changed by then.

    Nodes keep it with the record. An arbiter that counts less has lost what it knew.
    """

    arbiter: str
    changes: int

    def _fields(self) -> dict[str, Json]:
        return {"arbiter": self.arbiter, "changes": self.changes}

    @classmethod
    def _take(cls, fields: Fields) -> Self:
        return cls(
            arbiter=fields.text("arbiter", holder_id),
            changes=fields.number("changes"),
            extra=fields.rest(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Use(Record):
    """Who had an image for clients, in which epoch."""

    epoch: int
    holder: str

    def _fields(self) -> dict[str, Json]:
        return {"epoch": self.epoch, "holder": self.holder}

    @classmethod
    def _take(cls, fields: Fields) -> Self:
        return cls(
            epoch=fields.number("epoch", 1),
            holder=fields.text("holder", holder_id),
            extra=fields.rest(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered(Record):
    """How an image's record was rebuilt: by which recovery, above which epoch and generation.

    A `forced` one did not hear enough nodes to know that there is no later record.
    """

    recovery: int
    epoch: int
    generation: int
    forced: bool = False

    def _fields(self) -> dict[str, Json]:
        return {
            "recovery": self.recovery,
            "epoch": self.epoch,
            "generation": self.generation,
            "forced": self.forced,
        }

    @classmethod
    def _take(cls, fields: Fields) -> Self:
        return cls(
            recovery=fields.number("recovery", 1),
            epoch=fields.number("epoch"),
            generation=fields.number("generation", FIRST_GENERATION),
            forced=fields.boolean("forced"),
            extra=fields.rest(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRecord(Record):
    """An image: its size and layers, where its data lives, who writes it, and who is in sync.

    `sets` and `policy` repeat what the pool's record and placement version say, so that the record
    alone tells a node or a gateway all it needs. `layers` begins with the top one, which alone is
    written; `next_layer` is the id of the one that comes (0: the one above the top), so that none
    is used twice. `merging` names layers whose snapshot is removed: each node puts what is in one
    of them into the layer above, in its own time, and they go when all nodes have. `parent` is what
    lies below the layers of a clone, and `placement_key` the id of its oldest ancestor. `holder` is
    the process that has or had the current epoch, None before the first.
    `clean` says that the last holder gave its lease back with nothing in flight. `grant` is None
    until an arbiter was asked.
    `used` is who had the image for clients last, where the leases since were for maintenance only.
    `recovered` says how the record was rebuilt from the nodes, if it ever was.
    """

    id: ImageId
    pool: str
    policy: Policy
    size_bytes: int
    shard_bytes: int
    placement_key: ImageId
    placement_version: int
    sets: tuple[ReplicaSet, ...]
    layers: tuple[Layer, ...]
    next_layer: int = 0
    snapshots: tuple[Snapshot, ...] = ()
    merging: tuple[int, ...] = ()
    parent: Parent | None = None
    epoch: int = 0
    holder: str | None = None
    generation: int = FIRST_GENERATION
    clean: bool = True
    stale: Stale = field(default_factory=dict)
    grant: Grant | None = None
    used: Use | None = None
    recovered: Recovered | None = None

    def __post_init__(self) -> None:
        if self.next_layer == 0:
            highest = max((layer.id for layer in self.layers), default=0)
            object.__setattr__(self, "next_layer", highest + 1)

    @property
    def last_use(self) -> Use | None:
        """Who has or had the image for clients last; None where nobody had it yet."""
        if self.used is not None or self.holder is None:
            return self.used
        return Use(epoch=self.epoch, holder=self.holder)

    @property
    def key(self) -> str:
        """Where the record stands."""
        return keys.image(self.id)

    @property
    def membership(self) -> Membership:
        """Who is in sync, by this record."""
        return Membership(self.policy, self.sets, self.stale, self.generation, self.epoch)

    @property
    def layer_ids(self) -> list[int]:
        """The ids of the layers, the top one first."""
        return [layer.id for layer in self.layers]

    @property
    def digest(self) -> bytes:
        """What tells this record from another one of the same generation."""
        snapshots = [
            (each.name, each.layer, each.size_bytes, each.created_s, each.generation)
            for each in self.snapshots
        ]
        return state_digest(self.membership, self.layer_ids, snapshots, self.merging, self.below)

    @property
    def below(self) -> tuple[str, int, int, int] | None:
        """What a clone begins on, as (image, layer, generation, size in bytes)."""
        of = self.parent
        return None if of is None else (of.image, of.layer, of.generation, of.size_bytes)

    def is_behind(self, known: "ImageRecord") -> bool:
        """Whether this record must be refused by whoever stored `known` of the same image.

        So it is where its epoch or generation is lower, and where one is equal but says another
        thing: an epoch of another holder, a generation with other nodes in sync or other layers.
        """
        if self.epoch < known.epoch or self.generation < known.generation:
            return True
        if self.epoch == known.epoch and self.holder != known.holder:
            return True
        return self.generation == known.generation and self.digest != known.digest

    def snapshot(self, name: str) -> Snapshot | None:
        """Return the snapshot of this name, if there is one."""
        return next((each for each in self.snapshots if each.name == name), None)

    def chain(self, snapshot: Snapshot) -> list[int]:
        """Return the ids of a snapshot's layers, its newest one first: all of them are frozen."""
        return [layer for layer in self.layer_ids if layer <= snapshot.layer]

    def with_snapshot(self, name: str, created_s: int) -> "ImageRecord":
        """Return the record one generation higher: the top is frozen under `name`, a new one is it.

        Asserts that the name is free and that there is room for one more.
        """
        assert self.snapshot(name) is None, "names of snapshots are unique"
        assert len(self.layers) <= SNAPSHOTS_MAX, "there is room for another one"
        frozen = Snapshot(
            name=name,
            layer=self.layers[0].id,
            size_bytes=self.size_bytes,
            created_s=created_s,
            generation=self.generation + 1,
        )
        return replace(
            self,
            generation=self.generation + 1,
            layers=(Layer(id=self.next_layer), *self.layers),
            next_layer=self.next_layer + 1,
            snapshots=(*self.snapshots, frozen),
        )

    def lacking(self, generation: int) -> Stale:
        """Return who may lack what was frozen in a generation, as nodes that are stale since 0.

        Who was left behind in that generation, or before, may; who was in sync later has it.
        """
        found = {
            index: {node: 0 for node, since in nodes.items() if since <= generation}
            for index, nodes in self.membership.stale.items()
        }
        return {index: nodes for index, nodes in found.items() if nodes}

    def newer_than(self, snapshot: Snapshot) -> tuple[Snapshot, ...]:
        """Return the snapshots that were taken after this one, the oldest first."""
        return tuple(each for each in self.snapshots if each.layer > snapshot.layer)

    def rolled_back(self, snapshot: Snapshot) -> "ImageRecord":
        """Return the record one generation higher that holds what a snapshot does, at its size.

        An empty layer comes on top of the snapshot's; the layers above that go, with what was
        written to them, and so do newer snapshots.
        """
        assert snapshot in self.snapshots, "it is one of the image"
        return replace(
            self,
            generation=self.generation + 1,
            size_bytes=snapshot.size_bytes,
            layers=(
                Layer(id=self.next_layer),
                *(layer for layer in self.layers if layer.id <= snapshot.layer),
            ),
            next_layer=self.next_layer + 1,
            snapshots=tuple(each for each in self.snapshots if each.layer <= snapshot.layer),
            merging=tuple(layer for layer in self.merging if layer < snapshot.layer),
        )

    def without_snapshot(self, snapshot: Snapshot) -> "ImageRecord":
        """Return the record one generation higher without a snapshot, whose layer is to be merged.

        What the image and its other snapshots hold stays as it is.
        """
        assert snapshot in self.snapshots, "it is one of the image"
        return replace(
            self,
            generation=self.generation + 1,
            snapshots=tuple(each for each in self.snapshots if each is not snapshot),
            merging=tuple(sorted({*self.merging, snapshot.layer}, reverse=True)),
        )

    def without_merged(self, layers: Collection[int]) -> "ImageRecord":
        """Return the record one generation higher without layers in which no node has anything."""
        assert set(layers) <= set(self.merging), "they were merged"
        return replace(
            self,
            generation=self.generation + 1,
            layers=tuple(layer for layer in self.layers if layer.id not in layers),
            merging=tuple(layer for layer in self.merging if layer not in layers),
        )

    def with_merged(self, layers: Collection[int]) -> "ImageRecord":
        """Return the record one generation higher with these in their places again, to be merged.

        They were taken out, and no node has heard of that.
        """
        assert not set(layers) & set(self.layer_ids), "they were taken out"
        assert max(layers) < self.layers[0].id, "none was the top"
        back = (*self.layers, *(Layer(id=layer) for layer in layers))
        return replace(
            self,
            generation=self.generation + 1,
            layers=tuple(sorted(back, key=lambda layer: layer.id, reverse=True)),
            merging=tuple(sorted({*self.merging, *layers}, reverse=True)),
        )

    @property
    def newest_snapshot(self) -> Snapshot | None:
        """Return the snapshot that the top layer was put on, if it was put on one."""
        below = self.layers[1].id if len(self.layers) > 1 else None
        return next((each for each in self.snapshots if each.layer == below), None)

    def without_newest_snapshot(self) -> "ImageRecord":
        """Return the record one generation higher without the last snapshot and its top layer.

        Right only where nothing was written to that layer. Its id is not used again.
        """
        newest = self.newest_snapshot
        assert newest is not None, "the top was put on a snapshot"
        return replace(
            self,
            generation=self.generation + 1,
            layers=self.layers[1:],
            snapshots=tuple(each for each in self.snapshots if each is not newest),
        )

    def _fields(self) -> dict[str, Json]:
        stale: dict[str, Json] = {
            str(index): dict(nodes) for index, nodes in self.membership.stale.items()
        }
        granted: dict[str, Json] = {}
        if self.merging:
            granted["merging"] = list(self.merging)
        if self.parent is not None:
            granted["parent"] = {**self.parent.extra, **self.parent._fields()}
        if self.grant is not None:
            granted["grant"] = {**self.grant.extra, **self.grant._fields()}
        if self.used is not None:
            granted["used"] = {**self.used.extra, **self.used._fields()}
        if self.recovered is not None:
            granted["recovered"] = {**self.recovered.extra, **self.recovered._fields()}
        return {
            **granted,
            "id": self.id,
            "pool": self.pool,
            "policy": self.policy.value,
            "size_bytes": self.size_bytes,
            "shard_bytes": self.shard_bytes,
            "placement_key": self.placement_key,
            "placement_version": self.placement_version,
            "sets": sets_json(self.sets),
            "layers": [{**layer.extra, **layer._fields()} for layer in self.layers],
            "next_layer": self.next_layer,
            "snapshots": [{**snapshot.extra, **snapshot._fields()} for snapshot in self.snapshots],
            "epoch": self.epoch,
            "holder": self.holder,
            "generation": self.generation,
            "clean": self.clean,
            "stale": stale,
        }

    @classmethod
    def _take(cls, fields: Fields) -> Self:
        record = cls(
            id=fields.text("id", image_id),
            pool=fields.text("pool", pool_name),
            policy=fields.text("policy", policy_of),
            size_bytes=_image_bytes(fields),
            shard_bytes=shard_bytes_of(fields),
            placement_key=fields.text("placement_key", image_id),
            placement_version=fields.number("placement_version", 1),
            sets=sets_of(fields),
            layers=tuple(
                Layer._take(fields.within("layers", item)) for item in fields.items("layers")
            ),
            next_layer=fields.number("next_layer", 1) if fields.has("next_layer") else 0,
            snapshots=tuple(
                Snapshot._take(fields.within("snapshots", item))
                for item in fields.items("snapshots")
            ),
            merging=_merging(fields),
            parent=_parent(fields),
            epoch=fields.number("epoch"),
            holder=fields.optional_text("holder", holder_id),
            generation=fields.number("generation", FIRST_GENERATION),
            clean=fields.boolean("clean"),
            stale=_stale(fields),
            grant=_grant(fields),
            used=_used(fields),
            recovered=_recovered(fields),
            extra=fields.rest(),
        )
        problem = _problem_of_image(record)
        if problem is not None:
            fields.fail("", f"breaks a rule ({problem})")
        return record


def awaited_members(record: ImageRecord, arbiter: str | None) -> tuple[str, ...]:
    """Return who has to say that an image is deleted, before its tombstone may go."""
    members = {node for nodes in record.sets for node in nodes}
    if arbiter is not None:
        members.add(awaited_arbiter(arbiter))
    return tuple(sorted(members))


def _problem_of_image(record: ImageRecord) -> str | None:
    layer_ids = record.layer_ids
    if not layer_ids or layer_ids != sorted(set(layer_ids), reverse=True):
        return "an image has layers, the newest first"
    if not layer_ids[0] < record.next_layer <= LAYER_MAX:
        return "the id of the next layer is above all others, and has 32 bits"
    if not {snapshot.layer for snapshot in record.snapshots} <= set(layer_ids[1:]):
        return "a snapshot names a layer of its image below the top"
    if len({snapshot.name for snapshot in record.snapshots}) < len(record.snapshots):
        return "names of snapshots are unique"
    if list(record.merging) != sorted(set(record.merging), reverse=True):
        return "layers that are merged are named once, the newest first"
    if not set(record.merging) <= set(layer_ids[1:]) - {each.layer for each in record.snapshots}:
        return "a layer that is merged is one below the top, without a snapshot"
    if len(record.snapshots) > SNAPSHOTS_MAX:
        return f"an image has at most {SNAPSHOTS_MAX} snapshots"
    if record.parent is not None and record.id in (record.parent.image, record.placement_key):
        return "a clone has another image for its parent, and lies where its oldest ancestor lies"
    if (record.holder is None) != (record.epoch == 0):
        return "an epoch has a holder"
    return problem_of(record.policy, record.sets, record.stale, record.generation, record.epoch)


def _merging(fields: Fields) -> tuple[int, ...]:
    return fields.whole_numbers("merging", 1) if fields.has("merging") else ()


def _parent(fields: Fields) -> Parent | None:
    if not fields.has("parent"):
        return None
    return Parent._take(fields.within("parent", fields.mapping("parent")))


def _stale(fields: Fields) -> Stale:
    stale: dict[int, Mapping[str, int]] = {}
    for index, nodes in fields.mapping("stale").items():
        if not _INDEX.fullmatch(index):
            fields.fail("stale", f"{index[:20]!r} is no index of a replica set")
        stale[int(index)] = fields.numbers("stale", nodes)
    return stale


def _grant(fields: Fields) -> Grant | None:
    if not fields.has("grant"):
        return None
    return Grant._take(fields.within("grant", fields.mapping("grant")))


def _used(fields: Fields) -> Use | None:
    if not fields.has("used"):
        return None
    return Use._take(fields.within("used", fields.mapping("used")))


def _recovered(fields: Fields) -> Recovered | None:
    if not fields.has("recovered"):
        return None
    return Recovered._take(fields.within("recovered", fields.mapping("recovered")))


def _image_bytes(fields: Fields) -> int:
    try:
        return check_image_size(fields.number("size_bytes"))
    except BadValue as error:
        fields.fail("size_bytes", str(error))
