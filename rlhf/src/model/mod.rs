//! A served model as a differentiable function.
//!
//! The graph is candle's; its nodes are ours: one operation per decoder layer, one for the final norm, one for the log-probabilities.
//! What is trained is an adapter, a layer's being one flat parameter, or everything ([`Model::whole`]). Weights that are not trained are
//! read where they lie in the model's files, in their own format; a GGUF model is trained as it is (QLoRA).

mod device;
mod embedding;
mod head;
mod layer;
mod layer_weights;
mod layout;
mod whole;
mod workshop;

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, DType, Device, Layout as Strides, Tensor, Var};
use tidemill_engine::{Adapter, AdapterError, LoadError, LoraConfig, MergeError, ModelFiles, Weight, write_model};
pub use tidemill_kernels::train::Precision;
use tidemill_kernels::train::{Rotation, Span};
use tidemill_kernels::{Format, KernelError, blocks};

pub use self::device::DeviceMemory;
use self::device::DeviceModel;
use self::embedding::Embedding;
use self::head::{FinalNorm, LogProbsOp};
use self::layer::{LayerOp, Rows};
use self::layer_weights::{LayerWeights, Trained};
use self::layout::Adapted;
use self::whole::Whole;
use self::workshop::Workshop;
use crate::batch::Packed;
use crate::parameters::Parameters;

/// What can go wrong with a model in training.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The files.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The arithmetic.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The graph.
    #[error(transparent)]
    Graph(#[from] candle_core::Error),
    /// An adapter that does not fit.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// A model that was not written.
    #[error(transparent)]
    Write(#[from] MergeError),
    /// What is trained is of another kind.
    #[error("{0}")]
    Kind(&'static str),
    /// A layer that the model does not have.
    #[error("layers: the model has layers 0 to {}, not {layer}", layers - 1)]
    Layers {
        /// Asked for.
        layer: usize,
        /// There are.
        layers: usize,
    },
    /// A token that the model does not have.
    #[error("token {token} is not one of the model's {vocabulary}")]
    Token {
        /// Asked for.
        token: u32,
        /// There are.
        vocabulary: usize,
    },
    /// A row that the batch does not have.
    #[error("row {row} of a batch of {rows}")]
    Row {
        /// Asked for.
        row: usize,
        /// There are.
        rows: usize,
    },
}

impl From<ModelError> for candle_core::Error {
    fn from(error: ModelError) -> Self {
        match error {
            ModelError::Graph(error) => error,
            other => Self::wrap(other),
        }
    }
}

/// The values of an operation's argument.
fn slice<'a>(storage: &'a CpuStorage, strides: &Strides) -> candle_core::Result<&'a [f32]> {
    match (storage, strides.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((start, end))) => Ok(&values[start..end]),
        _ => candle_core::bail!("the model's operations take contiguous f32"),
    }
}

/// Derivatives along an argument; none along one that is empty.
fn along(values: Vec<f32>, argument: &Tensor) -> candle_core::Result<Option<Tensor>> {
    if values.is_empty() { Ok(None) } else { Tensor::from_vec(values, argument.shape(), &Device::Cpu).map(Some) }
}

/// How a model computes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ModelOptions {
    /// Threads; 0 is all that the process may use.
    pub threads: usize,
    /// What products round their operands to.
    pub precision: Precision,
    /// Compute a layer's intermediate values again in the backward pass rather than keep them: a third more work for a tenth of the memory.
    pub recompute: bool,
    /// Compute gradients of frozen weights, too, and forget them. Only to measure what leaving them out is worth.
    pub frozen_gradients: bool,
}

impl Default for ModelOptions {
    fn default() -> Self {
        Self { threads: 0, precision: Precision::Bf16, recompute: false, frozen_gradients: false }
    }
}

/// What a pass computes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pass {
    /// With what was trained; without it, the reference and no graph: the model that the files hold, or what it is
    /// [held to](Model::held_to_itself).
    pub adapter: bool,
    /// Whether a backward pass may follow.
    pub gradient: bool,
    /// Dropout of the adapter's inputs with the masks of this key.
    pub dropout: Option<u64>,
    /// Logits are divided by it.
    pub temperature: f32,
}

