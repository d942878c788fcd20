"""What the command line does with an image beyond one record: daemons and records together."""

import time
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

from etcd.records import ImageRecord, NodeRecord
from hci.config import Config, GatewayConfig
from hci.control import GatewayClient, NodeClient
from hci.errors import ConfigError, ControlError
from shard.ids import ImageId
from vmstore import check as replicas
from vmstore import transfer
from vmstore.catalog import Catalog
from vmstore.errors import ImageInUse
from vmstore.transfer import Source

CLOSING_S = 10.0
"""How long a gateway may take to give an image back after its last client left."""


def used_bytes(record: ImageRecord, nodes: Mapping[str, NodeRecord]) -> dict[str, int]:
    """Physical bytes per node, of those that answer."""
    used = {}
    for name in sorted({node for members in record.sets for node in members}):
        try:
            with NodeClient(name, nodes[name].control) as client:
                used[name] = client.usage([record.id]).get(record.id, 0)
        except ControlError:
            continue
    return used


def url(gateway: GatewayConfig, name: str, *, tcp: bool = False) -> str:
    """Return the NBD URI of an image at a gateway."""
    if not tcp:
        return transfer.nbd_uri(name, gateway.nbd_socket)
    if gateway.nbd_listen is None:
        raise ConfigError(f"gateway.{gateway.name} has no `nbd_listen`, so it has no TCP address")
    return f"nbd://{gateway.nbd_listen}/{quote(name)}"


def remove(records: Catalog, name: str) -> None:
    """Remove an image, and have the nodes that are up delete its data at once.

    One that is down deletes it when it starts: it finds the tombstone.
    """
    record = records.find(name)[0]
    records.delete_image(name)
    nodes = records.nodes()
    for node in sorted({node for members in record.sets for node in members}):
        if node in nodes:
            _delete_at(nodes[node], record.id)


def _delete_at(node: NodeRecord, image: ImageId) -> None:
    try:
        with NodeClient(node.name, node.control) as client:
            client.delete(image)
    except ControlError:
        return


def resize(config: Config, records: Catalog, name: str, size_bytes: int, *, force: bool) -> None:
    """Change an image's size: by its holder where it is open, else in its record."""
    record = records.find(name)[0]
    lease = records.lease_of(record.id)
    if lease is None:
        records.set_size(name, size_bytes, force)
        return
    gateway = config.gateways.get(lease.gateway)
    if gateway is None:
        raise ImageInUse(name, lease.gateway)
    with GatewayClient(gateway.name, gateway.control) as client:
        client.resize(record.id, size_bytes, force=force)


def import_file(
    records: Catalog, name: str, source: Source, uri: str, progress: transfer.Progress
) -> None:
    """Create an image and fill it from a file. Where that fails, no image is left."""
    records.create_image(name, source.size_bytes)
    try:
        transfer.fill(source, uri, progress)
    except BaseException:
        _remove_when_closed(records, name)
        raise


def _remove_when_closed(records: Catalog, name: str) -> None:
    deadline = time.monotonic() + CLOSING_S
    while True:
        try:
            return remove(records, name)
        except ImageInUse:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def check(
    config: Config, records: Catalog, name: str, progress: transfer.Progress
) -> replicas.Report:
    """Compare the replicas of an image that are in sync and up.

    After an unclean end replicas may differ until the image is opened, which makes them equal: so
    one that was not closed cleanly is opened for a moment first.
    """
    record = records.find(name)[0]
    if not record.clean:
        transfer.touch(transfer.nbd_uri(name, _gateway_of(config, records, record).nbd_socket))
        record = records.find(name)[0]
    nodes = records.nodes()

    def digests(wanted: Collection[str], first: int, count: int) -> dict[str, dict[int, bytes]]:
        def ask(node: str) -> dict[int, bytes]:
            with NodeClient(node, nodes[node].control) as client:
                return dict(client.digests(record.id, first, count))

        with ThreadPoolExecutor(max(len(wanted), 1)) as pool:
            return dict(zip(wanted, pool.map(ask, wanted), strict=True))

    def pause(attempt: int) -> None:
        time.sleep(0.1 * 2**attempt)

    return replicas.compare(record, records.alive(), digests, progress, pause)


def _gateway_of(config: Config, records: Catalog, record: ImageRecord) -> GatewayConfig:
    """The gateway that has the image open, or else any of this host."""
    lease = records.lease_of(record.id)
    if lease is not None and lease.gateway in config.gateways:
        return config.gateways[lease.gateway]
    if not config.gateways:
        raise ConfigError("no [gateway.…] in it, so no image can be reached", config.path)
    return config.gateways[min(config.gateways)]
