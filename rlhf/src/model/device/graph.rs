//! The nodes of the graph: their arguments and results are the processor's, but for the residual stream.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout as Strides, Shape, Tensor};
use tidemill_kernels::Store;
use tidemill_kernels::cuda::train::{DeviceCompute, LogProbs, Region, Values};
use tidemill_kernels::train::Pieces;

use super::super::layer_weights::{LayerWeights, Trained};
use super::super::{ModelError, along, slice};
use super::layer::{LayerPass, Numbers, Saved, Slopes};
use super::{DeviceModel, DevicePass};
use crate::parameters::read;

/// Why a derivative cannot be had.
const NOT_KEPT: ModelError = ModelError::Kind("a batch was computed without a backward pass to come, or that has been already");

/// What stands for the residual stream.
fn sign() -> (CpuStorage, Shape) {
    (CpuStorage::F32(vec![0.0]), Shape::from(1))
}

/// A derivative along it.
fn sign_slope(sign: &Tensor) -> candle_core::Result<Option<Tensor>> {
    sign.zeros_like().map(Some)
}

/// Embedded tokens `[rows, hidden]` become the residual stream.
pub(super) struct Enter {
    pub device: Arc<DeviceModel>,
    pub pass: Arc<DevicePass>,
}

impl CustomOp1 for Enter {
    fn name(&self) -> &'static str {
        "to the device"
    }

    fn cpu_fwd(&self, x: &CpuStorage, strides: &Strides) -> candle_core::Result<(CpuStorage, Shape)> {
        let state = self.device.compute().upload(slice(x, strides)?).map_err(ModelError::from)?;
        self.pass.stream().states.push(Some(state));
        Ok(sign())
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, _: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let slope = self.pass.stream().slope.take().ok_or(NOT_KEPT)?;
        let values = self.device.compute().download(slope.all()).map_err(ModelError::from)?;
        along(values, x)
    }
}

/// A layer in one pass: of the residual stream and two flat parameters, as [`super::super::layer::LayerOp`].
pub(super) struct DeviceLayerOp {
    pub device: Arc<DeviceModel>,
    pub pass: Arc<DevicePass>,
    pub weights: Arc<LayerWeights>,
    /// Whose numbers the parameters are; `None` computes the base model's layer.
    pub trained: Option<Arc<Trained>>,
    /// Probability and key of the pass.
    pub dropout: Option<(f64, u64)>,
    /// Whether a backward pass may come.
    pub graph: bool,
    /// Whether what it needs should be kept rather than computed again.
    pub keep: bool,
    pub saved: Mutex<Option<Saved>>,
}

impl DeviceLayerOp {
    /// Calls `with` for the layer with its numbers on the device.
    fn with_pass<T>(
        &self,
        compute: &mut DeviceCompute,
        [params, vectors]: [&[f32]; 2],
        with: impl FnOnce(LayerPass<'_>) -> Result<T, ModelError>,
    ) -> Result<T, ModelError> {
        let frozen = match self.trained.as_deref() {
            Some(Trained::Whole(_)) => None,
            _ => Some(self.device.layer(compute, &self.weights)?),
        };
        let (params, vectors) = (compute.upload(params)?, compute.upload(vectors)?);
        let numbers = Numbers { frozen: frozen.as_deref(), params: params.all(), vectors: vectors.all() };
        let (config, rows) = (self.device.files.config(), self.pass.rows.positions.len());
        with(LayerPass { op: self, config, compute, numbers, rows })
    }

    fn forward(&self, params: [&[f32]; 2]) -> Result<(), ModelError> {
        let sizes = (params[0].len(), params[1].len());
        let index = self.weights.index;
        let x = self.pass.stream().states.get_mut(index).and_then(Option::take).ok_or(NOT_KEPT)?;
        if sizes != self.trained.as_ref().map_or((0, 0), |trained| trained.sizes()) {
            return Err(ModelError::Kind("a layer got parameters of another size"));
        }
        let mut compute = self.device.compute();
        let out = compute.region(x.len())?;
        let saved = self.with_pass(&mut compute, params, |mut pass| pass.forward(x.all(), out.all()))?;
        if self.keep {
            *self.saved.lock().unwrap_or_else(PoisonError::into_inner) = Some(saved);
        }
        let mut stream = self.pass.stream();
        stream.states[index] = self.graph.then_some(x);
        stream.states.push(Some(out));
        Ok(())
    }

    /// Derivatives along the parameters; that along the stream goes on in its place.
    fn backward(&self, params: [&[f32]; 2]) -> Result<[Vec<f32>; 2], ModelError> {
        let (x, dout) = {
            let mut stream = self.pass.stream();
            let x = stream.states.get_mut(self.weights.index).and_then(Option::take);
            (x.ok_or(NOT_KEPT)?, stream.slope.take().ok_or(NOT_KEPT)?)
        };
        let kept = self.saved.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut compute = self.device.compute();
        let [along_params, along_vectors] = [compute.zeros(params[0].len())?, compute.zeros(params[1].len())?];
        let slopes = Slopes { params: along_params.all(), vectors: along_vectors.all() };
        let slope = self.with_pass(&mut compute, params, |mut pass| {
            let saved = match kept {
                Some(saved) => saved,
                None => {
                    let out = pass.compute.region(x.len())?;
                    pass.forward(x.all(), out.all())?
                }
            };
            pass.backward(x.all(), &saved, dout.all(), slopes)
        })?;
        let found = [compute.download(along_params.all())?, compute.download(along_vectors.all())?];
        self.pass.stream().slope = Some(slope);
        Ok(found)
    }
}

impl CustomOp3 for DeviceLayerOp {
    fn name(&self) -> &'static str {
        "decoder layer on the device"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Strides,
        params: &CpuStorage,
        params_layout: &Strides,
        vectors: &CpuStorage,
        vectors_layout: &Strides,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.forward([slice(params, params_layout)?, slice(vectors, vectors_layout)?])?;
        Ok(sign())
    }

