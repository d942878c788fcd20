//! Reading: blocks are looked up in the log's index first, then in the shard file, layer by layer.

use std::mem::MaybeUninit;
use std::sync::Arc;

use bytes::BytesMut;

use crate::checksum::{Checksum, checksum_of};
use crate::content::Block;
use crate::geometry::{BLOCK_BYTES, ImageId, LayerId, ShardKey, Tag};
use crate::rules::{Rule, broken};

use super::checkpoint::Running;
use super::disk::{DiskFile, DiskResult, Errno, FileRef};
use super::index::Place;
use super::shard_file::{ShardMeta, read_meta, shard_path};
use super::{BlockState, Store, StoreError};

const BLOCK: usize = BLOCK_BYTES as usize;

/// Where a block's content is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Source {
    Nowhere,
    Log(Place),
    /// The shard file of that layer.
    File(LayerId),
}

/// A block, looked up.
#[derive(Clone, Copy, Debug)]
pub struct Found {
    state: BlockState,
    source: Source,
    layer: LayerId,
    checksum: Checksum,
}

impl Found {
    pub(super) fn state(&self) -> BlockState {
        self.state
    }

    /// Of data: the checksum that it should have.
    pub(super) fn checksum(&self) -> Checksum {
        self.checksum
    }

    /// Where it was found.
    pub(super) fn layer(&self) -> LayerId {
        self.layer
    }

    pub(super) fn is_in_file(&self) -> bool {
        matches!(self.source, Source::File(_))
    }
}

const NOT_FOUND: Found =
    Found { state: BlockState::Absent, source: Source::Nowhere, layer: 0, checksum: 0 };

/// One block of a shard, as a summary tells it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockSummary {
    pub state: BlockState,
    /// Tag of its last write since the last clear, else `Tag::NONE`.
    pub tag: Tag,
    /// Checksum that its content should have; 0 without data.
    pub checksum: Checksum,
}

/// One shard of one layer: what a replica compares with another's.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ShardSummary {
    /// Generation that the shard counts as written in.
    pub generation: u64,
    pub blocks: Vec<BlockSummary>,
}

impl Store {
    /// Reads `blocks` blocks from `first_block` on, resolved through `layers` (top first). Appends
    /// a state for each to `states` and the content of the data blocks, verified, to `data`.
    ///
    /// `BadBlock` where one does not match its checksum; then nothing was appended.
    #[allow(clippy::too_many_arguments)]
    pub fn read(
        &mut self,
        image: &ImageId,
        layers: &[LayerId],
        shard: u64,
        first_block: u32,
        blocks: u32,
        states: &mut Vec<BlockState>,
        data: &mut BytesMut,
    ) -> Result<(), StoreError> {
        let (states_before, data_before) = (states.len(), data.len());
        let mut found = std::mem::take(&mut self.scratch);
        let outcome = self
            .look_up(image, layers, shard, (first_block, blocks), &mut found)
            .and_then(|()| self.fetch(image, shard, first_block, &found, data));
        states.extend(found.iter().map(|found| found.state));
        self.scratch = found;
        if outcome.is_err() {
            states.truncate(states_before);
            data.truncate(data_before);
        }
        outcome
    }

    /// Appends the state of `blocks` blocks from `first_block` on to `states`, resolved through
    /// `layers` (top first), without reading content.
    pub fn status(
        &mut self,
        image: &ImageId,
        layers: &[LayerId],
        shard: u64,
        first_block: u32,
        blocks: u32,
        states: &mut Vec<BlockState>,
    ) -> Result<(), StoreError> {
        let mut found = std::mem::take(&mut self.scratch);
        let outcome = self.look_up(image, layers, shard, (first_block, blocks), &mut found);
        if outcome.is_ok() {
            states.extend(found.iter().map(|found| found.state));
        }
        self.scratch = found;
        outcome
    }

