//! A reader of frozen layers: what a snapshot holds, at any gateway, without a lease.
//!
//! | a node is | meaning | leaves by |
//! | --- | --- | --- |
//! | `Down` | no connection | the link comes up → `Attaching` |
//! | `Attaching` | ATTACH_READER is on its way | the answer → `Attached` or `Refusing` |
//! | `Attached` | serves | a refusal → `Refusing` |
//! | `Refusing` | does not have these layers, or not all that is in them | is asked again each second |
//!
//! Policy names the nodes that were in sync when the layers were frozen, or were healed since. Such a node has
//! all of them, durably, whatever becomes of it later; one whose disk is made anew says so by itself. So no
//! answer depends on who holds the image now.
//!
//! Nothing is repaired: where a block is rotten on a node another one is asked, and the holder, or a scrub,
//! finds the rot. Only where every node fails does the request fail.

use super::changes::{Changes, Listing, extents_of};
use super::image::RequestKind;
use super::reads::{Content, Piece, blocks_asked, choose_reader, content_of, pieces};
use super::replies::BadReply;
use super::{Event, Extent, IoError, NodeIndex, NodeMask, Outcome, Output, Token};
use crate::content::Run;
use crate::geometry::{Geometry, ImageId, SnapshotId};
use crate::wire::changes::ChangesAsked;
use crate::wire::messages::{AttachReader, Head, Session};
use crate::wire::{self, Frame, Prefix, REPLY, Status, kind};
use bytes::{Bytes, BytesMut};
use slab::Slab;
use std::collections::VecDeque;
use std::sync::Arc;

const SECOND_NS: u64 = 1_000_000_000;
/// A reader that is not open by then has failed; so has one of which a replica set refuses for so long.
const PATIENCE_NS: u64 = 5 * SECOND_NS;
/// A node that refuses is asked again after so long.
const AGAIN_NS: u64 = SECOND_NS;

/// All that is needed to read frozen layers.
#[derive(Clone, Debug)]
pub struct ReaderSpec {
    pub image: ImageId,
    /// The number of the reader on every connection of this gateway.
    pub channel: u32,
    /// As the image was when the layers were frozen.
    pub geometry: Geometry,
    pub snapshot: SnapshotId,
    pub nodes: Vec<String>,
    /// Of each replica set, the nodes that have all of the layers.
    pub sets: Vec<NodeMask>,
    /// The node of the same host, read from where it has them.
    pub local: Option<NodeIndex>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum NodeState {
    Down,
    Attaching,
    Attached,
    Refusing { status: Status, since_ns: u64 },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Opening,
    Running,
    Dead,
}

struct Request {
    token: Token,
    kind: RequestKind,
    parts_left: usize,
    failed: bool,
    runs: Vec<Vec<Run>>,
    extents: Vec<Vec<Extent>>,
    changes: Changes,
}

/// A piece of a request, asked of one node at a time.
struct Part {
    serial: u32,
    request: usize,
    position: usize,
    kind: RequestKind,
    piece: Piece,
    asked: Option<NodeIndex>,
    /// Who failed it.
    tried: NodeMask,
    set: u32,
    listing: Listing,
}

/// The state machine of one reader. Feed it requests, frames and link changes; take `outputs`.
pub struct ReaderIo {
    spec: ReaderSpec,
    phase: Phase,
    nodes: Vec<NodeState>,
    requests: Slab<Request>,
    parts: Slab<Part>,
    serial: u32,
    read_turn: u8,
    now_ns: u64,
    /// Since when it is not open, or some replica set refuses.
    hopeless_ns: Option<u64>,
    arena: BytesMut,
    pub outputs: VecDeque<Output>,
}

impl ReaderIo {
    pub fn new(spec: ReaderSpec, now_ns: u64) -> ReaderIo {
        assert!(spec.nodes.len() <= 64, "an image spreads over at most 64 nodes");
        assert_eq!(spec.sets.len(), spec.geometry.replica_sets as usize);
        ReaderIo {
            phase: Phase::Opening,
            nodes: vec![NodeState::Down; spec.nodes.len()],
            requests: Slab::new(),
            parts: Slab::new(),
            serial: 0,
            read_turn: 0,
            now_ns,
            hopeless_ns: Some(now_ns),
            arena: BytesMut::new(),
            outputs: VecDeque::new(),
            spec,
        }
    }

