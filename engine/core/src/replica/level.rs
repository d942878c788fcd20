//! Levelling at an admission: the return of a restarted node, and reconcile after an unclean end.
//!
//! The dirty maps of all participants name the shards. Per shard the participants' block summaries
//! are compared. Where a member of the replica set is `Up` (it never restarted), its content wins and
//! only the joining nodes are written; else the highest (epoch, sequence) wins, per block. A rotten
//! block never wins: another replica that is as good stands in, and where none is, the joining nodes'
//! block is marked bad. Only blocks that differ are fetched and copied, with their tags. When all are
//! flushed, the entries go, sticky ones too, if all in-sync nodes took part: an entry that went earlier
//! would leave a difference to an absent node that no dirty map names.
//!
//! Writes that arrive meanwhile reach the joining nodes after they are `Up`, in order, so a copy never
//! lands on newer data. A participant that is lost, or a joining node, ends the attempt; policy starts
//! another. In a replica set without a node that is `Up` all in-sync nodes join, or none does: one that
//! is away may have answered what they have lost.

use super::asks::Asks;
use super::compare::Comparison;
use super::copier::{Copier, CopyAsk, CopyStamp};
use super::image::{ImageIo, Purpose, Replica, ReplicaState, RequestKind};
use super::replies::BadReply;
use super::{Event, NodeIndex, NodeMask};
use crate::geometry::{BLOCK_BYTES, LayerId};
use crate::rules::{Rule, broken};
use crate::wire::messages::{DIRTY_ENTRIES_MAX, DirtyFrom, DirtyReply, Flush, Head, Level, Number};
use crate::wire::{Frame, Status, kind};
use bytes::Bytes;
use std::collections::{BTreeSet, VecDeque};

/// Shards compared at once.
const SHARDS_AT_ONCE: usize = 4;

/// What a frame in flight was for.
#[derive(Clone, Debug)]
enum Ask {
    Dirty { from_shard: u64 },
    Copy(CopyAsk),
    Flush,
    Level,
}

/// One attempt to level `joiners` with each other and with those who are up.
pub(super) struct Leveller {
    participants: NodeMask,
    joiners: NodeMask,
    asks: Asks<Ask>,
    dirty: BTreeSet<u64>,
    queue: VecDeque<(LayerId, u64)>,
    copier: Copier,
    stage: Stage,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Comparing,
    Flushing,
    Marking,
}

impl ImageIo {
    /// Starts levelling once every node that is being admitted has its session.
    pub(super) fn start_leveller(&mut self) {
        let joining = |replica: &Replica| {
            matches!(replica.state, ReplicaState::Joining { .. })
                && replica.purpose != Purpose::Heal
        };
        if self.leveller.is_some() || self.replicas.iter().any(joining) {
            return;
        }
        let joiners = self.nodes_in(|state| state == ReplicaState::Levelling);
        if joiners.is_empty() {
            return;
        }
        let up = self.up();
        let participants = joiners.with(up);
        let unfounded = self.sets.iter().find_map(|set| {
            let joins = !set.in_sync.and(joiners).is_empty();
            let founded = !set.in_sync.and(up).is_empty();
            let absent = set.in_sync.without(participants).first();
            absent.filter(|_| joins && !founded)
        });
        let unfounded = unfounded.filter(|_| !broken(Rule::AllInSyncLevelled));
        if let Some(absent) = unfounded.or(self.undecided()) {
            return self.end_admission(absent, Status::Io);
        }
        let asks = Asks::new(self.next_serial());
        self.leveller = Some(Leveller {
            participants,
            joiners,
            asks,
            dirty: BTreeSet::new(),
            queue: VecDeque::new(),
            copier: Copier::default(),
            stage: Stage::Comparing,
        });
        participants.iter().for_each(|node| self.ask_dirty(node, 0));
    }

    /// Changes in flight that a former instance of a joiner had answered may be lost with its memory, and
    /// be on nobody that it is levelled with yet: it is sent them once more, when it is up. From the
    /// beginning of its admission on, or the record that it stores would let them be answered.
    pub(super) fn ask_again(&mut self, joiners: NodeMask) {
        if broken(Rule::UnansweredAskedAgain) {
            return;
        }
        for (_, part) in self.parts.iter_mut() {
            if matches!(part.kind, RequestKind::Write | RequestKind::Zero) {
                let again = joiners.and(self.sets[part.set as usize].in_sync);
                part.waiting = part.waiting.with(again);
                part.sent = part.sent.without(again);
            }
        }
    }

