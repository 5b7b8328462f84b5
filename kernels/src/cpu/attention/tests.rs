//! Every path against attention by definition in f64, and the invariances that the engine relies on.

use super::*;
use crate::ops::KvSpec;

/// Small deterministic numbers.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }
    fn below(&mut self, n: usize) -> usize {
        self.next() as usize % n
    }
    /// Roughly normal.
    fn float(&mut self) -> f32 {
        (0..4).map(|_| self.next() as f32 / (1u64 << 30) as f32 - 1.0).sum::<f32>() * 0.866
    }
}

pub(super) fn paths(dtype: KvDtype, head_dim: usize) -> Vec<AttentionPath> {
    let mut paths: Vec<_> = Isa::available().into_iter().map(|isa| AttentionPath::choose(isa, dtype, head_dim)).collect();
    if dtype == KvDtype::Bf16 && Isa::detect() >= Isa::Avx512 {
        paths.push(AttentionPath::Bf16Avx512);
    }
    paths.dedup();
    paths
}

/// Sequences with keys and values for all their positions, of which the last `rows` are the step's.
struct Case {
    shape: HeadShape,
    spec: AttentionSpec,
    /// ALiBi's.
    slopes: Option<Vec<f32>>,
    dtype: KvDtype,
    storage: KvStorage,
    sequences: Vec<SequenceSpan>,
    blocks: Vec<u32>,
    /// `[tokens][stride]`
    qkv: Vec<f32>,
    stride: usize,
    /// `keys[sequence][position][kv_head * head_dim + d]`, as stored (rounded).
    keys: Vec<Vec<Vec<f32>>>,
    values: Vec<Vec<Vec<f32>>>,
}

const LAYER: usize = 1;

impl Case {
    /// `spans`: (context, rows) of each sequence. The cache is full of NaN but for what is written.
    fn new(seed: u64, shape: HeadShape, spec: AttentionSpec, dtype: KvDtype, spans: &[(usize, usize)]) -> Case {
        let mut noise = Noise(seed);
        let needed: usize = spans.iter().map(|(context, _)| context.div_ceil(BLOCK)).sum();
        let kv = KvSpec {
            layers: 2,
            blocks: needed + 3,
            block_size: BLOCK,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            dtype,
        };
        let storage = KvStorage::new(kv).unwrap();
        let poison = vec![f32::NAN; shape.head_dim];
        for slot in 0..kv.blocks * BLOCK {
            for head in 0..shape.kv_heads {
                // SAFETY: indices within the spec, one thread; here and below.
                unsafe { storage.write_row(LAYER, slot, head, &poison, &poison) };
            }
        }
        let mut free: Vec<u32> = (0..kv.blocks as u32).collect();
        for i in (1..free.len()).rev() {
            free.swap(i, noise.below(i + 1));
        }
        let width = shape.kv_heads * shape.head_dim;
        let round = |x: f32| if dtype == KvDtype::Bf16 { half::bf16::from_f32(x).to_f32() } else { x };
        let (mut sequences, mut blocks, mut keys, mut values) = (vec![], vec![], vec![], vec![]);
        let mut tokens = 0;
        for &(context, rows) in spans {
            let first_block = blocks.len() as u32;
            for _ in 0..context.div_ceil(BLOCK) {
                blocks.push(free.pop().unwrap());
            }
            let (mut sequence_keys, mut sequence_values) = (vec![], vec![]);
            for position in 0..context {
                let slot = blocks[first_block as usize + position / BLOCK] as usize * BLOCK + position % BLOCK;
                let k: Vec<f32> = (0..width).map(|_| round(noise.float())).collect();
                let v: Vec<f32> = (0..width).map(|_| round(noise.float())).collect();
                for head in 0..shape.kv_heads {
                    let range = head * shape.head_dim..(head + 1) * shape.head_dim;
                    // SAFETY: as above.
                    unsafe { storage.write_row(LAYER, slot, head, &k[range.clone()], &v[range]) };
                }
                sequence_keys.push(k);
                sequence_values.push(v);
            }
            keys.push(sequence_keys);
            values.push(sequence_values);
            let (first_row, rows) = (tokens as u32, rows as u32);
            sequences.push(SequenceSpan { first_row, rows, context_len: context as u32, first_block });
            tokens += rows as usize;
        }
        let stride = (shape.heads + 2 * shape.kv_heads) * shape.head_dim;
        let qkv = (0..tokens * stride).map(|_| noise.float() * 1.5).collect();
        Case { shape, spec, slopes: None, dtype, storage, sequences, blocks, qkv, stride, keys, values }
    }

