//! What a holder's request is about, where nothing that was fetched before may be applied after it.

use crate::geometry::BLOCK_BYTES;
use crate::wire::codec::Fields;
use crate::wire::copies::Pull;
use crate::wire::messages::{Copy, Head, Io, ShardRange};
use crate::wire::{Frame, kind};
use std::ops::Range;

/// Its shard, and blocks of it; none: it overtakes nothing.
pub(super) fn reach(frame: &Frame) -> Option<(u64, Range<u32>)> {
    let head = frame.head.clone();
    match frame.kind {
        kind::WRITE | kind::ZERO => {
            let io = Io::take_fields(&mut Fields(head)).ok()?;
            let end = io.offset.saturating_add(io.length).div_ceil(BLOCK_BYTES);
            Some((io.shard, io.offset / BLOCK_BYTES..end))
        }
        kind::COPY => {
            let copy = Copy::take(head).ok()?;
            let (first, last) = (copy.indexes.first()?, copy.indexes.last()?);
            Some((copy.shard, *first..last.saturating_add(1)))
        }
        kind::PULL => {
            let pull = Pull::take(head).ok()?;
            Some((pull.shard, pull.first_block..pull.first_block + pull.blocks))
        }
        kind::SUMMARY => Some((ShardRange::take(head).ok()?.shard, 0..u32::MAX)),
        _ => None,
    }
}
