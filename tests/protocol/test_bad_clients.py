"""Clients that break the protocol or vanish: they lose their own connection at most.

Covers wrong magic numbers, garbage at every stage, options that are unknown, endless or cut off,
requests that are half sent or far too long, unknown commands, and clients that vanish with
requests in flight or without reading a reply. A well-behaved client reads and writes beside each of
them, and has to get on.
"""

import contextlib
import random
import socket
import struct
import time
from collections.abc import Callable, Iterator

import pytest

from tests.protocol.healthy_client import healthy_client
from tests.protocol.raw_client import (
    ABORT,
    DISCONNECT,
    EXPORT_NAME,
    GO,
    IHAVEOPT,
    READ,
    REQUEST_MAGIC,
    WRITE,
    Client,
)

GIB = 1 << 30
MIB = 1 << 20
EINVAL = 22


@pytest.fixture
def connect(nbd_uri: str) -> Callable[[], Client]:
    """Opens a raw connection to the export."""
    return lambda: Client(nbd_uri)


@pytest.fixture(autouse=True)
def healthy(nbd_uri: str) -> Iterator[None]:
    """A well-behaved client at work during the whole test, in the export's last MiB."""
    with healthy_client(nbd_uri, GIB - MIB + 123):
        yield


Connect = Callable[[], Client]


@pytest.mark.parametrize("flags", [4, 7, 0x80000000, 0xFFFFFFFF])
def test_bad_client_with_unknown_flags_is_closed(connect: Connect, flags: int) -> None:
    with connect() as client:
        client.greet(flags)
        assert client.ended()


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n\r\n" * 4, b"\0" * 64, b"\xff" * 64, b"NBDMAGIC" * 8]
)
def test_bad_client_with_wrong_option_magic_is_closed(connect: Connect, garbage: bytes) -> None:
    with connect() as client:
        client.greet()
        client.send(garbage)
        assert client.ended()


@pytest.mark.parametrize("number", [0, 4, 99, 0xFFFFFFFF])
def test_bad_client_with_unknown_options_is_told_and_may_go_on(
    connect: Connect, number: int
) -> None:
    with connect() as client:
        client.greet()
        client.option(number, b"what")
        assert client.option_reply()[:2] == (number, 0x80000001)
        client.option(EXPORT_NAME, client.name)
        client.receive(10)
        client.read(0, 1)


def test_bad_client_with_malformed_go_is_told_and_may_go_on(connect: Connect) -> None:
    with connect() as client:
        client.greet()
        for data in (b"\0\0\0\x10", struct.pack(">I", 0xFFFFFFFF) + b"x\0\0", b"\0\0\0\0\0\5"):
            client.option(GO, data)
            assert client.option_reply()[:2] == (GO, 0x80000003)
        client.option(ABORT)
        assert client.option_reply() == (ABORT, 1, b"")
        assert client.ended()


def test_bad_client_with_an_unknown_export_name_is_closed(connect: Connect) -> None:
    with connect() as client:
        client.greet()
        client.option(EXPORT_NAME, b"vms/not-there")
        assert client.ended()


def test_bad_client_with_an_endless_option_is_no_burden(connect: Connect) -> None:
    with connect() as client:
        client.greet()
        client.send(IHAVEOPT, struct.pack(">II", GO, 0xFFFFFFFF))
        # The server may close at once, or swallow it.
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                client.send(b"x" * MIB)


def test_bad_client_with_options_without_end_is_closed(connect: Connect) -> None:
    with connect() as client:
        client.greet()
        with contextlib.suppress(ConnectionError):
            client.send((IHAVEOPT + struct.pack(">II", 99, 0)) * 5000)
        assert client.ended()


@pytest.mark.parametrize("sent", [0, 1, 3, 4, 11, 20, 25])
def test_bad_client_that_vanishes_in_the_handshake_disturbs_nobody(
    connect: Connect, sent: int
) -> None:
    with connect() as client:
        words = struct.pack(">I", 3) + IHAVEOPT + struct.pack(">II", GO, 100) + b"\0" * 50
        client.send(words[:sent])


