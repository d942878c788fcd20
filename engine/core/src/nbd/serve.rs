//! One NBD client's connection: its bytes become requests to an image, the image's answers become
//! replies. The gateway's event loop owns the connection and says when it is ready.
//!
//! A client may have `IN_FLIGHT_MAX` requests and `IN_FLIGHT_BYTES_MAX` bytes under way; past that
//! its connection is not read, so that one greedy client cannot take all memory.

use super::{
    Answer, Command, Counters, Errno, Handshake, Limits, Parsed, ProtocolError, Query, Request,
    RequestReader, Session, Step, block_status, check, done, error, read,
};
use crate::geometry::BLOCK_BYTES;
use crate::io::{Filled, Sink, Stream};
use crate::replica::{Extent, ImageIo, IoError, Outcome, Token};
use crate::wire::flag;
use bytes::BytesMut;
use slab::Slab;

const IN_FLIGHT_MAX: usize = 256;
const IN_FLIGHT_BYTES_MAX: u64 = 64 << 20;
const REPLY_BYTES_MAX: usize = 64 << 20;
/// A block status answer covers at most this much; the client asks on from its end.
const STATUS_BYTES_MAX: u32 = 1 << 30;
/// A handshake that takes longer is ended.
const HANDSHAKE_NS: u64 = 30_000_000_000;
/// Bits of base:allocation's flags (NBD specification, "Metadata contexts").
const STATE_HOLE: u32 = 1;
const STATE_ZERO: u32 = 2;

enum Phase {
    Handshake {
        handshake: Handshake,
        deadline_ns: u64,
    },
    /// A query is with policy.
    Asking {
        handshake: Handshake,
    },
    Serving {
        session: Session,
        reader: RequestReader,
        channel: u32,
    },
    /// What is in flight is answered (in the session's style), then the connection ends.
    Leaving {
        session: Option<Session>,
    },
}

/// What the loop has to do for a client.
#[derive(Debug, PartialEq, Eq)]
pub enum Need {
    Nothing,
    /// Policy answers with `Client::answer`.
    Ask(Query),
    /// Close the connection.
    End,
}

/// A connected NBD client.
pub struct Client {
    pub stream: Stream,
    /// Who this is in tokens and events; never reused.
    pub id: u64,
    /// The process that connected, where the socket tells (`io::peer_process`).
    pub peer: Option<String>,
    phase: Phase,
    in_flight: Slab<Request>,
    in_flight_bytes: u64,
    last_channel: Option<u32>,
}

impl Client {
    pub fn new(
        stream: Stream,
        id: u64,
        peer: Option<String>,
        limits: &Limits,
        now_ns: u64,
    ) -> Client {
        let mut handshake = Handshake::new(limits);
        let mut greeting = BytesMut::new();
        handshake.greeting(&mut greeting);
        let phase = Phase::Handshake { handshake, deadline_ns: now_ns + HANDSHAKE_NS };
        let in_flight = Slab::new();
        let (in_flight_bytes, last_channel) = (0, None);
        let mut client =
            Client { stream, id, peer, phase, in_flight, in_flight_bytes, last_channel };
        client.stream.output().data(greeting.freeze());
        client
    }

    /// The image it is served from.
    pub fn channel(&self) -> Option<u32> {
        match self.phase {
            Phase::Serving { channel, .. } => Some(channel),
            _ => None,
        }
    }

    /// The image it is, or was until it left, served from.
    pub fn last_channel(&self) -> Option<u32> {
        self.last_channel
    }

    /// Nothing is read from it until answers have gone out.
    pub fn is_paused(&self) -> bool {
        self.in_flight.len() >= IN_FLIGHT_MAX
            || self.in_flight_bytes >= IN_FLIGHT_BYTES_MAX
            || self.stream.pending_bytes() >= REPLY_BYTES_MAX
            || matches!(self.phase, Phase::Asking { .. } | Phase::Leaving { .. })
    }

    pub fn is_late(&self, now_ns: u64) -> bool {
        matches!(self.phase, Phase::Handshake { deadline_ns, .. } if now_ns > deadline_ns)
    }

    /// Done with: told to leave, and nothing left to say.
    pub fn has_left(&self) -> bool {
        matches!(self.phase, Phase::Leaving { .. })
            && self.in_flight.is_empty()
            && self.stream.pending_bytes() == 0
    }

    /// Reads once from the socket. `Closed` ends the connection.
    pub fn fill(&mut self) -> std::io::Result<Filled> {
        let wanted = match &self.phase {
            Phase::Serving { reader, .. } => reader.wanted(&self.stream.input),
            _ => 0,
        };
        self.stream.fill(wanted)
    }

    /// Takes the handshake on with what was read.
    ///
    /// # Errors
    /// The client does not speak NBD: close the connection.
    pub fn handshake(&mut self) -> Result<Need, ProtocolError> {
        let Phase::Handshake { handshake, .. } = &mut self.phase else { return Ok(Need::Nothing) };
        let mut out = BytesMut::new();
        let step = handshake.receive(&mut self.stream.input, &mut out)?;
        self.stream.output().data(out.freeze());
        Ok(self.after(step, None))
    }

    /// Policy's answer to the query; `channel`: the image that the client gets.
    ///
    /// # Errors
    /// As of `handshake`.
    pub fn answer(
        &mut self,
        answer: Answer,
        channel: Option<u32>,
        now_ns: u64,
    ) -> Result<Need, ProtocolError> {
        let phase = std::mem::replace(&mut self.phase, Phase::Leaving { session: None });
        let Phase::Asking { mut handshake } = phase else {
            self.phase = phase;
            return Ok(Need::Nothing);
        };
        let mut out = BytesMut::new();
        let step = handshake.answer(answer, &mut out)?;
        self.stream.output().data(out.freeze());
        self.phase = Phase::Handshake { handshake, deadline_ns: now_ns + HANDSHAKE_NS };
        Ok(self.after(step, channel))
    }

