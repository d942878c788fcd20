//! Pulls between two real stores, each the story of a mistake that one of their rules closes. Holders are
//! played frame by frame: what they are here is late, dead, or of another mind by now.

use crate::checksum::checksum_of;
use crate::content::Block;
use crate::geometry::{BLOCK_BYTES, ImageId, Tag};
use crate::node::pulls::Effect;
use crate::rules::{Rule, break_rules};
use crate::simulation::{LogSize, NodeRun, SimNode};
use crate::store::View;
use crate::wire::copies::{PeerFetch, Pull, Source};
use crate::wire::messages::{Attach, Copy, Head, Io, Number, Record, RecordHead, ShardRange};
use crate::wire::{Frame, REPLY, Status, kind};
use bytes::{BufMut, Bytes, BytesMut};
use std::collections::VecDeque;

const IMAGE: ImageId = ImageId([0xA1; 16]);
const SHARD_BYTES: u32 = 1 << 20;
const HOLDER: u64 = 1;
const NEXT_HOLDER: u64 = 2;
const PEER: u64 = 9;
const CHANNEL: u32 = 5;
const TAG: u64 = 77;

fn frame(kind: u8, head: &impl Head, payload: Bytes) -> Frame {
    let mut bytes = BytesMut::new();
    head.put(&mut bytes);
    let (status, head) = (Status::Ok, bytes.freeze());
    Frame { kind, flags: 0, status, channel: CHANNEL, tag: TAG, head, payload }
}

fn content(value: u8) -> Bytes {
    Bytes::from(vec![value; BLOCK_BYTES as usize])
}

fn range() -> ShardRange {
    ShardRange { epoch: 2, layer: 1, shard: 0, first_block: 0, blocks: 1 }
}

/// The holder's order for that block.
fn order() -> Pull {
    let address = "127.0.0.1:7001".parse().expect("an address");
    let source = Source { node: "node1".into(), address };
    let (epoch, generation, layer, shard) = (2, 2, 1, 0);
    Pull { epoch, generation, layer, shard, first_block: 0, blocks: 1, source }
}

fn record_head(epoch: u64, generation: u64) -> RecordHead {
    let (holder, digest) = ([epoch as u8; 16], [generation as u8; 32]);
    RecordHead { image: IMAGE, epoch, holder, generation, digest, shard_bytes: SHARD_BYTES }
}

/// A node that has what another one is to be given, and that one.
struct Pair {
    source: SimNode,
    target: SimNode,
    /// What the source has answered, and the target has not heard yet.
    on_its_way: VecDeque<(u64, Frame)>,
}

impl Pair {
    /// Both are attached by a holder of epoch 2, generation 2; the source's first block is all ones.
    fn new() -> Pair {
        let node = |name| {
            let mut node = SimNode::new(name, LogSize::default());
            node.start().expect("the store opens");
            node
        };
        let (source, target) = (node("node1"), node("node2"));
        let mut pair = Pair { source, target, on_its_way: VecDeque::new() };
        for node in [&mut pair.source, &mut pair.target] {
            attach(run(node), HOLDER, 2, 2);
        }
        assert_eq!(write(run(&mut pair.source), HOLDER, 2, 2, 1), Status::Ok);
        pair
    }

    /// The holder orders the pull; it has come as far as the answer of the source.
    fn pull(&mut self) {
        let pull = frame(kind::PULL, &order(), Bytes::new());
        let taken = run(&mut self.target).take(HOLDER, pull, 0);
        assert_eq!(taken, Ok(None), "its answer comes later");
        self.carry_out();
    }

    fn carry_out(&mut self) {
        loop {
            let effects = run(&mut self.target).pull_effects();
            if effects.is_empty() {
                return;
            }
            for effect in effects {
                match effect {
                    Effect::Connect { peer, .. } => run(&mut self.target).peer_greeted(peer, 0),
                    Effect::Ask { peer, tag, asked } => {
                        let ask = frame(kind::PEER_FETCH, &asked, Bytes::new());
                        let ask = Frame { tag, channel: 0, ..ask };
                        let answer = asked_of(run(&mut self.source), PEER, ask);
                        self.on_its_way.push_back((peer, answer));
                    }
                    Effect::Close { .. } => {}
                }
            }
        }
    }

