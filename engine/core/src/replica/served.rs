//! What a gateway serves on a channel: an image that it holds, or frozen layers that it reads.

use super::replies::BadReply;
use super::{ImageIo, Instance, IoError, NodeIndex, Outcome, Output, ReaderIo, Token};
use crate::geometry::SnapshotId;
use crate::wire::Frame;
use bytes::Bytes;
use std::net::SocketAddr;
use std::sync::Arc;

pub enum Served {
    Image(Box<ImageIo>),
    Reader(Box<ReaderIo>),
}

impl Served {
    /// The image, where it is one that is held.
    pub fn image(&self) -> Option<&ImageIo> {
        match self {
            Served::Image(io) => Some(io),
            Served::Reader(_) => None,
        }
    }

    pub fn image_mut(&mut self) -> Option<&mut ImageIo> {
        match self {
            Served::Image(io) => Some(io),
            Served::Reader(_) => None,
        }
    }

    pub fn reader(&self) -> Option<&ReaderIo> {
        match self {
            Served::Image(_) => None,
            Served::Reader(io) => Some(io),
        }
    }

    /// The nodes that it asks, in the order of their indexes.
    pub fn nodes(&self) -> &[String] {
        match self {
            Served::Image(io) => &io.spec().nodes,
            Served::Reader(io) => &io.spec().nodes,
        }
    }

    pub fn set_now(&mut self, now_ns: u64) {
        match self {
            Served::Image(io) => io.set_now(now_ns),
            Served::Reader(io) => io.set_now(now_ns),
        }
    }

    /// Other nodes reach `node` here; none: nobody knows where.
    pub fn set_address(&mut self, node: NodeIndex, address: Option<SocketAddr>) {
        if let Served::Image(io) = self {
            io.set_address(node, address);
        }
    }

    /// The connection to `node` is ready; `instance` is the one that greeted on it, `boot` that of its host.
    pub fn link_up(&mut self, node: NodeIndex, instance: Instance, boot: [u8; 16]) {
        match self {
            Served::Image(io) => io.link_up(node, instance, boot),
            Served::Reader(io) => io.link_up(node),
        }
    }

    /// The connection to `node` is gone.
    pub fn link_down(&mut self, node: NodeIndex) {
        match self {
            Served::Image(io) => io.link_down(node),
            Served::Reader(io) => io.link_down(node),
        }
    }

    /// Takes one frame of `node`.
    ///
    /// # Errors
    /// The node breaks the protocol: close its connection (and tell `link_down`).
    pub fn receive(&mut self, node: NodeIndex, frame: Frame) -> Result<(), BadReply> {
        match self {
            Served::Image(io) => io.receive(node, frame),
            Served::Reader(io) => io.receive(node, frame),
        }
    }

    /// The next thing that it wants done.
    pub fn take_output(&mut self) -> Option<Output> {
        match self {
            Served::Image(io) => io.outputs.pop_front(),
            Served::Reader(io) => io.outputs.pop_front(),
        }
    }

    /// To be called when everything that came was taken.
    pub fn report_background(&mut self) {
        if let Served::Image(io) = self {
            io.report_background();
        }
    }

    /// Whether `pace` is to be called now and then.
    pub fn wants_pace(&self) -> bool {
        match self {
            Served::Image(io) => io.wants_pace(),
            Served::Reader(_) => true,
        }
    }

    /// Time has passed.
    pub fn pace(&mut self) {
        match self {
            Served::Image(io) => io.pace(),
            Served::Reader(io) => io.pace(),
        }
    }

    /// Ends it, by `Event::Closed`.
    pub fn close(&mut self) {
        match self {
            Served::Image(io) => io.close(),
            Served::Reader(io) => io.close(),
        }
    }

    /// Ends it at once.
    pub fn kill(&mut self) {
        match self {
            Served::Image(io) => io.kill(),
            Served::Reader(io) => io.kill(),
        }
    }

    // Requests of clients

    pub fn size_bytes(&self) -> u64 {
        match self {
            Served::Image(io) => io.size_bytes(),
            Served::Reader(io) => io.spec().geometry.size_bytes,
        }
    }

    pub fn read(&mut self, token: Token, offset: u64, length: u32) {
        match self {
            Served::Image(io) => io.read(token, offset, length),
            Served::Reader(io) => io.read(token, offset, length),
        }
    }

    pub fn status(&mut self, token: Token, offset: u64, length: u32) {
        match self {
            Served::Image(io) => io.status(token, offset, length),
            Served::Reader(io) => io.status(token, offset, length),
        }
    }

    pub fn shard_bytes(&self) -> u64 {
        u64::from(match self {
            Served::Image(io) => io.spec().geometry.shard_bytes,
            Served::Reader(io) => io.spec().geometry.shard_bytes,
        })
    }

    pub fn changes(&mut self, token: Token, offset: u64, length: u32, since: Arc<[SnapshotId]>) {
        match self {
            Served::Image(io) => io.changes(token, offset, length, since),
            Served::Reader(io) => io.changes(token, offset, length, since),
        }
    }

    pub fn touched(&mut self, token: Token, offset: u64, length: u64, since: Option<SnapshotId>) {
        match self {
            Served::Image(io) => io.touched(token, offset, length, since),
            Served::Reader(io) => io.touched(token, offset, length, since),
        }
    }

    pub fn write(&mut self, token: Token, offset: u64, data: Bytes, flags: u8) {
        match self {
            Served::Image(io) => io.write(token, offset, data, flags),
            Served::Reader(io) => refuse_change(io, token),
        }
    }

    pub fn zero(&mut self, token: Token, offset: u64, length: u32, flags: u8) {
        match self {
            Served::Image(io) => io.zero(token, offset, length, flags),
            Served::Reader(io) => refuse_change(io, token),
        }
    }

    /// Frozen layers are durable as they are.
    pub fn flush(&mut self, token: Token) {
        match self {
            Served::Image(io) => io.flush(token),
            Served::Reader(io) => {
                io.outputs.push_back(Output::Answer { token, outcome: Outcome::Done });
            }
        }
    }
}

/// Exports of readers are read-only, so that no client asks for this.
fn refuse_change(io: &mut ReaderIo, token: Token) {
    let outcome = Outcome::Failed(IoError::Io);
    io.outputs.push_back(Output::Answer { token, outcome });
}
