//! Server side of the fixed newstyle handshake for one connection.
//!
//! | state | on | goes to |
//! | --- | --- | --- |
//! | `Greeting` | [`Handshake::greeting`] | `ClientFlags` |
//! | `ClientFlags` | four bytes | `Options` |
//! | `Options` | an option that only this connection concerns | `Options`, answered |
//! | `Options` | LIST, INFO, GO, EXPORT_NAME, contexts that compare with snapshots | `Waiting`, a [`Query`] goes out |
//! | `Options` | an option that is too long | `Draining` |
//! | `Draining` | its last byte | `Options`, answered ERR_TOO_BIG or ERR_UNSUP |
//! | `Waiting` | [`Handshake::answer`] | `Options`, or `Ended` with a [`Session`] |
//! | `Options` | STARTTLS where there is TLS | `Options`, all that was negotiated forgotten |
//! | any | ABORT, a bad EXPORT_NAME, a [`ProtocolError`] | `Ended` |
//!
//! Only GO and EXPORT_NAME may open an export. Metadata contexts hold only if the export that is opened was
//! asked for by the same name. Those that need nothing of the export are accepted for any name, so it is
//! looked up only for those that name snapshots.

use super::constants::{
    EXPORT_NAME_ZEROES, IHAVEOPT, MAX_STRING_BYTES, NBDMAGIC, OPTION_HEADER_BYTES,
    OPTION_REPLY_MAGIC, client_flags, context, handshake_flags, info, option, option_reply,
};
use super::options::{self, Malformed, MetaQueries, Wanted};
use super::{
    Contexts, ExportInfo, Limits, ProtocolError, ReplyStyle, Session, TlsMode, shortened,
    transmission_flags,
};
use crate::geometry::SnapshotId;
use crate::wire::changes::SINCE_MAX;
use bytes::{Buf, BufMut, Bytes, BytesMut};

/// What the caller does next.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Receive more and call [`Handshake::receive`] again.
    NeedInput,
    /// Send the output, then go on under TLS. Nothing that came before may be taken for what comes then.
    StartTls,
    /// Find the answer and give it to [`Handshake::answer`].
    Ask(Query),
    /// The handshake is over; what is left of the input belongs to the transmission phase.
    Transmission(Session),
    /// Close the connection once the output is sent.
    Close,
}

/// A question that only the caller can answer. LIST and INFO must not open anything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Query {
    List,
    Info {
        name: String,
    },
    Go {
        name: String,
    },
    ExportName {
        name: String,
    },
    /// The snapshots that what it holds can be compared with.
    Snapshots {
        name: String,
    },
}

/// The answer to a [`Query`]: `Names` to `List`, `Snapshots` to `Snapshots`, `Export` to the others, the rest to
/// any of them.
/// Messages are shown to the person at the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Names(Vec<String>),
    Export(ExportInfo),
    Snapshots(Vec<(String, SnapshotId)>),
    /// No export has this name.
    Unknown(String),
    /// The export exists and may not be opened, e.g. because it is open elsewhere.
    Refused(String),
    /// It cannot be told or done now; the client may try again later.
    Unavailable(String),
}

#[derive(Debug)]
enum State {
    Greeting,
    ClientFlags,
    Options,
    Draining { option: u32, left: u32 },
    Waiting(Waiting),
    Ended,
}

/// The query that was asked, as needed to use its answer.
#[derive(Debug)]
enum Waiting {
    List,
    Export { option: u32, name: String, wanted: Wanted },
    Contexts { option: u32, queries: MetaQueries },
}

/// The handshake of one connection.
#[derive(Debug)]
pub struct Handshake {
    limits: Limits,
    tls: TlsMode,
    secured: bool,
    state: State,
    no_zeroes: bool,
    replies: ReplyStyle,
    /// What the last SET_META_CONTEXT selected, and for which name.
    contexts: Option<(String, Contexts)>,
    options_seen: u32,
}

impl Handshake {
    pub fn new(limits: &Limits) -> Self {
        Handshake {
            limits: *limits,
            tls: TlsMode::Off,
            secured: false,
            state: State::Greeting,
            no_zeroes: false,
            replies: ReplyStyle::Simple,
            contexts: None,
            options_seen: 0,
        }
    }

    /// For a listener with TLS.
    pub fn with_tls(self, tls: TlsMode) -> Self {
        Handshake { tls, ..self }
    }

