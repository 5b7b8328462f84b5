//! Who gives up place and blocks for whom.

use super::{Budget, Scheduler};
use crate::batch;
use crate::block_pool::{BLOCK_SIZE, BlockId};
use crate::sequence::{Sequence, SequenceId};

impl Scheduler {
    /// Who gives up blocks so that `id` can go on: a paused sequence, else of the lowest priority the youngest of whoever holds most,
    /// which may be `id` itself, but not the first in line.
    pub(super) fn victim(&self, id: SequenceId) -> Option<SequenceId> {
        let (first, last) = (self.running.keys().next().copied(), self.running.keys().next_back().copied());
        let lowest = self.running.values().filter(|one| Some(one.id.priority) == last.map(|last| last.priority));
        let others = lowest.filter(|one| Some(one.id) != first);
        let holder = others.max_by_key(|one| (self.counters.held(one.contender()), one.id));
        self.paused_victim().filter(|victim| *victim != id).or(holder.map(|one| one.id)).or(last)
    }

    /// Who gives up place and blocks to a newcomer: a paused sequence, the last in line if its priority is worse, or the youngest of a
    /// tenant that holds more than its share.
    pub(super) fn victim_for_newcomer(&self, id: SequenceId) -> Option<SequenceId> {
        let last = self.running.keys().next_back().copied();
        self.paused_victim().or(last.filter(|_| self.is_more_urgent(id))).or_else(|| self.fair_victim(id))
    }

    /// A sequence of the same priority whose tenant holds more than its share beside the newcomer's.
    pub(super) fn fair_victim(&self, id: SequenceId) -> Option<SequenceId> {
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
    pub(super) fn goes_before(&self, id: SequenceId) -> bool {
        let Some(newcomer) = self.waiting.get(&id) else { return false };
        let served = self.counters.served(newcomer.contender());
        let mut prompts = self.running.values().filter(|one| one.pending() > 1 && one.id.priority == id.priority);
        self.is_more_urgent(id)
            || self.fair_victim(id).is_some()
            || (prompts.clone().all(|one| one.tenant().id != newcomer.tenant().id)
                && prompts.any(|one| !one.paused && self.counters.served(one.contender()) > served))
    }

    /// Whether `id` has a better priority than the last in line.
    pub(super) fn is_more_urgent(&self, id: SequenceId) -> bool {
        self.running.keys().next_back().is_some_and(|last| last.priority > id.priority)
    }

    pub(super) fn paused_victim(&self) -> Option<SequenceId> {
        self.running.values().rev().find(|sequence| sequence.paused).map(|sequence| sequence.id)
    }

    /// Whether somebody has to wait for a preemption until the step that is under way is applied.
    pub(super) fn is_under_way(&mut self) -> bool {
        self.blocked_ahead |= !self.under_way.is_empty();
        self.blocked_ahead
    }

    pub(super) fn preempt(&mut self, id: SequenceId, budget: &mut Budget) {
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
        self.save(&mut sequence);
        sequence.release();
        sequence.preempted = true;
        self.counts.preemptions += 1;
        self.blocked = None;
        self.waiting.insert(id, sequence);
    }

    /// Has what a sequence computed kept, if there is room.
    fn save(&mut self, sequence: &mut Sequence) {
        let held = sequence.table.blocks();
        // What this step was to copy or to bring back for it is not there yet, and nobody wants it any more.
        let is_new = |block: &BlockId| {
            self.copies.iter().map(|(_, to)| to).chain(self.restored.iter().map(|(_, to)| to)).any(|to| to == block)
        };
        let whole = !held.iter().any(is_new);
        self.restored.retain(|(_, to)| !held.contains(to));
        self.restores.retain(|id| *id != sequence.id);
        let blocks = &held[..sequence.computed.div_ceil(BLOCK_SIZE)];
        sequence.swapped = if whole { self.swap.take(blocks.len(), sequence.computed) } else { None };
        if let Some(swapped) = &sequence.swapped {
            self.saved.extend(blocks.iter().copied().zip(swapped.places().iter().copied()));
            self.saves.push(sequence.id);
        }
    }
}
