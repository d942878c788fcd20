//! Pulls: blocks that an image's holder has this node fetch from another one, from the order until they are
//! applied. Without I/O: connections, frames and time come in, effects and answers go out.
//!
//! | a pull is | meaning | leaves by |
//! | --- | --- | --- |
//! | `Asked` | the other node is asked, or will be when it has greeted | its answer → `Landed`; an end → answered `Unreachable` |
//! | `Landed` | its blocks are here | applied, or refused for want of room → answered; no room in the log yet → stays |
//!
//! Whom they are asked of, and over which connections, `sources` keeps; what overtakes them, `reach` says; how they
//! are applied, `landing`.
//!
//! Invariants:
//! - a pull that is not applied is dropped by whatever comes later on its session about its blocks: a change of
//!   them, another pull or copy of them, a summary of their shard. A copy that its holder has long given up so
//!   never lands on newer data;
//! - it is applied in the very session, epoch and generation that it was ordered in, or not at all
//!   (`Requests::land`);
//! - each is answered once, in bounded time where the log has room.
//!
//! Its refusal: what is more than so many at once is not queued but refused.

mod landing;
mod reach;
mod sources;

use crate::geometry::ShardKey;
use crate::rules::{Rule, broken};
use crate::wire::copies::{PeerFetch, Source};
use crate::wire::messages::{BadBlock, Head};
use crate::wire::{Frame, REPLY, Status, kind};
use bytes::Bytes;
use reach::reach;
pub(crate) use sources::Effect;
use sources::Sources;
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

/// Pulls under way at once: of a node, and of one session. Each has at most a payload in memory.
const PULLS_MAX: usize = 32;
const SESSION_PULLS_MAX: usize = 16;
/// After so long a pull whose blocks are not here is answered, whatever its source says meanwhile.
const PULL_NS: u64 = 10_000_000_000;

/// What a holder has ordered.
#[derive(Clone, Debug)]
pub(crate) struct PullOrder {
    /// Whom to answer: connection, channel, tag.
    pub connection: u64,
    pub channel: u32,
    pub tag: u64,
    /// The serial of the session that it was ordered in.
    pub session: u64,
    pub key: ShardKey,
    pub epoch: u64,
    pub generation: u64,
    pub blocks: Range<u32>,
    pub source: Source,
}

/// What is to be said to a holder of its order.
#[derive(Debug)]
pub(crate) struct PullAnswer {
    pub order: PullOrder,
    pub status: Status,
    pub head: Bytes,
    /// What the other node said along with the blocks.
    pub flags: u8,
}

/// An answer that no honest node gives; its connection has to end.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct BadPeer;

enum Stage {
    Asked { peer: u64 },
    Landed(Frame),
}

struct Entry {
    order: PullOrder,
    ordered_ns: u64,
    stage: Stage,
}

impl Entry {
    fn is_asked_of(&self, peer: u64) -> bool {
        matches!(self.stage, Stage::Asked { peer: of } if of == peer)
    }
}

/// All pulls of a node.
#[derive(Default)]
pub(crate) struct Pulls {
    /// By serial, so in the order in which they came; the serial is the tag that the source is asked with.
    entries: BTreeMap<u64, Entry>,
    sources: Sources,
    serial: u64,
    pub answers: VecDeque<PullAnswer>,
}

impl Pulls {
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Takes an order. What of it cannot be done is answered.
    pub fn order(&mut self, order: PullOrder, now_ns: u64) {
        let of_session = |entry: &&Entry| {
            let other = &entry.order;
            (other.connection, other.channel) == (order.connection, order.channel)
        };
        let under_way = self.entries.values().filter(of_session).count();
        if self.entries.len() >= PULLS_MAX || under_way >= SESSION_PULLS_MAX {
            return self.answer(order, Status::Cancelled);
        }
        let is_asked = |peer| is_asked(&self.entries, peer);
        let Some(peer) = self.sources.peer_of(&order.source, now_ns, is_asked) else {
            return self.answer(order, Status::Unreachable);
        };
        self.serial += 1;
        let tag = self.serial;
        self.sources.ask(peer, tag, asked_of(&order));
        let (ordered_ns, stage) = (now_ns, Stage::Asked { peer });
        self.entries.insert(tag, Entry { order, ordered_ns, stage });
        assert!(self.entries.len() <= PULLS_MAX, "pulls are bounded");
    }

