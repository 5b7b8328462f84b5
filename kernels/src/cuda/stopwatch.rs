//! How long a card's work takes, by the card's own clock.

use cudarc::driver::result::event;
use cudarc::driver::sys;

use super::calls::failed;
use super::driver::Card;
use crate::error::KernelError;

/// A moment in a card's work.
pub struct Mark(sys::CUevent);

impl Card {
    /// The moment when all work before is done and none after has begun.
    pub fn mark(&self) -> Result<Mark, KernelError> {
        self.current()?;
        let mark = event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).map(Mark).map_err(|e| failed("no event", e.into()))?;
        // SAFETY: an event and a stream that were just made or are held.
        unsafe { event::record(mark.0, self.stream) }.map_err(|e| failed("an event is not recorded", e.into()))?;
        Ok(mark)
    }

    /// Seconds between two moments; waits for the later one.
    pub fn seconds(&self, from: &Mark, to: &Mark) -> Result<f64, KernelError> {
        self.current()?;
        // SAFETY: both were recorded on this card's stream and are destroyed with their owners only.
        let milliseconds = unsafe { event::synchronize(to.0).and_then(|()| event::elapsed(from.0, to.0)) };
        milliseconds.map(|ms| f64::from(ms) / 1e3).map_err(|e| failed("the card stopped", e.into()))
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        // SAFETY: made once, destroyed once. Nothing can be done about a failure.
        let _ = unsafe { event::destroy(self.0) };
    }
}
