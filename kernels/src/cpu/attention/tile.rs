//! Attention of one work item, sixteen query rows at a time.
//!
//! Per tile of rows and segment of keys: all scores, one softmax over the segment, one weighted sum of values; segments are merged
//! with the running maximum and sum of online softmax (Milakov & Gimelshein 2018; Dao et al. 2022). A row's arithmetic depends on
//! its own position only: masked keys of blocks that other rows need enter as exact zeros.

use std::marker::PhantomData;

use super::lanes::Lanes;
use super::plan::{Item, Partial, SEGMENT};
use super::storage::BLOCK;
use super::vector::{self, Pairs};
use super::{AttentionCall, AttentionScratch};
use crate::cpu::math;

/// Query rows of a tile.
pub(super) const ROWS: usize = 16;
const BLOCKS: usize = SEGMENT / BLOCK;

/// How the two products of a tile are computed.
///
/// # Safety
/// As the functions they stand for: [`vector::scores`], [`vector::weigh`].
pub(super) trait Products {
    type P: Pairs;
    unsafe fn scores(
        q: *const <Self::P as Pairs>::Operand,
        q_stride: usize,
        rows: usize,
        head_dim: usize,
        tiles: &[*const <Self::P as Pairs>::Cache],
        out: *mut f32,
    );
    unsafe fn weigh(
        p: *const <Self::P as Pairs>::Operand,
        rows: usize,
        head_dim: usize,
        tiles: &[*const <Self::P as Pairs>::Cache],
        out: *mut f32,
        out_stride: usize,
    );
}

/// Vector instructions.
pub(super) struct InVectors<P>(PhantomData<P>);

impl<P: Pairs> Products for InVectors<P> {
    type P = P;
    #[inline(always)]
    unsafe fn scores(
        q: *const P::Operand,
        q_stride: usize,
        rows: usize,
        head_dim: usize,
        tiles: &[*const P::Cache],
        out: *mut f32,
    ) {
        // SAFETY: the same contract.
        unsafe { vector::scores::<P>(q, q_stride, rows, head_dim, tiles, out) }
    }
    #[inline(always)]
    unsafe fn weigh(
        p: *const P::Operand,
        rows: usize,
        head_dim: usize,
        tiles: &[*const P::Cache],
        out: *mut f32,
        out_stride: usize,
    ) {
        // SAFETY: the same contract.
        unsafe { vector::weigh::<P>(p, rows, head_dim, tiles, out, out_stride) }
    }
}

/// AMX tiles.
#[cfg(target_arch = "x86_64")]
pub(super) struct InTiles;

#[cfg(target_arch = "x86_64")]
impl Products for InTiles {
    type P = vector::Dot;
    #[inline(always)]
    unsafe fn scores(q: *const u16, q_stride: usize, rows: usize, head_dim: usize, tiles: &[*const u16], out: *mut f32) {
        // SAFETY: the same contract.
        unsafe { super::amx::scores(q, q_stride, rows, head_dim, tiles, out) }
    }
    #[inline(always)]
    unsafe fn weigh(p: *const u16, rows: usize, head_dim: usize, tiles: &[*const u16], out: *mut f32, out_stride: usize) {
        // SAFETY: the same contract.
        unsafe { super::amx::weigh(p, rows, head_dim, tiles, out, out_stride) }
    }
}

/// Running maximum and sum of weights of each row of a tile.
#[derive(Clone, Copy)]
pub(super) struct Softmax {
    max: [f32; ROWS],
    sum: [f32; ROWS],
}

impl Softmax {
    pub(super) const EMPTY: Softmax = Softmax { max: [f32::NEG_INFINITY; ROWS], sum: [0.0; ROWS] };
}

/// Runs an item; see [`AttentionCall::run_item`].
#[inline(always)]
pub(super) unsafe fn run<X: Products>(call: &AttentionCall<'_>, item: &Item, scratch: &mut AttentionScratch) {
    let group = call.shape.heads / call.shape.kv_heads;
    let rows = item.rows as usize * group;
    for first in (0..rows).step_by(ROWS) {
        // SAFETY: the caller's contract.
        unsafe { tile::<X>(call, item, first, ROWS.min(rows - first), group, scratch) };
    }
}

