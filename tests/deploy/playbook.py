"""The collection as people use it: installed, with an inventory, from another machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.deploy.hosts import PATHS, PROJECT, Hosts, completed
from tests.deploy.root import USER

PLAYBOOK_S = 400.0
PROGRAMS = Path(sys.executable).parent
CLUSTER_ID = "0123456789abcdef0123456789abcdef"


@dataclass(frozen=True)
class Played:
    """How a run of a playbook ended."""

    code: int
    output: str

    @property
    def changed(self) -> dict[str, int]:
        """How much was changed, by host, as the recap says."""
        found = re.findall(r"^(\S+)\s+: ok=\d+\s+changed=(\d+)", self.output, re.MULTILINE)
        return {host: int(count) for host, count in found}

    def must_succeed(self) -> Played:
        assert self.code == 0, self.output[-6000:]
        return self

    def must_refuse(self, why: str) -> None:
        """Fails unless it ended with these words, before anything was changed."""
        assert self.code != 0, "it was not refused"
        # Messages are folded where they are printed.
        assert why in " ".join(self.output.split()), self.output[-3000:]
        assert set(self.changed.values()) == {0}, self.output[-3000:]


class Controller:
    """The machine from which hosts are set up: this one, with a folder of its own."""

    def __init__(self, hosts: Hosts, bundle: Path) -> None:
        self._hosts = hosts
        self.bundle = bundle
        self.folder = hosts.folder / "controller"
        self.folder.mkdir()
        self.run("ansible-galaxy collection install --force ./ansible", PROJECT).must_succeed()

    def inventory(self, name: str) -> Path:
        """Copies an example, with the hosts' addresses and the bundle in it, under that name."""
        text = (PROJECT / "ansible" / "inventories" / f"{name}.yml").read_text()
        path = self.folder / f"{name}.yml"
        path.write_text(self.filled_in(text).replace("DRAW-ONE", CLUSTER_ID))
        return path

    def filled_in(self, text: str) -> str:
        """What a person would write into the example of an inventory: addresses, and the bundle."""
        for number in (1, 2, 3):
            address = self._hosts.addresses[f"host{number}"]
            text = text.replace(f"192.0.2.{number}\n", f"{address}\n")
            text = text.replace(f"10.0.0.{number}\n", f"{address}\n")
        assert f"ansible_user: {USER}\n" in text
        return re.sub(r"/srv/hci-vmstore-\S+", str(self.bundle), text)

    def play(self, playbook: str, inventory: Path, *arguments: str) -> Played:
        """Runs a playbook of the collection to its end."""
        words = ["--inventory", str(inventory), f"hci.vmstore.{playbook}", *arguments]
        return self._done([str(PROGRAMS / "ansible-playbook"), *words], self.folder)

    def run(self, command: str, folder: Path | None = None) -> Played:
        """Runs a command of the shell, as a person on this machine would."""
        return self._done(["bash", "-euo", "pipefail", "-c", command], folder or self.folder)

    def _done(self, command: list[str], folder: Path) -> Played:
        command = self._hosts.inside("env", f"--chdir={folder}", *command)
        try:
            return Played(*completed(command, PLAYBOOK_S, self._environment()))
        except subprocess.TimeoutExpired as error:
            said = (error.output or b"").decode()[-3000:]
            raise AssertionError(f"it does not end:\n{said}") from None

    def _environment(self) -> dict[str, str]:
        # Nothing of this user's counts, and nothing is left in his home.
        kept = {name: value for name, value in os.environ.items() if name[:8] != "ANSIBLE_"}
        return {
            **kept,
            "PATH": f"{PROGRAMS}:{PATHS}",
            "HOME": str(self.folder),
            "ANSIBLE_HOME": str(self.folder / ".ansible"),
            "ANSIBLE_SSH_ARGS": self._hosts.ssh_options(),
            "ANSIBLE_PIPELINING": "true",
            "ANSIBLE_NOCOLOR": "true",
            "ANSIBLE_DEPRECATION_WARNINGS": "false",
            "LC_ALL": "C.UTF-8",
        }

    def forget(self) -> None:
        """Removes its folder."""
        shutil.rmtree(self.folder)
