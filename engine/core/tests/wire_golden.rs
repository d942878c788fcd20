//! Golden bytes of the gateway–node protocol: a frame of each kind as it goes over the wire, and the
//! replies that have a head. The bytes were computed from `docs/wire.md` by another program, never by
//! the code under test: where a test here fails, the code has left the protocol.

use bytes::{BufMut, Bytes, BytesMut};
use hci_engine_core::content::Block;
use hci_engine_core::geometry::{ImageId, SnapshotId, Tag};
use hci_engine_core::wire::changes::{
    ChangedRun, ChangesAsked, ChangesReply, Held, TouchedAsked, TouchedReply,
};
use hci_engine_core::wire::codec::Fields;
use hci_engine_core::wire::copies::{PeerFetch, Pull, Source};
use hci_engine_core::wire::messages::{
    Attach, AttachReader, BlocksReply, Copy, DirtyEntry, DirtyFrom, DirtyReply, Flush, Head, Hello,
    HelloReply, Io, IoInto, Level, Number, Peek, PeekReply, Record, RecordHead, ScrubReply,
    Session, ShardRange, WrittenAbove, WrittenReply, put_blocks, take_blocks, take_write,
};
use hci_engine_core::wire::{
    Frame, FrameReader, Prefix, REPLY, Status, WireError, encode, flag, kind,
};
use std::fmt::Debug;

/// Bytes of a text of hex digits; blanks and everything after a `;` on a line are left out.
fn hex(text: &str) -> Vec<u8> {
    let digits: String = text
        .lines()
        .flat_map(|line| line.split(';').next())
        .flat_map(|line| line.chars().filter(|c| !c.is_whitespace()))
        .collect();
    let byte = |i: usize| u8::from_str_radix(&digits[i..i + 2], 16).expect("hex digits");
    (0..digits.len()).step_by(2).map(byte).collect()
}

const HELLO: &str = "
    2d000000 00000000 7e2b5c60 ; head 45, payload 0, checksum
    01 00 0000 00000000 0000000000000000 ; kind, flags, status, channel, tag
    484349574952450a ; magic
    05000500 ; versions 5 to 5
    cccccccccccccccccccccccccccccccc ; cluster
    08006761746577617931 ; gateway1
    05006e6f646531 ; node1
";
const HELLO_REPLY: &str = "
    39000000 00000000 73d31426 ; head 57, payload 0, checksum
    81 00 0000 00000000 0000000000000000 ; kind, flags, status, channel, tag
    0500 ; version 5
    05006e6f646531 ; node1
    55555555555555555555555555555555 ; store
    0500000000000000 ; start counter 5
    b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0 ; boot
    1100000000000000 ; flush number 17
";
const HELLO_REFUSED: &str = "
    39000000 00000000 a8f98908 ; head 57, payload 0, checksum
    81 00 0300 00000000 0000000000000000 ; kind, flags, status, channel, tag
    0500 ; version 5
    05006e6f646531 ; node1
    55555555555555555555555555555555 ; store
    0500000000000000 ; start counter 5
    b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0 ; boot
    1100000000000000 ; flush number 17
";
const PING: &str = "
    00000000 00000000 64aa3d16 ; head 0, payload 0, checksum
    02 00 0000 00000000 0000000000000000 ; kind, flags, status, channel, tag
";
const PING_REPLY: &str = "
    00000000 00000000 9cef0ca7 ; head 0, payload 0, checksum
    82 00 0000 00000000 0000000000000000 ; kind, flags, status, channel, tag
";
const MEMORY: &str = "
    00000000 00000000 4ee82c7e ; head 0, payload 0, checksum
    08 00 0000 00000000 0000000000000000 ; kind, flags, status, channel, tag
";
const PEEK: &str = "
    10000000 00000000 dea7ff58 ; head 16, payload 0, checksum
    03 00 0000 09000000 0807060504030201 ; kind, flags, status, channel, tag
    101112131415161718191a1b1c1d1e1f ; image
";
const PEEK_REPLY: &str = "
    7c000000 02000000 b03ef448 ; head 124, payload 2, checksum
    83 00 0000 09000000 0807060504030201 ; kind, flags, status, channel, tag
    101112131415161718191a1b1c1d1e1f ; image
    0300000000000000 ; epoch 3
    aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa ; holder
    0200000000000000 ; generation 2
    dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd ; digest
    00004000 ; shards of 4 MiB
    07000000 ; 7 dirty shards
    1200000000000000 ; flush number 18
    00 ; not set back
    01000000 ; one entry
    05006e6f6465321100000000000000 ; node2, 17
    01000000 ; one layer is emptied
    02000000 ; 2
    7b7d ; payload
