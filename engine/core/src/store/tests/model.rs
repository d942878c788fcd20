//! The store beside an in-memory model: random requests over two layers, restarts in between.

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};
use proptest::prelude::*;

use super::rig::*;
use crate::checksum::checksum_of;
use crate::geometry::{BLOCK_BYTES, LayerId, ShardKey, Tag};
use crate::store::index::{Place, Run, ShardIndex};
use crate::store::{BlockState, CopyBlock, StoreError, View, WriteOp};

const BLOCKS: u32 = 12;

#[derive(Clone, Debug)]
enum Request {
    Write { upper: bool, shard: u64, offset: u32, length: u32, byte: u8 },
    Zero { upper: bool, shard: u64, offset: u32, length: u32, keep: bool },
    Copy { shard: u64, block: u32, state: u8, byte: u8 },
    Sync,
    Checkpoint { force: bool },
    Kill,
    PowerCut { seed: u64 },
}

fn requests() -> impl Strategy<Value = Vec<Request>> {
    let area = BLOCKS * BLOCK_BYTES;
    let range = (0..area - 1)
        .prop_flat_map(move |offset| (Just(offset), 1..=(area - offset).min(3 * BLOCK_BYTES)));
    let aligned = (0..BLOCKS).prop_flat_map(|first| {
        (Just(first * BLOCK_BYTES), (1..=(BLOCKS - first).min(4)).prop_map(|n| n * BLOCK_BYTES))
    });
    let range = prop_oneof![range, aligned];
    let write =
        (any::<bool>(), 0..2u64, range.clone(), 1..=255u8).prop_map(|(upper, shard, r, byte)| {
            Request::Write { upper, shard, offset: r.0, length: r.1, byte }
        });
    let zero =
        (any::<bool>(), 0..2u64, range, any::<bool>()).prop_map(|(upper, shard, r, keep)| {
            Request::Zero { upper, shard, offset: r.0, length: r.1, keep }
        });
    let copy = (0..2u64, 0..BLOCKS, 0..3u8, 1..=255u8)
        .prop_map(|(shard, block, state, byte)| Request::Copy { shard, block, state, byte });
    let request = prop_oneof![
        10 => write,
        4 => zero,
        2 => copy,
        2 => Just(Request::Sync),
        2 => any::<bool>().prop_map(|force| Request::Checkpoint { force }),
        1 => Just(Request::Kill),
        1 => any::<u64>().prop_map(|seed| Request::PowerCut { seed }),
    ];
    prop::collection::vec(request, 1..60)
}

/// State and content of every block of every layer's shard, by what the store promises.
#[derive(Default)]
struct Model {
    blocks: BTreeMap<(LayerId, u64, u32), (BlockState, Vec<u8>)>,
}

impl Model {
    fn own(&self, layer: LayerId, shard: u64, block: u32) -> (BlockState, Vec<u8>) {
        let absent = || (BlockState::Absent, vec![0; BLOCK]);
        self.blocks.get(&(layer, shard, block)).cloned().unwrap_or_else(absent)
    }

    fn resolved(&self, layers: &[LayerId], shard: u64, block: u32) -> (BlockState, Vec<u8>) {
        let found = layers.iter().map(|layer| self.own(*layer, shard, block));
        found
            .into_iter()
            .find(|(state, _)| *state != BlockState::Absent)
            .unwrap_or((BlockState::Absent, vec![0; BLOCK]))
    }

    fn change(
        &mut self,
        layers: &[LayerId],
        shard: u64,
        (offset, length): (u32, u32),
        byte: Option<u8>,
        keep: bool,
    ) {
        for block in offset / BLOCK_BYTES..(offset + length).div_ceil(BLOCK_BYTES) {
            let start = offset.max(block * BLOCK_BYTES) - block * BLOCK_BYTES;
            let end = (offset + length).min((block + 1) * BLOCK_BYTES) - block * BLOCK_BYTES;
            let whole = end - start == BLOCK_BYTES;
            let (state, mut content) = self.resolved(layers, shard, block);
            let state = match byte {
                Some(_) => BlockState::Data,
                None if !whole && state != BlockState::Data => continue,
                None if !whole => BlockState::Data,
                None if layers.len() == 1 && !keep => BlockState::Absent,
                None => BlockState::Zero,
            };
            content[start as usize..end as usize].fill(byte.unwrap_or(0));
            self.blocks.insert((layers[0], shard, block), (state, content));
        }
    }
}

