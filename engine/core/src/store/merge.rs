//! Merging: what is in a layer that no snapshot names any more goes into the layer above it, shard by shard,
//! until nothing of it is left. A node does that by itself, in small steps; what a read finds through the
//! chain is the same at every moment.
//!
//! A shard is merged in this order: blocks that are absent above and are something below are put above by
//! records of their own (`Merge`); then one record (`Merged`) says that nothing below counts any more; its files
//! go with a checkpoint, which first syncs the log. Adjacent layers go at once, each block from the uppermost that
//! has it. A crash leaves the shard below as it was or empty; what was put above by then hides the same below.
//!
//! Invariants:
//! - a block that is something above is never touched: it is newer;
//! - rot below is `Bad` above, never absent, through which something older would show;
//! - the shard above counts as last written in the highest generation of all;
//! - a file goes when the log has its content durably, and the log keeps that and the word that it is gone
//!   until it is.
//!
//! Who compares or copies a shard merges it first (`finish_merge`), so that two nodes that are at different
//! points of their merges compare equal.

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};

use crate::checksum::checksum_of;
use crate::geometry::{BLOCK_BYTES, ImageId, LayerId, ShardKey, Tag};
use crate::rules::{Rule, broken};

use super::disk::{DiskResult, Errno};
use super::images::{ImageRecord, Images, Merge};
use super::lineage::View;
use super::log::Class;
use super::read::{Found, ReadBuffer, read_singly, read_whole, run_length};
use super::record::{COPY_EXTRA, CopyBlock, HEADER_BYTES, Header, Kind, encode_copy};
use super::shard_file::{FOLDERS, shards_in};
use super::{BlockState, Stamp, Store, StoreError};

const BLOCK: usize = BLOCK_BYTES as usize;
/// Blocks that one step puts above at most; blocks that it looks at, and empty folders, until it finds some.
const STEP_BLOCKS_MAX: u32 = 64;
const STEP_LOOKS: u32 = 1024;
const STEP_FOLDERS: u32 = 16;
/// Blocks that one call of `finish_merge` puts above.
const TURN_BLOCKS: u64 = 128;
/// So many merged shards are reason enough for a checkpoint, which removes their files.
const MERGED_MANY: usize = 128;

/// How far the merges of one image are: all that its merging layers have is looked for, memory first and then
/// folder by folder, until a whole round finds nothing.
#[derive(Default)]
struct Sweep {
    /// Of the record.
    merging: Vec<LayerId>,
    /// 0: memory; then the folders of each layer.
    place: u32,
    /// Shards found there.
    found: Vec<(LayerId, u64)>,
    /// The shard being merged, and its next block.
    at: Option<(LayerId, u64, u32)>,
    /// Something was found in this round.
    busy: bool,
    finished: bool,
}

/// The merges of all images.
#[derive(Default)]
pub struct Merges {
    sweeps: BTreeMap<ImageId, Sweep>,
    /// The image that had the last step.
    last: Option<ImageId>,
}

impl Merges {
    /// Of all images of a store that opens.
    pub fn of(images: &Images) -> Merges {
        let mut merges = Merges::default();
        for image in images.ids() {
            if let Some(record) = images.get(&image) {
                merges.record(image, record);
            }
        }
        merges
    }

    /// The image that has the next step: they take turns.
    fn next(&self) -> Option<ImageId> {
        let waits = |(image, sweep): (&ImageId, &Sweep)| (!sweep.finished).then_some(*image);
        let after = self.sweeps.iter().filter(|(image, _)| Some(**image) > self.last);
        after.filter_map(waits).next().or_else(|| self.sweeps.iter().find_map(waits))
    }

    /// The image has this record now. Where other layers are merged, what is left of them is to be found anew.
    pub fn record(&mut self, image: ImageId, record: &ImageRecord) {
        if record.merging.is_empty() {
            self.sweeps.remove(&image);
        } else if self.sweeps.get(&image).is_none_or(|sweep| sweep.merging != record.merging) {
            let merging = record.merging.clone();
            self.sweeps.insert(image, Sweep { merging, ..Sweep::default() });
        }
    }

