//! Make shard s on T equal to shard s on S: summaries are compared, and the blocks that differ fetched
//! and copied, a few shards at a time. The one mechanism behind levelling, heal and repair. Without I/O:
//! what is to be asked comes out as `orders`, answers go in through `take`.
//!
//! What nobody waits for the target is ordered to fetch from the source by itself (PULL), so that it does not
//! go through this host; where that does not work, and where somebody waits, it goes through here (FETCH,
//! COPY), over connections that are known to live.
//!
//! Who counts, and who gets what, `compare` decides; when a shard may be worked on, its owner does.

use super::background::Pacing;
use super::compare::{Comparison, CopyRun};
use super::pacing::Need;
use super::replies::BadReply;
use super::routes::Routes;
use super::{NodeIndex, NodeMask};
use crate::checksum::checksum_of;
use crate::content::Block;
use crate::geometry::{BLOCK_BYTES, LayerId, SHARD_BYTES_MAX, Tag};
use crate::wire::codec::Fields;
use crate::wire::copies::Pull;
use crate::wire::messages::{BlocksReply, Copy, Head, Number, ShardRange, TAGGED_BLOCK_BYTES};
use crate::wire::{Frame, HEAD_BYTES_MAX, PAYLOAD_BYTES_MAX, Status, kind};
use bytes::{Bytes, BytesMut};
use slab::Slab;
use std::collections::VecDeque;
use std::ops::Range;

/// Fetches and pulls in flight for one shard: enough to fill the wire.
const FETCHES_AT_ONCE: usize = 2;
/// Blocks of a fetch beside clients: no request of theirs waits long behind it.
const NARROW_BLOCKS: u32 = 64;

// Whatever differs, no frame is larger than the wire takes: summaries are of one shard, copies of one payload.
const _: () = assert!(
    (SHARD_BYTES_MAX / BLOCK_BYTES) as usize * TAGGED_BLOCK_BYTES + 64 <= HEAD_BYTES_MAX
        && PAYLOAD_BYTES_MAX / BLOCK_BYTES as usize * (TAGGED_BLOCK_BYTES + 4) + 64
            <= HEAD_BYTES_MAX
);

/// What a frame in flight was for.
#[derive(Clone, Debug)]
pub(super) enum CopyAsk {
    Summary { job: usize },
    Fetch { job: usize, run: CopyRun },
    Copy { job: usize },
    Pull { job: usize, run: CopyRun },
}

impl CopyAsk {
    /// Whether it goes on after such an answer; any other is a failure of the node that was asked.
    fn may_end_with(&self, status: Status) -> bool {
        match self {
            CopyAsk::Summary { .. } | CopyAsk::Copy { .. } => status == Status::Ok,
            CopyAsk::Fetch { .. } => matches!(status, Status::Ok | Status::BadBlock),
            CopyAsk::Pull { .. } => matches!(
                status,
                Status::Ok | Status::BadBlock | Status::Unreachable | Status::Cancelled
            ),
        }
    }
}

/// A frame to be sent to each of `nodes`.
pub(super) struct Order {
    pub nodes: NodeMask,
    pub ask: CopyAsk,
    head: OrderHead,
    pub payload: Bytes,
}

enum OrderHead {
    Summary(ShardRange),
    Fetch(ShardRange),
    Copy(Copy),
    Pull(Pull),
}

impl Order {
    pub fn kind(&self) -> u8 {
        match self.head {
            OrderHead::Summary(_) => kind::SUMMARY,
            OrderHead::Fetch(_) => kind::FETCH,
            OrderHead::Copy(_) => kind::COPY,
            OrderHead::Pull(_) => kind::PULL,
        }
    }

    pub fn put(&self, out: &mut BytesMut) {
        match &self.head {
            OrderHead::Summary(range) | OrderHead::Fetch(range) => range.put(out),
            OrderHead::Copy(copy) => copy.put(out),
            OrderHead::Pull(pull) => pull.put(out),
        }
    }
}

