"""Sockets that a supervisor hands over: taken where they are meant for this process."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

TELL = """
from hci import daemon
from hci.errors import DaemonError
try:
    print([(each.family.name, each.getsockname()) for each in daemon.activated_sockets()])
except DaemonError as error:
    print(error)
"""
# Descriptors must be where the protocol says, and the pid that of the program that is run.
BECOME = """
import os, sys
for place, descriptor in enumerate(sys.argv[3].split(","), 10):
    os.dup2(int(descriptor), place)
for place in range(10, 10 + len(sys.argv[3].split(","))):
    os.dup2(place, place - 7, inheritable=True)
os.environ |= {"LISTEN_PID": sys.argv[1] or str(os.getpid()), "LISTEN_FDS": sys.argv[2]}
os.execv(sys.executable, [sys.executable, "-c", sys.argv[4]])
"""


def told(
    sockets: Sequence[socket.socket | IO[str]], *, pid: str = "", count: str | None = None
) -> str:
    descriptors = [each.fileno() for each in sockets]
    arguments = [pid, str(len(sockets)) if count is None else count]
    arguments += [",".join(map(str, descriptors)), TELL]
    done = subprocess.run(
        [sys.executable, "-c", BECOME, *arguments],
        pass_fds=descriptors,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout.strip()


def test_unix_and_tcp_sockets_are_taken_in_order(tmp_path: Path) -> None:
    path = str(tmp_path / "nbd.sock")
    with socket.socket(socket.AF_UNIX) as unix, socket.create_server(("127.0.0.1", 0)) as tcp:
        unix.bind(path)
        unix.listen()
        expected = [("AF_UNIX", path), ("AF_INET", tcp.getsockname())]
        assert told([unix, tcp]) == str(expected)


def test_sockets_for_another_process_are_left_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as tcp:
        assert told([tcp], pid=str(os.getpid())) == "[]"


def test_count_that_is_none_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as tcp:
        assert "LISTEN_FDS = 'x' is not" in told([tcp], count="x")


def test_socket_that_nobody_can_connect_to_is_refused(tmp_path: Path) -> None:
    # A gateway took it, and served nobody: systemd's Accept=yes hands over a connection.
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "bound.sock"))
        with socket.create_connection(tcp.getsockname()) as connection:
            assert "descriptor 3 in LISTEN_FDS is not a stream" in told([connection])
        assert "descriptor 4 in LISTEN_FDS is not a stream" in told([tcp, bound])
    datagrams = tmp_path / "datagrams.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram:
        datagram.bind(str(datagrams))
        assert "descriptor 3 in LISTEN_FDS is not a stream" in told([datagram])


def test_descriptor_that_is_no_socket_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        assert "descriptor 3 in LISTEN_FDS: " in told([file])
