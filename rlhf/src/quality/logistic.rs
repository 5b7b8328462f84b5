//! Logistic regression on differences: the Bradley-Terry model with features.
//!
//! A row is x = φ(chosen) − φ(rejected) and P(chosen is better) = σ(w·x). There is no intercept: swapping the answers must swap
//! the probability.

use crate::{random::Random, statistics::sigmoid};

/// Sparse rows, one after another.
#[derive(Default)]
pub(super) struct Differences {
    starts: Vec<usize>,
    features: Vec<u16>,
    values: Vec<f32>,
}

impl Differences {
    /// Adds a row of (feature, value).
    pub fn push(&mut self, row: impl IntoIterator<Item = (u16, f32)>) {
        self.starts.push(self.features.len());
        for (feature, value) in row {
            self.features.push(feature);
            self.values.push(value);
        }
    }

    /// Rows.
    pub fn len(&self) -> usize {
        self.starts.len()
    }

    fn row(&self, index: usize) -> impl Iterator<Item = (usize, f32)> + '_ {
        let end = self.starts.get(index + 1).copied().unwrap_or(self.features.len());
        let range = self.starts[index]..end;
        self.features[range.clone()].iter().zip(&self.values[range]).map(|(feature, value)| (usize::from(*feature), *value))
    }
}

/// How a model is fitted.
#[derive(Clone, Copy)]
pub(super) struct Fit {
    /// Features: the largest index and 1.
    pub size: usize,
    /// Passes over the rows.
    pub passes: usize,
    /// AdaGrad's step (Duchi, Hazan, Singer 2011).
    pub rate: f32,
    /// Weight of ½|w|², per row and touched feature.
    pub decay: f32,
}

/// w·x of every row by a model that was fitted on the other folds.
pub(super) fn out_of_fold(data: &Differences, folds: &[usize], fit: Fit, seed: u64) -> Vec<f64> {
    let mut margins = vec![0.0; data.len()];
    for fold in 0..folds.iter().max().map_or(0, |last| last + 1) {
        let train: Vec<usize> = (0..data.len()).filter(|row| folds[*row] != fold).collect();
        let weights = fitted(data, train, fit, &mut Random::new(seed ^ fold as u64));
        for row in (0..data.len()).filter(|row| folds[*row] == fold) {
            margins[row] = data.row(row).map(|(feature, value)| f64::from(weights[feature] * value)).sum();
        }
    }
    margins
}

/// Minimises the mean of −log σ(w·x) by AdaGrad over shuffled rows.
fn fitted(data: &Differences, mut rows: Vec<usize>, fit: Fit, random: &mut Random) -> Vec<f32> {
    let mut weights = vec![0.0f32; fit.size];
    let mut squares = vec![1e-6f32; fit.size];
    for _ in 0..fit.passes {
        random.shuffle(&mut rows);
        for row in &rows {
            let margin: f32 = data.row(*row).map(|(feature, value)| weights[feature] * value).sum();
            let push = sigmoid(-f64::from(margin)) as f32;
            for (feature, value) in data.row(*row) {
                let gradient = fit.decay * weights[feature] - push * value;
                squares[feature] += gradient * gradient;
                weights[feature] -= fit.rate * gradient / squares[feature].sqrt();
            }
        }
    }
    weights
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_learned_and_noise_is_not() {
        let mut random = Random::new(5);
        let mut signal = Differences::default();
        let mut noise = Differences::default();
        for _ in 0..2000 {
            let x: Vec<(u16, f32)> = (0..8).map(|feature| (feature, random.unit() as f32 - 0.5)).collect();
            // Truth: w = (4, −4, 0, …); the pair is written so that the chosen side comes first.
            let margin = 4.0 * f64::from(x[0].1 - x[1].1);
            let sign = if random.unit() < sigmoid(3.0 * margin) { 1.0 } else { -1.0 };
            signal.push(x.iter().map(|(feature, value)| (*feature, value * sign)));
            let coin = if random.unit() < 0.5 { 1.0 } else { -1.0 };
            noise.push(x.iter().map(|(feature, value)| (*feature, value * coin)));
        }
        let folds: Vec<usize> = (0..2000).map(|row| row % 5).collect();
        let fit = Fit { size: 8, passes: 3, rate: 0.2, decay: 1e-4 };
        let accuracy = |data| out_of_fold(data, &folds, fit, 1).iter().filter(|margin| **margin > 0.0).count() as f64 / 2000.0;
        assert!(accuracy(&signal) > 0.85, "{}", accuracy(&signal));
        assert!((accuracy(&noise) - 0.5).abs() < 0.05, "{}", accuracy(&noise));
        assert_eq!(out_of_fold(&signal, &folds, fit, 1), out_of_fold(&signal, &folds, fit, 1));
    }
}