    /// Whether the client goes on under TLS.
    pub fn is_secured(&self) -> bool {
        self.secured
    }

    /// Writes what the server says first. Called once, before anything is received.
    pub fn greeting(&mut self, out: &mut BytesMut) {
        assert!(matches!(self.state, State::Greeting), "the greeting is sent once");
        out.put_u64(NBDMAGIC);
        out.put_u64(IHAVEOPT);
        out.put_u16(handshake_flags::FIXED_NEWSTYLE | handshake_flags::NO_ZEROES);
        self.state = State::ClientFlags;
    }

    /// Consumes what it can of `input` and answers into `out`.
    ///
    /// While a query waits for its answer nothing is consumed. Input grows no further than
    /// `max_option_bytes` and a header, if the caller stops receiving when this asks for no more.
    pub fn receive(
        &mut self,
        input: &mut BytesMut,
        out: &mut BytesMut,
    ) -> Result<Step, ProtocolError> {
        loop {
            match self.state {
                State::Greeting => panic!("the greeting goes before the first input"),
                State::ClientFlags => {
                    if input.len() < 4 {
                        return Ok(Step::NeedInput);
                    }
                    self.client_flags(input.get_u32())?;
                }
                State::Options => match self.next_option(input, out)? {
                    Some(step) => return Ok(step),
                    None => continue,
                },
                State::Draining { option, left } => {
                    let now = usize::try_from(left).unwrap_or(usize::MAX).min(input.len());
                    input.advance(now);
                    let left = left - now as u32;
                    if left > 0 {
                        self.state = State::Draining { option, left };
                        return Ok(Step::NeedInput);
                    }
                    self.state = State::Options;
                    self.refuse_drained(option, out);
                }
                State::Waiting(_) => return Ok(Step::NeedInput),
                State::Ended => return Ok(Step::Close),
            }
        }
    }

    /// Answers the query that [`Handshake::receive`] returned; afterwards `receive` goes on, also
    /// with input that came meanwhile. Send `out` before that: a client may ask for long lists
    /// without reading them. After a failed EXPORT_NAME the connection ends, as that
    /// option has no error reply.
    pub fn answer(&mut self, answer: Answer, out: &mut BytesMut) -> Result<Step, ProtocolError> {
        let State::Waiting(waiting) = std::mem::replace(&mut self.state, State::Options) else {
            panic!("an answer needs a query");
        };
        match waiting {
            Waiting::List => self.answer_list(answer, out),
            Waiting::Contexts { option, queries } => match answer {
                Answer::Snapshots(known) => self.tell_contexts(option, queries, known, out),
                other => refuse_with(out, option, other),
            },
            Waiting::Export { option: option::EXPORT_NAME, name, .. } => {
                return Ok(self.answer_export_name(answer, &name, out));
            }
            Waiting::Export { option, name, wanted } => match answer {
                Answer::Export(export) if self.block_size_missing(wanted) => {
                    let min = self.limits.min_block;
                    let message = format!(
                        "{} needs requests in multiples of {min} bytes: ask for the block size",
                        export.name
                    );
                    refuse(out, option, option_reply::ERR_BLOCK_SIZE_REQD, &message);
                }
                Answer::Export(export) => {
                    self.put_info(out, option, &export, wanted);
                    reply(out, option, option_reply::ACK, &[]);
                    if option == option::GO {
                        return Ok(self.transmission(export, &name));
                    }
                }
                other => refuse_with(out, option, other),
            },
        }
        Ok(Step::NeedInput)
    }

    /// Section «Client flags»: flags that were not offered end the connection.
    fn client_flags(&mut self, flags: u32) -> Result<(), ProtocolError> {
        if flags & !(client_flags::FIXED_NEWSTYLE | client_flags::NO_ZEROES) != 0 {
            self.state = State::Ended;
            return Err(ProtocolError::ClientFlags(flags));
        }
        self.no_zeroes = flags & client_flags::NO_ZEROES != 0;
        self.state = State::Options;
        Ok(())
    }

