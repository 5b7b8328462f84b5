//! What all operations of a model share: the threads that compute, and memory that is used again.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tidemill_kernels::KernelError;
use tidemill_kernels::train::{Compute, Precision};

/// Buffers kept for the next pass.
const KEPT: usize = 512;

/// Threads and buffers.
pub(super) struct Workshop {
    compute: Mutex<Compute>,
    free: Mutex<Vec<Vec<f32>>>,
}

impl Workshop {
    pub fn new(threads: usize, precision: Precision) -> Result<Self, KernelError> {
        Ok(Self { compute: Mutex::new(Compute::new(threads, None, precision)?), free: Mutex::new(Vec::new()) })
    }

    pub fn compute(&self) -> MutexGuard<'_, Compute> {
        self.compute.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `len` numbers of any value. Fresh memory costs a page fault per 4 KiB, which is what the last pass's buffers save.
    pub fn buffer(&self, len: usize) -> Vec<f32> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let fitting = free.iter().enumerate().filter(|(_, buffer)| buffer.capacity() >= len && buffer.capacity() <= len * 2);
        let best = fitting.min_by_key(|(_, buffer)| buffer.capacity()).map(|(index, _)| index);
        let mut buffer = best.map_or_else(Vec::new, |index| free.swap_remove(index));
        drop(free);
        buffer.resize(len, 0.0);
        buffer
    }

    /// Takes a buffer back.
    pub fn give_back(&self, buffer: Vec<f32>) {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        if buffer.capacity() >= 1024 && free.len() < KEPT {
            free.push(buffer);
        }
    }
}
