//! Replies and the queue they wait in.

use crate::client::session;
use bytes::{Buf, Bytes};
use hci_engine_core::content::Run;
use hci_engine_core::io::{Outgoing, Sink};
use hci_engine_core::nbd::{
    Addressee, Command, Errno, Extent, Flags, ReplyStyle, Request, block_status, done, error, read,
};
use proptest::collection::vec;
use proptest::prelude::*;
use std::io::IoSlice;

/// Collects a reply whole.
#[derive(Default)]
struct Collected(Vec<u8>);

impl Sink for Collected {
    fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    fn data(&mut self, data: Bytes) {
        self.0.extend_from_slice(&data);
    }

    fn zeroes(&mut self, length: usize) {
        self.0.resize(self.0.len() + length, 0);
    }
}

fn request(command: Command, flags: u16, offset: u64, length: u64) -> Request {
    Request { command, flags: Flags(flags), cookie: 9, offset, length, payload: Bytes::new() }
}

fn to(cookie: u64) -> Addressee {
    Addressee { cookie, offset: 0 }
}

fn data(length: usize) -> Run {
    Run::Data(Bytes::from(vec![0xaa; length]))
}

/// One chunk of a structured reply: (flags, type, payload).
type Chunk = (u16, u16, Bytes);

fn chunks(bytes: &[u8]) -> Vec<Chunk> {
    let mut left = Bytes::copy_from_slice(bytes);
    let mut chunks = Vec::new();
    while left.has_remaining() {
        assert_eq!(left.get_u32(), 0x668e_33ef);
        let (flags, kind, cookie) = (left.get_u16(), left.get_u16(), left.get_u64());
        assert_eq!(cookie, 9);
        let length = left.get_u32() as usize;
        chunks.push((flags, kind, left.split_to(length)));
    }
    chunks
}

fn read_chunks(flags: u16, length: u64, runs: &[Run]) -> Vec<Chunk> {
    let mut out = Collected::default();
    read(&mut out, ReplyStyle::Structured, &request(Command::Read, flags, 4096, length), runs);
    chunks(&out.0)
}

#[test]
fn read_structured_joins_neighbours_and_marks_only_the_last_done() {
    let runs = [data(10), data(20), Run::Hole(5), Run::Hole(6), data(0), data(1)];
    let chunks = read_chunks(0, 42, &runs);
    let shape: Vec<_> = chunks.iter().map(|c| (c.0, c.1, c.2.len())).collect();
    assert_eq!(shape, [(0, 1, 8 + 30), (0, 2, 12), (1, 1, 8 + 1)]);
    let offsets: Vec<_> = chunks.iter().map(|c| c.2.clone().get_u64()).collect();
    assert_eq!(offsets, [4096, 4126, 4137]);
}

#[test]
fn read_structured_with_empty_runs_behind_the_data_ends_once() {
    let chunks = read_chunks(0, 10, &[data(0), data(10), Run::Hole(0)]);
    let shape: Vec<_> = chunks.iter().map(|c| (c.0, c.1)).collect();
    assert_eq!(shape, [(1, 1)]);
}

/// An empty run of data once cut a hole in two, so that a read with DF got two chunks.
#[test]
fn read_with_empty_runs_between_holes_joins_them() {
    let chunks = read_chunks(1 << 2, 2, &[Run::Hole(1), data(0), Run::Hole(1)]);
    let shape: Vec<_> = chunks.iter().map(|c| (c.0, c.1, c.2.len())).collect();
    assert_eq!(shape, [(1, 2, 12)]);
}

#[test]
fn read_structured_of_no_bytes_is_one_empty_chunk() {
    assert_eq!(read_chunks(0, 0, &[]), [(1, 0, Bytes::new())]);
    assert_eq!(read_chunks(0, 0, &[Run::Hole(0)]), [(1, 0, Bytes::new())]);
}

#[test]
fn read_with_dont_fragment_sends_a_lone_hole_as_a_hole() {
    let chunks = read_chunks(1 << 2, 100, &[Run::Hole(60), Run::Hole(40)]);
    assert_eq!((chunks.len(), chunks[0].1), (1, 2));
    let mixed = read_chunks(1 << 2, 100, &[Run::Hole(60), data(40)]);
    assert_eq!((mixed.len(), mixed[0].0, mixed[0].1), (1, 1, 1));
    assert_eq!(mixed[0].2[8..], [vec![0; 60], vec![0xaa; 40]].concat());
}

#[test]
#[should_panic(expected = "cover its range")]
fn read_with_runs_too_short_is_a_mistake_of_the_caller() {
    read_chunks(0, 100, &[data(99)]);
}

#[test]
fn error_with_a_long_message_stays_a_valid_string() {
    let mut out = Collected::default();
    error(&mut out, ReplyStyle::Structured, to(9), Errno::Io, &"ä".repeat(4000));
    let chunks = chunks(&out.0);
    assert_eq!((chunks[0].0, chunks[0].1, chunks[0].2.len()), (1, 0x8001, 6 + 4096));
}

