//! A whole decoder: the CPU backend on every instruction path, and the CUDA backend with emulated kernels, against the scalar reference.

#![allow(clippy::unwrap_used, reason = "a test stops at the first error; the lint knows test functions only")]

use crate::support::decoder::{LIMITS, Trial};
use crate::support::emulation::Emulated;
use tidemill_kernels::cpu::{CpuBackend, CpuOptions};
use tidemill_kernels::cuda::CudaBackend;
use tidemill_kernels::isa::Isa;

#[test]
fn logits_agree_with_the_reference_on_every_path() {
    for trial in Trial::all() {
        for isa in Isa::available() {
            let cpu = CpuBackend::new(CpuOptions { threads: 2, isa: Some(isa), limits: LIMITS }).unwrap();
            let off = trial.error(cpu, usize::MAX);
            assert!(off < trial.tolerance, "{}, {}: {off:e}", trial.name, isa.name());
        }
        // Emulated threads are slow: the first steps have prefill and decode together.
        let off = trial.error(CudaBackend::new(Emulated::default(), LIMITS), 4);
        assert!(off < trial.tolerance, "{}, CUDA: {off:e}", trial.name);
    }
}