    /// As `status`, with the layer that each block was found in.
    #[allow(clippy::too_many_arguments)]
    pub fn origins(
        &mut self,
        image: &ImageId,
        layers: &[LayerId],
        shard: u64,
        first_block: u32,
        blocks: u32,
        origins: &mut Vec<(BlockState, LayerId)>,
    ) -> Result<(), StoreError> {
        let mut found = std::mem::take(&mut self.scratch);
        let outcome = self.look_up(image, layers, shard, (first_block, blocks), &mut found);
        if outcome.is_ok() {
            origins.extend(found.iter().map(|found| (found.state, found.layer)));
        }
        self.scratch = found;
        outcome
    }

    /// `read`, with the checksum of each data block beside its state, and the content to wherever the
    /// caller wants it.
    #[allow(clippy::too_many_arguments)]
    pub fn read_blocks(
        &mut self,
        image: &ImageId,
        layers: &[LayerId],
        shard: u64,
        first_block: u32,
        blocks: u32,
        content: &mut Vec<Block>,
        data: &mut impl ReadBuffer,
    ) -> Result<(), StoreError> {
        let data_before = data.filled();
        let mut found = std::mem::take(&mut self.scratch);
        let outcome = self
            .look_up(image, layers, shard, (first_block, blocks), &mut found)
            .and_then(|()| self.fetch(image, shard, first_block, &found, data));
        match outcome {
            Ok(()) => content.extend(found.iter().map(|found| found.state.with(found.checksum))),
            Err(_) => data.truncate(data_before),
        }
        self.scratch = found;
        outcome
    }

    /// State, tag and checksum of every block of one layer's shard, and its generation. Tags are
    /// given only while the shard is in the dirty map.
    pub fn summary(&mut self, key: &ShardKey) -> Result<ShardSummary, StoreError> {
        self.check()?;
        let shard_bytes = self.state.images.require(&key.image)?.shard_bytes;
        let blocks = shard_bytes / BLOCK_BYTES;
        let meta = self.meta(key, shard_bytes)?;
        let entry = self.state.dirty.get(&key.image, key.shard);
        let index = self.state.index.get(key);
        let generation = meta
            .generation
            .max(entry.filter(|e| e.layer == key.layer).map_or(0, |e| e.generation))
            .max(index.map_or(0, |shard| shard.generation));
        let summary = |block| {
            let (state, tag, checksum) = match index.and_then(|shard| shard.get(block)) {
                Some(run) => (run.state, run.tag, run.checksum),
                None => (meta.state(block), meta.tag(block), meta.checksum(block)),
            };
            let tag = if entry.is_some_and(|e| tag >= e.first) { tag } else { Tag::NONE };
            BlockSummary { state, tag, checksum }
        };
        Ok(ShardSummary { generation, blocks: (0..blocks).map(summary).collect() })
    }

    /// Fills `found` with where each block is, appending the batch where one is only staged.
    pub(super) fn look_up(
        &mut self,
        image: &ImageId,
        layers: &[LayerId],
        shard: u64,
        (first_block, blocks): (u32, u32),
        found: &mut Vec<Found>,
    ) -> Result<(), StoreError> {
        self.check()?;
        found.clear();
        let shard_bytes = self.state.images.require(image)?.shard_bytes;
        let end = u64::from(first_block) + u64::from(blocks);
        if blocks == 0 || end > u64::from(shard_bytes / BLOCK_BYTES) || layers.is_empty() {
            return Err(StoreError::OutOfRange);
        }
        found.resize(blocks as usize, NOT_FOUND);
        let mut missing = blocks;
        let mut staged = false;
        for &layer in layers {
            let key = ShardKey { image: *image, layer, shard };
            let mut meta: Option<Arc<ShardMeta>> = None;
            for (block, found) in (first_block..).zip(found.iter_mut()) {
                if found.state != BlockState::Absent {
                    continue;
                }
                let index = self.state.index.get(&key);
                if let Some(run) = index.and_then(|shard| shard.get(block)) {
                    let (state, source) = (run.state, Source::Log(run.place));
                    *found = Found { state, source, layer, checksum: run.checksum };
                    staged |= state == BlockState::Data && self.log.is_staged(run.place);
                } else {
                    let meta = match &meta {
                        Some(meta) => meta,
                        None => meta.insert(self.meta(&key, shard_bytes)?),
                    };
                    let (state, source) = (meta.state(block), Source::File(layer));
                    *found = Found { state, source, layer, checksum: meta.checksum(block) };
                }
                missing -= u32::from(found.state != BlockState::Absent);
            }
            if missing == 0 {
                break;
            }
        }
        if staged { self.append() } else { Ok(()) }
    }

