"""Real etcd members for tests: each its own process, ports and folder."""

import contextlib
import random
import shutil
import socket
import subprocess
import time
from pathlib import Path

from etcd.client import EtcdClient
from etcd.errors import EtcdUnavailable

START_S = 60.0
# Below what Linux gives to outgoing connections, and apart from what dev clusters take.
PORTS = range(12000, 20000)
# Held until this process ends: the names of its ports, which no other test process takes then.
_claims: list[socket.socket] = []


class EtcdServer:
    """An etcd member that can be killed and started again on the same data and port."""

    def __init__(
        self, folder: Path, name: str = "only", ports: tuple[int, int] | None = None
    ) -> None:
        program = shutil.which("etcd")
        assert program is not None, "etcd is not installed; Debian's package is etcd-server"
        self._program = program
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.name = name
        self.port, self._peer_port = ports or free_ports(2)
        self.members = [self]

    @property
    def endpoint(self) -> str:
        """The address clients use."""
        return f"127.0.0.1:{self.port}"

    @property
    def peer_url(self) -> str:
        """The address other members use."""
        return f"http://127.0.0.1:{self._peer_port}"

    def start(self) -> None:
        """Start etcd and return when it answers, which takes a majority of the members."""
        self.launch()
        self.wait_until_it_answers()

    def launch(self) -> None:
        """Start etcd."""
        client, peer = f"http://{self.endpoint}", self.peer_url
        members = ",".join(f"{member.name}={member.peer_url}" for member in self.members)
        with (self._folder / "etcd.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    self._program,
                    f"--name={self.name}",
                    f"--data-dir={self._folder / 'data'}",
                    f"--listen-client-urls={client}",
                    f"--advertise-client-urls={client}",
                    f"--listen-peer-urls={peer}",
                    f"--initial-advertise-peer-urls={peer}",
                    f"--initial-cluster={members}",
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def pid(self) -> int:
        """Of the running process."""
        assert self._process is not None, "etcd does not run"
        return self._process.pid

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

    def wait_until_it_answers(self) -> None:
        """Return when etcd answers a read."""
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


def etcd_members(folder: Path, count: int) -> list[EtcdServer]:
    """Return the members of one etcd cluster, none of them started."""
    ports = free_ports(2 * count)
    members = []
    for number in range(count):
        (folder / f"member{number}").mkdir()
        own = ports[2 * number], ports[2 * number + 1]
        members.append(EtcdServer(folder / f"member{number}", f"member{number}", own))
    for member in members:
        member.members = members
    return members


def free_ports(count: int) -> list[int]:
    """Return ports that nothing listens on, and that no other test process gets while this lives.

    A server that is killed and started again finds its port free.
    """
    found: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        if len(found) == count:
            break
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            claim.bind(f"\0hci-test-port-{port}")
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            claim.close()
            continue
        _claims.append(claim)
        found.append(port)
    assert len(found) == count, "no free ports"
    return found
