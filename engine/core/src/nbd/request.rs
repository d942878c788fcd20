//! Requests of the transmission phase: cut out of the stream ([`RequestReader`]), and judged
//! against what was negotiated ([`check`]) before anything is done for them.

use super::constants::{
    EXTENDED_REQUEST_HEADER_BYTES, EXTENDED_REQUEST_MAGIC, REQUEST_HEADER_BYTES, REQUEST_MAGIC,
    command, command_flags,
};
use super::reply::Addressee;
use super::{Errno, ProtocolError, ReplyStyle, Session};
use bytes::{Buf, Bytes, BytesMut};

/// What a client asks for. Section «Request types».
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Command {
    Read = command::READ,
    Write = command::WRITE,
    /// Has no reply: what is in flight is finished, then the connection is closed.
    Disconnect = command::DISC,
    Flush = command::FLUSH,
    Trim = command::TRIM,
    Cache = command::CACHE,
    WriteZeroes = command::WRITE_ZEROES,
    BlockStatus = command::BLOCK_STATUS,
}

impl Command {
    fn from_wire(number: u16) -> Option<Command> {
        Some(match number {
            command::READ => Command::Read,
            command::WRITE => Command::Write,
            command::DISC => Command::Disconnect,
            command::FLUSH => Command::Flush,
            command::TRIM => Command::Trim,
            command::CACHE => Command::Cache,
            command::WRITE_ZEROES => Command::WriteZeroes,
            command::BLOCK_STATUS => Command::BlockStatus,
            _ => return None,
        })
    }

    /// Whether it is done piece by piece: it may be longer than what an image does at once.
    pub fn is_stepwise(self) -> bool {
        matches!(self, Command::Trim | Command::WriteZeroes | Command::BlockStatus)
    }

    /// Whether it can change the export's content.
    pub fn writes(self) -> bool {
        matches!(self, Command::Write | Command::Trim | Command::WriteZeroes)
    }
}

/// Command flags as the client sent them. Section «Command flags».
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Hash)]
pub struct Flags(pub u16);

impl Flags {
    /// Answer only once this request is on stable storage.
    pub fn fua(self) -> bool {
        self.0 & command_flags::FUA != 0
    }

    /// Zeroes are to keep their space.
    pub fn no_hole(self) -> bool {
        self.0 & command_flags::NO_HOLE != 0
    }

    /// A read is to be answered in one chunk.
    pub fn dont_fragment(self) -> bool {
        self.0 & command_flags::DF != 0
    }

    /// Only the first extent is wanted.
    pub fn one_extent(self) -> bool {
        self.0 & command_flags::REQ_ONE != 0
    }

    /// Zeroes only if that is faster than writing them, else ENOTSUP.
    pub fn fast_zero(self) -> bool {
        self.0 & command_flags::FAST_ZERO != 0
    }

    /// With extended headers: so many bytes of payload follow.
    pub fn payload(self) -> bool {
        self.0 & command_flags::PAYLOAD_LEN != 0
    }
}

/// One whole request. `cookie` is the client's, given back with the reply and nothing else;
/// `payload` holds the `length` bytes of a write and is empty otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    pub command: Command,
    pub flags: Flags,
    pub cookie: u64,
    pub offset: u64,
    pub length: u64,
    pub payload: Bytes,
}

impl Request {
    /// Whom its reply is for.
    pub fn addressee(&self) -> Addressee {
        Addressee { cookie: self.cookie, offset: self.offset }
    }
}

/// What stood next in the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// Not yet judged: see [`check`].
    Request(Request),
    /// To be answered with `errno`; the connection lives on.
    Refused { to: Addressee, errno: Errno, message: &'static str },
}

/// Cuts requests out of one connection's stream without copying their payload.
#[derive(Debug)]
pub struct RequestReader {
    max_payload: u32,
    extended: bool,
    draining: Option<Draining>,
}

/// A payload that is not kept, and how the request is refused once it is past.
#[derive(Debug)]
struct Draining {
    to: Addressee,
    left: u32,
    message: &'static str,
}

/// A request's header. Section «Request message».
struct Header {
    flags: Flags,
    number: u16,
    to: Addressee,
    length: u64,
}

impl Header {
    /// Bytes that follow it. A write always has them: with extended headers a flag says so as well, but
    /// QEMU (seen with 10.0) does not set it, and its own server does without.
    fn payload_bytes(&self, extended: bool) -> u64 {
        let follows = self.number == command::WRITE || (extended && self.flags.payload());
        if follows { self.length } else { 0 }
    }
}