    /// Takes one option off `input`; None when it was answered and the next one may follow.
    fn next_option(
        &mut self,
        input: &mut BytesMut,
        out: &mut BytesMut,
    ) -> Result<Option<Step>, ProtocolError> {
        if input.len() < OPTION_HEADER_BYTES {
            return Ok(Some(Step::NeedInput));
        }
        let mut header = &input[..OPTION_HEADER_BYTES];
        let (magic, option, length) = (header.get_u64(), header.get_u32(), header.get_u32());
        if magic != IHAVEOPT {
            self.state = State::Ended;
            return Err(ProtocolError::OptionMagic(magic));
        }
        let too_long = length > self.limits.max_option_bytes;
        if !too_long && input.len() - OPTION_HEADER_BYTES < length as usize {
            return Ok(Some(Step::NeedInput));
        }
        input.advance(OPTION_HEADER_BYTES);
        self.options_seen += 1;
        if self.options_seen > self.limits.max_options {
            self.state = State::Ended;
            return Err(ProtocolError::TooManyOptions(self.limits.max_options));
        }
        let extended = self.replies == ReplyStyle::Extended;
        match option {
            // It has no reply that could say no.
            option::EXPORT_NAME if too_long || extended || self.needs_tls() => {
                self.state = State::Ended;
                Ok(Some(Step::Close))
            }
            _ if too_long => {
                self.state = State::Draining { option, left: length };
                Ok(None)
            }
            _ => {
                let data = input.split_to(length as usize).freeze();
                Ok(self.take_option(option, data, out))
            }
        }
    }

