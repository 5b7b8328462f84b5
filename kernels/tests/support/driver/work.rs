//! What a stream is asked for, and how it is done.

use std::sync::Arc;

use tidemill_kernels::cuda::device::{Address, Device, HostAddress, Kernel, Launch, Pieces, Product};

use super::State;

/// Work of a stream.
#[derive(Clone, Debug)]
pub(super) enum Work {
    Fill(u64, u8, usize),
    /// From locked memory.
    Write(u64, u64, usize),
    /// To locked memory.
    Read(u64, usize, u64),
    Save(Pieces, HostAddress),
    Restore(HostAddress, Pieces),
    Launch(Kernel, Launch, Vec<u8>),
    Product(Product),
    Graph(Arc<Vec<Work>>),
    Event(u64),
}

impl State {
    /// Does all that is asked for, or what comes before the `until`th event.
    pub(super) fn work(&mut self, until: Option<usize>) {
        while until.is_none_or(|until| self.passed < until) {
            let Some(work) = self.queue.pop_front() else { return };
            self.run(&work);
        }
    }

    /// Whether what is waited for is done when it is looked at: every second time, and never where the card hangs.
    pub(super) fn looked_at(&mut self) -> bool {
        self.looks += 1;
        !self.hangs && self.looks.is_multiple_of(2)
    }

    pub(super) fn run(&mut self, work: &Work) {
        match work {
            Work::Fill(at, value, bytes) => {
                self.assert_held(*at, *bytes);
                self.memory.write(Address(*at), &vec![*value; *bytes]).unwrap();
            }
            Work::Write(to, from, bytes) => {
                assert!(self.is_locked(*from, *bytes), "a copy is late, and its memory is gone");
                // SAFETY: just found to be held.
                let bytes = unsafe { std::slice::from_raw_parts(*from as *const u8, *bytes) };
                self.memory.write(Address(*to), bytes).unwrap();
            }
            Work::Read(to, bytes, from) => {
                assert!(self.is_locked(*to, *bytes), "a copy is late, and its memory is gone");
                // SAFETY: just found to be held.
                self.memory.read(Address(*from), unsafe { std::slice::from_raw_parts_mut(*to as *mut u8, *bytes) }).unwrap();
            }
            Work::Save(from, to) => {
                self.assert_pieces(*from, *to);
                for i in 0..from.count {
                    // SAFETY: just found to be held.
                    let place = unsafe { std::slice::from_raw_parts_mut((to.0 as *mut u8).add(i * from.bytes), from.bytes) };
                    self.memory.read(from.at.plus(i * from.stride), place).unwrap();
                }
            }
            Work::Restore(from, to) => {
                self.assert_pieces(*to, *from);
                for i in 0..to.count {
                    // SAFETY: just found to be held.
                    let place = unsafe { std::slice::from_raw_parts((from.0 as *const u8).add(i * to.bytes), to.bytes) };
                    self.memory.write(to.at.plus(i * to.stride), place).unwrap();
                }
            }
            Work::Launch(kernel, ..) if self.idle.contains(&kernel.name) => self.tick(kernel),
            Work::Launch(kernel, launch, params) if self.runs => {
                self.tick(kernel);
                self.memory.launch(*kernel, *launch, params).unwrap();
            }
            Work::Product(product) if self.runs => self.memory.product(*product).unwrap(),
            Work::Launch(kernel, ..) => self.tick(kernel),
            Work::Product(_) => {}
            Work::Graph(list) => list.iter().for_each(|work| self.run(work)),
            Work::Event(event) => {
                self.passed += 1;
                self.times.insert(*event, self.clock);
            }
        }
    }

    fn tick(&mut self, kernel: &Kernel) {
        self.clock += self.costs.get(kernel.name).copied().unwrap_or(1.0);
    }
}
