//! Causal attention over packed segments, with its derivative.
//!
//! A segment's rows see themselves causally, and all rows of its prefix if it has one: so two answers share one computation of their
//! prompt. Scores exist for a block of queries at a time; the derivative makes them again from the logarithms of their denominators.

use std::ops::Range;

use super::Compute;
use super::matmul::{Output, Packed, Product, Scratch as Tiles, serial};
use super::operand::{Operand, View};
use super::rows::{RowOps, Shared};
use super::tile::Kernel;
use crate::error::KernelError;
use crate::ops::{AttentionSpec, HeadShape, Store};

/// Queries per block.
const QUERIES: usize = 128;

/// Neighbouring rows of one text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First row.
    pub first: usize,
    /// Rows.
    pub len: usize,
    /// Index of the span whose rows all of these see, too; that one has no prefix itself.
    pub prefix: Option<usize>,
}

/// Which rows see which.
#[derive(Clone, Copy)]
pub struct Attention<'a> {
    /// They cover all rows, in order, and do not overlap.
    pub spans: &'a [Span],
    /// `[rows]`; rows of a span have consecutive ones, as have a prefix and what follows it.
    pub positions: &'a [u32],
    /// Heads.
    pub shape: HeadShape,
    /// How scores are made; a soft cap and slopes of ALiBi are refused.
    pub spec: AttentionSpec,
}

/// Memory of one thread.
#[derive(Default)]
pub(super) struct Scores {
    scores: Vec<f32>,
    slopes: Vec<f32>,
}

impl Scores {
    /// `len` numbers of any value.
    pub fn row(&mut self, len: usize) -> &mut [f32] {
        if self.scores.len() < len {
            self.scores.resize(len, 0.0);
        }
        &mut self.scores[..len]
    }
}

/// Keys of a query block: a run of rows and how many of them the block's first query sees.
struct Keys {
    rows: Range<usize>,
    /// Column of the scores where the run starts.
    column: usize,
    /// Whether the block's own span: causal.
    own: bool,
}

impl Attention<'_> {
    fn width(&self) -> usize {
        (self.shape.heads + 2 * self.shape.kv_heads) * self.shape.head_dim
    }

    pub(crate) fn check(&self, qkv: usize, out: usize, lse: usize) -> Result<(), KernelError> {
        let refuse = |detail: String| Err(KernelError::Shape { op: "attention", detail });
        let HeadShape { heads, kv_heads, head_dim } = self.shape;
        if self.spec.soft_cap.is_some() {
            return Err(KernelError::Unsupported("training with a soft cap on attention scores is not supported".to_owned()));
        }
        if self.spec.alibi.is_some() {
            return Err(KernelError::Unsupported("training with ALiBi's biases on attention scores is not supported".to_owned()));
        }
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            return refuse(format!("{heads} heads on {kv_heads} key-value heads"));
        }
        let rows = self.positions.len();
        if qkv != rows * self.width() || out != rows * heads * head_dim || lse != rows * heads {
            return refuse(format!("{qkv}, {out} and {lse} values for {rows} rows of {:?}", self.shape));
        }
        let mut next = 0;
        for (index, span) in self.spans.iter().enumerate() {
            if span.first != next {
                return refuse(format!("span {index} starts at row {}, not {next}", span.first));
            }
            next += span.len;
            if let Some(prefix) = span.prefix
                && (prefix >= index || self.spans[prefix].prefix.is_some())
            {
                return refuse(format!("span {index} has the prefix {prefix}, which is not an earlier span without a prefix"));
            }
        }
        if next == rows { Ok(()) } else { refuse(format!("spans cover {next} of {rows} rows")) }
    }

    /// What queries `block` of a span see.
    fn keys(&self, span: &Span, block: &Range<usize>) -> Vec<Keys> {
        let mut keys = Vec::new();
        let mut column = 0;
        let seen_from = |first: usize, len: usize| match self.spec.sliding_window {
            // A query at p sees positions above p − window; the first query of the block sees the earliest.
            Some(window) => {
                let earliest = (self.positions[block.start] as usize + 1).saturating_sub(window);
                earliest.saturating_sub(self.positions[first] as usize).min(len)
            }
            None => 0,
        };
        if let Some(prefix) = span.prefix.map(|index| self.spans[index])
            && prefix.len > 0
        {
            let rows = prefix.first + seen_from(prefix.first, prefix.len)..prefix.first + prefix.len;
            column += rows.len();
            keys.push(Keys { rows, column: 0, own: false });
        }
        let rows = span.first + seen_from(span.first, block.start - span.first)..block.end;
        keys.push(Keys { rows, column, own: true });
        keys
    }

    /// Forbids the scores that a query must not see: what comes after it, and what is too far before.
    fn mask(&self, query: usize, keys: &Keys, scores: &mut [f32]) {
        let first = keys.rows.start;
        if keys.own {
            scores[(query + 1 - first).min(keys.rows.len())..].fill(f32::NEG_INFINITY);
        }
        if let Some(window) = self.spec.sliding_window {
            // Positions of the run are consecutive.
            let outside = (self.positions[query] as usize + 1).saturating_sub(window + self.positions[first] as usize);
            scores[..outside.min(keys.rows.len())].fill(f32::NEG_INFINITY);
        }
    }

    fn masked(&self, keys: &Keys) -> bool {
        keys.own || self.spec.sliding_window.is_some()
    }
}

