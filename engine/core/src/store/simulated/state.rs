//! What the simulated disk holds: cached and durable content, names, and what is between the two.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use bytes::BytesMut;

use crate::store::disk::{DiskResult, Errno};

pub(super) const PAGE: u64 = 4096;
pub(super) const SECTOR: usize = 512;
pub(super) type Page = Arc<[u8; PAGE as usize]>;

/// A seeded sequence of numbers (SplitMix64).
#[derive(Clone, Debug)]
pub struct Seeded(u64);

impl Seeded {
    pub fn new(seed: u64) -> Seeded {
        Seeded(seed)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.number() % bound.max(1)
    }

    /// True in `percent` of all cases.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// Bytes with holes.
#[derive(Clone, Default)]
pub(super) struct Content {
    pub(super) pages: BTreeMap<u64, Page>,
    pub(super) length: u64,
}

impl Content {
    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) {
        let (mut at, mut rest) = (offset, bytes);
        while !rest.is_empty() {
            let within = (at % PAGE) as usize;
            let count = rest.len().min(PAGE as usize - within);
            let page = self.pages.entry(at / PAGE).or_insert_with(|| Arc::new([0; PAGE as usize]));
            Arc::make_mut(page)[within..within + count].copy_from_slice(&rest[..count]);
            (at, rest) = (at + count as u64, &rest[count..]);
        }
        self.length = self.length.max(offset + bytes.len() as u64);
    }

    pub(super) fn read(&self, offset: u64, length: usize, out: &mut BytesMut) -> usize {
        let length = length.min(self.length.saturating_sub(offset) as usize);
        let mut at = offset;
        while at < offset + length as u64 {
            let within = (at % PAGE) as usize;
            let count = (PAGE as usize - within).min((offset + length as u64 - at) as usize);
            match self.pages.get(&(at / PAGE)) {
                Some(page) => out.extend_from_slice(&page[within..within + count]),
                None => out.resize(out.len() + count, 0),
            }
            at += count as u64;
        }
        length
    }

    pub(super) fn punch(&mut self, offset: u64, length: u64) {
        let (mut at, end) = (offset, offset + length);
        while at < end {
            let count = (PAGE - at % PAGE).min(end - at);
            if count == PAGE {
                self.pages.remove(&(at / PAGE));
            } else if let Some(page) = self.pages.get_mut(&(at / PAGE)) {
                let within = (at % PAGE) as usize;
                Arc::make_mut(page)[within..within + count as usize].fill(0);
            }
            at += count;
        }
    }

    pub(super) fn set_len(&mut self, length: u64) {
        if length < self.length {
            let end = self.length.next_multiple_of(PAGE);
            self.punch(length, end - length);
        }
        self.length = length;
    }

    pub(super) fn apply(&mut self, change: &Change) {
        match change {
            Change::Write(offset, bytes) => self.write(*offset, bytes),
            Change::Punch(offset, length) => self.punch(*offset, *length),
            Change::SetLen(length) => self.set_len(*length),
        }
    }
}

/// A change of a file that is not synced.
#[derive(Clone)]
pub(super) enum Change {
    Write(u64, Vec<u8>),
    Punch(u64, u64),
    SetLen(u64),
}

#[derive(Clone, Default)]
pub(super) struct Inode {
    pub(super) cached: Content,
    pub(super) durable: Content,
    pub(super) unsynced: Vec<Change>,
    /// A sync failed: what it lost is read until the process ends, and no longer.
    pub(super) failed: bool,
}

impl Inode {
    pub(super) fn sync(&mut self) {
        for change in std::mem::take(&mut self.unsynced) {
            self.durable.apply(&change);
        }
    }

    /// Keeps a random part of what was not synced.
    pub(super) fn power_cut(&mut self, random: &mut Seeded) {
        let keep = [0, 15, 50, 85, 100][random.below(5) as usize];
        for change in std::mem::take(&mut self.unsynced) {
            match change {
                Change::Write(offset, bytes) => self.tear(offset, &bytes, keep, random),
                other if random.chance(keep) => self.durable.apply(&other),
                _ => {}
            }
        }
        self.cached = self.durable.clone();
    }

    pub(super) fn tear(&mut self, offset: u64, bytes: &[u8], keep: u64, random: &mut Seeded) {
        let grows = random.chance(keep);
        let length = self.durable.length;
        let mut start = 0;
        while start < bytes.len() {
            let within = (offset as usize + start) % SECTOR;
            let end = (start + SECTOR - within).min(bytes.len());
            if random.chance(keep) {
                self.durable.write(offset + start as u64, &bytes[start..end]);
            }
            start = end;
        }
        // Data past the end is there only if the new length is too.
        self.durable.set_len(if grows { length.max(offset + bytes.len() as u64) } else { length });
    }
}

/// A change of names that is not synced, with the folder that it belongs to.
#[derive(Clone)]
pub(super) enum NameChange {
    Link(String, u64),
    Unlink(String),
    Rename(String, String),
    MakeFolder(String),
    RemoveFolder(String),
}

