//! Changes of block content: writes, zeroes, copies.
//!
//! Everything that can be refused is refused before the first record is staged, so that a request
//! is staged as a whole or not at all.

use bytes::{Bytes, BytesMut};

use crate::checksum::{Checksum, checksum_of};
use crate::geometry::{BLOCK_BYTES, ImageId, ShardKey, blocks_touched};
use crate::rules::{Rule, broken};

use super::log::Class;
use super::record::{COPY_EXTRA, CopyBlock, HEADER_BYTES, Header, Kind, WRITE_EXTRA, encode_copy};
use super::{BlockState, Stamp, Store, StoreError, WriteOp};

const BLOCK: usize = BLOCK_BYTES as usize;

/// A byte range within a shard, cut at block boundaries.
#[derive(Clone, Copy, Debug)]
struct Span {
    offset: u32,
    length: u32,
    first_block: u32,
    blocks: u32,
}

impl Span {
    fn new(offset: u32, length: usize, shard_bytes: u32) -> Result<Span, StoreError> {
        let end = u64::from(offset) + length as u64;
        if length == 0 || end > u64::from(shard_bytes) {
            return Err(StoreError::OutOfRange);
        }
        let blocks = blocks_touched(u64::from(offset), length as u64) as u32;
        Ok(Span { offset, length: length as u32, first_block: offset / BLOCK_BYTES, blocks })
    }

    /// The part of block `index` of the span, as (start within the block, length).
    fn part(&self, index: u32) -> (u32, u32) {
        let block_start = (self.first_block + index) * BLOCK_BYTES;
        let start = self.offset.max(block_start);
        let end = (self.offset + self.length).min(block_start + BLOCK_BYTES);
        (start - block_start, end - start)
    }

    fn is_whole(&self, index: u32) -> bool {
        self.part(index) == (0, BLOCK_BYTES)
    }
}

impl Store {
    /// Stages a write of `payload` to any byte range of a shard, and gives its lsn.
    ///
    /// `checksums` has one checksum per touched block, over the payload's part of it; they are verified
    /// (`BadChecksum`). Partly covered blocks are merged with their old content, resolved through
    /// the layers and verified (`BadBlock`). The payload is kept by reference until `append`.
    pub fn write(
        &mut self,
        op: &WriteOp<'_>,
        checksums: &[Checksum],
        payload: Bytes,
    ) -> Result<u64, StoreError> {
        let shard_bytes = self.admit(op)?;
        self.check_dirty_room(&op.view.image, op.shard)?;
        let span = Span::new(op.offset, payload.len(), shard_bytes)?;
        verify(&span, checksums, &payload)?;
        let last = span.blocks - 1;
        if span.is_whole(0) && span.is_whole(last) {
            self.check_room(payload.len(), span.blocks)?;
            return self.stage_write(&op.key(), span.first_block, checksums, &[payload], op.stamp);
        }
        let mut checksums = checksums.to_vec();
        let mut pieces: [Bytes; 3] = Default::default();
        let (mut middle_start, mut middle_end) = (0, payload.len());
        if !span.is_whole(0) {
            let (_, length) = span.part(0);
            middle_start = length as usize;
            pieces[0] = self.merge(op, &span, 0, &payload[..middle_start])?;
            checksums[0] = checksum_of(&pieces[0]);
        }
        if last > 0 && !span.is_whole(last) {
            let (_, length) = span.part(last);
            middle_end -= length as usize;
            pieces[2] = self.merge(op, &span, last, &payload[middle_end..])?;
            checksums[last as usize] = checksum_of(&pieces[2]);
        }
        pieces[1] = payload.slice(middle_start..middle_end);
        self.check_room(span.blocks as usize * BLOCK, span.blocks)?;
        self.stage_write(&op.key(), span.first_block, &checksums, &pieces, op.stamp)
    }

