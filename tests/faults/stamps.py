"""Blocks that say what they are: which block, and which of its versions.

Pure, and imported both by the tests and by the agent that runs under the system's Python. A block
read back is one whole version, all zeroes, or damage; nothing in between passes.
"""

import hashlib
import struct

BLOCK_BYTES = 4096
ZEROES = 0
DAMAGED = -1

_HEADER = struct.Struct("<8sQQQ")
_MAGIC = b"HCISTAMP"


def stamp(seed: int, block: int, version: int) -> bytes:
    """The content of `block` in `version`, which is at least 1."""
    header = _HEADER.pack(_MAGIC, seed, block, version)
    return header + hashlib.shake_128(header).digest(BLOCK_BYTES - _HEADER.size)


def version_of(seed: int, block: int, content: bytes) -> int:
    """The version that `content` is, or ZEROES, or DAMAGED."""
    magic, _, _, version = _HEADER.unpack_from(content)
    if magic == _MAGIC and version > 0 and content == stamp(seed, block, version):
        return int(version)
    return ZEROES if content == bytes(BLOCK_BYTES) else DAMAGED
