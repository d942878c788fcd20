//! Replicas that come and go, and the records that say who is in sync.

use super::image::{ImageIo, Phase, Purpose, ReplicaState, RequestKind};
use super::replies::BadReply;
use super::{Event, Instance, Layering, NodeIndex, NodeMask, PeekedRecord};
use crate::geometry::ImageId;
use crate::wire::messages::{Attach, Head, Peek, PeekReply, Record};
use crate::wire::{Frame, Status, kind};
use bytes::Bytes;

impl ImageIo {
    /// The connection to `node` is ready; `instance` is the one that greeted on it, `boot` that of its host.
    pub fn link_up(&mut self, node: NodeIndex, instance: Instance, boot: [u8; 16]) {
        if self.phase == Phase::Dead || self.replica(node).state != ReplicaState::Down {
            return;
        }
        self.heard_boot(node, boot);
        let replica = self.replica(node);
        replica.instance = Some(instance);
        if replica.served.is_some_and(|served| served != instance) {
            self.ask_again(NodeMask::one(node));
        }
        self.ask_for_record(node);
    }

    /// Asks a node that waits to be admitted for its record again; its answer is an event.
    pub fn peek(&mut self, node: NodeIndex) {
        let waits = usize::from(node) < self.replicas.len()
            && self.replica(node).state == ReplicaState::Waiting;
        if waits {
            self.ask_for_record(node);
        }
    }

    fn ask_for_record(&mut self, node: NodeIndex) {
        self.replica(node).state = ReplicaState::Peeking;
        self.replica(node).peeks += 1;
        let head = Peek(self.spec.image);
        self.send(NodeMask::one(node), kind::PEEK, 0, 0, &Bytes::new(), |out| head.put(out));
    }

    /// The connection to `node` is gone, and with it all that was not answered.
    pub fn link_down(&mut self, node: NodeIndex) {
        if self.phase == Phase::Dead {
            return;
        }
        self.abandon(node, ReplicaState::Down, Status::Io);
        let blocking = self.waits_for(node);
        self.replica(node).blocking_told = blocking;
        self.event(Event::ReplicaDown { node, blocking });
    }

    /// Nothing sent to `node` counts any more; what waits for it goes to others where it can.
    fn abandon(&mut self, node: NodeIndex, state: ReplicaState, status: Status) {
        let gone = NodeMask::one(node);
        let joined = self.is_joining(node);
        let was_up = self.replica(node).state == ReplicaState::Up;
        let took_part = was_up || joined || self.is_resuming(node);
        let replica = self.replica(node);
        replica.state = state;
        replica.flushed_mark = None;
        replica.blocking_told = false;
        let mut homeless = Vec::new();
        for (id, part) in self.parts.iter_mut() {
            part.sent = part.sent.without(gone);
            if part.kind.reads() && !part.confirming && part.waiting == gone {
                part.waiting = NodeMask::EMPTY;
                homeless.push(id);
            }
        }
        homeless.into_iter().for_each(|id| self.dispatch_read(id));
        if took_part {
            self.end_admission_without(node, status, joined);
        }
        if was_up || self.healing().has(node) {
            self.heal_without(node, status);
        }
        if was_up {
            self.begin_levelling_again();
            self.go_on_levelling();
        }
        self.repairs_without(node);
        self.restart_scrub();
        if self.in_sync_anywhere().has(node) {
            self.fail_freeze("a node in sync was lost");
        }
    }

    fn is_resuming(&self, node: NodeIndex) -> bool {
        let replica = &self.replicas[usize::from(node)];
        matches!(replica.state, ReplicaState::Joining { .. }) && replica.purpose == Purpose::Resume
    }

    fn waits_for(&self, node: NodeIndex) -> bool {
        self.sets.iter().any(|set| set.storing.has(node))
            || !self.held_flushes.is_empty() && self.in_sync_anywhere().has(node)
            || self.parts.iter().any(|(_, part)| match part.kind {
                RequestKind::Flush => {
                    part.waiting.and(self.in_sync_anywhere().with(self.healing())).has(node)
                }
                kind if kind.reads() && part.waiting.is_empty() => {
                    self.sets[part.set as usize].in_sync.without(part.tried).has(node)
                }
                _ => {
                    let in_sync = self.sets[part.set as usize].in_sync;
                    part.waiting.and(in_sync.with(self.healing())).has(node)
                }
            })
    }

