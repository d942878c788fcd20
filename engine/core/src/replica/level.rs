//! Levelling: nodes in sync that came back, or that a new holder finds after an unclean end, are made equal
//! shard by shard, those that a request waits for first, the rest in the background.
//!
//! A node is *doubtful* in the shards that the dirty maps name as it is let in (`admission`). Per shard the
//! block summaries are compared. Where a member of the set is up and not doubtful (it never restarted), its
//! content wins and only the doubtful are written; else the highest (epoch, sequence) wins, per block, and all
//! members in sync have to be there. A rotten block never wins: another replica that is as good stands in, and
//! where none is, the doubtful nodes' block is marked bad. Only blocks that differ are fetched and copied,
//! with their tags. All that are up flush, and only then is the shard level.
//!
//! Invariants:
//! - a doubtful node is sent no change of the shard and is not read there: changes reach it when the shard is
//!   level, so a copy never lands on newer data;
//! - no flush is answered while a node in sync is doubtful anywhere: it may lack what was answered, and may be
//!   the one that is left. So while one is, nothing is cleared either;
//! - dirty entries go when nothing is doubtful and all nodes in sync have flushed since. Whatever happens
//!   before, the next holder finds them all.
//!
//! A node that is lost, a record with other nodes in sync, or a failure has what was under way begun again.

use super::asks::Asks;
use super::background::Pacing;
use super::compare::Comparison;
use super::copier::{Copier, CopyAsk, CopyStamp};
use super::heal::HealLimits;
use super::image::{ImageIo, Part, Phase, RequestKind, Set};
use super::pacing::Need;
use super::replies::BadReply;
use super::routes::Routes;
use super::shard_set::ShardSet;
use super::{Event, NodeIndex, NodeMask};
use crate::geometry::{BLOCK_BYTES, LayerId};
use crate::rules::{Rule, broken};
use crate::wire::messages::{DIRTY_ENTRIES_MAX, Flush, Head, Level};
use crate::wire::{Frame, Status, kind};
use bytes::{Bytes, BytesMut};

/// Shards compared at once where requests wait for them.
const DEMANDED_AT_ONCE: usize = 8;

/// Shards that the background has flushed together.
const SHARDS_PER_FLUSH: usize = 64;

/// What a frame in flight was for.
#[derive(Clone, Debug)]
enum Ask {
    Copy(CopyAsk),
    Flush,
    Level,
}

/// A shard that is being compared and copied on these doubtful nodes.
struct Job {
    shard: u64,
    members: NodeMask,
    doubtful: NodeMask,
    limited: bool,
    /// Layers still to compare, and the copier's job of the present one.
    layers: Vec<LayerId>,
    copy: Option<usize>,
}

/// The end of it: dirty entries go.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Finale {
    Flushing,
    Marking,
}

/// All levelling of an image.
pub(super) struct Leveller {
    /// Shards in which some node is doubtful; those that requests wait for; how far the background is.
    unlevelled: ShardSet,
    demanded: ShardSet,
    cursor: u64,
    asks: Asks<Ask>,
    pub copier: Copier,
    jobs: Vec<Job>,
    /// Equal, not yet durable; and what the flush under way covers.
    copied: Vec<(u64, NodeMask)>,
    flushing: Vec<(u64, NodeMask)>,
    /// Shards whose dirty entries go at the end.
    listed: ShardSet,
    marking: Vec<u64>,
    finale: Option<Finale>,
    /// Answers that the flush, or the mark, under way still lacks.
    answers_left: u32,
    /// Something failed: it is tried again with the next tick.
    resting: bool,
    /// Nodes that policy takes for not whole.
    told: NodeMask,
    shards_done: u64,
    limits: HealLimits,
}

/// How far levelling is, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LevelState {
    pub shards_left: u64,
    pub shards_done: u64,
    pub copied_bytes: u64,
    pub bad_blocks: u64,
}

impl Leveller {
    pub fn new(limits: HealLimits, routes: Routes) -> Leveller {
        Leveller {
            unlevelled: ShardSet::default(),
            demanded: ShardSet::default(),
            cursor: 0,
            asks: Asks::new(0),
            copier: Copier::paced(Pacing::default(), routes),
            jobs: Vec::new(),
            copied: Vec::new(),
            flushing: Vec::new(),
            listed: ShardSet::default(),
            marking: Vec::new(),
            finale: None,
            answers_left: 0,
            resting: false,
            told: NodeMask::EMPTY,
            shards_done: 0,
            limits,
        }
    }

