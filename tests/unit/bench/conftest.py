"""A setting in which nothing is measured."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from bench.measure import Setting
from bench.workloads import WORKLOADS


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    """One short round of everything, whose output is kept."""
    return Setting(
        scratch=tmp_path,
        rounds=1,
        runtime_s=1,
        window_s=1,
        systems=["hci", "nbdkit"],
        workloads=WORKLOADS,
        console=Console(file=io.StringIO()),
    )
