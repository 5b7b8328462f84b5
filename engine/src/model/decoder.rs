//! The decoder that Llama, Mistral, Mixtral, DBRX, MPT, Qwen2, Qwen3 and Gemma share: pre-norm attention with rotary positions (or ALiBi) and
//! grouped queries, then a feed-forward part, mostly gated, or experts. The families differ in kind of norm, biases, head norms, limits of q, k
//! and v, window and frequencies, Gemma in more ([`crate::model_config::Gemma`]), all of which are data here.

use tidemill_kernels::{
    AttentionSpec, Buf, Experts, HeadShape, KernelError, KvCache, KvDtype, KvSpec, LowRank, Matrix, MemoryUse, Ops, QkNorm, Rope,
    Rows, StepBatch, StepOutput, Store, Vector, WeightFormat,
};

use super::Model;
use super::experts::{ExpertBuffers, ExpertLayer};
use super::shard::{FactorShards, MatrixShard, Shard};
use super::weight_names::{Part, Weight};
use crate::adapter::{Adapter, Pair, Projection};
use crate::load_error::LoadError;
use crate::model_config::ModelConfig;
use crate::model_files::{Mixture, ModelFiles};

/// A decoder with its weights packed by a backend: all of it, or the part of one of several devices.
pub struct Decoder {
    ops: Box<dyn Ops>,
    config: ModelConfig,
    shard: Shard,
    shape: HeadShape,
    attention: AttentionSpec,
    weights: Weights,
    buffers: Buffers,
    kv: Option<KvCache>,
}

struct Weights {
    embedding: Matrix,
    /// What its rows are multiplied with.
    embedding_scale: Option<f32>,
    layers: Vec<Layer>,
    final_norm: Vector,
    output: Matrix,
    /// Rotates nothing where there are slopes.
    rope: Rope,
    /// Of layers with a window, where they rotate otherwise.
    local_rope: Option<Rope>,
    /// Slopes of ALiBi, of the part's heads.
    alibi: Option<Vector>,
}

struct Layer {
    attention_norm: Vector,
    qkv: Linear,
    qk_norm: Option<QkNorm>,
    attention_output: Linear,
    /// Of what attention adds to the residual stream.
    post_attention_norm: Option<Vector>,
    feed_forward_norm: Vector,
    feed_forward: FeedForward,
    /// Of what the feed-forward part adds.
    post_feed_forward_norm: Option<Vector>,
}

enum FeedForward {
    Dense {
        gate_up: Linear,
        down: Linear,
    },
    /// Without a gate.
    Plain {
        up: Linear,
        down: Linear,
    },
    Experts(ExpertLayer, ExpertBuffers),
}

#[derive(Clone, Copy)]
struct Linear {
    weight: Matrix,
    bias: Option<Vector>,
}

/// How the residual stream is normed before it is read.
#[derive(Clone, Copy)]
struct Norm {
    eps: f32,
    /// The mean is subtracted first.
    centred: bool,
}

impl Norm {
    fn enqueue(self, ops: &mut dyn Ops, x: Buf, weight: Vector, out: Buf) {
        match self.centred {
            true => ops.layer_norm(x, weight, self.eps, out),
            false => ops.rms_norm(x, weight, self.eps, out),
        }
    }
}

/// Activations, reused by every layer.
struct Buffers {
    /// `[tokens, hidden]` the residual stream.
    hidden: Buf,
    /// `[tokens, hidden]`
    normed: Buf,
    /// `[tokens, hidden]` what is normed before it is added to the residual stream, of models that do so.
    branch: Option<Buf>,
    /// `[tokens, (heads + 2 kv_heads) * head_dim]`
    qkv: Buf,
    /// `[tokens, heads * head_dim]`
    attended: Buf,
    /// `[tokens, 2 * intermediate]`, without a gate half as wide; as narrow as can be where experts have their own.
    gate_up: Buf,
    /// `[tokens, intermediate]`
    gated: Buf,
    /// `[samples, hidden]`
    last: Buf,
    /// `[samples, hidden]`
    last_normed: Buf,
    /// `[samples, vocabulary]`; of several devices' model, with columns behind that no token has.
    logits: Buf,
    /// `[samples, tokens of the part]`, where the model is one of several devices'.
    part: Option<Buf>,
}

