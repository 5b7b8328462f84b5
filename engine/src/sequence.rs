//! One choice of a request, as the scheduler sees it.

use crate::block_pool::{BLOCK_SIZE, BlockId, SharedPool};
use crate::block_table::BlockTable;
use crate::fairness::Contender;
use crate::grammar::Follower;
use crate::prefix_cache::BlockHash;
use crate::request::{Request, Tenant};
use crate::swap_space::SwappedBlocks;
use std::collections::HashMap;
use std::sync::Arc;
use tidemill_kernels::TokenCount;

/// Identity of a request within one engine: the order of arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestKey(pub u64);

/// Identity of a sequence, and its place in line: by priority (lower first), then arrival, then choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId {
    /// Lower runs first.
    pub priority: i32,
    /// The request.
    pub request: RequestKey,
    /// Which of its choices.
    pub choice: u32,
}

/// Tokens of one choice, and how far their keys and values are computed.
#[derive(Debug)]
pub struct Sequence {
    /// Identity.
    pub id: SequenceId,
    /// What was asked for.
    pub request: Arc<Request>,
    /// Random stream of the request; the choice selects a stream of it.
    pub seed: u64,
    /// Prompt, then generated tokens.
    pub tokens: Vec<u32>,
    /// Tokens whose keys and values are in the cache, or will be when the steps that are under way are done; chasing
    /// [`Sequence::length`].
    pub computed: usize,
    /// Tokens behind `tokens` that steps under way draw.
    drawing: usize,
    /// The entry of the last step's samples that draws the last of these.
    pub drawn_by: u32,
    /// Where they are.
    pub table: BlockTable,
    /// Token counts for the penalties, kept only when one is active.
    pub history: Option<PenaltyHistory>,
    /// Where it is in its grammar.
    pub(crate) follower: Option<Follower>,
    /// Slots among the running sequences: `n` until the choices fork, then 1.
    pub slots: usize,
    /// The client reads too slowly: not scheduled.
    pub paused: bool,
    /// It was preempted before.
    pub preempted: bool,
    /// What it had computed when it was preempted, where that is kept.
    pub swapped: Option<SwappedBlocks>,
    /// Leading tokens of the prompt that its tenant has been charged for.
    pub charged: usize,
    /// Names of the leading full blocks, as far as they were needed.
    hashes: Vec<BlockHash>,
    /// Leading blocks that are findable under their names.
    cached_blocks: usize,
}

impl Sequence {
    /// The first choice of a request; the others fork from it when the prompt is computed.
    pub fn leader(key: RequestKey, request: Arc<Request>, seed: u64, pool: &SharedPool) -> Self {
        Self {
            id: SequenceId { priority: request.priority, request: key, choice: 0 },
            tokens: request.prompt.clone(),
            computed: 0,
            drawing: 0,
            drawn_by: 0,
            table: BlockTable::new(pool),
            history: PenaltyHistory::for_request(&request),
            follower: request.sampling.grammar.as_ref().map(|grammar| Follower::start(grammar, &request)),
            slots: request.sampling.n,
            paused: false,
            preempted: false,
            swapped: None,
            charged: 0,
            hashes: Vec::new(),
            cached_blocks: 0,
            request,
            seed,
        }
    }

    /// Another choice over the computed prompt, sharing its blocks.
    pub fn fork(&self, choice: u32) -> Self {
        let prompt = self.prompt_len();
        Self {
            id: SequenceId { choice, ..self.id },
            request: Arc::clone(&self.request),
            seed: self.seed,
            tokens: self.request.prompt.clone(),
            computed: prompt,
            drawing: 1,
            drawn_by: 0,
            table: self.table.fork(prompt),
            history: PenaltyHistory::for_request(&self.request),
            follower: self.follower.as_ref().map(Follower::fork_at_start),
            slots: 1,
            paused: self.paused,
            preempted: self.preempted,
            swapped: None,
            charged: prompt,
            hashes: self.hashes.iter().take(prompt / BLOCK_SIZE).copied().collect(),
            cached_blocks: self.cached_blocks.min(prompt / BLOCK_SIZE),
        }
    }

    /// Tokens of the prompt.
    pub fn prompt_len(&self) -> usize {
        self.request.prompt.len()
    }

    /// Tokens, those that are being drawn included.
    pub fn length(&self) -> usize {
        self.tokens.len() + self.drawing
    }

