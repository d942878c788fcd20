//! Levelling on demand and in the background, each the story of a mistake that one of its rules closes.

use super::cluster::{Cluster, Faults, NODES};
use crate::replica::NodeMask;
use crate::rules::{Rule, break_rules};
use crate::store::simulated::Seeded;
use crate::wire::kind;
use std::panic::catch_unwind;

fn serving(faults: Faults) -> Cluster {
    let mut cluster = Cluster::new(7, faults);
    cluster.settle();
    cluster.write(0, 32);
    cluster.flush();
    cluster.settle();
    cluster
}

/// All that is on its way to and from the nodes arrives.
fn exchange(cluster: &mut Cluster) {
    for _ in 0..50 {
        (0..NODES).for_each(|node| {
            cluster.deliver_request(node);
            cluster.nodes[node].sync();
            cluster.deliver_answer(node);
        });
    }
}

fn steps_until(cluster: &mut Cluster, what: &str, holds: impl Fn(&Cluster) -> bool) {
    for _ in 0..20_000 {
        if holds(cluster) {
            return;
        }
        (0..NODES).for_each(|node| cluster.connect(node));
        cluster.step(false);
    }
    panic!("never: {what}: {:?}", cluster.policy);
}

fn equal_everywhere(mut cluster: Cluster) {
    cluster.settle();
    assert!(cluster.io.level_state().is_none(), "all is level in the end");
    for _ in 0..NODES {
        cluster.read_everything();
    }
    cluster.settle();
    cluster.check_replicas(false);
}

/// A write that its dead holder had sent to one node only was copied over a newer one of the next holder,
/// which had not waited for the shard to be level.
#[test]
fn write_to_a_shard_that_is_not_level_comes_after_its_copies() {
    for seed in 1..60 {
        let mut cluster = serving(Faults::Kills);
        cluster.random = Seeded::new(seed);
        for region in 0..4 {
            cluster.write(32 * region, 32);
        }
        (0..20).for_each(|_| cluster.deliver_request(0));
        cluster.restart_gateway();
        steps_until(&mut cluster, "it opens", |c| c.io.is_running());
        (0..seed % 7).for_each(|_| cluster.step(false));
        for region in 0..4 {
            cluster.write(32 * region, 8);
            cluster.read(32 * region, 32);
        }
        equal_everywhere(cluster);
    }
}

/// The image serves while most of what is dirty is not compared yet.
#[test]
fn image_is_open_before_its_shards_are_level() {
    let mut cluster = serving(Faults::Kills);
    (0..4).for_each(|region| cluster.write(32 * region, 32));
    (0..20).for_each(|_| cluster.deliver_request(0));
    cluster.restart_gateway();
    steps_until(&mut cluster, "it opens", |c| c.io.is_running());
    let left = cluster.io.level_state().map_or(0, |state| state.shards_left);
    assert!(left > 0, "it opens before everything is compared");
    equal_everywhere(cluster);
}

/// A node lost what was answered and not flushed. A flush was answered while it still lacked that; when the
/// others were lost it was believed.
#[test]
fn flush_waits_until_who_came_back_is_level() {
    let mut cluster = serving(Faults::PowerCuts);
    cluster.write(0, 32);
    exchange(&mut cluster);
    assert_eq!(cluster.io.requests_in_flight(), 0, "answered, and not flushed");
    cluster.restart_node(2, true);
    steps_until(&mut cluster, "it is up again", |c| c.io.replica_states()[2].1 == "levelling");
    cluster.flush();
    let before = cluster.io.requests_in_flight();
    while cluster.intercept(kind::SUMMARY).is_some() {}
    exchange(&mut cluster);
    assert!(before > 0 && cluster.io.requests_in_flight() > 0, "answered too early");
    cluster.cut(2);
    equal_everywhere(cluster);
}

/// Nodes and gateway are lost again and again while shards are made level.
#[test]
fn levelling_that_is_interrupted_leaves_nothing_behind() {
    for seed in 1..40 {
        let mut cluster = serving(Faults::Kills);
        cluster.random = Seeded::new(seed);
        (0..4).for_each(|region| cluster.write(32 * region, 32));
        (0..20).for_each(|_| cluster.deliver_request((seed % 3) as usize));
        for round in 0..4 {
            cluster.restart_gateway();
            steps_until(&mut cluster, "it opens", |c| c.io.is_running());
            (0..seed % 11).for_each(|_| cluster.step(false));
            cluster.restart_node(((seed + round) % 3) as usize, false);
            cluster.write(32 * (round % 4) as usize + 4, 8);
            (0..seed % 23).for_each(|_| cluster.step(false));
        }
        equal_everywhere(cluster);
    }
}

