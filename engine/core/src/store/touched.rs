//! Which shards of an image have anything in some of its layers: where changes can be.
//!
//! A listing in pages, as that of `written`, and in its order, for the same reasons; but no file is opened.

use std::collections::BTreeSet;
use std::ops::Range;

use crate::geometry::{ImageId, LayerId};

use super::shard_file::shards_in;
use super::written::{
    FOLDERS_PER_PAGE, Stop, WRITTEN_PER_PAGE, WrittenCursor, WrittenPage, stop_at,
};
use super::{Store, StoreError};

impl Store {
    /// Gives the shards of `range` of which any of `layers` may have something, from `from` on. What the log has
    /// of other layers counts as well.
    pub fn touched(
        &mut self,
        image: &ImageId,
        layers: &[LayerId],
        range: &Range<u64>,
        from: WrittenCursor,
    ) -> Result<WrittenPage, StoreError> {
        self.check()?;
        self.state.images.require(image)?;
        let goes = |layer: &LayerId| {
            self.image(image).is_some_and(|record| record.merging.contains(layer))
        };
        let (merging, others): (Vec<_>, Vec<_>) = layers.iter().partition(|layer| goes(layer));
        let mut shards = BTreeSet::new();
        let mut at = from;
        while let Some(stop) = stop_at(at.place, &merging, &others) {
            let here = match stop {
                Stop::Memory => self.touched_in_memory(image, range),
                Stop::Folder(layer, folder) => shards_in(&*self.disk, image, layer, folder)?,
            };
            for shard in here {
                if shard < at.shard || !range.contains(&shard) {
                    continue;
                }
                if shards.len() == WRITTEN_PER_PAGE && !shards.contains(&shard) {
                    return Ok(page(shards, Some(WrittenCursor { shard, ..at })));
                }
                shards.insert(shard);
            }
            at = WrittenCursor { place: at.place + 1, shard: 0 };
            if at.place - from.place >= FOLDERS_PER_PAGE {
                return Ok(page(shards, Some(at)));
            }
        }
        Ok(page(shards, None))
    }

    /// In order.
    fn touched_in_memory(&self, image: &ImageId, range: &Range<u64>) -> Vec<u64> {
        let index = self.state.index.iter().filter(|(key, _)| key.image == *image);
        let shards: BTreeSet<u64> =
            index.map(|(key, _)| key.shard).filter(|shard| range.contains(shard)).collect();
        shards.into_iter().collect()
    }
}

fn page(shards: BTreeSet<u64>, next: Option<WrittenCursor>) -> WrittenPage {
    WrittenPage { shards: shards.into_iter().collect(), next }
}
