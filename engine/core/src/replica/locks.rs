//! Which blocks have a change in flight. Writes hold their blocks, reads wait for them; who waits is let
//! through in order of arrival, so that a wide write is never starved by narrow ones.
//!
//! Writes are kept out in two ways. Who copies blocks to a node that gets the writes too waits its turn, like
//! a writer, until none is in flight (`Mode::Pause`). Who copies a shard to a node that gets none of them
//! has no new one begin, and those in flight go on (`pause`).

use crate::rules::{Rule, broken};
use std::collections::{BTreeMap, VecDeque};

/// Blocks `first..end` of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    pub first: u64,
    pub end: u64,
}

impl Range {
    fn overlaps(&self, other: &Range) -> bool {
        self.first < other.end && other.first < self.end
    }
}

/// What a lock is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Waits for writes; holds nothing.
    Read,
    /// Keeps everything else out.
    Write,
    /// Keeps writes out, and waits for those in flight.
    Pause,
}

impl Mode {
    fn excludes(self, other: Mode) -> bool {
        match (self, other) {
            (Mode::Read, Mode::Read | Mode::Pause) | (Mode::Pause, Mode::Read) => false,
            (Mode::Write, Mode::Write) => !broken(Rule::BlockWritesAreOrdered),
            _ => true,
        }
    }

    fn holds(self) -> bool {
        self != Mode::Read
    }
}

#[derive(Clone, Copy, Debug)]
struct Waiter {
    id: usize,
    range: Range,
    mode: Mode,
}

impl Waiter {
    fn excludes(&self, other: &Waiter) -> bool {
        self.mode.excludes(other.mode) && self.range.overlaps(&other.range)
    }
}

/// The locks of one image. Held ranges never overlap.
#[derive(Default)]
pub struct BlockLocks {
    /// End and mode by first block.
    held: BTreeMap<u64, (u64, Mode)>,
    /// Writes that go on beside one that is held: none while `Rule::BlockWritesAreOrdered` is kept.
    beside: Vec<Range>,
    waiting: VecDeque<Waiter>,
    /// Where no write begins.
    paused: Vec<Range>,
}

impl BlockLocks {
    /// True: go on (`range` is now held, but by a read). False: `release` will name `id` when it may.
    pub fn enter(&mut self, id: usize, range: Range, mode: Mode) -> bool {
        let new = Waiter { id, range, mode };
        let passes = mode == Mode::Read && broken(Rule::ReadsWaitForWrites);
        let blocked =
            !passes && (self.is_kept_out(&new) || self.waiting.iter().any(|w| w.excludes(&new)));
        if blocked {
            self.waiting.push_back(new);
        } else if mode.holds() {
            self.hold(&new);
        }
        !blocked
    }

    /// Gives `range` back and appends to `ready` those who may go on now.
    pub fn release(&mut self, range: Range, ready: &mut Vec<usize>) {
        if let Some(index) = self.beside.iter().position(|beside| *beside == range) {
            self.beside.swap_remove(index);
        } else {
            let held = self.held.remove(&range.first).map(|(end, _)| end);
            assert_eq!(held, Some(range.end), "a lock is released as it was taken");
        }
        self.let_in(ready);
    }

    /// Gives up waiting, or what is held, as `id`, and appends to `ready` those who may go on now.
    pub fn withdraw(&mut self, id: usize, range: Range, ready: &mut Vec<usize>) {
        match self.waiting.iter().position(|waiter| waiter.id == id) {
            Some(index) => {
                self.waiting.remove(index);
                self.let_in(ready);
            }
            None => self.release(range, ready),
        }
    }

    /// No write to `range` begins from now on. Nothing is said of those in flight.
    pub fn pause(&mut self, range: Range) {
        self.paused.push(range);
    }

    /// Ends a pause, and appends to `ready` those who may go on now.
    pub fn resume(&mut self, range: Range, ready: &mut Vec<usize>) {
        let index = self.paused.iter().position(|paused| *paused == range);
        let index = index.expect("a pause ends as it began");
        self.paused.swap_remove(index);
        self.let_in(ready);
    }

    fn let_in(&mut self, ready: &mut Vec<usize>) {
        let mut index = 0;
        while index < self.waiting.len() {
            let waiter = self.waiting[index];
            let mut ahead = self.waiting.iter().take(index);
            if self.is_kept_out(&waiter) || ahead.any(|w| w.excludes(&waiter)) {
                index += 1;
                continue;
            }
            self.waiting.remove(index);
            if waiter.mode.holds() {
                self.hold(&waiter);
            }
            ready.push(waiter.id);
        }
    }

    fn is_kept_out(&self, new: &Waiter) -> bool {
        let before_end = self.held.range(..new.range.end).rev();
        let mut overlapping = before_end.take_while(|(_, (end, _))| *end > new.range.first);
        let paused = || self.paused.iter().any(|paused| paused.overlaps(&new.range));
        let mut beside = self.beside.iter().filter(|beside| beside.overlaps(&new.range));
        beside.any(|_| Mode::Write.excludes(new.mode))
            || overlapping.any(|(_, (_, mode))| mode.excludes(new.mode))
            || new.mode == Mode::Write && paused()
    }

    fn is_held(&self, range: &Range) -> bool {
        self.held.range(..range.end).next_back().is_some_and(|(_, (end, _))| *end > range.first)
    }

