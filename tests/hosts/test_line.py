"""What a bad line does to frames, without any network."""

from __future__ import annotations

from random import Random

from tests.hosts.line import LONGEST_QUEUE, Line, Queue

FRAMES = 4000


def carried(line: Line, seed: int = 1) -> list[tuple[float, int]]:
    """When each frame left and which it was; one enters each millisecond."""
    queue = Queue(Random(seed))
    left: list[tuple[float, int]] = []
    for number in range(FRAMES):
        queue.take(number / 1000, 1, 2, line, number.to_bytes(4, "big"))
    while (next_s := queue.next_s()) is not None:
        leaving = queue.leave(next_s)
        assert leaving is not None and leaving.target == 2
        left.append((next_s, int.from_bytes(leaving.frame, "big")))
    return left


def test_whole_line_delivers_all_at_once_and_in_order() -> None:
    assert carried(Line()) == [(number / 1000, number) for number in range(FRAMES)]


def test_delay_is_added_and_jitter_keeps_the_order() -> None:
    left = carried(Line(delay_ms=100, jitter_ms=20))
    assert [number for _, number in left] == list(range(FRAMES))
    waited = [at_s - number / 1000 for at_s, number in left]
    assert min(waited) >= 0.08 - 1e-9 and max(waited) <= 0.12 + 1e-9


def test_chances_are_kept_and_follow_from_the_seed() -> None:
    line = Line(delay_ms=10, loss=0.1, duplicate=0.2, reorder=0.05)
    left = carried(line)
    numbers = [number for _, number in left]
    assert 0.87 < len(set(numbers)) / FRAMES < 0.93
    assert 0.15 < (len(numbers) - len(set(numbers))) / FRAMES < 0.21
    assert numbers != sorted(numbers)
    assert carried(line) == left
    assert carried(line, seed=2) != left


def test_full_queue_drops_what_comes() -> None:
    queue = Queue(Random(1))
    for _ in range(LONGEST_QUEUE + 10):
        queue.take(0.0, 1, 2, Line(delay_ms=1), b"")
    count = 0
    while queue.leave(1.0) is not None:
        count += 1
    assert count == LONGEST_QUEUE
