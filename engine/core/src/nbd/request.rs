//! Requests of the transmission phase: cut out of the stream ([`RequestReader`]), and judged
//! against what was negotiated ([`check`]) before anything is done for them.

use super::constants::{REQUEST_HEADER_BYTES, REQUEST_MAGIC, command, command_flags};
use super::{Errno, ProtocolError, Session};
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
}

/// One whole request. `cookie` is the client's, given back with the reply and nothing else;
/// `payload` holds the `length` bytes of a write and is empty otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    pub command: Command,
    pub flags: Flags,
    pub cookie: u64,
    pub offset: u64,
    pub length: u32,
    pub payload: Bytes,
}

/// What stood next in the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// Not yet judged: see [`check`].
    Request(Request),
    /// To be answered with `errno`; the connection lives on.
    Refused { cookie: u64, errno: Errno, message: &'static str },
}

/// Cuts requests out of one connection's stream without copying their payload.
#[derive(Debug)]
pub struct RequestReader {
    max_payload: u32,
    /// A write that is too long to keep: its cookie, and how much of its payload is still to come.
    draining: Option<(u64, u32)>,
}

impl RequestReader {
    /// The style of replies will decide the form of request headers once those can be extended.
    pub fn new(session: &Session) -> Self {
        RequestReader { max_payload: session.limits.max_payload, draining: None }
    }

    /// Takes the next request off `input`; None until it is whole.
    ///
    /// A payload shares `input`'s memory. A write longer than `max_payload` is drained as it comes.
    /// After a [`ProtocolError`] the stream has no boundary any more: close the connection.
    pub fn next(&mut self, input: &mut BytesMut) -> Result<Option<Parsed>, ProtocolError> {
        if let Some((cookie, left)) = self.draining {
            return Ok(self.drain(cookie, left, input));
        }
        let Some(mut header) = input.get(..REQUEST_HEADER_BYTES) else {
            return Ok(None);
        };
        let magic = header.get_u32();
        if magic != REQUEST_MAGIC {
            return Err(ProtocolError::RequestMagic(magic));
        }
        let (flags, number) = (Flags(header.get_u16()), header.get_u16());
        let (cookie, offset, length) = (header.get_u64(), header.get_u64(), header.get_u32());
        let Some(command) = Command::from_wire(number) else {
            input.advance(REQUEST_HEADER_BYTES);
            let message = "this command is not supported";
            return Ok(Some(Parsed::Refused { cookie, errno: Errno::Invalid, message }));
        };
        let payload_bytes = if command == Command::Write { length } else { 0 };
        if payload_bytes > self.max_payload {
            input.advance(REQUEST_HEADER_BYTES);
            return Ok(self.drain(cookie, payload_bytes, input));
        }
        let whole = REQUEST_HEADER_BYTES + payload_bytes as usize;
        if input.len() < whole {
            return Ok(None);
        }
        input.advance(REQUEST_HEADER_BYTES);
        let payload = match payload_bytes {
            0 => Bytes::new(),
            _ => input.split_to(payload_bytes as usize).freeze(),
        };
        let request = Request { command, flags, cookie, offset, length, payload };
        Ok(Some(Parsed::Request(request)))
    }

    /// How many more bytes make the next request whole, as far as `input` tells; 0 if it is, or if
    /// what comes is drained or no request at all. At most `max_payload` and a header.
    pub fn wanted(&self, input: &BytesMut) -> usize {
        if self.draining.is_some() {
            return 0;
        }
        let Some(mut header) = input.get(..REQUEST_HEADER_BYTES) else {
            return REQUEST_HEADER_BYTES - input.len();
        };
        let (magic, _flags, number) = (header.get_u32(), header.get_u16(), header.get_u16());
        header.advance(16);
        let length = header.get_u32();
        if magic != REQUEST_MAGIC || number != command::WRITE || length > self.max_payload {
            return 0;
        }
        (REQUEST_HEADER_BYTES + length as usize).saturating_sub(input.len())
    }

    fn drain(&mut self, cookie: u64, left: u32, input: &mut BytesMut) -> Option<Parsed> {
        let now = input.len().min(left as usize);
        input.advance(now);
        let left = left - now as u32;
        if left > 0 {
            self.draining = Some((cookie, left));
            return None;
        }
        self.draining = None;
        Some(Parsed::Refused { cookie, errno: Errno::Invalid, message: TOO_LONG })
    }
}

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
    if command == Command::BlockStatus && session.base_allocation.is_none() {
        return refusal(Errno::Invalid, "no metadata context was negotiated");
    }
    if command == Command::BlockStatus && request.length == 0 {
        return refusal(Errno::Invalid, "a block status request needs a length");
    }
    check_range(request, session)
}

fn check_range(request: &Request, session: &Session) -> Result<(), Refusal> {
    let carries_data = matches!(request.command, Command::Read | Command::Write);
    if carries_data && request.length > session.limits.max_payload {
        return refusal(Errno::Invalid, TOO_LONG);
    }
    let min_block = u64::from(session.limits.min_block);
    let length = u64::from(request.length);
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
