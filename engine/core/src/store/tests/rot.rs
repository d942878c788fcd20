//! Damage that no crash explains is noticed, and never returned as data.

use super::rig::*;
use crate::checksum::checksum_of;
use crate::geometry::{BLOCK_BYTES, Tag};
use crate::store::record::{self, Header, Kind};
use crate::store::shard_file::{decode_slot, shard_path, slot_bytes};
use crate::store::simulated::{Crash, Seeded};
use crate::store::{BlockState, CopyBlock, Stamp, StoreError, UsageHandle, View};
use bytes::Bytes;

const STAMP: Stamp = Stamp { epoch: 1, generation: 1, sequence: 0 };

fn bad(block: u32) -> StoreError {
    StoreError::BadBlock { image: IMAGE, layer: 1, shard: 0, block }
}

#[test]
fn corrupted_block_is_bad_until_it_is_repaired() {
    let mut rig = Rig::new();
    rig.fill(0, 0, 4, 5);
    rig.checkpoint();
    assert!(rig.disk.corrupt(&shard_path(&Rig::key(0)), 2 * 4096 + 17));
    assert_eq!(rig.read_layers(&[1], 0, 0, 4), Err(bad(2)));
    assert_eq!(rig.content(0, 0, 2), vec![5; 2 * BLOCK]);
    assert_eq!(rig.write_layers(&[1], 0, 2 * BLOCK_BYTES, &[1; 10]), Err(bad(2)), "no merge");
    let content = Bytes::from(vec![5; BLOCK]);
    let (state, tag) = (BlockState::Data, Tag::NONE);
    let good = [CopyBlock { block: 2, state, tag, checksum: checksum_of(&content) }];
    rig.store.copy(&Rig::key(0), &good, content, 1).expect("repair");
    assert_eq!(rig.content(0, 0, 4), vec![5; 4 * BLOCK]);
    rig.checkpoint();
    assert_eq!(rig.content(0, 0, 4), vec![5; 4 * BLOCK]);
}

#[test]
fn unreadable_page_is_a_bad_block_and_its_neighbours_are_read() {
    let mut rig = Rig::new();
    rig.fill(0, 0, 4, 5);
    rig.checkpoint();
    rig.disk.break_page(&shard_path(&Rig::key(0)), 2 * 4096);
    assert_eq!(rig.read_layers(&[1], 0, 0, 4), Err(bad(2)));
    assert_eq!(rig.content(0, 0, 2), vec![5; 2 * BLOCK]);
    assert_eq!(rig.content(0, 3, 1), vec![5; BLOCK]);
}

#[test]
fn block_that_rots_in_the_log_becomes_bad_not_wrong() {
    let mut rig = Rig::new();
    rig.fill(0, 0, 1, 5);
    rig.fill(0, 1, 1, 6);
    rig.sync();
    let run = *rig.store.state.index.get(&Rig::key(0)).and_then(|s| s.get(0)).expect("in the log");
    let slot = rig.store.log.segment(run.place.segment).slot;
    rig.disk.corrupt(&crate::store::log::segment_path(slot), u64::from(run.place.offset) + 5);
    assert_eq!(rig.read_layers(&[1], 0, 0, 2), Err(bad(0)));
    rig.checkpoint();
    assert_eq!(rig.read_layers(&[1], 0, 0, 2), Err(bad(0)));
    assert_eq!(rig.content(0, 1, 1), vec![6; BLOCK]);
}

#[test]
fn rotten_older_metadata_slot_does_no_harm_and_a_rotten_newer_one_makes_the_shard_bad() {
    for (rotten_version, harmless) in [(1, true), (2, false)] {
        let mut rig = Rig::new();
        rig.fill(0, 0, 1, 5);
        rig.checkpoint();
        rig.fill(0, 1, 1, 6);
        rig.checkpoint();
        let slot = u64::from(SHARD_BYTES) + rotten_version % 2 * slot_bytes(SHARD_BYTES);
        assert!(rig.disk.corrupt(&shard_path(&Rig::key(0)), slot + 80), "a byte of its body");
        let (mut rig, _) = rig.restart();
        if harmless {
            assert_eq!(rig.content(0, 0, 2), [vec![5; BLOCK], vec![6; BLOCK]].concat());
            continue;
        }
        assert_eq!(rig.read_layers(&[1], 0, 0, 1), Err(bad(0)), "it may have been overwritten");
        assert_eq!(rig.read_layers(&[1], 0, 9, 1), Err(bad(9)), "it may have been written");
        rig.fill(0, 0, 1, 8);
        for _ in 0..3 {
            assert_eq!(rig.content(0, 0, 1), vec![8; BLOCK]);
            assert_eq!(rig.read_layers(&[1], 0, 9, 1), Err(bad(9)));
            rig.checkpoint();
            rig = rig.restart().0;
        }
    }
}

