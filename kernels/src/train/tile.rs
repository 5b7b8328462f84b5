//! The inner loops: a few strips of the left operand by a few of the right one.

use super::pack::{Layout, TILE_K};
#[cfg(target_arch = "x86_64")]
use crate::cpu::attention::lanes::{Avx2, Avx512};
use crate::cpu::attention::lanes::{Lanes, Portable};
use crate::cpu::elementwise::Level;
use crate::isa::Isa;
#[cfg(target_arch = "x86_64")]
use crate::linear::amx;

use super::Precision;

/// Elements of the largest tile.
pub(super) const MAX_TILE: usize = 32 * 32;

/// How one machine multiplies in one precision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kernel {
    isa: Isa,
    /// Layout of the left operand.
    pub left: Layout,
    /// Layout of the right operand.
    pub right: Layout,
    /// Strips of each operand per tile.
    pub strips: usize,
    /// Steps of the inner dimension per slice, at most: its strips of the right operand fit the first-level cache.
    slice: usize,
}

impl Kernel {
    /// Bf16 wants the matrix unit; without it everything is f32.
    pub fn new(isa: Isa, precision: Precision) -> Self {
        let single =
            |isa, rows, columns| Kernel { isa, left: Layout::Lanes(rows), right: Layout::Lanes(columns), strips: 1, slice: 256 };
        match (isa, precision) {
            (Isa::Amx, Precision::Bf16) if rounds() => {
                Kernel { isa, left: Layout::Tiles, right: Layout::Pairs, strips: 2, slice: 640 }
            }
            (Isa::Amx | Isa::Avx512, _) => single(Isa::Avx512, 12, 32),
            (Isa::Avx2, _) => single(isa, 6, 16),
            (Isa::Portable, _) => single(isa, 4, 8),
        }
    }

    /// Steps of a slice when there are `steps` in all.
    pub fn slice(self, steps: usize) -> usize {
        steps.div_ceil(steps.div_ceil(self.slice).max(1)).next_multiple_of(TILE_K)
    }

    /// The level of row operations beside it.
    pub fn level(self) -> Level {
        match self.isa {
            Isa::Portable => Level::Portable,
            Isa::Avx2 => Level::Avx2,
            Isa::Avx512 | Isa::Amx => Level::Avx512,
        }
    }

    /// To be called by a thread before it multiplies.
    ///
    /// # Safety
    /// The processor runs the kernel.
    pub unsafe fn prepare(self) {
        #[cfg(target_arch = "x86_64")]
        if self.isa == Isa::Amx {
            // SAFETY: the caller's promise.
            unsafe { amx::configure() };
        }
    }

    /// Makes what was written past the caches visible to threads that learn of it later.
    pub fn settle(self) {
        #[cfg(target_arch = "x86_64")]
        if self.isa == Isa::Amx {
            // SAFETY: the matrix unit has this around it.
            unsafe { std::arch::x86_64::_mm_sfence() };
        }
    }

    /// `to += scale * left · right` for the part of the tile that exists, or `=` unless `add`.
    ///
    /// # Safety
    /// The thread is prepared. The operands point to as many strips, `strips` bytes apart, as [`Self::strips`] or the valid part needs,
    /// over `steps > 0` steps; `to` is writable for its valid part and nobody else touches that; `scratch` holds [`MAX_TILE`] values on a
    /// cache line.
    pub unsafe fn multiply(self, operands: [*const u8; 2], strips: [usize; 2], steps: usize, to: Target, scratch: *mut f32) {
        let [left, right] = operands.map(<*const u8>::cast);
        // SAFETY: the caller's promise.
        unsafe {
            match self.isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Amx => matrix_unit(operands, strips, steps, to, scratch),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => avx512(left, right, steps, to, scratch),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => avx2(left, right, steps, to, scratch),
                _ => single::<Portable, 4>(left, right, steps, to, scratch),
            }
        }
    }
}

/// Whether the machine converts to bfloat16 by itself, as those with a matrix unit do.
fn rounds() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        is_x86_feature_detected!("avx512bf16")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

/// Where a tile of the product goes.
#[derive(Clone, Copy)]
pub(super) struct Target {
    pub out: *mut f32,
    pub stride: usize,
    /// Rows and columns that exist.
    pub rows: usize,
    pub columns: usize,
    pub add: bool,
    pub scale: f32,
    /// Write past the caches: nobody reads the result before they have forgotten it.
    pub past: bool,
}

