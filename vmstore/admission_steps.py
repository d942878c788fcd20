"""`AdmissionSteps`: how the holder of an image lets nodes in that are in sync and have come.

Pure, as `vmstore/holder.py` is, whose part this is.
"""

from abc import ABC
from dataclasses import dataclass

from vmstore.effects import Admit, Effect, Peek, Serve
from vmstore.heal_steps import HealSteps
from vmstore.standing import Phase, Standing


@dataclass(slots=True)
class AdmissionSteps(HealSteps, ABC):
    """See the module."""

    def _let_in(self) -> list[Effect]:
        """Admit nodes that wait, if they are in sync and level can be told from stale.

        One admission at a time: its outcome is that of all nodes that join. In one of its sets a
        node that joins needs one that is up, to be made equal to, or every other one that is in
        sync beside it: one that is away may have answered what this one has lost. So may a healed
        one of which is not yet known whether the record takes it in. In its other sets nothing is
        asked of it before the same holds there.
        """
        assert self.record is not None
        if self.phase is Phase.GATHERING and self._withdraws():
            # Nodes would store what is to be withdrawn.
            return []
        membership = self.record.membership
        waiting = {name for name in membership.all_in_sync() if self._may_be_let_in(name)}
        resume = {name for name in waiting if self._resumes(name)}
        effects: list[Effect] = []
        if resume:
            effects.append(self._admit(tuple(sorted(resume)), resume=True))
        if any(node.standing is Standing.JOINING for node in self.nodes.values()):
            return effects
        join = waiting - resume
        while True:
            founded: set[str] = set()
            for index, in_sync in enumerate(membership.in_sync_sets()):
                undecided = index in self.heals.to_take_in()
                if self._is_founded(in_sync) or (not undecided and in_sync <= join):
                    founded |= in_sync & join
            if founded == join:
                break
            join = founded
        if join and self._may_join(join):
            effects.append(self._admit(tuple(sorted(join)), resume=False))
        return effects

    def _may_be_let_in(self, name: str) -> bool:
        node = self.nodes[name]
        waits = node.standing is Standing.WAITING and name not in self.emptied
        return waits and not self._is_failing(node) and self._may_come(name)

    def _may_join(self, join: set[str]) -> bool:
        """An image opens with all its sets at once; later ones join as they come."""
        if self.phase is not Phase.GATHERING:
            return True
        assert self.record is not None
        missing = {
            name
            for index in range(len(self.record.sets))
            for name in self.record.membership.in_sync(index)
            if name not in join
        }
        return not missing

    def _resumes(self, name: str) -> bool:
        node = self.nodes[name]
        return node.served_as is not None and node.served_as == node.instance

    def _admit(self, nodes: tuple[str, ...], *, resume: bool) -> Admit:
        for name in nodes:
            self.nodes[name].standing = Standing.JOINING
        if self.phase is Phase.GATHERING:
            self.phase = Phase.JOINING
        if resume:
            # The engine has them up without another word.
            for name in nodes:
                self.nodes[name].standing = Standing.UP
                self.blocking.discard(name)
        peeks = [self.nodes[name].peeked for name in nodes]
        return Admit(nodes, resume, tuple(peek.serial for peek in peeks if peek is not None))

    def _on_admitted(self, levelling: frozenset[str]) -> list[Effect]:
        self.levelling |= levelling
        for name, node in self.nodes.items():
            if node.standing is Standing.JOINING:
                node.standing = Standing.UP
                node.served_as = node.instance
                node.failed_at_s = None
                self.blocking.discard(name)
        if all(node.standing is not Standing.AWAY for node in self._in_sync_nodes()):
            self.waiting_since_s = None
        self.trouble = ""
        if self.phase is not Phase.JOINING:
            return self._go_on()
        self.phase = Phase.SERVING
        return [Serve(), *self._go_on()]

    def _on_admit_failed(self, failed: str) -> list[Effect]:
        again: list[Effect] = []
        if self.nodes[failed].standing is Standing.JOINING:
            # Where its connection was lost, that is heard next.
            self.nodes[failed].failed_at_s = self.now_s
        for name, node in self.nodes.items():
            if node.standing is Standing.JOINING:
                node.standing = Standing.ASKED
                again.append(Peek(name))
        if self.phase is Phase.JOINING:
            self.phase = Phase.GATHERING
        if self.waiting_since_s is None:
            self.waiting_since_s = self.now_s
        return [*again, *self._go_on()]
