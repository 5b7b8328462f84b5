//! The blocks of one sequence, in order. Dropping the table gives them back.

use crate::block_pool::{BLOCK_SIZE, BlockId, SharedPool};
use crate::prefix_cache::BlockHash;

/// Blocks that hold a sequence's keys and values: position `p` lies in block `p / 32` at offset `p % 32`.
#[derive(Debug)]
pub struct BlockTable {
    pool: SharedPool,
    blocks: Vec<BlockId>,
}

/// No block is free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfBlocks;

impl BlockTable {
    /// An empty table.
    pub fn new(pool: &SharedPool) -> Self {
        Self { pool: pool.clone(), blocks: Vec::new() }
    }

    /// The blocks.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// Makes room for `tokens` positions; takes nothing when there are not enough blocks.
    pub fn grow_to(&mut self, tokens: usize) -> Result<(), OutOfBlocks> {
        let missing = tokens.div_ceil(BLOCK_SIZE).saturating_sub(self.blocks.len());
        if missing == 0 {
            return Ok(());
        }
        let mut pool = self.pool.borrow();
        if pool.free() < missing {
            return Err(OutOfBlocks);
        }
        self.blocks.extend((0..missing).map_while(|_| pool.allocate()));
        Ok(())
    }

    /// Uses the block cached under `hash` as block `index` (present already, or next); `false` when there is none.
    pub fn adopt(&mut self, index: usize, hash: &BlockHash) -> bool {
        let mut pool = self.pool.borrow();
        let Some(id) = pool.acquire(hash) else { return false };
        match self.blocks.get_mut(index) {
            Some(slot) => pool.release(std::mem::replace(slot, id)),
            None => self.blocks.push(id),
        }
        true
    }

    /// Makes block `index` this table's own before it is written; returns what must be copied when it was shared.
    pub fn make_writable(&mut self, index: usize) -> Result<Option<(BlockId, BlockId)>, OutOfBlocks> {
        let mut pool = self.pool.borrow();
        let from = self.blocks[index];
        if pool.owners(from) == 1 {
            return Ok(None);
        }
        let to = pool.allocate().ok_or(OutOfBlocks)?;
        pool.release(from);
        self.blocks[index] = to;
        Ok(Some((from, to)))
    }

    /// A second table over the same blocks, cut to `tokens` positions.
    pub fn fork(&self, tokens: usize) -> Self {
        let blocks: Vec<_> = self.blocks[..tokens.div_ceil(BLOCK_SIZE).min(self.blocks.len())].to_vec();
        let mut pool = self.pool.borrow();
        for block in &blocks {
            pool.share(*block);
        }
        drop(pool);
        Self { pool: self.pool.clone(), blocks }
    }

    /// Makes block `index`, full and computed, findable.
    pub fn cache(&self, index: usize, hash: BlockHash) {
        self.pool.borrow().cache(self.blocks[index], hash);
    }

    /// Gives all blocks back, last first.
    pub fn clear(&mut self) {
        let mut pool = self.pool.borrow();
        while let Some(block) = self.blocks.pop() {
            pool.release(block);
        }
    }
}

impl Drop for BlockTable {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::AdapterGeneration;

    #[test]
    fn growth_is_all_or_nothing_and_drop_gives_everything_back() {
        let pool = SharedPool::new(3);
        let mut table = BlockTable::new(&pool);
        table.grow_to(33).unwrap();
        assert_eq!(pool.borrow().used(), 2);
        assert_eq!(table.grow_to(129), Err(OutOfBlocks));
        assert_eq!(pool.borrow().used(), 2);
        drop(table);
        assert_eq!(pool.borrow().free(), 3);
    }

    #[test]
    fn a_fork_shares_until_it_writes() {
        let pool = SharedPool::new(4);
        let mut a = BlockTable::new(&pool);
        a.grow_to(40).unwrap();
        let mut b = a.fork(40);
        assert_eq!(pool.borrow().used(), 2);
        let (from, to) = b.make_writable(1).unwrap().unwrap();
        assert_eq!(from, a.blocks()[1]);
        assert_eq!(to, b.blocks()[1]);
        assert_eq!(a.make_writable(1), Ok(None));
        assert_eq!(a.blocks()[0], b.blocks()[0]);
        drop(a);
        assert_eq!(pool.borrow().used(), 2);
        drop(b);
        assert_eq!(pool.borrow().used(), 0);
    }

    #[test]
    fn an_evicted_child_leaves_its_parent_cached() {
        let pool = SharedPool::new(2);
        let first = BlockHash::root(AdapterGeneration(0), None).child(&[1]);
        let second = first.child(&[2]);
        let mut table = BlockTable::new(&pool);
        table.grow_to(64).unwrap();
        table.cache(0, first);
        table.cache(1, second);
        drop(table);
        let mut other = BlockTable::new(&pool);
        other.grow_to(1).unwrap();
        let mut again = BlockTable::new(&pool);
        assert!(again.adopt(0, &first));
        assert!(!again.adopt(1, &second));
    }
}
