"""Strangers on a node's data port: garbage, cut frames, unknown versions, other clusters.

Each ends its own connection and nothing else: an image goes on being written meanwhile.
"""

from __future__ import annotations

import fcntl
import os
import random
import socket
import struct
import subprocess
import threading
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.devcluster import DevCluster

MAGIC = b"HCIWIRE\n"
HELLO = 1
REPLY = 0x80
STATUS_MALFORMED = 1
STATUS_VERSION = 2
VERSION = 5
STATUS_WRONG_CLUSTER = 3
STATUS_WRONG_NODE = 4
STATUS_NO_SESSION = 8
MEMORY = 8
READ_INTO = 22
PING = 2
SUMMARY = 33
BESIDE_CLIENTS = 1
# A hang detector; the load pauses for a moment where it begins anew.
SEEN_TIMEOUT_S = 20.0
KINDS = (*range(1, 11), *range(16, 23), *range(32, 40))
UNKNOWN_KINDS = (0, 11, 15, 23, 31, 40, 99, 127)


@pytest.fixture(scope="module")
def busy(shared: DevCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevCluster]:
    """A cluster whose image `busy` is written and verified while the tests run."""
    shared.create("busy", "64M")
    enough = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        load = pool.submit(write_and_verify, shared.url("busy"), enough, tmp_path_factory)
        try:
            yield shared
            assert not load.done(), "the load ended before the tests did"
        finally:
            enough.set()
        load.result()
    assert shared.health() == "ok"
    shared.must_be_equal("busy")


