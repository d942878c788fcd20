//! Answered writes that no memory holds any more, and what guests hear of it.

use super::cluster::{Cluster, Faults, NODES};
use crate::replica::NodeMask;

/// A cluster in which some writes are answered and not flushed.
fn unflushed() -> Cluster {
    let mut cluster = Cluster::new(7, Faults::PowerCuts);
    cluster.settle();
    cluster.write(0, 32);
    cluster.flush();
    cluster.settle();
    (0..4).for_each(|region| cluster.zero(32 * region, 16));
    for _ in 0..50 {
        (0..NODES).for_each(|node| {
            cluster.deliver_request(node);
            cluster.deliver_answer(node);
        });
    }
    assert_eq!(cluster.io.requests_in_flight(), 0, "all is answered");
    cluster
}

fn told_by_next_flush(cluster: &mut Cluster) -> u64 {
    let before = cluster.losses_told;
    cluster.flush();
    cluster.settle();
    cluster.losses_told - before
}

/// All nodes lost their power under a living guest. Its next fsync succeeded, and what it was for was gone.
#[test]
fn flush_fails_once_where_all_have_lost_their_power() {
    let mut cluster = unflushed();
    (0..NODES).for_each(|node| cluster.restart_node(node, true));
    cluster.settle();
    // What the gateway flushes by itself tells the guest nothing.
    (0..40).for_each(|_| cluster.tick());
    cluster.settle();
    assert_eq!(told_by_next_flush(&mut cluster), 1);
    assert_eq!(told_by_next_flush(&mut cluster), 0);
    cluster.zero(0, 8);
    cluster.settle();
    assert_eq!(told_by_next_flush(&mut cluster), 0);
    cluster.check_replicas(false);
}

#[test]
fn flushes_that_were_asked_together_all_fail() {
    let mut cluster = unflushed();
    cluster.flush();
    cluster.flush();
    (0..NODES).for_each(|node| cluster.restart_node(node, true));
    cluster.settle();
    assert_eq!(cluster.losses_told, 2);
    assert_eq!(told_by_next_flush(&mut cluster), 0);
}

#[test]
fn killed_processes_and_a_node_that_stays_remember() {
    for stays in 0..NODES {
        let mut cluster = unflushed();
        (0..NODES).for_each(|node| cluster.restart_node(node, node != stays));
        cluster.settle();
        assert_eq!(told_by_next_flush(&mut cluster), 0);
        cluster.check_replicas(false);
    }
}

#[test]
fn power_cuts_of_one_node_after_the_other_lose_nothing_that_was_made_level_between() {
    let mut cluster = unflushed();
    for node in 0..NODES {
        cluster.restart_node(node, true);
        cluster.settle();
    }
    assert_eq!(told_by_next_flush(&mut cluster), 0);
    cluster.check_replicas(false);
}

/// The only node that remembers is gone for good, and left behind.
#[test]
fn loss_is_told_when_who_remembers_is_left_behind() {
    let mut cluster = unflushed();
    cluster.cut(2);
    (0..2).for_each(|node| cluster.restart_node(node, true));
    cluster.flush();
    cluster.policy.leaves_behind(NodeMask::one(2), &mut cluster.io);
    cluster.settle();
    assert_eq!(cluster.losses_told, 1);
    assert_eq!(told_by_next_flush(&mut cluster), 0);
    cluster.check_replicas(false);
}

#[test]
fn what_is_flushed_is_not_lost_with_power() {
    let mut cluster = unflushed();
    assert_eq!(told_by_next_flush(&mut cluster), 0);
    (0..NODES).for_each(|node| cluster.restart_node(node, true));
    cluster.settle();
    assert_eq!(told_by_next_flush(&mut cluster), 0);
}

/// The holder before died with its nodes' power; policy knows that its clients live on.
#[test]
fn loss_under_the_holder_before_is_told_too() {
    let mut cluster = unflushed();
    cluster.restart_gateway();
    cluster.settle();
    cluster.io.former_writes_lost(&[0]);
    assert_eq!(told_by_next_flush(&mut cluster), 1);
    assert_eq!(told_by_next_flush(&mut cluster), 0);
}
