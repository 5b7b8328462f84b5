//! The operations of a training step at the shapes of SmolLM2-135M, and what the machine could do at most.
//!
//! `cargo bench -p tidemill-kernels --bench train [-- f32|bf16] [THREADS]`. A step of four pairs with shared prompts has about 1,160 rows and 800
//! labels. One line per operation: how often a step does it, milliseconds (the best of several), GFLOP/s for products, and its share. With one
//! thread milliseconds are processor time, which other programs on the machine disturb less.

#![allow(clippy::expect_used, reason = "a benchmark stops at the first surprise")]

use tidemill_kernels::aligned::AlignedBuf;
use tidemill_kernels::blocks::quantize_row;
use tidemill_kernels::isa::Isa;
use tidemill_kernels::train::{Attention, Block, Compute, LogProbs, LowRank, Operand, Pieces, Precision, Product, Span, View};
use tidemill_kernels::{AttentionSpec, Format, HeadShape, MatrixSource, Store};

const LAYERS: usize = 30;
const HIDDEN: usize = 576;
const WIDE: usize = 1536;
const QKV: usize = 960;
const VOCABULARY: usize = 49_152;
const RANK: usize = 16;
/// Pairs, and tokens of a prompt and of each of its completions.
const PAIRS: usize = 4;
const PROMPT: usize = 90;
const COMPLETION: usize = 100;
const REPEATS: usize = 7;

struct Bench {
    compute: Compute,
    total: f64,
}

