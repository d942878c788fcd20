//! Layers that a record does not name any more: what was in them goes, and does not come back.

use super::rig::*;
use crate::geometry::{BLOCK_BYTES, LayerId};
use crate::rules::{Rule, break_rules};
use crate::store::simulated::Crash;
use crate::store::{StoreError, WrittenCursor};

/// Layers 1 and 2 in files and 3 in the log only, each with a byte of its own in block 0 and its number's block.
fn three_layers() -> Rig {
    let mut rig = Rig::new();
    rig.write_layers(&[1], 0, 0, &[1; 2 * BLOCK]).expect("a write");
    for layers in [&[2, 1][..], &[3, 2, 1]] {
        rig.layers(layers).expect("a snapshot");
        rig.sync();
        rig.checkpoint();
        let own = layers[0] * BLOCK_BYTES;
        for shard in 0..2 {
            rig.write_layers(layers, shard, 0, &[layers[0] as u8; BLOCK]).expect("a write");
            rig.write_layers(layers, shard, own, &[layers[0] as u8; BLOCK]).expect("a write");
        }
    }
    rig.sync();
    rig
}

fn held(rig: &Rig) -> Vec<LayerId> {
    rig.store.layers_held(&IMAGE).expect("a folder")
}

/// The first byte of each of five blocks of shard 0.
fn bytes(rig: &mut Rig, layers: &[LayerId]) -> Vec<u8> {
    let (states, data) = rig.read_layers(layers, 0, 0, 5).expect("a read");
    flatten(&states, &data).chunks(BLOCK).map(|block| block[0]).collect()
}

fn written_above(rig: &mut Rig, layers: &[LayerId], generation: u64) -> Vec<u64> {
    let (mut at, mut shards) = (Some(WrittenCursor::default()), Vec::new());
    while let Some(from) = at {
        let page = rig.store.written_above(&IMAGE, layers, generation, from).expect("a page");
        shards.extend(page.shards);
        at = page.next;
    }
    shards.dedup();
    shards
}

#[test]
fn a_rollback_shows_the_snapshot_and_frees_the_space_of_what_was_above_it() {
    let mut rig = three_layers();
    rig.checkpoint();
    let used = |rig: &Rig| {
        let files = rig.store.usage_handle().physical_bytes(&IMAGE).expect("a folder");
        files + rig.store.log_resident_bytes(&IMAGE)
    };
    let before = used(&rig);
    assert_eq!(bytes(&mut rig, &[3, 2, 1]), [3, 1, 2, 3, 0]);
    rig.layers(&[4, 1]).expect("a rollback");
    for round in 0..3 {
        assert_eq!(bytes(&mut rig, &[4, 1]), [1, 1, 0, 0, 0], "{round}");
        rig.sync();
        rig.checkpoint();
        assert_eq!(held(&rig).iter().filter(|layer| ![4, 1].contains(*layer)).count(), 0);
        rig = rig.power_cut(round).0;
    }
    assert!(used(&rig) * 2 < before, "{} of {before}", used(&rig));
    rig.write_layers(&[4, 1], 0, BLOCK_BYTES, &[4; BLOCK]).expect("the guest goes on");
    assert_eq!(bytes(&mut rig, &[4, 1]), [1, 4, 0, 0, 0]);
    assert!(!rig.store.wants_checkpoint(), "nothing is left to do");
}

#[test]
fn a_crash_at_any_step_leaves_the_old_chain_or_the_new_one() {
    let mut seen = [0, 0];
    for step in 0.. {
        let mut rig = three_layers();
        let crash = if step % 2 == 0 { Crash::PowerCut } else { Crash::Kill };
        rig.disk.crash_at(rig.disk.steps() + step / 2, crash);
        let dropped = rig.layers(&[4, 1]).and_then(|_| {
            while let Some(job) = rig.store.begin_checkpoint(true)? {
                rig.store.finish_checkpoint(job.run())?;
                if !rig.store.wants_checkpoint() {
                    break;
                }
            }
            Ok(())
        });
        let finished = dropped.is_ok() && !rig.disk.has_crashed();
        let (mut rig, recovery) = match crash {
            Crash::Kill => rig.restart(),
            Crash::PowerCut => rig.power_cut(step),
        };
        assert!(!recovery.damaged, "step {step}");
        let chain = rig.store.image(&IMAGE).expect("its record").chain.clone();
        for _ in 0..2 {
            match chain.layers() {
                [3, 2, 1] => {
                    assert_eq!(bytes(&mut rig, &[3, 2, 1]), [3, 1, 2, 3, 0], "step {step}")
                }
                [4, 1] => assert_eq!(bytes(&mut rig, &[4, 1]), [1, 1, 0, 0, 0], "step {step}"),
                other => panic!("step {step}: {other:?}"),
            }
            rig.checkpoint();
            rig.checkpoint_if_due();
        }
        seen[usize::from(chain.layers()[0] == 4)] += 1;
        assert!(held(&rig).iter().all(|layer| chain.has(*layer)), "step {step}: {:?}", held(&rig));
        if finished {
            break;
        }
    }
    assert!(seen[0] > 1 && seen[1] > 20, "{seen:?}");
}

