//! Steps that are begun before the one before them is collected, and blocks that go to the machine's memory and come back: the same
//! numbers, bit for bit, as with neither.

#![allow(clippy::unwrap_used, reason = "a test stops at the first error; the lint knows test functions only")]

use crate::support::Noise;
use crate::support::decoder::{Decoder, DecoderShape, DecoderWeights};
use crate::support::emulation::Emulated;
use crate::support::faulty::Faulty;
use crate::support::recorder::{Call, Recorder};
use crate::support::steps::{BLOCK, Sequence, append};
use tidemill_kernels::cpu::{CpuBackend, CpuOptions};
use tidemill_kernels::cuda::CudaBackend;
use tidemill_kernels::cuda::device::Device;
use tidemill_kernels::reference::Reference;
use tidemill_kernels::*;

const LIMITS: Limits = Limits { max_tokens: 80, max_samples: 8, max_positions: 256 };
const BLOCKS: usize = 40;
const VOCABULARY: usize = 67;

fn decoder<O: Ops>(ops: O, dtype: KvDtype) -> Decoder<O> {
    let shape = DecoderShape {
        experts: None,
        layers: 2,
        hidden: 64,
        heads: HeadShape { heads: 2, kv_heads: 1, head_dim: 64 },
        ffn: 64,
        vocabulary: VOCABULARY,
        qk_norm: false,
        qkv_bias: false,
        spec: AttentionSpec { scale: 0.125, sliding_window: None, soft_cap: None, alibi: None },
    };
    let weights = DecoderWeights::random(3, shape, Format::Bf16, Format::Bf16);
    Decoder::new(ops, &weights, WeightFormat::Auto, BLOCKS, dtype)
}

fn cuda<D: Device>(device: D, captures: bool) -> Decoder<CudaBackend<D>> {
    let backend = CudaBackend::new(device, LIMITS);
    decoder(if captures { backend.capturing() } else { backend }, KvDtype::Bf16)
}

/// Who takes part in each step, and with how many rows.
type Script = Vec<Vec<(usize, usize)>>;

/// Prompts that come in one or several chunks beside others that decode, and sequences that sit out a step.
fn script(noise: &mut Noise, prompts: &[usize], steps: usize) -> Script {
    let mut left: Vec<usize> = prompts.to_vec();
    let mut script = Vec::new();
    for step in 0..steps {
        let mut room = LIMITS.max_tokens;
        let mut here = Vec::new();
        for (i, left) in left.iter_mut().enumerate().take(1 + step / 2) {
            if noise.unit() < 0.2 {
                continue;
            }
            let rows = if *left > 1 { noise.between(1, *left).min(room.saturating_sub(8)) } else { 1 };
            if rows > 0 {
                *left = left.saturating_sub(rows);
                room -= rows;
                here.push((i, rows));
            }
        }
        if !here.is_empty() {
            script.push(here);
        }
    }
    // At last nothing but decoding, which is captured.
    let done = left.iter().enumerate().filter(|(_, left)| **left == 0).map(|(i, _)| (i, 1)).collect::<Vec<_>>();
    script.extend(std::iter::repeat_n(done, 5));
    script
}

/// Does the script, each step after the one before it or one step ahead. What is drawn for a sequence is its next token.
fn run<O: Ops>(decoder: &mut Decoder<O>, script: &Script, prompts: &[usize], ahead: bool) -> Vec<Vec<Sampled>> {
    let noise = &mut Noise::new(9);
    let mut pool = 0..BLOCKS as u32;
    let mut list: Vec<Sequence> = prompts
        .iter()
        .map(|&len| Sequence {
            tokens: (0..len).map(|_| noise.below(VOCABULARY) as u32).collect(),
            table: pool.by_ref().take((len + script.len()).div_ceil(BLOCK)).collect(),
            computed: 0,
        })
        .collect();
    let (mut all, mut out) = (Vec::new(), StepOutput::default());
    // Who drew in the step under way.
    let mut under_way: Option<Vec<usize>> = None;
    for step in script {
        let mut batch = StepBatch::default();
        let mut draws = Vec::new();
        for &(i, rows) in step {
            let sequence = &mut list[i];
            let (unknown, known) = (sequence.computed == sequence.tokens.len(), sequence.tokens.len());
            if unknown {
                let entry = under_way.as_ref().and_then(|drew| drew.iter().position(|by| *by == i)).unwrap();
                batch.carried.push((batch.tokens.len() as u32, entry as u32));
                sequence.tokens.push(0);
            }
            append(&mut batch, sequence, rows);
            sequence.tokens.truncate(known);
            if sequence.computed >= known {
                let row = batch.tokens.len() as u32 - 1;
                let temperature = if i % 2 == 0 { 0.0 } else { 0.8 };
                let (seed, counter) = (i as u64, sequence.computed as u64);
                batch.samples.push(SampleRow { temperature, seed, counter, top_n: Some(2), ..SampleRow::greedy(row) });
                draws.push(i);
            }
        }
        if ahead {
            decoder.submit(&batch).unwrap();
            if let Some(drew) = under_way.replace(draws) {
                collect(decoder, &drew, &mut list, &mut all, &mut out);
            }
        } else {
            decoder.forward(&batch, &mut out).unwrap();
            take(&draws, &mut list, &mut all, &out);
        }
    }
    if let Some(drew) = under_way {
        collect(decoder, &drew, &mut list, &mut all, &mut out);
    }
    all
}

