"""`Holder`: what a gateway decides about one image, from taking its lease to giving it back.

A pure state machine: `step(event)` returns effects, in order; whoever drives it carries them out
and brings the answers back as events. Time arrives as `Tick` events.

    phase      is left by                                                     to
    taking     LeaseTaken: the lease key, the raised epoch                    gathering
    gathering  every node in sync has been peeked and judged, or is let go    joining
    joining    Admitted: what may differ between replicas is known            serving
    serving    Close, when the last client has left                           closing
    closing    Closed: everything flushed and cleared                         releasing
    releasing  Released                                                       ended
    any        another holder or record is known, the lease is gone           releasing
    taking     Fail: unknown, in use, etcd not reachable                      ended

After an unclean end, or when a node in sync returns, replicas are made level while the image
serves; until then one that is not does not stand in for one that is lost (`levelling`).

A node that keeps clients waiting although the others are quick is left behind too, where all others
are well and the quorum allows (`slowness`); it is healed after a rest.

A stale node that is there is healed while the image serves (`healing`); the record takes it in when
it is level, and lost ones out in the same change.

One change of the record is under way at a time. A node in sync that is lost is left behind only
where requests wait for it, and only by a change that etcd took first (membership before
acknowledgement); where that would break the quorum it stays in sync, and its requests wait.

Its parts: who is let in (`admission_steps`), heals (`heal_steps`), what a clone begins on
(`ancestor_steps`), and changes of layers, for which changes of clients wait (`snapshot_steps`). Who
is lost, and when one is left behind, stands in `standing`.

What this module refuses: to serve from a node that knows a later record (etcd was rolled back), and
to believe a node that has lost its record or was rolled back itself: such a node is stale since 0.
"""

from dataclasses import dataclass, replace

from etcd.images import ImageRecord
from shard.membership import Change, Ready, lose, rejoin
from vmstore.admission_steps import AdmissionSteps
from vmstore.effects import (
    ChangeMembership,
    CloseImage,
    Effect,
    Forget,
    KillImage,
    OpenImage,
    Reconfigure,
    Refuse,
    Release,
    TellLayers,
)
from vmstore.events import (
    AdmitFailed,
    Admitted,
    AncestorsSeen,
    AncestorsUnseen,
    ChangeLayers,
    ChangeRefused,
    Close,
    Closed,
    Emptied,
    Event,
    Fail,
    Fenced,
    FreezeFailed,
    Frozen,
    Healed,
    HealFailed,
    Holding,
    Lags,
    LeaseTaken,
    Levelled,
    Lost,
    MembershipChanged,
    MembershipDelayed,
    Peeked,
    Released,
    RemoveSnapshot,
    ReplicaBlocking,
    ReplicaDown,
    ReplicaFailed,
    Stored,
    Tick,
)
from vmstore.freezing import Stage
from vmstore.judging import emptied, problem_of
from vmstore.snapshot_steps import RETRY_S
from vmstore.space import NO_SPACE
from vmstore.standing import NodeState, Phase, Standing

OPEN_LIMIT_S = 20.0
"""After this a client that waits for an image to open is told so; a gateway that is asked again
starts afresh."""


