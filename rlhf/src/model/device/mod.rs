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

/// What of the model lies on the device.
pub(super) struct DeviceModel {
    files: Arc<ModelFiles>,
    compute: Mutex<DeviceCompute>,
    /// By layer; loaded when a pass first needs them.
    layers: Mutex<Vec<Option<Arc<Frozen>>>>,
    norm: Region,
    head: Mutex<Option<Arc<Matrix>>>,
    /// With the processor's tables that they were made of.
    turns: Mutex<Option<(Arc<Rotation>, Arc<Turns>)>>,
}

/// A layer's numbers as the files hold them.
struct Frozen {
    matrices: [Matrix; 4],
    attention_norm: Region,
    feed_forward_norm: Region,
    head_norms: Option<[Region; 2]>,
    /// By group; empty without.
    biases: [Region; 4],
}

/// One pass of a batch.
struct DevicePass {
    rows: Arc<Rows>,
    seen: Seen,
    turns: Arc<Turns>,
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
        let Norms { attention, feed_forward, heads } = weights.norms(None, &[]);
        let [qkv_bias, output_bias, gate_up_bias, down_bias] = weights.biases.each_ref().map(|bias| compute.upload(bias));
        let head_norms = match heads {
            Some([queries, keys]) => Some([compute.upload(queries)?, compute.upload(keys)?]),
            None => None,
        };
        let frozen = Arc::new(Frozen {
            matrices: [qkv?, output?, gate_up?, down?],
            attention_norm: compute.upload(attention)?,
            feed_forward_norm: compute.upload(feed_forward)?,
            head_norms,
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

    fn turns(&self, compute: &mut DeviceCompute, rotation: &Arc<Rotation>) -> Result<Arc<Turns>, ModelError> {
        let mut held = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, turns)) = &*held
            && Arc::ptr_eq(of, rotation)
        {
            return Ok(Arc::clone(turns));
        }
        let turns = Arc::new(compute.turns(rotation)?);
        *held = Some((Arc::clone(rotation), Arc::clone(&turns)));
        Ok(turns)
    }

    fn pass(&self, rows: Arc<Rows>) -> Result<Arc<DevicePass>, ModelError> {
        let config = self.files.config();
        let shape = HeadShape { heads: config.heads, kv_heads: config.kv_heads, head_dim: config.head_dim };
        let mut compute = self.compute();
        let seen = compute.seen(&rows.spans, &rows.positions, shape)?;
        let turns = self.turns(&mut compute, &rows.rotation)?;
        Ok(Arc::new(DevicePass { rows, seen, turns, stream: Mutex::default() }))
    }
}

impl Model {
    /// The same, whose layers and log-probabilities compute on `device`; the base's weights are copied there. Parameters, the optimizer and
    /// losses stay on the processor. [`ModelError::Kernel`] where the device has no memory for it, or cannot compute such heads.
    pub fn computing_on(mut self, device: Box<dyn Device>) -> Result<Self, ModelError> {
        if self.options.frozen_gradients {
            return Err(ModelError::Kind("gradients of frozen weights are computed, to measure them, on the processor only"));
        }
        let mut compute = DeviceCompute::new(device, self.options.precision);
        let config = self.files.config();
        // Heads that no kernel is made for are refused here, and not in the first pass.
        compute.seen(&[], &[], HeadShape { heads: config.heads, kv_heads: config.kv_heads, head_dim: config.head_dim })?;
        let norm = compute.upload(&self.final_norm)?;
        let device = DeviceModel {
            files: Arc::clone(&self.files),
            compute: Mutex::new(compute),
            layers: Mutex::default(),
            norm,
            head: Mutex::default(),
            turns: Mutex::default(),
        };
        // A model that is trained whole needs the files' numbers in a pass of the reference only.
        if let super::Kind::Adapter(_) = &self.kind {
            let mut compute = device.compute();
            for layer in &self.layers {
                device.layer(&mut compute, &layer.weights)?;
            }
            device.head(&mut compute)?;
        }
        self.device = Some(Arc::new(device));
        Ok(self)
    }

    /// Where a model computes that does not do so on the processor.
    pub fn device(&self) -> Option<String> {
        self.device.as_ref().map(|device| device.compute().describe())
    }

    /// The most of that device's memory that has been held at once, in bytes.
    pub fn device_memory(&self) -> Option<u64> {
        self.device.as_ref().map(|device| device.compute().most_bytes() as u64)
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
