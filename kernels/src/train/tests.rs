use super::*;
use crate::blocks::quantize_row;
use crate::ops::{AttentionSpec, Format, HeadShape, MatrixSource, Store};
use crate::random::uniform;

fn noise(seed: u64, n: usize) -> Vec<f32> {
    (0..n as u64).map(|i| (uniform(seed, i) * 2.0 - 1.0) as f32).collect()
}

/// Every instruction path of the machine, on one thread and on several.
fn machines() -> Vec<(Compute, Precision)> {
    let mut machines = Vec::new();
    for isa in Isa::available() {
        for threads in [1, 3] {
            for precision in [Precision::F32, Precision::Bf16] {
                machines.push((Compute::new(threads, Some(isa), precision).unwrap(), precision));
            }
        }
    }
    machines
}

fn each(mut test: impl FnMut(&mut Compute, Precision)) {
    machines().iter_mut().for_each(|(compute, precision)| test(compute, *precision));
}

/// `[m, k] · [k, n]` in doubles.
fn exact(m: usize, n: usize, k: usize, left: impl Fn(usize, usize) -> f32, right: impl Fn(usize, usize) -> f32) -> Vec<f64> {
    let mut out = vec![0.0; m * n];
    for i in 0..m {
        for j in 0..n {
            out[i * n + j] = (0..k).map(|p| f64::from(left(i, p)) * f64::from(right(p, j))).sum();
        }
    }
    out
}

fn close(got: &[f32], stride: usize, want: &[f64], m: usize, n: usize, k: usize, precision: Precision, what: &str) {
    // Operands are at most 1: an error per product of two roundings, and sums that wander.
    let tolerance = match precision {
        Precision::F32 => 2e-6 * (k as f64).sqrt() + 1e-6,
        Precision::Bf16 => 8e-3 * (k as f64).sqrt(),
    };
    for i in 0..m {
        for j in 0..n {
            let (got, want) = (f64::from(got[i * stride + j]), want[i * n + j]);
            assert!((got - want).abs() <= tolerance, "{what} [{m}, {n}, {k}] at {i}, {j}: {got} is not {want}");
        }
    }
}

fn view(data: &[f32], stride: usize, turned: bool) -> View<'_> {
    if turned { View::Columns { data, stride } } else { View::Rows { data, stride } }
}

#[test]
fn products_of_all_views_and_ragged_shapes() {
    let shapes =
        [(1, 1, 1), (3, 5, 7), (12, 32, 31), (17, 33, 64), (97, 260, 130), (100, 16, 1100), (16, 300, 1056), (33, 31, 2)];
    // What is exact does not depend on the machine, and takes longer than the products.
    let mut machines = machines();
    let at = |data: &[f32], stride: usize, turned: bool, i: usize, j: usize| {
        if turned { data[j * stride + i] } else { data[i * stride + j] }
    };
    for (case, (m, n, k)) in shapes.into_iter().enumerate() {
        let seed = 10 * case as u64;
        let (ls, rs, os) = (k.max(m) + 3, k.max(n) + 1, n + 2);
        let left = noise(seed, ls * ls.max(m));
        let right = noise(seed + 1, rs * rs.max(n));
        for (lt, rt) in [(false, false), (false, true), (true, false), (true, true)] {
            let once = exact(m, n, k, |i, p| at(&left, ls, lt, i, p), |p, j| at(&right, rs, rt, p, j));
            let with_half: Vec<f64> = once.iter().map(|v| v * 1.5).collect();
            let (left, right) = (view(&left, ls, lt), Operand::View(view(&right, rs, rt)));
            machines.iter_mut().for_each(|(compute, precision)| {
                let mut out = vec![f32::NAN; m * os];
                let mut product = Product { m, n, k, left, right, scale: 1.0, store: Store::Replace };
                compute.matmul(&product, &mut out, os).unwrap();
                close(&out, os, &once, m, n, k, *precision, "replaced");
                product.store = Store::Add;
                product.scale = 0.5;
                compute.matmul(&product, &mut out, os).unwrap();
                close(&out, os, &with_half, m, n, k, *precision, "added");
                let padding = (0..m - 1).flat_map(|i| &out[i * os + n..(i + 1) * os]);
                assert!(padding.into_iter().all(|v| v.is_nan()), "written beside the result");
            });
        }
    }
}

