"""What the command line does to find what changed in an image since a snapshot of it."""

from collections.abc import Callable, Iterator

from hci.config import Config
from hci.images import answering_uri, gateway_for, holder_of
from shard.errors import HciError
from vmstore import changes
from vmstore.catalog import Catalog
from vmstore.changes import Changed
from vmstore.names import ImageName, SnapshotName


class NotComparable(HciError):
    """Two states of which the first is not a snapshot of the second's past."""


def since(
    config: Config,
    records: Catalog,
    older: SnapshotName,
    newer: ImageName | SnapshotName,
    progress: Callable[[float], None],
) -> Iterator[Changed]:
    """Yield what was written to an image since its snapshot `older`, up to `newer`.

    Raises UnknownImage, UnknownSnapshot, NotComparable, Unreachable where no gateway runs here, and
    NbdFailed with the gateway's reason.
    """
    record, snapshot = records.find_snapshot(older)
    image = newer.image if isinstance(newer, SnapshotName) else newer
    if image != older.image:
        raise NotComparable(f"{older} is no snapshot of {image}: name two states of one image")
    holder = None
    if isinstance(newer, SnapshotName):
        later = records.find_snapshot(newer)[1]
        if later.generation <= snapshot.generation:
            which = "the same as" if later == snapshot else "newer than"
            raise NotComparable(f"{older} is {which} {newer}: name the older one first")
    else:
        holder = holder_of(records, record.id)
    answering_uri(config, newer, holder)
    path = gateway_for(config, holder).nbd_socket
    return changes.since(path, newer, older.name, record.shard_bytes, progress)
