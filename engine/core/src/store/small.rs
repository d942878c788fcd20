//! Records of a few bytes: image records, clears, marks, tombstones.

use crate::geometry::{ImageId, LAYERS_MAX, Tag};

use super::dirty::ENTRY_BYTES;
use super::images::{BODY_BYTES_MAX, ImageRecord, encode_record};
use super::log::Class;
use super::record::{Header, Kind};
use super::state::encode_peers;
use super::{Stamp, Store, StoreError};

/// A peer's name and number in a head record, with room for its image.
const PEER_BYTES_MAX: usize = 128;

impl Store {
    /// Stores an image's record (durable at the next sync) and gives its lsn. A higher generation
    /// is what all the image's dirty shards then count as written in; a higher epoch makes them
    /// sticky.
    ///
    /// Refuses a lower epoch or generation (`RecordLower`), and an equal epoch of another holder or
    /// an equal generation of another digest or other layers (`RecordConflict`); so one that names a
    /// layer whose files are being removed, and one without a layer that is not merged here (`NotMerged`). Of a distrusted image only a holder that was told so
    /// stores one, when the cluster's record says that nothing here counts.
    ///
    /// Layers that it does not name any more are dropped.
    pub fn put_record(&mut self, image: ImageId, record: ImageRecord) -> Result<u64, StoreError> {
        self.check()?;
        self.state.images.check(&image, &record)?;
        self.check_merges(&image, &record)?;
        if record.body.len() > BODY_BYTES_MAX || record.snapshots.len() > LAYERS_MAX {
            return Err(StoreError::TooLarge);
        }
        let mut extra = Vec::new();
        encode_record(&record, &mut extra);
        let staged = self.stage_small(Header::new(Kind::Image, image), &extra, Class::Small)?;
        self.merges.record(image, &record);
        if self.state.apply_image(image, record) {
            let images = &self.state.images;
            self.metas.retain(|key| !images.is_dropped(key));
            self.files.retain(|key| !images.is_dropped(key));
            self.unsettled.retain(|key| !images.is_dropped(key));
        }
        self.distrusted.remove(&image);
        Ok(staged.lsn)
    }

    /// Something named a higher generation of the image than known: its dirty shards now count as
    /// written in that one.
    pub fn observe_generation(
        &mut self,
        image: ImageId,
        generation: u64,
    ) -> Result<(), StoreError> {
        self.check()?;
        if self.state.dirty.observes(&image, 0, generation) {
            let stamp = Stamp { generation, ..Stamp::default() };
            let header = Header { stamp, ..Header::new(Kind::Observe, image) };
            self.stage_small(header, &[], Class::Small)?;
            self.state.dirty.observe(&image, 0, generation);
        }
        Ok(())
    }

    /// Drops dirty entries last written at `tag` or below, but for sticky ones: all writes up to it
    /// are answered, and flushed by every in-sync node, of which each peer had then synced the
    /// flush of that number. Durable with the next sync; losing it only leaves the map larger.
    pub fn clear(
        &mut self,
        image: ImageId,
        tag: Tag,
        peers: &[(String, u64)],
    ) -> Result<(), StoreError> {
        self.check()?;
        self.state.images.require(&image)?;
        // Numbers of very many images would not fit into a head record; they only serve to notice a
        // peer that was rolled back, so the rest goes without.
        let entries = self.state.dirty.entries() * ENTRY_BYTES;
        let numbers = self.state.snapshot_bytes() - entries + peers.len() * PEER_BYTES_MAX;
        let peers = if numbers > self.log.segment_bytes() as usize / 4 { &[] } else { peers };
        let mut extra = Vec::new();
        encode_peers(peers, &mut extra);
        let stamp = Stamp { epoch: tag.epoch, sequence: tag.sequence, generation: 0 };
        let header = Header { stamp, ..Header::new(Kind::Clear, image) };
        let staged = self.stage_small(header, &extra, Class::Small)?;
        self.state.apply_clear(&image, tag, peers, staged.place);
        Ok(())
    }

    /// These shards are level on all in-sync nodes, durably: drops their sticky entries (one
    /// written to meanwhile stays for the next clear).
    pub fn mark_level(&mut self, image: ImageId, shards: &[u64]) -> Result<(), StoreError> {
        const SHARDS_PER_RECORD: usize = 512;
        self.check()?;
        self.state.images.require(&image)?;
        for shards in shards.chunks(SHARDS_PER_RECORD) {
            let extra: Vec<u8> = shards.iter().flat_map(|shard| shard.to_le_bytes()).collect();
            let header = Header::new(Kind::Level, image);
            let staged = self.stage_small(header, &extra, Class::Small)?;
            self.state.apply_level(&image, shards, staged.place);
        }
        Ok(())
    }

    /// Deletes the image for ever (durable at the next sync); its files go with a later checkpoint.
    /// An image that is not known here is deleted too: it will never be accepted.
    pub fn delete(&mut self, image: ImageId) -> Result<(), StoreError> {
        self.check()?;
        if self.state.images.is_deleted(&image) {
            return Ok(());
        }
        self.stage_small(Header::new(Kind::Delete, image), &[], Class::Small)?;
        self.state.apply_delete(&image);
        self.distrusted.remove(&image);
        self.merges.forget(&image);
        self.metas.retain(|key| key.image != image);
        self.files.retain(|key| key.image != image);
        self.unsettled.retain(|key| key.image != image);
        Ok(())
    }
}
