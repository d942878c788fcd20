//! Encoding of log records: a fixed header, a variable part, and whole blocks of payload.
//! The layout is part of the disk format (`docs/disk-format.md`, "Log records").
//!
//! The header's checksum starts from a seed made of the store's random id, so that no guest can
//! write data that reads as a record.

use crate::checksum::{CHECKSUM_BYTES, Checksum, checksum_of};
use crate::geometry::{BLOCK_BYTES, ImageId, ShardKey, Tag};

use super::encoding::{Reader, put_u32, put_u64};
use super::{BlockState, Stamp};

/// Bytes of the fixed header.
pub const HEADER_BYTES: usize = 104;
const MAGIC: u32 = 0x4C49_4348;
/// Bytes per block in the variable part of a write record.
pub const WRITE_EXTRA: usize = CHECKSUM_BYTES;
/// Bytes per block in the variable part of a copy record.
pub const COPY_EXTRA: usize = 24 + CHECKSUM_BYTES;

/// What a record says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Kind {
    /// First record of a segment: the small state at that point.
    Head = 1,
    Write = 2,
    Zero = 3,
    Copy = 4,
    Image = 5,
    Clear = 6,
    Level = 7,
    Flush = 9,
    Delete = 10,
    Observe = 11,
    /// Blocks that came from layers below.
    Merge = 12,
    /// Nothing of a shard is left in these layers: its content is in the one above them.
    Merged = 13,
}

impl Kind {
    fn from_u8(value: u8) -> Option<Kind> {
        use Kind::{
            Clear, Copy, Delete, Flush, Head, Image, Level, Merge, Merged, Observe, Write, Zero,
        };
        let of_blocks = [Write, Zero, Copy, Merge, Merged];
        let others = [Head, Image, Clear, Level, Flush, Delete, Observe];
        of_blocks.into_iter().chain(others).find(|kind| *kind as u8 == value)
    }
}

/// The fixed part of a record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    pub kind: Kind,
    /// Of a zero record: the state of its blocks; else 0.
    pub state: u8,
    /// Of a zero record: the space stays allocated.
    pub keep_allocated: bool,
    pub extra_bytes: u32,
    pub payload_bytes: u32,
    pub lsn: u64,
    pub instance: u64,
    /// What was known to be durable when the record was staged.
    pub durable_lsn: u64,
    pub key: ShardKey,
    pub first_block: u32,
    pub blocks: u32,
    pub stamp: Stamp,
}

impl Header {
    /// A header of `kind` for `image`, everything else zero; the log fills in what it owns.
    pub fn new(kind: Kind, image: ImageId) -> Header {
        Header {
            kind,
            state: 0,
            keep_allocated: false,
            extra_bytes: 0,
            payload_bytes: 0,
            lsn: 0,
            instance: 0,
            durable_lsn: 0,
            key: ShardKey { image, layer: 0, shard: 0 },
            first_block: 0,
            blocks: 0,
            stamp: Stamp::default(),
        }
    }

    /// Bytes of the whole record.
    pub fn total_bytes(&self) -> usize {
        HEADER_BYTES + self.extra_bytes as usize + self.payload_bytes as usize
    }
}

/// Fills the first `HEADER_BYTES` of `record`, which is header and variable part.
pub fn encode_header(header: &Header, seed: u32, record: &mut [u8]) {
    let mut fixed = [0u8; HEADER_BYTES];
    let mut at = 0;
    put_u32(&mut fixed, &mut at, MAGIC);
    put_u32(&mut fixed, &mut at, 0);
    fixed[at..at + 4].copy_from_slice(&[
        header.kind as u8,
        header.state,
        u8::from(header.keep_allocated),
        0,
    ]);
    at += 4;
    put_u32(&mut fixed, &mut at, header.extra_bytes);
    put_u32(&mut fixed, &mut at, header.payload_bytes);
    put_u32(&mut fixed, &mut at, header.blocks);
    put_u64(&mut fixed, &mut at, header.lsn);
    put_u64(&mut fixed, &mut at, header.instance);
    put_u64(&mut fixed, &mut at, header.durable_lsn);
    fixed[at..at + 16].copy_from_slice(&header.key.image.0);
    at += 16;
    put_u32(&mut fixed, &mut at, header.key.layer);
    put_u32(&mut fixed, &mut at, header.first_block);
    put_u64(&mut fixed, &mut at, header.key.shard);
    put_u64(&mut fixed, &mut at, header.stamp.epoch);
    put_u64(&mut fixed, &mut at, header.stamp.generation);
    put_u64(&mut fixed, &mut at, header.stamp.sequence);
    assert_eq!(at, HEADER_BYTES, "the header's fields fill it");
    record[..HEADER_BYTES].copy_from_slice(&fixed);
    let checksum = ::crc32c::crc32c_append(seed, &record[8..]);
    record[4..8].copy_from_slice(&checksum.to_le_bytes());
}

