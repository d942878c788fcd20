//! What a heal does with the shards: it lists them, makes each level, and has all of it made durable.
//!
//! A shard is worked on twice. First while clients write to it: that moves the bulk. Then once more with
//! writes to it paused, which by then is a comparison and a few blocks; from the end of the pause on
//! every change goes to the node as well.
//!
//! A pause does not wait for writes to be answered: one that waits for a node that is gone for good would
//! never be, and the heal is what lets that node go. It waits until a source has applied all that is in
//! flight. Only such a source is compared with, so the node has those writes when the pause ends.

use super::asks::Asks;
use super::compare::Comparison;
use super::copier::CopyAsk;
use super::heal::{Heal, Stage};
use super::image::{ImageIo, Part};
use super::locks::Range;
use super::pacing::Need;
use super::replies::BadReply;
use super::{Event, NodeIndex, NodeMask};
use crate::geometry::{IMAGE_BYTES_MAX, LayerId};
use crate::rules::{Rule, broken};
use crate::wire::messages::{
    DIRTY_ENTRIES_MAX, DirtyFrom, DirtyReply, Flush, Head, Level, WRITTEN_SHARDS_MAX, WrittenAbove,
    WrittenReply,
};
use crate::wire::{Frame, Status, kind};
use bytes::{Bytes, BytesMut};

const SECOND_NS: u64 = 1_000_000_000;
/// A pause waits so long for all sources, and then for the first that has applied what is in flight.
const ALL_SOURCES_NS: u64 = SECOND_NS / 4;

/// What a frame in flight was for.
#[derive(Clone, Debug)]
pub(super) enum Ask {
    Written { above: u64, from: (u32, u64) },
    Dirty { from_shard: u64 },
    Copy(CopyAsk),
    Flush,
    Level,
}

/// A shard being made level.
#[derive(Debug)]
pub(super) struct Job {
    pub shard: u64,
    pass: Pass,
    /// Layers that this pass has still to compare.
    layers: Vec<LayerId>,
    /// The job of the copier.
    copy: Option<usize>,
    /// Since when no write to the shard begins.
    paused_ns: Option<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Pass {
    /// Beside the clients' writes.
    Bulk,
    /// No write begins; those in flight are being applied.
    Pausing,
    /// Who is compared with has applied all that is in flight.
    Paused,
}

impl ImageIo {
    /// The node has its session: asks who is in sync what it missed, and itself what is dirty on it.
    pub(super) fn begin_listing(&mut self) {
        let asks = Asks::new(self.next_serial());
        let Some(heal) = &mut self.heal else { return };
        (heal.stage, heal.asks) = (Stage::Listing, asks);
        let (node, sets) = (heal.spec.node, heal.spec.sets.clone());
        // Changes in flight do not go to the node.
        for (_, part) in self.parts.iter() {
            if part.is_change() && heal.heals(part.set as usize) {
                heal.list.insert(part.shard);
            }
        }
        let whole = self.whole();
        for source in whole.iter() {
            let sources = |(set, _): &&(usize, u64)| self.sets[*set].in_sync.has(source);
            if let Some(above) = sets.iter().filter(sources).map(|(_, since)| *since).min() {
                self.ask_written(source, above, (0, 0));
            }
        }
        if !self.has_sources() {
            return self.fail_heal(Status::Io);
        }
        if sets.iter().any(|(_, since)| *since == 0) {
            // Nothing on it is believed, also where those in sync never had a thing.
            self.ask_written(node, 0, (0, 0));
        }
        self.ask_own_dirty(node, 0);
    }

    fn ask_healing(
        &mut self,
        nodes: NodeMask,
        ask: Ask,
        frame_kind: u8,
        payload: &Bytes,
        put: impl Fn(&mut BytesMut),
    ) {
        for node in nodes.iter() {
            let Some(heal) = &mut self.heal else { return };
            let tag = heal.asks.add(node, ask.clone());
            self.send(NodeMask::one(node), frame_kind, 0, tag, payload, &put);
        }
    }

    fn ask_written(&mut self, node: NodeIndex, above: u64, from: (u32, u64)) {
        let (epoch, (place, shard)) = (self.spec.epoch, from);
        let head = WrittenAbove { epoch, generation: above, place, shard };
        let ask = Ask::Written { above, from };
        let put = |out: &mut BytesMut| head.put(out);
        self.ask_healing(NodeMask::one(node), ask, kind::WRITTEN, &Bytes::new(), put);
    }

