"""`Holder`: the rows of its table, its rules, and random orders of events."""

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from etcd.images import ImageRecord
from shard.ids import ImageId
from shard.membership import Policy
from tests.unit.samples import NODES, image_record
from vmstore import effects as wanted
from vmstore import events, snapshot_steps, standing
from vmstore import healing as healing_rules
from vmstore import holder as h
from vmstore.holder import Holder
from vmstore.slowness import SlowLimits, Slowness
from vmstore.space import FULL_S
from vmstore.standing import Phase, Standing

ME = "ab" * 16
IMAGE = ImageId("cd" * 16)


def record(**changes: object) -> ImageRecord:
    return image_record(IMAGE, **{"epoch": 3, "holder": ME, "clean": False, **changes})


def view(ours: ImageRecord, **changes: object) -> events.NodeRecordView:
    known = events.NodeRecordView(
        epoch=ours.epoch - 1,
        holder="ef" * 16,
        generation=ours.generation,
        digest=ours.digest,
        peers={},
        dirty=1,
    )
    return replace(known, **changes)  # type: ignore[arg-type]


def peeked(
    node: str, instance: int = 1, *, flush_number: int = 9, serial: int = 1
) -> events.Peeked:
    return events.Peeked(node, instance, flush_number, False, view(record()), serial)


def gathering(ours: ImageRecord | None = None) -> Holder:
    holder = Holder(holder=ME, now_s=0.0)
    ours = ours or record()
    assert holder.step(events.LeaseTaken(ours)) == [wanted.OpenImage(ours)]
    return holder


def serving(ours: ImageRecord | None = None) -> Holder:
    holder = gathering(ours)
    for node in NODES:
        if node in holder.record.membership.all_in_sync():  # type: ignore[union-attr]
            holder.step(peeked(node))
    assert wanted.Serve() in holder.step(events.Admitted())
    return holder


def changes(effects: list[wanted.Effect]) -> list[wanted.ChangeMembership]:
    return [effect for effect in effects if isinstance(effect, wanted.ChangeMembership)]


def test_phases_from_lease_to_end() -> None:
    holder = gathering()
    assert holder.step(peeked("node1")) == holder.step(peeked("node2")) == []
    assert holder.step(peeked("node3", serial=7)) == [wanted.Admit(NODES, False, (1, 1, 7))]
    assert holder.phase is Phase.JOINING
    assert holder.step(events.Admitted()) == [wanted.Serve()]
    assert holder.step(events.Close()) == [wanted.CloseImage()]
    assert holder.step(events.Closed(True)) == [wanted.Release(record(), True)]
    assert holder.step(events.Released()) == [wanted.Forget()]
    assert holder.phase is Phase.ENDED


def test_lease_that_cannot_be_taken_refuses() -> None:
    holder = Holder(holder=ME, now_s=0.0)
    assert holder.step(events.Fail("in use")) == [wanted.Refuse("in use"), wanted.Forget()]


def test_close_while_opening_gives_the_lease_back_unclean() -> None:
    effects = gathering().step(events.Close())
    assert effects[0] == wanted.KillImage() and effects[-1] == wanted.Release(record(), False)


def test_close_while_taking_the_lease_is_asked_again_by_the_driver() -> None:
    """A client left and another came while the lease was taken: the second was let in, and the
    image closed under it at once because of the first."""
    holder = Holder(holder=ME, now_s=0.0)
    assert holder.step(events.Close()) == []
    holder.step(events.LeaseTaken(record()))
    for node in NODES:
        holder.step(peeked(node))
    assert holder.step(events.Admitted()) == [wanted.Serve()]
    assert holder.phase is Phase.SERVING


def test_node_lost_long_before_the_open_is_left_behind_at_once() -> None:
    """A host died with guest and node: elsewhere the guest waited for the node a second time."""
    holder = Holder(holder=ME, now_s=20.0)
    holder.step(events.LeaseTaken(record(), {"node3": 20.0 - standing.GRACE_S}))
    # Those that are connected and have not answered yet are waited for.
    assert holder.step(events.Tick(20.1)) == []
    assert holder.step(peeked("node1")) == []
    (change,) = changes(holder.step(peeked("node2")))
    assert change.after.stale == {0: {"node3": 1}}


