//! The holder's side of replication, without I/O (but for `link`): requests of clients become writes to
//! all in-sync nodes and reads from one, answers are counted, replicas that come and go are levelled.
//!
//! | a replica is | meaning | leaves by |
//! | --- | --- | --- |
//! | `Down` | no connection | the link comes up → `Peeking` |
//! | `Peeking` | asked for its record | the answer → `Waiting`, with an event |
//! | `Waiting` | policy must say what to do with it | `admit` → `Joining` |
//! | `Joining` | RECORD and ATTACH are on their way | both answered → `Up` (resumed), `Listing` or `Healing` |
//! | `Listing` | the dirty maps are asked for | done → `Up`; a participant is lost → `Waiting` |
//! | `Healing` | stale, with a session: its shards are made level | taken in by `reconfigure` → `Up`; given up → `Waiting` |
//! | `Up` | serves; what it missed was resent in sequence order | the link goes down → `Down` |
//!
//! Invariants, asserted here:
//! - a write is answered only when every in-sync replica of its set has answered it and the record that
//!   names these replicas is stored on all of them (membership before acknowledgement);
//! - two requests in flight never change a common block, and no read overtakes a write on its blocks;
//! - a replica that is not `Up` is sent no request of a client and is never read; but a healing one gets
//!   the changes of shards that are level on it, and these are answered only when it has answered too;
//! - one that is `Up` is sent no request for a shard in which it is doubtful, before that one is level on it,
//!   durably; and no flush is answered while a replica in sync is doubtful anywhere (`level`).
//!
//! A reader (`reader`) has no part in all this: it asks nodes for layers that nobody changes any more.
//!
//! What this module never does: choose who is in sync, or raise an epoch or a generation.

mod admission;
mod asks;
mod background;
mod changes;
mod compare;
mod copier;
mod emptied;
mod freeze;
mod full;
mod heal;
mod heal_shards;
mod image;
mod lag;
mod level;
mod link;
mod locks;
mod membership;
mod memory;
mod pacing;
mod reader;
mod reads;
mod repair;
mod replies;
mod routes;
mod scrub;
mod served;
mod shard_set;
mod submit;
#[cfg(test)]
mod tests;

pub use background::Background;
pub use heal::{HealLimits, HealSpec, HealState};
pub use image::{ImageIo, OpenSpec, Queues, SetSpec};
pub use level::LevelState;
pub use link::{Link, LinkEvent, LinkTarget};
pub use reader::{ReaderIo, ReaderSpec};
pub use scrub::{ScrubSpec, ScrubState};
pub use served::Served;

use crate::content::Run;
use crate::geometry::{ImageId, LayerId, SnapshotId};
use crate::wire::Status;
use bytes::Bytes;

/// A running instance of a node's store: the store, and how often it was started.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Instance {
    pub store: [u8; 16],
    pub start_counter: u64,
}

/// Index of a node within its image's table; an image spreads over at most 64 nodes.
pub type NodeIndex = u8;

/// A set of nodes of one image.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct NodeMask(pub u64);

impl NodeMask {
    pub const EMPTY: NodeMask = NodeMask(0);

    pub fn one(node: NodeIndex) -> NodeMask {
        assert!(node < 64, "an image spreads over at most 64 nodes");
        NodeMask(1 << node)
    }
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
    pub fn has(self, node: NodeIndex) -> bool {
        self.0 & (1 << node) != 0
    }
    pub fn with(self, other: NodeMask) -> NodeMask {
        NodeMask(self.0 | other.0)
    }
    pub fn without(self, other: NodeMask) -> NodeMask {
        NodeMask(self.0 & !other.0)
    }
    pub fn and(self, other: NodeMask) -> NodeMask {
        NodeMask(self.0 & other.0)
    }
    pub fn iter(self) -> impl Iterator<Item = NodeIndex> {
        (0..64u8).filter(move |node| self.has(*node))
    }
    pub fn first(self) -> Option<NodeIndex> {
        (self.0 != 0).then(|| self.0.trailing_zeros() as NodeIndex)
    }
}

/// Whom a completion is for: a connection, and the cookie of its request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Token {
    pub client: u64,
    pub cookie: u64,
}

/// A run of a status answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    pub length: u32,
    pub hole: bool,
    pub zero: bool,
    /// The how manieth layer has it, from 1 on; 0: none. Asked by `status`, no more than whether one has.
    pub depth: u16,
    /// It was written since so many of the snapshots that `changes` named: the last ones.
    pub changed: u8,
}

/// Why a client's request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoError {
    Io,
    /// The disks of too many nodes are full.
    NoSpace,
    /// The image is closing, or was lost to another holder.
    Shutdown,
}

/// What a client is answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Done,
    Read(Vec<Run>),
    Extents(Vec<Extent>),
    /// Shards in which something was written, in order.
    Shards(Vec<u64>),
    Failed(IoError),
}

/// What the state machine wants done.
#[derive(Debug)]
pub enum Output {
    Send { node: NodeIndex, head: Bytes, payload: Bytes },
    Answer { token: Token, outcome: Outcome },
    Event(Event),
}