    /// Something came to a layer of the image that is merged.
    pub fn copied_to(&mut self, image: &ImageId, layer: LayerId) {
        if let Some(sweep) =
            self.sweeps.get_mut(image).filter(|sweep| sweep.merging.contains(&layer))
        {
            (sweep.place, sweep.busy, sweep.finished) = (0, true, false);
        }
    }

    pub fn forget(&mut self, image: &ImageId) {
        self.sweeps.remove(image);
    }
}

impl Store {
    /// Whether anything may be left to merge.
    pub fn wants_merge(&self) -> bool {
        self.merges.sweeps.values().any(|sweep| !sweep.finished)
    }

    /// Whether files of merged shards are reason for a checkpoint: they are many, or all there will
    /// be of their image.
    pub(super) fn wants_to_remove_merged(&self) -> bool {
        let merged = &self.state.merged;
        let finished =
            |key: &ShardKey| self.merges.sweeps.get(&key.image).is_none_or(|sweep| sweep.finished);
        merged.len() >= MERGED_MANY || merged.keys().any(finished)
    }

    /// The merging layers of an image of which nothing is left here, durably: all of them, or none yet.
    pub fn emptied(&self, image: &ImageId) -> Vec<LayerId> {
        let finished = self.merges.sweeps.get(image).is_some_and(|sweep| sweep.finished);
        // What was merged is durable with the checkpoint that removes its files.
        let removed = !self.state.merged.keys().any(|key| key.image == *image);
        let record = self.image(image).filter(|_| finished && removed);
        record.map_or(Vec::new(), |record| record.merging.clone())
    }

    /// Merges a little of what is left of some image. `LogFull` while a checkpoint is due, which leaves some
    /// room to clients; `pressing`, since that finds no space, it takes what room there is.
    ///
    /// Gives the bytes that were put into the log.
    pub fn merge_some(&mut self, pressing: bool) -> Result<u64, StoreError> {
        self.check()?;
        let Some(image) = self.merges.next() else { return Ok(0) };
        let grows = self.log.free_segments() < 2 && self.log.wants_growth();
        if (self.log_is_due() || grows) && !pressing {
            return Err(StoreError::LogFull);
        }
        let Some(mut sweep) = self.merges.sweeps.remove(&image) else { return Ok(0) };
        self.merges.last = Some(image);
        let stepped = self.step(image, &mut sweep);
        if stepped.is_err() {
            // Others may need less, or be readable; this one is found again.
            sweep.at = None;
        }
        self.merges.sweeps.insert(image, sweep);
        stepped
    }

    /// One record holds what a step finds.
    fn step_blocks(&self) -> u32 {
        self.log.record_blocks_max().min(STEP_BLOCKS_MAX)
    }

    fn step(&mut self, image: ImageId, sweep: &mut Sweep) -> Result<u64, StoreError> {
        if sweep.at.is_none() {
            sweep.at = sweep.found.pop().map(|(layer, shard)| (layer, shard, 0));
        }
        let Some((layer, shard, block)) = sweep.at else {
            return self.look_for_more(image, sweep).map(|()| 0);
        };
        let shard_blocks = self.state.images.require(&image)?.shard_bytes / BLOCK_BYTES;
        let merge = self.image(&image).and_then(|record| record.merge_of(layer));
        if let Some(merge) = merge.filter(|_| block < shard_blocks)
            && let Some(generation) = self.generation_below(&merge, &image, shard)?
        {
            let (mut next, end) = (block, shard_blocks.min(block.saturating_add(STEP_LOOKS)));
            let mut found = 0;
            while next < end && found == 0 {
                let blocks = self.step_blocks().min(end - next);
                found = self.merge_blocks(&merge, image, shard, (next, blocks), generation)?;
                next += blocks;
            }
            sweep.at = Some((layer, shard, next));
            return Ok(found);
        }
        // Once more from the first block on: something may have been copied below meanwhile.
        if self.finish_merge(&image, layer, shard)? {
            sweep.at = None;
        }
        Ok(0)
    }

