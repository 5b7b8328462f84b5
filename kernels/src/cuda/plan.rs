//! Which tiles of a step's attention run where; see `kernels/cuda/attention.cu`. Planned once per step, for all layers.

use super::params::Tile;
use crate::ops::{HeadShape, SequenceSpan};

/// Packed rows of a tile of few rows.
pub const FEW: usize = 16;
/// Packed rows of a tile of many.
pub const MANY: usize = 64;
/// Those of one for the warpgroups of `attention_hopper.cu`.
pub const MANY_HOPPER: usize = 128;
/// Keys of a part of a context that is not very long. With 8 key-value heads, 8 contexts of 2,048 keys make 512 blocks, of which a
/// processor holds three: enough reads under way for the whole card.
const PART: usize = 256;
/// Parts of a context: they are joined one after the other.
const MOST_PARTS: usize = 64;
/// Tiles that a sequence of several rows has at most because its keys are cut: with 8 key-value heads they are a block for each processor of
/// a large card, whose four warps keep as much under way as its memory gives.
pub(super) const MOST_CUT: usize = 16;
/// Keys of a part of such a tile, at least: what is written of a part and joined is then little beside what is read for it.
const PART_OF_MANY: usize = 1024;
/// The tile is the whole.
const WHOLE: u32 = u32::MAX;

/// Keys of a part of a context. A question of the context alone, and not of how much else there is to do, so that a row's result is the
/// same in any company.
fn keys_of_part(context: usize) -> usize {
    PART.max(context.div_ceil(MOST_PARTS).next_power_of_two())
}

/// Parts that a context is cut into.
pub fn parts_of(context: usize) -> usize {
    context.div_ceil(keys_of_part(context)).max(1)
}

/// Parts that each of so many tiles of a sequence of several rows is cut into: a few new tokens behind a long context would else have few
/// processors, each with all of its keys. A question of the sequence alone, as above.
pub(super) fn parts_of_many(tiles: usize, context: usize) -> usize {
    (MOST_CUT / tiles).min(context / PART_OF_MANY).max(1)
}

/// Keys of such a part, a multiple of what any kernel takes at once. By the rounding there may be fewer parts.
fn keys_of_many(tiles: usize, context: usize) -> usize {
    context.div_ceil(parts_of_many(tiles, context)).next_multiple_of(PART)
}

/// Lists of tiles, for the kernels of the same names.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub few: Vec<Tile>,
    pub many: Vec<Tile>,
    pub plain: Vec<Tile>,
    pub joins: Vec<Tile>,
    /// Packed rows whose partial results `few` and `many` make and `joins` joins, each part's counted.
    pub partials: usize,
    /// Packed rows of a row.
    group: usize,
}

impl Plan {
    /// Plans anew, in the memory that is there. `many_rows`: packed rows of a tile of many; `None`: the shape has no kernels with matrix units.
    pub(super) fn build(
        &mut self,
        sequences: impl IntoIterator<Item = SequenceSpan>,
        shape: HeadShape,
        many_rows: Option<usize>,
    ) {
        let group = shape.heads / shape.kv_heads;
        (self.partials, self.group) = (0, group);
        let Plan { few, many, plain, joins, partials, .. } = self;
        [&mut *few, &mut *many, &mut *plain, &mut *joins].into_iter().for_each(Vec::clear);
        for s in sequences {
            let tile = |packed: usize| Tile {
                first_row: s.first_row,
                rows: s.rows,
                context: s.context_len,
                first_block: s.first_block,
                packed: packed as u32,
                from: 0,
                to: s.context_len,
                partial: WHOLE,
            };
            let packed_rows = s.rows as usize * group;
            let Some(many_rows) = many_rows else {
                plain.extend((0..s.rows as usize).map(tile));
                continue;
            };
            let (tiles, rows_of_tile) = if packed_rows > FEW { (&mut *many, many_rows) } else { (&mut *few, FEW) };
            let context = s.context_len as usize;
            let keys = match s.rows {
                // Captured steps have as many tiles whatever the contexts are: what pads them has tiles of few rows.
                1 if packed_rows > FEW => context,
                1 => keys_of_part(context),
                _ => keys_of_many(packed_rows.div_ceil(many_rows), context),
            };
            let parts = context.div_ceil(keys.max(1)).max(1);
            for whole in (0..packed_rows).step_by(rows_of_tile).map(tile) {
                if parts == 1 {
                    tiles.push(whole);
                    continue;
                }
                let rows = (packed_rows - whole.packed as usize).min(rows_of_tile);
                for part in 0..parts {
                    let (from, to) = ((part * keys) as u32, ((part + 1) * keys).min(context) as u32);
                    tiles.push(Tile { from, to, partial: (*partials + part * rows) as u32, ..whole });
                }
                for first in (0..rows).step_by(FEW) {
                    let (packed, partial) = (whole.packed + first as u32, (*partials + first) as u32);
                    joins.push(Tile { packed, from: rows as u32, to: parts as u32, partial, ..whole });
                }
                *partials += parts * rows;
            }
        }
    }

