//! Repair: a block that is rotten on a node in sync is made what another node in sync has, while clients
//! read and write.
//!
//! | stage | what goes on | left by |
//! | --- | --- | --- |
//! | `Pausing` | waits for the writes in flight on the blocks | no write is in flight |
//! | `Copying` | layer by layer the blocks are compared, fetched and copied | nothing differs any more |
//! | `Flushing` | the node syncs | it has |
//!
//! A write that the node cannot merge into a rotten block holds its blocks itself: its repair needs no
//! pause, and the node is sent the write again when the repair is over. What the others have by then may
//! already hold the write, which changes nothing: it says the same once more.
//!
//! Invariants:
//! - a block is copied while no write to it is in flight, or while the one that is waits for the copy;
//! - nothing is taken from a node that is doubtful in the shard, nor given to one: levelling comes first;
//! - a node that is lost, a new record, and an ended write end the repairs that rest on them: their answers
//!   are no longer known;
//! - a block is given up (`Event::Unrepairable`) only when every node in sync of its set was asked for it;
//!   a write that needs it fails only when no node has applied it.
//!
//! Where a block is rotten everywhere its reads fail, until it is written as a whole.

use super::asks::Asks;
use super::compare::Comparison;
use super::copier::{Copier, CopyAsk};
use super::image::{ImageIo, Phase, RequestKind};
use super::replies::BadReply;
use super::shard_set::ShardSet;
use super::{Event, IoError, NodeIndex, NodeMask, RotState};
use crate::content::Block;
use crate::geometry::{BLOCK_BYTES, LayerId};
use crate::rules::{Rule, broken};
use crate::wire::codec::Fields;
use crate::wire::messages::{BlocksReply, Flush, Head};
use crate::wire::{Frame, Status, kind};
use bytes::Bytes;
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

/// Repairs that wait; what is found beyond them is found again by who reads it next.
const WAITING_MAX: usize = 4096;
/// Repairs under way at once, and those of writes that wait for them beside.
const AT_ONCE: usize = 2;
const FOR_WRITES_AT_ONCE: usize = 16;
/// Blocks of one repair: writes to them wait as long as it takes.
const BLOCKS_MAX: u32 = 64;
/// Blocks rotten everywhere that are remembered.
const UNREPAIRABLE_MAX: usize = 4096;
/// Times that a repair is tried anew, and until it is.
const TRIES_MAX: u32 = 5;
const AGAIN_NS: u64 = 1_000_000_000;
/// Times that one request waits for repairs.
pub(super) const AWAITED_MAX: u8 = 16;

/// What a frame in flight was for.
#[derive(Clone, Debug)]
enum Ask {
    Copy(CopyAsk),
    Flush,
}

/// Blocks of a node that are to be repaired.
#[derive(Clone, Debug)]
struct Want {
    node: NodeIndex,
    shard: u64,
    range: Range<u32>,
    /// Nobody else is believed; none: whoever is in sync.
    from: Option<NodeMask>,
    /// The content was read and is bad, whatever the node's summary says.
    rotten: bool,
    /// The change that the node could not make before: its part and serial.
    change: Option<(usize, u32)>,
    tries: u32,
    not_before_ns: u64,
}

impl Want {
    fn overlaps(&self, shard: u64, blocks: &Range<u32>) -> bool {
        self.shard == shard && self.range.start < blocks.end && blocks.start < self.range.end
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Pausing,
    Copying,
    Flushing,
}

/// A repair under way.
struct Job {
    want: Want,
    stage: Stage,
    asks: Asks<Ask>,
    copier: Copier,
    /// Layers that have still to be compared, and the copier's job.
    layers: Vec<LayerId>,
    copy: Option<usize>,
    /// The request that pauses writes.
    pause: Option<usize>,
    sources: NodeMask,
    hopeless: Vec<u32>,
}

/// The repairs of an image, and what became of the rot that was found in it.
#[derive(Default)]
pub(super) struct Repairs {
    waiting: VecDeque<Want>,
    jobs: Vec<Job>,
    /// Blocks rotten everywhere; true: a node came since, it may be tried again.
    unrepairable: BTreeMap<(u64, u32), bool>,
    found: u64,
    repaired: u64,
    given_up: u64,
}

impl Repairs {
    fn concerns(&self, shard: u64, blocks: &Range<u32>) -> bool {
        let waiting = self.waiting.iter().any(|want| want.overlaps(shard, blocks));
        waiting || self.jobs.iter().any(|job| job.want.overlaps(shard, blocks))
    }

