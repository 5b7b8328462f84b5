//! What a card has beside its driver: a library that multiplies, and the images of its kernels.

use cudarc::driver::sys::{CUresult, CUstream};
use tidemill_kernels::KernelError;
use tidemill_kernels::cuda::calls::{CallError, Multiplier};
use tidemill_kernels::cuda::device::{Address, Operands, Product, Source};
use tidemill_kernels::cuda::images::Images;

use super::FakeDriver;
use super::work::Work;

/// As the real one is told.
fn refused(what: &str, e: CallError) -> KernelError {
    match e.code == CUresult::CUDA_ERROR_OUT_OF_MEMORY as u32 {
        true => KernelError::Memory { what: "a matrix product", bytes: 0 },
        false => KernelError::Device(format!("{what}: {}", e.name)),
    }
}

/// What a plan is for.
pub(super) type Shape = (Operands, usize, usize, usize);

fn shape(p: Product) -> Shape {
    (p.operands, p.rows, p.n, p.stride)
}

/// A library that multiplies on the host.
pub(super) struct FakeProducts {
    pub driver: FakeDriver,
    pub workspace: Address,
    pub bytes: usize,
}

impl Multiplier for FakeProducts {
    fn has_plan(&mut self, product: Product) -> bool {
        self.driver.state().plans.contains(&shape(product))
    }

    fn plan(&mut self, product: Product) -> Result<(), KernelError> {
        // A library may refuse it during a capture; this one stops the test.
        let called = self.driver.call("plan");
        let mut state = called.map_err(|e| refused("cuBLASLt knows no way", e))?;
        state.plans.insert(shape(product));
        Ok(())
    }

    fn run(&mut self, product: Product, stream: CUstream) -> Result<(), KernelError> {
        let called = self.driver.captured_call("product");
        let mut state = called.map_err(|e| refused("cuBLASLt refuses a product", e))?;
        state.assert_held(self.workspace.0, self.bytes);
        assert!(state.plans.contains(&shape(product)), "a product without a plan");
        let work = Work::Product(product);
        state.assert_sound(&work);
        match &mut state.capture {
            Some(list) => list.push(work),
            None => state.enqueue(stream, work),
        }
        Ok(())
    }

    fn close(&mut self) {
        let mut state = self.driver.state();
        state.assert_held(self.workspace.0, self.bytes);
        assert!(state.queue.is_empty(), "products are under way");
        state.libraries -= 1;
        state.plans.clear();
    }
}

/// Images that name their file, which is all that [`FakeDriver`] wants of one.
#[derive(Clone, Copy)]
pub struct NamedImages {
    /// Those that were kept are of another driver.
    pub stale: bool,
    /// What is compiled anew, too.
    pub broken: bool,
    /// Files that no compiler takes, and that no driver takes.
    pub uncompiled: &'static [Source],
    pub refused: &'static [Source],
}

impl NamedImages {
    /// Those that are as they should be.
    pub const GOOD: Self = NamedImages { stale: false, broken: false, uncompiled: &[], refused: &[] };
}

impl Images for NamedImages {
    fn all(&self, sources: &[Source], architecture: &str, _driver: i32) -> Vec<Result<Vec<u8>, KernelError>> {
        assert!(architecture.starts_with("sm_"));
        let of = |source: &Source| match source {
            source if self.uncompiled.contains(source) => {
                Err(KernelError::Unsupported(format!("NVRTC cannot compile {}", source.name())))
            }
            source if self.stale || self.refused.contains(source) => Ok(b"stale".to_vec()),
            source => Ok(source.name().into()),
        };
        sources.iter().map(of).collect()
    }

    fn anew(&self, source: Source, _architecture: &str, _driver: i32) -> Option<Result<Vec<u8>, KernelError>> {
        self.stale.then(|| Ok(if self.broken { b"broken".to_vec() } else { source.name().into() }))
    }
}
