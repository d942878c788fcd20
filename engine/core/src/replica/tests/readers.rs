//! Readers of frozen layers beside a cluster that goes on.

use super::cluster::{Cluster, Faults, IMAGE, NODES};
use crate::content::{Block, Run};
use crate::geometry::{BLOCK_BYTES, LayerId, SnapshotId, Tag};
use crate::replica::{
    Event, IoError, NodeIndex, NodeMask, Outcome, Output, ReaderIo, ReaderSpec, Token,
};
use crate::rules::{Rule, break_rules};
use crate::wire::copies::{Pull, Source};
use crate::wire::messages::{Copy, DirtyFrom, Flush, Head, Io, Level, ShardRange, WrittenAbove};
use crate::wire::{Frame, FrameReader, Status, kind};
use bytes::{Bytes, BytesMut};

const SECOND_NS: u64 = 1_000_000_000;
/// Connections of the reader's gateway; the holder's have low numbers.
const CONNECTION: u64 = 1 << 40;

pub struct Reading {
    pub io: ReaderIo,
    now_ns: u64,
    /// The reader's connection to each node.
    links: [Option<u64>; NODES],
    connections: u64,
    pub events: Vec<Event>,
    pub answers: Vec<(u64, Outcome)>,
}

impl Reading {
    pub fn new(cluster: &Cluster, layers: &[LayerId]) -> Reading {
        let generation = cluster.policy.record.frozen[layers[0] as usize];
        Reading::of(cluster, layers, generation, NodeMask((1 << NODES) - 1))
    }

    fn of(cluster: &Cluster, layers: &[LayerId], generation: u64, in_sync: NodeMask) -> Reading {
        let spec = cluster.io.spec();
        let reader = ReaderSpec {
            image: spec.image,
            channel: 77,
            geometry: spec.geometry,
            snapshot: SnapshotId { layer: layers[0], generation },
            nodes: spec.nodes.clone(),
            sets: vec![in_sync],
            local: Some(0),
        };
        Reading {
            io: ReaderIo::new(reader, 0),
            now_ns: 0,
            links: [None; NODES],
            connections: CONNECTION,
            events: Vec::new(),
            answers: Vec::new(),
        }
    }

    fn connect(&mut self, node: usize) {
        self.connections += 1;
        self.links[node] = Some(self.connections);
        self.io.link_up(node as NodeIndex);
    }

    pub fn connect_all(&mut self) {
        (0..NODES).for_each(|node| self.connect(node));
    }

    pub fn cut(&mut self, cluster: &mut Cluster, node: usize) {
        if let Some(connection) = self.links[node].take() {
            cluster.nodes[node].end_connection(connection);
            self.io.link_down(node as NodeIndex);
        }
    }

    /// Nodes answer until nothing more is asked.
    pub fn run(&mut self, cluster: &mut Cluster) {
        while let Some(output) = self.io.outputs.pop_front() {
            match output {
                Output::Send { node, head, payload } => {
                    let Some(connection) = self.links[usize::from(node)] else { continue };
                    let mut bytes = BytesMut::from(&head[..]);
                    bytes.extend_from_slice(&payload);
                    let frame = FrameReader::next(&mut bytes).expect("ours").expect("whole");
                    let process = cluster.nodes[usize::from(node)].run();
                    process.take(connection, frame, 0).expect("the store works");
                    let answers = &mut process.answers;
                    let ours = answers.iter().position(|(of, _)| *of == connection);
                    let (_, answer) = answers.remove(ours.expect("answered at once")).expect("it");
                    assert_eq!(self.io.receive(node, answer), Ok(()));
                }
                Output::Answer { token, outcome } => self.answers.push((token.cookie, outcome)),
                Output::Event(event) => self.events.push(event),
            }
        }
    }

    fn pass(&mut self, cluster: &mut Cluster, seconds: u64) {
        for _ in 0..seconds * 10 {
            self.now_ns += SECOND_NS / 10;
            self.io.set_now(self.now_ns);
            self.io.pace();
            self.run(cluster);
        }
    }

    /// What is in the image's first region.
    fn read(&mut self, cluster: &mut Cluster) -> Outcome {
        let first = u64::from(self.io.spec().geometry.shard_bytes) - 2 * u64::from(BLOCK_BYTES);
        self.answers.clear();
        self.io.read(Token { client: 9, cookie: 5 }, first, 4 * BLOCK_BYTES);
        self.run(cluster);
        self.answers.pop().expect("an answer").1
    }

