//! Layers: an image gets new ones on top, and what is below never changes again.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::rig::*;
use crate::geometry::{BLOCK_BYTES, LayerId, ShardKey, SnapshotId, Tag};
use crate::store::simulated::{Crash, Seeded};
use crate::store::{BlockState, Chain, ImageRecord, StoreError, View, WriteOp, WrittenCursor};

const BLOCKS: u32 = 10;
const SHARDS: u64 = 2;

fn chain(layers: &[LayerId]) -> Chain {
    Chain::new(layers).expect("a chain")
}

fn snapshot(layer: LayerId, generation: u64) -> SnapshotId {
    SnapshotId { layer, generation }
}

fn zero(rig: &mut Rig, layers: &[LayerId], offset: u32, length: u32) {
    rig.stamp.sequence += 1;
    let op = WriteOp { view: View::own(IMAGE, layers), shard: 0, offset, stamp: rig.stamp };
    rig.store.zero(&op, length, false).expect("a discard");
}

fn states(rig: &mut Rig, layers: &[LayerId]) -> Vec<BlockState> {
    rig.read_layers(layers, 0, 0, BLOCKS).expect("a read").0
}

#[test]
fn only_ids_that_fall_are_a_chain() {
    for no_chain in [&[][..], &[1, 2], &[2, 2], &vec![7; 3000]] {
        assert_eq!(Chain::new(no_chain), None);
    }
}

#[test]
fn a_snapshot_is_its_layers_and_the_record_that_froze_them() {
    let snapshots = vec![snapshot(3, 9), snapshot(1, 4)];
    let image = ImageRecord { snapshots, ..layered(9, &[5, 3, 1]) };
    assert_eq!(image.layers_of(&snapshot(3, 9)), Some(&[3, 1][..]));
    assert_eq!(image.layers_of(&snapshot(1, 4)), Some(&[1][..]));
    assert_eq!(image.layers_of(&snapshot(1, 9)), None, "the layer was frozen by another record");
    let image = ImageRecord { chain: chain(&[5, 3]), ..image };
    assert_eq!(image.layers_of(&snapshot(3, 9)), Some(&[3][..]), "what was merged is in it");
    assert_eq!(image.layers_of(&snapshot(1, 4)), None, "it is gone");
    let top = ImageRecord { snapshots: vec![snapshot(5, 9)], ..image };
    assert_eq!(top.layers_of(&snapshot(5, 9)), None, "the top is written to");
}

#[test]
fn layers_stay_with_the_record_over_kills_power_cuts_and_checkpoints() {
    let mut rig = Rig::new();
    let before = Bytes::from_static(b"before");
    let snapshots = vec![snapshot(2, 2), snapshot(1, 1)];
    let stored = ImageRecord { body: before, blank: true, snapshots, ..layered(2, &[4, 2, 1]) };
    rig.store.put_record(IMAGE, stored.clone()).expect("a record");
    rig.sync();
    let (mut rig, _) = rig.power_cut(3);
    assert_eq!(rig.store.image(&IMAGE), Some(&stored), "from the log");
    rig.checkpoint();
    let (mut rig, _) = rig.power_cut(4);
    assert_eq!(rig.store.image(&IMAGE), Some(&stored), "from its file");
    rig.store.put_record(IMAGE, layered(3, &[5, 4, 2, 1])).expect("a snapshot");
    rig.store.append().expect("in the log");
    let (rig, _) = rig.restart();
    assert_eq!(rig.store.image(&IMAGE), Some(&layered(3, &[5, 4, 2, 1])));
}

#[test]
fn equal_generation_with_other_layers_is_refused() {
    let mut rig = Rig::new();
    rig.store.put_record(IMAGE, layered(2, &[2, 1])).expect("a snapshot");
    let conflict = StoreError::RecordConflict { stored: Box::new(head(1, 2)) };
    assert_eq!(rig.store.put_record(IMAGE, layered(2, &[1])), Err(conflict.clone()));
    assert_eq!(rig.store.put_record(IMAGE, layered(2, &[3, 2, 1])), Err(conflict.clone()));
    let named = ImageRecord { snapshots: vec![snapshot(1, 2)], ..layered(2, &[2, 1]) };
    assert_eq!(rig.store.put_record(IMAGE, named), Err(conflict));
    rig.store.put_record(IMAGE, layered(2, &[2, 1])).expect("the same again");
    rig.store.put_record(IMAGE, layered(3, &[1])).expect("a later one may have fewer");
}

