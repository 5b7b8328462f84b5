//! Steps that are captured and replayed: which calls reach the device, in what order and with which addresses; that a captured step
//! gives the same numbers as one that is not; and that a device that fails leaves a backend that can go on.

#![allow(clippy::unwrap_used, reason = "a test stops at the first error; the lint knows test functions only")]

use crate::support::backend::Backend;
use crate::support::decoder::{Decoder, DecoderShape, DecoderWeights};
use crate::support::emulation::Emulated;
use crate::support::experts::{Mixture, MixtureWeights};
use crate::support::faulty::Faulty;
use crate::support::recorder::{Call, Log, Recorder};
use crate::support::steps::{BLOCK, Sequence, append, greedy};
use crate::support::{Noise, error};
use tidemill_kernels::cuda::CudaBackend;
use tidemill_kernels::cuda::device::{Address, Device};
use tidemill_kernels::*;

const LIMITS: Limits = Limits { max_tokens: 300, max_samples: 40, max_positions: 2000 };
const BLOCKS: usize = 400;
const VOCABULARY: usize = 67;

fn shape() -> DecoderShape {
    DecoderShape {
        layers: 1,
        hidden: 64,
        heads: HeadShape { heads: 2, kv_heads: 1, head_dim: 64 },
        ffn: 64,
        experts: None,
        vocabulary: VOCABULARY,
        qk_norm: false,
        qkv_bias: false,
        spec: AttentionSpec { scale: 0.125, sliding_window: None, soft_cap: None, alibi: None },
    }
}

fn decoder<D: Device>(device: D, captures: bool) -> Decoder<CudaBackend<D>> {
    decoder_of(shape(), device, captures)
}

fn decoder_of<D: Device>(shape: DecoderShape, device: D, captures: bool) -> Decoder<CudaBackend<D>> {
    let backend = CudaBackend::new(device, LIMITS);
    let backend = if captures { backend.capturing() } else { backend };
    let weights = DecoderWeights::random(3, shape, Format::Bf16, Format::Bf16);
    Decoder::new(backend, &weights, WeightFormat::Auto, BLOCKS, KvDtype::Bf16)
}

/// A sequence of `len` tokens on blocks of its own, none computed.
fn sequence(noise: &mut Noise, pool: &mut std::ops::Range<u32>, len: usize) -> Sequence {
    let tokens = (0..len).map(|_| noise.below(VOCABULARY) as u32).collect();
    Sequence { tokens, table: pool.take(len.div_ceil(BLOCK)).collect(), computed: 0 }
}

/// A step that computes `rows` of each and samples the last.
fn step<'a>(sequences: impl IntoIterator<Item = &'a mut Sequence>, rows: usize) -> StepBatch {
    let mut batch = StepBatch::default();
    for sequence in sequences {
        append(&mut batch, sequence, rows);
        batch.samples.push(greedy(batch.tokens.len() as u32 - 1));
    }
    batch
}

fn run<D: Device>(decoder: &mut Decoder<CudaBackend<D>>, batch: &StepBatch) {
    decoder.forward(batch, &mut StepOutput::default()).unwrap();
}

/// The calls since the last time.
fn take(log: &Log) -> Vec<Call> {
    std::mem::take(&mut *log.lock().unwrap())
}

/// A word for each call.
fn words(calls: &[Call]) -> Vec<&'static str> {
    let word = |call: &Call| match call {
        Call::Alloc(..) => "alloc",
        Call::Free(..) => "free",
        Call::Write(..) => "write",
        Call::Read(..) => "read",
        Call::Fetch(..) => "fetch",
        Call::Fetched => "fetched",
        Call::AllocHost(..) | Call::FreeHost(_) => "host memory",
        Call::Save(..) => "save",
        Call::Restore(..) => "restore",
        Call::Launch(name, ..) => *name,
        Call::Product(_) => "product",
        Call::AllReduce(..) | Call::AllGather(..) | Call::Broadcast(..) => "exchange",
        Call::Wait => "wait",
        Call::Capture => "capture",
        Call::Captured(_) => "captured",
        Call::Replay(_) => "replay",
        Call::Forget(_) => "forget",
    };
    calls.iter().map(word).collect()
}

fn count(calls: &[Call], word: &str) -> usize {
    words(calls).iter().filter(|w| **w == word).count()
}

fn places(calls: &[Call]) -> Vec<Address> {
    calls.iter().filter_map(|call| if let Call::Write(at, _) = call { Some(*at) } else { None }).collect()
}

