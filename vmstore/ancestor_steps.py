"""`AncestorSteps`: what the holder of a clone does about ancestors that are not whole on its nodes.

What it goes by stands in `vmstore/ancestry.py`. Pure, as `vmstore/holder.py` is, whose part this
is. Of an image that is no clone nothing here does anything.
"""

from abc import ABC
from dataclasses import dataclass

from shard.membership import Stale
from vmstore.ancestry import AGAIN_S
from vmstore.effects import Effect, LookAtAncestors, MendParent, Peek
from vmstore.merge_steps import MergeSteps
from vmstore.standing import Phase, Standing


@dataclass(slots=True)
class AncestorSteps(MergeSteps, ABC):
    """See the module."""

    @property
    def _is_clone(self) -> bool:
        return self.record is not None and self.record.parent is not None

    def _judge_ancestors(self, name: str) -> None:
        """A node told what it has: without what a clone begins on it has nothing of it."""
        self.ancestry.forget(name)
        peeked = self.nodes[name].peeked
        if not self._is_clone or peeked is None:
            return
        if peeked.parent_missing:
            # Also where it is stale already: nothing that it has is believed.
            self._blame(name)

    def _blame(self, name: str) -> None:
        if name not in self.emptied:
            self.emptied.add(name)
            self.ancestry.blamed.add(name)

    def _clear(self, name: str) -> None:
        """Take that back; what is known of its own disk stays (`_judge_disks`)."""
        assert name in self.ancestry.blamed, "for this alone"
        self.ancestry.blamed.discard(name)
        self.emptied.discard(name)

    def _needs_look(self, name: str) -> bool:
        """Whether etcd has to be asked before a node comes in.

        One that is in sync and has stored the clone's record had all of its ancestors then.
        """
        assert self.record is not None
        peeked = self.nodes[name].peeked
        unknown = peeked is None or peeked.record is None or name in self.ancestry.blamed
        return self._is_clone and (unknown or self._is_stale(name))

    def _is_stale(self, name: str) -> bool:
        assert self.record is not None
        return any(name in nodes for nodes in self.record.stale.values())

    def _has_ancestors(self, name: str) -> bool:
        """Whether it is known that a node has what a clone begins on, of some replica set."""
        peeked = self.nodes[name].peeked
        missing = peeked is not None and peeked.parent_missing
        return not self._is_clone or (self.ancestry.knows(name) and not missing)

    def _lacks(self, name: str, index: int) -> bool:
        return self._is_clone and self.ancestry.lacks(name, index)

    def _may_come(self, name: str) -> bool:
        """Whether a node that is in sync may be let in."""
        if not self._needs_look(name):
            return True
        return self._has_ancestors(name) and not self._lacks_where_in_sync(name)

    def _lacks_where_in_sync(self, name: str) -> bool:
        """Whether it may lack something in a replica set in which the clone calls it in sync."""
        assert self.record is not None
        sets = self.record.membership.in_sync_sets()
        return any(name in of_set and self._lacks(name, i) for i, of_set in enumerate(sets))

    def _look_at_ancestors(self) -> list[Effect]:
        """Ask etcd, where a node waits for what it says."""
        if not self._is_clone or self.phase in (Phase.TAKING, Phase.RELEASING, Phase.ENDED):
            return []
        heal = self.heals.now
        awaits = [
            name
            for name, node in self.nodes.items()
            if (node.standing in (Standing.WAITING, Standing.UP) and self._needs_look(name))
            or (heal is not None and heal.healed and heal.node == name)
        ]
        if all(map(self.ancestry.knows, awaits)):
            return []
        look = self.ancestry.look(self.now_s)
        return [] if look is None else [LookAtAncestors(look)]

    def _on_ancestors_seen(self, look: int, lacking: Stale) -> list[Effect]:
        assert self.record is not None
        if not self.ancestry.saw(look, lacking):
            return []
        mend = False
        for name, node in self.nodes.items():
            if node.peeked is None or not self.ancestry.knows(name):
                continue
            lacks = self.ancestry.lacks_any(name)
            lost = node.peeked.parent_missing or name in self.emptied - self.ancestry.blamed
            mend = mend or (lost and not lacks)
            waits = node.standing is Standing.WAITING and self._needs_look(name)
            if waits and self._lacks_where_in_sync(name):
                self._blame(name)
            elif name in self.ancestry.blamed and not lacks and not node.peeked.parent_missing:
                self._clear(name)
        mending: list[Effect] = [MendParent()] if mend else []
        return [*mending, *self._end_unfounded_heal(), *self._go_on()]

    def _end_unfounded_heal(self) -> list[Effect]:
        """A node that was made level while an ancestor was not whole there is healed again."""
        heal = self.heals.now
        if heal is None or not heal.healed or not self.ancestry.knows(heal.node):
            return []
        unfounded = any(self.ancestry.lacks(heal.node, index) for index in heal.sets)
        return self._end_heal(heal.attempt) if unfounded and self.proposal is None else []

    def _on_ancestors_unseen(self, look: int, why: str) -> list[Effect]:
        self.ancestry.failed(look, self.now_s)
        self.trouble = f"the images that this one is a clone of cannot be looked up: {why}"
        return []

    def _ask_again(self) -> list[Effect]:
        """Now and then ask nodes anew that lacked something, and etcd with that."""
        if not self._is_clone or self.phase not in (Phase.GATHERING, Phase.JOINING, Phase.SERVING):
            return []
        if self.now_s - self.ancestry.asked_s < AGAIN_S:
            return []
        self.ancestry.asked_s = self.now_s
        again: list[Effect] = []
        for name, node in self.nodes.items():
            peeked = node.peeked
            missing = peeked is not None and peeked.parent_missing
            if not missing and not (self.ancestry.knows(name) and self.ancestry.lacks_any(name)):
                continue
            self.ancestry.forget(name)
            if node.standing is Standing.WAITING:
                node.standing = Standing.ASKED
                again.append(Peek(name))
        return again
