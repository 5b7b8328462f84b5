//! The decoder that Llama, Mistral, Qwen2 and Qwen3 share: pre-norm attention with rotary positions and grouped queries, then a
//! gated feed-forward part. The families differ in biases, head norms, window and frequencies, all of which are data here.

use tidemill_kernels::{
    AttentionSpec, Buf, HeadShape, KernelError, KvCache, KvDtype, KvSpec, LowRank, Matrix, MatrixSource, MemoryUse, Ops, QkNorm,
    Rope, Rows, StepBatch, StepOutput, Store, Vector, WeightFormat,
};

use super::Model;
use super::weight_names::{Naming, Part, Weight};
use crate::adapter::{Adapter, Pair, Projection};
use crate::load_error::LoadError;
use crate::model_config::{Family, ModelConfig};
use crate::model_files::ModelFiles;
use crate::tensor_file::Tensor;

/// A decoder with its weights packed by a backend.
pub struct Decoder {
    ops: Box<dyn Ops>,
    config: ModelConfig,
    shape: HeadShape,
    attention: AttentionSpec,
    weights: Weights,
    buffers: Buffers,
    kv: Option<KvCache>,
}

struct Weights {
    embedding: Matrix,
    layers: Vec<Layer>,
    final_norm: Vector,
    output: Matrix,
    rope: Rope,
}

struct Layer {
    attention_norm: Vector,
    qkv: Linear,
    qk_norm: Option<QkNorm>,
    attention_output: Linear,
    feed_forward_norm: Vector,
    gate_up: Linear,
    down: Linear,
}

#[derive(Clone, Copy)]
struct Linear {
    weight: Matrix,
    bias: Option<Vector>,
}

/// Activations, reused by every layer.
struct Buffers {
    /// `[tokens, hidden]` the residual stream.
    hidden: Buf,
    /// `[tokens, hidden]`
    normed: Buf,
    /// `[tokens, (heads + 2 kv_heads) * head_dim]`
    qkv: Buf,
    /// `[tokens, heads * head_dim]`
    attended: Buf,
    /// `[tokens, 2 * intermediate]`
    gate_up: Buf,
    /// `[tokens, intermediate]`
    gated: Buf,
    /// `[samples, hidden]`
    last: Buf,
    /// `[samples, hidden]`
    last_normed: Buf,
    /// `[samples, vocabulary]`
    logits: Buf,
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
            Projection::Query => (Site::Qkv, 0),
            Projection::Key => (Site::Qkv, heads * head_dim),
            Projection::Value => (Site::Qkv, (heads + kv_heads) * head_dim),
            Projection::AttentionOutput => (Site::AttentionOutput, 0),
            Projection::Gate => (Site::GateUp, 0),
            Projection::Up => (Site::GateUp, intermediate),
            Projection::Down => (Site::Down, 0),
        }
    }
}

