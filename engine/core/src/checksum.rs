//! The checksums of this format: of blocks, and of everything else.
//!
//! Blocks have XXH3-64 (seed 0, https://github.com/Cyan4973/xxHash). Replicas that hold the same checksum for a
//! block count as equal, so it has to tell any two contents apart that guests write. A CRC32C cannot: ext4
//! ends its directory and extent blocks with their own CRC32C, and then the CRC32C of the whole block is the
//! same for every content (docs/decisions/0022).
//!
//! Headers of records, slots and frames have CRC32C (Castagnoli, RFC 3720 appendix B.4): guests have no
//! say in their content, and nothing is compared by it.

use crate::geometry::BLOCK_BYTES;
use twox_hash::XxHash3_64;

/// Bytes of a block's checksum, on disk and on the wire.
pub const CHECKSUM_BYTES: usize = 8;

/// The checksum of a block's content, or of the part of it that a request has.
pub type Checksum = u64;

/// CRC32C of `bytes`.
#[inline]
pub fn crc32c(bytes: &[u8]) -> u32 {
    ::crc32c::crc32c(bytes)
}

/// The checksum of a block, or of a part of one.
#[inline]
pub fn checksum_of(content: &[u8]) -> Checksum {
    XxHash3_64::oneshot(content)
}

/// The checksum of each block of `data`, in order; the last piece may be shorter than a block.
pub fn block_checksums(data: &[u8], out: &mut Vec<Checksum>) {
    out.extend(data.chunks(BLOCK_BYTES as usize).map(checksum_of));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A block as ext4 writes those of directories and extents: its last four bytes are the CRC32C
    /// of the others, begun from a seed that the inode has, and not inverted.
    fn block_of_ext4(content: u8, seed: u32) -> Vec<u8> {
        let mut block = vec![content; BLOCK_BYTES as usize - 4];
        let own = !::crc32c::crc32c_append(!seed, &block);
        block.extend(own.to_le_bytes());
        block
    }

    // A heal compared blocks by CRC32C and left a node in sync with directories from before.
    #[test]
    fn blocks_that_end_with_their_own_crc32c_are_told_apart() {
        let (one, other) = (block_of_ext4(1, 0x1234_5678), block_of_ext4(77, 0x1234_5678));
        assert_ne!(one, other);
        assert_eq!(crc32c(&one), crc32c(&other), "this is why blocks have another checksum");
        assert_ne!(checksum_of(&one), checksum_of(&other));
    }

    #[test]
    fn checksums_are_those_of_the_specification() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(checksum_of(b""), 0x2d06_8005_38d3_94c2);
    }
}