    /// Appends the content of the data blocks, verified.
    fn fetch(
        &mut self,
        image: &ImageId,
        shard: u64,
        first_block: u32,
        found: &[Found],
        data: &mut impl ReadBuffer,
    ) -> Result<(), StoreError> {
        let bad = |index: usize| {
            let block = first_block + index as u32;
            StoreError::BadBlock { layer: found[index].layer, shard, block }
        };
        let mut index = 0;
        while index < found.len() {
            match found[index].state {
                BlockState::Absent | BlockState::Zero => index += 1,
                BlockState::Bad => return Err(bad(index)),
                BlockState::Data => {
                    let run = run_length(&found[index..]);
                    let (file, offset) =
                        self.source_of(image, shard, first_block + index as u32, &found[index])?;
                    let start = data.filled();
                    let room = data.room(run * BLOCK);
                    match read_whole(&*file, offset, room) {
                        // A bad sector somewhere in the run: what it spoiled fails its checksum.
                        Err(Errno::IO) => read_singly(&*file, offset, room),
                        read => read?,
                    }
                    // SAFETY: both ways of reading fill the room.
                    unsafe { data.advance(run * BLOCK) };
                    let contents = data.since(start).chunks_exact(BLOCK);
                    for (step, content) in contents.enumerate() {
                        if checksum_of(content) != found[index + step].checksum
                            && !broken(Rule::ReadsAreVerified)
                        {
                            return Err(bad(index + step));
                        }
                    }
                    index += run;
                }
            }
        }
        Ok(())
    }

    /// The file and offset of a data block.
    pub(super) fn source_of(
        &mut self,
        image: &ImageId,
        shard: u64,
        block: u32,
        found: &Found,
    ) -> Result<(FileRef, u64), StoreError> {
        match found.source {
            Source::Log(place) => {
                let file = Arc::clone(&self.log.segment(place.segment).file);
                Ok((file, u64::from(place.offset)))
            }
            Source::File(layer) => {
                let file = self.shard_file(&ShardKey { image: *image, layer, shard })?;
                match file {
                    Some(file) => Ok((file, u64::from(block) * u64::from(BLOCK_BYTES))),
                    None => Err(StoreError::BadBlock { layer, shard, block }),
                }
            }
            Source::Nowhere => Err(StoreError::OutOfRange),
        }
    }

