"""Fixtures for tests against a running cluster."""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator

import pytest

from tests.devcluster import DevCluster


def pytest_configure() -> None:
    """A run that is ended from outside unwinds like an interrupted one: clusters are stopped."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


_FAILED = pytest.StashKey[bool]()


@pytest.fixture(scope="module")
def _kept() -> Iterator[list[DevCluster]]:
    """The cluster that this module's tests hand on to each other, if there is one."""
    kept: list[DevCluster] = []
    yield kept
    for left in kept:
        left.close()
        assert left.processes() == [], "the cluster left processes behind"


@pytest.fixture
def cluster(request: pytest.FixtureRequest, _kept: list[DevCluster]) -> Iterator[DevCluster]:
    """A healthy cluster of three nodes and one gateway without images, for the test alone.

    It is handed on to the module's next test, mended and emptied; after a failure, or where it
    cannot be mended, the next one gets a new cluster.
    """
    if not _kept:
        started = DevCluster()
        _kept.append(started)
        started.start()
    yield _kept[0]
    if request.node.stash.get(_FAILED, False):
        _kept[0].print_logs()
        _kept.pop().close()
        return
    try:
        _kept[0].mend()
    except BaseException:
        _kept[0].print_logs()
        _kept.pop().close()
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remembers whether the test itself failed, for the fixture that cleans up after it."""
    report = yield
    if report.failed:
        item.stash[_FAILED] = True
    return report
