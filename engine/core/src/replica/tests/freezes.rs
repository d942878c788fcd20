//! Freezes for snapshots: who waits for what, and what ends them.

use super::cluster::{Cluster, Faults, NODES};
use super::scripted::TwoSets;
use crate::replica::{Event, IoError, Layering, NodeMask, Outcome, Output, Token};
use crate::rules::{Rule, break_rules};
use crate::wire::messages::{Head, Record};
use crate::wire::{Frame, REPLY, Status, kind};
use bytes::Bytes;
use std::panic::catch_unwind;

const ATTEMPT: u64 = 7;
const SECOND_NS: u64 = 1_000_000_000;

fn token(cookie: u64) -> Token {
    Token { client: 1, cookie }
}

fn opened() -> TwoSets {
    let mut sets = TwoSets::new();
    sets.open(&[]);
    sets.asked.clear();
    sets
}

impl TwoSets {
    fn write(&mut self, cookie: u64, set: u32) {
        let at = self.shard_of_set(set) * u64::from(self.io.spec().geometry.shard_bytes);
        self.io.write(token(cookie), at, Bytes::from(vec![7; 4096]), 0);
    }

    fn count(&self, kind: u8) -> usize {
        self.asked.iter().filter(|(_, frame)| frame.kind == kind).count()
    }

    fn answered(&self, cookie: u64) -> Option<&Outcome> {
        let answer = self.answers.iter().find(|(other, _)| *other == token(cookie));
        answer.map(|(_, outcome)| outcome)
    }

    /// A record with these layers, and these nodes in sync in both sets.
    fn layered(&mut self, layers: &[u32], in_sync: [u64; 2]) {
        let generation = self.io.spec().generation + 1;
        let digest = [generation as u8; 32];
        let in_sync = in_sync.map(NodeMask);
        let layering = Layering { layers: layers.to_vec(), ..Layering::default() };
        self.io.reconfigure(generation, digest, Bytes::new(), &in_sync, layering);
    }

    fn frozen(&mut self) {
        self.io.freeze(ATTEMPT);
        self.run(&[]);
        assert_eq!(self.told, [Event::Frozen { attempt: ATTEMPT }]);
    }

    /// A node answers that it has the record of now.
    fn stores_record(&mut self, node: u8) {
        let tag = self.io.spec().generation;
        let (head, payload) = (Bytes::new(), Bytes::new());
        let (channel, kind, flags) = (self.io.spec().channel, kind::RECORD | REPLY, 0);
        let frame = Frame { kind, flags, status: Status::Ok, channel, tag, head, payload };
        assert_eq!(self.io.receive(node, frame), Ok(()));
    }

    fn failed(&self) -> bool {
        matches!(self.told[..], [Event::FreezeFailed { attempt: ATTEMPT, .. }])
    }
}

const IN_SYNC: [u64; 2] = [0b0111, 0b1010];

#[test]
fn changes_wait_while_reads_go_on_and_then_go_under_the_new_layers() {
    let mut sets = opened();
    sets.frozen();
    assert_eq!(sets.count(kind::FLUSH), 4, "nothing is known to be durable of a former holder");
    sets.write(1, 0);
    sets.io.flush(token(2));
    sets.io.zero(token(3), 0, 4096, 0);
    sets.io.read(token(4), 0, 4096);
    sets.run(&[]);
    assert!(matches!(sets.answered(4), Some(Outcome::Read(_))));
    assert_eq!((sets.answers.len(), sets.count(kind::WRITE) + sets.count(kind::ZERO)), (1, 0));
    sets.layered(&[2, 1], IN_SYNC);
    assert_eq!(sets.io.queues().unanswered, 0, "none is begun before the layers are stored");
    sets.run(&[]);
    assert_eq!(sets.answers.len(), 4, "{:?}", sets.answers);
    let records = sets.asked.iter().filter(|(_, frame)| frame.kind == kind::RECORD);
    let layers = records.map(|(_, frame)| Record::take(frame.head.clone()).expect("ours").layers);
    assert_eq!(layers.collect::<Vec<_>>(), vec![vec![2, 1]; 4]);
    let first = |wanted| sets.asked.iter().position(|(_, frame)| frame.kind == wanted);
    assert!(first(kind::RECORD) < first(kind::WRITE) && first(kind::WRITE) < first(kind::ZERO));
    sets.io.thaw(ATTEMPT);
    sets.frozen_again();
}

