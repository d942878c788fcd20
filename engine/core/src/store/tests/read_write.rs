//! What is written is read back, wherever it is.

use super::rig::*;
use crate::geometry::{BLOCK_BYTES, ImageId, Tag};
use crate::store::disk::Errno;
use crate::store::shard_file::shard_path;
use crate::store::simulated::Crash;
use crate::store::{BlockState, CopyBlock, StoreError, View, WriteOp};
use bytes::Bytes;

use crate::checksum::checksum_of;

#[test]
fn write_is_read_back_staged_appended_checkpointed_and_restarted() {
    let mut rig = Rig::new();
    rig.fill(0, 3, 2, 7);
    assert_eq!(rig.content(0, 3, 2), vec![7; 2 * BLOCK], "staged");
    rig.store.append().expect("append");
    assert_eq!(rig.content(0, 3, 2), vec![7; 2 * BLOCK], "in the log");
    rig.checkpoint();
    assert_eq!(rig.content(0, 3, 2), vec![7; 2 * BLOCK], "in the shard file");
    let (mut rig, _) = rig.restart();
    assert_eq!(rig.content(0, 2, 4), [vec![0; BLOCK], vec![7; 2 * BLOCK], vec![0; BLOCK]].concat());
}

#[test]
fn partial_write_is_merged_with_old_content_wherever_that_is() {
    let mut rig = Rig::new();
    rig.fill(0, 0, 3, 1);
    rig.write(0, 100, &[2; 50]);
    rig.checkpoint();
    rig.write(0, BLOCK_BYTES - 10, &[3; 20]);
    rig.store.append().expect("append");
    rig.write(0, 2 * BLOCK_BYTES - 1, &[4; 2]);
    let mut expected = vec![1; 3 * BLOCK];
    expected[100..150].fill(2);
    expected[BLOCK - 10..BLOCK + 10].fill(3);
    expected[2 * BLOCK - 1..2 * BLOCK + 1].fill(4);
    assert_eq!(rig.content(0, 0, 3), expected);
    rig.checkpoint();
    assert_eq!(rig.content(0, 0, 3), expected);
}

#[test]
fn partial_write_over_two_blocks_keeps_both_edges() {
    let mut rig = Rig::new();
    rig.fill(0, 0, 4, 9);
    rig.write(0, 1000, &[5; 3 * BLOCK]);
    let mut expected = vec![9; 4 * BLOCK];
    expected[1000..1000 + 3 * BLOCK].fill(5);
    assert_eq!(rig.content(0, 0, 4), expected);
}

#[test]
fn write_with_a_wrong_checksum_is_refused_and_nothing_changes() {
    let mut rig = Rig::new();
    let op = WriteOp { view: View::own(IMAGE, &[1]), shard: 0, offset: 0, stamp: rig.stamp };
    let refused = rig.store.write(&op, &[1], Bytes::from(vec![1; BLOCK]));
    assert_eq!(refused, Err(StoreError::BadChecksum { block: 0 }));
    assert_eq!(rig.read_layers(&[1], 0, 0, 1), Ok((vec![BlockState::Absent], vec![])));
    assert!(rig.dirty().is_empty());
}

#[test]
fn ranges_outside_the_shard_are_refused() {
    let mut rig = Rig::new();
    let past = rig.write_layers(&[1], 0, SHARD_BYTES - 10, &[0; 20]);
    assert_eq!(past, Err(StoreError::OutOfRange));
    assert_eq!(rig.write_layers(&[1], 0, 0, &[]), Err(StoreError::OutOfRange));
    assert_eq!(rig.write_layers(&[], 0, 0, &[1]), Err(StoreError::OutOfRange));
    assert_eq!(rig.read_layers(&[1], 0, SHARD_BLOCKS, 1), Err(StoreError::OutOfRange));
    assert_eq!(rig.read_layers(&[1], 0, u32::MAX, 2), Err(StoreError::OutOfRange));
}

