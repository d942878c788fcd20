//! Rot in what a clone is seen through. It is not repaired here: the blocks are another image's, which has its own
//! holder. Policy is told, reads go to another node, and a change that a node cannot merge into such a block
//! waits until it has it from those that could.

use std::collections::BTreeMap;

use super::image::ImageIo;
use super::{Event, NodeIndex};
use crate::geometry::ImageId;

/// Blocks that are remembered as told; beyond them nothing is told for a while.
const TOLD_MAX: usize = 1024;
/// One that is still met is told again after so long.
const AGAIN_NS: u64 = 60_000_000_000;

/// Since when policy knows of which node's blocks.
#[derive(Default)]
pub(super) struct ParentRot(BTreeMap<(NodeIndex, ImageId, u64, u32), u64>);

impl ParentRot {
    /// Whether to tell of a block now.
    fn is_news(&mut self, key: (NodeIndex, ImageId, u64, u32), now_ns: u64) -> bool {
        let known = self.0.get(&key).is_some_and(|told_ns| now_ns - told_ns < AGAIN_NS);
        if !known {
            if self.0.len() >= TOLD_MAX {
                self.0.retain(|_, told_ns| now_ns - *told_ns < AGAIN_NS);
            }
            if self.0.len() >= TOLD_MAX {
                return false;
            }
            self.0.insert(key, now_ns);
        }
        !known
    }
}

impl ImageIo {
    /// `node` has met rot in a block of an ancestor.
    pub(super) fn found_parent_rot(
        &mut self,
        node: NodeIndex,
        image: ImageId,
        shard: u64,
        block: u32,
    ) {
        if self.parent_rot.is_news((node, image, shard, block), self.now_ns) {
            self.event(Event::ParentRot { node, image, shard, block });
        }
    }
}
