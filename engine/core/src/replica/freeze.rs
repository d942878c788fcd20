//! Freeze: what a snapshot needs of an image. The record gets a new layer on top, and what was the top never
//! changes again. So it has to be the same on all nodes in sync, durably, before the record says so.
//!
//! | stage | what goes on | left by |
//! | --- | --- | --- |
//! | `Settling` | the nodes in sync sync what was answered so far, and nobody waits | they have: `Event::Holding` |
//! | `Draining` | what clients change or flush waits; changes that were asked before are answered | none is left |
//! | `Flushing` | the nodes in sync sync the little that came since | they have: `Event::Frozen` |
//! | `Frozen` | policy changes the record | `reconfigure` with other layers, `thaw` |
//! | `Storing` | the nodes in sync store it | those of a replica set have: its changes go on |
//!
//! Reads go on all the time. A node that is lost ends the first three stages, as does time: what waited goes
//! on, and policy may try again.
//!
//! Invariants, asserted here:
//! - no change is in flight when the layers change, so none is sent again under other layers than those
//!   that a node may have it in already;
//! - from `Event::Frozen` on only policy ends the freeze: the record may be durable at any moment, whatever
//!   the holder has heard of it.

use super::image::{ImageIo, Phase, RequestKind, Set};
use super::{Event, IoError, Outcome, Output};
use crate::geometry::LayerId;
use crate::rules::{Rule, broken};

/// Clients wait no longer than this for nodes to answer and to sync.
const PATIENCE_NS: u64 = 2_000_000_000;
/// So long nodes may take to sync while nobody waits: up to what an image is flushed by itself after.
const SETTLING_NS: u64 = 30_000_000_000;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Settling { request: usize },
    Draining,
    Flushing { request: usize },
    Frozen,
    Storing,
}

/// The freeze under way.
#[derive(Clone, Copy)]
pub(super) struct Freeze {
    /// Given back in its events.
    attempt: u64,
    stage: Stage,
    /// When that began for which there is a limit: to settle, or to hold clients back.
    since_ns: u64,
}

impl Freeze {
    /// Whether policy has not been told yet that nothing changes.
    fn is_young(&self) -> bool {
        matches!(self.stage, Stage::Settling { .. } | Stage::Draining | Stage::Flushing { .. })
    }

    fn patience_ns(&self) -> u64 {
        if matches!(self.stage, Stage::Settling { .. }) { SETTLING_NS } else { PATIENCE_NS }
    }
}

impl ImageIo {
    /// Has what clients change wait until nothing is in flight and all is durable on the nodes in sync. One
    /// of `Event::Frozen` and `Event::FreezeFailed` tells how that went.
    pub fn freeze(&mut self, attempt: u64) {
        let level = self.in_sync_anywhere().without(self.whole()).is_empty();
        let why = match self.phase {
            Phase::Running if self.freeze.is_some() => "another snapshot is being taken",
            Phase::Running if !level => "a node in sync is away or not level",
            Phase::Running => return self.settle(attempt),
            _ => "the image is not served",
        };
        self.event(Event::FreezeFailed { attempt, why });
    }

    /// Has what was answered so far synced, so that clients wait for what comes until then only.
    fn settle(&mut self, attempt: u64) {
        let (stage, since_ns) = (Stage::Draining, self.now_ns);
        self.freeze = Some(Freeze { attempt, stage, since_ns });
        if broken(Rule::SnapshotsAreFlushed) {
            return self.hold();
        }
        let request = self.own_request(RequestKind::Flush, 0, 0);
        self.enter_stage(Stage::Settling { request });
        self.start(request);
    }

    /// From now on clients wait.
    fn hold(&mut self) {
        self.enter_stage(Stage::Draining);
        if let Some(freeze) = &mut self.freeze {
            freeze.since_ns = self.now_ns;
            let attempt = freeze.attempt;
            self.event(Event::Holding { attempt });
        }
        self.go_on_freezing();
    }

    /// What waits goes on as before, if that freeze has not led to other layers.
    pub fn thaw(&mut self, attempt: u64) {
        if self.freeze.is_some_and(|f| f.attempt == attempt && f.stage != Stage::Storing) {
            self.end_freeze();
        }
    }

    /// Whether what a client asks has to wait for the end of a freeze.
    fn is_held_back(&self, kind: RequestKind, offset: u64, length: u32) -> bool {
        let changes = matches!(kind, RequestKind::Write | RequestKind::Zero);
        match self.freeze.map(|freeze| freeze.stage) {
            None | Some(Stage::Settling { .. }) => false,
            // A set whose nodes are away is not waited for by the others.
            Some(Stage::Storing) => {
                changes && self.sets_of(offset, length).any(|set| !set.storing.is_empty())
            }
            Some(_) => changes || kind == RequestKind::Flush,
        }
    }

    /// Keeps a client's request back where a freeze is under way; false: it may begin.
    pub(super) fn hold_back(&mut self, id: usize) -> bool {
        let request = &self.requests[id];
        let held = self.is_held_back(request.kind, request.offset, request.length);
        if held {
            self.held_back.push(id);
        }
        held
    }