def test_node_lost_just_before_the_open_has_the_rest_of_its_grace() -> None:
    holder = Holder(holder=ME, now_s=20.0)
    holder.step(events.LeaseTaken(record(), {"node3": 19.0}))
    holder.step(peeked("node1"))
    holder.step(peeked("node2"))
    assert holder.step(events.Tick(19.0 + standing.GRACE_S - 0.1)) == []
    assert len(changes(holder.step(events.Tick(19.0 + standing.GRACE_S)))) == 1


def test_absent_node_is_left_behind_after_the_grace_and_not_before() -> None:
    holder = gathering()
    holder.step(peeked("node1"))
    holder.step(peeked("node2"))
    assert holder.step(events.Tick(standing.GRACE_S - 0.1)) == []
    (change,) = changes(holder.step(events.Tick(standing.GRACE_S)))
    assert change.after.stale == {0: {"node3": 1}}
    effects = holder.step(events.MembershipChanged(change.after))
    assert effects == [
        wanted.Reconfigure(change.after),
        wanted.Admit(("node1", "node2"), False, (1, 1)),
    ]


def test_one_node_alone_waits_and_is_refused_at_the_limit() -> None:
    holder = gathering()
    holder.step(peeked("node1"))
    assert holder.step(events.Tick(standing.GRACE_S + 1)) == []
    effects = holder.step(events.Tick(h.OPEN_LIMIT_S + 1))
    assert isinstance(effects[1], wanted.Refuse) and "node2, node3" in effects[1].reason


def test_emptied_disk_is_stale_since_zero_without_grace() -> None:
    holder = gathering()
    holder.step(peeked("node1"))
    holder.step(peeked("node2"))
    (change,) = changes(holder.step(events.Peeked("node3", 1, 0, False, None)))
    assert change.after.stale == {0: {"node3": 0}}


def test_first_open_that_was_cut_short_opens_again() -> None:
    """A gateway died after one of three nodes had stored a new image's record: the other two
    counted as emptied, and the image could never be opened."""
    holder = gathering()
    holder.step(events.Peeked("node1", 1, 0, False, view(record(), dirty=0)))
    holder.step(events.Peeked("node2", 1, 0, False, None, 2))
    effects = holder.step(events.Peeked("node3", 1, 0, False, None, 3))
    assert effects == [wanted.Admit(NODES, False, (0, 2, 3))]


def test_node_that_says_that_its_store_was_set_back_is_stale_since_zero() -> None:
    holder = gathering()
    holder.step(peeked("node1"))
    holder.step(peeked("node2"))
    distrusted = view(record(), distrusted=True)
    (change,) = changes(holder.step(events.Peeked("node3", 1, 9, False, distrusted, 3)))
    assert change.after.stale == {0: {"node3": 0}}


def test_image_of_whose_nodes_none_is_believed_is_not_opened_and_says_why() -> None:
    holder = gathering()
    for serial, name in enumerate(NODES, 1):
        distrusted = view(record(), distrusted=True)
        assert not changes(holder.step(events.Peeked(name, 1, 9, False, distrusted, serial)))
    effects = holder.step(events.Tick(holder.now_s + 2 * h.OPEN_LIMIT_S))
    refused = [effect for effect in effects if isinstance(effect, wanted.Refuse)]
    assert "what node1, node2, node3 holds is older than what was answered" in refused[0].reason


def test_store_behind_what_a_peer_was_told_is_stale_since_zero() -> None:
    holder = gathering()
    holder.step(events.Peeked("node1", 1, 9, False, view(record(), peers={"node3": 10})))
    holder.step(peeked("node2"))
    (change,) = changes(holder.step(peeked("node3", flush_number=9)))
    assert change.after.stale == {0: {"node3": 0}}


