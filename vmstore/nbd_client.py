"""`NbdClient`: a client of the gateways' own NBD exports, for what other tools do not ask.

It speaks the fixed newstyle handshake with extended headers (NBD: doc/proto.md and its
branch extension-ext-header), one request at a time, over a gateway's unix socket.
"""

import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from shard.errors import HciError

NBDMAGIC, IHAVEOPT, OPTION_REPLY = 0x4E42444D41474943, 0x49484156454F5054, 0x3E889045565A9
REQUEST, REPLY = 0x21E41C71, 0x6E8A278C
"""Of extended headers."""
FIXED_NEWSTYLE_NO_ZEROES = 3

OPT_GO, OPT_SET_META_CONTEXT, OPT_EXTENDED_HEADERS = 7, 10, 11
REP_ACK, REP_INFO, REP_META_CONTEXT, REP_ERROR = 1, 3, 4, 1 << 31
INFO_EXPORT = 0

READ, WRITE, DISCONNECT, FLUSH, WRITE_ZEROES, BLOCK_STATUS = 0, 1, 2, 3, 6, 7
COMMAND_PAYLOAD = 1 << 5
FLAG_DONE = 1
CHUNK_NONE, CHUNK_DATA, CHUNK_HOLE, CHUNK_STATUS, CHUNK_ERROR = 0, 1, 2, 6, 32769

BASE_ALLOCATION = "base:allocation"
DIRTY_BITMAP = "qemu:dirty-bitmap:"
STATE_ZERO = 2
STATE_DIRTY = 1

READ_BYTES_MAX = 32 << 20
"""Most bytes of one read or write."""

TIMEOUT_S = 60.0
"""How long a gateway may be silent: an image that waits for its nodes does not answer."""


class NbdFailed(HciError):
    """A gateway did not do what it was asked over NBD; the message has its reason."""


