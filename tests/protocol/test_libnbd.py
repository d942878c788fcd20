"""libnbd's Python binding: what the tools do not send, and what exactly they are told.

Covers errors of requests past the end, requests of one byte and of gigabytes, DF and structured
chunks, block status with REQ_ONE, FAST_ZERO, simple replies, EXPORT_NAME without fixed newstyle,
listing, and the message for an unknown export. The binding belongs to the system's Python, so each
test hands a script to that one.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.protocol.newer_peers import WITH_NEWER

GIB = 1 << 30
BIG = 5 * GIB

pytestmark = WITH_NEWER

Run = Callable[..., str]
Libnbd = Callable[..., str]

# What every script starts with. `h` is not yet connected; strict mode is off, so that libnbd sends
# what it is told to.
PRELUDE = """
import errno, nbd, re, sys
from urllib.parse import unquote, urlsplit
URI = sys.argv[1]
NAME = unquote(urlsplit(URI).path)[1:]
h = nbd.NBD()
h.set_strict_mode(0)

def refused(call, *arguments):
    try:
        call(*arguments)
    except nbd.Error as error:
        return error.errno
    return None

def extents_of(count, offset, flags=0):
    found = []
    def extent(context, start, entries, error):
        assert (context, start) == ("base:allocation", offset)
        found.extend(zip(entries[::2], entries[1::2]))
    h.block_status(count, offset, extent, flags)
    return found

def chunks_of(count, offset, flags=0):
    found = []
    def chunk(data, start, status, error):
        found.append((start, len(data), status))
    data = h.pread_structured(count, offset, chunk, flags)
    return data, found
"""


@pytest.fixture
def libnbd(run: Run, tmp_path: Path) -> Libnbd:
    """Runs a script with the system's Python and libnbd on a URI; its asserts are the test's."""

    def run_script(uri: str, script: str) -> str:
        path = tmp_path / "script.py"
        path.write_text(PRELUDE + script)
        return run("python3", path, uri)

    return run_script


@pytest.fixture(scope="module")
def big_uri(new_export: Callable[[int], str]) -> str:
    """An export that is larger than a request's length can say."""
    return new_export(BIG)


def test_libnbd_flags_offer_every_command(libnbd: Libnbd, nbd_uri: str) -> None:
    libnbd(
        nbd_uri,
        """
h.connect_uri(URI)
assert not h.is_read_only() and not h.is_rotational()
assert h.can_flush() and h.can_fua() and h.can_trim() and h.can_zero()
assert h.can_fast_zero() and h.can_cache() and h.can_df()
assert h.get_structured_replies_negotiated()
assert h.get_size() >= 1 << 30
""",
    )


def test_libnbd_requests_past_the_end_are_refused_by_kind(libnbd: Libnbd, nbd_uri: str) -> None:
    libnbd(
        nbd_uri,
        """
h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.connect_uri(URI)
ignore = lambda *_: 0
for offset in (h.get_size() - 1, h.get_size(), (1 << 63) - 2):
    assert refused(h.pwrite, b"ab", offset) == "ENOSPC", offset
    assert refused(h.zero, 2, offset) == "ENOSPC", offset
    assert refused(h.pread, 2, offset) == "EINVAL", offset
    assert refused(h.trim, 2, offset) == "EINVAL", offset
    assert refused(h.cache, 2, offset) == "EINVAL", offset
    assert refused(h.block_status, 2, offset, ignore) == "EINVAL", offset
h.pwrite(b"z", h.get_size() - 1)
assert h.pread(1, h.get_size() - 1) == b"z"
""",
    )


def test_libnbd_requests_too_large_do_not_end_the_connection(libnbd: Libnbd, nbd_uri: str) -> None:
    libnbd(
        nbd_uri,
        """
h.connect_uri(URI)
most = h.get_block_size(nbd.SIZE_MAXIMUM)
assert most == 32 << 20
h.pwrite(b"kept", 0)
assert refused(h.pread, most + 1, 0) == "EINVAL"
assert refused(h.pwrite, bytes(most + 1), 0) == "EINVAL"
assert h.pread(4, 0) == b"kept"
h.pwrite(b"x" * most, 3)
assert h.pread(most, 3) == b"x" * most
""",
    )


