//! Writes scheduled sequences into the flat batch of a step.

use crate::block_pool::BLOCK_SIZE;
use crate::grammar::Follower;
use crate::sequence::Sequence;
use tidemill_kernels::{SampleRow, SequenceSpan, StepBatch};

/// What a sequence does in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Tokens to compute, from `computed` on.
    pub rows: usize,
    /// Whether the prompt's tokens are scored.
    pub scored: bool,
}

/// Appends the sequence's rows, its block table and its sample rows. Its table must have room for the rows. Returns the first entry of
/// the samples that draws for it.
pub fn write(batch: &mut StepBatch, sequence: &Sequence, share: Share, end_of_turn: &[u32]) -> Option<u32> {
    let (start, end) = (sequence.computed, sequence.computed + share.rows);
    let first_row = batch.tokens.len() as u32;
    let blocks = &sequence.table.blocks()[..end.div_ceil(BLOCK_SIZE)];
    batch.sequences.push(SequenceSpan {
        first_row,
        rows: share.rows as u32,
        context_len: end as u32,
        first_block: batch.blocks.len() as u32,
    });
    batch.blocks.extend(blocks.iter().map(|block| block.0));
    batch.tokens.extend_from_slice(&sequence.tokens[start..end.min(sequence.tokens.len())]);
    if end > sequence.tokens.len() {
        batch.carried.push((batch.tokens.len() as u32, sequence.drawn_by));
        batch.tokens.push(0);
    }
    batch.positions.extend(start as u32..end as u32);
    batch.slots.extend((start..end).map(|p| i64::from(blocks[p / BLOCK_SIZE].0) * BLOCK_SIZE as i64 + (p % BLOCK_SIZE) as i64));
    if share.scored {
        for position in start..end.min(sequence.prompt_len() - 1) {
            let row = first_row + (position - start) as u32;
            batch.samples.push(score(row, sequence.tokens[position + 1], sequence.request.sampling.prompt_logprobs));
        }
    }
    if end < sequence.length() {
        return None;
    }
    let (row, first_draw) = (first_row + share.rows as u32 - 1, batch.samples.len() as u32);
    for draw in 0..sequence.draws() {
        let sample = draw_row(batch, sequence, row, sequence.id.choice as usize + draw, end_of_turn);
        batch.samples.push(sample);
    }
    Some(first_draw)
}

/// Entries of [`StepBatch::samples`] that a share takes.
pub fn samples(sequence: &Sequence, share: Share) -> usize {
    let end = sequence.computed + share.rows;
    let scored = if share.scored { end.min(sequence.prompt_len() - 1).saturating_sub(sequence.computed) } else { 0 };
    scored + if end == sequence.length() { sequence.draws() } else { 0 }
}

fn draw_row(batch: &mut StepBatch, sequence: &Sequence, row: u32, choice: usize, end_of_turn: &[u32]) -> SampleRow {
    let sampling = &sequence.request.sampling;
    let history = batch.history.len() as u32;
    if let Some(counts) = &sequence.history {
        batch.history.extend_from_slice(counts.counts());
    }
    let bias = batch.bias.len() as u32;
    batch.bias.extend_from_slice(&sampling.logit_bias);
    // A grammar's mask knows of `min_tokens` itself: where it can only end, it does.
    if sequence.follower.is_none() && sequence.generated() < sampling.min_tokens {
        let ends: &[u32] = if sampling.ignore_eos { &[] } else { end_of_turn };
        batch.bias.extend(ends.iter().chain(&sampling.stop_token_ids).map(|token| (*token, f32::NEG_INFINITY)));
    }
    SampleRow {
        row,
        score: None,
        temperature: sampling.temperature,
        top_k: sampling.top_k,
        // A top-p of 0 means the likeliest token alone.
        top_p: sampling.top_p.max(f32::MIN_POSITIVE),
        min_p: sampling.min_p,
        repetition_penalty: sampling.repetition_penalty,
        presence_penalty: sampling.presence_penalty,
        frequency_penalty: sampling.frequency_penalty,
        history: history..batch.history.len() as u32,
        bias: bias..batch.bias.len() as u32,
        mask: sequence.follower.as_ref().map(Follower::mask),
        seed: stream_seed(sequence.seed, choice as u64),
        counter: sequence.generated() as u64,
        top_n: sampling.logprobs,
    }
}

fn score(row: u32, token: u32, top_n: Option<u32>) -> SampleRow {
    SampleRow { score: Some(token), top_n, ..SampleRow::greedy(row) }
}

