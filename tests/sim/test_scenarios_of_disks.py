"""The design's histories about disks and dirty maps: each passes, and is noticed when broken."""

from __future__ import annotations

from shard.membership import WhenFull
from tests.sim.defects import breaking, planted_by_name
from tests.sim.oracle import Violation
from tests.sim.stage import BLOCK, Stage, broken


def clear_while_a_newer_write_is_in_flight() -> None:
    """History 3: a clear must not name a write that one node has refused so far."""
    stage = Stage(6, log_bytes=512 << 10)
    cluster = stage.cluster
    for block in range(0, 256, 8):
        # Until checkpoints have put the first ones into their shard's file.
        stage.write(stage.at(1, block), 64)
        stage.flush()
    stage.run(6.0)
    cluster.damaged = True
    assert cluster.world.corrupt(1, 0, 9), "there is a shard file to damage"
    stage.kill(1)
    stage.start(1)
    stage.until(cluster.liveness.all_level, "the node is back")
    stage.flush()
    stage.run(5.0)
    # Node 1 cannot merge the rest of its rotten block, so it refuses the whole block behind it too.
    stage.slow(0, 1, 40)
    stage.guest.write(stage.at(1) + 4, 4 + 8)
    stage.guest.flush()
    stage.run(0.03)
    # The flush is answered, and what it allows is cleared; nothing is heard from whom to repair it.
    stage.hear_nothing(0, 0, 2)
    stage.run(3.0)
    assert stage.guest.in_flight == 1, "the flush is answered, the write is not"
    cluster.stop_gateway(0, host=False)
    stage.hear_again(0, 0, 2)
    stage.move_to(1)
    stage.settle()


def power_cycle_an_idle_node() -> None:
    """History 3: its entries stay until it was made level, whatever was flushed meanwhile."""
    stage = Stage(2)
    first = stage.at(1)
    stage.write(first)
    stage.cut(1)
    stage.start(1)
    stage.run(6.0)
    stage.flush()
    stage.run(4.0)
    stage.cut(0, 2)
    stage.start(0, 2)
    stage.settle()


def test_node_that_lost_its_power_while_idle_gets_back_what_it_lost() -> None:
    power_cycle_an_idle_node()


def fail_a_sync() -> None:
    """History 15: what a failed sync left is not there on retry."""
    stage = Stage(3)
    stage.write(stage.at(1))
    stage.cluster.world.fail_sync(0, 0)
    stage.guest.flush()
    stage.run(0.2)
    if stage.cluster.nodes.processes[0] is not None:
        raise Violation("a node goes on after a sync has failed")
    stage.start(0)
    stage.settle()


def test_node_whose_sync_failed_ends() -> None:
    fail_a_sync()


def test_sync_that_is_tried_again_is_noticed() -> None:
    with broken("FailedSyncEnds", match="goes on"):
        fail_a_sync()


def roll_a_disk_back_within_its_run() -> None:
    """History 16: the start counter tells nothing; its peers know its flush number."""
    stage = Stage(4)
    cluster, first = stage.cluster, stage.at(1)
    stage.write(first)
    stage.flush()
    stage.run(4.0)
    cluster.world.snapshot_disk(0)
    stage.write(first)
    stage.flush()
    stage.run(4.0)
    stage.kill(0)
    cluster.nodes.put_back_disk(0)
    stage.start(0)
    stage.run(4.0)
    for _ in range(4):
        stage.read(first)
    stage.settle()


def test_disk_that_was_rolled_back_within_one_run_is_stale_since_ever() -> None:
    roll_a_disk_back_within_its_run()


def test_rolled_back_disk_that_is_believed_is_noticed() -> None:
    with broken(patch=planted_by_name("flush numbers")):
        roll_a_disk_back_within_its_run()


def write_two_parts_of_a_block() -> None:
    """History 17: two writes of 512 bytes share a block, and each replica has both."""
    stage = Stage(5)
    first = stage.at(1)
    stage.write(first)
    for index in range(4):
        stage.slow(0, index % 3, 2 + index * 3)
        stage.guest.write(first + 2 * index, 1)
        stage.guest.write(first + 2 * index + 1, 1)
    stage.answered()
    stage.read(first)
    stage.cut(0, 1, 2)
    stage.start(0, 1, 2)
    stage.settle()


