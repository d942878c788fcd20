//! Checkpoints: what the log's oldest segments say is put into shard files and record files,
//! durably; then the segments may be written to again. A job does the work in any thread.
//!
//! The order within a job is what makes a crash harmless: (1) sync the log, so that everything that
//! is about to replace old content, or that made older records obsolete, is durable; (2) say in the log's
//! tail, durably, which shards' metadata may be torn from now on; (3) write data, punch holes, then write
//! metadata; (4) sync the files and the folders with new names; (5) move the log's tail on, durably. Blocks
//! that a job writes are read from the log until it is finished.
//!
//! Before (2) each shard's metadata is read, as far as memory has none: what has rotted is noted in both
//! slots, durably. For later a damaged slot is taken for one that this job tore.

use std::collections::{BTreeSet, HashSet};
use std::io::IoSlice;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::BytesMut;

use crate::checksum::checksum_of;
use crate::geometry::{BLOCK_BYTES, ImageId, LayerId, ShardKey, Tag};

use super::disk::{Disk, DiskResult, Errno, FileRef};
use super::images::{ImageRecord, image_folder, layer_folder, write_record_file};
use super::index::{Place, Run};
use super::log::{SyncGate, create_segment};
use super::read::{ReadBuffer, read_singly, read_whole};
use super::recovery::Tail;
use super::shard_file::{ShardMeta, read_meta, rewrite_both, shard_folder, shard_path, write_meta};
use super::state::State;
use super::torn::MayBeTorn;
use super::{BlockState, Store, StoreError};

const BLOCK: usize = BLOCK_BYTES as usize;
/// Most bytes copied to a shard file at once.
const COPY_BYTES_MAX: usize = 1 << 20;
/// Files that a job holds open, and syncs together.
const OPEN_FILES_MAX: usize = 128;
/// Files of dropped layers that a job removes, so that the log does not wait long for its room.
const DROPPED_FILES_MAX: usize = 256;

/// One shard's part of a checkpoint.
struct ShardPlan {
    key: ShardKey,
    shard_bytes: u32,
    generation: u64,
    /// Tags from here on are kept; `None`: the shard is clean.
    first_tag: Option<Tag>,
    runs: Vec<(u32, Run)>,
    meta: Option<Arc<ShardMeta>>,
    /// An earlier checkpoint of the shard was interrupted.
    unsettled: bool,
}

/// What a checkpoint under way writes.
pub(super) struct Running {
    pub keys: HashSet<ShardKey>,
    writing: Arc<AtomicBool>,
}

impl Running {
    /// Whether it has begun to write to shard files.
    pub fn is_writing(&self) -> bool {
        self.writing.load(Ordering::Acquire)
    }
}

/// How the log's tail changes.
struct Retirement {
    /// Last segment that is no longer needed afterwards.
    segment: u32,
    /// The tail to write before the shards, and after.
    begun: Tail,
    done: Tail,
    seed: u32,
}

/// Puts the oldest part of the log into the files it belongs in.
#[must_use = "run the job and hand the outcome to finish_checkpoint"]
pub struct CheckpointJob {
    disk: Arc<dyn Disk>,
    gate: Arc<SyncGate>,
    unsynced: Vec<FileRef>,
    lsn: u64,
    /// Where the log ended.
    upto: Place,
    /// (segment, its file) of every live segment.
    segments: Vec<(u32, FileRef)>,
    retire: Option<Retirement>,
    writing: Arc<AtomicBool>,
    shards: Vec<ShardPlan>,
    records: Vec<(ImageId, ImageRecord)>,
    deletes: Vec<ImageId>,
    drops: Vec<(ImageId, LayerId)>,
    /// Shards whose content is in the layer above.
    merged: Vec<ShardKey>,
    create: Vec<u32>,
    segment_bytes: u32,
}

