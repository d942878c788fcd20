//! Heals, each the story of a mistake that one of its rules closes.

use super::cluster::{Cluster, Faults, NODES};
use super::policy::Policy;
use crate::rules::{Rule, break_rules};
use crate::store::simulated::Seeded;
use std::panic::catch_unwind;

/// All that is on its way to and from these nodes arrives; nobody hears of events.
fn exchange(cluster: &mut Cluster, nodes: &[usize]) {
    for _ in 0..50 {
        for node in nodes {
            cluster.deliver_request(*node);
            cluster.nodes[*node].sync();
            cluster.deliver_answer(*node);
        }
    }
}

fn steps_until(cluster: &mut Cluster, what: &str, holds: impl Fn(&Cluster) -> bool) {
    for _ in 0..20_000 {
        if holds(cluster) {
            return;
        }
        cluster.step(false);
    }
    panic!("never: {what}: {:?}", cluster.policy);
}

fn serving(faults: Faults) -> Cluster {
    let mut cluster = Cluster::new(7, faults);
    cluster.settle();
    cluster.write(0, 32);
    cluster.flush();
    cluster.settle();
    cluster
}

/// node3 is left behind, and `miss` happens without it.
fn with_a_stale_node(faults: Faults, miss: impl Fn(&mut Cluster)) -> Cluster {
    let mut cluster = serving(faults);
    cluster.restart_node(2, false);
    miss(&mut cluster);
    steps_until(&mut cluster, "node3 is stale", |c| !c.policy.record.in_sync.has(2));
    cluster
}

fn takes_in_node3(policy: &Policy) -> bool {
    policy.proposal.is_some_and(|proposal| proposal.in_sync.has(2))
}

fn equal_everywhere(mut cluster: Cluster) {
    cluster.settle();
    assert_eq!(cluster.policy.record.in_sync.0, (1 << NODES) - 1);
    cluster.check_replicas(false);
    for _ in 0..NODES {
        cluster.read_everything();
    }
    cluster.settle();
}

#[test]
fn node_that_was_left_behind_gets_what_it_missed() {
    equal_everywhere(with_a_stale_node(Faults::Kills, |cluster| cluster.write(3, 9)));
}

/// A node came back with an empty disk, and with one on which is what nobody ever had.
#[test]
fn node_with_another_disk_is_healed_whole() {
    let mut cluster = with_a_stale_node(Faults::Kills, |cluster| cluster.write(3, 9));
    cluster.replace_disk(2);
    cluster.policy.record.since[2] = 0;
    equal_everywhere(cluster);
    let mut cluster = with_a_stale_node(Faults::Kills, |cluster| cluster.write(3, 9));
    cluster.nodes[2].scribble();
    cluster.policy.record.since[2] = 0;
    equal_everywhere(cluster);
}

/// The shards came back with the node.
#[test]
fn shard_that_was_discarded_while_a_node_was_away_does_not_come_back_with_it() {
    let mut cluster = with_a_stale_node(Faults::Kills, |cluster| {
        cluster.zero(0, 32);
        cluster.flush();
    });
    // Nothing of the discard is dirty any more; only generations tell of it.
    (0..200).for_each(|_| cluster.step(false));
    cluster.nodes.iter_mut().take(2).for_each(|node| node.checkpoint());
    equal_everywhere(cluster);
}

/// The write was on the others under the old generation, and missing on the list.
#[test]
fn write_in_flight_when_a_node_is_left_behind_is_on_its_list() {
    let mut cluster = serving(Faults::Kills);
    cluster.cut(2);
    cluster.write(5, 3);
    exchange(&mut cluster, &[0, 1]);
    steps_until(&mut cluster, "node3 is stale", |c| !c.policy.record.in_sync.has(2));
    equal_everywhere(cluster);
}

