"""`CloneRecords`: clones in the cluster's records: which there are, how one is made, what it needs.

A clone is an image of its own that begins on a snapshot of another one, its parent. Its record says
so, and a key of its own says it the other way round, from the parent (`keys.clone`): whoever takes
away what clones begin on compares that there is no such key, and who makes a clone compares the
parent's record. So one of both fails, and clones that are made at one time do not meet.

What a parent's snapshot holds has to be whole on a node before that node counts as in sync for a
clone: a clone begins with the stale nodes of its parent, and ancestors are healed first.
"""

from dataclasses import dataclass

from etcd import keys
from etcd.images import ImageRecord, Layer, Parent, Snapshot
from etcd.interface import KeyAbsent, Put
from etcd.records import CloneRecord, NameRecord
from shard.ids import ImageId
from shard.membership import FIRST_GENERATION, Stale
from vmstore.arbiters import ArbiterRecords
from vmstore.clone_errors import ChainTooLong, HasClones, LayersTooMany
from vmstore.errors import ImageExists, RecordChanged
from vmstore.holding import INTACT
from vmstore.names import ImageName, SnapshotName
from vmstore.stored import Stored, commit, put_found

FIRST_LAYER = 1

CHAIN_MAX = 16
"""Images in a chain of clones, the oldest ancestor counted: a node looks a block up in each."""

INHERITED_LAYERS_MAX = 256
"""Layers that a clone begins on, of all its ancestors: as many as one image may have snapshots."""


@dataclass(frozen=True, slots=True)
class Clone:
    """A clone of an image: which layer it begins on, and what it is called."""

    image: ImageId
    layer: int
    name: str


@dataclass(frozen=True, slots=True)
class Origin:
    """What a clone begins on: its parent's name, and that of the snapshot."""

    image: str
    snapshot: str

    def __str__(self) -> str:
        return f"{self.image}@{self.snapshot}"


