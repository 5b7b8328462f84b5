//! The operations of training on a device against those of the processor (which are checked against doubles and differences in
//! `src/train/tests.rs`).

use std::cell::Cell;

use tidemill_kernels::cuda::train::{DeviceCompute, LogProbs, Product, Region, Values};
use tidemill_kernels::train::{self, Attention, Block, Compute, Dropout, Operand, Pieces, Precision, Rotation, Span, View};
use tidemill_kernels::*;

use super::{Noise, Weight, error};

const BOTH: [Precision; 2] = [Precision::F32, Precision::Bf16];

/// Opens a device for a precision; where it is emulated, the threads of a block run in one order or the other.
pub type Open<'a> = &'a dyn Fn(Precision, bool) -> DeviceCompute;

/// What compares some of them.
pub type Comparison = for<'a> fn(Open<'a>);

/// All of them.
pub const ALL: [(&str, Comparison); 7] = [
    ("training: products of all orientations and ragged shapes", products_of_all_orientations_and_ragged_shapes),
    ("training: frozen weights of files both ways", frozen_weights_of_files_both_ways),
    ("training: norms of rows and heads with their derivatives", norms_of_rows_and_heads_with_their_derivatives),
    ("training: rotation gate dropout and rows that are moved", rotation_gate_dropout_and_rows_that_are_moved),
    ("training: attention over packed segments with its derivative", attention_over_packed_segments_with_its_derivative),
    ("training: attention's derivative is that of differences", attentions_derivative_is_that_of_differences),
    ("training: log probabilities over a vocabulary in pieces", log_probabilities_over_a_vocabulary_in_pieces),
];

/// The processor's, exact.
fn processor() -> Compute {
    Compute::new(1, None, Precision::F32).unwrap()
}

/// What a comparison of the two may be off by, relative to the largest element.
fn tolerance(precision: Precision) -> f64 {
    match precision {
        Precision::F32 => 1e-5,
        Precision::Bf16 => 2e-2,
    }
}

/// Room for a result with poison in it and behind it.
fn poisoned(compute: &mut DeviceCompute, len: usize) -> Region {
    compute.upload(&vec![f32::NAN; len + 40]).unwrap()
}

/// The result, after a look at what lies behind it.
fn result(compute: &mut DeviceCompute, region: &Region) -> Vec<f32> {
    let mut all = compute.download(region.all()).unwrap();
    let behind = all.split_off(all.len() - 40);
    assert!(behind.iter().all(|value| value.is_nan()), "written behind the result");
    all
}

fn room(region: &Region) -> Values<'_> {
    region.part(0..region.len() - 40)
}

thread_local! {
    static WORST: Cell<f64> = const { Cell::new(0.0) };
}

/// The largest error since the last time, as a share of what is allowed.
pub fn worst() -> f64 {
    WORST.take()
}

fn near(got: &[f32], want: &[f32], tolerance: f64, what: &str) {
    let off = error(got, want);
    WORST.set(WORST.get().max(off / tolerance));
    assert!(off <= tolerance, "{what}: {off:e}");
}

