//! Scrub: blocks of one shard are read and verified, rotten or not, and summed up in a digest that
//! replicas compare.
//!
//! What is verified is what lies on the disk: the kernel's copy of a file is dropped before the file is
//! read, and metadata is read again although it is in memory. Where memory knows what the file has lost,
//! the file gets it back at once; all else is for whoever has other replicas.

use std::sync::Arc;

use bytes::BytesMut;

use crate::checksum::checksum_of;
use crate::geometry::{BLOCK_BYTES, ShardKey};

use super::disk::{Errno, FileRef};
use super::lineage::View;
use super::read::run_length;
use super::shard_file::{ShardMeta, read_meta, rewrite_both, slot_bytes};
use super::{BlockState, Store, StoreError};

const BLOCK: usize = BLOCK_BYTES as usize;

/// What was found in some blocks of one shard of one layer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Scrubbed {
    /// The shard's metadata was damaged on the disk, and is whole again.
    pub metadata_rewritten: bool,
    /// Blocks with data, rotten ones included.
    pub data_blocks: u32,
    /// Indexes within the shard of blocks that do not match their checksums, in order.
    pub rotten: Vec<u32>,
    /// BLAKE3 of what each block is and of what intact data says, in order.
    pub digest: [u8; 32],
}

impl Store {
    /// Reads `blocks` blocks of one layer's shard from `first_block` on, and with the first one the
    /// shard's metadata.
    pub fn scrub(
        &mut self,
        key: &ShardKey,
        first_block: u32,
        blocks: u32,
    ) -> Result<Scrubbed, StoreError> {
        self.check()?;
        let shard_bytes = self.state.images.require(&key.image)?.shard_bytes;
        let metadata_rewritten = first_block == 0 && self.scrub_metadata(key, shard_bytes)?;
        let mut found = std::mem::take(&mut self.scratch);
        let range = (first_block, blocks);
        let looked = self.look_up(View::own(key.image, &[key.layer]), key.shard, range, &mut found);
        let mut digest = blake3::Hasher::new();
        let mut rotten = Vec::new();
        let read = looked.and_then(|()| {
            let mut data = BytesMut::new();
            let mut index = 0;
            while index < found.len() {
                let block = first_block + index as u32;
                digest.update(&[found[index].state().to_u8()]);
                if found[index].state() != BlockState::Data {
                    if found[index].state() == BlockState::Bad {
                        rotten.push(block);
                    }
                    index += 1;
                    continue;
                }
                let run = run_length(&found[index..]);
                data.clear();
                let place = self.source_of(key.shard, block, &found[index]);
                match place {
                    Ok((file, offset)) => {
                        // Without it what is read may be what was written, not what is on the disk.
                        if found[index].is_in_file() {
                            file.forget_cached(offset, (run * BLOCK) as u64);
                        }
                        match file.read_at(offset, run * BLOCK, &mut data) {
                            Ok(_) => {}
                            Err(Errno::IO) => read_blocks(&file, offset, run, &mut data),
                            Err(errno) => return Err(errno.into()),
                        }
                    }
                    // Its file is gone.
                    Err(StoreError::BadBlock { .. }) => {}
                    Err(error) => return Err(error),
                }
                data.resize(run * BLOCK, 0);
                for (step, content) in data.chunks_exact(BLOCK).enumerate() {
                    if step > 0 {
                        digest.update(&[BlockState::Data.to_u8()]);
                    }
                    match checksum_of(content) == found[index + step].checksum() {
                        true => _ = digest.update(content),
                        false => rotten.push(block + step as u32),
                    }
                }
                index += run;
            }
            Ok(())
        });
        let data = found.iter().filter(|found| found.state() == BlockState::Data).count();
        self.scratch = found;
        read?;
        let digest = *digest.finalize().as_bytes();
        Ok(Scrubbed { metadata_rewritten, data_blocks: data as u32, rotten, digest })
    }

    /// What is in files only is read from there again.
    #[cfg(test)]
    pub(crate) fn forget_metadata(&mut self) {
        self.metas.retain(|_| false);
    }

    /// Reads a shard's metadata again; true: it was damaged, and memory still knew it.
    fn scrub_metadata(&mut self, key: &ShardKey, shard_bytes: u32) -> Result<bool, StoreError> {
        if self.may_be_torn(key) || self.is_checkpointed(key) {
            // A checkpoint writes it at this moment, or has to write it anew.
            return Ok(false);
        }
        let Some(file) = self.shard_file(key)? else { return Ok(false) };
        file.forget_cached(u64::from(shard_bytes), 2 * slot_bytes(shard_bytes));
        let on_disk = read_meta(&*file, key, shard_bytes, false)?;
        let known = match self.metas.get(key) {
            Some(known) if **known != on_disk => ShardMeta::clone(known),
            Some(_) => return Ok(false),
            None => {
                let weight = on_disk.weight();
                self.metas.insert(*key, Arc::new(on_disk), weight);
                return Ok(false);
            }
        };
        if known.version == 0 || known.rewrite_both {
            // Nothing in it that was better.
            return Ok(false);
        }
        let mut meta = known;
        match rewrite_both(&*file, key, shard_bytes, &mut meta) {
            Ok(()) => {}
            Err(Errno::NOSPC | Errno::DQUOT) => return Ok(false),
            Err(errno) => return Err(self.fail(errno)),
        }
        let weight = meta.weight();
        self.metas.insert(*key, Arc::new(meta), weight);
        Ok(true)
    }
}

/// Reads block by block; one that cannot be read is zeros, and so fails its checksum.
fn read_blocks(file: &FileRef, offset: u64, blocks: usize, data: &mut BytesMut) {
    data.clear();
    for index in 0..blocks {
        let start = index * BLOCK;
        if file.read_at(offset + start as u64, BLOCK, data).is_err() {
            data.truncate(start);
        }
        data.resize(start + BLOCK, 0);
    }
}