class NbdClient:
    """One export at a gateway's socket, with metadata contexts selected. A context manager.

    Raises NbdFailed where the export does not open, or has not all of these contexts.
    """

    def __init__(self, path: Path, export: str, contexts: Sequence[str] = ()) -> None:
        self.export = export
        self.size_bytes = 0
        self._cookie = 0
        self._contexts: dict[int, str] = {}
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(TIMEOUT_S)
            self._socket.connect(str(path))
            self._open(contexts)
        except OSError as error:
            self._socket.close()
            raise NbdFailed(f"{export}: the gateway at {path} does not answer: {error}") from error
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> "NbdClient":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._ask(DISCONNECT, 0, 0)
        except NbdFailed:
            pass
        finally:
            self._socket.close()

    def status(self, offset: int, length: int) -> dict[str, list[tuple[int, int]]]:
        """Return (length in bytes, flags) of the extents from `offset` on, by context.

        They may end before `length`, at least one of each context is there; ask on from its end.
        """
        found: dict[str, list[tuple[int, int]]] = {}
        for kind, payload in self._chunks(self._ask(BLOCK_STATUS, offset, length)):
            if kind != CHUNK_STATUS:
                raise NbdFailed(f"{self.export}: the gateway answered with chunk {kind}")
            context, _count = struct.unpack_from(">II", payload)
            extents = struct.iter_unpack(">QQ", payload[8:])
            found[self._contexts[context]] = [(size, flags) for size, flags in extents]
        return found

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes, at most READ_BYTES_MAX."""
        content = bytearray(length)
        for kind, payload in self._chunks(self._ask(READ, offset, length)):
            if kind == CHUNK_DATA:
                at = struct.unpack_from(">Q", payload)[0] - offset
                content[at : at + len(payload) - 8] = payload[8:]
            elif kind != CHUNK_HOLE:
                raise NbdFailed(f"{self.export}: the gateway answered with chunk {kind}")
        return bytes(content)

    def write(self, offset: int, content: bytes) -> None:
        """Write at most READ_BYTES_MAX bytes; durable with the next flush."""
        self._chunks(self._ask(WRITE, offset, len(content), content))

    def zero(self, offset: int, length: int) -> None:
        """Have a part read as zeroes that take no space."""
        self._chunks(self._ask(WRITE_ZEROES, offset, length))

    def flush(self) -> None:
        """Return when all that was written is durable."""
        self._chunks(self._ask(FLUSH, 0, 0))

    # Handshake

    def _open(self, contexts: Sequence[str]) -> None:
        magic, option_magic, _flags = struct.unpack(">QQH", self._receive(18))
        if (magic, option_magic) != (NBDMAGIC, IHAVEOPT):
            raise NbdFailed(f"{self.export}: what answers there is no gateway")
        self._send(struct.pack(">I", FIXED_NEWSTYLE_NO_ZEROES))
        self._option(OPT_EXTENDED_HEADERS, b"")
        if contexts:
            queries = b"".join(map(_counted, contexts))
            data = _counted(self.export) + struct.pack(">I", len(contexts)) + queries
            for kind, payload in self._option(OPT_SET_META_CONTEXT, data):
                if kind == REP_META_CONTEXT:
                    self._contexts[struct.unpack_from(">I", payload)[0]] = payload[4:].decode()
        missing = set(contexts) - set(self._contexts.values())
        if missing:
            raise NbdFailed(f"{self.export} has no {', '.join(sorted(missing))}")
        for kind, payload in self._option(OPT_GO, _counted(self.export) + struct.pack(">H", 0)):
            if kind == REP_INFO and struct.unpack_from(">H", payload)[0] == INFO_EXPORT:
                self.size_bytes = struct.unpack_from(">HQ", payload)[1]

    def _option(self, option: int, data: bytes) -> list[tuple[int, bytes]]:
        """Return the replies to an option, up to its end. Raises NbdFailed where it is refused."""
        self._send(struct.pack(">QII", IHAVEOPT, option, len(data)) + data)
        replies: list[tuple[int, bytes]] = []
        while True:
            magic, _option, kind, length = struct.unpack(">QIII", self._receive(20))
            payload = self._receive(length)
            if magic != OPTION_REPLY:
                raise NbdFailed(f"{self.export}: the gateway answered what is no NBD")
            if kind == REP_ACK:
                return replies
            if kind & REP_ERROR:
                raise NbdFailed(payload.decode("utf-8", "replace"))
            replies.append((kind, payload))

    # Requests

    def _ask(self, command: int, offset: int, length: int, payload: bytes = b"") -> int:
        self._cookie += 1
        flags = COMMAND_PAYLOAD if payload else 0
        head = struct.pack(">IHHQQQ", REQUEST, flags, command, self._cookie, offset, length)
        self._send(head + payload)
        return self._cookie

    def _chunks(self, cookie: int) -> list[tuple[int, bytes]]:
        """Return the chunks of an answer that have something in them."""
        chunks = []
        while True:
            header = struct.unpack(">IHHQQQ", self._receive(32))
            magic, flags, kind, answered, _offset, length = header
            if magic != REPLY or answered != cookie:
                raise NbdFailed(f"{self.export}: the gateway answered what was not asked")
            payload = self._receive(length)
            if kind == CHUNK_ERROR:
                why = payload[6:].decode("utf-8", "replace")
                raise NbdFailed(f"{self.export}: {why}")
            if kind != CHUNK_NONE:
                chunks.append((kind, payload))
            if flags & FLAG_DONE:
                return chunks

    # Bytes

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise NbdFailed(f"{self.export}: the gateway has gone: {error}") from error

    def _receive(self, length: int) -> bytes:
        content = bytearray(length)
        view, got = memoryview(content), 0
        while got < length:
            try:
                count = self._socket.recv_into(view[got:])
            except OSError as error:
                raise NbdFailed(f"{self.export}: the gateway has gone: {error}") from error
            if count == 0:
                raise NbdFailed(f"{self.export}: the gateway has ended the connection")
            got += count
        return bytes(content)


def _counted(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack(">I", len(encoded)) + encoded
