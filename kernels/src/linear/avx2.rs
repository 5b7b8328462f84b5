//! AVX2 with FMA: two vectors hold a panel's 16 features.
//!
//! Integer products take 16-bit activations and weights widened to 16 bits (`vpmaddwd`), which gives the same sums, and so the same
//! bits, as the portable path.

#![allow(clippy::needless_range_loop, reason = "register tiles: the same constant index picks the weight vector and its sums")]

use std::arch::x86_64::*;
use std::ops::Range;

use super::{ActivationKind, ActivationRows, Form, Output, PANEL, PackedMatrix, TileScratch};
use crate::activations::{GROUP, stride};
use crate::packed::INT4_BLOCK;

/// Rows of a block.
const ROWS: usize = 4;

/// # Safety
/// As [`PackedMatrix::run_item`] on a machine with AVX2 and FMA; panels and rows in range.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn run(
    matrix: &PackedMatrix,
    panels: Range<usize>,
    acts: ActivationRows<'_>,
    rows: Range<usize>,
    out: Output<'_>,
    scratch: &mut TileScratch,
) {
    for panel in panels {
        let (form, data) = matrix.panel(panel);
        let weights = if form == Form::Int4 {
            let to = &mut scratch.expanded[..matrix.padded_k() * PANEL];
            expand(data, to);
            to.as_ptr()
        } else {
            data.as_ptr()
        };
        let job = Job { matrix, acts, weights, panel, out };
        let mut row = rows.start;
        while row < rows.end {
            let block = (rows.end - row).min(ROWS);
            // SAFETY: the weights are a whole panel, the rows were set for this matrix.
            unsafe {
                match (matrix.activation_kind(), block) {
                    // Four rows of four sums each would not fit the registers.
                    (ActivationKind::Int, 1) => int::<1>(&job, row),
                    (ActivationKind::Int, 2) => int::<2>(&job, row),
                    (ActivationKind::Int, 3) => {
                        int::<2>(&job, row);
                        int::<1>(&job, row + 2);
                    }
                    (ActivationKind::Int, _) => {
                        int::<2>(&job, row);
                        int::<2>(&job, row + 2);
                    }
                    (ActivationKind::Bf16, 1) => bf16::<1>(&job, row),
                    (ActivationKind::Bf16, 2) => bf16::<2>(&job, row),
                    (ActivationKind::Bf16, 3) => bf16::<3>(&job, row),
                    (ActivationKind::Bf16, _) => bf16::<4>(&job, row),
                    (ActivationKind::F32, 1) => single::<1>(&job, row),
                    (ActivationKind::F32, 2) => single::<2>(&job, row),
                    (ActivationKind::F32, 3) => single::<3>(&job, row),
                    (ActivationKind::F32, _) => single::<4>(&job, row),
                }
            }
            row += block;
        }
    }
}

struct Job<'a> {
    matrix: &'a PackedMatrix,
    acts: ActivationRows<'a>,
    weights: *const u8,
    panel: usize,
    out: Output<'a>,
}

impl Job<'_> {
    /// # Safety
    /// The row was set in a row-major layout of `T`.
    unsafe fn row<T>(&self, row: usize) -> *const T {
        // SAFETY: rows lie `stride(k)` elements apart.
        unsafe { self.acts.values().cast::<T>().add(row * stride(self.matrix.k())) }
    }

    /// # Safety
    /// This item's row.
    #[target_feature(enable = "avx2,fma")]
    unsafe fn put(&self, row: usize, sums: [__m256; 2]) {
        let mut values = [0.0f32; PANEL];
        // SAFETY: 16 values; this item's elements.
        unsafe {
            _mm256_storeu_ps(values.as_mut_ptr(), sums[0]);
            _mm256_storeu_ps(values.as_mut_ptr().add(8), sums[1]);
            for (lane, value) in values.into_iter().enumerate() {
                self.out.put(row, self.panel * PANEL + lane, value);
            }
        }
    }
}

/// As `avx512::expand`, half a panel at a time.
#[target_feature(enable = "avx2")]
fn expand(panel: &[u8], out: &mut [u8]) {
    #[rustfmt::skip]
    let (low, high) = (
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13)),
        _mm256_broadcastsi128_si256(_mm_setr_epi8(2, 3, 2, 3, 6, 7, 6, 7, 10, 11, 10, 11, 14, 15, 14, 15)),
    );
    let nibble = _mm256_set1_epi16(15);
    let upper = _mm256_set1_epi16(0xff00u16.cast_signed());
    for (block, out) in panel.as_chunks::<INT4_BLOCK>().0.iter().zip(out.as_chunks_mut::<512>().0) {
        for half in [0, 32] {
            // SAFETY: half of each of a block's five columns is read, half of each of eight columns of output written.
            unsafe {
                let steps = _mm256_loadu_si256(block.as_ptr().add(half).cast());
                let d = _mm256_shuffle_epi8(steps, low);
                let m = _mm256_shuffle_epi8(steps, high);
                let point = |q: __m256i| _mm256_add_epi16(_mm256_mullo_epi16(q, d), m);
                for eighth in 0..4 {
                    let q = _mm256_loadu_si256(block.as_ptr().add(64 + eighth * 64 + half).cast());
                    let p0 = point(_mm256_and_si256(q, nibble));
                    let p1 = point(_mm256_and_si256(_mm256_srli_epi16::<4>(q), nibble));
                    let p2 = point(_mm256_and_si256(_mm256_srli_epi16::<8>(q), nibble));
                    let p3 = point(_mm256_srli_epi16::<12>(q));
                    let join = |even, odd| _mm256_or_si256(_mm256_srli_epi16::<8>(even), _mm256_and_si256(odd, upper));
                    let to = out.as_mut_ptr().add(eighth * 128 + half);
                    _mm256_storeu_si256(to.cast(), join(p0, p1));
                    _mm256_storeu_si256(to.add(64).cast(), join(p2, p3));
                }
            }
        }
    }
}