fn status(flags: u16, length: u64, extents: &[(u64, u32)]) -> Vec<(u32, u32)> {
    let mut session = session(ReplyStyle::Structured);
    session.limits.max_extents = 3;
    let extents: Vec<_> = extents
        .iter()
        .map(|&(length, flags)| Extent { length, flags, depth: 0, changed: 0 })
        .collect();
    let mut out = Collected::default();
    block_status(&mut out, &session, &request(Command::BlockStatus, flags, 0, length), &extents);
    let (_, _, mut payload) = chunks(&out.0).remove(0);
    assert_eq!(payload.get_u32(), 1);
    let mut found = Vec::new();
    while payload.has_remaining() {
        found.push((payload.get_u32(), payload.get_u32()));
    }
    found
}

#[test]
fn block_status_joins_clips_and_bounds_extents() {
    assert_eq!(status(0, 100, &[(10, 0), (0, 3), (20, 0), (70, 3)]), [(30, 0), (70, 3)]);
    assert_eq!(status(0, 100, &[(1 << 40, 3), (5, 0)]), [(100, 3)]);
    let alternating = [(1, 0), (1, 3), (1, 0), (1, 3), (1, 0)];
    assert_eq!(status(0, 100, &alternating), [(1, 0), (1, 3), (1, 0)]);
    assert_eq!(status(1 << 3, 100, &[(10, 0), (10, 0), (80, 3)]), [(20, 0)]);
}

#[test]
#[should_panic(expected = "at least one byte")]
fn block_status_without_extents_is_a_mistake_of_the_caller() {
    status(0, 100, &[(0, 0)]);
}

#[test]
fn outgoing_sent_in_any_pieces_is_the_same_stream() {
    let fill = |sink: &mut dyn FnMut(&mut Outgoing)| {
        let mut out = Outgoing::new();
        sink(&mut out);
        out
    };
    let mut queue = |out: &mut Outgoing| {
        done(out, ReplyStyle::Simple, to(1));
        done(out, ReplyStyle::Simple, to(2));
        let runs = [Run::Hole(200_000), data(3), Run::Hole(2)];
        read(out, ReplyStyle::Simple, &request(Command::Read, 0, 0, 200_005), &runs);
        done(out, ReplyStyle::Simple, to(3));
    };
    let whole = drain(fill(&mut queue), usize::MAX, 16);
    assert_eq!(whole.len(), 4 * 16 + 200_005);
    for (step, slices) in [(1000, 1), (65_537, 2), (7777, 3), (usize::MAX, 1)] {
        assert_eq!(drain(fill(&mut queue), step, slices), whole, "{step} bytes, {slices} slices");
    }
}

/// Sends `out` through `slices` slices, at most `step` bytes at a time.
fn drain(mut out: Outgoing, step: usize, slices: usize) -> Vec<u8> {
    let mut stream = Vec::new();
    while !out.is_empty() {
        let mut gathered = vec![IoSlice::new(&[]); slices];
        let filled = out.gather(&mut gathered);
        assert!(filled > 0, "there is something to send");
        let bytes: Vec<u8> = gathered[..filled].iter().flat_map(|slice| slice.to_vec()).collect();
        let now = bytes.len().min(step);
        stream.extend_from_slice(&bytes[..now]);
        out.advance(now);
    }
    assert_eq!(out.len(), 0);
    stream
}

/// The bytes that a client makes of content chunks; checks that they neither overlap nor leave gaps.
fn reassembled(chunks: Vec<Chunk>, offset: u64) -> Vec<u8> {
    let (mut content, last) = (Vec::new(), chunks.len() - 1);
    for (index, (flags, kind, mut payload)) in chunks.into_iter().enumerate() {
        assert_eq!(flags == 1, index == last, "the last chunk and no other is the end");
        if kind == 0 {
            continue;
        }
        assert_eq!(payload.get_u64(), offset + content.len() as u64);
        match kind {
            1 => content.extend_from_slice(&payload),
            _ => content.resize(content.len() + payload.get_u32() as usize, 0),
        }
    }
    content
}

fn any_run() -> impl Strategy<Value = Run> {
    prop_oneof![
        vec(any::<u8>(), 0..20).prop_map(|data| Run::Data(Bytes::from(data))),
        (0u32..20).prop_map(Run::Hole),
    ]
}

proptest! {
    #[test]
    fn read_of_any_runs_is_the_same_in_every_style(runs in vec(any_run(), 0..10)) {
        let mut simple = Collected::default();
        let length = runs.iter().map(|run| match run {
            Run::Data(data) => data.len() as u64,
            Run::Hole(length) => u64::from(*length),
        });
        let length = length.sum();
        let request = request(Command::Read, 0, 4096, length);
        read(&mut simple, ReplyStyle::Simple, &request, &runs);
        let content = &simple.0[16..];
        prop_assert_eq!(content.len(), length as usize);
        prop_assert_eq!(&reassembled(read_chunks(0, length, &runs), 4096), content);
        let unfragmented = read_chunks(1 << 2, length, &runs);
        prop_assert_eq!(unfragmented.len(), 1);
        prop_assert_eq!(&reassembled(unfragmented, 4096), content);
    }
}
