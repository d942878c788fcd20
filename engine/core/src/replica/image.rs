//! One image as its holder serves it: its parts in flight and their bookkeeping.

use super::admission::Admission;
use super::background::Background;
use super::changes::{Changes, Listing};
use super::freeze::Freeze;
use super::heal::{Heal, HealLimits};
use super::lag::{Lag, Timing};
use super::level::Leveller;
use super::locks::{BlockLocks, Range};
use super::memory::Memory;
use super::repair::Repairs;
use super::routes::Routes;
use super::scrub::Scrub;
use super::shard_set::ShardSet;
use super::{Event, Extent, Instance, IoError, NodeIndex, NodeMask, Outcome, Output, Token};
use crate::content::Run;
use crate::geometry::{Geometry, ImageId, LayerId, SnapshotId};
use crate::wire::copies::Source;
use crate::wire::messages::RecordHead;
use crate::wire::{self, Prefix};
use bytes::{Bytes, BytesMut};
use slab::Slab;
use std::collections::{BTreeSet, VecDeque};
use std::net::SocketAddr;

/// A replica set, its members and who of them is in sync.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetSpec {
    pub members: NodeMask,
    pub in_sync: NodeMask,
}

/// All that is needed to serve an image: what the lease holder's record says.
#[derive(Clone, Debug)]
pub struct OpenSpec {
    pub image: ImageId,
    /// The number of the image on every connection of this gateway.
    pub channel: u32,
    pub geometry: Geometry,
    pub layers: Vec<LayerId>,
    pub snapshots: Vec<SnapshotId>,
    /// Layers that go into the one above them.
    pub merging: Vec<LayerId>,
    pub epoch: u64,
    pub holder: [u8; 16],
    pub generation: u64,
    pub digest: [u8; 32],
    /// The record's text, stored by the nodes and given back by PEEK; opaque here.
    pub body: Bytes,
    pub nodes: Vec<String>,
    pub sets: Vec<SetSpec>,
    /// The node of the same host, read from where it is in sync.
    pub local: Option<NodeIndex>,
    /// What levelling in the background may take.
    pub levelling: HealLimits,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum ReplicaState {
    Down,
    Peeking,
    Waiting,
    Joining { stored: bool },
    Listing,
    Healing,
    Up,
}

/// What a node joins for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Purpose {
    /// The same instance came back: it is `Up` at once.
    Resume,
    /// In sync, but another instance: it is levelled first.
    Level,
    /// Stale: it is healed.
    Heal,
}

pub(super) struct Replica {
    pub name: String,
    pub state: ReplicaState,
    /// Who greeted on the connection, and who was last `Up`: only the same one resumes.
    pub instance: Option<Instance>,
    pub served: Option<Instance>,
    pub purpose: Purpose,
    /// Of the host, when it greeted last.
    pub boot: Option<[u8; 16]>,
    pub flush_number: u64,
    /// Counts the times that it was asked for its record.
    pub peeks: u64,
    /// Grows with each write sent; `flushed_mark` is its value that a finished flush covered.
    pub write_mark: u64,
    pub flushed_mark: Option<u64>,
    /// Policy was told that requests wait for this replica.
    pub blocking_told: bool,
    /// Shards that it may hold otherwise than others in sync do: it is asked nothing of them.
    pub doubtful: ShardSet,
    pub lag: Lag,
}

