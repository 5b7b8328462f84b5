//! Cutting a step's attention into work items.
//!
//! Built once per step on the host and used by every layer. How work is cut never changes a result: keys are always processed in
//! segments of [`SEGMENT`] positions counted from the start of the sequence, each segment on its own, and segments are merged in
//! order, whether one item runs them all or several items share them.

use std::cell::UnsafeCell;

use super::storage::BLOCK;
use crate::ops::{HeadShape, SequenceSpan};

/// Positions that share one softmax before merging; a multiple of the block size.
pub const SEGMENT: usize = 256;
/// Query rows (counted once per head of the group) that an item aims at: three matrix tiles.
const ITEM_ROWS: usize = 48;
/// Floats reserved for unmerged segments. Steps that would need more are not split; the pages are not touched before.
const PARTIAL_FLOATS: usize = 4 << 20;
/// Shortest context, in segments, for which splitting pays for the extra barrier.
const SPLIT_SEGMENTS: usize = 4;

/// Queries `first_row .. first_row + rows` of one sequence, all query heads of one key-value head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Item {
    pub sequence: u32,
    pub kv_head: u32,
    /// Within the sequence's rows of this step.
    pub first_row: u32,
    pub rows: u32,
    pub segments: (u32, u32),
    /// Where the item's group of splits keeps its segments, or `None` when the item runs all segments and writes the output.
    pub partial: Option<u32>,
}

/// The items of a step. The memory is reused from step to step.
pub struct AttentionPlan {
    items: Vec<Item>,
    merges: Vec<Item>,
    partials: Box<[UnsafeCell<f32>]>,
}

// SAFETY: `partials` is written by items at disjoint offsets and read by merges only after all items (the caller's barrier).
unsafe impl Sync for AttentionPlan {}

impl Default for AttentionPlan {
    fn default() -> Self {
        Self::new()
    }
}

/// Floats of one unmerged row: the sum of weighted values, then maximum and sum of weights.
pub(super) const fn partial_stride(head_dim: usize) -> usize {
    head_dim + 2
}

impl AttentionPlan {
    /// An empty plan.
    pub fn new() -> Self {
        let zeros = vec![0.0f32; PARTIAL_FLOATS].into_boxed_slice();
        // SAFETY: `UnsafeCell<f32>` has the layout of `f32`. (Mapping element by element would touch every page.)
        let partials = unsafe { Box::from_raw(Box::into_raw(zeros) as *mut [UnsafeCell<f32>]) };
        Self { items: Vec::new(), merges: Vec::new(), partials }
    }

    /// Plans the step for `threads` threads. Sequences without rows are skipped.
    pub fn build(&mut self, sequences: &[SequenceSpan], shape: HeadShape, threads: usize) {
        self.items.clear();
        self.merges.clear();
        let group = (shape.heads / shape.kv_heads).max(1);
        let chunk = (ITEM_ROWS / group).max(1) as u32;
        let whole: usize = sequences.iter().map(|s| s.rows.div_ceil(chunk) as usize * shape.kv_heads).sum();
        let wanted = 4 * threads;
        // Long items first, so that the last ones to be handed out are short: prefill, its later rows first, then decode.
        for prefill in [true, false] {
            for (index, s) in sequences.iter().enumerate().filter(|(_, s)| s.rows > 0 && (s.rows > 1) == prefill) {
                for part in (0..s.rows.div_ceil(chunk)).rev() {
                    let first_row = part * chunk;
                    let rows = chunk.min(s.rows - first_row);
                    let visible = (s.context_len - s.rows + first_row + rows) as usize;
                    let segments = visible.div_ceil(SEGMENT);
                    for kv_head in 0..shape.kv_heads {
                        let item = Item {
                            sequence: index as u32,
                            kv_head: kv_head as u32,
                            first_row,
                            rows,
                            segments: (0, segments as u32),
                            partial: None,
                        };
                        if threads > 1 && whole < wanted && segments >= SPLIT_SEGMENTS {
                            self.split(item, wanted.div_ceil(whole), group, shape.head_dim);
                        } else {
                            self.items.push(item);
                        }
                    }
                }
            }
        }
    }

    fn split(&mut self, whole: Item, parts: usize, group: usize, head_dim: usize) {
        let segments = whole.segments.1 as usize;
        let floats = segments * whole.rows as usize * group * partial_stride(head_dim);
        let offset = self.merges.last().map_or(0, |m| {
            let used = m.segments.1 as usize * m.rows as usize * group * partial_stride(head_dim);
            m.partial.unwrap_or(0) as usize + used
        });
        if offset + floats > self.partials.len() {
            self.items.push(whole);
            return;
        }
        let whole = Item { partial: Some(offset as u32), ..whole };
        let each = segments.div_ceil(parts).max(1);
        for start in (0..segments).step_by(each) {
            let end = (start + each).min(segments);
            self.items.push(Item { segments: (start as u32, end as u32), ..whole });
        }
        self.merges.push(whole);
    }

    /// Items to run, in any order and in parallel, for each layer.
    pub fn items(&self) -> usize {
        self.items.len()
    }

    /// Merges to run after all items of a layer (a barrier between), in any order and in parallel. Usually none.
    pub fn merges(&self) -> usize {
        self.merges.len()
    }

    pub(super) fn item(&self, index: usize) -> Item {
        self.items[index]
    }

    pub(super) fn merge(&self, index: usize) -> Item {
        self.merges[index]
    }

    /// Where row `row` (of `rows * group`) of a segment of a split item lies.
    pub(super) fn partial(&self, item: &Item, segment: usize, row: usize, group: usize, head_dim: usize) -> *mut f32 {
        let slot = segment * item.rows as usize * group + row;
        let start = item.partial.unwrap_or(0) as usize + slot * partial_stride(head_dim);
        self.partials[start..start + partial_stride(head_dim)].as_ptr() as *mut f32
    }
}

const _: () = assert!(SEGMENT.is_multiple_of(BLOCK));
