//! Make shard s on T equal to shard s on S: the one mechanism behind the return of a restarted node,
//! reconcile after an unclean end, and later heal, moves and repair.
//!
//! The dirty maps of all participants name the shards. Per shard the participants' block summaries
//! are compared. Where a member of the replica set is `Up` (it never restarted), its content wins and
//! only the joining nodes are written; else the highest (epoch, sequence) wins, per block. A rotten
//! block never wins: another replica that is as good stands in, and where none is, the joining nodes'
//! block is marked bad. Only blocks that differ are fetched and copied, with their tags. When all are
//! flushed, the joining nodes' sticky entries go.
//!
//! Writes that arrive meanwhile reach the joining nodes after they are `Up`, in order, so a copy never
//! lands on newer data. A participant that is lost ends the attempt; policy starts another.

use super::image::{ImageIo, ReplicaState};
use super::replies::BadReply;
use super::{Event, NodeIndex, NodeMask};
use crate::checksum::crc32c;
use crate::content::Block;
use crate::geometry::{BLOCK_BYTES, LayerId, Tag};
use crate::wire::codec::Fields;
use crate::wire::messages::{
    BlocksReply, Copy, DIRTY_ENTRIES_MAX, DirtyFrom, DirtyReply, Flush, Head, Level, ShardRange,
};
use crate::wire::{Frame, PAYLOAD_BYTES_MAX, Status, kind};
use bytes::Bytes;
use slab::Slab;
use std::collections::{BTreeSet, VecDeque};

const LEVEL_TAG: u64 = 1 << 63;
/// Shards compared at once, and fetches in flight for one shard: enough to fill the wire.
const SHARDS_AT_ONCE: usize = 4;
const FETCHES_AT_ONCE: usize = 2;
const BLOCKS_PER_COPY: u32 = (PAYLOAD_BYTES_MAX / BLOCK_BYTES as usize) as u32;

/// What a frame in flight was for.
#[derive(Clone, Debug)]
enum Ask {
    Dirty,
    Summary { job: usize },
    Fetch { job: usize, run: CopyRun },
    Copy { job: usize },
    Flush,
    Level,
}

/// Blocks that `targets` get from `source`; without one they are bad on every replica that counts,
/// and are marked so.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct CopyRun {
    source: Option<NodeIndex>,
    targets: NodeMask,
    first_block: u32,
    blocks: u32,
}

struct Job {
    layer: LayerId,
    shard: u64,
    /// Members of the shard's set that never went away; empty: reconcile by tag.
    trusted: NodeMask,
    /// Members that may be written.
    joiners: NodeMask,
    summaries: Vec<(NodeIndex, BlocksReply)>,
    summaries_missing: u32,
    runs: VecDeque<CopyRun>,
    in_flight: u32,
}

/// One attempt to level `joiners` with each other and with those who are up.
pub(super) struct Leveller {
    serial: u64,
    participants: NodeMask,
    joiners: NodeMask,
    asks: Slab<(NodeIndex, Ask)>,
    dirty: BTreeSet<u64>,
    queue: VecDeque<(LayerId, u64)>,
    jobs: Slab<Job>,
    copied_bytes: u64,
    flushed: bool,
}

impl ImageIo {
    /// Starts levelling once every node that is being admitted has its session.
    pub(super) fn start_leveller(&mut self) {
        let joining = |state| matches!(state, ReplicaState::Joining { .. });
        if self.leveller.is_some() || self.replicas.iter().any(|r| joining(r.state) && !r.resume) {
            return;
        }
        let joiners = self.nodes_in(ReplicaState::Levelling);
        if joiners.is_empty() {
            return;
        }
        let participants = joiners.with(self.up());
        self.serial = (self.serial + 1) & 0x7fff_ffff;
        self.leveller = Some(Leveller {
            serial: u64::from(self.serial & 0x7fff),
            participants,
            joiners,
            asks: Slab::new(),
            dirty: BTreeSet::new(),
            queue: VecDeque::new(),
            jobs: Slab::new(),
            copied_bytes: 0,
            flushed: false,
        });
        participants.iter().for_each(|node| self.ask_dirty(node, 0));
    }

    fn nodes_in(&self, state: ReplicaState) -> NodeMask {
        let mut mask = NodeMask::EMPTY;
        for (index, replica) in self.replicas.iter().enumerate() {
            if replica.state == state {
                mask = mask.with(NodeMask::one(index as NodeIndex));
            }
        }
        mask
    }

    /// `node` went away (or out): an attempt that needs it ends.
    pub(super) fn leveller_lost(&mut self, node: NodeIndex, status: Status) {
        if self.leveller.as_ref().is_some_and(|l| l.participants.has(node)) {
            self.end_attempt(node, status);
        }
    }

