//! Rules of the protocol that tests break on purpose, to show that the simulator notices.
//!
//! Each is looked up where it is kept: `if !broken(Rule::…)`. In a release `broken` is the constant
//! `false`, and nothing of this is left.

/// A rule, named after what holds while it is kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Rule {
    /// A node serves a request only in the image's current session.
    SessionIsCurrent,
    /// A node refuses requests below the epoch of its record.
    EpochIsCurrent,
    /// A node refuses requests below the generation of its record.
    GenerationIsCurrent,
    /// With a new generation every dirty shard of a node counts as written in it.
    DirtyCountsAsNewer,
    /// A dirty entry that is dropped leaves the generation that it counted as to its shard.
    GenerationOutlivesEntry,
    /// A node refuses an equal record that says something else.
    EqualRecordsAgree,
    /// A node refuses a lower record.
    RecordsGrow,
    /// A clear names a sequence up to which everything is answered.
    ClearIsAnswered,
    /// Dirty entries that an instance begins with stay until they are levelled.
    StickyAfterRestart,
    /// A clear leaves sticky entries alone.
    StickyUntilLevel,
    /// A holder's first flush goes to all nodes in sync.
    FirstFlushGoesToAll,
    /// A flush is answered when it is durable.
    FlushIsDurable,
    /// Reads wait for writes in flight on their blocks.
    ReadsWaitForWrites,
    /// Past the lease time a read is answered when all nodes in sync have confirmed the epoch.
    ReadsAreConfirmed,
    /// Levelled shards are durable before their dirty entries go.
    LevelIsDurable,
    /// The winner is chosen for each block, not for each shard.
    WinnerPerBlock,
    /// Stored blocks are verified when they are read or merged into, at node and gateway.
    ReadsAreVerified,
    /// A new membership is stored by the nodes in sync before what it lets go is answered.
    StoredBeforeAnswer,
    /// A write is answered when all nodes in sync have answered.
    AllInSyncAnswer,
    /// A node that lost its memory is asked again for writes that are not answered yet.
    UnansweredAskedAgain,
    /// What is written while a heal makes its list goes on it.
    WritesAreListed,
    /// A shard is level after a pass with the clients' writes paused.
    HealPausesWrites,
    /// From then on changes are answered with the node that is healed.
    HealedNodeAnswers,
    /// A healed node that is lost counts until it is known whether the record took it in.
    LostHealedIsAwaited,
    /// A heal ends where all its sources were away.
    HealNeedsItsSources,
    /// The record takes a node in that has synced.
    HealedIsDurable,
    /// Content that is equal takes its source's tag.
    TagsAreCopied,
    /// A failed sync ends the store.
    FailedSyncEnds,
    /// Where no node of a set is up all in sync are levelled, or none.
    AllInSyncLevelled,
    /// A node in sync is level in a shard before it is asked anything of it.
    LevelBeforeRequests,
    /// A flush waits until all nodes in sync are level everywhere.
    FlushWaitsForLevel,
    /// A flush fails whose answered writes may be gone.
    LossIsTold,
    /// Blocks are repaired while no write to them is in flight.
    RepairPausesWrites,
    /// Of writes that share a block one begins when the other is answered.
    BlockWritesAreOrdered,
    /// The layers change when no write is in flight.
    SnapshotsWaitForWrites,
    /// What a snapshot holds is durable on all nodes in sync before the record names it.
    SnapshotsAreFlushed,
    /// A node serves a reader only a snapshot that its record names, and of which all is there.
    ReadersReadFrozenLayers,
    /// A layer that a node's record does not name any more leaves nothing behind on it.
    DroppedLayersGo,
    /// What comes later about blocks ends a pull of them that is not applied.
    PullsAreOvertaken,
    /// A pull is applied in the session, epoch and generation that it was ordered in.
    PullsEndWithTheirSession,
    /// A node gives blocks to another one only under the epoch and generation of its own record, while that
    /// epoch's holder has a session with it.
    PeersAskUnderTheRecord,
    /// A merge fills blocks that are absent above, and touches no other.
    MergesFillGaps,
    /// A merged shard counts as written in the highest generation of those that it is made of.
    MergedKeepGenerations,
    /// A node merges a shard before it compares or copies it.
    MergedBeforeCompared,
    /// What is compared with is a snapshot that the node's record names.
    ChangesAreSinceSnapshots,
}

impl Rule {
    pub const ALL: [Rule; 45] = [
        Rule::SessionIsCurrent,
        Rule::EpochIsCurrent,
        Rule::GenerationIsCurrent,
        Rule::DirtyCountsAsNewer,
        Rule::GenerationOutlivesEntry,
        Rule::EqualRecordsAgree,
        Rule::RecordsGrow,
        Rule::ClearIsAnswered,
        Rule::StickyAfterRestart,
        Rule::StickyUntilLevel,
        Rule::FirstFlushGoesToAll,
        Rule::FlushIsDurable,
        Rule::ReadsWaitForWrites,
        Rule::ReadsAreConfirmed,
        Rule::LevelIsDurable,
        Rule::WinnerPerBlock,
        Rule::ReadsAreVerified,
        Rule::StoredBeforeAnswer,
        Rule::AllInSyncAnswer,
        Rule::UnansweredAskedAgain,
        Rule::WritesAreListed,
        Rule::HealPausesWrites,
        Rule::HealedNodeAnswers,
        Rule::LostHealedIsAwaited,
        Rule::HealNeedsItsSources,
        Rule::HealedIsDurable,
        Rule::TagsAreCopied,
        Rule::FailedSyncEnds,
        Rule::AllInSyncLevelled,
        Rule::LevelBeforeRequests,
        Rule::FlushWaitsForLevel,
        Rule::LossIsTold,
        Rule::RepairPausesWrites,
        Rule::BlockWritesAreOrdered,
        Rule::SnapshotsWaitForWrites,
        Rule::SnapshotsAreFlushed,
        Rule::ReadersReadFrozenLayers,
        Rule::DroppedLayersGo,
        Rule::PullsAreOvertaken,
        Rule::PullsEndWithTheirSession,
        Rule::PeersAskUnderTheRecord,
        Rule::MergesFillGaps,
        Rule::MergedKeepGenerations,
        Rule::MergedBeforeCompared,
        Rule::ChangesAreSinceSnapshots,
    ];
}

#[cfg(any(test, feature = "simulation"))]
mod switches {
    use super::Rule;
    use std::cell::Cell;

    thread_local! {
        static BROKEN: Cell<u64> = const { Cell::new(0) };
    }

    /// Whether this thread breaks the rule.
    pub fn broken(rule: Rule) -> bool {
        BROKEN.get() & 1 << rule as u8 != 0
    }

    /// Has this thread break these rules, and keep all others.
    pub fn break_rules(rules: &[Rule]) {
        BROKEN.set(rules.iter().fold(0, |mask, rule| mask | 1 << *rule as u8));
    }
}

#[cfg(any(test, feature = "simulation"))]
pub use switches::{break_rules, broken};

/// Releases keep all rules.
#[cfg(not(any(test, feature = "simulation")))]
#[inline(always)]
pub const fn broken(_rule: Rule) -> bool {
    false
}
