//! What both disks promise: the simulated one stands for the real one in every other test.

use std::io::IoSlice;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};

use super::rig::*;
use crate::geometry::BLOCK_BYTES;
use crate::store::disk::{Disk, Errno};
use crate::store::real::RealDisk;
use crate::store::simulated::SimDisk;
use crate::store::{Stamp, Store, StoreError, View, WriteOp};

pub struct Folder(pub std::path::PathBuf);

impl Folder {
    pub fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("hci-store-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).expect("a temporary folder");
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn contract(disk: &dyn Disk) {
    assert_eq!(disk.open("a").map(|_| ()), Err(Errno::NOENT));
    assert_eq!(disk.create("f/a").map(|_| ()), Err(Errno::NOENT));
    disk.create_dir("f").expect("create_dir");
    disk.create_dir("f").expect("one that exists");
    let file = disk.create("f/a").expect("create");
    let (one, two) = ([1u8; 3000], [2u8; 3000]);
    file.write_at(100, &mut [IoSlice::new(&one), IoSlice::new(&[]), IoSlice::new(&two)])
        .expect("write");
    assert_eq!(file.length(), Ok(6100));
    let mut out = BytesMut::from(&b"x"[..]);
    assert_eq!(file.read_at(90, 10_000, &mut out), Ok(6010));
    let expected = [&[b'x'][..], &[0; 10], &one, &two].concat();
    assert_eq!(&out[..], &expected[..]);
    assert_eq!(file.read_at(7000, 10, &mut out), Ok(0));
    file.punch_hole(0, 4096).expect("punch");
    out.clear();
    file.read_at(4095, 2, &mut out).expect("read");
    assert_eq!(&out[..], &[0, 2]);
    file.set_len(5000).expect("shorter");
    file.set_len(8192).expect("longer");
    out.clear();
    file.read_at(4999, 10, &mut out).expect("read");
    assert_eq!(&out[..], &[2, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    file.write_at(1 << 20, &mut [IoSlice::new(&one)]).expect("write");
    let data = file.next_data(8192).expect("a place");
    assert!((8192..=1 << 20).contains(&data), "nothing that was written is passed over");
    file.set_len(8192).expect("shorter");
    let before = file.allocated_bytes().expect("allocated");
    file.allocate(8192, 1 << 16).expect("allocate");
    assert_eq!(file.length(), Ok(8192), "the length stays");
    assert!(file.allocated_bytes().expect("allocated") >= before + (1 << 16));
    file.sync_data().expect("sync");
    disk.sync_files(&[Arc::clone(&file)]).expect("sync");
    disk.create("f/b").expect("create");
    disk.rename("f/a", "f/b").expect("rename");
    assert_eq!(disk.list("f").expect("list"), ["b"]);
    assert_eq!(disk.open("f/b").and_then(|file| file.length()), Ok(8192));
    assert_eq!(disk.remove_dir("f"), Err(Errno::NOTEMPTY));
    assert_eq!(disk.unlink("f"), Err(Errno::ISDIR));
    disk.sync_dir("f").expect("sync");
    disk.unlink("f/b").expect("unlink");
    disk.unlink("f/b").expect("one that is gone");
    assert_eq!(file.length(), Ok(8192), "an open file outlives its name");
    disk.remove_dir("f").expect("remove");
    disk.remove_dir("f").expect("one that is gone");
    assert_eq!(disk.list("f"), Ok(vec![]));
    let lock = disk.lock("lock").expect("lock");
    assert_eq!(disk.lock("lock").map(|_| ()), Err(Errno::WOULDBLOCK));
    drop(lock);
    disk.lock("lock").expect("free again");
    let (capacity, free) = disk.space().expect("space");
    assert!(free > 0 && free <= capacity);
}

#[test]
fn real_disk_keeps_the_contract() {
    let folder = Folder::new("contract");
    contract(&*RealDisk::open_dir(&folder.0).expect("opens"));
}

#[test]
fn simulated_disk_keeps_the_contract() {
    contract(&*SimDisk::new().run());
}

#[test]
fn store_on_a_real_folder_is_locked_and_read_back_after_a_restart() {
    let folder = Folder::new("store");
    let disk = || RealDisk::open_dir(&folder.0).expect("opens");
    let (mut store, _) = Store::open(disk(), &config()).expect("creates");
    assert_eq!(Store::open(disk(), &config()).map(|_| ()), Err(StoreError::Locked));
    store.put_record(IMAGE, record(head(1, 1))).expect("record");
    let write = |store: &mut Store, sequence: u64| {
        let stamp = Stamp { epoch: 1, generation: 1, sequence };
        let (shard, offset) = (sequence % 20, sequence as u32 % 7 * BLOCK_BYTES);
        let op = WriteOp { view: View::own(IMAGE, &[1]), shard, offset, stamp };
        let data = vec![sequence as u8; BLOCK];
        store.write(&op, &fragment_checksums(offset, &data), Bytes::from(data))
    };
    for sequence in 1..400 {
        while write(&mut store, sequence) == Err(StoreError::LogFull) {
            let job = store.begin_checkpoint(false).expect("begins").expect("due");
            store.finish_checkpoint(job.run()).expect("succeeds");
        }
    }
    let job = store.begin_sync().expect("begins").expect("something");
    store.finish_sync(job.run()).expect("succeeds");
    drop(store);
    for _ in 0..2 {
        let (mut store, recovery) = Store::open(disk(), &config()).expect("opens");
        assert!(!recovery.damaged && !recovery.created);
        for sequence in 260..400 {
            let (mut states, mut data) = (Vec::new(), BytesMut::new());
            let (shard, block) = (sequence % 20, sequence as u32 % 7);
            store
                .read(View::own(IMAGE, &[1]), shard, block, 1, &mut states, &mut data)
                .expect("reads");
            assert_eq!(data, vec![sequence as u8; BLOCK], "{sequence}");
        }
        let job = store.begin_checkpoint(true).expect("begins").expect("something");
        store.finish_checkpoint(job.run()).expect("succeeds");
    }
}
