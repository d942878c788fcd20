//! A holder, three nodes and the network between them, moved one step at a time by a seeded choice.

use super::node::SimNode;
use super::oracle::{Oracle, SECTOR};
use super::policy::{Policy, QUORUM, Stored, digest};
use crate::content::Run;
use crate::geometry::{BLOCK_BYTES, Geometry, ImageId, LayerId};
use crate::replica::{
    Background, Event, HealLimits, ImageIo, Instance, IoError, NodeIndex, NodeMask, OpenSpec,
    Outcome, Output, ScrubSpec, ScrubState, SetSpec, Token,
};
use crate::simulation::LogSize;
use crate::store::simulated::Seeded;
use crate::wire::{Frame, FrameReader, flag};
use bytes::{Bytes, BytesMut};
use std::collections::{BTreeMap, HashMap, VecDeque};

pub const NODES: usize = 3;
pub const IMAGE: ImageId = ImageId([0xA1; 16]);
pub const SHARD_BYTES: u32 = 1 << 20;
/// Requests go to regions of two blocks on either side of a shard's end, of two shards each.
pub const REGIONS: usize = 4;
const REGION_SECTORS: usize = 4 * BLOCK_BYTES as usize / SECTOR;
const SECTORS: usize = REGIONS * REGION_SECTORS;
/// Asks what the guest never does.
const INQUIRER: Token = Token { client: 99, cookie: 0 };
const IN_FLIGHT_MAX: usize = 10;

/// What may happen to nodes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Faults {
    /// Processes are killed: every answered write survives.
    Kills,
    /// Power is cut where another in-sync node keeps its memory: every answered write survives.
    GuardedPowerCuts,
    /// Power is cut anywhere: every flushed write survives.
    PowerCuts,
    /// Shard files of one node rot, which is also cut off and killed; everything that is asked is answered.
    Rot,
}

/// The node that rots, from which everything is read.
pub const ROTTING: usize = 0;

#[derive(Default)]
struct SimLink {
    up: bool,
    connection: u64,
    to_node: VecDeque<Frame>,
    /// Frames of connections that are gone for the gateway, but not yet for the node.
    late: VecDeque<(u64, Frame)>,
}

enum Asked {
    Read { first: usize, sectors: usize, begun: u64 },
    Change { durable: bool },
    Flush,
}

pub struct Cluster {
    pub random: Seeded,
    pub now: u64,
    faults: Faults,
    /// One misfortune in so many chances of one: some histories are hectic, some leave time to serve.
    calm: u64,
    pub nodes: Vec<SimNode>,
    links: Vec<SimLink>,
    connections: u64,
    pub io: ImageIo,
    pub policy: Policy,
    events: VecDeque<(Event, Option<Instance>)>,
    pub oracle: Oracle,
    asked: HashMap<u64, Asked>,
    cookies: u64,
    /// Counts the power cuts of each host.
    boots: [u8; NODES],
    /// Lost what was not synced since it was last up.
    forgetful: [bool; NODES],
    opened: bool,
    pub closed: Option<bool>,
    /// Flushes that failed because of power cuts.
    pub losses_told: u64,
    /// Stale nodes that former holders took in.
    healed: u64,
    /// The image is frozen now and then, and gets a layer.
    pub snapshots: bool,
    /// And snapshots are removed.
    pub removals: bool,
    /// Nodes merge by themselves.
    pub merges: bool,
    freezes: u64,
    /// What each layer that is no longer the top held, with those below, when nothing changed any more.
    pub frozen: BTreeMap<LayerId, Vec<u8>>,
    /// What `inquire` was answered.
    told: Option<Outcome>,
    /// Requests that nodes have failed.
    pub failures: usize,
}

fn rots(faults: Faults) -> NodeMask {
    if faults == Faults::Rot { NodeMask::one(ROTTING as NodeIndex) } else { NodeMask::EMPTY }
}

