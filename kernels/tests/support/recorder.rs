//! A device that writes down what it was asked for and computes nothing. Its memory reads as zeros. It stops a test that breaks the rules
//! of a card's driver: reserving, freeing, copying or waiting during a capture; work on memory that was never reserved or was given
//! back, whether launched or replayed; a graph that was given back.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex};

use tidemill_kernels::cuda::device::{Address, Device, FETCHES, Fetch, Graph, HostAddress, Kernel, Launch, Pieces, Product};
use tidemill_kernels::{KernelError, Place};

/// A call.
#[derive(Clone, Debug, PartialEq)]
pub enum Call {
    Alloc(Address, usize),
    Free(Address),
    Write(Address, Vec<u8>),
    Read(Address, usize),
    Fetch(Address, usize),
    Fetched,
    AllocHost(HostAddress, usize),
    FreeHost(HostAddress),
    Save(Pieces, HostAddress),
    Restore(HostAddress, Pieces),
    Launch(&'static str, Launch, Vec<u8>),
    Product(Product),
    AllReduce(Address, usize),
    AllGather(Address, Address, usize),
    Broadcast(Address, usize),
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
    host: BTreeMap<u64, usize>,
    fetches: VecDeque<(Fetch, usize)>,
    fetched: u64,
    next: u64,
    capture: Option<Vec<Call>>,
    graphs: HashMap<Graph, Vec<Call>>,
    made: u64,
    /// A capture that is to be refused.
    pub refuses: bool,
    /// Of the devices that compute a model together.
    pub place: Place,
}

/// Addresses have this on top, so that they are told from other numbers in a kernel's parameters.
const TOP: u64 = 0x5a5a << 48;

impl Recorder {
    pub fn new() -> (Self, Log) {
        let log = Log::default();
        let recorder = Recorder {
            log: log.clone(),
            memory: BTreeMap::new(),
            host: BTreeMap::new(),
            fetches: VecDeque::new(),
            fetched: 0,
            next: TOP,
            capture: None,
            graphs: HashMap::new(),
            made: 0,
            refuses: false,
            place: Place::ALONE,
        };
        (recorder, log)
    }

    fn note(&mut self, call: Call) {
        let within_capture = matches!(call, Call::Launch(..) | Call::Product(_) | Call::AllReduce(..) | Call::AllGather(..));
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

    fn assert_pieces(&self, pieces: Pieces, host: HostAddress) {
        let Pieces { at, bytes, count, stride } = pieces;
        (0..count).for_each(|i| self.assert_held(at.plus(i * stride), bytes, &pieces));
        let held = self.host.range(..=host.0).next_back();
        let inside = held.is_some_and(|(start, size)| host.0 as usize + bytes * count <= *start as usize + size);
        assert!(inside, "{bytes} × {count} bytes at {host:?} are not reserved");
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
                self.assert_held(p.x, p.rows * p.stride * p.operands.bytes(), p);
                self.assert_held(p.w, p.n * p.stride * p.operands.bytes(), p);
                self.assert_held(p.out, p.rows * p.n * 4, p);
            }
            Call::AllReduce(at, count) | Call::Broadcast(at, count) => self.assert_held(*at, count * 4, call),
            Call::AllGather(from, to, count) => {
                self.assert_held(*from, count * 4, call);
                self.assert_held(*to, self.place.ranks * count * 4, call);
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
            assert!(self.host.is_empty(), "memory of the machine was never given back");
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

    fn clear(&mut self, at: Address, bytes: usize) -> Result<(), KernelError> {
        self.write(at, &vec![0; bytes])
    }

    fn read(&self, from: Address, bytes: &mut [u8]) -> Result<(), KernelError> {
        self.assert_held(from, bytes.len(), &"read");
        assert!(self.capture.is_none(), "a read during a capture");
        bytes.fill(0);
        self.log.lock().unwrap().push(Call::Read(from, bytes.len()));
        Ok(())
    }

    fn fetch(&mut self, from: Address, bytes: usize) -> Result<Fetch, KernelError> {
        if bytes > 0 {
            self.assert_held(from, bytes, &"fetch");
        }
        assert!(self.fetches.len() < FETCHES, "too many fetches");
        let fetch = Fetch(self.fetched);
        self.fetched += 1;
        self.fetches.push_back((fetch, bytes));
        self.note(Call::Fetch(from, bytes));
        Ok(fetch)
    }

    fn fetched(&mut self, fetch: Fetch, to: &mut [u8]) -> Result<(), KernelError> {
        assert_eq!(self.fetches.pop_front(), Some((fetch, to.len())), "fetches are handed over in their order");
        to.fill(0);
        self.note(Call::Fetched);
        Ok(())
    }

    fn alloc_host(&mut self, _what: &'static str, bytes: usize) -> Result<HostAddress, KernelError> {
        let at = HostAddress(self.next);
        self.next += (bytes as u64 + 1).next_multiple_of(256);
        self.host.insert(at.0, bytes);
        self.note(Call::AllocHost(at, bytes));
        Ok(at)
    }

    fn free_host(&mut self, at: HostAddress) {
        self.host.remove(&at.0).expect("what is freed was reserved");
        self.note(Call::FreeHost(at));
    }

    fn save(&mut self, from: Pieces, to: HostAddress) -> Result<(), KernelError> {
        self.assert_pieces(from, to);
        self.note(Call::Save(from, to));
        Ok(())
    }

    fn restore(&mut self, from: HostAddress, to: Pieces) -> Result<(), KernelError> {
        self.assert_pieces(to, from);
        self.note(Call::Restore(from, to));
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

    fn place(&self) -> Place {
        self.place
    }

    fn all_reduce(&mut self, at: Address, count: usize) -> Result<(), KernelError> {
        let call = Call::AllReduce(at, count);
        self.assert_sound(&call);
        self.note(call);
        Ok(())
    }

    fn all_gather(&mut self, from: Address, to: Address, count: usize) -> Result<(), KernelError> {
        let call = Call::AllGather(from, to, count);
        self.assert_sound(&call);
        self.note(call);
        Ok(())
    }

    fn broadcast(&mut self, at: Address, count: usize) -> Result<(), KernelError> {
        let call = Call::Broadcast(at, count);
        self.assert_sound(&call);
        self.note(call);
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
