//! The handshake: each option, orders that clients do not use, and what goes wrong.

use crate::client::{
    OptionReply, catalog, counted, disk, info_data, meta_data, option, option_replies, play,
    play_options,
};
use bytes::BytesMut;
use hci_engine_core::nbd::constants::{option as opt, option_reply as rep};
use hci_engine_core::nbd::{Answer, Handshake, Limits, ProtocolError, Query, Session, Step};

const BASE_ALLOCATION: &str = "base:allocation";

/// Kinds of the replies to one option after `before`.
fn kinds(before: &[Vec<u8>], last: Vec<u8>) -> Vec<u32> {
    let skipped = option_replies(&play_options(before).out).len();
    let replies = option_replies(&play_options(&[before, &[last]].concat()).out);
    replies[skipped..].iter().map(|reply| reply.1).collect()
}

fn opened(options: &[Vec<u8>]) -> Session {
    match play_options(options).end {
        Ok(Step::Transmission(session)) => session,
        other => panic!("the export was not opened: {other:?}"),
    }
}

fn structured() -> Vec<u8> {
    option(opt::STRUCTURED_REPLY, &[])
}

fn go(name: &str) -> Vec<u8> {
    option(opt::GO, &info_data(name, &[]))
}

fn set_meta(name: &str, queries: &[&str]) -> Vec<u8> {
    option(opt::SET_META_CONTEXT, &meta_data(name, queries))
}

#[test]
fn client_flags_unknown_end_the_connection() {
    let outcome = play(&Limits::default(), &[&[0, 0, 0, 7]]);
    assert_eq!(outcome.end, Err(ProtocolError::ClientFlags(7)));
    assert!(outcome.out.is_empty());
}

#[test]
fn client_flags_without_fixed_newstyle_are_served() {
    let input = [&[0, 0, 0, 0][..], &option(opt::EXPORT_NAME, b"vms/a")].concat();
    let outcome = play(&Limits::default(), &[&input]);
    assert!(matches!(outcome.end, Ok(Step::Transmission(_))));
    assert_eq!(outcome.out.len(), 8 + 2 + 124);
}

#[test]
fn option_magic_wrong_ends_the_connection() {
    let outcome = play_options(&[b"GET / HTTP/1.1\r\n\r\n".to_vec()]);
    assert!(matches!(outcome.end, Err(ProtocolError::OptionMagic(_))), "{:?}", outcome.end);
}

#[test]
fn list_and_info_ask_without_opening() {
    let outcome =
        play_options(&[option(opt::LIST, &[]), option(opt::INFO, &info_data("vms/a", &[]))]);
    let asked = [Query::List, Query::Info { name: "vms/a".to_owned() }];
    assert_eq!(outcome.queries, asked);
    assert_eq!(outcome.end, Ok(Step::NeedInput));
}

#[test]
fn list_with_data_is_invalid() {
    assert_eq!(kinds(&[], option(opt::LIST, &[0])), [rep::ERR_INVALID]);
}

#[test]
fn list_leaves_out_names_that_no_client_can_take() {
    let mut handshake = Handshake::new(&Limits::default());
    handshake.greeting(&mut BytesMut::new());
    let mut input = BytesMut::from(&[&[0, 0, 0, 1], &option(opt::LIST, &[])[..]].concat()[..]);
    let mut out = BytesMut::new();
    assert_eq!(handshake.receive(&mut input, &mut out), Ok(Step::Ask(Query::List)));
    let names = vec!["x".repeat(5000), "vms/a".to_owned()];
    assert_eq!(handshake.answer(Answer::Names(names), &mut out), Ok(Step::NeedInput));
    let replies = option_replies(&out);
    assert_eq!(replies.len(), 2);
    assert_eq!(replies[0].2, counted("vms/a"));
}

#[test]
fn go_unknown_export_says_so_and_another_can_be_tried() {
    let outcome = play_options(&[go("vms/none"), go("vms/a")]);
    let replies = option_replies(&outcome.out);
    let message = b"there is no image vms/none".to_vec();
    assert_eq!(replies[0], (opt::GO, rep::ERR_UNKNOWN, message));
    assert!(matches!(outcome.end, Ok(Step::Transmission(_))));
}

#[test]
fn go_export_open_elsewhere_names_the_holder() {
    let replies = option_replies(&play_options(&[go("vms/busy")]).out);
    let message = b"vms/busy is open on gateway2".to_vec();
    assert_eq!(replies, [(opt::GO, rep::ERR_POLICY, message)] as [OptionReply; 1]);
}

