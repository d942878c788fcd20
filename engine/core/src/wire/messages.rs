//! Heads of each kind of frame (docs/wire.md has the tables). A head type reads itself back from
//! exactly the bytes it wrote, and refuses any others.

use super::codec::{Fields, Short, put_list, put_text};
use super::{MAGIC, VERSION};
use crate::checksum::{CHECKSUM_BYTES, Checksum};
use crate::content::Block;
use crate::geometry::{BLOCK_BYTES, ImageId, LAYERS_MAX, LayerId, SnapshotId, Tag};
use bytes::{BufMut, Bytes, BytesMut};

/// A head that can be written and read back.
pub trait Head: Sized {
    fn put(&self, out: &mut BytesMut);
    fn take_fields(fields: &mut Fields) -> Result<Self, Short>;

    /// Reads a whole head.
    fn take(bytes: Bytes) -> Result<Self, Short> {
        let mut fields = Fields(bytes);
        let head = Self::take_fields(&mut fields)?;
        fields.end()?;
        Ok(head)
    }
}

/// First frame of a connection, from the gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    pub version_min: u16,
    pub version_max: u16,
    pub cluster: [u8; 16],
    /// The asking gateway and the node it means to reach.
    pub gateway: String,
    pub node: String,
}

impl Head for Hello {
    fn put(&self, out: &mut BytesMut) {
        out.put_slice(&MAGIC);
        out.put_u16_le(self.version_min);
        out.put_u16_le(self.version_max);
        out.put_slice(&self.cluster);
        put_text(out, &self.gateway);
        put_text(out, &self.node);
    }
    fn take_fields(f: &mut Fields) -> Result<Self, Short> {
        if f.array::<8>()? != MAGIC {
            return Err(Short);
        }
        Ok(Hello {
            version_min: f.u16()?,
            version_max: f.u16()?,
            cluster: f.array()?,
            gateway: f.text()?,
            node: f.text()?,
        })
    }
}

impl Hello {
    pub fn speaks_ours(&self) -> bool {
        (self.version_min..=self.version_max).contains(&VERSION)
    }
}

/// The node's answer to HELLO: which running instance of which store this is.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct HelloReply {
    pub version: u16,
    pub node: String,
    pub store: [u8; 16],
    pub start_counter: u64,
    pub boot: [u8; 16],
    pub flush_number: u64,
}

impl Head for HelloReply {
    fn put(&self, out: &mut BytesMut) {
        out.put_u16_le(self.version);
        put_text(out, &self.node);
        out.put_slice(&self.store);
        out.put_u64_le(self.start_counter);
        out.put_slice(&self.boot);
        out.put_u64_le(self.flush_number);
    }
    fn take_fields(f: &mut Fields) -> Result<Self, Short> {
        Ok(HelloReply {
            version: f.u16()?,
            node: f.text()?,
            store: f.array()?,
            start_counter: f.u64()?,
            boot: f.array()?,
            flush_number: f.u64()?,
        })
    }
}

/// What fences: the part of an image's record that nodes compare (RECORD, PEEK's reply).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordHead {
    pub image: ImageId,
    pub epoch: u64,
    pub holder: [u8; 16],
    pub generation: u64,
    /// BLAKE3 of the replica sets, of who is stale in them, and of the layers.
    pub digest: [u8; 32],
    pub shard_bytes: u32,
}

impl Head for RecordHead {
    fn put(&self, out: &mut BytesMut) {
        out.put_slice(&self.image.0);
        out.put_u64_le(self.epoch);
        out.put_slice(&self.holder);
        out.put_u64_le(self.generation);
        out.put_slice(&self.digest);
        out.put_u32_le(self.shard_bytes);
    }
    fn take_fields(f: &mut Fields) -> Result<Self, Short> {
        Ok(RecordHead {
            image: ImageId(f.array()?),
            epoch: f.u64()?,
            holder: f.array()?,
            generation: f.u64()?,
            digest: f.array()?,
            shard_bytes: f.u32()?,
        })
    }
}

