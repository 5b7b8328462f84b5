//! Vectors of floats, one type per instruction path.
//!
//! Everything is `#[inline(always)]`, so that it dissolves into the caller that carries the `#[target_feature]`; nothing here may
//! be called outside such a caller.

/// 2^x on [−½, ½]: interpolation at the Chebyshev nodes, relative error 10⁻⁷.
const EXP2: [f32; 6] = [1.000_000_1, std::f32::consts::LN_2, 0.240_221_07, 0.055_503_57, 0.009_676_032, 0.001_339_086_3];

/// A vector of `N` floats.
///
/// # Safety
/// Methods may only be called where the instructions of the implementing type exist, with pointers good for `N` elements.
pub(crate) trait Lanes {
    type V: Copy;
    const N: usize;
    /// Rows of two vectors each whose sums the registers hold beside the operands.
    const ROWS: usize;
    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// Sum of the lanes, in an order of its own.
    unsafe fn reduce_add(v: Self::V) -> f32;
    unsafe fn reduce_max(v: Self::V) -> f32;
    /// `2^x`; 0 below −125 and for NaN, nothing promised above 126.
    unsafe fn exp2(x: Self::V) -> Self::V;
    /// `N` pairs of bfloat16 as the floats of their low and high halves.
    unsafe fn load_bf16_pairs(p: *const u16) -> (Self::V, Self::V);
}

/// Four floats of plain Rust.
pub(crate) struct Portable;

