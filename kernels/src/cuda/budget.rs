//! How much of a card's memory may be given to the key-value cache.

use super::CudaBackend;
use super::attention::most_bytes;
use super::device::Device;
use super::fp8::Fp8Rooms;
use super::lists::StepLists;
use super::room::Room;
use super::weights::{Form, PADDING};
use crate::error::KernelError;
use crate::ops::{HeadShape, Rows};

/// What stays free: for captured steps, what sampling is told (masks, and the tokens that penalties count), and whoever else uses the card.
/// A twentieth, and this at least.
const LEAST_MARGIN: usize = 256 << 20;

/// Of `free` bytes, those that nobody will want.
fn to_spare(free: usize, total: usize, needed: usize) -> usize {
    free.saturating_sub(needed).saturating_sub((total / 20).max(LEAST_MARGIN))
}

impl<D: Device> CudaBackend<D> {
    /// With so many bytes of the device's memory left to others when the cache is sized.
    pub fn leaving(mut self, bytes: usize) -> Self {
        self.left = bytes;
        self
    }

    /// Bytes that can be given to the cache: what is free, without what steps up to the limits will reserve, what is left to others, and a
    /// margin.
    pub(super) fn spare_memory(&self, heads: HeadShape) -> Result<usize, KernelError> {
        let (free, total) = self.device.memory()?;
        Ok(to_spare(free, total, self.still_to_reserve(heads).saturating_add(self.left)))
    }

    /// What is reserved when it is first needed, and has not been: a step's lists and tiles, partial results of attention, bf16 copies of
    /// activations, a widened matrix, values to sample from.
    fn still_to_reserve(&self, heads: HeadShape) -> usize {
        let limits = self.shapes.limits();
        let copies = self.buffers.iter().filter(|buffer| buffer.half.is_none());
        let copies = copies.map(|b| self.shapes.capacity(b.rows) * b.width.next_multiple_of(PADDING) * 2).sum::<usize>();
        let rounded = self.matrices.iter().filter(|m| m.form == Form::Fp8 && self.rounds(m.weights.n as usize));
        // What is added to has the width of the residual stream, which no input of a layer's first product exceeds.
        let widest = rounded.map(|m| m.weights.stride as usize).max();
        let rounded = widest.map_or(0, |widest| Fp8Rooms::needed(self.shapes.capacity(Rows::Tokens), widest, widest));
        let quantised = self.matrices.iter().filter(|m| matches!(m.form, Form::Int8 | Form::Int4 | Form::Fp8));
        let widened = quantised.map(|m| m.weights.n as usize * m.weights.stride as usize * 2).max().unwrap_or(0);
        let sampled = self.buffers.iter().filter(|buffer| buffer.rows == Rows::Samples);
        let values = sampled.map(|b| self.shapes.capacity(b.rows) * b.width * 4).max().unwrap_or(0);
        let alone = self.device.place().is_alone();
        let collected = if alone { 0 } else { values };
        let rooms = rounded
            + most_bytes(limits, heads)
            + StepLists::most_bytes(limits)
            + [widened, values, collected].map(Room::size).iter().sum::<usize>();
        // Of one of several cards, what a room had before it grew is free only behind the step; all that it had is less than what it has.
        copies + if alone { rooms } else { 2 * rooms }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_margin_and_what_steps_need_stay_free() {
        const GIB: usize = 1 << 30;
        assert_eq!(to_spare(70 * GIB, 80 * GIB, GIB), 65 * GIB);
        // On a small card the margin is not less than what a captured step takes.
        assert_eq!(to_spare(3 * GIB, 4 * GIB, 0), 3 * GIB - LEAST_MARGIN);
        assert_eq!(to_spare(GIB, 80 * GIB, 0), 0);
    }
}