/// What came of an answer.
#[derive(Default, Debug)]
pub(super) struct Taken {
    /// The job that is done with it.
    pub done: Option<usize>,
    /// A node holds a rotten block: shard and index. Another stands in where there is one.
    pub rotten: Option<(NodeIndex, u64, u32)>,
    /// The asked node cannot.
    pub failed: Option<Status>,
    /// A source, and the target that could not pull from it: its blocks come through here.
    pub unreached: Option<(NodeIndex, NodeIndex)>,
    /// With `done`: blocks that stay rotten, because nobody who counts has them intact.
    pub hopeless: Vec<u32>,
}

/// Under which stamp things are asked.
#[derive(Clone, Copy)]
pub(super) struct CopyStamp {
    pub epoch: u64,
    pub generation: u64,
    pub blocks_per_shard: u32,
    pub now_ns: u64,
}

struct Job {
    layer: LayerId,
    shard: u64,
    /// The blocks that may be copied, and those of them that are rotten whatever summaries say.
    range: Range<u32>,
    rotten: Vec<(NodeIndex, u32)>,
    compared: Comparison,
    summaries_missing: u32,
    runs: VecDeque<CopyRun>,
    in_flight: u32,
    /// Pulls in flight whose answers count, each of one target.
    pulls: Vec<CopyRun>,
    /// Its fetches wait for an allowance: nobody waits for it.
    limited: bool,
    /// Nodes that would not fetch by themselves.
    unwilling: NodeMask,
}

/// The shards that are being compared and copied.
#[derive(Default)]
pub(super) struct Copier {
    jobs: Slab<Job>,
    pub orders: VecDeque<Order>,
    /// Data that was copied, and blocks that no replica has intact.
    pub copied_bytes: u64,
    pub bad_blocks: u64,
    /// What limited jobs may fetch; beside clients one small piece at a time.
    pub pacing: Pacing,
    /// Who can fetch from whom.
    pub routes: Routes,
}

impl Copier {
    pub fn paced(pacing: Pacing, routes: Routes) -> Copier {
        Copier { pacing, routes, ..Copier::default() }
    }

    /// Forgets all jobs; their owner no longer knows their answers.
    pub fn drop_jobs(&mut self) {
        self.jobs.clear();
        self.orders.clear();
    }

    /// Compares `shard` of `layer` on all of `members`, and copies what `compared` says.
    pub fn start(
        &mut self,
        (layer, shard): (LayerId, u64),
        compared: Comparison,
        members: NodeMask,
        limited: bool,
        stamp: CopyStamp,
    ) -> usize {
        let range = 0..stamp.blocks_per_shard;
        self.start_range((layer, shard), range, compared, members, limited, stamp)
    }

    /// The same with some blocks of the shard only.
    pub fn start_range(
        &mut self,
        (layer, shard): (LayerId, u64),
        range: Range<u32>,
        compared: Comparison,
        members: NodeMask,
        limited: bool,
        stamp: CopyStamp,
    ) -> usize {
        let job = self.jobs.insert(Job {
            layer,
            shard,
            range,
            rotten: Vec::new(),
            compared,
            summaries_missing: members.0.count_ones(),
            runs: VecDeque::new(),
            in_flight: 0,
            pulls: Vec::new(),
            limited,
            unwilling: NodeMask::EMPTY,
        });
        let (first_block, blocks) = (0, stamp.blocks_per_shard);
        let range = ShardRange { epoch: stamp.epoch, layer, shard, first_block, blocks };
        self.order(members, CopyAsk::Summary { job }, OrderHead::Summary(range), Bytes::new());
        job
    }

    /// A block of a job that was just started is rotten on `node`, though its summary may not say so.
    pub fn is_rotten(&mut self, job: usize, node: NodeIndex, block: u32) {
        self.jobs[job].rotten.push((node, block));
    }

    fn order(&mut self, nodes: NodeMask, ask: CopyAsk, head: OrderHead, payload: Bytes) {
        self.orders.push_back(Order { nodes, ask, head, payload });
    }