    pub(super) fn take_peek(&mut self, node: NodeIndex, frame: Frame) -> Result<(), BadReply> {
        if self.replica(node).state != ReplicaState::Peeking {
            return Ok(());
        }
        let record = match frame.status {
            Status::Ok => {
                let mut peek =
                    PeekReply::take(frame.head).map_err(|_| BadReply("malformed peek"))?;
                let replica = self.replica(node);
                if replica.flush_number > 0 {
                    // What it answered us counts as its peers' word: theirs may be of long ago.
                    peek.peers.push((replica.name.clone(), replica.flush_number));
                }
                Some(PeekedRecord {
                    image: peek.record.image,
                    epoch: peek.record.epoch,
                    holder: peek.record.holder,
                    generation: peek.record.generation,
                    digest: peek.record.digest,
                    dirty: peek.dirty,
                    flush_number: peek.flush_number,
                    distrusted: peek.distrusted,
                    peers: peek.peers,
                    emptied: peek.emptied,
                    body: frame.payload,
                })
            }
            Status::NoRecord | Status::Deleted => None,
            _ => return Err(BadReply("peek failed")),
        };
        self.replica(node).state = ReplicaState::Waiting;
        let deleted = frame.status == Status::Deleted;
        let serial = self.replica(node).peeks;
        self.event(Event::Peeked { node, serial, record, deleted });
        Ok(())
    }

    /// Policy lets `nodes` in: each stores the record, gets a session and, unless it `resume`s (the
    /// instance that was here before, over a new connection), is levelled before it is `Up`.
    /// One whose instance is another than was `Up` is levelled in any case.
    ///
    /// With each node goes the serial of the `Peeked` event that policy judged by. A node that is not
    /// waiting, or was asked again since, is passed over: events that say so are on their way.
    pub fn admit(&mut self, nodes: &[(NodeIndex, u64)], resume: bool) {
        if self.phase == Phase::Dead {
            return;
        }
        for (node, serial) in nodes.iter().copied() {
            let Some(replica) = self.replicas.get(usize::from(node)) else { continue };
            if replica.state != ReplicaState::Waiting || replica.peeks != serial {
                continue;
            }
            let replica = self.replica(node);
            replica.state = ReplicaState::Joining { stored: false };
            let same = replica.served.is_some() && replica.served == replica.instance;
            replica.purpose = if resume && same { Purpose::Resume } else { Purpose::Level };
            if replica.purpose == Purpose::Level {
                self.ask_again(NodeMask::one(node));
            }
            self.send_record(NodeMask::one(node));
        }
    }

    pub(super) fn send_record(&mut self, nodes: NodeMask) {
        let (body, tag) = (self.spec.body.clone(), self.spec.generation);
        let blank = nodes.and(self.healed_from_nothing());
        for (nodes, blank) in [(nodes.without(blank), false), (blank, true)] {
            let (layers, snapshots) = (self.spec.layers.clone(), self.spec.snapshots.clone());
            let merging = self.spec.merging.clone();
            let record = Record { head: self.record_head(), blank, layers, snapshots, merging };
            self.send(nodes, kind::RECORD, 0, tag, &body, |out| record.put(out));
        }
    }