    pub fn spec(&self) -> &ReaderSpec {
        &self.spec
    }

    pub fn is_running(&self) -> bool {
        self.phase == Phase::Running
    }

    pub fn requests_in_flight(&self) -> usize {
        self.requests.len()
    }

    /// Parts that wait for a node or its answer.
    pub fn parts_in_flight(&self) -> usize {
        self.parts.len()
    }

    pub fn set_now(&mut self, now_ns: u64) {
        self.now_ns = now_ns;
    }

    /// State of each node, for people.
    pub fn node_states(&self) -> Vec<(String, String)> {
        let state = |state: &NodeState| match state {
            NodeState::Refusing { status, .. } => format!("{status:?}"),
            state => format!("{state:?}").to_lowercase(),
        };
        let states = self.spec.nodes.iter().zip(&self.nodes);
        states.map(|(name, node)| (name.clone(), state(node))).collect()
    }

    // Nodes

    /// The connection to `node` is ready.
    pub fn link_up(&mut self, node: NodeIndex) {
        if self.phase != Phase::Dead && self.nodes[usize::from(node)] == NodeState::Down {
            self.attach(node);
        }
    }

    /// The connection to `node` is gone: what it was asked goes to others.
    pub fn link_down(&mut self, node: NodeIndex) {
        self.leaves(node, NodeState::Down);
    }

    fn attach(&mut self, node: NodeIndex) {
        if !self.spec.sets.iter().any(|set| set.has(node)) {
            return;
        }
        self.nodes[usize::from(node)] = NodeState::Attaching;
        let head = AttachReader { image: self.spec.image, snapshot: self.spec.snapshot };
        self.send(node, kind::ATTACH_READER, 0, |out| head.put(out));
    }

    fn leaves(&mut self, node: NodeIndex, state: NodeState) {
        self.nodes[usize::from(node)] = state;
        let asked = self.parts.iter_mut().filter(|(_, part)| part.asked == Some(node));
        let homeless: Vec<usize> = asked
            .map(|(id, part)| {
                part.asked = None;
                id
            })
            .collect();
        homeless.into_iter().for_each(|id| self.dispatch(id));
    }

    fn attached(&self) -> NodeMask {
        self.nodes_in(|state| state == NodeState::Attached)
    }

    fn refusing(&self) -> NodeMask {
        self.nodes_in(|state| matches!(state, NodeState::Refusing { .. }))
    }

    fn nodes_in(&self, wanted: impl Fn(NodeState) -> bool) -> NodeMask {
        let those = self.nodes.iter().enumerate().filter(|(_, state)| wanted(**state));
        those.fold(NodeMask::EMPTY, |mask, (index, _)| mask.with(NodeMask::one(index as NodeIndex)))
    }

    /// Takes one frame of `node`.
    ///
    /// # Errors
    /// The node breaks the protocol: close its connection (and tell `link_down`).
    pub fn receive(&mut self, node: NodeIndex, frame: Frame) -> Result<(), BadReply> {
        if self.phase == Phase::Dead {
            return Ok(());
        }
        match frame.kind & !REPLY {
            kind::ATTACH_READER => self.take_attach(node, frame.status),
            kind::READ | kind::STATUS | kind::CHANGES | kind::TOUCHED => {
                self.take_read(node, frame)?
            }
            _ => return Err(BadReply("a reply of unknown kind")),
        }
        Ok(())
    }

