//! Heal: a node that was left behind is made level while clients write, until policy can take it in.
//!
//! | stage | what goes on | who gets a change of the healed sets |
//! | --- | --- | --- |
//! | `Entering` | the node stores the record and is given a session | nodes in sync |
//! | `Listing` | what it missed is asked of those in sync, its dirty map of itself | nodes in sync; the shard goes on the list |
//! | `Copying` | listed shards are compared and copied (`heal_shards`) | also the node, where the shard is level |
//! | `Flushing` | the list is empty: all sync | the node too, always |
//! | `Marking` | its dirty entries of before go | the node too |
//! | `Settled` | `Event::Healed` is told: policy has its record take the node in | the node too |
//!
//! Invariants, asserted here and in `heal_shards`:
//! - a shard counts as level only while every change to it that was begun goes to the node as well, and
//!   is answered only when the node has answered it: from the end of its pause on. Any other change puts
//!   the shard on the list, or finds it there, or waits for the pause to end;
//! - an ended heal leaves nothing behind that a later one would trust: that one lists everything anew;
//! - once `Healed` is told, no change is answered that the node lacks until policy has said what became
//!   of it: the record that takes the node in may be durable at any moment.
//!
//! A node that is lost before `Settled` ends the heal, and nobody waits for it any more. A source that is
//! lost has what was under way begun again with those that are left; each of them knows all that the
//! node missed, because whoever joins takes over tags along with content (`compare`). When the last one
//! is lost the heal ends. Where that happens to a settled node, those who come back wait until it is
//! known whether it is in sync: if so it is the one that they are made equal to.

use super::asks::Asks;
use super::background::{Background, Pacing};
use super::copier::Copier;
use super::heal_shards::{Ask, Job};
use super::image::{ImageIo, Phase, Purpose, ReplicaState, RequestKind};
use super::pacing::{Limits, Sort};
use super::shard_set::ShardSet;
use super::{Event, Instance, NodeIndex, NodeMask};
use crate::rules::{Rule, broken};
use crate::wire::Status;

/// What policy allows the heals, and the levelling, of all images of a gateway together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HealLimits {
    /// 0: as fast as it goes.
    pub bytes_per_second: u64,
    /// Each image has one at least; beside clients one is all it has.
    pub shards_at_once: usize,
    /// The part of the time that they may have something under way while clients ask for something.
    pub share_percent: u64,
}

impl HealLimits {
    /// Begins an undertaking of an image by these limits.
    pub(super) fn join(&self, background: &Background, image: u32) -> Pacing {
        let (bytes_per_second, share_percent) = (self.bytes_per_second, self.share_percent);
        background.join(image, Sort::Copies, Limits { bytes_per_second, share_percent })
    }
}

/// A heal as policy orders it.
#[derive(Clone, Debug)]
pub struct HealSpec {
    pub node: NodeIndex,
    /// Of the node's last `Peeked`.
    pub serial: u64,
    /// Given back in its events.
    pub attempt: u64,
    /// Replica sets, and the generation that the node was left behind at in each.
    pub sets: Vec<(usize, u64)>,
    pub limits: HealLimits,
}

/// How far a heal is, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealState {
    pub node: String,
    pub attempt: u64,
    pub stage: String,
    pub shards_left: u64,
    pub shards_done: u64,
    pub copied_bytes: u64,
    pub left_bytes: u64,
    pub bad_blocks: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Stage {
    Entering,
    Listing,
    Copying,
    Flushing,
    Marking,
    Settled,
}

/// The heal under way.
pub(super) struct Heal {
    pub spec: HealSpec,
    pub instance: Option<Instance>,
    pub stage: Stage,
    pub asks: Asks<Ask>,
    pub copier: Copier,
    pub jobs: Vec<Job>,
    /// Shards that are not known to be level.
    pub list: ShardSet,
    /// The node's own dirty map as it came, and up to where it was marked level.
    pub own: ShardSet,
    pub marked_to: Option<u64>,
    /// Its peers were told its flush number, where it begins anew.
    pub number_told: bool,
    pub shards_done: u64,
}

impl Heal {
    pub fn node(&self) -> NodeMask {
        NodeMask::one(self.spec.node)
    }

    pub fn heals(&self, set: usize) -> bool {
        self.spec.sets.iter().any(|(healed, _)| *healed == set)
    }

    fn is_level(&self, shard: u64) -> bool {
        self.stage >= Stage::Copying
            && !self.list.has(shard)
            && self.jobs.iter().all(|job| job.shard != shard)
    }
}