/// Rows `first .. first + rows` of an item, counting each query once per head of the group.
#[inline(always)]
unsafe fn tile<X: Products>(
    call: &AttentionCall<'_>,
    item: &Item,
    first: usize,
    rows: usize,
    group: usize,
    scratch: &mut AttentionScratch,
) {
    let head_dim = call.shape.head_dim;
    let span = call.sequences[item.sequence as usize];
    let context = span.context_len as usize;
    let (mut tokens, mut positions) = ([0; ROWS], [0; ROWS]);
    for row in 0..rows {
        (tokens[row], positions[row]) = call.plan.query(call.sequences, item, (first + row) / group);
    }
    let window = call.spec.sliding_window.unwrap_or(usize::MAX);
    let lowest = |position: usize| (position + 1).saturating_sub(window);
    let (mut from, mut to) = (usize::MAX, 0);
    for &position in &positions[..rows] {
        (from, to) = (from.min(lowest(position)), to.max(position + 1));
    }
    let table = &call.blocks[span.first_block as usize..][..context.div_ceil(BLOCK)];

    let (q_stride, sum_stride) = (scratch.q_stride, scratch.sum_stride);
    let q = scratch.q.as_mut_ptr().cast::<<X::P as Pairs>::Operand>();
    let probabilities = scratch.probabilities.as_mut_ptr().cast::<<X::P as Pairs>::Operand>();
    let scores = scratch.scores.as_mut_ptr().cast::<f32>();
    let sums = scratch.sums.as_mut_ptr().cast::<f32>();
    let total = scratch.total.as_mut_ptr().cast::<f32>();
    let tail_values = scratch.tail_values.as_mut_ptr().cast::<<X::P as Pairs>::Cache>();
    let head = |row: usize| item.kv_head as usize * group + (first + row) % group;

    // SAFETY: the caller's contract for pointers into the call's buffers; the scratch was sized for `head_dim`.
    unsafe {
        for (row, token) in tokens[..rows].iter().enumerate() {
            let source = call.qkv.add(token * call.qkv_stride + head(row) * head_dim);
            pack::<X::P>(source, call.spec.scale, head_dim, q.add(row * q_stride));
        }
        let mut running = Softmax::EMPTY;
        let mut empty = true;
        if let Some(before) = item.before {
            for row in 0..rows {
                let into = total.add(row * sum_stride);
                let state = (&mut running.max[row], &mut running.sum[row]);
                merge_partials(call, before, item.segments.0 as usize, first + row, head_dim, state, into);
            }
            empty = false;
        }
        for segment in item.segments.0 as usize..item.segments.1 as usize {
            let start = (segment * SEGMENT).max(from / BLOCK * BLOCK);
            let end = ((segment + 1) * SEGMENT).min(to);
            let mut softmax = Softmax::EMPTY;
            if start < end {
                let (b0, b1) = (start / BLOCK, end.div_ceil(BLOCK));
                let mut keys = [std::ptr::null::<<X::P as Pairs>::Cache>(); BLOCKS];
                let mut values = keys;
                for (i, &block) in table[b0..b1].iter().enumerate() {
                    keys[i] = call.storage.keys(call.layer, block as usize, item.kv_head as usize);
                    values[i] = call.storage.values(call.layer, block as usize, item.kv_head as usize);
                }
                let count = b1 - b0;
                if b1 * BLOCK > context {
                    // Slots beyond the context hold anything, NaN included, and zero times NaN is NaN.
                    copy_valid::<X::P>(values[count - 1], context % BLOCK, head_dim, tail_values);
                    values[count - 1] = tail_values;
                }
                X::scores(q, q_stride, rows, head_dim, &keys[..count], scores);
                for (row, &p) in positions[..rows].iter().enumerate() {
                    let row_scores = scores.add(row * SEGMENT);
                    if let Some(cap) = call.spec.soft_cap {
                        soft_cap::<<X::P as Pairs>::L>(row_scores, count * BLOCK, cap);
                    }
                    if let Some(slopes) = call.slopes {
                        let nearness = start as f32 - p as f32;
                        alibi::<<X::P as Pairs>::L>(row_scores, count * BLOCK, slopes[head(row)], nearness);
                    }
                    let visible = lowest(p).saturating_sub(start)..(p + 1).saturating_sub(start);
                    mask(row_scores, count * BLOCK, visible);
                    (softmax.max[row], softmax.sum[row]) =
                        normalise::<X::P>(row_scores, count * BLOCK, probabilities.add(row * SEGMENT));
                }
                X::weigh(probabilities, rows, head_dim, &values[..count], sums, sum_stride);
            }
            if let Some(partial) = item.partial {
                for row in 0..rows {
                    let partial = call.plan.partial(partial, segment, first + row, head_dim);
                    if softmax.max[row] > f32::NEG_INFINITY {
                        std::ptr::copy_nonoverlapping(sums.add(row * sum_stride), partial, head_dim);
                    }
                    *partial.add(head_dim) = softmax.max[row];
                    *partial.add(head_dim + 1) = softmax.sum[row];
                }
            } else if start < end {
                for row in 0..rows {
                    let (into, from) = (total.add(row * sum_stride), sums.add(row * sum_stride));
                    if empty || running.max[row] == f32::NEG_INFINITY {
                        std::ptr::copy_nonoverlapping(from, into, head_dim);
                        (running.max[row], running.sum[row]) = (softmax.max[row], softmax.sum[row]);
                    } else {
                        let state = (&mut running.max[row], &mut running.sum[row]);
                        merge(state, into, (softmax.max[row], softmax.sum[row]), from, head_dim);
                    }
                }
                empty = false;
            }
        }
        if item.partial.is_none() {
            for (row, token) in tokens[..rows].iter().enumerate() {
                let out = call.out.add(token * call.out_stride + head(row) * head_dim);
                finish(total.add(row * sum_stride), running.sum[row], head_dim, out);
            }
        }
    }
}

