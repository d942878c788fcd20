"""Random histories pass, and a seed says all about one.

`make sim SEED=n` replays one seed, `make sim ROUNDS=n` plays so many; else what fits into the time.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sim.history import History
from tests.sim.kinds import KINDS
from tests.sim.many import play_many

BOX_S = 30.0
"""Time for random histories in `make test`."""

ROOT = Path(__file__).resolve().parents[2]


def _number(name: str) -> int | None:
    text = os.environ.get(name, "")
    return int(text) if text else None


SEED, ROUNDS = _number("HCI_SIM_SEED"), _number("HCI_SIM_ROUNDS")


@pytest.mark.skipif(SEED is None, reason="no SEED was given")
def test_history_of_the_given_seed_keeps_the_invariants() -> None:
    assert SEED is not None
    outcome = History(SEED, frames=bool(os.environ.get("HCI_SIM_FRAMES"))).play()
    print(outcome.text())
    if outcome.error is not None:
        raise outcome.error


@pytest.mark.skipif(SEED is not None, reason="one seed was asked for")
@pytest.mark.timeout(24 * 3600)
def test_random_histories_keep_the_invariants() -> None:
    rounds = ROUNDS if ROUNDS is not None else 1_000_000
    limit_s = BOX_S if ROUNDS is None else 24 * 3600.0
    count, failed = 0, []
    for played in play_many(range(rounds), limit_s):
        count += 1
        if played.error is not None:
            failed.append(played)
            print(f"make sim SEED={played.seed} replays: {played.error}")
    print(f"{count} histories, {len(failed)} failed")
    if failed:
        print(failed[0].text)
    assert not failed, f"of {count} histories these failed: {[played.seed for played in failed]}"
    assert count >= min(rounds, len(KINDS)), "one of each kind was played"


@pytest.mark.skipif(SEED is not None, reason="one seed was asked for")
@pytest.mark.parametrize("seed", [3, 9, 10, 14, 15])
def test_two_runs_of_a_seed_give_the_same_history(seed: int) -> None:
    texts = []
    for hash_seed in ("1", "77"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-m", "tests.sim.run", str(seed), "--frames"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=120)
        assert done.returncode == 0, done.stdout.decode()[-2000:] + done.stderr.decode()[-2000:]
        texts.append(done.stdout)
    assert texts[0] == texts[1]
    assert len(texts[0]) > 10_000, "something happened"
