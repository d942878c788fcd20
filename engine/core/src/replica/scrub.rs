//! Scrub: every block on every node in sync is read and verified, and what the nodes read is compared.
//!
//! | stage | what goes on |
//! | --- | --- |
//! | `Listing` | the nodes in sync are asked which shards there are |
//! | `Reading` | piece by piece the nodes read their blocks and answer with digests |
//! | `Ending` | what was found is being repaired |
//!
//! Digests are compared beside the clients' writes first. Where they differ, a write in flight is the
//! likely reason: the piece is read once more with writes to it paused, now with summaries, and judged
//! block by block. Rot that shows (a checksum) is repaired from any other node in sync, rot that carries a
//! valid checksum from the majority, or by write tags where there are two; where nothing decides, it is
//! told and left alone.
//!
//! Stale nodes are not read. A node in sync that is away is passed over, and named at the end, with the
//! shards that it was passed over in: a later scrub reads these again.

use super::asks::Asks;
use super::background::Pacing;
use super::compare::{Judgement, judge};
use super::image::{ImageIo, Phase, RequestKind};
use super::pacing::{Limits, Need, Sort};
use super::replies::BadReply;
use super::shard_set::ShardSet;
use super::{Event, NodeIndex, NodeMask};
use crate::content::Block;
use crate::geometry::{BLOCK_BYTES, IMAGE_BYTES_MAX, LayerId, Tag};
use crate::wire::messages::{
    BlocksReply, Head, SCRUB_BLOCKS_MAX, ScrubReply, ShardRange, WRITTEN_SHARDS_MAX, WrittenAbove,
    WrittenReply,
};
use crate::wire::{Frame, Status, kind};
use bytes::Bytes;
use std::ops::Range;

/// Blocks that are read at once, and beside clients.
const BLOCKS: u32 = SCRUB_BLOCKS_MAX as u32;
const BLOCKS_BESIDE_CLIENTS: u32 = 64;
/// How long the end waits for repairs; those that wait for a node that is away go on after it.
const REPAIRS_NS: u64 = 10_000_000_000;

/// A scrub as policy orders it.
#[derive(Clone, Debug)]
pub struct ScrubSpec {
    /// Given back in its events.
    pub attempt: u64,
    /// Shards below it were read before.
    pub from_shard: u64,
    /// Shards from it on are not read; none: all are.
    pub end_shard: Option<u64>,
    /// 0: as fast as it goes.
    pub bytes_per_second: u64,
    /// The part of the time that it may have something under way while clients ask for something.
    pub share_percent: u64,
}

/// How far a scrub is, and what it found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScrubState {
    pub attempt: u64,
    /// All shards below it are read.
    pub next_shard: u64,
    pub shards_left: u64,
    pub shards_done: u64,
    /// Of data, on one node.
    pub read_bytes: u64,
    /// Blocks found bad, made good and given up since it began.
    pub found: u64,
    pub repaired: u64,
    pub given_up: u64,
    /// Blocks whose replicas differ and nothing says which is right.
    pub undecided: u64,
    /// Nodes in sync that were away for some of it.
    pub missed: Vec<String>,
    /// The first shard that they were passed over in, and the one behind the last.
    pub missed_shards: Option<(u64, u64)>,
}

/// What a frame in flight was for.
#[derive(Clone, Debug)]
enum Ask {
    Written { from: (u32, u64) },
    Read,
    Summary,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Listing,
    Reading,
    Ending { since_ns: u64 },
}

/// Blocks that are being read.
struct Piece {
    shard: u64,
    layer: LayerId,
    range: Range<u32>,
    members: NodeMask,
    read: Vec<(NodeIndex, ScrubReply)>,
    /// With writes paused: the request that does it, and what the blocks are.
    pause: Option<usize>,
    paused: bool,
    summaries: Vec<(NodeIndex, Vec<(Block, Tag)>)>,
}

/// The scrub under way.
pub(super) struct Scrub {
    spec: ScrubSpec,
    stage: Stage,
    asks: Asks<Ask>,
    shards: ShardSet,
    /// Shard, index of the layer and block that are read next.
    at: (u64, usize, u32),
    piece: Option<Piece>,
    pacing: Pacing,
    done: ScrubState,
    /// What had been found, repaired and given up when it began.
    before: (u64, u64, u64),
    missed: NodeMask,
}