";
const RECORD: &str = "
    7d000000 02000000 b832ad42 ; head 125, payload 2, checksum
    04 00 0000 09000000 0200000000000000 ; kind, flags, status, channel, tag
    101112131415161718191a1b1c1d1e1f ; image
    0300000000000000 ; epoch 3
    aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa ; holder
    0200000000000000 ; generation 2
    dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd ; digest
    00004000 ; shards of 4 MiB
    00 ; what it has counts
    03000000 ; three layers
    030000000200000001000000 ; 3, 2, 1
    01000000 ; one snapshot
    010000000200000000000000 ; layer 1, generation 2
    01000000 ; one layer is merged
    02000000 ; 2
    7b7d ; payload
";
const RECORD_REFUSED: &str = "
    00000000 00000000 105e6850 ; head 0, payload 0, checksum
    84 00 0600 09000000 0200000000000000 ; kind, flags, status, channel, tag
";
const ATTACH: &str = "
    28000000 00000000 a23cfdba ; head 40, payload 0, checksum
    05 00 0000 09000000 0807060504030201 ; kind, flags, status, channel, tag
    101112131415161718191a1b1c1d1e1f ; image
    0300000000000000 ; epoch 3
    aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa ; holder
";
const ATTACH_READER: &str = "
    1c000000 00000000 bb5ec00d ; head 28, payload 0, checksum
    09 00 0000 09000000 0807060504030201 ; kind, flags, status, channel, tag
    101112131415161718191a1b1c1d1e1f ; image
    01000000 ; layer 1
    0200000000000000 ; generation 2
";
const ATTACH_READER_REFUSED: &str = "
    00000000 00000000 6e88c92a ; head 0, payload 0, checksum
    89 00 0f00 09000000 0807060504030201 ; kind, flags, status, channel, tag
";
const DETACH: &str = "
    08000000 00000000 fdb1cc0b ; head 8, payload 0, checksum
    06 00 0000 09000000 0807060504030201 ; kind, flags, status, channel, tag
    0300000000000000 ; epoch 3
";
const CONFIRM: &str = "
    08000000 00000000 737383b1 ; head 8, payload 0, checksum
    07 00 0000 09000000 0807060504030201 ; kind, flags, status, channel, tag
    0300000000000000 ; epoch 3
";
const WRITE: &str = "
    38000000 05000000 a9fb3cfb ; head 56, payload 5, checksum
    10 01 0000 09000000 0807060504030201 ; kind, flags, status, channel, tag
    0600000000000000 ; shard 6
    fe0f000005000000 ; offset 4094, length 5
    0300000000000000 ; epoch 3
    0200000000000000 ; generation 2
    2100000000000000 ; sequence 33
    aa05b30be01c270c ; of `he`
    ea2ffe9bc5724bbe ; of `llo`
    68656c6c6f ; payload
";
const WRITE_REPLY: &str = "
    00000000 00000000 f9191c45 ; head 0, payload 0, checksum
    90 00 0000 09000000 0807060504030201 ; kind, flags, status, channel, tag
";
const ZERO: &str = "
    28000000 00000000 c28d9ac0 ; head 40, payload 0, checksum
    11 03 0000 09000000 0807060504030201 ; kind, flags, status, channel, tag
    0600000000000000 ; shard 6
    01000000ffff3f00 ; offset 1, length 4194303
    0300000000000000 ; epoch 3
    0200000000000000 ; generation 2
    2200000000000000 ; sequence 34
";
const READ: &str = "
    28000000 00000000 f85e6050 ; head 40, payload 0, checksum
    12 00 0000 09000000 0807060504030201 ; kind, flags, status, channel, tag
    0600000000000000 ; shard 6
    0010000000400000 ; offset 4096, length 16384
    0300000000000000 ; epoch 3
    0200000000000000 ; generation 2
    0000000000000000 ; sequence 0
";
const READ_INTO: &str = "
    30000000 00000000 c10e70b1 ; head 48, payload 0, checksum
    16 00 0000 09000000 0807060504030201 ; kind, flags, status, channel, tag
    0600000000000000 ; shard 6
    0010000000400000 ; offset 4096, length 16384
    0300000000000000 ; epoch 3
    0200000000000000 ; generation 2
    0000000000000000 ; sequence 0
    0000300000000000 ; at 3 MiB of the memory
";
const READ_REPLY: &str = "
    28000000 00100000 975eaa8a ; head 40, payload 4096, checksum
    92 00 0000 09000000 0807060504030201 ; kind, flags, status, channel, tag
    04000000 ; four blocks
    000000000000000000 ; absent
    010000000000000000 ; zero
    02324ddb2604ea7a1b ; data
    030000000000000000 ; bad
";
const READ_BAD_BLOCK: &str = "
    04000000 00000000 e20ae64e ; head 4, payload 0, checksum
    92 00 0a00 09000000 0807060504030201 ; kind, flags, status, channel, tag
    03000000 ; block 3 of the shard
