//! The loop's part in pulls: it carries out what `pulls` wants of connections to other nodes, has the store
//! apply what they give, and tells holders what became of their orders.

use super::{EventLoop, PEER};
use crate::node::peers::PeerEvent;
use crate::node::pulls::{Effect, PullOrder};
use crate::node::requests::Requests;
use crate::wire::{Prefix, REPLY, flag, kind};
use bytes::Bytes;

impl EventLoop {
    pub(super) fn order_pull(&mut self, order: PullOrder) {
        self.pulls.order(order, self.now_ns);
        self.carry_out_pulls();
    }

    /// A peer's connection is ready.
    pub(super) fn peer_ready(&mut self, peer: u64) {
        self.pulls.heard(peer, self.now_ns);
        loop {
            let mut events = Vec::new();
            let more = self.peers.ready(&self.poller, peer, &self.identity, &mut events);
            events.into_iter().for_each(|event| self.peer_event(peer, event));
            self.land_pulls();
            if !more {
                return;
            }
        }
    }

    fn peer_event(&mut self, peer: u64, event: PeerEvent) {
        match event {
            PeerEvent::Greeted => self.pulls.greeted(peer, self.now_ns),
            PeerEvent::Ended => self.pulls.ended(peer, self.now_ns),
            PeerEvent::Frame(frame) => {
                if self.pulls.take(peer, frame).is_err() {
                    self.peers.close(&self.poller, peer);
                    self.pulls.ended(peer, self.now_ns);
                }
            }
        }
    }

    /// Applies the blocks that are here, as far as there is room.
    pub(super) fn land_pulls(&mut self) {
        let mut requests = Requests {
            store: &mut self.store,
            sessions: &mut self.sessions,
            scratch: &mut self.scratch,
            pulls: &mut self.pulls,
            connection: 0,
            memory: None,
        };
        let counters = &mut self.counters;
        requests.land_pulls(self.checkpoint_after_ns == 0, |status, bytes| {
            counters.pulled(status, bytes);
        });
        self.carry_out_pulls();
    }

    /// Does what is wanted of connections, and answers.
    pub(super) fn carry_out_pulls(&mut self) {
        while let Some(effect) = self.pulls.next_effect() {
            match effect {
                Effect::Connect { peer, source } => {
                    if self.peers.connect(&self.poller, PEER | peer, peer, source).is_err() {
                        self.pulls.ended(peer, self.now_ns);
                    }
                }
                Effect::Ask { peer, tag, asked } => self.peers.ask(peer, tag, &asked),
                Effect::Close { peer } => self.peers.close(&self.poller, peer),
            }
        }
        self.answer_pulls();
    }

    pub(super) fn answer_pulls(&mut self) {
        while let Some(answer) = self.pulls.answers.pop_front() {
            let PullOrder { connection, channel, tag, .. } = answer.order;
            let index = (connection & 0xffff_ffff) as usize;
            if self.connections.get(index).is_some_and(|c| c.id == connection) {
                let beside = answer.flags & flag::BESIDE_CLIENTS;
                let flags = self.clients_flag(kind::PULL) | beside;
                let kind = kind::PULL | REPLY;
                let prefix = Prefix { kind, flags, status: answer.status, channel, tag };
                self.answer(index, prefix, &answer.head, Bytes::new());
            }
        }
    }

    /// Sends what peers are asked.
    pub(super) fn flush_peers(&mut self) {
        for peer in self.peers.flush(&self.poller, |peer| PEER | peer) {
            self.pulls.ended(peer, self.now_ns);
        }
        self.carry_out_pulls();
    }
}