pub(super) struct Set {
    pub members: NodeMask,
    pub in_sync: NodeMask,
    /// In-sync nodes that have not stored `storing_generation`, the one that changed this set.
    pub storing: NodeMask,
    pub storing_generation: u64,
    /// When the first node had stored it.
    pub first_stored_ns: Option<u64>,
    /// Nodes that were let in for other sets while some in sync in this one were away, and none was whole:
    /// what they may lack here is not known, so that they are doubtful in every shard of it.
    pub unfounded: NodeMask,
    pub memory: Memory,
    /// It has no room for what clients write, and they are told so.
    pub refuses: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum RequestKind {
    Read,
    Write,
    Zero,
    Status,
    /// As `Status`, with the layers that blocks are in.
    Changes,
    /// Which shards have anything.
    Touched,
    Flush,
    /// Ours: writes are paused while blocks are compared and copied.
    Pause,
}

impl RequestKind {
    /// Whether one node answers it, and nothing changes.
    pub fn reads(self) -> bool {
        use RequestKind::*;
        matches!(self, Read | Status | Changes | Touched)
    }
}

/// A client's request, or one of our own (`token` none).
pub(super) struct Request {
    pub token: Option<Token>,
    pub kind: RequestKind,
    pub offset: u64,
    pub length: u32,
    pub flags: u8,
    pub payload: Bytes,
    pub parts_left: u32,
    /// Flushes: of each set, how many changes were answered when it came. Also where it is begun later.
    pub covers: Vec<u64>,
    pub error: Option<IoError>,
    /// Answers of the parts, in order.
    pub runs: Vec<Vec<Run>>,
    pub extents: Vec<Vec<Extent>>,
    pub changes: Changes,
}

/// The part of a request that one frame carries to the nodes of one replica set.
pub(super) struct Part {
    pub serial: u32,
    pub request: usize,
    /// Position among the request's parts.
    pub position: u32,
    pub kind: RequestKind,
    pub set: u32,
    pub shard: u64,
    /// Within the shard; reads: widened to whole blocks.
    pub offset: u32,
    pub length: u32,
    pub flags: u8,
    pub sequence: u64,
    pub payload: Bytes,
    /// Who is to answer, of changes and flushes; and who has not.
    pub wanted: NodeMask,
    pub waiting: NodeMask,
    /// Who of them was asked.
    pub sent: NodeMask,
    /// Reads: who failed it. Changes: who met rot where it would have to be merged, and has not made it.
    pub tried: NodeMask,
    /// Changes: who had no room for it when asked last.
    pub no_space: NodeMask,
    /// Times that it waited for a repair.
    pub awaited: u8,
    /// Reads past the lease time: data is here, epochs are being confirmed.
    pub confirming: bool,
    /// Flushes: write marks at sending, by node, and the sequence that may be cleared after.
    pub marks: Vec<(NodeIndex, u64)>,
    pub clear_sequence: u64,
    /// Changes and flushes: how their answers come in.
    pub timing: Timing,
    /// Of a listing of shards.
    pub listing: Listing,
}

/// How much waits in an image: clients' requests, their parts, and changes that are not answered.
#[derive(Clone, Copy, Debug, Default)]
pub struct Queues {
    pub requests: usize,
    pub parts: usize,
    pub unanswered: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Phase {
    Opening,
    Running,
    Closing,
    Dead,
}

/// What a finished flush lets the nodes forget.
#[derive(Clone, Default)]
pub(super) struct Clear {
    pub sequence: u64,
    pub proof: Vec<(String, u64)>,
    /// Who still has to be told.
    pub pending: NodeMask,
}

/// The state machine of one open image. Feed it requests, frames and link changes; take `outputs`.
pub struct ImageIo {
    pub(super) spec: OpenSpec,
    pub(super) phase: Phase,
    pub(super) closing_flush_sent: bool,
    pub(super) replicas: Vec<Replica>,
    pub(super) sets: Vec<Set>,
    pub(super) requests: Slab<Request>,
    pub(super) parts: Slab<Part>,
    pub(super) serial: u32,
    pub(super) locks: BlockLocks,
    pub(super) next_sequence: u64,
    /// Sequences of changes in flight: one that waits for long holds back what may be cleared, and
    /// nothing is kept of those that are answered meanwhile.
    pub(super) unanswered: BTreeSet<u64>,
    pub(super) clear: Clear,
    pub(super) admission: Option<Admission>,
    pub(super) leveller: Leveller,
    /// Flushes that wait until every node in sync is whole.
    pub(super) held_flushes: Vec<usize>,
    pub(super) freeze: Option<Freeze>,
    /// Requests of clients that wait for the end of the freeze, in order of arrival.
    pub(super) held_back: Vec<usize>,
    pub(super) heal: Option<Heal>,
    pub(super) repairs: Repairs,
    /// Who can fetch from whom without us.
    pub(super) routes: Routes,
    pub(super) scrub: Option<Scrub>,
    pub(super) bytes_since_flush: u64,
    pub(super) ticks_since_flush: u32,
    pub(super) store_told: bool,
    /// A node has no room in its dirty map: a flush of our own is under way, a clear follows it.
    pub(super) dirty_full: bool,
    /// Policy was told that some node lags.
    pub(super) lags_told: bool,
    /// Time after which reads need the nodes' word that this is still the holder, and now.
    pub(super) lease_deadline_ns: u64,
    pub(super) now_ns: u64,
    /// Shared by all images of the gateway.
    pub(super) background: Background,
    pub(super) read_turn: u8,
    pub(super) arena: BytesMut,
    pub outputs: VecDeque<Output>,
}

impl ImageIo {
    pub fn new(spec: OpenSpec, background: &Background) -> ImageIo {
        assert!(spec.nodes.len() <= 64, "an image spreads over at most 64 nodes");
        assert_eq!(spec.sets.len(), spec.geometry.replica_sets as usize);
        let replicas = spec.nodes.iter().map(|name| Replica {
            name: name.clone(),
            state: ReplicaState::Down,
            instance: None,
            served: None,
            purpose: Purpose::Level,
            boot: None,
            flush_number: 0,
            peeks: 0,
            write_mark: 0,
            flushed_mark: None,
            blocking_told: false,
            doubtful: ShardSet::default(),
            lag: Lag::default(),
        });
        let sets = spec.sets.iter().map(|set| Set {
            members: set.members,
            in_sync: set.in_sync,
            storing: NodeMask::EMPTY,
            storing_generation: 0,
            first_stored_ns: None,
            unfounded: NodeMask::EMPTY,
            memory: Memory::default(),
            refuses: false,
        });
        let routes = Routes::default();
        ImageIo {
            replicas: replicas.collect(),
            sets: sets.collect(),
            phase: Phase::Opening,
            closing_flush_sent: false,
            requests: Slab::new(),
            parts: Slab::new(),
            serial: 0,
            locks: BlockLocks::default(),
            next_sequence: 1,
            unanswered: BTreeSet::new(),
            clear: Clear::default(),
            admission: None,
            leveller: Leveller::new(spec.levelling, routes.clone()),
            held_flushes: Vec::new(),
            freeze: None,
            held_back: Vec::new(),
            heal: None,
            repairs: Repairs::default(),
            routes,
            scrub: None,
            bytes_since_flush: 0,
            ticks_since_flush: 0,
            store_told: true,
            dirty_full: false,
            lags_told: false,
            lease_deadline_ns: u64::MAX,
            now_ns: 0,
            background: background.clone(),
            read_turn: 0,
            arena: BytesMut::with_capacity(64 * 1024),
            outputs: VecDeque::new(),
            spec,
        }
    }