fn collect<O: Ops>(
    decoder: &mut Decoder<O>,
    drew: &[usize],
    list: &mut [Sequence],
    all: &mut Vec<Vec<Sampled>>,
    out: &mut StepOutput,
) {
    decoder.ops.collect(out).unwrap();
    take(drew, list, all, out);
}

fn take(drew: &[usize], list: &mut [Sequence], all: &mut Vec<Vec<Sampled>>, out: &StepOutput) {
    assert_eq!(out.samples.len(), drew.len());
    for (i, sampled) in drew.iter().zip(&out.samples) {
        list[*i].tokens.push(sampled.token);
    }
    all.push(out.samples.clone());
}

#[test]
fn steps_that_run_ahead_give_the_same_tokens() {
    let mut replays = 0;
    for case in 0..4 {
        let prompts = [30, 5, 70, 1, 40];
        let script = script(&mut Noise::new(case), &prompts, 14);
        let want = run(&mut cuda(Emulated::new(false), false), &script, &prompts, false);
        for captures in [false, true] {
            let mut ahead = cuda(Emulated::new(case % 2 == 1), captures);
            assert!(run(&mut ahead, &script, &prompts, true) == want, "case {case}, captures {captures}");
            replays += ahead.ops.device().replays;
        }
    }
    assert!(replays >= 4, "{replays}");
}

#[test]
fn nothing_waits_between_two_submitted_steps() {
    let (device, log) = Recorder::new();
    let mut decoder = cuda(device, true);
    let prompts = [10, 12];
    run(&mut decoder, &vec![vec![(0, 10), (1, 12)]; 1], &prompts, true);
    let script: Script = [vec![vec![(0, 10), (1, 12)]], vec![vec![(0, 1), (1, 1)]; 6]].concat();
    log.lock().unwrap().clear();
    run(&mut decoder, &script, &prompts, true);
    let calls = std::mem::take(&mut *log.lock().unwrap());
    assert!(!calls.iter().any(|call| matches!(call, Call::Wait | Call::Read(..))), "{calls:?}");
    // Each step is handed over behind the fetch of the next, but the last.
    let order: Vec<char> = calls
        .iter()
        .filter_map(|call| match call {
            Call::Fetch(..) => Some('f'),
            Call::Fetched => Some('c'),
            Call::Launch("carry", ..) => Some('k'),
            _ => None,
        })
        .collect();
    assert_eq!(order.iter().collect::<String>(), "fkfckfckfckfckfckfcc");
}

