"""The design's histories about heals: each passes, and is noticed with its rule broken."""

from __future__ import annotations

from tests.sim.defects import breaking, planted_by_name
from tests.sim.oracle import Violation
from tests.sim.stage import Stage, broken


def lose_node_with_a_write_in_flight() -> None:
    """History 2: the survivors have the write under the generation before the loss."""
    stage = Stage(shards=12)
    stage.write(stage.at(3))
    stage.flush()
    stage.run(4.0)
    stage.hold(0, 1)
    stage.guest.write(stage.at(5), 8)
    stage.run(0.1)
    stage.kill(1)
    stage.let_go(0, 1)
    stage.answered()
    assert stage.stale() == {"node-1"}
    stage.flush()
    stage.run(4.0)
    stage.start(1)
    stage.settle()


def test_write_in_flight_when_a_node_is_lost_is_on_its_heal_list() -> None:
    lose_node_with_a_write_in_flight()


def test_dirty_shards_that_keep_their_old_generation_are_noticed() -> None:
    with broken("DirtyCountsAsNewer"):
        lose_node_with_a_write_in_flight()


def test_generation_that_goes_with_its_dirty_entry_is_noticed() -> None:
    with broken("GenerationOutlivesEntry"):
        lose_node_with_a_write_in_flight()


def write_while_a_heal_makes_its_list() -> None:
    """History 2: the sources have said what they have when the write comes."""
    stage = Stage(shards=12)
    stage.kill(1)
    stage.write(stage.at(3))
    assert stage.stale() == {"node-1"}

    def heal_begins(_node: str) -> None:
        stage.slow(0, 0, 300)
        stage.cluster.clock.after(0.1, lambda: stage.guest.write(stage.at(9), 8))

    stage.cluster.on_heal = heal_begins
    stage.start(1)
    stage.run(8.0)
    stage.settle()


def test_write_while_a_heal_makes_its_list_is_on_it() -> None:
    write_while_a_heal_makes_its_list()


def test_write_that_a_heal_list_misses_is_noticed() -> None:
    with broken("WritesAreListed"):
        write_while_a_heal_makes_its_list()


def write_while_a_shard_is_copied() -> None:
    """History 5: a source that was compared before a write came to it lacks that."""
    stage = Stage(seed=13, shards=8)
    stage.kill(1)
    for shard in range(8):
        stage.write(stage.at(shard))
    for node in range(3):
        stage.slow(0, node, 5)

    def write_all() -> None:
        for shard in range(8):
            stage.guest.write(stage.at(shard), 8)

    def heal_begins(_node: str) -> None:
        # Some shards are compared by then, some are not yet, and some are right now.
        stage.cluster.on_heal = lambda _again: None
        stage.cluster.clock.after(0.07, write_all)

    stage.cluster.on_heal = heal_begins
    stage.start(1)
    stage.run(8.0)
    stage.settle()


def test_write_while_its_shard_is_copied_is_on_the_healed_node() -> None:
    write_while_a_shard_is_copied()


def test_shard_that_is_copied_beside_writes_is_noticed() -> None:
    with broken("HealPausesWrites", match="differs"):
        write_while_a_shard_is_copied()


def discard_while_a_node_is_away() -> None:
    """History 10: what was discarded must not come back with a node that still has it."""
    stage = Stage(shards=4)
    for shard in range(4):
        stage.write(stage.at(shard))
    stage.flush()
    stage.run(4.0)
    stage.hold(0, 2)
    stage.guest.zero(stage.at(2), 2048)
    stage.run(0.1)
    stage.kill(2)
    stage.let_go(0, 2)
    stage.answered()
    stage.flush()
    stage.run(4.0)
    stage.start(2)
    stage.settle()


def test_discarded_shard_does_not_come_back_with_a_node_that_was_away() -> None:
    discard_while_a_node_is_away()


def test_discard_that_a_heal_list_misses_is_noticed() -> None:
    with broken("DirtyCountsAsNewer"):
        discard_while_a_node_is_away()


def shrink_while_a_node_is_away() -> None:
    """History 10: what was cut off must not come back with a node that still has it."""
    stage = Stage(seed=12, shards=4)
    cluster = stage.cluster
    for shard in range(4):
        stage.write(stage.at(shard))
    stage.flush()
    stage.run(4.0)
    stage.guest.stop()
    stage.run(4.0)
    stage.kill(2)
    for shards in (2, 4):
        assert cluster.operator.resize(0, shards) is not None
        stage.until(lambda size=shards: cluster.size_shards() == size, "the image has that size")
        stage.run(4.0)
    assert stage.stale() == {"node-2"}
    stage.start(2)
    stage.await_stale()
    # The one that was away is needed, and read, from here on.
    stage.kill(0)
    stage.serve(1)
    for shard in range(4):
        stage.read(stage.at(shard), host=1)
    stage.start(0)
    stage.settle()


def test_shard_that_was_shrunk_away_does_not_come_back_with_a_node_that_was_away() -> None:
    shrink_while_a_node_is_away()


def test_shrunk_away_shard_that_is_kept_is_noticed() -> None:
    with broken(patch=planted_by_name("what a shrink cuts off is discarded"), match="read as"):
        shrink_while_a_node_is_away()


