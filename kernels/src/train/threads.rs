//! The threads of training, each with scratch memory of its own.

use std::cell::UnsafeCell;

use super::attention::Scores;
use super::matmul::{Packed, Scratch as Tiles};
use super::tile::Kernel;
use crate::cpu::pool::{Pool, Stage, available_threads};
use crate::error::KernelError;

/// What one thread needs.
pub(super) struct Scratch {
    /// For products.
    pub tiles: Tiles,
    /// For products on one thread.
    pub packed: Packed,
    /// For attention.
    pub scores: Scores,
}

/// Stages that one call may have.
const STAGES: usize = 3;

pub(super) struct Threads {
    pool: Pool,
    scratch: Vec<Slot>,
    stages: Vec<Stage>,
    kernel: Kernel,
}

/// A thread's scratch, on cache lines of its own.
#[repr(align(128))]
struct Slot(UnsafeCell<Scratch>);

// SAFETY: slot `i` is touched by thread `i` alone while a region runs, and by the owner of `Threads` between regions.
unsafe impl Sync for Slot {}

impl Threads {
    pub fn new(threads: usize, kernel: Kernel) -> Result<Self, KernelError> {
        let count = if threads == 0 { available_threads() } else { threads };
        let pool = Pool::new(count)?;
        let slot = |_| {
            let scratch = Scratch { tiles: Tiles::new()?, packed: Packed::new()?, scores: Scores::default() };
            Ok(Slot(UnsafeCell::new(scratch)))
        };
        let scratch = (0..count).map(slot).collect::<Result<_, KernelError>>()?;
        Ok(Self { pool, scratch, stages: (0..STAGES).map(|_| Stage::default()).collect(), kernel })
    }

    pub fn count(&self) -> usize {
        self.pool.threads()
    }

    /// Runs tasks `0..totals[stage]` of each stage, one stage after the other, each task once on some thread.
    pub fn run(&mut self, totals: &[usize], work: impl Fn(usize, usize, &mut Scratch) + Sync) -> Result<(), KernelError> {
        debug_assert!(totals.len() <= STAGES);
        self.stages.iter_mut().for_each(Stage::reset);
        let Self { pool, scratch, stages, kernel } = self;
        let (scratch, stages) = (&*scratch, &*stages);
        let outcome = pool.run(&|member| {
            // SAFETY: the kernel was made for this machine; the slot is this thread's.
            let scratch = unsafe {
                kernel.prepare();
                &mut *scratch[member.index].0.get()
            };
            for (stage, total) in totals.iter().enumerate() {
                // More tasks than fit are more elements than memory has.
                let total = u32::try_from(*total).unwrap_or(u32::MAX);
                if !member.share(&stages[stage], total, 1, |tasks| tasks.for_each(|task| work(stage, task, scratch))) {
                    return;
                }
            }
        });
        outcome.map_err(|panicked| KernelError::Unsupported(format!("a training operation broke: {}", panicked.0)))
    }
}