impl TwoSets {
    fn frozen_again(&mut self) {
        self.told.clear();
        self.frozen();
        self.layered(&[5, 2, 1], IN_SYNC);
        self.run(&[]);
        assert_eq!(self.io.spec().layers, [5, 2, 1]);
    }
}

#[test]
fn clients_go_on_while_what_was_answered_before_is_synced() {
    let mut sets = opened();
    sets.io.freeze(ATTEMPT);
    sets.write(1, 0);
    sets.io.flush(token(2));
    assert_eq!((sets.holding, sets.io.queues().unanswered), (0, 1));
    sets.run(&[]);
    assert_eq!((sets.answered(1), sets.answered(2)), (Some(&Outcome::Done), Some(&Outcome::Done)));
    assert_eq!((sets.holding, &sets.told[..]), (1, &[Event::Frozen { attempt: ATTEMPT }][..]));
}

#[test]
fn what_is_in_flight_is_answered_and_flushed_before_the_image_is_frozen() {
    let mut sets = opened();
    sets.full = NodeMask::one(1);
    sets.write(1, 0);
    // It waits for the first one, and was asked before clients are held back.
    sets.write(2, 0);
    sets.io.freeze(ATTEMPT);
    sets.run_until_holding();
    sets.write(3, 0);
    sets.run(&[]);
    assert_eq!((sets.io.queues().unanswered, sets.told.len()), (1, 0));
    sets.full = NodeMask::EMPTY;
    sets.io.tick();
    sets.run(&[]);
    assert_eq!(sets.told, [Event::Frozen { attempt: ATTEMPT }]);
    assert_eq!((sets.answered(1), sets.answered(2)), (Some(&Outcome::Done), Some(&Outcome::Done)));
    let last = sets.asked.iter().rposition(|(_, frame)| frame.kind == kind::WRITE);
    let flush = sets.asked.iter().rposition(|(_, frame)| frame.kind == kind::FLUSH);
    assert!(last < flush, "a flush covers what came before it");
    sets.io.thaw(ATTEMPT + 1);
    sets.run(&[]);
    assert_eq!(sets.answered(3), None, "that was another one");
    sets.io.thaw(ATTEMPT);
    sets.run(&[]);
    assert_eq!(sets.answered(3), Some(&Outcome::Done));
    assert_eq!(sets.io.spec().layers, [1]);
}

#[test]
fn a_node_that_is_lost_before_all_is_durable_ends_the_freeze() {
    for held in [true, false] {
        let mut sets = opened();
        sets.full = NodeMask::one(0);
        sets.write(1, 0);
        sets.io.freeze(ATTEMPT);
        if held {
            sets.run_until_holding();
        }
        sets.write(2, 1);
        sets.io.link_down(2);
        sets.run(&[]);
        assert!(sets.failed(), "{:?}", sets.told);
        assert_eq!(sets.answered(2), Some(&Outcome::Done), "its set is complete");
    }
}

#[test]
fn a_freeze_needs_all_nodes_in_sync_up_and_level() {
    let mut sets = opened();
    sets.io.link_down(2);
    sets.io.freeze(ATTEMPT);
    sets.run(&[]);
    assert!(sets.failed());
    let mut sets = TwoSets::new();
    let dirty = [sets.shard_of_set(0)];
    sets.connect();
    while !sets.io.is_running() {
        sets.run_once(&dirty);
    }
    sets.io.freeze(ATTEMPT);
    assert!(sets.io.level_state().is_some());
    sets.run(&dirty);
    assert!(sets.failed(), "{:?}", sets.told);
    sets.told.clear();
    sets.frozen();
}

#[test]
fn clients_wait_two_seconds_at_most_for_nodes() {
    let mut sets = opened();
    sets.full = NodeMask::one(1);
    sets.write(1, 0);
    sets.io.freeze(ATTEMPT);
    sets.run_until_holding();
    sets.write(2, 0);
    sets.run(&[]);
    assert!(sets.io.wants_pace());
    sets.io.set_now(2 * SECOND_NS);
    sets.io.pace();
    sets.run(&[]);
    assert_eq!(sets.told, []);
    sets.io.set_now(2 * SECOND_NS + 1);
    sets.io.pace();
    sets.run(&[]);
    assert!(sets.failed());
    sets.full = NodeMask::EMPTY;
    sets.io.tick();
    sets.run(&[]);
    assert_eq!(sets.answered(2), Some(&Outcome::Done));
}