";
const STATUS: &str = "
    28000000 00000000 9b63c9df ; head 40, payload 0, checksum
    13 00 0000 09000000 0807060504030201 ; kind, flags, status, channel, tag
    0600000000000000 ; shard 6
    0000000000004000 ; offset 0, length 4194304
    0300000000000000 ; epoch 3
    0200000000000000 ; generation 2
    0000000000000000 ; sequence 0
";
const STATUS_REPLY: &str = "
    16000000 00000000 70aeb5f5 ; head 22, payload 0, checksum
    93 00 0000 09000000 0807060504030201 ; kind, flags, status, channel, tag
    02000000 ; two blocks
    010000000000000000 ; zero
    020000000000000000 ; data
";
const FLUSH: &str = "
    2b000000 00000000 01f6e8cb ; head 43, payload 0, checksum
    14 00 0000 09000000 0807060504030201 ; kind, flags, status, channel, tag
    0300000000000000 ; epoch 3
    0200000000000000 ; generation 2
    1e00000000000000 ; clear up to 30
    01000000 ; one entry
    05006e6f6465321100000000000000 ; node2, 17
";
const FLUSH_REPLY: &str = "
    08000000 00000000 e4cab708 ; head 8, payload 0, checksum
    94 00 0000 09000000 0807060504030201 ; kind, flags, status, channel, tag
    1200000000000000 ; flush number 18
";
const CLEAR: &str = "
    1c000000 00000000 f5601112 ; head 28, payload 0, checksum
    15 00 0000 09000000 0000000000000000 ; kind, flags, status, channel, tag
    0300000000000000 ; epoch 3
    0200000000000000 ; generation 2
    1f00000000000000 ; clear up to 31
    00000000 ; no proof
";
const DIRTY: &str = "
    10000000 00000000 9c2bf707 ; head 16, payload 0, checksum
    20 00 0000 09000000 0807060504030201 ; kind, flags, status, channel, tag
    0300000000000000 ; epoch 3
    0800000000000000 ; from shard 8
";
const DIRTY_REPLY: &str = "
    26000000 00000000 534ae125 ; head 38, payload 0, checksum
    a0 00 0000 09000000 0807060504030201 ; kind, flags, status, channel, tag
    01 ; more
    01000000 ; one entry
    0900000000000000 ; shard 9
    03000000000000002100000000000000 ; tag (3, 33)
    0200000000000000 ; generation 2
    01 ; sticky
";
const SUMMARY: &str = "
    1c000000 00000000 83fd9ce9 ; head 28, payload 0, checksum
    21 00 0000 09000000 0807060504030201 ; kind, flags, status, channel, tag
    0300000000000000 ; epoch 3
    01000000 ; layer 1
    0900000000000000 ; shard 9
    0400000002000000 ; block 4, 2 of them
";
const SUMMARY_REPLY: &str = "
    3e000000 00000000 c42ed039 ; head 62, payload 0, checksum
    a1 00 0000 09000000 0807060504030201 ; kind, flags, status, channel, tag
    0200000000000000 ; generation 2
    02000000 ; two blocks
    02324ddb2604ea7a1b03000000000000002100000000000000 ; data, tag (3, 33)
    01000000000000000000000000000000000000000000000000 ; zero, no tag
";
const FETCH: &str = "
    1c000000 00000000 c2916f49 ; head 28, payload 0, checksum
    22 00 0000 09000000 0807060504030201 ; kind, flags, status, channel, tag
    0300000000000000 ; epoch 3
    01000000 ; layer 1
    0900000000000000 ; shard 9
    0400000002000000 ; block 4, 2 of them
";
const FETCH_REPLY: &str = "
    3e000000 00100000 be94b4ca ; head 62, payload 4096, checksum
    a2 00 0000 09000000 0807060504030201 ; kind, flags, status, channel, tag
    0200000000000000 ; generation 2
    02000000 ; two blocks
    02324ddb2604ea7a1b03000000000000002100000000000000 ; data, tag (3, 33)
    01000000000000000000000000000000000000000000000000 ; zero, no tag
";
const COPY: &str = "
    66000000 00100000 7ee354a7 ; head 102, payload 4096, checksum
    23 00 0000 09000000 0807060504030201 ; kind, flags, status, channel, tag
    0300000000000000 ; epoch 3
    0200000000000000 ; generation 2
    01000000 ; layer 1
    0900000000000000 ; shard 9
    0100000000000000 ; written in generation 1
    020000000400000007000000 ; two indexes: 4, 7
    02000000 ; two blocks
    02324ddb2604ea7a1b03000000000000002100000000000000 ; data, tag (3, 33)
    01000000000000000000000000000000000000000000000000 ; zero, no tag
