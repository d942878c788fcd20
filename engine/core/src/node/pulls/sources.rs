//! The nodes that pulls are asked of, as far as their connections go. Without I/O.
//!
//! | a peer is | meaning | leaves by |
//! | --- | --- | --- |
//! | `Greeting` | a connection is being made | its greeting → `Ready`; 2 s → `Resting` |
//! | `Ready` | it may be asked | 4 s of silence with something asked → `Resting`; 30 s without a pull → gone |
//! | `Resting` | it could not be reached: nobody tries for a second | time → gone |
//!
//! Who has something asked of it, `Pulls` knows, and says where that decides.

use crate::wire::copies::{PeerFetch, Source};
use std::collections::{BTreeMap, VecDeque};

/// Nodes that are asked, or were and are remembered.
pub(super) const PEERS_MAX: usize = 16;

const SECOND_NS: u64 = 1_000_000_000;
/// Time to connect and greet, of silence with something asked, without a pull, and between attempts.
pub(super) const CONNECT_NS: u64 = 2 * SECOND_NS;
pub(super) const SILENCE_NS: u64 = 4 * SECOND_NS;
pub(super) const IDLE_NS: u64 = 30 * SECOND_NS;
pub(super) const REST_NS: u64 = SECOND_NS;

/// What is to be done with connections to other nodes; `peer` names one.
#[derive(Debug)]
pub(crate) enum Effect {
    /// Make a connection and greet.
    Connect {
        peer: u64,
        source: Source,
    },
    Ask {
        peer: u64,
        tag: u64,
        asked: PeerFetch,
    },
    Close {
        peer: u64,
    },
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum PeerState {
    Greeting { deadline_ns: u64 },
    Ready { heard_ns: u64 },
    Resting { until_ns: u64 },
}

struct Peer {
    source: Source,
    state: PeerState,
    /// When something was last asked of it.
    used_ns: u64,
    /// Answers that it owes, also of what was dropped meanwhile.
    owed: u32,
}

/// All of them, and what is to be done with their connections.
#[derive(Default)]
pub(super) struct Sources {
    peers: BTreeMap<u64, Peer>,
    serial: u32,
    pub effects: VecDeque<Effect>,
}

impl Sources {
    /// The peer that stands for `source`, a new one where there is none; none where it cannot be asked now.
    pub fn peer_of(
        &mut self,
        source: &Source,
        now_ns: u64,
        is_asked: impl Fn(u64) -> bool,
    ) -> Option<u64> {
        let known = self.peers.iter_mut().find(|(_, peer)| peer.source == *source);
        if let Some((id, peer)) = known {
            match peer.state {
                PeerState::Resting { until_ns } if now_ns < until_ns => return None,
                PeerState::Resting { .. } => {
                    let former = *id;
                    self.peers.remove(&former);
                }
                PeerState::Ready { heard_ns } => {
                    // Silence counts from when something is asked.
                    let heard_ns = if is_asked(*id) { heard_ns } else { heard_ns.max(now_ns) };
                    (peer.state, peer.used_ns) = (PeerState::Ready { heard_ns }, now_ns);
                    return Some(*id);
                }
                PeerState::Greeting { .. } => return Some(*id),
            }
        }
        self.make_room(is_asked);
        if self.peers.len() >= PEERS_MAX {
            return None;
        }
        // A number of 32 bits: the loop's descriptors have no room for more. Who has come round meets nobody.
        self.serial = self.serial.wrapping_add(1);
        let peer = u64::from(self.serial);
        let state = PeerState::Greeting { deadline_ns: now_ns + CONNECT_NS };
        let source = source.clone();
        self.effects.push_back(Effect::Connect { peer, source: source.clone() });
        self.peers.insert(peer, Peer { source, state, used_ns: now_ns, owed: 0 });
        Some(peer)
    }

    /// Forgets the peer that has been of no use for longest, where there are too many.
    fn make_room(&mut self, is_asked: impl Fn(u64) -> bool) {
        if self.peers.len() < PEERS_MAX {
            return;
        }
        let free = self.peers.iter().filter(|(id, _)| !is_asked(**id));
        let oldest = free.min_by_key(|(_, peer)| peer.used_ns).map(|(id, _)| *id);
        if let Some(peer) = oldest {
            self.forget(peer);
        }
    }

    fn forget(&mut self, peer: u64) {
        let Some(former) = self.peers.remove(&peer) else { return };
        if !matches!(former.state, PeerState::Resting { .. }) {
            self.effects.push_back(Effect::Close { peer });
        }
    }

    /// Asks a peer that has greeted; of another nothing is asked yet.
    pub fn ask(&mut self, peer: u64, tag: u64, asked: PeerFetch) {
        let Some(known) = self.peers.get_mut(&peer) else { return };
        if matches!(known.state, PeerState::Ready { .. }) {
            known.owed += 1;
            self.effects.push_back(Effect::Ask { peer, tag, asked });
        }
    }

    /// The peer has greeted.
    pub fn greeted(&mut self, peer: u64, now_ns: u64) {
        if let Some(known) = self.peers.get_mut(&peer) {
            known.state = PeerState::Ready { heard_ns: now_ns };
        }
    }

    /// Bytes have come of the peer.
    pub fn heard(&mut self, peer: u64, now_ns: u64) {
        if let Some(PeerState::Ready { heard_ns }) = self.peers.get_mut(&peer).map(|p| &mut p.state)
        {
            *heard_ns = now_ns;
        }
    }

    /// The peer answers something; false: it owed nothing.
    pub fn answered(&mut self, peer: u64) -> bool {
        let known = self.peers.get_mut(&peer).filter(|known| known.owed > 0);
        known.map(|known| known.owed -= 1).is_some()
    }

    /// The connection to the peer is gone, or was never made; false: it is not known.
    pub fn ended(&mut self, peer: u64, now_ns: u64) -> bool {
        let Some(known) = self.peers.get_mut(&peer) else { return false };
        known.state = PeerState::Resting { until_ns: now_ns + REST_NS };
        true
    }

    /// Time has passed. Gives peers that are silent for too long: their connections are to end.
    pub fn tick(&mut self, now_ns: u64, is_asked: impl Fn(u64) -> bool) -> Vec<u64> {
        let (mut late, mut idle) = (Vec::new(), Vec::new());
        for (id, peer) in &self.peers {
            let asked = is_asked(*id);
            match peer.state {
                PeerState::Greeting { deadline_ns } if now_ns > deadline_ns => late.push(*id),
                PeerState::Ready { heard_ns } if asked && now_ns > heard_ns + SILENCE_NS => {
                    late.push(*id);
                }
                PeerState::Ready { .. } if !asked && now_ns > peer.used_ns + IDLE_NS => {
                    idle.push(*id);
                }
                PeerState::Resting { until_ns } if now_ns > until_ns => idle.push(*id),
                _ => {}
            }
        }
        late.iter().for_each(|peer| self.effects.push_back(Effect::Close { peer: *peer }));
        idle.into_iter().for_each(|peer| self.forget(peer));
        late
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.peers.len()
    }
}
