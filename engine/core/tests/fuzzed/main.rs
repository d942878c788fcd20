//! What the fuzz targets of `engine/fuzz` check, on inputs drawn here: on any compiler, and with heads
//! and options that are well formed but for a byte, which chance alone does not come upon.

mod nbd_handshake;
mod nbd_requests;
mod wire_frames;
mod wire_heads;

use bytes::{BufMut, Bytes, BytesMut};
use hci_engine_core::checksum::crc32c;
use hci_engine_core::content::Block;
use hci_engine_core::geometry::{ImageId, SnapshotId, Tag};
use hci_engine_core::nbd::constants::{EXTENDED_REQUEST_MAGIC, IHAVEOPT, REQUEST_MAGIC};
use hci_engine_core::wire::changes::{
    ChangedRun, ChangesAsked, ChangesReply, Held, TouchedAsked, TouchedReply,
};
use hci_engine_core::wire::copies::{PeerFetch, Pull, Source};
use hci_engine_core::wire::messages::{
    Attach, AttachReader, BlocksReply, Copy, DirtyEntry, DirtyFrom, DirtyReply, Flush, Head, Hello,
    HelloReply, Io, IoInto, Level, Number, Peek, PeekReply, Record, RecordHead, ScrubReply,
    Session, ShardRange, WrittenAbove, WrittenReply, put_blocks,
};
use hci_engine_core::wire::{REPLY, kind};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};

const IMAGE: ImageId = ImageId([7; 16]);
const TAG: Tag = Tag { epoch: 3, sequence: 9 };
const IO: Io = Io { shard: 5, offset: 4096, length: 8192, epoch: 3, generation: 2, sequence: 9 };
const BLOCKS: [Block; 4] = [Block::Absent, Block::Zero, Block::Data(17), Block::Bad];

fn bytes_of(head: &impl Head) -> Vec<u8> {
    let mut out = BytesMut::new();
    head.put(&mut out);
    out.to_vec()
}

fn record() -> RecordHead {
    let (holder, digest) = ([1; 16], [2; 32]);
    RecordHead { image: IMAGE, epoch: 3, holder, generation: 2, digest, shard_bytes: 4 << 20 }
}

fn tagged() -> Vec<(Block, Tag)> {
    BLOCKS.into_iter().map(|block| (block, TAG)).collect()
}