";
const LEVEL: &str = "
    1c000000 00000000 2d00fda9 ; head 28, payload 0, checksum
    24 00 0000 09000000 0807060504030201 ; kind, flags, status, channel, tag
    0300000000000000 ; epoch 3
    0200000009000000000000000c00000000000000 ; two shards: 9, 12
";
const WRITTEN: &str = "
    1c000000 00000000 b12d15eb ; head 28, payload 0, checksum
    25 00 0000 09000000 0807060504030201 ; kind, flags, status, channel, tag
    0300000000000000 ; epoch 3
    0200000000000000 ; written above generation 2
    01000000 0900000000000000 ; from place 1, shard 9
";
const WRITTEN_REPLY: &str = "
    21000000 00000000 03e6d39b ; head 33, payload 0, checksum
    a5 00 0000 09000000 0807060504030201 ; kind, flags, status, channel, tag
    01 02000000 0700000000000000 ; more: from place 2, shard 7
    0200000009000000000000000c00000000000000 ; two shards: 9, 12
";
const WRITTEN_LAST: &str = "
    11000000 00000000 05874b10 ; head 17, payload 0, checksum
    a5 00 0000 09000000 0807060504030201 ; kind, flags, status, channel, tag
    00 00000000 0000000000000000 ; no more
    00000000 ; no shard
";

const SCRUB: &str = "
    1c000000 00000000 cf77c7cd ; head 28, payload 0, checksum
    26 00 0000 09000000 0807060504030201 ; kind, flags, status, channel, tag
    0300000000000000 ; epoch 3
    01000000 ; layer 1
    0900000000000000 ; shard 9
    0400000002000000 ; block 4, 2 of them
";
const SCRUB_REPLY: &str = "
    2d000000 00000000 699fd4e1 ; head 45, payload 0, checksum
    a6 00 0000 09000000 0807060504030201 ; kind, flags, status, channel, tag
    01 02000000 ; metadata was rewritten, two blocks with data
    d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1 ; digest
    0100000005000000 ; one rotten block: 5
";

const CHANGES: &str = "
    44000000 00000000 ddf7c2cd ; head 68, payload 0, checksum
    2d 00 0000 09000000 0807060504030201 ; kind, flags, status, channel, tag
    0900000000000000 ; shard 9
    00100000 00200000 ; offset, length
    0300000000000000 0200000000000000 0000000000000000 ; epoch 3, generation 2, no sequence
    02000000 ; two snapshots, the newest first
    04000000 0700000000000000 ; layer 4, frozen by generation 7
    01000000 0200000000000000 ; layer 1, frozen by generation 2
";
const CHANGES_REPLY: &str = "
    14000000 00000000 c8aac69d ; head 20, payload 0, checksum
    ad 00 0000 09000000 0807060504030201 ; kind, flags, status, channel, tag
    02000000 ; two runs
    01000000 02 0200 01 ; one block of data in the second layer, written since the older one
    01000000 00 0000 00 ; one that no layer has
";
const TOUCHED: &str = "
    3c000000 00000000 0d2b0b2b ; head 60, payload 0, checksum
    2e 00 0000 09000000 0807060504030201 ; kind, flags, status, channel, tag
    0300000000000000 ; epoch 3
    01000000 01000000 0200000000000000 ; above layer 1, frozen by generation 2
    0400000000000000 2000000000000000 ; shards 4 to 31
    0700000000000000 ; begun in generation 7
    02000000 0900000000000000 ; from place 2, shard 9
";
const TOUCHED_REPLY: &str = "
    29000000 00000000 3bc68e8f ; head 41, payload 0, checksum
    ae 00 0000 09000000 0807060504030201 ; kind, flags, status, channel, tag
    0700000000000000 ; generation 7
    01 03000000 0500000000000000 ; more: from place 3, shard 5
    0200000009000000000000000c00000000000000 ; two shards: 9, 12
";

const PULL: &str = "
    3b000000 00000000 52c14109 ; head 59, payload 0, checksum
    27 00 0000 09000000 0807060504030201 ; kind, flags, status, channel, tag
    0300000000000000 ; epoch 3
    0200000000000000 ; generation 2
    01000000 ; layer 1
    0900000000000000 ; shard 9
    0400000002000000 ; block 4, 2 of them
    05006e6f646532 ; node2
    0e003139322e302e322e373a37303130 ; 192.0.2.7:7010
";
const PULL_REPLY: &str = "
    08000000 00000000 9f781cb7 ; head 8, payload 0, checksum
    a7 01 0000 09000000 0807060504030201 ; kind, flags, status, channel, tag
    0010000000000000 ; 4096 bytes of data
";
const PULL_BAD_BLOCK: &str = "
    04000000 00000000 9c10f3ee ; head 4, payload 0, checksum
    a7 00 0a00 09000000 0807060504030201 ; kind, flags, status, channel, tag
    05000000 ; block 5 of the shard
