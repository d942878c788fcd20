//! What a block holds, and what a read found: the words that store, wire, replication and NBD share.

use crate::checksum::Checksum;
use bytes::Bytes;

/// What one block holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Block {
    /// Nothing was ever written here, or it was discarded: the layer below shows, or zeroes.
    Absent,
    /// Explicit zeroes, which hide the layer below.
    Zero,
    /// Data with this checksum.
    Data(Checksum),
    /// Damaged on every replica: reading it is an error until it is written.
    Bad,
}

impl Block {
    pub fn is_data(&self) -> bool {
        matches!(self, Block::Data(_))
    }
}

/// A piece of what a read found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Run {
    Data(Bytes),
    /// This many bytes that read as zeroes.
    Hole(u32),
}

impl Run {
    pub fn length(&self) -> u64 {
        match self {
            Run::Data(data) => data.len() as u64,
            Run::Hole(length) => u64::from(*length),
        }
    }

    pub fn is_hole(&self) -> bool {
        matches!(self, Run::Hole(_))
    }
}