    fn take_attach(&mut self, node: NodeIndex, status: Status) {
        if self.nodes[usize::from(node)] != NodeState::Attaching {
            return;
        }
        match status {
            Status::Ok => {
                self.nodes[usize::from(node)] = NodeState::Attached;
                self.open_if_complete();
                self.dispatch_waiting();
            }
            status => self.refused(node, status),
        }
    }

    fn open_if_complete(&mut self) {
        let attached = self.attached();
        let complete = self.spec.sets.iter().all(|set| !set.and(attached).is_empty());
        if complete && self.phase == Phase::Opening {
            self.phase = Phase::Running;
            self.hopeless_ns = None;
            self.outputs.push_back(Output::Event(Event::ReaderOpen));
        }
    }

    /// A node says that it does not have what is read.
    fn refused(&mut self, node: NodeIndex, status: Status) {
        if status == Status::Deleted {
            return self.fail("the image was deleted".to_owned());
        }
        self.leaves(node, NodeState::Refusing { status, since_ns: self.now_ns });
        self.dispatch_waiting();
    }

    fn take_read(&mut self, node: NodeIndex, frame: Frame) -> Result<(), BadReply> {
        let id = (frame.tag & 0xffff_ffff) as usize;
        let known =
            |part: &&Part| u64::from(part.serial) == frame.tag >> 32 && part.asked == Some(node);
        let Some(part) = self.parts.get(id).filter(known) else { return Ok(()) };
        match frame.status {
            Status::Ok => {}
            // A snapshot that is compared with has gone; what is read here is there all the same.
            Status::NoLayers
                if matches!(part.kind, RequestKind::Changes | RequestKind::Touched) =>
            {
                self.ask_another(id, node);
                return Ok(());
            }
            Status::NoLayers | Status::NoRecord | Status::NoSession | Status::Deleted => {
                self.refused(node, frame.status);
                return Ok(());
            }
            _ => {
                self.ask_another(id, node);
                return Ok(());
            }
        }
        let (request, position) = (part.request, part.position);
        let (offset, length) = (part.piece.offset, part.piece.length);
        match part.kind {
            RequestKind::Changes => {
                let request = &mut self.requests[request];
                let since = request.changes.since.len();
                request.extents[position] = extents_of(frame, since, offset, length)?;
            }
            RequestKind::Touched => {
                let part = &mut self.parts[id];
                if part.listing.take(frame.head, &mut self.requests[request].changes)? {
                    part.asked = None;
                    self.dispatch(id);
                    return Ok(());
                }
            }
            _ => match content_of(frame, part.kind, offset, length)? {
                Content::Damaged(_) => {
                    self.ask_another(id, node);
                    return Ok(());
                }
                Content::Runs(runs) => self.requests[request].runs[position] = runs,
                Content::Extents(extents) => self.requests[request].extents[position] = extents,
            },
        }
        self.parts.remove(id);
        self.part_done(request);
        Ok(())
    }

    /// `node` failed a part.
    fn ask_another(&mut self, id: usize, node: NodeIndex) {
        let part = &mut self.parts[id];
        part.asked = None;
        part.tried = part.tried.with(NodeMask::one(node));
        self.dispatch(id);
    }

    // Requests

    /// A read of `length` bytes; answered with runs.
    pub fn read(&mut self, token: Token, offset: u64, length: u32) {
        self.submit(token, RequestKind::Read, offset, length, Changes::default());
    }

    /// What the range holds, at block granularity.
    pub fn status(&mut self, token: Token, offset: u64, length: u32) {
        self.submit(token, RequestKind::Status, offset, length, Changes::default());
    }

    /// What each block of the range is, the layer that it is in, and since which snapshots it was written; the
    /// newest snapshot first.
    pub fn changes(&mut self, token: Token, offset: u64, length: u32, since: Arc<[SnapshotId]>) {
        self.submit(token, RequestKind::Changes, offset, length, Changes::since(since));
    }

