//! Each operation of the CPU backend, on every instruction path of this machine and several thread counts, and of the CUDA backend with
//! its kernels emulated on the host, against the scalar reference on random ragged steps. Buffers hold NaN before a step: an element that was not written, or one read from a row
//! beyond the step's, shows.

#![allow(clippy::unwrap_used, reason = "a test stops at the first error; the lint knows test functions only")]

mod support;

use support::emulation::Emulated;
use support::steps::{Sequence, append, greedy, ragged, sequences};
use support::{Noise, Weight, error};
use tidemill_kernels::cpu::{CpuBackend, CpuOptions};
use tidemill_kernels::cuda::CudaBackend;
use tidemill_kernels::isa::Isa;
use tidemill_kernels::reference::Reference;
use tidemill_kernels::*;

const LIMITS: Limits = Limits { max_tokens: 70, max_samples: 9, max_positions: 400 };

trait Backend: Ops {
    fn poison(&mut self, buf: Buf);

    fn alloc_poisoned(&mut self, rows: Rows, width: usize) -> Buf {
        let buf = self.alloc(rows, width).unwrap();
        self.poison(buf);
        buf
    }

    /// `out[r] = table[tokens[r]]` from random f32 values: how tests get numbers into a buffer.
    fn load_table(&mut self, noise: &mut Noise, rows: usize, width: usize) -> Matrix {
        let table = Weight::random(noise, rows, width, Format::F32, 1.0);
        self.load_matrix(&[table.source()], WeightFormat::F32).unwrap()
    }

    fn run(&mut self) -> StepOutput {
        let mut out = StepOutput::default();
        self.finish(&mut out).unwrap();
        out
    }
}

impl Backend for Reference {
    fn poison(&mut self, buf: Buf) {
        self.fill(buf, f32::NAN);
    }
}

impl Backend for CpuBackend {
    fn poison(&mut self, buf: Buf) {
        self.fill(buf, f32::NAN);
    }
}

impl Backend for CudaBackend<Emulated> {
    fn poison(&mut self, buf: Buf) {
        self.fill(buf, f32::NAN).unwrap();
    }
}

fn cuda(reversed: bool) -> CudaBackend<Emulated> {
    CudaBackend::new(Emulated::new(reversed), LIMITS)
}

/// Runs the scenario on all backends and compares the buffers that it returns; rows beyond the step's must still be NaN.
fn compare(what: &str, tolerance: f64, scenario: impl Fn(&mut dyn Backend) -> Vec<Buf>) {
    let mut oracle = Reference::new(LIMITS);
    let want: Vec<Vec<f32>> = scenario(&mut oracle).into_iter().map(|b| oracle.read(b).unwrap()).collect();
    for isa in Isa::available() {
        for threads in [1, 2, 3] {
            let mut backend = CpuBackend::new(CpuOptions { threads, isa: Some(isa), limits: LIMITS }).unwrap();
            for (buf, want) in scenario(&mut backend).into_iter().zip(&want) {
                agrees(&format!("{what}, {isa:?}, {threads} threads"), tolerance, &backend.read_all(buf).unwrap(), want);
            }
        }
    }
    // The threads of a block run in one order or the other; over all scenarios, both.
    let reversed = what.len() % 2 == 1;
    let mut backend = cuda(reversed);
    for (buf, want) in scenario(&mut backend).into_iter().zip(&want) {
        agrees(&format!("{what}, CUDA, reversed {reversed}"), tolerance, &backend.read_all(buf).unwrap(), want);
    }
}

/// `all` begins with `want`, and goes on with NaN.
fn agrees(what: &str, tolerance: f64, all: &[f32], want: &[f32]) {
    let off = error(&all[..want.len()], want);
    assert!(off <= tolerance, "{what}: {off:e}");
    assert!(all[want.len()..].iter().all(|v| v.is_nan()), "{what}: wrote beyond the step's rows");
}

/// A step of `rows` tokens of one sequence that touches no cache, sampling some rows (some twice).
fn plain_step(noise: &mut Noise, rows: usize, vocabulary: usize) -> StepBatch {
    let mut batch = StepBatch::default();
    let tokens = (0..rows).map(|_| noise.below(vocabulary) as u32).collect();
    append(&mut batch, &mut Sequence { tokens, table: (0..rows.div_ceil(32) as u32).collect(), computed: 0 }, rows);
    batch.slots.fill(-1);
    batch.samples = (0..noise.between(1, 9)).map(|_| greedy(noise.below(rows) as u32)).collect();
    batch
}

