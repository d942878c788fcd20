//! NBD: handshake, requests and replies without I/O; `serve` does the I/O.
//!
//! Bytes go in through a `BytesMut`, bytes come out through a `BytesMut` or a [`Sink`]; no socket,
//! clock or thread is known here. What the caller decides (which exports exist, who may open one,
//! what a request does) reaches these modules as answers and results.
//!
//! Invariants: whatever a client sends, nothing panics and no buffer grows past [`Limits`]; the
//! same input gives the same output however it is cut into pieces; a client's mistake that the
//! protocol can answer is answered, and only one that leaves the stream without a boundary ends
//! the connection ([`ProtocolError`]).
//!
//! The specification is the NBD project's `doc/proto.md`; section names in comments are its own.

pub mod budget;
pub mod constants;
mod counters;
mod errors;
mod handshake;
mod options;
mod reply;
mod request;
pub mod serve;

pub use counters::Counters;
pub use errors::{Errno, ProtocolError};
pub use handshake::{Answer, Handshake, Query, Step};
pub use reply::{Addressee, Extent, block_status, done, error, read};
pub use request::{Command, Flags, Parsed, Refusal, Request, RequestReader, check};

use crate::geometry::SnapshotId;
use constants::{MAX_STRING_BYTES, transmission_flags as flag};
use std::sync::Arc;

/// What one connection may ask for, and what the export's block sizes are said to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Largest read or write in bytes; advertised as the maximum block size.
    pub max_payload: u32,
    /// Block size that clients should prefer, a power of two.
    pub preferred_block: u32,
    /// Smallest unit of offset and length, a power of two; 1 takes every byte range.
    pub min_block: u32,
    /// Longest option data that is kept in memory; more is drained and answered with ERR_TOO_BIG.
    pub max_option_bytes: u32,
    /// Options that one handshake may send before it is ended.
    pub max_options: u32,
    /// Most extents in one block status reply; a client asks again from where the reply ended.
    pub max_extents: usize,
}

impl Default for Limits {
    /// 32 MiB is the maximum that clients assume unasked, and what qemu-nbd advertises. Option data
    /// holds a 4096-byte export name and a dozen queries. A thousand options is far more than any
    /// client sends, and bounds what a client can make the server say before it opens an export.
    fn default() -> Self {
        Limits {
            max_payload: 32 << 20,
            preferred_block: 4096,
            min_block: 1,
            max_option_bytes: 16 << 10,
            max_options: 1000,
            max_extents: 4096,
        }
    }
}

/// One export as a client is to see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// Canonical name, `POOL/IMAGE`.
    pub name: String,
    pub size_bytes: u64,
    pub read_only: bool,
    /// Whether a flush on one connection covers the answered writes of all connections.
    pub multi_conn: bool,
    /// Text for people; may be empty.
    pub description: String,
}

/// Whether a listener's clients go on under TLS. Section «TLS support».
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum TlsMode {
    /// `NOTLS`.
    #[default]
    Off,
    /// `SELECTIVETLS`: as the client likes.
    Optional,
    /// `FORCEDTLS`: nothing else is answered before.
    Required,
}

/// How requests are sent and answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum ReplyStyle {
    /// One header per request; the data of a read follows it whole.
    #[default]
    Simple,
    /// Chunks (section «Structured reply chunk message»).
    Structured,
    /// Chunks with headers for lengths of 64 bits (section «Extended reply chunk message»).
    Extended,
}

/// Metadata contexts that a client selected, by the ids that it was told.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Contexts {
    /// `base:allocation`.
    pub allocation: Option<u32>,
    /// `qemu:allocation-depth`.
    pub depth: Option<u32>,
    /// Ids of `qemu:dirty-bitmap:NAME`, in the order of `since`.
    pub dirty: Vec<u32>,
    /// Their snapshots, the newest first.
    pub since: Arc<[SnapshotId]>,
}

impl Contexts {
    pub fn is_empty(&self) -> bool {
        *self == Contexts::default()
    }

    pub fn count(&self) -> usize {
        usize::from(self.allocation.is_some())
            + usize::from(self.depth.is_some())
            + self.dirty.len()
    }

    /// Whether it matters in which layer a block is.
    pub fn tell_layers(&self) -> bool {
        self.depth.is_some() || !self.dirty.is_empty()
    }

    /// The oldest snapshot that something is compared with; none where all layers count.
    pub fn floor(&self) -> Option<SnapshotId> {
        let all = self.depth.is_some() || self.allocation.is_some();
        self.since.last().copied().filter(|_| !all)
    }
}

/// What the handshake settled for one connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    pub export: ExportInfo,
    pub limits: Limits,
    pub replies: ReplyStyle,
    /// What the client selected for this export.
    pub contexts: Contexts,
    /// The client declined the 124 zero bytes after EXPORT_NAME.
    pub no_zeroes: bool,
}

impl Session {
    /// Whether replies come in chunks.
    pub fn structured(&self) -> bool {
        self.replies != ReplyStyle::Simple
    }

    /// The flags that this session was told (section «Transmission flags»).
    pub fn transmission_flags(&self) -> u16 {
        transmission_flags(&self.export, self.replies)
    }
}

/// Flags of an export for a connection that uses `replies` (section «Transmission flags»).
fn transmission_flags(export: &ExportInfo, replies: ReplyStyle) -> u16 {
    let mut flags = flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_FUA | flag::SEND_CACHE;
    if export.read_only {
        flags |= flag::READ_ONLY;
    } else {
        flags |= flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO;
    }
    if export.multi_conn {
        flags |= flag::CAN_MULTI_CONN;
    }
    if replies != ReplyStyle::Simple {
        flags |= flag::SEND_DF;
    }
    flags
}

/// Text cut to the longest string that the protocol allows, at a character's boundary.
fn shortened(text: &str) -> &str {
    let mut end = text.len().min(MAX_STRING_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}
