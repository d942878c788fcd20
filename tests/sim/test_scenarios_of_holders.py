"""The design's histories about who holds an image: each passes, and is noticed when broken."""

from __future__ import annotations

from shard.ids import image_id
from tests.sim.cluster import Cluster
from tests.sim.defects import breaking, planted_by_name
from tests.sim.guest import Life
from tests.sim.oracle import Violation
from tests.sim.stage import Stage, broken


def reconnect_after_the_image_was_anothers() -> None:
    """History 1, its part without forwarding: QEMU comes back and sends what was unanswered."""
    stage = Stage()
    cluster, first = stage.cluster, stage.at(1)
    old, new = cluster.guests[:2]
    old.stop()
    old.peer = "11:1"
    stage.run(3.0)
    stage.serve(0)
    stage.write(first)
    stage.hold(0, 0, 1, 2)
    old.write(first, 8)
    stamp = max(token for token in old.unanswered()) << 8 | 1
    cluster.pause_gateway(0)
    stage.move_to(1)
    stage.write(first, host=1)
    stage.flush(host=1)
    new.stop()
    stage.run(5.0)
    cluster.continue_gateway(0)
    stage.let_go(0, 0, 1, 2)
    stage.run(5.0)
    assert old.life is Life.FAILED, "it has lost its image"
    process = cluster.gateways[0]
    assert process is not None
    old.start(process)
    stage.run(5.0)
    if old.life is Life.RUNNING:
        assert old.channel is not None
        cluster.world.write(0, old.channel, old.client, 1 << 40, first, 8, stamp, False)
        stage.run(1.0)
        stage.read(first)
    old.stop()
    stage.run(3.0)
    stage.serve(1)
    stage.settle()


def test_guest_whose_image_was_anothers_is_not_let_in_again() -> None:
    reconnect_after_the_image_was_anothers()


def test_guest_that_is_let_in_again_is_noticed() -> None:
    with broken(patch=planted_by_name("who was served is barred"), match="read as"):
        reconnect_after_the_image_was_anothers()


def all_nodes_are_killed_and_the_gateway_lives() -> None:
    """History 4."""
    stage = Stage(2)
    stage.write(stage.at(1))
    stage.guest.write(stage.at(1), 24)
    stage.kill(0, 1, 2)
    stage.start(0, 1, 2)
    stage.settle()


def test_all_killed_nodes_are_made_equal_among_each_other() -> None:
    all_nodes_are_killed_and_the_gateway_lives()


def test_killed_nodes_that_wait_for_a_source_are_noticed() -> None:
    with broken(patch=planted_by_name("reconcile where nobody stayed"), match="stuck"):
        all_nodes_are_killed_and_the_gateway_lives()


def restore_etcd_under_two_holders() -> None:
    """History 7: the restored etcd gives another holder the epoch that one has."""
    stage = Stage(3)
    cluster, first = stage.cluster, stage.at(1)
    backup = cluster.state.memory.backup()
    cluster.guests[0].stop()
    stage.run(4.0)
    stage.serve(1)
    stage.write(first, host=1)
    cluster.rolled_back = True
    stage.isolate(1)
    cluster.state.memory.restore(backup)
    # As it was then gate-0 has it; gate-0 is gone, and its successor takes the next epoch.
    cluster.stop_gateway(0, host=False)
    cluster.start_gateway(0)
    stage.run(1.0)
    cluster.boot(0)
    stage.run(12.0)
    if cluster.guests[0].life is Life.RUNNING:
        cluster.guests[0].read(first, 8)
        cluster.guests[0].write(first, 8)
        stage.run(2.0)
        cluster.guests[1].read(first, 8)


def test_restored_etcd_serves_nobody_with_the_epoch_of_another() -> None:
    restore_etcd_under_two_holders()


def test_two_holders_of_an_epoch_are_noticed() -> None:
    with broken(
        "EqualRecordsAgree", patch=planted_by_name("equal records agree"), match="two holders"
    ):
        restore_etcd_under_two_holders()


def restore_etcd_before_a_node_was_left_behind() -> None:
    """History 7: equal generations for two sets; the one that was left behind is not believed."""
    stage = Stage(4)
    cluster, first = stage.cluster, stage.at(1)
    stage.write(first)
    backup = cluster.state.memory.backup()
    stage.kill(1)
    stage.write(first)
    stage.flush()
    stage.await_stale(1)
    stage.run(12.0)
    cluster.stop_gateway(0, host=False)
    cluster.rolled_back = True
    cluster.state.memory.restore(backup)
    stage.start(1)
    stage.kill(0)
    cluster.boot(1)
    stage.run(25.0)
    guest = cluster.guests[1]
    if guest.life is Life.RUNNING:
        for _ in range(6):
            guest.read(first, 8)
            stage.run(0.5)


