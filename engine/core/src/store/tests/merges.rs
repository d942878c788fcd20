//! Layers that go into the one above them: what is read through the chain stays what it was, whatever happens, and
//! nothing is left of them in the end.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::rig::*;
use crate::checksum::checksum_of;
use crate::geometry::{BLOCK_BYTES, ImageId, LayerId, ShardKey, Tag};
use crate::rules::{Rule, break_rules};
use crate::store::simulated::{Crash, Seeded, SimDisk};
use crate::store::{
    BlockState, CopyBlock, ImageRecord, Stamp, Store, StoreConfig, StoreError, View, WriteOp,
    WrittenCursor, shard_path,
};

const BLOCKS: u32 = 10;
const SHARDS: u64 = 3;

fn zero(rig: &mut Rig, layers: &[LayerId], shard: u64, first: u32, blocks: u32) {
    rig.stamp.sequence += 1;
    let offset = first * BLOCK_BYTES;
    let op = WriteOp { view: View::own(IMAGE, layers), shard, offset, stamp: rig.stamp };
    rig.store.zero(&op, blocks * BLOCK_BYTES, false).expect("a discard");
}

fn write(rig: &mut Rig, layers: &[LayerId], shard: u64, first: u32, blocks: u32) {
    let data = vec![layers[0] as u8; blocks as usize * BLOCK];
    rig.write_layers(layers, shard, first * BLOCK_BYTES, &data).expect("a write");
}

/// Layers 1 to 4, of which 2 and 3 hide some of what is below, have zeroes, and a shard of their own.
fn four_layers() -> Rig {
    let mut rig = Rig::new();
    write(&mut rig, &[1], 0, 0, 8);
    for layers in [&[2, 1][..], &[3, 2, 1], &[4, 3, 2, 1]] {
        rig.layers(layers).expect("a snapshot");
        rig.sync();
        rig.checkpoint();
        let own = layers[0];
        write(&mut rig, layers, 0, own - 2, 2);
        zero(&mut rig, layers, 0, own + 2, 1);
        write(&mut rig, layers, u64::from(own - 1), 1, own);
    }
    rig.sync();
    rig
}

fn held(rig: &Rig) -> Vec<LayerId> {
    rig.store.layers_held(&IMAGE).expect("a folder")
}

/// The content through these layers.
fn content(rig: &mut Rig, layers: &[LayerId]) -> Vec<Vec<u8>> {
    let of_shard = |shard| {
        let (states, data) = rig.read_layers(layers, shard, 0, BLOCKS).expect("a read");
        flatten(&states, &data)
    };
    (0..=SHARDS).map(of_shard).collect()
}

fn states(rig: &mut Rig, layer: LayerId, shard: u64) -> Vec<BlockState> {
    rig.read_layers(&[layer], shard, 0, BLOCKS).expect("a read").0
}

fn is_empty(rig: &mut Rig, layer: LayerId) -> bool {
    (0..=SHARDS).all(|shard| states(rig, layer, shard).iter().all(|s| *s == BlockState::Absent))
}

#[test]
fn merged_layers_leave_nothing_and_change_nothing_that_is_read() {
    for checkpointed in [false, true] {
        let mut rig = four_layers();
        if checkpointed {
            rig.checkpoint();
        }
        let through = [&[4, 3, 2, 1][..], &[1]];
        let before: Vec<_> = through.iter().map(|layers| content(&mut rig, layers)).collect();
        rig.merging(&[4, 3, 2, 1], &[3, 2]).expect("two snapshots go");
        assert_eq!(rig.store.emptied(&IMAGE), []);
        assert_eq!(rig.merging(&[4, 1], &[]), Err(StoreError::NotMerged { layer: 3 }));
        rig.merge_all().expect("merges");
        assert_eq!(rig.store.emptied(&IMAGE), [3, 2]);
        assert!(is_empty(&mut rig, 3) && is_empty(&mut rig, 2));
        for round in 0..3 {
            let after: Vec<_> = through.iter().map(|layers| content(&mut rig, layers)).collect();
            assert!(after == before, "{checkpointed} {round}");
            assert_eq!(content(&mut rig, &[4, 1]), before[0]);
            rig = rig.power_cut(round).0;
        }
        let files = rig
            .disk
            .paths()
            .iter()
            .filter(|path| path.contains("/2/") || path.contains("/3/"))
            .count();
        assert_eq!(files, 0, "their files are gone");
        rig.merging(&[4, 1], &[]).expect("nothing of them is left");
        rig.sync();
        rig.checkpoint();
        rig.checkpoint_if_due();
        assert!(held(&rig).iter().all(|layer| [4, 1].contains(layer)), "{:?}", held(&rig));
        assert_eq!(content(&mut rig, &[4, 1]), before[0]);
        assert!(!rig.store.wants_checkpoint() && !rig.store.wants_merge());
    }
}

