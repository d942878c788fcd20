"""A store that the engine does not open: the real one's words, and what a person is told to do."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine import Node
from hci.errors import DaemonError
from hci.node import NodeDaemon
from vmstore.set_back import Marks

CLUSTER = "c" * 32
LOG_BYTES = 32 << 20
HEADER_BYTES = 16
"""Of a file that is replaced as a whole: magic, length and checksum; see `docs/disk-format.md`."""


class Opening(NodeDaemon):
    """A node's daemon that opens its store and does no more."""

    def __init__(self, data_dir: Path, name: str = "node1", cluster: str = CLUSTER) -> None:
        self.config: Any = SimpleNamespace(cluster=SimpleNamespace(id=cluster))
        self.own: Any = SimpleNamespace(
            name=name, data_dir=data_dir, log_bytes=LOG_BYTES, poll_us=0
        )
        self._marks = Marks(data_dir / "set-back")

    def open(self) -> Node:
        return self._open_store()


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A store of node1 that is not open."""
    Opening(tmp_path / "data").open().stop()
    return tmp_path / "data"


def refused(daemon: Opening) -> str:
    with pytest.raises(DaemonError) as error:
        daemon.open().stop()
    return str(error.value)


def test_disk_of_another_cluster_is_told_with_what_to_correct(data_dir: Path) -> None:
    told = refused(Opening(data_dir, cluster="d" * 32))
    assert told == (
        f"node node1 cannot use {data_dir}: the store belongs to node node1 of cluster {CLUSTER}; "
        "if that is another node's disk, mount this node's own or correct `data_dir`; else correct "
        "the node's name or the cluster's id in the configuration. Nothing on it was changed"
    )
    Opening(data_dir).open().stop()


def test_disk_of_another_node_is_told_with_what_to_correct(data_dir: Path) -> None:
    told = refused(Opening(data_dir, name="node2"))
    assert f"the store belongs to node node1 of cluster {CLUSTER}; if that is another" in told


def test_store_that_is_open_is_told_with_what_to_end(data_dir: Path) -> None:
    running = Opening(data_dir).open()
    try:
        told = refused(Opening(data_dir))
    finally:
        running.stop()
    assert "the store is open in another process; if this node runs already, end that" in told


def test_store_of_another_format_is_told_with_what_to_run(data_dir: Path) -> None:
    superblock = data_dir / "superblock"
    whole = superblock.read_bytes()
    content = (99).to_bytes(4, "little") + whole[HEADER_BYTES + 4 :]
    checksum = crc32c(content).to_bytes(4, "little")
    superblock.write_bytes(whole[: HEADER_BYTES - 4] + checksum + content)
    told = refused(Opening(data_dir))
    assert "has format 99, which this program does not read; run the version of hci that" in told
    superblock.write_bytes(whole)
    Opening(data_dir).open().stop()


def crc32c(data: bytes) -> int:
    """RFC 3720, appendix B.4."""
    remainder = 0xFFFFFFFF
    for byte in data:
        remainder ^= byte
        for _ in range(8):
            remainder = remainder >> 1 ^ (0x82F63B78 if remainder & 1 else 0)
    return remainder ^ 0xFFFFFFFF
