//! Where a byte of an image lives: blocks, shards, layers, replica sets. Pure arithmetic.

use std::fmt;
use std::str::FromStr;

/// The unit of checksum, presence and changed-block tracking.
pub const BLOCK_BYTES: u32 = 4096;
/// Smallest and largest shard size a pool may choose (both powers of two).
pub const SHARD_BYTES_MIN: u32 = 1 << 20;
pub const SHARD_BYTES_MAX: u32 = 64 << 20;
/// Size limit of an image: 256 TiB.
pub const IMAGE_BYTES_MAX: u64 = 256 << 40;
/// Most layers of an image, and most snapshots.
pub const LAYERS_MAX: usize = 1024;
/// Most images that a clone is seen through, beside itself.
pub const ANCESTORS_MAX: usize = 15;

/// Random 128-bit id of an image, never reused; printed as 32 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageId(pub [u8; 16]);

impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text is not 32 hex digits.
#[derive(Debug, PartialEq, Eq)]
pub struct BadImageId;

impl FromStr for ImageId {
    type Err = BadImageId;

    fn from_str(text: &str) -> Result<Self, BadImageId> {
        if text.len() != 32 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(BadImageId);
        }
        let value = u128::from_str_radix(text, 16).map_err(|_| BadImageId)?;
        Ok(ImageId(value.to_be_bytes()))
    }
}

/// Number of a layer within its image; grows, never reused within the image.
pub type LayerId = u32;

/// Names a state of an image that is kept: what a layer and those below it held when it was frozen.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct SnapshotId {
    pub layer: LayerId,
    /// Of the record that put another layer on top. It tells two snapshots of a layer apart, of which the
    /// first was taken back before a node had stored it.
    pub generation: u64,
}

/// What a clone began with: a snapshot of another image.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Parent {
    pub image: ImageId,
    pub snapshot: SnapshotId,
    /// Of the snapshot: the clone has nothing from its parent beyond that.
    pub size_bytes: u64,
}

/// One shard of one layer of one image.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ShardKey {
    pub image: ImageId,
    pub layer: LayerId,
    pub shard: u64,
}

/// Orders the writes of a block over all holders: the higher (epoch, sequence) is the later one.
/// `Tag::NONE` is below every real write's tag.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Hash)]
pub struct Tag {
    pub epoch: u64,
    pub sequence: u64,
}

impl Tag {
    pub const NONE: Tag = Tag { epoch: 0, sequence: 0 };
}

/// How an image's bytes are cut into shards and spread over replica sets.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    pub size_bytes: u64,
    pub shard_bytes: u32,
    /// Id of the image's oldest ancestor (its own where it is no clone).
    pub placement_key: ImageId,
    pub replica_sets: u32,
}

impl Geometry {
    /// Index of the shard that holds byte `offset`.
    #[inline]
    pub fn shard_of(&self, offset: u64) -> u64 {
        offset / u64::from(self.shard_bytes)
    }

    /// Number of shards, the last one perhaps partly used.
    pub fn shards(&self) -> u64 {
        self.size_bytes.div_ceil(u64::from(self.shard_bytes))
    }

    /// Replica set of shard `shard`.
    pub fn replica_set_of(&self, shard: u64) -> u32 {
        replica_set_index(&self.placement_key, shard, self.replica_sets)
    }
}

/// Replica set of a shard, by hash of (placement key, shard index): FNV-1a over both, finished with
/// SplitMix64's mixer so that neighbouring shards spread. Part of the placement format: never change it.
pub fn replica_set_index(placement_key: &ImageId, shard: u64, replica_sets: u32) -> u32 {
    assert!(replica_sets > 0, "an image has at least one replica set");
    if replica_sets == 1 {
        return 0;
    }
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for byte in placement_key.0.iter().copied().chain(shard.to_le_bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^= hash >> 31;
    (hash % u64::from(replica_sets)) as u32
}

/// Number of blocks that `length` bytes at `offset` touch.
#[inline]
pub fn blocks_touched(offset: u64, length: u64) -> u64 {
    if length == 0 {
        return 0;
    }
    (offset + length).div_ceil(u64::from(BLOCK_BYTES)) - offset / u64::from(BLOCK_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_id_round_trips_through_text() {
        let id = ImageId([7; 16]);
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!("xyz".parse::<ImageId>(), Err(BadImageId));
    }

    #[test]
    fn blocks_touched_counts_partial_blocks() {
        assert_eq!(blocks_touched(0, 0), 0);
        assert_eq!(blocks_touched(4095, 2), 2);
        assert_eq!(blocks_touched(4096, 4096), 1);
    }

    #[test]
    fn replica_sets_are_spread_evenly() {
        let mut count = [0u32; 4];
        (0..4000).for_each(|s| count[replica_set_index(&ImageId([3; 16]), s, 4) as usize] += 1);
        assert!(count.iter().all(|&c| (850..1150).contains(&c)), "{count:?}");
    }
}
