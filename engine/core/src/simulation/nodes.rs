//! The nodes of the simulated cluster: their processes, and what they do with what arrives.

use super::network::{Item, Way};
use super::node::{LogSize, NodeRun, SimNode};
use super::world::{Action, Happening, MILLISECOND_NS, Span, World};
use crate::geometry::ImageId;
use crate::replica::Instance;
use crate::store::StoreError;
use crate::store::disk::Errno;
use crate::store::simulated::{Crash, SimDisk};
use crate::wire::messages::{HelloReply, take_write};
use crate::wire::{Frame, Status, VERSION, kind};

/// Steps of merging: a layer of which nothing is left takes some thirty.
const MERGES_PER_TICK: u64 = 40;
const NODE_TICK_NS: u64 = 500 * MILLISECOND_NS;

/// A node, and what the world knows of its process.
pub(super) struct Node {
    pub sim: SimNode,
    /// Counts the runs of its process.
    pub run: u64,
    pub paused: bool,
    /// Names the memory of its host: power cuts begin a new one, and syncs that fail.
    boot: u64,
    /// What was due while it was paused.
    held: Vec<Action>,
    sync: Span,
    checkpoint: Span,
    armed: Option<Crash>,
    /// An earlier state of its disk, put aside.
    snapshot: Option<SimDisk>,
}

impl Node {
    pub fn new(name: &str, log: LogSize) -> Node {
        Node {
            sim: SimNode::new(name, log),
            run: 0,
            paused: false,
            boot: 1,
            held: Vec::new(),
            sync: Span { min_ns: MILLISECOND_NS / 10, max_ns: 4 * MILLISECOND_NS },
            checkpoint: Span { min_ns: MILLISECOND_NS, max_ns: 50 * MILLISECOND_NS },
            armed: None,
            snapshot: None,
        }
    }
}

impl World {
    /// Starts a node's process, as one whose start counter others have seen at `seen_counter`.
    ///
    /// # Errors
    /// The store cannot be opened; the process has ended.
    pub fn start_node(
        &mut self,
        node: usize,
        seen_counter: u64,
        distrusted: &[ImageId],
    ) -> Result<Instance, StoreError> {
        let slot = &mut self.nodes[node];
        assert!(slot.sim.run.is_none(), "one process at a time");
        slot.run += 1;
        let started = slot.sim.start_as(seen_counter, distrusted);
        if let Err(error) = started {
            let crash = slot.armed.take().filter(|_| slot.sim.disk.has_crashed());
            let power = (crash == Some(Crash::PowerCut)).then(|| self.random.number());
            self.nodes[node].sim.stop(power);
            // A sync of the opening may have failed, too.
            self.nodes[node].boot += 1;
            self.remembers.retain(|(other, _)| *other != node);
            return Err(error);
        }
        let run = slot.run;
        self.schedule(self.now_ns + NODE_TICK_NS, Action::NodeTick { node, run });
        // Whoever still talks to the former process is told that nobody knows it.
        let of_former = |c: &super::network::Connection| {
            c.node == node && c.gateway_open && c.node_run.is_some_and(|former| former != run)
        };
        let former: Vec<u64> =
            self.connections.iter().filter(|(_, c)| of_former(c)).map(|(id, _)| *id).collect();
        former.into_iter().for_each(|id| self.push(id, Way::ToGateway, Item::Close));
        started
    }

    /// Ends a node's process; with `power` its host loses it, and memory with it.
    pub fn stop_node(&mut self, node: usize, power: bool) {
        let seed = power.then(|| self.random.number());
        let slot = &mut self.nodes[node];
        slot.run += 1;
        slot.paused = false;
        slot.armed = None;
        slot.held.clear();
        slot.boot += u64::from(power);
        slot.sim.stop(seed);
        if power {
            self.remembers.retain(|(other, _)| *other != node);
        }
        let ids: Vec<u64> =
            self.connections.iter().filter(|(_, c)| c.node == node).map(|(id, _)| *id).collect();
        for id in ids {
            let Some(connection) = self.connections.get(&id) else { continue };
            if !connection.node_open {
                continue;
            }
            let keep = self.random.below(connection.to_gateway.len() as u64 + 1) as usize;
            if let Some(connection) = self.connections.get_mut(&id) {
                connection.node_open = false;
                connection.to_node.truncate(0);
                connection.to_gateway.truncate(keep);
                connection.to_gateway.scheduled &= !connection.to_gateway.is_empty();
            }
            if !power {
                self.push(id, Way::ToGateway, Item::Close);
            }
        }
    }

    pub fn node_runs(&self, node: usize) -> bool {
        self.nodes[node].sim.run.is_some()
    }

    pub fn pause_node(&mut self, node: usize) {
        self.nodes[node].paused = true;
    }

