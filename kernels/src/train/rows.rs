//! Operations on rows: norm, rotation, gated activation, and what attention does to a row of scores; each with its derivative.
//!
//! A body is written once over slices and compiled for each instruction level, as in [`crate::cpu::elementwise`].

use std::marker::PhantomData;
use std::ops::Range;

use super::Compute;
use crate::cpu::elementwise::Level;
use crate::cpu::math::{exp, gelu_tanh, silu};
use crate::error::KernelError;
use crate::ops::Store;

/// Rows that a task takes at once.
const TASK_ROWS: usize = 16;
/// Accumulators of a sum.
const LANES: usize = 32;

/// A slice that tasks write by disjoint ranges.
pub(super) struct Shared<'a> {
    start: *mut f32,
    len: usize,
    owner: PhantomData<&'a mut [f32]>,
}

// SAFETY: ranges are handed out by an unsafe function whose callers keep them apart.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    pub fn new(slice: &'a mut [f32]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), owner: PhantomData }
    }

    /// Where element `first` lies; `len` elements from there on exist.
    pub fn at(&self, first: usize, len: usize) -> *mut f32 {
        assert!(first.checked_add(len).is_some_and(|end| end <= self.len));
        // SAFETY: within the slice.
        unsafe { self.start.add(first) }
    }

    /// # Safety
    /// No two ranges that are in use overlap.
    #[allow(clippy::mut_from_ref, reason = "the point of the type: tasks hold disjoint ranges of one slice")]
    pub unsafe fn range(&self, range: Range<usize>) -> &mut [f32] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: within the slice, and exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

/// Equal pieces of every row: whole rows, or heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pieces {
    /// Elements from one row to the next.
    pub stride: usize,
    /// Where in a row the first piece starts.
    pub offset: usize,
    /// Pieces per row.
    pub count: usize,
    /// Elements of a piece.
    pub width: usize,
}

impl Pieces {
    /// One piece per row: the row.
    pub fn rows(width: usize) -> Self {
        Self { stride: width, offset: 0, count: 1, width }
    }

    fn range(&self, row: usize, piece: usize) -> Range<usize> {
        let start = row * self.stride + self.offset + piece * self.width;
        start..start + self.width
    }

    pub(crate) fn fits(&self, rows: usize, len: usize) -> bool {
        self.offset + self.count * self.width <= self.stride && rows.checked_mul(self.stride).is_some_and(|needed| len >= needed)
    }
}

/// Cosines and sines of positions; see [`crate::Ops::load_rope`].
pub struct Rotation {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
    back: Vec<f32>,
}

impl Rotation {
    /// For positions below `positions`: `cos/sin(position * inv_freq[i]) * magnitude`.
    pub fn new(inv_freq: &[f32], magnitude: f32, positions: usize) -> Self {
        let angles =
            (0..positions).flat_map(|position| inv_freq.iter().map(move |f| (position as f64 * f64::from(*f)).sin_cos()));
        let (sin, cos): (Vec<f32>, Vec<f32>) = angles.map(|(s, c)| (s as f32 * magnitude, c as f32 * magnitude)).unzip();
        let back = sin.iter().map(|v| -v).collect();
        Self { half: inv_freq.len(), cos, sin, back }
    }

    /// Half of what is rotated, and the cosines and sines of all positions, `[positions, half]`.
    pub(crate) fn tables(&self) -> (usize, &[f32], &[f32]) {
        (self.half, &self.cos, &self.sin)
    }

    fn at(&self, position: usize, back: bool) -> (&[f32], &[f32]) {
        let range = position * self.half..(position + 1) * self.half;
        let sin = if back { &self.back } else { &self.sin };
        (&self.cos[range.clone()], &sin[range])
    }
}

