"""Increments: files with what was written to an image between two of its snapshots.

The format is in docs/increment-format.md. A file is whole or it is refused: each record has a
digest of its own, and the end mark that of all before it.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import BinaryIO

from blake3 import blake3

from shard.errors import HciError

MAGIC = b"HCIINCR\n"
VERSION = 1
DATA_BYTES_MAX = 1 << 20
"""Most bytes of one record's content."""
HEADER_BYTES_MAX = 64 << 10
DIGEST_BYTES = 32

_PREFIX = struct.Struct("<8sII")
"""Magic, version, length of the header."""
_RECORD = struct.Struct("<BQQ")
"""Kind, offset, length. At the end: kind, number of records, bytes of content."""
_DATA, _ZERO, _END = 1, 2, 255


class BadIncrement(HciError):
    """A file is no whole increment; nothing was changed by it."""


@dataclass(frozen=True, slots=True)
class State:
    """A snapshot of the image that an increment was made of."""

    name: str
    generation: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself, before its records."""

    image: str
    image_id: str
    base: State
    target: State
    base_digest: str
    """BLAKE3, in hex, of what the base holds in the parts of all records that lie within it, in
    order."""


@dataclass(frozen=True, slots=True)
class Record:
    """A part that was written. Without content it reads as zeroes."""

    offset_bytes: int
    length_bytes: int
    content: bytes | None


class Writer:
    """Writes an increment: the header, records in order, and `finish`."""

    def __init__(self, file: BinaryIO, header: Header) -> None:
        self._file = file
        self._whole = blake3()
        self._records = self._bytes = 0
        text = json.dumps(asdict(header), ensure_ascii=False, sort_keys=True).encode()
        self._put(_PREFIX.pack(MAGIC, VERSION, len(text)) + text)

    def add(self, record: Record) -> None:
        """Write one record; data has DATA_BYTES_MAX at most."""
        content = record.content
        assert content is None or 0 < len(content) == record.length_bytes <= DATA_BYTES_MAX
        kind = _ZERO if content is None else _DATA
        head = _RECORD.pack(kind, record.offset_bytes, record.length_bytes)
        self._put(head + (content or b""))
        self._records += 1
        self._bytes += len(content or b"")

    def finish(self) -> None:
        """Write the end mark: without it the file is refused."""
        self._put(_RECORD.pack(_END, self._records, self._bytes))

    def _put(self, data: bytes) -> None:
        digest = blake3(data).digest()
        self._whole.update(data)
        self._whole.update(digest)
        self._file.write(data + digest)
        if data[0] == _END:
            self._file.write(self._whole.digest())


class Reader:
    """Reads an increment. Raises BadIncrement where anything of it is damaged, or missing."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name
        self._whole = blake3()
        prefix = file.read(_PREFIX.size)
        if len(prefix) < _PREFIX.size or not prefix.startswith(MAGIC):
            raise BadIncrement(f"{name} is no increment: `hci image export --from` makes them")
        _, version, length = _PREFIX.unpack(prefix)
        if version != VERSION:
            raise BadIncrement(f"{name} has version {version} of the format; known is {VERSION}")
        if length > HEADER_BYTES_MAX:
            raise self._damaged()
        text = self._take(length)
        self._verify(prefix + text)
        try:
            values = json.loads(text)
            base, target = State(**values.pop("base")), State(**values.pop("target"))
            self.header = Header(base=base, target=target, **values)
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged() from error

    def records(self) -> Iterator[Record]:
        """Yield the records in order, each verified; past the last one the end was verified."""
        count = size = end = 0
        while True:
            head = self._take(_RECORD.size)
            kind, offset, length = _RECORD.unpack(head)
            if kind == _END:
                self._verify(head)
                if (offset, length) != (count, size):
                    raise self._damaged()
                break
            if kind not in (_DATA, _ZERO) or (kind == _DATA and length > DATA_BYTES_MAX):
                raise self._damaged()
            content = self._take(length) if kind == _DATA else None
            self._verify(head + (content or b""))
            if length == 0 or offset < end or offset + length > self.header.target.size_bytes:
                raise self._damaged()
            count, size, end = count + 1, size + len(content or b""), offset + length
            yield Record(offset, length, content)
        if self._file.read(DIGEST_BYTES) != self._whole.digest() or self._file.read(1):
            raise self._damaged()

    def _verify(self, data: bytes) -> None:
        digest = self._take(DIGEST_BYTES)
        if blake3(data).digest() != digest:
            raise self._damaged()
        self._whole.update(data)
        self._whole.update(digest)

    def _take(self, length: int) -> bytes:
        data = self._file.read(length)
        if len(data) < length:
            raise BadIncrement(f"{self._name} is cut short; nothing was changed")
        return data

    def _damaged(self) -> BadIncrement:
        return BadIncrement(f"{self._name} is damaged; nothing was changed")
