//! How much of the hosts the work in the background of a gateway may take, of all its images together: a
//! rate, and beside clients a share of the time and one piece at a time.
//!
//! Heals, levelling that nobody waits for and scrubs are *undertakings*. One that may not begin its next
//! piece waits in a queue, and the first there that has room is next, so that each has its turn. What a
//! client waits for is not asked about here; the time that it takes is charged all the same.
//!
//! Invariants:
//! - beside clients, of whichever image, nothing is begun while something of an undertaking is under way;
//! - nobody passes one that waits for longer and has room;
//! - one that is gone, or no longer wants anything, keeps nobody waiting.

use crate::wire::PAYLOAD_BYTES_MAX;
use std::collections::{BTreeMap, VecDeque};

const SECOND_NS: u64 = 1_000_000_000;
/// Without a client's request for so long nobody has to be yielded to.
const GUESTS_GONE_NS: u64 = SECOND_NS / 4;
/// Most time that is saved up, or owed, beside clients.
const CREDIT_NS: i64 = 20_000_000;
const DEBT_NS: i64 = 500_000_000;

/// Which limits an undertaking goes by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Sort {
    /// Heals, and levelling that nobody waits for.
    Copies,
    Scrubs,
}

const SORTS: [Sort; 2] = [Sort::Copies, Sort::Scrubs];

/// What undertakings of one sort may take together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Limits {
    /// 0: as fast as it goes.
    pub bytes_per_second: u64,
    /// Of the time, while clients ask for something; 100: all of it.
    pub share_percent: u64,
}

const UNLIMITED: Limits = Limits { bytes_per_second: 0, share_percent: 100 };

impl Limits {
    /// The stricter of each.
    fn and(self, other: Limits) -> Limits {
        let rates = [self.bytes_per_second, other.bytes_per_second];
        Limits {
            bytes_per_second: rates.into_iter().filter(|rate| *rate > 0).min().unwrap_or(0),
            share_percent: self.share_percent.min(other.share_percent),
        }
    }
}

/// What the next piece of an undertaking takes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Need {
    /// A question; hardly any bytes.
    Time,
    TimeAndBytes,
}

/// What one sort has left.
struct Account {
    limits: Limits,
    allowance_bytes: i64,
    refilled_ns: u64,
    credit_ns: i64,
}

impl Account {
    fn refill(&mut self, now_ns: u64) {
        let rate = self.limits.bytes_per_second;
        let passed_ns = now_ns.saturating_sub(self.refilled_ns).min(SECOND_NS);
        let earned = u128::from(rate) * u128::from(passed_ns) / u128::from(SECOND_NS);
        if earned > 0 {
            // Enough for a tenth of a second, and for one frame in any case.
            let most = (rate / 10).max(PAYLOAD_BYTES_MAX as u64);
            self.allowance_bytes = (self.allowance_bytes + earned as i64).min(most as i64);
            self.refilled_ns = now_ns;
        }
    }

    fn has_bytes(&self) -> bool {
        self.limits.bytes_per_second == 0 || self.allowance_bytes > 0
    }
}

struct Undertaking {
    image: u32,
    sort: Sort,
    limits: Limits,
    busy: bool,
}

/// What all undertakings of a gateway share.
pub(super) struct Accounts {
    now_ns: u64,
    /// When a client last asked for something.
    asked_ns: Option<u64>,
    undertakings: BTreeMap<u64, Undertaking>,
    tickets: u64,
    waiting: VecDeque<(u64, Need)>,
    /// Whose turn it is, taken out of the queue.
    offered: Option<u64>,
    copies: Account,
    scrubs: Account,
    /// Of time, for all sorts together: they get no more than the one that may have most.
    credit_ns: i64,
}

impl Default for Accounts {
    fn default() -> Accounts {
        let account =
            || Account { limits: UNLIMITED, allowance_bytes: 0, refilled_ns: 0, credit_ns: 0 };
        Accounts {
            now_ns: 0,
            asked_ns: None,
            undertakings: BTreeMap::new(),
            tickets: 0,
            waiting: VecDeque::new(),
            offered: None,
            copies: account(),
            scrubs: account(),
            credit_ns: 0,
        }
    }
}