#[test]
fn rows_by_row() {
    for (case, (rows, width)) in [(1, 576), (7, 64), (70, 40), (33, 130), (2, 1)].into_iter().enumerate() {
        compare(&format!("embedding, rms_norm, gather on {rows} × {width}"), 2e-6, |ops| {
            let noise = &mut Noise::new(case as u64);
            let table = ops.load_table(noise, 50, width);
            let weight = ops.load_vector(&noise.values(width, 1.0)).unwrap();
            let [x, normed] = [0; 2].map(|_| ops.alloc_poisoned(Rows::Tokens, width));
            let sampled = ops.alloc_poisoned(Rows::Samples, width);
            ops.begin(&plain_step(noise, rows, 50)).unwrap();
            ops.embedding(table, x);
            ops.rms_norm(x, weight, 1e-5, normed);
            ops.gather(normed, sampled);
            ops.run();
            vec![x, normed, sampled]
        });
        compare(&format!("silu_and_mul on {rows} × {width}"), 2e-6, |ops| {
            let noise = &mut Noise::new(case as u64);
            let table = ops.load_table(noise, 50, 2 * width);
            let gate_up = ops.alloc_poisoned(Rows::Tokens, 2 * width);
            let out = ops.alloc_poisoned(Rows::Tokens, width);
            ops.begin(&plain_step(noise, rows, 50)).unwrap();
            ops.embedding(table, gate_up);
            ops.silu_and_mul(gate_up, out);
            ops.run();
            vec![out]
        });
    }
}

#[test]
fn linears_of_every_form_replace_add_and_bias() {
    let forms = [
        (Format::F32, WeightFormat::F32, 3e-6),
        (Format::F32, WeightFormat::Bf16, 1.5e-2),
        (Format::F16, WeightFormat::Auto, 1.5e-2),
        (Format::Bf16, WeightFormat::Int8, 3e-2),
        (Format::Q8_0, WeightFormat::Auto, 3e-2),
        (Format::Q4_0, WeightFormat::Auto, 3e-2),
        (Format::Q4_1, WeightFormat::Auto, 3e-2),
    ];
    for (case, (format, packed, tolerance)) in forms.into_iter().enumerate() {
        for (rows, k, n) in [(1, 64, 48), (5, 96, 17), (16, 160, 100), (70, 576, 33)] {
            compare(&format!("linear {format:?} as {packed:?}, {rows} × {k} × {n}"), tolerance, |ops| {
                let noise = &mut Noise::new(case as u64);
                let table = ops.load_table(noise, 50, k);
                let [a, b] = [n, n / 2 + 1].map(|n| Weight::random(noise, n, k, format, 0.5));
                // Stacked, the second twice and reversed.
                let order: Vec<u32> = (0..b.n as u32).rev().collect();
                let sources = [a.source(), b.source(), MatrixSource { row_order: Some(&order), ..b.source() }];
                let w = ops.load_matrix(&sources, packed).unwrap();
                let total = a.n + 2 * b.n;
                let bias = ops.load_vector(&noise.values(total, 1.0)).unwrap();
                let x = ops.alloc_poisoned(Rows::Tokens, k);
                let [plain, sum] = [0; 2].map(|_| ops.alloc_poisoned(Rows::Tokens, total));
                ops.begin(&plain_step(noise, rows, 50)).unwrap();
                ops.embedding(table, x);
                ops.linear(x, w, None, plain, Store::Replace);
                ops.linear(x, w, Some(bias), sum, Store::Replace);
                ops.linear(x, w, None, sum, Store::Add);
                ops.run();
                vec![plain, sum]
            });
        }
    }
}

