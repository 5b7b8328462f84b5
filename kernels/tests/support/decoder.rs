//! A llama-shaped decoder with random weights, written against [`Ops`] as a model file would be.

use tidemill_kernels::reference::Reference;
use tidemill_kernels::*;

use super::experts::{Mixture, MixtureWeights};
use super::steps::{ragged, sequences};
use super::{Noise, Weight, error};

#[derive(Clone, Copy, Debug)]
pub struct DecoderShape {
    pub layers: usize,
    pub hidden: usize,
    pub heads: HeadShape,
    pub ffn: usize,
    /// Experts in the place of one feed-forward part; `ffn` is the width of one.
    pub experts: Option<RoutingShape>,
    pub vocabulary: usize,
    pub qk_norm: bool,
    pub qkv_bias: bool,
    pub spec: AttentionSpec,
}

struct LayerWeights {
    qkv: [Weight; 3],
    out: Weight,
    gate_up: [Weight; 2],
    down: Weight,
    experts: Option<(Weight, MixtureWeights)>,
    norms: [Vec<f32>; 2],
    head_norms: [Vec<f32>; 2],
    bias: Vec<f32>,
}

/// The weights, so that several backends load the same.
pub struct DecoderWeights {
    shape: DecoderShape,
    table: Weight,
    layers: Vec<LayerWeights>,
    norm: Vec<f32>,
}

impl DecoderWeights {
    pub fn random(seed: u64, shape: DecoderShape, format: Format, table: Format) -> Self {
        let noise = &mut Noise::new(seed);
        let DecoderShape { hidden, heads: HeadShape { heads, kv_heads, head_dim }, ffn, experts, .. } = shape;
        let weight = |noise: &mut Noise, n: usize, k: usize| Weight::random(noise, n, k, format, 1.0 / (k as f64).sqrt());
        let near_one = |noise: &mut Noise, n: usize| noise.values(n, 0.1).iter().map(|v| 1.0 + v).collect::<Vec<f32>>();
        let layers = (0..shape.layers)
            .map(|_| LayerWeights {
                qkv: [heads, kv_heads, kv_heads].map(|h| weight(noise, h * head_dim, hidden)),
                out: weight(noise, hidden, heads * head_dim),
                gate_up: [0, 1].map(|_| weight(noise, ffn, hidden)),
                down: weight(noise, hidden, ffn),
                experts: experts.map(|routing| {
                    // Logits far from each other: what rounding makes of the rows must not send a token elsewhere.
                    let router = Weight::random(noise, routing.experts, hidden, Format::F32, 1.0);
                    (router, MixtureWeights::random(noise, Mixture { hidden, ffn, routing }, format))
                }),
                norms: [0, 1].map(|_| near_one(noise, hidden)),
                head_norms: [0, 1].map(|_| near_one(noise, head_dim)),
                bias: noise.values((heads + 2 * kv_heads) * head_dim, 0.1),
            })
            .collect();
        let table = Weight::random(noise, shape.vocabulary, hidden, table, 1.0);
        DecoderWeights { shape, table, layers, norm: near_one(noise, hidden) }
    }
}

struct Layer {
    qkv: Matrix,
    out: Matrix,
    gate_up: Matrix,
    down: Matrix,
    /// Router, and the experts' matrices.
    experts: Option<(Matrix, [Experts; 2])>,
    norms: [Vector; 2],
    head_norm: Option<QkNorm>,
    bias: Option<Vector>,
}

/// What experts compute in.
#[derive(Clone, Copy)]
struct Routed {
    routing: Routing,
    logits: Buf,
    gate_up: Buf,
    activated: Buf,
    down: Buf,
}

impl Routed {
    fn new(ops: &mut impl Ops, shape: DecoderShape, routing: RoutingShape) -> Self {
        let rows = Rows::Routed { each: routing.each };
        Routed {
            routing: ops.alloc_routing(routing).unwrap(),
            logits: ops.alloc(Rows::Tokens, routing.experts).unwrap(),
            gate_up: ops.alloc(rows, 2 * shape.ffn).unwrap(),
            activated: ops.alloc(rows, shape.ffn).unwrap(),
            down: ops.alloc(rows, shape.hidden).unwrap(),
        }
    }
}

