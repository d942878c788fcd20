//! One connection to one node: connecting, HELLO, heartbeats, and trying again.
//!
//! A link that hears nothing for `LOST_NS` is ended. A pause of our own (the process was stopped) is
//! not the node's silence: `tick` grants a fresh second after one.

use crate::io::{Address, Filled, Poller, Sink, Slot, Slots, Stream};
use crate::wire::messages::{Head, Hello, HelloReply, IO_BYTES, Io, IoInto, data_bytes};
use crate::wire::{
    Frame, FrameReader, PAYLOAD_BYTES_MAX, PREFIX_BYTES, Prefix, REPLY, Status, VERSION, decode,
    encode, kind,
};
use bytes::{Bytes, BytesMut};
use rustix::fd::AsFd;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::SocketAddr;

const SECOND_NS: u64 = 1_000_000_000;
/// Heartbeat, declared lost, time to connect and greet, and between attempts.
const PING_NS: u64 = SECOND_NS;
const LOST_NS: u64 = 4 * SECOND_NS;
const CONNECT_NS: u64 = 2 * SECOND_NS;
const RETRY_NS: u64 = SECOND_NS / 10;
/// Reads of this size and more come through memory; below it a socket is as quick.
const IN_MEMORY_FROM: u32 = 16 << 10;
/// So many may be under way, or on their way to clients, before others take the socket again.
const SLOTS: u32 = 64;
/// Frames that are taken before their owner carries out what they mean, so that a client has the first
/// answers, and works on, while the others are looked at.
const FRAMES_IN_TURN: usize = 8;

/// Where a node is, and as whom to ask it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkTarget {
    pub node: String,
    /// In order of preference: the unix socket of the same host first.
    pub addresses: Vec<Address>,
    pub cluster: [u8; 16],
    pub gateway: String,
}

impl LinkTarget {
    /// Where other hosts reach the node.
    pub fn tcp(&self) -> Option<SocketAddr> {
        self.addresses.iter().find_map(|address| match address {
            Address::Tcp(address) => Some(*address),
            Address::Unix(_) => None,
        })
    }
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
    Ready { stream: Stream, heard_ns: u64, pinged_ns: u64, memory: Memory },
}

/// Where a node of this host puts the data of larger reads.
#[derive(Default)]
struct Memory {
    /// None over TCP, and where the node has not taken it.
    slots: Option<Slots>,
    taken: bool,
    /// Reads under way, by channel and tag.
    reads: HashMap<(u32, u64), Slot>,
}

/// A link and its state.
pub struct Link {
    target: LinkTarget,
    token: u64,
    state: State,
    next_address: usize,
    /// The node was reached over a unix socket.
    is_local: bool,
    /// The socket had no more when it was last read; what came after it is told anew.
    is_drained: bool,
    pub hello: HelloReply,
}

impl Link {
    /// `token`: under which its descriptor is registered.
    pub fn new(target: LinkTarget, token: u64) -> Link {
        let state = State::Idle { retry_at_ns: 0 };
        Link {
            target,
            token,
            state,
            next_address: 0,
            is_local: false,
            is_drained: false,
            hello: HelloReply::default(),
        }
    }

    pub fn target(&self) -> &LinkTarget {
        &self.target
    }

    pub fn is_ready(&self) -> bool {
        matches!(self.state, State::Ready { .. })
    }