";
const PULL_UNREACHABLE: &str = "
    00000000 00000000 7555a2f8 ; head 0, payload 0, checksum
    a7 00 1000 09000000 0807060504030201 ; kind, flags, status, channel, tag
";
const PULL_CANCELLED: &str = "
    00000000 00000000 3300a5ac ; head 0, payload 0, checksum
    a7 00 1100 09000000 0807060504030201 ; kind, flags, status, channel, tag
";
const PEER_FETCH: &str = "
    34000000 00000000 3a0ee151 ; head 52, payload 0, checksum
    0a 00 0000 00000000 0807060504030201 ; kind, flags, status, channel, tag
    101112131415161718191a1b1c1d1e1f ; image
    0300000000000000 ; epoch 3
    0200000000000000 ; generation 2
    01000000 ; layer 1
    0900000000000000 ; shard 9
    0400000002000000 ; block 4, 2 of them
";
const PEER_FETCH_REPLY: &str = "
    3e000000 00100000 14f775c8 ; head 62, payload 4096, checksum
    8a 00 0000 00000000 0807060504030201 ; kind, flags, status, channel, tag
    0200000000000000 ; generation 2
    02000000 ; two blocks
    02324ddb2604ea7a1b03000000000000002100000000000000 ; data, tag (3, 33)
    01000000000000000000000000000000000000000000000000 ; zero, no tag
";

/// The payload of frames that carry one block of data, and its checksum.
const BLOCK: [u8; 4096] = [0xa5; 4096];
const BLOCK_CHECKSUM: u64 = 0x1b7a_ea04_26db_4d32;

const CHANNEL: u32 = 9;
const TAG: u64 = 0x0102_0304_0506_0708;

fn request(kind: u8) -> Prefix {
    Prefix::request(kind, 0, CHANNEL, TAG)
}

fn reply(kind: u8) -> Prefix {
    Prefix { kind: kind | REPLY, ..request(kind) }
}

/// Neither channel nor tag: HELLO and PING.
fn bare(kind: u8) -> Prefix {
    Prefix { channel: 0, tag: 0, ..request(kind) }
}

/// `golden` is what is written, and reading it gives the same frame back.
fn check_frame(
    golden: &str,
    prefix: Prefix,
    payload: &[u8],
    put: impl FnOnce(&mut BytesMut),
) -> Frame {
    let mut golden = hex(golden);
    if payload == BLOCK {
        golden.extend_from_slice(payload);
    }
    let mut written = BytesMut::new();
    encode(&mut written, prefix, payload.len(), put);
    written.extend_from_slice(payload);
    assert_eq!(written[..], golden[..], "kind {:#x}", prefix.kind);
    let mut input = BytesMut::from(&golden[..]);
    let frame = FrameReader::next(&mut input).expect("valid").expect("whole");
    assert!(input.is_empty());
    assert_eq!((frame.kind, frame.flags, frame.status), (prefix.kind, prefix.flags, prefix.status));
    assert_eq!((frame.channel, frame.tag), (prefix.channel, prefix.tag));
    assert_eq!(frame.payload, payload);
    frame
}

fn check<H: Head + PartialEq + Debug>(golden: &str, prefix: Prefix, head: &H, payload: &[u8]) {
    let frame = check_frame(golden, prefix, payload, |out| head.put(out));
    assert_eq!(H::take(frame.head).as_ref(), Ok(head));
}

fn written(head: &impl Head) -> Bytes {
    let mut out = BytesMut::new();
    head.put(&mut out);
    out.freeze()
}

fn check_empty(golden: &str, prefix: Prefix) {
    assert!(check_frame(golden, prefix, &[], |_| {}).head.is_empty());
}

fn image() -> ImageId {
    ImageId(std::array::from_fn(|i| 0x10 + i as u8))
}

fn record() -> RecordHead {
    RecordHead {
        image: image(),
        epoch: 3,
        holder: [0xaa; 16],
        generation: 2,
        digest: [0xdd; 32],
        shard_bytes: 4 << 20,
    }
}

fn hello_reply() -> HelloReply {
    HelloReply {
        version: 5,
        node: "node1".into(),
        store: [0x55; 16],
        start_counter: 5,
        boot: [0xb0; 16],
        flush_number: 17,
    }
}

fn io(shard: u64, offset: u32, length: u32, sequence: u64) -> Io {
    Io { shard, offset, length, epoch: 3, generation: 2, sequence }
}

fn peers() -> Vec<(String, u64)> {
    vec![("node2".into(), 17)]
}

fn shard_range() -> ShardRange {
    ShardRange { epoch: 3, layer: 1, shard: 9, first_block: 4, blocks: 2 }
}