def test_node_left_behind_is_not_believed_after_etcd_was_restored() -> None:
    restore_etcd_before_a_node_was_left_behind()


def test_node_left_behind_that_a_restored_etcd_calls_in_sync_is_noticed() -> None:
    with broken("RecordsGrow", "EqualRecordsAgree", patch=planted_by_name("equal records agree")):
        restore_etcd_before_a_node_was_left_behind()


def restore_etcd_before_a_delete() -> None:
    """History 8: an image that was deleted does not come back with an older etcd."""
    stage = Stage(5)
    cluster = stage.cluster
    stage.write(stage.at(1))
    stage.guest.stop()
    stage.run(5.0)
    backup = cluster.state.memory.backup()
    cluster.operator.delete_image()
    stage.run(2.0)
    cluster.rolled_back = True
    cluster.state.memory.restore(backup)
    cluster.boot(1)
    stage.run(25.0)
    if cluster.guests[1].life is Life.RUNNING:
        raise Violation("a deleted image is served")
    assert not any(cluster.world.has_image(node, cluster.image) for node in range(3))


def test_deleted_image_does_not_come_back_with_an_older_etcd() -> None:
    restore_etcd_before_a_delete()


def delete_while_a_node_is_away() -> None:
    """History 8: a tombstone is told to who was away."""
    stage = Stage(6)
    cluster = stage.cluster
    stage.write(stage.at(1))
    stage.guest.stop()
    stage.run(5.0)
    stage.cut(1)
    cluster.operator.delete_image()
    stage.run(1.0)
    stage.start(1)
    stage.run(4.0)
    kept = [node for node in range(3) if cluster.world.has_image(node, cluster.image)]
    if kept:
        raise Violation(f"a deleted image is left on {kept}")


def test_image_deleted_while_a_node_was_away_goes_from_it_too() -> None:
    delete_while_a_node_is_away()


def test_deleted_image_that_a_node_keeps_is_noticed() -> None:
    with broken(patch=planted_by_name("nodes delete on tombstones")):
        delete_while_a_node_is_away()


def old_connection_delivers_after_another_holder_wrote(*, pause: bool = True) -> None:
    """History 14: what an old connection carries arrives when another holder has written."""
    stage = Stage(7)
    cluster, first = stage.cluster, stage.at(1)
    stage.write(first)
    stage.hold(0, 0, 1, 2)
    stage.guest.write(first, 8)
    stage.run(0.02)
    if pause:
        cluster.pause_gateway(0)
    stage.move_to(1)
    stage.write(first, host=1)
    stage.let_go(0, 0, 1, 2)
    stage.run(1.0)
    stage.read(first, host=1)
    cluster.continue_gateway(0)
    stage.run(3.0)
    for _ in range(3):
        stage.read(first, host=1)
    stage.settle()


def test_late_write_of_a_former_holder_is_dropped() -> None:
    old_connection_delivers_after_another_holder_wrote()


def test_late_write_that_is_applied_under_another_epoch_is_noticed() -> None:
    with broken("EpochIsCurrent", "SessionIsCurrent"):
        old_connection_delivers_after_another_holder_wrote()


def copy_arrives_after_another_holder_wrote() -> None:
    """History 14: a copy that a dead holder ordered lands when its blocks were written over."""
    stage = Stage(12, shards=4)
    cluster, blocks = stage.cluster, [stage.at(1, block) for block in range(3)]
    stage.kill(1)
    for first in blocks:
        stage.write(first)
    stage.flush()
    cluster.world.tell_all()
    stage.part_nodes(1)
    stage.start(1)
    delivered(stage, "FETCH")
    # What it has fetched it sends to the node that is healed, and that is held back.
    stage.hold(0, 1)
    stage.run(0.02)
    cluster.pause_gateway(0)
    stage.move_to(1)
    stage.await_stale()
    for first in blocks:
        stage.write(first, host=1)
    stage.flush(host=1)
    cluster.world.take_told()
    stage.let_go(0, 1)
    delivered(stage, "COPY")
    stage.run(1.0)
    for first in [*blocks] * 4:
        stage.read(first, host=1)
    cluster.continue_gateway(0)
    stage.run(3.0)
    stage.settle()


def delivered(stage: Stage, frame: str) -> None:
    """Let time pass until a frame of a kind was delivered."""
    for _ in range(100_000):
        if any(frame in words for _at, words in stage.cluster.world.take_told()):
            return
        stage.run(0.0001)
    raise AssertionError(f"there was no {frame}")


