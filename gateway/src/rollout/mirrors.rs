//! How many copies of requests there are for shadows, and whether they are in anybody's way; what the base scores is in nobody's way
//! likewise.

use crate::upstream::Registry;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Most copies of a server that wait or are answered.
const MOST: usize = 4;

/// The copies of a server. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct Mirrors {
    places: Arc<Semaphore>,
    /// Copies that an engine here is answering, and answers that it is scoring.
    running: Arc<AtomicUsize>,
}

impl Default for Mirrors {
    fn default() -> Self {
        Self { places: Arc::new(Semaphore::new(MOST)), running: Arc::default() }
    }
}

/// Counts a copy that an engine here is answering, or an answer that it is scoring, until it is dropped.
#[derive(Debug)]
pub struct Running(Arc<AtomicUsize>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Mirrors {
    /// A place for a copy, unless there are enough of them or somebody waits for an engine here.
    pub fn reserve(&self, models: &Registry) -> Option<OwnedSemaphorePermit> {
        let waiting: usize = models.local().map(|model| model.engine().stats().waiting).sum();
        if waiting > self.running.load(Ordering::Acquire) {
            return None;
        }
        Arc::clone(&self.places).try_acquire_owned().ok()
    }

    /// A copy, or a scoring, begins at an engine here.
    pub fn begin(&self) -> Running {
        self.running.fetch_add(1, Ordering::AcqRel);
        Running(Arc::clone(&self.running))
    }

    /// Whether an engine here has something else to do than copies and scoring.
    pub fn are_in_the_way(&self, models: &Registry) -> bool {
        let busy = |stats: tidemill_engine::Stats| stats.running + stats.waiting;
        let all: usize = models.local().map(|model| busy(model.engine().stats())).sum();
        all > self.running.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_room_for_a_few() {
        let (mirrors, models) = (Mirrors::default(), Registry::new([]));
        let held: Vec<_> = (0..MOST).map(|_| mirrors.reserve(&models).unwrap()).collect();
        assert!(mirrors.reserve(&models).is_none());
        drop(held);
        assert!(mirrors.reserve(&models).is_some());
        let running = mirrors.begin();
        assert!(!mirrors.are_in_the_way(&models));
        drop(running);
        assert_eq!(mirrors.running.load(Ordering::Acquire), 0);
    }
}