#[test]
fn stacks_of_values_and_file_weights_both_ways() {
    let (n1, n2, n3, k) = (40, 21, 300, 512);
    let plain = noise(1, n1 * k);
    let half: Vec<u8> = noise(2, n2 * k).iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect();
    let order: Vec<u32> = (0..n2 as u32).rev().collect();
    let row_bytes = Format::Q4_1.row_bytes(k).unwrap();
    let mut quantised = vec![0; n3 * row_bytes];
    for (row, out) in noise(3, n3 * k).chunks(k).zip(quantised.chunks_mut(row_bytes)) {
        quantize_row(Format::Q4_1, row, out).unwrap();
    }
    let blocks = [
        Block::Values { data: &plain, n: n1 },
        Block::Weight(MatrixSource { n: n2, k, format: Format::Bf16, data: &half, row_order: Some(&order) }),
        Block::Weight(MatrixSource { n: n3, k, format: Format::Q4_1, data: &quantised, row_order: None }),
    ];
    let n = n1 + n2 + n3;
    let mut dense = plain.clone();
    for row in (0..n2).rev() {
        dense.extend(half[row * k * 2..][..k * 2].as_chunks::<2>().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()));
    }
    for row in 0..n3 {
        let mut values = vec![0.0; k];
        crate::blocks::dequantize_row(Format::Q4_1, &quantised[row * row_bytes..][..row_bytes], &mut values).unwrap();
        dense.extend(values);
    }
    let m = 37;
    let x = noise(4, m * k);
    let y = noise(5, m * n);
    let ahead = exact(m, n, k, |i, p| x[i * k + p], |p, j| dense[j * k + p]);
    let behind = exact(m, k, n, |i, p| y[i * n + p], |p, j| dense[p * k + j]);
    each(|compute, precision| {
        let mut out = vec![f32::NAN; m * n];
        let forward = Product {
            m,
            n,
            k,
            left: View::Rows { data: &x, stride: k },
            right: Operand::StackT(&blocks),
            scale: 1.0,
            store: Store::Replace,
        };
        compute.matmul(&forward, &mut out, n).unwrap();
        close(&out, n, &ahead, m, n, k, precision, "forward");
        let mut back = vec![f32::NAN; m * k];
        let backward = Product {
            m,
            n: k,
            k: n,
            left: View::Rows { data: &y, stride: n },
            right: Operand::Stack(&blocks),
            scale: 1.0,
            store: Store::Replace,
        };
        compute.matmul(&backward, &mut back, k).unwrap();
        close(&back, k, &behind, m, k, n, precision, "backward");
    });
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut compute = Compute::new(1, None, Precision::F32).unwrap();
    let data = noise(1, 12);
    let mut out = vec![0.0; 12];
    let rows = View::Rows { data: &data, stride: 4 };
    let good = Product { m: 3, n: 4, k: 3, left: rows, right: Operand::View(rows), scale: 1.0, store: Store::Replace };
    compute.matmul(&good, &mut out, 4).unwrap();
    let short = [Block::Values { data: &data, n: 5 }];
    for bad in [Product { m: 4, ..good }, Product { k: 5, ..good }, Product { right: Operand::StackT(&short), ..good }] {
        assert!(matches!(compute.matmul(&bad, &mut out, 4), Err(KernelError::Shape { .. })));
    }
    assert!(compute.matmul(&good, &mut out[..11], 4).is_err());
    assert!(compute.matmul(&good, &mut out, 3).is_err());
    let empty = Product { m: 3, n: 4, k: 0, ..good };
    compute.matmul(&empty, &mut out, 4).unwrap();
    assert_eq!(out, [0.0; 12]);
}