    /// Finds the next shards that merging layers have something of.
    fn look_for_more(&mut self, image: ImageId, sweep: &mut Sweep) -> Result<(), StoreError> {
        let merging = sweep.merging.clone();
        let end = merging.len() as u32 * FOLDERS + 1;
        for _ in 0..STEP_FOLDERS {
            if sweep.place == end {
                sweep.finished = !sweep.busy;
                (sweep.place, sweep.busy) = (0, false);
                return Ok(());
            }
            sweep.found = match sweep.place {
                0 => self.merging_in_memory(image, &merging),
                place => {
                    let layer = merging[((place - 1) / FOLDERS) as usize];
                    self.merging_in_folder(image, layer, (place - 1) % FOLDERS)?
                }
            };
            sweep.place += 1;
            if !sweep.found.is_empty() {
                sweep.busy = true;
                return Ok(());
            }
        }
        Ok(())
    }

    fn merging_in_memory(&self, image: ImageId, merging: &[LayerId]) -> Vec<(LayerId, u64)> {
        let logged = self.state.index.iter().map(|(key, _)| *key);
        let logged = logged.filter(|key| key.image == image && merging.contains(&key.layer));
        let dirty = self.state.dirty.of(&image).map(|(shard, entry)| (entry.layer, shard));
        let dirty = dirty.filter(|(layer, _)| merging.contains(layer));
        let mut found: Vec<_> = logged.map(|key| (key.layer, key.shard)).chain(dirty).collect();
        found.sort_unstable();
        found
    }

    fn merging_in_folder(
        &self,
        image: ImageId,
        layer: LayerId,
        folder: u32,
    ) -> DiskResult<Vec<(LayerId, u64)>> {
        let shards = shards_in(&*self.disk, &image, layer, u64::from(folder))?;
        let counts = |shard: &u64| {
            let key = ShardKey { image, layer, shard: *shard };
            !self.state.merged.contains_key(&key)
        };
        Ok(shards.into_iter().filter(counts).map(|shard| (layer, shard)).collect())
    }

    /// Merges the shard as far as this layer has a part in that, so that it may be compared with what other
    /// nodes have; false: there is more to do, and others have a turn before it is asked for again. `LogFull`: go
    /// on after a checkpoint. What was done by then stays done.
    pub fn finish_merge(
        &mut self,
        image: &ImageId,
        layer: LayerId,
        shard: u64,
    ) -> Result<bool, StoreError> {
        self.check()?;
        let record = self.image(image).filter(|record| !record.merging.is_empty());
        let Some(merge) = record.and_then(|record| record.merge_of(layer)) else { return Ok(true) };
        let Some(generation) = self.generation_below(&merge, image, shard)? else {
            return Ok(true);
        };
        let shard_blocks = self.state.images.require(image)?.shard_bytes / BLOCK_BYTES;
        let (step, mut bytes) = (self.step_blocks(), 0);
        for block in (0..shard_blocks).step_by(step as usize) {
            let blocks = step.min(shard_blocks - block);
            bytes += self.merge_blocks(&merge, *image, shard, (block, blocks), generation)?;
            if bytes >= TURN_BLOCKS * u64::from(BLOCK_BYTES) {
                return Ok(false);
            }
        }
        let key = ShardKey { image: *image, layer: merge.into, shard };
        let extra: Vec<u8> = merge.from.iter().flat_map(|layer| layer.to_le_bytes()).collect();
        let stamp = Stamp { generation, ..Stamp::default() };
        let header = Header { key, stamp, ..Header::new(Kind::Merged, *image) };
        let staged = self.stage_small(header, &extra, Class::Small)?;
        self.state.apply_merged(key, &merge.from, staged.place, generation);
        for layer in merge.from {
            let gone = ShardKey { layer, ..key };
            self.metas.remove(&gone);
            self.files.remove(&gone);
            self.unsettled.remove(&gone);
        }
        Ok(true)
    }

