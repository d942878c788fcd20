//! The little that the store asks of a file system, so that tests can run it on a disk that loses,
//! tears, reorders and corrupts what was not synced.
//!
//! The store relies on one promise only: what `sync_data` or `sync_dir` answered is durable. Paths
//! are relative to the store's folder, `/` between components. Errors are the system's errno,
//! unchanged.

use std::any::Any;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::sync::Arc;

use bytes::BytesMut;
pub use rustix::io::Errno;

/// What a disk operation gives.
pub type DiskResult<T> = Result<T, Errno>;
/// An open file, shared between the store and its jobs.
pub type FileRef = Arc<dyn DiskFile>;
/// Whoever holds it holds the lock of a file; dropping it lets go.
pub type LockGuard = Box<dyn Any + Send + Sync>;

/// One open file.
pub trait DiskFile: Send + Sync {
    /// Appends up to `length` bytes from `offset` on to `out`; fewer only at the file's end.
    fn read_at(&self, offset: u64, length: usize, out: &mut BytesMut) -> DiskResult<usize> {
        out.reserve(length);
        let count = self.read_into(offset, &mut out.spare_capacity_mut()[..length])?;
        // SAFETY: `read_into` initialised the first `count` bytes of the spare capacity.
        unsafe { out.set_len(out.len() + count) };
        Ok(count)
    }
    /// Fills the front of `room` from `offset` on, and says how many bytes; fewer than there is room
    /// for only at the file's end.
    fn read_into(&self, offset: u64, room: &mut [MaybeUninit<u8>]) -> DiskResult<usize>;
    /// The first place from `offset` on, which lies in the file, that may hold anything but zeros; the
    /// file's length where there is none. A hint: `offset` itself is never wrong.
    fn next_data(&self, offset: u64) -> DiskResult<u64> {
        Ok(offset)
    }
    /// Whether the kernel may read beyond what is asked for, as it usually does: a hint.
    fn allow_read_ahead(&self, _allowed: bool) {}
    /// Has the next read of the range come from the device, where the kernel can do that: a hint.
    fn forget_cached(&self, _offset: u64, _length: u64) {}
    /// Writes all slices one after the other, beginning at `offset`. The slices may be consumed.
    fn write_at(&self, offset: u64, slices: &mut [IoSlice<'_>]) -> DiskResult<()>;
    /// Makes everything written, punched and allocated before the call durable (not the file's
    /// name).
    fn sync_data(&self) -> DiskResult<()>;
    /// Has the kernel begin to write the range to the device, where it can do that, so that a sync finds
    /// less to do: a hint. May block where the device has more to do than it queues.
    fn begin_writing(&self, _offset: u64, _length: u64) {}
    /// Frees the range, which then reads as zeros. The file's length stays.
    fn punch_hole(&self, offset: u64, length: u64) -> DiskResult<()>;
    /// Reserves space for the range; what it reads as stays.
    fn allocate(&self, offset: u64, length: u64) -> DiskResult<()>;
    /// Cuts the file or extends it with zeros.
    fn set_len(&self, length: u64) -> DiskResult<()>;
    /// Length in bytes.
    fn length(&self) -> DiskResult<u64>;
    /// Space taken on the disk, in bytes.
    fn allocated_bytes(&self) -> DiskResult<u64>;
}

/// A folder of a file system.
pub trait Disk: Send + Sync {
    /// Opens an existing file for reading and writing; `Errno::NOENT` where there is none.
    fn open(&self, path: &str) -> DiskResult<FileRef>;
    /// Opens the file, creating it empty where there is none. The name is durable after `sync_dir`.
    fn create(&self, path: &str) -> DiskResult<FileRef>;
    /// Names in a folder, in no order; empty where the folder does not exist.
    fn list(&self, folder: &str) -> DiskResult<Vec<String>>;
    /// Renames within one folder, replacing the target.
    fn rename(&self, from: &str, to: &str) -> DiskResult<()>;
    /// Removes a file's name; one that is not there is no error.
    fn unlink(&self, path: &str) -> DiskResult<()>;
    /// Creates one folder; one that exists is no error.
    fn create_dir(&self, path: &str) -> DiskResult<()>;
    /// Removes an empty folder; one that is not there is no error.
    fn remove_dir(&self, path: &str) -> DiskResult<()>;
    /// Makes the names in a folder durable.
    fn sync_dir(&self, folder: &str) -> DiskResult<()>;
    /// Makes the data of several files durable, in whatever way is cheapest.
    fn sync_files(&self, files: &[FileRef]) -> DiskResult<()> {
        files.iter().try_for_each(|file| file.sync_data())
    }
    /// (capacity, free) of the file system, in bytes.
    fn space(&self) -> DiskResult<(u64, u64)>;
    /// Locks the file against every other process and store; `Errno::WOULDBLOCK` where it is taken.
    fn lock(&self, path: &str) -> DiskResult<LockGuard>;
}
