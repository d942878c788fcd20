"""The rows as a picture: how many times nbdkit's and Gluster's speed, and the goals.

    python -m bench.plot RESULT.json PICTURE.svg

Drawn by matplotlib, which is installed for this alone (`pip install --group bench`); without it
everything else of the benchmark works.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.workloads import WORKLOADS

PEERS = {"nbdkit": "nbdkit file (one copy)", "gluster": "Gluster replica 3"}
MET, MISSED, GOAL, PARITY = "#2a7f62", "#c4622d", "#222222", "#999999"


class NoPlotError(Exception):
    """There is no picture; the message says why and what to do about it."""


@dataclass(frozen=True)
class Bar:
    """A workload's ratio to one peer."""

    workload: str
    ratio: float
    goal: float | None

    @property
    def is_met(self) -> bool:
        return self.goal is None or self.ratio >= self.goal


def bars(result: Mapping[str, Any], peer: str) -> list[Bar]:
    """The rows of a result, of hci beside one peer; empty where that was not measured."""
    goals = {w.name: getattr(w, f"goal_{peer}") for w in WORKLOADS}
    return [
        Bar(row["workload"], row[f"ratio_{peer}"], goals.get(row["workload"]))
        for row in result.get("rows", [])
        if row["system"] == "hci" and row[f"ratio_{peer}"] is not None
    ]


def write(result: Mapping[str, Any], file: Path) -> None:
    """Draws the rows; raises NoPlotError where there are none, or nothing to draw them with."""
    panels = {peer: found for peer in PEERS if (found := bars(result, peer))}
    if not panels:
        raise NoPlotError("no rows of hci beside a peer were measured")
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise NoPlotError(
            "matplotlib is not installed: .venv/bin/python -m pip install --group bench"
        ) from missing
    # Text stays text, and the same figures give the same file.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hci", "font.size": 9}):
        figure = Figure(figsize=(5 * len(panels) + 1.5, 4), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for ax, (peer, found) in zip(axes, panels.items(), strict=True):
            _draw(ax, peer, found)
        figure.suptitle(_title(result), fontsize=9)
        figure.savefig(file, format="svg", metadata={"Date": None})


def _draw(ax: Any, peer: str, found: Sequence[Bar]) -> None:
    places = range(len(found))
    ax.barh(
        places, [bar.ratio for bar in found], color=[MET if bar.is_met else MISSED for bar in found]
    )
    for place, bar in zip(places, found, strict=True):
        ax.annotate(
            f"{bar.ratio:.2f}", (bar.ratio, place), (3, 0), textcoords="offset points", va="center"
        )
        if bar.goal is not None:
            ax.plot([bar.goal, bar.goal], [place - 0.45, place + 0.45], color=GOAL, linewidth=2)
    ax.axvline(1, color=PARITY, linewidth=1, linestyle="--")
    ax.set_yticks(places, [bar.workload for bar in found])
    if not ax.yaxis_inverted():
        ax.invert_yaxis()
    ax.margins(x=0.15)
    ax.set_xlim(left=0)
    ax.set_xlabel(f"times the speed of {PEERS[peer]}; a stroke is the goal")


def _title(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    return (
        f"hci-vmstore {result.get('commit', '')}, three copies: medians of {result['rounds']} "
        f"rounds of {result['runtime_s']} s, {machine['cores']} cores, {result['taken'][:10]}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws a result that is kept; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args(arguments)
    try:
        write(json.loads(options.result.read_text()), options.picture)
    except NoPlotError as reason:
        print(reason, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
