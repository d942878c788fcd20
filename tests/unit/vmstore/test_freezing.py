"""A snapshot as the holder of an image takes it, and a rollback to one: each step, and what may
befall it there."""

from dataclasses import replace

from etcd.images import ImageRecord
from tests.unit.samples import NODES
from tests.unit.vmstore.test_holder import changes, gathering, peeked, record, serving, view
from vmstore import effects as wanted
from vmstore import events, merging, snapshot_steps, standing
from vmstore import freezing as f
from vmstore.freezing import Stage
from vmstore.holder import Holder
from vmstore.layer_changes import NewSnapshot, Rollback
from vmstore.standing import Phase

ORDER = events.ChangeLayers(NewSnapshot("monday", 1_800_000_000))
TAKEN = record().with_snapshot("monday", 1_800_000_000)
WITHDRAWN = TAKEN.without_newest_snapshot()


def changing() -> Holder:
    """One whose changes wait for etcd."""
    holder = serving()
    assert holder.step(ORDER) == [wanted.Freeze(1)]
    assert holder.step(events.Frozen(1)) == [wanted.ChangeMembership(record(), TAKEN)]
    return holder


def storing() -> Holder:
    holder = changing()
    assert holder.step(events.MembershipChanged(TAKEN)) == [wanted.Reconfigure(TAKEN)]
    return holder


def told(effects: list[wanted.Effect]) -> wanted.TellLayers | None:
    found = [effect for effect in effects if isinstance(effect, wanted.TellLayers)]
    assert len(found) <= 1
    return found[0] if found else None


def failure(effects: list[wanted.Effect]) -> str:
    found = told(effects)
    assert found is not None
    assert found.failed is not None
    return found.failed


def test_snapshot_is_frozen_then_taken_by_etcd_then_stored_then_told() -> None:
    holder = storing()
    assert holder.record == TAKEN
    assert holder.step(events.Stored(TAKEN.generation - 1)) == []
    assert holder.step(events.Stored(TAKEN.generation)) == [wanted.TellLayers()]
    assert holder.freezing.stage is Stage.NONE
    # And the next one, on top of it.
    assert holder.step(events.ChangeLayers(NewSnapshot("tuesday", 0))) == [wanted.Freeze(2)]
    (change,) = changes(holder.step(events.Frozen(2)))
    assert change.after.layer_ids == [3, 2, 1]


def test_snapshot_of_an_image_that_is_being_closed_is_refused() -> None:
    holder = serving()
    holder.step(events.Close())
    assert "being closed" in failure(holder.step(ORDER))


def test_snapshot_waits_until_all_nodes_in_sync_are_level() -> None:
    holder = gathering()
    for node in NODES:
        holder.step(peeked(node))
    holder.step(events.Admitted(frozenset({"node3"})))
    assert holder.step(ORDER) == []
    assert holder.step(events.Tick(f.LEVEL_LIMIT_S - 1)) == []
    assert holder.step(events.Levelled("node3")) == [wanted.Freeze(1)]


def test_snapshot_gives_up_on_nodes_that_are_not_made_level() -> None:
    holder = gathering()
    for node in NODES:
        holder.step(peeked(node))
    holder.step(events.Admitted(frozenset({"node3"})))
    holder.step(ORDER)
    assert "node3 is not level" in failure(holder.step(events.Tick(f.LEVEL_LIMIT_S)))
    assert holder.freezing.stage is Stage.NONE


def test_node_that_is_lost_is_left_behind_for_a_snapshot_though_no_client_waits() -> None:
    holder = serving()
    assert holder.step(events.ReplicaDown("node3", blocking=False)) == []
    (change,) = changes(holder.step(ORDER))
    assert change.after.stale == {0: {"node3": 1}}
    assert change.after.layers == record().layers
    effects = holder.step(events.MembershipChanged(change.after))
    assert effects == [wanted.Reconfigure(change.after)]
    assert holder.step(events.Stored(2)) == [wanted.Freeze(1)]