    pub(super) fn take_record(&mut self, node: NodeIndex, frame: Frame) -> Result<(), BadReply> {
        if matches!(
            self.replica(node).state,
            ReplicaState::Down | ReplicaState::Peeking | ReplicaState::Waiting
        ) {
            // An answer to what an admission that has failed asked for.
            return Ok(());
        }
        match frame.status {
            Status::Ok => {}
            // What a node that was left behind believes is no reason to stop serving.
            status if self.is_entering_heal(node) => {
                self.fail_heal(status);
                return Ok(());
            }
            Status::StaleEpoch | Status::StaleGeneration | Status::Deleted => {
                if frame.tag == self.spec.generation {
                    self.fence(node, frame.status);
                }
                return Ok(());
            }
            status => {
                self.event(Event::ReplicaFailed { node, status });
                return Err(BadReply("the record could not be stored"));
            }
        }
        for set in &mut self.sets {
            if set.storing_generation <= frame.tag && set.storing.has(node) {
                set.storing = set.storing.without(NodeMask::one(node));
                set.first_stored_ns.get_or_insert(self.now_ns);
            }
        }
        if self.replica(node).state == (ReplicaState::Joining { stored: false })
            && frame.tag == self.spec.generation
        {
            self.replica(node).state = ReplicaState::Joining { stored: true };
            self.send_attach(node);
        }
        self.after_store();
        Ok(())
    }

    fn send_attach(&mut self, node: NodeIndex) {
        let attach =
            Attach { image: self.spec.image, epoch: self.spec.epoch, holder: self.spec.holder };
        self.send(NodeMask::one(node), kind::ATTACH, 0, 0, &Bytes::new(), |out| attach.put(out));
    }

    pub(super) fn take_attach(&mut self, node: NodeIndex, frame: Frame) -> Result<(), BadReply> {
        if self.replica(node).state != (ReplicaState::Joining { stored: true }) {
            return Ok(());
        }
        match (frame.status, self.replica(node).purpose) {
            (Status::Ok, Purpose::Resume) => {
                self.go_up(NodeMask::one(node));
                self.begin_levelling_again();
                self.go_on_levelling();
                self.start_admission();
            }
            (Status::Ok, Purpose::Level) => {
                self.replica(node).state = ReplicaState::Listing;
                self.start_admission();
            }
            (Status::Ok, Purpose::Heal) => {
                self.replica(node).state = ReplicaState::Healing;
                self.begin_listing();
            }
            (status, Purpose::Heal) => self.fail_heal(status),
            (Status::StaleEpoch | Status::Deleted, _) => self.fence(node, frame.status),
            _ => return Err(BadReply("no session")),
        }
        Ok(())
    }

    /// `nodes` serve from now on: what they missed is sent again in sequence order.
    pub(super) fn go_up(&mut self, nodes: NodeMask) {
        for node in nodes.iter() {
            let replica = self.replica(node);
            replica.state = ReplicaState::Up;
            replica.served = replica.instance;
            replica.blocking_told = false;
        }
        let mut unsent: Vec<(u64, usize)> = self
            .parts
            .iter()
            .filter(|(_, part)| !part.waiting.without(part.sent).and(nodes).is_empty())
            .map(|(id, part)| (part.sequence, id))
            .collect();
        // Writes in their order; flushes and confirmations (sequence 0) after them.
        unsent.sort_by_key(|(sequence, id)| (*sequence == 0, *sequence, *id));
        unsent.into_iter().for_each(|(_, id)| self.send_missing(id, nodes));
        self.dispatch_parked_reads();
        self.repairs_have_hope();
        self.restart_repairs();
        self.restart_scrub();
    }