impl Decoder {
    /// Packs the weights of `files` with `ops`. `progress` hears (bytes packed, bytes in all) after each matrix.
    pub fn load(
        files: &ModelFiles,
        ops: Box<dyn Ops>,
        format: WeightFormat,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, LoadError> {
        let config = files.config().clone();
        let shape = HeadShape { heads: config.heads, kv_heads: config.kv_heads, head_dim: config.head_dim };
        let mut loader = Loader { files, config: &config, ops, format, progress, packed: 0 };
        let weights = loader.weights()?;
        let mut ops = loader.ops;
        let buffers = Buffers::reserve(ops.as_mut(), &config).map_err(|source| LoadError::Kernel {
            path: files.path().to_owned(),
            what: "activations".to_owned(),
            source,
        })?;
        let scale = 1.0 / (config.head_dim as f32).sqrt();
        let attention = AttentionSpec { scale, sliding_window: config.sliding_window, soft_cap: None };
        Ok(Self { ops, config, shape, attention, weights, buffers, kv: None })
    }

    /// Logits `[samples, vocabulary]` of the last step, row-major.
    pub fn logits(&self) -> Result<Vec<f32>, KernelError> {
        self.ops.read(self.buffers.logits)
    }

    /// Sizes and switches.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Records a step; with `all`, the norm behind the last layer runs over all rows and leaves them in `normed`.
    fn step(&mut self, batch: &StepBatch, out: &mut StepOutput, all: bool) -> Result<(), KernelError> {
        let Self { ops, config, shape, attention, weights, buffers: b, kv, .. } = self;
        let kv = kv.ok_or_else(|| KernelError::Limit("the key-value cache was not reserved before the first step".to_owned()))?;
        let eps = config.rms_eps;

        ops.begin(batch)?;
        ops.embedding(weights.embedding, b.hidden);
        for (index, layer) in weights.layers.iter().enumerate() {
            ops.rms_norm(b.hidden, layer.attention_norm, eps, b.normed);
            ops.linear(b.normed, layer.qkv.weight, layer.qkv.bias, b.qkv, Store::Replace);
            ops.lora(b.normed, Site::Qkv.number(index), b.qkv);
            ops.rope_cache(b.qkv, *shape, layer.qk_norm, weights.rope, kv, index);
            ops.paged_attention(b.qkv, *shape, *attention, kv, index, b.attended);
            ops.linear(b.attended, layer.attention_output.weight, layer.attention_output.bias, b.hidden, Store::Add);
            ops.lora(b.attended, Site::AttentionOutput.number(index), b.hidden);

            ops.rms_norm(b.hidden, layer.feed_forward_norm, eps, b.normed);
            ops.linear(b.normed, layer.gate_up.weight, layer.gate_up.bias, b.gate_up, Store::Replace);
            ops.lora(b.normed, Site::GateUp.number(index), b.gate_up);
            ops.silu_and_mul(b.gate_up, b.gated);
            ops.linear(b.gated, layer.down.weight, layer.down.bias, b.hidden, Store::Add);
            ops.lora(b.gated, Site::Down.number(index), b.hidden);
        }
        if all {
            ops.rms_norm(b.hidden, weights.final_norm, eps, b.normed);
        }
        if !batch.samples.is_empty() {
            ops.gather(b.hidden, b.last);
            ops.rms_norm(b.last, weights.final_norm, eps, b.last_normed);
            ops.linear(b.last_normed, weights.output, None, b.logits, Store::Replace);
            ops.sample(b.logits, config.vocabulary);
        }
        ops.finish(out)
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
        self.step(batch, out, false)
    }

    fn forward_hidden(&mut self, batch: &StepBatch, out: &mut StepOutput) -> Result<Vec<f32>, KernelError> {
        self.step(batch, out, true)?;
        self.ops.read(self.buffers.normed)
    }

    fn width(&self) -> usize {
        self.config.hidden
    }

    fn adaptable(&self) -> Option<&ModelConfig> {
        Some(&self.config)
    }

    fn load_adapter(&mut self, slot: u32, adapter: &Adapter) -> Result<(), KernelError> {
        let mut sites = vec![Vec::new(); self.config.layers * Site::COUNT];
        for Pair { layer, projection, rank, scale, a, b } in &adapter.pairs {
            // Factors are in the order of the publisher's rows, and so is the packed base: see `Loader::row_order`.
            let (site, column) = Site::of(*projection, &self.config);
            let (n, k) = projection.shape(&self.config);
            if let Some(parts) = sites.get_mut(site.number(*layer)) {
                parts.push(LowRank { column, n, k, rank: *rank, scale: *scale, a, b });
            }
        }
        self.ops.load_adapter(slot, &sites)
    }

    fn unload_adapter(&mut self, slot: u32) {
        self.ops.unload_adapter(slot);
    }

    fn memory(&self) -> MemoryUse {
        self.ops.memory()
    }

    fn describe(&self) -> String {
        self.ops.describe()
    }
}

impl Buffers {
    fn reserve(ops: &mut dyn Ops, config: &ModelConfig) -> Result<Self, KernelError> {
        let &ModelConfig { hidden, intermediate, heads, kv_heads, head_dim, vocabulary, .. } = config;
        Ok(Self {
            hidden: ops.alloc(Rows::Tokens, hidden)?,
            normed: ops.alloc(Rows::Tokens, hidden)?,
            qkv: ops.alloc(Rows::Tokens, (heads + 2 * kv_heads) * head_dim)?,
            attended: ops.alloc(Rows::Tokens, heads * head_dim)?,
            gate_up: ops.alloc(Rows::Tokens, 2 * intermediate)?,
            gated: ops.alloc(Rows::Tokens, intermediate)?,
            last: ops.alloc(Rows::Samples, hidden)?,
            last_normed: ops.alloc(Rows::Samples, hidden)?,
            logits: ops.alloc(Rows::Samples, vocabulary)?,
        })
    }
}

/// Moves weights from mapped files into the backend.
struct Loader<'a> {
    files: &'a ModelFiles,
    config: &'a ModelConfig,
    ops: Box<dyn Ops>,
    format: WeightFormat,
    progress: &'a mut dyn FnMut(u64, u64),
    packed: u64,
}

