"""When an image is scrubbed. Pure.

A scrub that was asked for comes first, then one that was begun and not ended, then what the last
one passed over, where a node was away that is in sync again, then what the schedule says. An image
that was never scrubbed waits as long as one that was scrubbed when it was first seen, so that a
cluster does not begin its life with reading everything.
"""

from dataclasses import dataclass
from enum import IntEnum

SECONDS_PER_DAY = 86_400


@dataclass(frozen=True, slots=True)
class ScrubLimits:
    """How often everything is read, and how much of the hosts that may take.

    A disk that loses a sector loses more soon: a week leaves time for a repair from replicas that
    are still whole. 32 MiB/s reads 19 TB in a week, and is a tenth of what one disk gives.
    """

    every_s: int = 7 * SECONDS_PER_DAY
    """0: only when somebody asks."""
    bytes_per_second: int = 32 << 20
    """On each node; 0: as fast as it goes."""
    share_percent: int = 10
    """Of the time, while guests want something."""


class Due(IntEnum):
    """Why an image is to be scrubbed now; the lowest first."""

    ASKED = 1
    BEGUN = 2
    MISSED = 3
    SCHEDULED = 4


@dataclass(frozen=True, slots=True)
class Times:
    """What was when, in milliseconds since 1970; 0: never."""

    seen_ms: int = 0
    asked_ms: int = 0
    stopped_ms: int = 0
    begun_ms: int = 0
    finished_ms: int = 0

    @property
    def is_asked(self) -> bool:
        """Whether somebody waits for a scrub that is not begun."""
        return self.asked_ms > max(self.stopped_ms, self.begun_ms)

    @property
    def is_under_way(self) -> bool:
        """Whether one was begun and is not through, be somebody at it or not."""
        return self.begun_ms > max(self.stopped_ms, self.finished_ms)


def due(
    times: Times, limits: ScrubLimits, now_ms: int, *, missed_is_back: bool = False
) -> Due | None:
    """Return why an image is to be scrubbed now, if it is.

    `missed_is_back`: a node that was away for some of the last scrub is in sync again.
    """
    if times.is_asked:
        return Due.ASKED
    if times.is_under_way:
        return Due.BEGUN
    if missed_is_back and times.finished_ms > times.stopped_ms:
        return Due.MISSED
    last_ms = max(times.seen_ms, times.stopped_ms, times.finished_ms)
    if limits.every_s and last_ms and now_ms - last_ms >= limits.every_s * 1000:
        return Due.SCHEDULED
    return None
