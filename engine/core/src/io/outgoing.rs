//! Where replies are written ([`Sink`]), and a queue of them that a vectored send can take
//! ([`Outgoing`]).

use bytes::{Buf, Bytes, BytesMut};
use std::collections::VecDeque;
use std::io::IoSlice;

/// Takes a reply piece by piece, in the order of the stream.
pub trait Sink {
    /// A few bytes to copy.
    fn bytes(&mut self, bytes: &[u8]);
    /// Data to send from where it lies.
    fn data(&mut self, data: Bytes);
    /// This many zero bytes.
    fn zeroes(&mut self, length: usize);
}

/// What zeroes are sent from; longer runs take several slices.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

#[derive(Debug)]
enum Piece {
    Bytes(Bytes),
    Zeroes(usize),
}

/// What one connection has yet to send. Headers that follow each other share one buffer, data is
/// not copied, and zeroes take no memory. The caller bounds it by [`Outgoing::len`].
#[derive(Debug, Default)]
pub struct Outgoing {
    pieces: VecDeque<Piece>,
    /// Headers after the last piece.
    tail: BytesMut,
    length: usize,
}

impl Outgoing {
    pub fn new() -> Self {
        Outgoing::default()
    }

    /// Bytes to send, zeroes included.
    pub fn len(&self) -> usize {
        self.length
    }

    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Fills `slices` from the front of the queue; returns how many were filled.
    pub fn gather<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let mut filled = 0;
        for piece in &self.pieces {
            let mut zeroes_left = match piece {
                Piece::Bytes(bytes) => {
                    let Some(slice) = slices.get_mut(filled) else { return filled };
                    *slice = IoSlice::new(bytes);
                    filled += 1;
                    continue;
                }
                Piece::Zeroes(length) => *length,
            };
            while zeroes_left > 0 {
                let Some(slice) = slices.get_mut(filled) else { return filled };
                let now = zeroes_left.min(ZEROES.len());
                *slice = IoSlice::new(&ZEROES[..now]);
                filled += 1;
                zeroes_left -= now;
            }
        }
        if let (false, Some(slice)) = (self.tail.is_empty(), slices.get_mut(filled)) {
            *slice = IoSlice::new(&self.tail);
            filled += 1;
        }
        filled
    }

    /// Forgets the first `sent` bytes.
    pub fn advance(&mut self, mut sent: usize) {
        assert!(sent <= self.length, "no more is sent than was queued");
        self.length -= sent;
        while sent > 0 {
            let left = match self.pieces.front_mut() {
                None => return self.tail.advance(sent),
                Some(Piece::Bytes(bytes)) => {
                    let now = sent.min(bytes.len());
                    bytes.advance(now);
                    sent -= now;
                    bytes.len()
                }
                Some(Piece::Zeroes(length)) => {
                    let now = sent.min(*length);
                    *length -= now;
                    sent -= now;
                    *length
                }
            };
            if left == 0 {
                self.pieces.pop_front();
            }
        }
    }

    /// Queues a piece behind the headers that were written before it.
    fn push(&mut self, piece: Piece) {
        if !self.tail.is_empty() {
            self.pieces.push_back(Piece::Bytes(self.tail.split().freeze()));
        }
        self.pieces.push_back(piece);
    }
}

impl Sink for Outgoing {
    fn bytes(&mut self, bytes: &[u8]) {
        self.tail.extend_from_slice(bytes);
        self.length += bytes.len();
    }

    fn data(&mut self, data: Bytes) {
        if !data.is_empty() {
            self.length += data.len();
            self.push(Piece::Bytes(data));
        }
    }

    fn zeroes(&mut self, length: usize) {
        if length > 0 {
            self.length += length;
            self.push(Piece::Zeroes(length));
        }
    }
}
