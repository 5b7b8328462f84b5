//! The pool of fixed KV blocks.
//!
//! A block is in one of three states: free, used (owned by one or more block tables, counted), or free but cached: its keys and
//! values are intact and can be found under its hash until the block is handed out again. Free and cached blocks stand in one
//! queue, least recently used first; a table gives its blocks back last block first, so a child leaves the cache before its parent.

use crate::prefix_cache::BlockHash;
use std::cell::{RefCell, RefMut};
use std::collections::HashMap;
use std::rc::Rc;

/// Tokens per block.
pub const BLOCK_SIZE: usize = 32;

/// A block of the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

/// End of a list.
const NIL: u32 = u32::MAX;

#[derive(Clone, Debug)]
struct Block {
    owners: u32,
    hash: Option<BlockHash>,
    previous: u32,
    next: u32,
}

/// All blocks. The engine's thread alone holds it, through [`SharedPool`].
#[derive(Debug)]
pub struct BlockPool {
    blocks: Vec<Block>,
    /// Ends of the queue of blocks without owner.
    first: u32,
    last: u32,
    free: usize,
    cached: HashMap<BlockHash, BlockId>,
}

impl BlockPool {
    /// A pool of `total` free blocks.
    pub fn new(total: usize) -> Self {
        let total = total.min(NIL as usize - 1);
        let mut pool = Self { blocks: Vec::with_capacity(total), first: NIL, last: NIL, free: 0, cached: HashMap::new() };
        for id in 0..total as u32 {
            pool.blocks.push(Block { owners: 0, hash: None, previous: NIL, next: NIL });
            pool.append(id);
        }
        pool
    }

    /// Blocks of the pool.
    pub fn total(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks without owner, cached ones too.
    pub fn free(&self) -> usize {
        self.free
    }

    /// Blocks with an owner.
    pub fn used(&self) -> usize {
        self.blocks.len() - self.free
    }

    /// Blocks that can be found by hash, with or without owner.
    pub fn cached(&self) -> usize {
        self.cached.len()
    }

    /// Takes the least recently used block; its cached content is forgotten. `None` when all have owners.
    pub fn allocate(&mut self) -> Option<BlockId> {
        let id = self.first;
        if id == NIL {
            return None;
        }
        self.unlink(id);
        let block = &mut self.blocks[id as usize];
        block.owners = 1;
        if let Some(hash) = block.hash.take() {
            self.cached.remove(&hash);
        }
        Some(BlockId(id))
    }

    /// Takes the block cached under `hash`, sharing it when it has owners.
    pub fn acquire(&mut self, hash: &BlockHash) -> Option<BlockId> {
        let id = *self.cached.get(hash)?;
        if self.blocks[id.0 as usize].owners == 0 {
            self.unlink(id.0);
        }
        self.blocks[id.0 as usize].owners += 1;
        Some(id)
    }

    /// Adds an owner to a block that has one.
    pub fn share(&mut self, id: BlockId) {
        debug_assert!(self.owners(id) > 0, "shared a free block");
        self.blocks[id.0 as usize].owners += 1;
    }

    /// Owners of a block.
    pub fn owners(&self, id: BlockId) -> u32 {
        self.blocks[id.0 as usize].owners
    }

    /// Removes an owner; the last one's leave puts the block at the queue's end, or, when nothing can find it, at its front.
    pub fn release(&mut self, id: BlockId) {
        let block = &mut self.blocks[id.0 as usize];
        debug_assert!(block.owners > 0, "released a free block");
        block.owners -= 1;
        if block.owners == 0 {
            if block.hash.is_some() { self.append(id.0) } else { self.prepend(id.0) }
        }
    }

    /// Makes a full, computed block findable. The first block under a hash stays; a second one remains private.
    pub fn cache(&mut self, id: BlockId, hash: BlockHash) {
        debug_assert!(self.owners(id) > 0, "cached a free block");
        if self.blocks[id.0 as usize].hash.is_none() && !self.cached.contains_key(&hash) {
            self.blocks[id.0 as usize].hash = Some(hash);
            self.cached.insert(hash, id);
        }
    }

    /// Walks everything and says what does not add up; for debug builds and tests.
    pub fn check(&self) -> Result<(), String> {
        let mut queued = 0;
        let mut previous = NIL;
        let mut id = self.first;
        while id != NIL {
            let block = &self.blocks[id as usize];
            if block.owners != 0 {
                return Err(format!("block {id} is queued as free with {} owners", block.owners));
            }
            if block.previous != previous {
                return Err(format!("the queue is broken at block {id}"));
            }
            queued += 1;
            if queued > self.blocks.len() {
                return Err("the queue is a circle".into());
            }
            previous = id;
            id = block.next;
        }
        let used = self.blocks.iter().filter(|block| block.owners > 0).count();
        if queued != self.free || queued + used != self.blocks.len() || self.last != previous {
            return Err(format!("{queued} queued of {} free, {used} used, {} in all", self.free, self.blocks.len()));
        }
        let hashed = self.blocks.iter().filter(|block| block.hash.is_some()).count();
        if hashed != self.cached.len() {
            return Err(format!("{hashed} blocks have a hash, {} can be found", self.cached.len()));
        }
        match self.cached.iter().find(|(hash, id)| self.blocks[id.0 as usize].hash != Some(**hash)) {
            Some((_, id)) => Err(format!("block {} is cached under a hash that is not its own", id.0)),
            None => Ok(()),
        }
    }

    fn append(&mut self, id: u32) {
        self.link(self.last, id, NIL);
    }

    fn prepend(&mut self, id: u32) {
        self.link(NIL, id, self.first);
    }

    fn link(&mut self, previous: u32, id: u32, next: u32) {
        self.blocks[id as usize].previous = previous;
        self.blocks[id as usize].next = next;
        match previous {
            NIL => self.first = id,
            _ => self.blocks[previous as usize].next = id,
        }
        match next {
            NIL => self.last = id,
            _ => self.blocks[next as usize].previous = id,
        }
        self.free += 1;
    }

    fn unlink(&mut self, id: u32) {
        let (previous, next) = (self.blocks[id as usize].previous, self.blocks[id as usize].next);
        match previous {
            NIL => self.first = next,
            _ => self.blocks[previous as usize].next = next,
        }
        match next {
            NIL => self.last = previous,
            _ => self.blocks[next as usize].previous = previous,
        }
        self.blocks[id as usize].previous = NIL;
        self.blocks[id as usize].next = NIL;
        self.free -= 1;
    }
}

/// The pool as block tables hold it: on the engine's thread only, borrowed for single calls.
#[derive(Clone, Debug)]
pub struct SharedPool(Rc<RefCell<BlockPool>>);

impl SharedPool {
    /// A pool of `total` free blocks.
    pub fn new(total: usize) -> Self {
        Self(Rc::new(RefCell::new(BlockPool::new(total))))
    }

