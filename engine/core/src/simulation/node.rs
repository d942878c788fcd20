//! A storage node without sockets and threads: a real store on a simulated disk, driven through the
//! node's own request handling. What its event loop does in batches (append, sync, answer, checkpoint)
//! happens here one step at a time, when the history says so.

use crate::geometry::ImageId;
use crate::node::asker::Asker;
use crate::node::pulls::{Effect, PullAnswer, Pulls};
use crate::node::requests::{Outcome, Requests, Scratch};
use crate::node::sessions::Sessions;
use crate::replica::Instance;
use crate::store::simulated::SimDisk;
use crate::store::{CheckpointJob, Store, StoreConfig, StoreError, SyncJob};
use crate::wire::messages::{Head, Number};
use crate::wire::{Frame, REPLY, Status, kind};
use bytes::{Bytes, BytesMut};
use std::collections::{BTreeMap, VecDeque};

const CLUSTER: [u8; 16] = [1; 16];

/// Sizes of a store's log. The smaller, the more often it is checkpointed.
#[derive(Clone, Copy, Debug)]
pub struct LogSize {
    pub log_bytes: u64,
    pub segment_bytes: u32,
}

impl Default for LogSize {
    fn default() -> LogSize {
        LogSize { log_bytes: 1 << 20, segment_bytes: 64 << 10 }
    }
}

/// An answer that waits for a sync.
struct Waiter {
    lsn: u64,
    connection: u64,
    frame: Frame,
    with_number: bool,
}

/// One run of a node's process.
pub struct NodeRun {
    pub store: Store,
    sessions: Sessions,
    pulls: Pulls,
    /// Connections, and of whom each is.
    askers: BTreeMap<u64, Asker>,
    scratch: Scratch,
    waiters: Vec<Waiter>,
    /// Connections whose next frame waits for room in the log.
    parked: VecDeque<(u64, Frame)>,
    /// Answers, with the connection that they go to.
    pub answers: VecDeque<(u64, Frame)>,
    /// Connections that broke the protocol, and are to end.
    pub sent_away: Vec<u64>,
    sync: Option<SyncJob>,
    checkpoint: Option<CheckpointJob>,
    /// The last checkpoint found the disk full.
    no_space: bool,
}

/// A node: its disk, and its process while one runs.
pub struct SimNode {
    pub name: String,
    pub disk: SimDisk,
    pub run: Option<NodeRun>,
    /// Names the store if a new one is made.
    store_id: [u8; 16],
    log: LogSize,
}

impl SimNode {
    pub fn new(name: &str, log: LogSize) -> SimNode {
        let mut store_id = [2; 16];
        let bytes = name.as_bytes();
        let length = bytes.len().min(16);
        store_id[..length].copy_from_slice(&bytes[..length]);
        SimNode { name: name.to_owned(), disk: SimDisk::new(), run: None, store_id, log }
    }

    /// Starts a process.
    ///
    /// # Errors
    /// The store cannot be opened.
    pub fn start(&mut self) -> Result<Instance, StoreError> {
        self.start_as(0, &[])
    }

    /// Starts a process as one whose start counter others have seen at `seen_counter`, and of which
    /// nothing counts that it has of the images `distrusted`.
    ///
    /// # Errors
    /// The store cannot be opened.
    pub fn start_as(
        &mut self,
        seen_counter: u64,
        distrusted: &[ImageId],
    ) -> Result<Instance, StoreError> {
        let config = StoreConfig {
            seen_counter,
            segment_bytes: Some(self.log.segment_bytes),
            ..StoreConfig::new(CLUSTER, &self.name, self.store_id, self.log.log_bytes)
        };
        let (mut store, recovery) = Store::open(self.disk.run(), &config)?;
        if recovery.damaged {
            // As the daemon: a person has to look at it.
            return Err(StoreError::Corrupt { file: "the log".to_owned() });
        }
        store.distrust(distrusted.iter().copied());
        let run = NodeRun {
            store,
            sessions: Sessions::default(),
            pulls: Pulls::default(),
            askers: BTreeMap::new(),
            scratch: Scratch::default(),
            waiters: Vec::new(),
            parked: VecDeque::new(),
            answers: VecDeque::new(),
            sent_away: Vec::new(),
            sync: None,
            checkpoint: None,
            no_space: false,
        };
        let instance = run.instance();
        self.run = Some(run);
        Ok(instance)
    }

