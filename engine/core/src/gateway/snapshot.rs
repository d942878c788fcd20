//! What the gateway looks like at one moment, for people and tests.

use crate::geometry::SnapshotId;
use crate::nbd::Counters;
use crate::replica::{HealState, LevelState, RotState, ScrubState};

/// A link to a node.
#[derive(Clone, Debug)]
pub struct LinkSnapshot {
    pub node: String,
    pub ready: bool,
}

/// A connected client.
#[derive(Clone, Debug)]
pub struct ClientSnapshot {
    pub id: u64,
    pub channel: Option<u32>,
}

/// An open image.
#[derive(Clone, Debug)]
pub struct ImageSnapshot {
    pub channel: u32,
    pub image: String,
    pub running: bool,
    pub epoch: u64,
    pub generation: u64,
    pub requests_in_flight: usize,
    /// Name and state of each node.
    pub replicas: Vec<(String, String)>,
    pub heal: Option<HealState>,
    /// How far levelling after an unclean end is, while there is any.
    pub level: Option<LevelState>,
    pub scrub: Option<ScrubState>,
    pub rot: RotState,
    pub counters: Counters,
}

/// Frozen layers that are read.
#[derive(Clone, Debug)]
pub struct ReaderSnapshot {
    pub channel: u32,
    pub image: String,
    pub snapshot: SnapshotId,
    pub running: bool,
    pub requests_in_flight: usize,
    /// Name and state of each node.
    pub nodes: Vec<(String, String)>,
    pub counters: Counters,
}

#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    pub links: Vec<LinkSnapshot>,
    pub clients: Vec<ClientSnapshot>,
    /// Connections that were closed as they came, for there were too many.
    pub refused_clients: u64,
    /// What is kept for clients' requests.
    pub bytes_in_flight: u64,
    pub images: Vec<ImageSnapshot>,
    pub readers: Vec<ReaderSnapshot>,
}
