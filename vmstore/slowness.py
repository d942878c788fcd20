"""Which nodes keep clients waiting, and which of them an image goes on without. Pure.

The engine tells, second by second, how much later than the quickest a node answers. Averages over
`for_s` count, so that a checkpoint or a hiccup does not.

    a node is   when                                        until
    slow        its average is at least `report_ms`         half of that, or nobody asks it
    too slow    its average is at least `leave_behind_ms`   less than that
    resting     it was left behind for that                 `back_after_s` later; twice as long
                                                            each time that it happens again
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

LONGEST_REST_S = 3600.0
GOOD_CONDUCT = 10
"""A node that was quick for so many times its rest has no past any more."""


@dataclass(frozen=True, slots=True)
class SlowLimits:
    """What is slow, and what too slow.

    A sound SSD answers in under a millisecond and syncs in some, one that is worn out or shared
    takes a hundred times as long: worth a word. With seconds for each write a guest stands still,
    and its own limits (30 s for a disk in Linux) are near.
    """

    report_ms: int = 200
    leave_behind_ms: int = 2000
    """0: never; else at least `report_ms`."""
    for_s: float = 10.0
    """Shorter than what a guest's own limits are, longer than a checkpoint takes."""
    back_after_s: float = 60.0


@dataclass(slots=True)
class _Node:
    lags: deque[tuple[float, int]] = field(default_factory=deque)
    slow: bool = False
    rests: int = 0
    instance: int | None = None
    until_s: float = float("-inf")
    """Until when it is not healed."""


@dataclass(slots=True)
class Slowness:
    """Of the nodes of one image."""

    limits: SlowLimits = field(default_factory=SlowLimits)
    _nodes: dict[str, _Node] = field(default_factory=dict)

    def heard(self, lags: Mapping[str, int], now_s: float) -> None:
        """Take how many milliseconds nodes lagged in the last second."""
        for name, lag_ms in lags.items():
            self._nodes.setdefault(name, _Node()).lags.append((now_s, lag_ms))
        self.look(now_s)

    def look(self, now_s: float) -> None:
        """Time has passed: what is long ago no longer counts."""
        limits = self.limits
        for node in self._nodes.values():
            while node.lags and node.lags[0][0] < now_s - limits.for_s:
                node.lags.popleft()
            average_ms = _average(node.lags)
            if self._is_lasting(node, now_s):
                node.slow = average_ms >= limits.report_ms / (2 if node.slow else 1)
            elif not node.lags:
                node.slow = False
            if now_s > node.until_s + GOOD_CONDUCT * self._rest_s(node.rests):
                node.rests = 0

    def _is_lasting(self, node: _Node, now_s: float) -> bool:
        """Whether what is known covers enough time, most of it, to judge by."""
        for_s = self.limits.for_s
        enough = len(node.lags) >= max(2, int(for_s / 2))
        return enough and now_s - node.lags[0][0] >= 0.8 * for_s

    def slow(self) -> dict[str, int]:
        """Return the nodes that are slow, and by how many milliseconds."""
        return {name: _average(node.lags) for name, node in self._nodes.items() if node.slow}

    def too_slow(self, names: Iterable[str], now_s: float) -> str | None:
        """Return the slowest of these nodes, if it is too slow to be waited for."""
        limit_ms = self.limits.leave_behind_ms
        if limit_ms == 0:
            return None
        known = [(name, self._nodes[name]) for name in names if name in self._nodes]
        found = [
            (_average(node.lags), name)
            for name, node in known
            if self._is_lasting(node, now_s) and _average(node.lags) >= limit_ms
        ]
        return max(found)[1] if found else None

    def left_behind(self, name: str, now_s: float) -> None:
        """It rests now, and is healed after that."""
        node = self._nodes.setdefault(name, _Node())
        node.lags.clear()
        node.slow = False
        node.until_s = now_s + self._rest_s(node.rests + 1)
        node.rests += 1

    def rests(self, name: str, now_s: float) -> bool:
        """Whether a node that was left behind for slowness is not healed yet."""
        node = self._nodes.get(name)
        return node is not None and now_s < node.until_s

    def resting(self, now_s: float) -> dict[str, float]:
        """Return the nodes that rest, and for how many seconds more."""
        return {
            name: node.until_s - now_s for name, node in self._nodes.items() if now_s < node.until_s
        }

    def came(self, name: str, instance: int, now_s: float) -> None:
        """A node has connected; one that was started anew need not rest: perhaps it is mended."""
        node = self._nodes.setdefault(name, _Node())
        if node.instance is not None and node.instance != instance:
            node.until_s = min(node.until_s, now_s)
        node.instance = instance

    def gone(self, name: str) -> None:
        """Its connection is: what it answered before says nothing of what comes back."""
        node = self._nodes.get(name)
        if node is not None:
            node.lags.clear()
            node.slow = False

    def _rest_s(self, rests: int) -> float:
        doubled = self.limits.back_after_s * 2.0 ** min(max(rests - 1, 0), 16)
        return min(doubled, max(LONGEST_REST_S, self.limits.back_after_s))


def _average(lags: Iterable[tuple[float, int]]) -> int:
    known = [lag_ms for _, lag_ms in lags]
    return sum(known) // len(known) if known else 0