/// One tensor of a stacked matrix.
struct Source<'a> {
    part: Weight,
    tensor: Tensor<'a>,
    rows: usize,
    row_order: Option<Vec<u32>>,
}

impl<'a> Loader<'a> {
    fn weights(&mut self) -> Result<Weights, LoadError> {
        let &ModelConfig { hidden, vocabulary, layers, tied_embeddings, .. } = self.config;
        let table = self.source(Weight::Embedding, vocabulary, hidden)?;
        let embedding = self.matrix(&[table], hidden)?;
        let output = if tied_embeddings {
            embedding
        } else {
            let table = self.source(Weight::Output, vocabulary, hidden)?;
            self.matrix(&[table], hidden)?
        };
        let layers = (0..layers).map(|index| self.layer(index)).collect::<Result<_, _>>()?;
        let final_norm = self.vector(Weight::FinalNorm, hidden)?;
        let rope = self.ops.load_rope(&self.config.inverse_frequencies(), 1.0).map_err(|source| self.refused("rope", source))?;
        Ok(Weights { embedding, layers, final_norm, output, rope })
    }

    fn layer(&mut self, index: usize) -> Result<Layer, LoadError> {
        let &ModelConfig { hidden, intermediate, heads, kv_heads, head_dim, qkv_bias, output_bias, mlp_bias, .. } = self.config;
        let at = |part: Part| Weight::Layer(index, part);
        let (queries, keys) = (heads * head_dim, kv_heads * head_dim);
        let layer = Layer {
            attention_norm: self.vector(at(Part::AttentionNorm), hidden)?,
            qkv: Linear {
                weight: {
                    let query = self.source(at(Part::Query), queries, hidden)?;
                    let key = self.source(at(Part::Key), keys, hidden)?;
                    let value = self.source(at(Part::Value), keys, hidden)?;
                    self.matrix(&[query, key, value], hidden)?
                },
                bias: {
                    let parts = [(at(Part::QueryBias), queries), (at(Part::KeyBias), keys), (at(Part::ValueBias), keys)];
                    self.bias(qkv_bias, &parts)?
                },
            },
            qk_norm: if self.config.qk_norm {
                let q = self.vector(at(Part::QueryNorm), head_dim)?;
                let k = self.vector(at(Part::KeyNorm), head_dim)?;
                Some(QkNorm { q, k, eps: self.config.rms_eps })
            } else {
                None
            },
            attention_output: Linear {
                weight: {
                    let source = self.source(at(Part::AttentionOutput), hidden, queries)?;
                    self.matrix(&[source], queries)?
                },
                bias: self.bias(output_bias, &[(at(Part::AttentionOutputBias), hidden)])?,
            },
            feed_forward_norm: self.vector(at(Part::FeedForwardNorm), hidden)?,
            gate_up: Linear {
                weight: {
                    let gate = self.source(at(Part::Gate), intermediate, hidden)?;
                    let up = self.source(at(Part::Up), intermediate, hidden)?;
                    self.matrix(&[gate, up], hidden)?
                },
                bias: self.bias(mlp_bias, &[(at(Part::GateBias), intermediate), (at(Part::UpBias), intermediate)])?,
            },
            down: Linear {
                weight: {
                    let source = self.source(at(Part::Down), hidden, intermediate)?;
                    self.matrix(&[source], intermediate)?
                },
                bias: self.bias(mlp_bias, &[(at(Part::DownBias), hidden)])?,
            },
        };
        self.files.weights_are_packed();
        Ok(layer)
    }

