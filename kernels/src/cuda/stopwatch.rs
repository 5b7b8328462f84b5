//! How long a card's work takes, by the card's own clock.

use cudarc::driver::result::event;
use cudarc::driver::sys::{self, CUevent, CUresult};

use super::calls::{CallError, failed};
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
        // SAFETY: an event that was recorded on this card's stream and is destroyed with its owner only.
        unsafe { event::synchronize(to.0) }.map_err(|e| failed("the card stopped", e.into()))?;
        let (elapsed, mut milliseconds) = (elapsed()?, 0.0);
        // SAFETY: both were recorded, and are destroyed with their owners only; a number to write to.
        unsafe { elapsed(&raw mut milliseconds, from.0, to.0) }
            .result()
            .map_err(|e| failed("no time between two events", CallError::from(e)))?;
        Ok(f64::from(milliseconds) / 1e3)
    }
}

type Elapsed = unsafe extern "C" fn(*mut f32, CUevent, CUevent) -> CUresult;

/// The call in its first form, which every driver has. The bindings know its second alone, and end the program where a driver older than
/// CUDA 12.8 has none.
fn elapsed() -> Result<Elapsed, KernelError> {
    // SAFETY: a card is open, so its library is; the function of this name has this type.
    let found = unsafe { sys::culib().get::<Elapsed>(b"cuEventElapsedTime") };
    found.map(|call| *call).map_err(|e| KernelError::Device(format!("the driver has no clock: {e}")))
}

impl Drop for Mark {
    fn drop(&mut self) {
        // SAFETY: made once, destroyed once. Nothing can be done about a failure.
        let _ = unsafe { event::destroy(self.0) };
    }
}
