//! The dirty map: per image and shard index (across layers), what may differ between replicas.
//!
//! Every change is made by an event that stands in the log, and replaying the log makes the same
//! changes in the same order; so stickiness and generations after a crash are what they were, plus
//! "all sticky" at each start. The number of entries is bounded by the caller (`entries`).

use std::collections::BTreeMap;

use crate::geometry::{ImageId, LayerId, Tag};
use crate::rules::{Rule, broken};

use super::encoding::{Reader, push_u32, push_u64, put_text};
use super::images::Chain;
use super::index::KeyMap;

/// Bytes of an entry in a snapshot.
pub const ENTRY_BYTES: usize = 77;

/// A shard that may differ between replicas.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DirtyEntry {
    /// Highest and lowest tag written since the entry came to be. Block tags below `first` are from
    /// before the last clear and mean nothing.
    pub last: Tag,
    pub first: Tag,
    /// What `last` was when the entry became sticky; none, where one of the writes before came again.
    settled: Tag,
    /// The generation that the shard counts as written in.
    pub generation: u64,
    /// Highest generation of its writes: the shard's own records have that one.
    written: u64,
    /// The layer of the last write.
    pub layer: LayerId,
    /// Only a heal or reconcile removes it, no clear.
    pub sticky: bool,
}

/// A generation, above that of the shard's records, that a dropped entry leaves to its shard.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Dropped {
    pub shard: u64,
    pub layer: LayerId,
    pub generation: u64,
}

#[derive(Default, Clone, PartialEq, Eq, Debug)]
struct ImageDirty {
    epoch: u64,
    generation: u64,
    shards: BTreeMap<u64, DirtyEntry>,
    peers: BTreeMap<String, u64>,
}

/// The dirty maps of all images.
#[derive(Default, Clone, PartialEq, Eq, Debug)]
pub struct DirtyMaps {
    images: KeyMap<ImageId, ImageDirty>,
    entries: usize,
}

impl ImageDirty {
    fn observe(&mut self, epoch: u64, generation: u64) {
        if generation > self.generation {
            self.generation = generation;
            let counted = self.shards.values_mut().filter(|_| !broken(Rule::DirtyCountsAsNewer));
            for entry in counted {
                entry.generation = entry.generation.max(generation);
            }
        }
        if epoch > self.epoch {
            self.epoch = epoch;
            self.shards.values_mut().for_each(DirtyEntry::stick);
        }
    }
}

impl ImageDirty {
    /// Whether forgetting it would change anything: an observation without entries would not.
    fn matters(&self) -> bool {
        !self.shards.is_empty() || !self.peers.is_empty()
    }
}

impl DirtyEntry {
    fn stick(&mut self) {
        if !self.sticky {
            (self.sticky, self.settled) = (true, self.last);
        }
    }

    /// What its shard's records do not say of its generation.
    fn leaves(&self, shard: u64) -> Option<Dropped> {
        let (layer, generation) = (self.layer, self.generation);
        let leaves = generation > self.written && !broken(Rule::GenerationOutlivesEntry);
        leaves.then_some(Dropped { shard, layer, generation })
    }
}

impl DirtyMaps {
    /// Number of entries over all images.
    pub fn entries(&self) -> usize {
        self.entries
    }

    pub fn get(&self, image: &ImageId, shard: u64) -> Option<&DirtyEntry> {
        self.images.get(image)?.shards.get(&shard)
    }

    /// Entries of an image in order of shard index.
    pub fn of(&self, image: &ImageId) -> impl Iterator<Item = (u64, DirtyEntry)> {
        self.images.get(image).into_iter().flat_map(|i| i.shards.iter().map(|(s, e)| (*s, *e)))
    }

    /// The flush number that each peer is known to have cleared to.
    pub fn peers(&self, image: &ImageId) -> impl Iterator<Item = (&str, u64)> {
        self.images
            .get(image)
            .into_iter()
            .flat_map(|i| i.peers.iter().map(|(n, f)| (n.as_str(), *f)))
    }

    /// A record or request named this epoch and generation: a higher generation is what every dirty
    /// shard now counts as written in, a higher epoch makes every entry sticky.
    pub fn observe(&mut self, image: &ImageId, epoch: u64, generation: u64) {
        self.images.entry(*image).or_default().observe(epoch, generation);
    }

