"""What the command line does to clone: records, and the gateway that has the parent."""

from hci.config import Config
from hci.snapshots import asked_of_keeper
from vmstore.catalog import Catalog
from vmstore.names import ImageName, SnapshotName


def create(config: Config, records: Catalog, source: SnapshotName, name: ImageName) -> int:
    """Make an image that holds what a snapshot does; return its size in bytes.

    Of a snapshot without clones the gateway that has its image, or one of this host, is asked first
    whether it lasts: one that etcd names may never have been stored. One that has a clone does.
    Raises Refused with the gateway's reason, and what `Catalog.clone_image` raises.
    """
    records.check_clone(source, name)
    record, snapshot = records.find_snapshot(source)
    layer = snapshot.layer
    if not records.has_clones(record.id, layer):
        layer = asked_of_keeper(
            config,
            records,
            source.image,
            record,
            lambda client: client.confirm_snapshot(record.id, source.name),
        )
    return records.clone_image(source, name, layer).record.size_bytes
