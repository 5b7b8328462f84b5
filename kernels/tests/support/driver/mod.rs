//! A driver that is not there. It writes down which of its calls were made and does their work on the host as late as a driver may: not
//! before somebody waits for it. It stops a test that breaks a driver's rules: memory outside what is held, or given back; handles that
//! were given back, or never are; calls on a thread that made no context current; anything but launches during a capture; copies from
//! memory that nobody locked, and to it.

mod controls;
mod library;
mod work;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::ffi::{CString, c_void};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::ThreadId;

use cudarc::driver::sys::{
    CUcontext, CUdevice, CUdevice_attribute, CUevent, CUfunction, CUgraph, CUgraphExec, CUmodule, CUresult, CUstream,
};
use tidemill_kernels::KernelError;
use tidemill_kernels::cuda::calls::{CallError, Called, Calls, Multiplier};
use tidemill_kernels::cuda::device::{Address, Device, HostAddress, Kernel, Launch, Pieces, Source};

#[allow(unused_imports, reason = "each test binary uses a part")]
pub use self::library::NamedImages;
use self::library::{FakeProducts, Shape};
use self::work::Work;
use super::emulation::Emulated;

/// Shared memory that a block gets without a word.
const UNASKED: u32 = 48 << 10;

/// The most that it gets on a card (CUDA's programming guide, "Compute capabilities").
fn most_shared(capability: (i32, i32)) -> u32 {
    match capability {
        (8, 0 | 7) => 163 << 10,
        (8 | 12, _) => 99 << 10,
        _ => 227 << 10,
    }
}

/// A driver's card.
#[derive(Clone, Copy)]
pub struct Machine {
    pub version: i32,
    pub cards: i32,
    pub capability: (i32, i32),
}

impl Default for Machine {
    fn default() -> Self {
        Machine { version: 13_000, cards: 1, capability: (9, 0) }
    }
}

struct State {
    machine: Machine,
    memory: Emulated,
    /// Kernels and products are run; else only their addresses are looked at.
    runs: bool,
    held: BTreeMap<u64, usize>,
    given_back: BTreeMap<u64, usize>,
    locked: HashMap<u64, Box<[u8]>>,
    context: Option<u64>,
    /// By thread: what one makes current is nothing to the others.
    current: HashMap<ThreadId, u64>,
    stream: Option<u64>,
    queue: VecDeque<Work>,
    capture: Option<Vec<Work>>,
    events: HashMap<u64, Option<usize>>,
    /// Milliseconds that the card has worked, and when events were passed.
    clock: f64,
    times: HashMap<u64, f64>,
    /// Milliseconds that a kernel takes, where it is not one; those that do nothing.
    costs: HashMap<&'static str, f64>,
    idle: Vec<&'static str>,
    /// How often somebody looked whether something is done, and whether it never is.
    looks: usize,
    hangs: bool,
    /// Events recorded, and those of them that are behind.
    recorded: usize,
    passed: usize,
    modules: HashMap<u64, Source>,
    functions: HashMap<u64, (u64, Kernel, u32)>,
    graphs: HashMap<u64, Arc<Vec<Work>>>,
    executables: HashMap<u64, Arc<Vec<Work>>>,
    libraries: usize,
    plans: HashSet<Shape>,
    handles: u64,
    log: Vec<&'static str>,
    /// Calls that go well before one that does not, and what that one says.
    fails: Option<(usize, CUresult)>,
    /// The next call of this name does not go well.
    fails_named: Option<(&'static str, CUresult)>,
    /// The call that was the first not to go well.
    failed: Option<&'static str>,
    /// What every call says from now on.
    lost: Option<CUresult>,
}

/// The driver; all clones are the same.
#[derive(Clone)]
pub struct FakeDriver(Arc<Mutex<State>>);

/// Calls that fail on a lost card only.
const SAFE: [&str; 8] = [
    "set_current",
    "free",
    "free_host",
    "destroy_stream",
    "destroy_event",
    "destroy_graph",
    "destroy_executable",
    "unload_module",
];

/// After these nothing goes well any more.
fn is_sticky(code: CUresult) -> bool {
    matches!(
        code,
        CUresult::CUDA_ERROR_LAUNCH_FAILED | CUresult::CUDA_ERROR_ILLEGAL_ADDRESS | CUresult::CUDA_ERROR_ECC_UNCORRECTABLE
    )
}

fn refused(code: CUresult) -> CallError {
    CallError { code: code as u32, name: format!("{code:?}"), words: "as the test wants it".into() }
}

impl FakeDriver {
    /// A driver whose kernels are run on the host.
    pub fn running(machine: Machine) -> Self {
        Self::new(machine, true)
    }

