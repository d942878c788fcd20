"""Which processes make up a system, and the processor time that they have used."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def processes_naming(directory: Path) -> list[int]:
    """Every process whose command line names `directory`, which is how a system's are known."""
    needle = os.fsencode(directory)
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if needle in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return sorted(found)


def processor_time_s(pids: Iterable[int]) -> float:
    """User and system time of all threads of `pids`, living children not included."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            # The command's name may hold spaces and parentheses; the fields follow the last one.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS_PER_S


def resident_bytes(pid: int) -> int:
    """The memory of a process that is there, shared pages included: VmRSS of proc(5)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def end_processes_naming(directory: Path, *, patience_s: float = 5.0) -> None:
    """Ends what still runs for a system: asked first, then by force."""
    deadline = time.monotonic() + patience_s
    number = signal.SIGTERM
    while pids := processes_naming(directory):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if time.monotonic() > deadline:
            number = signal.SIGKILL
        if time.monotonic() > 2 * patience_s + deadline:
            return
        time.sleep(0.1)
