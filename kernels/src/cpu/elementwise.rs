//! Operations on single rows: norms, the activations, the rotation of queries and keys.
//!
//! Each body is written once over slices, with a fixed number of accumulators, and compiled three times: for AVX-512, for AVX2
//! with FMA, and for the baseline. A row is always computed by the same instructions in the same order, so its result depends
//! neither on its neighbours nor on the thread.

use super::attention::bf16;
use super::math::{gelu, gelu_tanh, silu, tanh};

/// Accumulators of a sum: four vectors of AVX-512, so that additions overlap.
const LANES: usize = 64;

/// `a * b + c`, fused where the instruction exists; the software version of a fused multiply-add would cost hundreds of cycles.
#[inline(always)]
fn mul_add<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// A sum in a fixed order: `add` takes element `i` into accumulator `i mod 64`, then the accumulators are halved pairwise.
#[inline(always)]
fn sum_by(x: &[f32], add: impl Fn(f32, f32) -> f32) -> f32 {
    let mut sums = [0f32; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (sum, &v) in sums.iter_mut().zip(chunk) {
            *sum = add(*sum, v);
        }
    }
    for (sum, &v) in sums.iter_mut().zip(rest) {
        *sum = add(*sum, v);
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

#[inline(always)]
fn sum_of_squares<const FMA: bool>(x: &[f32]) -> f32 {
    sum_by(x, |sum, v| mul_add::<FMA>(v, v, sum))
}

#[inline(always)]
fn rms_norm_body<const FMA: bool>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let scale = 1.0 / (sum_of_squares::<FMA>(x) / x.len() as f32 + eps).sqrt();
    for ((o, &v), &w) in out.iter_mut().zip(x).zip(weight) {
        *o = v * scale * w;
    }
}

#[inline(always)]
fn rms_norm_add_body<const FMA: bool>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let scale = 1.0 / (sum_of_squares::<FMA>(x) / x.len() as f32 + eps).sqrt();
    for ((o, &v), &w) in out.iter_mut().zip(x).zip(weight) {
        *o = mul_add::<FMA>(v * scale, w, *o);
    }
}

#[inline(always)]
fn layer_norm_body<const FMA: bool>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let mean = sum_by(x, |sum, v| sum + v) / x.len() as f32;
    // Squares of differences: those of the numbers themselves would cancel where the mean is large.
    let variance = sum_by(x, |sum, v| mul_add::<FMA>(v - mean, v - mean, sum)) / x.len() as f32;
    let scale = 1.0 / (variance + eps).sqrt();
    for ((o, &v), &w) in out.iter_mut().zip(x).zip(weight) {
        *o = (v - mean) * scale * w;
    }
}

#[inline(always)]
fn norm_in_place<const FMA: bool>(x: &mut [f32], weight: &[f32], eps: f32) {
    let scale = 1.0 / (sum_of_squares::<FMA>(x) / x.len() as f32 + eps).sqrt();
    for (v, &w) in x.iter_mut().zip(weight) {
        *v = *v * scale * w;
    }
}

#[inline(always)]
fn silu_and_mul_body(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((o, &g), &u) in out.iter_mut().zip(gate).zip(up) {
        *o = silu(g) * u;
    }
}

#[inline(always)]
fn gelu_tanh_and_mul_body(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((o, &g), &u) in out.iter_mut().zip(gate).zip(up) {
        *o = gelu_tanh(g) * u;
    }
}

#[inline(always)]
fn soft_cap_body(x: &mut [f32], cap: f32) {
    for v in x {
        // What is no number would come out as one.
        let capped = cap * tanh(*v / cap);
        *v = if v.is_nan() { *v } else { capped };
    }
}

#[inline(always)]
fn gelu_body(x: &[f32], out: &mut [f32]) {
    for (o, &v) in out.iter_mut().zip(x) {
        *o = gelu(v);
    }
}

#[inline(always)]
fn add_scaled_body<const FMA: bool>(x: &[f32], scale: f32, out: &mut [f32]) {
    for (o, &v) in out.iter_mut().zip(x) {
        *o = mul_add::<FMA>(v, scale, *o);
    }
}

/// The per-head norm: weight `[head_dim]` and epsilon.
pub type HeadNorm<'a> = Option<(&'a [f32], f32)>;