    /// Takes `node`'s answer to `ask`.
    ///
    /// # Errors
    /// No honest node answers so.
    pub fn take(
        &mut self,
        node: NodeIndex,
        ask: CopyAsk,
        frame: Frame,
        stamp: CopyStamp,
    ) -> Result<Taken, BadReply> {
        let mut taken = Taken::default();
        if !ask.may_end_with(frame.status) {
            taken.failed = Some(frame.status);
            return Ok(taken);
        }
        let job = match ask {
            CopyAsk::Summary { job } => {
                self.take_summary(node, job, frame, stamp)?;
                job
            }
            CopyAsk::Fetch { job, run } => {
                match frame.status {
                    Status::BadBlock => taken.rotten = Some(self.take_rotten(job, run, frame)?),
                    _ => self.take_fetch(job, run, frame, stamp)?,
                }
                self.jobs[job].in_flight -= 1;
                job
            }
            CopyAsk::Copy { job } => {
                self.jobs[job].in_flight -= 1;
                job
            }
            CopyAsk::Pull { job, run } => {
                let run = run.for_one(node);
                if frame.status == Status::Unreachable {
                    taken.unreached = run.source.map(|source| (source, node));
                }
                taken.rotten = self.take_pull(job, run, frame, stamp)?;
                self.jobs[job].in_flight -= 1;
                job
            }
        };
        if self.pump(job, stamp) {
            let ended = self.jobs.remove(job);
            taken.done = Some(job);
            taken.hopeless = ended.compared.hopeless(ended.range);
        }
        Ok(taken)
    }

    /// Somebody waits for this job: no allowance limits it any more, and nothing of it hangs on a line between
    /// nodes. What is being pulled comes through here; the copies overtake the pulls.
    pub fn urge(&mut self, job: usize, stamp: CopyStamp) {
        if !self.jobs[job].limited {
            return;
        }
        self.jobs[job].limited = false;
        for run in std::mem::take(&mut self.jobs[job].pulls) {
            if let Some(source) = run.source {
                self.fetch(job, source, run, stamp);
            }
        }
        if !self.jobs[job].runs.is_empty() {
            self.pump(job, stamp);
        }
    }

    /// Goes on with jobs that waited for an allowance.
    pub fn pump_all(&mut self, stamp: CopyStamp) {
        let jobs: Vec<usize> = self.jobs.iter().map(|(job, _)| job).collect();
        for job in jobs {
            // One without runs ends with its last answer.
            if !self.jobs[job].runs.is_empty() {
                self.pump(job, stamp);
            }
        }
    }

    /// Keeps fetches in flight; true: the job has nothing left.
    fn pump(&mut self, job_id: usize, stamp: CopyStamp) -> bool {
        loop {
            let narrow = self.pacing.is_beside_clients();
            let job = &mut self.jobs[job_id];
            let at_once = if job.limited && narrow { 1 } else { FETCHES_AT_ONCE };
            if job.summaries_missing > 0 || job.in_flight as usize >= at_once {
                return false;
            }
            if job.runs.is_empty() {
                return job.in_flight == 0;
            }
            if job.limited && !self.pacing.begins(Need::TimeAndBytes) {
                return false;
            }
            let Some(mut run) = job.runs.pop_front() else { return false };
            if narrow && run.blocks > NARROW_BLOCKS {
                let rest = CopyRun {
                    first_block: run.first_block + NARROW_BLOCKS,
                    blocks: run.blocks - NARROW_BLOCKS,
                    ..run
                };
                job.runs.push_front(rest);
                run.blocks = NARROW_BLOCKS;
            }
            let blocks = run.blocks;
            match run.source {
                Some(source) => {
                    let willing = run.targets.without(job.unwilling);
                    let asked = if job.limited { willing } else { NodeMask::EMPTY };
                    let pulling = self.routes.can_pull(source, asked, stamp.now_ns);
                    let targets = run.targets.without(pulling);
                    if pulling.is_empty() {
                        self.fetch(job_id, source, run, stamp);
                    } else if !targets.is_empty() {
                        self.jobs[job_id].runs.push_front(CopyRun { targets, ..run });
                    }
                    self.pull(job_id, source, CopyRun { targets: pulling, ..run }, stamp);
                }
                None => {
                    // No replica that counts has these blocks intact: nobody must pretend to.
                    self.bad_blocks += u64::from(blocks);
                    let bad = vec![(Block::Bad, Tag::NONE); blocks as usize];
                    self.copy(job_id, run, 0, bad, Bytes::new(), stamp);
                }
            }
        }
    }

