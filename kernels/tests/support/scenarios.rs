//! What every backend must compute as the scalar reference does: operations on random ragged steps. Buffers hold NaN before a step: an
//! element that was not written, or one read from a row beyond the step's, shows.

use tidemill_kernels::reference::Reference;
use tidemill_kernels::*;

use super::backend::Backend;
use super::steps::{Sequence, append, greedy, ragged, sequences};
use super::{Noise, Weight, error};
use super::{experts, low_rank};

pub const LIMITS: Limits = Limits { max_tokens: 70, max_samples: 9, max_positions: 400 };

type Run = Box<dyn Fn(&mut dyn Backend) -> Vec<Buf>>;

/// Operations whose buffers are compared.
pub struct Scenario {
    /// Which operation, for a table.
    pub operation: String,
    /// Which sizes, for a message.
    pub sizes: String,
    /// Largest difference relative to the largest magnitude.
    pub tolerance: f64,
    pub limits: Limits,
    run: Run,
}

impl Scenario {
    pub fn new(
        operation: impl Into<String>,
        sizes: String,
        tolerance: f64,
        run: impl Fn(&mut dyn Backend) -> Vec<Buf> + 'static,
    ) -> Self {
        Scenario { operation: operation.into(), sizes, tolerance, limits: LIMITS, run: Box::new(run) }
    }

    /// Under other limits.
    pub fn within(self, limits: Limits) -> Self {
        Scenario { limits, ..self }
    }

    /// What the reference computes.
    pub fn wanted(&self) -> Vec<Vec<f32>> {
        let mut oracle = Reference::new(self.limits);
        (self.run)(&mut oracle).into_iter().map(|buf| oracle.read(buf).unwrap()).collect()
    }

    /// What a backend computes, bit by bit.
    pub fn bits(&self, ops: &mut dyn Backend) -> Vec<u32> {
        let buffers = (self.run)(ops);
        buffers.into_iter().flat_map(|buf| ops.read(buf).unwrap()).map(f32::to_bits).collect()
    }

    /// The largest error of a backend; infinite where an element was not written, or one beyond the step's rows was.
    pub fn error(&self, ops: &mut dyn Backend, wanted: &[Vec<f32>]) -> f64 {
        let buffers = (self.run)(ops);
        let each = buffers.into_iter().zip(wanted).map(|(buf, want)| {
            let all = ops.whole(buf);
            let (rows, beyond) = all.split_at(want.len());
            if beyond.iter().all(|v| v.is_nan()) { error(rows, want) } else { f64::INFINITY }
        });
        each.fold(0.0, f64::max)
    }
}

/// All of them.
pub fn all() -> Vec<Scenario> {
    [rows(), linears(), attention(), copies(), long_contexts(), low_rank::scenarios(), experts::scenarios(), experts::gates()]
        .into_iter()
        .flatten()
        .collect()
}

/// A step of `rows` tokens of one sequence that touches no cache, sampling some rows (some twice).
pub fn plain_step(noise: &mut Noise, rows: usize, vocabulary: usize) -> StepBatch {
    let mut batch = StepBatch::default();
    let tokens = (0..rows).map(|_| noise.below(vocabulary) as u32).collect();
    append(&mut batch, &mut Sequence { tokens, table: (0..rows.div_ceil(32) as u32).collect(), computed: 0 }, rows);
    batch.slots.fill(-1);
    batch.samples = (0..noise.between(1, 9)).map(|_| greedy(noise.below(rows) as u32)).collect();
    batch
}

