//! Time of paged attention and of sampling on this machine: `cargo bench -p tidemill-kernels --bench attention [-- decode | prefill | sampling]`.
//!
//! Attention per case, path and number of threads: µs per layer, GFLOP/s (4 · head_dim per visible key and query head), GB/s of keys
//! and values as if each were read once per work item. Enough layers are cycled through that the cache of a layer has left L2.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use tidemill_kernels::cpu::attention::{AttentionCall, AttentionPath, AttentionPlan, AttentionScratch, BLOCK, KvStorage};
use tidemill_kernels::cpu::elementwise::{Elementwise, Level};
use tidemill_kernels::cpu::sampling::{SamplingScratch, sample_row};
use tidemill_kernels::isa::Isa;
use tidemill_kernels::{AttentionSpec, HeadShape, KvDtype, KvSpec, SampleRow, Sampled, SequenceSpan};

const SHAPE: HeadShape = HeadShape { heads: 9, kv_heads: 3, head_dim: 64 };
const LAYERS: usize = 10;

fn main() {
    let only: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let wanted = |name: &str| only.is_empty() || only.iter().any(|part| name.contains(part.as_str()));
    let cases: [(&str, Vec<(usize, usize)>); 6] = [
        ("decode 32 × 200", vec![(200, 1); 32]),
        ("decode 8 × 200", vec![(200, 1); 8]),
        ("decode 1 × 200", vec![(200, 1)]),
        ("prefill 128", vec![(128, 128)]),
        ("prefill 1000", vec![(1000, 1000)]),
        ("decode 1 × 8192", vec![(8192, 1)]),
    ];
    println!("{:<18} {:<14} {:>3} {:>10} {:>9} {:>7}", "case", "path", "thr", "µs/layer", "GFLOP/s", "GB/s");
    for (name, spans) in cases.iter().filter(|(name, _)| wanted(name)) {
        for dtype in [KvDtype::Bf16, KvDtype::F32] {
            for threads in [1, 2] {
                for path in paths(dtype) {
                    attention(name, spans, dtype, path, threads);
                }
            }
        }
    }
    if wanted("sampling") {
        sampling();
    }
}

fn paths(dtype: KvDtype) -> Vec<AttentionPath> {
    let mut paths = Vec::new();
    for isa in Isa::available().into_iter().rev() {
        let path = AttentionPath::choose(isa, dtype, SHAPE.head_dim);
        if !paths.contains(&path) {
            paths.push(path);
        }
    }
    paths
}

fn attention(name: &str, spans: &[(usize, usize)], dtype: KvDtype, path: AttentionPath, threads: usize) {
    let blocks_needed: usize = spans.iter().map(|(context, _)| context.div_ceil(BLOCK)).sum();
    let spec = KvSpec {
        layers: LAYERS,
        blocks: blocks_needed,
        block_size: BLOCK,
        kv_heads: SHAPE.kv_heads,
        head_dim: SHAPE.head_dim,
        dtype,
    };
    let Ok(storage) = KvStorage::new(spec) else { return };
    let rounding = Elementwise::new(Level::Portable);
    let row: Vec<f32> = (0..SHAPE.head_dim).map(|i| (i as f32 * 0.37).sin()).collect();
    for layer in 0..LAYERS {
        for slot in 0..blocks_needed * BLOCK {
            for head in 0..SHAPE.kv_heads {
                // SAFETY: indices within the spec, one thread.
                unsafe { storage.write_rows(&rounding, layer, slot, 1, head, row.as_ptr(), row.as_ptr(), 0) };
            }
        }
    }
    let (mut sequences, mut blocks, mut tokens, mut pairs, mut keys) = (vec![], vec![], 0, 0usize, 0usize);
    for &(context, rows) in spans {
        let (first_row, first_block) = (tokens as u32, blocks.len() as u32);
        sequences.push(SequenceSpan { first_row, rows: rows as u32, context_len: context as u32, first_block });
        // Blocks of a sequence lie apart, as they do once the pool has been used.
        let coprime = |step: &usize| !blocks_needed.is_multiple_of(*step);
        let step = [7, 11, 13, 17, 19].into_iter().find(coprime).unwrap_or(1);
        for i in 0..context.div_ceil(BLOCK) {
            blocks.push(((first_block as usize + i) * step % blocks_needed) as u32);
        }
        tokens += rows;
        pairs += (context - rows + 1..=context).sum::<usize>();
        keys += (0..rows.div_ceil(16)).map(|part| context - rows + (part * 16 + 16).min(rows)).sum::<usize>();
    }
    let stride = (SHAPE.heads + 2 * SHAPE.kv_heads) * SHAPE.head_dim;
    let qkv: Vec<f32> = (0..tokens * stride).map(|i| (i as f32 * 0.11).sin()).collect();
    let mut out = vec![0.0f32; tokens * SHAPE.heads * SHAPE.head_dim];
    let mut plan = AttentionPlan::new();
    plan.build(&sequences, &blocks, SHAPE, threads);
    let call = AttentionCall {
        path,
        plan: &plan,
        sequences: &sequences,
        blocks: &blocks,
        storage: &storage,
        layer: 0,
        shape: SHAPE,
        spec: AttentionSpec { scale: 0.125, sliding_window: None, soft_cap: None, alibi: None },
        slopes: None,
        qkv: qkv.as_ptr(),
        qkv_stride: stride,
        out: out.as_mut_ptr(),
        out_stride: SHAPE.heads * SHAPE.head_dim,
    };
    let flops = 4.0 * (SHAPE.head_dim * SHAPE.heads * pairs) as f64;
    let element = if dtype == KvDtype::F32 { 4 } else { 2 };
    let bytes = (2 * SHAPE.kv_heads * SHAPE.head_dim * keys * element) as f64;
    // Short and often: a burst between two interruptions is the undisturbed time.
    let rounds = ((1e8 / flops) as usize).clamp(1, 2 * LAYERS);
    let best = (0..25).map(|_| time(&call, threads, rounds)).fold(f64::INFINITY, f64::min);
    let path = format!("{path:?}");
    println!("{name:<18} {path:<14} {threads:>3} {:>10.1} {:>9.1} {:>7.1}", best * 1e6, flops / best / 1e9, bytes / best / 1e9);
}