def test_rolled_back_store_of_a_node_being_left_behind_is_stale_since_zero_first() -> None:
    """A node came back with a disk of before while the change was on its way that left it behind:
    it was healed as one that had merely missed the last writes."""
    holder = serving()
    (change,) = changes(holder.step(events.ReplicaDown("node2", blocking=True)))
    back = view(record(), peers={"node2": 10})
    assert holder.step(events.Peeked("node2", 2, 9, False, back, 2)) == []
    effects = holder.step(events.MembershipChanged(change.after))
    assert effects == [wanted.Reconfigure(change.after)]
    (distrust,) = changes(holder.step(events.Stored(change.after.generation)))
    assert distrust.after.stale == {0: {"node2": 0}}
    effects = holder.step(events.MembershipChanged(distrust.after))
    assert [effect.sets for effect in effects if isinstance(effect, wanted.Heal)] == [((0, 0),)]


@pytest.mark.parametrize(
    "known", [{"epoch": 4}, {"epoch": 3}, {"generation": 2}, {"digest": b"other"}]
)
def test_node_with_a_later_record_stops_the_open(known: dict[str, object]) -> None:
    effects = gathering().step(events.Peeked("node1", 1, 9, False, view(record(), **known)))
    assert effects[0] == wanted.KillImage()
    assert isinstance(effects[1], wanted.Refuse) and "rolled back" in effects[1].reason


def test_lost_node_stays_in_sync_until_requests_wait_for_it() -> None:
    holder = serving()
    assert holder.step(events.ReplicaDown("node2", blocking=False)) == []
    assert holder.step(events.Tick(100.0)) == []
    (change,) = changes(holder.step(events.ReplicaBlocking("node2")))
    assert change.after.stale == {0: {"node2": 1}}


def test_requests_that_waited_once_do_not_count_after_the_return() -> None:
    """A node blocked requests while it joined; later its connection broke with nothing waiting, and
    it was left behind."""
    holder = serving()
    holder.step(events.ReplicaBlocking("node2"))
    assert holder.step(events.ReplicaDown("node2", blocking=False)) == []


def test_second_loss_waits_for_the_quorum() -> None:
    holder = serving(record(generation=2, stale={0: {"node3": 1}}))
    assert holder.step(events.ReplicaDown("node2", blocking=True)) == []
    assert holder.step(events.Tick(100.0)) == []


def test_delayed_change_is_asked_for_again() -> None:
    holder = serving()
    (change,) = changes(holder.step(events.ReplicaDown("node2", blocking=True)))
    assert holder.step(events.MembershipDelayed()) == []
    assert holder.step(events.Tick(snapshot_steps.RETRY_S)) == [change]
    assert holder.step(events.MembershipChanged(change.after))[0] == wanted.Reconfigure(
        change.after
    )


def test_delayed_change_that_never_came_to_etcd_is_withdrawn_when_the_node_is_back() -> None:
    """A pair without its arbiter lost a node, which came back: two of three were there, and yet
    writes waited, for a change that nobody needed any more."""
    holder = serving()
    (change,) = changes(holder.step(events.ReplicaDown("node2", blocking=True)))
    assert holder.step(events.MembershipDelayed("no arbiter", maybe_taken=False)) == []
    assert holder.trouble == "a change of membership waits: no arbiter"
    assert holder.step(events.Tick(snapshot_steps.RETRY_S / 2)) == []
    assert holder.step(events.Tick(snapshot_steps.RETRY_S)) == [change], "while the node is away"
    holder.step(events.MembershipDelayed("no arbiter", maybe_taken=False))
    assert holder.step(peeked("node2", serial=2)) == [wanted.Admit(("node2",), True, (2,))]
    assert holder.step(events.Tick(3 * snapshot_steps.RETRY_S)) == []
    assert holder.trouble == ""


def test_delayed_change_that_etcd_may_have_taken_is_not_withdrawn() -> None:
    holder = serving()
    (change,) = changes(holder.step(events.ReplicaDown("node2", blocking=True)))
    holder.step(events.MembershipDelayed("lost answer", maybe_taken=True))
    assert holder.step(events.Tick(snapshot_steps.RETRY_S)) == [change]
    holder.step(events.MembershipDelayed("no arbiter", maybe_taken=False))
    assert holder.step(peeked("node2", serial=2)) == []
    assert holder.step(events.Tick(2 * snapshot_steps.RETRY_S)) == [change]