    /// The replica sets that a range of the image lies in.
    pub(super) fn sets_of(&self, offset: u64, length: u32) -> impl Iterator<Item = &Set> {
        let (geometry, sets) = (self.spec.geometry, &self.sets);
        let shard_bytes = u64::from(geometry.shard_bytes);
        let end = (offset + u64::from(length)).div_ceil(shard_bytes);
        let first = if length == 0 { end } else { offset / shard_bytes };
        (first..end).map(move |shard| &sets[geometry.replica_set_of(shard) as usize])
    }

    /// Goes to the next stage where that can be.
    fn go_on_freezing(&mut self) {
        let draining = self.freeze.is_some_and(|freeze| freeze.stage == Stage::Draining);
        if !draining || !self.is_drained() && !broken(Rule::SnapshotsWaitForWrites) {
            return;
        }
        if broken(Rule::SnapshotsAreFlushed) {
            return self.is_frozen();
        }
        let request = self.own_request(RequestKind::Flush, 0, 0);
        self.enter_stage(Stage::Flushing { request });
        self.start(request);
    }

    fn enter_stage(&mut self, stage: Stage) {
        if let Some(freeze) = &mut self.freeze {
            freeze.stage = stage;
        }
    }

    /// Whether every change that clients asked for is answered, but for those that are held back.
    fn is_drained(&self) -> bool {
        let changes =
            |id: usize| matches!(self.requests[id].kind, RequestKind::Write | RequestKind::Zero);
        let asked = self.requests.iter().filter(|(id, _)| changes(*id)).count();
        asked == self.held_back.iter().filter(|id| changes(**id)).count()
    }

    /// A request is over.
    pub(super) fn freeze_after(&mut self, request: usize) {
        match self.freeze.map(|freeze| freeze.stage) {
            Some(Stage::Settling { request: flush }) if flush == request => self.hold(),
            Some(Stage::Draining) => self.go_on_freezing(),
            Some(Stage::Flushing { request: flush }) if flush == request => self.is_frozen(),
            _ => {}
        }
    }

    fn is_frozen(&mut self) {
        self.enter_stage(Stage::Frozen);
        if let Some(Freeze { attempt, .. }) = self.freeze {
            self.event(Event::Frozen { attempt });
        }
    }

    fn end_freeze(&mut self) {
        self.freeze = None;
        self.let_go_on();
    }

    /// What no longer has to wait begins, in order of arrival.
    fn let_go_on(&mut self) {
        for id in std::mem::take(&mut self.held_back) {
            if !self.hold_back(id) {
                let request = &self.requests[id];
                self.enter(id, request.kind, request.offset, request.length);
            }
        }
    }

    /// Gives up where policy may still hear so.
    pub(super) fn fail_freeze(&mut self, why: &'static str) {
        if let Some(Freeze { attempt, .. }) = self.freeze.filter(Freeze::is_young) {
            self.event(Event::FreezeFailed { attempt, why });
            self.end_freeze();
        }
    }

    /// Whether time limits what goes on.
    pub(super) fn is_freezing(&self) -> bool {
        self.freeze.is_some_and(|freeze| freeze.is_young())
    }

    /// Time has passed.
    pub(super) fn limit_freeze(&mut self) {
        let passed_ns = |freeze: Freeze| self.now_ns.saturating_sub(freeze.since_ns);
        let late = |freeze: Freeze| passed_ns(freeze) > freeze.patience_ns();
        if self.freeze.is_some_and(late) {
            self.fail_freeze("nodes took too long to answer and to sync");
        }
    }

    /// The record has other layers.
    pub(super) fn change_layers(&mut self, layers: &[LayerId]) {
        self.spec.layers = layers.to_vec();
        if self.phase == Phase::Opening {
            return;
        }
        let frozen = self.freeze.is_some_and(|freeze| freeze.stage == Stage::Frozen);
        assert!(frozen, "layers change while the image is frozen");
        let idle = self.unanswered.is_empty() || broken(Rule::SnapshotsWaitForWrites);
        assert!(idle, "a change is in flight as the layers change");
        self.enter_stage(Stage::Storing);
    }

    /// Nodes have stored a record: where that was all that was waited for, changes go on.
    pub(super) fn thaw_stored(&mut self) {
        if self.freeze.is_none_or(|freeze| freeze.stage != Stage::Storing) {
            return;
        }
        if self.sets.iter().all(|set| set.storing.is_empty()) {
            self.freeze = None;
        }
        self.let_go_on();
    }

    /// The image closes. Once policy knows of the freeze nothing may change before it says so: what waits
    /// is not done.
    pub(super) fn close_freeze(&mut self) {
        self.fail_freeze("the image is being closed");
        if self.freeze.is_none_or(|freeze| freeze.stage != Stage::Frozen) {
            return;
        }
        for id in std::mem::take(&mut self.held_back) {
            if let Some(token) = self.requests.remove(id).token {
                let outcome = Outcome::Failed(IoError::Shutdown);
                self.outputs.push_back(Output::Answer { token, outcome });
            }
        }
    }

    /// The image is given up, with all that waits.
    pub(super) fn kill_freeze(&mut self) {
        self.held_back.clear();
        self.fail_freeze("the image was given up");
        self.freeze = None;
    }
}
