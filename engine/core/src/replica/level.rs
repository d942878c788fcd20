//! Make shard s on T equal to shard s on S: the one mechanism behind the return of a restarted node,
//! reconcile after an unclean end, and later heal, moves and repair.
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

use super::compare::{Comparison, CopyRun};
use super::image::{ImageIo, Replica, ReplicaState};
use super::replies::BadReply;
use super::{Event, NodeIndex, NodeMask};
use crate::checksum::crc32c;
use crate::content::Block;
use crate::geometry::{BLOCK_BYTES, LayerId, Tag};
use crate::rules::{Rule, broken};
use crate::wire::codec::Fields;
use crate::wire::messages::{
    BlocksReply, Copy, DIRTY_ENTRIES_MAX, DirtyFrom, DirtyReply, Flush, Head, Level, Number,
    ShardRange,
};
use crate::wire::{Frame, Status, kind};
use bytes::Bytes;
use slab::Slab;
use std::collections::{BTreeSet, VecDeque};

const LEVEL_TAG: u64 = 1 << 63;
/// Shards compared at once, and fetches in flight for one shard: enough to fill the wire.
const SHARDS_AT_ONCE: usize = 4;
const FETCHES_AT_ONCE: usize = 2;

/// What a frame in flight was for.
#[derive(Clone, Debug)]
enum Ask {
    Dirty { from_shard: u64 },
    Summary { job: usize },
    Fetch { job: usize, run: CopyRun },
    Copy { job: usize },
    Flush,
    Level,
}

struct Job {
    layer: LayerId,
    shard: u64,
    compared: Comparison,
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
        let joining = |state| matches!(state, ReplicaState::Joining { .. });
        if self.leveller.is_some() || self.replicas.iter().any(|r| joining(r.state)) {
            return;
        }
        let joiners = self.nodes_in(ReplicaState::Levelling);
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
        if let Some(absent) = unfounded.filter(|_| !broken(Rule::AllInSyncLevelled)) {
            return self.end_admission(absent, Status::Io);
        }
        self.serial = (self.serial + 1) & 0x7fff_ffff;
        self.leveller = Some(Leveller {
            serial: u64::from(self.serial),
            participants,
            joiners,
            asks: Slab::new(),
            dirty: BTreeSet::new(),
            queue: VecDeque::new(),
            jobs: Slab::new(),
            copied_bytes: 0,
            stage: Stage::Comparing,
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

    /// Nodes that are being admitted and do not resume.
    fn joining(&self) -> NodeMask {
        let joins = |replica: &Replica| match replica.state {
            ReplicaState::Joining { .. } => !replica.resume,
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
        self.ask(
            NodeMask::one(node),
            Ask::Dirty { from_shard },
            kind::DIRTY,
            &Bytes::new(),
            |out| head.put(out),
        );
    }

    pub(super) fn take_level(&mut self, node: NodeIndex, frame: Frame) -> Result<(), BadReply> {
        let Some(leveller) = &mut self.leveller else { return Ok(()) };
        let id = (frame.tag & 0xffff_ffff) as usize;
        if (frame.tag & !LEVEL_TAG) >> 32 != leveller.serial
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
                _ => self.end_admission(node, frame.status),
            }
            return Ok(());
        }
        match ask {
            Ask::Dirty { from_shard } => self.take_dirty(node, from_shard, frame)?,
            Ask::Summary { job } => self.take_summary(node, job, frame)?,
            Ask::Fetch { job, run } => self.take_fetch(job, run, frame)?,
            Ask::Copy { job } => self.job_step(job),
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
            compared: Comparison::new(members.without(joiners), joiners),
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
        let blocks = reply.blocks.len() as u32;
        job.compared.add(node, reply.blocks);
        job.summaries_missing -= 1;
        if job.summaries_missing == 0 {
            job.runs = job.compared.copy_runs(0..blocks);
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
        let shard = job.shard;
        let in_run = block.wrapping_sub(run.first_block) < run.blocks;
        if !in_run || !job.compared.found_rotten(node, block) {
            // The same word twice, or of a block that was not asked for.
            return self.end_admission(node, Status::BadBlock);
        }
        let again = job.compared.copy_runs(run.first_block..run.first_block + run.blocks);
        job.runs.extend(again);
        self.event(Event::BadBlock { node, shard, block });
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
        self.send(participants, kind::CLEAR, 0, 0, &Bytes::new(), |out| clear.put(out));
    }

    /// Tells all who took part that the shards are level, a bounded number at a time.
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
        let level = Level { epoch: self.spec.epoch, shards };
        self.ask(participants, Ask::Level, kind::LEVEL, &Bytes::new(), |out| level.put(out));
    }

    fn finish_levelling(&mut self) {
        let Some(leveller) = self.leveller.take() else { return };
        let levelled_shards = std::mem::take(&mut self.levelled_shards);
        self.run_if_opening();
        self.ask_again(leveller.joiners);
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