    fn end_attempt(&mut self, node: NodeIndex, status: Status) {
        let Some(leveller) = self.leveller.take() else { return };
        for joiner in leveller.joiners.iter().filter(|joiner| *joiner != node) {
            self.replica(joiner).state = ReplicaState::Waiting;
        }
        if leveller.joiners.has(node) && self.replica(node).state == ReplicaState::Levelling {
            self.replica(node).state = ReplicaState::Waiting;
        }
        self.event(Event::AdmitFailed { node, status });
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
            let id = leveller.asks.insert((node, ask.clone())) as u64;
            let tag = LEVEL_TAG | leveller.serial << 32 | id;
            self.send(NodeMask::one(node), frame_kind, 0, tag, payload, &put);
        }
    }

    pub(super) fn is_level_flush(&self, tag: u64) -> bool {
        tag & LEVEL_TAG != 0
    }

    fn ask_dirty(&mut self, node: NodeIndex, from_shard: u64) {
        let epoch = self.spec.epoch;
        let head = DirtyFrom { epoch, from_shard };
        self.ask(NodeMask::one(node), Ask::Dirty, kind::DIRTY, &Bytes::new(), |out| head.put(out));
    }

    pub(super) fn take_level(&mut self, node: NodeIndex, frame: Frame) -> Result<(), BadReply> {
        let Some(leveller) = &mut self.leveller else { return Ok(()) };
        let id = (frame.tag & 0xffff_ffff) as usize;
        if frame.tag >> 32 & 0x7fff != leveller.serial
            || leveller.asks.get(id).is_none_or(|(asked, _)| *asked != node)
        {
            return Ok(());
        }
        let (_, ask) = leveller.asks.remove(id);
        if frame.status != Status::Ok {
            match ask {
                Ask::Fetch { job, run } if frame.status == Status::BadBlock => {
                    let block = Fields(frame.head).u32();
                    let block = block.map_err(|_| BadReply("no block named"))?;
                    self.rotten_source(node, job, run, block);
                    self.go_on();
                }
                _ => self.end_attempt(node, frame.status),
            }
            return Ok(());
        }
        match ask {
            Ask::Dirty => self.take_dirty(node, frame)?,
            Ask::Summary { job } => self.take_summary(node, job, frame)?,
            Ask::Fetch { job, run } => self.take_fetch(job, run, frame)?,
            Ask::Copy { job } => self.job_step(job),
            Ask::Flush | Ask::Level => {}
        }
        self.go_on();
        Ok(())
    }

    fn take_dirty(&mut self, node: NodeIndex, frame: Frame) -> Result<(), BadReply> {
        let reply = DirtyReply::take(frame.head).map_err(|_| BadReply("malformed dirty map"))?;
        let Some(leveller) = &mut self.leveller else { return Ok(()) };
        leveller.dirty.extend(reply.entries.iter().map(|entry| entry.shard));
        if let Some(last) = reply.entries.last().filter(|_| reply.more) {
            self.ask_dirty(node, last.shard + 1);
            return Ok(());
        }
        if leveller.asks.is_empty() {
            for shard in leveller.dirty.iter().filter(|s| **s < self.spec.geometry.shards()) {
                leveller.queue.extend(self.spec.layers.iter().map(|layer| (*layer, *shard)));
            }
        }
        Ok(())
    }

    /// Starts what may start; with nothing left, flushes, marks, and lets the joiners up.
    fn go_on(&mut self) {
        while let Some(leveller) = &mut self.leveller {
            if leveller.jobs.len() >= SHARDS_AT_ONCE {
                return;
            }
            let Some((layer, shard)) = leveller.queue.pop_front() else { break };
            self.start_job(layer, shard);
        }
        let Some(leveller) = &mut self.leveller else { return };
        if !leveller.asks.is_empty() || !leveller.jobs.is_empty() {
            return;
        }
        if leveller.dirty.is_empty() {
            return self.finish_levelling();
        }
        if !leveller.flushed {
            leveller.flushed = true;
            return self.flush_participants();
        }
        self.mark_level();
    }

    fn start_job(&mut self, layer: LayerId, shard: u64) {
        let set = &self.sets[self.spec.geometry.replica_set_of(shard) as usize];
        let Some(leveller) = &mut self.leveller else { return };
        let members = set.in_sync.and(leveller.participants);
        let joiners = members.and(leveller.joiners);
        if joiners.is_empty() || members.0.count_ones() < 2 {
            return;
        }
        let job = leveller.jobs.insert(Job {
            layer,
            shard,
            trusted: members.without(joiners),
            joiners,
            summaries: Vec::new(),
            summaries_missing: members.0.count_ones(),
            runs: VecDeque::new(),
            in_flight: 0,
        });
        let head = self.shard_range(layer, shard, 0, self.spec.geometry.shard_bytes / BLOCK_BYTES);
        self.ask(members, Ask::Summary { job }, kind::SUMMARY, &Bytes::new(), |out| head.put(out));
    }

    fn shard_range(&self, layer: LayerId, shard: u64, first_block: u32, blocks: u32) -> ShardRange {
        let epoch = self.spec.epoch;
        ShardRange { epoch, layer, shard, first_block, blocks }
    }

    fn take_summary(
        &mut self,
        node: NodeIndex,
        job_id: usize,
        frame: Frame,
    ) -> Result<(), BadReply> {
        let reply = BlocksReply::take(frame.head).map_err(|_| BadReply("malformed summary"))?;
        if reply.blocks.len() != (self.spec.geometry.shard_bytes / BLOCK_BYTES) as usize {
            return Err(BadReply("a summary of another length"));
        }
        let Some(leveller) = &mut self.leveller else { return Ok(()) };
        let job = &mut leveller.jobs[job_id];
        job.summaries.push((node, reply));
        job.summaries_missing -= 1;
        if job.summaries_missing == 0 {
            let all = 0..job.summaries[0].1.blocks.len() as u32;
            job.runs = job.copy_runs(all);
            self.pump_job(job_id);
        }
        Ok(())
    }

    /// Keeps fetches in flight; ends the job when nothing is left.
    fn pump_job(&mut self, job_id: usize) {
        loop {
            let Some(leveller) = &mut self.leveller else { return };
            let job = &mut leveller.jobs[job_id];
            if job.in_flight as usize >= FETCHES_AT_ONCE {
                return;
            }
            let Some(run) = job.runs.pop_front() else {
                if job.in_flight == 0 {
                    leveller.jobs.remove(job_id);
                }
                return;
            };
            job.in_flight += 1;
            let (layer, shard) = (job.layer, job.shard);
            let head = self.shard_range(layer, shard, run.first_block, run.blocks);
            let ask = Ask::Fetch { job: job_id, run };
            match run.source {
                Some(source) => {
                    let source = NodeMask::one(source);
                    self.ask(source, ask, kind::FETCH, &Bytes::new(), |out| head.put(out));
                }
                None => self.mark_bad(job_id, run),
            }
        }
    }

    /// No replica that counts has these blocks intact: the joining nodes must not pretend to.
    fn mark_bad(&mut self, job_id: usize, run: CopyRun) {
        let bad = vec![(Block::Bad, Tag::NONE); run.blocks as usize];
        self.copy(job_id, run, 0, bad, Bytes::new());
        if let Some(leveller) = &mut self.leveller {
            leveller.jobs[job_id].in_flight -= 1;
        }
    }

    /// The source of `run` has a rotten block in it: another stands in for that block.
    fn rotten_source(&mut self, node: NodeIndex, job_id: usize, run: CopyRun, block: u32) {
        let Some(leveller) = &mut self.leveller else { return };
        let job = &mut leveller.jobs[job_id];
        let (layer_shard, in_run) = (job.shard, block.wrapping_sub(run.first_block) < run.blocks);
        let summary = job.summaries.iter_mut().find(|(other, _)| *other == node);
        let known = summary.and_then(|(_, reply)| reply.blocks.get_mut(block as usize));
        match known.filter(|known| in_run && known.0 != Block::Bad) {
            Some(known) => known.0 = Block::Bad,
            // The same word twice, or of a block that was not asked for.
            None => return self.end_attempt(node, Status::BadBlock),
        }
        let again = job.copy_runs(run.first_block..run.first_block + run.blocks);
        job.runs.extend(again);
        self.event(Event::BadBlock { node, shard: layer_shard, block });
        self.job_step(job_id);
    }

    fn job_step(&mut self, job_id: usize) {
        let Some(leveller) = &mut self.leveller else { return };
        leveller.jobs[job_id].in_flight -= 1;
        self.pump_job(job_id);
    }

    fn take_fetch(&mut self, job_id: usize, run: CopyRun, frame: Frame) -> Result<(), BadReply> {
        let reply = BlocksReply::take(frame.head).map_err(|_| BadReply("malformed fetch"))?;
        verify_fetch(&reply, &run, &frame.payload)?;
        self.copy(job_id, run, reply.generation, reply.blocks, frame.payload);
        self.job_step(job_id);
        Ok(())
    }

    /// Orders the targets of `run` to have these blocks.
    fn copy(
        &mut self,
        job_id: usize,
        run: CopyRun,
        shard_generation: u64,
        blocks: Vec<(Block, Tag)>,
        payload: Bytes,
    ) {
        let Some(leveller) = &mut self.leveller else { return };
        let targets = run.targets.0.count_ones();
        let job = &mut leveller.jobs[job_id];
        job.in_flight += targets;
        leveller.copied_bytes += payload.len() as u64 * u64::from(targets);
        let copy = Copy {
            epoch: self.spec.epoch,
            generation: self.spec.generation,
            layer: job.layer,
            shard: job.shard,
            shard_generation,
            indexes: (run.first_block..run.first_block + run.blocks).collect(),
            blocks,
        };
        let ask = Ask::Copy { job: job_id };
        self.ask(run.targets, ask, kind::COPY, &payload, |out| copy.put(out));
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

    /// Tells the joiners that the shards are level, a bounded number at a time.
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
        let Some(joiners) = self.leveller.as_ref().map(|l| l.joiners) else { return };
        let level = Level { epoch: self.spec.epoch, shards };
        self.ask(joiners, Ask::Level, kind::LEVEL, &Bytes::new(), |out| level.put(out));
    }

    fn finish_levelling(&mut self) {
        let Some(leveller) = self.leveller.take() else { return };
        let levelled_shards = std::mem::take(&mut self.levelled_shards);
        self.run_if_opening();
        self.go_up(leveller.joiners);
        let copied_bytes = leveller.copied_bytes;
        self.event(Event::Admitted { levelled_shards, copied_bytes });
        self.start_leveller();
    }
}