    /// The shard's file, kept open; `None` where there is none.
    pub(super) fn shard_file(&mut self, key: &ShardKey) -> Result<Option<FileRef>, StoreError> {
        if self.state.merged.contains_key(key) {
            return Ok(None);
        }
        if let Some(file) = self.files.get(key) {
            return Ok(Some(Arc::clone(file)));
        }
        match self.disk.open(&shard_path(key)) {
            Ok(file) => {
                self.files.insert(*key, Arc::clone(&file), 1);
                Ok(Some(file))
            }
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The shard file's metadata, kept in memory.
    pub(super) fn meta(
        &mut self,
        key: &ShardKey,
        shard_bytes: u32,
    ) -> Result<Arc<ShardMeta>, StoreError> {
        if self.state.merged.contains_key(key) {
            return Ok(Arc::new(ShardMeta::absent()));
        }
        if let Some(meta) = self.metas.get(key) {
            return Ok(Arc::clone(meta));
        }
        let meta = loop {
            let torn_allowed = self.may_be_torn(key);
            let meta = match self.shard_file(key)? {
                Some(file) => read_meta(&*file, key, shard_bytes, torn_allowed)?,
                None => ShardMeta::absent(),
            };
            // A checkpoint that began to write meanwhile may be what damaged it.
            if torn_allowed == self.may_be_torn(key) {
                break Arc::new(meta);
            }
        };
        self.metas.insert(*key, Arc::clone(&meta), meta.weight());
        Ok(meta)
    }

    /// Whether a checkpoint that was interrupted, or runs, may have left the newer slot torn.
    pub(super) fn may_be_torn(&self, key: &ShardKey) -> bool {
        let writes = |running: &Running| running.is_writing() && running.keys.contains(key);
        self.unsettled.contains(key) || self.checkpointing.as_ref().is_some_and(writes)
    }

    /// Whether the running checkpoint writes the shard, or will.
    pub(super) fn is_checkpointed(&self, key: &ShardKey) -> bool {
        self.checkpointing.as_ref().is_some_and(|running| running.keys.contains(key))
    }
}

/// How many of the blocks lie one after the other in one file, from the first one on.
pub(super) fn run_length(found: &[Found]) -> usize {
    let follows = |pair: &[Found]| {
        pair[1].state == BlockState::Data
            && match (pair[0].source, pair[1].source) {
                (Source::File(a), Source::File(b)) => a == b,
                (Source::Log(a), Source::Log(b)) => {
                    a.segment == b.segment && a.offset + BLOCK_BYTES == b.offset
                }
                _ => false,
            }
    };
    1 + found.windows(2).take_while(|pair| follows(pair)).count()
}

/// Fills the room; what lies past the file's end is zeros.
pub(super) fn read_whole(
    file: &dyn DiskFile,
    offset: u64,
    room: &mut [MaybeUninit<u8>],
) -> DiskResult<()> {
    let count = file.read_into(offset, room)?;
    room[count..].fill(MaybeUninit::new(0));
    Ok(())
}

/// Fills the room block by block; those that cannot be read are zeros.
pub(super) fn read_singly(file: &dyn DiskFile, offset: u64, room: &mut [MaybeUninit<u8>]) {
    for (at, block) in (offset..).step_by(BLOCK).zip(room.chunks_mut(BLOCK)) {
        if read_whole(file, at, block).is_err() {
            block.fill(MaybeUninit::new(0));
        }
    }
}

/// Where the content of blocks is put, one after the other.
pub trait ReadBuffer {
    /// Bytes that are there.
    fn filled(&self) -> usize;
    /// What is there from `start` on.
    fn since(&self, start: usize) -> &[u8];
    /// Room for exactly `length` more bytes.
    fn room(&mut self, length: usize) -> &mut [MaybeUninit<u8>];
    /// The first `length` bytes of the room count as filled.
    ///
    /// # Safety
    /// They are.
    unsafe fn advance(&mut self, length: usize);
    /// Forgets all but the first `length` bytes.
    fn truncate(&mut self, length: usize);
}

impl ReadBuffer for BytesMut {
    fn filled(&self) -> usize {
        self.len()
    }
    fn since(&self, start: usize) -> &[u8] {
        &self[start..]
    }
    fn room(&mut self, length: usize) -> &mut [MaybeUninit<u8>] {
        self.reserve(length);
        &mut self.spare_capacity_mut()[..length]
    }
    unsafe fn advance(&mut self, length: usize) {
        // SAFETY: the caller's word.
        unsafe { self.set_len(self.len() + length) };
    }
    fn truncate(&mut self, length: usize) {
        BytesMut::truncate(self, length);
    }
}

/// A buffer in memory of somebody else, with room for all that is read into it.
pub struct Placed<'a> {
    place: &'a mut [MaybeUninit<u8>],
    filled: usize,
}

impl<'a> Placed<'a> {
    pub fn new(place: &'a mut [MaybeUninit<u8>]) -> Placed<'a> {
        Placed { place, filled: 0 }
    }
}

impl ReadBuffer for Placed<'_> {
    fn filled(&self) -> usize {
        self.filled
    }
    fn since(&self, start: usize) -> &[u8] {
        let filled = &self.place[start..self.filled];
        // SAFETY: `advance` was told that these bytes are there.
        unsafe { std::slice::from_raw_parts(filled.as_ptr().cast(), filled.len()) }
    }
    fn room(&mut self, length: usize) -> &mut [MaybeUninit<u8>] {
        &mut self.place[self.filled..][..length]
    }
    unsafe fn advance(&mut self, length: usize) {
        self.filled += length;
    }
    fn truncate(&mut self, length: usize) {
        self.filled = self.filled.min(length);
    }
}
