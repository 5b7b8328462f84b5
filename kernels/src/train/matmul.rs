//! General products over views, blocked for the caches, on all threads or on one.
//!
//! `out (+)= scale * left · right`. Both operands are packed, which costs one pass over each and lets every view and every file format
//! share the inner loops. Sums are f32, made slice by slice of the inner dimension in order, so a result depends on the machine's kernel
//! and the shape, never on the number of threads.
//!
//! A product may go on with one of low rank: its inner dimension is then longer by the rank, so that the sum of both leaves the
//! registers once.

use std::ops::Range;

use super::Compute;
use super::operand::{Operand, View};
use super::pack::{self, Layout, Lines};
use super::rows::Shared;
use super::tile::{Kernel, MAX_TILE, Target};
use crate::aligned::AlignedBuf;
use crate::error::KernelError;
use crate::ops::Store;

/// Bytes of a slice of the left operand that a task multiplies, about: they stay in the second-level cache while the columns come by.
const TASK_LEFT: usize = 1 << 20;
/// Rows of a task are a multiple of this, which is one of every tile.
const TASK_ROWS: usize = 96;
/// Columns of the right operand that a task multiplies. A multiple of every tile.
const TASK_COLUMNS: usize = 128;
/// Elements of a result from which on it is written past the caches: by the time that somebody reads it, it has left them anyway.
const PAST: usize = 1 << 20;
/// Lines that a task packs.
const TASK_LINES: usize = 256;
/// Rows whose part of a low rank one task computes. A multiple of every left width.
const TASK_LOW: usize = 96;

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

/// What a product goes on with: `left · down`, `[m, rank]`, times `up`.
#[derive(Clone, Copy)]
pub struct LowRank<'a> {
    /// Inner dimension between the two.
    pub rank: usize,
    /// `[k, rank]`; without it `left · down` is given.
    pub down: Option<Operand<'a>>,
    /// `[rank, n]`; without it only `left · down` is made.
    pub up: Option<Operand<'a>>,
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
    /// The right operand of what goes down to a low rank.
    down: AlignedBuf<u8>,
}

impl Packed {
    pub fn new() -> Result<Self, KernelError> {
        Ok(Self { left: AlignedBuf::zeroed(0, WHAT)?, right: AlignedBuf::zeroed(0, WHAT)?, down: AlignedBuf::zeroed(0, WHAT)? })
    }

    pub fn bytes(&self) -> usize {
        self.left.bytes() + self.right.bytes() + self.down.bytes()
    }
}

