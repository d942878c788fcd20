//! Asking nodes which of the layers that are being merged they have emptied: when all have, policy takes these
//! out of the record. It works on nodes in any state, stale ones too, and changes nothing.

use super::image::{ImageIo, Phase, ReplicaState};
use super::replies::BadReply;
use super::{Event, NodeIndex};
use crate::wire::messages::{Head, PeekReply};
use crate::wire::{Frame, Status, kind};
use bytes::Bytes;

/// The tag of such a PEEK. That of an admission is 0.
pub(super) const EMPTIED: u64 = 1;

impl ImageIo {
    /// Asks every node that is connected; each answer is an `Event::Emptied`.
    pub fn ask_emptied(&mut self) {
        if self.phase == Phase::Dead {
            return;
        }
        let nodes = self.nodes_in(|state| state != ReplicaState::Down);
        let head = self.peek_head();
        self.send(nodes, kind::PEEK, 0, EMPTIED, &Bytes::new(), |out| head.put(out));
    }

    pub(super) fn take_emptied(&mut self, node: NodeIndex, frame: Frame) -> Result<(), BadReply> {
        let layers = match frame.status {
            Status::Ok => {
                PeekReply::take(frame.head).map_err(|_| BadReply("malformed peek"))?.emptied
            }
            // It has nothing at all.
            Status::NoRecord | Status::NoParent => self.spec.merging.clone(),
            _ => return Ok(()),
        };
        self.event(Event::Emptied { node, layers });
        Ok(())
    }
}