    /// The shards of the range that were written since a snapshot, or ever; answered with `Outcome::Shards`,
    /// which may name others too.
    pub fn touched(&mut self, token: Token, offset: u64, length: u64, since: Option<SnapshotId>) {
        let end = offset.checked_add(length);
        if end.is_none_or(|end| end > self.spec.geometry.size_bytes) {
            return self.answer(token, Outcome::Failed(IoError::Io));
        }
        let changes = Changes::within(&self.spec.geometry, offset, length, since);
        self.submit(token, RequestKind::Touched, offset, 0, changes);
    }

    fn submit(
        &mut self,
        token: Token,
        kind: RequestKind,
        offset: u64,
        length: u32,
        changes: Changes,
    ) {
        let end = offset.checked_add(u64::from(length));
        let inside = end.is_some_and(|end| end <= self.spec.geometry.size_bytes);
        if self.phase != Phase::Running || !inside {
            let why = if inside { IoError::Shutdown } else { IoError::Io };
            return self.answer(token, Outcome::Failed(why));
        }
        let geometry = self.spec.geometry;
        let pieces: Vec<(u32, Piece)> = match kind {
            RequestKind::Touched => {
                let piece = Piece { shard: changes.shards.start, offset: 0, length: 0 };
                (0..geometry.replica_sets).map(|set| (set, piece)).collect()
            }
            _ => {
                let pieces = pieces(&geometry, offset, length, kind).into_iter();
                pieces.map(|piece| (geometry.replica_set_of(piece.shard), piece)).collect()
            }
        };
        let (runs, extents) = (vec![Vec::new(); pieces.len()], vec![Vec::new(); pieces.len()]);
        let parts_left = pieces.len();
        let request = Request { token, kind, parts_left, failed: false, runs, extents, changes };
        let request = self.requests.insert(request);
        if pieces.is_empty() {
            return self.finish(request);
        }
        for (position, (set, piece)) in pieces.into_iter().enumerate() {
            self.serial = self.serial.wrapping_add(1);
            let (asked, tried) = (None, NodeMask::EMPTY);
            let serial = self.serial;
            let listing = Listing::default();
            let part = Part { serial, request, position, kind, piece, asked, tried, set, listing };
            let id = self.parts.insert(part);
            self.dispatch(id);
        }
    }

    /// Asks the best node for a part. Where none is attached it waits; where all have failed it fails.
    fn dispatch(&mut self, id: usize) {
        let part = &self.parts[id];
        let (request, tried, piece) = (part.request, part.tried, part.piece);
        let set = self.spec.sets[part.set as usize];
        let untried = set.without(tried);
        let candidates = untried.and(self.attached());
        let kept = part.listing.node.filter(|node| candidates.has(*node));
        let chosen = || choose_reader(candidates, self.spec.local, &mut self.read_turn);
        let Some(node) = kept.or_else(chosen) else {
            let hope = untried.without(self.refusing());
            if hope.is_empty() && !tried.is_empty() {
                self.parts.remove(id);
                self.requests[request].failed = true;
                self.part_done(request);
            }
            return;
        };
        let part = &mut self.parts[id];
        part.asked = Some(node);
        let tag = u64::from(part.serial) << 32 | id as u64;
        let (asked, io) = (part.kind, blocks_asked(piece, 0, 0));
        let changes = &self.requests[request].changes;
        match asked {
            RequestKind::Changes => {
                let asked = ChangesAsked { io, since: changes.since.clone() };
                self.send(node, kind::CHANGES, tag, |out| asked.put(out));
            }
            RequestKind::Touched => {
                let asked = part.listing.ask(node, changes, 0);
                self.send(node, kind::TOUCHED, tag, |out| asked.put(out));
            }
            RequestKind::Read => self.send(node, kind::READ, tag, |out| io.put(out)),
            _ => self.send(node, kind::STATUS, tag, |out| io.put(out)),
        }
    }