impl RequestReader {
    pub fn new(session: &Session) -> Self {
        let extended = session.replies == ReplyStyle::Extended;
        RequestReader { max_payload: session.limits.max_payload, extended, draining: None }
    }

    fn header_bytes(&self) -> usize {
        if self.extended { EXTENDED_REQUEST_HEADER_BYTES } else { REQUEST_HEADER_BYTES }
    }

    /// The next header, once it is there whole.
    fn header(&self, input: &BytesMut) -> Result<Option<Header>, ProtocolError> {
        let Some(mut header) = input.get(..self.header_bytes()) else {
            return Ok(None);
        };
        let magic = header.get_u32();
        if magic != if self.extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC } {
            return Err(ProtocolError::RequestMagic(magic));
        }
        let (flags, number) = (Flags(header.get_u16()), header.get_u16());
        let to = Addressee { cookie: header.get_u64(), offset: header.get_u64() };
        let length = if self.extended { header.get_u64() } else { u64::from(header.get_u32()) };
        Ok(Some(Header { flags, number, to, length }))
    }

    /// Takes the next request off `input`; None until it is whole.
    ///
    /// A payload shares `input`'s memory. One longer than `max_payload`, or of a command that has none,
    /// is drained as it comes.
    /// After a [`ProtocolError`] the stream has no boundary any more: close the connection.
    pub fn next(&mut self, input: &mut BytesMut) -> Result<Option<Parsed>, ProtocolError> {
        if let Some(draining) = self.draining.take() {
            return Ok(self.drain(draining, input));
        }
        let Some(header) = self.header(input)? else {
            return Ok(None);
        };
        let (to, length) = (header.to, header.length);
        let payload_bytes = header.payload_bytes(self.extended);
        if let Some(message) = self.misfit(&header, payload_bytes) {
            let left = u32::try_from(payload_bytes)
                .map_err(|_| ProtocolError::PayloadLength(payload_bytes))?;
            input.advance(self.header_bytes());
            return Ok(self.drain(Draining { to, left, message }, input));
        }
        let whole = self.header_bytes() + payload_bytes as usize;
        if input.len() < whole {
            return Ok(None);
        }
        input.advance(self.header_bytes());
        let payload = match payload_bytes {
            0 => Bytes::new(),
            _ => input.split_to(payload_bytes as usize).freeze(),
        };
        let Some(command) = Command::from_wire(header.number) else {
            return Ok(Some(Parsed::Refused { to, errno: Errno::Invalid, message: UNKNOWN }));
        };
        // Without extended headers the flag is unknown, and refused with those.
        let known = if self.extended { command_flags::PAYLOAD_LEN } else { 0 };
        let flags = Flags(header.flags.0 & !known);
        let (cookie, offset) = (to.cookie, to.offset);
        let request = Request { command, flags, cookie, offset, length, payload };
        Ok(Some(Parsed::Request(request)))
    }

    /// Why a request cannot be taken with the payload that it has.
    fn misfit(&self, header: &Header, payload_bytes: u64) -> Option<&'static str> {
        let writes = header.number == command::WRITE;
        if payload_bytes > u64::from(self.max_payload) {
            Some(TOO_LONG)
        } else if self.extended && !writes && header.flags.payload() {
            Some("only writes have a payload")
        } else {
            None
        }
    }

    /// How many more bytes make the next request whole, as far as `input` tells; 0 if it is, or if
    /// what comes is drained or no request at all. At most `max_payload` and a header.
    pub fn wanted(&self, input: &BytesMut) -> usize {
        if self.draining.is_some() {
            return 0;
        }
        let Ok(Some(header)) = self.header(input) else {
            return self.header_bytes().saturating_sub(input.len());
        };
        let payload_bytes = header.payload_bytes(self.extended);
        if self.misfit(&header, payload_bytes).is_some() {
            return 0;
        }
        (self.header_bytes() + payload_bytes as usize).saturating_sub(input.len())
    }

    /// Bytes that the next request reads or writes, as far as `input` tells.
    pub fn next_bytes(&self, input: &BytesMut) -> u64 {
        match self.header(input) {
            Ok(Some(header)) if matches!(header.number, command::READ | command::WRITE) => {
                header.length
            }
            _ => 0,
        }
    }

    /// Bytes of the write whose payload is still arriving, header and all; 0 where none is.
    pub fn arriving(&self, input: &BytesMut) -> u64 {
        match self.wanted(input) {
            missing if missing > 0 && input.len() >= self.header_bytes() => {
                (input.len() + missing) as u64
            }
            _ => 0,
        }
    }

    fn drain(&mut self, mut draining: Draining, input: &mut BytesMut) -> Option<Parsed> {
        let now = input.len().min(draining.left as usize);
        input.advance(now);
        draining.left -= now as u32;
        let (to, message) = (draining.to, draining.message);
        if draining.left > 0 {
            self.draining = Some(draining);
            return None;
        }
        Some(Parsed::Refused { to, errno: Errno::Invalid, message })
    }
}

