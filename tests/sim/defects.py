"""Rules of the protocol, each broken on purpose: the simulator must notice.

A rule of the engine is broken by its name (`engine/core/src/rules.rs`), one of policy by a function
put in place of another. `within` says in how many random histories of its kind the defect is found
at the latest; `python -m tests.sim.defects` shows how many it takes.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any
from unittest import mock

from arbiter import statement, voting
from arbiter.statement import Statement, Votes
from arbiter.vote import Answer, Ballot, Refusal, Vote
from arbiter.vote import prepare as prepare_vote
from arbiter.voting import Addressee, Reply
from engine._engine import Simulation
from etcd import keys
from etcd.errors import EtcdError
from etcd.images import ImageRecord
from etcd.interface import KeyAbsent
from shard.errors import HciError
from shard.membership import Policy
from tests.sim.history import History, Outcome
from tests.sim.kinds import KINDS, seeds_of
from tests.sim.oracle import SECTOR_BYTES, Violation
from tests.sim.processes import SimNode
from vmstore import granting
from vmstore.channels import Channels
from vmstore.effects import ChangeMembership, Effect
from vmstore.exports import Exports
from vmstore.freezing import is_unstored
from vmstore.history import Verdict
from vmstore.holder import Holder
from vmstore.leases import Leases
from vmstore.open_image import OpenImage
from vmstore.served import Served
from vmstore.serving import Serving
from vmstore.sessions import Sessions
from vmstore.snapshot_steps import SnapshotSteps
from vmstore.standing import Phase, Standing


@dataclass(frozen=True, slots=True)
class Defect:
    """A broken rule, and where it is looked for."""

    name: str
    history: str
    """Which of the design's histories its rule closes, or which invariant it keeps."""
    kind: str
    within: int
    at: int = 1
    """The history that noticed it last, which a test tries first."""
    match: str = ""
    """What the violation says, as `re.search` finds it. Any other error is not that of the rule."""
    panics: bool = False
    """It is the product's own assertion that notices, in Python or in the engine."""
    rules: tuple[str, ...] = ()
    patch: Callable[[], Any] | None = None
    behind: tuple[str, ...] = ()
    """Rules that stand behind this one, and are broken too. A history counts only if it passes with
    these broken and this one kept: then it is this one that it misses."""


def _quorum_of_one() -> Any:
    return mock.patch.object(Policy, "quorum", property(lambda _policy: 1))


@contextmanager
def _acknowledge_first() -> Iterator[None]:
    """A membership counts before etcd took it."""
    change, reconfigure = Serving._change_membership, Channels.reconfigure

    def change_first(serving: Serving, image: OpenImage, after: ImageRecord) -> None:
        if image.holder.retry_at_s is None and after.generation not in counted(image):
            counted(image).add(after.generation)
            reconfigure(serving._channels, image, after)
        change(serving, image, after)

    def not_again(channels: Channels, image: OpenImage, record: ImageRecord) -> None:
        if record.generation not in counted(image):
            reconfigure(channels, image, record)

    generations: dict[int, set[int]] = {}

    def counted(image: OpenImage) -> set[int]:
        return generations.setdefault(id(image), set())

    with (
        mock.patch.object(Serving, "_change_membership", change_first),
        mock.patch.object(Channels, "reconfigure", not_again),
    ):
        yield


def _believe_any_disk() -> Any:
    return mock.patch.object(Holder, "_judge_disks", return_value=None)


def _believe_etcd() -> Any:
    return mock.patch("vmstore.holder.problem_of", return_value=None)


def _never_reconcile() -> Any:
    """Who came back waits for one that stayed, also where none did."""
    may_join = Holder._may_join

    def patched(holder: Holder, join: set[str]) -> bool:
        served = any(node.served_as is not None for node in holder.nodes.values())
        return may_join(holder, join) and (
            holder._is_founded(holder._in_sync_names()) or not served
        )

    return mock.patch.object(Holder, "_may_join", patched)


def _lease_for_ever() -> Any:
    """The engine is never told when the lease ends."""
    return mock.patch.object(Sessions, "tell_deadline", return_value=None)


def _no_set_goes_alone() -> Any:
    """A set that cannot let its lost nodes go keeps the others from doing so."""
    change = Holder._change_membership

    def patched(holder: Holder) -> Any:
        return None if holder.stalled_by() else change(holder)

    return mock.patch.object(Holder, "_change_membership", patched)


