//! What was written since a snapshot: which shards have anything of it, and what of each block.
//!
//! A wide question is asked in two: first for the shards that the layers above the snapshot have something of,
//! page by page, of one node of each replica set; then for the blocks of these, which is ordered with writes and
//! levelling as reads are. The first answer may name too many shards, and names all that were written when
//! it was asked: a node that may lack some is doubtful in these, and they are added here.

use super::image::{ImageIo, Part, RequestKind};
use super::reads::Piece;
use super::replies::BadReply;
use super::{Extent, IoError, NodeIndex, NodeMask, Outcome, Output, Token};
use crate::geometry::{BLOCK_BYTES, Geometry, SnapshotId};
use crate::wire::changes::{
    ChangedRun, ChangesAsked, ChangesReply, Held, TouchedAsked, TouchedReply,
};
use crate::wire::messages::{Head, Io};
use crate::wire::{Frame, kind};
use bytes::Bytes;
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

/// What a request for changes asks for, and the shards found so far.
#[derive(Default)]
pub(super) struct Changes {
    /// The newest first. TOUCHED: one, or none where all layers count.
    pub since: Arc<[SnapshotId]>,
    pub shards: Range<u64>,
    pub touched: BTreeSet<u64>,
}

impl Changes {
    pub fn since(since: Arc<[SnapshotId]>) -> Changes {
        Changes { since, ..Changes::default() }
    }

    /// In the shards of a range.
    pub fn within(
        geometry: &Geometry,
        offset: u64,
        length: u64,
        since: Option<SnapshotId>,
    ) -> Changes {
        let end = (offset + length).div_ceil(u64::from(geometry.shard_bytes));
        let shards = geometry.shard_of(offset)..end;
        Changes { since: since.into_iter().collect(), shards, touched: BTreeSet::new() }
    }
}

/// How far one replica set's listing of shards is. It stays with a node, as places are that one's own.
#[derive(Clone, Copy, Default)]
pub(super) struct Listing {
    pub node: Option<NodeIndex>,
    generation: u64,
    place: u32,
    shard: u64,
}

impl Listing {
    /// The next question to `node`; another one than before is asked from the beginning.
    pub fn ask(&mut self, node: NodeIndex, changes: &Changes, epoch: u64) -> TouchedAsked {
        if self.node != Some(node) {
            *self = Listing { node: Some(node), ..Listing::default() };
        }
        TouchedAsked {
            epoch,
            since: changes.since.first().copied(),
            first_shard: changes.shards.start,
            end_shard: changes.shards.end,
            generation: self.generation,
            place: self.place,
            shard: self.shard,
        }
    }

    /// Takes a page; whether there is another one. Under another record the node has begun anew.
    pub fn take(&mut self, head: Bytes, changes: &mut Changes) -> Result<bool, BadReply> {
        let reply = TouchedReply::take(head).map_err(|_| BadReply("malformed list of shards"))?;
        if reply.shards.iter().any(|shard| !changes.shards.contains(shard)) {
            return Err(BadReply("a shard that was not asked for"));
        }
        changes.touched.extend(reply.shards);
        let Some((place, shard)) = reply.next else { return Ok(false) };
        let gets_on = (place, shard) > (self.place, self.shard);
        if reply.generation == self.generation && !gets_on {
            return Err(BadReply("a listing that does not get on"));
        }
        (self.generation, self.place, self.shard) = (reply.generation, place, shard);
        Ok(true)
    }
}

/// The extents of a piece, from the answer to CHANGES.
pub(super) fn extents_of(
    frame: Frame,
    since: usize,
    offset: u32,
    length: u32,
) -> Result<Vec<Extent>, BadReply> {
    let reply = ChangesReply::take(frame.head).map_err(|_| BadReply("malformed runs"))?;
    let skip = offset % BLOCK_BYTES;
    let expected = u64::from((skip + length).div_ceil(BLOCK_BYTES));
    let blocks: u64 = reply.runs.iter().map(|run| u64::from(run.blocks)).sum();
    if blocks != expected || reply.runs.iter().any(|run| usize::from(run.changed) > since) {
        return Err(BadReply("other runs than asked for"));
    }
    let (mut at, end) = (0, u64::from(skip + length));
    let extents = reply.runs.iter().map(|run| {
        let first = at;
        at = (first + u64::from(run.blocks) * u64::from(BLOCK_BYTES)).min(end);
        let first = first.max(u64::from(skip));
        extent_of(run, (at - first) as u32)
    });
    Ok(extents.collect())
}