/// A shard with two versions of metadata and one more block in the log; then the newer metadata rots, or
/// both do.
fn rotten_under_the_log(rotten: &[u64]) -> Rig {
    let mut rig = Rig::new();
    rig.fill(0, 0, 1, 5);
    rig.checkpoint();
    rig.fill(0, 1, 1, 6);
    rig.checkpoint();
    rig.fill(0, 2, 1, 7);
    rig.sync();
    rotten.iter().for_each(|version| rot_slot(&rig, *version));
    rig
}

fn rot_slot(rig: &Rig, version: u64) {
    let slot = u64::from(SHARD_BYTES) + version % 2 * slot_bytes(SHARD_BYTES);
    assert!(rig.disk.corrupt(&shard_path(&Rig::key(0)), slot + 80), "a byte of its body");
}

fn assert_rot_shows(rig: &mut Rig, about: &str) {
    assert_eq!(rig.read_layers(&[1], 0, 0, 1), Err(bad(0)), "{about}");
    assert_eq!(rig.read_layers(&[1], 0, 1, 1), Err(bad(1)), "it read as zeros: {about}");
    assert_eq!(rig.content(0, 2, 1), vec![7; BLOCK], "{about}");
}

/// After a restart a shard with records in the log was taken for one that a checkpoint had been writing:
/// its older metadata counted, and blocks that only the newer had read as zeros; with both rotten all did.
#[test]
fn newer_metadata_that_rots_under_records_in_the_log_makes_the_shard_bad() {
    for rotten in [&[2][..], &[1, 2]] {
        let (mut rig, _) = rotten_under_the_log(rotten).restart();
        for round in 0..3 {
            assert_rot_shows(&mut rig, &format!("{rotten:?}, round {round}"));
            rig.checkpoint();
            assert_rot_shows(&mut rig, &format!("{rotten:?}, after a checkpoint"));
            rig = rig.restart().0;
        }
    }
}

/// The same where the checkpoint that comes next is interrupted: from then on a damaged slot is one that it
/// tore.
#[test]
fn rot_shows_wherever_a_checkpoint_over_it_is_interrupted() {
    for rotten in [&[2][..], &[1, 2]] {
        let (rig, _) = rotten_under_the_log(rotten).restart();
        let disk = rig.disk.fork();
        drop(rig);
        for step in 0.. {
            let mut reached = false;
            for seed in 0..8 {
                let disk = disk.fork();
                let (mut store, _) = open(&disk).expect("opens");
                disk.crash_at(disk.steps() + step, Crash::PowerCut);
                if let Ok(Some(job)) = store.begin_checkpoint(true) {
                    let _ = store.finish_checkpoint(job.run());
                }
                reached = disk.has_crashed();
                drop(store);
                disk.power_cut(seed);
                let (store, _) = open(&disk).expect("opens");
                let mut rig = Rig { disk, store, stamp: Stamp { sequence: 9, ..STAMP } };
                assert_rot_shows(&mut rig, &format!("{rotten:?}, step {step}, seed {seed}"));
                rig.checkpoint();
                assert_rot_shows(&mut rig, &format!("{rotten:?}, then, step {step}, seed {seed}"));
            }
            if !reached {
                assert!(step > 10, "a checkpoint has steps");
                break;
            }
        }
    }
}

