//! A card, through its driver.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::path::{Path, PathBuf};

use cudarc::driver::result::{self as cuda, DriverError};
use cudarc::driver::sys;

use super::compile::{architecture, compile, text};
use super::device::{Address, Device, Kernel, Launch, Product, Source};
use super::product::Products;
use crate::error::KernelError;

/// Shared memory that a kernel gets without being asked for more.
const SHARED_UNASKED: u32 = 48 << 10;

pub(super) fn failed(what: &str, e: DriverError) -> KernelError {
    // The driver's own words; a code that it does not know has none.
    let words = e.error_string().map(|text| text.to_string_lossy().into_owned()).unwrap_or_default();
    KernelError::Device(format!("{what}: {e:?} {words}"))
}

/// One card: the first that the driver shows (`CUDA_VISIBLE_DEVICES` chooses).
pub struct Card {
    device: sys::CUdevice,
    context: sys::CUcontext,
    pub(super) stream: sys::CUstream,
    functions: HashMap<&'static str, sys::CUfunction>,
    modules: Vec<sys::CUmodule>,
    products: Products,
    name: String,
    architecture: String,
    processors: usize,
}

// SAFETY: the handles are the driver's, which may be used from any thread; a call makes the context current first.
unsafe impl Send for Card {}

impl Card {
    /// Opens the card and compiles the kernels for it, all files at once; what was compiled is kept in `cache` by the hash of the text.
    ///
    /// Errors say what is missing and what to install: the driver, a card, NVRTC, cuBLASLt.
    pub fn open(cache: Option<&Path>) -> Result<Self, KernelError> {
        // SAFETY: it looks for the library, and for nothing else.
        if !unsafe { sys::is_culib_present() } {
            return Err(KernelError::Unsupported(
                "no NVIDIA driver found: looked for libcuda.so and libcuda.so.1 on the loader's path; install a driver, or serve with \
                 --device cpu"
                    .into(),
            ));
        }
        cuda::init().map_err(|e| failed("the driver does not start", e))?;
        let count = cuda::device::get_count().map_err(|e| failed("the driver counts no cards", e))?;
        if count == 0 {
            return Err(KernelError::Unsupported("the NVIDIA driver shows no card; serve with --device cpu".into()));
        }
        let device = cuda::device::get(0).map_err(|e| failed("no first card", e))?;
        let name = cuda::device::get_name(device).map_err(|e| failed("the card has no name", e))?;
        let attribute = |which| {
            // SAFETY: a device that the driver has just given.
            unsafe { cuda::device::get_attribute(device, which) }.map_err(|e| failed("the card says nothing of itself", e))
        };
        let major = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let processors = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        if major < 8 {
            return Err(KernelError::Unsupported(format!(
                "{name} has compute capability {major}.{minor}; the kernels need 8.0 (Ampere) or later. Serve with --device cpu"
            )));
        }
        let architecture = architecture((major as u32, minor as u32));
        let images = images(&architecture, cache)?;

        // SAFETY: a device that the driver has just given; released when this is dropped.
        let context = unsafe { cuda::primary_ctx::retain(device) }.map_err(|e| failed("no context", e))?;
        let products = Products::none();
        let (functions, modules, stream) = (HashMap::new(), Vec::new(), std::ptr::null_mut());
        let mut card =
            Card { device, context, stream, functions, modules, products, name, architecture, processors: processors as usize };
        card.current()?;
        card.stream = cuda::stream::create(cuda::stream::StreamKind::NonBlocking).map_err(|e| failed("no stream", e))?;
        for image in images {
            // SAFETY: a whole image, alive during the call.
            let module = unsafe { cuda::module::load_data(image.as_ptr().cast()) }
                .map_err(|e| failed("the card refuses a kernel file", e))?;
            card.modules.push(module);
        }
        card.products = Products::open(&mut |bytes| card_alloc(bytes, "workspace"))?;
        Ok(card)
    }

    /// Free and total bytes of the card's memory.
    pub fn memory(&self) -> Result<(usize, usize), KernelError> {
        self.current()?;
        cuda::mem_get_info().map_err(|e| failed("the card's memory cannot be read", e))
    }

    pub(super) fn current(&self) -> Result<(), KernelError> {
        // SAFETY: the context is held until this is dropped.
        unsafe { cuda::ctx::set_current(self.context) }.map_err(|e| failed("no context", e))
    }

    fn function(&mut self, kernel: Kernel) -> Result<sys::CUfunction, KernelError> {
        if let Some(function) = self.functions.get(kernel.name) {
            return Ok(*function);
        }
        let name = CString::new(kernel.name).map_err(|_| KernelError::Device("a kernel's name holds a zero byte".into()))?;
        // Modules are in the order of the files.
        let module = self.modules[kernel.source as usize];
        // SAFETY: a module that stays loaded.
        let function = unsafe { cuda::module::get_function(module, name) }.map_err(|e| failed(kernel.name, e))?;
        self.functions.insert(kernel.name, function);
        Ok(function)
    }
}

fn card_alloc(bytes: usize, what: &'static str) -> Result<Address, KernelError> {
    // SAFETY: plain memory.
    unsafe { cuda::malloc_sync(bytes.max(1)) }.map(Address).map_err(|_| KernelError::Memory { what, bytes })
}