    fn answer(&mut self, order: PullOrder, status: Status) {
        self.answers.push_back(PullAnswer { order, status, head: Bytes::new(), flags: 0 });
    }

    /// The next thing that is to be done with a connection to another node.
    pub fn next_effect(&mut self) -> Option<Effect> {
        self.sources.effects.pop_front()
    }

    // What comes of other nodes

    /// The peer has greeted as the node that was meant: what waits for it is asked.
    pub fn greeted(&mut self, peer: u64, now_ns: u64) {
        self.sources.greeted(peer, now_ns);
        for (tag, entry) in &self.entries {
            if entry.is_asked_of(peer) {
                self.sources.ask(peer, *tag, asked_of(&entry.order));
            }
        }
    }

    /// Bytes have come of the peer.
    pub fn heard(&mut self, peer: u64, now_ns: u64) {
        self.sources.heard(peer, now_ns);
    }

    /// Takes a peer's answer; one to a pull that was dropped meanwhile is forgotten.
    ///
    /// # Errors
    /// The peer breaks the protocol: close its connection (and tell `ended`).
    pub fn take(&mut self, peer: u64, frame: Frame) -> Result<(), BadPeer> {
        if frame.kind != kind::PEER_FETCH | REPLY || !self.sources.answered(peer) {
            return Err(BadPeer);
        }
        let Some(entry) = self.entries.get_mut(&frame.tag) else { return Ok(()) };
        if !entry.is_asked_of(peer) {
            return Err(BadPeer);
        }
        let status = match frame.status {
            Status::Ok => {
                entry.stage = Stage::Landed(frame);
                return Ok(());
            }
            Status::BadBlock => {
                let bad = BadBlock::take(frame.head.clone()).map_err(|_| BadPeer)?;
                if !entry.order.blocks.contains(&bad.block) || bad.image != entry.order.key.image {
                    return Err(BadPeer);
                }
                Status::BadBlock
            }
            _ => Status::Unreachable,
        };
        let head = if status == Status::BadBlock { frame.head } else { Bytes::new() };
        self.end(frame.tag, status, head, frame.flags);
        Ok(())
    }

    /// The connection to the peer is gone, or was never made.
    pub fn ended(&mut self, peer: u64, now_ns: u64) {
        if !self.sources.ended(peer, now_ns) {
            return;
        }
        let asked = self.entries.iter().filter(|(_, entry)| entry.is_asked_of(peer));
        let asked: Vec<u64> = asked.map(|(tag, _)| *tag).collect();
        asked.into_iter().for_each(|tag| self.end(tag, Status::Unreachable, Bytes::new(), 0));
    }

    /// Time has passed.
    pub fn tick(&mut self, now_ns: u64) {
        let is_asked = |peer| is_asked(&self.entries, peer);
        let silent = self.sources.tick(now_ns, is_asked);
        silent.into_iter().for_each(|peer| self.ended(peer, now_ns));
        let waits = |entry: &Entry| matches!(entry.stage, Stage::Asked { .. });
        let late = |entry: &Entry| waits(entry) && now_ns > entry.ordered_ns + PULL_NS;
        let late = self.entries.iter().filter(|(_, entry)| late(entry));
        let late: Vec<u64> = late.map(|(tag, _)| *tag).collect();
        late.into_iter().for_each(|tag| self.end(tag, Status::Unreachable, Bytes::new(), 0));
    }

    // What comes of holders

    /// A request of a holder comes: pulls that it is about, and that are not applied, are dropped.
    pub fn overtaken(&mut self, connection: u64, frame: &Frame) {
        if self.entries.is_empty() || broken(Rule::PullsAreOvertaken) {
            return;
        }
        let Some((shard, blocks)) = reach(frame) else { return };
        let concerns = |order: &PullOrder| {
            (order.connection, order.channel) == (connection, frame.channel)
                && order.key.shard == shard
                && order.blocks.start < blocks.end
                && blocks.start < order.blocks.end
        };
        let overtaken = self.entries.iter().filter(|(_, entry)| concerns(&entry.order));
        let overtaken: Vec<u64> = overtaken.map(|(tag, _)| *tag).collect();
        overtaken.into_iter().for_each(|tag| self.end(tag, Status::Cancelled, Bytes::new(), 0));
    }

