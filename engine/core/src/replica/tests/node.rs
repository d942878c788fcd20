//! A storage node without sockets and threads: a real store on a simulated disk, driven through the
//! node's own request handling. What its event loop does in batches (append, sync, answer, checkpoint)
//! happens here one step at a time, when the history says so.

use crate::checksum::crc32c;
use crate::geometry::{BLOCK_BYTES, ImageId, ShardKey, Tag};
use crate::node::requests::{Outcome, Requests, Scratch};
use crate::node::sessions::Sessions;
use crate::replica::Instance;
use crate::store::simulated::SimDisk;
use crate::store::{BlockState, CopyBlock, Store, StoreConfig};
use crate::wire::messages::{Head, Number};
use crate::wire::{Frame, REPLY, Status};
use bytes::{Bytes, BytesMut};
use std::collections::VecDeque;

struct Waiter {
    lsn: u64,
    connection: u64,
    frame: Frame,
    with_number: bool,
}

pub struct SimNode {
    name: String,
    pub disk: SimDisk,
    pub store: Option<Store>,
    sessions: Sessions,
    scratch: Scratch,
    waiters: Vec<Waiter>,
    /// Connections whose next frame waits for room in the log.
    parked: VecDeque<(u64, Frame)>,
    /// Answers, with the connection that they go to.
    pub answers: VecDeque<(u64, Frame)>,
}

impl SimNode {
    pub fn new(index: usize) -> SimNode {
        let mut node = SimNode {
            name: format!("node{}", index + 1),
            disk: SimDisk::new(),
            store: None,
            sessions: Sessions::default(),
            scratch: Scratch::default(),
            waiters: Vec::new(),
            parked: VecDeque::new(),
            answers: VecDeque::new(),
        };
        node.open();
        node
    }

    fn open(&mut self) {
        let config = StoreConfig {
            segment_bytes: Some(64 << 10),
            ..StoreConfig::new([1; 16], &self.name, [2; 16], 1 << 20)
        };
        let (store, _) = Store::open(self.disk.run(), &config).expect("the store opens");
        self.store = Some(store);
    }

    pub fn instance(&self) -> Instance {
        let store = self.store.as_ref().expect("a node that runs");
        Instance { store: store.id(), start_counter: store.instance() }
    }

    /// The process ends (`power`: with all that was not synced), and another takes its place.
    pub fn restart(&mut self, power: Option<u64>) {
        match power {
            Some(seed) => self.disk.power_cut(seed),
            None => self.disk.kill(),
        }
        self.store = None;
        self.sessions = Sessions::default();
        self.waiters.clear();
        self.parked.clear();
        self.answers.clear();
        self.open();
    }

    /// Content of a former life appears in a shard that nobody else has, and nothing is dirty.
    pub fn scribble(&mut self) {
        let image = ImageId([0xA1; 16]);
        let key = ShardKey { image, layer: 1, shard: 7 };
        let crc = crc32c(&[0xE5; BLOCK_BYTES as usize]);
        let blocks: Vec<CopyBlock> = (0..2)
            .map(|block| CopyBlock { block, state: BlockState::Data, tag: Tag::NONE, crc })
            .collect();
        let store = self.store.as_mut().expect("a node that runs");
        let content = Bytes::from(vec![0xE5; 2 * BLOCK_BYTES as usize]);
        store.copy(&key, &blocks, content, 1).expect("a copy");
        store.append().expect("the log takes a batch");
    }

    /// Takes the next frame of a connection; false: the connection waits for room in the log.
    pub fn takes(&self, connection: u64) -> bool {
        self.parked.iter().all(|(other, _)| *other != connection)
    }

    pub fn take(&mut self, connection: u64, frame: Frame) {
        let store = self.store.as_mut().expect("a node that runs");
        let mut requests = Requests {
            store,
            sessions: &mut self.sessions,
            scratch: &mut self.scratch,
            connection,
        };
        match requests.handle(&frame) {
            Outcome::Answer { status, head, payload } => {
                store.append().expect("the log takes a batch");
                self.answers.push_back((connection, reply(&frame, status, head, payload)));
            }
            Outcome::AnswerDurable { with_number } => {
                store.append().expect("the log takes a batch");
                let lsn = store.appended_lsn();
                self.waiters.push(Waiter { lsn, connection, frame, with_number });
            }
            Outcome::Park => self.parked.push_back((connection, frame)),
            Outcome::Close => panic!("an honest gateway is not sent away: kind {}", frame.kind),
        }
    }

    pub fn end_connection(&mut self, connection: u64) {
        self.sessions.connection_ended(connection);
        self.waiters.retain(|waiter| waiter.connection != connection);
        self.parked.retain(|(other, _)| *other != connection);
        self.answers.retain(|(other, _)| *other != connection);
    }

    /// Syncs the log, and answers who waited for that.
    pub fn sync(&mut self) {
        let store = self.store.as_mut().expect("a node that runs");
        if let Some(job) = store.begin_sync().expect("a sync begins") {
            store.finish_sync(job.run()).expect("a sync succeeds");
        }
        let number = store.flush_number();
        let durable = store.durable_lsn();
        for waiter in std::mem::take(&mut self.waiters) {
            assert!(waiter.lsn <= durable);
            let mut head = BytesMut::new();
            if waiter.with_number {
                Number(number).put(&mut head);
            }
            let answer = reply(&waiter.frame, Status::Ok, head.freeze(), Bytes::new());
            self.answers.push_back((waiter.connection, answer));
        }
    }

    /// Makes room in the log, and goes on with what waited for it.
    pub fn checkpoint(&mut self) {
        let store = self.store.as_mut().expect("a node that runs");
        if let Some(job) = store.begin_checkpoint(!self.parked.is_empty()).expect("it begins") {
            store.finish_checkpoint(job.run()).expect("a checkpoint succeeds");
        }
        for (connection, frame) in std::mem::take(&mut self.parked) {
            self.take(connection, frame);
        }
    }

    pub fn waits_for_sync(&self) -> bool {
        !self.waiters.is_empty()
    }

    pub fn is_idle(&self) -> bool {
        self.waiters.is_empty() && self.parked.is_empty() && self.answers.is_empty()
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
