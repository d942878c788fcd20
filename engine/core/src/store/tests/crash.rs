//! A power cut, or a kill, at every step of a recorded workload.
//!
//! The model keeps what every block, the dirty map and the record were after each request. The
//! recovered store must be what some prefix of the requests left, and that prefix must hold every
//! flushed request (after a power cut) or every appended one (after a kill). Within the first
//! request past the prefix single blocks may be either.

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};

use super::rig::*;
use crate::geometry::{BLOCK_BYTES, Tag};
use crate::store::log::create_segment;
use crate::store::simulated::{Crash, Seeded, SimDisk};
use crate::store::{CheckpointJob, Stamp, Store, StoreError, SyncJob, View, WriteOp};

const SHARDS: u64 = 3;
const BLOCKS: u32 = 10;

#[derive(Clone, Debug)]
enum Request {
    Write { shard: u64, offset: u32, length: u32 },
    Zero { shard: u64, offset: u32, length: u32 },
    Clear,
    Record { epoch: bool },
    Append,
    BeginSync,
    FinishSync,
    BeginCheckpoint { force: bool },
    FinishCheckpoint,
}

fn workload(seed: u64, length: usize) -> Vec<Request> {
    let mut random = Seeded::new(seed);
    let range = |random: &mut Seeded| {
        let whole = random.chance(60);
        let first = random.below(u64::from(BLOCKS)) as u32;
        let blocks = 1 + random.below(3.min(u64::from(BLOCKS - first))) as u32;
        let (offset, length) = (first * BLOCK_BYTES, blocks * BLOCK_BYTES);
        let cut = if whole { 0 } else { random.below(2000) as u32 };
        (random.below(SHARDS), offset + cut, length - cut - if whole { 0 } else { 700 })
    };
    let request = |random: &mut Seeded| match random.below(100) {
        0..42 => {
            let (shard, offset, length) = range(random);
            Request::Write { shard, offset, length }
        }
        42..52 => {
            let (shard, offset, length) = range(random);
            Request::Zero { shard, offset, length }
        }
        52..57 => Request::Clear,
        57..61 => Request::Record { epoch: random.chance(40) },
        61..70 => Request::Append,
        70..80 => Request::BeginSync,
        80..88 => Request::FinishSync,
        88..95 => Request::BeginCheckpoint { force: random.chance(40) },
        _ => Request::FinishCheckpoint,
    };
    (0..length).map(|_| request(&mut random)).collect()
}

/// What a store should hold after a request.
#[derive(Clone, PartialEq, Debug)]
struct Model {
    /// Content of each shard's blocks.
    content: Vec<Vec<u8>>,
    /// Last sequence and generation of dirty shards.
    dirty: BTreeMap<u64, (Tag, u64)>,
    epoch: u64,
    generation: u64,
}

struct Run {
    store: Store,
    stamp: Stamp,
    sticky: BTreeMap<u64, bool>,
    sync: Option<(SyncJob, usize, Tag)>,
    checkpoint: Option<CheckpointJob>,
    /// The model after each request; index 0: before the first.
    models: Vec<Model>,
    /// How many requests are sure to survive a power cut, and a kill.
    flushed: usize,
    appended: usize,
    flushed_tag: Tag,
}

impl Run {
    fn new(store: Store, model: Model, stamp: Stamp) -> Run {
        let sticky = model.dirty.keys().map(|shard| (*shard, true)).collect();
        let (sync, checkpoint, models) = (None, None, vec![model]);
        let (flushed, appended, flushed_tag) = (0, 0, Tag::NONE);
        Run { store, stamp, sticky, sync, checkpoint, models, flushed, appended, flushed_tag }
    }

    fn model(&self) -> Model {
        self.models.last().expect("at least the first").clone()
    }

    fn op<'a>(&mut self, shard: u64, offset: u32) -> WriteOp<'a> {
        self.stamp.sequence += 1;
        WriteOp { view: View::own(IMAGE, &[1]), shard, offset, stamp: self.stamp }
    }

    fn wrote(&mut self, model: &mut Model, shard: u64) {
        model.dirty.insert(shard, (self.stamp.tag(), self.stamp.generation));
        self.sticky.entry(shard).or_insert(false);
    }

