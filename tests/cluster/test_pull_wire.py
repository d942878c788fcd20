"""PULL and PEER_FETCH on a node's data port, with the gateway and the source played here.

What a holder asks comes in order, what a source gives comes when it comes. The source played here
decides when: what the node was told meanwhile has to stand.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from typing import NamedTuple, Self

import pytest
import xxhash

from tests.cluster.test_wire import (
    HELLO,
    MAGIC,
    PING,
    REPLY,
    VERSION,
    answer,
    cluster_id,
    connect,
    frame,
    hello,
    is_closed,
    text,
)
from tests.devcluster import DevCluster
from tests.faults.nbd_session import NbdSession
from tests.waiting import until

PEEK, ATTACH, PEER_FETCH, WRITE, READ, PULL = 3, 5, 10, 16, 18, 39
OK, NO_RECORD, UNREACHABLE, CANCELLED = 0, 5, 16, 17
CHANNEL = 3
LAYER = 1
"""The only one of a new image."""
SHARD = 0
BLOCK_BYTES = 4096
DATA = 2
"""The state of a block that has content."""
SESSION_PULLS_MAX = 16
SILENCE_S = 4.0
"""After so long without a byte a source is given up; a node looks each half second."""
GIVEN_UP_S = 8.0
"""With room for a busy machine, and less than what ends a pull whose source is not silent."""

OLD, NEW = b"old " * 1024, b"new " * 1024
GIVEN = b"give" * 1024


class Received(NamedTuple):
    """A frame."""

    kind: int
    status: int
    tag: int
    head: bytes
    payload: bytes


class Held(NamedTuple):
    """What PEEK tells of an image, and what a holder's requests name."""

    image: bytes
    epoch: int
    holder: bytes
    generation: int


def receive(connection: socket.socket) -> Received:
    """The next frame."""
    prefix = exactly(connection, 28)
    head_bytes, payload_bytes, _, kind, _, status, _, tag = struct.unpack("<IIIBBHIQ", prefix)
    head = exactly(connection, head_bytes)
    return Received(kind, status, tag, head, exactly(connection, payload_bytes))


def exactly(connection: socket.socket, size: int) -> bytes:
    """So many bytes."""
    data = b""
    while len(data) < size:
        piece = connection.recv(size - len(data))
        assert piece, "closed"
        data += piece
    return data


def checksum(data: bytes) -> int:
    """A block's."""
    return xxhash.xxh3_64_intdigest(data)


class Source:
    """A node of the cluster as another one meets it: it greets, and answers when it is told to."""

    def __init__(self, cluster: bytes, name: str) -> None:
        self._cluster = cluster
        self.name = name
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(10)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.peer: socket.socket | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        if self.peer is not None:
            self.peer.close()

    def greet(self, name: str) -> socket.socket:
        """Lets the node in, looks at its HELLO, and answers it under a name."""
        self.peer, _ = self._listener.accept()
        self.peer.settimeout(10)
        asked = receive(self.peer)
        versions = struct.pack("<HH", VERSION, VERSION)
        greeting = MAGIC + versions + self._cluster + text("node1") + text(self.name)
        assert (asked.kind, asked.head) == (HELLO, greeting)
        own = struct.pack("<16sQ16sQ", b"s" * 16, 1, b"b" * 16, 0)
        head = struct.pack("<H", VERSION) + text(name) + own
        self.peer.sendall(frame(HELLO | REPLY, head, tag=asked.tag))
        return self.peer

    def asked(self, held: Held, first_block: int) -> int:
        """The tag of the next PEER_FETCH, which must be of this one block."""
        peer = self.peer or self.greet(self.name)
        asked = receive(peer)
        range_ = struct.pack("<QQIQII", held.epoch, held.generation, LAYER, SHARD, first_block, 1)
        assert (asked.kind, asked.head) == (PEER_FETCH, held.image + range_)
        return asked.tag

    def give(self, tag: int, head: bytes, payload: bytes) -> None:
        """Answers a PEER_FETCH."""
        assert self.peer is not None
        self.peer.sendall(frame(PEER_FETCH | REPLY, head, payload, tag=tag))


def blocks_reply(held: Held, *checksums: int) -> bytes:
    """The head of an answer to PEER_FETCH: blocks of data with these checksums."""
    blocks = (struct.pack("<BQQQ", DATA, each, held.epoch, 1) for each in checksums)
    return struct.pack("<QI", held.generation, len(checksums)) + b"".join(blocks)


