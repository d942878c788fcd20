//! A part of a log segment in memory, which moves forwards: a segment may be larger than memory should be.

use bytes::{Buf, BytesMut};

use super::disk::{DiskFile, DiskResult, Errno};
use super::log::PAGE_BYTES;

/// See the module.
pub struct Window<'a> {
    file: &'a dyn DiskFile,
    segment_bytes: usize,
    read_ahead: usize,
    /// Place in the segment of the first byte of `bytes`.
    start: usize,
    bytes: BytesMut,
    /// Nothing beyond is read unless it is asked for.
    limit: usize,
}

impl<'a> Window<'a> {
    /// Of a whole segment; reads `read_ahead` bytes more than are asked for.
    pub fn new(file: &'a dyn DiskFile, segment_bytes: u32, read_ahead: usize) -> Window<'a> {
        let segment_bytes = segment_bytes as usize;
        let (start, bytes, limit) = (0, BytesMut::new(), segment_bytes);
        Window { file, segment_bytes, read_ahead, start, bytes, limit }
    }

    /// The bytes from `at` on: `length` of them or more, fewer only at the segment's end. Never goes back.
    ///
    /// Pages that cannot be read are zeros: no record, and no reason to give up the others, least of all
    /// where nothing was written yet.
    ///
    /// # Errors
    /// Any but EIO.
    pub fn at_least(&mut self, at: usize, length: usize) -> DiskResult<&[u8]> {
        assert!(at >= self.start, "a window moves forwards");
        let end = at.saturating_add(length).min(self.segment_bytes);
        if self.start + self.bytes.len() < end {
            self.drop_before(at);
            let ahead = (end + self.read_ahead).min(self.limit.max(end));
            self.read_to(ahead.next_multiple_of(PAGE_BYTES as usize))?;
        }
        Ok(self.bytes.get(at - self.start..).unwrap_or_default())
    }

    fn drop_before(&mut self, at: usize) {
        let page = at - at % PAGE_BYTES as usize;
        let passed = (page - self.start).min(self.bytes.len());
        self.bytes.advance(passed);
        self.start = page;
    }

    fn read_to(&mut self, end: usize) -> DiskResult<()> {
        let (kept, from) = (self.bytes.len(), self.start + self.bytes.len());
        match self.file.read_at(from as u64, end - from, &mut self.bytes) {
            Err(Errno::IO) => self.bytes.truncate(kept),
            other => return other.map(|_| ()),
        }
        for page in (from..end).step_by(PAGE_BYTES as usize) {
            let length = (end - page).min(PAGE_BYTES as usize);
            match self.file.read_at(page as u64, length, &mut self.bytes) {
                Ok(_) | Err(Errno::IO) => self.bytes.resize(page + length - self.start, 0),
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    /// Moves `at`, a page's begin, on to the first page that may have been written, and lets as much as is
    /// read at once be read from there; false: there is none.
    ///
    /// # Errors
    /// The file cannot be asked.
    pub fn next_written(&mut self, at: &mut usize) -> DiskResult<bool> {
        let data = usize::try_from(self.file.next_data(*at as u64)?).unwrap_or(usize::MAX);
        *at = (data - data % PAGE_BYTES as usize).max(*at);
        self.limit = at.saturating_add(self.read_ahead);
        Ok(*at < self.segment_bytes)
    }

    /// Up to here the next reads go.
    pub fn limit(&self) -> usize {
        self.limit.min(self.segment_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::simulated::{Seeded, SimDisk};
    use std::io::IoSlice;

    const PAGE: usize = PAGE_BYTES as usize;

    #[test]
    fn window_shows_what_the_file_holds_wherever_it_has_come_to() {
        let disk = SimDisk::new().run();
        let file = disk.create("segment").expect("create");
        let content: Vec<u8> = (0..40 * PAGE).map(|at| (at / 7 % 251) as u8).collect();
        file.write_at(0, &mut [IoSlice::new(&content)]).expect("write");
        for seed in 0..50 {
            let mut random = Seeded::new(seed);
            let ahead = random.below(3 * PAGE as u64) as usize;
            let mut window = Window::new(&*file, content.len() as u32, ahead);
            let mut at = 0;
            while at < content.len() {
                let length = random.below(5 * PAGE as u64) as usize;
                let seen = window.at_least(at, length).expect("read");
                assert!(seen.len() >= length.min(content.len() - at), "as much as was asked for");
                assert!(content[at..].starts_with(seen), "seed {seed} at {at}");
                at += random.below(8 * PAGE as u64) as usize;
            }
            assert_eq!(window.at_least(content.len(), 1).map(<[u8]>::len), Ok(0), "the end");
        }
    }
}