    /// What is on its way arrives. Gives what the holder that ordered it hears.
    fn arrive(&mut self) -> Vec<(u64, Status)> {
        while let Some((peer, answer)) = self.on_its_way.pop_front() {
            let taken = run(&mut self.target).peer_answers(peer, answer, 0);
            assert_eq!(taken, Ok(true));
        }
        let answers = run(&mut self.target).answers.drain(..);
        let pulls = answers.filter(|(_, frame)| frame.kind == kind::PULL | REPLY);
        pulls.map(|(connection, frame)| (connection, frame.status)).collect()
    }

    /// The value that the target's first block is full of; 0: nothing was ever written to it.
    fn held(&mut self) -> u8 {
        let (mut states, mut data) = (Vec::new(), BytesMut::new());
        let store = &mut run(&mut self.target).store;
        store.read_blocks(View::own(IMAGE, &[1]), 0, 0, 1, &mut states, &mut data).expect("intact");
        data.first().copied().unwrap_or(0)
    }
}

fn run(node: &mut SimNode) -> &mut NodeRun {
    node.run.as_mut().expect("a node that runs")
}

/// The node's answer.
fn asked_of(node: &mut NodeRun, connection: u64, asked: Frame) -> Frame {
    let kind = asked.kind | REPLY;
    node.take(connection, asked, 0).expect("the store works");
    node.begin_sync().expect("a sync begins");
    node.finish_sync().expect("a sync succeeds");
    let place = node.answers.iter().position(|(_, frame)| frame.kind == kind);
    node.answers.remove(place.expect("an answer")).expect("it is there").1
}

fn store_record(node: &mut NodeRun, connection: u64, epoch: u64, generation: u64) {
    let head = record_head(epoch, generation);
    let record = Record {
        head,
        blank: false,
        layers: vec![1],
        snapshots: Vec::new(),
        merging: Vec::new(),
        parent: None,
    };
    let stored = asked_of(node, connection, frame(kind::RECORD, &record, Bytes::new()));
    assert_eq!(stored.status, Status::Ok);
}

fn attach(node: &mut NodeRun, connection: u64, epoch: u64, generation: u64) {
    store_record(node, connection, epoch, generation);
    let attach = Attach { image: IMAGE, epoch, holder: [epoch as u8; 16] };
    let attached = asked_of(node, connection, frame(kind::ATTACH, &attach, Bytes::new()));
    assert_eq!(attached.status, Status::Ok);
}

fn write(node: &mut NodeRun, connection: u64, epoch: u64, generation: u64, value: u8) -> Status {
    let (offset, length, sequence) = (0, BLOCK_BYTES, u64::from(value));
    let io = Io { shard: 0, offset, length, epoch, generation, sequence };
    let data = content(value);
    let mut head = BytesMut::new();
    io.put(&mut head);
    head.put_u64_le(checksum_of(&data));
    let write = Frame { head: head.freeze(), ..frame(kind::WRITE, &io, data) };
    asked_of(node, connection, write).status
}

#[test]
fn a_pull_gives_a_node_what_another_one_has_with_its_tag() {
    let mut pair = Pair::new();
    pair.pull();
    assert_eq!(pair.held(), 0);
    assert_eq!(pair.arrive(), [(HOLDER, Status::Ok)]);
    assert_eq!(pair.held(), 1);
    let summary = frame(kind::SUMMARY, &range(), Bytes::new());
    let of = |node: &mut NodeRun| asked_of(node, HOLDER, summary.clone()).head;
    assert_eq!(of(run(&mut pair.source)), of(run(&mut pair.target)));
}