def write_and_verify(
    uri: str, enough: threading.Event, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Has fio write and read back, again and again, until it is enough; each must succeed."""
    command = [
        *("fio", "--name=busy", "--ioengine=nbd", f"--uri={uri}"),
        *("--rw=randwrite", "--bs=4k", "--size=4m", "--iodepth=4", "--verify=crc32c"),
        *("--verify_fatal=1", "--fsync=16", "--rate=1m,32m"),
    ]
    while not enough.is_set():
        done = subprocess.run(
            command,
            cwd=tmp_path_factory.mktemp("fio"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def connect(cluster: DevCluster, node: str = "node1") -> socket.socket:
    """A connection to a node's data port."""
    config = tomllib.loads(cluster.config.read_text())
    host, _, port = config["node"][node]["listen"].rpartition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def cluster_id(cluster: DevCluster) -> bytes:
    """The cluster's id as it travels."""
    return bytes.fromhex(tomllib.loads(cluster.config.read_text())["cluster"]["id"])


def crc32c(data: bytes) -> int:
    """CRC32C, bit by bit: a second opinion on the engine's."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def frame(kind: int, head: bytes, payload: bytes = b"", *, tag: int = 7, channel: int = 0) -> bytes:
    """A frame by docs/wire.md."""
    lengths = struct.pack("<II", len(head), len(payload))
    rest = struct.pack("<BBHIQ", kind, 0, 0, channel, tag)
    checksum = crc32c(lengths + bytes(4) + rest + head)
    return lengths + struct.pack("<I", checksum) + rest + head + payload


def text(value: str) -> bytes:
    """A text field."""
    return struct.pack("<H", len(value.encode())) + value.encode()


def hello(cluster: bytes, node: str, *, lowest: int = VERSION, highest: int = VERSION) -> bytes:
    """A greeting."""
    head = MAGIC + struct.pack("<HH", lowest, highest) + cluster + text("stranger") + text(node)
    return frame(HELLO, head)


def answer(connection: socket.socket) -> tuple[int, int]:
    """Kind and status of the next frame."""
    kind, _, status = flagged_answer(connection)
    return kind, status


def flagged_answer(connection: socket.socket) -> tuple[int, int, int]:
    """Kind, flags and status of the next frame."""
    prefix = b""
    while len(prefix) < 28:
        piece = connection.recv(28 - len(prefix))
        assert piece, "closed without an answer"
        prefix += piece
    head_bytes, payload_bytes, _, kind, flags, status = struct.unpack("<IIIBBH", prefix[:16])
    left = head_bytes + payload_bytes
    while left:
        piece = connection.recv(left)
        assert piece, "closed within a frame"
        left -= len(piece)
    return kind, flags, status


def is_closed(connection: socket.socket) -> bool:
    """Whether the peer ends the connection, which we keep open, and says nothing before that."""
    try:
        return not connection.recv(65536)
    except ConnectionError:
        return True
    except TimeoutError:
        return False


def test_wire_hello_of_a_member_is_answered(busy: DevCluster) -> None:
    with connect(busy) as connection:
        connection.sendall(hello(cluster_id(busy), "node1"))
        assert answer(connection) == (HELLO | REPLY, 0)


def test_wire_hello_of_an_unknown_version_is_refused_and_closed(busy: DevCluster) -> None:
    with connect(busy) as connection:
        connection.sendall(hello(cluster_id(busy), "node1", lowest=VERSION + 1, highest=9))
        assert answer(connection) == (HELLO | REPLY, STATUS_VERSION)
        assert is_closed(connection)


def test_wire_hello_of_another_cluster_is_refused_and_closed(busy: DevCluster) -> None:
    with connect(busy) as connection:
        connection.sendall(hello(bytes(16), "node1"))
        assert answer(connection) == (HELLO | REPLY, STATUS_WRONG_CLUSTER)
        assert is_closed(connection)


def test_wire_hello_for_another_node_is_refused_and_closed(busy: DevCluster) -> None:
    with connect(busy) as connection:
        connection.sendall(hello(cluster_id(busy), "node2"))
        assert answer(connection) == (HELLO | REPLY, STATUS_WRONG_NODE)
        assert is_closed(connection)


def test_wire_request_before_hello_closes(busy: DevCluster) -> None:
    with connect(busy) as connection:
        connection.sendall(frame(4, bytes(84)))
        assert is_closed(connection)


def test_wire_garbage_closes_that_connection_only(busy: DevCluster) -> None:
    chance = random.Random(1)
    for _ in range(20):
        with connect(busy) as connection:
            connection.sendall(chance.randbytes(chance.randrange(28, 4096)))
            assert is_closed(connection)


@pytest.mark.parametrize("kind", [*KINDS, *(kind | REPLY for kind in KINDS), *UNKNOWN_KINDS])
def test_wire_garbage_after_hello_closes_that_connection_only(busy: DevCluster, kind: int) -> None:
    chance = random.Random(kind)
    with connect(busy) as connection:
        connection.sendall(hello(cluster_id(busy), "node1"))
        assert answer(connection) == (HELLO | REPLY, 0)
        connection.sendall(frame(kind, chance.randbytes(61), chance.randbytes(512), channel=3))
        assert is_closed(connection)


def test_wire_oversized_lengths_close_before_anything_is_buffered(busy: DevCluster) -> None:
    with connect(busy) as connection:
        connection.sendall(hello(cluster_id(busy), "node1"))
        assert answer(connection) == (HELLO | REPLY, 0)
        connection.sendall(struct.pack("<II", 16, 0xFFFFFFFF) + bytes(20))
        assert is_closed(connection)


def test_wire_damaged_head_closes(busy: DevCluster) -> None:
    damaged = bytearray(hello(cluster_id(busy), "node1"))
    damaged[40] ^= 1
    with connect(busy) as connection:
        connection.sendall(damaged)
        assert is_closed(connection)


def test_wire_truncated_frame_and_vanishing_peer_disturb_nobody(busy: DevCluster) -> None:
    greeting = hello(cluster_id(busy), "node1")
    for length in range(1, len(greeting), 7):
        with connect(busy) as connection:
            connection.sendall(greeting[:length])
    assert busy.health() == "ok"


def local(cluster: DevCluster) -> socket.socket:
    """A connection to the data socket that a node has for processes of its host, greeted."""
    config = tomllib.loads(cluster.config.read_text())
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(10)
    connection.connect(config["node"]["node1"]["socket"])
    connection.sendall(hello(cluster_id(cluster), "node1"))
    assert answer(connection) == (HELLO | REPLY, 0)
    return connection


def memory(size: int, *, sealed: bool) -> int:
    """A descriptor of shared memory."""
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    if sealed:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return fd


@pytest.mark.parametrize(
    ("size", "sealed", "status"),
    [
        (1 << 20, True, 0),
        (1 << 20, False, STATUS_MALFORMED),
        (0, True, STATUS_MALFORMED),
        (1 << 40, True, STATUS_MALFORMED),
    ],
)
def test_wire_memory_that_could_harm_the_node_is_refused(
    busy: DevCluster, size: int, sealed: bool, status: int
) -> None:
    fd = memory(size, sealed=sealed)
    try:
        with local(busy) as connection:
            socket.send_fds(connection, [frame(MEMORY, b"")], [fd])
            assert answer(connection) == (MEMORY | REPLY, status)
            read = struct.pack("<QIIQQQQ", 0, 0, 4096, 1, 1, 0, 0)
            connection.sendall(frame(READ_INTO, read, channel=3))
            assert answer(connection) == (READ_INTO | REPLY, STATUS_NO_SESSION)
    finally:
        os.close(fd)


def test_wire_memory_without_a_descriptor_and_descriptors_without_end_are_refused(
    busy: DevCluster,
) -> None:
    fd = memory(1 << 20, sealed=True)
    try:
        with local(busy) as connection:
            connection.sendall(frame(MEMORY, b""))
            assert answer(connection) == (MEMORY | REPLY, STATUS_MALFORMED)
            for _ in range(100):
                socket.send_fds(connection, [frame(2, b"")], [fd] * 50)
                assert answer(connection) == (2 | REPLY, 0)
            connection.sendall(frame(MEMORY, b""))
            assert answer(connection)[0] == MEMORY | REPLY
    finally:
        os.close(fd)
    with connect(busy) as connection:
        connection.sendall(hello(cluster_id(busy), "node1"))
        assert answer(connection) == (HELLO | REPLY, 0)
        connection.sendall(frame(MEMORY, b""))
        assert answer(connection) == (MEMORY | REPLY, STATUS_MALFORMED)


def test_wire_work_in_the_background_is_told_of_clients(busy: DevCluster) -> None:
    """A gateway that heals sees its own clients only; the node says that there are others."""
    blocks = struct.pack("<QIQII", 1, 1, 0, 0, 1)
    deadline = time.monotonic() + SEEN_TIMEOUT_S
    with connect(busy) as connection:
        connection.sendall(hello(cluster_id(busy), "node1"))
        assert answer(connection) == (HELLO | REPLY, 0)
        flags = 0
        while flags == 0 and time.monotonic() < deadline:
            connection.sendall(frame(SUMMARY, blocks, channel=3))
            kind, flags, status = flagged_answer(connection)
            assert (kind, status) == (SUMMARY | REPLY, STATUS_NO_SESSION)
        assert flags == BESIDE_CLIENTS
        connection.sendall(frame(PING, b""))
        assert flagged_answer(connection) == (PING | REPLY, 0, 0)
