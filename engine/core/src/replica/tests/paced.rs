//! Several images of one gateway: what they do in the background, beside the clients of any of them.

use super::scripted::TwoSets;
use crate::replica::{Background, HealLimits, HealSpec, Output, Token};
use crate::wire::{FrameReader, kind};
use bytes::{Bytes, BytesMut};

const MS: u64 = 1_000_000;

/// A gateway whose nodes answer each frame after a millisecond.
struct Gateway {
    background: Background,
    images: Vec<TwoSets>,
    /// What the nodes' dirty maps name when an image is opened.
    dirty: Vec<u64>,
    now_ns: u64,
    cookies: u64,
    /// Milliseconds in which there was something under way in the background, and most images at once.
    busy_ms: u64,
    most_at_once: usize,
}

impl Gateway {
    fn new(images: u32, limits: HealLimits) -> Gateway {
        let background = Background::default();
        let images = (0..images).map(|image| TwoSets::sharing(&background, image, limits));
        let (images, dirty) = (images.collect(), Vec::new());
        let (now_ns, cookies, busy_ms, most_at_once) = (1_000 * MS, 0, 0, 0);
        Gateway { background, images, dirty, now_ns, cookies, busy_ms, most_at_once }
    }

    fn open_all(&mut self) {
        let dirty = self.dirty.clone();
        self.images.iter_mut().for_each(|image| image.open(&dirty));
    }

    /// The first node is healed in the set in which it is stale, of all shards of that.
    fn heal(&mut self, image: usize, limits: HealLimits) {
        let image = &mut self.images[image];
        image.written = (0..64).filter(|shard| image.set_of_shard(*shard) == 1).collect();
        image.io.heal(HealSpec { node: 0, serial: 0, attempt: 1, sets: vec![(1, 1)], limits });
    }

    /// A millisecond passes; clients of these images ask for something.
    fn step(&mut self, clients: &[usize]) {
        self.now_ns += MS;
        let at_once = self.images.iter().filter(|image| works_in_background(image)).count();
        self.busy_ms += u64::from(at_once > 0);
        self.most_at_once = self.most_at_once.max(at_once);
        for client in clients {
            self.ask(*client, 0);
        }
        let ticks = self.now_ns.is_multiple_of(100 * MS);
        for image in &mut self.images {
            image.io.set_now(self.now_ns);
            image.run_once(&self.dirty);
            if ticks {
                image.io.pace();
            }
            image.io.report_background();
        }
        for _ in 0..self.background.waiting() {
            let Some(next) = self.background.offer(self.now_ns) else { break };
            let image = &mut self.images[next as usize];
            image.io.pace();
            image.io.report_background();
            self.background.offer_over();
        }
    }

    fn ask(&mut self, image: usize, shard: u64) {
        self.cookies += 1;
        let token = Token { client: 1, cookie: self.cookies };
        let io = &mut self.images[image].io;
        io.set_now(self.now_ns);
        let at = shard * u64::from(io.spec().geometry.shard_bytes);
        io.write(token, at, Bytes::from(vec![7; 4096]), 0);
    }

    fn done(&self, image: usize) -> u64 {
        self.images[image].io.heal_state().map_or(u64::MAX, |heal| heal.shards_done)
    }
}

fn works_in_background(image: &TwoSets) -> bool {
    image.io.outputs.iter().any(|output| {
        let Output::Send { head, .. } = output else { return false };
        let frame = FrameReader::next(&mut BytesMut::from(&head[..])).expect("ours");
        frame.is_some_and(|frame| frame.kind == kind::SUMMARY)
    })
}

const QUARTER: HealLimits =
    HealLimits { bytes_per_second: 0, shards_at_once: 4, share_percent: 25 };

/// Each image had a quarter of the time for itself: with three of them guests had the rest, and with more
/// of them nothing.
#[test]
fn beside_a_guest_the_heals_of_all_images_share_one_part_of_the_time() {
    let mut gateway = Gateway::new(3, QUARTER);
    gateway.open_all();
    (0..50).for_each(|_| gateway.step(&[0]));
    (0..3).for_each(|image| gateway.heal(image, QUARTER));
    (gateway.busy_ms, gateway.most_at_once) = (0, 0);
    (0..400).for_each(|_| gateway.step(&[0]));
    assert_eq!(gateway.most_at_once, 1, "images whose heals have something under way at once");
    assert!((80..=130).contains(&gateway.busy_ms), "{} ms of 400", gateway.busy_ms);
    let done: Vec<u64> = (0..3).map(|image| gateway.done(image)).collect();
    assert!(done.iter().all(|shards| (5..=25).contains(shards)), "{done:?}");
    let spread = done.iter().max().zip(done.iter().min()).map(|(most, least)| most - least);
    assert!(spread.is_some_and(|spread| spread <= 4), "{done:?}");
}

/// Nobody has the healed image open, and the guests of another were not seen.
#[test]
fn a_heal_yields_to_the_guest_of_another_image() {
    let mut gateway = Gateway::new(2, QUARTER);
    gateway.open_all();
    (0..50).for_each(|_| gateway.step(&[1]));
    gateway.heal(0, QUARTER);
    gateway.busy_ms = 0;
    (0..200).for_each(|_| gateway.step(&[1]));
    assert!((40..=80).contains(&gateway.busy_ms), "{} ms of 200", gateway.busy_ms);
    // The guest is gone, and a quarter of a second later nobody is yielded to.
    (0..1_000).for_each(|_| gateway.step(&[]));
    assert_eq!(gateway.done(0), gateway.images[0].written.len() as u64, "it goes on alone");
}

/// Guests of other gateways use the same nodes.
#[test]
fn a_heal_yields_to_guests_that_only_the_nodes_see() {
    let mut gateway = Gateway::new(1, QUARTER);
    gateway.open_all();
    gateway.images[0].beside_clients = true;
    (0..300).for_each(|_| gateway.step(&[]));
    gateway.heal(0, QUARTER);
    gateway.busy_ms = 0;
    (0..200).for_each(|_| gateway.step(&[]));
    assert!((30..=90).contains(&gateway.busy_ms), "{} ms of 200", gateway.busy_ms);
}

/// What a guest waits for goes on, however much the background has used up, also that of others.
#[test]
fn a_shard_that_a_guest_waits_for_is_levelled_at_once() {
    let meagre = HealLimits { share_percent: 1, ..QUARTER };
    let mut gateway = Gateway::new(2, meagre);
    gateway.dirty = (0..40).collect();
    gateway.images.iter_mut().for_each(TwoSets::connect);
    let running = |gateway: &Gateway| gateway.images.iter().all(|image| image.io.is_running());
    while !running(&gateway) {
        gateway.step(&[]);
    }
    (0..30).for_each(|_| gateway.step(&[1]));
    let left =
        |gateway: &Gateway| gateway.images[0].io.level_state().map(|level| level.shards_left);
    let before = left(&gateway);
    assert!(before.is_some_and(|left| left > 20), "{before:?}");
    gateway.images[0].answers.clear();
    gateway.ask(0, 39);
    (0..10).for_each(|_| gateway.step(&[1]));
    assert_eq!(gateway.images[0].answers.len(), 1, "it waited for its turn");
    assert!(left(&gateway) > Some(20), "only what is waited for goes first");
}