#[test]
fn a_step_is_done_then_captured_then_replayed_on_the_same_addresses() {
    let (device, log) = Recorder::new();
    let mut decoder = decoder(device, true);
    let noise = &mut Noise::new(1);
    let pool = &mut (0..9);
    let mut list: Vec<_> = (0..4).map(|_| sequence(noise, pool, 40)).collect();
    run(&mut decoder, &step(&mut list, 30));
    assert_eq!(count(&take(&log), "capture"), 0, "a step with prompts is not captured");

    run(&mut decoder, &step(&mut list[..3], 1));
    let plain = take(&log);
    assert_eq!(count(&plain, "capture") + count(&plain, "replay"), 0, "{plain:?}");

    run(&mut decoder, &step(&mut list[..3], 1));
    let captured = take(&log);
    let middle: Vec<&str> = words(&captured).into_iter().filter(|w| !matches!(*w, "halve" | "write")).collect();
    let (first, last) = (middle.iter().position(|w| *w == "capture"), middle.iter().position(|w| *w == "captured"));
    assert_eq!(first, Some(0));
    assert_eq!(middle[last.unwrap() + 1..], ["replay", "sample", "fetch", "fetched"], "one small copy back");
    assert_eq!(middle[1], "embedding");
    assert!(!middle.contains(&"alloc"));
    // Rows are padded to 4, and the row that pads has slot -1, token 0 and position 0.
    let Some(Call::Write(_, lists)) = captured.first() else { panic!("{captured:?}") };
    assert_eq!(lists[3 * 8..4 * 8], (-1i64).to_le_bytes());
    assert_eq!(lists[4 * 8 + 3 * 4..4 * 8 + 4 * 4], [0; 4]);
    for call in &captured {
        if let Call::Launch("embedding" | "rms_norm", launch, _) = call {
            assert_eq!(launch.grid, [4, 1, 1]);
        }
        if let Call::Launch("sample", launch, _) = call {
            assert_eq!(launch.grid, [3, 1, 1], "nothing is drawn for a row that pads");
        }
    }

    run(&mut decoder, &step(&mut list[..3], 1));
    let replayed = take(&log);
    assert_eq!(words(&replayed), ["write", "write", "replay", "write", "sample", "fetch", "fetched"]);
    assert_eq!(places(&replayed), places(&captured));
    // Four sequences are padded to the same size as three, one is not.
    run(&mut decoder, &step(&mut list, 1));
    assert_eq!(count(&take(&log), "replay"), 1);
    run(&mut decoder, &step(&mut list[..1], 1));
    assert_eq!(count(&take(&log), "replay"), 0);
}

#[test]
fn nothing_reads_memory_that_was_given_back_whatever_comes() {
    let (device, log) = Recorder::new();
    let mut decoder = decoder(device, true);
    let noise = &mut Noise::new(2);
    let mut pool = 0..BLOCKS as u32;
    let mut list: Vec<Sequence> = Vec::new();
    let (mut replays, mut captures, mut forgotten) = (0, 0, 0);
    for round in 0..400 {
        // Sequences come, some of them with contexts of several parts, and leave; now and then all at once.
        if list.len() < 40 && noise.unit() < 0.1 {
            let len = if noise.unit() < 0.3 { noise.between(500, 1500) } else { noise.between(2, 60) };
            if (pool.end - pool.start) as usize > len.div_ceil(BLOCK) {
                let mut new = sequence(noise, &mut pool, len);
                new.computed = len * 2 / 3;
                list.push(new);
            }
        }
        list.retain(|s| s.computed + 1 < s.tokens.len());
        if list.is_empty() || round % 97 == 96 {
            list.clear();
            pool = 0..BLOCKS as u32;
            let mut new = sequence(noise, &mut pool, 60);
            new.computed = 1;
            list.push(new);
        }
        let batch = match noise.below(12) {
            0 => {
                let mut batch = step(&mut list[..1], 1);
                batch.slots.fill(-1);
                batch
            }
            _ => step(&mut list, 1),
        };
        // The recorder stops the test at work on memory that is not held.
        run(&mut decoder, &batch);
        let calls = take(&log);
        replays += count(&calls, "replay");
        captures += count(&calls, "captured");
        forgotten += count(&calls, "forget");
    }
    assert!(replays > 250 && captures > 5, "{replays} replays of {captures} captures");
    assert!(forgotten > 0, "rooms grew, and what was captured was given up");
    drop(decoder);
    let last = take(&log);
    assert_eq!(count(&last, "forget"), captures - forgotten, "what is left is given back");
}