    /// Stages zeros for `length` bytes from the op's offset, and gives the last record's lsn. Whole
    /// blocks become absent where nothing lies below, else explicit zeros; with
    /// `keep_allocated` explicit zeros that keep their space. Partly covered blocks are merged.
    pub fn zero(
        &mut self,
        op: &WriteOp<'_>,
        length: u32,
        keep_allocated: bool,
    ) -> Result<u64, StoreError> {
        let shard_bytes = self.admit(op)?;
        let span = Span::new(op.offset, length as usize, shard_bytes)?;
        if !keep_allocated && self.holds_nothing(op, shard_bytes)? {
            return Ok(self.log.next_lsn() - 1);
        }
        self.check_dirty_room(&op.view.image, op.shard)?;
        let last = span.blocks - 1;
        let mut edges: [Option<(u32, Bytes)>; 2] = [None, None];
        for (edge, index) in edges.iter_mut().zip([0, last]) {
            if !span.is_whole(index) && (index == 0 || index == last) {
                *edge = self.merge_zero(op, &span, index)?;
            }
        }
        if last == 0 && !span.is_whole(0) {
            edges[1] = None;
        }
        let first_whole = u32::from(!span.is_whole(0));
        let end_whole = if last > 0 && !span.is_whole(last) { last } else { span.blocks };
        self.check_room(3 * (BLOCK + HEADER_BYTES), 3)?;
        for (block, content) in edges.into_iter().flatten() {
            let checksum = checksum_of(&content);
            self.stage_write(&op.key(), block, &[checksum], &[content], op.stamp)?;
        }
        if first_whole < end_whole {
            let state = match op.view.is_one_layer() && !keep_allocated {
                true => BlockState::Absent,
                false => BlockState::Zero,
            };
            let header = Header {
                state: state.to_u8(),
                keep_allocated,
                key: op.key(),
                first_block: span.first_block + first_whole,
                blocks: end_whole - first_whole,
                stamp: op.stamp,
                ..Header::new(Kind::Zero, op.view.image)
            };
            let staged = self.stage_small(header, &[], Class::Data)?;
            self.state.apply_zero(&header, state, staged.place);
        }
        Ok(self.log.next_lsn() - 1)
    }

    /// Stages blocks as another replica has them, tags included, and gives the last record's lsn.
    /// `payload` has the content of the data blocks, one after the other; checksums are verified.
    /// The shard's generation becomes at least `generation`.
    pub fn copy(
        &mut self,
        key: &ShardKey,
        blocks: &[CopyBlock],
        payload: Bytes,
        generation: u64,
    ) -> Result<u64, StoreError> {
        self.check()?;
        let shard_blocks = self.state.images.require(&key.image)?.shard_bytes / BLOCK_BYTES;
        self.check_dirty_room(&key.image, key.shard)?;
        let data = blocks.iter().filter(|block| block.state == BlockState::Data);
        if blocks.iter().any(|block| block.block >= shard_blocks)
            || data.clone().count() * BLOCK != payload.len()
        {
            return Err(StoreError::OutOfRange);
        }
        for (block, content) in data.zip(payload.chunks_exact(BLOCK)) {
            if checksum_of(content) != block.checksum {
                return Err(StoreError::BadChecksum { block: block.block });
            }
        }
        self.check_room(payload.len() + blocks.len() * COPY_EXTRA, blocks.len() as u32)?;
        let mut rest = payload;
        for blocks in blocks.chunks(self.log.record_blocks_max() as usize) {
            let data = blocks.iter().filter(|block| block.state == BlockState::Data).count();
            let content = rest.split_to(data * BLOCK);
            let bytes = HEADER_BYTES + blocks.len() * COPY_EXTRA + content.len();
            self.make_room(bytes, Class::Data)?;
            let stamp = Stamp { generation, ..Stamp::default() };
            let header = Header { key: *key, stamp, ..Header::new(Kind::Copy, key.image) };
            let header = Header { blocks: blocks.len() as u32, ..header };
            let content = Some(content).filter(|content| !content.is_empty());
            let extra = |out: &mut Vec<u8>| encode_copy(blocks, out);
            let staged = self.log.stage(header, extra, content.into_iter());
            self.state.apply_copy(*key, blocks, staged.place, generation);
        }
        self.merges.copied_to(&key.image, key.layer);
        Ok(self.log.next_lsn() - 1)
    }

    /// Whether nothing was ever written to the op's shard, so that a discard changes nothing. (An image
    /// with parents has other layers to hide.)
    fn holds_nothing(&mut self, op: &WriteOp<'_>, shard_bytes: u32) -> Result<bool, StoreError> {
        let key = op.key();
        let fresh = op.view.is_one_layer() && self.state.index.get(&key).is_none();
        let meta = self.meta(&key, shard_bytes)?;
        Ok(fresh && meta.version == 0 && !meta.rewrite_both)
    }

    /// Whether the change may be made at all; gives the shard size.
    fn admit(&self, op: &WriteOp<'_>) -> Result<u32, StoreError> {
        self.check()?;
        let head = self.state.images.require(&op.view.image)?;
        if op.view.layers.is_empty() {
            return Err(StoreError::OutOfRange);
        }
        if op.stamp.epoch < head.epoch && !broken(Rule::EpochIsCurrent) {
            return Err(StoreError::EpochLower { stored: Box::new(*head) });
        }
        Ok(head.shard_bytes)
    }

    pub(super) fn check_dirty_room(&self, image: &ImageId, shard: u64) -> Result<(), StoreError> {
        let dirty = &self.state.dirty;
        let full = dirty.entries() >= self.dirty_entries_max() && dirty.get(image, shard).is_none();
        if full { Err(StoreError::DirtyFull) } else { Ok(()) }
    }