/// A head of each kind that has one.
fn samples() -> Vec<(u8, Vec<u8>)> {
    let (node, gateway) = ("node1".to_owned(), "gateway1".to_owned());
    let (cluster, store, boot) = ([3; 16], [4; 16], [5; 16]);
    let hello = Hello { version_min: 1, version_max: 2, cluster, gateway, node: node.clone() };
    let (version, start_counter, flush_number) = (1, 5, 11);
    let hello_reply =
        HelloReply { version, node: node.clone(), store, start_counter, boot, flush_number };
    let peers = vec![(node.clone(), 4), ("node2".to_owned(), 8)];
    let (dirty, distrusted) = (6, true);
    let emptied = vec![3, 1];
    let peek_reply =
        PeekReply { record: record(), dirty, flush_number, distrusted, peers, emptied };
    let attach = Attach { image: IMAGE, epoch: 3, holder: [1; 16] };
    let reader = AttachReader { image: IMAGE, snapshot: SnapshotId { layer: 2, generation: 5 } };
    let snapshots = vec![SnapshotId { layer: 2, generation: 5 }; 2];
    let (layers, merging) = (vec![4, 3, 2, 1], vec![3, 1]);
    let stored = Record { head: record(), blank: true, layers, snapshots, merging };
    let proof = vec![(node, 12)];
    let flush = Flush { epoch: 3, generation: 2, clear_sequence: 9, proof };
    let entry = DirtyEntry { shard: 5, last: TAG, generation: 2, sticky: true };
    let dirty_reply = DirtyReply { entries: vec![entry, entry], more: true };
    let range = ShardRange { epoch: 3, layer: 1, shard: 5, first_block: 0, blocks: 4 };
    let blocks_reply = BlocksReply { generation: 2, blocks: tagged() };
    let indexes = vec![0, 1, 5, 9];
    let (layer, shard, shard_generation, blocks) = (1, 5, 2, tagged());
    let copy = Copy { epoch: 3, generation: 2, layer, shard, shard_generation, indexes, blocks };
    let since = [SnapshotId { layer: 2, generation: 5 }, SnapshotId { layer: 1, generation: 2 }];
    let changes = ChangesAsked { io: IO, since: since.into() };
    let run = ChangedRun { blocks: 2, held: Held::Data, depth: 1, changed: 2 };
    let touched = TouchedAsked {
        epoch: 3,
        since: Some(since[0]),
        first_shard: 1,
        end_shard: 9,
        generation: 2,
        place: 1,
        shard: 5,
    };
    let page = TouchedReply { generation: 2, next: Some((1, 5)), shards: vec![1, 5] };
    let above = WrittenAbove { epoch: 3, generation: 2, place: 1, shard: 5 };
    let written = WrittenReply { next: Some((1, 5)), shards: vec![1, 5] };
    let digest = [6; 32];
    let scrub = ScrubReply { metadata_rewritten: true, data_blocks: 4, digest, rotten: vec![1, 3] };
    let address = "127.0.0.1:7010".parse().expect("an address");
    let source = Source { node: "node2".to_owned(), address };
    let (epoch, generation, first_block, blocks) = (3, 2, 4, 9);
    let pull = Pull { epoch, generation, layer, shard, first_block, blocks, source };
    let image = IMAGE;
    let asked = PeerFetch { image, epoch, generation, layer, shard, first_block, blocks };
    let mut read_reply = BytesMut::new();
    put_blocks(&mut read_reply, BLOCKS.into_iter());
    let mut write = BytesMut::new();
    IO.put(&mut write);
    write.put_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
    vec![
        (kind::HELLO, bytes_of(&hello)),
        (kind::HELLO | REPLY, bytes_of(&hello_reply)),
        (kind::PEEK, bytes_of(&Peek(IMAGE))),
        (kind::PEEK | REPLY, bytes_of(&peek_reply)),
        (kind::RECORD, bytes_of(&stored)),
        (kind::ATTACH, bytes_of(&attach)),
        (kind::ATTACH_READER, bytes_of(&reader)),
        (kind::DETACH, bytes_of(&Session { epoch: 3 })),
        (kind::CONFIRM, bytes_of(&Session { epoch: 3 })),
        (kind::WRITE, write.to_vec()),
        (kind::ZERO, bytes_of(&IO)),
        (kind::READ, bytes_of(&IO)),
        (kind::READ | REPLY, read_reply.to_vec()),
        (kind::STATUS, bytes_of(&IO)),
        (kind::STATUS | REPLY, read_reply.to_vec()),
        (kind::READ_INTO, bytes_of(&IoInto { io: IO, at: 1 << 20 })),
        (kind::READ_INTO | REPLY, read_reply.to_vec()),
        (kind::FLUSH, bytes_of(&flush)),
        (kind::FLUSH | REPLY, bytes_of(&Number(13))),
        (kind::CLEAR, bytes_of(&flush)),
        (kind::DIRTY, bytes_of(&DirtyFrom { epoch: 3, from_shard: 5 })),
        (kind::DIRTY | REPLY, bytes_of(&dirty_reply)),
        (kind::SUMMARY, bytes_of(&range)),
        (kind::SUMMARY | REPLY, bytes_of(&blocks_reply)),
        (kind::FETCH, bytes_of(&range)),
        (kind::FETCH | REPLY, bytes_of(&blocks_reply)),
        (kind::COPY, bytes_of(&copy)),
        (kind::LEVEL, bytes_of(&Level { epoch: 3, shards: vec![5, 6] })),
        (kind::CHANGES, bytes_of(&changes)),
        (kind::CHANGES | REPLY, bytes_of(&ChangesReply { runs: vec![run] })),
        (kind::TOUCHED, bytes_of(&touched)),
        (kind::TOUCHED | REPLY, bytes_of(&page)),
        (kind::WRITTEN, bytes_of(&above)),
        (kind::WRITTEN | REPLY, bytes_of(&written)),
        (kind::SCRUB, bytes_of(&range)),
        (kind::SCRUB | REPLY, bytes_of(&scrub)),
        (kind::PULL, bytes_of(&pull)),
        (kind::PULL | REPLY, bytes_of(&Number(13))),
        (kind::PEER_FETCH, bytes_of(&asked)),
        (kind::PEER_FETCH | REPLY, bytes_of(&blocks_reply)),
    ]
}

