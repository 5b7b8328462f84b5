//! From the residual stream to log-probabilities or hidden states: gather, final norm, output matrix. Norm and matrix are the files', or
//! parameters where the whole model is trained.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp2, Device, Layout as Strides, Shape, Tensor};
use tidemill_engine::{ModelConfig, ModelFiles};
use tidemill_kernels::Store;
use tidemill_kernels::train::{Block, LogProbs, Pieces};

use super::workshop::{Buffer, Workshop};
use super::{ModelError, along, slice};
use crate::parameters::read;

/// The final norm of some rows: `[rows, hidden]` to `[picked, hidden]`.
pub(super) struct FinalNorm {
    pub files: Arc<ModelFiles>,
    /// The files'.
    pub weight: Arc<Vec<f32>>,
    pub workshop: Arc<Workshop>,
    /// Rows, in the order of the result; a row may occur twice.
    pub picked: Vec<u32>,
}

impl FinalNorm {
    fn gather(&self, x: &[f32]) -> Result<Buffer, ModelError> {
        let hidden = self.weight.len();
        let mut out = self.workshop.buffer(self.picked.len() * hidden);
        for (out, row) in out.chunks_mut(hidden).zip(&self.picked) {
            let row = *row as usize * hidden;
            let from = x.get(row..row + hidden).ok_or(ModelError::Row { row: row / hidden, rows: x.len() / hidden })?;
            out.copy_from_slice(from);
        }
        Ok(out)
    }

    fn forward(&self, x: &[f32], weight: &[f32]) -> Result<(CpuStorage, Shape), ModelError> {
        let hidden = weight.len();
        let gathered = self.gather(x)?;
        let (mut out, mut inverse) = (vec![0.0; gathered.len()], self.workshop.buffer(self.picked.len()));
        let eps = self.files.config().rms_eps;
        self.workshop.compute().rms_norm(&gathered, Pieces::rows(hidden), weight, eps, &mut out, &mut inverse)?;
        [gathered, inverse].into_iter().for_each(|buffer| self.workshop.give_back(buffer));
        Ok((CpuStorage::F32(out), Shape::from((self.picked.len(), hidden))))
    }

    /// Derivatives along `x` and, where that is trained, along the weight.
    fn backward(&self, x: &[f32], weight: &[f32], dout: &[f32], trained: bool) -> Result<(Vec<f32>, Vec<f32>), ModelError> {
        let hidden = weight.len();
        let (whole, eps) = (Pieces::rows(hidden), self.files.config().rms_eps);
        let gathered = self.gather(x)?;
        let (mut scratch, mut inverse) = (self.workshop.buffer(gathered.len()), self.workshop.buffer(self.picked.len()));
        let mut compute = self.workshop.compute();
        let mut dweight = vec![0.0; if trained { hidden } else { 0 }];
        compute.rms_norm(&gathered, whole, weight, eps, &mut scratch, &mut inverse)?;
        compute.rms_norm_back(&gathered, whole, weight, &inverse, dout, &mut scratch, Store::Replace)?;
        if trained {
            compute.rms_norm_back_weight(&gathered, whole, &inverse, dout, &mut dweight)?;
        }
        drop(compute);
        let mut dx = vec![0.0; x.len()];
        for (along, row) in scratch.chunks(hidden).zip(&self.picked) {
            dx[*row as usize * hidden..][..hidden].iter_mut().zip(along).for_each(|(dx, along)| *dx += along);
        }
        [gathered, inverse, scratch].into_iter().for_each(|buffer| self.workshop.give_back(buffer));
        Ok((dx, dweight))
    }
}

/// Of the states and the weight; an empty weight is the files'.
impl CustomOp2 for FinalNorm {
    fn name(&self) -> &'static str {
        "final norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_strides: &Strides,
        weight: &CpuStorage,
        weight_strides: &Strides,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let weight = slice(weight, weight_strides)?;
        Ok(self.forward(slice(x, x_strides)?, if weight.is_empty() { self.weight.as_slice() } else { weight })?)
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        dout: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let slopes = |x: &[f32]| {
            read(weight, |weight| {
                let own = if weight.is_empty() { self.weight.as_slice() } else { weight };
                read(dout, |dout| self.backward(x, own, dout, !weight.is_empty()))
            })
        };
        let (dx, dweight) = read(x, slopes)????;
        Ok((along(dx, x)?, along(dweight, weight)?))
    }
}