def lose_all_sources_during_a_heal() -> None:
    """History 5: what is level with one who lost its memory is not level with the others."""
    stage = Stage(seed=4, nodes=2, arbiter=True)
    stage.kill(1)
    stage.write(stage.at(1))
    assert stage.stale() == {"node-1"}
    stage.flush()
    stage.write(stage.at(1))
    power = [lambda: stage.cut(0), lambda: stage.start(0)]

    def heal_begins(_node: str) -> None:
        # The target has the unflushed write by then; its source loses it.
        stage.cluster.world.set_disk_speed(1, 400_000_000, 400_000_000)
        stage.cluster.clock.after(0.15, power[0])
        stage.cluster.clock.after(0.2, power[1])
        stage.cluster.on_heal = lambda _again: None

    stage.cluster.on_heal = heal_begins
    stage.start(1)
    stage.run(8.0)
    stage.settle()


def test_heal_whose_only_source_lost_its_power_begins_anew() -> None:
    lose_all_sources_during_a_heal()


def test_heal_that_goes_on_without_its_sources_is_noticed() -> None:
    with broken("HealNeedsItsSources"):
        lose_all_sources_during_a_heal()


def lose_power_after_a_heal(seed: int) -> None:
    """History 5: the record takes in who has synced."""
    stage = Stage(seed)
    stage.kill(1)
    for block in range(6):
        stage.write(stage.at(1, block))
    assert stage.stale() == {"node-1"}
    stage.start(1)
    stage.await_stale()
    stage.cut(1)
    stage.start(1)
    stage.settle()


def test_healed_node_that_loses_its_power_has_what_it_was_given() -> None:
    lose_power_after_a_heal(3)


def test_healed_node_that_had_not_synced_is_noticed() -> None:
    noticed = 0
    for seed in range(1, 41):
        try:
            with breaking("HealedIsDurable"):
                lose_power_after_a_heal(seed)
        except Violation:
            noticed += 1
    assert noticed, "what chance leaves on a disk is lost at least once"


def reset_the_healed_node_while_it_is_taken_in() -> None:
    """History 5: from its last shard on no change is answered without it."""
    stage = Stage(seed=8)
    stage.kill(1)
    stage.write(stage.at(1))
    assert stage.stale() == {"node-1"}
    path = stage.cluster.gateway_paths[0]

    def at_event(_gateway: int, kind: str, _node: str) -> None:
        if kind == "healed":
            # etcd takes it in; the holder does not hear of it at once.
            path.back = False
            stage.hold(0, 1)
            stage.cluster.clock.after(0.1, lambda: stage.guest.write(stage.at(1), 8))

    stage.cluster.on_event = at_event
    stage.start(1)
    stage.run(1.0)
    path.back = True
    stage.run(1.0)
    stage.let_go(0, 1)
    stage.settle()


def test_write_while_a_healed_node_is_taken_in_waits_for_it() -> None:
    reset_the_healed_node_while_it_is_taken_in()


def test_write_answered_without_a_healed_node_is_noticed() -> None:
    with broken("HealedNodeAnswers", match="in sync are"):
        reset_the_healed_node_while_it_is_taken_in()


def lose_the_healed_node_while_it_is_taken_in() -> None:
    """History 5: lost between the change in etcd and its answer, it counts."""
    stage = Stage(seed=9)
    stage.kill(1)
    stage.write(stage.at(1))
    path = stage.cluster.gateway_paths[0]

    def at_event(_gateway: int, kind: str, _node: str) -> None:
        if kind == "healed":
            path.back = False
            stage.cluster.clock.after(0.05, lambda: stage.kill(1))
            stage.cluster.clock.after(0.1, lambda: stage.guest.write(stage.at(1), 8))

    stage.cluster.on_event = at_event
    stage.start(1)
    stage.run(1.5)
    path.back = True
    stage.settle()


def test_healed_node_that_is_lost_counts_until_its_membership_is_known() -> None:
    lose_the_healed_node_while_it_is_taken_in()


def test_lost_healed_node_that_nobody_awaits_is_noticed() -> None:
    with broken("LostHealedIsAwaited", match="in sync are"):
        lose_the_healed_node_while_it_is_taken_in()


def lose_power_after_an_admission() -> None:
    """History 5: what a returned node was given is durable before its dirty entries go."""
    stage = Stage(seed=10)
    stage.write(stage.at(1))
    stage.cut(1)
    stage.start(1)
    stage.until(stage.cluster.liveness.all_level, "the node is back")
    stage.run(0.02)
    stage.cut(1)
    stage.start(1)
    stage.settle()


def test_levelled_node_that_loses_its_power_again_is_level_again() -> None:
    lose_power_after_an_admission()


def cut_all_when_one_has_more() -> None:
    """History 18: of two blocks of a shard each replica may have the newer one."""
    stage = Stage(seed=11)
    first, second = stage.at(1, 0), stage.at(1, 1)
    stage.write(first, 16)
    stage.flush()
    stage.hold(0, 1, 2)
    stage.guest.write(first, 8)
    stage.run(0.05)
    # Node 0 alone has it. The gateway is gone, and the others get what it has not.
    stage.cluster.stop_gateway(0, host=False)
    stage.kill(0)
    stage.let_go(0, 1, 2)
    stage.move_to(1)
    stage.write(second, host=1)
    stage.start(0)
    stage.settle()