impl ImageIo {
    /// Begins to heal a stale node that waits, or is up in other sets. Where that is not so (any more)
    /// the heal fails at once.
    pub fn heal(&mut self, spec: HealSpec) {
        let node = spec.node;
        let known = usize::from(node) < self.replicas.len();
        let stale = |set: &usize| {
            let set = self.sets.get(*set);
            set.is_some_and(|set| set.members.has(node) && !set.in_sync.has(node))
        };
        let fits = !spec.sets.is_empty() && spec.sets.iter().all(|(set, _)| stale(set));
        assert!(known && fits, "a heal is of sets that the node is stale in");
        let waits = matches!(self.replica(node).state, ReplicaState::Waiting)
            && self.replica(node).peeks == spec.serial;
        let is_up = self.replica(node).state == ReplicaState::Up;
        if self.phase != Phase::Running || self.heal.is_some() || !(waits || is_up) {
            let attempt = spec.attempt;
            return self.event(Event::HealFailed { node, attempt, status: Status::NoSession });
        }
        self.remembers_anew(node);
        let asks = Asks::new(self.next_serial());
        let pacing = spec.limits.join(&self.background, self.spec.channel);
        self.heal = Some(Heal {
            instance: self.replica(node).instance,
            stage: Stage::Entering,
            asks,
            copier: Copier::paced(pacing, self.routes.clone()),
            jobs: Vec::new(),
            list: ShardSet::default(),
            own: ShardSet::default(),
            marked_to: None,
            number_told: false,
            shards_done: 0,
            spec,
        });
        if is_up {
            return self.begin_listing();
        }
        self.replica(node).state = ReplicaState::Joining { stored: false };
        self.replica(node).purpose = Purpose::Heal;
        self.send_record(NodeMask::one(node));
    }

    /// Policy gives the heal up, if it is still that one: the record does not take the node in.
    pub fn end_heal(&mut self, attempt: u64) {
        if self.heal.as_ref().is_some_and(|heal| heal.spec.attempt == attempt) {
            self.drop_heal();
        }
    }

    /// Whether something goes on that `pace` drives.
    pub fn wants_pace(&self) -> bool {
        self.heal.is_some() || self.is_levelling() || self.is_scrubbing() || self.is_freezing()
    }

    /// How far the heal under way is.
    pub fn heal_state(&self) -> Option<HealState> {
        let heal = self.heal.as_ref()?;
        let shards_left = heal.list.len() + heal.jobs.len() as u64;
        let copied_bytes = heal.copier.copied_bytes;
        let per_shard = match heal.shards_done {
            0 => u64::from(self.spec.geometry.shard_bytes),
            done => copied_bytes / done,
        };
        Some(HealState {
            node: self.replicas[usize::from(heal.spec.node)].name.clone(),
            attempt: heal.spec.attempt,
            stage: format!("{:?}", heal.stage).to_lowercase(),
            shards_left,
            shards_done: heal.shards_done,
            copied_bytes,
            left_bytes: shards_left.saturating_mul(per_shard),
            bad_blocks: heal.copier.bad_blocks,
        })
    }

    /// Who gets a change of `shard` beside the nodes in sync of `set`; one that does not get it has the
    /// shard put on its list.
    pub(super) fn healing_of(&mut self, set: u32, shard: u64) -> NodeMask {
        let Some(heal) = self.heal.as_mut().filter(|heal| heal.heals(set as usize)) else {
            return NodeMask::EMPTY;
        };
        if heal.is_level(shard) {
            return heal.node();
        }
        assert!(
            heal.stage <= Stage::Copying,
            "from the last shard on every change goes to the node"
        );
        if heal.stage == Stage::Listing && !broken(Rule::WritesAreListed) {
            heal.list.insert(shard);
        }
        NodeMask::EMPTY
    }

    /// Whether each healed set has a node in sync that is whole. One at least was all the time that the
    /// heal goes on, or what is level with it would not be with the others.
    pub(super) fn has_sources(&self) -> bool {
        let up = self.whole();
        if broken(Rule::HealNeedsItsSources) {
            return true;
        }
        self.heal.as_ref().is_some_and(|heal| {
            heal.spec.sets.iter().all(|(set, _)| !self.sets[*set].in_sync.and(up).is_empty())
        })
    }

    /// Whether a healed node's membership in this set is being decided, while no node of a set of its was up
    /// all the time: the others must not agree on anything without it, should it turn out to be in sync.
    pub(super) fn is_undecided(&self, set: usize) -> bool {
        let heal = self.heal.as_ref().filter(|heal| heal.stage == Stage::Settled);
        heal.is_some_and(|heal| heal.spec.sets.iter().any(|(healed, _)| *healed == set))
            && !self.has_sources()
    }

