//! How much later than the first of them nodes answer changes and flushes, and store a record that changes wait
//! for: what clients wait for because of one node alone. Only measured here; who is slow, and what becomes of it, policy says.
//!
//! Compared are answers to one and the same frame that was sent to all at once, so that what all of them
//! suffer from (load, large requests, a gateway that stood still) does not count.

use super::image::{ImageIo, Part, ReplicaState, Set};
use super::{Event, NodeIndex, NodeMask};

/// Less than this nobody has to hear of.
const TOLD_FROM_NS: u64 = 10_000_000;

/// What a node answered since the last tick.
#[derive(Clone, Copy, Default)]
pub(super) struct Lag {
    answers: u64,
    lag_ns: u64,
}

/// When the first node answered a part, and who was asked later than the others.
#[derive(Clone, Copy, Default)]
pub(super) struct Timing {
    first_ns: Option<u64>,
    late: NodeMask,
}

impl Part {
    /// `nodes` are asked when others were already: when they answer says nothing.
    pub(super) fn asked_late(&mut self, nodes: NodeMask) {
        self.timing.late = self.timing.late.with(nodes);
    }

    /// Since when others have answered what `node` has not.
    fn awaited_since(&self, node: NodeIndex) -> Option<u64> {
        let asked = self.waiting.and(self.sent).without(self.timing.late);
        self.timing.first_ns.filter(|_| asked.has(node))
    }
}

impl Set {
    /// Since when others have stored a record that `node` has not.
    fn record_awaited_since(&self, node: NodeIndex) -> Option<u64> {
        self.first_stored_ns.filter(|_| self.storing.has(node))
    }
}

impl ImageIo {
    /// `node` has done a change or a flush.
    pub(super) fn measure(&mut self, id: usize, node: NodeIndex) {
        let (now_ns, part) = (self.now_ns, &mut self.parts[id]);
        if part.timing.late.has(node) {
            return;
        }
        let first_ns = *part.timing.first_ns.get_or_insert(now_ns);
        let lag = &mut self.replica(node).lag;
        lag.answers += 1;
        lag.lag_ns += now_ns.saturating_sub(first_ns);
    }

    /// A second has passed: tells how much each node lags, where that is worth a word.
    pub(super) fn tell_lags(&mut self) {
        let attached = |state| matches!(state, ReplicaState::Up | ReplicaState::Healing);
        let mut lags = Vec::new();
        for node in self.nodes_in(attached).iter() {
            let Lag { answers, lag_ns } = std::mem::take(&mut self.replica(node).lag);
            let awaited = self.parts.iter().filter_map(|(_, part)| part.awaited_since(node));
            let stored = self.sets.iter().filter_map(|set| set.record_awaited_since(node));
            let oldest_ns =
                awaited.chain(stored).min().map(|since_ns| self.now_ns.saturating_sub(since_ns));
            let mean_ns = lag_ns.checked_div(answers);
            if let Some(lag_ns) = mean_ns.max(oldest_ns) {
                lags.push((node, lag_ns / 1_000_000));
            }
        }
        let worth = lags.iter().any(|(_, lag_ms)| lag_ms * 1_000_000 >= TOLD_FROM_NS);
        // The first quick second after slow ones is told, too.
        if worth || self.lags_told {
            self.event(Event::Lags { lags });
        }
        self.lags_told = worth;
    }
}