    /// The record of a new generation: who is in sync in each set from now on. Requests that waited
    /// only for nodes that are not, are answered once all in-sync nodes of the changed sets have
    /// stored it (`Event::Stored`). Before the image is open it only replaces the former record.
    ///
    /// Other layers than before are taken while the image is frozen; changes of a set go on when its nodes in
    /// sync have stored them. That layers are merged changes nothing for clients; what compares nodes begins
    /// anew.
    pub fn reconfigure(
        &mut self,
        generation: u64,
        digest: [u8; 32],
        body: Bytes,
        in_sync: &[NodeMask],
        Layering { layers, snapshots, merging }: Layering,
    ) {
        assert!(generation > self.spec.generation, "generations only grow");
        assert_eq!(in_sync.len(), self.sets.len(), "one mask for each replica set");
        if self.phase == Phase::Dead {
            return;
        }
        self.spec.generation = generation;
        self.spec.digest = digest;
        self.spec.body = body;
        let remade = self.spec.layers != layers || self.spec.merging != merging;
        (self.spec.snapshots, self.spec.merging) = (snapshots, merging);
        let relayered = self.spec.layers != layers;
        match relayered {
            true => self.change_layers(&layers),
            false => self.fail_freeze("the record has changed"),
        }
        let before = self.in_sync_anywhere();
        let mut storing = NodeMask::EMPTY;
        for (set, in_sync) in self.sets.iter_mut().zip(in_sync) {
            assert!(in_sync.without(set.members).is_empty(), "only members are in sync");
            if set.in_sync == *in_sync && !relayered {
                continue;
            }
            set.in_sync = *in_sync;
            if self.phase != Phase::Opening {
                set.storing = *in_sync;
                set.storing_generation = generation;
                set.first_stored_ns = None;
                storing = storing.with(*in_sync);
            }
        }
        self.store_told = false;
        self.clear.pending = self.clear.pending.and(self.in_sync_everywhere());
        self.heal_reconfigured();
        self.judge_memory();
        for node in before.without(self.in_sync_anywhere()).iter() {
            self.let_go(node);
        }
        // Who is joining waits for an answer that names the generation of now, changed set or not; the
        // others are told, so that every node that is here keeps what is in force.
        let told = self.nodes_in(|state| {
            !matches!(state, ReplicaState::Down | ReplicaState::Peeking | ReplicaState::Waiting)
        });
        self.send_record_to_connected(storing.with(told));
        // Behind the record: a node is asked of layers that it knows, all nodes before or after they merge.
        self.level_reconfigured();
        if remade {
            self.restart_heal();
            self.rescrub_layers();
        }
        self.after_store();
        self.dispatch_parked_reads();
        self.restart_repairs();
        self.restart_scrub();
    }

    fn send_record_to_connected(&mut self, nodes: NodeMask) {
        for node in nodes.iter() {
            match self.replica(node).state {
                ReplicaState::Up | ReplicaState::Listing | ReplicaState::Healing => {
                    self.send_record(NodeMask::one(node));
                }
                ReplicaState::Joining { .. } => {
                    self.replica(node).state = ReplicaState::Joining { stored: false };
                    self.send_record(NodeMask::one(node));
                }
                ReplicaState::Down | ReplicaState::Peeking | ReplicaState::Waiting => {
                    self.tell_blocking(node);
                }
            }
        }
    }

    /// A node that is in sync nowhere any more: nothing is asked of it until policy admits it again.
    fn let_go(&mut self, node: NodeIndex) {
        self.replica(node).served = None;
        let state = match self.replica(node).state {
            // Its answer is on its way, and tells policy that it is there.
            ReplicaState::Peeking => ReplicaState::Peeking,
            ReplicaState::Down => ReplicaState::Down,
            _ => ReplicaState::Waiting,
        };
        self.abandon(node, state, Status::StaleGeneration);
    }

    /// Answers what the store of a record held back.
    fn after_store(&mut self) {
        if !self.store_told && self.sets.iter().all(|set| set.storing.is_empty()) {
            self.store_told = true;
            let generation = self.spec.generation;
            self.event(Event::Stored { generation });
        }
        self.thaw_stored();
        self.complete_answered();
    }

    /// Answers every part that nobody who counts is missing any more.
    pub(super) fn complete_answered(&mut self) {
        let all: Vec<usize> = self.parts.iter().map(|(id, _)| id).collect();
        for id in all {
            if self.parts.contains(id) && !self.parts[id].is_unsent_read() {
                self.complete_if_answered(id);
            }
        }
    }

    /// Makes the image ready for requests, once its replicas are up.
    pub(super) fn run_if_opening(&mut self) {
        if self.phase == Phase::Opening {
            self.phase = Phase::Running;
        }
    }

    pub fn image(&self) -> ImageId {
        self.spec.image
    }
}

impl super::image::Part {
    /// Whether it changes content.
    pub(super) fn is_change(&self) -> bool {
        matches!(self.kind, RequestKind::Write | RequestKind::Zero)
    }

    fn is_unsent_read(&self) -> bool {
        self.kind.reads() && !self.confirming
    }
}