#[test]
fn go_with_bad_data_is_invalid() {
    let short_name = [&100u32.to_be_bytes()[..], b"vms/a\0\0"].concat();
    let no_count = counted("vms/a");
    let count_too_high = [&counted("vms/a")[..], &[0, 2, 0, 3]].concat();
    let bytes_behind = [&info_data("vms/a", &[3])[..], &[0]].concat();
    let no_utf8 = [&[0, 0, 0, 2], &b"\xff\xfe"[..], &[0, 0]].concat();
    let nul = info_data("vms\0a", &[]);
    for data in [vec![], short_name, no_count, count_too_high, bytes_behind, no_utf8, nul] {
        assert_eq!(kinds(&[], option(opt::GO, &data)), [rep::ERR_INVALID], "{data:?}");
    }
}

#[test]
fn go_with_a_name_too_long_is_too_big() {
    assert_eq!(kinds(&[], go(&"x".repeat(4097))), [rep::ERR_TOO_BIG]);
    assert_eq!(kinds(&[], go(&"x".repeat(4096))), [rep::ERR_UNKNOWN]);
}

#[test]
fn go_without_block_size_where_it_matters_is_refused() {
    let limits = Limits { min_block: 512, ..Limits::default() };
    let unasked = [&[0, 0, 0, 3], &go("vms/a")[..]].concat();
    let replies = option_replies(&play(&limits, &[&unasked]).out);
    assert_eq!(replies[0].1, rep::ERR_BLOCK_SIZE_REQD);
    let asked = [&[0, 0, 0, 3], &option(opt::GO, &info_data("vms/a", &[3]))[..]].concat();
    assert!(matches!(play(&limits, &[&asked]).end, Ok(Step::Transmission(_))));
}

#[test]
fn go_leaves_what_follows_for_the_transmission() {
    let outcome = play_options(&[go("vms/a"), b"request".to_vec()]);
    assert_eq!(outcome.rest, b"request");
}

#[test]
fn export_name_that_fails_closes_without_a_word() {
    let too_long = vec![b'x'; 4097];
    let far_too_long = vec![b'x'; 20_000];
    for name in [&b"vms/none"[..], b"vms/busy", b"\xff", &too_long, &far_too_long] {
        let outcome = play_options(&[option(opt::EXPORT_NAME, name)]);
        assert_eq!((outcome.end, outcome.out), (Ok(Step::Close), vec![]));
    }
}

#[test]
fn export_name_after_structured_reply_offers_df() {
    let session = opened(&[structured(), option(opt::EXPORT_NAME, b"vms/a")]);
    assert!(session.structured());
    assert_ne!(session.transmission_flags() & (1 << 7), 0);
}

#[test]
fn transmission_flags_follow_the_export() {
    let mut session = opened(&[go("vms/a")]);
    assert_eq!(session.transmission_flags(), 0b1100_0110_1101);
    session.export.read_only = true;
    session.export.multi_conn = true;
    assert_eq!(session.transmission_flags(), 0b0101_0000_1111);
}

#[test]
fn options_not_known_are_unsupported_whatever_their_length() {
    for number in [0, 4, opt::STARTTLS, 12, u32::MAX] {
        for length in [0, 10, 20_000] {
            assert_eq!(kinds(&[], option(number, &vec![0; length])), [rep::ERR_UNSUP]);
        }
    }
}

#[test]
fn options_too_long_are_drained_and_the_next_one_is_served() {
    let long = option(opt::GO, &vec![0; 10 << 20]);
    let input = [&[0, 0, 0, 3], &long[..], &go("vms/a")].concat();
    let pieces: Vec<&[u8]> = input.chunks(64 << 10).collect();
    let outcome = play(&Limits::default(), &pieces);
    assert_eq!(option_replies(&outcome.out)[0].1, rep::ERR_TOO_BIG);
    assert!(matches!(outcome.end, Ok(Step::Transmission(_))));
    assert!(outcome.kept_bytes <= 16 + (16 << 10), "{} bytes kept", outcome.kept_bytes);
}

#[test]
fn options_of_the_largest_size_are_not_too_long() {
    let queries = ["x".repeat(4096), "y".repeat(4096), "z".repeat(4096), "w".repeat(4063)];
    let queries: Vec<_> = queries.iter().map(|query| &**query).collect();
    let data = meta_data("vms/a", &[&queries[..], &[""]].concat());
    assert_eq!(data.len(), 16 << 10);
    let longest = option(opt::LIST_META_CONTEXT, &data);
    assert_eq!(kinds(&[structured()], longest), [rep::ACK]);
    let too_long = option(opt::LIST_META_CONTEXT, &[&data[..], b"x"].concat());
    assert_eq!(kinds(&[structured()], too_long), [rep::ERR_TOO_BIG]);
}

