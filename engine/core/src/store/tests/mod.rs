//! Tests of the whole store on the simulated disk; `rig` drives it beside a model.

mod clones;
mod crash;
mod disk;
mod dropped;
mod images;
mod layers;
mod log_pages;
mod merges;
mod model;
mod read_write;
mod replay;
mod rig;
mod rot;
mod scrub;
mod written;