/// Merges the first `segments` segments of a row, in order, into nothing.
///
/// # Safety
/// Other items left them there, all of which have finished; `into` is good for `head_dim` elements.
#[inline(always)]
unsafe fn merge_partials(
    call: &AttentionCall<'_>,
    before: Partial,
    segments: usize,
    row: usize,
    head_dim: usize,
    (max, sum): (&mut f32, &mut f32),
    into: *mut f32,
) {
    for segment in 0..segments {
        // SAFETY: the contract; a segment of which the row saw nothing has no values.
        unsafe {
            let partial = call.plan.partial(before, segment, row, head_dim);
            let (segment_max, segment_sum) = (*partial.add(head_dim), *partial.add(head_dim + 1));
            if *max == f32::NEG_INFINITY {
                if segment_max > f32::NEG_INFINITY {
                    std::ptr::copy_nonoverlapping(partial, into, head_dim);
                    (*max, *sum) = (segment_max, segment_sum);
                }
            } else {
                merge((max, sum), into, (segment_max, segment_sum), partial, head_dim);
            }
        }
    }
}

/// `out = x * scale` as operands.
#[inline(always)]
unsafe fn pack<P: Pairs>(x: *const f32, scale: f32, head_dim: usize, out: *mut P::Operand) {
    let n = P::L::N;
    let mut d = 0;
    // SAFETY: `head_dim` elements on both sides.
    unsafe {
        let scales = P::L::splat(scale);
        while d + n <= head_dim {
            P::store_operand(out.add(d), P::L::mul(P::L::load(x.add(d)), scales));
            d += n;
        }
        while d < head_dim {
            *out.add(d) = P::operand(*x.add(d) * scale);
            d += 1;
        }
    }
}

/// Copies the first `valid` slots of a value tile and zeroes the others.
#[inline(always)]
unsafe fn copy_valid<P: Pairs>(values: *const P::Cache, valid: usize, head_dim: usize, out: *mut P::Cache) {
    let step = P::STEP;
    let whole = valid / step * step * head_dim;
    // SAFETY: both tiles have 32 * head_dim elements; all-zero bytes are zero in either element type.
    unsafe {
        std::ptr::copy_nonoverlapping(values, out, whole);
        std::ptr::write_bytes(out.add(whole), 0, BLOCK * head_dim - whole);
        if !valid.is_multiple_of(step) {
            for d in 0..head_dim {
                *out.add(whole + d * step) = *values.add(whole + d * step);
            }
        }
    }
}

/// `score = cap * tanh(score / cap)`
#[inline(always)]
unsafe fn soft_cap<L: Lanes>(scores: *mut f32, n: usize, cap: f32) {
    // SAFETY: `n` is a multiple of 32.
    unsafe {
        let (one, two, caps) = (L::splat(1.0), L::splat(2.0), L::splat(cap));
        // tanh(x) = 1 − 2 / (e^2x + 1); beyond ±60 in base 2 it is ±1 in f32.
        let factor = L::splat(2.0 * std::f32::consts::LOG2_E / cap);
        let (low, high) = (L::splat(-60.0), L::splat(60.0));
        for i in (0..n).step_by(L::N) {
            let x = L::mul(L::load(scores.add(i)), factor);
            let x = L::sub(L::splat(0.0), L::max(L::sub(L::splat(0.0), L::max(x, low)), L::sub(L::splat(0.0), high)));
            let tanh = L::sub(one, L::div(two, L::add(L::exp2(x), one)));
            L::store(scores.add(i), L::mul(tanh, caps));
        }
    }
}

