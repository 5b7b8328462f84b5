//! The path for every processor: plain loops over a panel's 16 features that the compiler vectorises.

use std::ops::Range;

use super::{ActivationKind, ActivationRows, Form, Output, PANEL, PackedMatrix, TileScratch};
use crate::activations::{GROUP, stride};
use crate::packed::{INT4_BLOCK, expand_lane};

/// # Safety
/// As [`PackedMatrix::run_item`]; panels and rows in range.
pub(super) unsafe fn run(
    matrix: &PackedMatrix,
    panels: Range<usize>,
    acts: ActivationRows<'_>,
    rows: Range<usize>,
    out: Output<'_>,
    scratch: &mut TileScratch,
) {
    let k = matrix.k();
    for panel in panels {
        let (form, data) = matrix.panel(panel);
        let weights: &[u8] = match form {
            Form::Int4 => {
                expand(data, &mut scratch.expanded);
                &scratch.expanded[..matrix.padded_k() * PANEL]
            }
            _ => data,
        };
        for row in rows.clone() {
            let sums = match matrix.activation_kind() {
                ActivationKind::Int => {
                    // SAFETY: the row was set in the wide layout.
                    let x = unsafe { row_of::<i16>(acts, row, k, matrix.padded_k()) };
                    let mut sums = int(weights, x, acts.group_offsets(row, k));
                    let unit = acts.row(row).scale;
                    for (sum, scale) in sums.iter_mut().zip(matrix.panel_scales(panel)) {
                        *sum *= unit * scale;
                    }
                    sums
                }
                // SAFETY: the row was set in the single layout.
                ActivationKind::Bf16 => bf16(weights, unsafe { row_of::<f32>(acts, row, k, matrix.padded_k()) }),
                // SAFETY: as above.
                ActivationKind::F32 => single(weights, unsafe { row_of::<f32>(acts, row, k, k) }),
            };
            for (lane, sum) in sums.into_iter().enumerate() {
                // SAFETY: the item's own element.
                unsafe { out.put(row, panel * PANEL + lane, sum) };
            }
        }
    }
}

/// # Safety
/// The row was set in a row-major layout of `T`.
unsafe fn row_of<T>(acts: ActivationRows<'_>, row: usize, k: usize, len: usize) -> &[T] {
    // SAFETY: rows lie `stride(k)` elements apart, each at least `len` long.
    unsafe { std::slice::from_raw_parts(acts.values().cast::<T>().add(row * stride(k)), len) }
}

/// Expands a 4-bit panel to `[k / 4][16][4]`.
fn expand(panel: &[u8], out: &mut [u8]) {
    for (block, out) in panel.as_chunks::<INT4_BLOCK>().0.iter().zip(out.as_chunks_mut::<512>().0) {
        for lane in 0..PANEL {
            let points = expand_lane(block, lane);
            for (quad, column) in points.as_chunks::<4>().0.iter().zip(out.as_chunks_mut::<64>().0) {
                column[lane * 4..][..4].copy_from_slice(quad);
            }
        }
    }
}

/// Exact sums per group, then f32 over groups.
fn int(weights: &[u8], x: &[i16], offsets: &[i32]) -> [f32; PANEL] {
    let mut sums = [0.0f32; PANEL];
    let groups = weights.as_chunks::<{ GROUP * PANEL }>().0.iter().zip(x.as_chunks::<GROUP>().0).zip(offsets);
    for ((weights, x), offset) in groups {
        let mut partial = [*offset; PANEL];
        for (column, x) in weights.as_chunks::<64>().0.iter().zip(x.as_chunks::<4>().0) {
            for (p, w) in partial.iter_mut().zip(column.as_chunks::<4>().0) {
                for (w, x) in w.iter().zip(x) {
                    *p += i32::from(*w) * i32::from(*x);
                }
            }
        }
        for (sum, p) in sums.iter_mut().zip(partial) {
            *sum += p as f32;
        }
    }
    sums
}

fn bf16(weights: &[u8], x: &[f32]) -> [f32; PANEL] {
    let mut sums = [0.0f32; PANEL];
    for (column, x) in weights.as_chunks::<64>().0.iter().zip(x.as_chunks::<2>().0) {
        for (sum, pair) in sums.iter_mut().zip(column.as_chunks::<4>().0) {
            let pair = u32::from_le_bytes(*pair);
            *sum += f32::from_bits(pair << 16) * x[0];
            *sum += f32::from_bits(pair & 0xffff_0000) * x[1];
        }
    }
    sums
}

fn single(weights: &[u8], x: &[f32]) -> [f32; PANEL] {
    let mut sums = [0.0f32; PANEL];
    for (column, x) in weights.as_chunks::<64>().0.iter().zip(x) {
        for (sum, w) in sums.iter_mut().zip(column.as_chunks::<4>().0) {
            *sum += f32::from_le_bytes(*w) * x;
        }
    }
    sums
}
