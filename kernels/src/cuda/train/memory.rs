//! Memory of a device: numbers that come and go with a pass, and frozen weights that stay.

use std::collections::HashMap;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use half::bf16;

use super::DeviceCompute;
use super::matmul::Operand;
use crate::blocks::dequantize_row;
use crate::cpu::pool::available_threads;
use crate::cuda::device::Address;
use crate::error::KernelError;
use crate::ops::MatrixSource;
use crate::train::Precision;

/// Fewest bytes that are reserved.
const LEAST: usize = 1024;
/// Weights are decoded and copied in pieces of about so many numbers.
const PIECE: usize = 1 << 24;

/// What was given back and may be used again, by its size. Reserving memory makes a card wait.
#[derive(Default)]
pub(super) struct Pool(Mutex<Unused>);

#[derive(Default)]
struct Unused {
    by_size: HashMap<usize, Vec<Address>>,
    /// Of all of it.
    bytes: usize,
}

impl Pool {
    fn unused(&self) -> MutexGuard<'_, Unused> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, bytes: usize) -> Option<Address> {
        let mut unused = self.unused();
        let found = unused.by_size.get_mut(&bytes)?.pop()?;
        unused.bytes -= bytes;
        Some(found)
    }

    fn put(&self, bytes: usize, at: Address) {
        let mut unused = self.unused();
        unused.by_size.entry(bytes).or_default().push(at);
        unused.bytes += bytes;
    }

    fn bytes(&self) -> usize {
        self.unused().bytes
    }

    /// All of it, with its sizes.
    fn drain(&self) -> Vec<(usize, Address)> {
        let unused = std::mem::take(&mut *self.unused());
        unused.by_size.into_iter().flat_map(|(bytes, list)| list.into_iter().map(move |at| (bytes, at))).collect()
    }
}

/// Sizes are eighths of powers of two, so that batches of about one size share memory.
fn size_class(bytes: usize) -> usize {
    let bytes = bytes.max(LEAST);
    bytes.next_multiple_of(bytes.next_power_of_two() / 8)
}

/// Numbers of 4 bytes in a device's memory, given back when this is dropped. Work is done in the order in which it was asked for, so
/// whoever gets the memory next cannot be too early.
pub struct Region {
    at: Address,
    len: usize,
    bytes: usize,
    pool: Arc<Pool>,
}

impl Region {
    /// How many numbers.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All of them.
    pub fn all(&self) -> Values<'_> {
        Values { at: self.at, len: self.len, owner: PhantomData }
    }

    /// Some of them.
    pub fn part(&self, range: Range<usize>) -> Values<'_> {
        self.all().part(range)
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        self.pool.put(self.bytes, self.at);
    }
}

/// Numbers of a [`Region`], to read and to write. The device keeps the order; nobody else looks meanwhile.
#[derive(Clone, Copy)]
pub struct Values<'a> {
    pub(super) at: Address,
    pub(super) len: usize,
    owner: PhantomData<&'a Region>,
}

impl<'a> Values<'a> {
    /// No numbers.
    pub const NONE: Values<'static> = Values { at: Address::NONE, len: 0, owner: PhantomData };

    /// How many numbers.
    pub fn len(self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// Some of them.
    pub fn part(self, range: Range<usize>) -> Values<'a> {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {}", self.len);
        Values { at: self.at.plus(4 * range.start), len: range.len(), owner: PhantomData }
    }

    /// A matrix whose rows are `stride` apart.
    pub fn rows(self, stride: usize) -> Operand<'a> {
        Operand { at: self.at, len: self.len, stride, half: false, turned: false, owner: PhantomData }
    }

    /// A matrix whose columns are `stride` apart.
    pub fn columns(self, stride: usize) -> Operand<'a> {
        Operand { turned: true, ..self.rows(stride) }
    }
}

/// A frozen weight `[n, k]` as products read it: in bf16 where they round to that, else in f32.
pub struct Matrix {
    numbers: Region,
    /// Output features.
    pub n: usize,
    /// Input features.
    pub k: usize,
    half: bool,
}

impl Matrix {
    /// `[n, k]`, as it lies.
    pub fn rows(&self) -> Operand<'_> {
        let Values { at, .. } = self.numbers.all();
        Operand { at, len: self.n * self.k, stride: self.k, half: self.half, turned: false, owner: PhantomData }
    }

    /// `[k, n]`: `x · columns` is what a linear layer computes.
    pub fn columns(&self) -> Operand<'_> {
        Operand { turned: true, ..self.rows() }
    }
}

impl DeviceCompute {
    /// `len` numbers of any value.
    pub fn region(&mut self, len: usize) -> Result<Region, KernelError> {
        let bytes = size_class(len * 4);
        let at = match self.pool.take(bytes) {
            Some(at) => at,
            None => self.reserve(bytes)?,
        };
        self.most_used = self.most_used.max(self.held.saturating_sub(self.pool.bytes()));
        Ok(Region { at, len, bytes, pool: Arc::clone(&self.pool) })
    }