def test_snapshot_below_the_quorum_gives_up_and_nothing_was_held_up() -> None:
    holder = serving()
    holder.step(events.ReplicaDown("node3", blocking=False))
    holder.step(events.ReplicaDown("node2", blocking=False))
    assert holder.step(ORDER) == []
    assert holder.step(events.Tick(0.1)) == []
    assert holder.step(events.Tick(f.WAIT_LIMIT_S)) == []
    effects = holder.step(events.Tick(f.WAIT_LIMIT_S + 0.1))
    assert "node2, node3 is not there" in failure(effects)
    assert wanted.Thaw(1) not in effects


def test_node_lost_while_it_freezes_thaws_and_is_left_behind_first() -> None:
    holder = serving()
    holder.step(ORDER)
    effects = holder.step(events.ReplicaDown("node3", blocking=True))
    assert effects[0] == wanted.Thaw(1)
    (change,) = changes(effects)
    assert change.after.stale == {0: {"node3": 1}}
    # What the engine says of the first freeze came too late to count.
    assert holder.step(events.Frozen(1)) == holder.step(events.FreezeFailed(1, "lost")) == []
    holder.step(events.MembershipChanged(change.after))
    assert holder.step(events.Stored(2)) == [wanted.Freeze(2)]


def test_freeze_that_the_engine_refuses_at_once_is_tried_again_after_a_pause() -> None:
    holder = serving()
    holder.step(ORDER)
    assert holder.step(events.FreezeFailed(1, "not level")) == []
    assert holder.step(events.Tick(snapshot_steps.RETRY_S - 0.1)) == []
    assert holder.step(events.Tick(snapshot_steps.RETRY_S)) == [wanted.Freeze(2)]


def test_node_that_the_engine_loses_first_is_left_behind_and_the_image_frozen_again() -> None:
    """A node was killed as the image froze: the engine said that the freeze had failed before it
    said why, and the snapshot was given up."""
    holder = serving()
    holder.step(ORDER)
    holder.step(events.Tick(0.6))
    assert holder.step(events.FreezeFailed(1, "a node in sync was lost")) == []
    (change,) = changes(holder.step(events.ReplicaDown("node3", blocking=True)))
    holder.step(events.MembershipChanged(change.after))
    assert holder.step(events.Stored(2)) == []
    assert holder.step(events.Tick(0.6 + snapshot_steps.RETRY_S)) == [wanted.Freeze(2)]


def test_freeze_that_held_clients_up_in_vain_ends_the_snapshot() -> None:
    holder = serving()
    holder.step(ORDER)
    # Its first flush held nobody up, however long it took.
    holder.step(events.Tick(20.0))
    assert holder.step(events.Holding(1)) == []
    holder.step(events.Tick(22.0))
    effects = holder.step(events.FreezeFailed(1, "node2 did not flush in time"))
    assert "node2 did not flush in time; try again" in failure(effects)
    assert holder.step(events.Tick(23.0)) == []


def test_freeze_that_failed_before_clients_waited_is_tried_again() -> None:
    holder = serving()
    holder.step(ORDER)
    holder.step(events.Tick(20.0))
    assert holder.step(events.FreezeFailed(1, "a node in sync was lost")) == []
    assert holder.step(events.Tick(20.0 + snapshot_steps.RETRY_S)) == [wanted.Freeze(2)]


def test_node_that_fails_again_and_again_does_not_have_clients_wait_each_time() -> None:
    # Below its quorum the image cannot leave it behind.
    holder = serving(record(generation=2, stale={0: {"node2": 1}}))
    holder.step(ORDER)
    now_s, effects = 0.0, []
    for attempt in range(1, 20):
        holder.step(events.Holding(attempt))
        now_s += 0.5
        holder.step(events.Tick(now_s))
        effects = holder.step(events.ReplicaFailed("node3", "Io"))
        assert effects[0] == wanted.Thaw(attempt)
        if told(effects) is not None:
            break
        assert changes(effects) == []
        now_s += standing.FAILING_S
        assert wanted.Freeze(attempt + 1) in holder.step(events.Tick(now_s))
    assert "again and again" in failure(effects)
    assert attempt == 3


