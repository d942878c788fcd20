//! A shard's file: data, then two slots of metadata that are written alternately.
//!
//! The metadata says of each block what it is and, of data, its checksum; it also holds the
//! generation of the shard's last write and the tags of blocks while the shard is dirty. Layout in
//! `docs/disk-format.md`, "Shard files". A slot is written after the data it describes; whatever a
//! crash tears is still in the log. A slot that is damaged although no crash can have torn it may
//! have been the newer one, so nothing of the shard is trusted: every block is `Bad` until it is
//! written or copied anew.

use std::io::IoSlice;

use bytes::BytesMut;

use crate::checksum::{CHECKSUM_BYTES, Checksum, crc32c};
use crate::geometry::{BLOCK_BYTES, ImageId, LayerId, ShardKey, Tag};

use super::BlockState;
use super::disk::{Disk, DiskFile, DiskResult};
use super::encoding::{Reader, push_u32, push_u64};
use super::images::layer_folder;
use super::log::PAGE_BYTES;

const MAGIC: u32 = 0x5353_4348;
const HEADER_BYTES: usize = 72;
const TAG_BYTES: usize = 20;

/// Metadata of one shard.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ShardMeta {
    /// Counts the writes of the metadata; 0: there is no file.
    pub version: u64,
    /// Generation of the last write.
    pub generation: u64,
    /// Two bits per block.
    states: Box<[u8]>,
    checksums: Box<[Checksum]>,
    /// Tags of blocks, by block, while the shard is dirty.
    pub tags: Box<[(u32, Tag)]>,
    /// In memory only: a slot was lost, so what the slots say does not count. Both must be written.
    pub rewrite_both: bool,
}

impl ShardMeta {
    /// A shard that was never written.
    pub fn absent() -> ShardMeta {
        let (states, checksums, tags) = (Box::default(), Box::default(), Box::default());
        ShardMeta { version: 0, generation: 0, states, checksums, tags, rewrite_both: false }
    }

    /// A shard of `blocks` blocks, all in `state`.
    pub fn uniform(blocks: u32, state: BlockState) -> ShardMeta {
        let byte = state.to_u8() * 0b0101_0101;
        let states = vec![byte; blocks.div_ceil(4) as usize].into_boxed_slice();
        let checksums = vec![0; blocks as usize].into_boxed_slice();
        ShardMeta { states, checksums, ..ShardMeta::absent() }
    }

    /// The same with room for all blocks.
    pub fn with_blocks(mut self, blocks: u32) -> ShardMeta {
        if self.checksums.is_empty() {
            let empty = ShardMeta::uniform(blocks, BlockState::Absent);
            (self.states, self.checksums) = (empty.states, empty.checksums);
        }
        self
    }

    #[inline]
    pub fn state(&self, block: u32) -> BlockState {
        let Some(byte) = self.states.get(block as usize / 4) else { return BlockState::Absent };
        BlockState::from_bits(byte >> (block % 4 * 2))
    }

    #[inline]
    pub fn checksum(&self, block: u32) -> Checksum {
        self.checksums.get(block as usize).copied().unwrap_or(0)
    }

    /// Sets what a block is.
    pub fn set(&mut self, block: u32, state: BlockState, checksum: Checksum) {
        let shift = block % 4 * 2;
        let byte = &mut self.states[block as usize / 4];
        *byte = *byte & !(0b11 << shift) | state.to_u8() << shift;
        self.checksums[block as usize] = checksum;
    }

    /// The tag kept for a block.
    pub fn tag(&self, block: u32) -> Tag {
        let found = self.tags.binary_search_by_key(&block, |(at, _)| *at);
        found.map_or(Tag::NONE, |index| self.tags[index].1)
    }

    /// Memory that it takes, about.
    pub fn weight(&self) -> usize {
        96 + self.states.len() + CHECKSUM_BYTES * self.checksums.len() + 24 * self.tags.len()
    }
}

/// Path of a shard's file.
pub fn shard_path(key: &ShardKey) -> String {
    format!("{}/{:x}", shard_folder(key), key.shard)
}

/// Folder of a shard's file: spread over 256 by the index's low byte.
pub fn shard_folder(key: &ShardKey) -> String {
    format!("{}/{:02x}", layer_folder(&key.image, key.layer), key.shard & 0xff)
}

/// Folders that a layer's shard files are spread over.
pub const FOLDERS: u32 = 256;

/// The shards of a layer that have a file in one of these folders, in order.
pub fn shards_in(
    disk: &dyn Disk,
    image: &ImageId,
    layer: LayerId,
    folder: u64,
) -> DiskResult<Vec<u64>> {
    let names = disk.list(&shard_folder(&ShardKey { image: *image, layer, shard: folder }))?;
    let shards = names.iter().filter_map(|name| listed_shard(name));
    let mut shards: Vec<u64> = shards.filter(|shard| shard & 0xff == folder).collect();
    shards.sort_unstable();
    Ok(shards)
}