def test_same_instance_resumes_and_another_is_levelled() -> None:
    holder = serving()
    holder.step(events.ReplicaDown("node2", blocking=False))
    assert holder.step(peeked("node2", serial=2)) == [wanted.Admit(("node2",), True, (2,))]
    holder.step(events.ReplicaDown("node2", blocking=False))
    assert holder.step(peeked("node2", 2, serial=3)) == [wanted.Admit(("node2",), False, (3,))]


def test_one_admission_at_a_time() -> None:
    """A node admitted while another was levelled counted as level with that one's `Admitted`; its
    connection broke, and it resumed unlevelled."""
    holder = serving()
    for node in ("node2", "node3"):
        holder.step(events.ReplicaDown(node, blocking=False))
    assert holder.step(peeked("node2", 2)) == [wanted.Admit(("node2",), False, (1,))]
    assert holder.step(peeked("node3", 2)) == []
    assert holder.step(events.Admitted()) == [wanted.Admit(("node3",), False, (1,))]


def test_failed_admission_asks_all_again_and_counts_none_as_lost() -> None:
    holder = serving()
    holder.step(events.ReplicaDown("node2", blocking=True))
    holder = serving()
    holder.step(events.ReplicaDown("node2", blocking=False))
    holder.step(peeked("node2", 2))
    holder.step(events.ReplicaBlocking("node2"))
    assert holder.step(events.AdmitFailed("node1")) == [wanted.Peek("node2")]
    assert holder.step(peeked("node2", 2, serial=5)) == [wanted.Admit(("node2",), False, (5,))]


def test_node_that_fails_requests_is_left_behind() -> None:
    (change,) = changes(serving().step(events.ReplicaFailed("node2", "NoSpace")))
    assert change.after.stale == {0: {"node2": 1}}


def test_node_that_failed_once_counts_as_well_again() -> None:
    """All disks were full for a moment; ever since the three counted as failing, and when one of
    them died it could not be left behind."""
    holder = serving()
    holder.paused = True
    for node in NODES:
        assert holder.step(events.ReplicaFailed(node, "NoSpace")) == []
    holder.paused = False
    assert holder.step(events.Tick(standing.FAILING_S + 1)) == []
    (change,) = changes(holder.step(events.ReplicaDown("node3", blocking=True)))
    assert change.after.stale == {0: {"node3": 1}}


def full(holder: Holder, nodes: tuple[str, ...], until_s: float, from_s: float = 0.0) -> None:
    """Nodes refuse what is asked again each second."""
    for tenth in range(int(from_s * 10), int(until_s * 10) + 1):
        if tenth % 10 == 0:
            for node in nodes:
                holder.step(events.ReplicaFailed(node, "NoSpace"))
        holder.step(events.Tick(tenth / 10))


def test_set_whose_quorum_is_full_is_without_space_after_a_while_and_not_before() -> None:
    holder = serving()
    holder.paused = True
    full(holder, NODES[:2], FULL_S - 0.1)
    assert not holder.without_space()
    full(holder, NODES[:2], FULL_S + 0.2, FULL_S - 0.1)
    assert holder.without_space() == {0}
    # Room: what is asked again is done, and nobody fails any more.
    for tenth in range(100):
        holder.step(events.Tick(FULL_S + tenth / 10))
    assert not holder.without_space()


def test_full_node_that_can_be_left_behind_leaves_no_set_without_space() -> None:
    """etcd is away, say: it waits, and clients are not told that disks are full."""
    holder = serving()
    holder.paused = True
    full(holder, NODES[:1], 10)
    assert not holder.without_space()


def test_nodes_that_fail_otherwise_are_not_full() -> None:
    holder = serving()
    holder.paused = True
    for second in range(10):
        for node in NODES:
            holder.step(events.ReplicaFailed(node, "io"))
        holder.step(events.Tick(float(second)))
    assert not holder.without_space()


@pytest.mark.parametrize("event", [events.Fenced("node1"), events.Lost("another holder")])
def test_another_holder_ends_it(event: events.Event) -> None:
    effects = serving().step(event)
    assert effects[0] == wanted.KillImage() and effects[-1] == wanted.Release(record(), False)


