//! Rot that reads and scrubs find, each the story of one kind.

use super::cluster::{Cluster, Faults, ROTTING};
use crate::replica::NodeIndex;

/// A cluster with two written regions that lie in shard files.
fn written(rounds: usize) -> Cluster {
    let mut cluster = Cluster::roomy(3, Faults::Rot);
    cluster.settle();
    for _ in 0..rounds {
        cluster.write(0, 16);
        cluster.write(32, 16);
        cluster.flush();
        cluster.settle();
    }
    for _ in 0..4 {
        // Nothing is dirty any more.
        cluster.tick();
        cluster.settle();
    }
    (0..3).for_each(|node| cluster.nodes[node].checkpoint_all());
    cluster
}

#[test]
fn a_sound_image_is_read_and_nothing_found() {
    let mut cluster = written(2);
    let report = cluster.scrub_all();
    assert_eq!((report.found, report.undecided, report.missed.len()), (0, 0, 0));
    assert!(report.shards_done >= 2 && report.read_bytes > 0, "{report:?}");
}

/// A database writes pages of 512 bytes; one such write met rot, and its node was left behind.
#[test]
fn a_small_write_into_a_rotten_block_leaves_no_node_behind() {
    let mut cluster = written(1);
    let last_block = 254 * 4096;
    cluster.nodes[ROTTING].rot(0, last_block + 7);
    cluster.write(2, 1);
    cluster.settle();
    assert_eq!(cluster.policy.record.generation, 1, "nobody was left behind");
    let rot = cluster.io.rot_state();
    assert_eq!((rot.found, rot.repaired, rot.waiting), (1, 1, 0));
    cluster.check_replicas(false);
}

#[test]
fn a_scrub_finds_what_nobody_reads_and_has_it_repaired() {
    let mut cluster = written(1);
    cluster.nodes[ROTTING].rot(0, 254 * 4096 + 7);
    cluster.nodes[ROTTING].rot(0, 255 * 4096 + 9);
    let report = cluster.scrub_all();
    assert_eq!((report.found, report.repaired), (2, 2), "{report:?}");
    assert_eq!(cluster.scrub_all().found, 0);
    cluster.check_replicas(false);
}

/// Content of a former life, with a checksum that matches it.
#[test]
fn rot_under_a_valid_checksum_is_found_by_the_majority() {
    let mut cluster = written(1);
    cluster.nodes[ROTTING].scribble();
    let report = cluster.scrub_all();
    assert_eq!((report.found, report.repaired, report.undecided), (2, 2, 0), "{report:?}");
    assert_eq!(cluster.scrub_all().found, 0);
    cluster.read_everything();
    cluster.settle();
}

/// The slots of a shard's metadata rot while they are not in memory: the store knows nothing of the shard.
#[test]
fn lost_metadata_is_given_back_by_the_others() {
    let mut cluster = written(2);
    let shard_bytes = 1 << 20;
    for slot in 0..2 {
        cluster.nodes[ROTTING].rot(0, shard_bytes + slot * 8192 + 20);
    }
    cluster.nodes[ROTTING].run().store.forget_metadata();
    let report = cluster.scrub_all();
    assert_eq!((report.found, report.repaired), (256, 256), "{report:?}");
    assert!(cluster.policy.record.in_sync.has(ROTTING as NodeIndex));
    cluster.check_replicas(false);
}
