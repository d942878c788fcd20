//! Answers of the nodes: counted, verified, and turned into answers for the clients.

use super::asks::is_ask;
use super::changes::extents_of;
use super::emptied::EMPTIED;
use super::image::{Clear, ImageIo, Phase, RequestKind};
use super::level::Leveller;
use super::reads::{Content, content_of};
use super::{Event, IoError, NodeIndex, NodeMask, Outcome, Output};
use crate::rules::{Rule, broken};
use crate::wire::codec::Fields;
use crate::wire::messages::{Head, Number, Session};
use crate::wire::{Frame, REPLY, Status, flag, kind};
use bytes::Bytes;

/// An answer that no honest node gives; its connection has to end.
#[derive(Debug, PartialEq, Eq)]
pub struct BadReply(pub &'static str);

impl ImageIo {
    /// Takes one frame of `node`.
    ///
    /// # Errors
    /// The node breaks the protocol: close its connection (and tell `link_down`).
    pub fn receive(&mut self, node: NodeIndex, frame: Frame) -> Result<(), BadReply> {
        if self.phase == Phase::Dead {
            return Ok(());
        }
        if is_ask(frame.tag) {
            self.background.reckon(self.now_ns);
            if frame.flags & flag::BESIDE_CLIENTS != 0 {
                // Perhaps of another gateway, whose requests are not seen here.
                self.background.asked(self.now_ns);
            }
            self.take_dirty(node, frame.clone())?;
            self.take_level(node, frame.clone())?;
            self.take_repair(node, frame.clone())?;
            self.take_scrub(node, frame.clone())?;
            return self.take_heal(node, frame);
        }
        match frame.kind & !REPLY {
            kind::WRITE | kind::ZERO | kind::FLUSH | kind::CONFIRM => self.count(node, frame),
            kind::READ | kind::STATUS | kind::CHANGES | kind::TOUCHED => {
                self.take_read(node, frame)
            }
            kind::PEEK if frame.tag == EMPTIED => self.take_emptied(node, frame),
            kind::PEEK => self.take_peek(node, frame),
            kind::RECORD => self.take_record(node, frame),
            kind::ATTACH => self.take_attach(node, frame),
            kind::CLEAR | kind::DETACH => Ok(()),
            _ => Err(BadReply("a reply of unknown kind")),
        }
    }

    /// The part that a reply's tag names, unless it is gone or another has its place.
    fn part_of(&self, tag: u64) -> Option<usize> {
        let id = (tag & 0xffff_ffff) as usize;
        self.parts.get(id).filter(|part| u64::from(part.serial) == tag >> 32).map(|_| id)
    }

    fn count(&mut self, node: NodeIndex, frame: Frame) -> Result<(), BadReply> {
        let Some(id) = self.part_of(frame.tag) else { return Ok(()) };
        if !self.parts[id].sent.has(node) {
            return Ok(());
        }
        let changes = matches!(self.parts[id].kind, RequestKind::Write | RequestKind::Zero);
        if frame.status == Status::BadBlock && changes {
            return self.cannot_merge(id, node, frame.head);
        }
        if frame.status != Status::Ok {
            self.failed(id, node, frame.status);
            return Ok(());
        }
        if frame.kind & !REPLY == kind::FLUSH {
            self.take_flush_number(node, frame.head)?;
            let mark = self.parts[id].marks.iter().find(|(other, _)| *other == node);
            let mark = mark.map(|(_, mark)| *mark);
            let replica = self.replica(node);
            replica.flushed_mark = replica.flushed_mark.max(mark);
        }
        self.measure(id, node);
        let part = &mut self.parts[id];
        part.waiting = part.waiting.without(NodeMask::one(node));
        self.complete_if_answered(id);
        self.heal_applied();
        Ok(())
    }

    /// `node` has synced, and says which of its flushes that was.
    pub(super) fn take_flush_number(
        &mut self,
        node: NodeIndex,
        head: Bytes,
    ) -> Result<(), BadReply> {
        let number = Number::take(head).map_err(|_| BadReply("flush without number"))?;
        self.replica(node).flush_number = number.0;
        Ok(())
    }

    /// A replica could not do a part: it stays unanswered by it, and is asked again at the next tick.
    fn failed(&mut self, id: usize, node: NodeIndex, status: Status) {
        let part = &mut self.parts[id];
        part.sent = part.sent.without(NodeMask::one(node));
        match status {
            Status::StaleEpoch | Status::Deleted => self.fence(node, status),
            // Asked under a generation of before, while the new record was on its way.
            Status::StaleGeneration | Status::BadChecksum => {}
            Status::DirtyFull if self.in_sync_everywhere().has(node) => {
                self.make_room_in_dirty_maps();
            }
            status if self.is_only_healed_by(id, node) => self.fail_heal(status),
            status => {
                if status == Status::NoSpace {
                    self.found_full(id, node);
                }
                self.event(Event::ReplicaFailed { node, status });
            }
        }
    }

    /// Answers a counted part if nobody who counts is missing.
    pub(super) fn complete_if_answered(&mut self, id: usize) {
        let part = &self.parts[id];
        let counted = match part.kind {
            RequestKind::Flush => {
                let storing = self.sets.iter().any(|set| !set.storing.is_empty());
                let counts = self.in_sync_anywhere().with(self.healing());
                !storing && part.waiting.and(counts).is_empty()
            }
            RequestKind::Write | RequestKind::Zero => {
                let set = &self.sets[part.set as usize];
                let counts = set.in_sync.with(self.healing());
                let stored = set.storing.is_empty() || broken(Rule::StoredBeforeAnswer);
                let missing = part.waiting.and(counts).0.count_ones();
                stored && missing <= u32::from(broken(Rule::AllInSyncAnswer))
            }
            RequestKind::Read
            | RequestKind::Status
            | RequestKind::Changes
            | RequestKind::Touched => {
                part.confirming && part.waiting.and(self.sets[part.set as usize].in_sync).is_empty()
            }
            RequestKind::Pause => false,
        };
        if !counted {
            return;
        }
        let part = self.parts.remove(id);
        match part.kind {
            RequestKind::Write | RequestKind::Zero => {
                self.sequence_answered(part.sequence);
                self.change_answered(part.set, part.flags & flag::FUA != 0);
                self.overwritten(part.shard, part.offset, part.length);
            }
            RequestKind::Flush => {
                self.flush_covered(part.request);
                self.flush_done(part.clear_sequence);
            }
            _ => {}
        }
        self.part_done(part.request);
    }

    /// All in-sync nodes hold everything up to `sequence` durably: it may be cleared.
    fn flush_done(&mut self, sequence: u64) {
        if sequence > self.clear.sequence {
            let in_sync = self.in_sync_anywhere();
            let proof = self.flush_numbers(in_sync);
            self.clear = Clear { sequence, proof, pending: self.in_sync_everywhere() };
        }
        if self.dirty_full {
            self.dirty_full = false;
            let whole = self.whole();
            self.send_clear(self.clear.pending.and(whole));
            self.send_unsent();
        }
    }

    /// A node can take no more dirty shards: what is answered is flushed and cleared, then the node
    /// is asked again. It is not failing.
    fn make_room_in_dirty_maps(&mut self) {
        if !self.dirty_full {
            self.dirty_full = true;
            self.submit_own_flush();
        }
    }

    /// The last flush of each of `nodes` that was answered, by name.
    pub(super) fn flush_numbers(&self, nodes: NodeMask) -> Vec<(String, u64)> {
        let numbers = nodes.iter().map(|node| {
            let replica = &self.replicas[usize::from(node)];
            (replica.name.clone(), replica.flush_number)
        });
        numbers.collect()
    }

    fn take_read(&mut self, node: NodeIndex, frame: Frame) -> Result<(), BadReply> {
        let Some(id) = self.part_of(frame.tag) else { return Ok(()) };
        if self.parts[id].waiting != NodeMask::one(node) || self.parts[id].confirming {
            return Ok(());
        }
        let good = match frame.status {
            Status::Ok if self.parts[id].kind == RequestKind::Touched => {
                if self.take_touched(id, frame)? {
                    self.parts[id].waiting = NodeMask::EMPTY;
                    self.dispatch_read(id);
                    return Ok(());
                }
                true
            }
            Status::Ok => match self.read_content(id, frame)? {
                None => true,
                Some(index) => {
                    let part = &self.parts[id];
                    let (shard, block) = (part.shard, part.blocks().start + index);
                    self.found_rot(node, shard, block);
                    false
                }
            },
            Status::StaleEpoch | Status::StaleGeneration | Status::Deleted => {
                self.parts[id].waiting = NodeMask::EMPTY;
                self.fence(node, frame.status);
                return Ok(());
            }
            Status::BadBlock => {
                let block = Fields(frame.head).u32().map_err(|_| BadReply("no block named"))?;
                let shard = self.parts[id].shard;
                if !self.parts[id].blocks().contains(&block) {
                    return Err(BadReply("a block that was not asked for"));
                }
                self.found_rot(node, shard, block);
                false
            }
            // A snapshot that is compared with has gone; the node is well.
            Status::NoLayers => false,
            status => {
                self.event(Event::ReplicaFailed { node, status });
                false
            }
        };
        let part = &mut self.parts[id];
        part.waiting = NodeMask::EMPTY;
        if !good {
            part.tried = part.tried.with(NodeMask::one(node));
            self.dispatch_read(id);
        } else if self.now_ns > self.lease_deadline_ns && !broken(Rule::ReadsAreConfirmed) {
            self.confirm(id);
        } else {
            let request = self.parts.remove(id).request;
            self.part_done(request);
        }
        Ok(())
    }

    /// Puts a read part's answer into its request; or gives the index of a block that did not match its
    /// checksum.
    fn read_content(&mut self, id: usize, frame: Frame) -> Result<Option<u32>, BadReply> {
        let part = &self.parts[id];
        let (request, position) = (part.request, part.position as usize);
        if part.kind == RequestKind::Changes {
            let request = &mut self.requests[request];
            let since = request.changes.since.len();
            request.extents[position] = extents_of(frame, since, part.offset, part.length)?;
            return Ok(None);
        }
        match content_of(frame, part.kind, part.offset, part.length)? {
            Content::Damaged(index) => return Ok(Some(index)),
            Content::Runs(runs) => self.requests[request].runs[position] = runs,
            Content::Extents(extents) => self.requests[request].extents[position] = extents,
        }
        Ok(None)
    }

    /// Past the lease time: a read is answered when every in-sync node has confirmed the epoch since.
    fn confirm(&mut self, id: usize) {
        let part = &mut self.parts[id];
        part.confirming = true;
        part.waiting = self.sets[part.set as usize].in_sync;
        part.sent = NodeMask::EMPTY;
        let up = part.waiting.and(self.up());
        self.send_confirm(id, up);
        let absent = self.parts[id].waiting.without(up);
        absent.iter().for_each(|node| self.tell_blocking(node));
    }

    pub(super) fn send_confirm(&mut self, id: usize, nodes: NodeMask) {
        let tag = self.tag_of(id);
        self.parts[id].sent = self.parts[id].sent.with(nodes);
        let head = Session { epoch: self.spec.epoch };
        self.send(nodes, kind::CONFIRM, 0, tag, &Bytes::new(), |out| head.put(out));
    }

    /// Another holder, or another membership, is known to a node: answer nothing more.
    pub fn fence(&mut self, node: NodeIndex, status: Status) {
        if self.phase == Phase::Dead {
            return;
        }
        self.kill();
        self.event(Event::Fenced { node, status });
    }

    /// Ends the image at once: every request fails, later ones too.
    pub fn kill(&mut self) {
        self.phase = Phase::Dead;
        self.kill_freeze();
        self.parts.clear();
        self.admission = None;
        self.leveller = Leveller::new(self.spec.levelling, self.routes.clone());
        self.held_flushes.clear();
        self.heal = None;
        self.repairs = Default::default();
        self.scrub = None;
        for request in self.requests.drain() {
            if let Some(token) = request.token {
                let outcome = Outcome::Failed(IoError::Shutdown);
                self.outputs.push_back(Output::Answer { token, outcome });
            }
        }
        self.locks = Default::default();
    }

    /// No further request is taken; when those in flight are answered, all is flushed and cleared.
    pub fn close(&mut self) {
        if self.phase != Phase::Running {
            self.kill();
            return self.event(Event::Closed { clean: false });
        }
        // One that is settled may be taken in at this moment: nothing is answered that it lacks.
        self.fail_heal_unless_settled(Status::NoSession);
        self.close_scrub();
        self.close_repairs();
        self.close_freeze();
        self.phase = Phase::Closing;
        self.go_on_closing();
    }

    /// With nothing in flight that a client waits for: one last flush, and when that is answered, the
    /// end. What there was no room for is not waited for: the next holder levels it.
    pub(super) fn go_on_closing(&mut self) {
        if !self.requests.iter().all(|(_, request)| request.is_refused()) || self.is_marking() {
            return;
        }
        if self.closing_flush_sent {
            return self.finish_close();
        }
        self.closing_flush_sent = true;
        self.submit_own_flush();
    }

    fn finish_close(&mut self) {
        let all_up = self.in_sync_anywhere().without(self.up()).is_empty();
        let all_clear =
            self.unanswered.is_empty() && self.clear.sequence == self.answered_through();
        let clean = all_up && all_clear && self.is_level();
        if clean && self.clear.sequence > 0 {
            let in_sync = self.in_sync_anywhere();
            self.send_clear(in_sync);
        }
        let head = Session { epoch: self.spec.epoch };
        let up = self.attached();
        self.send(up, kind::DETACH, 0, 0, &Bytes::new(), |out| head.put(out));
        self.phase = Phase::Dead;
        self.event(Event::Closed { clean });
    }
}