    /// The tensor of a weight `[n, k]`, checked.
    fn source(&self, part: Weight, n: usize, k: usize) -> Result<Source<'a>, LoadError> {
        let tensor = self.files.need(part)?;
        tensor.expect_shape(&[n, k])?;
        if tensor.format.row_bytes(k).and_then(|row| row.checked_mul(n)) != Some(tensor.data.len()) {
            let detail = format!("{} bytes are not {n} rows of {k} in {:?}", tensor.data.len(), tensor.format);
            return Err(LoadError::corrupt(tensor.path, tensor.name, detail));
        }
        Ok(Source { part, tensor, rows: n, row_order: self.row_order(part, n) })
    }

    /// llama.cpp's converter reorders the rows of q and k in llama-family models so that rotated pairs are neighbours
    /// (`LlamaModel.permute`); ours rotates halves, as the publishers' models do.
    fn row_order(&self, part: Weight, rows: usize) -> Option<Vec<u32>> {
        let rotated = matches!(part, Weight::Layer(_, Part::Query | Part::Key | Part::QueryBias | Part::KeyBias));
        let paired = self.files.naming() == Naming::Gguf && matches!(self.config.family, Family::Llama | Family::Mistral);
        if !(rotated && paired) {
            return None;
        }
        let (head_dim, half) = (self.config.head_dim, self.config.head_dim / 2);
        let order = (0..rows).map(|row| {
            let (head, within) = (row / head_dim, row % head_dim);
            head * head_dim + within % half * 2 + within / half
        });
        order.map(|row| u32::try_from(row).ok()).collect()
    }

    fn matrix(&mut self, sources: &[Source<'_>], k: usize) -> Result<Matrix, LoadError> {
        let stacked: Vec<MatrixSource<'_>> = sources
            .iter()
            .map(|source| MatrixSource {
                n: source.rows,
                k,
                format: source.tensor.format,
                data: source.tensor.data,
                row_order: source.row_order.as_deref(),
            })
            .collect();
        let packed = self.ops.load_matrix(&stacked, self.format);
        let matrix = packed.map_err(|error| {
            let names: Vec<String> = sources.iter().map(|source| self.files.naming().name(source.part)).collect();
            self.refused(&names.join(" + "), error)
        })?;
        self.packed += sources.iter().map(|source| source.tensor.data.len() as u64).sum::<u64>();
        (self.progress)(self.packed, self.files.file_bytes());
        Ok(matrix)
    }

    fn vector(&mut self, part: Weight, width: usize) -> Result<Vector, LoadError> {
        let values = self.values(part, width)?;
        self.ops.load_vector(&values).map_err(|source| self.refused(&self.files.naming().name(part), source))
    }

    /// The stacked bias of a stacked matrix.
    fn bias(&mut self, wanted: bool, parts: &[(Weight, usize)]) -> Result<Option<Vector>, LoadError> {
        if !wanted {
            return Ok(None);
        }
        let mut values = Vec::new();
        for &(part, width) in parts {
            let own = self.values(part, width)?;
            match self.row_order(part, width) {
                None => values.extend(own),
                Some(order) => values.extend(order.iter().filter_map(|&row| own.get(row as usize))),
            }
        }
        self.ops.load_vector(&values).map(Some).map_err(|source| self.refused("bias", source))
    }

    fn values(&self, part: Weight, width: usize) -> Result<Vec<f32>, LoadError> {
        let tensor = self.files.need(part)?;
        tensor.expect_shape(&[width])?;
        tensor.to_f32()
    }

    fn refused(&self, what: &str, source: KernelError) -> LoadError {
        LoadError::Kernel { path: self.files.path().to_owned(), what: what.to_owned(), source }
    }
}
