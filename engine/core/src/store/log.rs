//! The write-ahead log: segments of fixed size, one batch of staged records, and what is durable.
//!
//! Invariants:
//! * lsns are contiguous over the live segments; the last live segment is the one written to;
//! * a batch starts on a page, lies in one segment and is padded to whole pages;
//! * a segment is written to again only after everything in it is in shard files, durably, and the
//!   tail file says so (`Log::retire`);
//! * after a failed sync nothing is ever counted as durable again (`SyncGate`).

use std::collections::VecDeque;
use std::io::IoSlice;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

use super::disk::{Disk, DiskFile, DiskResult, Errno, FileRef};
use super::index::Place;
use super::record::{HEADER_BYTES, Header, encode_header};

/// Batches are padded to this, so that no write touches part of a page.
pub const PAGE_BYTES: u32 = 4096;
static PADDING: [u8; PAGE_BYTES as usize] = [0; PAGE_BYTES as usize];
/// A batch is written out when it has this many pieces or bytes.
const BATCH_PIECES_MAX: usize = 1000;
const BATCH_BYTES_MAX: u32 = 4 << 20;
/// Free segments that are kept ready.
pub const FREE_WANTED: usize = 4;

/// Who may use how much of the last segment while no other is free.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Class {
    /// Block data: leaves the reserve alone.
    Data,
    /// Records of a few bytes: may use most of the reserve.
    Small,
    /// Flush marks: may use all of it.
    Flush,
}

/// One live log file.
pub struct Segment {
    /// Position in the log's life; shards' runs name it.
    pub sequence: u32,
    /// Number in the file's name.
    pub slot: u32,
    pub file: FileRef,
    pub first_lsn: u64,
    /// `first_lsn - 1` while it is empty.
    pub last_lsn: u64,
    /// Where the next batch goes.
    pub end: u32,
}

enum Piece {
    Header { start: usize, end: usize },
    Payload(Bytes),
}

/// Records that are not written yet.
#[derive(Default)]
struct Batch {
    headers: Vec<u8>,
    pieces: Vec<Piece>,
    bytes: u32,
}

/// Serialises syncs of the log and remembers the first failure: the kernel reports a lost write
/// only once, so a second sync that succeeds proves nothing.
#[derive(Default)]
pub struct SyncGate {
    failed: Mutex<Option<Errno>>,
}

impl SyncGate {
    /// Syncs the files; fails for ever after the first failure.
    pub fn sync(&self, files: &[FileRef]) -> DiskResult<()> {
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(errno) = *failed {
            return Err(errno);
        }
        files.iter().try_for_each(|file| file.sync_data()).inspect_err(|e| *failed = Some(*e))
    }
}

/// Where a record was staged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Staged {
    pub place: Place,
    pub lsn: u64,
}

/// The log of one store.
pub struct Log {
    pub gate: Arc<SyncGate>,
    segment_bytes: u32,
    segments_max: u32,
    seed: u32,
    instance: u64,
    live: VecDeque<Segment>,
    free: Vec<(u32, FileRef)>,
    next_lsn: u64,
    appended_lsn: u64,
    durable_lsn: u64,
    batch: Batch,
    /// There was no space for another segment.
    growth_failed: bool,
}

/// What `Log::new` starts from.
pub struct LogParameters {
    pub segment_bytes: u32,
    pub segments_max: u32,
    pub seed: u32,
    pub instance: u64,
    pub next_lsn: u64,
}

impl Log {
    /// A log whose records up to `next_lsn - 1` are durable and stand in `live`.
    pub fn new(p: &LogParameters, live: VecDeque<Segment>, free: Vec<(u32, FileRef)>) -> Log {
        let durable_lsn = p.next_lsn - 1;
        Log {
            gate: Arc::default(),
            segment_bytes: p.segment_bytes,
            segments_max: p.segments_max,
            seed: p.seed,
            instance: p.instance,
            live,
            free,
            next_lsn: p.next_lsn,
            appended_lsn: durable_lsn,
            durable_lsn,
            batch: Batch::default(),
            growth_failed: false,
        }
    }

