"""How heals come along, for people: those under way and the last that ended well, and nodes that
cannot fetch from each other what they lack."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from shard.ids import ImageId

FINISHED_KEPT = 64
"""Heals that are remembered: those of an evening, in which one node was replaced."""


@dataclass(frozen=True, slots=True)
class HealOf:
    """A heal, and what it has copied if that is known. `finished_at` is in seconds since 1970."""

    image: ImageId
    name: str
    node: str
    begun_s: float
    bytes_done: int = 0
    bad_blocks: int = 0
    seconds: float = 0.0
    finished_at: float | None = None

    @property
    def bytes_per_second(self) -> int:
        """Return its speed on the whole."""
        return int(self.bytes_done / self.seconds) if self.seconds > 0 else 0


@dataclass(frozen=True, slots=True)
class HealTotals:
    """How many heals ended, and how; those that failed are begun anew."""

    done: int = 0
    failed: int = 0
    copied_bytes: int = 0
    """By those that are done."""


class HealLog:
    """The heals of one gateway. One thread writes, any may read."""

    def __init__(self) -> None:
        self._totals = HealTotals()
        self._now: dict[ImageId, HealOf] = {}
        self._finished: deque[HealOf] = deque(maxlen=FINISHED_KEPT)
        self._unreached: Mapping[tuple[str, str], int] = {}

    def begins(self, image: ImageId, name: str, node: str, now_s: float) -> None:
        """A node's heal begins; `now_s` on a clock that only grows."""
        self._now[image] = HealOf(image, name, node, now_s)

    def level(self, image: ImageId, bytes_done: int, bad_blocks: int, now_s: float) -> None:
        """The node is level; its record does not say so yet."""
        heal = self._now.get(image)
        if heal is not None:
            seconds = now_s - heal.begun_s
            self._now[image] = replace(
                heal, bytes_done=bytes_done, bad_blocks=bad_blocks, seconds=seconds
            )

    def taken_in(self, image: ImageId, wall_s: float) -> None:
        """The node is in sync; `wall_s` in seconds since 1970."""
        heal = self._now.pop(image, None)
        if heal is not None:
            self._finished.append(replace(heal, finished_at=wall_s))
            self._totals = replace(
                self._totals,
                done=self._totals.done + 1,
                copied_bytes=self._totals.copied_bytes + heal.bytes_done,
            )

    def fails(self, image: ImageId) -> None:
        """The heal could not go on."""
        if self._now.pop(image, None) is not None:
            self._totals = replace(self._totals, failed=self._totals.failed + 1)

    def ends(self, image: ImageId) -> None:
        """The heal ended early, or the image is closed."""
        self._now.pop(image, None)

    def unreached(self, source: str, target: str) -> None:
        """A node could not fetch blocks from another one: they come through the gateway."""
        pair = source, target
        self._unreached = {**self._unreached, pair: self._unreached.get(pair, 0) + 1}

    def pulls_unreached(self) -> Mapping[tuple[str, str], int]:
        """Return how often that was so since the gateway started, by source and target."""
        return self._unreached

    def totals(self) -> HealTotals:
        """Return how many ended since the gateway started."""
        return self._totals

    def under_way(self, image: ImageId) -> HealOf | None:
        """Return the heal of an image."""
        return self._now.get(image)

    def finished(self) -> Sequence[HealOf]:
        """Return the last heals that ended well, the latest last."""
        return tuple(self._finished)