impl ImageIo {
    /// Begins a scrub; `Event::ScrubEnded` tells how it went.
    pub fn scrub(&mut self, spec: ScrubSpec) {
        let attempt = spec.attempt;
        if self.phase != Phase::Running || self.scrub.is_some() {
            let report = ScrubState { attempt, next_shard: spec.from_shard, ..Default::default() };
            let status = Some(Status::NoSession);
            return self.event(Event::ScrubEnded { status, report });
        }
        let rot = self.rot_state();
        let asks = Asks::new(self.next_serial());
        let (bytes_per_second, share_percent) = (spec.bytes_per_second, spec.share_percent);
        let limits = Limits { bytes_per_second, share_percent };
        self.scrub = Some(Scrub {
            stage: Stage::Listing,
            asks,
            shards: ShardSet::default(),
            at: (spec.from_shard, 0, 0),
            piece: None,
            pacing: self.background.join(self.spec.channel, Sort::Scrubs, limits),
            done: ScrubState { attempt, ..Default::default() },
            before: (rot.found, rot.repaired, rot.given_up),
            missed: NodeMask::EMPTY,
            spec,
        });
        self.list_for_scrub();
    }

    /// Policy ends the scrub, if it is still that one.
    pub fn end_scrub(&mut self, attempt: u64) {
        if self.scrub.as_ref().is_some_and(|scrub| scrub.spec.attempt == attempt) {
            self.stop_scrub(Some(Status::NoSession));
        }
    }

    pub fn is_scrubbing(&self) -> bool {
        self.scrub.is_some()
    }

    /// How far the scrub under way is.
    pub fn scrub_state(&self) -> Option<ScrubState> {
        let scrub = self.scrub.as_ref()?;
        let rot = self.rot_state();
        let mut left = 0;
        let mut at = scrub.at.0;
        // Counted by words of a set that is small.
        let last = scrub.spec.end_shard;
        while let Some(shard) = scrub.shards.next(at)
            && last.is_none_or(|last| shard < last)
        {
            left += 1;
            let Some(next) = shard.checked_add(1) else { break };
            at = next;
        }
        Some(ScrubState {
            next_shard: scrub.at.0,
            shards_left: if scrub.stage == Stage::Listing { 0 } else { left },
            found: rot.found - scrub.before.0,
            repaired: rot.repaired - scrub.before.1,
            given_up: rot.given_up - scrub.before.2,
            missed: scrub
                .missed
                .iter()
                .map(|node| self.replicas[usize::from(node)].name.clone())
                .collect(),
            ..scrub.done.clone()
        })
    }

    fn stop_scrub(&mut self, status: Option<Status>) {
        self.drop_piece();
        let Some(report) = self.scrub_state() else { return };
        self.scrub = None;
        self.event(Event::ScrubEnded { status, report });
    }

    /// Ends it with the image, in whatever way that ends.
    pub(super) fn close_scrub(&mut self) {
        self.stop_scrub(Some(Status::NoSession));
    }

    // The list

    fn list_for_scrub(&mut self) {
        let asks = Asks::new(self.next_serial());
        let Some(scrub) = &mut self.scrub else { return };
        scrub.asks = asks;
        let members = self.in_sync_anywhere().and(self.up());
        members.iter().for_each(|node| self.ask_shards(node, (0, 0)));
    }

    fn ask_scrub(
        &mut self,
        node: NodeIndex,
        ask: Ask,
        frame_kind: u8,
        put: impl FnOnce(&mut bytes::BytesMut),
    ) {
        let Some(scrub) = &mut self.scrub else { return };
        let tag = scrub.asks.add(node, ask);
        self.send(NodeMask::one(node), frame_kind, 0, tag, &Bytes::new(), put);
    }

    fn ask_shards(&mut self, node: NodeIndex, from: (u32, u64)) {
        let (epoch, (place, shard)) = (self.spec.epoch, from);
        let head = WrittenAbove { epoch, generation: 0, place, shard };
        self.ask_scrub(node, Ask::Written { from }, kind::WRITTEN, |out| head.put(out));
    }

