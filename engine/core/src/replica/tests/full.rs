//! Disks of too many nodes are full, and clients are to hear of it.

use super::scripted::TwoSets;
use crate::replica::{IoError, NodeMask, Outcome, Token};
use crate::wire::messages::{Head, IO_BYTES, Io};
use crate::wire::{Frame, kind};
use bytes::Bytes;

const REFUSED: Outcome = Outcome::Failed(IoError::NoSpace);
const BLOCK: u32 = 4096;
/// In sync in the first set: 0, 1 and 2; in the second: 1 and 3.
const FULL: NodeMask = NodeMask(0b0101);

struct Full {
    sets: TwoSets,
    /// Where a shard of the first set, and of the second, begins.
    at: [u64; 2],
    cookie: u64,
}

impl Full {
    fn new() -> Full {
        let mut sets = TwoSets::new();
        sets.open(&[]);
        let at = [0, 1].map(|set| sets.shard_of_set(set) << 20);
        sets.full = FULL;
        Full { sets, at, cookie: 0 }
    }

    fn token(&mut self) -> Token {
        self.cookie += 1;
        Token { client: 1, cookie: self.cookie }
    }

    /// Writes a block and lets everybody answer what they can.
    fn write(&mut self, offset: u64) -> Token {
        let token = self.token();
        self.sets.io.write(token, offset, Bytes::from(vec![7; BLOCK as usize]), 0);
        self.sets.run(&[]);
        token
    }

    fn read(&mut self, offset: u64) -> Token {
        let token = self.token();
        self.sets.io.read(token, offset, BLOCK);
        self.sets.run(&[]);
        token
    }

    fn refuse(&mut self, sets: &[usize]) {
        self.sets.io.refuse_writes(sets);
        self.sets.run(&[]);
    }

    fn answer(&self, token: Token) -> Option<&Outcome> {
        let mut answers = self.sets.answers.iter().filter(|(to, _)| *to == token);
        let answer = answers.next();
        assert!(answers.next().is_none(), "a client is answered once");
        answer.map(|(_, outcome)| outcome)
    }

    fn answered(&self, token: Token) -> bool {
        self.answer(token).is_some_and(|outcome| !matches!(outcome, Outcome::Failed(_)))
    }

    fn writes(&self) -> Vec<(u8, Io)> {
        let io = |frame: &Frame| Io::take(frame.head.slice(..IO_BYTES)).expect("ours");
        let writes = self.sets.asked.iter().filter(|(_, frame)| frame.kind == kind::WRITE);
        writes.map(|(node, frame)| (*node, io(frame))).collect()
    }
}

#[test]
fn writes_wait_for_room_where_policy_says_nothing() {
    let mut full = Full::new();
    let write = full.write(full.at[0]);
    (0..100).for_each(|_| full.sets.io.tick());
    full.sets.run(&[]);
    assert_eq!(full.answer(write), None);
    full.sets.full = NodeMask::EMPTY;
    full.sets.io.tick();
    full.sets.run(&[]);
    assert!(full.answered(write));
}

#[test]
fn a_write_that_nodes_refused_fails_once_and_ends_up_on_all_of_them() {
    let mut full = Full::new();
    let [at, _] = full.at;
    let stuck = full.write(at);
    full.refuse(&[0]);
    assert_eq!(full.answer(stuck), Some(&REFUSED));
    // Some nodes have it: nobody may see it before all have.
    let read = full.read(at);
    assert_eq!(full.answer(read), None);
    full.sets.full = NodeMask::EMPTY;
    full.sets.io.tick();
    full.sets.run(&[]);
    assert!(full.answered(read));
    let sent = full.writes();
    assert!(sent.iter().all(|(_, io)| io.sequence == sent[0].1.sequence));
    let to = |node: u8| sent.iter().filter(|(other, _)| *other == node).count();
    assert_eq!([to(0), to(1), to(2)], [2, 1, 2], "who refused it is asked again");
    full.refuse(&[]);
    let write = full.write(at);
    assert!(full.answered(write));
}

#[test]
fn only_what_needs_room_in_that_set_is_refused_and_no_node_hears_of_it() {
    let mut full = Full::new();
    let [at, other] = full.at;
    full.write(at);
    full.refuse(&[0]);
    let before = full.writes().len();
    let (near, across) = (full.write(at + (512 << 10)), full.token());
    full.sets.io.write(across, (1 << 20) - 4096, Bytes::from(vec![7; 8192]), 0);
    full.sets.run(&[]);
    assert_eq!(full.answer(near), Some(&REFUSED));
    let touches = [0, 1].iter().any(|shard| full.sets.set_of_shard(*shard) == 0);
    assert_eq!(full.answer(across) == Some(&REFUSED), touches);
    let sent = full.writes();
    assert!(sent[before..].iter().all(|(_, io)| full.sets.set_of_shard(io.shard) == 1));
    let (write, read) = (full.write(other), full.read(at + (512 << 10)));
    let (zero, flush) = (full.token(), full.token());
    full.sets.io.zero(zero, at + (256 << 10), BLOCK, 0);
    full.sets.io.flush(flush);
    full.sets.run(&[]);
    assert!([write, read, zero, flush].into_iter().all(|token| full.answered(token)));
}

#[test]
fn a_write_that_finds_no_room_later_fails_when_a_node_says_so() {
    let mut full = Full::new();
    let [at, _] = full.at;
    full.sets.full = NodeMask::EMPTY;
    let token = full.token();
    full.sets.io.write(token, at, Bytes::from(vec![7; BLOCK as usize]), 0);
    // It is on its way when policy decides.
    full.sets.io.refuse_writes(&[0]);
    full.sets.full = FULL;
    full.sets.run(&[]);
    assert_eq!(full.answer(token), Some(&REFUSED));
}

#[test]
fn a_write_queued_behind_a_refused_one_is_never_sent() {
    let mut full = Full::new();
    let [at, _] = full.at;
    let (first, second) = (full.write(at), full.write(at));
    full.refuse(&[0]);
    assert_eq!(full.answer(first), Some(&REFUSED));
    assert_eq!(full.answer(second), Some(&REFUSED));
    full.sets.full = NodeMask::EMPTY;
    full.sets.io.tick();
    full.sets.run(&[]);
    let sent = full.writes();
    assert!(sent.iter().all(|(_, io)| io.sequence == sent[0].1.sequence), "the first one alone");
    full.refuse(&[]);
    let write = full.write(at);
    assert!(full.answered(write), "its blocks are free");
}

/// An image whose client has left could not be opened again while disks were full: it was closing.
#[test]
fn a_refused_write_keeps_no_image_from_being_closed() {
    let mut full = Full::new();
    full.write(full.at[0]);
    full.sets.io.close();
    full.sets.run(&[]);
    assert_eq!(full.sets.closed_clean, None, "a client waits");
    full.refuse(&[0]);
    assert_eq!(
        full.sets.closed_clean,
        Some(false),
        "copies may differ: the next holder levels them"
    );
}
