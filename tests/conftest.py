"""Fixtures for tests against a running cluster."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.devcluster import DevCluster


@pytest.fixture
def cluster() -> Iterator[DevCluster]:
    """A fresh, healthy cluster of three nodes and one gateway, gone afterwards."""
    with DevCluster() as started:
        yield started
    assert started.processes() == [], "the cluster left processes behind"