/// Removes layer 2: the first change of the record, the merge, the last change, and all its files.
fn remove_layer_2(rig: &mut Rig) -> Result<(), StoreError> {
    rig.merging(&[4, 3, 2, 1], &[2])?;
    rig.merge_all()?;
    rig.merging(&[4, 3, 1], &[])?;
    while let Some(job) = rig.store.begin_checkpoint(true)? {
        rig.store.finish_checkpoint(job.run())?;
        if !rig.store.wants_checkpoint() {
            break;
        }
    }
    Ok(())
}

#[test]
fn a_crash_at_any_step_of_a_removal_changes_nothing_that_is_read() {
    let before: Vec<_> = {
        let mut rig = four_layers();
        [&[4, 3, 2, 1][..], &[3, 2, 1], &[1]].map(|layers| content(&mut rig, layers)).into()
    };
    let (mut merged, mut gone) = (0, 0);
    for step in 0.. {
        let mut rig = four_layers();
        let crash = if step % 2 == 0 { Crash::PowerCut } else { Crash::Kill };
        if step % 4 < 2 {
            rig.checkpoint();
        }
        rig.disk.crash_at(rig.disk.steps() + step / 4, crash);
        let finished = remove_layer_2(&mut rig).is_ok() && !rig.disk.has_crashed();
        let (mut rig, recovery) = match crash {
            Crash::Kill => rig.restart(),
            Crash::PowerCut => rig.power_cut(step),
        };
        assert!(!recovery.damaged, "step {step}");
        let record = rig.store.image(&IMAGE).expect("its record").clone();
        let layers = record.chain.layers();
        let below = &layers[1..];
        merged += u32::from(!record.merging.is_empty() && is_empty(&mut rig, 2));
        gone += u32::from(!layers.contains(&2));
        for _ in 0..2 {
            for (layers, before) in [layers, below, &[1]].iter().zip(&before) {
                assert!(content(&mut rig, layers) == *before, "step {step}, {layers:?}");
            }
            rig.merge_all().expect("merges");
            rig.checkpoint();
            rig.checkpoint_if_due();
        }
        if !record.merging.is_empty() {
            assert!(is_empty(&mut rig, 2), "step {step}");
            assert_eq!(rig.store.emptied(&IMAGE), [2]);
            assert!(content(&mut rig, &[4, 3, 1]) == before[0], "step {step}");
        }
        assert!(held(&rig).iter().all(|layer| layers.contains(layer)), "step {step}");
        if finished {
            break;
        }
    }
    assert!(
        merged > 10 && gone > 5,
        "{merged} crashes when it was merged, {gone} when it was gone"
    );
}

/// The first one has far more to merge.
#[test]
fn images_take_turns() {
    let mut rig = Rig::new();
    let other = ImageId([0xA2; 16]);
    rig.store.put_record(other, record(head(1, 1))).expect("a record");
    for shard in 0..6 {
        write(&mut rig, &[1], shard, 0, 9);
        rig.checkpoint();
    }
    let stamp = Stamp { sequence: 1, ..rig.stamp };
    let op = WriteOp { view: View::own(other, &[1]), shard: 0, offset: 0, stamp };
    let data = vec![5; BLOCK];
    let written = rig.store.write(&op, &fragment_checksums(0, &data), Bytes::from(data));
    written.expect("a write");
    let merging = ImageRecord { merging: vec![1], ..layered(2, &[2, 1]) };
    rig.store.put_record(IMAGE, merging.clone()).expect("it goes");
    rig.store.put_record(other, merging).expect("it goes");
    let mut steps = 0;
    while rig.store.emptied(&other).is_empty() {
        let merged = rig.store.merge_some(false);
        assert!(merged.is_ok() || merged == Err(StoreError::LogFull), "{merged:?}");
        rig.checkpoint_if_due();
        steps += 1;
        assert!(steps < 500, "the other one is never done");
    }
    assert_eq!(rig.store.emptied(&IMAGE), [], "the first one goes on");
}

