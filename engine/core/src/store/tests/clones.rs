//! Clones: what their layers do not have shows from the parent's snapshot, and so on.

use bytes::{Bytes, BytesMut};

use super::rig::*;
use crate::geometry::{ANCESTORS_MAX, BLOCK_BYTES, ImageId, LayerId, Parent, ShardKey, SnapshotId};
use crate::rules::{Rule, break_rules};
use crate::store::simulated::Seeded;
use crate::store::{Ancestor, BlockState, Chain, ImageRecord, StoreError, View, WriteOp};

const CLONE: ImageId = ImageId([0xC1; 16]);
const GRANDCHILD: ImageId = ImageId([0xC2; 16]);
const SIZE: u64 = 3 * SHARD_BYTES as u64;

fn snapshot(layer: LayerId, generation: u64) -> SnapshotId {
    SnapshotId { layer, generation }
}

fn parent(image: ImageId, layer: LayerId, generation: u64) -> Parent {
    Parent { image, snapshot: snapshot(layer, generation), size_bytes: SIZE }
}

fn clone_of(parent: Parent) -> ImageRecord {
    ImageRecord { parent: Some(parent), ..record(head(1, 1)) }
}

/// `IMAGE` with a snapshot of its first layer, of generation 2.
fn with_snapshot() -> Rig {
    let mut rig = Rig::new();
    rig.fill(0, 0, 4, 1);
    let snapshots = vec![snapshot(1, 2)];
    rig.stamp.generation = 2;
    rig.store
        .put_record(IMAGE, ImageRecord { snapshots, ..layered(2, &[2, 1]) })
        .expect("a snapshot");
    rig
}

fn with_clone() -> Rig {
    let mut rig = with_snapshot();
    rig.store.put_record(CLONE, clone_of(parent(IMAGE, 1, 2))).expect("a clone");
    rig
}

/// The layers and ancestors that an image is seen through.
fn seen(rig: &Rig, image: ImageId) -> Result<(Chain, Vec<Ancestor>), StoreError> {
    let chain = rig.store.image(&image).expect("its record").chain.clone();
    Ok((chain, rig.store.ancestors(&image)?))
}

fn write(
    rig: &mut Rig,
    image: ImageId,
    shard: u64,
    offset: u32,
    data: &[u8],
) -> Result<(), StoreError> {
    let (chain, ancestors) = seen(rig, image)?;
    let view = View { image, layers: chain.layers(), ancestors: &ancestors };
    rig.stamp.sequence += 1;
    let op = WriteOp { view, shard, offset, stamp: rig.stamp };
    let checksums = fragment_checksums(offset, data);
    rig.store.write(&op, &checksums, Bytes::copy_from_slice(data)).map(drop)
}

fn zero(
    rig: &mut Rig,
    image: ImageId,
    shard: u64,
    offset: u32,
    length: u32,
) -> Result<(), StoreError> {
    let (chain, ancestors) = seen(rig, image)?;
    let view = View { image, layers: chain.layers(), ancestors: &ancestors };
    rig.stamp.sequence += 1;
    let op = WriteOp { view, shard, offset, stamp: rig.stamp };
    rig.store.zero(&op, length, false).map(drop)
}

fn read(
    rig: &mut Rig,
    image: ImageId,
    shard: u64,
    first_block: u32,
    blocks: u32,
) -> Result<(Vec<BlockState>, Vec<u8>), StoreError> {
    let (chain, ancestors) = seen(rig, image)?;
    let view = View { image, layers: chain.layers(), ancestors: &ancestors };
    let (mut states, mut data) = (Vec::new(), BytesMut::new());
    rig.store.read(view, shard, first_block, blocks, &mut states, &mut data)?;
    Ok((states, data.to_vec()))
}

