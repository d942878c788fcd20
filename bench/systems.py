"""The systems that are compared, each started in a folder of its own and stopped afterwards."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from bench.measure import SkippedError
from bench.processes import end_processes_naming, processes_naming
from bench.workloads import IMAGE_BYTES
from tests.devcluster import CommandError, DevCluster

START_TIMEOUT_S = 60.0


class System(ABC):
    """One storage system with one image to measure, everything of it inside `directory`."""

    name: str

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @abstractmethod
    def start(self) -> None:
        """Starts it with an empty image; raises SkippedError where that cannot be done here."""

    @abstractmethod
    def fio_arguments(self) -> list[str]:
        """The engine and the target, for fio."""

    def pids(self) -> list[int]:
        """Every process that this system runs."""
        return processes_naming(self.directory)

    def stop(self) -> None:
        """Ends every process of the system and deletes its folder."""
        end_processes_naming(self.directory)
        shutil.rmtree(self.directory, ignore_errors=True)


class Cluster(System):
    """This project: three nodes, one gateway, etcd, over NBD."""

    name = "hci"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._cluster = DevCluster(directory=directory)
        self._uri = ""

    def start(self) -> None:
        try:
            self._cluster.start()
            self._cluster.create("bench", str(IMAGE_BYTES))
            self._uri = self._cluster.url("bench")
        except (CommandError, FileNotFoundError) as failure:
            raise SkippedError(str(failure)) from failure

    def fio_arguments(self) -> list[str]:
        return ["--ioengine=nbd", f"--uri={self._uri}"]

    def stop(self) -> None:
        self._cluster.close()
        super().stop()


class Nbdkit(System):
    """One plain file behind nbdkit: one copy, no network, no checksums. The limit."""

    name = "nbdkit"

    def start(self) -> None:
        program = shutil.which("nbdkit")
        if program is None:
            raise SkippedError("nbdkit is not installed")
        self.directory.mkdir()
        image = self.directory / "image"
        with image.open("wb") as file:
            file.truncate(IMAGE_BYTES)
        process = subprocess.Popen(
            [program, "--foreground", "-U", str(self._socket()), "file", str(image)],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        _await(lambda: self._socket().exists() or process.poll() is not None)

    def fio_arguments(self) -> list[str]:
        return ["--ioengine=nbd", f"--uri=nbd+unix:///?socket={self._socket()}"]

    def _socket(self) -> Path:
        return self.directory / "nbd.sock"


class Gluster(System):
    """Gluster replica 3 with the settings that it recommends for virtual machines, over gfapi."""

    name = "gluster"
    VOLUME = "bench"

    def start(self) -> None:
        if shutil.which("glusterd") is None or shutil.which("gluster") is None:
            raise SkippedError("glusterfs-server is not installed")
        if os.geteuid() != 0:
            raise SkippedError("glusterd runs as root only")
        if "gfapi_async" not in _output(["fio", "--enghelp"]):
            raise SkippedError("this fio has no gfapi engine")
        if not Path("/var/lib/glusterd/groups/virt").exists():
            raise SkippedError("Gluster's settings group `virt` is not installed")
        self.directory.mkdir()
        self._host = socket.gethostname()
        address = self._loopback_address()
        for name in ("state", "run", "log", "brick1", "brick2", "brick3"):
            (self.directory / name).mkdir()
        self._start_daemon(address)
        bricks = [f"{self._host}:{self.directory}/brick{number}" for number in (1, 2, 3)]
        self._gluster("volume", "create", self.VOLUME, "replica", "3", *bricks, "force")
        self._gluster("volume", "set", self.VOLUME, "group", "virt")
        self._gluster("volume", "start", self.VOLUME)
        # The volume's bricks are up when all three say so.
        _await(lambda: self._gluster("volume", "status").count(" Y ") >= 4)

    def fio_arguments(self) -> list[str]:
        target = [f"--volume={self.VOLUME}", f"--brick={self._host}", "--filename=image"]
        return ["--ioengine=gfapi_async", *target]

    def _loopback_address(self) -> str:
        try:
            address = socket.gethostbyname(self._host)
        except OSError as unknown:
            raise SkippedError(f"the host's name {self._host} does not resolve") from unknown
        with contextlib.closing(socket.socket()) as probe:
            if probe.connect_ex((address, 24007)) == 0:
                raise SkippedError("another glusterd runs here; stop it to measure a fresh one")
        return address

    def _start_daemon(self, address: str) -> None:
        here = self.directory
        volfile = here / "glusterd.vol"
        volfile.write_text(
            "volume management\n"
            "    type mgmt/glusterd\n"
            f"    option working-directory {here}/state\n"
            f"    option run-directory {here}/run\n"
            f"    option glusterd-sockfile {here}/run/glusterd.socket\n"
            "    option transport-type socket\n"
            "    option transport.address-family inet\n"
            f"    option transport.socket.bind-address {address}\n"
            "    option transport.socket.listen-port 24007\n"
            "    option transport.socket.read-fail-log off\n"
            "end-volume\n"
        )
        subprocess.Popen(
            [
                *("glusterd", "-f", str(volfile), "-N", "-p", str(here / "glusterd.pid")),
                *("-l", str(here / "log" / "glusterd.log")),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        _await(lambda: self._try_gluster("peer", "status").returncode == 0)

    def _try_gluster(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        here = self.directory
        return subprocess.run(
            [
                *("gluster", "--mode=script", f"--log-file={here}/log/cli.log"),
                *(f"--glusterd-sock={here}/run/glusterd.socket", *arguments),
            ],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT_S,
        )

    def _gluster(self, *arguments: str) -> str:
        done = self._try_gluster(*arguments)
        if done.returncode != 0:
            said = (done.stderr or done.stdout).strip()
            raise SkippedError(f"gluster {' '.join(arguments[:2])} failed: {said}")
        return done.stdout


SYSTEMS: dict[str, type[System]] = {kind.name: kind for kind in (Cluster, Nbdkit, Gluster)}


def _await(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not ready():
        if time.monotonic() > deadline:
            raise SkippedError(f"it was not ready after {START_TIMEOUT_S:.0f} s")
        time.sleep(0.1)


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
