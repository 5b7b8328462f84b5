//! A card, through its driver.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::path::{Path, PathBuf};

use cudarc::driver::result::{self as cuda, DriverError};
use cudarc::driver::sys;

use super::compile::{architecture, compile, text};
use super::device::{Address, Device, Graph, Kernel, Launch, Product, Source};
use super::libraries::{Library, check_compiler, check_driver, compiler_version, dotted, driver_version};
use super::nccl::Communicator;
use super::product::Products;
use super::staging::StagedMemory;
use crate::collective::Place;
use crate::error::KernelError;

/// Shared memory that a kernel gets without being asked for more.
const SHARED_UNASKED: u32 = 48 << 10;

pub(super) fn failed(what: &str, e: DriverError) -> KernelError {
    // The driver's own words; a code that it does not know has none.
    let words = e.error_string().map(|text| text.to_string_lossy().into_owned()).unwrap_or_default();
    KernelError::Device(format!("{what}: {e:?} {words}"))
}

fn no_card(number: usize, count: i32) -> KernelError {
    let seen = match count {
        0 => "none".to_owned(),
        1 => "card 0 only".to_owned(),
        count => format!("cards 0 to {}", count - 1),
    };
    KernelError::Unsupported(format!(
        "no card {number}: the NVIDIA driver shows {seen} (CUDA_VISIBLE_DEVICES hides the others); choose another with --device \
         cuda:N, or use --device cpu"
    ))
}

/// One card (`CUDA_VISIBLE_DEVICES` chooses among those of the machine).
pub struct Card {
    device: sys::CUdevice,
    context: sys::CUcontext,
    pub(super) stream: sys::CUstream,
    functions: HashMap<&'static str, sys::CUfunction>,
    modules: HashMap<Source, sys::CUmodule>,
    products: Products,
    graphs: HashMap<Graph, sys::CUgraphExec>,
    made_graphs: u64,
    staged: StagedMemory,
    /// With the other cards that compute the model.
    peers: Option<Communicator>,
    /// Memory to be freed when the step is over: the driver may wait for all cards then, and one of them may wait in an exchange for us.
    unwanted: RefCell<Vec<Address>>,
    name: String,
    architecture: String,
    /// Of the driver: 1000 · major + 10 · minor of CUDA.
    version: i32,
    processors: usize,
}

// SAFETY: the handles are the driver's, which may be used from any thread; a call makes the context current first.
unsafe impl Send for Card {}

impl Card {
    /// Opens the first card; see [`Card::open_number`].
    pub fn open(cache: Option<&Path>) -> Result<Self, KernelError> {
        Self::open_number(0, cache)
    }

    /// Opens one of the cards that the driver shows and compiles the kernels for it, all files at once; what was compiled is kept in
    /// `cache` by the hash of the text.
    ///
    /// Errors say what is missing and what to install: the driver, a card, NVRTC, cuBLASLt.
    pub fn open_number(number: usize, cache: Option<&Path>) -> Result<Self, KernelError> {
        Self::open_with(number, cache, Source::ALL.into_iter().filter(|source| !source.trains()).collect())
    }

    /// [`Card::open_number`] for a training, whose kernels are others.
    pub fn open_for_training(number: usize, cache: Option<&Path>) -> Result<Self, KernelError> {
        let needed = |source: &Source| source.trains() || *source == Source::Rows;
        Self::open_with(number, cache, Source::ALL.into_iter().filter(needed).collect())
    }

