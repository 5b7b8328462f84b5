//! Memory of the machine that a card reads and writes by itself (locked pages): what is on its way there, and what comes back.

use std::cell::Cell;
use std::ffi::c_void;

use cudarc::driver::result as cuda;

use super::driver::failed;
use crate::error::KernelError;

/// Bytes that lie ready for the card at once; more go by the driver's own, slower way.
const STAGED: usize = 8 << 20;
/// Bytes that come back at once.
const RETURNED: usize = 1 << 20;
/// Places begin on multiples of it.
const STEP: usize = 256;

/// How far a stretch of memory is used up. Places are not used again before everybody is known to be done.
#[derive(Debug, Default)]
struct Places {
    bytes: usize,
    used: Cell<usize>,
}

impl Places {
    /// Where `bytes` may be put; `None` when there is no room before the next [`Places::all_done`].
    fn take(&self, bytes: usize) -> Option<usize> {
        let start = self.used.get();
        let end = start.checked_add(bytes).filter(|end| *end <= self.bytes)?;
        self.used.set(end.next_multiple_of(STEP));
        Some(start)
    }

    fn all_done(&self) {
        self.used.set(0);
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
    pub(super) fn new() -> Result<Self, KernelError> {
        // SAFETY: plain memory, freed by `close`.
        let at = unsafe { cuda::malloc_host(STAGED + RETURNED, 0) }.map_err(|e| failed("no locked memory", e))?;
        Ok(StagedMemory { at, places: Places { bytes: STAGED, used: Cell::new(0) } })
    }

    /// Puts bytes where the card can read them until all its work is done; `None` when there is no room.
    pub(super) fn put(&self, bytes: &[u8]) -> Option<&[u8]> {
        let start = self.places.take(bytes.len())?;
        // SAFETY: inside the memory that was reserved; no place is given twice before the card is done.
        unsafe {
            let to = self.at.cast::<u8>().add(start);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
            Some(std::slice::from_raw_parts(to, bytes.len()))
        }
    }

    /// Lends the place where the card puts what comes back; `None` when it does not hold so much.
    pub(super) fn bring_back<T>(&self, bytes: usize, copy: impl FnOnce(&mut [u8]) -> T) -> Option<T> {
        if self.at.is_null() || bytes > RETURNED {
            return None;
        }
        // SAFETY: the part behind what is staged; lent to one at a time, for this call.
        Some(copy(unsafe { std::slice::from_raw_parts_mut(self.at.cast::<u8>().add(STAGED), bytes) }))
    }

    /// The card has done all its work: every place is free.
    pub(super) fn all_done(&self) {
        self.places.all_done();
    }

    /// Gives the memory back. The context must be current, and the card done.
    pub(super) fn close(&mut self) {
        let old = std::mem::take(self);
        if !old.at.is_null() {
            // SAFETY: reserved once, freed once; nothing can be done about a failure.
            let _ = unsafe { cuda::free_host(old.at) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_given_once_until_all_is_done() {
        let places = Places { bytes: 1000, used: Cell::new(0) };
        assert_eq!(places.take(10), Some(0));
        assert_eq!(places.take(300), Some(256));
        assert_eq!(places.take(300), None);
        assert_eq!(places.take(232), Some(768));
        assert_eq!(places.take(1), None);
        assert_eq!(places.take(usize::MAX), None);
        places.all_done();
        assert_eq!(places.take(1000), Some(0));
        assert_eq!(places.take(1), None);
    }

    #[test]
    fn without_memory_nothing_is_staged() {
        let none = StagedMemory::default();
        assert!(none.put(&[1]).is_none());
        assert!(none.bring_back(1, |_| ()).is_none());
    }
}