fn spec(record: Stored, faults: Faults) -> OpenSpec {
    let geometry = Geometry {
        size_bytes: 2 * REGIONS as u64 * u64::from(SHARD_BYTES),
        shard_bytes: SHARD_BYTES,
        placement_key: IMAGE,
        replica_sets: 1,
    };
    OpenSpec {
        image: IMAGE,
        channel: record.epoch as u32,
        geometry,
        layers: record.layers(),
        snapshots: record.snapshots(),
        merging: record.merging(),
        epoch: record.epoch,
        holder: [record.epoch as u8; 16],
        generation: record.generation,
        digest: digest(record),
        body: Bytes::new(),
        nodes: (1..=NODES).map(|number| format!("node{number}")).collect(),
        sets: vec![SetSpec { members: NodeMask((1 << NODES) - 1), in_sync: record.in_sync }],
        local: rots(faults).first(),
        levelling: HealLimits { bytes_per_second: 0, shards_at_once: 1, share_percent: 100 },
    }
}

impl Cluster {
    pub fn new(seed: u64, faults: Faults) -> Cluster {
        Cluster::with_log(seed, faults, LogSize::default())
    }

    /// One whose logs take a whole shard at once.
    pub fn roomy(seed: u64, faults: Faults) -> Cluster {
        let log = LogSize { log_bytes: 32 << 20, segment_bytes: 4 << 20 };
        Cluster::with_log(seed, faults, log)
    }

    fn with_log(seed: u64, faults: Faults, log: LogSize) -> Cluster {
        let in_sync = NodeMask((1 << NODES) - 1);
        let record = Stored {
            epoch: 1,
            generation: 1,
            in_sync,
            top: 1,
            dropped: 0,
            merging: 0,
            frozen: [0; 64],
            since: [0; 8],
        };
        let mut cluster = Cluster {
            random: Seeded::new(seed),
            now: 1,
            faults,
            calm: [1, 3, 10, 30, 90][(seed % 5) as usize],
            nodes: (0..NODES).map(|node| SimNode::new(node, log)).collect(),
            links: (0..NODES).map(|_| SimLink::default()).collect(),
            connections: 0,
            io: ImageIo::new(spec(record, faults), &Background::default()),
            policy: Policy::new(record, NODES, rots(faults)),
            events: VecDeque::new(),
            oracle: Oracle::new(SECTORS, faults == Faults::PowerCuts),
            asked: HashMap::new(),
            cookies: 0,
            boots: [0; NODES],
            forgetful: [false; NODES],
            opened: false,
            closed: None,
            losses_told: 0,
            healed: 0,
            snapshots: false,
            merges: true,
            removals: false,
            freezes: 0,
            frozen: BTreeMap::new(),
            told: None,
            failures: 0,
        };
        (0..NODES).for_each(|node| cluster.connect(node));
        cluster
    }

    // Steps

    /// Does one thing. `faults`: something may go wrong.
    pub fn step(&mut self, faults: bool) {
        self.now += 1;
        self.io.set_now(self.now * 1_000_000);
        let node = self.random.below(NODES as u64) as usize;
        let burst = 1 + self.random.below(3);
        match self.random.below(100) {
            0..28 => (0..burst).for_each(|_| self.deliver_request(self.busy(node, Self::is_asked))),
            28..56 => (0..burst).for_each(|_| self.deliver_answer(self.busy(node, Self::answers))),
            56..68 => self.sync(self.busy(node, |c, node| c.nodes[node].waits_for_sync())),
            68..70 => {
                if self.merges {
                    (0..10).for_each(|_| self.nodes[node].merge());
                }
                self.nodes[node].checkpoint();
            }
            70..80 => self.hear(),
            80..82 => self.take_proposal(),
            82..83 => self.tick(),
            83..86 => self.deliver_late(node),
            86..88 if faults && self.snapshots && (self.removals || self.random.chance(30)) => {
                self.change_layers();
            }
            86..93 if faults => self.ask(),
            93..96 if faults => self.connect(node),
            96.. if faults && self.random.below(self.calm) == 0 => self.misfortune(node),
            _ => {}
        }
        self.check();
    }