def test_two_writes_of_parts_of_a_block_are_both_there_on_each_replica() -> None:
    write_two_parts_of_a_block()


def rot_keeps_a_node_from_one_of_two_writes() -> None:
    """History 17: one write waits for a repair on one node, another one shares its block."""
    stage = Stage(6, log_bytes=512 << 10)
    cluster = stage.cluster
    for block in range(0, 256, 8):
        # Until checkpoints have put the first ones into their shard's file.
        stage.write(stage.at(1, block), 64)
        stage.flush()
    stage.run(6.0)
    cluster.damaged = True
    assert cluster.world.corrupt(1, 0, 9), "there is a shard file to damage"
    stage.kill(1)
    stage.start(1)
    stage.run(2.0)
    stage.until(cluster.liveness.all_level, "the node is back")
    # Node 1 cannot merge the first one into its rotten block before that is repaired.
    stage.guest.write(stage.at(1) + 4, 4)
    stage.guest.write(stage.at(1), 8)
    stage.answered()
    stage.settle()


def test_write_that_waits_for_a_repair_keeps_others_from_its_block() -> None:
    rot_keeps_a_node_from_one_of_two_writes()


def test_writes_of_a_block_in_two_orders_are_noticed() -> None:
    with broken("BlockWritesAreOrdered", match="differs"):
        rot_keeps_a_node_from_one_of_two_writes()


def full(stage: Stage, blocks: int = 4) -> int:
    """Fill all disks until the guest hears of it; return the first block that had no room."""
    for node in range(3):
        stage.cluster.world.set_free_bytes(node, 0)
    for block in range(0, 768, blocks):
        stage.write(stage.at(0, block), blocks * BLOCK)
        if stage.guest.refused:
            return block
        stage.flush()
    raise AssertionError("there was room for everything")


def test_writes_fail_while_all_disks_are_full_and_succeed_when_there_is_room() -> None:
    stage = Stage(4, log_bytes=512 << 10, when_full=WhenFull.ENOSPC)
    block = full(stage)
    # What needs no room goes on.
    stage.flush()
    stage.read(stage.at(0), 4 * BLOCK)
    refused = stage.guest.refused
    stage.write(stage.at(2))
    assert stage.guest.refused == refused + 1
    for node in range(3):
        stage.cluster.world.set_free_bytes(node, None)
    stage.run(10.0)
    refused = stage.guest.refused
    stage.read(stage.at(0, block), 4 * BLOCK)
    stage.write(stage.at(0, block), 4 * BLOCK)
    stage.flush()
    assert stage.guest.refused == refused
    stage.settle()


def test_write_that_had_no_room_everywhere_is_levelled_when_its_gateway_dies() -> None:
    # A log that takes a copy of all that is written.
    stage = Stage(2, log_bytes=2 << 20, segment_bytes=256 << 10, when_full=WhenFull.ENOSPC)
    block = full(stage, 16)
    stage.cluster.stop_gateway(0, host=False)
    for node in range(3):
        stage.cluster.world.set_free_bytes(node, None)
    stage.move_to(1)
    stage.read(stage.at(0, block), 4 * BLOCK, host=1)
    stage.run(10.0)
    stage.cut(0, 1)
    stage.start(0, 1)
    stage.read(stage.at(0, block), 4 * BLOCK, host=1)
    stage.settle()


def read_rot_on_one_replica() -> None:
    """History 17 and invariant 6: what does not match its checksum is never returned."""
    stage = Stage(6, log_bytes=512 << 10)
    cluster = stage.cluster
    for block in range(0, 256, 8):
        # Until checkpoints have put the first ones into their shard's file.
        stage.write(stage.at(1, block), 64)
        stage.flush()
    stage.run(6.0)
    cluster.damaged = True
    found = [cluster.world.corrupt(0, 0, place) for place in range(9, 1 << 20, 2048)]
    assert any(found), f"there is a shard file to damage: {cluster.world.disk_paths(0)}"
    stage.kill(0)
    stage.start(0)
    stage.run(2.0)
    stage.until(cluster.liveness.all_level, "the node is back")
    for block in range(0, 256, 8):
        stage.read(stage.at(1, block), 64)


def test_rotten_block_is_read_from_another_replica() -> None:
    read_rot_on_one_replica()