    /// Queues a frame on a ready link; on any other it is dropped, as on a connection that broke.
    pub fn push(&mut self, head: Bytes, payload: Bytes) {
        if let State::Ready { stream, memory, .. } = &mut self.state {
            let head = memory.read_into(&head).unwrap_or(head);
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
            State::Ready { stream, heard_ns, pinged_ns, .. } => {
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
        self.is_drained = false;
        let address = &self.target.addresses[self.next_address % self.target.addresses.len()];
        self.next_address += 1;
        self.is_local = matches!(address, Address::Unix(_));
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

    /// The descriptor is ready, or there was more the last time. Returns whether there may be more:
    /// frames that have been read already, of which nothing else tells.
    pub fn ready(&mut self, poller: &Poller, now_ns: u64, events: &mut Vec<LinkEvent>) -> bool {
        if let State::Connecting { stream, .. } = &self.state {
            match stream.connected() {
                Ok(()) => self.greet(now_ns),
                Err(error) => self.end(poller, now_ns, error.to_string(), events),
            }
            self.flush(poller, now_ns, events);
            return false;
        }
        match self.read(now_ns, events) {
            Ok(more) => {
                self.flush(poller, now_ns, events);
                more
            }
            Err(why) => {
                self.end(poller, now_ns, why, events);
                false
            }
        }
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

    /// Whether there is more than one turn's frames.
    fn read(&mut self, now_ns: u64, events: &mut Vec<LinkEvent>) -> Result<bool, String> {
        let mut taken = 0;
        loop {
            while let Some(frame) = self.next_frame()? {
                self.take(frame, now_ns, events)?;
                taken += 1;
                if taken == FRAMES_IN_TURN {
                    return Ok(true);
                }
            }
            let (State::Ready { stream, .. } | State::Greeting { stream, .. }) = &mut self.state
            else {
                return Ok(false);
            };
            if std::mem::take(&mut self.is_drained) {
                return Ok(false);
            }
            let wanted = FrameReader::missing(&stream.input);
            match stream.fill(wanted).map_err(|error| error.to_string())? {
                Filled::Drained => self.is_drained = true,
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
        if let State::Ready { heard_ns, memory, .. } = &mut self.state {
            *heard_ns = now_ns;
            match frame.kind & !REPLY {
                kind::PING => {}
                kind::MEMORY => memory.answered(frame.status),
                kind::READ_INTO => events.push(LinkEvent::Frame(memory.read(frame)?)),
                _ => events.push(LinkEvent::Frame(frame)),
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
        if let State::Greeting { mut stream, .. } = state {
            let memory = match self.is_local {
                true => Memory::hand_over(&mut stream),
                false => Memory::default(),
            };
            self.state = State::Ready { stream, heard_ns: now_ns, pinged_ns: now_ns, memory };
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

impl Memory {
    /// Makes memory and sends it. Without it reads go over the socket as all else does.
    fn hand_over(stream: &mut Stream) -> Memory {
        let Ok((slots, fd)) = Slots::new(PAYLOAD_BYTES_MAX, SLOTS) else {
            return Memory::default();
        };
        let mut frame = BytesMut::new();
        encode(&mut frame, Prefix::request(kind::MEMORY, 0, 0, 0), 0, |_| {});
        match stream.send_with(&frame, fd.as_fd()) {
            Ok(()) => Memory { slots: Some(slots), ..Memory::default() },
            Err(_) => Memory::default(),
        }
    }

    fn answered(&mut self, status: Status) {
        self.taken = status == Status::Ok;
    }

    /// The frame that asks for the same with the data in a slot; none if it is no read, too small to be
    /// worth it, or no slot is free.
    fn read_into(&mut self, frame: &Bytes) -> Option<Bytes> {
        let slots = self.slots.as_ref().filter(|_| self.taken)?;
        let (prefix, head) = decode(frame);
        if prefix.kind != kind::READ {
            return None;
        }
        let io = Io::take(head).ok().filter(|io| io.length >= IN_MEMORY_FROM)?;
        let Entry::Vacant(entry) = self.reads.entry((prefix.channel, prefix.tag)) else {
            return None;
        };
        let slot = entry.insert(slots.take(io.length as usize)?);
        let mut frame = BytesMut::with_capacity(PREFIX_BYTES + IO_BYTES + 8);
        let into = Prefix { kind: kind::READ_INTO, ..prefix };
        encode(&mut frame, into, 0, |out| IoInto { io, at: slot.offset() }.put(out));
        Some(frame.freeze())
    }

    /// The answer as it would have come without a slot.
    fn read(&mut self, frame: Frame) -> Result<Frame, String> {
        let slot = self.reads.remove(&(frame.channel, frame.tag));
        let slot = slot.ok_or("the node answers a read that was not asked")?;
        let kind = kind::READ | REPLY;
        if frame.status != Status::Ok {
            return Ok(Frame { kind, ..frame });
        }
        let length = data_bytes(&frame.head).map_err(|_| "malformed block list")?;
        let payload = slot.filled(length).ok_or("more data than was asked for")?;
        Ok(Frame { kind, payload, ..frame })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::content::Block;
    use crate::io::SharedMemory;
    use crate::wire::messages::put_blocks;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    /// A gateway's end that has handed memory over, and the node's end that has taken it.
    fn pair() -> (Memory, SharedMemory) {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let mut memory = Memory::hand_over(&mut Stream::new(ours.into()));
        let mut node = Stream::accepted(theirs.into());
        node.fill(PREFIX_BYTES).expect("read");
        let frame = FrameReader::next(&mut node.input).expect("valid").expect("whole");
        assert_eq!(frame.kind, kind::MEMORY);
        let taken = SharedMemory::of_peer(node.take_descriptor().expect("came along"));
        memory.answered(Status::Ok);
        (memory, taken.expect("sealed"))
    }

    /// What is left in a link's buffer after a turn is told by nothing but its word.
    #[test]
    fn frames_are_taken_in_turns_and_none_is_forgotten() {
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        ours.set_nonblocking(true).expect("a socket");
        let target = LinkTarget {
            node: "node1".into(),
            addresses: Vec::new(),
            cluster: [1; 16],
            gateway: "gateway1".into(),
        };
        let mut link = Link::new(target, 0);
        let (stream, memory) = (Stream::new(ours.into()), Memory::default());
        link.state = State::Ready { stream, heard_ns: 0, pinged_ns: 0, memory };
        let poller = Poller::new().expect("an epoll");
        let mut turns = |frames: u64| {
            let mut sent = BytesMut::new();
            for tag in 0..frames {
                let asked = Prefix::request(kind::WRITE, 0, 3, tag);
                encode(&mut sent, Prefix { kind: kind::WRITE | REPLY, ..asked }, 0, |_| {});
            }
            theirs.write_all(&sent).expect("room in the socket");
            let (mut turns, mut more) = (Vec::new(), true);
            while more {
                let mut events = Vec::new();
                more = link.ready(&poller, 1, &mut events);
                turns.push(events.len());
            }
            turns
        };
        assert_eq!(turns(3), [3]);
        assert_eq!(turns(2 * FRAMES_IN_TURN as u64 + 1), [FRAMES_IN_TURN, FRAMES_IN_TURN, 1]);
        assert_eq!(turns(FRAMES_IN_TURN as u64), [FRAMES_IN_TURN, 0]);
        assert_eq!(turns(1), [1]);
    }

    fn read_of(length: u32, tag: u64) -> Bytes {
        let io = Io { shard: 1, offset: 0, length, epoch: 1, generation: 1, sequence: 0 };
        let mut frame = BytesMut::new();
        encode(&mut frame, Prefix::request(kind::READ, 0, 3, tag), 0, |out| io.put(out));
        frame.freeze()
    }

    fn answer(tag: u64, status: Status, blocks: &[Block]) -> Frame {
        let mut head = BytesMut::new();
        put_blocks(&mut head, blocks.iter().copied());
        let (head, payload) = (head.freeze(), Bytes::new());
        Frame { kind: kind::READ_INTO | REPLY, flags: 0, status, channel: 3, tag, head, payload }
    }

    #[test]
    fn large_read_comes_through_memory_as_if_it_had_come_by_the_socket() {
        let (mut memory, mut node) = pair();
        let asked = memory.read_into(&read_of(16 << 10, 7)).expect("large enough");
        let (prefix, head) = decode(&asked);
        let into = IoInto::take(head).expect("whole");
        assert_eq!((prefix.kind, prefix.channel, prefix.tag), (kind::READ_INTO, 3, 7));
        node.room(into.at, 4096).expect("inside").fill(std::mem::MaybeUninit::new(9));
        let blocks = [Block::Absent, Block::Data(1), Block::Zero, Block::Absent];
        let read = memory.read(answer(7, Status::Ok, &blocks)).expect("asked");
        assert_eq!((read.kind, &read.payload[..]), (kind::READ | REPLY, &[9; 4096][..]));
        assert!(memory.reads.is_empty());
    }

    #[test]
    fn small_reads_other_kinds_and_reads_over_the_slots_take_the_socket() {
        let (mut memory, _node) = pair();
        assert!(memory.read_into(&read_of(4096, 1)).is_none());
        let mut ping = BytesMut::new();
        encode(&mut ping, Prefix::request(kind::PING, 0, 0, 0), 0, |_| {});
        assert!(memory.read_into(&ping.freeze()).is_none());
        for tag in 0..u64::from(SLOTS) {
            assert!(memory.read_into(&read_of(1 << 20, tag)).is_some());
        }
        assert!(memory.read_into(&read_of(1 << 20, 99)).is_none());
        memory.read(answer(0, Status::BadBlock, &[])).expect("asked");
        assert!(memory.read_into(&read_of(1 << 20, 1)).is_none(), "one of this tag is under way");
        assert!(memory.read_into(&read_of(1 << 20, 99)).is_some());
    }

    #[test]
    fn answers_that_nobody_asked_for_or_that_are_too_long_end_the_link() {
        let (mut memory, _node) = pair();
        assert!(memory.read(answer(1, Status::Ok, &[])).is_err());
        memory.read_into(&read_of(1 << 20, 1)).expect("a slot");
        assert!(memory.read(answer(1, Status::Ok, &[Block::Data(1); 257])).is_err());
    }
}
