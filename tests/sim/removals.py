"""Snapshots of a simulated cluster's image that are removed, and what is left of them.

What the image and its other snapshots hold stays as it is, whatever nodes have merged.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING

from etcd.images import ImageRecord
from tests.sim.oracle import Violation
from vmstore.open_image import RemovalOrder
from vmstore.orders import Answer

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster


class Removals:
    """See the module."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.told: dict[str, str] = {}
        """Of each snapshot that somebody wanted to be removed what came of it; empty: it is."""
        self.merged = 0
        """Layers that went from the record."""

    def ask(self, name: str, gateway: int) -> bool:
        """Have a gateway remove a snapshot, if that runs."""
        process = self._cluster.gateways[gateway]
        if process is None or not process.started or process.process.paused:
            return False
        self._cluster.say(f"{process.name} is asked to remove {name}")
        done: Answer[int] = Answer()
        done.add_done_callback(lambda future: self._ended(name, future))
        process.remove_snapshot(RemovalOrder(name, done))
        return True

    def _ended(self, name: str, done: Future[int]) -> None:
        error = done.exception()
        self.told[name] = "" if error is None else str(error)
        self._cluster.say(f"{name}: {self.told[name] or 'removed'}")

    def record_changed(self, former: ImageRecord, record: ImageRecord) -> None:
        """Take note of what went by a record that etcd has taken."""
        merging = set(record.merging) - set(former.merging)
        gone = set(former.merging) - set(record.merging)
        for each in former.snapshots:
            if each.layer in merging:
                self._cluster.snapshots.known[each.name].dropped = True
                self._cluster.say(f"etcd: {each.name} is removed, layer {each.layer} is merged")
        if gone & set(former.merging) and record.layers[0] == former.layers[0]:
            self.merged += len(gone)
            self._cluster.say(f"etcd: layers {sorted(gone)} are gone")

    def all_merged(self) -> bool:
        """Whether no layer is left that is to be merged."""
        record = self._cluster.record
        return record is not None and not record.merging

    def check(self) -> None:
        """Raise a Violation where one is left, or a name that was said to be gone."""
        record = self._cluster.record
        assert record is not None
        if record.merging:
            raise Violation(f"layers {record.merging} are never merged")
        names = {each.name for each in record.snapshots}
        for name, told in self.told.items():
            if told == "" and name in names:
                raise Violation(f"{name} was said to be removed, and is there")
