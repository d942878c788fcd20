"""`Removals`: snapshots that this gateway removes from images that it holds, or opens for that.

A change of the record takes the name out (`vmstore/merging`); nobody waits for it who reads or
writes the image. What the snapshot alone kept comes back as space when the nodes have merged its
layer. All is decided on the deciding thread.
"""

import structlog

from shard.errors import HciError
from vmstore import events
from vmstore.deciding import TICK_S
from vmstore.errors import UnknownSnapshot
from vmstore.names import ImageName
from vmstore.open_image import OpenImage, RemovalOrder
from vmstore.orders import Answer
from vmstore.rollbacks import Rollbacks
from vmstore.snapshot_errors import RemovalFailed, RemovalUnknown
from vmstore.snapshots import SNAPSHOT_LIMIT_S, STOPPING
from vmstore.standing import Phase

log = structlog.get_logger()


class Removals(Rollbacks):
    """Removes snapshots; see the module."""

    # For the control service: any thread

    def remove_snapshot(self, image: ImageName, name: str) -> int:
        """Remove a snapshot; return its layer, which is merged from now on.

        Raises UnknownSnapshot, BeingSnapshotted, BeingRolledBack, BeingRemoved, BeingResized,
        BeingClosed where that lasts, RemovalFailed, RemovalUnknown, TimeoutError where it is not
        known yet, and what an open raises.
        """

        def begin(done: Answer[int]) -> None:
            self._find_to_remove(image, RemovalOrder(name, done))

        return self._ordered(begin, SNAPSHOT_LIMIT_S)

    # On the deciding thread

    def _find_to_remove(self, name: ImageName, order: RemovalOrder) -> None:
        def take(image: OpenImage) -> None:
            image.removal = order
            self._begin_removal(image)

        self._find_to_change(name, order, RemovalFailed(order.name, STOPPING), take)

    def _begin_removal(self, image: OpenImage) -> None:
        """Have the holder remove the snapshot that was asked for, if any was; the image serves."""
        order = image.removal
        if order is None or order.layer is not None or image.holder.phase is not Phase.SERVING:
            return
        if self._must_wait(image):
            self._deciding.after(TICK_S, lambda: self._begin_removal(image))
            return
        assert image.holder.record is not None
        snapshot = image.holder.record.snapshot(order.name)
        if snapshot is None:
            self._end_removal(image, UnknownSnapshot(str(image.name), order.name))
            return
        order.layer = snapshot.layer
        self._step(image, events.RemoveSnapshot(order.name))

    def _layers_changed(
        self, image: OpenImage, failed: str | None, *, unknown: bool = False
    ) -> None:
        order = image.removal
        if order is None:
            super()._layers_changed(image, failed, unknown=unknown)
            return
        name = f"{image.name}@{order.name}"
        if failed is not None:
            log.warning("removal_failed", image=str(image.name), snapshot=order.name, why=failed)
            error = RemovalUnknown if unknown else RemovalFailed
            self._end_removal(image, error(name, failed))
            return
        assert order.layer is not None, "its holder knew of it"
        log.info("snapshot_removed", image=str(image.name), snapshot=order.name, layer=order.layer)
        self._end_removal(image, order.layer)

    def _end_removal(self, image: OpenImage, outcome: int | HciError) -> None:
        """Tell who asked, and let the image go."""
        order, image.removal = image.removal, None
        assert order is not None, "somebody asked"
        if isinstance(outcome, int):
            order.done.set_result(outcome)
        else:
            order.done.set_exception(outcome)
        self._let_go(image, order.pin)