/// The first byte of each block.
fn firsts(rig: &mut Rig, image: ImageId, shard: u64, blocks: u32) -> Vec<u8> {
    let (states, data) = read(rig, image, shard, 0, blocks).expect("a read");
    flatten(&states, &data).iter().step_by(BLOCK).copied().collect()
}

#[test]
fn a_clone_shows_its_parents_snapshot_and_neither_changes_the_other() {
    let mut rig = with_clone();
    rig.write_layers(&[2, 1], 0, 0, &[7; BLOCK]).expect("the parent goes on");
    write(&mut rig, CLONE, 0, BLOCK_BYTES, &[2; BLOCK]).expect("a write");
    write(&mut rig, CLONE, 0, 2 * BLOCK_BYTES + 5, &[3; 10]).expect("a part of a block");
    for _ in 0..2 {
        assert_eq!(firsts(&mut rig, CLONE, 0, 5), [1, 2, 1, 1, 0]);
        let (states, data) = read(&mut rig, CLONE, 0, 2, 1).expect("the merged block");
        let mut merged = [1; BLOCK];
        merged[5..15].fill(3);
        assert_eq!((states, data), (vec![BlockState::Data], merged.to_vec()));
        assert_eq!(firsts(&mut rig, IMAGE, 0, 5), [7, 1, 1, 1, 0]);
        assert_eq!(rig.store.dirty(&CLONE).count(), 1, "it has a dirty map of its own");
        rig.sync();
        rig.checkpoint();
        rig = rig.power_cut(3).0;
    }
}

#[test]
fn a_discard_in_a_clone_hides_its_parent() {
    let mut rig = with_clone();
    zero(&mut rig, CLONE, 0, 0, 2 * BLOCK_BYTES + 7).expect("a discard");
    zero(&mut rig, CLONE, 1, 0, SHARD_BYTES).expect("a discard where nobody has anything");
    let (states, _) = read(&mut rig, CLONE, 0, 0, 4).expect("a read");
    let (zero, data) = (BlockState::Zero, BlockState::Data);
    assert_eq!(states, [zero, zero, data, data]);
    assert_eq!(firsts(&mut rig, CLONE, 0, 4), [0, 0, 0, 1]);
    assert_eq!(read(&mut rig, CLONE, 1, 0, 1).expect("a read").0, [zero]);
    assert_eq!(firsts(&mut rig, IMAGE, 0, 4), [1; 4]);
}

/// The size of a snapshot cuts off what was there before it shrank, and bounds what its clones' clones see of it.
#[test]
fn nothing_shows_beyond_the_size_of_a_snapshot() {
    let mut rig = with_snapshot();
    let half = Parent { size_bytes: 2 * u64::from(BLOCK_BYTES) - 512, ..parent(IMAGE, 1, 2) };
    let snapshots = vec![snapshot(1, 2)];
    let middle = ImageRecord { snapshots, ..layered(2, &[2, 1]) };
    rig.store.put_record(CLONE, ImageRecord { parent: Some(half), ..middle }).expect("a clone");
    rig.store.put_record(GRANDCHILD, clone_of(parent(CLONE, 1, 2))).expect("its clone");
    for image in [CLONE, GRANDCHILD] {
        assert_eq!(firsts(&mut rig, image, 0, 4), [1, 1, 0, 0], "to the end of the block");
        assert_eq!(read(&mut rig, image, 0, 2, 2).expect("a read").0, [BlockState::Absent; 2]);
    }
    assert_eq!(firsts(&mut rig, IMAGE, 0, 4), [1; 4]);
}