/// The linears of a layer, as adapters update them.
#[derive(Clone, Copy)]
enum Site {
    Qkv,
    AttentionOutput,
    GateUp,
    Down,
}

impl Site {
    const COUNT: usize = 4;

    /// The backend's number of the site.
    fn number(self, layer: usize) -> usize {
        layer * Site::COUNT + self as usize
    }

    /// Where a matrix is: its linear, and its first row there.
    fn of(projection: Projection, config: &ModelConfig) -> (Site, usize) {
        let &ModelConfig { heads, kv_heads, head_dim, intermediate, .. } = config;
        match projection {
            Projection::Query | Projection::DbrxQkv | Projection::MptQkv => (Site::Qkv, 0),
            Projection::Key => (Site::Qkv, heads * head_dim),
            Projection::Value => (Site::Qkv, (heads + kv_heads) * head_dim),
            Projection::AttentionOutput | Projection::DbrxOutput | Projection::MptOutput => (Site::AttentionOutput, 0),
            Projection::Gate | Projection::MptUp => (Site::GateUp, 0),
            Projection::Up => (Site::GateUp, intermediate),
            Projection::Down | Projection::MptDown => (Site::Down, 0),
        }
    }
}

impl Decoder {
    /// Packs the weights of `files` with `ops`, or of each the part for its [`Ops::place`]. `progress` hears (bytes packed, bytes in all) after each matrix.
    pub fn load(
        files: &ModelFiles,
        ops: Box<dyn Ops>,
        format: WeightFormat,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, LoadError> {
        let config = files.config().clone();
        let shard =
            Shard::new(&config, ops.place()).map_err(|detail| LoadError::invalid(files.path(), "--tensor-parallel", detail))?;
        let &ModelConfig { heads, kv_heads, head_dim, .. } = shard.local();
        let shape = HeadShape { heads, kv_heads, head_dim };
        let mut loader = Loader { files, config: &config, shard: &shard, ops, format, progress, packed: 0 };
        let weights = loader.weights()?;
        let mut ops = loader.ops;
        let buffers = Buffers::reserve(ops.as_mut(), &shard).map_err(|source| LoadError::Kernel {
            path: files.path().to_owned(),
            what: "activations".to_owned(),
            source,
        })?;
        let soft_cap = config.gemma.as_ref().and_then(|gemma| gemma.attention_cap);
        // Each layer has its own window.
        let attention = AttentionSpec { scale: config.attention_scale(), sliding_window: None, soft_cap, alibi: weights.alibi };
        Ok(Self { ops, config, shard, shape, attention, weights, buffers, kv: None })
    }

    /// Logits `[samples, vocabulary]` of the last step, row-major.
    pub fn logits(&self) -> Result<Vec<f32>, KernelError> {
        let mut logits = self.ops.read(self.buffers.logits)?;
        let (wide, wanted) = (self.shard.tokens() * self.shard.place().ranks, self.config.vocabulary);
        if wide > wanted {
            logits = logits.chunks_exact(wide).flat_map(|row| &row[..wanted]).copied().collect();
        }
        Ok(logits)
    }

    /// Sizes and switches.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Enqueues a step; with `all`, the norm behind the last layer runs over all rows and leaves them in `normed`.
    fn enqueue(&mut self, batch: &StepBatch, all: bool) -> Result<(), KernelError> {
        let Self { ops, config, shard, shape, attention, weights, buffers: b, kv } = self;
        let kv = kv.ok_or_else(|| KernelError::Limit("the key-value cache was not reserved before the first step".to_owned()))?;
        let norm = Norm { eps: config.rms_eps, centred: config.layer_norm };
        let several = !shard.place().is_alone();
        // Where a part's result goes: to the residual stream, or to where it is normed first. Then the stream is whole on every rank.
        let (sum, store) = b.branch.map_or((b.hidden, shard.residual()), |branch| (branch, Store::Replace));
        let is_gelu = config.gemma.is_some();

        ops.begin(batch)?;
        if several {
            ops.embedding_shard(weights.embedding, shard.first_token() as u32, b.hidden);
            ops.all_reduce(b.hidden);
        } else {
            ops.embedding(weights.embedding, b.hidden);
        }
        if let Some(scale) = weights.embedding_scale {
            ops.scale(b.hidden, scale);
        }
        for (index, layer) in weights.layers.iter().enumerate() {
            norm.enqueue(ops.as_mut(), b.hidden, layer.attention_norm, b.normed);
            ops.linear(b.normed, layer.qkv.weight, layer.qkv.bias, b.qkv, Store::Replace);
            ops.lora(b.normed, Site::Qkv.number(index), b.qkv);
            if let Some(limit) = config.clip_qkv {
                ops.clamp(b.qkv, limit);
            }
            let rope = weights.local_rope.filter(|_| config.is_local(index)).unwrap_or(weights.rope);
            let attention = AttentionSpec { sliding_window: config.window(index), ..*attention };
            ops.rope_cache(b.qkv, *shape, layer.qk_norm, rope, kv, index);
            ops.paged_attention(b.qkv, *shape, attention, kv, index, b.attended);
            ops.linear(b.attended, layer.attention_output.weight, layer.attention_output.bias, sum, store);
            ops.lora(b.attended, Site::AttentionOutput.number(index), sum);
            if several {
                ops.all_reduce(sum);
            }
            if let Some(weight) = layer.post_attention_norm {
                ops.rms_norm_add(sum, weight, norm.eps, b.hidden);
            }

            norm.enqueue(ops.as_mut(), b.hidden, layer.feed_forward_norm, b.normed);
            match &layer.feed_forward {
                FeedForward::Dense { gate_up, down } => {
                    ops.linear(b.normed, gate_up.weight, gate_up.bias, b.gate_up, Store::Replace);
                    ops.lora(b.normed, Site::GateUp.number(index), b.gate_up);
                    match is_gelu {
                        true => ops.gelu_tanh_and_mul(b.gate_up, b.gated),
                        false => ops.silu_and_mul(b.gate_up, b.gated),
                    }
                    ops.linear(b.gated, down.weight, down.bias, sum, store);
                    ops.lora(b.gated, Site::Down.number(index), sum);
                }
                FeedForward::Plain { up, down } => {
                    ops.linear(b.normed, up.weight, up.bias, b.gate_up, Store::Replace);
                    ops.lora(b.normed, Site::GateUp.number(index), b.gate_up);
                    ops.gelu(b.gate_up, b.gated);
                    ops.linear(b.gated, down.weight, down.bias, sum, store);
                    ops.lora(b.gated, Site::Down.number(index), sum);
                }
                FeedForward::Experts(experts, buffers) => {
                    experts.forward(ops.as_mut(), buffers, b.normed, sum, store);
                }
            }
            if several {
                ops.all_reduce(sum);
            }
            if let Some(weight) = layer.post_feed_forward_norm {
                ops.rms_norm_add(sum, weight, norm.eps, b.hidden);
            }
        }
        if all {
            norm.enqueue(ops.as_mut(), b.hidden, weights.final_norm, b.normed);
        }
        if !batch.samples.is_empty() {
            ops.gather(b.hidden, b.last);
            norm.enqueue(ops.as_mut(), b.last, weights.final_norm, b.last_normed);
            ops.linear(b.last_normed, weights.output, None, b.part.unwrap_or(b.logits), Store::Replace);
            if let Some(part) = b.part {
                ops.all_gather(part, b.logits);
            }
            if let Some(cap) = config.gemma.as_ref().and_then(|gemma| gemma.logit_cap) {
                ops.soft_cap(b.logits, cap);
            }
            ops.sample(b.logits, config.vocabulary);
        }
        Ok(())
    }

    fn kv_spec(&self, blocks: usize, block_size: usize, dtype: KvDtype) -> KvSpec {
        let HeadShape { kv_heads, head_dim, .. } = self.shape;
        KvSpec { layers: self.config.layers, blocks, block_size, kv_heads, head_dim, dtype }
    }
}

impl Model for Decoder {
    fn vocabulary(&self) -> usize {
        self.config.vocabulary
    }