fn credit_after(credit_ns: i64, passed_ns: u64, share_percent: u64, busy: bool) -> i64 {
    let earned_ns = (passed_ns * share_percent.min(100) / 100) as i64;
    let used_ns = if busy { passed_ns as i64 } else { 0 };
    (credit_ns + earned_ns - used_ns).clamp(-DEBT_NS, CREDIT_NS)
}

impl Accounts {
    /// A client of any image asks for something.
    pub fn asked(&mut self, now_ns: u64) {
        self.asked_ns = self.asked_ns.max(Some(now_ns));
    }

    /// Begins an undertaking; gives its ticket. Where those of a sort have different limits, the strictest
    /// hold for all of them.
    pub fn join(&mut self, image: u32, sort: Sort, limits: Limits) -> u64 {
        self.tickets += 1;
        self.undertakings.insert(self.tickets, Undertaking { image, sort, limits, busy: false });
        self.set_limits();
        self.tickets
    }

    pub fn leave(&mut self, ticket: u64) {
        self.undertakings.remove(&ticket);
        self.waiting.retain(|(waiting, _)| *waiting != ticket);
        self.set_limits();
    }

    fn set_limits(&mut self) {
        for sort in SORTS {
            let of_sort = self.undertakings.values().filter(|other| other.sort == sort);
            let limits = of_sort.map(|other| other.limits).reduce(Limits::and);
            if let Some(limits) = limits {
                self.account(sort).limits = limits;
            }
        }
    }

    fn account(&mut self, sort: Sort) -> &mut Account {
        match sort {
            Sort::Copies => &mut self.copies,
            Sort::Scrubs => &mut self.scrubs,
        }
    }

    fn account_of(&self, sort: Sort) -> &Account {
        match sort {
            Sort::Copies => &self.copies,
            Sort::Scrubs => &self.scrubs,
        }
    }

    /// Time has passed, with what was under way until now.
    pub fn reckon(&mut self, now_ns: u64) {
        let passed_ns = now_ns.saturating_sub(self.now_ns).min(SECOND_NS);
        self.now_ns = self.now_ns.max(now_ns);
        let (mut any_busy, mut most_percent) = (false, 0);
        for sort in SORTS {
            let mut of_sort = self.undertakings.values().filter(|other| other.sort == sort);
            let Some(first) = of_sort.next() else { continue };
            let busy = first.busy || of_sort.any(|other| other.busy);
            let account = self.account(sort);
            let share_percent = account.limits.share_percent;
            account.refill(now_ns);
            account.credit_ns = credit_after(account.credit_ns, passed_ns, share_percent, busy);
            any_busy |= busy;
            most_percent = share_percent.max(most_percent);
        }
        self.credit_ns = credit_after(self.credit_ns, passed_ns, most_percent, any_busy);
    }

    /// What an undertaking has under way by now.
    pub fn report(&mut self, ticket: u64, now_ns: u64, busy: bool) {
        self.reckon(now_ns);
        if let Some(undertaking) = self.undertakings.get_mut(&ticket) {
            undertaking.busy = busy;
        }
    }

    /// Takes from the allowance; what begins may take more than is left of it.
    pub fn spend(&mut self, ticket: u64, bytes: u64) {
        if let Some(sort) = self.undertakings.get(&ticket).map(|of| of.sort) {
            let account = self.account(sort);
            if account.limits.bytes_per_second > 0 {
                account.allowance_bytes -= bytes as i64;
            }
        }
    }

    fn are_clients_here(&self) -> bool {
        let silent_ns = self.asked_ns.map(|asked_ns| self.now_ns.saturating_sub(asked_ns));
        silent_ns.is_some_and(|silent_ns| silent_ns < GUESTS_GONE_NS)
    }

    fn is_limited(&self, sort: Sort) -> bool {
        self.account_of(sort).limits.share_percent < 100
    }

