//! Equal service for all who want more than there is: the virtual token counter of "Fairness in Serving Large Language Models"
//! (Sheng et al., OSDI 2024, arXiv 2401.00588), with weights.
//!
//! Each tenant has a counter of the service it got: prompt tokens that were computed for it, and twice the tokens that were generated.
//! Whoever has the least goes next. A tenant that comes back after a time without waiting requests starts no lower than the lowest
//! that wait (Algorithm 2, lines 6–13): time away earns no credit. Between two tenants that both always wait, the service differs by
//! at most twice the larger of one prompt and one full batch (Theorem 4.4), however many requests either sends.
//!
//! Two things differ from the paper, which knows neither chunked prompts nor preemption. A prompt is charged chunk by chunk as it is
//! computed, and what the prefix cache holds is free. Tokens that are computed again after a preemption are not charged again.

use crate::request::Tenant;
use std::collections::HashMap;

/// What a computed prompt token costs.
pub const PROMPT_TOKEN: u64 = 1;
/// What a generated token costs.
pub const GENERATED_TOKEN: u64 = 2;
/// Counters are in parts of a token, so that a share by weight is a whole number for weights up to ten, and nearly one for others.
const SCALE: u64 = 2520;
/// Tenants remembered. Beyond, those that want nothing are forgotten: what they had more than others is forgiven.
const REMEMBERED: usize = 16_384;

#[derive(Clone, Copy, Debug, Default)]
struct Account {
    /// Service by weight, in parts of a token.
    served: u64,
    weight: u32,
    /// Sequences that could be scheduled.
    waiting: usize,
    /// Places among the running.
    slots: usize,
}

/// The counters of all tenants.
#[derive(Clone, Debug, Default)]
pub struct TokenCounters {
    accounts: HashMap<u64, Account>,
    /// Who left the queue last: with nobody waiting, newcomers start where it is.
    last: Option<u64>,
}

impl TokenCounters {
    /// A sequence waits.
    pub fn wait(&mut self, tenant: Tenant) {
        if self.accounts.len() >= REMEMBERED {
            let last = self.last;
            self.accounts.retain(|id, account| account.waiting + account.slots > 0 || last == Some(*id));
        }
        let others = self.accounts.values().filter(|account| account.waiting > 0).map(|account| account.served).min();
        let start = others.or_else(|| self.accounts.get(&self.last?).map(|account| account.served));
        let account = self.accounts.entry(tenant.id).or_default();
        account.weight = tenant.weight.max(1);
        if account.waiting == 0 {
            account.served = account.served.max(start.unwrap_or(0));
        }
        account.waiting += 1;
    }

    /// A sequence that was set back waits: nobody came, and nothing starts anew.
    pub fn wait_again(&mut self, tenant: Tenant) {
        if let Some(account) = self.accounts.get_mut(&tenant.id) {
            account.waiting += 1;
        }
    }

    /// A sequence does not wait any more; `runs` says whether because it runs now.
    pub fn stop_waiting(&mut self, tenant: Tenant, runs: bool) {
        if let Some(account) = self.accounts.get_mut(&tenant.id) {
            account.waiting = account.waiting.saturating_sub(1);
        }
        if runs {
            self.last = Some(tenant.id);
        }
    }

    /// A sequence takes places among the running.
    pub fn take_slots(&mut self, tenant: Tenant, slots: usize) {
        if let Some(account) = self.accounts.get_mut(&tenant.id) {
            account.slots += slots;
        }
    }

    /// And gives them back.
    pub fn free_slots(&mut self, tenant: Tenant, slots: usize) {
        if let Some(account) = self.accounts.get_mut(&tenant.id) {
            account.slots = account.slots.saturating_sub(slots);
        }
    }

    /// Counts computed prompt tokens and generated tokens.
    pub fn charge(&mut self, tenant: Tenant, prompt: usize, generated: usize) {
        if let Some(account) = self.accounts.get_mut(&tenant.id) {
            let cost = prompt as u64 * PROMPT_TOKEN + generated as u64 * GENERATED_TOKEN;
            account.served = account.served.saturating_add(cost * SCALE / u64::from(account.weight.max(1)));
        }
    }

    /// The counter: lower goes first.
    pub fn served(&self, tenant: Tenant) -> u64 {
        self.accounts.get(&tenant.id).map_or(0, |account| account.served)
    }

    /// Places among the running, by weight, as a fraction (numerator, denominator).
    fn share(&self, tenant: Tenant) -> (usize, usize) {
        self.accounts.get(&tenant.id).map_or((0, 1), |account| (account.slots, account.weight.max(1) as usize))
    }

    /// Places among the running by weight, in parts of a place.
    pub fn held(&self, tenant: Tenant) -> u64 {
        let (slots, weight) = self.share(tenant);
        slots as u64 * SCALE / weight as u64
    }

    /// Whether `from` should give up `freed` places so that `to`, which waits, gets `taken`: it had at least as much service, and even
    /// afterwards it does not hold less than `to`. So the places of two tenants get closer with each such exchange, and never is one
    /// undone by the next.
    pub fn should_yield(&self, from: Tenant, freed: usize, to: Tenant, taken: usize) -> bool {
        let ((held_from, weight_from), (held_to, _)) = (self.share(from), self.share(to));
        let weight_to = to.weight.max(1) as usize;
        from.id != to.id
            && self.served(from) >= self.served(to)
            && held_from.saturating_sub(freed) * weight_to >= (held_to + taken) * weight_from
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tenant(id: u64) -> Tenant {
        Tenant { id, weight: 1 }
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
    fn weight_divides_the_charge() {
        let mut counters = TokenCounters::default();
        let heavy = Tenant { id: 1, weight: 4 };
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
        let heavy = Tenant { id: 3, weight: 3 };
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
