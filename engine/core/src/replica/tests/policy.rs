//! A policy that is just enough to run histories: the rules of `vmstore/holder.py`, of which this is
//! no copy: no grace, no disks to judge, one replica set.

use crate::geometry::{LayerId, SnapshotId};
use crate::replica::{
    Event, HealLimits, HealSpec, ImageIo, Instance, Layering, NodeIndex, NodeMask, ScrubState,
};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Standing {
    Away,
    Asked,
    Waiting,
    Joining,
    Healing,
    Up,
}

/// What the cluster's state says.
#[derive(Clone, Copy, Debug)]
pub struct Stored {
    pub epoch: u64,
    pub generation: u64,
    pub in_sync: NodeMask,
    /// The layers are those from this one down to 1, without those whose bits are set.
    pub top: LayerId,
    pub dropped: u64,
    /// Those of them that are being merged into the one above.
    pub merging: u64,
    /// Of each layer below it, the generation that froze it.
    pub frozen: [u64; 64],
    /// Of those that are not: the generation that each was left behind at.
    pub since: [u64; 8],
}

/// The heal under way.
#[derive(Clone, Copy, Debug)]
struct Healing {
    node: NodeIndex,
    attempt: u64,
    instance: Option<Instance>,
    healed: bool,
}

#[derive(Debug)]
pub struct Policy {
    pub record: Stored,
    pub proposal: Option<Stored>,
    standing: Vec<Standing>,
    serial: Vec<u64>,
    instance: Vec<Option<Instance>>,
    served: Vec<Option<Instance>>,
    blocking: NodeMask,
    /// Nodes that are up and not whole.
    levelling: NodeMask,
    pub serving: bool,
    heal: Option<Healing>,
    /// The freeze whose record is being decided.
    pub freeze: Option<u64>,
    /// The next freeze is for going back to the snapshot of this layer.
    pub roll_back: Option<LayerId>,
    /// Or it is for taking out what every node has emptied.
    pub take_out: bool,
    /// Of each node, the merging layers that it says to have emptied.
    pub emptied: Vec<Vec<LayerId>>,
    attempts: u64,
    /// Stale nodes that were taken in.
    pub healed: u64,
    /// Nodes on whose disks something may rot.
    pub rots: NodeMask,
    /// Blocks may be rotten on all that are in sync.
    pub may_give_up: bool,
    /// What the last scrub found that was through.
    pub scrubbed: Option<ScrubState>,
}

pub const QUORUM: u32 = 2;

impl Stored {
    pub fn layers(&self) -> Vec<LayerId> {
        (1..=self.top).rev().filter(|layer| self.dropped & 1 << layer == 0).collect()
    }

    pub fn snapshots(&self) -> Vec<SnapshotId> {
        let of = |layer: LayerId| {
            let generation = self.frozen[layer as usize];
            SnapshotId { layer, generation }
        };
        let stays = |layer: &LayerId| self.merging & 1 << layer == 0;
        self.layers()[1..].iter().copied().filter(stays).map(of).collect()
    }

    pub fn merging(&self) -> Vec<LayerId> {
        self.layers().into_iter().filter(|layer| self.merging & 1 << layer != 0).collect()
    }

    pub fn layering(&self) -> Layering {
        let (layers, snapshots, merging) = (self.layers(), self.snapshots(), self.merging());
        Layering { layers, snapshots, merging }
    }
}

pub fn digest(record: Stored) -> [u8; 32] {
    let sets = (record.in_sync.0 as u8) << 4 ^ (record.top as u8) << 6;
    [record.generation as u8 ^ sets ^ record.merging as u8; 32]
}

impl Policy {
    pub fn new(record: Stored, nodes: usize, rots: NodeMask) -> Policy {
        Policy {
            record,
            proposal: None,
            standing: vec![Standing::Away; nodes],
            serial: vec![0; nodes],
            instance: vec![None; nodes],
            served: vec![None; nodes],
            blocking: NodeMask::EMPTY,
            levelling: NodeMask::EMPTY,
            serving: false,
            heal: None,
            freeze: None,
            roll_back: None,
            take_out: false,
            emptied: vec![Vec::new(); nodes],
            attempts: 0,
            healed: 0,
            rots,
            may_give_up: false,
            scrubbed: None,
        }
    }