    fn is_worked_on(&self, shard: u64) -> bool {
        self.jobs.iter().any(|job| job.shard == shard)
            || self.copied.iter().chain(&self.flushing).any(|(other, _)| *other == shard)
    }
}

impl ImageIo {
    /// How far levelling is, while there is any.
    pub fn level_state(&self) -> Option<LevelState> {
        let leveller = &self.leveller;
        self.is_levelling().then_some(LevelState {
            shards_left: leveller.unlevelled.len(),
            shards_done: leveller.shards_done,
            copied_bytes: leveller.copier.copied_bytes,
            bad_blocks: leveller.copier.bad_blocks,
        })
    }

    pub(super) fn is_levelling(&self) -> bool {
        !self.leveller.unlevelled.is_empty()
            || self.sets.iter().any(|set| !set.unfounded.is_empty())
    }

    /// Whether the last steps are under way, in which the nodes forget what was dirty.
    pub(super) fn is_marking(&self) -> bool {
        self.leveller.finale.is_some()
    }

    /// Whether nothing is doubtful and no dirty entry waits to go.
    pub(super) fn is_level(&self) -> bool {
        !self.is_levelling() && self.leveller.listed.is_empty()
    }

    pub(super) fn copy_stamp(&self) -> CopyStamp {
        CopyStamp {
            epoch: self.spec.epoch,
            generation: self.spec.generation,
            blocks_per_shard: self.spec.geometry.shard_bytes / BLOCK_BYTES,
            now_ns: self.now_ns,
        }
    }

    fn set_of(&self, shard: u64) -> &Set {
        &self.sets[self.spec.geometry.replica_set_of(shard) as usize]
    }

    fn in_sync_of(&self, shard: u64) -> NodeMask {
        self.set_of(shard).in_sync
    }

    fn doubtful_in(&self, shard: u64) -> NodeMask {
        let Set { in_sync, unfounded, .. } = self.set_of(shard);
        in_sync.iter().fold(unfounded.and(*in_sync), |mask, node| {
            match self.replicas[usize::from(node)].doubtful.has(shard) {
                true => mask.with(NodeMask::one(node)),
                false => mask,
            }
        })
    }

    /// Nodes that are asked nothing of this shard yet.
    pub(super) fn gated(&self, shard: u64) -> NodeMask {
        let none = self.leveller.unlevelled.is_empty() || !self.leveller.unlevelled.has(shard);
        let founded = self.sets.iter().all(|set| set.unfounded.is_empty());
        if none && founded || broken(Rule::LevelBeforeRequests) {
            return NodeMask::EMPTY;
        }
        self.doubtful_in(shard)
    }

    /// These nodes of each set may differ from others in sync in what is dirty anywhere, and in what was
    /// not level yet.
    pub(super) fn doubt(&mut self, joiners: &[NodeMask], dirty: &ShardSet) {
        if !self.is_levelling() {
            self.leveller.shards_done = 0;
            let pacing = self.leveller.limits.join(&self.background, self.spec.channel);
            self.leveller.copier.pacing = pacing;
        }
        let mut shards = dirty.clone();
        self.leveller.unlevelled.iter().for_each(|shard| _ = shards.insert(shard));
        for shard in shards.iter() {
            let set = self.spec.geometry.replica_set_of(shard) as usize;
            let doubtful = joiners[set].and(self.sets[set].in_sync);
            for node in doubtful.iter() {
                self.replica(node).doubtful.insert(shard);
            }
            if !doubtful.is_empty() {
                self.leveller.unlevelled.insert(shard);
            }
        }
        dirty.iter().for_each(|shard| _ = self.leveller.listed.insert(shard));
        self.begin_levelling_again();
    }

    pub(super) fn tell_admitted(&mut self) {
        let levelling = self.up().without(self.whole());
        // Also those that are away at the moment.
        self.leveller.told = self.leveller.told.with(levelling);
        let shards = self.leveller.unlevelled.len();
        self.event(Event::Admitted { levelling, shards });
    }

    /// A request waits for this shard.
    pub(super) fn demand(&mut self, shard: u64) {
        if !self.leveller.demanded.insert(shard) {
            return;
        }
        let stamp = self.copy_stamp();
        let job = self.leveller.jobs.iter_mut().find(|job| job.shard == shard);
        if let Some(job) = job {
            job.limited = false;
            if let Some(copy) = job.copy {
                self.leveller.copier.urge(copy, stamp);
            }
            self.send_level_orders();
        }
        self.go_on_levelling();
    }

