//! Which rows of a step share what is read of an adapter's factors; see `kernels/cuda/lora.cu`. Planned once per step, for all sites.

use super::params::LoraTile;
use crate::ops::NO_ADAPTER;

/// Rows of a tile.
pub(super) const TILE: usize = 16;

/// The rows that have an adapter, and tiles of them. Memory is kept between steps.
#[derive(Debug, Default)]
pub(super) struct Segments {
    pub rows: Vec<u32>,
    pub tiles: Vec<LoraTile>,
}

impl Segments {
    /// Sorts the rows by adapter and cuts them into tiles of one.
    pub(super) fn build(&mut self, adapters: &[u32]) {
        let Segments { rows, tiles } = self;
        rows.clear();
        tiles.clear();
        rows.extend((0..).zip(adapters).filter(|(_, slot)| **slot != NO_ADAPTER).map(|(row, _)| row));
        rows.sort_unstable_by_key(|&row| (adapters[row as usize], row));
        let mut first = 0;
        for own in rows.chunk_by(|&a, &b| adapters[a as usize] == adapters[b as usize]).flat_map(|run| run.chunks(TILE)) {
            tiles.push(LoraTile { slot: adapters[own[0] as usize], first, count: own.len() as u32 });
            first += own.len() as u32;
        }
    }

    /// Tiles that so many rows make at most, each with one of so many adapters.
    pub(super) fn most_tiles(rows: usize, adapters: usize) -> usize {
        // Of each adapter's tiles all but one are full, and none has no row.
        rows.min((rows + adapters * (TILE - 1)) / TILE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_with_an_adapter_is_in_one_tile_of_its_adapter() {
        let mut segments = Segments::default();
        for count in [0, 1, 7, 16, 90, 300] {
            let adapters: Vec<u32> = (0..count).map(|row| [3, NO_ADAPTER, 0, 0, 3, NO_ADAPTER, 7][row * 5 % 7]).collect();
            segments.build(&adapters);
            let mut seen = Vec::new();
            for tile in &segments.tiles {
                assert!((1..=TILE).contains(&(tile.count as usize)));
                let rows = &segments.rows[tile.first as usize..][..tile.count as usize];
                assert!(rows.iter().all(|row| adapters[*row as usize] == tile.slot) && rows.is_sorted());
                seen.extend(rows.iter().map(|row| *row as usize));
            }
            seen.sort_unstable();
            let want: Vec<usize> = (0..count).filter(|&row| adapters[row] != NO_ADAPTER).collect();
            assert_eq!(seen, want);
            assert!(segments.tiles.len() <= Segments::most_tiles(count, 3), "{count}");
        }
    }

    #[test]
    fn no_sharing_out_of_rows_makes_more_tiles_than_there_can_be() {
        let mut segments = Segments::default();
        for (rows, adapters) in [(1, 1), (8, 3), (16, 1), (17, 1), (40, 3), (48, 48), (256, 4)] {
            let most = Segments::most_tiles(rows, adapters);
            // The worst: all adapters but the first have a row that no tile shares.
            let worst: Vec<u32> = (0..rows).map(|row| (row % 17 % adapters.min(rows)) as u32).collect();
            let lone: Vec<u32> = (0..rows).map(|row| if row < adapters { row as u32 } else { 0 }).collect();
            for list in [worst, lone] {
                segments.build(&list);
                assert!(segments.tiles.len() <= most, "{rows} rows, {adapters} adapters");
            }
        }
        assert_eq!((Segments::most_tiles(256, 1), Segments::most_tiles(4, 9)), (16, 4));
    }
}