    /// The highest generation of what the layers that go have of the shard; none where they have nothing.
    fn generation_below(
        &mut self,
        merge: &Merge,
        image: &ImageId,
        shard: u64,
    ) -> Result<Option<u64>, StoreError> {
        let shard_bytes = self.state.images.require(image)?.shard_bytes;
        let mut highest = None;
        for layer in merge.from.iter().copied() {
            let key = ShardKey { image: *image, layer, shard };
            let meta = self.meta(&key, shard_bytes)?;
            let has_file = meta.version > 0 || meta.rewrite_both;
            let entry = self.state.dirty.get(image, shard).filter(|entry| entry.layer == layer);
            let logged = self.state.index.get(&key);
            if has_file || entry.is_some() || logged.is_some() {
                let generations = [
                    Some(meta.generation),
                    entry.map(|entry| entry.generation),
                    logged.map(|shard| shard.generation),
                    highest,
                ];
                highest = generations.into_iter().flatten().max();
            }
        }
        let forgets = broken(Rule::MergedKeepGenerations);
        Ok(highest.map(|generation| if forgets { generation.min(1) } else { generation }))
    }

    /// Puts what is absent above, of so many blocks, and something below; gives the bytes of
    /// the log that they take.
    fn merge_blocks(
        &mut self,
        merge: &Merge,
        image: ImageId,
        shard: u64,
        (first, count): (u32, u32),
        generation: u64,
    ) -> Result<u64, StoreError> {
        let (mut above, mut below) = (Vec::new(), Vec::new());
        self.look_up(View::own(image, &[merge.into]), shard, (first, count), &mut above)?;
        self.look_up(View::own(image, &merge.from), shard, (first, count), &mut below)?;
        let fills = |index: usize| {
            let free = above[index].state() == BlockState::Absent || broken(Rule::MergesFillGaps);
            free && below[index].state() != BlockState::Absent
        };
        let (mut blocks, mut content) = (Vec::new(), BytesMut::new());
        let mut index = 0;
        while index < below.len() {
            if !fills(index) {
                index += 1;
                continue;
            }
            let (block, found) = (first + index as u32, &below[index]);
            if found.state() != BlockState::Data {
                let tag =
                    self.tag_below(&ShardKey { image, layer: found.layer(), shard }, block)?;
                blocks.push(CopyBlock { block, state: found.state(), tag, checksum: 0 });
                index += 1;
                continue;
            }
            let run = (1..run_length(&below[index..])).take_while(|step| fills(index + step));
            let run = 1 + run.count();
            let data = self.content_below(shard, block, found, run)?;
            for (step, data) in data.chunks_exact(BLOCK).enumerate() {
                let (block, found) = (block + step as u32, &below[index + step]);
                let tag =
                    self.tag_below(&ShardKey { image, layer: found.layer(), shard }, block)?;
                let intact = checksum_of(data) == found.checksum();
                let (state, checksum) = match intact {
                    true => (BlockState::Data, found.checksum()),
                    false => (BlockState::Bad, 0),
                };
                if intact {
                    content.extend_from_slice(data);
                }
                blocks.push(CopyBlock { block, state, tag, checksum });
            }
            index += run;
        }
        let key = ShardKey { image, layer: merge.into, shard };
        let bytes = blocks.len() * COPY_EXTRA + content.len();
        self.stage_merge(key, &blocks, content.freeze(), generation)?;
        Ok(bytes as u64)
    }

