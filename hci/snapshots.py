"""What the command line does with snapshots: records, and the gateway that has the image."""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TypeVar

from etcd.errors import EtcdError
from etcd.images import ImageRecord, Snapshot
from hci import control_pb2 as pb
from hci.config import Config
from hci.control import GatewayClient
from hci.errors import Refused
from hci.images import holding, keeper_of
from shard.ids import ImageId, pool_name
from vmstore.catalog import Catalog
from vmstore.errors import UnknownImage
from vmstore.names import ImageName, SnapshotName, parse_image_name

T = TypeVar("T")

MERGE_POLL_S = 0.5
"""Between looks whether a merge is over."""

ATTEMPTS = 3
"""Gateways that are asked while an image goes from one to the next under our eyes."""


def create(config: Config, records: Catalog, name: SnapshotName) -> pb.SnapshotReply:
    """Take a snapshot, at the gateway that has the image or one of this host.

    Whether there is one of that name the gateway says: what etcd names may never have been stored,
    and goes as the image is opened. Raises Refused with the gateway's reason, Undecided where it
    may have been taken, and OpenElsewhere where the image is open on another host whose gateway
    cannot be asked from here.
    """
    record = records.find(name.image).record
    return asked_of_keeper(
        config, records, name.image, record, lambda client: client.snapshot(record.id, name.name)
    )


def roll_back(
    config: Config, records: Catalog, name: SnapshotName, *, force: bool
) -> pb.RollbackReply:
    """Have an image hold what its snapshot does, at the gateway that has it or one of this host.

    Raises UnknownSnapshot, HasClones, Refused with the gateway's reason, such as a client that has
    the image open, Undecided where it is not known what came of it, and OpenElsewhere as `create`.
    """
    record, snapshot = records.find_snapshot(name)
    records.check_no_clones(f"what is newer than {name}", record.id, snapshot.layer + 1)
    return asked_of_keeper(
        config,
        records,
        name.image,
        record,
        lambda client: client.roll_back(record.id, name.name, force=force),
    )


def remove(config: Config, records: Catalog, name: SnapshotName) -> tuple[ImageId, int]:
    """Remove a snapshot, at the gateway that has the image or one of this host.

    Return image and layer, for `await_merge`. Raises UnknownSnapshot, HasClones, Refused with the
    gateway's reason, Undecided where it is not known what came of it, and OpenElsewhere as
    `create`.
    """
    record, snapshot = records.find_snapshot(name)
    records.check_no_clones(str(name), record.id, snapshot.layer, snapshot.layer)
    layer = asked_of_keeper(
        config,
        records,
        name.image,
        record,
        lambda client: client.remove_snapshot(record.id, name.name),
    )
    return record.id, layer


def await_merge(records: Catalog, image: ImageId, layer: int) -> None:
    """Return when all nodes have merged a layer, or the image is removed."""
    with suppress(UnknownImage):
        while layer in records.image(image).record.merging:
            time.sleep(MERGE_POLL_S)


def asked_of_keeper(
    config: Config,
    records: Catalog,
    name: ImageName,
    record: ImageRecord,
    ask: Callable[[GatewayClient], T],
) -> T:
    """Ask the gateway that has an image; return what it answers."""
    for attempt in range(1, ATTEMPTS + 1):
        holder = keeper_of(records, record.id)
        with holding(config, records, name, holder) as client:
            try:
                return ask(client)
            except Refused as error:
                # Where somebody opened the image meanwhile, that one's gateway is asked.
                now = None
                with suppress(EtcdError):
                    now = keeper_of(records, record.id)
                if attempt == ATTEMPTS or now in (None, error.daemon):
                    raise
    raise AssertionError("the last attempt returns or raises")


def listed(records: Catalog, where: str | None) -> Iterator[tuple[SnapshotName, Snapshot]]:
    """Yield the snapshots of an image, of the images of a pool, or of all, the oldest first.

    Raises UnknownPool, UnknownImage, BadName.
    """
    for name, record in _found(records, where):
        for snapshot in record.snapshots:
            yield SnapshotName(name, snapshot.name), snapshot


def merging(records: Catalog, where: str | None) -> Iterator[tuple[ImageName, int]]:
    """Yield the images of these that have layers of removed snapshots, and how many."""
    for name, record in _found(records, where):
        if record.merging:
            yield name, len(record.merging)


def _found(records: Catalog, where: str | None) -> list[tuple[ImageName, ImageRecord]]:
    if where is not None and "/" in where:
        image = parse_image_name(where)
        return [(image, records.find(image).record)]
    pool = None if where is None else pool_name(where)
    return [(entry.name, entry.image.record) for entry in records.images(pool)]