    fn hold(&mut self, new: &Waiter) {
        let Range { first, end } = new.range;
        assert!(first < end, "an empty range holds nothing");
        if broken(Rule::BlockWritesAreOrdered) && self.is_held(&new.range) {
            return self.beside.push(new.range);
        }
        let former = self.held.insert(first, (end, new.mode));
        assert_eq!(former, None, "held ranges never overlap");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::break_rules;

    fn range(first: u64, end: u64) -> Range {
        Range { first, end }
    }

    #[test]
    fn overlapping_writes_go_one_after_the_other() {
        let mut locks = BlockLocks::default();
        assert!(locks.enter(1, range(0, 4), Mode::Write));
        assert!(!locks.enter(2, range(3, 5), Mode::Write));
        assert!(locks.enter(3, range(5, 6), Mode::Write));
        let mut ready = Vec::new();
        locks.release(range(0, 4), &mut ready);
        assert_eq!(ready, [2]);
    }

    #[test]
    fn overlapping_writes_go_side_by_side_with_the_rule_broken() {
        break_rules(&[Rule::BlockWritesAreOrdered]);
        let mut locks = BlockLocks::default();
        assert!(locks.enter(1, range(0, 4), Mode::Write));
        assert!(locks.enter(2, range(0, 4), Mode::Write));
        assert!(locks.enter(3, range(2, 6), Mode::Write));
        assert!(!locks.enter(4, range(5, 6), Mode::Pause), "it waits for those beside too");
        let mut ready = Vec::new();
        locks.release(range(0, 4), &mut ready);
        locks.release(range(0, 4), &mut ready);
        assert_eq!(ready, []);
        locks.release(range(2, 6), &mut ready);
        break_rules(&[]);
        assert_eq!(ready, [4]);
        assert!(locks.beside.is_empty());
    }

    #[test]
    fn a_wide_write_is_not_starved_by_narrow_ones_behind_it() {
        let mut locks = BlockLocks::default();
        assert!(locks.enter(1, range(0, 1), Mode::Write));
        assert!(!locks.enter(2, range(0, 8), Mode::Write));
        assert!(!locks.enter(3, range(7, 8), Mode::Write), "behind the wide one");
        let mut ready = Vec::new();
        locks.release(range(0, 1), &mut ready);
        assert_eq!(ready, [2]);
        ready.clear();
        locks.release(range(0, 8), &mut ready);
        assert_eq!(ready, [3]);
    }

    #[test]
    fn reads_wait_for_writes_and_hold_nothing() {
        let mut locks = BlockLocks::default();
        assert!(locks.enter(1, range(0, 1), Mode::Write));
        assert!(!locks.enter(2, range(0, 2), Mode::Read));
        assert!(!locks.enter(3, range(0, 1), Mode::Read));
        assert!(locks.enter(4, range(1, 2), Mode::Read), "reads do not wait for reads");
        let mut ready = Vec::new();
        locks.release(range(0, 1), &mut ready);
        assert_eq!(ready, [2, 3]);
        assert!(locks.held.is_empty() && locks.waiting.is_empty());
    }

    #[test]
    fn a_pause_keeps_new_writes_out_and_leaves_those_in_flight_alone() {
        let mut locks = BlockLocks::default();
        assert!(locks.enter(1, range(2, 3), Mode::Write));
        locks.pause(range(0, 8));
        assert!(locks.enter(2, range(4, 5), Mode::Read), "reads go on");
        assert!(!locks.enter(3, range(7, 9), Mode::Write));
        assert!(locks.enter(4, range(9, 10), Mode::Write), "beyond it writes go on");
        let mut ready = Vec::new();
        locks.release(range(2, 3), &mut ready);
        assert_eq!(ready, []);
        locks.resume(range(0, 8), &mut ready);
        assert_eq!(ready, [3]);
        assert!(locks.paused.is_empty());
    }

    #[test]
    fn who_pauses_in_turn_waits_for_writes_and_lets_reads_through() {
        let mut locks = BlockLocks::default();
        assert!(locks.enter(1, range(2, 3), Mode::Write));
        assert!(!locks.enter(2, range(0, 8), Mode::Pause), "it waits for the write in flight");
        assert!(locks.enter(3, range(4, 5), Mode::Read), "a read overtakes it");
        assert!(!locks.enter(4, range(4, 5), Mode::Write), "a write does not");
        let mut ready = Vec::new();
        locks.release(range(2, 3), &mut ready);
        assert_eq!(ready, [2]);
        assert!(locks.enter(5, range(2, 3), Mode::Read));
        ready.clear();
        locks.release(range(0, 8), &mut ready);
        assert_eq!(ready, [4]);
    }

    #[test]
    fn who_withdraws_keeps_nobody_waiting() {
        let mut locks = BlockLocks::default();
        assert!(locks.enter(1, range(0, 1), Mode::Write));
        assert!(!locks.enter(2, range(0, 8), Mode::Pause));
        assert!(!locks.enter(3, range(7, 8), Mode::Write));
        let mut ready = Vec::new();
        locks.withdraw(2, range(0, 8), &mut ready);
        assert_eq!(ready, [3]);
        locks.release(range(0, 1), &mut ready);
        assert!(locks.enter(4, range(0, 1), Mode::Pause));
        locks.withdraw(4, range(0, 1), &mut ready);
        assert!(locks.enter(5, range(0, 1), Mode::Write));
    }
}