    pub fn spec(&self) -> &OpenSpec {
        &self.spec
    }

    /// Other nodes reach `node` here; none: nobody knows where, and what they need of it comes through us.
    pub fn set_address(&mut self, node: NodeIndex, address: Option<SocketAddr>) {
        let name = &self.replicas[usize::from(node)].name;
        let source = address.map(|address| Source { node: name.clone(), address });
        self.routes.set(node, source);
    }

    pub fn size_bytes(&self) -> u64 {
        self.spec.geometry.size_bytes
    }

    /// The image is larger or smaller from now on, and `body` its record's text; what is cut off was
    /// zeroed before.
    pub fn resize(&mut self, size_bytes: u64, body: Bytes) {
        self.spec.geometry.size_bytes = size_bytes;
        self.spec.body = body;
        let attached = self.attached();
        self.send_record(attached);
    }

    pub fn is_running(&self) -> bool {
        self.phase == Phase::Running
    }

    pub fn requests_in_flight(&self) -> usize {
        self.requests.len()
    }

    /// How much waits here.
    pub fn queues(&self) -> Queues {
        Queues {
            requests: self.requests.len(),
            parts: self.parts.len(),
            unanswered: self.unanswered.len(),
        }
    }

    /// State of each replica, for people.
    pub fn replica_states(&self) -> Vec<(String, String)> {
        let state = |index: usize, replica: &Replica| match replica.state {
            ReplicaState::Up if !self.is_whole(index as NodeIndex) => "levelling".to_owned(),
            state => format!("{state:?}").to_lowercase(),
        };
        let states = self.replicas.iter().enumerate();
        states.map(|(index, replica)| (replica.name.clone(), state(index, replica))).collect()
    }

    /// In-sync nodes of each set.
    pub fn in_sync(&self) -> Vec<NodeMask> {
        self.sets.iter().map(|set| set.in_sync).collect()
    }

    pub fn set_lease_deadline(&mut self, deadline_ns: u64) {
        self.lease_deadline_ns = deadline_ns;
    }

    pub fn set_now(&mut self, now_ns: u64) {
        self.now_ns = now_ns;
    }

    /// Every node that is in sync in some set.
    pub(super) fn in_sync_anywhere(&self) -> NodeMask {
        self.sets.iter().fold(NodeMask::EMPTY, |mask, set| mask.with(set.in_sync))
    }

    /// Nodes that are in sync in every set that they are a member of: only their dirty maps may be
    /// cleared by sequence. What another one has of a set that it is stale in waits for its heal.
    pub(super) fn in_sync_everywhere(&self) -> NodeMask {
        let stale = self
            .sets
            .iter()
            .fold(NodeMask::EMPTY, |mask, set| mask.with(set.members.without(set.in_sync)));
        self.in_sync_anywhere().without(stale)
    }

    /// Replicas that serve.
    pub fn up(&self) -> NodeMask {
        self.nodes_in(|state| state == ReplicaState::Up)
    }