pub fn products_of_all_orientations_and_ragged_shapes(device: Open<'_>) {
    let shapes = [(1, 1, 1), (3, 5, 7), (16, 8, 32), (37, 70, 33), (130, 129, 64), (70, 150, 0), (5, 300, 130)];
    let mut noise = Noise::new(1);
    for (case, (m, n, k)) in shapes.into_iter().enumerate() {
        for (left_turned, right_turned) in [(false, false), (false, true), (true, false), (true, true)] {
            // Lines that start anywhere, or where four may be read at once.
            let apart = if case % 2 == 0 { 3 } else { 4 };
            let line = |width: usize| width.next_multiple_of(4) + apart;
            let (ls, rs, os) = (line(if left_turned { m } else { k }), line(if right_turned { k } else { n }), n + 2);
            let left = noise.values(ls * if left_turned { k } else { m }.max(1), 1.0);
            let right = noise.values(rs * if right_turned { n } else { k }.max(1), 1.0);
            let before = noise.values(m * os, 1.0);
            let on_host = |data, stride, turned| match turned {
                false => View::Rows { data, stride },
                true => View::Columns { data, stride },
            };
            let mut want = before.clone();
            let product = train::Product {
                m,
                n,
                k,
                left: on_host(&left, ls, left_turned),
                right: Operand::View(on_host(&right, rs, right_turned)),
                scale: 0.5,
                store: Store::Add,
            };
            processor().matmul(&product, &mut want, os).unwrap();
            let mut alone = vec![f32::NAN; m * os];
            processor().matmul(&train::Product { store: Store::Replace, ..product }, &mut alone, os).unwrap();
            for precision in BOTH {
                let compute = &mut device(precision, case % 2 == 1);
                let [a, b] = [&left, &right].map(|values| compute.upload(values).unwrap());
                let product = Product {
                    m,
                    n,
                    k,
                    left: if left_turned { a.all().columns(ls) } else { a.all().rows(ls) },
                    right: if right_turned { b.all().columns(rs) } else { b.all().rows(rs) },
                    scale: 0.5,
                    store: Store::Add,
                };
                let out = compute.upload(&[before.as_slice(), &[f32::NAN; 40]].concat()).unwrap();
                compute.matmul(&product, room(&out), os).unwrap();
                let what = format!("[{m}, {n}, {k}] {left_turned} {right_turned} {precision:?}");
                near(&result(compute, &out), &want, tolerance(precision), &what);
                let out = poisoned(compute, m * os);
                compute.matmul(&Product { store: Store::Replace, ..product }, room(&out), os).unwrap();
                let got = result(compute, &out);
                for (row, (got, alone)) in got.chunks(os).zip(alone.chunks(os)).enumerate() {
                    near(&got[..n], &alone[..n], tolerance(precision) * 4.0, &format!("{what}, row {row}"));
                    assert!(got[n..].iter().all(|value| value.is_nan()), "{what}: written beside the result");
                }
            }
        }
    }
}

pub fn frozen_weights_of_files_both_ways(device: Open<'_>) {
    let mut noise = Noise::new(2);
    let (m, k) = (19, 256);
    let weights = [
        Weight::random(&mut noise, 40, k, Format::Bf16, 0.5),
        Weight::random(&mut noise, 21, k, Format::Q4_1, 0.5),
        Weight::random(&mut noise, 9, k, Format::F32, 0.5),
    ];
    let order: Vec<u32> = (0..21).rev().collect();
    let mut sources = weights.each_ref().map(Weight::source);
    sources[1].row_order = Some(&order);
    let n = sources.iter().map(|source| source.n).sum();
    let (x, dy) = (noise.values(m * k, 1.0), noise.values(m * n, 1.0));
    let blocks = sources.map(Block::Weight);
    let (mut ahead, mut behind) = (vec![0.0; m * n], vec![0.0; m * k]);
    let product = train::Product {
        m,
        n,
        k,
        left: View::Rows { data: &x, stride: k },
        right: Operand::StackT(&blocks),
        scale: 1.0,
        store: Store::Replace,
    };
    processor().matmul(&product, &mut ahead, n).unwrap();
    let left = View::Rows { data: &dy, stride: n };
    let back = train::Product { n: k, k: n, left, right: Operand::Stack(&blocks), ..product };
    processor().matmul(&back, &mut behind, k).unwrap();
    for precision in BOTH {
        let compute = &mut device(precision, false);
        let weight = compute.weight(&sources).unwrap();
        assert_eq!((weight.n, weight.k), (n, k));
        let (x, dy) = (compute.upload(&x).unwrap(), compute.upload(&dy).unwrap());
        let out = poisoned(compute, m * n);
        let (left, right) = (x.all().rows(k), weight.columns());
        let product = Product { m, n, k, left, right, scale: 1.0, store: Store::Replace };
        compute.matmul(&product, room(&out), n).unwrap();
        near(&result(compute, &out), &ahead, tolerance(precision), "forward");
        let out = poisoned(compute, m * k);
        let product = Product { n: k, k: n, left: dy.all().rows(n), right: weight.rows(), ..product };
        compute.matmul(&product, room(&out), k).unwrap();
        near(&result(compute, &out), &behind, tolerance(precision), "backward");
        let narrow = Weight::random(&mut Noise::new(3), 4, 32, Format::F32, 1.0);
        assert!(compute.weight(&[sources[0], narrow.source()]).is_err());
    }
}