    /// Takes an event; `instance` is who was at the other end when it came about.
    pub fn hear(&mut self, event: Event, instance: Option<Instance>, io: &mut ImageIo) {
        match event {
            Event::Peeked { node, serial, .. } => {
                self.serial[usize::from(node)] = serial;
                self.standing[usize::from(node)] = Standing::Waiting;
                self.instance[usize::from(node)] = instance;
            }
            Event::ReplicaDown { node, blocking } => {
                self.standing[usize::from(node)] = Standing::Away;
                self.instance[usize::from(node)] = None;
                self.blocking = self.blocking.without(NodeMask::one(node));
                if blocking {
                    self.blocking = self.blocking.with(NodeMask::one(node));
                }
            }
            Event::ReplicaBlocking { node } => {
                self.blocking = self.blocking.with(NodeMask::one(node));
            }
            Event::Levelled { node, .. } => {
                self.levelling = self.levelling.without(NodeMask::one(node));
            }
            Event::Admitted { levelling, .. } => {
                self.serving = true;
                self.levelling = self.levelling.with(levelling);
                for index in 0..self.standing.len() {
                    if self.standing[index] == Standing::Joining {
                        self.is_up(index);
                    }
                }
            }
            Event::AdmitFailed { .. } => {
                for index in 0..self.standing.len() {
                    if self.standing[index] == Standing::Joining {
                        self.standing[index] = Standing::Asked;
                        io.peek(index as NodeIndex);
                    }
                }
            }
            Event::Stored { .. } | Event::Closed { .. } => {}
            Event::Frozen { attempt } if self.proposal.is_none() => self.add_layer(attempt),
            Event::Frozen { attempt } => {
                self.take_out = false;
                io.thaw(attempt);
            }
            Event::FreezeFailed { .. } => self.take_out = false,
            Event::Emptied { node, layers } => self.emptied[usize::from(node)] = layers,
            Event::ReaderOpen | Event::ReaderFailed { .. } => unreachable!("it holds the image"),
            Event::WritesLost { .. } | Event::Lags { .. } => {}
            Event::Healed { attempt, .. } => {
                if let Some(heal) = self.heal.as_mut().filter(|heal| heal.attempt == attempt) {
                    heal.healed = true;
                }
            }
            Event::HealFailed { node, attempt, .. } => {
                if self.heal.take_if(|heal| heal.attempt == attempt).is_some() {
                    self.rests(node);
                }
            }
            Event::ReplicaFailed { node, status } => panic!("node {node} fails: {status:?}"),
            Event::Fenced { node, status } => panic!("node {node} fences us: {status:?}"),
            Event::ParentRot { .. } => unreachable!("it is no clone"),
            Event::BadBlock { node, .. } => {
                assert!(self.rots.has(node), "nothing rots here");
            }
            Event::Repaired { node, .. } => assert!(self.rots.has(node), "nothing rots here"),
            Event::MetadataRepaired { node, .. } => {
                assert!(self.rots.has(node), "nothing rots here");
            }
            Event::Unrepairable { .. } => assert!(self.may_give_up, "others have it"),
            Event::Undecided { .. } => panic!("the majority is right"),
            Event::ScrubEnded { status: None, report } => self.scrubbed = Some(report),
            Event::ScrubEnded { .. } | Event::Holding { .. } | Event::PullUnreached { .. } => {}
        }
        self.go_on(io);
    }

    /// Nothing changes: a record with a new layer on top of the others, or of those of a snapshot.
    fn add_layer(&mut self, attempt: u64) {
        let generation = self.record.generation + 1;
        self.freeze = Some(attempt);
        if std::mem::take(&mut self.take_out) {
            let (dropped, merging) = (self.record.dropped | self.record.merging, 0);
            self.proposal = Some(Stored { generation, dropped, merging, ..self.record });
            return;
        }
        let top = self.record.top + 1;
        let Stored { mut frozen, mut dropped, mut merging, .. } = self.record;
        match self.roll_back.take() {
            Some(snapshot) => (snapshot + 1..top).for_each(|layer| {
                dropped |= 1 << layer;
                merging &= !(1 << layer);
            }),
            None => frozen[self.record.top as usize] = generation,
        }
        self.proposal = Some(Stored { generation, top, dropped, merging, frozen, ..self.record });
    }

    /// The snapshot of that layer goes, unless the record is being changed.
    pub fn remove_snapshot(&mut self, layer: LayerId) {
        if self.proposal.is_none() && self.freeze.is_none() && self.serving {
            let (generation, merging) =
                (self.record.generation + 1, self.record.merging | 1 << layer);
            self.proposal = Some(Stored { generation, merging, ..self.record });
        }
    }

    /// The cluster's state refuses a new layer: the image goes on without.
    pub fn layer_refused(&mut self, io: &mut ImageIo) {
        if let Some(attempt) = self.freeze.take() {
            self.proposal = None;
            io.thaw(attempt);
            self.go_on(io);
        }
    }

    fn rests(&mut self, node: NodeIndex) {
        let standing = &mut self.standing[usize::from(node)];
        if *standing == Standing::Healing {
            *standing = Standing::Waiting;
        }
    }

    /// Nobody waits for a healed node that is gone before its membership was asked for.
    fn give_up_heal(&mut self, io: &mut ImageIo) {
        let gone = |heal: &mut Healing| self.standing[usize::from(heal.node)] != Standing::Healing;
        if let Some(heal) = self.heal.take_if(gone) {
            io.end_heal(heal.attempt);
        }
    }