    /// Does one thing, while a node is away.
    pub fn step_without(&mut self, node: usize) {
        self.cut(node);
        self.step(false);
    }

    /// `node`, or the next one that has something to do.
    fn busy(&self, node: usize, is_busy: impl Fn(&Cluster, usize) -> bool) -> usize {
        (node..node + NODES).map(|n| n % NODES).find(|n| is_busy(self, *n)).unwrap_or(node)
    }

    fn sync(&mut self, node: usize) {
        self.nodes[node].sync();
    }

    fn is_asked(&self, node: usize) -> bool {
        self.links[node].up && !self.links[node].to_node.is_empty()
    }

    fn answers(&self, node: usize) -> bool {
        self.nodes[node].has_answers()
    }

    fn check(&mut self) {
        let states = self.io.replica_states();
        for (node, (_, state)) in states.iter().enumerate() {
            self.forgetful[node] &= state != "up";
        }
        if self.io.is_running() && !self.opened {
            self.opened = true;
            self.oracle.opened(self.now);
        }
        for (node, (_, state)) in states.iter().enumerate() {
            let in_sync = self.policy.record.in_sync.has(node as NodeIndex);
            let known = self.io.in_sync()[0].has(node as NodeIndex);
            assert!(state != "up" || in_sync || known, "a stale node serves");
        }
    }

    /// Ends all faults and goes on until nothing is left to do.
    pub fn settle(&mut self) {
        for _ in 0..60_000 {
            (0..NODES).for_each(|node| self.connect(node));
            self.step(false);
            let idle = self.events.is_empty()
                && self.policy.proposal.is_none()
                && self.io.requests_in_flight() == 0
                && self.io.rot_state().waiting == 0
                && !self.io.is_scrubbing()
                && self.nodes.iter().all(SimNode::is_idle)
                && self.links.iter().all(|l| l.to_node.is_empty() && l.late.is_empty());
            let whole = self.policy.all_up() && self.policy.record.in_sync.0 == (1 << NODES) - 1;
            if idle && (self.closed.is_some() || (self.io.is_running() && whole)) {
                return;
            }
        }
        panic!(
            "stuck: {:?}, {:?}, events {:?}, idle nodes {:?}, {} requests in flight, running {}, {:?}",
            self.io.replica_states(),
            self.policy,
            self.events,
            self.nodes.iter().map(SimNode::is_idle).collect::<Vec<_>>(),
            self.io.requests_in_flight(),
            self.io.is_running(),
            self.policy.record,
        );
    }

    pub fn deliver_request(&mut self, node: usize) {
        let link = &mut self.links[node];
        if link.up
            && self.nodes[node].takes(link.connection)
            && let Some(frame) = link.to_node.pop_front()
        {
            self.nodes[node].take(link.connection, frame);
        }
    }

    fn deliver_late(&mut self, node: usize) {
        let Some((connection, frame)) = self.links[node].late.pop_front() else { return };
        if !self.nodes[node].takes(connection) {
            // A parked connection is not read; that it is gone is noticed first.
            return self.nodes[node].end_connection(connection);
        }
        self.nodes[node].take(connection, frame);
        if self.links[node].late.iter().all(|(other, _)| *other != connection) {
            self.nodes[node].end_connection(connection);
        }
    }

    pub fn deliver_answer(&mut self, node: usize) {
        let Some((connection, frame)) = self.nodes[node].run().answers.pop_front() else { return };
        let link = &self.links[node];
        if link.up && link.connection == connection {
            let taken = self.io.receive(node as NodeIndex, frame);
            assert_eq!(taken, Ok(()), "an honest node is believed");
            self.carry_out();
        }
    }

    /// Takes a snapshot, removes one, or takes a layer out that is empty on all nodes.
    fn change_layers(&mut self) {
        let taken = self.policy.record.snapshots();
        match if self.removals { self.random.below(8) } else { 0 } {
            1 if !taken.is_empty() => {
                let which = self.random.below(taken.len() as u64) as usize;
                self.remove_snapshot(taken[which].layer);
            }
            2..7 => self.take_out(),
            _ => self.snapshot(),
        }
    }

