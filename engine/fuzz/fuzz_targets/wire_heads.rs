//! A kind and any bytes as its head, past the checksum that keeps random bytes out: no panic, and what
//! is read can be written and read again.
#![no_main]

use bytes::{Bytes, BytesMut};
use hci_engine_core::content::Block;
use hci_engine_core::wire::messages::{
    Attach, BlocksReply, Copy, DirtyFrom, DirtyReply, Flush, Head, Hello, HelloReply, Io, Level,
    Number, Peek, PeekReply, RecordHead, Session, ShardRange, WrittenAbove, WrittenReply,
    put_blocks, take_blocks, take_write,
};
use hci_engine_core::wire::{Frame, FrameReader, HEAD_BYTES_MAX, Prefix, REPLY, encode, kind};
use libfuzzer_sys::fuzz_target;
use std::fmt::Debug;

const REPLY_TO_HELLO: u8 = kind::HELLO | REPLY;
const REPLY_TO_PEEK: u8 = kind::PEEK | REPLY;
const REPLY_TO_READ: u8 = kind::READ | REPLY;
const REPLY_TO_STATUS: u8 = kind::STATUS | REPLY;
const REPLY_TO_FLUSH: u8 = kind::FLUSH | REPLY;
const REPLY_TO_DIRTY: u8 = kind::DIRTY | REPLY;
const REPLY_TO_SUMMARY: u8 = kind::SUMMARY | REPLY;
const REPLY_TO_FETCH: u8 = kind::FETCH | REPLY;

fn check<H: Head + PartialEq + Debug>(bytes: Bytes) {
    let Ok(head) = H::take(bytes) else { return };
    let mut written = BytesMut::new();
    head.put(&mut written);
    assert_eq!(H::take(written.freeze()), Ok(head));
}

fn check_blocks(bytes: Bytes) {
    let mut blocks: Vec<Block> = Vec::new();
    if take_blocks(bytes, &mut blocks).is_err() {
        return;
    }
    let (mut written, mut again) = (BytesMut::new(), Vec::new());
    put_blocks(&mut written, blocks.iter().copied());
    assert_eq!(take_blocks(written.freeze(), &mut again), Ok(()));
    assert_eq!(again, blocks);
}

fn check_head(frame: Frame) {
    let head = frame.head;
    match frame.kind {
        kind::HELLO => check::<Hello>(head),
        REPLY_TO_HELLO => check::<HelloReply>(head),
        kind::PEEK => check::<Peek>(head),
        REPLY_TO_PEEK => check::<PeekReply>(head),
        kind::RECORD => check::<RecordHead>(head),
        kind::ATTACH => check::<Attach>(head),
        kind::DETACH | kind::CONFIRM => check::<Session>(head),
        kind::WRITE => {
            let _ = take_write(head, &mut Vec::new());
        }
        kind::ZERO | kind::READ | kind::STATUS => check::<Io>(head),
        REPLY_TO_READ | REPLY_TO_STATUS => check_blocks(head),
        kind::FLUSH | kind::CLEAR => check::<Flush>(head),
        REPLY_TO_FLUSH => check::<Number>(head),
        kind::DIRTY => check::<DirtyFrom>(head),
        REPLY_TO_DIRTY => check::<DirtyReply>(head),
        kind::SUMMARY | kind::FETCH => check::<ShardRange>(head),
        REPLY_TO_SUMMARY | REPLY_TO_FETCH => check::<BlocksReply>(head),
        kind::COPY => check::<Copy>(head),
        kind::LEVEL => check::<Level>(head),
        kind::WRITTEN => check::<WrittenAbove>(head),
        _ => {}
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((kind, head)) = bytes.split_first() else { return };
    let head = &head[..head.len().min(HEAD_BYTES_MAX)];
    let mut stream = BytesMut::new();
    encode(&mut stream, Prefix::request(*kind, 0, 1, 2), 0, |out| out.extend_from_slice(head));
    match FrameReader::next(&mut stream) {
        Ok(Some(frame)) => {
            assert_eq!((frame.kind, &frame.head[..]), (*kind, head));
            check_head(frame);
        }
        other => panic!("a frame that was just written reads as {other:?}"),
    }
});
