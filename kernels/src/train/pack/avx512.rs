//! Strips written with whole vectors: conversions of 32 numbers at a time, and transposes in registers.

use std::arch::x86_64::*;

use super::{Part, TILE_K};
use crate::ops::Format;

/// Elements of a vector.
const N: usize = 16;

/// A mask of the first `count` lanes.
#[inline(always)]
fn first(count: usize) -> __mmask16 {
    if count >= N { !0 } else { (1 << count) - 1 }
}

/// `matrix[i][j]` becomes `matrix[j][i]`.
#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::train) fn transpose(matrix: &mut [__m512i; N]) {
    let m = *matrix;
    let mut pairs = [_mm512_setzero_si512(); N];
    for i in (0..N).step_by(2) {
        pairs[i] = _mm512_unpacklo_epi32(m[i], m[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(m[i], m[i + 1]);
    }
    // Four rows by four columns in each 128-bit lane.
    let mut quads = pairs;
    for i in (0..N).step_by(4) {
        quads[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
        quads[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
        quads[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        quads[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
    for i in 0..4 {
        let low = _mm512_shuffle_i32x4::<0x88>(quads[i], quads[i + 4]);
        let high = _mm512_shuffle_i32x4::<0xdd>(quads[i], quads[i + 4]);
        let low2 = _mm512_shuffle_i32x4::<0x88>(quads[i + 8], quads[i + 12]);
        let high2 = _mm512_shuffle_i32x4::<0xdd>(quads[i + 8], quads[i + 12]);
        matrix[i] = _mm512_shuffle_i32x4::<0x88>(low, low2);
        matrix[i + 8] = _mm512_shuffle_i32x4::<0xdd>(low, low2);
        matrix[i + 4] = _mm512_shuffle_i32x4::<0x88>(high, high2);
        matrix[i + 12] = _mm512_shuffle_i32x4::<0xdd>(high, high2);
    }
}

/// `low` and `high` rounded to bfloat16, one behind the other.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn rounded(low: __m512, high: __m512) -> __m512i {
    // SAFETY: a bit cast between vectors of one size.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)) }
}

/// `low` and `high` rounded to bfloat16 as pairs: an element of each.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn paired(low: __m512, high: __m512, order: __m512i) -> __m512i {
    _mm512_permutexvar_epi16(order, rounded(low, high))
}

/// The order that [`paired`] wants: 0, 16, 1, 17, …
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn interleave() -> __m512i {
    let low = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    _mm512_or_si512(low, _mm512_slli_epi32::<16>(_mm512_add_epi32(low, _mm512_set1_epi32(16))))
}

impl Part<'_> {
    /// 32 steps of a line from step `from` on, rounded; zeros beyond the end.
    ///
    /// # Safety
    /// The line exists.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn run(&self, line: usize, from: usize) -> __m512i {
        let left = self.len - from;
        // SAFETY: within the line, by the masks.
        unsafe {
            let data = self.data.as_ptr().add(line * self.stride + from);
            if left >= TILE_K {
                return rounded(_mm512_loadu_ps(data), _mm512_loadu_ps(data.add(N)));
            }
            let low = _mm512_maskz_loadu_ps(first(left), data);
            let high = _mm512_maskz_loadu_ps(first(left.saturating_sub(N)), data.wrapping_add(N));
            rounded(low, high)
        }
    }

    /// The lines of steps `2p` and `2p + 1` as pairs; zeros where there is none.
    ///
    /// # Safety
    /// The lines exist.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn pair(&self, p: usize, valid: __mmask16, order: __m512i) -> __m512i {
        // SAFETY: within the steps, by the mask.
        unsafe {
            let data = self.data.as_ptr().add(2 * p * self.stride);
            let low = _mm512_maskz_loadu_ps(valid, data);
            let second = if 2 * p + 1 < self.len { valid } else { 0 };
            paired(low, _mm512_maskz_loadu_ps(second, data.wrapping_add(self.stride)), order)
        }
    }

    /// # Safety
    /// The operand was checked; `out` is writable for the steps, rounded up to whole tiles.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) unsafe fn tiles<const ALONG: bool>(&self, out: *mut u16) {
        let order = interleave();
        // SAFETY: the caller's promise.
        unsafe {
            for from in (0..self.len).step_by(TILE_K) {
                let out = out.add(from * N).cast::<__m512i>();
                if ALONG {
                    for line in 0..N {
                        let row = if line < self.valid { self.run(line, from) } else { _mm512_setzero_si512() };
                        _mm512_storeu_si512(out.add(line), row);
                    }
                } else {
                    let mut rows = [_mm512_setzero_si512(); N];
                    let pairs = (self.len - from).div_ceil(2).min(N);
                    for (p, row) in rows.iter_mut().enumerate().take(pairs) {
                        *row = self.pair(from / 2 + p, first(self.valid), order);
                    }
                    transpose(&mut rows);
                    for (line, row) in rows.into_iter().enumerate() {
                        _mm512_storeu_si512(out.add(line), row);
                    }
                }
            }
        }
    }

    /// # Safety
    /// As [`Self::tiles`].
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) unsafe fn pairs<const ALONG: bool>(&self, out: *mut u32) {
        let order = interleave();
        // SAFETY: the caller's promise.
        unsafe {
            for from in (0..self.len).step_by(TILE_K) {
                let out = out.add(from / 2 * N).cast::<__m512i>();
                if ALONG {
                    let mut rows = [_mm512_setzero_si512(); N];
                    for (line, row) in rows.iter_mut().enumerate().take(self.valid) {
                        *row = self.run(line, from);
                    }
                    transpose(&mut rows);
                    for (p, row) in rows.into_iter().enumerate() {
                        _mm512_storeu_si512(out.add(p), row);
                    }
                } else {
                    let pairs = (self.len - from).div_ceil(2).min(N);
                    for p in 0..N {
                        let row =
                            if p < pairs { self.pair(from / 2 + p, first(self.valid), order) } else { _mm512_setzero_si512() };
                        _mm512_storeu_si512(out.add(p), row);
                    }
                }
            }
        }
    }

    /// Lines along the steps to `[len][WIDTH]`.
    ///
    /// # Safety
    /// The operand was checked; `out` is writable for that.
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(super) unsafe fn lanes_along<const WIDTH: usize>(&self, out: *mut f32) {
        // SAFETY: the caller's promise; masks keep to what exists.
        unsafe {
            for from in (0..self.len).step_by(N) {
                let steps = (self.len - from).min(N);
                for begin in (0..WIDTH).step_by(N) {
                    let mut rows = [_mm512_setzero_si512(); N];
                    let lines = self.valid.saturating_sub(begin).min(N);
                    for (line, row) in rows.iter_mut().enumerate().take(lines) {
                        let data = self.data.as_ptr().add((begin + line) * self.stride + from);
                        *row = _mm512_castps_si512(_mm512_maskz_loadu_ps(first(steps), data));
                    }
                    transpose(&mut rows);
                    for (step, row) in rows.into_iter().enumerate().take(steps) {
                        let to = out.add((from + step) * WIDTH + begin);
                        _mm512_mask_storeu_epi32(to.cast(), first(WIDTH - begin), row);
                    }
                }
            }
        }
    }
}

