//! The operations a decoder needs, as a trait that every backend implements.
//!
//! A call on a step operation *enqueues* work on buffers that the backend owns; only [`Ops::finish`] waits. Model files are
//! written once against this trait, so one description of a layer runs on every backend.
//!
//! Where [`Ops::runs_ahead`] says so, `finish` may be done in two: [`Ops::submit`] sets a step going, [`Ops::collect`] waits for the oldest
//! that was, and a second step may be begun and submitted between the two.
//!
//! All activations are f32 `[rows, width]`, row-major. Shapes are checked when an operation is enqueued; a mismatch is a bug in
//! the model file and comes back as [`KernelError::Shape`] from [`Ops::finish`].

use crate::collective::Place;
use crate::error::KernelError;
use crate::token_mask::TokenMask;

/// An activation buffer, f32 `[rows, width]`, owned by the backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Buf(pub u32);
/// A weight matrix `[n, k]` (output features, input features) in the backend's packed form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Matrix(pub u32);
/// An f32 vector: a norm's weight or a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Vector(pub u32);
/// Cosines and sines for every position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rope(pub u32);
/// The paged key-value cache of all layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KvCache(pub u32);
/// One matrix `[n, k]` of each expert of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Experts(pub u32);
/// Which experts each token of the step goes to, with what weight, and in what order the experts' rows lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Routing(pub u32);

/// How a weight is stored in a file. Block formats are GGUF's, quantised along the input dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// IEEE single.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
    /// 32 weights, f16 scale, 4-bit quants offset by 8 (18 bytes).
    Q4_0,
    /// 32 weights, f16 scale and minimum, 4-bit quants (20 bytes).
    Q4_1,
    /// 32 weights, f16 scale, 5-bit quants offset by 16 (22 bytes).
    Q5_0,
    /// 32 weights, f16 scale and minimum, 5-bit quants (24 bytes).
    Q5_1,
    /// 32 weights, f16 scale, 8-bit quants (34 bytes).
    Q8_0,
    /// 256 weights in 8 sub-blocks with 6-bit scales and minima, 4-bit quants (144 bytes).
    Q4K,
    /// 256 weights in 8 sub-blocks with 6-bit scales and minima, 5-bit quants (176 bytes).
    Q5K,
    /// 256 weights in 16 sub-blocks with 8-bit scales, 6-bit quants (210 bytes).
    Q6K,
}

impl Format {
    /// Weights per block (1 for plain formats).
    pub const fn block_len(self) -> usize {
        match self {
            Format::F32 | Format::F16 | Format::Bf16 => 1,
            Format::Q4_0 | Format::Q4_1 | Format::Q5_0 | Format::Q5_1 | Format::Q8_0 => 32,
            Format::Q4K | Format::Q5K | Format::Q6K => 256,
        }
    }

    /// Bytes per block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Format::F32 => 4,
            Format::F16 | Format::Bf16 => 2,
            Format::Q4_0 => 18,
            Format::Q4_1 => 20,
            Format::Q5_0 => 22,
            Format::Q5_1 => 24,
            Format::Q8_0 => 34,
            Format::Q4K => 144,
            Format::Q5K => 176,
            Format::Q6K => 210,
        }
    }

    /// Bytes of a row of `k` weights, or `None` when `k` is not a whole number of blocks.
    pub const fn row_bytes(self, k: usize) -> Option<usize> {
        if !k.is_multiple_of(self.block_len()) {
            return None;
        }
        Some(k / self.block_len() * self.block_bytes())
    }
}

/// What a backend should make of a weight when it packs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum WeightFormat {
    /// The form that serves the file's own format fastest without losing more than its rounding (f32 stays f32, bf16 and f16
    /// become bf16, 4-bit formats stay 4-bit, the rest become 8-bit).
    #[default]
    Auto,
    /// Dequantise to f32 and multiply in f32.
    F32,
    /// Round to bfloat16.
    Bf16,
    /// Quantise to 8 bits with a scale per output feature.
    Int8,
    /// Round to 8-bit floats ([`crate::e4m3`]) with a scale per output feature. On cards only.
    Fp8,
}

