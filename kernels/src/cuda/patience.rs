//! Waiting for a card, though not for ever.

use std::time::{Duration, Instant};

use super::calls::{Called, Calls, failed};
use super::driver::Card;
use crate::error::KernelError;

/// How long a card may take for what it was asked for. No step, and no batch of a training, comes near.
pub(super) const PATIENCE: Duration = Duration::from_secs(300);
/// For so long it is asked again at once, then after a pause each time: who waits leaves the processor to others, and the card has its
/// next step already.
const AT_ONCE: Duration = Duration::from_micros(50);
const PAUSE: Duration = Duration::from_micros(20);

impl<C: Calls> Card<C> {
    /// With another bound on waiting than five minutes.
    pub fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Waits for all work so far, and makes room for more copies.
    pub(super) fn synchronize(&self) -> Result<(), KernelError> {
        // SAFETY: a stream of our own.
        self.wait_until(|| unsafe { self.calls.is_done(self.stream) })?;
        self.staged.all_done();
        Ok(())
    }

    /// Waits until the card is done with something.
    ///
    /// Errors: the card's; it did not come back. Then it is given up: nothing more is asked of it, as the driver might wait for it without an
    /// end.
    pub(super) fn wait_until(&self, mut is_done: impl FnMut() -> Called<bool>) -> Result<(), KernelError> {
        let begun = Instant::now();
        while !is_done().map_err(|e| failed("the card stopped", e))? {
            let waited = begun.elapsed();
            if waited >= self.patience {
                self.given_up.set(true);
                return Err(self.gone());
            }
            if waited < AT_ONCE { std::hint::spin_loop() } else { std::thread::sleep(PAUSE) }
        }
        Ok(())
    }

    /// What is said of a card that was given up.
    pub(super) fn gone(&self) -> KernelError {
        KernelError::Device(format!("the card did not come back from its work in {} s", self.patience.as_secs_f64()))
    }
}
