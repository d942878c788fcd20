//! The node's loop: takes what gateways send, appends it to the log in one batch for all of them,
//! then answers. An answered write is in the log, and a flush is answered when it is durable there.

mod pulling;

use super::asker::Asker;
use super::jobs::{Done, Jobs};
use super::peers::Peers;
use super::pulls::Pulls;
use super::requests::{Outcome, Requests, Scratch};
use super::sessions::Sessions;
use super::{Command, Counters, Failure, Identity, Inventory, NodeStatus, ReadShard};
use crate::geometry::BLOCK_BYTES;
use crate::io::{
    Filled, Poller, Ready, SharedMemory, Sink, Stream, Waker, boottime_ns, tune_accepted,
};
use crate::store::disk::Errno;
use crate::store::{Store, StoreError, View};
use crate::wire::messages::{Head, Hello, HelloReply, Number};
use crate::wire::{Frame, FrameReader, Prefix, REPLY, Status, VERSION, encode, flag, kind};
use bytes::{Bytes, BytesMut};
use rustix::net::SocketFlags;
use slab::Slab;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{PoisonError, mpsc};
use std::time::Duration;

pub(super) const WAKER: u64 = 0;
const LISTENER: u64 = 1 << 32;
const CONNECTION: u64 = 2 << 32;
const PEER: u64 = 3 << 32;

const CONNECTIONS_MAX: usize = 1024;
/// So many requests are worked on before data that was read goes out, so that a gateway has it, and works
/// on, while the others have their turn.
const ANSWERS_TOGETHER: usize = 8;
/// A gateway that does not take its answers is not read until it does.
const ANSWER_BYTES_MAX: usize = 32 << 20;
const TICK: Duration = Duration::from_millis(500);
/// A gateway whose request waits for room in the log hears this often that the node is there: its
/// pings wait behind the request.
const SIGN_OF_LIFE_NS: u64 = 1_000_000_000;
/// After a checkpoint that found no space the next one waits, unless something else frees some.
const NO_SPACE_PAUSE_NS: u64 = 1_000_000_000;
/// A peer that has not greeted by then is sent away.
const GREETING_NS: u64 = 5_000_000_000;
/// Beside clients merging goes on for one part of so many of the time, and puts so much into the log in a second: all
/// of that is written twice. Alone it has half of the time.
const MERGE_SHARE: u64 = 10;
const MERGE_BYTES_PER_SECOND: u64 = 16 << 20;
/// After a failure, or without room in the log, it waits so long.
const MERGE_PAUSE_NS: u64 = 100_000_000;
/// Beside clients files of layers that are gone are removed no more often than that.
const REMOVAL_PAUSE_NS: u64 = 200_000_000;
/// Without a client's request for so long no client is there.
const CLIENTS_GONE_NS: u64 = 250_000_000;

struct Connection {
    stream: Stream,
    id: u64,
    greeted: bool,
    asker: Asker,
    opened_ns: u64,
    /// A request that waits for room in the log; nothing is taken from the connection before it.
    parked: Option<Frame>,
    /// What the gateway, a process of this host, has handed over for answers.
    memory: Option<SharedMemory>,
}

/// An answer that waits for a sync.
struct Waiter {
    lsn: u64,
    connection: u64,
    prefix: Prefix,
    with_number: bool,
}

