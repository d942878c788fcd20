//! A cluster without threads, sockets or clock: real stores on simulated disks, the real request code
//! of nodes, the real replication of gateways, and a network that delays, cuts and holds back.
//!
//! Mechanism only, as the engine it stands in for: what happens to whom, and what policy says, comes
//! from outside (`tests/sim` through `engine._engine.Simulation`, or this crate's own tests). Built with
//! the feature `simulation` and for tests, never into a release.
//!
//! Everything follows from the seed and the calls: actions are ordered by time and by order of birth,
//! and no map whose order is chance is walked.

mod gateways;
mod network;
mod node;
mod nodes;
mod peers;
mod probe;
mod telling;
mod world;

pub use gateways::{Answered, GuestRequest};
pub use network::Way;
pub use node::{LogSize, NodeRun, SimNode};
pub use world::{Happening, Span, World};
