//! What the images of a gateway share of `pacing`: the gateway's end of it, and that of each undertaking.

use super::pacing::{Accounts, Limits, Need, Sort};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The work in the background of all images of a gateway. Clones are the same one.
///
/// One thread uses it, so nobody ever waits for the lock; it is there because that thread is not the one
/// that makes it.
#[derive(Clone, Default)]
pub struct Background(Arc<Mutex<Accounts>>);

impl Background {
    fn accounts(&self) -> MutexGuard<'_, Accounts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A client of some image asks for something.
    pub(super) fn asked(&self, now_ns: u64) {
        self.accounts().asked(now_ns);
    }

    /// Begins an undertaking of the image of channel `image`; it ends with what is returned.
    pub(super) fn join(&self, image: u32, sort: Sort, limits: Limits) -> Pacing {
        let ticket = self.accounts().join(image, sort, limits);
        Pacing(Some((self.clone(), ticket)))
    }

    /// Time has passed.
    pub(super) fn reckon(&self, now_ns: u64) {
        self.accounts().reckon(now_ns);
    }

    /// How many undertakings wait for their turn.
    pub fn waiting(&self) -> usize {
        self.accounts().waiting()
    }

    /// The image whose turn it is, if there is room for more. It is to be asked to `pace`, and then
    /// `offer_over` called.
    pub fn offer(&self, now_ns: u64) -> Option<u32> {
        self.accounts().offer(now_ns)
    }

    pub fn offer_over(&self) {
        self.accounts().offer_over();
    }
}

/// The part of one undertaking. By default it has no limits.
#[derive(Default)]
pub(super) struct Pacing(Option<(Background, u64)>);

impl Pacing {
    /// Whether the next piece may be begun now, which is then to be done. If not, the turn will come.
    pub fn begins(&self, need: Need) -> bool {
        self.0.as_ref().is_none_or(|(all, ticket)| all.accounts().begins(*ticket, need))
    }

    /// Takes from the allowance; what begins may take more than is left of it.
    pub fn spend(&self, bytes: u64) {
        if let Some((all, ticket)) = &self.0 {
            all.accounts().spend(*ticket, bytes);
        }
    }

    /// What is under way by now.
    pub fn report(&self, now_ns: u64, busy: bool) {
        if let Some((all, ticket)) = &self.0 {
            all.accounts().report(*ticket, now_ns, busy);
        }
    }

    /// Clients want the nodes too: pieces are to be small.
    pub fn is_beside_clients(&self) -> bool {
        self.0.as_ref().is_some_and(|(all, ticket)| all.accounts().is_beside_clients(*ticket))
    }

    /// How many shards may be worked on at once, of `limit` for all images.
    pub fn at_once(&self, limit: usize) -> usize {
        self.0.as_ref().map_or(limit, |(all, ticket)| all.accounts().at_once(*ticket, limit))
    }
}

impl Drop for Pacing {
    fn drop(&mut self) {
        if let Some((all, ticket)) = &self.0 {
            all.accounts().leave(*ticket);
        }
    }
}