#[test]
fn each_layer_shows_what_was_there_when_it_was_frozen() {
    let mut rig = Rig::new();
    rig.fill(0, 0, 4, 1);
    rig.layers(&[3, 2, 1]).expect("two snapshots");
    rig.write_layers(&[2, 1], 0, BLOCK_BYTES, &[2; BLOCK]).expect("over the first");
    zero(&mut rig, &[2, 1], 2 * BLOCK_BYTES, BLOCK_BYTES);
    rig.write_layers(&[3, 2, 1], 0, BLOCK_BYTES + 10, &[3; 10]).expect("merged through three");
    rig.write_layers(&[3, 2, 1], 0, 2 * BLOCK_BYTES + 10, &[4; 10]).expect("merged with zeroes");
    zero(&mut rig, &[3, 2, 1], 3 * BLOCK_BYTES, 100);
    for _ in 0..3 {
        let block = |byte: u8| vec![byte; BLOCK];
        let lowest = flatten_of(&mut rig, &[1]);
        assert_eq!(lowest, [block(1), block(1), block(1), block(1)].concat());
        let middle = flatten_of(&mut rig, &[2, 1]);
        assert_eq!(middle, [block(1), block(2), block(0), block(1)].concat());
        let (mut second, mut third, mut fourth) = (block(2), block(0), block(1));
        second[10..20].fill(3);
        third[10..20].fill(4);
        fourth[..100].fill(0);
        let top = flatten_of(&mut rig, &[3, 2, 1]);
        assert_eq!(top, [block(1), second, third, fourth].concat());
        rig.sync();
        rig.checkpoint();
        rig = rig.power_cut(1).0;
    }
}

fn flatten_of(rig: &mut Rig, layers: &[LayerId]) -> Vec<u8> {
    let (states, data) = rig.read_layers(layers, 0, 0, 4).expect("a read");
    flatten(&states, &data)
}

/// What one layer discards the layer below has still.
#[test]
fn a_discard_over_a_parent_is_an_explicit_zero_whatever_the_parent_has() {
    let mut rig = Rig::new();
    rig.fill(0, 0, 1, 1);
    zero(&mut rig, &[2, 1], 0, BLOCKS * BLOCK_BYTES);
    assert_eq!(states(&mut rig, &[2, 1]), [BlockState::Zero; BLOCKS as usize]);
    // The same on every replica, also on one whose parent has blocks that were discarded again.
    zero(&mut rig, &[1], 0, BLOCK_BYTES);
    assert_eq!(states(&mut rig, &[2, 1]), [BlockState::Zero; BLOCKS as usize]);
    assert_eq!(states(&mut rig, &[1]), [BlockState::Absent; BLOCKS as usize]);
}

#[test]
fn rot_below_is_not_merged_into_the_top() {
    let mut rig = Rig::new();
    rig.fill(0, 0, 2, 1);
    rig.sync();
    rig.checkpoint();
    assert!(rig.disk.corrupt(&crate::store::shard_path(&Rig::key(0)), 5));
    let bad = StoreError::BadBlock { image: IMAGE, layer: 1, shard: 0, block: 0 };
    assert_eq!(rig.write_layers(&[2, 1], 0, 7, &[2; 10]), Err(bad.clone()));
    assert_eq!(rig.read_layers(&[2, 1], 0, 0, 1), Err(bad.clone()));
    rig.write_layers(&[2, 1], 0, 0, &[2; BLOCK]).expect("a whole block needs nothing of it");
    assert_eq!(rig.read_layers(&[2, 1], 0, 0, 2).expect("hidden").0, [BlockState::Data; 2]);
    assert_eq!(rig.read_layers(&[1], 0, 0, 1), Err(bad));
}

