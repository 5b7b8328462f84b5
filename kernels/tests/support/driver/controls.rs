//! What a test asks of the driver, and asks it for.

use cudarc::driver::sys::CUresult;
use tidemill_kernels::cuda::device::{Address, Device};

use super::FakeDriver;

impl FakeDriver {
    /// The calls since the last time.
    pub fn take_log(&self) -> Vec<&'static str> {
        std::mem::take(&mut self.state().log)
    }

    /// A kernel takes so many milliseconds.
    pub fn set_cost(&self, kernel: &'static str, milliseconds: f64) {
        self.state().costs.insert(kernel, milliseconds);
    }

    /// A kernel does nothing.
    pub fn leave_out(&self, kernel: &'static str) {
        self.state().idle.push(kernel);
    }

    /// The card is at work for ever.
    pub fn hang(&self) {
        self.state().hangs = true;
    }

    /// The call after so many fails, once; with what a card says that is lost, all behind it, too.
    pub fn fail_after(&self, calls: usize, code: CUresult) {
        self.state().fails = Some((calls, code));
    }

    /// The next call of this name fails.
    pub fn fail_next(&self, call: &'static str, code: CUresult) {
        self.state().fails_named = Some((call, code));
    }

    /// The call that was the first to fail.
    pub fn failed(&self) -> Option<&'static str> {
        self.state().failed
    }

    /// The library has to find out anew how to multiply, as when others have taken the places of its plans.
    pub fn forget_plans(&self) {
        self.state().plans.clear();
    }

    /// Whether the failure that was asked for is behind; if not, it does not come any more.
    pub fn has_failed(&self) -> bool {
        let mut state = self.state();
        let (left, named) = (state.fails.take(), state.fails_named.take());
        left.is_none() && named.is_none()
    }

    /// Everything was given back, as after the last card of a driver is closed; a card that is lost has taken all with it.
    pub fn assert_empty(&self) {
        let mut state = self.state();
        assert_eq!(state.context, None, "the context is held");
        if state.lost.is_some() {
            let held: Vec<u64> = state.held.keys().copied().collect();
            held.into_iter().for_each(|at| state.memory.free(Address(at)));
            state.held.clear();
            return;
        }
        let counts = [
            ("allocations", state.held.len()),
            ("locked allocations", state.locked.len()),
            ("streams", state.stream.iter().len()),
            ("events", state.events.len()),
            ("modules", state.modules.len()),
            ("graphs", state.graphs.len()),
            ("executable graphs", state.executables.len()),
            ("libraries", state.libraries),
        ];
        assert!(counts.iter().all(|(_, count)| *count == 0), "never given back: {counts:?}");
    }
}