    fn kv_block_bytes(&self, block_size: usize, dtype: KvDtype) -> usize {
        self.kv_spec(1, block_size, dtype).block_bytes()
    }

    fn alloc_kv(&mut self, blocks: usize, block_size: usize, dtype: KvDtype) -> Result<(), KernelError> {
        self.kv = Some(self.ops.alloc_kv(self.kv_spec(blocks, block_size, dtype))?);
        Ok(())
    }

    fn forward(&mut self, batch: &StepBatch, out: &mut StepOutput) -> Result<(), KernelError> {
        self.enqueue(batch, false)?;
        self.ops.finish(out)
    }

    fn forward_hidden(&mut self, batch: &StepBatch, out: &mut StepOutput) -> Result<Vec<f32>, KernelError> {
        self.enqueue(batch, true)?;
        self.ops.finish(out)?;
        self.ops.read(self.buffers.normed)
    }

    fn runs_ahead(&self) -> bool {
        self.ops.runs_ahead()
    }

    fn submit(&mut self, batch: &StepBatch) -> Result<(), KernelError> {
        self.enqueue(batch, false)?;
        self.ops.submit()
    }

    fn collect(&mut self, out: &mut StepOutput) -> Result<(), KernelError> {
        self.ops.collect(out)
    }

    fn alloc_swap(&mut self, places: usize) -> Result<(), KernelError> {
        let kv = self.kv.ok_or_else(|| KernelError::Limit("the key-value cache comes before its swap memory".to_owned()))?;
        self.ops.alloc_swap(kv, places)
    }