pub fn norms_of_rows_and_heads_with_their_derivatives(device: Open<'_>) {
    let mut noise = Noise::new(3);
    let heads = |stride, offset, count, width| Pieces { stride, offset, count, width };
    // Of the last, sums are made in parts.
    let cases = [
        (21, Pieces::rows(70)),
        (21, heads(53, 4, 3, 16)),
        (130, Pieces::rows(40)),
        (61, heads(100, 4, 5, 18)),
        (67, heads(90, 0, 9, 9)),
        (9, heads(40, 3, 16, 2)),
        (33, heads(70, 1, 8, 8)),
    ];
    for (case, (rows, pieces)) in cases.into_iter().enumerate() {
        let (x, dy) = (noise.values(rows * pieces.stride, 1.0), noise.values(rows * pieces.stride, 1.0));
        let (weight, before) = (noise.values(pieces.width, 1.0), noise.values(pieces.width, 1.0));
        let cpu = &mut processor();
        let (mut out, mut inverse) = (x.clone(), vec![0.0; rows * pieces.count]);
        cpu.rms_norm(&x, pieces, &weight, 1e-5, &mut out, &mut inverse).unwrap();
        let (mut dx, mut added, mut dweight) = (dy.clone(), dy.clone(), before.clone());
        cpu.rms_norm_back(&x, pieces, &weight, &inverse, &dy, &mut dx, Store::Replace).unwrap();
        cpu.rms_norm_back(&x, pieces, &weight, &inverse, &dy, &mut added, Store::Add).unwrap();
        cpu.rms_norm_back_weight(&x, pieces, &inverse, &dy, &mut dweight).unwrap();

        let compute = &mut device(Precision::F32, case % 2 == 1);
        let [x, y, w] = [&x, &dy, &weight].map(|values| compute.upload(values).unwrap());
        // What lies beside the pieces stays.
        let to = compute.region(x.len()).unwrap();
        compute.copy(x.all(), to.all()).unwrap();
        let roots = poisoned(compute, rows * pieces.count);
        compute.rms_norm(x.all(), pieces, w.all(), 1e-5, to.all(), room(&roots)).unwrap();
        near(&compute.download(to.all()).unwrap(), &out, 1e-5, "rms_norm");
        near(&result(compute, &roots), &inverse, 1e-5, "inverse");
        for (store, want) in [(Store::Replace, &dx), (Store::Add, &added)] {
            compute.copy(y.all(), to.all()).unwrap();
            let given = [x.all(), w.all(), room(&roots), y.all()];
            compute.rms_norm_back(given, pieces, to.all(), store).unwrap();
            near(&compute.download(to.all()).unwrap(), want, 1e-5, "rms_norm_back");
        }
        let slope = compute.upload(&[before.as_slice(), &[f32::NAN; 40]].concat()).unwrap();
        compute.rms_norm_back_weight([x.all(), room(&roots), y.all()], pieces, room(&slope)).unwrap();
        near(&result(compute, &slope), &dweight, 1e-5, "rms_norm_back_weight");
        assert!(compute.rms_norm(x.all(), pieces, x.all(), 1e-5, to.all(), room(&roots)).is_err());
        assert!(compute.rms_norm_back([x.all(), w.all(), w.all(), y.all()], pieces, to.part(0..3), Store::Add).is_err());
    }
}