    /// Has a snapshot go, if the record can be changed now.
    pub fn remove_snapshot(&mut self, layer: LayerId) {
        self.policy.remove_snapshot(layer);
    }

    /// Takes merging layers out of the record, if all nodes have said that they have emptied them; asks them.
    pub fn take_out(&mut self) {
        let merging = self.policy.record.merging();
        let empty = |said: &Vec<LayerId>| merging.iter().all(|layer| said.contains(layer));
        if !merging.is_empty() && self.policy.emptied.iter().all(empty) {
            self.policy.take_out = true;
            self.snapshot();
        } else {
            self.io.ask_emptied();
            self.carry_out();
        }
    }

    /// Begins to take a snapshot.
    pub fn snapshot(&mut self) {
        if self.policy.record.top == 60 {
            return;
        }
        self.freezes += 1;
        self.io.freeze(self.freezes);
        self.carry_out();
    }

    fn hear(&mut self) {
        if let Some((event, instance)) = self.events.pop_front() {
            self.policy.hear(event, instance, &mut self.io);
            self.carry_out();
        }
    }

    pub fn take_proposal(&mut self) {
        if self.policy.freeze.is_some() && self.random.chance(20) {
            self.policy.layer_refused(&mut self.io);
            return self.carry_out();
        }
        self.policy.proposal_taken(&mut self.io);
        self.carry_out();
    }

    pub fn tick(&mut self) {
        self.io.tick();
        self.io.pace();
        self.carry_out();
    }

    /// Does what the holder's side wants done.
    fn carry_out(&mut self) {
        while let Some(output) = self.io.outputs.pop_front() {
            match output {
                Output::Send { node, head, payload } => {
                    let link = &mut self.links[usize::from(node)];
                    if link.up {
                        let mut bytes = BytesMut::from(&head[..]);
                        bytes.extend_from_slice(&payload);
                        let frame = FrameReader::next(&mut bytes).expect("our own frame");
                        link.to_node.push_back(frame.expect("a whole frame"));
                    }
                }
                Output::Answer { token, outcome } if token == INQUIRER => self.told = Some(outcome),
                Output::Answer { token, outcome } => self.answered(token.cookie, outcome),
                Output::Event(Event::Closed { clean }) => self.closed = Some(clean),
                Output::Event(event @ Event::Frozen { .. }) => {
                    // What counts is what it holds if the record with a new layer is taken.
                    let node = self.io.in_sync()[0].first().expect("a quorum");
                    let (layers, top) = (self.io.spec().layers.clone(), self.policy.record.top);
                    let content = self.content_of(node, &layers);
                    self.frozen.insert(top, content);
                    self.events.push_back((event, None));
                }
                Output::Event(event @ Event::ReplicaFailed { .. }) => {
                    self.failures += 1;
                    self.events.push_back((event, None));
                }
                Output::Event(Event::Lags { .. } | Event::WritesLost { .. }) => {}
                Output::Event(event) => {
                    let instance = match &event {
                        Event::Peeked { node, .. } => {
                            Some(self.nodes[usize::from(*node)].instance())
                        }
                        _ => None,
                    };
                    self.events.push_back((event, instance));
                }
            }
        }
    }

    /// Takes a request of this kind off its way to a node, if there is one.
    pub fn intercept(&mut self, kind: u8) -> Option<(NodeIndex, Frame)> {
        let (node, link) = self
            .links
            .iter_mut()
            .enumerate()
            .find(|(_, link)| link.to_node.front().is_some_and(|frame| frame.kind == kind))?;
        link.to_node.pop_front().map(|frame| (node as NodeIndex, frame))
    }

    // The guest

    fn ask(&mut self) {
        if !self.io.is_running() || self.asked.len() >= IN_FLIGHT_MAX {
            return;
        }
        let first = self.random.below(SECTORS as u64) as usize;
        let left = REGION_SECTORS - first % REGION_SECTORS;
        let sectors = 1 + self.random.below(left.min(16) as u64) as usize;
        match self.random.below(10) {
            0..3 => self.read(first, sectors),
            3..7 => self.write(first, sectors),
            7 => self.zero(first, sectors),
            _ => self.flush(),
        }
    }

