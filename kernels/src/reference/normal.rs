//! The normal distribution.

/// Φ(x) by Marsaglia's series (2004, "Evaluating the Normal Distribution"): 1/2 + φ(x) (x + x³/3 + x⁵/(3·5) + …).
pub(crate) fn cumulative(x: f64) -> f64 {
    // Beyond, it is 0 or 1 to the last digit that an f32 has, and the series is long.
    if x.abs() > 12.0 {
        return if x > 0.0 { 1.0 } else { 0.0 };
    }
    let (mut term, mut sum) = (x, 0.0);
    for n in 1..300 {
        sum += term;
        term *= x * x / f64::from(2 * n + 1);
    }
    0.5 + sum * (-0.5 * x * x).exp() / std::f64::consts::TAU.sqrt()
}

#[cfg(test)]
mod tests {
    use super::cumulative;

    #[test]
    fn it_has_the_values_of_the_tables() {
        // Abramowitz and Stegun 1964, table 26.1.
        let table = [(0.0, 0.5), (0.5, 0.691_462_461_274_013), (1.0, 0.841_344_746_068_543), (3.0, 0.998_650_101_968_370)];
        for (x, want) in table {
            assert!((cumulative(x) - want).abs() < 1e-14 && (cumulative(-x) - (1.0 - want)).abs() < 1e-14, "{x}");
        }
        assert_eq!((cumulative(30.0), cumulative(-30.0)), (1.0, 0.0));
        assert!(cumulative(f64::NAN).is_nan());
    }
}
