//! The two matrix products of attention in vector instructions.
//!
//! One micro-kernel serves both: `out[r][c] = Σ_k a[r][k] · b[k][c]` with the inner dimension taken in pairs, ascending, so that
//! the sum of a row is the same whichever rows are computed beside it.

use std::marker::PhantomData;

use super::lanes::Lanes;
use super::plan::SEGMENT;
use super::storage::{BLOCK, bf16};

/// What differs between element types: how a pair of rows of `b` is read and multiplied.
///
/// # Safety
/// As [`Lanes`]: only where the instructions exist, pointers good for what is read.
pub(super) trait Pairs {
    type L: Lanes;
    /// Element of the cache.
    type Cache: Copy;
    /// Element of queries and probabilities.
    type Operand: Copy;
    /// Two rows of one vector of columns.
    type Loaded: Copy;
    /// Elements from one column to the next: 2 where pairs are interleaved.
    const STEP: usize;
    unsafe fn load(b: *const Self::Cache, stride: usize) -> Self::Loaded;
    unsafe fn mac(sum: <Self::L as Lanes>::V, a: *const Self::Operand, b: Self::Loaded) -> <Self::L as Lanes>::V;
    /// One column.
    unsafe fn mac_one(sum: f32, a: *const Self::Operand, b: *const Self::Cache, stride: usize) -> f32;
    unsafe fn store_operand(p: *mut Self::Operand, v: <Self::L as Lanes>::V);
    fn operand(x: f32) -> Self::Operand;
}

/// f32 cache, f32 arithmetic.
pub(super) struct Single<L>(PhantomData<L>);

impl<L: Lanes> Pairs for Single<L> {
    type L = L;
    type Cache = f32;
    type Operand = f32;
    type Loaded = (L::V, L::V);
    const STEP: usize = 1;
    #[inline(always)]
    unsafe fn load(b: *const f32, stride: usize) -> Self::Loaded {
        // SAFETY: the trait's contract, here and below.
        unsafe { (L::load(b), L::load(b.add(stride))) }
    }
    #[inline(always)]
    unsafe fn mac(sum: L::V, a: *const f32, b: Self::Loaded) -> L::V {
        // SAFETY: as above.
        unsafe { L::fma(L::splat(*a.add(1)), b.1, L::fma(L::splat(*a), b.0, sum)) }
    }
    #[inline(always)]
    unsafe fn mac_one(sum: f32, a: *const f32, b: *const f32, stride: usize) -> f32 {
        // SAFETY: as above.
        unsafe { sum + *a * *b + *a.add(1) * *b.add(stride) }
    }
    #[inline(always)]
    unsafe fn store_operand(p: *mut f32, v: L::V) {
        // SAFETY: as above.
        unsafe { L::store(p, v) }
    }
    #[inline(always)]
    fn operand(x: f32) -> f32 {
        x
    }
}

/// bf16 cache widened on the way, f32 arithmetic.
pub(super) struct Widened<L>(PhantomData<L>);

impl<L: Lanes> Pairs for Widened<L> {
    type L = L;
    type Cache = u16;
    type Operand = f32;
    type Loaded = (L::V, L::V);
    const STEP: usize = 2;
    #[inline(always)]
    unsafe fn load(b: *const u16, _: usize) -> Self::Loaded {
        // SAFETY: the trait's contract, here and below.
        unsafe { L::load_bf16_pairs(b) }
    }
    #[inline(always)]
    unsafe fn mac(sum: L::V, a: *const f32, b: Self::Loaded) -> L::V {
        // SAFETY: as above.
        unsafe { L::fma(L::splat(*a.add(1)), b.1, L::fma(L::splat(*a), b.0, sum)) }
    }
    #[inline(always)]
    unsafe fn mac_one(sum: f32, a: *const f32, b: *const u16, _: usize) -> f32 {
        // SAFETY: as above.
        unsafe {
            let (low, high) = (f32::from_bits(u32::from(*b) << 16), f32::from_bits(u32::from(*b.add(1)) << 16));
            sum + *a * low + *a.add(1) * high
        }
    }
    #[inline(always)]
    unsafe fn store_operand(p: *mut f32, v: L::V) {
        // SAFETY: as above.
        unsafe { L::store(p, v) }
    }
    #[inline(always)]
    fn operand(x: f32) -> f32 {
        x
    }
}

/// bf16 cache, queries and probabilities rounded to bf16, dot instructions that add in f32.
#[cfg(target_arch = "x86_64")]
pub(super) struct Dot;

#[cfg(target_arch = "x86_64")]
impl Pairs for Dot {
    type L = super::lanes::Avx512;
    type Cache = u16;
    type Operand = u16;
    type Loaded = std::arch::x86_64::__m512i;
    const STEP: usize = 2;
    #[inline(always)]
    unsafe fn load(b: *const u16, _: usize) -> Self::Loaded {
        // SAFETY: the trait's contract, here and below.
        unsafe { std::arch::x86_64::_mm512_loadu_si512(b.cast()) }
    }
    #[inline(always)]
    unsafe fn mac(sum: std::arch::x86_64::__m512, a: *const u16, b: Self::Loaded) -> std::arch::x86_64::__m512 {
        // SAFETY: as above.
        unsafe { super::lanes::dot_bf16(sum, a, b) }
    }
    #[inline(always)]
    unsafe fn mac_one(sum: f32, a: *const u16, b: *const u16, _: usize) -> f32 {
        let wide = |x: u16| f32::from_bits(u32::from(x) << 16);
        // SAFETY: as above.
        unsafe { sum + wide(*a) * wide(*b) + wide(*a.add(1)) * wide(*b.add(1)) }
    }
    #[inline(always)]
    unsafe fn store_operand(p: *mut u16, v: std::arch::x86_64::__m512) {
        // SAFETY: as above.
        unsafe { super::lanes::store_bf16(p, v) }
    }
    #[inline(always)]
    fn operand(x: f32) -> u16 {
        bf16(x)
    }
}

