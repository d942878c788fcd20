"""Plays histories and prints them: `python -m tests.sim.run SEED… [--frames]`."""

from __future__ import annotations

import argparse
import sys

from tests.sim.history import History


def main() -> int:
    """Play the seeds; what is printed is the same each time."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim.run", description=__doc__)
    parser.add_argument("seeds", type=int, nargs="+", metavar="SEED")
    parser.add_argument("--frames", action="store_true", help="print each frame that is delivered")
    parser.add_argument("--seconds", type=float, help="have faults begin for so long")
    options = parser.parse_args()
    failed = 0
    for seed in options.seeds:
        outcome = History(seed, frames=options.frames, length_s=options.seconds).play()
        print(outcome.text())
        failed += outcome.error is not None
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