def test_node_lost_after_a_long_wait_has_its_time_to_be_left_behind() -> None:
    """The whole time that an image was levelled counted: the snapshot ended at once."""
    holder = gathering()
    for node in NODES:
        holder.step(peeked(node))
    holder.step(events.Admitted(frozenset({"node2"})))
    holder.step(ORDER)
    holder.step(events.Tick(100.0))
    (change,) = changes(holder.step(events.ReplicaDown("node3", blocking=True)))
    assert holder.step(events.Tick(100.1)) == []
    holder.step(events.MembershipChanged(change.after))
    assert holder.step(events.Tick(130.0)) == []


def test_node_that_does_not_store_the_record_is_left_behind_as_a_slow_one() -> None:
    """Its disk stood still between the flush and the record: writes waited for ever."""
    holder = storing()
    now_s = 0.0
    found = []
    while not found and now_s < 30.0:
        now_s += 1.0
        found = changes(holder.step(events.Tick(now_s)))
        found += changes(holder.step(events.Lags({"node3": 9_000})))
    (change,) = found
    assert change.after == replace(TAKEN, generation=3, stale={0: {"node3": 2}})
    holder.step(events.MembershipChanged(change.after))
    assert holder.step(events.Stored(3)) == [wanted.TellLayers()]


def test_snapshot_that_etcd_surely_does_not_have_thaws_and_fails() -> None:
    holder = changing()
    effects = holder.step(events.MembershipDelayed("no leader", maybe_taken=False))
    assert effects == [wanted.Thaw(1), wanted.TellLayers("no leader")]
    assert holder.proposal is None
    assert not holder.changes_record
    assert holder.step(events.Tick(5.0)) == []


def test_snapshot_that_etcd_may_have_waits_a_little_and_is_taken() -> None:
    holder = changing()
    assert holder.step(events.MembershipDelayed("no answer", maybe_taken=True)) == []
    assert holder.trouble == "a snapshot waits: no answer"
    again = holder.step(events.Tick(snapshot_steps.RETRY_S))
    assert again == [wanted.ChangeMembership(record(), TAKEN)]
    assert holder.step(events.MembershipChanged(TAKEN)) == [wanted.Reconfigure(TAKEN)]
    assert holder.step(events.Stored(2)) == [wanted.TellLayers()]


def late() -> Holder:
    """One that has let clients go on, and does not know what etcd has."""
    holder = changing()
    effects = holder.step(events.Tick(f.THAW_AFTER_S))
    assert effects == [wanted.Thaw(1), wanted.TellLayers(failed=failure(effects))]
    assert "etcd did not answer within 1 s" in failure(effects)
    assert holder.changes_record
    return holder


def test_clients_do_not_wait_for_etcd_and_what_it_took_is_withdrawn() -> None:
    holder = late()
    # Clients have written since into what would be the snapshot.
    effects = holder.step(events.MembershipChanged(TAKEN))
    assert effects == [wanted.ChangeMembership(TAKEN, WITHDRAWN)]
    assert holder.step(events.MembershipChanged(WITHDRAWN)) == [wanted.Reconfigure(WITHDRAWN)]
    assert (WITHDRAWN.layer_ids, WITHDRAWN.snapshots, WITHDRAWN.next_layer) == ([1], (), 3)
    assert not holder.changes_record
    assert holder.step(events.Stored(WITHDRAWN.generation)) == []


def test_withdrawal_leaves_lost_nodes_behind_in_the_same_change() -> None:
    holder = late()
    assert holder.step(events.ReplicaDown("node3", blocking=True)) == []
    (change,) = changes(holder.step(events.MembershipChanged(TAKEN)))
    assert change.after == replace(WITHDRAWN, stale={0: {"node3": 2}})