#[test]
fn attention_over_ragged_steps() {
    let shapes = [
        HeadShape { heads: 9, kv_heads: 3, head_dim: 64 },
        HeadShape { heads: 4, kv_heads: 4, head_dim: 80 },
        HeadShape { heads: 8, kv_heads: 1, head_dim: 96 },
        HeadShape { heads: 4, kv_heads: 2, head_dim: 128 },
        HeadShape { heads: 2, kv_heads: 1, head_dim: 6 },
    ];
    for (case, heads) in shapes.into_iter().enumerate() {
        for (dtype, tolerance) in [(KvDtype::F32, 1e-5), (KvDtype::Bf16, 2e-2)] {
            let plain = AttentionSpec { scale: 1.0 / (heads.head_dim as f32).sqrt(), sliding_window: None, soft_cap: None };
            for spec in [plain, AttentionSpec { sliding_window: Some(37), soft_cap: Some(2.0), ..plain }] {
                compare(&format!("attention {heads:?} {dtype:?} {spec:?}"), tolerance, |ops| {
                    let noise = &mut Noise::new(case as u64);
                    let (width, half) = ((heads.heads + 2 * heads.kv_heads) * heads.head_dim, heads.head_dim / 2 - case % 2);
                    let table = ops.load_table(noise, 64, width);
                    let rope = ops.load_rope(&(0..half).map(|i| 0.7f32.powi(i as i32)).collect::<Vec<_>>(), 1.1).unwrap();
                    let [q, k] = [0; 2].map(|_| ops.load_vector(&noise.values(heads.head_dim, 1.0)).unwrap());
                    let norm = (case % 2 == 1).then_some(QkNorm { q, k, eps: 1e-6 });
                    let qkv = ops.alloc_poisoned(Rows::Tokens, width);
                    let out = ops.alloc_poisoned(Rows::Tokens, heads.heads * heads.head_dim);
                    let cache = KvSpec {
                        layers: 2,
                        blocks: 60,
                        block_size: 32,
                        kv_heads: heads.kv_heads,
                        head_dim: heads.head_dim,
                        dtype,
                    };
                    let kv = ops.alloc_kv(cache).unwrap();
                    let mut list = sequences(noise, 6, 300, 64, 60);
                    for step in ragged(noise, &mut list, LIMITS.max_tokens) {
                        ops.poison(qkv);
                        ops.poison(out);
                        ops.begin(&step).unwrap();
                        ops.embedding(table, qkv);
                        ops.rope_cache(qkv, heads, norm, rope, kv, 1);
                        ops.paged_attention(qkv, heads, spec, kv, 1, out);
                        ops.run();
                    }
                    vec![qkv, out]
                });
            }
        }
    }
}

#[test]
fn a_fork_copies_its_last_block_and_then_goes_its_own_way() {
    let heads = HeadShape { heads: 2, kv_heads: 1, head_dim: 64 };
    let spec = AttentionSpec { scale: 0.125, sliding_window: None, soft_cap: None };
    compare("copies", 2e-2, |ops| {
        let noise = &mut Noise::new(5);
        let table = ops.load_table(noise, 64, 256);
        let rope = ops.load_rope(&[1.0, 0.1], 1.0).unwrap();
        let qkv = ops.alloc_poisoned(Rows::Tokens, 256);
        let outs = [0; 2].map(|_| ops.alloc_poisoned(Rows::Tokens, 128));
        let cache = KvSpec { layers: 2, blocks: 6, block_size: 32, kv_heads: 1, head_dim: 64, dtype: KvDtype::Bf16 };
        let kv = ops.alloc_kv(cache).unwrap();
        let mut parent = Sequence { tokens: (0..60).map(|t| t % 64).collect(), table: vec![4, 1], computed: 0 };
        let mut step = StepBatch::default();
        append(&mut step, &mut parent, 50);
        let forward = |ops: &mut dyn Backend, step: &StepBatch| {
            outs.into_iter().for_each(|out| ops.poison(out));
            ops.begin(step).unwrap();
            for (layer, out) in outs.into_iter().enumerate() {
                ops.embedding(table, qkv);
                ops.rope_cache(qkv, heads, None, rope, kv, layer);
                ops.paged_attention(qkv, heads, spec, kv, layer, out);
            }
            ops.run();
        };
        forward(ops, &step);
        let mut child = Sequence { table: vec![4, 2], ..parent.clone() };
        child.tokens[50..].reverse();
        step.clear();
        // Block 1 goes to 2 and on to 5: copies run in order.
        step.copies = vec![(1, 2), (2, 5)];
        append(&mut step, &mut parent, 10);
        append(&mut step, &mut child, 10);
        forward(ops, &step);
        let mut grandchild = Sequence { table: vec![4, 5], computed: 50, ..child.clone() };
        step.clear();
        append(&mut step, &mut grandchild, 1);
        forward(ops, &step);
        outs.to_vec()
    });
}