    /// Deals with one whole option.
    fn take_option(&mut self, option: u32, data: Bytes, out: &mut BytesMut) -> Option<Step> {
        match option {
            option::STARTTLS => self.start_tls(&data, out),
            _ if self.needs_tls() && option != option::ABORT => {
                refuse(out, option, option_reply::ERR_TLS_REQD, "this server asks for TLS first");
                None
            }
            option::EXPORT_NAME => Some(match options::export_name(data) {
                Ok(name) => self.ask_export(option, name, Wanted::default()),
                Err(_) => {
                    self.state = State::Ended;
                    Step::Close
                }
            }),
            option::ABORT => {
                reply(out, option, option_reply::ACK, &[]);
                self.state = State::Ended;
                Some(Step::Close)
            }
            option::LIST if data.is_empty() => {
                self.state = State::Waiting(Waiting::List);
                Some(Step::Ask(Query::List))
            }
            option::STRUCTURED_REPLY if data.is_empty() => {
                self.structured_reply(out);
                None
            }
            option::EXTENDED_HEADERS if data.is_empty() => {
                self.replies = ReplyStyle::Extended;
                reply(out, option, option_reply::ACK, &[]);
                None
            }
            option::LIST | option::STRUCTURED_REPLY | option::EXTENDED_HEADERS => {
                malformed(out, option, Malformed::Invalid("this option takes no data"));
                None
            }
            option::INFO | option::GO => match options::info_request(data) {
                Ok((name, wanted)) => Some(self.ask_export(option, name, wanted)),
                Err(error) => {
                    malformed(out, option, error);
                    None
                }
            },
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                self.meta_context(option, data, out)
            }
            _ => {
                refuse(out, option, option_reply::ERR_UNSUP, "this option is not supported");
                None
            }
        }
    }

    fn needs_tls(&self) -> bool {
        self.tls == TlsMode::Required && !self.secured
    }

    /// Section «TLS support». What was negotiated in plain, somebody else may have sent.
    fn start_tls(&mut self, data: &Bytes, out: &mut BytesMut) -> Option<Step> {
        let option = option::STARTTLS;
        if self.tls == TlsMode::Off {
            refuse(out, option, option_reply::ERR_UNSUP, "this server has no TLS");
        } else if self.secured {
            malformed(out, option, Malformed::Invalid("TLS has begun already"));
        } else if !data.is_empty() {
            malformed(out, option, Malformed::Invalid("this option takes no data"));
        } else {
            reply(out, option, option_reply::ACK, &[]);
            self.secured = true;
            self.replies = ReplyStyle::Simple;
            self.contexts = None;
            return Some(Step::StartTls);
        }
        None
    }

    /// There is no way back from extended headers.
    fn structured_reply(&mut self, out: &mut BytesMut) {
        let option = option::STRUCTURED_REPLY;
        if self.replies == ReplyStyle::Extended {
            let message = "extended headers were negotiated already";
            return refuse(out, option, option_reply::ERR_EXT_HEADER_REQD, message);
        }
        self.replies = ReplyStyle::Structured;
        reply(out, option, option_reply::ACK, &[]);
    }

    /// Answers an option whose data was too long to keep. Unknown options are told that instead,
    /// and ABORT means the same with any data.
    fn refuse_drained(&mut self, option: u32, out: &mut BytesMut) {
        let known = [
            option::LIST,
            option::INFO,
            option::GO,
            option::STRUCTURED_REPLY,
            option::EXTENDED_HEADERS,
            option::LIST_META_CONTEXT,
            option::SET_META_CONTEXT,
        ];
        if option == option::SET_META_CONTEXT {
            self.contexts = None;
        }
        if known.contains(&option) && !self.needs_tls() {
            let limit = self.limits.max_option_bytes;
            let message = format!("the option is longer than {limit} bytes");
            refuse(out, option, option_reply::ERR_TOO_BIG, &message);
        } else {
            self.take_option(option, Bytes::new(), out);
        }
    }

    fn ask_export(&mut self, option: u32, name: String, wanted: Wanted) -> Step {
        let query = match option {
            option::INFO => Query::Info { name: name.clone() },
            option::GO => Query::Go { name: name.clone() },
            _ => Query::ExportName { name: name.clone() },
        };
        self.state = State::Waiting(Waiting::Export { option, name, wanted });
        Step::Ask(query)
    }

    /// Section «Metadata querying». Wildcards list, and select nothing.
    fn meta_context(&mut self, option: u32, data: Bytes, out: &mut BytesMut) -> Option<Step> {
        let set = option == option::SET_META_CONTEXT;
        if set {
            self.contexts = None;
        }
        if self.replies == ReplyStyle::Simple {
            let message = "metadata contexts need structured replies: ask for those first";
            malformed(out, option, Malformed::Invalid(message));
            return None;
        }
        match options::meta_queries(data) {
            Err(error) => malformed(out, option, error),
            Ok(queries) if queries.needs_snapshots(set) => {
                let name = queries.export.clone();
                self.state = State::Waiting(Waiting::Contexts { option, queries });
                return Some(Step::Ask(Query::Snapshots { name }));
            }
            Ok(queries) => self.tell_contexts(option, queries, Vec::new(), out),
        }
        None
    }

    /// Tells the contexts that there are of those asked for, and keeps what is selected.
    fn tell_contexts(
        &mut self,
        option: u32,
        queries: MetaQueries,
        known: Vec<(String, SnapshotId)>,
        out: &mut BytesMut,
    ) {
        let set = option == option::SET_META_CONTEXT;
        let all = !set && queries.count == 0;
        let mut tell = |id: u32, name: &str| {
            // The id in a list is reserved, and zero.
            let id = if set { id } else { 0 };
            reply(out, option, option_reply::META_CONTEXT, &[&id.to_be_bytes(), name.as_bytes()]);
            id
        };
        let allocation = queries.allocation || all || (!set && queries.base);
        let depth = queries.depth || all || (!set && queries.qemu);
        let bitmaps = all || (!set && (queries.qemu || queries.bitmaps));
        let allocation =
            allocation.then(|| tell(context::BASE_ALLOCATION_ID, context::BASE_ALLOCATION));
        let depth = depth.then(|| tell(context::ALLOCATION_DEPTH_ID, context::ALLOCATION_DEPTH));
        let named = known.into_iter().filter(|(name, _)| bitmaps || queries.dirty.contains(name));
        let most = if set { SINCE_MAX } else { usize::MAX };
        let mut dirty: Vec<(SnapshotId, u32)> = (context::DIRTY_BITMAP_ID..)
            .zip(named.take(most))
            .map(|(id, (name, snapshot))| {
                (snapshot, tell(id, &format!("{}{name}", context::DIRTY_BITMAP)))
            })
            .collect();
        dirty.sort_unstable_by_key(|(snapshot, _)| std::cmp::Reverse(*snapshot));
        let since = dirty.iter().map(|(snapshot, _)| *snapshot).collect();
        let dirty = dirty.into_iter().map(|(_, id)| id).collect();
        let contexts = Contexts { allocation, depth, dirty, since };
        if set && !contexts.is_empty() {
            self.contexts = Some((queries.export, contexts));
        }
        reply(out, option, option_reply::ACK, &[]);
    }

    fn answer_list(&mut self, answer: Answer, out: &mut BytesMut) {
        let Answer::Names(names) = answer else {
            return refuse_with(out, option::LIST, answer);
        };
        for name in names.iter().filter(|name| name.len() <= MAX_STRING_BYTES) {
            let length = (name.len() as u32).to_be_bytes();
            reply(out, option::LIST, option_reply::SERVER, &[&length, name.as_bytes()]);
        }
        reply(out, option::LIST, option_reply::ACK, &[]);
    }

    fn answer_export_name(&mut self, answer: Answer, name: &str, out: &mut BytesMut) -> Step {
        let Answer::Export(export) = answer else {
            let fits = !matches!(answer, Answer::Names(_) | Answer::Snapshots(_));
            assert!(fits, "these answer other questions");
            self.state = State::Ended;
            return Step::Close;
        };
        out.put_u64(export.size_bytes);
        out.put_u16(transmission_flags(&export, self.replies));
        if !self.no_zeroes {
            out.put_bytes(0, EXPORT_NAME_ZEROES);
        }
        self.transmission(export, name)
    }

    /// Section «Block size constraints»: a client that did not ask for the block size may send any
    /// byte range, so it is let in only where every byte range is taken.
    fn block_size_missing(&self, wanted: Wanted) -> bool {
        self.limits.min_block > 1 && !wanted.block_size
    }

    fn put_info(&self, out: &mut BytesMut, option: u32, export: &ExportInfo, wanted: Wanted) {
        let mut put = |kind: u16, parts: [&[u8]; 3]| {
            let kind = kind.to_be_bytes();
            reply(out, option, option_reply::INFO, &[&kind, parts[0], parts[1], parts[2]]);
        };
        let flags = transmission_flags(export, self.replies);
        put(info::EXPORT, [&export.size_bytes.to_be_bytes(), &flags.to_be_bytes(), &[]]);
        if wanted.name {
            put(info::NAME, [shortened(&export.name).as_bytes(), &[], &[]]);
        }
        if wanted.description && !export.description.is_empty() {
            put(info::DESCRIPTION, [shortened(&export.description).as_bytes(), &[], &[]]);
        }
        if wanted.block_size {
            let Limits { min_block, preferred_block, max_payload, .. } = self.limits;
            let sizes = [min_block, preferred_block, max_payload].map(u32::to_be_bytes);
            put(info::BLOCK_SIZE, [&sizes[0], &sizes[1], &sizes[2]]);
        }
    }

    fn transmission(&mut self, export: ExportInfo, name: &str) -> Step {
        self.state = State::Ended;
        let selected = self.contexts.take().filter(|(selected, _)| selected == name);
        Step::Transmission(Session {
            export,
            limits: self.limits,
            replies: self.replies,
            contexts: selected.map(|(_, contexts)| contexts).unwrap_or_default(),
            no_zeroes: self.no_zeroes,
        })
    }
}

