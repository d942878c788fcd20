//! The simulated cluster: its parts, its clock, and what is due next.

use super::gateways::{Answered, Gateway};
use super::network::{Connection, Item, Way};
use super::node::LogSize;
use super::nodes::Node;
use super::peers::{Line, PeerPath};
use crate::gateway::GatewayEvent;
use crate::geometry::ImageId;
use crate::store::simulated::Seeded;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

pub(super) const MILLISECOND_NS: u64 = 1_000_000;

const LATE_NS: u64 = 3000 * MILLISECOND_NS;

/// Something takes at least and at most so long.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    pub min_ns: u64,
    pub max_ns: u64,
}

/// What comes of time.
#[derive(Clone, Copy, Debug)]
pub(super) enum Action {
    Deliver { connection: u64, way: Way },
    DeliverToPeer { line: u64, back: bool },
    NodeTick { node: usize, run: u64 },
    SyncDone { node: usize, run: u64 },
    CheckpointDone { node: usize, run: u64 },
    GatewayTick { gateway: usize, run: u64 },
    Tell { gateway: usize, run: u64 },
}

/// What the driver has to hear.
#[derive(Debug)]
pub enum Happening {
    /// For the policy of a gateway.
    Event { gateway: usize, event: Box<GatewayEvent> },
    /// For a guest.
    Answer { gateway: usize, client: u64, cookie: u64, answered: Answered },
    /// A node's process has ended by itself. `power`: it may have lost what was not synced.
    NodeEnded { node: usize, power: bool, why: String },
}

/// See the module.
pub struct World {
    pub(super) now_ns: u64,
    pub(super) random: Seeded,
    due: BTreeMap<(u64, u64), Action>,
    serial: u64,
    pub(super) nodes: Vec<Node>,
    pub(super) gateways: Vec<Gateway>,
    pub(super) connections: BTreeMap<u64, Connection>,
    connection_serial: u64,
    /// Frames of a path take so long; by gateway and node.
    paths: Vec<Vec<Path>>,
    pub(super) lines: BTreeMap<u64, Line>,
    /// From each node to each other.
    pub(super) peer_paths: Vec<Vec<PeerPath>>,
    pub(super) happenings: VecDeque<Happening>,
    /// Nodes that have applied a write, by its stamp and shard.
    pub(super) applied: BTreeMap<(u64, u64), u64>,
    /// Nodes that were level with their peers on an image, and have kept their power since.
    pub(super) remembers: BTreeSet<(usize, ImageId)>,
    trace: u64,
    /// What was delivered, in words, where somebody wants to read it.
    told: Option<Vec<(u64, String)>>,
}

#[derive(Clone, Copy)]
struct Path {
    latency: Span,
    to_node_open: bool,
    to_gateway_open: bool,
}

impl World {
    /// A cluster of these nodes, all off, and so many gateways, all off.
    pub fn new(seed: u64, nodes: &[String], gateways: usize, log: LogSize) -> World {
        let latency = Span { min_ns: MILLISECOND_NS / 20, max_ns: MILLISECOND_NS };
        let path = Path { latency, to_node_open: true, to_gateway_open: true };
        World {
            now_ns: 0,
            random: Seeded::new(seed),
            due: BTreeMap::new(),
            serial: 0,
            nodes: nodes.iter().map(|name| Node::new(name, log)).collect(),
            gateways: (0..gateways).map(|_| Gateway::default()).collect(),
            connections: BTreeMap::new(),
            connection_serial: 0,
            paths: vec![vec![path; nodes.len()]; gateways],
            lines: BTreeMap::new(),
            peer_paths: vec![vec![PeerPath::default(); nodes.len()]; nodes.len()],
            happenings: VecDeque::new(),
            applied: BTreeMap::new(),
            remembers: BTreeSet::new(),
            trace: 0xcbf2_9ce4_8422_2325,
            told: None,
        }
    }

    pub fn now_ns(&self) -> u64 {
        self.now_ns
    }

    /// A digest of everything that was delivered so far, in order.
    pub fn trace(&self) -> u64 {
        self.trace
    }

    /// Keeps what is delivered, in words, from now on.
    pub fn tell_all(&mut self) {
        self.told = Some(Vec::new());
    }

    /// Takes out what was delivered since the last time: when, and what.
    pub fn take_told(&mut self) -> Vec<(u64, String)> {
        self.told.as_mut().map(std::mem::take).unwrap_or_default()
    }