    fn width(&self) -> usize {
        self.config.hidden
    }

    fn adaptable(&self) -> Option<&ModelConfig> {
        Some(&self.config)
    }

    fn load_adapter(&mut self, slot: u32, adapter: &Adapter) -> Result<(), KernelError> {
        let mut sites = vec![Vec::new(); self.config.layers * Site::COUNT];
        let parts = adapter.pairs.iter().flat_map(|pair| pair.parts(&self.config).into_iter().map(move |part| (pair, part)));
        let factors: Vec<(&Pair, Projection, FactorShards<'_>)> = parts
            .map(|(pair, (projection, b))| (pair, projection, self.shard.factors(projection, pair.rank, &pair.a, b)))
            .collect();
        for (Pair { layer, rank, scale, .. }, projection, FactorShards { n, k, a, b }) in &factors {
            // Factors are in the order of the publisher's rows, and so is the packed base: see `FileMatrix::row_order`.
            let (site, column) = Site::of(*projection, self.shard.local());
            if let Some(parts) = sites.get_mut(site.number(*layer)) {
                parts.push(LowRank { column, n: *n, k: *k, rank: *rank, scale: *scale, a, b });
            }
        }
        self.ops.load_adapter(slot, &sites)
    }

    fn unload_adapter(&mut self, slot: u32) {
        self.ops.unload_adapter(slot);
    }

    fn spare_memory(&self) -> Result<Option<usize>, KernelError> {
        self.ops.spare_memory(self.shape)
    }

    fn memory(&self) -> MemoryUse {
        self.ops.memory()
    }

    fn describe(&self) -> String {
        self.ops.describe()
    }
}

impl Buffers {
    fn reserve(ops: &mut dyn Ops, shard: &Shard) -> Result<Self, KernelError> {
        let &ModelConfig { hidden, intermediate, heads, kv_heads, head_dim, .. } = shard.local();
        let (tokens, ranks) = (shard.tokens(), shard.place().ranks);
        let intermediate = if shard.local().experts.is_some() { 1 } else { intermediate };
        Ok(Self {
            hidden: ops.alloc(Rows::Tokens, hidden)?,
            normed: ops.alloc(Rows::Tokens, hidden)?,
            branch: if shard.local().gemma.is_some() { Some(ops.alloc(Rows::Tokens, hidden)?) } else { None },
            qkv: ops.alloc(Rows::Tokens, (heads + 2 * kv_heads) * head_dim)?,
            attended: ops.alloc(Rows::Tokens, heads * head_dim)?,
            gate_up: ops.alloc(Rows::Tokens, if shard.local().gated { 2 * intermediate } else { intermediate })?,
            gated: ops.alloc(Rows::Tokens, intermediate)?,
            last: ops.alloc(Rows::Samples, hidden)?,
            last_normed: ops.alloc(Rows::Samples, hidden)?,
            logits: ops.alloc(Rows::Samples, tokens * ranks)?,
            part: if ranks > 1 { Some(ops.alloc(Rows::Samples, tokens)?) } else { None },
        })
    }
}

/// Moves weights from mapped files into the backend.
pub(super) struct Loader<'a> {
    files: &'a ModelFiles,
    config: &'a ModelConfig,
    shard: &'a Shard,
    ops: Box<dyn Ops>,
    format: WeightFormat,
    progress: &'a mut dyn FnMut(u64, u64),
    packed: u64,
}

impl<'a> Loader<'a> {
    fn weights(&mut self) -> Result<Weights, LoadError> {
        let &ModelConfig { layers, tied_embeddings, .. } = self.config;
        let embedding = self.matrix(&[Weight::Embedding])?;
        let output = if tied_embeddings { embedding } else { self.matrix(&[Weight::Output])? };
        let local = self.shard.local();
        let buffers = local.experts.map(|experts| ExpertBuffers::reserve(self.ops.as_mut(), local, experts));
        let buffers = buffers.transpose().map_err(|source| self.refused("activations", source))?;
        let layers = (0..layers).map(|index| self.layer(index, buffers)).collect::<Result<_, _>>()?;
        let final_norm = self.vector(&[Weight::FinalNorm])?;
        let rope = self
            .ops
            .load_rope(&self.config.inverse_frequencies(), self.config.rope_magnitude())
            .map_err(|source| self.refused("rope", source))?;
        let local_rope = self.config.local_inverse_frequencies().map(|frequencies| self.ops.load_rope(&frequencies, 1.0));
        let local_rope = local_rope.transpose().map_err(|source| self.refused("rope", source))?;
        let embedding_scale = self.files.embedding_scale()?;
        let slopes = self.config.alibi_slopes().map(|slopes| self.ops.load_vector(&slopes[self.shard.heads()]));
        let alibi = slopes.transpose().map_err(|source| self.refused("slopes", source))?;
        Ok(Weights { embedding, embedding_scale, layers, final_norm, output, rope, local_rope, alibi })
    }