class Gateway:
    """The holder's session of an image with node1. Its requests have tags that count up."""

    def __init__(self, cluster: DevCluster, held: Held) -> None:
        self.held = held
        self._tag = 0
        self.connection = connect(cluster)
        self.connection.sendall(hello(cluster_id(cluster), "node1"))
        assert answer(self.connection) == (HELLO | REPLY, OK)
        head = held.image + struct.pack("<Q16s", held.epoch, held.holder)
        assert self.ask(ATTACH, head).status == OK

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def send(self, kind: int, head: bytes, payload: bytes = b"") -> int:
        """Sends a request; gives its tag."""
        self._tag += 1
        self.connection.sendall(frame(kind, head, payload, tag=self._tag, channel=CHANNEL))
        return self._tag

    def answered(self) -> tuple[int, int, int]:
        """Kind, status and tag of the next answer."""
        found = receive(self.connection)
        return found.kind, found.status, found.tag

    def ask(self, kind: int, head: bytes, payload: bytes = b"") -> Received:
        """Sends a request whose answer must be the next that comes."""
        tag = self.send(kind, head, payload)
        found = receive(self.connection)
        assert (found.kind, found.tag) == (kind | REPLY, tag)
        return found

    def pull(self, block: int, source: Source) -> int:
        """Orders a pull of one block; gives its tag."""
        held = self.held
        order = struct.pack("<QQIQII", held.epoch, held.generation, LAYER, SHARD, block, 1)
        return self.send(PULL, order + text(source.name) + text(source.address))

    def write(self, block: int, data: bytes) -> int:
        """Sends a write of one block; gives its tag."""
        return self.send(WRITE, self._io(block, 1) + struct.pack("<Q", checksum(data)), data)

    def written(self, block: int, data: bytes) -> None:
        """Writes one block."""
        tag = self.write(block, data)
        assert self.answered() == (WRITE | REPLY, OK, tag)

    def read(self, block: int) -> bytes:
        """Reads one block."""
        found = self.ask(READ, self._io(block, 0))
        assert found.status == OK
        return found.payload

    def _io(self, block: int, sequence: int) -> bytes:
        place = struct.pack("<QII", SHARD, block * BLOCK_BYTES, BLOCK_BYTES)
        return place + struct.pack("<QQQ", self.held.epoch, self.held.generation, sequence)


@pytest.fixture(scope="module")
def held(shared: DevCluster) -> Held:
    """An image that a gateway has opened and left: what it was, the tests go on as."""
    shared.create("pulled", "64M")
    with NbdSession(shared.url("pulled"), 1) as session:
        session.call("write", 0, 1, 1)
        session.call("flush")
    until("nobody holds it", lambda: shared.info("pulled")["open_on"] is None)
    image = bytes.fromhex(shared.info("pulled")["id"])
    with connect(shared) as connection:
        connection.sendall(hello(cluster_id(shared), "node1"))
        assert answer(connection) == (HELLO | REPLY, OK)
        no_parent = struct.pack("<II", 0, 0)
        connection.sendall(frame(PEEK, image + no_parent, channel=CHANNEL))
        found = receive(connection)
    assert (found.kind, found.status, found.head[:16]) == (PEEK | REPLY, OK, image)
    return Held(image, *struct.unpack("<Q16sQ", found.head[16:48]))


@pytest.fixture
def gateway(shared: DevCluster, held: Held) -> Iterator[Gateway]:
    """Its session."""
    with Gateway(shared, held) as found:
        yield found


@pytest.fixture
def source(shared: DevCluster) -> Iterator[Source]:
    """Another node, at an address of its own."""
    with Source(cluster_id(shared), "node3") as found:
        yield found


def test_pull_that_a_write_overtakes_is_cancelled_and_never_lands(
    gateway: Gateway, source: Source, held: Held
) -> None:
    gateway.written(7, OLD)
    pull = gateway.pull(7, source)
    late = source.asked(held, 7)
    write = gateway.write(7, NEW)
    assert gateway.answered() == (PULL | REPLY, CANCELLED, pull)
    assert gateway.answered() == (WRITE | REPLY, OK, write)
    source.give(late, blocks_reply(held, checksum(GIVEN)), GIVEN)
    # What was kept back is behind the node when what came after it is there.
    after = gateway.pull(8, source)
    source.give(source.asked(held, 8), blocks_reply(held, checksum(GIVEN)), GIVEN)
    assert gateway.answered() == (PULL | REPLY, OK, after)
    assert gateway.read(7) == NEW
    assert gateway.read(8) == GIVEN


