//! Records, dirty maps, clears, tombstones, identity.

use super::rig::*;
use crate::geometry::{ImageId, Tag};
use crate::store::log::FREE_WANTED;
use crate::store::{ImageRecord, RecordHead, Store, StoreConfig, StoreError, View, WriteOp};
use bytes::Bytes;

fn tag(epoch: u64, sequence: u64) -> Tag {
    Tag { epoch, sequence }
}

#[test]
fn record_that_is_lower_or_differs_is_refused_also_after_a_restart() {
    let mut rig = Rig::new();
    rig.store
        .put_record(IMAGE, ImageRecord { body: Bytes::from_static(b"body"), ..record(head(3, 5)) })
        .expect("higher");
    rig.sync();
    for _ in 0..2 {
        let stored = Box::new(head(3, 5));
        let lower = Err(StoreError::RecordLower { stored: stored.clone() });
        let conflict = Err(StoreError::RecordConflict { stored });
        assert_eq!(rig.store.put_record(IMAGE, record(head(2, 6))), lower);
        assert_eq!(rig.store.put_record(IMAGE, record(head(4, 4))), lower);
        let other = RecordHead { holder: [9; 16], ..head(3, 6) };
        assert_eq!(rig.store.put_record(IMAGE, record(other)), conflict);
        let other = RecordHead { digest: [9; 32], ..head(4, 5) };
        assert_eq!(rig.store.put_record(IMAGE, record(other)), conflict);
        let other = RecordHead { shard_bytes: 2 << 20, ..head(4, 6) };
        assert_eq!(rig.store.put_record(IMAGE, record(other)), conflict);
        assert_eq!(
            rig.store.image(&IMAGE).map(|r| r.body.clone()),
            Some(Bytes::from_static(b"body"))
        );
        rig.store
            .put_record(
                IMAGE,
                ImageRecord { body: Bytes::from_static(b"body"), ..record(head(3, 5)) },
            )
            .expect("the same");
        rig.checkpoint();
        rig = rig.power_cut(1).0;
    }
}

#[test]
fn request_without_a_record_or_of_an_older_epoch_is_refused() {
    let mut rig = Rig::new();
    let other = ImageId([7; 16]);
    let op = WriteOp { view: View::own(other, &[1]), shard: 0, offset: 0, stamp: rig.stamp };
    let unknown = Err(StoreError::UnknownImage { image: other });
    assert_eq!(rig.store.zero(&op, 4096, false), unknown);
    rig.store.put_record(IMAGE, record(head(2, 1))).expect("epoch 2");
    let stored = Box::new(head(2, 1));
    assert_eq!(rig.write_layers(&[1], 0, 0, &[1]), Err(StoreError::EpochLower { stored }));
}

#[test]
fn clear_drops_what_was_last_written_by_then_and_nothing_sticky() {
    let mut rig = Rig::new();
    (0..4).for_each(|shard| rig.fill(shard, 0, 1, 1));
    rig.fill(1, 5, 1, 2);
    rig.fill(2, 6, 1, 2);
    rig.store.clear(IMAGE, tag(1, 4), &[("node2".to_owned(), 9)]).expect("clear");
    assert_eq!(rig.dirty(), [1, 2]);
    rig.sync();
    let (mut rig, _) = rig.power_cut(5);
    assert_eq!(rig.dirty(), [1, 2], "the clear was synced");
    assert!(rig.store.dirty(&IMAGE).all(|(_, entry)| entry.sticky), "sticky after a start");
    assert_eq!(rig.store.peer_flush_numbers(&IMAGE).collect::<Vec<_>>(), [("node2", 9)]);
    let lower = [("node2".to_owned(), 3), ("node3".to_owned(), 0)];
    rig.store.clear(IMAGE, tag(1, 100), &lower).expect("clear");
    assert_eq!(rig.dirty(), [1, 2], "no clear removes sticky entries");
    // It was healed onto another disk; the latest word counts, and 0 is none.
    assert_eq!(rig.store.peer_flush_numbers(&IMAGE).collect::<Vec<_>>(), [("node2", 3)]);
    rig.stamp.sequence = 200;
    rig.fill(1, 6, 1, 3);
    rig.store.mark_level(IMAGE, &[1, 2]).expect("level");
    assert_eq!(rig.dirty(), [1], "shard 1 was written to since");
    rig.store.clear(IMAGE, tag(1, 201), &[]).expect("clear");
    assert!(rig.dirty().is_empty());
}