    fn ask_own_dirty(&mut self, node: NodeIndex, from_shard: u64) {
        let head = DirtyFrom { epoch: self.spec.epoch, from_shard };
        let put = |out: &mut BytesMut| head.put(out);
        let ask = Ask::Dirty { from_shard };
        self.ask_healing(NodeMask::one(node), ask, kind::DIRTY, &Bytes::new(), put);
    }

    /// Takes an answer to one of the heal's own frames.
    pub(super) fn take_heal(&mut self, node: NodeIndex, frame: Frame) -> Result<(), BadReply> {
        let stamp = self.copy_stamp();
        let Some(heal) = &mut self.heal else { return Ok(()) };
        let Some(ask) = heal.asks.take(node, frame.tag) else { return Ok(()) };
        match ask {
            Ask::Copy(ask) => {
                let taken = heal.copier.take(node, ask, frame, stamp)?;
                if let Some(status) = taken.failed {
                    self.fail_heal(status);
                    return Ok(());
                }
                if let Some((node, shard, block)) = taken.rotten {
                    self.found_rot(node, shard, block);
                }
                self.tell_unreached(taken.unreached);
                self.send_heal_orders();
                if let Some(done) = taken.done {
                    self.layer_done(done);
                }
            }
            _ if frame.status != Status::Ok => {
                self.fail_heal(frame.status);
                return Ok(());
            }
            Ask::Written { above, from } => self.take_written(node, above, from, frame)?,
            Ask::Dirty { from_shard } => self.take_own_dirty(node, from_shard, frame)?,
            Ask::Flush => self.take_flush_number(node, frame.head)?,
            Ask::Level => {}
        }
        self.go_on_healing();
        Ok(())
    }

    /// Puts shards of the healed sets on the list.
    fn list(&mut self, shards: &[u64], own: bool) -> Result<(), BadReply> {
        let geometry = self.spec.geometry;
        let last = IMAGE_BYTES_MAX / u64::from(geometry.shard_bytes);
        let Some(heal) = &mut self.heal else { return Ok(()) };
        for shard in shards.iter().copied() {
            if shard > last {
                return Err(BadReply("a shard beyond any image"));
            }
            if heal.heals(geometry.replica_set_of(shard) as usize) {
                heal.list.insert(shard);
                if own {
                    heal.own.insert(shard);
                }
            }
        }
        Ok(())
    }

    fn take_written(
        &mut self,
        node: NodeIndex,
        above: u64,
        from: (u32, u64),
        frame: Frame,
    ) -> Result<(), BadReply> {
        let reply = WrittenReply::take(frame.head).map_err(|_| BadReply("malformed list"))?;
        // It has to get on, or there would be no end to asking on.
        let gets_on = reply.next.is_none_or(|next| next > from);
        if reply.shards.len() > WRITTEN_SHARDS_MAX || !gets_on {
            return Err(BadReply("a list out of order"));
        }
        self.list(&reply.shards, false)?;
        if let Some(next) = reply.next {
            self.ask_written(node, above, next);
        }
        Ok(())
    }

    fn take_own_dirty(
        &mut self,
        node: NodeIndex,
        from_shard: u64,
        frame: Frame,
    ) -> Result<(), BadReply> {
        let reply = DirtyReply::take(frame.head).map_err(|_| BadReply("malformed dirty map"))?;
        let shards: Vec<u64> = reply.entries.iter().map(|entry| entry.shard).collect();
        if shards.len() > DIRTY_ENTRIES_MAX
            || shards.first().is_some_and(|first| *first < from_shard)
            || !shards.is_sorted_by(|a, b| a < b)
        {
            return Err(BadReply("a dirty map out of order"));
        }
        self.list(&shards, true)?;
        let next = shards.last().and_then(|last| last.checked_add(1));
        if let Some(next) = next.filter(|_| reply.more) {
            self.ask_own_dirty(node, next);
        }
        Ok(())
    }

