//! Decides what each step computes. A state machine over values: no clock, no channel, no thread.
//!
//! There are no prefill and decode phases: every sequence has `computed` chasing `tokens.len()`, and a step spends a token budget,
//! first on sequences that lack one token, then on chunks of those that lack more, then on newcomers. Those are taken by priority;
//! within one, the tenant that has been served least goes first ([`crate::fairness`]), and a tenant's requests go by arrival. A tenant
//! that waits takes the place of one that holds more than its share.
//!
//! When blocks run out, paused sequences give theirs back first, then, of the lowest priority, the youngest of the tenant that holds
//! most; they keep their tokens and their place in line and are computed again later. The first in line is never preempted for
//! another of its priority, and any one sequence fits the pool alone, so every sequence gets on.
//!
//! A draw waits for its sequence's mask, and the whole step with it. A sequence whose mask may take long therefore sits out until the
//! mask is there, unless nobody else has anything to do.

use crate::batch::{self, Share};
use crate::block_pool::{BLOCK_SIZE, BlockId, SharedPool};
use crate::fairness::TokenCounters;
use crate::grammar::{Follower, Verdict};
use crate::request::{Request, TokenRecord};
use crate::sequence::{RequestKey, Sequence, SequenceId};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use tidemill_kernels::{Sampled, StepBatch, StepOutput};

/// Bounds that hold in every step.
#[derive(Clone, Debug)]
pub struct SchedulerLimits {
    /// Sequences that run at once.
    pub max_seqs: usize,
    /// Tokens per step, ≥ `max_seqs`.
    pub max_batch_tokens: usize,
    /// Sampled or scored rows per step, ≥ `max_seqs`.
    pub max_samples: usize,
    /// Whether computed blocks are found again.
    pub prefix_caching: bool,
    /// Tokens that `min_tokens` forbids.
    pub end_of_turn: Vec<u32>,
}

/// What a step led to.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// A request's prompt is computed; its choices' first tokens follow.
    Prompt {
        /// The request.
        request: RequestKey,
        /// Tokens that came from the cache.
        cached_tokens: usize,
        /// One entry per prompt token when asked for.
        logprobs: Option<Vec<Option<TokenRecord>>>,
    },
    /// A choice has a new token.
    Token {
        /// The sequence.
        id: SequenceId,
        /// The token.
        sampled: Sampled,
    },
    /// A choice's text is whole by its grammar, and the model has no token that ends a turn.
    Complete {
        /// The sequence.
        id: SequenceId,
    },
    /// A choice cannot go on within its grammar.
    Stuck {
        /// The sequence.
        id: SequenceId,
        /// Fit for the client.
        message: String,
    },
}

/// Running totals.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SchedulerCounts {
    /// Sequences sent back to compute again.
    pub preemptions: u64,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_queries: u64,
    /// Of these, found.
    pub prefix_hits: u64,
}

/// The model gave back another number of samples than the step asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the model returned {got} samples, {wanted} were asked for")]
pub struct WrongSampleCount {
    got: usize,
    wanted: usize,
}

#[derive(Debug)]
struct RequestState {
    cached_tokens: usize,
    prompt_done: bool,
    /// Choices that are not finished.
    live: usize,
    scores: Vec<Option<TokenRecord>>,
}

/// What is left to give in the step that is being planned.
struct Budget {
    tokens: usize,
    samples: usize,
}

/// The scheduler. See the module text.
#[derive(Debug)]
pub struct Scheduler {
    limits: SchedulerLimits,
    pool: SharedPool,
    waiting: BTreeMap<SequenceId, Sequence>,
    running: BTreeMap<SequenceId, Sequence>,
    requests: HashMap<RequestKey, RequestState>,
    plan: Vec<(SequenceId, Share)>,
    copies: Vec<(BlockId, BlockId)>,
    admitted: Vec<RequestKey>,
    /// Preempted in the step that is being planned: they wait for the next.
    set_back: Vec<SequenceId>,
    counters: TokenCounters,
    scratch: Vec<SequenceId>,
    counts: SchedulerCounts,
    /// The first in line did not fit when this many blocks were free.
    blocked: Option<(SequenceId, usize)>,
}

impl Scheduler {
    /// A scheduler over an empty pool.
    pub fn new(limits: SchedulerLimits, pool: SharedPool) -> Self {
        Self {
            limits,
            pool,
            waiting: BTreeMap::new(),
            running: BTreeMap::new(),
            requests: HashMap::new(),
            plan: Vec::new(),
            copies: Vec::new(),
            admitted: Vec::new(),
            set_back: Vec::new(),
            counters: TokenCounters::default(),
            scratch: Vec::new(),
            counts: SchedulerCounts::default(),
            blocked: None,
        }
    }

