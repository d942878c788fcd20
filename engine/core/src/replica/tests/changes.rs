//! What was written since a snapshot, as the holder and readers tell it, beside a plain account of what was written.

use super::cluster::{Cluster, Faults, REGIONS, SHARD_BYTES};
use super::readers::Reading;
use crate::geometry::{BLOCK_BYTES, LayerId, SnapshotId};
use crate::replica::{Event, Extent, IoError, Outcome, Output, Token};
use crate::rules::{Rule, break_rules};
use std::collections::BTreeSet;

const BLOCK: usize = BLOCK_BYTES as usize;
const BLOCKS_OF_SHARD: usize = (SHARD_BYTES / BLOCK_BYTES) as usize;
const SECTORS_OF_BLOCK: usize = 8;
const IMAGE_BYTES: u32 = 2 * REGIONS as u32 * SHARD_BYTES;

/// Where in the image the block is that stands there among what `content_of` gives.
fn place_of(block: usize) -> usize {
    let (shard, within) = (block / 2, block % 2);
    let first = if shard % 2 == 0 { BLOCKS_OF_SHARD - 2 } else { 0 };
    shard * BLOCKS_OF_SHARD + first + within
}

/// One extent a block.
fn by_block(extents: &[Extent]) -> Vec<Extent> {
    let blocks = extents
        .iter()
        .flat_map(|extent| std::iter::repeat_n(*extent, extent.length as usize / BLOCK));
    blocks.collect()
}

impl Cluster {
    fn named(&self, layer: LayerId) -> SnapshotId {
        let snapshots = self.policy.record.snapshots();
        *snapshots.iter().find(|named| named.layer == layer).expect("a snapshot")
    }

    /// Changes blocks by chance, in one region; gives those that were written with data, and all.
    fn change(&mut self, written: &mut BTreeSet<usize>, touched: &mut BTreeSet<usize>) {
        let region = self.random.below(REGIONS as u64) as usize;
        let first = self.random.below(4) as usize;
        let count = 1 + self.random.below(4 - first as u64) as usize;
        let blocks = 4 * region + first..4 * region + first + count;
        let (sector, sectors) = (blocks.start * SECTORS_OF_BLOCK, count * SECTORS_OF_BLOCK);
        touched.extend(blocks.clone());
        if self.random.chance(60) {
            self.write(sector, sectors);
            written.extend(blocks);
        } else {
            self.zero(sector, sectors);
            blocks.for_each(|block| _ = written.remove(&block));
        }
        self.settle();
    }

    fn take_snapshot(&mut self) {
        let top = self.policy.record.top;
        while self.policy.record.top == top {
            self.snapshot();
            self.settle();
        }
    }
}

/// The extents since these snapshots, and the shards since the oldest, of what is there now.
fn of_now(cluster: &mut Cluster, since: &[SnapshotId]) -> (Vec<Extent>, Vec<u64>) {
    let oldest = since.last().copied();
    let found = cluster.inquire(|io, token| io.changes(token, 0, IMAGE_BYTES, since.into()));
    let size_bytes = u64::from(IMAGE_BYTES);
    let touched = cluster.inquire(|io, token| io.touched(token, 0, size_bytes, oldest));
    match (found, touched) {
        (Outcome::Extents(extents), Outcome::Shards(shards)) => (by_block(&extents), shards),
        other => panic!("{other:?}"),
    }
}

fn of_snapshot(
    cluster: &mut Cluster,
    layer: LayerId,
    since: &[SnapshotId],
) -> (Vec<Extent>, Vec<u64>) {
    let mut reading = Reading::new(cluster, &[layer]);
    reading.connect_all();
    reading.run(cluster);
    assert_eq!(reading.events, [Event::ReaderOpen]);
    let (extents, touched) = ask_reader(cluster, &mut reading, since);
    match (extents, touched) {
        (Outcome::Extents(extents), Outcome::Shards(shards)) => (by_block(&extents), shards),
        other => panic!("{other:?}"),
    }
}

fn ask_reader(
    cluster: &mut Cluster,
    reading: &mut Reading,
    since: &[SnapshotId],
) -> (Outcome, Outcome) {
    let token = Token { client: 9, cookie: 5 };
    reading.io.changes(token, 0, IMAGE_BYTES, since.into());
    reading.run(cluster);
    let extents = reading.answers.pop().expect("an answer").1;
    reading.io.touched(token, 0, u64::from(IMAGE_BYTES), since.last().copied());
    reading.run(cluster);
    (extents, reading.answers.pop().expect("an answer").1)
}

