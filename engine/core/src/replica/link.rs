//! One connection to one node: connecting, HELLO, heartbeats, and trying again.
//!
//! A link that hears nothing for `LOST_NS` is ended. A pause of our own (the process was stopped) is
//! not the node's silence: `tick` grants a fresh second after one.

use crate::io::{Address, Filled, Poller, Sink, Stream};
use crate::wire::messages::{Head, Hello, HelloReply};
use crate::wire::{Frame, FrameReader, Prefix, REPLY, Status, VERSION, encode, kind};
use bytes::{Bytes, BytesMut};

const SECOND_NS: u64 = 1_000_000_000;
/// Heartbeat, declared lost, time to connect and greet, and between attempts.
const PING_NS: u64 = SECOND_NS;
const LOST_NS: u64 = 4 * SECOND_NS;
const CONNECT_NS: u64 = 2 * SECOND_NS;
const RETRY_NS: u64 = SECOND_NS / 10;

/// Where a node is, and as whom to ask it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkTarget {
    pub node: String,
    /// In order of preference: the unix socket of the same host first.
    pub addresses: Vec<Address>,
    pub cluster: [u8; 16],
    pub gateway: String,
}

/// What a link's owner has to hear.
#[derive(Debug)]
pub enum LinkEvent {
    Up(HelloReply),
    Frame(Frame),
    /// Ended; why. It connects again by itself.
    Down(String),
}

enum State {
    Idle { retry_at_ns: u64 },
    Connecting { stream: Stream, deadline_ns: u64 },
    Greeting { stream: Stream, deadline_ns: u64 },
    Ready { stream: Stream, heard_ns: u64, pinged_ns: u64 },
}

/// A link and its state.
pub struct Link {
    target: LinkTarget,
    token: u64,
    state: State,
    next_address: usize,
    pub hello: HelloReply,
}

impl Link {
    /// `token`: under which its descriptor is registered.
    pub fn new(target: LinkTarget, token: u64) -> Link {
        let state = State::Idle { retry_at_ns: 0 };
        Link { target, token, state, next_address: 0, hello: HelloReply::default() }
    }

    pub fn target(&self) -> &LinkTarget {
        &self.target
    }

    pub fn is_ready(&self) -> bool {
        matches!(self.state, State::Ready { .. })
    }

    /// Queues a frame on a ready link; on any other it is dropped, as on a connection that broke.
    pub fn push(&mut self, head: Bytes, payload: Bytes) {
        if let State::Ready { stream, .. } = &mut self.state {
            stream.output().data(head);
            stream.output().data(payload);
        }
    }

    /// Writes what is queued.
    pub fn flush(&mut self, poller: &Poller, now_ns: u64, events: &mut Vec<LinkEvent>) {
        let (State::Ready { stream, .. } | State::Greeting { stream, .. }) = &mut self.state else {
            return;
        };
        let written = stream.flush();
        let registered = match (written, stream.interest_change(false)) {
            (Ok(()), Some((read, write))) => poller.change(stream.fd(), self.token, read, write),
            (written, _) => written,
        };
        if let Err(error) = registered {
            self.end(poller, now_ns, error.to_string(), events);
        }
    }

    /// Time-driven work: connect, ping, notice silence. `paused`: our own loop stood still.
    pub fn tick(
        &mut self,
        poller: &Poller,
        now_ns: u64,
        paused: bool,
        events: &mut Vec<LinkEvent>,
    ) {
        match &mut self.state {
            State::Idle { retry_at_ns } if now_ns >= *retry_at_ns => self.connect(poller, now_ns),
            State::Idle { .. } => {}
            State::Connecting { deadline_ns, .. } | State::Greeting { deadline_ns, .. } => {
                if now_ns > *deadline_ns {
                    self.end(poller, now_ns, "no answer while connecting".into(), events);
                }
            }
            State::Ready { stream, heard_ns, pinged_ns } => {
                if paused {
                    *heard_ns = (*heard_ns).max(now_ns - (LOST_NS - SECOND_NS).min(now_ns));
                }
                let silent_ns = now_ns.saturating_sub(*heard_ns);
                if silent_ns > LOST_NS {
                    return self.end(poller, now_ns, "silent for 4 s".into(), events);
                }
                if silent_ns >= PING_NS / 2 && now_ns - *pinged_ns >= PING_NS {
                    *pinged_ns = now_ns;
                    let mut ping = BytesMut::new();
                    encode(&mut ping, Prefix::request(kind::PING, 0, 0, 0), 0, |_| {});
                    stream.output().data(ping.freeze());
                    self.flush(poller, now_ns, events);
                }
            }
        }
    }

