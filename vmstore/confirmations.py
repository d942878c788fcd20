"""`Confirmations`: which snapshots last, as this gateway knows of images that it holds or opens.

What etcd names may be withdrawn while no node has stored it (`vmstore/freezing`), and must not be
cloned before. An image that serves, with no change of its layers under way, has all its snapshots
stored by all nodes in sync: from then on one goes only where somebody removes it. All is decided on
the deciding thread.
"""

from etcd.images import ImageRecord
from shard.errors import HciError
from vmstore.deciding import TICK_S
from vmstore.errors import BeingClosed, UnknownSnapshot
from vmstore.freezing import Stage
from vmstore.names import ImageName
from vmstore.open_image import ConfirmOrder, OpenImage
from vmstore.orders import Answer
from vmstore.removals import Removals
from vmstore.snapshots import SNAPSHOT_LIMIT_S, STOPPING
from vmstore.standing import Phase
from vmstore.stored import Stored


class Confirmations(Removals):
    """Says that snapshots last; see the module."""

    # For the control service: any thread

    def confirm_snapshot(self, image: ImageName, name: str) -> int:
        """Return the layer of a snapshot, once nothing but its removal can end it.

        Raises UnknownSnapshot, BeingClosed where that lasts, TimeoutError where its nodes have not
        stored it yet, and what an open raises.
        """

        def begin(done: Answer[int]) -> None:
            self._find_to_confirm(image, name, done)

        return self._ordered(begin, SNAPSHOT_LIMIT_S)

    # On the deciding thread

    def _find_to_confirm(self, name: ImageName, snapshot: str, done: Answer[int]) -> None:
        def find() -> Stored[ImageRecord]:
            self._catalog.check_history()
            return self._catalog.find(name)

        def found(stored: Stored[ImageRecord]) -> None:
            if self._calls.stopping:
                done.set_exception(HciError(STOPPING))
                return
            image = self._use(name, stored, maintenance=True)
            if image.holder.phase in (Phase.CLOSING, Phase.RELEASING, Phase.ENDED):
                done.set_exception(BeingClosed(str(name)))
                return
            order = ConfirmOrder(snapshot, done, self._take_pin())
            image.users.add(order.pin)
            image.confirmations.append(order)
            self._confirm(image)

        if self._calls.stopping:
            done.set_exception(HciError(STOPPING))
        else:
            self._calls.later(find, found, done.set_exception)

    def _confirm(self, image: OpenImage) -> None:
        """Answer who asked, as soon as that can be said."""
        if not image.confirmations:
            return
        holder = image.holder
        changes = holder.freezing.stage is not Stage.NONE or holder.freezing.withdraws is not None
        if holder.phase is not Phase.SERVING or changes or holder.storing:
            self._deciding.after(TICK_S, lambda: self._confirm(image))
            return
        assert holder.record is not None, "it serves"
        for order in self._take_confirmations(image):
            snapshot = holder.record.snapshot(order.name)
            if snapshot is None:
                order.done.set_exception(UnknownSnapshot(str(image.name), order.name))
            else:
                order.done.set_result(snapshot.layer)
            self._let_go(image, order.pin)

    def _end_confirmations(self, image: OpenImage, why: str) -> None:
        """Tell who asked that the image was let go of."""
        for order in self._take_confirmations(image):
            order.done.set_exception(HciError(why))
            self._let_go(image, order.pin)

    def _take_confirmations(self, image: OpenImage) -> list[ConfirmOrder]:
        taken, image.confirmations = image.confirmations, []
        return taken