/// What a checkpoint came to.
#[must_use = "hand it to finish_checkpoint"]
pub struct CheckpointDone {
    job: CheckpointJob,
    outcome: Result<(), Failure>,
    log_synced: bool,
    /// The last tail that was written.
    tail_version: Option<u64>,
    metas: Vec<(ShardKey, Arc<ShardMeta>)>,
    created: Vec<(u32, FileRef)>,
    /// Layers of which nothing is left, or that cannot be removed.
    dropped: Vec<(ImageId, LayerId)>,
}

/// Why a checkpoint stopped.
#[derive(Clone, Copy, Debug)]
struct Failure {
    errno: Errno,
    /// No space: everything is still in the log, and a later one may succeed.
    retry: bool,
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Failure {
        Failure { errno, retry: matches!(errno, Errno::NOSPC | Errno::DQUOT) }
    }
}

impl Store {
    /// Gives the job that makes room in the log; `None` where none is due, or one is under way.
    /// With `force` everything that is in the log goes to files.
    pub fn begin_checkpoint(&mut self, force: bool) -> Result<Option<CheckpointJob>, StoreError> {
        self.check()?;
        if self.checkpointing.is_some() || !(force || self.wants_checkpoint()) {
            return Ok(None);
        }
        self.append()?;
        let current = self.log.live().back();
        let has_records = current.is_some_and(|segment| segment.last_lsn > segment.first_lsn);
        if force && has_records && self.log.free_segments() > 0 {
            self.roll()?;
            self.append()?;
        }
        let sealed = self.log.sealed();
        let retired = match force {
            true => sealed,
            // What is overwritten before its turn comes is never copied: leave the newer part.
            false if self.log_is_due() => sealed.div_ceil(6),
            false => 0,
        };
        let last = (retired > 0).then(|| self.log.live()[retired - 1].sequence);
        let shards = last.map_or(Vec::new(), |segment| self.plan_shards(segment));
        let keys: HashSet<ShardKey> = shards.iter().map(|plan| plan.key).collect();
        let retire = last.map(|_| self.plan_retirement(retired, &keys));
        let writing = Arc::new(AtomicBool::new(false));
        self.checkpointing = Some(Running { keys, writing: Arc::clone(&writing) });
        let records = if retire.is_some() { self.state.images.unpersisted() } else { Vec::new() };
        let segments = self.log.live().iter().map(|s| (s.sequence, Arc::clone(&s.file)));
        Ok(Some(CheckpointJob {
            disk: Arc::clone(&self.disk),
            gate: Arc::clone(&self.log.gate),
            unsynced: self.log.unsynced(),
            lsn: self.log.appended_lsn(),
            upto: self.log.end(),
            segments: segments.collect(),
            retire,
            writing,
            shards,
            records,
            deletes: self.state.images.pending_deletes().to_vec(),
            drops: self.state.images.pending_drops().iter().copied().collect(),
            merged: self.state.merged.keys().copied().collect(),
            create: self.log.slots_wanted(),
            segment_bytes: self.log.segment_bytes(),
        }))
    }

    fn plan_retirement(&self, retired: usize, keys: &HashSet<ShardKey>) -> Retirement {
        let live = self.log.live();
        let (first, last, next) = (&live[0], &live[retired - 1], &live[retired]);
        let durable_lsn = self.log.appended_lsn();
        // What was interrupted before, and is not written now, stays so.
        let mut torn = MayBeTorn::nothing();
        self.unsettled.difference(keys).for_each(|key| torn.insert(key));
        let version = self.tail_version + 2;
        let done = Tail { version, first_lsn: next.first_lsn, durable_lsn, torn: torn.clone() };
        keys.iter().for_each(|key| torn.insert(key));
        let version = self.tail_version + 1;
        let begun = Tail { version, first_lsn: first.first_lsn, durable_lsn, torn };
        Retirement { segment: last.sequence, begun, done, seed: self.superblock.seed() }
    }

