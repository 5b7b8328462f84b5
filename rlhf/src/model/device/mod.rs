//! The model's layers on a device: a card, or in tests one that runs its kernels on the host.
//!
//! The graph stays candle's and on the processor; between layers it hands on a single number that means nothing. What it stands for, the
//! residual stream on the way up and the derivative along it on the way down, lies in the device's memory ([`DevicePass`]). Copied are the
//! embedded tokens, parameters and their derivatives, and of the last layer the rows that are asked for.

mod graph;
mod layer;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::Tensor;
use tidemill_engine::{FileMatrix, ModelFiles, Weight};
use tidemill_kernels::HeadShape;
use tidemill_kernels::cuda::device::Device;
use tidemill_kernels::cuda::train::{DeviceCompute, Matrix, Region, Seen, Turns};
use tidemill_kernels::train::Rotation;

use self::graph::{DeviceFinalNorm, DeviceLayerOp, DeviceLogProbs, Enter};
use super::layer::Rows;
use super::layer_weights::{LayerWeights, Norms};
use super::layout::Group;
use super::{Layer, Model, ModelError, Pass};
use crate::batch::Packed;

/// With the processor's tables that they were made of.
type HeldTurns = Mutex<Option<(Arc<Rotation>, Arc<Turns>)>>;

/// What of the model lies on the device.
pub(super) struct DeviceModel {
    files: Arc<ModelFiles>,
    /// The device, which several models may share.
    compute: Arc<Mutex<DeviceCompute>>,
    /// By layer; loaded when a pass first needs them.
    layers: Mutex<Vec<Option<Arc<Frozen>>>>,
    norm: Region,
    head: Mutex<Option<Arc<Matrix>>>,
    /// Those of layers with rotations of their own are the second.
    turns: [HeldTurns; 2],
}

/// Of a device's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Bytes held, for passes to come among them.
    pub held: usize,
    /// The most bytes that were held at once.
    pub most: usize,
    /// Bytes that may still be taken.
    pub left: usize,
    /// Bytes that are free on the device.
    pub free: usize,
}

/// A layer's numbers as the files hold them.
struct Frozen {
    matrices: [Matrix; 4],
    attention_norm: Region,
    feed_forward_norm: Region,
    head_norms: Option<[Region; 2]>,
    /// Behind attention and feed-forward part.
    norms_behind: Option<[Region; 2]>,
    /// By group; empty without.
    biases: [Region; 4],
}

/// One pass of a batch.
struct DevicePass {
    rows: Arc<Rows>,
    seen: Seen,
    turns: Arc<Turns>,
    /// Of layers with a window, where they rotate otherwise.
    local_turns: Option<Arc<Turns>>,
    stream: Mutex<Stream>,
}

/// What the number stands for that the graph hands on.
#[derive(Default)]
struct Stream {
    /// By layer: what comes into it, `[rows, hidden]`, as long as somebody will need it; behind the last layer what leaves it.
    states: Vec<Option<Region>>,
    /// The derivative along the state that a backward pass has reached.
    slope: Option<Region>,
}

impl DevicePass {
    fn stream(&self) -> MutexGuard<'_, Stream> {
        self.stream.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DeviceModel {
    /// `files` on a device. Heads that no kernel is made for are refused here, and not in the first pass.
    fn new(files: &Arc<ModelFiles>, compute: Arc<Mutex<DeviceCompute>>, final_norm: &[f32]) -> Result<Self, ModelError> {
        let config = files.config();
        let shape = HeadShape { heads: config.heads, kv_heads: config.kv_heads, head_dim: config.head_dim };
        let norm = {
            let mut compute = compute.lock().unwrap_or_else(PoisonError::into_inner);
            compute.seen(&[], &[], shape)?;
            compute.upload(final_norm)?
        };
        let files = Arc::clone(files);
        Ok(Self { files, compute, layers: Mutex::default(), norm, head: Mutex::default(), turns: Default::default() })
    }

    fn compute(&self) -> MutexGuard<'_, DeviceCompute> {
        self.compute.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Layer `index` as the files hold it.
    fn layer(&self, compute: &mut DeviceCompute, weights: &LayerWeights) -> Result<Arc<Frozen>, ModelError> {
        let mut layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Some(found)) = layers.get(weights.index) {
            return Ok(Arc::clone(found));
        }
        let mut group = |group: Group| -> Result<Matrix, ModelError> {
            let parts = group.projections().iter().map(|projection| Weight::Layer(weights.index, projection.part()));
            let matrices = parts.map(|part| self.files.matrix(part)).collect::<Result<Vec<_>, _>>()?;
            let sources: Vec<_> = matrices.iter().map(FileMatrix::source).collect();
            Ok(compute.weight(&sources)?)
        };
        let [qkv, output, gate_up, down] = Group::ALL.map(&mut group);
        let Norms { attention, feed_forward, heads, behind } = weights.norms(None, &[]);
        let [qkv_bias, output_bias, gate_up_bias, down_bias] = weights.biases.each_ref().map(|bias| compute.upload(bias));
        let mut two = |norms: Option<[&[f32]; 2]>| -> Result<Option<[Region; 2]>, ModelError> {
            let Some([first, second]) = norms else { return Ok(None) };
            Ok(Some([compute.upload(first)?, compute.upload(second)?]))
        };
        let (head_norms, norms_behind) = (two(heads)?, two(behind)?);
        let frozen = Arc::new(Frozen {
            matrices: [qkv?, output?, gate_up?, down?],
            attention_norm: compute.upload(attention)?,
            feed_forward_norm: compute.upload(feed_forward)?,
            head_norms,
            norms_behind,
            biases: [qkv_bias?, output_bias?, gate_up_bias?, down_bias?],
        });
        if layers.len() <= weights.index {
            layers.resize(weights.index + 1, None);
        }
        layers[weights.index] = Some(Arc::clone(&frozen));
        Ok(frozen)
    }