pub(super) struct EventLoop {
    poller: Poller,
    waker: Waker,
    commands: mpsc::Receiver<Command>,
    /// Before the store: dropped first, so that no job works in a folder whose lock is free again.
    jobs: Jobs,
    store: Store,
    identity: Identity,
    failure: Failure,
    listeners: Vec<OwnedFd>,
    connections: Slab<Connection>,
    serial: u64,
    sessions: Sessions,
    /// What holders have this node fetch from others, and its connections to them.
    pulls: Pulls,
    peers: Peers,
    scratch: Scratch,
    heads: BytesMut,
    /// Answers that wait for the next sync to begin, and for those under way.
    new_waiters: Vec<Waiter>,
    waiters: Vec<Waiter>,
    deletes: Vec<(u64, mpsc::Sender<Result<(), StoreError>>)>,
    syncing: bool,
    checkpointing: bool,
    /// No checkpoint begins before this time.
    checkpoint_after_ns: u64,
    counters: Counters,
    now_ns: u64,
    /// When a client's request last came, of any image and by any gateway.
    clients_ns: Option<u64>,
    /// Nothing is merged before this time.
    merge_after_ns: u64,
    signed_ns: u64,
    /// See `now_and_then`.
    next_look_ns: u64,
    touched: Vec<usize>,
    /// Connections whose request goes on in the next turn.
    again: Vec<usize>,
    /// When the last checkpoint began.
    checkpointed_ns: u64,
}

impl EventLoop {
    pub(super) fn new(
        poller: Poller,
        waker: Waker,
        commands: mpsc::Receiver<Command>,
        store: Store,
        identity: Identity,
        failure: Failure,
    ) -> io::Result<EventLoop> {
        let jobs = Jobs::start(&waker)?;
        Ok(EventLoop {
            poller,
            waker,
            commands,
            store,
            identity,
            failure,
            jobs,
            listeners: Vec::new(),
            connections: Slab::new(),
            serial: 0,
            sessions: Sessions::default(),
            pulls: Pulls::default(),
            peers: Peers::default(),
            scratch: Scratch::default(),
            heads: BytesMut::with_capacity(64 * 1024),
            new_waiters: Vec::new(),
            waiters: Vec::new(),
            deletes: Vec::new(),
            syncing: false,
            checkpointing: false,
            checkpoint_after_ns: 0,
            counters: Counters::default(),
            now_ns: 0,
            clients_ns: None,
            merge_after_ns: 0,
            signed_ns: 0,
            next_look_ns: 0,
            touched: Vec::new(),
            again: Vec::new(),
            checkpointed_ns: 0,
        })
    }

    pub(super) fn run(mut self) {
        if let Err(error) = self.work() {
            let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
            *failure = Some(error.to_string());
        }
    }

    /// Runs until told to stop; an error is the store's end.
    fn work(&mut self) -> Result<(), StoreError> {
        let mut ready = Vec::with_capacity(128);
        loop {
            ready.clear();
            if let Err(error) = self.poller.wait(self.patience(), &mut ready) {
                panic!("epoll_wait failed: {error}");
            }
            self.now_ns = boottime_ns();
            for event in &ready {
                self.ready(*event);
            }
            self.now_and_then()?;
            self.go_on_again();
            while let Some(done) = self.jobs.finished() {
                self.job_done(done)?;
            }
            if !self.obey()? {
                return self.finish();
            }
            self.give_signs_of_life();
            let merged = self.merge()?;
            self.settle()?;
            self.rest_after(merged);
        }
    }

    /// How long the loop may sleep.
    fn patience(&self) -> Duration {
        if !self.again.is_empty() {
            return Duration::ZERO;
        }
        match self.store.wants_merge() {
            true => {
                Duration::from_nanos(self.merge_after_ns.saturating_sub(boottime_ns())).min(TICK)
            }
            false => TICK,
        }
    }

    /// Merges a little, if something is left to merge and it is time: when that began, and the bytes for the log.
    fn merge(&mut self) -> Result<Option<(u64, u64)>, StoreError> {
        let begun_ns = boottime_ns();
        if !self.store.wants_merge() || begun_ns < self.merge_after_ns {
            return Ok(None);
        }
        if self.checkpointing && self.has_clients() {
            // The disk has enough to do.
            self.merge_after_ns = begun_ns + MERGE_PAUSE_NS;
            return Ok(None);
        }
        match self.store.merge_some(self.checkpoint_after_ns != 0) {
            Ok(bytes) => Ok(Some((begun_ns, bytes))),
            // A checkpoint makes room; what cannot be read now is tried again.
            Err(_) => {
                self.store.check()?;
                self.merge_after_ns = begun_ns + MERGE_PAUSE_NS;
                Ok(None)
            }
        }
    }

