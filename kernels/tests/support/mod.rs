//! Random steps, random weights, and a small decoder written against [`Ops`], for the tests and the benchmark.
#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test stops at the first error; the lint knows test functions only"
)]

pub mod backend;
pub mod decoder;
pub mod driver;
pub mod emulation;
pub mod exchange;
pub mod experts;
pub mod faulty;
pub mod low_rank;
pub mod mistakes;
pub mod recorder;
pub mod sampling;
pub mod scenarios;
pub mod serving;
pub mod steps;
pub mod training;

use tidemill_kernels::blocks::quantize_row;
use tidemill_kernels::random::uniform;
use tidemill_kernels::*;

/// A stream of random numbers.
pub struct Noise {
    seed: u64,
    counter: u64,
}

impl Noise {
    pub fn new(seed: u64) -> Self {
        Noise { seed, counter: 0 }
    }

    pub fn unit(&mut self) -> f64 {
        self.counter += 1;
        uniform(self.seed, self.counter)
    }

    /// In `0..n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.unit() * n as f64) as usize
    }

    /// In `low..=high`.
    pub fn between(&mut self, low: usize, high: usize) -> usize {
        low + self.below(high - low + 1)
    }

    pub fn pick<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len())]
    }

    /// Roughly normal, with the given deviation.
    pub fn values(&mut self, n: usize, deviation: f64) -> Vec<f32> {
        (0..n).map(|_| ((self.unit() + self.unit() + self.unit() - 1.5) * 2.0 * deviation) as f32).collect()
    }
}

/// Rows of a weight that differ; further ones repeat them. (Random numbers for a real model's size take a minute.)
const DISTINCT_ROWS: usize = 320;

/// `n` rows of `k` random weights, encoded.
pub struct Weight {
    pub n: usize,
    pub k: usize,
    pub format: Format,
    pub data: Vec<u8>,
}

impl Weight {
    pub fn random(noise: &mut Noise, n: usize, k: usize, format: Format, deviation: f64) -> Self {
        let row_bytes = format.row_bytes(k).unwrap();
        let mut data = vec![0; n * row_bytes];
        let distinct = n.min(DISTINCT_ROWS);
        for row in data.chunks_exact_mut(row_bytes).take(distinct) {
            quantize_row(format, &noise.values(k, deviation), row).unwrap();
        }
        for row in distinct..n {
            data.copy_within(row % distinct * row_bytes..(row % distinct + 1) * row_bytes, row * row_bytes);
        }
        Weight { n, k, format, data }
    }

    /// Rows of `k` given weights.
    pub fn from_f32(k: usize, values: &[f32]) -> Self {
        let data = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Weight { n: values.len() / k, k, format: Format::F32, data }
    }

    pub fn source(&self) -> MatrixSource<'_> {
        MatrixSource { n: self.n, k: self.k, format: self.format, data: &self.data, row_order: None }
    }
}

/// Largest difference relative to the largest magnitude of `want`; NaN anywhere in `got` is infinite.
pub fn error(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let scale = want.iter().fold(1e-20f64, |m, v| m.max(f64::from(v.abs())));
    let difference = |(g, w): (&f32, &f32)| {
        let d = (f64::from(*g) - f64::from(*w)).abs();
        if d.is_nan() { f64::INFINITY } else { d }
    };
    got.iter().zip(want).map(difference).fold(0.0, f64::max) / scale
}