/// `buffer` with room for `bytes`.
fn reserve(buffer: &mut AlignedBuf<u8>, bytes: usize) -> Result<*mut u8, KernelError> {
    if buffer.len() < bytes {
        *buffer = AlignedBuf::zeroed(bytes, WHAT)?;
    }
    Ok(buffer.as_shared_ptr())
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

/// Strips of an operand: `count` lines over `main` steps and, behind those, `more`.
#[derive(Clone, Copy)]
struct Strips {
    layout: Layout,
    count: usize,
    main: usize,
    more: usize,
    start: *mut u8,
}

// SAFETY: the memory is shared by tasks that touch disjoint parts, stage by stage.
unsafe impl Sync for Strips {}

impl Strips {
    /// Steps as the inner loops count them: the main part fills whole tiles, so that what follows starts at one.
    fn steps(&self) -> usize {
        self.layout.whole(self.main) + self.more
    }

    fn strip_bytes(&self) -> usize {
        self.layout.strip_bytes(self.main) + self.layout.strip_bytes(self.more)
    }

    fn bytes(layout: Layout, count: usize, main: usize, more: usize, strips: usize) -> usize {
        let strips = count.next_multiple_of(layout.width() * strips) / layout.width();
        strips * (layout.strip_bytes(main) + layout.strip_bytes(more))
    }

    fn tasks(&self) -> usize {
        self.count.div_ceil(lines_per_task(self.layout.width()))
    }

    /// Packs a task's lines of the main part, or of what follows.
    ///
    /// # Safety
    /// The processor runs the kernel; the memory holds the strips; no two tasks on the same lines and part at once.
    unsafe fn pack(&self, kernel: Kernel, lines: Lines<'_>, follows: bool, task: usize, scratch: &mut Scratch) {
        let per_task = lines_per_task(self.layout.width());
        let first = task * per_task;
        // SAFETY: the caller's promise.
        unsafe { self.pack_lines(kernel, lines, follows, first..(first + per_task).min(self.count), scratch) }
    }

    /// # Safety
    /// As [`Self::pack`]; `range` starts at a strip.
    unsafe fn pack_lines(&self, kernel: Kernel, lines: Lines<'_>, follows: bool, range: Range<usize>, scratch: &mut Scratch) {
        let (offset, steps) = if follows { (self.layout.strip_bytes(self.main), self.more) } else { (0, self.main) };
        let bytes = self.strip_bytes();
        // SAFETY: whole strips of this task; the operands were checked.
        unsafe {
            let out = self.start.add(range.start / self.layout.width() * bytes + offset);
            pack::pack(kernel.level(), self.layout, lines, range, steps, out, bytes, &mut scratch.decoded);
        }
    }

    /// Where the strips of line `line` go on at step `step`.
    ///
    /// # Safety
    /// Within the strips; `step` is a multiple of a tile's steps.
    unsafe fn at(&self, line: usize, step: usize) -> *const u8 {
        // SAFETY: the caller's promise.
        unsafe { self.start.add(line / self.layout.width() * self.strip_bytes() + self.layout.strip_bytes(step)) }
    }
}

/// A product whose operands are packed, all or in part.
struct Job<'a> {
    kernel: Kernel,
    product: &'a Product<'a>,
    left: Strips,
    right: Strips,
    out: Output,
}

// SAFETY: as for its strips.
unsafe impl Sync for Job<'_> {}

impl Job<'_> {
    /// Blocks of about equal size.
    fn row_blocks(&self) -> usize {
        let bytes = self.left.layout.strip_bytes(self.kernel.slice(self.left.main)) / self.left.layout.width();
        let blocks = (self.product.m * bytes).div_ceil(TASK_LEFT).max(1);
        self.product.m.div_ceil(self.product.m.div_ceil(blocks).next_multiple_of(TASK_ROWS))
    }

    fn rows_per_block(&self) -> usize {
        self.product.m.div_ceil(self.row_blocks()).next_multiple_of(TASK_ROWS)
    }

    fn tasks(&self) -> usize {
        self.row_blocks() * self.product.n.div_ceil(TASK_COLUMNS)
    }

    /// # Safety
    /// Both operands are packed, the thread is prepared, and each task runs once.
    unsafe fn multiply(&self, task: usize, scratch: &mut Scratch) {
        let Product { m, n, scale, store, .. } = *self.product;
        let first_row = task % self.row_blocks() * self.rows_per_block();
        let first_column = task / self.row_blocks() * TASK_COLUMNS;
        let rows = first_row.min(m)..(first_row + self.rows_per_block()).min(m);
        let columns = first_column..(first_column + TASK_COLUMNS).min(n);
        let steps = self.left.steps();
        // SAFETY: whole tiles of this task.
        unsafe { multiply(self.kernel, [&self.left, &self.right], steps, rows, columns, self.out, (scale, store), scratch) }
    }
}

