"""Hosts that boot a real systemd, on a network of their own, reached by ssh."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from tests import reaper
from tests.deploy.root import USER
from tests.deploy.switch import BRIDGE, NETWORK
from tests.waiting import until

PROJECT = Path(__file__).resolve().parents[2]
BOOT_S = 120.0
COMMAND_S = 120.0
CGROUPS = Path("/sys/fs/cgroup")
PATHS = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class Hosts:
    """Machines by name, made of one Debian root that stays as it is. A context manager."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.folder = Path(tempfile.mkdtemp(prefix="hci-deploy-"))
        reaper.watch(self.folder, remove=True)
        self._machines: dict[str, subprocess.Popen[bytes]] = {}
        self.addresses: dict[str, str] = {}
        self._switch = subprocess.Popen(
            [
                *("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child"),
                *(sys.executable, "-m", "tests.deploy.switch", str(self.folder)),
            ],
            cwd=PROJECT,
            env={**os.environ, "PATH": PATHS},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is not for it: what it holds is closed in order.
        )
        assert self._switch.stdout is not None
        try:
            self._pid = self._switch.stdout.readline().decode().strip()
            assert self._switch.stdout.readline() == b"ready\n", "no network namespaces here?"
            self._make_key()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends all machines; nothing of them is left."""
        assert self._switch.stdin is not None
        self._switch.stdin.close()
        self._switch.wait(30)
        for machine in self._machines.values():
            machine.wait(30)
        for name in self.addresses:
            self._remove_cgroups(name)
        shutil.rmtree(self.folder)
        reaper.forget(self.folder)

    def boot(self, *names: str) -> None:
        """Boots hosts, those that are new from the root as it is; returns when sshd answers."""
        for name in names:
            if name not in self.addresses:
                self._install(name)
            self._start(name)
        for name in names:
            until(f"{name} answers", lambda name=name: self._answers(name), BOOT_S)  # type: ignore[misc]

    def kill(self, name: str) -> None:
        """Has a host lose its power: it says nothing more, to nobody."""
        machine = self._machines.pop(name)
        self._inside("ip", "link", "set", f"vb-{name}", "down")
        # All at once, the supervisor and whatever runs on the host.
        (self._groups(name)[-1] / "cgroup.kill").write_text("1")
        machine.wait(30)
        # It goes with the host's network, which may take a moment.
        gone = self.inside("ip", "link", "delete", f"vb-{name}")
        subprocess.run(gone, check=False, capture_output=True, env={**os.environ, "PATH": PATHS})
        (self.folder / self.addresses[name]).unlink(missing_ok=True)
        self._remove_cgroups(name)

    def remove(self, *names: str) -> None:
        """Ends hosts and forgets their disks: they boot as new ones."""
        for name in names:
            if name in self._machines:
                self.kill(name)
            self._inside("umount", str(self.folder / name / "root"))
            shutil.rmtree(self.folder / name)
            del self.addresses[name]

    def inside(self, *command: str) -> list[str]:
        """Returns the command that runs `command` of this machine where the hosts can be reached.

        It ends with the hosts, and so does what it leaves behind.
        """
        spaces = ["--net", "--mount", "--pid"]
        return ["nsenter", f"--target={self._pid}", *spaces, f"--wd={PROJECT}", "--", *command]

    def ssh(self, name: str, command: str) -> list[str]:
        """Returns the command that runs a command of the shell on a host, as root."""
        return self.inside(
            "ssh", *self.ssh_options().split(), f"{USER}@{self.addresses[name]}",
            f"sudo sh -c {quoted(command)}",
        )  # fmt: skip

    def run(self, name: str, command: str) -> str:
        """Runs a command of the shell on a host, as root; returns what it printed."""
        code, said = completed(self.ssh(name, command), COMMAND_S)
        assert code == 0, f"{name}: {command}: exit {code}\n{said}"
        return said

    def ssh_options(self) -> str:
        """What ssh needs to reach any of them, without asking and without noting anything."""
        return (
            f"-F none -i {self.folder}/key -o BatchMode=yes -o ConnectTimeout=5 "
            "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR "
            f"-o ControlMaster=auto -o ControlPersist=60s -o ControlPath={self.folder}/%h"
        )

    def print_journals(self) -> None:
        """Prints the end of what the hosts' daemons logged, for a test that failed."""
        for name in self._machines:
            with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                print(f"--- {name}", self.run(name, "journalctl -u 'hci-*' -n 40 --no-pager"))

    def _make_key(self) -> None:
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "key")]
        subprocess.run(command, check=True)

    def _install(self, name: str) -> None:
        """Lays a disk over the root, with an address and who may log in."""
        number = next(n for n in range(1, 100) if f"{NETWORK}.{n}" not in self.addresses.values())
        self.addresses[name] = f"{NETWORK}.{number}"
        top = self.folder / name
        for part in ("upper", "work", "root"):
            (top / part).mkdir(parents=True)
        network = top / "upper/etc/systemd/network"
        network.mkdir(parents=True)
        (network / "10-host.network").write_text(
            f"[Match]\nName=host0\n[Network]\nAddress={self.addresses[name]}/24\n"
        )
        (top / "upper/etc/hostname").write_text(f"{name}\n")
        (top / "upper/etc/hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
        wanted = top / "upper/etc/systemd/system/multi-user.target.wants"
        wanted.mkdir(parents=True)
        (wanted / "systemd-networkd.service").symlink_to(
            "/lib/systemd/system/systemd-networkd.service"
        )
        layers = f"lowerdir={self._root},upperdir={top}/upper,workdir={top}/work"
        self._inside("mount", "-t", "overlay", "overlay", "-o", layers, f"{top}/root")
        keys = f"{top}/root/home/{USER}/.ssh/authorized_keys"
        self._inside("cp", f"{self.folder}/key.pub", keys)
        self._inside("chown", "--reference", f"{top}/root/home/{USER}", keys)

    def _start(self, name: str) -> None:
        top = self.folder / name
        groups = self._make_cgroups(name)
        # It moves itself into groups of its own: machines of one group are in each other's way.
        join = "".join(f"echo $$ >{group}/cgroup.procs; " for group in groups)
        nspawn = (
            f"exec systemd-nspawn --quiet --directory={top}/root --machine={name} --register=no "
            f"--keep-unit --network-bridge={BRIDGE} --hostname={name} --boot --console=pipe"
        )
        with (top / "console").open("ab") as console:
            self._machines[name] = subprocess.Popen(
                self.inside("sh", "-c", join + nspawn),
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                env={**os.environ, "PATH": PATHS},
                start_new_session=True,
            )

    def _answers(self, name: str) -> bool:
        machine = self._machines[name]
        console = self.folder / name / "console"
        assert machine.poll() is None, f"{name} ended:\n{console.read_text(errors='replace')}"
        try:
            _, said = completed(self.ssh(name, "systemctl is-system-running"), 30)
        except subprocess.TimeoutExpired:
            return False
        return said.strip() in ("running", "degraded")

    def _inside(self, *command: str) -> None:
        subprocess.run(self.inside(*command), check=True, env={**os.environ, "PATH": PATHS})

    def _groups(self, name: str) -> list[Path]:
        # One hierarchy, or two where the old one is still there for its controllers.
        tops = [CGROUPS]
        if not (CGROUPS / "cgroup.controllers").exists():
            tops = [CGROUPS / each for each in ("systemd", "unified") if (CGROUPS / each).is_dir()]
        return [top / f"{self.folder.name}-{name}" for top in tops]

    def _make_cgroups(self, name: str) -> list[Path]:
        groups = self._groups(name)
        for group in groups:
            group.mkdir(exist_ok=True)
        return groups

    def _remove_cgroups(self, name: str) -> None:
        for group in self._groups(name):
            if not group.exists():
                continue
            deadline = time.monotonic() + 10
            while group.exists() and time.monotonic() < deadline:
                for folder in (*_below(group), group):
                    # Its last processes may take a moment to be gone.
                    with contextlib.suppress(OSError):
                        folder.rmdir()
                time.sleep(0.05)


def completed(
    command: list[str], timeout_s: float, environment: dict[str, str] | None = None
) -> tuple[int, str]:
    """Runs a command to its end; returns its exit status and all that it said.

    Raises TimeoutExpired. However this ends, what it began on this machine has ended too: that is
    a group of processes, of which only the first is known.
    """
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        process_group=0,
    ) as process:
        try:
            said, _ = process.communicate(timeout=timeout_s)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return process.returncode, said


def quoted(text: str) -> str:
    """As one word of a shell."""
    return "'" + text.replace("'", "'\\''") + "'"


def _below(top: Path) -> Iterator[Path]:
    """The folders below one, the deepest first."""
    for folder, folders, _files in os.walk(top, topdown=False):
        for each in folders:
            yield Path(folder, each)