/// `heads` is a whole number of heads of `head_dim`; `cos` and `sin` have one entry per rotated pair.
#[inline(always)]
fn rope_body<const FMA: bool>(heads: &mut [f32], head_dim: usize, norm: HeadNorm<'_>, cos: &[f32], sin: &[f32]) {
    let half = cos.len();
    for head in heads.chunks_exact_mut(head_dim) {
        if let Some((weight, eps)) = norm {
            norm_in_place::<FMA>(head, weight, eps);
        }
        let (low, high) = head.split_at_mut(half);
        for (((a, b), &c), &s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
            let (x, y) = (*a, *b);
            *a = mul_add::<FMA>(x, c, -(y * s));
            *b = mul_add::<FMA>(y, c, x * s);
        }
    }
}

/// Nearest bfloat16, ties to even.
#[inline(always)]
fn round_bf16_body(x: &[f32], out: &mut [u16]) {
    for (o, &v) in out.iter_mut().zip(x) {
        *o = bf16(v);
    }
}

macro_rules! instantiate {
    ($name:ident, $fma:literal, $safety:literal $(, $feature:literal)?) => {
        mod $name {
            use super::HeadNorm;
            #[doc = $safety]
            $(#[target_feature(enable = $feature)])?
            pub unsafe fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
                super::rms_norm_body::<$fma>(x, weight, eps, out);
            }
            #[doc = $safety]
            $(#[target_feature(enable = $feature)])?
            pub unsafe fn rms_norm_add(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
                super::rms_norm_add_body::<$fma>(x, weight, eps, out);
            }
            #[doc = $safety]
            $(#[target_feature(enable = $feature)])?
            pub unsafe fn layer_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
                super::layer_norm_body::<$fma>(x, weight, eps, out);
            }
            #[doc = $safety]
            $(#[target_feature(enable = $feature)])?
            pub unsafe fn silu_and_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
                super::silu_and_mul_body(gate, up, out);
            }
            #[doc = $safety]
            $(#[target_feature(enable = $feature)])?
            pub unsafe fn gelu_tanh_and_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
                super::gelu_tanh_and_mul_body(gate, up, out);
            }
            #[doc = $safety]
            $(#[target_feature(enable = $feature)])?
            pub unsafe fn soft_cap(x: &mut [f32], cap: f32) {
                super::soft_cap_body(x, cap);
            }
            #[doc = $safety]
            $(#[target_feature(enable = $feature)])?
            pub unsafe fn gelu(x: &[f32], out: &mut [f32]) {
                super::gelu_body(x, out);
            }
            #[doc = $safety]
            $(#[target_feature(enable = $feature)])?
            pub unsafe fn add_scaled(x: &[f32], scale: f32, out: &mut [f32]) {
                super::add_scaled_body::<$fma>(x, scale, out);
            }
            #[doc = $safety]
            $(#[target_feature(enable = $feature)])?
            pub unsafe fn round_bf16(x: &[f32], out: &mut [u16]) {
                super::round_bf16_body(x, out);
            }
            #[doc = $safety]
            $(#[target_feature(enable = $feature)])?
            pub unsafe fn rope(heads: &mut [f32], head_dim: usize, norm: HeadNorm<'_>, cos: &[f32], sin: &[f32]) {
                super::rope_body::<$fma>(heads, head_dim, norm, cos, sin);
            }
        }
    };
}

instantiate!(portable, false, "# Safety\nRuns anywhere.");
#[cfg(target_arch = "x86_64")]
instantiate!(avx2, true, "# Safety\nThe processor has AVX2 and FMA.", "avx2,fma");
#[cfg(target_arch = "x86_64")]
instantiate!(avx512, true, "# Safety\nThe processor has AVX-512 F, VL, BW and DQ.", "avx512f,avx512vl,avx512bw,avx512dq,fma");

/// The three instantiations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Baseline instructions.
    Portable,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F, VL, BW, DQ.
    Avx512,
}

/// Row operations for one level.
#[derive(Clone, Copy)]
pub struct Elementwise {
    rms_norm: unsafe fn(&[f32], &[f32], f32, &mut [f32]),
    rms_norm_add: unsafe fn(&[f32], &[f32], f32, &mut [f32]),
    layer_norm: unsafe fn(&[f32], &[f32], f32, &mut [f32]),
    silu_and_mul: unsafe fn(&[f32], &[f32], &mut [f32]),
    gelu_tanh_and_mul: unsafe fn(&[f32], &[f32], &mut [f32]),
    soft_cap: unsafe fn(&mut [f32], f32),
    gelu: unsafe fn(&[f32], &mut [f32]),
    rope: unsafe fn(&mut [f32], usize, HeadNorm<'_>, &[f32], &[f32]),
    round_bf16: unsafe fn(&[f32], &mut [u16]),
    add_scaled: unsafe fn(&[f32], f32, &mut [f32]),
}

macro_rules! operations {
    ($level:ident) => {
        Elementwise {
            rms_norm: $level::rms_norm,
            rms_norm_add: $level::rms_norm_add,
            layer_norm: $level::layer_norm,
            silu_and_mul: $level::silu_and_mul,
            gelu_tanh_and_mul: $level::gelu_tanh_and_mul,
            soft_cap: $level::soft_cap,
            gelu: $level::gelu,
            rope: $level::rope,
            round_bf16: $level::round_bf16,
            add_scaled: $level::add_scaled,
        }
    };
}

impl Elementwise {
    /// The operations for `level`, or for the best below it that this processor has.
    pub fn new(level: Level) -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let has512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq");
            if level == Level::Avx512 && has512 {
                return operations!(avx512);
            }
            let has2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            if level != Level::Portable && has2 {
                return operations!(avx2);
            }
        }
        let _ = level;
        operations!(portable)
    }

    /// `out = x / sqrt(mean(x²) + eps) * weight`; all of one length.
    #[inline]
    pub fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        // SAFETY: `new` chose functions whose instructions the processor has.
        unsafe { (self.rms_norm)(x, weight, eps, out) }
    }

    /// `out += x / sqrt(mean(x²) + eps) * weight`; all of one length.
    #[inline]
    pub fn rms_norm_add(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        // SAFETY: as above.
        unsafe { (self.rms_norm_add)(x, weight, eps, out) }
    }

    /// `out = (x - mean(x)) / sqrt(var(x) + eps) * weight`; all of one length.
    #[inline]
    pub fn layer_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        // SAFETY: as above.
        unsafe { (self.layer_norm)(x, weight, eps, out) }
    }

    /// `out = gate / (1 + e^-gate) * up`; all of one length.
    #[inline]
    pub fn silu_and_mul(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        // SAFETY: as above.
        unsafe { (self.silu_and_mul)(gate, up, out) }
    }

    /// `out = gelu(gate) * up`, by the formula with tanh; all of one length.
    #[inline]
    pub fn gelu_tanh_and_mul(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        // SAFETY: as above.
        unsafe { (self.gelu_tanh_and_mul)(gate, up, out) }
    }

    /// `x = cap * tanh(x / cap)`
    #[inline]
    pub fn soft_cap(&self, x: &mut [f32], cap: f32) {
        // SAFETY: as above.
        unsafe { (self.soft_cap)(x, cap) }
    }

    /// `out = x Φ(x)`; both of one length.
    #[inline]
    pub fn gelu(&self, x: &[f32], out: &mut [f32]) {
        // SAFETY: as above.
        unsafe { (self.gelu)(x, out) }
    }

    /// `out += scale * x`; both of one length.
    #[inline]
    pub fn add_scaled(&self, x: &[f32], scale: f32, out: &mut [f32]) {
        // SAFETY: as above.
        unsafe { (self.add_scaled)(x, scale, out) }
    }

    /// The nearest bfloat16, ties to even, of each; all of one length.
    #[inline]
    pub fn round_bf16(&self, x: &[f32], out: &mut [u16]) {
        // SAFETY: as above.
        unsafe { (self.round_bf16)(x, out) }
    }

    /// Norms (if any) and rotates each head of `heads [n, head_dim]` in place by one position's `cos` and `sin`.
    #[inline]
    pub fn rope(&self, heads: &mut [f32], head_dim: usize, norm: HeadNorm<'_>, cos: &[f32], sin: &[f32]) {
        // SAFETY: as above.
        unsafe { (self.rope)(heads, head_dim, norm, cos, sin) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::uniform;

    const LEVELS: [Level; 3] = [Level::Portable, Level::Avx2, Level::Avx512];

    fn noise(seed: u64, n: usize) -> Vec<f32> {
        (0..n as u64).map(|i| (uniform(seed, i) * 8.0 - 4.0) as f32).collect()
    }

    #[test]
    fn silu_holds_for_every_size_of_input() {
        let gate = [0.0, -0.0, 1.0, -1.0, 20.0, -20.0, 200.0, -200.0, 3e38, -3e38, f32::NAN];
        for level in LEVELS {
            let mut out = [f32::NAN; 11];
            Elementwise::new(level).silu_and_mul(&gate, &[1.0; 11], &mut out);
            for (&g, &o) in gate.iter().zip(&out).take(10) {
                let exact = f64::from(g) / (1.0 + (-f64::from(g)).exp());
                assert!((f64::from(o) - exact).abs() <= 4e-7 * exact.abs() + 1e-30, "{level:?} silu({g}) = {o}, not {exact}");
            }
            assert!(out[10].is_nan(), "a NaN must not be hidden");
        }
    }

    #[test]
    fn rms_norm_agrees_with_doubles() {
        for level in LEVELS {
            for n in [1, 2, 15, 16, 63, 64, 65, 576, 1000] {
                let (x, w) = (noise(n as u64, n), noise(99, n));
                let mut out = vec![f32::NAN; n];
                Elementwise::new(level).rms_norm(&x, &w, 1e-5, &mut out);
                let mean = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / n as f64;
                for i in 0..n {
                    let exact = f64::from(x[i]) / (mean + 1e-5).sqrt() * f64::from(w[i]);
                    assert!((f64::from(out[i]) - exact).abs() <= 1e-6 * exact.abs() + 1e-9, "{level:?} {n} {i}");
                }
            }
        }
    }

    #[test]
    fn gelu_and_the_soft_cap_hold_for_every_size_of_input() {
        let inputs = [0.0, -0.0, 1e-6, 1.0, -1.0, -3.0, 20.0, -20.0, 200.0, -200.0, 3e38, -3e38, f32::NAN];
        for level in LEVELS {
            let rows = Elementwise::new(level);
            let (mut gelu, mut capped) = ([f32::NAN; 13], inputs);
            rows.gelu_tanh_and_mul(&inputs, &[1.0; 13], &mut gelu);
            rows.soft_cap(&mut capped, 30.0);
            for i in 0..12 {
                let x = f64::from(inputs[i]);
                let exact = x / (1.0 + (-2.0 * (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).exp());
                let bound = 2e-6 * exact.abs() + 1e-30;
                assert!((f64::from(gelu[i]) - exact).abs() <= bound, "{level:?} gelu({x}) = {}, not {exact}", gelu[i]);
                let exact = 30.0 * (x / 30.0).tanh();
                assert!((f64::from(capped[i]) - exact).abs() <= 1e-5, "{level:?} cap({x}) = {}, not {exact}", capped[i]);
            }
            assert!(gelu[12].is_nan() && capped[12].is_nan(), "a NaN must not be hidden");
        }
    }

    #[test]
    fn layer_norm_agrees_with_doubles_also_far_from_zero() {
        for level in LEVELS {
            for (n, offset) in [(1, 0.0), (2, 0.0), (63, 0.0), (64, 3.0), (65, 0.0), (576, 100.0), (1000, -7.0)] {
                let (x, w) = (noise(n as u64, n).iter().map(|v| v + offset).collect::<Vec<f32>>(), noise(99, n));
                let mut out = vec![f32::NAN; n];
                Elementwise::new(level).layer_norm(&x, &w, 1e-5, &mut out);
                let mean = x.iter().map(|&v| f64::from(v)).sum::<f64>() / n as f64;
                let variance = x.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n as f64;
                for i in 0..n {
                    let exact = (f64::from(x[i]) - mean) / (variance + 1e-5).sqrt() * f64::from(w[i]);
                    // The mean is as exact as numbers of its size are.
                    let bound = 2e-6 * exact.abs() + 1e-6 * (1.0 + f64::from(offset.abs())) * f64::from(w[i].abs());
                    assert!((f64::from(out[i]) - exact).abs() <= bound, "{level:?} {n} {i}: {} for {exact}", out[i]);
                }
            }
        }
    }

    #[test]
    fn rope_rotates_pairs_and_leaves_the_rest() {
        for level in LEVELS {
            for (head_dim, half) in [(2, 1), (64, 32), (80, 40), (96, 24), (128, 64)] {
                let x = noise(3, 3 * head_dim);
                let angle: Vec<f64> = (0..half).map(|i| 0.37 * (i + 1) as f64).collect();
                let cos: Vec<f32> = angle.iter().map(|a| a.cos() as f32).collect();
                let sin: Vec<f32> = angle.iter().map(|a| a.sin() as f32).collect();
                let mut got = x.clone();
                Elementwise::new(level).rope(&mut got, head_dim, None, &cos, &sin);
                for h in 0..3 {
                    for i in 0..head_dim {
                        let at = |j: usize| f64::from(x[h * head_dim + j]);
                        let exact = match i {
                            i if i < half => at(i) * angle[i].cos() - at(i + half) * angle[i].sin(),
                            i if i < 2 * half => at(i) * angle[i - half].cos() + at(i - half) * angle[i - half].sin(),
                            i => at(i),
                        };
                        assert!((f64::from(got[h * head_dim + i]) - exact).abs() < 2e-6, "{level:?} {head_dim} {h} {i}");
                    }
                }
            }
        }
    }
}
