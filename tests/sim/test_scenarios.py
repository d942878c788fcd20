"""The design's histories that can exist with what is built, one by one."""

from __future__ import annotations

import pytest

from engine._engine import Simulation
from tests.sim.cluster import Cluster
from tests.sim.defects import breaking
from tests.sim.guest import Life
from tests.sim.oracle import Violation
from tests.sim.shape import Shape


def healthy(seed: int = 1) -> Cluster:
    """Return a cluster of three hosts with a guest on the first that asks nothing by itself."""
    cluster = Cluster(seed, Shape())
    cluster.build()
    for guest in cluster.guests:
        guest.busy = False
    cluster.boot(0)
    assert cluster.run_for(5.0, lambda: cluster.guests[0].life is Life.RUNNING)
    return cluster


def write(cluster: Cluster, guest: int, sectors: int = 8) -> None:
    """Have a guest write, and flush, and wait for the answers."""
    first = cluster.guests[guest].regions[0].start
    cluster.guests[guest].write(first, sectors)
    assert cluster.run_for(10.0, lambda: cluster.guests[guest].in_flight == 0)
    cluster.guests[guest].flush()
    assert cluster.run_for(10.0, lambda: cluster.guests[guest].in_flight == 0)


def leave_alone(cluster: Cluster, host: int) -> None:
    """Cut a host off with its own node."""
    for gateway in range(cluster.shape.gateways):
        for node in range(cluster.shape.nodes):
            if (gateway == host) != (node == host):
                cluster.world.set_path(gateway, node, True, False)
                cluster.world.set_path(gateway, node, False, False)
    for path in (cluster.gateway_paths[host], cluster.node_paths[host]):
        path.there = path.back = False


def read_after_others_wrote(cluster: Cluster) -> None:
    """A holder is cut off with one node, another takes the image over; the first one reads."""
    write(cluster, 0)
    leave_alone(cluster, 0)
    cluster.run_for(12.0)
    cluster.boot(1)
    assert cluster.run_for(20.0, lambda: cluster.guests[1].life is Life.RUNNING)
    write(cluster, 1)
    cluster.guests[0].read(cluster.guests[0].regions[0].start, 8)
    cluster.run_for(5.0)


def test_holder_cut_off_with_one_node_reads_nothing_that_others_have_replaced() -> None:
    cluster = healthy()
    read_after_others_wrote(cluster)
    assert cluster.guests[0].in_flight == 1, "its read is not answered"


def test_unconfirmed_read_of_a_holder_cut_off_is_noticed() -> None:
    with breaking("ReadsAreConfirmed"), pytest.raises(Violation, match="read as"):
        read_after_others_wrote(healthy())
    assert Simulation.rules()


def test_killed_nodes_of_a_living_gateway_are_made_equal_and_go_on() -> None:
    """All nodes are killed, nobody stayed to be a source."""
    cluster = healthy(2)
    write(cluster, 0)
    cluster.guests[0].write(cluster.guests[0].regions[0].start, 24)
    for node in range(3):
        cluster.nodes.stop(node, power=False)
    cluster.mend()
    assert cluster.run_for(15.0, cluster.liveness.all_level)
    cluster.guests[0].read(cluster.guests[0].regions[0].start, 24)
    assert cluster.run_for(5.0, cluster.liveness.all_level)
    cluster.safety.check_all_replicas()


def test_dead_pair_of_one_replica_set_stalls_no_other() -> None:
    cluster = Cluster(4, Shape(nodes=6, replica_sets=2, shards=8))
    cluster.build()
    cluster.guests[0].busy = False
    cluster.boot(0)
    assert cluster.run_for(5.0, lambda: cluster.guests[0].life is Life.RUNNING)
    record = cluster.record
    assert record is not None
    dead, well = (set(members) for members in record.sets)
    pair = sorted(dead - well)[:2]
    assert len(pair) == 2, "the sets share a node at most"
    cluster.supervised = False
    for name in pair:
        cluster.nodes.stop(cluster.names.index(name), power=False)
    per_shard = (1 << 20) // 512
    stalled, served = (
        next(shard for shard in range(8) if cluster.set_of(shard) == index) for index in (0, 1)
    )
    cluster.guests[0].write(stalled * per_shard, 8)
    cluster.guests[0].write(served * per_shard, 8)
    cluster.run_for(10.0)
    assert cluster.guests[0].in_flight == 1, "only the set that lost two waits"
    cluster.mend()
    assert cluster.run_for(30.0, cluster.liveness.all_level)


