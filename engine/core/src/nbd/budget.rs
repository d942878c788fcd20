//! How much clients may have under way: each of them, and all of them together.
//!
//! A connection is charged for the memory that is kept for it: payload of a write from its header on,
//! the answer of a read from the request until it was sent. Of what is allowed in all, a connection may
//! have as much as is left free for the others. So one greedy client takes half at most, two of them a
//! third each, and there is always room for one more; past its share a connection is not read.
//!
//! Where nothing is left, because others do not take their answers, a connection that has nothing under
//! way may still have one request of `GUARANTEED_BYTES` at a time. So the bound is kept but for that, and
//! for the last request that was let in, which may go past it.

use crate::io::Outgoing;

/// What a connection may have under way in any case: what guests do most is smaller.
pub const GUARANTEED_BYTES: u64 = 256 << 10;

/// What the gateway allows clients, as its configuration says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientLimits {
    /// Connections at once; more are closed as they come.
    pub clients: usize,
    /// Bytes that one connection may have under way.
    pub client_bytes: u64,
    /// Bytes that all connections may have under way.
    pub bytes: u64,
    /// A client has so long to open an export; what the gateway itself takes does not count.
    pub handshake_ns: u64,
    /// A client that asks for nothing for so long is sent away; 0: never.
    pub idle_ns: u64,
}

impl Default for ClientLimits {
    /// 64 MiB are two of the largest requests, or QEMU's sixteen at once of 4 MiB. Eight clients can
    /// have as much before they hold each other back. Guests idle for days, so nobody is sent away for it.
    fn default() -> Self {
        ClientLimits {
            clients: 4096,
            client_bytes: 64 << 20,
            bytes: 512 << 20,
            handshake_ns: 30_000_000_000,
            idle_ns: 0,
        }
    }
}

/// What all connections have under way.
#[derive(Debug, Default)]
pub struct Budget {
    pub limits: ClientLimits,
    used: u64,
    /// Something was given back since somebody was last held back.
    freed: bool,
}

/// What one connection has under way.
#[derive(Debug, Default)]
pub struct Charge {
    /// Of requests that were read and are not answered.
    pub in_flight: u64,
    /// Of a write whose payload is arriving.
    pub receiving: u64,
    /// What the budget knows of it.
    told: u64,
}

impl Charge {
    fn bytes(&self, output: &Outgoing) -> u64 {
        self.in_flight + self.receiving + output.len() as u64
    }
}

impl Charge {
    /// Whether a connection has nothing under way.
    pub fn is_nothing(&self, output: &Outgoing) -> bool {
        self.bytes(output) == 0
    }
}

impl Budget {
    /// Whether a connection may begin another request, whatever it is.
    pub fn allows(&self, charge: &Charge, output: &Outgoing) -> bool {
        let bytes = charge.bytes(output);
        let others = self.used - charge.told;
        let free = self.limits.bytes.saturating_sub(others + bytes);
        bytes < self.limits.client_bytes && bytes < free
    }

    /// Brings up to date what a connection has under way.
    pub fn account(&mut self, charge: &mut Charge, output: &Outgoing) {
        let bytes = charge.bytes(output);
        self.freed |= bytes < charge.told;
        self.used = self.used - charge.told + bytes;
        charge.told = bytes;
    }

    /// A connection is gone, with all that it had under way.
    pub fn release(&mut self, charge: &Charge) {
        self.freed |= charge.told > 0;
        self.used -= charge.told;
    }

    /// Bytes under way.
    pub fn used(&self) -> u64 {
        self.used
    }

    /// Whether something was given back since this was last asked.
    pub fn take_freed(&mut self) -> bool {
        std::mem::take(&mut self.freed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget(client_bytes: u64, bytes: u64) -> Budget {
        let limits = ClientLimits { client_bytes, bytes, ..ClientLimits::default() };
        Budget { limits, ..Budget::default() }
    }

    /// Takes requests of `step` bytes for each connection in turn until none is let in any more.
    fn fill(budget: &mut Budget, charges: &mut [Charge], step: u64) {
        let nothing = Outgoing::new();
        loop {
            let mut taken = false;
            for charge in charges.iter_mut() {
                if budget.allows(charge, &nothing) {
                    charge.in_flight += step;
                    budget.account(charge, &nothing);
                    taken = true;
                }
            }
            if !taken {
                return;
            }
        }
    }

    #[test]
    fn budget_leaves_as_much_free_as_the_greediest_has() {
        for greedy in 1..6 {
            let mut budget = budget(u64::MAX, 1000);
            let mut charges: Vec<Charge> = (0..greedy).map(|_| Charge::default()).collect();
            fill(&mut budget, &mut charges, 1);
            let share = 1000 / (greedy + 1);
            assert!(charges.iter().all(|charge| charge.in_flight.abs_diff(share) <= 1));
            assert!(budget.allows(&Charge::default(), &Outgoing::new()), "one more finds room");
        }
    }

    #[test]
    fn budget_of_one_connection_is_bounded_by_its_own_limit() {
        let mut budget = budget(100, 1000);
        let mut charges = [Charge::default()];
        fill(&mut budget, &mut charges, 60);
        assert_eq!(charges[0].in_flight, 120, "the last one may go past it");
    }

    #[test]
    fn budget_in_all_is_passed_by_one_request_at_most() {
        let mut budget = budget(u64::MAX, 1000);
        let mut charges: Vec<Charge> = (0..64).map(|_| Charge::default()).collect();
        fill(&mut budget, &mut charges, 300);
        assert!(budget.used() <= 1300, "{}", budget.used());
        let waiting = charges.iter().position(|charge| charge.in_flight == 0).expect("some wait");
        assert!(!budget.allows(&charges[waiting], &Outgoing::new()));
        for charge in &mut charges {
            charge.in_flight = 0;
            budget.account(charge, &Outgoing::new());
        }
        assert!(budget.take_freed() && !budget.take_freed());
        assert_eq!(budget.used(), 0);
        assert!(budget.allows(&charges[waiting], &Outgoing::new()));
    }

    #[test]
    fn budget_takes_back_what_a_connection_had() {
        let mut budget = budget(100, 1000);
        let mut charge = Charge { in_flight: 70, receiving: 7, told: 0 };
        budget.account(&mut charge, &Outgoing::new());
        assert_eq!(budget.used(), 77);
        budget.release(&charge);
        assert_eq!(budget.used(), 0);
        assert!(budget.take_freed());
    }
}
