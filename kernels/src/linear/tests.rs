//! Every form on every instruction path of this machine against a scalar f64 product of the weights as packed.

use super::*;
use crate::blocks::quantize_row;
use crate::ops::{Format, MatrixSource, WeightFormat};

/// Roughly normal numbers from a counter: the sum of four uniform ones.
struct Noise(u64);

impl Noise {
    fn uniform(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((self.0 >> 40) as f32) / (1u64 << 23) as f32 - 1.0
    }
    fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.uniform() + self.uniform() + self.uniform() + self.uniform()).collect()
    }
}

/// A random matrix in a file format: block formats without an encoder are random bits with sane scales.
fn file_matrix(format: Format, n: usize, k: usize, noise: &mut Noise) -> Vec<u8> {
    let row_bytes = format.row_bytes(k).unwrap();
    let mut data = vec![0u8; n * row_bytes];
    for row in data.chunks_mut(row_bytes) {
        let values: Vec<f32> = noise.values(k).iter().map(|v| v * 0.05).collect();
        if quantize_row(format, &values, row).is_err() {
            for byte in row.iter_mut() {
                *byte = (noise.uniform() * 128.0 + 128.0) as u8;
            }
            for block in row.chunks_mut(format.block_bytes()) {
                let scale = |v: f32| half::f16::from_f32(v).to_le_bytes();
                match format {
                    Format::Q5_0 => block[..2].copy_from_slice(&scale(0.01)),
                    Format::Q5_1 => {
                        block[..2].copy_from_slice(&scale(0.01));
                        block[2..4].copy_from_slice(&scale(-0.15));
                    }
                    Format::Q4K | Format::Q5K => {
                        block[..2].copy_from_slice(&scale(0.001));
                        block[2..4].copy_from_slice(&scale(0.005));
                    }
                    Format::Q6K => block[208..].copy_from_slice(&scale(0.0001)),
                    other => unreachable!("{other:?} has an encoder"),
                }
            }
        }
    }
    data
}

const ALL: [(Format, usize); 11] = [
    (Format::F32, 1),
    (Format::F16, 1),
    (Format::Bf16, 1),
    (Format::Q4_0, 32),
    (Format::Q4_1, 32),
    (Format::Q5_0, 32),
    (Format::Q5_1, 32),
    (Format::Q8_0, 32),
    (Format::Q4K, 256),
    (Format::Q5K, 256),
    (Format::Q6K, 256),
];

fn pack(format: Format, n: usize, k: usize, data: &[u8], as_: WeightFormat, threads: usize) -> PackedMatrix {
    let source = MatrixSource { n, k, format, data, row_order: None };
    PackedMatrix::pack(&[source], as_, Isa::detect(), threads).unwrap()
}

/// `x wᵀ` by `run_item` over all items.
fn product(isa: Isa, w: &PackedMatrix, x: &[f32], rows: usize, bias: Option<&[f32]>, start: Option<&[f32]>) -> Vec<f32> {
    let stride = w.n() + 3;
    let acts = Activations::new(rows, w.k()).unwrap();
    let mut scratch = TileScratch::new(w.k()).unwrap();
    let mut out = vec![f32::NAN; rows * stride];
    if let Some(start) = start {
        for (out, start) in out.chunks_mut(stride).zip(start.chunks(w.n())) {
            out[..w.n()].copy_from_slice(start);
        }
    }
    for row in 0..rows {
        // SAFETY: one thread, capacities as made above.
        unsafe { acts.set_row(isa, w.activation_kind(), row, &x[row * w.k()..][..w.k()]) };
    }
    for item in 0..w.items(rows) {
        // SAFETY: as above; out has `rows` rows of `stride`.
        unsafe { w.run_item(isa, item, &acts, rows, out.as_mut_ptr(), stride, bias, start.is_some(), &mut scratch) };
    }
    assert!(out.chunks(stride).all(|row| row[w.n()..].iter().all(|v| v.is_nan())), "wrote past n");
    out.chunks(stride).flat_map(|row| row[..w.n()].to_vec()).collect()
}

/// 2-norm of the difference to the f64 product of `w.dequantize_row`, relative to the size that products of such vectors have with
/// random signs, `|w| |x| / √k`, so that one that cancels by chance does not count as imprecise.
fn relative_error(w: &PackedMatrix, x: &[f32], rows: usize, got: &[f32], plus: impl Fn(usize, usize) -> f64) -> f64 {
    let (n, k) = (w.n(), w.k());
    let (mut error, mut norm) = (0.0, 0.0);
    let mut weights = vec![0.0f32; k];
    for feature in 0..n {
        w.dequantize_row(feature, &mut weights).unwrap();
        for row in 0..rows {
            let exact: f64 = weights.iter().zip(&x[row * k..]).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
            let got = f64::from(got[row * n + feature]) - plus(row, feature);
            let squares = |v: &[f32]| v.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
            error += (got - exact).powi(2);
            norm += squares(&weights) * squares(&x[row * k..][..k]) / k as f64;
        }
    }
    (error / norm).sqrt()
}

/// What a path promises for a kind of weights.
fn tolerance(isa: Isa, kind: ActivationKind) -> f64 {
    match (kind, isa) {
        (ActivationKind::F32, _) => 2e-6,
        (ActivationKind::Bf16, Isa::Amx) => 4e-3,
        (ActivationKind::Bf16, _) => 2e-6,
        (ActivationKind::Int, Isa::Avx512) => 1e-2,
        (ActivationKind::Int, _) => 1e-4,
    }
}