impl Pass {
    /// The trained model, with a graph.
    pub const TRAIN: Pass = Pass { adapter: true, gradient: true, dropout: None, temperature: 1.0 };
    /// The trained model, without one.
    pub const EVALUATE: Pass = Pass { adapter: true, gradient: false, dropout: None, temperature: 1.0 };
    /// The reference.
    pub const REFERENCE: Pass = Pass { adapter: false, gradient: false, dropout: None, temperature: 1.0 };
}

/// A model with an adapter to train, or one whose every number is trained.
pub struct Model {
    files: Arc<ModelFiles>,
    options: ModelOptions,
    workshop: Arc<Workshop>,
    layers: Vec<Layer>,
    final_norm: Arc<Vec<f32>>,
    parameters: Parameters,
    kind: Kind,
    /// With how many positions it has.
    rotation: Mutex<(usize, Arc<Rotation>, Option<Arc<Rotation>>)>,
    base: String,
    /// The argument of an operation that has no number of that kind.
    none: Tensor,
    /// Where layers and log-probabilities are computed; without it on the processor.
    device: Option<Arc<DeviceModel>>,
}

/// What is trained.
enum Kind {
    Adapter(LoraConfig),
    Whole(Ends),
}

/// What of a whole model lies outside its layers.
struct Ends {
    /// `[vocabulary * hidden]`
    embedding: Var,
    /// `[hidden]`
    norm: Var,
    /// `[vocabulary * hidden]`; `None` where it is the embedding.
    head: Option<Var>,
}

struct Layer {
    weights: Arc<LayerWeights>,
    trained: Held,
    /// What stands in the adapter's place in the reference; without it the base's layer stands alone.
    reference: Option<Tensor>,
}

impl Layer {
    /// What a pass adds to the layer or puts in its place, and its two parameters.
    fn numbers<'a>(&'a self, pass: Pass, none: &'a Tensor) -> (Option<&'a Arc<Trained>>, [&'a Tensor; 2]) {
        match (&self.trained, &self.reference) {
            (Some((trained, vars)), _) if pass.adapter => {
                let var = |index: usize| vars.get(index).map_or(none, Var::as_tensor);
                (Some(trained), [var(0), var(1)])
            }
            (Some((trained, _)), Some(reference)) => (Some(trained), [reference, none]),
            _ => (None, [none, none]),
        }
    }
}

/// What of a layer is trained, and the parameters that hold its numbers.
type Held = Option<(Arc<Trained>, Vec<Var>)>;

/// Refuses what layers here do not compute.
fn dense(files: &ModelFiles) -> Result<(), ModelError> {
    let config = files.config();
    if config.gemma.as_ref().is_some_and(|gemma| gemma.attention_cap.is_some() || gemma.logit_cap.is_some()) {
        return Err(ModelError::Kind(
            "the model has soft caps of scores or logits (Gemma 2), with which it is served but neither trained nor evaluated here; choose \
             Gemma 3, a Llama, a Mistral or a Qwen model",
        ));
    }
    if config.alibi.is_some() || !config.gated {
        return Err(ModelError::Kind(
            "the model is an MPT, whose ALiBi and feed-forward part without a gate are served but neither trained nor evaluated here; \
             choose another dense model",
        ));
    }
    match config.experts {
        None => Ok(()),
        Some(_) => Err(ModelError::Kind(
            "the model is a mixture of experts, which is served but neither trained nor evaluated here; choose a dense model",
        )),
    }
}

fn var(values: Vec<f32>) -> candle_core::Result<Var> {
    let len = values.len();
    Var::from_vec(values, len, &Device::Cpu)
}