def test_change_that_comes_after_giving_up_changes_nothing() -> None:
    holder = serving()
    (change,) = changes(holder.step(events.ReplicaDown("node2", blocking=True)))
    holder.step(events.Lost("another holder"))
    assert holder.step(events.MembershipDelayed()) == holder.step(events.Tick(50.0)) == []
    assert holder.step(events.MembershipChanged(change.after)) == []
    assert holder.step(events.Released()) == [wanted.Forget()]


STALE = {"generation": 2, "stale": {0: {"node3": 1}}}


def healing(**changes_of_record: object) -> Holder:
    holder = serving(record(**{**STALE, **changes_of_record}))
    assert holder.step(peeked("node3", serial=4)) == [wanted.Heal("node3", 4, 1, ((0, 1),))]
    return holder


def test_stale_node_that_comes_is_healed_and_taken_in() -> None:
    holder = healing()
    (change,) = changes(holder.step(events.Healed("node3", 1)))
    assert (change.after.generation, change.after.stale) == (3, {})
    effects = holder.step(events.MembershipChanged(change.after))
    assert effects == [wanted.Reconfigure(change.after)]
    assert not holder.missing()
    holder.step(events.Stored(3))
    holder.step(events.ReplicaDown("node3", blocking=False))
    assert holder.step(peeked("node3", serial=9)) == [wanted.Admit(("node3",), True, (9,))]


def test_stale_node_is_not_healed_before_the_image_serves() -> None:
    holder = gathering(record(**STALE))
    effects = [e for node in NODES for e in holder.step(peeked(node))]
    assert effects == [wanted.Admit(("node1", "node2"), False, (1, 1))]
    assert holder.step(events.Admitted()) == [
        wanted.Serve(),
        wanted.Heal("node3", 1, 1, ((0, 1),)),
    ]


def test_one_change_takes_a_healed_node_in_and_a_lost_one_out() -> None:
    holder = healing()
    assert holder.step(events.ReplicaDown("node2", blocking=True)) == []
    (change,) = changes(holder.step(events.Healed("node3", 1)))
    assert change.after.stale == {0: {"node2": 2}}


def test_healed_node_that_is_lost_before_the_change_is_given_up() -> None:
    holder = healing()
    holder.paused = True
    holder.step(events.Healed("node3", 1))
    holder.paused = False
    effects = holder.step(events.ReplicaDown("node3", blocking=True))
    assert effects == [wanted.EndHeal(1)]
    assert changes(holder.step(events.Tick(100.0))) == []


def test_healed_node_that_is_lost_during_the_change_is_left_behind_after_it() -> None:
    holder = healing()
    (change,) = changes(holder.step(events.Healed("node3", 1)))
    assert holder.step(events.ReplicaDown("node3", blocking=True)) == []
    effects = holder.step(events.MembershipChanged(change.after))
    assert effects[0] == wanted.Reconfigure(change.after)
    (lost,) = changes(effects)
    assert lost.after.stale == {0: {"node3": 3}}


def test_failed_heal_is_tried_again_after_pauses_that_grow() -> None:
    holder = healing()
    assert holder.step(events.HealFailed("node3", 1, "NoSpace")) == []
    assert holder.step(events.Tick(healing_rules.FIRST_PAUSE_S - 0.1)) == []
    again = wanted.Heal("node3", 4, 2, ((0, 1),))
    assert holder.step(events.Tick(healing_rules.FIRST_PAUSE_S)) == [again]
    assert holder.step(events.HealFailed("node3", 2, "NoSpace")) == []
    assert holder.step(events.Tick(2.5 * healing_rules.FIRST_PAUSE_S)) == []
    assert len(holder.step(events.Tick(3 * healing_rules.FIRST_PAUSE_S))) == 1


def test_word_of_a_former_heal_changes_nothing() -> None:
    holder = healing()
    holder.step(events.HealFailed("node3", 1, "io"))
    holder.step(events.Tick(10.0))
    assert holder.step(events.Healed("node3", 1)) == []
    assert holder.step(events.HealFailed("node3", 1, "io")) == []
    assert len(changes(holder.step(events.Healed("node3", 2)))) == 1