/// The guest goes on, and what it has written by then is newer.
#[test]
fn a_merge_touches_nothing_that_was_written_above() {
    let run = |rules: &[Rule]| {
        let mut rig = Rig::new();
        write(&mut rig, &[1], 0, 0, 8);
        rig.layers(&[2, 1]).expect("a snapshot");
        rig.merging(&[2, 1], &[1]).expect("it goes again");
        write(&mut rig, &[2, 1], 0, 1, 2);
        zero(&mut rig, &[2, 1], 0, 4, 1);
        let before = content(&mut rig, &[2, 1]);
        break_rules(rules);
        rig.merge_all().expect("merges");
        break_rules(&[]);
        (before, content(&mut rig, &[2]))
    };
    let (before, after) = run(&[]);
    assert!(before == after);
    let (before, after) = run(&[Rule::MergesFillGaps]);
    assert!(before != after, "a merge that does is noticed");
}

fn written_above(rig: &mut Rig, layers: &[LayerId], generation: u64, merges: bool) -> Vec<u64> {
    let (mut at, mut shards) = (Some(WrittenCursor::default()), Vec::new());
    while let Some(from) = at {
        let page = rig.store.written_above(&IMAGE, layers, generation, from).expect("a page");
        if merges && from.place == 0 {
            rig.merge_all().expect("merges");
            rig.sync();
            rig.checkpoint();
        }
        shards.extend(page.shards);
        at = page.next;
    }
    shards.sort_unstable();
    shards.dedup();
    shards
}

/// A node was left behind by a write to the layer that is merged; it is told, also where that happens as it asks.
#[test]
fn a_merged_shard_counts_as_written_in_the_highest_generation() {
    let written = |checkpointed: bool, meanwhile: bool| {
        let mut rig = Rig::new();
        rig.layers(&[2, 1]).expect("a snapshot");
        write(&mut rig, &[2, 1], 7, 0, 1);
        let tag = rig.stamp.tag();
        rig.store.clear(IMAGE, tag, &[]).expect("a clear");
        rig.layers(&[3, 2, 1]).expect("another one");
        rig.merging(&[3, 2, 1], &[2]).expect("it goes");
        rig.sync();
        if checkpointed {
            rig.checkpoint();
        }
        if !meanwhile {
            rig.merge_all().expect("merges");
            rig = rig.power_cut(4).0;
        }
        written_above(&mut rig, &[3, 2, 1], 1, meanwhile)
    };
    for (checkpointed, meanwhile) in [(false, false), (true, false), (false, true), (true, true)] {
        assert_eq!(written(checkpointed, meanwhile), [7], "{checkpointed} {meanwhile}");
    }
    break_rules(&[Rule::MergedKeepGenerations]);
    let forgotten = written(true, false);
    break_rules(&[]);
    assert_eq!(forgotten, [], "a merge that forgets it is noticed");
}

/// The dirty entry is one for all layers: its tags go along, and it stays what it was.
#[test]
fn a_merge_takes_tags_along_and_leaves_the_dirty_map_as_it_is() {
    let mut rig = Rig::new();
    rig.layers(&[2, 1]).expect("a snapshot");
    write(&mut rig, &[2, 1], 0, 0, 2);
    let tag = rig.stamp.tag();
    rig.layers(&[3, 2, 1]).expect("another one");
    let before: Vec<_> =
        rig.store.dirty(&IMAGE).map(|(shard, entry)| (shard, entry.last)).collect();
    rig.merging(&[3, 2, 1], &[2]).expect("it goes");
    rig.merge_all().expect("merges");
    let after: Vec<_> = rig.store.dirty(&IMAGE).map(|(shard, entry)| (shard, entry.last)).collect();
    assert_eq!(before, after);
    for _ in 0..2 {
        let key = ShardKey { layer: 3, ..Rig::key(0) };
        let summary = rig.store.summary(&key).expect("a summary");
        assert_eq!((summary.blocks[0].tag, summary.blocks[2].tag), (tag, Tag::NONE));
        rig.checkpoint();
    }
    rig.store.clear(IMAGE, tag, &[]).expect("a clear");
    assert_eq!(rig.dirty(), []);
    rig.merge_all().expect("nothing is left");
    assert_eq!(rig.store.emptied(&IMAGE), [2]);
}