/// Σ value over the elements of three slices of one length: element `i` goes to accumulator `i mod LANES`, then they are halved pairwise.
/// Arrays, not indices, so that nothing is checked inside the loop.
#[inline(always)]
fn sum([a, b, c]: [&[f32]; 3], value: impl Fn(f32, f32, f32) -> f32) -> f32 {
    let ((a, a_rest), (b, b_rest), (c, c_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>(), c.as_chunks::<LANES>());
    let mut sums = [0f32; LANES];
    for ((a, b), c) in a.iter().zip(b).zip(c) {
        for lane in 0..LANES {
            sums[lane] += value(a[lane], b[lane], c[lane]);
        }
    }
    for (((sum, a), b), c) in sums.iter_mut().zip(a_rest).zip(b_rest).zip(c_rest) {
        *sum += value(*a, *b, *c);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            sums[i] += sums[i + width];
        }
        width /= 2;
    }
    sums[0]
}

/// Returns `1 / sqrt(mean(x²) + eps)`.
#[inline(always)]
fn rms_norm_body(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) -> f32 {
    let x = &x[..out.len()];
    let inverse = 1.0 / (sum([x, x, x], |x, _, _| x * x) / x.len() as f32 + eps).sqrt();
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * inverse * weight;
    }
    inverse
}

/// With r the inverse root and g = dy ∘ w: dx = r g − x r³ mean(g ∘ x).
#[inline(always)]
fn rms_norm_back_body(x: &[f32], weight: &[f32], inverse: f32, dy: &[f32], add: bool, dx: &mut [f32]) {
    let n = dx.len();
    let (x, weight, dy) = (&x[..n], &weight[..n], &dy[..n]);
    let along = sum([dy, weight, x], |dy, weight, x| dy * weight * x) / n as f32 * inverse * inverse * inverse;
    for i in 0..n {
        let value = inverse * dy[i] * weight[i] - x[i] * along;
        dx[i] = if add { dx[i] + value } else { value };
    }
}

/// d silu(g)·u: with s = σ(g), dg = dy u s (1 + g (1 − s)) and du = dy g s.
#[inline(always)]
fn silu_mul_back_body(gate: &[f32], up: &[f32], dy: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
    let n = dy.len();
    let (gate, up, dgate, dup) = (&gate[..n], &up[..n], &mut dgate[..n], &mut dup[..n]);
    for i in 0..n {
        let s = 1.0 / (1.0 + exp(-gate[i]));
        dgate[i] = dy[i] * up[i] * s * (1.0 + gate[i] * (1.0 - s));
        dup[i] = dy[i] * silu(gate[i]);
    }
}

/// d gelu(g)·u: with s = σ(2v) and v = √(2/π) (g + 0.044715 g³), dg = dy u (s + g s (1 − s) 2v') and du = dy g s.
#[inline(always)]
fn gelu_mul_back_body(gate: &[f32], up: &[f32], dy: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
    const SLOPE: f32 = 1.595_769;
    let n = dy.len();
    let (gate, up, dgate, dup) = (&gate[..n], &up[..n], &mut dgate[..n], &mut dup[..n]);
    for i in 0..n {
        // Beyond this s is 0 or 1, and g² would come to be infinite.
        let g = gate[i].clamp(-30.0, 30.0);
        let s = 1.0 / (1.0 + exp(-SLOPE * (g + 0.044_715 * g * g * g)));
        dgate[i] = dy[i] * up[i] * (s + g * s * (1.0 - s) * SLOPE * (1.0 + 3.0 * 0.044_715 * g * g));
        dup[i] = dy[i] * gelu_tanh(gate[i]);
    }
}

#[inline(always)]
fn largest(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = x.chunks_exact(LANES);
    for (lane, v) in lanes.iter_mut().zip(chunks.remainder()) {
        *lane = if *v > *lane { *v } else { *lane };
    }
    for chunk in chunks {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane = if *v > *lane { *v } else { *lane };
        }
    }
    lanes.into_iter().fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a })
}