def test_copy_that_a_dead_holder_ordered_is_dropped() -> None:
    copy_arrives_after_another_holder_wrote()


def test_copy_that_lands_on_newer_data_is_noticed() -> None:
    """Each of the three refuses it by itself: it is of a session, an epoch, a generation."""
    with broken("SessionIsCurrent", "EpochIsCurrent", "GenerationIsCurrent", match="read as"):
        copy_arrives_after_another_holder_wrote()


def resend_overtakes_the_old_connection(seed: int) -> None:
    """History 14: one holder, two connections; the old one delivers after the resend."""
    stage = Stage(seed)
    cluster, first = stage.cluster, stage.at(1)
    # Nobody is left behind meanwhile: that would give the resend another generation.
    cluster.state.up = False
    stage.hold(0, 1)
    stage.guest.write(first, 8)
    stage.run(0.02)
    cluster.world.reset(0, 1)
    # The old connection is held back, the new one is not.
    stage.let_go(0, 1)
    stage.answered()
    for _ in range(3):
        stage.write(first)
        stage.run(0.2)
    stage.run(4.0)
    stage.settle()


def test_old_connection_of_the_same_holder_delivers_nothing_any_more() -> None:
    resend_overtakes_the_old_connection(8)


def test_frame_of_a_former_connection_is_noticed() -> None:
    noticed = 0
    for seed in range(8, 20):
        try:
            with breaking("SessionIsCurrent"):
                resend_overtakes_the_old_connection(seed)
        except Violation:
            noticed += 1
    assert noticed, "of some orders of arrival one is wrong"


def second_gateway_process_of_a_host() -> None:
    """History 19: two processes of one name; the second must not take the lease of the first."""
    stage = Stage(9)
    cluster = stage.cluster
    stage.write(stage.at(1))
    # gate-1 is given the name of gate-0, by mistake; it has another lock file.
    second = cluster.gateways[1]
    assert second is not None
    second.rename("gate-0")
    cluster.boot(1)
    stage.run(3.0)
    if cluster.guests[0].life is not Life.RUNNING:
        raise Violation("a guest lost its image to a second process of its gateway's name")
    stage.write(stage.at(1))
    stage.read(stage.at(1))


def test_second_process_of_a_gateways_name_does_not_take_its_images() -> None:
    second_gateway_process_of_a_host()


def test_lease_taken_by_the_name_alone_is_noticed() -> None:
    with broken(
        patch=planted_by_name("the lock file tells who is dead"), match="lost its image|lease of"
    ):
        second_gateway_process_of_a_host()


def a_block_of_each_set(stage: Stage) -> tuple[int, int]:
    """Where a block of each of two replica sets begins, in sectors."""
    cluster = stage.cluster
    sets = [cluster.set_of(shard) for shard in range(cluster.shape.shards)]
    return stage.at(sets.index(0), 1), stage.at(sets.index(1), 1)


def two_sets_share_a_lost_node() -> None:
    """History 20: one set loses two nodes and waits, another loses one and goes on without it."""
    stage = Stage(10, nodes=5, replica_sets=2, shards=8)
    cluster = stage.cluster
    record = cluster.record
    assert record is not None
    one, other = (set(members) for members in record.sets)
    shared, alone = sorted(one & other), sorted(one - other)
    pair = [cluster.names.index(name) for name in (shared[0], alone[0])]
    waits, goes_on = a_block_of_each_set(stage)
    stage.kill(*pair)
    stage.run(0.5)
    stage.guest.write(waits, 8)
    stage.guest.write(goes_on, 8)
    stage.run(10.0)
    if stage.guest.in_flight != 1:
        raise Violation(f"{stage.guest.in_flight} writes wait; only one set lost its quorum")
    stage.start(*pair)
    stage.settle()


def test_dead_pair_of_one_set_does_not_stall_another_that_lost_one_of_them() -> None:
    two_sets_share_a_lost_node()


def test_set_that_waits_for_another_is_noticed() -> None:
    with broken(patch=planted_by_name("sets go on alone"), match="writes wait"):
        two_sets_share_a_lost_node()


