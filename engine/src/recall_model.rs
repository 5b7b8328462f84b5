//! A model for tests: its next token is a hash of the whole history, read back through the block table it was given. A wrong
//! slot, a block freed too early, a wrong or missing copy: each shows as a wrong token.

use crate::block_pool::BLOCK_SIZE;
use crate::model::Model;
use crate::request::SamplingParams;
use std::collections::VecDeque;
use tidemill_kernels::{KernelError, KvDtype, MemoryUse, SampleRow, Sampled, StepBatch, StepOutput};

/// A prompt that starts with this token makes the model return an error.
pub(crate) const REFUSED: u32 = 90;
/// The second token of a refused prompt: the device is lost with it.
pub(crate) const LOST: u32 = 77;
/// The second token of a refused prompt: there is no memory for it.
pub(crate) const LARGE: u32 = 78;
/// A prompt that starts with this token makes the model panic.
pub(crate) const POISON: u32 = 91;

const NOTHING: (u32, u32) = (u32::MAX, u32::MAX);

pub(crate) struct RecallModel {
    pub(crate) vocabulary: usize,
    pub(crate) max_tokens: usize,
    pub(crate) max_samples: usize,
    /// Time that a step takes.
    pub(crate) pace: std::time::Duration,
    /// Steps may be submitted before the one before them is collected; nothing of them is computed before that.
    pub(crate) ahead: bool,
    slots: Vec<(u32, u32)>,
    /// What is kept of blocks, by place.
    swapped: Vec<Vec<(u32, u32)>>,
    under_way: VecDeque<StepBatch>,
    /// Of the last step.
    drawn: Vec<u32>,
}

impl RecallModel {
    pub(crate) fn new(vocabulary: usize, max_tokens: usize, max_samples: usize) -> Self {
        Self {
            vocabulary,
            max_tokens,
            max_samples,
            pace: std::time::Duration::ZERO,
            ahead: false,
            slots: Vec::new(),
            swapped: Vec::new(),
            under_way: VecDeque::new(),
            drawn: Vec::new(),
        }
    }

    pub(crate) fn reserve(&mut self, blocks: usize) {
        self.slots = vec![NOTHING; blocks * BLOCK_SIZE];
    }

    /// Blocks that are kept in a step are kept there.
    pub(crate) fn reserve_swap(&mut self, places: usize) {
        self.swapped = vec![Vec::new(); places];
    }
}

impl Model for RecallModel {
    fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    fn kv_block_bytes(&self, block_size: usize, _dtype: KvDtype) -> usize {
        block_size * 8
    }

    fn alloc_kv(&mut self, blocks: usize, block_size: usize, _dtype: KvDtype) -> Result<(), KernelError> {
        assert_eq!(block_size, BLOCK_SIZE);
        self.reserve(blocks);
        Ok(())
    }

    fn runs_ahead(&self) -> bool {
        self.ahead
    }

    fn submit(&mut self, batch: &StepBatch) -> Result<(), KernelError> {
        assert!(self.ahead && self.under_way.len() < 2);
        self.under_way.push_back(batch.clone());
        Ok(())
    }

    fn collect(&mut self, out: &mut StepOutput) -> Result<(), KernelError> {
        let batch = self.under_way.pop_front().expect("a step was submitted");
        self.compute(batch, out)
    }

    fn forward(&mut self, batch: &StepBatch, out: &mut StepOutput) -> Result<(), KernelError> {
        assert!(self.under_way.is_empty(), "a step is under way");
        self.compute(batch.clone(), out)
    }

    fn alloc_swap(&mut self, places: usize) -> Result<(), KernelError> {
        self.reserve_swap(places);
        Ok(())
    }

    fn spare_memory(&self) -> Result<Option<usize>, KernelError> {
        // Only who has a memory of his own swaps.
        Ok(self.ahead.then_some(1 << 30))
    }

    fn memory(&self) -> MemoryUse {
        MemoryUse { weights: 0, kv: self.slots.len() * 8, ..MemoryUse::default() }
    }

    fn describe(&self) -> String {
        "recall".into()
    }
}

