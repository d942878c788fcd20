//! Make shard s on T equal to shard s on S: the one mechanism behind the return of a restarted node,
//! reconcile after an unclean end, and later heal, moves and repair.
//!
//! The dirty maps of all participants name the shards. Per shard the participants' block summaries
//! are compared; per block the source wins where one of its replica set is `Up` (it never restarted),
//! else the highest (epoch, sequence). Only blocks that differ are fetched and copied, with their
//! tags. When all are flushed, the joining nodes' sticky entries go.
//!
//! Writes that arrive meanwhile reach the joining nodes after they are `Up`, in order, so a copy never
//! lands on newer data. A participant that is lost ends the attempt; policy starts another.

use super::image::{ImageIo, ReplicaState};
use super::replies::BadReply;
use super::{Event, NodeIndex, NodeMask};
use crate::checksum::crc32c;
use crate::content::Block;
use crate::geometry::{BLOCK_BYTES, LayerId, Tag};
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

/// Blocks that `targets` get from `source`.
#[derive(Clone, Copy, Debug)]
struct CopyRun {
    source: NodeIndex,
    targets: NodeMask,
    first_block: u32,
    blocks: u32,
}

struct Job {
    layer: LayerId,
    shard: u64,
    source: Option<NodeIndex>,
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
            self.end_attempt(node, frame.status);
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
        let source = members.without(leveller.joiners).first();
        if members.and(leveller.joiners).is_empty() || members.0.count_ones() < 2 {
            return;
        }
        let job = leveller.jobs.insert(Job {
            layer,
            shard,
            source,
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
            job.runs = copy_runs(&job.summaries, job.source);
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
            let source = NodeMask::one(run.source);
            self.ask(source, ask, kind::FETCH, &Bytes::new(), |out| head.put(out));
        }
    }

    fn job_step(&mut self, job_id: usize) {
        let Some(leveller) = &mut self.leveller else { return };
        leveller.jobs[job_id].in_flight -= 1;
        self.pump_job(job_id);
    }

    fn take_fetch(&mut self, job_id: usize, run: CopyRun, frame: Frame) -> Result<(), BadReply> {
        let reply = BlocksReply::take(frame.head).map_err(|_| BadReply("malformed fetch"))?;
        verify_fetch(&reply, &run, &frame.payload)?;
        let Some(leveller) = &mut self.leveller else { return Ok(()) };
        let job = &mut leveller.jobs[job_id];
        job.in_flight += run.targets.0.count_ones();
        leveller.copied_bytes += frame.payload.len() as u64 * u64::from(run.targets.0.count_ones());
        let copy = Copy {
            epoch: self.spec.epoch,
            generation: self.spec.generation,
            layer: job.layer,
            shard: job.shard,
            shard_generation: reply.generation,
            indexes: (run.first_block..run.first_block + run.blocks).collect(),
            blocks: reply.blocks,
        };
        let ask = Ask::Copy { job: job_id };
        self.ask(run.targets, ask, kind::COPY, &frame.payload, |out| copy.put(out));
        self.job_step(job_id);
        Ok(())
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

/// Who gives which blocks to whom. With a source it always wins, else the highest tag does, and the
/// first of those that tie.
fn copy_runs(
    summaries: &[(NodeIndex, BlocksReply)],
    source: Option<NodeIndex>,
) -> VecDeque<CopyRun> {
    let mut runs: VecDeque<CopyRun> = VecDeque::new();
    let blocks = summaries.first().map_or(0, |(_, reply)| reply.blocks.len());
    for index in 0..blocks {
        let rank = |(node, reply): &(NodeIndex, BlocksReply)| -> (bool, Tag) {
            (Some(*node) == source, reply.blocks[index].1)
        };
        let Some(winner) = summaries.iter().rev().max_by_key(|s| rank(s)) else { continue };
        let content = winner.1.blocks[index].0;
        let differing = summaries.iter().filter(|(_, reply)| reply.blocks[index].0 != content);
        let targets = differing.fold(NodeMask::EMPTY, |m, (node, _)| m.with(NodeMask::one(*node)));
        if targets.is_empty() {
            continue;
        }
        let index = index as u32;
        match runs.back_mut() {
            Some(run)
                if run.first_block + run.blocks == index
                    && (run.source, run.targets) == (winner.0, targets)
                    && run.blocks < BLOCKS_PER_COPY =>
            {
                run.blocks += 1;
            }
            _ => {
                runs.push_back(CopyRun { source: winner.0, targets, first_block: index, blocks: 1 })
            }
        }
    }
    runs
}
