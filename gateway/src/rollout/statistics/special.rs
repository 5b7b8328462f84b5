//! Distributions: normal, Student's t, χ², beta.
//!
//! DLMF is NIST's Digital Library of Mathematical Functions; A&S is Abramowitz and Stegun's handbook.

use libm::{erfc, lgamma};
use std::f64::consts::{FRAC_1_SQRT_2, PI};

/// Where a continued fraction or a series is as exact as a double.
const PRECISION: f64 = 1e-15;
/// Terms of a continued fraction; it needs about the root of the largest parameter, so this is enough for 10⁹ trials.
const TERMS: usize = 100_000;
/// In the place of a zero denominator (Lentz's method).
const TINY: f64 = 1e-300;

/// P(Z ≤ x) of the standard normal distribution (DLMF 7.2.2, 7.18).
pub fn normal_cdf(x: f64) -> f64 {
    0.5 * erfc(-x * FRAC_1_SQRT_2)
}

/// Density of the standard normal distribution.
pub fn normal_density(x: f64) -> f64 {
    (-0.5 * x * x).exp() / (2.0 * PI).sqrt()
}

/// The x for which P(Z ≤ x) = p; infinite at 0 and 1, NaN outside. Starts from A&S 26.2.23 and is refined with Halley's method.
pub fn normal_quantile(p: f64) -> f64 {
    if !(0.0..=1.0).contains(&p) {
        return f64::NAN;
    }
    if p == 0.0 || p == 1.0 {
        return if p == 0.0 { f64::NEG_INFINITY } else { f64::INFINITY };
    }
    // In the lower half, where the distribution function keeps its relative precision.
    let lower = p.min(1.0 - p);
    let t = (-2.0 * lower.ln()).sqrt();
    let top = 2.515_517 + t * (0.802_853 + t * 0.010_328);
    let bottom = 1.0 + t * (1.432_788 + t * (0.189_269 + t * 0.001_308));
    let mut x = top / bottom - t;
    for _ in 0..3 {
        let step = (normal_cdf(x) - lower) / normal_density(x);
        x -= step / (1.0 + 0.5 * x * step);
    }
    if p < 0.5 { x } else { -x }
}

/// ln B(a, b) for positive a and b (DLMF 5.12.1).
pub fn ln_beta(a: f64, b: f64) -> f64 {
    lgamma(a) + lgamma(b) - lgamma(a + b)
}

/// The distribution function of Beta(a, b), I_x(a, b), by the continued fraction DLMF 8.17.22.
pub fn beta_cdf(x: f64, a: f64, b: f64) -> f64 {
    if x <= 0.0 {
        return 0.0;
    }
    if x >= 1.0 {
        return 1.0;
    }
    let front = (a * x.ln() + b * (-x).ln_1p() - ln_beta(a, b)).exp();
    // The fraction converges fast on the near side of the mean: DLMF 8.17.4 turns the other side over.
    if x <= (a + 1.0) / (a + b + 2.0) {
        front / a * beta_fraction(x, a, b)
    } else {
        1.0 - front / b * beta_fraction(1.0 - x, b, a)
    }
}

fn beta_fraction(x: f64, a: f64, b: f64) -> f64 {
    let coefficient = |term: usize| {
        let m = (term / 2) as f64;
        if term.is_multiple_of(2) {
            m * (b - m) * x / ((a + 2.0 * m - 1.0) * (a + 2.0 * m))
        } else {
            -(a + m) * (a + b + m) * x / ((a + 2.0 * m) * (a + 2.0 * m + 1.0))
        }
    };
    // 1/(1 + d₁/(1 + d₂/(1 + …)))
    1.0 / lentz(1.0, |term| (coefficient(term), 1.0))
}

/// b₀ + a₁/(b₁ + a₂/(b₂ + …)) by the modified Lentz method (Thompson and Barnett 1986); `step(i)` is (aᵢ, bᵢ).
fn lentz(start: f64, step: impl Fn(usize) -> (f64, f64)) -> f64 {
    let keep = |value: f64| if value.abs() < TINY { TINY } else { value };
    let mut fraction = keep(start);
    let (mut c, mut d) = (fraction, 0.0);
    for term in 1..=TERMS {
        let (a, b) = step(term);
        d = 1.0 / keep(b + a * d);
        c = keep(b + a / c);
        let change = c * d;
        fraction *= change;
        if (change - 1.0).abs() < PRECISION {
            break;
        }
    }
    fraction
}

/// The x for which Beta(a, b) has probability p below it.
pub fn beta_quantile(p: f64, a: f64, b: f64) -> f64 {
    let ln_scale = ln_beta(a, b);
    let density = |x: f64| ((a - 1.0) * x.ln() + (b - 1.0) * (-x).ln_1p() - ln_scale).exp();
    invert(p, (0.0, 1.0), a / (a + b), |x| beta_cdf(x, a, b), density)
}

/// P(X > x) of the χ² distribution with so many degrees of freedom (A&S 26.4.19).
pub fn chi_square_tail(x: f64, degrees: f64) -> f64 {
    upper_gamma(0.5 * degrees, 0.5 * x)
}

/// The regularised Q(a, x): series DLMF 8.7.1 for small x, continued fraction DLMF 8.9.2 for large.
fn upper_gamma(a: f64, x: f64) -> f64 {
    if x <= 0.0 {
        return 1.0;
    }
    let front = (a * x.ln() - x - lgamma(a)).exp();
    if x < a + 1.0 {
        let (mut term, mut sum) = (1.0 / a, 1.0 / a);
        for n in 1..=TERMS {
            term *= x / (a + n as f64);
            sum += term;
            if term < sum * PRECISION {
                break;
            }
        }
        return 1.0 - front * sum;
    }
    front
        / lentz(x + 1.0 - a, |n| {
            let n = n as f64;
            (-n * (n - a), x + 2.0 * n + 1.0 - a)
        })
}