    /// Whether `observe` would change an entry.
    pub fn observes(&self, image: &ImageId, epoch: u64, generation: u64) -> bool {
        self.images
            .get(image)
            .is_some_and(|i| !i.shards.is_empty() && (epoch > i.epoch || generation > i.generation))
    }

    /// A record of `generation` wrote to the shard, with tags from `lowest` to `highest`. What
    /// `observed` names is observed first. The layer that was written to before keeps the generation that the
    /// shard counted as written in, for the day on which this one is dropped.
    pub fn wrote(
        &mut self,
        image: &ImageId,
        (shard, layer): (u64, LayerId),
        (lowest, highest): (Tag, Tag),
        generation: u64,
        observed: (u64, u64),
    ) -> Option<Dropped> {
        let map = self.images.entry(*image).or_default();
        if observed.0 > map.epoch || observed.1 > map.generation {
            map.observe(observed.0, observed.1);
        }
        let current = map.generation;
        let entries = &mut self.entries;
        let entry = map.shards.entry(shard).or_insert_with(|| {
            *entries += 1;
            let (first, last) = (lowest, highest);
            let (settled, written, sticky) = (Tag::NONE, generation, false);
            DirtyEntry { last, first, settled, generation, written, layer, sticky }
        });
        let left = (entry.layer != layer).then(|| entry.leaves(shard)).flatten();
        if entry.layer != layer {
            entry.written = generation;
        }
        entry.last = entry.last.max(highest);
        entry.first = entry.first.min(lowest);
        entry.generation = entry.generation.max(generation).max(current);
        entry.written = entry.written.max(generation);
        entry.layer = layer;
        left
    }

    /// The image has these layers and no others: entries whose last write was to one that is gone are of the
    /// top one, and leave no generation of that write.
    pub fn keep_layers(&mut self, image: &ImageId, chain: &Chain) {
        let Some(map) = self.images.get_mut(image) else { return };
        for entry in map.shards.values_mut().filter(|entry| !chain.has(entry.layer)) {
            (entry.layer, entry.written) = (chain.layers()[0], entry.generation);
        }
    }

    /// What was in `from` of the shard is in `into`, with the generation of its last write.
    pub fn merged(&mut self, image: &ImageId, shard: u64, from: &[LayerId], into: LayerId) {
        let entry = self.images.get_mut(image).and_then(|map| map.shards.get_mut(&shard));
        if let Some(entry) = entry.filter(|entry| from.contains(&entry.layer)) {
            entry.layer = into;
        }
    }

    /// A client's change was written, with this tag. It may be one of before that is asked again, since the
    /// former instance that had it did not answer, or nobody else did: then others may not have it yet.
    pub fn changed(&mut self, image: &ImageId, shard: u64, tag: Tag) {
        let entry = self.images.get_mut(image).and_then(|map| map.shards.get_mut(&shard));
        if let Some(entry) = entry.filter(|entry| entry.sticky && tag <= entry.settled) {
            entry.settled = Tag::NONE;
        }
    }

    /// All writes up to `tag` are answered and flushed by every in-sync node, and each peer has
    /// reached that flush number. Drops what was last written by then, but for sticky entries.
    pub fn clear(&mut self, image: &ImageId, tag: Tag, peers: &[(String, u64)]) -> Vec<Dropped> {
        let map = self.images.entry(*image).or_default();
        // The latest word counts, also a lower one: of a node that was healed onto another disk.
        let told = peers.iter().filter(|(_, flush_number)| *flush_number > 0);
        map.peers.extend(told.cloned());
        let keeps = |entry: &DirtyEntry| entry.sticky && !broken(Rule::StickyUntilLevel);
        self.drop_where(image, |_, entry| !keeps(entry) && entry.last <= tag)
    }

    /// The shards are level on all in-sync nodes, durably. Entries written to since they became
    /// sticky stay, for the next clear.
    pub fn level(&mut self, image: &ImageId, shards: &[u64]) -> Vec<Dropped> {
        let mut wanted = shards.to_vec();
        wanted.sort_unstable();
        if let Some(map) = self.images.get_mut(image) {
            for shard in &wanted {
                if let Some(entry) = map.shards.get_mut(shard)
                    && entry.last > entry.settled
                {
                    entry.sticky = false;
                }
            }
        }
        self.drop_where(image, |shard, entry| entry.sticky && wanted.binary_search(&shard).is_ok())
    }

