//! What the log's records amount to: the index, the dirty maps, the image records.
//!
//! Live requests and replay change it through the same functions, in log order, so that a recovered
//! store is in the state that the instance before it was in.

use std::collections::BTreeMap;

use crate::checksum::Checksum;
use crate::geometry::{BLOCK_BYTES, ImageId, LayerId, ShardKey, Tag};
use crate::rules::{Rule, broken};

use super::dirty::{DirtyMaps, Dropped};
use super::encoding::{Reader, push_u32, push_u64, put_text};
use super::images::{ImageRecord, Images, decode_record};
use super::index::{Index, Place, Run};
use super::record::{CopyBlock, Header, Kind, checksums_of_write, decode_copy};
use super::{BlockState, Stamp};

/// The state of a store but for its files.
#[derive(Default)]
pub struct State {
    pub index: Index,
    pub dirty: DirtyMaps,
    pub images: Images,
    /// Shards of which nothing counts any more, since all is in the layer above, and whose files are to be
    /// removed; and the place of the record that says so.
    pub merged: BTreeMap<ShardKey, Place>,
    /// Highest flush number given out.
    pub flush_number: u64,
}

impl State {
    /// A record with data for consecutive blocks.
    pub fn apply_write(
        &mut self,
        key: ShardKey,
        first_block: u32,
        checksums: impl Iterator<Item = Checksum>,
        place: Place,
        stamp: Stamp,
    ) {
        let tag = stamp.tag();
        self.wrote(&key, tag, stamp, place);
        let shard = self.index.touch(key, place, stamp.generation);
        let mut place = place;
        for (block, checksum) in (first_block..).zip(checksums) {
            let (state, keep_allocated) = (BlockState::Data, false);
            shard.insert(block, Run { length: 1, state, keep_allocated, checksum, place, tag });
            shard.last = place;
            place.offset += BLOCK_BYTES;
        }
    }

    /// A record that makes consecutive blocks absent or zero.
    pub fn apply_zero(&mut self, header: &Header, state: BlockState, place: Place) {
        let tag = header.stamp.tag();
        self.wrote(&header.key, tag, header.stamp, place);
        let shard = self.index.touch(header.key, place, header.stamp.generation);
        let (length, keep_allocated) = (header.blocks, header.keep_allocated);
        shard.insert(
            header.first_block,
            Run { length, state, keep_allocated, checksum: 0, place, tag },
        );
    }

    fn wrote(&mut self, key: &ShardKey, tag: Tag, stamp: Stamp, place: Place) {
        let observed = (stamp.epoch, stamp.generation);
        let shard = (key.shard, key.layer);
        let left = self.dirty.wrote(&key.image, shard, (tag, tag), stamp.generation, observed);
        self.leave_generations(&key.image, left.as_slice(), place);
        self.dirty.changed(&key.image, key.shard, tag);
    }

    /// A record with copied blocks, which keep their source's tags.
    pub fn apply_copy(
        &mut self,
        key: ShardKey,
        blocks: &[CopyBlock],
        place: Place,
        generation: u64,
    ) {
        let tags = || blocks.iter().map(|block| block.tag).filter(|tag| *tag != Tag::NONE);
        if let (Some(lowest), Some(highest)) = (tags().min(), tags().max()) {
            let shard = (key.shard, key.layer);
            let tags = (lowest, highest);
            let left = self.dirty.wrote(&key.image, shard, tags, generation, (0, 0));
            self.leave_generations(&key.image, left.as_slice(), place);
        }
        self.put_blocks(key, blocks, place, generation);
    }

    /// A record with blocks, tags included. Of itself it says nothing of what may differ between replicas: those
    /// from layers below differ no more than before.
    pub fn put_blocks(
        &mut self,
        key: ShardKey,
        blocks: &[CopyBlock],
        place: Place,
        generation: u64,
    ) {
        let shard = self.index.touch(key, place, generation);
        let mut next = place;
        for CopyBlock { block, state, tag, checksum } in blocks.iter().copied() {
            let is_data = state == BlockState::Data;
            let at = if is_data { next } else { place };
            let run = Run { length: 1, state, keep_allocated: false, checksum, place: at, tag };
            shard.insert(block, run);
            if is_data {
                shard.last = next;
                next.offset += BLOCK_BYTES;
            }
        }
    }

    /// Nothing of the shard is left in `from`: it is in the key's layer, which was last written in `generation`
    /// at the earliest.
    pub fn apply_merged(&mut self, key: ShardKey, from: &[LayerId], place: Place, generation: u64) {
        for layer in from.iter().copied() {
            let gone = ShardKey { layer, ..key };
            self.index.remove(&gone);
            self.merged.insert(gone, place);
        }
        self.dirty.merged(&key.image, key.shard, from, key.layer);
        self.index.touch(key, place, generation);
    }

    /// A record of an image; gives whether layers of it are dropped.
    pub fn apply_image(&mut self, image: ImageId, record: ImageRecord) -> bool {
        let (head, chain) = (record.head, record.chain.clone());
        self.dirty.observe(&image, head.epoch, head.generation);
        let dropped = self.images.put(image, record);
        if dropped {
            self.drop_unnamed();
        }
        let stored = self.images.get(&image).is_some_and(|record| record.head == head);
        if stored && !broken(Rule::DroppedLayersGo) {
            self.dirty.keep_layers(&image, &chain);
        }
        dropped
    }

