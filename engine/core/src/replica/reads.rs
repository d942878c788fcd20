//! What reads of all kinds share: cutting ranges into pieces, choosing who is asked, and verifying answers.

use super::image::RequestKind;
use super::replies::BadReply;
use super::{Extent, NodeIndex, NodeMask};
use crate::checksum::checksum_of;
use crate::content::{Block, Run};
use crate::geometry::{BLOCK_BYTES, Geometry};
use crate::rules::{Rule, broken};
use crate::wire::messages::{Io, take_blocks};
use crate::wire::{Frame, PAYLOAD_BYTES_MAX};
use bytes::Bytes;

/// Writes are cut to this: what a node takes in, verifies and logs in one go stays in a core's cache.
const WRITE_BYTES_MAX: u64 = 256 << 10;

/// A part of a range, within one shard.
#[derive(Clone, Copy)]
pub(super) struct Piece {
    pub shard: u64,
    pub offset: u32,
    pub length: u32,
}

/// The pieces of a range: none crosses a shard, nor a boundary of the payload limit.
pub(super) fn pieces(
    geometry: &Geometry,
    offset: u64,
    length: u32,
    kind: RequestKind,
) -> Vec<Piece> {
    let shard_bytes = u64::from(geometry.shard_bytes);
    let step = match kind {
        RequestKind::Write => shard_bytes.min(WRITE_BYTES_MAX),
        RequestKind::Read => shard_bytes.min(PAYLOAD_BYTES_MAX as u64),
        _ => shard_bytes,
    };
    let mut pieces = Vec::with_capacity(1);
    let (mut at, end) = (offset, offset + u64::from(length));
    while at < end {
        let next = end.min((at / step + 1) * step);
        pieces.push(Piece {
            shard: at / shard_bytes,
            offset: (at % shard_bytes) as u32,
            length: (next - at) as u32,
        });
        at = next;
    }
    pieces
}

/// The whole blocks that a piece touches, as a node is asked for them.
pub(super) fn blocks_asked(piece: Piece, epoch: u64, generation: u64) -> Io {
    let first = piece.offset / BLOCK_BYTES * BLOCK_BYTES;
    let length = (piece.offset + piece.length).next_multiple_of(BLOCK_BYTES) - first;
    Io { shard: piece.shard, offset: first, length, epoch, generation, sequence: 0 }
}

/// Who of the candidates is read from: the node of the same host, else each in turn.
pub(super) fn choose_reader(
    candidates: NodeMask,
    local: Option<NodeIndex>,
    turn: &mut u8,
) -> Option<NodeIndex> {
    if let Some(local) = local.filter(|local| candidates.has(*local)) {
        return Some(local);
    }
    *turn = (*turn + 1) % 64;
    let turned = NodeMask(candidates.0 & !((1 << *turn) - 1));
    turned.first().or(candidates.first())
}

/// What a node's answer holds of a piece.
pub(super) enum Content {
    Runs(Vec<Run>),
    Extents(Vec<Extent>),
    /// The block of that index, from the piece's first one on, does not match its checksum.
    Damaged(u32),
}

/// Reads and verifies the answer to a read, or a status question, of a piece.
///
/// # Errors
/// No honest node answers so.
pub(super) fn content_of(
    frame: Frame,
    kind: RequestKind,
    offset: u32,
    length: u32,
) -> Result<Content, BadReply> {
    let mut blocks = Vec::new();
    take_blocks(frame.head, &mut blocks).map_err(|_| BadReply("malformed block list"))?;
    let skip = offset % BLOCK_BYTES;
    let expected = (skip + length).div_ceil(BLOCK_BYTES) as usize;
    if blocks.len() != expected {
        return Err(BadReply("another number of blocks than asked for"));
    }
    if kind == RequestKind::Status {
        return Ok(Content::Extents(extents_of(&blocks, skip, length)));
    }
    if let Some(index) = blocks.iter().position(|block| *block == Block::Bad) {
        return Ok(Content::Damaged(index as u32));
    }
    let data_blocks = blocks.iter().filter(|block| block.is_data()).count();
    if frame.payload.len() != data_blocks * BLOCK_BYTES as usize {
        return Err(BadReply("payload and block list disagree"));
    }
    let stored = blocks.iter().enumerate().filter_map(|(index, block)| match block {
        Block::Data(checksum) => Some((index as u32, *checksum)),
        _ => None,
    });
    let mut contents = frame.payload.chunks_exact(BLOCK_BYTES as usize).zip(stored);
    let damaged = contents.find(|(data, (_, checksum))| checksum_of(data) != *checksum);
    match damaged.filter(|_| !broken(Rule::ReadsAreVerified)) {
        Some((_, (index, _))) => Ok(Content::Damaged(index)),
        None => Ok(Content::Runs(runs_of(&blocks, frame.payload, skip, length))),
    }
}

/// Cuts `skip` bytes off the front and all beyond `length` off the end of a run of `bytes`.
struct Window {
    skip: u32,
    left: u32,
}

impl Window {
    /// The part of the next `bytes` bytes that lies in the window: (start, length).
    fn next(&mut self, bytes: u32) -> (u32, u32) {
        let start = self.skip.min(bytes);
        let length = (bytes - start).min(self.left);
        self.skip -= start;
        self.left -= length;
        (start, length)
    }
}

fn runs_of(blocks: &[Block], mut payload: Bytes, skip: u32, length: u32) -> Vec<Run> {
    let mut window = Window { skip, left: length };
    let mut runs = Vec::with_capacity(1);
    for group in blocks.chunk_by(|a, b| a.is_data() == b.is_data()) {
        let bytes = group.len() as u32 * BLOCK_BYTES;
        let (start, length) = window.next(bytes);
        if group[0].is_data() {
            let data = payload.split_to(bytes as usize);
            runs.push(Run::Data(data.slice(start as usize..(start + length) as usize)));
        } else {
            runs.push(Run::Hole(length));
        }
    }
    runs
}

fn extents_of(blocks: &[Block], skip: u32, length: u32) -> Vec<Extent> {
    let mut window = Window { skip, left: length };
    let groups = blocks.chunk_by(|a, b| std::mem::discriminant(a) == std::mem::discriminant(b));
    groups
        .map(|group| {
            let (_, length) = window.next(group.len() as u32 * BLOCK_BYTES);
            let (hole, zero) = match group[0] {
                Block::Absent => (true, true),
                Block::Zero => (false, true),
                Block::Data(_) | Block::Bad => (false, false),
            };
            Extent { length, hole, zero, depth: u16::from(!hole), changed: 0 }
        })
        .collect()
}
