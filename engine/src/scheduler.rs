//! Decides what each step computes. A state machine over values: no clock, no channel, no thread.
//!
//! There are no prefill and decode phases: every sequence has `computed` chasing `tokens.len()`, and a step spends a token budget,
//! first on sequences that lack one token, then on chunks of those that lack more, then on newcomers. Those are taken by priority;
//! within one, the tenant that has been served least goes first ([`crate::fairness`]), and a tenant's requests go by arrival. A tenant
//! that waits takes the place of one that holds more than its share.
//!
//! When blocks run out, paused sequences give theirs back first, then, of the lowest priority, the youngest of the tenant that holds
//! most; they keep their tokens and their place in line and are computed again later. Where blocks lie in a card's memory, what they had
//! computed is kept in the machine's as long as there is room, and comes back. The first in line is never preempted for
//! another of its priority, and any one sequence fits the pool alone, so every sequence gets on.
//!
//! A step may be planned while the one before it is under way ([`Scheduler::may_plan_ahead`]): sequences go on from a token that nobody knows
//! yet. Whoever then turns out to have ended is in one step too many, whose token is dropped. Nothing is preempted while a step is under way.
//!
//! A draw waits for its sequence's mask, and the whole step with it. A sequence whose mask may take long therefore sits out until the
//! mask is there, unless nobody else has anything to do.

mod admission;
mod preemption;

use crate::batch::{self, Share};
use crate::block_pool::{BLOCK_SIZE, BlockId, SharedPool};
use crate::fairness::TokenCounters;
use crate::grammar::{Follower, Verdict};
use crate::request::{Request, TokenRecord};
use crate::sequence::{RequestKey, Sequence, SequenceId};
use crate::swap_space::{SwapSpace, SwappedBlocks};
use std::collections::{BTreeMap, HashMap, VecDeque};
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
    /// Most tokens of a sequence.
    pub max_model_len: usize,
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
    /// Sequences sent back to wait.
    pub preemptions: u64,
    /// Of these, sequences whose blocks were kept and came back.
    pub restored: u64,
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

/// A sequence's part in a step.
#[derive(Clone, Copy, Debug)]
struct Planned {
    id: SequenceId,
    share: Share,
    /// Its tokens that were computed before.
    start: usize,
    /// Entries of the step's samples that are its own, and how many of these, the last ones, draw.
    samples: usize,
    draws: usize,
}