    /// Nodes that are being admitted and do not resume.
    fn joining(&self) -> NodeMask {
        let joins = |replica: &Replica| match replica.state {
            ReplicaState::Joining { .. } => replica.purpose == Purpose::Level,
            ReplicaState::Levelling => true,
            _ => false,
        };
        let joining = self.replicas.iter().enumerate().filter(|(_, replica)| joins(replica));
        joining
            .fold(NodeMask::EMPTY, |mask, (index, _)| mask.with(NodeMask::one(index as NodeIndex)))
    }

    /// The admission under way fails, because of `node`: all that are being admitted wait again.
    ///
    /// Also before levelling has begun: those that are left were chosen because of who else was there.
    fn end_admission(&mut self, node: NodeIndex, status: Status) {
        self.leveller = None;
        for joiner in self.joining().iter() {
            self.replica(joiner).state = ReplicaState::Waiting;
        }
        self.event(Event::AdmitFailed { node, status });
    }

    /// `node`, which took part in what goes on or joined, is gone: an admission under way fails.
    pub(super) fn end_admission_without(&mut self, node: NodeIndex, status: Status, joined: bool) {
        if joined || !self.joining().is_empty() {
            self.end_admission(node, status);
        }
    }

    pub(super) fn is_joining(&self, node: NodeIndex) -> bool {
        self.joining().has(node)
    }

    fn ask(
        &mut self,
        nodes: NodeMask,
        ask: Ask,
        frame_kind: u8,
        payload: &Bytes,
        put: impl Fn(&mut bytes::BytesMut),
    ) {
        for node in nodes.iter() {
            let Some(leveller) = &mut self.leveller else { return };
            let tag = leveller.asks.add(node, ask.clone());
            self.send(NodeMask::one(node), frame_kind, 0, tag, payload, &put);
        }
    }

    fn ask_dirty(&mut self, node: NodeIndex, from_shard: u64) {
        let epoch = self.spec.epoch;
        let head = DirtyFrom { epoch, from_shard };
        self.ask(
            NodeMask::one(node),
            Ask::Dirty { from_shard },
            kind::DIRTY,
            &Bytes::new(),
            |out| head.put(out),
        );
    }

    pub(super) fn take_level(&mut self, node: NodeIndex, frame: Frame) -> Result<(), BadReply> {
        let stamp = self.copy_stamp();
        let Some(leveller) = &mut self.leveller else { return Ok(()) };
        let Some(ask) = leveller.asks.take(node, frame.tag) else { return Ok(()) };
        match ask {
            Ask::Copy(ask) => {
                let taken = leveller.copier.take(node, ask, frame, stamp)?;
                if let Some(status) = taken.failed {
                    self.end_admission(node, status);
                    return Ok(());
                }
                if let Some((shard, block)) = taken.rotten {
                    self.found_rot(node, shard, block);
                }
                self.send_level_orders();
            }
            _ if frame.status != Status::Ok => {
                self.end_admission(node, frame.status);
                return Ok(());
            }
            Ask::Dirty { from_shard } => self.take_dirty(node, from_shard, frame)?,
            Ask::Flush => {
                let number =
                    Number::take(frame.head).map_err(|_| BadReply("flush without number"))?;
                self.replica(node).flush_number = number.0;
            }
            Ask::Level => {}
        }
        self.go_on();
        Ok(())
    }

    fn send_level_orders(&mut self) {
        while let Some(order) = self.leveller.as_mut().and_then(|l| l.copier.orders.pop_front()) {
            let (ask, kind) = (Ask::Copy(order.ask.clone()), order.kind());
            self.ask(order.nodes, ask, kind, &order.payload, |out| order.put(out));
        }
    }

    pub(super) fn copy_stamp(&self) -> CopyStamp {
        CopyStamp {
            epoch: self.spec.epoch,
            generation: self.spec.generation,
            blocks_per_shard: self.spec.geometry.shard_bytes / BLOCK_BYTES,
        }
    }

    fn take_dirty(
        &mut self,
        node: NodeIndex,
        from_shard: u64,
        frame: Frame,
    ) -> Result<(), BadReply> {
        let reply = DirtyReply::take(frame.head).map_err(|_| BadReply("malformed dirty map"))?;
        let shards = || reply.entries.iter().map(|entry| entry.shard);
        // In order and not before what was asked for, or there would be no end to asking on.
        if reply.entries.len() > DIRTY_ENTRIES_MAX
            || shards().next().is_some_and(|first| first < from_shard)
            || !shards().is_sorted_by(|a, b| a < b)
        {
            return Err(BadReply("a dirty map out of order"));
        }
        let Some(leveller) = &mut self.leveller else { return Ok(()) };
        leveller.dirty.extend(shards());
        let next = reply.entries.last().and_then(|last| last.shard.checked_add(1));
        if let Some(next) = next.filter(|_| reply.more) {
            self.ask_dirty(node, next);
            return Ok(());
        }
        if leveller.asks.is_empty() {
            // Beyond the image's end too: what a shrink has cut off comes back with growing.
            for shard in &leveller.dirty {
                leveller.queue.extend(self.spec.layers.iter().map(|layer| (*layer, *shard)));
            }
        }
        Ok(())
    }

