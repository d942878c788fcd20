//! A clone as its holder serves it, on real stores that have its parent, or lack it.

use super::node::SimNode;
use crate::checksum::checksum_of;
use crate::geometry::{BLOCK_BYTES, Geometry, ImageId, Parent, SnapshotId};
use crate::replica::{
    Background, Event, HealLimits, ImageIo, IoError, NodeIndex, NodeMask, OpenSpec, Outcome,
    Output, SetSpec, Token,
};
use crate::simulation::LogSize;
use crate::wire::messages::{Attach, AttachReader, Head, Io, Peek, Record, RecordHead};
use crate::wire::{Frame, FrameReader, REPLY, Status, kind};
use bytes::{BufMut, Bytes, BytesMut};

const PARENT: ImageId = ImageId([0xA1; 16]);
const CLONE: ImageId = ImageId([0xC1; 16]);
const SHARD_BYTES: u32 = 1 << 20;
const NODES: usize = 3;
const BLOCK: usize = BLOCK_BYTES as usize;
/// Where a frame has its kind.
const KIND_AT: usize = 12;
/// The connections of the parent's holder.
const PARENTS: u64 = 90;
const SNAPSHOT: SnapshotId = SnapshotId { layer: 1, generation: 3 };

fn parent() -> Parent {
    Parent { image: PARENT, snapshot: SNAPSHOT, size_bytes: 4 << 20 }
}

fn frame(kind: u8, head: &impl Head, payload: Bytes) -> Frame {
    let mut bytes = BytesMut::new();
    head.put(&mut bytes);
    let (status, head) = (Status::Ok, bytes.freeze());
    Frame { kind, flags: 0, status, channel: 1, tag: 5, head, payload }
}

fn record(image: ImageId, epoch: u64, generation: u64) -> Record {
    let (holder, digest) = ([epoch as u8; 16], [generation as u8; 32]);
    let shard_bytes = SHARD_BYTES;
    Record {
        head: RecordHead { image, epoch, holder, generation, digest, shard_bytes },
        blank: false,
        layers: vec![1],
        snapshots: Vec::new(),
        merging: Vec::new(),
        parent: (image == CLONE).then(parent),
    }
}

fn ask(node: &mut SimNode, asked: Frame) -> Status {
    let kind = asked.kind | REPLY;
    node.take(PARENTS, asked);
    node.sync();
    let answers = &mut node.run().answers;
    let place = answers.iter().position(|(of, frame)| (*of, frame.kind) == (PARENTS, kind));
    answers.remove(place.expect("an answer")).expect("it is there").1.status
}

/// Gives a node the parent: four blocks of ones, and a snapshot of them.
fn give_parent(node: &mut SimNode) {
    assert_eq!(ask(node, frame(kind::RECORD, &record(PARENT, 2, 2), Bytes::new())), Status::Ok);
    let attach = Attach { image: PARENT, epoch: 2, holder: [2; 16] };
    assert_eq!(ask(node, frame(kind::ATTACH, &attach, Bytes::new())), Status::Ok);
    let length = 4 * BLOCK_BYTES;
    let io = Io { shard: 0, offset: 0, length, epoch: 2, generation: 2, sequence: 1 };
    let mut head = BytesMut::new();
    io.put(&mut head);
    (0..4).for_each(|_| head.put_u64_le(checksum_of(&[1; BLOCK])));
    let data = Bytes::from(vec![1; length as usize]);
    let write = Frame { head: head.freeze(), ..frame(kind::WRITE, &io, data) };
    assert_eq!(ask(node, write), Status::Ok);
    let frozen = Record { layers: vec![2, 1], snapshots: vec![SNAPSHOT], ..record(PARENT, 2, 3) };
    assert_eq!(ask(node, frame(kind::RECORD, &frozen, Bytes::new())), Status::Ok);
    node.checkpoint_all();
}

struct Cloned {
    nodes: Vec<SimNode>,
    io: ImageIo,
    /// The last answer of each node: its serial, and whether it lacks the parent.
    peeked: Vec<(u64, bool)>,
    events: Vec<Event>,
    answers: Vec<Outcome>,
    /// Nodes that are slow to write, and what was sent to them.
    slow: NodeMask,
    held: Vec<Output>,
}

