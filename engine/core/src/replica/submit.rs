//! From a client's request to frames: cutting at shard and payload boundaries, ordering by block,
//! choosing the replica that a read goes to.

use super::changes::{Changes, Listing};
use super::image::{ImageIo, Part, Phase, Request, RequestKind};
use super::lag::Timing;
use super::locks::Mode;
use super::reads::{Piece, blocks_asked, choose_reader, pieces};
use super::{Event, IoError, NodeIndex, NodeMask, Outcome, Output, Token};
use crate::checksum::{block_checksums, checksum_of};
use crate::geometry::BLOCK_BYTES;
use crate::rules::{Rule, broken};
use crate::wire::kind;
use crate::wire::messages::{Flush, Head, Io};
use bytes::{BufMut, Bytes, BytesMut};

/// An unflushed image is flushed by itself after so many bytes or ticks (seconds), so that its dirty
/// map stays short and a reconcile after an unclean end is quick.
const SELF_FLUSH_BYTES: u64 = 256 << 20;
const SELF_FLUSH_TICKS: u32 = 30;

impl ImageIo {
    /// A read of `length` bytes; answered with runs.
    pub fn read(&mut self, token: Token, offset: u64, length: u32) {
        self.submit(token, RequestKind::Read, offset, length, 0, Bytes::new());
    }

    /// What the range holds, at block granularity.
    pub fn status(&mut self, token: Token, offset: u64, length: u32) {
        self.submit(token, RequestKind::Status, offset, length, 0, Bytes::new());
    }

    /// A write; `flags` of `wire::flag`.
    pub fn write(&mut self, token: Token, offset: u64, data: Bytes, flags: u8) {
        let length = data.len() as u32;
        self.submit(token, RequestKind::Write, offset, length, flags, data);
    }

    /// Makes a range read as zeroes; `flags` of `wire::flag`.
    pub fn zero(&mut self, token: Token, offset: u64, length: u32, flags: u8) {
        self.submit(token, RequestKind::Zero, offset, length, flags, Bytes::new());
    }

    /// Everything answered before this is durable on all in-sync nodes when it is answered.
    pub fn flush(&mut self, token: Token) {
        self.submit(token, RequestKind::Flush, 0, 0, 0, Bytes::new());
    }

    fn submit(
        &mut self,
        token: Token,
        kind: RequestKind,
        offset: u64,
        length: u32,
        flags: u8,
        payload: Bytes,
    ) {
        let changes = Changes::default();
        self.submit_request(token, kind, (offset, length), flags, payload, changes);
    }

    pub(super) fn submit_request(
        &mut self,
        token: Token,
        kind: RequestKind,
        (offset, length): (u64, u32),
        flags: u8,
        payload: Bytes,
        changes: Changes,
    ) {
        let end = offset.checked_add(u64::from(length));
        let inside = end.is_some_and(|end| end <= self.spec.geometry.size_bytes);
        let refusal = match self.phase {
            // The client connected before the image shrank.
            Phase::Running if !inside => Some(IoError::Io),
            Phase::Running => {
                let refused = kind == RequestKind::Write && self.has_no_room(offset, length);
                refused.then_some(IoError::NoSpace)
            }
            _ => Some(IoError::Shutdown),
        };
        if let Some(error) = refusal {
            let outcome = Outcome::Failed(error);
            return self.outputs.push_back(Output::Answer { token, outcome });
        }
        self.background.asked(self.now_ns);
        let request = Request {
            token: Some(token),
            kind,
            offset,
            length,
            flags,
            payload,
            parts_left: 0,
            covers: Vec::new(),
            error: None,
            runs: Vec::new(),
            extents: Vec::new(),
            changes,
        };
        let id = self.requests.insert(request);
        if !self.hold_back(id) {
            self.enter(id, kind, offset, length);
        }
    }

    /// Has a flush follow with the next tick.
    pub(super) fn flush_soon(&mut self) {
        self.bytes_since_flush = self.bytes_since_flush.max(SELF_FLUSH_BYTES);
    }

    /// A flush that no client asked for.
    pub(super) fn submit_own_flush(&mut self) {
        let id = self.own_request(RequestKind::Flush, 0, 0);
        self.start(id);
    }

    /// A request without a client.
    pub(super) fn own_request(&mut self, kind: RequestKind, offset: u64, length: u32) -> usize {
        self.requests.insert(Request {
            token: None,
            kind,
            offset,
            length,
            flags: 0,
            payload: Bytes::new(),
            parts_left: 0,
            covers: Vec::new(),
            error: None,
            runs: Vec::new(),
            extents: Vec::new(),
            changes: Changes::default(),
        })
    }

