//! A device that fails once.

use std::sync::{Arc, Mutex};

use tidemill_kernels::cuda::device::{Address, Device, Fetch, Graph, HostAddress, Kernel, Launch, Pieces, Prefill, Product};
use tidemill_kernels::{KernelError, Place};

/// Calls that go well before the one that fails; `None` when none is to fail. Shared with whoever lights it.
pub type Fuse = Arc<Mutex<Option<usize>>>;

/// Passes everything on to another device, but for one call that can fail: that one fails and is not done.
pub struct Faulty<D: Device> {
    inner: D,
    left: Fuse,
    /// Every capture is refused.
    pub refuses: bool,
}

impl<D: Device> Faulty<D> {
    /// Nothing fails before [`Faulty::fail_after`].
    pub fn new(inner: D) -> Self {
        Faulty { inner, left: Fuse::default(), refuses: false }
    }

    /// The call after so many fails.
    pub fn fail_after(&self, calls: usize) {
        *self.left.lock().unwrap() = Some(calls);
    }

    /// To make it fail when somebody else has it.
    pub fn fuse(&self) -> Fuse {
        self.left.clone()
    }

    /// The device behind it.
    pub fn inner(&self) -> &D {
        &self.inner
    }

    /// Whether the failure is behind.
    pub fn has_failed(&self) -> bool {
        self.left.lock().unwrap().is_none()
    }

    fn turn(&self, error: impl FnOnce() -> KernelError) -> Result<(), KernelError> {
        let mut left = self.left.lock().unwrap();
        let fails = *left == Some(0);
        *left = left.and_then(|left| left.checked_sub(1));
        if fails { Err(error()) } else { Ok(()) }
    }
}

fn failure() -> KernelError {
    KernelError::Device("as the test wants it".into())
}

impl<D: Device> Device for Faulty<D> {
    fn describe(&self) -> String {
        self.inner.describe()
    }

    fn memory(&self) -> Result<(usize, usize), KernelError> {
        self.inner.memory()
    }

    fn alloc(&mut self, what: &'static str, bytes: usize) -> Result<Address, KernelError> {
        self.turn(|| KernelError::Memory { what, bytes })?;
        self.inner.alloc(what, bytes)
    }

    fn free(&mut self, at: Address) {
        self.inner.free(at);
    }

    fn write(&mut self, to: Address, bytes: &[u8]) -> Result<(), KernelError> {
        self.turn(failure)?;
        self.inner.write(to, bytes)
    }

    fn clear(&mut self, at: Address, bytes: usize) -> Result<(), KernelError> {
        self.turn(failure)?;
        self.inner.clear(at, bytes)
    }

    fn read(&self, from: Address, bytes: &mut [u8]) -> Result<(), KernelError> {
        self.turn(failure)?;
        self.inner.read(from, bytes)
    }

    fn fetch(&mut self, from: Address, bytes: usize) -> Result<Fetch, KernelError> {
        self.turn(failure)?;
        self.inner.fetch(from, bytes)
    }

    fn fetched(&mut self, fetch: Fetch, to: &mut [u8]) -> Result<(), KernelError> {
        // What cannot be handed over is not asked for again.
        self.inner.fetched(fetch, to)?;
        self.turn(failure)
    }

    fn alloc_host(&mut self, what: &'static str, bytes: usize) -> Result<HostAddress, KernelError> {
        self.turn(|| KernelError::Memory { what, bytes })?;
        self.inner.alloc_host(what, bytes)
    }

    fn free_host(&mut self, at: HostAddress) {
        self.inner.free_host(at);
    }

    fn save(&mut self, from: Pieces, to: HostAddress) -> Result<(), KernelError> {
        self.turn(failure)?;
        self.inner.save(from, to)
    }

    fn restore(&mut self, from: HostAddress, to: Pieces) -> Result<(), KernelError> {
        self.turn(failure)?;
        self.inner.restore(from, to)
    }

    fn launch(&mut self, kernel: Kernel, launch: Launch, params: &[u8]) -> Result<(), KernelError> {
        self.turn(failure)?;
        self.inner.launch(kernel, launch, params)
    }

    fn product(&mut self, product: Product) -> Result<(), KernelError> {
        self.turn(failure)?;
        self.inner.product(product)
    }

    fn multiplies_fp8(&self) -> bool {
        self.inner.multiplies_fp8()
    }

    fn prefill(&self, head_dim: usize) -> Prefill {
        self.inner.prefill(head_dim)
    }

    fn place(&self) -> Place {
        self.inner.place()
    }

    fn all_reduce(&mut self, at: Address, count: usize) -> Result<(), KernelError> {
        self.turn(failure)?;
        self.inner.all_reduce(at, count)
    }

    fn all_gather(&mut self, from: Address, to: Address, count: usize) -> Result<(), KernelError> {
        self.turn(failure)?;
        self.inner.all_gather(from, to, count)
    }

    fn broadcast(&mut self, at: Address, count: usize) -> Result<(), KernelError> {
        self.turn(failure)?;
        self.inner.broadcast(at, count)
    }

    fn wait(&mut self) -> Result<(), KernelError> {
        self.turn(failure)?;
        self.inner.wait()
    }

    fn capture(&mut self) -> Result<(), KernelError> {
        self.turn(failure)?;
        if self.refuses {
            return Err(failure());
        }
        self.inner.capture()
    }

    fn captured(&mut self) -> Result<Graph, KernelError> {
        // A driver ends a capture that it refuses, too.
        let graph = self.inner.captured()?;
        self.turn(failure).inspect_err(|_| self.inner.forget(graph))?;
        Ok(graph)
    }

    fn replay(&mut self, graph: Graph) -> Result<(), KernelError> {
        self.turn(failure)?;
        self.inner.replay(graph)
    }

    fn forget(&mut self, graph: Graph) {
        self.inner.forget(graph);
    }
}