impl Cloned {
    /// Nodes of which some have the parent.
    fn new(whole: &[usize]) -> Cloned {
        let mut nodes: Vec<SimNode> =
            (0..NODES).map(|index| SimNode::new(index, LogSize::default())).collect();
        whole.iter().for_each(|index| give_parent(&mut nodes[*index]));
        let all = NodeMask((1 << NODES) - 1);
        let geometry = Geometry {
            size_bytes: 8 << 20,
            shard_bytes: SHARD_BYTES,
            placement_key: PARENT,
            replica_sets: 1,
        };
        let head = record(CLONE, 2, 2).head;
        let spec = OpenSpec {
            image: CLONE,
            channel: 7,
            geometry,
            layers: vec![1],
            snapshots: Vec::new(),
            merging: Vec::new(),
            parent: Some(parent()),
            epoch: head.epoch,
            holder: head.holder,
            generation: head.generation,
            digest: head.digest,
            body: Bytes::new(),
            nodes: (1..=NODES).map(|number| format!("node{number}")).collect(),
            sets: vec![SetSpec { members: all, in_sync: all }],
            local: Some(0),
            levelling: HealLimits { bytes_per_second: 0, shards_at_once: 1, share_percent: 100 },
        };
        let mut cloned = Cloned {
            nodes,
            io: ImageIo::new(spec, &Background::default()),
            peeked: vec![(0, false); NODES],
            events: Vec::new(),
            answers: Vec::new(),
            slow: NodeMask::EMPTY,
            held: Vec::new(),
        };
        for index in 0..NODES {
            let instance = cloned.nodes[index].instance();
            cloned.io.link_up(index as NodeIndex, instance, [0; 16]);
        }
        cloned.run();
        cloned
    }

    /// One that is served.
    fn open() -> Cloned {
        let mut cloned = Cloned::new(&[0, 1, 2]);
        cloned.admit_all();
        assert!(cloned.io.is_running(), "{:?}", cloned.io.replica_states());
        cloned
    }

    fn admit_all(&mut self) {
        let peeked = (0..).zip(&self.peeked).map(|(node, (serial, _))| (node, *serial));
        self.io.admit(&peeked.collect::<Vec<_>>(), false);
        self.run();
    }

