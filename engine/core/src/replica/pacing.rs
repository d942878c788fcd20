//! How much of the hosts work in the background may take: a rate, and beside clients a share of the time.

use crate::wire::PAYLOAD_BYTES_MAX;

const SECOND_NS: u64 = 1_000_000_000;
/// Without a client's request for so long nobody has to be yielded to.
const GUESTS_GONE_NS: u64 = SECOND_NS / 4;
/// Most time that is saved up, or owed, beside clients.
const CREDIT_NS: i64 = 20_000_000;
const DEBT_NS: i64 = 500_000_000;

/// The allowance of one undertaking.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pacing {
    /// 0: as fast as it goes.
    bytes_per_second: u64,
    share_percent: u64,
    allowance_bytes: i64,
    refilled_ns: u64,
    credit_ns: i64,
    credited_ns: u64,
    beside_clients: bool,
}

impl Default for Pacing {
    /// No limits.
    fn default() -> Pacing {
        Pacing::new(0, 100, 0)
    }
}

impl Pacing {
    pub fn new(bytes_per_second: u64, share_percent: u64, now_ns: u64) -> Pacing {
        Pacing {
            bytes_per_second,
            share_percent,
            allowance_bytes: 0,
            refilled_ns: now_ns,
            credit_ns: 0,
            credited_ns: now_ns,
            beside_clients: false,
        }
    }

    /// Time has passed. `asked_ns`: when a client last asked for something; `busy`: something is under way.
    pub fn refill(&mut self, now_ns: u64, asked_ns: u64, busy: bool) {
        let passed_ns = now_ns.saturating_sub(self.credited_ns).min(SECOND_NS) as i64;
        let earned_ns = passed_ns * self.share_percent.min(100) as i64 / 100;
        let used_ns = if busy { passed_ns } else { 0 };
        self.credited_ns = now_ns;
        self.credit_ns = (self.credit_ns + earned_ns - used_ns).clamp(-DEBT_NS, CREDIT_NS);
        let guests = now_ns.saturating_sub(asked_ns) < GUESTS_GONE_NS;
        self.beside_clients = guests && self.share_percent < 100;
        let passed_ns = now_ns.saturating_sub(self.refilled_ns).min(SECOND_NS);
        let earned = u128::from(self.bytes_per_second) * u128::from(passed_ns);
        let earned = (earned / u128::from(SECOND_NS)) as i64;
        if earned > 0 {
            // Enough for a tenth of a second, and for one frame in any case.
            let most = (self.bytes_per_second / 10).max(PAYLOAD_BYTES_MAX as u64);
            self.allowance_bytes = (self.allowance_bytes + earned).min(most as i64);
            self.refilled_ns = now_ns;
        }
    }

    /// Takes from the allowance; what begins may take more than is left of it.
    pub fn spend(&mut self, bytes: u64) {
        if self.bytes_per_second > 0 {
            self.allowance_bytes -= bytes as i64;
        }
    }

    /// Whether something may be begun now.
    pub fn allows(&self) -> bool {
        let rate = self.bytes_per_second == 0 || self.allowance_bytes > 0;
        rate && !self.is_held()
    }

    /// Whether its share of the time beside clients is used up.
    pub fn is_held(&self) -> bool {
        self.beside_clients && self.credit_ns <= 0
    }

    /// Clients want the nodes too: small pieces, so that no request of theirs waits long behind one.
    pub fn is_beside_clients(&self) -> bool {
        self.beside_clients
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn the_rate_bounds_what_is_read_without_clients() {
        let mut pacing = Pacing::new(10 << 20, 10, SECOND_NS);
        let (mut now, mut read) = (SECOND_NS, 0u64);
        for _ in 0..5_000 {
            now += MS;
            pacing.refill(now, 0, false);
            while pacing.allows() {
                pacing.spend(1 << 20);
                read += 1 << 20;
            }
        }
        assert!((45 << 20..=54 << 20).contains(&read), "{read}");
    }

    #[test]
    fn beside_clients_a_share_of_the_time_is_all_there_is() {
        let mut pacing = Pacing::new(0, 10, SECOND_NS);
        let (mut now, mut busy_ms) = (SECOND_NS, 0);
        for _ in 0..10_000 {
            let busy = pacing.allows();
            busy_ms += u64::from(busy);
            now += MS;
            pacing.refill(now, now, busy);
        }
        assert!((800..1200).contains(&busy_ms), "{busy_ms}");
        assert!(pacing.is_beside_clients());
        pacing.refill(now + SECOND_NS, now, false);
        assert!(pacing.allows() && !pacing.is_beside_clients());
    }
}
