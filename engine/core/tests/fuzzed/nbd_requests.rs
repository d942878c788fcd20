//! Any bytes as a client's requests, whole and byte by byte: no panic, little kept, equal requests.

use bytes::BytesMut;
use hci_engine_core::nbd::{
    Contexts, ExportInfo, Limits, Parsed, ProtocolError, ReplyStyle, RequestReader, Session, check,
};

const MAX_PAYLOAD: u32 = 64;

fn session(replies: ReplyStyle) -> Session {
    Session {
        export: ExportInfo {
            name: "vms/a".to_owned(),
            size_bytes: 1 << 30,
            read_only: false,
            multi_conn: false,
            description: String::new(),
        },
        limits: Limits { max_payload: MAX_PAYLOAD, ..Limits::default() },
        replies,
        contexts: Contexts { allocation: Some(1), depth: None, ..Contexts::default() },
        no_zeroes: true,
    }
}

type Outcome = (Vec<Parsed>, Option<ProtocolError>);

fn parse<'a>(replies: ReplyStyle, pieces: impl Iterator<Item = &'a [u8]>) -> Outcome {
    let session = session(replies);
    let mut reader = RequestReader::new(&session);
    let (mut input, mut parsed) = (BytesMut::new(), Vec::new());
    for piece in pieces {
        input.extend_from_slice(piece);
        loop {
            let wanted = reader.wanted(&input);
            assert!(wanted <= 32 + MAX_PAYLOAD as usize);
            match reader.next(&mut input) {
                Err(error) => return (parsed, Some(error)),
                Ok(None) => break,
                Ok(Some(next)) => {
                    assert_eq!(wanted, 0);
                    if let Parsed::Request(request) = &next
                        && check(request, &session).is_ok()
                        && request.command.writes()
                    {
                        let end = request.offset + request.length;
                        assert!(end <= session.export.size_bytes);
                    }
                    parsed.push(next);
                }
            }
        }
        assert!(input.len() < 32 + MAX_PAYLOAD as usize);
    }
    (parsed, None)
}

/// Panics where what this module promises does not hold.
pub fn hold(bytes: &[u8]) {
    for replies in [ReplyStyle::Structured, ReplyStyle::Extended] {
        let whole = parse(replies, std::iter::once(bytes));
        assert_eq!(whole, parse(replies, bytes.chunks(1)));
    }
}