/// The decoder on a backend.
pub struct Decoder<O: Ops> {
    pub ops: O,
    shape: DecoderShape,
    table: Matrix,
    layers: Vec<Layer>,
    norm: Vector,
    rope: Rope,
    pub kv: KvCache,
    residual: Buf,
    normed: Buf,
    qkv: Buf,
    attended: Buf,
    gate_up: Buf,
    activated: Buf,
    routed: Option<Routed>,
    sampled: Buf,
    sampled_normed: Buf,
    pub logits: Buf,
}

impl<O: Ops> Decoder<O> {
    pub fn new(mut ops: O, weights: &DecoderWeights, format: WeightFormat, blocks: usize, dtype: KvDtype) -> Self {
        let shape = weights.shape;
        let HeadShape { heads, kv_heads, head_dim } = shape.heads;
        let mut layers = Vec::new();
        for w in &weights.layers {
            let sources = w.qkv.each_ref().map(Weight::source);
            let qkv = ops.load_matrix(&sources, format).unwrap();
            let out = ops.load_matrix(&[w.out.source()], format).unwrap();
            let gate_up = ops.load_matrix(&w.gate_up.each_ref().map(Weight::source), format).unwrap();
            let down = ops.load_matrix(&[w.down.source()], format).unwrap();
            let norms = w.norms.each_ref().map(|n| ops.load_vector(n).unwrap());
            let [q, k] = w.head_norms.each_ref().map(|n| ops.load_vector(n).unwrap());
            let head_norm = shape.qk_norm.then_some(QkNorm { q, k, eps: 1e-6 });
            let bias = shape.qkv_bias.then(|| ops.load_vector(&w.bias).unwrap());
            let experts = w.experts.as_ref().map(|(router, experts)| {
                let router = ops.load_matrix(&[router.source()], WeightFormat::Auto).unwrap();
                (router, experts.load(&mut ops, format))
            });
            layers.push(Layer { qkv, out, gate_up, down, experts, norms, head_norm, bias });
        }
        let inv_freq: Vec<f32> = (0..head_dim / 2).map(|i| 10_000f32.powf(-2.0 * i as f32 / head_dim as f32)).collect();
        let spec = KvSpec { layers: shape.layers, blocks, block_size: super::steps::BLOCK, kv_heads, head_dim, dtype };
        let token_rows = |ops: &mut O, width| ops.alloc(Rows::Tokens, width).unwrap();
        Decoder {
            table: ops.load_matrix(&[weights.table.source()], format).unwrap(),
            norm: ops.load_vector(&weights.norm).unwrap(),
            rope: ops.load_rope(&inv_freq, 1.0).unwrap(),
            kv: ops.alloc_kv(spec).unwrap(),
            residual: token_rows(&mut ops, shape.hidden),
            normed: token_rows(&mut ops, shape.hidden),
            qkv: token_rows(&mut ops, (heads + 2 * kv_heads) * head_dim),
            attended: token_rows(&mut ops, heads * head_dim),
            gate_up: token_rows(&mut ops, 2 * shape.ffn),
            activated: token_rows(&mut ops, shape.ffn),
            routed: shape.experts.map(|routing| Routed::new(&mut ops, shape, routing)),
            sampled: ops.alloc(Rows::Samples, shape.hidden).unwrap(),
            sampled_normed: ops.alloc(Rows::Samples, shape.hidden).unwrap(),
            logits: ops.alloc(Rows::Samples, shape.vocabulary).unwrap(),
            ops,
            shape,
            layers,
        }
    }

    /// A random adapter of one rank on every matrix.
    pub fn load_adapter(&mut self, noise: &mut Noise, slot: u32, rank: usize) {
        self.try_load_adapter(noise, slot, rank).unwrap();
    }

