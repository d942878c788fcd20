//! Flushes: one sync of the log, as a job that runs in any thread.

use std::sync::Arc;

use crate::geometry::ImageId;
use crate::rules::{Rule, broken};

use super::disk::{DiskResult, FileRef};
use super::log::{Class, SyncGate};
use super::record::{Header, Kind};
use super::{Store, StoreError};

/// Makes everything appended before it durable.
#[must_use = "run the job and hand the outcome to finish_sync"]
pub struct SyncJob {
    gate: Arc<SyncGate>,
    files: Vec<FileRef>,
    lsn: u64,
    flush_number: u64,
}

/// What a sync came to.
#[must_use = "hand it to finish_sync"]
pub struct SyncDone {
    lsn: u64,
    flush_number: u64,
    outcome: DiskResult<()>,
}

impl SyncJob {
    /// Everything up to this lsn will be durable.
    pub fn lsn(&self) -> u64 {
        self.lsn
    }

    /// Syncs; blocks.
    pub fn run(self) -> SyncDone {
        let outcome = self.gate.sync(&self.files);
        SyncDone { lsn: self.lsn, flush_number: self.flush_number, outcome }
    }
}

impl Store {
    /// Appends what is staged, with a flush mark, and gives the job that makes all of it durable;
    /// `None` where everything is durable already. Several may be under way.
    pub fn begin_sync(&mut self) -> Result<Option<SyncJob>, StoreError> {
        self.check()?;
        if self.log.next_lsn() - 1 == self.log.durable_lsn() {
            return Ok(None);
        }
        let flush_number = self.state.flush_number + 1;
        let header = Header::new(Kind::Flush, ImageId([0; 16]));
        match self.stage_small(header, &flush_number.to_le_bytes(), Class::Flush) {
            Ok(_) => self.state.flush_number = flush_number,
            // Without room for its mark the flush shares the former one's number.
            Err(StoreError::LogFull) => {}
            Err(error) => return Err(error),
        }
        self.append()?;
        Ok(Some(SyncJob {
            gate: Arc::clone(&self.log.gate),
            files: self.log.unsynced(),
            lsn: self.log.appended_lsn(),
            flush_number: self.state.flush_number,
        }))
    }

    /// Takes a sync's outcome over and gives the durable lsn. A failure ends the store.
    pub fn finish_sync(&mut self, done: SyncDone) -> Result<u64, StoreError> {
        self.check()?;
        if !broken(Rule::FailedSyncEnds) {
            done.outcome.map_err(|errno| self.fail(errno))?;
        }
        self.log.synced(done.lsn);
        self.synced_flush_number = self.synced_flush_number.max(done.flush_number);
        Ok(self.log.durable_lsn())
    }
}
