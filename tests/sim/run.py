"""Plays histories: `python -m tests.sim.run FIRST COUNT`."""

from __future__ import annotations

import sys
import time
import traceback

from tests.sim.history import History


def main() -> int:
    first, count = int(sys.argv[1]), int(sys.argv[2])
    failed = 0
    begun = time.monotonic()
    for seed in range(first, first + count):
        history = History(seed, frames="-f" in sys.argv)
        outcome = history.play()
        if outcome.error is not None:
            failed += 1
            print(f"seed {seed} {outcome.kind}: {type(outcome.error).__name__}: {str(outcome.error)[:300]}")
            if count == 1:
                print(outcome.text())
                traceback.print_exception(outcome.error)
        elif count == 1:
            print(outcome.text())
    took = time.monotonic() - begun
    print(f"{count} histories, {failed} failed, {took / count * 1000:.0f} ms each")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
