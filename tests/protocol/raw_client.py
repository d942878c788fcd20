"""A raw NBD connection over a unix socket: says what it is told to, right or wrong.

For what no foreign client can be made to send, and for leaving out what every one of them does.
"""

import contextlib
import socket
import struct
from typing import Self
from urllib.parse import parse_qs, unquote, urlsplit

IHAVEOPT = b"IHAVEOPT"
OPTION_REPLY_MAGIC = 0x0003E889045565A9
REQUEST_MAGIC = 0x25609513
EXPORT_NAME, ABORT, LIST, INFO, GO, EXTENDED_HEADERS = 1, 2, 3, 6, 7, 11
READ, WRITE, DISCONNECT, FLUSH = 0, 1, 2, 3
PATIENCE_S = 30
"""A hang detector: how long any answer may take."""


class Client:
    """A raw connection that sends what it is told, right or wrong."""

    def __init__(self, uri: str) -> None:
        parts = urlsplit(uri)
        self.name = unquote(parts.path).removeprefix("/").encode()
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(PATIENCE_S)
        self.socket.connect(parse_qs(parts.query)["socket"][0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, *pieces: bytes) -> None:
        self.socket.sendall(b"".join(pieces))

    def receive(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            piece = self.socket.recv(length - len(data))
            if not piece:
                raise EOFError(f"the server closed after {len(data)} of {length} bytes")
            data += piece
        return data

    def ended(self) -> bool:
        """Whether the server closes the connection, whatever it says before."""
        with contextlib.suppress(ConnectionError):
            while self.socket.recv(65_536):
                pass
        return True

    def greet(self, flags: int = 3) -> None:
        assert self.receive(18) == b"NBDMAGIC" + IHAVEOPT + b"\0\3"
        self.send(struct.pack(">I", flags))

    def option(self, number: int, data: bytes = b"") -> None:
        self.send(IHAVEOPT, struct.pack(">II", number, len(data)), data)

    def option_reply(self) -> tuple[int, int, bytes]:
        magic, option, kind, length = struct.unpack(">QIII", self.receive(20))
        assert magic == OPTION_REPLY_MAGIC
        return option, kind, self.receive(length)

    def open(self) -> Self:
        """Goes to the transmission phase, with simple replies."""
        self.greet()
        self.option(EXPORT_NAME, self.name)
        self.receive(10)
        return self

    def request(
        self, command: int, cookie: int, offset: int = 0, length: int = 0, payload: bytes = b""
    ) -> None:
        header = struct.pack(">IHHQQI", REQUEST_MAGIC, 0, command, cookie, offset, length)
        self.send(header, payload)

    def reply(self) -> tuple[int, int]:
        """(errno, cookie) of a simple reply."""
        magic, errno, cookie = struct.unpack(">IIQ", self.receive(16))
        assert magic == 0x67446698
        return errno, cookie

    def write(self, offset: int, data: bytes) -> None:
        self.request(WRITE, 1, offset, len(data), data)
        assert self.reply() == (0, 1)

    def read(self, offset: int, length: int) -> bytes:
        self.request(READ, 2, offset, length)
        assert self.reply() == (0, 2)
        return self.receive(length)