/// One reply to an option, its data given in parts.
fn reply(out: &mut BytesMut, option: u32, kind: u32, parts: &[&[u8]]) {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    out.put_u64(OPTION_REPLY_MAGIC);
    out.put_u32(option);
    out.put_u32(kind);
    out.put_u32(length as u32);
    parts.iter().for_each(|part| out.put_slice(part));
}

fn refuse(out: &mut BytesMut, option: u32, kind: u32, message: &str) {
    reply(out, option, kind, &[shortened(message).as_bytes()]);
}

fn malformed(out: &mut BytesMut, option: u32, error: Malformed) {
    match error {
        Malformed::Invalid(message) => refuse(out, option, option_reply::ERR_INVALID, message),
        Malformed::TooBig(message) => refuse(out, option, option_reply::ERR_TOO_BIG, message),
    }
}

/// Answers that are no success. ERR_SHUTDOWN is the one error that says «later».
fn refuse_with(out: &mut BytesMut, option: u32, answer: Answer) {
    let (kind, message) = match answer {
        Answer::Unknown(message) => (option_reply::ERR_UNKNOWN, message),
        Answer::Refused(message) => (option_reply::ERR_POLICY, message),
        Answer::Unavailable(message) => (option_reply::ERR_SHUTDOWN, message),
        Answer::Names(_) | Answer::Export(_) | Answer::Snapshots(_) => {
            panic!("{answer:?} does not answer {option}")
        }
    };
    refuse(out, option, kind, &message);
}