/// P(|T| > |t|) of Student's t with so many degrees of freedom (A&S 26.7.1).
pub fn student_two_sided(t: f64, degrees: f64) -> f64 {
    beta_cdf(degrees / (degrees + t * t), 0.5 * degrees, 0.5)
}

/// The x for which P(T ≤ x) = p.
pub fn student_quantile(p: f64, degrees: f64) -> f64 {
    if p < 0.5 {
        return -student_quantile(1.0 - p, degrees);
    }
    let tail = 2.0 * (1.0 - p);
    let ln_scale = lgamma(0.5 * (degrees + 1.0)) - lgamma(0.5 * degrees) - 0.5 * (degrees * PI).ln();
    let density = |t: f64| 2.0 * (ln_scale - 0.5 * (degrees + 1.0) * (t * t / degrees).ln_1p()).exp();
    // One degree of freedom has the longest tail: tan(π(p − ½)).
    let top = (PI * (p - 0.5)).tan().max(1.0) * 2.0;
    invert(1.0 - tail, (0.0, top), normal_quantile(p), |t| 1.0 - student_two_sided(t, degrees), density)
}

/// Where a growing function reaches a value: Newton's steps, halving where they would leave the bracket.
fn invert(target: f64, bracket: (f64, f64), start: f64, cdf: impl Fn(f64) -> f64, density: impl Fn(f64) -> f64) -> f64 {
    let (mut low, mut high) = bracket;
    let mut x = start.clamp(low, high);
    for _ in 0..200 {
        let error = cdf(x) - target;
        if error > 0.0 {
            high = x
        } else {
            low = x
        }
        let newton = x - error / density(x);
        let next = if newton > low && newton < high { newton } else { 0.5 * (low + high) };
        if (next - x).abs() <= 1e-14 * x.abs() {
            return next;
        }
        x = next;
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(value: f64, expected: f64, relative: f64) {
        assert!((value - expected).abs() <= relative * expected.abs(), "{value} is not {expected}");
    }

    #[test]
    fn the_normal_distribution_has_its_published_values() {
        // R: pnorm and qnorm, 16 digits.
        near(normal_cdf(1.959_963_984_540_054), 0.975, 1e-14);
        near(normal_cdf(-6.0), 9.865_876_450_376_98e-10, 1e-12);
        near(normal_quantile(0.975), 1.959_963_984_540_054, 1e-14);
        near(normal_quantile(0.995), 2.575_829_303_548_901, 1e-14);
        near(normal_quantile(1e-10), -6.361_340_902_404_056, 1e-13);
        assert!(normal_quantile(0.5).abs() < 1e-15);
        assert_eq!((normal_quantile(0.0), normal_quantile(1.0)), (f64::NEG_INFINITY, f64::INFINITY));
        assert!(normal_quantile(1.1).is_nan());
        for p in [1e-300, 1e-20, 0.02, 0.3, 0.7, 0.999_999] {
            near(normal_cdf(normal_quantile(p)), p, 1e-10);
        }
    }

    #[test]
    fn the_beta_distribution_has_its_published_values() {
        // I_½(2, 3) = 11/16 (A&S 26.5: a binomial tail); I_x(a, 1) = xᵃ; Beta(½, ½) is the arcsine law.
        near(beta_cdf(0.5, 2.0, 3.0), 0.6875, 1e-14);
        near(beta_cdf(0.9, 7.0, 1.0), 0.9f64.powi(7), 1e-13);
        near(beta_cdf(0.2, 0.5, 0.5), 2.0 / PI * 0.2f64.sqrt().asin(), 1e-13);
        // A large one is nearly normal: the mean of Beta(n, n) is its median.
        near(beta_cdf(0.5, 1e6, 1e6), 0.5, 1e-9);
        for (p, a, b) in [(0.025, 3.0, 9.0), (0.5, 0.7, 0.4), (0.999, 500.0, 20.0)] {
            near(beta_cdf(beta_quantile(p, a, b), a, b), p, 1e-12);
        }
        assert_eq!((beta_cdf(0.0, 2.0, 2.0), beta_cdf(1.0, 2.0, 2.0)), (0.0, 1.0));
    }

    #[test]
    fn chi_square_and_t_have_their_published_values() {
        // NIST/SEMATECH e-Handbook 1.3.6.7.4: 3.841, 11.070 and 124.342 leave 0.05 with 1, 5 and 100 degrees of freedom.
        for (x, degrees) in [(3.841_459, 1.0), (11.070_498, 5.0), (124.342_113, 100.0)] {
            near(chi_square_tail(x, degrees), 0.05, 1e-6);
        }
        // With two it is e^(−x/2).
        near(chi_square_tail(50.0, 2.0), (-25f64).exp(), 1e-13);
        near(chi_square_tail(0.3, 2.0), (-0.15f64).exp(), 1e-13);
        // The same handbook, 1.3.6.7.2: 12.706, 2.228, 1.984 at 0.975 with 1, 10, 100; more digits by A&S 26.7.4,
        // which is closed for even degrees, and by tan(0.475π) for one.
        for (degrees, t) in [(1.0, 12.706_204_736_174_7), (10.0, 2.228_138_851_986_27), (100.0, 1.983_971_518_523_55)] {
            near(student_quantile(0.975, degrees), t, 1e-12);
            near(student_quantile(0.025, degrees), -t, 1e-12);
            near(student_two_sided(t, degrees), 0.05, 1e-12);
        }
        // With two degrees P(|T| > t) = 1 − t/√(2 + t²).
        near(student_two_sided(2.0, 2.0), 1.0 - 2.0 / 6f64.sqrt(), 1e-13);
    }
}
