//! A device that writes down what it was asked for and computes nothing. Its memory reads as zeros. It stops a test that breaks the rules
//! of a card's driver: reserving, freeing, copying or waiting during a capture; work on memory that was never reserved or was given
//! back, whether launched or replayed; a graph that was given back.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};

use tidemill_kernels::KernelError;
use tidemill_kernels::cuda::device::{Address, Device, Graph, Kernel, Launch, Product};

/// A call.
#[derive(Clone, Debug, PartialEq)]
pub enum Call {
    Alloc(Address, usize),
    Free(Address),
    Write(Address, Vec<u8>),
    Read(Address, usize),
    Launch(&'static str, Launch, Vec<u8>),
    Product(Product),
    Wait,
    Capture,
    Captured(Graph),
    Replay(Graph),
    Forget(Graph),
}

/// What a test looks at while the backend has the device.
pub type Log = Arc<Mutex<Vec<Call>>>;

pub struct Recorder {
    log: Log,
    memory: BTreeMap<u64, usize>,
    next: u64,
    capture: Option<Vec<Call>>,
    graphs: HashMap<Graph, Vec<Call>>,
    made: u64,
    /// A capture that is to be refused.
    pub refuses: bool,
}

/// Addresses have this on top, so that they are told from other numbers in a kernel's parameters.
const TOP: u64 = 0x5a5a << 48;

impl Recorder {
    pub fn new() -> (Self, Log) {
        let log = Log::default();
        let (memory, graphs) = (BTreeMap::new(), HashMap::new());
        (Recorder { log: log.clone(), memory, next: TOP, capture: None, graphs, made: 0, refuses: false }, log)
    }

    fn note(&mut self, call: Call) {
        let within_capture = matches!(call, Call::Launch(..) | Call::Product(_));
        match &mut self.capture {
            Some(work) if within_capture => work.push(call.clone()),
            Some(_) => assert!(matches!(call, Call::Captured(_)), "{call:?} during a capture"),
            None => {}
        }
        self.log.lock().unwrap().push(call);
    }

    fn assert_held(&self, at: Address, bytes: usize, by: &dyn std::fmt::Debug) {
        let held = self.memory.range(..=at.0).next_back();
        let inside = held.is_some_and(|(start, size)| at.0 as usize + bytes <= *start as usize + size);
        assert!(inside, "{by:?}: {bytes} bytes at {at:?} are not reserved");
    }

    /// All that a piece of work names is reserved.
    fn assert_sound(&self, call: &Call) {
        match call {
            Call::Launch(name, _, params) => {
                for word in params.as_chunks::<8>().0.iter().map(|b| u64::from_le_bytes(*b)) {
                    // A list of no entries may begin where its room ends.
                    if word >> 48 == TOP >> 48 && !self.memory.iter().any(|(start, size)| word == start + *size as u64) {
                        self.assert_held(Address(word), 1, name);
                    }
                }
            }
            Call::Product(p) => {
                self.assert_held(p.x, p.rows * p.stride * 2, p);
                self.assert_held(p.w, p.n * p.stride * 2, p);
                self.assert_held(p.out, p.rows * p.n * 4, p);
            }
            _ => {}
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert!(self.memory.is_empty(), "{} pieces of memory were never given back", self.memory.len());
            assert!(self.graphs.is_empty(), "{} graphs were never given back", self.graphs.len());
        }
    }
}

impl Device for Recorder {
    fn describe(&self) -> String {
        "recorder".into()
    }

    fn memory(&self) -> Result<(usize, usize), KernelError> {
        Ok((64 << 30, 80 << 30))
    }

    fn alloc(&mut self, _what: &'static str, bytes: usize) -> Result<Address, KernelError> {
        let at = Address(self.next);
        // Never the same place again, so that what was given back shows.
        self.next += (bytes as u64 + 1).next_multiple_of(256);
        self.memory.insert(at.0, bytes);
        self.note(Call::Alloc(at, bytes));
        Ok(at)
    }

    fn free(&mut self, at: Address) {
        self.memory.remove(&at.0).expect("what is freed was reserved");
        self.note(Call::Free(at));
    }

    fn write(&mut self, to: Address, bytes: &[u8]) -> Result<(), KernelError> {
        self.assert_held(to, bytes.len(), &"write");
        self.note(Call::Write(to, bytes.to_vec()));
        Ok(())
    }

    fn read(&self, from: Address, bytes: &mut [u8]) -> Result<(), KernelError> {
        self.assert_held(from, bytes.len(), &"read");
        assert!(self.capture.is_none(), "a read during a capture");
        bytes.fill(0);
        self.log.lock().unwrap().push(Call::Read(from, bytes.len()));
        Ok(())
    }

    fn launch(&mut self, kernel: Kernel, launch: Launch, params: &[u8]) -> Result<(), KernelError> {
        let call = Call::Launch(kernel.name, launch, params.to_vec());
        self.assert_sound(&call);
        self.note(call);
        Ok(())
    }

    fn product(&mut self, product: Product) -> Result<(), KernelError> {
        self.assert_sound(&Call::Product(product));
        self.note(Call::Product(product));
        Ok(())
    }

    fn wait(&mut self) -> Result<(), KernelError> {
        self.note(Call::Wait);
        Ok(())
    }

    fn capture(&mut self) -> Result<(), KernelError> {
        self.note(Call::Capture);
        self.capture = Some(Vec::new());
        Ok(())
    }

    fn captured(&mut self) -> Result<Graph, KernelError> {
        let graph = Graph(self.made);
        self.made += 1;
        self.note(Call::Captured(graph));
        let work = self.capture.take().expect("a capture was begun");
        if self.refuses {
            return Err(KernelError::Device("no capture, as the test wants it".into()));
        }
        self.graphs.insert(graph, work);
        Ok(graph)
    }

    fn replay(&mut self, graph: Graph) -> Result<(), KernelError> {
        let work = self.graphs.get(&graph).expect("a graph that was not given back");
        work.iter().for_each(|call| self.assert_sound(call));
        self.note(Call::Replay(graph));
        Ok(())
    }

    fn forget(&mut self, graph: Graph) {
        self.graphs.remove(&graph).expect("what is given back was made");
        self.note(Call::Forget(graph));
    }
}
