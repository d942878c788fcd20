//! Which blocks have a change in flight. Writes hold their blocks, reads wait for them; who waits is let
//! through in order of arrival, so that a wide write is never starved by narrow ones.

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

#[derive(Clone, Copy, Debug)]
struct Waiter {
    id: usize,
    range: Range,
    holds: bool,
}

/// The locks of one image. Held ranges never overlap.
#[derive(Default)]
pub struct BlockLocks {
    held: BTreeMap<u64, u64>,
    waiting: VecDeque<Waiter>,
}

impl BlockLocks {
    /// True: go on (a write now holds `range`). False: `release` will name `id` when it may.
    pub fn enter(&mut self, id: usize, range: Range, holds: bool) -> bool {
        if self.is_let_through(holds) {
            return true;
        }
        let blocked = self.is_held(&range)
            || self.waiting.iter().any(|w| (w.holds || holds) && w.range.overlaps(&range));
        if blocked {
            self.waiting.push_back(Waiter { id, range, holds });
        } else if holds {
            self.hold(range);
        }
        !blocked
    }

    /// Gives `range` back and appends to `ready` those who may go on now.
    pub fn release(&mut self, range: Range, ready: &mut Vec<usize>) {
        let end = self.held.remove(&range.first);
        if broken(Rule::WritesShareNoBlock) {
            return;
        }
        assert_eq!(end, Some(range.end), "a lock is released as it was taken");
        let mut index = 0;
        while index < self.waiting.len() {
            let waiter = self.waiting[index];
            let behind = self.waiting.iter().take(index);
            let blocked = self.is_held(&waiter.range)
                || behind
                    .into_iter()
                    .any(|w| (w.holds || waiter.holds) && w.range.overlaps(&waiter.range));
            if blocked {
                index += 1;
                continue;
            }
            self.waiting.remove(index);
            if waiter.holds {
                self.hold(waiter.range);
            }
            ready.push(waiter.id);
        }
    }

    /// Whether a test breaks the rule that would have a request wait.
    fn is_let_through(&self, holds: bool) -> bool {
        match holds {
            true => broken(Rule::WritesShareNoBlock),
            false => broken(Rule::ReadsWaitForWrites) || broken(Rule::WritesShareNoBlock),
        }
    }

    fn is_held(&self, range: &Range) -> bool {
        self.held.range(..range.end).next_back().is_some_and(|(_, end)| *end > range.first)
    }

    fn hold(&mut self, range: Range) {
        assert!(range.first < range.end, "an empty range holds nothing");
        let former = self.held.insert(range.first, range.end);
        assert_eq!(former, None, "held ranges never overlap");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: u64, end: u64) -> Range {
        Range { first, end }
    }

    #[test]
    fn overlapping_writes_go_one_after_the_other() {
        let mut locks = BlockLocks::default();
        assert!(locks.enter(1, range(0, 4), true));
        assert!(!locks.enter(2, range(3, 5), true));
        assert!(locks.enter(3, range(5, 6), true));
        let mut ready = Vec::new();
        locks.release(range(0, 4), &mut ready);
        assert_eq!(ready, [2]);
    }

    #[test]
    fn a_wide_write_is_not_starved_by_narrow_ones_behind_it() {
        let mut locks = BlockLocks::default();
        assert!(locks.enter(1, range(0, 1), true));
        assert!(!locks.enter(2, range(0, 8), true));
        assert!(!locks.enter(3, range(7, 8), true), "behind the wide one");
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
        assert!(locks.enter(1, range(0, 1), true));
        assert!(!locks.enter(2, range(0, 2), false));
        assert!(!locks.enter(3, range(0, 1), false));
        assert!(locks.enter(4, range(1, 2), false), "reads do not wait for reads");
        let mut ready = Vec::new();
        locks.release(range(0, 1), &mut ready);
        assert_eq!(ready, [2, 3]);
        assert!(locks.held.is_empty() && locks.waiting.is_empty());
    }
}
