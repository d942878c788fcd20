//! Reading the log at an open: its live part is replayed, the rest is looked through for proofs that there
//! was more.
//!
//! Replay stops at the first record that is not valid, not next in number, or of an older instance
//! than the one before it. Who replays judges by `durable_lsn` of what comes behind whether that record had
//! been synced.

use std::collections::VecDeque;
use std::ops::Range;

use super::StoreError;
use super::disk::{Disk, DiskFile, DiskResult, FileRef};
use super::index::Place;
use super::log::{PAGE_BYTES, Segment, segment_path};
use super::record::{HEADER_BYTES, Header, Kind, claimed_bytes, decode, payload_matches};
use super::recovery::Tail;
use super::state::State;
use super::superblock::Superblock;
use super::torn::MayBeTorn;
use super::window::Window;
use crate::rules::{Rule, broken};

/// So much is read beyond what is looked at.
const READ_AHEAD: usize = 1 << 20;

/// Header, variable part and payload.
type Record<'a> = (Header, &'a [u8], &'a [u8]);

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

/// What the log gave.
pub struct Recovered {
    pub state: State,
    pub live: VecDeque<Segment>,
    pub free: Vec<(u32, FileRef)>,
    pub next_lsn: u64,
    pub records: u64,
    pub tail: Tail,
    pub damaged: bool,
}

/// Finds the log's files and replays its live part.
pub fn recover_log(
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
        let empty = Segment::empty(sequence, slot, file, first_lsn);
        live.push_back(Segment { last_lsn, end, small_bytes: end, ..empty });
        if last_lsn < first_lsn {
            // Its head was valid a moment ago; without it there is nothing to go on from.
            return Err(StoreError::Corrupt { file: segment_path(slot) });
        }
    }
    let Replay { mut state, next_lsn, last_instance, records, .. } = replay;
    // What was replayed proves nothing beyond itself: a record knows of earlier ones only.
    let behind = live.iter().map(|segment| (&segment.file, segment.end));
    let places = behind.chain(found.iter().map(|segment| (&segment.file, 0)));
    let instances = last_instance..superblock.instance;
    let proof = synced_after(places, seed, segment_bytes, &instances)?;
    live.iter().for_each(|segment| segment.file.allow_read_ahead(true));
    found.iter().for_each(|segment| segment.file.allow_read_ahead(true));
    damaged |= proof.max(tail.durable_lsn) >= next_lsn;
    state.drop_deleted();
    state.drop_unnamed();
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
        // What the kernel has read would count as written.
        file.allow_read_ahead(false);
        let head = read_head(&*file, seed, segment_bytes);
        found.push(FoundSegment { slot, file, head });
    }
    found.sort_unstable_by_key(|segment| segment.slot);
    Ok(found)
}

/// lsn and instance of a segment's head record.
fn read_head(file: &dyn DiskFile, seed: u32, segment_bytes: u32) -> Option<(u64, u64)> {
    let mut window = Window::new(file, segment_bytes, HEADER_BYTES);
    let (header, ..) = record_at(&mut window, 0, seed).ok()??;
    (header.kind == Kind::Head).then_some((header.lsn, header.instance))
}

/// The record that starts at `at`; see `decode`.
fn record_at<'w>(
    window: &'w mut Window<'_>,
    at: usize,
    seed: u32,
) -> DiskResult<Option<Record<'w>>> {
    let Some(claimed) = claimed_bytes(window.at_least(at, HEADER_BYTES)?) else { return Ok(None) };
    Ok(decode(window.at_least(at, claimed)?, seed))
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
    fn segment(&mut self, file: &dyn DiskFile, sequence: u32) -> Result<u32, StoreError> {
        let mut window = Window::new(file, self.segment_bytes, READ_AHEAD);
        let page = PAGE_BYTES as usize;
        let mut at = 0;
        loop {
            if let Some(length) = self.record(&mut window, at, sequence)? {
                at += length;
            } else if at.is_multiple_of(page) {
                return Ok(at as u32);
            } else {
                at = at.next_multiple_of(page);
            }
        }
    }

    /// Replays the record at `at`, if it is the next one, and gives its length.
    fn record(
        &mut self,
        window: &mut Window<'_>,
        at: usize,
        sequence: u32,
    ) -> DiskResult<Option<usize>> {
        let found = record_at(window, at, self.seed)?;
        Ok(found
            .and_then(|record| self.apply(&record, at, sequence).then(|| record.0.total_bytes())))
    }

    /// Takes a record up, if it is the next one.
    fn apply(&mut self, record: &Record<'_>, at: usize, sequence: u32) -> bool {
        let (header, extra, payload) = record;
        let instances = self.last_instance..self.instance_end;
        if header.lsn != self.next_lsn
            || !instances.contains(&header.instance)
            || (header.kind == Kind::Head) != (at == 0)
            || !payload_matches(header, extra, payload)
        {
            return false;
        }
        if header.kind == Kind::Head && self.records == 0 {
            if self.state.load_snapshot(extra).is_none() {
                return false;
            }
        } else if header.instance > self.last_instance {
            self.state.dirty.all_sticky();
        }
        let start = (at + HEADER_BYTES + extra.len()) as u32;
        let place = Place::of_record(sequence, start, header.payload_bytes);
        if self.state.replay(header, extra, place).is_none() {
            return false;
        }
        self.next_lsn += 1;
        self.last_instance = header.instance;
        self.records += 1;
        true
    }
}

/// The highest lsn that any record of `instances` from these places on says was durable when it was
/// written. Every batch starts on a page, and its first record tells.
fn synced_after<'a>(
    places: impl Iterator<Item = (&'a FileRef, u32)>,
    seed: u32,
    segment_bytes: u32,
    instances: &Range<u64>,
) -> DiskResult<u64> {
    let mut durable_lsn = 0;
    for (file, from) in places {
        let mut window = Window::new(&**file, segment_bytes, READ_AHEAD);
        let mut at = from as usize;
        while at < segment_bytes as usize && window.next_written(&mut at)? {
            for page in (at..window.limit()).step_by(PAGE_BYTES as usize) {
                if let Some((header, ..)) = record_at(&mut window, page, seed)?
                    && instances.contains(&header.instance)
                {
                    durable_lsn = durable_lsn.max(header.durable_lsn);
                }
            }
            at = window.limit();
        }
    }
    Ok(durable_lsn)
}
