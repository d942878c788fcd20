//! What a simulation looks at to judge: records, dirty maps, contents, queues. Changes nothing.

use super::world::World;
use crate::geometry::{BLOCK_BYTES, ImageId, LayerId};
use crate::node::Inventory;
use crate::replica::Queues;
use crate::store::{RecordHead, View};
use bytes::BytesMut;
use std::collections::BTreeSet;
use twox_hash::XxHash3_64;

impl World {
    /// The record that a running node has of an image.
    pub fn node_record(&self, node: usize, image: &ImageId) -> Option<RecordHead> {
        let run = self.nodes[node].sim.run.as_ref()?;
        run.store.image(image).map(|record| record.head)
    }

    /// The layers that this record names, top first.
    pub fn node_layers(&self, node: usize, image: &ImageId) -> Option<Vec<LayerId>> {
        let run = self.nodes[node].sim.run.as_ref()?;
        run.store.image(image).map(|record| record.chain.layers().to_vec())
    }

    /// The layers of which a running node has anything, in order.
    pub fn node_layers_held(&self, node: usize, image: &ImageId) -> Vec<LayerId> {
        let run = self.nodes[node].sim.run.as_ref();
        run.and_then(|run| run.store.layers_held(image).ok()).unwrap_or_default()
    }

    /// What a running node holds.
    pub fn inventory(&self, node: usize) -> Inventory {
        let run = self.nodes[node].sim.run.as_ref();
        run.map(|run| Inventory::of(&run.store)).unwrap_or_default()
    }

    /// Those of which nothing counts that it has, since its store was set back.
    pub fn distrusted(&self, node: usize) -> Vec<ImageId> {
        self.nodes[node].sim.run.as_ref().map(|run| run.store.distrusted()).unwrap_or_default()
    }

    /// The dirty shards of a running node.
    pub fn dirty(&self, node: usize, image: &ImageId) -> BTreeSet<u64> {
        let run = self.nodes[node].sim.run.as_ref();
        run.map(|run| run.store.dirty(image).map(|(shard, _)| shard).collect()).unwrap_or_default()
    }

    /// Whether a running node has data of an image, or its record.
    pub fn has_image(&self, node: usize, image: &ImageId) -> bool {
        let slot = &self.nodes[node].sim;
        let Some(run) = &slot.run else { return false };
        let prefix = format!("images/{image}");
        run.store.image(image).is_some() || slot.disk.paths().iter().any(|p| p.contains(&prefix))
    }

    /// Whether a running node knows that an image was deleted.
    pub fn is_deleted(&self, node: usize, image: &ImageId) -> bool {
        self.nodes[node].sim.run.as_ref().is_some_and(|run| run.store.is_deleted(image))
    }

    /// Whether a node still has in memory or on disk all that it answered for this image: it was level
    /// with its peers once, and has kept its power since.
    pub fn remembers(&self, node: usize, image: &ImageId) -> bool {
        self.remembers.contains(&(node, *image))
    }

    /// What the blocks of a shard hold on a running node, through what the image is a clone of: a digest of each,
    /// none where it is bad. None at all where the node has not all of that.
    pub fn shard_digests(
        &mut self,
        node: usize,
        image: &ImageId,
        layers: &[LayerId],
        shard: u64,
    ) -> Option<Vec<Option<u64>>> {
        let run = self.nodes[node].sim.run.as_mut()?;
        let blocks = run.store.image(image)?.head.shard_bytes / BLOCK_BYTES;
        let ancestors = run.store.ancestors(image).ok()?;
        let view = View { image: *image, layers, ancestors: &ancestors };
        let (mut states, mut data) = (Vec::new(), BytesMut::new());
        let whole = run.store.read_blocks(view, shard, 0, blocks, &mut states, &mut data).is_ok();
        if whole {
            let digests = states.iter().map(|state| match state.is_data() {
                true => Some(digest(&data.split_to(BLOCK_BYTES as usize))),
                false => Some(0),
            });
            return Some(digests.collect());
        }
        let mut digests = Vec::new();
        for block in 0..blocks {
            states.clear();
            data.clear();
            let read = run.store.read_blocks(view, shard, block, 1, &mut states, &mut data);
            let content = match read {
                Ok(()) if states.first().is_some_and(|s| s.is_data()) => Some(digest(&data)),
                Ok(()) => Some(0),
                Err(_) => None,
            };
            digests.push(content);
        }
        Some(digests)
    }

    /// Takes out which nodes have applied the write of this stamp: (shard, nodes) for each shard.
    pub fn take_applied(&mut self, stamp: u64) -> Vec<(u64, u64)> {
        let range = (stamp, 0)..=(stamp, u64::MAX);
        let found: Vec<(u64, u64)> =
            self.applied.range(range).map(|((_, shard), nodes)| (*shard, *nodes)).collect();
        for (shard, _) in &found {
            self.applied.remove(&(stamp, *shard));
        }
        found
    }

    /// Pulls under way at a running node.
    pub fn pulls(&self, node: usize) -> usize {
        self.nodes[node].sim.run.as_ref().map(|run| run.pulls()).unwrap_or_default()
    }

    pub fn queues(&self, gateway: usize, channel: u32) -> Queues {
        if let Some(io) = self.reader(gateway, channel) {
            let (requests, parts) = (io.requests_in_flight(), io.parts_in_flight());
            return Queues { requests, parts, unanswered: 0 };
        }
        self.image(gateway, channel).map(|io| io.queues()).unwrap_or_default()
    }

    /// Answers that wait for a sync, and requests that wait for room in the log, of a running node.
    pub fn node_queues(&self, node: usize) -> (usize, usize) {
        self.nodes[node].sim.run.as_ref().map(|run| run.queues()).unwrap_or_default()
    }
}

/// Zeroes, written or not, are 0. Seeded, so that it is not the checksum that the store goes by.
fn digest(block: &[u8]) -> u64 {
    const ZEROES: [u8; BLOCK_BYTES as usize] = [0; BLOCK_BYTES as usize];
    match block == ZEROES {
        true => 0,
        false => XxHash3_64::oneshot_with_seed(1, block),
    }
}