    fn take_shards(
        &mut self,
        node: NodeIndex,
        from: (u32, u64),
        frame: Frame,
    ) -> Result<(), BadReply> {
        let reply = WrittenReply::take(frame.head).map_err(|_| BadReply("malformed list"))?;
        let gets_on = reply.next.is_none_or(|next| next > from);
        let last = IMAGE_BYTES_MAX / u64::from(self.spec.geometry.shard_bytes);
        if reply.shards.len() > WRITTEN_SHARDS_MAX
            || !gets_on
            || reply.shards.iter().any(|shard| *shard > last)
        {
            return Err(BadReply("a list out of order"));
        }
        let Some(scrub) = &mut self.scrub else { return Ok(()) };
        reply.shards.iter().for_each(|shard| _ = scrub.shards.insert(*shard));
        match reply.next {
            Some(next) => self.ask_shards(node, next),
            None if scrub.asks.is_empty() => scrub.stage = Stage::Reading,
            None => {}
        }
        Ok(())
    }

    // Reading

    /// Takes an answer to one of the scrub's own frames.
    pub(super) fn take_scrub(&mut self, node: NodeIndex, frame: Frame) -> Result<(), BadReply> {
        let Some(scrub) = &mut self.scrub else { return Ok(()) };
        let Some(ask) = scrub.asks.take(node, frame.tag) else { return Ok(()) };
        if frame.status != Status::Ok {
            self.stop_scrub(Some(frame.status));
            return Ok(());
        }
        match ask {
            Ask::Written { from } => self.take_shards(node, from, frame)?,
            Ask::Read => {
                let reply =
                    ScrubReply::take(frame.head).map_err(|_| BadReply("malformed scrub"))?;
                let Some(piece) = &mut scrub.piece else { return Ok(()) };
                if reply.rotten.iter().any(|block| !piece.range.contains(block)) {
                    return Err(BadReply("a block that was not asked for"));
                }
                piece.read.push((node, reply));
            }
            Ask::Summary => {
                let reply =
                    BlocksReply::take(frame.head).map_err(|_| BadReply("malformed summary"))?;
                let Some(piece) = &mut scrub.piece else { return Ok(()) };
                if reply.blocks.len() != piece.range.len() {
                    return Err(BadReply("a summary of another length"));
                }
                piece.summaries.push((node, reply.blocks));
            }
        }
        self.go_on_scrubbing();
        Ok(())
    }

    pub(super) fn go_on_scrubbing(&mut self) {
        loop {
            let Some(scrub) = &self.scrub else { return };
            if !scrub.asks.is_empty() {
                return;
            }
            if scrub.piece.is_some() {
                if !self.piece_read() {
                    return;
                }
                continue;
            }
            match scrub.stage {
                Stage::Listing => return,
                Stage::Ending { since_ns } => {
                    let late = self.now_ns.saturating_sub(since_ns) > REPAIRS_NS;
                    if self.repairs.is_idle() || late {
                        self.stop_scrub(None);
                    }
                    return;
                }
                Stage::Reading => {}
            }
            // What makes replicas equal goes first, and what is found has to find room.
            // One that is unfounded in a set is passed over there.
            let level = |node: NodeIndex| self.replicas[usize::from(node)].doubtful.is_empty();
            let level = self.up().iter().all(level);
            let others = self.heal.is_some() || self.admission.is_some() || !level;
            if others || !self.repairs.has_room() || !scrub.pacing.begins(Need::TimeAndBytes) {
                return;
            }
            if !self.next_piece() {
                return;
            }
        }
    }