    fn layer(&mut self, index: usize, buffers: Option<ExpertBuffers>) -> Result<Layer, LoadError> {
        let &ModelConfig { qkv_bias, output_bias, mlp_bias, .. } = self.config;
        let at = |part: Part| Weight::Layer(index, part);
        let layer = Layer {
            attention_norm: self.vector(&[at(Part::AttentionNorm)])?,
            qkv: Linear {
                weight: self.matrix(&[at(Part::Query), at(Part::Key), at(Part::Value)])?,
                bias: self.bias(qkv_bias, &[at(Part::QueryBias), at(Part::KeyBias), at(Part::ValueBias)])?,
            },
            qk_norm: if self.config.qk_norm {
                let q = self.vector(&[at(Part::QueryNorm)])?;
                let k = self.vector(&[at(Part::KeyNorm)])?;
                Some(QkNorm { q, k, eps: self.config.rms_eps })
            } else {
                None
            },
            attention_output: Linear {
                weight: self.matrix(&[at(Part::AttentionOutput)])?,
                bias: self.bias(output_bias && self.shard.leads(), &[at(Part::AttentionOutputBias)])?,
            },
            post_attention_norm: self.norm_behind(at(Part::PostAttentionNorm))?,
            feed_forward_norm: self.vector(&[at(Part::FeedForwardNorm)])?,
            post_feed_forward_norm: self.norm_behind(at(Part::PostFeedForwardNorm))?,
            feed_forward: match (self.config.experts, buffers) {
                (Some(experts), Some(buffers)) => FeedForward::Experts(ExpertLayer::load(self, index, experts)?, buffers),
                _ if !self.config.gated => FeedForward::Plain {
                    up: Linear { weight: self.matrix(&[at(Part::Up)])?, bias: self.bias(mlp_bias, &[at(Part::UpBias)])? },
                    down: Linear {
                        weight: self.matrix(&[at(Part::Down)])?,
                        bias: self.bias(mlp_bias && self.shard.leads(), &[at(Part::DownBias)])?,
                    },
                },
                _ => FeedForward::Dense {
                    gate_up: Linear {
                        weight: self.matrix(&[at(Part::Gate), at(Part::Up)])?,
                        bias: self.bias(mlp_bias, &[at(Part::GateBias), at(Part::UpBias)])?,
                    },
                    down: Linear {
                        weight: self.matrix(&[at(Part::Down)])?,
                        bias: self.bias(mlp_bias && self.shard.leads(), &[at(Part::DownBias)])?,
                    },
                },
            },
        };
        self.files.weights_are_packed();
        Ok(layer)
    }

