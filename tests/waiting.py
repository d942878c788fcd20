"""Waiting for what is to come, and for what was told to stop."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

# A hang detector: no budget of the product is this long.
HANG_S = 60.0
AGAIN_S = 0.1


def until(what: str, holds: Callable[[], object], within_s: float = HANG_S) -> None:
    """Asks until it holds; fails, saying what did not, after so long."""
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {within_s:.0f} s: {what}"
        time.sleep(AGAIN_S)


def is_listened_at(path: Path) -> bool:
    """Whether a process listens at a Unix socket, which it does a moment after the path is there.

    In the kernel's list, so that nobody is connected to.
    """
    for line in Path("/proc/net/unix").read_text(errors="surrogateescape").splitlines():
        # Num: RefCount Protocol Flags Type St Inode Path; SO_ACCEPTCON is 0x10000.
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[7] == str(path) and fields[3] == "00010000":
            return True
    return False


def stop(pid: int) -> None:
    """Stops a process; returns when none of its threads runs any more.

    The signal reaches one thread, which stops the others when it gets a processor. Until then they
    go on with what they are given.
    """
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + HANG_S
    while not all(state in "TZX" for state in _states(pid)):
        assert time.monotonic() < deadline, f"process {pid} does not stop"
        time.sleep(0.005)


def wants_a_processor(pid: int) -> bool:
    """Whether a thread of a process runs, or waits for its turn to."""
    return "R" in _states(pid)


def _states(pid: int) -> list[str]:
    """Of the threads of a process: R, S, D, T and so on, as in proc(5); X for one that is no more.

    A process that is no more has none.
    """
    states = []
    try:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            try:
                stat = (thread / "stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                states.append("X")
            else:
                states.append(stat.rpartition(")")[2].split()[0])
    except (FileNotFoundError, ProcessLookupError):
        return []
    return states
