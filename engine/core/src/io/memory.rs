//! Memory that two processes of one host share, so that data goes from one to the other without a socket.
//!
//! Who asks makes the memory and hands it over with the connection's first frames ([`Slots`]); who answers
//! maps it ([`SharedMemory`]). The asker alone says which slot is whose: it gives one out with a request
//! and takes it back with the answer. Nobody trusts the other's word for the content: blocks carry
//! checksums, and both sides check them.

use bytes::Bytes;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::io;
use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

/// Most that a peer's memory may have.
const BYTES_MAX: usize = 256 << 20;

/// A mapping, for as long as it lives.
struct Mapping {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: a mapping is memory like any other; who may touch which part of it is up to its owners.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(fd: impl AsFd, length: usize, protection: ProtFlags) -> io::Result<Mapping> {
        // SAFETY: a fresh mapping at an address that the kernel chooses; its size is sealed, so that no
        // access within `length` can fail.
        let start =
            unsafe { mmap(std::ptr::null_mut(), length, protection, MapFlags::SHARED, fd, 0)? };
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Mapping { start, length })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length, and nobody has it any more.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.length) };
    }
}

/// A peer's memory: where it asked for it, its answers are put.
pub struct SharedMemory {
    mapping: Mapping,
}

impl SharedMemory {
    /// Maps what a peer has handed over.
    ///
    /// # Errors
    /// It could shrink under us (which would kill the process), is empty, or larger than 256 MiB.
    pub fn of_peer(fd: OwnedFd) -> io::Result<SharedMemory> {
        if !fcntl_get_seals(&fd)?.contains(SealFlags::SHRINK) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let length = usize::try_from(fstat(&fd)?.st_size).unwrap_or(usize::MAX);
        if length == 0 || length > BYTES_MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(SharedMemory { mapping: Mapping::new(&fd, length, ProtFlags::READ | ProtFlags::WRITE)? })
    }

    /// The room that a request names; none where it is not inside.
    pub fn room(&mut self, offset: u64, length: usize) -> Option<&mut [MaybeUninit<u8>]> {
        let offset = usize::try_from(offset).ok()?;
        if offset.checked_add(length)? > self.mapping.length {
            return None;
        }
        // SAFETY: inside the mapping, which lives as long as `self`; the peer that named the room leaves it
        // to us until we answer, and one that does not spoils only its own answer.
        Some(unsafe {
            let start = self.mapping.start.as_ptr().add(offset).cast();
            std::slice::from_raw_parts_mut(start, length)
        })
    }
}

struct Shared {
    mapping: Mapping,
    slot_bytes: usize,
    /// The last one given back is given out first: it is the one in the processor's cache.
    free: Mutex<Vec<u32>>,
}

impl Shared {
    fn free(&self) -> std::sync::MutexGuard<'_, Vec<u32>> {
        // Pushing and popping numbers leaves nothing half done.
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Slots of equal size for answers. Dropped while answers are still in use, the memory lives until the
/// last of them is gone, and no slot of it is given out again: a peer that was given up may write to it.
pub struct Slots {
    shared: Arc<Shared>,
}

impl Slots {
    /// Memory of `count` slots, and the descriptor to hand over. It takes space as it is used.
    pub fn new(slot_bytes: usize, count: u32) -> io::Result<(Slots, OwnedFd)> {
        let length = slot_bytes * count as usize;
        assert!(0 < length && length <= BYTES_MAX, "a peer would refuse {length} bytes");
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create("hci-answers", flags)?;
        ftruncate(&fd, length as u64)?;
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let mapping = Mapping::new(&fd, length, ProtFlags::READ)?;
        let free = Mutex::new((0..count).rev().collect());
        Ok((Slots { shared: Arc::new(Shared { mapping, slot_bytes, free }) }, fd))
    }

    /// A slot for an answer of up to `length` bytes; none where all are in use, or it is too small.
    pub fn take(&self, length: usize) -> Option<Slot> {
        if length > self.shared.slot_bytes {
            return None;
        }
        let index = self.shared.free().pop()?;
        Some(Slot { shared: Arc::clone(&self.shared), index })
    }
}

/// Room for one answer, given back when it is dropped.
pub struct Slot {
    shared: Arc<Shared>,
    index: u32,
}

impl Slot {
    /// Where it begins, in bytes.
    pub fn offset(&self) -> u64 {
        u64::from(self.index) * self.shared.slot_bytes as u64
    }

    /// What the peer has put there, which it says are `length` bytes. None: more than there is room for.
    pub fn filled(self, length: usize) -> Option<Bytes> {
        (length <= self.shared.slot_bytes).then(|| Bytes::from_owner(Filled { slot: self, length }))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.shared.free().push(self.index);
    }
}

struct Filled {
    slot: Slot,
    length: usize,
}

impl AsRef<[u8]> for Filled {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: inside the mapping, which the slot keeps alive. The peer has answered and leaves the room
        // alone; one that does not can change what we read, as it could have answered something else.
        unsafe {
            let start = self.slot.shared.mapping.start.as_ptr().add(self.slot.offset() as usize);
            std::slice::from_raw_parts(start, self.length)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(memory: &mut SharedMemory, slot: &Slot, content: &[u8]) {
        let room = memory.room(slot.offset(), content.len()).expect("inside");
        room.iter_mut().zip(content).for_each(|(to, from)| {
            to.write(*from);
        });
    }

    #[test]
    fn what_a_peer_puts_into_a_slot_is_the_answer() {
        let (slots, fd) = Slots::new(4096, 2).expect("memory");
        let mut memory = SharedMemory::of_peer(fd).expect("sealed");
        let (one, other) = (slots.take(10).expect("free"), slots.take(4096).expect("free"));
        put(&mut memory, &one, b"one");
        put(&mut memory, &other, b"other");
        assert_eq!(&one.filled(3).expect("fits")[..], b"one");
        assert_eq!(&other.filled(5).expect("fits")[..], b"other");
    }

    #[test]
    fn slot_is_given_out_again_only_when_its_answer_is_gone() {
        let (slots, _fd) = Slots::new(4096, 1).expect("memory");
        let answer = slots.take(1).expect("free").filled(1).expect("fits");
        let copy = answer.clone();
        drop(answer);
        assert!(slots.take(1).is_none(), "a copy of the answer is still read");
        drop(copy);
        assert!(slots.take(4097).is_none() && slots.take(4096).is_some());
    }

    #[test]
    fn answer_outlives_the_connection_it_came_by() {
        let (slots, fd) = Slots::new(4096, 1).expect("memory");
        let mut memory = SharedMemory::of_peer(fd).expect("sealed");
        let slot = slots.take(1).expect("free");
        put(&mut memory, &slot, b"late");
        let answer = slot.filled(4).expect("fits");
        drop((slots, memory));
        assert_eq!(&answer[..], b"late");
    }

    #[test]
    fn room_outside_the_memory_and_answers_over_their_slot_are_refused() {
        let (slots, fd) = Slots::new(4096, 2).expect("memory");
        let mut memory = SharedMemory::of_peer(fd).expect("sealed");
        assert!(memory.room(8192, 1).is_none() && memory.room(u64::MAX, 2).is_none());
        assert!(memory.room(4096, 4096).is_some() && memory.room(4097, 4096).is_none());
        assert!(slots.take(1).expect("free").filled(4097).is_none());
    }

    #[test]
    fn memory_that_may_shrink_is_refused() {
        let fd = rustix::fs::memfd_create("loose", MemfdFlags::CLOEXEC).expect("memory");
        ftruncate(&fd, 4096).expect("room");
        assert!(SharedMemory::of_peer(fd).is_err());
    }
}