    /// Matrices stacked along their output features.
    fn matrix(&mut self, parts: &[Weight]) -> Result<Matrix, LoadError> {
        let mut matrices = Vec::with_capacity(parts.len());
        for part in parts {
            let cut = self.shard.matrix(*part, self.files.matrix(*part)?);
            matrices.push(cut.map_err(|why| LoadError::invalid(self.files.path(), self.names(&[*part]), why))?);
        }
        self.pack(&matrices, self.format, &self.names(parts))
    }

    /// The device's part of a matrix of a layer with experts.
    pub(super) fn mixture(&self, layer: usize, which: Mixture) -> Result<MatrixShard<'a>, LoadError> {
        let cut = self.shard.mixture(which, self.files.mixture(layer, which)?);
        cut.map_err(|why| LoadError::invalid(self.files.path(), self.files.mixture_name(layer, which), why))
    }

    /// What weights are packed as.
    pub(super) fn format(&self) -> WeightFormat {
        self.format
    }

    /// Packs matrices stacked along their output features; `what` is for an error.
    pub(super) fn pack(&mut self, matrices: &[MatrixShard<'_>], format: WeightFormat, what: &str) -> Result<Matrix, LoadError> {
        let stacked: Vec<_> = matrices.iter().flat_map(MatrixShard::sources).collect();
        let packed = self.ops.load_matrix(&stacked, format);
        let matrix = packed.map_err(|error| self.refused(what, error))?;
        self.count(matrices);
        Ok(matrix)
    }

    /// Packs a matrix for each expert.
    pub(super) fn pack_experts(&mut self, experts: &[Vec<MatrixShard<'_>>]) -> Result<Experts, LoadError> {
        let stacked: Vec<Vec<_>> = experts.iter().map(|parts| parts.iter().flat_map(MatrixShard::sources).collect()).collect();
        let packed = self.ops.load_experts(&stacked, self.format).map_err(|error| self.refused("experts", error))?;
        experts.iter().for_each(|matrices| self.count(matrices));
        Ok(packed)
    }

    /// Tells how far packing is.
    fn count(&mut self, matrices: &[MatrixShard<'_>]) {
        self.packed += matrices.iter().map(MatrixShard::file_bytes).sum::<u64>();
        (self.progress)(self.packed, self.files.file_bytes());
    }

    /// Vectors one after the other.
    fn vector(&mut self, parts: &[Weight]) -> Result<Vector, LoadError> {
        let values = parts.iter().map(|part| Ok(self.shard.vector(*part, self.files.vector(*part)?)));
        let values = values.collect::<Result<Vec<_>, LoadError>>()?.concat();
        self.ops.load_vector(&values).map_err(|source| self.refused(&self.names(parts), source))
    }

    /// A norm behind a part of a layer, of models that have them.
    fn norm_behind(&mut self, weight: Weight) -> Result<Option<Vector>, LoadError> {
        if self.config.gemma.is_some() { self.vector(&[weight]).map(Some) } else { Ok(None) }
    }

    /// The stacked bias of a stacked matrix.
    fn bias(&mut self, wanted: bool, parts: &[Weight]) -> Result<Option<Vector>, LoadError> {
        if wanted { self.vector(parts).map(Some) } else { Ok(None) }
    }

    fn names(&self, parts: &[Weight]) -> String {
        parts.iter().map(|part| self.files.naming().name(*part)).collect::<Vec<_>>().join(" + ")
    }

    fn refused(&self, what: &str, source: KernelError) -> LoadError {
        LoadError::Kernel { path: self.files.path().to_owned(), what: what.to_owned(), source }
    }
}
