//! Golden bytes of the NBD protocol: what goes over the wire, byte for byte, written by hand from
//! the specification. Covers each message that this server sends, in the order a session meets them.

use bytes::{Bytes, BytesMut};
use hci_engine_core::content::Run;
use hci_engine_core::geometry::SnapshotId;
use hci_engine_core::io::Outgoing;
use hci_engine_core::nbd::{
    Addressee, Answer, Command, Contexts, Errno, ExportInfo, Extent, Flags, Handshake, Limits,
    Parsed, ReplyStyle, Request, RequestReader, Session, Step, TlsMode, block_status, done, error,
    read,
};
use std::io::IoSlice;

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

fn disk() -> ExportInfo {
    ExportInfo {
        name: "vms/a".to_owned(),
        size_bytes: 1 << 30,
        read_only: false,
        multi_conn: false,
        description: "first".to_owned(),
    }
}

/// A handshake that has taken `client_flags`, and what a test sends it.
struct Client {
    handshake: Handshake,
    input: BytesMut,
}

impl Client {
    fn new(client_flags: &str) -> Client {
        Client::with_tls(client_flags, TlsMode::Off)
    }

    fn with_tls(client_flags: &str, tls: TlsMode) -> Client {
        let mut handshake = Handshake::new(&Limits::default()).with_tls(tls);
        handshake.greeting(&mut BytesMut::new());
        let mut client = Client { handshake, input: BytesMut::new() };
        assert_eq!(client.send(client_flags), (Step::NeedInput, vec![]));
        client
    }

    fn send(&mut self, text: &str) -> (Step, Vec<u8>) {
        self.input.extend_from_slice(&hex(text));
        let mut out = BytesMut::new();
        let step = self.handshake.receive(&mut self.input, &mut out).expect("the protocol holds");
        (step, out.to_vec())
    }

    fn answer(&mut self, answer: Answer) -> (Step, Vec<u8>) {
        let mut out = BytesMut::new();
        let step = self.handshake.answer(answer, &mut out).expect("the protocol holds");
        (step, out.to_vec())
    }
}

const FIXED: &str = "00000001";
const FIXED_NO_ZEROES: &str = "00000003";

#[test]
fn golden_greeting_is_fixed_newstyle_without_zeroes() {
    let mut out = BytesMut::new();
    Handshake::new(&Limits::default()).greeting(&mut out);
    assert_eq!(out, hex("4e42444d41474943 49484156454f5054 0003"));
}

#[test]
fn golden_export_name_ends_with_zeroes_unless_declined() {
    let name = "49484156454f5054 00000001 00000005 766d732f61";
    let head = hex("0000000040000000 0c6d");
    let mut client = Client::new(FIXED);
    client.send(name);
    let (_, out) = client.answer(Answer::Export(disk()));
    assert_eq!(out, [head.clone(), vec![0; 124]].concat());

    let mut client = Client::new(FIXED_NO_ZEROES);
    client.send(name);
    assert_eq!(client.answer(Answer::Export(disk())).1, head);
}

