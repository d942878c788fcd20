"""The holder of NBD sockets: a client that comes while its gateway is down is served later."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hci import config_file
from hci.config import Config
from hci.dev import health, holder, layout
from hci.errors import DevError

SERVE_ONE = """
import os, socket, sys
assert os.environ["LISTEN_PID"] == str(os.getpid()), "the sockets are meant for this process"
assert os.environ["LISTEN_FDS"] == "1"
assert os.environ["LISTEN_FDNAMES"] == "nbd"
listener = socket.socket(fileno=3)
connection, _ = listener.accept()
connection.sendall(sys.argv[1].encode())
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Config]:
    path = tmp_path / "hci.toml"
    layout.write(path, layout.new_config(tmp_path, 3, 2, "vms"))
    found = config_file.load(path)
    assert found.dev is not None
    layout.make_run_dir(found.dev.run_dir)
    process = subprocess.Popen([sys.executable, "-m", "hci.dev.holder", "--config", str(path)])
    try:
        health.wait_for_socket(holder.address(found), process, tmp_path / "none.log")
        yield found
    finally:
        path.unlink(missing_ok=True)
        assert process.wait(30) == 0, "it ends when its cluster is gone"
        for left in sorted(found.dev.run_dir.rglob("*"), reverse=True):
            left.unlink() if not left.is_dir() else left.rmdir()
        found.dev.run_dir.rmdir()


def test_socket_is_not_there_before_it_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A busy machine let a start of the cluster find the holder's socket, and be refused by it.
    path = tmp_path / "holder.sock"
    seen: list[bool] = []
    chmod = Path.chmod

    def look(self: Path, mode: int) -> None:
        seen.append(path.exists())
        chmod(self, mode)

    monkeypatch.setattr(Path, "chmod", look)
    with holder._listen(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    assert seen == [False]
    assert [each.name for each in tmp_path.iterdir()] == ["holder.sock"]


def serve_one(listener: socket.socket, word: str) -> None:
    descriptor = listener.fileno()
    command = [sys.executable, "-m", "hci.dev.activate", str(descriptor), "nbd"]
    command += [sys.executable, "-c", SERVE_ONE, word]
    subprocess.run(command, pass_fds=[descriptor], check=True, timeout=60)


def connect(cluster: Config) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(60)
    client.connect(str(cluster.gateways["gateway1"].nbd_socket))
    return client


def test_client_that_connects_between_two_gateways_is_served_by_the_second(
    cluster: Config,
) -> None:
    with holder.take(cluster, "gateway1") as first:
        with connect(cluster) as client:
            serve_one(first, "first")
            assert client.recv(64) == b"first"
    with connect(cluster) as client:
        with holder.take(cluster, "gateway1") as second:
            serve_one(second, "second")
        assert client.recv(64) == b"second"


def test_socket_is_for_its_owner_alone(cluster: Config) -> None:
    with holder.take(cluster, "gateway1"):
        path = cluster.gateways["gateway1"].nbd_socket
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700


def test_gateway_that_is_not_configured_gets_no_socket(cluster: Config) -> None:
    with pytest.raises(DevError, match="no NBD socket for gateway9: gateway9 is not in"):
        holder.take(cluster, "gateway9")


def test_holder_survives_a_client_that_says_nothing(cluster: Config) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(holder.address(cluster)))
    with holder.take(cluster, "gateway2") as listener:
        assert os.fstat(listener.fileno())


def test_holder_that_is_gone_is_told(tmp_path: Path) -> None:
    found = config_file.parse(layout.new_config(tmp_path, 3, 1, "vms"), tmp_path / "hci.toml")
    with pytest.raises(DevError, match="holder of the NBD sockets does not answer"):
        holder.take(found, "gateway1")
