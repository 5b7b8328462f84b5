//! Equal service for all who want more than there is: the virtual token counter of "Fairness in Serving Large Language Models"
//! (Sheng et al., OSDI 2024, arXiv 2401.00588), with weights.
//!
//! Each tenant has a counter of the service it got: prompt tokens that were computed for it, and twice the tokens that were generated.
//! Whoever has the least goes next. A tenant that comes back after a time without waiting requests starts no lower than the lowest
//! that wait (Algorithm 2, lines 6–13): time away earns no credit. Between two tenants that both always wait, the service differs by
//! at most twice the larger of one prompt and one full batch (Theorem 4.4), however many requests either sends.
//!
//! Priorities go before fairness, so each has counters of its own: a batch that waits for hours behind everybody else has got little, and
//! whoever came newly among the others would start as low as it, ahead of all who worked beside it. What a tenant gets while it is urgent
//! counts at its less urgent counters, too; not the other way round.
//!
//! Two things differ from the paper, which knows neither chunked prompts nor preemption. A prompt is charged chunk by chunk as it is
//! computed, and what the prefix cache holds is free. Tokens that are computed again after a preemption are not charged again.

use crate::request::Tenant;
use std::collections::BTreeMap;

/// What a computed prompt token costs.
pub const PROMPT_TOKEN: u64 = 1;
/// What a generated token costs.
pub const GENERATED_TOKEN: u64 = 2;
/// Counters are in parts of a token, so that a share by weight is a whole number for weights up to ten, and nearly one for others.
const SCALE: u64 = 2520;
/// Contenders remembered. Beyond, those that want nothing are forgotten: what they had more than others is forgiven.
const REMEMBERED: usize = 4096;

/// A tenant among those of one priority.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contender {
    /// Lower runs first.
    pub priority: i32,
    /// Whose requests.
    pub tenant: Tenant,
}