def test_rotten_block_that_is_returned_is_noticed() -> None:
    with broken("ReadsAreVerified", match="a mixture|read as"):
        read_rot_on_one_replica()


def write_while_a_repair_copies_its_block() -> None:
    """History 17: what a repair has read of a block is older than what is written meanwhile."""
    stage = Stage(6, log_bytes=512 << 10)
    cluster = stage.cluster
    for block in range(0, 256, 8):
        # Until checkpoints have put the first ones into their shard's file.
        stage.write(stage.at(1, block), 64)
        stage.flush()
    stage.run(6.0)
    cluster.damaged = True
    assert cluster.world.corrupt(0, 0, 9), "there is a shard file to damage"
    stage.kill(0)
    stage.start(0)
    stage.run(2.0)
    stage.until(cluster.liveness.all_level, "the node is back")
    for source in (1, 2):
        stage.slow(0, source, 100)
    stage.guest.read(stage.at(1), 8)
    stage.run(0.3)
    stage.write(stage.at(1))
    stage.run(2.0)
    stage.read(stage.at(1))
    stage.settle()


def test_write_while_a_repair_copies_its_block_is_not_overwritten() -> None:
    write_while_a_repair_copies_its_block()


def test_repair_that_goes_on_beside_writes_is_noticed() -> None:
    with broken("RepairPausesWrites", match="read as|differs"):
        write_while_a_repair_copies_its_block()


def flush_before_the_power_goes(seed: int) -> None:
    """Invariant 1: a flushed write survives the power of the last node."""
    stage = Stage(seed, nodes=2, arbiter=True)
    stage.kill(1)
    stage.write(stage.at(1))
    for block in range(6):
        stage.write(stage.at(1, block))
    stage.flush()
    stage.cut(0)
    stage.start(0)
    for block in range(6):
        stage.read(stage.at(1, block))
    stage.settle()


def test_flushed_writes_survive_a_power_cut_of_all_nodes() -> None:
    for seed in range(40, 44):
        flush_before_the_power_goes(seed)


def test_flush_that_is_answered_early_is_noticed() -> None:
    noticed = 0
    for seed in range(40, 44):
        try:
            with breaking("FlushIsDurable"):
                flush_before_the_power_goes(seed)
        except Violation:
            noticed += 1
    assert noticed, "what chance leaves on a disk is lost at least once"


def two_blocks_of_a_shard_are_newest_on_two_nodes(seed: int) -> None:
    """History 18: one node has its shard's newest block, and not another one that was answered."""
    stage = Stage(seed, shards=4)
    cluster = stage.cluster
    one, two = stage.at(1, 200), stage.at(1, 0)
    for first in (one, two):
        stage.write(first)
    stage.flush()
    stage.run(4.0)
    stage.write(one)
    # The newest of its shard, and what is copied first.
    stage.write(two)
    stage.cut(0)
    cluster.set_latency(0, 0, 5_000_000, 60_000_000)
    stage.part_nodes(0)
    stage.start(0)

    def held(node: int, block: int) -> int | None:
        record = cluster.record
        assert record is not None
        layers = record.layer_ids
        found = cluster.world.shard_digests(node, cluster.image, layers, 1)
        return found[block] if found is not None else None

    while held(0, 0) != held(1, 0):
        assert cluster.clock.now_s < 60.0, "the newest block is copied"
        stage.run(0.001)
    assert held(0, 200) != held(1, 200), "the other one is not"
    stage.kill(0, 1, 2)
    stage.slow(0, 0, 1)
    stage.start(0, 1, 2)
    stage.read(one)
    stage.read(two)
    stage.settle()


def test_newest_block_wins_whatever_else_its_shard_has() -> None:
    two_blocks_of_a_shard_are_newest_on_two_nodes(seed=5)


def test_winner_that_is_chosen_for_a_whole_shard_is_noticed() -> None:
    with broken("WinnerPerBlock", match="read as"):
        two_blocks_of_a_shard_are_newest_on_two_nodes(seed=5)


def answer_before_the_record_is_stored() -> None:
    """Invariant 4: who was left behind is told of before an answer needs nobody of it."""
    stage = Stage(10)
    cluster, first = stage.cluster, stage.at(1)
    stage.write(first)
    for node in (0, 2):
        cluster.world.set_disk_speed(node, 3_000_000_000, 3_000_000_000)
    stage.kill(1)
    stage.guest.write(first, 8)
    stage.run(1.0)
    if stage.guest.in_flight == 0:
        raise Violation("a write was answered that no node knows the membership of")
    stage.start(1)
    stage.settle()