    fn knows(&self, node: NodeIndex, shard: u64, block: u32) -> bool {
        let one = block..block + 1;
        let of_node = |want: &Want| want.node == node && want.overlaps(shard, &one);
        self.waiting.iter().any(of_node) || self.jobs.iter().any(|job| of_node(&job.want))
    }

    /// Whether more can be found without forgetting any of it.
    pub fn has_room(&self) -> bool {
        self.waiting.len() < WAITING_MAX / 4
    }

    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.jobs.is_empty()
    }
}

impl ImageIo {
    /// What became of the rot that was found since the image was opened.
    pub fn rot_state(&self) -> RotState {
        let repairs = &self.repairs;
        RotState {
            found: repairs.found,
            repaired: repairs.repaired,
            given_up: repairs.given_up,
            waiting: (repairs.waiting.len() + repairs.jobs.len()) as u64,
            unrepairable: repairs.unrepairable.keys().copied().collect(),
        }
    }

    /// `node` holds a rotten block.
    pub(super) fn found_rot(&mut self, node: NodeIndex, shard: u64, block: u32) {
        if self.is_new_rot(node, shard, block) {
            self.tell_rot(node, shard, block..block + 1);
            self.want_repair(node, shard, block..block + 1, None, true);
            self.start_repairs();
        }
    }

    fn tell_rot(&mut self, node: NodeIndex, shard: u64, range: Range<u32>) {
        let (block, blocks) = (range.start, range.end - range.start);
        self.repairs.found += u64::from(blocks);
        self.event(Event::BadBlock { node, shard, block, blocks, hidden: false });
    }

    /// A node has rewritten a shard's damaged metadata from memory.
    pub(super) fn metadata_repaired(&mut self, node: NodeIndex, shard: u64) {
        self.repairs.found += 1;
        self.repairs.repaired += 1;
        self.event(Event::MetadataRepaired { node, shard });
    }

    /// `node` holds rotten blocks, in order; their repairs are not begun yet.
    pub(super) fn found_rotten_blocks(&mut self, node: NodeIndex, shard: u64, blocks: &[u32]) {
        let new = blocks.iter().copied().filter(|block| self.is_new_rot(node, shard, *block));
        let new: Vec<u32> = new.collect();
        for run in runs(&new) {
            self.tell_rot(node, shard, run.clone());
            for first in run.clone().step_by(BLOCKS_MAX as usize) {
                let range = first..run.end.min(first + BLOCKS_MAX);
                self.want_repair(node, shard, range, None, true);
            }
        }
    }

    /// Whether rot was not known, or may be repaired now; false: all that can be done was.
    fn is_new_rot(&mut self, node: NodeIndex, shard: u64, block: u32) -> bool {
        let given_up = self.repairs.unrepairable.get_mut(&(shard, block));
        let hopeless = given_up.is_some_and(|again| !std::mem::take(again));
        !hopeless && !self.repairs.knows(node, shard, block)
    }

    /// Content that matches its checksum is not what `from`, the others, have.
    pub(super) fn found_difference(
        &mut self,
        node: NodeIndex,
        shard: u64,
        block: u32,
        from: NodeMask,
    ) {
        if self.is_new_rot(node, shard, block) {
            self.repairs.found += 1;
            self.event(Event::BadBlock { node, shard, block, blocks: 1, hidden: true });
            self.want_repair(node, shard, block..block + 1, Some(from), false);
        }
    }

