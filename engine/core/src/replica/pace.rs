//! How much of the hosts a copier may take: bytes in a second, and beside clients a share of the time.

use super::copier::Copier;
use super::heal::HealLimits;
use crate::wire::PAYLOAD_BYTES_MAX;

const SECOND_NS: u64 = 1_000_000_000;
/// Without a client's request for so long a copier need not yield.
const GUESTS_GONE_NS: u64 = SECOND_NS / 4;
/// Most time that a copier saves up, or owes, beside clients.
const CREDIT_NS: i64 = 20_000_000;
const DEBT_NS: i64 = 500_000_000;

/// What one copier has used and may still use.
#[derive(Debug)]
pub(super) struct Pace {
    pub limits: HealLimits,
    refilled_ns: u64,
    /// Time that it may still use beside clients, and when that was last reckoned.
    credit_ns: i64,
    credited_ns: u64,
}

impl Pace {
    pub fn new(limits: HealLimits, now_ns: u64) -> Pace {
        Pace { limits, refilled_ns: now_ns, credit_ns: 0, credited_ns: now_ns }
    }

    /// Time has passed: says to `copier` what it may do. `busy`: it had something under way meanwhile;
    /// `asked_ns`: when a client last asked for something.
    pub fn reckon(&mut self, copier: &mut Copier, busy: bool, now_ns: u64, asked_ns: u64) {
        self.reckon_share(copier, busy, now_ns, asked_ns);
        self.refill(copier, now_ns);
    }

    /// Beside clients a copier works a part of the time only, and in small pieces: whatever it takes of
    /// the hosts while it does, they have the rest of the time to themselves.
    fn reckon_share(&mut self, copier: &mut Copier, busy: bool, now_ns: u64, asked_ns: u64) {
        let guests = now_ns.saturating_sub(asked_ns) < GUESTS_GONE_NS;
        let share = self.limits.share_percent;
        let passed_ns = now_ns.saturating_sub(self.credited_ns).min(SECOND_NS) as i64;
        let used_ns = if busy { passed_ns } else { 0 };
        let earned_ns = passed_ns * share.min(100) as i64 / 100;
        self.credited_ns = now_ns;
        self.credit_ns = (self.credit_ns + earned_ns - used_ns).clamp(-DEBT_NS, CREDIT_NS);
        copier.narrow = guests && share < 100;
        copier.held = copier.narrow && self.credit_ns <= 0;
    }

    fn refill(&mut self, copier: &mut Copier, now_ns: u64) {
        let rate = self.limits.bytes_per_second;
        // Enough for a tenth of a second, and for one frame in any case.
        let most = (rate / 10).max(PAYLOAD_BYTES_MAX as u64);
        let passed_ns = now_ns.saturating_sub(self.refilled_ns).min(SECOND_NS);
        let earned = u128::from(rate) * u128::from(passed_ns) / u128::from(SECOND_NS);
        let allowance = &mut copier.allowance_bytes;
        match rate {
            0 => *allowance = i64::MAX / 2,
            _ if earned == 0 && *allowance != 0 => return,
            _ => *allowance = (*allowance + earned as i64).min(most as i64),
        }
        self.refilled_ns = now_ns;
    }
}