def test_stale_node_with_another_disk_is_stale_since_zero_before_it_is_healed() -> None:
    """What a node had before its disk was lost is no part of what it holds now."""
    holder = serving(record(**STALE))
    (change,) = changes(holder.step(events.Peeked("node3", 1, 0, False, None, 4)))
    assert change.after.stale == {0: {"node3": 0}}
    effects = holder.step(events.MembershipChanged(change.after))
    assert effects == [wanted.Reconfigure(change.after), wanted.Heal("node3", 4, 1, ((0, 0),))]


def test_close_ends_a_heal() -> None:
    holder = healing()
    assert holder.step(events.Close()) == [wanted.EndHeal(1), wanted.CloseImage()]


def lagging(
    holder: Holder, node: str, seconds: int = 12, lag_ms: int = 5000
) -> list[wanted.Effect]:
    """Let a node keep the others waiting for so long; return what is done about it."""
    effects: list[wanted.Effect] = []
    for _ in range(seconds):
        effects += holder.step(events.Tick(holder.now_s + 1))
        lags = {name: lag_ms if name == node else 0 for name in NODES}
        effects += holder.step(events.Lags(lags))
    return effects


def test_node_that_keeps_all_waiting_is_left_behind_rests_and_is_healed() -> None:
    holder = serving()
    assert lagging(holder, "node2", lag_ms=500) == [], "slow, and not too slow"
    assert holder.slowness.slow() == {"node2": 500}
    change = changes(lagging(holder, "node2"))[0]
    assert change.after.stale == {0: {"node2": 1}}
    assert holder.step(events.MembershipChanged(change.after)) == [wanted.Reconfigure(change.after)]
    holder.step(events.Stored(2))
    left_s = holder.now_s
    assert holder.step(events.Tick(left_s + 59)) == []
    heal = wanted.Heal("node2", 1, 1, ((0, 1),))
    assert holder.step(events.Tick(left_s + 60)) == [heal]
    holder.step(events.Healed("node2", 1))
    assert holder.record is not None


def test_heal_of_a_node_that_is_still_too_slow_is_given_up_and_tried_later() -> None:
    holder = serving(record(**STALE))
    holder.step(peeked("node3"))
    assert holder.heals.now is not None
    effects = lagging(holder, "node3")
    assert wanted.EndHeal(1) in effects and changes(effects) == []
    assert not [
        e for e in effects[effects.index(wanted.EndHeal(1)) :] if isinstance(e, wanted.Heal)
    ]
    effects = holder.step(events.Tick(holder.now_s + 60))
    assert [e.attempt for e in effects if isinstance(e, wanted.Heal)] == [2]


def test_slow_node_is_waited_for_where_the_others_are_not_well() -> None:
    at_quorum = serving(record(**STALE))
    assert changes(lagging(at_quorum, "node2")) == []
    one_away = serving()
    one_away.step(events.ReplicaDown("node1", False))
    assert changes(lagging(one_away, "node2")) == []
    one_fails = serving()
    one_fails.step(events.Tick(1.0))
    one_levels = serving()
    one_levels.levelling.add("node3")
    assert changes(lagging(one_levels, "node2")) == []


def test_slow_node_that_was_started_anew_need_not_rest() -> None:
    holder = serving()
    change = changes(lagging(holder, "node2"))[0]
    holder.step(events.MembershipChanged(change.after))
    holder.step(events.ReplicaDown("node2", False))
    effects = holder.step(peeked("node2", 2))
    assert [type(effect) for effect in effects] == [wanted.Heal]