@dataclass(slots=True)
class Holder(AdmissionSteps):
    """One image, as its holder decides about it."""

    def step(self, event: Event) -> list[Effect]:
        """Take an event; return what is to be done about it, in order."""
        effects = self._handle(event)
        self._check()
        return effects

    def _handle(self, event: Event) -> list[Effect]:
        match event:
            case Tick(now_s):
                self.now_s = now_s
                return self._on_tick()
            case _ if self.phase is Phase.ENDED:
                return []
            case LeaseTaken():
                return self._on_lease_taken(event)
            case Fail(reason):
                self.phase = Phase.ENDED
                return [Refuse(reason), Forget()]
            case Lost(reason):
                return self._give_up(reason)
            case Fenced(node):
                return self._give_up(f"{node} knows a later holder or membership")
            case Released():
                self.phase = Phase.ENDED
                return [Forget()]
            case Closed(clean):
                return self._on_closed(clean)
            case Close():
                return self._on_close()
            case _ if self.phase is Phase.RELEASING or self.record is None:
                return []
            case MembershipChanged(record):
                return self._on_changed(record)
            case MembershipDelayed(why, maybe_taken):
                return self._on_delayed(why, maybe_taken)
            case ChangeRefused(why):
                return self._on_refused(why)
            case Peeked():
                return self._on_peeked(event)
            case ReplicaDown(node, blocking):
                self._node_gone(node)
                self.blocking.discard(node)
                if blocking:
                    self.blocking.add(node)
                return self._go_on()
            case ReplicaBlocking(node):
                self.blocking.add(node)
                return self._go_on()
            case ReplicaFailed(node, status):
                self.nodes[node].failed_at_s = self.now_s
                self.trouble = f"{node} fails requests: {status}"
                if status == NO_SPACE:
                    self.space.refused(node, self.now_s)
                    full = sorted(self.space.full(self.now_s))
                    self.trouble = f"no space left on {', '.join(full)}"
                self.blocking.add(node)
                if self.waiting_since_s is None:
                    self.waiting_since_s = self.now_s
                return self._go_on()
            case Lags(lags):
                self.slowness.heard(lags, self.now_s)
                return self._go_on()
            case Admitted(levelling):
                return self._on_admitted(levelling)
            case Levelled(node):
                self.levelling.discard(node)
                return self._go_on()
            case AdmitFailed(node):
                return self._on_admit_failed(node)
            case ChangeLayers(change):
                if self.phase is not Phase.SERVING:
                    return [TellLayers("the image is being closed; try again")]
                self._yield_to_order()
                self.freezing.order(change, self.now_s)
                return self._go_on()
            case RemoveSnapshot(name):
                return self._remove_snapshot(name)
            case Emptied(node, layers):
                self.merging.emptied[node] = layers
                return self._go_on()
            case Holding(attempt):
                return self._on_holding(attempt)
            case Frozen(attempt):
                return self._on_frozen(attempt)
            case FreezeFailed(attempt, why):
                return self._on_freeze_failed(attempt, why)
            case Healed(node, attempt):
                self.heals.healed(attempt)
                self.ancestry.forget(node)
                return self._go_on()
            case AncestorsSeen(look, lacking):
                return self._on_ancestors_seen(look, lacking)
            case AncestorsUnseen(look, why):
                return self._on_ancestors_unseen(look, why)
            case HealFailed(node, attempt, status):
                self.trouble = f"the heal of {node} ended early: {status}"
                self._on_heal_failed(attempt)
                return self._go_on()
            case Stored(generation):
                return [*self._on_stored(generation), *self._go_on()]

    # Taking the lease, and the end

    def _on_lease_taken(self, taken: LeaseTaken) -> list[Effect]:
        record, away = taken.record, taken.away
        assert self.phase is Phase.TAKING, "a lease is taken once"
        assert record.holder == self.holder, "the record names its holder"
        self.record = record
        names = [node for members in record.sets for node in members]
        self.nodes = {name: NodeState(away_since_s=away.get(name)) for name in names}
        self.phase = Phase.GATHERING
        self.waiting_since_s = self.opened_s = self.now_s
        return [OpenImage(record)]

    def _on_close(self) -> list[Effect]:
        if self._awaits_rollback:
            # It is closed when that is over: whoever wanted it stands for a client until then.
            return []
        if self.phase is Phase.SERVING:
            heal = self.heals.now
            ended = self._end_heal(heal.attempt) if heal and self.proposal is None else []
            if self.freezing.stage is not Stage.STORING:
                ended += self._give_up_layers("the image is being closed; try again")
            if not self._proposes_removal:
                why = "the image is being closed; try again"
                ended += self._give_up_removal(why, unknown=False)
            self.phase = Phase.CLOSING
            return [*ended, CloseImage()]
        if self.phase in (Phase.GATHERING, Phase.JOINING):
            # Nothing was served: what was unclean before stays so.
            return self._give_up("no client waits any more")
        # While the lease is being taken clients come and go; whoever drives asks again after that.
        return []

    def _on_closed(self, clean: bool) -> list[Effect]:
        if self.phase is not Phase.CLOSING or self.record is None:
            return []
        told = self._give_up_layers("the image was closed before its nodes had stored it")
        told += self._give_up_removal("the image was closed before etcd had answered", unknown=True)
        self.phase = Phase.RELEASING
        self.retry_at_s = None
        return [*told, Release(self.record, clean and self.proposal is None)]

    def _give_up(self, reason: str) -> list[Effect]:
        if self.phase is Phase.RELEASING or self.record is None:
            return []
        told = self._give_up_layers(reason)
        told += self._give_up_removal(reason, unknown=self._proposes_removal)
        self.trouble = reason
        self.phase = Phase.RELEASING
        self.retry_at_s = None
        return [*told, KillImage(), Refuse(reason), Release(self.record, False)]

    # Nodes that come

    def _on_peeked(self, peeked: Peeked) -> list[Effect]:
        assert self.record is not None
        node = self.nodes[peeked.node]
        node.standing = Standing.WAITING
        node.instance = peeked.instance
        self.slowness.came(peeked.node, peeked.instance, self.now_s)
        node.away_since_s = None
        self.heals.came(peeked.node)
        problem = problem_of(peeked, self.record)
        if problem is not None:
            return self._give_up(problem)
        node.peeked = peeked
        self._judge_disks()
        self._judge_ancestors(peeked.node)
        return self._go_on()

    def _judge_disks(self) -> None:
        known = [node.peeked for node in self.nodes.values() if node.peeked is not None]
        for name in emptied(known):
            if self.nodes[name].standing in (Standing.WAITING, Standing.ASKED):
                self.emptied.add(name)
                # Whatever becomes of its ancestors.
                self.ancestry.blamed.discard(name)

    def _node_gone(self, name: str) -> None:
        node = self.nodes[name]
        node.standing = Standing.AWAY
        node.instance = None
        node.peeked = None
        node.failed_at_s = None
        self.space.gone(name)
        self.slowness.gone(name)
        if self.waiting_since_s is None:
            self.waiting_since_s = self.now_s

    # Going on

    def _go_on(self) -> list[Effect]:
        """Leave lost nodes behind, let returned ones in, heal stale ones, as far as it goes now."""
        if self.record is None or self.phase in (Phase.TAKING, Phase.RELEASING, Phase.ENDED):
            return []
        look = self._look_at_ancestors()
        if self.proposal is not None or self.paused:
            return look
        if self.freezing.stage is Stage.FREEZING:
            return [*look, *self._watch_freeze()]
        effects = [*look, *self._give_up_heal()]
        change = self._change_membership()
        if change is not None:
            return [*effects, change]
        effects += self._let_in()
        self._end_merges()
        return [*effects, *self._freeze(), *self._begin_heal()]

    def _change_membership(self) -> Effect | None:
        """Propose a membership without the nodes that are lost, where that is due and allowed.

        It takes the healed node in as well, and out a snapshot that is withdrawn or removed.
        """
        assert self.record is not None
        membership = self.record.membership
        lost = {name for name in membership.all_in_sync() if self._is_lost(name)}
        if self.retry_at_s is not None:
            return None
        if not lost or not self._is_due(lost):
            lost = set()
        held = self.blocking | (lost if self.freezing.stage is Stage.STORING else set())
        self.too_slow = None if lost else self._too_slow()
        slow = set() if self.too_slow is None else {self.too_slow}
        if self.storing and not lost & held and not slow:
            return None
        plan = rejoin(membership, self._to_take_in(), lost | slow, self.emptied)
        withdraws = self._withdraws(lost)
        of_now = self.record
        after = self._withdrawn(of_now) if withdraws else self._without_removed(of_now)
        if isinstance(plan, Change):
            changed = plan.membership
            after = replace(after, generation=changed.generation, stale=changed.stale)
        if after is self.record:
            return None
        self.proposal = after
        return ChangeMembership(self.record, after)

    def _too_slow(self) -> str | None:
        """Return a node that is not worth waiting for: all others of its sets are well."""
        assert self.record is not None
        if self.phase is not Phase.SERVING:
            return None
        well = {name for name in self._in_sync_names() - self.levelling if self._is_well(name)}
        name = self.slowness.too_slow(well, self.now_s)
        membership = self.record.membership
        sets = membership.in_sync_sets()
        others_are_well = all(of_set - {name} <= well for of_set in sets if name in of_set)
        return name if others_are_well else None

    # The record changes

    def _on_changed(self, record: ImageRecord) -> list[Effect]:
        assert self.proposal is not None, "one change at a time"
        assert record.membership == self.proposal.membership, "it is the one that was proposed"
        assert record.layers == self.proposal.layers, "with its layers"
        assert self.record is not None
        change = self.freezing.change or self.freezing.withdraws
        is_made = change is not None and change.is_between(self.record, record)
        self.record, self.proposal, self.undecided = record, None, False
        if is_made and self.freezing.withdraws is not None:
            # It was given up. The engine goes by the former layers until it is withdrawn.
            self.retry_at_s = None
            return self._go_on()
        self.freezing.withdraws = None
        if is_made:
            self.freezing.store(self.now_s)
        self._on_taken_in(record)
        in_sync = record.membership.all_in_sync()
        if self.too_slow is not None:
            self.slowness.left_behind(self.too_slow, self.now_s)
            self.too_slow = None
        self.blocking &= in_sync
        self.emptied = {name for name in self.emptied if name in in_sync or not self._is_told(name)}
        self.ancestry.blamed &= self.emptied
        self.levelling &= in_sync
        for name, node in self.nodes.items():
            if name not in in_sync:
                node.failed_at_s = None
                node.served_as = None
                if node.standing not in (Standing.AWAY, Standing.HEALING):
                    node.standing = Standing.WAITING
        self.storing = self.phase in (Phase.SERVING, Phase.CLOSING)
        self.trouble = ""
        return [Reconfigure(record), *self._removed(record), *self._go_on()]

    def _on_delayed(self, why: str, maybe_taken: bool) -> list[Effect]:
        """Keep a proposal that etcd may have taken; forget another one and decide anew later."""
        self.retry_at_s = self.now_s + RETRY_S
        what = self.freezing.awaited if self.freezing.holds else "a change of membership"
        self.trouble = f"{what} waits: {why}"
        self.undecided = self.undecided or maybe_taken
        if self.undecided:
            return []
        return [*self._drop_proposal(why), *self._go_on()]

    def _on_refused(self, why: str) -> list[Effect]:
        """Clones begin on a snapshot that was to go: it stays, and all else is proposed anew."""
        assert self.record is not None
        if self.proposal is None:
            return []
        undecided, self.undecided, self.retry_at_s = self.undecided, False, None
        told = self._drop_proposal(why)
        if not undecided:
            return [*told, *self._go_on()]
        # An earlier request may come late, when the clones are gone: it must find another record.
        self.proposal = replace(self.record, generation=self.record.generation + 1)
        return [*told, ChangeMembership(self.record, self.proposal)]

    def _drop_proposal(self, why: str) -> list[Effect]:
        """Forget a proposal that etcd surely has nothing of; tell who waits for what was in it."""
        told: list[Effect] = []
        if self.freezing.stage is Stage.CHANGING:
            told = self._give_up_layers(why, maybe_taken=False)
        if self._proposes_removal:
            told += self._give_up_removal(why, unknown=False)
        self._forget_withdrawal()
        self.proposal = self.too_slow = None
        return told

    def _forget_withdrawal(self) -> None:
        """What was to be withdrawn surely did not come to etcd, unless the record has it."""
        assert self.record is not None and self.proposal is not None
        change = self.freezing.withdraws
        if change is not None and change.is_between(self.record, self.proposal):
            self.freezing.withdraws = None

    def _on_tick(self) -> list[Effect]:
        if self.phase is Phase.ENDED:
            return []
        late = self.freezing.look(self.missing(), self.levelling, self.now_s)
        told = self._give_up_layers(late) if late else []
        return [*told, *self._ask_emptied(), *self._ask_again(), *self._on_time()]

    def _on_time(self) -> list[Effect]:
        self.slowness.look(self.now_s)
        if self.record is not None:
            self.space.look(self.record.membership, self.now_s)
        if self.retry_at_s is not None and self.now_s >= self.retry_at_s:
            self.retry_at_s = None
            if self.record is not None and self.proposal is not None:
                # The same proposal again: found in etcd as our own, it counts as taken.
                return [ChangeMembership(self.record, self.proposal)]
            going_on = self._go_on()
            if self.proposal is None:
                self.trouble = ""
            return going_on
        for name, node in self.nodes.items():
            if node.failed_at_s is not None and not self._is_failing(node):
                # It does what it is asked again, or it would have failed since.
                node.failed_at_s = None
                if node.standing is Standing.UP:
                    self.blocking.discard(name)
        if self.phase is Phase.SERVING:
            if not any(map(self._is_lost, self._in_sync_names())):
                self.waiting_since_s = None
            elif self.waiting_since_s is None:
                # It was lost before a change took it in.
                self.waiting_since_s = self.now_s
        opening = self.phase in (Phase.GATHERING, Phase.JOINING)
        if opening and self.now_s - self.opened_s > OPEN_LIMIT_S:
            away = sorted(n for n in self.nodes if self.nodes[n].standing is Standing.AWAY)
            nodes = ", ".join(away) or "its nodes"
            reason = f"waited {OPEN_LIMIT_S:.0f} s for {nodes}: too few replicas in sync are there"
            older = sorted(self.emptied & self._in_sync_names())
            if older:
                # Below its quorum a set keeps them, and they have nothing to be opened from.
                reason += f"; what {', '.join(older)} holds is older than what was answered"
            reason += f"; {self.trouble}" if self.trouble else ""
            return self._give_up(reason)
        return self._go_on()

    def without_space(self) -> frozenset[int]:
        """Return the replica sets whose writes wait for room, and not for just a moment."""
        return self.space.without(self.now_s)

    def stalled_by(self) -> list[str]:
        """Return the nodes without which some replica set answers no write."""
        if self.record is None:
            return []
        plan = lose(self.record.membership, self.missing(), self.emptied)
        if isinstance(plan, Ready):
            return []
        return sorted({node for nodes in plan.waiting.values() for node in nodes})

    def _check(self) -> None:
        """Assert what holds after every step."""
        if self.record is None:
            assert self.phase in (Phase.TAKING, Phase.ENDED), "no record, no image"
            return
        assert self.record.holder == self.holder, "we change only what we hold"
        if self.proposal is not None:
            assert self.proposal.generation == self.record.generation + 1, "one step at a time"
            assert self.proposal.epoch == self.record.epoch, "epochs change with the lease only"
        stage = self.freezing.stage
        if stage is not Stage.NONE:
            assert self.phase in (Phase.SERVING, Phase.CLOSING), "layers change of what serves"
            assert (stage is Stage.CHANGING) <= (self.proposal is not None), "and is asked for"
            assert stage is not Stage.STORING or self.storing, "then stored"


def closing_waits_for(holder: Holder) -> str:
    """Say what an image that is being closed waits for, as the end of a sentence."""
    nodes = holder.stalled_by() if holder.phase is Phase.CLOSING else []
    if nodes:
        return f"for {', '.join(nodes)}, without which its last writes cannot be flushed"
    if holder.phase is Phase.CLOSING:
        return "for its last writes to be flushed"
    return "for etcd to take its lease back"