impl Model {
    /// The model of `files` with a new adapter; `seed` fixes its first numbers.
    pub fn new(files: Arc<ModelFiles>, lora: &LoraConfig, seed: u64, options: ModelOptions) -> Result<Self, ModelError> {
        dense(&files)?;
        let adapted = layout::fresh(files.config(), lora, seed)?;
        Self::with(files, lora.clone(), adapted, options)
    }

    /// The model of `files` with an adapter that exists, to go on training it or to evaluate it.
    pub fn with_adapter(files: Arc<ModelFiles>, adapter: &Adapter, options: ModelOptions) -> Result<Self, ModelError> {
        dense(&files)?;
        let adapted = layout::existing(files.config(), adapter)?;
        Self::with(files, adapter.config.clone(), adapted, options)
    }

    /// The model of `files` alone, to evaluate it.
    pub fn untrained(files: Arc<ModelFiles>, options: ModelOptions) -> Result<Self, ModelError> {
        dense(&files)?;
        let layers = files.config().layers;
        Self::with(files, LoraConfig::default(), (0..layers).map(|_| None).collect(), options)
    }

    /// The model of `files` with every number of it to train: the files' numbers in f32, which products round as they round others.
    pub fn whole(files: Arc<ModelFiles>, options: ModelOptions) -> Result<Self, ModelError> {
        dense(&files)?;
        if files.config().gemma.is_some() {
            return Err(ModelError::Kind("of Gemma models adapters are trained, not the whole model; leave out --full"));
        }
        let layout = Whole::new(files.config());
        let mut parameters = Parameters::default();
        let mut add = |name: String, values: Vec<f32>| -> Result<Var, ModelError> {
            let var = var(values)?;
            parameters.push(name, var.clone())?;
            Ok(var)
        };
        let matrix = |weight: Weight| -> Result<Vec<f32>, ModelError> {
            let mut values = Vec::new();
            whole::append(&files.matrix(weight)?, &mut values)?;
            Ok(values)
        };
        let embedding = add("embed_tokens".to_owned(), matrix(Weight::Embedding)?)?;
        let mut trained: Vec<Held> = Vec::new();
        for index in 0..files.config().layers {
            let (matrices, vectors) = layout.read(&files, index)?;
            // The optimizer knows by the names what does not decay.
            let matrices = add(format!("layers.{index}.matrices"), matrices)?;
            let vectors = add(format!("layers.{index}.norms_and_biases"), vectors)?;
            trained.push(Some((Arc::new(Trained::Whole(layout.clone())), vec![matrices, vectors])));
        }
        let norm = add("norm".to_owned(), files.vector(Weight::FinalNorm)?)?;
        let head = match files.output() {
            Weight::Embedding => None,
            other => Some(add("lm_head".to_owned(), matrix(other)?)?),
        };
        Self::of(files, Kind::Whole(Ends { embedding, norm, head }), trained, parameters, options)
    }

    fn with(files: Arc<ModelFiles>, lora: LoraConfig, adapted: Adapted, options: ModelOptions) -> Result<Self, ModelError> {
        let mut parameters = Parameters::default();
        let mut trained: Vec<Held> = Vec::new();
        for (index, adapted) in adapted.into_iter().enumerate() {
            trained.push(match adapted {
                None => None,
                Some((layout, values)) => {
                    let var = var(values)?;
                    parameters.push(format!("layers.{index}"), var.clone())?;
                    Some((Arc::new(Trained::Adapter(layout)), vec![var]))
                }
            });
        }
        Self::of(files, Kind::Adapter(lora), trained, parameters, options)
    }

    fn of(
        files: Arc<ModelFiles>,
        kind: Kind,
        trained: Vec<Held>,
        parameters: Parameters,
        options: ModelOptions,
    ) -> Result<Self, ModelError> {
        for weight in [Weight::Embedding, files.output()] {
            files.matrix(weight)?;
        }
        let layer = |(index, trained): (usize, Held)| -> Result<Layer, ModelError> {
            Ok(Layer { weights: Arc::new(LayerWeights::load(&files, index)?), trained, reference: None })
        };
        let layers = trained.into_iter().enumerate().map(layer).collect::<Result<_, _>>()?;
        let workshop = Arc::new(Workshop::new(options.threads, options.precision)?);
        let final_norm = Arc::new(files.vector(Weight::FinalNorm)?);
        let rotation = Mutex::new((0, Arc::new(Rotation::new(&[], 1.0, 0)), None));
        let (base, none) = (files.digest(), Tensor::zeros(0, DType::F32, &Device::Cpu)?);
        Ok(Self { files, options, workshop, layers, final_norm, parameters, kind, rotation, base, none, device: None })
    }