    pub(super) fn enter(&mut self, id: usize, kind: RequestKind, offset: u64, length: u32) {
        if matches!(kind, RequestKind::Flush | RequestKind::Touched) || length == 0 {
            return self.start(id);
        }
        let mode = match kind {
            RequestKind::Write | RequestKind::Zero => Mode::Write,
            RequestKind::Pause => Mode::Pause,
            _ => Mode::Read,
        };
        if self.locks.enter(id, Self::block_range(offset, length), mode) {
            self.start(id);
        }
    }

    /// Cuts a request that may go on into parts and asks the nodes.
    pub(super) fn start(&mut self, id: usize) {
        let request = &self.requests[id];
        let (kind, length) = (request.kind, request.length);
        match kind {
            RequestKind::Flush => return self.start_flush(id),
            RequestKind::Touched => return self.start_touched(id),
            RequestKind::Pause => {
                let known = self.repair_paused(id) || self.scrub_paused(id);
                assert!(known, "who pauses writes is known");
                return;
            }
            _ => {}
        }
        if length == 0 || request.is_refused() {
            return self.finish_request(id);
        }
        let pieces = pieces(&self.spec.geometry, request.offset, length, kind);
        let request = &mut self.requests[id];
        request.parts_left = pieces.len() as u32;
        match kind {
            RequestKind::Read => request.runs.resize_with(pieces.len(), Vec::new),
            RequestKind::Status | RequestKind::Changes => {
                request.extents.resize_with(pieces.len(), Vec::new)
            }
            _ => {}
        }
        let mut payload = std::mem::take(&mut request.payload);
        let flags = request.flags;
        for (position, piece) in pieces.into_iter().enumerate() {
            let payload = match kind {
                RequestKind::Write => payload.split_to(piece.length as usize),
                _ => Bytes::new(),
            };
            let part = self.new_part(id, position as u32, kind, piece, flags, payload);
            match kind {
                RequestKind::Write | RequestKind::Zero => self.dispatch_write(part),
                _ => self.dispatch_read(part),
            }
        }
    }

    pub(super) fn new_part(
        &mut self,
        request: usize,
        position: u32,
        kind: RequestKind,
        piece: Piece,
        flags: u8,
        payload: Bytes,
    ) -> usize {
        let set = self.spec.geometry.replica_set_of(piece.shard);
        let changes = matches!(kind, RequestKind::Write | RequestKind::Zero);
        let sequence = if changes { self.take_sequence() } else { 0 };
        let wanted = match changes {
            true => self.sets[set as usize].in_sync.with(self.healing_of(set, piece.shard)),
            false => NodeMask::EMPTY,
        };
        let serial = self.next_serial();
        self.parts.insert(Part {
            serial,
            request,
            position,
            kind,
            set,
            shard: piece.shard,
            offset: piece.offset,
            length: piece.length,
            flags,
            sequence,
            payload,
            wanted,
            waiting: wanted,
            sent: NodeMask::EMPTY,
            tried: NodeMask::EMPTY,
            no_space: NodeMask::EMPTY,
            awaited: 0,
            confirming: false,
            marks: Vec::new(),
            clear_sequence: 0,
            timing: Timing::default(),
            listing: Listing::default(),
        })
    }

    fn take_sequence(&mut self) -> u64 {
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        self.unanswered.insert(sequence);
        sequence
    }

    pub(super) fn tag_of(&self, part: usize) -> u64 {
        u64::from(self.parts[part].serial) << 32 | part as u64
    }

    /// Sends a write to every in-sync replica that is up; the others get it when they are.
    fn dispatch_write(&mut self, id: usize) {
        let (waiting, length) = (self.parts[id].waiting, self.parts[id].length);
        self.bytes_since_flush += u64::from(length);
        let up = waiting.and(self.attached());
        self.send_change(id, up);
        for node in waiting.without(up).iter() {
            self.tell_blocking(node);
        }
    }

    /// Sends the write or zero `id` to `nodes`, under the generation of now.
    pub(super) fn send_change(&mut self, id: usize, nodes: NodeMask) {
        if nodes.is_empty() {
            return;
        }
        let gated = self.gated(self.parts[id].shard).and(nodes);
        let nodes = nodes.without(gated);
        if !gated.is_empty() {
            self.demand(self.parts[id].shard);
        }
        if nodes.is_empty() {
            return;
        }
        let tag = self.tag_of(id);
        for node in nodes.iter() {
            self.replica(node).write_mark += 1;
        }
        let part = &mut self.parts[id];
        part.sent = part.sent.with(nodes);
        part.tried = part.tried.without(nodes);
        let io = Io {
            shard: part.shard,
            offset: part.offset,
            length: part.length,
            epoch: self.spec.epoch,
            generation: self.spec.generation,
            sequence: part.sequence,
        };
        let (flags, payload) = (part.flags, part.payload.clone());
        let frame_kind = if part.kind == RequestKind::Write { kind::WRITE } else { kind::ZERO };
        self.send(nodes, frame_kind, flags, tag, &payload, |out| {
            io.put(out);
            put_checksums(out, io.offset, &payload);
        });
    }

