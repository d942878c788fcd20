//! Whether what was answered and not flushed is still somewhere.
//!
//! An answered write is in the memory of every node in sync, and a killed process leaves it there. A node that
//! lost its power (its host came up with another boot id) *forgot*: what it kept of unflushed writes nobody
//! knows. While one in sync has not forgotten, those that have are made level with it. Where all have, answered
//! writes since the last flush may be gone, and the guest, which lives on, must hear of it: the flush that was to
//! make them durable fails, once.
//!
//! | a node in sync | of a replica set | until |
//! | --- | --- | --- |
//! | remembers | has all that was answered | its host comes up again |
//! | forgot | may lack what was not flushed | it is whole; or all in sync forgot, and what is left counts |
//!
//! Counted are answered changes of each replica set, but those with FUA, which are durable. A flush covers
//! what was answered when it began. A loss is what was answered and not covered by a finished flush when the last
//! one forgot. Every client's flush that covers some of it fails, and those beside the first of them too: its
//! client may have asked them before it heard.

use super::image::{ImageIo, RequestKind, Set};
use super::{Event, IoError, NodeIndex, NodeMask};
use crate::rules::{Rule, broken};

/// What of a set's answered changes is durable, or gone.
#[derive(Default)]
pub(super) struct Memory {
    /// Nodes in sync that lost their power since they were level with the others.
    forgot: NodeMask,
    answered: u64,
    durable: u64,
    /// Changes above the first number and up to the second may be gone.
    lost: Option<(u64, u64)>,
}

impl Set {
    /// Gives how many changes may be gone, for the first time.
    fn judge_memory(&mut self) -> u64 {
        let memory = &mut self.memory;
        if self.in_sync.is_empty() || !self.in_sync.without(memory.forgot).is_empty() {
            return 0;
        }
        // From here on what they are made equal to is what was answered.
        memory.forgot = memory.forgot.without(self.in_sync);
        let changes = memory.answered - memory.durable;
        if changes > 0 {
            let from = memory.lost.map_or(memory.durable, |(from, _)| from);
            memory.lost = Some((from, memory.answered));
        }
        changes
    }
}

impl ImageIo {
    /// `node` greets; its host has this boot id.
    pub(super) fn heard_boot(&mut self, node: NodeIndex, boot: [u8; 16]) {
        let former = self.replica(node).boot.replace(boot);
        if former.is_none_or(|former| former == boot) {
            return;
        }
        // Also in sets that it is not in sync in: a healed node may have been taken in already.
        for set in &mut self.sets {
            set.memory.forgot = set.memory.forgot.with(NodeMask::one(node));
        }
        self.judge_memory();
    }

    /// Others are in sync, or have forgotten. Where a healed node may be in sync, it is not known yet who is.
    pub(super) fn judge_memory(&mut self) {
        let decided: Vec<usize> =
            (0..self.sets.len()).filter(|set| !self.is_undecided(*set)).collect();
        let changes: u64 = decided.into_iter().map(|set| self.sets[set].judge_memory()).sum();
        if changes > 0 {
            self.event(Event::WritesLost { changes });
        }
    }

    /// A heal of `node` begins, or is over: what it forgot before does not count.
    pub(super) fn remembers_anew(&mut self, node: NodeIndex) {
        for set in self.sets.iter_mut().filter(|set| !set.in_sync.has(node)) {
            set.memory.forgot = set.memory.forgot.without(NodeMask::one(node));
        }
    }

    /// Nodes that are whole have all that was answered; also where they are unfounded in another set.
    pub(super) fn whole_remember(&mut self) {
        let level = |node: &NodeIndex| self.replicas[usize::from(*node)].doubtful.is_empty();
        let level = self.up().iter().filter(level);
        let level = level.fold(NodeMask::EMPTY, |mask, node| mask.with(NodeMask::one(node)));
        for set in &mut self.sets {
            set.memory.forgot = set.memory.forgot.without(level.without(set.unfounded));
        }
    }

    /// What the holder before answered in these sets may be gone, while its clients are those of this one.
    pub fn former_writes_lost(&mut self, sets: &[usize]) {
        let chosen = self.sets.iter_mut().enumerate().filter(|(index, _)| sets.contains(index));
        for (_, set) in chosen {
            let memory = &mut set.memory;
            let from = memory.lost.map_or(memory.durable, |(from, _)| from);
            // As if one change had been answered, and lost.
            memory.answered += 1;
            memory.lost = Some((from, memory.answered));
        }
    }

    /// A change of this set is answered; `durable` where it was asked with FUA.
    pub(super) fn change_answered(&mut self, set: u32, durable: bool) {
        self.sets[set as usize].memory.answered += u64::from(!durable);
    }

    /// What of each set a flush covers that comes now.
    pub(super) fn flush_covers(&self) -> Vec<u64> {
        self.sets.iter().map(|set| set.memory.answered).collect()
    }

    /// A flush of `request` is done on all nodes: what it covers is durable, or its client hears that
    /// it may be gone.
    pub(super) fn flush_covered(&mut self, request: usize) {
        let told = self.requests[request].token.is_some();
        let covers = std::mem::take(&mut self.requests[request].covers);
        let mut loss = false;
        for (set, covered) in self.sets.iter_mut().zip(covers) {
            let memory = &mut set.memory;
            memory.durable = memory.durable.max(covered);
            if let Some((from, through)) = memory.lost.filter(|(from, _)| told && covered > *from) {
                loss = true;
                memory.lost = (covered < through).then_some((from.max(covered), through));
            }
        }
        if loss && !broken(Rule::LossIsTold) {
            let flushes = |request: &super::image::Request| {
                request.kind == RequestKind::Flush && request.token.is_some()
            };
            let beside = self.requests.iter_mut().filter(|(_, request)| flushes(request));
            beside.for_each(|(_, request)| request.error = Some(IoError::Io));
        }
    }
}
