"""Plays one history and prints it: `python -m tests.sim.run SEED [--frames]`."""

from __future__ import annotations

import argparse
import sys

from tests.sim.history import History


def main() -> int:
    """Play the seed; what it printed is the same each time."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim.run", description=__doc__)
    parser.add_argument("seed", type=int)
    parser.add_argument("--frames", action="store_true", help="print each frame that is delivered")
    options = parser.parse_args()
    outcome = History(options.seed, frames=options.frames).play()
    print(outcome.text())
    return 0 if outcome.error is None else 1


if __name__ == "__main__":
    sys.exit(main())