#[test]
fn a_clone_without_all_of_its_parent_is_refused() {
    let missing = |image| Err(StoreError::NoParent { parent: image });
    let mut rig = Rig::new();
    rig.fill(0, 0, 4, 1);
    rig.store.put_record(CLONE, clone_of(parent(IMAGE, 1, 2))).expect("a clone");
    rig.store.put_record(GRANDCHILD, clone_of(parent(CLONE, 1, 2))).expect("a clone");
    assert_eq!(firsts(&mut rig, IMAGE, 0, 1), [1]);
    let lacks = |rig: &mut Rig| {
        assert_eq!(read(rig, CLONE, 0, 0, 1), missing(IMAGE));
        assert_eq!(write(rig, CLONE, 0, 5, &[1]), Err(StoreError::NoParent { parent: IMAGE }));
    };
    lacks(&mut rig);
    assert_eq!(read(&mut rig, GRANDCHILD, 0, 0, 1), missing(CLONE));
    // The layer was frozen by another record, which was taken back.
    let with = |generation, named, blank| {
        let snapshots = vec![snapshot(1, named)];
        ImageRecord { snapshots, blank, ..layered(generation, &[2, 1]) }
    };
    rig.store.put_record(IMAGE, with(2, 1, false)).expect("a record");
    lacks(&mut rig);
    rig.store.put_record(IMAGE, with(3, 2, true)).expect("a record");
    lacks(&mut rig);
    rig.store.put_record(IMAGE, with(4, 2, false)).expect("a record");
    assert_eq!(firsts(&mut rig, CLONE, 0, 1), [1], "now it is whole");
    rig.store.distrust([IMAGE]);
    lacks(&mut rig);
    break_rules(&[Rule::ParentIsWhole]);
    assert_eq!(firsts(&mut rig, CLONE, 0, 1), [0]);
    break_rules(&[]);
    rig.store.delete(IMAGE).expect("a tombstone");
    lacks(&mut rig);
}

#[test]
fn a_parent_stays_with_the_record_and_never_changes() {
    let mut rig = with_clone();
    let stored = rig.store.image(&CLONE).cloned();
    assert_eq!(stored.as_ref().and_then(|record| record.parent), Some(parent(IMAGE, 1, 2)));
    for round in 0..2 {
        rig.sync();
        if round > 0 {
            rig.checkpoint();
        }
        rig = rig.power_cut(round).0;
        assert_eq!(rig.store.image(&CLONE).cloned(), stored);
    }
    let others = [None, Some(parent(IMAGE, 1, 3)), Some(parent(GRANDCHILD, 1, 2))];
    for (generation, other) in (1..).zip(others) {
        let changed = ImageRecord { parent: other, ..record(head(1, generation)) };
        let refused = rig.store.put_record(CLONE, changed);
        assert!(matches!(refused, Err(StoreError::RecordConflict { .. })), "{refused:?}");
    }
    let late = ImageRecord { parent: Some(parent(CLONE, 1, 2)), ..layered(9, &[2, 1]) };
    assert!(matches!(rig.store.put_record(IMAGE, late), Err(StoreError::RecordConflict { .. })));
}

#[test]
fn deleting_a_clone_gives_its_own_space_back_and_its_parent_goes_after_it() {
    let mut rig = with_clone();
    write(&mut rig, CLONE, 0, BLOCK_BYTES, &[2; BLOCK]).expect("a write");
    rig.sync();
    rig.checkpoint();
    let physical = |rig: &Rig, image| rig.store.usage_handle().physical_bytes(&image);
    assert!(physical(&rig, CLONE).expect("its files") > 0);
    rig.store.delete(CLONE).expect("a tombstone");
    rig.sync();
    rig.checkpoint();
    assert_eq!(physical(&rig, CLONE).unwrap_or(0), 0);
    assert_eq!(firsts(&mut rig, IMAGE, 0, 4), [1; 4]);
    rig.store.delete(IMAGE).expect("a tombstone");
    rig.sync();
    rig.checkpoint();
    assert_eq!(physical(&rig, IMAGE).unwrap_or(0), 0);
}

/// A node that was away may hear of the deletions in any order.
#[test]
fn a_parent_may_be_deleted_first_on_a_node() {
    let mut rig = with_clone();
    rig.store.delete(IMAGE).expect("a tombstone");
    let (mut rig, recovery) = rig.restart();
    assert!(!recovery.damaged);
    rig.store.delete(CLONE).expect("a tombstone");
    rig.sync();
    rig.checkpoint();
    assert_eq!(rig.restart().0.store.images(), []);
}

