//! Launches of what goes row by row (`kernels/cuda/rows.cu`).

use super::CudaBackend;
use super::device::{Device, Kernel, Launch};
use super::params as p;
use crate::error::KernelError;
use crate::ops::{Buf, Vector};

/// Elements of a row that a block takes whose threads have four each.
const FOURS_WIDTH: usize = 1024;

/// Blocks for rows of `width` elements, four to a thread.
pub(super) const fn fours(rows: usize, width: usize) -> Launch {
    Launch::grid(rows, width.div_ceil(FOURS_WIDTH))
}

/// Blocks for norms of rows, and their threads: as many as have eight elements each, in whole warps, as far as a block goes. It depends on the
/// width alone, and so do the sums.
fn a_block_for_each_row(kernel: Kernel, rows: usize, width: usize) -> (Kernel, Launch) {
    let threads = width.div_ceil(8).max(1).next_multiple_of(32).min(kernel.threads as usize);
    (kernel.of_threads(threads as u32), Launch::blocks(rows).with_shared(threads / 32 * 4))
}

impl<D: Device> CudaBackend<D> {
    /// One of the two norms, which take the same; with `add`, its result is added to what is in `out`.
    pub(super) fn norm(
        &mut self,
        kernel: Kernel,
        x: Buf,
        weight: Vector,
        eps: f32,
        out: Buf,
        add: bool,
    ) -> Result<(), KernelError> {
        let (half, half_stride) = self.produce(out);
        let (width, weight) = (self.buffers[x.0 as usize].width, self.vectors[weight.0 as usize]);
        let (kernel, launch) = a_block_for_each_row(kernel, self.rows(x), width);
        let (width, add) = (width as u32, add.into());
        let params = p::Norm { x: self.at(x), weight, out: self.at(out), half, width, half_stride, eps, add };
        self.launch(kernel, launch, params)
    }

    /// One of the two gated activations, which take the same.
    pub(super) fn gate(&mut self, kernel: Kernel, gate_up: Buf, out: Buf) -> Result<(), KernelError> {
        let (half, half_stride) = self.produce(out);
        let width = self.buffers[out.0 as usize].width;
        let params = p::SiluAndMul { gate_up: self.at(gate_up), out: self.at(out), half, width: width as u32, half_stride };
        self.launch(kernel, fours(self.rows(out), width), params)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::RMS_NORM;

    #[test]
    fn a_row_has_whole_warps_of_threads_with_eight_elements_each_as_far_as_a_block_goes() {
        let threads = |width: usize| {
            let (kernel, launch) = a_block_for_each_row(RMS_NORM, 3, width);
            assert_eq!((launch.grid, launch.shared), ([3, 1, 1], kernel.threads / 32 * 4));
            kernel.threads
        };
        assert_eq!([0, 1, 64, 256, 257, 4096, 8192, 8193, 20_000].map(threads), [32, 32, 32, 32, 64, 512, 1024, 1024, 1024]);
    }

    #[test]
    fn a_row_has_a_block_for_every_1024_elements() {
        assert_eq!([0, 1, 1024, 1025].map(|width| fours(7, width).grid), [[7, 0, 1], [7, 1, 1], [7, 1, 1], [7, 2, 1]]);
    }
}
