//! The integer layouts' conversion in AVX-512: the bits of the portable bodies, 64 values at a time.
//!
//! Values become 32-bit integers, are narrowed with saturating packs, and put in order at the end: packs work inside 128-bit lanes, so
//! that dword `4 j + i` of the result sits at `4 i + j` until one permutation.

use std::arch::x86_64::*;

use super::GROUP;

/// Four vectors of 16 integers: the values times `inverse`, to nearest, ties to even. Values beyond the end are 0.
///
/// Same result as adding 1.5 · 2²³ for all rows whose scale is a number.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
fn integers(x: &[f32], inverse: f32) -> [__m512i; 4] {
    let inverse = _mm512_set1_ps(inverse);
    std::array::from_fn(|i| {
        let left = x.len().saturating_sub(16 * i);
        let mask = if left >= 16 { 0xffff } else { (1u16 << left) - 1 };
        // SAFETY: masked to the slice; the address itself is not followed where the mask is zero.
        let x = unsafe { _mm512_maskz_loadu_ps(mask, x.as_ptr().wrapping_add(16 * i)) };
        _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse))
    })
}

/// Where a dword of packed bytes belongs.
#[inline]
#[target_feature(enable = "avx512f")]
fn ordered(packed: __m512i) -> __m512i {
    let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_permutexvar_epi32(order, packed)
}

/// Sets one row's 64 bytes of high and of low halves in each tile, the next tile `1024` bytes on; returns the sums of both.
///
/// # Safety
/// The processor has the instructions; `tile` points to the row's high halves in the first tile of as many as `x` needs; nobody else
/// touches the row's bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) unsafe fn set_split(mut tile: *mut i8, x: &[f32], inverse: f32) -> (i32, i32) {
    let ones = _mm512_set1_epi8(1);
    let (mut high_sums, mut low_sums) = (_mm512_setzero_si512(), _mm512_setzero_si512());
    for x in x.chunks(64) {
        let [a, b, c, d] = integers(x, inverse);
        let wide = [_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d)];
        // Balanced halves: a = 256 high + low with low in −128..=127. 128 more than the largest value is still a 16-bit number.
        let high = wide.map(|w| _mm512_srai_epi16::<8>(_mm512_add_epi16(w, _mm512_set1_epi16(128))));
        let low = wide.map(|w| _mm512_and_si512(w, _mm512_set1_epi16(0xff)));
        let (high, low) = (_mm512_packs_epi16(high[0], high[1]), _mm512_packus_epi16(low[0], low[1]));
        high_sums = _mm512_dpbusd_epi32(high_sums, ones, high);
        low_sums = _mm512_dpbusd_epi32(low_sums, ones, low);
        // SAFETY: the caller's promise.
        unsafe {
            _mm512_storeu_si512(tile.cast(), ordered(high));
            _mm512_storeu_si512(tile.add(512).cast(), ordered(low));
            tile = tile.add(1024);
        }
    }
    (_mm512_reduce_add_epi32(high_sums), _mm512_reduce_add_epi32(low_sums))
}

/// Sets one group of bytes; returns their sum.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) fn set_group(out: &mut [i8; GROUP], x: &[f32], inverse: f32) -> i32 {
    let [a, b, c, d] = integers(x, inverse);
    let bytes = _mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
    // SAFETY: 64 bytes.
    unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), ordered(bytes)) };
    _mm512_reduce_add_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), bytes))
}