/// What one interval between snapshots changed: blocks written with data at last, and all that were touched.
type Interval = (BTreeSet<usize>, BTreeSet<usize>);

struct Account {
    /// By the layer that was on top.
    intervals: Vec<Interval>,
}

impl Account {
    /// Over the intervals of the layers above `since` up to `upto`.
    fn over(&self, since: LayerId, upto: LayerId) -> Interval {
        let mut over = Interval::default();
        for layer in since + 1..=upto {
            let (written, touched) = &self.intervals[layer as usize];
            // What a later one only zeroed need not be there any more.
            over.0.retain(|block| !touched.contains(block));
            over.0.extend(written);
            over.1.extend(touched);
        }
        over
    }

    fn check(
        &self,
        (since, upto): (LayerId, LayerId),
        (before, after): (&[u8], &[u8]),
        (extents, shards): &(Vec<Extent>, Vec<u64>),
        at: usize,
        of: usize,
    ) {
        let (written, touched) = self.over(since, upto);
        for (block, (before, after)) in before.chunks(BLOCK).zip(after.chunks(BLOCK)).enumerate() {
            let place = place_of(block);
            let extent = extents[place];
            let changed = usize::from(extent.changed) >= of - at;
            let what = format!("block {block} from {since} to {upto}: {extent:?}");
            assert!(changed || before == after, "not told: {what}");
            assert!(!changed || touched.contains(&block), "told for nothing: {what}");
            assert!(changed || !written.contains(&block), "written, not told: {what}");
            assert!(!extent.zero || after.iter().all(|byte| *byte == 0), "no zeroes: {what}");
            let listed = shards.contains(&((place / BLOCKS_OF_SHARD) as u64));
            assert!(listed || !changed, "its shard is not listed: {what}");
        }
    }
}

#[test]
fn changes_are_what_was_written_since_also_after_removals_heals_and_restarts() {
    for seed in 1..=6 {
        let mut cluster = Cluster::new(seed, Faults::Kills);
        cluster.settle();
        let mut account = Account { intervals: vec![Interval::default()] };
        for top in 1..=4u32 {
            let (mut written, mut touched) = Interval::default();
            (0..3).for_each(|_| cluster.change(&mut written, &mut touched));
            account.intervals.push((written, touched));
            match (seed + u64::from(top)) % 4 {
                0 => cluster.restart_node(top as usize % 3, false),
                1 => cluster.restart_gateway(),
                _ => {}
            }
            cluster.settle();
            if top < 4 {
                cluster.take_snapshot();
            }
        }
        check_all(&mut cluster, &account, &[3, 2, 1]);
        let gone = 1 + (seed % 3) as u32;
        cluster.remove(gone);
        let left: Vec<LayerId> = [3, 2, 1].into_iter().filter(|layer| *layer != gone).collect();
        check_all(&mut cluster, &account, &left);
        cluster.settle();
        cluster.take_all_out();
        check_all(&mut cluster, &account, &left);
    }
}

/// Newest first: of now, and of each snapshot, since all that are older.
fn check_all(cluster: &mut Cluster, account: &Account, layers: &[LayerId]) {
    cluster.settle();
    let since: Vec<SnapshotId> = layers.iter().map(|layer| cluster.named(*layer)).collect();
    let chain = cluster.policy.record.layers();
    let held = |cluster: &mut Cluster, layer: LayerId| {
        let from = chain.iter().position(|of| *of == layer).expect("of the chain");
        cluster.content_of(1, &chain[from..])
    };
    for upto in std::iter::once(4).chain(layers.iter().copied()) {
        let older: Vec<SnapshotId> =
            since.iter().copied().filter(|snapshot| snapshot.layer < upto).collect();
        if older.is_empty() {
            continue;
        }
        let found = match upto {
            4 => of_now(cluster, &older),
            layer => of_snapshot(cluster, layer, &older),
        };
        let after = held(cluster, upto);
        for (at, snapshot) in older.iter().enumerate() {
            let before = held(cluster, snapshot.layer);
            let layers = (snapshot.layer, upto);
            account.check(layers, (&before, &after), &found, at, older.len());
        }
    }
}

