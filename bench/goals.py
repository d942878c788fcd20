"""What a figure is to be, and whether it is: shown as met or missed, never asserted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """A figure beside its goal. `figure` is None where it was not measured."""

    what: str
    figure: float | None
    bound: float
    at_least: bool

    @property
    def is_met(self) -> bool | None:
        """None where there is no figure to judge."""
        if self.figure is None:
            return None
        return self.figure >= self.bound if self.at_least else self.figure <= self.bound

    @property
    def text(self) -> str:
        """The goal, and what became of it, for a table's cell."""
        goal = f"{'≥' if self.at_least else '≤'} {self.bound:g}"
        return goal if self.is_met is None else f"{goal}: {'met' if self.is_met else 'missed'}"

    def as_json(self) -> dict[str, str | float | bool | None]:
        """The same for programs."""
        return {
            "what": self.what,
            "figure": self.figure,
            "goal": self.bound,
            "at_least": self.at_least,
            "is_met": self.is_met,
        }


def at_least(what: str, figure: float | None, bound: float) -> Verdict:
    """`figure` is to be `bound` or more."""
    return Verdict(what, figure, bound, at_least=True)


def at_most(what: str, figure: float | None, bound: float) -> Verdict:
    """`figure` is to be `bound` or less."""
    return Verdict(what, figure, bound, at_least=False)


def tally(verdicts: Sequence[Verdict]) -> str:
    """How many goals were met, and which were missed, in a line."""
    judged = [verdict for verdict in verdicts if verdict.is_met is not None]
    missed = [verdict.what for verdict in judged if not verdict.is_met]
    text = f"{len(judged) - len(missed)} of {len(judged)} goals met"
    if left := len(verdicts) - len(judged):
        text += f", {left} not measured"
    return f"{text}; missed: {', '.join(missed)}" if missed else text