    fn content(&mut self, cluster: &mut Cluster) -> Vec<u8> {
        match self.read(cluster) {
            Outcome::Read(runs) => flatten(&runs),
            outcome => panic!("a read got {outcome:?}"),
        }
    }
}

fn flatten(runs: &[Run]) -> Vec<u8> {
    let mut out = Vec::new();
    for run in runs {
        match run {
            Run::Data(data) => out.extend_from_slice(data),
            Run::Hole(length) => out.resize(out.len() + *length as usize, 0),
        }
    }
    out
}

/// A cluster with a snapshot, and other content above it; and what the snapshot holds of the first region.
fn with_snapshot() -> (Cluster, Vec<u8>) {
    with_snapshot_under(Faults::Kills)
}

fn with_snapshot_under(faults: Faults) -> (Cluster, Vec<u8>) {
    let mut cluster = Cluster::new(7, faults);
    cluster.settle();
    cluster.write(0, 32);
    cluster.settle();
    while cluster.policy.record.top == 1 {
        cluster.snapshot();
        cluster.settle();
    }
    cluster.write(0, 20);
    cluster.settle();
    let held = cluster.frozen[&1][..4 * BLOCK_BYTES as usize].to_vec();
    let now = cluster.content_of(0, &[2, 1])[..4 * BLOCK_BYTES as usize].to_vec();
    assert_ne!(held, now);
    (cluster, held)
}

fn failed(reading: &Reading) -> bool {
    matches!(reading.events[..], [.., Event::ReaderFailed { .. }])
}

#[test]
fn a_snapshot_is_read_beside_the_holder_and_no_holder_ends_that() {
    let (mut cluster, held) = with_snapshot();
    let mut reading = Reading::new(&cluster, &[1]);
    reading.connect(1);
    reading.run(&mut cluster);
    assert_eq!(reading.events, [Event::ReaderOpen]);
    assert_eq!(reading.content(&mut cluster), held);
    // Another holder, a higher epoch; writes to the same blocks; a further snapshot.
    cluster.restart_gateway();
    cluster.settle();
    cluster.write(0, 32);
    cluster.settle();
    while cluster.policy.record.top == 2 {
        cluster.snapshot();
        cluster.settle();
    }
    cluster.write(4, 9);
    cluster.settle();
    assert_eq!(reading.content(&mut cluster), held);
    let mut second = Reading::new(&cluster, &[2, 1]);
    second.connect_all();
    second.run(&mut cluster);
    let expected = cluster.frozen[&2][..held.len()].to_vec();
    assert_eq!(second.content(&mut cluster), expected);
}

#[test]
fn a_reader_outlives_restarts_and_falls_over_to_other_replicas() {
    let (mut cluster, held) = with_snapshot_under(Faults::PowerCuts);
    let mut reading = Reading::new(&cluster, &[1]);
    reading.connect_all();
    reading.run(&mut cluster);
    for node in [0, 1, 2, 0] {
        cluster.restart_node(node, node > 0);
        reading.cut(&mut cluster, node);
        assert_eq!(reading.content(&mut cluster), held, "without node {node}");
        reading.connect(node);
        reading.run(&mut cluster);
    }
    (0..NODES).for_each(|node| reading.cut(&mut cluster, node));
    reading.io.read(Token { client: 9, cookie: 6 }, 0, 4096);
    reading.pass(&mut cluster, 20);
    assert_eq!((reading.answers.len(), reading.events.len()), (0, 1), "it waits for a node");
    reading.connect(2);
    reading.run(&mut cluster);
    assert!(matches!(reading.answers[..], [(6, Outcome::Read(_))]));
}

#[test]
fn a_rotten_block_is_read_from_another_replica() {
    let (mut cluster, held) = with_snapshot();
    cluster.nodes.iter_mut().for_each(|node| node.checkpoint_all());
    let mut reading = Reading::new(&cluster, &[1]);
    reading.connect_all();
    reading.run(&mut cluster);
    let last = u64::from(reading.io.spec().geometry.shard_bytes) - 10;
    for node in 0..NODES {
        assert_eq!(reading.content(&mut cluster), held, "with rot on {node} nodes");
        cluster.nodes[node].rot(0, last);
    }
    assert_eq!(reading.read(&mut cluster), Outcome::Failed(IoError::Io));
    reading.pass(&mut cluster, 10);
    assert!(!failed(&reading), "other blocks are there");
}