    /// The same, whose reference is the adapter as it is now and not the base alone: what a training that goes on from an adapter is held
    /// to.
    pub fn held_to_itself(mut self) -> Result<Self, ModelError> {
        for layer in &mut self.layers {
            if let Some((_, vars)) = &layer.trained
                && let [var] = vars.as_slice()
            {
                layer.reference = Some(var.as_tensor().copy()?.detach());
            }
        }
        Ok(self)
    }

    /// What is trained, in order: one vector per adapted layer, or all of a whole model's.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// Names the base model's weights by their content: [`ModelFiles::digest`].
    pub fn base(&self) -> &str {
        &self.base
    }

    /// Names everything that its numbers are a function of beside its parameters: the base's weights, how products round, how an adapter
    /// is scaled and thinned out, and the reference.
    pub fn frozen(&self) -> Result<String, ModelError> {
        let mut hasher = blake3::Hasher::new();
        hasher.update(format!("{} {:?}\n", self.base, self.options.precision).as_bytes());
        if let Kind::Adapter(lora) = &self.kind {
            hasher.update(format!("{}\n", lora.dropout).as_bytes());
        }
        if self.device.is_some() {
            // It adds in another order.
            hasher.update(b"on a card\n");
        }
        for (index, layer) in self.layers.iter().enumerate() {
            if let Some(Trained::Adapter(layout)) = layer.trained.as_ref().map(|(trained, _)| &**trained) {
                for slot in layout.slots() {
                    hasher.update(format!("{index} {:?} {} {}\n", slot.projection, slot.rank, slot.scale).as_bytes());
                }
            }
            if let Some(reference) = &layer.reference {
                crate::parameters::read(reference, |values| {
                    for value in values {
                        hasher.update(&value.to_le_bytes());
                    }
                })?;
            }
        }
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// The files of the base model.
    pub fn files(&self) -> &Arc<ModelFiles> {
        &self.files
    }

    /// The adapter as it is now; `base` is what it calls its base model. [`ModelError::Kind`] for a model that is trained whole.
    pub fn adapter(&self, base: &str) -> Result<Adapter, ModelError> {
        let Kind::Adapter(lora) = &self.kind else {
            return Err(ModelError::Kind("the whole model is trained; it has no adapter"));
        };
        let mut pairs = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            if let Some((trained, vars)) = &layer.trained
                && let (Trained::Adapter(layout), [var]) = (&**trained, vars.as_slice())
            {
                pairs.extend(layout.pairs(index, &var.as_tensor().to_vec1::<f32>()?));
            }
        }
        Ok(Adapter::new(lora.clone(), base, pairs))
    }

    /// Writes a model that is trained whole as a folder that Hugging Face's tools and the engine open, matrices in `storage`.
    /// [`ModelError::Kind`] for an adapter's model. Returns the size of the weights.
    pub fn write(&self, to: &Path, storage: Format) -> Result<u64, ModelError> {
        let Kind::Whole(ends) = &self.kind else {
            return Err(ModelError::Kind("an adapter is trained; merge it into its base for a model of its own"));
        };
        let numbers = |weight: Weight| {
            let (var, range) = self.place(ends, weight)?;
            let values = crate::parameters::read(var.as_tensor(), |values| values.get(range).map(<[f32]>::to_vec));
            values.ok().flatten()
        };
        Ok(write_model(&self.files, &numbers, storage, to)?)
    }

