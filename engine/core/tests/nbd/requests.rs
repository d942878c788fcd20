//! Requests: cut out of the stream, and judged.

use crate::client::{extended_request, request, session};
use bytes::{BufMut, Bytes, BytesMut};
use hci_engine_core::nbd::constants::{command as cmd, command_flags as flag};
use hci_engine_core::nbd::{
    Addressee, Command, Contexts, Errno, Flags, Limits, Parsed, ProtocolError, ReplyStyle, Request,
    RequestReader, Session, check,
};

const SIZE: u64 = 1 << 20;
const COMMANDS: [Command; 8] = [
    Command::Read,
    Command::Write,
    Command::Disconnect,
    Command::Flush,
    Command::Trim,
    Command::Cache,
    Command::WriteZeroes,
    Command::BlockStatus,
];

fn reader() -> RequestReader {
    RequestReader::new(&session(ReplyStyle::Structured))
}

fn judge(
    session: &Session,
    command: Command,
    flags: u16,
    offset: u64,
    length: u64,
) -> Option<Errno> {
    let flags = Flags(flags);
    let request = Request { command, flags, cookie: 1, offset, length, payload: Bytes::new() };
    check(&request, session).err().map(|refusal| refusal.errno)
}

/// The errno for a request of an ordinary structured session.
fn refused(command: Command, flags: u16, offset: u64, length: u64) -> Option<Errno> {
    judge(&session(ReplyStyle::Structured), command, flags, offset, length)
}

#[test]
fn request_of_each_command_is_read() {
    for command in COMMANDS {
        let payload: &[u8] = if command == Command::Write { b"data" } else { b"" };
        let mut input = BytesMut::from(&request(1, command as u16, 5, 512, 4, payload)[..]);
        let Ok(Some(Parsed::Request(parsed))) = reader().next(&mut input) else {
            panic!("{command:?} was not read");
        };
        assert_eq!((parsed.command, parsed.flags, parsed.cookie), (command, Flags(1), 5));
        assert_eq!((parsed.offset, parsed.length), (512, 4));
        assert_eq!(parsed.payload, payload);
        assert!(input.is_empty());
    }
}

#[test]
fn request_payload_is_not_copied() {
    let mut input = BytesMut::from(&request(0, cmd::WRITE, 5, 0, 4, b"data")[..]);
    let payload_at = input[28..].as_ptr();
    let Ok(Some(Parsed::Request(parsed))) = reader().next(&mut input) else { panic!("no request") };
    assert_eq!(parsed.payload.as_ptr(), payload_at);
}

#[test]
fn request_magic_wrong_ends_the_connection() {
    let mut input = BytesMut::from(&[0x47; 28][..]);
    assert_eq!(reader().next(&mut input), Err(ProtocolError::RequestMagic(0x4747_4747)));
}

#[test]
fn request_with_a_command_not_known_is_refused_and_the_next_is_read() {
    let mut reader = reader();
    let stream = [request(0, 99, 5, 0, 4096, b""), request(0, cmd::FLUSH, 6, 0, 0, b"")].concat();
    let mut input = BytesMut::from(&stream[..]);
    let first = reader.next(&mut input);
    assert!(matches!(
        first,
        Ok(Some(Parsed::Refused { to: Addressee { cookie: 5, .. }, errno: Errno::Invalid, .. }))
    ));
    assert!(matches!(reader.next(&mut input), Ok(Some(Parsed::Request(_)))));
}

#[test]
fn write_too_long_is_drained_without_keeping_it_and_the_next_is_read() {
    let mut reader = reader();
    let length = Limits::default().max_payload + 1;
    let mut input = BytesMut::from(&request(0, cmd::WRITE, 5, 0, length, b"")[..]);
    assert_eq!(reader.next(&mut input), Ok(None));
    let mut left = length as usize;
    while left > 0 {
        assert_eq!(reader.wanted(&input), 0);
        let now = left.min(1 << 20);
        input.put_bytes(1, now);
        left -= now;
        if left > 0 {
            assert_eq!(reader.next(&mut input), Ok(None));
            assert!(input.is_empty());
        }
    }
    input.extend_from_slice(&request(0, cmd::READ, 6, 0, 1, b""));
    let first = reader.next(&mut input);
    assert!(matches!(
        first,
        Ok(Some(Parsed::Refused { to: Addressee { cookie: 5, .. }, errno: Errno::Invalid, .. }))
    ));
    let Ok(Some(Parsed::Request(next))) = reader.next(&mut input) else { panic!("no request") };
    assert_eq!(next.cookie, 6);
}

#[test]
fn write_of_the_largest_payload_is_read() {
    let length = Limits::default().max_payload;
    let payload = vec![3; length as usize];
    let mut input = BytesMut::from(&request(0, cmd::WRITE, 5, 0, length, &payload)[..]);
    let Ok(Some(Parsed::Request(parsed))) = reader().next(&mut input) else { panic!("no request") };
    assert_eq!(parsed.payload, payload);
}

