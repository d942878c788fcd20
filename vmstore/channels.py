"""`Channels`: open images as the engine knows them.

In the engine an image is a channel, its nodes are indexes, and of its record it has what a data
path goes by; everywhere else they have names. This module alone translates: what the holder of an
image decided becomes a call of the engine, what the engine tells an event for the holder. It
decides nothing, and knows nothing of clients or etcd.
"""

import time
from collections.abc import Callable
from typing import Any

import structlog

from engine import Gateway
from etcd.images import ImageRecord, Snapshot
from vmstore import effects, events
from vmstore.events import NodeRecordView
from vmstore.healing import HealLimits
from vmstore.open_image import OpenImage
from vmstore.progress import HealLog
from vmstore.scrubbing import RotLog

log = structlog.get_logger()


class Channels:
    """The channels of one engine; for the deciding thread.

    `holder` is the random id of this process. What is told of heals and of rot goes into the logs.
    """

    def __init__(
        self,
        engine: Gateway,
        *,
        holder: str,
        local_node: Callable[[], str | None],
        heal_limits: HealLimits,
        heal_log: HealLog,
        rot_log: RotLog,
        now_s: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._holder_id = holder
        self._local_node = local_node
        self._heal_limits = heal_limits
        self._heal_log = heal_log
        self._rot_log = rot_log
        self._now_s = now_s
        self._by_channel: dict[int, OpenImage] = {}
        self._next_channel = 1

    def new(self) -> int:
        """Return a channel that no image has had."""
        channel = self._next_channel
        self._next_channel += 1
        return channel

    def add(self, image: OpenImage) -> None:
        """Have events of its channel be those of an image."""
        self._by_channel[image.channel] = image

    def image(self, channel: int) -> OpenImage | None:
        """Return the image that has a channel, if it still has."""
        return self._by_channel.get(channel)

    def forget(self, image: OpenImage) -> None:
        """Let a channel go whose image is closed."""
        self._engine.forget(image.channel)
        self._heal_log.ends(image.image)
        del self._by_channel[image.channel]

    # What the engine is told

    def open(self, image: OpenImage, record: ImageRecord) -> None:
        """Have the engine connect to an image's nodes and ask them what they have of it."""
        image.node_names = names = _node_names(record)
        local = self._local_node()
        self._engine.open(
            image.channel,
            image=record.id,
            size_bytes=record.size_bytes,
            shard_bytes=record.shard_bytes,
            placement_key=record.placement_key,
            layers=record.layer_ids,
            snapshots=_snapshots(record),
            merging=list(record.merging),
            parent=record.below,
            epoch=record.epoch,
            holder=self._holder_id,
            generation=record.generation,
            digest=record.digest,
            body=record.encode(),
            nodes=list(image.node_names),
            sets=[_indexes(names, members) for members in record.sets],
            in_sync=_in_sync(names, record),
            local=names.index(local) if local in names else None,
            levelling=(
                self._heal_limits.bytes_per_second,
                self._heal_limits.shards_at_once,
                self._heal_limits.share_percent,
            ),
        )

    def open_reader(self, channel: int, record: ImageRecord, snapshot: Snapshot) -> None:
        """Have the engine read a snapshot from those nodes that are in sync now."""
        names = _node_names(record)
        local = self._local_node()
        self._engine.open_reader(
            channel,
            image=record.id,
            size_bytes=snapshot.size_bytes,
            shard_bytes=record.shard_bytes,
            placement_key=record.placement_key,
            snapshot=(snapshot.layer, snapshot.generation),
            nodes=list(names),
            sets=[_indexes(names, members) for members in record.sets],
            in_sync=_in_sync(names, record),
            local=names.index(local) if local in names else None,
        )

    def tell_deadline(self, image: OpenImage, deadline_s: float) -> None:
        """Tell until when an image's lease certainly lives, on the clock of etcd sessions."""
        deadline_ns = int(max(0.0, deadline_s) * 1e9)
        self._engine.set_lease_deadline(image.channel, deadline_ns)

    def peek(self, image: OpenImage, node: str) -> None:
        """Have a node asked anew what it has of an image."""
        self._engine.peek(image.channel, image.node_names.index(node))

    def admit(self, image: OpenImage, admit: effects.Admit) -> None:
        """Let nodes in by what they answered."""
        indexes = [image.node_names.index(node) for node in admit.nodes]
        named = list(zip(indexes, admit.serials, strict=True))
        self._engine.admit(image.channel, named, resume=admit.resume)

    def reconfigure(self, image: OpenImage, record: ImageRecord) -> None:
        """Have the engine go by a membership that etcd has taken."""
        if image.holder.heals.now is None:
            self._heal_log.taken_in(image.image, time.time())
        log.warning(
            "membership_changed",
            image=str(image.name),
            generation=record.generation,
            stale={str(index): dict(nodes) for index, nodes in record.stale.items()},
        )
        self._engine.reconfigure(
            image.channel,
            generation=record.generation,
            digest=record.digest,
            body=record.encode(),
            in_sync=_in_sync(image.node_names, record),
            layers=record.layer_ids,
            snapshots=_snapshots(record),
            merging=list(record.merging),
        )

    def heal(self, image: OpenImage, heal: effects.Heal) -> None:
        """Begin to heal a node."""
        self._heal_log.begins(image.image, str(image.name), heal.node, self._now_s())
        log.info("heal_begins", image=str(image.name), node=heal.node, since=dict(heal.sets))
        self._engine.heal(
            image.channel,
            node=image.node_names.index(heal.node),
            serial=heal.serial,
            attempt=heal.attempt,
            sets=list(heal.sets),
            bytes_per_second=self._heal_limits.bytes_per_second,
            shards_at_once=self._heal_limits.shards_at_once,
            share_percent=self._heal_limits.share_percent,
        )

    def end_heal(self, image: OpenImage, attempt: int) -> None:
        """End a heal before it is through."""
        self._engine.end_heal(image.channel, attempt)
        self._heal_log.ends(image.image)

    def refuse_writes(self, image: OpenImage, sets: frozenset[int]) -> None:
        """Have clients told that disks are full where they write to these replica sets."""
        if sets == image.refusing:
            return
        image.refusing = sets
        log.warning("writes_refused" if sets else "writes_accepted", image=str(image.name))
        self._engine.refuse_writes(image.channel, sorted(sets))

    # What the engine tells

    def heard(self, image: OpenImage, event: dict[str, Any]) -> events.Event | None:
        """Return what the image's holder is to hear of an engine's event, if anything."""
        if self._rot_log.on_event(image.image, str(image.name), event, image.node_names):
            return None
        node = image.node_names[event["node"]] if "node" in event else ""
        match event["event"]:
            case "peeked":
                image.boots[node] = event.get("boot", "")
                return _peeked(node, event)
            case "replica_down":
                log.warning("replica_lost", image=str(image.name), node=node)
                return events.ReplicaDown(node, event["blocking"])
            case "replica_blocking":
                return events.ReplicaBlocking(node)
            case "lags":
                return events.Lags(
                    {image.node_names[index]: lag_ms for index, lag_ms in event["lags"]}
                )
            case "writes_lost":
                image.writes_lost += 1
                log.error("unflushed_writes_lost", image=str(image.name),
                          changes=event["changes"])  # fmt: skip
            case "replica_failed":
                return events.ReplicaFailed(node, event["status"])
            case "pull_unreached":
                names = image.node_names
                self._heal_log.unreached(names[event["source"]], names[event["target"]])
            case "admitted":
                levelling = frozenset(image.node_names[index] for index in event["levelling"])
                log.info("replicas_admitted", image=str(image.name), levelling=sorted(levelling),
                         shards=event["shards"])  # fmt: skip
                return events.Admitted(levelling)
            case "levelled":
                log.info("replicas_level", image=str(image.name), node=node,
                         shards=event["shards"], copied_bytes=event["copied_bytes"])  # fmt: skip
                return events.Levelled(node)
            case "admit_failed":
                log.warning("admit_failed", image=str(image.name), node=node, why=event["status"])
                return events.AdmitFailed(node)
            case "healed":
                log.info("node_healed", image=str(image.name), node=node,
                         copied_bytes=event["copied_bytes"],
                         bad_blocks=event["bad_blocks"])  # fmt: skip
                self._heal_log.level(image.image, event["copied_bytes"], event["bad_blocks"],
                                     self._now_s())  # fmt: skip
                return events.Healed(node, event["attempt"])
            case "heal_failed":
                log.warning("heal_failed", image=str(image.name), node=node, why=event["status"])
                self._heal_log.fails(image.image)
                return events.HealFailed(node, event["attempt"], event["status"])
            case "holding":
                return events.Holding(event["attempt"])
            case "frozen":
                return events.Frozen(event["attempt"])
            case "freeze_failed":
                return events.FreezeFailed(event["attempt"], event["why"])
            case "emptied":
                return events.Emptied(node, frozenset(event["layers"]))
            case "stored":
                return events.Stored(event["generation"])
            case "fenced":
                return events.Fenced(node)
            case "closed":
                return events.Closed(event["clean"])
        return None


def _node_names(record: ImageRecord) -> tuple[str, ...]:
    """Return the nodes of an image, each once: their places are the engine's indexes."""
    return tuple(dict.fromkeys(node for members in record.sets for node in members))


def _indexes(names: tuple[str, ...], nodes: tuple[str, ...]) -> list[int]:
    return [names.index(node) for node in nodes]


def _in_sync(names: tuple[str, ...], record: ImageRecord) -> list[list[int]]:
    membership = record.membership
    return [_indexes(names, membership.in_sync(index)) for index in range(len(record.sets))]


def _snapshots(record: ImageRecord) -> list[tuple[int, int]]:
    return [(snapshot.layer, snapshot.generation) for snapshot in record.snapshots]


def _peeked(node: str, event: dict[str, Any]) -> events.Peeked:
    record = event["record"]
    view = None
    flush_number = 0
    if record is not None:
        flush_number = record["flush_number"]
        view = NodeRecordView(
            epoch=record["epoch"],
            holder=record["holder"],
            generation=record["generation"],
            digest=record["digest"],
            peers=dict(record["peers"]),
            dirty=record["dirty"],
            distrusted=record["distrusted"],
        )
    return events.Peeked(
        node,
        event["start_counter"],
        flush_number,
        event["deleted"],
        view,
        event["serial"],
        event.get("parent_missing", False),
    )
