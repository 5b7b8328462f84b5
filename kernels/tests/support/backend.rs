//! What tests ask of every backend beyond its operations.

use tidemill_kernels::cpu::CpuBackend;
use tidemill_kernels::cuda::CudaBackend;
use tidemill_kernels::cuda::device::Device;
use tidemill_kernels::reference::Reference;
use tidemill_kernels::*;

use super::{Noise, Weight};

/// A backend whose buffers can be poisoned and read whole.
pub trait Backend: Ops {
    fn poison(&mut self, buf: Buf);

    /// All rows of a buffer, those beyond the step's included where there are any.
    fn whole(&self, buf: Buf) -> Vec<f32>;

    fn alloc_poisoned(&mut self, rows: Rows, width: usize) -> Buf {
        let buf = self.alloc(rows, width).unwrap();
        self.poison(buf);
        buf
    }

    /// `out[r] = table[tokens[r]]` from random f32 values: how tests get numbers into a buffer.
    fn load_table(&mut self, noise: &mut Noise, rows: usize, width: usize) -> Matrix {
        let table = Weight::random(noise, rows, width, Format::F32, 1.0);
        self.load_matrix(&[table.source()], WeightFormat::F32).unwrap()
    }

    fn run(&mut self) -> StepOutput {
        let mut out = StepOutput::default();
        self.finish(&mut out).unwrap();
        out
    }
}

impl Backend for Reference {
    fn poison(&mut self, buf: Buf) {
        self.fill(buf, f32::NAN);
    }

    fn whole(&self, buf: Buf) -> Vec<f32> {
        self.read(buf).unwrap()
    }
}

impl Backend for CpuBackend {
    fn poison(&mut self, buf: Buf) {
        self.fill(buf, f32::NAN);
    }

    fn whole(&self, buf: Buf) -> Vec<f32> {
        self.read_all(buf).unwrap()
    }
}

impl<D: Device> Backend for CudaBackend<D> {
    fn poison(&mut self, buf: Buf) {
        self.fill(buf, f32::NAN).unwrap();
    }

    fn whole(&self, buf: Buf) -> Vec<f32> {
        self.read_all(buf).unwrap()
    }
}