#[test]
fn wanted_says_what_makes_the_next_request_whole() {
    let whole = request(0, cmd::WRITE, 5, 0, 4, b"data");
    let wanted = |length: usize| reader().wanted(&BytesMut::from(&whole[..length]));
    assert_eq!(wanted(0), 28);
    assert_eq!(wanted(27), 1);
    assert_eq!(wanted(28), 4);
    assert_eq!(wanted(31), 1);
    assert_eq!(wanted(32), 0);
    let longest = request(0, cmd::WRITE, 5, 0, 32 << 20, b"");
    assert_eq!(reader().wanted(&BytesMut::from(&longest[..])), 32 << 20);
    let too_long = request(0, cmd::WRITE, 5, 0, u32::MAX, b"");
    assert_eq!(reader().wanted(&BytesMut::from(&too_long[..])), 0);
    let read = request(0, cmd::READ, 5, 0, 4096, b"");
    assert_eq!(reader().wanted(&BytesMut::from(&read[..])), 0);
}

fn extended_reader() -> RequestReader {
    RequestReader::new(&session(ReplyStyle::Extended))
}

/// What of a stream of extended requests is refused, and what is taken: (cookie, taken).
fn outcomes(stream: &[Vec<u8>]) -> Vec<(u64, bool)> {
    let (mut reader, mut input) = (extended_reader(), BytesMut::from(&stream.concat()[..]));
    let mut found = Vec::new();
    while let Ok(Some(parsed)) = reader.next(&mut input) {
        found.push(match parsed {
            Parsed::Request(request) => (request.cookie, true),
            Parsed::Refused { to, .. } => (to.cookie, false),
        });
    }
    assert!(input.is_empty(), "every request was read to its end");
    found
}

#[test]
fn extended_payload_where_none_belongs_is_read_past_and_refused() {
    let stream = [
        extended_request(flag::PAYLOAD_LEN, cmd::READ, 1, 0, 5, b"stray"),
        extended_request(flag::PAYLOAD_LEN, cmd::BLOCK_STATUS, 2, 0, 12, b"which to say"),
        extended_request(flag::PAYLOAD_LEN, cmd::FLUSH, 3, 0, 0, b""),
        extended_request(flag::PAYLOAD_LEN, 99, 4, 0, 3, b"abc"),
        extended_request(flag::PAYLOAD_LEN, cmd::WRITE, 5, 0, 4, b"data"),
    ];
    let taken = [(1, false), (2, false), (3, false), (4, false), (5, true)];
    assert_eq!(outcomes(&stream), taken);
}

/// QEMU's writes did not say that they have a payload: they were refused, and the payload was taken for
/// the next request's header. A guest of QEMU 10 could not write.
#[test]
fn extended_write_has_its_payload_whether_it_says_so_or_not() {
    let stream = [
        extended_request(0, cmd::WRITE, 1, 0, 4, b"data"),
        extended_request(flag::FUA, cmd::WRITE, 2, 4, 3, b"abc"),
        extended_request(flag::PAYLOAD_LEN, cmd::WRITE, 3, 0, 4, b"data"),
        extended_request(0, cmd::READ, 4, 0, 4, b""),
    ];
    assert_eq!(outcomes(&stream), [(1, true), (2, true), (3, true), (4, true)]);
}

#[test]
fn extended_payload_beyond_all_measure_ends_the_connection() {
    let length = 1 << 32;
    let write = extended_request(flag::PAYLOAD_LEN, cmd::WRITE, 1, 0, length, b"");
    let refused = extended_reader().next(&mut BytesMut::from(&write[..]));
    assert_eq!(refused, Err(ProtocolError::PayloadLength(length)));
}

#[test]
fn extended_and_compact_requests_do_not_mix() {
    let compact = request(0, cmd::READ, 1, 0, 1, b"    ");
    let refused = extended_reader().next(&mut BytesMut::from(&compact[..]));
    assert_eq!(refused, Err(ProtocolError::RequestMagic(0x2560_9513)));
    let extended = extended_request(0, cmd::READ, 1, 0, 1, b"");
    let refused = reader().next(&mut BytesMut::from(&extended[..]));
    assert_eq!(refused, Err(ProtocolError::RequestMagic(0x21e4_1c71)));
}

#[test]
fn arriving_counts_a_write_from_its_header_to_its_end() {
    let whole = request(0, cmd::WRITE, 5, 0, 4, b"data");
    let arriving = |length: usize| reader().arriving(&BytesMut::from(&whole[..length]));
    assert_eq!([0, 27, 28, 31, 32].map(arriving), [0, 0, 32, 32, 0]);
}

#[test]
fn check_range_past_the_end_depends_on_the_command() {
    let past_the_end = [
        (Command::Read, Errno::Invalid),
        (Command::Trim, Errno::Invalid),
        (Command::Cache, Errno::Invalid),
        (Command::BlockStatus, Errno::Invalid),
        (Command::Write, Errno::NoSpace),
        (Command::WriteZeroes, Errno::NoSpace),
    ];
    for (command, errno) in past_the_end {
        assert_eq!(refused(command, 0, SIZE - 1, 1), None);
        assert_eq!(refused(command, 0, SIZE - 1, 2), Some(errno));
        assert_eq!(refused(command, 0, SIZE, 1), Some(errno));
        assert_eq!(refused(command, 0, u64::MAX, 1), Some(errno));
        assert_eq!(refused(command, 0, u64::MAX - 1, 4096), Some(errno));
    }
}