pub fn rotation_gate_dropout_and_rows_that_are_moved(device: Open<'_>) {
    let mut noise = Noise::new(4);
    let shape = HeadShape { heads: 3, kv_heads: 1, head_dim: 16 };
    let pieces = Pieces { stride: 80, offset: 16, count: 3, width: 16 };
    let rotation = Rotation::new(&[1.0, 0.3, 0.01], 1.0, 50);
    let positions = [0, 7, 49, 3, 4];
    let x = noise.values(5 * 80, 1.0);
    let compute = &mut device(Precision::F32, false);
    let spans = [Span { first: 0, len: 5, prefix: None }];
    let seen = compute.seen(&spans, &positions, shape).unwrap();
    let turns = compute.turns(&rotation).unwrap();
    let on_card = compute.upload(&x).unwrap();
    for back in [false, true] {
        let mut want = compute.download(on_card.all()).unwrap();
        processor().rotate(&mut want, pieces, &rotation, &positions, back).unwrap();
        compute.rotate(on_card.all(), pieces, &turns, &seen, back).unwrap();
        near(&compute.download(on_card.all()).unwrap(), &want, 1e-6, "rotate");
    }
    near(&compute.download(on_card.all()).unwrap(), &x, 1e-6, "there and back");
    let beyond = compute.seen(&spans, &[0, 7, 50, 3, 4], shape).unwrap();
    assert!(compute.rotate(on_card.all(), pieces, &turns, &beyond, false).is_err());

    let (rows, width) = (3, 300);
    let dy = noise.values(rows * width, 1.0);
    let along = compute.upload(&dy).unwrap();
    for (what, gelu) in [("silu", false), ("gelu", true)] {
        let gate_up = noise.values(rows * 2 * width, 3.0);
        let (mut gated, mut back) = (vec![0.0; rows * width], vec![0.0; rows * 2 * width]);
        if gelu {
            processor().gelu_mul(&gate_up, width, &mut gated).unwrap();
            processor().gelu_mul_back(&gate_up, width, &dy, &mut back).unwrap();
        } else {
            processor().silu_mul(&gate_up, width, &mut gated).unwrap();
            processor().silu_mul_back(&gate_up, width, &dy, &mut back).unwrap();
        }
        let gate_up = compute.upload(&gate_up).unwrap();
        let out = poisoned(compute, gated.len());
        let forward = if gelu { DeviceCompute::gelu_mul } else { DeviceCompute::silu_mul };
        forward(compute, gate_up.all(), width, room(&out)).unwrap();
        near(&result(compute, &out), &gated, 1e-5, what);
        let out = poisoned(compute, back.len());
        let backward = if gelu { DeviceCompute::gelu_mul_back } else { DeviceCompute::silu_mul_back };
        backward(compute, gate_up.all(), width, along.all(), room(&out)).unwrap();
        near(&result(compute, &out), &back, 1e-5, &format!("{what}, back"));
        // The ends of what there is; gelu's cubes would be infinite.
        let (ends, ones) = (compute.upload(&[3e38, -3e38, 1.0, 1.0]).unwrap(), compute.upload(&[1.0; 2]).unwrap());
        let out = poisoned(compute, 4);
        forward(compute, ends.all(), 2, out.part(0..2)).unwrap();
        assert_eq!(compute.download(out.part(0..2)).unwrap(), [3e38, 0.0], "{what}");
        backward(compute, ends.all(), 2, ones.all(), room(&out)).unwrap();
        assert_eq!(result(compute, &out), [1.0, 0.0, 3e38, 0.0], "{what}, back");
    }

    let x = noise.values(4_099, 1.0);
    for store in [Store::Replace, Store::Add] {
        let mut want = x.clone();
        let dropout = Dropout::new(0.3, 0x1234_5678_9abc_def0).unwrap();
        processor().dropout(dropout, &x, &mut want, store).unwrap();
        let from = compute.upload(&x).unwrap();
        let out = compute.upload(&[x.as_slice(), &[f32::NAN; 40]].concat()).unwrap();
        compute.dropout(dropout, from.all(), room(&out), store).unwrap();
        // The same masks; a card may round a product and a sum once.
        near(&result(compute, &out), &want, 1e-6, &format!("dropout, {store:?}"));
    }

    let (table, picked) = (noise.values(6 * 33, 1.0), [4, 0, 4, 5, 4]);
    let from = compute.upload(&table).unwrap();
    let out = poisoned(compute, 5 * 33);
    compute.gather(from.all(), &picked, 33, room(&out)).unwrap();
    let gathered = result(compute, &out);
    assert!(picked.iter().zip(gathered.chunks(33)).all(|(row, got)| got == &table[*row as usize * 33..][..33]));
    let to = poisoned(compute, 6 * 33);
    compute.gather_back(room(&out), &picked, 33, room(&to)).unwrap();
    let mut want = vec![0.0; 6 * 33];
    for (row, values) in picked.iter().zip(gathered.chunks(33)) {
        want[*row as usize * 33..][..33].iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
    }
    assert_eq!(result(compute, &to), want);
    assert!(compute.gather(from.all(), &[6], 33, to.part(0..33)).is_err());

    let (bias, sums) = (noise.values(33, 1.0), noise.values(33, 1.0));
    let held = compute.upload(&bias).unwrap();
    compute.add_bias(held.all(), room(&out)).unwrap();
    let with: Vec<f32> = gathered.iter().enumerate().map(|(i, value)| value + bias[i % 33]).collect();
    assert_eq!(result(compute, &out), with);
    let along = compute.upload(&[sums.as_slice(), &[f32::NAN; 40]].concat()).unwrap();
    compute.bias_back(room(&out), room(&along)).unwrap();
    let want: Vec<f32> = (0..33).map(|i| sums[i] + (0..5).map(|row| with[row * 33 + i]).sum::<f32>()).collect();
    near(&result(compute, &along), &want, 1e-6, "bias_back");
    let twice = compute.upload(&[with.as_slice(), &[f32::NAN; 40]].concat()).unwrap();
    compute.add(room(&out), room(&twice)).unwrap();
    assert_eq!(result(compute, &twice), with.iter().map(|value| 2.0 * value).collect::<Vec<_>>());
    let factors = compute.upload(&[1.0, -2.0, 0.5, 0.0, 3.0]).unwrap();
    compute.scale_rows(room(&out), factors.all()).unwrap();
    let want: Vec<f32> = with.iter().enumerate().map(|(i, v)| v * [1.0, -2.0, 0.5, 0.0, 3.0][i / 33]).collect();
    assert_eq!(result(compute, &out), want);
}