/// The record took the node in while a write that it lacks was answered.
#[test]
fn no_write_is_answered_that_a_healed_node_lacks_until_its_membership_is_known() {
    let mut cluster = with_a_stale_node(Faults::Kills, |cluster| cluster.write(3, 9));
    (0..NODES).for_each(|node| cluster.connect(node));
    steps_until(&mut cluster, "the heal ends", |c| takes_in_node3(&c.policy));
    exchange(&mut cluster, &[0, 1, 2]);
    cluster.cut(2);
    cluster.write(0, 4);
    exchange(&mut cluster, &[0, 1]);
    assert_eq!(cluster.io.requests_in_flight(), 1, "answered, and node3 may be in sync");
    cluster.take_proposal();
    exchange(&mut cluster, &[0, 1]);
    assert_eq!(cluster.io.requests_in_flight(), 1, "answered without a node in sync");
    equal_everywhere(cluster);
}

/// All sources lost their memory and agreed on something else than what the healed node had.
#[test]
fn heal_whose_sources_all_restart_trusts_nothing_of_before() {
    for (seed, settled) in (1..60).map(|seed| (seed, seed % 4 > 0)) {
        let mut cluster = with_a_stale_node(Faults::PowerCuts, |cluster| cluster.write(3, 9));
        // What a power cut leaves of what was not synced is a matter of chance.
        cluster.random = Seeded::new(seed);
        (0..NODES).for_each(|node| cluster.connect(node));
        steps_until(&mut cluster, "a heal", |c| {
            let state = c.io.heal_state();
            let stages: &[&str] = if settled { &["settled"] } else { &["copying", "flushing"] };
            state.is_some_and(|heal| stages.contains(&heal.stage.as_str()))
        });
        // On all three, answered where node3 is level, and flushed by none.
        (0..3).for_each(|region| cluster.write(32 * region + 12, 8));
        for _ in 0..50 {
            (0..NODES).for_each(|node| cluster.deliver_request(node));
            (0..NODES).for_each(|node| cluster.deliver_answer(node));
        }
        cluster.restart_node(0, true);
        cluster.restart_node(1, true);
        equal_everywhere(cluster);
    }
}

/// A node had answered a write in flight and lost it with its memory; it was levelled with one that did
/// not have it yet, and was not asked again.
#[test]
fn change_that_a_lost_instance_had_answered_is_asked_of_the_next() {
    for seed in 1..10 {
        let mut cluster = serving(Faults::PowerCuts);
        cluster.random = Seeded::new(seed);
        cluster.write(0, 4);
        cluster.deliver_request(0);
        cluster.deliver_answer(0);
        (0..NODES).for_each(|node| cluster.restart_node(node, true));
        equal_everywhere(cluster);
    }
}

/// A connection that breaks during a heal leaves frames on their way.
#[test]
fn late_copies_of_a_former_heal_land_on_nothing_newer() {
    for moment in 1..120 {
        let mut cluster = with_a_stale_node(Faults::Kills, |cluster| cluster.write(3, 9));
        (0..NODES).for_each(|node| cluster.connect(node));
        steps_until(&mut cluster, "a heal", |c| c.io.heal_state().is_some());
        for _ in 0..moment {
            cluster.step(false);
        }
        cluster.cut(2);
        cluster.write(3, 5);
        cluster.connect(2);
        equal_everywhere(cluster);
    }
}

/// The stories above, each told with its rule broken.
#[test]
fn broken_rules_of_heal_are_noticed_by_their_stories() {
    let notices = |defect, story: fn()| {
        let told = |story: fn()| catch_unwind(story).is_err();
        break_rules(&[defect]);
        let noticed = told(story);
        break_rules(&[]);
        assert!(noticed, "{defect:?} may be planted unnoticed");
    };
    let outcome = no_write_is_answered_that_a_healed_node_lacks_until_its_membership_is_known;
    notices(Rule::HealedNodeAnswers, outcome);
    notices(Rule::LostHealedIsAwaited, outcome);
    notices(Rule::HealNeedsItsSources, heal_whose_sources_all_restart_trusts_nothing_of_before);
    notices(
        Rule::UnansweredAskedAgain,
        change_that_a_lost_instance_had_answered_is_asked_of_the_next,
    );
}