    /// With slopes of ALiBi, of which the largest is 1/2.
    fn inclined(self) -> Case {
        let slopes = (0..self.shape.heads).map(|h| 0.5f32.powi(h as i32 + 1)).collect();
        Case { slopes: Some(slopes), ..self }
    }

    fn call<'a>(&'a self, path: AttentionPath, plan: &'a AttentionPlan, out: &mut [f32]) -> AttentionCall<'a> {
        AttentionCall {
            path,
            plan,
            sequences: &self.sequences,
            blocks: &self.blocks,
            storage: &self.storage,
            layer: LAYER,
            shape: self.shape,
            spec: self.spec,
            slopes: self.slopes.as_deref(),
            qkv: self.qkv.as_ptr(),
            qkv_stride: self.stride,
            out: out.as_mut_ptr(),
            out_stride: self.shape.heads * self.shape.head_dim,
        }
    }

    fn run_as(&self, path: AttentionPath, sequences: &[SequenceSpan], threads: usize) -> Vec<f32> {
        let mut plan = AttentionPlan::new();
        plan.build(sequences, &self.blocks, self.shape, threads);
        let tokens = self.qkv.len() / self.stride;
        let mut out = vec![f32::NAN; tokens * self.shape.heads * self.shape.head_dim];
        let call = AttentionCall { sequences, ..self.call(path, &plan, &mut out) };
        let mut scratch = AttentionScratch::new(self.shape.head_dim);
        for item in 0..plan.items() {
            // SAFETY: the case was built consistently; the path is one of this machine; one thread.
            unsafe { call.run_item(item, &mut scratch) };
        }
        for merge in 0..plan.merges() {
            // SAFETY: as above.
            unsafe { call.run_merge(merge, &mut scratch) };
        }
        out
    }

    fn run(&self, path: AttentionPath) -> Vec<f32> {
        self.run_as(path, &self.sequences, 1)
    }

    fn expected(&self) -> Vec<f64> {
        let HeadShape { heads, kv_heads, head_dim } = self.shape;
        let mut out = Vec::new();
        for (s, span) in self.sequences.iter().enumerate() {
            for row in 0..span.rows as usize {
                let position = (span.context_len - span.rows) as usize + row;
                let first = self.spec.sliding_window.map_or(0, |w| (position + 1).saturating_sub(w));
                for head in 0..heads {
                    let start = (span.first_row as usize + row) * self.stride + head * head_dim;
                    let q = &self.qkv[start..start + head_dim];
                    let at = head / (heads / kv_heads) * head_dim;
                    let scores: Vec<f64> = (first..=position)
                        .map(|p| {
                            let k = &self.keys[s][p][at..at + head_dim];
                            let dot: f64 = q.iter().zip(k).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                            let score = dot * f64::from(self.spec.scale);
                            let capped = self.spec.soft_cap.map_or(score, |c| f64::from(c) * (score / f64::from(c)).tanh());
                            capped - self.slopes.as_ref().map_or(0.0, |slopes| f64::from(slopes[head])) * (position - p) as f64
                        })
                        .collect();
                    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let total: f64 = scores.iter().map(|x| (x - max).exp()).sum();
                    out.extend((0..head_dim).map(|d| {
                        let weighted =
                            scores.iter().zip(first..).map(|(x, p)| (x - max).exp() * f64::from(self.values[s][p][at + d]));
                        weighted.sum::<f64>() / total
                    }));
                }
            }
        }
        out
    }