/// The map is one for all layers: a shard that is dirty by its lower layer stays so as the top is written.
#[test]
fn dirty_map_and_generations_go_across_layers() {
    let mut rig = Rig::new();
    rig.fill(0, 0, 1, 1);
    let first = Tag { epoch: 1, sequence: rig.stamp.sequence };
    rig.store.put_record(IMAGE, layered(2, &[2, 1])).expect("a snapshot");
    rig.stamp.generation = 2;
    rig.write_layers(&[2, 1], 0, 0, &[2; BLOCK]).expect("a write");
    rig.store.clear(IMAGE, first, &[]).expect("a clear of the first write");
    assert_eq!(rig.dirty(), [0], "the second is not covered");
    let below = rig.store.summary(&Rig::key(0)).expect("a summary");
    assert_eq!(below.blocks[0].tag, first, "of the frozen layer too");
    let above = |rig: &mut Rig, generation| {
        let layers = [2, 1];
        let mut page =
            rig.store.written_above(&IMAGE, &layers, generation, WrittenCursor::default());
        let mut shards = Vec::new();
        while let Ok(found) = &page {
            shards.extend(found.shards.clone());
            let Some(next) = found.next else { break };
            page = rig.store.written_above(&IMAGE, &layers, generation, next);
        }
        shards.dedup();
        shards
    };
    assert_eq!(above(&mut rig, 1), [0]);
    let last = Tag { epoch: 1, sequence: rig.stamp.sequence };
    rig.store.clear(IMAGE, last, &[]).expect("a clear");
    assert_eq!(rig.dirty(), []);
    rig.sync();
    rig.checkpoint();
    let (mut rig, _) = rig.power_cut(5);
    assert_eq!(above(&mut rig, 1), [0], "from the file of the top layer");
    assert_eq!(above(&mut rig, 2), []);
    let below = rig.store.summary(&Rig::key(0)).expect("a summary");
    assert_eq!(below.blocks[0].tag, Tag::NONE);
}

/// What a layer should hold: its chain's content when it was frozen.
type Frozen = BTreeMap<Vec<LayerId>, Vec<Vec<u8>>>;

/// Random writes, and a layer now and then, or some dropped, with a crash in the midst: every frozen chain is
/// what it was, the record names a layer before anything is in it, and nothing stays of a dropped one.
#[test]
fn frozen_layers_survive_any_crash_as_they_were() {
    for seed in 0..60 {
        let mut random = Seeded::new(seed);
        let mut rig = Rig::new();
        let (mut layers, mut frozen) = (vec![1], Frozen::new());
        let crash = if random.chance(50) { Crash::Kill } else { Crash::PowerCut };
        rig.sync();
        let begun = rig.disk.steps();
        rig.disk.crash_at(begun + 5 + random.below(150), crash);
        while change(&mut rig, &mut random, &mut layers, &mut frozen).is_ok() {}
        let (mut rig, recovery) = match crash {
            Crash::Kill => rig.restart(),
            Crash::PowerCut => rig.power_cut(seed),
        };
        assert!(!recovery.damaged, "seed {seed}");
        let stored = rig.store.image(&IMAGE).expect("its record").chain.clone();
        for (lower, expected) in
            frozen.iter().filter(|(lower, _)| is_frozen(stored.layers(), lower))
        {
            assert_eq!(content(&mut rig, lower), *expected, "seed {seed}, {lower:?}");
        }
        rig.checkpoint();
        rig.checkpoint();
        let held = rig.store.layers_held(&IMAGE).expect("a folder");
        assert!(held.iter().all(|layer| stored.has(*layer)), "seed {seed}: {held:?} {stored:?}");
        for layer in stored.layers()[0] + 1..=layers[0] + 1 {
            let key = ShardKey { layer, ..Rig::key(0) };
            let summary = rig.store.summary(&key).expect("a summary");
            let empty = summary.blocks.iter().all(|block| block.state == BlockState::Absent);
            assert!(empty, "seed {seed}: layer {layer} has content, and no record names it");
        }
    }
}

/// Whether `lower` is what lies below some layer.
fn is_frozen(layers: &[LayerId], lower: &[LayerId]) -> bool {
    layers.len() > lower.len() && layers.ends_with(lower)
}

