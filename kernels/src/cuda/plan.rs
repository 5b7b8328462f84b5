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

/// Lists of tiles, for the kernels of the same names.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub few: Vec<Tile>,
    pub many: Vec<Tile>,
    pub plain: Vec<Tile>,
    pub joins: Vec<Tile>,
    /// Partial results that `few` makes and `joins` joins.
    pub partials: usize,
}

impl Plan {
    /// Plans anew, in the memory that is there. `many_rows`: packed rows of a tile of many; `None`: the shape has no kernels with matrix units.
    pub(super) fn build(
        &mut self,
        sequences: impl IntoIterator<Item = SequenceSpan>,
        shape: HeadShape,
        many_rows: Option<usize>,
    ) {
        let Plan { few, many, plain, joins, partials } = self;
        [&mut *few, &mut *many, &mut *plain, &mut *joins].into_iter().for_each(Vec::clear);
        *partials = 0;
        let group = shape.heads / shape.kv_heads;
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
            if packed_rows > FEW {
                many.extend((0..packed_rows).step_by(many_rows).map(tile));
            } else if parts_of(s.context_len as usize) == 1 {
                few.push(tile(0));
            } else {
                let (parts, keys) = (parts_of(s.context_len as usize), keys_of_part(s.context_len as usize));
                joins.push(Tile { from: 0, to: parts as u32, partial: *partials as u32, ..tile(0) });
                for part in 0..parts {
                    let (from, to) = ((part * keys) as u32, ((part + 1) * keys) as u32);
                    few.push(Tile { from, to: to.min(s.context_len), partial: (*partials + part) as u32, ..tile(0) });
                }
                *partials += parts;
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
            self.partials = self.partials.max(tiles);
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
        plan.build([span(1, 256), span(1, 257), span(4, 1000)], shape, Some(MANY));
        assert_eq!(
            plan.few.iter().map(|t| (t.from, t.to, t.partial)).collect::<Vec<_>>(),
            [(0, 256, u32::MAX), (0, 256, 0), (256, 257, 1), (0, 256, 2), (256, 512, 3), (512, 768, 4), (768, 1000, 5)]
        );
        assert_eq!(plan.joins.iter().map(|t| (t.partial, t.to)).collect::<Vec<_>>(), [(0, 2), (2, 4)]);
        assert_eq!(plan.partials, 6);
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
