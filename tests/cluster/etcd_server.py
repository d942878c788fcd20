"""A real etcd of one member, for tests: its own process, ports and folder."""

import contextlib
import shutil
import socket
import subprocess
import time
from pathlib import Path

from etcd.client import EtcdClient
from etcd.errors import EtcdUnavailable

START_S = 30.0


class EtcdServer:
    """An etcd process that can be killed and started again on the same data and port."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("etcd")
        assert program is not None, "etcd is not installed; Debian's package is etcd-server"
        self._program = program
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.port, self._peer_port = free_ports(2)

    @property
    def endpoint(self) -> str:
        """The address clients use."""
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start etcd and return when it answers."""
        client, peer = f"http://{self.endpoint}", f"http://127.0.0.1:{self._peer_port}"
        with (self._folder / "etcd.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    self._program,
                    "--name=only",
                    f"--data-dir={self._folder / 'data'}",
                    f"--listen-client-urls={client}",
                    f"--advertise-client-urls={client}",
                    f"--listen-peer-urls={peer}",
                    f"--initial-advertise-peer-urls={peer}",
                    f"--initial-cluster=only={peer}",
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._wait_until_it_answers()

    def kill(self) -> None:
        """Kill etcd as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def lose_data(self) -> None:
        """Remove all data of a killed etcd."""
        assert self._process is None, "etcd is not running"
        shutil.rmtree(self._folder / "data")

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + START_S
        with contextlib.closing(EtcdClient([self.endpoint])) as client:
            while True:
                assert self._process is not None
                assert self._process.poll() is None, f"etcd ended: see {self._folder}/etcd.log"
                assert time.monotonic() < deadline, "etcd did not start in time"
                try:
                    client.get("/")
                except EtcdUnavailable:
                    time.sleep(0.05)
                else:
                    return


def free_ports(count: int) -> list[int]:
    """Return ports that nothing listens on at the moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