    /// Whether a flush has to wait: a node in sync may lack something that was answered.
    pub(super) fn flush_waits(&self) -> bool {
        let in_sync = self.in_sync_anywhere();
        let whole = in_sync.iter().all(|node| self.is_whole(node));
        self.is_levelling() && !broken(Rule::FlushWaitsForLevel) && !whole
    }

    /// `request`, a flush, waits until all nodes in sync are whole; so everything is wanted at once.
    pub(super) fn hold_flush(&mut self, request: usize) {
        self.held_flushes.push(request);
        let absent = self.in_sync_anywhere().without(self.attached());
        absent.iter().for_each(|node| self.tell_blocking(node));
        let stamp = self.copy_stamp();
        let limited = self.leveller.jobs.iter_mut().filter(|job| job.limited);
        let mut copies = Vec::new();
        for job in limited {
            job.limited = false;
            copies.extend(job.copy);
        }
        copies.into_iter().for_each(|copy| self.leveller.copier.urge(copy, stamp));
        self.send_level_orders();
        if self.refuses() {
            self.refuse(request);
        }
        self.go_on_levelling();
    }

    /// Whoever was left is gone, or others are in sync: what was under way is begun again.
    pub(super) fn begin_levelling_again(&mut self) {
        let asks = Asks::new(self.next_serial());
        let leveller = &mut self.leveller;
        leveller.asks = asks;
        leveller.copier.drop_jobs();
        leveller.jobs.clear();
        leveller.copied.clear();
        leveller.flushing.clear();
        leveller.finale = None;
        leveller.answers_left = 0;
        leveller.cursor = 0;
        let marking = std::mem::take(&mut leveller.marking);
        marking.into_iter().for_each(|shard| _ = leveller.listed.insert(shard));
    }

    /// The sets are those of a new record.
    pub(super) fn level_reconfigured(&mut self) {
        let (geometry, sets) = (self.spec.geometry, &self.sets);
        for (node, replica) in self.replicas.iter_mut().enumerate() {
            let in_sync = |shard| {
                sets[geometry.replica_set_of(shard) as usize].in_sync.has(node as NodeIndex)
            };
            replica.doubtful.retain(in_sync);
        }
        self.sets.iter_mut().for_each(|set| set.unfounded = set.unfounded.and(set.in_sync));
        self.begin_levelling_again();
        self.leveller.told = self.leveller.told.and(self.in_sync_anywhere());
        self.leveller.resting = false;
        self.go_on_levelling();
        self.start_admission();
    }

    fn ask(
        &mut self,
        nodes: NodeMask,
        ask: Ask,
        frame_kind: u8,
        payload: &Bytes,
        put: impl Fn(&mut BytesMut),
    ) {
        for node in nodes.iter() {
            let tag = self.leveller.asks.add(node, ask.clone());
            self.send(NodeMask::one(node), frame_kind, 0, tag, payload, &put);
        }
    }

    /// Takes an answer to one of the leveller's own frames.
    pub(super) fn take_level(&mut self, node: NodeIndex, frame: Frame) -> Result<(), BadReply> {
        let stamp = self.copy_stamp();
        let Some(ask) = self.leveller.asks.take(node, frame.tag) else { return Ok(()) };
        match ask {
            Ask::Copy(ask) => {
                let taken = self.leveller.copier.take(node, ask, frame, stamp)?;
                if let Some(status) = taken.failed {
                    self.levelling_failed(node, status);
                    return Ok(());
                }
                if let Some((node, shard, block)) = taken.rotten {
                    self.found_rot(node, shard, block);
                }
                self.tell_unreached(taken.unreached);
                self.send_level_orders();
                if let Some(copy) = taken.done {
                    self.layer_is_level(copy);
                }
            }
            _ if frame.status != Status::Ok => {
                self.levelling_failed(node, frame.status);
                return Ok(());
            }
            Ask::Flush => {
                self.take_flush_number(node, frame.head)?;
                self.count_level_answer();
            }
            Ask::Level => self.count_level_answer(),
        }
        self.go_on_levelling();
        Ok(())
    }

    fn count_level_answer(&mut self) {
        self.leveller.answers_left -= 1;
        if self.leveller.answers_left == 0 {
            self.level_answered();
        }
    }