/// What activations are when they are multiplied with weights of 8-bit floats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Activations {
    /// Rounded to bfloat16, as with any other weights.
    #[default]
    Bf16,
    /// Where there are many rows, rounded to 8-bit floats ([`crate::e4m3`]), too, with a scale for each row.
    Fp8,
}

/// A weight as it lies in a file: `n` rows of `k` weights.
#[derive(Clone, Copy, Debug)]
pub struct MatrixSource<'a> {
    /// Output features.
    pub n: usize,
    /// Input features.
    pub k: usize,
    /// Storage format of `data`.
    pub format: Format,
    /// `n * format.row_bytes(k)` bytes, little-endian, row-major.
    pub data: &'a [u8],
    /// Packed row `i` is file row `row_order[i]` (undoes the permutation of q and k in llama-family GGUF files).
    pub row_order: Option<&'a [u32]>,
}

/// Which rows of a step a buffer holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rows {
    /// One row per token of the step.
    Tokens,
    /// One row per entry of [`StepBatch::samples`].
    Samples,
    /// One row per expert that a token goes to: those of the first expert, in the order of their tokens, then those of the next.
    Routed {
        /// Experts of a token.
        each: usize,
    },
}

/// How tokens are shared out among experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RoutingShape {
    /// Experts of a layer, up to [`MAX_EXPERTS`].
    pub experts: usize,
    /// Experts that each token goes to.
    pub each: usize,
}

/// Experts of a layer at most.
pub const MAX_EXPERTS: usize = 1024;

/// The largest step that buffers are planned for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Tokens per step (the token budget).
    pub max_tokens: usize,
    /// Sampled or scored rows per step.
    pub max_samples: usize,
    /// Positions a sequence can have.
    pub max_positions: usize,
}

/// Storage of keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum KvDtype {
    /// Exact.
    F32,
    /// Half the bytes; 8 bits of mantissa.
    #[default]
    Bf16,
    /// A quarter of the bytes; 4 bits of mantissa ([`crate::e4m3`]), magnitudes up to 448. On cards only.
    Fp8,
}

impl KvDtype {
    /// Bytes of a number.
    pub const fn bytes(self) -> usize {
        match self {
            KvDtype::F32 => 4,
            KvDtype::Bf16 => 2,
            KvDtype::Fp8 => 1,
        }
    }
}

/// Shape of the paged key-value cache. Logical layout `[layer][block][kv_head][slot][head_dim]` for keys and values each;
/// a backend may permute inside a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvSpec {
    /// Decoder layers.
    pub layers: usize,
    /// Blocks in the pool.
    pub blocks: usize,
    /// Tokens per block: 32 (one matrix tile of keys).
    pub block_size: usize,
    /// Key-value heads.
    pub kv_heads: usize,
    /// Elements per head: a multiple of 2 (16 in the fast paths).
    pub head_dim: usize,
    /// Element type.
    pub dtype: KvDtype,
}

impl KvSpec {
    /// Bytes of one block over all layers, keys and values.
    pub const fn block_bytes(&self) -> usize {
        2 * self.layers * self.kv_heads * self.block_size * self.head_dim * self.dtype.bytes()
    }
}

/// Head counts of an attention layer. A `qkv` row is `[heads * head_dim | kv_heads * head_dim | kv_heads * head_dim]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadShape {
    /// Query heads.
    pub heads: usize,
    /// Key-value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
}

/// Per-head RMS norms of queries and keys before the rotation (Qwen3).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QkNorm {
    /// `[head_dim]` weight for queries.
    pub q: Vector,
    /// `[head_dim]` weight for keys.
    pub k: Vector,
    /// Added to the mean square.
    pub eps: f32,
}

/// How scores are made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionSpec {
    /// Multiplies q·k; usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// A query at position p sees keys at positions > p − window only.
    pub sliding_window: Option<usize>,
    /// `c * tanh(score / c)` when set.
    pub soft_cap: Option<f32>,
    /// `[heads]` slopes m of ALiBi (Press et al. 2022): after a soft cap, m · (key's position − query's) is added to a score.
    pub alibi: Option<Vector>,
}

