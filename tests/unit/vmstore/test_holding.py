"""The transactions of a lease holder: one holder at a time, and no change by a former one."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etcd.errors import EtcdUnavailable, LeaseNotFound, OutcomeUnknown
from etcd.images import ImageRecord, Layer
from etcd.interface import Delete, Put
from etcd.memory import Fault, MemoryEtcd
from shard.errors import BadSize
from shard.ids import ImageId
from shard.membership import Change, Membership, lose, rejoin
from tests.unit.samples import GIB, image_record
from vmstore.errors import (
    Conflict,
    HistoryLost,
    InUse,
    LeaseLost,
    LeaseMoved,
    RecordChanged,
    ShrinkRefused,
)
from vmstore.holding import Held, Holding
from vmstore.stored import Stored

ID = ImageId("1" * 32)


class Cluster:
    """An etcd with one image, and gateways that open it."""

    def __init__(self) -> None:
        self.etcd = MemoryEtcd()
        self.holding = Holding(self.etcd)
        record = image_record(ID, sets=(("a", "b", "c"),))
        self.etcd.transaction([], [Put(record.key, record.encode())])

    def open(self, gateway: int) -> Held:
        return self.holding.take_lease(
            self.holding.image(ID),
            gateway=f"gateway{gateway}",
            holder=f"{gateway:032x}",
            etcd_lease=self.etcd.grant_lease(10),
        )

    @property
    def image(self) -> Stored[ImageRecord]:
        return self.holding.image(ID)


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


def without(membership: Membership, node: str) -> Membership:
    plan = lose(membership, {node})
    assert isinstance(plan, Change)
    return plan.membership


def test_take_raises_the_epoch_and_marks_the_image_unclean(cluster: Cluster) -> None:
    held = cluster.open(1)
    assert cluster.image == held.image
    assert (held.record.epoch, held.record.clean) == (1, False)
    assert held.record.holder == f"{1:032x}"
    lease = cluster.holding.lease_of(ID)
    assert lease is not None
    assert lease.record == held.lease


def test_take_of_a_held_image_names_the_holder(cluster: Cluster) -> None:
    cluster.open(1)
    with pytest.raises(InUse, match="in use on gateway gateway1"):
        cluster.open(2)
    assert cluster.image.record.epoch == 1


def test_take_after_the_lease_expired_is_a_later_epoch(cluster: Cluster) -> None:
    cluster.open(1)
    cluster.etcd.advance(10)
    assert cluster.open(2).record.epoch == 2


def test_take_with_an_etcd_lease_that_is_gone_changes_nothing(cluster: Cluster) -> None:
    before = cluster.image
    with pytest.raises(LeaseNotFound):
        cluster.holding.take_lease(before, gateway="g", holder="1" * 32, etcd_lease=99)
    assert cluster.image == before


def test_take_of_a_record_that_changed_is_refused(cluster: Cluster) -> None:
    before = cluster.image
    cluster.holding.release(cluster.open(1), clean=True)
    with pytest.raises(RecordChanged):
        cluster.holding.take_lease(
            before, gateway="g", holder="2" * 32, etcd_lease=cluster.etcd.grant_lease(10)
        )


def test_take_instead_of_a_former_process_replaces_its_lease(cluster: Cluster) -> None:
    former = cluster.open(1)
    lease = cluster.holding.lease_of(ID)
    held = cluster.holding.take_lease(
        cluster.image,
        gateway="gateway1",
        holder="a" * 32,
        etcd_lease=cluster.etcd.grant_lease(10),
        instead_of=lease,
    )
    assert held.record.epoch == 2
    cluster.etcd.revoke_lease(former.etcd_lease)
    assert cluster.holding.lease_of(ID) is not None
    with pytest.raises(LeaseLost, match="gateway gateway1 has it now"):
        cluster.holding.change_membership(former, without(former.record.membership, "a"))


def test_take_instead_of_a_lease_that_another_got_is_refused(cluster: Cluster) -> None:
    cluster.open(1)
    lease = cluster.holding.lease_of(ID)
    cluster.etcd.advance(10)
    cluster.open(2)
    with pytest.raises(InUse, match="gateway2"):
        cluster.holding.take_lease(
            cluster.image,
            gateway="gateway1",
            holder="a" * 32,
            etcd_lease=cluster.etcd.grant_lease(10),
            instead_of=lease,
        )


@pytest.mark.parametrize("fault", [Fault.ANSWER_LOST, Fault.REQUEST_LOST])
def test_take_whose_answer_is_lost_is_taken_once(cluster: Cluster, fault: Fault) -> None:
    image, etcd_lease = cluster.image, cluster.etcd.grant_lease(10)
    cluster.etcd.fail_next(fault)
    held = cluster.holding.take_lease(
        image, gateway="gateway1", holder="a" * 32, etcd_lease=etcd_lease
    )
    assert held.image == cluster.image
    assert held.record.epoch == 1


def test_take_called_again_after_an_unknown_outcome_finds_its_own(cluster: Cluster) -> None:
    image, etcd_lease = cluster.image, cluster.etcd.grant_lease(10)

    def take() -> Held:
        return cluster.holding.take_lease(
            image, gateway="gateway1", holder="a" * 32, etcd_lease=etcd_lease
        )

    cluster.etcd.fail_next(Fault.ANSWER_LOST, Fault.UNAVAILABLE)
    with pytest.raises(OutcomeUnknown):
        take()
    assert take().image == cluster.image
    assert cluster.image.record.epoch == 1


def test_take_that_was_made_and_then_lapsed_is_not_success(cluster: Cluster) -> None:
    """The proposal stands in the image's record, but the lease key is gone with its lease."""
    image = cluster.image
    cluster.etcd.fail_next(Fault.ANSWER_LOST, Fault.UNAVAILABLE)
    with pytest.raises(OutcomeUnknown):
        cluster.holding.take_lease(
            image, gateway="gateway1", holder="a" * 32, etcd_lease=cluster.etcd.grant_lease(10)
        )
    cluster.etcd.advance(10)
    with pytest.raises(RecordChanged):
        cluster.holding.take_lease(
            image, gateway="gateway1", holder="a" * 32, etcd_lease=cluster.etcd.grant_lease(10)
        )