def test_libnbd_zeroes_and_trims_of_gigabytes_succeed(libnbd: Libnbd, big_uri: str) -> None:
    libnbd(
        big_uri,
        """
h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.connect_uri(URI)
h.pwrite(b"a" * 8192, 4096)
h.pwrite(b"b" * 4096, 4 << 30)
most = (1 << 32) - 512
h.zero(most, 8192)
assert h.pread(8192, 4096) == b"a" * 4096 + bytes(4096)
assert h.pread(4096, 4 << 30) == bytes(4096)
h.pwrite(b"c" * 4096, 1 << 20)
h.trim(most, 0)
h.cache(4096, 0)
assert sum(length for length, _ in extents_of(most, 0)) > 0
h.pwrite(b"d", 5)
assert h.pread(1, 5) == b"d"
""",
    )


def test_libnbd_odd_lengths_change_only_their_bytes(libnbd: Libnbd, nbd_uri: str) -> None:
    libnbd(
        nbd_uri,
        """
import random
chance = random.Random(7)
h.connect_uri(URI)
SPAN = 40_000
mirror = bytearray(SPAN)
h.zero(SPAN, 0)
for step in range(400):
    offset = chance.randrange(SPAN)
    length = min(SPAN - offset, chance.choice([1, 2, 511, 513, 4095, 4096, 4097, 9000]))
    what = chance.randrange(6)
    flags = nbd.CMD_FLAG_FUA if chance.random() < 0.1 else 0
    if what == 0:
        h.zero(length, offset, flags | chance.choice([0, nbd.CMD_FLAG_NO_HOLE]))
        mirror[offset:offset + length] = bytes(length)
    elif what == 1:
        assert h.pread(length, offset) == mirror[offset:offset + length], (step, offset, length)
    else:
        data = chance.randbytes(length)
        h.pwrite(data, offset, flags)
        mirror[offset:offset + length] = data
assert h.pread(SPAN, 0) == mirror
""",
    )


def test_libnbd_requests_of_no_bytes_do_not_end_the_connection(
    libnbd: Libnbd, nbd_uri: str
) -> None:
    libnbd(
        nbd_uri,
        """
h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.connect_uri(URI)
# The specification leaves open what they do.
for call in (h.pread, h.trim, h.zero, h.cache):
    refused(call, 0, 0)
refused(h.pwrite, b"", 0)
assert refused(h.block_status, 0, 0, lambda *_: 0) == "EINVAL"
h.flush()
""",
    )


def test_libnbd_unknown_flags_are_refused(libnbd: Libnbd, nbd_uri: str) -> None:
    libnbd(
        nbd_uri,
        """
h.connect_uri(URI)
assert refused(h.pread, 1, 0, nbd.CMD_FLAG_NO_HOLE) == "EINVAL"
assert refused(h.pwrite, b"x", 0, nbd.CMD_FLAG_DF) == "EINVAL"
assert refused(h.trim, 1, 0, nbd.CMD_FLAG_FAST_ZERO) == "EINVAL"
assert refused(h.zero, 1, 0, nbd.CMD_FLAG_REQ_ONE) == "EINVAL"
h.pwrite(b"x", 0)
""",
    )


def test_libnbd_structured_read_chunks_cover_the_request(libnbd: Libnbd, nbd_uri: str) -> None:
    libnbd(
        nbd_uri,
        """
h.connect_uri(URI)
M = 1 << 20
h.trim(8 * M, 8 * M)
h.zero(8 * M, 8 * M)
h.pwrite(b"q" * M, 10 * M)
data, chunks = chunks_of(8 * M, 8 * M)
assert data == bytes(2 * M) + b"q" * M + bytes(5 * M)
at = 8 * M
for start, length, status in sorted(chunks):
    assert start == at and length > 0 and status in (nbd.READ_DATA, nbd.READ_HOLE)
    at += length
assert at == 16 * M
data, chunks = chunks_of(8 * M, 8 * M, nbd.CMD_FLAG_DF)
assert data == bytes(2 * M) + b"q" * M + bytes(5 * M)
assert chunks == [(8 * M, 8 * M, nbd.READ_DATA)]
""",
    )


def test_libnbd_block_status_describes_data_and_holes(libnbd: Libnbd, nbd_uri: str) -> None:
    libnbd(
        nbd_uri,
        """
h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.connect_uri(URI)
assert h.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
M = 1 << 20
h.zero(32 * M, 32 * M)
h.trim(32 * M, 32 * M)
h.pwrite(b"s" * M, 40 * M)
described, at = {}, 32 * M
while at < 64 * M:
    for length, flags in extents_of(64 * M - at, at):
        assert length > 0
        described.update((place, flags) for place in range(at // M, (at + length) // M))
        at += length
assert described[40] == 0
one = extents_of(32 * M, 32 * M, nbd.CMD_FLAG_REQ_ONE)
assert len(one) == 1 and one[0][0] <= 32 * M
assert extents_of(1, 40 * M + 1, nbd.CMD_FLAG_REQ_ONE) == [(1, 0)]
""",
    )


