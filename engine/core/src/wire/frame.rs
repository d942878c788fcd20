//! Frames as bytes: the prefix, its checksum, and cutting frames out of a stream without copying.

use super::{HEAD_BYTES_MAX, PAYLOAD_BYTES_MAX, PREFIX_BYTES, REPLY, Status, WireError};
use crate::checksum::crc32c;
use bytes::{Buf, BufMut, Bytes, BytesMut};

/// One whole frame. `head` and `payload` share the memory they arrived in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub status: Status,
    /// The image's number on this connection, chosen by the gateway and echoed; 0: none.
    pub channel: u32,
    /// Chosen by the asker, echoed in the reply.
    pub tag: u64,
    pub head: Bytes,
    pub payload: Bytes,
}

impl Frame {
    pub fn is_reply(&self) -> bool {
        self.kind & REPLY != 0
    }
}

/// What a frame says before its head.
#[derive(Clone, Copy, Debug)]
pub struct Prefix {
    pub kind: u8,
    pub flags: u8,
    pub status: Status,
    pub channel: u32,
    pub tag: u64,
}

impl Prefix {
    /// Of a request.
    pub fn request(kind: u8, flags: u8, channel: u32, tag: u64) -> Prefix {
        Prefix { kind, flags, status: Status::Ok, channel, tag }
    }

    /// Of the reply to `request`.
    pub fn reply(request: &Frame, status: Status) -> Prefix {
        let (channel, tag) = (request.channel, request.tag);
        Prefix { kind: request.kind | REPLY, flags: 0, status, channel, tag }
    }
}

/// Appends prefix and head of a frame to `out`; the payload of `payload_bytes` follows separately,
/// so that it need not be copied. `write_head` appends the head.
pub fn encode(
    out: &mut BytesMut,
    prefix: Prefix,
    payload_bytes: usize,
    write_head: impl FnOnce(&mut BytesMut),
) {
    assert!(payload_bytes <= PAYLOAD_BYTES_MAX, "payloads are cut to size before they get here");
    let start = out.len();
    out.put_bytes(0, 12);
    out.put_u8(prefix.kind);
    out.put_u8(prefix.flags);
    out.put_u16_le(prefix.status as u16);
    out.put_u32_le(prefix.channel);
    out.put_u64_le(prefix.tag);
    write_head(out);
    let head_bytes = out.len() - start - PREFIX_BYTES;
    assert!(head_bytes <= HEAD_BYTES_MAX, "a head of {head_bytes} bytes is over the limit");
    let frame = &mut out[start..];
    frame[0..4].copy_from_slice(&(head_bytes as u32).to_le_bytes());
    frame[4..8].copy_from_slice(&(payload_bytes as u32).to_le_bytes());
    let checksum = head_checksum(frame);
    frame[8..12].copy_from_slice(&checksum.to_le_bytes());
}

/// CRC32C of prefix and head, the checksum's own field taken as zero.
fn head_checksum(frame: &[u8]) -> u32 {
    let first = crc32c(&frame[0..8]);
    let first = ::crc32c::crc32c_append(first, &[0; 4]);
    ::crc32c::crc32c_append(first, &frame[12..])
}

/// Kind, flags, channel and tag of an encoded frame, and its head.
pub fn decode(frame: &Bytes) -> (Prefix, Bytes) {
    let head_bytes = lengths(frame).0 as usize;
    let mut fields = &frame[12..PREFIX_BYTES];
    let (kind, flags, _status) = (fields.get_u8(), fields.get_u8(), fields.get_u16_le());
    let prefix = Prefix::request(kind, flags, fields.get_u32_le(), fields.get_u64_le());
    (prefix, frame.slice(PREFIX_BYTES..PREFIX_BYTES + head_bytes))
}

/// Cuts frames out of what was received.
#[derive(Default)]
pub struct FrameReader;