#[test]
fn a_row_does_not_depend_on_its_company() {
    let noise = &mut Noise::new(11);
    let heads = HeadShape { heads: 6, kv_heads: 2, head_dim: 64 };
    let spec = AttentionSpec { scale: 0.125, sliding_window: None, soft_cap: None };
    let weights: Vec<Weight> =
        [Format::F32, Format::Bf16, Format::Q8_0, Format::Q4_0].map(|f| Weight::random(noise, 640, 128, f, 0.1)).into();
    for isa in Isa::available() {
        for weight in &weights {
            let run = |threads: usize, chunk: usize, with_company: bool| -> Vec<f32> {
                let noise = &mut Noise::new(12);
                let mut ops = CpuBackend::new(CpuOptions { threads, isa: Some(isa), limits: LIMITS }).unwrap();
                let table = ops.load_table(noise, 64, 128);
                let w = ops.load_matrix(&[weight.source()], WeightFormat::Auto).unwrap();
                let rope = ops.load_rope(&[1.0, 0.1], 1.0).unwrap();
                let cache = KvSpec { layers: 1, blocks: 40, block_size: 32, kv_heads: 2, head_dim: 64, dtype: KvDtype::Bf16 };
                let kv = ops.alloc_kv(cache).unwrap();
                let x = ops.alloc_poisoned(Rows::Tokens, 128);
                let qkv = ops.alloc_poisoned(Rows::Tokens, 640);
                let out = ops.alloc_poisoned(Rows::Tokens, 384);
                let mut mine = Sequence { tokens: (0..64).collect(), table: vec![38, 39], computed: 0 };
                let mut rows = Vec::new();
                while mine.computed < 64 {
                    let mut step = StepBatch::default();
                    if with_company {
                        // Neighbours recompute their first tokens again and again; only their rows matter here.
                        append(&mut step, &mut Sequence { computed: 0, table: vec![0, 1], tokens: vec![7; 40] }, 3);
                    }
                    let first = step.tokens.len();
                    let take = chunk.min(64 - mine.computed);
                    append(&mut step, &mut mine, take);
                    if with_company {
                        append(&mut step, &mut Sequence { computed: 0, table: vec![2], tokens: vec![9; 2] }, 2);
                    }
                    ops.begin(&step).unwrap();
                    ops.embedding(table, x);
                    ops.linear(x, w, None, qkv, Store::Replace);
                    ops.rope_cache(qkv, heads, None, rope, kv, 0);
                    ops.paged_attention(qkv, heads, spec, kv, 0, out);
                    ops.run();
                    rows.extend_from_slice(&ops.read(out).unwrap()[first * 384..(first + take) * 384]);
                }
                rows
            };
            let alone = run(1, 64, false);
            assert!(alone.iter().all(|v| v.is_finite()));
            for (threads, chunk, company) in [(2, 64, false), (2, 1, false), (3, 20, true), (1, 1, true)] {
                assert!(run(threads, chunk, company) == alone, "{isa:?} {:?} {threads} {chunk} {company}", weight.format);
            }
        }
    }
}

#[test]
fn a_row_of_a_cuda_step_does_not_depend_on_its_company() {
    let noise = &mut Noise::new(11);
    let heads = HeadShape { heads: 6, kv_heads: 2, head_dim: 64 };
    let spec = AttentionSpec { scale: 0.125, sliding_window: None, soft_cap: None };
    for format in [Format::F32, Format::Bf16, Format::Q8_0, Format::Q4_0] {
        let weight = Weight::random(noise, 640, 128, format, 0.1);
        // Prefill and decode run on different kernels and need not agree to the last bit; each with itself must, up to the number
        // of rows at which products go to the library.
        let run = |neighbours: usize| -> Vec<f32> {
            let noise = &mut Noise::new(12);
            let mut ops = cuda(neighbours % 2 == 1);
            let table = ops.load_table(noise, 64, 128);
            let w = ops.load_matrix(&[weight.source()], WeightFormat::Auto).unwrap();
            let rope = ops.load_rope(&[1.0, 0.1], 1.0).unwrap();
            let cache = KvSpec { layers: 1, blocks: 60, block_size: 32, kv_heads: 2, head_dim: 64, dtype: KvDtype::Bf16 };
            let kv = ops.alloc_kv(cache).unwrap();
            let x = ops.alloc_poisoned(Rows::Tokens, 128);
            let qkv = ops.alloc_poisoned(Rows::Tokens, 640);
            let out = ops.alloc_poisoned(Rows::Tokens, 384);
            let mut mine = Sequence { tokens: (0..40).collect(), table: vec![58, 59], computed: 0 };
            let mut rows = Vec::new();
            for take in [8, 1, 1] {
                let mut step = StepBatch::default();
                for i in 0..neighbours {
                    append(&mut step, &mut Sequence { computed: 0, table: vec![i as u32], tokens: vec![7; 4] }, 1 + i % 2);
                }
                let first = step.tokens.len();
                append(&mut step, &mut mine, take);
                ops.begin(&step).unwrap();
                ops.embedding(table, x);
                ops.linear(x, w, None, qkv, Store::Replace);
                ops.rope_cache(qkv, heads, None, rope, kv, 0);
                ops.paged_attention(qkv, heads, spec, kv, 0, out);
                ops.run();
                rows.extend_from_slice(&ops.read(out).unwrap()[first * 384..(first + take) * 384]);
            }
            rows
        };
        let alone = run(0);
        assert!(alone.iter().all(|v| v.is_finite()));
        for neighbours in [1, 5] {
            assert!(run(neighbours) == alone, "{format:?} {neighbours}");
        }
    }
}