/// Exact sums per group, then f32 over groups. A vector of partial sums holds four features, each as two halves.
#[target_feature(enable = "avx2,fma")]
unsafe fn int<const R: usize>(job: &Job<'_>, row: usize) {
    let k = job.matrix.k();
    // SAFETY: the rows were set in the wide layout.
    let x: [*const i64; R] = std::array::from_fn(|r| unsafe { job.row::<i16>(row + r).cast() });
    let offsets: [&[i32]; R] = std::array::from_fn(|r| job.acts.group_offsets(row + r, k));
    let mut sums = [[_mm256_setzero_ps(); 2]; R];
    for group in 0..job.matrix.padded_k() / GROUP {
        let mut partial = [[_mm256_setzero_si256(); 4]; R];
        for quad in group * (GROUP / 4)..(group + 1) * (GROUP / 4) {
            // SAFETY: a quad is 64 bytes of the panel and four values of each row.
            unsafe {
                let x: [__m256i; R] = std::array::from_fn(|r| _mm256_set1_epi64x(x[r].add(quad).read_unaligned()));
                for part in 0..4 {
                    let w = _mm256_cvtepu8_epi16(_mm_loadu_si128(job.weights.add(quad * 64 + part * 16).cast()));
                    for r in 0..R {
                        partial[r][part] = _mm256_add_epi32(partial[r][part], _mm256_madd_epi16(w, x[r]));
                    }
                }
            }
        }
        for r in 0..R {
            let offset = _mm256_set1_epi32(offsets[r][group]);
            for half in 0..2 {
                let pairs = _mm256_hadd_epi32(partial[r][half * 2], partial[r][half * 2 + 1]);
                let exact = _mm256_add_epi32(_mm256_permute4x64_epi64::<0b11_01_10_00>(pairs), offset);
                sums[r][half] = _mm256_add_ps(sums[r][half], _mm256_cvtepi32_ps(exact));
            }
        }
    }
    let scales = job.matrix.panel_scales(job.panel).as_ptr();
    for (r, sums) in sums.iter().enumerate() {
        let unit = _mm256_set1_ps(job.acts.row(row + r).scale);
        // SAFETY: 16 scales; this item's row.
        unsafe {
            let scaled = |half: usize| {
                let scale = _mm256_mul_ps(unit, _mm256_loadu_ps(scales.add(half * 8)));
                _mm256_mul_ps(sums[half], scale)
            };
            job.put(row + r, [scaled(0), scaled(1)]);
        }
    }
}

#[target_feature(enable = "avx2,fma")]
unsafe fn bf16<const R: usize>(job: &Job<'_>, row: usize) {
    // SAFETY: the rows were set in the single layout.
    let x: [*const f32; R] = std::array::from_fn(|r| unsafe { job.row(row + r) });
    let upper = _mm256_set1_epi32(0xffff_0000u32.cast_signed());
    let mut sums = [[_mm256_setzero_ps(); 2]; R];
    for pair in 0..job.matrix.padded_k() / 2 {
        for half in 0..2 {
            // SAFETY: a pair is 64 bytes of the panel and two values of each row, which are padded as the panel is.
            unsafe {
                let w = _mm256_loadu_si256(job.weights.add(pair * 64 + half * 32).cast());
                let even = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(w));
                let odd = _mm256_castsi256_ps(_mm256_and_si256(w, upper));
                for r in 0..R {
                    sums[r][half] = _mm256_fmadd_ps(even, _mm256_set1_ps(*x[r].add(pair * 2)), sums[r][half]);
                    sums[r][half] = _mm256_fmadd_ps(odd, _mm256_set1_ps(*x[r].add(pair * 2 + 1)), sums[r][half]);
                }
            }
        }
    }
    for (r, sums) in sums.into_iter().enumerate() {
        // SAFETY: this item's row.
        unsafe { job.put(row + r, sums) };
    }
}

#[target_feature(enable = "avx2,fma")]
unsafe fn single<const R: usize>(job: &Job<'_>, row: usize) {
    // SAFETY: the rows were set in the single layout.
    let x: [*const f32; R] = std::array::from_fn(|r| unsafe { job.row(row + r) });
    let mut sums = [[_mm256_setzero_ps(); 2]; R];
    for i in 0..job.matrix.k() {
        for half in 0..2 {
            // SAFETY: 16 weights of the panel and one value of each row per input feature.
            unsafe {
                let w = _mm256_loadu_ps(job.weights.cast::<f32>().add(i * PANEL + half * 8));
                for r in 0..R {
                    sums[r][half] = _mm256_fmadd_ps(w, _mm256_set1_ps(*x[r].add(i)), sums[r][half]);
                }
            }
        }
    }
    for (r, sums) in sums.into_iter().enumerate() {
        // SAFETY: this item's row.
        unsafe { job.put(row + r, sums) };
    }
}