    /// Asks the best replica for a read part; none up: the part waits until one is.
    pub(super) fn dispatch_read(&mut self, id: usize) {
        let part = &self.parts[id];
        let (request, in_sync) = (part.request, self.sets[part.set as usize].in_sync);
        let (shard, untried) = (part.shard, in_sync.without(part.tried));
        let (up, gated) = (self.up(), self.gated_of(part));
        let fresh = untried.and(up).without(gated);
        let kept = part.listing.node.filter(|node| fresh.has(*node));
        let chosen = || choose_reader(fresh, self.spec.local, &mut self.read_turn);
        let Some(node) = kept.or_else(chosen) else {
            let absent = untried.without(up);
            if !untried.and(gated).is_empty() || !absent.is_empty() {
                // It waits for them, or until the shard is level.
                absent.iter().for_each(|node| self.tell_blocking(node));
                return if !gated.is_empty() {
                    self.demand(shard)
                };
            }
            if self.parts[id].kind != RequestKind::Touched && self.may_be_repaired(id) {
                return;
            }
            // Every replica has failed it.
            self.parts.remove(id);
            self.requests[request].error = Some(IoError::Io);
            return self.part_done(request);
        };
        let tag = self.tag_of(id);
        let part = &mut self.parts[id];
        part.waiting = NodeMask::one(node);
        part.sent = part.waiting;
        let piece = Piece { shard: part.shard, offset: part.offset, length: part.length };
        let (asked, io) = (part.kind, blocks_asked(piece, self.spec.epoch, self.spec.generation));
        let node = NodeMask::one(node);
        match asked {
            RequestKind::Read => {
                self.send(node, kind::READ, 0, tag, &Bytes::new(), |out| io.put(out))
            }
            RequestKind::Changes => self.ask_changes(node, tag, request, io),
            RequestKind::Touched => node.iter().for_each(|node| self.ask_touched(node, id)),
            _ => self.send(node, kind::STATUS, 0, tag, &Bytes::new(), |out| io.put(out)),
        }
    }

    /// Reads and status questions that found no replica are tried again.
    pub(super) fn dispatch_parked_reads(&mut self) {
        let is_parked = |part: &Part| part.kind.reads() && part.waiting.is_empty();
        let parked = self.parts.iter().filter(|(_, part)| is_parked(part));
        let parked: Vec<usize> = parked.map(|(id, _)| id).collect();
        for id in parked {
            if self.parts.get(id).is_some_and(is_parked) {
                self.dispatch_read(id);
            }
        }
    }

    /// Sends FLUSH to every in-sync node that has had a write since its last finished flush.
    fn start_flush(&mut self, request: usize) {
        if self.requests[request].covers.is_empty() {
            self.requests[request].covers = self.flush_covers();
        }
        if self.phase != Phase::Closing || self.requests[request].token.is_some() {
            // The last flush of a holder promises nothing: what is dirty stays so.
            if self.flush_waits() {
                return self.hold_flush(request);
            }
        }
        self.requests[request].parts_left = 1;
        let nowhere = Piece { shard: 0, offset: 0, length: 0 };
        let id = self.new_part(request, 0, RequestKind::Flush, nowhere, 0, Bytes::new());
        let wanted = self.in_sync_anywhere().with(self.healing_of_flush());
        let needed = wanted.iter().filter(|node| {
            let replica = &self.replicas[usize::from(*node)];
            let first = replica.flushed_mark.is_none() && !broken(Rule::FirstFlushGoesToAll);
            first || replica.flushed_mark.unwrap_or(0) != replica.write_mark
        });
        let waiting = needed.fold(NodeMask::EMPTY, |mask, node| mask.with(NodeMask::one(node)));
        self.bytes_since_flush = 0;
        self.ticks_since_flush = 0;
        let clear_sequence = match broken(Rule::ClearIsAnswered) {
            true => self.next_sequence - 1,
            false => self.answered_through(),
        };
        let part = &mut self.parts[id];
        (part.wanted, part.waiting) = (waiting, waiting);
        part.clear_sequence = clear_sequence;
        let up = waiting.and(self.attached());
        self.send_flush(id, up);
        for node in waiting.without(up).iter() {
            self.tell_blocking(node);
        }
        self.complete_if_answered(id);
    }