impl RecallModel {
    fn compute(&mut self, mut batch: StepBatch, out: &mut StepOutput) -> Result<(), KernelError> {
        std::thread::sleep(self.pace);
        for (row, sample) in batch.carried.clone() {
            assert_eq!(std::mem::replace(&mut batch.tokens[row as usize], self.drawn[sample as usize]), 0);
        }
        // Whoever carries on from a step that fails gets nothing that anybody wants.
        self.drawn = vec![0; batch.samples.len()];
        for (block, place) in &batch.saved {
            let from = *block as usize * BLOCK_SIZE;
            self.swapped[*place as usize] = self.slots[from..from + BLOCK_SIZE].to_vec();
        }
        assert!(!batch.tokens.is_empty() && batch.tokens.len() <= self.max_tokens, "{} tokens", batch.tokens.len());
        assert!(batch.samples.len() <= self.max_samples, "{} samples", batch.samples.len());
        for (from, to) in &batch.copies {
            let (from, to) = (*from as usize * BLOCK_SIZE, *to as usize * BLOCK_SIZE);
            self.slots.copy_within(from..from + BLOCK_SIZE, to);
        }
        for (place, block) in &batch.restored {
            let to = *block as usize * BLOCK_SIZE;
            self.slots[to..to + BLOCK_SIZE].copy_from_slice(&self.swapped[*place as usize]);
        }
        let mut written: Vec<i64> = batch.slots.clone();
        written.sort_unstable();
        written.dedup();
        assert_eq!(written.len(), batch.tokens.len(), "two rows of one step write the same slot");
        for ((token, position), slot) in batch.tokens.iter().zip(&batch.positions).zip(&batch.slots) {
            self.slots[*slot as usize] = (*token, *position);
        }
        out.samples.clear();
        let mut next_row = 0;
        for span in &batch.sequences {
            assert_eq!(span.first_row, next_row);
            next_row += span.rows;
            assert_eq!(batch.positions[next_row as usize - 1], span.context_len - 1);
        }
        assert_eq!(next_row as usize, batch.tokens.len());
        for sample in &batch.samples {
            let span = batch.sequences.iter().rfind(|span| span.first_row <= sample.row).unwrap();
            let blocks = &batch.blocks[span.first_block as usize..];
            let end = batch.positions[sample.row as usize] + 1;
            let history: Vec<u32> = (0..end)
                .map(|p| {
                    let (token, position) =
                        self.slots[blocks[p as usize / BLOCK_SIZE] as usize * BLOCK_SIZE + p as usize % BLOCK_SIZE];
                    if position == p { token } else { u32::MAX }
                })
                .collect();
            if history[0] == REFUSED {
                return Err(match history.get(1) {
                    Some(&LOST) => KernelError::Device("lost, as the test wants it".into()),
                    Some(&LARGE) => KernelError::Memory { what: "a test", bytes: 1 },
                    _ => KernelError::Unsupported("refused, as the test wants it".into()),
                });
            }
            assert_ne!(history[0], POISON, "poisoned, as the test wants it");
            let bias = &batch.bias[sample.bias.start as usize..sample.bias.end as usize];
            let words = sample.mask.as_ref().map(|mask| mask.wait().to_vec());
            out.samples.push(draw(&history, sample, bias, words.as_deref(), self.vocabulary));
        }
        self.drawn = out.samples.iter().map(|sampled| sampled.token).collect();
        Ok(())
    }
}

fn draw(history: &[u32], sample: &SampleRow, bias: &[(u32, f32)], words: Option<&[u32]>, vocabulary: usize) -> Sampled {
    let mut hash = history.iter().fold(0xcbf2_9ce4_8422_2325, |hash, token| mix(hash, u64::from(*token)));
    if sample.temperature > 0.0 && sample.score.is_none() {
        hash = mix(mix(hash, sample.seed), sample.counter);
    }
    let allowed =
        |token: u32| words.is_none_or(|words| words.get(token as usize / 32).is_some_and(|word| word >> (token % 32) & 1 == 1));
    let banned = |token: u32| !allowed(token) || bias.iter().any(|(of, value)| *of == token && *value == f32::NEG_INFINITY);
    let mut token = (hash >> 20) as u32 % vocabulary as u32;
    for _ in 0..vocabulary {
        if banned(token) {
            token = (token + 1) % vocabulary as u32;
        }
    }
    let token = sample.score.unwrap_or(token);
    let logprob = -((mix(hash, u64::from(token)) >> 20) as u32 as f32) / 1e9;
    let top = (0..sample.top_n.unwrap_or(0)).map(|n| (n, -(n as f32))).collect();
    Sampled { token, logprob, processed_logprob: logprob, rank: 1, top, processed_top: Vec::new() }
}

fn mix(hash: u64, value: u64) -> u64 {
    (hash ^ value).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// What a choice of a request must give, computed without scheduler, blocks or batch.
pub(crate) fn expected(
    prompt: &[u32],
    sampling: &SamplingParams,
    seed: u64,
    choice: u64,
    end_of_turn: &[u32],
    vocabulary: usize,
    limit: usize,
) -> Vec<u32> {
    let mut history = prompt.to_vec();
    let limit = sampling.max_tokens.unwrap_or(usize::MAX).min(limit);
    while history.len() < prompt.len() + limit {
        let generated = history.len() - prompt.len();
        let bias: Vec<_> = match generated < sampling.min_tokens {
            true => end_of_turn.iter().chain(&sampling.stop_token_ids).map(|token| (*token, f32::NEG_INFINITY)).collect(),
            false => Vec::new(),
        };
        let row = SampleRow {
            temperature: sampling.temperature,
            seed: crate::batch::stream_seed(seed, choice),
            counter: generated as u64,
            ..scoring(None)
        };
        let token = draw(&history, &row, &bias, None, vocabulary).token;
        history.push(token);
        if end_of_turn.contains(&token) || sampling.stop_token_ids.contains(&token) {
            break;
        }
    }
    history.split_off(prompt.len())
}

/// The log-probabilities that a prompt must get.
pub(crate) fn expected_scores(prompt: &[u32], vocabulary: usize) -> Vec<Option<f32>> {
    let score = |end: usize| draw(&prompt[..end], &scoring(Some(prompt[end])), &[], None, vocabulary).logprob;
    std::iter::once(None).chain((1..prompt.len()).map(|end| Some(score(end)))).collect()
}

fn scoring(score: Option<u32>) -> SampleRow {
    SampleRow { score, ..SampleRow::greedy(0) }
}
