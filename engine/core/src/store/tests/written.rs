//! What was written above a generation, wherever it is: in the log, in files, removed.

use super::rig::*;
use crate::geometry::Tag;
use crate::store::shard_file::{shard_path, slot_bytes};
use crate::store::{BlockState, View, WriteOp, WrittenCursor};
use std::collections::BTreeSet;

/// All pages together; each page gets on.
fn above(rig: &mut Rig, generation: u64) -> BTreeSet<u64> {
    let mut found = BTreeSet::new();
    let mut from = WrittenCursor::default();
    loop {
        let page = rig.store.written_above(&IMAGE, &[1], generation, from).expect("a page");
        found.extend(page.shards);
        match page.next {
            Some(next) => assert!(next > std::mem::replace(&mut from, next), "a page gets on"),
            None => return found,
        }
    }
}

fn in_generation(rig: &mut Rig, generation: u64) {
    rig.store.put_record(IMAGE, record(head(1, generation))).expect("a later record");
    rig.stamp.generation = generation;
}

fn clear(rig: &mut Rig) {
    rig.sync();
    let tag = Tag { epoch: 1, sequence: rig.stamp.sequence };
    rig.store.clear(IMAGE, tag, &[]).expect("a clear");
}

fn set(shards: impl IntoIterator<Item = u64>) -> BTreeSet<u64> {
    shards.into_iter().collect()
}

#[test]
fn shards_are_told_by_generation_from_log_and_files_also_after_a_restart() {
    let mut rig = Rig::new();
    // Some in one folder, more than a page looks into.
    let old: Vec<u64> = (0..150).map(|shard| shard * 256).chain(1..40).collect();
    for some in old.chunks(16) {
        some.iter().for_each(|shard| rig.fill(*shard, 0, 1, 1));
        clear(&mut rig);
        rig.checkpoint();
    }
    in_generation(&mut rig, 2);
    [256, 7, 1000].into_iter().for_each(|shard| rig.fill(shard, 3, 1, 2));
    clear(&mut rig);
    rig.checkpoint();
    in_generation(&mut rig, 3);
    [8, 512].into_iter().for_each(|shard| rig.fill(shard, 3, 1, 3));
    for _ in 0..2 {
        assert_eq!(above(&mut rig, 3), set([]));
        assert_eq!(above(&mut rig, 2), set([8, 512]));
        assert_eq!(above(&mut rig, 1), set([8, 512, 256, 7, 1000]));
        assert_eq!(above(&mut rig, 0), set(old.iter().copied().chain([1000])));
        rig.sync();
        rig = rig.restart().0;
    }
}

/// What was discarded while a node was away came back with it.
#[test]
fn removed_shard_is_told_as_well() {
    let mut rig = Rig::new();
    (0..3).for_each(|shard| rig.fill(shard, 0, 4, 1));
    clear(&mut rig);
    rig.checkpoint();
    in_generation(&mut rig, 2);
    rig.stamp.sequence += 1;
    let op = WriteOp { view: View::own(IMAGE, &[1]), shard: 1, offset: 0, stamp: rig.stamp };
    rig.store.zero(&op, SHARD_BYTES, false).expect("a discard");
    for _ in 0..2 {
        assert_eq!(above(&mut rig, 1), set([1]));
        clear(&mut rig);
        rig.checkpoint();
    }
    assert_eq!(rig.read_layers(&[1], 1, 0, 1).expect("a read").0, [BlockState::Absent]);
}

/// A write in flight while a node was left behind: the others had it under the old generation.
#[test]
fn dirty_shard_counts_as_written_in_each_new_generation_also_when_it_is_cleared_later() {
    let mut rig = Rig::new();
    rig.fill(5, 0, 1, 1);
    rig.fill(6, 0, 1, 1);
    rig.sync();
    rig.store.clear(IMAGE, Tag { epoch: 1, sequence: 1 }, &[]).expect("a clear of the first");
    in_generation(&mut rig, 2);
    clear(&mut rig);
    assert_eq!(above(&mut rig, 1), set([6]));
    rig.checkpoint();
    assert_eq!(above(&mut rig, 1), set([6]));
}

#[test]
fn shard_whose_metadata_is_damaged_counts_as_written() {
    let mut rig = Rig::new();
    (0..3).for_each(|shard| rig.fill(shard, 0, 1, 1));
    clear(&mut rig);
    rig.checkpoint();
    let slot = |slot| u64::from(SHARD_BYTES) + slot * slot_bytes(SHARD_BYTES) + 9;
    let path = shard_path(&Rig::key(1));
    assert!([0, 1].into_iter().filter(|n| rig.disk.corrupt(&path, slot(*n))).count() > 0);
    let mut rig = rig.restart().0;
    assert_eq!(above(&mut rig, 1), set([1]));
}