#[test]
fn layers_that_are_not_frozen_at_a_node_are_not_served() {
    let (mut cluster, _) = with_snapshot();
    for layers in [&[2, 1][..], &[2], &[3, 2, 1], &[3, 1]] {
        let mut reading = Reading::new(&cluster, layers);
        reading.connect_all();
        reading.run(&mut cluster);
        assert!(reading.io.node_states().iter().all(|(_, state)| state == "NoLayers"));
        reading.pass(&mut cluster, 4);
        assert_eq!(reading.events, []);
        reading.pass(&mut cluster, 2);
        assert!(failed(&reading), "{:?}", reading.events);
    }
    break_rules(&[Rule::ReadersReadFrozenLayers]);
    let mut reading = Reading::new(&cluster, &[2, 1]);
    reading.connect_all();
    reading.run(&mut cluster);
    break_rules(&[]);
    assert_eq!(reading.events, [Event::ReaderOpen], "the top is read that is written to");
}

/// A snapshot was taken back before any node had stored it, and its layer frozen again later: whoever still
/// tried to read the first one was given what the second one holds.
#[test]
fn a_layer_that_another_record_froze_is_another_snapshot() {
    let (mut cluster, _) = with_snapshot();
    let frozen = cluster.policy.record.frozen[1];
    let mut reading = Reading::of(&cluster, &[1], frozen - 1, NodeMask(0b111));
    reading.connect_all();
    reading.pass(&mut cluster, 3);
    assert_eq!(reading.events, []);
    assert!(reading.io.node_states().iter().all(|(_, state)| state == "NoLayers"));
}

/// Its disk was set back to an older state: what is there of the image may be of before the snapshot.
#[test]
fn a_store_that_was_set_back_serves_no_reader() {
    let (mut cluster, _) = with_snapshot();
    let mut reading = Reading::new(&cluster, &[1]);
    reading.connect_all();
    reading.run(&mut cluster);
    (0..NODES).for_each(|node| cluster.nodes[node].run().store.distrust([IMAGE]));
    reading.io.read(Token { client: 9, cookie: 5 }, 0, BLOCK_BYTES);
    reading.run(&mut cluster);
    assert_eq!(reading.answers, [], "it waits for a node");
    assert!(reading.io.node_states().iter().all(|(_, state)| state == "NoLayers"));
    let mut reading = Reading::new(&cluster, &[1]);
    reading.connect_all();
    reading.run(&mut cluster);
    assert!(reading.io.node_states().iter().all(|(_, state)| state == "NoLayers"));
}

#[test]
fn a_rollback_ends_readers_of_what_it_drops_and_of_nothing_else() {
    let (mut cluster, below) = with_snapshot();
    while cluster.policy.record.top == 2 {
        cluster.snapshot();
        cluster.settle();
    }
    let open = |cluster: &mut Cluster, layers: &[LayerId]| {
        let mut reading = Reading::new(cluster, layers);
        // Each has connections of its own.
        reading.connections += layers.len() as u64 * 100;
        reading.connect_all();
        reading.run(cluster);
        assert_eq!(reading.events, [Event::ReaderOpen]);
        reading
    };
    let mut stays = open(&mut cluster, &[1]);
    let mut goes = open(&mut cluster, &[2, 1]);
    cluster.roll_back(None);
    cluster.settle();
    assert_eq!(stays.content(&mut cluster), below);
    goes.io.read(Token { client: 9, cookie: 5 }, 0, BLOCK_BYTES);
    goes.pass(&mut cluster, 6);
    assert!(goes.answers.iter().all(|(_, outcome)| !matches!(outcome, Outcome::Read(_))));
    assert!(goes.io.node_states().iter().all(|(_, state)| state == "NoLayers"));
}