    pub fn continue_node(&mut self, node: usize) {
        self.nodes[node].paused = false;
        let held = std::mem::take(&mut self.nodes[node].held);
        held.into_iter().for_each(|action| self.schedule(self.now_ns, action));
        self.go_on_between(None, Some(node));
    }

    /// Deletes an image for ever, as its daemon does on a tombstone.
    pub fn delete_image(&mut self, node: usize, image: ImageId) {
        self.with_run(node, |run| {
            run.store.delete(image)?;
            run.store.append()
        });
        self.settle_node(node);
    }

    // Its disk

    pub fn set_disk_speed(&mut self, node: usize, sync: Span) {
        self.nodes[node].sync = sync;
    }

    /// The next sync but `after` fails.
    pub fn fail_sync(&mut self, node: usize, after: u64) {
        self.nodes[node].sim.disk.fail_sync(after, Errno::IO);
    }

    /// Leaves so many bytes free on its disk; none: as many as it likes.
    pub fn set_free_bytes(&mut self, node: usize, free_bytes: Option<u64>) {
        let disk = &self.nodes[node].sim.disk;
        disk.set_capacity(free_bytes.map(|free| disk.allocated_bytes() + free));
    }

    /// After so many more steps of its disk the process ends in the midst of what it does.
    pub fn crash_after(&mut self, node: usize, steps: u64, power: bool) {
        let slot = &mut self.nodes[node];
        let crash = if power { Crash::PowerCut } else { Crash::Kill };
        slot.sim.disk.crash_at(slot.sim.disk.steps() + steps, crash);
        slot.armed = Some(crash);
    }

    /// Puts the disk's present state aside.
    pub fn snapshot_disk(&mut self, node: usize) {
        self.nodes[node].snapshot = Some(self.nodes[node].sim.disk.fork());
    }

    /// Puts the state that was put aside in place of the disk's. False: there is none.
    pub fn restore_disk(&mut self, node: usize) -> bool {
        let slot = &mut self.nodes[node];
        assert!(slot.sim.run.is_none(), "a disk is changed while its node is off");
        let Some(disk) = slot.snapshot.take() else { return false };
        slot.sim.replace_disk(disk);
        self.remembers.retain(|(other, _)| *other != node);
        true
    }

    /// Inverts a byte of a shard file, by two numbers that choose which. Gives where.
    pub fn corrupt(&mut self, node: usize, file: u64, place: u64) -> Option<(String, u64)> {
        let disk = &self.nodes[node].sim.disk;
        let shards: Vec<String> =
            disk.paths().into_iter().filter(|path| is_shard_file(path)).collect();
        let path = shards.get((file % shards.len().max(1) as u64) as usize)?;
        disk.corrupt(path, place).then(|| (path.clone(), place))
    }

    pub fn disk_paths(&self, node: usize) -> Vec<String> {
        self.nodes[node].sim.disk.paths()
    }

    // What it does

    pub(super) fn node_reads(&self, node: usize, connection: u64) -> bool {
        let slot = &self.nodes[node];
        !slot.paused && slot.sim.run.as_ref().is_none_or(|run| run.takes(connection))
    }

    pub(super) fn node_action(&mut self, node: usize, run: u64, action: Action) {
        let slot = &mut self.nodes[node];
        if slot.run != run || slot.sim.run.is_none() {
            return;
        }
        if slot.paused {
            return slot.held.push(action);
        }
        self.note([self.now_ns, 2000 + node as u64, run]);
        match action {
            Action::NodeTick { .. } => {
                self.schedule(self.now_ns + NODE_TICK_NS, action);
                self.give_signs_of_life(node);
                self.merge_some(node);
            }
            Action::SyncDone { .. } => self.with_run(node, |run| run.finish_sync()),
            _ => {
                let mut parked = Vec::new();
                self.with_run(node, |run| run.finish_checkpoint().map(|frames| parked = frames));
                for (id, frame) in parked {
                    self.node_takes(node, id, frame);
                    self.go_on(id, Way::ToNode);
                }
            }
        }
        self.settle_node(node);
    }

    /// Merges as much as a random number says.
    fn merge_some(&mut self, node: usize) {
        let merges = |world: &World| {
            world.nodes[node].sim.run.as_ref().is_some_and(|run| run.store.wants_merge())
        };
        if !merges(self) {
            return;
        }
        for _ in 0..1 + self.random.below(MERGES_PER_TICK) {
            self.with_run(node, NodeRun::merge);
        }
    }

    fn give_signs_of_life(&mut self, node: usize) {
        let run = self.nodes[node].sim.run.as_ref();
        let parked: Vec<u64> = run.map(|run| run.parked().collect()).unwrap_or_default();
        parked.into_iter().for_each(|id| self.push(id, Way::ToGateway, Item::Pong));
    }

