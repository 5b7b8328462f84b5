//! AVX-512 with VNNI: one vector holds a panel's 16 features.
//!
//! A block is up to [`ROWS`] rows times two panels, its sums in registers over all of `k`. A sum's order of additions is that of `k`,
//! whatever the block's shape, so a row's result is the same in every block.

use std::arch::x86_64::*;
use std::ops::Range;

use super::{ActivationKind, ActivationRows, Form, Output, PANEL, PackedMatrix, TileScratch};
use crate::activations::{GROUP, stride};
use crate::packed::INT4_BLOCK;

/// Rows of a block.
const ROWS: usize = 6;

/// Calls `$function::<R, P>` for a row count and panel count known at run time.
macro_rules! by_shape {
    ($rows:expr, $panels:expr, $function:ident($($arg:expr),*)) => {
        match ($rows, $panels) {
            (1, 1) => $function::<1, 1>($($arg),*),
            (2, 1) => $function::<2, 1>($($arg),*),
            (3, 1) => $function::<3, 1>($($arg),*),
            (4, 1) => $function::<4, 1>($($arg),*),
            (5, 1) => $function::<5, 1>($($arg),*),
            (_, 1) => $function::<6, 1>($($arg),*),
            (1, _) => $function::<1, 2>($($arg),*),
            (2, _) => $function::<2, 2>($($arg),*),
            (3, _) => $function::<3, 2>($($arg),*),
            (4, _) => $function::<4, 2>($($arg),*),
            (5, _) => $function::<5, 2>($($arg),*),
            (_, _) => $function::<6, 2>($($arg),*),
        }
    };
}

/// # Safety
/// As [`PackedMatrix::run_item`] on a machine with AVX-512 VNNI; panels and rows in range.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) unsafe fn run(
    matrix: &PackedMatrix,
    panels: Range<usize>,
    acts: ActivationRows<'_>,
    rows: Range<usize>,
    out: Output<'_>,
    scratch: &mut TileScratch,
) {
    let mut first = panels.start;
    while first < panels.end {
        let count = (panels.end - first).min(2);
        let mut weights = [std::ptr::null::<u8>(); 2];
        for (i, weights) in weights.iter_mut().enumerate().take(count) {
            let (form, data) = matrix.panel(first + i);
            *weights = if form == Form::Int4 {
                let to = &mut scratch.expanded[i * matrix.padded_k() * PANEL..][..matrix.padded_k() * PANEL];
                expand(data, to);
                to.as_ptr()
            } else {
                data.as_ptr()
            };
        }
        let job = Job { matrix, acts, weights, first, out };
        let mut row = rows.start;
        while row < rows.end {
            let block = (rows.end - row).min(ROWS);
            // SAFETY: the weights are whole panels, the rows were set for this matrix.
            unsafe {
                match matrix.activation_kind() {
                    ActivationKind::Int => by_shape!(block, count, int(&job, row)),
                    ActivationKind::Bf16 => by_shape!(block, count, bf16(&job, row)),
                    ActivationKind::F32 => by_shape!(block, count, single(&job, row)),
                }
            }
            row += block;
        }
        first += count;
    }
}

struct Job<'a> {
    matrix: &'a PackedMatrix,
    acts: ActivationRows<'a>,
    weights: [*const u8; 2],
    /// First panel.
    first: usize,
    out: Output<'a>,
}

/// Where one panel's results go.
pub(super) struct PanelOutput {
    /// The panel's first feature of row 0.
    at: *mut f32,
    stride: usize,
    /// Features below n.
    mask: __mmask16,
    /// Zeros without a bias.
    pub(super) bias: __m512,
}

impl Output<'_> {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    pub(super) fn panel(&self, panel: usize) -> PanelOutput {
        let first = panel * PANEL;
        let mask: __mmask16 = if self.n - first >= PANEL { 0xffff } else { (1 << (self.n - first)) - 1 };
        // SAFETY: `first < n`; the masked load touches only features below n.
        let (at, bias) = unsafe {
            let bias = self.bias.map_or(_mm512_setzero_ps(), |b| _mm512_maskz_loadu_ps(mask, b.as_ptr().add(first)));
            (self.out.add(first), bias)
        };
        PanelOutput { at, stride: self.stride, mask, bias }
    }
}

