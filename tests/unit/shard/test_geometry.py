"""Sizes as qemu-img reads them, and the limits of images and shards."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shard.errors import BadSize
from shard.geometry import (
    IMAGE_BYTES_MAX,
    SHARD_BYTES_DEFAULT,
    Geometry,
    check_image_size,
    check_shard_size,
    format_size,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("512", 512),
        ("0", 0),
        ("1b", 1),
        ("1k", 1024),
        ("4M", 4 << 20),
        ("4m", 4 << 20),
        ("4MiB", 4 << 20),
        ("10G", 10 << 30),
        (" 10 GiB ", 10 << 30),
        ("1.5G", 3 << 29),
        ("1.1G", 1181116416),
        ("256T", 256 << 40),
        ("1P", 1 << 50),
        ("2E", 2 << 60),
        ("1.", 1),
        ("1.0b", 1),
        ("1.G", 1 << 30),
        ("0.0000000000001k", 0),
        ("0.3k", 512),
        ("0x1000", 4096),
        ("0X1000k", 4 << 20),
        ("0x10P", 16 << 50),
        ("0x1b", 27),
        ("0x1E", 30),
    ],
)
def test_parse_size_of_valid_text_returns_bytes(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text",
    [
        *("", "G", "ten", "-1", "+1", "1.5", "1.5b", "1ib", "1.ib", "1KB", "1Q", "1 000", "1e3"),
        *("1..5G", ".5G", "0x", "0xk", "0x1.k", "0x1KiB", "0x1 k", "0x1Q"),
    ],
)
def test_parse_size_of_other_text_says_what_a_size_is(text: str) -> None:
    with pytest.raises(BadSize, match=r"is not a size: write a number of bytes"):
        parse_size(text)


@pytest.mark.parametrize("text", ["9" * 5000, "\u0661G"])
def test_parse_size_of_hostile_text_is_refused_at_once(text: str) -> None:
    with pytest.raises(BadSize):
        parse_size(text)


@given(st.integers(0, 1 << 62))
def test_parse_size_of_any_number_returns_it(size_bytes: int) -> None:
    assert parse_size(str(size_bytes)) == size_bytes


@pytest.mark.parametrize("size_bytes", [512, 1 << 20, IMAGE_BYTES_MAX])
def test_image_size_within_limits_is_taken(size_bytes: int) -> None:
    assert check_image_size(size_bytes) == size_bytes


@pytest.mark.parametrize(
    ("size_bytes", "message"),
    [
        (0, "zero or less"),
        (-512, "zero or less"),
        (513, "next larger is 1024"),
        (IMAGE_BYTES_MAX + 512, "beyond the limit"),
    ],
)
def test_image_size_outside_limits_is_refused(size_bytes: int, message: str) -> None:
    with pytest.raises(BadSize, match=message):
        check_image_size(size_bytes)


@pytest.mark.parametrize("shard_bytes", [1 << 19, 3 << 20, 128 << 20, 0, -(1 << 20)])
def test_shard_size_outside_limits_is_refused(shard_bytes: int) -> None:
    with pytest.raises(BadSize, match="is not a shard size"):
        check_shard_size(shard_bytes)


@given(st.integers(1, 1 << 30), st.sampled_from([1 << 20, 4 << 20, 64 << 20]))
def test_geometry_of_any_image_covers_it_without_gaps(sectors: int, shard_bytes: int) -> None:
    geometry = Geometry(sectors * 512, shard_bytes)
    last = geometry.shards - 1
    offset, length = geometry.extent_of(last)
    assert offset + length == geometry.size_bytes
    assert geometry.shard_of(geometry.size_bytes - 1) == last
    assert geometry.extent_of(0)[0] == 0


def test_geometry_with_bad_sizes_is_refused() -> None:
    with pytest.raises(BadSize):
        Geometry(100, SHARD_BYTES_DEFAULT)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (3 << 29, "1.5 GiB"), (256 << 40, "256 TiB")],
)
def test_format_size_is_short(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text