pub fn rows() -> Vec<Scenario> {
    let mut all = Vec::new();
    // The last are more than threads of a card hold of a row, in whole fours and not.
    let sizes = [(1, 576), (7, 64), (70, 40), (33, 130), (2, 1), (3, 1027), (2, 4999), (1, 9216), (2, 8195)];
    for (case, (rows, width)) in sizes.into_iter().enumerate() {
        let sizes = format!("{rows} × {width}");
        all.push(Scenario::new("embedding, rms_norm, gather", sizes.clone(), 2e-6, move |ops| {
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
        }));
        all.push(Scenario::new("layer_norm", sizes.clone(), 6e-6, move |ops| {
            let noise = &mut Noise::new(case as u64);
            let table = ops.load_table(noise, 50, width);
            let weight = ops.load_vector(&noise.values(width, 1.0)).unwrap();
            let matrix = Weight::random(noise, 24, width, Format::F32, 1.0);
            let matrix = ops.load_matrix(&[matrix.source()], WeightFormat::F32).unwrap();
            let [x, normed] = [0; 2].map(|_| ops.alloc_poisoned(Rows::Tokens, width));
            let out = ops.alloc_poisoned(Rows::Tokens, 24);
            ops.begin(&plain_step(noise, rows, 50)).unwrap();
            ops.embedding(table, x);
            ops.layer_norm(x, weight, 1e-5, normed);
            ops.linear(normed, matrix, None, out, Store::Replace);
            ops.run();
            vec![normed, out]
        }));
        all.push(Scenario::new("clamp", sizes.clone(), 1e-6, move |ops| {
            let noise = &mut Noise::new(case as u64);
            let table = ops.load_table(noise, 50, width);
            let x = ops.alloc_poisoned(Rows::Tokens, width);
            ops.begin(&plain_step(noise, rows, 50)).unwrap();
            ops.embedding(table, x);
            ops.clamp(x, 0.25);
            ops.run();
            vec![x]
        }));
        all.push(Scenario::new("scale, rms_norm_add", sizes.clone(), 6e-6, move |ops| {
            let noise = &mut Noise::new(case as u64);
            let [table, other] = [0; 2].map(|_| ops.load_table(noise, 50, width));
            let weight = ops.load_vector(&noise.values(width, 1.0)).unwrap();
            let matrix = Weight::random(noise, 24, width, Format::F32, 1.0);
            let matrix = ops.load_matrix(&[matrix.source()], WeightFormat::F32).unwrap();
            let [x, sum] = [0; 2].map(|_| ops.alloc_poisoned(Rows::Tokens, width));
            let out = ops.alloc_poisoned(Rows::Tokens, 24);
            ops.begin(&plain_step(noise, rows, 50)).unwrap();
            ops.embedding(table, x);
            ops.scale(x, 24.25);
            ops.embedding(other, sum);
            ops.rms_norm_add(x, weight, 1e-5, sum);
            // What reads the sum must read it all.
            ops.linear(sum, matrix, None, out, Store::Replace);
            ops.run();
            vec![x, sum, out]
        }));
        all.push(Scenario::new("soft_cap", sizes.clone(), 6e-6, move |ops| {
            let noise = &mut Noise::new(case as u64);
            let table = ops.load_table(noise, 50, width);
            let x = ops.alloc_poisoned(Rows::Tokens, width);
            let sampled = ops.alloc_poisoned(Rows::Samples, width);
            ops.begin(&plain_step(noise, rows, 50)).unwrap();
            ops.embedding(table, x);
            ops.scale(x, 40.0);
            ops.gather(x, sampled);
            ops.soft_cap(sampled, 30.0);
            ops.run();
            vec![x, sampled]
        }));
        all.push(Scenario::new("gelu_tanh_and_mul", sizes.clone(), 2e-6, move |ops| {
            let noise = &mut Noise::new(case as u64);
            let table = ops.load_table(noise, 50, 2 * width);
            let gate_up = ops.alloc_poisoned(Rows::Tokens, 2 * width);
            let out = ops.alloc_poisoned(Rows::Tokens, width);
            ops.begin(&plain_step(noise, rows, 50)).unwrap();
            ops.embedding(table, gate_up);
            ops.scale(gate_up, 3.0);
            ops.gelu_tanh_and_mul(gate_up, out);
            ops.run();
            vec![out]
        }));
        all.push(Scenario::new("gelu", sizes.clone(), 4e-6, move |ops| {
            let noise = &mut Noise::new(case as u64);
            let table = Weight::random(noise, 50, width, Format::F32, 4.0);
            let table = ops.load_matrix(&[table.source()], WeightFormat::F32).unwrap();
            let matrix = Weight::random(noise, 24, width, Format::F32, 1.0);
            let matrix = ops.load_matrix(&[matrix.source()], WeightFormat::F32).unwrap();
            let [x, curved] = [0; 2].map(|_| ops.alloc_poisoned(Rows::Tokens, width));
            let out = ops.alloc_poisoned(Rows::Tokens, 24);
            ops.begin(&plain_step(noise, rows, 50)).unwrap();
            ops.embedding(table, x);
            ops.gelu(x, curved);
            ops.linear(curved, matrix, None, out, Store::Replace);
            ops.run();
            vec![curved, out]
        }));
        all.push(Scenario::new("silu_and_mul", sizes, 2e-6, move |ops| {
            let noise = &mut Noise::new(case as u64);
            let table = ops.load_table(noise, 50, 2 * width);
            let gate_up = ops.alloc_poisoned(Rows::Tokens, 2 * width);
            let out = ops.alloc_poisoned(Rows::Tokens, width);
            ops.begin(&plain_step(noise, rows, 50)).unwrap();
            ops.embedding(table, gate_up);
            ops.silu_and_mul(gate_up, out);
            ops.run();
            vec![out]
        }));
    }
    all
}

