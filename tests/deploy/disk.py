"""A client of a gateway's socket on a host, as QEMU is one: it reconnects, and compares."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import subprocess
import threading
from types import TracebackType
from typing import Self

from tests.deploy.hosts import Hosts
from tests.waiting import until

BLOCK_BYTES = 65_536
BLOCKS = 256
FLUSH_EVERY = 16
RECONNECT_S = 90
END_S = 120.0


class WrittenDisk:
    """Writes an image by one qemu-io, over and over, in the background. A context manager.

    Each block holds one byte's value, another one each time. In the end each must hold what it was
    given last, and no request may have failed.
    """

    def __init__(self, hosts: Hosts, host: str, image: str) -> None:
        options = (
            f"driver=nbd,server.type=unix,server.path=/run/hci/nbd.sock,export={image},"
            f"reconnect-delay={RECONNECT_S}"
        )
        self._qemu_io = subprocess.Popen(
            hosts.ssh(host, f"exec qemu-io -t none --image-opts {options} 2>&1"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,
        )
        self.writes = 0
        self._values: dict[int, int] = {}
        self._failure = ""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._write, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self._end.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._qemu_io.pid, signal.SIGKILL)
        self._qemu_io.wait()
        self._thread.join()

    def go_on(self, writes: int) -> None:
        """Waits until so many more writes were answered."""
        before = self.writes
        until(f"{writes} writes are answered", lambda: self._went_on(before + writes), END_S)

    def finish(self) -> None:
        """Stops writing, and compares all that was written."""
        self._end.set()
        self._thread.join(END_S)
        assert not self._thread.is_alive(), "a request is not answered"
        assert not self._failure, self._failure
        for block, value in sorted(self._values.items()):
            place = block * BLOCK_BYTES
            self._asked(f"read -P {value} {place} {BLOCK_BYTES}")
        assert self._qemu_io.stdin is not None
        self._qemu_io.stdin.close()
        assert self._qemu_io.wait(END_S) == 0

    def _went_on(self, writes: int) -> bool:
        assert not self._failure, self._failure
        return self.writes >= writes

    def _write(self) -> None:
        try:
            self._heard()
            for number in itertools.count():
                if self._end.is_set():
                    break
                block, value = number % BLOCKS, number % 251 + 1
                place = block * BLOCK_BYTES
                self._asked(f"write -P {value} {place} {BLOCK_BYTES}")
                self._values[block] = value
                self.writes += 1
                if number % FLUSH_EVERY == 0:
                    self._asked("flush")
        except (OSError, AssertionError) as error:
            self._failure = str(error)

    def _asked(self, command: str) -> None:
        """Has a command carried out; raises AssertionError where it says that it failed."""
        # One at a time: of two that arrive together qemu-io reads the second with the third.
        assert self._qemu_io.stdin is not None
        self._qemu_io.stdin.write(f"{command}\n".encode())
        self._qemu_io.stdin.flush()
        said = self._heard()
        assert not re.search("failed|error", said, re.IGNORECASE), f"{command}: {said}"

    def _heard(self) -> str:
        """What it says until it asks for a command."""
        assert self._qemu_io.stdout is not None
        said = b""
        while not said.endswith(b"qemu-io> "):
            part = os.read(self._qemu_io.stdout.fileno(), 4096)
            assert part, f"qemu-io ended: {said.decode()}"
            said += part
        return said.decode()