    fn want_repair(
        &mut self,
        node: NodeIndex,
        shard: u64,
        range: Range<u32>,
        from: Option<NodeMask>,
        rotten: bool,
    ) {
        // A run of rotten blocks is one repair.
        if let Some(last) = self.repairs.waiting.back_mut()
            && (last.node, last.shard, last.range.end) == (node, shard, range.start)
            && (last.from, last.rotten, last.tries) == (from, rotten, 0)
            && last.change.is_none()
            && last.range.len() + range.len() <= BLOCKS_MAX as usize
        {
            last.range.end = range.end;
            return;
        }
        if self.repairs.waiting.len() < WAITING_MAX {
            let (change, tries, not_before_ns) = (None, 0, 0);
            let want = Want { node, shard, range, from, rotten, change, tries, not_before_ns };
            self.repairs.waiting.push_back(want);
        }
    }

    /// `node` cannot merge a change into a rotten block: that is repaired first.
    pub(super) fn cannot_merge(
        &mut self,
        id: usize,
        node: NodeIndex,
        head: Bytes,
    ) -> Result<(), BadReply> {
        let block = Fields(head).u32().map_err(|_| BadReply("no block named"))?;
        let part = &mut self.parts[id];
        let (shard, serial, awaited) = (part.shard, part.serial, part.awaited);
        if !part.blocks().contains(&block) {
            return Err(BadReply("a block that the change does not touch"));
        }
        part.tried = part.tried.with(NodeMask::one(node));
        part.awaited = awaited.saturating_add(1);
        if self.is_new_rot(node, shard, block) {
            self.tell_rot(node, shard, block..block + 1);
        }
        // Of one change and node there is one repair: another's late copy would undo the change.
        self.forget_wants(|want| want.is_for(id) && want.node == node);
        // It stays asked, so that nobody asks it again before the repair is over.
        if awaited >= AWAITED_MAX {
            self.cannot_repair(id, node, Status::BadBlock);
            return Ok(());
        }
        let (range, change) = (block..block + 1, Some((id, serial)));
        let (from, rotten, tries, not_before_ns) = (None, true, 0, 0);
        let want = Want { node, shard, range, from, rotten, change, tries, not_before_ns };
        self.repairs.waiting.push_front(want);
        self.start_repairs();
        Ok(())
    }

    /// Starts what may start. What cannot be done waits, or is forgotten.
    pub(super) fn start_repairs(&mut self) {
        if !matches!(self.phase, Phase::Running | Phase::Closing) {
            return;
        }
        let mut left = self.repairs.waiting.len();
        while left > 0
            && let Some(want) = self.repairs.waiting.pop_front()
        {
            left -= 1;
            let of_writes = |job: &&Job| job.want.change.is_some();
            let for_writes = self.repairs.jobs.iter().filter(of_writes).count();
            let full = match want.change {
                Some(_) => for_writes >= FOR_WRITES_AT_ONCE,
                None => self.repairs.jobs.len() - for_writes >= AT_ONCE,
            };
            if full || self.now_ns < want.not_before_ns {
                self.repairs.waiting.push_back(want);
            } else {
                self.start_repair(want);
            }
        }
    }

