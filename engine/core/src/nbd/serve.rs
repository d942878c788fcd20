//! One NBD client's connection: its bytes become requests to an image, the image's answers become
//! replies. The gateway's event loop owns the connection and says when it is ready.
//!
//! A client may have `IN_FLIGHT_MAX` requests under way, and as many bytes as the [`Budget`] allows;
//! past that its connection is not read, so that one greedy client cannot take all memory.

use super::budget::{Budget, Charge, GUARANTEED_BYTES};
use super::{
    Answer, Command, Contexts, Counters, Errno, Handshake, Limits, Parsed, ProtocolError, Query,
    Request, RequestReader, Session, Step, TlsMode, block_status, check, done, error, read,
};
use crate::geometry::BLOCK_BYTES;
use crate::io::{Filled, Sink, Stream};
use crate::replica::{Extent, IoError, Outcome, Served, Token};
use crate::wire::flag;
use bytes::BytesMut;
use slab::Slab;
use std::collections::VecDeque;

const IN_FLIGHT_MAX: usize = 256;
/// Zeroes and block status are done in steps that end at multiples of this.
const STEP_BYTES: u64 = 1 << 30;
/// A block status answer covers at most this much, and takes no further step once it has found so many
/// extents; the client asks on from its end.
const STATUS_BYTES_MAX: u64 = 64 << 30;
const STATUS_EXTENTS: usize = 64;
/// The same where a listing of shards was made for it, which the next answer would need anew.
const LISTED_EXTENTS: usize = 2048;
/// A client that asks for lists and does not take them is not read past this.
const OPTION_REPLIES_MAX: usize = 1 << 20;
/// A client that takes nothing of its answers for so long is ended where others wait for it.
const STUCK_NS: u64 = 30_000_000_000;
/// A byte is kept for so many that a block status asks for: at the worst each block is an extent.
const STATUS_BYTES_PER_BYTE: u64 = BLOCK_BYTES as u64 / 8;
/// Bits of base:allocation's flags (NBD specification, "Metadata contexts").
const STATE_HOLE: u32 = 1;
const STATE_ZERO: u32 = 2;

/// A request that is with the image.
struct InFlight {
    request: Request,
    /// Flags of `wire::flag` for what it changes.
    flags: u8,
    /// What a long one has yet to ask of the image.
    next: u64,
    end: u64,
    /// What a block status has found so far.
    extents: Vec<super::Extent>,
    /// Of a wide one that tells layers: the shards that are left to look into, and their size.
    touched: Option<(VecDeque<u64>, u64)>,
}

