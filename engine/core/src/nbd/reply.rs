//! Replies of the transmission phase, written into a [`Sink`]: headers as bytes, data as the
//! `Bytes` that the store gave, zeroes as a length.
//!
//! With structured replies reads and block status come in chunks, and so does every error, for the
//! sake of its message. Success without data is a simple reply in both styles, as the section
//! «Structured reply chunk message» allows.

use super::constants::{SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk};
use super::{Errno, ReplyStyle, Request, Session, shortened};
use crate::content::Run;
use crate::io::Sink;
use bytes::BufMut;

/// A piece of the answer to a block status request; `flags` are those of `base:allocation`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    pub length: u64,
    pub flags: u32,
}

/// Says that the request without data succeeded: write, flush, trim, zeroes, cache.
pub fn done(sink: &mut impl Sink, cookie: u64) {
    simple_header(sink, cookie, 0);
}

/// Says that the request failed. `message` is shown to people where the style has room for it.
pub fn error(sink: &mut impl Sink, style: ReplyStyle, cookie: u64, errno: Errno, message: &str) {
    match style {
        ReplyStyle::Simple => simple_header(sink, cookie, errno.code()),
        ReplyStyle::Structured => {
            let message = shortened(message).as_bytes();
            let length = 6 + message.len() as u32;
            let mut fields = [0; 6];
            let mut field = &mut fields[..];
            field.put_u32(errno.code());
            field.put_u16(message.len() as u16);
            chunk_header(sink, cookie, chunk::FLAG_DONE, chunk::ERROR, length, &fields);
            sink.bytes(message);
        }
    }
}

/// Answers a read with what was found. Neighbouring runs of one kind become one chunk.
///
/// `runs` cover exactly the request's range, in order; anything else is a mistake of the caller,
/// and would end in wrong bytes at the client, so it panics.
pub fn read(sink: &mut impl Sink, style: ReplyStyle, request: &Request, runs: &[Run]) {
    let length: u64 = runs.iter().map(Run::length).sum();
    assert_eq!(length, u64::from(request.length), "the runs of a read cover its range");
    match style {
        ReplyStyle::Simple => {
            simple_header(sink, request.cookie, 0);
            put_runs(sink, runs);
        }
        ReplyStyle::Structured if length == 0 => {
            chunk_header(sink, request.cookie, chunk::FLAG_DONE, chunk::NONE, 0, &[]);
        }
        ReplyStyle::Structured => read_chunks(sink, request, runs),
    }
}

/// Sections `NBD_REPLY_TYPE_OFFSET_DATA` and `NBD_REPLY_TYPE_OFFSET_HOLE`. With DF one chunk: holes
/// are sent as zeroes, unless there is nothing but a hole.
fn read_chunks(sink: &mut impl Sink, request: &Request, mut runs: &[Run]) {
    let end = request.offset + u64::from(request.length);
    let only_holes = runs.iter().all(|run| run.is_hole() || run.length() == 0);
    let in_one = request.flags.dont_fragment() && !only_holes;
    let mut offset = request.offset;
    while let Some(first) = runs.first() {
        if first.length() == 0 {
            runs = &runs[1..];
            continue;
        }
        let hole = first.is_hole() && !in_one;
        let belongs = |run: &&Run| in_one || run.is_hole() == hole || run.length() == 0;
        let count = runs.iter().take_while(belongs).count();
        let (group, rest) = runs.split_at(count);
        runs = rest;
        let length: u64 = group.iter().map(Run::length).sum();
        let flags = if offset + length == end { chunk::FLAG_DONE } else { 0 };
        put_chunk(sink, request.cookie, flags, offset, length as u32, hole, group);
        offset += length;
    }
}

/// One content chunk: `length` bytes of the export from `offset` on.
fn put_chunk(
    sink: &mut impl Sink,
    cookie: u64,
    flags: u16,
    offset: u64,
    length: u32,
    hole: bool,
    runs: &[Run],
) {
    let mut fields = [0; 12];
    let mut field = &mut fields[..];
    field.put_u64(offset);
    field.put_u32(length);
    if hole {
        chunk_header(sink, cookie, flags, chunk::OFFSET_HOLE, 12, &fields);
    } else {
        chunk_header(sink, cookie, flags, chunk::OFFSET_DATA, 8 + length, &fields[..8]);
        put_runs(sink, runs);
    }
}

/// Answers a block status request for `base:allocation`. Section `NBD_REPLY_TYPE_BLOCK_STATUS`.
///
/// `extents` begin at the request's offset. Neighbours with equal flags are joined, what reaches
/// past the request is cut off, and at most `max_extents` are sent (one, where the client wants
/// one): the client asks again from where the reply ended. At least one byte must be described.
pub fn block_status(
    sink: &mut impl Sink,
    session: &Session,
    request: &Request,
    extents: &[Extent],
) {
    let Some(context) = session.base_allocation else {
        panic!("block status is answered only where its context was negotiated");
    };
    let most = if request.flags.one_extent() { 1 } else { session.limits.max_extents };
    let joined = joined_extents(extents, request.length, most);
    assert!(!joined.is_empty(), "a block status describes at least one byte");
    let length = 4 + 8 * joined.len() as u32;
    let fields = context.to_be_bytes();
    chunk_header(sink, request.cookie, chunk::FLAG_DONE, chunk::BLOCK_STATUS, length, &fields);
    for (length, flags) in joined {
        sink.bytes(&(u64::from(length) << 32 | u64::from(flags)).to_be_bytes());
    }
}

fn joined_extents(extents: &[Extent], wanted: u32, most: usize) -> Vec<(u32, u32)> {
    let mut joined: Vec<(u32, u32)> = Vec::with_capacity(extents.len().min(most));
    let mut left = wanted;
    for extent in extents {
        let length = extent.length.min(u64::from(left)) as u32;
        if length == 0 {
            continue;
        }
        let full = joined.len() == most;
        match joined.last_mut() {
            Some(last) if last.1 == extent.flags => last.0 += length,
            _ if full => break,
            _ => joined.push((length, extent.flags)),
        }
        left -= length;
    }
    joined
}

fn put_runs(sink: &mut impl Sink, runs: &[Run]) {
    for run in runs {
        match run {
            Run::Data(data) => sink.data(data.clone()),
            Run::Hole(length) => sink.zeroes(*length as usize),
        }
    }
}

/// Section «Simple reply message».
fn simple_header(sink: &mut impl Sink, cookie: u64, errno: u32) {
    let mut header = [0; 16];
    let mut field = &mut header[..];
    field.put_u32(SIMPLE_REPLY_MAGIC);
    field.put_u32(errno);
    field.put_u64(cookie);
    sink.bytes(&header);
}

/// Section «Structured reply chunk message». `length` counts `fields` and what follows them.
fn chunk_header(
    sink: &mut impl Sink,
    cookie: u64,
    flags: u16,
    kind: u16,
    length: u32,
    fields: &[u8],
) {
    let mut header = [0; 20];
    let mut field = &mut header[..];
    field.put_u32(STRUCTURED_REPLY_MAGIC);
    field.put_u16(flags);
    field.put_u16(kind);
    field.put_u64(cookie);
    field.put_u32(length);
    sink.bytes(&header);
    sink.bytes(fields);
}
