//! Opening a store: identity, start counter, image records, then the log from its tail on (`replay`).
//!
//! If anything proves that more had been synced than the log still has, it is damaged: that is reported
//! (`Recovery::damaged`), at every later start too.

use std::collections::HashSet;
use std::io::IoSlice;
use std::sync::Arc;

use bytes::BytesMut;

use crate::geometry::{ImageId, ShardKey};

use super::cache::Cache;
use super::disk::{Disk, DiskResult, Errno};
use super::encoding::{Reader, push_u32, push_u64};
use super::images::{image_folder, listed_layer, read_record_file};
use super::log::{Log, LogParameters, PAGE_BYTES, create_segment};
use super::merge::Merges;
use super::replay::{Recovered, recover_log};
use super::state::State;
use super::superblock::Superblock;
use super::torn::{FILTER_BYTES, MayBeTorn};
use super::{Store, StoreConfig, StoreError};

const SEGMENT_BYTES_MIN: u32 = 4 << 20;
const SEGMENTS_MIN: u32 = 4;
const TAIL_PATH: &str = "log/tail";
const TAIL_MAGIC: u32 = 0x4C54_4349;
const TAIL_BYTES: usize = 32 + FILTER_BYTES;
/// Of stores that were made before the tail said what a checkpoint may have torn.
const TAIL_MAGIC_BEFORE: u32 = 0x4C54_4348;
const TAIL_BYTES_BEFORE: usize = 32;
const _: () = assert!(TAIL_BYTES <= PAGE_BYTES as usize, "a slot is a page");

/// What an open found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Recovery {
    /// The start counter, raised by this open.
    pub instance: u64,
    /// There was no store; it was created.
    pub created: bool,
    /// Something that had been synced is lost: all that the store holds is stale since generation
    /// 0.
    pub damaged: bool,
    /// Records replayed.
    pub records: u64,
}

/// Where the live part of the log begins. Two slots, a page each, written alternately.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tail {
    pub version: u64,
    /// First lsn of the oldest live segment.
    pub first_lsn: u64,
    /// Everything up to it was durable when the tail was written.
    pub durable_lsn: u64,
    /// Shards that a checkpoint may have left half written since.
    pub torn: MayBeTorn,
}

impl Tail {
    /// Writes it into its slot, durably.
    pub fn write(&self, disk: &dyn Disk, seed: u32) -> DiskResult<()> {
        let mut bytes = Vec::with_capacity(PAGE_BYTES as usize);
        push_u32(&mut bytes, TAIL_MAGIC);
        push_u64(&mut bytes, self.version);
        push_u64(&mut bytes, self.first_lsn);
        push_u64(&mut bytes, self.durable_lsn);
        self.torn.encode(&mut bytes);
        let checksum = ::crc32c::crc32c_append(seed, &bytes);
        push_u32(&mut bytes, checksum);
        bytes.resize(PAGE_BYTES as usize, 0);
        let file = disk.create(TAIL_PATH)?;
        file.write_at(self.version % 2 * u64::from(PAGE_BYTES), &mut [IoSlice::new(&bytes)])?;
        file.sync_data()
    }

    /// The newest valid one.
    pub fn load(disk: &dyn Disk, seed: u32) -> DiskResult<Option<Tail>> {
        let file = match disk.open(TAIL_PATH) {
            Err(Errno::NOENT) => return Ok(None),
            other => other?,
        };
        let mut bytes = BytesMut::new();
        file.read_at(0, 2 * PAGE_BYTES as usize, &mut bytes)?;
        // A killed process may have left the newest in the cache only; the next goes over its
        // elder.
        file.sync_data()?;
        let slots = bytes.chunks(PAGE_BYTES as usize).filter_map(|slot| Tail::decode(slot, seed));
        Ok(slots.max_by_key(|tail| tail.version))
    }

    fn decode(slot: &[u8], seed: u32) -> Option<Tail> {
        let mut reader = Reader::new(slot);
        let magic = reader.u32()?;
        let (version, first_lsn, durable_lsn) = (reader.u64()?, reader.u64()?, reader.u64()?);
        let (torn, length) = match magic {
            TAIL_MAGIC => (MayBeTorn::decode(&mut reader)?, TAIL_BYTES),
            TAIL_MAGIC_BEFORE => (MayBeTorn::anything(), TAIL_BYTES_BEFORE),
            _ => return None,
        };
        let checksum = ::crc32c::crc32c_append(seed, slot.get(..length - 4)?);
        let tail = Tail { version, first_lsn, durable_lsn, torn };
        (reader.u32()? == checksum && first_lsn > 0).then_some(tail)
    }
}

