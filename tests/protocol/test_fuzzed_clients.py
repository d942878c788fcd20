"""A fuzzer on a real gateway: conversations that are almost right, through handshake and requests.

The engine's parsers are fuzzed by themselves (`engine/core/tests/fuzzed`, `engine/fuzz`); this goes
through everything behind them: the event loop, what Python makes of names, images that open and
close, requests that reach the nodes. Covers options and requests in simple, structured and extended
style with any flags, lengths and names, bytes that are changed, left out or put in, and streams
that are cut anywhere. The gateway has to live, to answer others, to forget the clients with all
that it kept for them, and to leave other images alone.
"""

import contextlib
import hashlib
import os
import socket
import struct
from collections.abc import Iterator
from random import Random

import pytest

from tests.devcluster import POOL, DevCluster
from tests.faults.load import drawn_seed
from tests.protocol.healthy_client import healthy_client
from tests.protocol.raw_client import (
    EXPORT_NAME,
    EXTENDED_HEADERS,
    GO,
    IHAVEOPT,
    PATIENCE_S,
    REQUEST_MAGIC,
    Client,
)
from tests.protocol.settings import GATEWAY, metric
from tests.waiting import until

MIB = 1 << 20
CONVERSATIONS = int(os.environ.get("HCI_FUZZ_ROUNDS", "300"))
EXTENDED_REQUEST_MAGIC = 0x21E41C71
STRUCTURED_REPLY, LIST_META_CONTEXT, SET_META_CONTEXT = 8, 9, 10
PAYLOAD = 1 << 5
# Of simple, structured and extended replies to requests.
REPLIES = tuple(bytes.fromhex(magic) for magic in ("67446698", "668e33ef", "6e8a278c"))
QUIET_S = 0.03
TARGET, OTHER, HEALTHY = "fuzzed", "untouched", "healthy"
NAMES = (
    *(f"{POOL}/{TARGET}", f"{POOL}/missing", f"{POOL}/", "", "/", f"{POOL}/../{TARGET}", POOL),
    *(f"{POOL}/{TARGET}/", f"none/{TARGET}", f"{POOL}/\u00e4\u65e5\U0001f4be", f"{POOL}/a@b"),
    *(f"{POOL}/line\nbreak", f"{POOL}/{'x' * 300}", f"{POOL}/{'y/' * 700}z", f"{POOL}/%s{{0}}"),
)
BAD_NAMES = (b"\xff\xfe", f"{POOL}/nul\0".encode(), b"\xed\xa0\x80", b"n" * 5000)


def counted(text: bytes) -> bytes:
    return struct.pack(">I", len(text)) + text


def name(chance: Random) -> bytes:
    kind = chance.random()
    if kind < 0.5:
        return NAMES[0].encode()
    return chance.choice(NAMES).encode() if kind < 0.9 else chance.choice(BAD_NAMES)


def option_data(number: int, chance: Random) -> bytes:
    """What belongs to an option, most of the time."""
    if chance.random() < 0.05:
        return chance.randbytes(chance.randrange(600))
    if number == EXPORT_NAME:
        return name(chance)
    if number in (GO, 6):
        wanted = [chance.randrange(6) for _ in range(chance.randrange(4))]
        return counted(name(chance)) + struct.pack(f">H{len(wanted)}H", len(wanted), *wanted)
    if number in (LIST_META_CONTEXT, SET_META_CONTEXT):
        queries = [b"base:", b"base:allocation", b"qemu:", b"qemu:allocation-depth", b"x:y", b""]
        chosen = chance.choices(queries, k=chance.randrange(4))
        return (
            counted(name(chance)) + struct.pack(">I", len(chosen)) + b"".join(map(counted, chosen))
        )
    return b""


def option(number: int, data: bytes) -> bytes:
    return IHAVEOPT + struct.pack(">II", number, len(data)) + data


def handshake(chance: Random, extended: bool) -> list[bytes]:
    pieces = [struct.pack(">I", chance.choice([0, 1, 2, 3, 3, 3, 3]))]
    numbers = [
        number for number in range(1, 13) if number not in (EXPORT_NAME, EXTENDED_HEADERS, 2)
    ]
    chosen = chance.choices(numbers, k=chance.randrange(5))
    pieces += [option(number, option_data(number, chance)) for number in chosen]
    if extended:
        pieces.append(option(EXTENDED_HEADERS, b""))
    elif chance.random() < 0.7:
        pieces.append(option(STRUCTURED_REPLY, b""))
    target = counted(NAMES[0].encode())
    if chance.random() < 0.7:
        query = counted(b"base:allocation") + counted(b"qemu:allocation-depth")
        pieces.append(option(SET_META_CONTEXT, target + struct.pack(">I", 2) + query))
    last = chance.random()
    if last < 0.8:
        pieces.append(option(GO, target + b"\0\0"))
    elif last < 0.95:
        pieces.append(option(EXPORT_NAME, NAMES[0].encode()))
    return pieces


