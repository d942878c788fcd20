"""What goes between an arbiter and who asks it: whom a request is for, and how it is answered.

Both ends know these, so they need neither the arbiter's record nor its log. See arbiter.proto.
"""

from dataclasses import dataclass
from enum import Enum

from arbiter.vote import Refusal


@dataclass(frozen=True, slots=True)
class Addressee:
    """Whom a request is meant for, and what its sender knows of it. See arbiter.proto."""

    arbiter: str
    start_counter: int = 0
    changes: int = 0


class Verdict(Enum):
    """How a request was answered. See arbiter.proto."""

    GRANTED = "granted"
    REFUSED = "refused"
    OTHER_ARBITER = "other_arbiter"
    BEHIND = "behind"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer; `changes` counts how often the image's votes have changed."""

    verdict: Verdict
    changes: int = 0
    refusal: Refusal | None = None
    detail: str = ""