/// Bytes that a record has by its own word; none where no record starts. Nothing of it is checked.
pub fn claimed_bytes(bytes: &[u8]) -> Option<usize> {
    let mut reader = Reader::new(bytes);
    if reader.u32()? != MAGIC {
        return None;
    }
    let (_checksum, _kind) = (reader.u32()?, reader.u32()?);
    let (extra_bytes, payload_bytes) = (reader.u32()?, reader.u32()?);
    HEADER_BYTES.checked_add(extra_bytes as usize)?.checked_add(payload_bytes as usize)
}

/// Reads the record that starts at `bytes`, and checks header and variable part (not the payload).
/// Gives header, variable part and payload; `None` for anything but a whole record of this store.
pub fn decode(bytes: &[u8], seed: u32) -> Option<(Header, &[u8], &[u8])> {
    let mut reader = Reader::new(bytes);
    if reader.u32()? != MAGIC {
        return None;
    }
    let checksum = reader.u32()?;
    let [kind, state, keep_allocated, _] = reader.array()?;
    let (extra_bytes, payload_bytes, blocks) = (reader.u32()?, reader.u32()?, reader.u32()?);
    let (lsn, instance, durable_lsn) = (reader.u64()?, reader.u64()?, reader.u64()?);
    let image = ImageId(reader.array()?);
    let (layer, first_block, shard) = (reader.u32()?, reader.u32()?, reader.u64()?);
    let (epoch, generation, sequence) = (reader.u64()?, reader.u64()?, reader.u64()?);
    let header_end = HEADER_BYTES.checked_add(extra_bytes as usize)?;
    let record_end = header_end.checked_add(payload_bytes as usize)?;
    if record_end > bytes.len() {
        return None;
    }
    if ::crc32c::crc32c_append(seed, &bytes[8..header_end]) != checksum {
        return None;
    }
    let header = Header {
        kind: Kind::from_u8(kind)?,
        state,
        keep_allocated: keep_allocated != 0,
        extra_bytes,
        payload_bytes,
        blocks,
        lsn,
        instance,
        durable_lsn,
        key: ShardKey { image, layer, shard },
        first_block,
        stamp: Stamp { epoch, generation, sequence },
    };
    Some((header, &bytes[HEADER_BYTES..header_end], &bytes[header_end..record_end]))
}

/// One block of a copy record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CopyBlock {
    pub block: u32,
    pub state: BlockState,
    /// The source's tag of the block.
    pub tag: Tag,
    /// Of the block's content; 0 where it has none.
    pub checksum: Checksum,
}

/// Appends the variable part of a copy record.
pub fn encode_copy(blocks: &[CopyBlock], out: &mut Vec<u8>) {
    for block in blocks {
        out.extend_from_slice(&block.block.to_le_bytes());
        out.extend_from_slice(&u32::from(block.state.to_u8()).to_le_bytes());
        out.extend_from_slice(&block.checksum.to_le_bytes());
        out.extend_from_slice(&block.tag.epoch.to_le_bytes());
        out.extend_from_slice(&block.tag.sequence.to_le_bytes());
    }
}

/// Reads the variable part of a copy record.
pub fn decode_copy(extra: &[u8]) -> Option<Vec<CopyBlock>> {
    if !extra.len().is_multiple_of(COPY_EXTRA) {
        return None;
    }
    let mut reader = Reader::new(extra);
    let mut blocks = Vec::with_capacity(extra.len() / COPY_EXTRA);
    while !reader.is_empty() {
        let (block, state, checksum) = (reader.u32()?, reader.u32()?, reader.u64()?);
        let state = BlockState::from_u8(u8::try_from(state).ok()?)?;
        let tag = Tag { epoch: reader.u64()?, sequence: reader.u64()? };
        blocks.push(CopyBlock { block, state, tag, checksum });
    }
    Some(blocks)
}

/// The checksums in the variable part of a write record, one for each block.
pub fn checksums_of_write(extra: &[u8]) -> impl Iterator<Item = Checksum> {
    let (checksums, _) = extra.as_chunks::<WRITE_EXTRA>();
    checksums.iter().map(|bytes| Checksum::from_le_bytes(*bytes))
}

/// Whether the payload is what the checksums of the record promise.
pub fn payload_matches(header: &Header, extra: &[u8], payload: &[u8]) -> bool {
    let block_bytes = BLOCK_BYTES as usize;
    let matches = |(data, checksum): (&[u8], Checksum)| checksum_of(data) == checksum;
    match header.kind {
        Kind::Write => {
            let checksums = checksums_of_write(extra);
            payload.len() == header.blocks as usize * block_bytes
                && extra.len() == header.blocks as usize * WRITE_EXTRA
                && payload.chunks_exact(block_bytes).zip(checksums).all(matches)
        }
        Kind::Copy | Kind::Merge => {
            let Some(blocks) = decode_copy(extra) else { return false };
            let checksums: Vec<Checksum> =
                blocks.iter().filter(|b| b.state == BlockState::Data).map(|b| b.checksum).collect();
            payload.len() == checksums.len() * block_bytes
                && payload.chunks_exact(block_bytes).zip(checksums).all(matches)
        }
        _ => payload.is_empty(),
    }
}
