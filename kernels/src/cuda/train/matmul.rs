//! Products of matrices in a device's memory.

use std::marker::PhantomData;

use super::params::TrainMatmul;
use super::{DeviceCompute, Region, Values};
use crate::cuda::device::{Address, Kernel, Launch, Source};
use crate::error::KernelError;
use crate::ops::Store;
use crate::train::Precision;

/// Rows and columns of a result that a block computes.
const BLOCK: usize = 128;
/// Of the inner dimension, at a time.
const STEP: usize = 32;

/// A matrix in a device's memory, as it lies or transposed.
#[derive(Clone, Copy)]
pub struct Operand<'a> {
    pub(super) at: Address,
    pub(super) len: usize,
    pub(super) stride: usize,
    /// In bf16.
    pub(super) half: bool,
    pub(super) turned: bool,
    pub(super) owner: PhantomData<&'a Region>,
}

/// `out (+)= scale * left · right`, `[m, k] · [k, n]`. Sums are f32.
#[derive(Clone, Copy)]
pub struct Product<'a> {
    /// Rows of the result.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// Inner dimension.
    pub k: usize,
    /// `[m, k]`, in f32.
    pub left: Operand<'a>,
    /// `[k, n]`
    pub right: Operand<'a>,
    /// Multiplies the product.
    pub scale: f32,
    /// Whether the result replaces what is in the output or is added to it.
    pub store: Store,
}

impl<'a> Operand<'a> {
    /// The same without its first rows; of a transposed matrix, without its first columns.
    pub(super) fn without_lines(self, first: usize) -> Operand<'a> {
        let skipped = (first * self.stride).min(self.len);
        let each = if self.half { 2 } else { 4 };
        Operand { at: self.at.plus(skipped * each), len: self.len - skipped, ..self }
    }

    /// Whether a `[rows, columns]` matrix lies here.
    fn holds(&self, rows: usize, columns: usize) -> bool {
        let (lines, width) = if self.turned { (columns, rows) } else { (rows, columns) };
        lines == 0 || (self.stride >= width && (lines - 1).checked_mul(self.stride).is_some_and(|at| at + width <= self.len))
    }

    /// Whether every fourth element of a line starts at as many bytes as four take.
    fn quads(&self) -> bool {
        let bytes = if self.half { 8 } else { 16 };
        self.stride.is_multiple_of(4) && self.at.0.is_multiple_of(bytes)
    }
}

impl DeviceCompute {
    /// Computes `product` into `out`, whose rows lie `stride` apart. [`KernelError::Shape`] when operands or output do not fit.
    pub fn matmul(&mut self, product: &Product<'_>, out: Values<'_>, stride: usize) -> Result<(), KernelError> {
        let &Product { m, n, k, left, right, scale, store } = product;
        if m == 0 || n == 0 {
            return Ok(());
        }
        if left.half || !left.holds(m, k) || !right.holds(k, n) || !out.rows(stride).holds(m, n) {
            let detail = format!("[{m}, {k}] of {} and [{k}, {n}] of {} to {} at {stride}", left.len, right.len, out.len);
            return Err(KernelError::Shape { op: "matmul", detail });
        }
        let params = TrainMatmul {
            left: left.at,
            right: right.at,
            out: out.at,
            left_stride: left.stride as u32,
            right_stride: right.stride as u32,
            out_stride: stride as u32,
            m: m as u32,
            n: n as u32,
            k: k as u32,
            right_half: right.half.into(),
            left_quads: left.quads().into(),
            right_quads: right.quads().into(),
            add: (store == Store::Add).into(),
            scale,
            unused: 0,
        };
        let (name, bytes, apart) = match (self.precision, left.turned, right.turned) {
            (Precision::Bf16, false, false) => ("train_matmul_bf16_nn", 2, 8),
            (Precision::Bf16, false, true) => ("train_matmul_bf16_nt", 2, 8),
            (Precision::Bf16, true, false) => ("train_matmul_bf16_tn", 2, 8),
            (Precision::Bf16, true, true) => ("train_matmul_bf16_tt", 2, 8),
            (Precision::F32, false, false) => ("train_matmul_f32_nn", 4, 4),
            (Precision::F32, false, true) => ("train_matmul_f32_nt", 4, 4),
            (Precision::F32, true, false) => ("train_matmul_f32_tn", 4, 4),
            (Precision::F32, true, true) => ("train_matmul_f32_tt", 4, 4),
        };
        let launch = Launch::grid(m.div_ceil(BLOCK), n.div_ceil(BLOCK)).with_shared(2 * BLOCK * (STEP + apart) * bytes);
        self.launch(Kernel::new(Source::Train, name, 256), launch, params)
    }
}
