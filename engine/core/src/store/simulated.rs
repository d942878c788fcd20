//! A disk in memory that keeps, over a power cut, what was synced and nothing else for sure.
//!
//! Everything not synced survives or not by the seed: each 512-byte sector of a write, each punch
//! and each change of length on its own, each name until its folder was synced. Every operation
//! that changes something is a counted step; the power can be cut, or the process killed, at any of
//! them. The same calls with the same seeds give the same disk.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::BytesMut;

use super::disk::{Disk, DiskFile, DiskResult, Errno, FileRef, LockGuard};

mod state;

use state::{Change, Inode, NameChange, PAGE, State, folder_of};
pub use state::{Crash, Seeded};

/// The simulated disk. Cheap to share; all handles see the same disk.
#[derive(Clone, Default)]
pub struct SimDisk {
    state: Arc<Mutex<State>>,
}

/// The disk as one run of a process sees it.
struct SimRun {
    disk: SimDisk,
    run: u64,
}

struct SimFile {
    disk: SimDisk,
    run: u64,
    inode: u64,
}

struct SimLock {
    disk: SimDisk,
    run: u64,
    path: String,
}

impl SimDisk {
    pub fn new() -> SimDisk {
        SimDisk::default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The disk for one run of a process: dead after the next crash.
    pub fn run(&self) -> Arc<dyn Disk> {
        Arc::new(SimRun { disk: self.clone(), run: self.state().run })
    }

    /// Steps done so far.
    pub fn steps(&self) -> u64 {
        self.state().steps
    }

    /// From that step on nothing works any more, until `power_cut` or `kill`.
    pub fn crash_at(&self, step: u64, crash: Crash) {
        self.state().crash_at = Some((step, crash));
    }

    /// Whether the step of `crash_at` was reached.
    pub fn has_crashed(&self) -> bool {
        self.state().crashed
    }

    /// The power goes: only what was synced is sure to be there afterwards.
    pub fn power_cut(&self, seed: u64) {
        let mut random = Seeded::new(seed);
        let state = &mut *self.state();
        let keep = [0, 20, 50, 80, 100][random.below(5) as usize];
        for change in std::mem::take(&mut state.unsynced_names) {
            if random.chance(keep) {
                state.durable_names.apply(&change);
            }
        }
        let State { durable_names, inodes, .. } = state;
        let folders = durable_names.folders.clone();
        let rooted = |path: &str| {
            let mut folder = folder_of(path);
            while !folder.is_empty() && folders.contains(folder) {
                folder = folder_of(folder);
            }
            folder.is_empty()
        };
        durable_names.files.retain(|path, _| rooted(path));
        durable_names.folders.retain(|path| rooted(path));
        let mut numbers: Vec<u64> = inodes.keys().copied().collect();
        numbers.sort_unstable();
        for number in numbers {
            if let Some(inode) = inodes.get_mut(&number) {
                inode.power_cut(&mut random);
            }
        }
        state.names = state.durable_names.clone();
        state.restart();
    }

    /// The process dies: everything that it wrote is still there, but not durable for that.
    pub fn kill(&self) {
        self.state().restart();
    }

    /// Inverts the byte at `offset` of a file, durably. Gives false where there is no such byte.
    pub fn corrupt(&self, path: &str, offset: u64) -> bool {
        let state = &mut *self.state();
        let Some(inode) = state.names.files.get(path).and_then(|i| state.inodes.get_mut(i)) else {
            return false;
        };
        if offset >= inode.cached.length {
            return false;
        }
        for content in [&mut inode.cached, &mut inode.durable] {
            let mut byte = BytesMut::new();
            content.read(offset, 1, &mut byte);
            let flipped = !byte.first().copied().unwrap_or(0);
            content.write(offset, &[flipped]);
        }
        true
    }

    /// Reads that touch the page at `offset` of a file fail with EIO from now on.
    pub fn break_page(&self, path: &str, offset: u64) {
        let state = &mut *self.state();
        if let Some(inode) = state.names.files.get(path) {
            state.bad_sectors.insert((*inode, offset / PAGE));
        }
    }

    /// The sync after `count` more ones, and it alone, fails and forgets what was not durable.
    pub fn fail_sync(&self, count: u64, errno: Errno) {
        self.state().failing_syncs = Some((count, errno));
    }

    /// No sync fails any more.
    #[cfg(test)]
    pub fn fail_no_sync(&self) {
        self.state().failing_syncs = None;
    }

    /// Sets the capacity; writes that would take more fail with ENOSPC.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.state().capacity_bytes = bytes;
    }