#[test]
fn a_long_context_is_cut_into_parts_that_join() {
    // Two parts and a bit, for few rows and for a window that leaves the first part out.
    const LONG: Limits = Limits { max_tokens: 1100, max_samples: 1, max_positions: 1200 };
    let heads = HeadShape { heads: 4, kv_heads: 2, head_dim: 64 };
    let plain = AttentionSpec { scale: 0.3, sliding_window: None, soft_cap: None };
    for spec in [plain, AttentionSpec { sliding_window: Some(300), ..plain }] {
        let run = |ops: &mut dyn Backend| -> Vec<f32> {
            let noise = &mut Noise::new(3);
            let table = ops.load_table(noise, 64, 512);
            let rope = ops.load_rope(&[1.0, 0.1], 1.0).unwrap();
            let cache = KvSpec { layers: 1, blocks: 40, block_size: 32, kv_heads: 2, head_dim: 64, dtype: KvDtype::Bf16 };
            let kv = ops.alloc_kv(cache).unwrap();
            let qkv = ops.alloc_poisoned(Rows::Tokens, 512);
            let out = ops.alloc_poisoned(Rows::Tokens, 256);
            let tokens = (0..1060).map(|_| noise.below(64) as u32).collect();
            let mut sequence = Sequence { tokens, table: (0..40).rev().collect(), computed: 0 };
            for rows in [1056, 3] {
                let mut step = StepBatch::default();
                append(&mut step, &mut sequence, rows);
                ops.begin(&step).unwrap();
                ops.embedding(table, qkv);
                ops.rope_cache(qkv, heads, None, rope, kv, 0);
                if rows == 3 {
                    ops.paged_attention(qkv, heads, spec, kv, 0, out);
                }
                ops.run();
            }
            ops.read(out).unwrap()
        };
        let want = run(&mut Reference::new(LONG));
        let off = error(&run(&mut CudaBackend::new(Emulated::new(true), LONG)), &want);
        assert!(off < 2e-2, "{spec:?}: {off:e}");
    }
}

#[test]
fn a_cuda_backend_gives_all_its_memory_back() {
    let mut ops = cuda(false);
    let noise = &mut Noise::new(5);
    let (inputs, starts) = (ops.load_table(noise, 50, 40), ops.load_table(noise, 50, 20));
    let (x, out) = (ops.alloc_poisoned(Rows::Tokens, 40), ops.alloc_poisoned(Rows::Tokens, 20));
    let before = ops.device().held();
    for _ in 0..3 {
        Factors::random(noise, 2, 40, &[20]).load(&mut ops, 2);
        ops.unload_adapter(2);
    }
    assert_eq!(ops.device().held(), before);
    Factors::random(noise, 1, 40, &[20]).load(&mut ops, 0);
    ops.begin(&mixed_step(noise, 30, &[0, NO_ADAPTER])).unwrap();
    ops.embedding(inputs, x);
    ops.embedding(starts, out);
    ops.lora(x, 0, out);
    ops.run();
    // Dropping it frees what it reserved; the device is asked to free nothing twice.
    drop(ops);
}

