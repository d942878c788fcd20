"""What the holder of a clone does where its ancestors are not whole on a node."""

from dataclasses import replace
from typing import Any

from etcd.images import ImageRecord, Parent
from shard.ids import ImageId
from tests.unit.samples import GIB, NODES, image_record
from vmstore import effects as wanted
from vmstore import events
from vmstore.ancestry import AGAIN_S, RETRY_S
from vmstore.holder import Holder

ME = "ab" * 16
PARENT = ImageId("ef" * 16)


def record(**changes: Any) -> ImageRecord:
    """A clone that nobody has opened before."""
    return image_record(
        ImageId("cd" * 16),
        epoch=1,
        holder=ME,
        clean=False,
        placement_key=PARENT,
        parent=Parent(image=PARENT, layer=1, generation=2, size_bytes=GIB),
        **changes,
    )


def peeked(
    node: str, *, instance: int = 1, known: bool = False, missing: bool = False
) -> events.Peeked:
    view = None
    if known:
        ours = record()
        view = events.NodeRecordView(
            epoch=1, holder=ME, generation=1, digest=ours.digest, peers={}, dirty=1
        )
    return events.Peeked(node, instance, 0, False, view, 1, missing)


def gathering(ours: ImageRecord) -> Holder:
    holder = Holder(holder=ME, now_s=0.0)
    holder.step(events.LeaseTaken(ours))
    return holder


def serving(ours: ImageRecord) -> Holder:
    """Its nodes in sync have stored it before."""
    holder = gathering(ours)
    for node in sorted(ours.membership.all_in_sync()):
        holder.step(peeked(node, known=True))
    assert wanted.Serve() in holder.step(events.Admitted())
    return holder


def of(kind: type, effects: list[wanted.Effect]) -> list[Any]:
    return [effect for effect in effects if isinstance(effect, kind)]


def test_new_clone_is_served_when_etcd_says_that_its_ancestors_are_whole() -> None:
    holder = gathering(record())
    assert holder.step(peeked("node1")) == [wanted.LookAtAncestors(1)]
    assert holder.step(peeked("node2")) == holder.step(peeked("node3")) == []
    # node2 and node3 told what they have after that look was begun.
    assert holder.step(events.AncestorsSeen(1, {})) == [wanted.LookAtAncestors(2)]
    assert holder.step(events.AncestorsSeen(1, {})) == []
    assert of(wanted.Admit, holder.step(events.AncestorsSeen(2, {}))) == [
        wanted.Admit(NODES, False, (1, 1, 1))
    ]


def test_clone_that_its_nodes_have_stored_needs_no_etcd() -> None:
    holder = gathering(record())
    effects = [effect for node in NODES for effect in holder.step(peeked(node, known=True))]
    assert effects == [wanted.Admit(NODES, False, (1, 1, 1))]


def test_image_that_is_no_clone_needs_no_etcd() -> None:
    ours = replace(record(), parent=None)
    holder = gathering(ours)
    effects = [effect for node in NODES for effect in holder.step(peeked(node))]
    assert effects == [wanted.Admit(NODES, False, (1, 1, 1))]


def test_node_whose_parent_is_stale_is_left_behind_before_it_serves_a_new_clone() -> None:
    holder = gathering(record())
    for node in NODES:
        holder.step(peeked(node))
    holder.step(events.AncestorsSeen(1, {}))
    effects = holder.step(events.AncestorsSeen(2, {0: {"node2": 0}}))
    (change,) = of(wanted.ChangeMembership, effects)
    assert change.after.stale == {0: {"node2": 0}}
    effects = holder.step(events.MembershipChanged(change.after))
    assert of(wanted.Admit, effects)[0].nodes == ("node1", "node3")


def test_node_without_the_parent_is_left_behind_and_the_parent_mended() -> None:
    holder = gathering(record())
    holder.step(peeked("node1", known=True))
    holder.step(peeked("node2", known=True))
    effects = holder.step(peeked("node3", instance=2, missing=True))
    (change,) = of(wanted.ChangeMembership, effects)
    assert change.after.stale == {0: {"node3": 0}}
    assert of(wanted.MendParent, holder.step(events.AncestorsSeen(1, {})))
    holder.step(events.MembershipChanged(change.after))
    effects = holder.step(events.Admitted())
    assert wanted.Serve() in effects and not of(wanted.Heal, effects)
    # etcd has been told by now, and the node is asked again until it has the parent.
    effects = holder.step(events.Tick(AGAIN_S))
    assert of(wanted.Peek, effects) == [wanted.Peek("node3")]
    effects = holder.step(peeked("node3", instance=2, missing=True))
    (look,) = of(wanted.LookAtAncestors, effects)
    effects = holder.step(events.AncestorsSeen(look.look, {0: {"node3": 0}}))
    assert not of(wanted.MendParent, effects) and not of(wanted.Heal, effects)