#[test]
fn options_without_end_are_ended() {
    let options = vec![option(99, &[]); 1001];
    assert_eq!(play_options(&options).end, Err(ProtocolError::TooManyOptions(1000)));
    assert_eq!(play_options(&options[..1000]).end, Ok(Step::NeedInput));
}

#[test]
fn abort_with_any_data_is_acknowledged() {
    for length in [0, 9, 20_000] {
        let outcome = play_options(&[option(opt::ABORT, &vec![0; length])]);
        assert_eq!(outcome.end, Ok(Step::Close));
        assert_eq!(option_replies(&outcome.out), [(opt::ABORT, rep::ACK, vec![])]);
    }
}

#[test]
fn structured_reply_with_data_is_invalid_and_not_switched_on() {
    let bad = option(opt::STRUCTURED_REPLY, &[1]);
    assert_eq!(kinds(&[], bad.clone()), [rep::ERR_INVALID]);
    assert!(!opened(&[bad, go("vms/a")]).structured());
}

#[test]
fn meta_context_before_structured_reply_is_invalid() {
    assert_eq!(kinds(&[], set_meta("vms/a", &[BASE_ALLOCATION])), [rep::ERR_INVALID]);
    let list = option(opt::LIST_META_CONTEXT, &meta_data("vms/a", &[]));
    assert_eq!(kinds(&[], list), [rep::ERR_INVALID]);
}

#[test]
fn list_meta_context_knows_base_allocation_and_the_wildcard() {
    let list = |queries: &[&str]| {
        kinds(&[structured()], option(opt::LIST_META_CONTEXT, &meta_data("vms/a", queries)))
    };
    let found = [rep::META_CONTEXT, rep::ACK];
    let all = [&[rep::META_CONTEXT; 4][..], &[rep::ACK]].concat();
    assert_eq!(list(&[]), all);
    assert_eq!(list(&["base:", "qemu:"]), all);
    assert_eq!(list(&["base:"]), found);
    assert_eq!(list(&["x-other:y", BASE_ALLOCATION, "base:"]), found);
    assert_eq!(list(&["base:other"]), [rep::ACK]);
    assert_eq!(list(&["qemu:"]), all[1..]);
    assert_eq!(list(&["qemu:dirty-bitmap:"]), all[2..]);
    assert_eq!(list(&["qemu:dirty-bitmap:monday"]), found);
    assert_eq!(list(&["qemu:dirty-bitmap:sunday"]), [rep::ACK]);
    let unknown = option(opt::LIST_META_CONTEXT, &meta_data("vms/none", &["qemu:"]));
    assert_eq!(kinds(&[structured()], unknown), [rep::ERR_UNKNOWN]);
}

#[test]
fn set_meta_context_selects_only_by_full_name() {
    let set = |queries: &[&str]| kinds(&[structured()], set_meta("vms/a", queries));
    assert_eq!(set(&[BASE_ALLOCATION]), [rep::META_CONTEXT, rep::ACK]);
    assert_eq!(set(&[]), [rep::ACK]);
    assert_eq!(set(&["base:", "qemu:"]), [rep::ACK]);
    assert_eq!(set(&["qemu:allocation-depth"]), [rep::META_CONTEXT, rep::ACK]);
    assert_eq!(set(&["qemu:dirty-bitmap:x"]), [rep::ACK]);
    assert_eq!(set(&["qemu:dirty-bitmap:"]), [rep::ACK]);
    assert_eq!(set(&["qemu:dirty-bitmap:monday"]), [rep::META_CONTEXT, rep::ACK]);
    let both = ["qemu:dirty-bitmap:monday", "qemu:dirty-bitmap:tuesday", BASE_ALLOCATION];
    assert_eq!(set(&both), [rep::META_CONTEXT, rep::META_CONTEXT, rep::META_CONTEXT, rep::ACK]);
    let session = opened(&[structured(), set_meta("vms/a", &both), go("vms/a")]);
    let layers: Vec<u32> = session.contexts.since.iter().map(|snapshot| snapshot.layer).collect();
    assert_eq!((layers, &session.contexts.dirty[..]), (vec![2, 1], &[4, 3][..]), "newest first");
    assert_eq!(session.contexts.floor(), None, "holes are asked for in all layers");
    let session = opened(&[structured(), set_meta("vms/a", &both[..1]), go("vms/a")]);
    assert_eq!(session.contexts.floor().map(|snapshot| snapshot.layer), Some(1));
}