impl PanelOutput {
    /// Stores a row's results, or adds them.
    ///
    /// # Safety
    /// The row is one of the output and nobody else writes these elements.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    pub(super) unsafe fn put<const ADD: bool>(&self, row: usize, mut value: __m512) {
        // SAFETY: masked loads and stores touch only features below n.
        unsafe {
            let at = self.at.add(row * self.stride);
            if ADD {
                value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(self.mask, at));
            }
            _mm512_mask_storeu_ps(at, self.mask, value);
        }
    }
}

/// D and M of a block, each in both 16-bit lanes of its feature.
pub(super) struct Steps {
    d: __m512i,
    m: __m512i,
}

impl Steps {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    pub(super) fn of(block: &[u8; INT4_BLOCK]) -> Steps {
        #[rustfmt::skip]
        let (low, high) = (
            _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13)),
            _mm512_broadcast_i32x4(_mm_setr_epi8(2, 3, 2, 3, 6, 7, 6, 7, 10, 11, 10, 11, 14, 15, 14, 15)),
        );
        // SAFETY: the block starts with 64 bytes of steps.
        let steps = unsafe { _mm512_loadu_si512(block.as_ptr().cast()) };
        Steps { d: _mm512_shuffle_epi8(steps, low), m: _mm512_shuffle_epi8(steps, high) }
    }

    /// Two quads of input features: per 16-bit lane `(nibble * D + M) >> 8`, then pairs of lanes' results joined to bytes.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    pub(super) fn expand(&self, block: &[u8; INT4_BLOCK], eighth: usize) -> [__m512i; 2] {
        let nibble = _mm512_set1_epi16(15);
        // SAFETY: four columns of 64 bytes follow the steps.
        let q = unsafe { _mm512_loadu_si512(block.as_ptr().add(64 + (eighth & 3) * 64).cast()) };
        let point = |q: __m512i| _mm512_add_epi16(_mm512_mullo_epi16(q, self.d), self.m);
        let p0 = point(_mm512_and_si512(q, nibble));
        let p1 = point(_mm512_and_si512(_mm512_srli_epi16::<4>(q), nibble));
        let p2 = point(_mm512_and_si512(_mm512_srli_epi16::<8>(q), nibble));
        let p3 = point(_mm512_srli_epi16::<12>(q));
        let join = |even, odd| _mm512_mask_mov_epi8(_mm512_srli_epi16::<8>(even), 0xaaaa_aaaa_aaaa_aaaa, odd);
        [join(p0, p1), join(p2, p3)]
    }
}

/// Expands a 4-bit panel to `[k / 4][16][4]`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) fn expand(panel: &[u8], out: &mut [u8]) {
    for (block, out) in panel.as_chunks::<INT4_BLOCK>().0.iter().zip(out.as_chunks_mut::<512>().0) {
        let steps = Steps::of(block);
        for (eighth, out) in out.as_chunks_mut::<128>().0.iter_mut().enumerate() {
            let [even, odd] = steps.expand(block, eighth);
            // SAFETY: two vectors of output.
            unsafe {
                _mm512_storeu_si512(out.as_mut_ptr().cast(), even);
                _mm512_storeu_si512(out.as_mut_ptr().add(64).cast(), odd);
            }
        }
    }
}