#[test]
fn zero_makes_blocks_absent_and_merges_edges() {
    let mut rig = Rig::new();
    rig.fill(0, 0, 6, 8);
    rig.checkpoint();
    let op = WriteOp { view: View::own(IMAGE, &[1]), shard: 0, offset: 100, stamp: rig.stamp };
    rig.store.zero(&op, 4 * BLOCK_BYTES, false).expect("zero");
    let check = |rig: &mut Rig| {
        let (states, data) = rig.read_layers(&[1], 0, 0, 6).expect("read");
        use BlockState::{Absent, Data};
        assert_eq!(states, [Data, Absent, Absent, Absent, Data, Data]);
        let mut expected = vec![8; 6 * BLOCK];
        expected[100..100 + 4 * BLOCK].fill(0);
        assert_eq!(flatten(&states, &data), expected);
    };
    check(&mut rig);
    let usage = rig.store.usage_handle();
    let before = usage.physical_bytes(&IMAGE).expect("usage");
    rig.checkpoint();
    check(&mut rig);
    let after = usage.physical_bytes(&IMAGE).expect("usage");
    assert!(after < before, "the holes were punched: {before} {after}");
    let (mut rig, _) = rig.restart();
    check(&mut rig);
}

#[test]
fn zero_within_one_block_is_merged_and_of_an_absent_block_changes_nothing() {
    let mut rig = Rig::new();
    rig.fill(0, 0, 1, 8);
    for shard in [0, 1] {
        let op = WriteOp { view: View::own(IMAGE, &[1]), shard, offset: 10, stamp: rig.stamp };
        rig.store.zero(&op, 20, false).expect("zero");
    }
    let mut expected = vec![8; BLOCK];
    expected[10..30].fill(0);
    assert_eq!(rig.content(0, 0, 1), expected);
    assert_eq!(rig.read_layers(&[1], 1, 0, 1), Ok((vec![BlockState::Absent], vec![])));
}

#[test]
fn zero_that_keeps_its_space_is_explicit_and_allocated() {
    let mut rig = Rig::new();
    let op = WriteOp { view: View::own(IMAGE, &[1]), shard: 0, offset: 0, stamp: rig.stamp };
    rig.store.zero(&op, 64 * BLOCK_BYTES, true).expect("zero");
    rig.checkpoint();
    let usage = rig.store.usage_handle().physical_bytes(&IMAGE).expect("usage");
    assert!(usage >= 64 * u64::from(BLOCK_BYTES), "{usage}");
    assert_eq!(rig.read_layers(&[1], 0, 0, 1), Ok((vec![BlockState::Zero], vec![])));
}

#[test]
fn layers_show_the_topmost_block_and_an_explicit_zero_hides_those_below() {
    let mut rig = Rig::new();
    rig.fill(0, 0, 4, 1);
    rig.checkpoint();
    rig.write_layers(&[2, 1], 0, BLOCK_BYTES, &[2; BLOCK]).expect("write");
    let op = WriteOp {
        view: View::own(IMAGE, &[2, 1]),
        shard: 0,
        offset: 2 * BLOCK_BYTES,
        stamp: rig.stamp,
    };
    rig.store.zero(&op, BLOCK_BYTES, false).expect("zero");
    rig.write_layers(&[2, 1], 0, 3 * BLOCK_BYTES, &[3; 10]).expect("partial over the parent");
    for _ in 0..2 {
        let (states, data) = rig.read_layers(&[2, 1], 0, 0, 5).expect("read");
        use BlockState::{Absent, Data, Zero};
        assert_eq!(states, [Data, Data, Zero, Data, Absent]);
        let mut expected =
            [vec![1; BLOCK], vec![2; BLOCK], vec![0; BLOCK], vec![1; BLOCK]].concat();
        expected.extend(vec![0; BLOCK]);
        expected[3 * BLOCK..3 * BLOCK + 10].fill(3);
        assert_eq!(flatten(&states, &data), expected);
        assert_eq!(rig.content(0, 0, 4), vec![1; 4 * BLOCK], "the layer below is as it was");
        rig.checkpoint();
    }
    let mut states = Vec::new();
    rig.store.status(View::own(IMAGE, &[2, 1]), 0, 1, 2, &mut states).expect("status");
    assert_eq!(states, [BlockState::Data, BlockState::Zero]);
}

