"""What the command line does with an image beyond one record: daemons and records together."""

import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from urllib.parse import quote

from etcd.images import ImageRecord
from etcd.records import NodeRecord
from hci import control_pb2 as pb
from hci.config import Config, GatewayConfig
from hci.control import GatewayClient, NodeClient
from hci.errors import ConfigError, ControlError, OpenElsewhere, Unreachable
from shard.geometry import check_image_size
from shard.ids import ImageId
from vmstore import check as replicas
from vmstore import transfer
from vmstore.catalog import Catalog
from vmstore.errors import InUse, ShrinkRefused, UnknownImage
from vmstore.interrupts import undisturbed
from vmstore.names import ImageName, SnapshotName
from vmstore.transfer import Source

CLOSING_S = 20.0
"""How long an image may stay taken after its last client left: at most until the lease of a gateway
that died has expired (10 s), with room."""

LEAVING_S = 1.0
"""How long a gateway may still count a client whose process has ended."""

LEVELLING_S = 20.0
"""How long a check waits for the next shard to be made equal; then it compares what there is."""

_AGAIN_S = 0.1


def used_bytes(record: ImageRecord, nodes: Mapping[str, NodeRecord]) -> dict[str, int]:
    """Physical bytes per node, of those that answer."""
    used = {}
    for node in _placed(record, nodes):
        with suppress(ControlError), NodeClient(node.name, node.control) as client:
            used[node.name] = client.usage([record.id]).get(record.id, 0)
    return used


def _placed(record: ImageRecord, nodes: Mapping[str, NodeRecord]) -> list[NodeRecord]:
    """Return the nodes that an image is placed on.

    One that no recovery of etcd has heard of is not known before it registers.
    """
    names = sorted({node for members in record.sets for node in members})
    return [nodes[name] for name in names if name in nodes]


def holder_of(records: Catalog, image: ImageId) -> str | None:
    """Return the name of the gateway that has the image open for a client, or None."""
    lease = records.lease_of(image)
    return lease.record.gateway if lease is not None and not lease.record.maintenance else None


def keeper_of(records: Catalog, image: ImageId) -> str | None:
    """Return the name of the gateway that has the image open, for whatever, or None.

    One that heals it, or waits for merges, does as well what a person wants; others are refused.
    """
    lease = records.lease_of(image)
    return lease.record.gateway if lease is not None else None


def gateway_for(config: Config, preferred: str | None) -> GatewayConfig:
    """Return a gateway of this host: `preferred` if it is one, else the first."""
    if not config.gateways:
        raise ConfigError("no [gateway.…] in it, so no image can be reached", config.path)
    if preferred is not None and preferred in config.gateways:
        return config.gateways[preferred]
    return config.gateways[min(config.gateways)]


def answering_uri(config: Config, name: ImageName | SnapshotName, holder: str | None) -> str:
    """Return the NBD URI of an image at its holder, else at any gateway of this host.

    A snapshot is there at any gateway.

    Raises Unreachable where that gateway does not run: its socket may be held open for it all the
    same, and a client that connected would wait without end.
    """
    gateway = gateway_for(config, holder)
    with GatewayClient(gateway.name, gateway.control) as client:
        client.status()
    return url(gateway, name)


def url(gateway: GatewayConfig, name: ImageName | SnapshotName, *, tcp: bool = False) -> str:
    """Return the NBD URI of an image or snapshot at a gateway."""
    if not tcp:
        return transfer.nbd_uri(str(name), gateway.nbd_socket)
    if gateway.nbd_listen is None:
        raise ConfigError(f"gateway.{gateway.name} has no `nbd_listen`, so it has no TCP address")
    scheme = "nbds" if gateway.tls is not None and gateway.tls.tcp != "off" else "nbd"
    return f"{scheme}://{gateway.nbd_listen}/{quote(str(name))}"