const UPPER: &[LayerId] = &[2, 1];
const LOWER: &[LayerId] = &[1];

fn layers(upper: bool) -> &'static [LayerId] {
    if upper { UPPER } else { LOWER }
}

fn do_request(rig: &mut Rig, model: &mut Model, request: &Request) -> Result<(), StoreError> {
    match *request {
        Request::Write { upper, shard, offset, length, byte } => {
            rig.write_layers(layers(upper), shard, offset, &vec![byte; length as usize])?;
            model.change(layers(upper), shard, (offset, length), Some(byte), false);
        }
        Request::Zero { upper, shard, offset, length, keep } => {
            rig.stamp.sequence += 1;
            let layers = layers(upper);
            let op = WriteOp { view: View::own(IMAGE, layers), shard, offset, stamp: rig.stamp };
            rig.store.zero(&op, length, keep)?;
            model.change(layers, shard, (offset, length), None, keep);
        }
        Request::Copy { shard, block, state, byte } => {
            let state = BlockState::from_u8(state).expect("a state");
            let data = if state == BlockState::Data { vec![byte; BLOCK] } else { Vec::new() };
            let checksum = if data.is_empty() { 0 } else { checksum_of(&data) };
            let copied = [CopyBlock { block, state, tag: Tag { epoch: 1, sequence: 1 }, checksum }];
            rig.store.copy(&Rig::key(shard), &copied, Bytes::from(data.clone()), 1)?;
            let content = if data.is_empty() { vec![0; BLOCK] } else { data };
            model.blocks.insert((1, shard, block), (state, content));
        }
        Request::Sync => rig.sync(),
        Request::Checkpoint { force } => {
            if let Some(job) = rig.store.begin_checkpoint(force)? {
                rig.store.finish_checkpoint(job.run())?;
            }
        }
        Request::Kill | Request::PowerCut { .. } => {}
    }
    Ok(())
}

