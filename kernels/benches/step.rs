//! Time of a step of a decoder with the shape of SmolLM2-135M, with a breakdown by kind of operation.
//!
//! `cargo bench -p tidemill-kernels --bench step -- [threads] [portable|avx2|avx512|amx] [w4|w8] [decode1|shared32|prefill512|lora8|…]`
#![allow(clippy::print_stdout, reason = "a benchmark prints its numbers")]
#![allow(clippy::unwrap_used, reason = "a benchmark stops at the first error")]

#[path = "../tests/support/mod.rs"]
mod support;

use std::time::{Duration, Instant};

use support::Noise;
use support::decoder::{Decoder, DecoderShape, DecoderWeights};
use support::steps::{Sequence, append, greedy};
use tidemill_kernels::cpu::{CpuBackend, CpuOptions};
use tidemill_kernels::isa::Isa;
use tidemill_kernels::*;

const CONTEXT: usize = 160;
const BLOCKS: usize = 256;
/// Adapters that the steps called `lora` spread their sequences over (`lora 512`: one sequence, one adapter), and their rank.
const ADAPTERS: u32 = 4;
const RANK: usize = 16;

fn shape() -> DecoderShape {
    DecoderShape {
        layers: 30,
        hidden: 576,
        heads: HeadShape { heads: 9, kv_heads: 3, head_dim: 64 },
        ffn: 1536,
        experts: None,
        vocabulary: 49152,
        qk_norm: false,
        qkv_bias: false,
        spec: AttentionSpec { scale: 0.125, sliding_window: None, soft_cap: None, alibi: None },
    }
}

/// One decode row for each of `streams` sequences in the middle of their answers.
fn decode(noise: &mut Noise, streams: usize) -> StepBatch {
    let mut batch = StepBatch::default();
    for s in 0..streams {
        let tokens = (0..CONTEXT).map(|_| noise.below(49152) as u32).collect();
        let table = (0..CONTEXT.div_ceil(32)).map(|b| (s * 8 + b) as u32).collect();
        append(&mut batch, &mut Sequence { tokens, table, computed: CONTEXT - 1 }, 1);
        batch.samples.push(greedy(s as u32));
    }
    batch
}

/// As [`decode`], after a system prompt of 31 blocks that all sequences have in common.
fn decode_shared(noise: &mut Noise, streams: usize) -> StepBatch {
    let mut batch = StepBatch::default();
    for s in 0..streams {
        let context = 31 * 32 + CONTEXT;
        let tokens = (0..context).map(|_| noise.below(49152) as u32).collect();
        let own = (0..CONTEXT.div_ceil(32)).map(|b| (31 + s * 6 + b) as u32);
        let table = (0..31).chain(own).collect();
        append(&mut batch, &mut Sequence { tokens, table, computed: context - 1 }, 1);
        batch.samples.push(greedy(s as u32));
    }
    batch
}

fn prefill(noise: &mut Noise, rows: usize) -> StepBatch {
    let mut batch = StepBatch::default();
    let tokens = (0..rows).map(|_| noise.below(49152) as u32).collect();
    append(&mut batch, &mut Sequence { tokens, table: (0..rows.div_ceil(32) as u32).collect(), computed: 0 }, rows);
    batch.samples.push(greedy(rows as u32 - 1));
    batch
}

/// The same step with its rows spread over `adapters` adapters, sequence by sequence.
fn adapted(mut batch: StepBatch, adapters: u32) -> StepBatch {
    let slots = batch.sequences.iter().enumerate().flat_map(|(i, s)| std::iter::repeat_n(i as u32 % adapters, s.rows as usize));
    batch.adapters = slots.collect();
    batch
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// Processor time of all threads: what a step costs when other programs take the cores away.
fn processor_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the out-pointer is valid.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let threads = args.iter().find_map(|a| a.parse().ok()).unwrap_or(0);
    let isa = args.iter().find_map(|a| match a.as_str() {
        "portable" => Some(Isa::Portable),
        "avx2" => Some(Isa::Avx2),
        "avx512" => Some(Isa::Avx512),
        "amx" => Some(Isa::Amx),
        _ => None,
    });
    let limits = Limits { max_tokens: 512, max_samples: 32, max_positions: 2048 };
    let noise = &mut Noise::new(1);
    let chosen = |short: &str| !args.iter().any(|a| a == "w4" || a == "w8") || args.iter().any(|a| a == short);
    for (short, name, format) in [("w4", "W4 (Q4_0)", Format::Q4_0), ("w8", "W8 (Q8_0)", Format::Q8_0)] {
        if !chosen(short) {
            continue;
        }
        let weights = DecoderWeights::random(3, shape(), format, Format::Q8_0);
        let backend = CpuBackend::new(CpuOptions { threads, isa, limits }).unwrap();
        let mut decoder = Decoder::new(backend, &weights, WeightFormat::Auto, BLOCKS, KvDtype::Bf16);
        drop(weights);
        (0..ADAPTERS).for_each(|slot| decoder.load_adapter(noise, slot, RANK));
        println!("{name}: {}, {:?}", decoder.ops.describe(), decoder.ops.memory());
        let steps = [
            ("decode 1", decode(noise, 1), 1),
            ("decode 8", decode(noise, 8), 8),
            ("decode 32", decode(noise, 32), 32),
            ("shared 32", decode_shared(noise, 32), 32),
            ("prefill 128", prefill(noise, 128), 128),
            ("prefill 512", prefill(noise, 512), 512),
            ("lora 1", adapted(decode(noise, 1), 1), 1),
            ("lora 8", adapted(decode(noise, 8), ADAPTERS), 8),
            ("lora 32", adapted(decode(noise, 32), ADAPTERS), 32),
            ("lora 512", adapted(prefill(noise, 512), 1), 512),
        ];
        let short = |what: &str| what.replace(' ', "");
        let all = !args.iter().any(|a| steps.iter().any(|(what, ..)| short(what) == *a));
        for (what, step, tokens) in steps.iter().filter(|(what, ..)| all || args.contains(&short(what))) {
            let mut out = StepOutput::default();
            decoder.forward(step, &mut out).unwrap();
            let mut times = Vec::new();
            let (start, used) = (Instant::now(), processor_time());
            while times.len() < 5 || (times.len() < 200 && start.elapsed() < Duration::from_millis(500)) {
                let start = Instant::now();
                decoder.forward(step, &mut out).unwrap();
                times.push(start.elapsed());
            }
            let used = (processor_time() - used) / times.len() as u32;
            let best = times.iter().min().copied().unwrap_or_default();
            let median = median(times);
            let rate = *tokens as f64 / median.as_secs_f64();
            decoder.ops.set_profile(true);
            let rounds = 5;
            (0..rounds).for_each(|_| decoder.forward(step, &mut out).unwrap());
            let each: Vec<String> = decoder
                .ops
                .profile()
                .iter()
                .filter(|k| k.entries > 0)
                .map(|k| format!("{} {:.2}", k.kind, k.time.as_secs_f64() * 1e3 / f64::from(rounds)))
                .collect();
            decoder.ops.set_profile(false);
            println!(
                "  {what:<12} {:8.2} ms (best {:.2}, processor {:.2})  {rate:7.0} tok/s   [{}]",
                median.as_secs_f64() * 1e3,
                best.as_secs_f64() * 1e3,
                used.as_secs_f64() * 1e3,
                each.join(", ")
            );
        }
    }
}