def test_libnbd_block_status_without_its_context_is_refused(libnbd: Libnbd, nbd_uri: str) -> None:
    libnbd(
        nbd_uri,
        """
h.connect_uri(URI)
assert refused(h.block_status, 4096, 0, lambda *_: 0) is not None
h.pwrite(b"t", 0)
assert h.pread(1, 0) == b"t"
""",
    )


def test_libnbd_simple_replies_carry_the_same_bytes(libnbd: Libnbd, nbd_uri: str) -> None:
    libnbd(
        nbd_uri,
        """
h.set_request_structured_replies(False)
h.connect_uri(URI)
assert not h.get_structured_replies_negotiated() and not h.can_df()
h.zero(1 << 20, 0)
h.pwrite(b"simple", 4093)
assert h.pread(1 << 20, 0) == bytes(4093) + b"simple" + bytes((1 << 20) - 4099)
assert refused(h.pread, 2, h.get_size() - 1) == "EINVAL"
assert h.pread(6, 4093) == b"simple"
""",
    )


@pytest.mark.parametrize("flags", ["0", "nbd.HANDSHAKE_FLAG_NO_ZEROES"])
def test_libnbd_without_fixed_newstyle_opens_by_export_name(
    libnbd: Libnbd, nbd_uri: str, flags: str
) -> None:
    libnbd(
        nbd_uri,
        f"""
h.set_handshake_flags({flags})
h.connect_uri(URI)
assert h.get_protocol() == "newstyle"
h.pwrite(b"old", 77)
assert h.pread(3, 77) == b"old"
""",
    )


def test_libnbd_lists_exports_and_opens_one_afterwards(libnbd: Libnbd, nbd_uri: str) -> None:
    libnbd(
        nbd_uri,
        """
h.set_opt_mode(True)
h.connect_uri(URI)
names = []
h.opt_list(lambda name, description: names.append(name))
assert NAME in names, names
contexts = []
h.add_meta_context("base:")
h.opt_list_meta_context(contexts.append)
assert contexts == ["base:allocation"]
h.opt_info()
assert h.get_size() >= 1 << 30
h.opt_go()
h.pwrite(b"u", 0)
""",
    )


def test_libnbd_unknown_export_is_refused_and_another_may_be_asked_for(
    libnbd: Libnbd, nbd_uri: str
) -> None:
    libnbd(
        nbd_uri,
        """
said = []
h.set_debug(True)
h.set_debug_callback(lambda where, message: said.append(message))
h.set_opt_mode(True)
h.connect_uri(URI)
h.set_export_name("vms/not-there")
assert refused(h.opt_info) == "ENOENT"
assert refused(h.opt_go) == "ENOENT"
# The second is how 1.22 says it. Its own words have the name too.
servers = re.compile("(server error message|has no export named '[^']*'): .*vms/not-there")
assert len([text for text in said if servers.search(text)]) == 2, said
h.set_export_name(NAME)
h.opt_go()
assert h.get_size() >= 1 << 30
""",
    )


def test_libnbd_many_requests_in_flight_are_all_answered(libnbd: Libnbd, nbd_uri: str) -> None:
    libnbd(
        nbd_uri,
        """
h.connect_uri(URI)
def finish(cookies):
    while h.aio_in_flight():
        h.poll(-1)
    assert all(h.aio_command_completed(cookie) for cookie in cookies)
buffers = [nbd.Buffer.from_bytearray(bytearray([i % 251]) * 5000) for i in range(1000)]
finish([h.aio_pwrite(buffer, i * 5000) for i, buffer in enumerate(buffers)])
h.flush()
found = [nbd.Buffer(5000) for _ in buffers]
finish([h.aio_pread(buffer, i * 5000) for i, buffer in enumerate(found)])
for i, buffer in enumerate(found):
    assert buffer.to_bytearray() == bytes([i % 251]) * 5000, i
""",
    )


def test_libnbd_flush_on_one_connection_makes_writes_visible_on_another(
    libnbd: Libnbd, nbd_uri: str
) -> None:
    libnbd(
        nbd_uri,
        """
other = nbd.NBD()
h.connect_uri(URI)
other.connect_uri(URI)
h.pwrite(b"v" * 10_000, 1)
h.flush()
assert other.pread(10_000, 1) == b"v" * 10_000
other.pwrite(b"w", 2)
assert h.pread(3, 1) == b"vwv"
other.shutdown()
assert h.pread(3, 1) == b"vwv"
""",
    )