def test_what_etcd_never_got_needs_no_withdrawal() -> None:
    holder = changing()
    holder.step(events.Tick(f.THAW_AFTER_S))
    assert holder.step(events.MembershipDelayed("no leader", maybe_taken=False)) == []
    assert not holder.changes_record
    assert holder.record == record()


def test_withdrawal_that_etcd_may_have_is_made_until_that_is_known() -> None:
    holder = late()
    holder.step(events.MembershipChanged(TAKEN))
    assert holder.step(events.MembershipDelayed("no answer", maybe_taken=True)) == []
    again = holder.step(events.Tick(f.THAW_AFTER_S + snapshot_steps.RETRY_S))
    assert again == [wanted.ChangeMembership(TAKEN, WITHDRAWN)]
    assert holder.step(events.MembershipChanged(WITHDRAWN)) == [wanted.Reconfigure(WITHDRAWN)]


def test_withdrawal_that_surely_failed_is_tried_again() -> None:
    holder = late()
    holder.step(events.MembershipChanged(TAKEN))
    holder.step(events.MembershipDelayed("no leader", maybe_taken=False))
    assert holder.changes_record
    again = holder.step(events.Tick(f.THAW_AFTER_S + snapshot_steps.RETRY_S))
    assert again == [wanted.ChangeMembership(TAKEN, WITHDRAWN)]


def test_node_lost_while_the_others_store_it_is_left_behind_though_nobody_blocks() -> None:
    holder = storing()
    (change,) = changes(holder.step(events.ReplicaDown("node3", blocking=False)))
    assert change.after == replace(TAKEN, generation=3, stale={0: {"node3": 2}})
    effects = holder.step(events.MembershipChanged(change.after))
    assert effects == [wanted.Reconfigure(change.after)]
    assert holder.step(events.Stored(2)) == []
    assert holder.step(events.Stored(3)) == [wanted.TellLayers()]


def test_lost_image_tells_who_wanted_a_snapshot_of_it() -> None:
    for holder, unknown in ((changing(), False), (storing(), True)):
        effects = holder.step(events.Lost("another gateway has it"))
        assert told(effects) == wanted.TellLayers("another gateway has it", unknown)
        assert wanted.KillImage() in effects


def test_close_gives_a_snapshot_up_that_is_not_in_etcd() -> None:
    holder = serving()
    holder.step(ORDER)
    effects = holder.step(events.Close())
    assert effects[0] == wanted.Thaw(1)
    assert "being closed" in failure(effects)
    assert effects[-1] == wanted.CloseImage()
    assert holder.step(events.Frozen(1)) == []


def test_close_while_etcd_is_asked_withdraws_what_it_took() -> None:
    holder = changing()
    holder.step(events.Close())
    effects = holder.step(events.MembershipChanged(TAKEN))
    assert effects == [wanted.ChangeMembership(TAKEN, WITHDRAWN)]
    assert holder.step(events.MembershipChanged(WITHDRAWN)) == [wanted.Reconfigure(WITHDRAWN)]
    assert holder.step(events.Closed(True)) == [wanted.Release(WITHDRAWN, True)]


def test_close_while_nodes_store_it_tells_how_that_ends() -> None:
    holder = storing()
    assert holder.step(events.Close()) == [wanted.CloseImage()]
    assert holder.step(events.Stored(2)) == [wanted.TellLayers()]
    holder = storing()
    holder.step(events.Close())
    effects = holder.step(events.Closed(True))
    assert "before its nodes had stored it" in failure(effects)
    assert told(effects) == wanted.TellLayers(failure(effects), unknown=True)
    assert effects[-1] == wanted.Release(TAKEN, True)


def test_nothing_else_changes_the_record_while_a_snapshot_is_taken() -> None:
    holder = changing()
    assert holder.step(events.ReplicaDown("node3", blocking=True)) == []
    assert holder.step(events.Lags({"node2": 9_000})) == []
    assert holder.phase is Phase.SERVING