    fn open_with(number: usize, cache: Option<&Path>, sources: Vec<Source>) -> Result<Self, KernelError> {
        Library::Driver.require()?;
        let version = driver_version()?;
        check_driver(version)?;
        cuda::init().map_err(|e| match e.0 {
            sys::CUresult::CUDA_ERROR_NO_DEVICE => no_card(number, 0),
            sys::CUresult::CUDA_ERROR_STUB_LIBRARY => KernelError::Unsupported(
                "the libcuda.so that was found is the toolkit's stand-in for linking, and no driver; see to it that the driver's comes \
                 first on the loader's path, or use --device cpu"
                    .into(),
            ),
            _ => failed("the driver does not start", e),
        })?;
        let count = cuda::device::get_count().map_err(|e| failed("the driver counts no cards", e))?;
        let ordinal = i32::try_from(number).ok().filter(|ordinal| *ordinal < count).ok_or_else(|| no_card(number, count))?;
        let device = cuda::device::get(ordinal).map_err(|e| failed("the card is not to be had", e))?;
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
                "{name} has compute capability {major}.{minor}; the kernels need 8.0 (Ampere) or later. Use --device cpu"
            )));
        }
        let architecture = architecture((major as u32, minor as u32));
        let images = images(&sources, &architecture, cache, Some(version))?;

        // SAFETY: a device that the driver has just given; released when this is dropped.
        let context = unsafe { cuda::primary_ctx::retain(device) }.map_err(|e| failed("no context", e))?;
        let mut card = Card {
            device,
            context,
            stream: std::ptr::null_mut(),
            functions: HashMap::new(),
            modules: HashMap::new(),
            products: Products::none(),
            graphs: HashMap::new(),
            made_graphs: 0,
            staged: StagedMemory::default(),
            peers: None,
            unwanted: RefCell::default(),
            name,
            architecture,
            version,
            processors: processors as usize,
        };
        card.current()?;
        card.stream = cuda::stream::create(cuda::stream::StreamKind::NonBlocking).map_err(|e| failed("no stream", e))?;
        for (source, image) in sources.into_iter().zip(images) {
            let module = card.load(&image).or_else(|refused| {
                // What was kept may be from another compiler than the driver wants.
                let Some(folder) = cache else { return Err(refused) };
                let _ = std::fs::remove_file(kept_at(folder, source, &card.architecture));
                card.load(&image_of(source, &card.architecture, Some(folder), Some(version))?)
            })?;
            card.modules.insert(source, module);
        }
        card.staged = StagedMemory::new()?;
        card.products = Products::open(&mut |bytes| card_alloc(bytes, "workspace"))?;
        Ok(card)
    }

    /// How many cards the driver shows.
    pub fn visible(&self) -> Result<usize, KernelError> {
        let count = cuda::device::get_count().map_err(|e| failed("the driver counts no cards", e))?;
        Ok(usize::try_from(count).unwrap_or(0))
    }

    /// From now on it is one of several.
    pub(super) fn join(&mut self, peers: Communicator) {
        self.peers = Some(peers);
    }

    fn free_unwanted(&self) {
        // The driver frees when all work before is done. A card that is lost has nothing to free.
        if self.current().is_ok() {
            for at in self.unwanted.take() {
                // SAFETY: it was reserved by `alloc` and is freed once.
                let _ = unsafe { cuda::free_sync(at.0) };
            }
        }
    }

    fn peers(&self) -> Result<&Communicator, KernelError> {
        self.current()?;
        self.peers.as_ref().ok_or_else(|| KernelError::Unsupported("this card computes alone".into()))
    }

    fn load(&self, image: &[u8]) -> Result<sys::CUmodule, KernelError> {
        // SAFETY: a whole image, alive during the call.
        unsafe { cuda::module::load_data(image.as_ptr().cast()) }.map_err(|e| failed("the card refuses a kernel file", e))
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
        let absent = || KernelError::Device(format!("{} was opened without {}", self.name, kernel.source.name()));
        let module = self.modules.get(&kernel.source).copied().ok_or_else(absent)?;
        // SAFETY: a module that stays loaded.
        let function = unsafe { cuda::module::get_function(module, name) }.map_err(|e| failed(kernel.name, e))?;
        self.functions.insert(kernel.name, function);
        Ok(function)
    }
}

fn card_alloc(bytes: usize, what: &'static str) -> Result<Address, KernelError> {
    // SAFETY: plain memory.
    unsafe { cuda::malloc_sync(bytes.max(1)) }.map(Address).map_err(|e| match e.0 {
        sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => KernelError::Memory { what, bytes },
        _ => failed("memory is not to be had", e),
    })
}

/// Compiles all kernel files for an architecture (`sm_90a`) into `cache`, for a machine that has a driver and no NVRTC.
pub fn prepare(architecture: &str, cache: &Path) -> Result<(), KernelError> {
    images(&Source::ALL, architecture, Some(cache), None)?;
    match Source::ALL.into_iter().map(|source| kept_at(cache, source, architecture)).find(|path| !path.is_file()) {
        Some(path) => Err(KernelError::Device(format!("{} could not be written; choose a folder that can be", path.display()))),
        None => Ok(()),
    }
}