/// `score[i] += slope * (first + i)`, with `first` how far the first key lies behind the query (negative: before it).
#[inline(always)]
unsafe fn alibi<L: Lanes>(scores: *mut f32, n: usize, slope: f32, first: f32) {
    const STEPS: [f32; 16] = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0];
    // SAFETY: `n` is a multiple of 32; no vector has more lanes than there are steps.
    unsafe {
        let (slopes, steps) = (L::splat(slope), L::load(STEPS.as_ptr()));
        for i in (0..n).step_by(L::N) {
            let distance = L::add(steps, L::splat(first + i as f32));
            L::store(scores.add(i), L::fma(slopes, distance, L::load(scores.add(i))));
        }
    }
}

/// Writes −∞ over scores of keys that the row does not see.
#[inline(always)]
unsafe fn mask(scores: *mut f32, n: usize, visible: std::ops::Range<usize>) {
    // SAFETY: `n` scores.
    let scores = unsafe { std::slice::from_raw_parts_mut(scores, n) };
    scores[..visible.start.min(n)].fill(f32::NEG_INFINITY);
    scores[visible.end.min(n)..].fill(f32::NEG_INFINITY);
}

/// `p = exp(score − max)` as operands; the maximum and the sum. A row that sees nothing has (−∞, 0) and weights of zero.
///
/// A slot's lane and accumulator depend on its offset in the block only, so skipped blocks do not change the order of the sum.
#[inline(always)]
unsafe fn normalise<P: Pairs>(scores: *const f32, n: usize, p: *mut P::Operand) -> (f32, f32) {
    let lanes = P::L::N;
    // SAFETY: `n` scores, a multiple of 32 and thus of two vectors.
    unsafe {
        let mut max = [P::L::splat(f32::NEG_INFINITY); 2];
        for i in (0..n).step_by(2 * lanes) {
            for (half, max) in max.iter_mut().enumerate() {
                *max = P::L::max(*max, P::L::load(scores.add(i + half * lanes)));
            }
        }
        let max = P::L::reduce_max(P::L::max(max[0], max[1]));
        if max == f32::NEG_INFINITY {
            for i in (0..n).step_by(lanes) {
                P::store_operand(p.add(i), P::L::splat(0.0));
            }
            return (max, 0.0);
        }
        let factor = P::L::splat(std::f32::consts::LOG2_E);
        let shift = P::L::splat(max);
        let mut sum = [P::L::splat(0.0); 2];
        for i in (0..n).step_by(2 * lanes) {
            for (half, sum) in sum.iter_mut().enumerate() {
                let x = P::L::sub(P::L::load(scores.add(i + half * lanes)), shift);
                let e = P::L::exp2(P::L::mul(x, factor));
                P::store_operand(p.add(i + half * lanes), e);
                *sum = P::L::add(*sum, e);
            }
        }
        (max, P::L::reduce_add(P::L::add(sum[0], sum[1])))
    }
}

/// Adds a segment's weighted values to a row's total. A segment of which the row sees nothing changes nothing.
#[inline(always)]
unsafe fn merge(total: (&mut f32, &mut f32), into: *mut f32, segment: (f32, f32), from: *const f32, head_dim: usize) {
    if segment.0 == f32::NEG_INFINITY {
        return;
    }
    let max = if *total.0 > segment.0 { *total.0 } else { segment.0 };
    let (old, new) = (math::exp(*total.0 - max), math::exp(segment.0 - max));
    // SAFETY: `head_dim` elements each, apart from one another.
    let (into, from) = unsafe { (std::slice::from_raw_parts_mut(into, head_dim), std::slice::from_raw_parts(from, head_dim)) };
    for (a, &b) in into.iter_mut().zip(from) {
        *a = *a * old + b * new;
    }
    *total.1 = *total.1 * old + segment.1 * new;
    *total.0 = max;
}

/// `out = total / sum`; zero for a row that saw nothing.
#[inline(always)]
unsafe fn finish(total: *const f32, sum: f32, head_dim: usize, out: *mut f32) {
    let factor = if sum == 0.0 { 0.0 } else { 1.0 / sum };
    // SAFETY: `head_dim` elements each.
    let (total, out) = unsafe { (std::slice::from_raw_parts(total, head_dim), std::slice::from_raw_parts_mut(out, head_dim)) };
    for (o, &t) in out.iter_mut().zip(total) {
        *o = t * factor;
    }
}