/// Rows of experts, more than a grid has blocks along y or z.
pub fn many_routed_rows() -> Scenario {
    let scenario = Scenario::new("silu_and_mul", "65,552 routed rows".into(), 0.0, |ops| {
        let gate_up = ops.alloc(Rows::Routed { each: 8 }, 2).unwrap();
        let out = ops.alloc_poisoned(Rows::Routed { each: 8 }, 1);
        ops.begin(&plain_step(&mut Noise::new(8), 8194, 50)).unwrap();
        ops.silu_and_mul(gate_up, out);
        ops.run();
        vec![out]
    });
    scenario.within(Limits { max_tokens: 8194, max_samples: 9, max_positions: 8200 })
}

/// Linears of every form: replacing, adding, with a bias.
pub fn linears() -> Vec<Scenario> {
    let forms = [
        (Format::F32, WeightFormat::F32, 3e-6),
        (Format::F32, WeightFormat::Bf16, 1.5e-2),
        (Format::F16, WeightFormat::Auto, 1.5e-2),
        (Format::Bf16, WeightFormat::Int8, 3e-2),
        (Format::Q8_0, WeightFormat::Auto, 3e-2),
        (Format::Q4_0, WeightFormat::Auto, 3e-2),
        (Format::Q4_1, WeightFormat::Auto, 3e-2),
    ];
    let mut all = Vec::new();
    for (case, (format, packed, tolerance)) in forms.into_iter().enumerate() {
        all.extend(linear(case as u64, format, packed, tolerance));
    }
    all
}

/// A form of weights, in several sizes.
pub fn linear(seed: u64, format: Format, packed: WeightFormat, tolerance: f64) -> Vec<Scenario> {
    let sizes = [(1, 64, 48), (5, 96, 17), (16, 160, 100), (70, 576, 33)];
    let one = |(rows, k, n): (usize, usize, usize)| {
        Scenario::new(format!("linear, {format:?} as {packed:?}"), format!("{rows} × {k} × {n}"), tolerance, move |ops| {
            let noise = &mut Noise::new(seed);
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
        })
    };
    sizes.into_iter().map(one).collect()
}

/// Weights and rows of 8-bit floats, for a backend that rounds activations: against products of what was not rounded.
pub fn fp8_activations() -> Vec<Scenario> {
    let one = |(rows, k, n): (usize, usize, usize)| {
        Scenario::new("linear, weights and activations as Fp8", format!("{rows} × {k} × {n}"), 6e-2, move |ops| {
            let noise = &mut Noise::new(31);
            let table = ops.load_table(noise, 50, k);
            let w = Weight::random(noise, n, k, Format::Bf16, 0.5);
            let w = ops.load_matrix(&[w.source()], WeightFormat::Fp8).unwrap();
            let bias = ops.load_vector(&noise.values(n, 1.0)).unwrap();
            let x = ops.alloc_poisoned(Rows::Tokens, k);
            let [plain, sum] = [0; 2].map(|_| ops.alloc_poisoned(Rows::Tokens, n));
            ops.begin(&plain_step(noise, rows, 50)).unwrap();
            ops.embedding(table, x);
            ops.linear(x, w, None, plain, Store::Replace);
            ops.linear(x, w, Some(bias), sum, Store::Replace);
            ops.linear(x, w, None, sum, Store::Add);
            ops.run();
            vec![plain, sum]
        })
    };
    [(65, 64, 48), (70, 576, 160), (69, 1000, 64)].map(one).into()
}

