//! How fast the store alone is on a real folder: `cargo run --release --example store_bench
//! FOLDER`.

use std::error::Error;
use std::path::Path;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use hci_engine_core::checksum::{block_checksums, checksum_of};
use hci_engine_core::geometry::{BLOCK_BYTES, ImageId};
use hci_engine_core::store::real::RealDisk;
use hci_engine_core::store::{
    Chain, ImageRecord, RecordHead, Stamp, Store, StoreConfig, StoreError, View, WriteOp,
};
use rustix::time::{ClockId, clock_gettime};

const IMAGE: ImageId = ImageId([7; 16]);
const SHARD_BYTES: u32 = 4 << 20;
const SHARDS: u64 = 64;

struct Bench {
    store: Store,
    sequence: u64,
    random: u64,
    checkpoints: Duration,
    checkpoints_cpu: Duration,
}

impl Bench {
    fn open(folder: &Path) -> Result<Bench, Box<dyn Error>> {
        std::fs::create_dir_all(folder)?;
        let config = StoreConfig::new([1; 16], "bench", [2; 16], 256 << 20);
        let (mut store, _) = Store::open(RealDisk::open_dir(folder)?, &config)?;
        let (holder, digest) = ([1; 16], [1; 32]);
        let (epoch, generation, shard_bytes) = (1, 1, SHARD_BYTES);
        let head = RecordHead { epoch, holder, generation, digest, shard_bytes };
        let chain = Chain::new(&[1]).ok_or("a chain")?;
        let record = ImageRecord {
            head,
            blank: false,
            chain,
            snapshots: Vec::new(),
            merging: Vec::new(),
            parent: None,
            body: Bytes::new(),
        };
        store.put_record(IMAGE, record)?;
        let (checkpoints, checkpoints_cpu) = (Duration::ZERO, Duration::ZERO);
        Ok(Bench { store, sequence: 0, random: 1, checkpoints, checkpoints_cpu })
    }

    fn place(&mut self) -> (u64, u32) {
        self.random = self.random.wrapping_mul(6364136223846793005).wrapping_add(1);
        let blocks = u64::from(SHARD_BYTES / BLOCK_BYTES);
        ((self.random >> 33) % SHARDS, (self.random >> 40) as u32 % blocks as u32)
    }

    fn write(&mut self, data: &Bytes, checksums: &[u64]) -> Result<(), StoreError> {
        self.sequence += 1;
        let (shard, block) = self.place();
        let block = block / checksums.len() as u32 * checksums.len() as u32;
        let stamp = Stamp { epoch: 1, generation: 1, sequence: self.sequence };
        let offset = block * BLOCK_BYTES;
        let op = WriteOp { view: View::own(IMAGE, &[1]), shard, offset, stamp };
        match self.store.write(&op, checksums, data.clone()) {
            Err(StoreError::LogFull) => {
                self.checkpoint(false)?;
                self.store.write(&op, checksums, data.clone()).map(|_| ())
            }
            other => other.map(|_| ()),
        }
    }

    fn checkpoint(&mut self, force: bool) -> Result<(), StoreError> {
        let (start, cpu) = (Instant::now(), cpu_time());
        if let Some(job) = self.store.begin_checkpoint(force)? {
            self.store.finish_checkpoint(job.run())?;
        }
        self.checkpoints += start.elapsed();
        self.checkpoints_cpu += cpu_time() - cpu;
        Ok(())
    }

    fn sync(&mut self) -> Result<(), StoreError> {
        if let Some(job) = self.store.begin_sync()? {
            self.store.finish_sync(job.run())?;
        }
        Ok(())
    }

    fn read(&mut self, blocks: u32, out: &mut BytesMut) -> Result<(), StoreError> {
        let (shard, block) = self.place();
        let mut states = Vec::with_capacity(blocks as usize);
        out.clear();
        self.store.read(
            View::own(IMAGE, &[1]),
            shard,
            block / blocks * blocks,
            blocks,
            &mut states,
            out,
        )
    }
}

/// CPU time of the process so far.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Prints operations per second and time per operation, checkpoints told apart.
fn measure(
    bench: &mut Bench,
    what: &str,
    count: u32,
    mut operation: impl FnMut(&mut Bench, u32) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    bench.checkpoints = Duration::ZERO;
    bench.checkpoints_cpu = Duration::ZERO;
    let (start, cpu) = (Instant::now(), cpu_time());
    (0..count).try_for_each(|index| operation(bench, index))?;
    let (all, checkpoints) = (start.elapsed(), bench.checkpoints);
    let work = (all - checkpoints).as_secs_f64();
    let cpu = (cpu_time() - cpu - bench.checkpoints_cpu).as_secs_f64();
    println!(
        "{what:28} {:9.0} per second {:8.2} us each, {:8.2} us of CPU, checkpoints {:.2} s",
        f64::from(count) / work,
        work / f64::from(count) * 1e6,
        cpu / f64::from(count) * 1e6,
        checkpoints.as_secs_f64()
    );
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::args().nth(1).ok_or("name a folder that may be filled")?;
    let mut bench = Bench::open(Path::new(&folder))?;
    let block = Bytes::from(vec![0x5a; BLOCK_BYTES as usize]);
    let checksum = [checksum_of(&block)];
    let large = Bytes::from(vec![0x5a; 1 << 20]);
    let mut checksums = Vec::new();
    block_checksums(&large, &mut checksums);
    let mut out = BytesMut::with_capacity(1 << 20);
    measure(&mut bench, "1 MiB write + append", 512, |b, _| {
        b.write(&large, &checksums)?;
        b.store.append()
    })?;
    measure(&mut bench, "4 KiB write, append per 8", 200_000, |b, index| {
        b.write(&block, &checksum)?;
        if index % 8 == 7 { b.store.append() } else { Ok(()) }
    })?;
    measure(&mut bench, "4 KiB write + append", 50_000, |b, _| {
        b.write(&block, &checksum)?;
        b.store.append()
    })?;
    measure(&mut bench, "4 KiB read, log and files", 100_000, |b, _| b.read(1, &mut out))?;
    measure(&mut bench, "4 KiB write + sync", 300, |b, _| {
        b.write(&block, &checksum)?;
        b.sync()
    })?;
    let start = Instant::now();
    bench.checkpoint(true)?;
    bench.checkpoint(true)?;
    println!("everything to files in {:.2} s", start.elapsed().as_secs_f64());
    measure(&mut bench, "4 KiB read, files", 100_000, |b, _| b.read(1, &mut out))?;
    measure(&mut bench, "1 MiB read, files", 2_000, |b, _| b.read(256, &mut out))?;
    Ok(())
}