    fn begin_heal(&mut self, io: &mut ImageIo) {
        let nodes = 0..self.standing.len() as NodeIndex;
        let stale = nodes
            .filter(|node| !self.record.in_sync.has(*node))
            .find(|node| self.standing[usize::from(*node)] == Standing::Waiting);
        let sources = self.with_standing(Standing::Up).without(self.levelling);
        let may = self.serving && self.heal.is_none() && !sources.is_empty();
        let Some(node) = stale.filter(|_| may) else { return };
        let index = usize::from(node);
        self.attempts += 1;
        let (attempt, instance) = (self.attempts, self.instance[index]);
        self.standing[index] = Standing::Healing;
        self.heal = Some(Healing { node, attempt, instance, healed: false });
        io.heal(HealSpec {
            node,
            serial: self.serial[index],
            attempt,
            sets: vec![(0, self.record.since[index])],
            limits: HealLimits { bytes_per_second: 0, shards_at_once: 2, share_percent: 100 },
        });
    }

    fn is_up(&mut self, index: usize) {
        self.standing[index] = Standing::Up;
        self.served[index] = self.instance[index];
        self.blocking = self.blocking.without(NodeMask::one(index as NodeIndex));
    }

    fn with_serials(&self, nodes: NodeMask) -> Vec<(NodeIndex, u64)> {
        nodes.iter().map(|node| (node, self.serial[usize::from(node)])).collect()
    }

    fn with_standing(&self, wanted: Standing) -> NodeMask {
        let in_sync = self.record.in_sync.iter();
        let those = in_sync.filter(|node| self.standing[usize::from(*node)] == wanted);
        those.fold(NodeMask::EMPTY, |mask, node| mask.with(NodeMask::one(node)))
    }

    pub fn all_up(&self) -> bool {
        self.with_standing(Standing::Up) == self.record.in_sync
    }

    fn go_on(&mut self, io: &mut ImageIo) {
        if self.proposal.is_some() {
            return;
        }
        self.give_up_heal(io);
        let healed = self.heal.filter(|heal| heal.healed);
        let healed = healed.map_or(NodeMask::EMPTY, |heal| NodeMask::one(heal.node));
        let away = self.with_standing(Standing::Away);
        let up = self.with_standing(Standing::Up);
        let whole = up.without(self.levelling);
        let due = self.serving && !away.and(self.blocking).is_empty() && !whole.is_empty();
        let with_healed = self.record.in_sync.with(healed);
        let left = if due { with_healed.without(away) } else { with_healed };
        let left = if left.0.count_ones() >= QUORUM { left } else { with_healed };
        if left != self.record.in_sync {
            let mut since = self.record.since;
            for node in self.record.in_sync.without(left).iter() {
                since[usize::from(node)] = self.record.generation;
            }
            let generation = self.record.generation + 1;
            self.proposal = Some(Stored { generation, in_sync: left, since, ..self.record });
            return;
        }
        let waiting = self.with_standing(Standing::Waiting);
        let resume = waiting.iter().filter(|node| {
            let index = usize::from(*node);
            self.served[index].is_some() && self.served[index] == self.instance[index]
        });
        let resume = resume.fold(NodeMask::EMPTY, |mask, node| mask.with(NodeMask::one(node)));
        if !resume.is_empty() {
            resume.iter().for_each(|node| self.is_up(usize::from(node)));
            io.admit(&self.with_serials(resume), true);
        }
        let join = waiting.without(resume);
        let unfounded = up.with(resume).is_empty() && waiting != self.record.in_sync;
        let joining = !self.with_standing(Standing::Joining).is_empty();
        if !join.is_empty() && !unfounded && !joining {
            join.iter().for_each(|n| self.standing[usize::from(n)] = Standing::Joining);
            io.admit(&self.with_serials(join), false);
        }
        self.begin_heal(io);
    }

    /// A record without these nodes, whoever is there to go on.
    pub fn leaves_behind(&mut self, nodes: NodeMask, io: &mut ImageIo) {
        let mut since = self.record.since;
        nodes.iter().for_each(|node| since[usize::from(node)] = self.record.generation);
        let in_sync = self.record.in_sync.without(nodes);
        let generation = self.record.generation + 1;
        self.proposal = Some(Stored { generation, in_sync, since, ..self.record });
        self.proposal_taken(io);
    }

    /// The cluster's state took the proposal.
    pub fn proposal_taken(&mut self, io: &mut ImageIo) {
        let Some(taken) = self.proposal.take() else { return };
        self.record = taken;
        self.freeze = None;
        if let Some(heal) = self.heal.take_if(|heal| taken.in_sync.has(heal.node)) {
            let index = usize::from(heal.node);
            self.healed += 1;
            self.served[index] = heal.instance;
            if self.standing[index] == Standing::Healing {
                self.standing[index] = Standing::Up;
            }
        }
        for index in 0..self.standing.len() {
            if !taken.in_sync.has(index as NodeIndex) {
                self.served[index] = None;
            }
        }
        self.blocking = self.blocking.and(taken.in_sync);
        self.levelling = self.levelling.and(taken.in_sync);
        let (in_sync, body) = ([taken.in_sync], bytes::Bytes::new());
        io.reconfigure(taken.generation, digest(taken), body, &in_sync, taken.layering());
        self.go_on(io);
    }
}
