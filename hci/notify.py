"""What a daemon tells its supervisor of itself: that it serves, is alive, ends (sd_notify(3)).

Nothing is told where nobody asked, so a daemon runs the same by hand and under `hci dev`. What
cannot be told is not an error either: who waits for it draws its own conclusion.
"""

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress

from hci.daemon import Ending

POLL_S = 0.5
"""Between two looks of a daemon at what is due."""

ALIVE_S = 5.0
"""Between two signs of life, far below any watchdog's time."""


def attend(
    ending: Ending,
    look: Callable[[], None],
    answers: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Look after a daemon that serves, again and again, until it is time to end.

    The watchdog is told by the thread that looks, and only when the daemon's other loop `answers`;
    that raises TimeoutError or RuntimeError where it hangs, and the supervisor ends the process.
    """
    tell("READY=1")
    told_s = clock()
    while not ending.wait(POLL_S):
        look()
        if clock() - told_s < ALIVE_S:
            continue
        with suppress(TimeoutError, RuntimeError):
            answers()
            tell("WATCHDOG=1")
        told_s = clock()
    tell("STOPPING=1")


def tell(state: str) -> None:
    """Send one message to where NOTIFY_SOCKET says, if it does."""
    where = os.environ.get("NOTIFY_SOCKET", "")
    if not where.startswith(("/", "@")):
        return
    address = f"\0{where[1:]}" if where.startswith("@") else where
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        # A supervisor that does not read must not be what the daemon hangs in.
        sender.setblocking(False)
        sender.sendto(state.encode(), address)
