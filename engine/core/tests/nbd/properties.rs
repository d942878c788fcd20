//! Whatever bytes come, in whatever pieces: no panic, no growth, and always the same answer.

use crate::client::{extended_request, info_data, meta_data, option, play, request, session};
use bytes::BytesMut;
use hci_engine_core::nbd::{Limits, Parsed, ProtocolError, ReplyStyle, RequestReader, check};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

/// Cuts `bytes` at the given places.
fn cut<'a>(bytes: &'a [u8], places: &[Index]) -> Vec<&'a [u8]> {
    let mut places: Vec<usize> = places.iter().map(|place| place.index(bytes.len() + 1)).collect();
    places.sort_unstable();
    let mut pieces = Vec::new();
    let mut from = 0;
    for to in places.into_iter().chain([bytes.len()]) {
        pieces.push(&bytes[from..to]);
        from = to;
    }
    pieces
}

/// One option: often well formed, sometimes not.
fn any_option() -> impl Strategy<Value = Vec<u8>> {
    let name = prop_oneof![Just("vms/a"), Just("vms/busy"), Just("none"), Just("")];
    let query = prop_oneof![
        Just("base:"),
        Just("base:allocation"),
        Just("qemu:allocation-depth"),
        Just("")
    ];
    let info = (6u32..8, name.clone(), vec(0u16..5, 0..4))
        .prop_map(|(number, name, kinds)| option(number, &info_data(name, &kinds)));
    let meta = (9u32..11, name, vec(query, 0..4))
        .prop_map(|(number, name, queries)| option(number, &meta_data(name, &queries)));
    let empty = (0u32..14).prop_map(|number| option(number, &[]));
    let wild = (0u32..14, vec(any::<u8>(), 0..300)).prop_map(|(n, data)| option(n, &data));
    prop_oneof![3 => info, 3 => meta, 3 => empty, 2 => wild, 1 => vec(any::<u8>(), 0..40)]
}

/// What a client could send after the greeting.
fn any_handshake() -> impl Strategy<Value = Vec<u8>> {
    let flags = prop_oneof![4 => 0u32..4, 1 => any::<u32>()];
    (flags, vec(any_option(), 0..8))
        .prop_map(|(flags, options)| [flags.to_be_bytes().to_vec(), options.concat()].concat())
}

/// Limits so small that long options and long writes are cheap to make.
fn small() -> Limits {
    Limits { max_option_bytes: 200, max_payload: 64, max_options: 6, ..Limits::default() }
}

const STYLES: [ReplyStyle; 3] = [ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended];

fn any_extended_request() -> impl Strategy<Value = Vec<u8>> {
    let header = (any::<u16>(), 0u16..10, any::<u64>(), any::<u64>(), 0u64..100);
    let whole = header.prop_map(|(flags, command, cookie, offset, length)| {
        let has_payload = command == 1 || flags & 1 << 5 != 0;
        let payload = if has_payload { vec![7; length as usize] } else { vec![] };
        extended_request(flags, command, cookie, offset, length, &payload)
    });
    prop_oneof![9 => whole, 1 => vec(any::<u8>(), 0..60)]
}

fn any_request() -> impl Strategy<Value = Vec<u8>> {
    let header = (any::<u16>(), 0u16..10, any::<u64>(), any::<u64>(), 0u32..100);
    let whole = header.prop_map(|(flags, command, cookie, offset, length)| {
        let payload = if command == 1 { vec![7; length as usize] } else { vec![] };
        request(flags, command, cookie, offset, length, &payload)
    });
    prop_oneof![9 => whole, 1 => vec(any::<u8>(), 0..60)]
}

/// Everything that a reader makes of the pieces, until it gives up; checks its bounds on the way.
fn parse(style: ReplyStyle, pieces: &[&[u8]]) -> (Vec<Parsed>, Option<ProtocolError>) {
    let mut session = session(style);
    session.limits = small();
    let mut reader = RequestReader::new(&session);
    let (mut input, mut parsed) = (BytesMut::new(), Vec::new());
    for piece in pieces {
        input.extend_from_slice(piece);
        loop {
            let wanted = reader.wanted(&input);
            match reader.next(&mut input) {
                Err(error) => return (parsed, Some(error)),
                Ok(Some(next)) => {
                    assert_eq!(wanted, 0, "nothing more was wanted");
                    if let Parsed::Request(request) = &next {
                        let _ = check(request, &session);
                    }
                    parsed.push(next);
                }
                Ok(None) => break,
            }
        }
        assert!(input.len() < 32 + 64, "less than a request is kept");
    }
    (parsed, None)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn handshake_in_any_pieces_gives_the_same_outcome(
        input in any_handshake(),
        places in vec(any::<Index>(), 0..6),
        limits in prop_oneof![Just(Limits::default()), Just(small())],
    ) {
        let whole = play(&limits, &[&input]);
        let cut_up = play(&limits, &cut(&input, &places));
        let bytewise = play(&limits, &input.chunks(1).collect::<Vec<_>>());
        for other in [&cut_up, &bytewise] {
            prop_assert_eq!(&other.out, &whole.out);
            prop_assert_eq!(&other.queries, &whole.queries);
            prop_assert_eq!(&other.end, &whole.end);
            prop_assert_eq!(&other.rest, &whole.rest);
            prop_assert!(other.kept_bytes <= 16 + limits.max_option_bytes as usize);
        }
    }

    #[test]
    fn handshake_of_arbitrary_bytes_never_panics(input in vec(any::<u8>(), 0..2000)) {
        let outcome = play(&small(), &[&[0, 0, 0, 3], &input]);
        prop_assert!(outcome.out.len() <= 6 * 5000);
    }

    #[test]
    fn requests_in_any_pieces_are_the_same(
        requests in vec(any_request(), 0..8),
        places in vec(any::<Index>(), 0..6),
    ) {
        let input = requests.concat();
        let parse = |pieces: &[&[u8]]| parse(ReplyStyle::Structured, pieces);
        let whole = parse(&[&input]);
        prop_assert_eq!(&parse(&cut(&input, &places)), &whole);
        prop_assert_eq!(&parse(&input.chunks(1).collect::<Vec<_>>()), &whole);
    }

    #[test]
    fn extended_requests_in_any_pieces_are_the_same(
        requests in vec(any_extended_request(), 0..8),
        places in vec(any::<Index>(), 0..6),
    ) {
        let input = requests.concat();
        let parse = |pieces: &[&[u8]]| parse(ReplyStyle::Extended, pieces);
        let whole = parse(&[&input]);
        prop_assert_eq!(&parse(&cut(&input, &places)), &whole);
        prop_assert_eq!(&parse(&input.chunks(1).collect::<Vec<_>>()), &whole);
    }

    #[test]
    fn requests_of_arbitrary_bytes_never_panic(input in vec(any::<u8>(), 0..500)) {
        for style in STYLES {
            parse(style, &[&input]);
        }
    }
}
