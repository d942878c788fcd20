"""Background processes that outlive the command that started them, and are never mistaken.

A process is known by its pid *and* its start time: a pid is reused, and a signal to a stranger is
worse than none. Signals go through a pidfd that was opened before the start time was compared, so
nothing can slip in between.
"""

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from hci.dev import layout
from vmstore.interrupts import undisturbed

LOG_LINE_MAX = 300
"""Characters of a log's last line that an error shows."""


@dataclass(frozen=True)
class Process:
    """One process of this machine, since its boot."""

    pid: int
    start_ticks: int
    boot_id: str

    @classmethod
    def of_pid(cls, pid: int) -> "Process | None":
        """Return the process that has this pid now, or None."""
        ticks = _start_ticks(pid)
        return None if ticks is None else cls(pid, ticks, _boot_id())

    @property
    def is_alive(self) -> bool:
        """Whether any thread of it still runs; one that ended and waits for its parent does not."""
        return not self.wait(0)

    def signal(self, number: signal.Signals) -> bool:
        """Send a signal to this process and no other; return whether it was there."""
        pidfd = self._open()
        if pidfd is None:
            return False
        try:
            signal.pidfd_send_signal(pidfd, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(pidfd)
        return True

    def wait(self, timeout_s: float) -> bool:
        """Wait until it has ended; return False where it still runs after `timeout_s`.

        Only then has it let go of its files and ports. What /proc says is too early: killed, its
        first thread may be a zombie while others are still on their way out.
        """
        pidfd = self._open()
        if pidfd is None:
            return True
        try:
            return _ends(pidfd, timeout_s)
        finally:
            os.close(pidfd)

    def _open(self) -> int | None:
        try:
            pidfd = os.pidfd_open(self.pid)
        except OSError:
            return None
        is_this = self.boot_id == _boot_id() and _start_ticks(self.pid) == self.start_ticks
        if is_this and not _ends(pidfd, 0):
            return pidfd
        os.close(pidfd)
        return None


def read(path: Path) -> Process | None:
    """Return the process that `path` records, alive or not; None where it records none."""
    try:
        values = json.loads(path.read_text())
        return Process(int(values["pid"]), int(values["start_ticks"]), str(values["boot_id"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def spawn(
    command: Sequence[str],
    record: Path,
    log: Path,
    *,
    environ: Mapping[str, str],
    pass_fds: Sequence[int] = (),
) -> "subprocess.Popen[bytes]":
    """Start a process in a session of its own, output to the end of `log`, and record it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    record.parent.mkdir(parents=True, exist_ok=True)
    with undisturbed(), open(log, "ab") as output:
        started = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=dict(environ),
            cwd="/",
            start_new_session=True,
            pass_fds=pass_fds,
        )
        process = Process.of_pid(started.pid)
        if process is not None:
            layout.write(record, json.dumps(asdict(process)))
    return started


def end(processes: Sequence[Process], *, grace_s: float) -> list[Process]:
    """Ask all to stop, wait, kill those that do not; return the ones that had to be killed."""
    for process in processes:
        process.signal(signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    late = [each for each in processes if not each.wait(deadline - time.monotonic())]
    kill(late)
    return late


def kill(processes: Sequence[Process]) -> None:
    """Kill all at once, and return when they have ended."""
    for process in processes:
        process.signal(signal.SIGKILL)
    for process in processes:
        # Only a process in an uninterruptible system call outlives SIGKILL, and not for long.
        process.wait(30)


def last_line(log: Path) -> str:
    """Return the last line of a log that says anything, shortened."""
    with suppress(OSError), open(log, "rb") as file:
        file.seek(max(os.fstat(file.fileno()).st_size - 8192, 0))
        lines = file.read().decode("utf-8", "replace").split("\n")
        for line in reversed(lines):
            if line.strip():
                return line.strip()[:LOG_LINE_MAX]
    return ""


def _ends(pidfd: int, timeout_s: float) -> bool:
    """Whether the last thread of a process ends within the time (pidfd_open(2))."""
    ready, _, _ = select.select([pidfd], [], [], max(timeout_s, 0))
    return bool(ready)


def _start_ticks(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot (proc(5), field 22 of stat)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The second field is the program's name, which may itself hold spaces and parentheses.
    return int(stat[stat.rindex(")") + 2 :].split()[19])


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
