"""`Resizing`: changes of the size of an image that this gateway holds, or opens for that.

    a resize   begins when                    then
    grows      the image serves               the record has the new size, the engine goes by it
    shrinks    it serves, and no client is    what is cut off is discarded, while clients that come
               there                          are refused; then as above

A client goes by the size that it was told when it connected. Those that are there when an image has
grown are asked to connect anew, where the caller wants that: their connections end when what they
asked for is answered, and the image stays open until they are back.

One resize of an image at a time. All is decided on the deciding thread, so that no client comes
between the question whether one is there and the first byte that is discarded. A resize ends, one
way or the other, at the latest with the image.
"""

import time
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from etcd.errors import OutcomeUnknown
from etcd.images import ImageRecord
from shard.errors import HciError
from vmstore import events
from vmstore.calls import RELEASE_RETRY_S
from vmstore.deciding import TICK_S
from vmstore.errors import (
    BeingClosed,
    BeingResized,
    InUse,
    ShrinkRefused,
)
from vmstore.holding import Held
from vmstore.names import ImageName
from vmstore.open_image import OpenImage, Resize
from vmstore.orders import Answer
from vmstore.serving import Serving
from vmstore.snapshot_errors import BeingRemoved, BeingRolledBack, BeingSnapshotted
from vmstore.standing import Phase
from vmstore.stored import Stored

T = TypeVar("T")

RESIZE_LIMIT_S = 660.0
"""How long a caller waits: for the image to open, and for all that a shrink cuts off to be
discarded. What is not done by then goes on."""

CLOSING_S = 20.0
"""How long an order waits for an image that is being closed, as a client does that wants it."""

RECONNECT_S = 10.0
"""How long an image stays open for clients that were asked to connect anew: QEMU tries again with
its next request, then after 1, 2, 4 s."""

RESIZER = -1
"""Stands for a resize among the users of an image; clients have positive numbers."""