/// The first of several ranks gives rows the tokens that it drew, and tells the others; these draw nothing. Neither waits.
#[test]
fn the_first_rank_tells_the_others_behind_what_draws_and_before_what_embeds() {
    for rank in 0..2 {
        let (mut device, log) = Recorder::new();
        device.place = Place { rank, ranks: 2 };
        let mut decoder = cuda(device, false);
        let mut list = [0, 1].map(|block| Sequence { tokens: vec![1; 20], table: vec![block], computed: 0 });
        let mut out = StepOutput::default();
        for step in 0..6u32 {
            let mut batch = StepBatch::default();
            for sequence in &mut list {
                append(&mut batch, sequence, if step == 0 { 10 } else { 1 });
                batch.samples.push(SampleRow::greedy(batch.tokens.len() as u32 - 1));
            }
            if step == 1 {
                log.lock().unwrap().clear();
            }
            if step > 0 {
                batch.carried = vec![(0, 0), (1, 1)];
            }
            decoder.submit(&batch).unwrap();
            if step > 0 {
                decoder.ops.collect(&mut out).unwrap();
                assert_eq!(out.samples.len(), if rank == 0 { 2 } else { 0 });
            }
        }
        decoder.ops.collect(&mut out).unwrap();
        let calls = std::mem::take(&mut *log.lock().unwrap());
        assert!(!calls.iter().any(|call| matches!(call, Call::Wait | Call::Read(..))), "{calls:?}");
        let order = calls.iter().filter_map(|call| match call {
            Call::Launch("carry", ..) => Some('k'),
            Call::Broadcast(_, count) => {
                assert_eq!(*count, 2);
                Some('b')
            }
            Call::Launch("embedding", ..) => Some('e'),
            Call::Launch("sample", ..) => Some('s'),
            Call::Fetch(_, bytes) => {
                assert_eq!(*bytes > 0, rank == 0);
                Some('f')
            }
            Call::Fetched => Some('c'),
            _ => None,
        });
        let step = if rank == 0 { "kbesfc" } else { "befc" };
        assert_eq!(order.collect::<String>(), format!("{}c", step.repeat(5)), "rank {rank}");
    }
}

#[test]
fn rows_carry_on_only_from_what_the_step_before_draws() {
    let mut decoder = cuda(Emulated::new(false), false);
    let mut sequence = Sequence { tokens: vec![1, 2, 3, 4], table: vec![0], computed: 0 };
    let mut first = StepBatch::default();
    append(&mut first, &mut sequence, 2);
    first.samples = vec![SampleRow::greedy(1), SampleRow { score: Some(3), ..SampleRow::greedy(0) }];
    let mut next = StepBatch::default();
    append(&mut next, &mut sequence, 1);
    next.samples.push(SampleRow::greedy(0));
    let carried = |pair| StepBatch { carried: vec![pair], ..next.clone() };
    let mut out = StepOutput::default();
    let refused = |error: Result<(), KernelError>| matches!(error, Err(KernelError::Shape { op: "begin", .. }));
    assert!(refused(decoder.submit(&carried((0, 0)))), "there was no step");
    for pair in [(0, 1), (0, 2), (1, 0)] {
        decoder.submit(&first).unwrap();
        assert!(refused(decoder.submit(&carried(pair))), "{pair:?}");
        decoder.ops.collect(&mut out).unwrap();
    }
    decoder.submit(&first).unwrap();
    decoder.submit(&carried((0, 0))).unwrap();
    // Two are under way, and no more; nor is anything finished out of turn.
    assert!(matches!(decoder.submit(&first), Err(KernelError::Limit(_))));
    decoder.ops.collect(&mut out).unwrap();
    assert!(matches!(decoder.forward(&first, &mut out), Err(KernelError::Limit(_))));
    decoder.ops.collect(&mut out).unwrap();
    assert!(matches!(decoder.ops.collect(&mut out), Err(KernelError::Limit(_))));
    decoder.forward(&first, &mut out).unwrap();
    // The processor computes when it is waited for: nothing is under way there.
    let limits = LIMITS;
    let mut cpu = decoder_on_the_processor(limits);
    assert!(!cpu.ops.runs_ahead());
    cpu.forward(&first, &mut out).unwrap();
    assert!(refused(cpu.forward(&carried((0, 0)), &mut out)));
    let mut reference = self::decoder(Reference::new(limits), KvDtype::F32);
    reference.forward(&first, &mut out).unwrap();
    assert!(refused(reference.forward(&carried((0, 0)), &mut out)));
}

fn decoder_on_the_processor(limits: Limits) -> Decoder<CpuBackend> {
    decoder(CpuBackend::new(CpuOptions { threads: 1, isa: None, limits }).unwrap(), KvDtype::F32)
}

