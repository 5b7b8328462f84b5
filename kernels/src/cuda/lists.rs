//! What a step brings: its lists on the device, and the blocks that are copied before anything else runs.

use std::iter::repeat;

use super::device::{Address, Device, HostAddress, Kernel, Launch, Pieces, Source};
use super::params as p;
use super::room::Room;
use super::segments::Segments;
use super::{COPY_BLOCK, CudaBackend};
use crate::error::KernelError;
use crate::ops::{KvCache, Limits, StepBatch};

const CARRY: Kernel = Kernel::new(Source::Rows, "carry", 256);

/// The step's lists on the device.
#[derive(Default)]
pub(super) struct StepLists {
    pub room: Room,
    staging: Vec<u8>,
    pub tokens: Address,
    pub positions: Address,
    pub slots: Address,
    /// Rows that have an adapter, by adapter, and tiles of them.
    pub adapted: Address,
    pub tiles: Address,
    /// How many tiles are launched.
    pub segments: usize,
    pub gathered: Address,
    /// How many tokens there are, without those that pad.
    pub count: Address,
    pub blocks: Address,
    /// Pairs of [`StepBatch::carried`].
    carried: Address,
    planned: Segments,
}

/// Places for blocks of a cache in the machine's memory. In each, the layers of keys, then those of values.
#[derive(Clone, Copy)]
pub(super) struct Swap {
    pub kv: KvCache,
    pub at: HostAddress,
}

/// Keys of a block at least, so far as memory is planned for.
const LEAST_BLOCK: usize = 16;

impl StepLists {
    /// Bytes that the lists of the largest step reserve.
    pub(super) fn most_bytes(limits: Limits) -> usize {
        let Limits { max_tokens, max_samples, max_positions } = limits;
        let of_samples = 4 + 2 * 4 + max_positions.div_ceil(LEAST_BLOCK) * 4;
        // A token, its position, and its place among the rows of an adapter, of which each may be a tile of its own.
        Room::size(max_tokens * (8 + 3 * 4 + size_of::<p::LoraTile>()) + max_samples * of_samples + 4)
    }
}

impl<D: Device> CudaBackend<D> {
    /// Puts the step's lists on the device in one copy.
    pub(super) fn write_lists(&mut self) -> Result<(), KernelError> {
        let StepBatch { tokens, positions, slots, samples, blocks, adapters, carried, .. } = &self.batch;
        // Lists of a step that may be captured have the lengths that it is padded to, so they always begin at the same places. A row
        // that pads is a token 0 at position 0, writes nothing to the cache and has no adapter; a tile that pads has no rows.
        let size = self.captures.size;
        let rows = size.map_or(tokens.len(), |size| size.rows);
        let sampled = size.map_or(samples.len(), |size| size.samples);
        let StepLists { planned, staging, .. } = &mut self.lists;
        planned.build(adapters);
        // As many as there may be whatever adapters the rows have: a captured step has one grid.
        let segments = size.map_or(planned.tiles.len(), |size| Segments::most_tiles(size.rows, self.adapters.loaded()));
        // There is a place for each row's: what lies behind stays where it is when adapters come and go.
        let (adapted, tiles) = size.map_or((planned.rows.len(), planned.tiles.len()), |size| (size.rows, size.rows));
        let idle = p::LoraTile { slot: 0, first: 0, count: 0 };
        staging.clear();
        // The widest first, so that all lie on multiples of their size.
        staging.extend(slots.iter().copied().chain(repeat(-1)).take(rows).flat_map(|v| v.to_le_bytes()));
        let mut starts = [0; 8];
        let lists: [&mut dyn Iterator<Item = u32>; 8] = [
            &mut tokens.iter().copied().chain(repeat(0)).take(rows),
            &mut positions.iter().copied().chain(repeat(0)).take(rows),
            &mut planned.rows.iter().copied().chain(repeat(0)).take(adapted),
            &mut planned.tiles.iter().copied().chain(repeat(idle)).take(tiles).flat_map(|t| [t.slot, t.first, t.count]),
            &mut samples.iter().map(|s| s.row).chain(repeat(0)).take(sampled),
            &mut std::iter::once(tokens.len() as u32),
            &mut blocks.iter().copied(),
            &mut carried.iter().flat_map(|&(row, sample)| [row, sample]),
        ];
        for (start, list) in starts.iter_mut().zip(lists) {
            *start = staging.len();
            staging.extend(list.flat_map(u32::to_le_bytes));
        }
        let at = self.lists.room.write(&mut self.device, "step", &self.lists.staging)?;
        let [tokens, positions, adapted, tiles, gathered, count, blocks, carried] = starts.map(|start| at.plus(start));
        let StepLists { room, staging, planned, .. } = std::mem::take(&mut self.lists);
        let slots = at;
        self.lists = StepLists {
            room,
            staging,
            tokens,
            positions,
            slots,
            adapted,
            tiles,
            segments,
            gathered,
            count,
            blocks,
            carried,
            planned,
        };
        Ok(())
    }