/// The record may be durable, whatever the holder has heard: nothing may change what it would freeze.
#[test]
fn only_policy_ends_what_it_was_told_is_frozen() {
    let mut sets = opened();
    sets.frozen();
    sets.write(1, 0);
    sets.io.link_down(2);
    sets.io.set_now(60 * SECOND_NS);
    sets.io.pace();
    sets.io.tick();
    sets.io.freeze(ATTEMPT + 1);
    sets.run(&[]);
    assert_eq!(sets.count(kind::WRITE), 0);
    let again =
        Event::FreezeFailed { attempt: ATTEMPT + 1, why: "another snapshot is being taken" };
    assert_eq!(sets.told[1..], [again]);
}

/// A node is lost between the freeze and the record: its set waits for the record without it, the other
/// does not.
#[test]
fn a_set_goes_on_when_its_nodes_have_stored_the_layers() {
    let mut sets = opened();
    sets.frozen();
    sets.write(1, 0);
    sets.write(2, 1);
    sets.io.link_down(2);
    sets.layered(&[2, 1], IN_SYNC);
    sets.write(3, 0);
    sets.write(4, 1);
    sets.io.flush(token(5));
    sets.run(&[]);
    let done =
        |sets: &TwoSets| -> Vec<u64> { sets.answers.iter().map(|(t, _)| t.cookie).collect() };
    assert_eq!(done(&sets), [2, 4]);
    sets.layered(&[2, 1], [0b0011, 0b1010]);
    sets.run(&[]);
    let mut all = done(&sets);
    all.sort_unstable();
    assert_eq!(all, [1, 2, 3, 4, 5]);
    sets.told.clear();
    sets.frozen();
}

/// A node's disk stood still when it was to store the layers: it answered pings, nobody counted it as slow,
/// and changes waited for ever.
#[test]
fn a_node_that_does_not_store_what_others_have_stored_lags() {
    let mut sets = opened();
    sets.frozen();
    sets.write(1, 0);
    sets.layered(&[2, 1], IN_SYNC);
    let mut stuck = std::mem::take(&mut sets.io.outputs);
    stuck.retain(|output| matches!(output, Output::Send { node: 2, .. }));
    assert_eq!(stuck.len(), 1, "its record");
    for node in [0, 1, 3] {
        sets.stores_record(node);
    }
    sets.io.set_now(3 * SECOND_NS);
    sets.io.tick();
    let lags = sets.io.outputs.iter().find_map(|output| match output {
        Output::Event(Event::Lags { lags }) => Some(lags.clone()),
        _ => None,
    });
    let of_stuck = lags.iter().flatten().find(|(node, _)| *node == 2);
    assert_eq!(of_stuck, Some(&(2, 3000)), "{lags:?}");
    assert_eq!(sets.answered(1), None);
}

#[test]
fn closing_ends_a_freeze_and_drops_what_waits_for_a_record() {
    let mut sets = opened();
    sets.write(1, 0);
    sets.io.freeze(ATTEMPT);
    sets.write(2, 0);
    sets.io.close();
    sets.run(&[]);
    assert!(sets.failed());
    assert_eq!(sets.answered(2), Some(&Outcome::Done));
    assert_eq!(sets.closed_clean, Some(true));
    let mut sets = opened();
    sets.write(1, 0);
    sets.run(&[]);
    sets.frozen();
    sets.write(2, 0);
    sets.io.close();
    sets.run(&[]);
    assert_eq!(sets.answered(2), Some(&Outcome::Failed(IoError::Shutdown)));
    assert_eq!((sets.count(kind::WRITE), sets.closed_clean), (3, Some(true)));
}

#[test]
fn an_image_that_is_given_up_answers_what_waits_and_says_so() {
    for frozen in [false, true] {
        let mut sets = opened();
        if !frozen {
            sets.write(1, 0);
        }
        sets.io.freeze(ATTEMPT);
        if frozen {
            sets.run(&[]);
        }
        sets.write(2, 0);
        sets.io.fence(0, Status::StaleEpoch);
        sets.run(&[]);
        assert_eq!(sets.failed(), !frozen);
        assert_eq!(sets.answered(2), Some(&Outcome::Failed(IoError::Shutdown)));
    }
}