    /// What the holder answers to a question of another client.
    pub fn inquire(&mut self, ask: impl FnOnce(&mut ImageIo, Token)) -> Outcome {
        ask(&mut self.io, INQUIRER);
        self.carry_out();
        self.settle();
        self.told.take().expect("an answer")
    }

    fn token(&mut self, asked: Asked) -> Token {
        self.cookies += 1;
        self.asked.insert(self.cookies, asked);
        // Requests come by several connections in turn: what holds of a flush holds across them.
        Token { client: 1 + self.cookies % 3, cookie: self.cookies }
    }

    pub fn read(&mut self, first: usize, sectors: usize) {
        let token = self.token(Asked::Read { first, sectors, begun: self.now });
        self.io.read(token, offset_of(first), (sectors * SECTOR) as u32);
        self.carry_out();
    }

    pub fn write(&mut self, first: usize, sectors: usize) {
        let durable = self.random.chance(15);
        let token = self.token(Asked::Change { durable });
        let stamp = self.random.number() | 1;
        self.oracle.write_begins(first, sectors, (token.cookie, stamp), self.now);
        let data = stamp.to_le_bytes().repeat(sectors * SECTOR / 8);
        let flags = if durable { flag::FUA } else { 0 };
        self.io.write(token, offset_of(first), Bytes::from(data), flags);
        self.carry_out();
    }

    pub fn zero(&mut self, first: usize, sectors: usize) {
        let token = self.token(Asked::Change { durable: false });
        self.oracle.write_begins(first, sectors, (token.cookie, 0), self.now);
        let flags = if self.random.chance(50) { flag::KEEP_ALLOCATED } else { 0 };
        self.io.zero(token, offset_of(first), (sectors * SECTOR) as u32, flags);
        self.carry_out();
    }

    pub fn flush(&mut self) {
        let token = self.token(Asked::Flush);
        self.oracle.flush_begins(token.cookie, self.now);
        self.io.flush(token);
        self.carry_out();
    }

    pub fn read_everything(&mut self) {
        for region in 0..REGIONS {
            self.read(region * REGION_SECTORS, REGION_SECTORS);
        }
    }

    fn answered(&mut self, cookie: u64, outcome: Outcome) {
        let asked = self.asked.remove(&cookie).expect("answered once");
        self.now += 1;
        match (asked, outcome) {
            (Asked::Read { first, sectors, begun }, Outcome::Read(runs)) => {
                let content = flatten(&runs);
                assert_eq!(content.len(), sectors * SECTOR);
                self.oracle.check_read(first, &content, begun, self.now);
            }
            (Asked::Change { durable }, Outcome::Done) => {
                let in_sync = self.io.in_sync()[0];
                assert!(in_sync.0.count_ones() >= QUORUM, "answered below the quorum");
                self.oracle.write_answered(cookie, self.now, durable);
            }
            (Asked::Flush, Outcome::Done) => self.oracle.flush_answered(cookie, self.now),
            (Asked::Flush, Outcome::Failed(IoError::Io)) if self.oracle.flushed_only => {
                self.losses_told += 1;
                self.oracle.flush_failed(cookie);
            }
            (_, outcome) => panic!("a request got {outcome:?}"),
        }
        self.now += 1;
    }

    // Faults

    pub fn connect(&mut self, node: usize) {
        if self.links[node].up {
            return;
        }
        self.connections += 1;
        self.links[node].up = true;
        self.links[node].connection = self.connections;
        let boot = [self.boots[node]; 16];
        self.io.link_up(node as NodeIndex, self.nodes[node].instance(), boot);
        self.carry_out();
    }

