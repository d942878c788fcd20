"""`Serving`: drives one `Holder` for each image that is open, between the engine and etcd.

What decides runs where `vmstore/deciding.py` says: the engine's events, the outcomes of etcd calls
(one at a time for each image) and ticks, in the order in which they come, waiting for nothing. No
request of a client passes here.
"""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import structlog

from arbiter.client import Arbiters
from engine import Gateway
from etcd.errors import EtcdError, EtcdUnavailable, LeaseNotFound, OutcomeUnknown
from etcd.lease import Session
from etcd.records import ImageRecord, LeaseRecord, PoolRecord
from shard.digest import membership_digest
from shard.errors import HciError
from shard.ids import ImageId
from shard.membership import WhenFull
from vmstore import effects, events, granting
from vmstore.catalog import Catalog
from vmstore.deciding import TICK_S, Deciding, DecidingThread
from vmstore.errors import (
    HistoryLost,
    InUse,
    LeaseLost,
    LeaseMoved,
    RecordChanged,
    RecordsLost,
    UnknownImage,
)
from vmstore.events import NodeRecordView
from vmstore.granter import Granter, Voters
from vmstore.healing import HealLimits
from vmstore.holder import OPEN_LIMIT_S, Holder, Phase
from vmstore.holding import Held
from vmstore.names import ImageName
from vmstore.progress import HealLog
from vmstore.scrubbing import RotLog
from vmstore.served import Served
from vmstore.slowness import SlowLimits, Slowness
from vmstore.stored import Stored

if TYPE_CHECKING:
    from vmstore.resizing import Resize

log = structlog.get_logger()

TAKE_ATTEMPTS = 5
"""Times a lease is asked for while the record changes under our eyes."""
OPEN_RETRY_S = 0.5
"""Until etcd is asked again for an image that a client waits for, or an arbiter to confirm it."""
RELEASE_RETRY_S = 1.0
"""Until etcd is asked again to take a lease back, or to give one that has lapsed."""
FULL_ASK_S = 5.0
"""Until a pool is asked again what its clients are to see while disks are full."""
STOP_S = 20.0
"""How long a graceful stop waits for images to flush and close."""


@dataclass(slots=True)
class OpenImage:
    """An image that is open, opening or closing."""

    image: ImageId
    name: ImageName
    channel: int
    holder: Holder
    held: Held | None = None
    maintenance: bool = False
    """Open to be healed, for no client: the next gateway that is asked may take it over."""
    claiming: bool = False
    node_names: tuple[str, ...] = ()
    waiting: list[tuple[int, ImageName]] = field(default_factory=list)
    """Clients that are answered when it is open."""
    users: set[int] = field(default_factory=set)
    sent_away: set[int] = field(default_factory=set)
    """Users who were asked to connect anew: their processes come back, with what they had asked."""
    resize: "Resize | None" = None
    """A change of its size that is under way."""
    boots: dict[str, str] = field(default_factory=dict)
    """Of its nodes: which memory holds what they answered and have not synced."""
    late: dict[int, float] = field(default_factory=dict)
    """Since when clients wait for it to be closed."""
    slow: dict[str, int] = field(default_factory=dict)
    """Nodes that were told to be slow, and by how many milliseconds."""
    slow_left_behind: int = 0
    """How often a node was left behind because it was slow."""
    refusing: frozenset[int] = frozenset()
    """Replica sets where clients are told that disks are full."""
    full_asked_s: float | None = None
    """When the pool was asked for that, while disks are full."""
    writes_lost: int = 0
    """How often answered writes were lost with the power of all nodes in sync."""
    behind: bool = False
    """Whether etcd was found to have lost history of it."""
    last_trouble: str = ""