/// A holder ordered a pull, gave that work up as another node was lost, compared anew, had the blocks by
/// another way, and sent what its client wrote then. The pull arrived, and undid the write.
#[test]
fn what_was_pulled_for_work_that_was_given_up_never_lands_on_newer_data() {
    let copy = Copy {
        epoch: 2,
        generation: 2,
        layer: 1,
        shard: 0,
        shard_generation: 2,
        indexes: vec![0],
        blocks: vec![(Block::Data(checksum_of(&content(3))), Tag { epoch: 2, sequence: 3 })],
    };
    type Overtake = Box<dyn Fn(&mut NodeRun) -> Status>;
    let asks = |asked: Frame| -> Overtake {
        Box::new(move |node| asked_of(node, HOLDER, asked.clone()).status)
    };
    let ways: [(Overtake, u8); 3] = [
        (Box::new(|node| write(node, HOLDER, 2, 2, 2)), 2),
        (asks(frame(kind::COPY, &copy, content(3))), 3),
        (asks(frame(kind::SUMMARY, &range(), Bytes::new())), 0),
    ];
    for (overtake, held) in ways {
        for broken in [false, true] {
            break_rules(if broken { &[Rule::PullsAreOvertaken] } else { &[] });
            let mut pair = Pair::new();
            pair.pull();
            assert_eq!(overtake(run(&mut pair.target)), Status::Ok);
            let answers = pair.arrive();
            let held_now = pair.held();
            break_rules(&[]);
            match broken {
                false => assert_eq!((answers, held_now), (vec![(HOLDER, Status::Cancelled)], held)),
                true => assert_eq!((answers, held_now), (vec![(HOLDER, Status::Ok)], 1)),
            }
        }
    }
}

/// The next holder's client had written by the time that a pull of the former one came in.
#[test]
fn what_a_former_holder_had_pulled_never_lands() {
    for broken in [false, true] {
        break_rules(if broken { &[Rule::PullsEndWithTheirSession] } else { &[] });
        let mut pair = Pair::new();
        pair.pull();
        attach(run(&mut pair.target), NEXT_HOLDER, 3, 2);
        // It comes on another connection, and so overtakes nothing.
        assert_eq!(write(run(&mut pair.target), NEXT_HOLDER, 3, 2, 2), Status::Ok);
        pair.arrive();
        let held = pair.held();
        break_rules(&[]);
        assert_eq!(held, if broken { 1 } else { 2 });
    }
}

/// A pull was ordered under a membership that no longer was, or in a session that had begun anew on the
/// same channel.
#[test]
fn a_new_record_and_a_new_session_of_the_same_holder_end_pulls_too() {
    for again in [false, true] {
        let mut pair = Pair::new();
        pair.pull();
        match again {
            true => attach(run(&mut pair.target), HOLDER, 2, 2),
            false => store_record(run(&mut pair.target), HOLDER, 2, 3),
        }
        assert_eq!(pair.arrive(), [(HOLDER, Status::Cancelled)]);
        assert_eq!(pair.held(), 0);
    }
    let mut pair = Pair::new();
    pair.pull();
    run(&mut pair.target).end_connection(HOLDER);
    assert_eq!(pair.arrive(), []);
    assert_eq!(pair.held(), 0);
}

/// A node that had restarted, or was in another membership, gave blocks of which nobody knew what they were.
#[test]
fn a_source_gives_only_what_its_present_holder_has_ordered() {
    let ask = |epoch, generation| {
        let (image, layer, shard, first_block, blocks) = (IMAGE, 1, 0, 0, 1);
        let asked = PeerFetch { image, epoch, generation, layer, shard, first_block, blocks };
        frame(kind::PEER_FETCH, &asked, Bytes::new())
    };
    let refusals = |pair: &mut Pair| {
        let mut of = |epoch, generation| {
            asked_of(run(&mut pair.source), PEER, ask(epoch, generation)).status
        };
        [of(2, 2), of(1, 2), of(3, 2), of(2, 1), of(2, 3)]
    };
    let mut pair = Pair::new();
    let (epoch, generation) = (Status::StaleEpoch, Status::StaleGeneration);
    assert_eq!(refusals(&mut pair), [Status::Ok, epoch, epoch, generation, generation]);
    break_rules(&[Rule::PeersAskUnderTheRecord]);
    assert_eq!(refusals(&mut pair), [Status::Ok; 5]);
    break_rules(&[]);
    pair.source.stop(None);
    pair.source.start().expect("the store opens");
    assert_eq!(refusals(&mut pair)[0], Status::NoSession, "nobody has admitted this instance");
    attach(run(&mut pair.source), HOLDER, 2, 2);
    assert_eq!(refusals(&mut pair)[0], Status::Ok);
    run(&mut pair.source).store.distrust([IMAGE]);
    assert_eq!(refusals(&mut pair)[0], Status::NoLayers);
    run(&mut pair.source).store.delete(IMAGE).expect("it is here");
    assert_eq!(refusals(&mut pair)[0], Status::Deleted);
}