fn check(rig: &mut Rig, model: &Model) {
    for layers in [LOWER, UPPER] {
        for shard in 0..2 {
            let (states, data) = rig.read_layers(layers, shard, 0, BLOCKS).expect("reads");
            let content = flatten(&states, &data);
            let mut status = Vec::new();
            rig.store
                .status(View::own(IMAGE, layers), shard, 0, BLOCKS, &mut status)
                .expect("status");
            assert_eq!(states, status);
            for block in 0..BLOCKS {
                let (state, expected) = model.resolved(layers, shard, block);
                assert_eq!(states[block as usize], state, "{layers:?} {shard} {block}");
                let range = block as usize * BLOCK..(block as usize + 1) * BLOCK;
                assert!(content[range] == expected, "{layers:?} {shard} {block}");
            }
        }
    }
    for layer in [1, 2] {
        let key = ShardKey { image: IMAGE, layer, shard: 0 };
        let summary = rig.store.summary(&key).expect("summary");
        for (block, found) in (0..BLOCKS).zip(summary.blocks) {
            let (state, content) = model.own(layer, 0, block);
            let checksum = if state == BlockState::Data { checksum_of(&content) } else { 0 };
            assert_eq!(
                (found.state, found.checksum),
                (state, checksum),
                "layer {layer}, block {block}"
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(120))]

    #[test]
    fn store_holds_what_the_model_holds(requests in requests()) {
        let (mut rig, mut model) = (Rig::new(), Model::default());
        rig.layers(UPPER).expect("a snapshot");
        for request in &requests {
            loop {
                match do_request(&mut rig, &mut model, request) {
                    Err(StoreError::LogFull) => {
                        let job = rig.store.begin_checkpoint(false).expect("begins");
                        let job = job.expect("a full log wants a checkpoint");
                        rig.store.finish_checkpoint(job.run()).expect("succeeds");
                    }
                    other => break other.expect("works"),
                }
            }
            rig = match *request {
                Request::Kill => {
                    rig.store.append().expect("appends");
                    rig.restart().0
                }
                Request::PowerCut { seed } => {
                    rig.sync();
                    rig.power_cut(seed).0
                }
                _ => rig,
            };
        }
        check(&mut rig, &model);
        rig.sync();
        rig.checkpoint();
        check(&mut rig, &model);
        let (mut rig, recovery) = rig.power_cut(9);
        prop_assert!(!recovery.damaged);
        check(&mut rig, &model);
    }

    #[test]
    fn index_of_runs_equals_an_array(
        changes in prop::collection::vec((0..30u32, 1..12u32, any::<bool>()), 1..40),
    ) {
        let mut index = ShardIndex::default();
        let mut array = [None; 64];
        for (number, (first, length, data)) in changes.into_iter().enumerate() {
            let length = if data { 1 } else { length };
            let state = if data { BlockState::Data } else { BlockState::Zero };
            let place = Place { segment: 1, offset: number as u32 };
            let tag = Tag::NONE;
            let run = Run { length, state, keep_allocated: false, checksum: 0, place, tag };
            index.insert(first, run);
            (first..first + length).for_each(|block| array[block as usize] = Some(place));
        }
        for block in 0..64u32 {
            let found = index.get(block).map(|run| run.place);
            prop_assert_eq!(found, array[block as usize]);
        }
        for (first, blocks) in [(0, 64), (5, 7), (20, 1)] {
            let mut seen = [None; 64];
            for (at, run) in index.overlapping(first, blocks) {
                prop_assert!(at >= first && at + run.length <= first + blocks);
                for block in at..at + run.length {
                    prop_assert!(seen[block as usize].is_none());
                    seen[block as usize] = Some(run.place);
                }
            }
            let range = first as usize..(first + blocks) as usize;
            prop_assert_eq!(&seen[range.clone()], &array[range]);
        }
    }

    #[test]
    fn metadata_slot_round_trips_and_any_flipped_bit_is_noticed(
        states in prop::collection::vec(0..4u8, 256),
        tags in prop::collection::btree_map(0..256u32, 1..9u64, 0..20),
        flip in any::<prop::sample::Index>(),
    ) {
        use crate::store::shard_file::{ShardMeta, Slot, decode_slot, encode_slot};
        let key = Rig::key(3);
        let mut meta = ShardMeta::uniform(256, BlockState::Absent);
        for (block, state) in (0..).zip(&states) {
            let state = BlockState::from_u8(*state).expect("a state");
            let checksum = if state == BlockState::Data { u64::from(7 * block + 1) << 29 } else { 0 };
            meta.set(block, state, checksum);
        }
        (meta.version, meta.generation) = (5, 6);
        meta.tags = tags.iter().map(|(b, s)| (*b, Tag { epoch: 1, sequence: *s })).collect();
        let mut slot = encode_slot(&key, &meta);
        let decoded = decode_slot(&key, 256, &slot);
        prop_assert_eq!(&decoded, &Slot::Whole(Box::new(meta)));
        prop_assert_eq!(decode_slot(&Rig::key(4), 256, &slot), Slot::Damaged(None));
        let data = states.iter().filter(|state| **state == 2).count();
        let used = 72 + 64 + 8 * data + 20 * tags.len();
        slot[flip.index(used)] ^= 0x10;
        prop_assert!(matches!(decode_slot(&key, 256, &slot), Slot::Damaged(_)));
    }
}

#[test]
fn bytes_beyond_a_short_read_are_not_taken_for_data() {
    let mut rig = Rig::new();
    rig.fill(0, 0, 1, 3);
    rig.checkpoint();
    let file = rig.store.disk.open(&crate::store::shard_file::shard_path(&Rig::key(0)));
    file.expect("the shard file").set_len(100).expect("cut");
    let bad = StoreError::BadBlock { image: IMAGE, layer: 1, shard: 0, block: 0 };
    assert_eq!(rig.read_layers(&[1], 0, 0, 1), Err(bad));
    let mut data = BytesMut::from(&b"before"[..]);
    let mut states = Vec::new();
    assert!(rig.store.read(View::own(IMAGE, &[1]), 0, 0, 1, &mut states, &mut data).is_err());
    assert_eq!((&data[..], states.len()), (&b"before"[..], 0), "nothing was appended");
}
