"""Random histories pass, and a seed says all about one.

`make sim SEED=n` replays one seed, `make sim ROUNDS=n` plays so many; else what fits into the time.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sim.history import History
from tests.sim.kinds import KINDS, seeds_from, seeds_of
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
    for played in play_many(itertools.islice(seeds_from(0), rounds), limit_s):
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
def test_two_runs_of_a_seed_of_each_kind_give_the_same_history(tmp_path: Path) -> None:
    seeds = [next(seeds_of(kind.name)) for kind in KINDS]
    command = [sys.executable, "-m", "tests.sim.run", *map(str, seeds), "--frames", "--seconds=6"]
    told = []
    for hash_seed in ("1", "77"):
        out = tmp_path / hash_seed
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        with out.open("wb") as file:
            run = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
        told.append((run, out))
    for run, out in told:
        assert run.wait(timeout=500) == 0, out.read_text()[-2000:]
    histories = [
        re.split(r"^(?=seed -?\d+, )", out.read_text(), flags=re.MULTILINE)[1:] for _, out in told
    ]
    assert len(histories[0]) == len(KINDS)
    for kind, one, other in zip(KINDS, *histories, strict=True):
        assert one == other, f"kind {kind.name}"
        assert len(one) > 10_000, f"something happened in kind {kind.name}"