    fn reserve(&mut self, bytes: usize) -> Result<Address, KernelError> {
        let at = match self.alloc(bytes) {
            // What nobody uses may be of other sizes.
            Err(KernelError::Memory { .. }) => {
                for (bytes, at) in self.pool.drain() {
                    self.owned.retain(|owned| *owned != at);
                    self.held -= bytes;
                    self.device.free(at);
                }
                self.alloc(bytes)
            }
            other => other,
        };
        let at = at.map_err(|error| match error {
            KernelError::Memory { bytes, .. } => {
                let bound = self.bound();
                let bound = if bound == usize::MAX { String::new() } else { format!(", of {bound} that it may") };
                KernelError::Device(format!(
                    "no memory for {bytes} bytes beside the {} that the model and its batch hold{bound}; give it more of the card \
                     (--device-memory; a server's training_memory), ask for shorter answers (--max-tokens of an evaluation), or, in a \
                     training, lower the batch's size, tokens_per_batch or max_length, or keep less with --recompute",
                    self.held
                ))
            }
            other => other,
        })?;
        self.owned.push(at);
        self.held += bytes;
        self.most_held = self.most_held.max(self.held);
        Ok(at)
    }

    fn alloc(&mut self, bytes: usize) -> Result<Address, KernelError> {
        let what = "a training's numbers";
        if bytes > self.bound().saturating_sub(self.held) {
            return Err(KernelError::Memory { what, bytes });
        }
        self.device.alloc(what, bytes)
    }

    /// Numbers on the device.
    pub fn upload(&mut self, values: &[f32]) -> Result<Region, KernelError> {
        let region = self.region(values.len())?;
        self.write(&region, &values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>())?;
        Ok(region)
    }

    /// Zeros, made on the device.
    pub fn zeros(&mut self, len: usize) -> Result<Region, KernelError> {
        let region = self.region(len)?;
        if len > 0 {
            self.device.clear(region.at, len * 4)?;
        }
        Ok(region)
    }

    /// Whole numbers on the device.
    pub(super) fn upload_words(&mut self, words: &[u32]) -> Result<Region, KernelError> {
        let region = self.region(words.len())?;
        self.write(&region, &words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>())?;
        Ok(region)
    }

    fn write(&mut self, to: &Region, bytes: &[u8]) -> Result<(), KernelError> {
        if bytes.is_empty() { Ok(()) } else { self.device.write(to.at, bytes) }
    }

    /// Waits for all work, and copies numbers back.
    pub fn download(&mut self, from: Values<'_>) -> Result<Vec<f32>, KernelError> {
        let mut bytes = vec![0; from.len * 4];
        if !bytes.is_empty() {
            self.device.read(from.at, &mut bytes)?;
        }
        Ok(bytes.as_chunks().0.iter().map(|value| f32::from_le_bytes(*value)).collect())
    }

    /// Matrices of one `k` on top of each other, decoded from their files' formats.
    pub fn weight(&mut self, sources: &[MatrixSource<'_>]) -> Result<Matrix, KernelError> {
        let k = sources.first().map_or(0, |source| source.k);
        let n: usize = sources.iter().map(|source| source.n).sum();
        if sources.iter().any(|source| source.k != k) {
            return Err(KernelError::Weight("matrices of different widths on top of each other".to_owned()));
        }
        let half = self.precision == Precision::Bf16;
        let each = if half { 2 } else { 4 };
        let numbers = self.region((n * k * each).div_ceil(4))?;
        let mut at = numbers.at;
        for source in sources {
            let rows = (PIECE / k.max(1)).max(1);
            for first in (0..source.n).step_by(rows) {
                let bytes = decoded(source, first..(first + rows).min(source.n), half)?;
                self.device.write(at, &bytes)?;
                at = at.plus(bytes.len());
            }
        }
        Ok(Matrix { numbers, n, k, half })
    }
}

/// Rows of a weight as they lie on the device, decoded by all threads.
fn decoded(source: &MatrixSource<'_>, rows: Range<usize>, half: bool) -> Result<Vec<u8>, KernelError> {
    let (k, each) = (source.k, if half { 2 } else { 4 });
    let row_bytes = source.format.row_bytes(k).unwrap_or(0);
    let mut bytes = vec![0; rows.len() * k * each];
    let share = rows.len().div_ceil(available_threads()).max(1);
    let decode = |first: usize, out: &mut [u8]| -> Result<(), KernelError> {
        let mut values = vec![0.0; k];
        for (index, out) in out.chunks_mut((k * each).max(1)).enumerate() {
            let row = source.row_order.map_or(first + index, |order| order[first + index] as usize);
            let bytes = source.data.get(row * row_bytes..(row + 1) * row_bytes);
            let bytes = bytes.ok_or_else(|| KernelError::Weight(format!("a file that ends before row {row}")))?;
            dequantize_row(source.format, bytes, &mut values)?;
            for (out, value) in out.chunks_mut(each).zip(&values) {
                match half {
                    true => out.copy_from_slice(&bf16::from_f32(*value).to_le_bytes()),
                    false => out.copy_from_slice(&value.to_le_bytes()),
                }
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let parts = bytes.chunks_mut((share * k * each).max(1)).enumerate();
        let decode = &decode;
        let workers: Vec<_> = parts.map(|(index, out)| scope.spawn(move || decode(rows.start + index * share, out))).collect();
        let broken = |_| Err(KernelError::Weight("a decoding thread failed".to_owned()));
        workers.into_iter().try_for_each(|worker| worker.join().unwrap_or_else(broken))
    })?;
    Ok(bytes)
}