    /// The files' output matrix.
    fn head(&self, compute: &mut DeviceCompute) -> Result<Arc<Matrix>, ModelError> {
        let mut head = self.head.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = &*head {
            return Ok(Arc::clone(found));
        }
        let matrix = compute.weight(&[self.files.matrix(self.files.output())?.source()])?;
        Ok(Arc::clone(head.insert(Arc::new(matrix))))
    }

    fn turns(&self, compute: &mut DeviceCompute, rotation: &Arc<Rotation>, held: &HeldTurns) -> Result<Arc<Turns>, ModelError> {
        let mut held = held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, turns)) = &*held
            && Arc::ptr_eq(of, rotation)
        {
            return Ok(Arc::clone(turns));
        }
        // Two models on one device take turns with it, and there is never room for both.
        *held = None;
        let turns = Arc::new(compute.turns(rotation)?);
        *held = Some((Arc::clone(rotation), Arc::clone(&turns)));
        Ok(turns)
    }

    fn pass(&self, rows: Arc<Rows>) -> Result<Arc<DevicePass>, ModelError> {
        let config = self.files.config();
        let shape = HeadShape { heads: config.heads, kv_heads: config.kv_heads, head_dim: config.head_dim };
        let mut compute = self.compute();
        let seen = compute.seen(&rows.spans, &rows.positions, shape)?;
        let [held, held_local] = &self.turns;
        let turns = self.turns(&mut compute, &rows.rotation, held)?;
        let local_turns = match &rows.local_rotation {
            Some(rotation) => Some(self.turns(&mut compute, rotation, held_local)?),
            None => None,
        };
        Ok(Arc::new(DevicePass { rows, seen, turns, local_turns, stream: Mutex::default() }))
    }
}

impl Model {
    /// The same, whose layers and log-probabilities compute on `device`; the base's weights are copied there. Parameters, the optimizer and
    /// losses stay on the processor. At most `memory` bytes of the device's memory are held, where that is given.
    ///
    /// [`ModelError::Kernel`] where there is no memory for it, or such heads cannot be computed.
    pub fn computing_on(self, device: Box<dyn Device>, memory: Option<usize>) -> Result<Self, ModelError> {
        let compute = DeviceCompute::new(device, self.options.precision).within(memory.unwrap_or(usize::MAX));
        let device = DeviceModel::new(&self.files, Arc::new(Mutex::new(compute)), &self.final_norm)?;
        self.computing(Arc::new(device))
    }

    /// The same, which computes where `other` does: on its device, and on its copy of the weights where both are of the same files.
    pub fn computing_beside(self, other: &Model) -> Result<Self, ModelError> {
        let Some(device) = &other.device else { return Ok(self) };
        if other.options.precision != self.options.precision {
            return Err(ModelError::Kind("models that share a device round alike"));
        }
        if Arc::ptr_eq(&self.files, &device.files) {
            return self.computing(Arc::clone(device));
        }
        let own = DeviceModel::new(&self.files, Arc::clone(&device.compute), &self.final_norm)?;
        self.computing(Arc::new(own))
    }