    fn bwd(
        &self,
        state: &Tensor,
        params: &Tensor,
        vectors: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [along_params, along_vectors] = read(params, |params| read(vectors, |vectors| self.backward([params, vectors])))???;
        Ok((sign_slope(state)?, along(along_params, params)?, along(along_vectors, vectors)?))
    }
}

/// The final norm of some rows of the residual stream: `[picked, hidden]`. An empty weight is the files'.
pub(super) struct DeviceFinalNorm {
    pub device: Arc<DeviceModel>,
    pub pass: Arc<DevicePass>,
    /// Rows, in the order of the result; a row may occur twice.
    pub picked: Vec<u32>,
    /// Whether a backward pass may come.
    pub keep: bool,
}

/// What was picked of the last state, and its norm.
struct Normed {
    gathered: Region,
    out: Region,
    inverse: Region,
    /// Of a weight that is trained.
    weight: Region,
}

impl DeviceFinalNorm {
    fn norm(&self, compute: &mut DeviceCompute, x: Values<'_>, weight: &[f32]) -> Result<Normed, ModelError> {
        let config = self.device.files.config();
        let (hidden, rows) = (config.hidden, self.pass.rows.positions.len());
        if let Some(row) = self.picked.iter().find(|row| **row as usize >= rows) {
            return Err(ModelError::Row { row: *row as usize, rows });
        }
        let gathered = compute.region(self.picked.len() * hidden)?;
        compute.gather(x, &self.picked, hidden, gathered.all())?;
        let (out, inverse) = (compute.region(gathered.len())?, compute.region(self.picked.len())?);
        let weight = compute.upload(weight)?;
        let own = self.weight(&weight);
        compute.rms_norm(gathered.all(), Pieces::rows(hidden), own, config.rms_eps, out.all(), inverse.all())?;
        Ok(Normed { gathered, out, inverse, weight })
    }

    fn weight<'a>(&'a self, trained: &'a Region) -> Values<'a> {
        if trained.is_empty() { self.device.norm.all() } else { trained.all() }
    }

    fn forward(&self, weight: &[f32]) -> Result<(CpuStorage, Shape), ModelError> {
        let x = self.pass.stream().states.pop().flatten().ok_or(NOT_KEPT)?;
        let mut compute = self.device.compute();
        let normed = self.norm(&mut compute, x.all(), weight)?;
        let values = compute.download(normed.out.all())?;
        self.pass.stream().states.push(self.keep.then_some(x));
        Ok((CpuStorage::F32(values), Shape::from((self.picked.len(), self.device.files.config().hidden))))
    }

    /// The derivative along the weight, where that is trained; that along the stream begins its way.
    fn backward(&self, weight: &[f32], dout: &[f32]) -> Result<Vec<f32>, ModelError> {
        let x = self.pass.stream().states.pop().flatten().ok_or(NOT_KEPT)?;
        let (hidden, mut compute) = (self.device.files.config().hidden, self.device.compute());
        let Normed { gathered, out, inverse, weight } = self.norm(&mut compute, x.all(), weight)?;
        let (whole, dout) = (Pieces::rows(hidden), compute.upload(dout)?);
        let given = [gathered.all(), self.weight(&weight), inverse.all(), dout.all()];
        compute.rms_norm_back(given, whole, out.all(), Store::Replace)?;
        let slope = compute.zeros(weight.len())?;
        if !weight.is_empty() {
            compute.rms_norm_back_weight([gathered.all(), inverse.all(), dout.all()], whole, slope.all())?;
        }
        let dx = compute.region(x.len())?;
        compute.gather_back(out.all(), &self.picked, hidden, dx.all())?;
        let found = compute.download(slope.all())?;
        self.pass.stream().slope = Some(dx);
        Ok(found)
    }
}