impl Store {
    /// Opens the store in the disk's folder, creating it where the folder is empty.
    pub fn open(
        disk: Arc<dyn Disk>,
        config: &StoreConfig,
    ) -> Result<(Store, Recovery), StoreError> {
        let lock = disk.lock("lock").map_err(|errno| match errno {
            Errno::WOULDBLOCK => StoreError::Locked,
            errno => errno.into(),
        })?;
        let (mut superblock, created) = open_superblock(&*disk, config)?;
        let segment_bytes = superblock.segment_bytes;
        let segments_max = (config.log_bytes / u64::from(segment_bytes)) as u32;
        let segments_max = segments_max.max(SEGMENTS_MIN);
        if !superblock.ready {
            create_log(&*disk, &superblock)?;
            superblock.ready = true;
            superblock.save(&*disk)?;
        }
        let mut state = State::default();
        let records_damaged = load_images(&*disk, &mut state)?;
        let recovered = recover_log(&*disk, &superblock, state)?;
        let Recovered { mut state, live, free, next_lsn, records, tail, damaged } = recovered;
        superblock.damaged |= damaged || records_damaged;
        if damaged || records_damaged {
            superblock.save(&*disk)?;
        }
        if !superblock.damaged {
            find_layers(&*disk, &mut state)?;
        }
        disk.sync_dir("log")?;
        disk.sync_dir("deleted")?;
        live.iter().try_for_each(|segment| segment.file.sync_data())?;
        let (seed, instance) = (superblock.seed(), superblock.instance);
        let parameters = LogParameters { segment_bytes, segments_max, seed, instance, next_lsn };
        let recovery = Recovery { instance, created, damaged: superblock.damaged, records };
        let merges = Merges::of(&state.images);
        let mut store = Store {
            unsettled: torn_by(&tail, &state),
            synced_flush_number: state.flush_number,
            disk,
            superblock,
            log: Log::new(&parameters, live, free),
            state,
            metas: Cache::new(config.metadata_bytes),
            files: Cache::new(config.open_files),
            checkpointing: None,
            tail_version: tail.version,
            failed: None,
            distrusted: HashSet::new(),
            merges,
            scratch: Vec::new(),
            _lock: lock,
        };
        if store.log.live().is_empty() {
            if store.log.free_segments() == 0 {
                // All of them are lost; that is reported.
                let made = create_segment(&*store.disk, 0, segment_bytes)?;
                store.log.grow(vec![(0, made)], false);
            }
            store.roll()?;
        }
        Ok((store, recovery))
    }
}

/// Reads or creates the superblock and raises the start counter, durably.
fn open_superblock(
    disk: &dyn Disk,
    config: &StoreConfig,
) -> Result<(Superblock, bool), StoreError> {
    let (mut superblock, created) = match Superblock::load(disk)? {
        Some(superblock) => (superblock, false),
        None if !disk.list("log")?.is_empty() || !disk.list("images")?.is_empty() => {
            return Err(StoreError::Corrupt { file: "superblock".to_owned() });
        }
        None => {
            let eighth = (config.log_bytes / 8).min(1 << 28) as u32;
            let usual = eighth.next_multiple_of(PAGE_BYTES).max(SEGMENT_BYTES_MIN);
            let segment_bytes = config.segment_bytes.unwrap_or(usual);
            assert!(segment_bytes.is_multiple_of(PAGE_BYTES) && segment_bytes >= 16 * PAGE_BYTES);
            let StoreConfig { cluster, uuid, .. } = *config;
            let node = config.node.clone();
            let (instance, ready, damaged) = (0, false, false);
            let new = Superblock { cluster, node, uuid, instance, segment_bytes, ready, damaged };
            (new, true)
        }
    };
    if superblock.cluster != config.cluster || superblock.node != config.node {
        let Superblock { cluster, node, .. } = superblock;
        return Err(StoreError::Foreign { cluster, node });
    }
    superblock.instance = superblock.instance.max(config.seen_counter) + 1;
    superblock.save(disk)?;
    Ok((superblock, created))
}

/// Creates the folders, two empty segments and the tail; starts over what a crash interrupted.
fn create_log(disk: &dyn Disk, superblock: &Superblock) -> DiskResult<()> {
    ["log", "images", "deleted"].iter().try_for_each(|folder| disk.create_dir(folder))?;
    for name in disk.list("log")? {
        disk.unlink(&format!("log/{name}"))?;
    }
    disk.sync_dir("")?;
    (0..2).try_for_each(|slot| create_segment(disk, slot, superblock.segment_bytes).map(|_| ()))?;
    let torn = MayBeTorn::nothing();
    Tail { version: 1, first_lsn: 1, durable_lsn: 0, torn }.write(disk, superblock.seed())?;
    disk.sync_dir("log")
}

/// Loads record and tombstone files. Gives whether a record was damaged.
fn load_images(disk: &dyn Disk, state: &mut State) -> Result<bool, StoreError> {
    let mut damaged = false;
    let folders = disk.list("images")?;
    for name in disk.list("deleted")? {
        if let Ok(image) = name.parse::<ImageId>() {
            state.images.loaded_tombstone(image, folders.contains(&name));
        }
    }
    for image in folders.iter().filter_map(|name| name.parse::<ImageId>().ok()) {
        if state.images.is_deleted(&image) {
            continue;
        }
        match read_record_file(disk, &image) {
            Ok(Some(record)) => state.images.loaded(image, record),
            Ok(None) => {}
            Err(None | Some(Errno::IO)) => damaged = true,
            Err(Some(errno)) => return Err(errno.into()),
        }
    }
    Ok(damaged)
}

/// Finds what is left of layers that were dropped. The log has told every record by now.
fn find_layers(disk: &dyn Disk, state: &mut State) -> DiskResult<()> {
    let images: Vec<ImageId> = state.images.ids().collect();
    for image in images {
        let names = disk.list(&image_folder(&image))?;
        let layers = names.iter().filter_map(|name| listed_layer(name));
        layers.for_each(|layer| state.images.found_layer(image, layer));
    }
    Ok(())
}

/// Shards that an interrupted checkpoint may have torn. It had all that it wrote from the log, which still
/// has it.
fn torn_by(tail: &Tail, state: &State) -> HashSet<ShardKey> {
    let logged = state.index.iter().map(|(key, _)| *key);
    logged.filter(|key| tail.torn.has(key)).collect()
}