/// Rows `rows`, columns `columns` of the product of two packed operands over their first `steps` steps.
///
/// # Safety
/// The strips are packed and the thread is prepared; `rows` and `columns` start at tiles; nobody else touches these elements of `out`.
unsafe fn multiply(
    kernel: Kernel,
    [left, right]: [&Strips; 2],
    steps: usize,
    rows: Range<usize>,
    columns: Range<usize>,
    out: Output,
    (scale, store): (f32, Store),
    scratch: &mut Scratch,
) {
    let (tall, wide) = (kernel.left.width() * kernel.strips, kernel.right.width() * kernel.strips);
    // What follows the main part belongs to its last slice, so that the main part is summed in one order with and without it: an adapter
    // of zeros changes no bit.
    let main = left.layout.whole(left.main);
    let slice = kernel.slice(main);
    let past = slice >= main && out.len >= PAST;
    for first in (0..main).step_by(slice) {
        let len = if first + slice < main { slice } else { steps - first };
        for column in columns.clone().step_by(wide) {
            for row in rows.clone().step_by(tall) {
                // SAFETY: the caller's promise.
                unsafe {
                    let to = Target {
                        out: out.start.add(row * out.stride + column),
                        stride: out.stride,
                        rows: (rows.end - row).min(tall),
                        columns: (columns.end - column).min(wide),
                        add: store == Store::Add || first > 0,
                        scale,
                        past,
                    };
                    let operands = [left.at(row, first), right.at(column, first)];
                    let strips = [left.strip_bytes(), right.strip_bytes()];
                    kernel.multiply(operands, strips, len, to, scratch.tile.as_shared_ptr());
                }
            }
        }
    }
    if past {
        kernel.settle();
    }
}

/// A multiple of the width and, for the widths of right operands, of what decodes together.
fn lines_per_task(width: usize) -> usize {
    TASK_LINES.next_multiple_of(width)
}

/// Fills what a product without inner dimension leaves; says whether there is anything else to do.
///
/// # Safety
/// `out` is writable for the product, which was checked, and nobody else touches its elements.
unsafe fn begin(product: &Product<'_>, out: Output) -> bool {
    let Product { m, n, k, store, .. } = *product;
    if m == 0 || n == 0 {
        return false;
    }
    if k == 0 && store == Store::Replace {
        // SAFETY: the caller's promise; the rows were checked to lie within.
        (0..m).for_each(|row| unsafe { std::slice::from_raw_parts_mut(out.start.add(row * out.stride), n).fill(0.0) });
    }
    k > 0
}

/// Plans a product whose inner dimension goes on by `more` steps.
fn plan<'a>(
    kernel: Kernel,
    product: &'a Product<'a>,
    more: usize,
    packed: &mut Packed,
    out: Output,
) -> Result<Job<'a>, KernelError> {
    let Product { m, n, k, .. } = *product;
    let strips = |layout: Layout, count: usize, buffer: &mut AlignedBuf<u8>| {
        let start = reserve(buffer, Strips::bytes(layout, count, k, more, kernel.strips))?;
        Ok::<_, KernelError>(Strips { layout, count, main: k, more, start })
    };
    let (left, right) = (strips(kernel.left, m, &mut packed.left)?, strips(kernel.right, n, &mut packed.right)?);
    Ok(Job { kernel, product, left, right, out })
}

/// A product on the calling thread alone.
///
/// # Safety
/// `out` is writable, and nobody else touches the product's elements of it.
pub(super) unsafe fn serial(
    kernel: Kernel,
    product: &Product<'_>,
    packed: &mut Packed,
    scratch: &mut Scratch,
    out: Output,
) -> Result<(), KernelError> {
    product.check(out)?;
    // SAFETY: a kernel is made for this machine; the caller's promise; everything once and in order.
    unsafe {
        if !begin(product, out) {
            return Ok(());
        }
        let job = plan(kernel, product, 0, packed, out)?;
        kernel.prepare();
        let lines = Lines::of_left(product.left);
        (0..job.left.tasks()).for_each(|task| job.left.pack(kernel, lines, false, task, scratch));
        let lines = Lines::of_right(product.right, product.k, product.n);
        (0..job.right.tasks()).for_each(|task| job.right.pack(kernel, lines, false, task, scratch));
        (0..job.tasks()).for_each(|task| job.multiply(task, scratch));
    }
    Ok(())
}

