"""Shard files of a node, after docs/disk-format.md: bytes flip, and rot gets a valid checksum."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import xxhash

BLOCK_BYTES = 4096
SHARD_BYTES = 4 << 20
BLOCKS = SHARD_BYTES // BLOCK_BYTES
PAGE_BYTES = 4096
HEADER_BYTES = 72
CHECKSUM_BYTES = 8
TAG_BYTES = 20
DATA = 2

CRC32C_TABLE = []
for _byte in range(256):
    for _ in range(8):
        _byte = _byte >> 1 ^ (0x82F63B78 if _byte & 1 else 0)
    CRC32C_TABLE.append(_byte)


def crc32c(data: bytes) -> int:
    """RFC 3720, appendix B.4."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ CRC32C_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _slot_bytes() -> int:
    most = HEADER_BYTES + BLOCKS // 4 + (CHECKSUM_BYTES + TAG_BYTES) * BLOCKS
    return -(-most // PAGE_BYTES) * PAGE_BYTES


@dataclass(frozen=True)
class ShardFile:
    """The file of one shard of an image's first layer on one node."""

    path: Path
    shard: int

    def _newest_slot(self) -> tuple[int, bytes] | None:
        content = self.path.read_bytes()
        found = []
        for parity in (0, 1):
            offset = SHARD_BYTES + parity * _slot_bytes()
            header = content[offset : offset + HEADER_BYTES]
            if len(header) == HEADER_BYTES and header[:4] == b"HCSS":
                version, body_bytes = (
                    struct.unpack_from("<Q", header, 8)[0],
                    struct.unpack_from("<I", header, 56)[0],
                )
                slot = content[offset : offset + HEADER_BYTES + body_bytes]
                found.append((version, offset, slot))
        if not found:
            return None
        _, offset, slot = max(found)
        return offset, slot

    def data_blocks(self) -> list[int]:
        """Blocks whose content lies in this file, in order."""
        newest = self._newest_slot()
        if newest is None:
            return []
        states = newest[1][HEADER_BYTES : HEADER_BYTES + BLOCKS // 4]
        return [b for b in range(BLOCKS) if states[b // 4] >> b % 4 * 2 & 3 == DATA]

    def flip(self, block: int) -> None:
        """Inverts a byte in the midst of a block: its checksum no longer matches."""
        offset = block * BLOCK_BYTES + 1717
        with self.path.open("r+b") as file:
            file.seek(offset)
            byte = file.read(1)
            file.seek(offset)
            file.write(bytes([byte[0] ^ 0xFF]))

    def replace(self, block: int, content: bytes) -> None:
        """Gives a block other content and the checksum of that. The node must not run."""
        newest = self._newest_slot()
        assert newest is not None
        offset, slot = newest
        place = HEADER_BYTES + BLOCKS // 4 + CHECKSUM_BYTES * self.data_blocks().index(block)
        changed = bytearray(slot)
        struct.pack_into("<Q", changed, place, xxhash.xxh3_64_intdigest(content))
        struct.pack_into("<I", changed, 60, crc32c(bytes(changed[HEADER_BYTES:])))
        struct.pack_into("<I", changed, 68, crc32c(bytes(changed[:68])))
        with self.path.open("r+b") as file:
            file.seek(block * BLOCK_BYTES)
            file.write(content)
            file.seek(offset)
            file.write(changed)

    def spoil_metadata(self) -> None:
        """Damages both slots of metadata."""
        with self.path.open("r+b") as file:
            for parity in (0, 1):
                file.seek(SHARD_BYTES + parity * _slot_bytes() + 20)
                file.write(b"rotten")


def shard_files(data_dir: Path, image_id: str) -> dict[int, ShardFile]:
    """The files of an image on a node, by shard."""
    files = (data_dir / "images" / image_id / "1").glob("??/*")
    return {int(path.name, 16): ShardFile(path, int(path.name, 16)) for path in files}
