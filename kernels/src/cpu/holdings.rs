//! What the backend holds, as the threads of a step see it.

use std::cell::UnsafeCell;

use crate::activations::{ActivationKind, Activations};
use crate::aligned::AlignedBuf;
use crate::error::KernelError;
use crate::ops::Rows;

/// Rows of a buffer start on a cache line, so that threads writing neighbouring rows do not share one.
const ROW_FLOATS: usize = 16;

/// Forms that rows can be converted to, in the order of their bits.
pub(super) const FORMS: [ActivationKind; 3] = [ActivationKind::Int, ActivationKind::Bf16, ActivationKind::F32];

/// The bit number of a form.
pub(super) fn form_index(kind: ActivationKind) -> usize {
    match kind {
        ActivationKind::Int => 0,
        ActivationKind::Bf16 => 1,
        ActivationKind::F32 => 2,
    }
}

/// An activation buffer: f32 rows, and what linears read instead of them.
pub(super) struct Buffer {
    pub rows: Rows,
    pub width: usize,
    /// Floats from one row to the next.
    pub stride: usize,
    data: AlignedBuf<f32>,
    /// Converted rows by form, made when a linear first asks.
    pub converted: [Option<Activations>; FORMS.len()],
}

impl Buffer {
    pub fn new(rows: Rows, capacity: usize, width: usize) -> Result<Self, KernelError> {
        const WHAT: &str = "activations";
        let too_large = KernelError::Memory { what: WHAT, bytes: usize::MAX };
        let stride = width.checked_next_multiple_of(ROW_FLOATS);
        let Some((stride, len)) = stride.and_then(|s| Some((s, s.checked_mul(capacity)?))) else { return Err(too_large) };
        Ok(Buffer { rows, width, stride, data: AlignedBuf::zeroed(len, WHAT)?, converted: [const { None }; FORMS.len()] })
    }

    /// Start of row 0.
    pub fn start(&self) -> *mut f32 {
        self.data.as_shared_ptr()
    }

    /// A row to read.
    ///
    /// # Safety
    /// The row is within the capacity and nobody writes it meanwhile.
    #[inline]
    pub unsafe fn row(&self, row: usize) -> &[f32] {
        debug_assert!((row + 1) * self.stride <= self.data.len());
        // SAFETY: inside the buffer by the contract.
        unsafe { std::slice::from_raw_parts(self.start().add(row * self.stride), self.width) }
    }

    /// A row to write.
    ///
    /// # Safety
    /// The row is within the capacity and nobody else reads or writes it meanwhile.
    #[inline]
    #[expect(clippy::mut_from_ref, reason = "rows are handed out to threads; the contract keeps them apart")]
    pub unsafe fn row_mut(&self, row: usize) -> &mut [f32] {
        debug_assert!((row + 1) * self.stride <= self.data.len());
        // SAFETY: inside the buffer by the contract.
        unsafe { std::slice::from_raw_parts_mut(self.start().add(row * self.stride), self.width) }
    }

    /// Every float, rows beyond the step's included.
    pub fn all_mut(&mut self) -> &mut [f32] {
        &mut self.data
    }

    pub fn bytes(&self) -> usize {
        self.data.bytes() + self.converted.iter().flatten().map(Activations::bytes).sum::<usize>()
    }
}

/// Cosines and sines of positions, `[position][cos: half | sin: half]`: room for all, computed as far as steps came. A file can
/// claim a context of millions of positions that nobody will ever use.
pub(super) struct RopeTable {
    frequencies: Vec<f32>,
    magnitude: f32,
    filled: usize,
    data: AlignedBuf<f32>,
}

/// Positions are computed so many at a time.
const ROPE_CHUNK: usize = 256;

impl RopeTable {
    pub fn new(inv_freq: &[f32], magnitude: f32, positions: usize) -> Result<Self, KernelError> {
        let len = positions.saturating_mul(2 * inv_freq.len());
        let data = AlignedBuf::zeroed(len, "rotation table")?;
        Ok(RopeTable { frequencies: inv_freq.to_vec(), magnitude, filled: 0, data })
    }

    /// Makes sure that [`Self::at`] holds for all positions below `positions`.
    pub fn fill(&mut self, positions: usize) {
        if positions <= self.filled {
            return;
        }
        let half = self.frequencies.len();
        let rows = self.data.chunks_exact_mut((2 * half).max(1)).enumerate();
        let wanted = positions.next_multiple_of(ROPE_CHUNK);
        for (position, row) in rows.take(wanted).skip(self.filled) {
            let (cos, sin) = row.split_at_mut(half);
            for ((c, s), &frequency) in cos.iter_mut().zip(sin).zip(&self.frequencies) {
                // The angle is an f32 product, as in the implementations that the checkpoints come from.
                let (sine, cosine) = f64::from(position as f32 * frequency).sin_cos();
                *c = (cosine * f64::from(self.magnitude)) as f32;
                *s = (sine * f64::from(self.magnitude)) as f32;
            }
        }
        self.filled = wanted;
    }

    /// Cosines and sines of a position that was filled.
    #[inline]
    pub fn at(&self, position: usize) -> (&[f32], &[f32]) {
        let half = self.frequencies.len();
        self.data[position * 2 * half..(position + 1) * 2 * half].split_at(half)
    }

    pub fn bytes(&self) -> usize {
        self.data.bytes()
    }
}

/// One item per task or thread, written by whoever holds that task or is that thread.
pub(super) struct Slots<T>(Vec<UnsafeCell<T>>);

// SAFETY: the contract of `get_mut` keeps threads apart; `T: Send` because another thread than the owner's writes it.
unsafe impl<T: Send> Sync for Slots<T> {}

impl<T> Slots<T> {
    pub fn new(items: impl IntoIterator<Item = T>) -> Self {
        Slots(items.into_iter().map(UnsafeCell::new).collect())
    }

    /// # Safety
    /// Nobody else uses the item meanwhile.
    #[expect(clippy::mut_from_ref, reason = "items are handed out to threads; the contract keeps them apart")]
    pub unsafe fn get_mut(&self, index: usize) -> &mut T {
        // SAFETY: exclusive by the contract.
        unsafe { &mut *self.0[index].get() }
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.0.iter_mut().map(UnsafeCell::get_mut)
    }
}
