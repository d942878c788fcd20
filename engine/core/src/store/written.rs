//! Which shards of an image were written above a generation: what a node that was left behind has
//! missed.
//!
//! Told in pages of bounded work, so that the caller's thread never stands still: first what the dirty
//! map and the log's index know, then folder by folder what the shard files say. In this order nothing
//! is missed: a shard that a checkpoint settles meanwhile goes from the index to a file, never back. One that
//! is merged meanwhile goes from a file of the layer below to the index, and then to a file of the layer above;
//! so the files of layers that are being merged are looked into first, then memory again, then the others. A
//! shard that is written first after the listing began may be missing; its writer knows of it.

use std::collections::BTreeSet;

use crate::geometry::{ImageId, LayerId, ShardKey};

use super::disk::{DiskResult, Errno};
use super::shard_file::{FOLDERS, read_generation, shard_path, shards_in};
use super::{Store, StoreError};

/// Most shards of one page.
pub const WRITTEN_PER_PAGE: usize = 8192;
/// Shard files and folders that one page looks into at most.
const FILES_PER_PAGE: usize = 64;
pub(super) const FOLDERS_PER_PAGE: u32 = 256;

/// Where a listing stands: `place` 0 is the memory of the store, later ones are folders and, where layers are
/// being merged, memory once more.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct WrittenCursor {
    pub place: u32,
    /// The first shard to be told of that place.
    pub shard: u64,
}

/// A page of a listing; without `next` it is the last one.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct WrittenPage {
    /// In no order; the same shard may be told on several pages.
    pub shards: Vec<u64>,
    pub next: Option<WrittenCursor>,
}

/// What a place of a listing stands for.
pub(super) enum Stop {
    Memory,
    Folder(LayerId, u64),
}

pub(super) fn stop_at(place: u32, merging: &[LayerId], others: &[LayerId]) -> Option<Stop> {
    let folder = |layers: &[LayerId], at: u32| {
        let layer = layers.get((at / FOLDERS) as usize)?;
        Some(Stop::Folder(*layer, u64::from(at % FOLDERS)))
    };
    let Some(at) = place.checked_sub(1) else { return Some(Stop::Memory) };
    let memory = merging.len() as u32 * FOLDERS;
    match at {
        at if at < memory => folder(merging, at),
        at if merging.is_empty() => folder(others, at),
        at if at == memory => Some(Stop::Memory),
        at => folder(others, at - memory - 1),
    }
}

impl Store {
    /// Gives the shards that were last written in a generation above `generation`, in any of
    /// `layers`, from `from` on. A shard whose generation cannot be told counts as written.
    pub fn written_above(
        &mut self,
        image: &ImageId,
        layers: &[LayerId],
        generation: u64,
        from: WrittenCursor,
    ) -> Result<WrittenPage, StoreError> {
        self.check()?;
        let shard_bytes = self.state.images.require(image)?.shard_bytes;
        let goes = |layer: &LayerId| {
            self.image(image).is_some_and(|record| record.merging.contains(layer))
        };
        let (merging, others): (Vec<_>, Vec<_>) = layers.iter().partition(|layer| goes(layer));
        let mut page = WrittenPage::default();
        let mut files = FILES_PER_PAGE;
        let mut at = from;
        while let Some(stop) = stop_at(at.place, &merging, &others) {
            let (layer, folder) = match stop {
                Stop::Memory if at == from => {
                    return Ok(self.written_in_memory(image, generation, from));
                }
                Stop::Memory => {
                    page.next = Some(at);
                    return Ok(page);
                }
                Stop::Folder(layer, folder) => (layer, folder),
            };
            let shards = shards_in(&*self.disk, image, layer, folder)?;
            for shard in shards.into_iter().filter(|shard| *shard >= at.shard) {
                if files == 0 {
                    page.next = Some(WrittenCursor { shard, ..at });
                    return Ok(page);
                }
                files -= 1;
                let key = ShardKey { image: *image, layer, shard };
                if self.generation_in_file(&key, shard_bytes)?.is_none_or(|g| g > generation) {
                    page.shards.push(shard);
                }
            }
            at = WrittenCursor { place: at.place + 1, shard: 0 };
            if at.place - from.place >= FOLDERS_PER_PAGE {
                page.next = Some(at);
                return Ok(page);
            }
        }
        Ok(page)
    }

    fn written_in_memory(
        &self,
        image: &ImageId,
        generation: u64,
        from: WrittenCursor,
    ) -> WrittenPage {
        let dirty = self.state.dirty.of(image).filter(|(_, entry)| entry.generation > generation);
        let index = self.state.index.iter();
        let index = index.filter(|(key, at)| key.image == *image && at.generation > generation);
        let shards = dirty.map(|(shard, _)| shard).chain(index.map(|(key, _)| key.shard));
        let mut shards: BTreeSet<u64> = shards.filter(|shard| *shard >= from.shard).collect();
        let next = match shards.iter().nth(WRITTEN_PER_PAGE).copied() {
            Some(shard) => {
                shards.split_off(&shard);
                WrittenCursor { shard, ..from }
            }
            None => WrittenCursor { place: from.place + 1, shard: 0 },
        };
        WrittenPage { shards: shards.into_iter().collect(), next: Some(next) }
    }

    /// The generation that a shard's file names; none where it cannot be told.
    fn generation_in_file(&mut self, key: &ShardKey, shard_bytes: u32) -> DiskResult<Option<u64>> {
        if let Some(meta) = self.metas.get(key) {
            // Damaged metadata has a version and no generation.
            let known = meta.generation > 0 || meta.version == 0 && !meta.rewrite_both;
            return Ok(known.then_some(meta.generation));
        }
        match self.disk.open(&shard_path(key)) {
            // It was merged meanwhile.
            Err(Errno::NOENT) => Ok(Some(0)),
            file => read_generation(&*file?, key, shard_bytes),
        }
    }
}