#[test]
fn rot_below_is_bad_above_and_shows_nothing_older() {
    let mut rig = four_layers();
    rig.checkpoint();
    // Block 0 of shard 0 is in layer 2, over what layer 1 has.
    let key = ShardKey { layer: 2, ..Rig::key(0) };
    assert!(rig.disk.corrupt(&shard_path(&key), 5));
    rig.merging(&[4, 3, 2, 1], &[2]).expect("it goes");
    rig.merge_all().expect("merges");
    let bad = StoreError::BadBlock { image: IMAGE, layer: 3, shard: 0, block: 0 };
    assert_eq!(rig.read_layers(&[4, 3, 2, 1], 0, 0, 1), Err(bad));
    assert_eq!(states(&mut rig, 3, 2)[1], BlockState::Data);
    rig.checkpoint();
    let (mut rig, _) = rig.power_cut(1);
    assert!(rig.read_layers(&[4, 3, 1], 0, 0, 1).is_err());
}

#[test]
fn lost_metadata_below_is_bad_above() {
    let mut rig = four_layers();
    rig.checkpoint();
    rig.store.forget_metadata();
    let key = ShardKey { layer: 2, ..Rig::key(1) };
    assert!(rig.disk.corrupt(&shard_path(&key), u64::from(SHARD_BYTES) + 5));
    let slot = crate::store::shard_file::slot_bytes(SHARD_BYTES);
    rig.disk.corrupt(&shard_path(&key), u64::from(SHARD_BYTES) + slot + 5);
    rig.merging(&[4, 3, 2, 1], &[2]).expect("it goes");
    rig.merge_all().expect("merges");
    assert!(rig.read_layers(&[4, 3, 1], 1, 0, 1).is_err(), "nobody takes it for absent");
    assert_eq!(rig.store.emptied(&IMAGE), [2]);
}

#[test]
fn who_compares_a_shard_sees_it_merged() {
    for layer in [3, 2] {
        let mut rig = four_layers();
        let before = content(&mut rig, &[4, 3, 2, 1]);
        rig.merging(&[4, 3, 2, 1], &[2]).expect("it goes");
        for _ in 0..2 {
            while let Err(error) = rig.store.finish_merge(&IMAGE, layer, 0) {
                assert_eq!(error, StoreError::LogFull);
                rig.checkpoint();
            }
        }
        assert!(states(&mut rig, 2, 0).iter().all(|state| *state == BlockState::Absent));
        assert_eq!(states(&mut rig, 2, 1)[1], BlockState::Data, "others are as they were");
        assert_eq!(content(&mut rig, &[4, 3, 2, 1]), before);
        assert_eq!(rig.store.finish_merge(&IMAGE, 4, 0), Ok(true), "it has no part in it");
        assert_eq!(rig.store.finish_merge(&IMAGE, 1, 0), Ok(true), "nor has it");
    }
}

/// The node's one thread is not held up by a whole shard.
#[test]
fn a_large_shard_is_merged_in_turns() {
    let disk = SimDisk::new();
    let large = StoreConfig { segment_bytes: Some(4 << 20), log_bytes: 32 << 20, ..config() };
    let (mut store, _) = Store::open(disk.run(), &large).expect("an empty disk takes a store");
    store.put_record(IMAGE, record(head(1, 1))).expect("a record");
    let mut rig = Rig { disk, store, stamp: Stamp { epoch: 1, generation: 1, sequence: 0 } };
    write(&mut rig, &[1], 0, 0, SHARD_BLOCKS);
    rig.layers(&[2, 1]).expect("a snapshot");
    rig.merging(&[2, 1], &[1]).expect("it goes");
    let turns = (0..9).find(|_| rig.store.finish_merge(&IMAGE, 2, 0) == Ok(true));
    assert_eq!(turns, Some(2), "half of it at once");
    assert!(rig.read_layers(&[2], 0, 0, SHARD_BLOCKS).expect("a read").1.iter().all(|b| *b == 1));
}