#[test]
fn a_peer_asks_for_blocks_and_for_nothing_else() {
    let mut pair = Pair::new();
    let source = run(&mut pair.source);
    let io = Io { shard: 0, offset: 0, length: 4096, epoch: 2, generation: 2, sequence: 0 };
    let (image, epoch, generation, layer, shard) = (IMAGE, 2, 2, 1, 0);
    let (first_block, blocks) = (0, 1);
    let asked = PeerFetch { image, epoch, generation, layer, shard, first_block, blocks };
    let asked = frame(kind::PEER_FETCH, &asked, Bytes::new());
    assert_eq!(source.take(HOLDER, asked.clone(), 0), Ok(None));
    assert_eq!(source.sent_away.pop(), Some(HOLDER));
    assert_eq!(asked_of(source, PEER, asked).status, Status::Ok);
    assert_eq!(source.take(PEER, frame(kind::READ, &io, Bytes::new()), 0), Ok(None));
    assert_eq!(source.sent_away.pop(), Some(PEER));
}

/// Blocks that came while the log was full were dropped, and all of a large heal went by another way.
#[test]
fn what_was_pulled_waits_for_room_in_the_log() {
    let log = LogSize { log_bytes: 512 << 10, segment_bytes: 64 << 10 };
    let mut pair = Pair::new();
    pair.target = SimNode::new("node2", log);
    pair.target.start().expect("the store opens");
    attach(run(&mut pair.target), HOLDER, 2, 2);
    pair.pull();
    // Of another shard, until there is no room.
    let mut sequence = 0;
    while run(&mut pair.target).takes(HOLDER) {
        sequence += 1;
        let (offset, length) = (0, BLOCK_BYTES);
        let io = Io { shard: 1, offset, length, epoch: 2, generation: 2, sequence };
        let mut head = BytesMut::new();
        io.put(&mut head);
        head.put_u64_le(checksum_of(&content(7)));
        let write = Frame { head: head.freeze(), ..frame(kind::WRITE, &io, content(7)) };
        run(&mut pair.target).take(HOLDER, write, 0).expect("the store works");
        run(&mut pair.target).answers.clear();
    }
    let waits = pair.arrive().is_empty();
    run(&mut pair.target).begin_checkpoint(true).expect("it begins");
    let parked = run(&mut pair.target).finish_checkpoint().expect("a checkpoint succeeds");
    assert!(!parked.is_empty());
    if waits {
        assert_eq!(pair.arrive(), [(HOLDER, Status::Ok)]);
    }
    assert_eq!((pair.held(), waits), (1, true));
}

#[test]
fn the_count_in_the_answer_is_of_data() {
    let mut pair = Pair::new();
    pair.pull();
    while let Some((peer, answer)) = pair.on_its_way.pop_front() {
        assert_eq!(run(&mut pair.target).peer_answers(peer, answer, 0), Ok(true));
    }
    let (_, answer) = run(&mut pair.target).answers.pop_back().expect("an answer");
    assert_eq!(Number::take(answer.head), Ok(Number(u64::from(BLOCK_BYTES))));
}

/// A node has told that nothing is left in a layer which goes: nothing must come to it late.
#[test]
fn nothing_is_pulled_into_a_layer_that_is_merged_or_takes_one_in() {
    for (layer, answered) in [(3, None), (2, Some(Status::Cancelled)), (1, Some(Status::Cancelled))]
    {
        let mut pair = Pair::new();
        let target = run(&mut pair.target);
        let head = record_head(2, 3);
        let (layers, merging) = (vec![3, 2, 1], vec![1]);
        let record =
            Record { head, blank: false, layers, snapshots: Vec::new(), merging, parent: None };
        let stored = asked_of(target, HOLDER, frame(kind::RECORD, &record, Bytes::new()));
        assert_eq!(stored.status, Status::Ok);
        let pull = Pull { generation: 3, layer, ..order() };
        let taken = target.take(HOLDER, frame(kind::PULL, &pull, Bytes::new()), 0);
        assert_eq!(taken.expect("the store works"), answered);
    }
}