    pub fn try_load_adapter(&mut self, noise: &mut Noise, slot: u32, rank: usize) -> Result<(), KernelError> {
        let DecoderShape { hidden, ffn, heads: HeadShape { heads, kv_heads, head_dim }, .. } = self.shape;
        let (q, kv) = (heads * head_dim, kv_heads * head_dim);
        let sites: [(usize, &[usize]); 4] = [(hidden, &[q, kv, kv]), (q, &[hidden]), (hidden, &[ffn, ffn]), (ffn, &[hidden])];
        // The same numbers for all matrices: only their sizes matter here.
        let widest = hidden.max(ffn).max(q);
        let values = noise.values(widest * rank, 0.01);
        let site = |(k, parts): &(usize, &[usize])| {
            let mut column = 0;
            let part = |&n: &usize| {
                column += n;
                LowRank { column: column - n, n, k: *k, rank, scale: 1.0, a: &values[..rank * k], b: &values[..n * rank] }
            };
            parts.iter().map(part).collect::<Vec<_>>()
        };
        let all: Vec<_> = (0..self.shape.layers).flat_map(|_| sites.iter().map(site)).collect();
        self.ops.load_adapter(slot, &all)
    }

    pub fn forward(&mut self, batch: &StepBatch, out: &mut StepOutput) -> Result<(), KernelError> {
        self.enqueue(batch)?;
        self.ops.finish(out)
    }

    /// Sets a step going, for [`Ops::collect`].
    pub fn submit(&mut self, batch: &StepBatch) -> Result<(), KernelError> {
        self.enqueue(batch)?;
        self.ops.submit()
    }

    fn enqueue(&mut self, batch: &StepBatch) -> Result<(), KernelError> {
        let (ops, heads) = (&mut self.ops, self.shape.heads);
        ops.begin(batch)?;
        ops.embedding(self.table, self.residual);
        for (index, layer) in self.layers.iter().enumerate() {
            ops.rms_norm(self.residual, layer.norms[0], 1e-5, self.normed);
            ops.linear(self.normed, layer.qkv, layer.bias, self.qkv, Store::Replace);
            ops.lora(self.normed, index * 4, self.qkv);
            ops.rope_cache(self.qkv, heads, layer.head_norm, self.rope, self.kv, index);
            ops.paged_attention(self.qkv, heads, self.shape.spec, self.kv, index, self.attended);
            ops.linear(self.attended, layer.out, None, self.residual, Store::Add);
            ops.lora(self.attended, index * 4 + 1, self.residual);
            ops.rms_norm(self.residual, layer.norms[1], 1e-5, self.normed);
            if let (Some((router, [gate_up, down])), Some(b)) = (layer.experts, self.routed) {
                ops.linear(self.normed, router, None, b.logits, Store::Replace);
                ops.route(b.logits, true, b.routing);
                ops.expert_linear(self.normed, gate_up, b.routing, b.gate_up);
                ops.silu_and_mul(b.gate_up, b.activated);
                ops.expert_linear(b.activated, down, b.routing, b.down);
                ops.combine(b.down, b.routing, self.residual, Store::Add);
                continue;
            }
            ops.linear(self.normed, layer.gate_up, None, self.gate_up, Store::Replace);
            ops.lora(self.normed, index * 4 + 2, self.gate_up);
            ops.silu_and_mul(self.gate_up, self.activated);
            ops.linear(self.activated, layer.down, None, self.residual, Store::Add);
            ops.lora(self.activated, index * 4 + 3, self.residual);
        }
        ops.gather(self.residual, self.sampled);
        ops.rms_norm(self.sampled, self.norm, 1e-5, self.sampled_normed);
        ops.linear(self.sampled_normed, self.table, None, self.logits, Store::Replace);
        ops.sample(self.logits, self.shape.vocabulary);
        Ok(())
    }
}

pub const LIMITS: Limits = Limits { max_tokens: 96, max_samples: 8, max_positions: 256 };
/// Blocks of the cache of a [`Trial`].
const BLOCKS: usize = 48;

