//! The data path of a storage node: one event loop that owns the store and the connections of
//! gateways, and two helper threads that sync the log and checkpoint it. Python orders through
//! `NodeHandle` and is on no request's way.

pub(crate) mod asker;
mod changes;
mod counters;
mod event_loop;
mod jobs;
mod peers;
pub(crate) mod pulls;
pub(crate) mod requests;
pub(crate) mod sessions;

pub use counters::Counters;

use crate::geometry::{ImageId, LayerId};
use crate::io::{Poller, Waker};
use crate::store::{ImageRecord, Store, StoreError, UsageHandle};
use event_loop::{EventLoop, WAKER};
use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

/// What a node says of itself when a gateway connects.
#[derive(Clone, Debug)]
pub struct Identity {
    pub cluster: [u8; 16],
    pub node: String,
    pub store: [u8; 16],
    pub boot: [u8; 16],
}

/// A picture of a running node.
#[derive(Clone, Debug, Default)]
pub struct NodeStatus {
    pub capacity_bytes: u64,
    pub free_bytes: u64,
    pub images: u64,
    pub connections: u64,
    pub flush_number: u64,
    pub log_bytes: u64,
    pub dirty_shards: u64,
    pub counters: Counters,
    /// The last checkpoint found the disk full.
    pub no_space: bool,
}

/// What a node holds of images: the records of those that it has, the ids of those deleted.
#[derive(Clone, Debug, Default)]
pub struct Inventory {
    pub images: Vec<(ImageId, ImageRecord)>,
    pub deleted: Vec<ImageId>,
    /// Images that were set back with the store, until their heal begins.
    pub distrusted: Vec<ImageId>,
    /// Of images that are merged here: the merging layers of which nothing is left.
    pub emptied: HashMap<ImageId, Vec<LayerId>>,
}

impl Inventory {
    /// What a store holds.
    pub(crate) fn of(store: &Store) -> Inventory {
        let of = |id: ImageId| store.image(&id).map(|record| (id, record.clone()));
        let images = store.images().into_iter().filter_map(of).collect();
        let emptied = store.images().into_iter().map(|id| (id, store.emptied(&id)));
        Inventory {
            images,
            deleted: store.deleted_images(),
            distrusted: store.distrusted(),
            emptied: emptied.filter(|(_, layers)| !layers.is_empty()).collect(),
        }
    }
}

pub(crate) enum Command {
    Inventory(mpsc::Sender<Inventory>),
    Listen(OwnedFd),
    Delete { image: ImageId, done: mpsc::Sender<Result<(), StoreError>> },
    ReadShard(ReadShard),
    LogBytes { image: ImageId, done: mpsc::Sender<u64> },
    Status(mpsc::Sender<NodeStatus>),
    Stop,
}

/// Read a whole shard, resolved through `layers`: none where nothing is there.
pub(crate) struct ReadShard {
    pub image: ImageId,
    pub layers: Vec<LayerId>,
    pub shard: u64,
    pub done: mpsc::Sender<Result<Option<Vec<u8>>, StoreError>>,
}

/// Why a node's loop has ended, where it was not told to.
pub(crate) type Failure = Arc<Mutex<Option<String>>>;

/// A running node. Dropping it stops it.
pub struct NodeHandle {
    commands: mpsc::Sender<Command>,
    waker: Waker,
    usage: UsageHandle,
    failure: Failure,
    thread: Mutex<Option<JoinHandle<()>>>,
}

const ANSWER: Duration = Duration::from_secs(30);

impl NodeHandle {
    /// Serves `store` in threads of its own. The loop polls for `poll` at most before it sleeps.
    pub fn start(store: Store, identity: Identity, poll: Duration) -> io::Result<NodeHandle> {
        let poller = Poller::polling(poll)?;
        let waker = Waker::new(&poller, WAKER)?;
        let (commands, received) = mpsc::channel();
        let usage = store.usage_handle();
        let failure = Failure::default();
        let event_loop =
            EventLoop::new(poller, waker.clone(), received, store, identity, failure.clone())?;
        let thread = std::thread::Builder::new().name("node".into());
        let thread = thread.spawn(move || event_loop.run())?;
        Ok(NodeHandle { commands, waker, usage, failure, thread: Mutex::new(Some(thread)) })
    }

    fn order(&self, command: Command) {
        if self.commands.send(command).is_ok() {
            self.waker.wake();
        }
    }

    fn ask<T>(&self, command: impl FnOnce(mpsc::Sender<T>) -> Command) -> Option<T> {
        let (sender, receiver) = mpsc::channel();
        self.order(command(sender));
        receiver.recv_timeout(ANSWER).ok()
    }

    /// Accepts gateways on this listening socket.
    pub fn listen(&self, fd: OwnedFd) {
        self.order(Command::Listen(fd));
    }

    /// Deletes an image for ever; its tombstone is durable when this returns. None: no answer.
    pub fn delete(&self, image: ImageId) -> Option<Result<(), StoreError>> {
        self.ask(|done| Command::Delete { image, done })
    }

    /// The content of a shard, or an empty option where nothing was written.
    pub fn read_shard(
        &self,
        image: ImageId,
        layers: Vec<LayerId>,
        shard: u64,
    ) -> Option<Result<Option<Vec<u8>>, StoreError>> {
        self.ask(|done| Command::ReadShard(ReadShard { image, layers, shard, done }))
    }

    /// Physical bytes of an image: its shard files and what is in the log only.
    pub fn usage(&self, image: ImageId) -> io::Result<u64> {
        let files = self.usage.physical_bytes(&image).or_else(|errno| match errno {
            rustix::io::Errno::NOENT => Ok(0),
            errno => Err(io::Error::from(errno)),
        })?;
        Ok(files + self.ask(|done| Command::LogBytes { image, done }).unwrap_or(0))
    }

    /// Which images are here, and which were deleted. None: no answer.
    pub fn inventory(&self) -> Option<Inventory> {
        self.ask(Command::Inventory)
    }

    /// Images that have a folder on the disk.
    pub fn folders(&self) -> io::Result<Vec<ImageId>> {
        Ok(self.usage.folders()?)
    }

    pub fn status(&self) -> Option<NodeStatus> {
        self.ask(Command::Status)
    }

    /// Why the node has ended by itself; none while it runs.
    pub fn failure(&self) -> Option<String> {
        let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        let ended = thread.as_ref().is_none_or(JoinHandle::is_finished);
        failure.or_else(|| ended.then(|| "the node's event loop has ended".to_string()))
    }

    /// Syncs and ends. The store may be opened again when this returns, whoever still has the handle.
    pub fn stop(&self) {
        self.order(Command::Stop);
        if let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // A panic of the loop was printed where it happened.
            let _ = thread.join();
        }
    }
}

impl Drop for NodeHandle {
    fn drop(&mut self) {
        self.stop();
    }
}
