//! Who is let in, and with which blocks.

use super::{Budget, Scheduler};
use crate::block_pool::BLOCK_SIZE;
use crate::sequence::SequenceId;

impl Scheduler {
    /// Who is let in next: of the best priority that waits, the first in line of the tenant that was served least.
    pub(super) fn next_in_line(&self) -> Option<SequenceId> {
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
    pub(super) fn admit(&mut self, budget: &mut Budget) {
        while let Some(id) = self.next_in_line() {
            // With the budget spent, only one who goes before those that spent it gets a place, and is first in the next step.
            let spent = budget.tokens == 0 || budget.samples == 0;
            if spent && !self.goes_before(id) {
                return;
            }
            while !self.fits(id) {
                let Some(victim) = self.victim_for_newcomer(id) else { return };
                if self.is_under_way() {
                    return;
                }
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
    pub(super) fn fits(&mut self, id: SequenceId) -> bool {
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
        if let Some(swapped) = sequence.swapped.take() {
            self.restored.extend(sequence.restore(&swapped));
            self.restores.push(id);
            self.emptied.push(swapped);
            self.counts.restored += 1;
        }
        if let Some(state) = state.filter(|_| !sequence.preempted) {
            state.cached_tokens += hits;
            self.counts.prefix_hits += hits as u64;
        }
        self.blocked = None;
        true
    }
}