#[test]
fn rot_below_a_clone_is_told_as_its_parents() {
    let mut rig = with_clone();
    rig.sync();
    rig.checkpoint();
    assert!(rig.disk.corrupt(&crate::store::shard_path(&Rig::key(0)), 5));
    let bad = StoreError::BadBlock { image: IMAGE, layer: 1, shard: 0, block: 0 };
    assert_eq!(read(&mut rig, CLONE, 0, 0, 2), Err(bad.clone()));
    assert_eq!(write(&mut rig, CLONE, 0, 7, &[2; 10]), Err(bad));
    write(&mut rig, CLONE, 0, 0, &[2; BLOCK]).expect("a whole block needs nothing of it");
    assert_eq!(firsts(&mut rig, CLONE, 0, 2), [2, 1]);
    let key = ShardKey { image: CLONE, layer: 1, shard: 0 };
    let own = rig.store.scrub(&key, 0, 4).expect("a scrub of its own layer");
    assert_eq!((own.data_blocks, own.rotten), (1, vec![]));
}

/// Two blocks one after the other in files of two images are two reads.
#[test]
fn neighbours_in_files_of_two_images_are_read_from_both() {
    let mut rig = with_clone();
    write(&mut rig, CLONE, 0, BLOCK_BYTES, &[2; BLOCK]).expect("a write");
    rig.sync();
    rig.checkpoint();
    assert_eq!(firsts(&mut rig, CLONE, 0, 3), [1, 2, 1]);
}

#[test]
fn a_chain_of_clones_has_an_end() {
    let mut rig = with_snapshot();
    let id = |number: usize| ImageId([number as u8; 16]);
    let mut below = parent(IMAGE, 1, 2);
    for number in 1..=ANCESTORS_MAX + 1 {
        let snapshots = vec![snapshot(1, 2)];
        let clone = ImageRecord { snapshots, parent: Some(below), ..layered(2, &[2, 1]) };
        rig.store.put_record(id(number), clone).expect("a clone");
        below = parent(id(number), 1, 2);
    }
    write(&mut rig, id(ANCESTORS_MAX), 0, 2 * BLOCK_BYTES, &[2; BLOCK]).expect("a write");
    assert_eq!(firsts(&mut rig, id(ANCESTORS_MAX), 0, 4), [1, 1, 2, 1]);
    let refused = read(&mut rig, id(ANCESTORS_MAX + 1), 0, 0, 2);
    assert_eq!(refused, Err(StoreError::NoParent { parent: IMAGE }));
}

/// Layers below the snapshot are merged in the parent while its clones are read, killed nodes included.
#[test]
fn a_merge_in_the_parent_changes_nothing_for_its_clones() {
    for seed in 0..8 {
        let mut random = Seeded::new(seed);
        let mut rig = Rig::new();
        rig.fill(0, 0, 3, 1);
        rig.layers(&[2, 1]).expect("a layer");
        rig.write_layers(&[2, 1], 0, BLOCK_BYTES, &[2; BLOCK]).expect("a write");
        rig.write_layers(&[2, 1], 1, 0, &[3; BLOCK]).expect("a write");
        let snapshots = vec![snapshot(2, 3)];
        rig.stamp.generation = 3;
        let frozen = ImageRecord { snapshots: snapshots.clone(), ..layered(3, &[3, 2, 1]) };
        rig.store.put_record(IMAGE, frozen).expect("a snapshot");
        rig.store.put_record(CLONE, clone_of(parent(IMAGE, 2, 3))).expect("a clone");
        rig.write_layers(&[3, 2, 1], 0, 0, &[9; BLOCK]).expect("a write above");
        let check = |rig: &mut Rig| {
            assert_eq!(firsts(rig, CLONE, 0, 4), [1, 2, 1, 0], "seed {seed}");
            assert_eq!(firsts(rig, CLONE, 1, 2), [3, 0], "seed {seed}");
        };
        check(&mut rig);
        let merging = ImageRecord {
            snapshots: snapshots.clone(),
            merging: vec![1],
            ..layered(4, &[3, 2, 1])
        };
        rig.store.put_record(IMAGE, merging).expect("a snapshot is removed");
        rig.sync();
        while rig.store.emptied(&IMAGE).is_empty() {
            check(&mut rig);
            match random.below(24) {
                0 => rig = rig.power_cut(random.below(1 << 30)).0,
                _ => _ = rig.store.merge_some(true).expect("a step"),
            }
            if random.below(2) == 0 {
                rig.sync();
            }
            rig.checkpoint_if_due();
        }
        let done = ImageRecord { snapshots, ..layered(5, &[3, 2]) };
        rig.store.put_record(IMAGE, done).expect("all is merged");
        check(&mut rig);
    }
}