def opened(
    ours: ImageRecord, views: dict[str, events.NodeRecordView | None]
) -> list[wanted.Effect]:
    """What a new holder does when it has heard these nodes."""
    holder = gathering(ours)
    effects: list[wanted.Effect] = []
    for serial, (node, known) in enumerate(views.items(), 1):
        effects += holder.step(events.Peeked(node, 1, 9, False, known, serial))
    return effects


def test_new_holder_withdraws_a_snapshot_that_no_node_has_stored() -> None:
    """A gateway had let its clients go on when etcd was late, and died: they had written into the
    layer that etcd then called frozen, and nodes differed in what was not flushed."""
    ours = replace(TAKEN, epoch=4)
    known = view(record())
    effects = opened(ours, dict.fromkeys(NODES, known))
    gone = ours.without_newest_snapshot()
    assert effects == [wanted.ChangeMembership(ours, gone)]


def test_new_holder_lets_nobody_in_before_etcd_has_taken_the_withdrawal() -> None:
    """etcd was away just then: nodes were let in, and stored what was to be withdrawn."""
    ours = replace(TAKEN, epoch=4)
    holder = gathering(ours)
    for serial, node in enumerate(NODES, 1):
        holder.step(events.Peeked(node, 1, 9, False, view(record()), serial))
    assert holder.step(events.MembershipDelayed("no leader", maybe_taken=False)) == []
    gone = ours.without_newest_snapshot()
    again = holder.step(events.Tick(snapshot_steps.RETRY_S))
    assert again == [wanted.ChangeMembership(ours, gone)]
    effects = holder.step(events.MembershipChanged(gone))
    assert effects == [wanted.Reconfigure(gone), wanted.Admit(NODES, False, (1, 2, 3))]


def test_new_holder_withdraws_a_snapshot_as_it_leaves_a_node_behind() -> None:
    """Else the others would be told of a record that has it."""
    ours = replace(TAKEN, epoch=4)
    holder = gathering(ours)
    for serial, node in enumerate(("node1", "node2"), 1):
        holder.step(events.Peeked(node, 1, 9, False, view(record()), serial))
    (change,) = changes(holder.step(events.Tick(standing.GRACE_S)))
    assert change.after == replace(ours.without_newest_snapshot(), stale={0: {"node3": 2}})


def test_new_holder_keeps_a_snapshot_while_nobody_of_a_set_says_that_it_has_not_stored_it() -> None:
    """Writes to a set are answered as soon as its own nodes have stored the new layer. They were
    away when the next holder withdrew it, by the word of another set: the writes were lost."""
    sets = (("a1", "a2", "a3"), ("b1", "b2", "b3"))
    before = replace(record(), sets=sets)
    ours = replace(before.with_snapshot("monday", 0), epoch=4)
    holder = gathering(ours)
    known = view(before)
    for serial, node in enumerate(sets[1], 1):
        holder.step(events.Peeked(node, 1, 9, False, known, serial))
    for now_s in (1.0, standing.GRACE_S, 2 * standing.GRACE_S):
        assert changes(holder.step(events.Tick(now_s))) == []
    # Those of the first set come back, and have it.
    stored = view(ours)
    effects: list[wanted.Effect] = []
    for serial, node in enumerate(sets[0], 4):
        effects += holder.step(events.Peeked(node, 1, 9, False, stored, serial))
    # The last one has had its time meanwhile.
    (change,) = changes(effects)
    assert (change.after.layers, change.after.snapshots) == (ours.layers, ours.snapshots)
    assert change.after.stale == {0: {"a3": 2}}


def test_new_holder_keeps_a_snapshot_that_one_node_has_stored() -> None:
    """All of them were frozen then."""
    ours = replace(TAKEN, epoch=4)
    older, newer = view(record()), view(TAKEN)
    effects = opened(ours, {"node1": older, "node2": newer, "node3": older})
    assert effects == [wanted.Admit(NODES, False, (1, 2, 3))]


