//! CHANGES and TOUCHED: what of an image was written since its snapshots. Answered from what the store knows of
//! blocks; no content is read.

use super::requests::{Refused, Requests, Step, block_range};
use crate::geometry::{ImageId, LayerId, SnapshotId};
use crate::rules::{Rule, broken};
use crate::store::{BlockState, Chain, ImageRecord, WrittenCursor};
use crate::wire::changes::{
    ChangedRun, ChangesAsked, ChangesReply, Held, TouchedAsked, TouchedReply,
};
use crate::wire::messages::Head;
use crate::wire::{Frame, Status};
use bytes::Bytes;

impl Requests<'_> {
    /// Of each block the layer that has it, and since which snapshots it was written.
    pub(super) fn changes(&mut self, frame: &Frame) -> Step {
        let ChangesAsked { io, since } = ChangesAsked::take(frame.head.clone())?;
        let (image, chain) = self.readable(frame, io.epoch)?;
        let (first, blocks) = block_range(&io)?;
        since.iter().try_for_each(|snapshot| self.check_since(&image, &chain, snapshot))?;
        let depths = self.stored(&image)?.depths(&chain);
        let mut origins = Vec::with_capacity(blocks as usize);
        self.store.origins(&image, chain.layers(), io.shard, first, blocks, &mut origins)?;
        let of = |(state, layer): (BlockState, LayerId)| {
            let held = match state {
                BlockState::Absent => return (Held::Absent, 0, 0),
                BlockState::Zero => Held::Zero,
                BlockState::Data | BlockState::Bad => Held::Data,
            };
            let at = chain.layers().partition_point(|above| *above > layer);
            let changed = since.iter().filter(|snapshot| layer > snapshot.layer).count();
            (held, depths[at], changed as u8)
        };
        let mut runs: Vec<ChangedRun> = Vec::new();
        for (held, depth, changed) in origins.into_iter().map(of) {
            match runs.last_mut() {
                Some(run) if (run.held, run.depth, run.changed) == (held, depth, changed) => {
                    run.blocks += 1;
                }
                _ => runs.push(ChangedRun { blocks: 1, held, depth, changed }),
            }
        }
        Ok(self.answer(&ChangesReply { runs }, Bytes::new()))
    }

    /// A page of the shards that layers above a snapshot have something of.
    pub(super) fn touched(&mut self, frame: &Frame) -> Step {
        let asked = TouchedAsked::take(frame.head.clone())?;
        let (image, chain) = self.readable(frame, asked.epoch)?;
        let layers = match &asked.since {
            None => chain.layers(),
            Some(snapshot) => {
                self.check_since(&image, &chain, snapshot)?;
                let above = chain.layers().partition_point(|layer| *layer > snapshot.layer);
                &chain.layers()[..above]
            }
        };
        let generation = self.stored(&image)?.head.generation;
        // Places are of one record's layers: under another one the listing begins anew.
        let from = match asked.generation == generation {
            true => WrittenCursor { place: asked.place, shard: asked.shard },
            false => WrittenCursor::default(),
        };
        let range = asked.first_shard..asked.end_shard;
        let page = self.store.touched(&image, layers, &range, from)?;
        let next = page.next.map(|next| (next.place, next.shard));
        let reply = TouchedReply { generation, next, shards: page.shards };
        Ok(self.answer(&reply, Bytes::new()))
    }

    fn stored(&self, image: &ImageId) -> Step<&ImageRecord> {
        self.store.image(image).ok_or(Refused::Status(Status::NoRecord))
    }

    /// What is below a layer that no snapshot names is merged into it, and would count as written since: so it is
    /// one that the record names, below what is read.
    fn check_since(&self, image: &ImageId, chain: &Chain, snapshot: &SnapshotId) -> Step<()> {
        let named = self.stored(image)?.snapshots.contains(snapshot);
        let below = chain.layers()[1..].contains(&snapshot.layer);
        if named && below || broken(Rule::ChangesAreSinceSnapshots) {
            return Ok(());
        }
        Err(Refused::Status(Status::NoLayers))
    }
}