    /// A holder's connection is gone: nobody waits for its pulls, and they do not count any more.
    pub fn connection_ended(&mut self, connection: u64) {
        if !broken(Rule::PullsEndWithTheirSession) {
            self.entries.retain(|_, entry| entry.order.connection != connection);
        }
        self.answers.retain(|answer| answer.order.connection != connection);
    }

    // Landing

    /// The first pull, from this one on, whose blocks are here.
    pub fn landed(&self, from: u64) -> Option<(u64, &PullOrder, &Frame)> {
        self.entries.range(from..).find_map(|(tag, entry)| match &entry.stage {
            Stage::Landed(frame) => Some((*tag, &entry.order, frame)),
            Stage::Asked { .. } => None,
        })
    }

    /// A pull is over: what became of it is to be said.
    pub fn end(&mut self, tag: u64, status: Status, head: Bytes, flags: u8) {
        if let Some(Entry { order, .. }) = self.entries.remove(&tag) {
            self.answers.push_back(PullAnswer { order, status, head, flags });
        }
    }
}

fn is_asked(entries: &BTreeMap<u64, Entry>, peer: u64) -> bool {
    entries.values().any(|entry| entry.is_asked_of(peer))
}

fn asked_of(order: &PullOrder) -> PeerFetch {
    PeerFetch {
        image: order.key.image,
        epoch: order.epoch,
        generation: order.generation,
        layer: order.key.layer,
        shard: order.key.shard,
        first_block: order.blocks.start,
        blocks: order.blocks.end - order.blocks.start,
    }
}

#[cfg(test)]
mod tests {
    use super::sources::{CONNECT_NS, IDLE_NS, PEERS_MAX, REST_NS, SILENCE_NS};
    use super::*;
    use crate::geometry::{BLOCK_BYTES, ImageId};
    use crate::wire::Prefix;
    use crate::wire::copies::Pull;
    use crate::wire::messages::{Copy, Io, ShardRange};
    use bytes::BytesMut;

    const SECOND_NS: u64 = 1_000_000_000;

    fn source(number: u16) -> Source {
        let address = format!("127.0.0.1:{}", 1000 + number).parse().expect("an address");
        Source { node: format!("node{number}"), address }
    }

    fn order(tag: u64, blocks: Range<u32>, from: u16) -> PullOrder {
        PullOrder {
            connection: 1,
            channel: 3,
            tag,
            session: 1,
            key: ShardKey { image: ImageId([1; 16]), layer: 1, shard: 5 },
            epoch: 2,
            generation: 2,
            blocks,
            source: source(from),
        }
    }

    fn frame(kind: u8, channel: u32, tag: u64, head: &impl Head) -> Frame {
        let mut bytes = BytesMut::new();
        head.put(&mut bytes);
        let Prefix { flags, status, .. } = Prefix::request(kind, 0, channel, tag);
        Frame { kind, flags, status, channel, tag, head: bytes.freeze(), payload: Bytes::new() }
    }

    fn answered(pulls: &mut Pulls) -> Vec<(u64, Status)> {
        pulls.answers.drain(..).map(|answer| (answer.order.tag, answer.status)).collect()
    }

    /// A connection's peer, and the tags that were asked of it.
    fn asked(pulls: &mut Pulls) -> Vec<u64> {
        let effects = pulls.sources.effects.drain(..);
        effects
            .filter_map(|effect| match effect {
                Effect::Ask { tag, .. } => Some(tag),
                _ => None,
            })
            .collect()
    }

    fn connecting(pulls: &mut Pulls) -> u64 {
        match pulls.sources.effects.pop_front() {
            Some(Effect::Connect { peer, .. }) => peer,
            other => panic!("no connection is begun but {other:?}"),
        }
    }

    fn empty(tag: u64, status: Status) -> Frame {
        let kind = kind::PEER_FETCH | REPLY;
        let (head, payload) = (Bytes::new(), Bytes::new());
        Frame { kind, flags: 0, status, channel: 0, tag, head, payload }
    }

