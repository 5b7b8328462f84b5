//! Places in the machine's memory for the blocks of preempted sequences, where blocks lie in a card's.

use std::cell::RefCell;
use std::rc::Rc;

/// The places, each for one block. The engine's thread alone holds them.
#[derive(Clone, Debug, Default)]
pub struct SwapSpace(Rc<RefCell<Vec<u32>>>);

impl SwapSpace {
    /// So many places, all free.
    pub fn new(places: usize) -> Self {
        Self(Rc::new(RefCell::new((0..places.min(u32::MAX as usize) as u32).rev().collect())))
    }

    /// Places that nobody has.
    pub fn free(&self) -> usize {
        self.0.borrow().len()
    }

    /// Takes places for the blocks that hold the first `tokens` tokens of a sequence; all or none.
    pub fn take(&self, blocks: usize, tokens: usize) -> Option<SwappedBlocks> {
        let mut free = self.0.borrow_mut();
        let left = free.len().checked_sub(blocks).filter(|_| blocks > 0)?;
        let places = free.drain(left..).rev().collect();
        Some(SwappedBlocks { space: self.clone(), places, tokens })
    }
}

/// Where a preempted sequence's blocks are kept. Dropping it frees the places.
#[derive(Debug)]
pub struct SwappedBlocks {
    space: SwapSpace,
    places: Vec<u32>,
    tokens: usize,
}

impl SwappedBlocks {
    /// One for each block, in order.
    pub fn places(&self) -> &[u32] {
        &self.places
    }

    /// Tokens whose keys and values they hold.
    pub fn tokens(&self) -> usize {
        self.tokens
    }
}

impl Drop for SwappedBlocks {
    fn drop(&mut self) {
        self.space.0.borrow_mut().append(&mut self.places);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_taken_all_or_none_and_come_back() {
        let space = SwapSpace::new(5);
        let first = space.take(3, 70).unwrap();
        assert_eq!((first.places(), first.tokens(), space.free()), (&[0, 1, 2][..], 70, 2));
        assert!(space.take(3, 70).is_none() && space.take(0, 0).is_none());
        assert_eq!(space.free(), 2);
        let second = space.take(2, 64).unwrap();
        assert!(second.places().iter().all(|place| !first.places().contains(place)));
        drop(first);
        assert_eq!(space.take(3, 96).map(|swapped| swapped.places().len()), Some(3));
        drop(second);
        assert_eq!(space.free(), 5);
        assert!(SwapSpace::default().take(1, 1).is_none());
    }
}