#[test]
fn mistakes_come_back_from_finish_and_leave_the_backend_usable() {
    let noise = &mut Noise::new(1);
    let mut cpu = CpuBackend::new(CpuOptions { threads: 2, isa: None, limits: LIMITS }).unwrap();
    let mut oracle = Reference::new(LIMITS);
    let mut cuda = cuda(false);
    let backends: [&mut dyn Backend; 3] = [&mut cpu, &mut cuda, &mut oracle];
    for ops in backends {
        let table = ops.load_table(noise, 50, 32);
        let weight = ops.load_vector(&[1.0; 32]).unwrap();
        let [a, b] = [0; 2].map(|_| ops.alloc_poisoned(Rows::Tokens, 32));
        let narrow = ops.alloc(Rows::Tokens, 16).unwrap();
        let sampled = ops.alloc(Rows::Samples, 32).unwrap();
        let step = plain_step(noise, 5, 50);
        let mut attempt = |op: &'static str, run: &dyn Fn(&mut dyn Backend)| {
            ops.begin(&step).unwrap();
            run(ops);
            // What follows a mistake must not hide it.
            ops.embedding(table, a);
            match ops.finish(&mut StepOutput::default()) {
                Err(KernelError::Shape { op: named, .. }) => assert_eq!(named, op),
                other => panic!("{op}: {other:?}"),
            }
            ops.begin(&step).unwrap();
            ops.embedding(table, a);
            ops.rms_norm(a, weight, 1e-5, b);
            ops.run();
            assert!(ops.read(b).unwrap().iter().all(|v| v.is_finite()));
        };
        attempt("embedding", &|ops| ops.embedding(table, narrow));
        attempt("embedding", &|ops| ops.embedding(Matrix(77), a));
        attempt("rms_norm", &|ops| ops.rms_norm(a, weight, 1e-5, a));
        attempt("rms_norm", &|ops| ops.rms_norm(a, weight, 1e-5, narrow));
        attempt("linear", &|ops| ops.linear(a, table, None, b, Store::Replace));
        attempt("linear", &|ops| ops.linear(a, table, None, sampled, Store::Replace));
        attempt("silu_and_mul", &|ops| ops.silu_and_mul(narrow, a));
        attempt("gather", &|ops| ops.gather(sampled, a));
        attempt("sample", &|ops| ops.sample(sampled, 33));
        attempt("sample", &|ops| ops.sample(Buf(99), 33));
        let heads = HeadShape { heads: 1, kv_heads: 1, head_dim: 8 };
        attempt("rope_cache", &|ops| ops.rope_cache(a, heads, None, Rope(0), KvCache(0), 0));

        let mut wrong = step.clone();
        wrong.positions[2] = 77;
        assert!(matches!(ops.begin(&wrong), Err(KernelError::Shape { op: "begin", .. })));
        let mut wrong = step.clone();
        (wrong.slots[1], wrong.slots[4]) = (33, 33);
        assert!(matches!(ops.begin(&wrong), Err(KernelError::Shape { op: "begin", .. })));
        let mut wrong = step.clone();
        wrong.samples[0].row = 5;
        assert!(matches!(ops.begin(&wrong), Err(KernelError::Shape { op: "begin", .. })));
        assert!(matches!(ops.begin(&plain_step(noise, 71, 50)), Err(KernelError::Limit(_))));
        let spec = KvSpec { layers: 1 << 20, blocks: 1 << 30, block_size: 32, kv_heads: 64, head_dim: 128, dtype: KvDtype::F32 };
        assert!(matches!(ops.alloc_kv(spec), Err(KernelError::Memory { .. })));
        assert!(ops.alloc(Rows::Tokens, usize::MAX / 8).is_err());
    }
}

