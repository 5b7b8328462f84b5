//! Which rows of a step go together.

use super::GROUP_ROWS;
use crate::ops::NO_ADAPTER;

/// Groups are whole blocks of rows that share a pass over a factor.
const ROW_BLOCK: usize = 4;

/// Rows that use one adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Group {
    pub slot: u32,
    /// Where in the plan's list of rows.
    pub first: usize,
    pub rows: usize,
}

/// The rows of a step that have an adapter, in groups. Memory is kept between steps.
#[derive(Debug, Default)]
pub(in crate::cpu) struct LoraPlan {
    rows: Vec<u32>,
    groups: Vec<Group>,
}

impl LoraPlan {
    /// Groups the rows by their `adapters`, so that `threads` have something to do.
    pub fn build(&mut self, adapters: &[u32], threads: usize) {
        self.rows.clear();
        self.groups.clear();
        let with_adapter = |row: &u32| adapters[*row as usize] != NO_ADAPTER;
        self.rows.extend((0..adapters.len() as u32).filter(with_adapter));
        self.rows.sort_unstable_by_key(|&row| (adapters[row as usize], row));
        // An adapter's rows stay together where there are others for the other threads: its factors are read once then.
        let share = self.rows.len().div_ceil(threads.max(1)).next_multiple_of(ROW_BLOCK).clamp(ROW_BLOCK, GROUP_ROWS);
        let mut first = 0;
        for run in self.rows.chunk_by(|&a, &b| adapters[a as usize] == adapters[b as usize]) {
            for rows in run.chunks(share) {
                self.groups.push(Group { slot: adapters[rows[0] as usize], first, rows: rows.len() });
                first += rows.len();
            }
        }
    }

    pub fn tasks(&self) -> usize {
        self.groups.len()
    }

    pub(super) fn group(&self, task: usize) -> Group {
        self.groups[task]
    }

    pub(super) fn rows(&self, first: usize, rows: usize) -> &[u32] {
        &self.rows[first..first + rows]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_with_an_adapter_is_in_one_group_of_its_adapter() {
        let mut plan = LoraPlan::default();
        for (count, threads) in [(0usize, 2), (1, 2), (7, 1), (90, 3), (300, 2)] {
            let adapters: Vec<u32> = (0..count).map(|row| [3, NO_ADAPTER, 0, 0, 3, NO_ADAPTER, 7][row * 5 % 7]).collect();
            plan.build(&adapters, threads);
            let mut seen = Vec::new();
            for task in 0..plan.tasks() {
                let group = plan.group(task);
                assert!((1..=GROUP_ROWS).contains(&group.rows));
                for &row in plan.rows(group.first, group.rows) {
                    assert_eq!(adapters[row as usize], group.slot);
                    seen.push(row as usize);
                }
            }
            seen.sort_unstable();
            let want: Vec<usize> = (0..count).filter(|&row| adapters[row] != NO_ADAPTER).collect();
            assert_eq!(seen, want);
        }
        plan.build(&[NO_ADAPTER; 5], 2);
        assert_eq!(plan.tasks(), 0);
    }
}
