"""`Serving`: drives one `Holder` for each image that is open, between the engine and etcd.

What decides runs where `vmstore/deciding.py` says: the engine's events, the outcomes of etcd calls
(one at a time for each image) and ticks, in the order in which they come, waiting for nothing. No
request of a client passes here.

Events come in, the holder takes a step, its effects are carried out. All else has its own room:

    channels       what the engine is told of an image, and what it tells
    leases         the lease of an image: taken, confirmed, given back
    sessions       the etcd lease that those live on
    lost_history   an etcd that is behind what we hold
    unflushed      answered writes that may be gone with the power of nodes
    full_disks     what clients see while disks are full
    calls          how etcd and arbiters are asked without waiting
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import structlog

from arbiter.client import Arbiters
from engine import Gateway
from etcd.images import ImageRecord
from etcd.lease import Session
from shard.errors import HciError
from shard.ids import ImageId
from vmstore import effects, events, granting
from vmstore.calls import Calls, nothing_more
from vmstore.catalog import Catalog
from vmstore.channels import Channels
from vmstore.clone_errors import HasClones
from vmstore.deciding import TICK_S, Deciding, DecidingThread
from vmstore.errors import LeaseLost, LeaseMoved
from vmstore.full_disks import FullDisks
from vmstore.granter import Granter, Voters
from vmstore.healing import HealLimits
from vmstore.holder import OPEN_LIMIT_S, Holder
from vmstore.holding import Held
from vmstore.leases import Leases
from vmstore.lost_history import LostHistory, is_behind, is_gone
from vmstore.names import ImageName
from vmstore.open_image import OpenImage
from vmstore.orders import Orders
from vmstore.progress import HealLog
from vmstore.scrubbing import RotLog
from vmstore.served import Served
from vmstore.sessions import Sessions
from vmstore.slowness import SlowLimits, Slowness
from vmstore.stored import Stored
from vmstore.unflushed import Unflushed

log = structlog.get_logger()

STOP_S = 20.0
"""How long a graceful stop waits for images to flush and close."""


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
        self._slow_limits = slow_limits or SlowLimits()
        self.heal_log = HealLog()
        self.rot_log = RotLog()
        self._images: dict[ImageId, OpenImage] = {}
        self._away: dict[str, float] = {}
        """Nodes that were connected and are lost, and since when."""
        self._served = served or Served(holder)
        self._voters = voters or Arbiters()
        self._deciding = deciding or DecidingThread(engine.next_event)
        self._calls = Calls(self._deciding, Granter(catalog, self._voters), self._images)
        self._channels = Channels(
            engine,
            holder=holder,
            local_node=local_node,
            heal_limits=heal_limits,
            heal_log=self.heal_log,
            rot_log=self.rot_log,
            now_s=self._deciding.now_s,
        )
        self._unflushed = Unflushed(engine, self._served, self._calls)
        self._full_disks = FullDisks(
            self._calls, self._deciding, catalog, self._channels, self._images
        )
        self._history = LostHistory(self._calls, catalog, gateway=gateway, hear=self._hear)
        self._sessions = Sessions(
            lease,
            self._calls,
            self._deciding,
            catalog,
            self._channels,
            self._history,
            self._images,
            hear=self._hear,
        )
        self._leases = Leases(
            self._calls,
            self._deciding,
            catalog,
            self._sessions,
            self._served,
            self._images,
            gateway=gateway,
            holder=holder,
            lock=lock,
            hear=self._hear,
            taken=self._begin,
        )
        self._orders = Orders()
        self.failed: Callable[[str], None] = lambda _why: None

    def start(self) -> None:
        """Take an etcd lease and begin. Raises EtcdUnavailable."""
        self._sessions.start()
        self._deciding.start(self._on_engine, self._tick, self.failed)

    def stop(self) -> None:
        """Send clients away, close all images, give the leases back."""
        done = threading.Event()
        self._deciding.put(lambda: self._begin_stop(done.set))
        done.wait(STOP_S)
        self._orders.end()
        self._deciding.stop()
        self._sessions.close()
        self._voters.close()

    def snapshot(self) -> list[OpenImage]:
        """Return the open images as they are now. For any thread."""
        return list(self._images.values())

    def look_again(self) -> None:
        """Look whether a recovery of etcd's records has left us our images. For any thread."""
        self._deciding.put(lambda: self._history.look_at(self.snapshot()))

    def _tick(self) -> None:
        for image in list(self._images.values()):
            self._step(image, events.Tick(self._deciding.now_s()))
            self._full_disks.mind(image)

    # Images

    def _use(
        self, name: ImageName, found: Stored[ImageRecord], *, maintenance: bool = False
    ) -> OpenImage:
        """Return the open image, or begin to open it."""
        image = self._images.get(found.record.id)
        if image is not None:
            return image
        image = OpenImage(
            image=found.record.id,
            name=name,
            channel=self._channels.new(),
            holder=Holder(
                holder=self._holder_id,
                now_s=self._deciding.now_s(),
                slowness=Slowness(self._slow_limits),
            ),
            maintenance=maintenance,
        )
        self._images[image.image] = image
        self._channels.add(image)
        self._leases.take(image, self._deciding.now_s() + OPEN_LIMIT_S)
        return image

    def _begin(self, image: OpenImage, held: Held) -> None:
        image.held = held
        self._step(image, events.LeaseTaken(held.record, dict(self._away)))
        self._taken(image)

    def _forget(self, image: OpenImage) -> None:
        self._channels.forget(image)
        self._served.forget_memory(image.image)
        del self._images[image.image]
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
    def _layers_changed(
        self, image: OpenImage, failed: str | None, *, unknown: bool = False
    ) -> None:
        """The layers that were asked for are there, or are not, or it is `unknown`, and why."""

    @abstractmethod
    def _mend_parent(self, image: OpenImage) -> None:
        """A node has lost what the image begins on: whoever opens that finds it, and heals it."""

    @abstractmethod
    def _on_reader(self, event: dict[str, Any]) -> None:
        """The engine tells of a channel that is no open image's."""

    @abstractmethod
    def _on_client(self, event: dict[str, Any]) -> None:
        """An NBD client asks for something, or is gone."""

    # Events

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
            image = self._channels.image(event["channel"])
            if image is not None:
                self._on_image(image, event)
            else:
                self._on_reader(event)

    def _on_image(self, image: OpenImage, event: dict[str, Any]) -> None:
        if event["event"] == "zeroed":
            self._zeroed(image, event["done"])
            return
        heard = self._channels.heard(image, event)
        if heard is not None:
            self._hear(image, heard)

    def _hear(self, image: OpenImage, event: events.Event) -> None:
        """Take what the engine, etcd or an arbiter tells of an image."""
        if isinstance(event, events.Lost | events.Fenced):
            self._lost(image, event)
            return
        if isinstance(event, events.Holding | events.Frozen) and image.snapshot is not None:
            image.snapshot.held_since_s = image.snapshot.held_since_s or self._deciding.now_s()
        self._step(image, event)
        if isinstance(event, events.Admitted | events.Levelled | events.MembershipChanged):
            self._unflushed.remember(image)

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

        self._calls.later(
            lambda: self._catalog.image(image.image), found, lambda _error: self._step(image, event)
        )

    def _step(self, image: OpenImage, event: events.Event) -> None:
        """Have the image's holder decide, and carry out what it says."""
        if isinstance(event, events.Lost | events.Fenced):
            self._served.lost(image.image)
            self._calls.later(self._served.save, nothing_more, nothing_more)
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
        for node in sorted(image.slow.keys() - before.keys()):
            lag_ms = image.slow[node]
            log.warning("replica_slow", image=str(image.name), node=node, lag_ms=lag_ms)
        for node in sorted(before.keys() - image.slow.keys()):
            log.info("replica_not_slow", image=str(image.name), node=node)

    # Effects

    def _carry_out(self, image: OpenImage, effect: effects.Effect) -> None:
        match effect:
            case effects.OpenImage(record):
                self._channels.open(image, record)
                self._sessions.opened(image)
            case effects.Admit():
                self._channels.admit(image, effect)
            case effects.Peek(node):
                self._channels.peek(image, node)
            case effects.Heal():
                self._channels.heal(image, effect)
            case effects.EndHeal(attempt):
                self._channels.end_heal(image, attempt)
            case effects.Freeze(attempt):
                if image.snapshot is not None:
                    image.snapshot.held_since_s = None
                self._engine.freeze(image.channel, attempt)
            case effects.Thaw(attempt):
                self._engine.thaw(image.channel, attempt)
            case effects.AskEmptied():
                self._engine.ask_emptied(image.channel)
            case effects.LookAtAncestors(look):
                self._look_at_ancestors(image, look)
            case effects.MendParent():
                self._mend_parent(image)
            case effects.TellLayers(failed, unknown):
                self._layers_changed(image, failed, unknown=unknown)
            case effects.ChangeMembership(_, after):
                self._change_membership(image, after)
            case effects.Reconfigure(record):
                self._channels.reconfigure(image, record)
            case effects.Serve():
                log.info("image_opened", image=str(image.name), epoch=self._epoch(image))
                self._unflushed.tell_losses(image)
                self._opened(image)
            case effects.Refuse(reason):
                self._refused(image, reason)
            case effects.CloseImage():
                self._engine.close(image.channel)
            case effects.KillImage():
                self._engine.kill(image.channel)
            case effects.Release(_, clean):
                self._leases.release(image, clean)
            case effects.Forget():
                self._forget(image)

    def _look_at_ancestors(self, image: OpenImage, look: int) -> None:
        assert image.held is not None
        record = image.held.record
        self._calls.later(
            lambda: self._catalog.lacking(record),
            lambda lacking: self._step(image, events.AncestorsSeen(look, lacking)),
            lambda error: self._step(image, events.AncestorsUnseen(look, str(error))),
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
            self._hear(image, events.MembershipChanged(new.record))

        def failed(error: HciError) -> None:
            if isinstance(error, HasClones):
                self._hear(image, events.ChangeRefused(str(error)))
            elif granting.may_pass(error):
                self._hear(image, events.MembershipDelayed(str(error), progress.maybe_taken))
            elif isinstance(error, LeaseMoved):
                # Taken again while the change was on its way: it is asked for under the new one.
                self._hear(image, events.MembershipDelayed(str(error)))
            elif is_gone(image, error):
                self._hear(image, events.Lost(str(error)))
            elif is_behind(error):
                # What needs no change goes on: the nodes know whose the image is.
                self._hear(image, events.MembershipDelayed(str(error)))
                self._history.suspect(image, error)
            elif isinstance(error, LeaseLost) and error.gateway is None:
                # It may merely have lapsed: it is taken again, or found to be another's.
                self._hear(image, events.MembershipDelayed(str(error)))
                self._sessions.retake(image)
            else:
                self._hear(image, events.Lost(str(error)))

        self._calls.carry_through(granting.change(held, after, progress), changed, failed)

    def _epoch(self, image: OpenImage) -> int:
        assert image.held is not None
        return image.held.record.epoch

    # The end

    def _begin_stop(self, done: Callable[[], None]) -> None:
        self._calls.stopping = True
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
