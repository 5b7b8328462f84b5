//! What a card has beside its driver: a library that multiplies, and the images of its kernels.

use cudarc::driver::sys::CUstream;
use tidemill_kernels::KernelError;
use tidemill_kernels::cuda::calls::Multiplier;
use tidemill_kernels::cuda::device::{Address, Product, Source};
use tidemill_kernels::cuda::images::Images;

use super::FakeDriver;
use super::work::Work;

/// A library that multiplies on the host.
pub(super) struct FakeProducts {
    pub driver: FakeDriver,
    pub workspace: Address,
    pub bytes: usize,
}

impl Multiplier for FakeProducts {
    fn run(&mut self, product: Product, stream: CUstream) -> Result<(), KernelError> {
        let called = self.driver.captured_call("product");
        let mut state = called.map_err(|e| KernelError::Device(format!("cuBLASLt refuses a product: {}", e.name)))?;
        state.assert_held(self.workspace.0, self.bytes);
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
    }
}

/// Images that name their file, which is all that [`FakeDriver`] wants of one.
pub struct NamedImages {
    /// Those that were kept are of another driver.
    pub stale: bool,
    /// What is compiled anew, too.
    pub broken: bool,
}

impl Images for NamedImages {
    fn all(&self, sources: &[Source], architecture: &str, _driver: i32) -> Result<Vec<Vec<u8>>, KernelError> {
        assert!(architecture.starts_with("sm_"));
        Ok(sources.iter().map(|source| if self.stale { b"stale".to_vec() } else { source.name().into() }).collect())
    }

    fn anew(&self, source: Source, _architecture: &str, _driver: i32) -> Option<Result<Vec<u8>, KernelError>> {
        self.stale.then(|| Ok(if self.broken { b"broken".to_vec() } else { source.name().into() }))
    }
}
