"""ovirt-imageio's NBD client, with which oVirt reads and writes disks.

Covers its handshake (structured replies, `base:allocation` and `qemu:allocation-depth` together),
reads into its buffers, zeroes with and without holes, extents, and what it makes of errors.
"""

import random
from collections.abc import Callable, Iterator
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from ovirt_imageio._internal import nbd

MIB = 1 << 20
SIZE = 64 * MIB


@pytest.fixture
def client(new_export: Callable[[int], str]) -> Iterator[nbd.Client]:
    parts = urlsplit(new_export(SIZE))
    address = nbd.UnixAddress(parse_qs(parts.query)["socket"][0])
    opened = nbd.Client(address, unquote(parts.path)[1:])
    try:
        yield opened
    finally:
        opened.close()


def extents(client: nbd.Client, context: str, offset: int, length: int) -> list[tuple[int, int]]:
    """Length and flags of what a context says of a range, however many answers it takes."""
    found: list[tuple[int, int]] = []
    at = offset
    while at < offset + length:
        for extent in client.extents(at, offset + length - at)[context]:
            found.append((extent.length, extent.flags))
            at += extent.length
    return found


def test_imageio_sees_the_export_and_both_contexts(client: nbd.Client) -> None:
    assert client.export_size == SIZE
    assert client.minimum_block_size == 1
    assert client.maximum_block_size == 32 * MIB
    assert client.has_base_allocation
    assert client.has_allocation_depth


def test_imageio_reads_back_what_it_wrote_and_zeroed(client: nbd.Client) -> None:
    chance = random.Random(31)
    mirror = bytearray(8 * MIB)
    for _ in range(100):
        length = chance.randrange(1, 200_000)
        offset = chance.randrange(len(mirror) - length)
        content = chance.choice([chance.randbytes(length), bytes(length)])
        if content[0:1] == b"\0":
            client.zero(offset, length, punch_hole=chance.random() < 0.5)
            content = bytes(length)
        else:
            client.write(offset, content)
        mirror[offset : offset + length] = content
    client.flush()
    assert client.read(0, len(mirror)) == mirror
    buffer = bytearray(5000)
    client.readinto(123, buffer)
    assert buffer == mirror[123:5123]


def test_imageio_extents_tell_data_from_holes(client: nbd.Client) -> None:
    client.write(4 * MIB, b"d" * MIB)
    client.zero(8 * MIB, MIB, punch_hole=False)
    data, zero, hole = (MIB, 0), (MIB, 2), 3
    assert extents(client, "base:allocation", 0, 16 * MIB) == [
        (4 * MIB, hole),
        data,
        (3 * MIB, hole),
        zero,
        (7 * MIB, hole),
    ]
    # It turns a depth of 0 into a flag of its own, and no other depth into any.
    backing = nbd.EXTENT_BACKING
    depths = extents(client, "qemu:allocation-depth", 0, 16 * MIB)
    assert depths == [
        (4 * MIB, backing),
        (MIB, 0),
        (3 * MIB, backing),
        (MIB, 0),
        (7 * MIB, backing),
    ]


def test_imageio_gets_errors_it_understands(client: nbd.Client) -> None:
    with pytest.raises(nbd.ReplyError):
        client.read(SIZE - 1, 2)
    with pytest.raises(nbd.ReplyError):
        client.write(SIZE - 1, b"ab")
    assert client.read(SIZE - 1, 1) == b"\0"