class Histories(RuleBasedStateMachine):
    """Random orders of what engine and etcd may say; the model keeps to what they can say."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.holder = gathering()
        self.holder.slowness = Slowness(SlowLimits(for_s=3, back_after_s=3))
        self.instance = dict.fromkeys(NODES, 1)
        self.connected: set[str] = set()
        self.waiting: set[str] = set()
        self.joining: set[str] = set()
        self.up: set[str] = set()
        self.asked: wanted.ChangeMembership | None = None
        self.undecided = False
        self.heal: wanted.Heal | None = None
        self.healed = False
        self.serial = 0

    def tell(self, event: events.Event) -> None:
        for effect in self.holder.step(event):
            self.carry_out(effect)

    def carry_out(self, effect: wanted.Effect) -> None:
        ours = self.holder.record
        assert ours is not None
        match effect:
            case wanted.Admit(nodes, resume):
                assert set(nodes) <= ours.membership.all_in_sync(), "a stale node is let in"
                let_in = set(nodes) & self.waiting
                self.waiting -= let_in
                if resume:
                    self.up |= let_in
                else:
                    assert not self.joining, "one admission at a time"
                    self.joining = let_in
            case wanted.ChangeMembership(_, after):
                assert self.asked in (None, effect), "one proposal at a time"
                assert len(after.membership.in_sync(0)) >= 2, "below the quorum"
                self.asked = effect
            case wanted.Heal(node):
                assert self.heal is None, "one heal at a time"
                assert node in self.waiting, "a stale node that is there"
                assert dict(effect.sets) == {0: ours.membership.stale[0][node]}
                self.waiting.discard(node)
                self.heal, self.healed = effect, False
            case wanted.EndHeal(attempt):
                assert self.heal is not None and self.heal.attempt == attempt
                self.end_heal()
            case wanted.Reconfigure(new):
                left = set(NODES) - new.membership.all_in_sync()
                if self.heal is not None and self.heal.node not in left:
                    assert self.healed, "a node is taken in that is not level"
                    self.up |= {self.heal.node} & self.connected - self.waiting
                    self.heal = None
                self.waiting |= (self.up | self.joining) & left
                self.up -= left
                self.joining -= left
            case wanted.Peek(node):
                if node in self.waiting:
                    self.peek(node)

    def end_heal(self) -> None:
        assert self.heal is not None
        node, self.heal = self.heal.node, None
        if node in self.connected:
            self.waiting.add(node)

    def fail_heal(self) -> None:
        heal = self.heal
        assert heal is not None and not self.healed
        self.end_heal()
        self.tell(events.HealFailed(heal.node, heal.attempt, "io"))

    @precondition(lambda self: self.heal is not None and not self.healed)
    @rule(level=st.booleans())
    def heal_ends(self, level: bool) -> None:
        assert self.heal is not None
        if level:
            self.healed = True
            self.tell(events.Healed(self.heal.node, self.heal.attempt))
        else:
            self.fail_heal()

    def peek(self, node: str) -> None:
        self.serial += 1
        self.waiting.add(node)
        self.tell(peeked(node, self.instance[node], serial=self.serial))

    def fail_admission(self, node: str) -> None:
        self.waiting |= self.joining & self.connected
        self.joining = set()
        self.tell(events.AdmitFailed(node))

    @rule(node=st.sampled_from(NODES), restarted=st.booleans())
    def come(self, node: str, restarted: bool) -> None:
        if node not in self.connected:
            self.connected.add(node)
            self.instance[node] += restarted
            self.peek(node)

    @rule(node=st.sampled_from(NODES), blocking=st.booleans())
    def go(self, node: str, blocking: bool) -> None:
        if node in self.connected:
            took_part = node in self.up | self.joining
            self.connected.discard(node)
            self.waiting.discard(node)
            self.up.discard(node)
            if took_part and self.joining:
                self.fail_admission(node)
            if self.heal is not None and self.heal.node == node and not self.healed:
                self.fail_heal()
            self.tell(events.ReplicaDown(node, blocking))

    @rule(node=st.sampled_from(NODES))
    def block(self, node: str) -> None:
        if node not in self.up:
            self.tell(events.ReplicaBlocking(node))

    @rule(node=st.sampled_from(NODES))
    def fail(self, node: str) -> None:
        if node in self.up:
            self.tell(events.ReplicaFailed(node, "io"))

    @precondition(lambda self: self.joining)
    @rule(level=st.booleans(), node=st.sampled_from(NODES))
    def join(self, level: bool, node: str) -> None:
        if level:
            self.up |= self.joining
            self.joining = set()
            self.tell(events.Admitted())
        else:
            self.fail_admission(node)

    @precondition(lambda self: self.asked is not None)
    @rule(taken=st.booleans(), maybe_taken=st.booleans())
    def answer(self, taken: bool, maybe_taken: bool) -> None:
        asked = self.asked
        assert asked is not None
        if taken:
            self.asked, self.undecided = None, False
            self.tell(events.MembershipChanged(asked.after))
            self.tell(events.Stored(asked.after.generation))
        else:
            self.undecided = self.undecided or maybe_taken
            if not self.undecided:
                self.asked = None
            self.tell(events.MembershipDelayed("it waits", maybe_taken))

    @rule(node=st.sampled_from(NODES), lag_ms=st.sampled_from((0, 300, 9000)))
    def lag(self, node: str, lag_ms: int) -> None:
        if self.holder.phase is Phase.SERVING:
            for _ in range(4):
                asked = self.up | ({self.heal.node} if self.heal is not None else set())
                self.tell(events.Lags({name: lag_ms * (name == node) for name in asked}))
                self.tick(1.0)

    @rule(pause_s=st.floats(0.05, 4.0))
    def tick(self, pause_s: float) -> None:
        opening = self.holder.phase in (Phase.GATHERING, Phase.JOINING)
        # The limit of an open is a rule of its own; here histories go on.
        if not opening or self.now_s + pause_s < h.OPEN_LIMIT_S - 10:
            self.now_s += pause_s
        self.tell(events.Tick(self.now_s))

    @invariant()
    def who_is_up_is_in_sync(self) -> None:
        ours = self.holder.record
        assert ours is not None
        assert self.up <= ours.membership.all_in_sync(), "a stale node serves"
        assert len(ours.membership.in_sync(0)) >= 2

    def teardown(self) -> None:
        """Once all are there and etcd answers, all become in sync, and a close ends it."""
        for step in range(400):
            for node in NODES:
                self.come(node, False)
            if self.joining:
                self.join(True, "node1")
            if self.asked is not None:
                self.answer(True, False)
            if self.heal is not None and not self.healed:
                self.heal_ends(True)
            self.now_s += 0.1 if step < 100 else 1.0
            self.tell(events.Tick(self.now_s))
        assert self.holder.phase is Phase.SERVING, self.holder
        assert not self.holder.missing(), self.holder
        ours = self.holder.record
        assert ours is not None and self.up == ours.membership.all_in_sync() == set(NODES)
        standings = {n: self.holder.nodes[n].standing for n in self.up}
        assert set(standings.values()) == {Standing.UP}
        assert self.holder.step(events.Close()) == [wanted.CloseImage()]
        assert self.holder.step(events.Closed(True)) == [wanted.Release(ours, True)]


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def test_node_that_keeps_the_one_that_is_waited_for_out_is_left_behind() -> None:
    """Requests waited for a node that came back, which waited for one that stayed away.

    Nothing waited for the latter: it had answered all that was asked of it.
    """
    sets = (("node1", "node2"), ("node3", "node4"))
    ours = record(policy=Policy.THIN_ARBITER, sets=sets)
    holder = gathering(ours)
    for node in ("node1", "node2", "node3", "node4"):
        holder.step(replace(peeked(node), record=view(ours)))
    holder.step(events.Admitted())
    assert holder.phase is Phase.SERVING
    holder.step(events.ReplicaDown("node1", blocking=False))
    holder.step(replace(peeked("node1", instance=2, serial=2), record=view(ours)))
    holder.step(events.ReplicaDown("node2", blocking=False))
    holder.step(events.ReplicaBlocking("node1"))
    effects = holder.step(events.Tick(standing.GRACE_S + 0.1))
    (change,) = changes(effects)
    assert change.after.stale == {0: {"node2": 1}}


def test_node_that_was_gone_before_a_change_took_it_in_has_its_grace_too() -> None:
    """It was lost while it was not in sync: nothing said since when it is waited for."""
    ours = record(stale={0: {"node3": 1}}, generation=2)
    holder = serving(ours)
    holder.step(peeked("node3"))
    heal = holder.heals.now
    assert heal is not None
    holder.step(events.Healed("node3", heal.attempt))
    assert holder.proposal is not None
    after = holder.proposal
    holder.step(events.ReplicaDown("node3", blocking=False))
    holder.step(events.Tick(1.0))
    holder.step(events.MembershipChanged(after))
    holder.step(events.Tick(2.0))
    assert holder.waiting_since_s == 2.0