    pub(super) fn send_flush(&mut self, id: usize, nodes: NodeMask) {
        let tag = self.tag_of(id);
        for node in nodes.iter() {
            let mark = self.replica(node).write_mark;
            let marks = &mut self.parts[id].marks;
            marks.retain(|(other, _)| *other != node);
            marks.push((node, mark));
        }
        self.parts[id].sent = self.parts[id].sent.with(nodes);
        for node in nodes.iter() {
            let told = self.clear.pending.has(node);
            self.clear.pending = self.clear.pending.without(NodeMask::one(node));
            let flush = Flush {
                epoch: self.spec.epoch,
                generation: self.spec.generation,
                clear_sequence: if told { self.clear.sequence } else { 0 },
                proof: if told { self.clear.proof.clone() } else { Vec::new() },
            };
            let only = NodeMask::one(node);
            self.send(only, kind::FLUSH, 0, tag, &Bytes::new(), |out| flush.put(out));
        }
    }

    /// Policy is told once that requests wait for a replica that is not up.
    pub(super) fn tell_blocking(&mut self, node: NodeIndex) {
        if self.attached().has(node) || self.replica(node).blocking_told {
            return;
        }
        self.replica(node).blocking_told = true;
        self.event(Event::ReplicaBlocking { node });
    }

    /// Once a second: flush what the guest does not, send clears that no flush took along, ask again
    /// what a replica failed.
    pub fn tick(&mut self) {
        if !matches!(self.phase, Phase::Running | Phase::Closing) {
            return;
        }
        self.tell_lags();
        self.tick_levelling();
        self.ticks_since_flush += 1;
        let idle_clear = self.clear.pending.and(self.whole());
        if !idle_clear.is_empty() && self.ticks_since_flush >= 2 {
            self.send_clear(idle_clear);
        }
        let due = self.bytes_since_flush > 0 && self.ticks_since_flush >= SELF_FLUSH_TICKS;
        let running = self.phase == Phase::Running && self.held_flushes.is_empty();
        let due = due && !self.is_levelling();
        if running && (due || self.bytes_since_flush >= SELF_FLUSH_BYTES) {
            self.submit_own_flush();
        }
        self.send_unsent();
        self.start_repairs();
        self.retry_forgotten_reads();
    }

    /// Sends again what a replica that is up failed, or was not asked.
    pub(super) fn send_unsent(&mut self) {
        let up = self.attached();
        let again: Vec<usize> = self
            .parts
            .iter()
            .filter(|(_, part)| !part.waiting.without(part.sent).and(up).is_empty())
            .map(|(id, _)| id)
            .collect();
        again.into_iter().for_each(|id| self.send_missing(id, up));
    }

    /// Sends a part to those of `nodes` that wait for it and were not asked.
    pub(super) fn send_missing(&mut self, id: usize, nodes: NodeMask) {
        let part = &mut self.parts[id];
        let missing = part.waiting.without(part.sent).and(nodes);
        part.asked_late(missing);
        match part.kind {
            RequestKind::Write | RequestKind::Zero => self.send_change(id, missing),
            RequestKind::Flush => self.send_flush(id, missing),
            _ if part.confirming => self.send_confirm(id, missing),
            _ => {}
        }
    }

    pub(super) fn send_clear(&mut self, nodes: NodeMask) {
        self.clear.pending = self.clear.pending.without(nodes);
        let clear = Flush {
            epoch: self.spec.epoch,
            generation: self.spec.generation,
            clear_sequence: self.clear.sequence,
            proof: self.clear.proof.clone(),
        };
        self.send(nodes, kind::CLEAR, 0, 0, &Bytes::new(), |out| clear.put(out));
    }
}

/// One checksum per touched block, cut where the blocks are cut, not where the payload begins.
fn put_checksums(out: &mut BytesMut, offset: u32, payload: &[u8]) {
    let to_boundary = (BLOCK_BYTES - offset % BLOCK_BYTES) as usize;
    let (first, rest) = payload.split_at(to_boundary.min(payload.len()));
    if payload.len() == BLOCK_BYTES as usize && rest.is_empty() {
        return out.put_u64_le(checksum_of(payload));
    }
    let mut checksums = Vec::with_capacity(2 + rest.len() / BLOCK_BYTES as usize);
    block_checksums(first, &mut checksums);
    block_checksums(rest, &mut checksums);
    checksums.into_iter().for_each(|checksum| out.put_u64_le(checksum));
}
