//! What a clone is seen through: its own layers, then those of its parent's snapshot, and so on.
//!
//! A node finds its way by the records that it has stored, each time anew: layers of an ancestor may be merged
//! while its clones are read. Where one of these records does not have the snapshot, or nothing that is here
//! of its image counts, nothing of the clone is read: what is missing would show as zeros.

use crate::geometry::{ANCESTORS_MAX, BLOCK_BYTES, ImageId, LayerId, Parent};
use crate::rules::{Rule, broken};

use super::images::Chain;
use super::{Store, StoreError};

/// An image that a clone is seen through.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ancestor {
    pub image: ImageId,
    chain: Chain,
    /// Where in the chain the snapshot's own layer is: what is above does not show.
    start: usize,
    /// Nothing shows from here on.
    end_bytes: u64,
}

impl Ancestor {
    pub fn layers(&self) -> &[LayerId] {
        &self.chain.layers()[self.start..]
    }

    /// How many blocks of a shard may show, from its first one on.
    fn blocks_of(&self, shard: u64, shard_bytes: u32) -> u32 {
        let start = shard.saturating_mul(u64::from(shard_bytes));
        let bytes = self.end_bytes.saturating_sub(start).min(u64::from(shard_bytes));
        bytes.div_ceil(u64::from(BLOCK_BYTES)) as u32
    }
}

/// What blocks are looked for in: layers of an image, top first, then its ancestors, the nearest first.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    pub image: ImageId,
    pub layers: &'a [LayerId],
    pub ancestors: &'a [Ancestor],
}

impl<'a> View<'a> {
    /// These layers and nothing else.
    pub fn own(image: ImageId, layers: &'a [LayerId]) -> View<'a> {
        View { image, layers, ancestors: &[] }
    }

    /// Whether there is just one layer: what it does not have is zeros.
    pub fn is_one_layer(&self) -> bool {
        self.layers.len() == 1 && self.ancestors.is_empty()
    }

    /// Each layer with its image.
    pub fn all_layers(self) -> impl Iterator<Item = (ImageId, LayerId)> {
        let own = self.layers.iter().map(move |layer| (self.image, *layer));
        let inherited = self.ancestors.iter().flat_map(|ancestor| {
            ancestor.layers().iter().map(move |layer| (ancestor.image, *layer))
        });
        own.chain(inherited)
    }

    /// Whether it is this image, or one of its ancestors.
    pub(super) fn has_image(self, image: &ImageId) -> bool {
        self.image == *image || self.ancestors.iter().any(|ancestor| ancestor.image == *image)
    }

    /// Each layer with its image, and how many blocks of the shard may be found in it.
    pub(super) fn layers_of_shard(
        self,
        shard: u64,
        shard_bytes: u32,
    ) -> impl Iterator<Item = (ImageId, LayerId, u32)> {
        let own = self.layers.iter().map(move |layer| (self.image, *layer, u32::MAX));
        let inherited = self.ancestors.iter().flat_map(move |ancestor| {
            let end = ancestor.blocks_of(shard, shard_bytes);
            ancestor.layers().iter().map(move |layer| (ancestor.image, *layer, end))
        });
        own.chain(inherited)
    }
}

impl Store {
    /// What the image is seen through beside its own layers, the nearest first; empty unless it is a clone.
    ///
    /// `NoParent` where some of it is not here, or not all that is in it.
    pub fn ancestors(&self, image: &ImageId) -> Result<Vec<Ancestor>, StoreError> {
        let Some(record) = self.image(image) else { return Ok(Vec::new()) };
        self.ancestors_from(record.parent, record.head.shard_bytes)
    }

    /// What a clone of this parent is seen through.
    pub fn ancestors_from(
        &self,
        parent: Option<Parent>,
        shard_bytes: u32,
    ) -> Result<Vec<Ancestor>, StoreError> {
        let mut ancestors = Vec::new();
        let (mut next, mut end_bytes) = (parent, u64::MAX);
        while let Some(parent) = next {
            let found = self.image(&parent.image).filter(|record| {
                let counts = !record.blank && !self.is_distrusted(&parent.image);
                counts && record.head.shard_bytes == shard_bytes && ancestors.len() < ANCESTORS_MAX
            });
            let found =
                found.and_then(|record| Some((record, record.layers_of(&parent.snapshot)?)));
            let Some((record, layers)) = found else {
                match broken(Rule::ParentIsWhole) {
                    true => return Ok(ancestors),
                    false => return Err(StoreError::NoParent { parent: parent.image }),
                }
            };
            end_bytes = end_bytes.min(parent.size_bytes);
            let chain = record.chain.clone();
            let start = chain.layers().len() - layers.len();
            ancestors.push(Ancestor { image: parent.image, chain, start, end_bytes });
            next = record.parent;
        }
        Ok(ancestors)
    }
}