fn blocks() -> Vec<(Block, Tag)> {
    vec![(Block::Data(BLOCK_CHECKSUM), Tag { epoch: 3, sequence: 33 }), (Block::Zero, Tag::NONE)]
}

#[test]
fn greeting_is_as_specified() {
    let hello = Hello {
        version_min: 5,
        version_max: 5,
        cluster: [0xcc; 16],
        gateway: "gateway1".into(),
        node: "node1".into(),
    };
    check(HELLO, bare(kind::HELLO), &hello, &[]);
    let answer = Prefix { kind: kind::HELLO | REPLY, ..bare(kind::HELLO) };
    check(HELLO_REPLY, answer, &hello_reply(), &[]);
    let refused = Prefix { status: Status::WrongCluster, ..answer };
    check(HELLO_REFUSED, refused, &hello_reply(), &[]);
    check_empty(PING, bare(kind::PING));
    check_empty(MEMORY, bare(kind::MEMORY));
    check_empty(PING_REPLY, Prefix { kind: kind::PING | REPLY, ..bare(kind::PING) });
}

#[test]
fn records_and_sessions_are_as_specified() {
    check(PEEK, request(kind::PEEK), &Peek(image()), &[]);
    let peeked = PeekReply {
        record: record(),
        dirty: 7,
        flush_number: 18,
        distrusted: false,
        peers: peers(),
        emptied: vec![2],
    };
    check(PEEK_REPLY, reply(kind::PEEK), &peeked, b"{}");
    let snapshots = vec![SnapshotId { layer: 1, generation: 2 }];
    let (layers, merging) = (vec![3, 2, 1], vec![2]);
    let stored = Record { head: record(), blank: false, layers, snapshots, merging };
    check(RECORD, Prefix { tag: 2, ..request(kind::RECORD) }, &stored, b"{}");
    let refused = Prefix { tag: 2, status: Status::StaleEpoch, ..reply(kind::RECORD) };
    check_empty(RECORD_REFUSED, refused);
    let attach = Attach { image: image(), epoch: 3, holder: [0xaa; 16] };
    check(ATTACH, request(kind::ATTACH), &attach, &[]);
    let snapshot = SnapshotId { layer: 1, generation: 2 };
    let reader = AttachReader { image: image(), snapshot };
    check(ATTACH_READER, request(kind::ATTACH_READER), &reader, &[]);
    let refused = Prefix { status: Status::NoLayers, ..reply(kind::ATTACH_READER) };
    check_empty(ATTACH_READER_REFUSED, refused);
    check(DETACH, request(kind::DETACH), &Session { epoch: 3 }, &[]);
    check(CONFIRM, request(kind::CONFIRM), &Session { epoch: 3 }, &[]);
}

#[test]
fn write_is_as_specified() {
    let (head, checksums) = (io(6, 4094, 5, 33), [0x0c27_1ce0_0bb3_05aa, 0xbe4b_72c5_9bfe_2fea]);
    let prefix = Prefix { flags: flag::FUA, ..request(kind::WRITE) };
    let frame = check_frame(WRITE, prefix, b"hello", |out| {
        head.put(out);
        checksums.iter().for_each(|checksum| out.put_u64_le(*checksum));
    });
    let mut read = Vec::new();
    assert_eq!(take_write(frame.head, &mut read), Ok(head));
    assert_eq!(read, checksums);
    check_empty(WRITE_REPLY, reply(kind::WRITE));
}

#[test]
fn zero_is_as_specified() {
    let flags = flag::FUA | flag::KEEP_ALLOCATED;
    let prefix = Prefix { flags, ..request(kind::ZERO) };
    check(ZERO, prefix, &io(6, 1, (4 << 20) - 1, 34), &[]);
}

#[test]
fn read_and_status_are_as_specified() {
    let check_blocks = |golden, prefix, blocks: &[Block], payload: &[u8]| {
        let put = |out: &mut BytesMut| put_blocks(out, blocks.iter().copied());
        let frame = check_frame(golden, prefix, payload, put);
        let mut read = Vec::new();
        assert_eq!(take_blocks(frame.head, &mut read), Ok(()));
        assert_eq!(read, blocks);
    };
    check(READ, request(kind::READ), &io(6, 4096, 16384, 0), &[]);
    let into = IoInto { io: io(6, 4096, 16384, 0), at: 3 << 20 };
    check(READ_INTO, request(kind::READ_INTO), &into, &[]);
    let found = [Block::Absent, Block::Zero, Block::Data(BLOCK_CHECKSUM), Block::Bad];
    check_blocks(READ_REPLY, reply(kind::READ), &found, &BLOCK);
    let bad = Prefix { status: Status::BadBlock, ..reply(kind::READ) };
    let frame = check_frame(READ_BAD_BLOCK, bad, &[], |out| out.put_u32_le(3));
    assert_eq!(Fields(frame.head).u32(), Ok(3));
    check(STATUS, request(kind::STATUS), &io(6, 0, 4 << 20, 0), &[]);
    check_blocks(STATUS_REPLY, reply(kind::STATUS), &[Block::Zero, Block::Data(0)], &[]);
}

