"""Drives the built guest over its second serial port and keeps what it acknowledged.

`files` and `records` are the host's own journal: what the guest said was written *and synced*, kept
outside the storage under test. The protocol is described in `init.sh`.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tests.e2e.guest.disk import GuestSystem
from tests.e2e.guest.machine import Machine, MachineError

BOOT_TIMEOUT_S = 150.0
LEDGER_BALANCE = "1000"
"""Of all accounts together, whatever is moved between them."""
KERNEL_ARGUMENTS = "console=ttyS0 quiet panic=-1 random.trust_cpu=on"


class Guest(Machine):
    """The built guest on the disk at `uri`.

    `files` maps file numbers to the SHA-256 of their synced content, `records` those of the
    4 KiB records of the journal workload, `entries` numbers to the tokens of the transactions that
    the database has committed.
    """

    def __init__(self, system: GuestSystem, uri: str, directory: Path) -> None:
        super().__init__(
            uri,
            directory,
            arguments=[
                *("-kernel", str(system.kernel), "-initrd", str(system.initrd)),
                *("-append", KERNEL_ARGUMENTS),
                *("-chardev", "stdio,id=control,signal=off", "-serial", "chardev:control"),
            ],
        )
        self.files: dict[int, str] = {}
        self.records: dict[int, str] = {}
        self.entries: dict[int, str] = {}
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader: threading.Thread | None = None

    def start(self) -> None:
        """Boots the guest; returns when its init asks for commands."""
        super().start()
        self._reader = threading.Thread(target=self._read, name="guest-control", daemon=True)
        self._reader.start()
        ready = self._line(BOOT_TIMEOUT_S)
        if not ready.startswith("READY "):
            raise MachineError(f"the guest said {ready!r} instead of READY\n{self.console_tail()}")

    def run(self, command: str, *, timeout_s: float = 120.0) -> list[str]:
        """Runs a command to its end; returns its answers, raises MachineError if it failed."""
        return list(self.follow(command, timeout_s=timeout_s))

    def follow(self, command: str, *, timeout_s: float = 120.0) -> Iterator[str]:
        """As `run`, but yields each answer as it comes; `timeout_s` bounds each wait."""
        stdin = self.process.stdin
        assert stdin is not None
        stdin.write(command + "\n")
        stdin.flush()
        while True:
            line = self._line(timeout_s)
            if line == "DONE":
                return
            if line.startswith("FAILED"):
                raise MachineError(f"guest: {command!r}: {line}\n{self.console_tail()}")
            self._remember(line)
            yield line

    def verify(self) -> int:
        """The guest reads all its files back from the disk; returns how many, all good."""
        answer = self.run("verify")[-1].split()
        if answer[0] != "VERIFIED" or answer[2] != "0" or int(answer[1]) != len(self.files):
            raise MachineError(f"the guest found damage among {len(self.files)} files: {answer}")
        return int(answer[1])

    def audit(self) -> int:
        """The guest's database must be whole and hold all entries; returns how many it has."""
        found: dict[int, str] = {}
        said: dict[str, str] = {}
        for line in self.run("audit"):
            word, _, rest = line.partition(" ")
            if word == "ENTRY":
                number, _, token = rest.partition(" ")
                found[int(number)] = token
            else:
                said[word] = rest
        if said != {"INTEGRITY": "ok", "BALANCE": LEDGER_BALANCE}:
            raise MachineError(f"the guest's database is damaged: {said}")
        lost = {number for number, token in self.entries.items() if found.get(number) != token}
        if lost:
            raise MachineError(f"of {len(self.entries)} committed entries are lost: {sorted(lost)}")
        return len(found)

    def power_off(self, *, timeout_s: float = 60.0) -> None:
        """Shuts the guest down cleanly; returns when QEMU has ended by itself."""
        self.run("off", timeout_s=timeout_s)
        self.io_errors()
        self.process.wait(timeout=timeout_s)
        if self.process.returncode != 0:
            raise MachineError(f"QEMU ended with {self.process.returncode}: {self.console_tail()}")

    def _remember(self, line: str) -> None:
        words = line.split()
        if words[0] == "SYNCED":
            self.files[int(words[1])] = words[2]
        elif words[0] == "COMMITTED":
            self.records[int(words[1])] = words[2]
        elif words[0] == "RECORDED":
            self.entries[int(words[1])] = words[2]

    def _line(self, timeout_s: float) -> str:
        deadline = time.monotonic() + timeout_s
        try:
            line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise MachineError(
                f"the guest was silent for {timeout_s:.0f} s\n{self.console_tail()}"
            ) from None
        if line is None:
            raise MachineError(f"QEMU ended\n{self.console_tail()}")
        return line

    def _read(self) -> None:
        stdout = self.process.stdout
        assert stdout is not None
        try:
            for line in stdout:
                # The port starts up as a terminal that may echo what was typed before init ran.
                if line.strip():
                    self._lines.put(line.strip())
        except ValueError:
            pass  # closed under the reader, which is how a killed machine ends
        self._lines.put(None)
