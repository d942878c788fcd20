//! Connections between nodes of the simulated cluster: what `node::peers` does with sockets, and lines that
//! are slow, cut in one way or both, or break.

use super::network::{Item, Pipe};
use super::world::{Action, MILLISECOND_NS, Span, World};
use crate::node::pulls::Effect;
use crate::wire::messages::Head;
use crate::wire::{Frame, Status, kind};
use bytes::{Bytes, BytesMut};
use std::net::{Ipv4Addr, SocketAddr};

/// A connection of one run of a node to another node.
pub(super) struct Line {
    from: usize,
    from_run: u64,
    /// What the asking node calls it.
    peer: u64,
    to: usize,
    /// None: the other node has not taken it yet.
    to_run: Option<u64>,
    from_open: bool,
    to_open: bool,
    there: Pipe,
    back: Pipe,
}

impl Line {
    fn pipe(&mut self, back: bool) -> &mut Pipe {
        if back { &mut self.back } else { &mut self.there }
    }

    fn is_over(&self) -> bool {
        let there = self.to_open || !self.there.is_empty();
        let back = self.from_open || !self.back.is_empty();
        !there && !back
    }
}

/// One way between two nodes.
#[derive(Clone, Copy)]
pub(super) struct PeerPath {
    latency: Span,
    open: bool,
}

impl Default for PeerPath {
    fn default() -> PeerPath {
        let latency = Span { min_ns: MILLISECOND_NS / 20, max_ns: MILLISECOND_NS };
        PeerPath { latency, open: true }
    }
}

/// Where others reach a node: nothing but its number.
pub(super) fn address_of(node: usize) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, 7000 + node as u16))
}

impl World {
    /// Opens or blocks the way from one node to another.
    pub fn set_peer_path(&mut self, from: usize, to: usize, passable: bool) {
        self.peer_paths[from][to].open = passable;
        if passable {
            self.go_on_with_peers(from);
            self.go_on_with_peers(to);
        }
    }

    pub fn set_peer_latency(&mut self, from: usize, to: usize, latency: Span) {
        self.peer_paths[from][to].latency = latency;
    }

    /// Breaks the connections on which one node asks another.
    pub fn reset_peers(&mut self, from: usize, to: usize) {
        let lines = self.lines.iter().filter(|(_, l)| l.from == from && l.to == to && l.from_open);
        let lines: Vec<u64> = lines.map(|(id, _)| *id).collect();
        for id in lines {
            self.end_line_at_asker(id, false);
        }
        self.settle_node(from);
    }

    /// Carries out what a node wants of connections to others.
    pub(super) fn carry_out_pulls(&mut self, node: usize) {
        let Some(run) = &mut self.nodes[node].sim.run else { return };
        for effect in run.pull_effects() {
            match effect {
                Effect::Connect { peer, source } => {
                    let to = self.nodes.iter().position(|other| other.sim.name == source.node);
                    let to = to.expect("an image lies on nodes of the cluster");
                    assert_eq!(source.address, address_of(to), "it is sent to the right place");
                    let id = self.new_line(node, peer, to);
                    self.push_to_peer(id, false, Item::Hello);
                }
                Effect::Ask { peer, tag, asked } => {
                    let mut head = BytesMut::new();
                    asked.put(&mut head);
                    let (kind, status) = (kind::PEER_FETCH, Status::Ok);
                    let (head, payload) = (head.freeze(), Bytes::new());
                    let frame = Frame { kind, flags: 0, status, channel: 0, tag, head, payload };
                    if let Some(id) = self.line_of(node, peer) {
                        self.push_to_peer(id, false, Item::Frame(frame));
                    }
                }
                Effect::Close { peer } => {
                    if let Some(id) = self.line_of(node, peer) {
                        self.end_line_at_asker(id, false);
                    }
                }
            }
        }
    }

    fn new_line(&mut self, from: usize, peer: u64, to: usize) -> u64 {
        let id = self.next_connection();
        let line = Line {
            from,
            from_run: self.nodes[from].run,
            peer,
            to,
            to_run: None,
            from_open: true,
            to_open: false,
            there: Pipe::default(),
            back: Pipe::default(),
        };
        self.lines.insert(id, line);
        id
    }

    fn line_of(&self, node: usize, peer: u64) -> Option<u64> {
        let run = self.nodes[node].run;
        let of_peer = |line: &Line| (line.from, line.from_run, line.peer) == (node, run, peer);
        let found = self.lines.iter().find(|(_, line)| of_peer(line) && line.from_open);
        found.map(|(id, _)| *id)
    }

    /// Whether this is a connection between nodes.
    pub(super) fn is_line(&self, id: u64) -> bool {
        self.lines.contains_key(&id)
    }

    pub(super) fn push_to_peer(&mut self, id: u64, back: bool, item: Item) {
        let Some(line) = self.lines.get(&id) else { return };
        let (from, to) = if back { (line.to, line.from) } else { (line.from, line.to) };
        let due_ns = self.now_ns + self.within(self.peer_paths[from][to].latency);
        if let Some(line) = self.lines.get_mut(&id) {
            line.pipe(back).push(due_ns, item);
            self.go_on_with_line(id, back);
        }
    }

    fn go_on_with_line(&mut self, id: u64, back: bool) {
        let Some(line) = self.lines.get_mut(&id) else { return };
        let pipe = line.pipe(back);
        if !pipe.scheduled
            && let Some(due_ns) = pipe.next_due_ns()
        {
            pipe.scheduled = true;
            self.schedule(due_ns, Action::DeliverToPeer { line: id, back });
        }
    }

