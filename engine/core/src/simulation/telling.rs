//! What is delivered, in words: for whoever replays a history that failed.

use super::network::{Item, Way};
use crate::wire::copies::{PeerFetch, Pull};
use crate::wire::messages::{Copy, Flush, Head, Io, Level, ShardRange, take_write};
use crate::wire::{Frame, kind};

const NAMES: [(u8, &str); 22] = [
    (kind::PING, "PING"),
    (kind::PEEK, "PEEK"),
    (kind::RECORD, "RECORD"),
    (kind::ATTACH, "ATTACH"),
    (kind::ATTACH_READER, "ATTACH_READER"),
    (kind::DETACH, "DETACH"),
    (kind::CONFIRM, "CONFIRM"),
    (kind::WRITE, "WRITE"),
    (kind::ZERO, "ZERO"),
    (kind::READ, "READ"),
    (kind::STATUS, "STATUS"),
    (kind::CHANGES, "CHANGES"),
    (kind::TOUCHED, "TOUCHED"),
    (kind::FLUSH, "FLUSH"),
    (kind::CLEAR, "CLEAR"),
    (kind::DIRTY, "DIRTY"),
    (kind::SUMMARY, "SUMMARY"),
    (kind::FETCH, "FETCH"),
    (kind::COPY, "COPY"),
    (kind::LEVEL, "LEVEL"),
    (kind::PULL, "PULL"),
    (kind::PEER_FETCH, "PEER_FETCH"),
];

/// An item that has arrived, in one line.
pub(super) fn told(item: &Item, way: Way) -> String {
    let arrow = if way == Way::ToNode { "→" } else { "←" };
    match item {
        Item::Hello => format!("{arrow} hello"),
        Item::Greeting(hello) => format!("{arrow} greeting of instance {}", hello.start_counter),
        Item::Ping | Item::Pong => String::new(),
        Item::Close => format!("{arrow} close"),
        Item::Frame(frame) => format!("{arrow} {}", frame_told(frame)),
    }
}

fn frame_told(frame: &Frame) -> String {
    let name = NAMES.iter().find(|(kind, _)| *kind == frame.kind & !crate::wire::REPLY);
    let name = name.map_or("?", |(_, name)| *name);
    if frame.is_reply() {
        return format!("{name} {:?} tag {:x}", frame.status, frame.tag);
    }
    let head = frame.head.clone();
    let detail = match frame.kind {
        kind::WRITE => take_write(head, &mut Vec::new()).ok().map(|io| {
            let stamp = frame.payload.first_chunk::<8>().map_or(0, |b| u64::from_le_bytes(*b));
            format!("{} stamp {stamp:x}", io_told(&io))
        }),
        kind::ZERO | kind::READ | kind::STATUS => Io::take(head).ok().map(|io| io_told(&io)),
        kind::FLUSH | kind::CLEAR => Flush::take(head).ok().map(|flush| {
            let (epoch, sequence) = (flush.epoch, flush.clear_sequence);
            format!("epoch {epoch} clear {sequence} proof {:?}", flush.proof)
        }),
        kind::COPY => Copy::take(head).ok().map(|copy| {
            format!("shard {} blocks {:?} {:?}", copy.shard, copy.indexes, copy.blocks)
        }),
        kind::FETCH | kind::SUMMARY => ShardRange::take(head)
            .ok()
            .map(|r| format!("shard {} blocks {}+{}", r.shard, r.first_block, r.blocks)),
        kind::PULL => Pull::take(head).ok().map(|p| {
            format!("shard {} blocks {}+{} of {}", p.shard, p.first_block, p.blocks, p.source.node)
        }),
        kind::PEER_FETCH => PeerFetch::take(head)
            .ok()
            .map(|p| format!("shard {} blocks {}+{}", p.shard, p.first_block, p.blocks)),
        kind::LEVEL => Level::take(head).ok().map(|level| format!("shards {:?}", level.shards)),
        _ => None,
    };
    format!("{name} {} tag {:x}", detail.unwrap_or_default(), frame.tag)
}

fn io_told(io: &Io) -> String {
    let (first, sectors) = (io.offset / 512, io.length.div_ceil(512));
    format!(
        "shard {} sectors {first}+{sectors} epoch {} generation {} sequence {}",
        io.shard, io.epoch, io.generation, io.sequence
    )
}