    /// Goes on to the next blocks; false: none of the nodes that have them is there.
    fn next_piece(&mut self) -> bool {
        let shard_blocks = self.spec.geometry.shard_bytes / BLOCK_BYTES;
        let up = self.up();
        let Some(scrub) = &mut self.scrub else { return false };
        let (at, layer_index, first) = scrub.at;
        let last = scrub.spec.end_shard;
        let next = scrub.shards.next(at).filter(|shard| last.is_none_or(|last| *shard < last));
        let Some(shard) = next else {
            scrub.stage = Stage::Ending { since_ns: self.now_ns };
            return true;
        };
        let set = &self.sets[self.spec.geometry.replica_set_of(shard) as usize];
        let in_sync = set.in_sync;
        let members = in_sync.and(up).without(set.unfounded);
        let passed_over = in_sync.without(members);
        if !passed_over.is_empty() {
            scrub.missed = scrub.missed.with(passed_over);
            let first = scrub.done.missed_shards.map_or(shard, |(first, _)| first.min(shard));
            scrub.done.missed_shards = Some((first, shard.saturating_add(1)));
        }
        if members.is_empty() {
            return false;
        }
        let (layer_index, first) = if shard == at { (layer_index, first) } else { (0, 0) };
        let Some(layer) = self.spec.layers.get(layer_index).copied() else {
            scrub.done.shards_done += 1;
            // Beyond the last there is none; the list then has nothing more.
            scrub.at = (shard.saturating_add(1), 0, 0);
            return true;
        };
        let most = match scrub.pacing.is_beside_clients() {
            true => BLOCKS_BESIDE_CLIENTS,
            false => BLOCKS,
        };
        let range = first..(first + most).min(shard_blocks);
        scrub.at = match range.end == shard_blocks {
            true => (shard, layer_index + 1, 0),
            false => (shard, layer_index, range.end),
        };
        scrub.piece = Some(Piece {
            shard,
            layer,
            range,
            members,
            read: Vec::new(),
            pause: None,
            paused: false,
            summaries: Vec::new(),
        });
        self.read_piece();
        true
    }

    fn read_piece(&mut self) {
        let epoch = self.spec.epoch;
        let Some(piece) = self.scrub.as_mut().and_then(|scrub| scrub.piece.as_mut()) else {
            return;
        };
        let Piece { shard, layer, ref range, members, paused, .. } = *piece;
        let (first_block, blocks) = (range.start, range.len() as u32);
        piece.read.clear();
        let head = ShardRange { epoch, layer, shard, first_block, blocks };
        for node in members.iter() {
            self.ask_scrub(node, Ask::Read, kind::SCRUB, |out| head.put(out));
            if paused {
                self.ask_scrub(node, Ask::Summary, kind::SUMMARY, |out| head.put(out));
            }
        }
    }

    /// All have answered. False: the piece waits for a pause.
    fn piece_read(&mut self) -> bool {
        let Some(scrub) = &mut self.scrub else { return false };
        let Some(piece) = &mut scrub.piece else { return false };
        if piece.pause.is_some() && !piece.paused {
            return false;
        }
        let shard = piece.shard;
        let rewritten = piece.read.iter_mut().filter(|(_, reply)| reply.metadata_rewritten);
        let rewritten: Vec<NodeIndex> = rewritten
            .map(|(node, reply)| {
                reply.metadata_rewritten = false;
                *node
            })
            .collect();
        for node in rewritten {
            self.metadata_repaired(node, shard);
        }
        let Some(piece) = self.scrub.as_mut().and_then(|scrub| scrub.piece.as_mut()) else {
            return false;
        };
        let equal = piece.read.windows(2).all(|pair| pair[0].1.digest == pair[1].1.digest);
        if !equal && !piece.paused {
            let range = piece.range.clone();
            let (offset, length) = self.range_bytes(shard, &range);
            let pause = self.own_request(RequestKind::Pause, offset, length);
            if let Some(piece) = self.scrub.as_mut().and_then(|scrub| scrub.piece.as_mut()) {
                piece.pause = Some(pause);
            }
            self.enter(pause, RequestKind::Pause, offset, length);
            return false;
        }
        let Some(piece) = self.scrub.as_mut().and_then(|scrub| scrub.piece.take()) else {
            return false;
        };
        if let Some(pause) = piece.pause {
            self.finish_request(pause);
        }
        self.judge_piece(piece, equal);
        true
    }