/// Compiles all kernel files for an architecture (`sm_90a`) into `cache`, for a machine that has a driver and no NVRTC.
pub fn prepare(architecture: &str, cache: &Path) -> Result<(), KernelError> {
    images(architecture, Some(cache))?;
    match Source::ALL.into_iter().map(|source| kept_at(cache, source, architecture)).find(|path| !path.is_file()) {
        Some(path) => Err(KernelError::Device(format!("{} could not be written; choose a folder that can be", path.display()))),
        None => Ok(()),
    }
}

/// The machine code of all files, from the cache or the compiler.
fn images(architecture: &str, cache: Option<&Path>) -> Result<Vec<Vec<u8>>, KernelError> {
    let image = |source: Source| -> Result<Vec<u8>, KernelError> {
        let kept = cache.map(|folder| kept_at(folder, source, architecture));
        if let Some(found) = kept.as_deref().and_then(|path| std::fs::read(path).ok()) {
            return Ok(found);
        }
        let compiled = compile(source, architecture, false)?;
        if let Some(path) = kept {
            keep(&path, &compiled.cubin);
        }
        Ok(compiled.cubin)
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = Source::ALL.map(|source| scope.spawn(move || image(source))).into_iter().collect();
        let failed = |_| Err(KernelError::Device("a compiling thread failed".into()));
        workers.into_iter().map(|worker| worker.join().unwrap_or_else(failed)).collect()
    })
}

fn kept_at(folder: &Path, source: Source, architecture: &str) -> PathBuf {
    let hash = blake3::hash(text(source).as_bytes()).to_hex();
    folder.join(format!("{}-{architecture}-{}.cubin", source.name(), &hash[..32]))
}

/// Keeps an image. A folder that cannot be written costs the next start a few seconds and nothing else.
fn keep(path: &Path, image: &[u8]) {
    let unique = path.with_extension(format!("{}.tmp", std::process::id()));
    let written = path.parent().map_or(Ok(()), std::fs::create_dir_all).and_then(|()| std::fs::write(&unique, image));
    if written.and_then(|()| std::fs::rename(&unique, path)).is_err() {
        // What is left of it is of no use.
        let _ = std::fs::remove_file(&unique);
    }
}

impl Device for Card {
    fn describe(&self) -> String {
        format!("{}, {}, {} multiprocessors", self.name, self.architecture, self.processors)
    }

    fn alloc(&mut self, what: &'static str, bytes: usize) -> Result<Address, KernelError> {
        self.current()?;
        let at = card_alloc(bytes, what)?;
        // SAFETY: all of the memory that was just reserved.
        unsafe { cuda::memset_d8_async(at.0, 0, bytes.max(1), self.stream) }
            .map_err(|e| failed("memory cannot be cleared", e))?;
        Ok(at)
    }

    fn free(&mut self, at: Address) {
        // The driver frees when all work before is done. A card that is lost has nothing to free.
        if self.current().is_ok() {
            // SAFETY: it was reserved by `alloc` and is freed once.
            let _ = unsafe { cuda::free_sync(at.0) };
        }
    }

    fn write(&mut self, to: Address, bytes: &[u8]) -> Result<(), KernelError> {
        self.current()?;
        // SAFETY: the backend writes into what it reserved; from memory that is not locked, the driver has copied when it returns.
        unsafe { cuda::memcpy_htod_async(to.0, bytes, self.stream) }.map_err(|e| failed("copy to the card", e))
    }

    fn read(&self, from: Address, bytes: &mut [u8]) -> Result<(), KernelError> {
        self.current()?;
        // SAFETY: the backend reads what it reserved; it waits below, before `bytes` can be used.
        unsafe { cuda::memcpy_dtoh_async(bytes, from.0, self.stream) }.map_err(|e| failed("copy from the card", e))?;
        // SAFETY: a stream of our own.
        unsafe { cuda::stream::synchronize(self.stream) }.map_err(|e| failed("the card stopped", e))
    }

    fn launch(&mut self, kernel: Kernel, launch: Launch, params: &[u8]) -> Result<(), KernelError> {
        self.current()?;
        let function = self.function(kernel)?;
        if launch.shared > SHARED_UNASKED {
            let most = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a function of a loaded module.
            unsafe { cuda::function::set_function_attribute(function, most, launch.shared as i32) }
                .map_err(|e| failed(kernel.name, e))?;
        }
        let [x, y, z] = launch.grid;
        let mut list = [params.as_ptr() as *mut c_void];
        // SAFETY: the kernel takes one structure, whose size the tests compare; the driver copies it before it returns.
        unsafe { cuda::launch_kernel(function, (x, y, z), (kernel.threads, 1, 1), launch.shared, self.stream, &mut list) }
            .map_err(|e| failed(kernel.name, e))
    }

    fn product(&mut self, product: Product) -> Result<(), KernelError> {
        self.current()?;
        self.products.run(product, self.stream)
    }

    fn wait(&mut self) -> Result<(), KernelError> {
        self.current()?;
        // SAFETY: a stream of our own.
        unsafe { cuda::stream::synchronize(self.stream) }.map_err(|e| failed("the card stopped", e))
    }
}

impl Drop for Card {
    fn drop(&mut self) {
        // Nothing can be done about failures here.
        if self.current().is_ok() {
            self.products.close();
            // SAFETY: everything was made by `open`, and is given back once.
            unsafe {
                for module in &self.modules {
                    let _ = cuda::module::unload(*module);
                }
                if !self.stream.is_null() {
                    let _ = cuda::stream::destroy(self.stream);
                }
            }
        }
        // SAFETY: retained once.
        let _ = unsafe { cuda::primary_ctx::release(self.device) };
    }
}