fn content(rig: &mut Rig, layers: &[LayerId]) -> Vec<Vec<u8>> {
    let of_shard = |shard| {
        let (states, data) = rig.read_layers(layers, shard, 0, BLOCKS).expect("a read");
        flatten(&states, &data)
    };
    (0..SHARDS).map(of_shard).collect()
}

/// One request; an error is the crash's.
fn change(
    rig: &mut Rig,
    random: &mut Seeded,
    layers: &mut Vec<LayerId>,
    frozen: &mut Frozen,
) -> Result<(), StoreError> {
    if rig.disk.has_crashed() {
        return Err(StoreError::Failed { errno: crate::store::disk::Errno::IO });
    }
    let first = random.below(u64::from(BLOCKS) - 2) as u32 * BLOCK_BYTES;
    let (shard, cut) = (random.below(SHARDS), random.below(2) as u32 * 700);
    let length = (1 + random.below(2) as u32) * BLOCK_BYTES - cut;
    match random.below(20) {
        0..10 => {
            let data = vec![random.below(255) as u8; length as usize];
            rig.write_layers(layers, shard, first + cut, &data)
                .or_else(|error| room(rig, error))?;
        }
        10..14 => {
            rig.stamp.sequence += 1;
            let (offset, stamp) = (first + cut, rig.stamp);
            let op = WriteOp { view: View::own(IMAGE, layers), shard, offset, stamp };
            rig.store.zero(&op, length, random.chance(30)).or_else(|error| room(rig, error))?;
        }
        14..16 => sync(rig)?,
        16..18 => {
            if let Some(job) = rig.store.begin_checkpoint(random.chance(50))? {
                rig.store.finish_checkpoint(job.run())?;
            }
        }
        18 if !frozen.is_empty() => {
            // As one is rolled back to: a new top over some frozen chain, with an id that never was.
            sync(rig)?;
            let kept: Vec<_> = frozen.keys().filter(|lower| layers.ends_with(lower)).collect();
            let Some(lower) = kept.get(random.below(kept.len() as u64 + 1) as usize) else {
                return Ok(());
            };
            let top = layers[0] + 1;
            *layers = [&[top], &lower[..]].concat();
            rig.layers(layers)?;
        }
        _ => {
            // As a snapshot is taken: what is below is durable first, then the record names the new top.
            sync(rig)?;
            let expected = content(rig, layers);
            frozen.insert(layers.clone(), expected);
            layers.insert(0, layers[0] + 1 + random.below(2) as u32);
            rig.layers(layers)?;
        }
    }
    Ok(())
}

fn room(rig: &mut Rig, error: StoreError) -> Result<u64, StoreError> {
    if error != StoreError::LogFull {
        return Err(error);
    }
    if let Some(job) = rig.store.begin_checkpoint(false)? {
        rig.store.finish_checkpoint(job.run())?;
    }
    Ok(0)
}

fn sync(rig: &mut Rig) -> Result<(), StoreError> {
    match rig.store.begin_sync()? {
        Some(job) => rig.store.finish_sync(job.run()).map(|_| ()),
        None => Ok(()),
    }
}

#[test]
fn usage_counts_all_layers() {
    let mut rig = Rig::new();
    let used = |rig: &Rig| {
        let files = rig.store.usage_handle().physical_bytes(&IMAGE).expect("a folder");
        files + rig.store.log_resident_bytes(&IMAGE)
    };
    rig.fill(0, 0, 4, 1);
    rig.write_layers(&[2, 1], 0, 0, &[2; BLOCK]).expect("a write");
    assert_eq!(rig.store.log_resident_bytes(&IMAGE), 5 * BLOCK as u64);
    rig.sync();
    rig.checkpoint();
    let paths = rig.disk.paths();
    let files = |layer: &str| paths.iter().filter(|path| path.contains(layer)).count();
    let folder = format!("images/{IMAGE}");
    assert_eq!((files(&format!("{folder}/1/")), files(&format!("{folder}/2/"))), (1, 1));
    assert!(used(&rig) >= 5 * BLOCK as u64);
    rig.store.delete(IMAGE).expect("a delete");
    rig.sync();
    rig.checkpoint();
    let left = rig.disk.run().list(&folder).unwrap_or_default();
    assert_eq!(left, Vec::<String>::new(), "every layer is gone with its image");
}