def test_new_holder_keeps_snapshots_below_its_newest_change() -> None:
    """The generation rose since for another reason, which no node had stored."""
    ours = replace(TAKEN, epoch=4, generation=9)
    effects = opened(ours, dict.fromkeys(NODES, view(TAKEN)))
    assert effects == [wanted.Admit(NODES, False, (1, 2, 3))]


def test_snapshots_are_not_withdrawn_by_nodes_that_are_further_behind() -> None:
    """The only node in sync had an older disk: one snapshot after the other was withdrawn."""
    twice = TAKEN.with_snapshot("tuesday", 0)
    ours = replace(twice, epoch=4)
    for known in (view(record()), None):
        effects = opened(ours, dict.fromkeys(NODES, known))
        assert changes(effects) == []
    (change,) = changes(opened(ours, dict.fromkeys(NODES, view(TAKEN))))
    assert change.after.snapshots == TAKEN.snapshots


def test_store_that_was_set_back_does_not_tell_whether_a_snapshot_was_stored() -> None:
    ours = replace(TAKEN, epoch=4)
    back = view(record(), distrusted=True)
    effects = opened(ours, {"node1": back, "node2": view(TAKEN), "node3": view(TAKEN)})
    assert [change.after.layers for change in changes(effects)] == [TAKEN.layers]
    assert changes(effects)[0].after.stale == {0: {"node1": 0}}


# Rollbacks

SHOT = TAKEN.snapshots[0]
BACK = events.ChangeLayers(Rollback("monday"))
ROLLED_BACK = TAKEN.rolled_back(SHOT)


def settled(ours: ImageRecord = TAKEN) -> Holder:
    """One whose nodes in sync have stored its record."""
    holder = gathering(ours)
    for node in ours.membership.all_in_sync():
        holder.step(events.Peeked(node, 1, 9, False, view(ours), 1))
    assert wanted.Serve() in holder.step(events.Admitted())
    return holder


def going_back() -> Holder:
    """One whose rollback waits for etcd."""
    holder = settled()
    assert holder.step(BACK) == [wanted.Freeze(1)]
    assert holder.step(events.Frozen(1)) == [wanted.ChangeMembership(TAKEN, ROLLED_BACK)]
    return holder


def test_rollback_is_frozen_then_taken_by_etcd_then_stored_then_told() -> None:
    holder = going_back()
    assert ROLLED_BACK.layer_ids == [3, 1]
    assert holder.step(events.MembershipChanged(ROLLED_BACK)) == [wanted.Reconfigure(ROLLED_BACK)]
    assert holder.step(events.Stored(ROLLED_BACK.generation)) == [wanted.TellLayers()]
    assert holder.record == ROLLED_BACK
    assert holder.step(events.Close()) == [wanted.CloseImage()]


def test_rollback_waits_for_etcd_since_no_client_does() -> None:
    holder = going_back()
    assert holder.step(events.MembershipDelayed("no answer", maybe_taken=True)) == []
    assert holder.trouble == "a rollback waits: no answer"
    again = holder.step(events.Tick(10 * f.THAW_AFTER_S))
    assert again == [wanted.ChangeMembership(TAKEN, ROLLED_BACK)]
    assert holder.step(events.MembershipChanged(ROLLED_BACK)) == [wanted.Reconfigure(ROLLED_BACK)]
    assert holder.step(events.Stored(ROLLED_BACK.generation)) == [wanted.TellLayers()]


def test_rollback_that_etcd_surely_does_not_have_fails_and_leaves_all_as_it_was() -> None:
    holder = going_back()
    effects = holder.step(events.MembershipDelayed("no leader", maybe_taken=False))
    assert effects == [wanted.Thaw(1), wanted.TellLayers("no leader")]
    assert (holder.record, holder.changes_record) == (TAKEN, False)
    assert holder.step(events.Tick(5.0)) == []