/// Bytes that each slot has in the file.
pub fn slot_bytes(shard_bytes: u32) -> u64 {
    let blocks = (shard_bytes / BLOCK_BYTES) as usize;
    let most = HEADER_BYTES + blocks.div_ceil(4) + blocks * (CHECKSUM_BYTES + TAG_BYTES);
    most.next_multiple_of(PAGE_BYTES as usize) as u64
}

/// The shard whose file has this name.
fn listed_shard(name: &str) -> Option<u64> {
    u64::from_str_radix(name, 16).ok().filter(|shard| format!("{shard:x}") == name)
}

fn slot_offset(shard_bytes: u32, version: u64) -> u64 {
    u64::from(shard_bytes) + version % 2 * slot_bytes(shard_bytes)
}

/// Encodes a slot: whole pages.
pub fn encode_slot(key: &ShardKey, meta: &ShardMeta) -> Vec<u8> {
    let blocks = meta.checksums.len() as u32;
    let mut body = Vec::with_capacity(PAGE_BYTES as usize * 2);
    body.extend_from_slice(&meta.states);
    let data = (0..blocks).filter(|block| meta.state(*block) == BlockState::Data);
    data.for_each(|block| push_u64(&mut body, meta.checksum(block)));
    for (block, tag) in &meta.tags {
        push_u32(&mut body, *block);
        push_u64(&mut body, tag.epoch);
        push_u64(&mut body, tag.sequence);
    }
    let mut slot = Vec::with_capacity(HEADER_BYTES + body.len() + PAGE_BYTES as usize);
    push_u32(&mut slot, MAGIC);
    push_u32(&mut slot, blocks);
    push_u64(&mut slot, meta.version);
    push_u64(&mut slot, meta.generation);
    slot.extend_from_slice(&key.image.0);
    push_u64(&mut slot, key.shard);
    push_u32(&mut slot, key.layer);
    push_u32(&mut slot, meta.tags.len() as u32);
    push_u32(&mut slot, body.len() as u32);
    push_u32(&mut slot, crc32c(&body));
    push_u32(&mut slot, 0);
    let checksum = crc32c(&slot);
    push_u32(&mut slot, checksum);
    assert_eq!(slot.len(), HEADER_BYTES, "the header's fields fill it");
    slot.extend_from_slice(&body);
    slot.resize(slot.len().next_multiple_of(PAGE_BYTES as usize), 0);
    slot
}

/// What a slot holds.
#[derive(Debug, PartialEq, Eq)]
pub enum Slot {
    /// Never written: zeros, or past the file's end.
    Empty,
    /// Not what was written; its version where that can still be told.
    Damaged(Option<u64>),
    Whole(Box<ShardMeta>),
}

/// Reads a slot from `bytes`, which may be shorter than the slot.
pub fn decode_slot(key: &ShardKey, blocks: u32, bytes: &[u8]) -> Slot {
    let head = &bytes[..bytes.len().min(HEADER_BYTES)];
    if head.iter().all(|byte| *byte == 0) {
        let rest_is_zero = bytes.iter().all(|byte| *byte == 0);
        return if rest_is_zero { Slot::Empty } else { Slot::Damaged(None) };
    }
    let Some((version, header)) = decode_slot_header(key, blocks, head) else {
        return Slot::Damaged(None);
    };
    let damaged = Slot::Damaged(Some(version));
    let Some(body) = bytes.get(HEADER_BYTES..HEADER_BYTES + header.body_bytes) else {
        return damaged;
    };
    if crc32c(body) != header.body_checksum {
        return damaged;
    }
    let meta = decode_slot_body(blocks, version, &header, body);
    meta.map_or(damaged, |meta| Slot::Whole(Box::new(meta)))
}

struct SlotHeader {
    generation: u64,
    tags: usize,
    body_bytes: usize,
    body_checksum: u32,
}

fn decode_slot_header(key: &ShardKey, blocks: u32, head: &[u8]) -> Option<(u64, SlotHeader)> {
    let mut reader = Reader::new(head);
    let fixed = head.get(..HEADER_BYTES - 4)?;
    if reader.u32()? != MAGIC || reader.u32()? != blocks {
        return None;
    }
    let (version, generation) = (reader.u64()?, reader.u64()?);
    let named = (reader.array::<16>()?, reader.u64()?, reader.u32()?);
    let (tags, body_bytes) = (reader.u32()? as usize, reader.u32()? as usize);
    let (body_checksum, _, checksum) = (reader.u32()?, reader.u32()?, reader.u32()?);
    let fits = named == (key.image.0, key.shard, key.layer) && checksum == crc32c(fixed);
    fits.then_some((version, SlotHeader { generation, tags, body_bytes, body_checksum }))
}