#[test]
fn each_head_is_checked_and_none_is_forgotten() {
    let samples = samples();
    for (kind, head) in &samples {
        let taken = wire_heads::is_head(*kind, Bytes::copy_from_slice(head));
        assert_eq!(taken, Some(true), "kind {kind}");
    }
    let headless = [kind::PING, kind::MEMORY];
    let kinds = (kind::HELLO..=kind::PEER_FETCH)
        .chain(kind::WRITE..=kind::READ_INTO)
        .chain(kind::DIRTY..=kind::PULL)
        .chain(kind::CHANGES..=kind::TOUCHED)
        .filter(|kind| !headless.contains(kind));
    for kind in kinds {
        assert!(samples.iter().any(|(sample, _)| *sample == kind), "kind {kind}");
    }
    for kind in 0..=u8::MAX {
        let checked = wire_heads::is_head(kind, Bytes::new()).is_some();
        assert_eq!(checked, samples.iter().any(|(sample, _)| *sample == kind), "kind {kind}");
    }
}

/// Bytes with some changed, cut off or put in.
fn damaged(bytes: impl Strategy<Value = Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
    let byte = prop_oneof![any::<u8>(), select(vec![0, 1, 2, 3, 4, 0x7f, 0x80, 0xff])];
    let changed = vec((any::<Index>(), byte), 0..4);
    let put_in = prop_oneof![3 => Just(vec![]), 1 => vec(any::<u8>(), 0..9)];
    let cut_off = prop_oneof![3 => Just(false), 1 => Just(true)];
    (bytes, changed, any::<Index>(), put_in, cut_off).prop_map(
        |(mut bytes, changed, place, put_in, cut_off)| {
            for (at, byte) in changed {
                if !bytes.is_empty() {
                    let at = at.index(bytes.len());
                    bytes[at] = byte;
                }
            }
            let place = place.index(bytes.len() + 1);
            if cut_off {
                bytes.truncate(place);
            }
            bytes.splice(place..place, put_in);
            bytes
        },
    )
}

/// A kind, and what may be a head of it.
fn any_head() -> impl Strategy<Value = Vec<u8>> {
    let drawn = (select(samples()), vec(any::<u8>(), 0..150));
    let drawn = drawn.prop_map(|((kind, _), head)| [vec![kind], head].concat());
    let sample = select(samples()).prop_map(|(kind, head)| [vec![kind], head].concat());
    // A list that says how long it is, at any place, finds items behind it.
    let listed = (select(samples()), 0usize..60, 0u8..6, vec(any::<u8>(), 0..200)).prop_map(
        |((kind, head), place, count, items)| {
            let front = &head[..place.min(head.len())];
            [&[kind], front, &[count, 0, 0, 0], &items[..]].concat()
        },
    );
    prop_oneof![1 => drawn, 6 => damaged(sample), 1 => listed]
}

/// A frame by docs/wire.md whose checksum holds, whatever else is in it.
fn any_frame() -> impl Strategy<Value = Vec<u8>> {
    let status = prop_oneof![9 => 0u16..15, 1 => any::<u16>()];
    let payload = vec(any::<u8>(), 0..40);
    let numbers = (any::<u8>(), status, any::<u32>(), any::<u64>());
    (any_head(), numbers, payload).prop_map(|(head, (flags, status, channel, tag), payload)| {
        let (kind, head) = head.split_first().map_or((0, &[][..]), |(kind, head)| (*kind, head));
        let mut frame = BytesMut::new();
        frame.put_u32_le(head.len() as u32);
        frame.put_u32_le(payload.len() as u32);
        frame.put_u32_le(0);
        frame.put_u8(kind);
        frame.put_u8(flags);
        frame.put_u16_le(status);
        frame.put_u32_le(channel);
        frame.put_u64_le(tag);
        frame.put_slice(head);
        let checksum = crc32c(&frame);
        frame[8..12].copy_from_slice(&checksum.to_le_bytes());
        frame.put_slice(&payload);
        frame.to_vec()
    })
}

