//! Rules that tests break on purpose, to see that they would notice.

/// A rule that is not kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Defect {
    /// What is written while the list is made does not go on it.
    MissedWhileListing,
    /// Shards count as level after the pass beside the clients' writes.
    NoPause,
    /// Changes are answered without the node that is healed.
    AnsweredWithoutHealed,
    /// A healed node that is lost is given up before its membership is known.
    OutcomeForgotten,
    /// A heal goes on although all its sources were away.
    SourcesForgotten,
    /// The record takes a node in that has not synced.
    NoSync,
    /// Content that is equal leaves its tag behind.
    TagsLeft,
    /// A new instance is not asked for what its former one had answered.
    NotAskedAgain,
}

#[cfg(not(test))]
#[inline(always)]
pub(super) fn planted(_: Defect) -> bool {
    false
}

#[cfg(test)]
pub(super) use planting::{plant, planted};

#[cfg(test)]
mod planting {
    use super::Defect;
    use std::cell::Cell;

    thread_local! {
        static PLANTED: Cell<Option<Defect>> = const { Cell::new(None) };
    }

    pub(in crate::replica) fn planted(defect: Defect) -> bool {
        PLANTED.get() == Some(defect)
    }

    /// Plants a defect in this thread, or none.
    pub(in crate::replica) fn plant(defect: Option<Defect>) {
        PLANTED.set(defect);
    }
}
