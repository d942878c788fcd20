//! The store of a node: write-ahead log, shard files, dirty map, recovery, over a `Disk` trait.
//!
//! A change is staged (`write`, `zero`, `copy`, `put_record`, …), written to the log in batches
//! (`append`: from then on a killed process loses none of it), and durable after a sync
//! (`begin_sync`, run the job in any thread, `finish_sync`). Data stays in the log until a
//! checkpoint job has put it into shard files. The caller is one thread; jobs run wherever it
//! likes, one checkpoint at a time.
//!
//! Invariants:
//! * nothing in a shard file is overwritten or punched before the record that replaces it is
//!   durable;
//! * a log segment is reused only when all that it says is elsewhere, durably;
//! * a block is returned, or merged into, only if it matches its checksum;
//! * after a failed log write or sync the store does nothing more (`StoreError::Failed`).
//!
//! It refuses to judge who is in sync; it only keeps what it is told, and refuses older records.
//! Formats: `docs/disk-format.md`.

mod cache;
mod checkpoint;
mod dirty;
pub mod disk;
mod encoding;
mod errors;
mod images;
mod index;
mod log;
mod merge;
mod read;
pub mod real;
mod record;
mod recovery;
mod replay;
mod scrub;
mod shard_file;
#[cfg(any(test, feature = "simulation"))]
pub mod simulated;
mod small;
mod state;
mod superblock;
mod sync;
#[cfg(test)]
mod tests;
mod torn;
mod touched;
mod usage;
mod window;
mod write;
mod written;

use std::collections::HashSet;
use std::sync::Arc;

use bytes::Bytes;

use crate::checksum::Checksum;
use crate::content::Block;
use crate::geometry::{ImageId, LayerId, ShardKey, Tag};

pub use checkpoint::{CheckpointDone, CheckpointJob};
pub use dirty::DirtyEntry;
use disk::{Disk, DiskResult, Errno, FileRef, LockGuard};
pub use errors::StoreError;
pub use images::{BODY_BYTES_MAX, Chain, ImageRecord, RecordHead};
use log::{Class, Log};
pub use read::{BlockSummary, Placed, ReadBuffer, ShardSummary};
pub use record::CopyBlock;
use record::{HEADER_BYTES, Header, Kind};
pub use recovery::Recovery;
pub use scrub::Scrubbed;
use shard_file::ShardMeta;
#[cfg(test)]
pub(crate) use shard_file::shard_path;
use state::State;
use superblock::Superblock;
pub use sync::{SyncDone, SyncJob};
pub use usage::UsageHandle;
pub use written::{WRITTEN_PER_PAGE, WrittenCursor, WrittenPage};

/// What a block is, in one layer or resolved through the layers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum BlockState {
    /// Never written or discarded: the layer below shows; zeros where there is none.
    #[default]
    Absent = 0,
    /// Zeros, whatever the layer below has.
    Zero = 1,
    Data = 2,
    /// Known to be damaged everywhere: reading it is `BadBlock` until it is written.
    Bad = 3,
}

impl BlockState {
    /// The state's number on disk and on the wire.
    pub fn to_u8(self) -> u8 {
        self as u8
    }

    /// A block's content as state and checksum (0 without data), and back.
    pub fn of(block: Block) -> (BlockState, Checksum) {
        match block {
            Block::Absent => (BlockState::Absent, 0),
            Block::Zero => (BlockState::Zero, 0),
            Block::Data(checksum) => (BlockState::Data, checksum),
            Block::Bad => (BlockState::Bad, 0),
        }
    }

    pub fn with(self, checksum: Checksum) -> Block {
        match self {
            BlockState::Absent => Block::Absent,
            BlockState::Zero => Block::Zero,
            BlockState::Data => Block::Data(checksum),
            BlockState::Bad => Block::Bad,
        }
    }

    /// The state of that number.
    pub fn from_u8(value: u8) -> Option<BlockState> {
        (value < 4).then(|| BlockState::from_bits(value))
    }

    /// The state in the low two bits.
    pub(crate) fn from_bits(value: u8) -> BlockState {
        match value & 3 {
            0 => BlockState::Absent,
            1 => BlockState::Zero,
            2 => BlockState::Data,
            _ => BlockState::Bad,
        }
    }
}

/// What a change is tagged with.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stamp {
    pub epoch: u64,
    pub generation: u64,
    pub sequence: u64,
}

