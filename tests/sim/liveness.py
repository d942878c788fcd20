"""What must go on in a cluster, what excuses that it waits, and whether all is well again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.sim.guest import BLOCK_BYTES, Guest
from tests.sim.shape import SHARD_BYTES
from vmstore.standing import Phase

if TYPE_CHECKING:
    from etcd.images import ImageRecord
    from tests.sim.cluster import Cluster


class Liveness:
    """See the module. It judges by who is there; how long something may take says who asks."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.doubted: set[tuple[str, int]] = set()
        """Nodes whose disk was put back, with each replica set where they were not healed since."""

    # What excuses it

    def put_back(self, name: str) -> None:
        """Note that what a node holds is not what it held."""
        record = self._cluster.record
        sets = record.sets if record is not None else ()
        self.doubted |= {(name, index) for index, members in enumerate(sets) if name in members}

    def record_changed(self, former: ImageRecord, record: ImageRecord) -> None:
        """Note who was healed."""
        for name, index in list(self.doubted):
            was_stale = name in former.stale.get(index, {})
            if was_stale and name not in record.stale.get(index, {}):
                self.doubted.discard((name, index))

    def excuse(self) -> str:
        """Say why the image may wait for a person; empty: it must not."""
        cluster, record = self._cluster, self._cluster.record
        assert record is not None
        if cluster.rolled_back and not cluster.nodes.keep_etcd:
            return "etcd was put back, and nobody has recovered it"
        for index in range(len(record.sets)):
            believed = self._believed(index)
            if len(believed) < record.policy.quorum:
                return f"of replica set {index} in sync only {sorted(believed)} are believed"
        return ""

    def _believed(self, index: int) -> set[str]:
        """Return the nodes in sync whose disk is the one that they had, or that was healed."""
        cluster, record = self._cluster, self._cluster.record
        assert record is not None
        refused = {cluster.names[node] for node in cluster.nodes.refused}
        doubted = {name for name, where in self.doubted if where == index}
        return set(record.membership.in_sync(index)) - refused - doubted

    # What goes on

    def all_level(self) -> bool:
        """Whether a guest is served, nothing waits, and every node in sync is there."""
        cluster = self._cluster
        serving = cluster.serving()
        if not serving or cluster.record is None:
            return False
        gateway = serving[0].gateway
        assert gateway is not None
        for image in gateway.exports.snapshot():
            holder = image.holder
            if (
                holder.phase is not Phase.SERVING
                or holder.missing()
                or holder.proposal
                or holder.levelling
            ):
                return False
        if cluster.record.stale and not cluster.rolled_back:
            return False
        return all(guest.in_flight == 0 for guest in serving)

    def overdue(self, limit_s: float) -> str:
        """Say what has waited for so long although those who are here suffice; empty: nothing."""
        cluster = self._cluster
        record = cluster.record
        assert record is not None
        if record.stale and not self._may_change():
            # What etcd has taken counts when the arbiter has heard of it.
            return ""
        goes_on = [self._goes_on(index) for index in range(len(record.sets))]
        if all(goes_on) and not cluster.serving():
            return "nobody is served, and each set has its quorum"
        for guest in cluster.serving():
            for kind, begun_s, blocks in self._able(guest, goes_on):
                if begun_s < cluster.clock.now_s - limit_s:
                    where = f"blocks {blocks.start} to {blocks.stop}" if blocks else "all"
                    return f"a {kind} of {guest.name} waits ({where}), and its sets can go on"
        if not (cluster.serving() and all(goes_on) and self._may_change()):
            return ""
        up = cluster.nodes.up()
        waits = sorted(up & {name for stale in record.stale.values() for name in stale})
        return f"{', '.join(waits)} are here, and are not healed" if waits else ""

    def _able(self, guest: Guest, goes_on: list[bool]) -> list[tuple[str, float, range]]:
        """Return the unanswered requests of sets that can go on, and that wait for no other one."""
        per_shard = SHARD_BYTES // BLOCK_BYTES

        def goes(blocks: range) -> bool:
            return all(goes_on[self._cluster.set_of(block // per_shard)] for block in blocks)

        able = [each for each in guest.waiting() if each[2] and goes(each[2])]
        held = [each for each in guest.waiting() if each[2] and not goes(each[2])]
        while held:
            # Whoever shares a block with one that waits waits behind it.
            one = held.pop()[2]
            behind = [
                each for each in able if each[2].start < one.stop and one.start < each[2].stop
            ]
            able = [each for each in able if each not in behind]
            held += behind
        flushes = [each for each in guest.waiting() if not each[2]]
        return able + (flushes if all(goes_on) else [])

    def _goes_on(self, index: int) -> bool:
        """Whether a set can answer writes with the nodes that are up."""
        cluster = self._cluster
        assert cluster.record is not None
        here = self._believed(index) & cluster.nodes.up()
        if here == set(cluster.record.membership.in_sync(index)):
            return True
        return len(here) >= cluster.record.policy.quorum and self._may_change()

    def _may_change(self) -> bool:
        cluster = self._cluster
        return not cluster.shape.arbiter or cluster.site.replaceable()