/// What only cards have: weights and caches of 8-bit floats.
pub fn only_on_cards() -> Vec<Scenario> {
    let linears = [Format::F32, Format::Bf16].map(|format| linear(9, format, WeightFormat::Fp8, 6e-2));
    let attention = attention_in(KvDtype::Fp8, 4e-2);
    let spec = AttentionSpec { scale: 0.3, sliding_window: None, soft_cap: None, alibi: None };
    let rest = [copies_in(KvDtype::Fp8), long_context(spec, false, KvDtype::Fp8), long_context(spec, true, KvDtype::Fp8)];
    let experts = experts::in_form(Format::Bf16, WeightFormat::Fp8, 8e-2);
    linears.into_iter().flatten().chain(attention).chain(rest).chain(experts).collect()
}

const SHAPES: [HeadShape; 6] = [
    HeadShape { heads: 9, kv_heads: 3, head_dim: 64 },
    HeadShape { heads: 4, kv_heads: 4, head_dim: 80 },
    HeadShape { heads: 8, kv_heads: 1, head_dim: 96 },
    HeadShape { heads: 4, kv_heads: 2, head_dim: 128 },
    HeadShape { heads: 2, kv_heads: 1, head_dim: 6 },
    HeadShape { heads: 3, kv_heads: 1, head_dim: 256 },
];

pub fn attention() -> Vec<Scenario> {
    [(KvDtype::F32, 1e-5), (KvDtype::Bf16, 2e-2)]
        .into_iter()
        .flat_map(|(dtype, tolerance)| attention_in(dtype, tolerance))
        .collect()
}

/// How scores are made: as `spec` says, with a slope of ALiBi for each head if they are `inclined`.
fn with_slopes(ops: &mut dyn Backend, heads: HeadShape, spec: AttentionSpec, inclined: bool) -> AttentionSpec {
    // From steep to flat, as models have them.
    let slopes: Vec<f32> = (0..heads.heads).map(|h| 0.6f32.powi(h as i32 + 1)).collect();
    AttentionSpec { alibi: inclined.then(|| ops.load_vector(&slopes).unwrap()), ..spec }
}

/// Attention over a cache of one type.
pub fn attention_in(dtype: KvDtype, tolerance: f64) -> Vec<Scenario> {
    let mut all = Vec::new();
    for (case, heads) in SHAPES.into_iter().enumerate() {
        // Of the widths that no matrix unit takes, one shows what 8-bit floats do.
        if dtype == KvDtype::Fp8 && [80, 6].contains(&heads.head_dim) {
            continue;
        }
        // Emulated threads are slow.
        let longest = if heads.head_dim == 256 { 80 } else { 300 };
        let plain =
            AttentionSpec { scale: 1.0 / (heads.head_dim as f32).sqrt(), sliding_window: None, soft_cap: None, alibi: None };
        let capped = AttentionSpec { sliding_window: Some(37), soft_cap: Some(2.0), ..plain };
        // With slopes alone, or with everything.
        let inclined = if case % 2 == 0 { plain } else { capped };
        for (spec, alibi) in [(plain, false), (capped, false), (inclined, true)] {
            let operation = format!("rope_cache, paged_attention, {dtype:?}");
            all.push(Scenario::new(operation, format!("{heads:?} {spec:?} slopes {alibi}"), tolerance, move |ops| {
                let spec = with_slopes(ops, heads, spec, alibi);
                let noise = &mut Noise::new(case as u64);
                let (width, half) = ((heads.heads + 2 * heads.kv_heads) * heads.head_dim, heads.head_dim / 2 - case % 2);
                let table = ops.load_table(noise, 64, width);
                let rope = ops.load_rope(&(0..half).map(|i| 0.7f32.powi(i as i32)).collect::<Vec<_>>(), 1.1).unwrap();
                let [q, k] = [0; 2].map(|_| ops.load_vector(&noise.values(heads.head_dim, 1.0)).unwrap());
                let norm = (case % 2 == 1).then_some(QkNorm { q, k, eps: 1e-6 });
                let qkv = ops.alloc_poisoned(Rows::Tokens, width);
                let out = ops.alloc_poisoned(Rows::Tokens, heads.heads * heads.head_dim);
                let (kv_heads, head_dim) = (heads.kv_heads, heads.head_dim);
                let kv = ops.alloc_kv(KvSpec { layers: 2, blocks: 60, block_size: 32, kv_heads, head_dim, dtype }).unwrap();
                let mut list = sequences(noise, 6, longest, 64, 60);
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
            }));
        }
    }
    all
}

