//! Tests of the whole store on the simulated disk; `rig` drives it beside a model.

mod crash;
mod disk;
mod dropped;
mod images;
mod layers;
mod merges;
mod model;
mod read_write;
mod replay;
mod rig;
mod rot;
mod scrub;
mod written;
