//! Ragged steps over a paged cache.

use tidemill_kernels::{SampleRow, SequenceSpan, StepBatch};

use super::Noise;

pub const BLOCK: usize = 32;

/// A greedy sample of a row.
pub fn greedy(row: u32) -> SampleRow {
    SampleRow::greedy(row)
}

/// A sequence with its tokens and its blocks.
#[derive(Clone, Debug)]
pub struct Sequence {
    pub tokens: Vec<u32>,
    pub table: Vec<u32>,
    /// Tokens whose keys and values are in the cache.
    pub computed: usize,
}

/// Appends the next `rows` tokens of a sequence to a step.
pub fn append(batch: &mut StepBatch, sequence: &mut Sequence, rows: usize) {
    let first = sequence.computed;
    batch.sequences.push(SequenceSpan {
        first_row: batch.tokens.len() as u32,
        rows: rows as u32,
        context_len: (first + rows) as u32,
        first_block: batch.blocks.len() as u32,
    });
    batch.blocks.extend_from_slice(&sequence.table);
    for position in first..first + rows {
        batch.tokens.push(sequence.tokens[position]);
        batch.positions.push(position as u32);
        let block = sequence.table[position / BLOCK] as usize;
        batch.slots.push((block * BLOCK + position % BLOCK) as i64);
    }
    sequence.computed += rows;
}

/// `count` sequences of up to `longest` tokens on scattered blocks of a pool of `blocks`.
pub fn sequences(noise: &mut Noise, count: usize, longest: usize, vocabulary: usize, blocks: usize) -> Vec<Sequence> {
    let mut pool: Vec<u32> = (0..blocks as u32).collect();
    for i in (1..pool.len()).rev() {
        pool.swap(i, noise.below(i + 1));
    }
    (0..count)
        .map(|_| {
            let len = noise.between(1, longest);
            let tokens = (0..len).map(|_| noise.below(vocabulary) as u32).collect();
            let table = (0..len.div_ceil(BLOCK)).map(|_| pool.pop().expect("enough blocks")).collect();
            Sequence { tokens, table, computed: 0 }
        })
        .collect()
}

/// Steps that take all sequences to their ends: chunks of random sizes, prefill and decode mixed, at most `max_tokens` rows each.
/// Every step samples the last row of each sequence.
pub fn ragged(noise: &mut Noise, sequences: &mut [Sequence], max_tokens: usize) -> Vec<StepBatch> {
    let mut steps = Vec::new();
    while sequences.iter().any(|s| s.computed < s.tokens.len()) {
        let mut batch = StepBatch::default();
        for s in sequences.iter_mut() {
            let left = s.tokens.len() - s.computed;
            let room = max_tokens - batch.tokens.len();
            if left == 0 || room == 0 {
                continue;
            }
            let wanted = if noise.unit() < 0.4 { 1 } else { noise.between(1, left) };
            append(&mut batch, s, wanted.min(left).min(room));
            batch.samples.push(greedy(batch.tokens.len() as u32 - 1));
        }
        steps.push(batch);
    }
    steps
}