    /// Does what the heal can do now.
    fn go_on_healing(&mut self) {
        loop {
            let Some(heal) = &mut self.heal else { return };
            let idle = heal.asks.is_empty();
            match heal.stage {
                Stage::Listing if idle => heal.stage = Stage::Copying,
                Stage::Copying => {
                    if heal.list.is_empty() {
                        if !heal.jobs.is_empty() {
                            return;
                        }
                        self.begin_heal_flush();
                        continue;
                    }
                    let pacing = &heal.copier.pacing;
                    let full = heal.jobs.len() >= pacing.at_once(heal.spec.limits.shards_at_once);
                    if full || !pacing.begins(Need::Time) {
                        return;
                    }
                    if let Some(shard) = heal.list.pop_first() {
                        self.begin_shard(shard);
                    }
                }
                Stage::Flushing if idle && heal.number_told => heal.stage = Stage::Marking,
                Stage::Flushing if idle => self.tell_number(),
                Stage::Marking if idle => match self.mark_own() {
                    true => {}
                    false => return self.heal_settled(),
                },
                _ => return,
            }
        }
    }

    fn begin_shard(&mut self, shard: u64) {
        let layers = self.spec.layers.clone();
        let Some(heal) = &mut self.heal else { return };
        heal.jobs.push(Job { shard, pass: Pass::Bulk, layers, copy: None, paused_ns: None });
        self.next_layer(shard);
    }

    /// Compares the next layer of a shard; with none left the pass is over.
    fn next_layer(&mut self, shard: u64) {
        let sources = self.sources_of(shard);
        let applied = self.applied_all(shard);
        let stamp = self.copy_stamp();
        let Some(heal) = &mut self.heal else { return };
        let Some(job) = heal.jobs.iter_mut().find(|job| job.shard == shard) else { return };
        let Some(layer) = job.layers.pop() else { return self.pass_done(shard) };
        let trusted = if job.pass == Pass::Paused { sources.and(applied) } else { sources };
        if trusted.is_empty() {
            return self.fail_heal(Status::Io);
        }
        let compared = Comparison::heal(trusted, heal.spec.node);
        let members = trusted.with(NodeMask::one(heal.spec.node));
        let bulk = job.pass == Pass::Bulk;
        job.copy = Some(heal.copier.start((layer, shard), compared, members, bulk, stamp));
        self.send_heal_orders();
    }

    fn send_heal_orders(&mut self) {
        while let Some(order) = self.heal.as_mut().and_then(|heal| heal.copier.orders.pop_front()) {
            let (ask, frame_kind) = (Ask::Copy(order.ask.clone()), order.kind());
            self.ask_healing(order.nodes, ask, frame_kind, &order.payload, |out| order.put(out));
        }
    }

    fn layer_done(&mut self, copy: usize) {
        let Some(heal) = &mut self.heal else { return };
        let job = heal.jobs.iter_mut().find(|job| job.copy == Some(copy));
        let Some(job) = job else { return };
        job.copy = None;
        let shard = job.shard;
        self.next_layer(shard);
    }

    fn pass_done(&mut self, shard: u64) {
        let Some(heal) = &mut self.heal else { return };
        let Some(index) = heal.jobs.iter().position(|job| job.shard == shard) else { return };
        match heal.jobs[index].pass {
            Pass::Bulk if broken(Rule::HealPausesWrites) => _ = heal.jobs.swap_remove(index),
            Pass::Bulk => self.pause_shard(index),
            Pass::Pausing => unreachable!("a pass that waits compares nothing"),
            Pass::Paused => {
                // First it is level, then those who waited go on: their changes go to the node.
                let job = heal.jobs.swap_remove(index);
                heal.shards_done += 1;
                self.send_node_what_is_in_flight(shard);
                if job.paused_ns.is_some() {
                    let mut ready = Vec::new();
                    let range = self.blocks_of_shard(shard);
                    self.locks.resume(range, &mut ready);
                    ready.into_iter().for_each(|id| self.start(id));
                }
            }
        }
    }

    /// The changes of a shard that are still in flight go to the node as well. They were on its source
    /// before that was compared; but nothing counts as answered by a node that has not answered it.
    fn send_node_what_is_in_flight(&mut self, shard: u64) {
        let Some(node) = self.heal.as_ref().map(Heal::node) else { return };
        let of_shard = |part: &Part| part.is_change() && part.shard == shard;
        let in_flight = self.parts.iter_mut().filter(|(_, part)| of_shard(part));
        let mut again = Vec::new();
        for (id, part) in in_flight {
            part.wanted = part.wanted.with(node);
            part.waiting = part.waiting.with(node);
            // Also one that it was sent in a heal that has ended.
            part.sent = part.sent.without(node);
            again.push(id);
        }
        let attached = self.attached();
        again.into_iter().for_each(|id| self.send_missing(id, node.and(attached)));
    }

