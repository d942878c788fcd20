//! Connections of this node to other nodes, on which it asks for blocks. What is asked, and when one is made
//! or given up, `pulls` decides. TLS between members will have its place in `connect` and `ready`.

use super::Identity;
use crate::io::{Address, Filled, Poller, Sink, Stream};
use crate::wire::copies::{PeerFetch, Source};
use crate::wire::messages::{Head, Hello, HelloReply};
use crate::wire::{Frame, FrameReader, Prefix, REPLY, Status, VERSION, encode, kind};
use bytes::BytesMut;
use std::collections::BTreeMap;
use std::io;

/// Frames that are taken of a peer before others have their turn.
const FRAMES_IN_TURN: usize = 8;

/// What has come of a peer.
pub(super) enum PeerEvent {
    Greeted,
    Frame(Frame),
    /// Its connection is gone.
    Ended,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Connecting,
    Greeting,
    Ready,
}

struct Peer {
    stream: Stream,
    state: State,
    source: Source,
}

/// The connections, by the numbers that `pulls` knows them by.
#[derive(Default)]
pub(super) struct Peers {
    peers: BTreeMap<u64, Peer>,
    touched: Vec<u64>,
}

impl Peers {
    /// Begins a connection; its descriptor is registered under `token`.
    pub fn connect(
        &mut self,
        poller: &Poller,
        token: u64,
        peer: u64,
        source: Source,
    ) -> io::Result<()> {
        let mut stream = Stream::connect(&Address::Tcp(source.address))?;
        poller.add(stream.fd(), token, true)?;
        stream.registered(true);
        self.peers.insert(peer, Peer { stream, state: State::Connecting, source });
        Ok(())
    }

    /// Asks a peer that has greeted.
    pub fn ask(&mut self, peer: u64, tag: u64, asked: &PeerFetch) {
        if let Some(known) = self.peers.get_mut(&peer) {
            let prefix = Prefix::request(kind::PEER_FETCH, 0, 0, tag);
            push(&mut known.stream, prefix, asked);
            self.touched.push(peer);
        }
    }

    /// Gives a connection up.
    pub fn close(&mut self, poller: &Poller, peer: u64) {
        if let Some(known) = self.peers.remove(&peer) {
            // Closing the descriptor unregisters it; an error here changes nothing.
            let _ = poller.remove(known.stream.fd());
        }
    }

    /// The descriptor is ready, or there was more the last time; true: there may be more still.
    pub fn ready(
        &mut self,
        poller: &Poller,
        peer: u64,
        identity: &Identity,
        events: &mut Vec<PeerEvent>,
    ) -> bool {
        let Some(known) = self.peers.get_mut(&peer) else { return false };
        self.touched.push(peer);
        let more = match known.state {
            State::Connecting => known.greet(identity),
            _ => known.read(events),
        };
        more.unwrap_or_else(|_| {
            self.close(poller, peer);
            events.push(PeerEvent::Ended);
            false
        })
    }

    /// Writes what is queued; gives those whose connection is gone.
    pub fn flush(&mut self, poller: &Poller, token: impl Fn(u64) -> u64) -> Vec<u64> {
        let mut gone = Vec::new();
        for peer in std::mem::take(&mut self.touched) {
            let Some(known) = self.peers.get_mut(&peer) else { continue };
            if known.state == State::Connecting {
                continue;
            }
            let stream = &mut known.stream;
            let written = stream.flush();
            let registered = match (written, stream.interest_change(false)) {
                (Ok(()), Some((read, write))) => {
                    poller.change(stream.fd(), token(peer), read, write)
                }
                (written, _) => written,
            };
            if registered.is_err() {
                self.close(poller, peer);
                gone.push(peer);
            }
        }
        gone
    }
}

impl Peer {
    /// Connected: says who asks whom.
    fn greet(&mut self, identity: &Identity) -> io::Result<bool> {
        self.stream.connected()?;
        let hello = Hello {
            version_min: VERSION,
            version_max: VERSION,
            cluster: identity.cluster,
            gateway: identity.node.clone(),
            node: self.source.node.clone(),
        };
        push(&mut self.stream, Prefix::request(kind::HELLO, 0, 0, 0), &hello);
        self.state = State::Greeting;
        Ok(false)
    }

    fn read(&mut self, events: &mut Vec<PeerEvent>) -> io::Result<bool> {
        let broken = || io::Error::from(io::ErrorKind::InvalidData);
        let mut taken = 0;
        loop {
            while let Some(frame) =
                FrameReader::next(&mut self.stream.input).map_err(|_| broken())?
            {
                events.push(self.take(frame).ok_or_else(broken)?);
                taken += 1;
                if taken == FRAMES_IN_TURN {
                    return Ok(true);
                }
            }
            let missing = FrameReader::missing(&self.stream.input);
            match self.stream.fill(missing)? {
                Filled::Closed => return Err(io::ErrorKind::UnexpectedEof.into()),
                Filled::Drained if FrameReader::missing(&self.stream.input) > 0 => {
                    return Ok(false);
                }
                Filled::Drained | Filled::More => {}
            }
        }
    }

    /// None: no honest peer says this.
    fn take(&mut self, frame: Frame) -> Option<PeerEvent> {
        match self.state {
            State::Greeting if frame.kind == kind::HELLO | REPLY => {
                let hello = HelloReply::take(frame.head).ok()?;
                let meant = frame.status == Status::Ok && hello.node == self.source.node;
                self.state = State::Ready;
                meant.then_some(PeerEvent::Greeted)
            }
            State::Ready if frame.is_reply() => Some(PeerEvent::Frame(frame)),
            _ => None,
        }
    }
}

fn push(stream: &mut Stream, prefix: Prefix, head: &impl Head) {
    let mut out = BytesMut::new();
    encode(&mut out, prefix, 0, |bytes| head.put(bytes));
    stream.output().data(out.freeze());
}