    /// Who takes part in clients' flushes beside the nodes in sync.
    pub(super) fn healing_of_flush(&self) -> NodeMask {
        let heal = self.heal.as_ref().filter(|heal| heal.stage >= Stage::Flushing);
        heal.map_or(NodeMask::EMPTY, Heal::node)
    }

    /// Whose answers are waited for, where they were asked for, although it is not in sync.
    pub(super) fn healing(&self) -> NodeMask {
        let heal = self.heal.as_ref().filter(|_| !broken(Rule::HealedNodeAnswers));
        heal.map_or(NodeMask::EMPTY, Heal::node)
    }

    /// The node that is being healed, where nothing that it had counts.
    pub(super) fn healed_from_nothing(&self) -> NodeMask {
        let blank = |heal: &&Heal| heal.spec.sets.iter().any(|(_, since)| *since == 0);
        self.heal.as_ref().filter(blank).map_or(NodeMask::EMPTY, Heal::node)
    }

    pub(super) fn is_entering_heal(&self, node: NodeIndex) -> bool {
        let replica = &self.replicas[usize::from(node)];
        matches!(replica.state, ReplicaState::Joining { .. }) && replica.purpose == Purpose::Heal
    }

    /// Whether `node` is asked for a part only because it is being healed, and may still be dropped.
    pub(super) fn is_only_healed_by(&self, part: usize, node: NodeIndex) -> bool {
        let in_sync = match self.parts[part].kind {
            RequestKind::Flush => self.in_sync_anywhere(),
            _ => self.sets[self.parts[part].set as usize].in_sync,
        };
        let heal = self.heal.as_ref();
        let early = heal.is_some_and(|h| h.spec.node == node && h.stage < Stage::Settled);
        early && !in_sync.has(node)
    }

    /// The connection to `node`, a source or the healed one, is gone, or policy has let go of it.
    pub(super) fn heal_without(&mut self, node: NodeIndex, status: Status) {
        let Some(heal) = &self.heal else { return };
        match heal.spec.node == node {
            true => self.fail_heal_unless_settled(status),
            false => self.restart_heal(),
        }
    }

    /// Settled, the node may have been taken in: its absence is that of a node in sync, until policy
    /// has said what became of it.
    pub(super) fn fail_heal_unless_settled(&mut self, status: Status) {
        if self.heal.as_ref().is_some_and(|heal| heal.stage < Stage::Settled) {
            self.fail_heal(status);
        } else if broken(Rule::LostHealedIsAwaited) {
            self.drop_heal();
        }
    }

    /// The heal ends; the node is as stale as before.
    pub(super) fn fail_heal(&mut self, status: Status) {
        let Some(heal) = &self.heal else { return };
        assert!(heal.stage < Stage::Settled, "policy decides about a healed node");
        let (node, attempt) = (heal.spec.node, heal.spec.attempt);
        self.drop_heal();
        self.event(Event::HealFailed { node, attempt, status });
    }

    fn drop_heal(&mut self) {
        self.release_jobs();
        let Some(heal) = self.heal.take() else { return };
        let node = heal.spec.node;
        // A later heal lists anew, and sends anew what is in flight then.
        for (_, part) in self.parts.iter_mut().filter(|(_, part)| part.is_change()) {
            if !self.sets[part.set as usize].in_sync.has(node) {
                part.wanted = part.wanted.without(heal.node());
                part.waiting = part.waiting.without(heal.node());
            }
        }
        if self.replica(node).state == ReplicaState::Healing || self.is_entering_heal(node) {
            self.replica(node).state = ReplicaState::Waiting;
            self.replica(node).blocking_told = false;
        }
        self.judge_memory();
        self.complete_answered();
    }

    /// The sets are those of a new record: the heal may be over, or have other sources.
    pub(super) fn heal_reconfigured(&mut self) {
        let Some(heal) = &self.heal else { return };
        let node = heal.spec.node;
        let taken = heal.spec.sets.iter().filter(|(set, _)| self.sets[*set].in_sync.has(node));
        match taken.count() {
            0 => self.restart_heal(),
            taken => {
                assert_eq!(taken, heal.spec.sets.len(), "a healed node is taken in everywhere");
                assert_eq!(heal.stage, Stage::Settled, "only what is level is taken in");
                self.heal_taken_in();
            }
        }
    }

    fn heal_taken_in(&mut self) {
        let Some(heal) = self.heal.take() else { return };
        // Soon its peers hear of its flush number, and it clears what it was given.
        self.flush_soon();
        let replica = self.replica(heal.spec.node);
        // Also where its connection broke meanwhile: it has all that was answered.
        replica.served = heal.instance;
        if replica.state == ReplicaState::Healing {
            replica.state = ReplicaState::Up;
            replica.blocking_told = false;
        }
        // It may have what is rotten on all the others.
        self.repairs_have_hope();
    }
}
