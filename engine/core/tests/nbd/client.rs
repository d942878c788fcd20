//! What a client sends, and a driver that plays a whole handshake.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use hci_engine_core::geometry::SnapshotId;
use hci_engine_core::nbd::constants::{
    EXTENDED_REQUEST_MAGIC, IHAVEOPT, OPTION_REPLY_MAGIC, REQUEST_MAGIC,
};
use hci_engine_core::nbd::{
    Answer, Contexts, ExportInfo, Handshake, Limits, ProtocolError, Query, ReplyStyle, Session,
    Step,
};

pub fn disk() -> ExportInfo {
    ExportInfo {
        name: "vms/a".to_owned(),
        size_bytes: 1 << 20,
        read_only: false,
        multi_conn: false,
        description: String::new(),
    }
}

pub fn session(replies: ReplyStyle) -> Session {
    let allocation = (replies != ReplyStyle::Simple).then_some(1);
    let contexts = Contexts { allocation, depth: None, ..Contexts::default() };
    Session { export: disk(), limits: Limits::default(), replies, contexts, no_zeroes: true }
}

/// One option with its header.
pub fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.put_u64(IHAVEOPT);
    bytes.put_u32(number);
    bytes.put_u32(data.len() as u32);
    bytes.put_slice(data);
    bytes
}

/// A string after its length.
pub fn counted(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.put_u32(text.len() as u32);
    bytes.put_slice(text.as_bytes());
    bytes
}

/// Data of INFO and GO.
pub fn info_data(name: &str, kinds: &[u16]) -> Vec<u8> {
    let mut bytes = counted(name);
    bytes.put_u16(kinds.len() as u16);
    kinds.iter().for_each(|kind| bytes.put_u16(*kind));
    bytes
}

/// Data of LIST_META_CONTEXT and SET_META_CONTEXT.
pub fn meta_data(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut bytes = counted(name);
    bytes.put_u32(queries.len() as u32);
    queries.iter().for_each(|query| bytes.extend(counted(query)));
    bytes
}

/// One request's header and payload.
pub fn request(
    flags: u16,
    number: u16,
    cookie: u64,
    offset: u64,
    length: u32,
    payload: &[u8],
) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.put_u32(REQUEST_MAGIC);
    bytes.put_u16(flags);
    bytes.put_u16(number);
    bytes.put_u64(cookie);
    bytes.put_u64(offset);
    bytes.put_u32(length);
    bytes.put_slice(payload);
    bytes
}

/// The same with extended headers; `flags` say whether the length is that of the payload.
pub fn extended_request(
    flags: u16,
    number: u16,
    cookie: u64,
    offset: u64,
    length: u64,
    payload: &[u8],
) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.put_u32(EXTENDED_REQUEST_MAGIC);
    bytes.put_u16(flags);
    bytes.put_u16(number);
    bytes.put_u64(cookie);
    bytes.put_u64(offset);
    bytes.put_u64(length);
    bytes.put_slice(payload);
    bytes
}

/// A catalog with one image, `vms/a`, and one that is open elsewhere, `vms/busy`.
pub fn catalog(query: &Query) -> Answer {
    match query {
        Query::List => Answer::Names(vec!["vms/a".to_owned(), "vms/busy".to_owned()]),
        Query::Snapshots { name } if name == "vms/a" => Answer::Snapshots(vec![
            ("monday".to_owned(), SnapshotId { layer: 1, generation: 2 }),
            ("tuesday".to_owned(), SnapshotId { layer: 2, generation: 5 }),
        ]),
        Query::Snapshots { name } => Answer::Unknown(format!("there is no image {name}")),
        Query::Info { name } | Query::Go { name } | Query::ExportName { name } => match &**name {
            "vms/a" => Answer::Export(disk()),
            "vms/busy" => Answer::Refused("vms/busy is open on gateway2".to_owned()),
            _ => Answer::Unknown(format!("there is no image {name}")),
        },
    }
}

/// How a handshake went.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    pub out: Vec<u8>,
    pub queries: Vec<Query>,
    pub end: Result<Step, ProtocolError>,
    /// What was not consumed.
    pub rest: Vec<u8>,
    /// The most input that was kept waiting between two pieces.
    pub kept_bytes: usize,
}

/// Plays the pieces in order, the first of which begins with the client's flags; stops at the end
/// of the handshake, but keeps collecting the input.
pub fn play(limits: &Limits, pieces: &[&[u8]]) -> Outcome {
    let mut handshake = Handshake::new(limits);
    let (mut input, mut out) = (BytesMut::new(), BytesMut::new());
    handshake.greeting(&mut BytesMut::new());
    let (mut queries, mut end, mut kept_bytes) = (Vec::new(), Ok(Step::NeedInput), 0);
    for piece in pieces {
        input.extend_from_slice(piece);
        while end == Ok(Step::NeedInput) {
            end = handshake.receive(&mut input, &mut out);
            let Ok(Step::Ask(query)) = &end else { break };
            let answer = catalog(query);
            queries.push(query.clone());
            end = handshake.answer(answer, &mut out);
        }
        if end == Ok(Step::NeedInput) {
            kept_bytes = kept_bytes.max(input.len());
        }
    }
    Outcome { out: out.to_vec(), queries, end, rest: input.to_vec(), kept_bytes }
}

/// Plays the options after the flags of a fixed newstyle client.
pub fn play_options(options: &[Vec<u8>]) -> Outcome {
    let input = [&[0, 0, 0, 3], &options.concat()[..]].concat();
    play(&Limits::default(), &[&input])
}

/// One reply to an option: (option, type, data).
pub type OptionReply = (u32, u32, Vec<u8>);

/// Cuts what the server said into replies; panics on what is none.
pub fn option_replies(out: &[u8]) -> Vec<OptionReply> {
    let mut left = Bytes::copy_from_slice(out);
    let mut replies = Vec::new();
    while !left.is_empty() {
        assert_eq!(left.try_get_u64(), Ok(OPTION_REPLY_MAGIC));
        let mut number = || left.try_get_u32().expect("a reply has a header");
        let (option, kind, length) = (number(), number(), number());
        replies.push((option, kind, left.split_to(length as usize).to_vec()));
    }
    replies
}
