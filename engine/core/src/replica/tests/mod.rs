//! The holder's side of replication against real stores: seeded histories of a small cluster.

mod changes;
mod cluster;
mod freezes;
mod full;
mod heals;
mod histories;
mod levels;
mod memory;
mod merges;
mod node;
mod oracle;
mod paced;
mod policy;
mod pulls;
mod readers;
mod rollbacks;
mod rot;
mod scripted;
