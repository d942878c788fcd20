//! What the store refuses and why. Every variant says what the caller may do.
//!
//! ```text
//! StoreError
//! ├── ends this instance   Failed
//! ├── cannot be opened     Locked, Foreign, Format, Corrupt, Io
//! ├── retry later          LogFull, DirtyFull (after a clear), NoSpace
//! ├── repair, then retry   BadBlock
//! ├── resend               BadChecksum
//! ├── refresh the record   UnknownImage, NoParent, RecordLower, RecordConflict, NotMerged,
//! │                        EpochLower
//! ├── give up              Deleted
//! └── a caller's mistake   OutOfRange, TooLarge
//! ```

use std::fmt;

use super::disk::Errno;
use super::images::RecordHead;
use crate::geometry::{ImageId, LayerId};

/// Why a request of the store was not done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreError {
    /// A log write or a sync failed; never retried. The instance must end.
    Failed { errno: Errno },
    /// Another process has the store open.
    Locked,
    /// The folder holds the store of another cluster or node.
    Foreign { cluster: [u8; 16], node: String },
    /// Written in another version of the format.
    Format { version: u32 },
    /// A file that nothing can stand in for is damaged.
    Corrupt { file: String },
    /// The disk failed an operation that left the store as it was.
    Io { errno: Errno },
    /// No room in the log until a checkpoint has run: park the request and retry then.
    LogFull,
    /// Too many dirty shards: flush, clear, retry.
    DirtyFull,
    /// No space for a checkpoint; everything is still in the log.
    NoSpace,
    /// A fragment does not match its checksum: it was damaged on the way here.
    BadChecksum { block: u32 },
    /// The stored block does not match its checksum: repair it from another replica.
    /// Of a clone it may be one of its ancestors' blocks.
    BadBlock { image: ImageId, layer: LayerId, shard: u64, block: u32 },
    /// This node has no record of the image.
    UnknownImage { image: ImageId },
    /// What the image is a clone of is not here, or not all that is in it: heal that first.
    NoParent { parent: ImageId },
    /// The offered record is older than the stored one.
    RecordLower { stored: Box<RecordHead> },
    /// The offered record is as new as the stored one and says something else.
    RecordConflict { stored: Box<RecordHead> },
    /// The offered record lacks a layer that is not merged here yet, or has it as one that stays.
    NotMerged { layer: LayerId },
    /// A change under an epoch below the stored one.
    EpochLower { stored: Box<RecordHead> },
    /// The image was deleted here; it never comes back.
    Deleted { image: ImageId },
    /// The range does not lie within the shard, or is empty, or its checksums do not match in
    /// number.
    OutOfRange,
    /// More than one request may hold; split it.
    TooLarge,
}

impl From<Errno> for StoreError {
    fn from(errno: Errno) -> StoreError {
        match errno {
            Errno::NOSPC | Errno::DQUOT => StoreError::NoSpace,
            errno => StoreError::Io { errno },
        }
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StoreError::Failed { errno } => {
                write!(f, "the store failed ({errno}); restart the node")
            }
            StoreError::Locked => write!(f, "the store is open in another process"),
            StoreError::Foreign { cluster, node } => {
                write!(f, "the store belongs to node {node} of cluster {}", ImageId(*cluster))
            }
            StoreError::Format { version } => {
                write!(f, "the store has format {version}, which this program does not read")
            }
            StoreError::Corrupt { file } => write!(f, "{file} is damaged; replace the disk"),
            StoreError::Io { errno } => write!(f, "the disk failed: {errno}"),
            StoreError::LogFull => write!(f, "the log is full until a checkpoint has run"),
            StoreError::DirtyFull => write!(f, "too many dirty shards until they are cleared"),
            StoreError::NoSpace => write!(f, "no space left on the store's disk"),
            StoreError::BadChecksum { block } => {
                write!(f, "the data for block {block} does not match its checksum")
            }
            StoreError::BadBlock { image, layer, shard, block } => write!(
                f,
                "block {block} of shard {shard}, layer {layer} of image {image}, is damaged on disk"
            ),
            StoreError::UnknownImage { image } => write!(f, "no record of image {image} here"),
            StoreError::NoParent { parent } => {
                write!(f, "image {parent}, which it is a clone of, is not whole here")
            }
            StoreError::RecordLower { stored } => write!(
                f,
                "the stored record is newer: epoch {}, generation {}",
                stored.epoch, stored.generation
            ),
            StoreError::RecordConflict { stored } => write!(
                f,
                "another record has the same epoch {} or generation {}",
                stored.epoch, stored.generation
            ),
            StoreError::NotMerged { layer } => {
                write!(f, "layer {layer} is still being merged here")
            }
            StoreError::EpochLower { stored } => {
                write!(f, "the image's writer is at epoch {} already", stored.epoch)
            }
            StoreError::Deleted { image } => write!(f, "image {image} was deleted"),
            StoreError::OutOfRange => write!(f, "the range does not lie within the shard"),
            StoreError::TooLarge => write!(f, "the request is too large for the log"),
        }
    }
}

impl std::error::Error for StoreError {}