fn decode_slot_body(
    blocks: u32,
    version: u64,
    header: &SlotHeader,
    body: &[u8],
) -> Option<ShardMeta> {
    let mut reader = Reader::new(body);
    let mut meta = ShardMeta::uniform(blocks, BlockState::Absent);
    meta.states = reader.take(meta.states.len())?.into();
    (meta.version, meta.generation) = (version, header.generation);
    for block in 0..blocks {
        if meta.state(block) == BlockState::Data {
            meta.checksums[block as usize] = reader.u64()?;
        }
    }
    let mut tags = Vec::with_capacity(header.tags.min(blocks as usize));
    for _ in 0..header.tags {
        let block = reader.u32()?;
        tags.push((block, Tag { epoch: reader.u64()?, sequence: reader.u64()? }));
    }
    meta.tags = tags.into_boxed_slice();
    reader.is_empty().then_some(meta)
}

/// Writes the metadata into the slot of its version (not synced).
pub fn write_meta(
    file: &dyn DiskFile,
    key: &ShardKey,
    shard_bytes: u32,
    meta: &ShardMeta,
) -> DiskResult<()> {
    let slot = encode_slot(key, meta);
    assert!(slot.len() as u64 <= slot_bytes(shard_bytes), "a slot holds any metadata");
    file.write_at(slot_offset(shard_bytes, meta.version), &mut [IoSlice::new(&slot)])
}

/// Writes the metadata into both slots, durably, one after the other: any of them may be the damaged one,
/// and one is whole at every moment where one was before.
pub fn rewrite_both(
    file: &dyn DiskFile,
    key: &ShardKey,
    shard_bytes: u32,
    meta: &mut ShardMeta,
) -> DiskResult<()> {
    for _ in 0..2 {
        meta.version += 1;
        write_meta(file, key, shard_bytes, meta)?;
        file.sync_data()?;
    }
    Ok(())
}

/// Reads the metadata of an existing file. `torn_allowed`: a crash may have torn the newer slot,
/// and the log still has what it described.
pub fn read_meta(
    file: &dyn DiskFile,
    key: &ShardKey,
    shard_bytes: u32,
    torn_allowed: bool,
) -> DiskResult<ShardMeta> {
    let blocks = shard_bytes / BLOCK_BYTES;
    let slot_length = slot_bytes(shard_bytes) as usize;
    let read = |version: u64| -> DiskResult<Slot> {
        let mut bytes = BytesMut::new();
        let offset = slot_offset(shard_bytes, version);
        match file.read_at(offset, slot_length, &mut bytes) {
            Ok(_) => Ok(decode_slot(key, blocks, &bytes)),
            Err(super::disk::Errno::IO) => Ok(Slot::Damaged(None)),
            Err(errno) => Err(errno),
        }
    };
    Ok(choose(read(0)?, read(1)?, blocks, torn_allowed))
}

/// The highest generation that the headers of a file's slots name, 0 where it has none yet; none where
/// one is damaged: it may have named a higher one.
pub fn read_generation(
    file: &dyn DiskFile,
    key: &ShardKey,
    shard_bytes: u32,
) -> DiskResult<Option<u64>> {
    let mut highest = 0;
    for version in [0, 1] {
        let mut head = BytesMut::new();
        match file.read_at(slot_offset(shard_bytes, version), HEADER_BYTES, &mut head) {
            Ok(_) => {}
            Err(super::disk::Errno::IO) => return Ok(None),
            Err(errno) => return Err(errno),
        }
        if head.iter().all(|byte| *byte == 0) {
            continue;
        }
        let Some((_, header)) = decode_slot_header(key, shard_bytes / BLOCK_BYTES, &head) else {
            return Ok(None);
        };
        highest = highest.max(header.generation);
    }
    Ok(Some(highest))
}

/// The metadata that two slots amount to.
fn choose(even: Slot, odd: Slot, blocks: u32, torn_allowed: bool) -> ShardMeta {
    let known = |slot: &Slot| match slot {
        Slot::Whole(meta) => meta.version,
        Slot::Damaged(version) => version.unwrap_or(0),
        Slot::Empty => 0,
    };
    let version = known(&even).max(known(&odd));
    let lost =
        || ShardMeta { version, rewrite_both: true, ..ShardMeta::uniform(blocks, BlockState::Bad) };
    match (even, odd) {
        (Slot::Whole(even), Slot::Whole(odd)) => {
            if even.version > odd.version {
                *even
            } else {
                *odd
            }
        }
        // The second version is where the other slot was written: none is empty from then on.
        (Slot::Whole(whole), Slot::Empty) | (Slot::Empty, Slot::Whole(whole))
            if torn_allowed || whole.version == 1 =>
        {
            *whole
        }
        (Slot::Whole(whole), Slot::Damaged(other)) | (Slot::Damaged(other), Slot::Whole(whole)) => {
            let older = other.is_some_and(|version| version < whole.version);
            if older || torn_allowed { *whole } else { lost() }
        }
        // The first one of all was being written.
        (Slot::Empty, Slot::Empty | Slot::Damaged(_)) | (Slot::Damaged(_), Slot::Empty)
            if torn_allowed =>
        {
            ShardMeta { version, rewrite_both: true, ..ShardMeta::absent() }
        }
        // A checkpoint writes to one of them only: the other one rotted.
        _ => lost(),
    }
}