    /// The shards that segments up to `segment` say something about, with all that the log has of
    /// them: a shard's metadata is then written once for many segments.
    fn plan_shards(&mut self, segment: u32) -> Vec<ShardPlan> {
        let mut plans = Vec::new();
        let candidates = self.state.index.iter_mut();
        for (key, shard) in candidates.filter(|(_, shard)| shard.oldest_segment <= segment) {
            // What is in the file of an unsettled shard may rest on any record that the log has of it.
            if !self.unsettled.contains(key) {
                shard.tighten();
            }
            if shard.oldest_segment > segment {
                continue;
            }
            // Without its record an image's blocks are of no use; recovery has reported that.
            let Some(record) = self.state.images.get(&key.image) else { continue };
            let shard_bytes = record.head.shard_bytes;
            let entry = self.state.dirty.get(&key.image, key.shard);
            let of_layer = entry.filter(|entry| entry.layer == key.layer);
            plans.push(ShardPlan {
                key: *key,
                shard_bytes,
                generation: shard.generation.max(of_layer.map_or(0, |entry| entry.generation)),
                first_tag: entry.map(|entry| entry.first),
                runs: shard.overlapping(0, shard_bytes / BLOCK_BYTES).collect(),
                meta: None,
                unsettled: self.unsettled.contains(key),
            });
        }
        for plan in &mut plans {
            plan.meta = self.metas.get(&plan.key).map(Arc::clone);
        }
        plans.sort_unstable_by_key(|plan| plan.key);
        plans
    }

    /// Takes a checkpoint's outcome over. `NoSpace` leaves everything in the log, for a later one.
    pub fn finish_checkpoint(&mut self, done: CheckpointDone) -> Result<(), StoreError> {
        self.check()?;
        let running = self.checkpointing.take();
        if let Some(version) = done.tail_version {
            self.tail_version = version;
        }
        if done.log_synced {
            self.log.synced(done.job.lsn);
        }
        let all = done.created.len() == done.job.create.len();
        self.log.grow(done.created, all);
        if let Err(failure) = done.outcome {
            let State { images, merged, .. } = &self.state;
            let left = running.filter(Running::is_writing).map(|running| running.keys);
            let left = left.into_iter().flatten();
            let stays = |key: &ShardKey| {
                let gone = images.is_deleted(&key.image) || images.is_dropped(key);
                !gone && !merged.contains_key(key)
            };
            self.unsettled.extend(left.filter(stays));
            return Err(match failure.retry {
                true => StoreError::NoSpace,
                false => self.fail(failure.errno),
            });
        }
        for (key, meta) in done.metas {
            self.state.index.retire(&key, done.job.upto);
            self.unsettled.remove(&key);
            if !self.state.merged.contains_key(&key) {
                let weight = meta.weight();
                self.metas.refresh(&key, meta, weight);
            }
        }
        let upto = done.job.upto;
        self.state.merged.retain(|_, place| *place >= upto);
        self.state.images.settled(&done.job.records, &done.job.deletes, &done.dropped);
        if let Some(Retirement { segment, .. }) = done.job.retire {
            let images = &self.state.images;
            self.state.index.retain(|key| images.get(&key.image).is_some());
            let oldest = self.state.index.iter().map(|(_, shard)| shard.oldest_segment).min();
            assert!(oldest.is_none_or(|oldest| oldest > segment), "a retired segment is needed");
            self.log.retire(segment);
        }
        Ok(())
    }
}

impl CheckpointJob {
    /// Does the work; blocks.
    pub fn run(self) -> CheckpointDone {
        let (outcome, log_synced, metas, created) = (Ok(()), false, Vec::new(), Vec::new());
        let (job, tail_version) = (self, None);
        let dropped = Vec::new();
        let mut done =
            CheckpointDone { job, outcome, log_synced, tail_version, metas, created, dropped };
        done.outcome = done.work();
        done
    }
}

