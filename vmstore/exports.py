"""`Exports`: the NBD clients of the images that a gateway serves.

The first client that asks for an image has it opened, the last that leaves has it closed. All of
this happens on the deciding thread of `Serving`, but for what says otherwise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import structlog

from engine import Gateway
from etcd.errors import EtcdError, EtcdUnavailable, OutcomeUnknown
from etcd.images import ImageRecord, Snapshot
from etcd.lease import Session
from shard.errors import HciError
from shard.ids import ImageId
from shard.scrub import ScrubLimits
from vmstore import events
from vmstore.calls import OPEN_RETRY_S, RELEASE_RETRY_S, nothing_more
from vmstore.catalog import Catalog
from vmstore.deciding import TICK_S, Deciding
from vmstore.errors import (
    BeingResized,
    ClientBarred,
    LeaseLost,
    LeaseMoved,
    UnknownImage,
    UnknownPool,
    UnknownSnapshot,
)
from vmstore.granter import Voters
from vmstore.healing import HealLimits
from vmstore.holder import OPEN_LIMIT_S, closing_waits_for
from vmstore.holding import Held
from vmstore.names import ImageName, SnapshotName, parse_name
from vmstore.open_image import OpenImage
from vmstore.readers import Readers
from vmstore.removals import Removals
from vmstore.resizing import RECONNECT_S, RESIZER
from vmstore.served import Served
from vmstore.slowness import SlowLimits
from vmstore.snapshot_errors import BeingRolledBack
from vmstore.standing import Phase
from vmstore.stored import Stored

log = structlog.get_logger()

PATIENCE_S = 10.0
"""How long an image that was opened to be healed stays open while no heal is under way, or for its
nodes to say that they have merged what they were to."""


class Permission(IntEnum):
    """What a client may do with an image; the higher one includes the lower."""

    NONE = 0
    READ = 1
    WRITE = 2


@dataclass(frozen=True, slots=True)
class Visitor:
    """Who asks: what is known of a client before it is let in."""

    trusted: bool
    """Came where nobody is asked who he is: what guards that place has let it in."""
    certificate: bytes | None
    """What it has shown over TLS, in DER."""


@dataclass(slots=True)
class _Care:
    """An image that is open for maintenance; `pin` stands for a client."""

    pin: int
    idle_since_s: float
    scrub: bool = False
    """For a scrub that is not through."""


class Exports(Removals):
    """Serves the images of one cluster to NBD clients of one engine; see `Serving`.

    `permitted` says what a client may do with an image, by its name.
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
        permitted: Callable[[Visitor, str], Permission] = lambda _visitor, _name: Permission.WRITE,
    ) -> None:
        super().__init__(
            engine,
            catalog,
            gateway=gateway,
            holder=holder,
            local_node=local_node,
            lease=lease,
            voters=voters,
            heal_limits=heal_limits,
            slow_limits=slow_limits,
            served=served,
            lock=lock,
            deciding=deciding,
        )
        self._permitted = permitted
        self._visitors: dict[int, Visitor] = {}
        self._client_image: dict[int, ImageId] = {}
        self._peers: dict[int, str] = {}
        """The processes of clients, where they are known."""
        self._asking: set[int] = set()
        """Clients that wait for what etcd says of the image that they asked for."""
        self._next_pin = RESIZER
        self._cared_for: dict[ImageId, _Care] = {}
        self._readers = Readers(
            engine,
            self._channels,
            let_in=self._let_reader_in,
            refuse=lambda client, why: self._say_no(client, "refused", why),
            again=lambda client, snapshot: self._on_asked(client, "go", str(snapshot)),
        )

    # For the caretaker: any thread

    def maintain(self, name: ImageName, *, scrub: bool = False) -> None:
        """Open an image that nobody has open, to heal it, until it is or somebody wants it.

        With `scrub` to scrub it, until `scrubbed` is called.
        """
        self._deciding.put(lambda: self._care_for(name, scrub))

    def serving(self) -> dict[ImageId, ImageName]:
        """Return the images that serve here, whoever for."""
        images = self.snapshot()
        return {i.image: i.name for i in images if i.holder.phase is Phase.SERVING}

    def scrub(
        self, image: ImageId, attempt: int, shards: tuple[int, int], limits: ScrubLimits
    ) -> None:
        """Begin a scrub of an image that serves; `rot_log` hears of its end.

        Of shards from one on, up to another; 0: up to the last one.
        """
        from_shard, end_shard = shards

        def begin() -> None:
            found = self._images.get(image)
            if found is not None:
                self._engine.scrub(
                    found.channel,
                    attempt=attempt,
                    from_shard=from_shard,
                    end_shard=end_shard or None,
                    bytes_per_second=limits.bytes_per_second,
                    share_percent=limits.share_percent,
                )

        self._deciding.put(begin)

    def end_scrub(self, image: ImageId, attempt: int) -> None:
        """End a scrub before it is through."""

        def end() -> None:
            found = self._images.get(image)
            if found is not None:
                self._engine.end_scrub(found.channel, attempt)

        self._deciding.put(end)

    def scrubbed(self, image: ImageId) -> None:
        """An image that was opened for its scrub is no longer needed for that."""

        def over() -> None:
            care = self._cared_for.get(image)
            if care is not None:
                care.scrub = False

        self._deciding.put(over)

    def maintained(self) -> int:
        """Return how many images are open for that."""
        return len(self._cared_for)

    def _take_pin(self) -> int:
        self._next_pin -= 1
        return self._next_pin

    def snapshots_open(self) -> int:
        """Return how many snapshots are open for clients here. For any thread."""
        return len(self._readers)

    # Clients

    def _on_client(self, event: dict[str, Any]) -> None:
        if event["event"] == "asked":
            peer = event.get("peer")
            if peer is not None:
                self._peers[event["client"]] = peer
            visitor = Visitor(event.get("trusted", True), event.get("certificate"))
            self._visitors[event["client"]] = visitor
            self._on_asked(event["client"], event["query"], event["name"])
        else:
            self._client_left(event["client"])

    def _on_asked(self, client: int, query: str, name: str | None) -> None:
        if query == "list":
            self._calls.later(
                lambda: [str(entry.name) for entry in self._catalog.images()],
                lambda names: self._engine.answer_names(client, self._seen_by(client, names)),
                lambda error: self._refuse(client, error),
            )
            return
        try:
            asked_for = parse_name(name or "")
        except HciError as error:
            self._say_no(client, "unknown", str(error))
            return
        if self._permission(client, asked_for) is Permission.NONE:
            # Whether there is such an image is nothing that it has to know.
            self._say_no(client, "refused", f"you may not open {asked_for}")
            return
        opens = query in ("go", "export_name")
        self._asking.add(client)
        give_up_s = self._deciding.now_s() + (OPEN_LIMIT_S if opens else 0.0)

        def look_up() -> None:
            if query == "snapshots":
                self._calls.later(
                    lambda: self._catalog.comparable(asked_for),
                    lambda older: self._found_comparable(client, older),
                    failed,
                )
                return
            if isinstance(asked_for, SnapshotName):
                self._calls.later(
                    lambda: self._catalog.find_snapshot(asked_for),
                    lambda found: self._found_snapshot(client, asked_for, *found, opens=opens),
                    failed,
                )
                return
            self._calls.later(
                lambda: self._catalog.find(asked_for),
                lambda found: self._found(client, asked_for, found, opens),
                failed,
            )

        def failed(error: HciError) -> None:
            may_wait = not self._calls.stopping and self._deciding.now_s() < give_up_s
            if isinstance(error, EtcdUnavailable) and client in self._asking and may_wait:
                self._deciding.after(OPEN_RETRY_S, look_up)
                return
            self._asking.discard(client)
            self._refuse(client, error)

        look_up()

    def _found_comparable(self, client: int, older: list[Snapshot]) -> None:
        self._asking.discard(client)
        self._engine.answer_snapshots(
            client, [(each.name, each.layer, each.generation) for each in older]
        )

    def _found(self, client: int, name: ImageName, found: Stored[ImageRecord], opens: bool) -> None:
        if client not in self._asking:
            # It left meanwhile, and would never leave what was opened for it now.
            return
        self._asking.discard(client)
        if not opens:
            self._answer(client, name, found.record, None)
        elif self._calls.stopping:
            self._say_no(client, "unavailable", "the gateway is stopping; try again")
        else:
            try:
                self._served.check(name, self._peers.get(client), found.record)
            except ClientBarred as error:
                self._refuse(client, error)
                return
            image = self._use(name, found)
            self._client_image[client] = image.image
            self._let_in_or_wait(image, client, name)

    def _found_snapshot(
        self,
        client: int,
        name: SnapshotName,
        record: ImageRecord,
        snapshot: Snapshot,
        *,
        opens: bool,
    ) -> None:
        if client not in self._asking:
            return
        self._asking.discard(client)
        if not opens:
            self._let_reader_in(client, name, snapshot.size_bytes, None)
        elif self._calls.stopping:
            self._say_no(client, "unavailable", "the gateway is stopping; try again")
        else:
            self._readers.open(client, name, record, snapshot)

    def _let_reader_in(
        self, client: int, name: SnapshotName, size_bytes: int, channel: int | None
    ) -> None:
        self._engine.answer_export(
            client, name=str(name), size_bytes=size_bytes, read_only=True, channel=channel
        )

    def _on_reader(self, event: dict[str, Any]) -> None:
        self._readers.heard(event)

    def _let_in_or_wait(self, image: OpenImage, client: int, name: ImageName) -> None:
        if image.resize is not None and image.resize.shrinks:
            self._client_image.pop(client, None)
            self._refuse(client, BeingResized(str(name)))
        elif image.rollback is not None and image.rollback.begun is not None:
            self._client_image.pop(client, None)
            self._refuse(client, BeingRolledBack(str(name)))
        elif image.holder.phase is Phase.SERVING and not image.maintenance:
            self._let_in(image, client, name)
        else:
            image.waiting.append((client, name))
            self._claim(image)

    def _let_in(self, image: OpenImage, client: int, name: ImageName) -> None:
        """Let a client in, once it is written down whom it belongs to."""
        assert image.held is not None
        image.users.add(client)
        peer, record = self._peers.get(client), image.held.record
        if peer is None or self._served.is_served(peer, record):
            self._written_down(image, client, name)
            return
        self._calls.later(
            lambda: self._served.admit(name, peer, record),
            lambda _written: self._written_down(image, client, name),
            lambda error: self._turn_away(image, client, "refused", str(error)),
        )

    def _written_down(self, image: OpenImage, client: int, name: ImageName) -> None:
        if client not in image.users:
            return
        if image.holder.phase is not Phase.SERVING:
            why = f"{name} was closed meanwhile; connect again"
            self._turn_away(image, client, "unavailable", why)
            return
        assert image.held is not None
        self._answer(client, name, image.held.record, image.channel)

    def _turn_away(self, image: OpenImage, client: int, kind: str, why: str) -> None:
        if client in image.users:
            image.users.discard(client)
            self._client_image.pop(client, None)
            self._say_no(client, kind, why)
            self._close_if_unused(image)

    def _answer(
        self, client: int, name: ImageName, record: ImageRecord, channel: int | None
    ) -> None:
        self._engine.answer_export(
            client,
            name=str(name),
            size_bytes=record.size_bytes,
            read_only=self._permission(client, name) is Permission.READ,
            channel=channel,
        )

    def _permission(self, client: int, name: ImageName | SnapshotName) -> Permission:
        """Return what a client may do with an image; who may read it may read its snapshots."""
        visitor = self._visitors.get(client)
        image = name.image if isinstance(name, SnapshotName) else name
        # One that has left meanwhile gets no answer, whatever that is.
        return self._permitted(visitor, str(image)) if visitor is not None else Permission.NONE

    def _seen_by(self, client: int, names: list[str]) -> list[str]:
        visitor = self._visitors.get(client)
        if visitor is None:
            return []
        return [name for name in names if self._permitted(visitor, name) is not Permission.NONE]

    def _refuse(self, client: int, error: HciError) -> None:
        if isinstance(error, UnknownImage | UnknownPool | UnknownSnapshot):
            kind = "unknown"
        elif isinstance(error, EtcdError):
            kind = "unavailable"
        else:
            kind = "refused"
        self._say_no(client, kind, str(error))

    def _say_no(self, client: int, kind: str, why: str) -> None:
        """Refuse a client. Logged as well: not every client shows its user what a server says."""
        if kind != "unknown":
            log.warning("client_refused", why=why, process=self._peers.get(client, "unknown"))
        self._engine.answer_error(client, kind, why)

    def _client_left(self, client: int) -> None:
        self._asking.discard(client)
        self._visitors.pop(client, None)
        peer = self._peers.pop(client, None)
        self._readers.left(client)
        image_id = self._client_image.pop(client, None)
        image = self._images.get(image_id) if image_id is not None else None
        if image is None:
            return
        if client in image.users:
            image.users.discard(client)
            if client in image.sent_away:
                image.sent_away.discard(client)
            else:
                self._process_left(image, peer)
        image.waiting = [waiter for waiter in image.waiting if waiter[0] != client]
        self._close_if_unused(image)

    def _process_left(self, image: OpenImage, peer: str | None) -> None:
        """A process that left a serving image by itself has nothing unanswered to send again.

        One that we sent away, be it for a restart, comes back with all of it.
        """
        others = {self._peers.get(user) for user in image.users}
        serves = image.holder.phase is Phase.SERVING and not self._calls.stopping
        if peer is not None and peer not in others and serves:
            self._served.left(image.image, peer)
            self._calls.later(self._served.save, nothing_more, nothing_more)

    def _reconnect(self, image: OpenImage) -> None:
        clients = {user for user in image.users if user > 0}
        if not clients:
            return
        image.sent_away |= clients
        pin = self._take_pin()
        image.users.add(pin)
        self._client_image[pin] = image.image
        self._deciding.after(RECONNECT_S, lambda: self._client_left(pin))
        self._engine.reconnect(image.channel)

    def _close_if_unused(self, image: OpenImage) -> None:
        if not image.users and not image.waiting:
            self._step(image, events.Close())

    def _refuse_late(self, image: OpenImage, now_s: float) -> None:
        """Tell clients that wait for an image to be closed what that waits for.

        Those that wait for it to be opened hear it from its holder.
        """
        if image.holder.phase not in (Phase.CLOSING, Phase.RELEASING):
            return
        image.late = {client: image.late.get(client, now_s) for client, _name in image.waiting}
        late = {client for client, since_s in image.late.items() if now_s - since_s > OPEN_LIMIT_S}
        if not late:
            return
        image.waiting = [waiter for waiter in image.waiting if waiter[0] not in late]
        why = (
            f"{image.name} is being closed for who had it before, and waited "
            f"{OPEN_LIMIT_S:.0f} s {closing_waits_for(image.holder)}; it opens after that"
        )
        for client in late:
            self._client_image.pop(client, None)
            self._say_no(client, "refused", why)

    # Maintenance

    def _care_for(self, name: ImageName, scrub: bool) -> None:
        def found(stored: Stored[ImageRecord]) -> None:
            if stored.record.id in self._images or self._calls.stopping:
                return
            pin = self._take_pin()
            image = self._use(name, stored, maintenance=True)
            image.users.add(pin)
            self._client_image[pin] = image.image
            self._cared_for[image.image] = _Care(pin, self._deciding.now_s(), scrub)

        self._calls.later(lambda: self._catalog.find(name), found, lambda _error: None)

    def _tick(self) -> None:
        super()._tick()
        for image_id, care in list(self._cared_for.items()):
            image = self._images.get(image_id)
            if image is None:
                del self._cared_for[image_id]
                continue
            if image.holder.heals.now is not None or image.holder.phase is not Phase.SERVING:
                care.idle_since_s = self._deciding.now_s()
            record = image.holder.record
            healed = record is not None and not record.stale and not record.merging
            idle = self._deciding.now_s() - care.idle_since_s > PATIENCE_S
            over = (healed or idle) and not care.scrub
            if over or not image.maintenance:
                del self._cared_for[image_id]
                self._client_left(care.pin)
        for image in list(self._images.values()):
            self._refuse_late(image, self._deciding.now_s())

    def _claim(self, image: OpenImage) -> None:
        """Keep an image that was opened for maintenance: a client wants it."""
        current = self._images.get(image.image) is image
        if not (current and image.maintenance) or image.claiming:
            return
        if image.holder.phase is not Phase.SERVING:
            # It is claimed when it serves.
            return
        if image.holder.changes_record:
            self._deciding.after(TICK_S, lambda: self._claim(image))
            return
        assert image.held is not None
        held = image.held
        # Another change under the same lease would fail for the lease's new value.
        image.holder.paused = image.claiming = True

        def claim() -> Held:
            new = self._catalog.claim(held)
            self._served.taken(held.record, new.record)
            return new

        def claimed(new: Held) -> None:
            image.held = new
            image.holder.record = new.record
            image.maintenance = False
            log.info("image_claimed", image=str(image.name))
            go_on()
            self._opened(image)

        def failed(error: HciError) -> None:
            if isinstance(error, OutcomeUnknown) and image.holder.phase is Phase.SERVING:
                # etcd may have it: a change under the former lease would be refused, as another's.
                self._deciding.after(RELEASE_RETRY_S, ask)
                return
            go_on()
            lapsed = isinstance(error, LeaseLost) and error.gateway is None
            if lapsed:
                # It is taken again, or found to have been another's meanwhile.
                self._sessions.retake(image)
            # Moved: it was taken again while the claim was on its way.
            if isinstance(error, EtcdError | LeaseMoved) or lapsed:
                self._deciding.after(RELEASE_RETRY_S, lambda: self._claim(image))
            else:
                self._hear(image, events.Lost(str(error)))

        def go_on() -> None:
            image.holder.paused = image.claiming = False
            self._step(image, events.Tick(self._deciding.now_s()))

        def ask() -> None:
            self._calls.later(claim, claimed, failed)

        ask()

    # Images

    def _taken(self, image: OpenImage) -> None:
        if not image.users and not image.waiting:
            self._step(image, events.Close())

    def _opened(self, image: OpenImage) -> None:
        if image.maintenance:
            if image.waiting or image.resize is not None or image.rollback is not None:
                self._claim(image)
            self._begin_snapshot(image)
            self._begin_removal(image)
            return
        waiting, image.waiting = image.waiting, []
        for client, name in waiting:
            self._let_in(image, client, name)
        self._begin_resize(image)
        self._begin_snapshot(image)
        self._begin_rollback(image)
        self._begin_removal(image)
        self._close_if_unused(image)

    def _refused(self, image: OpenImage, reason: str) -> None:
        waiting, image.waiting = image.waiting, []
        for client, _name in waiting:
            self._client_image.pop(client, None)
            self._say_no(client, "refused", reason)
        self._end_resize(image, HciError(reason))
        self._layers_changed(image, reason)

    def _forgotten(self, image: OpenImage) -> None:
        # Clients that came while it was closing open it anew.
        waiting, image.waiting = image.waiting, []
        for client, name in waiting:
            self._client_image.pop(client, None)
            self._on_asked(client, "go", str(name))
        self._end_resize(image, HciError(f"image {image.name} was closed; try again"))
        self._layers_changed(image, "the image was closed; try again")

    def _begin_stop(self, done: Callable[[], None]) -> None:
        self._readers.stop()
        super()._begin_stop(done)