#[test]
fn copy_keeps_tags_states_and_the_higher_generation() {
    let mut rig = Rig::new();
    let tag = |sequence| Tag { epoch: 1, sequence };
    let content = Bytes::from([vec![6; BLOCK], vec![7; BLOCK]].concat());
    let checksum = |index: usize| checksum_of(&content[index * BLOCK..][..BLOCK]);
    let blocks = [
        CopyBlock { block: 1, state: BlockState::Data, tag: tag(5), checksum: checksum(0) },
        CopyBlock { block: 2, state: BlockState::Zero, tag: tag(6), checksum: 0 },
        CopyBlock { block: 9, state: BlockState::Data, tag: Tag::NONE, checksum: checksum(1) },
        CopyBlock { block: 10, state: BlockState::Bad, tag: Tag::NONE, checksum: 0 },
    ];
    rig.store.copy(&Rig::key(4), &blocks, content.clone(), 3).expect("copy");
    for _ in 0..2 {
        let summary = rig.store.summary(&Rig::key(4)).expect("summary");
        assert_eq!(summary.generation, 3);
        for block in &blocks {
            let found = summary.blocks[block.block as usize];
            assert_eq!(
                (found.state, found.tag, found.checksum),
                (block.state, block.tag, block.checksum)
            );
        }
        assert_eq!(rig.content(4, 9, 1), vec![7; BLOCK]);
        let bad = StoreError::BadBlock { image: IMAGE, layer: 1, shard: 4, block: 10 };
        assert_eq!(rig.read_layers(&[1], 4, 10, 1), Err(bad));
        assert_eq!(rig.dirty(), [4]);
        rig.checkpoint();
    }
    rig.fill(4, 10, 1, 1);
    assert_eq!(rig.content(4, 10, 1), vec![1; BLOCK], "a write makes a bad block good");
    let wrong = [CopyBlock { checksum: 1, ..blocks[0] }];
    let refused = rig.store.copy(&Rig::key(4), &wrong, content.slice(..BLOCK), 3);
    assert_eq!(refused, Err(StoreError::BadChecksum { block: 1 }));
}

#[test]
fn full_log_refuses_data_takes_small_records_and_recovers_by_a_checkpoint() {
    let mut rig = Rig::new();
    let mut written = 0;
    let error = loop {
        match rig.write_layers(&[1], written % 5, (written as u32 / 5) * BLOCK_BYTES, &[1; BLOCK]) {
            Ok(_) => written += 1,
            Err(error) => break error,
        }
        // Only files are created, nothing is applied.
        for slot in rig.store.log.slots_wanted() {
            let file = crate::store::log::create_segment(&*rig.store.disk, slot, 64 << 10);
            rig.store.log.grow(vec![(slot, file.expect("a segment"))], true);
        }
    };
    assert_eq!(error, StoreError::LogFull);
    assert!(written > 80, "{written} blocks fit into 512 KiB");
    for generation in 2..6 {
        rig.store.put_record(IMAGE, record(head(1, generation))).expect("there is a reserve");
        rig.sync();
    }
    let job = rig.store.begin_checkpoint(false).expect("begins").expect("one is due");
    rig.store.finish_checkpoint(job.run()).expect("succeeds");
    rig.write_layers(&[1], 0, 0, &[1; BLOCK]).expect("room again");
    assert_eq!(rig.content(1, 0, 2), vec![1; 2 * BLOCK]);
    rig.sync();
    let (mut rig, recovery) = rig.power_cut(3);
    assert!(!recovery.damaged);
    assert_eq!(rig.content(1, 0, 2), vec![1; 2 * BLOCK]);
}

#[test]
fn too_many_dirty_shards_are_refused_until_a_clear() {
    let mut rig = Rig::new();
    let mut shard = 0;
    let error = loop {
        match rig.write_layers(&[1], shard, 0, &[1; 10]) {
            Ok(_) => shard += 1,
            Err(StoreError::LogFull) => {
                let job = rig.store.begin_checkpoint(false).expect("begins").expect("due");
                rig.store.finish_checkpoint(job.run()).expect("succeeds");
            }
            Err(error) => break error,
        }
    };
    assert_eq!(error, StoreError::DirtyFull);
    assert_eq!(rig.dirty().len(), (64 << 10) / 2 / 77);
    rig.write_layers(&[1], 0, 0, &[1; 10]).expect("one that is dirty already");
    let tag = rig.stamp.tag();
    rig.store.clear(IMAGE, tag, &[]).expect("clear");
    rig.write_layers(&[1], shard, 0, &[1; 10]).expect("room again");
}

#[test]
fn request_larger_than_the_log_can_hold_is_refused() {
    let mut rig = Rig::new();
    let refused = rig.write_layers(&[1], 0, 0, &vec![1; SHARD_BYTES as usize]);
    assert_eq!(refused, Err(StoreError::TooLarge));
}

