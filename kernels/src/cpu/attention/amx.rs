//! The two matrix products of attention in AMX tiles.
//!
//! Up to sixteen query rows are the left operand, keys or values of a block the right one. The storage lays blocks out as tiles
//! want them, so nothing is repacked. Tile registers:
//!
//! | tiles | shape | use |
//! |---|---|---|
//! | 0, 1, 4, 5 | rows × 16 f32 | sums |
//! | 2, 3 | 16 × 32 bf16 | keys, values |
//! | 6 | rows × 32 bf16 | queries, probabilities |
//! | 7 | rows × 16 bf16 | the last 16 dimensions of queries when head_dim is not a multiple of 32 (tile 3 then has 8 rows) |
//!
//! The compiler never uses tile registers, so values live in them between the assembly statements below.

use std::arch::asm;

use super::plan::SEGMENT;
use super::storage::BLOCK;

/// Operand of LDTILECFG (Intel SDM vol. 1, 18.3).
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Whether heads of this size fit tiles.
pub(super) const fn fits(head_dim: usize) -> bool {
    head_dim.is_multiple_of(16)
}

/// Shapes the tiles for `rows` query rows. `tail`: tiles 3 and 7 take the 16 dimensions beyond a multiple of 32.
///
/// # Safety
/// Needs AMX; `rows` is 1 to 16. Replaces whatever configuration the thread had.
#[inline(always)]
unsafe fn configure(rows: usize, tail: bool) {
    let r = rows as u8;
    let config = Config {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        row_bytes: [64, 64, 64, 64, 64, 64, 64, if tail { 32 } else { 64 }, 0, 0, 0, 0, 0, 0, 0, 0],
        rows: [r, r, 16, if tail { 8 } else { 16 }, r, r, r, r, 0, 0, 0, 0, 0, 0, 0, 0],
    };
    // SAFETY: a valid configuration for palette 1.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, preserves_flags, readonly)) };
}

#[inline(always)]
unsafe fn zero<const T: usize>() {
    // SAFETY: the callers' contract (AMX, configured), here and below.
    unsafe { asm!("tilezero tmm{t}", t = const T, options(nostack, preserves_flags, nomem)) };
}

#[inline(always)]
unsafe fn load<const T: usize>(from: *const u16, stride_bytes: usize) {
    // SAFETY: as above.
    unsafe {
        asm!("tileloadd tmm{t}, [{from} + {stride}*1]", t = const T, from = in(reg) from, stride = in(reg) stride_bytes,
            options(nostack, preserves_flags, readonly));
    }
}

#[inline(always)]
unsafe fn store<const T: usize>(to: *mut f32, stride_bytes: usize) {
    // SAFETY: as above.
    unsafe {
        asm!("tilestored [{to} + {stride}*1], tmm{t}", t = const T, to = in(reg) to, stride = in(reg) stride_bytes,
            options(nostack, preserves_flags));
    }
}

/// `C += A · B`
#[inline(always)]
unsafe fn multiply<const C: usize, const A: usize, const B: usize>() {
    // SAFETY: as above.
    unsafe {
        asm!("tdpbf16ps tmm{c}, tmm{a}, tmm{b}", c = const C, a = const A, b = const B,
            options(nostack, preserves_flags, nomem));
    }
}

/// `out [rows][SEGMENT]`, 32 columns per key tile.
///
/// # Safety
/// Needs AMX; `q [rows][q_stride]` with 1 to 16 rows, tiles as the storage lays keys out, `head_dim` that [`fits`].
#[inline(always)]
pub(super) unsafe fn scores(q: *const u16, q_stride: usize, rows: usize, head_dim: usize, tiles: &[*const u16], out: *mut f32) {
    let (whole, tail) = (head_dim / 32, !head_dim.is_multiple_of(32));
    // SAFETY: the contract; a key tile has head_dim / 2 rows of 32 pairs, 128 bytes each.
    unsafe {
        configure(rows, tail);
        for (index, &tile) in tiles.iter().enumerate() {
            zero::<0>();
            zero::<1>();
            for step in 0..whole {
                load::<6>(q.add(step * 32), q_stride * 2);
                let keys = tile.add(step * 16 * 2 * BLOCK);
                load::<2>(keys, 4 * BLOCK);
                multiply::<0, 6, 2>();
                load::<2>(keys.add(32), 4 * BLOCK);
                multiply::<1, 6, 2>();
            }
            if tail {
                load::<7>(q.add(whole * 32), q_stride * 2);
                let keys = tile.add(whole * 16 * 2 * BLOCK);
                load::<3>(keys, 4 * BLOCK);
                multiply::<0, 7, 3>();
                load::<3>(keys.add(32), 4 * BLOCK);
                multiply::<1, 7, 3>();
            }
            store::<0>(out.add(index * BLOCK), SEGMENT * 4);
            store::<1>(out.add(index * BLOCK + 16), SEGMENT * 4);
        }
    }
}

/// `out [rows][out_stride] = p [rows][SEGMENT] · values`.
///
/// # Safety
/// Needs AMX; follows [`scores`] of the same 1 to 16 rows and `head_dim`, whose tile configuration it uses; tiles as the storage
/// lays values out.
#[inline(always)]
pub(super) unsafe fn weigh(p: *const u16, rows: usize, head_dim: usize, tiles: &[*const u16], out: *mut f32, out_stride: usize) {
    // SAFETY: the contract; a value tile has 16 rows of head_dim pairs.
    unsafe {
        if !head_dim.is_multiple_of(32) {
            configure(rows, false);
        }
        let row_bytes = head_dim * 4;
        let mut column = 0;
        while column < head_dim {
            let left = (head_dim - column) / 16;
            zero::<0>();
            zero::<1>();
            zero::<4>();
            zero::<5>();
            for (index, tile) in tiles.iter().enumerate() {
                load::<6>(p.add(index * BLOCK), SEGMENT * 2);
                let values = tile.add(column * 2);
                load::<2>(values, row_bytes);
                multiply::<0, 6, 2>();
                if left > 1 {
                    load::<3>(values.add(32), row_bytes);
                    multiply::<1, 6, 3>();
                }
                if left > 2 {
                    load::<2>(values.add(64), row_bytes);
                    multiply::<4, 6, 2>();
                }
                if left > 3 {
                    load::<3>(values.add(96), row_bytes);
                    multiply::<5, 6, 3>();
                }
            }
            let to = out.add(column);
            store::<0>(to, out_stride * 4);
            if left > 1 {
                store::<1>(to.add(16), out_stride * 4);
            }
            if left > 2 {
                store::<4>(to.add(32), out_stride * 4);
            }
            if left > 3 {
                store::<5>(to.add(48), out_stride * 4);
            }
            column += 64;
        }
    }
}