/// Random changes of three generations of images, with kills and power cuts between them, beside a model.
#[test]
fn three_generations_of_images_are_what_was_written_to_each() {
    const BLOCKS: u32 = 6;
    type Content = Vec<Vec<u8>>;
    for seed in 0..40 {
        let mut random = Seeded::new(seed);
        let mut rig = Rig::new();
        let images = [IMAGE, CLONE, GRANDCHILD];
        let mut model: Vec<Content> = vec![vec![vec![0; BLOCK]; BLOCKS as usize]];
        for step in 0..90 {
            let of = random.below(model.len() as u64) as usize;
            let offset = random.below(u64::from((BLOCKS - 2) * BLOCK_BYTES)) as u32;
            let offset =
                if random.below(2) == 0 { offset / BLOCK_BYTES * BLOCK_BYTES } else { offset };
            let length = 1 + random.below(2 * u64::from(BLOCK_BYTES)) as u32;
            let range = offset as usize..(offset + length) as usize;
            let mut change = |byte: u8| {
                let mut whole = model[of].concat();
                whole[range.clone()].fill(byte);
                model[of] = whole.chunks(BLOCK).map(<[u8]>::to_vec).collect();
            };
            rig.checkpoint_if_due();
            match random.below(10) {
                0..4 => {
                    let byte = 1 + random.below(255) as u8;
                    write(&mut rig, images[of], 0, offset, &vec![byte; length as usize])
                        .expect("a write");
                    change(byte);
                }
                4..6 => {
                    zero(&mut rig, images[of], 0, offset, length).expect("zeroes");
                    change(0);
                }
                6 => rig.checkpoint(),
                7 => {
                    rig.store.append().expect("in the log");
                    rig = rig.restart().0;
                }
                8 => {
                    rig.sync();
                    rig = rig.power_cut(random.below(1 << 30)).0;
                }
                _ => {}
            }
            if step % 30 == 29 && model.len() < images.len() {
                let last = model.len() - 1;
                let snapshots = vec![snapshot(1, 2)];
                let stored = rig.store.image(&images[last]).expect("a record").clone();
                let frozen =
                    ImageRecord { snapshots, parent: stored.parent, ..layered(2, &[2, 1]) };
                rig.store.put_record(images[last], frozen).expect("a snapshot");
                let clone = clone_of(parent(images[last], 1, 2));
                rig.store.put_record(images[last + 1], clone).expect("a clone");
                model.push(model[last].clone());
                rig.stamp.generation = 2;
            }
            for (image, content) in images.iter().zip(&model) {
                let (states, data) = read(&mut rig, *image, 0, 0, BLOCKS).expect("a read");
                let same = flatten(&states, &data) == content.concat();
                assert!(same, "seed {seed}, step {step}, image {image}");
            }
        }
    }
}
