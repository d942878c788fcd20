//! What replicas hold of one shard, compared block by block: who gives which blocks to whom. Pure.
//!
//! | trusted replicas (never went away) | the winner of a block | who is given it |
//! | --- | --- | --- |
//! | one or more has it intact | the first of them | joining nodes that differ |
//! | all have it rotten | none | joining nodes with an older one, stale ones in any case: it is marked bad there |
//! | there are none: reconcile | the highest tag that is intact, the first where tags tie | who differs |
//!
//! A rotten block never wins, and nobody but a joining node is ever written. A repair has one joining node,
//! in sync like the trusted: where they cannot give it a block, what it has stays as it is.
//!
//! A block that turned out rotten when it was read has its checksum still, which says what it should hold.
//! A joining node that holds just that is not marked bad: it has the right content, and perhaps alone.
//!
//! Equal content under another write tag differs too: a tag says that a node in sync may not have the
//! block durably. Whoever joins has to know of that as well, or it could not tell a third node, which
//! lost the block in a power cut, that it has to be healed.

use super::{NodeIndex, NodeMask};
use crate::content::Block;
use crate::geometry::{BLOCK_BYTES, Tag};
use crate::rules::{Rule, broken};
use crate::wire::PAYLOAD_BYTES_MAX;
use std::cmp::Reverse;
use std::collections::VecDeque;
use std::ops::Range;

const BLOCKS_PER_COPY: u32 = (PAYLOAD_BYTES_MAX / BLOCK_BYTES as usize) as u32;

/// Blocks that `targets` get from `source`; without one they are bad on every replica that counts,
/// and are marked so.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct CopyRun {
    pub source: Option<NodeIndex>,
    pub targets: NodeMask,
    pub first_block: u32,
    pub blocks: u32,
}

impl CopyRun {
    /// The same for one of its targets.
    pub fn for_one(self, target: NodeIndex) -> CopyRun {
        CopyRun { targets: NodeMask::one(target), ..self }
    }
}

/// What nodes in sync hold of one block, all of it intact by its checksums.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Judgement {
    Equal,
    Wrong {
        right: NodeMask,
        wrong: NodeMask,
    },
    /// Nothing says which is right.
    Undecided,
}

/// Judges a block that nodes in sync hold, with no write to it in flight: the majority is right; without
/// one the highest write tag, if each has one.
pub(super) fn judge(held: &[(NodeIndex, Block, Tag)]) -> Judgement {
    let who = |content: Block| {
        let same = held.iter().filter(|(_, other, _)| *other == content);
        same.fold(NodeMask::EMPTY, |mask, (node, ..)| mask.with(NodeMask::one(*node)))
    };
    let Some((_, first, _)) = held.first() else { return Judgement::Equal };
    let all = held.iter().fold(NodeMask::EMPTY, |mask, (node, ..)| mask.with(NodeMask::one(*node)));
    if who(*first) == all {
        return Judgement::Equal;
    }
    let majority = held.iter().map(|(_, content, _)| who(*content));
    let majority = majority.max_by_key(|nodes| nodes.0.count_ones());
    if let Some(right) = majority.filter(|nodes| nodes.0.count_ones() * 2 > all.0.count_ones()) {
        return Judgement::Wrong { right, wrong: all.without(right) };
    }
    let newest = held.iter().max_by_key(|(_, _, tag)| *tag);
    let Some((_, content, tag)) = newest.filter(|_| held.iter().all(|(_, _, t)| *t != Tag::NONE))
    else {
        return Judgement::Undecided;
    };
    let right = who(*content);
    let tied = held.iter().any(|(node, _, other)| other == tag && !right.has(*node));
    match tied {
        true => Judgement::Undecided,
        false => Judgement::Wrong { right, wrong: all.without(right) },
    }
}

/// What is known of the joining nodes beside their summaries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Purpose {
    Level,
    /// They were left behind: what they hold says nothing.
    Heal,
    /// In sync, with rot somewhere.
    Repair,
}

/// The summaries of one shard.
pub(super) struct Comparison {
    trusted: NodeMask,
    joiners: NodeMask,
    purpose: Purpose,
    summaries: Vec<(NodeIndex, Vec<(Block, Tag)>)>,
    /// What blocks should hold that turned out rotten when they were read.
    rotten: Vec<(NodeIndex, u32, Block)>,
}

impl Comparison {
    /// `trusted`: members that never went away; `joiners`: those that may be written.
    pub(super) fn new(trusted: NodeMask, joiners: NodeMask) -> Comparison {
        assert!(trusted.and(joiners).is_empty(), "who joins is not trusted");
        let (summaries, rotten) = (Vec::new(), Vec::new());
        Comparison { trusted, joiners, purpose: Purpose::Level, summaries, rotten }
    }

