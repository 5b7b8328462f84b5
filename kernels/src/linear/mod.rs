//! `out = x wᵀ` over packed weights, as work items that threads claim from a counter.
//!
//! An item is a few neighbouring panels times a block of rows. A panel in the 4-bit form is expanded once per item into the
//! thread's scratch and then used for all rows of the item.

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;
#[cfg(target_arch = "x86_64")]
mod skinny;
#[cfg(target_arch = "x86_64")]
mod streamed;

use crate::activations::{ActivationKind, ActivationRows, Activations};
use crate::aligned::AlignedBuf;
use crate::error::KernelError;
use crate::isa::Isa;
use crate::packed::{Form, PANEL, PackedMatrix};

/// Panels that are expanded at once.
const BLOCK_PANELS: usize = 2;
/// Bytes of activations per item: they and the panels they meet share a second-level cache of 1 or 2 MiB.
const ROW_BLOCK_BYTES: usize = 768 << 10;
/// Row blocks are multiples of this; below it, expanding 4-bit weights costs more than using them.
const MIN_ROW_BLOCK: usize = 64;

/// What a thread needs to run items; one per thread.
pub struct TileScratch {
    /// `[BLOCK_PANELS]` expanded panels.
    expanded: AlignedBuf<u8>,
    /// Four tiles of sums on their way out of the matrix unit.
    sums: AlignedBuf<i32>,
    max_k: usize,
}

impl TileScratch {
    /// For matrices of up to `max_k` input features.
    pub fn new(max_k: usize) -> Result<Self, KernelError> {
        const WHAT: &str = "tile scratch";
        let bytes = max_k
            .checked_next_multiple_of(64)
            .and_then(|k| k.checked_mul(PANEL * BLOCK_PANELS))
            .map(|bytes| bytes.max(4096))
            .ok_or(KernelError::Memory { what: WHAT, bytes: usize::MAX })?;
        Ok(TileScratch { expanded: AlignedBuf::zeroed(bytes, WHAT)?, sums: AlignedBuf::zeroed(4 * 256, WHAT)?, max_k })
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.expanded.bytes() + self.sums.bytes()
    }
}

/// Where the results of an item go.
#[derive(Clone, Copy)]
pub(crate) struct Output<'a> {
    pub out: *mut f32,
    pub stride: usize,
    pub bias: Option<&'a [f32]>,
    pub add: bool,
    pub n: usize,
}

impl Output<'_> {
    /// Stores one value.
    ///
    /// # Safety
    /// `row` is one of the output and nobody else writes the element.
    #[inline(always)]
    pub(crate) unsafe fn put(&self, row: usize, n: usize, value: f32) {
        if n >= self.n {
            return;
        }
        let value = value + self.bias.map_or(0.0, |b| b[n]);
        // SAFETY: the caller's promise.
        unsafe {
            let at = self.out.add(row * self.stride + n);
            *at = if self.add { *at + value } else { value };
        }
    }
}

/// How a matrix's work for some rows is divided.
#[derive(Clone, Copy, Debug)]
struct Tiling {
    /// Panels per item.
    panels: usize,
    /// Rows per item.
    rows: usize,
    /// Items per row block.
    columns: usize,
    /// Items.
    items: usize,
}

impl PackedMatrix {
    fn tiling(&self, rows: usize) -> Tiling {
        // A pair of panels is what a block computes at once; a long matrix can afford longer items.
        let panels = if self.panel_count() >= 512 * self.threads() { 4 } else { 2 };
        let columns = self.panel_count().div_ceil(panels);
        // A block of rows stays in the second-level cache while panels stream past it.
        let row_bytes = match self.activation_kind() {
            ActivationKind::F32 => 4 * self.padded_k(),
            ActivationKind::Bf16 | ActivationKind::Int => 2 * self.padded_k(),
        };
        let cached = ROW_BLOCK_BYTES / row_bytes;
        // Enough items that the last ones to finish do not leave the other threads idle for long.
        let wanted = (self.threads() * 4).div_ceil(columns);
        let block = rows.div_ceil(wanted).min(cached).max(MIN_ROW_BLOCK).next_multiple_of(MIN_ROW_BLOCK);
        let row_blocks = rows.div_ceil(block);
        Tiling { panels, rows: block, columns, items: columns * row_blocks }
    }

    /// Work items of a product with `rows` rows. They may run in any order, on any threads.
    pub fn items(&self, rows: usize) -> usize {
        self.tiling(rows).items
    }

    /// Parts that the output features are divided into: item `i` is about part `i % parts`, whatever the number of rows.
    pub fn parts(&self) -> usize {
        self.tiling(0).columns
    }

    /// Runs one item: its part of `out[r][..n] = x[r] wᵀ + bias`, or added to `out` when `add` is set.
    ///
    /// Row `r` of the output starts at `out + r * out_stride`. `bias` has `n` values.
    ///
    /// # Safety
    /// `isa` runs on this machine. `acts` holds `rows` rows of `k` values, set with this `isa` and [`Self::activation_kind`], and nobody
    /// sets rows meanwhile. `item < self.items(rows)`, each item runs once per product. `out` is writable for `rows` rows
    /// `out_stride` apart of at least `n` values, and nobody else touches them but other items of the same product. `scratch` was
    /// made for at least `k` input features.
    pub unsafe fn run_item(
        &self,
        isa: Isa,
        item: usize,
        acts: &Activations,
        rows: usize,
        out: *mut f32,
        out_stride: usize,
        bias: Option<&[f32]>,
        add: bool,
        scratch: &mut TileScratch,
    ) {
        debug_assert!(acts.capacity().0 >= rows && acts.capacity().1 >= self.k());
        // SAFETY: the caller's promise.
        unsafe {
            let acts = acts.rows_from(isa, self.activation_kind(), 0, self.k());
            self.run_item_of(isa, item, acts, rows, out, out_stride, bias, add, scratch);
        }
    }

    /// [`PackedMatrix::run_item`] on rows that begin anywhere.
    ///
    /// # Safety
    /// As there.
    pub(crate) unsafe fn run_item_of(
        &self,
        isa: Isa,
        item: usize,
        acts: ActivationRows<'_>,
        rows: usize,
        out: *mut f32,
        out_stride: usize,
        bias: Option<&[f32]>,
        add: bool,
        scratch: &mut TileScratch,
    ) {
        let tiling = self.tiling(rows);
        debug_assert!(item < tiling.items && scratch.max_k >= self.k() && bias.is_none_or(|b| b.len() >= self.n()));
        let first_row = item / tiling.columns * tiling.rows;
        let row_range = first_row..(first_row + tiling.rows).min(rows);
        let panels_of = |item: usize| {
            let first = item % tiling.columns * tiling.panels;
            first..(first + tiling.panels).min(self.panel_count())
        };
        let panel_range = panels_of(item);
        let out = Output { out, stride: out_stride, bias, add, n: self.n() };
        // SAFETY: the caller's promise; rows and panels are in range.
        unsafe {
            match isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Amx => {
                    // With threads taking turns at the counter, this thread's next item is most likely this one.
                    let next = item + self.threads();
                    let next = if next < tiling.items { self.panel_bytes(panels_of(next)) } else { &[] };
                    amx::run(self, panel_range, acts, row_range, next, out, scratch)
                }
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => avx512::run(self, panel_range, acts, row_range, out, scratch),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => avx2::run(self, panel_range, acts, row_range, out, scratch),
                _ => portable::run(self, panel_range, acts, row_range, out, scratch),
            }
        }
    }
}

#[cfg(test)]
mod tests;