    /// A new instance of the store begins.
    pub fn all_sticky(&mut self) {
        let entries = self.images.values_mut().flat_map(|image| image.shards.values_mut());
        entries.for_each(DirtyEntry::stick);
    }

    /// Keeps only the images that `keep` wants.
    pub fn retain(&mut self, keep: impl Fn(&ImageId) -> bool) {
        self.images.retain(|image, _| keep(image));
        self.entries = self.images.values().map(|map| map.shards.len()).sum();
    }

    pub fn remove_image(&mut self, image: &ImageId) {
        if let Some(map) = self.images.remove(image) {
            self.entries -= map.shards.len();
        }
    }

    fn drop_where(
        &mut self,
        image: &ImageId,
        gone: impl Fn(u64, &DirtyEntry) -> bool,
    ) -> Vec<Dropped> {
        let mut dropped = Vec::new();
        let entries = &mut self.entries;
        if let Some(map) = self.images.get_mut(image) {
            map.shards.retain(|shard, entry| {
                let keep = !gone(*shard, entry);
                *entries -= usize::from(!keep);
                if !keep {
                    dropped.extend(entry.leaves(*shard));
                }
                keep
            });
        }
        dropped
    }

    /// Appends the snapshot that a segment's head record carries.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut images: Vec<_> = self.images.iter().filter(|(_, map)| map.matters()).collect();
        push_u32(out, images.len() as u32);
        images.sort_unstable_by_key(|(image, _)| **image);
        for (image, map) in images {
            out.extend_from_slice(&image.0);
            push_u64(out, map.epoch);
            push_u64(out, map.generation);
            push_u32(out, map.peers.len() as u32);
            for (name, flush_number) in &map.peers {
                put_text(out, name);
                push_u64(out, *flush_number);
            }
            push_u64(out, map.shards.len() as u64);
            map.shards.iter().for_each(|(shard, entry)| encode_entry(*shard, entry, out));
        }
    }

    /// Reads what `encode` wrote.
    pub fn decode(reader: &mut Reader<'_>) -> Option<DirtyMaps> {
        let mut maps = DirtyMaps::default();
        for _ in 0..reader.u32()? {
            let image = ImageId(reader.array()?);
            let (epoch, generation) = (reader.u64()?, reader.u64()?);
            let mut map = ImageDirty { epoch, generation, ..ImageDirty::default() };
            for _ in 0..reader.u32()? {
                map.peers.insert(reader.text()?, reader.u64()?);
            }
            for _ in 0..reader.u64()? {
                let (shard, entry) = decode_entry(reader)?;
                map.shards.insert(shard, entry);
            }
            maps.entries += map.shards.len();
            maps.images.insert(image, map);
        }
        Some(maps)
    }

    /// Bytes that `encode` appends.
    pub fn encoded_bytes(&self) -> usize {
        let names = |map: &ImageDirty| map.peers.keys().map(|name| name.len() + 12).sum::<usize>();
        4 + self.entries * ENTRY_BYTES
            + self.images.values().filter(|m| m.matters()).map(|m| 44 + names(m)).sum::<usize>()
    }
}

fn encode_entry(shard: u64, entry: &DirtyEntry, out: &mut Vec<u8>) {
    push_u64(out, shard);
    for tag in [entry.last, entry.first, entry.settled] {
        push_u64(out, tag.epoch);
        push_u64(out, tag.sequence);
    }
    push_u64(out, entry.generation);
    push_u64(out, entry.written);
    push_u32(out, entry.layer);
    out.push(u8::from(entry.sticky));
}

fn decode_entry(reader: &mut Reader<'_>) -> Option<(u64, DirtyEntry)> {
    let shard = reader.u64()?;
    let mut tag = || Some(Tag { epoch: reader.u64()?, sequence: reader.u64()? });
    let (last, first, settled) = (tag()?, tag()?, tag()?);
    let (generation, written) = (reader.u64()?, reader.u64()?);
    let (layer, sticky) = (reader.u32()?, reader.u8()? != 0);
    Some((shard, DirtyEntry { last, first, settled, generation, written, layer, sticky }))
}