    /// Clients want the nodes too: small pieces, so that no request of theirs waits long behind one.
    pub fn is_beside_clients(&self, ticket: u64) -> bool {
        let limited = self.undertakings.get(&ticket).is_some_and(|of| self.is_limited(of.sort));
        limited && self.are_clients_here()
    }

    fn has_room(&self, ticket: u64, need: Need) -> bool {
        let Some(undertaking) = self.undertakings.get(&ticket) else { return false };
        let account = self.account_of(undertaking.sort);
        if need == Need::TimeAndBytes && !account.has_bytes() {
            return false;
        }
        if !self.is_beside_clients(ticket) {
            return true;
        }
        let is_busy = |one: &Undertaking| one.busy && self.is_limited(one.sort);
        account.credit_ns > 0 && self.credit_ns > 0 && !self.undertakings.values().any(is_busy)
    }

    /// Whether an undertaking may begin its next piece, which it then does. If not, it waits for its turn.
    pub fn begins(&mut self, ticket: u64, need: Need) -> bool {
        let mut ahead = self.waiting.iter().take_while(|(other, _)| *other != ticket);
        let passes = self.offered != Some(ticket)
            && (self.offered.is_some() || ahead.any(|(other, need)| self.has_room(*other, *need)));
        if passes || !self.has_room(ticket, need) {
            if self.waiting.iter().all(|(other, _)| *other != ticket) {
                self.waiting.push_back((ticket, need));
            }
            return false;
        }
        self.offered = None;
        self.waiting.retain(|(other, _)| *other != ticket);
        if let Some(undertaking) = self.undertakings.get_mut(&ticket) {
            undertaking.busy = true;
        }
        true
    }

    /// How many shards an undertaking may work on at once, of `limit` for all.
    pub fn at_once(&self, ticket: u64, limit: usize) -> usize {
        if self.is_beside_clients(ticket) {
            return 1;
        }
        let is_active = |(id, other): &(&u64, &Undertaking)| {
            let waits = self.waiting.iter().any(|(waiting, _)| waiting == *id);
            **id == ticket || other.sort == Sort::Copies && (other.busy || waits)
        };
        (limit / self.undertakings.iter().filter(is_active).count().max(1)).max(1)
    }

    /// How many wait for their turn.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Whose turn it is, if there is room: its image. It has to be asked to go on, then `offer_over`.
    pub fn offer(&mut self, now_ns: u64) -> Option<u32> {
        self.reckon(now_ns);
        let next = self.waiting.iter().position(|(ticket, need)| self.has_room(*ticket, *need))?;
        let (ticket, _) = self.waiting.remove(next)?;
        self.offered = Some(ticket);
        self.undertakings.get(&ticket).map(|undertaking| undertaking.image)
    }