impl Stamp {
    pub fn tag(&self) -> Tag {
        Tag { epoch: self.epoch, sequence: self.sequence }
    }
}

/// Where a change goes.
#[derive(Clone, Copy, Debug)]
pub struct WriteOp<'a> {
    pub image: ImageId,
    /// The image's layers, top first; the change goes to the top one.
    pub layers: &'a [LayerId],
    pub shard: u64,
    /// First byte within the shard.
    pub offset: u32,
    pub stamp: Stamp,
}

/// How to open a store.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    pub cluster: [u8; 16],
    pub node: String,
    /// Random; becomes the store's id if it is created now.
    pub uuid: [u8; 16],
    /// The highest start counter that others have seen of this store: it was set back where its own is
    /// not higher. The new instance's is above both.
    pub seen_counter: u64,
    /// Space for the log.
    pub log_bytes: u64,
    /// Size of a log segment of a new store, a multiple of 4096; `None`: an eighth of the log, at
    /// least 4 MiB.
    pub segment_bytes: Option<u32>,
    /// Shard files kept open.
    pub open_files: usize,
    /// Memory for shard metadata (about 1.1 MiB per GiB of hot data).
    pub metadata_bytes: usize,
}

impl StoreConfig {
    /// The usual sizes: 512 open files, 64 MiB of metadata.
    pub fn new(cluster: [u8; 16], node: &str, uuid: [u8; 16], log_bytes: u64) -> StoreConfig {
        StoreConfig {
            cluster,
            node: node.to_owned(),
            uuid,
            seen_counter: 0,
            log_bytes,
            segment_bytes: None,
            open_files: 512,
            metadata_bytes: 64 << 20,
        }
    }
}

/// One node's store, opened by one process.
pub struct Store {
    disk: Arc<dyn Disk>,
    superblock: Superblock,
    log: Log,
    state: State,
    /// Last flush number that is synced.
    synced_flush_number: u64,
    metas: cache::Cache<ShardKey, Arc<ShardMeta>>,
    files: cache::Cache<ShardKey, FileRef>,
    /// Shards whose newer metadata slot an interrupted checkpoint may have torn, and whose names it
    /// may not have made durable.
    unsettled: HashSet<ShardKey>,
    /// What the running checkpoint writes.
    checkpointing: Option<checkpoint::Running>,
    tail_version: u64,
    failed: Option<Errno>,
    /// Images whose content and record here are of a state that was put back, until a holder that was
    /// told so stores a record.
    distrusted: HashSet<ImageId>,
    merges: merge::Merges,
    scratch: Vec<read::Found>,
    _lock: LockGuard,
}

impl Store {
    /// Whether the store still works.
    pub fn check(&self) -> Result<(), StoreError> {
        self.failed.map_or(Ok(()), |errno| Err(StoreError::Failed { errno }))
    }

    /// Writes everything staged to the log: one call. From then on a killed process loses none of
    /// it.
    pub fn append(&mut self) -> Result<(), StoreError> {
        self.check()?;
        self.log.append().map_err(|errno| self.fail(errno))
    }

    /// The store's id, drawn when it was created.
    pub fn id(&self) -> [u8; 16] {
        self.superblock.uuid
    }

    /// The store's start counter.
    pub fn instance(&self) -> u64 {
        self.superblock.instance
    }

    /// Highest lsn that is in the log (a killed process loses nothing up to it).
    pub fn appended_lsn(&self) -> u64 {
        self.log.appended_lsn()
    }

    /// Highest lsn that is durable.
    pub fn durable_lsn(&self) -> u64 {
        self.log.durable_lsn()
    }

    /// Number of the last flush whose mark is durable.
    pub fn flush_number(&self) -> u64 {
        self.synced_flush_number
    }

    /// Ids of the images with a record here.
    pub fn images(&self) -> Vec<ImageId> {
        let mut ids: Vec<_> = self.state.images.ids().collect();
        ids.sort_unstable();
        ids
    }

    /// The record of an image.
    pub fn image(&self, image: &ImageId) -> Option<&ImageRecord> {
        self.state.images.get(image)
    }

    /// Nothing that is here of these images counts: the store was set back. Whoever opens it remembers
    /// that over its starts (`distrusted`).
    pub fn distrust(&mut self, images: impl IntoIterator<Item = ImageId>) {
        self.distrusted.extend(images);
    }

    /// Whether the image was set back, and no holder has taken that into its record yet.
    pub fn is_distrusted(&self, image: &ImageId) -> bool {
        self.distrusted.contains(image)
    }