    /// Does one request; an error is the crash's.
    fn apply(&mut self, request: &Request, number: usize) -> Result<(), StoreError> {
        let mut model = self.model();
        match *request {
            Request::Write { shard, offset, length } => {
                let data: Vec<u8> =
                    (0..length).map(|i| (number * 31 + i as usize / 512 + 1) as u8).collect();
                let op = self.op(shard, offset);
                // Noted before it is done: it may survive although it was never answered.
                model.content[shard as usize][offset as usize..(offset + length) as usize]
                    .copy_from_slice(&data);
                self.wrote(&mut model, shard);
                self.models.push(model);
                let checksums = fragment_checksums(offset, &data);
                self.retrying(|store| {
                    store.write(&op, &checksums, Bytes::from(data.clone())).map(|_| ())
                })
            }
            Request::Zero { shard, offset, length } => {
                let op = self.op(shard, offset);
                let range = offset as usize..(offset + length) as usize;
                let before = self.store.dirty(&IMAGE).any(|(dirty, _)| dirty == shard);
                model.content[shard as usize][range].fill(0);
                let records = |run: &Run| run.store.log.next_lsn();
                let lsn = records(self);
                self.models.push(model.clone());
                self.retrying(|store| store.zero(&op, length, false).map(|_| ()))?;
                if records(self) != lsn || before {
                    // (A zero of absent partial blocks stages nothing.)
                    let wrote = self
                        .store
                        .dirty(&IMAGE)
                        .any(|(s, e)| s == shard && e.last == self.stamp.tag());
                    if wrote {
                        self.wrote(&mut model, shard);
                        *self.models.last_mut().expect("just pushed") = model;
                    }
                }
                Ok(())
            }
            Request::Clear => {
                let tag = self.flushed_tag;
                let sticky = &self.sticky;
                model.dirty.retain(|shard, (last, _)| sticky[shard] || *last > tag);
                self.sticky.retain(|shard, _| model.dirty.contains_key(shard));
                self.models.push(model);
                self.retrying(|store| store.clear(IMAGE, tag, &[("node2".to_owned(), 1)]))
            }
            Request::Record { epoch } => {
                model.generation += 1;
                model.epoch += u64::from(epoch);
                model.dirty.values_mut().for_each(|(_, generation)| *generation = model.generation);
                if epoch {
                    self.sticky.values_mut().for_each(|sticky| *sticky = true);
                }
                self.stamp.epoch = model.epoch;
                self.stamp.generation = model.generation;
                let head = head(model.epoch, model.generation);
                self.models.push(model);
                self.retrying(|store| store.put_record(IMAGE, record(head)).map(|_| ()))
            }
            ref job => {
                self.models.push(model);
                self.job(job)
            }
        }
    }

