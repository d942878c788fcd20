//! Blocking work of the store in threads of its own: syncs in one, checkpoints in another, so that a
//! flush never waits for a checkpoint to finish.

use crate::io::Waker;
use crate::store::{CheckpointDone, CheckpointJob, SyncDone, SyncJob};
use std::io;
use std::sync::mpsc;

/// A job that is done.
pub(super) enum Done {
    Sync(SyncDone),
    Checkpoint(Box<CheckpointDone>),
}

/// The two threads. They end when this is dropped.
pub(super) struct Jobs {
    syncs: mpsc::Sender<SyncJob>,
    checkpoints: mpsc::Sender<CheckpointJob>,
    done: mpsc::Receiver<Done>,
}

impl Jobs {
    pub(super) fn start(waker: &Waker) -> io::Result<Jobs> {
        let (finished, done) = mpsc::channel();
        let run = |job: SyncJob| Done::Sync(job.run());
        let syncs = spawn("node-sync", waker.clone(), finished.clone(), run)?;
        let run = |job: CheckpointJob| Done::Checkpoint(Box::new(job.run()));
        let checkpoints = spawn("node-checkpoint", waker.clone(), finished, run)?;
        Ok(Jobs { syncs, checkpoints, done })
    }

    pub(super) fn sync(&self, job: SyncJob) {
        self.syncs.send(job).expect("the thread lives as long as its sender");
    }

    pub(super) fn checkpoint(&self, job: CheckpointJob) {
        self.checkpoints.send(job).expect("the thread lives as long as its sender");
    }

    pub(super) fn finished(&self) -> Option<Done> {
        self.done.try_recv().ok()
    }
}

fn spawn<J: Send + 'static>(
    name: &str,
    waker: Waker,
    finished: mpsc::Sender<Done>,
    run: impl Fn(J) -> Done + Send + 'static,
) -> io::Result<mpsc::Sender<J>> {
    let (jobs, received) = mpsc::channel::<J>();
    let work = move || {
        for job in received {
            if finished.send(run(job)).is_err() {
                return;
            }
            waker.wake();
        }
    };
    std::thread::Builder::new().name(name.into()).spawn(work)?;
    Ok(jobs)
}