fn counted(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes(), text.as_bytes()].concat()
}

/// An option of a handshake, well formed but for what it says.
fn any_option() -> impl Strategy<Value = Vec<u8>> {
    let name = select(vec!["vms/a", "refused", "unknown", "", "vms/\u{e4}"]);
    let info = (name.clone(), vec(0u16..6, 0..4)).prop_map(|(name, kinds)| {
        let kinds: Vec<u8> = kinds.iter().flat_map(|kind| kind.to_be_bytes()).collect();
        [counted(name), ((kinds.len() / 2) as u16).to_be_bytes().to_vec(), kinds].concat()
    });
    let query = select(vec!["base:", "base:allocation", "qemu:", "qemu:allocation-depth", ""]);
    let meta = (name.clone(), vec(query, 0..4)).prop_map(|(name, queries)| {
        let count = (queries.len() as u32).to_be_bytes().to_vec();
        [counted(name), count, queries.into_iter().map(counted).collect::<Vec<_>>().concat()]
            .concat()
    });
    let bare = name.prop_map(|name| name.as_bytes().to_vec());
    let data = prop_oneof![
        3 => info,
        2 => meta,
        1 => bare,
        2 => Just(vec![]),
        1 => vec(any::<u8>(), 0..600),
    ];
    (0u32..14, data).prop_map(|(number, data)| {
        let length = data.len() as u32;
        [&IHAVEOPT.to_be_bytes()[..], &number.to_be_bytes(), &length.to_be_bytes(), &data].concat()
    })
}

fn any_handshake() -> impl Strategy<Value = Vec<u8>> {
    let flags = prop_oneof![9 => 0u32..4, 1 => any::<u32>()];
    (flags, vec(any_option(), 0..24))
        .prop_map(|(flags, options)| [flags.to_be_bytes().to_vec(), options.concat()].concat())
}

/// Requests with headers of one style; the target reads them in both.
fn any_requests() -> impl Strategy<Value = Vec<u8>> {
    let offset = prop_oneof![3 => 0u64..1 << 31, 1 => any::<u64>()];
    let length = prop_oneof![8 => 0u32..100, 1 => any::<u32>()];
    let header = (any::<bool>(), any::<u16>(), 0u16..10, any::<u64>(), offset, length);
    let request = header.prop_map(|(extended, flags, command, cookie, offset, length)| {
        let mut out = BytesMut::new();
        out.put_u32(if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC });
        out.put_u16(flags);
        out.put_u16(command);
        out.put_u64(cookie);
        out.put_u64(offset);
        if extended {
            out.put_u64(u64::from(length));
        } else {
            out.put_u32(length);
        }
        let has_payload = command == 1 || (extended && flags & 1 << 5 != 0);
        if has_payload {
            out.put_bytes(7, length.min(100) as usize);
        }
        out.to_vec()
    });
    vec(request, 0..8).prop_map(|requests| requests.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    #[test]
    fn heads_are_read_or_refused(head in any_head()) {
        wire_heads::hold(&head);
    }

    #[test]
    fn streams_of_frames_are_the_same_in_any_pieces(
        frames in vec(any_frame(), 0..4),
        garbage in prop_oneof![3 => Just(vec![]), 1 => vec(any::<u8>(), 0..80)],
    ) {
        wire_frames::hold(&[frames.concat(), garbage].concat());
    }

    #[test]
    fn damaged_streams_of_frames_are_the_same_in_any_pieces(
        bytes in damaged(vec(any_frame(), 1..4).prop_map(|frames| frames.concat())),
    ) {
        wire_frames::hold(&bytes);
    }

    #[test]
    fn handshakes_are_the_same_in_any_pieces(bytes in any_handshake()) {
        nbd_handshake::hold(&bytes);
    }

    #[test]
    fn damaged_handshakes_are_the_same_in_any_pieces(bytes in damaged(any_handshake())) {
        nbd_handshake::hold(&bytes);
    }

    #[test]
    fn requests_are_the_same_in_any_pieces(bytes in any_requests()) {
        nbd_requests::hold(&bytes);
    }

    #[test]
    fn damaged_requests_are_the_same_in_any_pieces(bytes in damaged(any_requests())) {
        nbd_requests::hold(&bytes);
    }
}
