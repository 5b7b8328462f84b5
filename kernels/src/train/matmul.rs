//! General products over views, blocked for the caches, on all threads or on one.
//!
//! `out (+)= scale * left · right`. Both operands are packed slice by slice of the inner dimension, which costs one pass over each and
//! lets every view and every file format share the inner loops. Sums are f32; over slices they are added in order, so a result depends on
//! the machine's kernel and the shape, never on the number of threads.

use std::ops::Range;

use super::Compute;
use super::operand::{Operand, View};
use super::pack::{self, Lines, TILE_K};
use super::tile::{Kernel, MAX_TILE, Target};
use crate::aligned::AlignedBuf;
use crate::cpu::elementwise::Level;
use crate::error::KernelError;
use crate::ops::Store;

/// Rows of the left operand that a task multiplies: with their slice they fit the second-level cache.
const TASK_ROWS: usize = 96;
/// Columns of the right operand that a task multiplies.
const TASK_COLUMNS: usize = 256;
/// Lines that a task packs.
const TASK_LINES: usize = 256;

/// A product `[m, k] · [k, n]`.
#[derive(Clone, Copy)]
pub struct Product<'a> {
    /// Rows of the result.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// Inner dimension.
    pub k: usize,
    /// `[m, k]`
    pub left: View<'a>,
    /// `[k, n]`
    pub right: Operand<'a>,
    /// Multiplies the product.
    pub scale: f32,
    /// Whether the result replaces what is in the output or is added to it.
    pub store: Store,
}

impl Product<'_> {
    fn check(&self, out: Output) -> Result<(), KernelError> {
        let Output { len, stride, .. } = out;
        self.left.check(self.m, self.k)?;
        self.right.check(self.k, self.n)?;
        let needed = self.m.checked_sub(1).and_then(|last| last.checked_mul(stride)).and_then(|at| at.checked_add(self.n));
        if needed.is_some_and(|needed| stride >= self.n && len >= needed) || self.m == 0 {
            return Ok(());
        }
        let detail = format!("{len} values at stride {stride} for a [{}, {}] result", self.m, self.n);
        Err(KernelError::Shape { op: "matmul", detail })
    }
}

/// Where a product goes: rows `stride` apart in `len` values. Not a slice, since tasks write interleaved parts of one matrix.
#[derive(Clone, Copy)]
pub(super) struct Output {
    pub start: *mut f32,
    pub len: usize,
    pub stride: usize,
}

/// Memory for packed operands; grows to the largest product it has seen.
pub(super) struct Packed {
    left: AlignedBuf<u8>,
    right: AlignedBuf<u8>,
}

impl Packed {
    pub fn new() -> Result<Self, KernelError> {
        Ok(Self { left: AlignedBuf::zeroed(0, WHAT)?, right: AlignedBuf::zeroed(0, WHAT)? })
    }

    fn reserve(&mut self, left: usize, right: usize) -> Result<(), KernelError> {
        for (buffer, bytes) in [(&mut self.left, left), (&mut self.right, right)] {
            if buffer.len() < bytes {
                *buffer = AlignedBuf::zeroed(bytes, WHAT)?;
            }
        }
        Ok(())
    }

    pub fn bytes(&self) -> usize {
        self.left.bytes() + self.right.bytes()
    }
}

const WHAT: &str = "packed operands";

/// What one thread needs.
pub(super) struct Scratch {
    tile: AlignedBuf<f32>,
    decoded: Vec<f32>,
}

impl Scratch {
    pub fn new() -> Result<Self, KernelError> {
        Ok(Self { tile: AlignedBuf::zeroed(MAX_TILE, "tile scratch")?, decoded: vec![0.0; pack::scratch_len()] })
    }
}

/// A product on its way, for one slice of the inner dimension.
struct Slice<'a> {
    kernel: Kernel,
    level: Level,
    product: &'a Product<'a>,
    left: *mut u8,
    right: *mut u8,
    out: Output,
    steps: Range<usize>,
    add: bool,
}

// SAFETY: the pointers are shared by tasks that touch disjoint parts, stage by stage.
unsafe impl Sync for Slice<'_> {}