#[test]
fn higher_epoch_makes_entries_sticky() {
    let mut rig = Rig::new();
    rig.fill(0, 0, 1, 1);
    rig.store.put_record(IMAGE, record(head(2, 1))).expect("epoch 2");
    rig.stamp.epoch = 2;
    rig.fill(1, 0, 1, 1);
    rig.store.clear(IMAGE, tag(2, 100), &[]).expect("clear");
    assert_eq!(rig.dirty(), [0], "what the former holder left waits for reconcile");
}

/// A write in flight when a node is removed stands on the survivors under the old generation; if
/// the heal list went by that alone it would miss the shard.
#[test]
fn new_generation_is_what_dirty_shards_count_as_written_in_also_after_their_clear() {
    for cleared in [false, true] {
        for synced in [false, true] {
            let mut rig = Rig::new();
            (0..2).for_each(|shard| rig.fill(shard, 0, 1, 1));
            rig.store.clear(IMAGE, tag(1, 1), &[]).expect("clear of shard 0");
            if synced {
                rig.checkpoint();
            }
            rig.store.put_record(IMAGE, record(head(1, 2))).expect("generation 2");
            if cleared {
                rig.store.clear(IMAGE, tag(1, 2), &[]).expect("clear of shard 1");
            }
            rig.sync();
            for round in 0..3 {
                let generation = |rig: &mut Rig, shard| {
                    rig.store.summary(&Rig::key(shard)).map(|s| s.generation)
                };
                assert_eq!(generation(&mut rig, 0), Ok(1), "{cleared} {synced} {round}");
                assert_eq!(generation(&mut rig, 1), Ok(2), "{cleared} {synced} {round}");
                rig = rig.power_cut(round).0;
                if round > 0 {
                    rig.checkpoint();
                }
            }
        }
    }
}

#[test]
fn write_of_a_higher_generation_raises_the_other_dirty_shards() {
    let mut rig = Rig::new();
    rig.fill(0, 0, 1, 1);
    rig.stamp.generation = 4;
    rig.fill(1, 0, 1, 1);
    let generations = |rig: &Rig| -> Vec<u64> {
        rig.store.dirty(&IMAGE).map(|(_, entry)| entry.generation).collect()
    };
    assert_eq!(generations(&rig), [4, 4]);
    rig.store.observe_generation(IMAGE, 6).expect("observe");
    rig.sync();
    let (rig, _) = rig.power_cut(2);
    assert_eq!(generations(&rig), [6, 6]);
}

#[test]
fn tags_from_before_a_clear_are_forgotten() {
    let mut rig = Rig::new();
    rig.fill(0, 0, 1, 1);
    rig.checkpoint();
    rig.store.clear(IMAGE, tag(1, 1), &[]).expect("clear");
    let tags = |rig: &mut Rig| -> Vec<Tag> {
        let summary = rig.store.summary(&Rig::key(0)).expect("summary");
        summary.blocks[..2].iter().map(|block| block.tag).collect()
    };
    assert_eq!(tags(&mut rig), [Tag::NONE, Tag::NONE]);
    rig.fill(0, 1, 1, 1);
    assert_eq!(tags(&mut rig), [Tag::NONE, tag(1, 2)]);
    rig.checkpoint();
    assert_eq!(tags(&mut rig), [Tag::NONE, tag(1, 2)]);
}

#[test]
fn deleted_image_never_comes_back_and_its_files_go() {
    let mut rig = Rig::new();
    rig.fill(0, 0, 1, 1);
    rig.checkpoint();
    rig.fill(1, 0, 1, 1);
    rig.store.delete(IMAGE).expect("delete");
    rig.sync();
    for round in 0..3 {
        let deleted = Err(StoreError::Deleted { image: IMAGE });
        assert_eq!(rig.store.put_record(IMAGE, record(head(9, 9))), deleted);
        assert_eq!(rig.write_layers(&[1], 0, 0, &[1]), deleted);
        assert!(rig.store.images().is_empty() && rig.dirty().is_empty());
        rig = rig.power_cut(round).0;
        if round == 1 {
            let job = rig.store.begin_checkpoint(false).expect("begins").expect("files to remove");
            rig.store.finish_checkpoint(job.run()).expect("succeeds");
            let left = rig.disk.paths();
            assert!(!left.iter().any(|path| path.starts_with("images/")), "{left:?}");
        }
    }
}

#[test]
fn store_of_another_node_or_cluster_or_in_use_is_refused() {
    let disk = SimDiskWithStore::new();
    let locked = Store::open(disk.0.run(), &config()).map(|_| ());
    assert_eq!(locked, Err(StoreError::Locked));
    drop(disk.1);
    for other in [
        StoreConfig { node: "node2".to_owned(), ..config() },
        StoreConfig { cluster: [9; 16], ..config() },
    ] {
        let refused = Store::open(disk.0.run(), &other).map(|_| ());
        let foreign = StoreError::Foreign { cluster: [1; 16], node: "node1".to_owned() };
        assert_eq!(refused, Err(foreign));
    }
    let (store, recovery) = open(&disk.0).expect("its own node may");
    assert_eq!((store.instance(), recovery.created), (2, false));
}

