//! Which nodes can fetch blocks from which others by themselves, as far as their holder knows: where each is
//! reached, and whose attempts have failed of late.

use super::{NodeIndex, NodeMask};
use crate::wire::copies::Source;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A node that could not fetch from another one is not asked to again for so long; twice as long each time that
/// it fails again, up to the most.
const REST_NS: u64 = 5_000_000_000;
const REST_NS_MAX: u64 = 300_000_000_000;

/// What is known of one image's nodes. Clones are the same: what levelling has found out counts for heals.
///
/// One thread uses it, so nobody ever waits for the lock; it is there because that thread is not the one that
/// makes it.
#[derive(Clone, Debug, Default)]
pub(super) struct Routes(Arc<Mutex<Known>>);

/// Without addresses nobody fetches anything by itself.
#[derive(Debug, Default)]
struct Known {
    sources: BTreeMap<NodeIndex, Source>,
    /// By source and target: at most a pair for each two nodes.
    resting: BTreeMap<(NodeIndex, NodeIndex), Rest>,
}

#[derive(Debug)]
struct Rest {
    until_ns: u64,
    length_ns: u64,
}

impl Routes {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where `node` is reached; none: it is not known.
    pub fn set(&self, node: NodeIndex, source: Option<Source>) {
        match source {
            Some(source) => _ = self.known().sources.insert(node, source),
            None => _ = self.known().sources.remove(&node),
        }
    }

    /// Where `node` is reached, if that is known.
    pub fn source(&self, node: NodeIndex) -> Option<Source> {
        self.known().sources.get(&node).cloned()
    }

    /// Who of `targets` may be asked to fetch from `source` now.
    pub fn can_pull(&self, source: NodeIndex, targets: NodeMask, now_ns: u64) -> NodeMask {
        let known = self.known();
        if !known.sources.contains_key(&source) {
            return NodeMask::EMPTY;
        }
        let rest = |target| known.resting.get(&(source, target));
        let rests = |target| rest(target).is_some_and(|rest| now_ns < rest.until_ns);
        let able = targets.iter().filter(|target| *target != source && !rests(*target));
        able.fold(NodeMask::EMPTY, |mask, target| mask.with(NodeMask::one(target)))
    }

    /// `target` could not fetch from `source`. Of several that failed together the first counts.
    pub fn failed(&self, source: NodeIndex, target: NodeIndex, now_ns: u64) {
        let resting = &mut self.known().resting;
        let former = resting.get(&(source, target));
        if former.is_some_and(|rest| now_ns < rest.until_ns) {
            return;
        }
        let length_ns = former.map_or(REST_NS, |rest| (2 * rest.length_ns).min(REST_NS_MAX));
        resting.insert((source, target), Rest { until_ns: now_ns + length_ns, length_ns });
    }

    /// `target` has fetched from `source`.
    pub fn worked(&self, source: NodeIndex, target: NodeIndex) {
        self.known().resting.remove(&(source, target));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pair_that_failed_rests_and_others_go_on() {
        let routes = Routes::default();
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
    #[test]
    fn who_fails_again_rests_longer_until_it_works() {
        let routes = Routes::default();
        let address = "127.0.0.1:1".parse().expect("an address");
        routes.set(0, Some(Source { node: "node1".into(), address }));
        let target = NodeMask::one(1);
        let (mut now_ns, mut length_ns) = (0, REST_NS);
        for _ in 0..10 {
            routes.failed(0, 1, now_ns);
            routes.clone().failed(0, 1, now_ns + 1);
            assert_eq!(routes.can_pull(0, target, now_ns + length_ns - 1), NodeMask::EMPTY);
            now_ns += length_ns;
            assert_eq!(routes.can_pull(0, target, now_ns), target);
            length_ns = (2 * length_ns).min(REST_NS_MAX);
        }
        assert_eq!(length_ns, REST_NS_MAX);
        routes.worked(0, 1);
        routes.failed(0, 1, now_ns);
        assert_eq!(routes.can_pull(0, target, now_ns + REST_NS), target);
    }
}
