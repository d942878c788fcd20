"""qemu-img: a multi-gigabyte sparse disk converted into an export and compared out of it.

Covers QEMU's client with up to 16 requests in flight, large WRITE_ZEROES, block status over
gigabytes in both metadata contexts, qcow2 on both ends, and `bench` with flushes, whose writes are
read back.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from tests.protocol.newer_peers import WITH_NEWER

MIB = 1 << 20
SIZE = 3 << 30

pytestmark = WITH_NEWER

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


@pytest.fixture
def disk_uri(new_export: Callable[[int], str]) -> str:
    """An empty export of the disk's size: what a former test wrote is not taken for this one's."""
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
    run("qemu-io", "-f", "raw", "-c", "write -P 1 1G 4M", disk_uri)
    extents = json.loads(run("qemu-img", "map", "-f", "raw", "--output=json", disk_uri))
    end = 0
    for extent in extents:
        assert extent["start"] == end
        end += extent["length"]
    assert end == SIZE
    data = [(each["start"], each["length"]) for each in extents if each["data"]]
    assert data == [(1 << 30, 4 * MIB)]


def test_qemu_img_map_of_allocation_depth_finds_what_was_written(
    run: Run, new_export: Callable[[int], str]
) -> None:
    uri = new_export(64 * MIB)
    run("qemu-io", "-f", "raw", "-c", "write -P 1 16M 4M", uri)
    parts = urlsplit(uri)
    options = (
        f"driver=nbd,server.type=unix,server.path={parse_qs(parts.query)['socket'][0]},"
        f"export={unquote(parts.path)[1:]},x-dirty-bitmap=qemu:allocation-depth"
    )
    extents = json.loads(run("qemu-img", "map", "--output=json", "--image-opts", options))
    # QEMU shows a depth of 0 as data, and any other one as none: it was made for bitmaps.
    written = [(each["start"], each["length"]) for each in extents if not each["data"]]
    assert written == [(16 * MIB, 4 * MIB)]


REQUESTS = 2000


@pytest.mark.parametrize(
    ("size", "step", "more"),
    [
        (4096, 4096, ("--flush-interval=64",)),
        (1536, 1536, ()),
        (512, 4608, ("--flush-interval=64", "--no-drain")),
    ],
)
def test_qemu_img_bench_writes_what_is_read_back(
    run: Run, nbd_uri: str, size: int, step: int, more: tuple[str, ...]
) -> None:
    place = 3 * MIB
    end = place + REQUESTS * step
    run("qemu-io", "-f", "raw", "-c", f"write -P 0x33 {place} {REQUESTS * step + 4096}", nbd_uri)
    told = run(
        *("qemu-img", "bench", "-f", "raw", "-t", "none", "-c", f"{REQUESTS}", "-d", "32", "-w"),
        *("--pattern=0x5a", "-o", f"{place}", "-s", f"{size}", "-S", f"{step}", *more, nbd_uri),
    )
    assert "Run completed" in told
    checks = [f"read -P 0x33 {end} 4096"]
    if step == size:
        checks.append(f"read -P 0x5a {place} {REQUESTS * step}")
    else:
        for number in (0, 1, REQUESTS // 2, REQUESTS - 1):
            at = place + number * step
            checks.append(f"read -P 0x5a {at} {size}")
            checks.append(f"read -P 0x33 {at + size} {step - size}")
    run("qemu-io", "-f", "raw", *(word for check in checks for word in ("-c", check)), nbd_uri)


def test_qemu_img_bench_reads_to_its_end(run: Run, nbd_uri: str) -> None:
    bench = ("qemu-img", "bench", "-f", "raw", "-t", "none", "-c", f"{REQUESTS}", "-d", "32")
    assert "Run completed" in run(*bench, nbd_uri)