/// Decodes a row's whole blocks; `false` for a format that has no code here.
///
/// # Safety
/// `data` holds the blocks of `out`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c")]
pub(in crate::train) unsafe fn decode(format: Format, data: &[u8], out: &mut [f32]) -> bool {
    let to = out.as_mut_ptr();
    // SAFETY: whole blocks of 32 weights, or whole vectors and a masked rest.
    unsafe {
        match format {
            Format::Q4_0 | Format::Q4_1 => {
                let bytes = format.block_bytes();
                for block in 0..out.len() / 32 {
                    let from = data.as_ptr().add(block * bytes);
                    let scale = half(from);
                    let (quants, offset) =
                        if bytes == 20 { (from.add(4), half(from.add(2))) } else { (from.add(2), -8.0 * scale) };
                    let quants = _mm_loadu_si128(quants.cast());
                    let nibble = _mm_set1_epi8(15);
                    let low = _mm_and_si128(quants, nibble);
                    let high = _mm_and_si128(_mm_srli_epi16::<4>(quants), nibble);
                    // A product of four and eleven bits is exact, so fusing changes nothing.
                    let (scale, offset) = (_mm512_set1_ps(scale), _mm512_set1_ps(offset));
                    let weights = |q| _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(q)), scale, offset);
                    _mm512_storeu_ps(to.add(block * 32), weights(low));
                    _mm512_storeu_ps(to.add(block * 32 + N), weights(high));
                }
            }
            Format::Q8_0 => {
                for block in 0..out.len() / 32 {
                    let from = data.as_ptr().add(block * 34);
                    let scale = _mm512_set1_ps(half(from));
                    for part in 0..2 {
                        let quants = _mm512_cvtepi8_epi32(_mm_loadu_si128(from.add(2 + part * N).cast()));
                        _mm512_storeu_ps(to.add(block * 32 + part * N), _mm512_mul_ps(_mm512_cvtepi32_ps(quants), scale));
                    }
                }
            }
            Format::Bf16 | Format::F16 => {
                for first_of in (0..out.len()).step_by(N) {
                    let mask = first(out.len() - first_of);
                    let words = _mm256_maskz_loadu_epi16(mask, data.as_ptr().add(2 * first_of).cast());
                    let values = if format == Format::F16 {
                        _mm512_cvtph_ps(words)
                    } else {
                        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(words)))
                    };
                    _mm512_mask_storeu_ps(to.add(first_of), mask, values);
                }
            }
            _ => return false,
        }
    }
    true
}

/// # Safety
/// Two bytes are readable.
#[inline]
#[target_feature(enable = "f16c")]
unsafe fn half(at: *const u8) -> f32 {
    // SAFETY: the caller's promise.
    let bits = unsafe { at.cast::<u16>().read_unaligned() };
    _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits))))
}
