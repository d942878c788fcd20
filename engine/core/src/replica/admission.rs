//! Admission of nodes whose content may differ: the dirty maps of all participants name the shards, then
//! the nodes are up, doubtful in these shards until `level` has made them equal.
//!
//! A participant that is lost meanwhile, or a joining node, ends the attempt; policy starts another.
//!
//! A replica set is *founded* where one that stayed up is in sync, or all that are in sync take part: one that
//! is away may have answered what those here have lost. A node may join for one of its sets while another is
//! not founded. There it is doubtful in every shard, and is asked for nothing; when the others have come, all
//! dirty maps are asked for once more.

use super::asks::Asks;
use super::image::{ImageIo, Phase, Purpose, Replica, ReplicaState};
use super::replies::BadReply;
use super::shard_set::ShardSet;
use super::{Event, NodeIndex, NodeMask};
use crate::rules::{Rule, broken};
use crate::wire::messages::{DIRTY_ENTRIES_MAX, DirtyFrom, DirtyReply, Head};
use crate::wire::{Frame, Status, kind};
use bytes::Bytes;

/// One attempt to let `joiners` in.
pub(super) struct Admission {
    participants: NodeMask,
    joiners: NodeMask,
    /// Of each set, who is asked what it may lack: those that join, or were let in before others came.
    founded: Vec<NodeMask>,
    asks: Asks<u64>,
    dirty: ShardSet,
}

impl ImageIo {
    /// Asks for the dirty maps once every node that is being admitted has its session.
    pub(super) fn start_admission(&mut self) {
        let joining = |replica: &Replica| {
            matches!(replica.state, ReplicaState::Joining { .. })
                && replica.purpose != Purpose::Heal
        };
        if self.admission.is_some() || self.replicas.iter().any(joining) {
            return;
        }
        let joiners = self.nodes_in(|state| state == ReplicaState::Listing);
        let participants = joiners.with(self.up());
        let sets = 0..self.sets.len();
        let founded: Vec<NodeMask> =
            sets.map(|set| self.founded(set, participants, joiners)).collect();
        if joiners.is_empty() && founded.iter().all(|mask| mask.is_empty()) {
            return;
        }
        // A new holder begins with every node in sync: each has to know of it.
        let absent = self.in_sync_anywhere().without(participants).first();
        let absent = absent.filter(|_| self.phase == Phase::Opening);
        if let Some(absent) = absent.filter(|_| !broken(Rule::AllInSyncLevelled)) {
            return self.end_admission(absent, Status::Io, false);
        }
        let asks = Asks::new(self.next_serial());
        let dirty = ShardSet::default();
        self.admission = Some(Admission { participants, joiners, founded, asks, dirty });
        participants.iter().for_each(|node| self.ask_dirty(node, 0));
    }

    /// Who can be told from level in a set, of those that join it or are unfounded there.
    fn founded(&self, index: usize, participants: NodeMask, joiners: NodeMask) -> NodeMask {
        let set = &self.sets[index];
        let stayed = set.in_sync.and(self.up()).without(set.unfounded);
        let complete = set.in_sync.without(participants).is_empty() && !self.is_undecided(index);
        match !stayed.is_empty() || complete || broken(Rule::AllInSyncLevelled) {
            true => set.in_sync.and(joiners.with(set.unfounded).and(participants)),
            false => NodeMask::EMPTY,
        }
    }

    /// Changes in flight that a former instance had answered may be lost with its memory, and be on nobody
    /// that the new one is levelled with: it is sent them once more, when it is level there. From the
    /// moment that it is known to be another: a record that it stores may be all that an answer waits for.
    pub(super) fn ask_again(&mut self, joiners: NodeMask) {
        if broken(Rule::UnansweredAskedAgain) {
            return;
        }
        for (_, part) in self.parts.iter_mut() {
            if part.is_change() {
                let again = joiners.and(self.sets[part.set as usize].in_sync);
                part.waiting = part.waiting.with(again);
                part.sent = part.sent.without(again);
            }
        }
    }