/// A sequence of two blocks decodes; in between its blocks go away, others use their place, and they come back elsewhere. A step that fails
/// is done once more; where it was to save blocks, nothing is known of these, and that is the end.
fn with_swaps<D: Device>(device: D, swaps: bool, fails: impl Fn(&D)) -> Vec<Sampled> {
    let mut decoder = cuda(device, true);
    let kv = decoder.kv;
    decoder.ops.alloc_swap(kv, 5).unwrap();
    let noise = &mut Noise::new(4);
    let tokens = (0..40).map(|_| noise.below(VOCABULARY) as u32).collect();
    let mut one = Sequence { tokens, table: vec![7, 3], computed: 0 };
    let mut again = |batch: &StepBatch| -> Vec<Sampled> {
        let mut out = StepOutput::default();
        if decoder.forward(batch, &mut out).is_err() {
            if !batch.saved.is_empty() {
                return Vec::new();
            }
            decoder.forward(batch, &mut out).unwrap();
        }
        if batch.sequences[0].context_len == 36 {
            fails(decoder.ops.device());
        }
        out.samples
    };
    let mut all = Vec::new();
    for step in 0..8u32 {
        let mut batch = StepBatch::default();
        let rows = if step == 0 { 36 } else { 1 };
        append(&mut batch, &mut one, rows);
        batch.samples.push(SampleRow { top_n: Some(3), ..SampleRow::greedy(rows as u32 - 1) });
        let sampled = again(&batch).remove(0);
        one.tokens.truncate(one.computed);
        one.tokens.push(sampled.token);
        all.push(sampled);
        if !swaps || step % 2 == 1 {
            continue;
        }
        // What is saved is saved before anything else writes to the blocks.
        let tokens = (0..64).map(|i| (i * 5 + step) % VOCABULARY as u32).collect();
        let mut other = Sequence { tokens, table: one.table.clone(), computed: 0 };
        let mut batch = StepBatch { saved: vec![(one.table[0], 4), (one.table[1], step % 4)], ..StepBatch::default() };
        append(&mut batch, &mut other, 64);
        batch.samples.push(SampleRow::greedy(63));
        if again(&batch).is_empty() {
            return all;
        }
        // Back into other blocks; a copy that nobody wants any more comes before, and does no harm.
        one.table = vec![10 + step, 30 - step];
        let restored = vec![(4, one.table[0]), (step % 4, one.table[1])];
        let mut idle = StepBatch { copies: vec![(7, one.table[0])], restored, ..StepBatch::default() };
        append(&mut idle, &mut Sequence { tokens: vec![1], table: vec![0], computed: 0 }, 1);
        again(&idle);
    }
    all
}

#[test]
fn blocks_come_back_as_they_went() {
    let want = with_swaps(Emulated::new(false), false, |_| ());
    assert!(with_swaps(Emulated::new(true), true, |_| ()) == want);
}

#[test]
fn a_failure_between_going_and_coming_back_corrupts_nothing() {
    let want = with_swaps(Emulated::new(false), false, |_| ());
    let (mut whole, mut cut) = (0, 0);
    for after in (0..120).step_by(7) {
        let got = with_swaps(Faulty::new(Emulated::new(false)), true, |device| device.fail_after(after));
        assert!(want.starts_with(&got), "failure after {after} calls");
        *if got.len() == want.len() { &mut whole } else { &mut cut } += 1;
    }
    assert!(whole > 0 && cut > 0, "{whole} {cut}");
}

#[test]
fn swaps_name_blocks_and_places_that_are_there() {
    let mut decoder = cuda(Recorder::new().0, false);
    let mut sequence = Sequence { tokens: vec![1, 2], table: vec![0], computed: 0 };
    let mut step = StepBatch::default();
    append(&mut step, &mut sequence, 1);
    let mut out = StepOutput::default();
    let mut refused = |decoder: &mut Decoder<CudaBackend<Recorder>>, saved: (u32, u32)| {
        let (save, restore) =
            (StepBatch { saved: vec![saved], ..step.clone() }, StepBatch { restored: vec![(saved.1, saved.0)], ..step.clone() });
        [save, restore]
            .iter()
            .all(|batch| matches!(decoder.forward(batch, &mut out), Err(KernelError::Shape { op: "begin", .. })))
    };
    assert!(refused(&mut decoder, (0, 0)), "there are no places");
    let kv = decoder.kv;
    assert!(matches!(decoder.ops.alloc_swap(kv, usize::MAX / 2), Err(KernelError::Shape { .. } | KernelError::Memory { .. })));
    decoder.ops.alloc_swap(kv, 3).unwrap();
    assert!(!refused(&mut decoder, (0, 2)));
    assert!(refused(&mut decoder, (0, 3)) && refused(&mut decoder, (BLOCKS as u32, 0)));
    assert!(decoder.ops.alloc_swap(kv, 3).is_err(), "once");
    assert!(matches!(decoder_on_the_processor(LIMITS).ops.alloc_swap(kv, 3), Err(KernelError::Unsupported(_))));
}