/// RECORD's head; the record's body is the payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    pub head: RecordHead,
    /// The node is made from others from nothing: what it has of the image does not count yet.
    pub blank: bool,
    /// The chain, top first: ids that fall.
    pub layers: Vec<LayerId>,
    /// In any order.
    pub snapshots: Vec<SnapshotId>,
    /// Layers that go into the one above them: ids that fall.
    pub merging: Vec<LayerId>,
}

impl Head for Record {
    fn put(&self, out: &mut BytesMut) {
        self.head.put(out);
        out.put_u8(u8::from(self.blank));
        put_layers(out, &self.layers);
        put_list(out, &self.snapshots, |out, snapshot| put_snapshot(out, *snapshot));
        put_layers(out, &self.merging);
    }
    fn take_fields(f: &mut Fields) -> Result<Self, Short> {
        let record = Record {
            head: RecordHead::take_fields(f)?,
            blank: f.u8()? != 0,
            layers: take_chain(f)?,
            snapshots: f.list(12, take_snapshot)?,
            merging: take_layers(f)?,
        };
        if record.snapshots.len() > LAYERS_MAX { Err(Short) } else { Ok(record) }
    }
}

pub(super) fn put_snapshot(out: &mut BytesMut, snapshot: SnapshotId) {
    out.put_u32_le(snapshot.layer);
    out.put_u64_le(snapshot.generation);
}

pub(super) fn take_snapshot(f: &mut Fields) -> Result<SnapshotId, Short> {
    Ok(SnapshotId { layer: f.u32()?, generation: f.u64()? })
}

fn put_layers(out: &mut BytesMut, layers: &[LayerId]) {
    put_list(out, layers, |out, layer| out.put_u32_le(*layer));
}

/// Ids that fall.
fn take_layers(f: &mut Fields) -> Result<Vec<LayerId>, Short> {
    let layers = f.list(4, Fields::u32)?;
    let fall = layers.len() <= LAYERS_MAX && layers.is_sorted_by(|a, b| a > b);
    if fall { Ok(layers) } else { Err(Short) }
}

/// At least one.
fn take_chain(f: &mut Fields) -> Result<Vec<LayerId>, Short> {
    let layers = take_layers(f)?;
    if layers.is_empty() { Err(Short) } else { Ok(layers) }
}

/// PEEK asks by image id alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peek(pub ImageId);

impl Head for Peek {
    fn put(&self, out: &mut BytesMut) {
        out.put_slice(&self.0.0);
    }
    fn take_fields(f: &mut Fields) -> Result<Self, Short> {
        Ok(Peek(ImageId(f.array()?)))
    }
}

/// PEEK's answer; the record's body is the payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeekReply {
    pub record: RecordHead,
    pub dirty: u32,
    /// The store's own flush number, now.
    pub flush_number: u64,
    /// The store was set back to an older state, and nothing that it has of the image counts.
    pub distrusted: bool,
    /// Flush numbers this node has seen named by clears, to notice a peer that was rolled back.
    pub peers: Vec<(String, u64)>,
    /// Layers that its record has as merging, and of which nothing is left, durably.
    pub emptied: Vec<LayerId>,
}

impl Head for PeekReply {
    fn put(&self, out: &mut BytesMut) {
        self.record.put(out);
        out.put_u32_le(self.dirty);
        out.put_u64_le(self.flush_number);
        out.put_u8(u8::from(self.distrusted));
        put_flush_numbers(out, &self.peers);
        put_layers(out, &self.emptied);
    }
    fn take_fields(f: &mut Fields) -> Result<Self, Short> {
        Ok(PeekReply {
            record: RecordHead::take_fields(f)?,
            dirty: f.u32()?,
            flush_number: f.u64()?,
            distrusted: f.u8()? != 0,
            peers: take_flush_numbers(f)?,
            emptied: take_layers(f)?,
        })
    }
}

fn put_flush_numbers(out: &mut BytesMut, numbers: &[(String, u64)]) {
    put_list(out, numbers, |out, (node, number)| {
        put_text(out, node);
        out.put_u64_le(*number);
    });
}

