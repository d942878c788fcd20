"""Ctrl-C and SIGTERM at moments when they would leave something half done."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def undisturbed() -> Iterator[None]:
    """Put interrupts off to the end of the block: what it begins, or undoes, must not be half done.

    Blocking the signals would do so too, but what is blocked stays so in the new process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    former = {
        number: signal.signal(number, lambda number, _frame: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])