/// What one thread multiplies with.
struct Hand<'a> {
    kernel: Kernel,
    packed: &'a mut Packed,
    tiles: &'a mut Tiles,
}

impl Hand<'_> {
    fn multiply(&mut self, product: &Product<'_>, out: &mut [f32], stride: usize) {
        // SAFETY: `out` is borrowed for the call.
        unsafe { self.multiply_to(product, Output { start: out.as_mut_ptr(), len: out.len(), stride }) }
    }

    /// # Safety
    /// `out` is writable, and nobody else touches the product's elements of it.
    unsafe fn multiply_to(&mut self, product: &Product<'_>, out: Output) {
        // SAFETY: the caller's promise.
        let done = unsafe { serial(self.kernel, product, self.packed, self.tiles, out) };
        // Sizes were checked for the whole call; what is left is memory, and a panic ends the region with an error.
        assert!(done.is_ok(), "attention: {done:?}");
    }
}

/// A view of some rows' part of a wider matrix.
fn part<'a>(data: &'a [f32], stride: usize, rows: &Range<usize>, offset: usize) -> View<'a> {
    View::Rows { data: &data[rows.start * stride + offset..], stride }
}

fn turned(view: View<'_>) -> View<'_> {
    match view {
        View::Rows { data, stride } => View::Columns { data, stride },
        View::Columns { data, stride } => View::Rows { data, stride },
    }
}

impl Attention<'_> {
    /// Scores of `block`'s queries of head `head` over all their keys, masked: `[queries, columns]` in `scores`; returns the columns.
    fn scores(
        &self,
        hand: &mut Hand<'_>,
        qkv: &[f32],
        head: usize,
        block: &Range<usize>,
        keys: &[Keys],
        scores: &mut Vec<f32>,
    ) -> usize {
        let HeadShape { heads, kv_heads, head_dim } = self.shape;
        let width = self.width();
        let columns = keys.iter().map(|keys| keys.rows.len()).sum();
        if scores.len() < block.len() * columns {
            scores.resize(block.len() * columns, 0.0);
        }
        for keys in keys {
            let key_offset = (heads + head / (heads / kv_heads)) * head_dim;
            let product = Product {
                m: block.len(),
                n: keys.rows.len(),
                k: head_dim,
                left: part(qkv, width, block, head * head_dim),
                right: Operand::View(turned(part(qkv, width, &keys.rows, key_offset))),
                scale: self.spec.scale,
                store: Store::Replace,
            };
            hand.multiply(&product, &mut scores[keys.column..], columns);
            if self.masked(keys) {
                for (row, query) in block.clone().enumerate() {
                    self.mask(query, keys, &mut scores[row * columns + keys.column..][..keys.rows.len()]);
                }
            }
        }
        columns
    }
}