fn take_flush_numbers(f: &mut Fields) -> Result<Vec<(String, u64)>, Short> {
    f.list(10, |f| Ok((f.text()?, f.u64()?)))
}

/// Begins a session of the image's holder on the frame's channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attach {
    pub image: ImageId,
    pub epoch: u64,
    pub holder: [u8; 16],
}

impl Head for Attach {
    fn put(&self, out: &mut BytesMut) {
        out.put_slice(&self.image.0);
        out.put_u64_le(self.epoch);
        out.put_slice(&self.holder);
    }
    fn take_fields(f: &mut Fields) -> Result<Self, Short> {
        Ok(Attach { image: ImageId(f.array()?), epoch: f.u64()?, holder: f.array()? })
    }
}

/// Begins a session of a reader of a snapshot on the frame's channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttachReader {
    pub image: ImageId,
    pub snapshot: SnapshotId,
}

impl Head for AttachReader {
    fn put(&self, out: &mut BytesMut) {
        out.put_slice(&self.image.0);
        put_snapshot(out, self.snapshot);
    }
    fn take_fields(f: &mut Fields) -> Result<Self, Short> {
        Ok(AttachReader { image: ImageId(f.array()?), snapshot: take_snapshot(f)? })
    }
}

/// Requests that name no more than the session: DETACH, CONFIRM, DIRTY.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Session {
    pub epoch: u64,
}

impl Head for Session {
    fn put(&self, out: &mut BytesMut) {
        out.put_u64_le(self.epoch);
    }
    fn take_fields(f: &mut Fields) -> Result<Self, Short> {
        Ok(Session { epoch: f.u64()? })
    }
}

/// WRITE, ZERO, READ, STATUS: a range within one shard and the stamp it is asked under.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Io {
    pub shard: u64,
    /// Within the shard, in bytes. READ and STATUS: multiples of the block size.
    pub offset: u32,
    pub length: u32,
    pub epoch: u64,
    pub generation: u64,
    /// 0 where nothing changes.
    pub sequence: u64,
}

/// Bytes of an `Io` head, before WRITE's checksums.
pub const IO_BYTES: usize = 40;

impl Head for Io {
    fn put(&self, out: &mut BytesMut) {
        out.put_u64_le(self.shard);
        out.put_u32_le(self.offset);
        out.put_u32_le(self.length);
        out.put_u64_le(self.epoch);
        out.put_u64_le(self.generation);
        out.put_u64_le(self.sequence);
    }
    fn take_fields(f: &mut Fields) -> Result<Self, Short> {
        Ok(Io {
            shard: f.u64()?,
            offset: f.u32()?,
            length: f.u32()?,
            epoch: f.u64()?,
            generation: f.u64()?,
            sequence: f.u64()?,
        })
    }
}

/// READ_INTO: a READ whose data goes into the memory that MEMORY has handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoInto {
    pub io: Io,
    /// Where in the memory; there is room for `io.length` bytes.
    pub at: u64,
}

impl Head for IoInto {
    fn put(&self, out: &mut BytesMut) {
        self.io.put(out);
        out.put_u64_le(self.at);
    }
    fn take_fields(f: &mut Fields) -> Result<Self, Short> {
        Ok(IoInto { io: Io::take_fields(f)?, at: f.u64()? })
    }
}

/// WRITE's head: the range, then one checksum per touched block, read into `checksums`.
pub fn take_write(head: Bytes, checksums: &mut Vec<Checksum>) -> Result<Io, Short> {
    let mut fields = Fields(head);
    let io = Io::take_fields(&mut fields)?;
    if !fields.0.len().is_multiple_of(CHECKSUM_BYTES) {
        return Err(Short);
    }
    checksums.clear();
    while !fields.0.is_empty() {
        checksums.push(fields.u64()?);
    }
    Ok(io)
}

/// A block on the wire: a byte 0 (absent), 1 (zero), 2 (data) or 3 (bad) and the checksum (0 without
/// data).
fn put_block(out: &mut BytesMut, block: Block) {
    let (state, checksum) = match block {
        Block::Absent => (0, 0),
        Block::Zero => (1, 0),
        Block::Data(checksum) => (2, checksum),
        Block::Bad => (3, 0),
    };
    out.put_u8(state);
    out.put_u64_le(checksum);
}

