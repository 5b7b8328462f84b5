//! Device memory that grows.

use super::device::{Address, Device};
use crate::error::KernelError;

/// Memory that grows when more is needed.
#[derive(Clone, Copy, Default)]
pub(super) struct Room {
    pub at: Address,
    pub bytes: usize,
    /// How often it was reserved anew, somewhere else.
    pub moves: usize,
}

impl Room {
    /// What is reserved for so many bytes, so that it need not grow often.
    pub(super) fn size(bytes: usize) -> usize {
        if bytes == 0 { 0 } else { bytes.next_power_of_two() }
    }

    /// Sees to it that there are `bytes`; what was there is lost when it grows.
    pub(super) fn reserve<D: Device>(
        &mut self,
        device: &mut D,
        what: &'static str,
        bytes: usize,
    ) -> Result<Address, KernelError> {
        if bytes > self.bytes {
            let grown = Room::size(bytes);
            let moves = self.moves + 1;
            // Before there is more, so that there need not be room for both.
            let old = std::mem::replace(self, Room { moves, ..Room::default() });
            if old.bytes > 0 {
                device.free(old.at);
            }
            *self = Room { at: device.alloc(what, grown)?, bytes: grown, moves };
        }
        Ok(self.at)
    }

    pub(super) fn write<D: Device>(&mut self, device: &mut D, what: &'static str, bytes: &[u8]) -> Result<Address, KernelError> {
        let at = self.reserve(device, what, bytes.len())?;
        if !bytes.is_empty() {
            device.write(at, bytes)?;
        }
        Ok(at)
    }
}
