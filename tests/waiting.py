"""Waiting for what is to come."""

from __future__ import annotations

import time
from collections.abc import Callable

# A hang detector: no budget of the product is this long.
HANG_S = 60.0
AGAIN_S = 0.1


def until(what: str, holds: Callable[[], object], within_s: float = HANG_S) -> None:
    """Asks until it holds; fails, saying what did not, after so long."""
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {within_s:.0f} s: {what}"
        time.sleep(AGAIN_S)