#[test]
#[should_panic(expected = "layers change while the image is frozen")]
fn layers_do_not_change_beside_writes() {
    opened().layered(&[2, 1], IN_SYNC);
}

/// Policy takes back what nobody has stored: a holder that opens the image goes by other layers than those
/// that it read first.
#[test]
fn layers_change_freely_before_the_image_is_served() {
    let mut sets = TwoSets::new();
    sets.layered(&[2, 1], IN_SYNC);
    sets.layered(&[1], IN_SYNC);
    sets.open(&[]);
    let records = sets.asked.iter().filter(|(_, frame)| frame.kind == kind::RECORD);
    for (_, frame) in records {
        assert_eq!(Record::take(frame.head.clone()).expect("ours").layers, [1]);
    }
    sets.write(1, 0);
    sets.run(&[]);
    assert_eq!(sets.answered(1), Some(&Outcome::Done));
}

/// A cluster in which nothing was flushed, and whose record is about to get a layer.
fn with_a_layer_on_its_way(seed: u64) -> Cluster {
    let mut cluster = Cluster::new(seed, Faults::PowerCuts);
    cluster.settle();
    cluster.write(0, 32);
    cluster.settle();
    cluster.snapshot();
    while cluster.policy.freeze.is_none() {
        cluster.step(false);
    }
    cluster
}

/// The record with the new layer was taken, and all nodes lost their power before they had stored it: what
/// the snapshot should hold was gone.
fn power_goes_before_the_record_is_stored(seed: u64) {
    let mut cluster = with_a_layer_on_its_way(seed);
    (0..NODES).for_each(|node| cluster.restart_node(node, true));
    cluster.restart_gateway_with(true);
    cluster.settle();
    assert_eq!(cluster.policy.record.top, 2);
    cluster.check_replicas(false);
}

#[test]
fn what_a_snapshot_holds_is_durable_before_the_record_names_it() {
    (1..=20).for_each(power_goes_before_the_record_is_stored);
    break_rules(&[Rule::SnapshotsAreFlushed]);
    // A power cut may leave on some node what was not synced.
    let fails = |seed| catch_unwind(|| power_goes_before_the_record_is_stored(seed)).is_err();
    let noticed = (1..=20).any(fails);
    break_rules(&[]);
    assert!(noticed);
}

/// A node is killed between the freeze and the record, and comes back: it is levelled in all layers, and
/// gets what waited under the new one.
#[test]
fn a_node_that_restarts_before_it_stores_the_layers_has_them_when_it_is_back() {
    for power in [false, true] {
        let mut cluster = with_a_layer_on_its_way(7);
        cluster.write(4, 8);
        cluster.restart_node(1, power);
        cluster.take_proposal();
        while cluster.policy.record.top == 1 {
            // Refused by chance: once more.
            cluster.settle();
            cluster.snapshot();
            cluster.settle();
        }
        cluster.settle();
        cluster.check_replicas(false);
        cluster.read_everything();
        cluster.settle();
        let layers = cluster.io.spec().layers.clone();
        assert_eq!(layers[1..], [1]);
    }
}

/// A node misses writes under two layers, and one of them freezes meanwhile.
#[test]
fn a_node_left_behind_over_a_snapshot_is_healed_in_all_layers() {
    let mut cluster = Cluster::new(7, Faults::Kills);
    cluster.settle();
    cluster.write(0, 32);
    cluster.flush();
    cluster.settle();
    cluster.restart_node(2, false);
    cluster.write(3, 9);
    while cluster.policy.record.in_sync.has(2) {
        cluster.step_without(2);
    }
    cluster.write(16, 16);
    while cluster.policy.record.top == 1 {
        cluster.snapshot();
        (0..2000).for_each(|_| cluster.step_without(2));
    }
    cluster.write(20, 20);
    cluster.zero(0, 16);
    (0..2000).for_each(|_| cluster.step_without(2));
    assert!(!cluster.policy.record.in_sync.has(2));
    cluster.settle();
    assert_eq!(cluster.policy.record.in_sync.0, (1 << NODES) - 1);
    cluster.check_replicas(false);
}
