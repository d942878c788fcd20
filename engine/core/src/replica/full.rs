//! Replica sets with too many full disks, where clients are to hear that rather than wait.
//!
//! Policy names the sets. What clients ask to be written there from then on is refused before any node
//! hears of it. A change that a node has refused already cannot be taken back from those that have it:
//! its client is answered, and it goes on as one whose client has gone. It keeps its blocks locked, so
//! that no read sees it come and go, is sent again until it is on every node in sync, and after an
//! unclean end it is levelled like any other that was not answered. A flush that waits for nodes to be level
//! fails as well: that takes room.

use super::image::{ImageIo, Phase, Request, RequestKind};
use super::{IoError, NodeIndex, NodeMask, Outcome, Output};

impl ImageIo {
    /// From now on the replica sets `refusing`, and only those, have no room for what clients write.
    pub fn refuse_writes(&mut self, refusing: &[usize]) {
        for (index, set) in self.sets.iter_mut().enumerate() {
            set.refuses = refusing.contains(&index);
        }
        if refusing.is_empty() {
            return;
        }
        let stuck = self.parts.iter().filter(|(id, _)| self.is_stuck(*id));
        let mut refused: Vec<usize> = stuck.map(|(_, part)| part.request).collect();
        let queued = self.requests.iter().filter(|(_, request)| {
            let waits = request.kind == RequestKind::Write && request.parts_left == 0;
            waits && self.has_no_room(request.offset, request.length)
        });
        refused.extend(queued.map(|(id, _)| id));
        refused.extend(&self.held_flushes);
        refused.into_iter().for_each(|id| self.refuse(id));
    }

    /// Whether clients are refused what they write in this range.
    pub(super) fn has_no_room(&self, offset: u64, length: u32) -> bool {
        self.refuses() && self.sets_of(offset, length).any(|set| set.refuses)
    }

    /// `node` has no room for a part.
    pub(super) fn found_full(&mut self, id: usize, node: NodeIndex) {
        self.parts[id].no_space = self.parts[id].no_space.with(NodeMask::one(node));
        if self.is_stuck(id) {
            self.refuse(self.parts[id].request);
        }
    }

    /// Whether there is a replica set without room.
    pub(super) fn refuses(&self) -> bool {
        self.sets.iter().any(|set| set.refuses)
    }

    /// Whether a part is a change that waits for room where clients do not.
    fn is_stuck(&self, id: usize) -> bool {
        let part = &self.parts[id];
        let set = &self.sets[part.set as usize];
        // What has to be made level first waits for room as well.
        let held_up = part.no_space.with(self.gated(part.shard));
        part.is_change() && set.refuses && !held_up.and(part.waiting).and(set.in_sync).is_empty()
    }

    /// Answers the client of a request, which goes on without it.
    pub(super) fn refuse(&mut self, id: usize) {
        let request = &mut self.requests[id];
        if let Some(token) = request.token.take() {
            request.error = Some(IoError::NoSpace);
            let outcome = Outcome::Failed(IoError::NoSpace);
            self.outputs.push_back(Output::Answer { token, outcome });
        }
        if self.phase == Phase::Closing {
            self.go_on_closing();
        }
    }
}

impl Request {
    /// Whether its client was told that there is no room for it.
    pub(super) fn is_refused(&self) -> bool {
        self.token.is_none() && self.error == Some(IoError::NoSpace)
    }
}