#[test]
fn checkpoint_without_space_leaves_everything_in_the_log_and_succeeds_later() {
    let mut rig = Rig::new();
    (0..8).for_each(|shard| rig.fill(shard, 0, 2, shard as u8 + 1));
    rig.sync();
    rig.disk.set_capacity(Some(rig.disk.allocated_bytes() + 8 * 4096));
    let mut refused = 0;
    for _ in 0..3 {
        let job = rig.store.begin_checkpoint(true).expect("begins").expect("there is work");
        refused += u32::from(rig.store.finish_checkpoint(job.run()) == Err(StoreError::NoSpace));
    }
    assert_eq!(refused, 3);
    (0..8).for_each(|s| assert_eq!(rig.content(s, 0, 2), vec![s as u8 + 1; 2 * BLOCK]));
    let (mut rig, _) = rig.power_cut(11);
    (0..8).for_each(|s| assert_eq!(rig.content(s, 0, 2), vec![s as u8 + 1; 2 * BLOCK]));
    rig.disk.set_capacity(None);
    // The first one makes room for the second to go on in.
    rig.checkpoint();
    rig.checkpoint();
    (0..8).for_each(|s| assert_eq!(rig.content(s, 0, 2), vec![s as u8 + 1; 2 * BLOCK]));
    assert_eq!(rig.store.log_resident_bytes(&IMAGE), 0);
}

/// A log that found no space to grow in was due for a checkpoint at every moment: one that did nothing
/// followed the other without pause, and each left all that was free reserved for a segment without end.
#[test]
fn log_that_finds_no_space_to_grow_takes_none_and_does_not_ask_on() {
    let mut rig = Rig::new();
    rig.store.append().expect("append");
    let before = rig.disk.allocated_bytes();
    rig.disk.set_capacity(Some(before + 8 * 4096));
    assert!(rig.store.wants_checkpoint(), "it has fewer segments than it may");
    rig.checkpoint_if_due();
    assert_eq!(rig.disk.allocated_bytes(), before, "what it could not use it has given back");
    assert!(!rig.store.wants_checkpoint(), "nothing would come of it");
    // It goes on with what it has, and grows when there is space again.
    rig.disk.set_capacity(None);
    for byte in 0..60 {
        rig.fill(0, 0, 4, byte);
        rig.sync();
        rig.checkpoint_if_due();
    }
    assert!(rig.disk.allocated_bytes() >= before + 3 * (64 << 10));
}

/// A sync of shard files found no space, and the kernel took their pages for written. The next checkpoint
/// saw metadata that was in memory only, and wrote its own over the last that was on the disk.
#[test]
fn checkpoint_after_a_sync_without_space_relies_on_nothing_that_it_lost() {
    // So much of it that its metadata can be torn: it takes more than a sector.
    let mut base = Rig::new();
    for byte in 1..=20 {
        base.fill(0, (u32::from(byte) - 1) * 8, 8, byte);
        base.checkpoint();
    }
    base.fill(0, 160, 8, 21);
    base.sync();
    let expected: Vec<u8> = (1..=21).flat_map(|byte| vec![byte; 8 * BLOCK]).collect();
    let mut without_space = 0;
    for failing in 0..12 {
        for step in 0..24 {
            let disk = base.disk.fork();
            let (store, _) = open(&disk).expect("opens");
            let mut rig = Rig { disk, store, stamp: base.stamp };
            rig.disk.fail_sync(failing, Errno::NOSPC);
            let job = rig.store.begin_checkpoint(true).expect("begins").expect("there is work");
            match rig.store.finish_checkpoint(job.run()) {
                Err(StoreError::NoSpace) => without_space += 1,
                // The log's own sync ends the store.
                Err(error) => assert_eq!(error, StoreError::Failed { errno: Errno::NOSPC }),
                // Fewer syncs than that, or one of a segment that is not needed.
                Ok(()) => rig.disk.fail_no_sync(),
            }
            rig.store.forget_metadata();
            rig.disk.crash_at(rig.disk.steps() + step, Crash::PowerCut);
            if let Ok(Some(job)) = rig.store.begin_checkpoint(true) {
                let _ = rig.store.finish_checkpoint(job.run());
            }
            let (mut rig, _) = rig.power_cut(step);
            assert!(rig.content(0, 0, 168) == expected, "sync {failing}, step {step}");
        }
    }
    assert!(without_space >= 2 * 24, "shard files and tail are synced: {without_space}");
}