/// Whether a linear replaces its output or adds to it (the residual stream).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// `out = x wᵀ + bias`
    Replace,
    /// `out += x wᵀ + bias`
    Add,
}

/// A row that uses no adapter, in [`StepBatch::adapters`].
pub const NO_ADAPTER: u32 = u32::MAX;

/// A low-rank update of some columns of a linear: `out[column..column + n] += scale · B (A x)` (Hu et al. 2021).
/// Those of one linear share no column.
#[derive(Clone, Copy, Debug)]
pub struct LowRank<'a> {
    /// First column of the linear's output.
    pub column: usize,
    /// Output features.
    pub n: usize,
    /// Input features: the linear's.
    pub k: usize,
    /// Rank, ≥ 1.
    pub rank: usize,
    /// Scale.
    pub scale: f32,
    /// `[rank, k]`, row-major.
    pub a: &'a [f32],
    /// `[n, rank]`, row-major.
    pub b: &'a [f32],
}

/// The rows of one sequence in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SequenceSpan {
    /// First row in the flat batch.
    pub first_row: u32,
    /// Rows of this sequence in the step (1 for decode, more for a chunk of prefill), consecutive positions.
    pub rows: u32,
    /// Tokens of the sequence once these rows are written; the last row's position is `context_len - 1`.
    pub context_len: u32,
    /// First entry of the sequence's block table in [`StepBatch::blocks`]; `ceil(context_len / block_size)` entries are used.
    pub first_block: u32,
}

/// A token that occurred, for the penalties.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenCount {
    /// Token id.
    pub token: u32,
    /// Whether the prompt contains it.
    pub in_prompt: bool,
    /// Times it was generated.
    pub generated: u32,
}

/// What is wanted from one row of logits.
///
/// Order of processing: logit bias, then repetition, frequency and presence penalties, then the mask, then temperature, then top-k,
/// top-p and min-p, then the draw. "Raw" log-probabilities are `log_softmax` of the logits as the model made them; "processed" ones
/// are `log_softmax` over the tokens that remain after all steps (greedy: after bias, penalties and mask, temperature 1).
#[derive(Clone, Debug, PartialEq)]
pub struct SampleRow {
    /// Row of the flat batch whose logits are used. Several entries may name one row (n > 1).
    pub row: u32,
    /// Score this token instead of drawing one (prompt log-probabilities, perplexity). Everything else is ignored but `top_n`.
    pub score: Option<u32>,
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep the k likeliest; 0 is off.
    pub top_k: u32,
    /// Keep the smallest set whose probability reaches this; 1 is off.
    pub top_p: f32,
    /// Drop tokens less likely than this times the likeliest; 0 is off.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or output; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once from tokens generated before; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted once per earlier generation of the token; 0 is off.
    pub frequency_penalty: f32,
    /// Entries of [`StepBatch::history`] that belong to this row.
    pub history: std::ops::Range<u32>,
    /// Entries of [`StepBatch::bias`] that belong to this row.
    pub bias: std::ops::Range<u32>,
    /// Draw one of these only; `None` is any token. The step waits for it when it comes to the draw.
    pub mask: Option<TokenMask>,
    /// Random stream of the request (and choice). Together with `counter` it fixes the draw: same inputs, same token, whatever else is in the batch.
    pub seed: u64,
    /// Index of the token in the output.
    pub counter: u64,
    /// Report this many of the likeliest tokens; `None` reports none.
    pub top_n: Option<u32>,
}

impl SampleRow {
    /// The likeliest token of a row: nothing else processed, nothing else reported.
    pub const fn greedy(row: u32) -> Self {
        SampleRow {
            row,
            score: None,
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            history: 0..0,
            bias: 0..0,
            mask: None,
            seed: 0,
            counter: 0,
            top_n: None,
        }
    }
}