/// The derivative of `loss` along `x[i]` by central differences in doubles.
fn difference(x: &[f64], i: usize, loss: &dyn Fn(&[f64]) -> f64) -> f64 {
    let mut moved = x.to_vec();
    let step = 1e-5 * x[i].abs().max(1.0);
    moved[i] = x[i] + step;
    let above = loss(&moved);
    moved[i] = x[i] - step;
    (above - loss(&moved)) / (2.0 * step)
}

fn double(x: &[f32]) -> Vec<f64> {
    x.iter().map(|v| f64::from(*v)).collect()
}

fn weighted(values: &[f64], weights: &[f32]) -> f64 {
    values.iter().zip(weights).map(|(v, w)| v * f64::from(*w)).sum()
}

/// Central differences of `Σ weights · forward(x)` along every element of `x`.
fn derivative(x: &[f32], weights: &[f32], forward: &dyn Fn(&[f64]) -> Vec<f64>) -> Vec<f64> {
    let x = double(x);
    (0..x.len()).map(|i| difference(&x, i, &|x| weighted(&forward(x), weights))).collect()
}

fn same(got: &[f32], want: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((f64::from(*got) - want).abs() <= tolerance * want.abs().max(1.0), "{what} at {i}: {got} is not {want}");
    }
}

#[test]
fn norms_of_rows_and_heads() {
    let forward = |x: &[f64], weight: &[f64], pieces: Pieces, rows: usize| {
        let mut out = x.to_vec();
        for row in 0..rows {
            for piece in 0..pieces.count {
                let at = row * pieces.stride + pieces.offset + piece * pieces.width;
                let x = &x[at..at + pieces.width];
                let inverse = (x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64 + 1e-5).sqrt().recip();
                for (i, v) in x.iter().enumerate() {
                    out[at + i] = v * inverse * weight[i];
                }
            }
        }
        out
    };
    for pieces in [Pieces::rows(70), Pieces { stride: 21, offset: 4, count: 3, width: 5 }] {
        let rows = 3;
        let x = noise(1, rows * pieces.stride);
        let (weight, dy) = (noise(2, pieces.width), noise(3, x.len()));
        let wide = double(&weight);
        let want = forward(&double(&x), &wide, pieces, rows);
        let along_x = derivative(&x, &dy, &|x| forward(x, &wide, pieces, rows));
        let along_weight = derivative(&weight, &dy, &|w| forward(&double(&x), w, pieces, rows));
        each(|compute, _| {
            let (mut out, mut inverse) = (x.clone(), vec![f32::NAN; rows * pieces.count]);
            compute.rms_norm(&x, pieces, &weight, 1e-5, &mut out, &mut inverse).unwrap();
            same(&out, &want, 1e-5, "rms_norm");
            // What lies beside the pieces is passed on, and so is its derivative.
            let mut dx = dy.clone();
            compute.rms_norm_back(&x, pieces, &weight, &inverse, &dy, &mut dx, Store::Replace).unwrap();
            same(&dx, &along_x, 1e-4, "rms_norm_back");
            let mut twice = dx.clone();
            compute.rms_norm_back(&x, pieces, &weight, &inverse, &dy, &mut twice, Store::Add).unwrap();
            let inside = pieces.offset..pieces.offset + pieces.width;
            for (twice, once) in twice[inside.clone()].iter().zip(&dx[inside]) {
                assert!((twice - 2.0 * once).abs() <= 1e-5);
            }
            let mut dweight = vec![0.0; pieces.width];
            compute.rms_norm_back_weight(&x, pieces, &inverse, &dy, &mut dweight).unwrap();
            same(&dweight, &along_weight, 1e-4, "rms_norm_back_weight");
        });
    }
}

