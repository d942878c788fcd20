"""Hosts for the tests of a module, as they are when Debian was just installed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import reaper
from tests.conftest import failed
from tests.deploy import root
from tests.deploy.hosts import PROJECT, Hosts
from tests.deploy.playbook import Controller

NAMES = ("host1", "host2", "host3")


@pytest.fixture(scope="session")
def bundle() -> Path:
    """What `make bundle` wrote last; `make test-deploy` has it written first."""
    found = list((PROJECT / "dist").glob("hci-vmstore-*.tar.gz"))
    assert found, "there is no bundle in dist/: `make test-deploy` runs these"
    return max(found, key=lambda path: path.stat().st_mtime)


@pytest.fixture(scope="session")
def debian() -> Iterator[Path]:
    """What the hosts' disks begin with."""
    with tempfile.TemporaryDirectory(prefix="hci-debian-") as name:
        reaper.watch(Path(name), remove=True)
        root.unpack(root.made(PROJECT / ".cache" / "deploy"), Path(name))
        yield Path(name)
        reaper.forget(Path(name))


@pytest.fixture(scope="module")
def hosts(request: pytest.FixtureRequest, debian: Path) -> Iterator[Hosts]:
    """Three fresh hosts: host1, host2, host3."""
    with Hosts(debian) as made:
        made.boot(*NAMES)
        yield made
        if failed(request.node):
            made.print_journals()


@pytest.fixture(scope="module")
def controller(hosts: Hosts, bundle: Path) -> Controller:
    """The machine that they are set up from."""
    return Controller(hosts, bundle)
