//! A card, through its driver.

use std::cell::Cell;
use std::collections::{HashMap, VecDeque};
use std::ffi::CString;
use std::path::Path;
use std::time::Duration;

use cudarc::driver::sys;

use super::apart::{self, Capturing};
pub use super::calls::Cuda;
use super::calls::{Calls, Multiplier, failed, not_reserved};
use super::compile::architecture;
use super::device::{Address, Device, FETCHES, Fetch, Graph, HostAddress, Kernel, Launch, Pieces, Prefill, Product, Source};
pub use super::images::prepare;
use super::images::{Compiled, Images};
use super::libraries::dotted;
use super::nccl::Communicator;
use super::patience::PATIENCE;
use super::sought::{Sought, no_context};
pub use super::sought::{check_card, has_card};
use super::staging::{MOST_RETURNED, MOST_STAGED, StagedMemory};
use super::trial::Choice;
use crate::collective::Place;
use crate::error::KernelError;

/// Shared memory that a kernel gets without being asked for more.
const SHARED_UNASKED: u32 = 48 << 10;
/// Memory that the library of matrix products may use for one.
const WORKSPACE: usize = 32 << 20;

/// One card (`CUDA_VISIBLE_DEVICES` chooses among those of the machine).
pub struct Card<C: Calls = Cuda> {
    pub(super) calls: C,
    device: sys::CUdevice,
    context: sys::CUcontext,
    pub(super) stream: sys::CUstream,
    /// With the shared memory that each may ask for.
    functions: HashMap<(Source, &'static str), (sys::CUfunction, u32)>,
    modules: HashMap<Source, sys::CUmodule>,
    /// Files that it does without, and why.
    left_out: HashMap<Source, String>,
    workspace: Address,
    products: Option<Box<dyn Multiplier>>,
    capturing: Option<Capturing>,
    graphs: HashMap<Graph, sys::CUgraphExec>,
    made_graphs: u64,
    pub(super) staged: StagedMemory,
    /// One for each fetch that may be under way.
    events: Vec<sys::CUevent>,
    fetches: VecDeque<Fetching>,
    made_fetches: u64,
    /// How attention of prompts is computed.
    pub(super) choice: Choice,
    /// With the other cards that compute the model.
    peers: Option<Communicator>,
    /// Of one of several cards: memory to be freed when no step is under way. The driver may wait for all cards then, and one of them may wait in
    /// an exchange for us.
    unwanted: Vec<Address>,
    pub(super) patience: Duration,
    /// It did not come back.
    pub(super) given_up: Cell<bool>,
    name: String,
    architecture: String,
    /// Of the driver: 1000 · major + 10 · minor of CUDA.
    version: i32,
    processors: usize,
    /// Compute capability.
    capability: (u32, u32),
}

/// A copy back that is under way.
struct Fetching {
    fetch: Fetch,
    bytes: usize,
    /// What was more than fits the place for it, and was waited for.
    brought: Option<Vec<u8>>,
    /// What was staged before it.
    staged: usize,
}

impl Fetching {
    /// The event and the place that it has.
    fn slot(&self) -> usize {
        (self.fetch.0 % FETCHES as u64) as usize
    }
}

// SAFETY: the handles are the driver's, which may be used from any thread; a call makes the context current first.
unsafe impl<C: Calls> Send for Card<C> {}

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
        Self::over(Cuda::find()?, number, &Compiled { cache })
    }

    /// [`Card::open_number`] for a training, whose kernels are others.
    pub fn open_for_training(number: usize, cache: Option<&Path>) -> Result<Self, KernelError> {
        let needed = |source: &Source| source.trains() || *source == Source::Rows;
        let sources: Vec<_> = Source::ALL.into_iter().filter(needed).collect();
        Self::with_files(Cuda::find()?, number, &sources, &Compiled { cache })
    }
}

impl<C: Calls> Card<C> {
    /// Opens a card of a driver, for serving.
    pub fn over(calls: C, number: usize, images: &dyn Images) -> Result<Self, KernelError> {
        let sources: Vec<_> = Source::ALL.into_iter().filter(|source| !source.trains()).collect();
        Self::with_files(calls, number, &sources, images)
    }

