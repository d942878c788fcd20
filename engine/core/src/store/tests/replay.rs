//! A log is replayed whole, however long it is, and what was never written of it is not read.

use super::disk::Folder;
use super::rig::*;
use crate::store::real::RealDisk;
use crate::store::simulated::{Seeded, SimDisk};
use crate::store::{Recovery, Store, StoreConfig};

/// With segments of many times what is read at once.
fn large() -> StoreConfig {
    StoreConfig { segment_bytes: Some(8 << 20), log_bytes: 64 << 20, ..config() }
}

fn open_large(disk: &SimDisk) -> (Store, Recovery) {
    Store::open(disk.run(), &large()).expect("the store opens")
}

#[test]
fn log_longer_than_what_is_read_at_once_is_replayed_whole() {
    for seed in 0..4 {
        let disk = SimDisk::new();
        let (mut store, _) = open_large(&disk);
        store.put_record(IMAGE, record(head(1, 1))).expect("a first record");
        let mut rig = Rig {
            disk,
            store,
            stamp: crate::store::Stamp { epoch: 1, generation: 1, sequence: 0 },
        };
        let mut random = Seeded::new(seed);
        let mut written = Vec::new();
        for shard in 0..18 {
            // Of one block to a whole shard, batched by chance.
            let blocks = 1 + random.below(u64::from(SHARD_BLOCKS)) as u32;
            rig.fill(shard, 0, blocks, shard as u8 + 1);
            written.push(blocks);
            if random.below(2) == 0 {
                rig.store.append().expect("append");
            }
        }
        rig.store.append().expect("append");
        rig.sync();
        if seed % 2 == 0 {
            rig.disk.kill()
        } else {
            rig.disk.power_cut(seed)
        }
        let Rig { disk, store, stamp } = rig;
        drop(store);
        let (store, recovery) = open_large(&disk);
        assert!(!recovery.damaged && recovery.records > 18, "{recovery:?}");
        let mut rig = Rig { disk, store, stamp };
        for (shard, blocks) in (0..).zip(written) {
            let expected = vec![shard as u8 + 1; blocks as usize * BLOCK];
            assert_eq!(rig.content(shard, 0, blocks), expected, "seed {seed}, shard {shard}");
        }
    }
}

/// What this thread has read from files so far.
fn bytes_read() -> u64 {
    let counts = std::fs::read_to_string("/proc/thread-self/io").expect("counts of this thread");
    let read = counts.lines().find_map(|line| line.strip_prefix("rchar: "));
    read.and_then(|count| count.parse().ok()).expect("a count")
}

#[test]
fn open_of_a_store_reads_no_more_of_a_log_than_was_written_to_it() {
    let folder = Folder::new("replay");
    let disk = || RealDisk::open_dir(&folder.0).expect("opens");
    drop(Store::open(disk(), &large()).expect("creates"));
    for _ in 0..2 {
        let before = bytes_read();
        let (_store, recovery) = Store::open(disk(), &large()).expect("opens");
        assert!(!recovery.damaged);
        assert!(bytes_read() - before < 4 << 20, "of two segments of 8 MiB each");
    }
}
