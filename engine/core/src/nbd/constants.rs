//! Every number of the NBD protocol that this server sends or understands.
//! Each group names its section of the specification; those of extended headers are in its branch
//! `extension-ext-header`.

/// «Newstyle negotiation»: the first eight bytes, `NBDMAGIC`.
pub const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
/// «Newstyle negotiation»: begins the rest of the greeting and every option, `IHAVEOPT`.
pub const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
/// «Fixed newstyle negotiation»: begins every reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// «Request message», `NBD_REQUEST_MAGIC`.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// «Request message», `NBD_EXTENDED_REQUEST_MAGIC`.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// «Simple reply message», `NBD_SIMPLE_REPLY_MAGIC`.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// «Structured reply chunk message», `NBD_STRUCTURED_REPLY_MAGIC`.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// «Extended reply chunk message», `NBD_EXTENDED_REPLY_MAGIC`.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// «Fixed newstyle negotiation»: magic, option, length.
pub const OPTION_HEADER_BYTES: usize = 16;
/// «Request message»: magic, flags, type, cookie, offset, length.
pub const REQUEST_HEADER_BYTES: usize = 28;
/// «Request message», extended: the same with a length of 64 bits.
pub const EXTENDED_REQUEST_HEADER_BYTES: usize = 32;
/// «Newstyle negotiation»: zeroes after EXPORT_NAME unless the client declined them.
pub const EXPORT_NAME_ZEROES: usize = 124;
/// «Protocol phases»: no string is longer than this many bytes.
pub const MAX_STRING_BYTES: usize = 4096;

/// «Handshake flags», 16 bits, server to client.
pub mod handshake_flags {
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// «Client flags», 32 bits.
pub mod client_flags {
    pub const FIXED_NEWSTYLE: u32 = 1 << 0;
    pub const NO_ZEROES: u32 = 1 << 1;
}

/// «Transmission flags», 16 bits.
pub mod transmission_flags {
    pub const HAS_FLAGS: u16 = 1 << 0;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    pub const SEND_CACHE: u16 = 1 << 10;
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// «Option types».
pub mod option {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// «Option reply types».
pub mod option_reply {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERR_UNSUP: u32 = (1 << 31) | 1;
    pub const ERR_POLICY: u32 = (1 << 31) | 2;
    pub const ERR_INVALID: u32 = (1 << 31) | 3;
    pub const ERR_TLS_REQD: u32 = (1 << 31) | 5;
    pub const ERR_UNKNOWN: u32 = (1 << 31) | 6;
    pub const ERR_SHUTDOWN: u32 = (1 << 31) | 7;
    pub const ERR_BLOCK_SIZE_REQD: u32 = (1 << 31) | 8;
    pub const ERR_TOO_BIG: u32 = (1 << 31) | 9;
    pub const ERR_EXT_HEADER_REQD: u32 = (1 << 31) | 10;
}

/// «Option reply types», information types of `NBD_REP_INFO`.
pub mod info {
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// «The `base:` metadata namespace», and QEMU's own (docs/interop/nbd.txt there).
pub mod context {
    /// Wildcard of LIST_META_CONTEXT; selects nothing in SET_META_CONTEXT.
    pub const BASE: &str = "base:";
    pub const BASE_ALLOCATION: &str = "base:allocation";
    /// This server's id for `base:allocation`; clients treat ids as opaque.
    pub const BASE_ALLOCATION_ID: u32 = 1;
    /// Wildcard of QEMU's contexts.
    pub const QEMU: &str = "qemu:";
    /// 0: not allocated; 1: in the image itself; above: in a parent so far away.
    pub const ALLOCATION_DEPTH: &str = "qemu:allocation-depth";
    pub const ALLOCATION_DEPTH_ID: u32 = 2;
    /// Before the name of a bitmap, here a snapshot; alone a wildcard.
    pub const DIRTY_BITMAP: &str = "qemu:dirty-bitmap:";
    /// The first one's id; the others follow.
    pub const DIRTY_BITMAP_ID: u32 = 3;
    /// `NBD_STATE_DIRTY` of a bitmap: written since.
    pub const STATE_DIRTY: u32 = 1 << 0;
    /// `NBD_STATE_HOLE`: not allocated.
    pub const STATE_HOLE: u32 = 1 << 0;
    /// `NBD_STATE_ZERO`: reads as zeroes.
    pub const STATE_ZERO: u32 = 1 << 1;
}

/// «Request types».
pub mod command {
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// «Command flags».
pub mod command_flags {
    pub const FUA: u16 = 1 << 0;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
    pub const REQ_ONE: u16 = 1 << 3;
    pub const FAST_ZERO: u16 = 1 << 4;
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// «Structured reply types» and «Structured reply flags».
pub mod chunk {
    pub const FLAG_DONE: u16 = 1 << 0;
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    pub const BLOCK_STATUS_EXT: u16 = 6;
    pub const ERROR: u16 = (1 << 15) | 1;
}

/// «Error values».
pub mod error_value {
    pub const EPERM: u32 = 1;
    pub const EIO: u32 = 5;
    pub const ENOMEM: u32 = 12;
    pub const EINVAL: u32 = 22;
    pub const ENOSPC: u32 = 28;
    pub const EOVERFLOW: u32 = 75;
    pub const ENOTSUP: u32 = 95;
    pub const ESHUTDOWN: u32 = 108;
}
