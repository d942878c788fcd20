"""qemu-img: a multi-gigabyte sparse disk converted into an export and compared out of it.

Covers QEMU's client with up to 16 requests in flight, large WRITE_ZEROES, block status over
gigabytes, qcow2 on both ends, and `bench` with flushes.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

MIB = 1 << 20
SIZE = 3 << 30

Run = Callable[..., str]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk of 3 GiB with about 100 MiB of data all over it, first and last bytes included."""
    chance = random.Random(33)
    path = tmp_path_factory.mktemp("source") / "disk.raw"
    with path.open("wb") as image:
        image.truncate(SIZE)
        for _ in range(400):
            length = chance.choice([1, 512, 4096, 65_537, MIB])
            image.seek(chance.randrange(SIZE - length))
            image.write(chance.randbytes(length))
        image.seek(0)
        image.write(b"first")
        image.seek(SIZE - 4)
        image.write(b"last")
    return path


@pytest.fixture(scope="module")
def disk_uri(new_export: Callable[[int], str]) -> str:
    """An export of the disk's size."""
    return new_export(SIZE)


def test_qemu_img_convert_in_then_compare_out_agrees(run: Run, disk_uri: str, source: Path) -> None:
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, disk_uri, timeout_s=250)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, disk_uri, timeout_s=250)


def test_qemu_img_convert_of_parallel_coroutines_out_of_order_agrees(
    run: Run, disk_uri: str, source: Path, tmp_path: Path
) -> None:
    packed = tmp_path / "disk.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", source, packed)
    unordered = ("-n", "-W", "-m", "16")
    run("qemu-img", "convert", *unordered, "-O", "raw", packed, disk_uri, timeout_s=250)
    run("qemu-img", "compare", "-F", "raw", packed, disk_uri, timeout_s=250)


def test_qemu_img_convert_out_to_qcow2_agrees_and_keeps_holes(
    run: Run, disk_uri: str, source: Path, tmp_path: Path
) -> None:
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, disk_uri, timeout_s=250)
    out = tmp_path / "out.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk_uri, out, timeout_s=250)
    run("qemu-img", "compare", "-f", "raw", source, out, timeout_s=250)
    assert out.stat().st_blocks * 512 < 400 * MIB


def test_qemu_img_compare_after_one_changed_byte_finds_it(
    run: Run, disk_uri: str, source: Path
) -> None:
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, disk_uri, timeout_s=250)
    run("qemu-io", "-f", "raw", "-c", f"write -P 0xa5 {SIZE - 100} 1", disk_uri)
    run(
        "qemu-img", "compare", "-f", "raw", "-F", "raw", source, disk_uri, fails=True, timeout_s=250
    )


def test_qemu_img_map_covers_the_whole_export(run: Run, disk_uri: str) -> None:
    extents = json.loads(run("qemu-img", "map", "-f", "raw", "--output=json", disk_uri))
    end = 0
    for extent in extents:
        assert extent["start"] == end
        end += extent["length"]
    assert end == SIZE


@pytest.mark.parametrize("options", [("-w", "--flush-interval=64"), ("-w", "-s", "1536"), ()])
def test_qemu_img_bench_ends_without_errors(
    run: Run, nbd_uri: str, options: tuple[str, ...]
) -> None:
    run("qemu-img", "bench", "-f", "raw", "-t", "none", "-c", "2000", "-d", "32", *options, nbd_uri)