/// Scores become probabilities; returns log Σ exp.
#[inline(always)]
fn softmax_body(scores: &mut [f32]) -> f32 {
    let max = largest(scores);
    for score in scores.iter_mut() {
        *score = exp(*score - max);
    }
    let total = sum([scores, scores, scores], |score, _, _| score);
    let inverse = 1.0 / total;
    for score in scores.iter_mut() {
        *score *= inverse;
    }
    max + total.ln()
}

/// Scores become probabilities by their known log Σ exp, and `dp` (derivatives along probabilities) the derivatives along scores.
#[inline(always)]
fn softmax_back_body(scores: &mut [f32], lse: f32, inner: f32, dp: &mut [f32]) {
    for (score, dp) in scores.iter_mut().zip(dp) {
        *score = exp(*score - lse);
        *dp = *score * (*dp - inner);
    }
}

/// One more piece of a row of logits: (largest so far, Σ exp relative to it) → the same with the piece.
#[inline(always)]
fn log_sum_body(logits: &[f32], so_far: (f32, f32)) -> (f32, f32) {
    let max = largest(logits);
    let max = if so_far.0 > max { so_far.0 } else { max };
    let total = sum([logits, logits, logits], |logit, _, _| exp(logit - max));
    (max, total + so_far.1 * exp(so_far.0 - max))
}

/// [`log_sum_body`], and the logits become their exponentials relative to the largest so far.
#[inline(always)]
fn exp_sum_body(logits: &mut [f32], so_far: (f32, f32)) -> (f32, f32) {
    let max = largest(logits);
    let max = if so_far.0 > max { so_far.0 } else { max };
    for logit in logits.iter_mut() {
        *logit = exp(*logit - max);
    }
    let logits = &*logits;
    (max, sum([logits, logits, logits], |p, _, _| p) + so_far.1 * exp(so_far.0 - max))
}

/// Logits become their probabilities by their known log Σ exp, times a factor.
#[inline(always)]
fn exp_scale_body(logits: &mut [f32], lse: f32, factor: f32) {
    for logit in logits.iter_mut() {
        *logit = exp(*logit - lse) * factor;
    }
}

#[inline(always)]
fn scale_body(x: &mut [f32], factor: f32) {
    x.iter_mut().for_each(|x| *x *= factor);
}

#[inline(always)]
fn dot_body(a: &[f32], b: &[f32]) -> f32 {
    sum([a, b, a], |a, b, _| a * b)
}

