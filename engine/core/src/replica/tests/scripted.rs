//! Single situations, each the story of a mistake.

use super::cluster::{Cluster, Faults};
use crate::content::Block;
use crate::geometry::{BLOCK_BYTES, Geometry, ImageId, Tag};
use crate::replica::{
    Background, Event, HealLimits, ImageIo, Instance, IoError, NodeMask, OpenSpec, Outcome, Output,
    SetSpec, Token,
};
use crate::wire::messages::{
    BlocksReply, DirtyEntry, DirtyReply, Head, Io, Level, Number, WrittenReply, put_blocks,
};
use crate::wire::{Frame, FrameReader, REPLY, Status, flag, kind};
use bytes::{Bytes, BytesMut};

fn dirty_reply(to: &Frame, shards: &[u64]) -> Frame {
    let entry =
        |shard: &u64| DirtyEntry { shard: *shard, last: Tag::NONE, generation: 1, sticky: true };
    let reply = DirtyReply { entries: shards.iter().map(entry).collect(), more: true };
    let mut head = BytesMut::new();
    reply.put(&mut head);
    Frame { kind: to.kind | REPLY, head: head.freeze(), payload: Bytes::new(), ..to.clone() }
}

/// Four nodes in two sets, as honest as can be: each frame is answered at once, in order.
pub(super) struct TwoSets {
    pub io: ImageIo,
    /// What was asked of each node.
    pub asked: Vec<(u8, Frame)>,
    /// Nodes that have no room for data.
    pub full: NodeMask,
    /// Shards that nodes say were written while another was away.
    pub written: Vec<u64>,
    /// Nodes say that clients of others ask something of them.
    pub beside_clients: bool,
    /// What clients were answered.
    pub answers: Vec<(Token, Outcome)>,
    /// Of freezes, how they went.
    pub told: Vec<Event>,
    /// Freezes that have begun to hold clients back.
    pub holding: u32,
    /// How the image was closed, if it was.
    pub closed_clean: Option<bool>,
    peeked: Vec<(u8, u64)>,
}

impl TwoSets {
    /// Node 0 is in sync in the first set and stale in the second.
    pub fn new() -> TwoSets {
        let levelling = HealLimits { bytes_per_second: 0, shards_at_once: 1, share_percent: 100 };
        TwoSets::sharing(&Background::default(), 1, levelling)
    }

    /// One of several images of a gateway.
    pub fn sharing(background: &Background, channel: u32, levelling: HealLimits) -> TwoSets {
        let geometry = Geometry {
            size_bytes: 64 << 20,
            shard_bytes: 1 << 20,
            placement_key: ImageId([9; 16]),
            replica_sets: 2,
        };
        let set = |members: u64, in_sync: u64| SetSpec {
            members: NodeMask(members),
            in_sync: NodeMask(in_sync),
        };
        let spec = OpenSpec {
            image: ImageId([9; 16]),
            channel,
            geometry,
            layers: vec![1],
            snapshots: Vec::new(),
            merging: Vec::new(),
            parent: None,
            epoch: 2,
            holder: [2; 16],
            generation: 2,
            digest: [2; 32],
            body: Bytes::new(),
            nodes: (1..=4).map(|number| format!("node{number}")).collect(),
            sets: vec![set(0b0111, 0b0111), set(0b1011, 0b1010)],
            local: None,
            levelling,
        };
        TwoSets {
            io: ImageIo::new(spec, background),
            asked: Vec::new(),
            full: NodeMask::EMPTY,
            written: Vec::new(),
            beside_clients: false,
            answers: Vec::new(),
            told: Vec::new(),
            holding: 0,
            closed_clean: None,
            peeked: Vec::new(),
        }
    }

    pub fn connect(&mut self) {
        let instance = |node: u8| Instance { store: [node; 16], start_counter: 1 };
        (0..4).for_each(|node| self.io.link_up(node, instance(node), [0; 16]));
    }

    /// All nodes connect, and the image is served.
    pub fn open(&mut self, dirty: &[u64]) {
        self.connect();
        self.run(dirty);
        assert!(self.io.is_running(), "{:?}", self.io.replica_states());
    }

    pub fn shard_of_set(&self, set: u32) -> u64 {
        let geometry = self.io.spec().geometry;
        (0..64).find(|shard| geometry.replica_set_of(*shard) == set).expect("of 64 shards one")
    }

    pub fn set_of_shard(&self, shard: u64) -> u32 {
        self.io.spec().geometry.replica_set_of(shard)
    }

    /// Answers until nothing more is asked; `dirty`: what each node's dirty map names.
    pub fn run(&mut self, dirty: &[u64]) {
        while let Some(output) = self.io.outputs.pop_front() {
            self.carry_out(output, dirty);
        }
    }