/// `a [rows][..]` times a column of tiles `b`, whose inner dimensions follow one another.
struct Product<'a, P: Pairs> {
    a: *const P::Operand,
    a_stride: usize,
    tiles: &'a [*const P::Cache],
    /// Pairs of the inner dimension per tile.
    pairs: usize,
    /// Columns of a tile.
    columns: usize,
    out: *mut f32,
    out_stride: usize,
}

impl<P: Pairs> Product<'_, P> {
    #[inline(always)]
    unsafe fn run(&self, rows: usize) {
        let width = 2 * P::L::N;
        let mut column = 0;
        // SAFETY: columns and rows stay within the operands, which the callers vouch for.
        unsafe {
            while column + width <= self.columns {
                self.rows::<2>(rows, column);
                column += width;
            }
            if column + P::L::N <= self.columns {
                self.rows::<1>(rows, column);
                column += P::L::N;
            }
            for column in column..self.columns {
                for row in 0..rows {
                    self.one(row, column);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn rows<const W: usize>(&self, rows: usize, column: usize) {
        let mut row = 0;
        // SAFETY: as in `run`.
        unsafe {
            while rows - row >= P::L::ROWS {
                match P::L::ROWS {
                    6 => self.kernel::<6, W>(row, column),
                    _ => self.kernel::<4, W>(row, column),
                }
                row += if P::L::ROWS == 6 { 6 } else { 4 };
            }
            match rows - row {
                5 => self.kernel::<5, W>(row, column),
                4 => self.kernel::<4, W>(row, column),
                3 => self.kernel::<3, W>(row, column),
                2 => self.kernel::<2, W>(row, column),
                1 => self.kernel::<1, W>(row, column),
                _ => {}
            }
        }
    }

    #[inline(always)]
    unsafe fn kernel<const R: usize, const W: usize>(&self, row: usize, column: usize) {
        // SAFETY: as in `run`.
        unsafe {
            let mut sums = [[P::L::splat(0.0); W]; R];
            let mut a = self.a.add(row * self.a_stride);
            for &tile in self.tiles {
                let mut b = tile.add(column * P::STEP);
                for _ in 0..self.pairs {
                    let mut loaded = [P::load(b, self.columns); W];
                    for (w, l) in loaded.iter_mut().enumerate().skip(1) {
                        *l = P::load(b.add(w * P::L::N * P::STEP), self.columns);
                    }
                    for (r, sums) in sums.iter_mut().enumerate() {
                        for (sum, &l) in sums.iter_mut().zip(&loaded) {
                            *sum = P::mac(*sum, a.add(r * self.a_stride), l);
                        }
                    }
                    a = a.add(2);
                    b = b.add(2 * self.columns);
                }
            }
            for (r, sums) in sums.iter().enumerate() {
                for (w, &sum) in sums.iter().enumerate() {
                    P::L::store(self.out.add((row + r) * self.out_stride + column + w * P::L::N), sum);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn one(&self, row: usize, column: usize) {
        // SAFETY: as in `run`.
        unsafe {
            let mut sum = 0.0;
            let mut a = self.a.add(row * self.a_stride);
            for &tile in self.tiles {
                let mut b = tile.add(column * P::STEP);
                for _ in 0..self.pairs {
                    sum = P::mac_one(sum, a, b, self.columns);
                    a = a.add(2);
                    b = b.add(2 * self.columns);
                }
            }
            *self.out.add(row * self.out_stride + column) = sum;
        }
    }
}

/// `out [rows][SEGMENT]`, 32 columns per key tile.
///
/// # Safety
/// As [`Pairs`]; `q [rows][q_stride]`, tiles as the storage lays keys out.
#[inline(always)]
pub(super) unsafe fn scores<P: Pairs>(
    q: *const P::Operand,
    q_stride: usize,
    rows: usize,
    head_dim: usize,
    tiles: &[*const P::Cache],
    out: *mut f32,
) {
    for (index, tile) in tiles.iter().enumerate() {
        let product = Product::<P> {
            a: q,
            a_stride: q_stride,
            tiles: std::slice::from_ref(tile),
            pairs: head_dim / 2,
            columns: BLOCK,
            out: out.wrapping_add(index * BLOCK),
            out_stride: SEGMENT,
        };
        // SAFETY: the contract.
        unsafe { product.run(rows) };
    }
}

/// `out [rows][out_stride] = p [rows][SEGMENT] · values`.
///
/// # Safety
/// As [`Pairs`]; tiles as the storage lays values out.
#[inline(always)]
pub(super) unsafe fn weigh<P: Pairs>(
    p: *const P::Operand,
    rows: usize,
    head_dim: usize,
    tiles: &[*const P::Cache],
    out: *mut f32,
    out_stride: usize,
) {
    let product = Product::<P> { a: p, a_stride: SEGMENT, tiles, pairs: BLOCK / 2, columns: head_dim, out, out_stride };
    // SAFETY: the contract.
    unsafe { product.run(rows) };
}