    fn start_repair(&mut self, want: Want) {
        let node = NodeMask::one(want.node);
        let set = &self.sets[self.spec.geometry.replica_set_of(want.shard) as usize];
        let in_sync = set.in_sync;
        let counts = match want.change {
            Some(_) => in_sync.with(self.healing()),
            None => in_sync,
        };
        if counts.and(node).is_empty() || !self.attached().has(want.node) {
            // What is not in sync is healed; one that is away is asked anew when it is back.
            // Its changes it is sent when it is.
            return self.retry_reads(want.shard);
        }
        let others = in_sync.without(node).and(want.from.unwrap_or(in_sync));
        let gated = self.gated(want.shard);
        let sources = others.and(self.up()).without(gated);
        if gated.has(want.node) || sources.is_empty() && !others.and(gated).is_empty() {
            return self.repair_when_level(want);
        }
        if sources.is_empty() {
            return match in_sync.without(node).is_empty() {
                true => {
                    let hopeless: Vec<u32> = want.range.clone().collect();
                    self.repair_over(want, hopeless, true);
                }
                false => self.try_again(want, Status::BadBlock),
            };
        }
        let asks = Asks::new(self.next_serial());
        let (shard, range, unpaused) = (want.shard, want.range.clone(), want.change.is_some());
        self.repairs.jobs.push(Job {
            want,
            stage: Stage::Pausing,
            asks,
            copier: Copier::default(),
            layers: self.spec.layers.clone(),
            copy: None,
            pause: None,
            sources,
            hopeless: Vec::new(),
        });
        let index = self.repairs.jobs.len() - 1;
        if unpaused || broken(Rule::RepairPausesWrites) {
            return self.next_repair_layer(index);
        }
        let (offset, length) = self.range_bytes(shard, &range);
        let pause = self.own_request(RequestKind::Pause, offset, length);
        self.repairs.jobs[index].pause = Some(pause);
        self.enter(pause, RequestKind::Pause, offset, length);
    }

    /// The node, or who it could be repaired from, may lack what was answered: first they are made equal.
    fn repair_when_level(&mut self, mut want: Want) {
        let shard = want.shard;
        want.not_before_ns = self.now_ns + AGAIN_NS;
        self.repairs.waiting.push_back(want);
        self.demand(shard);
    }

    /// Shards are level: their repairs need not wait any longer.
    pub(super) fn repairs_of_level(&mut self, level: &ShardSet) {
        let waiting = self.repairs.waiting.iter_mut().filter(|want| level.has(want.shard));
        waiting.for_each(|want| want.not_before_ns = 0);
        self.start_repairs();
    }

    /// Offset and length in the image of some blocks of a shard.
    pub(super) fn range_bytes(&self, shard: u64, range: &Range<u32>) -> (u64, u32) {
        let first = shard * u64::from(self.spec.geometry.shard_bytes);
        let offset = first + u64::from(range.start) * u64::from(BLOCK_BYTES);
        (offset, (range.end - range.start) * BLOCK_BYTES)
    }

    /// No write to the blocks is in flight; false: the pause is not one of a repair.
    pub(super) fn repair_paused(&mut self, pause: usize) -> bool {
        let Some(index) = self.repairs.jobs.iter().position(|job| job.pause == Some(pause)) else {
            return false;
        };
        assert_eq!(self.repairs.jobs[index].stage, Stage::Pausing, "blocks are paused once");
        self.next_repair_layer(index);
        true
    }

    fn next_repair_layer(&mut self, index: usize) {
        let stamp = self.copy_stamp();
        let job = &mut self.repairs.jobs[index];
        job.stage = Stage::Copying;
        let Some(layer) = job.layers.pop() else { return self.flush_repair(index) };
        let Want { node, shard, ref range, rotten, .. } = job.want;
        let compared = Comparison::repair(job.sources, node);
        let members = job.sources.with(NodeMask::one(node));
        let copy =
            job.copier.start_range((layer, shard), range.clone(), compared, members, false, stamp);
        if rotten {
            range.clone().for_each(|block| job.copier.is_rotten(copy, node, block));
        }
        job.copy = Some(copy);
        self.send_repair_orders(index);
    }

    fn send_repair_orders(&mut self, index: usize) {
        while let Some(order) = self.repairs.jobs[index].copier.orders.pop_front() {
            for node in order.nodes.iter() {
                let tag = self.repairs.jobs[index].asks.add(node, Ask::Copy(order.ask.clone()));
                let only = NodeMask::one(node);
                self.send(only, order.kind(), 0, tag, &order.payload, |out| order.put(out));
            }
        }
    }