    /// What lies where these blocks are; zeros where it cannot be read.
    fn content_below(
        &mut self,
        shard: u64,
        block: u32,
        found: &Found,
        run: usize,
    ) -> Result<BytesMut, StoreError> {
        let mut data = BytesMut::new();
        let (file, offset) = match self.source_of(shard, block, found) {
            // Its file is gone.
            Err(StoreError::BadBlock { .. }) => return Ok(BytesMut::zeroed(run * BLOCK)),
            place => place?,
        };
        let room = data.room(run * BLOCK);
        match read_whole(&*file, offset, room) {
            Err(Errno::IO) => read_singly(&*file, offset, room),
            read => read?,
        }
        // SAFETY: both ways of reading fill the room.
        unsafe { data.advance(run * BLOCK) };
        Ok(data)
    }

    fn tag_below(&mut self, key: &ShardKey, block: u32) -> Result<Tag, StoreError> {
        let shard_bytes = self.state.images.require(&key.image)?.shard_bytes;
        let Some(entry) = self.state.dirty.get(&key.image, key.shard) else { return Ok(Tag::NONE) };
        let first = entry.first;
        let logged = self.state.index.get(key).and_then(|shard| shard.get(block));
        let tag = match logged {
            Some(run) => run.tag,
            None => self.meta(key, shard_bytes)?.tag(block),
        };
        Ok(if tag >= first { tag } else { Tag::NONE })
    }

    fn stage_merge(
        &mut self,
        key: ShardKey,
        blocks: &[CopyBlock],
        content: Bytes,
        generation: u64,
    ) -> Result<(), StoreError> {
        if blocks.is_empty() {
            return Ok(());
        }
        assert!(blocks.len() <= self.log.record_blocks_max() as usize, "one record holds them");
        let bytes = HEADER_BYTES + blocks.len() * COPY_EXTRA + content.len();
        self.make_room(bytes, Class::Data)?;
        let stamp = Stamp { generation, ..Stamp::default() };
        let header = Header { key, stamp, ..Header::new(Kind::Merge, key.image) };
        let header = Header { blocks: blocks.len() as u32, ..header };
        let content = Some(content).filter(|content| !content.is_empty());
        let extra = |out: &mut Vec<u8>| encode_copy(blocks, out);
        let staged = self.log.stage(header, extra, content.into_iter());
        self.state.put_blocks(key, blocks, staged.place, generation);
        Ok(())
    }

    /// Whether all that the layer had is in the one above. That is durable when a later record is.
    fn holds_nothing_of(&self, image: &ImageId, layer: LayerId) -> DiskResult<bool> {
        let mut folders = 0..FOLDERS;
        let mut files = || -> DiskResult<bool> {
            folders.try_fold(false, |found, folder| {
                Ok(found || !self.merging_in_folder(*image, layer, folder)?.is_empty())
            })
        };
        Ok(self.merging_in_memory(*image, &[layer]).is_empty() && !files()?)
    }

    /// Whether the record may be stored: a merging layer that it lacks is empty here, or what it goes into
    /// goes as well; one that it has goes on into the same, and is no layer like others again.
    pub(super) fn check_merges(
        &self,
        image: &ImageId,
        record: &ImageRecord,
    ) -> Result<(), StoreError> {
        let Some(stored) = self.image(image) else { return Ok(()) };
        if record.blank || self.is_distrusted(image) || stored.merging.is_empty() {
            return Ok(());
        }
        let finished = self.merges.sweeps.get(image).is_some_and(|sweep| sweep.finished);
        for layer in stored.merging.iter().copied() {
            let above = stored.merge_of(layer).map(|merge| merge.into);
            let kept = above.is_some_and(|above| record.chain.has(above));
            let fits = match record.merge_of(layer).filter(|merge| merge.into != layer) {
                // What was put above already has to go on from there.
                Some(merge) => {
                    kept && above.is_some_and(|a| a == merge.into || merge.from.contains(&a))
                }
                None if record.chain.has(layer) => false,
                None => !kept || finished || self.holds_nothing_of(image, layer)?,
            };
            if !fits {
                return Err(StoreError::NotMerged { layer });
            }
        }
        Ok(())
    }
}