    /// Generated tokens, those that are being drawn included.
    pub fn generated(&self) -> usize {
        self.length() - self.prompt_len()
    }

    /// Tokens that are still to be computed; at least one while the sequence lives.
    pub fn pending(&self) -> usize {
        self.length() - self.computed
    }

    /// Whether its last token is not known yet.
    pub fn is_drawing(&self) -> bool {
        self.drawing > 0
    }

    /// Whether its next draw wants to know the last token: for the penalties, for the grammar, or because its choices fork there.
    pub fn wants_tokens(&self) -> bool {
        self.follower.is_some() || self.history.is_some() || self.slots > 1
    }

    /// Whether it ends with its last token, whatever that is: at most `max_model_len` tokens fit.
    pub fn is_whole(&self, max_model_len: usize) -> bool {
        let most = self.request.sampling.max_tokens.unwrap_or(usize::MAX);
        self.generated() >= most || self.length() >= max_model_len
    }

    /// Draws wanted from the last row: one, or one per choice when the prompt ends there.
    pub fn draws(&self) -> usize {
        self.slots
    }

    /// A draw might have to wait for its mask.
    pub fn is_late(&self) -> bool {
        self.follower.as_ref().is_some_and(Follower::is_late)
    }

    /// Appends a drawn token.
    pub fn push(&mut self, token: u32) {
        self.tokens.push(token);
        self.drawing = self.drawing.saturating_sub(1);
        if let Some(history) = &mut self.history {
            history.generated(token);
        }
        let generated = self.generated();
        if let Some(follower) = &mut self.follower {
            follower.advance(token, generated);
        }
    }

    /// Takes computed blocks from the cache as far as they go, leaving at least the last token to compute, because its logits
    /// are needed. Returns how many tokens need not be computed any more.
    pub fn adopt_cached(&mut self) -> usize {
        let before = self.computed;
        loop {
            let index = self.computed / BLOCK_SIZE;
            let end = (index + 1) * BLOCK_SIZE;
            if end >= self.tokens.len() {
                break;
            }
            let hash = self.hash(index);
            if !self.table.adopt(index, &hash) {
                break;
            }
            self.computed = end;
            self.cached_blocks = index + 1;
        }
        self.computed - before
    }

    /// A step that computes `rows` more tokens is under way; with `drawn_by`, an entry of its samples draws the next.
    pub fn begin(&mut self, rows: usize, drawn_by: Option<u32>) {
        self.computed += rows;
        if let Some(entry) = drawn_by {
            self.drawing += 1;
            self.drawn_by = entry;
        }
    }

    /// A step went well that computed its tokens up to the first `computed`: the blocks that are full become findable.
    pub fn settle(&mut self, computed: usize) {
        while self.cached_blocks < computed / BLOCK_SIZE {
            let hash = self.hash(self.cached_blocks);
            self.table.cache(self.cached_blocks, hash);
            self.cached_blocks += 1;
        }
    }

    /// Goes on from the tokens that were computed when it was preempted, in blocks that its table has: what the cache did not hold comes
    /// back from where it was kept. Returns (place, block) for each.
    pub fn restore(&mut self, swapped: &SwappedBlocks) -> Vec<(u32, BlockId)> {
        if swapped.tokens() <= self.computed {
            return Vec::new();
        }
        let first = self.computed / BLOCK_SIZE;
        self.computed = swapped.tokens();
        let kept = swapped.places().iter().copied().zip(self.table.blocks().iter().copied());
        kept.skip(first).collect()
    }

    /// Whose it is.
    pub fn tenant(&self) -> Tenant {
        self.request.tenant
    }

    /// Whose it is, among those of its priority.
    pub fn contender(&self) -> Contender {
        Contender { priority: self.id.priority, tenant: self.request.tenant }
    }

    /// Prompt tokens among the next `rows` rows that were not charged before; from now on they are.
    pub fn charge(&mut self, rows: usize) -> usize {
        let end = (self.computed + rows).min(self.prompt_len());
        let new = end.saturating_sub(self.charged.max(self.computed));
        self.charged = self.charged.max(end);
        new
    }

    /// Gives all blocks back; the tokens stay and are computed again later, or come back from where they are kept.
    pub fn release(&mut self) {
        debug_assert!(!self.is_drawing(), "released while a step draws for it");
        self.table.clear();
        self.computed = 0;
        self.cached_blocks = 0;
    }