impl CustomOp2 for DeviceFinalNorm {
    fn name(&self) -> &'static str {
        "final norm on the device"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Strides,
        weight: &CpuStorage,
        weight_strides: &Strides,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok(self.forward(slice(weight, weight_strides)?)?)
    }

    fn bwd(
        &self,
        state: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        dout: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let dweight = read(weight, |weight| read(dout, |dout| self.backward(weight, dout)))???;
        Ok((sign_slope(state)?, along(dweight, weight)?))
    }
}

/// Log-probabilities of tokens: `[rows, hidden]`, normed, to `[rows]`. An empty head is the files'.
pub(super) struct DeviceLogProbs {
    pub device: Arc<DeviceModel>,
    pub tokens: Vec<u32>,
    /// One over the temperature.
    pub scale: f32,
    /// Whether a backward pass may come.
    pub keep: bool,
    pub kept: Mutex<Option<Kept>>,
}

/// For the backward pass.
pub(super) struct Kept {
    /// Each log-probability's derivative along its hidden state.
    slopes: Region,
    /// log Σ exp of each row's logits.
    sums: Region,
}

impl DeviceLogProbs {
    /// Calls `with` for `head`, or the files' where it is empty.
    fn with_call<T>(
        &self,
        compute: &mut DeviceCompute,
        hidden: &[f32],
        head: &[f32],
        with: impl FnOnce(&mut DeviceCompute, LogProbs<'_>) -> Result<T, ModelError>,
    ) -> Result<T, ModelError> {
        let config = self.device.files.config();
        let hidden = compute.upload(hidden)?;
        let call = |head| LogProbs {
            hidden: hidden.all(),
            width: config.hidden,
            head,
            vocabulary: config.vocabulary,
            tokens: &self.tokens,
            scale: self.scale,
        };
        if head.is_empty() {
            let frozen = self.device.head(compute)?;
            return with(compute, call(frozen.rows()));
        }
        let trained = compute.upload(head)?;
        with(compute, call(trained.all().rows(config.hidden)))
    }

    fn forward(&self, hidden: &[f32], head: &[f32]) -> Result<(CpuStorage, Shape), ModelError> {
        let rows = self.tokens.len();
        let mut compute = self.device.compute();
        let (out, sums) = (compute.region(rows)?, compute.region(rows)?);
        let slopes = if self.keep { Some(compute.region(hidden.len())?) } else { None };
        let wanted = slopes.as_ref().map(Region::all);
        self.with_call(&mut compute, hidden, head, |compute, call| {
            Ok(compute.log_probs(call, out.all(), sums.all(), wanted)?)
        })?;
        let values = compute.download(out.all())?;
        *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = slopes.map(|slopes| Kept { slopes, sums });
        Ok((CpuStorage::F32(values), Shape::from(rows)))
    }

    /// Derivatives along the states and, where it is trained, along the head.
    fn backward(&self, hidden: &[f32], head: &[f32], dout: &[f32]) -> Result<[Vec<f32>; 2], ModelError> {
        let Kept { slopes, sums } = self.kept.lock().unwrap_or_else(PoisonError::into_inner).take().ok_or(NOT_KEPT)?;
        let mut compute = self.device.compute();
        let dout = compute.upload(dout)?;
        compute.scale_rows(slopes.all(), dout.all())?;
        let dhidden = compute.download(slopes.all())?;
        if head.is_empty() {
            return Ok([dhidden, Vec::new()]);
        }
        let dhead = compute.region(head.len())?;
        self.with_call(&mut compute, hidden, head, |compute, call| {
            Ok(compute.log_probs_back_head(call, sums.all(), dout.all(), dhead.all())?)
        })?;
        Ok([dhidden, compute.download(dhead.all())?])
    }
}

impl CustomOp2 for DeviceLogProbs {
    fn name(&self) -> &'static str {
        "log-probabilities on the device"
    }

    fn cpu_fwd(
        &self,
        hidden: &CpuStorage,
        hidden_strides: &Strides,
        head: &CpuStorage,
        head_strides: &Strides,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok(self.forward(slice(hidden, hidden_strides)?, slice(head, head_strides)?)?)
    }

    fn bwd(
        &self,
        hidden: &Tensor,
        head: &Tensor,
        _: &Tensor,
        dout: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let slopes = |values: &[f32]| read(head, |head| read(dout, |dout| self.backward(values, head, dout)));
        let [dhidden, dhead] = read(hidden, slopes)????;
        Ok((along(dhidden, hidden)?, along(dhead, head)?))
    }
}
