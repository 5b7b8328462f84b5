//! Functions of one number that neither overflow nor lose their gradient. candle's own |x| has slope 1 at 0, where every preference
//! loss begins, and its e^x overflows.

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, bail};

use crate::statistics;

/// A function and its derivative, computed in f64 and rounded once.
#[derive(Clone, Copy)]
struct Pointwise {
    name: &'static str,
    value: fn(f64) -> f64,
    slope: Option<fn(f64) -> f64>,
}

impl CustomOp1 for Pointwise {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let Some((start, end)) = layout.contiguous_offsets() else { bail!("{} wants contiguous values", self.name) };
        let values = match storage {
            CpuStorage::F32(all) => CpuStorage::F32(all[start..end].iter().map(|x| (self.value)(f64::from(*x)) as f32).collect()),
            CpuStorage::F64(all) => CpuStorage::F64(all[start..end].iter().map(|x| (self.value)(*x)).collect()),
            _ => bail!("{} takes f32 and f64", self.name),
        };
        Ok((values, layout.shape().clone()))
    }

    fn bwd(&self, arg: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let Some(slope) = self.slope else { bail!("{} has no second derivative", self.name) };
        let slope = Pointwise { name: self.name, value: slope, slope: None };
        Ok(Some((arg.contiguous()?.apply_op1_no_bwd(&slope)? * grad)?))
    }
}

fn apply(x: &Tensor, name: &'static str, value: fn(f64) -> f64, slope: fn(f64) -> f64) -> Result<Tensor> {
    debug_assert!(matches!(x.dtype(), DType::F32 | DType::F64));
    x.contiguous()?.apply_op1(Pointwise { name, value, slope: Some(slope) })
}

/// log σ(x) = −log(1 + e^−x).
pub fn log_sigmoid(x: &Tensor) -> Result<Tensor> {
    apply(x, "log_sigmoid", |x| x.min(0.0) - (-x.abs()).exp().ln_1p(), |x| statistics::sigmoid(-x))
}

/// σ(x) = 1 / (1 + e^−x).
pub fn sigmoid(x: &Tensor) -> Result<Tensor> {
    apply(x, "sigmoid", statistics::sigmoid, |x| statistics::sigmoid(x) * statistics::sigmoid(-x))
}

/// The largest log-probability that has finite odds: 1 − e^x of anything nearer to 0 is below f32's resolution.
const ALMOST_CERTAIN: f64 = -1e-7;

/// log(1 − e^x) for log-probabilities x < 0; flat above −1e-7, so that a certain answer neither divides by zero nor pulls.
pub(super) fn log_complement(x: &Tensor) -> Result<Tensor> {
    let value = |x: f64| (-x.min(ALMOST_CERTAIN).exp_m1()).ln();
    apply(x, "log_complement", value, |x| if x < ALMOST_CERTAIN { x.exp() / x.exp_m1() } else { 0.0 })
}
