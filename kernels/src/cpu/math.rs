//! Elementary functions that vectorise.
//!
//! Plain scalar code without branches, table or fused multiply-add: inlined into a loop under any target feature it becomes SIMD,
//! and it rounds the same way on every instruction path, so what is built on it is bitwise the same everywhere.

/// Arguments are raised to this, where [`exp`] is already 0.
const EXP_MIN: f32 = -87.3;
/// Arguments are lowered to this, where [`exp`] is already +∞.
const EXP_MAX: f32 = 89.0;
/// 1.5 · 2²³: adding it leaves the nearest integer in the low mantissa bits.
const ROUND: f32 = 12_582_912.0;

/// `e^x` within 2 ulp; 0 below −86.98 (no subnormal results), +∞ above 88.73, 0 for NaN (so that a NaN logit weighs nothing).
///
/// Range reduction by ln 2 in two parts and the degree-5 minimax polynomial of Cephes `expf` (Moshier).
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // Written as comparisons, not `clamp`: they compile to one min and one max, and NaN takes the lower bound.
    let x = if x > EXP_MIN { x } else { EXP_MIN };
    let x = if x < EXP_MAX { x } else { EXP_MAX };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    // 355/512 has nine significant bits, so the product is exact.
    let r = x - n * (355.0 / 512.0);
    let r = r - n * -2.121_944_4e-4;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let y = p * (r * r) + r + 1.0;
    // 2^(n−1), then doubled: n can be 128, whose power alone would overflow; at n = −126 it is 0.
    let half_scale = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(126) << 23;
    y * f32::from_bits(half_scale) * 2.0
}

/// `tanh(x)` with an absolute error below 3·10⁻⁷.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    1.0 - 2.0 / (exp(2.0 * x) + 1.0)
}

/// `1 / (1 + e^−x)`; 1 for NaN.
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `x / (1 + e^−x)`; NaN stays NaN.
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// `x / 2 * (1 + tanh(√(2 / π) * (x + 0.044715 x³)))`, by `(1 + tanh(u)) / 2 = 1 / (1 + e^−2u)`; NaN stays NaN.
#[inline(always)]
pub fn gelu_tanh(x: f32) -> f32 {
    /// `2 √(2 / π)`
    const SLOPE: f32 = 1.595_769;
    x / (1.0 + exp(-SLOPE * (x + 0.044_715 * x * x * x)))
}

/// Φ(−z√2) is `t e^(−z²) p(t) / 2` with t = 1 / (1 + z/2), for z from 0 on: coefficients of p from the lowest on. Interpolated at the
/// Chebyshev nodes of t from 0.17 to 1 (z up to 9.7, where the power is 0), relative error 6·10⁻⁸.
const NORMAL_TAIL: [f32; 9] = [
    0.282_083_4,
    0.282_431_27,
    0.242_680_65,
    0.204_399_5,
    -0.030_707_02,
    0.283_969_37,
    -0.492_289_1,
    0.286_980_35,
    -0.059_548_393,
];

/// `x Φ(x)` with the normal distribution's Φ, to 4·10⁻⁷ and, above −9, 3·10⁻⁶ of itself; NaN stays NaN.
#[inline(always)]
pub fn gelu(x: f32) -> f32 {
    let t = 1.0 / (1.0 + x.abs() * (0.5 * std::f32::consts::FRAC_1_SQRT_2));
    let p = NORMAL_TAIL.iter().rev().fold(0.0, |p, &c| p * t + c);
    let tail = 0.5 * t * p * exp(-0.5 * x * x);
    x * if x < 0.0 { tail } else { 1.0 - tail }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::normal;

    #[test]
    fn exp_is_within_two_ulp() {
        let mut worst = 0.0f64;
        let mut x = -86.9f32;
        while x < 88.7 {
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - exact).abs() / exact);
            x += 0.000_71;
        }
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "relative error {worst:e}");
    }

    #[test]
    fn exp_at_the_edges() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e30), 0.0);
        assert_eq!(exp(f32::NAN), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(1e30), f32::INFINITY);
        assert!(exp(88.7).is_finite());
    }

    #[test]
    fn gelu_follows_the_normal_distribution() {
        let mut x = -12.0f32;
        while x < 12.0 {
            let exact = f64::from(x) * normal::cumulative(f64::from(x));
            assert!((f64::from(gelu(x)) - exact).abs() <= 4e-7, "gelu({x}) = {}, not {exact}", gelu(x));
            if x > -4.0 {
                assert!((f64::from(gelu(x)) - exact).abs() <= 6e-7 * exact.abs() + 1e-30, "gelu({x}) = {}, not {exact}", gelu(x));
            }
            x += 0.0037;
        }
        assert_eq!((gelu(0.0), gelu(3e38), gelu(-3e38), gelu(40.0)), (0.0, 3e38, 0.0, 40.0));
        assert!(gelu(f32::NAN).is_nan());
    }

    #[test]
    fn tanh_and_silu_follow_std() {
        let mut x = -30.0f32;
        while x < 30.0 {
            assert!((tanh(x) - x.tanh()).abs() < 3e-7, "tanh({x})");
            let exact = f64::from(x) / (1.0 + (-f64::from(x)).exp());
            assert!((f64::from(silu(x)) - exact).abs() <= 1e-6 * exact.abs() + 1e-30, "silu({x})");
            x += 0.013;
        }
        assert_eq!(tanh(f32::INFINITY), 1.0);
        assert_eq!(tanh(f32::NEG_INFINITY), -1.0);
        assert!(silu(f32::NAN).is_nan());
    }
}