/// Nothing that is deleted made room: the checkpoint that was to delete it stopped for want of it.
#[test]
fn image_deleted_on_a_full_disk_goes_before_anything_needs_space() {
    const OTHER: ImageId = ImageId([0xB2; 16]);
    let mut rig = Rig::new();
    rig.store.put_record(OTHER, record(head(1, 1))).expect("a first record");
    let (data, checksums) = ([9; 4 * BLOCK], fragment_checksums(0, &[9; 4 * BLOCK]));
    for shard in 0..8 {
        let op = WriteOp { view: View::own(OTHER, &[1]), shard, offset: 0, stamp: rig.stamp };
        rig.store.write(&op, &checksums, Bytes::copy_from_slice(&data)).expect("a write");
        rig.checkpoint();
    }
    (0..8).for_each(|shard| rig.fill(shard, 0, 2, shard as u8 + 1));
    rig.sync();
    rig.disk.set_capacity(Some(rig.disk.allocated_bytes() + 8 * 4096));
    let job = rig.store.begin_checkpoint(true).expect("begins").expect("there is work");
    assert_eq!(rig.store.finish_checkpoint(job.run()), Err(StoreError::NoSpace));
    let of_other = |rig: &Rig| {
        let folder = format!("images/{OTHER}");
        rig.disk.paths().iter().filter(|path| path.starts_with(&folder)).count()
    };
    assert_ne!(of_other(&rig), 0);
    rig.store.delete(OTHER).expect("there is a reserve");
    rig.sync();
    let job = rig.store.begin_checkpoint(true).expect("begins").expect("there is work");
    // A simulated disk does not give the space of removed files back at once.
    assert_eq!(rig.store.finish_checkpoint(job.run()), Err(StoreError::NoSpace));
    assert_eq!(of_other(&rig), 0);
    rig.disk.set_capacity(None);
    rig.checkpoint();
    assert_eq!(of_other(&rig), 0);
    (0..8).for_each(|s| assert_eq!(rig.content(s, 0, 2), vec![s as u8 + 1; 2 * BLOCK]));
}

#[test]
fn segments_whose_blocks_were_all_overwritten_are_freed_without_a_copy() {
    let mut rig = Rig::new();
    rig.fill(1, 0, 1, 99);
    let mut checkpoints = 0;
    for byte in 0..200 {
        rig.fill(0, 0, 4, byte);
        rig.sync();
        if let Some(job) = rig.store.begin_checkpoint(false).expect("a checkpoint begins") {
            rig.store.finish_checkpoint(job.run()).expect("a checkpoint succeeds");
            checkpoints += 1;
        }
    }
    // 3 MiB went through a log of 512 KiB.
    assert!(checkpoints > 3, "the log was used several times over");
    let disk = rig.disk.run();
    let file = |shard| disk.open(&shard_path(&Rig::key(shard))).err();
    assert_eq!(file(0), Some(Errno::NOENT), "what lives in the log stays there");
    assert_eq!(file(1), None, "what nobody overwrote is in its file");
    let (mut rig, _) = rig.power_cut(1);
    assert_eq!(rig.content(0, 0, 5), [vec![199; 4 * BLOCK], vec![0; BLOCK]].concat());
    assert_eq!(rig.content(1, 0, 1), vec![99; BLOCK]);
}

#[test]
fn discard_of_a_shard_that_holds_nothing_leaves_no_trace() {
    let mut rig = Rig::new();
    let discard = |rig: &mut Rig, shard, layers: &[u32], keep| {
        let op = WriteOp { view: View::own(IMAGE, layers), shard, offset: 0, stamp: rig.stamp };
        rig.store.zero(&op, SHARD_BYTES, keep).expect("a discard")
    };
    rig.store.append().expect("append");
    let before = rig.store.log_bytes();
    for shard in 0..10_000 {
        discard(&mut rig, shard, &[1], false);
    }
    rig.store.append().expect("append");
    assert_eq!((rig.dirty(), rig.store.log_bytes()), (vec![], before));
    // Under a parent, or to keep the space, there is something to remember.
    discard(&mut rig, 3, &[2, 1], false);
    discard(&mut rig, 4, &[1], true);
    rig.fill(5, 0, 1, 9);
    discard(&mut rig, 5, &[1], false);
    assert_eq!(rig.dirty(), [3, 4, 5]);
    assert_eq!(rig.content(5, 0, 1), vec![0; BLOCK]);
    rig.fill(6, 0, 1, 9);
    rig.checkpoint();
    discard(&mut rig, 6, &[1], false);
    assert_eq!(rig.content(6, 0, 1), vec![0; BLOCK], "what is in a file is discarded");
}