fn blocks(span: &Span) -> impl Iterator<Item = Range<usize>> {
    let end = span.first + span.len;
    (span.first..end).step_by(QUERIES).map(move |first| first..(first + QUERIES).min(end))
}

impl Compute {
    /// `out [rows, heads * head_dim]` from `qkv [rows, (heads + 2 kv_heads) * head_dim]`, whose queries and keys are rotated;
    /// `lse [rows, heads]` gets the logarithms of the softmaxes' denominators, which the derivative needs.
    pub fn attention(&mut self, call: Attention<'_>, qkv: &[f32], out: &mut [f32], lse: &mut [f32]) -> Result<(), KernelError> {
        call.check(qkv.len(), out.len(), lse.len())?;
        let HeadShape { heads, kv_heads, head_dim } = call.shape;
        let (kernel, ops, width) = (self.kernel, self.rows, call.width());
        let work: Vec<(&Span, Range<usize>)> =
            call.spans.iter().flat_map(|span| blocks(span).map(move |block| (span, block))).collect();
        let (out, lse) = (Shared::new(out), Shared::new(lse));
        self.threads.run(&[work.len() * heads], |_, task, scratch| {
            let (span, block) = &work[task / heads];
            let head = task % heads;
            let hand = &mut Hand { kernel, packed: &mut scratch.packed, tiles: &mut scratch.tiles };
            let scores = &mut scratch.scores.scores;
            let keys = call.keys(span, block);
            let columns = call.scores(hand, qkv, head, block, &keys, scores);
            for (row, query) in block.clone().enumerate() {
                // SAFETY: one element per query and head.
                let lse = unsafe { lse.range(query * heads + head..query * heads + head + 1) };
                lse[0] = ops.softmax(&mut scores[row * columns..][..columns]);
            }
            let value_offset = (heads + kv_heads + head / (heads / kv_heads)) * head_dim;
            for (index, keys) in keys.iter().enumerate() {
                let product = Product {
                    m: block.len(),
                    n: head_dim,
                    k: keys.rows.len(),
                    left: View::Rows { data: &scores[keys.column..], stride: columns },
                    right: Operand::View(part(qkv, width, &keys.rows, value_offset)),
                    scale: 1.0,
                    store: if index == 0 { Store::Replace } else { Store::Add },
                };
                out.multiply(hand, &product, block, heads * head_dim, head * head_dim);
            }
        })
    }

    /// The derivative of [`Self::attention`] along `qkv`, stored to `dqkv`, for the derivatives `dout` along its result `out`.
    pub fn attention_back(
        &mut self,
        call: Attention<'_>,
        qkv: &[f32],
        out: &[f32],
        lse: &[f32],
        dout: &[f32],
        dqkv: &mut [f32],
    ) -> Result<(), KernelError> {
        call.check(qkv.len(), out.len(), lse.len())?;
        if dout.len() != out.len() || dqkv.len() != qkv.len() {
            return Err(KernelError::Shape { op: "attention_back", detail: "derivatives of another size".to_owned() });
        }
        let HeadShape { heads, kv_heads, .. } = call.shape;
        let (kernel, ops) = (self.kernel, self.rows);
        // A prefix's keys and values collect from all spans that see them: such a family is one task per key-value head.
        let mut families: Vec<Vec<&Span>> = Vec::new();
        let mut family_of = vec![0; call.spans.len()];
        for (index, span) in call.spans.iter().enumerate() {
            match span.prefix {
                Some(prefix) => family_of[index] = family_of[prefix],
                None => {
                    family_of[index] = families.len();
                    families.push(Vec::new());
                }
            }
            families[family_of[index]].push(span);
        }
        dqkv.fill(0.0);
        let dqkv = Shared::new(dqkv);
        self.threads.run(&[families.len() * kv_heads], |_, task, scratch| {
            let hand = &mut Hand { kernel, packed: &mut scratch.packed, tiles: &mut scratch.tiles };
            for span in &families[task / kv_heads] {
                for group in 0..heads / kv_heads {
                    let head = task % kv_heads * (heads / kv_heads) + group;
                    for block in blocks(span) {
                        let at = Place { head, block, span };
                        head_back(&call, hand, ops, &mut scratch.scores, &at, [qkv, out, lse, dout], &dqkv);
                    }
                }
            }
        })
    }
}