    /// No write to the piece is in flight; false: the pause is not the scrub's.
    pub(super) fn scrub_paused(&mut self, pause: usize) -> bool {
        let piece = self.scrub.as_mut().and_then(|scrub| scrub.piece.as_mut());
        let Some(piece) = piece.filter(|piece| piece.pause == Some(pause)) else { return false };
        piece.paused = true;
        self.read_piece();
        true
    }

    fn judge_piece(&mut self, piece: Piece, equal: bool) {
        let Some(scrub) = &mut self.scrub else { return };
        let data = piece.read.iter().map(|(_, reply)| reply.data_blocks).max().unwrap_or(0);
        let bytes = u64::from(data) * u64::from(BLOCK_BYTES);
        scrub.done.read_bytes += bytes;
        scrub.pacing.spend(bytes);
        let mut undecided = Vec::new();
        let mut differ = false;
        for block in piece.range.clone().filter(|_| !equal) {
            let intact = piece.summaries.iter().filter_map(|(node, blocks)| {
                let is_rotten = |(other, reply): &(NodeIndex, ScrubReply)| {
                    other == node && reply.rotten.binary_search(&block).is_ok()
                };
                let (content, tag) = blocks[(block - piece.range.start) as usize];
                let rotten = content == Block::Bad || piece.read.iter().any(is_rotten);
                (!rotten).then_some((*node, content, tag))
            });
            match judge(&intact.collect::<Vec<_>>()) {
                Judgement::Equal => {}
                Judgement::Wrong { right, wrong } => {
                    differ = true;
                    for node in wrong.iter() {
                        self.found_difference(node, piece.shard, block, right);
                    }
                }
                Judgement::Undecided => undecided.push(block),
            }
        }
        let sound = piece.read.iter().filter(|(_, reply)| reply.rotten.is_empty());
        let mut digests = sound.map(|(_, reply)| reply.digest);
        let first = digests.next();
        if !equal && !differ && digests.any(|digest| Some(digest) != first) && undecided.is_empty()
        {
            // Other content under the same checksums.
            undecided.extend(piece.range.clone());
        }
        let members = piece.members;
        self.tell_undecided(piece.shard, members, &undecided);
        for (node, reply) in piece.read {
            // Of what nobody can tell which is right, nothing is spread.
            let rotten = reply.rotten.into_iter().filter(|block| !undecided.contains(block));
            self.found_rotten_blocks(node, piece.shard, &rotten.collect::<Vec<u32>>());
        }
        self.start_repairs();
    }

    fn tell_undecided(&mut self, shard: u64, nodes: NodeMask, blocks: &[u32]) {
        for run in super::repair::runs(blocks) {
            let count = run.end - run.start;
            if let Some(scrub) = &mut self.scrub {
                scrub.done.undecided += u64::from(count);
            }
            self.event(Event::Undecided { nodes, shard, block: run.start, blocks: count });
        }
    }

    /// Nodes have come or gone, or the record says something else: what is under way is begun anew.
    pub(super) fn restart_scrub(&mut self) {
        let Some(scrub) = &self.scrub else { return };
        if scrub.stage == Stage::Listing {
            return self.list_for_scrub();
        }
        self.drop_piece();
    }

    /// The image has other layers: the shard that is next is read from its first one on.
    pub(super) fn rescrub_layers(&mut self) {
        if let Some(scrub) = self.scrub.as_mut().filter(|scrub| scrub.piece.is_none()) {
            (scrub.at.1, scrub.at.2) = (0, 0);
        }
    }

    /// Forgets the piece that is being read; it is the next one again.
    fn drop_piece(&mut self) {
        let asks = Asks::new(self.next_serial());
        let Some(scrub) = &mut self.scrub else { return };
        scrub.asks = asks;
        let Some(piece) = scrub.piece.take() else { return };
        let layer = self.spec.layers.iter().position(|layer| *layer == piece.layer);
        scrub.at = (piece.shard, layer.unwrap_or(0), piece.range.start);
        if let Some(pause) = piece.pause {
            self.withdraw_pause(pause);
        }
    }

    pub(super) fn report_scrub(&self) {
        if let Some(scrub) = &self.scrub {
            scrub.pacing.report(self.now_ns, !scrub.asks.is_empty());
        }
    }
}
