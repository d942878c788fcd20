//! CHANGES and TOUCHED: what of an image was written since its snapshots. Answered from what the store knows of
//! blocks; no content is read.

use super::requests::{Readable, Refused, Requests, Step, block_range};
use crate::geometry::{ImageId, LayerId, SnapshotId};
use crate::rules::{Rule, broken};
use crate::store::{BlockState, ImageRecord, View, WrittenCursor};
use crate::wire::changes::{
    ChangedRun, ChangesAsked, ChangesReply, Held, TouchedAsked, TouchedReply,
};
use crate::wire::messages::Head;
use crate::wire::{Frame, Status};
use bytes::Bytes;
use std::collections::HashMap;

impl Requests<'_> {
    /// Of each block the layer that has it, and since which snapshots it was written.
    pub(super) fn changes(&mut self, frame: &Frame) -> Step {
        let ChangesAsked { io, since } = ChangesAsked::take(frame.head.clone())?;
        let readable = self.readable(frame, io.epoch)?;
        let (first, blocks) = block_range(&io)?;
        since.iter().try_for_each(|snapshot| self.check_since(&readable, snapshot))?;
        let depths = self.depths(readable.view())?;
        let mut origins = Vec::with_capacity(blocks as usize);
        self.store.origins(readable.view(), io.shard, first, blocks, &mut origins)?;
        let of = |(state, image, layer): (BlockState, ImageId, LayerId)| {
            let held = match state {
                BlockState::Absent => return (Held::Absent, 0, 0),
                BlockState::Zero => Held::Zero,
                BlockState::Data | BlockState::Bad => Held::Data,
            };
            // What a clone has from its ancestors was there before its first snapshot.
            let own = image == readable.image;
            let changed = since.iter().filter(|snapshot| own && layer > snapshot.layer).count();
            (held, depths.get(&(image, layer)).copied().unwrap_or(0), changed as u8)
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
        let readable = self.readable(frame, asked.epoch)?;
        let view = match &asked.since {
            None => readable.view(),
            Some(snapshot) => {
                self.check_since(&readable, snapshot)?;
                let layers = readable.chain.layers();
                let above = layers.partition_point(|layer| *layer > snapshot.layer);
                View::own(readable.image, &layers[..above])
            }
        };
        let generation = self.generation_of(&readable)?;
        // Places are of the layers that these records have: under others the listing begins anew.
        let from = match asked.generation == generation {
            true => WrittenCursor { place: asked.place, shard: asked.shard },
            false => WrittenCursor::default(),
        };
        let range = asked.first_shard..asked.end_shard;
        let page = self.store.touched(view, &range, from)?;
        let next = page.next.map(|next| (next.place, next.shard));
        let reply = TouchedReply { generation, next, shards: page.shards };
        Ok(self.answer(&reply, Bytes::new()))
    }

    fn stored(&self, image: &ImageId) -> Step<&ImageRecord> {
        self.store.image(image).ok_or(Refused::Status(Status::NoRecord))
    }

    /// That of its record and those of its ancestors' records, summed: it grows whenever one of them does.
    fn generation_of(&self, readable: &Readable) -> Step<u64> {
        let mut sum = self.stored(&readable.image)?.head.generation;
        for ancestor in &readable.ancestors {
            sum += self.stored(&ancestor.image)?.head.generation;
        }
        Ok(sum)
    }

    /// Of each layer, the how manieth it is from 1 on. What is merged counts as where it goes.
    fn depths(&self, view: View<'_>) -> Step<HashMap<(ImageId, LayerId), u16>> {
        let (mut depths, mut depth) = (HashMap::new(), 0);
        for (image, layer) in view.all_layers() {
            depth += u16::from(!self.stored(&image)?.merging.contains(&layer));
            depths.insert((image, layer), depth);
        }
        Ok(depths)
    }

    /// What is below a layer that no snapshot names is merged into it, and would count as written since: so it is
    /// one that the record names, below what is read.
    fn check_since(&self, readable: &Readable, snapshot: &SnapshotId) -> Step<()> {
        let named = self.stored(&readable.image)?.snapshots.contains(snapshot);
        let below = readable.chain.layers()[1..].contains(&snapshot.layer);
        if named && below || broken(Rule::ChangesAreSinceSnapshots) {
            return Ok(());
        }
        Err(Refused::Status(Status::NoLayers))
    }
}