class Resizing(Serving):
    """Resizes images; see the module."""

    @abstractmethod
    def _close_if_unused(self, image: OpenImage) -> None:
        """Close the image if nobody uses it any more."""

    @abstractmethod
    def _reconnect(self, image: OpenImage) -> None:
        """Have the image's clients connect anew."""

    @abstractmethod
    def _claim(self, image: OpenImage) -> None:
        """Keep an image that was opened for maintenance; it is opened anew for who waits."""

    # For the control service: any thread

    def resize(
        self, name: ImageName, size_bytes: int, *, force: bool, reconnect: bool = False
    ) -> int:
        """Change the size of an image, opening it for that where it is closed.

        One whose last client has just left is closed first. Return how many connections go by the
        former size: those that were there, unless they were asked to `reconnect`. Raises InUse
        where clients have it open and it would shrink, ShrinkRefused, BeingResized, BeingClosed
        where that lasts, TimeoutError where it is not done yet, and what an open raises.
        """

        def begin(done: Answer[int]) -> None:
            self._find_to_resize(name, Resize(size_bytes, force, done, reconnect))

        return self._ordered(begin, RESIZE_LIMIT_S)

    def _ordered(self, begin: Callable[[Answer[T]], None], limit_s: float) -> T:
        """Have the deciding thread begin an order, and wait for what comes of it.

        An order for an image that is being closed is given again, for a while.
        """
        closed_by_s = time.monotonic() + CLOSING_S
        while True:
            done: Answer[T] = Answer()
            try:
                with self._orders.one(done):
                    self._deciding.put(partial(begin, done))
                    return done.result(timeout=limit_s)
            except BeingClosed:
                if time.monotonic() > closed_by_s:
                    raise
            time.sleep(TICK_S)

    # On the deciding thread

    def _find_to_resize(self, name: ImageName, resize: Resize) -> None:
        def found(stored: Stored[ImageRecord]) -> None:
            if self._calls.stopping:
                resize.done.set_exception(_stopping())
                return
            image = self._use(name, stored)
            busy = why_busy(image)
            if busy is not None:
                resize.done.set_exception(busy)
            else:
                image.resize = resize
                image.users.add(RESIZER)
                if image.maintenance:
                    self._claim(image)
                elif image.holder.phase is Phase.SERVING:
                    self._begin_resize(image)

        if self._calls.stopping:
            resize.done.set_exception(_stopping())
        else:
            self._calls.later(lambda: self._catalog.find(name), found, resize.done.set_exception)

    def _begin_resize(self, image: OpenImage) -> None:
        """Begin what was asked for, if anything was; the image serves."""
        resize = image.resize
        if resize is None:
            return
        assert image.held is not None
        former_bytes = image.held.record.size_bytes
        if resize.size_bytes >= former_bytes:
            self._store_size(image, resize)
        elif any(user > 0 for user in image.users):
            self._end_resize(image, InUse(str(image.name), self._gateway))
        elif not resize.force:
            error = ShrinkRefused(str(image.name), former_bytes, resize.size_bytes)
            self._end_resize(image, error)
        else:
            resize.shrinks = True
            cut_bytes = former_bytes - resize.size_bytes
            self._engine.zero(image.channel, resize.size_bytes, cut_bytes)

    def _zeroed(self, image: OpenImage, done: bool) -> None:
        resize = image.resize
        if resize is None or not resize.shrinks:
            return
        if done:
            self._store_size(image, resize)
        else:
            self._end_resize(image, HciError(f"image {image.name} could not be cut off"))

    def _store_size(self, image: OpenImage, resize: Resize) -> None:
        """Store a new size; no change of membership is under way meanwhile."""
        if image.resize is not resize:
            return
        if image.holder.phase is not Phase.SERVING:
            why = f"image {image.name} was closed before it was resized; try again"
            self._end_resize(image, HciError(why))
            return
        if image.holder.changes_record:
            self._deciding.after(TICK_S, lambda: self._store_size(image, resize))
            return
        assert image.held is not None
        held, size_bytes = image.held, resize.size_bytes
        image.holder.paused = True

        def stored(new: Held) -> None:
            image.held = new
            image.holder.record = new.record
            self._engine.resize(image.channel, size_bytes, new.record.encode())
            if resize.reconnect:
                self._reconnect(image)
            go_on()
            self._end_resize(image, None)

        def failed(error: HciError) -> None:
            if isinstance(error, OutcomeUnknown) and image.holder.phase is Phase.SERVING:
                # etcd may have it: what is asked for by the former record would be refused, as if
                # the image were another's.
                self._deciding.after(RELEASE_RETRY_S, ask)
                return
            go_on()
            self._end_resize(image, error)

        def go_on() -> None:
            image.holder.paused = False
            self._step(image, events.Tick(self._deciding.now_s()))

        def ask() -> None:
            self._calls.later(
                lambda: self._catalog.resize(held, size_bytes, force=True), stored, failed
            )

        ask()

    def _end_resize(self, image: OpenImage, error: HciError | None) -> None:
        """Tell who asked, and let the image go; where nothing was asked for, do nothing."""
        resize, image.resize = image.resize, None
        if resize is None:
            return
        image.users.discard(RESIZER)
        if error is None:
            told_before = image.users - image.sent_away
            resize.done.set_result(sum(user > 0 for user in told_before))
        else:
            resize.done.set_exception(error)
        self._close_if_unused(image)


def why_busy(image: OpenImage) -> HciError | None:
    """Return why nothing else may be ordered of an image; None: it may."""
    name = str(image.name)
    if image.resize is not None:
        return BeingResized(name)
    if image.snapshot is not None:
        return BeingSnapshotted(name)
    if image.rollback is not None:
        return BeingRolledBack(name)
    if image.removal is not None:
        return BeingRemoved(name, image.removal.name)
    if image.holder.phase in (Phase.CLOSING, Phase.RELEASING, Phase.ENDED):
        return BeingClosed(name)
    return None


def _stopping() -> HciError:
    return HciError("the gateway is stopping; try again")