#[test]
fn check_requests_of_no_bytes_do_nothing_but_block_status() {
    use Command::*;
    for command in [Read, Write, Trim, Cache, WriteZeroes] {
        assert_eq!(refused(command, 0, 0, 0), None);
        assert_eq!(refused(command, 0, SIZE, 0), None);
        assert!(refused(command, 0, SIZE + 1, 0).is_some());
    }
    assert_eq!(refused(BlockStatus, 0, 0, 0), Some(Errno::Invalid));
}

#[test]
fn check_lengths_without_data_are_not_bound_by_the_payload() {
    let mut session = session(ReplyStyle::Structured);
    session.export.size_bytes = 1 << 40;
    use Command::*;
    for command in [Trim, Cache, WriteZeroes, BlockStatus] {
        assert_eq!(judge(&session, command, 0, 0, 1 << 40), None);
    }
    for command in [Read, Write] {
        assert_eq!(judge(&session, command, 0, 0, 32 << 20), None);
        assert_eq!(judge(&session, command, 0, 0, (32 << 20) + 1), Some(Errno::Invalid));
    }
}

#[test]
fn check_flags_belong_to_their_commands() {
    use Command::*;
    let all = [flag::FUA, flag::NO_HOLE, flag::DF, flag::REQ_ONE, flag::FAST_ZERO, 1 << 5, 1 << 15];
    let allowed: [(Command, &[u16]); 7] = [
        (Read, &[flag::FUA, flag::DF]),
        (Write, &[flag::FUA]),
        (Flush, &[flag::FUA]),
        (Trim, &[flag::FUA]),
        (Cache, &[flag::FUA]),
        (WriteZeroes, &[flag::FUA, flag::NO_HOLE, flag::FAST_ZERO]),
        (BlockStatus, &[flag::FUA, flag::REQ_ONE]),
    ];
    for (command, own) in allowed {
        let length = if command == Flush { 0 } else { 1 };
        for flags in all {
            let expected = (!own.contains(&flags)).then_some(Errno::Invalid);
            assert_eq!(refused(command, flags, 0, length), expected, "{command:?} {flags:#x}");
        }
    }
    let simple = session(ReplyStyle::Simple);
    assert_eq!(judge(&simple, Read, flag::DF, 0, 1), Some(Errno::Invalid));
}

#[test]
fn check_read_only_export_takes_no_writes() {
    let mut session = session(ReplyStyle::Structured);
    session.export.read_only = true;
    for command in COMMANDS {
        let length = if command == Command::Flush { 0 } else { 1 };
        let expected = command.writes().then_some(Errno::Permission);
        assert_eq!(judge(&session, command, 0, 0, length), expected, "{command:?}");
    }
}

#[test]
fn check_block_status_needs_its_context() {
    let mut session = session(ReplyStyle::Structured);
    session.contexts = Contexts::default();
    assert_eq!(judge(&session, Command::BlockStatus, 0, 0, 1), Some(Errno::Invalid));
}

#[test]
fn check_flush_with_a_range_is_invalid() {
    assert_eq!(refused(Command::Flush, 0, 0, 0), None);
    assert_eq!(refused(Command::Flush, 0, 1, 0), Some(Errno::Invalid));
    assert_eq!(refused(Command::Flush, 0, 0, 1), Some(Errno::Invalid));
}

#[test]
fn check_alignment_follows_the_minimum_block_size() {
    let mut session = session(ReplyStyle::Structured);
    session.limits.min_block = 512;
    assert_eq!(judge(&session, Command::Read, 0, 512, 512), None);
    assert_eq!(judge(&session, Command::Read, 0, 1, 512), Some(Errno::Invalid));
    assert_eq!(judge(&session, Command::Write, 0, 512, 1), Some(Errno::Invalid));
}

#[test]
fn check_disconnect_is_never_refused() {
    assert_eq!(refused(Command::Disconnect, u16::MAX, u64::MAX, u64::MAX), None);
}

#[test]
fn errno_of_the_system_becomes_one_that_clients_know() {
    let table = [
        (1, Errno::Permission),    // EPERM
        (13, Errno::Permission),   // EACCES
        (30, Errno::Permission),   // EROFS
        (28, Errno::NoSpace),      // ENOSPC
        (122, Errno::NoSpace),     // EDQUOT
        (27, Errno::NoSpace),      // EFBIG
        (12, Errno::NoMemory),     // ENOMEM
        (95, Errno::NotSupported), // EOPNOTSUPP
        (75, Errno::Overflow),     // EOVERFLOW
        (108, Errno::Shutdown),    // ESHUTDOWN
        (5, Errno::Io),            // EIO
        (22, Errno::Io),           // EINVAL of a disk is no fault of the guest
        (110, Errno::Io),          // ETIMEDOUT
    ];
    for (number, errno) in table {
        assert_eq!(Errno::from_system(number), errno, "errno {number}");
    }
    assert_eq!(Errno::NotSupported.code(), 95);
}