    #[test]
    fn pulls_of_one_source_share_a_connection_and_wait_for_its_greeting() {
        let mut pulls = Pulls::default();
        pulls.order(order(7, 0..4, 1), 0);
        let peer = connecting(&mut pulls);
        pulls.order(order(8, 4..8, 1), 0);
        assert!(pulls.sources.effects.is_empty(), "it has not greeted");
        pulls.greeted(peer, 1);
        let tags = asked(&mut pulls);
        assert_eq!(tags.len(), 2);
        assert_eq!(pulls.take(peer, empty(tags[1], Status::Ok)), Ok(()));
        assert_eq!(pulls.landed(0).map(|(tag, order, _)| (tag, order.tag)), Some((tags[1], 8)));
        pulls.end(tags[1], Status::Ok, Bytes::new(), 0);
        assert_eq!(answered(&mut pulls), [(8, Status::Ok)]);
        assert_eq!(pulls.take(peer, empty(tags[0], Status::StaleEpoch)), Ok(()));
        assert_eq!(answered(&mut pulls), [(7, Status::Unreachable)]);
        assert_eq!(pulls.take(peer, empty(tags[0], Status::Ok)), Err(BadPeer), "it owes nothing");
    }

    #[test]
    fn a_source_that_cannot_be_reached_is_not_tried_again_for_a_second() {
        let mut pulls = Pulls::default();
        pulls.order(order(7, 0..4, 1), 0);
        let peer = connecting(&mut pulls);
        pulls.tick(CONNECT_NS);
        assert!(answered(&mut pulls).is_empty());
        pulls.tick(CONNECT_NS + 1);
        assert_eq!(answered(&mut pulls), [(7, Status::Unreachable)]);
        assert!(
            matches!(pulls.sources.effects.pop_front(), Some(Effect::Close { peer: p }) if p == peer)
        );
        pulls.order(order(8, 0..4, 1), CONNECT_NS + 2);
        assert_eq!(answered(&mut pulls), [(8, Status::Unreachable)]);
        assert!(pulls.sources.effects.is_empty());
        pulls.order(order(9, 0..4, 1), CONNECT_NS + 2 + REST_NS);
        assert_ne!(connecting(&mut pulls), peer);
    }

    #[test]
    fn a_silent_source_is_given_up_and_an_idle_one_closed() {
        let mut pulls = Pulls::default();
        pulls.order(order(7, 0..4, 1), 0);
        let peer = connecting(&mut pulls);
        pulls.greeted(peer, 0);
        assert_eq!(asked(&mut pulls).len(), 1);
        pulls.heard(peer, SECOND_NS);
        pulls.tick(SECOND_NS + SILENCE_NS);
        assert!(answered(&mut pulls).is_empty(), "it said something a moment ago");
        pulls.tick(SECOND_NS + SILENCE_NS + 1);
        assert_eq!(answered(&mut pulls), [(7, Status::Unreachable)]);
        pulls.tick(20 * SECOND_NS);
        pulls.sources.effects.clear();
        pulls.order(order(8, 0..4, 1), 21 * SECOND_NS);
        let peer = connecting(&mut pulls);
        pulls.greeted(peer, 21 * SECOND_NS);
        let tags = asked(&mut pulls);
        assert_eq!(pulls.take(peer, empty(tags[0], Status::StaleGeneration)), Ok(()));
        pulls.tick(21 * SECOND_NS + IDLE_NS);
        assert!(pulls.sources.effects.is_empty());
        pulls.tick(21 * SECOND_NS + IDLE_NS + 1);
        assert!(matches!(pulls.sources.effects.pop_front(), Some(Effect::Close { .. })));
    }

    #[test]
    fn a_source_that_never_comes_to_an_end_is_waited_for_ten_seconds() {
        let mut pulls = Pulls::default();
        pulls.order(order(7, 0..4, 1), 0);
        let peer = connecting(&mut pulls);
        pulls.greeted(peer, 0);
        let tag = asked(&mut pulls)[0];
        for second in 0..=10 {
            pulls.heard(peer, second * SECOND_NS);
            pulls.tick(second * SECOND_NS);
            assert!(answered(&mut pulls).is_empty());
        }
        pulls.tick(PULL_NS + 1);
        assert_eq!(answered(&mut pulls), [(7, Status::Unreachable)]);
        assert_eq!(pulls.take(peer, empty(tag, Status::Ok)), Ok(()), "late, and owed");
        assert_eq!(pulls.take(peer, empty(tag, Status::Ok)), Err(BadPeer));
    }

