"""`hci` in a process that has its imports behind it, for questions that tests ask again and again.

Most of what a short command takes is imports, in a process of its own each time; tests that wait
for a state ask until it is there. Here one process imports the command line and forks for each
question: what runs is the same `main` with the same arguments, environment and exit status.

`Prepared` is the asking side; run as a module, this is the process that forks. Requests and answers
are lines of JSON on its standard input and output: `[argument, …]` and `[status, stdout, stderr]`.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

PROJECT = Path(__file__).resolve().parent.parent


class Prepared:
    """Asks such processes, which `command` starts: one, and more while several threads ask."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._command = [*command, sys.executable, "-m", __name__]
        self._environment = environment
        self._lock = threading.Lock()
        self._idle: list[subprocess.Popen[str]] = []

    def run(self, arguments: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
        """Runs `hci` with these arguments; raises TimeoutExpired, and has then ended it."""
        process = self._take()
        assert process.stdin is not None
        assert process.stdout is not None
        hung = threading.Event()

        def end() -> None:
            hung.set()
            os.killpg(process.pid, 9)

        timer = threading.Timer(timeout_s, end)
        timer.start()
        try:
            process.stdin.write(json.dumps(arguments) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        finally:
            timer.cancel()
        if not answer or hung.is_set():
            _end(process)
            if hung.is_set():
                raise subprocess.TimeoutExpired(["hci", *arguments], timeout_s)
            raise AssertionError("the prepared process has ended")
        with self._lock:
            self._idle.append(process)
        status, out, err = json.loads(answer)
        return subprocess.CompletedProcess(["hci", *arguments], status, out, err)

    def _take(self) -> subprocess.Popen[str]:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return subprocess.Popen(
            self._command,
            cwd=PROJECT,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is not for it
        )

    def close(self) -> None:
        """Ends the processes that were started and are not being asked."""
        with self._lock:
            idle, self._idle = self._idle, []
        for process in idle:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    process.stdout.close()
    process.wait()


def serve() -> None:
    """Answers requests until there are none."""
    from hci.cli import main
    from hci.cli.app import MODULES

    for name in MODULES:
        import_module(f"hci.cli.{name}")
    for name in ("hci.connect", "hci.images", "hci.survey"):
        import_module(name)
    # What is imported only where a command runs, by one that finds no cluster.
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        main(["--config", os.devnull + "/none", "image", "info", "none/none", "--json"])
    gc.freeze()
    for line in sys.stdin:
        with TemporaryFile() as out, TemporaryFile() as err:
            child = os.fork()
            if child == 0:
                _become(out, err)
                try:
                    main(json.loads(line))
                except SystemExit as end:
                    sys.stdout.flush()
                    # Taking all that was imported down again is a third of what is left to do.
                    os._exit(end.code if isinstance(end.code, int) else bool(end.code))
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            answer = [status, _content(out), _content(err)]
        print(json.dumps(answer), flush=True)


def _become(out: IO[bytes], err: IO[bytes]) -> None:
    """Makes this process one that only `hci` runs in."""
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)


def _content(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode()


if __name__ == "__main__":
    serve()
