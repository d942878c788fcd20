//! Whose connection it is, and what may come over it.

use crate::wire::kind;

/// Whose connection it is: the first request on it tells.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum Asker {
    #[default]
    Unknown,
    Gateway,
    /// Another node, which asks for blocks and for nothing else.
    Peer,
}

impl Asker {
    /// Whether a request of this kind may come here.
    pub fn may_ask(&mut self, frame_kind: u8) -> bool {
        let by = if frame_kind == kind::PEER_FETCH { Asker::Peer } else { Asker::Gateway };
        if *self == Asker::Unknown {
            *self = by;
        }
        *self == by
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_is_of_a_gateway_or_of_a_peer() {
        let (mut gateway, mut peer) = (Asker::default(), Asker::default());
        assert!(gateway.may_ask(kind::PING) && !gateway.may_ask(kind::PEER_FETCH));
        assert!(peer.may_ask(kind::PEER_FETCH) && !peer.may_ask(kind::PING));
        assert!(gateway.may_ask(kind::COPY) && peer.may_ask(kind::PEER_FETCH));
    }
}
