//! From the residual stream to log-probabilities or hidden states: gather, final norm, output matrix.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp1, Device, Layout as Strides, Shape, Tensor};
use tidemill_engine::ModelFiles;
use tidemill_kernels::Store;
use tidemill_kernels::train::{Block, LogProbs, Pieces};

use super::workshop::Workshop;
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
    fn gather(&self, x: &[f32]) -> Result<Vec<f32>, ModelError> {
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
    /// Logarithms of the denominators.
    pub lse: Mutex<Vec<f32>>,
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
        let (mut out, mut lse) = (vec![0.0; rows], vec![0.0; rows]);
        let done =
            self.with_call(slice(hidden, strides)?, |call| Ok(self.workshop.compute().log_probs(call, &mut out, &mut lse)?));
        done?;
        *self.lse.lock().unwrap_or_else(PoisonError::into_inner) = lse;
        Ok((CpuStorage::F32(out), Shape::from(rows)))
    }

    fn bwd(&self, hidden: &Tensor, _: &Tensor, dout: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let lse = self.lse.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut dhidden = vec![0.0; hidden.elem_count()];
        let done = read(hidden, |hidden| {
            read(dout, |dout| {
                self.with_call(hidden, |call| Ok(self.workshop.compute().log_probs_back(call, &lse, dout, &mut dhidden, None)?))
            })
        })??;
        done?;
        Ok(Some(Tensor::from_vec(dhidden, hidden.shape(), &Device::Cpu)?))
    }
}