/// A step that was planned and is not applied.
#[derive(Debug, Default)]
struct Step {
    shares: Vec<Planned>,
    /// Sequences whose blocks it saves, and those whose blocks it brings back.
    saves: Vec<SequenceId>,
    restores: Vec<SequenceId>,
    /// Somebody needs its tokens for what comes next.
    wanted: bool,
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
    /// The step that is being planned.
    plan: Vec<(SequenceId, Share)>,
    /// Steps that were planned and not applied, oldest first.
    under_way: VecDeque<Step>,
    /// To be used again.
    spare: Vec<Step>,
    /// Where blocks of preempted sequences are kept.
    swap: SwapSpace,
    /// Blocks to be saved and restored with the next step, whose they are, and places that are free when it is written.
    saved: Vec<(BlockId, u32)>,
    restored: Vec<(u32, BlockId)>,
    saves: Vec<SequenceId>,
    restores: Vec<SequenceId>,
    emptied: Vec<SwappedBlocks>,
    /// Somebody can get on only when no step is under way.
    blocked_ahead: bool,
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
            under_way: VecDeque::new(),
            spare: Vec::new(),
            swap: SwapSpace::default(),
            saved: Vec::new(),
            restored: Vec::new(),
            saves: Vec::new(),
            restores: Vec::new(),
            emptied: Vec::new(),
            blocked_ahead: false,
            copies: Vec::new(),
            admitted: Vec::new(),
            set_back: Vec::new(),
            counters: TokenCounters::default(),
            scratch: Vec::new(),
            counts: SchedulerCounts::default(),
            blocked: None,
        }
    }

    /// Keeps the blocks of preempted sequences there.
    pub fn swapping(self, swap: SwapSpace) -> Self {
        Self { swap, ..self }
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
        self.under_way.back().into_iter().flat_map(|step| &step.shares).map(|planned| planned.id.request)
    }

    /// Whether a step can be planned before the one that is under way is applied: nobody in it needs its tokens for what comes next, and
    /// nobody waits for something that only a preemption can give.
    pub fn may_plan_ahead(&self) -> bool {
        !self.blocked_ahead && self.under_way.len() < 2 && !self.under_way.iter().any(|step| step.wanted)
    }

    /// The oldest step that is under way failed: forgets it, and returns the requests that cannot go on, because what they computed or what
    /// was to be brought back for them is not there.
    pub fn fail(&mut self) -> Vec<RequestKey> {
        let Some(Step { shares, saves, restores, .. }) = self.under_way.pop_front() else { return Vec::new() };
        let mut lost: Vec<_> = shares.iter().map(|planned| planned.id).chain(restores).collect();
        for id in saves {
            match self.waiting.get_mut(&id) {
                // Nothing is known of what was to be saved: it is computed again.
                Some(sequence) => sequence.swapped = None,
                None => lost.push(id),
            }
        }
        let mut keys: Vec<_> = lost.into_iter().map(|id| id.request).collect();
        keys.sort_unstable();
        keys.dedup();
        keys
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

    /// Plans a step and writes its batch; returns the number of tokens, 0 when nothing can run. The step is under way from then on, until
    /// [`Scheduler::apply`] or [`Scheduler::fail`].
    pub fn schedule(&mut self, batch: &mut StepBatch) -> usize {
        batch.clear();
        self.plan.clear();
        self.copies.clear();
        self.admitted.clear();
        self.set_back.clear();
        self.blocked_ahead = false;
        let mut budget = Budget { tokens: self.limits.max_batch_tokens, samples: self.limits.max_samples };
        let preemptions = self.counts.preemptions;
        self.plan_all_running(&mut budget, Sequence::is_late);
        if self.counts.preemptions == preemptions {
            self.admit(&mut budget);
        }
        if self.plan.is_empty() && self.under_way.is_empty() {
            // An urgent newcomer took the places of all who had a share and still does not fit, or all wait for masks: whoever is left
            // gets the step.
            self.plan_all_running(&mut budget, |_| false);
        }
        batch.copies.extend(self.copies.iter().map(|(from, to)| (from.0, to.0)));
        self.write(batch);
        batch.tokens.len()
    }

    /// Writes the batch of what was planned, which is under way from here on.
    fn write(&mut self, batch: &mut StepBatch) {
        if self.plan.is_empty() {
            return;
        }
        batch.saved.extend(self.saved.drain(..).map(|(block, place)| (block.0, place)));
        batch.restored.extend(self.restored.drain(..).map(|(place, block)| (place, block.0)));
        let mut step = self.spare.pop().unwrap_or_default();
        let Step { shares, saves, restores, wanted } = &mut step;
        shares.clear();
        *wanted = false;
        (*saves, *restores) = (std::mem::take(&mut self.saves), std::mem::take(&mut self.restores));
        // What a later step saves there comes behind what this one reads.
        self.emptied.clear();
        for &(id, share) in &self.plan {
            let Some(sequence) = self.running.get_mut(&id) else { continue };
            let (start, first) = (sequence.computed, batch.samples.len());
            let drawn_by = batch::write(batch, sequence, share, &self.limits.end_of_turn);
            let samples = batch.samples.len() - first;
            let draws = drawn_by.map_or(0, |_| sequence.draws());
            shares.push(Planned { id, share, start, samples, draws });
            sequence.begin(share.rows, drawn_by);
            *wanted |= draws > 0 && sequence.wants_tokens() && !sequence.is_whole(self.limits.max_model_len);
        }
        self.under_way.push_back(step);
    }

    /// Takes in what the oldest step that is under way computed. `outcomes` is emptied first.
    pub fn apply(&mut self, out: &mut StepOutput, outcomes: &mut Vec<Outcome>) -> Result<(), WrongSampleCount> {
        outcomes.clear();
        let wanted = self.under_way.front().into_iter().flat_map(|step| &step.shares).map(|planned| planned.samples).sum();
        if out.samples.len() != wanted {
            return Err(WrongSampleCount { got: out.samples.len(), wanted });
        }
        let Some(step) = self.under_way.pop_front() else { return Ok(()) };
        let mut samples = out.samples.as_mut_slice();
        for planned in &step.shares {
            let (own, rest) = std::mem::take(&mut samples).split_at_mut(planned.samples);
            self.apply_share(planned, own, outcomes);
            samples = rest;
        }
        self.spare.push(step);
        Ok(())
    }

    /// Who has ended meanwhile is not there any more; what was computed for it is dropped.
    fn apply_share(&mut self, planned: &Planned, samples: &mut [Sampled], outcomes: &mut Vec<Outcome>) {
        let &Planned { id, share, start, draws, .. } = planned;
        let (Some(sequence), Some(state)) = (self.running.get_mut(&id), self.requests.get_mut(&id.request)) else { return };
        let (scored, drawn) = samples.split_at_mut(samples.len() - draws);
        if share.scored {
            // A preempted prompt is scored again from its start.
            state.scores.truncate(start + 1);
            state.scores.resize(start + 1, None);
            state.scores.extend(scored.iter_mut().map(|sampled| Some(record(std::mem::take(sampled)))));
        }
        if self.limits.prefix_caching {
            sequence.settle(start + share.rows);
        }
        if draws == 0 {
            return;
        }
        if !std::mem::replace(&mut state.prompt_done, true) {
            let logprobs = sequence.request.sampling.prompt_logprobs.map(|_| std::mem::take(&mut state.scores));
            outcomes.push(Outcome::Prompt { request: id.request, cached_tokens: state.cached_tokens, logprobs });
        }
        // The places of a request with several choices become those of its forks.
        sequence.slots = 1;
        self.counters.charge(sequence.contender(), 0, draws);
        let mut forks: Vec<Sequence> = (1..draws as u32).map(|choice| sequence.fork(choice)).collect();
        for (sequence, sampled) in std::iter::once(sequence).chain(&mut forks).zip(drawn) {
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
            let sampled = std::mem::take(sampled);
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
        // Of who goes on from a token that is not known yet, nothing else may depend on it.
        let most = self.limits.max_model_len;
        let can = |s: &Sequence| !s.paused && !(s.is_drawing() && (s.wants_tokens() || s.is_whole(most)));
        ids.extend(self.running.values().filter(|s| can(s) && takes_part(s)).map(|s| s.id));
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
                    if self.is_under_way() {
                        return;
                    }
                    self.preempt(victim, budget);
                }
            }
        }
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