    /// Whoever was offered something has taken it, or wants nothing any more.
    pub fn offer_over(&mut self) {
        self.offered = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;
    const HEAL: Limits = Limits { bytes_per_second: 0, share_percent: 25 };
    const SCRUB: Limits = Limits { bytes_per_second: 0, share_percent: 10 };

    /// Undertakings that always want more, each with pieces of its own length.
    struct Work {
        accounts: Accounts,
        now_ns: u64,
        pieces_ms: BTreeMap<u64, u64>,
        /// When what is under way ends.
        ends_ms: BTreeMap<u64, u64>,
        busy_ms: BTreeMap<u64, u64>,
        any_busy_ms: u64,
        most_at_once: usize,
    }

    impl Work {
        fn new() -> Work {
            Work {
                accounts: Accounts::default(),
                now_ns: SECOND_NS,
                pieces_ms: BTreeMap::new(),
                ends_ms: BTreeMap::new(),
                busy_ms: BTreeMap::new(),
                any_busy_ms: 0,
                most_at_once: 0,
            }
        }

        /// An undertaking of an image of its own.
        fn begin(&mut self, sort: Sort, limits: Limits, piece_ms: u64) -> u64 {
            let image = self.pieces_ms.len() as u32;
            let ticket = self.accounts.join(image, sort, limits);
            self.pieces_ms.insert(ticket, piece_ms);
            self.go_on(ticket);
            ticket
        }

        fn go_on(&mut self, ticket: u64) {
            if !self.ends_ms.contains_key(&ticket) && self.accounts.begins(ticket, Need::Time) {
                self.ends_ms.insert(ticket, self.now_ns / MS + self.pieces_ms[&ticket]);
            }
        }

        fn run(&mut self, ms: u64, clients: bool) {
            let tickets: Vec<u64> = self.pieces_ms.keys().copied().collect();
            for _ in 0..ms {
                self.any_busy_ms += u64::from(!self.ends_ms.is_empty());
                self.most_at_once = self.most_at_once.max(self.ends_ms.len());
                for ticket in self.ends_ms.keys() {
                    *self.busy_ms.entry(*ticket).or_default() += 1;
                }
                self.now_ns += MS;
                if clients {
                    self.accounts.asked(self.now_ns);
                }
                let over = |ends_ms: u64| ends_ms <= self.now_ns / MS;
                let done = tickets
                    .iter()
                    .copied()
                    .filter(|ticket| self.ends_ms.get(ticket).copied().is_some_and(over));
                for ticket in done.collect::<Vec<_>>() {
                    self.ends_ms.remove(&ticket);
                    self.accounts.report(ticket, self.now_ns, false);
                    // As in an image: who gets an answer asks for more at once.
                    self.go_on(ticket);
                }
                for _ in 0..self.accounts.waiting() {
                    let Some(image) = self.accounts.offer(self.now_ns) else { break };
                    self.go_on(tickets[image as usize]);
                    self.accounts.offer_over();
                }
            }
        }
    }

    #[test]
    fn images_share_one_rate() {
        let mut accounts = Accounts::default();
        let limits = Limits { bytes_per_second: 10 << 20, share_percent: 25 };
        let tickets: Vec<u64> =
            (0..4).map(|image| accounts.join(image, Sort::Copies, limits)).collect();
        let (mut now_ns, mut read) = (SECOND_NS, [0u64; 4]);
        for _ in 0..5_000 {
            now_ns += MS;
            accounts.reckon(now_ns);
            // The first is always the first to ask.
            for (image, ticket) in tickets.iter().enumerate() {
                while accounts.begins(*ticket, Need::TimeAndBytes) {
                    accounts.spend(*ticket, 1 << 20);
                    read[image] += 1 << 20;
                }
            }
            while let Some(image) = accounts.offer(now_ns) {
                let (image, ticket) = (image as usize, tickets[image as usize]);
                assert!(accounts.begins(ticket, Need::TimeAndBytes));
                accounts.spend(ticket, 1 << 20);
                read[image] += 1 << 20;
            }
        }
        let all: u64 = read.iter().sum();
        assert!((45 << 20..=56 << 20).contains(&all), "{all}");
        assert!(read.iter().all(|one| (10 << 20..=16 << 20).contains(one)), "{read:?}");
    }

    #[test]
    fn beside_clients_images_share_one_share_of_the_time_evenly() {
        let mut work = Work::new();
        let heals: Vec<u64> = (0..5).map(|_| work.begin(Sort::Copies, HEAL, 4)).collect();
        work.accounts.asked(work.now_ns);
        work.run(1_000, true);
        // Begun before clients came, all at once.
        work.most_at_once = 0;
        work.any_busy_ms = 0;
        work.busy_ms.clear();
        work.run(20_000, true);
        assert_eq!(work.most_at_once, 1, "two at once beside clients");
        assert!((4_500..=5_500).contains(&work.any_busy_ms), "{}", work.any_busy_ms);
        for heal in heals {
            assert!((800..=1_200).contains(&work.busy_ms[&heal]), "{:?}", work.busy_ms);
        }
    }

    #[test]
    fn heals_and_scrubs_together_take_what_the_larger_share_allows() {
        let mut work = Work::new();
        work.accounts.asked(work.now_ns);
        let heal = work.begin(Sort::Copies, HEAL, 3);
        let scrub = work.begin(Sort::Scrubs, SCRUB, 5);
        work.run(20_000, true);
        assert_eq!(work.most_at_once, 1, "two at once beside clients");
        assert!((4_500..=5_500).contains(&work.any_busy_ms), "{}", work.any_busy_ms);
        assert!((1_500..=2_200).contains(&work.busy_ms[&scrub]), "{:?}", work.busy_ms);
        assert!((2_500..=3_700).contains(&work.busy_ms[&heal]), "{:?}", work.busy_ms);
    }

    #[test]
    fn without_clients_all_go_on_at_once() {
        let mut work = Work::new();
        for _ in 0..3 {
            work.begin(Sort::Copies, HEAL, 4);
        }
        work.run(1_000, false);
        assert_eq!((work.any_busy_ms, work.most_at_once), (1_000, 3));
    }

    #[test]
    fn who_is_gone_or_wants_nothing_keeps_nobody_waiting() {
        let mut accounts = Accounts::default();
        accounts.asked(SECOND_NS);
        accounts.reckon(SECOND_NS);
        let [gone, idle, eager] = [1, 2, 3].map(|image| accounts.join(image, Sort::Copies, HEAL));
        for ticket in [gone, idle, eager] {
            // Somebody else has the time.
            accounts.credit_ns = 0;
            assert!(!accounts.begins(ticket, Need::Time));
        }
        accounts.leave(gone);
        assert_eq!(accounts.offer(SECOND_NS + 100 * MS), Some(2));
        assert!(!accounts.begins(eager, Need::Time), "it is not its turn");
        accounts.offer_over();
        assert_eq!(accounts.offer(SECOND_NS + 100 * MS), Some(3));
        assert!(accounts.begins(eager, Need::Time));
    }

    #[test]
    fn who_has_no_bytes_left_holds_up_no_other_sort() {
        let mut accounts = Accounts::default();
        accounts.reckon(SECOND_NS);
        let slow = Limits { bytes_per_second: 1 << 20, share_percent: 25 };
        let heal = accounts.join(1, Sort::Copies, slow);
        let scrub = accounts.join(2, Sort::Scrubs, SCRUB);
        accounts.spend(heal, 1 << 30);
        assert!(!accounts.begins(heal, Need::TimeAndBytes));
        assert!(accounts.begins(scrub, Need::TimeAndBytes));
    }

    #[test]
    fn the_strictest_limits_of_a_sort_hold_for_all_of_it() {
        let mut accounts = Accounts::default();
        let mild = accounts.join(1, Sort::Copies, UNLIMITED);
        let strict = Limits { bytes_per_second: 1 << 20, share_percent: 5 };
        let other = accounts.join(2, Sort::Copies, strict);
        accounts.asked(SECOND_NS);
        accounts.reckon(SECOND_NS);
        assert_eq!(accounts.copies.limits, strict);
        assert!(accounts.is_beside_clients(mild));
        accounts.leave(other);
        assert!(!accounts.is_beside_clients(mild));
    }

    #[test]
    fn shards_at_once_are_dealt_out_and_each_image_has_one() {
        let mut accounts = Accounts::default();
        let tickets: Vec<u64> =
            (0..6).map(|image| accounts.join(image, Sort::Copies, HEAL)).collect();
        assert_eq!(accounts.at_once(tickets[0], 4), 4, "nobody else wants anything");
        assert!(accounts.begins(tickets[1], Need::Time));
        assert_eq!(accounts.at_once(tickets[0], 4), 2);
        tickets.iter().for_each(|ticket| assert!(accounts.begins(*ticket, Need::Time)));
        assert_eq!(accounts.at_once(tickets[0], 4), 1);
        accounts.asked(SECOND_NS);
        accounts.reckon(SECOND_NS);
        assert_eq!(accounts.at_once(tickets[0], 100), 1, "beside clients");
    }
}