    pub fn segment_bytes(&self) -> u32 {
        self.segment_bytes
    }

    pub fn next_lsn(&self) -> u64 {
        self.next_lsn
    }

    pub fn appended_lsn(&self) -> u64 {
        self.appended_lsn
    }

    pub fn durable_lsn(&self) -> u64 {
        self.durable_lsn
    }

    pub fn live(&self) -> &VecDeque<Segment> {
        &self.live
    }

    pub fn free_segments(&self) -> usize {
        self.free.len()
    }

    /// The most blocks that one record may hold.
    pub fn record_blocks_max(&self) -> u32 {
        (self.segment_bytes / 4 / PAGE_BYTES).clamp(1, 256)
    }

    /// Bytes at the end of the last segment that data may not use while none is free.
    fn reserve(&self, class: Class) -> u32 {
        let reserve = (self.segment_bytes / 8).clamp(4 * PAGE_BYTES, 1 << 20);
        match class {
            Class::Data => reserve,
            Class::Small => reserve / 4,
            Class::Flush => 0,
        }
    }

    fn position(&self) -> u32 {
        self.live.back().map_or(self.segment_bytes, |segment| segment.end + self.batch.bytes)
    }

    /// Whether a record of `bytes` goes into the current segment.
    pub fn fits(&self, bytes: usize, class: Class) -> bool {
        let reserve = if self.free.is_empty() { self.reserve(class) } else { 0 };
        self.position() as usize + bytes <= (self.segment_bytes - reserve) as usize
    }

    /// Whether `records` data records of together `bytes`, the longest of `longest`, find room,
    /// where each further segment starts with a head record of `head`. Errs on the safe side.
    pub fn has_room(&self, bytes: usize, records: usize, longest: usize, head: usize) -> bool {
        if records == 1 && self.fits(bytes, Class::Data) {
            return true;
        }
        let page = PAGE_BYTES as usize;
        let need = bytes + records * page;
        let usable = |whole: usize, used: usize| whole.saturating_sub(used + longest + page);
        let (segment, reserve) = (self.segment_bytes as usize, self.reserve(Class::Data) as usize);
        let current = if self.free.is_empty() { segment - reserve } else { segment };
        let mut room = usable(current, self.position() as usize);
        for index in 0..self.free.len() {
            let last = index + 1 == self.free.len();
            room += usable(if last { segment - reserve } else { segment }, head);
        }
        need <= room
    }

    /// The most bytes that `has_room` can ever grant with a head record of `head`, with a margin.
    pub fn request_bytes_max(&self) -> usize {
        self.segment_bytes as usize * (self.segments_max as usize).saturating_sub(2).max(1) / 4
    }

    /// Stages a record; there is room (`fits`). `extra` appends the variable part.
    pub fn stage(
        &mut self,
        mut header: Header,
        extra: impl FnOnce(&mut Vec<u8>),
        payload: impl Iterator<Item = Bytes>,
    ) -> Staged {
        let start = self.batch.headers.len();
        self.batch.headers.resize(start + HEADER_BYTES, 0);
        extra(&mut self.batch.headers);
        let end = self.batch.headers.len();
        self.batch.pieces.push(Piece::Header { start, end });
        header.extra_bytes = (end - start - HEADER_BYTES) as u32;
        header.payload_bytes = 0;
        for bytes in payload {
            header.payload_bytes += bytes.len() as u32;
            self.batch.pieces.push(Piece::Payload(bytes));
        }
        header.lsn = self.next_lsn;
        header.instance = self.instance;
        header.durable_lsn = self.durable_lsn;
        encode_header(&header, self.seed, &mut self.batch.headers[start..end]);
        let offset = self.position() + (end - start) as u32;
        self.batch.bytes += header.total_bytes() as u32;
        assert!(self.position() <= self.segment_bytes, "a record was staged without room");
        self.next_lsn += 1;
        let segment = self.live.back().map_or(0, |segment| segment.sequence);
        let place = Place::of_record(segment, offset, header.payload_bytes);
        Staged { place, lsn: header.lsn }
    }