    fn take_summary(
        &mut self,
        node: NodeIndex,
        job_id: usize,
        frame: Frame,
        stamp: CopyStamp,
    ) -> Result<(), BadReply> {
        let reply = BlocksReply::take(frame.head).map_err(|_| BadReply("malformed summary"))?;
        if reply.blocks.len() != stamp.blocks_per_shard as usize {
            return Err(BadReply("a summary of another length"));
        }
        let job = &mut self.jobs[job_id];
        job.compared.add(node, reply.blocks);
        job.summaries_missing -= 1;
        if job.summaries_missing == 0 {
            for (node, block) in job.rotten.drain(..) {
                job.compared.found_rotten(node, block);
            }
            job.runs = job.compared.copy_runs(job.range.clone());
        }
        Ok(())
    }

    /// Has blocks come through this host.
    fn fetch(&mut self, job_id: usize, source: NodeIndex, run: CopyRun, stamp: CopyStamp) {
        let job = &mut self.jobs[job_id];
        job.in_flight += 1;
        self.pacing.spend(u64::from(run.blocks) * u64::from(BLOCK_BYTES));
        let CopyRun { first_block, blocks, .. } = run;
        let (epoch, layer, shard) = (stamp.epoch, job.layer, job.shard);
        let range = ShardRange { epoch, layer, shard, first_block, blocks };
        let ask = CopyAsk::Fetch { job: job_id, run };
        self.order(NodeMask::one(source), ask, OrderHead::Fetch(range), Bytes::new());
    }

    /// Has the targets fetch blocks by themselves.
    fn pull(&mut self, job_id: usize, source: NodeIndex, run: CopyRun, stamp: CopyStamp) {
        let Some(place) = self.routes.source(source).filter(|_| !run.targets.is_empty()) else {
            return;
        };
        let job = &mut self.jobs[job_id];
        let pull = Pull {
            epoch: stamp.epoch,
            generation: stamp.generation,
            layer: job.layer,
            shard: job.shard,
            first_block: run.first_block,
            blocks: run.blocks,
            source: place,
        };
        let targets = run.targets.0.count_ones();
        job.in_flight += targets;
        job.pulls.extend(run.targets.iter().map(|node| run.for_one(node)));
        self.pacing.spend(u64::from(run.blocks * targets) * u64::from(BLOCK_BYTES));
        let ask = CopyAsk::Pull { job: job_id, run };
        self.order(run.targets, ask, OrderHead::Pull(pull), Bytes::new());
    }

    /// Takes the answer of the one target of `run`. Gives rot that it came upon. Where its blocks come through
    /// here by now, nothing hangs on how it ended.
    fn take_pull(
        &mut self,
        job_id: usize,
        run: CopyRun,
        frame: Frame,
        stamp: CopyStamp,
    ) -> Result<Option<(NodeIndex, u64, u32)>, BadReply> {
        let job = &mut self.jobs[job_id];
        let place = job.pulls.iter().position(|pull| *pull == run);
        let counts = place.map(|place| job.pulls.swap_remove(place)).is_some();
        match frame.status {
            Status::Ok => self.take_pulled(run, frame)?,
            Status::BadBlock if counts => return self.take_rotten(job_id, run, frame).map(Some),
            status if counts => self.pull_failed(job_id, run, status, stamp),
            _ => {}
        }
        Ok(None)
    }

