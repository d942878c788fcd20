//! A store on a simulated disk with small helpers, for one image with shards of 1 MiB.

use bytes::{Bytes, BytesMut};

use crate::checksum::{Checksum, block_checksums, checksum_of};
use crate::geometry::{BLOCK_BYTES, ImageId, LayerId, ShardKey};
use crate::store::simulated::SimDisk;
use crate::store::{
    BlockState, Chain, ImageRecord, RecordHead, Recovery, Stamp, Store, StoreConfig, StoreError,
    View, WriteOp,
};

pub const BLOCK: usize = BLOCK_BYTES as usize;
pub const IMAGE: ImageId = ImageId([0xA1; 16]);
pub const SHARD_BYTES: u32 = 1 << 20;
pub const SHARD_BLOCKS: u32 = SHARD_BYTES / BLOCK_BYTES;

pub fn config() -> StoreConfig {
    StoreConfig {
        segment_bytes: Some(64 << 10),
        ..StoreConfig::new([1; 16], "node1", [2; 16], 512 << 10)
    }
}

pub fn open(disk: &SimDisk) -> Result<(Store, Recovery), StoreError> {
    Store::open(disk.run(), &config())
}

pub fn head(epoch: u64, generation: u64) -> RecordHead {
    let holder = [epoch as u8; 16];
    RecordHead {
        epoch,
        holder,
        generation,
        digest: [generation as u8; 32],
        shard_bytes: SHARD_BYTES,
    }
}

/// A record of an image with one layer.
pub fn record(head: RecordHead) -> ImageRecord {
    let chain = Chain::new(&[1]).expect("a chain");
    ImageRecord {
        head,
        blank: false,
        chain,
        snapshots: Vec::new(),
        merging: Vec::new(),
        parent: None,
        body: Bytes::new(),
    }
}

/// A record of epoch 1 with these layers.
pub fn layered(generation: u64, layers: &[LayerId]) -> ImageRecord {
    let chain = Chain::new(layers).expect("a chain");
    ImageRecord { chain, ..record(head(1, generation)) }
}

/// A store with a record of `IMAGE` at epoch 1, generation 1.
pub fn new_store(disk: &SimDisk) -> Store {
    let (mut store, recovery) = open(disk).expect("an empty disk takes a store");
    assert!(recovery.created && !recovery.damaged);
    store
        .put_record(IMAGE, ImageRecord { body: Bytes::from_static(b"{}"), ..record(head(1, 1)) })
        .expect("a first record");
    store
}

/// A disk with one store on it, and whatever else a test needs to say what it does.
pub struct Rig {
    pub disk: SimDisk,
    pub store: Store,
    pub stamp: Stamp,
}

impl Rig {
    pub fn new() -> Rig {
        let disk = SimDisk::new();
        let store = new_store(&disk);
        Rig { disk, store, stamp: Stamp { epoch: 1, generation: 1, sequence: 0 } }
    }

    /// Kills the process and opens the store again.
    pub fn restart(self) -> (Rig, Recovery) {
        self.disk.kill();
        self.reopen()
    }

    pub fn power_cut(self, seed: u64) -> (Rig, Recovery) {
        self.disk.power_cut(seed);
        self.reopen()
    }

    fn reopen(self) -> (Rig, Recovery) {
        let Rig { disk, store, stamp } = self;
        drop(store);
        let (store, recovery) = open(&disk).expect("the store opens again");
        (Rig { disk, store, stamp }, recovery)
    }

    pub fn write_layers(
        &mut self,
        layers: &[LayerId],
        shard: u64,
        offset: u32,
        data: &[u8],
    ) -> Result<u64, StoreError> {
        self.stamp.sequence += 1;
        let op = WriteOp { view: View::own(IMAGE, layers), shard, offset, stamp: self.stamp };
        self.store.write(&op, &fragment_checksums(offset, data), Bytes::copy_from_slice(data))
    }

    pub fn write(&mut self, shard: u64, offset: u32, data: &[u8]) {
        self.write_layers(&[1], shard, offset, data).expect("a write");
    }