impl Contender {
    fn key(self) -> (u64, i32) {
        (self.tenant.id, self.priority)
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Account {
    /// Service by weight, in parts of a token.
    served: u64,
    weight: u32,
    /// Sequences that could be scheduled.
    waiting: usize,
    /// Places among the running.
    slots: usize,
    /// The number of its latest departure from the queue; 0 before the first.
    departed: u64,
}

/// The counters of all contenders.
#[derive(Clone, Debug, Default)]
pub struct TokenCounters {
    accounts: BTreeMap<(u64, i32), Account>,
    departures: u64,
}

impl TokenCounters {
    /// A sequence waits.
    pub fn wait(&mut self, contender: Contender) {
        if self.accounts.len() >= REMEMBERED {
            let latest = self.departures;
            self.accounts.retain(|_, account| account.waiting + account.slots > 0 || (latest > 0 && account.departed == latest));
        }
        let start = self.start(contender.priority);
        let account = self.accounts.entry(contender.key()).or_default();
        account.weight = contender.tenant.weight.max(1);
        if account.waiting == 0 {
            account.served = account.served.max(start);
        }
        account.waiting += 1;
    }

    /// Where a newcomer starts: with the lowest that wait, or, with nobody waiting, where the one is who left the queue last.
    fn start(&self, priority: i32) -> u64 {
        let here = || self.accounts.iter().filter(|((_, other), _)| *other == priority).map(|(_, account)| account);
        let lowest = here().filter(|account| account.waiting > 0).map(|account| account.served).min();
        let last = || here().filter(|account| account.departed > 0).max_by_key(|account| account.departed);
        lowest.or_else(|| last().map(|account| account.served)).unwrap_or(0)
    }

    /// A sequence that was set back waits: nobody came, and nothing starts anew.
    pub fn wait_again(&mut self, contender: Contender) {
        if let Some(account) = self.accounts.get_mut(&contender.key()) {
            account.waiting += 1;
        }
    }

    /// A sequence does not wait any more; `runs` says whether because it runs now.
    pub fn stop_waiting(&mut self, contender: Contender, runs: bool) {
        if let Some(account) = self.accounts.get_mut(&contender.key()) {
            account.waiting = account.waiting.saturating_sub(1);
            if runs {
                self.departures += 1;
                account.departed = self.departures;
            }
        }
    }

    /// A sequence takes places among the running.
    pub fn take_slots(&mut self, contender: Contender, slots: usize) {
        if let Some(account) = self.accounts.get_mut(&contender.key()) {
            account.slots += slots;
        }
    }

    /// And gives them back.
    pub fn free_slots(&mut self, contender: Contender, slots: usize) {
        if let Some(account) = self.accounts.get_mut(&contender.key()) {
            account.slots = account.slots.saturating_sub(slots);
        }
    }

    /// Counts computed prompt tokens and generated tokens.
    pub fn charge(&mut self, contender: Contender, prompt: usize, generated: usize) {
        let cost = (prompt as u64 * PROMPT_TOKEN + generated as u64 * GENERATED_TOKEN) * SCALE;
        for account in self.accounts.range_mut(contender.key()..=(contender.tenant.id, i32::MAX)).map(|(_, account)| account) {
            account.served = account.served.saturating_add(cost / u64::from(account.weight.max(1)));
        }
    }

    /// The counter: lower goes first.
    pub fn served(&self, contender: Contender) -> u64 {
        self.accounts.get(&contender.key()).map_or(0, |account| account.served)
    }

    /// Places among the running, by weight, as a fraction (numerator, denominator).
    fn share(&self, contender: Contender) -> (usize, usize) {
        self.accounts.get(&contender.key()).map_or((0, 1), |account| (account.slots, account.weight.max(1) as usize))
    }

    /// Places among the running by weight, in parts of a place.
    pub fn held(&self, contender: Contender) -> u64 {
        let (slots, weight) = self.share(contender);
        slots as u64 * SCALE / weight as u64
    }

    /// Whether `from` should give up `freed` places so that `to`, which waits, gets `taken`: it had at least as much service, and even
    /// afterwards it does not hold less than `to`. So the places of two tenants get closer with each such exchange, and never is one
    /// undone by the next.
    pub fn should_yield(&self, from: Contender, freed: usize, to: Contender, taken: usize) -> bool {
        let ((held_from, weight_from), (held_to, _)) = (self.share(from), self.share(to));
        let weight_to = to.tenant.weight.max(1) as usize;
        from.tenant.id != to.tenant.id
            && self.served(from) >= self.served(to)
            && held_from.saturating_sub(freed) * weight_to >= (held_to + taken) * weight_from
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(priority: i32, id: u64) -> Contender {
        Contender { priority, tenant: Tenant { id, weight: 1 } }
    }

    fn tenant(id: u64) -> Contender {
        at(0, id)
    }

    fn heavy(id: u64, weight: u32) -> Contender {
        Contender { priority: 0, tenant: Tenant { id, weight } }
    }

    #[test]
    fn time_away_earns_nothing() {
        let mut counters = TokenCounters::default();
        let (busy, idle) = (tenant(1), tenant(2));
        counters.wait(idle);
        counters.stop_waiting(idle, true);
        counters.charge(idle, 10, 0);
        counters.wait(busy);
        counters.wait(busy);
        counters.stop_waiting(busy, true);
        counters.charge(busy, 1000, 1000);
        // Others wait: it starts where the lowest of them is.
        counters.wait(idle);
        assert_eq!(counters.served(idle), counters.served(busy));
        // Who is ahead already is not set back.
        counters.charge(idle, 50, 0);
        counters.stop_waiting(idle, true);
        counters.wait(idle);
        assert_eq!(counters.served(idle), counters.served(busy) + 50 * SCALE);
        // Nobody waits: it starts where the last one out of the queue is.
        counters.stop_waiting(busy, true);
        counters.stop_waiting(idle, false);
        counters.charge(busy, 0, 500);
        counters.wait(tenant(3));
        assert_eq!(counters.served(tenant(3)), counters.served(busy));
    }

    #[test]
    fn who_waits_at_another_priority_gives_nobody_a_lead() {
        let mut counters = TokenCounters::default();
        let (busy, newcomer) = (tenant(1), tenant(2));
        // A batch waits for as long as the others keep the engine busy, and then runs while nobody else does.
        counters.wait(at(9, 3));
        counters.wait(busy);
        counters.stop_waiting(busy, true);
        counters.charge(busy, 1000, 1000);
        counters.wait(busy);
        counters.wait(newcomer);
        assert_eq!(counters.served(newcomer), counters.served(busy));
        counters.stop_waiting(newcomer, false);
        counters.stop_waiting(busy, true);
        counters.charge(busy, 1000, 0);
        counters.stop_waiting(at(9, 3), true);
        counters.wait(newcomer);
        assert_eq!(counters.served(newcomer), counters.served(busy));
        // What is got while it is urgent counts among the batches as well, and what a batch gets does not count among the urgent.
        counters.wait(at(9, 1));
        assert_eq!(counters.served(at(9, 1)), counters.served(at(9, 3)));
        counters.charge(busy, 100, 0);
        assert!(counters.served(at(9, 1)) > counters.served(at(9, 3)));
        counters.charge(at(9, 1), 100, 0);
        assert_eq!(counters.served(newcomer), counters.served(busy) - 100 * SCALE);
    }

    #[test]
    fn weight_divides_the_charge() {
        let mut counters = TokenCounters::default();
        let heavy = heavy(1, 4);
        counters.wait(heavy);
        counters.wait(tenant(2));
        counters.charge(heavy, 400, 0);
        counters.charge(tenant(2), 0, 50);
        assert_eq!(counters.served(heavy), counters.served(tenant(2)));
    }

    #[test]
    fn an_exchange_of_places_is_never_undone_by_the_next() {
        let mut counters = TokenCounters::default();
        let (a, b) = (tenant(1), tenant(2));
        counters.wait(a);
        counters.wait(b);
        counters.take_slots(a, 8);
        let mut exchanges = 0;
        while counters.should_yield(a, 1, b, 1) {
            counters.free_slots(a, 1);
            counters.take_slots(b, 1);
            assert!(!counters.should_yield(b, 1, a, 1));
            exchanges += 1;
        }
        assert_eq!(exchanges, 4);
        // With three times the weight it may hold three times as much.
        let heavy = heavy(3, 3);
        counters.wait(heavy);
        counters.take_slots(heavy, 6);
        assert!(!counters.should_yield(heavy, 1, tenant(4), 2) && counters.should_yield(heavy, 1, tenant(4), 1));
        // Who had less service yields nothing.
        counters.charge(tenant(2), 1, 0);
        assert!(!counters.should_yield(a, 1, b, 0));
    }

    #[test]
    fn strangers_do_not_pile_up() {
        let mut counters = TokenCounters::default();
        for id in 0..3 * REMEMBERED as u64 {
            counters.wait(tenant(id));
            counters.stop_waiting(tenant(id), true);
        }
        assert!(counters.accounts.len() <= REMEMBERED);
    }
}
