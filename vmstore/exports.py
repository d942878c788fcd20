"""`Exports`: who uses the images that a gateway serves: NBD clients, and the control service.

The first client that asks for an image has it opened, the last that leaves has it closed. All of
this happens on the deciding thread of `Serving`, but for what says otherwise.
"""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from engine import Gateway
from etcd.errors import EtcdError
from etcd.lease import Session
from etcd.records import ImageRecord
from shard.errors import HciError
from shard.ids import ImageId
from vmstore import events
from vmstore.catalog import Catalog
from vmstore.deciding import TICK_S, Deciding
from vmstore.errors import InUse, ShrinkRefused, UnknownImage, UnknownPool
from vmstore.holder import OPEN_LIMIT_S, Phase
from vmstore.holding import Held
from vmstore.names import ImageName, parse_image_name
from vmstore.serving import OpenImage, Serving
from vmstore.stored import Stored

ZERO_LIMIT_S = 600.0
"""How long a shrink may take to discard what it cuts off; a hang detector."""


class Exports(Serving):
    """Serves the images of one cluster to NBD clients of one engine; see `Serving`."""

    def __init__(
        self,
        engine: Gateway,
        catalog: Catalog,
        *,
        gateway: str,
        holder: str,
        local_node: Callable[[], str | None],
        lease: Callable[[Callable[[], None], Callable[[float], None]], Session],
        deciding: Deciding | None = None,
    ) -> None:
        super().__init__(
            engine,
            catalog,
            gateway=gateway,
            holder=holder,
            local_node=local_node,
            lease=lease,
            deciding=deciding,
        )
        self._client_image: dict[int, ImageId] = {}
        self._gone: set[int] = set()
        self._next_pin = -1

    # For the control service: any thread

    def resize(self, name: ImageName, size_bytes: int, *, force: bool) -> None:
        """Change the size of an image, opening it for that where it is closed.

        Raises InUse where clients have it open and it would shrink, ShrinkRefused, and what an
        open raises.
        """
        opened: Future[OpenImage] = Future()
        pin = self._take_pin()
        self._deciding.put(lambda: self._pin(name, pin, opened))
        try:
            self._resize(opened.result(timeout=OPEN_LIMIT_S + 10), size_bytes, force)
        finally:
            self._deciding.put(lambda: self._client_left(pin))

    def _take_pin(self) -> int:
        self._next_pin -= 1
        return self._next_pin

    def _resize(self, image: OpenImage, size_bytes: int, force: bool) -> None:
        assert image.held is not None
        former_bytes = image.held.record.size_bytes
        if size_bytes < former_bytes:
            if any(user > 0 for user in image.users):
                raise InUse(str(image.name), self._gateway)
            if not force:
                raise ShrinkRefused(str(image.name), former_bytes, size_bytes)
            image.zeroed = Future()
            self._engine.zero(image.channel, size_bytes, former_bytes - size_bytes)
            image.zeroed.result(timeout=ZERO_LIMIT_S)
        resized: Future[None] = Future()
        self._deciding.put(lambda: self._store_size(image, size_bytes, resized))
        resized.result(timeout=OPEN_LIMIT_S)

    def _store_size(self, image: OpenImage, size_bytes: int, resized: "Future[None]") -> None:
        """Store a new size; no change of membership is under way meanwhile."""
        if image.holder.proposal is not None or image.holder.paused:
            self._deciding.after(TICK_S, lambda: self._store_size(image, size_bytes, resized))
            return
        assert image.held is not None
        held = image.held
        image.holder.paused = True

        def stored(new: Held) -> None:
            image.held = new
            image.holder.record = new.record
            self._engine.resize(image.channel, size_bytes)
            go_on()
            resized.set_result(None)

        def failed(error: HciError) -> None:
            go_on()
            resized.set_exception(error)

        def go_on() -> None:
            image.holder.paused = False
            self._step(image, events.Tick(self._deciding.now_s()))

        self._later(lambda: self._catalog.resize(held, size_bytes, force=True), stored, failed)

    # Clients

    def _on_client(self, event: dict[str, Any]) -> None:
        if event["event"] == "asked":
            self._on_asked(event["client"], event["query"], event["name"])
        else:
            self._client_left(event["client"])

    def _on_asked(self, client: int, query: str, name: str | None) -> None:
        if query == "list":
            self._later(
                lambda: [str(entry.name) for entry in self._catalog.images()],
                lambda names: self._engine.answer_names(client, names),
                lambda error: self._refuse(client, error),
            )
            return
        try:
            image_name = parse_image_name(name or "")
        except HciError as error:
            self._engine.answer_error(client, "unknown", str(error))
            return
        opens = query in ("go", "export_name")
        self._later(
            lambda: self._catalog.find(image_name),
            lambda found: self._found(client, image_name, found, opens),
            lambda error: self._refuse(client, error),
        )

    def _found(self, client: int, name: ImageName, found: Stored[ImageRecord], opens: bool) -> None:
        if client in self._gone:
            self._gone.discard(client)
            return
        if not opens:
            self._answer(client, name, found.record, None)
        elif self._stopping:
            self._engine.answer_error(client, "unavailable", "the gateway is stopping; try again")
        else:
            image = self._use(name, found)
            self._client_image[client] = image.image
            self._let_in_or_wait(image, client, name)

    def _let_in_or_wait(self, image: OpenImage, client: int, name: ImageName) -> None:
        if image.holder.phase is Phase.SERVING:
            self._let_in(image, client, name)
        else:
            image.waiting.append((client, name))

    def _let_in(self, image: OpenImage, client: int, name: ImageName) -> None:
        assert image.held is not None
        image.users.add(client)
        self._answer(client, name, image.held.record, image.channel)

    def _answer(
        self, client: int, name: ImageName, record: ImageRecord, channel: int | None
    ) -> None:
        self._engine.answer_export(
            client, name=str(name), size_bytes=record.size_bytes, read_only=False, channel=channel
        )

    def _refuse(self, client: int, error: HciError) -> None:
        if isinstance(error, UnknownImage | UnknownPool):
            kind = "unknown"
        elif isinstance(error, EtcdError):
            kind = "unavailable"
        else:
            kind = "refused"
        self._engine.answer_error(client, kind, str(error))

    def _client_left(self, client: int) -> None:
        image_id = self._client_image.pop(client, None)
        image = self._images.get(image_id) if image_id is not None else None
        if image is None:
            if client > 0:
                self._gone.add(client)
                if len(self._gone) > 10_000:
                    self._gone.clear()
            return
        image.users.discard(client)
        image.waiting = [waiter for waiter in image.waiting if waiter[0] != client]
        self._close_if_unused(image)

    def _close_if_unused(self, image: OpenImage) -> None:
        if not image.users and not image.waiting and not image.pins:
            self._step(image, events.Close())

    def _pin(self, name: ImageName, pin: int, opened: "Future[OpenImage]") -> None:
        def found(stored: Stored[ImageRecord]) -> None:
            image = self._use(name, stored)
            self._client_image[pin] = image.image
            image.users.add(pin)
            if image.holder.phase is Phase.SERVING:
                opened.set_result(image)
            else:
                image.pins.append(opened)

        self._later(lambda: self._catalog.find(name), found, opened.set_exception)

    # Images

    def _taken(self, image: OpenImage) -> None:
        if not image.users and not image.waiting:
            self._step(image, events.Close())

    def _opened(self, image: OpenImage) -> None:
        waiting, image.waiting = image.waiting, []
        for client, name in waiting:
            self._let_in(image, client, name)
        pins, image.pins = image.pins, []
        for opened in pins:
            opened.set_result(image)
        self._close_if_unused(image)

    def _refused(self, image: OpenImage, reason: str) -> None:
        waiting, image.waiting = image.waiting, []
        for client, _name in waiting:
            self._client_image.pop(client, None)
            self._engine.answer_error(client, "refused", reason)
        pins, image.pins = image.pins, []
        for opened in pins:
            opened.set_exception(HciError(reason))

    def _forgotten(self, image: OpenImage) -> None:
        # Clients that came while it was closing open it anew.
        waiting, image.waiting = image.waiting, []
        for client, name in waiting:
            self._client_image.pop(client, None)
            self._on_asked(client, "go", str(name))
        pins, image.pins = image.pins, []
        for opened in pins:
            opened.set_exception(HciError(f"image {image.name} was closing; try again"))