    /// Drops what the log has of layers that no record names any more.
    pub fn drop_unnamed(&mut self) {
        let State { index, images, merged, .. } = self;
        index.retain(|key| !images.is_dropped(key));
        merged.retain(|key, _| !images.is_dropped(key));
    }

    /// A clear.
    pub fn apply_clear(
        &mut self,
        image: &ImageId,
        tag: Tag,
        peers: &[(String, u64)],
        place: Place,
    ) {
        let dropped = self.dirty.clear(image, tag, peers);
        self.leave_generations(image, &dropped, place);
    }

    /// Shards that a heal or reconcile has made level.
    pub fn apply_level(&mut self, image: &ImageId, shards: &[u64], place: Place) {
        let dropped = self.dirty.level(image, shards);
        self.leave_generations(image, &dropped, place);
    }

    fn leave_generations(&mut self, image: &ImageId, dropped: &[Dropped], place: Place) {
        for &Dropped { shard, layer, generation } in dropped {
            self.index.touch(ShardKey { image: *image, layer, shard }, place, generation);
        }
    }

    /// A tombstone.
    pub fn apply_delete(&mut self, image: &ImageId) {
        self.images.delete(*image);
        self.index.retain(|key| key.image != *image);
        self.merged.retain(|key, _| key.image != *image);
        self.dirty.remove_image(image);
    }

    /// Drops what the log still has of images whose tombstone is in a file already.
    pub fn drop_deleted(&mut self) {
        let State { index, dirty, images, merged, .. } = self;
        index.retain(|key| !images.is_deleted(&key.image));
        merged.retain(|key, _| !images.is_deleted(&key.image));
        dirty.retain(|image| !images.is_deleted(image));
    }

    /// Brings the dirty maps up to the records, of which some stand in files only.
    pub fn observe_records(&mut self) {
        let State { dirty, images, .. } = self;
        for image in images.ids() {
            if let Some(record) = images.get(&image) {
                dirty.observe(&image, record.head.epoch, record.head.generation);
            }
        }
    }

    /// Replays the record at `place` (`Place::of_record`); `None` where it makes no sense.
    pub fn replay(&mut self, header: &Header, extra: &[u8], place: Place) -> Option<()> {
        let image = header.key.image;
        let mut reader = Reader::new(extra);
        match header.kind {
            Kind::Head => {}
            Kind::Write => {
                let checksums = checksums_of_write(extra);
                self.apply_write(header.key, header.first_block, checksums, place, header.stamp);
            }
            Kind::Zero => {
                header.first_block.checked_add(header.blocks)?;
                let state = BlockState::from_u8(header.state)?;
                if header.blocks == 0 || state == BlockState::Data {
                    return None;
                }
                self.apply_zero(header, state, place);
            }
            Kind::Copy => {
                let blocks = decode_copy(extra)?;
                self.apply_copy(header.key, &blocks, place, header.stamp.generation);
            }
            Kind::Merge => {
                let blocks = decode_copy(extra)?;
                self.put_blocks(header.key, &blocks, place, header.stamp.generation);
            }
            Kind::Merged => {
                let from: Option<Vec<LayerId>> =
                    extra.chunks(4).map(|bytes| Reader::new(bytes).u32()).collect();
                self.apply_merged(header.key, &from?, place, header.stamp.generation);
            }
            Kind::Image => _ = self.apply_image(image, decode_record(&mut reader)?),
            Kind::Clear => {
                let peers = decode_peers(&mut reader)?;
                self.apply_clear(&image, header.stamp.tag(), &peers, place);
            }
            Kind::Level => {
                let shards: Option<Vec<u64>> =
                    extra.chunks(8).map(|bytes| Reader::new(bytes).u64()).collect();
                self.apply_level(&image, &shards?, place);
            }
            Kind::Flush => self.flush_number = self.flush_number.max(reader.u64()?),
            Kind::Delete => self.apply_delete(&image),
            Kind::Observe => {
                self.dirty.observe(&image, header.stamp.epoch, header.stamp.generation);
            }
        }
        Some(())
    }

    /// Appends the snapshot that a head record carries.
    pub fn encode_snapshot(&self, out: &mut Vec<u8>) {
        push_u64(out, self.flush_number);
        self.dirty.encode(out);
    }

    /// Takes over a snapshot.
    pub fn load_snapshot(&mut self, extra: &[u8]) -> Option<()> {
        let mut reader = Reader::new(extra);
        self.flush_number = reader.u64()?;
        self.dirty = DirtyMaps::decode(&mut reader)?;
        reader.is_empty().then_some(())
    }

    /// Bytes that `encode_snapshot` appends.
    pub fn snapshot_bytes(&self) -> usize {
        8 + self.dirty.encoded_bytes()
    }
}

/// Appends the peers of a clear record.
pub fn encode_peers(peers: &[(String, u64)], out: &mut Vec<u8>) {
    push_u32(out, peers.len() as u32);
    for (name, flush_number) in peers {
        put_text(out, name);
        push_u64(out, *flush_number);
    }
}

fn decode_peers(reader: &mut Reader<'_>) -> Option<Vec<(String, u64)>> {
    let count = reader.u32()?;
    (0..count).map(|_| Some((reader.text()?, reader.u64()?))).collect()
}