/// The random stream of choice `choice`: the request's seed itself for the first, a mixed one for the others (the finaliser of
/// splitmix64, Steele et al. 2014), so that neighbouring seeds share no streams.
pub fn stream_seed(seed: u64, choice: u64) -> u64 {
    if choice == 0 {
        return seed;
    }
    let mut z = seed.wrapping_add(choice.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block_pool::SharedPool;
    use crate::request::SamplingParams;
    use crate::sequence::tests::request;
    use crate::sequence::{RequestKey, Sequence};
    use std::sync::Arc;

    fn sequence(prompt: usize, sampling: SamplingParams) -> (Sequence, SharedPool) {
        let pool = SharedPool::new(8);
        let request = request((100..100 + prompt as u32).collect(), sampling);
        let mut sequence = Sequence::leader(RequestKey(0), Arc::new(request), 7, &pool);
        sequence.table.grow_to(prompt + 8).unwrap();
        (sequence, pool)
    }

    #[test]
    fn rows_name_their_slots_and_the_last_one_is_sampled_for_every_choice() {
        let (mut sequence, _pool) = sequence(40, SamplingParams { n: 3, ..Default::default() });
        sequence.begin(30, None);
        let mut batch = StepBatch::default();
        let share = Share { rows: 10, scored: false };
        write(&mut batch, &sequence, share, &[]);
        let blocks = sequence.table.blocks();
        assert_eq!(batch.tokens, (130..140).collect::<Vec<_>>());
        assert_eq!(batch.positions, (30..40).collect::<Vec<_>>());
        assert_eq!(batch.slots[1], i64::from(blocks[0].0) * 32 + 31);
        assert_eq!(batch.slots[2], i64::from(blocks[1].0) * 32);
        assert_eq!(batch.sequences, [SequenceSpan { first_row: 0, rows: 10, context_len: 40, first_block: 0 }]);
        assert_eq!(batch.samples.iter().map(|s| s.row).collect::<Vec<_>>(), [9, 9, 9]);
        assert_eq!(samples(&sequence, share), 3);
        let mut seeds: Vec<_> = batch.samples.iter().map(|s| s.seed).collect();
        seeds.dedup();
        assert_eq!(seeds.len(), 3);
    }

    #[test]
    fn end_tokens_are_forbidden_until_min_tokens() {
        let sampling =
            SamplingParams { min_tokens: 1, stop_token_ids: vec![9], logit_bias: vec![(5, 2.0)], ..Default::default() };
        let (mut sequence, _pool) = sequence(4, sampling);
        let mut batch = StepBatch::default();
        write(&mut batch, &sequence, Share { rows: 4, scored: false }, &[2, 3]);
        let never = f32::NEG_INFINITY;
        assert_eq!(batch.bias, [(5, 2.0), (2, never), (3, never), (9, never)]);
        sequence.begin(4, Some(0));
        sequence.push(8);
        batch.clear();
        write(&mut batch, &sequence, Share { rows: 1, scored: false }, &[2, 3]);
        assert_eq!(batch.bias, [(5, 2.0)]);
        assert_eq!(batch.samples[0].counter, 1);
    }

    #[test]
    fn a_row_whose_token_is_being_drawn_names_who_draws_it() {
        let (mut sequence, _pool) = sequence(4, SamplingParams { min_tokens: 1, ..Default::default() });
        let mut batch = StepBatch::default();
        assert_eq!(write(&mut batch, &sequence, Share { rows: 4, scored: false }, &[2]), Some(0));
        sequence.begin(4, Some(6));
        batch.clear();
        batch.tokens.push(9);
        assert_eq!(write(&mut batch, &sequence, Share { rows: 1, scored: false }, &[2]), Some(0));
        assert_eq!((batch.tokens, batch.positions, batch.carried), (vec![9, 0], vec![4], vec![(1, 6)]));
        // It is the second token that is drawn there: the first is on its way.
        assert_eq!((batch.samples[0].counter, batch.bias.len()), (1, 0));
        sequence.begin(1, Some(0));
        assert_eq!((sequence.length(), sequence.pending()), (6, 1));
        sequence.push(8);
        sequence.push(7);
        assert_eq!((sequence.length(), sequence.computed, sequence.tokens[4..].to_vec()), (6, 5, vec![8, 7]));
    }

    #[test]
    fn scored_rows_name_the_next_prompt_token() {
        let (mut sequence, _pool) = sequence(5, SamplingParams { prompt_logprobs: Some(2), ..Default::default() });
        let mut batch = StepBatch::default();
        let share = Share { rows: 3, scored: true };
        write(&mut batch, &sequence, share, &[]);
        assert_eq!(
            batch.samples.iter().map(|s| (s.row, s.score)).collect::<Vec<_>>(),
            [(0, Some(101)), (1, Some(102)), (2, Some(103))]
        );
        assert_eq!(samples(&sequence, share), 3);
        sequence.begin(3, None);
        batch.clear();
        let share = Share { rows: 2, scored: true };
        write(&mut batch, &sequence, share, &[]);
        assert_eq!(batch.samples.iter().map(|s| (s.row, s.score)).collect::<Vec<_>>(), [(0, Some(104)), (1, None)]);
        assert_eq!(samples(&sequence, share), 2);
    }
}
