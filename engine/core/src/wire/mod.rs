//! Frames of the protocol of gateways and nodes, version 5, without I/O. The bytes are specified in
//! `docs/wire.md`; every constant and layout below has its section there.
//!
//! A frame is a 28-byte prefix, a head (its layout depends on the kind) and a payload. The prefix and
//! head are covered by a CRC32C of their own, the payload by the per-block checksums in the head, so
//! nothing that arrives is believed unchecked. Integers are little-endian.
//!
//! What this module refuses: a frame whose lengths are beyond the limits, whose checksum is wrong or
//! whose head does not fit its kind. All three end the connection, never anything else.

pub mod changes;
pub mod codec;
pub mod copies;
mod frame;
pub mod messages;

pub use frame::{Frame, FrameReader, Prefix, decode, encode};

/// Opens every HELLO head (docs/wire.md, "Hello"); its layout is the same in all versions.
pub const MAGIC: [u8; 8] = *b"HCIWIRE\n";
/// The protocol version that this code speaks.
pub const VERSION: u16 = 5;
/// Bytes of a frame's prefix.
pub const PREFIX_BYTES: usize = 28;
/// Largest head. A full block summary of a 64 MiB shard (16,384 × 25 bytes) fits.
pub const HEAD_BYTES_MAX: usize = 512 * 1024;
/// Largest payload: the part of a request that travels as one frame.
pub const PAYLOAD_BYTES_MAX: usize = 1 << 20;
/// Set in the kind of a reply.
pub const REPLY: u8 = 0x80;

/// Kinds of request (docs/wire.md, "Kinds"); a reply has the same number with `REPLY` set.
pub mod kind {
    pub const HELLO: u8 = 1;
    pub const PING: u8 = 2;
    pub const PEEK: u8 = 3;
    pub const RECORD: u8 = 4;
    pub const ATTACH: u8 = 5;
    pub const DETACH: u8 = 6;
    pub const CONFIRM: u8 = 7;
    pub const MEMORY: u8 = 8;
    pub const ATTACH_READER: u8 = 9;
    /// From node to node, on a connection where nothing else is asked.
    pub const PEER_FETCH: u8 = 10;
    pub const WRITE: u8 = 16;
    pub const ZERO: u8 = 17;
    pub const READ: u8 = 18;
    pub const STATUS: u8 = 19;
    pub const FLUSH: u8 = 20;
    pub const CLEAR: u8 = 21;
    pub const READ_INTO: u8 = 22;
    pub const DIRTY: u8 = 32;
    pub const SUMMARY: u8 = 33;
    pub const FETCH: u8 = 34;
    pub const COPY: u8 = 35;
    pub const LEVEL: u8 = 36;
    pub const WRITTEN: u8 = 37;
    pub const SCRUB: u8 = 38;
    pub const PULL: u8 = 39;
    pub const CHANGES: u8 = 45;
    pub const TOUCHED: u8 = 46;
}

/// Flag bits.
pub mod flag {
    /// WRITE, ZERO: answer only when durable.
    pub const FUA: u8 = 1;
    /// ZERO: keep the blocks allocated (they become explicit zeroes).
    pub const KEEP_ALLOCATED: u8 = 2;
    /// Replies to SUMMARY, FETCH, COPY, SCRUB, PULL and PEER_FETCH: clients of some image ask something of
    /// the node.
    pub const BESIDE_CLIENTS: u8 = 1;
}

/// Outcome of a request (docs/wire.md, "Status").
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
pub enum Status {
    Ok = 0,
    /// Head or lengths make no sense for the image.
    Malformed = 1,
    /// HELLO: the peer speaks no version of ours.
    Version = 2,
    /// HELLO: the peer belongs to another cluster.
    WrongCluster = 3,
    /// HELLO: the peer is another node than was asked for.
    WrongNode = 4,
    /// The node holds no record of this image.
    NoRecord = 5,
    /// The node knows a higher epoch, or this epoch under another holder.
    StaleEpoch = 6,
    /// The node knows a higher generation, or this generation with other sets.
    StaleGeneration = 7,
    /// The handle is not attached, or a newer session has taken its place.
    NoSession = 8,
    /// The payload did not match its checksums on arrival.
    BadChecksum = 9,
    /// A stored block does not match its checksum; the head names it.
    BadBlock = 10,
    NoSpace = 11,
    Io = 12,
    /// The image was deleted here.
    Deleted = 13,
    /// Too many dirty shards: flush, clear, ask again.
    DirtyFull = 14,
    /// ATTACH_READER: the node has no such frozen layers, or not all that is in them. CHANGES and TOUCHED: its
    /// record does not name that snapshot.
    NoLayers = 15,
    /// PULL: the source cannot be reached, or does not give what was asked for.
    Unreachable = 16,
    /// PULL: something that came later was about the same blocks, or too much is under way.
    Cancelled = 17,
}

impl Status {
    pub fn from_wire(value: u16) -> Option<Status> {
        use Status::*;
        const ALL: [Status; 18] = [
            Ok,
            Malformed,
            Version,
            WrongCluster,
            WrongNode,
            NoRecord,
            StaleEpoch,
            StaleGeneration,
            NoSession,
            BadChecksum,
            BadBlock,
            NoSpace,
            Io,
            Deleted,
            DirtyFull,
            NoLayers,
            Unreachable,
            Cancelled,
        ];
        ALL.get(usize::from(value)).copied()
    }
}

/// Why a connection has to end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WireError {
    HeadTooLong(u32),
    PayloadTooLong(u32),
    BadHeadChecksum,
    /// The head is shorter or longer than its kind says, or a field is out of range.
    BadHead {
        kind: u8,
    },
    UnknownStatus(u16),
}

impl std::fmt::Display for WireError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            WireError::HeadTooLong(n) => write!(f, "frame head of {n} bytes is over the limit"),
            WireError::PayloadTooLong(n) => {
                write!(f, "frame payload of {n} bytes is over the limit")
            }
            WireError::BadHeadChecksum => write!(f, "frame head does not match its checksum"),
            WireError::BadHead { kind } => write!(f, "head of a kind {kind} frame is malformed"),
            WireError::UnknownStatus(s) => write!(f, "status {s} is unknown"),
        }
    }
}
