"""Which scenario plays each of the design's histories, and which broken rules are noticed.

`docs/simulation.md` has it as a table, which `python -m tests.sim.coverage` writes; a test
compares.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.sim.defects import CANDIDATES, DEFECTS

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "simulation.md"
BEGIN, END = "<!-- coverage: begin -->", "<!-- coverage: end -->"


@dataclass(frozen=True, slots=True)
class Covered:
    """One of the design's histories, or an invariant.

    `scenarios` are tests that play it with its rule kept, `broken` those that play it with the rule
    broken; `defects` break it in random histories. `waits_for`: what none of it can be without.
    `part_waits_for`: a part of it, and for what that waits; all else is covered.
    """

    number: str
    title: str
    scenarios: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()
    defects: tuple[str, ...] = ()
    waits_for: str = ""
    part_waits_for: str = ""


HISTORIES = (
    Covered("1", "a fenced host's guest is let in again",
            ("guest_whose_image_was_anothers_is_not_let_in_again",),
            ("guest_that_is_let_in_again_is_noticed",),
            ("who was served is barred",),
            part_waits_for="by forwarding: forwarding"),
    Covered("2", "a write in flight is missed by a heal list",
            ("write_in_flight_when_a_node_is_lost_is_on_its_heal_list",
             "write_while_a_heal_makes_its_list_is_on_it"),
            ("dirty_shards_that_keep_their_old_generation_are_noticed",
             "generation_that_goes_with_its_dirty_entry_is_noticed",
             "write_that_a_heal_list_misses_is_noticed"),
            ("dirty shards count as newer", "a generation outlives its entry",
             "writes are listed while a heal lists")),
    Covered("3", "dirty entries are cleared too early",
            ("node_that_lost_its_power_while_idle_gets_back_what_it_lost",
             "write_that_rot_keeps_from_a_node_is_not_cleared"),
            ("clear_of_what_is_not_answered_is_noticed",),
            ("clears name what is answered", "sticky after a restart", "sticky until levelled")),
    Covered("4", "all nodes are killed, the gateway lives",
            ("all_killed_nodes_are_made_equal_among_each_other",),
            ("killed_nodes_that_wait_for_a_source_are_noticed",),
            ("reconcile where nobody stayed", "all in sync are levelled, or none")),
    Covered("5", "the end of a heal races",
            ("heal_whose_only_source_lost_its_power_begins_anew",
             "healed_node_that_loses_its_power_has_what_it_was_given",
             "write_while_a_healed_node_is_taken_in_waits_for_it",
             "healed_node_that_is_lost_counts_until_its_membership_is_known",
             "discard_that_a_healed_node_had_already_is_given_to_who_lost_it",
             "write_while_its_shard_is_copied_is_on_the_healed_node"),
            ("heal_that_goes_on_without_its_sources_is_noticed",
             "healed_node_that_had_not_synced_is_noticed",
             "write_answered_without_a_healed_node_is_noticed",
             "lost_healed_node_that_nobody_awaits_is_noticed",
             "tags_that_stay_behind_are_noticed",
             "shard_that_is_copied_beside_writes_is_noticed"),
            ("a heal pauses writes", "a healed node answers", "a lost healed node is awaited",
             "a heal needs its sources", "healed means durable", "levelled means durable",
             "tags are copied")),
    Covered("6", "a holder is cut off with one node",
            ("holder_cut_off_with_one_node_reads_nothing_that_others_have_replaced",),
            ("unconfirmed_read_of_a_holder_cut_off_is_noticed",),
            ("reads past the lease are confirmed", "the engine knows the lease's end")),
    Covered("7", "etcd is restored: one epoch, two holders; one generation, two sets",
            ("restored_etcd_serves_nobody_with_the_epoch_of_another",
             "node_left_behind_is_not_believed_after_etcd_was_restored"),
            ("two_holders_of_an_epoch_are_noticed",
             "node_left_behind_that_a_restored_etcd_calls_in_sync_is_noticed"),
            ("records grow", "equal records agree", "nodes judge etcd", "a recovery raises")),
    Covered("8", "etcd is lost: live images look like leftovers, deleted ones return",
            ("node_keeps_the_data_of_an_image_that_a_restored_etcd_lacks",
             "deleted_image_does_not_come_back_with_an_older_etcd",
             "image_deleted_while_a_node_was_away_goes_from_it_too",
             "id_of_a_deleted_image_is_never_given_again"),
            ("deleted_image_that_a_node_keeps_is_noticed",
             "live_image_that_is_collected_as_a_leftover_is_noticed",
             "id_that_is_given_twice_is_noticed"),
            ("nodes delete on tombstones", "nodes judge etcd", "a leftover needs a tombstone",
             "an id is given once")),
    Covered("9", "the arbiter refuses for ever, replaces, is stuck, forgets",
            ("healed_node_of_a_pair_stands_alone_when_the_other_is_lost",
             "grant_that_never_came_to_etcd_gives_way_to_the_other_node",
             "node_left_behind_is_not_believed_alone_after_etcd_was_restored",
             "emptied_arbiter_grants_nothing",
             "pair_goes_on_after_losing_its_parts_in_any_order"),
            ("arbiter_that_never_hears_of_a_heal_is_noticed", "arbiter_stuck_on_a_grant_is_noticed",
             "write_answered_before_the_arbiter_confirmed_is_noticed",
             "emptied_arbiter_that_is_believed_is_noticed"),
            ("confirmed before the answer", "a grant may be replaced",
             "judged by what etcd holds", "an emptied arbiter is refused")),
    Covered("10", "what was discarded or cut off returns with a node that was away",
            ("discarded_shard_does_not_come_back_with_a_node_that_was_away",
             "shard_that_was_shrunk_away_does_not_come_back_with_a_node_that_was_away",
             "layer_that_was_dropped_does_not_come_back_with_a_node_that_was_away",
             "layer_that_was_merged_does_not_come_back_with_a_node_that_was_away"),
            ("discard_that_a_heal_list_misses_is_noticed",
             "shrunk_away_shard_that_is_kept_is_noticed",
             "dropped_layer_that_a_node_keeps_is_noticed",
             "merge_that_overwrites_is_noticed"),
            ("dirty shards count as newer", "a generation outlives its entry",
             "what a shrink cuts off is discarded", "dropped layers go",
             "merges fill gaps", "what is merged keeps its generation",
             "merged before it is compared", "changes are since a snapshot")),
    Covered("11", "a clone is read through a stale parent",
            ("clone_is_not_read_through_a_parent_that_is_stale_there",
             "clone_finds_that_its_parent_was_lost_and_both_are_healed",
             "snapshot_with_a_clone_is_not_removed_and_its_neighbours_are"),
            ("clone_that_is_read_through_a_stale_parent_is_noticed",
             "clone_that_is_read_through_a_parent_that_was_lost_is_noticed",
             "removal_of_what_has_a_clone_is_noticed"),
            ("ancestors are healed first", "what has clones stays")),
    Covered("12", "an image is created while a set moves", waits_for="placement moves"),
    Covered("13", "a snapshot differs by a write in flight",
            ("write_in_flight_is_in_a_snapshot_on_all_nodes",
             "snapshot_is_durable_on_all_nodes",
             "snapshot_that_nobody_has_stored_is_withdrawn_by_the_next_holder",
             "snapshot_that_one_set_has_stored_is_kept",
             "snapshot_that_no_node_has_stored_is_not_read"),
            ("snapshot_that_does_not_wait_for_writes_is_noticed",
             "snapshot_that_is_not_flushed_is_noticed",
             "snapshot_that_nobody_has_stored_and_is_kept_is_noticed",
             "snapshot_that_one_set_has_stored_and_is_withdrawn_is_noticed",
             "reader_of_a_layer_that_is_written_is_noticed"),
            ("snapshots wait for writes", "snapshots are flushed",
             "snapshots that nobody stored go",
             "each set says that a snapshot is not stored", "readers read what is frozen")),
    Covered("14", "late frames",
            ("late_write_of_a_former_holder_is_dropped",
             "old_connection_of_the_same_holder_delivers_nothing_any_more",
             "copy_that_a_dead_holder_ordered_is_dropped",
             "pull_that_was_given_up_does_not_land_on_newer_data"),
            ("late_write_that_is_applied_under_another_epoch_is_noticed",
             "frame_of_a_former_connection_is_noticed",
             "copy_that_lands_on_newer_data_is_noticed",
             "pull_that_lands_on_newer_data_is_noticed"),
            ("sessions", "epochs at the nodes", "generations at the nodes",
             "what comes later overtakes pulls", "pulls end with their session",
             "peers ask under the record")),
    Covered("15", "a failed sync succeeds on retry",
            ("node_whose_sync_failed_ends",), ("sync_that_is_tried_again_is_noticed",),
            ("a failed sync ends the store",)),
    Covered("16", "a disk is put back to an older state",
            ("disk_that_was_rolled_back_within_one_run_is_stale_since_ever",
             "disk_that_was_set_back_over_its_starts_is_healed_by_itself",
             "disk_that_was_set_back_waits_for_another_one_in_sync"),
            ("rolled_back_disk_that_is_believed_is_noticed",
             "disk_that_was_set_back_and_is_believed_is_noticed"),
            ("flush numbers", "what was set back is distrusted")),
    Covered("17", "two writes share a block; a merge hides rot",
            ("two_writes_of_parts_of_a_block_are_both_there_on_each_replica",
             "write_that_waits_for_a_repair_keeps_others_from_its_block",
             "write_while_a_repair_copies_its_block_is_not_overwritten",
             "rotten_block_is_read_from_another_replica"),
            ("writes_of_a_block_in_two_orders_are_noticed",
             "repair_that_goes_on_beside_writes_is_noticed",
             "rotten_block_that_is_returned_is_noticed"),
            ("block writes are ordered", "reads are verified", "a repair pauses writes")),
    Covered("18", "reconcile by shard drops what by block survives",
            ("newest_block_wins_whatever_else_its_shard_has",
             "newer_block_of_a_node_that_was_away_gives_way_to_what_was_answered"),
            ("winner_that_is_chosen_for_a_whole_shard_is_noticed",),
            ("a winner for each block", "level before requests")),
    Covered("19", "two gateway processes of one host",
            ("second_process_of_a_gateways_name_does_not_take_its_images",),
            ("lease_taken_by_the_name_alone_is_noticed",),
            ("the lock file tells who is dead",)),
    Covered("20", "a dead pair in one set stalls another",
            ("dead_pair_of_one_set_does_not_stall_another_that_lost_one_of_them",
             "set_whose_nodes_all_came_back_waits_for_no_other_set"),
            ("set_that_waits_for_another_is_noticed",
             "node_that_joins_for_all_its_sets_or_for_none_is_noticed"),
            ("sets go on alone", "sets are founded alone")),
    Covered("21", "a read sees a write that then vanishes",
            ("read_waits_for_the_write_in_flight_on_its_block",),
            ("read_of_a_write_that_vanishes_is_noticed",), ("reads wait for writes",)),
)  # fmt: skip

INVARIANTS = (
    Covered("1", "a flushed write is read back",
            ("flushed_writes_survive_a_power_cut_of_all_nodes",
             "flush_fails_once_where_all_have_lost_their_power",
             "loss_is_told_when_the_one_that_remembers_is_left_behind",
             "failed_sync_of_the_last_node_counts_as_lost_memory",
             "flush_under_way_waits_for_a_node_that_came_back_without_what_it_covers"),
            ("flush_that_is_answered_early_is_noticed",
             "flush_answered_by_who_lost_what_it_covers_is_noticed",
             "flush_that_succeeds_over_lost_writes_is_noticed"),
            ("a flush is durable", "a flush waits for levelling", "a first flush goes to all",
             "a loss is told")),
    Covered("2", "a read returns the last answered write, or one in flight",
            ("write_that_its_node_lost_before_the_answer_is_asked_again",),
            ("write_that_is_not_asked_again_is_noticed",),
            ("unanswered writes are asked again", "reads wait for writes", "sessions")),
    Covered("3", "in-sync replicas are equal", defects=(
        "level before requests", "a heal pauses writes", "a repair pauses writes")),
    Covered("4", "one epoch is answered; nothing goes back",
            ("write_waits_until_the_new_membership_is_stored",),
            ("answer_before_the_membership_is_stored_is_noticed",),
            ("stored before the answer", "records grow", "equal records agree",
             "what is confirmed stays")),
    Covered("5", "all in sync answer, a quorum at least", defects=(
        "all in sync answer", "quorum", "membership before acknowledgement",
        "confirmed before the answer")),
    Covered("6", "a bad block is never returned, nor a source", defects=("reads are verified",)),
    Covered("7", "deleted images never come back",
            ("deleted_image_does_not_come_back_with_an_older_etcd",),
            ("deleted_image_that_a_node_keeps_is_noticed", "id_that_is_given_twice_is_noticed"),
            ("nodes delete on tombstones", "an id is given once")),
    Covered("8", "queues are bounded", defects=("a change is asked for once",)),
    Covered("9", "after the last fault all is in sync, and I/O runs", defects=(
        "reconcile where nobody stayed", "sets go on alone", "a grant may be replaced",
        "judged by what etcd holds", "nodes judge etcd")),
)  # fmt: skip

WITHIN = {defect.name: defect.within for defect in (*DEFECTS, *CANDIDATES)}


def scenario_names() -> Iterator[str]:
    """Yield the names of all tests of scenarios, without `test_`."""
    for path in sorted(Path(__file__).parent.glob("test_scenarios*.py")):
        yield from re.findall(r"^def test_(\w+)\(", path.read_text(), re.MULTILINE)


def table(covered: tuple[Covered, ...]) -> Iterator[str]:
    """Yield the lines of a table."""
    yield "| | what must not happen | scenarios | broken, by hand | broken, noticed by chance |"
    yield "| --- | --- | ---: | ---: | --- |"
    for each in covered:
        found = [
            f"{name} ({WITHIN[name]})" if WITHIN[name] else f"{name} (by hand only)"
            for name in each.defects
        ]
        found += [f"*{waits}*" for waits in (each.waits_for, each.part_waits_for) if waits]
        counts = f"{len(each.scenarios) or ''} | {len(each.broken) or ''}"
        yield f"| {each.number} | {each.title} | {counts} | {'; '.join(found)} |"


def text() -> str:
    """Return what stands in the page between the two marks."""
    invariants = [line.replace("must not happen", "must hold") for line in table(INVARIANTS)]
    return "\n".join([*table(HISTORIES), "", "The invariants:", "", *invariants])


def main() -> int:
    """Write it into the page."""
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n{text()}\n{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