class CloneRecords(ArbiterRecords):
    """Reads and changes the records of clones.

    All methods raise EtcdUnavailable, changing ones also OutcomeUnknown and RecordChanged.
    """

    def has_clones(self, image: ImageId, layer: int) -> bool:
        """Whether any clone begins on this layer of an image."""
        return bool(self._etcd.get_prefix(keys.clones_of_layer(image, layer)).items)

    def clones_of(self, image: ImageId) -> list[Clone]:
        """Return the clones that begin on an image's snapshots, by name."""
        found = self._etcd.get_prefix(keys.clones(image)).items
        if not found:
            return []
        names = self.names()
        clones = [
            Clone(clone, layer, str(names.get(clone, clone)))
            for _, layer, clone in (keys.split_clone(item.key) for item in found)
        ]
        return sorted(clones, key=lambda each: each.name)

    def all_clones(self) -> dict[ImageId, list[Clone]]:
        """Return the clones of each image that has some, by name."""
        names = self.names()
        found: dict[ImageId, list[Clone]] = {}
        for item in self._etcd.get_prefix(keys.CLONES).items:
            parent, layer, clone = keys.split_clone(item.key)
            found.setdefault(parent, []).append(Clone(clone, layer, str(names.get(clone, clone))))
        return {
            parent: sorted(clones, key=lambda each: each.name) for parent, clones in found.items()
        }

    def origin_of(self, record: ImageRecord) -> Origin | None:
        """Return what a clone begins on, in names; None of an image that is no clone."""
        if record.parent is None:
            return None
        parent = self.image(record.parent.image).record
        return origin(record, parent, self.name_of(parent.id))

    def name_of(self, image: ImageId) -> ImageName | None:
        """Return an image's name, None where it has none any more."""
        return self.names().get(image)

    def check_no_clones(
        self, what: str, image: ImageId, from_layer: int = 0, to_layer: int | None = None
    ) -> None:
        """Raise HasClones where clones begin on layers from one on, up to another or the last."""
        clones = [each for each in self.clones_of(image) if each.layer >= from_layer]
        names = [each.name for each in clones if to_layer is None or each.layer <= to_layer]
        if names:
            raise HasClones(what, names)

    def ancestors(self, record: ImageRecord) -> list[ImageRecord]:
        """Return the images that a clone begins on, its parent first. Raises UnknownImage."""
        found: list[ImageRecord] = []
        parent = record.parent
        while parent is not None:
            found.append(self.image(parent.image).record)
            parent = found[-1].parent
            assert len(found) < CHAIN_MAX, "no longer chain is made"
        return found

    def lacking(self, record: ImageRecord) -> Stale:
        """Return who cannot serve a clone for what it lacks of its ancestors, as stale since 0."""
        lacking: dict[int, dict[str, int]] = {}
        parent = record.parent
        for ancestor in self.ancestors(record):
            assert parent is not None and parent.image == ancestor.id, "each is the next one's"
            for index, nodes in ancestor.lacking(parent.generation).items():
                lacking.setdefault(index, {}).update(nodes)
            parent = ancestor.parent
        return lacking

    def _clone(
        self, parent: Stored[ImageRecord], source: SnapshotName, name: ImageName, image: ImageId
    ) -> Stored[ImageRecord]:
        """Make a clone, of this id, of a snapshot of `parent`.

        Raises ImageExists, ChainTooLong, LayersTooMany.
        """
        snapshot = parent.record.snapshot(source.name)
        assert snapshot is not None, "it was found"
        self._check_chain(parent.record, source, snapshot)
        record = clone_record(parent.record, snapshot, image)
        name_key = keys.name(name.pool, name.name)
        compares = [
            KeyAbsent(name_key),
            KeyAbsent(record.key),
            KeyAbsent(keys.tombstone(image)),
            *parent.unchanged,
            INTACT,
        ]
        put = Put(record.key, record.encode())
        operations = [
            put,
            Put(name_key, NameRecord(image=image).encode()),
            Put(keys.clone(parent.record.id, snapshot.layer, image), CloneRecord().encode()),
        ]
        revision = commit(self._etcd, compares, operations, put_found(self._etcd, put))
        if revision is None:
            self.check_history()
            if self._etcd.get(name_key) is not None:
                raise ImageExists(str(name))
            raise RecordChanged(f"image {source.image}")
        return Stored(record.key, record, put.value, revision)

    def _check_chain(self, parent: ImageRecord, source: SnapshotName, snapshot: Snapshot) -> None:
        ancestors = self.ancestors(parent)
        if 2 + len(ancestors) > CHAIN_MAX:
            raise ChainTooLong(str(source), CHAIN_MAX)
        layers, below = len(parent.chain(snapshot)), parent.parent
        for ancestor in ancestors:
            assert below is not None, "each is the next one's parent"
            layers += sum(1 for layer in ancestor.layer_ids if layer <= below.layer)
            below = ancestor.parent
        if layers > INHERITED_LAYERS_MAX:
            raise LayersTooMany(str(source), layers, INHERITED_LAYERS_MAX)


def origin(record: ImageRecord, parent: ImageRecord, name: ImageName | None) -> Origin:
    """Return what a clone begins on, in names; by id or layer where it has none any more."""
    assert record.parent is not None and record.parent.image == parent.id, "it is its parent"
    layer = record.parent.layer
    named = next((each.name for each in parent.snapshots if each.layer == layer), f"layer {layer}")
    return Origin(str(name or parent.id), named)


def clone_record(parent: ImageRecord, snapshot: Snapshot, image: ImageId) -> ImageRecord:
    """Return the record of a new clone: empty, beside its parent's data, stale where that is."""
    return ImageRecord(
        id=image,
        pool=parent.pool,
        policy=parent.policy,
        size_bytes=snapshot.size_bytes,
        shard_bytes=parent.shard_bytes,
        placement_key=parent.placement_key,
        placement_version=parent.placement_version,
        sets=parent.sets,
        layers=(Layer(id=FIRST_LAYER),),
        parent=Parent(
            image=parent.id,
            layer=snapshot.layer,
            generation=snapshot.generation,
            size_bytes=snapshot.size_bytes,
        ),
        generation=FIRST_GENERATION,
        stale=parent.lacking(snapshot.generation),
    )