    pub fn cut(&mut self, node: usize) {
        let link = &mut self.links[node];
        if !link.up {
            return;
        }
        link.up = false;
        let connection = link.connection;
        link.late.extend(link.to_node.drain(..).map(|frame| (connection, frame)));
        self.io.link_down(node as NodeIndex);
        self.carry_out();
    }

    fn misfortune(&mut self, node: usize) {
        if self.faults == Faults::Rot {
            return match self.random.below(20) {
                0..13 => self.rot(),
                13..15 => self.scrub(),
                15..17 => self.cut(ROTTING),
                17..19 => self.restart_node(ROTTING, false),
                _ => self.restart_gateway(),
            };
        }
        match self.random.below(20) {
            0..8 => self.cut(node),
            8..18 => self.restart(node),
            _ => self.restart_gateway(),
        }
    }

    pub fn scrub(&mut self) {
        let (bytes_per_second, share_percent) = (0, 100);
        let spec = ScrubSpec {
            attempt: 1,
            from_shard: 0,
            end_shard: None,
            bytes_per_second,
            share_percent,
        };
        self.io.scrub(spec);
        self.carry_out();
    }

    /// A byte of a shard file flips: of a block that is used, or of its metadata.
    pub fn rot(&mut self) {
        let shard = self.random.below(2 * REGIONS as u64);
        let last = u64::from(SHARD_BYTES - 2 * BLOCK_BYTES);
        let offset = match self.random.below(4) {
            0 => u64::from(SHARD_BYTES) + self.random.below(10 << 10),
            _ if shard.is_multiple_of(2) => last + self.random.below(2 * u64::from(BLOCK_BYTES)),
            _ => self.random.below(2 * u64::from(BLOCK_BYTES)),
        };
        self.nodes[ROTTING].rot(shard, offset);
    }

    fn restart(&mut self, node: usize) {
        let others = |set: NodeMask| {
            set.without(NodeMask::one(node as NodeIndex))
                .iter()
                .any(|other| !self.forgetful[usize::from(other)])
        };
        let guarded = others(self.policy.record.in_sync)
            && self.policy.proposal.is_none_or(|proposal| others(proposal.in_sync));
        let power = match self.faults {
            Faults::Kills | Faults::Rot => false,
            Faults::GuardedPowerCuts => guarded && self.random.chance(50),
            Faults::PowerCuts => self.random.chance(50),
        };
        self.restart_node(node, power);
    }

    pub fn restart_node(&mut self, node: usize, power: bool) {
        self.forgetful[node] |= power;
        self.boots[node] = self.boots[node].wrapping_add(u8::from(power));
        let seed = power.then(|| self.random.number());
        self.nodes[node].restart(seed);
        self.links[node].late.clear();
        self.cut(node);
        self.links[node].late.clear();
    }

    /// A node comes back with a disk that is empty.
    pub fn replace_disk(&mut self, node: usize) {
        self.restart_node(node, false);
        self.nodes[node] = SimNode::new(node, LogSize::default());
    }

    /// The holder dies; another opens the image.
    pub fn restart_gateway(&mut self) {
        let taken = self.policy.proposal.is_some() && self.random.chance(50);
        self.restart_gateway_with(taken);
    }

    /// The same; what the former one proposed was `taken` by the cluster's state.
    pub fn restart_gateway_with(&mut self, taken: bool) {
        for link in &mut self.links {
            let connection = link.connection;
            link.late.extend(link.to_node.drain(..).map(|frame| (connection, frame)));
            link.up = false;
        }
        let mut record = self.policy.record;
        if let Some(proposal) = self.policy.proposal.filter(|_| taken) {
            record = proposal;
        }
        record.epoch += 1;
        self.healed += self.policy.healed;
        self.io = ImageIo::new(spec(record, self.faults), &Background::default());
        self.policy = Policy::new(record, NODES, rots(self.faults));
        self.events.clear();
        self.asked.clear();
        let forgetful = self.forgetful.iter().any(|forgetful| *forgetful);
        self.oracle.gateway_gone(forgetful);
        self.opened = false;
        self.closed = None;
    }

    // The end

