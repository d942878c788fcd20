"""A guest that measures its disk: Debian's kernel, busybox, and the fio of this machine.

All of it is in the initial RAM disk, so that the disk is nothing but what is measured. Kernel and
busybox are those of the demo's guest.
"""

from __future__ import annotations

import json
import queue
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.fio import Measurement, MeasurementError, account, jobs_of
from tests.e2e.guest.kernel import GuestBuildError, guest_parts
from tests.e2e.guest.machine import Machine, MachineError

INIT = Path(__file__).with_name("guest_init.sh")
MEMORY = "768M"
BOOT_TIMEOUT_S = 180.0
GRACE_S = 90.0
KERNEL_ARGUMENTS = "console=ttyS0 quiet panic=-1 random.trust_cpu=on"


@dataclass(frozen=True)
class MeasuringSystem:
    """What QEMU boots."""

    kernel: Path
    initrd: Path


def build(directory: Path) -> MeasuringSystem:
    """Makes the initial RAM disk in `directory`; raises GuestBuildError where it cannot."""
    parts = guest_parts()
    root = directory / "root"
    for name in ("bin", "dev", "proc", "sys", "tmp", "modules"):
        (root / name).mkdir(parents=True)
    shutil.copy(parts.busybox, root / "bin" / "busybox")
    for module in parts.modules:
        shutil.copy(module, root / "modules" / module.name)
    names = [module.name for module in parts.modules]
    (root / "modules" / "order").write_text("\n".join(names) + "\n")
    shutil.copy(INIT, root / "init")
    for place, file in _program("fio").items():
        target = root / place.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    for program in (root / "init", root / "bin" / "busybox"):
        program.chmod(0o755)
    initrd = directory / "initrd.cpio"
    _archive(root, initrd)
    shutil.rmtree(root)
    return MeasuringSystem(parts.kernel, initrd)


def _program(name: str) -> dict[Path, Path]:
    """A program of this machine and all libraries that it loads, by where they belong."""
    found = shutil.which(name)
    if found is None:
        raise GuestBuildError(f"{name} is not installed")
    said = subprocess.run(["ldd", found], check=True, capture_output=True, text=True, timeout=30)
    loaded = re.findall(r"(?:=> |^\s*)(/\S+) \(0x", said.stdout, re.MULTILINE)
    return {Path("/bin") / name: Path(found), **{Path(file): Path(file) for file in loaded}}


def _archive(root: Path, archive: Path) -> None:
    """The newc archive that a kernel unpacks."""
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*"))) + "\n"
    with archive.open("wb") as out:
        subprocess.run(
            ["cpio", "--create", "--format=newc", "--owner=0:0", "--quiet"],
            cwd=root,
            input=names.encode(),
            stdout=out,
            check=True,
            timeout=120,
        )


class MeasuringGuest(Machine):
    """The guest on the disk at `uri`: virtio-blk, without the host's cache."""

    def __init__(self, system: MeasuringSystem, uri: str, directory: Path) -> None:
        directory.mkdir()
        super().__init__(
            uri,
            directory,
            memory=MEMORY,
            arguments=[
                *("-kernel", str(system.kernel), "-initrd", str(system.initrd)),
                *("-append", KERNEL_ARGUMENTS),
                *("-chardev", "stdio,id=control,signal=off", "-serial", "chardev:control"),
            ],
        )
        self._lines: queue.Queue[str | None] = queue.Queue()

    def start(self) -> None:
        """Boots; returns when the guest waits for something to measure."""
        super().start()
        threading.Thread(target=self._read, name="guest-answers", daemon=True).start()
        deadline = time.monotonic() + BOOT_TIMEOUT_S
        # The kernel's console may say something on any port before.
        while not (line := self._line(deadline)).startswith("READY "):
            if line.startswith("END"):
                raise MachineError(f"the guest said {line!r} instead of READY")

    def measure(self, workload: Sequence[str], runtime_s: int, size_bytes: int) -> Measurement:
        """Runs `workload` in the guest; its processor time is that of all virtual processors."""
        timed = ("--name=bench", "--time_based", f"--runtime={runtime_s}", f"--size={size_bytes}")
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join([*timed, *workload]) + "\n")
        self.process.stdin.flush()
        deadline = time.monotonic() + runtime_s + GRACE_S
        said: list[str] = []
        while not (line := self._line(deadline)).startswith("END "):
            said.append(line)
        if line != "END 0":
            raise MeasurementError(f"fio in the guest: {line}: {' '.join(said[-3:])}")
        try:
            return account(jobs_of("\n".join(said)), 0.0)
        except json.JSONDecodeError as garbled:
            raise MeasurementError(f"the guest's answer is garbled: {garbled}") from garbled

    def _line(self, deadline_s: float) -> str:
        try:
            line = self._lines.get(timeout=max(0.0, deadline_s - time.monotonic()))
        except queue.Empty:
            raise MachineError(f"the guest is silent\n{self.console_tail()}") from None
        if line is None:
            raise MachineError(f"QEMU ended\n{self.console_tail()}")
        return line

    def _read(self) -> None:
        stdout = self.process.stdout
        assert stdout is not None
        try:
            for line in stdout:
                self._lines.put(line.rstrip())
        except ValueError:
            pass  # closed under the reader, which is how a machine ends
        self._lines.put(None)