    /// Whether `bytes` of payload in `blocks` blocks find room in the log.
    fn check_room(&self, bytes: usize, blocks: u32) -> Result<(), StoreError> {
        let per_record = self.log.record_blocks_max();
        let records = blocks.div_ceil(per_record) as usize;
        let bytes = bytes + records * HEADER_BYTES + blocks as usize * WRITE_EXTRA;
        if records == 1 && self.log.fits(bytes, Class::Data) {
            return Ok(());
        }
        if bytes > self.log.request_bytes_max() {
            return Err(StoreError::TooLarge);
        }
        // None is longer than all of them together: copies are mostly of blocks without data.
        let longest = (HEADER_BYTES + per_record as usize * (BLOCK + COPY_EXTRA)).min(bytes);
        let head = self.head_bytes();
        let room = self.log.has_room(bytes, records, longest, head);
        if room { Ok(()) } else { Err(StoreError::LogFull) }
    }

    /// Stages whole blocks: `pieces`, one after the other, are their content. There is room.
    fn stage_write(
        &mut self,
        key: &ShardKey,
        first_block: u32,
        checksums: &[Checksum],
        pieces: &[Bytes],
        stamp: Stamp,
    ) -> Result<u64, StoreError> {
        let per_record = self.log.record_blocks_max() as usize;
        let mut lsn = 0;
        for (index, checksums) in checksums.chunks(per_record).enumerate() {
            let length = checksums.len() * BLOCK;
            self.make_room(HEADER_BYTES + checksums.len() * WRITE_EXTRA + length, Class::Data)?;
            let first_block = first_block + (index * per_record) as u32;
            let blocks = checksums.len() as u32;
            let header = Header::new(Kind::Write, key.image);
            let header = Header { key: *key, first_block, blocks, stamp, ..header };
            let extra = |out: &mut Vec<u8>| {
                checksums.iter().for_each(|checksum| out.extend(checksum.to_le_bytes()))
            };
            let start = index * per_record * BLOCK;
            let staged = self.log.stage(header, extra, cut(pieces, start, start + length));
            let checksums = checksums.iter().copied();
            self.state.apply_write(*key, first_block, checksums, staged.place, stamp);
            lsn = staged.lsn;
        }
        Ok(lsn)
    }

    /// The whole block `index` of the span with `part` put over its old content.
    fn merge(
        &mut self,
        op: &WriteOp<'_>,
        span: &Span,
        index: u32,
        part: &[u8],
    ) -> Result<Bytes, StoreError> {
        let (start, length) = span.part(index);
        assert_eq!(part.len(), length as usize);
        let (_, mut block) = self.block_content(op, span.first_block + index)?;
        block[start as usize..(start + length) as usize].copy_from_slice(part);
        Ok(block.freeze())
    }

    /// The whole block with its part of the span zeroed; `None` where it reads as zeros already.
    fn merge_zero(
        &mut self,
        op: &WriteOp<'_>,
        span: &Span,
        index: u32,
    ) -> Result<Option<(u32, Bytes)>, StoreError> {
        let (start, length) = span.part(index);
        let number = span.first_block + index;
        let (state, mut block) = self.block_content(op, number)?;
        if state != BlockState::Data {
            return Ok(None);
        }
        block[start as usize..(start + length) as usize].fill(0);
        Ok(Some((number, block.freeze())))
    }

    /// State and content of one block, through the layers.
    fn block_content(
        &mut self,
        op: &WriteOp<'_>,
        block: u32,
    ) -> Result<(BlockState, BytesMut), StoreError> {
        let mut states = Vec::with_capacity(1);
        let mut content = BytesMut::with_capacity(BLOCK);
        self.read(op.view, op.shard, block, 1, &mut states, &mut content)?;
        content.resize(BLOCK, 0);
        Ok((states[0], content))
    }
}

impl WriteOp<'_> {
    /// The shard of the top layer.
    fn key(&self) -> ShardKey {
        ShardKey { image: self.view.image, layer: self.view.layers[0], shard: self.shard }
    }
}

/// Checks each block's part of the payload against its checksum.
fn verify(span: &Span, checksums: &[Checksum], payload: &[u8]) -> Result<(), StoreError> {
    if checksums.len() != span.blocks as usize {
        return Err(StoreError::OutOfRange);
    }
    let mut rest = payload;
    for (index, checksum) in (0..span.blocks).zip(checksums) {
        let (part, next) = rest.split_at(span.part(index).1 as usize);
        if checksum_of(part) != *checksum {
            return Err(StoreError::BadChecksum { block: span.first_block + index });
        }
        rest = next;
    }
    Ok(())
}

/// The bytes from `from` to `to` of all pieces put together.
fn cut(pieces: &[Bytes], from: usize, to: usize) -> impl Iterator<Item = Bytes> {
    let mut base = 0;
    pieces.iter().filter_map(move |piece| {
        let (start, end) = (from.max(base), to.min(base + piece.len()));
        let part = (start < end).then(|| piece.slice(start - base..end - base));
        base += piece.len();
        part
    })
}