/// One step's flat, ragged batch. Reused between steps: `clear` keeps the capacity.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepBatch {
    /// `[tokens]` token ids.
    pub tokens: Vec<u32>,
    /// `[tokens]` positions.
    pub positions: Vec<u32>,
    /// `[tokens]` where keys and values go: `block * block_size + offset`; −1 writes nothing.
    pub slots: Vec<i64>,
    /// One entry per sequence, in row order, covering all rows.
    pub sequences: Vec<SequenceSpan>,
    /// Block tables, one after the other.
    pub blocks: Vec<u32>,
    /// Rows whose logits are wanted.
    pub samples: Vec<SampleRow>,
    /// For [`SampleRow::history`].
    pub history: Vec<TokenCount>,
    /// For [`SampleRow::bias`]: token, value to add (−∞ forbids).
    pub bias: Vec<(u32, f32)>,
    /// Rows whose token is what the step before this one draws, which may still run: row, entry of that step's samples. In
    /// [`StepBatch::tokens`] they have a 0.
    pub carried: Vec<(u32, u32)>,
    /// Blocks whose contents go to places of the swap memory before anything else runs: block, place.
    pub saved: Vec<(u32, u32)>,
    /// Blocks to copy (from, to) in all layers before anything but `saved`: copy on write.
    pub copies: Vec<(u32, u32)>,
    /// Blocks that get their contents back from places of the swap memory: place, block. After `saved` and `copies`.
    pub restored: Vec<(u32, u32)>,
    /// `[tokens]` slot of each row's adapter or [`NO_ADAPTER`]; empty when no row has one.
    pub adapters: Vec<u32>,
}

impl StepBatch {
    /// Empties every list, keeping the memory.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.slots.clear();
        self.sequences.clear();
        self.blocks.clear();
        self.samples.clear();
        self.history.clear();
        self.bias.clear();
        self.carried.clear();
        self.saved.clear();
        self.copies.clear();
        self.restored.clear();
        self.adapters.clear();
    }

    /// Becomes equal to `other` in the memory it has (a derived `clone_from` would allocate anew).
    pub fn copy_from(&mut self, other: &StepBatch) {
        let StepBatch { tokens, positions, slots, sequences, blocks, samples, history, bias, .. } = other;
        let StepBatch { carried, saved, copies, restored, adapters, .. } = other;
        self.tokens.clone_from(tokens);
        self.positions.clone_from(positions);
        self.slots.clone_from(slots);
        self.sequences.clone_from(sequences);
        self.blocks.clone_from(blocks);
        self.samples.clone_from(samples);
        self.history.clone_from(history);
        self.bias.clone_from(bias);
        self.carried.clone_from(carried);
        self.saved.clone_from(saved);
        self.copies.clone_from(copies);
        self.restored.clone_from(restored);
        self.adapters.clone_from(adapters);
    }
}

/// A drawn or scored token.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sampled {
    /// The token (for a scored row: the token asked for).
    pub token: u32,
    /// Raw log-probability.
    pub logprob: f32,
    /// Processed log-probability (equals `logprob` for scored rows).
    pub processed_logprob: f32,
    /// 1 for the likeliest raw token.
    pub rank: u32,
    /// The likeliest tokens with raw log-probabilities, likeliest first (`top_n` entries, ties by smaller id).
    pub top: Vec<(u32, f32)>,
    /// The likeliest tokens after processing (at most `top_n`, fewer when fewer remain).
    pub processed_top: Vec<(u32, f32)>,
}

/// What a step gives back: one entry per [`StepBatch::samples`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepOutput {
    /// In the order of the samples.
    pub samples: Vec<Sampled>,
    /// Why a card did not take a step like this one as a whole (a captured step), where it was asked to and did not. Such steps are done
    /// operation by operation, which gives the same numbers and is slower.
    pub refused_capture: Option<String>,
}

/// Bytes a backend holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUse {
    /// Packed weights.
    pub weights: usize,
    /// Key-value cache.
    pub kv: usize,
    /// Activations and scratch.
    pub activations: usize,
    /// Adapters.
    pub adapters: usize,
}

/// A backend. See the module text.
pub trait Ops: Send {
    /// For the start-up lines: device, instruction path, threads.
    fn describe(&self) -> String;
    /// The largest step.
    fn limits(&self) -> Limits;
    /// What is held now.
    fn memory(&self) -> MemoryUse;
    /// Bytes that the cache may take of a memory that is the backend's own; `None` when it computes in the machine's. Asked for when
    /// everything but the cache is loaded. `heads`: those of the attention over it.
    fn spare_memory(&self, _heads: HeadShape) -> Result<Option<usize>, KernelError> {
        Ok(None)
    }
    /// Which of the devices it is that compute the model together.
    fn place(&self) -> Place {
        Place::ALONE
    }