def test_image_deleted_while_a_node_was_away_does_not_come_back_with_it() -> None:
    cluster = healthy(3)
    write(cluster, 0)
    cluster.guests[0].stop()
    cluster.supervised = False
    cluster.run_for(5.0)
    cluster.nodes.stop(1, power=True)
    cluster.operator.delete_image()
    cluster.run_for(2.0)
    cluster.nodes.start(1)
    cluster.run_for(5.0)
    assert not any(cluster.world.has_image(node, cluster.image) for node in range(3))


def test_node_keeps_the_data_of_an_image_that_a_restored_etcd_lacks() -> None:
    """Live images must not look like leftovers."""
    cluster = Cluster(5, Shape())
    empty = cluster.state.memory.backup()
    cluster.build()
    cluster.guests[0].busy = False
    cluster.boot(0)
    assert cluster.run_for(5.0, lambda: cluster.guests[0].life is Life.RUNNING)
    write(cluster, 0)
    cluster.rolled_back = True
    cluster.state.memory.restore(empty)
    for node in range(3):
        cluster.nodes.stop(node, power=False)
        cluster.nodes.start(node)
    cluster.run_for(20.0)
    assert all(cluster.world.has_image(node, cluster.image) for node in range(3))


def test_stale_node_that_returns_stands_in_for_one_that_is_gone_for_good() -> None:
    """Writes wait for the lost node, the heal must not wait for the writes."""
    cluster = healthy(6)
    guest = cluster.guests[0]
    cluster.supervised = False
    cluster.nodes.stop(1, power=False)
    write(cluster, 0)
    record = cluster.record
    assert record is not None and record.stale, "the first lost node is left behind"
    cluster.nodes.stop(2, power=False)
    guest.write(guest.regions[0].start, 8)
    cluster.run_for(6.0)
    assert guest.in_flight == 1, "below the quorum writes wait"
    cluster.nodes.start(1)
    assert cluster.run_for(30.0, lambda: guest.in_flight == 0), "two nodes are alive"


def test_stale_node_stands_in_although_a_write_waits_for_another_set() -> None:
    """A request reaches into the shards of two sets, and one of them has lost two nodes."""
    cluster = Cluster(7, Shape(nodes=6, replica_sets=2, shards=8))
    cluster.build()
    guest = cluster.guests[0]
    guest.busy = False
    cluster.boot(0)
    assert cluster.run_for(5.0, lambda: guest.life is Life.RUNNING)
    record = cluster.record
    assert record is not None
    other, first = (set(members) for members in record.sets)
    gone, returns = sorted(first - other)[:2]
    pair = sorted(other - first)[:2]
    per_shard = (1 << 20) // 512
    border = next(
        shard for shard in range(7) if {cluster.set_of(shard), cluster.set_of(shard + 1)} == {0, 1}
    )
    cluster.supervised = False
    stop = cluster.nodes.stop
    stop(cluster.names.index(returns), power=False)
    guest.write((border + 1) * per_shard - 4, 8)
    cluster.run_for(6.0)
    assert guest.in_flight == 0 and cluster.record is not None and cluster.record.stale
    for name in (gone, *pair):
        stop(cluster.names.index(name), power=False)
    guest.write((border + 1) * per_shard - 4, 8)
    cluster.run_for(6.0)
    assert guest.in_flight == 1, "both sets are below their quorum"
    mine = next(shard for shard in (border, border + 1) if cluster.set_of(shard) == 1)
    guest.write(mine * per_shard + 512, 8)
    cluster.nodes.start(cluster.names.index(returns))
    assert cluster.run_for(30.0, lambda: guest.in_flight == 1), "one set has two nodes again"
    cluster.mend()
    assert cluster.run_for(30.0, cluster.liveness.all_level)