def test_close_while_etcd_is_asked_for_a_rollback_waits_until_that_is_known() -> None:
    """By neither record the image could be closed: etcd may have either."""
    holder = going_back()
    assert holder.step(events.Close()) == []
    holder.step(events.MembershipChanged(ROLLED_BACK))
    assert holder.step(events.Stored(ROLLED_BACK.generation)) == [wanted.TellLayers()]
    assert holder.step(events.Close()) == [wanted.CloseImage()]
    assert holder.step(events.Closed(True)) == [wanted.Release(ROLLED_BACK, True)]


def test_lost_image_tells_that_it_is_not_known_whether_it_was_rolled_back() -> None:
    effects = going_back().step(events.Lost("another gateway has it"))
    assert told(effects) == wanted.TellLayers("another gateway has it", unknown=True)


def test_close_before_etcd_is_asked_for_a_rollback_gives_it_up() -> None:
    holder = settled()
    holder.step(BACK)
    effects = holder.step(events.Close())
    assert effects[0] == wanted.Thaw(1)
    assert told(effects) == wanted.TellLayers(failure(effects), unknown=False)


def test_node_lost_while_the_others_store_a_rollback_is_left_behind() -> None:
    holder = going_back()
    holder.step(events.MembershipChanged(ROLLED_BACK))
    (change,) = changes(holder.step(events.ReplicaDown("node3", blocking=False)))
    later = ROLLED_BACK.generation
    assert change.after == replace(ROLLED_BACK, generation=later + 1, stale={0: {"node3": later}})


def test_heal_ends_before_a_rollback_and_begins_anew_after_it() -> None:
    """It copied layers that were gone when its copies came."""
    holder = settled(replace(TAKEN, stale={0: {"node3": 1}}))
    assert holder.record is not None
    (heal,) = holder.step(peeked("node3", serial=7))
    assert isinstance(heal, wanted.Heal)
    assert holder.step(BACK) == [wanted.EndHeal(heal.attempt), wanted.Freeze(1)]
    (change,) = changes(holder.step(events.Frozen(1)))
    assert change.after == holder.record.rolled_back(SHOT)
    holder.step(events.MembershipChanged(change.after))
    holder.step(events.Stored(change.after.generation))
    (again,) = holder.step(events.Tick(60.0))
    assert isinstance(again, wanted.Heal)


def test_new_holder_keeps_a_rollback_that_no_node_has_stored() -> None:
    """Its top is empty, and what is below has been frozen for long: it holds, whoever heard."""
    ours = replace(ROLLED_BACK, epoch=4)
    effects = opened(ours, dict.fromkeys(NODES, view(TAKEN)))
    assert effects == [wanted.Admit(NODES, False, (1, 2, 3))]


# Removals

REMOVED = TAKEN.without_snapshot(SHOT)
EMPTIED = frozenset({1})
MERGED = REMOVED.without_merged(EMPTIED)


def test_snapshot_is_removed_by_one_change_and_nothing_is_frozen() -> None:
    holder = settled()
    assert holder.step(events.RemoveSnapshot("monday")) == [wanted.ChangeMembership(TAKEN, REMOVED)]
    effects = holder.step(events.MembershipChanged(REMOVED))
    assert effects == [wanted.Reconfigure(REMOVED), wanted.TellLayers()]
    assert holder.step(events.Stored(REMOVED.generation)) == []


def test_removal_leaves_a_lost_node_behind_in_the_same_change() -> None:
    holder = settled()
    holder.step(events.ReplicaDown("node3", blocking=False))
    (change,) = changes(holder.step(events.RemoveSnapshot("monday")))
    assert change.after == REMOVED
    holder = settled()
    (lost,) = changes(holder.step(events.ReplicaDown("node3", blocking=True)))
    assert holder.step(events.RemoveSnapshot("monday")) == []
    holder.step(events.MembershipChanged(lost.after))
    (change,) = changes(holder.step(events.Stored(lost.after.generation)))
    assert change.after == lost.after.without_snapshot(SHOT)