    fn flush_repair(&mut self, index: usize) {
        let job = &mut self.repairs.jobs[index];
        job.stage = Stage::Flushing;
        let node = job.want.node;
        let tag = job.asks.add(node, Ask::Flush);
        let flush = Flush {
            epoch: self.spec.epoch,
            generation: self.spec.generation,
            clear_sequence: 0,
            proof: Vec::new(),
        };
        let only = NodeMask::one(node);
        self.send(only, kind::FLUSH, 0, tag, &Bytes::new(), |out| flush.put(out));
    }

    /// Takes an answer to one of the repairs' own frames.
    pub(super) fn take_repair(&mut self, node: NodeIndex, frame: Frame) -> Result<(), BadReply> {
        let mut jobs = self.repairs.jobs.iter_mut().enumerate();
        let asked = jobs.find_map(|(index, job)| Some((index, job.asks.take(node, frame.tag)?)));
        let Some((index, ask)) = asked else { return Ok(()) };
        match ask {
            Ask::Copy(ask) => self.take_repair_copy(index, node, ask, frame)?,
            Ask::Flush if frame.status != Status::Ok => self.fail_repair(index, frame.status),
            Ask::Flush => {
                self.take_flush_number(node, frame.head)?;
                self.end_repair(index);
            }
        }
        Ok(())
    }

    fn take_repair_copy(
        &mut self,
        index: usize,
        node: NodeIndex,
        ask: CopyAsk,
        frame: Frame,
    ) -> Result<(), BadReply> {
        let stamp = self.copy_stamp();
        let of_target = node == self.repairs.jobs[index].want.node;
        if of_target && frame.status == Status::Ok && matches!(ask, CopyAsk::Summary { .. }) {
            self.list_lost(index, frame.head.clone())?;
        }
        let job = &mut self.repairs.jobs[index];
        let shard = job.want.shard;
        let taken = job.copier.take(node, ask, frame, stamp)?;
        if let Some(status) = taken.failed {
            self.fail_repair(index, status);
            return Ok(());
        }
        job.hopeless.extend(taken.hopeless);
        let done = taken.done.is_some();
        self.send_repair_orders(index);
        if done {
            self.next_repair_layer(index);
        }
        if let Some((node, _, block)) = taken.rotten {
            self.found_rot(node, shard, block);
        }
        Ok(())
    }

    /// The node says of other blocks of the shard too that they are bad: its metadata is lost.
    fn list_lost(&mut self, index: usize, head: Bytes) -> Result<(), BadReply> {
        let reply = BlocksReply::take(head).map_err(|_| BadReply("malformed summary"))?;
        let Want { node, shard, .. } = self.repairs.jobs[index].want;
        let bad = reply.blocks.iter().enumerate().filter(|(_, (block, _))| *block == Block::Bad);
        let bad: Vec<u32> = bad.map(|(block, _)| block as u32).collect();
        self.found_rotten_blocks(node, shard, &bad);
        Ok(())
    }

    /// The repair is over: who waited for it goes on.
    fn end_repair(&mut self, index: usize) {
        let set = self.spec.geometry.replica_set_of(self.repairs.jobs[index].want.shard) as usize;
        let job = self.repairs.jobs.swap_remove(index);
        let asked = job.sources.with(NodeMask::one(job.want.node));
        let whole = self.sets[set].in_sync.without(asked).is_empty();
        if let Some(pause) = job.pause {
            self.finish_request(pause);
        }
        self.repair_over(job.want, job.hopeless, whole);
        self.start_repairs();
    }

    /// `whole`: every node in sync was asked for the blocks.
    fn repair_over(&mut self, want: Want, mut hopeless: Vec<u32>, whole: bool) {
        hopeless.sort_unstable();
        hopeless.dedup();
        let Want { node, shard, .. } = want;
        let good = want.range.clone().filter(|block| !hopeless.contains(block));
        let good: Vec<u32> = good.collect();
        for block in &good {
            self.repairs.unrepairable.remove(&(shard, *block));
        }
        for run in runs(&good) {
            let blocks = run.end - run.start;
            self.repairs.repaired += u64::from(blocks);
            self.event(Event::Repaired { node, shard, block: run.start, blocks });
        }
        if whole {
            hopeless.iter().for_each(|block| self.give_up_block(shard, *block));
        } else if !hopeless.is_empty() {
            self.try_again(want.clone(), Status::BadBlock);
        }
        if whole || hopeless.is_empty() {
            self.go_on_after_repair(&want, !hopeless.is_empty());
        }
    }

