//! An image goes back to a snapshot: what was written since goes from all its nodes, those that were away too.

use super::cluster::{Cluster, Faults, IMAGE, NODES};
use crate::geometry::LayerId;
use crate::rules::{Rule, break_rules};

/// A cluster with content in layer 1, which is frozen, and other content over it in 2.
fn with_a_snapshot(seed: u64) -> Cluster {
    let mut cluster = Cluster::new(seed, Faults::Kills);
    cluster.settle();
    cluster.write(0, 32);
    cluster.flush();
    cluster.settle();
    while cluster.policy.record.top == 1 {
        cluster.snapshot();
        cluster.settle();
    }
    cluster.write(5, 20);
    cluster.zero(0, 4);
    cluster.flush();
    cluster.settle();
    cluster
}

impl Cluster {
    /// Back to the snapshot of layer 1; one node may be away.
    pub fn roll_back(&mut self, away: Option<usize>) {
        let before = self.policy.record.top;
        while self.policy.record.top == before {
            self.policy.roll_back = Some(1);
            self.snapshot();
            (0..3000).for_each(|_| match away {
                Some(node) => self.step_without(node),
                None => self.step(false),
            });
        }
    }

    /// Every node shows what the snapshot held, and has nothing of any layer that was dropped.
    fn check_rolled_back(&mut self) {
        self.settle();
        assert_eq!(self.policy.record.in_sync.0, (1 << NODES) - 1);
        self.check_replicas(false);
        let layers = self.policy.record.layers();
        for node in 0..NODES {
            let shown = self.content_of(node as u8, &layers);
            assert!(shown == self.frozen[&1], "node {node} shows something else than the snapshot");
            assert_eq!(self.left_behind(node, &layers), None, "node {node}");
        }
    }

    /// A layer of which the node has anything though its record does not name it.
    pub fn left_behind(&mut self, node: usize, layers: &[LayerId]) -> Option<LayerId> {
        let store = &mut self.nodes[node].run().store;
        for force in [true, false, false] {
            if let Some(job) = store.begin_checkpoint(force).expect("begins") {
                store.finish_checkpoint(job.run()).expect("there is room");
            }
        }
        let held = store.layers_held(&IMAGE).expect("a folder");
        held.into_iter().find(|layer| !layers.contains(layer))
    }
}

#[test]
fn all_nodes_show_the_snapshot_and_keep_nothing_of_what_came_after() {
    for seed in 1..=8 {
        let mut cluster = with_a_snapshot(seed);
        cluster.roll_back(None);
        cluster.check_rolled_back();
        let power = seed % 2 == 0;
        cluster.restart_node(seed as usize % NODES, power);
        cluster.restart_gateway_with(true);
        cluster.check_rolled_back();
    }
}

/// It missed writes to the layer that stays, a snapshot, writes to the layer that goes, and the rollback.
#[test]
fn a_node_that_was_away_drops_the_layers_when_it_stores_the_record() {
    for seed in 1..=8 {
        let mut cluster = with_a_snapshot(seed);
        cluster.restart_node(2, seed % 2 == 0);
        cluster.write(9, 9);
        while cluster.policy.record.in_sync.has(2) {
            cluster.step_without(2);
        }
        cluster.write(16, 16);
        (0..2000).for_each(|_| cluster.step_without(2));
        cluster.roll_back(Some(2));
        assert!(!cluster.policy.record.in_sync.has(2));
        cluster.check_rolled_back();
    }
}

#[test]
fn a_node_that_keeps_a_dropped_layer_is_noticed() {
    let mut cluster = with_a_snapshot(3);
    break_rules(&[Rule::DroppedLayersGo]);
    cluster.roll_back(None);
    cluster.settle();
    let layers = cluster.policy.record.layers();
    let left = cluster.left_behind(0, &layers);
    break_rules(&[]);
    assert_eq!(left, Some(2));
}