def _anyone_joins() -> Any:
    """Who came back is let in although nobody stayed, and others of its set are away."""

    def let_in(holder: Holder) -> Any:
        assert holder.record is not None
        in_sync = holder.record.membership.all_in_sync()
        waiting = {name for name in in_sync if holder._may_be_let_in(name)}
        resume = {name for name in waiting if holder._resumes(name)}
        effects = [holder._admit(tuple(sorted(resume)), resume=True)] if resume else []
        joining = any(node.standing is Standing.JOINING for node in holder.nodes.values())
        join = waiting - resume
        if join and not joining and holder._may_join(join):
            effects.append(holder._admit(tuple(sorted(join)), resume=False))
        return effects

    return mock.patch.object(Holder, "_let_in", let_in)


def _all_sets_or_none() -> Any:
    """A node is let in only where it can be told from level in each of its sets."""
    let_in = Holder._let_in

    def patched(holder: Holder) -> Any:
        assert holder.record is not None
        membership = holder.record.membership
        sets = membership.in_sync_sets()
        join = {name for name in membership.all_in_sync() if holder._may_be_let_in(name)}
        while unfounded := [
            of_set
            for of_set in sets
            if of_set & join
            and not of_set <= join
            and all(holder.nodes[name].standing is not Standing.UP for name in of_set)
        ]:
            join -= set().union(*unfounded)
        with mock.patch.object(
            Holder, "_may_be_let_in", lambda holder, name: name in join or holder._resumes(name)
        ):
            return let_in(holder)

    return mock.patch.object(Holder, "_let_in", patched)