    /// Which parameter holds a weight, and where.
    fn place<'a>(&'a self, ends: &'a Ends, weight: Weight) -> Option<(&'a Var, std::ops::Range<usize>)> {
        let all = |var: &'a Var| Some((var, 0..var.elem_count()));
        match weight {
            Weight::Embedding => all(&ends.embedding),
            Weight::FinalNorm => all(&ends.norm),
            Weight::Output => all(ends.head.as_ref()?),
            Weight::Layer(index, part) => {
                let (trained, vars) = self.layers.get(index)?.trained.as_ref()?;
                let (Trained::Whole(whole), [matrices, vectors]) = (&**trained, vars.as_slice()) else { return None };
                let vector = || Some((vectors, whole.vector(part))).filter(|(_, range)| !range.is_empty());
                whole.matrix(self.files.config(), part).map(|range| (matrices, range)).or_else(vector)
            }
        }
    }

    /// `[labels]` log-probabilities, f32.
    pub fn log_probs(&self, batch: &Packed, pass: Pass) -> Result<Tensor, ModelError> {
        Ok(self.log_probs_and_hidden(batch, &[], pass)?.0)
    }

    /// Log-probabilities of the labels and states of rows, for the cost of one.
    pub fn log_probs_and_hidden(&self, batch: &Packed, rows: &[u32], pass: Pass) -> Result<(Tensor, Tensor), ModelError> {
        let vocabulary = self.files.config().vocabulary;
        if let Some(label) = batch.labels.iter().find(|label| label.token as usize >= vocabulary) {
            return Err(ModelError::Token { token: label.token, vocabulary });
        }
        let picked: Vec<u32> = batch.labels.iter().map(|label| label.row).chain(rows.iter().copied()).collect();
        let labels = batch.labels.len();
        if picked.is_empty() {
            return Ok((
                Tensor::zeros(0, DType::F32, &Device::Cpu)?,
                Tensor::zeros((0, self.files.config().hidden), DType::F32, &Device::Cpu)?,
            ));
        }
        let both = self.hidden(batch, &picked, pass)?;
        let hidden = if rows.is_empty() { both.clone() } else { both.narrow(0, 0, labels)? };
        if labels == 0 {
            return Ok((Tensor::zeros(0, DType::F32, &Device::Cpu)?, both));
        }
        let head = self.ends(pass).map_or(&self.none, |ends| ends.head.as_ref().unwrap_or(&ends.embedding).as_tensor());
        if let Some(device) = &self.device {
            return Ok((self.log_probs_on(device, &hidden, head, batch, pass)?, both.narrow(0, labels, rows.len())?));
        }
        let op = LogProbsOp {
            files: Arc::clone(&self.files),
            workshop: Arc::clone(&self.workshop),
            tokens: batch.labels.iter().map(|label| label.token).collect(),
            scale: 1.0 / pass.temperature,
            keep: hidden.track_op(),
            kept: Mutex::default(),
        };
        let log_probs = if hidden.track_op() { hidden.apply_op2(head, op)? } else { hidden.apply_op2_no_bwd(head, &op)? };
        Ok((log_probs, both.narrow(0, labels, rows.len())?))
    }

    /// `[rows.len(), hidden]` states behind the final norm of the rows asked for, f32: what value and reward heads read.
    pub fn hidden(&self, batch: &Packed, rows: &[u32], pass: Pass) -> Result<Tensor, ModelError> {
        let shared = Arc::new(self.rows(batch));
        let dropout = match &self.kind {
            Kind::Adapter(lora) => pass.dropout.map(|key| (lora.dropout, key)),
            Kind::Whole(_) => None,
        };
        let ends = self.ends(pass);
        let mut hidden = match ends {
            Some(ends) => {
                let vocabulary = self.files.config().vocabulary;
                if let Some(token) = batch.tokens.iter().find(|token| **token as usize >= vocabulary) {
                    return Err(ModelError::Token { token: *token, vocabulary });
                }
                let op = Embedding { tokens: batch.tokens.clone(), width: self.files.config().hidden };
                let table = ends.embedding.as_tensor();
                if pass.gradient { table.apply_op1(op)? } else { table.apply_op1_no_bwd(&op)? }
            }
            None => self.embed(&batch.tokens)?,
        };
        if let Some(device) = &self.device {
            return self.hidden_on(device, hidden, shared, rows, pass, dropout);
        }
        for layer in &self.layers {
            let (trained, [params, vectors]) = layer.numbers(pass, &self.none);
            let graph = pass.gradient && (hidden.track_op() || params.is_variable());
            let op = LayerOp {
                files: Arc::clone(&self.files),
                weights: Arc::clone(&layer.weights),
                trained: trained.cloned(),
                rows: Arc::clone(&shared),
                workshop: Arc::clone(&self.workshop),
                dropout,
                keep: graph && !self.options.recompute,
                frozen_gradients: self.options.frozen_gradients,
                saved: Mutex::default(),
            };
            hidden =
                if graph { hidden.apply_op3(params, vectors, op)? } else { hidden.apply_op3_no_bwd(params, vectors, &op)? };
        }
        let op = FinalNorm {
            files: Arc::clone(&self.files),
            weight: Arc::clone(&self.final_norm),
            workshop: Arc::clone(&self.workshop),
            picked: rows.to_vec(),
        };
        let norm = ends.map_or(&self.none, |ends| ends.norm.as_tensor());
        Ok(if hidden.track_op() { hidden.apply_op2(norm, op)? } else { hidden.apply_op2_no_bwd(norm, &op)? })
    }

    /// Embedding, last norm and head of a model that is trained whole, in passes with what was trained.
    fn ends(&self, pass: Pass) -> Option<&Ends> {
        match &self.kind {
            Kind::Whole(ends) if pass.adapter => Some(ends),
            _ => None,
        }
    }

    fn rows(&self, batch: &Packed) -> Rows {
        let spans = batch.segments.iter().map(|segment| Span { first: segment.first, len: segment.len, prefix: segment.prefix });
        let needed = batch.positions.iter().map(|position| *position as usize + 1).max().unwrap_or(0);
        let (rotation, local_rotation) = self.rotation(needed);
        Rows { positions: batch.positions.clone(), spans: spans.collect(), rotation, local_rotation }
    }

    /// Cosines and sines for at least `positions`, and those of layers with a window where they are others.
    fn rotation(&self, positions: usize) -> (Arc<Rotation>, Option<Arc<Rotation>>) {
        let mut held = self.rotation.lock().unwrap_or_else(PoisonError::into_inner);
        if held.0 < positions {
            let positions = positions.next_power_of_two().max(512);
            let config = self.files.config();
            let table = |frequencies: Vec<f32>, magnitude| Arc::new(Rotation::new(&frequencies, magnitude, positions));
            let local = config.local_inverse_frequencies().map(|frequencies| table(frequencies, 1.0));
            *held = (positions, table(config.inverse_frequencies(), config.rope_magnitude()), local);
        }
        (Arc::clone(&held.1), held.2.clone())
    }

    /// `[tokens, hidden]` rows of the embedding table.
    fn embed(&self, tokens: &[u32]) -> Result<Tensor, ModelError> {
        let table = self.files.matrix(Weight::Embedding)?;
        let row = table.format.row_bytes(table.k).unwrap_or(0);
        let mut out = vec![0.0; tokens.len() * table.k];
        for (token, out) in tokens.iter().zip(out.chunks_mut(table.k)) {
            let start = *token as usize * row;
            let bytes = table.data.get(start..start + row).ok_or(ModelError::Token { token: *token, vocabulary: table.n })?;
            blocks::dequantize_row(table.format, bytes, out)?;
        }
        if let Some(scale) = self.files.embedding_scale()? {
            out.iter_mut().for_each(|value| *value *= scale);
        }
        Ok(Tensor::from_vec(out, (tokens.len(), table.k), &Device::Cpu)?)
    }
}

#[cfg(test)]
mod tests;