impl Slice<'_> {
    fn left_tasks(&self) -> usize {
        self.product.m.div_ceil(lines_per_task(self.kernel.left.width()))
    }

    fn right_tasks(&self) -> usize {
        self.product.n.div_ceil(lines_per_task(self.kernel.right.width()))
    }

    /// # Safety
    /// Each task runs once before any of [`Self::multiply`]; the memory holds the strips.
    unsafe fn pack_left(&self, task: usize, scratch: &mut Scratch) {
        let Product { m, left, .. } = *self.product;
        // SAFETY: the caller's promise.
        unsafe { self.pack(self.kernel.left, Lines::of_left(left), m, task, self.left, scratch) }
    }

    /// # Safety
    /// As [`Self::pack_left`].
    unsafe fn pack_right(&self, task: usize, scratch: &mut Scratch) {
        let Product { n, k, right, .. } = *self.product;
        // SAFETY: the caller's promise.
        unsafe { self.pack(self.kernel.right, Lines::of_right(right, k, n), n, task, self.right, scratch) }
    }

    /// # Safety
    /// As [`Self::pack_left`].
    unsafe fn pack(
        &self,
        layout: pack::Layout,
        lines: Lines<'_>,
        count: usize,
        task: usize,
        out: *mut u8,
        scratch: &mut Scratch,
    ) {
        let per_task = lines_per_task(layout.width());
        let first = task * per_task;
        let range = first..(first + per_task).min(count);
        // SAFETY: whole strips of this task; the operands were checked.
        unsafe {
            let out = out.add(first / layout.width() * layout.strip_bytes(self.steps.len()));
            pack::pack(self.level, layout, lines, count, range, self.steps.clone(), out, &mut scratch.decoded);
        }
    }

    fn row_blocks(&self) -> usize {
        self.product.m.div_ceil(TASK_ROWS)
    }

    fn tasks(&self) -> usize {
        self.row_blocks() * self.product.n.div_ceil(TASK_COLUMNS)
    }

    /// # Safety
    /// Both operands are packed, the thread is prepared, and each task runs once.
    unsafe fn multiply(&self, task: usize, scratch: &mut Scratch) {
        let Product { m, n, scale, .. } = *self.product;
        let kernel = self.kernel;
        let (tall, wide) = (kernel.left.width() * kernel.strips, kernel.right.width() * kernel.strips);
        let steps = self.steps.len();
        let (left_strip, right_strip) = (kernel.left.strip_bytes(steps), kernel.right.strip_bytes(steps));
        let first_row = task % self.row_blocks() * TASK_ROWS;
        let first_column = task / self.row_blocks() * TASK_COLUMNS;
        for column in (first_column..(first_column + TASK_COLUMNS).min(n)).step_by(wide) {
            for row in (first_row..(first_row + TASK_ROWS).min(m)).step_by(tall) {
                // SAFETY: whole tiles of this task: TASK_ROWS and TASK_COLUMNS are multiples of every tile.
                unsafe {
                    let to = Target {
                        out: self.out.start.add(row * self.out.stride + column),
                        stride: self.out.stride,
                        rows: (m - row).min(tall),
                        columns: (n - column).min(wide),
                        add: self.add,
                        scale,
                    };
                    let left = self.left.add(row / kernel.left.width() * left_strip);
                    let right = self.right.add(column / kernel.right.width() * right_strip);
                    kernel.multiply(left, right, steps, to, scratch.tile.as_shared_ptr());
                }
            }
        }
    }
}

/// A multiple of the width and, for the widths of right operands, of what decodes together.
fn lines_per_task(width: usize) -> usize {
    TASK_LINES.next_multiple_of(width)
}

/// Calls `run` for each slice of a product.
///
/// # Safety
/// `out` is writable, and nobody else touches the product's elements of it.
unsafe fn slices<'a>(
    kernel: Kernel,
    product: &'a Product<'a>,
    packed: &mut Packed,
    out: Output,
    mut run: impl FnMut(&Slice<'_>) -> Result<(), KernelError>,
) -> Result<(), KernelError> {
    product.check(out)?;
    let Product { m, n, k, store, .. } = *product;
    if m == 0 || n == 0 {
        return Ok(());
    }
    if k == 0 {
        if store == Store::Replace {
            // SAFETY: the caller's promise; the rows were checked to lie within.
            (0..m).for_each(|row| unsafe { std::slice::from_raw_parts_mut(out.start.add(row * out.stride), n).fill(0.0) });
        }
        return Ok(());
    }
    let slice = kernel.slice.min(k.next_multiple_of(TILE_K));
    let lines = |count: usize, layout: pack::Layout| count.next_multiple_of(layout.width() * kernel.strips) / layout.width();
    packed.reserve(
        lines(m, kernel.left) * kernel.left.strip_bytes(slice),
        lines(n, kernel.right) * kernel.right.strip_bytes(slice),
    )?;
    for first in (0..k).step_by(slice) {
        run(&Slice {
            kernel,
            level: kernel.level(),
            product,
            left: packed.left.as_shared_ptr(),
            right: packed.right.as_shared_ptr(),
            out,
            steps: first..(first + slice).min(k),
            add: store == Store::Add || first > 0,
        })?;
    }
    Ok(())
}

/// A product on the calling thread alone.
///
/// # Safety
/// As [`slices`].
pub(super) unsafe fn serial(
    kernel: Kernel,
    product: &Product<'_>,
    packed: &mut Packed,
    scratch: &mut Scratch,
    out: Output,
) -> Result<(), KernelError> {
    // SAFETY: a kernel is made for this machine; the caller's promise; everything once and in order.
    unsafe {
        kernel.prepare();
        slices(kernel, product, packed, out, |slice| {
            (0..slice.left_tasks()).for_each(|task| slice.pack_left(task, scratch));
            (0..slice.right_tasks()).for_each(|task| slice.pack_right(task, scratch));
            (0..slice.tasks()).for_each(|task| slice.multiply(task, scratch));
            Ok(())
        })
    }
}

impl Compute {
    /// Computes `product` into `out`, whose rows lie `stride` apart, on all threads.
    ///
    /// [`KernelError::Shape`] when operands or output do not fit, [`KernelError::Memory`] when there is no room to pack.
    pub fn matmul(&mut self, product: &Product<'_>, out: &mut [f32], stride: usize) -> Result<(), KernelError> {
        let Compute { kernel, threads, packed, .. } = self;
        let out = Output { start: out.as_mut_ptr(), len: out.len(), stride };
        let run = |slice: &Slice<'_>| {
            threads.run(&[slice.left_tasks() + slice.right_tasks(), slice.tasks()], |stage, task, scratch| {
                // SAFETY: the stages come one after the other, each task once; the thread is prepared.
                unsafe {
                    if stage == 1 {
                        slice.multiply(task, &mut scratch.tiles);
                    } else if task < slice.left_tasks() {
                        slice.pack_left(task, &mut scratch.tiles);
                    } else {
                        slice.pack_right(task - slice.left_tasks(), &mut scratch.tiles);
                    }
                }
            })
        };
        // SAFETY: `out` is borrowed for the call.
        unsafe { slices(*kernel, product, packed, out, run) }
    }
}