    fn after(&mut self, step: Step, channel: Option<u32>) -> Need {
        match step {
            Step::NeedInput => Need::Nothing,
            Step::Ask(query) => {
                let phase = std::mem::replace(&mut self.phase, Phase::Leaving { session: None });
                if let Phase::Handshake { handshake, .. } = phase {
                    self.phase = Phase::Asking { handshake };
                }
                Need::Ask(query)
            }
            Step::Transmission(session) => {
                let Some(channel) = channel else { return Need::End };
                let reader = RequestReader::new(&session);
                self.phase = Phase::Serving { session, reader, channel };
                self.last_channel = Some(channel);
                Need::Nothing
            }
            Step::Close => {
                self.phase = Phase::Leaving { session: None };
                Need::Nothing
            }
        }
    }

    /// Submits the requests that were read to the image, as far as the limits allow.
    ///
    /// # Errors
    /// The stream has lost its boundaries: close the connection.
    pub fn serve(&mut self, image: &mut ImageIo) -> Result<(), ProtocolError> {
        while !self.is_paused() {
            let Phase::Serving { session, reader, .. } = &mut self.phase else { return Ok(()) };
            let Some(parsed) = reader.next(&mut self.stream.input)? else { return Ok(()) };
            match parsed {
                Parsed::Refused { cookie, errno, message } => {
                    error(self.stream.output(), session.replies, cookie, errno, message);
                }
                Parsed::Request(request) => match check(&request, session) {
                    Ok(()) => self.submit(request, image),
                    Err(refusal) => {
                        let (errno, message) = (refusal.errno, refusal.message);
                        let out = self.stream.output();
                        error(out, session.replies, request.cookie, errno, message);
                    }
                },
            }
        }
        Ok(())
    }

    fn submit(&mut self, mut request: Request, image: &mut ImageIo) {
        let payload = std::mem::take(&mut request.payload);
        let (command, offset, length) = (request.command, request.offset, request.length);
        let fua = if request.flags.fua() { flag::FUA } else { 0 };
        let keep = if request.flags.no_hole() { flag::KEEP_ALLOCATED } else { 0 };
        match command {
            Command::Disconnect => return self.leave(),
            Command::Cache => return done(self.stream.output(), request.cookie),
            _ => {}
        }
        if matches!(command, Command::Read | Command::Write) {
            self.in_flight_bytes += u64::from(length);
        }
        let cookie = self.in_flight.insert(request) as u64;
        let token = Token { client: self.id, cookie };
        match command {
            Command::Read => image.read(token, offset, length),
            Command::Write => image.write(token, offset, payload, fua),
            Command::Flush => image.flush(token),
            Command::WriteZeroes => image.zero(token, offset, length, fua | keep),
            Command::Trim => {
                let (offset, length) = whole_blocks(offset, length, image.size_bytes());
                image.zero(token, offset, length, fua);
            }
            Command::BlockStatus => image.status(token, offset, length.min(STATUS_BYTES_MAX)),
            Command::Disconnect | Command::Cache => {}
        }
    }

    /// Takes no more requests; when what is in flight is answered the connection ends.
    pub fn leave(&mut self) {
        let phase = std::mem::replace(&mut self.phase, Phase::Leaving { session: None });
        if let Phase::Serving { session, .. } = phase {
            self.phase = Phase::Leaving { session: Some(session) };
        }
    }

    /// Replies to the request that `cookie` of a token names.
    pub fn reply(&mut self, cookie: u64, outcome: Outcome, counters: &mut Counters) {
        let Some(request) = self.in_flight.try_remove(cookie as usize) else { return };
        counters.answered(&request, &outcome);
        if matches!(request.command, Command::Read | Command::Write) {
            self.in_flight_bytes -= u64::from(request.length);
        }
        let (Phase::Serving { session, .. } | Phase::Leaving { session: Some(session) }) =
            &self.phase
        else {
            return;
        };
        let out = self.stream.output();
        match outcome {
            Outcome::Done => done(out, request.cookie),
            Outcome::Read(runs) => read(out, session.replies, &request, &runs),
            Outcome::Extents(extents) => {
                let extents: Vec<_> = extents.iter().map(allocation).collect();
                block_status(out, session, &request, &extents);
            }
            Outcome::Failed(failure) => {
                let (errno, message) = match failure {
                    IoError::Io => (Errno::Io, "no replica could answer"),
                    IoError::Shutdown => (Errno::Shutdown, "the image is no longer served here"),
                };
                error(out, session.replies, request.cookie, errno, message);
            }
        }
    }
}

/// TRIM is a hint: only whole blocks of the range are discarded. The image's end counts as one.
fn whole_blocks(offset: u64, length: u32, size_bytes: u64) -> (u64, u32) {
    let block = u64::from(BLOCK_BYTES);
    let end = offset + u64::from(length);
    let first = offset.next_multiple_of(block);
    let end = if end == size_bytes { end } else { end / block * block };
    if first >= end { (offset, 0) } else { (first, (end - first) as u32) }
}

fn allocation(extent: &Extent) -> super::Extent {
    let hole = if extent.hole { STATE_HOLE } else { 0 };
    let zero = if extent.zero { STATE_ZERO } else { 0 };
    super::Extent { length: u64::from(extent.length), flags: hole | zero }
}