impl CheckpointDone {
    fn work(&mut self) -> Result<(), Failure> {
        let job = &mut self.job;
        for slot in job.create.iter().copied() {
            match create_segment(&*job.disk, slot, job.segment_bytes) {
                Ok(file) => self.created.push((slot, file)),
                // Fewer free segments are no reason to stop.
                Err(Errno::NOSPC | Errno::DQUOT) => break,
                Err(errno) => return Err(errno.into()),
            }
        }
        let removes = !(job.deletes.is_empty() && job.drops.is_empty() && job.merged.is_empty());
        if job.retire.is_none() && !removes {
            return Ok(());
        }
        job.gate.sync(&job.unsynced).map_err(|errno| Failure { errno, retry: false })?;
        self.log_synced = true;
        // Before anything that needs space: on a full disk they make the room.
        job.deletes.iter().try_for_each(|image| delete_files(&*job.disk, image))?;
        let mut files = DROPPED_FILES_MAX;
        for (image, layer) in job.drops.iter().copied() {
            // What cannot be removed is left until the next start finds it: nobody needs it.
            if remove_layer(&*job.disk, &layer_folder(&image, layer), &mut files).unwrap_or(true) {
                self.dropped.push((image, layer));
            }
        }
        let mut folders = BTreeSet::new();
        job.merged.iter().try_for_each(|key| remove_shard(&*job.disk, key, &mut folders))?;
        if let Some(Retirement { begun, seed, .. }) = &job.retire {
            job.shards.iter_mut().try_for_each(|plan| plan.note_rot(&*job.disk))?;
            begun.write(&*job.disk, *seed)?;
            self.tail_version = Some(begun.version);
            job.writing.store(true, Ordering::Release);
        }
        let job = &self.job;
        let mut copier = Copier { job, buffer: BytesMut::new() };
        for plans in job.shards.chunks(OPEN_FILES_MAX) {
            let mut files = Vec::with_capacity(plans.len());
            for plan in plans {
                let (file, meta) = copier.write_shard(plan, &mut folders)?;
                files.push(file);
                self.metas.push((plan.key, Arc::new(meta)));
            }
            job.disk.sync_files(&files)?;
        }
        for (image, record) in &job.records {
            write_record_file(&*job.disk, image, record)?;
        }
        folders.iter().try_for_each(|folder| job.disk.sync_dir(folder))?;
        if let Some(Retirement { done, seed, .. }) = &job.retire {
            done.write(&*job.disk, *seed)?;
            self.tail_version = Some(done.version);
        }
        Ok(())
    }
}

impl ShardPlan {
    /// Reads the metadata, where it is not known yet. What is lost is said to be lost in both slots.
    fn note_rot(&mut self, disk: &dyn Disk) -> DiskResult<()> {
        let known = self.meta.as_ref().is_some_and(|meta| !meta.rewrite_both);
        if known || self.unsettled {
            return Ok(());
        }
        let file = match disk.open(&shard_path(&self.key)) {
            Err(Errno::NOENT) => return Ok(()),
            other => other?,
        };
        let mut meta = read_meta(&*file, &self.key, self.shard_bytes, false)?;
        if meta.rewrite_both {
            meta.rewrite_both = false;
            rewrite_both(&*file, &self.key, self.shard_bytes, &mut meta)?;
            self.meta = Some(Arc::new(meta));
        }
        Ok(())
    }
}

struct Copier<'a> {
    job: &'a CheckpointJob,
    buffer: BytesMut,
}