    fn connect(&mut self, poller: &Poller, now_ns: u64) {
        let address = &self.target.addresses[self.next_address % self.target.addresses.len()];
        self.next_address += 1;
        let started = Stream::connect(address).and_then(|mut stream| {
            poller.add(stream.fd(), self.token, true)?;
            stream.registered(true);
            Ok(stream)
        });
        self.state = match started {
            Ok(stream) => State::Connecting { stream, deadline_ns: now_ns + CONNECT_NS },
            Err(_) => State::Idle { retry_at_ns: now_ns + RETRY_NS },
        };
    }

    /// The descriptor is ready.
    pub fn ready(&mut self, poller: &Poller, now_ns: u64, events: &mut Vec<LinkEvent>) {
        if let State::Connecting { stream, .. } = &self.state {
            if let Err(error) = stream.connected() {
                return self.end(poller, now_ns, error.to_string(), events);
            }
            self.greet(now_ns);
            return self.flush(poller, now_ns, events);
        }
        if let Err(why) = self.read(now_ns, events) {
            return self.end(poller, now_ns, why, events);
        }
        self.flush(poller, now_ns, events);
    }

    fn greet(&mut self, now_ns: u64) {
        let state = std::mem::replace(&mut self.state, State::Idle { retry_at_ns: 0 });
        let State::Connecting { mut stream, .. } = state else { return };
        let hello = Hello {
            version_min: VERSION,
            version_max: VERSION,
            cluster: self.target.cluster,
            gateway: self.target.gateway.clone(),
            node: self.target.node.clone(),
        };
        let mut out = BytesMut::new();
        encode(&mut out, Prefix::request(kind::HELLO, 0, 0, 0), 0, |head| hello.put(head));
        stream.output().data(out.freeze());
        self.state = State::Greeting { stream, deadline_ns: now_ns + CONNECT_NS };
    }

    fn read(&mut self, now_ns: u64, events: &mut Vec<LinkEvent>) -> Result<(), String> {
        loop {
            let (State::Ready { stream, .. } | State::Greeting { stream, .. }) = &mut self.state
            else {
                return Ok(());
            };
            let wanted = FrameReader::missing(&stream.input);
            let filled = stream.fill(wanted).map_err(|error| error.to_string())?;
            while let Some(frame) = self.next_frame()? {
                self.take(frame, now_ns, events)?;
            }
            match filled {
                Filled::Drained => return Ok(()),
                Filled::More => {}
                Filled::Closed => return Err("closed by the node".into()),
            }
        }
    }

    fn next_frame(&mut self) -> Result<Option<Frame>, String> {
        match &mut self.state {
            State::Ready { stream, .. } | State::Greeting { stream, .. } => {
                FrameReader::next(&mut stream.input).map_err(|error| error.to_string())
            }
            _ => Ok(None),
        }
    }

    fn take(
        &mut self,
        frame: Frame,
        now_ns: u64,
        events: &mut Vec<LinkEvent>,
    ) -> Result<(), String> {
        if !frame.is_reply() {
            return Err("the node asks instead of answering".into());
        }
        if let State::Ready { heard_ns, .. } = &mut self.state {
            *heard_ns = now_ns;
            if frame.kind != kind::PING | REPLY {
                events.push(LinkEvent::Frame(frame));
            }
            return Ok(());
        }
        if frame.kind != kind::HELLO | REPLY {
            return Err("the node does not greet".into());
        }
        match frame.status {
            Status::Ok => {}
            Status::Version => return Err("the node speaks another protocol version".into()),
            Status::WrongCluster => return Err("the node belongs to another cluster".into()),
            Status::WrongNode => return Err("another node answers at this address".into()),
            status => return Err(format!("the node refuses: {status:?}")),
        }
        let hello = HelloReply::take(frame.head).map_err(|_| "malformed greeting".to_string())?;
        let state = std::mem::replace(&mut self.state, State::Idle { retry_at_ns: 0 });
        if let State::Greeting { stream, .. } = state {
            self.state = State::Ready { stream, heard_ns: now_ns, pinged_ns: now_ns };
        }
        self.next_address = 0;
        self.hello = hello.clone();
        events.push(LinkEvent::Up(hello));
        Ok(())
    }

    /// Ends the connection; a ready one's owner is told.
    pub fn end(&mut self, poller: &Poller, now_ns: u64, why: String, events: &mut Vec<LinkEvent>) {
        let retry_at_ns = now_ns + RETRY_NS;
        match std::mem::replace(&mut self.state, State::Idle { retry_at_ns }) {
            State::Idle { .. } => {}
            State::Ready { stream, .. } => {
                // Closing the descriptor unregisters it; an error here changes nothing.
                let _ = poller.remove(stream.fd());
                events.push(LinkEvent::Down(why));
            }
            State::Connecting { stream, .. } | State::Greeting { stream, .. } => {
                let _ = poller.remove(stream.fd());
            }
        }
    }
}