def test_removal_that_etcd_surely_does_not_have_fails_and_one_that_it_may_have_is_asked_again() -> (
    None
):
    holder = settled()
    holder.step(events.RemoveSnapshot("monday"))
    effects = holder.step(events.MembershipDelayed("no leader", maybe_taken=False))
    assert effects == [wanted.TellLayers("no leader")]
    assert holder.step(events.Tick(9.0)) == []
    holder.step(events.RemoveSnapshot("monday"))
    assert holder.step(events.MembershipDelayed("no answer", maybe_taken=True)) == []
    assert changes(holder.step(events.Tick(18.0)))
    effects = holder.step(events.Lost("another gateway has it"))
    assert told(effects) == wanted.TellLayers("another gateway has it", unknown=True)


def test_close_before_etcd_is_asked_for_a_removal_gives_it_up() -> None:
    holder = settled()
    (lost,) = changes(holder.step(events.ReplicaDown("node3", blocking=True)))
    holder.step(events.RemoveSnapshot("monday"))
    assert told(holder.step(events.Close())) is not None
    assert changes(holder.step(events.MembershipChanged(lost.after))) == []


def emptied(holder: Holder, *nodes: str) -> list[wanted.Effect]:
    effects: list[wanted.Effect] = []
    for node in nodes:
        effects += holder.step(events.Emptied(node, EMPTIED))
    return effects


def test_layer_goes_frozen_when_all_nodes_have_merged_it_and_nobody_is_told() -> None:
    holder = settled(REMOVED)
    assert holder.step(events.Tick(1.0)) == [wanted.AskEmptied()]
    assert emptied(holder, "node3") == []
    assert holder.step(events.Tick(1.0 + merging.ASK_S - 0.1)) == []
    assert holder.step(events.Tick(1.0 + merging.ASK_S)) == [wanted.AskEmptied()]
    assert emptied(holder, "node1", "node2") == [], "the third has to say so again"
    assert emptied(holder, "node3") == [wanted.Freeze(1)]
    assert holder.step(events.Frozen(1)) == [wanted.ChangeMembership(REMOVED, MERGED)]
    assert holder.step(events.MembershipChanged(MERGED)) == [wanted.Reconfigure(MERGED)]
    assert holder.step(events.Stored(MERGED.generation)) == []
    assert holder.step(events.Tick(9.0)) == []


def test_layer_stays_while_a_stale_node_has_something_of_it() -> None:
    holder = settled(replace(REMOVED, stale={0: {"node3": 1}}))
    holder.step(events.Tick(1.0))
    assert emptied(holder, "node1", "node2") == []
    assert wanted.Freeze(1) in emptied(holder, "node3")


def test_layer_that_etcd_took_out_too_late_is_put_back_and_goes_some_other_time() -> None:
    holder = settled(REMOVED)
    emptied(holder, *NODES)
    holder.step(events.Frozen(1))
    assert holder.step(events.Tick(f.THAW_AFTER_S))[0] == wanted.Thaw(1)
    back = MERGED.with_merged(EMPTIED)
    effects = holder.step(events.MembershipChanged(MERGED))
    assert effects == [wanted.ChangeMembership(MERGED, back)]
    assert holder.step(events.MembershipChanged(back)) == [wanted.Reconfigure(back)]
    holder.step(events.Stored(back.generation))
    assert holder.step(events.Tick(30.0)) == [wanted.AskEmptied()]
    assert emptied(holder, *NODES) == []
    assert holder.step(events.Tick(90.0)) == [wanted.AskEmptied()]
    assert emptied(holder, *NODES) == [wanted.Freeze(2)]


def test_order_comes_before_a_merge_that_has_not_ended() -> None:
    holder = settled(REMOVED)
    emptied(holder, *NODES)
    holder.step(events.FreezeFailed(1, "a node in sync was lost"))
    assert holder.freezing.stage is Stage.WAITING
    assert holder.step(events.ChangeLayers(NewSnapshot("tuesday", 0))) == [wanted.Freeze(2)]
    (change,) = changes(holder.step(events.Frozen(2)))
    assert change.after == REMOVED.with_snapshot("tuesday", 0)