#[test]
fn sampling_gives_the_same_tokens_and_log_probabilities() {
    let vocabulary = 700;
    for case in 0..60 {
        let scenario = |ops: &mut dyn Backend| -> Vec<Sampled> {
            let noise = &mut Noise::new(1000 + case);
            let table = ops.load_table(noise, 9, vocabulary + 12);
            let x = ops.alloc_poisoned(Rows::Tokens, vocabulary + 12);
            let logits = ops.alloc_poisoned(Rows::Samples, vocabulary + 12);
            let mut step = plain_step(noise, 6, 9);
            step.samples.truncate(noise.between(1, 9));
            for sample in &mut step.samples {
                sample.score = (noise.unit() < 0.2).then(|| noise.below(vocabulary) as u32);
                sample.temperature = noise.pick(&[0.0, 0.3, 1.0, 1.7]);
                sample.top_k = noise.pick(&[0, 1, 5, 50, 5000]);
                sample.top_p = noise.pick(&[1.0, 0.95, 0.5, 0.01]);
                sample.min_p = noise.pick(&[0.0, 0.05, 0.3]);
                sample.repetition_penalty = noise.pick(&[1.0, 1.3]);
                sample.presence_penalty = noise.pick(&[0.0, 0.5]);
                sample.frequency_penalty = noise.pick(&[0.0, 0.7]);
                (sample.seed, sample.counter) = (noise.below(1000) as u64, noise.below(1000) as u64);
                sample.top_n = noise.pick(&[None, Some(0), Some(4)]);
                let (history, bias) = (step.history.len() as u32, step.bias.len() as u32);
                for _ in 0..noise.below(20) {
                    let token = noise.below(vocabulary) as u32;
                    step.history.push(TokenCount { token, in_prompt: noise.unit() < 0.5, generated: noise.below(3) as u32 });
                }
                for _ in 0..noise.below(4) {
                    step.bias.push((noise.below(vocabulary) as u32, noise.pick(&[f32::NEG_INFINITY, 5.0, -3.0, 100.0])));
                }
                sample.history = history..step.history.len() as u32;
                sample.bias = bias..step.bias.len() as u32;
            }
            ops.begin(&step).unwrap();
            ops.embedding(table, x);
            ops.gather(x, logits);
            ops.sample(logits, vocabulary);
            ops.run().samples
        };
        let want = scenario(&mut Reference::new(LIMITS));
        let close = |a: f32, b: f32| a == b || (a - b).abs() < 2e-5;
        let same = |a: &[(u32, f32)], b: &[(u32, f32)]| {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.0 == b.0 && close(a.1, b.1))
        };
        let check = |what: &str, got: &[Sampled]| {
            assert_eq!(got.len(), want.len());
            for (got, want) in got.iter().zip(&want) {
                let agree = (got.token, got.rank) == (want.token, want.rank)
                    && close(got.logprob, want.logprob)
                    && close(got.processed_logprob, want.processed_logprob)
                    && same(&got.top, &want.top)
                    && same(&got.processed_top, &want.processed_top);
                assert!(agree, "case {case}, {what}:\n{got:?}\n{want:?}");
            }
        };
        for isa in Isa::available() {
            for threads in [1, 3] {
                let mut cpu = CpuBackend::new(CpuOptions { threads, isa: Some(isa), limits: LIMITS }).unwrap();
                check(&format!("{isa:?}, {threads} threads"), &scenario(&mut cpu));
            }
        }
        check("CUDA", &scenario(&mut cuda(case % 2 == 1)));
    }
}

/// An adapter with random factors for linears that are stacked of the same parts, some parts left out.
struct Factors {
    k: usize,
    sites: Vec<Vec<Factor>>,
}

struct Factor {
    column: usize,
    n: usize,
    rank: usize,
    scale: f32,
    a: Vec<f32>,
    b: Vec<f32>,
}

impl Factors {
    fn random(noise: &mut Noise, sites: usize, k: usize, parts: &[usize]) -> Self {
        let mut site = || {
            let (mut column, mut list) = (0, Vec::new());
            for &n in parts {
                if noise.unit() < 0.8 {
                    let rank = noise.pick(&[1, 2, 4, 7, 16, 33]);
                    let (a, b) = (noise.values(rank * k, 0.5), noise.values(n * rank, 0.5));
                    list.push(Factor { column, n, rank, scale: noise.pick(&[0.25, 2.0]), a, b });
                }
                column += n;
            }
            list
        };
        Factors { k, sites: (0..sites).map(|_| site()).collect() }
    }

    fn load<B: Ops + ?Sized>(&self, ops: &mut B, slot: u32) {
        fn low_rank(f: &Factor, k: usize) -> LowRank<'_> {
            LowRank { column: f.column, n: f.n, k, rank: f.rank, scale: f.scale, a: &f.a, b: &f.b }
        }
        let sites: Vec<Vec<LowRank<'_>>> =
            self.sites.iter().map(|parts| parts.iter().map(|f| low_rank(f, self.k)).collect()).collect();
        ops.load_adapter(slot, &sites).unwrap();
    }
}

/// A step of single rows; each row's adapter is drawn from `slots`.
fn mixed_step(noise: &mut Noise, rows: usize, slots: &[u32]) -> StepBatch {
    let mut batch = StepBatch::default();
    for row in 0..rows {
        let tokens = vec![noise.below(50) as u32];
        append(&mut batch, &mut Sequence { tokens, table: vec![row as u32], computed: 0 }, 1);
    }
    batch.slots.fill(-1);
    batch.adapters = (0..rows).map(|_| noise.pick(slots)).collect();
    batch
}