fn take_block(f: &mut Fields) -> Result<Block, Short> {
    let (state, checksum) = (f.u8()?, f.u64()?);
    match state {
        0 => Ok(Block::Absent),
        1 => Ok(Block::Zero),
        2 => Ok(Block::Data(checksum)),
        3 => Ok(Block::Bad),
        _ => Err(Short),
    }
}

/// Answer to READ and STATUS: the blocks of the range; READ's payload is the data blocks' data.
pub fn put_blocks(out: &mut BytesMut, blocks: impl ExactSizeIterator<Item = Block>) {
    out.put_u32_le(blocks.len() as u32);
    blocks.for_each(|block| put_block(out, block));
}

/// Reads what `put_blocks` wrote, into `blocks`.
pub fn take_blocks(head: Bytes, blocks: &mut Vec<Block>) -> Result<(), Short> {
    let mut fields = Fields(head);
    let count = fields.u32()? as usize;
    if fields.0.len() != count.checked_mul(BLOCK_WIRE_BYTES).ok_or(Short)? {
        return Err(Short);
    }
    blocks.clear();
    blocks.reserve(count);
    for _ in 0..count {
        blocks.push(take_block(&mut fields)?);
    }
    Ok(())
}

/// Bytes of data that belong to a list of blocks.
pub fn data_bytes(head: &Bytes) -> Result<usize, Short> {
    let mut blocks = Vec::new();
    take_blocks(head.clone(), &mut blocks)?;
    Ok(blocks.iter().filter(|block| block.is_data()).count() * BLOCK_BYTES as usize)
}

/// FLUSH carries the clear that the flush before it allowed; CLEAR carries it alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flush {
    pub epoch: u64,
    pub generation: u64,
    /// Writes up to here are flushed by all in-sync nodes; 0: those of former epochs
    /// only, and nothing without a proof.
    pub clear_sequence: u64,
    /// The flush numbers that prove it, by node.
    pub proof: Vec<(String, u64)>,
}

impl Head for Flush {
    fn put(&self, out: &mut BytesMut) {
        out.put_u64_le(self.epoch);
        out.put_u64_le(self.generation);
        out.put_u64_le(self.clear_sequence);
        put_flush_numbers(out, &self.proof);
    }
    fn take_fields(f: &mut Fields) -> Result<Self, Short> {
        Ok(Flush {
            epoch: f.u64()?,
            generation: f.u64()?,
            clear_sequence: f.u64()?,
            proof: take_flush_numbers(f)?,
        })
    }
}

/// FLUSH's answer: the number that was synced with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Number(pub u64);

impl Head for Number {
    fn put(&self, out: &mut BytesMut) {
        out.put_u64_le(self.0);
    }
    fn take_fields(f: &mut Fields) -> Result<Self, Short> {
        Ok(Number(f.u64()?))
    }
}

/// One entry of a dirty map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirtyEntry {
    pub shard: u64,
    pub last: Tag,
    pub generation: u64,
    pub sticky: bool,
}

/// DIRTY asks for the entries from `from_shard` on; the answer is bounded, ask on from its last + 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirtyFrom {
    pub epoch: u64,
    pub from_shard: u64,
}

impl Head for DirtyFrom {
    fn put(&self, out: &mut BytesMut) {
        out.put_u64_le(self.epoch);
        out.put_u64_le(self.from_shard);
    }
    fn take_fields(f: &mut Fields) -> Result<Self, Short> {
        Ok(DirtyFrom { epoch: f.u64()?, from_shard: f.u64()? })
    }
}

/// Most entries in one answer to DIRTY, and most shards in one LEVEL.
pub const DIRTY_ENTRIES_MAX: usize = 8192;

/// Answer to DIRTY. `more`: there are entries beyond the last one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyReply {
    pub entries: Vec<DirtyEntry>,
    pub more: bool,
}

