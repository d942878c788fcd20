//! Frames in flight that no client asked for, and what each was for.

use super::NodeIndex;
use slab::Slab;

/// Set in the tags of such frames, and in no tag of a client's request.
const ASK_TAG: u64 = 1 << 63;

/// Whether a tag is of such a frame.
pub(super) fn is_ask(tag: u64) -> bool {
    tag & ASK_TAG != 0
}

/// What one undertaking has in flight. A new one has another serial: answers to the former are no longer
/// known.
pub(super) struct Asks<A> {
    serial: u64,
    waiting: Slab<(NodeIndex, A)>,
}

impl<A> Asks<A> {
    pub fn new(serial: u32) -> Asks<A> {
        Asks { serial: u64::from(serial & 0x7fff_ffff), waiting: Slab::new() }
    }

    /// The tag under which `node` is asked.
    pub fn add(&mut self, node: NodeIndex, ask: A) -> u64 {
        ASK_TAG | self.serial << 32 | self.waiting.insert((node, ask)) as u64
    }

    /// What `node` answers with `tag`; none where it was not asked, or not by this undertaking.
    pub fn take(&mut self, node: NodeIndex, tag: u64) -> Option<A> {
        let id = (tag & 0xffff_ffff) as usize;
        let ours = is_ask(tag) && (tag & !ASK_TAG) >> 32 == self.serial;
        let known = self.waiting.get(id).is_some_and(|(asked, _)| *asked == node);
        (ours && known).then(|| self.waiting.remove(id).1)
    }

    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}
