"""`MergeSteps`: what the holder of an image does to remove snapshots of it, and their layers.

What that is stands in `vmstore/merging.py`. Pure, as `vmstore/holder.py` is, whose part this is.
"""

from abc import ABC
from dataclasses import dataclass

from etcd.images import ImageRecord
from vmstore.effects import AskEmptied, Effect, TellLayers
from vmstore.freezing import Stage
from vmstore.layer_changes import EmptiedLayers
from vmstore.snapshot_steps import SnapshotSteps
from vmstore.standing import Phase


@dataclass(slots=True)
class MergeSteps(SnapshotSteps, ABC):
    """See the module."""

    def _remove_snapshot(self, name: str) -> list[Effect]:
        if self.phase is not Phase.SERVING:
            return [TellLayers("the image is being closed; try again")]
        self._yield_to_order()
        self.merging.removes = name
        return self._go_on()

    def _without_removed(self, record: ImageRecord) -> ImageRecord:
        """Return what a change of the record is to be made of: without a snapshot that is to go.

        Nothing is frozen for that, as nothing changes in what anybody reads.
        """
        snapshot = record.snapshot(self.merging.removes)
        free = self.freezing.stage is Stage.NONE and self.phase is Phase.SERVING
        return record.without_snapshot(snapshot) if snapshot is not None and free else record

    @property
    def _proposes_removal(self) -> bool:
        name, proposal = self.merging.removes, self.proposal
        return bool(name) and proposal is not None and proposal.snapshot(name) is None

    def _removed(self, record: ImageRecord) -> list[Effect]:
        """Tell that the snapshot is removed, where that is so by a record that etcd has taken."""
        name = self.merging.removes
        if not name or record.snapshot(name) is not None:
            return []
        self.merging.removes = ""
        return [TellLayers()]

    def _give_up_removal(self, why: str, *, unknown: bool) -> list[Effect]:
        if not self.merging.removes:
            return []
        self.merging.removes = ""
        return [TellLayers(why, unknown)]

    def _ask_emptied(self) -> list[Effect]:
        if self.phase is not Phase.SERVING or self.record is None:
            return []
        return [AskEmptied()] if self.merging.asks(self.record, self.now_s) else []

    def _end_merges(self) -> None:
        """Begin to take layers out of the record in which no node has anything any more.

        Frozen as for a snapshot: what is asked of a node again must find the layers that it found.
        """
        assert self.record is not None
        freezing, merging = self.freezing, self.merging
        busy = freezing.stage is not Stage.NONE or freezing.withdraws or merging.removes
        if busy or self.phase is not Phase.SERVING or self.now_s < merging.not_before_s:
            return
        layers = merging.emptied_everywhere(self.record)
        if layers and self._all_are_well():
            freezing.order(EmptiedLayers(layers), self.now_s)