    /// Bytes in use.
    pub fn allocated_bytes(&self) -> u64 {
        self.state().allocated_bytes
    }

    /// Paths of all files, in order.
    pub fn paths(&self) -> Vec<String> {
        self.state().names.files.keys().cloned().collect()
    }

    /// A disk with the same content, on its own from now on.
    pub fn fork(&self) -> SimDisk {
        let state = self.state();
        let copy = State {
            inodes: state.inodes.clone(),
            next_inode: state.next_inode,
            names: state.names.clone(),
            durable_names: state.durable_names.clone(),
            unsynced_names: state.unsynced_names.clone(),
            allocated_bytes: state.allocated_bytes,
            capacity_bytes: state.capacity_bytes,
            bad_sectors: state.bad_sectors.clone(),
            run: state.run + 1,
            ..State::default()
        };
        SimDisk { state: Arc::new(Mutex::new(copy)) }
    }
}

impl DiskFile for SimFile {
    fn read_into(&self, offset: u64, room: &mut [MaybeUninit<u8>]) -> DiskResult<usize> {
        let state = &mut *self.disk.state();
        state.alive(self.run)?;
        let length = room.len();
        let pages =
            (self.inode, offset / PAGE)..(self.inode, (offset + length as u64).div_ceil(PAGE));
        if length > 0 && state.bad_sectors.range(pages).next().is_some() {
            return Err(Errno::IO);
        }
        let mut content = BytesMut::with_capacity(length);
        let count = state.inode(self.inode)?.cached.read(offset, length, &mut content);
        for (to, from) in room.iter_mut().zip(content) {
            to.write(from);
        }
        Ok(count)
    }

    fn write_at(&self, offset: u64, slices: &mut [IoSlice<'_>]) -> DiskResult<()> {
        let bytes: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
        self.disk.state().change(self.run, self.inode, Change::Write(offset, bytes))
    }

    fn sync_data(&self) -> DiskResult<()> {
        let state = &mut *self.disk.state();
        if !state.step(self.run)? {
            return Err(Errno::IO);
        }
        if let Some((count, errno)) = state.failing_syncs {
            if count == 0 {
                state.failing_syncs = None;
                // The kernel counts the pages as clean from now on: a retry would lie.
                let inode = state.inode(self.inode)?;
                inode.unsynced.clear();
                inode.failed = true;
                return Err(errno);
            }
            state.failing_syncs = Some((count - 1, errno));
        }
        state.inode(self.inode)?.sync();
        Ok(())
    }

    fn punch_hole(&self, offset: u64, length: u64) -> DiskResult<()> {
        self.disk.state().change(self.run, self.inode, Change::Punch(offset, length))
    }

    fn allocate(&self, offset: u64, length: u64) -> DiskResult<()> {
        let state = &mut *self.disk.state();
        state.alive(self.run)?;
        let node = state.inode(self.inode)?;
        let pages = (offset / PAGE)..(offset + length).div_ceil(PAGE);
        let missing: Vec<u64> = pages.filter(|p| !node.cached.pages.contains_key(p)).collect();
        let end = node.cached.length;
        for page in missing {
            let zeros = vec![0; PAGE as usize];
            state.change(self.run, self.inode, Change::Write(page * PAGE, zeros))?;
        }
        let node = state.inode(self.inode)?;
        if node.cached.length > end {
            node.cached.length = end;
            node.unsynced.push(Change::SetLen(end));
        }
        Ok(())
    }

    fn set_len(&self, length: u64) -> DiskResult<()> {
        self.disk.state().change(self.run, self.inode, Change::SetLen(length))
    }

    fn length(&self) -> DiskResult<u64> {
        let state = &mut *self.disk.state();
        state.alive(self.run)?;
        Ok(state.inode(self.inode)?.cached.length)
    }

    fn allocated_bytes(&self) -> DiskResult<u64> {
        let state = &mut *self.disk.state();
        state.alive(self.run)?;
        Ok(state.inode(self.inode)?.cached.pages.len() as u64 * PAGE)
    }
}

impl SimRun {
    fn file(&self, inode: u64) -> FileRef {
        Arc::new(SimFile { disk: self.disk.clone(), run: self.run, inode })
    }
}

impl Disk for SimRun {
    fn open(&self, path: &str) -> DiskResult<FileRef> {
        let state = self.disk.state();
        state.alive(self.run)?;
        let inode = *state.names.files.get(path).ok_or(Errno::NOENT)?;
        Ok(self.file(inode))
    }

