//! Image records: what this node knows, durably, of each image placed on it, and which images were
//! deleted. A record goes through the log and, before its segment is recycled, to
//! `images/ID/record`; a tombstone likewise to `deleted/ID`, for ever.
//!
//! A layer that an image's new record does not name is dropped: what the log has of it counts no more, and
//! checkpoints remove its files in bounded steps. What an interruption left of them is found at the next open
//! by its folder, which no record names; so ids of layers are never used again. What cannot be removed stays until then.
//!
//! A layer that a record has in `merging` goes into the one above it (`merge`).
//!
//! Invariant: epoch and generation of a stored record never decrease, an epoch never changes its
//! holder, a generation never its digest nor its layers, an image never its shard size.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use bytes::Bytes;

use crate::geometry::{
    ImageId, LAYERS_MAX, LayerId, SHARD_BYTES_MAX, SHARD_BYTES_MIN, ShardKey, SnapshotId,
};
use crate::rules::{Rule, broken};

use super::disk::{Disk, DiskResult, Errno};
use super::encoding::{Reader, push_u32, push_u64};
use super::errors::StoreError;
use super::index::KeyMap;

const MAGIC: &[u8; 8] = b"HCIIMAGE";
/// Longest body of a record.
pub const BODY_BYTES_MAX: usize = 64 << 10;

/// The part of an image's record that the store judges by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RecordHead {
    pub epoch: u64,
    /// Who holds the epoch.
    pub holder: [u8; 16],
    pub generation: u64,
    /// BLAKE3 of the in-sync sets and the layers of that generation.
    pub digest: [u8; 32],
    pub shard_bytes: u32,
}

/// A stored record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ImageRecord {
    pub head: RecordHead,
    /// Nothing that is here of the image counts yet: it is made from what other nodes have.
    pub blank: bool,
    pub chain: Chain,
    pub snapshots: Vec<SnapshotId>,
    /// Layers whose content goes into the one above them: ids that fall, of the chain, but not the top one.
    pub merging: Vec<LayerId>,
    pub body: Bytes,
}

/// Adjacent layers that go into the one above them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Merge {
    pub into: LayerId,
    /// The uppermost first.
    pub from: Vec<LayerId>,
}

/// The layers of an image, top first: at least one, and ids that fall.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Chain(Arc<[LayerId]>);

impl Chain {
    /// None where the layers are no chain.
    pub fn new(layers: &[LayerId]) -> Option<Chain> {
        let fits = (1..=LAYERS_MAX).contains(&layers.len()) && layers.is_sorted_by(|a, b| a > b);
        fits.then(|| Chain(layers.into()))
    }

    pub fn layers(&self) -> &[LayerId] {
        &self.0
    }

    pub fn has(&self, layer: LayerId) -> bool {
        self.0.binary_search_by(|at| layer.cmp(at)).is_ok()
    }

    /// That layer and those below it; all where it is not one of them.
    pub fn from(&self, layer: LayerId) -> &[LayerId] {
        let at = self.0.iter().position(|of| *of == layer).unwrap_or(0);
        &self.0[at..]
    }
}

impl ImageRecord {
    fn is_layered_as(&self, other: &ImageRecord) -> bool {
        self.chain == other.chain
            && self.snapshots == other.snapshots
            && self.merging == other.merging
    }

    /// Whether what is merged are layers of the chain, with one above them that stays, and none that a
    /// snapshot names.
    fn merges_fit(&self) -> bool {
        let below = &self.chain.layers()[1..];
        let named = |layer: &LayerId| self.snapshots.iter().any(|named| named.layer == *layer);
        self.merging.is_sorted_by(|a, b| a > b)
            && self.merging.iter().all(|layer| below.contains(layer) && !named(layer))
    }

    /// The merge that the layer takes part in, whether its content goes or comes.
    pub fn merge_of(&self, layer: LayerId) -> Option<Merge> {
        let goes = |layer: &LayerId| self.merging.contains(layer);
        let layers = self.chain.layers();
        let at = layers.iter().position(|of| *of == layer)?;
        let into = layers[..=at].iter().rposition(|of| !goes(of))?;
        let from = layers[into + 1..].iter().copied().take_while(goes);
        let merge = Merge { into: layers[into], from: from.collect() };
        (!merge.from.is_empty()).then_some(merge)
    }

    /// Of each layer of the chain, the how manieth it is from 1 on. What is merged counts as where it goes.
    pub fn depths(&self, chain: &Chain) -> Vec<u16> {
        let mut depth = 0;
        let depths = chain.layers().iter().map(|layer| {
            depth += u16::from(!self.merging.contains(layer));
            depth
        });
        depths.collect()
    }

    /// The layers that the snapshot is seen through; none where it is not one of this record's.
    pub fn layers_of(&self, snapshot: &SnapshotId) -> Option<&[LayerId]> {
        let below = &self.chain.layers()[1..];
        let at = below.iter().position(|layer| *layer == snapshot.layer)?;
        self.snapshots.contains(snapshot).then(|| &below[at..])
    }
}

