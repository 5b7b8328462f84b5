//! What one process must not do at once: capture a step, and have cuBLASLt choose how to multiply, start or end. While any stream is captured
//! the library may fail at these (13.3 does, with `CUBLAS_STATUS_NOT_SUPPORTED` or an internal error), and ending it may wait for the device,
//! which breaks a capture off. Several cards may capture at once.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

static CAPTURES: Mutex<usize> = Mutex::new(0);
static ENDED: Condvar = Condvar::new();

fn captures() -> MutexGuard<'static, usize> {
    // A count, which no panic leaves half written.
    CAPTURES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A capture, until it is dropped; on whichever thread.
pub(super) struct Capturing(());

impl Capturing {
    /// Waits until no library is at work.
    pub(super) fn begin() -> Self {
        *captures() += 1;
        Capturing(())
    }
}

impl Drop for Capturing {
    fn drop(&mut self) {
        *captures() -= 1;
        ENDED.notify_all();
    }
}

/// Has a library do what no capture may see. Who is in a capture may not call it. Captures are short, and none begins meanwhile.
pub(super) fn from_captures<T>(work: impl FnOnce() -> T) -> T {
    let none = ENDED.wait_while(captures(), |captures| *captures > 0).unwrap_or_else(PoisonError::into_inner);
    let done = work();
    drop(none);
    done
}
