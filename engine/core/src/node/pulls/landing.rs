//! How blocks that were pulled are applied, between the requests of the node's connections.

use crate::node::requests::{Outcome, Requests};
use crate::wire::Status;
use bytes::Bytes;

impl Requests<'_> {
    /// Applies the blocks that are here, as far as there is room in the log. `room_comes`: what finds none waits
    /// for it, else it is refused. `ended` hears of each pull that is over, and how much it brought.
    pub(crate) fn land_pulls(&mut self, room_comes: bool, mut ended: impl FnMut(Status, u64)) {
        let mut from = 0;
        while let Some((tag, order, given)) = self.pulls.landed(from) {
            from = tag + 1;
            let (order, given) = (order.clone(), given.clone());
            self.connection = order.connection;
            let (status, head) = match self.land(&order, &given) {
                Outcome::Answer { status, head, .. } => (status, head),
                // Those behind it would find no room either.
                Outcome::Park if room_comes => break,
                _ => (Status::NoSpace, Bytes::new()),
            };
            ended(status, given.payload.len() as u64);
            self.pulls.end(tag, status, head, given.flags);
        }
    }
}