struct Place<'a> {
    head: usize,
    block: Range<usize>,
    span: &'a Span,
}

/// One block of queries of one head.
fn head_back(
    call: &Attention<'_>,
    hand: &mut Hand<'_>,
    ops: RowOps,
    memory: &mut Scores,
    at: &Place<'_>,
    [qkv, out, lse, dout]: [&[f32]; 4],
    dqkv: &Shared<'_>,
) {
    let HeadShape { heads, kv_heads, head_dim } = call.shape;
    let (width, wide) = (call.width(), heads * head_dim);
    let Place { head, block, span } = at;
    let query_offset = head * head_dim;
    let key_offset = (heads + head / (heads / kv_heads)) * head_dim;
    let value_offset = key_offset + kv_heads * head_dim;
    let keys = call.keys(span, block);
    let columns = call.scores(hand, qkv, *head, block, &keys, &mut memory.scores);
    if memory.slopes.len() < block.len() * columns {
        memory.slopes.resize(block.len() * columns, 0.0);
    }
    let dout_view = part(dout, wide, block, query_offset);
    for keys in &keys {
        // Along the probabilities: dO Vᵀ.
        let product = Product {
            m: block.len(),
            n: keys.rows.len(),
            k: head_dim,
            left: dout_view,
            right: Operand::View(turned(part(qkv, width, &keys.rows, value_offset))),
            scale: 1.0,
            store: Store::Replace,
        };
        hand.multiply(&product, &mut memory.slopes[keys.column..], columns);
    }
    for (row, query) in block.clone().enumerate() {
        let head_at = query * wide + query_offset;
        let inner = ops.dot(&dout[head_at..][..head_dim], &out[head_at..][..head_dim]);
        let (scores, slopes) = (&mut memory.scores[row * columns..][..columns], &mut memory.slopes[row * columns..][..columns]);
        ops.softmax_back(scores, lse[query * heads + head], inner, slopes);
    }
    for keys in &keys {
        let n = keys.rows.len();
        let scores = View::Rows { data: &memory.scores[keys.column..], stride: columns };
        let slopes = View::Rows { data: &memory.slopes[keys.column..], stride: columns };
        let right = Operand::View(part(qkv, width, &keys.rows, key_offset));
        let along_query =
            Product { m: block.len(), n: head_dim, k: n, left: slopes, right, scale: call.spec.scale, store: Store::Add };
        dqkv.multiply(hand, &along_query, block, width, query_offset);
        let right = Operand::View(part(qkv, width, block, query_offset));
        let along_key = Product { m: n, n: head_dim, k: block.len(), left: turned(slopes), right, ..along_query };
        dqkv.multiply(hand, &along_key, &keys.rows, width, key_offset);
        let right = Operand::View(dout_view);
        let along_value = Product { left: turned(scores), right, scale: 1.0, ..along_key };
        dqkv.multiply(hand, &along_value, &keys.rows, width, value_offset);
    }
}

impl Shared<'_> {
    /// A product to some rows' part of a wider matrix, which no other task touches.
    fn multiply(&self, hand: &mut Hand<'_>, product: &Product<'_>, rows: &Range<usize>, stride: usize, offset: usize) {
        if rows.is_empty() {
            return;
        }
        let first = rows.start * stride + offset;
        let len = (rows.len() - 1) * stride + product.n;
        // SAFETY: heads and rows of one task, as the caller says.
        unsafe { hand.multiply_to(product, Output { start: self.at(first, len), len, stride }) }
    }
}