impl FrameReader {
    /// Bytes that are still missing from the frame at the front of `input` (at least a prefix).
    pub fn missing(input: &BytesMut) -> usize {
        if input.len() < PREFIX_BYTES {
            return PREFIX_BYTES - input.len();
        }
        let (head, payload) = lengths(input);
        (PREFIX_BYTES + head as usize + payload as usize).saturating_sub(input.len())
    }

    /// The next whole frame, or none yet.
    ///
    /// # Errors
    /// The stream cannot be trusted any more: close the connection.
    pub fn next(input: &mut BytesMut) -> Result<Option<Frame>, WireError> {
        if input.len() < PREFIX_BYTES {
            return Ok(None);
        }
        let (head_bytes, payload_bytes) = lengths(input);
        if head_bytes as usize > HEAD_BYTES_MAX {
            return Err(WireError::HeadTooLong(head_bytes));
        }
        if payload_bytes as usize > PAYLOAD_BYTES_MAX {
            return Err(WireError::PayloadTooLong(payload_bytes));
        }
        let head_end = PREFIX_BYTES + head_bytes as usize;
        let frame_end = head_end + payload_bytes as usize;
        if input.len() < frame_end {
            return Ok(None);
        }
        let mut prefix = &input[8..PREFIX_BYTES];
        if prefix.get_u32_le() != head_checksum(&input[..head_end]) {
            return Err(WireError::BadHeadChecksum);
        }
        let kind = prefix.get_u8();
        let flags = prefix.get_u8();
        let status = prefix.get_u16_le();
        let status = Status::from_wire(status).ok_or(WireError::UnknownStatus(status))?;
        let channel = prefix.get_u32_le();
        let tag = prefix.get_u64_le();
        let mut whole = input.split_to(frame_end).freeze();
        let payload = whole.split_off(head_end);
        whole.advance(PREFIX_BYTES);
        Ok(Some(Frame { kind, flags, status, channel, tag, head: whole, payload }))
    }
}

fn lengths(input: &[u8]) -> (u32, u32) {
    let mut prefix = &input[..8];
    (prefix.get_u32_le(), prefix.get_u32_le())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample(head: &[u8], payload: &[u8]) -> BytesMut {
        let mut out = BytesMut::new();
        encode(&mut out, Prefix::request(7, 1, 9, 42), payload.len(), |h| h.put_slice(head));
        out.put_slice(payload);
        out
    }

    #[test]
    fn frame_fed_byte_by_byte_comes_out_whole() {
        let bytes = sample(b"head", b"payload");
        let mut input = BytesMut::new();
        for (i, byte) in bytes.iter().enumerate() {
            assert_eq!(FrameReader::next(&mut input), Ok(None), "after {i} bytes");
            assert!(FrameReader::missing(&input) > 0);
            input.put_u8(*byte);
        }
        let frame = FrameReader::next(&mut input).expect("valid").expect("whole");
        assert_eq!((&frame.head[..], &frame.payload[..]), (&b"head"[..], &b"payload"[..]));
        assert_eq!((frame.channel, frame.tag), (9, 42));
        assert!(input.is_empty());
    }

    #[test]
    fn frame_over_the_limits_is_refused_before_it_is_buffered() {
        let mut bytes = sample(b"", b"");
        bytes[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(FrameReader::next(&mut bytes), Err(WireError::PayloadTooLong(u32::MAX)));
    }

    proptest! {
        #[test]
        fn frame_with_any_flipped_head_bit_is_refused(bit in 0usize..(32 * 8)) {
            let mut bytes = sample(b"head", b"");
            bytes[bit / 8] ^= 1 << (bit % 8);
            let read = FrameReader::next(&mut bytes);
            // A flipped length may make the frame look longer than what has arrived.
            prop_assert!(read.is_err() || read == Ok(None), "{:?}", read);
        }

        #[test]
        fn reader_never_panics_on_garbage(garbage in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut input = BytesMut::from(&garbage[..]);
            while let Ok(Some(_)) = FrameReader::next(&mut input) {}
        }
    }
}
