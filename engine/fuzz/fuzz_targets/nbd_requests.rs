//! Any bytes as a client's requests, whole and byte by byte: no panic, little kept, equal requests.
#![no_main]

use bytes::BytesMut;
use hci_engine_core::nbd::{
    ExportInfo, Limits, Parsed, ProtocolError, ReplyStyle, RequestReader, Session, check,
};
use libfuzzer_sys::fuzz_target;

const MAX_PAYLOAD: u32 = 64;

fn session() -> Session {
    Session {
        export: ExportInfo {
            name: "vms/a".to_owned(),
            size_bytes: 1 << 30,
            read_only: false,
            multi_conn: false,
            description: String::new(),
        },
        limits: Limits { max_payload: MAX_PAYLOAD, ..Limits::default() },
        replies: ReplyStyle::Structured,
        base_allocation: Some(1),
        no_zeroes: true,
    }
}

fn parse<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> (Vec<Parsed>, Option<ProtocolError>) {
    let session = session();
    let mut reader = RequestReader::new(&session);
    let (mut input, mut parsed) = (BytesMut::new(), Vec::new());
    for piece in pieces {
        input.extend_from_slice(piece);
        loop {
            let wanted = reader.wanted(&input);
            assert!(wanted <= 28 + MAX_PAYLOAD as usize);
            match reader.next(&mut input) {
                Err(error) => return (parsed, Some(error)),
                Ok(None) => break,
                Ok(Some(next)) => {
                    assert_eq!(wanted, 0);
                    if let Parsed::Request(request) = &next
                        && check(request, &session).is_ok()
                        && request.command.writes()
                    {
                        let end = request.offset + u64::from(request.length);
                        assert!(end <= session.export.size_bytes);
                    }
                    parsed.push(next);
                }
            }
        }
        assert!(input.len() < 28 + MAX_PAYLOAD as usize);
    }
    (parsed, None)
}

fuzz_target!(|bytes: &[u8]| {
    assert_eq!(parse(std::iter::once(bytes)), parse(bytes.chunks(1)));
});