#[test]
fn low_rank_updates_of_many_adapters_in_one_step() {
    for (case, (rows, k, parts)) in
        [(1, 64, &[32usize, 16, 16][..]), (7, 30, &[17, 5]), (70, 576, &[40]), (23, 129, &[64, 3, 61]), (5, 1, &[1])]
            .into_iter()
            .enumerate()
    {
        compare(&format!("lora on {rows} × {k} → {parts:?}"), 3e-6, |ops| {
            let noise = &mut Noise::new(40 + case as u64);
            let n: usize = parts.iter().sum();
            let (inputs, starts) = (ops.load_table(noise, 50, k), ops.load_table(noise, 50, n));
            let x = ops.alloc_poisoned(Rows::Tokens, k);
            let [first, second, untouched] = [0; 3].map(|_| ops.alloc_poisoned(Rows::Tokens, n));
            for slot in [0, 1, 4, 5] {
                Factors::random(noise, 2, k, parts).load(ops, slot);
            }
            // A slot that is used again, and one that is empty again.
            Factors::random(noise, 2, k, parts).load(ops, 1);
            ops.unload_adapter(5);
            ops.begin(&mixed_step(noise, rows, &[0, 1, 4, NO_ADAPTER])).unwrap();
            ops.embedding(inputs, x);
            for (site, out) in [first, second, untouched].into_iter().enumerate() {
                ops.embedding(starts, out);
                ops.lora(x, site, out);
            }
            ops.run();
            vec![first, second, untouched]
        });
    }
}

#[test]
fn a_rows_update_does_not_depend_on_its_neighbours() {
    let (k, parts) = (100, [48, 20]);
    for isa in Isa::available() {
        let noise = &mut Noise::new(3);
        let mut ops = CpuBackend::new(CpuOptions { threads: 3, isa: Some(isa), limits: LIMITS }).unwrap();
        let (inputs, starts) = (ops.load_table(noise, 50, k), ops.load_table(noise, 50, 68));
        let (x, out) = (ops.alloc_poisoned(Rows::Tokens, k), ops.alloc_poisoned(Rows::Tokens, 68));
        for slot in 0..3 {
            Factors::random(noise, 1, k, &parts).load(&mut ops, slot);
        }
        let mut run = |batch: &StepBatch| {
            ops.begin(batch).unwrap();
            ops.embedding(inputs, x);
            ops.embedding(starts, out);
            ops.lora(x, 0, out);
            ops.run();
            ops.read(out).unwrap()
        };
        let batch = mixed_step(noise, 70, &[0, 1, 2, NO_ADAPTER]);
        let together = run(&batch);
        for row in 0..70 {
            let mut alone = StepBatch::default();
            append(&mut alone, &mut Sequence { tokens: vec![batch.tokens[row]], table: vec![0], computed: 0 }, 1);
            alone.slots.fill(-1);
            alone.adapters = vec![batch.adapters[row]];
            assert_eq!(run(&alone), together[row * 68..(row + 1) * 68], "{isa:?} row {row}");
        }
    }
}

#[test]
fn adapters_that_do_not_fit_are_refused() {
    let mut ops = CpuBackend::new(CpuOptions { threads: 1, isa: None, limits: LIMITS }).unwrap();
    let noise = &mut Noise::new(5);
    let (inputs, x, out) =
        (ops.load_table(noise, 50, 8), ops.alloc_poisoned(Rows::Tokens, 8), ops.alloc_poisoned(Rows::Tokens, 12));
    let values = [0.5; 64];
    let good = LowRank { column: 4, n: 8, k: 8, rank: 2, scale: 1.0, a: &values[..16], b: &values[..16] };
    let bad = [
        LowRank { rank: 0, a: &[], b: &[], ..good },
        LowRank { rank: 3, ..good },
        LowRank { n: 9, ..good },
        LowRank { column: usize::MAX, ..good },
    ];
    for bad in bad {
        assert!(ops.load_adapter(0, &[vec![bad]]).is_err(), "{bad:?}");
    }
    assert!(ops.load_adapter(0, &[vec![good, LowRank { k: 4, rank: 4, n: 4, ..good }]]).is_err());
    assert!(ops.load_adapter(u32::MAX - 1, &[vec![good]]).is_err());
    let mut step = |slot: u32, part: Option<LowRank<'_>>| {
        if let Some(part) = part {
            ops.load_adapter(0, &[vec![part]])?;
        }
        ops.begin(&mixed_step(&mut Noise::new(1), 3, &[slot]))?;
        ops.embedding(inputs, x);
        ops.lora(x, 0, out);
        ops.finish(&mut StepOutput::default())
    };
    assert!(step(0, None).unwrap_err().to_string().contains("slot 0"));
    step(0, Some(good)).unwrap();
    // Columns beyond the output, and an input of another width.
    assert!(step(0, Some(LowRank { column: 5, ..good })).is_err());
    assert!(step(0, Some(LowRank { k: 4, rank: 4, n: 4, ..good })).is_err());
    step(0, Some(good)).unwrap();
}