def remove(
    config: Config,
    records: Catalog,
    name: ImageName,
    only: ImageId | None = None,
    *,
    with_snapshots: bool = False,
) -> None:
    """Remove an image, and have the nodes that are up delete its data at once.

    One that is down deletes it when it starts: it finds the tombstone. An image that its gateway is
    closing is waited for. With `only` that image alone: one that was made since under its name is
    not it. Raises InUse where a client has it open, HasSnapshots where it has some that are not to
    go with it. Who reads one gets errors.
    """
    record = records.find(name).record
    if only is not None and record.id != only:
        raise UnknownImage(str(name))

    def patience_s(gateway: str) -> float:
        return CLOSING_S if _is_closing(config, gateway, record.id) else LEAVING_S

    _remove_when_closed(records, name, record, patience_s, with_snapshots=with_snapshots)


def _is_closing(config: Config, gateway: str, image: ImageId) -> bool:
    """Whether a gateway that has an image says that it is giving it back, or has by now."""
    section = config.gateways.get(gateway)
    if section is None:
        return False
    try:
        with GatewayClient(section.name, section.control) as client:
            held = [each for each in client.status().images if each.image_id == image]
    except ControlError:
        return False
    return all(each.state == pb.OpenImage.STATE_CLOSING for each in held)


def _remove_when_closed(
    records: Catalog,
    name: ImageName,
    record: ImageRecord,
    patience_s: Callable[[str], float],
    *,
    with_snapshots: bool = False,
) -> None:
    """Remove an image, as soon as nobody has it. `patience_s`: how long a gateway is waited for."""
    begun_s = time.monotonic()
    while True:
        try:
            records.delete_image(name, only=record.id, with_snapshots=with_snapshots)
            break
        except InUse as error:
            if time.monotonic() - begun_s > patience_s(error.gateway):
                raise
            time.sleep(_AGAIN_S)
    for node in _placed(record, records.nodes()):
        _delete_at(node, record.id)


def _delete_at(node: NodeRecord, image: ImageId) -> None:
    with suppress(ControlError), NodeClient(node.name, node.control) as client:
        client.delete(image)


def resize(
    config: Config,
    records: Catalog,
    name: ImageName,
    size_bytes: int,
    *,
    force: bool,
    reconnect: bool = False,
) -> int:
    """Change an image's size; return how many connections do not see it until they are renewed.

    One that nobody has open grows by its record alone. Else its gateway does it, on whatever host,
    and a shrink of a closed one is a gateway's work too: it discards what is cut off.

    Raises OpenElsewhere where it is open on another host whose gateway cannot be asked from here.
    """
    check_image_size(size_bytes)
    record = records.find(name).record
    if size_bytes < record.size_bytes and not force:
        raise ShrinkRefused(str(name), record.size_bytes, size_bytes)
    if records.lease_of(record.id) is None and size_bytes >= record.size_bytes:
        # A gateway that has taken it meanwhile does it.
        with suppress(InUse):
            records.grow_image(name, size_bytes)
            return 0
    with holding(config, records, name, keeper_of(records, record.id)) as client:
        return client.resize(record.id, size_bytes, force=force, reconnect=reconnect)


@contextmanager
def holding(
    config: Config, records: Catalog, name: ImageName, holder: str | None
) -> Iterator[GatewayClient]:
    """Give a client of the gateway that has an image, or of one of this host where none has it."""
    if holder is None or holder in config.gateways:
        own = gateway_for(config, holder)
        with GatewayClient(own.name, own.control) as client:
            yield client
        return
    known = records.gateways().get(holder)
    if known is None:
        # It has just died: its leases end, and another one may open the image.
        raise InUse(str(name), holder)
    with GatewayClient(known.name, known.control) as client:
        try:
            answering = client.status().holder_id
        except Unreachable as error:
            raise OpenElsewhere(str(name), known.name, known.host, known.control) from error
        # Its address may be one for its own host alone, at which another one answers here.
        if answering != known.holder:
            raise OpenElsewhere(str(name), known.name, known.host, known.control)
        yield client