#[test]
fn rotation_and_its_inverse() {
    let pieces = Pieces { stride: 26, offset: 2, count: 3, width: 8 };
    let frequencies = [1.0f32, 0.1, 0.01];
    let rotation = Rotation::new(&frequencies, 1.0, 50);
    let positions = [0, 7, 49, 3];
    let x = noise(1, 4 * 26);
    let forward = |x: &[f64]| {
        let mut out = x.to_vec();
        for (row, position) in positions.iter().enumerate() {
            for piece in 0..3 {
                for (i, frequency) in frequencies.iter().enumerate() {
                    let at = row * 26 + 2 + piece * 8 + i;
                    let (sin, cos) = (f64::from(*position) * f64::from(*frequency)).sin_cos();
                    out[at] = x[at] * cos - x[at + 3] * sin;
                    out[at + 3] = x[at + 3] * cos + x[at] * sin;
                }
            }
        }
        out
    };
    let dy = noise(2, x.len());
    let (want, along_x) = (forward(&double(&x)), derivative(&x, &dy, &forward));
    each(|compute, _| {
        let mut out = x.clone();
        compute.rotate(&mut out, pieces, &rotation, &positions, false).unwrap();
        same(&out, &want, 1e-5, "rotate");
        compute.rotate(&mut out, pieces, &rotation, &positions, true).unwrap();
        same(&out, &double(&x), 1e-5, "rotate back");
        let mut dx = dy.clone();
        compute.rotate(&mut dx, pieces, &rotation, &positions, true).unwrap();
        same(&dx, &along_x, 1e-4, "the derivative of rotate");
        assert!(compute.rotate(&mut out, pieces, &rotation, &[0, 7, 50, 3], false).is_err());
    });
}

#[test]
fn gated_activation() {
    let (rows, width) = (3, 37);
    let x: Vec<f32> = noise(1, rows * 2 * width).iter().map(|v| v * 6.0).collect();
    let dy = noise(2, rows * width);
    let forward = |x: &[f64]| {
        let mut out = Vec::new();
        for row in x.chunks(2 * width) {
            out.extend((0..width).map(|i| row[i] / (1.0 + (-row[i]).exp()) * row[width + i]));
        }
        out
    };
    let (want, along_x) = (forward(&double(&x)), derivative(&x, &dy, &forward));
    each(|compute, _| {
        let mut out = vec![f32::NAN; rows * width];
        compute.silu_mul(&x, width, &mut out).unwrap();
        same(&out, &want, 1e-5, "silu_mul");
        let mut dx = vec![f32::NAN; x.len()];
        compute.silu_mul_back(&x, width, &dy, &mut dx).unwrap();
        same(&dx, &along_x, 1e-4, "silu_mul_back");
    });
    let forward = |x: &[f64]| {
        let gelu = |g: f64| 0.5 * g * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g.powi(3))).tanh());
        let mut out = Vec::new();
        for row in x.chunks(2 * width) {
            out.extend((0..width).map(|i| gelu(row[i]) * row[width + i]));
        }
        out
    };
    let (want, along_x) = (forward(&double(&x)), derivative(&x, &dy, &forward));
    each(|compute, _| {
        let mut out = vec![f32::NAN; rows * width];
        compute.gelu_mul(&x, width, &mut out).unwrap();
        same(&out, &want, 1e-5, "gelu_mul");
        let mut dx = vec![f32::NAN; x.len()];
        compute.gelu_mul_back(&x, width, &dy, &mut dx).unwrap();
        same(&dx, &along_x, 1e-4, "gelu_mul_back");
        // The ends of what there is.
        compute.gelu_mul_back(&[3e38, -3e38, 1.0, 1.0], 2, &[1.0, 1.0], &mut dx[..4]).unwrap();
        assert_eq!(dx[..4], [1.0, 0.0, 3e38, 0.0]);
    });
}

