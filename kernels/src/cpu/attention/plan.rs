//! Cutting a step's attention into work items.
//!
//! Built once per step on the host and used by every layer. How work is cut never changes a result: keys are always processed in
//! segments of [`SEGMENT`] positions counted from the start of the sequence, each segment on its own, and segments are merged in
//! order, whether one item runs them all or several items share them.
//!
//! Segments that several decoding sequences have in the same blocks are read once for all of them: an item takes a segment and one
//! row of each sequence, and leaves unmerged results, from which the sequences' own items go on after a barrier.

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

/// Some queries, all query heads of one key-value head: `first_row .. first_row + rows` of one sequence's rows in this step, or the
/// one row of each of `rows` sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Item {
    /// The sequence, or one whose blocks are those of all.
    pub sequence: u32,
    pub kv_head: u32,
    /// Within the sequence's rows of this step.
    pub first_row: u32,
    pub rows: u32,
    /// Where the list of sequences begins, if these are several sequences' rows.
    members: Option<u32>,
    pub segments: (u32, u32),
    /// Where results of the segments before the item's own lie.
    pub before: Option<Partial>,
    /// Where to leave the segments unmerged, or `None` when the item merges them and writes the output.
    pub partial: Option<Partial>,
}

/// Unmerged results `[segment][rows][partial_stride]` of one key-value head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Partial {
    offset: u32,
    /// Rows of a segment, and which is an item's first; counted once per head of the group.
    rows: u32,
    first: u32,
}

/// What a sequence shares with others.
#[derive(Clone, Copy, Debug)]
struct Prefix {
    segments: u32,
    /// Of key-value head 0; those of the others follow.
    partial: Partial,
}