def test_membership_changes_one_generation_at_a_time(cluster: Cluster) -> None:
    held = cluster.open(1)
    after = cluster.holding.change_membership(held, without(held.record.membership, "b"))
    assert cluster.image == after.image
    assert after.record.generation == 2
    assert after.record.stale == {0: {"b": 1}}
    with pytest.raises(AssertionError, match="one generation"):
        cluster.holding.change_membership(after, held.record.membership)


@pytest.mark.parametrize("fault", [Fault.ANSWER_LOST, Fault.REQUEST_LOST])
def test_membership_whose_answer_is_lost_is_changed_once(cluster: Cluster, fault: Fault) -> None:
    held = cluster.open(1)
    cluster.etcd.fail_next(fault)
    after = cluster.holding.change_membership(held, without(held.record.membership, "b"))
    assert after.image == cluster.image
    assert after.record.generation == 2


def test_membership_changed_again_with_the_same_proposal_is_success(cluster: Cluster) -> None:
    held = cluster.open(1)
    proposal = without(held.record.membership, "b")
    first = cluster.holding.change_membership(held, proposal)
    assert cluster.holding.change_membership(held, proposal) == first


def test_holder_of_old_knowledge_reads_again(cluster: Cluster) -> None:
    held = cluster.open(1)
    cluster.holding.resize(held, 2 * GIB)
    with pytest.raises(RecordChanged):
        cluster.holding.change_membership(held, without(held.record.membership, "b"))


CHANGES: list[Callable[[Holding, Held], object]] = [
    lambda holding, held: holding.change_membership(held, without(held.record.membership, "b")),
    lambda holding, held: holding.resize(held, 2 * GIB),
    lambda holding, held: holding.release(held, clean=True),
]


@pytest.mark.parametrize("change", CHANGES)
def test_holder_that_was_replaced_changes_nothing(
    cluster: Cluster, change: Callable[[Holding, Held], object]
) -> None:
    held = cluster.open(1)
    cluster.etcd.advance(10)
    other = cluster.open(2)
    with pytest.raises(LeaseLost, match="gateway gateway2 has it now"):
        change(cluster.holding, held)
    assert cluster.image == other.image


@pytest.mark.parametrize("change", CHANGES)
def test_holder_whose_lease_ended_changes_nothing(
    cluster: Cluster, change: Callable[[Holding, Held], object]
) -> None:
    held = cluster.open(1)
    cluster.etcd.advance(10)
    with pytest.raises(LeaseLost, match="it has ended"):
        change(cluster.holding, held)
    assert cluster.image == held.image


@pytest.mark.parametrize("change", CHANGES)
def test_holder_finds_out_that_etcd_lost_history(
    cluster: Cluster, change: Callable[[Holding, Held], object]
) -> None:
    before = cluster.image
    held = cluster.open(1)
    cluster.etcd.transaction([], [Put(before.key, before.value)])
    with pytest.raises(HistoryLost, match="at epoch 0, generation 1, but epoch 1"):
        change(cluster.holding, held)
    cluster.etcd.transaction([], [Delete(before.key)])
    with pytest.raises(HistoryLost):
        change(cluster.holding, held)


