//! A device that runs the CUDA kernels on the host; see `kernels/emulation/host.h`. Each allocation ends where a page without access
//! begins, so that a kernel that reads or writes beyond one stops the test.

use std::collections::hash_map::DefaultHasher;
use std::collections::{HashMap, VecDeque};
use std::ffi::{CStr, CString, c_char, c_void};
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, OnceLock};

use half::bf16;
use tidemill_kernels::collective::Member;
use tidemill_kernels::cuda::device::{
    Address, Device, FETCHES, Fetch, Graph, HEADER, HostAddress, Kernel, Launch, Operands, Pieces, Prefill, Product, Source,
};
use tidemill_kernels::{KernelError, Place, e4m3};

const HOST: &str =
    concat!(include_str!("../../emulation/host.h"), "\n#line 1 \"hopper.h\"\n", include_str!("../../emulation/hopper.h"));
const RACES: &str = include_str!("../../emulation/races.cpp");
/// A card reads and writes at multiples of as many bytes as it takes at once, or not at all; here every access is asked, and the first that
/// is not ends the test (`SIGILL`).
const ALIGNED: [&str; 2] = ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"];
/// What every card lets a block have that such a kernel runs on (CUDA's programming guide, "Compute capabilities").
fn most_shared(source: Source) -> u32 {
    match source {
        Source::AttentionHopper => 227 << 10,
        _ => 99 << 10,
    }
}

type Run = unsafe extern "C" fn(*const u32, u32, u64, u32, *const u64, u64, *const c_void);

/// The library of a kernel file, built once for its text; `checked`: it watches for races.
fn library(source: Source, checked: bool) -> usize {
    static LIBRARIES: [[OnceLock<usize>; Source::ALL.len()]; 2] = [const { [const { OnceLock::new() }; Source::ALL.len()] }; 2];
    *LIBRARIES[usize::from(checked)][source as usize].get_or_init(|| {
        let text = format!("{HOST}\n#line 1 \"device.cuh\"\n{HEADER}\n#line 1 \"{}\"\n{}", source.name(), source.text());
        let hash = &mut DefaultHasher::new();
        (&text, checked.then_some(RACES), ALIGNED).hash(hash);
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let built = folder.join(format!("{}-{:016x}.so", source.name(), hash.finish()));
        if !built.exists() {
            std::fs::create_dir_all(folder).unwrap();
            build(&text, &built, checked);
        }
        let path = CString::new(built.to_str().unwrap()).unwrap();
        // SAFETY: a library without initialisers of its own.
        let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        // SAFETY: called right after the failure, on the same thread.
        assert!(!handle.is_null(), "{}", unsafe { CStr::from_ptr(libc::dlerror()) }.to_string_lossy());
        handle as usize
    })
}