    fn levelling_failed(&mut self, node: NodeIndex, status: Status) {
        self.begin_levelling_again();
        self.leveller.resting = true;
        self.has_failed(node, status);
    }

    /// What `node` was asked for to make others level failed there.
    pub(super) fn has_failed(&mut self, node: NodeIndex, status: Status) {
        match status {
            Status::StaleEpoch | Status::Deleted => self.fence(node, status),
            // Asked under a generation of before; or others have to be flushed first, and are.
            Status::StaleGeneration | Status::DirtyFull => {}
            status => self.event(Event::ReplicaFailed { node, status }),
        }
    }

    pub(super) fn tell_unreached(&mut self, pair: Option<(NodeIndex, NodeIndex)>) {
        if let Some((source, target)) = pair {
            self.event(Event::PullUnreached { source, target });
        }
    }

    fn send_level_orders(&mut self) {
        while let Some(order) = self.leveller.copier.orders.pop_front() {
            let (ask, kind) = (Ask::Copy(order.ask.clone()), order.kind());
            self.ask(order.nodes, ask, kind, &order.payload, |out| order.put(out));
        }
    }

    /// Time has passed.
    pub(super) fn pace_levelling(&mut self) {
        if !self.is_levelling() {
            return;
        }
        let stamp = self.copy_stamp();
        self.leveller.copier.pump_all(stamp);
        self.send_level_orders();
        self.go_on_levelling();
    }

    /// Says what is under way, or that it is over.
    pub(super) fn report_levelling(&mut self) {
        let over = !self.is_levelling();
        let leveller = &mut self.leveller;
        match over {
            true => leveller.copier.pacing = Pacing::default(),
            false => leveller.copier.pacing.report(self.now_ns, !leveller.asks.is_empty()),
        }
    }

    /// A second has passed: what failed is tried again.
    pub(super) fn tick_levelling(&mut self) {
        self.leveller.resting = false;
        self.leveller.cursor = 0;
        self.start_admission();
        self.go_on_levelling();
    }

    /// Does what can be done now.
    pub(super) fn go_on_levelling(&mut self) {
        if matches!(self.phase, Phase::Opening | Phase::Dead) || self.leveller.resting {
            return;
        }
        // Who is being let in may change whose content counts.
        if self.admission.is_none() {
            while self.begin_next_shard() {}
        }
        self.begin_level_flush();
        self.begin_finale();
        self.tell_levelled();
    }

    /// Begins with the next shard; false: there is none that can be begun, or enough is under way.
    fn begin_next_shard(&mut self) -> bool {
        let under_way = self.leveller.jobs.len();
        if under_way >= DEMANDED_AT_ONCE {
            return false;
        }
        let idle = |shard: &u64| !self.leveller.is_worked_on(*shard) && self.may_begin(*shard);
        let demanded = self.leveller.demanded.iter().find(idle);
        if let Some(shard) = demanded {
            self.begin_shard_of_level(shard, false);
            return true;
        }
        let urgent = !self.held_flushes.is_empty();
        let limit = self.leveller.limits.shards_at_once;
        if !urgent && under_way >= self.leveller.copier.pacing.at_once(limit) {
            return false;
        }
        while let Some(shard) = self.leveller.unlevelled.next(self.leveller.cursor) {
            let Some(next) = shard.checked_add(1) else { break };
            if !self.leveller.is_worked_on(shard) && self.may_begin(shard) {
                if !urgent && !self.leveller.copier.pacing.begins(Need::Time) {
                    return false;
                }
                self.leveller.cursor = next;
                self.begin_shard_of_level(shard, !urgent);
                return true;
            }
            self.leveller.cursor = next;
        }
        false
    }

    /// Whether a shard can be levelled with those who are here.
    fn may_begin(&self, shard: u64) -> bool {
        let (in_sync, up, doubtful) = (self.in_sync_of(shard), self.up(), self.doubtful_in(shard));
        let set = self.spec.geometry.replica_set_of(shard) as usize;
        if !self.sets[set].unfounded.and(up).is_empty() {
            return false;
        }
        let founded = !in_sync.and(up).without(doubtful).is_empty();
        let complete = in_sync.without(up).is_empty() || broken(Rule::AllInSyncLevelled);
        let decided = !self.is_undecided(set);
        doubtful.is_empty() || !doubtful.and(up).is_empty() && (founded || complete && decided)
    }