/// Log-probabilities of tokens: `[rows, hidden]`, normed, to `[rows]`.
pub(super) struct LogProbsOp {
    pub files: Arc<ModelFiles>,
    pub workshop: Arc<Workshop>,
    pub tokens: Vec<u32>,
    /// One over the temperature.
    pub scale: f32,
    /// Whether a backward pass may come.
    pub keep: bool,
    pub kept: Mutex<Kept>,
}

/// For the backward pass.
#[derive(Default)]
pub(super) struct Kept {
    /// Each log-probability's derivative along its hidden state.
    slopes: Buffer,
    /// log Σ exp of each row's logits, where the head is trained.
    sums: Vec<f32>,
}

impl LogProbsOp {
    /// Calls `with` for `head`, or the files' without it.
    fn with_call<T>(
        &self,
        hidden: &[f32],
        head: Option<&[f32]>,
        with: impl FnOnce(LogProbs<'_>) -> Result<T, ModelError>,
    ) -> Result<T, ModelError> {
        let files = self.files.matrix(self.files.output())?;
        let &ModelConfig { hidden: width, vocabulary, .. } = self.files.config();
        let head = head.map_or(Block::Weight(files.source()), |data| Block::Values { data, n: vocabulary });
        with(LogProbs { hidden, width, head, vocabulary, tokens: &self.tokens, scale: self.scale })
    }

    fn forward(&self, hidden: &[f32], head: Option<&[f32]>) -> Result<(CpuStorage, Shape), ModelError> {
        let rows = self.tokens.len();
        let mut out = vec![0.0; rows];
        let mut slopes = if self.keep { self.workshop.buffer(hidden.len()) } else { Buffer::default() };
        let mut sums = vec![0.0; if self.keep && head.is_some() { rows } else { 0 }];
        let wanted = (self.keep && head.is_some()).then_some(sums.as_mut_slice());
        let wanted_slopes = self.keep.then_some(&mut *slopes);
        self.with_call(hidden, head, |call| Ok(self.workshop.compute().log_probs(call, &mut out, wanted, wanted_slopes)?))?;
        *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = Kept { slopes, sums };
        Ok((CpuStorage::F32(out), Shape::from(rows)))
    }

    fn along_hidden(&self, hidden: &Tensor, dout: &Tensor) -> candle_core::Result<Tensor> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let width = self.files.config().hidden;
        if kept.slopes.len() != hidden.elem_count() {
            candle_core::bail!("log-probabilities were computed without a backward pass to come");
        }
        let mut dhidden = Vec::with_capacity(kept.slopes.len());
        read(dout, |dout| {
            dout.iter().zip(kept.slopes.chunks(width)).for_each(|(dout, slopes)| dhidden.extend(slopes.iter().map(|s| dout * s)));
        })?;
        Tensor::from_vec(dhidden, hidden.shape(), &Device::Cpu)
    }

    fn along_head(&self, hidden: &[f32], head: &[f32], dout: &[f32]) -> Result<Vec<f32>, ModelError> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let mut dhead = vec![0.0; head.len()];
        self.with_call(hidden, Some(head), |call| {
            Ok(self.workshop.compute().log_probs_back_head(call, &kept.sums, dout, &mut dhead)?)
        })?;
        Ok(dhead)
    }
}

/// Of the states and the head; an empty head is the files'.
impl CustomOp2 for LogProbsOp {
    fn name(&self) -> &'static str {
        "log-probabilities"
    }

    fn cpu_fwd(
        &self,
        hidden: &CpuStorage,
        hidden_strides: &Strides,
        head: &CpuStorage,
        head_strides: &Strides,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let head = Some(slice(head, head_strides)?).filter(|head| !head.is_empty());
        Ok(self.forward(slice(hidden, hidden_strides)?, head)?)
    }

    fn bwd(
        &self,
        hidden: &Tensor,
        head: &Tensor,
        _: &Tensor,
        dout: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let dhidden = self.along_hidden(hidden, dout)?;
        if head.elem_count() == 0 {
            return Ok((Some(dhidden), None));
        }
        let slopes = |values: &[f32]| read(head, |head| read(dout, |dout| self.along_head(values, head, dout)));
        Ok((Some(dhidden), along(read(hidden, slopes)????, head)?))
    }
}

impl Drop for LogProbsOp {
    fn drop(&mut self) {
        let kept = self.kept.get_mut().unwrap_or_else(PoisonError::into_inner);
        self.workshop.give_back(std::mem::take(&mut kept.slopes));
    }
}
