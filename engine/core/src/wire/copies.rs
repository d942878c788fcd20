//! Heads of copies from node to node: what a holder orders (PULL), and what the node that got the order
//! then asks of the other one (PEER_FETCH).

use super::PAYLOAD_BYTES_MAX;
use super::codec::{Fields, Short, put_text};
use super::messages::Head;
use crate::geometry::{BLOCK_BYTES, ImageId, LayerId};
use bytes::{BufMut, BytesMut};
use std::net::SocketAddr;

/// Most blocks of one FETCH, PULL or PEER_FETCH.
pub const FETCH_BLOCKS_MAX: u32 = (PAYLOAD_BYTES_MAX / BLOCK_BYTES as usize) as u32;

/// A node and where others reach it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Source {
    pub node: String,
    pub address: SocketAddr,
}

/// PULL: make these blocks what `source` holds, with its tags, under the orderer's epoch and generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pull {
    pub epoch: u64,
    pub generation: u64,
    pub layer: LayerId,
    pub shard: u64,
    pub first_block: u32,
    pub blocks: u32,
    pub source: Source,
}

impl Head for Pull {
    fn put(&self, out: &mut BytesMut) {
        out.put_u64_le(self.epoch);
        out.put_u64_le(self.generation);
        out.put_u32_le(self.layer);
        out.put_u64_le(self.shard);
        out.put_u32_le(self.first_block);
        out.put_u32_le(self.blocks);
        put_text(out, &self.source.node);
        put_text(out, &self.source.address.to_string());
    }
    fn take_fields(f: &mut Fields) -> Result<Self, Short> {
        let (epoch, generation) = (f.u64()?, f.u64()?);
        let (layer, shard) = (f.u32()?, f.u64()?);
        let (first_block, blocks) = (f.u32()?, f.u32()?);
        check_range(first_block, blocks)?;
        let (node, address) = (f.text()?, f.text()?);
        // One way of writing an address only, so that a head is what it reads back as.
        let parsed: SocketAddr = address.parse().map_err(|_| Short)?;
        if parsed.to_string() != address {
            return Err(Short);
        }
        let source = Source { node, address: parsed };
        Ok(Pull { epoch, generation, layer, shard, first_block, blocks, source })
    }
}

/// PEER_FETCH: tell these blocks and their data, if the image's record has just this epoch and generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerFetch {
    pub image: ImageId,
    pub epoch: u64,
    pub generation: u64,
    pub layer: LayerId,
    pub shard: u64,
    pub first_block: u32,
    pub blocks: u32,
}

impl Head for PeerFetch {
    fn put(&self, out: &mut BytesMut) {
        out.put_slice(&self.image.0);
        out.put_u64_le(self.epoch);
        out.put_u64_le(self.generation);
        out.put_u32_le(self.layer);
        out.put_u64_le(self.shard);
        out.put_u32_le(self.first_block);
        out.put_u32_le(self.blocks);
    }
    fn take_fields(f: &mut Fields) -> Result<Self, Short> {
        let asked = PeerFetch {
            image: ImageId(f.array()?),
            epoch: f.u64()?,
            generation: f.u64()?,
            layer: f.u32()?,
            shard: f.u64()?,
            first_block: f.u32()?,
            blocks: f.u32()?,
        };
        check_range(asked.first_block, asked.blocks)?;
        Ok(asked)
    }
}

fn check_range(first_block: u32, blocks: u32) -> Result<(), Short> {
    let bounded = (1..=FETCH_BLOCKS_MAX).contains(&blocks);
    if bounded && first_block.checked_add(blocks).is_some() { Ok(()) } else { Err(Short) }
}
