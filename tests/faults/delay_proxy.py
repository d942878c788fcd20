"""A TCP proxy that delivers everything late, as a line to a far place does."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from types import TracebackType
from typing import Self


class DelayProxy:
    """Forwards connections to `target`, each byte `delay_s` late in either direction."""

    def __init__(self, target: tuple[str, int], delay_s: float) -> None:
        self._target = target
        self._delay_s = delay_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Wakes the accept, which closing alone would not.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                # The handshake of the far half takes a round trip too.
                time.sleep(2 * self._delay_s)
                far = socket.create_connection(self._target)
                self._sockets += [near, far]
                for source, sink in ((near, far), (far, near)):
                    self._carry(source, sink)

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        waiting: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()

        def receive() -> None:
            with contextlib.suppress(OSError):
                while chunk := source.recv(65536):
                    waiting.put((time.monotonic() + self._delay_s, chunk))
            waiting.put((0.0, b""))

        def send() -> None:
            with contextlib.suppress(OSError):
                while True:
                    due_s, chunk = waiting.get()
                    time.sleep(max(0.0, due_s - time.monotonic()))
                    if not chunk:
                        sink.shutdown(socket.SHUT_WR)
                        return
                    sink.sendall(chunk)

        for run in (receive, send):
            threading.Thread(target=run, daemon=True).start()