/// Segments with and without prefixes, as trainings pack them.
fn packed(noise: &mut Noise, most: usize) -> (Vec<Span>, Vec<u32>) {
    let (mut spans, mut positions): (Vec<Span>, Vec<u32>) = (Vec::new(), Vec::new());
    for _ in 0..noise.between(1, 3) {
        let mut push = |len: usize, prefix: Option<usize>| {
            let start = prefix.map_or(0, |prefix: usize| spans[prefix].len);
            spans.push(Span { first: positions.len(), len, prefix });
            positions.extend((start..start + len).map(|position| position as u32));
            spans.len() - 1
        };
        let prompt = push(noise.between(1, most), None);
        for _ in 0..noise.between(0, 2) {
            push(noise.between(1, most), Some(prompt));
        }
    }
    (spans, positions)
}

pub fn attention_over_packed_segments_with_its_derivative(device: Open<'_>) {
    let mut noise = Noise::new(5);
    let cases =
        [(4, 2, 16, None), (3, 1, 64, None), (2, 2, 40, Some(9)), (4, 1, 72, Some(3)), (2, 1, 128, None), (2, 2, 136, Some(20))];
    for (case, (heads, kv_heads, head_dim, sliding_window)) in cases.into_iter().enumerate() {
        for most in [12, 75] {
            let (spans, positions) = packed(&mut noise, most);
            let rows = positions.len();
            let shape = HeadShape { heads, kv_heads, head_dim };
            let spec = AttentionSpec { scale: 1.0 / (head_dim as f32).sqrt(), sliding_window, soft_cap: None, alibi: None };
            let call = Attention { spans: &spans, positions: &positions, shape, spec };
            let qkv = noise.values(rows * (heads + 2 * kv_heads) * head_dim, 1.0);
            let dout = noise.values(rows * heads * head_dim, 1.0);
            let (mut out, mut lse, mut dqkv) = (vec![0.0; dout.len()], vec![0.0; rows * heads], vec![0.0; qkv.len()]);
            processor().attention(call, &qkv, &mut out, &mut lse).unwrap();
            processor().attention_back(call, &qkv, &out, &lse, &dout, &mut dqkv).unwrap();
            for precision in BOTH {
                let what = format!("{heads} {kv_heads} {head_dim} {sliding_window:?} {precision:?} {spans:?}");
                let compute = &mut device(precision, case % 2 == 1);
                let seen = compute.seen(&spans, &positions, shape).unwrap();
                let [qkv, dout] = [&qkv, &dout].map(|values| compute.upload(values).unwrap());
                let (to, sums) = (poisoned(compute, out.len()), poisoned(compute, lse.len()));
                compute.attention(&call, &seen, qkv.all(), room(&to), room(&sums)).unwrap();
                near(&result(compute, &to), &out, tolerance(precision), &what);
                near(&result(compute, &sums), &lse, tolerance(precision), &what);
                let back = poisoned(compute, dqkv.len());
                let given = [qkv.all(), room(&to), room(&sums), dout.all()];
                compute.attention_back(&call, &seen, given, room(&back)).unwrap();
                near(&result(compute, &back), &dqkv, 2.0 * tolerance(precision), &format!("back, {what}"));
                let capped = AttentionSpec { soft_cap: Some(30.0), ..spec };
                let inclined = AttentionSpec { alibi: Some(Vector(0)), ..spec };
                for spec in [capped, inclined] {
                    let refused = Attention { spec, ..call };
                    assert!(compute.attention(&refused, &seen, qkv.all(), room(&to), room(&sums)).is_err());
                }
            }
        }
    }
    let wide = HeadShape { heads: 1, kv_heads: 1, head_dim: 257 };
    let refused = device(Precision::Bf16, false).seen(&[], &[], wide).err().unwrap().to_string();
    assert!(refused.contains("257") && refused.contains("--device cpu"), "{refused}");
}