    /// `node` is in sync as the trusted are, and holds rot.
    pub(super) fn repair(trusted: NodeMask, node: NodeIndex) -> Comparison {
        assert!(!trusted.is_empty(), "a repair has a source");
        let purpose = Purpose::Repair;
        Comparison { purpose, ..Comparison::new(trusted, NodeMask::one(node)) }
    }

    /// `node` was left behind, and is made equal to the trusted.
    pub(super) fn heal(trusted: NodeMask, node: NodeIndex) -> Comparison {
        assert!(!trusted.is_empty(), "a heal has a source");
        Comparison { purpose: Purpose::Heal, ..Comparison::new(trusted, NodeMask::one(node)) }
    }

    /// Adds what a member holds; all summaries have the same length.
    pub(super) fn add(&mut self, node: NodeIndex, blocks: Vec<(Block, Tag)>) {
        self.summaries.push((node, blocks));
    }

    /// A block turned out rotten when it was read. False: that was known, or it is none of them.
    pub(super) fn found_rotten(&mut self, node: NodeIndex, block: u32) -> bool {
        let summary = self.summaries.iter_mut().find(|(other, _)| *other == node);
        let known = summary.and_then(|(_, blocks)| blocks.get_mut(block as usize));
        match known.filter(|known| known.0 != Block::Bad) {
            Some(known) => {
                let held = std::mem::replace(&mut known.0, Block::Bad);
                self.rotten.push((node, block, held));
                true
            }
            None => false,
        }
    }

    /// Who gives which of the blocks in `range` to whom.
    pub(super) fn copy_runs(&self, range: Range<u32>) -> VecDeque<CopyRun> {
        let mut runs: VecDeque<CopyRun> = VecDeque::new();
        for index in range {
            let (source, targets) = self.judge(index as usize);
            if targets.is_empty() {
                continue;
            }
            match runs.back_mut() {
                Some(run)
                    if run.first_block + run.blocks == index
                        && (run.source, run.targets) == (source, targets)
                        && run.blocks < BLOCKS_PER_COPY =>
                {
                    run.blocks += 1;
                }
                _ => runs.push_back(CopyRun { source, targets, first_block: index, blocks: 1 }),
            }
        }
        runs
    }

    /// Blocks in `range` that are rotten on the joining node and on all that are trusted.
    pub(super) fn hopeless(&self, range: Range<u32>) -> Vec<u32> {
        let counts = self.trusted.with(self.joiners);
        let rotten = |index: &u32| {
            let mut known = self.summaries.iter().filter(|(node, _)| counts.has(*node));
            known.all(|(_, blocks)| blocks[*index as usize].0 == Block::Bad)
        };
        range.filter(rotten).collect()
    }

    /// The newest tag in a member's whole summary.
    fn newest_of(&self, node: NodeIndex) -> Tag {
        let summary = self.summaries.iter().find(|(other, _)| *other == node);
        let newest = summary.and_then(|(_, blocks)| blocks.iter().map(|(_, tag)| *tag).max());
        newest.unwrap_or(Tag::NONE)
    }