fn extent_of(run: &ChangedRun, length: u32) -> Extent {
    let (hole, zero) = (run.held == Held::Absent, run.held != Held::Data);
    Extent { length, hole, zero, depth: run.depth, changed: run.changed }
}

impl ImageIo {
    /// What each block of the range is, the layer that it is in, and since which snapshots it was written; the
    /// newest snapshot first.
    pub fn changes(&mut self, token: Token, offset: u64, length: u32, since: Arc<[SnapshotId]>) {
        let changes = Changes::since(since);
        self.submit_request(
            token,
            RequestKind::Changes,
            (offset, length),
            0,
            Bytes::new(),
            changes,
        );
    }

    /// The shards of the range that were written since a snapshot, or ever; answered with `Outcome::Shards`,
    /// which may name others too.
    pub fn touched(&mut self, token: Token, offset: u64, length: u64, since: Option<SnapshotId>) {
        let geometry = self.spec.geometry;
        if offset.checked_add(length).is_none_or(|end| end > geometry.size_bytes) {
            let outcome = Outcome::Failed(IoError::Io);
            return self.outputs.push_back(Output::Answer { token, outcome });
        }
        let changes = Changes::within(&geometry, offset, length, since);
        self.submit_request(token, RequestKind::Touched, (0, 0), 0, Bytes::new(), changes);
    }

    /// Asks a node of each replica set; no lock is taken, as what is written meanwhile need not be told.
    pub(super) fn start_touched(&mut self, request: usize) {
        let sets = self.spec.geometry.replica_sets;
        self.requests[request].parts_left = sets;
        let shard = self.requests[request].changes.shards.start;
        for set in 0..sets {
            let piece = Piece { shard, offset: 0, length: 0 };
            let part = self.new_part(request, set, RequestKind::Touched, piece, 0, Bytes::new());
            self.parts[part].set = set;
            self.dispatch_read(part);
        }
    }

    /// Nodes that are not to be asked yet. Who is doubtful somewhere can list shards all the same.
    pub(super) fn gated_of(&self, part: &Part) -> NodeMask {
        match part.kind {
            RequestKind::Touched => NodeMask::EMPTY,
            _ => self.gated(part.shard),
        }
    }

    pub(super) fn ask_touched(&mut self, node: NodeIndex, id: usize) {
        let (tag, epoch) = (self.tag_of(id), self.spec.epoch);
        let part = &mut self.parts[id];
        let asked = part.listing.ask(node, &self.requests[part.request].changes, epoch);
        self.send(NodeMask::one(node), kind::TOUCHED, 0, tag, &Bytes::new(), |out| asked.put(out));
    }

    pub(super) fn ask_changes(&mut self, node: NodeMask, tag: u64, request: usize, io: Io) {
        let since = self.requests[request].changes.since.clone();
        let asked = ChangesAsked { io, since };
        self.send(node, kind::CHANGES, 0, tag, &Bytes::new(), |out| asked.put(out));
    }

    /// Takes a page of shards; whether there is another one to ask for.
    pub(super) fn take_touched(&mut self, id: usize, frame: Frame) -> Result<bool, BadReply> {
        let part = &mut self.parts[id];
        part.listing.take(frame.head, &mut self.requests[part.request].changes)
    }

    /// What was listed, and what a node may have lacked.
    pub(super) fn touched_shards(&self, changes: &Changes) -> Vec<u64> {
        let mut touched = changes.touched.clone();
        let doubtful = changes.shards.clone().filter(|shard| !self.gated(*shard).is_empty());
        touched.extend(doubtful);
        touched.into_iter().collect()
    }
}
