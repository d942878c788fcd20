//! The store of a node: write-ahead log, shard files, dirty map, recovery, over a `Disk` trait.