/// What is copied to a layer that was merged goes the same way, and it is not empty meanwhile.
#[test]
fn a_copy_to_a_merged_layer_is_merged_as_well() {
    let mut rig = four_layers();
    rig.merging(&[4, 3, 2, 1], &[2]).expect("it goes");
    rig.merge_all().expect("merges");
    let key = ShardKey { layer: 2, ..Rig::key(3) };
    let checksum = checksum_of(&[9; BLOCK]);
    let block = CopyBlock { block: 9, state: BlockState::Data, tag: Tag::NONE, checksum };
    rig.store.copy(&key, &[block], Bytes::from(vec![9; BLOCK]), 3).expect("a copy");
    assert_eq!(rig.store.emptied(&IMAGE), []);
    assert_eq!(rig.merging(&[4, 3, 1], &[]), Err(StoreError::NotMerged { layer: 2 }));
    let before = content(&mut rig, &[4, 3, 2, 1]);
    rig.checkpoint();
    rig.merge_all().expect("merges");
    assert_eq!(rig.store.emptied(&IMAGE), [2]);
    assert_eq!(content(&mut rig, &[4, 3, 1]), before);
}

/// The job writes the shard's file as the shard is merged; the next one removes it.
#[test]
fn a_checkpoint_under_way_brings_nothing_of_a_merged_shard_back() {
    for cut in [false, true] {
        let mut rig = four_layers();
        let before = content(&mut rig, &[4, 3, 2, 1]);
        let job = rig.store.begin_checkpoint(true).expect("begins").expect("there is something");
        rig.merging(&[4, 3, 2, 1], &[3]).expect("it goes");
        for shard in 0..=SHARDS {
            assert_eq!(rig.store.finish_merge(&IMAGE, 3, shard), Ok(true));
        }
        rig.store.append().expect("in the log");
        let done = job.run();
        assert!(held(&rig).contains(&3), "it was written");
        if cut {
            drop(done);
            rig = rig.restart().0;
        } else {
            rig.store.finish_checkpoint(done).expect("a checkpoint");
        }
        assert!(is_empty(&mut rig, 3));
        assert_eq!(content(&mut rig, &[4, 2, 1]), before);
        rig.merge_all().expect("merges");
        assert_eq!(rig.store.emptied(&IMAGE), [3]);
        assert_eq!(rig.disk.paths().iter().filter(|path| path.contains("/3/")).count(), 0);
        assert_eq!(content(&mut rig, &[4, 2, 1]), before);
    }
}

#[test]
fn a_full_disk_is_merged_all_the_same() {
    let mut rig = Rig::new();
    for shard in 0..6 {
        write(&mut rig, &[1], shard, 0, 8);
        rig.sync();
        rig.checkpoint();
    }
    rig.layers(&[2, 1]).expect("a snapshot");
    rig.merging(&[2, 1], &[1]).expect("it goes");
    rig.sync();
    rig.checkpoint();
    let before: Vec<_> = (0..6).map(|shard| rig.read_layers(&[2, 1], shard, 0, 8)).collect();
    let room = 2 * (8 + 16) * BLOCK as u64;
    rig.disk.set_capacity(Some(rig.disk.allocated_bytes() + room));
    rig.merge_all().expect("merges");
    let after: Vec<_> = (0..6).map(|shard| rig.read_layers(&[2], shard, 0, 8)).collect();
    assert!(before == after);
    assert_eq!(rig.store.emptied(&IMAGE), [1]);
}

/// The log is full, and a checkpoint finds no space: what is hidden anyway goes without room, and makes some.
#[test]
fn merges_make_room_on_a_disk_that_is_full() {
    let mut rig = Rig::new();
    for shard in 0..6 {
        write(&mut rig, &[1], shard, 0, 8);
        rig.sync();
        rig.checkpoint();
    }
    rig.layers(&[2, 1]).expect("a snapshot");
    rig.merging(&[2, 1], &[1]).expect("it goes");
    rig.disk.set_capacity(Some(rig.disk.allocated_bytes()));
    let mut written = 0;
    while rig.write_layers(&[2, 1], written % 6, 0, &[7; 8 * BLOCK]).is_ok() {
        written += 1;
    }
    let checkpoint = |rig: &mut Rig| {
        let job = rig.store.begin_checkpoint(false).expect("begins").expect("it is due");
        rig.store.finish_checkpoint(job.run())
    };
    assert!(written >= 6, "{written} writes");
    assert_eq!(checkpoint(&mut rig), Err(StoreError::NoSpace));
    assert_eq!(rig.store.merge_some(false), Err(StoreError::LogFull), "clients go first");
    let before = rig.disk.allocated_bytes();
    for _ in 0..400 {
        // Where there is no room for a shard the next one is tried.
        let _ = rig.store.merge_some(true);
    }
    rig.store.append().expect("in the log");
    assert_eq!(checkpoint(&mut rig), Ok(()), "there is room now");
    assert!(rig.disk.allocated_bytes() <= before);
    rig.merge_all().expect("merges");
    assert_eq!(rig.store.emptied(&IMAGE), [1]);
}