    /// A record of the next generation that names these layers.
    pub fn layers(&mut self, layers: &[LayerId]) -> Result<u64, StoreError> {
        self.stamp.generation += 1;
        self.store.put_record(IMAGE, layered(self.stamp.generation, layers))
    }

    /// A record of the next generation with these layers, of which some are merged.
    pub fn merging(&mut self, layers: &[LayerId], merging: &[LayerId]) -> Result<u64, StoreError> {
        self.stamp.generation += 1;
        let record = layered(self.stamp.generation, layers);
        self.store.put_record(IMAGE, ImageRecord { merging: merging.to_vec(), ..record })
    }

    /// Merges as a node's loop does, until nothing is left to merge and files are removed.
    pub fn merge_all(&mut self) -> Result<(), StoreError> {
        while self.store.wants_merge() {
            let merged = self.store.merge_some(false);
            if merged != Err(StoreError::LogFull) {
                merged?;
            }
            self.checkpoint_by_need()?;
        }
        while self.store.wants_checkpoint() {
            self.checkpoint_by_need()?;
        }
        Ok(())
    }

    fn checkpoint_by_need(&mut self) -> Result<(), StoreError> {
        match self.store.begin_checkpoint(false)? {
            Some(job) => self.store.finish_checkpoint(job.run()),
            None => Ok(()),
        }
    }

    /// Fills blocks with one byte.
    pub fn fill(&mut self, shard: u64, first_block: u32, blocks: u32, byte: u8) {
        self.write(shard, first_block * BLOCK_BYTES, &vec![byte; blocks as usize * BLOCK]);
    }

    pub fn sync(&mut self) {
        if let Some(job) = self.store.begin_sync().expect("a sync begins") {
            self.store.finish_sync(job.run()).expect("a sync succeeds");
        }
    }

    pub fn checkpoint(&mut self) {
        if let Some(job) = self.store.begin_checkpoint(true).expect("a checkpoint begins") {
            self.store.finish_checkpoint(job.run()).expect("a checkpoint succeeds");
        }
    }

    /// What a node's loop does when it has time.
    pub fn checkpoint_if_due(&mut self) {
        if let Some(job) = self.store.begin_checkpoint(false).expect("a checkpoint begins") {
            self.store.finish_checkpoint(job.run()).expect("a checkpoint succeeds");
        }
    }

    pub fn read_layers(
        &mut self,
        layers: &[LayerId],
        shard: u64,
        first_block: u32,
        blocks: u32,
    ) -> Result<(Vec<BlockState>, Vec<u8>), StoreError> {
        let (mut states, mut data) = (Vec::new(), BytesMut::new());
        self.store.read(
            View::own(IMAGE, layers),
            shard,
            first_block,
            blocks,
            &mut states,
            &mut data,
        )?;
        Ok((states, data.to_vec()))
    }

    /// Content of blocks with zeros for those without data.
    pub fn content(&mut self, shard: u64, first_block: u32, blocks: u32) -> Vec<u8> {
        let (states, data) = self.read_layers(&[1], shard, first_block, blocks).expect("a read");
        flatten(&states, &data)
    }

    pub fn dirty(&self) -> Vec<u64> {
        self.store.dirty(&IMAGE).map(|(shard, _)| shard).collect()
    }

    pub fn key(shard: u64) -> ShardKey {
        ShardKey { image: IMAGE, layer: 1, shard }
    }
}

pub fn flatten(states: &[BlockState], data: &[u8]) -> Vec<u8> {
    let mut out = vec![0; states.len() * BLOCK];
    let mut rest = data;
    for (index, state) in states.iter().enumerate() {
        if *state == BlockState::Data {
            let (block, next) = rest.split_at(BLOCK);
            out[index * BLOCK..][..BLOCK].copy_from_slice(block);
            rest = next;
        }
    }
    assert!(rest.is_empty(), "as much data as the states say");
    out
}

/// CRC32C of each touched block's part of the data.
pub fn fragment_checksums(offset: u32, data: &[u8]) -> Vec<Checksum> {
    let first = (BLOCK - offset as usize % BLOCK).min(data.len());
    let mut checksums = vec![checksum_of(&data[..first])];
    block_checksums(&data[first..], &mut checksums);
    checksums
}