fn verify_fetch(reply: &BlocksReply, run: &CopyRun, payload: &Bytes) -> Result<(), BadReply> {
    if reply.blocks.len() != run.blocks as usize {
        return Err(BadReply("another number of blocks than asked for"));
    }
    let mut chunks = payload.chunks_exact(BLOCK_BYTES as usize);
    for (block, _) in &reply.blocks {
        if let Block::Data(checksum) = block {
            let intact = chunks.next().is_some_and(|data| crc32c(data) == *checksum);
            if !intact {
                return Err(BadReply("a fetched block does not match its checksum"));
            }
        }
    }
    match (chunks.next(), chunks.remainder().is_empty()) {
        (None, true) => Ok(()),
        _ => Err(BadReply("a fetch longer than its block list")),
    }
}

impl Job {
    /// Who gives which of the blocks in `range` to whom.
    fn copy_runs(&self, range: std::ops::Range<u32>) -> VecDeque<CopyRun> {
        let mut runs: VecDeque<CopyRun> = VecDeque::new();
        for index in range {
            let Some((source, targets)) = self.judge(index as usize) else { continue };
            match runs.back_mut() {
                Some(run)
                    if run.first_block + run.blocks == index
                        && (run.source, run.targets) == (source, targets)
                        && run.blocks < BLOCKS_PER_COPY =>
                {
                    run.blocks += 1;
                }
                _ => runs.push_back(CopyRun { source, targets, first_block: index, blocks: 1 }),
            }
        }
        runs
    }

