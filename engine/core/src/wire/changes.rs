//! CHANGES and TOUCHED: what of an image was written since snapshots of it (docs/wire.md).

use super::codec::{Fields, Short, put_list};
use super::messages::{Head, Io, put_snapshot, take_snapshot};
use crate::geometry::SnapshotId;
use bytes::{BufMut, BytesMut};
use std::sync::Arc;

/// Most snapshots of one question, so that a number of them fits into a byte.
pub const SINCE_MAX: usize = 64;

/// CHANGES: a range of blocks, and the snapshots that it is compared with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChangesAsked {
    pub io: Io,
    /// The newest first.
    pub since: Arc<[SnapshotId]>,
}

impl Head for ChangesAsked {
    fn put(&self, out: &mut BytesMut) {
        self.io.put(out);
        put_list(out, &self.since, |out, snapshot| put_snapshot(out, *snapshot));
    }
    fn take_fields(f: &mut Fields) -> Result<Self, Short> {
        Ok(ChangesAsked { io: Io::take_fields(f)?, since: take_since(f)? })
    }
}

fn take_since(f: &mut Fields) -> Result<Arc<[SnapshotId]>, Short> {
    let since = f.list(12, take_snapshot)?;
    let fits = since.len() <= SINCE_MAX && since.is_sorted_by(|a, b| a.layer > b.layer);
    if fits { Ok(since.into()) } else { Err(Short) }
}

/// What a block is, where that stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Held {
    Absent = 0,
    Zero = 1,
    Data = 2,
}

/// Consecutive blocks of which the same is to be said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChangedRun {
    pub blocks: u32,
    pub held: Held,
    /// The how manieth layer from the top has them, from 1 on; 0: none.
    pub depth: u16,
    /// They were written since so many of the snapshots: the last ones of the list.
    pub changed: u8,
}

/// Bytes of a run in the answer's head.
const RUN_BYTES: usize = 8;

/// Answer to CHANGES.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChangesReply {
    pub runs: Vec<ChangedRun>,
}

impl Head for ChangesReply {
    fn put(&self, out: &mut BytesMut) {
        put_list(out, &self.runs, |out, run| {
            out.put_u32_le(run.blocks);
            out.put_u8(run.held as u8);
            out.put_u16_le(run.depth);
            out.put_u8(run.changed);
        });
    }
    fn take_fields(f: &mut Fields) -> Result<Self, Short> {
        let run = |f: &mut Fields| {
            let (blocks, held) = (f.u32()?, f.u8()?);
            let held = match held {
                0 => Held::Absent,
                1 => Held::Zero,
                2 => Held::Data,
                _ => return Err(Short),
            };
            Ok(ChangedRun { blocks, held, depth: f.u16()?, changed: f.u8()? })
        };
        Ok(ChangesReply { runs: f.list(RUN_BYTES, run)? })
    }
}

/// TOUCHED: which shards of a range any layer above a snapshot has something of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TouchedAsked {
    pub epoch: u64,
    /// None: all layers count.
    pub since: Option<SnapshotId>,
    pub first_shard: u64,
    pub end_shard: u64,
    /// Where to go on, and under which record the listing was begun; all 0: at its beginning.
    pub generation: u64,
    pub place: u32,
    pub shard: u64,
}

impl Head for TouchedAsked {
    fn put(&self, out: &mut BytesMut) {
        out.put_u64_le(self.epoch);
        let since: &[SnapshotId] = self.since.as_slice();
        put_list(out, since, |out, snapshot| put_snapshot(out, *snapshot));
        out.put_u64_le(self.first_shard);
        out.put_u64_le(self.end_shard);
        out.put_u64_le(self.generation);
        out.put_u32_le(self.place);
        out.put_u64_le(self.shard);
    }
    fn take_fields(f: &mut Fields) -> Result<Self, Short> {
        let epoch = f.u64()?;
        let since = take_since(f)?;
        if since.len() > 1 {
            return Err(Short);
        }
        Ok(TouchedAsked {
            epoch,
            since: since.first().copied(),
            first_shard: f.u64()?,
            end_shard: f.u64()?,
            generation: f.u64()?,
            place: f.u32()?,
            shard: f.u64()?,
        })
    }
}

/// Answer to TOUCHED, bounded in the work it takes, so it may name no shard and yet not be the last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TouchedReply {
    /// Of the record that the node goes by.
    pub generation: u64,
    /// Where to ask on: place and shard; none: this was the last.
    pub next: Option<(u32, u64)>,
    pub shards: Vec<u64>,
}

impl Head for TouchedReply {
    fn put(&self, out: &mut BytesMut) {
        let (place, shard) = self.next.unwrap_or((0, 0));
        out.put_u64_le(self.generation);
        out.put_u8(u8::from(self.next.is_some()));
        out.put_u32_le(place);
        out.put_u64_le(shard);
        put_list(out, &self.shards, |out, shard| out.put_u64_le(*shard));
    }
    fn take_fields(f: &mut Fields) -> Result<Self, Short> {
        let (generation, more) = (f.u64()?, f.u8()? != 0);
        let next = (f.u32()?, f.u64()?);
        let next = more.then_some(next);
        Ok(TouchedReply { generation, next, shards: f.list(8, Fields::u64)? })
    }
}