macro_rules! instantiate {
    ($name:ident, $safety:literal $(, $feature:literal)?) => {
        mod $name {
            instantiate!(@one $safety ($($feature)?) rms_norm = rms_norm_body(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) -> f32);
            instantiate!(@one $safety ($($feature)?) rms_norm_back = rms_norm_back_body(
                x: &[f32], weight: &[f32], inverse: f32, dy: &[f32], add: bool, dx: &mut [f32]) -> ());
            instantiate!(@one $safety ($($feature)?) silu_mul_back = silu_mul_back_body(
                gate: &[f32], up: &[f32], dy: &[f32], dgate: &mut [f32], dup: &mut [f32]) -> ());
            instantiate!(@one $safety ($($feature)?) gelu_mul_back = gelu_mul_back_body(
                gate: &[f32], up: &[f32], dy: &[f32], dgate: &mut [f32], dup: &mut [f32]) -> ());
            instantiate!(@one $safety ($($feature)?) softmax = softmax_body(scores: &mut [f32]) -> f32);
            instantiate!(@one $safety ($($feature)?) softmax_back = softmax_back_body(
                scores: &mut [f32], lse: f32, inner: f32, dp: &mut [f32]) -> ());
            instantiate!(@one $safety ($($feature)?) log_sum = log_sum_body(logits: &[f32], so_far: (f32, f32)) -> (f32, f32));
            instantiate!(@one $safety ($($feature)?) exp_sum = exp_sum_body(
                logits: &mut [f32], so_far: (f32, f32)) -> (f32, f32));
            instantiate!(@one $safety ($($feature)?) exp_scale = exp_scale_body(logits: &mut [f32], lse: f32, factor: f32) -> ());
            instantiate!(@one $safety ($($feature)?) scale = scale_body(x: &mut [f32], factor: f32) -> ());
            instantiate!(@one $safety ($($feature)?) dot = dot_body(a: &[f32], b: &[f32]) -> f32);
        }
    };
    (@one $safety:literal ($($feature:literal)?) $name:ident = $body:ident($($arg:ident: $type:ty),*) -> $result:ty) => {
        #[doc = $safety]
        $(#[target_feature(enable = $feature)])?
        pub unsafe fn $name($($arg: $type),*) -> $result {
            super::$body($($arg),*)
        }
    };
}

instantiate!(portable, "# Safety\nRuns anywhere.");
#[cfg(target_arch = "x86_64")]
instantiate!(avx2, "# Safety\nThe processor has AVX2 and FMA.", "avx2,fma");
#[cfg(target_arch = "x86_64")]
instantiate!(avx512, "# Safety\nThe processor has AVX-512 F, VL, BW and DQ.", "avx512f,avx512vl,avx512bw,avx512dq,fma");

/// Calls the instantiation for a level.
macro_rules! dispatch {
    ($level:expr, $name:ident($($arg:expr),*)) => {
        // SAFETY: levels are made from what the processor has.
        unsafe {
            match $level {
                #[cfg(target_arch = "x86_64")]
                Level::Avx512 => avx512::$name($($arg),*),
                #[cfg(target_arch = "x86_64")]
                Level::Avx2 => avx2::$name($($arg),*),
                _ => portable::$name($($arg),*),
            }
        }
    };
}

/// Row functions of the processor; the level must be one that it has.
#[derive(Clone, Copy)]
pub(super) struct RowOps(pub Level);

impl RowOps {
    pub fn softmax(self, scores: &mut [f32]) -> f32 {
        dispatch!(self.0, softmax(scores))
    }

    pub fn softmax_back(self, scores: &mut [f32], lse: f32, inner: f32, dp: &mut [f32]) {
        dispatch!(self.0, softmax_back(scores, lse, inner, dp))
    }

    pub fn log_sum(self, logits: &[f32], so_far: (f32, f32)) -> (f32, f32) {
        dispatch!(self.0, log_sum(logits, so_far))
    }

    pub fn exp_sum(self, logits: &mut [f32], so_far: (f32, f32)) -> (f32, f32) {
        dispatch!(self.0, exp_sum(logits, so_far))
    }

    pub fn exp_scale(self, logits: &mut [f32], lse: f32, factor: f32) {
        dispatch!(self.0, exp_scale(logits, lse, factor))
    }

    pub fn scale(self, x: &mut [f32], factor: f32) {
        dispatch!(self.0, scale(x, factor))
    }

    pub fn dot(self, a: &[f32], b: &[f32]) -> f32 {
        dispatch!(self.0, dot(a, b))
    }
}

fn fits(op: &'static str, fits: bool) -> Result<(), KernelError> {
    if fits { Ok(()) } else { Err(KernelError::Shape { op, detail: "operands do not fit together".to_owned() }) }
}

impl Compute {
    /// Runs `work` for every row of `rows`, a few at a time.
    pub(super) fn each_row(&mut self, rows: usize, work: impl Fn(usize) + Sync) -> Result<(), KernelError> {
        self.threads.run(&[rows.div_ceil(TASK_ROWS)], |_, task, _| {
            (task * TASK_ROWS..((task + 1) * TASK_ROWS).min(rows)).for_each(&work);
        })
    }

    /// `out = x / sqrt(mean(x²) + eps) * weight` for every piece of every row (Zhang & Sennrich 2019). `x` and `out` have one layout;
    /// `inverse [rows, pieces]` gets `1 / sqrt(…)`, which the derivative needs.
    pub fn rms_norm(
        &mut self,
        x: &[f32],
        pieces: Pieces,
        weight: &[f32],
        eps: f32,
        out: &mut [f32],
        inverse: &mut [f32],
    ) -> Result<(), KernelError> {
        let rows = inverse.len() / pieces.count.max(1);
        let sizes =
            pieces.fits(rows, x.len().min(out.len())) && weight.len() == pieces.width && inverse.len() == rows * pieces.count;
        fits("rms_norm", sizes)?;
        let (level, out, inverse) = (self.rows.0, Shared::new(out), Shared::new(inverse));
        self.each_row(rows, |row| {
            for piece in 0..pieces.count {
                let range = pieces.range(row, piece);
                // SAFETY: pieces are disjoint.
                let (out, inverse) = unsafe {
                    (out.range(range.clone()), inverse.range(row * pieces.count + piece..row * pieces.count + piece + 1))
                };
                inverse[0] = dispatch!(level, rms_norm(&x[range], weight, eps, out));
            }
        })
    }

    /// The derivative of [`Self::rms_norm`] along `x`, stored to or added to `dx`; all in one layout.
    pub fn rms_norm_back(
        &mut self,
        x: &[f32],
        pieces: Pieces,
        weight: &[f32],
        inverse: &[f32],
        dy: &[f32],
        dx: &mut [f32],
        store: Store,
    ) -> Result<(), KernelError> {
        let rows = inverse.len() / pieces.count.max(1);
        let sizes = pieces.fits(rows, x.len().min(dy.len()).min(dx.len())) && weight.len() == pieces.width;
        fits("rms_norm_back", sizes && inverse.len() == rows * pieces.count)?;
        let (level, dx) = (self.rows.0, Shared::new(dx));
        self.each_row(rows, |row| {
            for piece in 0..pieces.count {
                let range = pieces.range(row, piece);
                // SAFETY: pieces are disjoint.
                let dx = unsafe { dx.range(range.clone()) };
                let inverse = inverse[row * pieces.count + piece];
                dispatch!(level, rms_norm_back(&x[range.clone()], weight, inverse, &dy[range], store == Store::Add, dx));
            }
        })
    }

    /// The derivative of [`Self::rms_norm`] along its weight, added to `dweight [width]`.
    pub fn rms_norm_back_weight(
        &mut self,
        x: &[f32],
        pieces: Pieces,
        inverse: &[f32],
        dy: &[f32],
        dweight: &mut [f32],
    ) -> Result<(), KernelError> {
        let rows = inverse.len() / pieces.count.max(1);
        fits("rms_norm_back_weight", pieces.fits(rows, x.len().min(dy.len())) && dweight.len() == pieces.width)?;
        let dweight = Shared::new(dweight);
        // Columns are shared out, so that a sum is always made in the order of the rows.
        self.each_row(pieces.width, |column| {
            // SAFETY: one element per call.
            let sum = unsafe { dweight.range(column..column + 1) };
            for row in 0..rows {
                for piece in 0..pieces.count {
                    let at = pieces.range(row, piece).start + column;
                    sum[0] += dy[at] * x[at] * inverse[row * pieces.count + piece];
                }
            }
        })
    }

    /// Rotates each piece (a head) of row `r` by position `positions[r]`, in place; with `back` by the opposite angle, which is the
    /// derivative.
    pub fn rotate(
        &mut self,
        x: &mut [f32],
        pieces: Pieces,
        rotation: &Rotation,
        positions: &[u32],
        back: bool,
    ) -> Result<(), KernelError> {
        let known = rotation.cos.len() / rotation.half.max(1);
        let sizes = pieces.fits(positions.len(), x.len()) && 2 * rotation.half <= pieces.width;
        fits("rotate", sizes && positions.iter().all(|p| (*p as usize) < known))?;
        let (elementwise, x) = (self.elementwise, Shared::new(x));
        self.each_row(positions.len(), |row| {
            let (cos, sin) = rotation.at(positions[row] as usize, back);
            let first = pieces.range(row, 0).start;
            // SAFETY: rows are disjoint.
            let heads = unsafe { x.range(first..first + pieces.count * pieces.width) };
            elementwise.rope(heads, pieces.width, None, cos, sin);
        })
    }

    /// `out [rows, w] = silu(gate) * up` of `gate_up [rows, 2w]`.
    pub fn silu_mul(&mut self, gate_up: &[f32], width: usize, out: &mut [f32]) -> Result<(), KernelError> {
        let rows = out.len() / width.max(1);
        fits("silu_mul", out.len() == rows * width && gate_up.len() == 2 * out.len())?;
        let (elementwise, out) = (self.elementwise, Shared::new(out));
        self.each_row(rows, |row| {
            let (gate, up) = gate_up[row * 2 * width..][..2 * width].split_at(width);
            // SAFETY: rows are disjoint.
            elementwise.silu_and_mul(gate, up, unsafe { out.range(row * width..(row + 1) * width) });
        })
    }

    /// `out [rows, w] = gelu(gate) * up` of `gate_up [rows, 2w]`, by the formula with tanh.
    pub fn gelu_mul(&mut self, gate_up: &[f32], width: usize, out: &mut [f32]) -> Result<(), KernelError> {
        let rows = out.len() / width.max(1);
        fits("gelu_mul", out.len() == rows * width && gate_up.len() == 2 * out.len())?;
        let (elementwise, out) = (self.elementwise, Shared::new(out));
        self.each_row(rows, |row| {
            let (gate, up) = gate_up[row * 2 * width..][..2 * width].split_at(width);
            // SAFETY: rows are disjoint.
            elementwise.gelu_tanh_and_mul(gate, up, unsafe { out.range(row * width..(row + 1) * width) });
        })
    }

    /// The derivative of [`Self::gelu_mul`]: `dgate_up [rows, 2w]` from `dy [rows, w]`.
    pub fn gelu_mul_back(&mut self, gate_up: &[f32], width: usize, dy: &[f32], dgate_up: &mut [f32]) -> Result<(), KernelError> {
        let rows = dy.len() / width.max(1);
        fits("gelu_mul_back", dy.len() == rows * width && gate_up.len() == 2 * dy.len() && dgate_up.len() == 2 * dy.len())?;
        let (level, out) = (self.rows.0, Shared::new(dgate_up));
        self.each_row(rows, |row| {
            let (gate, up) = gate_up[row * 2 * width..][..2 * width].split_at(width);
            // SAFETY: rows are disjoint.
            let (dgate, dup) = unsafe { out.range(row * 2 * width..(row + 1) * 2 * width) }.split_at_mut(width);
            dispatch!(level, gelu_mul_back(gate, up, &dy[row * width..][..width], dgate, dup));
        })
    }

    /// The derivative of [`Self::silu_mul`]: `dgate_up [rows, 2w]` from `dy [rows, w]`.
    pub fn silu_mul_back(&mut self, gate_up: &[f32], width: usize, dy: &[f32], dgate_up: &mut [f32]) -> Result<(), KernelError> {
        let rows = dy.len() / width.max(1);
        fits("silu_mul_back", dy.len() == rows * width && gate_up.len() == 2 * dy.len() && dgate_up.len() == 2 * dy.len())?;
        let (level, out) = (self.rows.0, Shared::new(dgate_up));
        self.each_row(rows, |row| {
            let (gate, up) = gate_up[row * 2 * width..][..2 * width].split_at(width);
            // SAFETY: rows are disjoint.
            let (dgate, dup) = unsafe { out.range(row * 2 * width..(row + 1) * 2 * width) }.split_at_mut(width);
            dispatch!(level, silu_mul_back(gate, up, &dy[row * width..][..width], dgate, dup));
        })
    }
}