    fn create(&self, path: &str) -> DiskResult<FileRef> {
        let state = &mut *self.disk.state();
        state.alive(self.run)?;
        if let Some(inode) = state.names.files.get(path) {
            return Ok(self.file(*inode));
        }
        if !state.names.has_folder(folder_of(path)) {
            return Err(Errno::NOENT);
        }
        let inode = state.next_inode;
        state.next_inode += 1;
        state.inodes.insert(inode, Inode::default());
        state.change_name(self.run, NameChange::Link(path.to_owned(), inode))?;
        Ok(self.file(inode))
    }

    fn list(&self, folder: &str) -> DiskResult<Vec<String>> {
        let state = self.disk.state();
        state.alive(self.run)?;
        let inside = |path: &&String| folder_of(path) == folder && !path.is_empty();
        let files = state.names.files.keys().filter(inside);
        let folders = state.names.folders.iter().filter(inside);
        let name = |path: &String| path.rsplit('/').next().unwrap_or_default().to_owned();
        Ok(files.chain(folders).map(name).collect())
    }

    fn rename(&self, from: &str, to: &str) -> DiskResult<()> {
        assert_eq!(folder_of(from), folder_of(to), "renames stay within one folder");
        let state = &mut *self.disk.state();
        if !state.names.files.contains_key(from) {
            return Err(Errno::NOENT);
        }
        state.change_name(self.run, NameChange::Rename(from.to_owned(), to.to_owned()))
    }

    fn unlink(&self, path: &str) -> DiskResult<()> {
        let state = &mut *self.disk.state();
        if state.names.folders.contains(path) {
            return Err(Errno::ISDIR);
        }
        if !state.names.files.contains_key(path) {
            return state.alive(self.run);
        }
        state.change_name(self.run, NameChange::Unlink(path.to_owned()))
    }

    fn create_dir(&self, path: &str) -> DiskResult<()> {
        let state = &mut *self.disk.state();
        if state.names.folders.contains(path) {
            return state.alive(self.run);
        }
        if !state.names.has_folder(folder_of(path)) {
            return Err(Errno::NOENT);
        }
        state.change_name(self.run, NameChange::MakeFolder(path.to_owned()))
    }

    fn remove_dir(&self, path: &str) -> DiskResult<()> {
        if !self.list(path)?.is_empty() {
            return Err(Errno::NOTEMPTY);
        }
        let state = &mut *self.disk.state();
        if !state.names.folders.contains(path) {
            return state.alive(self.run);
        }
        state.change_name(self.run, NameChange::RemoveFolder(path.to_owned()))
    }

    fn sync_dir(&self, folder: &str) -> DiskResult<()> {
        let state = &mut *self.disk.state();
        if !state.step(self.run)? {
            return Err(Errno::IO);
        }
        state.sync_names(folder);
        Ok(())
    }

    fn space(&self) -> DiskResult<(u64, u64)> {
        let state = self.disk.state();
        state.alive(self.run)?;
        let capacity = state.capacity_bytes.unwrap_or(1 << 40);
        Ok((capacity, capacity.saturating_sub(state.allocated_bytes)))
    }

    fn lock(&self, path: &str) -> DiskResult<LockGuard> {
        let state = &mut *self.disk.state();
        state.alive(self.run)?;
        if !state.locked.insert(path.to_owned()) {
            return Err(Errno::WOULDBLOCK);
        }
        Ok(Box::new(SimLock { disk: self.disk.clone(), run: self.run, path: path.to_owned() }))
    }
}

impl Drop for SimLock {
    fn drop(&mut self) {
        let mut state = self.disk.state();
        if state.run == self.run {
            state.locked.remove(&self.path);
        }
    }
}