    fn job(&mut self, request: &Request) -> Result<(), StoreError> {
        match *request {
            Request::Append => {
                self.store.append()?;
                self.appended = self.models.len() - 1;
            }
            Request::BeginSync if self.sync.is_none() => {
                let job = self.store.begin_sync()?;
                self.appended = self.models.len() - 1;
                let (upto, tag) = (self.appended, self.stamp.tag());
                self.sync = job.map(|job| (job, upto, tag));
            }
            Request::FinishSync => {
                if let Some((job, upto, tag)) = self.sync.take() {
                    self.store.finish_sync(job.run())?;
                    (self.flushed, self.flushed_tag) = (upto, tag);
                }
            }
            Request::BeginCheckpoint { force } if self.checkpoint.is_none() => {
                self.checkpoint = self.store.begin_checkpoint(force)?;
            }
            Request::FinishCheckpoint => {
                if let Some(job) = self.checkpoint.take() {
                    self.store.finish_checkpoint(job.run())?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// A full log is emptied by a checkpoint and the request tried again.
    fn retrying(
        &mut self,
        mut request: impl FnMut(&mut Store) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        for _ in 0..3 {
            match request(&mut self.store) {
                Err(StoreError::LogFull) => {}
                other => return other,
            }
            if self.checkpoint.is_none() {
                self.checkpoint = self.store.begin_checkpoint(false)?;
            }
            let job = self.checkpoint.take().expect("a full log wants a checkpoint");
            self.store.finish_checkpoint(job.run())?;
        }
        panic!("three checkpoints made no room");
    }

    /// Does requests until one fails.
    fn play(&mut self, requests: &[Request]) {
        for (number, request) in requests.iter().enumerate() {
            match self.apply(request, number) {
                Ok(()) => {}
                Err(StoreError::Failed { .. } | StoreError::Io { .. }) => return,
                Err(error) => panic!("request {number}, {request:?}: {error}"),
            }
        }
    }

    fn read_all(&mut self) -> Vec<Vec<u8>> {
        let read = |shard| {
            let (mut states, mut data) = (Vec::new(), BytesMut::new());
            let read =
                self.store.read(View::own(IMAGE, &[1]), shard, 0, BLOCKS, &mut states, &mut data);
            read.expect("every block reads");
            flatten(&states, &data)
        };
        (0..SHARDS).map(read).collect()
    }

    fn dirty(&self) -> BTreeMap<u64, (Tag, u64)> {
        self.store.dirty(&IMAGE).map(|(s, e)| (s, (e.last, e.generation))).collect()
    }
}

fn first_model() -> Model {
    let content = vec![vec![0; BLOCKS as usize * BLOCK]; SHARDS as usize];
    Model { content, dirty: BTreeMap::new(), epoch: 1, generation: 1 }
}

/// Whether the recovered store is `model`, or between it and `next`.
fn matches(run: &Run, content: &[Vec<u8>], model: &Model, next: Option<&Model>) -> bool {
    let record = run.store.image(&IMAGE).map_or((1, 1), |r| (r.head.epoch, r.head.generation));
    let either = |test: &dyn Fn(&Model) -> bool| test(model) || next.is_some_and(test);
    let block = |model: &Model, shard: usize, block: usize| {
        let range = block * BLOCK..(block + 1) * BLOCK;
        content[shard][range.clone()] == model.content[shard][range]
    };
    let blocks = (0..SHARDS as usize).flat_map(|s| (0..BLOCKS as usize).map(move |b| (s, b)));
    either(&|m| m.dirty == run.dirty())
        && either(&|m| (m.epoch, m.generation) == record)
        && blocks.into_iter().all(|(s, b)| either(&|m| block(m, s, b)))
}

/// Opens after a crash, checks, and gives a run that goes on from what was found.
fn recover(disk: &SimDisk, before: &Run, sure: usize, what: &str) -> Run {
    let (store, recovery) = open(disk).unwrap_or_else(|error| panic!("{what}: {error}"));
    assert!(!recovery.damaged, "{what}: no crash is damage");
    let mut run = Run::new(store, first_model(), before.stamp);
    assert!(run.store.dirty(&IMAGE).all(|(_, entry)| entry.sticky), "{what}: sticky at start");
    if run.store.image(&IMAGE).is_none() {
        assert_eq!(sure, 0, "{what}: the record is lost");
        run.store.put_record(IMAGE, record(head(1, 1))).expect("a first record");
        return run;
    }
    let content = run.read_all();
    let models = &before.models;
    let fits = |at: &usize| matches(&run, &content, &models[*at], models.get(*at + 1));
    let Some(found) = (sure..models.len()).find(fits) else {
        let dirty = run.dirty();
        let expected: Vec<_> = models[sure..].iter().map(|model| &model.dirty).collect();
        panic!("{what}: no prefix from {sure} on fits; dirty {dirty:?}, expected {expected:?}");
    };
    let dirty = run.dirty();
    let record = run.store.image(&IMAGE).expect("there").head;
    let (epoch, generation) = (record.epoch, record.generation);
    let model = Model { content, dirty, epoch, generation };
    let mut stamp = before.stamp;
    (stamp.epoch, stamp.generation) = (epoch, generation);
    let _ = found;
    Run::new(run.store, model, stamp)
}

fn start(disk: &SimDisk) -> Option<Run> {
    let (mut store, _) = open(disk).ok()?;
    store.put_record(IMAGE, record(head(1, 1))).ok()?;
    Some(Run::new(store, first_model(), Stamp { epoch: 1, generation: 1, sequence: 0 }))
}

/// Crashes a run of `requests` at `step`, goes on with `more`, crashes again, and checks both
/// times.
fn crash_at(requests: &[Request], more: &[Request], step: u64, crash: Crash, seed: u64) {
    let what = format!("{crash:?} at step {step}, seed {seed}");
    let disk = SimDisk::new();
    disk.crash_at(step, crash);
    let cut = |disk: &SimDisk, crash: Crash, seed: u64| match crash {
        Crash::PowerCut => disk.power_cut(seed),
        Crash::Kill => disk.kill(),
    };
    let Some(mut run) = start(&disk) else {
        cut(&disk, crash, seed);
        open(&disk).unwrap_or_else(|error| panic!("{what}: {error}"));
        return;
    };
    run.play(requests);
    let sure = if crash == Crash::PowerCut { run.flushed } else { run.appended };
    cut(&disk, crash, seed);
    let mut again = recover(&disk, &run, sure, &what);
    drop(run);
    let mut random = Seeded::new(seed ^ step);
    // The recovered state is durable: a second crash, of the other kind at times, keeps it.
    disk.crash_at(disk.steps() + random.below(120), Crash::PowerCut);
    again.play(more);
    disk.power_cut(seed + 1);
    let last = recover(&disk, &again, again.flushed, &format!("{what}, then a power cut"));
    drop((again, last));
}

fn steps_of(requests: &[Request]) -> u64 {
    let disk = SimDisk::new();
    let mut run = start(&disk).expect("starts");
    run.play(requests);
    assert_eq!(run.models.len(), requests.len() + 1, "nothing fails without a crash");
    let content = run.read_all();
    assert!(matches(&run, &content, &run.model(), None), "the model is right");
    disk.steps()
}

fn crash_everywhere(seed: u64, crash: Crash, seeds_per_step: u64) {
    let requests = workload(seed, 130);
    let more = workload(seed + 1000, 30);
    for step in 1..=steps_of(&requests) {
        for variant in 0..seeds_per_step {
            crash_at(&requests, &more, step, crash, seed * 1000 + variant * 7 + step);
        }
    }
}

#[test]
fn power_cut_at_every_step_keeps_what_was_flushed() {
    (1..=3).for_each(|seed| crash_everywhere(seed, Crash::PowerCut, 3));
}

#[test]
fn kill_at_every_step_keeps_what_was_appended() {
    (4..=6).for_each(|seed| crash_everywhere(seed, Crash::Kill, 1));
}

#[test]
fn workload_goes_through_every_part_of_the_log() {
    let disk = SimDisk::new();
    let mut run = start(&disk).expect("starts");
    run.play(&workload(1, 2000));
    let sequence = run.store.log.live().back().expect("a segment").sequence;
    assert!(sequence > 20, "segments were recycled: {sequence}");
}

/// A killed checkpoint leaves its newest metadata and tail in the cache only. Taking them for
/// durable, the next one would write over what the disk really has.
#[test]
fn power_cut_in_the_checkpoint_after_a_killed_one_keeps_what_was_flushed() {
    let mut first = Rig::new();
    // Enough blocks for metadata of several sectors, which a power cut can tear.
    for (shard, part) in (0..2).flat_map(|shard| (0..30).map(move |part| (shard, part * 8))) {
        first.fill(shard, part, 8, 5);
        first.checkpoint();
    }
    (0..2).for_each(|shard| first.fill(shard, 1, 1, 6));
    first.sync();
    let (disk, stamp) = (first.disk.clone(), first.stamp);
    drop(first);
    disk.kill();
    let reached = |disk: &SimDisk, crash: Crash, step: u64| {
        let (store, _) = open(disk).expect("opens");
        let mut rig = Rig { disk: disk.clone(), store, stamp };
        disk.crash_at(disk.steps() + step, crash);
        let checkpoint = |store: &mut Store| -> Result<(), StoreError> {
            match store.begin_checkpoint(true)? {
                Some(job) => store.finish_checkpoint(job.run()),
                None => Ok(()),
            }
        };
        let _ = checkpoint(&mut rig.store);
        disk.has_crashed()
    };
    let mut both_reached = 0;
    for kill_step in 1..30 {
        let killed = disk.fork();
        let kill_reached = reached(&killed, Crash::Kill, kill_step);
        killed.kill();
        for cut_step in 1..30 {
            for seed in 0..2 {
                let cut = killed.fork();
                both_reached += u32::from(reached(&cut, Crash::PowerCut, cut_step) && kill_reached);
                cut.power_cut(seed * 31 + cut_step);
                let (store, recovery) = open(&cut).expect("opens");
                assert!(!recovery.damaged, "kill {kill_step}, cut {cut_step}, seed {seed}");
                let mut rig = Rig { disk: cut, store, stamp };
                for shard in 0..2 {
                    let mut expected = vec![5; 240 * BLOCK];
                    expected[BLOCK..2 * BLOCK].fill(6);
                    let found = rig.content(shard, 0, 240);
                    assert!(found == expected, "kill {kill_step}, cut {cut_step}, seed {seed}");
                }
            }
        }
    }
    assert!(both_reached > 200, "{both_reached}");
}

/// Of two unsynced records the first is torn and the second survives. What the next instance writes
/// in the first one's place must not bring the second one back.
#[test]
fn record_behind_a_torn_one_never_comes_back() {
    let mut torn = 0;
    for seed in 0..200 {
        let mut rig = Rig::new();
        rig.fill(0, 0, 1, 1);
        rig.sync();
        for block in [1, 2] {
            rig.fill(0, block, 1, 2);
            rig.store.append().expect("appends");
        }
        let (mut rig, _) = rig.power_cut(seed);
        if rig.content(0, 1, 1) == vec![2; BLOCK] {
            continue;
        }
        torn += 1;
        assert_eq!(rig.content(0, 2, 1), vec![0; BLOCK], "seed {seed}: behind a torn record");
        rig.fill(0, 1, 1, 3);
        rig.store.append().expect("appends");
        let (mut rig, recovery) = rig.restart();
        assert!(!recovery.damaged, "seed {seed}");
        let expected = [vec![1; BLOCK], vec![3; BLOCK], vec![0; BLOCK]].concat();
        assert!(rig.content(0, 0, 3) == expected, "seed {seed}: an old record is back");
    }
    assert!(torn > 20, "{torn}");
}

/// A killed checkpoint's tail may be in the cache only; the segments that it gives free must not be
/// written to on the strength of that.
#[test]
fn segments_freed_by_a_killed_checkpoint_are_reused_only_under_a_durable_tail() {
    let mut first = Rig::new();
    for block in 0..30 {
        first.fill(0, block, 1, 5);
        // Creates segments.
        if let Some(job) = first.store.begin_checkpoint(false).expect("begins") {
            first.store.finish_checkpoint(job.run()).expect("succeeds");
        }
    }
    first.sync();
    for kill_step in 1..40 {
        let disk = first.disk.fork();
        let (mut store, _) = open(&disk).expect("opens");
        disk.crash_at(disk.steps() + kill_step, Crash::Kill);
        let job = store.begin_checkpoint(true).map(|job| job.map(CheckpointJob::run));
        let _ = job.map(|done| done.map(|done| store.finish_checkpoint(done)));
        drop(store);
        disk.kill();
        let (store, _) = open(&disk).expect("opens");
        let mut rig = Rig { disk, store, stamp: first.stamp };
        let full = (0..80).find(|block| {
            let data = [6; BLOCK];
            rig.write_layers(&[1], 1, block * BLOCK_BYTES, &data) == Err(StoreError::LogFull)
        });
        rig.sync();
        for seed in 0..6 {
            let disk = rig.disk.fork();
            disk.power_cut(seed);
            let (store, recovery) = open(&disk).expect("opens");
            assert!(!recovery.damaged, "kill {kill_step}, seed {seed}");
            let mut rig = Rig { disk, store, stamp: rig.stamp };
            assert!(rig.content(0, 0, 30) == vec![5; 30 * BLOCK], "kill {kill_step}, seed {seed}");
            let written = full.unwrap_or(80);
            let found = rig.content(1, 0, written);
            assert!(found == vec![6; written as usize * BLOCK], "kill {kill_step}, seed {seed}");
        }
    }
}

/// A segment that was being made when the process was killed had its length and not its space. It was
/// taken for a free one, and a write to it that found the disk full ended the store.
#[test]
fn kill_while_a_segment_is_made_leaves_none_without_its_space() {
    const BYTES: u32 = 64 << 10;
    for step in 1.. {
        let disk = SimDisk::new();
        let run = disk.run();
        run.create_dir("log").expect("an empty disk");
        disk.crash_at(disk.steps() + step, Crash::Kill);
        let made = create_segment(&*run, 0, BYTES);
        disk.kill();
        if let Ok(file) = disk.run().open("log/0000")
            && file.length() == Ok(u64::from(BYTES))
        {
            let allocated = file.allocated_bytes().expect("it is open");
            assert!(allocated >= u64::from(BYTES), "killed at step {step}: {allocated}");
        }
        if made.is_ok() {
            break;
        }
    }
}

/// The open of a store whose log is gone panicked where it has to say that it is damaged.
#[test]
fn open_without_any_log_file_says_damaged() {
    let disk = SimDisk::new();
    drop(new_store(&disk));
    let run = disk.run();
    for name in run.list("log").expect("a folder") {
        run.unlink(&format!("log/{name}")).expect("a file");
    }
    let (_store, recovery) = open(&disk).expect("what is left opens");
    assert!(recovery.damaged);
}
