//! A kind and any bytes as its head, past the checksum that keeps random bytes out: no panic, and what
//! is read can be written and read again.

use bytes::{BufMut, Bytes, BytesMut};
use hci_engine_core::content::Block;
use hci_engine_core::wire::changes::{ChangesAsked, ChangesReply, TouchedAsked, TouchedReply};
use hci_engine_core::wire::copies::{PeerFetch, Pull};
use hci_engine_core::wire::messages::{
    Attach, AttachReader, BlocksReply, Copy, DirtyFrom, DirtyReply, Flush, Head, Hello, HelloReply,
    Io, IoInto, Level, Number, Peek, PeekReply, Record, ScrubReply, Session, ShardRange,
    WrittenAbove, WrittenReply, put_blocks, take_blocks, take_write,
};
use hci_engine_core::wire::{FrameReader, HEAD_BYTES_MAX, Prefix, REPLY, encode, kind};
use std::fmt::Debug;

const REPLY_TO_HELLO: u8 = kind::HELLO | REPLY;
const REPLY_TO_PEEK: u8 = kind::PEEK | REPLY;
const REPLY_TO_READ: u8 = kind::READ | REPLY;
const REPLY_TO_READ_INTO: u8 = kind::READ_INTO | REPLY;
const REPLY_TO_STATUS: u8 = kind::STATUS | REPLY;
const REPLY_TO_FLUSH: u8 = kind::FLUSH | REPLY;
const REPLY_TO_DIRTY: u8 = kind::DIRTY | REPLY;
const REPLY_TO_SUMMARY: u8 = kind::SUMMARY | REPLY;
const REPLY_TO_FETCH: u8 = kind::FETCH | REPLY;
const REPLY_TO_WRITTEN: u8 = kind::WRITTEN | REPLY;
const REPLY_TO_CHANGES: u8 = kind::CHANGES | REPLY;
const REPLY_TO_TOUCHED: u8 = kind::TOUCHED | REPLY;
const REPLY_TO_SCRUB: u8 = kind::SCRUB | REPLY;
const REPLY_TO_PULL: u8 = kind::PULL | REPLY;
const REPLY_TO_PEER_FETCH: u8 = kind::PEER_FETCH | REPLY;

/// Whether the bytes are such a head.
fn takes<H: Head + PartialEq + Debug>(bytes: Bytes) -> bool {
    let Ok(head) = H::take(bytes) else { return false };
    let mut written = BytesMut::new();
    head.put(&mut written);
    assert_eq!(H::take(written.freeze()), Ok(head));
    true
}

fn takes_blocks(bytes: Bytes) -> bool {
    let mut blocks: Vec<Block> = Vec::new();
    if take_blocks(bytes, &mut blocks).is_err() {
        return false;
    }
    let (mut written, mut again) = (BytesMut::new(), Vec::new());
    put_blocks(&mut written, blocks.iter().copied());
    assert_eq!(take_blocks(written.freeze(), &mut again), Ok(()));
    assert_eq!(again, blocks);
    true
}

fn takes_write(bytes: Bytes) -> bool {
    let mut checksums = Vec::new();
    let Ok(io) = take_write(bytes.clone(), &mut checksums) else { return false };
    let mut written = BytesMut::new();
    io.put(&mut written);
    checksums.iter().for_each(|checksum| written.put_u64_le(*checksum));
    assert_eq!(written.freeze(), bytes);
    true
}

/// Whether the bytes are a head of this kind; none where frames of it have no head.
pub fn is_head(kind: u8, head: Bytes) -> Option<bool> {
    Some(match kind {
        kind::HELLO => takes::<Hello>(head),
        REPLY_TO_HELLO => takes::<HelloReply>(head),
        kind::PEEK => takes::<Peek>(head),
        REPLY_TO_PEEK => takes::<PeekReply>(head),
        kind::RECORD => takes::<Record>(head),
        kind::ATTACH => takes::<Attach>(head),
        kind::ATTACH_READER => takes::<AttachReader>(head),
        kind::DETACH | kind::CONFIRM => takes::<Session>(head),
        kind::WRITE => takes_write(head),
        kind::ZERO | kind::READ | kind::STATUS => takes::<Io>(head),
        kind::READ_INTO => takes::<IoInto>(head),
        REPLY_TO_READ | REPLY_TO_READ_INTO | REPLY_TO_STATUS => takes_blocks(head),
        kind::FLUSH | kind::CLEAR => takes::<Flush>(head),
        REPLY_TO_FLUSH | REPLY_TO_PULL => takes::<Number>(head),
        kind::DIRTY => takes::<DirtyFrom>(head),
        REPLY_TO_DIRTY => takes::<DirtyReply>(head),
        kind::SUMMARY | kind::FETCH | kind::SCRUB => takes::<ShardRange>(head),
        REPLY_TO_SUMMARY | REPLY_TO_FETCH | REPLY_TO_PEER_FETCH => takes::<BlocksReply>(head),
        kind::PULL => takes::<Pull>(head),
        kind::PEER_FETCH => takes::<PeerFetch>(head),
        REPLY_TO_SCRUB => takes::<ScrubReply>(head),
        kind::COPY => takes::<Copy>(head),
        kind::LEVEL => takes::<Level>(head),
        kind::WRITTEN => takes::<WrittenAbove>(head),
        REPLY_TO_WRITTEN => takes::<WrittenReply>(head),
        kind::CHANGES => takes::<ChangesAsked>(head),
        REPLY_TO_CHANGES => takes::<ChangesReply>(head),
        kind::TOUCHED => takes::<TouchedAsked>(head),
        REPLY_TO_TOUCHED => takes::<TouchedReply>(head),
        _ => return None,
    })
}

/// Panics where what this module promises does not hold.
pub fn hold(bytes: &[u8]) {
    let Some((kind, head)) = bytes.split_first() else { return };
    let head = &head[..head.len().min(HEAD_BYTES_MAX)];
    let mut stream = BytesMut::new();
    encode(&mut stream, Prefix::request(*kind, 0, 1, 2), 0, |out| out.extend_from_slice(head));
    match FrameReader::next(&mut stream) {
        Ok(Some(frame)) => {
            assert_eq!((frame.kind, &frame.head[..]), (*kind, head));
            is_head(frame.kind, frame.head);
        }
        other => panic!("a frame that was just written reads as {other:?}"),
    }
}