/// Seconds: of the processor when there is one thread, else of the clock.
fn now(threads: usize) -> f64 {
    let clock = if threads == 1 { libc::CLOCK_PROCESS_CPUTIME_ID } else { libc::CLOCK_MONOTONIC };
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is good for the call.
    unsafe { libc::clock_gettime(clock, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

impl Bench {
    /// Best of several, in milliseconds, printed with what `times` of it take.
    fn measure(&mut self, name: &str, times: usize, flop: f64, mut run: impl FnMut(&mut Compute)) {
        run(&mut self.compute);
        let mut best = f64::INFINITY;
        for _ in 0..REPEATS {
            let began = now(self.compute.threads());
            run(&mut self.compute);
            best = best.min(now(self.compute.threads()) - began);
        }
        self.total += best * times as f64;
        let speed = if flop > 0.0 { format!("{:>8.0}", flop / best / 1e9) } else { " ".repeat(8) };
        println!("{name:<40}{times:>5}{:>10.3}{speed}{:>10.1}", best * 1e3, best * 1e3 * times as f64);
    }
}

fn zeros(n: usize) -> AlignedBuf<f32> {
    AlignedBuf::zeroed(n, "a result").expect("memory")
}

fn noise(n: usize) -> AlignedBuf<f32> {
    let mut state = 1u32;
    let mut next = move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    let mut values = zeros(n);
    values.iter_mut().for_each(|value| *value = next());
    values
}

fn weight(n: usize, k: usize) -> Vec<u8> {
    let row = Format::Q4_1.row_bytes(k).expect("whole blocks");
    let mut bytes = vec![0; n * row];
    for (values, out) in noise(n * k).chunks(k).zip(bytes.chunks_mut(row)) {
        quantize_row(Format::Q4_1, values, out).expect("whole blocks");
    }
    bytes
}

fn main() {
    let (numbers, words): (Vec<String>, Vec<String>) =
        std::env::args().skip(1).filter(|a| !a.starts_with("--")).partition(|a| a.parse::<usize>().is_ok());
    let threads = numbers.first().and_then(|n| n.parse().ok()).unwrap_or(0);
    let precision = if words.iter().any(|word| word == "f32") { Precision::F32 } else { Precision::Bf16 };
    let compute = Compute::new(threads, None, precision).expect("a machine");
    println!("{} threads, {precision:?}, {}", compute.threads(), Isa::detect().name());
    #[cfg(target_arch = "x86_64")]
    if Isa::detect() == Isa::Amx {
        println!("matrix unit on registers alone: {:.0} GFLOP/s per thread", ceiling::bf16());
    }
    let mut bench = Bench { compute, total: 0.0 };
    println!("{:<40}{:>5}{:>10}{:>8}{:>10}", "operation", "times", "ms", "GFLOP/s", "a step, ms");
    let rows = PAIRS * (PROMPT + 2 * COMPLETION);
    for (name, n, k, slots) in [
        ("qkv", QKV, HIDDEN, 3),
        ("attention output", HIDDEN, HIDDEN, 1),
        ("gate, up", 2 * WIDE, HIDDEN, 2),
        ("down", HIDDEN, WIDE, 1),
    ] {
        linear(&mut bench, name, rows, n, k, slots);
    }
    attention(&mut bench);
    row_operations(&mut bench, rows);
    log_probs(&mut bench);
    println!("{:<40}{:>33.1}", "all", bench.total * 1e3);
}

/// A group of adapted matrices, forward and backward.
fn linear(bench: &mut Bench, name: &str, m: usize, n: usize, k: usize, slots: usize) {
    let bytes = weight(n, k);
    let blocks = [Block::Weight(MatrixSource { n, k, format: Format::Q4_1, data: &bytes, row_order: None })];
    let ranks = slots * RANK;
    let (x, dy, a, b) = (noise(m * k), noise(m * n), noise(ranks * k), noise(n * RANK));
    let a = [Block::Values { data: &a, n: ranks }];
    let share = n / slots;
    let corners: Vec<Block<'_>> = (0..slots)
        .map(|slot| Block::Corner {
            data: &b[slot * share * RANK..][..share * RANK],
            n: share,
            rank: RANK,
            first: slot * RANK,
            scale: 2.0,
        })
        .collect();
    let [mut out, mut low, mut dx, mut dlow] = [m * n, m * ranks, m * k, m * ranks].map(zeros);
    let flop = 2.0 * (m * n * k) as f64;
    let forward = Product {
        m,
        n,
        k,
        left: View::Rows { data: &x, stride: k },
        right: Operand::StackT(&blocks),
        scale: 1.0,
        store: Store::Replace,
    };
    bench.measure(&format!("{name}, base alone"), 0, flop, |c| c.matmul(&forward, &mut out, n).expect("fits"));
    let along = LowRank { rank: ranks, down: Some(Operand::StackT(&a)), up: Some(Operand::StackT(&corners)) };
    bench.measure(name, LAYERS, flop, |c| c.matmul_with(&forward, Some(along), &mut low, &mut out, n).expect("fits"));
    let back = Product {
        m,
        n: k,
        k: n,
        left: View::Rows { data: &dy, stride: n },
        right: Operand::Stack(&blocks),
        scale: 1.0,
        store: Store::Replace,
    };
    let along = LowRank { rank: ranks, down: Some(Operand::Stack(&corners)), up: Some(Operand::Stack(&a)) };
    bench.measure(&format!("{name}, back"), LAYERS, flop, |c| {
        c.matmul_with(&back, Some(along), &mut dlow, &mut dx, k).expect("fits");
    });
    let mut da = vec![0.0; ranks * k];
    let product = Product {
        m: ranks,
        n: k,
        k: m,
        left: View::Columns { data: &dlow, stride: ranks },
        right: Operand::View(View::Rows { data: &x, stride: k }),
        scale: 1.0,
        store: Store::Replace,
    };
    bench.measure(&format!("{name}, along A"), LAYERS, 2.0 * (ranks * k * m) as f64, |c| {
        c.matmul(&product, &mut da, k).expect("fits")
    });
    let mut db = vec![0.0; n * RANK];
    bench.measure(&format!("{name}, along B"), LAYERS, 2.0 * (n * RANK * m) as f64, |c| {
        for slot in 0..slots {
            let product = Product {
                m: share,
                n: RANK,
                k: m,
                left: View::Columns { data: &dy[slot * share..], stride: n },
                right: Operand::View(View::Rows { data: &low[slot * RANK..], stride: ranks }),
                scale: 2.0,
                store: Store::Replace,
            };
            c.matmul(&product, &mut db[slot * share * RANK..][..share * RANK], RANK).expect("fits");
        }
    });
}

fn attention(bench: &mut Bench) {
    let mut spans = Vec::new();
    let mut positions = Vec::new();
    for _ in 0..PAIRS {
        let prompt = spans.len();
        for (len, prefix, from) in [(PROMPT, None, 0), (COMPLETION, Some(prompt), PROMPT), (COMPLETION, Some(prompt), PROMPT)] {
            spans.push(Span { first: positions.len(), len, prefix });
            positions.extend(from as u32..(from + len) as u32);
        }
    }
    let shape = HeadShape { heads: 9, kv_heads: 3, head_dim: 64 };
    let call = Attention {
        spans: &spans,
        positions: &positions,
        shape,
        spec: AttentionSpec { scale: 0.125, sliding_window: None, soft_cap: None, alibi: None },
    };
    let rows = positions.len();
    let (qkv, dout) = (noise(rows * QKV), noise(rows * HIDDEN));
    let [mut out, mut lse, mut dqkv] = [rows * HIDDEN, rows * 9, rows * QKV].map(zeros);
    bench.measure("attention", LAYERS, 0.0, |c| c.attention(call, &qkv, &mut out, &mut lse).expect("fits"));
    bench.measure("attention, back", LAYERS, 0.0, |c| {
        c.attention_back(call, &qkv, &out, &lse, &dout, &mut dqkv).expect("fits");
    });
}

fn row_operations(bench: &mut Bench, rows: usize) {
    let (x, weight, whole) = (noise(rows * HIDDEN), noise(HIDDEN), Pieces::rows(HIDDEN));
    let [mut out, mut inverse] = [x.len(), rows].map(zeros);
    bench.measure("rms norm (two, and two again back)", 4 * LAYERS, 0.0, |c| {
        c.rms_norm(&x, whole, &weight, 1e-5, &mut out, &mut inverse).expect("fits");
    });
    let dy = noise(x.len());
    bench.measure("rms norm, back", 2 * LAYERS, 0.0, |c| {
        c.rms_norm_back(&x, whole, &weight, &inverse, &dy, &mut out, Store::Add).expect("fits");
    });
    let (gate_up, dgated) = (noise(rows * 2 * WIDE), noise(rows * WIDE));
    let [mut gated, mut dgate_up] = [rows * WIDE, rows * 2 * WIDE].map(zeros);
    bench.measure("silu, and again back", 2 * LAYERS, 0.0, |c| c.silu_mul(&gate_up, WIDE, &mut gated).expect("fits"));
    bench.measure("silu, back", LAYERS, 0.0, |c| c.silu_mul_back(&gate_up, WIDE, &dgated, &mut dgate_up).expect("fits"));
    bench.measure("copy of a residual stream", 4 * LAYERS, 0.0, |_| out.copy_from_slice(&x));
}

fn log_probs(bench: &mut Bench) {
    let rows = PAIRS * 2 * COMPLETION;
    let bytes = weight(VOCABULARY, HIDDEN);
    let hidden = noise(rows * HIDDEN);
    let tokens: Vec<u32> = (0..rows as u32).map(|row| row * 61 % VOCABULARY as u32).collect();
    let head = Block::Weight(MatrixSource { n: VOCABULARY, k: HIDDEN, format: Format::Q4_1, data: &bytes, row_order: None });
    let call = LogProbs { hidden: &hidden, width: HIDDEN, head, vocabulary: VOCABULARY, tokens: &tokens, scale: 1.0 };
    let (mut out, mut slopes) = (vec![0.0; rows], vec![0.0; hidden.len()]);
    let flop = 2.0 * (rows * VOCABULARY * HIDDEN) as f64;
    bench.measure("log-probabilities alone", 0, flop, |c| c.log_probs(call, &mut out, None, None).expect("fits"));
    bench.measure("log-probabilities and derivatives", 1, 2.0 * flop, |c| {
        c.log_probs(call, &mut out, None, Some(&mut slopes)).expect("fits");
    });
}

#[cfg(target_arch = "x86_64")]
mod ceiling {
    use std::arch::asm;

    #[repr(C, align(64))]
    struct Config([u8; 64]);

    /// GFLOP/s of one thread that multiplies tiles without loading any.
    pub fn bf16() -> f64 {
        let mut config = Config([0; 64]);
        config.0[0] = 1;
        for tile in 0..8 {
            config.0[16 + 2 * tile] = 64;
            config.0[48 + tile] = 16;
        }
        let rounds = 2_000_000u64;
        // SAFETY: the machine has AMX and the process asked for it; a valid configuration of eight whole tiles.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly, preserves_flags)) };
        let began = super::now(1);
        // SAFETY: tiles are configured; nobody else in this thread uses them.
        unsafe {
            asm!(
                "2:",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "dec {n}",
                "jnz 2b",
                n = inout(reg) rounds => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
        rounds as f64 * 4.0 * (2 * 16 * 16 * 32) as f64 / (super::now(1) - began) / 1e9
    }
}
