"""One NBD session as futures, through the agent that runs libnbd in a process of its own."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.faults.stamps import BLOCK_BYTES

AGENT_MODULE = "tests.faults.nbd_agent"
PROJECT = Path(__file__).resolve().parents[2]
SYSTEM_PYTHON = "/usr/bin/python3"
# A hang detector: no budget of the product is this long.
ANSWER_TIMEOUT_S = 60.0

Answer = Future[list[int]]


class NbdError(Exception):
    """A request failed, the server refused the export, or the session is gone."""


class NbdSession:
    """A connection to the export at `uri` whose blocks are stamped with `seed`."""

    def __init__(self, uri: str, seed: int) -> None:
        self._lock = threading.Lock()
        self._next = 0
        self._waiting: dict[int, Answer] = {}
        self._is_lost = False
        self._process = subprocess.Popen(
            [SYSTEM_PYTHON, "-m", AGENT_MODULE, uri, str(seed)],
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        first = json.loads(self._stdout.readline() or '{"refused": "the agent ended"}')
        if "refused" in first:
            self._process.wait()
            raise NbdError(first["refused"])
        self.blocks = int(first["size_bytes"]) // BLOCK_BYTES
        self._reader = threading.Thread(target=self._read, name="nbd-answers", daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def submit(self, op: str, block: int = 0, count: int = 0, version: int = 0) -> Answer:
        """Starts a request; a failed one's future raises NbdError."""
        answer: Answer = Future()
        with self._lock:
            number = self._next
            self._next += 1
            if self._is_lost:
                answer.set_exception(NbdError("the session is gone"))
                return answer
            self._waiting[number] = answer
            request = {"id": number, "op": op, "block": block, "count": count, "version": version}
            try:
                self._stdin.write(json.dumps(request) + "\n")
                self._stdin.flush()
            except OSError:
                del self._waiting[number]
                answer.set_exception(NbdError("the session is gone"))
        return answer

    def call(self, op: str, block: int = 0, count: int = 0, version: int = 0) -> list[int]:
        """Makes a request and waits for it; raises NbdError or TimeoutError."""
        return self.submit(op, block, count, version).result(timeout=ANSWER_TIMEOUT_S)

    def go_on(self, seconds: float, count: int, version: int = 1, pause: float = 0.2) -> int:
        """Writes, flushes and reads the first `count` blocks for so long.

        Returns the last version written; `version` is the one before the first.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            version += 1
            self.call("write", 0, count, version)
            self.call("flush")
            assert self.call("read", 0, count) == [version] * count
            time.sleep(pause)
        return version

    def close(self) -> None:
        """Leaves in good order, or by force where the server does not answer."""
        with contextlib.suppress(OSError):  # the agent may be gone already
            self._stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._stdout.close()

    def _read(self) -> None:
        for line in self._stdout:
            said = json.loads(line)
            with self._lock:
                answer = self._waiting.pop(said["id"])
            if said["error"] is None:
                answer.set_result(said["versions"])
            else:
                answer.set_exception(NbdError(said["error"]))
        with self._lock:
            self._is_lost = True
            waiting, self._waiting = self._waiting, {}
        for answer in waiting.values():
            answer.set_exception(NbdError("the session was lost"))
