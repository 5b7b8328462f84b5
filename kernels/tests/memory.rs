//! What steps reserve is what was left for them when the cache was sized.

#![allow(clippy::unwrap_used, reason = "a test stops at the first error; the lint knows test functions only")]

use std::collections::HashMap;

use crate::support::decoder::{Decoder, DecoderShape, DecoderWeights};
use crate::support::recorder::{Call, Log, Recorder};
use crate::support::steps::{BLOCK, Sequence, append, greedy};
use tidemill_kernels::cuda::CudaBackend;
use tidemill_kernels::*;

const LIMITS: Limits = Limits { max_tokens: 96, max_samples: 40, max_positions: 20_000 };
/// Free of a recorder's card, and the twentieth of it that stays free in any case.
const FREE: usize = 64 << 30;
const MARGIN: usize = 4 << 30;
/// What sampling is told of 40 rows, which comes out of the margin.
const SAMPLING: usize = 16 << 10;

fn heads(head_dim: usize) -> HeadShape {
    HeadShape { heads: 4, kv_heads: 2, head_dim }
}

/// Sequences with as long a context as there may be, on the same blocks: what is at the front of all of them is kept once.
fn sequences(count: usize, computed: usize) -> Vec<Sequence> {
    let table: Vec<u32> = (0..LIMITS.max_positions.div_ceil(BLOCK) as u32).collect();
    let one = |i: usize| {
        let mut table = table.clone();
        // Each writes to a block of its own.
        table[computed / BLOCK] = (table.len() + i) as u32;
        Sequence { tokens: vec![0; LIMITS.max_positions], table, computed }
    };
    (0..count).map(one).collect()
}

fn step(sequences: &mut [Sequence], rows: usize) -> StepBatch {
    let mut batch = StepBatch::default();
    for sequence in sequences {
        append(&mut batch, sequence, rows);
        batch.samples.push(greedy(batch.tokens.len() as u32 - 1));
    }
    batch
}

/// The most that was reserved at once by the calls since the last time.
fn reserved(log: &Log) -> usize {
    let (mut held, mut now, mut most) = (HashMap::new(), 0isize, 0isize);
    for call in std::mem::take(&mut *log.lock().unwrap()) {
        match call {
            Call::Alloc(at, bytes) => {
                held.insert(at, bytes);
                now += bytes as isize;
            }
            Call::Free(at) => now -= held.remove(&at).map_or(0, |bytes| bytes as isize),
            _ => {}
        }
        most = most.max(now);
    }
    most as usize
}

#[test]
fn the_largest_steps_reserve_what_the_cache_left_them_and_no_more() {
    for (head_dim, format) in [(64, Format::Bf16), (128, Format::Q8_0), (32, Format::Bf16)] {
        let shape = DecoderShape {
            layers: 1,
            hidden: 64,
            heads: heads(head_dim),
            ffn: 64,
            experts: None,
            vocabulary: 67,
            qk_norm: false,
            qkv_bias: false,
            spec: AttentionSpec { scale: 0.125, sliding_window: None, soft_cap: None, alibi: None },
        };
        let (device, log) = Recorder::new();
        let backend = CudaBackend::new(device, LIMITS).capturing();
        let weights = DecoderWeights::random(3, shape, format, format);
        let mut decoder = Decoder::new(backend, &weights, WeightFormat::Auto, 700, KvDtype::Bf16);
        let needed = FREE - MARGIN - decoder.ops.spare_memory(shape.heads).unwrap().unwrap();
        reserved(&log);

        let mut out = StepOutput::default();
        let last = LIMITS.max_positions - 8;
        // Prompts, then as many sequences as may run, each of them, captured and not.
        decoder.forward(&step(&mut sequences(1, 0), LIMITS.max_tokens), &mut out).unwrap();
        decoder.forward(&step(&mut sequences(24, last), 4), &mut out).unwrap();
        for count in [1, 7, 33, LIMITS.max_samples] {
            let mut running = sequences(count, last);
            (0..3).for_each(|_| decoder.forward(&step(&mut running, 1), &mut out).unwrap());
        }
        let most = reserved(&log);
        assert!(most <= needed + SAMPLING, "{most} bytes reserved, {needed} left; heads of {head_dim}");
        // Nor is the cache given much less than it could have.
        assert!(needed <= 4 * most, "{most} bytes reserved, {needed} left; heads of {head_dim}");
    }
}
