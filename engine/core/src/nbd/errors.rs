//! What can go wrong on an NBD connection: errors that a request is answered with ([`Errno`]), and
//! errors after which the stream cannot be followed any more ([`ProtocolError`]).

use super::constants::error_value;
use rustix::io::Errno as Os;
use std::fmt;

/// Error of one request as the client sees it; the connection lives on. Section «Error values».
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Errno {
    /// The export is read-only, or the client may not do this.
    Permission = error_value::EPERM,
    Io = error_value::EIO,
    NoMemory = error_value::ENOMEM,
    /// The request makes no sense, or reads, trims or asks past the end.
    Invalid = error_value::EINVAL,
    /// No space left, or a write past the end.
    NoSpace = error_value::ENOSPC,
    Overflow = error_value::EOVERFLOW,
    /// FAST_ZERO where zeroing would be no faster than writing.
    NotSupported = error_value::ENOTSUP,
    Shutdown = error_value::ESHUTDOWN,
}

impl Errno {
    /// The number on the wire.
    pub fn code(self) -> u32 {
        self as u32
    }

    /// The one table from an errno of the system (a disk's, a replica's) to the guest's.
    ///
    /// EINVAL becomes EIO: the request was checked before it was sent to a disk, so a disk that
    /// calls it invalid has failed, and the guest did nothing wrong. Whatever is not named is EIO.
    pub fn from_system(errno: i32) -> Errno {
        match Os::from_raw_os_error(errno) {
            Os::PERM | Os::ACCESS | Os::ROFS => Errno::Permission,
            Os::NOSPC | Os::DQUOT | Os::FBIG => Errno::NoSpace,
            Os::NOMEM => Errno::NoMemory,
            Os::OPNOTSUPP => Errno::NotSupported,
            Os::OVERFLOW => Errno::Overflow,
            Os::SHUTDOWN => Errno::Shutdown,
            _ => Errno::Io,
        }
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Errno::Permission => "EPERM",
            Errno::Io => "EIO",
            Errno::NoMemory => "ENOMEM",
            Errno::Invalid => "EINVAL",
            Errno::NoSpace => "ENOSPC",
            Errno::Overflow => "EOVERFLOW",
            Errno::NotSupported => "ENOTSUP",
            Errno::Shutdown => "ESHUTDOWN",
        })
    }
}

/// The client does not speak the protocol; the connection must be closed without another byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProtocolError {
    /// The client set handshake flags that were not offered.
    ClientFlags(u32),
    /// An option did not begin with `IHAVEOPT`.
    OptionMagic(u64),
    /// More options than one handshake may send.
    TooManyOptions(u32),
    /// A request did not begin with the request magic.
    RequestMagic(u32),
    /// A request has a payload of more bytes than are worth reading past.
    PayloadLength(u64),
}

impl fmt::Display for ProtocolError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProtocolError::ClientFlags(flags) => {
                write!(f, "the client set unknown handshake flags {flags:#010x}")
            }
            ProtocolError::OptionMagic(magic) => {
                write!(f, "expected an NBD option, got magic {magic:#018x}")
            }
            ProtocolError::TooManyOptions(limit) => {
                write!(f, "the client sent more than {limit} options without opening an export")
            }
            ProtocolError::RequestMagic(magic) => {
                write!(f, "expected an NBD request, got magic {magic:#010x}")
            }
            ProtocolError::PayloadLength(length) => {
                write!(f, "a request has {length} bytes of payload")
            }
        }
    }
}

impl std::error::Error for ProtocolError {}