    /// What was merged is in the log: leaves the disk and the loop to others for a while.
    fn rest_after(&mut self, merged: Option<(u64, u64)>) {
        let Some((begun_ns, bytes)) = merged else { return };
        let now_ns = boottime_ns();
        let took_ns = now_ns - begun_ns;
        let pause_ns = match self.has_clients() {
            true => {
                let by_bytes = bytes * 1_000_000_000 / MERGE_BYTES_PER_SECOND;
                by_bytes.max(took_ns * (MERGE_SHARE - 1))
            }
            false => took_ns,
        };
        self.merge_after_ns = now_ns + pause_ns;
    }

    fn ready(&mut self, event: Ready) {
        let index = (event.token & 0xffff_ffff) as usize;
        match event.token & !0xffff_ffff {
            LISTENER => self.accept(index),
            PEER => self.peer_ready(index as u64),
            CONNECTION => {
                let paused = self.connections.get(index).is_some_and(Connection::is_paused);
                if event.gone && paused {
                    // It is not read now, so nothing else would tell that it has gone.
                    self.end(index);
                } else if event.readable {
                    self.read(index);
                }
                self.touched.push(index);
            }
            _ => self.waker.drain(),
        }
    }

    fn accept(&mut self, listener: usize) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        for _ in 0..16 {
            let Ok(fd) = rustix::net::accept_with(&self.listeners[listener], flags) else { return };
            if self.connections.len() >= CONNECTIONS_MAX {
                continue;
            }
            tune_accepted(&fd);
            let entry = self.connections.vacant_entry();
            let token = CONNECTION | entry.key() as u64;
            let stream = Stream::accepted(fd);
            if self.poller.add(stream.fd(), token, false).is_ok() {
                self.serial += 1;
                let opened_ns = boottime_ns();
                let id = self.serial << 32 | entry.key() as u64;
                let (greeted, asker, parked, memory) = (false, Asker::default(), None, None);
                entry.insert(Connection { stream, id, greeted, asker, opened_ns, parked, memory });
            }
        }
    }

    fn read(&mut self, index: usize) {
        loop {
            let Some(connection) = self.connections.get_mut(index) else { return };
            if connection.is_paused() {
                return;
            }
            let missing = FrameReader::missing(&connection.stream.input);
            let filled = connection.stream.fill(missing);
            match filled {
                Ok(Filled::Closed) | Err(_) => return self.end(index),
                Ok(filled) => {
                    self.take_frames(index);
                    if filled == Filled::Drained {
                        return;
                    }
                }
            }
        }
    }

    /// Works on the frames that a connection has sent, until one has to wait.
    fn take_frames(&mut self, index: usize) {
        for turn in 1.. {
            let Some(connection) = self.connections.get_mut(index) else { return };
            let has_data = connection.stream.pending_bytes() >= BLOCK_BYTES as usize;
            // What was read may be of a write that only this append makes safe from a kill. An error of
            // either shows again when the rest is settled.
            if turn % ANSWERS_TOGETHER == 0 && has_data && self.store.append().is_ok() {
                let _ = connection.stream.flush();
            }
            if connection.stream.pending_bytes() >= ANSWER_BYTES_MAX {
                return;
            }
            let frame = match connection.parked.take() {
                Some(frame) => frame,
                None => match FrameReader::next(&mut connection.stream.input) {
                    Ok(Some(frame)) => frame,
                    Ok(None) => return,
                    Err(_) => return self.end(index),
                },
            };
            if !self.take_frame(index, frame) {
                return;
            }
        }
    }

    /// False: nothing more from this connection for now.
    fn take_frame(&mut self, index: usize, frame: Frame) -> bool {
        if frame.is_reply() {
            self.end(index);
            return false;
        }
        if !self.connections[index].greeted {
            return self.greet(index, &frame);
        }
        if !self.connections[index].asker.may_ask(frame.kind) {
            self.end(index);
            return false;
        }
        if frame.kind == kind::MEMORY {
            return self.take_memory(index, &frame);
        }
        let Connection { id: connection, memory, .. } = &mut self.connections[index];
        let (connection, memory) = (*connection, memory.as_mut());
        let mut requests = Requests {
            store: &mut self.store,
            sessions: &mut self.sessions,
            scratch: &mut self.scratch,
            pulls: &mut self.pulls,
            connection,
            memory,
        };
        let outcome = requests.handle(&frame);
        // What it has overtaken is over before it.
        self.answer_pulls();
        if matches!(frame.kind, kind::READ | kind::READ_INTO | kind::WRITE | kind::ZERO) {
            self.clients_ns = Some(self.now_ns);
        }
        self.counters.request(&frame, &outcome);
        match outcome {
            Outcome::Answer { status, head, payload } => {
                let flags = self.clients_flag(frame.kind);
                let prefix = Prefix { flags, ..Prefix::reply(&frame, status) };
                self.answer(index, prefix, &head, payload);
            }
            Outcome::Placed { head, .. } => {
                self.answer(index, Prefix::reply(&frame, Status::Ok), &head, Bytes::new());
            }
            Outcome::AnswerDurable { with_number } => {
                let prefix = Prefix::reply(&frame, Status::Ok);
                self.new_waiters.push(Waiter { lsn: 0, connection, prefix, with_number });
            }
            Outcome::Pull(order) => self.order_pull(*order),
            // Nothing makes room until somebody does. What asks for none is not to wait for that; behind
            // a record nothing else can go on.
            Outcome::Park if self.checkpoint_after_ns != 0 && frame.kind != kind::RECORD => {
                self.counters.refused += 1;
                self.answer(index, Prefix::reply(&frame, Status::NoSpace), &[], Bytes::new());
            }
            Outcome::Park => {
                self.connections[index].parked = Some(frame);
                return false;
            }
            Outcome::Again => {
                self.connections[index].parked = Some(frame);
                self.again.push(index);
                return false;
            }
            Outcome::Close => {
                self.end(index);
                return false;
            }
        }
        true
    }

    /// What is said with an answer to work in the background: clients want this node too.
    fn clients_flag(&self, to: u8) -> u8 {
        let background = matches!(
            to,
            kind::SUMMARY | kind::FETCH | kind::COPY | kind::SCRUB | kind::PULL | kind::PEER_FETCH
        );
        if background && self.has_clients() { flag::BESIDE_CLIENTS } else { 0 }
    }

    /// Whether clients ask for something.
    fn has_clients(&self) -> bool {
        let silent_ns = self.clients_ns.map(|clients_ns| self.now_ns.saturating_sub(clients_ns));
        silent_ns.is_some_and(|silent_ns| silent_ns < CLIENTS_GONE_NS)
    }

    /// The gateway hands memory over. One that cannot be used is refused, and reads come without it.
    fn take_memory(&mut self, index: usize, frame: &Frame) -> bool {
        if !frame.head.is_empty() || !frame.payload.is_empty() {
            self.end(index);
            return false;
        }
        let connection = &mut self.connections[index];
        let mapped = connection.stream.take_descriptor().map(SharedMemory::of_peer);
        let status = match mapped {
            Some(Ok(memory)) => {
                connection.memory = Some(memory);
                Status::Ok
            }
            _ => Status::Malformed,
        };
        self.answer(index, Prefix::reply(frame, status), &[], Bytes::new());
        true
    }

    fn greet(&mut self, index: usize, frame: &Frame) -> bool {
        let hello = match (frame.kind, Hello::take(frame.head.clone())) {
            (kind::HELLO, Ok(hello)) => hello,
            _ => {
                self.end(index);
                return false;
            }
        };
        let status = if !hello.speaks_ours() {
            Status::Version
        } else if hello.cluster != self.identity.cluster {
            Status::WrongCluster
        } else if hello.node != self.identity.node {
            Status::WrongNode
        } else {
            Status::Ok
        };
        let reply = HelloReply {
            version: VERSION,
            node: self.identity.node.clone(),
            store: self.identity.store,
            start_counter: self.store.instance(),
            boot: self.identity.boot,
            flush_number: self.store.flush_number(),
        };
        let mut head = BytesMut::new();
        reply.put(&mut head);
        self.answer(index, Prefix::reply(frame, status), &head, Bytes::new());
        let connection = &mut self.connections[index];
        connection.greeted = status == Status::Ok;
        if status != Status::Ok {
            // Said why; what else it sends is not heard.
            let _ = connection.stream.flush();
            self.end(index);
        }
        status == Status::Ok
    }

    fn answer(&mut self, index: usize, prefix: Prefix, head: &[u8], payload: Bytes) {
        encode(&mut self.heads, prefix, payload.len(), |out| out.extend_from_slice(head));
        let output = self.connections[index].stream.output();
        output.bytes(&self.heads);
        self.heads.clear();
        if !payload.is_empty() {
            output.data(payload);
        }
        self.touched.push(index);
    }

    /// Appends the batch, begins what syncs and checkpoints are due, writes the answers.
    fn settle(&mut self) -> Result<(), StoreError> {
        self.flush_peers();
        self.store.append()?;
        let appended = self.store.appended_lsn();
        for mut waiter in self.new_waiters.drain(..) {
            waiter.lsn = appended;
            self.waiters.push(waiter);
        }
        if !self.syncing && (!self.waiters.is_empty() || !self.deletes.is_empty()) {
            match self.store.begin_sync()? {
                Some(job) => {
                    self.syncing = true;
                    self.jobs.sync(job);
                }
                None => self.answer_durable(),
            }
        }
        if !self.checkpointing
            && (self.checkpoint_after_ns == 0 || boottime_ns() >= self.checkpoint_after_ns)
            && !self.leaves_files_for_later()
            && let Some(job) = self.store.begin_checkpoint(false)?
        {
            self.checkpointing = true;
            self.checkpointed_ns = boottime_ns();
            self.jobs.checkpoint(job);
        }
        let mut touched = std::mem::take(&mut self.touched);
        touched.sort_unstable();
        touched.dedup();
        touched.drain(..).for_each(|index| self.write_out(index));
        if self.touched.is_empty() {
            self.touched = touched;
        }
        Ok(())
    }

    /// Whether a checkpoint would do no more than remove files, and clients had none of them for too short a time.
    fn leaves_files_for_later(&self) -> bool {
        let soon = boottime_ns() < self.checkpointed_ns + REMOVAL_PAUSE_NS;
        soon && self.has_clients() && self.store.only_removes()
    }

    fn answer_durable(&mut self) {
        let durable = self.store.durable_lsn();
        let number = self.store.flush_number();
        let waiters = std::mem::take(&mut self.waiters);
        for waiter in waiters {
            if waiter.lsn > durable {
                self.waiters.push(waiter);
                continue;
            }
            let index = (waiter.connection & 0xffff_ffff) as usize;
            if self.connections.get(index).is_none_or(|c| c.id != waiter.connection) {
                continue;
            }
            let mut head = BytesMut::new();
            if waiter.with_number {
                Number(number).put(&mut head);
            }
            self.answer(index, waiter.prefix, &head, Bytes::new());
        }
        self.deletes.retain(|(lsn, done)| {
            let waits = *lsn > durable;
            if !waits {
                // The asker may have given up waiting.
                let _ = done.send(Ok(()));
            }
            waits
        });
    }

    fn job_done(&mut self, done: Done) -> Result<(), StoreError> {
        match done {
            Done::Sync(done) => {
                self.syncing = false;
                self.counters.syncs += 1;
                self.store.finish_sync(done)?;
                self.answer_durable();
            }
            Done::Checkpoint(done) => {
                self.checkpointing = false;
                match self.store.finish_checkpoint(*done) {
                    Ok(()) => {
                        self.counters.checkpoints += 1;
                        self.checkpoint_after_ns = 0;
                    }
                    // All is in the log still; the next checkpoint tries again.
                    Err(StoreError::NoSpace) => {
                        self.counters.checkpoints_without_space += 1;
                        self.checkpoint_after_ns = boottime_ns() + NO_SPACE_PAUSE_NS;
                        self.refuse_parked();
                    }
                    Err(error) => return Err(error),
                }
                // In the order in which they were asked for: what waits on a connection came later.
                self.land_pulls();
                self.unpark();
            }
        }
        Ok(())
    }

    /// There is no room to be had: whoever waits for it hears so, and may go on without this node.
    fn refuse_parked(&mut self) {
        let parked = self.connections.iter_mut().filter_map(|(index, connection)| {
            connection.parked.take().map(|frame| (index, Prefix::reply(&frame, Status::NoSpace)))
        });
        let parked: Vec<(usize, Prefix)> = parked.collect();
        for (index, prefix) in parked {
            self.counters.refused += 1;
            self.answer(index, prefix, &[], Bytes::new());
            self.take_frames(index);
        }
    }

    /// Requests that waited for room go on.
    fn unpark(&mut self) {
        let parked = self.connections.iter().filter(|(_, c)| c.parked.is_some());
        let parked: Vec<usize> = parked.map(|(index, _)| index).collect();
        for index in parked {
            self.take_frames(index);
            self.touched.push(index);
        }
    }

    /// Requests that have more to do go on, now that others had their turn.
    fn go_on_again(&mut self) {
        for index in std::mem::take(&mut self.again) {
            self.take_frames(index);
            self.touched.push(index);
        }
    }

    fn give_signs_of_life(&mut self) {
        if !self.connections.iter().any(|(_, c)| c.parked.is_some()) {
            return;
        }
        let now_ns = boottime_ns();
        if now_ns - self.signed_ns < SIGN_OF_LIFE_NS {
            return;
        }
        self.signed_ns = now_ns;
        let parked = self.connections.iter().filter(|(_, c)| c.parked.is_some());
        let parked: Vec<usize> = parked.map(|(index, _)| index).collect();
        let sign =
            Prefix { kind: kind::PING | REPLY, flags: 0, status: Status::Ok, channel: 0, tag: 0 };
        parked.into_iter().for_each(|index| self.answer(index, sign, &[], Bytes::new()));
    }

    fn write_out(&mut self, index: usize) {
        let Some(connection) = self.connections.get_mut(index) else { return };
        let was_paused = connection.is_paused();
        let written = connection.stream.flush();
        let paused = connection.is_paused();
        let changed = match (written, connection.stream.interest_change(paused)) {
            (Ok(()), Some((read, write))) => {
                self.poller.change(connection.stream.fd(), CONNECTION | index as u64, read, write)
            }
            (written, _) => written,
        };
        if changed.is_err() {
            return self.end(index);
        }
        if was_paused && !paused {
            // What was read before the pause is not announced again.
            self.take_frames(index);
            self.touched.push(index);
            self.waker.wake();
        }
    }

    fn end(&mut self, index: usize) {
        if let Some(connection) = self.connections.try_remove(index) {
            // Closing the descriptor unregisters it as well.
            let _ = self.poller.remove(connection.stream.fd());
            self.sessions.connection_ended(connection.id);
            self.pulls.connection_ended(connection.id);
        }
    }

    /// What needs no event to be due, also of a node that is never at rest.
    fn now_and_then(&mut self) -> Result<(), StoreError> {
        let now_ns = boottime_ns();
        if now_ns < self.next_look_ns {
            return Ok(());
        }
        self.next_look_ns = now_ns + TICK.as_nanos() as u64;
        self.end_strangers(now_ns);
        self.pulls.tick(now_ns);
        self.carry_out_pulls();
        if self.jobs.has_failed() {
            return Err(StoreError::Failed { errno: Errno::IO });
        }
        Ok(())
    }

    fn end_strangers(&mut self, now_ns: u64) {
        let late = |c: &Connection| !c.greeted && now_ns - c.opened_ns > GREETING_NS;
        let late: Vec<usize> =
            self.connections.iter().filter(|(_, c)| late(c)).map(|(index, _)| index).collect();
        late.into_iter().for_each(|index| self.end(index));
    }

    // Orders

    /// False: stop.
    fn obey(&mut self) -> Result<bool, StoreError> {
        while let Ok(command) = self.commands.try_recv() {
            // Whoever asked may have given up waiting: a failed send changes nothing.
            match command {
                Command::Listen(fd) => self.listen(fd),
                Command::Delete { image, done } => match self.store.delete(image) {
                    Ok(()) => {
                        self.store.append()?;
                        self.deletes.push((self.store.appended_lsn(), done));
                    }
                    Err(error) => drop(done.send(Err(error))),
                },
                Command::ReadShard(ask) => drop(ask.done.send(self.read_shard(&ask))),
                Command::LogBytes { image, done } => {
                    let _ = done.send(self.store.log_resident_bytes(&image));
                }
                Command::Inventory(done) => drop(done.send(Inventory::of(&self.store))),
                Command::Status(done) => drop(done.send(self.status())),
                Command::Stop => return Ok(false),
            }
        }
        Ok(true)
    }

    fn listen(&mut self, fd: OwnedFd) {
        let token = LISTENER | self.listeners.len() as u64;
        let ready = rustix::io::ioctl_fionbio(&fd, true)
            .map_err(io::Error::from)
            .and_then(|()| self.poller.add(&fd, token, false));
        if let Err(error) = ready {
            panic!("a listening socket cannot be polled: {error}");
        }
        self.listeners.push(fd);
    }

    fn read_shard(&mut self, ask: &ReadShard) -> Result<Option<Vec<u8>>, StoreError> {
        let Some(record) = self.store.image(&ask.image) else {
            return Err(StoreError::UnknownImage { image: ask.image });
        };
        let shard_bytes = record.head.shard_bytes;
        let (mut blocks, mut data) = (Vec::new(), BytesMut::new());
        let count = shard_bytes / BLOCK_BYTES;
        let ancestors = self.store.ancestors(&ask.image)?;
        let view = View { image: ask.image, layers: &ask.layers, ancestors: &ancestors };
        self.store.read_blocks(view, ask.shard, 0, count, &mut blocks, &mut data)?;
        if !blocks.iter().any(|block| block.is_data()) {
            return Ok(None);
        }
        let mut content = vec![0; shard_bytes as usize];
        let places = content.chunks_exact_mut(BLOCK_BYTES as usize).zip(&blocks);
        let places = places.filter(|(_, block)| block.is_data());
        for ((place, _), block) in places.zip(data.chunks_exact(BLOCK_BYTES as usize)) {
            place.copy_from_slice(block);
        }
        Ok(Some(content))
    }

    fn status(&self) -> NodeStatus {
        let (capacity_bytes, free_bytes) = self.store.space().unwrap_or((0, 0));
        let images = self.store.images();
        NodeStatus {
            capacity_bytes,
            free_bytes,
            images: images.len() as u64,
            connections: self.connections.len() as u64,
            flush_number: self.store.flush_number(),
            log_bytes: self.store.log_bytes(),
            dirty_shards: images.iter().map(|id| self.store.dirty(id).count() as u64).sum(),
            counters: self.counters.clone(),
            no_space: self.checkpoint_after_ns != 0,
        }
    }

    /// Makes everything durable before the end.
    fn finish(&mut self) -> Result<(), StoreError> {
        self.store.append()?;
        if let Some(job) = self.store.begin_sync()? {
            let done = job.run();
            self.store.finish_sync(done)?;
        }
        Ok(())
    }
}

impl Connection {
    fn is_paused(&self) -> bool {
        self.parked.is_some() || self.stream.pending_bytes() >= ANSWER_BYTES_MAX
    }
}