    #[test]
    fn what_comes_later_about_blocks_drops_the_pull_of_them() {
        let io =
            |offset, length| Io { shard: 5, offset, length, epoch: 2, generation: 2, sequence: 9 };
        let summary = ShardRange { epoch: 2, layer: 2, shard: 5, first_block: 90, blocks: 1 };
        let copy = Copy {
            epoch: 2,
            generation: 2,
            layer: 1,
            shard: 5,
            shard_generation: 1,
            indexes: vec![7],
            blocks: vec![(crate::content::Block::Zero, crate::geometry::Tag::NONE)],
        };
        let pull = Pull {
            epoch: 2,
            generation: 2,
            layer: 1,
            shard: 5,
            first_block: 7,
            blocks: 9,
            source: source(2),
        };
        let write = frame(kind::WRITE, 3, 0, &io(8 * BLOCK_BYTES - 1, 1));
        let drops = [
            (frame(kind::ZERO, 3, 0, &io(4 * BLOCK_BYTES, 1)), true),
            (write.clone(), true),
            (frame(kind::SUMMARY, 3, 0, &summary), true),
            (frame(kind::COPY, 3, 0, &copy), true),
            (frame(kind::PULL, 3, 0, &pull), true),
            (frame(kind::ZERO, 3, 0, &io(0, 4 * BLOCK_BYTES)), false),
            (frame(kind::ZERO, 3, 0, &io(8 * BLOCK_BYTES, 4096)), false),
            (frame(kind::READ, 3, 0, &io(4 * BLOCK_BYTES, 4096)), false),
            (frame(kind::WRITE, 4, 0, &io(4 * BLOCK_BYTES, 4096)), false),
            (frame(kind::SUMMARY, 3, 0, &ShardRange { shard: 6, ..summary }), false),
        ];
        for (later, expected) in drops {
            for lands in [false, true] {
                let mut pulls = Pulls::default();
                pulls.order(order(7, 4..8, 1), 0);
                let peer = connecting(&mut pulls);
                pulls.greeted(peer, 0);
                let tag = asked(&mut pulls)[0];
                if lands {
                    assert_eq!(pulls.take(peer, empty(tag, Status::Ok)), Ok(()));
                }
                pulls.overtaken(2, &later);
                assert!(answered(&mut pulls).is_empty(), "of another connection");
                pulls.overtaken(1, &later);
                let status = [(7, Status::Cancelled)];
                assert_eq!(answered(&mut pulls), status[..usize::from(expected)], "{later:?}");
                assert_eq!(pulls.landed(0).is_some(), lands && !expected);
            }
        }
    }

    #[test]
    fn a_flood_of_pulls_is_refused() {
        let mut pulls = Pulls::default();
        for tag in 0..100 {
            pulls.order(order(tag, 0..1, 1), 0);
        }
        assert_eq!(pulls.len(), SESSION_PULLS_MAX);
        assert_eq!(answered(&mut pulls).len(), 100 - SESSION_PULLS_MAX);
        for connection in 2..100 {
            pulls.order(PullOrder { connection, ..order(1, 0..1, connection as u16 % 8) }, 0);
        }
        assert_eq!(pulls.len(), PULLS_MAX);
        pulls.connection_ended(1);
        assert_eq!(pulls.len(), PULLS_MAX - SESSION_PULLS_MAX);
        assert!(pulls.sources.len() <= PEERS_MAX);
    }

    #[test]
    fn peers_that_lie_are_told_from_those_that_are_late() {
        let one = || {
            let mut pulls = Pulls::default();
            pulls.order(order(7, 4..8, 1), 0);
            let peer = connecting(&mut pulls);
            pulls.greeted(peer, 0);
            let tag = asked(&mut pulls)[0];
            (pulls, peer, tag)
        };
        let (mut pulls, peer, tag) = one();
        assert_eq!(pulls.take(peer + 9, empty(tag, Status::Ok)), Err(BadPeer));
        let other = Frame { kind: kind::FETCH | REPLY, ..empty(tag, Status::Ok) };
        assert_eq!(pulls.take(peer, other), Err(BadPeer));
        let bad = |block: u32| {
            let mut head = BytesMut::new();
            BadBlock { block, image: ImageId([1; 16]) }.put(&mut head);
            Frame { head: head.freeze(), ..empty(tag, Status::BadBlock) }
        };
        assert_eq!(pulls.take(peer, bad(8)), Err(BadPeer), "a block that was not asked for");
        let (mut pulls, peer, tag) = one();
        let bad = |block: u32| Frame { tag, ..bad(block) };
        assert_eq!(pulls.take(peer, bad(5)), Ok(()));
        let answer = pulls.answers.pop_front().expect("an answer");
        assert_eq!((answer.status, &answer.head[..4]), (Status::BadBlock, &[5, 0, 0, 0][..]));
    }
}