    /// Reads everything from the node that rots, until what is rotten there is repaired.
    pub fn find_rot(&mut self) {
        for _ in 0..2 * REGION_SECTORS {
            let found = self.io.rot_state().found;
            self.read_everything();
            self.settle();
            if self.io.rot_state().found == found {
                break;
            }
        }
        self.check_rot();
    }

    /// Scrubs everything; gives what that found.
    pub fn scrub_all(&mut self) -> ScrubState {
        self.settle();
        self.policy.scrubbed = None;
        self.scrub();
        while self.policy.scrubbed.is_none() {
            self.step(false);
        }
        self.settle();
        self.check_rot();
        self.policy.scrubbed.take().expect("it is through")
    }

    fn check_rot(&self) {
        let rot = self.io.rot_state();
        assert_eq!(rot.waiting, 0, "{rot:?}");
        assert!(rot.given_up == 0 || self.policy.may_give_up, "{rot:?}");
    }

    /// Stale nodes that were taken in, by any holder.
    pub fn healed(&self) -> u64 {
        self.healed + self.policy.healed
    }

    /// Asserts that the in-sync replicas hold the same, and that nothing is dirty any more.
    pub fn check_replicas(&mut self, clean: bool) {
        let in_sync = self.policy.record.in_sync;
        let mut contents = Vec::new();
        for node in in_sync.iter() {
            let content = self.content_of(node, &self.policy.record.layers());
            if clean {
                let store = &self.nodes[usize::from(node)].run().store;
                // Sticky ones stay where a node was admitted while another in-sync node was away, and
                // those of copies until the first clear of this epoch.
                let record = self.policy.record;
                let left = store
                    .dirty(&IMAGE)
                    .filter(|(_, entry)| !entry.sticky && entry.last.epoch == record.epoch);
                assert_eq!(left.count(), 0, "node {node} is dirty after a clean end of {record:?}");
            }
            contents.push(content);
        }
        let differ = contents.iter().position(|content| *content != contents[0]);
        assert_eq!(differ, None, "in-sync replicas differ (of {in_sync:?})");
        self.check_snapshots();
    }

    /// Asserts that each node in sync holds of every snapshot what it held when it was taken.
    fn check_snapshots(&mut self) {
        let (all, snapshots) = (self.policy.record.layers(), self.policy.record.snapshots());
        for snapshot in snapshots {
            let below = all.iter().position(|layer| *layer == snapshot.layer);
            let layers = &all[below.expect("a layer of the chain")..];
            for node in self.policy.record.in_sync.iter() {
                let content = self.content_of(node, layers);
                let expected = &self.frozen[&layers[0]];
                assert!(content == *expected, "node {node} holds another snapshot {layers:?}");
            }
        }
    }

    /// What a node holds of the regions, through these layers.
    pub fn content_of(&mut self, node: NodeIndex, layers: &[LayerId]) -> Vec<u8> {
        let store = &mut self.nodes[usize::from(node)].run().store;
        let last_block = SHARD_BYTES / BLOCK_BYTES;
        let mut content = Vec::new();
        let regions = (0..REGIONS as u64).flat_map(|region| [2 * region, 2 * region + 1]);
        for shard in regions {
            let first = if shard % 2 == 0 { last_block - 2 } else { 0 };
            let (mut states, mut data) = (Vec::new(), BytesMut::new());
            store
                .read_blocks(&IMAGE, layers, shard, first, 2, &mut states, &mut data)
                .expect("intact blocks");
            for state in &states {
                let block = match state.is_data() {
                    true => data.split_to(BLOCK_BYTES as usize).to_vec(),
                    false => vec![0; BLOCK_BYTES as usize],
                };
                content.extend(block);
            }
        }
        content
    }
}

fn offset_of(sector: usize) -> u64 {
    let (region, sector) = (sector / REGION_SECTORS, sector % REGION_SECTORS);
    let end_of_shard = (2 * region as u64 + 1) * u64::from(SHARD_BYTES);
    end_of_shard - 2 * u64::from(BLOCK_BYTES) + (sector * SECTOR) as u64
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
