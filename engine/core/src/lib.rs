//! The data path of hci-vmstore. Mechanism only: it moves bytes, counts acknowledgements and refuses
//! stale epochs; who is in sync, and what to do about a lost replica, is decided in Python.
//!
//! Modules that decide (`geometry`, `checksum`, `wire`, `nbd` but for `serve`, `store` over its `Disk`
//! trait, `replica` but for `link`) do no I/O of their own, so that a simulator can run them.

pub mod checksum;
pub mod content;
pub mod gateway;
pub mod geometry;
pub mod io;
pub mod nbd;
pub mod node;
pub mod replica;
pub mod rules;
#[cfg(any(test, feature = "simulation"))]
pub mod simulation;
pub mod store;
pub mod wire;
