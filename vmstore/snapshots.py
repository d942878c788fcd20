"""`Snapshots`: snapshots of images that this gateway holds, or opens for that.

An image that nobody has open is opened with a lease for maintenance, made level where it was not
closed cleanly, and closed again. What is done step by step its holder decides (`vmstore/freezing`).

One snapshot of an image at a time, and none while its size changes. All is decided on the deciding
thread. A snapshot ends, one way or the other, at the latest with the image.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import structlog

from etcd.images import ImageRecord
from shard.errors import HciError
from vmstore import events
from vmstore.deciding import TICK_S
from vmstore.freezing import LEVEL_LIMIT_S
from vmstore.holder import OPEN_LIMIT_S
from vmstore.layer_changes import NewSnapshot
from vmstore.names import ImageName
from vmstore.open_image import (
    OpenImage,
    RemovalOrder,
    RollbackOrder,
    SnapshotOrder,
    TakenSnapshot,
)
from vmstore.orders import Answer
from vmstore.record_size import check_snapshot
from vmstore.resizing import Resizing, why_busy
from vmstore.snapshot_errors import BeingSnapshotted, SnapshotFailed, SnapshotUnknown
from vmstore.standing import Phase
from vmstore.stored import Stored

log = structlog.get_logger()

SNAPSHOT_LIMIT_S = OPEN_LIMIT_S + LEVEL_LIMIT_S + 20.0
"""How long a caller waits: for the image to open, to be made level, and for the rest with room."""

STOPPING = "the gateway is stopping; try again"

LayersOrder = SnapshotOrder | RollbackOrder | RemovalOrder


class Snapshots(Resizing):
    """Takes snapshots of images; see the module."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._looked_up: set[ImageName] = set()
        """Images of which a snapshot was ordered that etcd is asked for."""

    @abstractmethod
    def _take_pin(self) -> int:
        """Return a number that stands for a client, and is none's."""

    # For the control service: any thread

    def take_snapshot(self, image: ImageName, name: str, created_s: int) -> TakenSnapshot:
        """Take a snapshot; it is taken when all nodes in sync have stored that.

        Raises SnapshotExists, TooManySnapshots, BeingSnapshotted, BeingResized, BeingClosed where
        that lasts, SnapshotFailed, TimeoutError where it is not known yet, and what an open raises.
        """

        def begin(done: Answer[TakenSnapshot]) -> None:
            self._find_to_freeze(image, SnapshotOrder(name, created_s, done))

        return self._ordered(begin, SNAPSHOT_LIMIT_S)

    # On the deciding thread

    def _find_to_freeze(self, name: ImageName, order: SnapshotOrder) -> None:
        def take(image: OpenImage) -> None:
            image.snapshot = order
            if image.holder.phase is Phase.SERVING:
                self._begin_snapshot(image)

        if name in self._looked_up:
            order.done.set_exception(BeingSnapshotted(str(name)))
            return
        self._looked_up.add(name)
        self._find_to_change(
            name,
            order,
            SnapshotFailed(order.name, STOPPING),
            take,
            looked_up=lambda: self._looked_up.discard(name),
        )

    def _find_to_change(
        self,
        name: ImageName,
        order: LayersOrder,
        stopping: HciError,
        take: Callable[[OpenImage], None],
        looked_up: Callable[[], None] = lambda: None,
    ) -> None:
        """Open an image for an order about its layers, which keeps it in use from then on.

        `take` gets it, unless something else is done to it; `looked_up` is called when etcd has
        answered, or is not asked. `stopping` is said where the gateway is.
        """

        def find() -> Stored[ImageRecord]:
            self._catalog.check_history()
            return self._catalog.find(name)

        def failed(error: HciError) -> None:
            looked_up()
            order.done.set_exception(error)

        def found(stored: Stored[ImageRecord]) -> None:
            if self._calls.stopping:
                failed(stopping)
                return
            looked_up()
            image = self._use(name, stored, maintenance=True)
            busy = why_busy(image)
            if busy is not None:
                order.done.set_exception(busy)
                return
            order.pin = self._take_pin()
            image.users.add(order.pin)
            take(image)

        if self._calls.stopping:
            failed(stopping)
        else:
            self._calls.later(find, found, failed)

    def _begin_snapshot(self, image: OpenImage) -> None:
        """Have the holder take the snapshot that was asked for, if any was; the image serves."""
        order = image.snapshot
        if order is None or order.begun or image.holder.phase is not Phase.SERVING:
            return
        if self._must_wait(image):
            self._deciding.after(TICK_S, lambda: self._begin_snapshot(image))
            return
        assert image.holder.record is not None
        try:
            # By the record of now: what no node had stored as the image was opened is out of it.
            check_snapshot(image.holder.record, str(image.name), order.name, order.created_s)
        except HciError as error:
            self._end_snapshot(image, error)
            return
        order.begun = True
        self._step(image, events.ChangeLayers(NewSnapshot(order.name, order.created_s)))

    def _must_wait(self, image: OpenImage) -> bool:
        """Whether layers are changed that nobody ordered, or may have been.

        A snapshot that is withdrawn has its name until then, and is not to be taken for one.
        """
        freezing = image.holder.freezing
        return freezing.withdraws is not None or freezing.holds

    def _layers_changed(
        self, image: OpenImage, failed: str | None, *, unknown: bool = False
    ) -> None:
        order = image.snapshot
        if order is None:
            return
        if failed is not None:
            log.warning("snapshot_failed", image=str(image.name), snapshot=order.name, why=failed)
            error = SnapshotUnknown if unknown else SnapshotFailed
            self._end_snapshot(image, error(f"{image.name}@{order.name}", failed))
            return
        assert image.holder.record is not None
        assert order.held_since_s is not None, "changes have waited for it"
        snapshot = image.holder.record.snapshot(order.name)
        assert snapshot is not None, "the record has it"
        held_ms = round((self._deciding.now_s() - order.held_since_s) * 1000)
        log.info(
            "snapshot_taken",
            image=str(image.name),
            snapshot=snapshot.name,
            layer=snapshot.layer,
            held_ms=held_ms,
        )
        self._end_snapshot(image, TakenSnapshot(snapshot, held_ms))

    def _end_snapshot(self, image: OpenImage, outcome: TakenSnapshot | HciError) -> None:
        """Tell who asked, and let the image go; where nothing was asked for, do nothing."""
        order, image.snapshot = image.snapshot, None
        if order is None:
            return
        if isinstance(outcome, TakenSnapshot):
            order.done.set_result(outcome)
        else:
            order.done.set_exception(outcome)
        self._let_go(image, order.pin)

    def _let_go(self, image: OpenImage, pin: int) -> None:
        """Close an image if nobody but this pin uses it."""
        image.users.discard(pin)

        def close() -> None:
            if self._images.get(image.image) is image:
                self._close_if_unused(image)

        # Not in the midst of what the holder has just said.
        self._deciding.put(close)