def test_pull_of_a_silent_source_is_given_up(gateway: Gateway, source: Source, held: Held) -> None:
    gateway.written(9, OLD)
    began_s = time.monotonic()
    pull = gateway.pull(9, source)
    source.asked(held, 9)
    assert gateway.answered() == (PULL | REPLY, UNREACHABLE, pull)
    assert SILENCE_S <= time.monotonic() - began_s < GIVEN_UP_S
    assert source.peer is not None
    assert is_closed(source.peer)
    assert gateway.read(9) == OLD


def test_pulls_beyond_what_a_session_may_have_are_cancelled(
    gateway: Gateway, source: Source, held: Held
) -> None:
    first = 16
    blocks = range(first, first + SESSION_PULLS_MAX)
    pulls = [gateway.pull(block, source) for block in blocks]
    tags = [source.asked(held, block) for block in blocks]
    refused = gateway.pull(blocks.stop, source)
    assert gateway.answered() == (PULL | REPLY, CANCELLED, refused)
    for tag in tags:
        source.give(tag, blocks_reply(held, checksum(GIVEN)), GIVEN)
    answers = [gateway.answered() for _ in blocks]
    assert answers == [(PULL | REPLY, OK, pull) for pull in pulls]
    # There is room again, and nobody was asked for what was refused.
    again = gateway.pull(blocks.stop, source)
    source.give(source.asked(held, blocks.stop), blocks_reply(held, checksum(GIVEN)), GIVEN)
    assert gateway.answered() == (PULL | REPLY, OK, again)


@pytest.mark.parametrize(
    ("checksums", "payload"),
    [
        pytest.param([checksum(OLD)], GIVEN, id="damaged"),
        pytest.param([checksum(GIVEN)] * 2, GIVEN * 2, id="more blocks"),
        pytest.param([], b"", id="no block"),
        pytest.param([checksum(GIVEN)], GIVEN[:-1], id="less data"),
        pytest.param([checksum(GIVEN)], GIVEN * 2, id="more data"),
    ],
)
def test_pull_of_a_source_that_gives_something_else_applies_nothing(
    gateway: Gateway, source: Source, held: Held, checksums: list[int], payload: bytes
) -> None:
    gateway.written(10, OLD)
    pull = gateway.pull(10, source)
    source.give(source.asked(held, 10), blocks_reply(held, *checksums), payload)
    assert gateway.answered() == (PULL | REPLY, UNREACHABLE, pull)
    assert gateway.read(10) == OLD


def test_pull_of_a_source_that_is_another_node_asks_it_nothing(
    gateway: Gateway, source: Source
) -> None:
    gateway.written(11, OLD)
    pull = gateway.pull(11, source)
    peer = source.greet("node2")
    assert gateway.answered() == (PULL | REPLY, UNREACHABLE, pull)
    assert is_closed(peer)
    assert gateway.read(11) == OLD


def of_peer(image: bytes) -> bytes:
    """A PEER_FETCH of an image."""
    return frame(PEER_FETCH, image + struct.pack("<QQIQII", 1, 1, LAYER, SHARD, 0, 1))


def test_peer_fetch_on_a_gateways_connection_ends_it(shared: DevCluster, held: Held) -> None:
    with connect(shared) as connection:
        connection.sendall(hello(cluster_id(shared), "node1"))
        assert answer(connection) == (HELLO | REPLY, OK)
        connection.sendall(frame(PING, b""))
        assert answer(connection) == (PING | REPLY, OK)
        connection.sendall(of_peer(held.image))
        assert is_closed(connection)


def test_request_of_a_gateway_on_a_peers_connection_ends_it(shared: DevCluster) -> None:
    with connect(shared) as connection:
        connection.sendall(hello(cluster_id(shared), "node1"))
        assert answer(connection) == (HELLO | REPLY, OK)
        connection.sendall(of_peer(bytes(16)))
        assert answer(connection) == (PEER_FETCH | REPLY, NO_RECORD)
        connection.sendall(frame(PING, b""))
        assert is_closed(connection)