    fn with_files(calls: C, number: usize, sources: &[Source], images: &dyn Images) -> Result<Self, KernelError> {
        let Sought { device, name, capability, processors, version } = Sought::card(&calls, number)?;
        let architecture = architecture(capability);
        let sources: Vec<Source> = sources.iter().copied().filter(|source| source.is_for(&architecture)).collect();
        // What is missing is told before anything is reserved.
        let of_source = |(image, source): (Result<_, _>, &Source)| match image {
            Err(why) if !source.is_spare() => Err(why),
            image => Ok((*source, image)),
        };
        let code: Vec<(Source, Result<Vec<u8>, KernelError>)> =
            images.all(&sources, &architecture, version).into_iter().zip(&sources).map(of_source).collect::<Result<_, _>>()?;

        // SAFETY: a device that the driver has just given; released when this is dropped.
        let context = unsafe { calls.retain_context(device) }.map_err(|e| no_context(&name, e))?;
        let mut card = Card {
            calls,
            device,
            context,
            stream: std::ptr::null_mut(),
            functions: HashMap::new(),
            modules: HashMap::new(),
            left_out: HashMap::new(),
            workspace: Address::NONE,
            products: None,
            capturing: None,
            graphs: HashMap::new(),
            made_graphs: 0,
            staged: StagedMemory::default(),
            events: Vec::new(),
            fetches: VecDeque::new(),
            made_fetches: 0,
            choice: Choice::default(),
            peers: None,
            unwanted: Vec::new(),
            patience: PATIENCE,
            given_up: Cell::new(false),
            name,
            architecture,
            version,
            processors: processors as usize,
            capability,
        };
        card.current()?;
        // SAFETY: of the context that is current; given back when this is dropped.
        card.stream = unsafe { card.calls.create_stream() }.map_err(|e| failed("no stream", e))?;
        for (source, image) in code {
            let module = image.and_then(|image| {
                card.load(&image).or_else(|refused| {
                    let anew = images.anew(source, &card.architecture, version).unwrap_or(Err(refused))?;
                    card.load(&anew)
                })
            });
            match module {
                Ok(module) => drop(card.modules.insert(source, module)),
                Err(why) if source.is_spare() => drop(card.left_out.insert(source, why.to_string())),
                Err(why) => return Err(why),
            }
        }
        card.staged = StagedMemory::new(&card.calls)?;
        for _ in 0..FETCHES {
            // SAFETY: as the stream.
            let event = unsafe { card.calls.create_event() }.map_err(|e| failed("no event", e))?;
            card.events.push(event);
        }
        card.workspace = card.reserve("workspace", WORKSPACE)?;
        card.products = Some(apart::from_captures(|| card.calls.multiplier(card.workspace, WORKSPACE))?);
        Ok(card)
    }

    /// The driver.
    pub fn calls(&self) -> &C {
        &self.calls
    }

    /// What it is: on cards of one kind, the same kernels make the same bits of the same numbers.
    pub fn kind(&self) -> String {
        format!("{}, {}, {} multiprocessors", self.name, self.architecture, self.processors)
    }

    /// Whether a kernel file was loaded.
    pub(super) fn has(&self, source: Source) -> bool {
        self.modules.contains_key(&source)
    }

    /// Why a kernel file that it can do without was not loaded, if it was to be.
    pub(super) fn left_out(&self, source: Source) -> Option<&str> {
        self.left_out.get(&source).map(String::as_str)
    }

    /// What measurements of it hold for: cards of the same make with the same driver.
    pub(super) fn make(&self) -> String {
        format!("{}, CUDA {}", self.kind(), dotted(self.version))
    }

    /// Sets bytes behind all work so far.
    pub(super) fn fill(&self, at: Address, value: u8, bytes: usize) -> Result<(), KernelError> {
        self.current()?;
        // SAFETY: memory that was reserved.
        unsafe { self.calls.fill(at.0, value, bytes, self.stream) }.map_err(|e| failed("memory cannot be set or cleared", e))
    }

    /// How many cards the driver shows.
    pub fn visible(&self) -> Result<usize, KernelError> {
        let count = self.calls.device_count().map_err(|e| failed("the driver counts no cards", e))?;
        Ok(usize::try_from(count).unwrap_or(0))
    }

    /// From now on it is one of several.
    pub(super) fn join(&mut self, peers: Communicator) {
        self.peers = Some(peers);
    }

    fn peers(&self) -> Result<&Communicator, KernelError> {
        self.current()?;
        self.peers.as_ref().ok_or_else(|| KernelError::Unsupported("this card computes alone".into()))
    }

    fn free_unwanted(&mut self) {
        // The driver frees when all work before is done. A card that is lost has nothing to free.
        if self.current().is_ok() {
            for at in std::mem::take(&mut self.unwanted) {
                // SAFETY: it was reserved by `alloc` and is freed once.
                let _ = unsafe { self.calls.free(at.0) };
            }
        }
    }