    fn pause_shard(&mut self, index: usize) {
        let now_ns = self.now_ns;
        let Some(heal) = &mut self.heal else { return };
        let job = &mut heal.jobs[index];
        (job.pass, job.paused_ns) = (Pass::Pausing, Some(now_ns));
        let range = self.blocks_of_shard(self.heal_job(index));
        self.locks.pause(range);
        self.heal_applied();
    }

    fn heal_job(&self, index: usize) -> u64 {
        self.heal.as_ref().map_or(0, |heal| heal.jobs[index].shard)
    }

    fn blocks_of_shard(&self, shard: u64) -> Range {
        let shard_bytes = self.spec.geometry.shard_bytes;
        Self::block_range(shard * u64::from(shard_bytes), shard_bytes)
    }

    /// Nodes of the shard's set that a heal may take content from.
    fn sources_of(&self, shard: u64) -> NodeMask {
        let set = self.spec.geometry.replica_set_of(shard) as usize;
        self.sets[set].in_sync.and(self.whole())
    }

    /// Nodes that no change in flight of the shard waits for.
    fn applied_all(&self, shard: u64) -> NodeMask {
        let of_shard =
            self.parts.iter().filter(|(_, part)| part.is_change() && part.shard == shard);
        let lacking = of_shard.fold(NodeMask::EMPTY, |mask, (_, part)| mask.with(part.waiting));
        NodeMask(u64::MAX).without(lacking)
    }

    /// Changes were applied, or time has passed: pauses that waited for that go on.
    pub(super) fn heal_applied(&mut self) {
        let Some(heal) = &self.heal else { return };
        let pausing = heal.jobs.iter().filter(|job| job.pass == Pass::Pausing);
        let pausing: Vec<(u64, u64)> =
            pausing.map(|job| (job.shard, job.paused_ns.unwrap_or(0))).collect();
        for (shard, since_ns) in pausing {
            let sources = self.sources_of(shard);
            let applied = sources.and(self.applied_all(shard));
            let patient = self.now_ns.saturating_sub(since_ns) < ALL_SOURCES_NS;
            if applied.is_empty() || patient && applied != sources {
                continue;
            }
            let layers = self.spec.layers.clone();
            let Some(heal) = &mut self.heal else { return };
            if let Some(job) = heal.jobs.iter_mut().find(|job| job.shard == shard) {
                (job.pass, job.layers) = (Pass::Paused, layers);
                self.next_layer(shard);
            }
        }
    }

    /// Everything is level, and every change in flight goes to the node: all that counts syncs.
    fn begin_heal_flush(&mut self) {
        let asks = Asks::new(self.next_serial());
        let flushing = self.up().with(self.healing());
        let Some(heal) = &mut self.heal else { return };
        assert!(heal.list.is_empty() && heal.jobs.is_empty(), "what is listed is not level");
        (heal.stage, heal.asks, heal.number_told) = (Stage::Flushing, asks, false);
        for (_, part) in self.parts.iter() {
            let counts = part.is_change() && heal.heals(part.set as usize);
            assert!(!counts || part.wanted.has(heal.spec.node), "a change that the node misses");
        }
        let level = self.whole().with(self.healing());
        let whole = self.in_sync_anywhere().without(level).is_empty();
        if let Some(heal) = self.heal.as_mut().filter(|_| whole) {
            heal.marked_to = Some(0);
        }
        let flush = Flush {
            epoch: self.spec.epoch,
            generation: self.spec.generation,
            clear_sequence: 0,
            proof: Vec::new(),
        };
        let put = |out: &mut BytesMut| flush.put(out);
        let flushing = match broken(Rule::HealedIsDurable) {
            true => flushing.without(self.healing()),
            false => flushing,
        };
        self.ask_healing(flushing, Ask::Flush, kind::FLUSH, &Bytes::new(), put);
    }