/// Attention where every access to memory is watched: few rows and many, heads of every kind, a context in parts.
pub fn brief_attention() -> Vec<Scenario> {
    let plain = AttentionSpec { scale: 0.2, sliding_window: None, soft_cap: None, alibi: None };
    let cases = [
        (HeadShape { heads: 4, kv_heads: 2, head_dim: 64 }, KvDtype::Bf16, 270),
        (HeadShape { heads: 2, kv_heads: 1, head_dim: 80 }, KvDtype::F32, 35),
        (HeadShape { heads: 2, kv_heads: 2, head_dim: 6 }, KvDtype::Bf16, 35),
        (HeadShape { heads: 4, kv_heads: 1, head_dim: 128 }, KvDtype::Fp8, 70),
        (HeadShape { heads: 3, kv_heads: 1, head_dim: 256 }, KvDtype::Bf16, 70),
    ];
    let one = |(heads, dtype, context): (HeadShape, KvDtype, usize)| {
        let scenario = Scenario::new(format!("brief attention, {dtype:?}"), format!("{heads:?}"), 4e-2, move |ops| {
            let HeadShape { kv_heads, head_dim, .. } = heads;
            let noise = &mut Noise::new(head_dim as u64);
            let width = (heads.heads + 2 * kv_heads) * head_dim;
            let table = ops.load_table(noise, 64, width);
            let rope = ops.load_rope(&[1.0, 0.1, 0.01], 1.0).unwrap();
            let [q, k] = [0; 2].map(|_| ops.load_vector(&noise.values(head_dim, 1.0)).unwrap());
            let norm = (head_dim != 64).then_some(QkNorm { q, k, eps: 1e-6 });
            let spec = with_slopes(ops, heads, plain, dtype == KvDtype::Bf16);
            let (qkv, whole) =
                (ops.alloc_poisoned(Rows::Tokens, width), ops.alloc_poisoned(Rows::Tokens, heads.heads * head_dim));
            let kv = ops.alloc_kv(KvSpec { layers: 1, blocks: 10, block_size: 32, kv_heads, head_dim, dtype }).unwrap();
            let tokens = (0..context).map(|_| noise.below(64) as u32).collect();
            let mut long = Sequence { tokens, table: (0..9).rev().collect(), computed: 0 };
            let mut short = Sequence { tokens: vec![3; 9], table: vec![9], computed: 0 };
            for (more, beside) in [(context - 1, 8), (1, 1)] {
                let mut step = StepBatch::default();
                append(&mut step, &mut long, more);
                append(&mut step, &mut short, beside);
                ops.poison(whole);
                ops.begin(&step).unwrap();
                ops.embedding(table, qkv);
                ops.rope_cache(qkv, heads, norm, rope, kv, 0);
                // Prompts of many rows are as slow as they are alike.
                if more < 100 {
                    ops.paged_attention(qkv, heads, spec, kv, 0, whole);
                }
                ops.run();
            }
            vec![qkv, whole]
        });
        Scenario { limits: Limits { max_tokens: 300, max_samples: 1, max_positions: 300 }, ..scenario }
    };
    cases.into_iter().map(one).collect()
}

/// A fork copies its last block and then goes its own way.
pub fn copies() -> Vec<Scenario> {
    vec![copies_in(KvDtype::Bf16)]
}

pub fn copies_in(dtype: KvDtype) -> Scenario {
    let heads = HeadShape { heads: 2, kv_heads: 1, head_dim: 64 };
    let spec = AttentionSpec { scale: 0.125, sliding_window: None, soft_cap: None, alibi: None };
    Scenario::new("copied blocks", format!("two forks, {dtype:?}"), 2e-2, move |ops| {
        let noise = &mut Noise::new(5);
        let table = ops.load_table(noise, 64, 256);
        let rope = ops.load_rope(&[1.0, 0.1], 1.0).unwrap();
        let qkv = ops.alloc_poisoned(Rows::Tokens, 256);
        let outs = [0; 2].map(|_| ops.alloc_poisoned(Rows::Tokens, 128));
        let kv = ops.alloc_kv(KvSpec { layers: 2, blocks: 6, block_size: 32, kv_heads: 1, head_dim: 64, dtype }).unwrap();
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
    })
}

