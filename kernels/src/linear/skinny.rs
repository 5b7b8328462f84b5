//! The AMX path's integer product for a few rows, without tiles.
//!
//! Decoding a few sequences reads every weight for next to no arithmetic. Here the weights go straight from memory through vector
//! registers (4-bit ones expanded on the way) into dot products with both halves of the activations. The sums are the same exact integers
//! as the matrix unit's and leave by the same arithmetic, so a row's result has the same bits on either way.

use std::arch::x86_64::*;
use std::ops::Range;

use super::{ActivationRows, Form, Output, PackedMatrix, amx};
use crate::packed::INT4_BLOCK;

/// Up to this many rows.
pub(super) const ROWS: usize = 4;

/// # Safety
/// As [`PackedMatrix::run_item`] on a machine with AMX, for rows `0..rows` with `rows <= ROWS`; panels in range.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) unsafe fn run(
    matrix: &PackedMatrix,
    panels: Range<usize>,
    acts: ActivationRows<'_>,
    rows: usize,
    next: &[u8],
    out: &Output<'_>,
) {
    let mut next = next;
    for panel in panels {
        let (form, data) = matrix.panel(panel);
        // SAFETY: the caller's promise.
        unsafe {
            match (form, rows) {
                (Form::Int4, 1) => int4::<1>(matrix, panel, data, acts, next, out),
                (Form::Int4, 2) => int4::<2>(matrix, panel, data, acts, next, out),
                (Form::Int4, 3) => int4::<3>(matrix, panel, data, acts, next, out),
                (Form::Int4, _) => int4::<4>(matrix, panel, data, acts, next, out),
                (_, 1) => int8::<1>(matrix, panel, data, acts, next, out),
                (_, 2) => int8::<2>(matrix, panel, data, acts, next, out),
                (_, 3) => int8::<3>(matrix, panel, data, acts, next, out),
                (_, _) => int8::<4>(matrix, panel, data, acts, next, out),
            }
        }
        next = next.get(data.len()..).unwrap_or(&[]);
    }
}

/// Sums of the high and of the low halves of one row with 16 features.
type Sums = [__m512i; 2];

/// Adds the products of one quad of input features.
///
/// # Safety
/// `x` points to the quad in row 0's high halves of an activation tile.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn add_quad<const R: usize>(sums: &mut [Sums; R], weights: __m512i, x: *const u8) {
    for (r, [high, low]) in sums.iter_mut().enumerate() {
        // SAFETY: a tile has rows of 64 bytes, the low halves eight rows below the high ones.
        unsafe {
            *high = _mm512_dpbusd_epi32(*high, weights, _mm512_set1_epi32(x.add(r * 64).cast::<i32>().read_unaligned()));
            *low = _mm512_dpbusd_epi32(*low, weights, _mm512_set1_epi32(x.add(512 + r * 64).cast::<i32>().read_unaligned()));
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn int8<const R: usize>(
    matrix: &PackedMatrix,
    panel: usize,
    data: &[u8],
    acts: ActivationRows<'_>,
    next: &[u8],
    out: &Output<'_>,
) {
    let mut sums = [[_mm512_setzero_si512(); 2]; R];
    let ahead = if next.is_empty() { data } else { next }.as_ptr();
    for (tile, weights) in data.as_chunks::<1024>().0.iter().enumerate() {
        for quad in 0..16 {
            // SAFETY: 16 quads of 64 bytes in a tile of weights; the activations have as many tiles.
            unsafe {
                _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add(tile * 1024 + quad * 64).cast());
                let w = _mm512_loadu_si512(weights.as_ptr().add(quad * 64).cast());
                add_quad(&mut sums, w, acts.values().add(tile * 1024 + quad * 4));
            }
        }
    }
    // SAFETY: this item's elements.
    unsafe { put(&sums, matrix, panel, acts, out) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn int4<const R: usize>(
    matrix: &PackedMatrix,
    panel: usize,
    data: &[u8],
    acts: ActivationRows<'_>,
    next: &[u8],
    out: &Output<'_>,
) {
    let mut sums = [[_mm512_setzero_si512(); 2]; R];
    let ahead = if next.is_empty() { data } else { next }.as_ptr();
    for (index, block) in data.as_chunks::<INT4_BLOCK>().0.iter().enumerate() {
        for line in 0..INT4_BLOCK / 64 {
            _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add(index * INT4_BLOCK + line * 64).cast());
        }
        // SAFETY: a block is half a tile of activations.
        let x = unsafe { acts.values().add(index / 2 * 1024 + index % 2 * 32) };
        let steps = super::avx512::Steps::of(block);
        for eighth in 0..4 {
            let [even, odd] = steps.expand(block, eighth);
            // SAFETY: eight quads of the block.
            unsafe {
                add_quad(&mut sums, even, x.add(eighth * 8));
                add_quad(&mut sums, odd, x.add(eighth * 8 + 4));
            }
        }
    }
    // SAFETY: this item's elements.
    unsafe { put(&sums, matrix, panel, acts, out) }
}

/// # Safety
/// This item's elements.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn put<const R: usize>(sums: &[Sums; R], matrix: &PackedMatrix, panel: usize, acts: ActivationRows<'_>, out: &Output<'_>) {
    let to = out.panel(panel);
    // SAFETY: 16 scales per panel; this item's elements.
    unsafe {
        let scales = _mm512_loadu_ps(matrix.panel_scales(panel).as_ptr());
        for (row, [high, low]) in sums.iter().enumerate() {
            let value = amx::join(*high, *low, acts.row(row), scales, to.bias);
            if out.add { to.put::<true>(row, value) } else { to.put::<false>(row, value) }
        }
    }
}