    /// Answers what is asked by now; what comes of that waits.
    pub fn run_once(&mut self, dirty: &[u64]) {
        for output in std::mem::take(&mut self.io.outputs) {
            self.carry_out(output, dirty);
        }
    }

    /// Answers what is asked until a freeze holds clients back.
    pub fn run_until_holding(&mut self) {
        while self.holding == 0 {
            let output = self.io.outputs.pop_front().expect("something is asked before");
            self.carry_out(output, &[]);
        }
    }

    fn carry_out(&mut self, output: Output, dirty: &[u64]) {
        match output {
            Output::Send { node, head, payload } => {
                let mut bytes = BytesMut::from(&head[..]);
                bytes.extend_from_slice(&payload);
                let frame = FrameReader::next(&mut bytes).expect("ours").expect("whole");
                let answer = match frame.kind == kind::WRITE && self.full.has(node) {
                    true => Self::refusal(&frame),
                    false => self.answer(&frame, dirty),
                };
                self.asked.push((node, frame));
                assert_eq!(self.io.receive(node, answer), Ok(()));
            }
            Output::Event(Event::Peeked { node, serial, .. }) => {
                self.peeked.push((node, serial));
                if self.peeked.len() == 4 {
                    self.io.admit(&self.peeked, false);
                }
            }
            Output::Event(Event::Closed { clean }) => self.closed_clean = Some(clean),
            Output::Event(event @ (Event::Frozen { .. } | Event::FreezeFailed { .. })) => {
                self.told.push(event);
            }
            Output::Event(Event::Holding { .. }) => self.holding += 1,
            Output::Event(_) => {}
            Output::Answer { token, outcome } => self.answers.push((token, outcome)),
        }
    }

    fn refusal(to: &Frame) -> Frame {
        let (head, payload) = (Bytes::new(), Bytes::new());
        Frame { kind: to.kind | REPLY, status: Status::NoSpace, head, payload, ..to.clone() }
    }

    fn answer(&self, to: &Frame, dirty: &[u64]) -> Frame {
        let mut head = BytesMut::new();
        let mut status = Status::Ok;
        match to.kind {
            kind::PEEK => status = Status::NoRecord,
            kind::DIRTY => {
                let entry = |shard: &u64| DirtyEntry {
                    shard: *shard,
                    last: Tag::NONE,
                    generation: 1,
                    sticky: true,
                };
                let entries = dirty.iter().map(entry).collect();
                DirtyReply { entries, more: false }.put(&mut head);
            }
            kind::WRITTEN => {
                WrittenReply { shards: self.written.clone(), next: None }.put(&mut head);
            }
            kind::SUMMARY => {
                let blocks = vec![(Block::Absent, Tag::NONE); 256];
                BlocksReply { generation: 1, blocks }.put(&mut head);
            }
            kind::FLUSH => Number(1).put(&mut head),
            kind::READ => {
                let blocks = Io::take(to.head.clone()).expect("ours").length / BLOCK_BYTES;
                put_blocks(&mut head, vec![Block::Absent; blocks as usize].into_iter());
            }
            _ => {}
        }
        let flags = if self.beside_clients { flag::BESIDE_CLIENTS } else { 0 };
        let (kind, head) = (to.kind | REPLY, head.freeze());
        Frame { kind, flags, status, head, payload: Bytes::new(), ..to.clone() }
    }
}

/// A write of a set reached one node only and the gateway died. That node was left behind in the set, but
/// stayed in sync in another; when that one was levelled the node forgot the lone write, which its heal
/// would have had to find.
#[test]
fn a_node_stale_in_a_set_keeps_its_dirty_entries_of_that_set() {
    let mut sets = TwoSets::new();
    let mut dirty = [sets.shard_of_set(0), sets.shard_of_set(1)];
    dirty.sort_unstable();
    sets.open(&dirty);
    let token = Token { client: 1, cookie: 1 };
    sets.io.write(token, 0, Bytes::from(vec![7; 4096]), 0);
    sets.io.flush(token);
    sets.run(&dirty);
    (0..4).for_each(|_| sets.io.tick());
    sets.run(&dirty);
    let of = |wanted: u8, node: u8| {
        let frames = sets.asked.iter().filter(move |(to, f)| *to == node && f.kind == wanted);
        frames.map(|(_, frame)| frame.head.clone()).collect::<Vec<_>>()
    };
    for node in 0..4 {
        let told = of(kind::LEVEL, node)
            .into_iter()
            .flat_map(|head| Level::take(head).expect("ours").shards);
        let geometry = sets.io.spec().geometry;
        let in_sync =
            |shard: &u64| sets.io.in_sync()[geometry.replica_set_of(*shard) as usize].has(node);
        let expected: Vec<u64> = dirty.iter().copied().filter(in_sync).collect();
        assert_eq!(told.collect::<Vec<_>>(), expected, "node {node} is told what is level");
        // A clear names no set: it would drop what the node has of the other one.
        assert_eq!(of(kind::CLEAR, node).is_empty(), node == 0, "clears of node {node}");
    }
}