    /// Packs the sources, stacked along `n` (all with one `k`), into one matrix. The source bytes are not kept.
    fn load_matrix(&mut self, sources: &[MatrixSource<'_>], format: WeightFormat) -> Result<Matrix, KernelError>;
    /// Packs a matrix for each expert, all `[n, k]`; an expert's sources are stacked along `n`. The source bytes are not kept.
    fn load_experts(&mut self, experts: &[Vec<MatrixSource<'_>>], format: WeightFormat) -> Result<Experts, KernelError>;
    /// Reserves what routing a step takes.
    fn alloc_routing(&mut self, shape: RoutingShape) -> Result<Routing, KernelError>;
    /// Copies a vector.
    fn load_vector(&mut self, values: &[f32]) -> Result<Vector, KernelError>;
    /// Builds `cos/sin(position * inv_freq[i]) * magnitude` for every position. Rotation is GPT-NeoX style: element `i` pairs with
    /// `i + inv_freq.len()`; elements beyond `2 * inv_freq.len()` are left as they are.
    fn load_rope(&mut self, inv_freq: &[f32], magnitude: f32) -> Result<Rope, KernelError>;
    /// Reserves a buffer for the largest step.
    fn alloc(&mut self, rows: Rows, width: usize) -> Result<Buf, KernelError>;
    /// Reserves the cache.
    fn alloc_kv(&mut self, spec: KvSpec) -> Result<KvCache, KernelError>;
    /// Reserves places for so many blocks of the cache in the machine's memory, for [`StepBatch::saved`]; once, behind `alloc_kv`. For
    /// backends with a memory of their own.
    fn alloc_swap(&mut self, _kv: KvCache, _places: usize) -> Result<(), KernelError> {
        Err(KernelError::Unsupported("this backend computes in the machine's memory, from where nothing is swapped".into()))
    }

    /// Puts an adapter into a slot, in place of what was there; `sites[i]` updates the linear that the model file calls site `i`.
    /// Between steps only. Slots are small numbers: memory is kept for all up to the largest.
    fn load_adapter(&mut self, slot: u32, sites: &[Vec<LowRank<'_>>]) -> Result<(), KernelError>;
    /// Empties a slot and frees its memory.
    fn unload_adapter(&mut self, slot: u32);

    /// Starts a step: copies its metadata and carries out `batch.copies`.
    fn begin(&mut self, batch: &StepBatch) -> Result<(), KernelError>;
    /// `out[r] = table[tokens[r]]`
    fn embedding(&mut self, table: Matrix, out: Buf);
    /// The same with a table that begins at token `first`: `out[r] = table[tokens[r] - first]`, and zeros for tokens that it does not have.
    fn embedding_shard(&mut self, table: Matrix, first: u32, out: Buf);
    /// Each row of `x` becomes the sum of the rows that the ranks have there. Every rank asks for it, at the same point of the step.
    fn all_reduce(&mut self, x: Buf);
    /// `out[r]` becomes the rows `x[r]` of all ranks, one after the other. Every rank asks for it, at the same point of the step.
    fn all_gather(&mut self, x: Buf, out: Buf);
    /// `out = x / sqrt(mean(x²) + eps) * weight` (Zhang & Sennrich 2019).
    fn rms_norm(&mut self, x: Buf, weight: Vector, eps: f32, out: Buf);
    /// `out += x / sqrt(mean(x²) + eps) * weight`: a norm of what a part of a layer adds to the residual stream.
    fn rms_norm_add(&mut self, x: Buf, weight: Vector, eps: f32, out: Buf);
    /// `out = (x - mean(x)) / sqrt(var(x) + eps) * weight` (Ba et al. 2016), without a bias.
    fn layer_norm(&mut self, x: Buf, weight: Vector, eps: f32, out: Buf);
    /// Each number of `x` becomes the nearest that is not below `-limit` and not above `limit`; what is no number stays none.
    fn clamp(&mut self, x: Buf, limit: f32);
    /// Each number of `x` becomes `factor` times itself.
    fn scale(&mut self, x: Buf, factor: f32);
    /// Each number of `x` becomes `cap * tanh(x / cap)`; what is no number stays none.
    fn soft_cap(&mut self, x: Buf, cap: f32);
    /// `out = x wᵀ + bias`, or added to `out`.
    fn linear(&mut self, x: Buf, w: Matrix, bias: Option<Vector>, out: Buf, store: Store);
    /// Adds to each row of `out` the update that the row's adapter has for `site`, computed from the same row of `x`. Nothing runs
    /// when no row of the step has one.
    fn lora(&mut self, x: Buf, site: usize, out: Buf);
    /// Norms (if any) and rotates q and k in place, then writes k and v to the cache at the step's slots.
    fn rope_cache(&mut self, qkv: Buf, shape: HeadShape, norm: Option<QkNorm>, rope: Rope, kv: KvCache, layer: usize);
    /// Causal attention of the step's queries over the cached keys and values: `out [tokens, heads * head_dim]`.
    fn paged_attention(&mut self, qkv: Buf, shape: HeadShape, spec: AttentionSpec, kv: KvCache, layer: usize, out: Buf);
    /// `out = silu(x[.., ..w]) * x[.., w..]` with `w` the width of `out`.
    fn silu_and_mul(&mut self, gate_up: Buf, out: Buf);
    /// The same with `gelu(g) = g / 2 * (1 + tanh(√(2 / π) * (g + 0.044715 g³)))` (Hendrycks & Gimpel 2016) in the place of silu.
    fn gelu_tanh_and_mul(&mut self, gate_up: Buf, out: Buf);
    /// `out = x Φ(x)` with the normal distribution's function Φ itself (Hendrycks & Gimpel 2016), not its approximation by tanh.
    fn gelu(&mut self, x: Buf, out: Buf);
    /// Sends each token to the experts with its largest `logits [tokens, experts]`, the smaller number first among equals. Their weights
    /// are the softmax over all experts, or over the chosen ones when `normalised`.
    fn route(&mut self, logits: Buf, normalised: bool, routing: Routing);
    /// `out[i] = x[i] wᵀ` with the matrix of routed row `i`'s expert. Where `x` has a row per token, its row for `i` is that of the token.
    fn expert_linear(&mut self, x: Buf, experts: Experts, routing: Routing, out: Buf);
    /// A token's routed rows of `x`, each times the weight of its expert, summed up; or added to `out`.
    fn combine(&mut self, x: Buf, routing: Routing, out: Buf, store: Store);
    /// `x *= 1 / (1 + e^-gate)` with `gate` one number for each row.
    fn gate_rows(&mut self, gate: Buf, x: Buf);
    /// Token rows to sample rows: `out[i] = x[samples[i].row]`.
    fn gather(&mut self, x: Buf, out: Buf);
    /// Samples or scores each row of `logits [samples, vocabulary]`; only the first `vocabulary` columns count. Every rank asks for it; the
    /// first one does it, and the others have nothing to hand over, but know of whom the next step may carry on.
    fn sample(&mut self, logits: Buf, vocabulary: usize);
    /// Runs what was enqueued, waits, and hands over the sampled tokens.
    fn finish(&mut self, out: &mut StepOutput) -> Result<(), KernelError>;
    /// Whether a step may be begun and submitted before the one before it was collected; two at most are under way.
    fn runs_ahead(&self) -> bool {
        false
    }
    /// Sets going what was enqueued, for [`Ops::collect`]; does not wait where [`Ops::runs_ahead`]. After an error there is nothing to
    /// collect of this step.
    fn submit(&mut self) -> Result<(), KernelError> {
        Ok(())
    }
    /// Waits for the oldest step that was submitted, and hands over its sampled tokens.
    fn collect(&mut self, out: &mut StepOutput) -> Result<(), KernelError> {
        self.finish(out)
    }
    /// Copies a buffer's valid rows out; for tests and tools, after `finish`.
    fn read(&self, buf: Buf) -> Result<Vec<f32>, KernelError>;
}
