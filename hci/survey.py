"""Looks at the whole cluster once: what etcd says, and what the daemons say of themselves.

What is away is found to be so, and is no error; nothing is asked twice, and nothing is changed.
Whether all is well by that, and what to do if not, says `hci.health`.
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace

from arbiter import arbiter_pb2 as arbiter_pb
from arbiter.errors import ArbiterError
from etcd.errors import EtcdUnavailable
from etcd.gateways import GatewayRecord
from etcd.images import ImageRecord
from etcd.records import ArbiterRecord, NodeRecord, PlacementRecord, PoolRecord
from etcd.scrubs import ScrubRecord
from hci import control_pb2 as pb
from hci.config import Config
from hci.connect import arbiter_client, catalog
from hci.control import DEADLINE_S, GatewayClient, NodeClient
from hci.dev.process import last_line
from hci.errors import ControlError
from vmstore.catalog import Catalog
from vmstore.errors import RecordsLost, UnknownPool

ASK_DEADLINE_S = DEADLINE_S
"""A daemon that is silent for longer is shown as down; all of a kind are asked at once."""

NOT_REGISTERED = "etcd does not say that it is alive"
FAILED = "hci: "
"""Begins the last words of a process that ended with an error."""


@dataclass(frozen=True)
class NodeView:
    """A node by its record and by its own word; `state` is up, starting, stopping, failed, down."""

    name: str
    state: str
    host: str
    zone: str
    address: str
    data_dir: str | None
    capacity_bytes: int | None
    used_bytes: int | None
    trouble: str
    ended: str = ""
    """Why its process ended by itself, where that can be found out here."""
    history_lost: bool = False
    unknown: Sequence[pb.UnknownImage] = ()
    """Images with data there that etcd does not know."""

    @property
    def unknown_bytes(self) -> int:
        """What unknown images take there."""
        return sum(image.physical_bytes for image in self.unknown)


@dataclass(frozen=True)
class GatewayView:
    """A gateway of this configuration, or one that runs elsewhere, by its own word.

    `state` is up, starting, stopping, down, or silent: etcd says that it runs, and it cannot be
    asked.
    """

    name: str
    state: str
    host: str
    trouble: str
    images: Sequence[pb.OpenImage] = ()
    finished_heals: Sequence[pb.FinishedHeal] = ()


@dataclass(frozen=True)
class ArbiterView:
    """A thin arbiter by its record and by its own word; `pools` are those it votes for."""

    name: str
    state: str
    host: str
    address: str
    id: str
    pools: Sequence[str]
    images: int | None
    trouble: str
    history_lost: bool = False


@dataclass(frozen=True)
class Survey:
    """What was found. `etcd` is empty where it answers, else what is wrong with it."""

    etcd: str
    nodes: Sequence[NodeView] = ()
    gateways: Sequence[GatewayView] = ()
    pools: Mapping[str, PoolRecord] = field(default_factory=dict)
    placements: Mapping[str, PlacementRecord] = field(default_factory=dict)
    images: Mapping[str, ImageRecord] = field(default_factory=dict)
    scrubs: Mapping[str, ScrubRecord] = field(default_factory=dict)
    arbiters: Sequence[ArbiterView] = ()
    is_dev: bool = False
    lost: str = ""
    """How it was found that etcd lost history; empty where it did not."""


def survey(config: Config) -> Survey:
    """Look at the cluster. Raises nothing for what is merely down: that is what it is to find.

    Raises OtherCluster where etcd holds another cluster, as all here do.
    """
    is_dev = config.dev is not None
    try:
        with catalog(config, may_be_empty=True) as records:
            pools = records.pools()
            entries, scrubs = records.images(), records.scrubs()
            lost = records.lost()
            return Survey(
                lost=f"{lost.record.by} found that {lost.record.why}" if lost is not None else "",
                etcd="",
                nodes=_registered(config, records),
                gateways=_gateways(config, records.gateways()),
                pools=pools,
                placements=_placements(records, pools),
                images={str(entry.name): entry.image.record for entry in entries},
                scrubs={
                    str(entry.name): scrubs[entry.image.record.id].record
                    for entry in entries
                    if entry.image.record.id in scrubs
                },
                arbiters=_arbiters(config, records.arbiters(), pools),
                is_dev=is_dev,
            )
    except EtcdUnavailable as error:
        return Survey(
            etcd=str(error),
            nodes=_nodes(config, {}),
            gateways=_gateways(config, {}),
            arbiters=_arbiters(config, {}, {}),
            is_dev=is_dev,
        )


def _placements(records: Catalog, pools: Iterable[str]) -> dict[str, PlacementRecord]:
    """Return the placements of pools; an etcd that lost history may lack some."""
    found = {}
    for name in pools:
        with suppress(UnknownPool, RecordsLost):
            found[name] = records.placement(name).record
    return found


def nodes(config: Config) -> Sequence[NodeView]:
    """Every node that is registered or configured here. Raises EtcdUnavailable."""
    with catalog(config, may_be_empty=True) as records:
        return _registered(config, records)


def arbiters(config: Config) -> Sequence[ArbiterView]:
    """Every arbiter that is registered and was not replaced. Raises EtcdUnavailable."""
    with catalog(config, may_be_empty=True) as records:
        return _arbiters(config, records.arbiters(), records.pools())


def gateways(config: Config) -> Sequence[GatewayView]:
    """Every gateway that runs or is configured here. Raises EtcdUnavailable."""
    with catalog(config, may_be_empty=True) as records:
        return _gateways(config, records.gateways())


def _registered(config: Config, records: Catalog) -> list[NodeView]:
    views = _nodes(config, records.nodes())
    # Asked for after the nodes: one that registered meanwhile would seem to have been forgotten.
    alive = records.alive()
    views = [
        replace(view, state="starting", trouble=view.trouble or NOT_REGISTERED)
        if view.state == "up" and view.name not in alive
        else view
        for view in views
    ]
    if not any(view.unknown for view in views):
        return views
    # A node hears of new images a moment later than their first writes reach it.
    known = {entry.image.record.id for entry in records.images()} | records.tombstones().keys()
    return [
        replace(view, unknown=[each for each in view.unknown if each.image_id not in known])
        for view in views
    ]


def _nodes(config: Config, records: Mapping[str, NodeRecord]) -> list[NodeView]:
    names = sorted({*records, *config.nodes})
    if not names:
        return []
    with ThreadPoolExecutor(min(len(names), 32)) as pool:
        return list(pool.map(lambda name: _node(config, name, records.get(name)), names))


def _node(config: Config, name: str, record: NodeRecord | None) -> NodeView:
    here = config.nodes.get(name)
    # A name comes from the records or from the configuration.
    control = record.control if record else str(config.node(name).control)
    status, trouble = None, ""
    try:
        with NodeClient(name, control, deadline_s=ASK_DEADLINE_S) as client:
            status = client.status()
            trouble = status.trouble
    except ControlError as error:
        trouble = str(error)
    state = _STATES[status.state] if status is not None else "down"
    return NodeView(
        name=name,
        state=state,
        host=record.host if record else here.host if here else "",
        zone=record.zone if record else here.zone if here else "",
        address=record.address if record else str(here.listen) if here else "",
        data_dir=(status.data_dir if status else "") or (str(here.data_dir) if here else None),
        capacity_bytes=status.capacity_bytes if status else _capacity(record),
        used_bytes=(status.used_bytes or None) if status else None,
        trouble=trouble,
        ended="" if status is not None else _ended(config, name),
        history_lost=status is not None and status.history_lost,
        unknown=status.unknown if status is not None else (),
    )


def _ended(config: Config, member: str) -> str:
    """Return what a member of a cluster of this machine said last, if that was an error."""
    if config.dev is None:
        return ""
    said = last_line(config.dev.log_dir / f"{member}.log")
    return said.removeprefix(FAILED) if said.startswith(FAILED) else ""


def _arbiters(
    config: Config, records: Mapping[str, ArbiterRecord], pools: Mapping[str, PoolRecord]
) -> list[ArbiterView]:
    known = {name: record for name, record in records.items() if not record.retired}
    here = {name: own for name, own in config.arbiters.items() if name not in records}
    names = sorted({*known, *here})
    if not names:
        return []

    def look(name: str) -> ArbiterView:
        votes_for = [pool.name for pool in pools.values() if pool.arbiter == name]
        return _arbiter(config, name, known.get(name), sorted(votes_for))

    with ThreadPoolExecutor(min(len(names), 32)) as pool:
        return list(pool.map(look, names))


def _arbiter(
    config: Config, name: str, record: ArbiterRecord | None, pools: Sequence[str]
) -> ArbiterView:
    # A name comes from the records or from the configuration.
    address = record.address if record is not None else str(config.arbiter(name).listen)
    host = record.host if record is not None else config.arbiter(name).host
    status, state, trouble = None, "down", ""
    try:
        with arbiter_client(name, address, deadline_s=ASK_DEADLINE_S) as client:
            status = client.status()
        state, trouble = _ARBITER_STATES[status.state], status.trouble
        if record is not None and status.arbiter_id != record.id:
            state, trouble = "failed", f"another arbiter, {status.name}, answers at {address}"
    except ArbiterError as error:
        trouble = str(error)
    return ArbiterView(
        name=name,
        state=state,
        host=host,
        address=address,
        id=record.id if record is not None else status.arbiter_id if status is not None else "",
        pools=pools,
        images=status.images if status is not None else None,
        trouble=trouble,
        history_lost=status is not None and status.history_lost,
    )


def _capacity(record: NodeRecord | None) -> int | None:
    return record.capacity_bytes if record else None


def _gateways(config: Config, records: Mapping[str, GatewayRecord]) -> list[GatewayView]:
    names = sorted({*records, *config.gateways})
    if not names:
        return []
    with ThreadPoolExecutor(min(len(names), 32)) as pool:
        return list(pool.map(lambda name: _gateway(config, name, records.get(name)), names))


def _gateway(config: Config, name: str, record: GatewayRecord | None) -> GatewayView:
    here = config.gateways.get(name)
    # A name comes from the records or from the configuration.
    control = str(here.control) if here else record.control if record else ""
    host = here.host if here else record.host if record else ""
    away = "down" if here else "silent"
    try:
        with GatewayClient(name, control, deadline_s=ASK_DEADLINE_S) as client:
            status = client.status()
    except ControlError as error:
        return GatewayView(name, away, host, str(error))
    if status.name != name:
        return GatewayView(name, away, host, f"{status.name} answers at {control} in its place")
    return GatewayView(
        name,
        _GATEWAY_STATES[status.state],
        host,
        status.trouble,
        status.images,
        status.finished_heals,
    )


_STATES = {
    pb.NodeStatus.STATE_UNSPECIFIED: "starting",
    pb.NodeStatus.STATE_STARTING: "starting",
    pb.NodeStatus.STATE_SERVING: "up",
    pb.NodeStatus.STATE_STOPPING: "stopping",
    pb.NodeStatus.STATE_FAILED: "failed",
}

_GATEWAY_STATES = {
    pb.GatewayStatus.STATE_UNSPECIFIED: "starting",
    pb.GatewayStatus.STATE_STARTING: "starting",
    pb.GatewayStatus.STATE_SERVING: "up",
    pb.GatewayStatus.STATE_STOPPING: "stopping",
}

_ARBITER_STATES = {
    arbiter_pb.ArbiterStatus.STATE_UNSPECIFIED: "starting",
    arbiter_pb.ArbiterStatus.STATE_STARTING: "starting",
    arbiter_pb.ArbiterStatus.STATE_SERVING: "up",
    arbiter_pb.ArbiterStatus.STATE_STOPPING: "stopping",
    arbiter_pb.ArbiterStatus.STATE_FAILED: "failed",
}
