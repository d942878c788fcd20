"""Real servers for the tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.etcd_server import EtcdServer, etcd_members


@pytest.fixture(scope="module")
def shared_etcd_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """One etcd for all tests of a module, which clean up after themselves and never stop it."""
    server = EtcdServer(tmp_path_factory.mktemp("etcd"))
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def etcd_server(tmp_path: Path) -> Iterator[EtcdServer]:
    """An etcd of the test's own, to be killed and started at will."""
    server = EtcdServer(tmp_path)
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def three_etcd_members(tmp_path: Path) -> Iterator[list[EtcdServer]]:
    """An etcd cluster of three members."""
    members = etcd_members(tmp_path, 3)
    try:
        for member in members:
            member.launch()
        for member in members:
            member.wait_until_it_answers()
        yield members
    finally:
        for member in members:
            member.kill()