    /// Queues a request. It must have passed [`crate::validate::validate`], and prompt and output must fit the pool.
    pub fn add(&mut self, key: RequestKey, request: Arc<Request>, seed: u64) {
        let live = request.sampling.n;
        self.requests.insert(key, RequestState { cached_tokens: 0, prompt_done: false, live, scores: Vec::new() });
        let sequence = Sequence::leader(key, request, seed, &self.pool);
        self.counters.wait(sequence.contender());
        self.waiting.insert(sequence.id, sequence);
    }

    /// Requests that are not finished.
    pub fn requests(&self) -> usize {
        self.requests.len()
    }

    /// Sequences that have a place among the running.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Sequences that wait, preempted ones too.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Running totals.
    pub fn counts(&self) -> SchedulerCounts {
        self.counts
    }

    /// The pool.
    pub fn pool(&self) -> &SharedPool {
        &self.pool
    }

    /// Requests that left the queue for the first time in the last [`Scheduler::schedule`].
    pub fn admitted(&self) -> &[RequestKey] {
        &self.admitted
    }

    /// Requests that take part in the step that was scheduled last.
    pub fn in_step(&self) -> impl Iterator<Item = RequestKey> + '_ {
        self.plan.iter().map(|(id, _)| id.request)
    }

    /// Stops or resumes scheduling of a request, because its client reads too slowly.
    pub fn set_paused(&mut self, request: RequestKey, priority: i32, paused: bool) {
        let range = choices(request, priority);
        for (_, sequence) in self.waiting.range_mut(range.clone()) {
            match (std::mem::replace(&mut sequence.paused, paused), paused) {
                // Who cannot run does not hold the others' counters down, and earns nothing by it.
                (false, true) => self.counters.stop_waiting(sequence.contender(), false),
                (true, false) => self.counters.wait(sequence.contender()),
                _ => {}
            }
        }
        for (_, sequence) in self.running.range_mut(range) {
            sequence.paused = paused;
        }
        self.blocked = None;
    }

    /// Forgets a choice that ended; its blocks are free at once.
    pub fn finish(&mut self, id: SequenceId) {
        if !self.remove(id) {
            return;
        }
        if let Some(state) = self.requests.get_mut(&id.request) {
            state.live = state.live.saturating_sub(1);
            if state.live == 0 {
                self.requests.remove(&id.request);
            }
        }
    }

    /// Forgets a request with all its choices.
    pub fn cancel(&mut self, request: RequestKey, priority: i32) {
        let range = choices(request, priority);
        let ids: Vec<_> =
            [&self.waiting, &self.running].iter().flat_map(|line| line.range(range.clone())).map(|(id, _)| *id).collect();
        for id in ids {
            self.remove(id);
        }
        self.requests.remove(&request);
    }

    fn remove(&mut self, id: SequenceId) -> bool {
        if let Some(sequence) = self.running.remove(&id) {
            self.counters.free_slots(sequence.contender(), sequence.slots);
            return true;
        }
        let Some(sequence) = self.waiting.remove(&id) else { return false };
        if !sequence.paused {
            self.counters.stop_waiting(sequence.contender(), false);
        }
        true
    }

    /// Plans a step and writes its batch; returns the number of tokens, 0 when nothing can run.
    pub fn schedule(&mut self, batch: &mut StepBatch) -> usize {
        batch.clear();
        self.plan.clear();
        self.copies.clear();
        self.admitted.clear();
        self.set_back.clear();
        let mut budget = Budget { tokens: self.limits.max_batch_tokens, samples: self.limits.max_samples };
        let preemptions = self.counts.preemptions;
        self.plan_all_running(&mut budget, Sequence::is_late);
        if self.counts.preemptions == preemptions {
            self.admit(&mut budget);
        }
        if self.plan.is_empty() {
            // An urgent newcomer took the places of all who had a share and still does not fit, or all wait for masks: whoever is left
            // gets the step.
            self.plan_all_running(&mut budget, |_| false);
        }
        batch.copies.extend(self.copies.iter().map(|(from, to)| (from.0, to.0)));
        for (id, share) in &self.plan {
            if let Some(sequence) = self.running.get(id) {
                batch::write(batch, sequence, *share, &self.limits.end_of_turn);
            }
        }
        batch.tokens.len()
    }

    /// Takes in what the step computed. `outcomes` is emptied first.
    pub fn apply(&mut self, out: &mut StepOutput, outcomes: &mut Vec<Outcome>) -> Result<(), WrongSampleCount> {
        outcomes.clear();
        let wanted = self.plan.iter().filter_map(|(id, share)| Some(batch::samples(self.running.get(id)?, *share))).sum();
        if out.samples.len() != wanted {
            return Err(WrongSampleCount { got: out.samples.len(), wanted });
        }
        let mut samples = out.samples.iter_mut().map(std::mem::take);
        let plan = std::mem::take(&mut self.plan);
        for (id, share) in &plan {
            self.apply_share(*id, *share, &mut samples, outcomes);
        }
        self.plan = plan;
        Ok(())
    }

    fn apply_share(
        &mut self,
        id: SequenceId,
        share: Share,
        samples: &mut impl Iterator<Item = Sampled>,
        outcomes: &mut Vec<Outcome>,
    ) {
        let (Some(sequence), Some(state)) = (self.running.get_mut(&id), self.requests.get_mut(&id.request)) else { return };
        if share.scored {
            let scored = batch::samples(sequence, share) - if sequence.pending() == share.rows { sequence.draws() } else { 0 };
            // A preempted prompt is scored again from its start.
            state.scores.truncate(sequence.computed + 1);
            state.scores.resize(sequence.computed + 1, None);
            state.scores.extend(samples.take(scored).map(|sampled| Some(record(sampled))));
        }
        sequence.advance(share.rows, self.limits.prefix_caching);
        if sequence.pending() > 0 {
            return;
        }
        if !std::mem::replace(&mut state.prompt_done, true) {
            let logprobs = sequence.request.sampling.prompt_logprobs.map(|_| std::mem::take(&mut state.scores));
            outcomes.push(Outcome::Prompt { request: id.request, cached_tokens: state.cached_tokens, logprobs });
        }
        // The places of a request with several choices become those of its forks.
        let draws = std::mem::replace(&mut sequence.slots, 1);
        self.counters.charge(sequence.contender(), 0, draws);
        let mut forks: Vec<Sequence> = (1..draws as u32).map(|choice| sequence.fork(choice)).collect();
        for sequence in std::iter::once(sequence).chain(&mut forks) {
            let Some(sampled) = samples.next() else { return };
            match sequence.follower.as_ref().and_then(Follower::verdict) {
                None => {}
                Some(Verdict::Complete) => {
                    outcomes.push(Outcome::Complete { id: sequence.id });
                    continue;
                }
                Some(Verdict::Failed(message)) => {
                    outcomes.push(Outcome::Stuck { id: sequence.id, message });
                    continue;
                }
            }
            sequence.push(sampled.token);
            outcomes.push(Outcome::Token { id: sequence.id, sampled });
        }
        self.running.extend(forks.into_iter().map(|sequence| (sequence.id, sequence)));
    }

    fn plan_all_running(&mut self, budget: &mut Budget, sits_out: fn(&Sequence) -> bool) {
        self.plan_running(budget, |sequence| sequence.pending() == 1 && !sits_out(sequence));
        self.plan_running(budget, |sequence| sequence.pending() > 1 && !sits_out(sequence));
    }

    fn plan_running(&mut self, budget: &mut Budget, takes_part: impl Fn(&Sequence) -> bool) {
        let mut ids = std::mem::take(&mut self.scratch);
        ids.clear();
        ids.extend(self.running.values().filter(|s| !s.paused && takes_part(s)).map(|s| s.id));
        // One long prompt after another would hold up a tenant with a short one.
        ids.sort_by_cached_key(|id| (id.priority, self.running.get(id).map_or(0, |s| self.counters.served(s.contender())), *id));
        for id in &ids {
            if budget.tokens == 0 || budget.samples == 0 {
                break;
            }
            self.plan_one(*id, budget);
        }
        self.scratch = ids;
    }

    /// Gives a running sequence its share of the step, taking blocks from others when there is no other way.
    fn plan_one(&mut self, id: SequenceId, budget: &mut Budget) {
        loop {
            // It may have been preempted for one before it.
            let Some(sequence) = self.running.get_mut(&id) else { return };
            let Some(state) = self.requests.get_mut(&id.request) else { return };
            let scored = sequence.request.sampling.prompt_logprobs.is_some() && !state.prompt_done;
            if self.limits.prefix_caching && !scored && sequence.pending() > 1 {
                let hits = sequence.adopt_cached();
                if !sequence.preempted {
                    state.cached_tokens += hits;
                    self.counts.prefix_hits += hits as u64;
                }
            }
            let Some(share) = share_of(sequence, scored, budget) else { return };
            let first_block = sequence.computed / BLOCK_SIZE;
            let room = sequence.table.grow_to(sequence.computed + share.rows);
            match room.and_then(|()| sequence.table.make_writable(first_block)) {
                Ok(copy) => {
                    self.copies.extend(copy);
                    let (contender, prompt) = (sequence.contender(), sequence.charge(share.rows));
                    self.counters.charge(contender, prompt, 0);
                    budget.tokens -= share.rows;
                    budget.samples -= batch::samples(sequence, share);
                    self.plan.push((id, share));
                    return;
                }
                Err(_) => {
                    let Some(victim) = self.victim(id) else { return };
                    self.preempt(victim, budget);
                }
            }
        }
    }

    /// Who is let in next: of the best priority that waits, the first in line of the tenant that was served least.
    fn next_in_line(&self) -> Option<SequenceId> {
        let mut best: Option<(i32, u64, u64, SequenceId)> = None;
        for (id, sequence) in &self.waiting {
            if best.is_some_and(|(priority, ..)| id.priority > priority) {
                break;
            }
            if sequence.paused || self.set_back.contains(id) {
                continue;
            }
            let contender = sequence.contender();
            // Of two that were served alike, as one who just came and a flood, the one that holds less.
            let key = (id.priority, self.counters.served(contender), self.counters.held(contender), *id);
            if best.is_none_or(|best| key < best) {
                best = Some(key);
            }
        }
        best.map(|(.., id)| id)
    }

    /// Lets newcomers in, in order, as long as there is budget, a place and room for all of their tokens.
    fn admit(&mut self, budget: &mut Budget) {
        while let Some(id) = self.next_in_line() {
            // With the budget spent, only one who goes before those that spent it gets a place, and is first in the next step.
            let spent = budget.tokens == 0 || budget.samples == 0;
            if spent && !self.goes_before(id) {
                return;
            }
            while !self.fits(id) {
                let Some(victim) = self.victim_for_newcomer(id) else { return };
                self.preempt(victim, budget);
            }
            let Some(sequence) = self.waiting.remove(&id) else { return };
            if !sequence.preempted {
                self.admitted.push(id.request);
                self.counts.prefix_queries += sequence.prompt_len() as u64;
            }
            self.counters.stop_waiting(sequence.contender(), true);
            self.counters.take_slots(sequence.contender(), sequence.slots);
            self.running.insert(id, sequence);
            self.plan_one(id, budget);
        }
    }

    /// Whether a waiting sequence can run now; if so, it has its blocks.
    fn fits(&mut self, id: SequenceId) -> bool {
        let slots: usize = self.running.values().map(|sequence| sequence.slots).sum();
        let free = self.pool.borrow().free();
        let Some(sequence) = self.waiting.get_mut(&id) else { return false };
        if slots + sequence.slots > self.limits.max_seqs {
            return false;
        }
        if !self.running.is_empty() && self.blocked.is_some_and(|(blocked, then)| blocked == id && free <= then) {
            return false;
        }
        let state = self.requests.get_mut(&id.request);
        let scored = sequence.request.sampling.prompt_logprobs.is_some() && state.as_ref().is_some_and(|s| !s.prompt_done);
        let hits = if self.limits.prefix_caching && !scored { sequence.adopt_cached() } else { 0 };
        // A margin, so that those who run can go on for a while; with nobody running everything may be taken.
        let margin = if self.running.is_empty() { 0 } else { 1 + self.pool.borrow().total() / 100 };
        let missing = sequence.tokens.len().div_ceil(BLOCK_SIZE) - sequence.table.blocks().len();
        let roomy = missing + margin <= self.pool.borrow().free();
        if !roomy || sequence.table.grow_to(sequence.tokens.len()).is_err() {
            sequence.release();
            self.blocked = Some((id, free));
            return false;
        }
        if let Some(state) = state.filter(|_| !sequence.preempted) {
            state.cached_tokens += hits;
            self.counts.prefix_hits += hits as u64;
        }
        self.blocked = None;
        true
    }

    /// Who gives up blocks so that `id` can go on: a paused sequence, else of the lowest priority the youngest of whoever holds most,
    /// which may be `id` itself, but not the first in line.
    fn victim(&self, id: SequenceId) -> Option<SequenceId> {
        let (first, last) = (self.running.keys().next().copied(), self.running.keys().next_back().copied());
        let lowest = self.running.values().filter(|one| Some(one.id.priority) == last.map(|last| last.priority));
        let others = lowest.filter(|one| Some(one.id) != first);
        let holder = others.max_by_key(|one| (self.counters.held(one.contender()), one.id));
        self.paused_victim().filter(|victim| *victim != id).or(holder.map(|one| one.id)).or(last)
    }

    /// Who gives up place and blocks to a newcomer: a paused sequence, the last in line if its priority is worse, or the youngest of a
    /// tenant that holds more than its share.
    fn victim_for_newcomer(&self, id: SequenceId) -> Option<SequenceId> {
        let last = self.running.keys().next_back().copied();
        self.paused_victim().or(last.filter(|_| self.is_more_urgent(id))).or_else(|| self.fair_victim(id))
    }

    /// A sequence of the same priority whose tenant holds more than its share beside the newcomer's.
    fn fair_victim(&self, id: SequenceId) -> Option<SequenceId> {
        let newcomer = self.waiting.get(&id)?;
        let yields = |one: &&Sequence| {
            one.id.priority == id.priority
                && self.counters.should_yield(one.contender(), one.slots, newcomer.contender(), newcomer.slots)
        };
        let holder = self.running.values().filter(yields);
        holder.max_by_key(|one| (self.counters.held(one.contender()), one.id)).map(|one| one.id)
    }

    /// Whether `id` goes before one that runs: by priority, by its tenant's share of places, or because it would be the only prompt of
    /// its tenant beside those of tenants that were served more.
    fn goes_before(&self, id: SequenceId) -> bool {
        let Some(newcomer) = self.waiting.get(&id) else { return false };
        let served = self.counters.served(newcomer.contender());
        let mut prompts = self.running.values().filter(|one| one.pending() > 1 && one.id.priority == id.priority);
        self.is_more_urgent(id)
            || self.fair_victim(id).is_some()
            || (prompts.clone().all(|one| one.tenant().id != newcomer.tenant().id)
                && prompts.any(|one| !one.paused && self.counters.served(one.contender()) > served))
    }

    /// Whether `id` has a better priority than the last in line.
    fn is_more_urgent(&self, id: SequenceId) -> bool {
        self.running.keys().next_back().is_some_and(|last| last.priority > id.priority)
    }

    fn paused_victim(&self) -> Option<SequenceId> {
        self.running.values().rev().find(|sequence| sequence.paused).map(|sequence| sequence.id)
    }

    fn preempt(&mut self, id: SequenceId, budget: &mut Budget) {
        let Some(mut sequence) = self.running.remove(&id) else { return };
        if let Some(index) = self.plan.iter().position(|(planned, _)| *planned == id) {
            let (_, share) = self.plan.remove(index);
            budget.tokens += share.rows;
            budget.samples += batch::samples(&sequence, share);
        }
        self.counters.free_slots(sequence.contender(), sequence.slots);
        if !sequence.paused {
            self.counters.wait_again(sequence.contender());
        }
        self.set_back.push(id);
        sequence.release();
        sequence.preempted = true;
        self.counts.preemptions += 1;
        self.blocked = None;
        self.waiting.insert(id, sequence);
    }
}

/// The largest share that the budget allows; `None` when not even one row.
fn share_of(sequence: &Sequence, scored: bool, budget: &Budget) -> Option<Share> {
    let mut share = Share { rows: sequence.pending().min(budget.tokens), scored };
    if batch::samples(sequence, share) > budget.samples {
        // Each row before the last takes at most one sample.
        share.rows = (share.rows - 1).min(if scored { budget.samples } else { share.rows });
    }
    (share.rows > 0).then_some(share)
}

fn choices(request: RequestKey, priority: i32) -> std::ops::RangeInclusive<SequenceId> {
    SequenceId { priority, request, choice: 0 }..=SequenceId { priority, request, choice: u32::MAX }
}

/// What is kept of a sample.
pub fn record(sampled: Sampled) -> TokenRecord {
    let Sampled { token, logprob, processed_logprob, top, processed_top, .. } = sampled;
    TokenRecord { token, logprob, processed_logprob, top, processed_top }
}

#[cfg(test)]
mod tests;
