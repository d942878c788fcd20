"""The networks of host clusters: lines fail as told, and nothing is left behind."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.line import Line
from tests.hosts.network import PROJECT, Network, NetworkError

GONE_WITHIN_S = 60.0
SHORT_S = 0.7
LONG_S = 10.0
ATTEMPTS = 10

SERVER = """
import socket
server = socket.create_server(("", 5000))
print("ready", flush=True)
while True:
    connection, _ = server.accept()
    connection.sendall(b"hello")
    connection.close()
"""
CLIENT = """
import socket, sys, time
began = time.monotonic()
with socket.create_connection((sys.argv[1], 5000), timeout=float(sys.argv[2])) as connection:
    assert connection.recv(5) == b"hello"
print(time.monotonic() - began)
"""


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    """Three members that answer on port 5000."""
    made = Network(tmp_path, ["a", "b", "c"], seed=5)
    servers = []
    try:
        for name in made.members:
            command = [*made.inside(name), sys.executable, "-c", SERVER, str(tmp_path)]
            server = subprocess.Popen(command, stdout=subprocess.PIPE)
            servers.append(server)
            assert server.stdout is not None and server.stdout.readline() == b"ready\n"
        yield made
    finally:
        for server in servers:
            server.kill()
            server.wait()
            assert server.stdout is not None
            server.stdout.close()
        made.close()


def reach(network: Network, source: str, target: str, timeout_s: float) -> float | None:
    """How long a connection and its first bytes took, or None where they never came."""
    address = network.addresses[target]
    done = subprocess.run(
        [*network.inside(source), sys.executable, "-c", CLIENT, address, str(timeout_s)],
        capture_output=True,
        text=True,
    )
    return float(done.stdout) if done.returncode == 0 else None


def test_lines_are_whole_until_one_is_cut_and_after_it_is_mended(network: Network) -> None:
    assert reach(network, "a", "b", LONG_S) is not None
    assert reach(network, "outside", "c", LONG_S) is not None
    network.cut(["a"], ["b"])
    # What is sent in one direction is lost, and so are the answers to what comes in the other.
    assert reach(network, "a", "b", SHORT_S) is None
    assert reach(network, "b", "a", SHORT_S) is None
    assert reach(network, "a", "c", LONG_S) is not None
    assert reach(network, "outside", "b", LONG_S) is not None
    network.mend()
    assert reach(network, "a", "b", LONG_S) is not None


def test_delay_is_of_one_direction_and_one_line(network: Network) -> None:
    network.set(Line(delay_ms=200), ["a"], ["b"])
    late = reach(network, "a", "b", LONG_S)
    # A connection takes two trips, of the first and of the third packet.
    assert late is not None and late >= 0.2
    # A busy machine may be as late once, a line that delays is never sooner.
    others_s: list[float] = []
    while len(others_s) < ATTEMPTS and min(others_s, default=LONG_S) >= 0.2:
        soon = reach(network, "a", "c", LONG_S)
        assert soon is not None
        others_s.append(soon)
    assert min(others_s) < 0.2, others_s
    network.set(Line(loss=1.0), ["a"], ["b"])
    assert reach(network, "a", "b", SHORT_S) is None


def test_member_that_nobody_has_is_refused(network: Network) -> None:
    with pytest.raises(NetworkError):
        network.cut(["a"], ["nobody"])


def test_networks_beside_each_other_do_not_meet(network: Network, tmp_path: Path) -> None:
    other = Network(tmp_path, ["a", "b", "c"])
    try:
        assert reach(other, "a", "b", SHORT_S) is None
        assert reach(network, "a", "b", LONG_S) is not None
    finally:
        other.close()


HOLDER = """
import sys, time
from pathlib import Path
from tests import reaper
from tests.hosts.cluster import HostCluster

cluster = HostCluster(nodes=3, gateways=1)
cluster.start()
print(cluster.directory, flush=True)
time.sleep(300)
"""


def test_cluster_of_a_killed_test_process_is_ended_with_its_networks() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER], cwd=PROJECT, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        folder = holder.stdout.readline().strip()
        assert folder
        before = spaces_of(folder)
        assert len(before) == 8  # etcd, nodes, a gateway, and the switch
        holder.kill()
    deadline = time.monotonic() + GONE_WITHIN_S
    while Path(folder).exists() or spaces_of(folder):
        assert time.monotonic() < deadline, "processes, and with them their networks, are left"
        time.sleep(0.1)


def spaces_of(folder: str) -> set[str]:
    """The network namespaces of all processes that name a folder."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if folder.encode() in (entry / "cmdline").read_bytes():
                found.add(str((entry / "ns" / "net").readlink()))
        except OSError:
            continue
    return found
