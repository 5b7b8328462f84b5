//! What a model's file loads onto the device.

use super::device::{Address, Kernel, Source};
use super::params::Weights;
use super::weights::Form;
use crate::ops::{KvSpec, Rows};

/// A kernel for products with weights.
const fn linear(name: &'static str) -> Kernel {
    Kernel::new(Source::Linear, name, 256)
}

/// Kernels for few rows by form, smallest first.
pub(super) fn few_rows(form: Form) -> &'static [(usize, Kernel)] {
    const BF16: [(usize, Kernel); 2] = [(8, linear("linear_bf16_8")), (16, linear("linear_bf16_16"))];
    const INT8: [(usize, Kernel); 4] = [
        (8, linear("linear_int8_8")),
        (16, linear("linear_int8_16")),
        (32, linear("linear_int8_32")),
        (64, linear("linear_int8_64")),
    ];
    const FP8: [(usize, Kernel); 4] = [
        (8, linear("linear_fp8_8")),
        (16, linear("linear_fp8_16")),
        (32, linear("linear_fp8_32")),
        (64, linear("linear_fp8_64")),
    ];
    const INT4: [(usize, Kernel); 4] = [
        (8, linear("linear_int4_8")),
        (16, linear("linear_int4_16")),
        (32, linear("linear_int4_32")),
        (64, linear("linear_int4_64")),
    ];
    match form {
        Form::F32 => &[],
        // Beyond, the library's products read the weights as fast and compute faster.
        Form::Bf16 => &BF16,
        Form::Int8 => &INT8,
        Form::Fp8 => &FP8,
        Form::Int4 => &INT4,
    }
}

/// Elements of a matrix that a block of [`widen`]'s kernels takes.
pub(super) const WIDENED: usize = 8192;

/// The kernel that makes bf16 of a form for products by the library, which reads the others as they are.
pub(super) fn widen(form: Form) -> Option<Kernel> {
    match form {
        Form::F32 | Form::Bf16 => None,
        Form::Int8 => Some(linear("widen_int8")),
        Form::Fp8 => Some(linear("widen_fp8")),
        Form::Int4 => Some(linear("widen_int4")),
    }
}

/// A matrix on the device.
#[derive(Clone, Copy)]
pub(super) struct HeldMatrix {
    pub form: Form,
    pub weights: Weights,
}

/// The bf16 copy of a buffer.
#[derive(Clone, Copy)]
pub(super) struct Half {
    pub at: Address,
    pub stride: usize,
    /// Whether it holds what the buffer holds.
    pub fresh: bool,
}

pub(super) struct Buffer {
    pub rows: Rows,
    pub width: usize,
    pub at: Address,
    pub half: Option<Half>,
}

pub(super) struct HeldRope {
    pub cosines: Address,
    pub sines: Address,
    pub half: usize,
}

pub(super) struct HeldCache {
    pub spec: KvSpec,
    pub keys: Address,
    pub values: Address,
}

impl HeldCache {
    /// Bytes of a block in one layer, keys or values.
    pub(super) fn block_bytes(&self) -> usize {
        self.spec.kv_heads * self.spec.block_size * self.spec.head_dim * self.spec.dtype.bytes()
    }

    /// Where a layer's keys and values start.
    pub(super) fn layer(&self, layer: usize) -> (Address, Address) {
        let bytes = layer * self.spec.blocks * self.block_bytes();
        (self.keys.plus(bytes), self.values.plus(bytes))
    }
}
