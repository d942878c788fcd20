"""Plays many histories, on all processors: `python -m tests.sim.many --rounds 10000`."""

from __future__ import annotations

import argparse
import itertools
import os
import random
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context

from tests.sim.history import History
from tests.sim.kinds import KINDS, kind_of, seeds_from, seeds_of

CHUNK = 8
"""Histories that a worker plays before it reports."""


@dataclass(frozen=True, slots=True)
class Played:
    """How one went; `text` of those that failed."""

    seed: int
    error: str | None
    text: str
    simulated_s: float


def play(seeds: list[int]) -> list[Played]:
    """Play histories in this process."""
    played = []
    for seed in seeds:
        outcome = History(seed).play()
        error = outcome.error
        told = None if error is None else f"{type(error).__name__}: {error}"
        text = "" if error is None else outcome.text()
        played.append(Played(seed, told, text, outcome.simulated_s))
    return played


def play_many(seeds: Iterable[int], limit_s: float, workers: int | None = None) -> Iterator[Played]:
    """Play histories until there are no more seeds, or time is up."""
    source = iter(seeds)
    chunks: Iterator[list[int]] = iter(lambda: list(itertools.islice(source, CHUNK)), [])
    until_s = time.monotonic() + limit_s
    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        running: set[Future[list[Played]]] = set()
        for chunk in chunks:
            running.add(pool.submit(play, chunk))
            while len(running) > 2 * (workers or os.cpu_count() or 1):
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield from future.result()
            if time.monotonic() > until_s:
                break
        for future in running:
            if time.monotonic() > until_s and future.cancel():
                continue
            yield from future.result()


def main() -> int:
    """Play what the arguments say; print what failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim.many", description=__doc__)
    parser.add_argument("--rounds", type=int, help="play so many histories")
    parser.add_argument("--hours", type=float, help="play for so long")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--chance", action="store_true", help="begin at a seed by chance")
    parser.add_argument("--kind", choices=[kind.name for kind in KINDS], help="play only these")
    parser.add_argument("--workers", type=int, help="processes; else one for each processor")
    options = parser.parse_args()
    first = options.first
    if options.chance:
        first = random.SystemRandom().randrange(1 << 40)
        print(f"first seed {first}", flush=True)
    seeds = seeds_from(first)
    if options.kind is not None:
        seeds = (seed for seed in seeds_of(options.kind) if abs(seed) >= first)
    if options.rounds is not None:
        seeds = itertools.islice(seeds, options.rounds)
    hours = options.hours if options.hours is not None else 24.0 * 365
    count = failed = 0
    simulated_s, begun_s = 0.0, time.monotonic()
    told_s = begun_s
    for played in play_many(seeds, hours * 3600, options.workers):
        count += 1
        simulated_s += played.simulated_s
        if played.error is not None:
            failed += 1
            print(
                f"seed {played.seed}, {kind_of(played.seed).name}: {played.error[:300]}", flush=True
            )
        if time.monotonic() - told_s > 60:
            told_s = time.monotonic()
            print(f"{count} histories, {failed} failed", flush=True)
    took_s = time.monotonic() - begun_s
    print(
        f"{count} histories ({simulated_s / 3600:.1f} simulated hours) in {took_s:.0f} s, "
        f"{failed} failed; make sim SEED=n replays one"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