    fn load(&self, image: &[u8]) -> Result<sys::CUmodule, KernelError> {
        // SAFETY: a whole image, alive during the call.
        unsafe { self.calls.load_module(image) }.map_err(|e| failed("the card refuses a kernel file", e))
    }

    pub(super) fn current(&self) -> Result<(), KernelError> {
        if self.given_up.get() {
            return Err(self.gone());
        }
        // SAFETY: the context is held until this is dropped.
        unsafe { self.calls.set_current(self.context) }.map_err(|e| failed("no context", e))
    }

    fn reserve(&self, what: &'static str, bytes: usize) -> Result<Address, KernelError> {
        // SAFETY: plain memory.
        unsafe { self.calls.alloc(bytes.max(1)) }.map(Address).map_err(|e| not_reserved(what, bytes, e))
    }

    /// A kernel that may ask for so much shared memory. What it was once allowed stays: captured launches rely on it.
    fn function(&mut self, kernel: Kernel, shared: u32) -> Result<sys::CUfunction, KernelError> {
        // Blocks of any size are one function's.
        let key = (kernel.source, kernel.name);
        let (function, allowed) = match self.functions.get(&key) {
            Some((function, allowed)) if shared <= *allowed => return Ok(*function),
            Some(found) => *found,
            None => {
                let name =
                    CString::new(kernel.name).map_err(|_| KernelError::Device("a kernel's name holds a zero byte".into()))?;
                let absent = || KernelError::Device(format!("{} was opened without {}", self.name, kernel.source.name()));
                let module = self.modules.get(&kernel.source).copied().ok_or_else(absent)?;
                // SAFETY: a module that stays loaded.
                (unsafe { self.calls.function(module, name) }.map_err(|e| failed(kernel.name, e))?, SHARED_UNASKED)
            }
        };
        if shared > allowed {
            // SAFETY: a function of a loaded module.
            unsafe { self.calls.allow_shared(function, shared) }.map_err(|e| failed(kernel.name, e))?;
        }
        self.functions.insert(key, (function, shared.max(allowed)));
        Ok(function)
    }

    /// Copies behind all work so far.
    fn copy_back(&self, to: &mut [u8], from: Address) -> Result<(), KernelError> {
        // SAFETY: the backend reads what it reserved, and waits for it before anybody looks.
        unsafe { self.calls.copy_from_device(to, from.0, self.stream) }.map_err(|e| failed("copy from the card", e))
    }

    /// Lets everything go that `over` made; the context is current.
    fn close(&mut self) {
        // Nothing can be done about failures here. Copies that are still under way read what is staged, and products the workspace.
        // SAFETY: everything was made by `over` or since, and is given back once.
        unsafe {
            // Before the stream is waited for: it may hold an exchange that the other cards never join.
            if let Some(peers) = self.peers.take() {
                peers.close();
            }
            if !self.stream.is_null() {
                let _ = self.synchronize();
                if self.given_up.get() {
                    return;
                }
            }
            self.free_unwanted();
            self.capturing = None;
            if let Some(mut products) = self.products.take() {
                apart::from_captures(|| products.close());
            }
            for (_, graph) in self.graphs.drain() {
                let _ = self.calls.destroy_executable(graph);
            }
            self.staged.close(&self.calls);
            if self.workspace != Address::NONE {
                let _ = self.calls.free(self.workspace.0);
            }
            for event in self.events.drain(..) {
                let _ = self.calls.destroy_event(event);
            }
            for (_, module) in self.modules.drain() {
                let _ = self.calls.unload_module(module);
            }
            if !self.stream.is_null() {
                let _ = self.calls.destroy_stream(self.stream);
            }
        }
    }
}

impl<C: Calls> Device for Card<C> {
    fn describe(&self) -> String {
        let total = self.memory().map_or(String::new(), |(_, total)| format!(", {:.0} GiB", total as f64 / f64::from(1 << 30)));
        format!("{}{total}, CUDA {}{}", self.kind(), dotted(self.version), self.choice.words())
    }

    fn multiplies_fp8(&self) -> bool {
        self.capability >= (8, 9)
    }

    fn prefill(&self, head_dim: usize) -> Prefill {
        self.choice.prefill(head_dim)
    }

    fn memory(&self) -> Result<(usize, usize), KernelError> {
        self.current()?;
        self.calls.memory_info().map_err(|e| failed("the card's memory cannot be read", e))
    }