def _cut_off_is_kept() -> Any:
    """A smaller size is stored without that what it cuts off is discarded."""

    begin = Exports._begin_resize

    def patched(exports: Exports, image: OpenImage) -> None:
        engine: Any = exports._engine

        def cut(_channel: int, offset: int, length: int) -> None:
            engine.on_cut(0, offset // SECTOR_BYTES, length // SECTOR_BYTES)
            engine.on_cut_done(0, True)
            exports._zeroed(image, True)

        with mock.patch.object(engine, "zero", cut):
            begin(exports, image)

    return mock.patch.object(Exports, "_begin_resize", patched)


def _unjudged_history() -> Any:
    """Nodes take whatever etcd says."""
    return mock.patch.multiple(
        "hci.history", judge=lambda _known, _now: Verdict(), judge_copy=lambda *_known: iter(())
    )


def _recovered_as_it_was() -> Any:
    """A recovery writes epochs and generations as they were."""
    return mock.patch("vmstore.recovering.RECOVERY_STEP", 0)


def _nothing_is_buried() -> Any:
    return mock.patch.object(SimNode, "_bury", return_value=None)


def _let_anybody_in() -> Any:
    """Whom a gateway served before is not asked after."""
    return mock.patch.multiple(Served, check=mock.DEFAULT, admit=mock.DEFAULT)


def _the_name_says_it_all() -> Any:
    """A lease of one's own name is taken over, whoever holds it."""

    def is_of_the_dead(leases: Leases, lease: Any) -> bool:
        return bool(lease.gateway == leases._gateway)

    return mock.patch.object(Leases, "_is_of_the_dead", is_of_the_dead)


def _never_confirmed() -> Any:
    """A holder answers writes by what etcd took, whether the arbiter knows or not."""

    def no_steps(_held: Any, _arbiter: Any) -> Any:
        yield from ()

    return mock.patch.object(granting, "_confirm", no_steps)


def _grants_are_kept() -> Any:
    """The arbiter never replaces a grant by another."""

    def prepare(vote: Vote, ballot: Ballot) -> tuple[Vote, Answer]:
        other = vote.prepared
        if other is not None and other.in_sync != ballot.in_sync:
            return vote, Refusal.GENERATION_OF_TWO_SETS
        return prepare_vote(vote, ballot)

    return mock.patch.object(statement, "prepare", prepare)


def _judged_by_what_it_heard() -> Any:
    """The arbiter does not take for confirmed what etcd holds before it judges a change."""

    def prepare_image(votes: Votes, known: Statement, wanted: Statement) -> tuple[Votes, Answer]:
        if not votes:
            return statement.prepare_image(votes, known, wanted)
        return statement._cast(
            votes, wanted, lambda vote, index: prepare_vote(vote, wanted.ballot(index))
        )

    return mock.patch.object(voting, "prepare_image", prepare_image)


def _confirms_whatever_it_hears() -> Any:
    """The arbiter takes what it is told for confirmed, be it older than what it has."""

    def confirm(_vote: Vote, ballot: Ballot) -> tuple[Vote, Answer]:
        return Vote(ballot, None, ballot.epoch, ballot.holder), None

    return mock.patch.object(statement, "confirm", confirm)


def _any_arbiter_will_do() -> Any:
    """Whom a request is meant for, and what it was seen to know, does not matter."""
    judged = voting.Voting._judged

    def patched(own: voting.Voting, _to: Addressee, image: Any, judge: Any) -> Reply:
        return judged(own, Addressee(own._record.identity.id), image, judge)

    return mock.patch.object(voting.Voting, "_judged", patched)


def _leftovers_are_collected() -> Any:
    """A node deletes what etcd does not know."""
    register = SimNode._register

    def patched(node: SimNode) -> None:
        with suppress(EtcdError, HciError):
            known = {entry.image.record.id for entry in node._catalog.images()}
            for each in node._world.inventory(node.index)["images"]:
                if each["image"] not in known:
                    node._bury(each["image"])
        register(node)

    return mock.patch.object(SimNode, "_register", patched)


def _ids_are_given_again() -> Any:
    """Whoever makes an image does not look for tombstones."""

    def absent(key: str) -> KeyAbsent:
        return KeyAbsent(f"{key}/none" if key.startswith(keys.TOMBSTONES) else key)

    return mock.patch("vmstore.catalog.KeyAbsent", absent)


def _asked_at_each_tick() -> Any:
    """A change of membership is asked for again while etcd has not answered."""
    on_tick = Holder._on_tick

    def patched(holder: Holder) -> list[Effect]:
        effects = on_tick(holder)
        if holder.record is not None and holder.proposal is not None:
            effects.append(ChangeMembership(holder.record, holder.proposal))
        return effects

    return mock.patch.object(Holder, "_on_tick", patched)


def _snapshots_are_kept() -> Any:
    """A new holder takes each snapshot that etcd names for taken."""
    return mock.patch("vmstore.snapshot_steps.is_unstored", return_value=False)


def _any_set_tells() -> Any:
    """A new holder goes by the nodes that it hears, though some replica set has none among them."""
    withdraws = SnapshotSteps._withdraws

    def patched(holder: Holder, lost: Set[str] = frozenset()) -> bool:
        if holder.freezing.withdraws or holder.phase is not Phase.GATHERING:
            return withdraws(holder, lost)
        names = holder._in_sync_names() - holder.emptied - lost
        heard = [holder.nodes[name].peeked for name in names]
        known = [peeked for peeked in heard if peeked is not None]
        assert holder.record is not None
        return len(known) == len(heard) and is_unstored(holder.record, known)

    return mock.patch.object(SnapshotSteps, "_withdraws", patched)


DEFECTS = (
    # Who answers
    Defect("all in sync answer", "invariant 5", "kills", 10, 1,
           match="was answered with", rules=("AllInSyncAnswer",)),
    Defect("quorum", "invariant 5", "kills", 10, 1, match="below quorum", patch=_quorum_of_one),
    Defect("membership before acknowledgement", "invariant 5", "etcd", 10, 1,
           match="was answered with",
           patch=_acknowledge_first),
    Defect("stored before the answer", "invariant 4", "kills", 10, 1, match="to be left behind",
           rules=("StoredBeforeAnswer",)),
    # Reads
    Defect("reads wait for writes", "21: a write that vanishes", "vanishing", 20, 12,
           match="read as",
           rules=("ReadsWaitForWrites",)),
    Defect("reads past the lease are confirmed", "6: a holder cut off", "holders", 170, 109,
           match="read as",
           rules=("ReadsAreConfirmed",)),
    Defect("the engine knows the lease's end", "6: a holder cut off", "holders", 170, 109,
           match="read as",
           patch=_lease_for_ever),
    Defect("reads are verified", "17: rot; invariant 6", "rot", 40, 2,
           match="differs|read as|mixture",
           rules=("ReadsAreVerified",)),
    # Fencing
    Defect("records grow", "7: etcd restored", "restored", 10, 5,
           match="^node-. goes back", rules=("RecordsGrow",),
           patch=_believe_etcd),
    Defect("sessions", "14: late frames", "network", 150, 99,
           match="read as|differs", rules=("SessionIsCurrent",)),
    Defect("epochs at the nodes", "14: late frames", "late", 10, 2, match="read as|differs",
           rules=("EpochIsCurrent",), behind=("SessionIsCurrent",)),
    Defect("who was served is barred", "1: a guest is let in again", "comes back", 20, 7,
           match="read as",
           patch=_let_anybody_in),
    Defect("the lock file tells who is dead", "19: two gateway processes", "twins", 10, 1,
           match="which lives, was taken",
           patch=_the_name_says_it_all),
    # Power and disks
    Defect("a failed sync ends the store", "15: a failed sync", "disks", 10, 2, match="stuck",
           rules=("FailedSyncEnds",)),
    Defect("flush numbers", "16: a disk is rolled back", "swapped", 20, 10, match="read as|differs",
           patch=_believe_any_disk),
    Defect("a flush is durable", "invariant 1", "power", 10, 5,
           match="read as", rules=("FlushIsDurable",)),
    Defect("levelled means durable", "5: copies that are not synced", "power", 30, 12,
           match="differs|read as",
           rules=("LevelIsDurable",)),
    Defect("level before requests", "18: copies that land on newer data", "kills", 90, 57,
           match="read as|differs",
           rules=("LevelBeforeRequests",)),
    Defect("reconcile where nobody stayed", "4: all nodes killed", "kills", 10, 1, match="stuck",
           patch=_never_reconcile),
    Defect("a loss is told", "answered, unflushed writes that went with all power", "power", 60, 25,
           match="a flush was answered",
           rules=("LossIsTold",)),
    # Heal
    Defect("dirty shards count as newer", "2, 10: missed by the heal list", "missed", 10, 3,
           match="differs|read as",
           rules=("DirtyCountsAsNewer",)),
    Defect("a generation outlives its entry", "2, 10: missed by the heal list", "missed", 30, 19,
           match="differs|read as",
           rules=("GenerationOutlivesEntry",)),
    Defect("writes are listed while a heal lists", "2: missed by the heal list", "missed", 20, 7,
           match="differs|read as",
           rules=("WritesAreListed",)),
    Defect("a heal pauses writes", "5: its source lacks a pending write", "heals", 30, 14,
           match="a change that the node misses", panics=True,
           rules=("HealPausesWrites",)),
    Defect("a healed node answers", "5: the end of a heal races an answer", "heals", 20, 9,
           match="stuck|was answered with|differs|read as",
           rules=("HealedNodeAnswers",)),
    Defect("a lost healed node is awaited", "5: the end of a heal races an answer", "heals", 50, 32,
           match="was answered with",
           rules=("LostHealedIsAwaited",)),
    Defect("a heal needs its sources", "5: a new holder trusts old marks", "missed", 40, 21,
           match="differs|read as",
           rules=("HealNeedsItsSources",)),
    Defect("healed means durable", "5: copies that are not synced", "heals", 90, 48,
           match="differs|read as",
           rules=("HealedIsDurable",)),
    Defect("what comes later overtakes pulls", "14: late frames", "heals", 90, 54,
           match="differs|read as",
           rules=("PullsAreOvertaken",)),
    Defect("clears name what is answered", "3: cleared too early", "refused", 20, 8,
           match="differs|read as",
           rules=("ClearIsAnswered",)),
    # Levelling
    Defect("sticky after a restart", "3: cleared too early", "levels", 90, 59,
           match="read as|differs",
           rules=("StickyAfterRestart",), behind=("FlushWaitsForLevel",)),
    Defect("sticky until levelled", "3: cleared too early", "levels", 90, 59,
           match="read as|differs",
           rules=("StickyUntilLevel",),
           behind=("FlushWaitsForLevel",)),
    Defect("all in sync are levelled, or none", "4: all nodes killed", "levels", 10, 3,
           match="read as|differs",
           rules=("AllInSyncLevelled",), patch=_anyone_joins),
    Defect("a flush waits for levelling", "invariant 1", "levels", 20, 11, match="read as",
           rules=("FlushWaitsForLevel",)),
    Defect("a first flush goes to all", "invariant 1", "levels", 10, 2, match="read as",
           rules=("FirstFlushGoesToAll",),
           behind=("LevelIsDurable",)),
    # The arbiter
    Defect("confirmed before the answer", "9: a grant that etcd committed", "pairs", 10, 1,
           match="the arbiter has confirmed",
           patch=_never_confirmed),
    Defect("a grant may be replaced", "9: stuck on a grant", "votes", 10, 2,
           match="each set has its quorum|stuck",
           patch=_grants_are_kept),
    Defect("judged by what etcd holds", "9: refuses a healed node for ever", "votes", 290, 193,
           match="each set has its quorum|stuck",
           patch=_judged_by_what_it_heard),
    # Who goes on
    Defect("sets go on alone", "20: a dead pair stalls another", "some away", 10, 1,
           match="can go on|each set has its quorum",
           patch=_no_set_goes_alone),
    Defect("sets are founded alone", "20: a dead pair stalls another", "some away", 20, 7,
           match="can go on|each set has its quorum",
           patch=_all_sets_or_none),
    # etcd
    Defect("equal records agree", "7: etcd restored", "restored", 10, 2, match="two holders",
           rules=("EqualRecordsAgree",),
           patch=_believe_etcd),
    Defect("nodes judge etcd", "7, 8: etcd restored, etcd lost", "recovered", 10, 4, match="stuck",
           patch=_unjudged_history),
    Defect("a recovery raises", "7: etcd restored", "recovered", 10, 1,
           match="an equal record differs|two holders", patch=_recovered_as_it_was),
    # Sizes, deletes
    Defect("what a shrink cuts off is discarded", "10: shrunk away", "sizes", 10, 1,
           match="read as",
           patch=_cut_off_is_kept),
    Defect("nodes delete on tombstones", "8: deleted ones; invariant 7", "sizes", 10, 1,
           match="deleted image is left",
           patch=_nothing_is_buried),
    # Disks that are not what they were
    Defect("what was set back is distrusted", "16: a disk is rolled back", "set back", 10, 1,
           match="differs|read as",
           patch=_believe_any_disk),
    # Fencing
    Defect("generations at the nodes", "14: late frames", "network", 10, 1, match="differs|read as",
           rules=("GenerationIsCurrent",), behind=("SessionIsCurrent",)),
    Defect("block writes are ordered", "17: two writes share a block", "refused", 20, 7,
           match="differs",
           rules=("BlockWritesAreOrdered",)),
    Defect("a repair pauses writes", "17: rot; invariant 3", "repairs", 20, 4,
           match="differs|read as", rules=("RepairPausesWrites",)),
    Defect("a winner for each block", "18: reconcile by shard", "half copied", 20, 4,
           match="read as",
           rules=("WinnerPerBlock",)),
    # The arbiter
    Defect("what is confirmed stays", "invariant 4", "pairs restored", 10, 3,
           match="^arb-.* goes back",
           patch=_confirms_whatever_it_hears),
    Defect("an emptied arbiter is refused", "9: it has lost its disk", "arbiters", 90, 64,
           match="has lost its disk, and votes",
           patch=_any_arbiter_will_do),
    # Deletes
    Defect("a leftover needs a tombstone", "8: live images as leftovers", "recovered", 10, 4,
           match="has no record",
           patch=_leftovers_are_collected),
    Defect("an id is given once", "8: ids reused; invariant 7", "sizes", 10, 1,
           match="given again",
           patch=_ids_are_given_again),
    # Snapshots
    Defect("snapshots wait for writes", "13: a snapshot differs", "snapshots", 30, 19,
           match="read as|differs",
           rules=("SnapshotsWaitForWrites",)),
    Defect("snapshots are flushed", "13: a snapshot differs", "snapshots", 20, 4,
           match="read as|differs",
           rules=("SnapshotsAreFlushed",)),
    Defect("snapshots that nobody stored go", "13: a snapshot differs", "snapshots", 20, 5,
           match="read as|differs|said not to be taken",
           patch=_snapshots_are_kept),
    Defect("readers read what is frozen", "13: a snapshot differs", "snapshots", 20, 6,
           match="read as|differs",
           rules=("ReadersReadFrozenLayers",)),
    # Rollbacks
    Defect("dropped layers go", "10: it returns with a node that was away", "rollbacks", 20, 1,
           match="keeps layers|differs|read as",
           rules=("DroppedLayersGo",)),
    # Removals
    Defect("merges fill gaps", "10: what was merged returns", "removals", 20, 1,
           match="read as|differs",
           rules=("MergesFillGaps",)),
    # Bounds
    Defect("a change is asked for once", "invariant 8", "etcd", 20, 8, match="calls under way",
           patch=_asked_at_each_tick),
)  # fmt: skip

CANDIDATES = (
    Defect("pulls end with their session", "14: late frames", "heals", 0,
           rules=("PullsEndWithTheirSession",)),
    Defect("peers ask under the record", "14: late frames", "heals", 0,
           rules=("PeersAskUnderTheRecord",)),
    Defect("what is merged keeps its generation", "10: what was merged returns", "removals", 0,
           rules=("MergedKeepGenerations",)),
    Defect("merged before it is compared", "10: what was merged returns", "removals", 0,
           rules=("MergedBeforeCompared",)),
    Defect("changes are since a snapshot", "10: what was merged returns", "removals", 0,
           rules=("ChangesAreSinceSnapshots",)),
    Defect("each set says that a snapshot is not stored", "invariant 1", "snapshots", 0,
           patch=_any_set_tells),
    Defect("unanswered writes are asked again", "invariant 2", "power", 0,
           rules=("UnansweredAskedAgain",)),
    Defect("tags are copied", "5: a new holder trusts old marks", "missed", 0,
           rules=("TagsAreCopied",)),
)  # fmt: skip
"""Rules whose loss no random history notices: `docs/simulation.md` says why, and what does."""


@contextmanager
def breaking(*rules: str) -> Iterator[None]:
    """Break rules of the engine in this thread."""
    Simulation.break_rules(list(rules))
    try:
        yield
    finally:
        Simulation.break_rules([])


def planted_by_name(name: str) -> Callable[[], Any]:
    """Return the patch of a defect of policy."""
    found = next(defect for defect in (*DEFECTS, *CANDIDATES) if defect.name == name)
    assert found.patch is not None, f"{name} is a rule of the engine"
    return found.patch


@contextmanager
def planted(defect: Defect) -> Iterator[None]:
    """Break what the defect breaks."""
    rules = (*defect.rules, *defect.behind)
    with breaking(*rules), defect.patch() if defect.patch else nullcontext():
        yield


def catch(
    defect: Defect, within: int, kind: str | None = None, *, first: int = 1
) -> tuple[int, Outcome | None]:
    """Return which history of `within` notices a defect, the first one, or `first`; and how."""
    seeds = list(itertools.islice(seeds_of(kind or defect.kind), within))
    for count in dict.fromkeys((first, *range(1, within + 1))):
        seed = seeds[count - 1]
        with planted(defect):
            outcome = History(seed).play()
        if is_noticed(defect, outcome.error) and _is_missed(defect, seed):
            return count, outcome
    return within, None


def is_noticed(defect: Defect, error: BaseException | None) -> bool:
    """Whether a history failed because of the broken rule, and not because a patch breaks more."""
    if error is None:
        return False
    panicked = type(error).__name__ in ("AssertionError", "PanicException")
    kind = isinstance(error, Violation) or (defect.panics and panicked)
    return kind and re.search(defect.match, str(error)) is not None


def _is_missed(defect: Defect, seed: int) -> bool:
    """Whether it is the rule itself that a history misses, not one behind it."""
    if not defect.behind:
        return True
    with breaking(*defect.behind):
        return History(seed).play().error is None


def main() -> int:
    """Show how many histories each defect takes."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim.defects", description=__doc__)
    parser.add_argument("names", nargs="*", help="only those whose name has one of these in it")
    parser.add_argument("--within", type=int, default=300)
    parser.add_argument("--survey", action="store_true", help="try histories of all kinds")
    options = parser.parse_args()
    for defect in (*DEFECTS, *CANDIDATES):
        if options.names and not any(name in defect.name for name in options.names):
            continue
        if options.survey:
            for kind in KINDS:
                count, outcome = catch(defect, options.within, kind.name)
                if outcome is not None:
                    print(f"{defect.name}: {count} of {kind.name}: {str(outcome.error)[:90]}",
                          flush=True)  # fmt: skip
            continue
        count, outcome = catch(defect, options.within)
        why = (
            "NOT CAUGHT"
            if outcome is None
            else f"{type(outcome.error).__name__} {str(outcome.error)[:110]}"
        )
        print(f"{count:4} (within {defect.within:3}) {defect.name} [{defect.kind}]: {why}",
              flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