/// A record of before, or one that takes the snapshot back: the layer's content may be gone.
#[test]
fn a_layer_that_is_merged_is_none_that_stays_again() {
    let mut rig = four_layers();
    rig.merging(&[4, 3, 2, 1], &[2]).expect("it goes");
    assert_eq!(rig.merging(&[4, 3, 2, 1], &[]), Err(StoreError::NotMerged { layer: 2 }));
    for (layers, merging) in [(&[4, 3, 2, 1], &[4, 2]), (&[4, 3, 2, 1], &[9, 2])] {
        assert_eq!(rig.merging(layers, merging), Err(StoreError::OutOfRange), "{merging:?}");
    }
    // What was merged by now is in layer 3.
    assert_eq!(rig.merging(&[5, 2, 1], &[2]), Err(StoreError::NotMerged { layer: 2 }));
    rig.merging(&[4, 3, 2, 1], &[3, 2]).expect("and goes on from there");
    rig.merging(&[5, 1], &[]).expect("what it goes into goes as well");
    assert_eq!(rig.store.emptied(&IMAGE), []);
    assert!(!rig.store.wants_merge());
}

/// It was set back to before the merge, and the layer is out of the record since.
#[test]
fn a_store_that_was_set_back_takes_the_record_without_the_layer() {
    let mut rig = four_layers();
    rig.merging(&[4, 3, 2, 1], &[2]).expect("it goes");
    rig.store.distrust([IMAGE]);
    rig.stamp.generation += 1;
    let record = ImageRecord { blank: true, ..layered(rig.stamp.generation, &[4, 3, 1]) };
    rig.store.put_record(IMAGE, record).expect("nothing of it counts");
}

/// What each snapshot holds.
type Frozen = BTreeMap<LayerId, Vec<Vec<u8>>>;

/// Everything at random, over many layers, with a crash in the midst: each snapshot that is there holds what it
/// held, whatever was merged and dropped around it.
#[test]
fn snapshots_hold_what_they_held_whatever_is_removed_around_them() {
    let mut taken_out = 0;
    for seed in 0..80 {
        let mut random = Seeded::new(seed);
        let mut history = History::new();
        let crash = if random.chance(50) { Crash::Kill } else { Crash::PowerCut };
        let begun = history.rig.disk.steps();
        history.rig.disk.crash_at(begun + 20 + random.below(800), crash);
        while history.change(&mut random).is_ok() {}
        taken_out += history.taken_out;
        let History { rig, frozen, .. } = history;
        let (mut rig, recovery) = match crash {
            Crash::Kill => rig.restart(),
            Crash::PowerCut => rig.power_cut(seed),
        };
        assert!(!recovery.damaged, "seed {seed}");
        for round in 0..3 {
            let record = rig.store.image(&IMAGE).expect("its record").clone();
            let layers = record.chain.layers();
            for (at, layer) in layers.iter().enumerate() {
                if let Some(expected) =
                    frozen.get(layer).filter(|_| !record.merging.contains(layer))
                {
                    let shown = content(&mut rig, &layers[at..]);
                    assert!(shown == *expected, "seed {seed} round {round}: {layer} of {record:?}");
                }
            }
            rig.merge_all().expect("merges");
            rig.checkpoint();
            rig.checkpoint_if_due();
            assert_eq!(rig.store.emptied(&IMAGE), record.merging, "seed {seed}");
            if round == 1 {
                rig = rig.power_cut(seed + 7).0;
                rig.merge_all().expect("merges");
            }
        }
        let stored = rig.store.image(&IMAGE).expect("its record").chain.clone();
        assert!(held(&rig).iter().all(|layer| stored.has(*layer)), "seed {seed}");
    }
    assert!(taken_out > 40, "{taken_out} layers were taken out");
}

struct History {
    rig: Rig,
    layers: Vec<LayerId>,
    merging: Vec<LayerId>,
    next: LayerId,
    /// Also of snapshots that were removed: a crash may take that back.
    frozen: Frozen,
    taken_out: u32,
}