    /// The images of which that is so, in order.
    pub fn distrusted(&self) -> Vec<ImageId> {
        let mut ids: Vec<_> = self.distrusted.iter().copied().collect();
        ids.sort_unstable();
        ids
    }

    /// Whether the image was deleted here.
    pub fn is_deleted(&self, image: &ImageId) -> bool {
        self.state.images.is_deleted(image)
    }

    /// Ids of the images that were deleted here.
    pub fn deleted_images(&self) -> Vec<ImageId> {
        let mut ids: Vec<_> = self.state.images.deleted().collect();
        ids.sort_unstable();
        ids
    }

    /// The image's dirty shards, in order.
    pub fn dirty(&self, image: &ImageId) -> impl Iterator<Item = (u64, DirtyEntry)> {
        self.state.dirty.of(image)
    }

    /// The highest flush number of each peer that a clear of this image named.
    pub fn peer_flush_numbers(&self, image: &ImageId) -> impl Iterator<Item = (&str, u64)> {
        self.state.dirty.peers(image)
    }

    /// Bytes of the log in use.
    pub fn log_bytes(&self) -> u64 {
        self.log.live_bytes()
    }

    /// Whether a checkpoint is due: call `begin_checkpoint(false)`.
    pub fn wants_checkpoint(&self) -> bool {
        self.checkpointing.is_none()
            && (self.log_is_due()
                || self.log.wants_growth()
                || !self.state.images.pending_deletes().is_empty()
                || !self.state.images.pending_drops().is_empty()
                || self.wants_to_remove_merged())
    }

    /// Whether a checkpoint that is due would only remove files of layers that are gone or merged.
    pub fn only_removes(&self) -> bool {
        !self.log_is_due()
            && !self.log.wants_growth()
            && self.state.images.pending_deletes().is_empty()
    }

    /// Whether the log's oldest part should go to files: sooner beside merges, which leave the rest to clients.
    fn log_is_due(&self) -> bool {
        self.log.wants_checkpoint() || self.wants_merge() && self.log.is_half_full()
    }

    /// (capacity, free) of the store's file system, in bytes.
    pub fn space(&self) -> DiskResult<(u64, u64)> {
        self.disk.space()
    }

    /// A handle that counts an image's physical bytes in any thread.
    pub fn usage_handle(&self) -> UsageHandle {
        UsageHandle::new(Arc::clone(&self.disk))
    }

    /// Ends the store's work for good.
    fn fail(&mut self, errno: Errno) -> StoreError {
        let errno = *self.failed.get_or_insert(errno);
        StoreError::Failed { errno }
    }

    /// The most dirty entries: their snapshot fills half a segment. The rest of the snapshot may
    /// fill a quarter (`Store::clear`).
    fn dirty_entries_max(&self) -> usize {
        self.log.segment_bytes() as usize / 2 / dirty::ENTRY_BYTES
    }

    /// Bytes of the head record that a new segment starts with.
    fn head_bytes(&self) -> usize {
        HEADER_BYTES + self.state.snapshot_bytes()
    }

    /// Makes room for a record of `bytes`, in a new segment where the current one is full.
    fn make_room(&mut self, bytes: usize, class: Class) -> Result<(), StoreError> {
        if self.log.batch_is_full() {
            self.append()?;
        }
        if self.log.fits(bytes, class) {
            return Ok(());
        }
        if self.log.free_segments() == 0 {
            return Err(StoreError::LogFull);
        }
        self.roll()?;
        if self.log.fits(bytes, class) { Ok(()) } else { Err(StoreError::LogFull) }
    }

    /// Goes on in a free segment, which starts with the small state of this moment.
    fn roll(&mut self) -> Result<(), StoreError> {
        self.append()?;
        self.log.roll();
        let header = Header::new(Kind::Head, ImageId([0; 16]));
        let Store { log, state, .. } = self;
        log.stage(header, |out| state.encode_snapshot(out), std::iter::empty::<Bytes>());
        Ok(())
    }

    /// Stages a record of a few bytes; gives its place and lsn.
    fn stage_small(
        &mut self,
        header: Header,
        extra: &[u8],
        class: Class,
    ) -> Result<log::Staged, StoreError> {
        self.make_room(HEADER_BYTES + extra.len(), class)?;
        let append_extra = |out: &mut Vec<u8>| out.extend_from_slice(extra);
        Ok(self.log.stage(header, append_extra, std::iter::empty()))
    }
}
