"""Looks at the whole cluster once, and says whether all is well and, if not, what to do.

`survey` asks etcd and the daemons; `judge` turns what was found into problems and is pure.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum

from arbiter import arbiter_pb2 as arbiter_pb
from arbiter.errors import ArbiterError
from etcd.errors import EtcdUnavailable
from etcd.images import ImageRecord
from etcd.records import ArbiterRecord, NodeRecord, PlacementRecord, PoolRecord
from etcd.scrubs import ScrubRecord
from hci import control_pb2 as pb
from hci.config import Config, GatewayConfig
from hci.connect import arbiter_client, catalog
from hci.control import DEADLINE_S, GatewayClient, NodeClient
from hci.errors import ControlError
from shard.geometry import format_size
from vmstore.catalog import Catalog
from vmstore.errors import RecordsLost, UnknownPool

ASK_DEADLINE_S = DEADLINE_S
"""A daemon that is silent for longer is shown as down; all of a kind are asked at once."""


class Health(StrEnum):
    """The cluster in one word, from best to worst."""

    OK = "ok"
    HEALING = "healing"
    """Not well, and will be by itself."""
    DEGRADED = "degraded"
    """All images are served, some with fewer copies than they should have."""
    UNAVAILABLE = "unavailable"
    """Some image cannot be written, or nothing can be said."""


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
    history_lost: bool = False
    unknown: Sequence[pb.UnknownImage] = ()
    """Images with data there that etcd does not know."""

    @property
    def unknown_bytes(self) -> int:
        """What unknown images take there."""
        return sum(image.physical_bytes for image in self.unknown)


@dataclass(frozen=True)
class GatewayView:
    """A gateway of this configuration by its own word."""

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
class Problem:
    """One thing that is not well, and what a person can do about it."""

    health: Health
    what: str
    advice: str


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

    @property
    def problems(self) -> Sequence[Problem]:
        """The worst first."""
        order = list(Health)
        return sorted(judge(self), key=lambda problem: -order.index(problem.health))

    @property
    def health(self) -> Health:
        """The worst there is."""
        problems = self.problems
        return problems[0].health if problems else Health.OK


def survey(config: Config) -> Survey:
    """Look at the cluster. Raises nothing for what is merely down: that is what it is to find."""
    gateways = _gateways(config)
    is_dev = config.dev is not None
    try:
        with catalog(config) as records:
            pools = records.pools()
            entries, scrubs = records.images(), records.scrubs()
            lost = records.lost()
            return Survey(
                lost=f"{lost.record.by} found that {lost.record.why}" if lost is not None else "",
                etcd="",
                nodes=_nodes(config, records.nodes(), records.alive()),
                gateways=gateways,
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
        nodes = _nodes(config, {}, None)
        arbiters = _arbiters(config, {}, {})
        return Survey(
            etcd=str(error), nodes=nodes, gateways=gateways, arbiters=arbiters, is_dev=is_dev
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
    with catalog(config) as records:
        return _nodes(config, records.nodes(), records.alive())


def arbiters(config: Config) -> Sequence[ArbiterView]:
    """Every arbiter that is registered and was not replaced. Raises EtcdUnavailable."""
    with catalog(config) as records:
        return _arbiters(config, records.arbiters(), records.pools())


def judge(found: Survey) -> Iterator[Problem]:
    """Yield what is not well."""
    if found.etcd:
        advice = "start it: `hci dev run etcd`" if found.is_dev else "start etcd on its hosts"
        yield Problem(Health.UNAVAILABLE, found.etcd, advice)
    if found.lost:
        yield Problem(
            Health.UNAVAILABLE,
            f"etcd lost history: {found.lost}. Open images are served as long as their nodes "
            "are there; nothing is opened, made or deleted, and no node is left behind",
            "put etcd's latest state back if there is one; else see what the nodes know with "
            "`hci cluster recover --dry-run`, and rebuild it with `hci cluster recover`",
        )
    yield from _judge_nodes(found)
    yield from _judge_gateways(found)
    yield from _judge_arbiters(found)
    yield from _judge_pools(found)
    yield from _judge_images(found)


def _judge_nodes(found: Survey) -> Iterator[Problem]:
    for node in found.nodes:
        if node.history_lost:
            told = f"{node.name} on {node.host} does not go by etcd: {node.trouble}"
            yield Problem(Health.UNAVAILABLE, told, "see above; it goes on by itself after that")
        elif node.state == "starting":
            yield Problem(Health.HEALING, f"{node.name} is starting", "wait")
        elif node.state != "up":
            # Of a node that is down there is no more to say than that it does not answer.
            told = f" ({node.trouble})" if node.trouble and node.state != "down" else ""
            start = f"hci dev run {node.name}" if found.is_dev else "systemctl start hci-node"
            where = "" if found.is_dev else f" on {node.host}"
            what = f"{node.name} on {node.host} is {node.state}{told}"
            yield Problem(Health.DEGRADED, what, f"start it{where}: `{start}`")
        elif node.trouble:
            what = f"{node.name} on {node.host}: {node.trouble}"
            yield Problem(Health.DEGRADED, what, f"see to it, and to the log of {node.name}")
        if node.unknown and not found.lost:
            size = format_size(node.unknown_bytes)
            yield Problem(
                Health.OK,
                f"{node.name} keeps {size} of {len(node.unknown)} images that etcd does not know",
                "`hci cluster leftovers` shows them, and what can be done",
            )


def _judge_gateways(found: Survey) -> Iterator[Problem]:
    up = [gateway for gateway in found.gateways if gateway.state == "up"]
    for gateway in found.gateways:
        if gateway.state == "starting":
            yield Problem(Health.HEALING, f"{gateway.name} is starting", "wait")
        elif gateway.state != "up":
            start = f"hci dev run {gateway.name}" if found.is_dev else "systemctl start hci-gateway"
            worst = Health.DEGRADED if up else Health.UNAVAILABLE
            yield Problem(worst, f"{gateway.name} is {gateway.state}", f"start it: `{start}`")
        for image in gateway.images:
            yield from _judge_open(image)
            yield from _judge_rot(found, image)
    yield from _judge_scrubs(found)


def _judge_arbiters(found: Survey) -> Iterator[Problem]:
    for arbiter in found.arbiters:
        if arbiter.state == "starting" and arbiter.history_lost:
            told = f"arbiter {arbiter.name} does not go by etcd: {arbiter.trouble}"
            yield Problem(Health.UNAVAILABLE, told, "see above; it goes on by itself after that")
        elif arbiter.state == "starting":
            yield Problem(Health.HEALING, f"arbiter {arbiter.name} is starting", "wait")
        elif arbiter.state != "up":
            told = f" ({arbiter.trouble})" if arbiter.trouble and arbiter.state != "down" else ""
            start = f"hci dev run {arbiter.name}" if found.is_dev else "systemctl start hci-arbiter"
            where = "" if found.is_dev else f" on {arbiter.host}"
            yield Problem(
                Health.DEGRADED if arbiter.pools or found.etcd else Health.OK,
                f"arbiter {arbiter.name} on {arbiter.host} is {arbiter.state}{told}: without it "
                "writes stall as soon as a node is lost",
                f"start it{where}: `{start}`; if it is lost for good: `hci arbiter replace`",
            )
        elif arbiter.trouble:
            yield Problem(
                Health.DEGRADED,
                f"arbiter {arbiter.name}: {arbiter.trouble}",
                f"start another one, then `hci arbiter replace {arbiter.name} NEW`",
            )


def _judge_open(image: pb.OpenImage) -> Iterator[Problem]:
    told = f": {image.trouble}" if image.trouble else ""
    if image.HasField("heal"):
        heal = image.heal
        shards = f"{heal.shards_total - heal.shards_done} of {heal.shards_total} shards"
        what = f"{heal.node} is healed for {image.name}, {shards} to go"
        yield Problem(Health.HEALING, what, "wait; `hci heal status` tells how long")
    left = image.counters["levelling_shards_left"] if image.counters else 0
    if left:
        total = left + image.counters["levelling_shards_done"]
        what = f"replicas of {image.name} are made equal, {left} of {total} shards to go"
        yield Problem(Health.HEALING, what, "wait; what a guest asks for comes first")
    if image.state == pb.OpenImage.STATE_OPENING:
        yield Problem(Health.HEALING, f"replicas of {image.name} are made equal", "wait")
    elif image.state == pb.OpenImage.STATE_READS_ONLY:
        what = f"writes to {image.name} wait{told}"
        yield Problem(Health.UNAVAILABLE, what, "bring its nodes back; writes resume by themselves")
    elif image.state == pb.OpenImage.STATE_CLOSING and image.trouble:
        what = f"{image.name} cannot be closed{told}"
        yield Problem(Health.UNAVAILABLE, what, "bring them back; it opens again after that")
    elif image.state == pb.OpenImage.STATE_STALLED:
        what = f"{image.name} is stalled{told}"
        yield Problem(
            Health.UNAVAILABLE, what, "bring etcd and its nodes back; it resumes by itself"
        )


def _judge_rot(found: Survey, image: pb.OpenImage) -> Iterator[Problem]:
    waiting, bad = image.counters["rot_waiting"], image.counters["rot_unrepairable"]
    if waiting:
        what = f"{waiting} damaged places of {image.name} are being repaired"
        yield Problem(
            Health.HEALING, what, "wait, and watch the disk: see `bitrot_found` in the log"
        )
    if bad and image.name not in found.scrubs:
        what = f"{bad} blocks of {image.name} are damaged on every node"
        yield Problem(Health.DEGRADED, what, _RESTORE.format(image.name))


_RESTORE = (
    "reads of them fail until they are written as a whole: restore them in the guest or from a "
    "backup, then `hci scrub start {0}`; `hci scrub status {0}` names them"
)


def _judge_scrubs(found: Survey) -> Iterator[Problem]:
    for name, record in sorted(found.scrubs.items()):
        every = record.bad
        bad = sum(blocks.blocks for blocks in every if not blocks.nodes)
        differ = sum(blocks.blocks for blocks in every if blocks.nodes)
        if bad:
            what = f"{bad} blocks of {name} are damaged on every node"
            yield Problem(Health.DEGRADED, what, _RESTORE.format(name))
        if differ:
            what = (
                f"{differ} blocks of {name} differ between nodes, and nothing says which is right"
            )
            advice = f"have the guest write them again; `hci scrub status {name}` names them"
            yield Problem(Health.DEGRADED, what, advice)


def _judge_pools(found: Survey) -> Iterator[Problem]:
    up = {node.name for node in found.nodes if node.state == "up"}
    for pool in found.pools.values():
        if pool.arbiter is not None and not pool.filled:
            yield Problem(
                Health.DEGRADED,
                f"pool {pool.name}: its arbiter {pool.arbiter} is not filled and grants nothing",
                "run the interrupted `hci arbiter replace` again",
            )
        placement = found.placements.get(pool.name)
        for index, members in enumerate(placement.sets if placement is not None else ()):
            there = [name for name in members if name in up]
            if len(there) < pool.policy.quorum:
                yield Problem(
                    Health.UNAVAILABLE,
                    f"pool {pool.name}: replica set {index} has {len(there)} of {len(members)} "
                    f"nodes, its writes wait for {pool.policy.quorum}",
                    f"start {' or '.join(name for name in members if name not in up)}",
                )


def _judge_images(found: Survey) -> Iterator[Problem]:
    up = {node.name for node in found.nodes if node.state == "up"}
    voting = {pool for arbiter in found.arbiters if arbiter.state == "up" for pool in arbiter.pools}
    for name, record in found.images.items():
        for index, members in enumerate(record.sets):
            in_sync = [node for node in members if node not in record.stale.get(index, {})]
            if members and sum(node in up for node in in_sync) < record.policy.quorum:
                yield Problem(
                    Health.UNAVAILABLE,
                    f"image {name}: of its nodes in sync ({', '.join(in_sync)}) too few are up",
                    "start them; writes resume by themselves",
                )
            elif record.policy.has_arbiter and record.pool not in voting and not set(in_sync) <= up:
                missing = " and ".join(node for node in in_sync if node not in up)
                yield Problem(
                    Health.UNAVAILABLE,
                    f"image {name}: {missing} and the arbiter are away: writes wait",
                    f"start the arbiter or {missing}; writes resume by themselves",
                )
    yield from _judge_stale(found, up)
    yield from _judge_slow(found)


def _judge_slow(found: Survey) -> Iterator[Problem]:
    """A node that answers is slow for some images, or all."""
    slow: dict[str, list[tuple[int, str]]] = {}
    for gateway in found.gateways:
        for image in gateway.images:
            for node in image.slow:
                if node.lag_ms:
                    slow.setdefault(node.node, []).append((node.lag_ms, image.name))
    for name, lags in sorted(slow.items()):
        lag_ms, waits = max(lags)
        yield Problem(
            Health.DEGRADED,
            f"{name} is slow: writes to image {waits} wait {lag_ms} ms for it alone",
            f"see to the disk and the network of {name}",
        )


def _judge_stale(found: Survey, up: set[str]) -> Iterator[Problem]:
    """A stale node that runs is healed by whatever gateway runs; another one needs a person."""
    stale: dict[str, list[str]] = {}
    for name, record in found.images.items():
        for nodes_since in record.stale.values():
            for node in nodes_since:
                stale.setdefault(node, []).append(name)
    images = [image for gateway in found.gateways for image in gateway.images]
    healed = {(image.heal.node, image.name) for image in images if image.HasField("heal")}
    trouble = {image.name: image.trouble for image in images if image.trouble}
    rests = {
        (slow.node, image.name): slow.rests_s
        for image in images
        for slow in image.slow
        if slow.rests_s
    }
    healer = any(gateway.state == "up" for gateway in found.gateways)
    for node, names in sorted(stale.items()):
        waiting = [name for name in dict.fromkeys(names) if (node, name) not in healed]
        if not waiting:
            continue
        shown = ", ".join(waiting[:3])
        shown += f" and {len(waiting) - 3} more" if len(waiting) > 3 else ""
        what = f"{node} is stale for {shown}"
        why = next((trouble[name] for name in waiting if name in trouble), "")
        if node not in up:
            yield Problem(Health.DEGRADED, what, f"it missed writes and is not read; start {node}")
        elif resting := [rests[node, name] for name in waiting if (node, name) in rests]:
            advice = f"it was too slow; it is healed in {max(resting):.0f} s; see to its disk"
            yield Problem(Health.DEGRADED, what, advice)
        elif why:
            yield Problem(Health.DEGRADED, what, f"{why}; it is tried again by itself")
        elif not healer:
            yield Problem(Health.DEGRADED, what, "start a gateway: it heals the node")
        else:
            yield Problem(Health.HEALING, what, "wait: it is healed by itself")


def _nodes(
    config: Config, records: Mapping[str, NodeRecord], alive: Mapping[str, object] | None
) -> list[NodeView]:
    names = sorted({*records, *config.nodes})
    if not names:
        return []
    with ThreadPoolExecutor(min(len(names), 32)) as pool:
        return list(pool.map(lambda name: _node(config, name, records.get(name), alive), names))


def _node(
    config: Config, name: str, record: NodeRecord | None, alive: Mapping[str, object] | None
) -> NodeView:
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
    if state == "up" and alive is not None and name not in alive:
        state, trouble = "starting", trouble or "it is not registered in etcd"
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
        history_lost=status is not None and status.history_lost,
        unknown=status.unknown if status is not None else (),
    )


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


def _gateways(config: Config) -> list[GatewayView]:
    sections = [section for _name, section in sorted(config.gateways.items())]
    if not sections:
        return []
    with ThreadPoolExecutor(min(len(sections), 32)) as pool:
        return list(pool.map(_gateway, sections))


def _gateway(section: GatewayConfig) -> GatewayView:
    try:
        with GatewayClient(section.name, section.control, deadline_s=ASK_DEADLINE_S) as client:
            status = client.status()
    except ControlError as error:
        return GatewayView(section.name, "down", section.host, str(error))
    return GatewayView(
        section.name,
        _GATEWAY_STATES[status.state],
        section.host,
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