    /// Nodes that are being admitted and do not resume.
    pub(super) fn joining(&self) -> NodeMask {
        let joins = |replica: &Replica| match replica.state {
            ReplicaState::Joining { .. } => replica.purpose == Purpose::Level,
            ReplicaState::Listing => true,
            _ => false,
        };
        let joining = self.replicas.iter().enumerate().filter(|(_, replica)| joins(replica));
        joining
            .fold(NodeMask::EMPTY, |mask, (index, _)| mask.with(NodeMask::one(index as NodeIndex)))
    }

    /// The admission under way fails, because of `node`: all that are being admitted wait again. Those that
    /// are up are asked again with the next tick.
    ///
    /// Also before the dirty maps are asked for: those that are left were chosen because of who else was
    /// there.
    fn end_admission(&mut self, node: NodeIndex, status: Status, joined: bool) {
        self.admission = None;
        let joining = self.joining();
        for joiner in joining.iter() {
            self.replica(joiner).state = ReplicaState::Waiting;
        }
        if joined || !joining.is_empty() {
            self.event(Event::AdmitFailed { node, status });
        }
        self.go_on_levelling();
    }

    /// `node`, which took part in what goes on or joined, is gone: an admission under way fails.
    pub(super) fn end_admission_without(&mut self, node: NodeIndex, status: Status, joined: bool) {
        if joined || self.admission.is_some() || !self.joining().is_empty() {
            self.end_admission(node, status, joined);
        }
    }

    pub(super) fn is_joining(&self, node: NodeIndex) -> bool {
        self.joining().has(node)
    }

    fn ask_dirty(&mut self, node: NodeIndex, from_shard: u64) {
        let head = DirtyFrom { epoch: self.spec.epoch, from_shard };
        let Some(admission) = &mut self.admission else { return };
        let tag = admission.asks.add(node, from_shard);
        let node = NodeMask::one(node);
        self.send(node, kind::DIRTY, 0, tag, &Bytes::new(), |out| head.put(out));
    }

    /// Takes an answer to one of the admission's own frames.
    pub(super) fn take_dirty(&mut self, node: NodeIndex, frame: Frame) -> Result<(), BadReply> {
        let Some(admission) = &mut self.admission else { return Ok(()) };
        let Some(from_shard) = admission.asks.take(node, frame.tag) else { return Ok(()) };
        if frame.status != Status::Ok {
            if self.joining().is_empty() {
                self.has_failed(node, frame.status);
            }
            self.end_admission(node, frame.status, false);
            return Ok(());
        }
        let reply = DirtyReply::take(frame.head).map_err(|_| BadReply("malformed dirty map"))?;
        let shards = || reply.entries.iter().map(|entry| entry.shard);
        // In order and not before what was asked for, or there would be no end to asking on.
        if reply.entries.len() > DIRTY_ENTRIES_MAX
            || shards().next().is_some_and(|first| first < from_shard)
            || !shards().is_sorted_by(|a, b| a < b)
        {
            return Err(BadReply("a dirty map out of order"));
        }
        // Beyond the image's end too: what a shrink has cut off comes back with growing.
        shards().for_each(|shard| _ = admission.dirty.insert(shard));
        let next = reply.entries.last().and_then(|last| last.shard.checked_add(1));
        match next.filter(|_| reply.more) {
            Some(next) => self.ask_dirty(node, next),
            None if admission.asks.is_empty() => self.finish_admission(),
            None => {}
        }
        Ok(())
    }

    fn finish_admission(&mut self) {
        let Some(admission) = self.admission.take() else { return };
        assert!(admission.joiners.without(admission.participants).is_empty());
        self.doubt(&admission.founded, &admission.dirty);
        let mut serving = admission.joiners;
        for (set, founded) in self.sets.iter_mut().zip(&admission.founded) {
            let joined = set.in_sync.and(admission.joiners);
            set.unfounded = set.unfounded.with(joined).without(*founded);
            serving = serving.with(*founded);
        }
        self.forget_demands();
        self.run_if_opening();
        self.take_back_flushes(serving);
        self.go_up(serving);
        if !admission.joiners.is_empty() {
            self.tell_admitted();
        }
        self.go_on_levelling();
        self.start_admission();
    }
}