@pytest.mark.parametrize(
    "garbage", [b"\0" * 28, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n\r\n", b"\xff" * 100]
)
def test_bad_client_with_wrong_request_magic_is_closed(connect: Connect, garbage: bytes) -> None:
    with connect().open() as client:
        client.send(garbage)
        assert client.ended()


def test_bad_client_with_unknown_commands_is_told_and_may_go_on(connect: Connect) -> None:
    with connect().open() as client:
        for number in (8, 99, 0xFFFF):
            client.request(number, 77, 0, 0)
            assert client.reply() == (EINVAL, 77)
        client.read(0, 1)


def test_bad_client_with_a_write_too_long_is_told_and_may_go_on(connect: Connect) -> None:
    with connect().open() as client:
        client.write(0, b"kept")
        length = 100 * MIB
        client.request(WRITE, 5, 0, length)
        for _ in range(100):
            client.send(b"x" * MIB)
        errno, cookie = client.reply()
        assert cookie == 5
        assert errno != 0
        assert client.read(0, 4) == b"kept"


def test_bad_client_with_a_read_too_long_is_told_and_may_go_on(connect: Connect) -> None:
    with connect().open() as client:
        client.request(READ, 6, 0, 500 * MIB)
        errno, cookie = client.reply()
        assert cookie == 6
        assert errno != 0
        client.read(0, 1)


@pytest.mark.parametrize("sent", [1, 27, 28, 29, 28 + 4095, 28 + 65_535])
def test_bad_client_that_vanishes_within_a_write_changes_nothing(
    connect: Connect, sent: int
) -> None:
    with connect().open() as client:
        client.write(MIB, b"a" * 65_536)
    header = struct.pack(">IHHQQI", REQUEST_MAGIC, 0, WRITE, 7, MIB, 65_536)
    with connect().open() as client:
        client.send((header + b"b" * 65_536)[:sent])
    with connect().open() as client:
        assert client.read(MIB, 65_536) == b"a" * 65_536


def test_bad_client_that_vanishes_with_requests_in_flight_disturbs_nobody(
    connect: Connect,
) -> None:
    for _ in range(20):
        with connect().open() as client:
            for cookie in range(20):
                client.request(WRITE, cookie, 2 * MIB + cookie * 4096, 4096, b"c" * 4096)
                client.request(READ, cookie, cookie * MIB, 512)
    with connect().open() as client:
        client.read(0, 1)


def test_bad_client_that_resets_its_connection_disturbs_nobody(connect: Connect) -> None:
    for _ in range(20):
        with connect().open() as client:
            linger = struct.pack("ii", 1, 0)
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            client.request(READ, 1, 0, 8 * MIB)


def test_bad_client_that_never_reads_its_replies_disturbs_nobody(connect: Connect) -> None:
    with connect().open() as client:
        client.socket.settimeout(1)
        # The server stops reading at some point, or the client has said everything.
        with contextlib.suppress(TimeoutError):
            for cookie in range(500):
                client.request(READ, cookie, 0, 4 * MIB)
        time.sleep(0.5)


def test_bad_client_that_halves_every_request_is_served(connect: Connect) -> None:
    with connect().open() as client:
        data = random.Random(3).randbytes(3000)
        header = struct.pack(">IHHQQI", REQUEST_MAGIC, 0, WRITE, 9, 4 * MIB + 1, len(data))
        for byte in header + data[:200]:
            client.send(bytes([byte]))
        client.send(data[200:])
        assert client.reply() == (0, 9)
        assert client.read(4 * MIB + 1, 3000) == data


def test_bad_client_that_says_goodbye_with_requests_in_flight_gets_their_answers(
    connect: Connect,
) -> None:
    with connect().open() as client:
        for cookie in range(10):
            client.request(WRITE, cookie, 5 * MIB + cookie * 512, 512, b"d" * 512)
        client.request(DISCONNECT, 99)
        assert sorted(client.reply() for _ in range(10)) == [(0, cookie) for cookie in range(10)]
        assert client.ended()


def test_bad_clients_sending_random_bytes_disturb_nobody(connect: Connect) -> None:
    chance = random.Random(4)
    for _ in range(60):
        with connect() as client, contextlib.suppress(ConnectionError, EOFError):
            if chance.random() < 0.7:
                client.greet()
            if chance.random() < 0.5:
                client.option(EXPORT_NAME, client.name)
                client.receive(10)
            client.send(chance.randbytes(chance.randrange(1, 5000)))