impl Target {
    /// Moves `rows × columns` sums that lie `stride` apart from `(row, column)` of the tile on.
    ///
    /// # Safety
    /// `sums` is readable; the target writable.
    #[inline(always)]
    unsafe fn store(self, sums: *const f32, stride: usize, row: usize, column: usize, rows: usize, columns: usize) {
        let rows = rows.min(self.rows.saturating_sub(row));
        let columns = columns.min(self.columns.saturating_sub(column));
        for r in 0..rows {
            // SAFETY: the caller's promise.
            let (from, to) = unsafe {
                let to = self.out.add((row + r) * self.stride + column);
                (std::slice::from_raw_parts(sums.add(r * stride), columns), std::slice::from_raw_parts_mut(to, columns))
            };
            if self.add {
                for (to, from) in to.iter_mut().zip(from) {
                    *to += *from * self.scale;
                }
            } else {
                for (to, from) in to.iter_mut().zip(from) {
                    *to = *from * self.scale;
                }
            }
        }
    }
}

/// `ROWS` by two vectors of sums.
///
/// # Safety
/// As [`Kernel::multiply`], where the instructions of `L` exist.
#[inline(always)]
unsafe fn single<L: Lanes, const ROWS: usize>(left: *const f32, right: *const f32, steps: usize, to: Target, scratch: *mut f32) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[L::splat(0.0); 2]; ROWS];
        for step in 0..steps {
            let right = right.add(step * 2 * L::N);
            let columns = [L::load(right), L::load(right.add(L::N))];
            let left = left.add(step * ROWS);
            for (row, sums) in sums.iter_mut().enumerate() {
                let x = L::splat(*left.add(row));
                sums[0] = L::fma(x, columns[0], sums[0]);
                sums[1] = L::fma(x, columns[1], sums[1]);
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            L::store(scratch.add(row * 2 * L::N), sums[0]);
            L::store(scratch.add(row * 2 * L::N + L::N), sums[1]);
        }
        to.store(scratch, 2 * L::N, 0, 0, ROWS, 2 * L::N);
    }
}

/// # Safety
/// As [`single`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,fma")]
unsafe fn avx512(left: *const f32, right: *const f32, steps: usize, to: Target, scratch: *mut f32) {
    // SAFETY: the caller's promise.
    unsafe { single::<Avx512, 12>(left, right, steps, to, scratch) }
}

/// # Safety
/// As [`single`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2(left: *const f32, right: *const f32, steps: usize, to: Target, scratch: *mut f32) {
    // SAFETY: the caller's promise.
    unsafe { single::<Avx2, 6>(left, right, steps, to, scratch) }
}

/// # Safety
/// As [`Kernel::multiply`] on a machine with AMX.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,fma")]
unsafe fn matrix_unit(operands: [*const u8; 2], strips: [usize; 2], steps: usize, to: Target, scratch: *mut f32) {
    use std::arch::x86_64::*;
    let (tall, wide) = (to.rows.div_ceil(16).min(2), to.columns.div_ceil(16).min(2));
    let scale = _mm512_set1_ps(to.scale);
    let past = to.past && !to.add && to.columns == 32 && to.stride.is_multiple_of(16) && to.out.addr().is_multiple_of(64);
    // SAFETY: the caller's promise; masks keep to the columns that exist.
    unsafe {
        let [a, b] = [(0, tall), (1, wide)].map(|(i, used)| [operands[i], operands[i].add(strips[i] * (used - 1))]);
        amx::bf16_block(a, tall, b, wide, steps.div_ceil(TILE_K), scratch);
        if past {
            for row in 0..to.rows {
                let sums = scratch.add(row / 16 * 512 + row % 16 * 16);
                let out = to.out.add(row * to.stride);
                _mm512_stream_ps(out, _mm512_mul_ps(_mm512_load_ps(sums), scale));
                _mm512_stream_ps(out.add(16), _mm512_mul_ps(_mm512_load_ps(sums.add(256)), scale));
            }
            return;
        }
        for column in 0..wide {
            let valid = (to.columns - column * 16).min(16);
            let mask: __mmask16 = if valid == 16 { !0 } else { (1 << valid) - 1 };
            for row in 0..to.rows {
                let sums = _mm512_load_ps(scratch.add((row / 16 * wide + column) * 256 + row % 16 * 16));
                let out = to.out.add(row * to.stride + column * 16);
                let value = if to.add {
                    _mm512_fmadd_ps(sums, scale, _mm512_maskz_loadu_ps(mask, out))
                } else {
                    _mm512_mul_ps(sums, scale)
                };
                _mm512_mask_storeu_ps(out, mask, value);
            }
        }
    }
}
