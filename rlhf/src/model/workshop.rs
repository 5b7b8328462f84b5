//! What all operations of a model share: the threads that compute, and memory that is used again.

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tidemill_kernels::KernelError;
use tidemill_kernels::train::{Compute, Precision};

/// Buffers kept for the next pass.
const KEPT: usize = 512;

/// Elements of a cache line: where a buffer starts. A vector's memory starts in the middle of one, and then every store of a whole line
/// would touch two.
const LINE: usize = 16;

/// Numbers that start on a cache line.
#[derive(Default)]
pub(super) struct Buffer {
    memory: Vec<f32>,
    start: usize,
    len: usize,
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.memory[self.start..self.start + self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

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
    pub fn buffer(&self, len: usize) -> Buffer {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let needed = len + LINE;
        let fitting = free.iter().enumerate().filter(|(_, memory)| memory.len() >= needed && memory.len() <= needed * 2);
        let best = fitting.min_by_key(|(_, memory)| memory.len()).map(|(index, _)| index);
        let memory = best.map(|index| free.swap_remove(index));
        drop(free);
        let memory = memory.unwrap_or_else(|| vec![0.0; needed]);
        let start = memory.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE);
        Buffer { memory, start, len }
    }

    /// Takes a buffer back.
    pub fn give_back(&self, buffer: Buffer) {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        if buffer.memory.len() >= 1024 && free.len() < KEPT {
            free.push(buffer.memory);
        }
    }
}