/// The layers below it change, and what it shows does not.
#[test]
fn a_reader_goes_on_as_a_snapshot_below_is_removed_and_that_ones_ends() {
    let (mut cluster, below) = with_snapshot();
    while cluster.policy.record.top == 2 {
        cluster.snapshot();
        cluster.settle();
    }
    let open = |cluster: &mut Cluster, layer: LayerId| {
        let mut reading = Reading::new(cluster, &[layer]);
        // Each has connections of its own.
        reading.connections += u64::from(layer) * 100;
        reading.connect_all();
        reading.run(cluster);
        assert_eq!(reading.events, [Event::ReaderOpen]);
        reading
    };
    let (mut stays, mut goes) = (open(&mut cluster, 2), open(&mut cluster, 1));
    let shown = stays.content(&mut cluster);
    assert_eq!(goes.content(&mut cluster), below);
    cluster.remove(1);
    cluster.settle();
    assert_eq!(stays.content(&mut cluster), shown);
    goes.io.read(Token { client: 9, cookie: 5 }, 0, BLOCK_BYTES);
    goes.pass(&mut cluster, 6);
    assert!(goes.answers.iter().all(|(_, outcome)| !matches!(outcome, Outcome::Read(_))));
    cluster.take_all_out();
    assert_eq!(cluster.policy.record.layers(), [3, 2]);
    assert_eq!(stays.content(&mut cluster), shown);
}

/// The record with the snapshot has not come to the node yet.
#[test]
fn a_node_is_asked_again_until_its_record_has_the_layers() {
    let mut cluster = Cluster::new(7, Faults::Kills);
    cluster.settle();
    cluster.write(0, 32);
    cluster.settle();
    let next = cluster.policy.record.generation + 1;
    let mut reading = Reading::of(&cluster, &[1], next, NodeMask(0b111));
    reading.connect_all();
    reading.pass(&mut cluster, 2);
    assert_eq!(reading.events, []);
    while cluster.policy.record.top == 1 {
        cluster.snapshot();
        cluster.settle();
    }
    reading.pass(&mut cluster, 2);
    assert_eq!(reading.events, [Event::ReaderOpen]);
}

#[test]
fn a_reader_ends_with_its_image() {
    let (mut cluster, held) = with_snapshot();
    let mut reading = Reading::new(&cluster, &[1]);
    reading.connect_all();
    reading.run(&mut cluster);
    assert_eq!(reading.content(&mut cluster), held);
    let image = reading.io.spec().image;
    for node in &mut cluster.nodes {
        node.run().store.delete(image).expect("a tombstone");
    }
    assert_eq!(reading.read(&mut cluster), Outcome::Failed(IoError::Shutdown));
    assert!(failed(&reading));
    let mut late = Reading::new(&cluster, &[1]);
    late.connect_all();
    late.run(&mut cluster);
    assert!(failed(&late), "at once");
}

/// A node came back with an empty disk. It had the record soon, its layers among it, and nothing of what is in
/// them: a reader that knew it from before was given zeroes.
#[test]
fn a_node_that_is_made_anew_serves_no_reader_before_it_is_taken_in() {
    let (mut cluster, held) = with_snapshot();
    let mut reading = Reading::new(&cluster, &[1]);
    reading.connect_all();
    reading.run(&mut cluster);
    cluster.replace_disk(0);
    reading.cut(&mut cluster, 0);
    cluster.write(3, 3);
    while cluster.policy.record.in_sync.has(0) {
        cluster.step(false);
    }
    cluster.policy.record.since[0] = 0;
    let image = reading.io.spec().image;
    while cluster.nodes[0].run().store.image(&image).is_none() {
        cluster.connect(0);
        cluster.step(false);
    }
    reading.connect(0);
    reading.run(&mut cluster);
    assert_eq!(reading.io.node_states()[0].1, format!("{:?}", Status::NoLayers));
    assert_eq!(reading.content(&mut cluster), held, "by the others");
    cluster.settle();
    reading.pass(&mut cluster, 2);
    assert_eq!(reading.io.node_states()[0].1, "attached");
    assert_eq!(reading.content(&mut cluster), held);
    cluster.check_replicas(false);
}