fn build(text: &str, built: &Path, checked: bool) {
    let unique = format!("{}.{}", built.display(), std::process::id());
    let (code, races) = (PathBuf::from(format!("{unique}.cpp")), PathBuf::from(format!("{unique}.races.cpp")));
    std::fs::write(&code, text).unwrap();
    let compile = |flags: &[&str], from: &Path, to: &str| {
        let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
        let all = ["-std=c++17", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-function"];
        let outcome = Command::new(&compiler).args(all).args(flags).arg("-o").arg(to).arg(from).output();
        let output = outcome.expect("the emulated kernels need a C++ compiler: c++, or what CXX names");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    if checked {
        // The compiler calls a function for each access; those of `races.cpp`, which is compiled and linked without its flag.
        let object = format!("{unique}.o");
        compile(&["-O1", "-c", "-fsanitize=thread", "-DTIDEMILL_CHECKED"], &code, &object);
        std::fs::write(&races, RACES).unwrap();
        compile(&["-O2", "-shared", "-Wl,-Bsymbolic", &object], &races, &unique);
        [races, PathBuf::from(object)].iter().for_each(|file| std::fs::remove_file(file).unwrap());
    } else {
        compile(&["-O2", "-shared", ALIGNED[0], ALIGNED[1]], &code, &unique);
    }
    std::fs::rename(&unique, built).unwrap();
    std::fs::remove_file(&code).unwrap();
}

fn symbol((source, checked): (Source, bool), name: &str) -> *mut c_void {
    let name = CString::new(name).unwrap();
    // SAFETY: a handle that is never closed.
    let found = unsafe { libc::dlsym(library(source, checked) as *mut c_void, name.as_ptr()) };
    assert!(!found.is_null(), "{source:?} has no {name:?}");
    found
}

struct Mapping {
    base: usize,
    mapped: usize,
    bytes: usize,
}

/// Work that was written down.
enum Work {
    Launch(Kernel, Launch, Vec<u8>),
    Product(Product),
    AllReduce(Address, usize),
    AllGather(Address, Address, usize),
}

/// The device.
#[derive(Default)]
pub struct Emulated {
    /// Which kernel computes attention of many rows.
    pub prefill: Prefill,
    /// Of the threads of a block and of the blocks: 0 forwards, 1 backwards, else drawn from this number.
    order: u32,
    /// Launches in which threads race fail.
    checked: bool,
    /// A barrier that checked kernels pass by: file and line.
    pub left_out: Option<(CString, u32)>,
    mappings: HashMap<u64, Mapping>,
    /// What is being written down.
    capture: Option<Vec<Work>>,
    graphs: HashMap<Graph, Vec<Work>>,
    made_graphs: u64,
    fetches: VecDeque<(Fetch, Vec<u8>)>,
    made_fetches: u64,
    /// Memory of the machine; bytes by address.
    host: HashMap<u64, Box<[u8]>>,
    launched: HashMap<&'static str, usize>,
    /// Captured steps that were done.
    pub replays: usize,
    /// Of the devices that compute a model together.
    member: Option<Member>,
    /// Hears how many things were never given back, when the device ends.
    pub ends: Option<Sender<usize>>,
    /// Of the card that several devices are on.
    memory: Option<Arc<CardMemory>>,
}

/// Memory of a card, for all who use it.
#[derive(Debug)]
pub struct CardMemory {
    /// Bytes there are.
    pub total: usize,
    /// Bytes that are reserved now, and that were at the most.
    used: AtomicUsize,
    most: AtomicUsize,
}

#[allow(dead_code, reason = "each test binary uses a part")]
impl CardMemory {
    pub fn new(total: usize) -> Arc<Self> {
        Arc::new(Self { total, used: AtomicUsize::new(0), most: AtomicUsize::new(0) })
    }

    /// Bytes that are reserved now.
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// The most that ever were.
    pub fn most(&self) -> usize {
        self.most.load(Ordering::Relaxed)
    }

    fn take(&self, bytes: usize) -> bool {
        let more = |used: usize| used.checked_add(bytes).filter(|used| *used <= self.total);
        let taken = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        self.most.fetch_max(self.used(), Ordering::Relaxed);
        taken.is_ok()
    }

    fn give_back(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}

impl Emulated {
    pub fn new(reversed: bool) -> Self {
        Emulated::in_order(reversed.into())
    }

    /// Threads and blocks run forwards (0), backwards (1), or in an order that is drawn from a number.
    pub fn in_order(order: u32) -> Self {
        let mut device = Emulated::default();
        device.order = order;
        device
    }

    /// A launch in which threads race fails; see `kernels/emulation/races.cpp`. Slower by far.
    #[allow(dead_code, reason = "each test binary uses a part")]
    pub fn checked(order: u32) -> Self {
        let mut device = Emulated::in_order(order);
        device.checked = true;
        device
    }

    /// Address and bytes of what is reserved, by address.
    fn ranges(&self) -> Vec<u64> {
        let mut all: Vec<_> = self.mappings.iter().map(|(start, mapping)| [*start, mapping.bytes as u64]).collect();
        all.sort_unstable();
        all.concat()
    }

    /// One of several, each on a thread of its own.
    #[allow(dead_code, reason = "each test binary uses a part")]
    pub fn of_group(member: Member) -> Self {
        let mut device = Emulated::new(false);
        device.member = Some(member);
        device
    }

    /// On a card whose memory others use, too.
    #[allow(dead_code, reason = "each test binary uses a part")]
    pub fn on_card(memory: &Arc<CardMemory>) -> Self {
        let mut device = Emulated::new(false);
        device.memory = Some(Arc::clone(memory));
        device
    }

    fn load(&self, at: Address, count: usize) -> Result<Vec<f32>, KernelError> {
        let mut bytes = vec![0; count * 4];
        self.read(at, &mut bytes)?;
        Ok(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
    }

    fn store(&mut self, at: Address, values: &[f32]) -> Result<(), KernelError> {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.write(at, &bytes)
    }

    /// Tells checked kernels which barrier they are to pass by.
    fn leave_out(&self, library: (Source, bool), barrier: Option<&(CString, u32)>) {
        if self.checked {
            let (file, line) = barrier.map_or((std::ptr::null(), 0), |(file, line)| (file.as_ptr(), *line));
            // SAFETY: the function has this type; the name lives as long as this device, and is forgotten after each launch.
            unsafe {
                let tell: unsafe extern "C" fn(*const c_char, u32) = std::mem::transmute(symbol(library, "tidemill_leave_out"));
                tell(file, line);
            }
        }
    }

    /// What was found in the launch that has just been.
    fn races(&self, library: (Source, bool)) -> Result<(), KernelError> {
        if !self.checked {
            return Ok(());
        }
        // SAFETY: the function has this type and gives text of the library.
        let found = unsafe {
            let found: unsafe extern "C" fn() -> *const c_char = std::mem::transmute(symbol(library, "tidemill_races_found"));
            CStr::from_ptr(found()).to_string_lossy().into_owned()
        };
        if found.is_empty() { Ok(()) } else { Err(KernelError::Device(format!("race: {found}"))) }
    }

    fn outside_captures(&self) {
        assert!(self.capture.is_none(), "only launches and products may be captured");
    }

    /// Bytes that are reserved now.
    pub fn held(&self) -> usize {
        self.mappings.values().map(|m| m.bytes).sum()
    }

    /// How often a kernel was run.
    #[allow(dead_code, reason = "each test binary uses a part")]
    pub fn launches(&self, kernel: &str) -> usize {
        self.launched.get(kernel).copied().unwrap_or(0)
    }

    /// Where a copy between pieces on the device and beside each other in the machine's memory begins and ends, piece by piece.
    fn pieces(&self, pieces: Pieces, host: HostAddress) -> Vec<(*mut u8, *mut u8)> {
        self.outside_captures();
        let Pieces { at, bytes, count, stride } = pieces;
        let end = host.0 as usize + bytes * count;
        let held = self.host.iter().any(|(start, held)| *start <= host.0 && end <= *start as usize + held.len());
        assert!(held, "{bytes} × {count} bytes at {host:?} are not in one allocation");
        let piece = |i: usize| {
            self.within(at.plus(i * stride), bytes);
            (at.plus(i * stride).0 as *mut u8, host.plus(i * bytes).0 as *mut u8)
        };
        (0..count).map(piece).collect()
    }

    fn within(&self, at: Address, bytes: usize) {
        let fits = |(start, m): (&u64, &Mapping)| *start <= at.0 && at.0 as usize + bytes <= *start as usize + m.bytes;
        assert!(self.mappings.iter().any(fits), "{bytes} bytes at {at:?} are not in one allocation");
    }
}

fn alone() -> KernelError {
    KernelError::Unsupported("this device computes alone".into())
}

impl Drop for Emulated {
    fn drop(&mut self) {
        if let Some(ends) = &self.ends {
            ends.send(self.mappings.len() + self.graphs.len() + self.host.len()).ok();
        }
        assert!(self.mappings.is_empty() || std::thread::panicking(), "{} bytes were never given back", self.held());
        assert!(self.graphs.is_empty() || std::thread::panicking(), "{} graphs were never given back", self.graphs.len());
        assert!(self.host.is_empty() || std::thread::panicking(), "memory of the machine was never given back");
    }
}

const PAGE: usize = 4096;

impl Device for Emulated {
    fn describe(&self) -> String {
        "emulated".into()
    }

    fn memory(&self) -> Result<(usize, usize), KernelError> {
        let (used, total) = self.memory.as_ref().map_or((0, 8 << 30), |memory| (memory.used(), memory.total));
        Ok((total - used, total))
    }

    fn alloc(&mut self, what: &'static str, bytes: usize) -> Result<Address, KernelError> {
        self.outside_captures();
        let memory = KernelError::Memory { what, bytes };
        if bytes > 1 << 32 || self.memory.as_ref().is_some_and(|memory| !memory.take(bytes)) {
            return Err(memory);
        }
        let mapped = (bytes + 128).next_multiple_of(PAGE);
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: new pages, the last of which nobody may touch.
        let base = unsafe {
            let base = libc::mmap(std::ptr::null_mut(), mapped + PAGE, access, kind, -1, 0);
            if base == libc::MAP_FAILED {
                return Err(memory);
            }
            libc::mprotect(base.byte_add(mapped), PAGE, libc::PROT_NONE);
            base as usize
        };
        let start = (base + mapped - bytes.next_multiple_of(128)) as u64;
        self.mappings.insert(start, Mapping { base, mapped, bytes });
        Ok(Address(start))
    }

    fn free(&mut self, at: Address) {
        self.outside_captures();
        let mapping = self.mappings.remove(&at.0).expect("what is freed was reserved");
        self.memory.iter().for_each(|memory| memory.give_back(mapping.bytes));
        // SAFETY: the pages of one mapping; nothing runs.
        unsafe { libc::munmap(mapping.base as *mut c_void, mapping.mapped + PAGE) };
    }

    fn write(&mut self, to: Address, bytes: &[u8]) -> Result<(), KernelError> {
        self.outside_captures();
        self.within(to, bytes.len());
        // SAFETY: inside one mapping.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.0 as *mut u8, bytes.len()) };
        Ok(())
    }

    fn clear(&mut self, at: Address, bytes: usize) -> Result<(), KernelError> {
        self.write(at, &vec![0; bytes])
    }

    fn read(&self, from: Address, bytes: &mut [u8]) -> Result<(), KernelError> {
        self.outside_captures();
        self.within(from, bytes.len());
        // SAFETY: inside one mapping.
        unsafe { std::ptr::copy_nonoverlapping(from.0 as *const u8, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    fn fetch(&mut self, from: Address, bytes: usize) -> Result<Fetch, KernelError> {
        self.outside_captures();
        assert!(self.fetches.len() < FETCHES, "too many fetches");
        let mut copied = vec![0; bytes];
        if bytes > 0 {
            self.read(from, &mut copied)?;
        }
        let fetch = Fetch(self.made_fetches);
        self.made_fetches += 1;
        self.fetches.push_back((fetch, copied));
        Ok(fetch)
    }

    fn fetched(&mut self, fetch: Fetch, to: &mut [u8]) -> Result<(), KernelError> {
        self.outside_captures();
        let (oldest, copied) = self.fetches.pop_front().expect("something was fetched");
        assert_eq!(oldest, fetch, "fetches are handed over in their order");
        to.copy_from_slice(&copied);
        Ok(())
    }

    fn alloc_host(&mut self, _what: &'static str, bytes: usize) -> Result<HostAddress, KernelError> {
        self.outside_captures();
        let mut held = vec![0u8; bytes].into_boxed_slice();
        let at = held.as_mut_ptr() as u64;
        self.host.insert(at, held);
        Ok(HostAddress(at))
    }

    fn free_host(&mut self, at: HostAddress) {
        self.outside_captures();
        self.host.remove(&at.0).expect("what is freed was reserved");
    }

    fn save(&mut self, from: Pieces, to: HostAddress) -> Result<(), KernelError> {
        for (card, host) in self.pieces(from, to) {
            // SAFETY: both were found to be held.
            unsafe { std::ptr::copy_nonoverlapping(card, host, from.bytes) };
        }
        Ok(())
    }

    fn restore(&mut self, from: HostAddress, to: Pieces) -> Result<(), KernelError> {
        for (card, host) in self.pieces(to, from) {
            // SAFETY: as in `save`.
            unsafe { std::ptr::copy_nonoverlapping(host, card, to.bytes) };
        }
        Ok(())
    }

    fn launch(&mut self, kernel: Kernel, launch: Launch, params: &[u8]) -> Result<(), KernelError> {
        if let Some(work) = &mut self.capture {
            work.push(Work::Launch(kernel, launch, params.to_vec()));
            return Ok(());
        }
        *self.launched.entry(kernel.name).or_default() += 1;
        let [_, y, z] = launch.grid;
        assert!(y <= 65_535 && z <= 65_535 && launch.shared <= most_shared(kernel.source), "{kernel:?} {launch:?}");
        let library = (kernel.source, self.checked);
        let size = symbol(library, &format!("{}_params", kernel.name)).cast::<u64>();
        // SAFETY: the library's own number.
        assert_eq!(unsafe { *size }, params.len() as u64, "structure of {}", kernel.name);
        let ranges = if self.checked { self.ranges() } else { Vec::new() };
        // The structure's numbers may be read 8 bytes at a time.
        let aligned: Vec<u64> =
            params.chunks(8).map(|c| u64::from_le_bytes(std::array::from_fn(|i| c.get(i).copied().unwrap_or(0)))).collect();
        let (count, shared) = (ranges.len() as u64 / 2, launch.shared.into());
        self.leave_out(library, self.left_out.as_ref());
        // SAFETY: every kernel has this type; its structure has the right size.
        unsafe {
            let run: Run = std::mem::transmute(symbol(library, kernel.name));
            run(launch.grid.as_ptr(), kernel.threads, shared, self.order, ranges.as_ptr(), count, aligned.as_ptr().cast());
        }
        self.leave_out(library, None);
        self.races(library)
    }

    fn product(&mut self, product: Product) -> Result<(), KernelError> {
        if let Some(work) = &mut self.capture {
            work.push(Work::Product(product));
            return Ok(());
        }
        let Product { operands, x, w, out, rows, n, stride, add } = product;
        let load = |at: Address, count: usize| {
            let mut bytes = vec![0; count * operands.bytes()];
            self.read(at, &mut bytes).map(|()| match operands {
                Operands::Bf16 => bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect::<Vec<f32>>(),
                Operands::Fp8 => bytes.iter().map(|b| e4m3::decode(*b)).collect(),
            })
        };
        if operands == Operands::Fp8 {
            // What the library asks for.
            let places = [x.0, w.0, out.0];
            assert!(n % 16 == 0 && stride % 16 == 0 && places.iter().all(|at| at % 16 == 0), "{product:?}");
        }
        let (x, w) = (load(x, rows * stride)?, load(w, n * stride)?);
        let mut bytes = vec![0; rows * n * 4];
        self.read(out, &mut bytes)?;
        for (i, value) in bytes.as_chunks_mut().0.iter_mut().enumerate() {
            let (row, feature) = (i / n, i % n);
            let products =
                x[row * stride..][..stride].iter().zip(&w[feature * stride..][..stride]).map(|(a, b)| f64::from(a * b));
            let before = if add { f64::from(f32::from_le_bytes(*value)) } else { 0.0 };
            *value = ((before + products.sum::<f64>()) as f32).to_le_bytes();
        }
        self.write(out, &bytes)
    }

    fn multiplies_fp8(&self) -> bool {
        true
    }

    fn prefill(&self, _head_dim: usize) -> Prefill {
        self.prefill
    }

    fn place(&self) -> Place {
        self.member.as_ref().map_or(Place::ALONE, Member::place)
    }

    fn all_reduce(&mut self, at: Address, count: usize) -> Result<(), KernelError> {
        if let Some(work) = &mut self.capture {
            work.push(Work::AllReduce(at, count));
            return Ok(());
        }
        let mut values = self.load(at, count)?;
        self.member.as_ref().ok_or_else(alone)?.all_reduce(&mut values)?;
        self.store(at, &values)
    }

    fn all_gather(&mut self, from: Address, to: Address, count: usize) -> Result<(), KernelError> {
        if let Some(work) = &mut self.capture {
            work.push(Work::AllGather(from, to, count));
            return Ok(());
        }
        let values = self.load(from, count)?;
        let all = self.member.as_ref().ok_or_else(alone)?.all_gather(&values)?;
        self.store(to, &all)
    }

    fn broadcast(&mut self, at: Address, count: usize) -> Result<(), KernelError> {
        self.outside_captures();
        let mut bytes = vec![0; count * 4];
        self.read(at, &mut bytes)?;
        let mut values: Vec<u32> = bytes.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
        self.member.as_ref().ok_or_else(alone)?.broadcast(&mut values)?;
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.write(at, &bytes)
    }

    fn wait(&mut self) -> Result<(), KernelError> {
        self.outside_captures();
        Ok(())
    }

    fn capture(&mut self) -> Result<(), KernelError> {
        self.outside_captures();
        self.capture = Some(Vec::new());
        Ok(())
    }

    fn captured(&mut self) -> Result<Graph, KernelError> {
        let graph = Graph(self.made_graphs);
        self.made_graphs += 1;
        self.graphs.insert(graph, self.capture.take().expect("a capture was begun"));
        Ok(graph)
    }

    fn replay(&mut self, graph: Graph) -> Result<(), KernelError> {
        self.outside_captures();
        self.replays += 1;
        let work = self.graphs.remove(&graph).expect("a graph that was not given back");
        let done = work.iter().try_for_each(|piece| match piece {
            Work::Launch(kernel, launch, params) => self.launch(*kernel, *launch, params),
            Work::Product(product) => self.product(*product),
            Work::AllReduce(at, count) => self.all_reduce(*at, *count),
            Work::AllGather(from, to, count) => self.all_gather(*from, *to, *count),
        });
        self.graphs.insert(graph, work);
        done
    }

    fn forget(&mut self, graph: Graph) {
        self.outside_captures();
        self.graphs.remove(&graph).expect("what is given back was made");
    }
}
