"""What the picture shows, and that it can be done without."""

import builtins
from pathlib import Path
from typing import Any

import pytest

from bench import plot
from bench.workloads import WORKLOADS
from tests.unit.bench.results import result

NAME = WORKLOADS[0].name


def test_bars_have_the_goal_of_their_workload() -> None:
    assert plot.bars(result(**{NAME: 0.3}), "nbdkit") == [
        plot.Bar(NAME, 0.3, WORKLOADS[0].goal_nbdkit)
    ]
    assert not plot.bars(result(**{NAME: 0.3}), "nbdkit")[0].is_met


def test_bars_of_a_peer_that_was_not_measured_are_none() -> None:
    assert plot.bars(result(**{NAME: 0.3}), "gluster") == []


def test_plot_of_no_rows_says_so(tmp_path: Path) -> None:
    with pytest.raises(plot.NoPlotError, match="no rows"):
        plot.write({}, tmp_path / "rows.svg")


def test_plot_without_matplotlib_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return usual(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(plot.NoPlotError, match="pip install --group bench"):
        plot.write(result(**{NAME: 0.3}), tmp_path / "rows.svg")