impl Lanes for Portable {
    type V = [f32; 4];
    const N: usize = 4;
    const ROWS: usize = 4;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; 4]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::V {
        // SAFETY: the trait's contract.
        unsafe { p.cast::<[f32; 4]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::V) {
        // SAFETY: the trait's contract.
        unsafe { p.cast::<[f32; 4]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] - b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] / b[i])
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn reduce_add(v: Self::V) -> f32 {
        (v[0] + v[2]) + (v[1] + v[3])
    }
    #[inline(always)]
    unsafe fn reduce_max(v: Self::V) -> f32 {
        v.into_iter().fold(f32::NEG_INFINITY, |m, x| if x > m { x } else { m })
    }
    #[inline(always)]
    unsafe fn exp2(x: Self::V) -> Self::V {
        std::array::from_fn(|i| {
            let clamped = if x[i] > -125.0 { x[i] } else { -125.0 };
            let clamped = if clamped < 126.0 { clamped } else { 126.0 };
            let shifted = clamped + 12_582_912.0;
            let r = clamped - (shifted - 12_582_912.0);
            let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
            let p = EXP2.iter().rev().fold(0.0, |p, &c| p * r + c) * scale;
            if x[i] > -125.0 { p } else { 0.0 }
        })
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(p: *const u16) -> (Self::V, Self::V) {
        // SAFETY: the trait's contract.
        let words = unsafe { p.cast::<[u32; 4]>().read_unaligned() };
        (words.map(|w| f32::from_bits(w << 16)), words.map(|w| f32::from_bits(w & 0xffff_0000)))
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};
#[cfg(target_arch = "x86_64")]
pub(super) use x86::{dot_bf16, store_bf16};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{EXP2, Lanes};
    use std::arch::x86_64::*;

    /// Eight floats; AVX2 and FMA.
    pub struct Avx2;

    impl Lanes for Avx2 {
        type V = __m256;
        const N: usize = 8;
        const ROWS: usize = 4;
        #[inline(always)]
        unsafe fn splat(x: f32) -> __m256 {
            // SAFETY: the trait's contract, here and below.
            unsafe { _mm256_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> __m256 {
            // SAFETY: as above.
            unsafe { _mm256_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, v: __m256) {
            // SAFETY: as above.
            unsafe { _mm256_storeu_ps(p, v) }
        }
        #[inline(always)]
        unsafe fn add(a: __m256, b: __m256) -> __m256 {
            // SAFETY: as above.
            unsafe { _mm256_add_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn sub(a: __m256, b: __m256) -> __m256 {
            // SAFETY: as above.
            unsafe { _mm256_sub_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn mul(a: __m256, b: __m256) -> __m256 {
            // SAFETY: as above.
            unsafe { _mm256_mul_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn div(a: __m256, b: __m256) -> __m256 {
            // SAFETY: as above.
            unsafe { _mm256_div_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn max(a: __m256, b: __m256) -> __m256 {
            // SAFETY: as above.
            unsafe { _mm256_max_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
            // SAFETY: as above.
            unsafe { _mm256_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        unsafe fn reduce_add(v: __m256) -> f32 {
            // SAFETY: as above.
            unsafe {
                let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
                let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
                _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
            }
        }
        #[inline(always)]
        unsafe fn reduce_max(v: __m256) -> f32 {
            // SAFETY: as above.
            unsafe {
                let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
                let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
                _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)))
            }
        }
        #[inline(always)]
        unsafe fn exp2(x: __m256) -> __m256 {
            // SAFETY: as above.
            unsafe {
                let keep = _mm256_cmp_ps::<_CMP_GT_OQ>(x, _mm256_set1_ps(-125.0));
                let clamped = _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(-125.0)), _mm256_set1_ps(126.0));
                let n = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(clamped);
                let r = _mm256_sub_ps(clamped, n);
                let mut p = _mm256_set1_ps(EXP2[5]);
                for &c in EXP2[..5].iter().rev() {
                    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(c));
                }
                let exponent = _mm256_slli_epi32::<23>(_mm256_cvtps_epi32(n));
                let scale = _mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_set1_epi32(0x3f80_0000)));
                _mm256_and_ps(_mm256_mul_ps(p, scale), keep)
            }
        }
        #[inline(always)]
        unsafe fn load_bf16_pairs(p: *const u16) -> (__m256, __m256) {
            // SAFETY: as above.
            unsafe {
                let words = _mm256_loadu_si256(p.cast());
                let low = _mm256_slli_epi32::<16>(words);
                let high = _mm256_and_si256(words, _mm256_set1_epi32(0xffff_0000_u32 as i32));
                (_mm256_castsi256_ps(low), _mm256_castsi256_ps(high))
            }
        }
    }

    /// Sixteen floats; AVX-512 F.
    pub struct Avx512;

    impl Lanes for Avx512 {
        type V = __m512;
        const N: usize = 16;
        const ROWS: usize = 6;
        #[inline(always)]
        unsafe fn splat(x: f32) -> __m512 {
            // SAFETY: the trait's contract, here and below.
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> __m512 {
            // SAFETY: as above.
            unsafe { _mm512_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, v: __m512) {
            // SAFETY: as above.
            unsafe { _mm512_storeu_ps(p, v) }
        }
        #[inline(always)]
        unsafe fn add(a: __m512, b: __m512) -> __m512 {
            // SAFETY: as above.
            unsafe { _mm512_add_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn sub(a: __m512, b: __m512) -> __m512 {
            // SAFETY: as above.
            unsafe { _mm512_sub_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn mul(a: __m512, b: __m512) -> __m512 {
            // SAFETY: as above.
            unsafe { _mm512_mul_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn div(a: __m512, b: __m512) -> __m512 {
            // SAFETY: as above.
            unsafe { _mm512_div_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn max(a: __m512, b: __m512) -> __m512 {
            // SAFETY: as above.
            unsafe { _mm512_max_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
            // SAFETY: as above.
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        unsafe fn reduce_add(v: __m512) -> f32 {
            // SAFETY: as above.
            unsafe { _mm512_reduce_add_ps(v) }
        }
        #[inline(always)]
        unsafe fn reduce_max(v: __m512) -> f32 {
            // SAFETY: as above.
            unsafe { _mm512_reduce_max_ps(v) }
        }
        #[inline(always)]
        unsafe fn exp2(x: __m512) -> __m512 {
            // SAFETY: as above.
            unsafe {
                let keep = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(x, _mm512_set1_ps(-125.0));
                let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
                let r = _mm512_sub_ps(x, n);
                let mut p = _mm512_set1_ps(EXP2[5]);
                for &c in EXP2[..5].iter().rev() {
                    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
                }
                _mm512_maskz_scalef_ps(keep, p, n)
            }
        }
        #[inline(always)]
        unsafe fn load_bf16_pairs(p: *const u16) -> (__m512, __m512) {
            // SAFETY: as above.
            unsafe {
                let words = _mm512_loadu_si512(p.cast());
                let low = _mm512_slli_epi32::<16>(words);
                let high = _mm512_and_si512(words, _mm512_set1_epi32(0xffff_0000_u32 as i32));
                (_mm512_castsi512_ps(low), _mm512_castsi512_ps(high))
            }
        }
    }

    /// Rounds to bfloat16 (subnormals to zero) and stores.
    ///
    /// # Safety
    /// Needs AVX-512 BF16; `p` is good for sixteen elements.
    #[inline(always)]
    pub unsafe fn store_bf16(p: *mut u16, v: __m512) {
        // SAFETY: the contract; a bit cast between vectors of one size.
        unsafe { _mm256_storeu_si256(p.cast(), std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(v))) }
    }

    /// `sum + a.0 * b.0 + a.1 * b.1` in each of sixteen lanes: `a` is one pair of bfloat16, `b` sixteen.
    ///
    /// # Safety
    /// Needs AVX-512 BF16; `a` is good for two elements.
    #[inline(always)]
    pub unsafe fn dot_bf16(sum: __m512, a: *const u16, b: __m512i) -> __m512 {
        // SAFETY: the contract; bit casts between vectors of one size.
        unsafe {
            let a = _mm512_set1_epi32(a.cast::<i32>().read_unaligned());
            _mm512_dpbf16_ps(sum, std::mem::transmute::<__m512i, __m512bh>(a), std::mem::transmute::<__m512i, __m512bh>(b))
        }
    }
}