    fn begin_shard_of_level(&mut self, shard: u64, limited: bool) {
        let up = self.up();
        let (members, doubtful) = (self.in_sync_of(shard).and(up), self.doubtful_in(shard).and(up));
        // Nobody to be compared with: it has to be durable all the same.
        let alone = doubtful.is_empty() || members.0.count_ones() < 2;
        let layers = if alone { Vec::new() } else { self.spec.layers.clone() };
        self.leveller.jobs.push(Job { shard, members, doubtful, limited, layers, copy: None });
        self.level_next_layer(shard);
    }

    /// Compares the next layer of a shard; with none left its nodes are equal in it.
    fn level_next_layer(&mut self, shard: u64) {
        let stamp = self.copy_stamp();
        let leveller = &mut self.leveller;
        let Some(index) = leveller.jobs.iter().position(|job| job.shard == shard) else { return };
        let job = &mut leveller.jobs[index];
        let Some(layer) = job.layers.pop() else {
            let job = leveller.jobs.swap_remove(index);
            return leveller.copied.push((shard, job.doubtful));
        };
        let compared = Comparison::new(job.members.without(job.doubtful), job.doubtful);
        let (members, limited) = (job.members, job.limited);
        job.copy = Some(leveller.copier.start((layer, shard), compared, members, limited, stamp));
        self.send_level_orders();
    }

    fn layer_is_level(&mut self, copy: usize) {
        let job = self.leveller.jobs.iter_mut().find(|job| job.copy == Some(copy));
        let Some(job) = job else { return };
        job.copy = None;
        let shard = job.shard;
        self.level_next_layer(shard);
    }

    /// Has all that are up flush what is equal, when somebody waits for it or there is enough of it.
    fn begin_level_flush(&mut self) {
        let leveller = &self.leveller;
        let wanted = |(shard, _): &(u64, NodeMask)| leveller.demanded.has(*shard);
        let due = leveller.jobs.is_empty()
            || leveller.copied.len() >= SHARDS_PER_FLUSH
            || leveller.copied.iter().any(wanted);
        let busy = leveller.answers_left > 0 || leveller.finale.is_some();
        if leveller.copied.is_empty() || busy || !due {
            return;
        }
        self.leveller.flushing = std::mem::take(&mut self.leveller.copied);
        match broken(Rule::LevelIsDurable) {
            true => self.level_answered(),
            false => self.flush_all_up(),
        }
    }

    fn flush_all_up(&mut self) {
        let up = self.up();
        self.leveller.answers_left = up.0.count_ones();
        let flush = Flush {
            epoch: self.spec.epoch,
            generation: self.spec.generation,
            clear_sequence: 0,
            proof: Vec::new(),
        };
        self.ask(up, Ask::Flush, kind::FLUSH, &Bytes::new(), |out| flush.put(out));
    }

    /// All have answered what was asked of all.
    fn level_answered(&mut self) {
        match self.leveller.finale {
            None => self.shards_are_level(),
            Some(Finale::Flushing) => {
                self.leveller.finale = Some(Finale::Marking);
                self.clear_former_epochs();
                self.mark_level();
            }
            Some(Finale::Marking) => {
                self.leveller.marking.clear();
                self.mark_level();
            }
        }
    }

    /// What was flushed is level: requests for it go on.
    fn shards_are_level(&mut self) {
        let done = std::mem::take(&mut self.leveller.flushing);
        let mut level = ShardSet::default();
        for (shard, nodes) in done {
            for node in nodes.iter() {
                self.replica(node).doubtful.remove(shard);
            }
            if self.doubtful_in(shard).is_empty() {
                self.leveller.unlevelled.remove(shard);
                self.leveller.shards_done += 1;
            }
            self.leveller.demanded.remove(shard);
            level.insert(shard);
        }
        let up = self.up();
        let waits = |part: &Part| part.is_change() && level.has(part.shard);
        let unsent = |part: &Part| !part.waiting.without(part.sent).and(up).is_empty();
        let parts = self.parts.iter().filter(|(_, part)| waits(part) && unsent(part));
        let mut again: Vec<(u64, usize)> = parts.map(|(id, part)| (part.sequence, id)).collect();
        again.sort_unstable();
        again.into_iter().for_each(|(_, id)| self.send_missing(id, up));
        self.dispatch_parked_reads();
        self.repairs_of_level(&level);
    }