    fn take_pulled(&mut self, run: CopyRun, frame: Frame) -> Result<(), BadReply> {
        let Number(bytes) = Number::take(frame.head).map_err(|_| BadReply("malformed count"))?;
        if bytes > u64::from(run.blocks) * u64::from(BLOCK_BYTES) {
            return Err(BadReply("more was pulled than was ordered"));
        }
        self.copied_bytes += bytes;
        if let Some((source, target)) = run.source.zip(run.targets.first()) {
            self.routes.worked(source, target);
        }
        Ok(())
    }

    /// The target of `run` could not fetch it: for a while what it needs of that source comes through here. One
    /// that would not, because it has too much to do or blocks have changed, is asked again for another shard.
    fn pull_failed(&mut self, job: usize, run: CopyRun, status: Status, stamp: CopyStamp) {
        let job = &mut self.jobs[job];
        match run.source.zip(run.targets.first()) {
            Some((source, target)) if status == Status::Unreachable => {
                self.routes.failed(source, target, stamp.now_ns);
            }
            _ => job.unwilling = job.unwilling.with(run.targets),
        }
        job.runs.push_front(run);
    }

    /// The source of `run` has a rotten block in it: another stands in for that block.
    fn take_rotten(
        &mut self,
        job_id: usize,
        run: CopyRun,
        frame: Frame,
    ) -> Result<(NodeIndex, u64, u32), BadReply> {
        let block = Fields(frame.head).u32().map_err(|_| BadReply("no block named"))?;
        let (Some(source), true) = (run.source, block.wrapping_sub(run.first_block) < run.blocks)
        else {
            return Err(BadReply("rot in a block that was not asked for"));
        };
        let job = &mut self.jobs[job_id];
        let new = job.compared.found_rotten(source, block);
        let again = job.compared.copy_runs(run.first_block..run.first_block + run.blocks);
        // Who else needs the blocks is asked with the word that was new, and once more with its own.
        let wanted = if new { NodeMask(u64::MAX) } else { run.targets };
        let again = again.into_iter().map(|r| CopyRun { targets: r.targets.and(wanted), ..r });
        job.runs.extend(again.filter(|run| !run.targets.is_empty()));
        Ok((source, job.shard, block))
    }

    fn take_fetch(
        &mut self,
        job_id: usize,
        run: CopyRun,
        frame: Frame,
        stamp: CopyStamp,
    ) -> Result<(), BadReply> {
        let reply = BlocksReply::take(frame.head).map_err(|_| BadReply("malformed fetch"))?;
        verify_fetch(&reply, &run, &frame.payload)?;
        self.copy(job_id, run, reply.generation, reply.blocks, frame.payload, stamp);
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
        stamp: CopyStamp,
    ) {
        let targets = run.targets.0.count_ones();
        let job = &mut self.jobs[job_id];
        job.in_flight += targets;
        self.copied_bytes += payload.len() as u64 * u64::from(targets);
        let copy = Copy {
            epoch: stamp.epoch,
            generation: stamp.generation,
            layer: job.layer,
            shard: job.shard,
            shard_generation,
            indexes: (run.first_block..run.first_block + run.blocks).collect(),
            blocks,
        };
        self.order(run.targets, CopyAsk::Copy { job: job_id }, OrderHead::Copy(copy), payload);
    }
}

