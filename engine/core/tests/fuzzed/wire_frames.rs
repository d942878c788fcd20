//! Any bytes as a stream of frames, whole and byte by byte: no panic, equal frames, equal errors, and
//! never a demand for more than the largest frame.

use bytes::BytesMut;
use hci_engine_core::wire::{
    Frame, FrameReader, HEAD_BYTES_MAX, PAYLOAD_BYTES_MAX, PREFIX_BYTES, WireError,
};

fn read<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> (Vec<Frame>, Option<WireError>) {
    let (mut input, mut frames) = (BytesMut::new(), Vec::new());
    for piece in pieces {
        input.extend_from_slice(piece);
        loop {
            match FrameReader::next(&mut input) {
                Err(error) => return (frames, Some(error)),
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
            }
        }
        let missing = FrameReader::missing(&input);
        assert!((1..=PREFIX_BYTES + HEAD_BYTES_MAX + PAYLOAD_BYTES_MAX).contains(&missing));
    }
    (frames, None)
}

/// Panics where what this module promises does not hold.
pub fn hold(bytes: &[u8]) {
    assert_eq!(read(std::iter::once(bytes)), read(bytes.chunks(1)));
}
