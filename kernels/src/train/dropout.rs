//! Dropout whose mask is a function of a key and the element's place, so that a backward pass makes the same one again.

use super::Compute;
use super::rows::Shared;
use crate::error::KernelError;
use crate::ops::Store;
use crate::random::philox4x32;

/// Elements per drawn block: eight numbers of 16 bits.
const BLOCK: usize = 8;
/// Elements per task; a multiple of [`BLOCK`].
const TASK: usize = 4096;

/// Which elements are dropped: a stream of random numbers and how many of 65,536 elements go.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    key: u64,
    dropped: u16,
    scale: f32,
}

impl Dropout {
    /// Drops elements with `probability` (0 ≤ p < 1, rounded to 1/65,536) and scales the others by 1 / (1 − p). `None` when none go.
    pub fn new(probability: f64, key: u64) -> Option<Self> {
        let dropped = (probability.clamp(0.0, 1.0) * 65_536.0).round().min(65_535.0) as u16;
        (dropped > 0).then(|| Self { key, dropped, scale: 1.0 / (1.0 - f32::from(dropped) / 65_536.0) })
    }

    /// Key, how many of 65,536 go, and the factor of the others.
    pub(crate) fn parts(&self) -> (u64, u16, f32) {
        (self.key, self.dropped, self.scale)
    }

    /// Factors of elements `BLOCK * block..`.
    fn factors(&self, block: usize) -> [f32; BLOCK] {
        let key = [self.key as u32, (self.key >> 32) as u32];
        let block = block as u64;
        let words = philox4x32([block as u32, (block >> 32) as u32, 0, 0], key);
        std::array::from_fn(|i| {
            let number = (words[i / 2] >> (16 * (i % 2))) as u16;
            if number < self.dropped { 0.0 } else { self.scale }
        })
    }
}

impl Compute {
    /// `out = factors ∘ x`, or added to `out`. It is its own derivative.
    pub fn dropout(&mut self, dropout: Dropout, x: &[f32], out: &mut [f32], store: Store) -> Result<(), KernelError> {
        if x.len() != out.len() {
            return Err(KernelError::Shape { op: "dropout", detail: format!("{} values to {}", x.len(), out.len()) });
        }
        let len = x.len();
        let out = Shared::new(out);
        self.threads.run(&[len.div_ceil(TASK)], |_, task, _| {
            let range = task * TASK..((task + 1) * TASK).min(len);
            // SAFETY: ranges of tasks are disjoint.
            let out = unsafe { out.range(range.clone()) };
            for (block, (x, out)) in x[range.clone()].chunks(BLOCK).zip(out.chunks_mut(BLOCK)).enumerate() {
                let factors = dropout.factors(range.start / BLOCK + block);
                for ((x, out), factor) in x.iter().zip(out).zip(factors) {
                    *out = if store == Store::Add { *out + x * factor } else { x * factor };
                }
            }
        })
    }
}