    /// Whether the batch should be written before more is staged.
    pub fn batch_is_full(&self) -> bool {
        self.batch.pieces.len() >= BATCH_PIECES_MAX || self.batch.bytes >= BATCH_BYTES_MAX
    }

    /// Whether this place in the log is staged only.
    pub fn is_staged(&self, place: Place) -> bool {
        self.live.back().is_some_and(|s| s.sequence == place.segment && place.offset >= s.end)
    }

    /// Writes the batch: one call, whole pages. A failure ends the store.
    pub fn append(&mut self) -> DiskResult<()> {
        if self.batch.bytes == 0 {
            return Ok(());
        }
        let Some(segment) = self.live.back_mut() else { return Err(Errno::IO) };
        let padded = self.batch.bytes.next_multiple_of(PAGE_BYTES);
        let headers = &self.batch.headers;
        let mut slices = Vec::with_capacity(self.batch.pieces.len() + 1);
        slices.extend(self.batch.pieces.iter().map(|piece| match piece {
            Piece::Header { start, end } => IoSlice::new(&headers[*start..*end]),
            Piece::Payload(bytes) => IoSlice::new(bytes),
        }));
        slices.push(IoSlice::new(&PADDING[..(padded - self.batch.bytes) as usize]));
        segment.file.write_at(u64::from(segment.end), &mut slices)?;
        drop(slices);
        segment.end += padded;
        segment.last_lsn = self.next_lsn - 1;
        self.appended_lsn = self.next_lsn - 1;
        self.batch.headers.clear();
        self.batch.pieces.clear();
        self.batch.bytes = 0;
        Ok(())
    }

    /// Goes on in a free segment, whose first record must be a head record. The batch is written.
    pub fn roll(&mut self) {
        assert_eq!(self.batch.bytes, 0, "a batch lies in one segment");
        assert!(!self.free.is_empty(), "the caller saw a free segment");
        let (slot, file) = self.free.swap_remove(0);
        let sequence = self.live.back().map_or(1, |segment| segment.sequence + 1);
        let (first_lsn, last_lsn) = (self.next_lsn, self.next_lsn - 1);
        self.live.push_back(Segment { sequence, slot, file, first_lsn, last_lsn, end: 0 });
    }

    /// Where the next record's batch would go; every earlier record is at a lower place.
    pub fn end(&self) -> Place {
        assert_eq!(self.batch.bytes, 0, "the end of what is appended");
        let last = self.live.back();
        last.map_or(Place::default(), |s| Place { segment: s.sequence, offset: s.end })
    }

    /// The live segment of that sequence number.
    pub fn segment(&self, sequence: u32) -> &Segment {
        let first = self.live.front().map_or(0, |segment| segment.sequence);
        &self.live[(sequence - first) as usize]
    }

    /// Files with records that are not known to be durable.
    pub fn unsynced(&self) -> Vec<FileRef> {
        let behind = |segment: &&Segment| {
            segment.last_lsn > self.durable_lsn && segment.last_lsn >= segment.first_lsn
        };
        self.live.iter().filter(behind).map(|segment| Arc::clone(&segment.file)).collect()
    }

    /// Everything up to `lsn` was synced.
    pub fn synced(&mut self, lsn: u64) {
        assert!(lsn <= self.appended_lsn, "only what was appended can have been synced");
        self.durable_lsn = self.durable_lsn.max(lsn);
    }

    /// Segments up to `sequence` are no longer needed, durably: they may be written to again.
    pub fn retire(&mut self, sequence: u32) {
        while let Some(segment) = self.live.front()
            && segment.sequence <= sequence
        {
            assert!(segment.last_lsn <= self.durable_lsn && self.live.len() > 1);
            if let Some(segment) = self.live.pop_front() {
                self.free.push((segment.slot, segment.file));
            }
        }
    }

