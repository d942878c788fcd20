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
use super::{Store, StoreError, View};

type Layers = Vec<(ImageId, LayerId)>;

impl Store {
    /// Gives the shards of `range` of which any of the layers of `view` may have something, from `from` on. What
    /// the log has of other layers of these images counts as well.
    pub fn touched(
        &mut self,
        view: View<'_>,
        range: &Range<u64>,
        from: WrittenCursor,
    ) -> Result<WrittenPage, StoreError> {
        self.check()?;
        self.state.images.require(&view.image)?;
        let goes = |(image, layer): &(ImageId, LayerId)| {
            self.image(image).is_some_and(|record| record.merging.contains(layer))
        };
        let layers = view.all_layers();
        let (merging, others): (Layers, Layers) = layers.partition(goes);
        let mut shards = BTreeSet::new();
        let mut at = from;
        while let Some(stop) = stop_at(at.place, &merging, &others) {
            let here = match stop {
                Stop::Memory => self.touched_in_memory(view, range),
                Stop::Folder((image, layer), folder) => {
                    shards_in(&*self.disk, &image, layer, folder)?
                }
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
    fn touched_in_memory(&self, view: View<'_>, range: &Range<u64>) -> Vec<u64> {
        let index = self.state.index.iter().filter(|(key, _)| view.has_image(&key.image));
        let shards: BTreeSet<u64> =
            index.map(|(key, _)| key.shard).filter(|shard| range.contains(shard)).collect();
        shards.into_iter().collect()
    }
}

fn page(shards: BTreeSet<u64>, next: Option<WrittenCursor>) -> WrittenPage {
    WrittenPage { shards: shards.into_iter().collect(), next }
}
