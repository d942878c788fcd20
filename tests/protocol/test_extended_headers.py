"""Extended headers: requests and answers with lengths of 64 bits.

By hand, since the libnbd and QEMU of Debian 12 do not ask for them yet (`test_newer_peers.py` has
some that do). Covers the handshake, zeroes, trims and block status of more than 4 GiB in one
request, both metadata contexts at once, payloads where none belong, writes that do not say that
they have one, and errors.
"""

import struct
from collections.abc import Callable, Iterator

import pytest

from tests.protocol.raw_client import EXTENDED_HEADERS, GO, READ, WRITE, Client

GIB = 1 << 30
SIZE = 6 * GIB
SET_META_CONTEXT = 10
TRIM, WRITE_ZEROES, BLOCK_STATUS, FLUSH = 4, 6, 7, 3
PAYLOAD, DF, REQ_ONE = 1 << 5, 1 << 2, 1 << 3
EINVAL, ENOSPC = 22, 28
DONE = 1
NOTHING, DATA, HOLE, STATUS, ERROR = 0, 1, 2, 6, 0x8001
Chunk = tuple[int, int, bytes]


class ExtendedClient(Client):
    """A client that asks for extended headers, `base:allocation` and `qemu:allocation-depth`."""

    def open(self) -> "ExtendedClient":
        self.greet()
        self.option(EXTENDED_HEADERS)
        assert self.option_reply() == (EXTENDED_HEADERS, 1, b"")
        name = struct.pack(">I", len(self.name)) + self.name
        contexts = [b"base:allocation", b"qemu:allocation-depth"]
        queries = b"".join(struct.pack(">I", len(text)) + text for text in contexts)
        self.option(SET_META_CONTEXT, name + struct.pack(">I", 2) + queries)
        self.ids = []
        while (reply := self.option_reply())[1] == 4:
            self.ids.append(struct.unpack(">I", reply[2][:4])[0])
        assert len(self.ids) == 2
        self.option(GO, name + b"\0\0")
        while self.option_reply()[1] == 3:
            pass
        return self

    def ask(
        self, command: int, offset: int, length: int, flags: int = 0, payload: bytes = b""
    ) -> list[Chunk]:
        """Sends a request, and returns the chunks of its answer: (flags, type, payload)."""
        cookie = 0x1234_5678_9ABC_DEF0 + command
        self.send(
            struct.pack(">IHHQQQ", 0x21E41C71, flags, command, cookie, offset, length), payload
        )
        chunks: list[Chunk] = []
        while not chunks or not chunks[-1][0] & DONE:
            magic, said, kind, found, at, bytes_ = struct.unpack(">IHHQQQ", self.receive(32))
            assert (magic, found, at) == (0x6E8A278C, cookie, offset)
            chunks.append((said, kind, self.receive(bytes_)))
        return chunks

    def errno(self, *request: int, payload: bytes = b"") -> int:
        ((_, kind, told),) = self.ask(*request, payload=payload)
        assert kind in (ERROR, NOTHING)
        return int.from_bytes(told[:4], "big") if kind == ERROR else 0

    def extents(self, offset: int, length: int, flags: int = 0) -> list[list[tuple[int, int]]]:
        """What each context says: lengths and flags."""
        found = []
        chunks = self.ask(BLOCK_STATUS, offset, length, flags)
        assert [kind for _, kind, _ in chunks] == [STATUS, STATUS]
        for id_, (_, _, told) in zip(self.ids, chunks, strict=True):
            context, count = struct.unpack(">II", told[:8])
            assert context == id_
            assert len(told) == 8 + 16 * count
            found.append(list(struct.iter_unpack(">QQ", told[8:])))
        return found


@pytest.fixture
def client(new_export: Callable[[int], str]) -> Iterator[ExtendedClient]:
    with ExtendedClient(new_export(SIZE)) as client:
        yield client.open()


def test_extended_write_and_read_are_equal(client: ExtendedClient) -> None:
    assert client.errno(WRITE, 4095, 10, PAYLOAD, payload=b"0123456789") == 0
    assert client.errno(FLUSH, 0, 0) == 0
    ((_, kind, told),) = client.ask(READ, 4090, 20, DF)
    assert kind == DATA
    assert told == struct.pack(">Q", 4090) + bytes(5) + b"0123456789" + bytes(5)
    assert [kind for _, kind, _ in client.ask(READ, GIB, 4096)] == [HOLE]


def test_extended_write_that_does_not_say_that_it_has_a_payload_is_taken(
    client: ExtendedClient,
) -> None:
    # QEMU does not say so (seen with 10.0). Its guests could not write.
    assert client.errno(WRITE, 4095, 10, payload=b"0123456789") == 0
    assert client.ask(READ, 4095, 10, DF)[0][2][8:] == b"0123456789"


def test_extended_zeroes_and_trims_of_gigabytes_take_one_request(client: ExtendedClient) -> None:
    places = [0, GIB - 2, 3 * GIB + 5, 5 * GIB - 1, 6 * GIB - 7]
    for command in (WRITE_ZEROES, TRIM):
        for place in places:
            assert client.errno(WRITE, place, 7, PAYLOAD, payload=b"content") == 0
        assert client.errno(command, 0, SIZE) == 0
        for place in places:
            assert all(kind == HOLE for _, kind, _ in client.ask(READ, place, 7)), place
    assert client.errno(WRITE, 0, 2, PAYLOAD, payload=b"ab") == 0
    assert client.errno(WRITE_ZEROES, 1, SIZE - 1) == 0
    assert client.ask(READ, 0, 2, DF)[0][2][8:] == b"a\0"


def test_extended_block_status_describes_gigabytes_at_once(client: ExtendedClient) -> None:
    assert client.errno(WRITE, 5 * GIB, 4096, PAYLOAD, payload=bytes(4095) + b"x") == 0
    allocation, depth = client.extents(0, SIZE)
    rest = GIB - 4096
    assert allocation == [(5 * GIB, 3), (4096, 0), (rest, 3)]
    assert depth == [(5 * GIB, 0), (4096, 1), (rest, 0)]
    assert client.extents(0, SIZE, REQ_ONE) == [[(5 * GIB, 3)], [(5 * GIB, 0)]]
    assert client.extents(5 * GIB + 1, 1, REQ_ONE) == [[(1, 0)], [(1, 1)]]


def test_extended_mistakes_are_answered_and_the_connection_goes_on(client: ExtendedClient) -> None:
    assert client.errno(READ, 0, 1 << 40) == EINVAL
    assert client.errno(READ, 0, 4, PAYLOAD, payload=b"what") == EINVAL
    assert client.errno(BLOCK_STATUS, 0, 12, PAYLOAD, payload=bytes(12)) == EINVAL
    assert client.errno(WRITE, SIZE - 1, 2, PAYLOAD, payload=b"ab") == ENOSPC
    assert client.errno(WRITE_ZEROES, GIB, SIZE) == ENOSPC
    assert client.errno(TRIM, GIB, SIZE) == EINVAL
    assert client.errno(WRITE_ZEROES, 1, (1 << 64) - 1) == ENOSPC
    assert client.errno(WRITE, 0, 40 << 20, PAYLOAD, payload=bytes(40 << 20)) == EINVAL
    assert client.errno(WRITE, 0, 2, PAYLOAD, payload=b"ok") == 0


def test_extended_headers_and_export_name_do_not_go_together(
    new_export: Callable[[int], str],
) -> None:
    with Client(new_export(GIB)) as client:
        client.greet()
        client.option(EXTENDED_HEADERS)
        assert client.option_reply()[1] == 1
        client.option(1, client.name)
        assert client.ended()