    fn check(&self) {
        let expected = self.expected();
        for path in paths(self.dtype, self.shape.head_dim) {
            let got = self.run(path);
            assert_eq!(got.len(), expected.len());
            // Queries and probabilities lose 8 bits where dot instructions take bf16; elsewhere everything is f32.
            let rounds = matches!(path, AttentionPath::Bf16Dot | AttentionPath::Bf16Amx);
            let tolerance = if rounds { 3e-2 } else { 2e-5 };
            let mut squares = 0.0;
            for (i, (&g, &e)) in got.iter().zip(&expected).enumerate() {
                let error = (f64::from(g) - e).abs();
                assert!(error < tolerance, "{path:?} {:?} {:?} element {i}: {g} not {e}", self.shape, self.spec);
                squares += error * error;
            }
            let rms = (squares / expected.len() as f64).sqrt();
            assert!(rms < if rounds { 4e-3 } else { 2e-6 }, "{path:?}: rms error {rms:e}");
        }
    }
}

fn plain(head_dim: usize) -> AttentionSpec {
    AttentionSpec { scale: 1.0 / (head_dim as f32).sqrt(), sliding_window: None, soft_cap: None, alibi: None }
}

fn shape(heads: usize, kv_heads: usize, head_dim: usize) -> HeadShape {
    HeadShape { heads, kv_heads, head_dim }
}

const RAGGED: [(usize, usize); 9] = [(1, 1), (32, 1), (33, 1), (31, 31), (95, 17), (200, 1), (257, 1), (300, 64), (530, 3)];

#[test]
fn every_path_agrees_with_the_definition_on_ragged_steps() {
    for dtype in [KvDtype::F32, KvDtype::Bf16] {
        for (seed, (heads, kv_heads, head_dim)) in
            [(9, 3, 64), (4, 4, 64), (8, 2, 80), (8, 1, 96), (6, 2, 128), (2, 1, 16), (3, 1, 48), (2, 2, 6), (4, 2, 256)]
                .into_iter()
                .enumerate()
        {
            Case::new(seed as u64, shape(heads, kv_heads, head_dim), plain(head_dim), dtype, &RAGGED).check();
        }
    }
}

#[test]
fn windows_soft_caps_and_slopes_agree_with_the_definition() {
    for dtype in [KvDtype::F32, KvDtype::Bf16] {
        for (window, soft_cap) in [
            (Some(1), None),
            (Some(7), None),
            (Some(32), Some(3.0)),
            (Some(100), None),
            (Some(290), Some(30.0)),
            (None, Some(1.5)),
            (None, None),
        ] {
            let spec = AttentionSpec { sliding_window: window, soft_cap, ..plain(64) };
            Case::new(7, shape(6, 2, 64), spec, dtype, &RAGGED).check();
            Case::new(8, shape(6, 2, 64), spec, dtype, &RAGGED).inclined().check();
        }
    }
}

#[test]
fn a_row_is_bitwise_the_same_in_any_chunk_and_any_split() {
    for dtype in [KvDtype::F32, KvDtype::Bf16] {
        for (head_dim, window) in [(64, None), (80, Some(150)), (64, Some(700))] {
            let spec = AttentionSpec { sliding_window: window, ..plain(head_dim) };
            // A chunk of 300 rows that crosses two segments, after a long context.
            let case = || Case::new(3, shape(6, 2, head_dim), spec, dtype, &[(1100, 300), (40, 40)]);
            let cases = [case(), case().inclined()];
            for (case, path) in cases.iter().flat_map(|case| paths(dtype, head_dim).into_iter().map(move |path| (case, path))) {
                let whole = case.run(path);
                for chunk in [1, 13, 128] {
                    let mut pieces = Vec::new();
                    for span in &case.sequences {
                        for first in (0..span.rows).step_by(chunk) {
                            let rows = (span.rows - first).min(chunk as u32);
                            pieces.push(SequenceSpan {
                                first_row: span.first_row + first,
                                rows,
                                context_len: span.context_len - span.rows + first + rows,
                                first_block: span.first_block,
                            });
                        }
                    }
                    assert!(whole == case.run_as(path, &pieces, 1), "{path:?} in chunks of {chunk}");
                }
                assert!(whole == case.run_as(path, &case.sequences, 64), "{path:?} with 64 threads");
            }
        }
    }
}

