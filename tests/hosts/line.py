"""What a bad line does to frames: late, lost, twice, out of order. Pure.

A frame that enters leaves zero, one or two times. Frames leave in the order in which they came,
but for those that overtake (`reorder`): they leave at once, as on a line with two ways.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from random import Random

LONGEST_QUEUE = 20_000
"""Frames. A full queue drops what comes, as a router's does; TCP stops far below it."""


@dataclass(frozen=True)
class Line:
    """How one direction of a line behaves; chances are of 1."""

    delay_ms: float = 0.0
    jitter_ms: float = 0.0
    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0


@dataclass(order=True, frozen=True)
class Leaving:
    """A frame on its way: when it leaves, and where it goes."""

    due_s: float
    number: int
    target: int
    frame: bytes


class Queue:
    """Frames that have not left yet. Time arrives in the calls."""

    def __init__(self, chance: Random) -> None:
        self._chance = chance
        self._heap: list[Leaving] = []
        self._number = 0
        self._last_s: dict[tuple[int, int], float] = {}

    def take(self, now_s: float, source: int, target: int, line: Line, frame: bytes) -> None:
        """Lets a frame enter the line from `source` to `target`."""
        if self._chance.random() < line.loss:
            return
        copies = 2 if self._chance.random() < line.duplicate else 1
        for _ in range(copies):
            if len(self._heap) >= LONGEST_QUEUE:
                return
            self._number += 1
            due_s = self._due_s(now_s, (source, target), line)
            heapq.heappush(self._heap, Leaving(due_s, self._number, target, frame))

    def next_s(self) -> float | None:
        """When the next frame leaves, or None where there is none."""
        return self._heap[0].due_s if self._heap else None

    def leave(self, now_s: float) -> Leaving | None:
        """Takes out the next frame that is due, or None."""
        return heapq.heappop(self._heap) if self._heap and self._heap[0].due_s <= now_s else None

    def _due_s(self, now_s: float, way: tuple[int, int], line: Line) -> float:
        if self._chance.random() < line.reorder:
            return now_s
        jitter_ms = line.jitter_ms * self._chance.uniform(-1.0, 1.0)
        due_s = now_s + max(0.0, line.delay_ms + jitter_ms) / 1000
        due_s = max(due_s, self._last_s.get(way, 0.0))
        self._last_s[way] = due_s
        return due_s