#[test]
fn set_meta_context_with_bad_data_is_invalid_and_forgets_the_selection() {
    let bad = [&counted("vms/a")[..], &2u32.to_be_bytes(), &counted(BASE_ALLOCATION)].concat();
    let bytes_behind = [&meta_data("vms/a", &[BASE_ALLOCATION])[..], b"x"].concat();
    let endless = [&counted("vms/a")[..], &u32::MAX.to_be_bytes()].concat();
    let selected = [structured(), set_meta("vms/a", &[BASE_ALLOCATION])];
    for data in [bad, bytes_behind, endless, vec![], vec![0; 20_000]] {
        let expected = if data.len() > 16 << 10 { rep::ERR_TOO_BIG } else { rep::ERR_INVALID };
        let option = option(opt::SET_META_CONTEXT, &data);
        assert_eq!(kinds(&selected, option.clone()), [expected]);
        let session = opened(&[&selected[..], &[option, go("vms/a")]].concat());
        assert!(session.contexts.is_empty());
    }
}

#[test]
fn set_meta_context_holds_only_for_the_export_that_is_opened() {
    let with = |set: &str, queries: &[&str], open: Vec<u8>| {
        opened(&[structured(), set_meta(set, queries), open]).contexts.allocation
    };
    assert_eq!(with("vms/a", &[BASE_ALLOCATION], go("vms/a")), Some(1));
    let export_name = option(opt::EXPORT_NAME, b"vms/a");
    assert_eq!(with("vms/a", &[BASE_ALLOCATION], export_name), Some(1));
    assert_eq!(with("vms/other", &[BASE_ALLOCATION], go("vms/a")), None);
    assert_eq!(with("vms/a", &["base:"], go("vms/a")), None);
}

#[test]
fn set_meta_context_last_one_counts() {
    let first = set_meta("vms/a", &[BASE_ALLOCATION]);
    let session = opened(&[structured(), first, set_meta("vms/a", &[]), go("vms/a")]);
    assert!(session.contexts.is_empty());
}

#[test]
fn receive_while_a_query_waits_consumes_nothing() {
    let mut handshake = Handshake::new(&Limits::default());
    let (mut out, mut input) = (BytesMut::new(), BytesMut::new());
    handshake.greeting(&mut BytesMut::new());
    input.extend_from_slice(&[0, 0, 0, 3]);
    input.extend_from_slice(&go("vms/a"));
    input.extend_from_slice(&go("vms/a"));
    let Ok(Step::Ask(query)) = handshake.receive(&mut input, &mut out) else { panic!("no query") };
    let waiting = input.len();
    assert_eq!(handshake.receive(&mut input, &mut out), Ok(Step::NeedInput));
    assert_eq!((input.len(), out.len()), (waiting, 0));
    assert!(matches!(handshake.answer(catalog(&query), &mut out), Ok(Step::Transmission(_))));
}

#[test]
fn messages_too_long_are_cut_at_a_character() {
    let mut handshake = Handshake::new(&Limits::default());
    let (mut out, mut input) = (BytesMut::new(), BytesMut::new());
    handshake.greeting(&mut BytesMut::new());
    input.extend_from_slice(&[0, 0, 0, 3]);
    input.extend_from_slice(&go("vms/a"));
    assert!(matches!(handshake.receive(&mut input, &mut out), Ok(Step::Ask(_))));
    let message = format!("x{}", "ä".repeat(3000));
    assert_eq!(handshake.answer(Answer::Refused(message), &mut out), Ok(Step::NeedInput));
    assert_eq!(option_replies(&out)[0].2.len(), 4095);
}

#[test]
#[should_panic(expected = "does not answer")]
fn answer_of_the_wrong_kind_is_a_mistake_of_the_caller() {
    let mut handshake = Handshake::new(&Limits::default());
    let (mut out, mut input) = (BytesMut::new(), BytesMut::new());
    handshake.greeting(&mut BytesMut::new());
    input.extend_from_slice(&[&[0, 0, 0, 3], &option(opt::LIST, &[])[..]].concat());
    assert!(matches!(handshake.receive(&mut input, &mut out), Ok(Step::Ask(_))));
    let _ = handshake.answer(Answer::Export(disk()), &mut out);
}