    /// The process ends (`power`: with all that was not synced, as this seed has it).
    pub fn stop(&mut self, power: Option<u64>) {
        self.run = None;
        match power {
            Some(seed) => self.disk.power_cut(seed),
            None => self.disk.kill(),
        }
    }

    /// A disk that was never used stands in for the node's.
    pub fn replace_disk(&mut self, disk: SimDisk) {
        assert!(self.run.is_none(), "a disk is changed while its node is off");
        self.disk = disk;
    }
}

impl NodeRun {
    pub fn instance(&self) -> Instance {
        Instance { store: self.store.id(), start_counter: self.store.instance() }
    }

    /// Whether the next frame of a connection is taken; if not it waits for room in the log.
    pub fn takes(&self, connection: u64) -> bool {
        self.parked.iter().all(|(other, _)| *other != connection)
    }

    pub fn parked(&self) -> impl Iterator<Item = u64> {
        self.parked.iter().map(|(connection, _)| *connection)
    }

    /// Does what a frame asks for; what there is to say is in `answers`. Gives the answer's status.
    ///
    /// # Errors
    /// The store has failed: the process ends.
    pub fn take(
        &mut self,
        connection: u64,
        frame: Frame,
        now_ns: u64,
    ) -> Result<Option<Status>, StoreError> {
        if !self.askers.entry(connection).or_default().may_ask(frame.kind) {
            self.sent_away.push(connection);
            return Ok(None);
        }
        let mut requests = Requests {
            store: &mut self.store,
            sessions: &mut self.sessions,
            scratch: &mut self.scratch,
            pulls: &mut self.pulls,
            connection,
            memory: None,
        };
        let mut outcome = requests.handle(&frame);
        while matches!(outcome, Outcome::Again) {
            outcome = requests.handle(&frame);
        }
        self.answer_pulls();
        self.store.append()?;
        Ok(match outcome {
            Outcome::Answer { status, head, payload } => {
                self.answers.push_back((connection, reply(&frame, status, head, payload)));
                Some(status)
            }
            Outcome::AnswerDurable { with_number } => {
                let lsn = self.store.appended_lsn();
                self.waiters.push(Waiter { lsn, connection, frame, with_number });
                Some(Status::Ok)
            }
            Outcome::Park if self.no_space && frame.kind != kind::RECORD => {
                let answer = reply(&frame, Status::NoSpace, Bytes::new(), Bytes::new());
                self.answers.push_back((connection, answer));
                Some(Status::NoSpace)
            }
            Outcome::Park => {
                self.parked.push_back((connection, frame));
                None
            }
            Outcome::Pull(order) => {
                self.pulls.order(*order, now_ns);
                self.answer_pulls();
                None
            }
            // Nobody hands memory over here.
            Outcome::Placed { .. } | Outcome::Again | Outcome::Close => {
                self.sent_away.push(connection);
                None
            }
        })
    }

    pub fn end_connection(&mut self, connection: u64) {
        self.sessions.connection_ended(connection);
        self.pulls.connection_ended(connection);
        self.askers.remove(&connection);
        self.waiters.retain(|waiter| waiter.connection != connection);
        self.parked.retain(|(other, _)| *other != connection);
        self.answers.retain(|(other, _)| *other != connection);
    }

    /// Begins a sync if somebody waits for one; whether one has begun.
    ///
    /// # Errors
    /// The store has failed.
    pub fn begin_sync(&mut self) -> Result<bool, StoreError> {
        if self.sync.is_some() || self.waiters.is_empty() {
            return Ok(false);
        }
        self.sync = self.store.begin_sync()?;
        if self.sync.is_none() {
            self.answer_durable();
        }
        Ok(self.sync.is_some())
    }

    /// Does the sync that has begun, and answers who waited for it.
    ///
    /// # Errors
    /// The sync has failed, and the store with it.
    pub fn finish_sync(&mut self) -> Result<(), StoreError> {
        if let Some(job) = self.sync.take() {
            self.store.finish_sync(job.run())?;
            self.answer_durable();
        }
        Ok(())
    }

    fn answer_durable(&mut self) {
        let number = self.store.flush_number();
        let durable = self.store.durable_lsn();
        for waiter in std::mem::take(&mut self.waiters) {
            if waiter.lsn > durable {
                self.waiters.push(waiter);
                continue;
            }
            let mut head = BytesMut::new();
            if waiter.with_number {
                Number(number).put(&mut head);
            }
            let answer = reply(&waiter.frame, Status::Ok, head.freeze(), Bytes::new());
            self.answers.push_back((waiter.connection, answer));
        }
    }