def test_holder_finds_out_that_its_epoch_has_two_holders(cluster: Cluster) -> None:
    held = cluster.open(1)
    other = replace(held.record, holder="b" * 32)
    cluster.etcd.transaction([], [Put(other.key, other.encode())])
    with pytest.raises(HistoryLost):
        cluster.holding.change_membership(held, without(held.record.membership, "b"))


def test_holder_finds_out_that_its_generation_has_two_sets(cluster: Cluster) -> None:
    held = cluster.open(1)
    held = cluster.holding.change_membership(held, without(held.record.membership, "b"))
    other = replace(held.record, stale={0: {"c": 1}})
    cluster.etcd.transaction([], [Put(other.key, other.encode())])
    with pytest.raises(HistoryLost):
        cluster.holding.resize(held, 2 * GIB)


def test_lease_that_merely_lapsed_is_taken_again_with_its_epoch(cluster: Cluster) -> None:
    held = cluster.open(1)
    cluster.etcd.advance(10)
    again = cluster.holding.retake_lease(held, cluster.etcd.grant_lease(10))
    assert again.image == held.image == cluster.image
    cluster.holding.change_membership(again, without(again.record.membership, "b"))


def test_lease_that_another_had_meanwhile_is_not_taken_again(cluster: Cluster) -> None:
    held = cluster.open(1)
    cluster.etcd.advance(10)
    cluster.holding.release(cluster.open(2), clean=True)
    with pytest.raises(LeaseLost):
        cluster.holding.retake_lease(held, cluster.etcd.grant_lease(10))


def test_lease_that_still_lives_is_not_taken_again(cluster: Cluster) -> None:
    held = cluster.open(1)
    with pytest.raises(RecordChanged, match="the lease of image"):
        cluster.holding.retake_lease(held, cluster.etcd.grant_lease(10))


def test_lease_taken_again_twice_is_taken_once(cluster: Cluster) -> None:
    held = cluster.open(1)
    cluster.etcd.advance(10)
    etcd_lease = cluster.etcd.grant_lease(10)
    again = cluster.holding.retake_lease(held, etcd_lease)
    assert cluster.holding.retake_lease(held, etcd_lease) == again


def test_change_under_the_former_etcd_lease_is_told_that_the_lease_moved(cluster: Cluster) -> None:
    """A gateway found its change refused because it had taken its lapsed lease again meanwhile,
    took that for another program's doing, and sent its guest away."""
    held = cluster.open(1)
    cluster.etcd.advance(10)
    again = cluster.holding.retake_lease(held, cluster.etcd.grant_lease(10))
    wanted = without(again.record.membership, "b")
    with pytest.raises(LeaseMoved):
        cluster.holding.change_membership(held, wanted)
    with pytest.raises(LeaseMoved):
        cluster.holding.release(held, clean=True)
    changed = cluster.holding.change_membership(again, wanted)
    resized = cluster.holding.resize(changed, 2 * GIB)
    # A record that has changed is something else.
    with pytest.raises(RecordChanged) as refused:
        cluster.holding.change_membership(again, wanted)
    assert not isinstance(refused.value, LeaseMoved)
    assert cluster.image == resized.image


def test_lease_taken_again_outdates_changes_sent_under_the_former_one(cluster: Cluster) -> None:
    """A transaction that was on its way while the lease lapsed must not come through later."""
    held = cluster.open(1)
    cluster.etcd.advance(10)
    again = cluster.holding.retake_lease(held, cluster.etcd.grant_lease(10))
    with pytest.raises(Conflict):
        cluster.holding.resize(held, 2 * GIB)
    assert cluster.image == again.image


def test_release_gives_the_lease_back_clean_or_not(cluster: Cluster) -> None:
    for gateway, clean in ((1, True), (2, False)):
        cluster.holding.release(cluster.open(gateway), clean=clean)
        assert cluster.holding.lease_of(ID) is None
        assert cluster.image.record.clean is clean


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("fault", [Fault.ANSWER_LOST, Fault.REQUEST_LOST])
def test_release_whose_answer_is_lost_is_made_once(
    cluster: Cluster, fault: Fault, clean: bool
) -> None:
    held = cluster.open(1)
    cluster.etcd.fail_next(fault)
    cluster.holding.release(held, clean=clean)
    assert cluster.holding.lease_of(ID) is None
    assert cluster.image.record.clean is clean


