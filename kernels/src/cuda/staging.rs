//! Memory of the machine that a card reads and writes by itself (locked pages): what is on its way there, and what comes back.

use std::cell::Cell;
use std::ffi::c_void;

use super::calls::{Calls, failed};
use super::device::FETCHES;
use crate::error::KernelError;

/// Bytes that lie ready for the card at once; whoever has more waits for the card.
const STAGED: usize = 8 << 20;
/// Bytes of one copy: while the card reads one, the next is put beside it.
pub(super) const MOST_STAGED: usize = STAGED / 2;
/// Bytes that come back at once.
pub(super) const MOST_RETURNED: usize = 1 << 20;
/// Places begin on multiples of it.
const STEP: usize = 256;

/// How far a ring of memory is used up, counted from its first use on. Places are not used again before the card is known to be done with
/// them.
#[derive(Debug, Default)]
struct Places {
    bytes: usize,
    taken: Cell<usize>,
    done: Cell<usize>,
}

impl Places {
    /// Where `bytes` may be put; `None` when there is no room before the card is done with more.
    fn take(&self, bytes: usize) -> Option<usize> {
        if bytes > self.bytes || self.bytes == 0 {
            return None;
        }
        let taken = self.taken.get();
        // A place does not go over the end.
        let over = taken % self.bytes + bytes > self.bytes;
        let start = if over { taken.next_multiple_of(self.bytes) } else { taken };
        if self.done.get() == taken {
            // Nobody uses any of it, what is left before the end included.
            self.done.set(start);
        }
        if start + bytes - self.done.get() > self.bytes {
            return None;
        }
        self.taken.set((start + bytes).next_multiple_of(STEP));
        Some(start % self.bytes)
    }

    /// The card is done with all that was taken before `mark`.
    fn done_until(&self, mark: usize) {
        self.done.set(mark.max(self.done.get()));
    }
}

/// The memory, none at first.
#[derive(Debug)]
pub(super) struct StagedMemory {
    at: *mut c_void,
    places: Places,
}

impl Default for StagedMemory {
    fn default() -> Self {
        StagedMemory { at: std::ptr::null_mut(), places: Places::default() }
    }
}

impl StagedMemory {
    /// A context must be current.
    pub(super) fn new(calls: &impl Calls) -> Result<Self, KernelError> {
        // SAFETY: plain memory, freed by `close`.
        let at =
            unsafe { calls.alloc_host(STAGED + (1 + FETCHES) * MOST_RETURNED) }.map_err(|e| failed("no locked memory", e))?;
        Ok(StagedMemory { at, places: Places { bytes: STAGED, ..Places::default() } })
    }

    /// Puts bytes where the card can read them until it is done with them; `None` when there is no room.
    pub(super) fn put(&self, bytes: &[u8]) -> Option<&[u8]> {
        if self.at.is_null() {
            return None;
        }
        let start = self.places.take(bytes.len())?;
        // SAFETY: inside the memory that was reserved; no place is given twice before the card is done with it.
        unsafe {
            let to = self.at.cast::<u8>().add(start);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
            Some(std::slice::from_raw_parts(to, bytes.len()))
        }
    }

    /// Lends the place where the card puts what is waited for at once; `None` when it does not hold so much.
    pub(super) fn bring_back<T>(&self, bytes: usize, copy: impl FnOnce(&mut [u8]) -> T) -> Option<T> {
        // SAFETY: this place is lent to one at a time, for this call.
        Some(copy(unsafe { self.returned(0, bytes)? }))
    }

    /// The place where the card puts what is fetched under `slot`, less than [`FETCHES`]; `None` when it does not hold so much.
    ///
    /// # Safety
    /// Until the fetch is done, only the card has it.
    #[expect(clippy::mut_from_ref, reason = "each place has one user, as the caller says")]
    pub(super) unsafe fn fetched(&self, slot: usize, bytes: usize) -> Option<&mut [u8]> {
        // SAFETY: as the caller says.
        unsafe { self.returned(1 + slot, bytes) }
    }

    #[expect(clippy::mut_from_ref, reason = "each place has one user, as the callers say")]
    unsafe fn returned(&self, place: usize, bytes: usize) -> Option<&mut [u8]> {
        if self.at.is_null() || bytes > MOST_RETURNED {
            return None;
        }
        // SAFETY: the part behind what is staged has room for all places; who calls has this one alone.
        Some(unsafe { std::slice::from_raw_parts_mut(self.at.cast::<u8>().add(STAGED + place * MOST_RETURNED), bytes) })
    }

    /// How much has been staged so far, for [`StagedMemory::done_until`].
    pub(super) fn until_now(&self) -> usize {
        self.places.taken.get()
    }

    /// The card has read what was staged until then.
    pub(super) fn done_until(&self, mark: usize) {
        self.places.done_until(mark);
    }

    /// The card has done all its work: every place is free.
    pub(super) fn all_done(&self) {
        self.places.done_until(self.places.taken.get());
    }

    /// Gives the memory back. The context must be current, and the card done.
    pub(super) fn close(&mut self, calls: &impl Calls) {
        let old = std::mem::take(self);
        if !old.at.is_null() {
            // SAFETY: reserved once, freed once; nothing can be done about a failure.
            let _ = unsafe { calls.free_host(old.at) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(bytes: usize) -> Places {
        Places { bytes, ..Places::default() }
    }

    #[test]
    fn a_place_is_given_once_until_all_is_done() {
        let places = places(1024);
        assert_eq!(places.take(10), Some(0));
        assert_eq!(places.take(300), Some(256));
        assert_eq!(places.take(300), None);
        assert_eq!(places.take(256), Some(768));
        assert_eq!(places.take(1), None);
        assert_eq!(places.take(usize::MAX), None);
        places.done_until(places.taken.get());
        assert_eq!(places.take(1024), Some(0));
        places.done_until(places.taken.get());
        assert_eq!((places.take(100), places.take(900)), (Some(0), None));
        places.done_until(places.taken.get());
        // What is left before the end is too small, and nobody is in the way.
        assert_eq!(places.take(1000), Some(0));
        assert_eq!(places.take(1), None);
    }

    #[test]
    fn what_is_done_is_used_again_while_the_rest_is_not() {
        let places = places(1024);
        assert_eq!(places.take(500), Some(0));
        let first = places.taken.get();
        assert_eq!(places.take(200), Some(512));
        // Nothing goes over the end, and the beginning is in use.
        assert_eq!(places.take(300), None);
        places.done_until(first);
        assert_eq!(places.take(300), Some(0));
        assert_eq!(places.take(1), None, "the second is still read");
    }

    #[test]
    fn without_memory_nothing_is_staged() {
        let none = StagedMemory::default();
        assert!(none.put(&[1]).is_none() && none.put(&[]).is_none());
        assert!(none.bring_back(1, |_| ()).is_none());
    }
}
