"""Sizes and limits of images, and how an image's bytes are cut into shards.

The same limits stand in the engine (`engine/core/src/geometry.rs`), which cannot be asked before
an image exists.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from shard.errors import BadSize

BLOCK_BYTES = 4096
"""The unit of checksum, presence and changed-block tracking."""

SECTOR_BYTES = 512
"""Image sizes are multiples of this."""

SHARD_BYTES_MIN = 1 << 20
SHARD_BYTES_MAX = 64 << 20
SHARD_BYTES_DEFAULT = 4 << 20

IMAGE_BYTES_MAX = 256 << 40
"""Size limit of an image: 256 TiB."""

_SUFFIXES = {"": 0, "b": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5, "e": 6}
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_SIZE = re.compile(r"([0-9]+)(\.[0-9]*)?\s*([a-z]?)(ib)?", re.IGNORECASE)
_HEX_SIZE = re.compile(r"0x([0-9a-f]+)([kmgtp]?)", re.IGNORECASE)
_SIZE_TEXT_MAX = 40


@dataclass(frozen=True, slots=True)
class Geometry:
    """How the bytes of one image are cut into shards.

    Raises BadSize where the sizes break the limits.
    """

    size_bytes: int
    shard_bytes: int

    def __post_init__(self) -> None:
        check_image_size(self.size_bytes)
        check_shard_size(self.shard_bytes)

    @property
    def shards(self) -> int:
        """Number of shards; the last one may be used in part."""
        return -(-self.size_bytes // self.shard_bytes)

    def shard_of(self, offset: int) -> int:
        """Return the index of the shard that holds byte `offset` of the image."""
        assert 0 <= offset < self.size_bytes, "the offset is inside the image"
        return offset // self.shard_bytes

    def extent_of(self, shard: int) -> tuple[int, int]:
        """Return (offset, length) of a shard within the image, the last one cut at its end."""
        assert 0 <= shard < self.shards, "the shard is inside the image"
        offset = shard * self.shard_bytes
        return offset, min(self.shard_bytes, self.size_bytes - offset)


def parse_size(text: str) -> int:
    """Return the bytes that `text` means, as qemu-img reads sizes: `512`, `10G`, `1.5T`, `0x1000`.

    Suffixes k, M, G, T, P, E (either case, also KiB, MiB, …) are powers of 1024; b or none are
    bytes, and digits of a hexadecimal number are not suffixes. A fraction is rounded down to whole
    bytes, these up to a whole sector. A sign is refused: `+1G` means one more to those who resize
    with qemu-img. Raises BadSize; limits are checked apart, by `check_image_size` and
    `check_shard_size`.
    """
    stripped = text.strip()
    if len(stripped) <= _SIZE_TEXT_MAX:
        found = _HEX_SIZE.fullmatch(stripped)
        if found is not None:
            return int(found[1], 16) << (10 * _SUFFIXES[found[2].lower()])
        found = _SIZE.fullmatch(stripped)
        if found is not None and found[3].lower() in _SUFFIXES:
            size = _size_of(found[1], found[2], found[3].lower(), found[4])
            if size is not None:
                return size
    raise BadSize(
        f"{text[:_SIZE_TEXT_MAX]!r} is not a size: write a number of bytes, or a number with one "
        "of the suffixes k, M, G, T, P, E (10G, 1.5T)"
    )


def _size_of(whole: str, fraction: str | None, suffix: str, binary: str | None) -> int | None:
    power = _SUFFIXES[suffix]
    if power == 0 and binary is not None:
        return None
    rest = Fraction(f"0{fraction or ''}")
    if rest == 0:
        return int(whole) << (10 * power)
    if power == 0:
        return None
    size = int((int(whole) + rest) * (1 << (10 * power)))
    return -(-size // SECTOR_BYTES) * SECTOR_BYTES


def format_size(size_bytes: int) -> str:
    """Return a size for people, with at most two decimals."""
    power = min(max(size_bytes.bit_length() - 1, 0) // 10, len(_UNITS) - 1)
    number = f"{size_bytes / (1 << (10 * power)):.2f}"
    return f"{number.rstrip('0').rstrip('.')} {_UNITS[power]}"


def check_image_size(size_bytes: int) -> int:
    """Return `size_bytes` where an image may have it, or raise BadSize."""
    if size_bytes <= 0:
        raise BadSize("the size of an image is zero or less; give at least 512 bytes")
    if size_bytes > IMAGE_BYTES_MAX:
        raise BadSize(f"{format_size(size_bytes)} is beyond the limit of an image, 256 TiB")
    if size_bytes % SECTOR_BYTES:
        above = -(-size_bytes // SECTOR_BYTES) * SECTOR_BYTES
        raise BadSize(
            f"{size_bytes} bytes is not a multiple of {SECTOR_BYTES}; the next larger is {above}"
        )
    return size_bytes


def check_shard_size(shard_bytes: int) -> int:
    """Return `shard_bytes` where a pool may have it, or raise BadSize."""
    in_range = SHARD_BYTES_MIN <= shard_bytes <= SHARD_BYTES_MAX
    if not in_range or shard_bytes & (shard_bytes - 1):
        raise BadSize(
            f"{shard_bytes} bytes is not a shard size: use 1M, 2M, 4M, 8M, 16M, 32M or 64M"
        )
    return shard_bytes