    pub(super) fn copy_blocks(&mut self) -> Result<(), KernelError> {
        for index in 0..self.caches.len() {
            let cache = &self.caches[index];
            let (bytes, layers, blocks) = (cache.block_bytes(), cache.spec.layers, cache.spec.blocks);
            let sides = [cache.keys, cache.values];
            for i in 0..self.batch.copies.len() {
                let (from, to) = self.batch.copies[i];
                for cache in sides {
                    let params = p::CopyBlock {
                        cache,
                        from: from.into(),
                        to: to.into(),
                        layer_bytes: (blocks * bytes) as u64,
                        block_bytes: bytes as u32,
                        unused: 0,
                    };
                    self.launch(COPY_BLOCK, Launch::grid(bytes.div_ceil(16 * 256), layers), params)?;
                }
            }
        }
        Ok(())
    }

    /// Copies blocks to their places in the machine's memory.
    pub(super) fn save_blocks(&mut self) -> Result<(), KernelError> {
        for i in 0..self.batch.saved.len() {
            let (block, place) = self.batch.saved[i];
            for (pieces, at) in self.swapped(block, place).into_iter().flatten() {
                self.device.save(pieces, at)?;
            }
        }
        Ok(())
    }

    /// Copies blocks back from there.
    pub(super) fn restore_blocks(&mut self) -> Result<(), KernelError> {
        for i in 0..self.batch.restored.len() {
            let (place, block) = self.batch.restored[i];
            for (pieces, at) in self.swapped(block, place).into_iter().flatten() {
                self.device.restore(at, pieces)?;
            }
        }
        Ok(())
    }

    /// A block's keys and values, and where they are kept.
    fn swapped(&self, block: u32, place: u32) -> Option<[(Pieces, HostAddress); 2]> {
        let Swap { kv, at } = self.swap?;
        let cache = &self.caches[kv.0 as usize];
        let (bytes, count) = (cache.block_bytes(), cache.spec.layers);
        let side = |cached: Address, side: usize| {
            let pieces = Pieces { at: cached.plus(block as usize * bytes), bytes, count, stride: cache.spec.blocks * bytes };
            (pieces, at.plus((2 * place as usize + side) * count * bytes))
        };
        Some([side(cache.keys, 0), side(cache.values, 1)])
    }

    /// Gives rows the tokens that the step before draws. The first of several ranks draws them, and tells the others all tokens of the step:
    /// behind what draws and before what embeds, and only in steps that carry on from a token under way.
    pub(super) fn carry(&mut self) -> Result<(), KernelError> {
        let (count, place) = (self.batch.carried.len(), self.device.place());
        let StepLists { tokens, carried: pairs, .. } = self.lists;
        if place.rank == 0 {
            let (drawn, words) = self.sampling.drawn();
            let params = p::Carry { tokens, drawn, pairs, count: count as u32, words };
            self.launch(CARRY, Launch::blocks(count.div_ceil(256)), params)?;
        }
        if count == 0 || place.is_alone() {
            return Ok(());
        }
        self.device.broadcast(tokens, self.batch.tokens.len())
    }
}
