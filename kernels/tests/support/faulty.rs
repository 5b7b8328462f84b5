//! A device that fails once.

use std::cell::Cell;

use tidemill_kernels::KernelError;
use tidemill_kernels::cuda::device::{Address, Device, Fetch, Graph, HostAddress, Kernel, Launch, Pieces, Product};

/// Passes everything on to another device, but for one call that can fail: that one fails and is not done.
pub struct Faulty<D: Device> {
    inner: D,
    /// Calls that go well before the one that fails; `None` when none is to fail.
    left: Cell<Option<usize>>,
}

impl<D: Device> Faulty<D> {
    /// Nothing fails before [`Faulty::fail_after`].
    pub fn new(inner: D) -> Self {
        Faulty { inner, left: Cell::new(None) }
    }

    /// The call after so many fails.
    pub fn fail_after(&self, calls: usize) {
        self.left.set(Some(calls));
    }

    /// Whether the failure is behind.
    pub fn has_failed(&self) -> bool {
        self.left.get().is_none()
    }

    fn turn(&self, error: impl FnOnce() -> KernelError) -> Result<(), KernelError> {
        match self.left.get() {
            Some(0) => {
                self.left.set(None);
                Err(error())
            }
            left => {
                self.left.set(left.map(|left| left - 1));
                Ok(())
            }
        }
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

    fn wait(&mut self) -> Result<(), KernelError> {
        self.turn(failure)?;
        self.inner.wait()
    }

    fn capture(&mut self) -> Result<(), KernelError> {
        self.turn(failure)?;
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
