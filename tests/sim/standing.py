"""What was seen of an image's record on nodes, and of its votes on arbiters: none of it goes back.

A node that is killed keeps what it has; one that loses power may lose the record that it had not
synced, but no part that an answered write rests on. A disk that was put back starts anew.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.sim.oracle import Violation


@dataclass(slots=True)
class Standing:
    """The highest epoch and generation that somebody was seen with, and the highest relied on."""

    seen_epoch: int = 0
    seen_generation: int = 0
    durable_epoch: int = 0
    durable_generation: int = 0


class Standings:
    """Of all who keep something of one image, by their name."""

    def __init__(self) -> None:
        self._known: dict[str, Standing] = {}

    def see(self, name: str, found: tuple[int, int] | None) -> None:
        """Judge what somebody has now: epoch and generation, None: nothing. Raises Violation."""
        epoch, generation = found or (0, 0)
        known = self._known.get(name)
        if known is None:
            if found is not None:
                self._known[name] = Standing(epoch, generation)
            return
        if epoch < known.seen_epoch or generation < known.seen_generation:
            has = f"epoch {epoch}, generation {generation}" if found else "no record"
            raise Violation(
                f"{name} goes back: it had epoch {known.seen_epoch}, generation "
                f"{known.seen_generation}, and has {has}"
            )
        known.seen_epoch, known.seen_generation = epoch, generation

    def rely(self, name: str, epoch: int, generation: int) -> None:
        """Note what somebody has to have durably: an answered write rests on it."""
        known = self._known.setdefault(name, Standing())
        known.durable_epoch = max(known.durable_epoch, epoch)
        known.durable_generation = max(known.durable_generation, generation)

    def power_lost(self, name: str) -> None:
        """What somebody had not synced may be gone."""
        known = self._known.get(name)
        if known is not None:
            known.seen_epoch = known.durable_epoch
            known.seen_generation = known.durable_generation

    def put_back(self, name: str) -> None:
        """Somebody has another disk: nothing is known of it."""
        self._known.pop(name, None)