    /// The winner of one block and who has to be given it; none: nothing to do.
    fn judge(&self, index: usize) -> Option<(Option<NodeIndex>, NodeMask)> {
        let of = |(node, reply): &(NodeIndex, BlocksReply)| {
            let (block, tag) = reply.blocks[index];
            (*node, block, tag)
        };
        let all = || self.summaries.iter().map(of);
        let counts = |node| self.trusted.is_empty() || self.trusted.has(node);
        let intact = all().filter(|(node, block, _)| counts(*node) && *block != Block::Bad);
        // The first in placement order of those that tie; trusted ones do not go by tags.
        let rank = |node: NodeIndex, tag: Tag| {
            let tag = if self.trusted.is_empty() { tag } else { Tag::NONE };
            (tag, std::cmp::Reverse(node))
        };
        let winner = intact.max_by_key(|(node, _, tag)| rank(*node, *tag));
        let content = match (winner, self.trusted.is_empty()) {
            (Some((_, content, _)), _) => content,
            (None, true) => return None,
            (None, false) => Block::Bad,
        };
        let differing = all().filter(|(_, block, _)| *block != content);
        let targets =
            differing.fold(NodeMask::EMPTY, |m, (node, _, _)| m.with(NodeMask::one(node)));
        let targets = targets.and(self.joiners);
        (!targets.is_empty()).then_some((winner.map(|(node, _, _)| node), targets))
    }
}
