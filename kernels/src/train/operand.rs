//! What a product multiplies: views of f32 memory, and matrices stacked along their output features.

use std::ops::Range;

use crate::blocks::dequantize_row;
use crate::cpu::elementwise::Level;
use crate::error::KernelError;
use crate::ops::{Format, MatrixSource};

/// Columns that are decoded together; a multiple of every block length.
pub(super) const DECODE: usize = 256;

/// One matrix `[n, k]` of a stack, row-major.
#[derive(Clone, Copy)]
pub enum Block<'a> {
    /// Values in memory.
    Values {
        /// `n * k` values.
        data: &'a [f32],
        /// Output features.
        n: usize,
    },
    /// A frozen weight as it lies in its file.
    Weight(MatrixSource<'a>),
    /// A matrix `[n, rank]` times `scale` from column `first` on, zeros beside it: what one of several adapted matrices that share their
    /// input adds to the stack of them.
    Corner {
        /// `n * rank` values.
        data: &'a [f32],
        /// Output features.
        n: usize,
        /// Columns that are not zeros.
        rank: usize,
        /// First of them.
        first: usize,
        /// Multiplies the values.
        scale: f32,
    },
}

impl Block<'_> {
    fn n(&self) -> usize {
        match self {
            Block::Values { n, .. } | Block::Corner { n, .. } => *n,
            Block::Weight(source) => source.n,
        }
    }
}

/// A matrix in memory, as it lies or transposed.
#[derive(Clone, Copy)]
pub enum View<'a> {
    /// Element `(row, column)` is `data[row * stride + column]`.
    Rows {
        /// The values.
        data: &'a [f32],
        /// Elements from one row to the next.
        stride: usize,
    },
    /// Element `(row, column)` is `data[column * stride + row]`.
    Columns {
        /// The values.
        data: &'a [f32],
        /// Elements from one column to the next.
        stride: usize,
    },
}

/// The right operand of a product.
#[derive(Clone, Copy)]
pub enum Operand<'a> {
    /// Values in memory.
    View(View<'a>),
    /// Matrices `[n, k]` of one `k` on top of each other: `[Σn, k]`.
    Stack(&'a [Block<'a>]),
    /// The same, transposed: `[k, Σn]`. `x · StackT` is what a linear layer computes.
    StackT(&'a [Block<'a>]),
}

fn shape(detail: String) -> KernelError {
    KernelError::Shape { op: "matmul", detail }
}

impl View<'_> {
    /// [`KernelError::Shape`] unless the view holds a `[rows, columns]` matrix.
    pub(super) fn check(&self, rows: usize, columns: usize) -> Result<(), KernelError> {
        let (data, stride, lines, width) = match *self {
            View::Rows { data, stride } => (data, stride, rows, columns),
            View::Columns { data, stride } => (data, stride, columns, rows),
        };
        let needed = lines.checked_sub(1).and_then(|last| last.checked_mul(stride)).and_then(|at| at.checked_add(width));
        if lines == 0 || needed.is_some_and(|needed| stride >= width && data.len() >= needed) {
            return Ok(());
        }
        Err(shape(format!("{} values at stride {stride} for [{lines}, {width}]", data.len())))
    }
}

impl Operand<'_> {
    /// [`KernelError::Shape`] unless the operand holds a `[rows, columns]` matrix.
    pub(super) fn check(&self, rows: usize, columns: usize) -> Result<(), KernelError> {
        match self {
            Operand::View(view) => view.check(rows, columns),
            Operand::Stack(blocks) => check_stack(blocks, rows, columns),
            Operand::StackT(blocks) => check_stack(blocks, columns, rows),
        }
    }
}

fn check_stack(blocks: &[Block<'_>], n: usize, k: usize) -> Result<(), KernelError> {
    for block in blocks {
        match block {
            Block::Values { data, n } if data.len() != n * k => {
                return Err(shape(format!("{} values for a [{n}, {k}] matrix", data.len())));
            }
            Block::Corner { data, n, rank, first, .. } if data.len() != n * rank || first + rank > k => {
                return Err(shape(format!("{} values for [{n}, {rank}] from column {first} of {k} on", data.len())));
            }
            Block::Values { .. } | Block::Corner { .. } => {}
            Block::Weight(source) => {
                let bytes = source.format.row_bytes(k).and_then(|row| row.checked_mul(source.n));
                if source.k != k || bytes != Some(source.data.len()) {
                    let detail =
                        format!("a [{}, {}] weight of {} bytes, used with k = {k}", source.n, source.k, source.data.len());
                    return Err(shape(detail));
                }
                let in_range = |order: &[u32]| order.len() == source.n && order.iter().all(|&row| (row as usize) < source.n);
                if !source.row_order.is_none_or(in_range) {
                    return Err(shape("a row order that does not fit its weight".to_owned()));
                }
            }
        }
    }
    let total: usize = blocks.iter().map(Block::n).sum();
    if total == n { Ok(()) } else { Err(shape(format!("matrices of {total} rows in all, used as {n}"))) }
}

/// Writes rows `rows`, columns `columns` of a stack to `out`, `stride` apart. `columns` starts at a multiple of [`DECODE`] and ends at
/// one or at `k`. The stack was checked.
///
/// # Safety
/// The processor runs `level`.
pub(super) unsafe fn decode(
    level: Level,
    blocks: &[Block<'_>],
    k: usize,
    rows: Range<usize>,
    columns: Range<usize>,
    out: &mut [f32],
    stride: usize,
) {
    let mut first = 0;
    for block in blocks {
        let end = first + block.n();
        for row in rows.start.max(first)..rows.end.min(end) {
            let line = &mut out[(row - rows.start) * stride..][..columns.len()];
            match block {
                Block::Corner { data, rank, first: corner, scale, .. } => {
                    line.fill(0.0);
                    let wanted = columns.start.max(*corner)..columns.end.min(corner + rank);
                    if !wanted.is_empty() {
                        let own = &data[(row - first) * rank..][wanted.start - corner..wanted.end - corner];
                        let out = &mut line[wanted.start - columns.start..wanted.end - columns.start];
                        out.iter_mut().zip(own).for_each(|(out, own)| *out = own * scale);
                    }
                }
                Block::Values { data, .. } => line.copy_from_slice(&data[(row - first) * k..][columns.clone()]),
                Block::Weight(source) => {
                    let row = source.row_order.map_or(row - first, |order| order[row - first] as usize);
                    // SAFETY: the caller's promise.
                    unsafe { decode_row(level, source.format, source.data, row, k, columns.clone(), line) };
                }
            }
        }
        first = end;
    }
}

/// # Safety
/// The processor runs `level`.
unsafe fn decode_row(level: Level, format: Format, data: &[u8], row: usize, k: usize, columns: Range<usize>, out: &mut [f32]) {
    let (len, bytes) = (format.block_len(), format.block_bytes());
    let start = row * (k / len) * bytes;
    let data = &data[start + columns.start / len * bytes..start + columns.end / len * bytes];
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller's promise; whole blocks of a checked stack. Processors with AVX-512 have F16C.
    if level == Level::Avx512 && unsafe { super::pack::avx512::decode(format, data, out) } {
        return;
    }
    let _ = level;
    // Whole blocks of a checked stack: the lengths agree.
    let _ = dequantize_row(format, data, out);
}