def test_stale_node_is_healed_when_its_ancestors_are_whole() -> None:
    holder = serving(record(generation=4, stale={0: {"node3": 0}}))
    effects = holder.step(peeked("node3"))
    (look,) = of(wanted.LookAtAncestors, effects)
    assert not of(wanted.Heal, effects)
    assert not of(wanted.Heal, holder.step(events.AncestorsSeen(look.look, {0: {"node3": 0}})))
    assert of(wanted.Peek, holder.step(events.Tick(AGAIN_S))) == [wanted.Peek("node3")]
    (look,) = of(wanted.LookAtAncestors, holder.step(peeked("node3")))
    assert len(of(wanted.Heal, holder.step(events.AncestorsSeen(look.look, {})))) == 1


def test_healed_node_is_taken_in_only_after_another_look() -> None:
    """Its parent was emptied before the heal, and nobody had told etcd when it began."""
    holder = serving(record(generation=4, stale={0: {"node3": 0}}))
    (look,) = of(wanted.LookAtAncestors, holder.step(peeked("node3")))
    (heal,) = of(wanted.Heal, holder.step(events.AncestorsSeen(look.look, {})))
    effects = holder.step(events.Healed("node3", heal.attempt))
    assert not of(wanted.ChangeMembership, effects)
    (look,) = of(wanted.LookAtAncestors, effects)
    effects = holder.step(events.AncestorsSeen(look.look, {0: {"node3": 0}}))
    assert of(wanted.EndHeal, effects) and not of(wanted.ChangeMembership, effects)
    holder.step(events.Tick(AGAIN_S))
    (look,) = of(wanted.LookAtAncestors, holder.step(peeked("node3")))
    (heal,) = of(wanted.Heal, holder.step(events.AncestorsSeen(look.look, {})))
    (look,) = of(wanted.LookAtAncestors, holder.step(events.Healed("node3", heal.attempt)))
    (change,) = of(wanted.ChangeMembership, holder.step(events.AncestorsSeen(look.look, {})))
    assert change.after.stale == {}


def test_look_that_etcd_does_not_answer_is_made_again() -> None:
    holder = gathering(record())
    for node in NODES:
        holder.step(peeked(node))
    holder.step(events.AncestorsSeen(1, {}))
    assert holder.step(events.AncestorsUnseen(2, "etcd is away")) == []
    assert "cannot be looked up: etcd is away" in holder.trouble
    assert holder.step(events.Tick(RETRY_S / 2)) == []
    assert holder.step(events.Tick(RETRY_S)) == [wanted.LookAtAncestors(3)]
    assert of(wanted.Admit, holder.step(events.AncestorsSeen(3, {})))


def test_nodes_blamed_for_their_ancestors_alone_come_in_when_these_are_whole() -> None:
    """With two of three blamed the set kept them, and the clone never opened."""
    holder = gathering(record())
    for node in NODES:
        holder.step(peeked(node))
    holder.step(events.AncestorsSeen(1, {}))
    lacking = {0: {"node2": 0, "node3": 0}}
    effects = holder.step(events.AncestorsSeen(2, lacking))
    assert not of(wanted.Admit, effects) and not of(wanted.ChangeMembership, effects)
    effects = holder.step(events.Tick(AGAIN_S))
    assert {each.node for each in of(wanted.Peek, effects)} == {"node2", "node3"}
    for node in ("node2", "node3"):
        holder.step(peeked(node))
    holder.step(events.AncestorsUnseen(3, "etcd is away"))
    assert holder.step(events.Tick(AGAIN_S + RETRY_S)) == [wanted.LookAtAncestors(4)]
    effects = holder.step(events.AncestorsSeen(4, {}))
    assert of(wanted.Admit, effects) == [wanted.Admit(NODES, False, (1, 1, 1))]