    fn alloc(&mut self, what: &'static str, bytes: usize) -> Result<Address, KernelError> {
        self.current()?;
        let at = self.reserve(what, bytes)?;
        self.fill(at, 0, bytes.max(1)).inspect_err(|_| self.free(at))?;
        Ok(at)
    }

    fn free(&mut self, at: Address) {
        self.unwanted.push(at);
        if self.peers.is_none() {
            self.free_unwanted();
        }
    }

    fn write(&mut self, to: Address, bytes: &[u8]) -> Result<(), KernelError> {
        self.current()?;
        for (index, piece) in bytes.chunks(MOST_STAGED).enumerate() {
            // From memory that is not locked a driver may copy after the call has come back, so nothing is copied from there.
            let staged = match self.staged.put(piece) {
                Some(staged) => staged,
                None => {
                    self.synchronize()?;
                    self.staged.put(piece).ok_or_else(|| KernelError::Device("no place for what is copied to the card".into()))?
                }
            };
            let to = to.plus(index * MOST_STAGED);
            // SAFETY: the backend writes into what it reserved. What is staged stays as it is until the card is done.
            unsafe { self.calls.copy_to_device(to.0, staged, self.stream) }.map_err(|e| failed("copy to the card", e))?;
        }
        Ok(())
    }

    fn clear(&mut self, at: Address, bytes: usize) -> Result<(), KernelError> {
        self.fill(at, 0, bytes)
    }

    fn read(&self, from: Address, bytes: &mut [u8]) -> Result<(), KernelError> {
        self.current()?;
        for (index, piece) in bytes.chunks_mut(MOST_RETURNED).enumerate() {
            // As in `write`, and nothing comes late to memory that its owner has given back.
            let through = self.staged.bring_back(piece.len(), |locked| {
                self.copy_back(locked, from.plus(index * MOST_RETURNED))?;
                self.synchronize()?;
                piece.copy_from_slice(locked);
                Ok(())
            });
            through.unwrap_or_else(|| Err(KernelError::Device("no place for what comes from the card".into())))?;
        }
        Ok(())
    }

    fn fetch(&mut self, from: Address, bytes: usize) -> Result<Fetch, KernelError> {
        if self.fetches.len() >= FETCHES {
            return Err(KernelError::Limit(format!("{FETCHES} fetches are under way")));
        }
        self.current()?;
        let mut fetching = Fetching { fetch: Fetch(self.made_fetches), bytes, brought: None, staged: 0 };
        // SAFETY: the place was last used by a fetch that was handed over; from here on the card has it.
        match unsafe { self.staged.fetched(fetching.slot(), bytes) } {
            Some([]) => {}
            Some(place) => self.copy_back(place, from)?,
            None => {
                let mut brought = vec![0; bytes];
                self.read(from, &mut brought)?;
                fetching.brought = Some(brought);
            }
        }
        // SAFETY: an event and a stream of our own.
        unsafe { self.calls.record_event(self.events[fetching.slot()], self.stream) }
            .map_err(|e| failed("an event is not recorded", e))?;
        fetching.staged = self.staged.until_now();
        let fetch = fetching.fetch;
        self.fetches.push_back(fetching);
        self.made_fetches += 1;
        Ok(fetch)
    }

    fn fetched(&mut self, fetch: Fetch, to: &mut [u8]) -> Result<(), KernelError> {
        let Some(fetching) = self.fetches.pop_front_if(|oldest| oldest.fetch == fetch && oldest.bytes == to.len()) else {
            return Err(KernelError::Device("what was not fetched was asked for".into()));
        };
        self.current()?;
        // SAFETY: an event of our own.
        self.wait_until(|| unsafe { self.calls.is_past(self.events[fetching.slot()]) })?;
        self.staged.done_until(fetching.staged);
        match fetching.brought {
            Some(brought) => to.copy_from_slice(&brought),
            // SAFETY: the card is done with the place.
            None => to.copy_from_slice(unsafe { self.staged.fetched(fetching.slot(), to.len()) }.unwrap_or_default()),
        }
        // A step is handed over before another is asked for on any card, or is not the last one here.
        if self.fetches.is_empty() {
            self.free_unwanted();
        }
        Ok(())
    }

    fn alloc_host(&mut self, what: &'static str, bytes: usize) -> Result<HostAddress, KernelError> {
        self.current()?;
        // SAFETY: plain memory.
        let at = unsafe { self.calls.alloc_host(bytes.max(1)) };
        at.map(|at| HostAddress(at as u64)).map_err(|e| not_reserved(what, bytes, e))
    }

