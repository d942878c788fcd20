//! Which nodes can fetch blocks from which others by themselves, as far as their holder knows: where each is
//! reached, and whose attempts have failed of late.

use super::{NodeIndex, NodeMask};
use crate::wire::copies::Source;
use std::collections::BTreeMap;

/// A node that could not fetch from another one is not asked to again for so long.
const REST_NS: u64 = 5_000_000_000;

/// Without addresses nobody fetches anything by itself.
#[derive(Clone, Debug, Default)]
pub(super) struct Routes {
    sources: BTreeMap<NodeIndex, Source>,
    /// Until when, by source and target: at most a pair for each two nodes.
    resting: BTreeMap<(NodeIndex, NodeIndex), u64>,
}

impl Routes {
    /// Where `node` is reached; none: it is not known.
    pub fn set(&mut self, node: NodeIndex, source: Option<Source>) {
        match source {
            Some(source) => _ = self.sources.insert(node, source),
            None => _ = self.sources.remove(&node),
        }
    }

    /// Where `node` is reached, if that is known.
    pub fn source(&self, node: NodeIndex) -> Option<&Source> {
        self.sources.get(&node)
    }

    /// Who of `targets` may be asked to fetch from `source` now.
    pub fn can_pull(&self, source: NodeIndex, targets: NodeMask, now_ns: u64) -> NodeMask {
        if !self.sources.contains_key(&source) {
            return NodeMask::EMPTY;
        }
        let rests = |target| self.resting.get(&(source, target)).is_some_and(|end| now_ns < *end);
        let able = targets.iter().filter(|target| *target != source && !rests(*target));
        able.fold(NodeMask::EMPTY, |mask, target| mask.with(NodeMask::one(target)))
    }

    /// `target` could not fetch from `source`.
    pub fn failed(&mut self, source: NodeIndex, target: NodeIndex, now_ns: u64) {
        self.resting.insert((source, target), now_ns + REST_NS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pair_that_failed_rests_and_others_go_on() {
        let mut routes = Routes::default();
        let targets = NodeMask(0b111);
        assert_eq!(routes.can_pull(0, targets, 0), NodeMask::EMPTY, "nobody knows where it is");
        let address = "127.0.0.1:1".parse().expect("an address");
        routes.set(0, Some(Source { node: "node1".into(), address }));
        assert_eq!(routes.can_pull(0, targets, 0), NodeMask(0b110), "nobody pulls from itself");
        routes.failed(0, 1, 7);
        assert_eq!(routes.can_pull(0, targets, 7 + REST_NS - 1), NodeMask(0b100));
        assert_eq!(routes.can_pull(0, targets, 7 + REST_NS), NodeMask(0b110));
        routes.set(0, None);
        assert_eq!(routes.can_pull(0, targets, 7 + REST_NS), NodeMask::EMPTY);
    }
}
