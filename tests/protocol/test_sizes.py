"""Sizes mean what they mean to qemu-img, and what it refuses is refused."""

import json
import subprocess

import pytest

from shard.errors import BadSize
from shard.geometry import SECTOR_BYTES, parse_size


def measured(size: str) -> int | None:
    """What qemu-img makes of a size, which it rounds up to whole sectors; None: it refuses it."""
    done = subprocess.run(
        ["qemu-img", "measure", "--output=json", "-O", "raw", "--size", size], capture_output=True
    )
    return int(json.loads(done.stdout)["required"]) if done.returncode == 0 else None


@pytest.mark.parametrize(
    "size",
    [
        *(
            "0",
            "1",
            "512",
            "513",
            "010",
            "1b",
            "1B",
            "1k",
            "1K",
            "3M",
            "2G",
            "5t",
            "1P",
            "1e",
            "2E",
        ),
        *("1.", "1.0", "1.k", "1.b", "1.0b", "0.5k", "0.3k", "1.1k", "1.23456k", "1.1G", "1.5E"),
        *("0.0000000000001k", "0x10", "0X10", "0x10k", "0x10K", "0x1M", "0x1g", "0x1T", "0x1p"),
        *("0x10b", "0x10e", "0xE", " 1k"),
    ],
)
def test_size_means_the_same_to_qemu_img(size: str) -> None:
    whole = -(-parse_size(size) // SECTOR_BYTES) * SECTOR_BYTES
    assert whole == measured(size)


@pytest.mark.parametrize(
    "size",
    [
        *("", "k", "-1", "1.5", "1.5b", "1kb", "1Q", "0b1", "1e3", "1e3k", "0x", "0x1.8k", "0x1.k"),
        *("0x1KiB", "0x1 k", "1,5k", "inf", "nan"),
    ],
)
def test_size_that_qemu_img_refuses_is_refused(size: str) -> None:
    assert measured(size) is None
    with pytest.raises(BadSize):
        parse_size(size)