    /// Begins a checkpoint if one is due, or by `force`; whether one has begun.
    ///
    /// # Errors
    /// The store has failed.
    pub fn begin_checkpoint(&mut self, force: bool) -> Result<bool, StoreError> {
        if self.checkpoint.is_some() {
            return Ok(false);
        }
        self.checkpoint = self.store.begin_checkpoint(force)?;
        Ok(self.checkpoint.is_some())
    }

    /// Merges a little of what is left to merge.
    ///
    /// # Errors
    /// The store has failed.
    pub fn merge(&mut self) -> Result<(), StoreError> {
        // Without room in the log it is tried again.
        if self.store.merge_some(self.no_space).is_err() {
            self.store.check()?;
        }
        self.store.append()
    }

    /// Does the checkpoint that has begun. Gives what waited for room, to be taken again.
    ///
    /// # Errors
    /// The store has failed.
    pub fn finish_checkpoint(&mut self) -> Result<Vec<(u64, Frame)>, StoreError> {
        let Some(job) = self.checkpoint.take() else { return Ok(Vec::new()) };
        match self.store.finish_checkpoint(job.run()) {
            Ok(()) => self.no_space = false,
            // All is in the log still; the next checkpoint tries again.
            Err(StoreError::NoSpace) => self.no_space = true,
            Err(error) => return Err(error),
        }
        self.land_pulls()?;
        Ok(std::mem::take(&mut self.parked).into())
    }

    // Pulls

    /// What is to be done with connections to other nodes.
    pub(crate) fn pull_effects(&mut self) -> Vec<Effect> {
        std::iter::from_fn(|| self.pulls.next_effect()).collect()
    }

    /// A peer, which is another node, has greeted.
    pub(crate) fn peer_greeted(&mut self, peer: u64, now_ns: u64) {
        self.pulls.greeted(peer, now_ns);
    }

    /// A peer answers; false: it breaks the protocol.
    ///
    /// # Errors
    /// The store has failed.
    pub(crate) fn peer_answers(
        &mut self,
        peer: u64,
        frame: Frame,
        now_ns: u64,
    ) -> Result<bool, StoreError> {
        self.pulls.heard(peer, now_ns);
        let honest = self.pulls.take(peer, frame).is_ok();
        self.land_pulls()?;
        Ok(honest)
    }

    /// The connection to a peer is gone.
    pub(crate) fn peer_ended(&mut self, peer: u64, now_ns: u64) {
        self.pulls.ended(peer, now_ns);
        self.answer_pulls();
    }

    /// Time has passed.
    pub(crate) fn tick_pulls(&mut self, now_ns: u64) {
        self.pulls.tick(now_ns);
        self.answer_pulls();
    }

    /// Pulls that are under way.
    pub fn pulls(&self) -> usize {
        self.pulls.len()
    }

    fn land_pulls(&mut self) -> Result<(), StoreError> {
        let mut requests = Requests {
            store: &mut self.store,
            sessions: &mut self.sessions,
            scratch: &mut self.scratch,
            pulls: &mut self.pulls,
            connection: 0,
            memory: None,
        };
        requests.land_pulls(!self.no_space, |_, _| {});
        self.store.append()?;
        self.answer_pulls();
        Ok(())
    }

    fn answer_pulls(&mut self) {
        while let Some(PullAnswer { order, status, head, .. }) = self.pulls.answers.pop_front() {
            let (kind, payload) = (kind::PULL | REPLY, Bytes::new());
            let (channel, tag) = (order.channel, order.tag);
            let frame = Frame { kind, flags: 0, status, channel, tag, head, payload };
            self.answers.push_back((order.connection, frame));
        }
    }

    pub fn is_idle(&self) -> bool {
        self.waiters.is_empty()
            && self.parked.is_empty()
            && self.answers.is_empty()
            && self.pulls.is_empty()
    }

    /// Answers that wait for a sync, requests that wait for room.
    pub fn queues(&self) -> (usize, usize) {
        (self.waiters.len(), self.parked.len())
    }
}

fn reply(to: &Frame, status: Status, head: Bytes, payload: Bytes) -> Frame {
    Frame {
        kind: to.kind | REPLY,
        flags: 0,
        status,
        channel: to.channel,
        tag: to.tag,
        head,
        payload,
    }
}
