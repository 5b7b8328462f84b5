//! From the residual stream to log-probabilities or hidden states: gather, final norm, output matrix.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp1, Device, Layout as Strides, Shape, Tensor};
use tidemill_engine::ModelFiles;
use tidemill_kernels::Store;
use tidemill_kernels::train::{Block, LogProbs, Pieces};

use super::workshop::{Buffer, Workshop};
use super::{ModelError, slice};
use crate::parameters::read;

/// The final norm of some rows: `[rows, hidden]` to `[picked, hidden]`.
pub(super) struct FinalNorm {
    pub files: Arc<ModelFiles>,
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

    fn forward(&self, x: &[f32]) -> Result<Vec<f32>, ModelError> {
        let hidden = self.weight.len();
        let gathered = self.gather(x)?;
        let (mut out, mut inverse) = (vec![0.0; gathered.len()], self.workshop.buffer(self.picked.len()));
        let eps = self.files.config().rms_eps;
        self.workshop.compute().rms_norm(&gathered, Pieces::rows(hidden), &self.weight, eps, &mut out, &mut inverse)?;
        [gathered, inverse].into_iter().for_each(|buffer| self.workshop.give_back(buffer));
        Ok(out)
    }

    fn backward(&self, x: &[f32], dout: &[f32]) -> Result<Vec<f32>, ModelError> {
        let hidden = self.weight.len();
        let (whole, eps) = (Pieces::rows(hidden), self.files.config().rms_eps);
        let gathered = self.gather(x)?;
        let (mut scratch, mut inverse) = (self.workshop.buffer(gathered.len()), self.workshop.buffer(self.picked.len()));
        let mut compute = self.workshop.compute();
        compute.rms_norm(&gathered, whole, &self.weight, eps, &mut scratch, &mut inverse)?;
        compute.rms_norm_back(&gathered, whole, &self.weight, &inverse, dout, &mut scratch, Store::Replace)?;
        drop(compute);
        let mut dx = vec![0.0; x.len()];
        for (along, row) in scratch.chunks(hidden).zip(&self.picked) {
            dx[*row as usize * hidden..][..hidden].iter_mut().zip(along).for_each(|(dx, along)| *dx += along);
        }
        [gathered, inverse, scratch].into_iter().for_each(|buffer| self.workshop.give_back(buffer));
        Ok(dx)
    }
}

impl CustomOp1 for FinalNorm {
    fn name(&self) -> &'static str {
        "final norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, strides: &Strides) -> candle_core::Result<(CpuStorage, Shape)> {
        let out = self.forward(slice(x, strides)?)?;
        Ok((CpuStorage::F32(out), Shape::from((self.picked.len(), self.weight.len()))))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dout: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let dx = read(x, |x| read(dout, |dout| self.backward(x, dout)))???;
        Ok(Some(Tensor::from_vec(dx, x.shape(), &Device::Cpu)?))
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
    /// For the backward pass: each log-probability's derivative along its hidden state.
    pub slopes: Mutex<Buffer>,
}

impl LogProbsOp {
    fn with_call<T>(&self, hidden: &[f32], with: impl FnOnce(LogProbs<'_>) -> Result<T, ModelError>) -> Result<T, ModelError> {
        let head = self.files.matrix(self.files.output())?;
        let config = self.files.config();
        with(LogProbs {
            hidden,
            width: config.hidden,
            head: Block::Weight(head.source()),
            vocabulary: config.vocabulary,
            tokens: &self.tokens,
            scale: self.scale,
        })
    }
}

impl CustomOp1 for LogProbsOp {
    fn name(&self) -> &'static str {
        "log-probabilities"
    }

    fn cpu_fwd(&self, hidden: &CpuStorage, strides: &Strides) -> candle_core::Result<(CpuStorage, Shape)> {
        let rows = self.tokens.len();
        let hidden = slice(hidden, strides)?;
        let mut out = vec![0.0; rows];
        let mut slopes = if self.keep { self.workshop.buffer(hidden.len()) } else { Buffer::default() };
        let wanted = self.keep.then_some(&mut *slopes);
        self.with_call(hidden, |call| Ok(self.workshop.compute().log_probs(call, &mut out, wanted)?))?;
        *self.slopes.lock().unwrap_or_else(PoisonError::into_inner) = slopes;
        Ok((CpuStorage::F32(out), Shape::from(rows)))
    }

    fn bwd(&self, hidden: &Tensor, _: &Tensor, dout: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let slopes = self.slopes.lock().unwrap_or_else(PoisonError::into_inner);
        let width = self.files.config().hidden;
        if slopes.len() != hidden.elem_count() {
            candle_core::bail!("log-probabilities were computed without a backward pass to come");
        }
        let mut dhidden = Vec::with_capacity(slopes.len());
        read(dout, |dout| {
            dout.iter().zip(slopes.chunks(width)).for_each(|(dout, slopes)| dhidden.extend(slopes.iter().map(|s| dout * s)));
        })?;
        Ok(Some(Tensor::from_vec(dhidden, hidden.shape(), &Device::Cpu)?))
    }
}

impl Drop for LogProbsOp {
    fn drop(&mut self) {
        self.workshop.give_back(std::mem::take(self.slopes.get_mut().unwrap_or_else(PoisonError::into_inner)));
    }
}