fn verify_fetch(reply: &BlocksReply, run: &CopyRun, payload: &Bytes) -> Result<(), BadReply> {
    if reply.blocks.len() != run.blocks as usize {
        return Err(BadReply("another number of blocks than asked for"));
    }
    let mut chunks = payload.chunks_exact(BLOCK_BYTES as usize);
    for (block, _) in &reply.blocks {
        if let Block::Data(checksum) = block {
            let intact = chunks.next().is_some_and(|data| checksum_of(data) == *checksum);
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

#[cfg(test)]
mod tests {
    use super::super::background::Background;
    use super::super::pacing::{Limits, Sort};
    use super::*;
    use crate::wire::copies::Source;
    use std::net::SocketAddr;

    const BLOCKS: u32 = SHARD_BYTES_MAX / BLOCK_BYTES;
    const STAMP: CopyStamp =
        CopyStamp { epoch: 1, generation: 1, blocks_per_shard: BLOCKS, now_ns: 0 };

    fn frame(kind: u8, head: &impl Head, payload: Bytes) -> Frame {
        let mut bytes = BytesMut::new();
        head.put(&mut bytes);
        let (head, status) = (bytes.freeze(), Status::Ok);
        Frame { kind, flags: 0, status, channel: 1, tag: 0, head, payload }
    }

    /// Plays a trusted node, and others that lack every `step`th block; gives what was fetched, piece by
    /// piece.
    fn fetched(copier: &mut Copier, step: u32, limited: bool) -> Vec<u32> {
        moved(copier, NodeMask(0b11), step, limited, |_, _| Status::Ok).0
    }

    /// The same for `members`, of which the first is trusted: what was fetched, and what was pulled, by
    /// whom. `pulls` says what becomes of a pull.
    fn moved(
        copier: &mut Copier,
        members: NodeMask,
        step: u32,
        limited: bool,
        mut pulls: impl FnMut(NodeIndex, &Pull) -> Status,
    ) -> (Vec<u32>, Vec<(NodeIndex, u32)>) {
        let trusted = NodeMask::one(members.first().expect("a source"));
        let compared = Comparison::new(trusted, members.without(trusted));
        let _ = copier.start((1, 0), compared, members, limited, STAMP);
        let (mut pieces, mut pulled, mut ended) = (Vec::new(), Vec::new(), false);
        while let Some(order) = copier.orders.pop_front() {
            for node in order.nodes.iter() {
                let mut status = Status::Ok;
                match &order.head {
                    OrderHead::Fetch(range) => pieces.push(range.blocks),
                    OrderHead::Pull(pull) => {
                        status = pulls(node, pull);
                        if status == Status::Ok {
                            pulled.push((node, pull.blocks));
                        }
                    }
                    _ => {}
                }
                let answer = respond(&order, trusted.has(node), step, status);
                let taken = copier.take(node, order.ask.clone(), answer, STAMP);
                ended |= taken.expect("an honest answer").done.is_some();
            }
        }
        assert!(ended, "all is copied");
        (pieces, pulled)
    }

    /// What a trusted node answers, or one that lacks every `step`th block; to a pull with this status.
    fn respond(order: &Order, trusted: bool, step: u32, status: Status) -> Frame {
        let block = vec![7; BLOCK_BYTES as usize];
        let held = (Block::Data(checksum_of(&block)), Tag::NONE);
        let answer = match &order.head {
            OrderHead::Summary(_) => {
                let lacks = |index: &u32| !trusted && index.is_multiple_of(step);
                let absent = (Block::Absent, Tag::NONE);
                let of = |index| if lacks(&index) { absent } else { held };
                let blocks = (0..BLOCKS).map(of).collect();
                frame(kind::SUMMARY, &BlocksReply { generation: 1, blocks }, Bytes::new())
            }
            OrderHead::Fetch(range) => {
                let blocks = vec![held; range.blocks as usize];
                let content = block.repeat(range.blocks as usize);
                let reply = BlocksReply { generation: 1, blocks };
                frame(kind::FETCH, &reply, Bytes::from(content))
            }
            OrderHead::Copy(copy) => frame(kind::COPY, copy, Bytes::new()),
            OrderHead::Pull(pull) => {
                let bytes = Number(u64::from(pull.blocks * BLOCK_BYTES));
                let block = Bytes::copy_from_slice(&pull.first_block.to_le_bytes());
                let frame = frame(kind::PULL, &bytes, Bytes::new());
                let head = if status == Status::Ok { frame.head.clone() } else { block };
                Frame { status, head, ..frame }
            }
        };
        assert!(answer.head.len() <= HEAD_BYTES_MAX);
        answer
    }

    fn routed(nodes: &[NodeIndex]) -> Copier {
        let copier = Copier::default();
        for node in nodes {
            let address = SocketAddr::from(([127, 0, 0, 1], 7000 + u16::from(*node)));
            copier.routes.set(*node, Some(Source { node: format!("node{node}"), address }));
        }
        copier
    }

    #[test]
    fn what_nobody_waits_for_targets_fetch_by_themselves() {
        let mut copier = routed(&[0]);
        let (pieces, pulled) = moved(&mut copier, NodeMask(0b111), 1, true, |_, pull| {
            match pull.source.node == "node0" {
                true => Status::Ok,
                false => Status::Malformed,
            }
        });
        assert_eq!(pieces, []);
        for node in [1, 2] {
            let of_node = pulled.iter().filter(|(by, _)| *by == node);
            assert_eq!(of_node.map(|(_, blocks)| blocks).sum::<u32>(), BLOCKS);
        }
        assert_eq!(copier.copied_bytes, 2 * u64::from(BLOCKS * BLOCK_BYTES));
    }

    #[test]
    fn what_somebody_waits_for_or_comes_from_nobody_knows_where_goes_through_here() {
        let (pieces, pulled) =
            moved(&mut routed(&[0]), NodeMask(0b11), 1, false, |_, _| Status::Ok);
        assert_eq!((pieces.iter().sum(), pulled), (BLOCKS, vec![]));
        let (pieces, pulled) = moved(&mut routed(&[1]), NodeMask(0b11), 1, true, |_, _| Status::Ok);
        assert_eq!((pieces.iter().sum(), pulled), (BLOCKS, vec![]));
    }

    #[test]
    fn a_target_that_cannot_reach_the_source_is_served_from_here_and_others_go_on() {
        for failure in [Status::Unreachable, Status::Cancelled] {
            let (pieces, pulled) =
                moved(&mut routed(&[0]), NodeMask(0b111), 1, true, |node, _| match node {
                    1 => failure,
                    _ => Status::Ok,
                });
            assert_eq!(pieces.iter().sum::<u32>(), BLOCKS);
            assert_eq!(pulled.iter().map(|(_, blocks)| blocks).sum::<u32>(), BLOCKS);
            assert!(pulled.iter().all(|(node, _)| *node == 2));
        }
    }

    /// A client began to wait for a shard that was being pulled over a line that swallowed everything, and
    /// waited until the target gave the line up: for four seconds and more.
    #[test]
    fn what_is_being_pulled_comes_through_here_as_soon_as_somebody_waits() {
        for ends in [Status::Cancelled, Status::Unreachable, Status::BadBlock, Status::Ok] {
            let mut copier = routed(&[0]);
            let (trusted, targets) = (NodeMask(0b1), NodeMask(0b110));
            let compared = Comparison::new(trusted, targets);
            let job = copier.start((1, 0), compared, NodeMask(0b111), true, STAMP);
            let (mut silent, mut copied, mut done) = (Vec::new(), [0; 3], false);
            while let Some(order) = copier.orders.pop_front() {
                for node in order.nodes.iter() {
                    if let OrderHead::Pull(_) = order.head {
                        silent.push((node, order.ask.clone(), respond(&order, false, 1, ends)));
                        continue;
                    }
                    let answer = respond(&order, trusted.has(node), 1, Status::Ok);
                    let _ = copier.take(node, order.ask.clone(), answer, STAMP);
                }
            }
            assert_eq!(silent.len(), 2, "nothing else comes");
            copier.urge(job, STAMP);
            while let Some(order) = copier.orders.pop_front() {
                for node in order.nodes.iter() {
                    let mut answers = VecDeque::new();
                    answers.push_back((order.ask.clone(), respond(&order, true, 1, Status::Ok)));
                    if let OrderHead::Copy(copy) = &order.head {
                        copied[usize::from(node)] += copy.indexes.len() as u32;
                        // It is overtaken, if it had not ended otherwise.
                        if let Some(at) = silent.iter().position(|(of, ..)| *of == node) {
                            let (_, ask, answer) = silent.swap_remove(at);
                            answers.push_front((ask, answer));
                        }
                    }
                    for (ask, answer) in answers {
                        let taken = copier.take(node, ask, answer, STAMP).expect("honest");
                        assert_eq!((taken.rotten, taken.failed), (None, None));
                        done |= taken.done.is_some();
                    }
                }
            }
            assert_eq!((copied, done, silent.len()), ([0, BLOCKS, BLOCKS], true, 0));
            assert!(copier.jobs.is_empty());
        }
    }

    /// Two targets hear of the same rot from the one source that both ask: the second's word was taken for
    /// a mistake.
    #[test]
    fn rot_that_two_targets_come_upon_has_another_stand_in_for_both() {
        let mut copier = routed(&[0, 1]);
        let members = NodeMask(0b1111);
        let block = vec![7; BLOCK_BYTES as usize];
        let held = (Block::Data(checksum_of(&block)), Tag::NONE);
        let compared = Comparison::new(NodeMask(0b11), NodeMask(0b1100));
        let _ = copier.start((1, 0), compared, members, true, STAMP);
        let (mut rotten, mut given) = (0, [0; 4]);
        while let Some(order) = copier.orders.pop_front() {
            for node in order.nodes.iter() {
                let answer = match &order.head {
                    OrderHead::Summary(_) => {
                        let absent = (Block::Absent, Tag::NONE);
                        let of = |index| if node > 1 && index < 4 { absent } else { held };
                        let blocks = (0..BLOCKS).map(of).collect();
                        frame(kind::SUMMARY, &BlocksReply { generation: 1, blocks }, Bytes::new())
                    }
                    OrderHead::Pull(pull) => {
                        let range = pull.first_block..pull.first_block + pull.blocks;
                        let bad = pull.source.node == "node0" && range.contains(&2);
                        given[usize::from(node)] += if bad { 0 } else { pull.blocks };
                        let status = if bad { Status::BadBlock } else { Status::Ok };
                        let bytes = Number(u64::from(pull.blocks * BLOCK_BYTES));
                        let frame = frame(kind::PULL, &bytes, Bytes::new());
                        let head = match bad {
                            true => Bytes::copy_from_slice(&2u32.to_le_bytes()),
                            false => frame.head.clone(),
                        };
                        Frame { status, head, ..frame }
                    }
                    _ => panic!("nothing goes through here"),
                };
                let taken = copier.take(node, order.ask.clone(), answer, STAMP);
                let taken = taken.expect("an honest answer");
                assert_eq!(taken.failed, None);
                rotten += usize::from(taken.rotten == Some((0, 0, 2)));
            }
        }
        assert!(copier.jobs.is_empty() && rotten == 2);
        assert!(given[2] >= 4 && given[3] >= 4, "{given:?}");
    }

    #[test]
    fn whole_shard_that_differs_travels_in_pieces_that_fit() {
        let pieces = fetched(&mut Copier::default(), 1, false);
        assert_eq!(pieces.iter().sum::<u32>(), BLOCKS);
        assert!(pieces.iter().all(|blocks| blocks * BLOCK_BYTES <= PAYLOAD_BYTES_MAX as u32));
    }

    #[test]
    fn beside_clients_every_piece_is_small_also_of_what_somebody_waits_for() {
        let background = Background::default();
        let limits = Limits { bytes_per_second: 0, share_percent: 25 };
        let mut copier = Copier::paced(background.join(1, Sort::Copies, limits), Routes::default());
        background.asked(1_000_000_000);
        assert!(copier.pacing.is_beside_clients());
        let pieces = fetched(&mut copier, 1, false);
        assert_eq!(pieces.iter().sum::<u32>(), BLOCKS);
        assert!(pieces.iter().all(|blocks| *blocks <= NARROW_BLOCKS));
    }

    #[test]
    fn blocks_that_differ_here_and_there_travel_alone() {
        let pieces = fetched(&mut Copier::default(), 2, false);
        assert_eq!((pieces.len(), pieces[0]), (BLOCKS as usize / 2, 1));
    }
}