def test_resize_by_the_holder_keeps_the_rules_of_sizes(cluster: Cluster) -> None:
    held = cluster.holding.resize(cluster.open(1), 2 * GIB)
    with pytest.raises(BadSize):
        cluster.holding.resize(held, 0)
    with pytest.raises(ShrinkRefused):
        cluster.holding.resize(held, GIB)
    assert cluster.holding.resize(held, GIB, force=True).record.size_bytes == GIB


STEPS = st.tuples(
    st.sampled_from(["open", "lose", "rejoin", "resize", "release", "expire", "retake"]),
    st.integers(1, 2),
    st.sampled_from([None, Fault.ANSWER_LOST, Fault.REQUEST_LOST, Fault.UNAVAILABLE]),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(STEPS, max_size=25))
def test_any_history_of_two_gateways_has_one_holder(
    history: list[tuple[str, int, Fault | None]],
) -> None:
    """Epochs and generations never fall, and only the holder of the epoch changes the record."""
    cluster, holders = Cluster(), dict[int, Held]()
    for action, gateway, fault in history:
        before = cluster.image.record
        if action == "expire":
            cluster.etcd.advance(10)
            continue
        if (action == "open") == (gateway in holders):
            continue
        try:
            step(cluster, holders, action, gateway, fault)
        except (Conflict, InUse, LeaseNotFound):
            holders.pop(gateway, None)
        except (OutcomeUnknown, EtcdUnavailable):
            pass
        after = cluster.image.record
        assert after.generation >= before.generation
        assert after.epoch >= before.epoch
        if after != before:
            assert after.holder == f"{gateway:032x}"
        lease = cluster.holding.lease_of(ID)
        assert lease is None or (lease.record.epoch, lease.record.holder) == (
            after.epoch,
            after.holder,
        )


def step(
    cluster: Cluster, holders: dict[int, Held], action: str, gateway: int, fault: Fault | None
) -> None:
    holding, etcd = cluster.holding, cluster.etcd
    image, etcd_lease = holding.image(ID), etcd.grant_lease(10)
    if fault is not None:
        etcd.fail_next(fault)
    try:
        if action == "open":
            holders[gateway] = holding.take_lease(
                image, gateway=f"gateway{gateway}", holder=f"{gateway:032x}", etcd_lease=etcd_lease
            )
            return
        held = holders[gateway]
        membership = held.record.membership
        match action:
            case "lose":
                plan = lose(membership, {"a" if gateway == 1 else "b"})
                if isinstance(plan, Change):
                    holders[gateway] = holding.change_membership(held, plan.membership)
            case "rejoin" if membership.stale:
                plan = rejoin(membership, membership.stale)
                assert isinstance(plan, Change)
                holders[gateway] = holding.change_membership(held, plan.membership)
            case "resize":
                holders[gateway] = holding.resize(held, held.record.size_bytes + 512)
            case "release":
                holding.release(held, clean=True)
                del holders[gateway]
            case "retake":
                holders[gateway] = holding.retake_lease(held, etcd_lease)
    finally:
        etcd.clear_faults()


def maintained(cluster: Cluster) -> Held:
    return cluster.holding.take_lease(
        cluster.image,
        gateway="gateway1",
        holder=f"{1:032x}",
        etcd_lease=cluster.etcd.grant_lease(10),
        maintenance=True,
    )


def test_lease_for_maintenance_yields_to_whoever_wants_the_image(cluster: Cluster) -> None:
    former = maintained(cluster)
    taken = cluster.holding.take_lease(
        cluster.image,
        gateway="gateway2",
        holder=f"{2:032x}",
        etcd_lease=cluster.etcd.grant_lease(10),
        instead_of=cluster.holding.lease_of(ID),
    )
    assert taken.record.epoch == former.record.epoch + 1
    with pytest.raises(LeaseLost, match="gateway gateway2 has it now"):
        cluster.holding.change_membership(former, without(former.record.membership, "a"))
    with pytest.raises(LeaseLost):
        cluster.holding.claim(former)


def test_claimed_lease_yields_no_longer(cluster: Cluster) -> None:
    """A client was let in under a lease that the next gateway would have taken from it."""
    held = maintained(cluster)
    seen = cluster.holding.lease_of(ID)
    claimed = cluster.holding.claim(held)
    assert not claimed.lease.maintenance
    assert cluster.holding.claim(claimed) == claimed
    with pytest.raises(InUse, match="gateway1"):
        cluster.holding.take_lease(
            cluster.image,
            gateway="gateway2",
            holder=f"{2:032x}",
            etcd_lease=cluster.etcd.grant_lease(10),
            instead_of=seen,
        )
    cluster.holding.change_membership(claimed, without(held.record.membership, "a"))