#[derive(Clone, Debug)]
struct Known {
    record: ImageRecord,
    /// The file holds this record.
    persisted: bool,
}

/// All images of a store.
#[derive(Default)]
pub struct Images {
    known: KeyMap<ImageId, Known>,
    deleted: HashSet<ImageId>,
    /// Deleted images whose tombstone file or data files are still to be dealt with.
    pending_deletes: Vec<ImageId>,
    /// Layers that no record names any more, and that may have files still.
    pending_drops: BTreeSet<(ImageId, LayerId)>,
}

impl Images {
    pub fn get(&self, image: &ImageId) -> Option<&ImageRecord> {
        self.known.get(image).map(|known| &known.record)
    }

    pub fn ids(&self) -> impl Iterator<Item = ImageId> {
        self.known.keys().copied()
    }

    pub fn is_deleted(&self, image: &ImageId) -> bool {
        self.deleted.contains(image)
    }

    pub fn deleted(&self) -> impl Iterator<Item = ImageId> {
        self.deleted.iter().copied()
    }

    /// The record of an image that may be worked on.
    pub fn require(&self, image: &ImageId) -> Result<&RecordHead, StoreError> {
        match self.known.get(image) {
            Some(known) => Ok(&known.record.head),
            None if self.deleted.contains(image) => Err(StoreError::Deleted { image: *image }),
            None => Err(StoreError::UnknownImage { image: *image }),
        }
    }

    /// Whether the record may be stored.
    pub fn check(&self, image: &ImageId, record: &ImageRecord) -> Result<(), StoreError> {
        let head = &record.head;
        if self.deleted.contains(image) {
            return Err(StoreError::Deleted { image: *image });
        }
        let fits = head.shard_bytes.is_power_of_two()
            && (SHARD_BYTES_MIN..=SHARD_BYTES_MAX).contains(&head.shard_bytes);
        if !fits || !record.merges_fit() {
            return Err(StoreError::OutOfRange);
        }
        let Some(known) = self.known.get(image) else { return Ok(()) };
        let (stored, equal) = (known.record.head, known.record.is_layered_as(record));
        let lower = head.epoch < stored.epoch || head.generation < stored.generation;
        if lower && !broken(Rule::RecordsGrow) {
            return Err(StoreError::RecordLower { stored: Box::new(stored) });
        }
        let conflict = (head.epoch == stored.epoch && head.holder != stored.holder)
            || (head.generation == stored.generation && (head.digest != stored.digest || !equal))
            || head.shard_bytes != stored.shard_bytes
            || record.chain.layers().iter().any(|l| self.pending_drops.contains(&(*image, *l)));
        if conflict && !broken(Rule::EqualRecordsAgree) {
            return Err(StoreError::RecordConflict { stored: Box::new(stored) });
        }
        Ok(())
    }

    /// Stores a record that `check` let pass, or one from the log, and says whether it drops layers. One
    /// that is older than what the file held is skipped: the log may lag behind the file.
    pub fn put(&mut self, image: ImageId, record: ImageRecord) -> bool {
        if self.deleted.contains(&image) {
            return false;
        }
        let mut dropped = Vec::new();
        if let Some(known) = self.known.get(&image) {
            let (old, new) = (&known.record.head, &record.head);
            let older = (new.epoch, new.generation) < (old.epoch, old.generation);
            if older && !broken(Rule::RecordsGrow) {
                return false;
            }
            let before = known.record.chain.layers().iter().copied();
            dropped.extend(before.filter(|layer| !record.chain.has(*layer)));
        }
        self.known.insert(image, Known { record, persisted: false });
        if !broken(Rule::DroppedLayersGo) {
            self.pending_drops.extend(dropped.iter().map(|layer| (image, *layer)));
        }
        !dropped.is_empty()
    }

    /// Whether the shard is of a layer that its image's record does not name.
    pub fn is_dropped(&self, key: &ShardKey) -> bool {
        let record = self.get(&key.image);
        record.is_some_and(|record| !record.chain.has(key.layer)) && !broken(Rule::DroppedLayersGo)
    }

    /// A layer of the image that has files.
    pub fn found_layer(&mut self, image: ImageId, layer: LayerId) {
        if self.is_dropped(&ShardKey { image, layer, shard: 0 }) {
            self.pending_drops.insert((image, layer));
        }
    }

    /// Dropped layers whose files are to be removed.
    pub fn pending_drops(&self) -> &BTreeSet<(ImageId, LayerId)> {
        &self.pending_drops
    }

    /// A record read from its file.
    pub fn loaded(&mut self, image: ImageId, record: ImageRecord) {
        self.known.insert(image, Known { record, persisted: true });
    }

    /// Deletes for ever. The files are dealt with by the next checkpoint.
    pub fn delete(&mut self, image: ImageId) {
        self.known.remove(&image);
        self.pending_drops.retain(|(of, _)| *of != image);
        if self.deleted.insert(image) {
            self.pending_deletes.push(image);
        }
    }

    /// A tombstone read from its file; `leftovers` tells that data files are still there.
    pub fn loaded_tombstone(&mut self, image: ImageId, leftovers: bool) {
        self.deleted.insert(image);
        if leftovers {
            self.pending_deletes.push(image);
        }
    }

