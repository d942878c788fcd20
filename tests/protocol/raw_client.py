"""A raw NBD connection: says what it is told to, right or wrong.

For what no foreign client can be made to send, and for leaving out what every one of them does.
"""

import contextlib
import socket
import ssl
import struct
from typing import Self
from urllib.parse import parse_qs, unquote, urlsplit

IHAVEOPT = b"IHAVEOPT"
OPTION_REPLY_MAGIC = 0x0003E889045565A9
REQUEST_MAGIC = 0x25609513
EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO, EXTENDED_HEADERS = 1, 2, 3, 5, 6, 7, 11
READ, WRITE, DISCONNECT, FLUSH = 0, 1, 2, 3
PATIENCE_S = 30
"""A hang detector: how long any answer may take."""


class Client:
    """A raw connection that sends what it is told, right or wrong."""

    def __init__(self, uri: str) -> None:
        parts = urlsplit(uri)
        self.name = unquote(parts.path).removeprefix("/").encode()
        if parts.hostname is not None:
            self.socket = socket.create_connection((parts.hostname, parts.port), PATIENCE_S)
            return
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

    def start_tls(self, context: ssl.SSLContext, name: str = "127.0.0.1") -> Self:
        """Greets and goes on under TLS; raises what `ssl` says where that fails."""
        self.greet()
        self.option(STARTTLS)
        assert self.option_reply() == (STARTTLS, 1, b"")
        self.socket = context.wrap_socket(self.socket, server_hostname=name)
        return self

    def go(self) -> tuple[int, int]:
        """Opens the export, simple replies, where that is allowed: (reply type, flags)."""
        self.option(GO, struct.pack(">I", len(self.name)) + self.name + b"\0\0")
        flags = 0
        while True:
            _, kind, data = self.option_reply()
            if kind == 3:
                flags = struct.unpack(">HQH", data)[2]
            else:
                return kind, flags

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