impl History {
    fn new() -> History {
        let mut rig = Rig::new();
        rig.sync();
        let (layers, merging, frozen) = (vec![1], Vec::new(), Frozen::new());
        History { rig, layers, merging, next: 2, frozen, taken_out: 0 }
    }

    fn snapshots(&self) -> Vec<LayerId> {
        let stays = |layer: &LayerId| !self.merging.contains(layer);
        self.layers[1..].iter().copied().filter(stays).collect()
    }

    fn store(&mut self) -> Result<(), StoreError> {
        while let Err(error) = self.rig.merging(&self.layers, &self.merging) {
            match error {
                StoreError::LogFull => self.checkpoint(false)?,
                error => return Err(error),
            }
        }
        Ok(())
    }

    fn checkpoint(&mut self, force: bool) -> Result<(), StoreError> {
        match self.rig.store.begin_checkpoint(force)? {
            Some(job) => self.rig.store.finish_checkpoint(job.run()),
            None => Ok(()),
        }
    }

    fn sync(&mut self) -> Result<(), StoreError> {
        match self.rig.store.begin_sync()? {
            Some(job) => self.rig.store.finish_sync(job.run()).map(|_| ()),
            None => Ok(()),
        }
    }

    /// One thing; an error is the crash's.
    fn change(&mut self, random: &mut Seeded) -> Result<(), StoreError> {
        match self.change_one(random) {
            Err(StoreError::LogFull) => self.checkpoint(false)?,
            other => other?,
        }
        match self.rig.disk.has_crashed() {
            true => Err(StoreError::Failed { errno: crate::store::disk::Errno::IO }),
            false => Ok(()),
        }
    }

    fn change_one(&mut self, random: &mut Seeded) -> Result<(), StoreError> {
        let first = random.below(u64::from(BLOCKS) - 2) as u32 * BLOCK_BYTES;
        let (shard, cut) = (random.below(SHARDS), random.below(2) as u32 * 700);
        let length = (1 + random.below(2) as u32) * BLOCK_BYTES - cut;
        let layers = self.layers.clone();
        match random.below(26) {
            0..7 => {
                let data = vec![random.below(255) as u8; length as usize];
                self.rig.write_layers(&layers, shard, first + cut, &data)?;
            }
            7..10 => {
                self.rig.stamp.sequence += 1;
                let (offset, stamp) = (first + cut, self.rig.stamp);
                let op = WriteOp { view: View::own(IMAGE, &layers), shard, offset, stamp };
                self.rig.store.zero(&op, length, random.chance(30))?;
            }
            10..11 => self.sync()?,
            11..13 => self.checkpoint(random.chance(50))?,
            13..14 => {
                let layer = layers[random.below(layers.len() as u64) as usize];
                self.rig.store.finish_merge(&IMAGE, layer, shard)?;
            }
            14..19 => (0..40).try_for_each(|_| self.rig.store.merge_some(false).map(|_| ()))?,
            19..21 if layers.len() < 9 => {
                self.sync()?;
                let expected = content(&mut self.rig, &layers);
                self.frozen.insert(layers[0], expected);
                self.layers.insert(0, self.next);
                self.next += 1;
                self.store()?;
            }
            21..23 => {
                let snapshots = self.snapshots();
                if let Some(layer) = snapshots.get(random.below(4) as usize) {
                    self.merging.push(*layer);
                    self.merging.sort_unstable_by(|a, b| b.cmp(a));
                    self.store()?;
                }
            }
            23..24 => {
                // As one goes back to a snapshot: a new top over what it is seen through.
                let snapshots = self.snapshots();
                if let Some(layer) = snapshots.get(random.below(8) as usize) {
                    self.layers.retain(|of| of <= layer);
                    self.layers.insert(0, self.next);
                    self.next += 1;
                    let layers = self.layers.clone();
                    self.merging.retain(|layer| layers.contains(layer));
                    self.store()?;
                }
            }
            _ => {
                let emptied = self.rig.store.emptied(&IMAGE);
                if !emptied.is_empty() {
                    self.layers.retain(|layer| !emptied.contains(layer));
                    self.merging.retain(|layer| !emptied.contains(layer));
                    self.taken_out += emptied.len() as u32;
                    self.store()?;
                }
            }
        }
        Ok(())
    }
}
