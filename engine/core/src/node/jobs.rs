//! Blocking work of the store in threads of its own: syncs in one, checkpoints in another, so that a
//! flush never waits for a checkpoint to finish.

use crate::io::Waker;
use crate::store::{CheckpointDone, CheckpointJob, SyncDone, SyncJob};
use std::io;
use std::sync::mpsc;
use std::thread::JoinHandle;

/// A job that is done.
pub(super) enum Done {
    Sync(SyncDone),
    Checkpoint(Box<CheckpointDone>),
}

/// The two threads. Dropping this waits until they have ended what they are at.
pub(super) struct Jobs {
    syncs: Option<mpsc::Sender<SyncJob>>,
    checkpoints: Option<mpsc::Sender<CheckpointJob>>,
    done: mpsc::Receiver<Done>,
    threads: Vec<JoinHandle<()>>,
}

impl Jobs {
    pub(super) fn start(waker: &Waker) -> io::Result<Jobs> {
        let (finished, done) = mpsc::channel();
        let run = |job: SyncJob| Done::Sync(job.run());
        let (syncs, sync) = spawn("node-sync", waker.clone(), finished.clone(), run)?;
        let run = |job: CheckpointJob| Done::Checkpoint(Box::new(job.run()));
        let (checkpoints, checkpoint) = spawn("node-checkpoint", waker.clone(), finished, run)?;
        let threads = vec![sync, checkpoint];
        Ok(Jobs { syncs: Some(syncs), checkpoints: Some(checkpoints), done, threads })
    }

    pub(super) fn sync(&self, job: SyncJob) {
        let sent = self.syncs.as_ref().is_some_and(|syncs| syncs.send(job).is_ok());
        assert!(sent, "the thread lives as long as its sender");
    }

    pub(super) fn checkpoint(&self, job: CheckpointJob) {
        let sent = self.checkpoints.as_ref().is_some_and(|jobs| jobs.send(job).is_ok());
        assert!(sent, "the thread lives as long as its sender");
    }

    pub(super) fn finished(&self) -> Option<Done> {
        self.done.try_recv().ok()
    }

    /// Whether a thread has ended, which only a defect makes it do: what it was at will never be done.
    pub(super) fn has_failed(&self) -> bool {
        self.threads.iter().any(JoinHandle::is_finished)
    }
}

impl Drop for Jobs {
    fn drop(&mut self) {
        (self.syncs, self.checkpoints) = (None, None);
        for thread in self.threads.drain(..) {
            // A panic of the thread was printed where it happened.
            let _ = thread.join();
        }
    }
}

fn spawn<J: Send + 'static>(
    name: &str,
    waker: Waker,
    finished: mpsc::Sender<Done>,
    run: impl Fn(J) -> Done + Send + 'static,
) -> io::Result<(mpsc::Sender<J>, JoinHandle<()>)> {
    let (jobs, received) = mpsc::channel::<J>();
    let work = move || {
        for job in received {
            if finished.send(run(job)).is_err() {
                return;
            }
            waker.wake();
        }
    };
    let thread = std::thread::Builder::new().name(name.into()).spawn(work)?;
    Ok((jobs, thread))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::Poller;
    use std::time::{Duration, Instant};

    /// The thread of a job that panicked was gone, and the node went on answering pings: gateways waited
    /// for it without end.
    #[test]
    fn a_job_that_panics_is_noticed() {
        let poller = Poller::new().expect("an epoll");
        let waker = Waker::new(&poller, 0).expect("an eventfd");
        let mut jobs = Jobs::start(&waker).expect("two threads");
        assert!(!jobs.has_failed());
        let (finished, _done) = mpsc::channel();
        let (_broken, thread) = spawn("broken", waker, finished, |(): ()| panic!("a defect"))
            .map(|(jobs, thread)| (jobs.send(()), thread))
            .expect("a thread");
        jobs.threads.push(thread);
        let deadline = Instant::now() + Duration::from_secs(20);
        while !jobs.has_failed() {
            assert!(Instant::now() < deadline, "nobody noticed");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