/// A rotten block was repaired from the only other node that was there, which had lost an answered write.
#[test]
fn rot_is_not_repaired_from_a_node_that_is_not_level() {
    let mut cluster = Cluster::roomy(7, Faults::GuardedPowerCuts);
    cluster.settle();
    cluster.write(0, 16);
    cluster.flush();
    cluster.settle();
    cluster.write(0, 16);
    exchange(&mut cluster);
    assert_eq!(cluster.io.requests_in_flight(), 0, "answered, and not flushed");
    cluster.restart_node(2, true);
    steps_until(&mut cluster, "it is up again", |c| c.io.replica_states()[2].1 == "levelling");
    cluster.nodes[0].checkpoint_all();
    cluster.nodes[0].rot(0, 254 * 4096 + 7);
    cluster.cut(1);
    while cluster.intercept(kind::SUMMARY).is_some() {}
    cluster.read(0, 16);
    exchange(&mut cluster);
    let rot = cluster.io.rot_state();
    assert_eq!((rot.found, rot.repaired, rot.waiting), (1, 0, 1), "it waits");
}

/// A block was rotten on the node that stayed, and older on one that had lost its memory, where it was marked
/// bad. The third one, which was away, had it: it stayed unreadable although that one came back.
#[test]
fn block_that_is_bad_on_all_present_is_repaired_from_who_was_away() {
    for how in ["resumes", "was killed", "was left behind"] {
        let mut cluster = Cluster::roomy(7, Faults::Rot);
        cluster.settle();
        cluster.write(0, 16);
        cluster.flush();
        cluster.settle();
        cluster.write(0, 16);
        exchange(&mut cluster);
        assert_eq!(cluster.io.requests_in_flight(), 0, "answered, and not flushed");
        cluster.policy.rots = NodeMask(0b11);
        cluster.policy.may_give_up = how == "was left behind";
        cluster.cut(2);
        cluster.nodes[0].checkpoint_all();
        cluster.nodes[0].rot(0, 254 * 4096 + 7);
        cluster.restart_node(1, true);
        if how == "was left behind" {
            cluster.write(64, 8);
        }
        let (mut marked, mut level) = (0, false);
        for _ in 0..20_000 {
            (0..2).for_each(|node| cluster.connect(node));
            cluster.step(false);
            level = cluster.io.level_state().is_none() && cluster.io.requests_in_flight() == 0;
            marked = marked.max(cluster.io.level_state().map_or(0, |state| state.bad_blocks));
            if marked > 0 && level {
                break;
            }
        }
        assert_eq!((marked, level), (1, true), "{how}");
        let left_behind = cluster.policy.record.in_sync == NodeMask(0b11);
        assert_eq!(left_behind, how == "was left behind");
        if how == "was killed" {
            cluster.restart_node(2, false);
        }
        cluster.settle();
        cluster.read_everything();
        cluster.settle();
        cluster.scrub_all();
        assert!(cluster.io.rot_state().unrepairable.is_empty(), "{how}");
        cluster.check_replicas(false);
    }
}

/// An image that is closed before all is level keeps what is dirty, and its end is not clean.
#[test]
fn close_amid_levelling_leaves_it_to_the_next_holder() {
    for seed in 1..30 {
        let mut cluster = serving(Faults::Kills);
        cluster.random = Seeded::new(seed);
        (0..4).for_each(|region| cluster.write(32 * region, 32));
        (0..20).for_each(|_| cluster.deliver_request((seed % 3) as usize));
        cluster.restart_gateway();
        steps_until(&mut cluster, "it opens", |c| c.io.is_running());
        (0..seed % 9).for_each(|_| cluster.step(false));
        let left = cluster.io.level_state().map_or(0, |state| state.shards_left);
        assert!(left > 0, "there is something left to level");
        cluster.write(4, 8);
        cluster.io.close();
        cluster.step(false);
        steps_until(&mut cluster, "it closes", |c| c.closed.is_some());
        let level = cluster.io.level_state().is_none();
        assert!(level || cluster.closed == Some(false), "not level, and called clean");
        cluster.restart_gateway();
        equal_everywhere(cluster);
    }
}

/// The stories above, each told with its rule broken.
#[test]
fn broken_rules_of_levelling_are_noticed_by_their_stories() {
    let notices = |defect, story: fn()| {
        break_rules(&[defect]);
        let noticed = catch_unwind(story).is_err();
        break_rules(&[]);
        assert!(noticed, "{defect:?} may be planted unnoticed");
    };
    notices(Rule::LevelBeforeRequests, write_to_a_shard_that_is_not_level_comes_after_its_copies);
    notices(Rule::FlushWaitsForLevel, flush_waits_until_who_came_back_is_level);
}