pub fn attentions_derivative_is_that_of_differences(device: Open<'_>) {
    let mut noise = Noise::new(6);
    let (spans, positions) = packed(&mut noise, 9);
    let (rows, shape) = (positions.len(), HeadShape { heads: 2, kv_heads: 1, head_dim: 12 });
    let spec = AttentionSpec { scale: 0.4, sliding_window: Some(7), soft_cap: None, alibi: None };
    let call = Attention { spans: &spans, positions: &positions, shape, spec };
    let qkv = noise.values(rows * 4 * 12, 1.0);
    let dout = noise.values(rows * 2 * 12, 1.0);
    let compute = &mut device(Precision::F32, false);
    let seen = compute.seen(&spans, &positions, shape).unwrap();
    let (to, sums) = (poisoned(compute, dout.len()), poisoned(compute, rows * 2));
    let loss = |qkv: &[f32], compute: &mut DeviceCompute| -> f64 {
        let qkv = compute.upload(qkv).unwrap();
        compute.attention(&call, &seen, qkv.all(), room(&to), room(&sums)).unwrap();
        result(compute, &to).iter().zip(&dout).map(|(out, dout)| f64::from(*out) * f64::from(*dout)).sum()
    };
    let directions: Vec<Vec<f32>> = (0..6).map(|_| noise.values(qkv.len(), 1.0)).collect();
    let wanted: Vec<f64> = directions
        .iter()
        .map(|direction| {
            let mut along = |step: f32| {
                let moved: Vec<f32> = qkv.iter().zip(direction).map(|(value, d)| value + step * d).collect();
                loss(&moved, &mut *compute)
            };
            (along(1e-2) - along(-1e-2)) / 2e-2
        })
        .collect();
    loss(&qkv, &mut *compute);
    let (given, along) = (compute.upload(&qkv).unwrap(), compute.upload(&dout).unwrap());
    let back = poisoned(compute, qkv.len());
    compute.attention_back(&call, &seen, [given.all(), room(&to), room(&sums), along.all()], room(&back)).unwrap();
    let slopes = result(compute, &back);
    let size = slopes.iter().map(|slope| f64::from(*slope).powi(2)).sum::<f64>().sqrt();
    for (direction, want) in directions.iter().zip(wanted) {
        let got: f64 = slopes.iter().zip(direction).map(|(slope, d)| f64::from(*slope) * f64::from(*d)).sum();
        assert!((got - want).abs() <= 5e-3 * size, "{got} is not {want}, of {size}");
    }
}

