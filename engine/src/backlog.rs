//! Who waits and who runs, and how fast that goes: enough to tell a request at once that it would come too late.
//!
//! An estimate, from what was measured lately. It is on the hopeful side where it does not know: a request is refused only when its
//! first token could not be in time, and `min_tokens` after it; nobody knows how long an answer will be.

use crate::request::Request;
use std::collections::BTreeMap;
use std::time::Duration;

/// The weight of one new measurement in a mean.
const FRESH: f64 = 0.125;
/// Steps that compute fewer prompt tokens say little about the speed of prompts.
const PROMPT_STEP: usize = 16;

/// A mean that follows what it measures.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Mean(Option<f64>);

impl Mean {
    fn add(&mut self, value: f64) {
        self.0 = Some(self.0.map_or(value, |mean| mean + FRESH * (value - mean)));
    }

    fn get(self) -> f64 {
        self.0.unwrap_or(0.0)
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Line {
    requests: usize,
    /// Tokens of their prompts.
    tokens: usize,
}

/// A line of those who wait or run: one per priority and tenant.
type Place = (i32, u64);

/// What a request stands behind. See the module text.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Backlog {
    waiting: BTreeMap<Place, Line>,
    /// Places among the running, by the requests' `n`.
    running: BTreeMap<Place, usize>,
    slots: usize,
    /// Seconds from a request's first step to its end.
    residence: Mean,
    /// Seconds per step that computes no prompt.
    token: Mean,
    /// Seconds per prompt token.
    prompt_token: Mean,
    /// Part of the prompts' tokens that the prefix cache does not hold.
    uncached: Mean,
}

fn place(request: &Request) -> Place {
    (request.priority, request.tenant.id)
}

impl Backlog {
    /// For an engine that runs `slots` sequences at once.
    pub fn new(slots: usize) -> Self {
        Self { slots, ..Self::default() }
    }

    /// A request waits.
    pub fn wait(&mut self, request: &Request) {
        let line = self.waiting.entry(place(request)).or_default();
        line.requests += 1;
        line.tokens += request.prompt.len();
    }

    /// It does not wait any more.
    pub fn stop_waiting(&mut self, request: &Request) {
        let Some(line) = self.waiting.get_mut(&place(request)) else { return };
        line.requests = line.requests.saturating_sub(1);
        line.tokens = line.tokens.saturating_sub(request.prompt.len());
        if line.requests == 0 {
            self.waiting.remove(&place(request));
        }
    }

    /// It runs.
    pub fn run(&mut self, request: &Request) {
        self.stop_waiting(request);
        *self.running.entry(place(request)).or_default() += request.sampling.n;
    }

    /// It ran for so long and has ended; `whole` says whether by itself.
    pub fn end(&mut self, request: &Request, ran: Duration, whole: bool) {
        if let Some(slots) = self.running.get_mut(&place(request)) {
            *slots = slots.saturating_sub(request.sampling.n);
            if *slots == 0 {
                self.running.remove(&place(request));
            }
        }
        if whole {
            self.residence.add(ran.as_secs_f64());
        }
    }

    /// A prompt of `tokens` tokens has been computed, of which the cache held `cached`.
    pub fn prompt(&mut self, tokens: usize, cached: usize) {
        self.uncached.add(1.0 - cached as f64 / tokens.max(1) as f64);
    }

    /// A step computed `prompt` tokens of prompts, beside the next tokens of answers.
    pub fn step(&mut self, prompt: usize, took: Duration) {
        let took = took.as_secs_f64();
        if prompt == 0 {
            self.token.add(took);
        } else if prompt >= PROMPT_STEP {
            self.prompt_token.add((took - self.token.get()).max(0.1 * took) / prompt as f64);
        }
    }

    /// How long until `request`, coming now, has its first token and `min_tokens`: at least, as far as is known.
    pub fn estimate(&self, request: &Request) -> Duration {
        let (priority, tenant) = place(request);
        let mine = self.waiting.get(&(priority, tenant)).map_or(0, |line| line.requests);
        let (mut requests, mut tokens) = (0, 0.0);
        for ((other_priority, other), line) in &self.waiting {
            // Of another tenant, as many go before it as of its own: they take turns.
            let ahead = match (*other_priority, *other) {
                (other, _) if other < priority => line.requests,
                (other, _) if other > priority => 0,
                (_, other) if other == tenant => line.requests,
                _ => line.requests.min(mine + 1),
            };
            requests += ahead;
            tokens += line.tokens as f64 * ahead as f64 / line.requests.max(1) as f64;
        }
        let queue = if self.has_room(priority, tenant, mine + request.sampling.n) {
            0.0
        } else {
            // The places of those of lower priority are as good as free.
            let held: usize = self.running.iter().filter(|((other, _), _)| *other <= priority).map(|(_, slots)| slots).sum();
            let missing = (requests + request.sampling.n + held).saturating_sub(self.slots);
            missing as f64 * self.residence.get() / self.slots.max(1) as f64
        };
        let prompts = tokens * self.uncached.get() * self.prompt_token.get();
        let own = request.prompt.len() as f64 * self.uncached.get() * self.prompt_token.get();
        let further = request.sampling.min_tokens.saturating_sub(1) as f64 * self.token.get();
        Duration::try_from_secs_f64(queue.max(prompts) + own + self.token.get() + further).unwrap_or(Duration::MAX)
    }