def test_removal_that_clones_keep_from_being_made_is_told_and_all_else_goes_on() -> None:
    ours = replace(record().with_snapshot("s", 5), parent=None)
    holder = gathering(ours)
    for node in NODES:
        view = events.NodeRecordView(1, ME, 2, ours.digest, {}, 1)
        holder.step(events.Peeked(node, 1, 0, False, view, 1))
    holder.step(events.Admitted())
    holder.step(events.ReplicaDown("node3", blocking=False))
    (change,) = of(wanted.ChangeMembership, holder.step(events.RemoveSnapshot("s")))
    assert change.after.snapshots == ()
    holder.step(events.ReplicaBlocking("node3"))
    effects = holder.step(events.ChangeRefused("vms/copy begins on it"))
    assert of(wanted.TellLayers, effects) == [wanted.TellLayers("vms/copy begins on it")]
    (change,) = of(wanted.ChangeMembership, effects)
    assert (change.after.snapshots, change.after.stale) == (ours.snapshots, {0: {"node3": 2}})


def test_removal_that_etcd_may_still_take_is_overtaken_by_another_change() -> None:
    """A request that came late, when the clone was gone, took the image from its holder."""
    ours = replace(record().with_snapshot("s", 5), parent=None)
    holder = gathering(ours)
    for node in NODES:
        view = events.NodeRecordView(1, ME, 2, ours.digest, {}, 1)
        holder.step(events.Peeked(node, 1, 0, False, view, 1))
    holder.step(events.Admitted())
    holder.step(events.RemoveSnapshot("s"))
    holder.step(events.MembershipDelayed("etcd did not answer", maybe_taken=True))
    effects = holder.step(events.ChangeRefused("vms/copy begins on it"))
    assert of(wanted.TellLayers, effects) == [wanted.TellLayers("vms/copy begins on it")]
    (change,) = of(wanted.ChangeMembership, effects)
    assert change.after == replace(ours, generation=3)
    assert of(wanted.Reconfigure, holder.step(events.MembershipChanged(change.after)))


def test_node_whose_disk_was_put_back_stays_emptied_when_its_ancestors_are_whole() -> None:
    """Who knew of its disk was gone as the parent was mended, and the disk was believed again."""
    holder = gathering(record())
    holder.step(peeked("node3", known=True, missing=True))
    told = replace(peeked("node1", known=True).record, peers={"node3": 9})  # type: ignore[type-var]
    holder.step(replace(peeked("node1", known=True), record=told))
    holder.step(events.ReplicaDown("node1", blocking=False))
    holder.step(events.Tick(AGAIN_S / 2))
    effects = holder.step(peeked("node3", known=True))
    for look in of(wanted.LookAtAncestors, effects):
        holder.step(events.AncestorsSeen(look.look, {}))
    assert holder.emptied == {"node3"}


def test_node_that_lacks_an_ancestor_in_one_set_is_not_let_in_for_being_stale_in_another() -> None:
    sets = (NODES, ("node1", "node3", "node4"))
    ours = record(sets=sets, generation=4, stale={1: {"node3": 0}})
    holder = gathering(ours)
    for node in ("node1", "node2", "node3", "node4"):
        effects = holder.step(peeked(node))
    look = 1
    admitted: list[wanted.Admit] = []
    while of(wanted.LookAtAncestors, effects) or look == 1:
        effects = holder.step(events.AncestorsSeen(look, {0: {"node3": 0}}))
        admitted += of(wanted.Admit, effects)
        look += 1
    assert not admitted
    (change,) = of(wanted.ChangeMembership, effects)
    assert change.after.stale == {0: {"node3": 0}, 1: {"node3": 0}}


def test_node_that_was_blamed_and_healed_needs_etcd_no_more() -> None:
    holder = serving(record(generation=4, stale={0: {"node3": 0}}))
    holder.step(peeked("node3", missing=True))
    holder.step(events.AncestorsSeen(1, {}))
    holder.step(events.Tick(AGAIN_S))
    (look,) = of(wanted.LookAtAncestors, holder.step(peeked("node3")))
    (heal,) = of(wanted.Heal, holder.step(events.AncestorsSeen(look.look, {})))
    (look,) = of(wanted.LookAtAncestors, holder.step(events.Healed("node3", heal.attempt)))
    (change,) = of(wanted.ChangeMembership, holder.step(events.AncestorsSeen(look.look, {})))
    holder.step(events.MembershipChanged(change.after))
    assert not holder.ancestry.blamed and not holder.emptied