def test_newer_block_of_a_node_that_was_away_gives_way_to_what_was_answered() -> None:
    cut_all_when_one_has_more()


def lose_a_discard_that_the_next_source_never_needed(seed: int) -> None:
    """History 5: whoever is healed knows of what it holds already, and others may yet lose."""
    stage = Stage(seed, shards=4)
    cluster, first = stage.cluster, stage.at(2)
    stage.kill(1)
    stage.write(first)
    stage.flush()
    stage.run(4.0)
    # With this sync the clear is durable too.
    stage.write(stage.at(0))
    stage.flush()
    stage.run(4.0)
    stage.guest.zero(first, 8, keep=False)
    stage.answered()

    def heal_begins(_node: str) -> None:
        cluster.on_heal = lambda _again: None
        cluster.world.set_disk_speed(1, 600_000_000, 600_000_000)
        cluster.clock.after(0.2, lambda: stage.cut(0))
        cluster.clock.after(0.25, lambda: stage.guest.write(stage.at(3), 8))

    cluster.on_heal = heal_begins
    for node in range(3):
        cluster.world.set_disk_speed(node, 50_000_000, 60_000_000)
    stage.start(1)
    stage.await_stale(0)
    stage.answered()
    stage.run(4.0)
    # Node 0 has lost the discard, and is healed by the one that was healed.
    stage.kill(2)
    stage.start(0)
    stage.guest.write(stage.at(3), 8)
    stage.answered()
    stage.await_stale(2)
    for _ in range(4):
        stage.read(first)
    stage.settle()


def test_discard_that_a_healed_node_had_already_is_given_to_who_lost_it() -> None:
    lose_a_discard_that_the_next_source_never_needed(2)


def test_tags_that_stay_behind_are_noticed() -> None:
    noticed = 0
    for seed in range(1, 4):
        try:
            with breaking("TagsAreCopied"):
                lose_a_discard_that_the_next_source_never_needed(seed)
        except Violation:
            noticed += 1
    assert noticed, "what chance leaves on a disk is lost at least once"


def hold_back_what_a_healed_node_pulls() -> None:
    """History 14: a holder gave a pull up, and its source's answer comes in over newer data."""
    stage = Stage(seed=5, shards=4)
    cluster, first = stage.cluster, stage.at(1)
    stage.kill(1)
    stage.write(first)
    assert stage.stale() == {"node-1"}

    # A greeting of node-0 takes so long to node-1, and so does what that one then asks for.
    cluster.world.set_peer_latency(0, 1, 20_000_000, 20_000_000)
    stage.start(1)
    stage.until(lambda: cluster.world.pulls(1) > 0, "a pull is under way")
    stage.run(0.03)
    cluster.world.set_peer_path(0, 1, False)
    # Node-1 is not taken in before it has synced.
    cluster.world.set_disk_speed(1, 2_000_000_000, 2_000_000_000)
    # Its source is lost for a moment: the heal begins the shard again with the other one.
    cluster.world.reset(0, 0)
    stage.run(0.5)
    stage.write(first)
    assert stage.stale() == {"node-1"}
    cluster.world.set_peer_path(0, 1, True)
    stage.run(3.0)
    stage.settle()


def test_pull_that_was_given_up_does_not_land_on_newer_data() -> None:
    hold_back_what_a_healed_node_pulls()


def test_pull_that_lands_on_newer_data_is_noticed() -> None:
    with broken("PullsAreOvertaken", match="differs|read as"):
        hold_back_what_a_healed_node_pulls()


def cut_a_healed_node_off_from_its_sources(*ways: tuple[int, int], reset: bool) -> None:
    """A node is healed although it does not reach the others, or not all the time."""
    stage = Stage(seed=6, shards=6)
    cluster = stage.cluster
    stage.kill(1)
    for shard in range(6):
        stage.write(stage.at(shard))
    assert stage.stale() == {"node-1"}

    def heal_begins(_node: str) -> None:
        cluster.on_heal = lambda _again: None
        for asking, asked in ways:
            cluster.world.set_peer_path(asking, asked, False)
        if reset:
            cluster.clock.after(0.001, lambda: cluster.world.reset_peers(1, 0))

    cluster.on_heal = heal_begins
    stage.start(1)
    stage.await_stale()
    for node in range(3):
        assert cluster.world.pulls(node) == 0
    stage.settle()


def test_heal_ends_without_lines_between_nodes() -> None:
    cut_a_healed_node_off_from_its_sources((1, 0), (1, 2), reset=False)


def test_heal_ends_where_nodes_hear_each_other_in_one_way_only() -> None:
    cut_a_healed_node_off_from_its_sources((0, 1), (2, 1), reset=False)


def test_heal_ends_where_a_line_between_nodes_breaks() -> None:
    cut_a_healed_node_off_from_its_sources(reset=True)