/// Few rows after a long context: where it is cut into parts, two parts and a bit, and a window that leaves the first part out.
pub fn long_contexts() -> Vec<Scenario> {
    let plain = AttentionSpec { scale: 0.3, sliding_window: None, soft_cap: None, alibi: None };
    let narrow = AttentionSpec { sliding_window: Some(300), ..plain };
    [(plain, false), (narrow, false), (plain, true)].map(|(spec, alibi)| long_context(spec, alibi, KvDtype::Bf16)).into()
}

pub fn long_context(spec: AttentionSpec, alibi: bool, dtype: KvDtype) -> Scenario {
    let heads = HeadShape { heads: 4, kv_heads: 2, head_dim: 64 };
    let sizes = format!("{spec:?} slopes {alibi}");
    let scenario = Scenario::new(format!("paged_attention in parts, {dtype:?}"), sizes, 2e-2, move |ops| {
        let spec = with_slopes(ops, heads, spec, alibi);
        let noise = &mut Noise::new(3);
        let table = ops.load_table(noise, 64, 512);
        let rope = ops.load_rope(&[1.0, 0.1], 1.0).unwrap();
        let kv = ops.alloc_kv(KvSpec { layers: 1, blocks: 40, block_size: 32, kv_heads: 2, head_dim: 64, dtype }).unwrap();
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
        vec![out]
    });
    Scenario { limits: Limits { max_tokens: 1100, max_samples: 1, max_positions: 1200 }, ..scenario }
}

/// Prompts in chunks behind what was computed before, in blocks of one size or another that hold NaN where nothing was written since: what
/// was there before must not matter. Widths and a cache that `wgmma` takes, too.
pub fn prompts() -> Vec<Scenario> {
    let shapes = [(9, 3, 64, 16), (4, 2, 128, 32), (24, 1, 64, 32), (2, 2, 128, 48)];
    let specs = [(None, None, false), (Some(140), Some(3.0), false), (None, None, true), (Some(140), Some(3.0), true)];
    let cases = shapes.into_iter().flat_map(|shape| specs.map(|spec| (shape, spec)));
    let one = |((heads, kv_heads, head_dim, block), spec)| {
        prompt(HeadShape { heads, kv_heads, head_dim }, block, KvDtype::Bf16, 211, spec)
    };
    cases.map(one).collect()
}

/// The same of few new tokens behind contexts that are so long that cards cut them into parts, by caches of one type.
pub fn prompts_behind_long_contexts(dtype: KvDtype) -> Vec<Scenario> {
    let all = [(6, 2, 64, 16, false), (4, 2, 128, 32, true), (2, 1, 256, 32, true)];
    let one = |(heads, kv_heads, head_dim, block, inclined)| {
        let spec = if inclined { (Some(1700), Some(3.0), true) } else { (None, None, false) };
        prompt(HeadShape { heads, kv_heads, head_dim }, block, dtype, 3111, spec)
    };
    all.into_iter().map(one).collect()
}

