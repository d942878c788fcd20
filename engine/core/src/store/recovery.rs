//! Opening a store: identity, start counter, image records, then the log from its tail on.
//!
//! Replay stops at the first record that is not valid, not next in number, or of an older instance
//! than the one before it. If anything proves that this record had been synced, the log is damaged:
//! that is reported (`Recovery::damaged`), at every later start too.

use std::collections::{HashSet, VecDeque};
use std::io::IoSlice;
use std::sync::Arc;

use bytes::BytesMut;

use crate::geometry::{ImageId, ShardKey};
use crate::rules::{Rule, broken};

use super::cache::Cache;
use super::disk::{Disk, DiskResult, Errno, FileRef};
use super::encoding::{Reader, push_u32, push_u64};
use super::images::read_record_file;
use super::index::Place;
use super::log::{Log, LogParameters, PAGE_BYTES, Segment, create_segment, segment_path};
use super::record::{HEADER_BYTES, Header, Kind, decode, payload_matches};
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
    fn load(disk: &dyn Disk, seed: u32) -> DiskResult<Option<Tail>> {
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

/// One log file as found.
struct FoundSegment {
    slot: u32,
    file: FileRef,
    /// lsn and instance of its head record.
    head: Option<(u64, u64)>,
}

/// Replays the log.
struct Replay {
    seed: u32,
    segment_bytes: u32,
    /// Records of this instance or later cannot be.
    instance_end: u64,
    state: State,
    next_lsn: u64,
    last_instance: u64,
    records: u64,
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
        let Recovered { state, live, free, next_lsn, records, tail, damaged } = recovered;
        superblock.damaged |= damaged || records_damaged;
        if damaged || records_damaged {
            superblock.save(&*disk)?;
        }
        disk.sync_dir("log")?;
        disk.sync_dir("deleted")?;
        live.iter().try_for_each(|segment| segment.file.sync_data())?;
        let (seed, instance) = (superblock.seed(), superblock.instance);
        let parameters = LogParameters { segment_bytes, segments_max, seed, instance, next_lsn };
        let recovery = Recovery { instance, created, damaged: superblock.damaged, records };
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

struct Recovered {
    state: State,
    live: VecDeque<Segment>,
    free: Vec<(u32, FileRef)>,
    next_lsn: u64,
    records: u64,
    tail: Tail,
    damaged: bool,
}

/// Shards that an interrupted checkpoint may have torn. It had all that it wrote from the log, which still
/// has it.
fn torn_by(tail: &Tail, state: &State) -> HashSet<ShardKey> {
    let logged = state.index.iter().map(|(key, _)| *key);
    logged.filter(|key| tail.torn.has(key)).collect()
}

fn recover_log(
    disk: &dyn Disk,
    superblock: &Superblock,
    state: State,
) -> Result<Recovered, StoreError> {
    let (seed, segment_bytes) = (superblock.seed(), superblock.segment_bytes);
    let mut found = find_segments(disk, seed, segment_bytes)?;
    let tail = Tail::load(disk, seed)?;
    let mut damaged = tail.is_none();
    let torn = MayBeTorn::anything();
    let mut tail = tail.unwrap_or(Tail { version: 0, first_lsn: 1, durable_lsn: 0, torn });
    let heads = || found.iter().filter_map(|segment| segment.head);
    if !heads().any(|(lsn, _)| lsn == tail.first_lsn)
        && (damaged || tail.first_lsn <= tail.durable_lsn)
    {
        // The oldest live segment is lost. Go on with the next one there is, or with an empty log.
        damaged = true;
        let later = heads().map(|(lsn, _)| lsn).filter(|lsn| *lsn > tail.first_lsn).min();
        tail.first_lsn = later.unwrap_or(tail.durable_lsn.max(tail.first_lsn) + 1);
    }
    let (next_lsn, last_instance, records) = (tail.first_lsn, 0, 0);
    let instance_end = superblock.instance;
    let mut replay =
        Replay { seed, segment_bytes, instance_end, state, next_lsn, last_instance, records };
    let mut live = VecDeque::new();
    while let Some(place) = replay.next_segment(&found) {
        let sequence = live.len() as u32 + 1;
        let FoundSegment { slot, file, .. } = found.swap_remove(place);
        let first_lsn = replay.next_lsn;
        let end = replay.segment(&*file, sequence)?;
        let last_lsn = replay.next_lsn - 1;
        live.push_back(Segment { sequence, slot, file, first_lsn, last_lsn, end });
        if last_lsn < first_lsn {
            // Its head was valid a moment ago; without it there is nothing to go on from.
            return Err(StoreError::Corrupt { file: segment_path(slot) });
        }
    }
    let Replay { mut state, next_lsn, last_instance, records, .. } = replay;
    let files = live.iter().map(|s| &s.file).chain(found.iter().map(|s| &s.file));
    let proof = synced_after(files, seed, segment_bytes, last_instance, superblock.instance)?;
    damaged |= proof.max(tail.durable_lsn) >= next_lsn;
    state.drop_deleted();
    state.observe_records();
    if !broken(Rule::StickyAfterRestart) {
        state.dirty.all_sticky();
    }
    let next_lsn = if live.is_empty() { next_lsn.max(proof + 1) } else { next_lsn };
    if damaged {
        // What was lost must not be looked for again.
        tail.version += 1;
        tail.first_lsn = live.front().map_or(next_lsn, |segment| segment.first_lsn);
        tail.durable_lsn = next_lsn - 1;
        let save = Superblock { damaged: true, ..superblock.clone() };
        save.save(disk)?;
        tail.write(disk, seed)?;
    }
    let free = found.into_iter().map(|segment| (segment.slot, segment.file)).collect();
    Ok(Recovered { state, live, free, next_lsn, records, tail, damaged })
}

/// All log files of the right size, with the heads of those that have one.
fn find_segments(
    disk: &dyn Disk,
    seed: u32,
    segment_bytes: u32,
) -> Result<Vec<FoundSegment>, StoreError> {
    let mut found = Vec::new();
    for name in disk.list("log")? {
        let Ok(slot) = name.parse::<u32>() else { continue };
        let file = disk.open(&format!("log/{name}"))?;
        if segment_path(slot) != format!("log/{name}") || file.length()? != u64::from(segment_bytes)
        {
            // Its creation was interrupted.
            disk.unlink(&format!("log/{name}"))?;
            continue;
        }
        let head = read_head(&*file, seed, segment_bytes);
        found.push(FoundSegment { slot, file, head });
    }
    found.sort_unstable_by_key(|segment| segment.slot);
    Ok(found)
}

fn read_head(
    file: &dyn super::disk::DiskFile,
    seed: u32,
    segment_bytes: u32,
) -> Option<(u64, u64)> {
    let mut bytes = BytesMut::new();
    file.read_at(0, HEADER_BYTES, &mut bytes).ok()?;
    let extra = u32::from_le_bytes(bytes.get(12..16)?.try_into().ok()?);
    let rest = extra.min(segment_bytes) as usize;
    file.read_at(HEADER_BYTES as u64, rest, &mut bytes).ok()?;
    let (header, ..) = decode(&bytes, seed)?;
    (header.kind == Kind::Head).then_some((header.lsn, header.instance))
}

impl Replay {
    /// Index of the segment that goes on where the replay stands.
    fn next_segment(&self, found: &[FoundSegment]) -> Option<usize> {
        let fits = |head: &(u64, u64)| {
            head.0 == self.next_lsn && (self.last_instance..self.instance_end).contains(&head.1)
        };
        let candidates =
            found.iter().enumerate().filter(|(_, s)| s.head.as_ref().is_some_and(fits));
        candidates.max_by_key(|(_, segment)| segment.head).map(|(place, _)| place)
    }

    /// Replays one segment; gives where the next batch goes.
    fn segment(
        &mut self,
        file: &dyn super::disk::DiskFile,
        sequence: u32,
    ) -> Result<u32, StoreError> {
        let mut bytes = BytesMut::with_capacity(self.segment_bytes as usize);
        read_segment(file, self.segment_bytes, &mut bytes)?;
        let page = PAGE_BYTES as usize;
        let mut at = 0;
        loop {
            if let Some(length) = self.record(&bytes, at, sequence) {
                at += length;
            } else if at.is_multiple_of(page) {
                return Ok(at as u32);
            } else {
                at = at.next_multiple_of(page);
            }
        }
    }

    /// Replays the record at `at`, if it is the next one, and gives its length.
    fn record(&mut self, bytes: &[u8], at: usize, sequence: u32) -> Option<usize> {
        let (header, extra, payload) = decode(bytes.get(at..)?, self.seed)?;
        let instances = self.last_instance..self.instance_end;
        if header.lsn != self.next_lsn
            || !instances.contains(&header.instance)
            || (header.kind == Kind::Head) != (at == 0)
            || !payload_matches(&header, extra, payload)
        {
            return None;
        }
        if header.kind == Kind::Head && self.records == 0 {
            self.state.load_snapshot(extra)?;
        } else if header.instance > self.last_instance {
            self.state.dirty.all_sticky();
        }
        let start = (at + HEADER_BYTES + extra.len()) as u32;
        let place = Place::of_record(sequence, start, header.payload_bytes);
        self.state.replay(&header, extra, place)?;
        self.next_lsn += 1;
        self.last_instance = header.instance;
        self.records += 1;
        Some(header.total_bytes())
    }
}

/// Reads a whole segment. Pages that cannot be read are zeros: no record, and no reason to give up the
/// others, least of all where nothing was written yet.
fn read_segment(
    file: &dyn super::disk::DiskFile,
    segment_bytes: u32,
    bytes: &mut BytesMut,
) -> DiskResult<()> {
    bytes.clear();
    match file.read_at(0, segment_bytes as usize, bytes) {
        Err(Errno::IO) => {}
        other => return other.map(|_| ()),
    }
    bytes.clear();
    for at in (0..segment_bytes).step_by(PAGE_BYTES as usize) {
        match file.read_at(u64::from(at), PAGE_BYTES as usize, bytes) {
            Ok(_) | Err(Errno::IO) => bytes.resize((at + PAGE_BYTES) as usize, 0),
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// The highest lsn that any record of `instance` or later says was durable when it was written.
/// Every batch starts on a page, and its first record tells.
fn synced_after<'a>(
    files: impl Iterator<Item = &'a FileRef>,
    seed: u32,
    segment_bytes: u32,
    instance: u64,
    instance_end: u64,
) -> Result<u64, StoreError> {
    let mut durable_lsn = 0;
    let mut bytes = BytesMut::new();
    for file in files {
        read_segment(&**file, segment_bytes, &mut bytes)?;
        for at in (0..bytes.len()).step_by(PAGE_BYTES as usize) {
            let counts = |header: &Header| (instance..instance_end).contains(&header.instance);
            if let Some((header, ..)) = decode(&bytes[at..], seed)
                && counts(&header)
            {
                durable_lsn = durable_lsn.max(header.durable_lsn);
            }
        }
    }
    Ok(durable_lsn)
}