/// A scrub said that metadata was whole again, and had synced nothing of it.
#[test]
fn metadata_that_a_scrub_has_rewritten_survives_a_power_cut() {
    let mut rewritten = 0;
    for step in 0..8 {
        for seed in 0..8 {
            let mut rig = rotten_under_the_log(&[]);
            // So memory has it.
            assert!(rig.content(0, 0, 1) == vec![5; BLOCK]);
            rot_slot(&rig, 2);
            rig.disk.crash_at(rig.disk.steps() + step, Crash::PowerCut);
            let scrubbed = rig.store.scrub(&Rig::key(0), 0, SHARD_BLOCKS);
            let done = scrubbed.is_ok_and(|found| found.metadata_rewritten);
            let (mut rig, _) = rig.power_cut(seed);
            rewritten += u32::from(done);
            let about = format!("step {step}, seed {seed}, {done}");
            match rig.read_layers(&[1], 0, 0, 2) {
                Ok((_, data)) => {
                    let whole = data == [vec![5; BLOCK], vec![6; BLOCK]].concat();
                    assert!(whole, "{about}");
                }
                Err(error) => assert!(!done && error == bad(0), "{about}: {error}"),
            }
        }
    }
    assert!(rewritten >= 8, "{rewritten}");
}

#[test]
fn both_metadata_slots_rotten_make_the_shard_bad_until_written() {
    let mut rig = Rig::new();
    rig.fill(0, 0, 1, 5);
    rig.checkpoint();
    rig.fill(0, 1, 1, 6);
    rig.checkpoint();
    for version in [0, 1] {
        let slot = u64::from(SHARD_BYTES) + version * slot_bytes(SHARD_BYTES);
        assert!(rig.disk.corrupt(&shard_path(&Rig::key(0)), slot + 3));
    }
    let (mut rig, _) = rig.restart();
    assert_eq!(rig.read_layers(&[1], 0, 0, 1), Err(bad(0)));
    rig.fill(0, 0, 1, 8);
    for _ in 0..3 {
        rig.checkpoint();
        rig = rig.restart().0;
        assert_eq!(rig.content(0, 0, 1), vec![8; BLOCK]);
        assert_eq!(rig.read_layers(&[1], 0, 1, 1), Err(bad(1)));
    }
}

#[test]
fn rot_in_a_synced_record_is_reported_for_ever_and_a_torn_end_is_not() {
    let mut rig = Rig::new();
    rig.fill(0, 0, 1, 5);
    rig.sync();
    let place =
        rig.store.state.index.get(&Rig::key(0)).and_then(|s| s.get(0)).expect("there").place;
    rig.fill(0, 1, 1, 6);
    rig.sync();
    let path = crate::store::log::segment_path(rig.store.log.segment(place.segment).slot);
    let torn = rig.disk.fork();
    rig.disk.corrupt(&path, u64::from(place.offset) + 5);
    let (rig, recovery) = rig.power_cut(1);
    assert!(recovery.damaged);
    let (_, recovery) = rig.power_cut(2);
    assert!(recovery.damaged, "somebody has to replace it");
    // The last record of all has nothing after it that could prove a sync.
    let (mut store, _) = open(&torn).expect("opens");
    let stamp = crate::store::Stamp { epoch: 1, generation: 1, sequence: 50 };
    let op = crate::store::WriteOp { view: View::own(IMAGE, &[1]), shard: 0, offset: 0, stamp };
    let data = vec![3; BLOCK];
    store.write(&op, &[checksum_of(&data)], Bytes::from(data)).expect("write");
    store.append().expect("append");
    let place = store.state.index.get(&Rig::key(0)).and_then(|s| s.get(0)).expect("there").place;
    torn.corrupt(&path, u64::from(place.offset) + 5);
    drop(store);
    torn.kill();
    let (_, recovery) = open(&torn).expect("opens");
    assert!(!recovery.damaged);
}

/// One page that could not be read, also where nothing was written yet, kept the store from opening at all.
#[test]
fn unreadable_page_of_the_log_is_reported_where_it_held_something_and_harmless_elsewhere() {
    let mut rig = Rig::new();
    rig.fill(0, 0, 1, 5);
    rig.sync();
    rig.fill(0, 1, 1, 6);
    rig.sync();
    let last = rig.store.log.live().back().expect("one is written to");
    let (path, end) = (crate::store::log::segment_path(last.slot), u64::from(last.end));
    let run = *rig.store.state.index.get(&Rig::key(0)).and_then(|s| s.get(0)).expect("in the log");
    let unused = rig.disk.fork();
    unused.break_page(&path, end + 2 * 4096);
    let (store, recovery) = open(&unused).expect("opens");
    assert!(!recovery.damaged);
    let mut whole = Rig { disk: unused, store, stamp: rig.stamp };
    assert!(whole.content(0, 0, 2) == [vec![5; BLOCK], vec![6; BLOCK]].concat());
    rig.disk.break_page(&path, u64::from(run.place.offset));
    assert!(rig.power_cut(1).1.damaged);
}

