"""What must never happen to a cluster: checked at each answer, each record, and now and then.

All of these raise Violation. They look at etcd, stores and gateways from outside, and change
nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from etcd.images import ImageRecord
from etcd.records import LeaseRecord
from tests.sim.guest import IN_FLIGHT_MAX
from tests.sim.oracle import SECTOR_BYTES, Violation
from tests.sim.shape import SHARD_BYTES

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster


class Safety:
    """See the module. It remembers who served in which epoch, and what nodes had stored."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._served: dict[int, str] = {}
        self._recorded: dict[int, tuple[int, int]] = {}

    def check_lease(self, former: LeaseRecord, now: LeaseRecord) -> None:
        """Check that nobody takes the lease of a process that lives. Raises Violation."""
        cluster = self._cluster
        if former.holder == now.holder or former.maintenance or cluster.rolled_back:
            return
        for process in cluster.gateways:
            if process is not None and process.holder == former.holder:
                raise Violation(f"the lease of {process.name}, which lives, was taken")

    def check_record(self, former: ImageRecord, record: ImageRecord) -> None:
        """Check that what etcd says of the image grows. Raises Violation."""
        if record.epoch < former.epoch or record.generation < former.generation:
            raise Violation(f"etcd went back: {former} to {record}")
        if record.is_behind(former):
            raise Violation(f"an equal record differs: {former} and {record}")

    def check_epoch(self, epoch: int, holder: str) -> None:
        """Check that one holder serves in an epoch."""
        if self._served.setdefault(epoch, holder) != holder:
            raise Violation(f"epoch {epoch} is served by two holders")

    def check_answer(self, asked: Any, gateway: int) -> None:
        """Judge an answer by who has it. Raises Violation."""
        cluster = self._cluster
        if asked.kind != "write":
            return
        record = cluster.record
        assert record is not None
        process = cluster.gateways[gateway]
        applied = dict(cluster.world.take_applied(asked.stamp))
        if asked.epoch != record.epoch or process is None or cluster.rolled_back:
            return
        first = asked.first * SECTOR_BYTES // SHARD_BYTES
        last = ((asked.first + asked.sectors) * SECTOR_BYTES - 1) // SHARD_BYTES
        for shard in range(first, last + 1):
            replica_set = cluster.set_of(shard)
            in_sync = record.membership.in_sync(replica_set)
            have = [n for i, n in enumerate(cluster.names) if applied.get(shard, 0) >> i & 1]
            if not set(in_sync) <= set(have):
                raise Violation(
                    f"a write to shard {shard} was answered with {have}; "
                    f"in sync are {list(in_sync)}, generation {record.generation}"
                )
            self._check_stored(shard, replica_set, frozenset(have))
            self._check_quorum(shard, replica_set, frozenset(have) & set(record.sets[replica_set]))

    def _check_stored(self, shard: int, replica_set: int, have: frozenset[str]) -> None:
        """Check that the nodes in sync know who was left behind."""
        cluster = self._cluster
        record = cluster.record
        assert record is not None
        missing = set(record.sets[replica_set]) - have
        stale = record.stale.get(replica_set, {})
        left = max((stale[node] for node in missing if node in stale), default=-1)
        for name in record.membership.in_sync(replica_set) if left >= 0 else ():
            node = cluster.names.index(name)
            found = cluster.world.node_record(node, cluster.image)
            if found is not None and found[2] <= left and node not in cluster.nodes.put_back:
                raise Violation(
                    f"a write to shard {shard} was answered without {sorted(missing)}, "
                    f"which {name} does not know to be left behind"
                )

    def _check_quorum(self, shard: int, replica_set: int, have: frozenset[str]) -> None:
        """Check that enough nodes have a write: two, or one and the arbiter's word for it."""
        cluster = self._cluster
        if len(have) >= 2:
            return
        if not cluster.shape.arbiter:
            raise Violation(f"a write to shard {shard} was answered below quorum: {sorted(have)}")
        generation, stated = cluster.site.confirmed.get(
            (cluster.image, replica_set), (0, frozenset())
        )
        if stated != have:
            raise Violation(
                f"a write to shard {shard} was answered with {sorted(have)} alone; the arbiter "
                f"has confirmed {sorted(stated)}, generation {generation}"
            )

    def check(self) -> None:
        """Check what takes a while: replicas, records, queues. Raises Violation."""
        self._cluster.nodes.forget_marks()
        self._check_records()
        self._check_replicas()
        self._check_queues()

    def _check_records(self) -> None:
        """No running node goes back: what it stored durably it knows."""
        cluster = self._cluster
        for node, process in enumerate(cluster.nodes.processes):
            if process is None:
                continue
            found = cluster.world.node_record(node, cluster.image)
            if found is None:
                continue
            epoch, _, generation, _ = found
            former = self._recorded.get(node, (0, 0))
            if process.registered and (epoch < former[0] or generation < former[1]):
                # A record that was not synced goes with the power, and was never relied on.
                self._recorded[node] = (epoch, generation)
            else:
                self._recorded[node] = (max(epoch, former[0]), max(generation, former[1]))

    def _check_replicas(self) -> None:
        """In-sync replicas are equal on every shard that no dirty map names."""
        cluster = self._cluster
        record = cluster.record
        if record is None or record.epoch == 0 or cluster.rolled_back:
            # A restored etcd may call a node in sync that its holder has left behind.
            return
        layers = [layer.id for layer in record.layers]
        for shard in range(cluster.shape.shards):
            replica_set = cluster.set_of(shard)
            holders = [cluster.names.index(n) for n in record.membership.in_sync(replica_set)]
            running = [
                n for n in holders if cluster.nodes.processes[n] is not None and self._is_up(n)
            ]
            if any(shard in cluster.world.dirty(n, cluster.image) for n in running):
                continue
            digests = [
                cluster.world.shard_digests(n, cluster.image, layers, shard) for n in running
            ]
            self._compare(shard, running, [d for d in digests if d is not None])

    def _compare(self, shard: int, nodes: list[int], digests: list[list[int | None]]) -> None:
        for block, contents in enumerate(zip(*digests, strict=True)):
            known = {content for content in contents if content is not None}
            if len(known) > 1:
                names = [self._cluster.names[node] for node in nodes]
                raise Violation(f"block {block} of shard {shard} differs on {names}: {contents}")

    def check_all_replicas(self) -> None:
        """All replicas in sync are equal, wherever they are. Raises Violation."""
        cluster = self._cluster
        record = cluster.record
        assert record is not None
        if cluster.rolled_back:
            return
        layers = [layer.id for layer in record.layers]
        for shard in range(cluster.shape.shards):
            in_sync = record.membership.in_sync(cluster.set_of(shard))
            nodes = [cluster.names.index(name) for name in in_sync]
            digests = [cluster.world.shard_digests(n, cluster.image, layers, shard) for n in nodes]
            self._compare(shard, nodes, [d for d in digests if d is not None])

    def check_no_rot(self) -> None:
        """All replicas in sync are intact. Raises Violation."""
        cluster = self._cluster
        record = cluster.record
        assert record is not None
        layers = [layer.id for layer in record.layers]
        for shard in range(cluster.shape.shards):
            for name in record.membership.in_sync(cluster.set_of(shard)):
                node = cluster.names.index(name)
                found = cluster.world.shard_digests(node, cluster.image, layers, shard)
                if found is not None and None in found:
                    block = found.index(None)
                    raise Violation(f"{name} has rot in block {block} of shard {shard}")

    def _is_up(self, node: int) -> bool:
        """Whether the image's present holder serves from this node."""
        cluster = self._cluster
        record = cluster.record
        for process in cluster.gateways:
            if process is None or process.holder != (record.holder if record else None):
                continue
            for image in process.exports.snapshot():
                states = dict(cluster.world.replica_states(process.index, image.channel))
                return states.get(cluster.names[node]) == "up"
        return False

    def _check_queues(self) -> None:
        cluster = self._cluster
        for process in cluster.gateways:
            if process is None:
                continue
            for image in process.exports.snapshot():
                requests, parts, _ = cluster.world.queues(process.index, image.channel)
                if requests > 2 * IN_FLIGHT_MAX * len(cluster.guests) or parts > 4 * requests + 4:
                    raise Violation(f"{process.name} has {requests} requests in {parts} parts")