def test_write_waits_until_the_new_membership_is_stored() -> None:
    answer_before_the_record_is_stored()


def test_answer_before_the_membership_is_stored_is_noticed() -> None:
    with broken("StoredBeforeAnswer", match="left behind"):
        answer_before_the_record_is_stored()


def test_write_that_rot_keeps_from_a_node_is_not_cleared() -> None:
    clear_while_a_newer_write_is_in_flight()


def test_clear_of_what_is_not_answered_is_noticed() -> None:
    with broken("ClearIsAnswered", match="differs"):
        clear_while_a_newer_write_is_in_flight()


def last_nodes_lose_power_while_a_change_is_made(seed: int) -> None:
    """A write that waited for a membership is not answered by who has lost it."""
    stage = Stage(seed, nodes=2, arbiter=True)
    cluster, first = stage.cluster, stage.at(1)
    stage.write(first)
    stage.flush()
    way = cluster.site.ways["gate-0"]
    way.back = False
    stage.kill(0)
    stage.guest.write(first, 8)
    stage.run(0.1)
    stage.cut(1)
    way.back = True
    stage.start(1)
    stage.answered()
    stage.read(first)
    stage.start(0)
    stage.settle()


def test_write_that_its_node_lost_before_the_answer_is_asked_again() -> None:
    """A restarted node stored the record, and so let an answer go for what it had lost."""
    for seed in range(30, 36):
        last_nodes_lose_power_while_a_change_is_made(seed)


def test_write_that_is_not_asked_again_is_noticed() -> None:
    noticed = 0
    for seed in range(30, 36):
        try:
            with breaking("UnansweredAskedAgain"):
                last_nodes_lose_power_while_a_change_is_made(seed)
        except Violation:
            noticed += 1
    assert noticed, "what chance leaves on a disk is lost at least once"


def set_a_disk_back_over_its_starts() -> Stage:
    """History 16: its start counter tells; nothing that it holds counts until it was healed."""
    stage = Stage(14)
    cluster, first = stage.cluster, stage.at(1)
    stage.write(first)
    stage.flush()
    stage.run(4.0)
    cluster.world.snapshot_disk(0)
    for _ in range(2):
        stage.kill(0)
        stage.start(0)
        stage.until(cluster.liveness.all_level, "the node is back")
        stage.write(first)
        stage.flush()
        stage.run(4.0)
    stage.kill(0)
    # The etcd lease of its last run is over, or it might run elsewhere.
    stage.run(12.0)
    cluster.nodes.put_back_disk(0)
    stage.start(0)
    stage.run(6.0)
    for _ in range(4):
        stage.read(first)
    return stage


def test_disk_that_was_set_back_over_its_starts_is_healed_by_itself() -> None:
    stage = set_a_disk_back_over_its_starts()
    told = [line for line in stage.cluster.lines if "was set back" in line]
    healed = [line for line in stage.cluster.lines if "node_healed node=node-0" in line]
    stage.settle()
    assert told, "the node knows"
    assert healed or not stage.stale()


def test_disk_that_was_set_back_and_is_believed_is_noticed() -> None:
    with broken(patch=planted_by_name("what was set back is distrusted")):
        set_a_disk_back_over_its_starts().settle()


def test_disk_that_was_set_back_waits_for_another_one_in_sync() -> None:
    """If all disks of a set were put back together nobody would be left to say so."""
    stage = Stage(15, nodes=2, arbiter=True)
    cluster, first = stage.cluster, stage.at(1)
    stage.write(first)
    cluster.world.snapshot_disk(0)
    stage.kill(0)
    stage.start(0)
    stage.run(1.0)
    stage.until(cluster.liveness.all_level, "the node is back")
    stage.kill(1)
    stage.write(first)
    stage.flush()
    stage.await_stale(1)
    stage.kill(0)
    stage.run(12.0)
    cluster.nodes.put_back_disk(0)
    stage.start(0)
    stage.start(1)
    stage.run(20.0)
    assert cluster.nodes.processes[0] is None, (
        "the stale one has not everything, and nobody else is there"
    )
    assert any("could be healed" in line for line in cluster.lines), "and it says so"