/// The machine code of a file, from the cache or the compiler.
fn image_of(source: Source, architecture: &str, cache: Option<&Path>, driver: Option<i32>) -> Result<Vec<u8>, KernelError> {
    let kept = cache.map(|folder| kept_at(folder, source, architecture));
    if let Some(found) = kept.as_deref().and_then(read_kept) {
        return Ok(found);
    }
    Library::Nvrtc.require()?;
    check_compiler(compiler_version()?, driver)?;
    let compiled = compile(source, architecture, false)?;
    if let Some(path) = kept {
        keep(&path, &compiled.cubin);
    }
    Ok(compiled.cubin)
}

/// That of several files, each compiled by a thread of its own. `driver`: the version that must take it, where there is one.
fn images(
    sources: &[Source],
    architecture: &str,
    cache: Option<&Path>,
    driver: Option<i32>,
) -> Result<Vec<Vec<u8>>, KernelError> {
    std::thread::scope(|scope| {
        let compile = |source: &Source| {
            let source = *source;
            scope.spawn(move || image_of(source, architecture, cache, driver))
        };
        let workers: Vec<_> = sources.iter().map(compile).collect();
        let failed = |_| Err(KernelError::Device("a compiling thread failed".into()));
        workers.into_iter().map(|worker| worker.join().unwrap_or_else(failed)).collect()
    })
}

fn kept_at(folder: &Path, source: Source, architecture: &str) -> PathBuf {
    let hash = blake3::hash(text(source).as_bytes()).to_hex();
    folder.join(format!("{}-{architecture}-{}.cubin", source.name(), &hash[..32]))
}

/// Keeps an image behind its hash. A folder that cannot be written costs the next start a few seconds and nothing else.
fn keep(path: &Path, image: &[u8]) {
    let unique = path.with_extension(format!("{}.tmp", std::process::id()));
    let content = [blake3::hash(image).as_bytes(), image].concat();
    let written = path.parent().map_or(Ok(()), std::fs::create_dir_all).and_then(|()| std::fs::write(&unique, content));
    if written.and_then(|()| std::fs::rename(&unique, path)).is_err() {
        // What is left of it is of no use.
        let _ = std::fs::remove_file(&unique);
    }
}

/// An image that was kept; `None` when there is none, or when its bytes are not those that were kept.
fn read_kept(path: &Path) -> Option<Vec<u8>> {
    let content = std::fs::read(path).ok()?;
    let (hash, image) = content.split_at_checked(blake3::OUT_LEN)?;
    (blake3::hash(image).as_bytes() == hash).then(|| image.to_vec())
}

impl Device for Card {
    fn describe(&self) -> String {
        let total = self.memory().map_or(String::new(), |(_, total)| format!(", {:.0} GiB", total as f64 / f64::from(1 << 30)));
        format!("{}, {}, {} multiprocessors{total}, CUDA {}", self.name, self.architecture, self.processors, dotted(self.version))
    }

    fn memory(&self) -> Result<(usize, usize), KernelError> {
        self.current()?;
        cuda::mem_get_info().map_err(|e| failed("the card's memory cannot be read", e))
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
        self.unwanted.borrow_mut().push(at);
        if self.peers.is_none() {
            self.free_unwanted();
        }
    }

    fn write(&mut self, to: Address, bytes: &[u8]) -> Result<(), KernelError> {
        self.current()?;
        let staged = self.staged.put(bytes);
        let from = staged.unwrap_or(bytes);
        // SAFETY: the backend writes into what it reserved. What is staged stays as it is until the card is done; from memory that is
        // not locked, the driver has copied when it returns.
        unsafe { cuda::memcpy_htod_async(to.0, from, self.stream) }.map_err(|e| failed("copy to the card", e))
    }