    pub(super) fn note(&mut self, words: [u64; 3]) {
        for word in words {
            self.trace = (self.trace ^ word).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23);
        }
    }

    /// Lets time pass until something happens, at most until `until_ns`.
    pub fn run(&mut self, until_ns: u64) -> Option<Happening> {
        loop {
            if let Some(happening) = self.happenings.pop_front() {
                return Some(happening);
            }
            let next = self.due.first_key_value().map(|(key, _)| *key);
            let Some(key) = next.filter(|(time_ns, _)| *time_ns <= until_ns) else {
                self.now_ns = self.now_ns.max(until_ns);
                return None;
            };
            if let Some(action) = self.due.remove(&key) {
                self.now_ns = self.now_ns.max(key.0);
                self.act(action);
            }
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Deliver { connection, way } => self.deliver(connection, way),
            Action::DeliverToPeer { line, back } => self.deliver_to_peer(line, back),
            Action::NodeTick { node, run } => self.node_action(node, run, action),
            Action::SyncDone { node, run } => self.node_action(node, run, action),
            Action::CheckpointDone { node, run } => self.node_action(node, run, action),
            Action::GatewayTick { gateway, run } => self.gateway_action(gateway, run, action),
            Action::Tell { gateway, run } => self.gateway_action(gateway, run, action),
        }
    }

    pub(super) fn schedule(&mut self, at_ns: u64, action: Action) {
        self.serial += 1;
        self.due.insert((at_ns.max(self.now_ns), self.serial), action);
    }

    pub(super) fn within(&mut self, span: Span) -> u64 {
        span.min_ns + self.random.below(span.max_ns - span.min_ns + 1)
    }

    // The network

    /// Opens or blocks one way between a gateway and a node.
    pub fn set_path(&mut self, gateway: usize, node: usize, way: Way, passable: bool) {
        let path = &mut self.paths[gateway][node];
        match way {
            Way::ToNode => path.to_node_open = passable,
            Way::ToGateway => path.to_gateway_open = passable,
        }
        if passable {
            self.go_on_between(Some(gateway), Some(node));
        }
    }

    pub fn set_latency(&mut self, gateway: usize, node: usize, latency: Span) {
        self.paths[gateway][node].latency = latency;
    }

    /// What waited for a path or for its receiver is delivered from now on.
    pub(super) fn go_on_between(&mut self, gateway: Option<usize>, node: Option<usize>) {
        let concerned: Vec<u64> = self
            .connections
            .iter()
            .filter(|(_, c)| gateway.is_none_or(|g| g == c.gateway))
            .filter(|(_, c)| node.is_none_or(|n| n == c.node))
            .map(|(id, _)| *id)
            .collect();
        for id in concerned {
            self.go_on_after_a_while(id);
            self.go_on(id, Way::ToNode);
            self.go_on(id, Way::ToGateway);
        }
    }

    /// What a sender has given up is resent by its kernel, ever more seldom: it arrives late.
    fn go_on_after_a_while(&mut self, id: u64) {
        let late_ns = self.within(Span { min_ns: 0, max_ns: LATE_NS });
        let at_ns = self.now_ns + late_ns;
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let pipe = connection.pipe(Way::ToNode);
        let waits = !pipe.scheduled && !pipe.is_empty();
        if waits && !connection.gateway_open {
            connection.to_node.scheduled = true;
            self.schedule(at_ns, Action::Deliver { connection: id, way: Way::ToNode });
        }
    }

    pub(super) fn go_on(&mut self, id: u64, way: Way) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let pipe = connection.pipe(way);
        if !pipe.scheduled
            && let Some(due_ns) = pipe.next_due_ns()
        {
            pipe.scheduled = true;
            self.schedule(due_ns, Action::Deliver { connection: id, way });
        }
    }

    pub(super) fn push(&mut self, id: u64, way: Way, item: Item) {
        let Some(connection) = self.connections.get(&id) else { return };
        let latency = self.paths[connection.gateway][connection.node].latency;
        let due_ns = self.now_ns + self.within(latency);
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.pipe(way).push(due_ns, item);
            self.go_on(id, way);
        }
    }

    pub(super) fn new_connection(&mut self, gateway: usize, node: usize) -> u64 {
        let id = self.next_connection();
        let connection = Connection {
            gateway,
            gateway_run: self.gateways[gateway].run,
            node,
            node_run: None,
            gateway_open: true,
            node_open: false,
            to_node: Default::default(),
            to_gateway: Default::default(),
        };
        self.connections.insert(id, connection);
        id
    }

    pub(super) fn next_connection(&mut self) -> u64 {
        self.connection_serial += 1;
        self.connection_serial
    }

    /// Notes what has arrived between two nodes.
    pub(super) fn tell_of_peers(
        &mut self,
        id: u64,
        (from, to): (usize, usize),
        back: bool,
        item: &Item,
    ) {
        let (kind, tag) = numbers_of(item);
        self.note([self.now_ns, id << 16 | kind << 1 | u64::from(!back), tag]);
        if let Some(told) = &mut self.told {
            let way = if back { Way::ToGateway } else { Way::ToNode };
            let words = super::telling::told(item, way);
            let (from, to) = (&self.nodes[from].sim.name, &self.nodes[to].sim.name);
            told.push((self.now_ns, format!("  {from} {id} {to} {words}")));
        }
    }

    fn deliver(&mut self, id: u64, way: Way) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.pipe(way).scheduled = false;
        let (gateway, node) = (connection.gateway, connection.node);
        let path = self.paths[gateway][node];
        let held = match way {
            Way::ToNode => !path.to_node_open || !self.node_reads(node, id),
            Way::ToGateway => !path.to_gateway_open || self.gateways[gateway].paused,
        };
        if held {
            return;
        }
        let Some(item) = self.connections.get_mut(&id).and_then(|c| c.pipe(way).pop()) else {
            return;
        };
        let (kind, tag) = numbers_of(&item);
        self.note([self.now_ns, id << 16 | kind << 1 | u64::from(way == Way::ToNode), tag]);
        if let Some(told) = &mut self.told {
            let words = super::telling::told(&item, way);
            if !words.is_empty() {
                let node = &self.nodes[node].sim.name;
                told.push((self.now_ns, format!("  gate-{gateway} {id} {node} {words}")));
            }
        }
        match way {
            Way::ToNode => self.node_receives(id, item),
            Way::ToGateway => self.gateway_receives(id, item),
        }
        self.go_on(id, way);
        if self.connections.get(&id).is_some_and(Connection::is_over) {
            self.connections.remove(&id);
        }
    }
}

/// What the trace keeps of an item.
fn numbers_of(item: &Item) -> (u64, u64) {
    match item {
        Item::Frame(frame) => (u64::from(frame.kind), frame.tag),
        Item::Hello => (1001, 0),
        Item::Greeting(hello) => (1002, hello.start_counter),
        Item::Ping => (1003, 0),
        Item::Pong => (1004, 0),
        Item::Close => (1005, 0),
    }
}