    /// Replicas that serve every shard.
    pub fn whole(&self) -> NodeMask {
        let whole = self.up().iter().filter(|node| self.is_whole(*node));
        whole.fold(NodeMask::EMPTY, |mask, node| mask.with(NodeMask::one(node)))
    }

    /// Whether a node, where it is up, is doubtful nowhere.
    pub(super) fn is_whole(&self, node: NodeIndex) -> bool {
        self.replicas[usize::from(node)].doubtful.is_empty()
            && !self.sets.iter().any(|set| set.unfounded.has(node))
    }

    /// Nodes that may be sent changes: those that are up, and one that is being healed.
    pub(super) fn attached(&self) -> NodeMask {
        self.nodes_in(|state| matches!(state, ReplicaState::Up | ReplicaState::Healing))
    }

    pub(super) fn nodes_in(&self, wanted: impl Fn(ReplicaState) -> bool) -> NodeMask {
        let those = self.replicas.iter().enumerate().filter(|(_, replica)| wanted(replica.state));
        those.fold(NodeMask::EMPTY, |mask, (index, _)| mask.with(NodeMask::one(index as NodeIndex)))
    }

    pub(super) fn next_serial(&mut self) -> u32 {
        self.serial = (self.serial + 1) & 0x7fff_ffff;
        self.serial
    }

    pub(super) fn replica(&mut self, node: NodeIndex) -> &mut Replica {
        &mut self.replicas[usize::from(node)]
    }

    pub(super) fn event(&mut self, event: Event) {
        self.outputs.push_back(Output::Event(event));
    }

    pub(super) fn record_head(&self) -> RecordHead {
        RecordHead {
            image: self.spec.image,
            epoch: self.spec.epoch,
            holder: self.spec.holder,
            generation: self.spec.generation,
            digest: self.spec.digest,
            shard_bytes: self.spec.geometry.shard_bytes,
        }
    }

    /// Encodes a frame once and queues it for every node of `nodes`.
    pub(super) fn send(
        &mut self,
        nodes: NodeMask,
        kind: u8,
        flags: u8,
        tag: u64,
        payload: &Bytes,
        write_head: impl FnOnce(&mut BytesMut),
    ) {
        if nodes.is_empty() {
            return;
        }
        let prefix = Prefix::request(kind, flags, self.spec.channel, tag);
        wire::encode(&mut self.arena, prefix, payload.len(), write_head);
        let head = self.arena.split().freeze();
        for node in nodes.iter() {
            let (head, payload) = (head.clone(), payload.clone());
            self.outputs.push_back(Output::Send { node, head, payload });
        }
    }

    /// Blocks that a request changes, or reads.
    pub(super) fn block_range(offset: u64, length: u32) -> Range {
        let block = u64::from(crate::geometry::BLOCK_BYTES);
        Range { first: offset / block, end: (offset + u64::from(length)).div_ceil(block) }
    }

    /// The highest sequence up to which every write was answered.
    pub(super) fn answered_through(&self) -> u64 {
        self.unanswered.first().copied().unwrap_or(self.next_sequence) - 1
    }

    /// A write's sequence is answered.
    pub(super) fn sequence_answered(&mut self, sequence: u64) {
        let was_open = self.unanswered.remove(&sequence);
        assert!(was_open, "a change is answered once");
    }

    /// Counts one part of a request as done, and answers the request with its last one.
    pub(super) fn part_done(&mut self, request_id: usize) {
        let request = &mut self.requests[request_id];
        request.parts_left -= 1;
        if request.parts_left == 0 {
            self.finish_request(request_id);
        }
    }

    pub(super) fn finish_request(&mut self, request_id: usize) {
        let request = self.requests.remove(request_id);
        let outcome = match (request.error, request.kind) {
            (Some(error), _) => Outcome::Failed(error),
            (None, RequestKind::Read) => {
                Outcome::Read(request.runs.into_iter().flatten().collect())
            }
            (None, RequestKind::Status | RequestKind::Changes) => {
                Outcome::Extents(request.extents.into_iter().flatten().collect())
            }
            (None, RequestKind::Touched) => Outcome::Shards(self.touched_shards(&request.changes)),
            (None, _) => Outcome::Done,
        };
        if let Some(token) = request.token {
            self.outputs.push_back(Output::Answer { token, outcome });
        }
        let holds =
            matches!(request.kind, RequestKind::Write | RequestKind::Zero | RequestKind::Pause);
        // A request of no bytes holds nothing.
        if holds && request.length > 0 {
            let mut ready = Vec::new();
            self.locks.release(Self::block_range(request.offset, request.length), &mut ready);
            ready.into_iter().for_each(|id| self.start(id));
        }
        self.freeze_after(request_id);
        if self.phase == Phase::Closing {
            self.go_on_closing();
        }
    }
}