/// One change waited for a node of a set below its quorum, and of each change that was answered in the
/// other set meanwhile something was kept, as long as it waited.
#[test]
fn a_change_that_waits_for_long_has_nothing_kept_of_those_that_do_not() {
    let mut sets = TwoSets::new();
    let instance = |node: u8| Instance { store: [node; 16], start_counter: 1 };
    (0..4).for_each(|node| sets.io.link_up(node, instance(node), [0; 16]));
    sets.run(&[]);
    assert!(sets.io.is_running());
    let shard_bytes = u64::from(sets.io.spec().geometry.shard_bytes);
    let place = |sets: &TwoSets, set| sets.shard_of_set(set) * shard_bytes;
    let (waits, goes_on) = (place(&sets, 0), place(&sets, 1));
    sets.io.link_down(0);
    let data = Bytes::from(vec![7; 4096]);
    let token = |cookie| Token { client: 1, cookie };
    sets.io.write(token(0), waits, data.clone(), 0);
    for cookie in 1..100 {
        sets.io.write(token(cookie), goes_on, data.clone(), 0);
        sets.run(&[]);
    }
    assert_eq!((sets.io.queues().requests, sets.io.queues().unanswered), (1, 1));
    // What was answered behind it is cleared when it is, and not before.
    sets.io.flush(token(100));
    sets.run(&[]);
    (0..3).for_each(|_| sets.io.tick());
    sets.run(&[]);
    assert!(!sets.asked.iter().any(|(_, frame)| frame.kind == kind::CLEAR));
}

fn until_dirty_is_asked() -> (Cluster, u8, Frame) {
    let mut cluster = Cluster::new(1, Faults::Kills);
    loop {
        cluster.step(false);
        if let Some((node, frame)) = cluster.intercept(kind::DIRTY) {
            return (cluster, node, frame);
        }
    }
}

/// The shard after the last one was asked for, which overflowed and ended the gateway.
#[test]
fn a_dirty_map_with_the_last_possible_shard_is_taken() {
    let (mut cluster, node, frame) = until_dirty_is_asked();
    assert_eq!(cluster.io.receive(node, dirty_reply(&frame, &[u64::MAX])), Ok(()));
}

/// It was asked on from its last entry, again and again.
#[test]
fn a_dirty_map_out_of_order_ends_the_connection() {
    let (mut cluster, node, frame) = until_dirty_is_asked();
    assert!(cluster.io.receive(node, dirty_reply(&frame, &[5, 5])).is_err());
    let (mut cluster, node, frame) = until_dirty_is_asked();
    assert!(cluster.io.receive(node, dirty_reply(&frame, &[5, 4])).is_err());
}

/// A client connects, the image shrinks, the client asks for what was cut off: the loop that serves all
/// images ended.
#[test]
fn a_request_past_a_new_end_fails_alone() {
    let mut cluster = Cluster::new(1, Faults::Kills);
    cluster.settle();
    cluster.io.resize(4096, Bytes::new());
    let token = Token { client: 1, cookie: 77 };
    cluster.io.read(token, 4096, 512);
    let outcome = Outcome::Failed(IoError::Io);
    assert!(cluster.io.outputs.iter().any(|output| {
        matches!(output, Output::Answer { token: t, outcome: o } if *t == token && *o == outcome)
    }));
}

/// A guest discarded a whole big disk; the nodes' dirty maps were full, the first node to say so was left
/// behind as if its disk had failed, and every image after it lost that node too.
#[test]
fn a_full_dirty_map_is_flushed_and_cleared_and_the_node_asked_again() {
    let mut cluster = Cluster::new(1, Faults::Kills);
    cluster.settle();
    cluster.write(0, 8);
    let (node, frame) = cluster.intercept(kind::WRITE).expect("it goes to all nodes");
    let refusal = Frame { kind: frame.kind | REPLY, status: Status::DirtyFull, ..frame };
    let refusal = Frame { head: Bytes::new(), payload: Bytes::new(), ..refusal };
    assert_eq!(cluster.io.receive(node, refusal), Ok(()));
    let failed = |output: &Output| matches!(output, Output::Event(Event::ReplicaFailed { .. }));
    assert!(!cluster.io.outputs.iter().any(failed), "a node with much to remember works");
    cluster.settle();
    assert!(cluster.policy.record.in_sync.has(node), "nobody was left behind");
    cluster.check_replicas(false);
}
