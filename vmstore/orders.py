"""`Orders`: what commands have asked a gateway to do, and wait for in threads of their own.

Each is answered once: by what comes of it, or by the end of the gateway. So no caller, and no
process that waits for its callers as it ends, waits for an answer that nobody gives any more.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from typing import Generic, TypeVar

from shard.errors import HciError
from vmstore.errors import TooManyOrders

T = TypeVar("T")

AT_ONCE = 4
"""Each holds one of the threads that answer commands; the others are for `hci status` and its like.
"""


class Answer(Future[T], Generic[T]):
    """A future that keeps its first result: the gateway may have ended meanwhile."""

    def set_result(self, result: T) -> None:
        """See `Future`."""
        with suppress(InvalidStateError):
            super().set_result(result)

    def set_exception(self, exception: BaseException | None) -> None:
        """See `Future`."""
        with suppress(InvalidStateError):
            super().set_exception(exception)


class Orders:
    """The orders of one gateway. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: set[Answer[object]] = set()
        self._ended = False

    @contextmanager
    def one(self, answer: Answer[T]) -> Iterator[Answer[T]]:
        """Count an order while its caller waits. Raises HciError where the gateway is stopping, and
        TooManyOrders."""
        with self._lock:
            if self._ended:
                raise _stopping()
            if len(self._waiting) >= AT_ONCE:
                raise TooManyOrders(AT_ONCE)
            self._waiting.add(answer)  # type: ignore[arg-type]
        try:
            yield answer
        finally:
            with self._lock:
                self._waiting.discard(answer)

    def end(self) -> None:
        """Answer all that wait, and take no more."""
        with self._lock:
            self._ended = True
            waiting = list(self._waiting)
        for answer in waiting:
            answer.set_exception(_stopping())


def _stopping() -> HciError:
    return HciError("the gateway is stopping; try again")