    /// The pool, for one call.
    pub fn borrow(&self) -> RefMut<'_, BlockPool> {
        self.0.borrow_mut()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hash(n: u8) -> BlockHash {
        BlockHash([n; 32])
    }

    #[test]
    fn a_released_cached_block_is_found_until_it_is_handed_out_again() {
        let mut pool = BlockPool::new(2);
        let a = pool.allocate().unwrap();
        pool.cache(a, hash(1));
        pool.release(a);
        assert_eq!(pool.free(), 2);
        assert_eq!(pool.acquire(&hash(1)), Some(a));
        pool.release(a);
        // The uncached block goes first, then the cached one.
        let b = pool.allocate().unwrap();
        assert_ne!(b, a);
        assert_eq!(pool.allocate(), Some(a));
        assert_eq!(pool.acquire(&hash(1)), None);
        assert_eq!(pool.allocate(), None);
        pool.check().unwrap();
    }

    #[test]
    fn the_least_recently_released_block_is_evicted_first() {
        let mut pool = BlockPool::new(3);
        let ids: Vec<_> = (0..3).map(|_| pool.allocate().unwrap()).collect();
        for (i, id) in ids.iter().enumerate() {
            pool.cache(*id, hash(i as u8));
        }
        for id in [ids[1], ids[2], ids[0]] {
            pool.release(id);
        }
        assert_eq!(pool.allocate(), Some(ids[1]));
        assert_eq!(pool.acquire(&hash(2)), Some(ids[2]));
        assert_eq!(pool.allocate(), Some(ids[0]));
        pool.check().unwrap();
    }

    #[test]
    fn a_second_block_under_one_hash_stays_private() {
        let mut pool = BlockPool::new(2);
        let (a, b) = (pool.allocate().unwrap(), pool.allocate().unwrap());
        pool.cache(a, hash(7));
        pool.cache(b, hash(7));
        assert_eq!(pool.cached(), 1);
        assert_eq!(pool.acquire(&hash(7)), Some(a));
        assert_eq!(pool.owners(a), 2);
        pool.check().unwrap();
    }

    proptest! {
        #[test]
        fn free_and_used_always_add_up(operations in prop::collection::vec((0u8..4, any::<u8>()), 1..400)) {
            let mut pool = BlockPool::new(12);
            let mut owned: Vec<BlockId> = Vec::new();
            for (operation, n) in operations {
                match operation {
                    0 => owned.extend(pool.allocate()),
                    1 => owned.extend(pool.acquire(&hash(n % 16))),
                    2 if !owned.is_empty() => { let id = owned.swap_remove(n as usize % owned.len()); pool.release(id); }
                    3 if !owned.is_empty() => pool.cache(owned[n as usize % owned.len()], hash(n % 16)),
                    _ => {}
                }
                prop_assert_eq!(pool.check(), Ok(()));
                prop_assert_eq!(pool.free() + pool.used(), pool.total());
                let mut distinct = owned.clone();
                distinct.sort();
                distinct.dedup();
                prop_assert_eq!(distinct.len(), pool.used());
            }
        }
    }
}
