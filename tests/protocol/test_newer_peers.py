"""What only newer peers ask for: QEMU 10 and libnbd 1.22, with lengths of 64 bits.

Covers that they negotiate extended headers, zeroes and block status of more than 4 GiB in one
request. What `test_libnbd`, `test_nbdcopy`, `test_nbdinfo`, `test_qemu_img` and `test_qemu_io`
cover is run with them as well: guests of QEMU 10 could not write, and no peer of Debian 12 showed
it.
"""

import json
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from tests.protocol.newer_peers import NEWER

GIB = 1 << 30
SIZE = 6 * GIB

Run = Callable[..., str]
Libnbd = Callable[..., str]

pytestmark = pytest.mark.parametrize("run", [NEWER], indirect=True, scope="session")


@pytest.fixture
def libnbd(run: Run, tmp_path: Path) -> Libnbd:
    """Runs a script in which `h` is connected to a URI; its asserts are the test's."""

    def run_script(uri: str, script: str) -> str:
        path = tmp_path / "script.py"
        begin = "import nbd, sys\nh = nbd.NBD()\nh.add_meta_context('base:allocation')\n"
        path.write_text(f"{begin}h.connect_uri(sys.argv[1])\n{script}")
        return run("python3", path, uri)

    return run_script


@pytest.fixture(scope="module")
def uri(new_export: Callable[[int], str]) -> str:
    """An export that is larger than a length of 32 bits can say."""
    return new_export(SIZE)


def test_newer_libnbd_negotiates_extended_headers(libnbd: Libnbd, uri: str) -> None:
    libnbd(uri, "assert h.get_extended_headers_negotiated()\n")


def test_newer_libnbd_zeroes_and_describes_gigabytes_in_one_request(
    libnbd: Libnbd, uri: str
) -> None:
    libnbd(
        uri,
        """
GIB = 1 << 30
found = []
h.zero(h.get_size(), 0)
h.pwrite(b"a" * 4096, 5 * GIB)
h.block_status_64(h.get_size(), 0, lambda _context, _at, extents, _error: found.extend(extents))
assert found == [(5 * GIB, 3), (4096, 0), (GIB - 4096, 3)], found
h.zero(h.get_size() - 1, 1)
assert h.pread(4096, 5 * GIB) == bytes(4096)
h.pwrite(b"b" * 4096, 5 * GIB)
h.trim(h.get_size(), 0)
assert h.pread(4096, 5 * GIB) == bytes(4096)
""",
    )


def test_newer_qemu_writes_and_zeroes_gigabytes(run: Run, uri: str) -> None:
    run("qemu-io", "-f", "raw", "-c", "write -P 1 5G 1M", "-c", f"write -z -u -n 0 {SIZE}", uri)
    run("qemu-io", "-f", "raw", "-c", "read -P 0 5G 1M", "-c", "write -f -P 2 5G 513", uri)
    run("qemu-io", "-f", "raw", "-c", "read -P 2 5G 513", "-c", "read -P 0 5368709633 511", uri)


def test_newer_qemu_maps_gigabytes(run: Run, uri: str) -> None:
    run("qemu-io", "-f", "raw", "-c", f"write -z -u -n 0 {SIZE}", "-c", "write -P 1 5G 1M", uri)
    parts = urlsplit(uri)
    options = (
        f"driver=nbd,server.type=unix,server.path={parse_qs(parts.query)['socket'][0]},"
        f"export={unquote(parts.path)[1:]}"
    )
    extents = json.loads(run("qemu-img", "map", "--output=json", "--image-opts", options))
    found = [(each["start"], each["length"], each["data"]) for each in extents]
    data = (5 * GIB, 1 << 20, True)
    assert found == [(0, 5 * GIB, False), data, (5 * GIB + (1 << 20), GIB - (1 << 20), False)]