    /// Has the node's process do something; a failure of its store ends it.
    fn with_run(&mut self, node: usize, act: impl FnOnce(&mut NodeRun) -> Result<(), StoreError>) {
        let slot = &mut self.nodes[node];
        let Some(run) = &mut slot.sim.run else { return };
        let done = act(run);
        let io_failed = done == Err(StoreError::Failed { errno: Errno::IO });
        let crashed = slot.sim.disk.has_crashed();
        let Some(why) = done.err().map(|e| e.to_string()).or(crashed.then(String::new)) else {
            return;
        };
        let power = crashed && slot.armed == Some(Crash::PowerCut);
        self.stop_node(node, power);
        if io_failed {
            // The kernel gives up what a failed sync left; the node's next process says so.
            self.nodes[node].boot += 1;
            self.remembers.retain(|(other, _)| *other != node);
        }
        let power = power || io_failed;
        let why = if crashed { "in the midst of what it did".to_owned() } else { why };
        self.happenings.push_back(Happening::NodeEnded { node, power, why });
    }

    /// Begins what syncs and checkpoints are due, and hands out answers.
    fn settle_node(&mut self, node: usize) {
        let (mut syncs, mut checkpoints) = (false, false);
        self.with_run(node, |run| {
            syncs = run.begin_sync()?;
            checkpoints = run.begin_checkpoint(false)?;
            Ok(())
        });
        let (run, spans) = {
            let slot = &self.nodes[node];
            (slot.run, (slot.sync, slot.checkpoint))
        };
        if syncs {
            let at_ns = self.now_ns + self.within(spans.0);
            self.schedule(at_ns, Action::SyncDone { node, run });
        }
        if checkpoints {
            let at_ns = self.now_ns + self.within(spans.1);
            self.schedule(at_ns, Action::CheckpointDone { node, run });
        }
        let Some(process) = &mut self.nodes[node].sim.run else { return };
        let answers: Vec<(u64, Frame)> = process.answers.drain(..).collect();
        let sent_away = std::mem::take(&mut process.sent_away);
        for (id, frame) in answers {
            self.push(id, Way::ToGateway, Item::Frame(frame));
        }
        for id in sent_away {
            self.end_at_node(id);
            self.push(id, Way::ToGateway, Item::Close);
        }
    }

    fn end_at_node(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.node_open = false;
        connection.to_node.truncate(0);
        let node = connection.node;
        if let Some(run) = &mut self.nodes[node].sim.run {
            run.end_connection(id);
        }
    }

    pub(super) fn node_receives(&mut self, id: u64, item: Item) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let node = connection.node;
        let slot = &mut self.nodes[node];
        let run = slot.run;
        let Some(process) = &mut slot.sim.run else {
            // Nobody listens: a host that is up says so.
            connection.to_node.truncate(0);
            return self.push(id, Way::ToGateway, Item::Close);
        };
        match item {
            Item::Hello => {
                connection.node_run = Some(run);
                connection.node_open = true;
                let mut boot = [0; 16];
                boot[..8].copy_from_slice(&slot.boot.to_le_bytes());
                let hello = HelloReply {
                    version: VERSION,
                    node: slot.sim.name.clone(),
                    store: process.store.id(),
                    start_counter: process.store.instance(),
                    boot,
                    flush_number: process.store.flush_number(),
                };
                self.push(id, Way::ToGateway, Item::Greeting(hello));
            }
            _ if connection.node_run != Some(run) || !connection.node_open => {
                connection.to_node.truncate(0);
                self.push(id, Way::ToGateway, Item::Close);
            }
            Item::Ping => self.push(id, Way::ToGateway, Item::Pong),
            Item::Close => self.end_at_node(id),
            Item::Frame(frame) => {
                self.node_takes(node, id, frame);
                self.settle_node(node);
            }
            Item::Greeting(_) | Item::Pong => unreachable!("a gateway does not answer"),
        }
    }

    fn node_takes(&mut self, node: usize, id: u64, frame: Frame) {
        let stamp = stamp_of(&frame);
        let mut applied = false;
        self.with_run(node, |run| {
            applied = run.take(id, frame)? == Some(Status::Ok);
            Ok(())
        });
        if let Some(key) = stamp.filter(|_| applied && self.nodes[node].sim.run.is_some()) {
            *self.applied.entry(key).or_default() |= 1 << node;
        }
    }
}

fn is_shard_file(path: &str) -> bool {
    path.starts_with("images/") && !path.ends_with("/record")
}

/// The stamp that a write carries, and the shard that it goes to.
fn stamp_of(frame: &Frame) -> Option<(u64, u64)> {
    if frame.kind != kind::WRITE {
        return None;
    }
    let io = take_write(frame.head.clone(), &mut Vec::new()).ok()?;
    let first = frame.payload.first_chunk::<8>()?;
    Some((u64::from_le_bytes(*first), io.shard))
}
