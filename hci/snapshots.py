"""What the command line does with snapshots: records, and the gateway that has the image."""

from collections.abc import Iterator
from contextlib import suppress

from etcd.errors import EtcdError
from etcd.images import Snapshot
from hci import control_pb2 as pb
from hci.config import Config
from hci.errors import Refused
from hci.images import holder_of, holding
from shard.ids import pool_name
from vmstore.catalog import Catalog
from vmstore.names import ImageName, SnapshotName, parse_image_name

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
    for attempt in range(1, ATTEMPTS + 1):
        holder = holder_of(records, record.id)
        with holding(config, records, name.image, holder) as client:
            try:
                return client.snapshot(record.id, name.name)
            except Refused as error:
                # Where somebody opened the image meanwhile, that one's gateway takes it.
                now = None
                with suppress(EtcdError):
                    now = holder_of(records, record.id)
                if attempt == ATTEMPTS or now in (None, error.daemon):
                    raise
    raise AssertionError("the last attempt returns or raises")


def listed(records: Catalog, where: str | None) -> Iterator[tuple[SnapshotName, Snapshot]]:
    """Yield the snapshots of an image, of the images of a pool, or of all, the oldest first.

    Raises UnknownPool, UnknownImage, BadName.
    """
    if where is not None and "/" in where:
        image = parse_image_name(where)
        found = [(image, records.find(image).record)]
    else:
        pool = None if where is None else pool_name(where)
        found = [(entry.name, entry.image.record) for entry in records.images(pool)]
    for name, record in found:
        yield from _of_image(name, record.snapshots)


def _of_image(
    name: ImageName, snapshots: tuple[Snapshot, ...]
) -> Iterator[tuple[SnapshotName, Snapshot]]:
    for snapshot in snapshots:
        yield SnapshotName(name, snapshot.name), snapshot