/// Of two sequences, one has 59 new tokens behind so many, the other 21 behind 3.
fn prompt(
    heads: HeadShape,
    block_size: usize,
    dtype: KvDtype,
    before: usize,
    (sliding_window, soft_cap, alibi): (Option<usize>, Option<f32>, bool),
) -> Scenario {
    const TOKENS: usize = 64;
    let HeadShape { kv_heads, head_dim, .. } = heads;
    let spec = AttentionSpec { scale: 0.5 / (head_dim as f32).sqrt(), sliding_window, soft_cap, alibi: None };
    let sizes = format!("{heads:?} {spec:?} slopes {alibi}, blocks of {block_size}, behind {before}");
    let tolerance = if dtype == KvDtype::Fp8 { 4e-2 } else { 2e-2 };
    let most = 2 * (before + 59).next_multiple_of(block_size);
    let scenario = Scenario::new(format!("paged_attention of prompts, {dtype:?}"), sizes, tolerance, move |ops| {
        let spec = with_slopes(ops, heads, spec, alibi);
        let noise = &mut Noise::new(head_dim as u64);
        let width = (heads.heads + 2 * kv_heads) * head_dim;
        let values = noise.values(TOKENS * width, 1.0).into_iter().chain(vec![f32::NAN; width]).collect::<Vec<_>>();
        let table = ops.load_matrix(&[Weight::from_f32(width, &values).source()], WeightFormat::F32).unwrap();
        let rope = ops.load_rope(&[1.0, 0.1], 1.0).unwrap();
        let blocks = most / block_size;
        let kv = ops.alloc_kv(KvSpec { layers: 1, blocks, block_size, kv_heads, head_dim, dtype }).unwrap();
        let qkv = ops.alloc_poisoned(Rows::Tokens, width);
        let out = ops.alloc_poisoned(Rows::Tokens, heads.heads * head_dim);
        // The blocks of two sequences, one running down and one up.
        let half = blocks as u32 / 2;
        let tables: [Vec<u32>; 2] = [(0..half).rev().collect(), (half..blocks as u32).collect()];
        let step = |ops: &mut dyn Backend, chunks: [std::ops::Range<usize>; 2], token: &mut dyn FnMut() -> u32, attend: bool| {
            let mut batch = StepBatch::default();
            for (table, chunk) in tables.iter().zip(chunks) {
                batch.sequences.push(SequenceSpan {
                    first_row: batch.tokens.len() as u32,
                    rows: chunk.len() as u32,
                    context_len: chunk.end as u32,
                    first_block: batch.blocks.len() as u32,
                });
                batch.blocks.extend_from_slice(table);
                for position in chunk {
                    batch.tokens.push(token());
                    batch.positions.push(position as u32);
                    let block = table[position / block_size] as usize;
                    batch.slots.push((block * block_size + position % block_size) as i64);
                }
            }
            ops.begin(&batch).unwrap();
            ops.embedding(table, qkv);
            ops.rope_cache(qkv, heads, None, rope, kv, 0);
            if attend {
                ops.paged_attention(qkv, heads, spec, kv, 0, out);
            }
            ops.run();
        };
        let all = half as usize * block_size;
        step(ops, [0..all, 0..all], &mut || TOKENS as u32, false);
        step(ops, [0..before, 0..3], &mut || noise.below(TOKENS) as u32, false);
        step(ops, [before..before + 59, 3..24], &mut || noise.below(TOKENS) as u32, true);
        vec![out]
    });
    Scenario { limits: Limits { max_tokens: most, max_samples: 1, max_positions: most }, ..scenario }
}

/// Rows of one sequence of 64 tokens, taken in steps of these sizes, with `neighbours` and one more in each step (none: with nobody).
pub fn rows_in_company(ops: &mut dyn Backend, weight: &Weight, takes: &[usize], neighbours: usize) -> Vec<f32> {
    let heads = HeadShape { heads: 6, kv_heads: 2, head_dim: 64 };
    let spec = AttentionSpec { scale: 0.125, sliding_window: None, soft_cap: None, alibi: None };
    let table = ops.load_table(&mut Noise::new(12), 64, 128);
    let w = ops.load_matrix(&[weight.source()], WeightFormat::Auto).unwrap();
    let rope = ops.load_rope(&[1.0, 0.1], 1.0).unwrap();
    let cache = KvSpec { layers: 1, blocks: 60, block_size: 32, kv_heads: 2, head_dim: 64, dtype: KvDtype::Bf16 };
    let kv = ops.alloc_kv(cache).unwrap();
    let x = ops.alloc_poisoned(Rows::Tokens, 128);
    let qkv = ops.alloc_poisoned(Rows::Tokens, 640);
    let out = ops.alloc_poisoned(Rows::Tokens, 384);
    let mut mine = Sequence { tokens: (0..64).collect(), table: vec![58, 59], computed: 0 };
    let mut rows = Vec::new();
    for &take in takes {
        let mut step = StepBatch::default();
        // Neighbours recompute their first tokens again and again; only their rows matter here.
        let beside = |step: &mut StepBatch, i: usize, rows: usize| {
            append(step, &mut Sequence { computed: 0, table: vec![i as u32], tokens: vec![7; 4] }, rows);
        };
        (0..neighbours).for_each(|i| beside(&mut step, i, 1 + i % 2));
        let first = step.tokens.len();
        append(&mut step, &mut mine, take);
        if neighbours > 0 {
            beside(&mut step, neighbours, 1);
        }
        ops.begin(&step).unwrap();
        ops.embedding(table, x);
        ops.linear(x, w, None, qkv, Store::Replace);
        ops.rope_cache(qkv, heads, None, rope, kv, 0);
        ops.paged_attention(qkv, heads, spec, kv, 0, out);
        ops.run();
        rows.extend_from_slice(&ops.read(out).unwrap()[first * 384..(first + take) * 384]);
    }
    assert!(rows.iter().all(|v| v.is_finite()));
    rows
}
