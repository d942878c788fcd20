//! Any bytes as a client's handshake, whole and byte by byte: no panic, little kept, equal answers.

use bytes::BytesMut;
use hci_engine_core::geometry::SnapshotId;
use hci_engine_core::nbd::{
    Answer, ExportInfo, Handshake, Limits, ProtocolError, Query, Step, TlsMode,
};

fn answer(query: &Query) -> Answer {
    match query {
        Query::List => Answer::Names(vec!["vms/a".to_owned()]),
        Query::Snapshots { name } => Answer::Snapshots(vec![
            (name.clone(), SnapshotId { layer: 1, generation: 2 }),
            ("a".to_owned(), SnapshotId { layer: 7, generation: 9 }),
        ]),
        Query::Info { name } | Query::Go { name } | Query::ExportName { name } => {
            match name.bytes().next() {
                None => Answer::Unavailable("not now".to_owned()),
                Some(b'r') => Answer::Refused("open elsewhere".to_owned()),
                Some(b'u') => Answer::Unknown("no such image".to_owned()),
                Some(_) => Answer::Export(ExportInfo {
                    name: name.clone(),
                    size_bytes: 1 << 30,
                    read_only: name.len() % 2 == 1,
                    multi_conn: false,
                    description: name.clone(),
                }),
            }
        }
    }
}

fn play(limits: &Limits, tls: TlsMode, pieces: impl Iterator<Item = impl AsRef<[u8]>>) -> Played {
    let mut handshake = Handshake::new(limits).with_tls(tls);
    let (mut input, mut out) = (BytesMut::new(), BytesMut::new());
    handshake.greeting(&mut out);
    let mut end = Ok(Step::NeedInput);
    for piece in pieces {
        input.extend_from_slice(piece.as_ref());
        while end == Ok(Step::NeedInput) {
            end = handshake.receive(&mut input, &mut out);
            let Ok(Step::Ask(query)) = &end else { break };
            end = handshake.answer(answer(query), &mut out);
        }
        if end == Ok(Step::NeedInput) {
            assert!(input.len() <= 16 + limits.max_option_bytes as usize);
        }
    }
    (end, out, input)
}

/// How it ended, what was sent, what was left.
type Played = (Result<Step, ProtocolError>, BytesMut, BytesMut);

/// Panics where what this module promises does not hold.
pub fn hold(bytes: &[u8]) {
    let limits = Limits { max_option_bytes: 512, max_options: 20, ..Limits::default() };
    for tls in [TlsMode::Off, TlsMode::Optional, TlsMode::Required] {
        let whole = play(&limits, tls, std::iter::once(bytes));
        let bytewise = play(&limits, tls, bytes.chunks(1));
        assert_eq!(whole, bytewise);
    }
}