    pub fn pending_deletes(&self) -> &[ImageId] {
        &self.pending_deletes
    }

    /// Records that their files do not have yet.
    pub fn unpersisted(&self) -> Vec<(ImageId, ImageRecord)> {
        let mut list: Vec<_> = self
            .known
            .iter()
            .filter(|(_, known)| !known.persisted)
            .map(|(image, known)| (*image, known.record.clone()))
            .collect();
        list.sort_unstable_by_key(|(image, _)| *image);
        list
    }

    /// A checkpoint has written these records, carried out these deletes, and removed these layers.
    pub fn settled(
        &mut self,
        records: &[(ImageId, ImageRecord)],
        deletes: &[ImageId],
        dropped: &[(ImageId, LayerId)],
    ) {
        for (image, record) in records {
            if let Some(known) = self.known.get_mut(image)
                && known.record == *record
            {
                known.persisted = true;
            }
        }
        self.pending_deletes.retain(|image| !deletes.contains(image));
        dropped.iter().for_each(|layer| _ = self.pending_drops.remove(layer));
    }
}

/// Folder of an image's files.
pub fn image_folder(image: &ImageId) -> String {
    format!("images/{image}")
}

/// Folder of a layer's shard files.
pub fn layer_folder(image: &ImageId, layer: LayerId) -> String {
    format!("images/{image}/{layer}")
}

/// The layer whose folder has this name.
pub fn listed_layer(name: &str) -> Option<LayerId> {
    name.parse::<LayerId>().ok().filter(|layer| layer.to_string() == name)
}

/// Appends a record's head and body, as in the log.
pub fn encode_record(record: &ImageRecord, out: &mut Vec<u8>) {
    let head = &record.head;
    push_u64(out, head.epoch);
    out.extend_from_slice(&head.holder);
    push_u64(out, head.generation);
    out.extend_from_slice(&head.digest);
    push_u32(out, head.shard_bytes);
    out.push(u8::from(record.blank));
    push_u32(out, record.chain.layers().len() as u32);
    record.chain.layers().iter().for_each(|layer| push_u32(out, *layer));
    push_u32(out, record.snapshots.len() as u32);
    for SnapshotId { layer, generation } in &record.snapshots {
        push_u32(out, *layer);
        push_u64(out, *generation);
    }
    push_u32(out, record.merging.len() as u32);
    record.merging.iter().for_each(|layer| push_u32(out, *layer));
    push_u32(out, record.body.len() as u32);
    out.extend_from_slice(&record.body);
}

/// Reads what `encode_record` wrote.
pub fn decode_record(reader: &mut Reader<'_>) -> Option<ImageRecord> {
    let (epoch, holder, generation) = (reader.u64()?, reader.array()?, reader.u64()?);
    let (digest, shard_bytes) = (reader.array()?, reader.u32()?);
    let (blank, count) = (reader.u8()? != 0, reader.u32()?);
    let layers: Option<Vec<LayerId>> = (0..count).map(|_| reader.u32()).collect();
    let chain = Chain::new(&layers?)?;
    let count = reader.u32()?;
    let snapshot = |_| Some(SnapshotId { layer: reader.u32()?, generation: reader.u64()? });
    let snapshots = (0..count).map(snapshot).collect::<Option<Vec<SnapshotId>>>()?;
    let count = reader.u32()?;
    let merging = (0..count).map(|_| reader.u32()).collect::<Option<Vec<LayerId>>>()?;
    let length = reader.u32()? as usize;
    let body = Bytes::copy_from_slice(reader.take(length)?);
    let fits =
        shard_bytes.is_power_of_two() && (SHARD_BYTES_MIN..=SHARD_BYTES_MAX).contains(&shard_bytes);
    let head = RecordHead { epoch, holder, generation, digest, shard_bytes };
    fits.then_some(ImageRecord { head, blank, chain, snapshots, merging, body })
}

/// Writes `images/ID/record` so that a crash leaves the old or the new one, durably.
pub fn write_record_file(disk: &dyn Disk, image: &ImageId, record: &ImageRecord) -> DiskResult<()> {
    let folder = image_folder(image);
    disk.create_dir(&folder)?;
    let mut content = Vec::new();
    encode_record(record, &mut content);
    super::superblock::replace_file(disk, &folder, "record", MAGIC, &content)?;
    disk.sync_dir("images")
}

/// Reads `images/ID/record`: `Ok(None)` where there is none, `Err(None)` where it is damaged.
pub fn read_record_file(
    disk: &dyn Disk,
    image: &ImageId,
) -> Result<Option<ImageRecord>, Option<Errno>> {
    let path = format!("{}/record", image_folder(image));
    let content = super::superblock::read_file(disk, &path, MAGIC).map_err(Some)?;
    match content {
        super::superblock::Content::Missing => Ok(None),
        super::superblock::Content::Damaged => Err(None),
        super::superblock::Content::Whole(content) => {
            decode_record(&mut Reader::new(&content)).map(Some).ok_or(None)
        }
    }
}