/// Processor time of this thread in seconds: other processes on the machine disturb it less than wall time.
fn thread_seconds() -> f64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes the given structure.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut now) };
    now.tv_sec as f64 + now.tv_nsec as f64 * 1e-9
}

/// Seconds per layer: processor time for one thread, wall time from the common start to the last end for several.
fn time(call: &AttentionCall<'_>, threads: usize, rounds: usize) -> f64 {
    let counters: Vec<[AtomicUsize; 2]> = (0..rounds).map(|_| [const { AtomicUsize::new(0) }; 2]).collect();
    let finished: Vec<[AtomicUsize; 2]> = (0..rounds).map(|_| [const { AtomicUsize::new(0) }; 2]).collect();
    let ready = AtomicUsize::new(0);
    let work = || {
        let mut scratch = AttentionScratch::new(call.shape.head_dim);
        ready.fetch_add(1, Ordering::AcqRel);
        while ready.load(Ordering::Acquire) < threads {
            std::hint::spin_loop();
        }
        let (start, cpu) = (Instant::now(), thread_seconds());
        for round in 0..rounds {
            let call = AttentionCall { layer: round % LAYERS, ..*call };
            for (phase, total) in [(0, call.plan.items()), (1, call.plan.merges())] {
                loop {
                    let index = counters[round][phase].fetch_add(1, Ordering::Relaxed);
                    if index >= total {
                        break;
                    }
                    // SAFETY: consistent by construction; each index is taken once; merges wait for items below.
                    unsafe { if phase == 0 { call.run_item(index, &mut scratch) } else { call.run_merge(index, &mut scratch) } }
                    finished[round][phase].fetch_add(1, Ordering::AcqRel);
                }
                while finished[round][phase].load(Ordering::Acquire) < total {
                    std::hint::spin_loop();
                }
            }
        }
        (start, Instant::now(), thread_seconds() - cpu)
    };
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let (mut start, mut end, cpu) = work();
        for other in others {
            if let Ok((other_start, other_end, _)) = other.join() {
                (start, end) = (start.min(other_start), end.max(other_end));
            }
        }
        let seconds = if threads == 1 { cpu } else { (end - start).as_secs_f64() };
        seconds / rounds as f64
    })
}

fn sampling() {
    println!("\n{:<34} {:>10} {:>12}", "sampling, one row", "vocabulary", "µs");
    for vocabulary in [49_152usize, 151_936] {
        let logits: Vec<f32> = (0..vocabulary)
            .map(|i| {
                let u = (i as u32).wrapping_mul(2_654_435_761) as f32 / u32::MAX as f32;
                6.0 * (u - 0.5) - 4.0 * (1.0 - u).max(1e-6).ln()
            })
            .collect();
        let plain = SampleRow { seed: 1, ..SampleRow::greedy(0) };
        let hot = SampleRow { temperature: 0.8, ..plain.clone() };
        let rows = [
            ("greedy", plain.clone()),
            ("greedy, top 20 log-probabilities", SampleRow { top_n: Some(20), ..plain.clone() }),
            ("temperature", hot.clone()),
            ("top-k 50", SampleRow { top_k: 50, ..hot.clone() }),
            ("top-p 0.95", SampleRow { top_p: 0.95, ..hot.clone() }),
            ("top-p 0.95, flat (temperature 8)", SampleRow { top_p: 0.95, temperature: 8.0, ..hot.clone() }),
            ("min-p 0.05", SampleRow { min_p: 0.05, ..hot }),
            ("score", SampleRow { score: Some(77), ..plain }),
        ];
        let mut scratch = SamplingScratch::new(vocabulary);
        let mut out = Sampled::default();
        let mut working = logits;
        for (name, mut row) in rows {
            let mut best = f64::INFINITY;
            for _ in 0..20 {
                let start = thread_seconds();
                for _ in 0..10 {
                    row.counter += 1;
                    // SAFETY: the detected path.
                    unsafe { sample_row(Isa::detect(), &mut working, &row, &[], &[], &mut out, &mut scratch) };
                }
                best = best.min((thread_seconds() - start) / 10.0);
            }
            println!("{name:<34} {vocabulary:>10} {:>12.1}", best * 1e6);
        }
    }
}