    fn computing(mut self, device: Arc<DeviceModel>) -> Result<Self, ModelError> {
        if self.options.frozen_gradients {
            return Err(ModelError::Kind("gradients of frozen weights are computed, to measure them, on the processor only"));
        }
        // A model that is trained whole needs the files' numbers in a pass of the reference only.
        if let super::Kind::Adapter(_) = &self.kind {
            let mut compute = device.compute();
            for layer in &self.layers {
                device.layer(&mut compute, &layer.weights)?;
            }
            device.head(&mut compute)?;
        }
        self.device = Some(device);
        Ok(self)
    }

    /// What is held of the device's memory, by all models that share it, and what is left. None on the processor.
    pub fn device_memory(&self) -> Result<Option<DeviceMemory>, ModelError> {
        let Some(device) = &self.device else { return Ok(None) };
        let compute = device.compute();
        let (held, most) = (compute.bytes(), compute.most_bytes());
        Ok(Some(DeviceMemory { held, most, left: compute.left()?, free: compute.free()? }))
    }

    /// Computes a batch as large as they come and forgets it. From then on the device holds what such batches need, so that what is left
    /// may be given to others. Nothing on the processor.
    pub fn rehearse(&self, batch: &Packed, rows: &[u32], pass: Pass) -> Result<(), ModelError> {
        if self.device.is_none() {
            return Ok(());
        }
        let (log_probs, hidden) = self.log_probs_and_hidden(batch, rows, pass)?;
        if pass.gradient {
            let values = if rows.is_empty() { log_probs.sum_all()? } else { (log_probs.sum_all()? + hidden.sum_all()?)? };
            values.backward()?;
        }
        Ok(())
    }

    /// Holds this model, and those that compute beside it, to the memory that their [rehearsals](Self::rehearse) needed: what is left is for
    /// others from now on. Nothing on the processor.
    pub fn settle(&self) {
        if let Some(device) = &self.device {
            device.compute().settle();
        }
    }

    /// Where a model computes that does not do so on the processor.
    pub fn device(&self) -> Option<String> {
        self.device.as_ref().map(|device| device.compute().describe())
    }

    /// From embedded tokens to the states behind the final norm of `picked` rows.
    pub(super) fn hidden_on(
        &self,
        device: &Arc<DeviceModel>,
        embedded: Tensor,
        rows: Arc<Rows>,
        picked: &[u32],
        pass: Pass,
        dropout: Option<(f64, u64)>,
    ) -> Result<Tensor, ModelError> {
        let on_device = device.pass(rows)?;
        let enter = Enter { device: Arc::clone(device), pass: Arc::clone(&on_device) };
        let mut state = if embedded.track_op() { embedded.apply_op1(enter)? } else { embedded.apply_op1_no_bwd(&enter)? };
        for layer in &self.layers {
            let (trained, [params, vectors]) = layer.numbers(pass, &self.none);
            let graph = pass.gradient && (state.track_op() || params.is_variable());
            let Layer { weights, .. } = layer;
            let op = DeviceLayerOp {
                device: Arc::clone(device),
                pass: Arc::clone(&on_device),
                weights: Arc::clone(weights),
                trained: trained.cloned(),
                dropout,
                graph,
                keep: graph && !self.options.recompute,
                saved: Mutex::default(),
            };
            state = if graph { state.apply_op3(params, vectors, op)? } else { state.apply_op3_no_bwd(params, vectors, &op)? };
        }
        let op = DeviceFinalNorm { device: Arc::clone(device), pass: on_device, picked: picked.to_vec(), keep: state.track_op() };
        let norm = self.ends(pass).map_or(&self.none, |ends| ends.norm.as_tensor());
        Ok(if state.track_op() { state.apply_op2(norm, op)? } else { state.apply_op2_no_bwd(norm, &op)? })
    }

    /// Log-probabilities of the batch's labels for their states.
    pub(super) fn log_probs_on(
        &self,
        device: &Arc<DeviceModel>,
        hidden: &Tensor,
        head: &Tensor,
        batch: &Packed,
        pass: Pass,
    ) -> Result<Tensor, ModelError> {
        let op = DeviceLogProbs {
            device: Arc::clone(device),
            tokens: batch.labels.iter().map(|label| label.token).collect(),
            scale: 1.0 / pass.temperature,
            keep: hidden.track_op(),
            kept: Mutex::default(),
        };
        Ok(if hidden.track_op() { hidden.apply_op2(head, op)? } else { hidden.apply_op2_no_bwd(head, &op)? })
    }
}
