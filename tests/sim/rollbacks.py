"""Rollbacks of a simulated cluster's image: asked for, and judged.

What etcd says counts: from the moment that it has the record of a rollback the image holds what the
snapshot did, and nothing that came since, whoever has heard of it.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from etcd.images import ImageRecord
from tests.sim.oracle import Violation
from vmstore.open_image import RollbackOrder, RolledBack
from vmstore.orders import Answer

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster
    from tests.sim.processes import SimGateway


@dataclass(slots=True)
class Asked:
    """A rollback that somebody asked for."""

    name: str
    made_before: int
    """Rollbacks that etcd had taken until then."""
    gateway: SimGateway
    alone: bool
    """Whether nobody else asked for one meanwhile."""
    told: str | None = None
    """Empty: it was made; else why not; None: was told nothing."""

    @property
    def is_pending(self) -> bool:
        """Whether something may come of it."""
        return self.told is None and self.gateway.process.alive


class Rollbacks:
    """See the module."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._made: list[str] = []
        """The snapshots that were gone back to, one after the other."""
        self._asked: list[Asked] = []
        self._wrong: Violation | None = None

    @property
    def made(self) -> int:
        """How many etcd has taken."""
        return len(self._made)

    def ask(self, name: str, gateway: int, *, force: bool) -> Asked | None:
        """Have a gateway roll the image back, if that runs."""
        process = self._cluster.gateways[gateway]
        if process is None or not process.started or process.process.paused:
            return None
        rivals = [each for each in self._asked if each.is_pending]
        for each in rivals:
            each.alone = False
        asked = Asked(name, len(self._made), process, alone=not rivals)
        self._asked.append(asked)
        self._cluster.say(f"{process.name} is asked to go back to {name}")
        done: Answer[RolledBack] = Answer()
        done.add_done_callback(lambda future: self._ended(asked, future))
        process.roll_back(RollbackOrder(name, force, done))
        return asked

    def _ended(self, asked: Asked, done: Future[RolledBack]) -> None:
        error = done.exception()
        asked.told = told = "" if error is None else str(error)
        self._cluster.say(f"back to {asked.name}: {told or 'done'}")
        since = self._made[asked.made_before :]
        try:
            if error is None and asked.name not in since:
                raise Violation(f"{asked.name} was said to be gone back to, and was not")
            if "nothing was rolled back" in told and asked.name in since and asked.alone:
                raise Violation(f"{asked.name} was gone back to, and that was said to have failed")
            if error is None:
                self._check_stored()
        except Violation as violation:
            # A future keeps to itself what its callbacks raise.
            self._wrong = self._wrong or violation

    def check(self) -> None:
        """Raise a Violation where somebody was told what is not so."""
        if self._wrong is not None:
            raise self._wrong

    def _check_stored(self) -> None:
        """Check that the nodes in sync that run know it."""
        cluster, record = self._cluster, self._cluster.record
        assert record is not None
        for name in record.membership.all_in_sync():
            node = cluster.names.index(name)
            if cluster.nodes.processes[node] is None:
                continue
            layers = cluster.world.node_layers(node, cluster.image)
            if layers is not None and layers[0] != record.layers[0].id:
                raise Violation(f"a rollback is done, and {name} has the layers {layers}")

    def record_changed(self, former: ImageRecord, record: ImageRecord) -> None:
        """Judge a record that etcd has taken: where it is of a rollback all else goes by that."""
        is_as_before = record.layers[0] == former.layers[0]
        is_snapshot = record.layers[1:] == former.layers
        is_withdrawn = record.next_layer == former.next_layer
        if is_as_before or is_snapshot or is_withdrawn:
            return
        cluster, snapshots = self._cluster, self._cluster.snapshots
        target = record.snapshots[-1]
        self._made.append(target.name)
        cluster.say(f"etcd: the image is what {target.name} is, in layer {record.layers[0].id}")
        for each in former.newer_than(target):
            snapshots.known[each.name].dropped = True
        cluster.oracle.rolled_back(
            snapshots.known[target.name].contents(), record.epoch, cluster.clock.now_s
        )

    def all_dropped(self) -> bool:
        """Whether no node has anything of a layer that its record does not name."""
        return not any(self._leftovers(node) for node in range(self._cluster.shape.nodes))

    def check_dropped(self) -> None:
        """Raise a Violation where one has."""
        for node, name in enumerate(self._cluster.names):
            left = self._leftovers(node)
            if left:
                raise Violation(f"{name} keeps layers {sorted(left)}, which were dropped")

    def _leftovers(self, node: int) -> set[int]:
        cluster = self._cluster
        named = cluster.world.node_layers(node, cluster.image)
        held = cluster.world.node_layers_held(node, cluster.image)
        return set(held) - set(named or ())