#[test]
fn flush_and_clear_are_as_specified() {
    let flush = Flush { epoch: 3, generation: 2, clear_sequence: 30, proof: peers() };
    check(FLUSH, request(kind::FLUSH), &flush, &[]);
    check(FLUSH_REPLY, reply(kind::FLUSH), &Number(18), &[]);
    let clear = Flush { epoch: 3, generation: 2, clear_sequence: 31, proof: Vec::new() };
    check(CLEAR, Prefix { tag: 0, ..request(kind::CLEAR) }, &clear, &[]);
}

#[test]
fn copies_from_node_to_node_are_as_specified() {
    let address = "192.0.2.7:7010".parse().expect("an address");
    let pull = Pull {
        epoch: 3,
        generation: 2,
        layer: 1,
        shard: 9,
        first_block: 4,
        blocks: 2,
        source: Source { node: "node2".into(), address },
    };
    check(PULL, request(kind::PULL), &pull, &[]);
    let pulled = Prefix { flags: flag::BESIDE_CLIENTS, ..reply(kind::PULL) };
    check(PULL_REPLY, pulled, &Number(4096), &[]);
    let bad = Prefix { status: Status::BadBlock, ..reply(kind::PULL) };
    let frame = check_frame(PULL_BAD_BLOCK, bad, &[], |out| out.put_u32_le(5));
    assert_eq!(Fields(frame.head).u32(), Ok(5));
    for (golden, status) in
        [(PULL_UNREACHABLE, Status::Unreachable), (PULL_CANCELLED, Status::Cancelled)]
    {
        check_empty(golden, Prefix { status, ..reply(kind::PULL) });
    }
    let asked = PeerFetch {
        image: image(),
        epoch: 3,
        generation: 2,
        layer: 1,
        shard: 9,
        first_block: 4,
        blocks: 2,
    };
    let prefix = Prefix { channel: 0, ..request(kind::PEER_FETCH) };
    check(PEER_FETCH, prefix, &asked, &[]);
    let given = BlocksReply { generation: 2, blocks: blocks() };
    let prefix = Prefix { kind: kind::PEER_FETCH | REPLY, ..prefix };
    check(PEER_FETCH_REPLY, prefix, &given, &BLOCK);
}

#[test]
fn an_address_in_a_pull_is_written_in_one_way_only() {
    let golden = hex(PULL);
    let head = |text: &[u8]| {
        let fixed = &golden[28..28 + 36 + 7];
        let length = (text.len() as u16).to_le_bytes();
        Bytes::from([fixed, &length[..], text].concat())
    };
    assert!(Pull::take(head(b"192.0.2.7:7010")).is_ok());
    assert!(Pull::take(head(b"[2001:db8::7]:7010")).is_ok());
    for refused in [&b"node2:7010"[..], b"192.0.2.7", b"192.0.2.7:07010", b"[2001:db8:0::7]:1"] {
        assert!(Pull::take(head(refused)).is_err(), "{refused:?}");
    }
}

#[test]
fn levelling_is_as_specified() {
    check(DIRTY, request(kind::DIRTY), &DirtyFrom { epoch: 3, from_shard: 8 }, &[]);
    let last = Tag { epoch: 3, sequence: 33 };
    let entry = DirtyEntry { shard: 9, last, generation: 2, sticky: true };
    let dirty = DirtyReply { entries: vec![entry], more: true };
    check(DIRTY_REPLY, reply(kind::DIRTY), &dirty, &[]);
    let found = BlocksReply { generation: 2, blocks: blocks() };
    check(SUMMARY, request(kind::SUMMARY), &shard_range(), &[]);
    check(SUMMARY_REPLY, reply(kind::SUMMARY), &found, &[]);
    check(FETCH, request(kind::FETCH), &shard_range(), &[]);
    check(FETCH_REPLY, reply(kind::FETCH), &found, &BLOCK);
    let copy = Copy {
        epoch: 3,
        generation: 2,
        layer: 1,
        shard: 9,
        shard_generation: 1,
        indexes: vec![4, 7],
        blocks: blocks(),
    };
    check(COPY, request(kind::COPY), &copy, &BLOCK);
    check(LEVEL, request(kind::LEVEL), &Level { epoch: 3, shards: vec![9, 12] }, &[]);
    let above = WrittenAbove { epoch: 3, generation: 2, place: 1, shard: 9 };
    check(WRITTEN, request(kind::WRITTEN), &above, &[]);
    let written = WrittenReply { next: Some((2, 7)), shards: vec![9, 12] };
    check(WRITTEN_REPLY, reply(kind::WRITTEN), &written, &[]);
    let last = WrittenReply { next: None, shards: Vec::new() };
    check(WRITTEN_LAST, reply(kind::WRITTEN), &last, &[]);
    check(SCRUB, request(kind::SCRUB), &shard_range(), &[]);
    let scrubbed = ScrubReply {
        metadata_rewritten: true,
        data_blocks: 2,
        digest: [0xd1; 32],
        rotten: vec![5],
    };
    check(SCRUB_REPLY, reply(kind::SCRUB), &scrubbed, &[]);
}

