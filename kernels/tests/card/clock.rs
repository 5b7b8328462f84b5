//! Devices whose work can be timed.

use std::time::Instant;

use tidemill_kernels::cuda::device::Device;
use tidemill_kernels::cuda::driver::Card;
use tidemill_kernels::cuda::stopwatch;

use super::support::emulation::Emulated;

/// A device with a clock.
pub trait Clock: Device {
    type Mark;

    /// The moment when all work before is done and none after has begun.
    fn mark(&self) -> Self::Mark;

    /// Waits for the later moment.
    fn seconds(&self, from: &Self::Mark, to: &Self::Mark) -> f64;
}

impl Clock for Card {
    type Mark = stopwatch::Mark;

    fn mark(&self) -> Self::Mark {
        Card::mark(self).unwrap()
    }

    fn seconds(&self, from: &Self::Mark, to: &Self::Mark) -> f64 {
        Card::seconds(self, from, to).unwrap()
    }
}

impl Clock for Emulated {
    type Mark = Instant;

    fn mark(&self) -> Instant {
        Instant::now()
    }

    fn seconds(&self, from: &Instant, to: &Instant) -> f64 {
        (*to - *from).as_secs_f64()
    }
}
