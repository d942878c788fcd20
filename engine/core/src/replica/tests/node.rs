//! A simulated node as the histories here move it: nothing may go wrong but what they do to it.

use crate::checksum::checksum_of;
use crate::geometry::{BLOCK_BYTES, ImageId, ShardKey, Tag};
use crate::replica::Instance;
use crate::simulation;
use crate::store::{BlockState, CopyBlock, shard_path};
use crate::wire::Frame;
use bytes::Bytes;

pub struct SimNode {
    inner: simulation::SimNode,
}

impl SimNode {
    pub fn new(index: usize, log: simulation::LogSize) -> SimNode {
        let name = format!("node{}", index + 1);
        let mut inner = simulation::SimNode::new(&name, log);
        inner.start().expect("the store opens");
        SimNode { inner }
    }

    pub fn run(&mut self) -> &mut simulation::NodeRun {
        self.inner.run.as_mut().expect("a node that runs")
    }

    fn seen(&self) -> &simulation::NodeRun {
        self.inner.run.as_ref().expect("a node that runs")
    }

    pub fn instance(&self) -> Instance {
        self.seen().instance()
    }

    /// The process ends (`power`: with all that was not synced), and another takes its place.
    pub fn restart(&mut self, power: Option<u64>) {
        self.inner.stop(power);
        self.inner.start().expect("the store opens");
    }

    /// Content of a former life appears in a shard that nobody else has, and nothing is dirty.
    pub fn scribble(&mut self) {
        let image = ImageId([0xA1; 16]);
        let key = ShardKey { image, layer: 1, shard: 7 };
        let checksum = checksum_of(&[0xE5; BLOCK_BYTES as usize]);
        let blocks: Vec<CopyBlock> = (0..2)
            .map(|block| CopyBlock { block, state: BlockState::Data, tag: Tag::NONE, checksum })
            .collect();
        let store = &mut self.run().store;
        let content = Bytes::from(vec![0xE5; 2 * BLOCK_BYTES as usize]);
        store.copy(&key, &blocks, content, 1).expect("a copy");
        store.append().expect("the log takes a batch");
    }

    /// A byte of a shard's file flips, if it has that many.
    pub fn rot(&mut self, shard: u64, offset: u64) {
        let image = ImageId([0xA1; 16]);
        self.inner.disk.corrupt(&shard_path(&ShardKey { image, layer: 1, shard }), offset);
    }

    /// Takes the next frame of a connection; false: the connection waits for room in the log.
    pub fn takes(&self, connection: u64) -> bool {
        self.seen().takes(connection)
    }

    pub fn take(&mut self, connection: u64, frame: Frame) {
        let kind = frame.kind;
        self.run().take(connection, frame).expect("the store works");
        assert!(self.run().sent_away.is_empty(), "an honest gateway is not sent away: kind {kind}");
    }

    pub fn end_connection(&mut self, connection: u64) {
        self.run().end_connection(connection);
    }

    /// Syncs the log, and answers who waited for that.
    pub fn sync(&mut self) {
        self.run().begin_sync().expect("a sync begins");
        self.run().finish_sync().expect("a sync succeeds");
    }

    /// Makes room in the log, and goes on with what waited for it.
    pub fn checkpoint(&mut self) {
        let parked = self.run().parked().next().is_some();
        self.run().begin_checkpoint(parked).expect("it begins");
        for (connection, frame) in self.run().finish_checkpoint().expect("a checkpoint succeeds") {
            self.take(connection, frame);
        }
    }

    /// Merges a little, if there is something to merge.
    pub fn merge(&mut self) {
        self.run().merge().expect("the store works");
    }

    /// Everything goes from the log to files.
    pub fn checkpoint_all(&mut self) {
        let store = &mut self.run().store;
        if let Some(job) = store.begin_checkpoint(true).expect("it begins") {
            store.finish_checkpoint(job.run()).expect("a checkpoint succeeds");
        }
    }

    pub fn has_answers(&self) -> bool {
        !self.seen().answers.is_empty()
    }

    pub fn waits_for_sync(&self) -> bool {
        self.seen().queues().0 > 0
    }

    pub fn is_idle(&self) -> bool {
        self.seen().is_idle()
    }
}
