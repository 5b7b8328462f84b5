//! A served model as a differentiable function.
//!
//! The graph is candle's; its nodes are ours: one operation per decoder layer, one for the final norm, one for the log-probabilities.
//! Base weights are read where they lie in the model's files, in their own format; a GGUF model is trained as it is (QLoRA). Only
//! adapters are trained: a layer's are one flat parameter.

mod head;
mod layer;
mod layout;
mod workshop;

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, DType, Device, Layout as Strides, Tensor, Var};
use tidemill_engine::{Adapter, AdapterError, LoadError, LoraConfig, ModelFiles, Weight};
pub use tidemill_kernels::train::Precision;
use tidemill_kernels::train::{Rotation, Span};
use tidemill_kernels::{KernelError, blocks};

use self::head::{FinalNorm, LogProbsOp};
use self::layer::{LayerOp, LayerWeights, Rows};
use self::layout::{Adapted, Layout};
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
    /// With the adapter; without it, the base model (the reference) and no graph.
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
    /// The base model.
    pub const REFERENCE: Pass = Pass { adapter: false, gradient: false, dropout: None, temperature: 1.0 };
}

/// A model with an adapter to train.
pub struct Model {
    files: Arc<ModelFiles>,
    options: ModelOptions,
    workshop: Arc<Workshop>,
    layers: Vec<Layer>,
    final_norm: Arc<Vec<f32>>,
    parameters: Parameters,
    lora: LoraConfig,
    /// With how many positions it has.
    rotation: Mutex<(usize, Arc<Rotation>)>,
    base: String,
}

struct Layer {
    weights: Arc<LayerWeights>,
    adapted: Option<(Arc<Layout>, Var)>,
}

impl Model {
    /// The model of `files` with a new adapter; `seed` fixes its first numbers.
    pub fn new(files: Arc<ModelFiles>, lora: &LoraConfig, seed: u64, options: ModelOptions) -> Result<Self, ModelError> {
        let adapted = layout::fresh(files.config(), lora, seed)?;
        Self::with(files, lora.clone(), adapted, options)
    }

    /// The model of `files` with an adapter that exists, to go on training it or to evaluate it.
    pub fn with_adapter(files: Arc<ModelFiles>, adapter: &Adapter, options: ModelOptions) -> Result<Self, ModelError> {
        let adapted = layout::existing(files.config(), adapter)?;
        Self::with(files, adapter.config.clone(), adapted, options)
    }

    fn with(files: Arc<ModelFiles>, lora: LoraConfig, adapted: Adapted, options: ModelOptions) -> Result<Self, ModelError> {
        for weight in [Weight::Embedding, files.output()] {
            files.matrix(weight)?;
        }
        let mut parameters = Parameters::default();
        let mut layers = Vec::new();
        for (index, adapted) in adapted.into_iter().enumerate() {
            let weights = Arc::new(LayerWeights::load(&files, index)?);
            let adapted = match adapted {
                None => None,
                Some((layout, values)) => {
                    let var = Var::from_vec(values, layout.len, &Device::Cpu)?;
                    parameters.push(format!("layers.{index}"), var.clone())?;
                    Some((Arc::new(layout), var))
                }
            };
            layers.push(Layer { weights, adapted });
        }
        let workshop = Arc::new(Workshop::new(options.threads, options.precision)?);
        let final_norm = Arc::new(files.vector(Weight::FinalNorm)?);
        let rotation = Mutex::new((0, Arc::new(Rotation::new(&[], 1.0, 0))));
        let base = files.digest();
        Ok(Self { files, options, workshop, layers, final_norm, parameters, lora, rotation, base })
    }

    /// What is trained, in order: one vector per adapted layer.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// Names the base model's weights by their content: [`ModelFiles::digest`].
    pub fn base(&self) -> &str {
        &self.base
    }

    /// The files of the base model.
    pub fn files(&self) -> &Arc<ModelFiles> {
        &self.files
    }

    /// The adapter as it is now; `base` is what it calls its base model.
    pub fn adapter(&self, base: &str) -> Result<Adapter, ModelError> {
        let mut pairs = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            if let Some((layout, var)) = &layer.adapted {
                pairs.extend(layout.pairs(index, &var.as_tensor().to_vec1::<f32>()?));
            }
        }
        Ok(Adapter::new(self.lora.clone(), base, pairs))
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
        let op = LogProbsOp {
            files: Arc::clone(&self.files),
            workshop: Arc::clone(&self.workshop),
            tokens: batch.labels.iter().map(|label| label.token).collect(),
            scale: 1.0 / pass.temperature,
            keep: hidden.track_op(),
            slopes: Mutex::default(),
        };
        let log_probs = if hidden.track_op() { hidden.apply_op1(op)? } else { hidden.apply_op1_no_bwd(&op)? };
        Ok((log_probs, both.narrow(0, labels, rows.len())?))
    }

    /// `[rows.len(), hidden]` states behind the final norm of the rows asked for, f32: what value and reward heads read.
    pub fn hidden(&self, batch: &Packed, rows: &[u32], pass: Pass) -> Result<Tensor, ModelError> {
        let shared = Arc::new(self.rows(batch));
        let mut hidden = self.embed(&batch.tokens)?;
        for layer in &self.layers {
            let adapted = layer.adapted.as_ref().filter(|_| pass.adapter);
            let graph = pass.gradient && (hidden.track_op() || adapted.is_some());
            let op = LayerOp {
                files: Arc::clone(&self.files),
                weights: Arc::clone(&layer.weights),
                layout: adapted.map(|(layout, _)| Arc::clone(layout)),
                rows: Arc::clone(&shared),
                workshop: Arc::clone(&self.workshop),
                dropout: pass.dropout.map(|key| (self.lora.dropout, key)),
                keep: graph && !self.options.recompute,
                frozen_gradients: self.options.frozen_gradients,
                saved: Mutex::default(),
            };
            hidden = match (adapted, graph) {
                (Some((_, var)), true) => hidden.apply_op2(var.as_tensor(), op)?,
                (Some((_, var)), false) => hidden.apply_op2_no_bwd(var.as_tensor(), &op)?,
                (None, true) => hidden.apply_op1(op)?,
                (None, false) => hidden.apply_op1_no_bwd(&op)?,
            };
        }
        let op = FinalNorm {
            files: Arc::clone(&self.files),
            weight: Arc::clone(&self.final_norm),
            workshop: Arc::clone(&self.workshop),
            picked: rows.to_vec(),
        };
        Ok(if hidden.track_op() { hidden.apply_op1(op)? } else { hidden.apply_op1_no_bwd(&op)? })
    }

    fn rows(&self, batch: &Packed) -> Rows {
        let spans = batch.segments.iter().map(|segment| Span { first: segment.first, len: segment.len, prefix: segment.prefix });
        let needed = batch.positions.iter().map(|position| *position as usize + 1).max().unwrap_or(0);
        Rows { positions: batch.positions.clone(), spans: spans.collect(), rotation: self.rotation(needed) }
    }

    /// Cosines and sines for at least `positions`.
    fn rotation(&self, positions: usize) -> Arc<Rotation> {
        let mut held = self.rotation.lock().unwrap_or_else(PoisonError::into_inner);
        if held.0 < positions {
            let positions = positions.next_power_of_two().max(512);
            *held = (positions, Arc::new(Rotation::new(&self.files.config().inverse_frequencies(), 1.0, positions)));
        }
        Arc::clone(&held.1)
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
        Ok(Tensor::from_vec(out, (tokens.len(), table.k), &Device::Cpu)?)
    }
}

#[cfg(test)]
mod tests;
