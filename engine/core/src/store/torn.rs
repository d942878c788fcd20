//! Which shards an interrupted checkpoint may have left with a torn metadata slot: a Bloom filter that
//! stands in the log's tail while a checkpoint writes.
//!
//! A damaged slot beside a whole one tells nothing by itself. Where a checkpoint was writing it, the log
//! has what it was to say and the whole one is the truth before that. Everywhere else it may have been the
//! newer one, and its content is lost. The filter knows the difference for every shard that a checkpoint
//! writes; of the others it takes a few for such ones, the more the larger the checkpoint.

use crate::geometry::ShardKey;

use super::encoding::{Reader, push_u32, push_u64};

/// Bytes of a filter: what a page of the tail has room for.
pub const FILTER_BYTES: usize = 4032;
const HASHES: usize = 3;

/// Shards whose newer slot may be torn.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MayBeTorn(Box<[u8]>);

impl MayBeTorn {
    /// None of them.
    pub fn nothing() -> MayBeTorn {
        MayBeTorn(vec![0; FILTER_BYTES].into())
    }

    /// All of them: nothing is known.
    pub fn anything() -> MayBeTorn {
        MayBeTorn(vec![0xff; FILTER_BYTES].into())
    }

    pub fn insert(&mut self, key: &ShardKey) {
        for bit in bits(key) {
            self.0[bit / 8] |= 1 << (bit % 8);
        }
    }

    pub fn has(&self, key: &ShardKey) -> bool {
        bits(key).into_iter().all(|bit| self.0[bit / 8] & 1 << (bit % 8) != 0)
    }

    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.0);
    }

    pub fn decode(reader: &mut Reader<'_>) -> Option<MayBeTorn> {
        Some(MayBeTorn(reader.take(FILTER_BYTES)?.into()))
    }
}

/// BLAKE3 of image, layer (u32) and shard (u64); its first words name the bits.
fn bits(key: &ShardKey) -> [usize; HASHES] {
    let mut name = Vec::with_capacity(28);
    name.extend_from_slice(&key.image.0);
    push_u32(&mut name, key.layer);
    push_u64(&mut name, key.shard);
    let hash = blake3::hash(&name);
    let mut words = Reader::new(hash.as_bytes());
    // A hash has more words than are taken.
    std::array::from_fn(|_| words.u32().unwrap_or(0) as usize % (FILTER_BYTES * 8))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::ImageId;

    #[test]
    fn filter_has_all_that_was_put_in_and_little_else() {
        let key = |shard| ShardKey { image: ImageId([7; 16]), layer: 1, shard };
        let mut torn = MayBeTorn::nothing();
        (0..2000).for_each(|shard| torn.insert(&key(shard)));
        let mut bytes = Vec::new();
        torn.encode(&mut bytes);
        assert_eq!(MayBeTorn::decode(&mut Reader::new(&bytes)), Some(torn.clone()));
        assert!((0..2000).all(|shard| torn.has(&key(shard))));
        let others = (2000..12_000).filter(|shard| torn.has(&key(*shard))).count();
        assert!(others < 200, "{others} of 10,000");
        assert!(MayBeTorn::anything().has(&key(9)) && !MayBeTorn::nothing().has(&key(9)));
    }
}
