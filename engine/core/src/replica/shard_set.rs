//! A set of shards: a bit each, so that the list of a whole image stays small (some 100 KiB per TiB).

use std::collections::BTreeMap;

/// Shards, in order.
#[derive(Clone, Default, Debug, PartialEq, Eq)]
pub(super) struct ShardSet {
    words: BTreeMap<u64, u64>,
    length: u64,
}

impl ShardSet {
    pub fn len(&self) -> u64 {
        self.length
    }

    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    pub fn has(&self, shard: u64) -> bool {
        self.words.get(&(shard / 64)).is_some_and(|word| word & (1 << (shard % 64)) != 0)
    }

    /// True: it was not in it.
    pub fn insert(&mut self, shard: u64) -> bool {
        let word = self.words.entry(shard / 64).or_insert(0);
        let bit = 1 << (shard % 64);
        let new = *word & bit == 0;
        *word |= bit;
        self.length += u64::from(new);
        new
    }

    /// True: it was in it.
    pub fn remove(&mut self, shard: u64) -> bool {
        let bit = 1 << (shard % 64);
        let Some(word) = self.words.get_mut(&(shard / 64)).filter(|word| **word & bit != 0) else {
            return false;
        };
        *word &= !bit;
        if *word == 0 {
            self.words.remove(&(shard / 64));
        }
        self.length -= 1;
        true
    }

    pub fn retain(&mut self, keep: impl Fn(u64) -> bool) {
        let gone: Vec<u64> = self.iter().filter(|shard| !keep(*shard)).collect();
        gone.into_iter().for_each(|shard| _ = self.remove(shard));
    }

    pub fn iter(&self) -> impl Iterator<Item = u64> {
        let of_word = |(word, bits): (&u64, &u64)| {
            let (word, bits) = (*word, *bits);
            (0..64).filter(move |bit| bits & (1 << bit) != 0).map(move |bit| word * 64 + bit)
        };
        self.words.iter().flat_map(of_word)
    }

    pub fn pop_first(&mut self) -> Option<u64> {
        let mut first = self.words.first_entry()?;
        let bit = first.get().trailing_zeros();
        let shard = first.key() * 64 + u64::from(bit);
        *first.get_mut() &= !(1 << bit);
        if *first.get() == 0 {
            first.remove();
        }
        self.length -= 1;
        Some(shard)
    }

    /// The first shard from `from` on.
    pub fn next(&self, from: u64) -> Option<u64> {
        let in_word =
            self.words.get(&(from / 64)).map_or(0, |word| word & (u64::MAX << (from % 64)));
        let (word, bits) = match in_word {
            0 => self.words.range((from / 64).checked_add(1)?..).next().map(|(w, b)| (*w, *b))?,
            bits => (from / 64, bits),
        };
        Some(word * 64 + u64::from(bits.trailing_zeros()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_come_out_once_and_in_order() {
        let mut set = ShardSet::default();
        for shard in [u64::MAX, 64, 3, 63, 3, 1 << 40] {
            set.insert(shard);
        }
        assert_eq!(set.len(), 5);
        assert!(set.has(63) && !set.has(62));
        assert_eq!(set.next(4), Some(63));
        assert_eq!(set.next(65), Some(1 << 40));
        assert_eq!(set.next((1 << 40) + 1), Some(u64::MAX));
        assert!(set.insert(62) && set.remove(62) && !set.remove(62));
        assert_eq!(set.iter().collect::<Vec<_>>(), [3, 63, 64, 1 << 40, u64::MAX]);
        set.insert(5);
        set.retain(|shard| shard != 5);
        let order: Vec<u64> = std::iter::from_fn(|| set.pop_first()).collect();
        assert_eq!(order, [3, 63, 64, 1 << 40, u64::MAX]);
        assert!(set.is_empty() && set.next(0).is_none());
    }
}