    fn give_up_block(&mut self, shard: u64, block: u32) {
        let known = &mut self.repairs.unrepairable;
        if known.len() < UNREPAIRABLE_MAX && known.insert((shard, block), false).is_none() {
            self.repairs.given_up += 1;
            self.event(Event::Unrepairable { shard, block });
        }
    }

    fn fail_repair(&mut self, index: usize, status: Status) {
        let want = self.drop_job(index);
        self.try_again(want, status);
        self.start_repairs();
    }

    /// Ends a job as if it had never begun.
    fn drop_job(&mut self, index: usize) -> Want {
        let job = self.repairs.jobs.swap_remove(index);
        if let Some(pause) = job.pause {
            self.withdraw_pause(pause);
        }
        job.want
    }

    /// Gives a pause up that may not have begun yet.
    pub(super) fn withdraw_pause(&mut self, pause: usize) {
        let mut ready = Vec::new();
        let request = self.requests.remove(pause);
        let range = Self::block_range(request.offset, request.length);
        self.locks.withdraw(pause, range, &mut ready);
        ready.into_iter().for_each(|id| self.start(id));
        if self.phase == Phase::Closing {
            self.go_on_closing();
        }
    }

    fn try_again(&mut self, mut want: Want, status: Status) {
        if let Some((id, serial)) = want.change {
            // The change is sent again, and says whether there is still something to repair.
            if self.parts.get(id).is_some_and(|part| part.serial == serial) {
                self.cannot_repair(id, want.node, status);
            }
            return;
        }
        want.tries += 1;
        want.not_before_ns = self.now_ns + AGAIN_NS;
        if want.tries < TRIES_MAX && self.repairs.waiting.len() < WAITING_MAX {
            self.repairs.waiting.push_back(want);
        } else {
            self.retry_reads(want.shard);
        }
    }

    /// The node does not get on with a change: it is asked again at the next tick, unless policy leaves
    /// it behind before.
    fn cannot_repair(&mut self, id: usize, node: NodeIndex, status: Status) {
        let part = &mut self.parts[id];
        part.sent = part.sent.without(NodeMask::one(node));
        part.awaited = 0;
        match self.is_only_healed_by(id, node) {
            true => self.fail_heal(status),
            false => self.event(Event::ReplicaFailed { node, status }),
        }
    }

    fn go_on_after_repair(&mut self, want: &Want, hopeless: bool) {
        self.retry_reads(want.shard);
        let Some((id, serial)) = want.change else { return };
        let node = NodeMask::one(want.node);
        let waits =
            |part: &super::image::Part| part.serial == serial && part.waiting.has(want.node);
        if !self.parts.get(id).is_some_and(waits) {
            return;
        }
        if !hopeless {
            self.parts[id].sent = self.parts[id].sent.without(node);
            return self.send_missing(id, node);
        }
        let part = &self.parts[id];
        let counts = self.sets[part.set as usize].in_sync.with(self.healing());
        if part.wanted.and(counts).without(part.tried).is_empty() {
            return self.fail_change(id);
        }
        // Some have applied it, or have not said yet: it is asked again with the next tick.
        self.parts[id].sent = self.parts[id].sent.without(node);
    }

    /// No node can make a change, and none has: its client hears so. Its blocks stay as they are.
    fn fail_change(&mut self, id: usize) {
        self.forget_wants(|want| want.is_for(id));
        let part = self.parts.remove(id);
        self.sequence_answered(part.sequence);
        self.requests[part.request].error = Some(IoError::Io);
        self.part_done(part.request);
    }

    /// Whether a read that no node could answer may find its blocks repaired soon.
    pub(super) fn may_be_repaired(&self, id: usize) -> bool {
        let part = &self.parts[id];
        part.awaited < AWAITED_MAX && self.repairs.concerns(part.shard, &part.blocks())
    }