impl NameChange {
    pub(super) fn folder(&self) -> &str {
        match self {
            NameChange::Link(path, _)
            | NameChange::Unlink(path)
            | NameChange::Rename(_, path)
            | NameChange::MakeFolder(path)
            | NameChange::RemoveFolder(path) => folder_of(path),
        }
    }
}

#[derive(Clone, Default)]
pub(super) struct Names {
    pub(super) files: BTreeMap<String, u64>,
    pub(super) folders: BTreeSet<String>,
}

impl Names {
    pub(super) fn apply(&mut self, change: &NameChange) {
        match change {
            NameChange::Link(path, inode) => {
                self.files.insert(path.clone(), *inode);
            }
            NameChange::Unlink(path) => {
                self.files.remove(path);
            }
            NameChange::Rename(from, to) => {
                if let Some(inode) = self.files.remove(from) {
                    self.files.insert(to.clone(), inode);
                }
            }
            NameChange::MakeFolder(path) => {
                self.folders.insert(path.clone());
            }
            NameChange::RemoveFolder(path) => {
                self.folders.remove(path);
            }
        }
    }

    pub(super) fn has_folder(&self, path: &str) -> bool {
        path.is_empty() || self.folders.contains(path)
    }
}

pub(super) fn folder_of(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(folder, _)| folder)
}

/// What goes wrong at a step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Crash {
    /// The step is under way when the power goes: it may survive in part.
    PowerCut,
    /// The process is killed before the step's call.
    Kill,
}

#[derive(Default)]
pub(super) struct State {
    pub(super) inodes: HashMap<u64, Inode>,
    pub(super) next_inode: u64,
    pub(super) names: Names,
    pub(super) durable_names: Names,
    pub(super) unsynced_names: Vec<NameChange>,
    pub(super) locked: BTreeSet<String>,
    /// Raised by every crash; what was opened before it is dead.
    pub(super) run: u64,
    pub(super) steps: u64,
    pub(super) crash_at: Option<(u64, Crash)>,
    pub(super) crashed: bool,
    pub(super) capacity_bytes: Option<u64>,
    pub(super) allocated_bytes: u64,
    pub(super) failing_syncs: Option<(u64, Errno)>,
    pub(super) bad_sectors: BTreeSet<(u64, u64)>,
}

impl State {
    /// Counts a step. Gives whether it is to be done, or the error that stands for the crash;
    /// `Ok(false)`: do it, then fail.
    pub(super) fn step(&mut self, run: u64) -> DiskResult<bool> {
        self.alive(run)?;
        self.steps += 1;
        match self.crash_at {
            Some((step, crash)) if self.steps >= step => {
                self.crashed = true;
                if crash == Crash::Kill { Err(Errno::IO) } else { Ok(false) }
            }
            _ => Ok(true),
        }
    }

    pub(super) fn alive(&self, run: u64) -> DiskResult<()> {
        if self.crashed || run != self.run { Err(Errno::IO) } else { Ok(()) }
    }

    pub(super) fn inode(&mut self, inode: u64) -> DiskResult<&mut Inode> {
        self.inodes.get_mut(&inode).ok_or(Errno::IO)
    }

    pub(super) fn change(&mut self, run: u64, inode: u64, change: Change) -> DiskResult<()> {
        let goes_on = self.step(run)?;
        let capacity = self.capacity_bytes;
        let others = self.allocated_bytes;
        let node = self.inode(inode)?;
        let before = node.cached.pages.len() as u64 * PAGE;
        let undo = capacity.map(|_| node.cached.clone());
        node.cached.apply(&change);
        let allocated = others - before + node.cached.pages.len() as u64 * PAGE;
        if let (Some(capacity), Some(undo)) = (capacity, undo)
            && allocated > capacity
            && allocated > others
        {
            node.cached = undo;
            return Err(Errno::NOSPC);
        }
        node.unsynced.push(change);
        self.allocated_bytes = allocated;
        if goes_on { Ok(()) } else { Err(Errno::IO) }
    }

    pub(super) fn change_name(&mut self, run: u64, change: NameChange) -> DiskResult<()> {
        let goes_on = self.step(run)?;
        self.names.apply(&change);
        self.unsynced_names.push(change);
        if goes_on { Ok(()) } else { Err(Errno::IO) }
    }

    pub(super) fn sync_names(&mut self, folder: &str) {
        let all = std::mem::take(&mut self.unsynced_names);
        for change in all {
            if change.folder() == folder {
                self.durable_names.apply(&change);
            } else {
                self.unsynced_names.push(change);
            }
        }
    }

    pub(super) fn restart(&mut self) {
        self.run += 1;
        self.crashed = false;
        self.crash_at = None;
        self.locked.clear();
        for inode in self.inodes.values_mut().filter(|inode| inode.failed) {
            inode.failed = false;
            inode.unsynced.clear();
            inode.cached = inode.durable.clone();
        }
        let live: BTreeSet<u64> = self.names.files.values().copied().collect();
        let durable: BTreeSet<u64> = self.durable_names.files.values().copied().collect();
        self.inodes.retain(|inode, _| live.contains(inode) || durable.contains(inode));
        let pages = self.inodes.values().map(|inode| inode.cached.pages.len() as u64);
        self.allocated_bytes = pages.sum::<u64>() * PAGE;
    }
}
