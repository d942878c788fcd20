//! Sessions: who may ask what of which image over which connection.
//!
//! One image has one session of a holder. A new one, or a record of a higher epoch, ends the older: its
//! requests are refused from then on, those that wait for room in the log included. Beside it there may be
//! any number of readers of frozen layers, which no holder ends.

use crate::geometry::{ImageId, SnapshotId};
use std::collections::HashMap;

/// Readers of one connection.
const READERS_MAX: usize = 4096;

/// A holder's session on a channel of a connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Session {
    pub image: ImageId,
    pub epoch: u64,
}

/// A session that reads a snapshot.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reader {
    pub image: ImageId,
    pub snapshot: SnapshotId,
}

/// All sessions of a node. Connections have ids that are never reused.
#[derive(Default)]
pub(crate) struct Sessions {
    by_channel: HashMap<(u64, u32), Session>,
    of_image: HashMap<ImageId, (u64, u32)>,
    readers: HashMap<(u64, u32), Reader>,
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
        self.readers.remove(&(connection, channel));
        self.of_image.insert(session.image, (connection, channel));
        self.by_channel.insert((connection, channel), session);
        true
    }

    /// Begins a reader's session; false: the connection has too many.
    pub(crate) fn begin_reader(&mut self, connection: u64, channel: u32, reader: Reader) -> bool {
        let others =
            self.readers.keys().filter(|(of, other)| *of == connection && *other != channel);
        let room = others.count() < READERS_MAX;
        if room {
            self.readers.insert((connection, channel), reader);
        }
        room
    }

    /// The session, and whether it is the image's current one.
    pub(crate) fn get(&self, connection: u64, channel: u32) -> Option<(&Session, bool)> {
        let session = self.by_channel.get(&(connection, channel))?;
        let current = self.of_image.get(&session.image) == Some(&(connection, channel));
        Some((session, current))
    }

    /// The reader on that channel.
    pub(crate) fn reader(&self, connection: u64, channel: u32) -> Option<&Reader> {
        self.readers.get(&(connection, channel))
    }

    pub(crate) fn end(&mut self, connection: u64, channel: u32) {
        self.readers.remove(&(connection, channel));
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
        self.readers.retain(|(other, _), _| *other != connection);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(epoch: u64) -> Session {
        Session { image: ImageId([1; 16]), epoch }
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

    #[test]
    fn readers_of_a_connection_are_bounded_and_end_with_it() {
        let mut sessions = Sessions::default();
        let snapshot = SnapshotId { layer: 1, generation: 2 };
        let reader = || Reader { image: ImageId([1; 16]), snapshot };
        for channel in 0..READERS_MAX as u32 {
            assert!(sessions.begin_reader(1, channel, reader()));
        }
        assert!(!sessions.begin_reader(1, u32::MAX, reader()));
        assert!(sessions.begin_reader(1, 0, reader()), "one that is there attaches anew");
        assert!(sessions.begin_reader(2, 0, reader()));
        sessions.connection_ended(1);
        assert!(sessions.reader(1, 0).is_none() && sessions.reader(2, 0).is_some());
    }
}