#[test]
fn golden_list_names_exports_then_acknowledges() {
    let mut client = Client::new(FIXED_NO_ZEROES);
    client.send("49484156454f5054 00000003 00000000");
    let names = vec!["vms/a".to_owned(), "vms/b".to_owned()];
    let expected = hex("0003e889045565a9 00000003 00000002 00000009 00000005 766d732f61
                        0003e889045565a9 00000003 00000002 00000009 00000005 766d732f62
                        0003e889045565a9 00000003 00000001 00000000");
    assert_eq!(client.answer(Answer::Names(names)), (Step::NeedInput, expected));
}

#[test]
fn golden_qemu_order_of_options_opens_the_export() {
    let mut client = Client::new(FIXED_NO_ZEROES);
    let (_, out) = client.send("49484156454f5054 00000008 00000000");
    assert_eq!(out, hex("0003e889045565a9 00000008 00000001 00000000"));
    let (_, out) = client.send(
        "49484156454f5054 0000000a 00000020
         00000005 766d732f61 00000001 0000000f 626173653a616c6c6f636174696f6e",
    );
    let expected = hex("0003e889045565a9 0000000a 00000004 00000013
                        00000001 626173653a616c6c6f636174696f6e
                        0003e889045565a9 0000000a 00000001 00000000");
    assert_eq!(out, expected);
    client.send("49484156454f5054 00000007 0000000d 00000005 766d732f61 0001 0003");
    let (step, out) = client.answer(Answer::Export(disk()));
    let expected = hex("0003e889045565a9 00000007 00000003 0000000c 0000 0000000040000000 0ced
                        0003e889045565a9 00000007 00000003 0000000e
                            0003 00000001 00001000 02000000
                        0003e889045565a9 00000007 00000001 00000000");
    assert_eq!(out, expected);
    let Step::Transmission(session) = step else { panic!("GO opens the export, not {step:?}") };
    assert_eq!(
        session.contexts,
        Contexts { allocation: Some(1), depth: None, ..Contexts::default() }
    );
    assert!(session.structured());
}

#[test]
fn golden_info_gives_everything_that_is_asked_for() {
    let mut client = Client::new(FIXED_NO_ZEROES);
    client.send("49484156454f5054 00000006 00000011 00000005 766d732f61 0003 0001 0002 0003");
    let expected = hex("0003e889045565a9 00000006 00000003 0000000c 0000 0000000040000000 0c6d
                        0003e889045565a9 00000006 00000003 00000007 0001 766d732f61
                        0003e889045565a9 00000006 00000003 00000007 0002 6669727374
                        0003e889045565a9 00000006 00000003 0000000e
                            0003 00000001 00001000 02000000
                        0003e889045565a9 00000006 00000001 00000000");
    assert_eq!(client.answer(Answer::Export(disk())), (Step::NeedInput, expected));
}

#[test]
fn golden_refusals_carry_their_kind_and_message() {
    let go = "49484156454f5054 00000007 0000000b 00000005 766d732f61 0000";
    let message = || "no".to_owned();
    let cases = [
        (Answer::Unknown(message()), "80000006"),
        (Answer::Refused(message()), "80000002"),
        (Answer::Unavailable(message()), "80000007"),
    ];
    for (answer, kind) in cases {
        let mut client = Client::new(FIXED);
        client.send(go);
        let expected = hex(&format!("0003e889045565a9 00000007 {kind} 00000002 6e6f"));
        assert_eq!(client.answer(answer), (Step::NeedInput, expected));
    }
}

#[test]
fn golden_abort_is_acknowledged_and_closes() {
    let (step, out) = Client::new(FIXED).send("49484156454f5054 00000002 00000000");
    assert_eq!((step, out), (Step::Close, hex("0003e889045565a9 00000002 00000001 00000000")));
}

fn session(replies: ReplyStyle) -> Session {
    Session {
        export: disk(),
        limits: Limits::default(),
        replies,
        contexts: Contexts { allocation: Some(1), depth: None, ..Contexts::default() },
        no_zeroes: true,
    }
}

#[test]
fn golden_write_request_is_read_with_its_payload() {
    let mut input = BytesMut::from(
        &hex("25609513 0001 0001 1122334455667788 0000000000001000 00000004 deadbeef")[..],
    );
    let parsed = RequestReader::new(&session(ReplyStyle::Simple)).next(&mut input);
    let expected = Request {
        command: Command::Write,
        flags: Flags(1),
        cookie: 0x1122_3344_5566_7788,
        offset: 4096,
        length: 4,
        payload: Bytes::from_static(&[0xde, 0xad, 0xbe, 0xef]),
    };
    assert_eq!(parsed, Ok(Some(Parsed::Request(expected))));
    assert!(input.is_empty());
}

/// The bytes that `write` queues.
fn sent(write: impl FnOnce(&mut Outgoing)) -> Vec<u8> {
    let mut out = Outgoing::new();
    write(&mut out);
    let mut slices = [IoSlice::new(&[]); 64];
    let filled = out.gather(&mut slices);
    let bytes: Vec<u8> = slices[..filled].iter().flat_map(|slice| slice.to_vec()).collect();
    assert_eq!(bytes.len(), out.len());
    bytes
}

const TO: Addressee = Addressee { cookie: 7, offset: 512 };

fn request(command: Command, flags: u16, length: u64) -> Request {
    Request { command, flags: Flags(flags), cookie: 7, offset: 512, length, payload: Bytes::new() }
}

fn runs() -> [Run; 3] {
    [Run::Data(Bytes::from_static(b"ab")), Run::Hole(3), Run::Data(Bytes::from_static(b"c"))]
}

#[test]
fn golden_simple_replies() {
    assert_eq!(
        sent(|out| done(out, ReplyStyle::Simple, TO)),
        hex("67446698 00000000 0000000000000007")
    );
    let bytes = sent(|out| error(out, ReplyStyle::Simple, TO, Errno::NoSpace, "full"));
    assert_eq!(bytes, hex("67446698 0000001c 0000000000000007"));
    let bytes = sent(|out| read(out, ReplyStyle::Simple, &request(Command::Read, 0, 6), &runs()));
    assert_eq!(bytes, hex("67446698 00000000 0000000000000007 6162 000000 63"));
}

#[test]
fn golden_structured_read_sends_data_and_holes_as_chunks() {
    let request = request(Command::Read, 0, 6);
    let bytes = sent(|out| read(out, ReplyStyle::Structured, &request, &runs()));
    let expected = hex("668e33ef 0000 0001 0000000000000007 0000000a 0000000000000200 6162
                        668e33ef 0000 0002 0000000000000007 0000000c 0000000000000202 00000003
                        668e33ef 0001 0001 0000000000000007 00000009 0000000000000205 63");
    assert_eq!(bytes, expected);
}

#[test]
fn golden_structured_read_with_dont_fragment_is_one_chunk() {
    let request = request(Command::Read, 1 << 2, 6);
    let bytes = sent(|out| read(out, ReplyStyle::Structured, &request, &runs()));
    let expected = hex("668e33ef 0001 0001 0000000000000007 0000000e 0000000000000200
                        6162 000000 63");
    assert_eq!(bytes, expected);
}

#[test]
fn golden_structured_error_carries_its_message() {
    let bytes = sent(|out| error(out, ReplyStyle::Structured, TO, Errno::Invalid, "why"));
    let expected = hex("668e33ef 0001 8001 0000000000000007 00000009 00000016 0003 776879");
    assert_eq!(bytes, expected);
}

#[test]
fn golden_block_status_tells_what_was_written_since_each_snapshot() {
    let extent = |changed| Extent { length: 4096, flags: 0, depth: 1, changed };
    let request = request(Command::BlockStatus, 0, 12288);
    let mut session = session(ReplyStyle::Structured);
    let since = [9, 4].map(|layer| SnapshotId { layer, generation: 1 });
    session.contexts = Contexts { dirty: vec![5, 3], since: since.into(), ..Contexts::default() };
    let extents = [extent(0), extent(1), extent(2)];
    let bytes = sent(|out| block_status(out, &session, &request, &extents));
    let expected = hex("668e33ef 0000 0005 0000000000000007 00000014 00000005
                        00002000 00000000 00001000 00000001
                        668e33ef 0001 0005 0000000000000007 00000014 00000003
                        00001000 00000000 00002000 00000001");
    assert_eq!(bytes, expected);
}

#[test]
fn golden_block_status_lists_extents() {
    let extents = [
        Extent { length: 4096, flags: 0, depth: 1, changed: 0 },
        Extent { length: 8192, flags: 3, depth: 0, changed: 0 },
    ];
    let request = request(Command::BlockStatus, 0, 8192);
    let session = session(ReplyStyle::Structured);
    let bytes = sent(|out| block_status(out, &session, &request, &extents));
    let expected = hex("668e33ef 0001 0005 0000000000000007 00000014 00000001
                        00001000 00000000 00001000 00000003");
    assert_eq!(bytes, expected);
}

fn extended(contexts: Contexts) -> Session {
    Session { replies: ReplyStyle::Extended, contexts, ..session(ReplyStyle::Extended) }
}

#[test]
fn golden_extended_headers_go_first_and_leave_no_way_back() {
    let mut client = Client::new(FIXED_NO_ZEROES);
    let (_, out) = client.send("49484156454f5054 0000000b 00000000");
    assert_eq!(out, hex("0003e889045565a9 0000000b 00000001 00000000"));
    let (_, out) = client.send("49484156454f5054 00000008 00000000");
    assert_eq!(out[..16], hex("0003e889045565a9 00000008 8000000a"));
    let (_, out) = client.send("49484156454f5054 0000000b 00000001 00");
    assert_eq!(out[..16], hex("0003e889045565a9 0000000b 80000003"));
    client.send("49484156454f5054 00000007 0000000b 00000005 766d732f61 0000");
    let (step, out) = client.answer(Answer::Export(disk()));
    let expected = hex("0003e889045565a9 00000007 00000003 0000000c 0000 0000000040000000 0ced
                        0003e889045565a9 00000007 00000001 00000000");
    assert_eq!(out, expected);
    let Step::Transmission(session) = step else { panic!("GO opens the export, not {step:?}") };
    assert_eq!(session.replies, ReplyStyle::Extended);

    let mut client = Client::new(FIXED_NO_ZEROES);
    client.send("49484156454f5054 0000000b 00000000");
    let (step, out) = client.send("49484156454f5054 00000001 00000005 766d732f61");
    assert_eq!((step, out), (Step::Close, vec![]), "there is no reply that says no");
}

#[test]
fn golden_allocation_depth_is_selected_beside_base_allocation() {
    let mut client = Client::new(FIXED_NO_ZEROES);
    client.send("49484156454f5054 0000000b 00000000");
    let (_, out) = client.send(
        "49484156454f5054 0000000a 00000039
         00000005 766d732f61 00000002 0000000f 626173653a616c6c6f636174696f6e
         00000015 71656d753a616c6c6f636174696f6e2d6465707468",
    );
    let expected = hex("0003e889045565a9 0000000a 00000004 00000013
                        00000001 626173653a616c6c6f636174696f6e
                        0003e889045565a9 0000000a 00000004 00000019
                        00000002 71656d753a616c6c6f636174696f6e2d6465707468
                        0003e889045565a9 0000000a 00000001 00000000");
    assert_eq!(out, expected);
    client.send("49484156454f5054 00000007 0000000b 00000005 766d732f61 0000");
    let (step, _) = client.answer(Answer::Export(disk()));
    let Step::Transmission(session) = step else { panic!("GO opens the export, not {step:?}") };
    assert_eq!(
        session.contexts,
        Contexts { allocation: Some(1), depth: Some(2), ..Contexts::default() }
    );
}

#[test]
fn golden_extended_requests_have_lengths_of_64_bits() {
    let session = extended(Contexts::default());
    let mut reader = RequestReader::new(&session);
    let mut input = BytesMut::from(
        &hex("21e41c71 0021 0001 1122334455667788 0000000000001000 0000000000000004 deadbeef
              21e41c71 0000 0006 0000000000000008 0000000000000000 0000010000000000")[..],
    );
    let write = Request {
        command: Command::Write,
        flags: Flags(1),
        cookie: 0x1122_3344_5566_7788,
        offset: 4096,
        length: 4,
        payload: Bytes::from_static(&[0xde, 0xad, 0xbe, 0xef]),
    };
    assert_eq!(reader.next(&mut input), Ok(Some(Parsed::Request(write))));
    let zeroes = Request {
        command: Command::WriteZeroes,
        flags: Flags(0),
        cookie: 8,
        offset: 0,
        length: 1 << 40,
        payload: Bytes::new(),
    };
    assert_eq!(reader.next(&mut input), Ok(Some(Parsed::Request(zeroes))));
    assert!(input.is_empty());
}

#[test]
fn golden_extended_replies_are_all_chunks_with_the_requests_offset() {
    let style = ReplyStyle::Extended;
    let head = "0000000000000007 0000000000000200";
    let bytes = sent(|out| done(out, style, TO));
    assert_eq!(bytes, hex(&format!("6e8a278c 0001 0000 {head} 0000000000000000")));
    let bytes = sent(|out| error(out, style, TO, Errno::Invalid, "why"));
    let expected = format!("6e8a278c 0001 8001 {head} 0000000000000009 00000016 0003 776879");
    assert_eq!(bytes, hex(&expected));
    let bytes = sent(|out| read(out, style, &request(Command::Read, 0, 6), &runs()));
    let expected = format!(
        "6e8a278c 0000 0001 {head} 000000000000000a 0000000000000200 6162
         6e8a278c 0000 0002 {head} 000000000000000c 0000000000000202 00000003
         6e8a278c 0001 0001 {head} 0000000000000009 0000000000000205 63"
    );
    assert_eq!(bytes, hex(&expected));
}

#[test]
fn golden_extended_block_status_has_a_chunk_for_each_context() {
    let session = extended(Contexts { allocation: Some(1), depth: Some(2), ..Contexts::default() });
    let extents = [
        Extent { length: 5 << 30, flags: 3, depth: 0, changed: 0 },
        Extent { length: 4096, flags: 0, depth: 1, changed: 0 },
    ];
    let request = request(Command::BlockStatus, 0, 6 << 30);
    let bytes = sent(|out| block_status(out, &session, &request, &extents));
    let head = "0000000000000007 0000000000000200";
    let expected = format!(
        "6e8a278c 0000 0006 {head} 0000000000000028 00000001 00000002
             0000000140000000 0000000000000003 0000000000001000 0000000000000000
         6e8a278c 0001 0006 {head} 0000000000000028 00000002 00000002
             0000000140000000 0000000000000000 0000000000001000 0000000000000001"
    );
    assert_eq!(bytes, hex(&expected));
}

#[test]
fn golden_tls_is_refused_where_there_is_none() {
    let (_, out) = Client::new(FIXED).send("49484156454f5054 00000005 00000000");
    assert_eq!(out[..16], hex("0003e889045565a9 00000005 80000001"));
}

#[test]
fn golden_tls_that_is_required_goes_before_everything_but_abort() {
    let mut client = Client::with_tls(FIXED, TlsMode::Required);
    for option in ["00000003", "00000006", "00000007", "00000008", "0000000a", "00000063"] {
        let (step, out) = client.send(&format!("49484156454f5054 {option} 00000000"));
        assert_eq!(step, Step::NeedInput);
        assert_eq!(out[..16], hex(&format!("0003e889045565a9 {option} 80000005")));
    }
    // One that is too long to keep is told the same, once it is past.
    let long = format!("49484156454f5054 00000007 00005000 {}", "00".repeat(0x5000));
    assert_eq!(client.send(&long).1[..16], hex("0003e889045565a9 00000007 80000005"));
    let (step, out) = client.send("49484156454f5054 00000005 00000000");
    assert_eq!((step, out), (Step::StartTls, hex("0003e889045565a9 00000005 00000001 00000000")));
    let (_, out) = client.send("49484156454f5054 00000008 00000000");
    assert_eq!(out, hex("0003e889045565a9 00000008 00000001 00000000"));
    let (_, out) = client.send("49484156454f5054 00000005 00000000");
    assert_eq!(out[..16], hex("0003e889045565a9 00000005 80000003"));

    let mut client = Client::with_tls(FIXED, TlsMode::Required);
    let (step, out) = client.send("49484156454f5054 00000002 00000000");
    assert_eq!((step, out), (Step::Close, hex("0003e889045565a9 00000002 00000001 00000000")));
    let mut client = Client::with_tls(FIXED, TlsMode::Required);
    let (step, out) = client.send("49484156454f5054 00000001 00000005 766d732f61");
    assert_eq!((step, out), (Step::Close, vec![]), "there is no reply that says no");
}

#[test]
fn golden_tls_forgets_what_was_negotiated_before() {
    let mut client = Client::with_tls(FIXED_NO_ZEROES, TlsMode::Optional);
    client.send("49484156454f5054 0000000b 00000000");
    client.send(
        "49484156454f5054 0000000a 00000020
         00000005 766d732f61 00000001 0000000f 626173653a616c6c6f636174696f6e",
    );
    assert_eq!(client.send("49484156454f5054 00000005 00000000").0, Step::StartTls);
    client.send("49484156454f5054 00000007 0000000b 00000005 766d732f61 0000");
    let (step, _) = client.answer(Answer::Export(disk()));
    let Step::Transmission(session) = step else { panic!("GO opens the export, not {step:?}") };
    assert_eq!(session.replies, ReplyStyle::Simple);
    assert!(session.contexts.is_empty());
}
