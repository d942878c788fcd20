//! What was asked of an image since it was opened, for people and their monitoring.

use super::{Command, Request};
use crate::replica::Outcome;

/// Counts of a client's requests that were answered.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    pub reads: u64,
    pub read_bytes: u64,
    pub writes: u64,
    pub written_bytes: u64,
    /// Zeroes and discards.
    pub zeroes: u64,
    pub flushes: u64,
    /// Requests that were answered with an error.
    pub failures: u64,
}

impl Counters {
    pub fn answered(&mut self, request: &Request, outcome: &Outcome) {
        if matches!(outcome, Outcome::Failed(_)) {
            self.failures += 1;
            return;
        }
        match request.command {
            Command::Read => {
                self.reads += 1;
                self.read_bytes += request.length;
            }
            Command::Write => {
                self.writes += 1;
                self.written_bytes += request.length;
            }
            Command::WriteZeroes | Command::Trim => self.zeroes += 1,
            Command::Flush => self.flushes += 1,
            Command::BlockStatus | Command::Cache | Command::Disconnect => {}
        }
    }

    /// Each count by its name.
    pub fn named(&self) -> [(&'static str, u64); 7] {
        [
            ("reads", self.reads),
            ("read_bytes", self.read_bytes),
            ("writes", self.writes),
            ("written_bytes", self.written_bytes),
            ("zeroes", self.zeroes),
            ("flushes", self.flushes),
            ("failures", self.failures),
        ]
    }
}