#[test]
fn a_device_that_refuses_captures_is_asked_a_few_times() {
    let (mut device, log) = Recorder::new();
    device.refuses = true;
    let mut decoder = decoder(device, true);
    let noise = &mut Noise::new(3);
    let mut list = vec![sequence(noise, &mut (0..9), 40)];
    run(&mut decoder, &step(&mut list, 30));
    for _ in 0..6 {
        run(&mut decoder, &step(&mut list, 1));
    }
    let calls = take(&log);
    assert_eq!((count(&calls, "capture"), count(&calls, "captured"), count(&calls, "replay")), (3, 3, 0));
    // Prompt, three plain steps, and three that were written down before they were done plainly.
    assert_eq!(count(&calls, "embedding"), 10);
    assert_eq!(count(&calls, "sample"), 7);
}

#[test]
fn captured_steps_give_the_same_numbers() {
    let (mut plain, mut captured) = (decoder(Emulated::new(false), false), decoder(Emulated::new(true), true));
    let mut list: Vec<Sequence> = {
        let noise = &mut Noise::new(4);
        let mut pool = 0..BLOCKS as u32;
        // Of one part and of two, and one that becomes two on the way.
        [70, 530, 530, 20, 35].map(|len| sequence(noise, &mut pool, len)).into()
    };
    let mut steps = Vec::new();
    for (index, prompt) in [(0, 50), (1, 290), (1, 230), (2, 290), (2, 219), (3, 8), (4, 20)] {
        steps.push(step([&mut list[index]], prompt));
    }
    // Three sequences, whose row that pads comes and goes, then others join, and one leaves.
    for _ in 0..5 {
        steps.push(step(&mut list[..3], 1));
    }
    for _ in 0..3 {
        steps.push(step(&mut list[..], 1));
        steps.push(step(&mut list[2..4], 1));
    }
    // A row whose keys go nowhere, a copied block, and a token that is scored.
    let mut odd = step(&mut list[2..4], 1);
    odd.copies.push((0, 399));
    odd.samples[0].score = Some(5);
    odd.samples[1].top_n = Some(3);
    steps.push(odd);
    for (i, batch) in steps.iter().enumerate() {
        let (mut want, mut got) = (StepOutput::default(), StepOutput::default());
        plain.forward(batch, &mut want).unwrap();
        captured.forward(batch, &mut got).unwrap();
        let (want_logits, logits) = (plain.ops.read(plain.logits).unwrap(), captured.ops.read(captured.logits).unwrap());
        assert!(want_logits.iter().all(|v| v.is_finite()));
        assert_eq!(logits, want_logits, "step {i}");
        assert_eq!(got, want, "step {i}");
    }
    assert!(captured.ops.device().replays >= 6, "{}", captured.ops.device().replays);
    assert_eq!(plain.ops.device().replays, 0);
}

/// Rows that pad go to no expert, and a step that is replayed has another routing than the one that was captured.
#[test]
fn captured_steps_of_experts_give_the_same_numbers() {
    let shape = DecoderShape { experts: Some(RoutingShape { experts: 4, each: 2 }), ..shape() };
    let mut plain = decoder_of(shape, Emulated::new(false), false);
    let mut captured = decoder_of(shape, Emulated::new(true), true);
    let noise = &mut Noise::new(9);
    let mut pool = 0..BLOCKS as u32;
    let mut list: Vec<_> = (0..5).map(|_| sequence(noise, &mut pool, 40)).collect();
    let mut steps = vec![step(&mut list, 20)];
    for _ in 0..4 {
        steps.push(step(&mut list[..3], 1));
        steps.push(step(&mut list[..], 1));
        steps.push(step(&mut list[2..3], 1));
    }
    for (i, batch) in steps.iter().enumerate() {
        run(&mut plain, batch);
        run(&mut captured, batch);
        let (want, got) = (plain.ops.read(plain.logits).unwrap(), captured.ops.read(captured.logits).unwrap());
        assert!(want.iter().all(|v| v.is_finite()));
        assert_eq!(got, want, "step {i}");
    }
    assert!(captured.ops.device().replays >= 6, "{}", captured.ops.device().replays);
}

