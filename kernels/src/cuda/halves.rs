//! Products with weights, and the bf16 copies of activations that they read.

use super::device::{Address, Device, Launch, Operands, Product};
use super::holdings::{Half, HeldMatrix, WIDENED, few_rows, widen};
use super::params as p;
use super::rows::fours;
use super::weights::{self, Form};
use super::{ADD_BIAS, CudaBackend, HALVE, LINEAR_F32};
use crate::error::KernelError;
use crate::ops::{Buf, Matrix, Rows, Store, Vector};

impl<D: Device> CudaBackend<D> {
    /// Where a producer of a whole buffer is to leave a bf16 copy, if anywhere, and its stride. From here on the copy counts as fresh.
    pub(super) fn produce(&mut self, buf: Buf) -> (Address, u32) {
        match &mut self.buffers[buf.0 as usize].half {
            Some(half) => {
                half.fresh = true;
                (half.at, half.stride as u32)
            }
            None => (Address::NONE, 0),
        }
    }

    /// The buffer was changed without its copy.
    pub(super) fn stale(&mut self, buf: Buf) {
        if let Some(half) = &mut self.buffers[buf.0 as usize].half {
            half.fresh = false;
        }
    }

    /// The bf16 copy of a buffer, made if need be.
    pub(super) fn halved(&mut self, buf: Buf) -> Result<Address, KernelError> {
        let buffer = &mut self.buffers[buf.0 as usize];
        let half = match buffer.half {
            Some(half) => half,
            None => {
                let stride = buffer.width.next_multiple_of(weights::PADDING);
                let bytes = self.shapes.capacity(buffer.rows) * stride * 2;
                let half = Half { at: self.device.alloc("activations", bytes)?, stride, fresh: false };
                self.memory.activations += bytes;
                buffer.half = Some(half);
                half
            }
        };
        if !half.fresh {
            let (x, width) = (buffer.at, buffer.width);
            let params = p::Halve { x, half: half.at, width: width as u32, half_stride: half.stride as u32 };
            self.launch(HALVE, fours(self.rows(buf), width), params)?;
            self.produce(buf);
        }
        Ok(half.at)
    }

    pub(super) fn multiply(
        &mut self,
        x: Buf,
        w: Matrix,
        bias: Option<Vector>,
        out: Buf,
        store: Store,
    ) -> Result<(), KernelError> {
        let HeldMatrix { form, weights } = self.matrices[w.0 as usize];
        let (rows, n) = (self.rows(x), weights.n as usize);
        let bias = bias.map_or(Address::NONE, |bias| self.vectors[bias.0 as usize]);
        let add = u32::from(store == Store::Add);
        self.stale(out);
        if form == Form::F32 {
            let params = p::Linear { x: self.at(x), w: weights, bias, out: self.at(out), rows: rows as u32, add };
            return self.launch(LINEAR_F32, Launch::grid(rows, n.div_ceil(8)), params);
        }
        if rows == 0 {
            return Ok(());
        }
        let many = few_rows(form).iter().all(|(most, _)| rows > *most);
        // What logits are made of is not rounded: they are sampled from as they are.
        let inside = self.buffers[x.0 as usize].rows == Rows::Tokens;
        if form == Form::Fp8 && many && inside && self.rounds(n) {
            return self.multiply_fp8(x, weights, bias, out, store == Store::Add);
        }
        let half = self.halved(x)?;
        let out = self.at(out);
        if let Some((most, kernel)) = few_rows(form).iter().find(|(most, _)| rows <= *most) {
            let params = p::Linear { x: half, w: weights, bias, out, rows: rows as u32, add };
            return self.launch(*kernel, Launch::blocks(n.div_ceil(16)).with_shared(8 * 16 * most * 4), params);
        }
        let stride = weights.stride as usize;
        let wide = match widen(form) {
            None => weights.data,
            Some(kernel) => {
                let to = self.widened.reserve(&mut self.device, "widened weights", n * stride * 2)?;
                self.launch(kernel, Launch::blocks((n * stride).div_ceil(WIDENED)), p::Widen { from: weights, to })?;
                to
            }
        };
        self.device.product(Product {
            operands: Operands::Bf16,
            x: half,
            w: wide,
            out,
            rows,
            n,
            stride,
            add: store == Store::Add,
        })?;
        if bias != Address::NONE {
            self.launch(ADD_BIAS, fours(rows, n), p::AddBias { bias, out, width: n as u32, unused: 0 })?;
        }
        Ok(())
    }

    /// No bf16 copy is what its buffer is.
    pub(super) fn all_stale(&mut self) {
        self.buffers.iter_mut().filter_map(|buffer| buffer.half.as_mut()).for_each(|half| half.fresh = false);
    }
}