    /// Flushes under way that one of these nodes has not answered wait until it is whole: it was let in
    /// after they were asked for, and may lack what they cover.
    pub(super) fn take_back_flushes(&mut self, nodes: NodeMask) {
        if !self.flush_waits() {
            return;
        }
        let lacks = |part: &Part| {
            let last = self.phase == Phase::Closing && self.requests[part.request].token.is_none();
            part.kind == RequestKind::Flush && !part.waiting.and(nodes).is_empty() && !last
        };
        let flushes = self.parts.iter().filter(|(_, part)| lacks(part));
        let flushes: Vec<usize> = flushes.map(|(id, _)| id).collect();
        for id in flushes {
            let request = self.parts.remove(id).request;
            self.requests[request].parts_left = 0;
            self.hold_flush(request);
        }
    }

    /// What nobody waits for any more, since nobody is doubtful there, is no longer wanted at once.
    pub(super) fn forget_demands(&mut self) {
        let (geometry, sets, leveller) = (self.spec.geometry, &self.sets, &mut self.leveller);
        let unlevelled = &leveller.unlevelled;
        leveller.demanded.retain(|shard| {
            let set = &sets[geometry.replica_set_of(shard) as usize];
            unlevelled.has(shard) || !set.unfounded.is_empty()
        });
    }

    /// Flushes that waited for nodes to be whole go on.
    fn release_flushes(&mut self) {
        if self.held_flushes.is_empty() || self.flush_waits() {
            return;
        }
        let held = std::mem::take(&mut self.held_flushes);
        held.into_iter().for_each(|request| self.start(request));
    }

    fn tell_levelled(&mut self) {
        self.whole_remember();
        let whole = self.whole();
        let (shards, copied_bytes) = (self.leveller.shards_done, self.leveller.copier.copied_bytes);
        for node in self.leveller.told.and(whole).iter() {
            self.leveller.told = self.leveller.told.without(NodeMask::one(node));
            self.event(Event::Levelled { node, shards, copied_bytes });
        }
        self.release_flushes();
    }

    /// When nothing is doubtful and all in sync are here: a last flush, and dirty entries go.
    fn begin_finale(&mut self) {
        let leveller = &self.leveller;
        let done = leveller.unlevelled.is_empty()
            && leveller.jobs.is_empty()
            && leveller.copied.is_empty()
            && leveller.answers_left == 0
            && leveller.finale.is_none();
        let due = done && !leveller.listed.is_empty() && self.admission.is_none();
        if !due || !self.in_sync_anywhere().without(self.whole()).is_empty() {
            return;
        }
        self.leveller.finale = Some(Finale::Flushing);
        match broken(Rule::LevelIsDurable) {
            true => self.level_answered(),
            false => self.flush_all_up(),
        }
    }

    /// What writes of former epochs and their copies left in the dirty maps goes, and each node learns
    /// the flush numbers of its peers. Before the sticky entries go, so that a store never has neither:
    /// from dirty entries and flush numbers an opener tells a store that lost its disk from a new one.
    fn clear_former_epochs(&mut self) {
        let clear = Flush {
            epoch: self.spec.epoch,
            generation: self.spec.generation,
            clear_sequence: 0,
            proof: self.flush_numbers(self.up()),
        };
        let cleared = self.up().and(self.in_sync_everywhere());
        self.send(cleared, kind::CLEAR, 0, 0, &Bytes::new(), |out| clear.put(out));
    }

    /// Tells all that the shards are level, a bounded number at a time. A node that is stale in a shard's
    /// set was not made level there: it keeps what it knows, for its heal.
    fn mark_level(&mut self) {
        let leveller = &mut self.leveller;
        while leveller.marking.len() < DIRTY_ENTRIES_MAX
            && let Some(shard) = leveller.listed.pop_first()
        {
            leveller.marking.push(shard);
        }
        if leveller.marking.is_empty() {
            leveller.finale = None;
            if self.phase == Phase::Closing {
                self.go_on_closing();
            }
            return;
        }
        let (up, epoch) = (self.up(), self.spec.epoch);
        self.leveller.answers_left = up.0.count_ones();
        for node in up.iter() {
            let marking = self.leveller.marking.iter().copied();
            let shards = marking.filter(|shard| self.in_sync_of(*shard).has(node)).collect();
            let level = Level { epoch, shards };
            let node = NodeMask::one(node);
            self.ask(node, Ask::Level, kind::LEVEL, &Bytes::new(), |out| level.put(out));
        }
    }
}
