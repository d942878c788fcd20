//! Single situations, each the story of a mistake.

use super::cluster::{Cluster, Faults};
use crate::geometry::Tag;
use crate::replica::{Event, IoError, Outcome, Output, Token};
use crate::wire::messages::{DirtyEntry, DirtyReply, Head};
use crate::wire::{Frame, REPLY, Status, kind};
use bytes::{Bytes, BytesMut};

fn dirty_reply(to: &Frame, shards: &[u64]) -> Frame {
    let entry =
        |shard: &u64| DirtyEntry { shard: *shard, last: Tag::NONE, generation: 1, sticky: true };
    let reply = DirtyReply { entries: shards.iter().map(entry).collect(), more: true };
    let mut head = BytesMut::new();
    reply.put(&mut head);
    Frame { kind: to.kind | REPLY, head: head.freeze(), payload: Bytes::new(), ..to.clone() }
}

fn until_dirty_is_asked() -> (Cluster, u8, Frame) {
    let mut cluster = Cluster::new(1, Faults::Kills);
    loop {
        cluster.step(false);
        if let Some((node, frame)) = cluster.intercept(kind::DIRTY) {
            return (cluster, node, frame);
        }
    }
}

/// The shard after the last one was asked for, which overflowed and ended the gateway.
#[test]
fn a_dirty_map_with_the_last_possible_shard_is_taken() {
    let (mut cluster, node, frame) = until_dirty_is_asked();
    assert_eq!(cluster.io.receive(node, dirty_reply(&frame, &[u64::MAX])), Ok(()));
}

/// It was asked on from its last entry, again and again.
#[test]
fn a_dirty_map_out_of_order_ends_the_connection() {
    let (mut cluster, node, frame) = until_dirty_is_asked();
    assert!(cluster.io.receive(node, dirty_reply(&frame, &[5, 5])).is_err());
    let (mut cluster, node, frame) = until_dirty_is_asked();
    assert!(cluster.io.receive(node, dirty_reply(&frame, &[5, 4])).is_err());
}

/// A client connects, the image shrinks, the client asks for what was cut off: the loop that serves all
/// images ended.
#[test]
fn a_request_past_a_new_end_fails_alone() {
    let mut cluster = Cluster::new(1, Faults::Kills);
    cluster.settle();
    cluster.io.resize(4096);
    let token = Token { client: 1, cookie: 77 };
    cluster.io.read(token, 4096, 512);
    let outcome = Outcome::Failed(IoError::Io);
    assert!(cluster.io.outputs.iter().any(|output| {
        matches!(output, Output::Answer { token: t, outcome: o } if *t == token && *o == outcome)
    }));
}

/// A guest discarded a whole big disk; the nodes' dirty maps were full, the first node to say so was left
/// behind as if its disk had failed, and every image after it lost that node too.
#[test]
fn a_full_dirty_map_is_flushed_and_cleared_and_the_node_asked_again() {
    let mut cluster = Cluster::new(1, Faults::Kills);
    cluster.settle();
    cluster.write(0, 8);
    let (node, frame) = cluster.intercept(kind::WRITE).expect("it goes to all nodes");
    let refusal = Frame { kind: frame.kind | REPLY, status: Status::DirtyFull, ..frame };
    let refusal = Frame { head: Bytes::new(), payload: Bytes::new(), ..refusal };
    assert_eq!(cluster.io.receive(node, refusal), Ok(()));
    let failed = |output: &Output| matches!(output, Output::Event(Event::ReplicaFailed { .. }));
    assert!(!cluster.io.outputs.iter().any(failed), "a node with much to remember works");
    cluster.settle();
    assert!(cluster.policy.record.in_sync.has(node), "nobody was left behind");
    cluster.check_replicas(false);
}
