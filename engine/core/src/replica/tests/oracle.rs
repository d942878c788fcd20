//! What reads may return, sector by sector: the last answered write or one in flight, never older.

use std::collections::HashMap;

pub const SECTOR: usize = 512;

#[derive(Clone, Copy, Debug)]
struct Written {
    /// Unique, other than the stamp: zeroes are written again and again.
    id: u64,
    stamp: u64,
    begun: u64,
    /// None: in flight.
    answered: Option<u64>,
    /// Sure to outlive a power cut from then on.
    flushed: Option<u64>,
    /// Nothing is promised of it any more.
    doubtful: bool,
    /// Its gateway is gone: it counts as answered from the next open on, whatever became of it.
    orphan: bool,
}

impl Written {
    fn new() -> Written {
        let (id, stamp, begun, answered, flushed) = (0, 0, 0, None, None);
        Written { id, stamp, begun, answered, flushed, doubtful: false, orphan: false }
    }
}

/// All writes to the region, in order of their begin.
pub struct Oracle {
    sectors: Vec<Vec<Written>>,
    /// Only flushed writes are promised: all replicas may lose their memory.
    pub flushed_only: bool,
    flushes: HashMap<u64, u64>,
}

impl Oracle {
    pub fn new(sectors: usize, flushed_only: bool) -> Oracle {
        let zero = Written {
            id: 0,
            stamp: 0,
            begun: 0,
            answered: Some(0),
            flushed: Some(0),
            doubtful: false,
            orphan: false,
        };
        Oracle { sectors: vec![vec![zero]; sectors], flushed_only, flushes: HashMap::new() }
    }

    pub fn write_begins(
        &mut self,
        first: usize,
        sectors: usize,
        (id, stamp): (u64, u64),
        now: u64,
    ) {
        let written = Written { id, stamp, begun: now, ..Written::new() };
        self.sectors[first..first + sectors].iter_mut().for_each(|s| s.push(written));
    }

    pub fn write_answered(&mut self, id: u64, now: u64, durable: bool) {
        for written in self.sectors.iter_mut().flatten().filter(|w| w.id == id) {
            written.answered = Some(now);
            written.flushed = durable.then_some(now);
        }
    }

    pub fn flush_begins(&mut self, id: u64, now: u64) {
        self.flushes.insert(id, now);
    }

    pub fn flush_answered(&mut self, id: u64, now: u64) {
        let begun = self.flushes.remove(&id).expect("a flush that began");
        for written in self.sectors.iter_mut().flatten().filter(|w| !w.orphan) {
            let covered = written.answered.is_some_and(|at| at < begun) && !written.doubtful;
            if covered && written.flushed.is_none() {
                written.flushed = Some(now);
            }
        }
    }

    /// A flush says that what was answered and not flushed may be gone.
    pub fn flush_failed(&mut self, id: u64) {
        self.flushes.remove(&id).expect("a flush that began");
        self.doubt();
    }

    fn doubt(&mut self) {
        let unflushed = self.sectors.iter_mut().flatten().filter(|w| w.flushed.is_none());
        unflushed.for_each(|written| written.doubtful |= written.answered.is_some());
    }

    /// `forgetful`: memory was lost, of which the next holder does not tell.
    pub fn gateway_gone(&mut self, forgetful: bool) {
        if forgetful {
            self.doubt();
        }
        self.flushes.clear();
        let open = self.sectors.iter_mut().flatten().filter(|w| w.answered.is_none());
        open.for_each(|written| written.orphan = true);
    }

    /// A new holder serves: from here on, what became of orphans does not change.
    pub fn opened(&mut self, now: u64) {
        let orphans = self.sectors.iter_mut().flatten().filter(|w| w.orphan);
        orphans.for_each(|written| {
            written.answered.get_or_insert(now);
        });
    }

    /// Checks what a read that began at `begun` and is answered at `now` returned.
    pub fn check_read(&self, first: usize, content: &[u8], begun: u64, now: u64) {
        for (index, sector) in content.chunks_exact(SECTOR).enumerate() {
            let stamp = u64::from_le_bytes(sector[..8].try_into().expect("eight bytes"));
            let torn = sector.chunks_exact(8).any(|word| word != &sector[..8]);
            assert!(!torn, "sector {} is a mixture", first + index);
            let history = &self.sectors[first + index];
            let same: Vec<&Written> = history.iter().filter(|w| w.stamp == stamp).collect();
            let allowed = same.iter().any(|found| {
                assert!(found.begun <= now);
                self.successor(history, found, begun).is_none()
            });
            assert!(
                allowed,
                "sector {} read as {same:?} from {begun} to {now}; its history: {history:#?}",
                first + index
            );
        }
    }

    /// A write that came after `found` was answered, and was itself settled before `begun`.
    fn successor<'a>(
        &self,
        history: &'a [Written],
        found: &Written,
        begun: u64,
    ) -> Option<&'a Written> {
        history.iter().find(|newer| {
            let settled = if self.flushed_only { newer.flushed } else { newer.answered };
            !newer.orphan
                && found.answered.is_some_and(|at| newer.begun > at)
                && settled.is_some_and(|at| at < begun)
        })
    }
}