    /// Whether a tenant may hold so many places at once: the running of others with the same priority yield what is beyond an equal
    /// share.
    fn has_room(&self, priority: i32, tenant: u64, wanted: usize) -> bool {
        let better: usize = self.running.range(..(priority, 0)).map(|(_, slots)| slots).sum();
        let here = (priority, 0)..=(priority, u64::MAX);
        let mut tenants: Vec<u64> = self.running.range(here.clone()).map(|((_, tenant), _)| *tenant).collect();
        tenants.extend(self.waiting.range(here).map(|((_, tenant), _)| *tenant));
        tenants.push(tenant);
        tenants.sort_unstable();
        tenants.dedup();
        let held = self.running.get(&(priority, tenant)).copied().unwrap_or(0);
        held + wanted <= self.slots.saturating_sub(better) / tenants.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::{SamplingParams, Tenant};
    use crate::sequence::tests::request;

    fn of(tenant: u64, priority: i32, prompt: usize) -> Request {
        let tenant = Tenant { id: tenant, weight: 1 };
        Request { tenant, priority, ..request(vec![1; prompt], SamplingParams::default()) }
    }

    fn ms(duration: Duration) -> u128 {
        duration.as_millis()
    }

    /// Four places; a request runs for 8 s, a token takes 10 ms, a prompt token 1 ms.
    fn measured() -> Backlog {
        let mut backlog = Backlog::new(4);
        backlog.step(0, Duration::from_millis(10));
        backlog.step(100, Duration::from_millis(110));
        backlog.prompt(100, 0);
        let one = of(1, 0, 10);
        backlog.wait(&one);
        backlog.run(&one);
        backlog.end(&one, Duration::from_secs(8), true);
        backlog
    }

    #[test]
    fn nothing_measured_promises_anything() {
        let mut backlog = Backlog::new(1);
        for _ in 0..100 {
            backlog.wait(&of(1, 0, 1000));
        }
        assert_eq!(backlog.estimate(&of(1, 0, 1000)), Duration::ZERO);
    }

    #[test]
    fn with_a_place_free_only_its_own_prompt_counts() {
        let mut backlog = measured();
        assert_eq!(ms(backlog.estimate(&of(1, 0, 500))), 510);
        let long = SamplingParams { min_tokens: 101, ..SamplingParams::default() };
        assert_eq!(ms(backlog.estimate(&Request { sampling: long, ..of(1, 0, 500) })), 1510);
        // Half of the prompts' tokens are in the cache, by and by.
        for _ in 0..200 {
            backlog.prompt(100, 50);
        }
        assert_eq!(ms(backlog.estimate(&of(1, 0, 500))), 260);
    }

    #[test]
    fn a_full_engine_takes_its_time_per_request_in_line() {
        let mut backlog = measured();
        for _ in 0..4 {
            backlog.wait(&of(1, 0, 10));
            backlog.run(&of(1, 0, 10));
        }
        // One of four places comes free every 2 s.
        assert_eq!(ms(backlog.estimate(&of(1, 0, 0))), 2010);
        backlog.wait(&of(1, 0, 10));
        backlog.wait(&of(1, 0, 10));
        assert_eq!(ms(backlog.estimate(&of(1, 0, 0))), 6010);
        // Who is more urgent, or has nothing yet, does not stand behind them.
        assert_eq!(ms(backlog.estimate(&of(1, -1, 0))), 10);
        // A prompt of ten tokens goes before it.
        assert_eq!(ms(backlog.estimate(&of(2, 0, 0))), 20);
        assert_eq!(ms(backlog.estimate(&of(2, 1, 0))), 6010);
        backlog.end(&of(1, 0, 10), Duration::from_secs(8), true);
        assert_eq!(ms(backlog.estimate(&of(1, 0, 0))), 4010);
        backlog.stop_waiting(&of(1, 0, 10));
        backlog.stop_waiting(&of(1, 0, 10));
        assert_eq!(ms(backlog.estimate(&of(1, 0, 0))), 10);
    }

    #[test]
    fn cancelled_requests_do_not_make_the_engine_look_fast() {
        let mut backlog = measured();
        let before = backlog.residence;
        backlog.wait(&of(1, 0, 1));
        backlog.run(&of(1, 0, 1));
        backlog.end(&of(1, 0, 1), Duration::from_millis(1), false);
        assert_eq!(backlog.residence, before);
        assert!(backlog.running.is_empty() && backlog.waiting.is_empty());
    }
}
