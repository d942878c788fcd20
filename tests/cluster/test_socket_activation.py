"""A gateway whose supervisor holds its listening sockets: an upgrade refuses nobody.

The supervisor is this test, then systemd's own. What connects while no gateway runs waits in the
socket, over TCP too, and is served by the next one; a guest that writes waits, and loses nothing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.devcluster import POOL, DevCluster
from tests.faults.load import ReconnectingDisk, drawn_seed
from tests.faults.nbd_session import NbdSession
from tests.faults.writing import await_progress, writing
from tests.protocol.raw_client import DISCONNECT, Client
from tests.waiting import is_listened_at, until

GATEWAY = "gateway1"
END_S = 60
UNANSWERED_S = 0.5
UPGRADES = 3


class Held:
    """Sockets that listen whether or not a gateway runs, and the gateway that was given them."""

    def __init__(self, cluster: DevCluster, folder: Path) -> None:
        self._serve = [sys.executable, "-m", "hci", "gateway", "serve"]
        self._serve += ["--config", str(cluster.config), "--name", GATEWAY]
        self._log = folder / "held.log"
        self.unix = socket.socket(socket.AF_UNIX)
        self.unix.bind(str(folder / "held.sock"))
        self.unix.listen(128)
        self.tcp = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.uris = {
            "unix": f"nbd+unix:///{POOL}/held?socket={folder / 'held.sock'}",
            "tcp": f"nbd://127.0.0.1:{self.tcp.getsockname()[1]}/{POOL}/held",
        }
        self._gateway: subprocess.Popen[bytes] | None = None

    def begin(self) -> None:
        """Starts a gateway; does not wait for it."""
        descriptors = [self.unix.fileno(), self.tcp.fileno()]
        words = ",".join(map(str, descriptors))
        with self._log.open("ab") as log:
            self._gateway = subprocess.Popen(
                [sys.executable, "-m", "hci.dev.activate", words, "nbd", *self._serve],
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Ends it, as a restart of its service does."""
        if self._gateway is None:
            return
        gateway, self._gateway = self._gateway, None
        gateway.send_signal(number)
        try:
            code = gateway.wait(END_S)
        finally:
            gateway.kill()
            gateway.wait()
        assert code == (0 if number == signal.SIGTERM else -number), self._log.read_text()

    def close(self) -> None:
        with contextlib.suppress(AssertionError):
            self.end(signal.SIGKILL)
        self.unix.close()
        self.tcp.close()


@pytest.fixture
def held(cluster: DevCluster) -> Iterator[Held]:
    """Sockets for the cluster's gateway, which does not run."""
    cluster.create("held", "64M")
    cluster.kill(GATEWAY)
    sockets = Held(cluster, cluster.directory)
    try:
        yield sockets
    finally:
        sockets.close()
        (cluster.directory / "held.sock").unlink()
        cluster.run(GATEWAY)


def is_unanswered(client: Client) -> bool:
    """Whether a client that is connected is told nothing, not even that it is closed."""
    client.socket.settimeout(UNANSWERED_S)
    try:
        client.socket.recv(1)
    except TimeoutError:
        return True
    finally:
        client.socket.settimeout(END_S)
    return False


def test_clients_of_every_socket_wait_for_the_next_gateway(cluster: DevCluster, held: Held) -> None:
    held.begin()
    with Client(held.uris["unix"]).open() as one, Client(held.uris["tcp"]).open() as two:
        one.write(0, b"u")
        assert two.read(0, 1) == b"u"
    for number in (signal.SIGTERM, signal.SIGKILL):
        held.end(number)
        with Client(held.uris["unix"]) as one, Client(held.uris["tcp"]) as two:
            assert is_unanswered(one)
            assert is_unanswered(two)
            held.begin()
            assert one.open().read(0, 1) == b"u"
            assert two.open().read(0, 1) == b"u"
    # The socket that it was given stands for the one of its configuration.
    with pytest.raises(ConnectionRefusedError):
        Client(f"nbd://{configured(cluster, 'nbd_listen')}/{POOL}/held")


def configured(cluster: DevCluster, key: str) -> str:
    """What the gateway's section of the configuration says."""
    return str(tomllib.loads(cluster.config.read_text())["gateway"][GATEWAY][key])


def test_guest_that_writes_goes_on_over_upgrades(
    cluster: DevCluster, held: Held, tmp_path: Path
) -> None:
    held.begin()
    seed = drawn_seed()
    with (
        ReconnectingDisk(held.uris["unix"], tmp_path) as disk,
        NbdSession(disk.uri, seed) as session,
    ):
        with writing(session, seed) as writer:
            for _ in range(UPGRADES):
                await_progress(writer)
                held.end()
                held.begin()
            await_progress(writer)
        assert writer.verify(session) == []
    assert cluster.info("held")["stale"] == []
    cluster.must_be_equal("held")


@pytest.mark.skipif(
    shutil.which("systemd-socket-activate") is None, reason="needs systemd-socket-activate"
)
def test_systemd_hands_its_sockets_over_to_a_gateway(cluster: DevCluster) -> None:
    cluster.create("held", "64M")
    cluster.kill(GATEWAY)
    path = cluster.directory / "systemd.sock"
    address = configured(cluster, "nbd_listen")
    environment = [f"--setenv={name}={os.environ[name]}" for name in ("PATH", "PYTHONPATH")
                   if name in os.environ]  # fmt: skip
    systemd = subprocess.Popen(
        [
            *("systemd-socket-activate", f"--listen={path}", f"--listen={address}", *environment),
            *(sys.executable, "-m", "hci", "gateway", "serve"),
            *("--config", str(cluster.config), "--name", GATEWAY),
        ],
        stdin=subprocess.DEVNULL,
    )
    try:
        until("it listens", lambda: is_listened_at(path))
        # It becomes the gateway when the first client is there.
        with Client(f"nbd+unix:///{POOL}/held?socket={path}").open() as one:
            one.write(5, b"systemd")
        with Client(f"nbd://{address}/{POOL}/held").open() as two:
            assert two.read(5, 7) == b"systemd"
            two.request(DISCONNECT, 9)
    finally:
        systemd.terminate()
        code = systemd.wait(END_S)
        path.unlink(missing_ok=True)
        cluster.run(GATEWAY)
    assert code == 0
