"""What must hold of a simulated cluster, whoever has failed: each breach raises a Violation.

    checked                                        when
    an answer: who has it, who knows of the set    as a guest gets it
    etcd's records and leases                      as they change
    nodes' records, queues, calls under way        after each happening
    replicas                                       at moments that a seed draws

Replicas are equal outside dirty maps and requests in flight; with nothing under way, everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from etcd.images import ImageRecord
from etcd.records import LeaseRecord
from shard.membership import WhenFull
from tests.sim.guest import IN_FLIGHT_MAX
from tests.sim.oracle import SECTOR_BYTES, Violation
from tests.sim.shape import SHARD_BYTES
from tests.sim.standing import Standings
from vmstore.deciding import WORKERS
from vmstore.standing import Phase

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster
    from tests.sim.processes import SimGateway
    from vmstore.open_image import OpenImage


class Safety:
    """See the module."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._served: dict[int, str] = {}
        self.records = Standings()
        self.compared = 0
        """Shards that were compared, on replicas that had to be equal."""

    # etcd

    def check_record(self, former: ImageRecord, record: ImageRecord) -> None:
        """Check that what etcd says of the image grows."""
        if record.epoch < former.epoch or record.generation < former.generation:
            if self._cluster.deleted:
                raise Violation(f"the id of a deleted image is given again: {record}")
            raise Violation(f"etcd goes back: {former} to {record}")
        if record.is_behind(former):
            raise Violation(f"an equal record differs: {former} and {record}")

    def check_lease(self, former: LeaseRecord, now: LeaseRecord) -> None:
        """Check that nobody takes the lease of a process that lives."""
        if former.holder == now.holder or former.maintenance or self._cluster.rolled_back:
            return
        for process in self._cluster.gateways:
            if process is not None and process.holder == former.holder:
                raise Violation(f"the lease of {process.name}, which lives, was taken")

    def check_epoch(self, epoch: int, holder: str) -> None:
        """Check that one holder serves in an epoch."""
        if self._served.setdefault(epoch, holder) != holder:
            raise Violation(f"epoch {epoch} is served by two holders")

    # Answers

    def check_answer(self, asked: Any, gateway: int) -> None:
        """Judge the answer to a write by who has it."""
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
            self._check_stored(shard, replica_set, frozenset(have), asked.epoch)
            self._check_quorum(shard, replica_set, frozenset(have) & set(record.sets[replica_set]))

    def _check_stored(self, shard: int, replica_set: int, have: frozenset[str], epoch: int) -> None:
        """Check that the nodes in sync know who was left behind; they know it durably then."""
        cluster, record = self._cluster, self._cluster.record
        assert record is not None
        missing = set(record.sets[replica_set]) - have
        stale = record.stale.get(replica_set, {})
        left = max((stale[node] for node in missing if node in stale), default=-1)
        for name in record.membership.in_sync(replica_set):
            node = cluster.names.index(name)
            if node in cluster.nodes.put_back:
                continue
            found = cluster.world.node_record(node, cluster.image) if left >= 0 else None
            if found is not None and found[2] <= left:
                raise Violation(
                    f"a write to shard {shard} was answered without {sorted(missing)}, "
                    f"which {name} does not know to be left behind"
                )
            self.records.rely(name, epoch, left + 1)

    def _check_quorum(self, shard: int, replica_set: int, have: frozenset[str]) -> None:
        """Check that enough nodes have a write: two, or one and the arbiter's word for it."""
        cluster = self._cluster
        if len(have) >= 2:
            return
        if not cluster.shape.arbiter:
            raise Violation(f"a write to shard {shard} was answered below quorum: {sorted(have)}")
        found = cluster.site.confirmed.get((cluster.image, replica_set))
        generation, stated = found or (0, frozenset())
        if stated != have:
            raise Violation(
                f"a write to shard {shard} was answered with {sorted(have)} alone; the arbiter "
                f"has confirmed {sorted(stated)}, generation {generation}"
            )

    # After each happening

    def happened(self) -> None:
        """Check what is quickly looked at: records on nodes, and how much waits where."""
        self._check_records()
        self._check_queues()

    def _check_records(self) -> None:
        cluster = self._cluster
        if cluster.deleted or not cluster.image:
            return
        for node, process in enumerate(cluster.nodes.processes):
            if process is not None:
                found = cluster.world.node_record(node, cluster.image)
                self.records.see(process.name, found and (found[0], found[2]))

    def _check_queues(self) -> None:
        cluster = self._cluster
        most = 2 * IN_FLIGHT_MAX * len(cluster.guests)
        for process in cluster.gateways:
            if process is None:
                continue
            # Each image has one under way, or waits for its turn; each clone is one more.
            if process.deciding.calls > WORKERS + len(cluster.clones.known):
                raise Violation(f"{process.name} has {process.deciding.calls} calls under way")
            for image in process.exports.snapshot():
                requests, parts, unanswered = cluster.world.queues(process.index, image.channel)
                if requests > most or parts > 4 * requests + 4 or unanswered > 2 * most:
                    raise Violation(
                        f"{process.name} has {requests} requests in {parts} parts, and "
                        f"{unanswered} changes"
                    )

    # Now and then

    def check(self) -> None:
        """Check all, what takes a while as well."""
        self._cluster.nodes.forget_marks()
        self.happened()
        self._check_node_queues()
        self._check_replicas()

    def _check_node_queues(self) -> None:
        cluster = self._cluster
        most = 4 * IN_FLIGHT_MAX * len(cluster.guests)
        for name, node in zip(cluster.names, range(cluster.shape.nodes), strict=True):
            for_sync, for_room = cluster.world.node_queues(node)
            if for_sync > most or for_room > most:
                raise Violation(f"on {name} {for_sync} answers wait, and {for_room} requests")

    def _check_replicas(self) -> None:
        """In-sync replicas are equal on every shard that no dirty map names.

        Where nothing is under way they are equal on all shards.
        """
        cluster, record = self._cluster, self._cluster.record
        serving = self._serving()
        if record is None or record.epoch == 0 or cluster.rolled_back or serving is None:
            # A restored etcd may call a node in sync that its holder has left behind.
            return
        process, image = serving
        states = dict(cluster.world.replica_states(process.index, image.channel))
        is_quiet = self._is_quiet(process, image)
        layers = record.layer_ids
        membership = record.membership
        for shard in range(cluster.shape.shards):
            in_sync = membership.in_sync(cluster.set_of(shard))
            up = [name for name in in_sync if states.get(name) == "up"]
            nodes = [node for node in map(cluster.names.index, up) if cluster.nodes.processes[node]]
            is_dirty = any(shard in cluster.world.dirty(node, cluster.image) for node in nodes)
            if is_quiet or not is_dirty:
                self._compare(shard, nodes, layers)
            for known in cluster.snapshots.there(record):
                # What it names is durable on all of them, whatever came since.
                snapshot = record.snapshot(known.name)
                assert snapshot is not None
                whole = [node for node in nodes if node not in cluster.nodes.put_back]
                self._compare(shard, whole, record.chain(snapshot))

    def _serving(self) -> tuple[SimGateway, OpenImage] | None:
        """Return whoever holds the image, as etcd has it."""
        record = self._cluster.record
        for process in self._cluster.gateways:
            if process is not None and record is not None and process.holder == record.holder:
                images = (i for i in process.exports.snapshot() if i.image == record.id)
                return next(((process, image) for image in images), None)
        return None

    def _is_quiet(self, process: SimGateway, image: OpenImage) -> bool:
        """Whether all that was asked is answered, by all in sync, and nothing is made level."""
        cluster, holder = self._cluster, image.holder
        if cluster.shape.when_full is not WhenFull.STALL:
            # What had no room may be on some.
            return False
        idle = cluster.world.queues(process.index, image.channel) == (0, 0, 0)
        busy = holder.missing() or holder.proposal or holder.levelling
        if not idle or busy or holder.phase is not Phase.SERVING:
            return False
        assert holder.record is not None
        in_sync = holder.record.membership.all_in_sync()
        return not cluster.liveness.doubted and all(self._is_level(n, image) for n in in_sync)

    def _is_level(self, name: str, image: OpenImage) -> bool:
        """Whether it is the process that was made level, on the disk that it had."""
        cluster = self._cluster
        process = cluster.nodes.processes[cluster.names.index(name)]
        served_as = image.holder.nodes[name].served_as
        return process is not None and process.start_counter == served_as

    def _compare(self, shard: int, nodes: list[int], layers: list[int]) -> None:
        cluster = self._cluster
        digests = [cluster.world.shard_digests(n, cluster.image, layers, shard) for n in nodes]
        known = [(node, found) for node, found in zip(nodes, digests, strict=True) if found]
        self.compared += len(known) > 1
        if all(found == known[0][1] for _, found in known):
            return
        for block, contents in enumerate(zip(*(found for _, found in known), strict=True)):
            if len({content for content in contents if content is not None}) > 1:
                names = [cluster.names[node] for node, _ in known]
                raise Violation(f"block {block} of shard {shard} differs on {names}: {contents}")

    # At the end

    def check_all_replicas(self) -> None:
        """All replicas in sync are equal, wherever they are."""
        for shard, nodes, layers in self._in_sync():
            for top in range(len(layers)):
                self._compare(shard, nodes, layers[top:])

    def check_no_rot(self) -> None:
        """All replicas in sync are intact."""
        cluster = self._cluster
        for shard, nodes, layers in self._in_sync():
            for node in nodes:
                found = cluster.world.shard_digests(node, cluster.image, layers, shard)
                if found is not None and None in found:
                    block, name = found.index(None), cluster.names[node]
                    raise Violation(f"{name} has rot in block {block} of shard {shard}")

    def _in_sync(self) -> Iterable[tuple[int, list[int], list[int]]]:
        cluster, record = self._cluster, self._cluster.record
        assert record is not None
        layers = record.layer_ids
        for shard in range(cluster.shape.shards if not cluster.rolled_back else 0):
            in_sync = record.membership.in_sync(cluster.set_of(shard))
            yield shard, [cluster.names.index(name) for name in in_sync], layers
