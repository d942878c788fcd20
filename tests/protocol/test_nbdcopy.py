"""nbdcopy: whole images in and out with many requests in flight.

Covers pipelined reads and writes from several threads (and connections, where the export allows
it), zeroes and block status that keep holes, and the flush at the end.
"""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.protocol.newer_peers import WITH_NEWER

MIB = 1 << 20
SIZE = 256 * MIB

pytestmark = WITH_NEWER

Run = Callable[..., str]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse image: pieces of data of odd lengths at odd places, much nothing between."""
    chance = random.Random(20)
    path = tmp_path_factory.mktemp("source") / "disk.raw"
    with path.open("wb") as image:
        image.truncate(SIZE)
        for _ in range(150):
            image.seek(chance.randrange(SIZE - MIB))
            image.write(chance.randbytes(chance.randrange(1, 200_000)))
    return path


@pytest.mark.parametrize("requests", [1, 64])
def test_nbdcopy_in_and_out_gives_the_same_bytes(
    run: Run, nbd_uri: str, source: Path, tmp_path: Path, requests: int
) -> None:
    out = tmp_path / "out.raw"
    run("nbdcopy", "--flush", f"--requests={requests}", source, nbd_uri)
    run("nbdcopy", f"--requests={requests}", nbd_uri, out)
    # The export may be larger than the image.
    run("cmp", f"--bytes={SIZE}", source, out)


def test_nbdcopy_synchronous_gives_the_same_bytes(
    run: Run, nbd_uri: str, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.raw"
    run("nbdcopy", "--synchronous", "--request-size=65536", source, nbd_uri)
    run("nbdcopy", "--synchronous", nbd_uri, out)
    run("cmp", f"--bytes={SIZE}", source, out)


def test_nbdcopy_over_old_data_replaces_all_of_it(
    run: Run, nbd_uri: str, source: Path, tmp_path: Path
) -> None:
    run("qemu-io", "-f", "raw", "-c", f"write -P 0xff 0 {32 * MIB}", nbd_uri)
    run("nbdcopy", "--flush", source, nbd_uri)
    out = tmp_path / "out.raw"
    run("nbdcopy", nbd_uri, out)
    run("cmp", f"--bytes={SIZE}", source, out)


def test_nbdcopy_out_keeps_holes(
    run: Run, new_export: Callable[[int], str], source: Path, tmp_path: Path
) -> None:
    uri = new_export(SIZE)
    out = tmp_path / "out.raw"
    run("nbdcopy", "--flush", source, uri)
    run("nbdcopy", uri, out)
    taken = out.stat().st_blocks * 512
    assert taken < source.stat().st_blocks * 512 + 32 * MIB
