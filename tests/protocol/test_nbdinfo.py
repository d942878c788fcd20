"""nbdinfo: what the handshake says of an export, and what block status says of its content.

Covers INFO and GO with every information, LIST, LIST_META_CONTEXT, transmission flags, block sizes,
and BLOCK_STATUS over a whole export, in both metadata contexts.
"""

import json
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from tests.protocol.newer_peers import WITH_NEWER

GIB = 1 << 30
MIB = 1 << 20

pytestmark = WITH_NEWER

Run = Callable[..., str]


@pytest.fixture
def export(run: Run, nbd_uri: str) -> dict[str, Any]:
    """What nbdinfo knows of the export."""
    exports = json.loads(run("nbdinfo", "--json", nbd_uri))["exports"]
    assert len(exports) == 1
    found: dict[str, Any] = exports[0]
    return found


def test_nbdinfo_of_an_export_shows_its_size(run: Run, nbd_uri: str) -> None:
    assert int(run("nbdinfo", "--size", nbd_uri)) == GIB


def test_nbdinfo_of_an_export_shows_the_block_sizes(export: dict[str, Any]) -> None:
    assert export["block_size_minimum"] == 1
    assert export["block_size_preferred"] == 4096
    assert export["block_size_maximum"] == 32 * MIB


def test_nbdinfo_of_a_writable_export_shows_what_it_can(export: dict[str, Any]) -> None:
    assert export["is_read_only"] is False
    for feature in ("cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero"):
        assert export[f"can_{feature}"] is True, feature


def test_nbdinfo_of_an_export_negotiates_structured_replies(run: Run, nbd_uri: str) -> None:
    told = json.loads(run("nbdinfo", "--json", nbd_uri))
    assert told["protocol"] == "newstyle-fixed"
    assert told["structured"] is True


def test_nbdinfo_of_an_export_shows_both_contexts(export: dict[str, Any]) -> None:
    assert set(export["contexts"]) == {"base:allocation", "qemu:allocation-depth"}


def test_nbdinfo_list_names_the_export(run: Run, nbd_uri: str) -> None:
    listed = json.loads(run("nbdinfo", "--json", "--list", nbd_uri))["exports"]
    name = unquote(urlsplit(nbd_uri).path).removeprefix("/")
    assert name in [export["export-name"] for export in listed]


def test_nbdinfo_map_of_written_and_zeroed_ranges_shows_data_and_holes(
    run: Run, new_export: Callable[[int], str]
) -> None:
    uri = new_export(64 * MIB)
    run("qemu-io", "-f", "raw", "-c", f"discard 0 {64 * MIB}", uri)
    run("qemu-io", "-f", "raw", "-c", "write -P 1 16M 4M", "-c", "write -P 2 32M 4M", uri)
    run("qemu-io", "-f", "raw", "-c", "write -z -u 34M 2M", uri)
    extents = json.loads(run("nbdinfo", "--json", "--map", uri))
    assert sum(extent["length"] for extent in extents) == int(run("nbdinfo", "--size", uri))
    data = {
        place // MIB
        for extent in extents
        if extent["type"] == 0
        for place in range(extent["offset"], extent["offset"] + extent["length"], MIB)
    }
    assert data & set(range(64)) == {16, 17, 18, 19, 32, 33}


def test_nbdinfo_map_of_allocation_depth_tells_what_is_allocated(
    run: Run, new_export: Callable[[int], str]
) -> None:
    uri = new_export(64 * MIB)
    # Zeroes that keep their space are allocated, and a hole is not, though both read as zeroes.
    run("qemu-io", "-f", "raw", "-c", f"discard 0 {64 * MIB}", uri)
    run("qemu-io", "-f", "raw", "-c", "write -P 1 16M 4M", "-c", "write -z 32M 4M", uri)
    extents = json.loads(run("nbdinfo", "--json", "--map=qemu:allocation-depth", uri))
    found = [(each["offset"], each["length"], each["type"]) for each in extents]
    assert [(offset // MIB, length // MIB, depth) for offset, length, depth in found] == [
        *((0, 16, 0), (16, 4, 1), (20, 12, 0), (32, 4, 1), (36, 28, 0)),
    ]


def test_nbdinfo_of_an_unknown_export_fails_with_a_message(run: Run, nbd_uri: str) -> None:
    unknown = nbd_uri.replace("?", "-that-is-not-there?")
    # The client's own words have the name too; the older one shows the server's in debugging only.
    said = run("env", "LIBNBD_DEBUG=1", "nbdinfo", unknown, fails=True)
    assert "No such file or directory" in said, said
    servers = "(server error message|has no export named '[^']*'): .*-that-is-not-there"
    assert re.search(servers, said), said