#[test]
fn long_contexts_are_split_when_threads_want_work() {
    let case = Case::new(5, shape(6, 2, 64), plain(64), KvDtype::F32, &[(1500, 1), (1027, 2)]);
    let mut plan = AttentionPlan::new();
    plan.build(&case.sequences, &case.blocks, case.shape, 1);
    assert_eq!((plan.items(), plan.merges()), (4, 0));
    plan.build(&case.sequences, &case.blocks, case.shape, 4);
    assert_eq!(plan.merges(), 4);
    assert_eq!(plan.items(), 12, "two segments each");
    for path in paths(KvDtype::F32, 64) {
        assert!(case.run(path) == case.run_as(path, &case.sequences, 4), "{path:?}");
    }
}

#[test]
fn a_shared_prefix_is_read_together_and_changes_no_bit() {
    for (seed, dtype) in [KvDtype::F32, KvDtype::Bf16].into_iter().cycle().enumerate().take(8) {
        let mut noise = Noise(seed as u64 + 100);
        let window = if noise.below(2) == 0 { None } else { Some(200 + noise.below(500)) };
        let spec = AttentionSpec { sliding_window: window, ..plain(64) };
        let spans: Vec<(usize, usize)> = (0..23)
            .map(|_| {
                let rows = if noise.below(5) == 0 { 1 + noise.below(20) } else { 1 };
                (rows + noise.below(1400), rows)
            })
            .collect();
        let mut case = Case::new(seed as u64, shape(6, 2, 64), spec, dtype, &spans);
        if seed % 4 > 1 {
            case = case.inclined();
        }
        // Every sequence takes its first blocks from one before it, which may have them from another.
        for later in 1..case.sequences.len() {
            let (from, to) = (case.sequences[noise.below(later)], case.sequences[later]);
            let whole = |s: SequenceSpan| (s.context_len - s.rows) as usize / BLOCK;
            let taken = noise.below(whole(from).min(whole(to)) + 1);
            let first = from.first_block as usize;
            case.blocks.copy_within(first..first + taken, to.first_block as usize);
        }
        let mut plan = AttentionPlan::new();
        plan.build(&case.sequences, &case.blocks, case.shape, 1);
        assert!(plan.merges() > 0, "case {seed} shares nothing");
        let width = case.shape.heads * case.shape.head_dim;
        for path in paths(dtype, 64) {
            let mut alone = Vec::new();
            for span in &case.sequences {
                let rows = span.first_row as usize * width..(span.first_row + span.rows) as usize * width;
                alone.extend_from_slice(&case.run_as(path, std::slice::from_ref(span), 1)[rows]);
            }
            for threads in [1, 2, 64] {
                assert!(alone == case.run_as(path, &case.sequences, threads), "{path:?}, case {seed}, {threads} threads");
            }
        }
    }
}

#[test]
fn a_shared_prefix_is_planned_once() {
    // Five sequences of one system prompt of 640 tokens, one stranger, one that shares only half a segment.
    let mut case = Case::new(1, shape(6, 2, 64), plain(64), KvDtype::Bf16, &[(700, 1); 7]);
    for (later, taken) in [(1, 20), (2, 20), (4, 20), (5, 20), (6, 4)] {
        case.blocks.copy_within(0..taken, case.sequences[later].first_block as usize);
    }
    let mut plan = AttentionPlan::new();
    plan.build(&case.sequences, &case.blocks, case.shape, 1);
    assert_eq!(plan.items(), 2 * 2 + 2 * 2, "two shared segments, and two sequences alone, for each of two heads");
    assert_eq!(plan.merges(), 5 * 2);
}

#[test]
fn extreme_scores_stay_finite() {
    for dtype in [KvDtype::F32, KvDtype::Bf16] {
        let spec = AttentionSpec { scale: 400.0, ..plain(64) };
        let case = Case::new(11, shape(3, 1, 64), spec, dtype, &[(700, 40), (5, 5)]);
        for path in paths(dtype, 64) {
            assert!(case.run(path).iter().all(|x| x.is_finite() && x.abs() < 4.0), "{path:?}");
        }
    }
}

#[test]
fn an_empty_step_plans_nothing() {
    let mut plan = AttentionPlan::new();
    plan.build(&[], &[], shape(9, 3, 64), 2);
    assert_eq!((plan.items(), plan.merges()), (0, 0));
}