def test_snapshot_is_stored_under_the_lease_and_found_again(cluster: Cluster) -> None:
    held = cluster.open(1)
    after = held.record.with_snapshot("s", 5)
    taken = cluster.holding.change(held, after)
    assert taken.record == cluster.image.record == after
    assert cluster.holding.change(held, after) == taken
    gone = cluster.holding.change(taken, after.without_newest_snapshot())
    assert gone.record.layers == held.record.layers
    assert (gone.record.next_layer, gone.record.generation) == (3, 3)


def test_snapshot_of_a_former_holder_changes_nothing(cluster: Cluster) -> None:
    former = cluster.open(1)
    cluster.etcd.advance(10)
    now = cluster.open(2)
    with pytest.raises(LeaseLost):
        cluster.holding.change(former, former.record.with_snapshot("s", 5))
    assert cluster.image == now.image


def test_change_of_layers_that_is_none_is_a_defect(cluster: Cluster) -> None:
    held = cluster.open(1)
    after = held.record.with_snapshot("s", 5)
    for changes, problem in (
        ({"next_layer": 1}, "no layer's id is used twice"),
        ({"snapshots": ()}, "with one snapshot"),
        ({"layers": held.record.layers}, "no layer's id is used twice"),
        ({"layers": (Layer(id=9), *after.layers), "next_layer": 10}, "newer ones go"),
        ({"size_bytes": 2 * GIB}, "and nothing else"),
    ):
        with pytest.raises(AssertionError, match=problem):
            cluster.holding.change(held, replace(after, **changes))  # type: ignore[arg-type]
    assert cluster.image == held.image


def test_rollback_is_stored_with_the_size_of_its_snapshot(cluster: Cluster) -> None:
    held = cluster.open(1)
    first = cluster.holding.change(held, held.record.with_snapshot("s", 5))
    second = cluster.holding.change(first, first.record.with_snapshot("t", 6))
    grown = cluster.holding.resize(second, 2 * held.record.size_bytes)
    after = grown.record.rolled_back(grown.record.snapshots[0])
    back = cluster.holding.change(grown, after)
    assert back.record == cluster.image.record == after
    assert (back.record.layer_ids, back.record.next_layer) == ([4, 1], 5)
    assert back.record.size_bytes == held.record.size_bytes
    assert cluster.holding.change(grown, after) == back


def test_rollback_that_is_none_is_a_defect(cluster: Cluster) -> None:
    held = cluster.open(1)
    taken = cluster.holding.change(held, held.record.with_snapshot("s", 5))
    after = taken.record.rolled_back(taken.record.snapshots[0])
    for changes, problem in (
        ({"next_layer": 3}, "the top stays"),
        ({"snapshots": ()}, "one goes back to a snapshot"),
        ({"layers": (Layer(id=3),)}, "and the layers above"),
        ({"size_bytes": 2 * GIB}, "has its size"),
    ):
        with pytest.raises(AssertionError, match=problem):
            cluster.holding.change(taken, replace(after, **changes))  # type: ignore[arg-type]
    assert cluster.image == taken.image


def test_removed_snapshot_goes_by_its_name_first_and_by_its_layer_later(cluster: Cluster) -> None:
    held = cluster.open(1)
    for name in ("s", "t"):
        held = cluster.holding.change(held, held.record.with_snapshot(name, 5))
    first = held.record.snapshots[0]
    removed = cluster.holding.change(held, held.record.without_snapshot(first))
    assert (removed.record.layer_ids, removed.record.merging) == ([3, 2, 1], (1,))
    assert [each.name for each in cluster.image.record.snapshots] == ["t"]
    gone = cluster.holding.change(removed, removed.record.without_merged({1}))
    assert (gone.record.layer_ids, gone.record.merging) == ([3, 2], ())
    back = cluster.holding.change(gone, gone.record.with_merged({1}))
    assert (back.record.layer_ids, back.record.merging) == ([3, 2, 1], (1,))
    assert back.record.layers == removed.record.layers


def test_removal_that_is_none_is_a_defect(cluster: Cluster) -> None:
    held = cluster.open(1)
    held = cluster.holding.change(held, held.record.with_snapshot("s", 5))
    after = held.record.without_snapshot(held.record.snapshots[0])
    for changes, problem in (
        ({"merging": ()}, "a layer without its snapshot is merged"),
        ({"size_bytes": 2 * GIB}, "the size is changed"),
        ({"layers": held.record.layers[:1]}, "the top goes|nothing else"),
    ):
        with pytest.raises(AssertionError, match=problem):
            cluster.holding.change(held, replace(after, **changes))  # type: ignore[arg-type]