enum Phase {
    Handshake {
        handshake: Handshake,
        deadline_ns: u64,
    },
    /// A query is with policy; afterwards the client has `left_ns` for the rest.
    Asking {
        handshake: Handshake,
        left_ns: u64,
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
    /// Send what waits, go on under TLS, and call `Client::handshake` again.
    StartTls,
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
    /// Came by a listener without TLS.
    pub trusted: bool,
    phase: Phase,
    in_flight: Slab<InFlight>,
    charge: Charge,
    /// When it last said something, or took something of what we say.
    heard_ns: u64,
    /// Waits in the loop's list of those that the budget holds back.
    pub held: bool,
    last_channel: Option<u32>,
}

impl Client {
    pub fn new(
        stream: Stream,
        id: u64,
        peer: Option<String>,
        limits: &Limits,
        tls: TlsMode,
        deadline_ns: u64,
    ) -> Client {
        let mut handshake = Handshake::new(limits).with_tls(tls);
        let mut greeting = BytesMut::new();
        handshake.greeting(&mut greeting);
        let mut client = Client {
            stream,
            id,
            peer,
            trusted: tls == TlsMode::Off,
            phase: Phase::Handshake { handshake, deadline_ns },
            in_flight: Slab::new(),
            charge: Charge::default(),
            heard_ns: 0,
            held: false,
            last_channel: None,
        };
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

    /// Nothing is read from it until answers have gone out. A request whose payload has begun to arrive
    /// is always read to its end.
    pub fn is_paused(&self, budget: &Budget) -> bool {
        match self.phase {
            Phase::Handshake { .. } => self.stream.pending_bytes() >= OPTION_REPLIES_MAX,
            Phase::Asking { .. } | Phase::Leaving { .. } => true,
            Phase::Serving { .. } => {
                self.charge.receiving == 0
                    && (self.in_flight.len() >= IN_FLIGHT_MAX || self.is_over(budget))
            }
        }
    }

    /// The budget holds it back.
    pub fn is_over(&self, budget: &Budget) -> bool {
        let Phase::Serving { reader, .. } = &self.phase else { return false };
        let output = self.stream.output_ref();
        if budget.allows(&self.charge, output) {
            return false;
        }
        let next_bytes = reader.next_bytes(&self.stream.input);
        !self.charge.is_nothing(output) || next_bytes > GUARANTEED_BYTES
    }

    /// It does not take its answers, or does not end its write, while others wait for the memory.
    pub fn is_stuck(&self, now_ns: u64) -> bool {
        let owes = self.stream.pending_bytes() > 0 || self.charge.receiving > 0;
        owes && now_ns.saturating_sub(self.heard_ns) > STUCK_NS
    }

    /// Brings the budget up to date with what it has under way.
    pub fn account(&mut self, budget: &mut Budget) {
        budget.account(&mut self.charge, self.stream.output_ref());
    }

    /// Gives back what it had under way: it is gone.
    pub fn release(&self, budget: &mut Budget) {
        budget.release(&self.charge);
    }

    /// It has not opened an export in time, or asked for nothing for too long.
    pub fn is_late(&self, now_ns: u64, idle_ns: u64) -> bool {
        match self.phase {
            Phase::Handshake { deadline_ns, .. } => now_ns > deadline_ns,
            Phase::Serving { .. } => {
                let quiet_ns = now_ns.saturating_sub(self.heard_ns);
                idle_ns > 0 && self.in_flight.is_empty() && quiet_ns > idle_ns
            }
            Phase::Asking { .. } | Phase::Leaving { .. } => false,
        }
    }

    /// Done with: told to leave, and nothing left to say.
    pub fn has_left(&self) -> bool {
        matches!(self.phase, Phase::Leaving { .. })
            && self.in_flight.is_empty()
            && self.stream.pending_bytes() == 0
    }

    /// Reads once from the socket. `Closed` ends the connection.
    pub fn fill(&mut self, now_ns: u64) -> std::io::Result<Filled> {
        self.heard_ns = now_ns;
        let wanted = match &self.phase {
            Phase::Serving { reader, .. } => reader.wanted(&self.stream.input),
            _ => 0,
        };
        self.stream.fill(wanted)
    }

    /// Writes what the socket takes.
    pub fn flush(&mut self, now_ns: u64) -> std::io::Result<()> {
        let before = self.stream.pending_bytes();
        let written = self.stream.flush();
        if self.stream.pending_bytes() < before {
            self.heard_ns = now_ns;
        }
        written
    }

    /// Takes the handshake on with what was read.
    ///
    /// # Errors
    /// The client does not speak NBD: close the connection.
    pub fn handshake(&mut self, now_ns: u64) -> Result<Need, ProtocolError> {
        let Phase::Handshake { handshake, .. } = &mut self.phase else { return Ok(Need::Nothing) };
        let mut out = BytesMut::new();
        let step = handshake.receive(&mut self.stream.input, &mut out)?;
        self.stream.output().data(out.freeze());
        Ok(self.after(step, None, now_ns))
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
        let Phase::Asking { mut handshake, left_ns } = phase else {
            self.phase = phase;
            return Ok(Need::Nothing);
        };
        let mut out = BytesMut::new();
        let step = handshake.answer(answer, &mut out)?;
        self.stream.output().data(out.freeze());
        self.phase = Phase::Handshake { handshake, deadline_ns: now_ns + left_ns };
        Ok(self.after(step, channel, now_ns))
    }

    fn after(&mut self, step: Step, channel: Option<u32>, now_ns: u64) -> Need {
        match step {
            Step::NeedInput => Need::Nothing,
            Step::StartTls => Need::StartTls,
            Step::Ask(query) => {
                let phase = std::mem::replace(&mut self.phase, Phase::Leaving { session: None });
                if let Phase::Handshake { handshake, deadline_ns } = phase {
                    let left_ns = deadline_ns.saturating_sub(now_ns);
                    self.phase = Phase::Asking { handshake, left_ns };
                }
                Need::Ask(query)
            }
            Step::Transmission(session) => {
                let Some(channel) = channel else { return Need::End };
                let reader = RequestReader::new(&session);
                self.phase = Phase::Serving { session, reader, channel };
                self.last_channel = Some(channel);
                self.heard_ns = now_ns;
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
    pub fn serve(&mut self, image: &mut Served, budget: &Budget) -> Result<(), ProtocolError> {
        while !self.is_paused(budget) {
            let Phase::Serving { session, reader, .. } = &mut self.phase else { return Ok(()) };
            let Some(parsed) = reader.next(&mut self.stream.input)? else {
                self.charge.receiving = reader.arriving(&self.stream.input);
                return Ok(());
            };
            self.charge.receiving = 0;
            match parsed {
                Parsed::Refused { to, errno, message } => {
                    error(self.stream.output(), session.replies, to, errno, message);
                }
                Parsed::Request(request) => match check(&request, session) {
                    Ok(()) if request.command == Command::Cache => {
                        done(self.stream.output(), session.replies, request.addressee());
                    }
                    Ok(()) => self.submit(request, image),
                    Err(refusal) => {
                        let (errno, message) = (refusal.errno, refusal.message);
                        let out = self.stream.output();
                        error(out, session.replies, request.addressee(), errno, message);
                    }
                },
            }
        }
        Ok(())
    }

    fn submit(&mut self, mut request: Request, image: &mut Served) {
        let payload = std::mem::take(&mut request.payload);
        let (command, offset, length) = (request.command, request.offset, request.length);
        if command == Command::Disconnect {
            return self.leave();
        }
        let fua = if request.flags.fua() { flag::FUA } else { 0 };
        let keep = if request.flags.no_hole() { flag::KEEP_ALLOCATED } else { 0 };
        let (next, end) = match command {
            Command::Trim => whole_blocks(offset, length, image.size_bytes()),
            Command::BlockStatus => (offset, offset + length.min(STATUS_BYTES_MAX)),
            _ => (offset, offset + length),
        };
        self.charge.in_flight += kept_bytes(&request);
        let flags = fua | keep;
        let (extents, touched) = (Vec::new(), None);
        let asked = InFlight { request, flags, next, end, extents, touched };
        let cookie = self.in_flight.insert(asked);
        let token = Token { client: self.id, cookie: cookie as u64 };
        match command {
            // `check` has kept these below the largest payload.
            Command::Read => image.read(token, offset, length as u32),
            Command::Write => image.write(token, offset, payload, fua),
            Command::Flush => image.flush(token),
            Command::BlockStatus if self.is_wide(offset, end) => {
                image.touched(token, offset, end - offset, self.contexts().floor());
            }
            _ => self.step(cookie, image),
        }
    }

    fn contexts(&self) -> Contexts {
        match &self.phase {
            Phase::Serving { session, .. } | Phase::Leaving { session: Some(session) } => {
                session.contexts.clone()
            }
            _ => Contexts::default(),
        }
    }

    /// Whether it pays to ask first where there is anything.
    fn is_wide(&self, offset: u64, end: u64) -> bool {
        end - offset > STEP_BYTES && self.contexts().tell_layers()
    }

    /// Asks the image for the next piece of a long request.
    fn step(&mut self, cookie: usize, image: &mut Served) {
        let contexts = self.contexts();
        let asked = &mut self.in_flight[cookie];
        let at = asked.next;
        asked.next = asked.step_end();
        let length = (asked.next - at) as u32;
        let token = Token { client: self.id, cookie: cookie as u64 };
        match asked.request.command {
            Command::BlockStatus if contexts.tell_layers() => {
                image.changes(token, at, length, contexts.since);
            }
            Command::BlockStatus => image.status(token, at, length),
            _ => image.zero(token, at, length, asked.flags),
        }
    }

    /// Takes no more requests; when what is in flight is answered the connection ends.
    pub fn leave(&mut self) {
        self.charge.receiving = 0;
        let phase = std::mem::replace(&mut self.phase, Phase::Leaving { session: None });
        if let Phase::Serving { session, .. } = phase {
            self.phase = Phase::Leaving { session: Some(session) };
        }
    }

    /// Replies to the request that `cookie` of a token names, or goes on with it.
    pub fn reply(
        &mut self,
        cookie: u64,
        mut outcome: Outcome,
        counters: &mut Counters,
        image: &mut Served,
    ) {
        let cookie = cookie as usize;
        let Some(asked) = self.in_flight.get_mut(cookie) else { return };
        if asked.takes(&mut outcome, image.shard_bytes()) {
            return self.step(cookie, image);
        }
        let InFlight { request, extents, .. } = self.in_flight.remove(cookie);
        counters.answered(&request, &outcome);
        self.charge.in_flight -= kept_bytes(&request);
        let (Phase::Serving { session, .. } | Phase::Leaving { session: Some(session) }) =
            &self.phase
        else {
            return;
        };
        let (out, to) = (self.stream.output(), request.addressee());
        match outcome {
            Outcome::Done => done(out, session.replies, to),
            Outcome::Read(runs) => read(out, session.replies, &request, &runs),
            Outcome::Extents(_) | Outcome::Shards(_) => {
                block_status(out, session, &request, &extents)
            }
            Outcome::Failed(failure) => {
                let (errno, message) = match failure {
                    IoError::Io => (Errno::Io, "no replica could answer"),
                    IoError::NoSpace => (Errno::NoSpace, "the disks of its nodes are full"),
                    IoError::Shutdown => (Errno::Shutdown, "the image is no longer served here"),
                };
                error(out, session.replies, to, errno, message);
            }
        }
    }

    /// The image it is served from is larger now, and it may write there.
    pub fn grown(&mut self, size_bytes: u64) {
        if let Phase::Serving { session, .. } = &mut self.phase {
            session.export.size_bytes = session.export.size_bytes.max(size_bytes);
        }
    }
}

impl InFlight {
    /// Takes what the image said of one step; whether there is another one to take.
    fn takes(&mut self, outcome: &mut Outcome, shard_bytes: u64) -> bool {
        match outcome {
            Outcome::Extents(found) => {
                for extent in found.drain(..) {
                    self.found(allocation(&extent));
                }
                self.skip_untouched();
                let most = match self.touched {
                    _ if self.request.flags.one_extent() => 1,
                    Some(_) => LISTED_EXTENTS,
                    None => STATUS_EXTENTS,
                };
                self.next < self.end && self.extents.len() <= most
            }
            Outcome::Shards(touched) => {
                self.touched = Some((std::mem::take(touched).into(), shard_bytes));
                self.skip_untouched();
                self.next < self.end
            }
            Outcome::Done => self.next < self.end && self.request.command.is_stepwise(),
            Outcome::Read(_) | Outcome::Failed(_) => false,
        }
    }

    /// Where the next step ends: with the touched shards that lie side by side, or as each one does.
    fn step_end(&self) -> u64 {
        let end = self.end.min((self.next / STEP_BYTES + 1) * STEP_BYTES);
        let Some((touched, shard_bytes)) = &self.touched else { return end };
        let first = self.next / shard_bytes;
        let side_by_side =
            (first..).zip(touched).take_while(|(shard, next)| shard == *next).count();
        end.min((first + side_by_side as u64) * shard_bytes)
    }

    /// Where no layer has anything nobody is asked.
    fn skip_untouched(&mut self) {
        let Some((touched, shard_bytes)) = &mut self.touched else { return };
        let at = self.next;
        while touched.front().is_some_and(|shard| (*shard + 1) * *shard_bytes <= at) {
            touched.pop_front();
        }
        let next = touched.front().map_or(self.end, |shard| shard * *shard_bytes);
        let next = next.clamp(at, self.end);
        if next > at {
            self.next = next;
            let (flags, depth, changed) = (STATE_HOLE | STATE_ZERO, 0, 0);
            self.found(super::Extent { length: next - at, flags, depth, changed });
        }
    }

    /// One more extent, joined with the one before where both say the same.
    fn found(&mut self, extent: super::Extent) {
        match self.extents.last_mut() {
            Some(last)
                if (last.flags, last.depth, last.changed)
                    == (extent.flags, extent.depth, extent.changed) =>
            {
                last.length += extent.length;
            }
            _ => self.extents.push(extent),
        }
    }
}

/// What is kept in memory for a request at the worst.
fn kept_bytes(request: &Request) -> u64 {
    match request.command {
        Command::Read | Command::Write => request.length,
        Command::BlockStatus => request.length.min(STEP_BYTES) / STATUS_BYTES_PER_BYTE,
        _ => 0,
    }
}

/// TRIM is a hint: only whole blocks of the range are discarded. The image's end counts as one.
fn whole_blocks(offset: u64, length: u64, size_bytes: u64) -> (u64, u64) {
    let block = u64::from(BLOCK_BYTES);
    let end = offset + length;
    let first = offset.next_multiple_of(block);
    let end = if end == size_bytes { end } else { end / block * block };
    if first >= end { (offset, offset) } else { (first, end) }
}

fn allocation(extent: &Extent) -> super::Extent {
    let hole = if extent.hole { STATE_HOLE } else { 0 };
    let zero = if extent.zero { STATE_ZERO } else { 0 };
    super::Extent {
        length: u64::from(extent.length),
        flags: hole | zero,
        depth: u32::from(extent.depth),
        changed: extent.changed,
    }
}
