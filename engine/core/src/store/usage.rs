//! How much space an image takes.

use std::sync::Arc;

use crate::geometry::ImageId;
#[cfg(any(test, feature = "simulation"))]
use crate::geometry::LayerId;

use super::disk::{Disk, DiskResult, Errno};
use super::images::image_folder;
#[cfg(any(test, feature = "simulation"))]
use super::images::listed_layer;

/// Counts in any thread, beside a working store.
#[derive(Clone)]
pub struct UsageHandle {
    disk: Arc<dyn Disk>,
}

impl UsageHandle {
    pub(super) fn new(disk: Arc<dyn Disk>) -> UsageHandle {
        UsageHandle { disk }
    }

    /// Images that have a folder on the disk, with a record or without one.
    pub fn folders(&self) -> DiskResult<Vec<ImageId>> {
        let names = self.disk.list("images")?;
        Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// Bytes that the image's shard files take on the disk. What is still in the log only is
    /// counted by `Store::log_resident_bytes`.
    pub fn physical_bytes(&self, image: &ImageId) -> DiskResult<u64> {
        let mut sum = 0;
        let top = image_folder(image);
        for layer in self.disk.list(&top)? {
            if layer.parse::<u32>().is_err() {
                continue;
            }
            for spread in self.disk.list(&format!("{top}/{layer}"))? {
                for shard in self.disk.list(&format!("{top}/{layer}/{spread}"))? {
                    sum += match self.disk.open(&format!("{top}/{layer}/{spread}/{shard}")) {
                        Ok(file) => file.allocated_bytes()?,
                        Err(Errno::NOENT) => 0,
                        Err(errno) => return Err(errno),
                    };
                }
            }
        }
        Ok(sum)
    }
}

impl super::Store {
    /// Bytes of the image's blocks that are in the log and not in a shard file yet.
    pub fn log_resident_bytes(&self, image: &ImageId) -> u64 {
        let shards = self.state.index.iter().filter(|(key, _)| key.image == *image);
        let data = shards.flat_map(|(_, shard)| shard.runs());
        let blocks = data.filter(|(_, run)| run.state == super::BlockState::Data).count();
        blocks as u64 * u64::from(crate::geometry::BLOCK_BYTES)
    }

    /// Layers of the image of which anything is here, in the log, the dirty map or files.
    #[cfg(any(test, feature = "simulation"))]
    pub fn layers_held(&self, image: &ImageId) -> DiskResult<Vec<LayerId>> {
        let names = self.disk.list(&image_folder(image))?;
        let mut layers: Vec<_> = names.iter().filter_map(|name| listed_layer(name)).collect();
        layers.extend(self.state.dirty.of(image).map(|(_, entry)| entry.layer));
        let logged = self.state.index.iter().filter(|(key, _)| key.image == *image);
        layers.extend(logged.map(|(key, _)| key.layer));
        layers.sort_unstable();
        layers.dedup();
        Ok(layers)
    }
}