    /// Segments that no longer take records.
    pub fn sealed(&self) -> usize {
        self.live.len().saturating_sub(1)
    }

    /// Sealed segments are plenty, or there is no other way to get a free one: a checkpoint is due.
    pub fn wants_checkpoint(&self) -> bool {
        let grows = self.wants_growth();
        self.sealed() as u32 >= (self.segments_max * 3 / 4).max(1)
            || self.free.is_empty() && self.sealed() > 0 && !grows
    }

    /// Half of it or more takes no records any more.
    pub fn is_half_full(&self) -> bool {
        self.sealed() > 0 && self.sealed() as u32 * 2 >= self.segments_max
    }

    /// Whether files should be created, and there was space when that was last tried. Where there was
    /// none it is tried again beside whatever else a checkpoint does, not for its own sake; but a log
    /// of one segment has no other way.
    pub fn wants_growth(&self) -> bool {
        let tries = !self.growth_failed || self.live.len() + self.free.len() < 2;
        tries && !self.slots_wanted().is_empty()
    }

    /// Numbers of files to create: more free segments are wanted, and allowed.
    pub fn slots_wanted(&self) -> Vec<u32> {
        let used = self.live.len() + self.free.len();
        let allowed = (self.segments_max as usize).saturating_sub(used);
        let wanted = FREE_WANTED.saturating_sub(self.free.len()).min(allowed);
        let taken = |slot: &u32| {
            self.live.iter().any(|s| s.slot == *slot) || self.free.iter().any(|(s, _)| s == slot)
        };
        (0..).filter(|slot| !taken(slot)).take(wanted).collect()
    }

    /// A job has created these files; `all`: as many as were wanted.
    pub fn grow(&mut self, created: Vec<(u32, FileRef)>, all: bool) {
        self.free.extend(created);
        self.growth_failed = !all;
    }

    /// Bytes of live segments.
    pub fn live_bytes(&self) -> u64 {
        self.live.iter().map(|segment| u64::from(segment.end)).sum()
    }
}

/// Name of a segment's file.
pub fn segment_path(slot: u32) -> String {
    format!("log/{slot:04}")
}

/// Creates a segment's file with its space reserved, so that a write to it never finds the disk full.
/// Durable when it returns. The file has its length last: what an interruption left is told by that.
///
/// What a failure left is removed: without room for a whole segment it would take all that is left, and
/// keep it from whoever else has the file system.
pub fn create_segment(disk: &dyn Disk, slot: u32, segment_bytes: u32) -> DiskResult<FileRef> {
    let path = segment_path(slot);
    let file = disk.create(&path)?;
    reserve_segment(disk, &*file, segment_bytes).inspect_err(|_| {
        // Whether that works or not, the first failure is told.
        let _ = file.set_len(0);
        let _ = disk.unlink(&path);
    })?;
    Ok(file)
}

fn reserve_segment(disk: &dyn Disk, file: &dyn DiskFile, segment_bytes: u32) -> DiskResult<()> {
    file.set_len(0)?;
    file.allocate(0, u64::from(segment_bytes))?;
    if file.allocated_bytes()? < u64::from(segment_bytes) {
        write_zeros(file, segment_bytes)?;
    }
    file.set_len(u64::from(segment_bytes))?;
    file.sync_data()?;
    disk.sync_dir("log")
}

/// Reserves space where the file system cannot do it by itself.
fn write_zeros(file: &dyn DiskFile, length: u32) -> DiskResult<()> {
    const CHUNK: usize = 1 << 20;
    let zeros = vec![0u8; CHUNK.min(length as usize)];
    let mut offset = 0;
    while offset < length {
        let piece = zeros.len().min((length - offset) as usize);
        file.write_at(u64::from(offset), &mut [IoSlice::new(&zeros[..piece])])?;
        offset += piece as u32;
    }
    Ok(())
}