#[test]
fn store_that_was_set_back_begins_above_what_was_seen_and_distrusts_until_a_record_comes() {
    let disk = SimDiskWithStore::new().0;
    let config = StoreConfig { seen_counter: 7, ..config() };
    let (mut store, _) = Store::open(disk.run(), &config).expect("its own node may");
    assert_eq!(store.instance(), 8);
    store.put_record(IMAGE, record(head(1, 1))).expect("of its former life");
    store.distrust([IMAGE]);
    assert!(store.is_distrusted(&IMAGE) && store.distrusted() == [IMAGE]);
    let lower = store.put_record(IMAGE, record(head(1, 0)));
    assert!(matches!(lower, Err(StoreError::RecordLower { .. })));
    assert!(store.is_distrusted(&IMAGE), "a record that is refused tells nothing");
    store.put_record(IMAGE, record(head(2, 3))).expect("the cluster's");
    assert!(!store.is_distrusted(&IMAGE));
    drop(store);
    let (store, _) = open(&disk).expect("opens");
    assert_eq!(store.instance(), 9, "and goes on from there");
}

struct SimDiskWithStore(crate::store::simulated::SimDisk, Store);

impl SimDiskWithStore {
    fn new() -> Self {
        let disk = crate::store::simulated::SimDisk::new();
        let store = new_store(&disk);
        SimDiskWithStore(disk, store)
    }
}

#[test]
fn failed_sync_is_never_retried() {
    let mut rig = Rig::new();
    rig.fill(0, 0, 1, 1);
    rig.disk.fail_sync(0, rustix::io::Errno::IO);
    let job = rig.store.begin_sync().expect("begins").expect("there is something");
    let failed = StoreError::Failed { errno: rustix::io::Errno::IO };
    assert_eq!(rig.store.finish_sync(job.run()), Err(failed.clone()));
    assert_eq!(rig.write_layers(&[1], 0, 0, &[1]), Err(failed.clone()));
    assert_eq!(rig.store.append(), Err(failed.clone()));
    assert!(matches!(rig.store.begin_sync(), Err(error) if error == failed));
}

/// The kernel reports a lost write once: the checkpoint's sync must not hide it from the flush's.
#[test]
fn sync_after_a_checkpoint_whose_log_sync_failed_fails_too() {
    let mut rig = Rig::new();
    rig.fill(0, 0, 1, 1);
    let checkpoint = rig.store.begin_checkpoint(true).expect("begins").expect("work");
    rig.fill(0, 1, 1, 1);
    let sync = rig.store.begin_sync().expect("begins").expect("work");
    // The first syncs are those of new segments.
    rig.disk.fail_sync(FREE_WANTED as u64, rustix::io::Errno::IO);
    let checkpoint = checkpoint.run();
    let sync = sync.run();
    assert!(rig.store.finish_sync(sync).is_err());
    assert!(rig.store.finish_checkpoint(checkpoint).is_err());
}

#[test]
fn flush_number_grows_with_each_sync_and_survives() {
    let mut rig = Rig::new();
    for number in 1..5 {
        rig.fill(0, 0, 1, number as u8);
        rig.sync();
        assert_eq!(rig.store.flush_number(), number);
        rig = rig.power_cut(number).0;
        assert_eq!(rig.store.flush_number(), number);
    }
    rig.sync();
    assert_eq!(rig.store.flush_number(), 4, "nothing to sync, no new number");
}

/// A node came back with a write that it alone had, was made level with the others, and was sent it again. The
/// mark that the shard is level took its entry away, and nothing named the difference any more.
#[test]
fn entry_of_a_shard_that_is_level_stays_where_a_write_of_before_came_again() {
    let mut rig = Rig::new();
    rig.fill(1, 0, 1, 1);
    rig.fill(2, 0, 1, 2);
    let again = rig.stamp;
    rig.sync();
    let (mut rig, _) = rig.restart();
    let op = WriteOp { view: View::own(IMAGE, &[1]), shard: 2, offset: 0, stamp: again };
    let data = vec![2; BLOCK];
    rig.store
        .write(&op, &fragment_checksums(0, &data), Bytes::copy_from_slice(&data))
        .expect("the same write");
    rig.store.mark_level(IMAGE, &[1, 2]).expect("level");
    assert_eq!(rig.dirty(), [2]);
    rig.store.append().expect("append");
    let (rig, _) = rig.restart();
    assert_eq!(rig.dirty(), [2], "also as the log is read again");
}