/// The job had been told to write files of the layer before the record came that drops it.
#[test]
fn a_checkpoint_under_way_brings_nothing_back() {
    for cut in [false, true] {
        let mut rig = three_layers();
        let job = rig.store.begin_checkpoint(true).expect("begins").expect("there is something");
        rig.layers(&[4, 1]).expect("a rollback");
        rig.store.append().expect("in the log");
        let done = job.run();
        assert!(held(&rig).contains(&3), "it was written");
        if cut {
            drop(done);
            rig = rig.restart().0;
        } else {
            rig.store.finish_checkpoint(done).expect("a checkpoint");
        }
        rig.checkpoint();
        rig.checkpoint_if_due();
        assert_eq!(held(&rig).iter().find(|layer| ![4, 1].contains(*layer)), None);
        assert_eq!(bytes(&mut rig, &[4, 1]), [1, 1, 0, 0, 0]);
    }
}

#[test]
fn a_dropped_layer_that_stays_is_noticed() {
    let mut rig = three_layers();
    break_rules(&[Rule::DroppedLayersGo]);
    rig.layers(&[4, 1]).expect("a rollback");
    rig.checkpoint();
    break_rules(&[]);
    assert!(held(&rig).contains(&3));
}

#[test]
fn large_layers_go_in_steps_also_over_a_crash() {
    let mut rig = Rig::new();
    rig.layers(&[2, 1]).expect("a snapshot");
    for shard in 0..600 {
        while rig.write_layers(&[2, 1], shard, 0, &[2; BLOCK]) == Err(StoreError::LogFull) {
            rig.checkpoint();
        }
        let tag = rig.stamp.tag();
        if shard % 50 == 0 {
            rig.sync();
            rig.store.clear(IMAGE, tag, &[]).expect("a clear");
        }
    }
    rig.sync();
    rig.checkpoint();
    let files = |rig: &Rig| {
        let folder = format!("images/{IMAGE}/2/");
        rig.disk.paths().iter().filter(|path| path.starts_with(&folder)).count()
    };
    assert_eq!(files(&rig), 600);
    rig.layers(&[3, 1]).expect("a rollback");
    rig.sync();
    rig.checkpoint_if_due();
    assert!((200..400).contains(&files(&rig)), "{} files", files(&rig));
    let mut rig = rig.power_cut(1).0;
    let mut steps = 0;
    while rig.store.wants_checkpoint() {
        rig.checkpoint_if_due();
        steps += 1;
    }
    assert!((2..10).contains(&steps) && files(&rig) == 0, "{steps} steps, {} files", files(&rig));
}

/// The store failed over a folder that it could not remove, and at each start again.
#[test]
fn what_cannot_be_removed_is_left_and_stops_nothing() {
    let mut rig = three_layers();
    rig.checkpoint();
    let folder = format!("images/{IMAGE}/3");
    let disk = rig.disk.run();
    disk.create_dir(&format!("{folder}/stranger")).expect("a folder");
    disk.create_dir(&format!("{folder}/stranger/deeper")).expect("a folder");
    rig.layers(&[4, 1]).expect("a rollback");
    for round in 0..2 {
        rig.sync();
        rig.checkpoint();
        rig.checkpoint_if_due();
        assert!(!rig.store.wants_checkpoint(), "nothing is tried again and again");
        assert_eq!(bytes(&mut rig, &[4, 1]), [1, 1, 0, 0, 0]);
        rig = rig.power_cut(round).0;
    }
    assert!(!held(&rig).contains(&2), "others go");
}

#[test]
fn a_layer_is_not_named_again_while_its_files_are_removed() {
    let mut rig = three_layers();
    rig.layers(&[4, 1]).expect("a rollback");
    let again = rig.layers(&[4, 3, 1]);
    assert!(matches!(again, Err(StoreError::RecordConflict { .. })), "{again:?}");
}

/// A node was left behind by a write to a layer that stays; what named the shard since was a write to a layer
/// that goes.
#[test]
fn what_a_stale_node_has_missed_in_layers_that_stay_is_still_told() {
    for checkpointed in [false, true] {
        let mut rig = Rig::new();
        rig.fill(0, 0, 1, 1);
        // A node is left behind by that write.
        rig.store.put_record(IMAGE, record(head(1, 2))).expect("a record");
        rig.stamp.generation = 2;
        rig.layers(&[2, 1]).expect("a snapshot");
        rig.write_layers(&[2, 1], 0, 0, &[2; BLOCK]).expect("a write");
        rig.write_layers(&[2, 1], 1, 0, &[2; BLOCK]).expect("a write");
        rig.layers(&[3, 1]).expect("a rollback");
        for _ in 0..3 {
            assert!(written_above(&mut rig, &[3, 1], 1).contains(&0), "{checkpointed}");
            rig.sync();
            if checkpointed {
                rig.checkpoint();
            }
            let tag = rig.stamp.tag();
            rig.store.mark_level(IMAGE, &[0, 1]).expect("level");
            rig.store.clear(IMAGE, tag, &[]).expect("a clear");
            assert_eq!(rig.dirty(), []);
        }
        assert_eq!(written_above(&mut rig, &[3, 1], 1), [0], "shard 1 has nothing that stays");
        rig = rig.power_cut(3).0;
        assert_eq!(written_above(&mut rig, &[3, 1], 1), [0]);
        assert_eq!(written_above(&mut rig, &[3, 1], 4), []);
    }
}