/// What policy is told. Every event names its image when it leaves the engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A node answered PEEK and waits for `admit`, which names `serial`. `record` is none where the
    /// node holds none.
    Peeked { node: NodeIndex, serial: u64, record: Option<PeekedRecord>, deleted: bool },
    /// The connection is gone. `blocking`: requests wait for the node.
    ReplicaDown { node: NodeIndex, blocking: bool },
    /// A request has begun to wait for a node that is not `Up`.
    ReplicaBlocking { node: NodeIndex },
    /// A node in sync failed a request; it is asked again each second.
    ReplicaFailed { node: NodeIndex, status: Status },
    /// `target` could not fetch blocks from `source` by itself: they come through here.
    PullUnreached { source: NodeIndex, target: NodeIndex },
    /// Stored blocks are rotten on this node; another answers, and they are repaired from there. Told once
    /// until that is over. `hidden`: they match their checksums, and are not what most others have.
    BadBlock { node: NodeIndex, shard: u64, block: u32, blocks: u32, hidden: bool },
    /// Blocks of a node are what the others have again, durably.
    Repaired { node: NodeIndex, shard: u64, block: u32, blocks: u32 },
    /// A shard's damaged metadata was rewritten by its node, from memory.
    MetadataRepaired { node: NodeIndex, shard: u64 },
    /// Replicas of blocks differ, all match their checksums, and nothing says which is right.
    Undecided { nodes: NodeMask, shard: u64, block: u32, blocks: u32 },
    /// A scrub is through (no status), or has ended early; `report` says how far it came.
    ScrubEnded { status: Option<Status>, report: ScrubState },
    /// A block is rotten on every node in sync: it can be read again when it was written as a whole.
    Unrepairable { shard: u64, block: u32 },
    /// The nodes asked by `admit` are `Up`; of all that are, `levelling` are not whole: they are made
    /// level in so many shards, on demand and in the background.
    Admitted { levelling: NodeMask, shards: u64 },
    /// A node that was not whole is.
    Levelled { node: NodeIndex, shards: u64, copied_bytes: u64 },
    /// A node was lost, or refused, while nodes were being admitted; those left wait again.
    AdmitFailed { node: NodeIndex, status: Status },
    /// A stale node is level, durably, and gets what is written. Until policy says what became of it
    /// (`reconfigure` that takes it in, or `end_heal`), nothing is answered that it lacks.
    Healed { node: NodeIndex, attempt: u64, copied_bytes: u64, bad_blocks: u64 },
    /// A heal has ended early; the node is as stale as before. `node` is the one that was healed.
    HealFailed { node: NodeIndex, attempt: u64, status: Status },
    /// So many milliseconds later than the first one nodes answered, on the average of the last second, or
    /// have kept others waiting by now. Told where it is much, and once when it no longer is.
    Lags { lags: Vec<(NodeIndex, u64)> },
    /// All nodes in sync have lost their power, and may lack so many changes that were answered since the
    /// last flush. Their clients hear it with the next one.
    WritesLost { changes: u64 },
    /// All in-sync nodes of the changed sets hold this generation.
    Stored { generation: u64 },
    /// A node knows a later holder, or a later membership: nothing more is answered, ever.
    Fenced { node: NodeIndex, status: Status },
    /// A freeze has begun to hold back what clients change.
    Holding { attempt: u64 },
    /// No change of a client is in flight, and all is durable on the nodes in sync. It stays so until policy
    /// ends it, by `reconfigure` or `thaw`.
    Frozen { attempt: u64 },
    /// A freeze has ended before that; clients' changes go on.
    FreezeFailed { attempt: u64, why: &'static str },
    /// Asked by `ask_emptied`: the layers of which nothing is left on the node, durably, of those that its
    /// record has as merging.
    Emptied { node: NodeIndex, layers: Vec<LayerId> },
    /// Of a reader: each replica set has a node that serves its frozen layers.
    ReaderOpen,
    /// Of a reader: that did not come about in time, or it is over; every request fails.
    ReaderFailed { why: String },
    /// `close` is done. Not `clean`: the next holder has to reconcile.
    Closed { clean: bool },
}

/// What became of the rot that was found in an image since it was opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RotState {
    /// Blocks found bad, made good, and given up.
    pub found: u64,
    pub repaired: u64,
    pub given_up: u64,
    /// Repairs that wait or are under way.
    pub waiting: u64,
    /// Shard and block of what is rotten on every node in sync.
    pub unrepairable: Vec<(u64, u32)>,
}

/// What a record says of an image's layers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layering {
    /// Top first: ids that fall.
    pub layers: Vec<LayerId>,
    pub snapshots: Vec<SnapshotId>,
    /// Of the layers, those that go into the one above them: ids that fall, never the top one.
    pub merging: Vec<LayerId>,
}

impl Layering {
    /// Whether what is merged are layers below the top one, in order, that no snapshot names.
    pub fn merges_fit(&self) -> bool {
        let named = |layer: &LayerId| self.snapshots.iter().any(|named| named.layer == *layer);
        let below = self.layers.get(1..).unwrap_or_default();
        self.merging.is_sorted_by(|a, b| a > b)
            && self.merging.iter().all(|layer| below.contains(layer) && !named(layer))
    }
}

/// A record as a node holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeekedRecord {
    pub image: ImageId,
    pub epoch: u64,
    pub holder: [u8; 16],
    pub generation: u64,
    pub digest: [u8; 32],
    pub dirty: u32,
    pub flush_number: u64,
    pub distrusted: bool,
    pub peers: Vec<(String, u64)>,
    /// Merging layers of this record of which nothing is left on the node.
    pub emptied: Vec<LayerId>,
    pub body: Bytes,
}
