//! YaRN: frequencies for contexts several times as long as in pre-training (Peng et al. 2023, "YaRN: Efficient Context Window Extension of
//! Large Language Models"), as `transformers`' `_compute_yarn_parameters` computes them.

use std::f64::consts::TAU;

/// Turns within the pre-trained context from which on a frequency is kept, and below which it is divided; where a file says nothing.
pub const BETAS: (f64, f64) = (32.0, 1.0);

/// Fast frequencies are kept, slow ones divided by a factor, with a ramp over those between; and queries and keys are stretched, which
/// makes attention as sharp as it was.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Yarn {
    /// Divides slow frequencies.
    pub factor: f64,
    /// Multiplies cosines and sines.
    pub attention: f64,
    /// Frequencies of more turns than this within `original_positions` are kept.
    pub beta_fast: f64,
    /// Those of fewer are divided.
    pub beta_slow: f64,
    /// The ramp begins and ends at whole frequencies.
    pub truncate: bool,
    /// Positions in pre-training.
    pub original_positions: usize,
}

impl Yarn {
    /// What multiplies cosines and sines where a file does not say it. `scales`: two weights of the logarithm (`mscale`, `mscale_all_dim`),
    /// for a model whose attention takes the second into account by itself.
    pub fn attention(factor: f64, scales: Option<(f64, f64)>) -> f64 {
        let of = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
        scales.map_or_else(|| of(1.0), |(mscale, all)| of(mscale) / of(all))
    }

    /// The context that it is for.
    pub fn positions(&self) -> usize {
        (self.original_positions as f64 * self.factor) as usize
    }

    /// Frequency `index` of `half`, whose base is `theta`.
    pub(super) fn stretch(&self, index: usize, frequency: f64, half: usize, theta: f64) -> f64 {
        let Yarn { factor, beta_fast, beta_slow, truncate, original_positions, .. } = *self;
        // The index of the frequency that makes so many turns.
        let making = |turns: f64| half as f64 * (original_positions as f64 / (turns * TAU)).ln() / theta.ln();
        let (mut first, mut last) = (making(beta_fast), making(beta_slow));
        if truncate {
            (first, last) = (first.floor(), last.ceil());
        }
        let (first, mut last) = (first.max(0.0), last.min(2.0 * half as f64 - 1.0));
        if first == last {
            last += 0.001;
        }
        let divided = ((index as f64 - first) / (last - first)).clamp(0.0, 1.0);
        frequency / factor * divided + frequency * (1.0 - divided)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: [f64; 8] =
        [1.0, 0.223994657, 0.0416666642, 0.00395284733, 0.00124999997, 0.000395284733, 0.000125000006, 3.95284733e-05];
    const UNCUT: [f64; 8] =
        [1.0, 0.22543858, 0.0349563509, 0.00395284733, 0.00124999997, 0.000395284733, 0.000125000006, 3.95284733e-05];
    const ATTENTION: f64 = 1.2079441541679836;
    const SCALED: f64 = 1.0544565075669314;

    /// `transformers` 5.23: `ROPE_INIT_FUNCTIONS["yarn"]` of a head of 16, base 10,000, 64 positions, factor 8.
    #[test]
    fn frequencies_and_their_stretch_are_those_of_transformers() {
        let yarn = |truncate, (beta_fast, beta_slow)| Yarn {
            factor: 8.0,
            attention: Yarn::attention(8.0, None),
            beta_fast,
            beta_slow,
            truncate,
            original_positions: 64,
        };
        let frequencies = |yarn: Yarn| {
            let plain = (0..8).map(|i| 10_000f64.powf(-f64::from(i) / 8.0));
            plain.enumerate().map(|(i, frequency)| yarn.stretch(i, frequency, 8, 10_000.0)).collect::<Vec<f64>>()
        };
        let near = |got: Vec<f64>, want: [f64; 8]| got.iter().zip(want).all(|(got, want)| (got / want - 1.0).abs() < 1e-6);
        assert!(near(frequencies(yarn(true, BETAS)), WHOLE), "{:?}", frequencies(yarn(true, BETAS)));
        assert!(near(frequencies(yarn(false, (8.0, 0.5))), UNCUT), "{:?}", frequencies(yarn(false, (8.0, 0.5))));
        assert!((Yarn::attention(8.0, None) - ATTENTION).abs() < 1e-9);
        assert!((Yarn::attention(8.0, Some((1.0, 0.7))) - SCALED).abs() < 1e-9);
        assert_eq!((Yarn::attention(1.0, None), yarn(true, BETAS).positions()), (1.0, 512));
    }
}