#[test]
fn rot_anywhere_in_the_log_is_reported_or_harmless() {
    let mut rig = Rig::new();
    for round in 0..30u8 {
        rig.fill(u64::from(round % 3), u32::from(round), 2, round + 1);
        rig.sync();
        if rig.store.wants_checkpoint() {
            let job = rig.store.begin_checkpoint(false).expect("begins").expect("due");
            rig.store.finish_checkpoint(job.run()).expect("succeeds");
        }
    }
    rig.fill(4, 0, 1, 1);
    rig.sync();
    let logs: Vec<String> =
        rig.disk.paths().into_iter().filter(|path| path.starts_with("log/")).collect();
    let mut random = Seeded::new(4);
    let mut reported = 0;
    for _ in 0..150 {
        let disk = rig.disk.fork();
        let path = &logs[random.below(logs.len() as u64) as usize];
        disk.corrupt(path, random.below(64 << 10));
        let (store, recovery) = open(&disk).expect("opens");
        reported += u32::from(recovery.damaged);
        let mut rig = Rig { disk, store, stamp: rig.stamp };
        // Only the very last flush has nothing behind it.
        for round in (0..30u8).filter(|_| !recovery.damaged) {
            let (shard, block) = (u64::from(round % 3), u32::from(round));
            match rig.read_layers(&[1], shard, block, 1) {
                Ok((_, data)) => assert_eq!(data, vec![round + 1; BLOCK]),
                Err(StoreError::BadBlock { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
    }
    assert!(reported > 10, "{reported}");
}

#[test]
fn lost_superblock_is_an_error_not_a_new_store() {
    let rig = Rig::new();
    rig.disk.corrupt("superblock", 20);
    let disk = rig.disk.clone();
    drop(rig);
    let refused = open(&disk).map(|_| ());
    assert_eq!(refused, Err(StoreError::Corrupt { file: "superblock".to_owned() }));
    disk.run().unlink("superblock").expect("unlink");
    assert_eq!(open(&disk).map(|_| ()), refused);
}

#[test]
fn damaged_record_file_is_reported() {
    let mut rig = Rig::new();
    rig.checkpoint();
    assert!(rig.disk.corrupt(&format!("images/{IMAGE}/record"), 30));
    // Its log segment is not live any more; only the file has it.
    let (_, recovery) = rig.restart();
    assert!(recovery.damaged);
}

#[test]
fn random_bytes_are_no_record_and_no_metadata_and_never_panic() {
    let mut random = Seeded::new(77);
    let header = Header { blocks: 1, ..Header::new(Kind::Write, IMAGE) };
    for round in 0..20_000 {
        let mut bytes: Vec<u8> = (0..random.below(300)).map(|_| random.number() as u8).collect();
        if round % 2 == 0 && bytes.len() >= record::HEADER_BYTES {
            record::encode_header(&header, 1, &mut bytes);
            let at = random.below(bytes.len() as u64) as usize;
            bytes[at] ^= 1 << random.below(8);
        }
        assert_eq!(record::decode(&bytes, 1).filter(|(h, ..)| h.total_bytes() > bytes.len()), None);
        let _ = decode_slot(&Rig::key(0), SHARD_BLOCKS, &bytes);
        let _ = record::decode_copy(&bytes);
        let mut state = crate::store::state::State::default();
        let _ = state.load_snapshot(&bytes);
    }
}

#[test]
fn usage_counts_what_is_on_disk() {
    let mut rig = Rig::new();
    let usage: UsageHandle = rig.store.usage_handle();
    assert_eq!(usage.physical_bytes(&IMAGE), Ok(0));
    rig.fill(0, 0, 10, 1);
    assert_eq!(rig.store.log_resident_bytes(&IMAGE), 10 * 4096);
    rig.checkpoint();
    let bytes = usage.physical_bytes(&IMAGE).expect("usage");
    assert!((10 * 4096..14 * 4096).contains(&bytes), "{bytes}");
    assert_eq!(rig.store.log_resident_bytes(&IMAGE), 0);
}