    fn run(&mut self) {
        while let Some(output) = self.io.outputs.pop_front() {
            match output {
                Output::Send { node, ref head, .. }
                    if self.slow.has(node) && head[KIND_AT] == kind::WRITE =>
                {
                    self.held.push(output);
                }
                Output::Send { node, head, payload } => {
                    let mut bytes = BytesMut::from(&head[..]);
                    bytes.extend_from_slice(&payload);
                    let frame = FrameReader::next(&mut bytes).expect("ours").expect("whole");
                    let process = &mut self.nodes[usize::from(node)];
                    process.take(1, frame);
                    process.sync();
                    let answers: Vec<_> = process.run().answers.drain(..).collect();
                    for (_, answer) in answers {
                        assert_eq!(self.io.receive(node, answer), Ok(()));
                    }
                }
                Output::Event(Event::Peeked { node, serial, parent_missing, .. }) => {
                    self.peeked[usize::from(node)] = (serial, parent_missing);
                }
                Output::Event(event) => self.events.push(event),
                Output::Answer { outcome, .. } => self.answers.push(outcome),
            }
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Outcome {
        let token = Token { client: 1, cookie: 1 };
        self.io.write(token, offset, Bytes::copy_from_slice(data), 0);
        self.run();
        self.answers.pop().expect("an answer")
    }

    /// The first bytes of the first blocks.
    fn read(&mut self, blocks: u32) -> Result<Vec<u8>, IoError> {
        self.io.read(Token { client: 1, cookie: 2 }, 0, blocks * BLOCK_BYTES);
        self.run();
        match self.answers.pop().expect("an answer") {
            Outcome::Read(runs) => {
                Ok(super::readers::flatten(&runs).iter().step_by(BLOCK).copied().collect())
            }
            Outcome::Failed(error) => Err(error),
            outcome => panic!("a read got {outcome:?}"),
        }
    }

    /// Of each of these nodes one block of the parent.
    fn parent_rots(&mut self, rots: &[(usize, u64)]) {
        let place = |block| block * u64::from(BLOCK_BYTES) + 7;
        rots.iter().for_each(|(node, block)| self.nodes[*node].rot(0, place(*block)));
    }

    fn told_rot(&mut self) -> Vec<(NodeIndex, u32)> {
        let told = self.events.drain(..).filter_map(|event| match event {
            Event::ParentRot { node, image, shard, block } => {
                assert_eq!((image, shard), (PARENT, 0));
                Some((node, block))
            }
            Event::BadBlock { .. } | Event::Repaired { .. } => panic!("{event:?}"),
            _ => None,
        });
        told.collect()
    }
}

#[test]
fn a_node_without_the_parent_says_so_and_is_not_let_in() {
    let mut cloned = Cloned::new(&[0, 1]);
    let missing: Vec<bool> = cloned.peeked.iter().map(|(_, missing)| *missing).collect();
    assert_eq!(missing, [false, false, true]);
    cloned.admit_all();
    let refused = Event::AdmitFailed { node: 2, status: Status::NoParent };
    assert_eq!(cloned.events, [refused]);
    assert!(!cloned.io.is_running());
    // It has the clone's record now, and still says so.
    cloned.peeked[2].1 = false;
    cloned.io.peek(2);
    cloned.run();
    assert!(cloned.peeked[2].1);
    give_parent(&mut cloned.nodes[2]);
    (0..3).for_each(|node| cloned.io.peek(node));
    cloned.run();
    assert!(!cloned.peeked[2].1);
    cloned.admit_all();
    assert!(cloned.io.is_running(), "{:?}", cloned.io.replica_states());
    assert_eq!(cloned.read(5), Ok(vec![1, 1, 1, 1, 0]));
}

#[test]
fn readers_and_peeks_of_clones_are_refused_without_the_parent() {
    let mut node = SimNode::new(0, LogSize::default());
    let (shard_bytes, none) = (SHARD_BYTES, Bytes::new());
    let peek =
        |parent| frame(kind::PEEK, &Peek { image: CLONE, shard_bytes, parent }, none.clone());
    assert_eq!(ask(&mut node, peek(None)), Status::NoRecord);
    assert_eq!(ask(&mut node, peek(Some(parent()))), Status::NoParent);
    let snapshots = vec![SnapshotId { layer: 1, generation: 3 }];
    let stored = Record { layers: vec![2, 1], snapshots, ..record(CLONE, 2, 3) };
    assert_eq!(ask(&mut node, frame(kind::RECORD, &stored, none.clone())), Status::Ok);
    let reader = AttachReader { image: CLONE, snapshot: SNAPSHOT };
    let reader = frame(kind::ATTACH_READER, &reader, none.clone());
    assert_eq!(ask(&mut node, reader.clone()), Status::NoParent);
    give_parent(&mut node);
    assert_eq!(ask(&mut node, peek(Some(parent()))), Status::Ok);
    assert_eq!(ask(&mut node, reader), Status::Ok);
    let read = |length| Io { shard: 0, offset: 0, length, epoch: 0, generation: 0, sequence: 0 };
    let read = frame(kind::READ, &read(BLOCK_BYTES), none);
    assert_eq!(ask(&mut node, read.clone()), Status::Ok);
    node.run().store.delete(PARENT).expect("a tombstone");
    assert_eq!(ask(&mut node, read), Status::NoParent);
}

#[test]
fn rot_in_the_parent_is_answered_by_another_node_and_told_once() {
    let mut cloned = Cloned::open();
    cloned.parent_rots(&[(0, 0)]);
    for _ in 0..3 {
        assert_eq!(cloned.read(4), Ok(vec![1; 4]));
    }
    assert_eq!(cloned.told_rot(), [(0, 0)]);
    cloned.io.set_now(61_000_000_000);
    assert_eq!(cloned.read(4), Ok(vec![1; 4]));
    assert_eq!(cloned.told_rot(), [(0, 0)], "again, as it is still met");
    assert_eq!(cloned.io.rot_state().found, 0);
}

/// The node that cannot merge a small write into its parent's block has the result from those that could.
#[test]
fn a_small_write_over_rot_in_the_parent_leaves_no_node_behind() {
    let mut cloned = Cloned::open();
    cloned.parent_rots(&[(0, 0)]);
    assert_eq!(cloned.write(5, &[2; 10]), Outcome::Done);
    assert_eq!(cloned.told_rot(), [(0, 0)]);
    for node in &mut cloned.nodes {
        let (mut states, mut data) = (Vec::new(), BytesMut::new());
        let view = crate::store::View::own(CLONE, &[1]);
        node.run().store.read(view, 0, 0, 1, &mut states, &mut data).expect("its own layer");
        let mut merged = vec![1; BLOCK];
        merged[5..15].fill(2);
        assert_eq!(data, merged);
    }
}

/// The others were slower by some milliseconds: the node was asked again and again at once, and left behind.
#[test]
fn a_small_write_over_rot_in_the_parent_waits_for_slow_nodes() {
    let mut cloned = Cloned::open();
    cloned.parent_rots(&[(0, 0)]);
    cloned.slow = NodeMask(0b110);
    cloned.io.write(Token { client: 1, cookie: 1 }, 5, Bytes::from_static(&[2; 10]), 0);
    for _ in 0..40 {
        cloned.run();
        cloned.io.tick();
    }
    assert_eq!(cloned.answers, []);
    cloned.slow = NodeMask::EMPTY;
    let held = std::mem::take(&mut cloned.held);
    cloned.io.outputs.extend(held);
    cloned.run();
    assert_eq!(cloned.answers, [Outcome::Done]);
    let failed = |event: &Event| matches!(event, Event::ReplicaFailed { .. });
    assert!(!cloned.events.iter().any(failed), "{:?}", cloned.events);
    assert_eq!(cloned.read(2), Ok(vec![1, 1]));
}

#[test]
fn rot_in_the_parent_on_all_nodes_fails_what_needs_the_block_and_nothing_else() {
    let mut cloned = Cloned::open();
    cloned.parent_rots(&[(0, 0), (1, 0), (2, 0)]);
    assert_eq!(cloned.read(2), Err(IoError::Io));
    assert_eq!(cloned.write(5, &[2; 10]), Outcome::Failed(IoError::Io));
    assert_eq!(cloned.write(u64::from(BLOCK_BYTES) + 5, &[2; 10]), Outcome::Done);
    assert_eq!(cloned.write(0, &[3; BLOCK]), Outcome::Done);
    assert_eq!(cloned.read(3), Ok(vec![3, 1, 1]));
    assert_eq!(cloned.told_rot().len(), 3);
}
