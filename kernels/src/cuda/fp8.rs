//! Products of many rows where activations are 8-bit floats, too: each row is rounded with a scale of its own when it is multiplied
//! (dynamic, per token), the library multiplies, and the scales of rows and of output features are applied to its f32 result.

use super::CudaBackend;
use super::device::{Device, Kernel, Launch, Operands, Product, Source};
use super::params as p;
use super::room::Room;
use crate::error::KernelError;
use crate::ops::{Activations, Buf};

const ROUND_ROWS: Kernel = Kernel::new(Source::Fp8, "round_rows", 256);
const RESCALE: Kernel = Kernel::new(Source::Fp8, "rescale", 256);

/// The library wants matrices of a multiple of so many output features.
const FEATURES: usize = 16;

/// What products of 8-bit floats are made in.
#[derive(Clone, Copy, Default)]
pub(super) struct Fp8Rooms {
    /// Rounded rows, then their scales.
    rounded: Room,
    /// What is to be added to an output.
    products: Room,
}

impl Fp8Rooms {
    pub(super) fn rooms(&self) -> [Room; 2] {
        [self.rounded, self.products]
    }

    /// Bytes that steps of so many rows will need. `stride`, `added`: most input features, most output features of what is added up.
    pub(super) fn needed(rows: usize, stride: usize, added: usize) -> usize {
        [rows * (stride + 4), rows * added * 4].map(Room::size).iter().sum()
    }
}

impl<D: Device> CudaBackend<D> {
    /// Rounds activations to what is asked for where many rows are multiplied with weights of 8-bit floats.
    ///
    /// Errors: the device has no such products, or the library refuses one.
    pub fn with_activations(mut self, activations: Activations) -> Result<Self, KernelError> {
        if activations == Activations::Fp8 && !self.device.multiplies_fp8() {
            return Err(KernelError::Unsupported(format!(
                "{} multiplies no 8-bit floats, which cards of compute capability 8.9 (Ada) and later do; leave --activations at bf16, which \
                 goes with --weights fp8, too",
                self.device.describe()
            )));
        }
        if activations == Activations::Fp8 {
            self.try_fp8().map_err(|e| {
                KernelError::Unsupported(format!(
                    "{}: {e}, when one product of 8-bit floats was tried; leave --activations at bf16, which goes with --weights fp8, too",
                    self.device.describe()
                ))
            })?;
        }
        self.activations = activations;
        Ok(self)
    }

    /// One product of zeros: an older library, or one for other cards, refuses here and not in the first long prompt.
    fn try_fp8(&mut self) -> Result<(), KernelError> {
        let (rows, n, stride) = (128, FEATURES, 128);
        let sizes = [rows * stride, n * stride, rows * n * 4];
        let mut held = Vec::new();
        let mut multiply = || {
            for bytes in sizes {
                held.push(self.device.alloc("a trial of 8-bit floats", bytes)?);
            }
            let (x, w, out) = (held[0], held[1], held[2]);
            self.device.product(Product { operands: Operands::Fp8, x, w, out, rows, n, stride, add: false })?;
            self.device.read(out, &mut vec![0; sizes[2]])
        };
        let done = multiply();
        held.into_iter().for_each(|at| self.device.free(at));
        done
    }

    /// Whether rows of activations are rounded for weights of 8-bit floats with so many output features.
    pub(super) fn rounds(&self, n: usize) -> bool {
        self.activations == Activations::Fp8 && n.is_multiple_of(FEATURES)
    }

    /// `out = x wᵀ`, or added to it.
    pub(super) fn multiply_fp8(
        &mut self,
        x: Buf,
        weights: p::Weights,
        bias: super::Address,
        out: Buf,
        add: bool,
    ) -> Result<(), KernelError> {
        let (rows, width, out) = (self.rows(x), self.buffers[x.0 as usize].width, self.at(out));
        let (n, stride) = (weights.n as usize, weights.stride as usize);
        let to = self.fp8.rounded.reserve(&mut self.device, "rounded activations", rows * (stride + 4))?;
        let row_scales = to.plus(rows * stride);
        let products = match add {
            true => self.fp8.products.reserve(&mut self.device, "products", rows * n * 4)?,
            false => out,
        };
        let round = p::Round { x: self.at(x), to, scales: row_scales, width: width as u32, stride: stride as u32 };
        self.launch(ROUND_ROWS, Launch::blocks(rows).with_shared(8 * 8), round)?;
        let operands = Operands::Fp8;
        self.device.product(Product { operands, x: to, w: weights.data, out: products, rows, n, stride, add: false })?;
        let rescale = p::Rescale { products, row_scales, scales: weights.scales, bias, out, n: n as u32, add: add.into() };
        self.launch(RESCALE, Launch::grid(rows, n.div_ceil(256)), rescale)
    }
}