    fn dispatch_waiting(&mut self) {
        let waiting = self.parts.iter().filter(|(_, part)| part.asked.is_none());
        let waiting: Vec<usize> = waiting.map(|(id, _)| id).collect();
        for id in waiting {
            if self.parts.get(id).is_some_and(|part| part.asked.is_none()) {
                self.dispatch(id);
            }
        }
    }

    fn part_done(&mut self, request: usize) {
        self.requests[request].parts_left -= 1;
        if self.requests[request].parts_left == 0 {
            self.finish(request);
        }
    }

    fn finish(&mut self, request: usize) {
        let request = self.requests.remove(request);
        let outcome = match request.kind {
            _ if request.failed => Outcome::Failed(IoError::Io),
            RequestKind::Status | RequestKind::Changes => {
                Outcome::Extents(request.extents.into_iter().flatten().collect())
            }
            RequestKind::Touched => Outcome::Shards(request.changes.touched.into_iter().collect()),
            _ => Outcome::Read(request.runs.into_iter().flatten().collect()),
        };
        self.answer(request.token, outcome);
    }

    fn answer(&mut self, token: Token, outcome: Outcome) {
        self.outputs.push_back(Output::Answer { token, outcome });
    }

    // Time, and the end

    /// Time has passed: those that refuse are asked again, or given up.
    pub fn pace(&mut self) {
        if self.phase == Phase::Dead {
            return;
        }
        let refusing = self.refusing();
        if self.phase == Phase::Running {
            let refuses = |set: &NodeMask| set.without(refusing).is_empty();
            let hopeless = self.spec.sets.iter().any(refuses);
            self.hopeless_ns = hopeless.then(|| self.hopeless_ns.unwrap_or(self.now_ns));
        }
        let late = |since_ns: u64| self.now_ns.saturating_sub(since_ns) > PATIENCE_NS;
        if self.hopeless_ns.is_some_and(late) {
            let states = self.node_states().into_iter();
            let states: Vec<String> =
                states.map(|(name, state)| format!("{name} {state}")).collect();
            return self.fail(format!("no node serves all of it: {}", states.join(", ")));
        }
        for node in refusing.iter() {
            let state = self.nodes[usize::from(node)];
            let due = |since_ns: u64| self.now_ns.saturating_sub(since_ns) >= AGAIN_NS;
            if matches!(state, NodeState::Refusing { since_ns, .. } if due(since_ns)) {
                self.attach(node);
            }
        }
    }

    fn fail(&mut self, why: String) {
        self.kill();
        self.outputs.push_back(Output::Event(Event::ReaderFailed { why }));
    }

    /// Ends it at once: every request fails, later ones too. The nodes forget it.
    pub fn kill(&mut self) {
        if self.phase != Phase::Dead {
            let known = |state| matches!(state, NodeState::Attaching | NodeState::Attached);
            for node in self.nodes_in(known).iter() {
                self.send(node, kind::DETACH, 0, |out| Session { epoch: 0 }.put(out));
            }
        }
        self.phase = Phase::Dead;
        self.parts.clear();
        let requests: Vec<Request> = self.requests.drain().collect();
        for request in requests {
            self.answer(request.token, Outcome::Failed(IoError::Shutdown));
        }
    }

    /// Ends it, and says so.
    pub fn close(&mut self) {
        self.kill();
        self.outputs.push_back(Output::Event(Event::Closed { clean: true }));
    }

    fn send(
        &mut self,
        node: NodeIndex,
        kind: u8,
        tag: u64,
        write_head: impl FnOnce(&mut BytesMut),
    ) {
        let prefix = Prefix::request(kind, 0, self.spec.channel, tag);
        wire::encode(&mut self.arena, prefix, 0, write_head);
        let head = self.arena.split().freeze();
        self.outputs.push_back(Output::Send { node, head, payload: Bytes::new() });
    }
}