#[test]
fn dropout_is_a_function_of_key_and_place() {
    assert!(Dropout::new(0.0, 1).is_none());
    // More than a task holds, and no whole number of blocks.
    let x = noise(1, 9_003);
    let factors = |compute: &mut Compute, probability: f64, key: u64| {
        let mut out = vec![f32::NAN; x.len()];
        compute.dropout(Dropout::new(probability, key).unwrap(), &x, &mut out, Store::Replace).unwrap();
        out
    };
    let mut first = None;
    each(|compute, _| {
        let out = factors(compute, 0.25, 7);
        let kept = out.iter().filter(|value| **value != 0.0).count() as f64 / x.len() as f64;
        // Five standard errors of a share of 0.75 are 0.023.
        assert!((kept - 0.75).abs() < 0.023, "{kept}");
        assert!(out.iter().zip(&x).all(|(out, x)| *out == 0.0 || (out - x / 0.75).abs() <= 1e-6 * x.abs()));
        let mut added = x.clone();
        compute.dropout(Dropout::new(0.25, 7).unwrap(), &x, &mut added, Store::Add).unwrap();
        assert!(added.iter().zip(out.iter().zip(&x)).all(|(added, (out, x))| *added == out + x));
        assert_ne!(factors(compute, 0.25, 8), out);
        // Threads and instructions change nothing.
        assert_eq!(first.get_or_insert_with(|| out.clone()), &out);
        assert!(compute.dropout(Dropout::new(0.25, 7).unwrap(), &x, &mut added[1..], Store::Add).is_err());
    });
}

#[test]
fn log_probabilities_over_a_vocabulary_in_pieces() {
    let (rows, width, vocabulary) = (5, 6, 2500);
    let hidden = noise(1, rows * width);
    let head: Vec<f32> = noise(2, vocabulary * width).iter().map(|v| v * 3.0).collect();
    let tokens = [0, 2047, 2048, 2499, 17];
    let scale = 0.8;
    let forward = |hidden: &[f64], head: &[f64]| -> Vec<f64> {
        let logit = |row: usize, token: usize| -> f64 {
            f64::from(scale) * (0..width).map(|i| hidden[row * width + i] * head[token * width + i]).sum::<f64>()
        };
        (0..rows)
            .map(|row| {
                let lse = (0..vocabulary).map(|token| logit(row, token).exp()).sum::<f64>().ln();
                logit(row, tokens[row] as usize) - lse
            })
            .collect()
    };
    let (wide, wide_head) = (double(&hidden), double(&head));
    let dout = noise(3, rows);
    let mut along_head = vec![0.0; head.len()];
    for row in 0..rows {
        let logit = |token: usize| -> f64 {
            f64::from(scale) * (0..width).map(|i| wide[row * width + i] * wide_head[token * width + i]).sum::<f64>()
        };
        let total: f64 = (0..vocabulary).map(|token| logit(token).exp()).sum();
        for token in 0..vocabulary {
            let own = if token == tokens[row] as usize { 1.0 } else { 0.0 };
            let factor = f64::from(scale) * f64::from(dout[row]) * (own - logit(token).exp() / total);
            (0..width).for_each(|i| along_head[token * width + i] += factor * wide[row * width + i]);
        }
    }
    let want = forward(&wide, &wide_head);
    let along_hidden = derivative(&hidden, &dout, &|hidden| forward(hidden, &wide_head));
    // By differences where a row is a label and where it is none.
    for i in [0, 5, 17 * width + 2, 2047 * width + 1, 2048 * width, 2499 * width + 5, 1234 * width] {
        let want = difference(&wide_head, i, &|head| weighted(&forward(&wide, head), &dout));
        assert!((along_head[i] - want).abs() <= 1e-6, "d/dhead[{i}] is {}, not {want}", along_head[i]);
    }
    each(|compute, precision| {
        let tolerance = if precision == Precision::F32 { 1e-5 } else { 3e-2 };
        let call = LogProbs {
            hidden: &hidden,
            width,
            head: Block::Values { data: &head, n: vocabulary },
            vocabulary,
            tokens: &tokens,
            scale,
        };
        let (mut out, mut slopes) = (vec![f32::NAN; rows], vec![f32::NAN; hidden.len()]);
        let mut sums = vec![f32::NAN; rows];
        compute.log_probs(call, &mut out, None, None).unwrap();
        same(&out, &want, tolerance, "log_probs");
        out.fill(f32::NAN);
        compute.log_probs(call, &mut out, Some(&mut sums), Some(&mut slopes)).unwrap();
        same(&out, &want, tolerance, "log_probs");
        slopes.chunks_mut(width).zip(&dout).for_each(|(slope, dout)| slope.iter_mut().for_each(|slope| *slope *= dout));
        same(&slopes, &along_hidden, tolerance, "the derivative of log_probs");
        let other = LogProbs { tokens: &[0, 1, 2, 3, 2500], ..call };
        assert!(compute.log_probs(other, &mut out, None, None).is_err());

        let mut dhead = vec![f32::NAN; head.len()];
        compute.log_probs_back_head(call, &sums, &dout, &mut dhead).unwrap();
        same(&dhead, &along_head, tolerance, "log_probs_back_head");
        assert!(compute.log_probs_back_head(call, &sums[1..], &dout, &mut dhead).is_err());
        assert!(compute.log_probs_back_head(call, &sums, &dout, &mut dhead[1..]).is_err());
    });
}

