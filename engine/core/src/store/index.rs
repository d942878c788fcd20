//! Where the blocks are that still live in the log.
//!
//! Per shard a map from the first block of a run to the run. A run with data is one block long
//! (each block has its own checksum); a run without data may be of any length. Runs never overlap.
//! An entry may have no runs: it then only carries a generation that the shard's metadata does not
//! have yet. What is not in the index is in the shard file.

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasherDefault, Hasher};

use crate::checksum::Checksum;
use crate::geometry::{ShardKey, Tag};

use super::BlockState;

/// Hashes keys that no stranger chooses (random ids, indexes): multiply and fold.
#[derive(Default, Clone, Copy)]
pub struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0u8; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    fn write_u32(&mut self, value: u32) {
        self.write_u64(u64::from(value));
    }

    fn write_usize(&mut self, value: usize) {
        self.write_u64(value as u64);
    }

    fn write_u64(&mut self, value: u64) {
        let product = u128::from(self.0 ^ value ^ 0x9e37_79b9_7f4a_7c15) * 0xda94_2042_e4dd_58b5;
        self.0 = (product as u64) ^ ((product >> 64) as u64);
    }
}

/// A map whose keys no stranger chooses.
pub type KeyMap<K, V> = HashMap<K, V, BuildHasherDefault<KeyHasher>>;

/// A place in the log; later records have higher places.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Place {
    /// Sequence number of the segment.
    pub segment: u32,
    pub offset: u32,
}

impl Place {
    /// The place that stands for a record: its payload's first byte, or its own last one. Within
    /// the record either way, so below every later record's place.
    pub fn of_record(segment: u32, payload_start: u32, payload_bytes: u32) -> Place {
        Place { segment, offset: payload_start - u32::from(payload_bytes == 0) }
    }
}

/// Consecutive blocks in the same state, logged by one record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Run {
    pub length: u32,
    pub state: BlockState,
    /// Without data: the shard file keeps the space.
    pub keep_allocated: bool,
    /// Checksum of the one block of data.
    pub checksum: Checksum,
    /// Where in the log the data begins; without data, the place of its record.
    pub place: Place,
    pub tag: Tag,
}

/// What the log holds of one shard.
#[derive(Clone, Debug, Default)]
pub struct ShardIndex {
    /// Highest generation of the records in the log.
    pub generation: u64,
    /// Place of the last record about the shard.
    pub last: Place,
    /// No run, nor a generation that is not settled, is in an older segment. A lower bound: what is
    /// overwritten does not raise it, `tighten` does.
    pub oldest_segment: u32,
    /// Segment of the last record with the highest generation.
    generation_segment: u32,
    runs: BTreeMap<u32, Run>,
}

impl ShardIndex {
    /// The run that covers `block`.
    pub fn get(&self, block: u32) -> Option<&Run> {
        let (first, run) = self.runs.range(..=block).next_back()?;
        (block - first < run.length).then_some(run)
    }

    /// All runs with their first blocks, in order.
    pub fn runs(&self) -> impl Iterator<Item = (u32, &Run)> {
        self.runs.iter().map(|(first, run)| (*first, run))
    }

    /// Runs that touch `first..first + blocks`, in order, cut to that range.
    pub fn overlapping(&self, first: u32, blocks: u32) -> impl Iterator<Item = (u32, Run)> {
        let end = first + blocks;
        let before =
            self.runs.range(..first).next_back().filter(|(at, run)| *at + run.length > first);
        before.into_iter().chain(self.runs.range(first..end)).map(move |(at, run)| {
            let (from, to) = ((*at).max(first), (*at + run.length).min(end));
            (from, Run { length: to - from, ..*run })
        })
    }

    /// Records that `run` now holds its blocks.
    pub fn insert(&mut self, first: u32, run: Run) {
        assert!(run.length > 0 && (run.length == 1 || run.state != BlockState::Data));
        if run.length == 1
            && let Some(old) = self.runs.get_mut(&first)
            && old.length == 1
        {
            *old = run;
            return;
        }
        self.cut(first, run.length);
        self.runs.insert(first, run);
    }

    /// Removes `first..first + blocks` from the map, splitting runs that reach over its ends.
    fn cut(&mut self, first: u32, blocks: u32) {
        let end = first + blocks;
        if let Some((at, run)) = self.runs.range(..first).next_back().map(|(at, run)| (*at, *run))
            && at + run.length > first
        {
            self.runs.insert(at, Run { length: first - at, ..run });
            if at + run.length > end {
                self.runs.insert(end, Run { length: at + run.length - end, ..run });
            }
        }
        while let Some((at, run)) = self.runs.range(first..end).next().map(|(at, run)| (*at, *run))
        {
            self.runs.remove(&at);
            if at + run.length > end {
                self.runs.insert(end, Run { length: at + run.length - end, ..run });
            }
        }
    }

    /// Raises `oldest_segment` to what it is now that older records may have been overwritten.
    pub fn tighten(&mut self) {
        let segments = self.runs.values().map(|run| run.place.segment);
        let oldest = segments.fold(self.generation_segment, u32::min);
        self.oldest_segment = self.oldest_segment.max(oldest);
    }

    /// Drops runs before `upto`: a checkpoint has put them into the shard file, and its generation.
    fn retire(&mut self, upto: Place) {
        self.runs.retain(|_, run| run.place >= upto);
        self.generation_segment = self.generation_segment.max(upto.segment);
        let segments = self.runs.values().map(|run| run.place.segment);
        self.oldest_segment = segments.min().unwrap_or(self.last.segment);
    }
}

/// The index of all shards.
#[derive(Default)]
pub struct Index {
    shards: KeyMap<ShardKey, ShardIndex>,
}

impl Index {
    pub fn get(&self, key: &ShardKey) -> Option<&ShardIndex> {
        self.shards.get(key)
    }

    /// The shard's entry, touched by a record at `place` of `generation`.
    pub fn touch(&mut self, key: ShardKey, place: Place, generation: u64) -> &mut ShardIndex {
        let shard = self.shards.entry(key).or_insert_with(|| ShardIndex {
            oldest_segment: place.segment,
            ..ShardIndex::default()
        });
        if generation >= shard.generation {
            shard.generation = generation;
            shard.generation_segment = place.segment;
        }
        shard.last = place;
        shard
    }

    /// Drops what a checkpoint of the shard, made when the log ended at `upto`, has settled.
    pub fn retire(&mut self, key: &ShardKey, upto: Place) {
        if let Some(shard) = self.shards.get_mut(key) {
            shard.retire(upto);
            if shard.last < upto {
                assert!(shard.runs.is_empty(), "no run is newer than its shard's last record");
                self.shards.remove(key);
            }
        }
    }

    /// Drops all that the log has of a shard.
    pub fn remove(&mut self, key: &ShardKey) {
        self.shards.remove(key);
    }

    /// Keeps only what `keep` wants.
    pub fn retain(&mut self, keep: impl Fn(&ShardKey) -> bool) {
        self.shards.retain(|key, _| keep(key));
    }

    pub fn iter(&self) -> impl Iterator<Item = (&ShardKey, &ShardIndex)> {
        self.shards.iter()
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = (&ShardKey, &mut ShardIndex)> {
        self.shards.iter_mut()
    }
}