    /// Starts what may start; with nothing left, flushes, marks, and lets the joiners up.
    fn go_on(&mut self) {
        while let Some(leveller) = &mut self.leveller {
            if leveller.copier.jobs() >= SHARDS_AT_ONCE {
                return;
            }
            let Some((layer, shard)) = leveller.queue.pop_front() else { break };
            self.start_job(layer, shard);
        }
        let Some(leveller) = &mut self.leveller else { return };
        if !leveller.asks.is_empty() || leveller.copier.jobs() > 0 {
            return;
        }
        if leveller.dirty.is_empty() {
            return self.finish_levelling();
        }
        match leveller.stage {
            Stage::Comparing => {
                leveller.stage = Stage::Flushing;
                if broken(Rule::LevelIsDurable) {
                    return self.go_on();
                }
                self.flush_participants();
            }
            Stage::Flushing => {
                leveller.stage = Stage::Marking;
                let participants = leveller.participants;
                if self.in_sync_anywhere().without(participants).is_empty() {
                    self.clear_former_epochs(participants);
                } else if let Some(leveller) = &mut self.leveller {
                    leveller.dirty.clear();
                }
                self.go_on();
            }
            Stage::Marking => self.mark_level(),
        }
    }

    fn start_job(&mut self, layer: LayerId, shard: u64) {
        let stamp = self.copy_stamp();
        let set = &self.sets[self.spec.geometry.replica_set_of(shard) as usize];
        let Some(leveller) = &mut self.leveller else { return };
        let members = set.in_sync.and(leveller.participants);
        let joiners = members.and(leveller.joiners);
        if joiners.is_empty() || members.0.count_ones() < 2 {
            return;
        }
        let compared = Comparison::new(members.without(joiners), joiners);
        leveller.copier.start((layer, shard), compared, members, false, stamp);
        self.send_level_orders();
    }

    fn flush_participants(&mut self) {
        let Some(participants) = self.leveller.as_ref().map(|l| l.participants) else { return };
        let flush = Flush {
            epoch: self.spec.epoch,
            generation: self.spec.generation,
            clear_sequence: 0,
            proof: Vec::new(),
        };
        self.ask(participants, Ask::Flush, kind::FLUSH, &Bytes::new(), |out| flush.put(out));
    }

    /// What writes of former epochs and their copies left in the dirty maps goes, and each node learns
    /// the flush numbers of its peers. Before the sticky entries go, so that a store never has neither:
    /// from dirty entries and flush numbers an opener tells a store that lost its disk from a new one.
    fn clear_former_epochs(&mut self, participants: NodeMask) {
        let clear = Flush {
            epoch: self.spec.epoch,
            generation: self.spec.generation,
            clear_sequence: 0,
            proof: self.flush_numbers(participants),
        };
        let cleared = participants.and(self.in_sync_everywhere());
        self.send(cleared, kind::CLEAR, 0, 0, &Bytes::new(), |out| clear.put(out));
    }

    /// Tells all who took part that the shards are level, a bounded number at a time. A node that is stale
    /// in a shard's set was not made level there: it keeps what it knows, for its heal.
    fn mark_level(&mut self) {
        let Some(leveller) = &mut self.leveller else { return };
        let mut shards = Vec::new();
        while let Some(shard) = leveller.dirty.pop_first() {
            shards.push(shard);
            if shards.len() == DIRTY_ENTRIES_MAX {
                break;
            }
        }
        self.levelled_shards += shards.len() as u64;
        let Some(participants) = self.leveller.as_ref().map(|l| l.participants) else { return };
        for node in participants.iter() {
            let geometry = self.spec.geometry;
            let in_sync =
                |shard: &u64| self.sets[geometry.replica_set_of(*shard) as usize].in_sync.has(node);
            let shards = shards.iter().copied().filter(in_sync).collect();
            let level = Level { epoch: self.spec.epoch, shards };
            let node = NodeMask::one(node);
            self.ask(node, Ask::Level, kind::LEVEL, &Bytes::new(), |out| level.put(out));
        }
    }

    fn finish_levelling(&mut self) {
        let Some(leveller) = self.leveller.take() else { return };
        let levelled_shards = std::mem::take(&mut self.levelled_shards);
        self.run_if_opening();
        self.go_up(leveller.joiners);
        let copied_bytes = leveller.copier.copied_bytes;
        self.event(Event::Admitted { levelled_shards, copied_bytes });
        self.start_leveller();
    }
}