def request(chance: Random, extended: bool) -> bytes:
    command = chance.choice([*range(8), 0, 1, 1, 4, 6, 7, chance.randrange(1 << 16)])
    # Most are right, so that what comes behind the check is reached.
    flags = chance.choice([0, 0, 0, 1, 2, 4, 8, 16, chance.randrange(1 << 16)])
    offset = chance.choice([0, 4095, chance.randrange(16 * MIB), chance.randrange(1 << 64)])
    length = chance.choice([0, 1, 4096, chance.randrange(200_000), chance.randrange(1 << 32)])
    if command == 3 and chance.random() < 0.8:
        offset = length = flags = 0
    writes = command == 1
    if extended and writes != bool(flags & PAYLOAD) and chance.random() < 0.9:
        flags ^= PAYLOAD
    follows = writes or (extended and bool(flags & PAYLOAD))
    payload = bytes(min(length, 300_000)) if follows else b""
    cookie = chance.randrange(1 << 64)
    if extended:
        head = struct.pack(
            ">IHHQQQ", EXTENDED_REQUEST_MAGIC, flags, command, cookie, offset, length
        )
    else:
        head = struct.pack(">IHHQQI", REQUEST_MAGIC, flags, command, cookie, offset, length)
    return head + payload


def damaged(data: bytes, chance: Random) -> bytes:
    """Bytes with one changed, some put in or left out, or the end cut off."""
    if not data:
        return data
    place = chance.randrange(len(data))
    kind = chance.randrange(4)
    if kind == 0:
        return data[:place] + bytes([chance.choice([0, 1, 0x7F, 0x80, 0xFF])]) + data[place + 1 :]
    if kind == 1:
        return data[:place] + chance.randbytes(chance.randrange(1, 9)) + data[place:]
    if kind == 2:
        return data[:place] + data[place + chance.randrange(1, 9) :]
    return data[:place]


def conversation(chance: Random) -> list[bytes]:
    """What a client says, in the pieces in which it sends it."""
    extended = chance.random() < 0.4
    pieces = handshake(chance, extended)
    pieces += [request(chance, extended) for _ in range(chance.randrange(12))]
    if chance.random() < 0.5:
        at = chance.randrange(len(pieces))
        pieces[at] = damaged(pieces[at], chance)
    if chance.random() < 0.3:
        return [b"".join(pieces)]
    return pieces


@pytest.fixture(scope="module")
def images(shared: DevCluster) -> None:
    """Those that the tests of this module share."""
    for image in (TARGET, HEALTHY):
        shared.create(image, "16M")


@pytest.fixture
def beside(shared: DevCluster, images: None) -> Iterator[str]:
    """A healthy client on an image of its own; the URI of the one that is fuzzed."""
    with healthy_client(shared.url(HEALTHY), 123):
        yield shared.url(TARGET)


def told(client: Client, pieces: list[bytes], chance: Random) -> bytes:
    """What a client is told that says this; it leaves when it hears no more, or before.

    Fails where the gateway does not close the connection of one that says no more.
    """
    heard = b""
    with contextlib.suppress(ConnectionError):
        for piece in pieces:
            client.send(piece)
        if chance.random() < 0.8:
            client.socket.settimeout(QUIET_S)
            with contextlib.suppress(TimeoutError):
                while data := client.socket.recv(1 << 20):
                    heard += data
            client.socket.settimeout(PATIENCE_S)
        if chance.random() < 0.8:
            client.socket.shutdown(socket.SHUT_WR)
            while data := client.socket.recv(1 << 20):
                heard += data
    return heard


def test_conversations_that_are_almost_right_harm_nobody(shared: DevCluster, beside: str) -> None:
    chance = Random(drawn_seed())
    shared.create(OTHER, "4M")
    content = Random(1).randbytes(4 * MIB)
    with Client(shared.url(OTHER)).open() as client:
        client.write(0, content)
    pid = shared.members()[GATEWAY]["pid"]
    served = 0
    for _ in range(CONVERSATIONS):
        with Client(beside) as client:
            said = told(client, conversation(chance), chance)
        served += any(magic in said for magic in REPLIES)
    # It was not all nonsense: requests were answered.
    assert served > CONVERSATIONS / 4
    assert shared.members()[GATEWAY]["pid"] == pid
    until("clients are forgotten", lambda: metric(shared, GATEWAY, "hci_gateway_clients") == 1)
    # The healthy client is there, and has something under way now and then.
    until(
        "nothing is kept for them",
        lambda: metric(shared, GATEWAY, "hci_gateway_bytes_in_flight") < 20_000,
    )
    with Client(shared.url(OTHER)).open() as client:
        found = client.read(0, 4 * MIB)
    assert hashlib.sha256(found).digest() == hashlib.sha256(content).digest()
    with Client(beside).open() as client:
        client.write(1, b"still written")
        assert client.read(1, 13) == b"still written"
    shared.must_be_equal(TARGET)


OTHER_NAMES = (*(each.encode() for each in NAMES[1:]), *BAD_NAMES)


@pytest.mark.parametrize("text", OTHER_NAMES, ids=range(len(OTHER_NAMES)))
def test_every_other_name_is_refused_and_the_connection_goes_on(beside: str, text: bytes) -> None:
    with Client(beside) as client:
        client.greet()
        client.option(GO, counted(text) + b"\0\0")
        _, kind, said = client.option_reply()
        # INVALID, UNKNOWN and TOO_BIG of the specification; the message is for a person.
        assert kind in (0x80000003, 0x80000006, 0x80000009), (hex(kind), said)
        assert len(said) <= 4096
        said.decode()
        client.option(GO, counted(client.name) + b"\0\0")
        while (kind := client.option_reply()[1]) == 3:
            pass
        assert kind == 1
