//! Weights repacked at load into panels of 16 output features, in the order in which kernels read them.
//!
//! | form | a panel of 16 features holds | bits per weight |
//! |---|---|---|
//! | F32 | f32 `[k][16]` | 32 |
//! | Bf16 | bf16 `[k / 2][16][2]` | 16 |
//! | Int8 | u8 (int8 + 128) `[k / 4][16][4]` | 8 |
//! | Int4 | per 32 input features: (D, M) `u16 [16][2]`, then nibbles `[4][16][8]` | 5 |
//!
//! Integer forms lie on one int8 grid per output feature: weight = `(u8 − 128) * scale[n]`. Int4 expands to it with
//! `u8 = (q * D + M) >> 8` in 16-bit arithmetic that wraps: D and M are the block's scale and offset in 1/256 of the grid's unit.
//! So a product is one exact integer sum over all of `k`, scaled once at the end, and a row's result cannot depend on how it was
//! blocked. The price is the regridding, about −40 dB of noise where 4-bit quantisation itself makes −20 dB. It is measured for
//! every matrix: one whose relative error (2-norm) exceeds [`MAX_REGRID_ERROR`] is packed as bf16 instead.

pub(crate) use grid::expand_lane;

mod grid;
mod pack;

use crate::activations::{ActivationKind, padded};
use crate::aligned::{AlignedBuf, Arena};
use crate::error::KernelError;
use std::collections::BTreeSet;

/// Output features per panel: one vector of 32-bit sums.
pub const PANEL: usize = 16;
/// Bytes of an Int4 panel per 32 input features.
pub(crate) const INT4_BLOCK: usize = 320;
/// Input features an integer form can have before an i32 sum of u8 × i8 products could overflow.
pub(crate) const MAX_INT_K: usize = 65_536;
/// Relative error (2-norm over the matrix) that regridding to int8 may add: −34 dB.
pub const MAX_REGRID_ERROR: f64 = 0.02;

/// How a panel is stored; see the module text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Form {
    Int4,
    Int8,
    Bf16,
    F32,
}

impl Form {
    /// Bytes of a panel of `k` input features.
    pub(crate) fn panel_bytes(self, k: usize) -> Option<usize> {
        let padded = k.checked_next_multiple_of(64)?;
        match self {
            Form::Int4 => (padded / 32).checked_mul(INT4_BLOCK),
            Form::Int8 => padded.checked_mul(PANEL),
            Form::Bf16 => padded.checked_mul(PANEL * 2),
            Form::F32 => k.checked_mul(PANEL * 4),
        }
    }

    fn kind(self) -> ActivationKind {
        match self {
            Form::Int4 | Form::Int8 => ActivationKind::Int,
            Form::Bf16 => ActivationKind::Bf16,
            Form::F32 => ActivationKind::F32,
        }
    }
}

/// Where a panel lies.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Panel {
    pub offset: usize,
    pub form: Form,
}

/// A weight matrix `[n, k]` in panels. The only copy of the weight: embeddings read their rows from it too.
pub struct PackedMatrix {
    n: usize,
    k: usize,
    panels: Vec<Panel>,
    data: AlignedBuf<u8>,
    /// `[panels * 16]`; empty in the float forms.
    scales: AlignedBuf<f32>,
    kind: ActivationKind,
    threads: usize,
    regrid_error: f64,
}

impl PackedMatrix {
    /// The same matrix in memory of `arena`.
    pub fn moved_to(self, arena: &mut Arena) -> Result<Self, KernelError> {
        const WHAT: &str = "packed weights";
        Ok(PackedMatrix { data: arena.copy(&self.data, WHAT)?, scales: arena.copy(&self.scales, WHAT)?, ..self })
    }

    /// Output features.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Input features.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.data.bytes() + self.scales.bytes()
    }

    /// The form that [`crate::activations::Activations::set_row`] must make of the input rows.
    pub fn activation_kind(&self) -> ActivationKind {
        self.kind
    }

    /// Relative error (2-norm) that packing added to the source's own dequantised values; 0 for the float forms, whose rounding
    /// is not measured.
    pub fn regrid_error(&self) -> f64 {
        self.regrid_error
    }

    /// Forms held, for logs: `int4`, or `int4` and `int8` when stacked sources differ.
    pub fn forms(&self) -> BTreeSet<&'static str> {
        let name = |form: Form| match form {
            Form::Int4 => "int4",
            Form::Int8 => "int8",
            Form::Bf16 => "bf16",
            Form::F32 => "f32",
        };
        self.panels.iter().map(|panel| name(panel.form)).collect()
    }

    /// Threads the work is divided for.
    pub(crate) fn threads(&self) -> usize {
        self.threads
    }

    pub(crate) fn panel_count(&self) -> usize {
        self.panels.len()
    }

    /// A panel's form and bytes.
    #[inline(always)]
    pub(crate) fn panel(&self, index: usize) -> (Form, &[u8]) {
        let Panel { offset, form } = self.panels[index];
        (form, &self.data[offset..][..form.panel_bytes(self.k).unwrap_or(0)])
    }

    /// Bytes of neighbouring panels.
    pub(crate) fn panel_bytes(&self, panels: std::ops::Range<usize>) -> &[u8] {
        let start = |i: usize| self.panels.get(i).map_or(self.data.len(), |p| p.offset);
        &self.data[start(panels.start)..start(panels.end)]
    }

    /// Scales of the panel's 16 features; ones of padding are 0.
    #[inline(always)]
    pub(crate) fn panel_scales(&self, index: usize) -> &[f32; PANEL] {
        &self.scales.as_chunks::<PANEL>().0[index]
    }

    /// Writes output feature `n`'s weights, as the kernels see them, to `out` (`k` values).
    pub fn dequantize_row(&self, n: usize, out: &mut [f32]) -> Result<(), KernelError> {
        if n >= self.n || out.len() != self.k {
            return Err(KernelError::Shape {
                op: "dequantize_row",
                detail: format!("row {n} to {} values of a [{}, {}] matrix", out.len(), self.n, self.k),
            });
        }
        let (form, data) = self.panel(n / PANEL);
        let lane = n % PANEL;
        match form {
            Form::F32 => {
                for (v, column) in out.iter_mut().zip(data.as_chunks::<64>().0) {
                    *v = f32::from_le_bytes([0, 1, 2, 3].map(|i| column[lane * 4 + i]));
                }
            }
            Form::Bf16 => {
                for (pair, column) in out.chunks_mut(2).zip(data.as_chunks::<64>().0) {
                    for (i, v) in pair.iter_mut().enumerate() {
                        let at = lane * 4 + i * 2;
                        *v = half::bf16::from_le_bytes([column[at], column[at + 1]]).to_f32();
                    }
                }
            }
            Form::Int8 => {
                let scale = self.panel_scales(n / PANEL)[lane];
                for (quad, column) in out.chunks_mut(4).zip(data.as_chunks::<64>().0) {
                    for (v, byte) in quad.iter_mut().zip(&column[lane * 4..]) {
                        *v = grid::value(*byte, scale);
                    }
                }
            }
            Form::Int4 => {
                let scale = self.panel_scales(n / PANEL)[lane];
                for (values, block) in out.chunks_mut(32).zip(data.as_chunks::<INT4_BLOCK>().0) {
                    for (v, byte) in values.iter_mut().zip(grid::expand_lane(block, lane)) {
                        *v = grid::value(byte, scale);
                    }
                }
            }
        }
        Ok(())
    }

    /// Input features with their padding.
    pub(crate) fn padded_k(&self) -> usize {
        padded(self.k)
    }
}

#[cfg(test)]
mod tests;