#[test]
fn changes_are_as_specified() {
    let newer = SnapshotId { layer: 4, generation: 7 };
    let older = SnapshotId { layer: 1, generation: 2 };
    let io = io(9, 4096, 8192, 0);
    let asked = ChangesAsked { io, since: [newer, older].into() };
    check(CHANGES, request(kind::CHANGES), &asked, &[]);
    let data = ChangedRun { blocks: 1, held: Held::Data, depth: 2, changed: 1 };
    let hole = ChangedRun { blocks: 1, held: Held::Absent, depth: 0, changed: 0 };
    let found = ChangesReply { runs: vec![data, hole] };
    check(CHANGES_REPLY, reply(kind::CHANGES), &found, &[]);
    let (first_shard, end_shard, generation, place, shard) = (4, 32, 7, 2, 9);
    let since = Some(older);
    let asked = TouchedAsked { epoch: 3, since, first_shard, end_shard, generation, place, shard };
    check(TOUCHED, request(kind::TOUCHED), &asked, &[]);
    let page = TouchedReply { generation: 7, next: Some((3, 5)), shards: vec![9, 12] };
    check(TOUCHED_REPLY, reply(kind::TOUCHED), &page, &[]);
    let unordered = ChangesAsked { io, since: [older, newer].into() };
    assert!(ChangesAsked::take(written(&unordered)).is_err());
}

#[test]
fn statuses_have_their_numbers() {
    use Status::*;
    let specified = [
        Ok,
        Malformed,
        Version,
        WrongCluster,
        WrongNode,
        NoRecord,
        StaleEpoch,
        StaleGeneration,
        NoSession,
        BadChecksum,
        BadBlock,
        NoSpace,
        Io,
        Deleted,
        DirtyFull,
        NoLayers,
        Unreachable,
        Cancelled,
    ];
    for (number, status) in specified.into_iter().enumerate() {
        assert_eq!(status as u16, number as u16);
        assert_eq!(Status::from_wire(number as u16), Some(status));
    }
    assert_eq!(Status::from_wire(18), None);
}

#[test]
fn damaged_frame_ends_the_stream_and_a_cut_one_waits() {
    let whole = hex(FLUSH);
    for end in 0..whole.len() {
        assert_eq!(FrameReader::next(&mut BytesMut::from(&whole[..end])), Ok(None));
    }
    let mut damaged = BytesMut::from(&whole[..]);
    damaged[40] ^= 1;
    assert_eq!(FrameReader::next(&mut damaged), Err(WireError::BadHeadChecksum));
    let mut long = BytesMut::from(&whole[..]);
    long[..4].copy_from_slice(&(512 * 1024 + 1u32).to_le_bytes());
    assert_eq!(FrameReader::next(&mut long), Err(WireError::HeadTooLong(512 * 1024 + 1)));
    let mut long = BytesMut::from(&whole[..]);
    long[4..8].copy_from_slice(&((1 << 20) + 1u32).to_le_bytes());
    assert_eq!(FrameReader::next(&mut long), Err(WireError::PayloadTooLong((1 << 20) + 1)));
}

#[test]
fn head_with_a_byte_too_many_or_too_few_is_refused() {
    let bytes = written(&record());
    assert!(RecordHead::take(bytes.slice(..bytes.len() - 1)).is_err());
    let mut longer = BytesMut::from(&bytes[..]);
    longer.put_u8(0);
    assert!(RecordHead::take(longer.freeze()).is_err());
    let record = |layers, merging| {
        written(&Record { head: record(), blank: true, layers, snapshots: Vec::new(), merging })
    };
    assert!(Record::take(record(vec![3, 1], vec![1])).is_ok());
    for no_chain in [vec![], vec![1, 2], vec![2, 2]] {
        assert!(Record::take(record(no_chain, vec![])).is_err());
    }
    assert!(Record::take(record(vec![3, 2, 1], vec![1, 2])).is_err());
    let mut checksums = Vec::new();
    let write = written(&io(0, 0, 1, 1));
    let mut ragged = BytesMut::from(&write[..]);
    ragged.put_u8(0);
    assert!(take_write(ragged.freeze(), &mut checksums).is_err());
}