pub fn log_probabilities_over_a_vocabulary_in_pieces(device: Open<'_>) {
    let mut noise = Noise::new(7);
    let (rows, width, vocabulary) = (5, 24, 700);
    let (hidden, dout) = (noise.values(rows * width, 1.0), noise.values(rows, 1.0));
    let weight = Weight::random(&mut noise, vocabulary, width, Format::F32, 1.5);
    let head: Vec<f32> = weight.data.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    let tokens = [0, 127, 128, 699, 17];
    let cpu = train::LogProbs {
        hidden: &hidden,
        width,
        head: Block::Values { data: &head, n: vocabulary },
        vocabulary,
        tokens: &tokens,
        scale: 0.8,
    };
    let (mut out, mut sums, mut slopes) = (vec![0.0; rows], vec![0.0; rows], vec![0.0; hidden.len()]);
    processor().log_probs(cpu, &mut out, Some(&mut sums), Some(&mut slopes)).unwrap();
    let mut dhead = vec![0.0; head.len()];
    processor().log_probs_back_head(cpu, &sums, &dout, &mut dhead).unwrap();
    // The whole vocabulary at once, and pieces of 128 tokens.
    for (case, most) in [1 << 24, rows * 128].into_iter().enumerate() {
        for precision in BOTH {
            let compute = &mut device(precision, case == 1).with_logits(most);
            let (tolerance, what) = (2.0 * tolerance(precision), format!("{precision:?} {most}"));
            let frozen = compute.weight(&[weight.source()]).unwrap();
            let trained = compute.upload(&head).unwrap();
            let [states, along] = [&hidden, &dout].map(|values| compute.upload(values).unwrap());
            for head in [frozen.rows(), trained.all().rows(width)] {
                let call = LogProbs { hidden: states.all(), width, head, vocabulary, tokens: &tokens, scale: 0.8 };
                let (to, lse) = (poisoned(compute, rows), poisoned(compute, rows));
                compute.log_probs(call, room(&to), room(&lse), None).unwrap();
                near(&result(compute, &to), &out, tolerance, &what);
                let (to, lse, steep) = (poisoned(compute, rows), poisoned(compute, rows), poisoned(compute, hidden.len()));
                compute.log_probs(call, room(&to), room(&lse), Some(room(&steep))).unwrap();
                near(&result(compute, &to), &out, tolerance, &what);
                near(&result(compute, &lse), &sums, tolerance, &what);
                near(&result(compute, &steep), &slopes, tolerance, &format!("slopes, {what}"));
                let back = poisoned(compute, dhead.len());
                compute.log_probs_back_head(call, room(&lse), along.all(), room(&back)).unwrap();
                near(&result(compute, &back), &dhead, tolerance, &format!("head, {what}"));
                let other = LogProbs { tokens: &[0, 1, 2, 3, 700], ..call };
                assert!(compute.log_probs(other, room(&to), room(&lse), None).is_err());
            }
        }
    }
}
