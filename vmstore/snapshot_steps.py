"""`SnapshotSteps`: what the holder of an image does to take a snapshot of it, or go back to one.

The stages stand in `vmstore/freezing.py`. Pure, as `vmstore/holder.py` is, whose part this is.
"""

from abc import ABC, abstractmethod
from collections.abc import Set
from dataclasses import dataclass

from etcd.images import ImageRecord
from vmstore.effects import ChangeMembership, Effect, Freeze, TellLayers, Thaw
from vmstore.freezing import HELD_LIMIT_S, Stage, is_unstored
from vmstore.merging import AGAIN_S
from vmstore.standing import Phase, State

RETRY_S = 0.5
"""Until etcd is asked again for a change it did not answer."""


@dataclass(slots=True)
class SnapshotSteps(State, ABC):
    """See the module."""

    @abstractmethod
    def _go_on(self) -> list[Effect]:
        """Do what can be done now."""

    @abstractmethod
    def _end_heal(self, attempt: int) -> list[Effect]:
        """End the heal that is under way."""

    @property
    def changes_record(self) -> bool:
        """Whether the record is being changed, or about to be: no other change may be made."""
        freezing = self.freezing
        withdraws = freezing.withdraws is not None
        return self.proposal is not None or self.paused or freezing.holds or withdraws

    def _freeze(self) -> list[Effect]:
        """Begin to freeze for the change that is wanted, if all nodes in sync are well."""
        freezing = self.freezing
        if freezing.stage is not Stage.WAITING or self.phase is not Phase.SERVING:
            return []
        changes = freezing.withdraws or self.storing or self.retry_at_s is not None
        if changes or self.now_s < freezing.not_before_s or not self._all_are_well():
            return []
        ended: list[Effect] = []
        if freezing.drops_layers and self.heals.now is not None:
            # It copies layers that go. It begins anew when they have.
            ended = self._end_heal(self.heals.now.attempt)
        return [*ended, Freeze(freezing.freeze(self.now_s))]

    def _all_are_well(self) -> bool:
        in_sync = self._in_sync_names()
        return all(map(self._is_well, in_sync)) and not in_sync & (self.levelling | self.emptied)

    def _watch_freeze(self) -> list[Effect]:
        """Thaw where a node is lost: the record has to leave it behind first."""
        if self._all_are_well():
            return []
        self.freezing.wait(self.now_s)
        thaw = Thaw(self.freezing.attempt)
        if self.freezing.held_s < HELD_LIMIT_S:
            return [thaw, *self._go_on()]
        why = "a node in sync was lost again and again as the image was frozen; try again"
        return [thaw, *self._end_freezing(why), *self._go_on()]

    def _on_holding(self, attempt: int) -> list[Effect]:
        if self.freezing.is_of_now(attempt):
            self.freezing.holds_since(self.now_s)
        return []

    def _on_frozen(self, attempt: int) -> list[Effect]:
        assert self.record is not None
        if not self.freezing.is_of_now(attempt):
            return []
        self.proposal = self.freezing.propose(self.record, self.now_s)
        return [ChangeMembership(self.record, self.proposal)]

    def _on_freeze_failed(self, attempt: int, why: str) -> list[Effect]:
        freezing = self.freezing
        if not freezing.is_of_now(attempt):
            return []
        freezing.wait(self.now_s, RETRY_S)
        if freezing.held_s < HELD_LIMIT_S:
            # The engine knew of a loss before us, which comes to the record first.
            return self._go_on()
        return [*self._end_freezing(f"{why}; try again"), *self._go_on()]

    def _on_stored(self, generation: int) -> list[Effect]:
        assert self.record is not None
        if generation != self.record.generation:
            return []
        self.storing = False
        if self.freezing.stage is not Stage.STORING:
            return []
        return self._end_freezing()

    def _end_freezing(self, failed: str | None = None, *, unknown: bool = False) -> list[Effect]:
        """It is over: tell who waits to hear of it, if anybody does."""
        is_ordered = self.freezing.is_ordered
        if failed is not None and not is_ordered:
            self.merging.not_before_s = self.now_s + AGAIN_S
        self.freezing.end()
        return [TellLayers(failed, unknown)] if is_ordered else []

    def _yield_to_order(self) -> None:
        """What nobody waits for is given up for what somebody does, if it has not begun."""
        if self.freezing.stage is Stage.WAITING:
            assert not self.freezing.is_ordered, "one order at a time"
            self.freezing.end()

    def _give_up_layers(self, why: str, *, maybe_taken: bool = True) -> list[Effect]:
        """End a change of layers; where it can be withdrawn, it is once that is known.

        Unless it is `maybe_taken` etcd surely has nothing of it.
        """
        freezing = self.freezing
        if freezing.stage is Stage.NONE:
            return []
        held = freezing.stage in (Stage.FREEZING, Stage.CHANGING)
        in_doubt = freezing.stage is Stage.CHANGING and maybe_taken
        if in_doubt:
            freezing.withdraws = freezing.withdrawable
        unknown = freezing.stage is Stage.STORING or (in_doubt and freezing.withdraws is None)
        thaw: list[Effect] = [Thaw(freezing.attempt)] if held else []
        return [*thaw, *self._end_freezing(why, unknown=unknown)]

    @property
    def _awaits_rollback(self) -> bool:
        """Whether etcd is asked for a rollback: neither it nor the former layers may be gone by."""
        return self.freezing.stage is Stage.CHANGING and self.freezing.withdrawable is None

    def _withdraws(self, lost: Set[str] = frozenset()) -> bool:
        """Whether a change is to be withdrawn, or the record's newest snapshot: see `freezing`.

        Of an image that is being opened its nodes in sync tell, but for `lost` ones. One that has
        not stored it is needed of each replica set: a set whose nodes have may have answered writes
        to the layer on top.
        """
        assert self.record is not None
        if self.freezing.withdraws is not None:
            return True
        if self.phase is not Phase.GATHERING:
            return False
        names = self._in_sync_names() - self.emptied - lost
        known = {name: self.nodes[name].peeked for name in names}
        heard = [peeked for peeked in known.values() if peeked is not None]
        of_sets = self.record.membership.in_sync_sets()
        return (
            len(heard) == len(names)
            and all(of_set & names for of_set in of_sets)
            and is_unstored(self.record, heard)
        )

    def _withdrawn(self, record: ImageRecord) -> ImageRecord:
        """Return the record to propose where something is withdrawn."""
        change = self.freezing.withdraws
        return record.without_newest_snapshot() if change is None else change.withdrawn_from(record)
