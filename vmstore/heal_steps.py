"""`HealSteps`: what the holder of an image does to heal stale nodes while it serves.

Which node comes next, and when, stands in `vmstore/healing.py`. Pure, as `vmstore/holder.py` is,
whose part this is.
"""

from abc import ABC
from dataclasses import dataclass

from etcd.images import ImageRecord
from vmstore.ancestor_steps import AncestorSteps
from vmstore.effects import Effect, EndHeal, Heal
from vmstore.standing import Phase, Standing


@dataclass(slots=True)
class HealSteps(AncestorSteps, ABC):
    """See the module."""

    def _begin_heal(self) -> list[Effect]:
        """Begin to heal a stale node that is there, unless one is being healed."""
        assert self.record is not None
        if self.phase is not Phase.SERVING or (self.freezing.holds and self.freezing.drops_layers):
            return []
        up = {name for name, node in self.nodes.items() if node.standing is Standing.UP}
        serving = up - self.levelling
        begun = self.heals.begin(
            self.record.membership,
            self._may_be_healed,
            lambda name: self.nodes[name].instance,
            serving,
            self.now_s,
            self._lacks,
        )
        if begun is None:
            return []
        node = self.nodes[begun.node]
        if node.standing is Standing.WAITING:
            node.standing = Standing.HEALING
        serial = node.peeked.serial if node.peeked is not None else 0
        return [Heal(begun.node, serial, begun.attempt, tuple(sorted(begun.sets.items())))]

    def _may_be_healed(self, name: str) -> bool:
        """A node that is in sync in another set is let in first.

        Those that are in sync with it there may wait for that, clients' writes for them, and the
        heal for the writes.
        """
        assert self.record is not None
        node = self.nodes[name]
        waits = node.standing is Standing.WAITING
        let_in_first = waits and name in self.record.membership.all_in_sync()
        there = waits or node.standing is Standing.UP
        there = there and not self.slowness.rests(name, self.now_s) and self._has_ancestors(name)
        return there and not let_in_first and not self._is_failing(node) and self._is_told(name)

    def _to_take_in(self) -> dict[int, set[str]]:
        """One that is made level is asked about once more: see `vmstore/ancestry.py`."""
        taken_in = self.heals.to_take_in() if self.phase is Phase.SERVING else {}
        heal = self.heals.now
        if heal is None or not self._has_ancestors(heal.node):
            return {}
        return {} if any(self._lacks(heal.node, index) for index in taken_in) else taken_in

    def _give_up_heal(self) -> list[Effect]:
        """Nobody waits for a node that is lost, unless it may have been taken in."""
        heal = self.heals.now
        if heal is not None and self.slowness.too_slow({heal.node}, self.now_s) is not None:
            # Changes of what is level wait for it as for a node in sync.
            self.slowness.left_behind(heal.node, self.now_s)
            return self._end_heal(heal.attempt)
        if heal is None or not heal.healed:
            return []
        node = self.nodes[heal.node]
        there = node.standing in (Standing.HEALING, Standing.UP) and not self._is_failing(node)
        if there and self.phase is Phase.SERVING:
            return []
        return self._end_heal(heal.attempt)

    def _end_heal(self, attempt: int) -> list[Effect]:
        self._on_heal_failed(attempt)
        return [EndHeal(attempt)]

    def _on_heal_failed(self, attempt: int) -> None:
        name = self.heals.failed(attempt, self.now_s)
        if name is not None and self.nodes[name].standing is Standing.HEALING:
            self.nodes[name].standing = Standing.WAITING

    def _on_taken_in(self, record: ImageRecord) -> None:
        """Count a healed node as up; where its connection broke, the same instance resumes."""
        heal = self.heals.taken_in(record.membership)
        if heal is None:
            return
        self.emptied.discard(heal.node)
        self.ancestry.blamed.discard(heal.node)
        node = self.nodes[heal.node]
        node.served_as = heal.instance
        if node.standing is Standing.HEALING:
            node.standing = Standing.UP
