"""What both daemons share: logs, signals, addresses, and when to end."""

import fcntl
import logging
import os
import re
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import structlog

from etcd.errors import EtcdError
from etcd.lease import Session
from hci.config import Endpoint
from hci.errors import DaemonError

RETRY_S = 1.0
"""Until etcd is asked again by a daemon that starts."""

LOCK_WAIT_S = 10.0
"""How long a new process waits for its predecessor to end and free the lock."""

OPEN_FILES = 65_536
"""More than a gateway's clients (4,096) and a node's shard files (512) and connections (1,024)."""


def unheard(session: Session | None) -> str:
    """Say so where a daemon's etcd lease may have ended without its having heard of that."""
    if session is None or session.remaining_s():
        return ""
    return "etcd has not answered for longer than its registration lasts"


def log_to_stderr() -> None:
    """Write logs as one line each, with time and level, to stderr (journald or a file)."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"]),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


class Ending:
    """Says when to end: on SIGTERM or SIGINT, or when a part of the daemon fails."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.failure: str | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: self._event.set())

    def fail(self, why: str) -> None:
        """End with an error."""
        self.failure = self.failure or why
        self._event.set()

    def wait(self, timeout_s: float) -> bool:
        """Return whether it is time to end, at the latest after `timeout_s`."""
        return self._event.wait(timeout_s)

    @property
    def due(self) -> bool:
        """Whether it is time to end."""
        return self._event.is_set()

    def raise_failure(self) -> None:
        """Raise DaemonError if a part has failed."""
        if self.failure is not None:
            raise DaemonError(self.failure)


def take_files() -> None:
    """Let this process open as many files as it may: the usual limit is meant for `select`.

    A gateway has one for each disk of its guests, a node one for each shard that is in use; where
    there is none left a gateway lets nobody in and a node's store ends.
    """
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def take_lock(path: Path) -> IO[bytes]:
    """Lock a file that only this process's death frees. Raises DaemonError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("ab")
    deadline_s = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline_s:
                file.close()
                raise DaemonError(f"another process holds {path}: stop it first") from None
            time.sleep(0.05)
        else:
            return file


def take_steps(
    steps: Sequence[Callable[[], object]], ending: Ending, waits: Callable[[EtcdError], None]
) -> int:
    """Take steps in order, each again until etcd answers it; return how many were taken.

    None is taken twice: what one began goes on while the next one waits. Fewer than all are taken
    where it is time to end before. `waits` hears why one has to be tried again.
    """
    taken = 0
    while taken < len(steps) and not ending.due:
        try:
            steps[taken]()
        except EtcdError as error:
            waits(error)
            ending.wait(RETRY_S)
        else:
            taken += 1
    return taken


def lock_id(lock: IO[bytes]) -> str:
    """Return what tells a lock file that is held from all others, on all hosts."""
    status = os.fstat(lock.fileno())
    return f"{boot_id()}:{status.st_dev}:{status.st_ino}"


def boot_id() -> str:
    """Return the kernel's id of this boot, 32 hex digits."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")


def numeric(address: Endpoint | str) -> str:
    """Return `HOST:PORT` with the host's first address. Raises OSError where it has none."""
    endpoint = address if isinstance(address, Endpoint) else Endpoint.parse(address)
    found = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
    host = str(found[0][4][0])
    return str(Endpoint(host, endpoint.port))


FIRST_ACTIVATED = 3
"""SD_LISTEN_FDS_START."""


def activated_sockets() -> list[socket.socket]:
    """Return the listening sockets that the supervisor passed (sd_listen_fds(3)), if it did.

    Raises DaemonError for one that nobody can connect to: its clients would wait for ever.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = os.environ.get("LISTEN_FDS", "")
    if not re.fullmatch(r"[1-9][0-9]?", count):
        raise DaemonError(f"LISTEN_FDS = {count!r} is not a number of sockets")
    return [_listening(FIRST_ACTIVATED + number) for number in range(int(count))]


def _listening(descriptor: int) -> socket.socket:
    try:
        found = socket.socket(fileno=descriptor)
        accepts = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise DaemonError(f"descriptor {descriptor} in LISTEN_FDS: {error.strerror}") from error
    if not accepts or found.type != socket.SOCK_STREAM:
        raise DaemonError(
            f"descriptor {descriptor} in LISTEN_FDS is not a stream socket that listens; a unit of "
            "systemd's needs ListenStream= and Accept=no"
        )
    return found
