//! CRC32C (Castagnoli, RFC 3720 appendix B.4), the checksum of every block, on disk and on the wire.

use crate::geometry::BLOCK_BYTES;

/// CRC32C of `bytes`.
#[inline]
pub fn crc32c(bytes: &[u8]) -> u32 {
    ::crc32c::crc32c(bytes)
}

/// CRC32C of each block of `data`, in order; the last piece may be shorter than a block.
pub fn block_checksums(data: &[u8], out: &mut Vec<u32>) {
    out.extend(data.chunks(BLOCK_BYTES as usize).map(crc32c));
}
