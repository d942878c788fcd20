//! Replies of the transmission phase, written into a [`Sink`]: headers as bytes, data as the
//! `Bytes` that the store gave, zeroes as a length.
//!
//! With structured replies reads and block status come in chunks, and so does every error, for the
//! sake of its message. Success without data is a simple reply there too, as the section
//! «Structured reply chunk message» allows. With extended headers everything is a chunk.

use super::constants::context::STATE_DIRTY;
use super::constants::{EXTENDED_REPLY_MAGIC, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk};
use super::{Errno, ReplyStyle, Request, Session, shortened};
use crate::content::Run;
use crate::io::Sink;
use bytes::BufMut;

/// Which request a reply is for. `offset` is the request's, and goes back with extended headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addressee {
    pub cookie: u64,
    pub offset: u64,
}

/// A piece of the answer to a block status request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    pub length: u64,
    /// Those of `base:allocation`.
    pub flags: u32,
    /// What `qemu:allocation-depth` says.
    pub depth: u32,
    /// It was written since so many of the session's snapshots: the oldest ones.
    pub changed: u8,
}

/// Says that the request without data succeeded: write, flush, trim, zeroes, cache.
pub fn done(sink: &mut impl Sink, style: ReplyStyle, to: Addressee) {
    match style {
        ReplyStyle::Simple | ReplyStyle::Structured => simple_header(sink, to.cookie, 0),
        ReplyStyle::Extended => nothing(sink, style, to),
    }
}

/// A reply in chunks that has nothing to say.
fn nothing(sink: &mut impl Sink, style: ReplyStyle, to: Addressee) {
    chunk_header(sink, style, to, chunk::FLAG_DONE, chunk::NONE, 0, &[]);
}

/// Says that the request failed. `message` is shown to people where the style has room for it.
pub fn error(sink: &mut impl Sink, style: ReplyStyle, to: Addressee, errno: Errno, message: &str) {
    match style {
        ReplyStyle::Simple => simple_header(sink, to.cookie, errno.code()),
        ReplyStyle::Structured | ReplyStyle::Extended => {
            let message = shortened(message).as_bytes();
            let length = 6 + message.len() as u32;
            let mut fields = [0; 6];
            let mut field = &mut fields[..];
            field.put_u32(errno.code());
            field.put_u16(message.len() as u16);
            chunk_header(sink, style, to, chunk::FLAG_DONE, chunk::ERROR, length, &fields);
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
    assert_eq!(length, request.length, "the runs of a read cover its range");
    match style {
        ReplyStyle::Simple => {
            simple_header(sink, request.cookie, 0);
            put_runs(sink, runs);
        }
        _ if length == 0 => nothing(sink, style, request.addressee()),
        _ => read_chunks(sink, style, request, runs),
    }
}

/// Sections `NBD_REPLY_TYPE_OFFSET_DATA` and `NBD_REPLY_TYPE_OFFSET_HOLE`. With DF one chunk: holes
/// are sent as zeroes, unless there is nothing but a hole.
fn read_chunks(sink: &mut impl Sink, style: ReplyStyle, request: &Request, mut runs: &[Run]) {
    let end = request.offset + request.length;
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
        let to = request.addressee();
        if hole {
            put_hole(sink, style, to, flags, offset, length as u32);
        } else {
            put_data(sink, style, to, flags, offset, length as u32, group);
        }
        offset += length;
    }
}

/// The chunk of `length` bytes that read as zeroes, from `offset` of the export on.
fn put_hole(
    sink: &mut impl Sink,
    style: ReplyStyle,
    to: Addressee,
    flags: u16,
    offset: u64,
    length: u32,
) {
    let mut fields = [0; 12];
    let mut field = &mut fields[..];
    field.put_u64(offset);
    field.put_u32(length);
    chunk_header(sink, style, to, flags, chunk::OFFSET_HOLE, 12, &fields);
}

/// The chunk of `length` bytes of content.
fn put_data(
    sink: &mut impl Sink,
    style: ReplyStyle,
    to: Addressee,
    flags: u16,
    offset: u64,
    length: u32,
    runs: &[Run],
) {
    let fields = offset.to_be_bytes();
    chunk_header(sink, style, to, flags, chunk::OFFSET_DATA, 8 + length, &fields);
    put_runs(sink, runs);
}

/// Answers a block status request, a chunk for each context. Section `NBD_REPLY_TYPE_BLOCK_STATUS`.
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
    let most = if request.flags.one_extent() { 1 } else { session.limits.max_extents };
    let contexts = &session.contexts;
    assert!(!contexts.is_empty(), "block status is answered only where a context was negotiated");
    let mut left = contexts.count();
    let mut put = |id: u32, status: &dyn Fn(&Extent) -> u32| {
        left -= 1;
        let found = extents.iter().map(|extent| (extent.length, status(extent)));
        let found = joined(found, request.length, most);
        put_extents(sink, session.replies, request, id, left == 0, found);
    };
    if let Some(id) = contexts.allocation {
        put(id, &|extent| extent.flags);
    }
    if let Some(id) = contexts.depth {
        put(id, &|extent| extent.depth);
    }
    for (at, id) in contexts.dirty.iter().enumerate() {
        let unchanged = |extent: &Extent| contexts.dirty.len() - usize::from(extent.changed);
        put(*id, &|extent| if at >= unchanged(extent) { STATE_DIRTY } else { 0 });
    }
}