    /// Reads of a shard that wait for repairs ask all nodes again.
    fn retry_reads(&mut self, shard: u64) {
        let waits = |part: &super::image::Part| {
            let reads = part.kind.reads();
            reads && part.shard == shard && part.waiting.is_empty() && !part.tried.is_empty()
        };
        let parts: Vec<usize> =
            self.parts.iter().filter(|(_, part)| waits(part)).map(|(id, _)| id).collect();
        for id in parts {
            // One of them may have ended with another.
            if self.parts.get(id).is_some_and(waits) {
                let part = &mut self.parts[id];
                (part.tried, part.awaited) = (NodeMask::EMPTY, part.awaited.saturating_add(1));
                self.dispatch_read(id);
            }
        }
    }

    /// Reads that no repair will help ask all nodes once more, and may then fail.
    pub(super) fn retry_forgotten_reads(&mut self) {
        let reads = |part: &&super::image::Part| {
            let reads = matches!(part.kind, RequestKind::Read | RequestKind::Status);
            let failed = self.sets[part.set as usize].in_sync.without(part.tried).is_empty();
            reads && failed && part.waiting.is_empty()
        };
        let parts = self.parts.iter().map(|(_, part)| part).filter(reads);
        let forgotten = parts.filter(|part| !self.repairs.concerns(part.shard, &part.blocks()));
        let shards: std::collections::BTreeSet<u64> = forgotten.map(|part| part.shard).collect();
        shards.into_iter().for_each(|shard| self.retry_reads(shard));
    }

    /// Nodes have come or gone, or the record says something else: all begins anew.
    pub(super) fn restart_repairs(&mut self) {
        while !self.repairs.jobs.is_empty() {
            let want = self.drop_job(0);
            self.repairs.waiting.push_front(want);
        }
        self.start_repairs();
    }

    /// A node came: what no other had intact it may have.
    pub(super) fn repairs_have_hope(&mut self) {
        self.repairs.unrepairable.values_mut().for_each(|again| *again = true);
    }

    /// Nothing new is begun but for the changes that wait for it.
    pub(super) fn close_repairs(&mut self) {
        self.forget_wants(|want| want.change.is_none());
    }

    /// A node is gone, and with it what was under way for changes: they are sent to it anew.
    pub(super) fn repairs_without(&mut self, node: NodeIndex) {
        self.forget_wants(|want| want.node == node && want.change.is_some());
        self.restart_repairs();
    }

    fn forget_wants(&mut self, which: impl Fn(&Want) -> bool) {
        self.repairs.waiting.retain(|want| !which(want));
        while let Some(index) = self.repairs.jobs.iter().position(|job| which(&job.want)) {
            self.drop_job(index);
        }
    }

    /// A change is answered: what it wrote as a whole is no longer rotten.
    pub(super) fn overwritten(&mut self, shard: u64, offset: u32, length: u32) {
        if self.repairs.unrepairable.is_empty() {
            return;
        }
        let whole = offset.div_ceil(BLOCK_BYTES)..(offset + length) / BLOCK_BYTES;
        self.repairs.unrepairable.retain(|(at, block), _| *at != shard || !whole.contains(block));
    }
}

/// Blocks in order, as ranges without gaps.
pub(super) fn runs(blocks: &[u32]) -> Vec<Range<u32>> {
    let runs = blocks.chunk_by(|before, after| before + 1 == *after);
    runs.map(|run| run[0]..run[run.len() - 1] + 1).collect()
}

impl Want {
    fn is_for(&self, part: usize) -> bool {
        self.change.is_some_and(|(id, _)| id == part)
    }
}

impl super::image::Part {
    /// The blocks of the shard that it touches.
    pub(super) fn blocks(&self) -> Range<u32> {
        self.offset / BLOCK_BYTES..(self.offset + self.length).div_ceil(BLOCK_BYTES)
    }
}
