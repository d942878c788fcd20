"""`Rollbacks`: images that are made to hold what a snapshot of theirs does, by a gateway.

An image is opened for that as for a client, since what clients know of it is not so any more: those
that another gateway served are not let in again. It is made level where it was not closed cleanly,
its layers are changed step by step as for a snapshot (`vmstore/freezing`), and it is closed again.

Refused while somebody has the image: a client, or a process that was served here, lives, and has
not let go. Whoever comes meanwhile is sent away. All is decided on the deciding thread.
"""

import structlog

from shard.errors import HciError
from vmstore import events
from vmstore.deciding import TICK_S
from vmstore.errors import InUse, UnknownSnapshot
from vmstore.layer_changes import Rollback
from vmstore.names import ImageName
from vmstore.open_image import OpenImage, RollbackOrder, RolledBack
from vmstore.orders import Answer
from vmstore.snapshot_errors import NewerSnapshots, RollbackFailed, RollbackUnknown
from vmstore.snapshots import SNAPSHOT_LIMIT_S, STOPPING, Snapshots
from vmstore.standing import Phase

log = structlog.get_logger()


class Rollbacks(Snapshots):
    """Rolls images back; see the module."""

    # For the control service: any thread

    def roll_back(self, image: ImageName, name: str, *, force: bool) -> RolledBack:
        """Have an image hold what its snapshot `name` does; with `force` newer ones go.

        Done when all nodes in sync have stored that. Raises UnknownSnapshot, NewerSnapshots, InUse,
        BeingRolledBack, BeingSnapshotted, BeingResized, BeingClosed where that lasts,
        RollbackFailed, RollbackUnknown, TimeoutError where it is not known yet, and what an open
        raises.
        """

        def begin(done: Answer[RolledBack]) -> None:
            self._find_to_roll_back(image, RollbackOrder(name, force, done))

        return self._ordered(begin, SNAPSHOT_LIMIT_S)

    # On the deciding thread

    def _find_to_roll_back(self, name: ImageName, order: RollbackOrder) -> None:
        def take(image: OpenImage) -> None:
            image.rollback = order
            if image.maintenance:
                self._claim(image)
            else:
                self._begin_rollback(image)

        self._find_to_change(name, order, RollbackFailed(order.name, STOPPING), take)

    def _begin_rollback(self, image: OpenImage) -> None:
        """Have the holder make the rollback that was asked for, if any was; the image serves."""
        order = image.rollback
        if order is None or order.begun or image.holder.phase is not Phase.SERVING:
            return
        if self._must_wait(image):
            self._deciding.after(TICK_S, lambda: self._begin_rollback(image))
            return
        try:
            order.begun = self._outcome(image, order)
        except HciError as error:
            self._end_rollback(image, error)
            return
        self._step(image, events.ChangeLayers(Rollback(order.name)))

    def _outcome(self, image: OpenImage, order: RollbackOrder) -> RolledBack:
        """Return what a rollback comes to. Raises UnknownSnapshot, InUse, NewerSnapshots."""
        name, record = str(image.name), image.holder.record
        assert record is not None
        if any(user > 0 for user in image.users) or self._served.awaits(image.image):
            raise InUse(name, self._gateway)
        snapshot = record.snapshot(order.name)
        if snapshot is None:
            raise UnknownSnapshot(name, order.name)
        newer = record.newer_than(snapshot)
        if newer and not order.force:
            raise NewerSnapshots(name, order.name, [each.name for each in newer])
        return RolledBack(snapshot, record.size_bytes, newer)

    def _layers_changed(
        self, image: OpenImage, failed: str | None, *, unknown: bool = False
    ) -> None:
        order = image.rollback
        if order is None:
            super()._layers_changed(image, failed, unknown=unknown)
            return
        if failed is not None:
            log.warning("rollback_failed", image=str(image.name), snapshot=order.name, why=failed)
            error = RollbackUnknown if unknown else RollbackFailed
            self._end_rollback(image, error(f"{image.name}@{order.name}", failed))
            return
        record, outcome = image.holder.record, order.begun
        assert record is not None and outcome is not None
        # Clients are let in again from here.
        self._engine.resize(image.channel, record.size_bytes, record.encode())
        log.info(
            "image_rolled_back",
            image=str(image.name),
            snapshot=order.name,
            layer=record.layers[0].id,
            dropped=[each.name for each in outcome.dropped],
        )
        self._end_rollback(image, outcome)

    def _end_rollback(self, image: OpenImage, outcome: RolledBack | HciError) -> None:
        """Tell who asked, and let the image go."""
        order, image.rollback = image.rollback, None
        assert order is not None, "somebody asked"
        if isinstance(outcome, RolledBack):
            order.done.set_result(outcome)
        else:
            order.done.set_exception(outcome)
        self._let_go(image, order.pin)