    /// One whose kernels do nothing.
    pub fn recording(machine: Machine) -> Self {
        Self::new(machine, false)
    }

    fn new(machine: Machine, runs: bool) -> Self {
        FakeDriver(Arc::new(Mutex::new(State {
            machine,
            memory: Emulated::default(),
            runs,
            held: BTreeMap::new(),
            given_back: BTreeMap::new(),
            locked: HashMap::new(),
            context: None,
            current: HashMap::new(),
            stream: None,
            queue: VecDeque::new(),
            capture: None,
            events: HashMap::new(),
            clock: 0.0,
            times: HashMap::new(),
            costs: HashMap::new(),
            idle: Vec::new(),
            looks: 0,
            hangs: false,
            recorded: 0,
            passed: 0,
            modules: HashMap::new(),
            functions: HashMap::new(),
            graphs: HashMap::new(),
            executables: HashMap::new(),
            libraries: 0,
            plans: HashSet::new(),
            handles: 0x1000,
            log: Vec::new(),
            fails: None,
            fails_named: None,
            failed: None,
            lost: None,
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// A call on a context that is current, and not during a capture.
    fn call(&self, name: &'static str) -> Called<MutexGuard<'_, State>> {
        let state = self.captured_call(name)?;
        assert!(state.capture.is_none(), "{name} during a capture");
        Ok(state)
    }

    /// A call that may be captured.
    fn captured_call(&self, name: &'static str) -> Called<MutexGuard<'_, State>> {
        let state = self.any_call(name)?;
        let current = state.current.get(&std::thread::current().id()).copied();
        assert!(current.is_some() && current == state.context, "{name} without a context on this thread");
        Ok(state)
    }

    fn any_call(&self, name: &'static str) -> Called<MutexGuard<'_, State>> {
        let mut state = self.state();
        state.log.push(name);
        if let Some(code) = state.lost {
            return Err(refused(code));
        }
        let failing = match (state.fails, state.fails_named) {
            (Some((_, code)), _) if SAFE.contains(&name) && !is_sticky(code) => None,
            (Some((0, code)), _) => {
                state.fails = None;
                Some(code)
            }
            (_, Some((named, code))) if named == name => {
                state.fails_named = None;
                Some(code)
            }
            (Some((left, code)), _) => {
                state.fails = Some((left - 1, code));
                None
            }
            (None, _) => None,
        };
        match failing {
            Some(code) => {
                state.failed.get_or_insert(name);
                state.lost = Some(code).filter(|code| is_sticky(*code));
                Err(refused(code))
            }
            None => Ok(state),
        }
    }
}

impl State {
    fn handle(&mut self) -> u64 {
        self.handles += 1;
        self.handles
    }

    fn is_locked(&self, at: u64, bytes: usize) -> bool {
        self.locked.iter().any(|(start, held)| *start <= at && at as usize + bytes <= *start as usize + held.len())
    }

    fn assert_held(&self, at: u64, bytes: usize) {
        let held = self.held.range(..=at).next_back();
        let inside = held.is_some_and(|(start, size)| at as usize + bytes <= *start as usize + size);
        assert!(inside, "{bytes} bytes at {at:#x} are not held");
    }

    fn assert_pieces(&self, pieces: Pieces, host: HostAddress) {
        (0..pieces.count).for_each(|i| self.assert_held(pieces.at.0 + (i * pieces.stride) as u64, pieces.bytes));
        assert!(self.is_locked(host.0, pieces.bytes * pieces.count), "{pieces:?} at {host:?}");
    }

    /// No number in a kernel's structure is an address that was given back.
    fn assert_sound(&self, work: &Work) {
        match work {
            Work::Launch(kernel, _, params) => {
                for word in params.as_chunks::<8>().0.iter().map(|b| u64::from_le_bytes(*b)) {
                    let gone =
                        self.given_back.range(..=word).next_back().is_some_and(|(start, size)| word < start + *size as u64);
                    // A list of no entries may begin where its room ends.
                    let gone = gone && !self.held.iter().any(|(start, size)| start + *size as u64 == word);
                    assert!(!gone, "{} is told of {word:#x}, which was given back", kernel.name);
                }
            }
            Work::Product(p) => {
                self.assert_held(p.x.0, p.rows * p.stride * p.operands.bytes());
                self.assert_held(p.w.0, p.n * p.stride * p.operands.bytes());
                self.assert_held(p.out.0, p.rows * p.n * 4);
            }
            Work::Graph(list) => list.iter().for_each(|work| self.assert_sound(work)),
            _ => {}
        }
    }

    fn enqueue(&mut self, stream: CUstream, work: Work) {
        assert_eq!(Some(stream as u64), self.stream, "a stream that is not there");
        self.assert_sound(&work);
        self.queue.push_back(work);
    }
}

// A host's memory: what the trait asks of its callers is asserted.
impl Calls for FakeDriver {
    fn init(&self) -> Called {
        self.any_call("init").map(|_| ())
    }

    fn driver_version(&self) -> Called<i32> {
        self.any_call("driver_version").map(|state| state.machine.version)
    }

    fn device_count(&self) -> Called<i32> {
        self.any_call("device_count").map(|state| state.machine.cards)
    }

    fn device(&self, ordinal: i32) -> Called<CUdevice> {
        let state = self.any_call("device")?;
        assert!((0..state.machine.cards).contains(&ordinal));
        Ok(ordinal)
    }

    fn device_name(&self, _device: CUdevice) -> Called<String> {
        self.any_call("device_name").map(|_| "a card that is not there".into())
    }

    unsafe fn device_attribute(&self, _device: CUdevice, which: CUdevice_attribute) -> Called<i32> {
        let machine = self.any_call("device_attribute")?.machine;
        Ok(match which {
            CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR => machine.capability.0,
            CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR => machine.capability.1,
            _ => 132,
        })
    }

    unsafe fn retain_context(&self, _device: CUdevice) -> Called<CUcontext> {
        let mut state = self.any_call("retain_context")?;
        assert_eq!(state.context, None, "one context is enough");
        let context = state.handle();
        state.context = Some(context);
        Ok(context as CUcontext)
    }

    unsafe fn release_context(&self, _device: CUdevice) -> Called {
        // Whatever happened to the card.
        let mut state = self.state();
        state.log.push("release_context");
        state.context.take().expect("a context was retained");
        state.current.clear();
        Ok(())
    }

    unsafe fn set_current(&self, context: CUcontext) -> Called {
        let mut state = self.any_call("set_current")?;
        assert_eq!(state.context, Some(context as u64));
        state.current.insert(std::thread::current().id(), context as u64);
        Ok(())
    }

    fn memory_info(&self) -> Called<(usize, usize)> {
        self.call("memory_info").map(|_| (64 << 30, 80 << 30))
    }

    unsafe fn alloc(&self, bytes: usize) -> Called<u64> {
        let mut state = self.call("alloc")?;
        assert!(bytes > 0, "a driver refuses 0 bytes");
        let at = state.memory.alloc("memory", bytes).unwrap().0;
        // What is used again is not gone any more.
        let end = at + bytes as u64;
        state.given_back.retain(|start, size| end <= *start || start + *size as u64 <= at);
        state.held.insert(at, bytes);
        Ok(at)
    }

    unsafe fn free(&self, at: u64) -> Called {
        let mut state = self.call("free")?;
        // A driver frees when all work before is done.
        state.work(None);
        let bytes = state.held.remove(&at).expect("what is freed was reserved");
        state.memory.free(Address(at));
        state.given_back.insert(at, bytes);
        Ok(())
    }

    unsafe fn alloc_host(&self, bytes: usize) -> Called<*mut c_void> {
        let mut state = self.call("alloc_host")?;
        let mut held = vec![0xa5u8; bytes].into_boxed_slice();
        let at = held.as_mut_ptr();
        state.locked.insert(at as u64, held);
        Ok(at.cast())
    }

    unsafe fn free_host(&self, at: *mut c_void) -> Called {
        let mut state = self.call("free_host")?;
        assert!(state.queue.is_empty(), "work under way may read or write what is freed");
        state.locked.remove(&(at as u64)).expect("what is freed was reserved");
        Ok(())
    }

    unsafe fn fill(&self, at: u64, value: u8, bytes: usize, stream: CUstream) -> Called {
        let mut state = self.call("fill")?;
        state.assert_held(at, bytes);
        state.enqueue(stream, Work::Fill(at, value, bytes));
        Ok(())
    }

    unsafe fn copy_to_device(&self, to: u64, from: &[u8], stream: CUstream) -> Called {
        let mut state = self.call("copy_to_device")?;
        state.assert_held(to, from.len());
        let at = from.as_ptr() as u64;
        // Other memory "might be" copied before the call comes back, as the manual has it, and might be read later.
        assert!(state.is_locked(at, from.len()), "{} bytes are copied from memory that is not locked", from.len());
        state.enqueue(stream, Work::Write(to, at, from.len()));
        Ok(())
    }

    unsafe fn copy_from_device(&self, to: &mut [u8], from: u64, stream: CUstream) -> Called {
        let mut state = self.call("copy_from_device")?;
        state.assert_held(from, to.len());
        let at = to.as_mut_ptr() as u64;
        // As above; and what comes late may come to memory that somebody else has by then.
        assert!(state.is_locked(at, to.len()), "{} bytes are copied to memory that is not locked", to.len());
        state.enqueue(stream, Work::Read(at, to.len(), from));
        Ok(())
    }

    unsafe fn copy_pieces_from_device(&self, to: *mut c_void, from: Pieces, stream: CUstream) -> Called {
        let mut state = self.call("copy_pieces_from_device")?;
        let to = HostAddress(to as u64);
        state.assert_pieces(from, to);
        state.enqueue(stream, Work::Save(from, to));
        Ok(())
    }

    unsafe fn copy_pieces_to_device(&self, to: Pieces, from: *const c_void, stream: CUstream) -> Called {
        let mut state = self.call("copy_pieces_to_device")?;
        let from = HostAddress(from as u64);
        state.assert_pieces(to, from);
        state.enqueue(stream, Work::Restore(from, to));
        Ok(())
    }

    unsafe fn create_stream(&self) -> Called<CUstream> {
        let mut state = self.call("create_stream")?;
        let stream = state.handle();
        assert_eq!(state.stream.replace(stream), None, "one stream is enough");
        Ok(stream as CUstream)
    }

    unsafe fn is_done(&self, stream: CUstream) -> Called<bool> {
        let mut state = self.call("is_done")?;
        assert_eq!(Some(stream as u64), state.stream, "a stream that is not there");
        Ok(state.looked_at() && {
            state.work(None);
            true
        })
    }

    unsafe fn destroy_stream(&self, stream: CUstream) -> Called {
        let mut state = self.call("destroy_stream")?;
        assert_eq!(Some(stream as u64), state.stream.take(), "a stream that is not there");
        assert!(state.queue.is_empty());
        Ok(())
    }

    unsafe fn create_event(&self) -> Called<CUevent> {
        let mut state = self.call("create_event")?;
        let event = state.handle();
        state.events.insert(event, None);
        Ok(event as CUevent)
    }

    unsafe fn create_timer(&self) -> Called<CUevent> {
        let mut state = self.call("create_timer")?;
        let event = state.handle();
        state.events.insert(event, None);
        Ok(event as CUevent)
    }

    unsafe fn elapsed(&self, from: CUevent, to: CUevent) -> Called<f32> {
        let state = self.call("elapsed")?;
        let time = |event: CUevent| state.times.get(&(event as u64)).expect("an event that was waited for");
        Ok((time(to) - time(from)) as f32)
    }

    unsafe fn record_event(&self, event: CUevent, stream: CUstream) -> Called {
        let mut state = self.call("record_event")?;
        state.recorded += 1;
        let number = state.recorded;
        let known = state.events.get_mut(&(event as u64)).expect("an event that is there");
        *known = Some(number);
        state.enqueue(stream, Work::Event(event as u64));
        Ok(())
    }

    unsafe fn is_past(&self, event: CUevent) -> Called<bool> {
        let mut state = self.call("is_past")?;
        let number = state.events.get(&(event as u64)).expect("an event that is there").expect("it was recorded");
        Ok(state.looked_at() && {
            // No further: what was asked for behind it is still under way.
            state.work(Some(number));
            true
        })
    }

    unsafe fn destroy_event(&self, event: CUevent) -> Called {
        self.call("destroy_event")?.events.remove(&(event as u64)).expect("an event that is there");
        Ok(())
    }

    unsafe fn load_module(&self, image: &[u8]) -> Called<CUmodule> {
        let mut state = self.call("load_module")?;
        let Some(source) = Source::ALL.into_iter().find(|source| image == source.name().as_bytes()) else {
            return Err(refused(CUresult::CUDA_ERROR_INVALID_IMAGE));
        };
        let module = state.handle();
        state.modules.insert(module, source);
        Ok(module as CUmodule)
    }

    unsafe fn unload_module(&self, module: CUmodule) -> Called {
        let mut state = self.call("unload_module")?;
        assert!(state.queue.is_empty(), "work under way runs its kernels");
        state.modules.remove(&(module as u64)).expect("a module that is there");
        state.functions.retain(|_, (of, ..)| *of != module as u64);
        Ok(())
    }

    unsafe fn function(&self, module: CUmodule, name: CString) -> Called<CUfunction> {
        // Kernels are looked for when they are first launched, which may be in a capture.
        let mut state = self.captured_call("function")?;
        let source = *state.modules.get(&(module as u64)).expect("a module that is there");
        let name = name.into_string().unwrap();
        if name.starts_with("no_such") {
            return Err(refused(CUresult::CUDA_ERROR_NOT_FOUND));
        }
        let function = state.handle();
        // Threads are told at the launch.
        let kernel = Kernel::new(source, name.leak(), 0);
        state.functions.insert(function, (module as u64, kernel, UNASKED));
        Ok(function as CUfunction)
    }

    unsafe fn allow_shared(&self, function: CUfunction, bytes: u32) -> Called {
        let mut state = self.captured_call("allow_shared")?;
        if bytes > most_shared(state.machine.capability) {
            return Err(refused(CUresult::CUDA_ERROR_INVALID_VALUE));
        }
        state.functions.get_mut(&(function as u64)).expect("a function that is there").2 = bytes;
        Ok(())
    }

    unsafe fn launch(
        &self,
        function: CUfunction,
        grid: [u32; 3],
        threads: u32,
        shared: u32,
        stream: CUstream,
        params: &[u8],
    ) -> Called {
        let mut state = self.captured_call("launch")?;
        let &(_, kernel, most) = state.functions.get(&(function as u64)).expect("a function that is there");
        let [x, y, z] = grid;
        assert!((1..=i32::MAX as u32).contains(&x) && (1..=65_535).contains(&y) && (1..=65_535).contains(&z), "{grid:?}");
        assert!((1..=1024).contains(&threads) && shared <= most, "{} with {threads} threads and {shared} bytes", kernel.name);
        let work = Work::Launch(Kernel { threads, ..kernel }, Launch { grid, shared }, params.to_vec());
        state.assert_sound(&work);
        match &mut state.capture {
            Some(list) => list.push(work),
            None => state.enqueue(stream, work),
        }
        Ok(())
    }

    unsafe fn begin_capture(&self, stream: CUstream) -> Called {
        let mut state = self.call("begin_capture")?;
        assert_eq!(Some(stream as u64), state.stream, "a stream that is not there");
        state.capture = Some(Vec::new());
        Ok(())
    }

    unsafe fn end_capture(&self, _stream: CUstream) -> Called<CUgraph> {
        let outcome = self.captured_call("end_capture").map(|_| ());
        let mut state = self.state();
        let list = state.capture.take().expect("a capture was begun");
        outcome?;
        let graph = state.handle();
        state.graphs.insert(graph, Arc::new(list));
        Ok(graph as CUgraph)
    }

    unsafe fn instantiate(&self, graph: CUgraph) -> Called<CUgraphExec> {
        let mut state = self.call("instantiate")?;
        let list = Arc::clone(state.graphs.get(&(graph as u64)).expect("a graph that is there"));
        let executable = state.handle();
        state.executables.insert(executable, list);
        Ok(executable as CUgraphExec)
    }

    unsafe fn destroy_graph(&self, graph: CUgraph) -> Called {
        self.call("destroy_graph")?.graphs.remove(&(graph as u64)).expect("a graph that is there");
        Ok(())
    }

    unsafe fn launch_graph(&self, graph: CUgraphExec, stream: CUstream) -> Called {
        let mut state = self.call("launch_graph")?;
        let list = Arc::clone(state.executables.get(&(graph as u64)).expect("an executable that is there"));
        state.enqueue(stream, Work::Graph(list));
        Ok(())
    }

    unsafe fn destroy_executable(&self, graph: CUgraphExec) -> Called {
        // One that runs comes to its end.
        self.call("destroy_executable")?.executables.remove(&(graph as u64)).expect("an executable that is there");
        Ok(())
    }

    fn multiplier(&self, workspace: Address, bytes: usize) -> Result<Box<dyn Multiplier>, KernelError> {
        let opened = self.call("multiplier");
        let mut state = opened.map_err(|e| KernelError::Device(format!("cuBLASLt does not start: {}", e.name)))?;
        state.assert_held(workspace.0, bytes);
        state.libraries += 1;
        drop(state);
        Ok(Box::new(FakeProducts { driver: self.clone(), workspace, bytes }))
    }
}