#[test]
fn every_format_on_every_path_multiplies_ragged_shapes() {
    let mut noise = Noise(1);
    for (format, unit) in ALL {
        for (n, blocks, rows) in [(1, 1, 1), (17, 3, 2), (48, 2, 5), (33, 5, 9), (100, 9, 70), (65, 4, 33), (16, 7, 17)] {
            let k = if unit == 1 { blocks * 29 } else { unit * blocks };
            let data = file_matrix(format, n, k, &mut noise);
            let x = noise.values(rows * k);
            let w = pack(format, n, k, &data, WeightFormat::Auto, 2);
            for isa in Isa::available() {
                let got = product(isa, &w, &x, rows, None, None);
                let error = relative_error(&w, &x, rows, &got, |_, _| 0.0);
                // The promise is about norms; a handful of outputs may each be three times as far off.
                let limit = tolerance(isa, w.activation_kind()) * (1.0 + 3.0 / ((n * rows) as f64).sqrt());
                assert!(error <= limit, "{} {format:?} [{n}, {k}] x {rows}: {error:.2e} > {limit:.0e}", isa.name());
            }
        }
    }
}

#[test]
fn forced_forms_multiply_too() {
    let mut noise = Noise(2);
    let (n, k, rows) = (50, 512, 19);
    for (format, _) in ALL {
        let data = file_matrix(format, n, k, &mut noise);
        let x = noise.values(rows * k);
        for as_ in [WeightFormat::F32, WeightFormat::Bf16, WeightFormat::Int8] {
            let w = pack(format, n, k, &data, as_, 1);
            for isa in Isa::available() {
                let got = product(isa, &w, &x, rows, None, None);
                let error = relative_error(&w, &x, rows, &got, |_, _| 0.0);
                assert!(error <= tolerance(isa, w.activation_kind()), "{} {format:?} as {as_:?}: {error:.2e}", isa.name());
            }
        }
    }
}

#[test]
fn a_row_does_not_depend_on_its_batch() {
    let mut noise = Noise(3);
    let (n, k, rows) = (70, 768, 67);
    for (format, _) in ALL {
        let data = file_matrix(format, n, k, &mut noise);
        let x = noise.values(rows * k);
        let w = pack(format, n, k, &data, WeightFormat::Auto, 3);
        for isa in Isa::available() {
            let together = product(isa, &w, &x, rows, None, None);
            for (first, count) in [(0, 1), (5, 1), (66, 1), (3, 2), (10, 4), (20, 7), (40, 8), (12, 9), (1, 16), (30, 33)] {
                let part = product(isa, &w, &x[first * k..(first + count) * k], count, None, None);
                let same = part.iter().zip(&together[first * n..]).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "{} {format:?}: rows {first}..{} differ", isa.name(), first + count);
            }
        }
    }
}

#[test]
fn portable_and_avx2_integers_agree_to_the_bit() {
    if !Isa::available().contains(&Isa::Avx2) {
        return;
    }
    let mut noise = Noise(6);
    let (n, k, rows) = (33, 320, 7);
    for format in [Format::Q4_1, Format::Q8_0] {
        let data = file_matrix(format, n, k, &mut noise);
        let x = noise.values(rows * k);
        let w = pack(format, n, k, &data, WeightFormat::Auto, 1);
        let [a, b] = [Isa::Portable, Isa::Avx2].map(|isa| product(isa, &w, &x, rows, None, None));
        assert!(a.iter().zip(&b).all(|(a, b)| a.to_bits() == b.to_bits()), "{format:?}");
    }
}

#[test]
fn bias_and_residual_are_added() {
    let mut noise = Noise(4);
    let (n, k, rows) = (37, 256, 11);
    let (bias, start) = (noise.values(n), noise.values(rows * n));
    for format in [Format::F32, Format::Bf16, Format::Q8_0, Format::Q4K] {
        let data = file_matrix(format, n, k, &mut noise);
        let x = noise.values(rows * k);
        let w = pack(format, n, k, &data, WeightFormat::Auto, 2);
        for isa in Isa::available() {
            let got = product(isa, &w, &x, rows, Some(&bias), Some(&start));
            let plus = |row: usize, feature: usize| f64::from(bias[feature]) + f64::from(start[row * n + feature]);
            let error = relative_error(&w, &x, rows, &got, plus);
            assert!(error <= tolerance(isa, w.activation_kind()).max(1e-5), "{} {format:?}: {error:.2e}", isa.name());
        }
    }
}

#[test]
fn zero_rows_and_values_that_are_not_finite_stay_in_their_row() {
    let mut noise = Noise(5);
    let (n, k) = (32, 128);
    for format in [Format::F32, Format::Bf16, Format::Q8_0, Format::Q4_0] {
        let data = file_matrix(format, n, k, &mut noise);
        let w = pack(format, n, k, &data, WeightFormat::Auto, 1);
        let mut x = noise.values(4 * k);
        x[..k].fill(0.0);
        x[k + 7] = f32::NAN;
        x[2 * k + 9] = f32::INFINITY;
        for isa in Isa::available() {
            let got = product(isa, &w, &x, 4, None, None);
            assert!(got[..n].iter().all(|v| *v == 0.0), "{} {format:?}: a zero row", isa.name());
            assert!(got[n..2 * n].iter().all(|v| v.is_nan()), "{} {format:?}: a NaN row", isa.name());
            assert!(got[2 * n..3 * n].iter().all(|v| !v.is_finite()), "{} {format:?}: an infinite row", isa.name());
            assert!(got[3 * n..].iter().all(|v| v.is_finite()), "{} {format:?}: the row after them", isa.name());
        }
    }
}