def import_file(
    records: Catalog, name: ImageName, source: Source, uri: str, progress: transfer.Progress
) -> None:
    """Create an image and fill it from a file. Where that fails, no image is left.

    Where this process is killed meanwhile the image counts as an interrupted import.
    """
    made = None
    try:
        # An interrupt that comes when etcd has the image, but has not said so, must not leave it.
        with undisturbed():
            made = records.create_image(name, source.size_bytes, imported_by=socket.gethostname())
        transfer.fill(source, uri, progress)
        records.finish_import(made.record.id)
    except BaseException:
        if made is not None:
            # Somebody else may have removed it meanwhile.
            with undisturbed(), suppress(UnknownImage):
                _remove_when_closed(records, name, made.record, lambda _gateway: CLOSING_S)
        raise


def check(
    config: Config, records: Catalog, name: ImageName, progress: transfer.Progress
) -> list[replicas.Report]:
    """Compare the replicas of an image that are in sync and up: of what it holds now, then of each
    snapshot, the oldest first.

    After an unclean end replicas may differ until the image is opened, which makes them equal: so
    one that was not closed cleanly is opened first, for as long as that takes.
    """
    record = records.find(name).record
    if not record.clean:
        holder = holder_of(records, record.id)
        uri = answering_uri(config, name, holder)
        transfer.touch(uri, str(name))
        _level(gateway_for(config, holder), uri, record.id)
        record = records.find(name).record
    nodes = records.nodes()

    def digests(
        layer: int, wanted: Collection[str], first: int, count: int
    ) -> dict[str, dict[int, bytes]]:
        def ask(node: str) -> dict[int, bytes]:
            with NodeClient(node, nodes[node].control) as client:
                return dict(client.digests(record.id, first, count, layer))

        with ThreadPoolExecutor(max(len(wanted), 1)) as pool:
            return dict(zip(wanted, pool.map(ask, wanted), strict=True))

    def pause(attempt: int) -> None:
        time.sleep(0.1 * 2**attempt)

    up = _answering(record, nodes)

    def compared(state: ImageRecord, layer: int, done: Callable[[float], None]) -> replicas.Report:
        return replicas.compare(state, up, partial(digests, layer), done, pause)

    count = 1 + len(record.snapshots)
    reports = [compared(record, 0, lambda done: progress(done / count))]
    for index, snapshot in enumerate(record.snapshots, 1):
        state = replace(record, size_bytes=snapshot.size_bytes)
        report = compared(state, snapshot.layer, partial(_part, progress, index, count))
        reports.append(replace(report, snapshot=snapshot.name))
    return reports


def _part(progress: transfer.Progress, index: int, count: int, done: float) -> None:
    progress((index + done) / count)


def _level(gateway: GatewayConfig, uri: str, image: ImageId) -> None:
    """Keep an image open until its replicas in sync are level, or that does not get on."""
    with (
        suppress(ControlError),
        GatewayClient(gateway.name, gateway.control) as client,
        transfer.held_open(uri) as is_open,
    ):
        left, since_s = -1, time.monotonic()
        while left != 0 and is_open() and time.monotonic() - since_s < LEVELLING_S:
            now = _shards_to_level(client, image)
            if now != left:
                left, since_s = now, time.monotonic()
            else:
                time.sleep(_AGAIN_S)


def _shards_to_level(client: GatewayClient, image: ImageId) -> int:
    """Return how many a gateway still has to make equal; -1 where it does not serve the image."""
    unopened = (pb.OpenImage.STATE_OPENING, pb.OpenImage.STATE_CLOSING)
    for each in client.status().images:
        if each.image_id == image and each.clients and each.state not in unopened:
            return int(each.counters["levelling_shards_left"])
    return -1


def _answering(record: ImageRecord, nodes: Mapping[str, NodeRecord]) -> list[str]:
    """The image's nodes that answer now. One that died counts as alive in etcd for a while yet."""
    answering = []
    for node in _placed(record, nodes):
        with suppress(ControlError), NodeClient(node.name, node.control) as client:
            client.status()
            answering.append(node.name)
    return answering