#[test]
fn a_product_goes_on_with_one_of_low_rank() {
    let (m, k, ranks) = (70, 1300, [5, 3]);
    let (n, rank) = ([30, 11, 40], 8);
    let (x, w, a) = (noise(1, m * k), noise(2, 81 * k), noise(3, rank * k));
    let (first, last) = (noise(4, 30 * 5), noise(5, 40 * 3));
    let weights = [Block::Values { data: &w, n: 81 }];
    let down = [Block::Values { data: &a, n: rank }];
    // The middle matrix is not adapted.
    let up = [
        Block::Corner { data: &first, n: n[0], rank: ranks[0], first: 0, scale: 0.5 },
        Block::Corner { data: &[], n: n[1], rank: 0, first: 5, scale: 1.0 },
        Block::Corner { data: &last, n: n[2], rank: ranks[1], first: 5, scale: 2.0 },
    ];
    let b = |feature: usize, r: usize| match (feature, r) {
        (0..30, 0..5) => 0.5 * first[feature * 5 + r],
        (41.., 5..) => 2.0 * last[(feature - 41) * 3 + r - 5],
        _ => 0.0,
    };
    let low = exact(m, rank, k, |i, p| x[i * k + p], |p, r| a[r * k + p]);
    let base = exact(m, 81, k, |i, p| x[i * k + p], |p, j| w[j * k + p]);
    let mut want = base.clone();
    for (index, want) in want.iter_mut().enumerate() {
        *want += (0..rank).map(|r| low[index / 81 * rank + r] * f64::from(b(index % 81, r))).sum::<f64>();
    }
    let dy = noise(6, m * 81);
    let back_low = exact(m, rank, 81, |i, j| dy[i * 81 + j], b);
    let mut back = exact(m, k, 81, |i, j| dy[i * 81 + j], |j, p| w[j * k + p]);
    for (index, want) in back.iter_mut().enumerate() {
        *want += (0..rank).map(|r| back_low[index / k * rank + r] * f64::from(a[r * k + index % k])).sum::<f64>();
    }
    each(|compute, precision| {
        let (mut out, mut got) = (vec![f32::NAN; m * 81], vec![f32::NAN; m * rank]);
        let left = View::Rows { data: &x, stride: k };
        let product = Product { m, n: 81, k, left, right: Operand::StackT(&weights), scale: 1.0, store: Store::Replace };
        let along = LowRank { rank, down: Some(Operand::StackT(&down)), up: Some(Operand::StackT(&up)) };
        compute.matmul_with(&product, Some(along), &mut got, &mut out, 81).unwrap();
        close(&got, rank, &low, m, rank, k, precision, "low");
        // The low part is as large as 8, and so is its rounding.
        close(&out, 81, &want, m, 81, 8 * k, precision, "with a low rank");
        out.fill(f32::NAN);
        compute.matmul_with(&product, Some(LowRank { down: None, ..along }), &mut got, &mut out, 81).unwrap();
        close(&out, 81, &want, m, 81, 8 * k, precision, "with a low part that is given");
        out.fill(f32::NAN);
        compute.matmul_with(&product, Some(LowRank { up: None, ..along }), &mut got, &mut out, 81).unwrap();
        close(&out, 81, &base, m, 81, k, precision, "down alone");
        close(&got, rank, &low, m, rank, k, precision, "low alone");

        // Where nothing was learnt yet, nothing changes, to the bit.
        let zeros = [Block::Corner { data: &[0.0; 81 * 8], n: 81, rank, first: 0, scale: 2.0 }];
        let mut plain = out.clone();
        compute.matmul(&product, &mut plain, 81).unwrap();
        compute
            .matmul_with(&product, Some(LowRank { up: Some(Operand::StackT(&zeros)), ..along }), &mut got, &mut out, 81)
            .unwrap();
        assert_eq!(plain, out);

        let (mut dx, mut got) = (vec![f32::NAN; m * k], vec![f32::NAN; m * rank]);
        let left = View::Rows { data: &dy, stride: 81 };
        let product = Product { m, n: k, k: 81, left, right: Operand::Stack(&weights), scale: 1.0, store: Store::Replace };
        let along = LowRank { rank, down: Some(Operand::Stack(&up)), up: Some(Operand::Stack(&down)) };
        compute.matmul_with(&product, Some(along), &mut got, &mut dx, k).unwrap();
        close(&got, rank, &back_low, m, rank, 81, precision, "low, back");
        close(&dx, k, &back, m, k, 8 * k, precision, "back with a low rank");
        assert!(compute.matmul_with(&product, Some(along), &mut got[1..], &mut dx, k).is_err());
    });
}

