//! How long a card's work takes, by the card's own clock.

use cudarc::driver::sys::CUevent;

use super::calls::{Calls, Cuda, failed};
use super::driver::Card;
use crate::error::KernelError;

/// A moment in a card's work.
pub struct Mark(CUevent);

impl Card {
    /// The moment when all work before is done and none after has begun.
    pub fn mark(&self) -> Result<Mark, KernelError> {
        self.current()?;
        // SAFETY: of the context that is current; given back with its owner.
        let mark = unsafe { self.calls.create_timer() }.map(Mark).map_err(|e| failed("no event", e))?;
        // SAFETY: an event and a stream that were just made or are held.
        unsafe { self.calls.record_event(mark.0, self.stream) }.map_err(|e| failed("an event is not recorded", e))?;
        Ok(mark)
    }

    /// Seconds between two moments; waits for the later one.
    pub fn seconds(&self, from: &Mark, to: &Mark) -> Result<f64, KernelError> {
        self.current()?;
        // SAFETY: an event that was recorded on this card's stream and is destroyed with its owner only.
        self.wait_until(|| unsafe { self.calls.is_past(to.0) })?;
        // SAFETY: both were recorded, and are destroyed with their owners only.
        let milliseconds = unsafe { self.calls.elapsed(from.0, to.0) }.map_err(|e| failed("no time between two events", e))?;
        Ok(f64::from(milliseconds) / 1e3)
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        if let Ok(calls) = Cuda::find() {
            // SAFETY: made once, destroyed once. Nothing can be done about a failure.
            let _ = unsafe { calls.destroy_event(self.0) };
        }
    }
}
