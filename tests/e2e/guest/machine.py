"""One QEMU process whose disk is an NBD export, as a hypervisor would start it.

Owns the process, its console log and its QMP connection. The disk is attached the way users do it:
reconnecting NBD client, no host cache, discards passed on. Errors are reported to the guest and not
retried, so that an error which reaches QEMU cannot hide: `io_errors` counts them.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast
from urllib.parse import parse_qs, unquote, urlsplit

from qemu.qmp import QMPError
from qemu.qmp.legacy import QEMUMonitorProtocol

from tests.waiting import is_listened_at

# Longer than a whole cluster takes to start beside other tests, which is not what a guest's errors
# are looked at for; how long it waits for a gateway is measured by `tests.tools.stalls`.
RECONNECT_DELAY_S = 90
START_TIMEOUT_S = 60.0


class MachineError(Exception):
    """QEMU or its guest did not do what was asked; the message holds the console's last lines."""


class Machine:
    """A QEMU process under TCG on the disk at `uri`, with one virtual processor."""

    def __init__(
        self,
        uri: str,
        directory: Path,
        *,
        memory: str = "256M",
        accel: str = "tcg",
        arguments: Sequence[str] = (),
    ) -> None:
        self.console = directory / "console.log"
        self._qmp_path = directory / "qmp.sock"
        self._qemu_log = directory / "qemu.log"
        self._command = [
            *("qemu-system-x86_64", "-accel", accel, "-cpu", "max", "-smp", "1", "-m", memory),
            *("-display", "none", "-nodefaults", "-no-user-config", "-no-reboot"),
            *("-serial", f"file:{self.console}"),
            *("-qmp", f"unix:{self._qmp_path},server=on,wait=off"),
            *("-blockdev", json.dumps(nbd_blockdev(uri, "disk"))),
            *("-device", "virtio-blk-pci,drive=disk,bootindex=1,werror=report,rerror=report"),
            *arguments,
        ]
        self._process: subprocess.Popen[str] | None = None
        self._qmp: QEMUMonitorProtocol | None = None
        self._io_errors: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def process(self) -> subprocess.Popen[str]:
        """The running QEMU; raises MachineError before `start`."""
        if self._process is None:
            raise MachineError("the machine has not been started")
        return self._process

    def start(self) -> None:
        """Starts QEMU; returns when it answers on QMP, which is after it opened its disk."""
        with self._qemu_log.open("w") as log:
            # An own session keeps a Ctrl-C at the terminal from ending QEMU behind our back.
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self._await_socket()
        monitor = QEMUMonitorProtocol(str(self._qmp_path))
        monitor.settimeout(START_TIMEOUT_S)
        try:
            monitor.connect()
        except QMPError as refused:
            why = f"QEMU did not start: {refused}: {self.console_tail()}"
            raise MachineError(why) from refused
        self._qmp = monitor

    def io_errors(self) -> list[dict[str, Any]]:
        """Every I/O error that QEMU has reported since the start."""
        if self._qmp is not None and self.process.poll() is None:
            for event in self._qmp.get_events():
                if event["event"] == "BLOCK_IO_ERROR":
                    self._io_errors.append(dict(event))
            self._qmp.clear_events()
        return list(self._io_errors)

    def transferred(self) -> dict[str, int]:
        """QEMU's own counters of the disk: bytes and operations read, written, failed."""
        if self._qmp is None:
            raise MachineError("the machine has not been started")
        answer = cast(list[dict[str, Any]], self._qmp.cmd("query-blockstats"))
        for device in answer:
            if device.get("node-name") == "disk":
                return {key: n for key, n in device["stats"].items() if isinstance(n, int)}
        raise MachineError("QEMU lists no counters for its disk")

    def ask(self, command: str, **arguments: Any) -> Any:
        """Asks QEMU's monitor; raises MachineError with what it said where it refuses."""
        if self._qmp is None:
            raise MachineError("the machine has not been started")
        try:
            return self._qmp.cmd(
                command, **{key.replace("_", "-"): v for key, v in arguments.items()}
            )
        except QMPError as refused:
            raise MachineError(f"{command}: {refused}") from refused

    def disk_bytes(self) -> int:
        """The size that QEMU has for its disk."""
        nodes = cast(list[dict[str, Any]], self.ask("query-named-block-nodes"))
        found = [node for node in nodes if node["node-name"] == "disk"]
        return int(found[0]["image"]["virtual-size"])

    def console_tail(self, lines: int = 8) -> str:
        """The last lines of the guest's console and of QEMU's own messages."""
        found: list[str] = []
        for log in (self.console, self._qemu_log):
            if log.exists():
                found += log.read_text(errors="replace").splitlines()[-lines:]
        return "\n".join(found)

    def close(self) -> None:
        """Ends QEMU if it still runs; the guest is not asked."""
        if self._qmp is not None:
            # A guest that powers off has QEMU close it first, at any moment.
            with contextlib.suppress(EOFError, OSError, QMPError):
                self._qmp.close()
            self._qmp = None
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()

    def _await_socket(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not is_listened_at(self._qmp_path):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise MachineError(f"QEMU did not start: {self.console_tail()}")
            time.sleep(0.05)


def nbd_blockdev(uri: str, node_name: str) -> dict[str, Any]:
    """QEMU's options for an NBD URI (https://github.com/NetworkBlockDevice/nbd doc/uri.md)."""
    parts = urlsplit(uri)
    query = parse_qs(parts.query)
    server: dict[str, str]
    if parts.scheme == "nbd+unix" and "socket" in query:
        server = {"type": "unix", "path": query["socket"][0]}
    elif parts.scheme == "nbd" and parts.hostname is not None:
        server = {"type": "inet", "host": parts.hostname, "port": str(parts.port or 10809)}
    else:
        raise ValueError(f"not an NBD URI that QEMU can open: {uri}")
    return {
        "driver": "nbd",
        "node-name": node_name,
        "server": server,
        "export": unquote(parts.path.removeprefix("/")),
        "reconnect-delay": RECONNECT_DELAY_S,
        "cache": {"direct": True},
        "discard": "unmap",
    }


def ended_by_signal(process: subprocess.Popen[str]) -> str | None:
    """The name of the signal that ended a process, or None where it ended by itself."""
    code = process.poll()
    return signal.Signals(-code).name if code is not None and code < 0 else None