impl Compute {
    /// Computes `product` into `out`, whose rows lie `stride` apart, on all threads.
    ///
    /// [`KernelError::Shape`] when operands or output do not fit, [`KernelError::Memory`] when there is no room to pack.
    pub fn matmul(&mut self, product: &Product<'_>, out: &mut [f32], stride: usize) -> Result<(), KernelError> {
        self.matmul_with(product, None, &mut [], out, stride)
    }

    /// As [`Self::matmul`], plus `scale * low · up` where `low = left · down`, `[m, rank]`, which is stored too unless it is given.
    pub fn matmul_with(
        &mut self,
        product: &Product<'_>,
        along: Option<LowRank<'_>>,
        low: &mut [f32],
        out: &mut [f32],
        stride: usize,
    ) -> Result<(), KernelError> {
        let Compute { kernel, threads, packed, .. } = self;
        let kernel = *kernel;
        let out = Output { start: out.as_mut_ptr(), len: out.len(), stride };
        product.check(out)?;
        let Product { m, n, k, .. } = *product;
        let along = along.filter(|along| along.rank > 0);
        let LowRank { rank, down, up } = along.unwrap_or(LowRank { rank: 0, down: None, up: None });
        if let Some(down) = down {
            down.check(k, rank)?;
        }
        if let Some(up) = up {
            up.check(rank, n)?;
        }
        if low.len() < m * rank {
            return Err(KernelError::Shape { op: "matmul", detail: format!("{} values for [{m}, {rank}]", low.len()) });
        }
        // SAFETY: `out` is borrowed for the call.
        if !unsafe { begin(product, out) } {
            return Ok(());
        }
        let more = if up.is_some() { rank } else { 0 };
        let start = reserve(&mut packed.down, Strips::bytes(kernel.right, rank, k, 0, kernel.strips))?;
        let job = plan(kernel, product, more, packed, out)?;
        let steep = Strips { layout: kernel.right, count: rank, main: k, more: 0, start };
        let low = Shared::new(low);
        let left = Lines::of_left(product.left);
        let right = Lines::of_right(product.right, k, n);
        let up = up.map(|up| Lines::of_right(up, rank, n));
        let down = down.map(|down| Lines::of_right(down, k, rank));
        let counts =
            [job.left.tasks(), job.right.tasks(), up.map_or(0, |_| job.right.tasks()), down.map_or(0, |_| steep.tasks())];
        let low_tasks = if rank > 0 { m.div_ceil(TASK_LOW) } else { 0 };
        threads.run(&[counts.iter().sum(), low_tasks, job.tasks()], |stage, task, scratch| {
            let scratch = &mut scratch.tiles;
            // SAFETY: the stages come one after the other, each task once, on parts of its own; the thread is prepared.
            unsafe {
                match stage {
                    0 => {
                        let mut task = task;
                        let parts = [
                            (&job.left, Some(left), false),
                            (&job.right, Some(right), false),
                            (&job.right, up, true),
                            (&steep, down, false),
                        ];
                        for ((strips, lines, follows), count) in parts.into_iter().zip(counts) {
                            match lines {
                                Some(lines) if task < count => return strips.pack(kernel, lines, follows, task, scratch),
                                _ => task -= count.min(task),
                            }
                        }
                    }
                    1 => {
                        let rows = task * TASK_LOW..((task + 1) * TASK_LOW).min(m);
                        if down.is_some() {
                            let to = Output { start: low.at(0, m * rank), len: m * rank, stride: rank };
                            let how = (1.0, Store::Replace);
                            multiply(kernel, [&job.left, &steep], steep.steps(), rows.clone(), 0..rank, to, how, scratch);
                        }
                        if more > 0 {
                            let data = std::slice::from_raw_parts(low.at(0, m * rank), m * rank);
                            job.left.pack_lines(kernel, Lines::Along { data, stride: rank }, true, rows, scratch);
                        }
                    }
                    _ => job.multiply(task, scratch),
                }
            }
        })
    }
}