impl Head for DirtyReply {
    fn put(&self, out: &mut BytesMut) {
        out.put_u8(u8::from(self.more));
        put_list(out, &self.entries, |out, e| {
            out.put_u64_le(e.shard);
            put_tag(out, e.last);
            out.put_u64_le(e.generation);
            out.put_u8(u8::from(e.sticky));
        });
    }
    fn take_fields(f: &mut Fields) -> Result<Self, Short> {
        let more = f.u8()? != 0;
        let entries = f.list(33, |f| {
            Ok(DirtyEntry {
                shard: f.u64()?,
                last: take_tag(f)?,
                generation: f.u64()?,
                sticky: f.u8()? != 0,
            })
        })?;
        Ok(DirtyReply { entries, more })
    }
}

fn put_tag(out: &mut BytesMut, tag: Tag) {
    out.put_u64_le(tag.epoch);
    out.put_u64_le(tag.sequence);
}

fn take_tag(f: &mut Fields) -> Result<Tag, Short> {
    Ok(Tag { epoch: f.u64()?, sequence: f.u64()? })
}

/// SUMMARY, FETCH and SCRUB: blocks of one shard of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardRange {
    pub epoch: u64,
    pub layer: LayerId,
    pub shard: u64,
    pub first_block: u32,
    pub blocks: u32,
}

impl Head for ShardRange {
    fn put(&self, out: &mut BytesMut) {
        out.put_u64_le(self.epoch);
        out.put_u32_le(self.layer);
        out.put_u64_le(self.shard);
        out.put_u32_le(self.first_block);
        out.put_u32_le(self.blocks);
    }
    fn take_fields(f: &mut Fields) -> Result<Self, Short> {
        Ok(ShardRange {
            epoch: f.u64()?,
            layer: f.u32()?,
            shard: f.u64()?,
            first_block: f.u32()?,
            blocks: f.u32()?,
        })
    }
}

/// Answer to SUMMARY and FETCH: the shard's generation, and content and tag of each block asked
/// for; FETCH's payload is the data blocks' data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlocksReply {
    pub generation: u64,
    pub blocks: Vec<(Block, Tag)>,
}

impl Head for BlocksReply {
    fn put(&self, out: &mut BytesMut) {
        out.put_u64_le(self.generation);
        put_tagged(out, &self.blocks);
    }
    fn take_fields(f: &mut Fields) -> Result<Self, Short> {
        Ok(BlocksReply { generation: f.u64()?, blocks: take_tagged(f)? })
    }
}

fn put_tagged(out: &mut BytesMut, blocks: &[(Block, Tag)]) {
    put_list(out, blocks, |out, (block, tag)| {
        put_block(out, *block);
        put_tag(out, *tag);
    });
}

/// Of a block's state and checksum.
const BLOCK_WIRE_BYTES: usize = 1 + CHECKSUM_BYTES;
/// Of a block's state, checksum and tag.
pub const TAGGED_BLOCK_BYTES: usize = BLOCK_WIRE_BYTES + 16;

fn take_tagged(f: &mut Fields) -> Result<Vec<(Block, Tag)>, Short> {
    f.list(TAGGED_BLOCK_BYTES, |f| Ok((take_block(f)?, take_tag(f)?)))
}

/// COPY: make these blocks so, with their source's tags, under the orderer's epoch and generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Copy {
    pub epoch: u64,
    pub generation: u64,
    pub layer: LayerId,
    pub shard: u64,
    /// The source shard's generation of last write.
    pub shard_generation: u64,
    /// Block indexes within the shard, ascending, beside their content and tag.
    pub indexes: Vec<u32>,
    pub blocks: Vec<(Block, Tag)>,
}

impl Head for Copy {
    fn put(&self, out: &mut BytesMut) {
        out.put_u64_le(self.epoch);
        out.put_u64_le(self.generation);
        out.put_u32_le(self.layer);
        out.put_u64_le(self.shard);
        out.put_u64_le(self.shard_generation);
        put_list(out, &self.indexes, |out, index| out.put_u32_le(*index));
        put_tagged(out, &self.blocks);
    }
    fn take_fields(f: &mut Fields) -> Result<Self, Short> {
        let copy = Copy {
            epoch: f.u64()?,
            generation: f.u64()?,
            layer: f.u32()?,
            shard: f.u64()?,
            shard_generation: f.u64()?,
            indexes: f.list(4, Fields::u32)?,
            blocks: take_tagged(f)?,
        };
        if copy.indexes.len() != copy.blocks.len() || !copy.indexes.is_sorted() {
            return Err(Short);
        }
        Ok(copy)
    }
}