impl Copier<'_> {
    /// Writes one shard's data and metadata, not synced. Notes the folders that must be synced.
    fn write_shard(
        &mut self,
        plan: &ShardPlan,
        folders: &mut BTreeSet<String>,
    ) -> Result<(FileRef, ShardMeta), Failure> {
        let ShardPlan { key, shard_bytes, .. } = plan;
        let disk = &*self.job.disk;
        let (file, is_new) = match disk.open(&shard_path(key)) {
            Err(Errno::NOENT) => (create_shard(disk, key, folders)?, true),
            other => (other?, false),
        };
        let old = match &plan.meta {
            Some(meta) => ShardMeta::clone(meta),
            None if is_new => ShardMeta::absent(),
            None => read_meta(&*file, key, *shard_bytes, plan.unsettled)?,
        };
        if plan.unsettled {
            folders.extend(parents(key));
            if old.version > 0 && !old.rewrite_both {
                // It may be in the cache only, and the next one goes over its elder. Written once more,
                // since a sync that failed before has the kernel take it for written.
                write_meta(&*file, key, *shard_bytes, &old)?;
            }
            file.sync_data()?;
        }
        let rewrite_both = old.rewrite_both;
        let mut meta = old.with_blocks(shard_bytes / BLOCK_BYTES);
        meta.rewrite_both = false;
        self.apply_runs(&*file, plan, &mut meta)?;
        meta.generation = meta.generation.max(plan.generation);
        meta.tags = kept_tags(plan, &meta);
        if rewrite_both {
            meta.version += 1;
            write_meta(&*file, key, *shard_bytes, &meta)?;
        }
        meta.version += 1;
        write_meta(&*file, key, *shard_bytes, &meta)?;
        Ok((file, meta))
    }

    fn apply_runs(
        &mut self,
        file: &dyn super::disk::DiskFile,
        plan: &ShardPlan,
        meta: &mut ShardMeta,
    ) -> DiskResult<()> {
        let mut rest = &plan.runs[..];
        while let Some((first, run)) = rest.first().copied() {
            let offset = u64::from(first) * u64::from(BLOCK_BYTES);
            if run.state == BlockState::Data {
                let count = data_run(rest);
                self.copy_data(file, &rest[..count], meta)?;
                rest = &rest[count..];
                continue;
            }
            let length = u64::from(run.length) * u64::from(BLOCK_BYTES);
            if run.keep_allocated {
                file.allocate(offset, length)?;
            } else if meta.version > 0 {
                file.punch_hole(offset, length)?;
            }
            (first..first + run.length).for_each(|block| meta.set(block, run.state, 0));
            rest = &rest[1..];
        }
        Ok(())
    }

    /// Copies consecutive blocks from the log. One that does not match its checksum becomes `Bad`.
    fn copy_data(
        &mut self,
        file: &dyn super::disk::DiskFile,
        runs: &[(u32, Run)],
        meta: &mut ShardMeta,
    ) -> DiskResult<()> {
        self.buffer.clear();
        let mut rest = runs;
        while !rest.is_empty() {
            let count = 1 + rest.windows(2).take_while(|pair| follows_in_log(pair)).count();
            self.read_log(rest[0].1.place, count);
            rest = &rest[count..];
        }
        for ((block, run), content) in runs.iter().zip(self.buffer.chunks_exact(BLOCK)) {
            match checksum_of(content) == run.checksum {
                true => meta.set(*block, BlockState::Data, run.checksum),
                false => meta.set(*block, BlockState::Bad, 0),
            }
        }
        let offset = u64::from(runs[0].0) * u64::from(BLOCK_BYTES);
        file.write_at(offset, &mut [IoSlice::new(&self.buffer)])
    }

    /// Appends `blocks` blocks from the log to the buffer; what cannot be read is zeros.
    fn read_log(&mut self, place: Place, blocks: usize) {
        let length = blocks * BLOCK;
        let first = self.job.segments.first().map_or(0, |(segment, _)| *segment);
        let Some((_, file)) = self.job.segments.get((place.segment - first) as usize) else {
            return self.buffer.resize(self.buffer.len() + length, 0);
        };
        let (offset, room) = (u64::from(place.offset), self.buffer.room(length));
        if read_whole(&**file, offset, room).is_err() {
            // An unreadable block fails its checksum and becomes `Bad`.
            read_singly(&**file, offset, room);
        }
        // SAFETY: both ways of reading fill the room.
        unsafe { self.buffer.advance(length) };
    }
}

