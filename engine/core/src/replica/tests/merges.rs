//! Snapshots that are removed: their layers go into those above them, on each node by itself.

use super::cluster::{Cluster, Faults, NODES};
use crate::geometry::LayerId;
use crate::rules::{Rule, break_rules};

/// A cluster with snapshots of layers 1 and 2, and other content over them in 3.
fn with_snapshots(seed: u64) -> Cluster {
    let mut cluster = Cluster::new(seed, Faults::Kills);
    cluster.settle();
    for top in 1..=3 {
        while cluster.policy.record.top < top {
            cluster.snapshot();
            cluster.settle();
        }
        cluster.write(top as usize * 3, 20 - 4 * top as usize);
        cluster.zero(8 + top as usize, 3);
        cluster.flush();
        cluster.settle();
    }
    cluster
}

impl Cluster {
    pub fn remove(&mut self, layer: LayerId) {
        while !self.policy.record.merging().contains(&layer) {
            self.remove_snapshot(layer);
            (0..500).for_each(|_| self.step(false));
        }
    }

    /// Until the record has no layer that is merged any more.
    pub fn take_all_out(&mut self) {
        for _ in 0..400 {
            if self.policy.record.merging == 0 {
                return;
            }
            self.take_out();
            (0..500).for_each(|_| self.step(false));
            self.settle();
        }
        panic!("never empty on all nodes: {:?}", self.policy.emptied);
    }

    /// Every node holds what remains as it was, and nothing of what was removed.
    pub fn check_removed(&mut self) {
        self.settle();
        self.check_replicas(false);
        let layers = self.policy.record.layers();
        for node in 0..NODES {
            assert_eq!(self.left_behind(node, &layers), None, "node {node}");
        }
    }
}

#[test]
fn a_removed_snapshot_leaves_all_nodes_and_the_others_hold_what_they_held() {
    for seed in 1..=12 {
        let mut cluster = with_snapshots(seed);
        let removed = [&[1][..], &[2], &[2, 1], &[1, 2]][seed as usize % 4];
        let before = cluster.content_of(0, &cluster.policy.record.layers());
        removed.iter().for_each(|layer| cluster.remove(*layer));
        if seed % 3 == 0 {
            cluster.restart_node(seed as usize % NODES, seed % 2 == 0);
            cluster.restart_gateway_with(true);
            cluster.settle();
        }
        cluster.take_all_out();
        assert_eq!(cluster.policy.record.layers().len(), 3 - removed.len());
        cluster.check_removed();
        let after = cluster.content_of(0, &cluster.policy.record.layers());
        assert!(before == after, "seed {seed}");
    }
}

/// It missed writes, the removal, and writes after that; the layer stays in the record until it has merged it.
#[test]
fn a_node_that_was_away_merges_what_it_missed() {
    for seed in 1..=8 {
        let mut cluster = with_snapshots(seed);
        cluster.restart_node(2, seed % 2 == 0);
        cluster.write(9, 9);
        while cluster.policy.record.in_sync.has(2) {
            cluster.step_without(2);
        }
        while cluster.policy.record.merging().is_empty() {
            cluster.remove_snapshot(2);
            (0..500).for_each(|_| cluster.step_without(2));
        }
        cluster.write(14, 9);
        for _ in 0..20 {
            cluster.take_out();
            (0..400).for_each(|_| cluster.step_without(2));
        }
        assert_eq!(cluster.policy.record.merging(), [2], "not before it has said so");
        cluster.settle();
        cluster.take_all_out();
        cluster.check_removed();
        assert_eq!(cluster.policy.record.layers(), [3, 1]);
    }
}

/// One node has merged everything, the others nothing yet.
fn compared_at_different_points(rules: &[Rule]) -> u64 {
    let mut cluster = with_snapshots(5);
    cluster.policy.rots.0 = (1 << NODES) - 1;
    cluster.merges = false;
    cluster.remove(2);
    cluster.settle();
    for _ in 0..200 {
        cluster.nodes[1].merge();
        cluster.nodes[1].checkpoint();
    }
    break_rules(rules);
    let found = cluster.scrub_all().found;
    break_rules(&[]);
    found
}

#[test]
fn nodes_at_different_points_of_a_merge_compare_equal() {
    assert_eq!(compared_at_different_points(&[]), 0);
    let found = compared_at_different_points(&[Rule::MergedBeforeCompared]);
    assert!(found > 0, "shards that are compared as they are differ");
}

#[test]
fn a_node_is_healed_by_one_that_has_merged_more_or_less() {
    for seed in 1..=8 {
        let mut cluster = with_snapshots(seed);
        cluster.restart_node(2, true);
        cluster.write(3, 25);
        while cluster.policy.record.in_sync.has(2) {
            cluster.step_without(2);
        }
        cluster.merges = false;
        while cluster.policy.record.merging().is_empty() {
            cluster.remove_snapshot(2);
            (0..500).for_each(|_| cluster.step_without(2));
        }
        if seed % 2 == 0 {
            (0..200).for_each(|_| cluster.nodes[0].merge());
        }
        if seed % 3 == 0 {
            cluster.replace_disk(2);
        }
        cluster.settle();
        cluster.check_replicas(false);
        cluster.merges = true;
        cluster.take_all_out();
        cluster.check_removed();
    }
}
