"""The records that make up the cluster's state, and their exact JSON.

Each record encodes to canonical JSON with a version `v`, and decodes only from a value that keeps
all its rules. Fields that this version does not know are kept in `extra` and written back: while
hosts are upgraded one by one, an older program must not drop what a newer one wrote. A change that
an older program must not overlook raises `v`, and the older program refuses the record.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from etcd import keys
from etcd.fields import Fields, Json, encode
from shard.errors import BadValue
from shard.geometry import check_image_size, check_shard_size
from shard.ids import ImageId, holder_id, image_id, node_name, pool_name
from shard.membership import FIRST_GENERATION, Membership, Policy, Stale, WhenFull, problem_of
from shard.placement import FailureDomain, ReplicaSet

_INDEX = re.compile(r"0|[1-9][0-9]{0,8}")

VERSION = 1
"""Version of all records."""

FORMAT = 1
"""Version of what spans records and stores: how the whole cluster keeps its data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What all records share. `extra` holds the fields of newer versions."""

    extra: Mapping[str, Json] = field(default_factory=dict)

    def encode(self) -> bytes:
        """Return the record's canonical bytes."""
        known = self._fields()
        assert not known.keys() & self.extra.keys(), "unknown fields are not known ones"
        return encode(VERSION, {**self.extra, **known})

    @classmethod
    def decode(cls, key: str, value: bytes) -> Self:
        """Return the record that stands at `key`. Raises MalformedRecord or UnknownVersion."""
        return cls._take(Fields.of_bytes(key, value, VERSION))

    def _fields(self) -> dict[str, Json]:
        raise NotImplementedError

    @classmethod
    def _take(cls, fields: Fields) -> Self:
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterRecord(Record):
    """The cluster itself: made once, compared by every node that joins.

    `recoveries` counts how often the records were rebuilt from the nodes.
    """

    id: str
    format: int = FORMAT
    recoveries: int = 0

    def _fields(self) -> dict[str, Json]:
        recovered: dict[str, Json] = {"recoveries": self.recoveries} if self.recoveries else {}
        return {"id": self.id, "format": self.format, **recovered}

    @classmethod
    def _take(cls, fields: Fields) -> Self:
        return cls(
            id=fields.text("id", holder_id),
            format=fields.number("format", 1),
            recoveries=fields.number("recoveries", 1) if fields.has("recoveries") else 0,
            extra=fields.rest(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LostRecord(Record):
    """Says that etcd is behind what `by` knows: nothing is opened, made or deleted by its records.

    `recovery` is the number of the recovery that is at work on it, 0 before one was begun.
    """

    by: str
    why: str
    recovery: int = 0

    def _fields(self) -> dict[str, Json]:
        return {"by": self.by, "why": self.why, "recovery": self.recovery}

    @classmethod
    def _take(cls, fields: Fields) -> Self:
        return cls(
            by=fields.text("by", _not_empty),
            why=fields.text("why", _not_empty),
            recovery=fields.number("recovery"),
            extra=fields.rest(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportRecord(Record):
    """Says that an image is being filled from a file, and by whom; it goes when that is done."""

    by: str

    def _fields(self) -> dict[str, Json]:
        return {"by": self.by}

    @classmethod
    def _take(cls, fields: Fields) -> Self:
        return cls(by=fields.text("by", _not_empty), extra=fields.rest())


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRecord(Record):
    """A storage node: where it is reached, where it stands, which store it runs on."""

    name: str
    address: str
    control: str
    socket: str | None
    host: str
    zone: str
    labels: Mapping[str, str]
    capacity_bytes: int
    store_id: str
    start_counter: int
    run: str | None = None

    @property
    def key(self) -> str:
        """Where the record stands."""
        return keys.node(self.name)

    def _fields(self) -> dict[str, Json]:
        return {
            "name": self.name,
            "address": self.address,
            "control": self.control,
            "socket": self.socket,
            "host": self.host,
            "zone": self.zone,
            "labels": dict(self.labels),
            "capacity_bytes": self.capacity_bytes,
            "store_id": self.store_id,
            "start_counter": self.start_counter,
            **({} if self.run is None else {"run": self.run}),
        }

    @classmethod
    def _take(cls, fields: Fields) -> Self:
        labels: dict[str, str] = {}
        for label, value in fields.mapping("labels").items():
            if not isinstance(value, str):
                fields.fail("labels", f"{label!r} is not a string")
            labels[label] = value
        return cls(
            name=fields.text("name", node_name),
            address=fields.text("address", _not_empty),
            control=fields.text("control", _not_empty),
            socket=fields.optional_text("socket", _not_empty),
            host=fields.text("host", _not_empty),
            zone=fields.text("zone", _not_empty),
            labels=labels,
            capacity_bytes=fields.number("capacity_bytes"),
            store_id=fields.text("store_id", holder_id),
            start_counter=fields.number("start_counter"),
            run=fields.text("run", holder_id) if fields.has("run") else None,
            extra=fields.rest(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AliveRecord(Record):
    """Exists while a node or an arbiter runs; the counter tells its instances apart.

    `run` is drawn by the process: one counter with two of them is that of a store and its copy.
    """

    start_counter: int
    run: str | None = None

    def _fields(self) -> dict[str, Json]:
        run: dict[str, Json] = {} if self.run is None else {"run": self.run}
        return {"start_counter": self.start_counter, **run}

    @classmethod
    def _take(cls, fields: Fields) -> Self:
        return cls(
            start_counter=fields.number("start_counter"),
            run=fields.text("run", holder_id) if fields.has("run") else None,
            extra=fields.rest(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ArbiterRecord(Record):
    """A thin arbiter: where it is reached, which durable record it runs on.

    `retired`: another one took its place, and it votes no more.
    """

    name: str
    id: str
    address: str
    host: str
    start_counter: int
    retired: bool = False

    @property
    def key(self) -> str:
        """Where the record stands."""
        return keys.arbiter(self.name)

    def _fields(self) -> dict[str, Json]:
        return {
            "name": self.name,
            "id": self.id,
            "address": self.address,
            "host": self.host,
            "start_counter": self.start_counter,
            "retired": self.retired,
        }

    @classmethod
    def _take(cls, fields: Fields) -> Self:
        return cls(
            name=fields.text("name", node_name),
            id=fields.text("id", holder_id),
            address=fields.text("address", _not_empty),
            host=fields.text("host", _not_empty),
            start_counter=fields.number("start_counter", 1),
            retired=fields.boolean("retired"),
            extra=fields.rest(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolRecord(Record):
    """A pool: the policy of its images.

    `arbiter` is the name of the thin arbiter that grants their changes of membership. It grants
    none while it is not `filled`: it has still to hear what etcd holds of the pool's images.
    Holders ask for `when_full` when that matters; it may change at any time.
    """

    name: str
    policy: Policy
    shard_bytes: int
    replica_sets: int
    failure_domain: FailureDomain
    arbiter: str | None = None
    filled: bool = True
    when_full: WhenFull = WhenFull.STALL

    @property
    def key(self) -> str:
        """Where the record stands."""
        return keys.pool(self.name)

    def _fields(self) -> dict[str, Json]:
        special: dict[str, Json] = {} if self.filled else {"arbiter_filled": False}
        if self.when_full is not WhenFull.STALL:
            special["when_full"] = self.when_full.value
        return {
            **special,
            "name": self.name,
            "policy": self.policy.value,
            "shard_bytes": self.shard_bytes,
            "replica_sets": self.replica_sets,
            "failure_domain": self.failure_domain.value,
            "arbiter": self.arbiter,
        }

    @classmethod
    def _take(cls, fields: Fields) -> Self:
        return cls(
            name=fields.text("name", pool_name),
            policy=fields.text("policy", _policy),
            shard_bytes=_shard_bytes(fields),
            replica_sets=fields.number("replica_sets", 1),
            failure_domain=fields.text("failure_domain", _failure_domain),
            arbiter=fields.optional_text("arbiter", node_name),
            filled=not fields.has("arbiter_filled") or fields.boolean("arbiter_filled"),
            when_full=(
                fields.text("when_full", _when_full) if fields.has("when_full") else WhenFull.STALL
            ),
            extra=fields.rest(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementRecord(Record):
    """The replica sets of a pool. Images name the version they are placed by."""

    pool: str
    version: int
    sets: tuple[ReplicaSet, ...]

    @property
    def key(self) -> str:
        """Where the record stands."""
        return keys.placement(self.pool)

    def _fields(self) -> dict[str, Json]:
        return {"pool": self.pool, "version": self.version, "sets": _sets_json(self.sets)}

    @classmethod
    def _take(cls, fields: Fields) -> Self:
        return cls(
            pool=fields.text("pool", pool_name),
            version=fields.number("version", 1),
            sets=_sets(fields),
            extra=fields.rest(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class NameRecord(Record):
    """A name of an image; an image dies with its last name."""

    image: ImageId

    def _fields(self) -> dict[str, Json]:
        return {"image": self.image}

    @classmethod
    def _take(cls, fields: Fields) -> Self:
        return cls(image=fields.text("image", image_id), extra=fields.rest())


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRecord(Record):
    """Who may change an image. `holder` is the random id of that gateway's process.

    `lock` tells the lock file that the process holds from all others, on whichever host: only who
    holds the same one knows that the process is dead. None in leases of older versions. A lease for
    `maintenance` serves no client: who is asked for the image takes it over.
    """

    gateway: str
    holder: str
    epoch: int
    lock: str | None = None
    maintenance: bool = False

    def _fields(self) -> dict[str, Json]:
        return {
            "gateway": self.gateway,
            "holder": self.holder,
            "epoch": self.epoch,
            **({} if self.lock is None else {"lock": self.lock}),
            **({"maintenance": True} if self.maintenance else {}),
        }

    @classmethod
    def _take(cls, fields: Fields) -> Self:
        return cls(
            gateway=fields.text("gateway", _not_empty),
            holder=fields.text("holder", holder_id),
            epoch=fields.number("epoch", 1),
            lock=fields.text("lock", _not_empty) if fields.has("lock") else None,
            maintenance=fields.flag("maintenance"),
            extra=fields.rest(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TombstoneRecord(Record):
    """Says that an image was deleted. Nodes delete its data only on this word.

    `awaits` names the nodes, and the arbiter (`awaited_arbiter`), that have not said yet that they
    did: with the last one the record goes. A node that deleted keeps a tombstone of its own for
    ever. None in records of older versions, which stay.
    """

    id: ImageId
    generation: int
    awaits: tuple[str, ...] | None = None

    @property
    def key(self) -> str:
        """Where the record stands."""
        return keys.tombstone(self.id)

    def _fields(self) -> dict[str, Json]:
        awaits: dict[str, Json] = {} if self.awaits is None else {"awaits": list(self.awaits)}
        return {**awaits, "id": self.id, "generation": self.generation}

    @classmethod
    def _take(cls, fields: Fields) -> Self:
        awaits = None
        if fields.has("awaits"):
            awaits = fields.texts("awaits", fields.items("awaits"), _not_empty)
        return cls(
            id=fields.text("id", image_id),
            generation=fields.number("generation", FIRST_GENERATION),
            awaits=awaits,
            extra=fields.rest(),
        )


def awaited_arbiter(name: str) -> str:
    """Return how a tombstone's `awaits` names an arbiter: a node may have the same name."""
    return f"arbiter/{name}"


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
    """A named state of an image: the content of its layers up to and with `layer`."""

    name: str
    layer: int

    def _fields(self) -> dict[str, Json]:
        return {"name": self.name, "layer": self.layer}

    @classmethod
    def _take(cls, fields: Fields) -> Self:
        return cls(
            name=fields.text("name", _not_empty),
            layer=fields.number("layer", 1),
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
    alone tells a node or a gateway all it needs. `layers` begins with the top one. `holder` is the
    process that has or had the current epoch, None before the first. `clean` says that the last
    holder gave its lease back with nothing in flight. `grant` is None until an arbiter was asked.
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
    snapshots: tuple[Snapshot, ...] = ()
    epoch: int = 0
    holder: str | None = None
    generation: int = FIRST_GENERATION
    clean: bool = True
    stale: Stale = field(default_factory=dict)
    grant: Grant | None = None
    used: Use | None = None
    recovered: Recovered | None = None

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

    def is_behind(self, known: "ImageRecord") -> bool:
        """Whether this record must be refused by whoever stored `known` of the same image.

        So it is where its epoch or generation is lower, and where one is equal but says another
        thing: an epoch of another holder, a generation with other nodes in sync.
        """
        if self.epoch < known.epoch or self.generation < known.generation:
            return True
        if self.epoch == known.epoch and self.holder != known.holder:
            return True
        return self.generation == known.generation and (self.sets, self.stale) != (
            known.sets,
            known.stale,
        )

    def _fields(self) -> dict[str, Json]:
        stale: dict[str, Json] = {
            str(index): dict(nodes) for index, nodes in self.membership.stale.items()
        }
        granted: dict[str, Json] = {}
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
            "sets": _sets_json(self.sets),
            "layers": [{**layer.extra, **layer._fields()} for layer in self.layers],
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
            policy=fields.text("policy", _policy),
            size_bytes=_image_bytes(fields),
            shard_bytes=_shard_bytes(fields),
            placement_key=fields.text("placement_key", image_id),
            placement_version=fields.number("placement_version", 1),
            sets=_sets(fields),
            layers=tuple(
                Layer._take(fields.within("layers", item)) for item in fields.items("layers")
            ),
            snapshots=tuple(
                Snapshot._take(fields.within("snapshots", item))
                for item in fields.items("snapshots")
            ),
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
    layer_ids = [layer.id for layer in record.layers]
    if not layer_ids or layer_ids != sorted(set(layer_ids), reverse=True):
        return "an image has layers, the newest first"
    if not {snapshot.layer for snapshot in record.snapshots} <= set(layer_ids):
        return "a snapshot names a layer of its image"
    if (record.holder is None) != (record.epoch == 0):
        return "an epoch has a holder"
    return problem_of(record.policy, record.sets, record.stale, record.generation, record.epoch)


def _sets_json(sets: tuple[ReplicaSet, ...]) -> Json:
    return [list(members) for members in sets]


def _sets(fields: Fields) -> tuple[ReplicaSet, ...]:
    sets = tuple(fields.texts("sets", members, node_name) for members in fields.items("sets"))
    if not sets or not all(sets):
        fields.fail("sets", "is empty or has an empty replica set")
    return sets


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


def _shard_bytes(fields: Fields) -> int:
    try:
        return check_shard_size(fields.number("shard_bytes"))
    except BadValue as error:
        fields.fail("shard_bytes", str(error))


def _policy(text: str) -> Policy:
    try:
        return Policy(text)
    except ValueError:
        raise BadValue(f"{text!r} is a policy this program does not know") from None


def _failure_domain(text: str) -> FailureDomain:
    try:
        return FailureDomain(text)
    except ValueError:
        raise BadValue(f"{text!r} is a failure domain this program does not know") from None


def _when_full(text: str) -> WhenFull:
    try:
        return WhenFull(text)
    except ValueError:
        raise BadValue(f"{text!r} is nothing that this program does on full disks") from None


def _not_empty(text: str) -> str:
    if not text:
        raise BadValue("is empty")
    return text
