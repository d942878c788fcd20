//! Which old pages of a segment are forgotten, and when.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::sync::{Arc, Mutex};

use bytes::Bytes;

use crate::geometry::ImageId;
use crate::store::disk::{DiskFile, DiskResult};
use crate::store::log::{Log, LogParameters};
use crate::store::record::{Header, Kind};

const SEGMENT_BYTES: u32 = 32 << 20;

/// Takes all, and notes what it was told to forget.
#[derive(Default)]
struct Forgetful(Mutex<Vec<(u64, u64)>>);

impl DiskFile for Forgetful {
    fn read_into(&self, _offset: u64, _room: &mut [MaybeUninit<u8>]) -> DiskResult<usize> {
        Ok(0)
    }
    fn forget_cached(&self, offset: u64, length: u64) {
        self.0.lock().expect("one thread").push((offset, length));
    }
    fn write_at(&self, _offset: u64, _slices: &mut [IoSlice<'_>]) -> DiskResult<()> {
        Ok(())
    }
    fn sync_data(&self) -> DiskResult<()> {
        Ok(())
    }
    fn punch_hole(&self, _offset: u64, _length: u64) -> DiskResult<()> {
        Ok(())
    }
    fn allocate(&self, _offset: u64, _length: u64) -> DiskResult<()> {
        Ok(())
    }
    fn set_len(&self, _length: u64) -> DiskResult<()> {
        Ok(())
    }
    fn length(&self) -> DiskResult<u64> {
        Ok(u64::from(SEGMENT_BYTES))
    }
    fn allocated_bytes(&self) -> DiskResult<u64> {
        Ok(u64::from(SEGMENT_BYTES))
    }
}

struct Rig {
    log: Log,
    files: [Arc<Forgetful>; 2],
}

impl Rig {
    /// A log of two segments that it found when it started.
    fn found() -> Rig {
        let files = [Arc::<Forgetful>::default(), Arc::default()];
        let free = vec![(0, files[0].clone() as _), (1, files[1].clone() as _)];
        let (segment_bytes, segments_max) = (SEGMENT_BYTES, 2);
        let p = LogParameters { segment_bytes, segments_max, seed: 1, instance: 1, next_lsn: 1 };
        let mut log = Log::new(&p, VecDeque::new(), free);
        log.roll();
        Rig { log, files }
    }

    /// Appends `count` records of together `bytes` each, headers included.
    fn append(&mut self, count: u32, bytes: u32) {
        for _ in 0..count {
            let payload = Bytes::from(vec![0; bytes as usize - 256]);
            let header = Header::new(Kind::Head, ImageId([0; 16]));
            self.log.stage(header, |_| {}, std::iter::once(payload));
            self.log.append().expect("taken");
        }
    }

    /// The other segment takes over; the one of before is free again.
    fn next_segment(&mut self) {
        self.log.synced(self.log.appended_lsn());
        let last = self.log.live().back().expect("one").sequence;
        self.log.roll();
        self.append(1, 4096);
        self.log.retire(last);
    }

    fn forgotten(&self) -> [Vec<(u64, u64)>; 2] {
        self.files.each_ref().map(|file| std::mem::take(&mut *file.0.lock().expect("one thread")))
    }
}

#[test]
fn pages_of_nobody_knows_what_are_forgotten_ahead_of_large_appends() {
    let mut rig = Rig::found();
    rig.append(10, 1 << 20);
    assert_eq!(rig.forgotten(), [vec![(0, 8 << 20), (8 << 20, 8 << 20)], vec![]]);
}

#[test]
fn small_appends_forget_nothing_and_large_ones_leave_pages_that_stay() {
    let mut rig = Rig::found();
    rig.append(100, 4096);
    assert_eq!(rig.forgotten(), [vec![], vec![]]);
    rig.append(8, 1 << 20);
    assert_eq!(rig.forgotten(), [vec![(100 * 4096, 8 << 20)], vec![]]);
    rig.next_segment();
    rig.next_segment();
    rig.append(8, 1 << 20);
    assert_eq!(rig.forgotten(), [vec![], vec![]], "a slot of large appends keeps its pages");
}

#[test]
fn slot_that_took_small_appends_is_forgotten_in_its_next_life() {
    let mut rig = Rig::found();
    rig.append(8, 1 << 20);
    rig.append(512, 4096);
    rig.forgotten();
    rig.next_segment();
    rig.next_segment();
    rig.append(1, 1 << 20);
    assert_eq!(rig.forgotten(), [vec![(4096, 8 << 20)], vec![]]);
}