fn small_shapes() -> [DecoderShape; 3] {
    let spec = |head_dim: usize| AttentionSpec {
        scale: 1.0 / (head_dim as f32).sqrt(),
        sliding_window: None,
        soft_cap: None,
        alibi: None,
    };
    [
        DecoderShape {
            layers: 2,
            hidden: 96,
            heads: HeadShape { heads: 6, kv_heads: 2, head_dim: 64 },
            ffn: 160,
            experts: None,
            vocabulary: 301,
            qk_norm: false,
            qkv_bias: false,
            spec: spec(64),
        },
        DecoderShape {
            layers: 2,
            hidden: 128,
            heads: HeadShape { heads: 4, kv_heads: 4, head_dim: 80 },
            ffn: 96,
            experts: None,
            vocabulary: 257,
            qk_norm: true,
            qkv_bias: true,
            spec: AttentionSpec { sliding_window: Some(40), soft_cap: Some(30.0), ..spec(80) },
        },
        DecoderShape {
            layers: 2,
            hidden: 96,
            heads: HeadShape { heads: 2, kv_heads: 1, head_dim: 64 },
            ffn: 64,
            experts: Some(RoutingShape { experts: 5, each: 2 }),
            vocabulary: 203,
            qk_norm: false,
            qkv_bias: false,
            spec: spec(64),
        },
    ]
}

/// A decoder, steps for it, and the logits that the reference gives them.
pub struct Trial {
    pub name: String,
    pub tolerance: f64,
    weights: DecoderWeights,
    packed: WeightFormat,
    dtype: KvDtype,
    steps: Vec<StepBatch>,
    wanted: Vec<Vec<f32>>,
}

impl Trial {
    /// f32 weights and cache must agree to rounding; 8- and 4-bit grids and bf16 products to theirs.
    pub fn all() -> impl Iterator<Item = Trial> {
        let cases = [
            (Format::F32, WeightFormat::F32, KvDtype::F32, 2e-4),
            (Format::Bf16, WeightFormat::Auto, KvDtype::Bf16, 4e-2),
            (Format::Q8_0, WeightFormat::Auto, KvDtype::Bf16, 6e-2),
            (Format::Q4_0, WeightFormat::Auto, KvDtype::F32, 6e-2),
        ];
        let shapes = small_shapes().into_iter().enumerate();
        shapes.flat_map(move |(seed, shape)| {
            cases.map(|(format, packed, dtype, tolerance)| Trial::new(seed as u64, shape, format, packed, dtype, tolerance))
        })
    }

    pub fn new(seed: u64, shape: DecoderShape, format: Format, packed: WeightFormat, dtype: KvDtype, tolerance: f64) -> Trial {
        let weights = DecoderWeights::random(7, shape, format, format);
        let noise = &mut Noise::new(seed);
        let mut list = sequences(noise, 5, 150, shape.vocabulary, BLOCKS);
        let steps = ragged(noise, &mut list, LIMITS.max_tokens);
        let mut oracle = Decoder::new(Reference::new(LIMITS), &weights, packed, BLOCKS, dtype);
        let wanted = oracle.logits_of(&steps);
        let experts = if shape.experts.is_some() { ", experts" } else { "" };
        let name = format!("{format:?} as {packed:?}, cache {dtype:?}, heads of {}{experts}", shape.heads.head_dim);
        Trial { name, tolerance, weights, packed, dtype, steps, wanted }
    }

    /// The largest error of a backend's logits in the first steps.
    pub fn error<O: Ops>(&self, ops: O, steps: usize) -> f64 {
        let mut decoder = Decoder::new(ops, &self.weights, self.packed, BLOCKS, self.dtype);
        let got = decoder.logits_of(&self.steps[..steps.min(self.steps.len())]);
        got.iter().zip(&self.wanted).map(|(got, want)| error(got, want)).fold(0.0, f64::max)
    }
}

impl<O: Ops> Decoder<O> {
    /// The logits of each step.
    pub fn logits_of(&mut self, steps: &[StepBatch]) -> Vec<Vec<f32>> {
        let mut out = StepOutput::default();
        let mut logits = |step: &StepBatch| {
            self.forward(step, &mut out).unwrap();
            assert_eq!(out.samples.len(), step.samples.len());
            self.ops.read(self.logits).unwrap()
        };
        steps.iter().map(&mut logits).collect()
    }
}