/// Exact sums per group of 64, scaled by the group and added in f32.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn int<const R: usize, const P: usize>(job: &Job<'_>, row: usize) {
    let k = job.matrix.k();
    let groups = job.matrix.padded_k() / GROUP;
    let x: [*const i32; R] =
        // SAFETY: rows lie `stride(k)` bytes apart.
        std::array::from_fn(|r| unsafe { job.acts.values().add((row + r) * stride(k)).cast() });
    let scales: [*const f32; R] = std::array::from_fn(|r| job.acts.group_scales(row + r, k).as_ptr());
    let offsets: [*const i32; R] = std::array::from_fn(|r| job.acts.group_offsets(row + r, k).as_ptr());
    let mut sums = [[_mm512_setzero_ps(); P]; R];
    for group in 0..groups {
        // SAFETY: a group is 64 values of each row and 16 vectors of each panel.
        unsafe {
            let mut partial: [[__m512i; P]; R] = std::array::from_fn(|r| [_mm512_set1_epi32(*offsets[r].add(group)); P]);
            for quad in 0..GROUP / 4 {
                let at = group * (GROUP / 4) + quad;
                let w: [__m512i; P] = std::array::from_fn(|p| _mm512_loadu_si512(job.weights[p].add(at * 64).cast()));
                for r in 0..R {
                    let x = _mm512_set1_epi32(x[r].add(at).read_unaligned());
                    for p in 0..P {
                        partial[r][p] = _mm512_dpbusd_epi32(partial[r][p], w[p], x);
                    }
                }
            }
            for r in 0..R {
                let scale = _mm512_set1_ps(*scales[r].add(group));
                for p in 0..P {
                    sums[r][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(partial[r][p]), scale, sums[r][p]);
                }
            }
        }
    }
    for p in 0..P {
        // SAFETY: 16 scales per panel.
        let scales = unsafe { _mm512_loadu_ps(job.matrix.panel_scales(job.first + p).as_ptr()) };
        for sums in &mut sums {
            sums[p] = _mm512_mul_ps(sums[p], scales);
        }
    }
    // SAFETY: this block's elements.
    unsafe { put(job, row, &sums) }
}

/// bf16 weights widened to f32, in pairs of input features.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn bf16<const R: usize, const P: usize>(job: &Job<'_>, row: usize) {
    let k = job.matrix.k();
    let x: [*const f32; R] =
        // SAFETY: rows lie `stride(k)` values apart.
        std::array::from_fn(|r| unsafe { job.acts.values().cast::<f32>().add((row + r) * stride(k)) });
    let upper = _mm512_set1_epi32(0xffff_0000u32.cast_signed());
    let mut sums = [[_mm512_setzero_ps(); P]; R];
    for pair in 0..job.matrix.padded_k() / 2 {
        // SAFETY: a pair is one vector of each panel and two values of each row, which are padded as the panels are.
        unsafe {
            let w: [__m512i; P] = std::array::from_fn(|p| _mm512_loadu_si512(job.weights[p].add(pair * 64).cast()));
            let even = w.map(|w| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(w)));
            let odd = w.map(|w| _mm512_castsi512_ps(_mm512_and_si512(w, upper)));
            for r in 0..R {
                let (x0, x1) = (_mm512_set1_ps(*x[r].add(pair * 2)), _mm512_set1_ps(*x[r].add(pair * 2 + 1)));
                for p in 0..P {
                    sums[r][p] = _mm512_fmadd_ps(even[p], x0, sums[r][p]);
                    sums[r][p] = _mm512_fmadd_ps(odd[p], x1, sums[r][p]);
                }
            }
        }
    }
    // SAFETY: this block's elements.
    unsafe { put(job, row, &sums) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn single<const R: usize, const P: usize>(job: &Job<'_>, row: usize) {
    let k = job.matrix.k();
    let x: [*const f32; R] =
        // SAFETY: rows lie `stride(k)` values apart.
        std::array::from_fn(|r| unsafe { job.acts.values().cast::<f32>().add((row + r) * stride(k)) });
    let mut sums = [[_mm512_setzero_ps(); P]; R];
    for i in 0..k {
        // SAFETY: one vector of each panel and one value of each row per input feature.
        unsafe {
            let w: [__m512; P] = std::array::from_fn(|p| _mm512_loadu_ps(job.weights[p].cast::<f32>().add(i * PANEL)));
            for r in 0..R {
                let x = _mm512_set1_ps(*x[r].add(i));
                for p in 0..P {
                    sums[r][p] = _mm512_fmadd_ps(w[p], x, sums[r][p]);
                }
            }
        }
    }
    // SAFETY: this block's elements.
    unsafe { put(job, row, &sums) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn put<const R: usize, const P: usize>(job: &Job<'_>, row: usize, sums: &[[__m512; P]; R]) {
    for p in 0..P {
        let to = job.out.panel(job.first + p);
        for (r, sums) in sums.iter().enumerate() {
            let value = _mm512_add_ps(sums[p], to.bias);
            // SAFETY: the caller's elements.
            unsafe { if job.out.add { to.put::<true>(row + r, value) } else { to.put::<false>(row + r, value) } }
        }
    }
}