fn attention_in_doubles(call: Attention<'_>, qkv: &[f64]) -> Vec<f64> {
    let HeadShape { heads, kv_heads, head_dim } = call.shape;
    let (rows, width) = (call.positions.len(), (heads + 2 * kv_heads) * head_dim);
    let span_of = |row: usize| call.spans.iter().position(|span| (span.first..span.first + span.len).contains(&row)).unwrap();
    let mut out = vec![0.0; rows * heads * head_dim];
    for query in 0..rows {
        let span = call.spans[span_of(query)];
        let seen: Vec<usize> = (0..rows)
            .filter(|key| {
                let own = (span.first..=query).contains(key);
                let prefix = span.prefix.is_some_and(|prefix| span_of(*key) == prefix);
                let near = call
                    .spec
                    .sliding_window
                    .is_none_or(|window| call.positions[*key] as usize + window > call.positions[query] as usize);
                (own || prefix) && near
            })
            .collect();
        for head in 0..heads {
            let group = head / (heads / kv_heads);
            let at = |row: usize, part: usize, i: usize| qkv[row * width + part * head_dim + i];
            let scores: Vec<f64> = seen
                .iter()
                .map(|key| {
                    f64::from(call.spec.scale)
                        * (0..head_dim).map(|i| at(query, head, i) * at(*key, heads + group, i)).sum::<f64>()
                })
                .collect();
            let max = scores.iter().copied().fold(f64::MIN, f64::max);
            let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
            for (key, score) in seen.iter().zip(&scores) {
                for i in 0..head_dim {
                    out[(query * heads + head) * head_dim + i] +=
                        (score - max).exp() / total * at(*key, heads + kv_heads + group, i);
                }
            }
        }
    }
    out
}