    /// Tells the nodes in sync the flush number of one of which nothing counted, durably: what they were told
    /// before is of the disk that it had then, and whoever opens the image next would go by that.
    fn tell_number(&mut self) {
        let Some(heal) = &mut self.heal else { return };
        heal.number_told = true;
        if heal.spec.sets.iter().all(|(_, since)| *since > 0) {
            return;
        }
        let proof = self.flush_numbers(self.healing().with(self.up()));
        let flush = Flush {
            epoch: self.spec.epoch,
            generation: self.spec.generation,
            clear_sequence: 0,
            proof,
        };
        let put = |out: &mut BytesMut| flush.put(out);
        self.ask_healing(self.up(), Ask::Flush, kind::FLUSH, &Bytes::new(), put);
    }

    /// Tells the node that shards of its own dirty map are level, a bounded number at a time; false:
    /// nothing was left to tell. The entries stay where a node in sync was away: it may lack what was
    /// answered and not flushed, and whoever heals it needs them.
    fn mark_own(&mut self) -> bool {
        let Some(heal) = &mut self.heal else { return false };
        let mut shards = Vec::new();
        while shards.len() < DIRTY_ENTRIES_MAX
            && let Some(shard) = heal.marked_to.and_then(|from| heal.own.next(from))
        {
            shards.push(shard);
            heal.marked_to = shard.checked_add(1);
        }
        let node = heal.node();
        if shards.is_empty() {
            return false;
        }
        let level = Level { epoch: self.spec.epoch, shards };
        let put = |out: &mut BytesMut| level.put(out);
        self.ask_healing(node, Ask::Level, kind::LEVEL, &Bytes::new(), put);
        true
    }

    fn heal_settled(&mut self) {
        let Some(heal) = &mut self.heal else { return };
        heal.stage = Stage::Settled;
        let (node, attempt) = (heal.spec.node, heal.spec.attempt);
        let (copied_bytes, bad_blocks) = (heal.copier.copied_bytes, heal.copier.bad_blocks);
        self.event(Event::Healed { node, attempt, copied_bytes, bad_blocks });
    }

    /// A source may be lost: what was under way is begun again with those that are left.
    ///
    /// Without any, the heal ends: those who come back are made equal with each other, and what they
    /// agree on may be other than what the node was given.
    pub(super) fn restart_heal(&mut self) {
        let Some(heal) = &self.heal else { return };
        if !self.has_sources() {
            return self.fail_heal_unless_settled(Status::Io);
        }
        match heal.stage {
            Stage::Entering | Stage::Settled => {}
            Stage::Listing => self.begin_listing(),
            Stage::Copying => {
                self.release_jobs();
                self.go_on_healing();
            }
            Stage::Flushing | Stage::Marking => {
                if let Some(heal) = &mut self.heal {
                    heal.marked_to = None;
                }
                self.begin_heal_flush();
            }
        }
    }

    /// Ends the work on all shards; they are on the list again.
    pub(super) fn release_jobs(&mut self) {
        let asks = Asks::new(self.next_serial());
        let Some(heal) = &mut self.heal else { return };
        heal.asks = asks;
        heal.copier.drop_jobs();
        let jobs = std::mem::take(&mut heal.jobs);
        jobs.iter().for_each(|job| _ = heal.list.insert(job.shard));
        let mut ready = Vec::new();
        for job in jobs.iter().filter(|job| job.paused_ns.is_some()) {
            let range = self.blocks_of_shard(job.shard);
            self.locks.resume(range, &mut ready);
        }
        ready.into_iter().for_each(|id| self.start(id));
    }

    /// Time has passed: what may go on in the background does.
    pub fn pace(&mut self) {
        self.background.reckon(self.now_ns);
        self.limit_freeze();
        self.pace_levelling();
        self.go_on_scrubbing();
        let stamp = self.copy_stamp();
        if let Some(heal) = &mut self.heal {
            heal.copier.pump_all(stamp);
            self.send_heal_orders();
            self.heal_applied();
            self.go_on_healing();
        }
    }

    /// Says what of the work in the background is under way. To be called when everything that came was
    /// taken, before others that share it may go on.
    pub fn report_background(&mut self) {
        if let Some(heal) = &self.heal {
            heal.copier.pacing.report(self.now_ns, !heal.asks.is_empty());
        }
        self.report_levelling();
        self.report_scrub();
    }
}