/// The items of a step. The memory is reused from step to step.
pub struct AttentionPlan {
    items: Vec<Item>,
    merges: Vec<Item>,
    /// Sequences that share a prefix, group after group.
    members: Vec<u32>,
    /// By sequence.
    prefixes: Vec<Option<Prefix>>,
    /// Floats of `partials` given away.
    used: usize,
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
        Self { items: Vec::new(), merges: Vec::new(), members: Vec::new(), prefixes: Vec::new(), used: 0, partials }
    }

    /// Plans the step for `threads` threads. Sequences without rows are skipped.
    pub fn build(&mut self, sequences: &[SequenceSpan], blocks: &[u32], shape: HeadShape, threads: usize) {
        self.items.clear();
        self.merges.clear();
        self.used = 0;
        let group = (shape.heads / shape.kv_heads).max(1);
        let chunk = (ITEM_ROWS / group).max(1) as u32;
        self.share(sequences, blocks, shape, chunk);
        let alone = sequences.iter().zip(&self.prefixes).filter(|(_, prefix)| prefix.is_none());
        let whole = self.items.len() + alone.map(|(s, _)| s.rows.div_ceil(chunk) as usize * shape.kv_heads).sum::<usize>();
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
                            members: None,
                            segments: (0, segments as u32),
                            before: None,
                            partial: None,
                        };
                        if let Some(Prefix { segments: first, partial }) = self.prefixes[index] {
                            let before = Some(partial.of_head(kv_head, first, shape.head_dim));
                            self.merges.push(Item { segments: (first, segments as u32), before, ..item });
                        } else if threads > 1 && whole < wanted && segments >= SPLIT_SEGMENTS {
                            self.split(item, wanted.div_ceil(whole), group, shape.head_dim);
                        } else {
                            self.items.push(item);
                        }
                    }
                }
            }
        }
    }

    /// Finds decoding sequences that begin with the same blocks, and makes the items of the segments that they share.
    fn share(&mut self, sequences: &[SequenceSpan], blocks: &[u32], shape: HeadShape, chunk: u32) {
        self.members.clear();
        self.prefixes.clear();
        self.prefixes.resize(sequences.len(), None);
        let group = (shape.heads / shape.kv_heads).max(1);
        let whole_segments = |s: &SequenceSpan| if s.rows == 1 { s.context_len as usize / SEGMENT } else { 0 };
        let table = |s: &SequenceSpan, segments: usize| &blocks[s.first_block as usize..][..segments * SEGMENT / BLOCK];
        for (index, s) in sequences.iter().enumerate() {
            let mut common = whole_segments(s);
            if common == 0 || self.prefixes[index].is_some() {
                continue;
            }
            let start = self.members.len();
            self.members.push(index as u32);
            for (other, o) in sequences.iter().enumerate().skip(index + 1) {
                let most = whole_segments(o).min(common);
                if most == 0 || self.prefixes[other].is_some() || table(s, 1) != table(o, 1) {
                    continue;
                }
                let equal = table(s, most).iter().zip(table(o, most)).take_while(|(a, b)| a == b).count();
                let equal = equal * BLOCK / SEGMENT;
                // The first partner decides how much is shared; a later one that shares less would make it less for all.
                if self.members.len() == start + 1 {
                    common = equal;
                }
                if equal >= common {
                    self.members.push(other as u32);
                }
            }
            let rows = (self.members.len() - start) * group;
            let partial = if rows > group { self.reserve(common, rows, shape) } else { None };
            let Some(partial) = partial else {
                self.members.truncate(start);
                continue;
            };
            for (place, &member) in self.members[start..].iter().enumerate() {
                let partial = Partial { first: (place * group) as u32, ..partial };
                self.prefixes[member as usize] = Some(Prefix { segments: common as u32, partial });
            }
            for segment in 0..common as u32 {
                for kv_head in 0..shape.kv_heads {
                    for place in (start..self.members.len()).step_by(chunk as usize) {
                        let sequence = self.members[place];
                        let partial =
                            self.prefixes[sequence as usize].map(|p| p.partial.of_head(kv_head, p.segments, shape.head_dim));
                        self.items.push(Item {
                            sequence,
                            kv_head: kv_head as u32,
                            first_row: 0,
                            rows: chunk.min((self.members.len() - place) as u32),
                            members: Some(place as u32),
                            segments: (segment, segment + 1),
                            before: None,
                            partial,
                        });
                    }
                }
            }
        }
    }

    /// Room for unmerged results of all key-value heads.
    fn reserve(&mut self, segments: usize, rows: usize, shape: HeadShape) -> Option<Partial> {
        let floats = segments * rows * partial_stride(shape.head_dim) * shape.kv_heads;
        let offset = self.used;
        if floats > self.partials.len() - offset {
            return None;
        }
        self.used += floats;
        Some(Partial { offset: offset as u32, rows: rows as u32, first: 0 })
    }

    fn split(&mut self, whole: Item, parts: usize, group: usize, head_dim: usize) {
        let segments = whole.segments.1;
        let shape = HeadShape { heads: group, kv_heads: 1, head_dim };
        let Some(partial) = self.reserve(segments as usize, whole.rows as usize * group, shape) else {
            self.items.push(whole);
            return;
        };
        let each = (segments as usize).div_ceil(parts).max(1);
        for start in (0..segments).step_by(each) {
            let end = (start + each as u32).min(segments);
            self.items.push(Item { segments: (start, end), partial: Some(partial), ..whole });
        }
        self.merges.push(Item { segments: (segments, segments), before: Some(partial), ..whole });
    }

    /// Items to run, in any order and in parallel, for each layer.
    pub fn items(&self) -> usize {
        self.items.len()
    }

    /// Items that go on from others' results, to run after all items of a layer (a barrier between), in any order and in parallel.
    /// Usually none.
    pub fn merges(&self) -> usize {
        self.merges.len()
    }

    pub(super) fn item(&self, index: usize) -> Item {
        self.items[index]
    }

    pub(super) fn merge(&self, index: usize) -> Item {
        self.merges[index]
    }

    /// Row of the step and position of an item's query.
    #[inline(always)]
    pub(super) fn query(&self, sequences: &[SequenceSpan], item: &Item, index: usize) -> (usize, usize) {
        let (sequence, row) = match item.members {
            Some(first) => (self.members[first as usize + index], 0),
            None => (item.sequence, item.first_row as usize + index),
        };
        let span = sequences[sequence as usize];
        (span.first_row as usize + row, (span.context_len - span.rows) as usize + row)
    }

    /// Where row `row` (of an item's `rows * group`) of a segment lies.
    pub(super) fn partial(&self, partial: Partial, segment: usize, row: usize, head_dim: usize) -> *mut f32 {
        let slot = segment * partial.rows as usize + partial.first as usize + row;
        let start = partial.offset as usize + slot * partial_stride(head_dim);
        self.partials[start..start + partial_stride(head_dim)].as_ptr() as *mut f32
    }
}

impl Partial {
    /// The same rows of another key-value head.
    fn of_head(self, kv_head: usize, segments: u32, head_dim: usize) -> Partial {
        let floats = kv_head * segments as usize * self.rows as usize * partial_stride(head_dim);
        Partial { offset: self.offset + floats as u32, ..self }
    }
}

const _: () = assert!(SEGMENT.is_multiple_of(BLOCK));
