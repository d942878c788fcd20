"""Fixtures for tests against a running cluster, and how tests are run side by side.

Starting a cluster takes seconds, so tests hand theirs on. Each test process (one, or the workers of
pytest-xdist) keeps what is free for its next test, mended and emptied; one that cannot be mended,
or on which a test failed, is thrown away.
"""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests import reaper
from tests.devcluster import DevCluster

_SIDE_BY_SIDE = (
    *("engine", "protocol/test_qemu_img.py", "cluster/test_cli.py"),
    *("e2e", "faults", "protocol", "cluster", "sim", "unit"),
)
"""Files and folders in the order in which workers take them: what takes longest comes first, so
that no worker is left with a long file at the end."""

_FAILED = pytest.StashKey[bool]()


def pytest_configure() -> None:
    """A run that is ended from outside unwinds like an interrupted one: clusters are stopped.

    Ctrl-C is heard also where we were started to ignore it, in a shell's background: programs that
    tests interrupt would inherit that.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sets the workers' order; one process alone goes through the folders by name."""
    if not hasattr(config, "workerinput"):
        return
    root = Path(__file__).parent

    def rank(item: pytest.Item) -> int:
        path = item.path.relative_to(root)
        names = (path.as_posix(), path.parts[0])
        return next(
            (n for n, name in enumerate(_SIDE_BY_SIDE) if name in names), len(_SIDE_BY_SIDE)
        )

    items.sort(key=rank)


@pytest.fixture(scope="session", autouse=True)
def _reaped(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What tests start in their temporary folders ends with this process, however that ends."""
    reaper.watch(tmp_path_factory.getbasetemp(), remove=False)


@pytest.fixture(scope="session")
def _kept() -> Iterator[list[DevCluster]]:
    """Clusters that run and that no test uses now: one at most, the others are stopped."""
    kept: list[DevCluster] = []
    yield kept
    for left in kept:
        _end(left)


@pytest.fixture
def cluster(request: pytest.FixtureRequest, _kept: list[DevCluster]) -> Iterator[DevCluster]:
    """A healthy cluster of three nodes and one gateway without images, for the test alone."""
    yield from _lent(request, _kept)


@pytest.fixture(scope="module")
def shared(request: pytest.FixtureRequest, _kept: list[DevCluster]) -> Iterator[DevCluster]:
    """The same for all tests of a module, which leave it healthy, each with images of its own."""
    yield from _lent(request, _kept)


def _lent(request: pytest.FixtureRequest, kept: list[DevCluster]) -> Iterator[DevCluster]:
    lent = kept.pop() if kept else DevCluster()
    try:
        if not lent.config.exists():
            lent.start()
        yield lent
        if not failed(request.node):
            lent.mend()
            if not kept:
                kept.append(lent)
                return
    except BaseException:
        lent.print_logs()
        lent.close()
        raise
    if failed(request.node):
        lent.print_logs()
    _end(lent)


def failed(node: pytest.Item | pytest.Collector) -> bool:
    """Whether a test, or one of a module, has failed so far."""
    return node.stash.get(_FAILED, False)


def _end(cluster: DevCluster) -> None:
    cluster.close()
    assert cluster.processes() == [], "the cluster left processes behind"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remembers that a test failed, for the fixtures that clean up after it and its module."""
    report = yield
    if report.failed:
        for node in item.listchain():
            node.stash[_FAILED] = True
    return report
