//! What a node has done since it started, for people and their monitoring.

use super::requests::Outcome;
use crate::wire::{Frame, Status, kind};

/// Counts of requests that were answered, and of work in the background.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    pub reads: u64,
    pub read_bytes: u64,
    pub writes: u64,
    pub written_bytes: u64,
    pub zeroes: u64,
    pub flushes: u64,
    /// Blocks' worth of data taken over from other replicas.
    pub copied_bytes: u64,
    /// Requests that were answered with an error.
    pub refused: u64,
    /// Requests that met a block which does not match its checksum.
    pub bad_blocks: u64,
    pub syncs: u64,
    pub checkpoints: u64,
    /// Checkpoints that ended for want of space.
    pub checkpoints_without_space: u64,
}

impl Counters {
    /// Counts one request and what became of it; one that waits is counted when it no longer does.
    pub(super) fn request(&mut self, frame: &Frame, outcome: &Outcome) {
        let given = match outcome {
            Outcome::Answer { status: Status::Ok, payload, .. } => payload.len() as u64,
            Outcome::Answer { status, .. } => {
                self.refused += 1;
                self.bad_blocks += u64::from(*status == Status::BadBlock);
                return;
            }
            Outcome::Placed { bytes, .. } => *bytes as u64,
            Outcome::AnswerDurable { .. } => 0,
            Outcome::Park | Outcome::Again | Outcome::Close => return,
        };
        let taken = frame.payload.len() as u64;
        match frame.kind {
            kind::READ | kind::READ_INTO => {
                self.reads += 1;
                self.read_bytes += given;
            }
            kind::WRITE => {
                self.writes += 1;
                self.written_bytes += taken;
            }
            kind::ZERO => self.zeroes += 1,
            kind::FLUSH => self.flushes += 1,
            kind::COPY => self.copied_bytes += taken,
            _ => {}
        }
    }

    /// Each count by its name.
    pub fn named(&self) -> [(&'static str, u64); 12] {
        [
            ("reads", self.reads),
            ("read_bytes", self.read_bytes),
            ("writes", self.writes),
            ("written_bytes", self.written_bytes),
            ("zeroes", self.zeroes),
            ("flushes", self.flushes),
            ("copied_bytes", self.copied_bytes),
            ("refused", self.refused),
            ("bad_blocks", self.bad_blocks),
            ("syncs", self.syncs),
            ("checkpoints", self.checkpoints),
            ("checkpoints_without_space", self.checkpoints_without_space),
        ]
    }
}