/// How many runs at the start are data of consecutive blocks, up to the most that are copied at
/// once.
fn data_run(runs: &[(u32, Run)]) -> usize {
    let follows =
        |pair: &[(u32, Run)]| pair[1].0 == pair[0].0 + 1 && pair[1].1.state == BlockState::Data;
    let count = 1 + runs.windows(2).take_while(|pair| follows(pair)).count();
    count.min(COPY_BYTES_MAX / BLOCK)
}

fn follows_in_log(pair: &[(u32, Run)]) -> bool {
    let (a, b) = (pair[0].1.place, pair[1].1.place);
    a.segment == b.segment && a.offset + BLOCK_BYTES == b.offset
}

/// The tags of a dirty shard after the plan's runs; none for a clean one.
fn kept_tags(plan: &ShardPlan, old: &ShardMeta) -> Box<[(u32, Tag)]> {
    let Some(first_tag) = plan.first_tag else { return Box::default() };
    let written = |block: u32| {
        let at = plan.runs.partition_point(|(first, _)| *first <= block);
        at > 0 && block - plan.runs[at - 1].0 < plan.runs[at - 1].1.length
    };
    let mut tags: Vec<(u32, Tag)> =
        old.tags.iter().filter(|(block, _)| !written(*block)).copied().collect();
    for (first, run) in &plan.runs {
        tags.extend((*first..first + run.length).map(|block| (block, run.tag)));
    }
    tags.retain(|(_, tag)| *tag != Tag::NONE && *tag >= first_tag);
    tags.sort_unstable_by_key(|(block, _)| *block);
    tags.into_boxed_slice()
}

/// The folders whose names lead to a shard's file.
fn parents(key: &ShardKey) -> [String; 4] {
    let image = image_folder(&key.image);
    [String::from("images"), image, layer_folder(&key.image, key.layer), shard_folder(key)]
}

fn create_shard(
    disk: &dyn Disk,
    key: &ShardKey,
    folders: &mut BTreeSet<String>,
) -> DiskResult<FileRef> {
    let parents = parents(key);
    parents[1..].iter().try_for_each(|folder| disk.create_dir(folder))?;
    folders.extend(parents);
    disk.create(&shard_path(key))
}

/// Writes the tombstone and removes an image's files.
fn delete_files(disk: &dyn Disk, image: &ImageId) -> DiskResult<()> {
    disk.create(&format!("deleted/{image}"))?;
    disk.sync_dir("deleted")?;
    remove_tree(disk, &image_folder(image), 4)
}

/// Removes a shard's file. Notes the folder that must be synced, also where the name went before.
fn remove_shard(disk: &dyn Disk, key: &ShardKey, folders: &mut BTreeSet<String>) -> DiskResult<()> {
    let layer = layer_folder(&key.image, key.layer);
    let folder = shard_folder(key);
    if disk.list(&layer)?.iter().any(|name| format!("{layer}/{name}") == folder) {
        disk.unlink(&shard_path(key))?;
        folders.insert(folder);
    }
    Ok(())
}

/// Removes a layer's files, `files` of them at most, then its folders; whether nothing is left of it.
fn remove_layer(disk: &dyn Disk, folder: &str, files: &mut usize) -> DiskResult<bool> {
    for spread in disk.list(folder)? {
        let spread = format!("{folder}/{spread}");
        for name in disk.list(&spread)? {
            if *files == 0 {
                return Ok(false);
            }
            *files -= 1;
            disk.unlink(&format!("{spread}/{name}"))?;
        }
        disk.remove_dir(&spread)?;
    }
    disk.remove_dir(folder)?;
    Ok(true)
}

/// Removes a folder of at most `depth` levels.
fn remove_tree(disk: &dyn Disk, folder: &str, depth: u32) -> DiskResult<()> {
    if depth == 0 {
        return Err(Errno::NOTEMPTY);
    }
    for name in disk.list(folder)? {
        let path = format!("{folder}/{name}");
        match disk.unlink(&path) {
            Err(Errno::ISDIR | Errno::PERM) => remove_tree(disk, &path, depth - 1)?,
            other => other?,
        }
    }
    disk.remove_dir(folder)
}
