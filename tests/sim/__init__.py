"""The simulator: the real Rust and the real Python of a cluster, on one clock, from one seed."""