    fn hash(&mut self, index: usize) -> BlockHash {
        while self.hashes.len() <= index {
            let parent = self.hashes.last().copied();
            let parent = parent.unwrap_or_else(|| BlockHash::root(self.request.generation(), self.request.cache_salt.as_deref()));
            let start = self.hashes.len() * BLOCK_SIZE;
            self.hashes.push(parent.child(&self.tokens[start..start + BLOCK_SIZE]));
        }
        self.hashes[index]
    }
}

/// How often each token occurred, for the penalties.
#[derive(Clone, Debug, Default)]
pub struct PenaltyHistory {
    counts: Vec<TokenCount>,
    index: HashMap<u32, usize>,
}

impl PenaltyHistory {
    /// Counts of the prompt, or `None` when no penalty is active.
    pub fn for_request(request: &Request) -> Option<Self> {
        let sampling = &request.sampling;
        let active = sampling.repetition_penalty != 1.0 || sampling.presence_penalty != 0.0 || sampling.frequency_penalty != 0.0;
        active.then(|| {
            let mut history = Self::default();
            for token in &request.prompt {
                history.entry(*token).in_prompt = true;
            }
            history
        })
    }

    /// One entry per token that occurred.
    pub fn counts(&self) -> &[TokenCount] {
        &self.counts
    }

    fn generated(&mut self, token: u32) {
        self.entry(token).generated += 1;
    }

    fn entry(&mut self, token: u32) -> &mut TokenCount {
        let index = *self.index.entry(token).or_insert_with(|| {
            self.counts.push(TokenCount { token, in_prompt: false, generated: 0 });
            self.counts.len() - 1
        });
        &mut self.counts[index]
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::request::{RequestId, SamplingParams};

    pub(crate) fn request(prompt: Vec<u32>, sampling: SamplingParams) -> Request {
        Request {
            id: RequestId(0),
            prompt,
            sampling,
            priority: 0,
            cache_salt: None,
            adapter: None,
            tenant: Tenant::default(),
            deadline: None,
        }
    }

    fn leader(pool: &SharedPool, prompt: usize) -> Sequence {
        let request = request((0..prompt as u32).collect(), SamplingParams { n: 2, ..Default::default() });
        Sequence::leader(RequestKey(1), Arc::new(request), 0, pool)
    }

    #[test]
    fn computed_blocks_are_found_by_an_equal_prompt_but_the_last_token_is_left() {
        let pool = SharedPool::new(8);
        let mut first = leader(&pool, 64);
        first.table.grow_to(64).unwrap();
        first.begin(64, None);
        first.settle(64);
        let mut second = leader(&pool, 64);
        assert_eq!(second.adopt_cached(), 32);
        let mut third = leader(&pool, 65);
        assert_eq!(third.adopt_cached(), 64);
        assert_eq!(third.pending(), 1);
    }

    #[test]
    fn a_half_computed_block_is_replaced_by_a_cached_one() {
        let pool = SharedPool::new(8);
        let mut slow = leader(&pool, 100);
        slow.table.grow_to(100).unwrap();
        slow.begin(10, None);
        let mut fast = leader(&pool, 100);
        fast.table.grow_to(100).unwrap();
        fast.begin(64, None);
        fast.settle(64);
        assert_eq!(slow.adopt_cached(), 54);
        assert_eq!(slow.table.blocks()[..2], fast.table.blocks()[..2]);
        assert_eq!(pool.borrow().used(), 6);
    }

    #[test]
    fn history_counts_prompt_and_output_only_when_a_penalty_is_active() {
        assert!(PenaltyHistory::for_request(&request(vec![1], SamplingParams::default())).is_none());
        let sampling = SamplingParams { presence_penalty: 0.5, ..Default::default() };
        let pool = SharedPool::new(1);
        let mut sequence = Sequence::leader(RequestKey(1), Arc::new(request(vec![4, 4, 5], sampling)), 0, &pool);
        sequence.push(5);
        sequence.push(6);
        sequence.push(6);
        let count = |token, in_prompt, generated| TokenCount { token, in_prompt, generated };
        assert_eq!(sequence.history.unwrap().counts(), [count(4, true, 0), count(5, true, 1), count(6, false, 2)]);
    }
}