/// LEVEL: these shards are equal on all in-sync nodes, durably.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Level {
    pub epoch: u64,
    pub shards: Vec<u64>,
}

impl Head for Level {
    fn put(&self, out: &mut BytesMut) {
        out.put_u64_le(self.epoch);
        put_list(out, &self.shards, |out, shard| out.put_u64_le(*shard));
    }
    fn take_fields(f: &mut Fields) -> Result<Self, Short> {
        Ok(Level { epoch: f.u64()?, shards: f.list(8, Fields::u64)? })
    }
}

/// WRITTEN asks for the shards that were last written above a generation, from a place on: the first
/// time 0, then what the last answer named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WrittenAbove {
    pub epoch: u64,
    pub generation: u64,
    pub place: u32,
    pub shard: u64,
}

impl Head for WrittenAbove {
    fn put(&self, out: &mut BytesMut) {
        out.put_u64_le(self.epoch);
        out.put_u64_le(self.generation);
        out.put_u32_le(self.place);
        out.put_u64_le(self.shard);
    }
    fn take_fields(f: &mut Fields) -> Result<Self, Short> {
        Ok(WrittenAbove { epoch: f.u64()?, generation: f.u64()?, place: f.u32()?, shard: f.u64()? })
    }
}

/// Most shards in one answer to WRITTEN.
pub const WRITTEN_SHARDS_MAX: usize = 8192;

/// Answer to WRITTEN, bounded in the work it takes, so it may name no shard and yet not be the last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrittenReply {
    /// Where to ask on: place and shard; none: this was the last.
    pub next: Option<(u32, u64)>,
    pub shards: Vec<u64>,
}

impl Head for WrittenReply {
    fn put(&self, out: &mut BytesMut) {
        let (place, shard) = self.next.unwrap_or((0, 0));
        out.put_u8(u8::from(self.next.is_some()));
        out.put_u32_le(place);
        out.put_u64_le(shard);
        put_list(out, &self.shards, |out, shard| out.put_u64_le(*shard));
    }
    fn take_fields(f: &mut Fields) -> Result<Self, Short> {
        let more = f.u8()? != 0;
        let next = (f.u32()?, f.u64()?);
        let next = more.then_some(next);
        Ok(WrittenReply { next, shards: f.list(8, Fields::u64)? })
    }
}

/// Most blocks of one SCRUB.
pub const SCRUB_BLOCKS_MAX: usize = 256;

/// Answer to SCRUB: what was read, and what of it is rotten.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScrubReply {
    /// The shard's metadata was damaged, and is whole again.
    pub metadata_rewritten: bool,
    pub data_blocks: u32,
    /// BLAKE3 of states and content.
    pub digest: [u8; 32],
    /// Block indexes within the shard, ascending.
    pub rotten: Vec<u32>,
}

impl Head for ScrubReply {
    fn put(&self, out: &mut BytesMut) {
        out.put_u8(u8::from(self.metadata_rewritten));
        out.put_u32_le(self.data_blocks);
        out.put_slice(&self.digest);
        put_list(out, &self.rotten, |out, block| out.put_u32_le(*block));
    }
    fn take_fields(f: &mut Fields) -> Result<Self, Short> {
        let reply = ScrubReply {
            metadata_rewritten: f.u8()? != 0,
            data_blocks: f.u32()?,
            digest: f.array()?,
            rotten: f.list(4, Fields::u32)?,
        };
        if reply.rotten.len() > SCRUB_BLOCKS_MAX || !reply.rotten.is_sorted_by(|a, b| a < b) {
            return Err(Short);
        }
        Ok(reply)
    }
}
