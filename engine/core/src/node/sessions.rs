//! Sessions: which holder may change which image over which connection.
//!
//! One image has one session. A new one, or a record of a higher epoch, ends the older: its requests
//! are refused from then on, those that wait for room in the log included.

use crate::geometry::{ImageId, LayerId};
use std::collections::HashMap;

/// One image's session on a channel of a connection.
#[derive(Clone, Debug)]
pub(crate) struct Session {
    pub image: ImageId,
    pub epoch: u64,
    pub layers: Vec<LayerId>,
}

/// All sessions of a node. Connections have ids that are never reused.
#[derive(Default)]
pub(crate) struct Sessions {
    by_channel: HashMap<(u64, u32), Session>,
    of_image: HashMap<ImageId, (u64, u32)>,
}

impl Sessions {
    /// Begins a session and ends the image's older one.
    ///
    /// False, and nothing changes: the holder has one on a later connection, and this is a late word
    /// from one that it has given up.
    pub(crate) fn begin(&mut self, connection: u64, channel: u32, session: Session) -> bool {
        if let Some(at) = self.of_image.get(&session.image).copied() {
            let current = self.by_channel.get(&at);
            if at.0 > connection && current.is_some_and(|current| current.epoch >= session.epoch) {
                return false;
            }
            // On another connection it stays known, to be told by whom it was replaced.
            if at.0 == connection {
                self.by_channel.remove(&at);
            }
        }
        self.of_image.insert(session.image, (connection, channel));
        self.by_channel.insert((connection, channel), session);
        true
    }

    /// The session, and whether it is the image's current one.
    pub(crate) fn get(&self, connection: u64, channel: u32) -> Option<(&Session, bool)> {
        let session = self.by_channel.get(&(connection, channel))?;
        let current = self.of_image.get(&session.image) == Some(&(connection, channel));
        Some((session, current))
    }

    pub(crate) fn end(&mut self, connection: u64, channel: u32) {
        if let Some(session) = self.by_channel.remove(&(connection, channel))
            && self.of_image.get(&session.image) == Some(&(connection, channel))
        {
            self.of_image.remove(&session.image);
        }
    }

    /// Ends whatever session the image has below `epoch`.
    pub(crate) fn fence(&mut self, image: &ImageId, epoch: u64) {
        let Some(at) = self.of_image.get(image) else { return };
        if self.by_channel.get(at).is_none_or(|session| session.epoch < epoch) {
            self.of_image.remove(image);
        }
    }

    pub(crate) fn connection_ended(&mut self, connection: u64) {
        self.by_channel.retain(|(other, _), _| *other != connection);
        self.of_image.retain(|_, (other, _)| *other != connection);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(epoch: u64) -> Session {
        Session { image: ImageId([1; 16]), epoch, layers: vec![1] }
    }

    #[test]
    fn a_new_session_ends_the_older_one() {
        let mut sessions = Sessions::default();
        assert!(sessions.begin(1, 7, session(3)));
        assert!(sessions.begin(2, 9, session(3)));
        assert!(sessions.get(1, 7).is_some_and(|(_, current)| !current));
        assert!(sessions.get(2, 9).is_some_and(|(_, current)| current));
    }

    /// A holder attached anew; its word on the former connection arrived after that, took the session
    /// back, and every request on the living connection was refused from then on.
    #[test]
    fn a_late_attach_on_an_older_connection_ends_nothing() {
        let mut sessions = Sessions::default();
        assert!(sessions.begin(1, 7, session(3)));
        assert!(sessions.begin(2, 7, session(3)));
        assert!(!sessions.begin(1, 7, session(3)));
        assert!(sessions.get(2, 7).is_some_and(|(_, current)| current));
        assert!(sessions.begin(1, 8, session(4)), "a new holder's connection may be the older one");
    }

    #[test]
    fn a_higher_epoch_fences_the_session_below_it() {
        let mut sessions = Sessions::default();
        assert!(sessions.begin(1, 7, session(3)));
        sessions.fence(&ImageId([1; 16]), 3);
        assert!(sessions.get(1, 7).is_some_and(|(_, current)| current));
        sessions.fence(&ImageId([1; 16]), 4);
        assert!(sessions.get(1, 7).is_some_and(|(_, current)| !current));
    }
}
