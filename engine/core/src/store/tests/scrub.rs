//! What scrub finds, on disks where any byte of a shard's file may flip.

use super::rig::*;
use crate::store::shard_file::{shard_path, slot_bytes};
use crate::store::simulated::Seeded;
use crate::store::{Scrubbed, StoreError};

fn scrub(rig: &mut Rig) -> Scrubbed {
    rig.store.scrub(&Rig::key(0), 0, SHARD_BLOCKS).expect("a scrub")
}

#[test]
fn equal_content_has_one_digest_wherever_it_lies() {
    let (mut one, mut other) = (Rig::new(), Rig::new());
    one.fill(0, 0, 4, 5);
    one.fill(0, 9, 1, 6);
    other.fill(0, 9, 1, 6);
    other.fill(0, 0, 2, 5);
    other.checkpoint();
    other.fill(0, 2, 2, 5);
    assert_eq!(scrub(&mut one).digest, scrub(&mut other).digest);
    assert_eq!(scrub(&mut one).data_blocks, 5);
    other.fill(0, 3, 1, 7);
    assert_ne!(scrub(&mut one).digest, scrub(&mut other).digest);
}

#[test]
fn every_rotten_block_is_named_and_the_others_are_read() {
    let mut rig = Rig::new();
    rig.fill(0, 0, 8, 5);
    rig.checkpoint();
    let path = shard_path(&Rig::key(0));
    rig.disk.corrupt(&path, 2 * 4096 + 17);
    rig.disk.break_page(&path, 5 * 4096);
    let found = scrub(&mut rig);
    assert_eq!((found.rotten, found.data_blocks), (vec![2, 5], 8));
    assert_eq!(rig.store.scrub(&Rig::key(0), 0, 2).expect("a scrub").rotten, []);
}

#[test]
fn damaged_metadata_is_rewritten_from_memory() {
    for slot in [0, 1] {
        let mut rig = Rig::new();
        for round in 1..4 {
            rig.fill(0, 0, 4, round);
            rig.checkpoint();
        }
        let before = scrub(&mut rig);
        let at = u64::from(SHARD_BYTES) + slot * slot_bytes(SHARD_BYTES);
        rig.disk.corrupt(&shard_path(&Rig::key(0)), at + 20);
        let found = scrub(&mut rig);
        assert!(found.metadata_rewritten && found.rotten.is_empty(), "slot {slot}");
        assert_eq!(found.digest, before.digest);
        assert!(!scrub(&mut rig).metadata_rewritten);
        let (mut rig, _) = rig.restart();
        assert_eq!(rig.content(0, 0, 4), vec![3; 4 * BLOCK]);
        rig.fill(0, 1, 1, 9);
        rig.checkpoint();
        let (mut rig, _) = rig.restart();
        assert_eq!(rig.content(0, 0, 2), [vec![3; BLOCK], vec![9; BLOCK]].concat());
    }
}

#[test]
fn damaged_metadata_that_nobody_remembers_makes_all_blocks_rotten() {
    let mut rig = Rig::new();
    rig.fill(0, 0, 4, 5);
    rig.checkpoint();
    rig.fill(0, 0, 4, 6);
    rig.checkpoint();
    let newer = u64::from(SHARD_BYTES);
    rig.disk.corrupt(&shard_path(&Rig::key(0)), newer + 20);
    let (mut rig, _) = rig.restart();
    assert_eq!(scrub(&mut rig).rotten, (0..SHARD_BLOCKS).collect::<Vec<u32>>());
}

/// Whatever flips is named, or changes nothing that anybody is given.
#[test]
fn any_byte_of_a_shard_file_that_flips_is_found_or_harmless() {
    let mut random = Seeded::new(7);
    let mut whole = Rig::new();
    whole.fill(0, 0, 6, 5);
    whole.checkpoint();
    whole.fill(0, 3, 6, 6);
    whole.checkpoint();
    let content = whole.content(0, 0, SHARD_BLOCKS);
    let digest = scrub(&mut whole).digest;
    let mut found = 0;
    for round in 0..300 {
        let disk = whole.disk.fork();
        let offset = match round % 3 {
            0 => random.below(9 * 4096),
            1 => u64::from(SHARD_BYTES) + random.below(400),
            _ => u64::from(SHARD_BYTES) + slot_bytes(SHARD_BYTES) + random.below(400),
        };
        disk.corrupt(&shard_path(&Rig::key(0)), offset);
        let (store, _) = open(&disk).expect("opens");
        let mut rig = Rig { disk, store, stamp: whole.stamp };
        let scrubbed = scrub(&mut rig);
        found += usize::from(!scrubbed.rotten.is_empty());
        for block in 0..SHARD_BLOCKS {
            let at = block as usize * BLOCK;
            match rig.read_layers(&[1], 0, block, 1) {
                Ok((states, data)) => {
                    assert!(!scrubbed.rotten.contains(&block));
                    assert_eq!(flatten(&states, &data), content[at..at + BLOCK]);
                }
                Err(StoreError::BadBlock { .. }) => assert!(scrubbed.rotten.contains(&block)),
                Err(error) => panic!("{error}"),
            }
        }
        assert_eq!(scrubbed.digest == digest, scrubbed.rotten.is_empty(), "at {offset}");
    }
    assert!(found > 150, "{found}");
}