#[test]
fn the_depth_of_a_block_counts_layers_and_none_that_is_being_merged() {
    let mut cluster = Cluster::new(3, Faults::Kills);
    cluster.settle();
    for block in 0..3 {
        cluster.write(block * SECTORS_OF_BLOCK, SECTORS_OF_BLOCK);
        cluster.settle();
        if block < 2 {
            cluster.take_snapshot();
        }
    }
    let depths = |cluster: &mut Cluster| {
        let (extents, _) = of_now(cluster, &[]);
        [0, 1, 2, 3].map(|block| extents[place_of(block)].depth)
    };
    assert_eq!(depths(&mut cluster), [3, 2, 1, 0]);
    cluster.merges = false;
    cluster.remove(2);
    cluster.settle();
    assert_eq!(depths(&mut cluster), [2, 1, 1, 0], "what is merged counts as where it goes");
}

/// What is below the layer of a snapshot that was removed is merged over it, and would count as written since.
fn since_one_that_was_removed(rules: &[Rule]) -> (Outcome, Outcome) {
    let mut cluster = Cluster::new(5, Faults::Kills);
    cluster.settle();
    for block in 0..3 {
        cluster.write(block * SECTORS_OF_BLOCK, SECTORS_OF_BLOCK);
        cluster.settle();
        cluster.take_snapshot();
    }
    let first = cluster.named(1);
    let mut reading = Reading::new(&cluster, &[3]);
    reading.connect_all();
    reading.run(&mut cluster);
    cluster.remove(1);
    cluster.settle();
    cluster.take_all_out();
    break_rules(rules);
    let found = ask_reader(&mut cluster, &mut reading, &[first]);
    break_rules(&[]);
    found
}

/// Its nodes were taken for such that fail requests.
#[test]
fn a_holder_that_asks_for_a_snapshot_that_was_removed_keeps_its_nodes() {
    let mut cluster = Cluster::new(6, Faults::Kills);
    cluster.settle();
    cluster.take_snapshot();
    let first = cluster.named(1);
    cluster.remove(1);
    cluster.settle();
    cluster.failures = 0;
    let since = [first];
    let found = cluster.inquire(|io, token| io.changes(token, 0, IMAGE_BYTES, since[..].into()));
    let size_bytes = u64::from(IMAGE_BYTES);
    let touched = cluster.inquire(|io, token| io.touched(token, 0, size_bytes, Some(first)));
    assert_eq!([found, touched], [Outcome::Failed(IoError::Io), Outcome::Failed(IoError::Io)]);
    assert_eq!(cluster.failures, 0, "no node has failed");
}

#[test]
fn nothing_is_compared_with_a_snapshot_that_was_removed() {
    let refused = since_one_that_was_removed(&[]);
    assert_eq!(refused, (Outcome::Failed(IoError::Io), Outcome::Failed(IoError::Io)));
    let (extents, _) = since_one_that_was_removed(&[Rule::ChangesAreSinceSnapshots]);
    let Outcome::Extents(extents) = extents else { panic!("{extents:?}") };
    let told = by_block(&extents)[place_of(0)].changed;
    assert_eq!(told, 1, "what was there before counts as written since");
}

/// The node that is asked leaves in the midst of a listing; another one is asked from the beginning.
#[test]
fn a_listing_goes_on_at_another_node_where_one_leaves() {
    let mut cluster = Cluster::new(9, Faults::Kills);
    cluster.settle();
    cluster.write(0, SECTORS_OF_BLOCK);
    cluster.settle();
    cluster.take_snapshot();
    cluster.write(8 * SECTORS_OF_BLOCK, SECTORS_OF_BLOCK);
    cluster.settle();
    cluster.take_snapshot();
    let since = cluster.named(1);
    let mut reading = Reading::new(&cluster, &[2]);
    reading.connect_all();
    reading.run(&mut cluster);
    let token = Token { client: 9, cookie: 5 };
    reading.io.touched(token, 0, u64::from(IMAGE_BYTES), Some(since));
    let Some(Output::Send { node, .. }) = reading.io.outputs.pop_front() else { panic!("asked") };
    reading.cut(&mut cluster, usize::from(node));
    reading.run(&mut cluster);
    let shard = (place_of(8) / BLOCKS_OF_SHARD) as u64;
    match reading.answers.pop() {
        Some((_, Outcome::Shards(shards))) => assert!(shards.contains(&shard), "{shards:?}"),
        other => panic!("{other:?}"),
    }
}