    /// Appends tiles that have nothing to do until there are so many of few rows and so many joins; room for as many partial results.
    /// A shape without tiles of few rows stays as it is.
    pub(super) fn pad(&mut self, tiles: usize, joins: usize) {
        const IDLE: Tile = Tile { first_row: 0, rows: 0, context: 0, first_block: 0, packed: 0, from: 0, to: 0, partial: WHOLE };
        if self.few.is_empty() {
            return;
        }
        self.few.resize(tiles.max(self.few.len()), IDLE);
        if joins > 0 {
            self.joins.resize(joins.max(self.joins.len()), Tile { partial: 0, ..IDLE });
            self.partials = self.partials.max(tiles * self.group);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(rows: u32, context_len: u32) -> SequenceSpan {
        SequenceSpan { first_row: 0, rows, context_len, first_block: 0 }
    }

    #[test]
    fn every_key_of_a_long_context_is_in_one_part() {
        let shape = HeadShape { heads: 8, kv_heads: 2, head_dim: 64 };
        let mut plan = Plan::default();
        plan.build([span(1, 256), span(1, 257), span(1, 1000)], shape, Some(MANY));
        assert_eq!(
            plan.few.iter().map(|t| (t.from, t.to, t.partial)).collect::<Vec<_>>(),
            [(0, 256, u32::MAX), (0, 256, 0), (256, 257, 4), (0, 256, 8), (256, 512, 12), (512, 768, 16), (768, 1000, 20)]
        );
        assert_eq!(plan.joins.iter().map(|t| (t.partial, t.from, t.to)).collect::<Vec<_>>(), [(0, 4, 2), (8, 4, 4)]);
        assert_eq!(plan.partials, 24);
        // Several rows are cut as those of a prompt are.
        plan.build([span(4, 1000), span(3, 2100)], shape, Some(MANY));
        assert_eq!(
            plan.few.iter().map(|t| (t.from, t.to, t.partial)).collect::<Vec<_>>(),
            [(0, 1000, u32::MAX), (0, 1280, 0), (1280, 2100, 12)]
        );
        assert_eq!(plan.joins.iter().map(|t| (t.partial, t.from, t.to)).collect::<Vec<_>>(), [(0, 12, 2)]);
    }

    #[test]
    fn every_key_of_a_short_prompt_behind_a_long_context_is_in_one_part() {
        let shape = HeadShape { heads: 32, kv_heads: 8, head_dim: 128 };
        let mut plan = Plan::default();
        // 20 rows of 4 heads are 80 packed rows: 5 pieces of 16, of which the first tile has 4.
        plan.build([span(1, 300), span(20, 5000)], shape, Some(MANY));
        let keys = [(0, 1280), (1280, 2560), (2560, 3840), (3840, 5000)];
        assert_eq!(plan.many.iter().map(|t| (t.from, t.to)).collect::<Vec<_>>(), [keys, keys].concat());
        assert_eq!(
            plan.many.iter().map(|t| (t.packed, t.partial)).collect::<Vec<_>>(),
            [(0, 8), (0, 72), (0, 136), (0, 200), (64, 264), (64, 280), (64, 296), (64, 312)]
        );
        assert_eq!(
            plan.joins.iter().map(|t| (t.packed, t.partial, t.from, t.to)).collect::<Vec<_>>(),
            [(0, 0, 4, 2), (0, 8, 64, 4), (16, 24, 64, 4), (32, 40, 64, 4), (48, 56, 64, 4), (64, 264, 16, 4)]
        );
        assert_eq!(plan.partials, 328);
        // Short contexts, those that are mostly new, and decoding with many heads to a head of keys are not cut.
        plan.build([span(20, 2047), span(300, 9000)], shape, Some(MANY));
        assert_eq!((plan.many.len(), plan.joins.len(), plan.partials), (2 + 19, 0, 0));
        plan.build([span(1, 9000)], HeadShape { heads: 32, kv_heads: 1, head_dim: 128 }, Some(MANY));
        assert_eq!((plan.many.len(), plan.joins.len()), (1, 0));
    }

    #[test]
    fn parts_of_prompts_leave_no_key_out() {
        for context in [1, 2047, 2048, 2049, 16_385, 131_071, 1 << 20, u32::MAX as usize] {
            for tiles in 1..20 {
                let (asked, keys) = (parts_of_many(tiles, context), keys_of_many(tiles, context));
                let parts = context.div_ceil(keys);
                assert!(parts <= asked && tiles * parts <= MOST_CUT.max(tiles), "{tiles} {context}");
                assert!(parts == 1 || keys >= PART_OF_MANY && keys.is_multiple_of(128), "{tiles} {context}");
            }
        }
    }

    #[test]
    fn long_contexts_have_few_parts_that_leave_no_key_out() {
        for context in [1, 256, 257, 16_384, 16_385, 100_000, 131_072, 1 << 20, u32::MAX as usize] {
            let (parts, keys) = (parts_of(context), keys_of_part(context));
            assert!(parts <= MOST_PARTS && parts * keys >= context && (parts - 1) * keys < context, "{context}");
            // Kernels take 16 keys at once.
            assert!(keys.is_multiple_of(16));
        }
        assert_eq!((parts_of(16_384), parts_of(131_072)), (64, 64));
    }

    #[test]
    fn rows_go_to_the_tiles_that_hold_them() {
        let shape = HeadShape { heads: 9, kv_heads: 3, head_dim: 64 };
        let mut plan = Plan::default();
        // 5 rows of 3 heads are 15 packed rows, 6 are 18, 43 are 129.
        plan.build([span(5, 5), span(6, 6), span(43, 43)], shape, Some(MANY));
        assert_eq!((plan.few.len(), plan.many.len()), (1, 1 + 3));
        plan.build([span(5, 5), span(6, 6), span(43, 43)], shape, Some(MANY_HOPPER));
        assert_eq!((plan.few.len(), plan.many.len()), (1, 1 + 2));
        plan.build([span(5, 5)], shape, None);
        assert_eq!((plan.few.len(), plan.plain.len()), (0, 5));
    }
}