const UNKNOWN: &str = "this command is not supported";
const TOO_LONG: &str = "the request is longer than the maximum block size";

/// A request that is not carried out: the errno for the reply, and why, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub errno: Errno,
    pub message: &'static str,
}

/// Judges a request by what was negotiated. Section «Error values» and «Request types».
///
/// | request | refused with |
/// | --- | --- |
/// | a flag that is not the command's, or DF without structured replies | EINVAL |
/// | WRITE, TRIM, WRITE_ZEROES on a read-only export | EPERM |
/// | FLUSH with an offset or a length | EINVAL |
/// | BLOCK_STATUS without a context, or of no bytes | EINVAL |
/// | READ, WRITE above `max_payload`; anything not in multiples of `min_block` | EINVAL |
/// | WRITE, WRITE_ZEROES past the end | ENOSPC |
/// | READ, TRIM, CACHE, BLOCK_STATUS past the end | EINVAL |
///
/// TRIM, WRITE_ZEROES, CACHE and BLOCK_STATUS may have any length. Requests of no bytes are left
/// undefined by the specification; here they succeed and do nothing, except that a block status
/// needs an extent to report. FUA is taken with every command. DISCONNECT is never refused.
pub fn check(request: &Request, session: &Session) -> Result<(), Refusal> {
    let command = request.command;
    if command == Command::Disconnect {
        return Ok(());
    }
    if request.flags.0 & !allowed_flags(command, session) != 0 {
        return refusal(Errno::Invalid, "a flag does not belong to this command");
    }
    if session.export.read_only && command.writes() {
        return refusal(Errno::Permission, "the export is read-only");
    }
    if command == Command::Flush {
        return match (request.offset, request.length) {
            (0, 0) => Ok(()),
            _ => refusal(Errno::Invalid, "a flush has neither offset nor length"),
        };
    }
    if command == Command::BlockStatus && session.contexts.is_empty() {
        return refusal(Errno::Invalid, "no metadata context was negotiated");
    }
    if command == Command::BlockStatus && request.length == 0 {
        return refusal(Errno::Invalid, "a block status request needs a length");
    }
    check_range(request, session)
}

fn check_range(request: &Request, session: &Session) -> Result<(), Refusal> {
    let carries_data = matches!(request.command, Command::Read | Command::Write);
    if carries_data && request.length > u64::from(session.limits.max_payload) {
        return refusal(Errno::Invalid, TOO_LONG);
    }
    let min_block = u64::from(session.limits.min_block);
    let length = request.length;
    if !request.offset.is_multiple_of(min_block) || !length.is_multiple_of(min_block) {
        return refusal(Errno::Invalid, "the request is not aligned to the minimum block size");
    }
    let inside =
        request.offset.checked_add(length).is_some_and(|end| end <= session.export.size_bytes);
    match request.command {
        _ if inside => Ok(()),
        Command::Write | Command::WriteZeroes => {
            refusal(Errno::NoSpace, "the write goes past the end of the export")
        }
        _ => refusal(Errno::Invalid, "the request goes past the end of the export"),
    }
}

fn allowed_flags(command: Command, session: &Session) -> u16 {
    let own = match command {
        Command::Read if session.structured() => command_flags::DF,
        Command::WriteZeroes => command_flags::NO_HOLE | command_flags::FAST_ZERO,
        Command::BlockStatus => command_flags::REQ_ONE,
        _ => 0,
    };
    own | command_flags::FUA
}

fn refusal(errno: Errno, message: &'static str) -> Result<(), Refusal> {
    Err(Refusal { errno, message })
}