def two_sets_share_a_node_that_comes_back() -> None:
    """History 20 again: all of a set come back at once, one of them alone of those in another set.

    Those who stay away have what it lost there: it is believed in the one set, not in the other.
    """
    stage = Stage(10, nodes=5, replica_sets=2, shards=8)
    cluster = stage.cluster
    record = cluster.record
    assert record is not None
    waits_for, goes_on = (set(members) for members in record.sets)
    away, back = (
        [cluster.names.index(name) for name in sorted(names)]
        for names in (waits_for - goes_on, goes_on)
    )
    assert len(away) == 2, "the sets share one node"
    first, second = a_block_of_each_set(stage)
    stage.write(first)
    stage.write(second)
    stage.flush()
    stage.write(first)
    stage.kill(*away)
    shared = cluster.names.index(*(waits_for & goes_on))
    stage.kill(*(node for node in back if node != shared))
    stage.cut(shared)
    stage.run(0.5)
    stage.start(*back)
    stage.run(3.0)
    stage.read(second)
    stage.write(second)
    stage.guest.read(first, 8)
    stage.run(10.0)
    if stage.guest.in_flight != 1:
        raise Violation("what nobody can know was read")
    stage.start(*away)
    stage.answered()
    stage.settle()


def test_set_whose_nodes_all_came_back_waits_for_no_other_set() -> None:
    two_sets_share_a_node_that_comes_back()


def test_node_that_joins_for_all_its_sets_or_for_none_is_noticed() -> None:
    with broken(patch=planted_by_name("sets are founded alone"), match="stuck"):
        two_sets_share_a_node_that_comes_back()


def test_node_that_is_believed_where_others_know_better_is_noticed() -> None:
    with broken("AllInSyncLevelled", match="read as|was read"):
        two_sets_share_a_node_that_comes_back()


def flush_waits_for_a_node_that_lost_what_it_covers() -> None:
    """A flush is under way when a node comes back that has lost what was answered before it.

    The other one that has it cannot be reached: were the first believed, nobody else would have it.
    """
    stage = Stage(10, nodes=5, replica_sets=2, shards=8)
    cluster = stage.cluster
    record = cluster.record
    assert record is not None
    first_set, second_set = (set(members) for members in record.sets)
    (shared,) = [cluster.names.index(name) for name in first_set & second_set]
    keeps, gone = [cluster.names.index(name) for name in sorted(first_set - second_set)]
    gone_too = cluster.names.index(min(second_set - first_set))
    first, second = a_block_of_each_set(stage)
    stage.write(first)
    stage.write(second)
    stage.flush()
    stage.kill(gone, gone_too)
    stage.write(first)
    stage.write(second)
    stage.flush()
    stage.await_stale(gone, gone_too)
    stage.write(first)
    stage.cut(shared)
    stage.guest.flush()
    stage.run(0.5)
    stage.hold(0, keeps)
    stage.hear_nothing(0, keeps)
    stage.run(6.0)
    stage.start(shared)
    stage.run(5.0)
    if stage.guest.in_flight != 1:
        raise Violation("a flush was answered by one that has lost what it covers")
    stage.let_go(0, keeps)
    stage.hear_again(0, keeps)
    stage.answered()
    stage.read(first)
    cluster.mend()
    stage.settle()


def test_flush_under_way_waits_for_a_node_that_came_back_without_what_it_covers() -> None:
    flush_waits_for_a_node_that_lost_what_it_covers()


def test_flush_answered_by_who_lost_what_it_covers_is_noticed() -> None:
    with broken("FlushWaitsForLevel", match="answered by one"):
        flush_waits_for_a_node_that_lost_what_it_covers()


def read_what_is_in_flight_and_lose_it() -> None:
    """History 21: a read must not see a write that then vanishes with its only replica."""
    stage = Stage(11)
    cluster, first = stage.cluster, stage.at(1)
    stage.write(first)
    stage.flush()
    stage.hold(0, 1, 2)
    stage.guest.write(first, 8)
    stage.run(0.05)
    stage.guest.read(first, 8)
    stage.run(0.2)
    cluster.stop_gateway(0, host=True)
    stage.run(0.5)
    stage.move_to(1)
    stage.read(first, host=1)
    cluster.mend()
    stage.settle()


def test_read_waits_for_the_write_in_flight_on_its_block() -> None:
    read_what_is_in_flight_and_lose_it()


def test_read_of_a_write_that_vanishes_is_noticed() -> None:
    with broken("ReadsWaitForWrites", match="read as"):
        read_what_is_in_flight_and_lose_it()


def give_an_id_twice() -> None:
    """History 8: the tombstone is compared in the transaction that makes an image."""
    stage = Stage(12)
    cluster: Cluster = stage.cluster
    stage.guest.stop()
    stage.run(5.0)
    cluster.operator.delete_image()
    stage.run(1.0)
    if cluster.operator.make_image_of_id(image_id(cluster.image)) != "refused":
        raise Violation("the id of a deleted image is given again")


def test_id_of_a_deleted_image_is_never_given_again() -> None:
    give_an_id_twice()


def test_id_that_is_given_twice_is_noticed() -> None:
    with broken(patch=planted_by_name("an id is given once"), match="given again"):
        give_an_id_twice()