    /// The winner of one block and who has to be given it.
    fn judge(&self, index: usize) -> (Option<NodeIndex>, NodeMask) {
        let all = || self.summaries.iter().map(|(node, blocks)| (*node, blocks[index]));
        let reconcile = self.trusted.is_empty();
        let counts = |node| reconcile || self.trusted.has(node);
        let intact = all().filter(|(node, (block, _))| counts(*node) && *block != Block::Bad);
        let rank = |node, tag| match broken(Rule::WinnerPerBlock) {
            true => (self.newest_of(node), Reverse(node)),
            false => (if reconcile { tag } else { Tag::NONE }, Reverse(node)),
        };
        let winner = intact.max_by_key(|(node, (_, tag))| rank(*node, *tag));
        let newest = all().filter(|(node, _)| counts(*node)).map(|(_, (_, tag))| tag).max();
        let is_right = |block: Block| {
            let of_trusted = |(node, at, held): &&(NodeIndex, u32, Block)| {
                self.trusted.has(*node) && *at as usize == index && *held == block
            };
            block.is_data() && self.rotten.iter().any(|rotten| of_trusted(&rotten))
        };
        let differs = |block: Block, tag: Tag| match winner {
            Some((_, (content, winning))) => {
                let tag_left = tag != winning && winning != Tag::NONE;
                block != content || tag_left && !broken(Rule::TagsAreCopied)
            }
            None if is_right(block) => false,
            None if self.purpose == Purpose::Heal => block != Block::Bad,
            None if self.purpose == Purpose::Repair => false,
            // One that is no older than the rotten ones is all there is left: it stays.
            None => !reconcile && block != Block::Bad && Some(tag) < newest,
        };
        let targets = all().filter(|(_, (block, tag))| differs(*block, *tag));
        let targets =
            targets.fold(NodeMask::EMPTY, |mask, (node, _)| mask.with(NodeMask::one(node)));
        (winner.map(|(node, _)| node), targets.and(self.joiners))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: NodeIndex = 0;
    const B: NodeIndex = 1;
    const C: NodeIndex = 2;

    fn tag(sequence: u64) -> Tag {
        Tag { epoch: 1, sequence }
    }

    fn mask(nodes: &[NodeIndex]) -> NodeMask {
        nodes.iter().fold(NodeMask::EMPTY, |mask, node| mask.with(NodeMask::one(*node)))
    }

    fn compared(
        trusted: &[NodeIndex],
        joiners: &[NodeIndex],
        blocks: &[(NodeIndex, Block, Tag)],
    ) -> Vec<CopyRun> {
        let mut comparison = Comparison::new(mask(trusted), mask(joiners));
        blocks.iter().for_each(|(node, block, tag)| comparison.add(*node, vec![(*block, *tag)]));
        comparison.copy_runs(0..1).into()
    }

    fn run(source: Option<NodeIndex>, targets: &[NodeIndex]) -> Vec<CopyRun> {
        vec![CopyRun { source, targets: mask(targets), first_block: 0, blocks: 1 }]
    }

    #[test]
    fn reconcile_gives_the_highest_tag_to_who_differs() {
        let blocks =
            [(A, Block::Data(1), tag(4)), (B, Block::Data(2), tag(5)), (C, Block::Data(2), tag(5))];
        assert_eq!(compared(&[], &[A, B, C], &blocks), run(Some(B), &[A]));
    }

    #[test]
    fn reconcile_never_lets_rot_win_whatever_its_tag() {
        let blocks = [
            (A, Block::Bad, tag(9)),
            (B, Block::Data(2), Tag::NONE),
            (C, Block::Data(2), Tag::NONE),
        ];
        assert_eq!(compared(&[], &[A, B, C], &blocks), run(Some(B), &[A]));
        let all_bad = [(A, Block::Bad, tag(9)), (B, Block::Bad, Tag::NONE)];
        assert_eq!(compared(&[], &[A, B], &all_bad), []);
    }

    #[test]
    fn trusted_content_wins_over_any_tag_and_only_joiners_are_written() {
        let blocks =
            [(A, Block::Data(1), tag(4)), (B, Block::Data(2), tag(5)), (C, Block::Data(3), tag(9))];
        assert_eq!(compared(&[A, B], &[C], &blocks), run(Some(A), &[C]));
    }

    #[test]
    fn another_trusted_replica_stands_in_for_a_rotten_one() {
        let blocks =
            [(A, Block::Bad, tag(4)), (B, Block::Data(2), tag(4)), (C, Block::Zero, Tag::NONE)];
        assert_eq!(compared(&[A, B], &[C], &blocks), run(Some(B), &[C]));
    }

    #[test]
    fn rot_on_all_that_is_trusted_marks_only_an_older_block_bad() {
        let older = [(A, Block::Bad, tag(4)), (C, Block::Data(3), tag(3))];
        assert_eq!(compared(&[A], &[C], &older), run(None, &[C]));
        let level = [(A, Block::Bad, tag(4)), (C, Block::Data(3), tag(4))];
        assert_eq!(compared(&[A], &[C], &level), []);
    }

    #[test]
    fn a_block_found_rotten_is_judged_again_and_told_once() {
        let mut comparison = Comparison::new(mask(&[A, B]), mask(&[C]));
        comparison.add(A, vec![(Block::Data(1), tag(1)); 3]);
        comparison.add(B, vec![(Block::Data(1), tag(1)); 3]);
        comparison.add(C, vec![(Block::Absent, Tag::NONE); 3]);
        assert_eq!(comparison.copy_runs(0..3).len(), 1);
        assert!(comparison.found_rotten(A, 1));
        assert!(!comparison.found_rotten(A, 1));
        assert!(!comparison.found_rotten(A, 3));
        let sources: Vec<_> = comparison.copy_runs(0..3).iter().map(|run| run.source).collect();
        assert_eq!(sources, [Some(A), Some(B), Some(A)]);
    }
    /// A healed node did not take over the tag of a block that it had already. A third node lost that
    /// block, unflushed, was left behind, and was then healed from this one, which did not know of it.
    #[test]
    fn equal_content_travels_while_its_tag_does_not() {
        let tagged = [(A, Block::Data(1), tag(4)), (C, Block::Data(1), tag(3))];
        assert_eq!(compared(&[A], &[C], &tagged), run(Some(A), &[C]));
        let durable = [(A, Block::Data(1), Tag::NONE), (C, Block::Data(1), tag(3))];
        assert_eq!(compared(&[A], &[C], &durable), []);
    }

    #[test]
    fn rot_on_all_that_is_trusted_marks_any_block_of_a_stale_node_bad() {
        let mut comparison = Comparison::heal(mask(&[A]), C);
        comparison.add(A, vec![(Block::Bad, Tag::NONE)]);
        comparison.add(C, vec![(Block::Data(3), tag(9))]);
        assert_eq!(Vec::from(comparison.copy_runs(0..1)), run(None, &[C]));
    }

    /// The block was equal on a stale node but for its tag, and rotten on the only source: it was marked bad
    /// on the one node that had it.
    #[test]
    fn who_holds_what_the_checksum_of_a_rotten_block_says_keeps_it() {
        for comparison in [Comparison::heal(mask(&[A]), C), Comparison::new(mask(&[A]), mask(&[C]))]
        {
            let mut comparison = comparison;
            comparison.add(A, vec![(Block::Data(1), tag(9)); 2]);
            comparison.add(C, vec![(Block::Data(1), tag(3)), (Block::Data(2), tag(3))]);
            assert_eq!(
                comparison.copy_runs(0..2),
                [CopyRun { blocks: 2, ..run(Some(A), &[C])[0] }]
            );
            assert!(comparison.found_rotten(A, 0) && comparison.found_rotten(A, 1));
            let older = CopyRun { first_block: 1, ..run(None, &[C])[0] };
            assert_eq!(comparison.copy_runs(0..2), [older], "only what is not the right content");
        }
    }

    #[test]
    fn the_majority_is_right_then_the_highest_tag_and_nothing_is_guessed() {
        let held = |blocks: &[(NodeIndex, u64, Tag)]| {
            let block = |(node, checksum, tag): &(NodeIndex, u64, Tag)| {
                (*node, Block::Data(*checksum), *tag)
            };
            judge(&blocks.iter().map(block).collect::<Vec<_>>())
        };
        let (right, wrong) = (mask(&[A, C]), mask(&[B]));
        let odd = [(A, 1, Tag::NONE), (B, 2, tag(9)), (C, 1, Tag::NONE)];
        assert_eq!(held(&odd), Judgement::Wrong { right, wrong });
        assert_eq!(held(&[(A, 1, Tag::NONE), (B, 1, tag(3))]), Judgement::Equal);
        let (right, wrong) = (mask(&[B]), mask(&[A]));
        assert_eq!(held(&[(A, 1, tag(2)), (B, 2, tag(3))]), Judgement::Wrong { right, wrong });
        for undecided in [
            vec![(A, 1, Tag::NONE), (B, 2, Tag::NONE)],
            vec![(A, 1, Tag::NONE), (B, 2, tag(3))],
            vec![(A, 1, tag(3)), (B, 2, tag(3))],
            vec![(A, 1, Tag::NONE), (B, 2, Tag::NONE), (C, 3, Tag::NONE)],
        ] {
            assert_eq!(held(&undecided), Judgement::Undecided);
        }
        assert_eq!(held(&[(A, 1, Tag::NONE)]), Judgement::Equal);
        assert_eq!(held(&[]), Judgement::Equal);
    }

    #[test]
    fn a_repair_gives_a_rotten_node_what_another_has_and_takes_nothing_from_it() {
        let mut comparison = Comparison::repair(mask(&[A, B]), C);
        comparison.add(A, vec![(Block::Bad, tag(7)); 2]);
        comparison.add(B, vec![(Block::Data(1), Tag::NONE), (Block::Bad, tag(7))]);
        comparison.add(C, vec![(Block::Bad, Tag::NONE), (Block::Data(2), Tag::NONE)]);
        assert_eq!(Vec::from(comparison.copy_runs(0..2)), run(Some(B), &[C]));
        assert_eq!(comparison.hopeless(0..2), []);
        assert!(comparison.found_rotten(B, 0));
        assert_eq!(comparison.copy_runs(0..2).len(), 0);
        assert_eq!(comparison.hopeless(0..2), [0]);
    }
}