    /// What waited for a way, or for this node, is delivered from now on.
    pub(super) fn go_on_with_peers(&mut self, node: usize) {
        let lines = self.lines.iter().filter(|(_, line)| line.from == node || line.to == node);
        let lines: Vec<u64> = lines.map(|(id, _)| *id).collect();
        for id in lines {
            self.go_on_with_line(id, false);
            self.go_on_with_line(id, true);
        }
    }

    pub(super) fn deliver_to_peer(&mut self, id: u64, back: bool) {
        let Some(line) = self.lines.get_mut(&id) else { return };
        line.pipe(back).scheduled = false;
        let (from, to) = (line.from, line.to);
        let held = match back {
            false => !self.peer_paths[from][to].open || !self.node_reads(to, id),
            true => !self.peer_paths[to][from].open || self.nodes[from].paused,
        };
        if held {
            return;
        }
        let Some(item) = self.lines.get_mut(&id).and_then(|line| line.pipe(back).pop()) else {
            return;
        };
        self.tell_of_peers(id, (from, to), back, &item);
        match back {
            false => self.asked_by_peer(id, item),
            true => self.answered_by_peer(id, item),
        }
        self.go_on_with_line(id, back);
        if self.lines.get(&id).is_some_and(Line::is_over) {
            self.lines.remove(&id);
        }
    }

    /// At the node that is asked.
    fn asked_by_peer(&mut self, id: u64, item: Item) {
        let Some(line) = self.lines.get_mut(&id) else { return };
        let (node, run) = (line.to, self.nodes[line.to].run);
        let runs = self.nodes[node].sim.run.is_some();
        let known = line.to_run == Some(run) && line.to_open;
        match item {
            Item::Hello if runs => {
                (line.to_run, line.to_open) = (Some(run), true);
                let hello = self.nodes[node].hello();
                self.push_to_peer(id, true, Item::Greeting(hello));
            }
            Item::Close => self.end_line_at_asked(id),
            Item::Frame(frame) if runs && known => {
                self.node_takes(node, id, frame);
                self.settle_node(node);
            }
            _ => {
                line.there.truncate(0);
                self.push_to_peer(id, true, Item::Close);
            }
        }
    }

    /// At the node that asks.
    fn answered_by_peer(&mut self, id: u64, item: Item) {
        let Some(line) = self.lines.get_mut(&id) else { return };
        let (node, peer) = (line.from, line.peer);
        if line.from_run != self.nodes[node].run || !line.from_open {
            return line.back.truncate(0);
        }
        let now_ns = self.now_ns;
        match item {
            Item::Greeting(_) => self.with_run(node, |run| {
                run.peer_greeted(peer, now_ns);
                Ok(())
            }),
            Item::Frame(frame) => {
                let mut honest = true;
                self.with_run(node, |run| {
                    honest = run.peer_answers(peer, frame, now_ns)?;
                    Ok(())
                });
                assert!(honest, "a node of the cluster breaks the protocol");
            }
            Item::Close => self.end_line_at_asker(id, false),
            Item::Hello | Item::Ping | Item::Pong => unreachable!("a node answers"),
        }
        self.settle_node(node);
    }

    /// The asking node gives a connection up, or hears that it is over.
    fn end_line_at_asker(&mut self, id: u64, power: bool) {
        let Some(line) = self.lines.get_mut(&id) else { return };
        let (node, run, peer) = (line.from, line.from_run, line.peer);
        line.from_open = false;
        line.back.truncate(0);
        if !power {
            self.push_to_peer(id, false, Item::Close);
        }
        let now_ns = self.now_ns;
        if self.nodes[node].run == run
            && let Some(process) = &mut self.nodes[node].sim.run
        {
            process.peer_ended(peer, now_ns);
        }
    }

    fn end_line_at_asked(&mut self, id: u64) {
        let Some(line) = self.lines.get_mut(&id) else { return };
        line.to_open = false;
        line.there.truncate(0);
        let node = line.to;
        if let Some(run) = &mut self.nodes[node].sim.run {
            run.end_connection(id);
        }
    }

    /// The asked node sends a peer away.
    pub(super) fn send_peer_away(&mut self, id: u64) {
        self.end_line_at_asked(id);
        self.push_to_peer(id, true, Item::Close);
    }

    /// A node's process has ended (`power`: with its host): what it had not handed to the network is gone.
    pub(super) fn stop_peers(&mut self, node: usize, power: bool) {
        let lines: Vec<u64> = self.lines.keys().copied().collect();
        for id in lines {
            let Some(line) = self.lines.get_mut(&id) else { continue };
            if line.from == node && line.from_open {
                let keep = self.random.below(line.there.len() as u64 + 1) as usize;
                line.there.truncate(keep);
                line.there.scheduled &= !line.there.is_empty();
                self.end_line_at_asker(id, power);
            } else if line.to == node && line.to_open {
                let keep = self.random.below(line.back.len() as u64 + 1) as usize;
                line.to_open = false;
                line.there.truncate(0);
                line.back.truncate(keep);
                line.back.scheduled &= !line.back.is_empty();
                if !power {
                    self.push_to_peer(id, true, Item::Close);
                }
            }
        }
    }

    /// A node has started: who still talks to its former process is told that nobody knows it.
    pub(super) fn renounce_peers(&mut self, node: usize) {
        let run = self.nodes[node].run;
        let former = |line: &Line| {
            line.to == node && line.from_open && line.to_run.is_some_and(|former| former != run)
        };
        let lines = self.lines.iter().filter(|(_, line)| former(line));
        let lines: Vec<u64> = lines.map(|(id, _)| *id).collect();
        lines.into_iter().for_each(|id| self.push_to_peer(id, true, Item::Close));
    }
}
