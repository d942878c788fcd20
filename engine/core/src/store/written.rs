//! Which shards of an image were written above a generation: what a node that was left behind has
//! missed.
//!
//! Told in pages of bounded work, so that the caller's thread never stands still: first what the dirty
//! map and the log's index know, then folder by folder what the shard files say. In this order nothing
//! is missed: a shard that a checkpoint settles meanwhile goes from the index to a file, never back. A
//! shard that is written first after the listing began may be missing; its writer knows of it.

use std::collections::BTreeSet;

use crate::geometry::{ImageId, LayerId, ShardKey};

use super::disk::DiskResult;
use super::shard_file::{listed_shard, read_generation, shard_folder, shard_path};
use super::{Store, StoreError};

/// Most shards of one page.
pub const WRITTEN_PER_PAGE: usize = 8192;
/// Shard files and folders that one page looks into at most.
const FILES_PER_PAGE: usize = 64;
const FOLDERS_PER_PAGE: u32 = 256;
/// Folders that a layer's shard files are spread over.
const FOLDERS: u32 = 256;

/// Where a listing stands: `place` 0 is the memory of the store, later ones are folders.
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
        if from.place == 0 {
            return Ok(self.written_in_memory(image, generation, from.shard));
        }
        let end = layers.len() as u32 * FOLDERS + 1;
        let mut page = WrittenPage::default();
        let mut files = FILES_PER_PAGE;
        let mut at = from;
        while at.place < end {
            let layer = layers[((at.place - 1) / FOLDERS) as usize];
            let folder = u64::from((at.place - 1) % FOLDERS);
            for shard in self.shards_in(image, layer, folder, at.shard)? {
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
            if at.place - from.place >= FOLDERS_PER_PAGE && at.place < end {
                page.next = Some(at);
                return Ok(page);
            }
        }
        Ok(page)
    }

    fn written_in_memory(&self, image: &ImageId, generation: u64, from: u64) -> WrittenPage {
        let dirty = self.state.dirty.of(image).filter(|(_, entry)| entry.generation > generation);
        let index = self.state.index.iter();
        let index = index.filter(|(key, at)| key.image == *image && at.generation > generation);
        let shards = dirty.map(|(shard, _)| shard).chain(index.map(|(key, _)| key.shard));
        let mut shards: BTreeSet<u64> = shards.filter(|shard| *shard >= from).collect();
        let next = match shards.iter().nth(WRITTEN_PER_PAGE).copied() {
            Some(shard) => {
                shards.split_off(&shard);
                WrittenCursor { place: 0, shard }
            }
            None => WrittenCursor { place: 1, shard: 0 },
        };
        WrittenPage { shards: shards.into_iter().collect(), next: Some(next) }
    }

    /// The shards that have a file in a folder, from `from` on, in order.
    fn shards_in(
        &self,
        image: &ImageId,
        layer: LayerId,
        folder: u64,
        from: u64,
    ) -> DiskResult<Vec<u64>> {
        let path = shard_folder(&ShardKey { image: *image, layer, shard: folder });
        let names = self.disk.list(&path)?;
        let shards = names.iter().filter_map(|name| listed_shard(name));
        let mut shards: Vec<u64> =
            shards.filter(|shard| shard & 0xff == folder && *shard >= from).collect();
        shards.sort_unstable();
        Ok(shards)
    }

    /// The generation that a shard's file names; none where it cannot be told.
    fn generation_in_file(&mut self, key: &ShardKey, shard_bytes: u32) -> DiskResult<Option<u64>> {
        if let Some(meta) = self.metas.get(key) {
            // Damaged metadata has a version and no generation.
            let known = meta.generation > 0 || meta.version == 0 && !meta.rewrite_both;
            return Ok(known.then_some(meta.generation));
        }
        let file = self.disk.open(&shard_path(key))?;
        read_generation(&*file, key, shard_bytes)
    }
}
