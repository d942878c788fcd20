//! A folder of the real file system, through `rustix`.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::num::NonZeroU64;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{
    Advice, AtFlags, CWD, Dir, FallocateFlags, FlockOperation, Mode, OFlags, SeekFrom, fadvise,
    fallocate, fdatasync, flock, fstat, fstatvfs, fsync, ftruncate, mkdirat, openat, renameat,
    seek, unlinkat,
};
use rustix::io::{Errno, pread, pwritev};

use super::disk::{Disk, DiskFile, DiskResult, FileRef, LockGuard};

/// Linux takes at most this many slices in one call (IOV_MAX).
const SLICES_MAX: usize = 1024;

/// One open file of a `RealDisk`.
pub struct RealFile {
    fd: OwnedFd,
}

impl DiskFile for RealFile {
    fn read_into(&self, offset: u64, room: &mut [MaybeUninit<u8>]) -> DiskResult<usize> {
        let mut done = 0;
        while done < room.len() {
            let count = match pread(&self.fd, &mut room[done..], offset + done as u64) {
                Ok((filled, _)) => filled.len(),
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno),
            };
            if count == 0 {
                break;
            }
            done += count;
        }
        Ok(done)
    }

    fn next_data(&self, offset: u64) -> DiskResult<u64> {
        match seek(&self.fd, SeekFrom::Data(offset)) {
            Err(Errno::NXIO) => self.length(),
            // A file system that does not know.
            Err(_) => Ok(offset),
            other => other,
        }
    }

    fn write_at(&self, offset: u64, slices: &mut [IoSlice<'_>]) -> DiskResult<()> {
        let (mut rest, mut offset) = (slices, offset);
        IoSlice::advance_slices(&mut rest, 0);
        while !rest.is_empty() {
            let count = match pwritev(&self.fd, &rest[..rest.len().min(SLICES_MAX)], offset) {
                Ok(0) => return Err(Errno::IO),
                Ok(count) => count,
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno),
            };
            offset += count as u64;
            IoSlice::advance_slices(&mut rest, count);
        }
        Ok(())
    }

    fn sync_data(&self) -> DiskResult<()> {
        fdatasync(&self.fd)
    }

    fn begin_writing(&self, offset: u64, length: u64) {
        let fd = self.fd.as_raw_fd();
        let (offset, length) = (offset as libc::off64_t, length as libc::off64_t);
        // SAFETY: no memory is handed over, and the descriptor is open for as long as `self` lives.
        // Whether that works or not: durable is what a later sync answers.
        let _ = unsafe { libc::sync_file_range(fd, offset, length, libc::SYNC_FILE_RANGE_WRITE) };
    }

    fn punch_hole(&self, offset: u64, length: u64) -> DiskResult<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.fd, flags, offset, length) {
            // A file system without holes keeps the space; what the blocks are is in the metadata.
            Err(Errno::OPNOTSUPP) => Ok(()),
            other => other,
        }
    }

    fn allocate(&self, offset: u64, length: u64) -> DiskResult<()> {
        match fallocate(&self.fd, FallocateFlags::KEEP_SIZE, offset, length) {
            Err(Errno::OPNOTSUPP) => Ok(()),
            other => other,
        }
    }

    fn set_len(&self, length: u64) -> DiskResult<()> {
        ftruncate(&self.fd, length)
    }

    fn length(&self) -> DiskResult<u64> {
        Ok(fstat(&self.fd)?.st_size as u64)
    }

    fn forget_cached(&self, offset: u64, length: u64) {
        // Where that fails the kernel's copy is read, which is no worse than any other read.
        let _ = fadvise(&self.fd, offset, NonZeroU64::new(length), Advice::DontNeed);
    }

    fn allow_read_ahead(&self, allowed: bool) {
        let _ = fadvise(&self.fd, 0, None, if allowed { Advice::Normal } else { Advice::Random });
    }

    fn allocated_bytes(&self) -> DiskResult<u64> {
        Ok(fstat(&self.fd)?.st_blocks as u64 * 512)
    }
}

/// A store's folder on a real file system.
pub struct RealDisk {
    root: OwnedFd,
}

impl RealDisk {
    /// Opens the folder, which must exist.
    pub fn open_dir(path: &Path) -> DiskResult<Arc<RealDisk>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Arc::new(RealDisk { root: openat(CWD, path, flags, Mode::empty())? }))
    }

    fn open_flags(&self, path: &str, flags: OFlags) -> DiskResult<OwnedFd> {
        openat(&self.root, path, flags | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR)
    }

    fn open_folder(&self, path: &str) -> DiskResult<OwnedFd> {
        let path = if path.is_empty() { "." } else { path };
        self.open_flags(path, OFlags::RDONLY | OFlags::DIRECTORY)
    }
}

impl Disk for RealDisk {
    fn open(&self, path: &str) -> DiskResult<FileRef> {
        Ok(Arc::new(RealFile { fd: self.open_flags(path, OFlags::RDWR)? }))
    }

    fn create(&self, path: &str) -> DiskResult<FileRef> {
        Ok(Arc::new(RealFile { fd: self.open_flags(path, OFlags::RDWR | OFlags::CREATE)? }))
    }

    fn list(&self, folder: &str) -> DiskResult<Vec<String>> {
        let fd = match self.open_folder(folder) {
            Err(Errno::NOENT) => return Ok(Vec::new()),
            other => other?,
        };
        let mut names = Vec::new();
        for entry in Dir::read_from(&fd)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy();
            if name != "." && name != ".." {
                names.push(name.into_owned());
            }
        }
        Ok(names)
    }

    fn rename(&self, from: &str, to: &str) -> DiskResult<()> {
        renameat(&self.root, from, &self.root, to)
    }

    fn unlink(&self, path: &str) -> DiskResult<()> {
        absent_is_fine(unlinkat(&self.root, path, AtFlags::empty()))
    }

    fn create_dir(&self, path: &str) -> DiskResult<()> {
        match mkdirat(&self.root, path, Mode::RWXU) {
            Err(Errno::EXIST) => Ok(()),
            other => other,
        }
    }

    fn remove_dir(&self, path: &str) -> DiskResult<()> {
        absent_is_fine(unlinkat(&self.root, path, AtFlags::REMOVEDIR))
    }

    fn sync_dir(&self, folder: &str) -> DiskResult<()> {
        fsync(self.open_folder(folder)?)
    }

    /// All of them are being written while the first is waited for. (`syncfs` would wait for whatever
    /// else the file system has to write, the newest part of the log first of all.)
    fn sync_files(&self, files: &[FileRef]) -> DiskResult<()> {
        files.iter().for_each(|file| file.begin_writing(0, 0));
        files.iter().try_for_each(|file| file.sync_data())
    }

    fn space(&self) -> DiskResult<(u64, u64)> {
        let stat = fstatvfs(&self.root)?;
        Ok((stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize))
    }

    fn lock(&self, path: &str) -> DiskResult<LockGuard> {
        let fd = self.open_flags(path, OFlags::RDWR | OFlags::CREATE)?;
        flock(&fd, FlockOperation::NonBlockingLockExclusive)?;
        Ok(Box::new(fd))
    }
}

fn absent_is_fine(result: DiskResult<()>) -> DiskResult<()> {
    match result {
        Err(Errno::NOENT) => Ok(()),
        other => other,
    }
}