/// What one context says. With extended headers lengths and flags have 64 bits each.
fn put_extents(
    sink: &mut impl Sink,
    style: ReplyStyle,
    request: &Request,
    context: u32,
    last: bool,
    extents: Vec<(u64, u32)>,
) {
    assert!(!extents.is_empty(), "a block status describes at least one byte");
    let (to, count) = (request.addressee(), extents.len() as u32);
    let flags = if last { chunk::FLAG_DONE } else { 0 };
    if style == ReplyStyle::Extended {
        let mut fields = [0; 8];
        fields[..4].copy_from_slice(&context.to_be_bytes());
        fields[4..].copy_from_slice(&count.to_be_bytes());
        let length = 8 + 16 * count;
        chunk_header(sink, style, to, flags, chunk::BLOCK_STATUS_EXT, length, &fields);
    } else {
        let fields = context.to_be_bytes();
        chunk_header(sink, style, to, flags, chunk::BLOCK_STATUS, 4 + 8 * count, &fields);
    }
    for (length, status) in extents {
        if style == ReplyStyle::Extended {
            sink.bytes(&(u128::from(length) << 64 | u128::from(status)).to_be_bytes());
        } else {
            // The request's own length has 32 bits, and no extent reaches past it.
            sink.bytes(&(length << 32 | u64::from(status)).to_be_bytes());
        }
    }
}

fn joined(extents: impl Iterator<Item = (u64, u32)>, wanted: u64, most: usize) -> Vec<(u64, u32)> {
    let mut joined: Vec<(u64, u32)> = Vec::new();
    let mut left = wanted;
    for (length, status) in extents {
        let length = length.min(left);
        if length == 0 {
            continue;
        }
        let full = joined.len() == most;
        match joined.last_mut() {
            Some(last) if last.1 == status => last.0 += length,
            _ if full => break,
            _ => joined.push((length, status)),
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

/// Sections «Structured reply chunk message» and «Extended reply chunk message». `length` counts
/// `fields` and what follows them.
fn chunk_header(
    sink: &mut impl Sink,
    style: ReplyStyle,
    to: Addressee,
    flags: u16,
    kind: u16,
    length: u32,
    fields: &[u8],
) {
    let mut header = [0; 32];
    let mut field = &mut header[..];
    if style == ReplyStyle::Extended {
        field.put_u32(EXTENDED_REPLY_MAGIC);
        field.put_u16(flags);
        field.put_u16(kind);
        field.put_u64(to.cookie);
        field.put_u64(to.offset);
        field.put_u64(u64::from(length));
    } else {
        field.put_u32(STRUCTURED_REPLY_MAGIC);
        field.put_u16(flags);
        field.put_u16(kind);
        field.put_u64(to.cookie);
        field.put_u32(length);
    }
    let left = field.len();
    let end = header.len() - left;
    sink.bytes(&header[..end]);
    sink.bytes(fields);
}