#[test]
fn attention_over_segments_that_share_prompts() {
    let spans = [
        Span { first: 0, len: 5, prefix: None },
        Span { first: 5, len: 3, prefix: Some(0) },
        Span { first: 8, len: 4, prefix: Some(0) },
        Span { first: 12, len: 6, prefix: None },
        Span { first: 18, len: 0, prefix: Some(3) },
        Span { first: 18, len: 1, prefix: Some(3) },
    ];
    let positions: Vec<u32> = [0..5, 5..8, 5..9, 0..6, 6..7].into_iter().flatten().collect();
    let shape = HeadShape { heads: 4, kv_heads: 2, head_dim: 6 };
    let rows = positions.len();
    let qkv: Vec<f32> = noise(1, rows * 8 * 6).iter().map(|v| v * 2.0).collect();
    let dout = noise(2, rows * 4 * 6);
    for sliding_window in [None, Some(4)] {
        let call = Attention {
            spans: &spans,
            positions: &positions,
            shape,
            spec: AttentionSpec { scale: 0.4, sliding_window, soft_cap: None, alibi: None },
        };
        let want = attention_in_doubles(call, &double(&qkv));
        let along_qkv = derivative(&qkv, &dout, &|qkv| attention_in_doubles(call, qkv));
        each(|compute, precision| {
            let tolerance = if precision == Precision::F32 { 2e-5 } else { 5e-2 };
            let (mut out, mut lse) = (vec![f32::NAN; dout.len()], vec![f32::NAN; rows * 4]);
            compute.attention(call, &qkv, &mut out, &mut lse).unwrap();
            same(&out, &want, tolerance, "attention");
            let mut dqkv = vec![f32::NAN; qkv.len()];
            compute.attention_back(call, &qkv, &out, &lse, &dout, &mut dqkv).unwrap();
            same(&dqkv, &along_qkv, tolerance, "attention_back");
        });
    }
}

#[test]
fn attention_over_blocks_of_queries() {
    // Longer than a block of queries, so that blocks meet keys of earlier ones.
    let spans = [Span { first: 0, len: 150, prefix: None }, Span { first: 150, len: 140, prefix: Some(0) }];
    let positions: Vec<u32> = (0..290).collect();
    let shape = HeadShape { heads: 2, kv_heads: 1, head_dim: 16 };
    let qkv: Vec<f32> = noise(1, 290 * 4 * 16);
    let dout = noise(2, 290 * 2 * 16);
    for sliding_window in [None, Some(100)] {
        let call = Attention {
            spans: &spans,
            positions: &positions,
            shape,
            spec: AttentionSpec { scale: 0.25, sliding_window, soft_cap: None, alibi: None },
        };
        let want = attention_in_doubles(call, &double(&qkv));
        let mut results = Vec::new();
        each(|compute, precision| {
            let (mut out, mut lse, mut dqkv) = (vec![f32::NAN; dout.len()], vec![f32::NAN; 290 * 2], vec![f32::NAN; qkv.len()]);
            compute.attention(call, &qkv, &mut out, &mut lse).unwrap();
            same(&out, &want, if precision == Precision::F32 { 1e-5 } else { 2e-2 }, "attention");
            compute.attention_back(call, &qkv, &out, &lse, &dout, &mut dqkv).unwrap();
            results.push((precision, dqkv));
        });
        // All paths agree; that they agree with differences too is checked where differences are cheap, and here along a direction.
        let reference = results[0].1.clone();
        for (precision, dqkv) in &results {
            same(dqkv, &double(&reference), if *precision == Precision::F32 { 1e-5 } else { 2e-2 }, "attention_back");
        }
        let direction = noise(3, qkv.len());
        let along = |t: f64| {
            let moved: Vec<f64> = qkv.iter().zip(&direction).map(|(x, d)| f64::from(*x) + t * f64::from(*d)).collect();
            weighted(&attention_in_doubles(call, &moved), &dout)
        };
        let want = (along(1e-4) - along(-1e-4)) / 2e-4;
        let got: f64 = reference.iter().zip(&direction).map(|(g, d)| f64::from(*g) * f64::from(*d)).sum();
        assert!((got - want).abs() <= 1e-3 * want.abs().max(1.0), "along a direction: {got} is not {want}");
    }
}