    fn read(&self, from: Address, bytes: &mut [u8]) -> Result<(), KernelError> {
        self.current()?;
        let copied = |to: &mut [u8]| {
            // SAFETY: the backend reads what it reserved, and waits for it before anybody looks.
            unsafe { cuda::memcpy_dtoh_async(to, from.0, self.stream) }.map_err(|e| failed("copy from the card", e))?;
            // SAFETY: a stream of our own.
            unsafe { cuda::stream::synchronize(self.stream) }.map_err(|e| failed("the card stopped", e))
        };
        let through = self.staged.bring_back(bytes.len(), |locked| copied(locked).map(|()| bytes.copy_from_slice(locked)));
        match through {
            Some(done) => done?,
            None => copied(bytes)?,
        }
        self.staged.all_done();
        self.free_unwanted();
        Ok(())
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

    fn place(&self) -> Place {
        self.peers.as_ref().map_or(Place::ALONE, Communicator::place)
    }

    fn all_reduce(&mut self, at: Address, count: usize) -> Result<(), KernelError> {
        self.peers()?.all_reduce(at, count, self.stream)
    }

    fn all_gather(&mut self, from: Address, to: Address, count: usize) -> Result<(), KernelError> {
        self.peers()?.all_gather(from, to, count, self.stream)
    }

    fn wait(&mut self) -> Result<(), KernelError> {
        self.current()?;
        // SAFETY: a stream of our own.
        unsafe { cuda::stream::synchronize(self.stream) }.map_err(|e| failed("the card stopped", e))?;
        self.staged.all_done();
        self.free_unwanted();
        Ok(())
    }

    fn capture(&mut self) -> Result<(), KernelError> {
        self.current()?;
        // Other threads may have cards' memory to reserve meanwhile; only this one keeps to the rules of a capture.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: a stream of our own.
        unsafe { cuda::stream::begin_capture(self.stream, mode) }.map_err(|e| failed("a capture does not begin", e))
    }

    fn captured(&mut self) -> Result<Graph, KernelError> {
        self.current()?;
        // SAFETY: a stream of our own.
        let graph = unsafe { cuda::stream::end_capture(self.stream) }.map_err(|e| failed("a capture was broken off", e))?;
        // SAFETY: the graph was just made; what is made of it does not need it any more.
        let made = unsafe {
            let made = cuda::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            let _ = cuda::graph::destroy(graph);
            made
        };
        let graph = Graph(self.made_graphs);
        self.graphs.insert(graph, made.map_err(|e| failed("a captured step is refused", e))?);
        self.made_graphs += 1;
        Ok(graph)
    }

    fn replay(&mut self, graph: Graph) -> Result<(), KernelError> {
        self.current()?;
        let Some(made) = self.graphs.get(&graph) else {
            return Err(KernelError::Device("a captured step was given back before it was used".into()));
        };
        // SAFETY: alive until `forget`.
        unsafe { cuda::graph::launch(*made, self.stream) }.map_err(|e| failed("a captured step is not launched", e))
    }

    fn forget(&mut self, graph: Graph) {
        if let (Some(made), Ok(())) = (self.graphs.remove(&graph), self.current()) {
            // SAFETY: made once, destroyed once; the driver lets one that runs come to its end.
            let _ = unsafe { cuda::graph::exec_destroy(made) };
        }
    }
}

impl Drop for Card {
    fn drop(&mut self) {
        // Nothing can be done about failures here.
        if self.current().is_ok() {
            self.products.close();
            // SAFETY: everything was made by `open`, and is given back once.
            unsafe {
                for (_, graph) in self.graphs.drain() {
                    let _ = cuda::graph::exec_destroy(graph);
                }
                // Before the stream is waited for: it may hold an exchange that the other cards never join.
                if let Some(peers) = self.peers.take() {
                    peers.close();
                }
                // Copies that are still under way read what is staged.
                let _ = cuda::stream::synchronize(self.stream);
                self.free_unwanted();
                self.staged.close();
                for module in self.modules.values() {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kept_image_is_used_only_as_it_was_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = kept_at(&folder.path().join("not there yet"), Source::Rows, "sm_80");
        assert_eq!(read_kept(&path), None);
        keep(&path, b"machine code");
        assert_eq!(read_kept(&path).as_deref(), Some(&b"machine code"[..]));
        assert_ne!(path, kept_at(path.parent().unwrap(), Source::Rows, "sm_90a"));
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.pop();
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(read_kept(&path), None);
        std::fs::write(&path, b"short").unwrap();
        assert_eq!(read_kept(&path), None);
        // No temporary file stays.
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn who_asks_for_a_card_that_is_not_there_is_told_which_are() {
        assert!(no_card(0, 0).to_string().contains("shows none"));
        assert!(no_card(3, 1).to_string().contains("card 0 only"));
        let text = no_card(9, 8).to_string();
        assert!(text.contains("no card 9") && text.contains("cards 0 to 7") && text.contains("--device cpu"), "{text}");
    }

    #[test]
    fn without_a_driver_opening_is_an_error_that_says_so() {
        if Library::Driver.require().is_ok() {
            return; // A machine with a driver.
        }
        let text = Card::open(None).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(text.contains("no NVIDIA driver found") && text.contains("libcuda.so.1"), "{text}");
    }
}
