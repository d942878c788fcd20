"""The records that make up the cluster's state, and their exact JSON.

That of an image stands in `etcd/images.py`, that of its scrubs in `etcd/scrubs.py`.

Each record encodes to canonical JSON with a version `v`, and decodes only from a value that keeps
all its rules. Fields that this version does not know are kept in `extra` and written back: while
hosts are upgraded one by one, an older program must not drop what a newer one wrote. A change that
an older program must not overlook raises `v`, and the older program refuses the record.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from etcd import keys
from etcd.fields import (
    Fields,
    Json,
    encode,
    not_empty,
    policy_of,
    sets_json,
    sets_of,
    shard_bytes_of,
)
from shard.errors import BadValue
from shard.ids import ImageId, holder_id, image_id, node_name, pool_name
from shard.membership import FIRST_GENERATION, Policy, WhenFull
from shard.placement import FailureDomain, ReplicaSet

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
            by=fields.text("by", not_empty),
            why=fields.text("why", not_empty),
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
        return cls(by=fields.text("by", not_empty), extra=fields.rest())


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
            address=fields.text("address", not_empty),
            control=fields.text("control", not_empty),
            socket=fields.optional_text("socket", not_empty),
            host=fields.text("host", not_empty),
            zone=fields.text("zone", not_empty),
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
            address=fields.text("address", not_empty),
            host=fields.text("host", not_empty),
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
            policy=fields.text("policy", policy_of),
            shard_bytes=shard_bytes_of(fields),
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
        return {"pool": self.pool, "version": self.version, "sets": sets_json(self.sets)}

    @classmethod
    def _take(cls, fields: Fields) -> Self:
        return cls(
            pool=fields.text("pool", pool_name),
            version=fields.number("version", 1),
            sets=sets_of(fields),
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
class CloneRecord(Record):
    """Says that an image is a clone of another one, both as its key has them.

    Made and deleted with the clone. While there is one, what it begins on stays.
    """

    def _fields(self) -> dict[str, Json]:
        return {}

    @classmethod
    def _take(cls, fields: Fields) -> Self:
        return cls(extra=fields.rest())


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
            gateway=fields.text("gateway", not_empty),
            holder=fields.text("holder", holder_id),
            epoch=fields.number("epoch", 1),
            lock=fields.text("lock", not_empty) if fields.has("lock") else None,
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
            awaits = fields.texts("awaits", fields.items("awaits"), not_empty)
        return cls(
            id=fields.text("id", image_id),
            generation=fields.number("generation", FIRST_GENERATION),
            awaits=awaits,
            extra=fields.rest(),
        )


def awaited_arbiter(name: str) -> str:
    """Return how a tombstone's `awaits` names an arbiter: a node may have the same name."""
    return f"arbiter/{name}"


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