    fn free_host(&mut self, at: HostAddress) {
        if self.current().is_ok() {
            // Copies that are under way read or write it.
            if self.synchronize().is_err() && self.given_up.get() {
                return;
            }
            // SAFETY: it was reserved by `alloc_host` and is freed once.
            let _ = unsafe { self.calls.free_host(at.0 as *mut _) };
        }
    }

    fn save(&mut self, from: Pieces, to: HostAddress) -> Result<(), KernelError> {
        self.current()?;
        // SAFETY: both ends are the backend's, who gives neither back before the stream is done.
        unsafe { self.calls.copy_pieces_from_device(to.0 as *mut _, from, self.stream) }
            .map_err(|e| failed("copy to the machine's memory", e))
    }

    fn restore(&mut self, from: HostAddress, to: Pieces) -> Result<(), KernelError> {
        self.current()?;
        // SAFETY: as in `save`.
        unsafe { self.calls.copy_pieces_to_device(to, from.0 as *const _, self.stream) }
            .map_err(|e| failed("copy from the machine's memory", e))
    }

    fn launch(&mut self, kernel: Kernel, launch: Launch, params: &[u8]) -> Result<(), KernelError> {
        self.current()?;
        let function = self.function(kernel, launch.shared)?;
        // SAFETY: the kernel takes one structure, whose size the tests compare.
        unsafe { self.calls.launch(function, launch.grid, kernel.threads, launch.shared, self.stream, params) }
            .map_err(|e| failed(kernel.name, e))
    }

    fn product(&mut self, product: Product) -> Result<(), KernelError> {
        self.current()?;
        let none = || KernelError::Device("there is no library of matrix products".into());
        let products = self.products.as_mut().ok_or_else(none)?;
        if !products.has_plan(product) {
            if self.capturing.is_some() {
                // The step is done plainly, which makes one, and captured the next time.
                return Err(KernelError::Device("a matrix product has no plan, and none is made during a capture".into()));
            }
            apart::from_captures(|| products.plan(product))?;
        }
        products.run(product, self.stream)
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

    fn broadcast(&mut self, at: Address, count: usize) -> Result<(), KernelError> {
        self.peers()?.broadcast(at, count, self.stream)
    }

    fn wait(&mut self) -> Result<(), KernelError> {
        self.current()?;
        self.synchronize()
    }

    fn capture(&mut self) -> Result<(), KernelError> {
        self.current()?;
        let capturing = Capturing::begin();
        // SAFETY: a stream of our own.
        unsafe { self.calls.begin_capture(self.stream) }.map_err(|e| failed("a capture does not begin", e))?;
        self.capturing = Some(capturing);
        Ok(())
    }

    fn captured(&mut self) -> Result<Graph, KernelError> {
        let capturing = self.capturing.take();
        self.current()?;
        // SAFETY: a stream of our own.
        let graph = unsafe { self.calls.end_capture(self.stream) }.map_err(|e| failed("a capture was broken off", e))?;
        drop(capturing);
        // SAFETY: the graph was just made; what is made of it does not need it any more.
        let made = unsafe {
            let made = self.calls.instantiate(graph);
            let _ = self.calls.destroy_graph(graph);
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
        unsafe { self.calls.launch_graph(*made, self.stream) }.map_err(|e| failed("a captured step is not launched", e))
    }

    fn forget(&mut self, graph: Graph) {
        if self.current().is_ok()
            && let Some(made) = self.graphs.remove(&graph)
        {
            // SAFETY: made once, destroyed once; the driver lets one that runs come to its end.
            let _ = unsafe { self.calls.destroy_executable(made) };
        }
    }
}

impl<C: Calls> Drop for Card<C> {
    fn drop(&mut self) {
        if self.current().is_ok() {
            self.close();
        }
        // Of a card that does not come back everything stays, until the process ends.
        if !self.given_up.get() {
            // SAFETY: retained once.
            let _ = unsafe { self.calls.release_context(self.device) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::libraries::Library;
    use super::*;

    #[test]
    fn without_a_driver_opening_is_an_error_that_says_so() {
        if Library::Driver.require().is_ok() {
            return; // A machine with a driver.
        }
        let text = Card::open(None).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(text.contains("no NVIDIA driver found") && text.contains("libcuda.so.1"), "{text}");
        assert_eq!(check_card(0).err().map(|e| e.to_string()), Some(text));
        assert!(!has_card(0));
    }
}