/// One of several ranks puts its part in the place of the stream, and rows that pad are summed up over the ranks like all others: what lay there
/// before would double from layer to layer.
#[test]
fn experts_leave_nothing_in_rows_that_pad() {
    let mut ops = CudaBackend::new(Emulated::new(false), LIMITS).capturing();
    let noise = &mut Noise::new(10);
    let mixture = Mixture { hidden: 32, ffn: 32, routing: RoutingShape { experts: 4, each: 2 } };
    let [_, down] = MixtureWeights::random(noise, mixture, Format::F32).load(&mut ops, WeightFormat::F32);
    let (inputs, router) = (ops.load_table(noise, VOCABULARY, 32), ops.load_table(noise, VOCABULARY, 4));
    let routing = ops.alloc_routing(mixture.routing).unwrap();
    let [x, out] = [0; 2].map(|_| ops.alloc_poisoned(Rows::Tokens, 32));
    let (logits, routed) = (ops.alloc_poisoned(Rows::Tokens, 4), ops.alloc_poisoned(Rows::Routed { each: 2 }, 32));
    let mut list: Vec<_> = (0..3).map(|i| sequence(noise, &mut (i..i + 1), 9)).collect();
    ops.begin(&step(&mut list, 1)).unwrap();
    ops.embedding(inputs, x);
    ops.embedding(router, logits);
    ops.route(logits, true, routing);
    ops.expert_linear(x, down, routing, routed);
    ops.combine(routed, routing, out, Store::Replace);
    ops.run();
    let rows = ops.whole(out);
    assert!(rows[..3 * 32].iter().all(|v| v.is_finite() && *v != 0.0));
    assert_eq!(rows[3 * 32..4 * 32], [0.0; 32]);
    assert!(rows[4 * 32..].iter().all(|v| v.is_nan()), "the step is padded to four rows");
}

#[test]
fn adapters_come_and_go_between_captured_steps() {
    let (mut plain, mut captured) = (decoder(Emulated::new(false), false), decoder(Emulated::new(false), true));
    let noise = &mut Noise::new(5);
    let mut list: Vec<_> = (0..2).map(|i| sequence(noise, &mut (i * 2..i * 2 + 2), 40)).collect();
    let prompts = step(&mut list, 20);
    for both in [&mut plain, &mut captured] {
        run(both, &prompts);
        both.load_adapter(&mut Noise::new(6), 0, 4);
    }
    for round in 0..12 {
        let mut batch = step(&mut list, 1);
        if round % 4 != 3 {
            batch.adapters = vec![0, if round < 6 { NO_ADAPTER } else { 1 }];
        }
        if round == 6 {
            [&mut plain, &mut captured].into_iter().for_each(|both| both.load_adapter(&mut Noise::new(7), 1, 8));
        }
        run(&mut plain, &batch);
        run(&mut captured, &batch);
        assert_eq!(captured.ops.read(captured.logits).unwrap(), plain.ops.read(plain.logits).unwrap(), "round {round}");
    }
    assert!(captured.ops.device().replays >= 4, "{}", captured.ops.device().replays);
}

/// A prompt and some steps behind it. A step that fails is done once more. Returns what the steps gave, and how many failed.
fn with_a_failure<D: Device>(device: Faulty<D>, after: Option<usize>) -> (Vec<Vec<f32>>, usize, bool) {
    let mut decoder = decoder(device, true);
    let mut list = vec![sequence(&mut Noise::new(8), &mut (0..9), 60)];
    if let Some(after) = after {
        decoder.ops.device().fail_after(after);
    }
    let (mut logits, mut failures) = (Vec::new(), 0);
    for rows in [20, 1, 1, 1, 1] {
        let batch = step(&mut list, rows);
        let mut out = StepOutput::default();
        if let Err(error) = decoder.forward(&batch, &mut out) {
            let known = matches!(error, KernelError::Device(_) | KernelError::Memory { .. });
            assert!(known && out.samples.is_empty(), "{error}");
            failures += 1;
            decoder.forward(&batch, &mut out).unwrap();
        }
        assert_eq!(out.samples.len(), 1);
        logits.push(decoder.ops.read(decoder.logits).unwrap_or_default());
    }
    let reached = decoder.ops.device().has_failed();
    (logits, failures, reached)
}

#[test]
fn whatever_call_fails_the_step_says_so_and_the_next_one_goes_well() {
    let mut failed_steps = 0;
    for after in 0.. {
        // Its own device stops at leaks and at memory that is not held.
        let (_, failures, reached) = with_a_failure(Faulty::new(Recorder::new().0), Some(after));
        assert!(failures <= 1);
        failed_steps += failures;
        if !reached {
            assert!(after > 50, "only {after} calls");
            break;
        }
    }
    assert!(failed_steps > 40, "{failed_steps}");
}

#[test]
fn a_failure_corrupts_nothing() {
    let (want, ..) = with_a_failure(Faulty::new(Emulated::default()), None);
    for after in (0..100).step_by(9) {
        let (got, ..) = with_a_failure(Faulty::new(Emulated::default()), Some(after));
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            // The one read that fails may be this test's own.
            assert!(got.is_empty() || error(got, want) == 0.0, "failure after {after}, step {i}");
        }
    }
}