#[test]
fn a_set_whose_nodes_lost_the_layers_ends_the_reader() {
    let (mut cluster, _) = with_snapshot();
    let frozen = cluster.policy.record.frozen[1];
    let mut reading = Reading::of(&cluster, &[1], frozen, NodeMask(0b011));
    reading.connect_all();
    reading.run(&mut cluster);
    for node in 0..2 {
        cluster.replace_disk(node);
        reading.cut(&mut cluster, node);
        reading.connect(node);
    }
    reading.run(&mut cluster);
    assert_eq!(reading.io.node_states()[0].1, format!("{:?}", Status::NoRecord));
    reading.pass(&mut cluster, 7);
    assert!(failed(&reading), "{:?}", reading.events);
    assert_eq!(reading.read(&mut cluster), Outcome::Failed(IoError::Shutdown));
    reading.io.close();
    reading.run(&mut cluster);
    assert_eq!(reading.events.last(), Some(&Event::Closed { clean: true }));
}

#[test]
fn closing_a_reader_ends_its_sessions() {
    let (mut cluster, _) = with_snapshot();
    let mut reading = Reading::new(&cluster, &[1]);
    reading.connect_all();
    reading.run(&mut cluster);
    reading.io.close();
    reading.run(&mut cluster);
    assert_eq!(reading.events, [Event::ReaderOpen, Event::Closed { clean: true }]);
    assert_eq!(reading.read(&mut cluster), Outcome::Failed(IoError::Shutdown));
}

/// Nothing but reading is done for a reader, whatever else it asks.
#[test]
fn a_reader_changes_nothing() {
    let (mut cluster, _) = with_snapshot();
    let mut reading = Reading::new(&cluster, &[1]);
    reading.connect(0);
    reading.run(&mut cluster);
    let process = cluster.nodes[0].run();
    for kind in (0..=u8::MAX / 2).filter(|kind| !is_for_anybody(*kind)) {
        let mut head = BytesMut::new();
        put_sample(kind, &mut head);
        let (flags, status, payload) = (0, Status::Ok, Bytes::new());
        let head = head.freeze();
        let frame = Frame { kind, flags, status, channel: 77, tag: 1, head, payload };
        process.take(CONNECTION + 1, frame, 0).expect("the store works");
        match process.answers.pop_back() {
            Some((_, answer)) => assert_eq!(answer.status, Status::NoSession, "kind {kind}"),
            None => assert_eq!(process.sent_away.pop(), Some(CONNECTION + 1), "kind {kind}"),
        }
    }
    assert!(reading.content(&mut cluster).len() > 1);
}

/// Kinds that a reader may ask, and those that need no session.
fn is_for_anybody(kind: u8) -> bool {
    use kind::*;
    let read = [READ, STATUS, CHANGES, TOUCHED, CONFIRM, DETACH].contains(&kind);
    read || [PING, PEEK, RECORD, ATTACH, ATTACH_READER].contains(&kind)
}

/// A head of a kind that changes something or tells of an image.
fn put_sample(kind: u8, out: &mut BytesMut) {
    let (epoch, generation, shard) = (0, 9, 0);
    let io = Io { shard, offset: 0, length: 4096, epoch, generation, sequence: 1 };
    let range = ShardRange { epoch, layer: 1, shard, first_block: 0, blocks: 1 };
    let proof = Vec::new();
    match kind {
        kind::WRITE => Io { length: 0, ..io }.put(out),
        kind::ZERO => io.put(out),
        kind::FLUSH | kind::CLEAR => {
            Flush { epoch, generation, clear_sequence: 9, proof }.put(out);
        }
        kind::SUMMARY | kind::FETCH | kind::SCRUB => range.put(out),
        kind::LEVEL => Level { epoch, shards: vec![0] }.put(out),
        kind::DIRTY => DirtyFrom { epoch, from_shard: 0 }.put(out),
        kind::PULL => {
            let address = "127.0.0.1:1".parse().expect("an address");
            let source = Source { node: "node1".into(), address };
            let (layer, first_block, blocks) = (1, 0, 1);
            let pull = Pull { epoch, generation, layer, shard, first_block, blocks, source };
            pull.put(out);
        }
        kind::WRITTEN => WrittenAbove { epoch, generation, place: 0, shard }.put(out),
        kind::COPY => {
            let (layer, shard_generation) = (1, 1);
            let (indexes, blocks) = (vec![0], vec![(Block::Zero, Tag::NONE)]);
            let copy = Copy { epoch, generation, layer, shard, shard_generation, indexes, blocks };
            copy.put(out);
        }
        _ => {}
    }
}