class Serving(ABC):
    """Holds images of one cluster open in one engine.

    `lease` makes an etcd lease session, given what to call when it is lost and renewed. `voters` is
    where arbiters are asked, over gRPC unless given. `served` knows the clients of former processes
    of this gateway. `lock` names the lock file that this process holds until it dies: leases under
    the same one are those of its dead predecessors. `deciding` is where decisions run, in threads
    of its own unless given.
    """

    def __init__(
        self,
        engine: Gateway,
        catalog: Catalog,
        *,
        gateway: str,
        holder: str,
        local_node: Callable[[], str | None],
        lease: Callable[[Callable[[], None], Callable[[float], None]], Session],
        heal_limits: HealLimits,
        slow_limits: SlowLimits | None = None,
        voters: Voters | None = None,
        served: Served | None = None,
        lock: str | None = None,
        deciding: Deciding | None = None,
    ) -> None:
        self._engine = engine
        self._catalog = catalog
        self._gateway = gateway
        self._holder_id = holder
        self._local_node = local_node
        self._new_lease = lease
        self._lock = lock
        self._served = served or Served(holder)
        self._voters = voters or Arbiters()
        self._granter = Granter(catalog, self._voters)
        self._heal_limits = heal_limits
        self._slow_limits = slow_limits or SlowLimits()
        self.heal_log = HealLog()
        self.rot_log = RotLog()
        self._lease: Session | None = None
        self._images: dict[ImageId, OpenImage] = {}
        self._unheard: set[ImageId] = set()
        """Images whose lease may be ours by a call whose answer was lost."""
        self._by_channel: dict[int, OpenImage] = {}
        self._next_channel = 1
        self._away: dict[str, float] = {}
        """Nodes that were connected and are lost, and since when."""
        self._deciding = deciding or DecidingThread(engine.next_event)
        self._stopping = False
        self.failed: Callable[[str], None] = lambda _why: None

    def start(self) -> None:
        """Take an etcd lease and begin. Raises EtcdUnavailable."""
        self._lease = self._new_lease(self._lease_lost, self._lease_renewed).start()
        self._deciding.start(self._on_engine, self._tick, self.failed)

    def stop(self) -> None:
        """Send clients away, close all images, give the leases back."""
        done = threading.Event()
        self._deciding.put(lambda: self._begin_stop(done.set))
        done.wait(STOP_S)
        self._deciding.stop()
        if self._lease is not None:
            self._lease.close()
        self._voters.close()

    def snapshot(self) -> list[OpenImage]:
        """Return the open images as they are now. For any thread."""
        return list(self._images.values())

    def _tick(self) -> None:
        for image in list(self._images.values()):
            self._step(image, events.Tick(self._deciding.now_s()))
            self._mind_full_disks(image)

    def _mind_full_disks(self, image: OpenImage) -> None:
        """Have clients wait, or hear of it, while too many disks are full: what the pool says now.

        While etcd does not say what that is, it stays as it was.
        """
        record, now_s = image.holder.record, self._deciding.now_s()
        if record is None or not image.holder.without_space():
            image.full_asked_s = None
            self._refuse_writes(image, frozenset())
            return
        if image.full_asked_s is not None and now_s - image.full_asked_s < FULL_ASK_S:
            return
        image.full_asked_s = now_s

        def told(pool: Stored[PoolRecord]) -> None:
            tells = pool.record.when_full is WhenFull.ENOSPC
            if self._images.get(image.image) is image:
                self._refuse_writes(image, image.holder.without_space() if tells else frozenset())

        def failed(error: HciError) -> None:
            log.warning("when_full_unknown", image=str(image.name), why=str(error))

        self._later(lambda: self._catalog.pool(record.pool), told, failed)

    def _refuse_writes(self, image: OpenImage, sets: frozenset[int]) -> None:
        if sets == image.refusing:
            return
        image.refusing = sets
        log.warning("writes_refused" if sets else "writes_accepted", image=str(image.name))
        self._engine.refuse_writes(image.channel, sorted(sets))

    def _later(
        self,
        call: Callable[[], Any],
        then: Callable[[Any], None],
        failed: Callable[[HciError], None],
    ) -> None:
        """Make an etcd call elsewhere; its outcome comes back to where it is decided."""
        if not self._stopping or self._images:
            self._deciding.call(call, then, failed)

    def _carry_through(
        self,
        steps: granting.Steps,
        then: Callable[[Held], None],
        failed: Callable[[HciError], None],
    ) -> None:
        """Make the steps of a procedure in workers, one at a time."""

        def go_on(advance: Callable[[], granting.Step]) -> None:
            try:
                step = advance()
            except StopIteration as end:
                then(end.value)
            except HciError as error:
                failed(error)
            else:
                self._later(
                    lambda: self._granter.make(step),
                    lambda result: go_on(lambda: steps.send(result)),
                    lambda error: go_on(lambda: steps.throw(error)),
                )

        go_on(lambda: next(steps))

    # Images

    def _use(
        self, name: ImageName, found: Stored[ImageRecord], *, maintenance: bool = False
    ) -> OpenImage:
        """Return the open image, or begin to open it."""
        image = self._images.get(found.record.id)
        if image is not None:
            return image
        channel = self._next_channel
        self._next_channel += 1
        image = OpenImage(
            image=found.record.id,
            name=name,
            channel=channel,
            holder=Holder(
                holder=self._holder_id,
                now_s=self._deciding.now_s(),
                slowness=Slowness(self._slow_limits),
            ),
            maintenance=maintenance,
        )
        self._images[image.image] = image
        self._by_channel[channel] = image
        self._take_lease(image, self._deciding.now_s() + OPEN_LIMIT_S)
        return image

    def _take_lease(self, image: OpenImage, give_up_s: float) -> None:
        def taken(held: Held) -> None:
            log.info("image_taken", image=str(image.name), epoch=held.record.epoch)
            image.holder.trouble = ""
            if granting.needs_arbiter_to_open(held.record):
                self._confirm(image, held, self._deciding.now_s() + OPEN_LIMIT_S)
            else:
                self._begin(image, held)

        def failed(error: HciError) -> None:
            # etcd elects a leader, or our own etcd lease ended while we were cut off from it.
            may_pass = isinstance(error, EtcdUnavailable | LeaseNotFound)
            if may_pass and self._waits(image, error, give_up_s):
                self._deciding.after(OPEN_RETRY_S, lambda: self._take_lease(image, give_up_s))
                return
            log.info("image_refused", image=str(image.name), why=str(error))
            self._step(image, events.Fail(str(error)))
            if isinstance(error, OutcomeUnknown) and image.image not in self._unheard:
                self._unheard.add(image.image)
                self._deciding.after(RELEASE_RETRY_S, lambda: self._let_go_unheard(image.image))

        self._later(lambda: self._try_to_take(image), taken, failed)

    def _let_go_unheard(self, image: ImageId) -> None:
        """Give a lease back that etcd took from us unheard: nobody else could open the image.

        Where it was asked for again meanwhile, that takes the place of the one unheard.
        """

        def found(held: Held | None) -> None:
            self._unheard.discard(image)
            if held is not None and image not in self._images:
                self._let_go(held)

        def failed(error: HciError) -> None:
            if isinstance(error, EtcdError):
                self._deciding.after(RELEASE_RETRY_S, lambda: self._let_go_unheard(image))
            else:
                self._unheard.discard(image)

        self._later(lambda: self._own_lease(image), found, failed)

    def _own_lease(self, image: ImageId) -> Held | None:
        """Return how this process holds an image by what etcd says, or None where it does not."""
        assert self._lease is not None
        etcd_lease = self._lease.lease
        lease = self._catalog.lease_of(image)
        if lease is None or lease.record.holder != self._holder_id:
            return None
        return Held(self._catalog.image(image), lease.record, etcd_lease)

    def _begin(self, image: OpenImage, held: Held) -> None:
        image.held = held
        self._step(image, events.LeaseTaken(held.record, dict(self._away)))
        self._taken(image)

    def _confirm(self, image: OpenImage, held: Held, give_up_s: float) -> None:
        """Have the arbiter confirm what etcd holds, then begin; no request is served before."""

        def confirmed(held: Held) -> None:
            assert self._lease is not None
            if self._lease.lost or self._lease.lease != held.etcd_lease:
                self._give_back(image, held, "its lease ended while the arbiter was asked")
                return
            image.holder.trouble = ""
            self._begin(image, held)

        def failed(error: HciError) -> None:
            if granting.may_pass(error) and self._waits(image, error, give_up_s):
                self._deciding.after(OPEN_RETRY_S, lambda: self._confirm(image, held, give_up_s))
            else:
                self._give_back(image, held, str(error))

        self._carry_through(granting.opening(held), confirmed, failed)

    def _waits(self, image: OpenImage, error: HciError, give_up_s: float) -> bool:
        """Whether an open goes on in spite of what may pass: for clients, and not for ever."""
        wanted = bool(image.users or image.waiting) and not self._stopping
        if not wanted or self._deciding.now_s() >= give_up_s:
            return False
        if not image.holder.trouble:
            log.warning("open_waits", image=str(image.name), why=str(error))
        image.holder.trouble = str(error)
        return True

    def _give_back(self, image: OpenImage, held: Held, why: str) -> None:
        """End an open that came to nothing, and let others have the lease."""
        log.info("image_refused", image=str(image.name), why=why)
        self._step(image, events.Fail(why))
        self._let_go(held)

    def _let_go(self, held: Held) -> None:
        def failed(error: HciError) -> None:
            # Any other error says that the lease is another's, or ours anew.
            if isinstance(error, EtcdError):
                self._deciding.after(RELEASE_RETRY_S, lambda: self._let_go(held))

        self._later(lambda: self._catalog.release(held, clean=False), nothing_more, failed)

    def _try_to_take(self, image: OpenImage) -> Held:
        assert self._lease is not None
        for attempt in range(TAKE_ATTEMPTS):
            stored = self._catalog.image(image.image)
            lease = self._catalog.lease_of(image.image)
            mine = lease is not None and self._is_of_the_dead(lease.record)
            # One for maintenance yields, but not to another such.
            yields = lease is not None and lease.record.maintenance and not image.maintenance
            try:
                held = self._catalog.take_lease(
                    stored,
                    gateway=self._gateway,
                    holder=self._holder_id,
                    etcd_lease=self._lease.lease,
                    lock=self._lock,
                    instead_of=lease if mine or yields else None,
                    maintenance=image.maintenance,
                )
                self._served.taken(stored.record, held.record)
                return held
            except InUse as error:
                other = error.gateway
                if other == self._gateway:
                    other += " (another one of this name, or this one before its host restarted)"
                raise InUse(str(image.name), other) from error
            except RecordChanged:
                if attempt + 1 == TAKE_ATTEMPTS:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def _is_of_the_dead(self, lease: LeaseRecord) -> bool:
        """Whether a lease is that of a former process of ours: we hold its lock, so it is dead.

        The name alone does not say so: two hosts may have been given the same one.
        """
        return lease.gateway == self._gateway and lease.lock in (None, self._lock)

    def _step(self, image: OpenImage, event: events.Event) -> None:
        """Have the image's holder decide, and carry out what it says."""
        if isinstance(event, events.Lost | events.Fenced):
            self._served.lost(image.image)
            self._later(self._served.save, nothing_more, nothing_more)
        self._step_only(image, event)

    def _step_only(self, image: OpenImage, event: events.Event) -> None:
        for effect in image.holder.step(event):
            self._carry_out(image, effect)
        trouble = image.holder.trouble
        if trouble != image.last_trouble:
            image.last_trouble = trouble
            if trouble:
                log.warning("image_trouble", image=str(image.name), why=trouble)
        self._tell_slow(image)

    def _tell_slow(self, image: OpenImage) -> None:
        before, image.slow = image.slow, image.holder.slowness.slow()
        for node in image.slow.keys() - before.keys():
            lag_ms = image.slow[node]
            log.warning("replica_slow", image=str(image.name), node=node, lag_ms=lag_ms)
        for node in before.keys() - image.slow.keys():
            log.info("replica_not_slow", image=str(image.name), node=node)

    def _carry_out(self, image: OpenImage, effect: effects.Effect) -> None:
        match effect:
            case effects.OpenImage(record):
                self._open_in_engine(image, record)
            case effects.Admit(nodes, resume, serials):
                indexes = [image.node_names.index(node) for node in nodes]
                named = list(zip(indexes, serials, strict=True))
                self._engine.admit(image.channel, named, resume=resume)
            case effects.Peek(node):
                self._engine.peek(image.channel, image.node_names.index(node))
            case effects.Heal():
                self._heal(image, effect)
            case effects.EndHeal(attempt):
                self._engine.end_heal(image.channel, attempt)
                self.heal_log.ends(image.image)
            case effects.ChangeMembership(_, after):
                self._change_membership(image, after)
            case effects.Reconfigure(record):
                self._reconfigure(image, record)
            case effects.Serve():
                log.info("image_opened", image=str(image.name), epoch=self._epoch(image))
                self._tell_losses(image)
                self._opened(image)
            case effects.Refuse(reason):
                self._refused(image, reason)
            case effects.CloseImage():
                self._engine.close(image.channel)
            case effects.KillImage():
                self._engine.kill(image.channel)
            case effects.Release(_, clean):
                self._release(image, clean)
            case effects.Forget():
                self._forget(image)

    def _open_in_engine(self, image: OpenImage, record: ImageRecord) -> None:
        names = dict.fromkeys(node for members in record.sets for node in members)
        image.node_names = tuple(names)
        local = self._local_node()
        self._engine.open(
            image.channel,
            image=record.id,
            size_bytes=record.size_bytes,
            shard_bytes=record.shard_bytes,
            placement_key=record.placement_key,
            layers=[layer.id for layer in record.layers],
            epoch=record.epoch,
            holder=self._holder_id,
            generation=record.generation,
            digest=membership_digest(record.membership),
            body=record.encode(),
            nodes=list(image.node_names),
            sets=[self._indexes(image, members) for members in record.sets],
            in_sync=self._in_sync(image, record),
            local=image.node_names.index(local) if local in names else None,
            levelling=(
                self._heal_limits.bytes_per_second,
                self._heal_limits.shards_at_once,
                self._heal_limits.share_percent,
            ),
        )
        self._tell_deadline(image)
        assert image.held is not None and self._lease is not None
        if image.held.etcd_lease != self._lease.lease:
            # Taken on a session that ended before we heard of it: nobody else takes it again.
            self._retake(image)

    def _indexes(self, image: OpenImage, nodes: tuple[str, ...]) -> list[int]:
        return [image.node_names.index(node) for node in nodes]

    def _in_sync(self, image: OpenImage, record: ImageRecord) -> list[list[int]]:
        membership = record.membership
        sets = range(len(record.sets))
        return [self._indexes(image, membership.in_sync(index)) for index in sets]

    def _reconfigure(self, image: OpenImage, record: ImageRecord) -> None:
        if image.holder.heals.now is None:
            self.heal_log.taken_in(image.image, time.time())
        log.warning(
            "membership_changed",
            image=str(image.name),
            generation=record.generation,
            stale={str(index): dict(nodes) for index, nodes in record.stale.items()},
        )
        self._engine.reconfigure(
            image.channel,
            generation=record.generation,
            digest=membership_digest(record.membership),
            body=record.encode(),
            in_sync=self._in_sync(image, record),
        )

    def _heal(self, image: OpenImage, heal: effects.Heal) -> None:
        self.heal_log.begins(image.image, str(image.name), heal.node, self._deciding.now_s())
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

    def _change_membership(self, image: OpenImage, after: ImageRecord) -> None:
        assert image.held is not None
        held = image.held
        progress = granting.Progress()

        slow = image.holder.too_slow

        def changed(new: Held) -> None:
            image.held = new
            if slow is not None:
                log.warning("slow_replica_left_behind", image=str(image.name), node=slow)
                image.slow_left_behind += 1
            self._step(image, events.MembershipChanged(new.record))
            self._remember(image)

        def failed(error: HciError) -> None:
            if granting.may_pass(error):
                self._step(image, events.MembershipDelayed(str(error), progress.maybe_taken))
            elif isinstance(error, LeaseMoved):
                # Taken again while the change was on its way: it is asked for under the new one.
                self._step(image, events.MembershipDelayed(str(error)))
            elif _is_behind(error):
                # What needs no change goes on: the nodes know whose the image is.
                self._step(image, events.MembershipDelayed(str(error)))
                self._history_lost(image, error)
            elif isinstance(error, LeaseLost) and error.gateway is None:
                # It may merely have lapsed: it is taken again, or found to be another's.
                self._step(image, events.MembershipDelayed(str(error)))
                self._retake(image)
            else:
                self._lost(image, events.Lost(str(error)))

        self._carry_through(granting.change(held, after, progress), changed, failed)

    def _release(self, image: OpenImage, clean: bool) -> None:
        """Give the lease back, also where etcd is away for a while: we keep it alive meanwhile."""
        assert image.held is not None
        held = image.held

        def release() -> None:
            try:
                self._catalog.release(held, clean=clean)
            except RecordChanged as error:
                # By ourselves, in a change whose answer was lost or came after all, or the lease
                # was taken again meanwhile.
                found = self._catalog.image(image.image)
                own = (held.record.epoch, held.record.holder)
                if (found.record.epoch, found.record.holder) != own:
                    raise
                assert self._lease is not None
                moved = isinstance(error, LeaseMoved)
                etcd_lease = self._lease.lease if moved else held.etcd_lease
                self._catalog.release(Held(found, held.lease, etcd_lease), clean=False)

        def released(_result: None) -> None:
            log.info("image_released", image=str(image.name), clean=clean)
            self._step(image, events.Released())

        def failed(error: HciError) -> None:
            log.warning("image_release_failed", image=str(image.name), why=str(error))
            if isinstance(error, EtcdError):
                self._deciding.after(RELEASE_RETRY_S, lambda: self._release(image, clean))
            else:
                # The lease is another's already, or the image is gone.
                self._step(image, events.Released())

        self._later(release, released, failed)

    def _epoch(self, image: OpenImage) -> int:
        assert image.held is not None
        return image.held.record.epoch

    def _forget(self, image: OpenImage) -> None:
        self._engine.forget(image.channel)
        self.heal_log.ends(image.image)
        self._served.forget_memory(image.image)
        del self._images[image.image]
        del self._by_channel[image.channel]
        self._forgotten(image)

    # What users of the images do about it

    @abstractmethod
    def _taken(self, image: OpenImage) -> None:
        """The lease is ours; the image is being opened."""

    @abstractmethod
    def _opened(self, image: OpenImage) -> None:
        """The image serves: let in who waits."""

    @abstractmethod
    def _refused(self, image: OpenImage, reason: str) -> None:
        """The image cannot be opened, or is served no longer."""

    @abstractmethod
    def _forgotten(self, image: OpenImage) -> None:
        """The image is closed, and may be opened anew."""

    @abstractmethod
    def _zeroed(self, image: OpenImage, done: bool) -> None:
        """What was asked to be zeroed is, or cannot be."""

    @abstractmethod
    def _on_client(self, event: dict[str, Any]) -> None:
        """An NBD client asks for something, or is gone."""

    # The engine's events

    def _on_engine(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind in ("asked", "client_gone"):
            self._on_client(event)
        elif kind == "tls_refused":
            log.warning("client_refused", why=f"its TLS handshake failed: {event['why']}")
        elif kind == "link_up":
            self._away.pop(event["name"], None)
            log.info("node_connected", node=event["name"], instance=event["start_counter"])
        elif kind == "link_down":
            self._away.setdefault(event["node"], self._deciding.now_s())
            log.warning("node_disconnected", node=event["node"], why=event["why"])
        else:
            image = self._by_channel.get(event["channel"])
            if image is not None:
                self._on_image(image, kind, event)

    def _on_image(self, image: OpenImage, kind: str, event: dict[str, Any]) -> None:
        if kind == "zeroed":
            self._zeroed(image, event["done"])
            return
        if self.rot_log.on_event(image.image, str(image.name), event, image.node_names):
            return
        node = image.node_names[event["node"]] if "node" in event else ""
        match kind:
            case "peeked":
                image.boots[node] = event.get("boot", "")
                self._step(image, _peeked(node, event))
            case "replica_down":
                log.warning("replica_lost", image=str(image.name), node=node)
                self._step(image, events.ReplicaDown(node, event["blocking"]))
            case "replica_blocking":
                self._step(image, events.ReplicaBlocking(node))
            case "lags":
                lags = {image.node_names[index]: lag_ms for index, lag_ms in event["lags"]}
                self._step(image, events.Lags(lags))
            case "writes_lost":
                image.writes_lost += 1
                log.error("unflushed_writes_lost", image=str(image.name),
                          changes=event["changes"])  # fmt: skip
            case "replica_failed":
                self._step(image, events.ReplicaFailed(node, event["status"]))
            case "admitted":
                levelling = frozenset(image.node_names[index] for index in event["levelling"])
                log.info("replicas_admitted", image=str(image.name), levelling=sorted(levelling),
                         shards=event["shards"])  # fmt: skip
                self._step(image, events.Admitted(levelling))
                self._remember(image)
            case "levelled":
                log.info("replicas_level", image=str(image.name), node=node,
                         shards=event["shards"], copied_bytes=event["copied_bytes"])  # fmt: skip
                self._step(image, events.Levelled(node))
                self._remember(image)
            case "admit_failed":
                log.warning("admit_failed", image=str(image.name), node=node, why=event["status"])
                self._step(image, events.AdmitFailed(node))
            case "healed":
                log.info("node_healed", image=str(image.name), node=node,
                         copied_bytes=event["copied_bytes"],
                         bad_blocks=event["bad_blocks"])  # fmt: skip
                self.heal_log.level(image.image, event["copied_bytes"], event["bad_blocks"],
                                    self._deciding.now_s())  # fmt: skip
                self._step(image, events.Healed(node, event["attempt"]))
            case "heal_failed":
                log.warning("heal_failed", image=str(image.name), node=node, why=event["status"])
                self.heal_log.fails(image.image)
                self._step(image, events.HealFailed(node, event["attempt"], event["status"]))
            case "stored":
                self._step(image, events.Stored(event["generation"]))
            case "fenced":
                self._lost(image, events.Fenced(node))
            case "closed":
                self._step(image, events.Closed(event["clean"]))

    # Writes that were answered and not flushed

    def _tell_losses(self, image: OpenImage) -> None:
        """Have the next flush fail where what clients that live on were answered may be gone.

        That is so where they were served before, by this gateway or its predecessor, and all nodes
        in sync of a set lost their power since. While an image is served the engine sees to it.
        """
        record = image.holder.record
        assert record is not None
        former = self._served.memory(image.image)
        membership = record.membership
        lost = [
            index
            for index in range(len(record.sets))
            if former
            and all(image.boots.get(n) != former.get(n) for n in membership.in_sync(index))
        ]
        if lost:
            image.writes_lost += 1
            log.error("unflushed_writes_lost", image=str(image.name), replica_sets=lost)
            self._engine.writes_lost(image.channel, lost)
        self._remember(image)

    def _remember(self, image: OpenImage) -> None:
        """Write down whose memory holds what is answered, once all in sync have all of it."""
        holder = image.holder
        if holder.record is None or holder.phase is not Phase.SERVING or holder.levelling:
            return
        in_sync = holder.record.membership.all_in_sync()
        boots = {node: image.boots[node] for node in sorted(in_sync) if node in image.boots}
        if self._served.remember(image.image, boots):
            self._later(self._served.save, nothing_more, nothing_more)

    # The etcd lease

    def _lease_renewed(self, _deadline_s: float) -> None:
        self._deciding.put(self._tell_deadlines)

    def _tell_deadlines(self) -> None:
        for image in self._images.values():
            if image.holder.phase not in (Phase.TAKING, Phase.ENDED):
                self._tell_deadline(image)

    def _tell_deadline(self, image: OpenImage) -> None:
        """Tell the engine how long an image's lease certainly lives, if it lives on our session.

        After the session's end the images' leases are taken again one by one; until its own is, an
        image has the deadline that it had.
        """
        assert self._lease is not None
        if image.held is None or image.held.etcd_lease != self._lease.lease:
            return
        deadline_ns = int(max(0.0, self._lease.deadline_s) * 1e9)
        self._engine.set_lease_deadline(image.channel, deadline_ns)

    def _lease_lost(self) -> None:
        self._deciding.put(self._renew_lease)

    def _renew_lease(self) -> None:
        """The etcd lease is gone: take a new one, and again the images' leases that just lapsed."""
        log.warning("etcd_lease_lost")

        def again(session: Session) -> None:
            self._lease = session
            for image in list(self._images.values()):
                self._retake(image)

        def failed(_error: HciError) -> None:
            self._deciding.after(1.0, self._renew_lease)

        self._later(
            lambda: self._new_lease(self._lease_lost, self._lease_renewed).start(), again, failed
        )

    def _retake(self, image: OpenImage) -> None:
        if image.held is None or image.holder.phase in (Phase.RELEASING, Phase.ENDED):
            return
        assert self._lease is not None
        held, lease = image.held, self._lease.lease

        def taken(new: Held) -> None:
            if image.held is not None:
                image.held = Held(image.held.image, new.lease, new.etcd_lease)
            self._tell_deadline(image)

        def failed(error: HciError) -> None:
            if isinstance(error, EtcdError | RecordChanged):
                # Without it the next gateway that is asked would take the image from its guest.
                self._deciding.after(RELEASE_RETRY_S, lambda: self._retake(image))
            elif _is_behind(error):
                self._history_lost(image, error)
                self._deciding.after(RELEASE_RETRY_S, lambda: self._retake(image))
            else:
                self._lost(image, events.Lost(str(error)))

        self._later(lambda: self._catalog.retake_lease(held, lease), taken, failed)

    # etcd that lost history

    def look_again(self) -> None:
        """Look whether a recovery of etcd's records has left us our images. For any thread."""
        self._deciding.put(lambda: self._look_at(list(self._images.values())))

    def _look_at(self, images: list[OpenImage]) -> None:
        for image in images:
            if image.held is not None and image.holder.phase is not Phase.RELEASING:
                self._retake_if_recovered(image)

    def _retake_if_recovered(self, image: OpenImage) -> None:
        assert image.held is not None
        known = image.held.record

        def found(stored: Stored[ImageRecord]) -> None:
            if stored.record.epoch > known.epoch:
                self._lost(image, events.Lost(f"the record of {image.name} was recovered"))

        self._later(lambda: self._catalog.image(image.image), found, nothing_more)

    def _history_lost(self, image: OpenImage, error: HciError) -> None:
        """Have everybody know that etcd is behind, if it is; the image is served as it is."""

        def marked(is_behind: bool) -> None:
            if is_behind and not image.behind:
                image.behind = True
                log.error("history_lost", image=str(image.name), why=str(error))

        image.holder.trouble = image.holder.trouble or str(error)
        self._later(lambda: self._mark_lost(image), marked, nothing_more)

    def _mark_lost(self, image: OpenImage) -> bool:
        """Say in etcd that it is behind what we hold, if it surely is; return whether it is.

        An image that is not in it may have been deleted while our lease had lapsed: its tombstone
        goes once all its nodes have it. They have its record as well, and can tell.
        """
        assert image.held is not None
        known = image.held.record
        cluster = self._catalog.stored_cluster()
        try:
            found = self._catalog.image(image.image).record
        except UnknownImage:
            if cluster is not None:
                return False
            why = "it holds nothing of this cluster"
        else:
            if not found.is_behind(known):
                return False
            why = (
                f"image {image.name} is at epoch {found.epoch}, generation {found.generation} "
                f"in it, and epoch {known.epoch}, generation {known.generation} is served"
            )
        self._catalog.mark_lost(f"gateway {self._gateway}", why, cluster)
        return True

    def _lost(self, image: OpenImage, event: events.Lost | events.Fenced) -> None:
        """Let go of an image: for good where another gateway has had it for clients since.

        Where it was only recovered, its clients are sent away without answers: those that come back
        find it opened anew, and send again what was not answered.
        """
        if image.held is None:
            self._step(image, event)
            return
        ours, known = image.held.record.last_use, image.held.record.recovered

        def found(stored: Stored[ImageRecord]) -> None:
            record = stored.record
            recovered = record.recovered is not None and record.recovered != known
            if not recovered or record.last_use != ours or image not in self._images.values():
                self._step(image, event)
                return
            log.warning("image_recovered", image=str(image.name), epoch=record.epoch)
            self._engine.disconnect(image.channel)
            self._step_only(image, event)

        self._later(
            lambda: self._catalog.image(image.image), found, lambda _error: self._step(image, event)
        )

    # The end

    def _begin_stop(self, done: Callable[[], None]) -> None:
        self._stopping = True
        self._engine.stop_listening()
        for image in list(self._images.values()):
            image.waiting.clear()
            self._engine.disconnect(image.channel)
            self._step(image, events.Close())
        self._wait_for_end(done)

    def _wait_for_end(self, done: Callable[[], None]) -> None:
        if not self._images:
            done()
            return
        self._deciding.after(TICK_S, lambda: self._wait_for_end(done))


def _is_behind(error: HciError) -> bool:
    """Whether etcd lost what we know of an image; a deleted one is not told apart here."""
    return isinstance(error, HistoryLost | RecordsLost | UnknownImage)


def nothing_more(_outcome: object) -> None:
    """Whatever came of it was logged."""


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
        node, event["start_counter"], flush_number, event["deleted"], view, event["serial"]
    )
