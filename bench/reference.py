"""The last release's rows as ratios to nbdkit, and whether a run keeps up with them.

Absolute figures of another machine say nothing; how much of nbdkit's speed is reached says most,
and still moves with the machine and its noise. Hence the tolerance.

    python -m bench.reference RESULT.json    makes a result of `make bench` the reference
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.report import Table

FILE = Path(__file__).with_name("reference.json")
TOLERANCE = 0.75
"""Of its former ratio, what a row is to keep: room for short runs and for another machine."""


@dataclass(frozen=True)
class Reference:
    """Where the ratios are from, and what they are by workload."""

    taken: str
    commit: str
    source: str
    machine: str
    ratios: Mapping[str, float]


@dataclass(frozen=True)
class Comparison:
    """What became of every row."""

    table: Table
    about: str
    is_slower: bool


def load(file: Path) -> Reference:
    """Reads what `text` has written."""
    return Reference(**json.loads(file.read_text()))


def text(reference: Reference) -> str:
    """The content of a file that `load` reads."""
    return json.dumps(vars(reference), indent=1, ensure_ascii=False) + "\n"


def of_result(result: Mapping[str, Any]) -> Reference:
    """The ratios of one run; raises ValueError where it has none."""
    ratios = {name: round(ratio, 3) for name, ratio in _ratios(result).items()}
    if not ratios:
        raise ValueError("this result has no rows of hci beside nbdkit")
    machine = result["machine"]
    return Reference(
        taken=result["taken"],
        commit=result.get("commit", "unknown"),
        source=f"a run of {result['rounds']} rounds of {result['runtime_s']} s",
        machine=f"{machine['processor']}, {machine['cores']} cores",
        ratios=ratios,
    )


def compare(reference: Reference, result: Mapping[str, Any], tolerance: float) -> Comparison:
    """Judges each row by the median of its rounds' ratios.

    A row that the reference does not have is shown and not judged. A run without any fails, and
    one that could not measure some of its rows fails by itself.
    """
    lines, slower = [], []
    for name, ratio in _ratios(result).items():
        former = reference.ratios.get(name)
        if former is None:
            lines.append([name, "-", f"{ratio:.2f}", "-", "new"])
            continue
        kept = ratio / former
        if kept < tolerance:
            slower.append(name)
        verdict = "slower" if kept < tolerance else "kept"
        lines.append([name, f"{former:.2f}", f"{ratio:.2f}", f"{kept:.2f}", verdict])
    about = (
        f"Ratios to nbdkit beside those of {reference.commit} ({reference.taken[:10]}, "
        f"{reference.source}, {reference.machine}). At least {tolerance:g} of the former one is to "
        f"be kept. "
    )
    if not lines:
        about += "Nothing was measured that could be compared."
    else:
        about += f"Slower: {', '.join(slower)}." if slower else "No row is slower."
    header = ["hci ÷ nbdkit", "was", "is", "kept", f"at least {tolerance:g}"]
    return Comparison(Table(header, lines), about, bool(slower) or not lines)


def _ratios(result: Mapping[str, Any]) -> dict[str, float]:
    """By workload, the median of the ratios of its rounds."""
    found = {}
    for row in result.get("rows", []):
        if row["system"] == "hci":
            each = row.get("round_ratios_nbdkit") or [row["ratio_nbdkit"]]
            if None not in each:
                found[row["workload"]] = statistics.median(each)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes a result the reference; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.reference", description=__doc__)
    parser.add_argument("result", type=Path)
    options = parser.parse_args(arguments)
    FILE.write_text(text(of_result(json.loads(options.result.read_text()))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
