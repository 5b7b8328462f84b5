//! AMX: 16 × 16 tiles of sums, the reduction over `k` in the matrix unit.
//!
//! An int tile of activations is eight rows' high bytes over the same rows' low bytes, so that one tile product gives both halves of
//! eight rows; they are joined when the sums leave the tile. The sums are exact integers. A block is two activation tiles by two panels:
//! four sums, four operand loads per four products, which keeps the unit busy from the first-level cache.

use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;

use super::avx512::PanelOutput;
use super::{ActivationKind, ActivationRows, Form, Output, PANEL, PackedMatrix, TileScratch, avx512, skinny, streamed};
use crate::activations::{BF16_TILE_ROWS, INT_TILE_ROWS, RowScale};

/// Bytes of a tile.
const TILE: usize = 1024;

/// Palette 1, eight tiles of 16 rows of 64 bytes (Intel SDM vol. 1, 18.3: byte 0 palette, bytes 16–31 row widths, 48–55 rows).
#[repr(C, align(64))]
struct TileConfig([u8; 64]);

static CONFIG: TileConfig = {
    let mut bytes = [0u8; 64];
    bytes[0] = 1;
    let mut tile = 0;
    while tile < 8 {
        bytes[16 + tile * 2] = 64;
        bytes[48 + tile] = 16;
        tile += 1;
    }
    TileConfig(bytes)
};

/// Gives this thread eight full tiles, zeroed.
///
/// # Safety
/// [`crate::isa::Isa::Amx`] runs on this machine.
pub(crate) unsafe fn configure() {
    // SAFETY: a valid configuration; tile registers are not used by compiled code.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &CONFIG, options(nostack, readonly, preserves_flags)) };
}

/// Cache lines to fetch into the second-level cache during a block, `lines` per step from `at` on. A prefetch cannot fault.
#[derive(Clone, Copy)]
struct Ahead {
    at: *const u8,
    lines: usize,
}

/// Defines a function that multiplies up to two activation tiles by up to two panels over `steps` tiles of `k` each and stores the sums'
/// tiles one after the other, activation-major. The lines are the loads and products of one step, then the stores.
macro_rules! block_product {
    ($name:ident: $($line:expr),* ; $($store:literal),*) => {
        /// # Safety
        /// The thread's tiles are configured; `a` and `b` point to `steps > 0` tiles each, `out` to room for the tiles of sums. Pointers
        /// that the block's shape does not use may be anything.
        unsafe fn $name(a: [*const u8; 2], b: [*const u8; 2], steps: usize, ahead: Ahead, out: *mut u8) {
            // SAFETY: the caller's promise.
            unsafe {
                asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "2:",
                    $($line,)*
                    "mov {left}, {lines}",
                    "sub {left}, 1",
                    "js 4f",
                    "3:",
                    "prefetcht1 [{ahead}]",
                    "add {ahead}, 64",
                    "sub {left}, 1",
                    "jns 3b",
                    "4:",
                    "add {a0}, 1024",
                    "add {a1}, 1024",
                    "add {b0}, 1024",
                    "add {b1}, 1024",
                    "dec {steps}",
                    "jnz 2b",
                    $($store,)*
                    a0 = inout(reg) a[0] => _,
                    a1 = inout(reg) a[1] => _,
                    b0 = inout(reg) b[0] => _,
                    b1 = inout(reg) b[1] => _,
                    steps = inout(reg) steps => _,
                    ahead = inout(reg) ahead.at => _,
                    lines = in(reg) ahead.lines,
                    left = out(reg) _,
                    row = in(reg) 64usize,
                    out = in(reg) out,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    };
}

/// The four shapes of a block for one tile product. tmm0–3 are sums, tmm4–5 activations, tmm6–7 weights.
macro_rules! block_products {
    ($product:literal: $one:ident, $wide:ident, $tall:ident, $square:ident) => {
        block_product!($one:
            "tileloadd tmm4, [{a0} + {row}]", "tileloadd tmm6, [{b0} + {row}]",
            concat!($product, " tmm0, tmm4, tmm6");
            "tilestored [{out} + {row}], tmm0");
        block_product!($wide:
            "tileloadd tmm4, [{a0} + {row}]", "tileloadd tmm6, [{b0} + {row}]", "tileloadd tmm7, [{b1} + {row}]",
            concat!($product, " tmm0, tmm4, tmm6"), concat!($product, " tmm1, tmm4, tmm7");
            "tilestored [{out} + {row}], tmm0", "tilestored [{out} + {row} + 1024], tmm1");
        block_product!($tall:
            "tileloadd tmm4, [{a0} + {row}]", "tileloadd tmm6, [{b0} + {row}]", "tileloadd tmm5, [{a1} + {row}]",
            concat!($product, " tmm0, tmm4, tmm6"), concat!($product, " tmm1, tmm5, tmm6");
            "tilestored [{out} + {row}], tmm0", "tilestored [{out} + {row} + 1024], tmm1");
        block_product!($square:
            "tileloadd tmm4, [{a0} + {row}]", "tileloadd tmm6, [{b0} + {row}]",
            concat!($product, " tmm0, tmm4, tmm6"),
            "tileloadd tmm7, [{b1} + {row}]",
            concat!($product, " tmm1, tmm4, tmm7"),
            "tileloadd tmm5, [{a1} + {row}]",
            concat!($product, " tmm2, tmm5, tmm6"), concat!($product, " tmm3, tmm5, tmm7");
            "tilestored [{out} + {row}], tmm0", "tilestored [{out} + {row} + 1024], tmm1",
            "tilestored [{out} + {row} + 2048], tmm2", "tilestored [{out} + {row} + 3072], tmm3");
    };
}

block_products!("tdpbsud": int_one, int_wide, int_tall, int_square);
block_products!("tdpbf16ps": bf16_one, bf16_wide, bf16_tall, bf16_square);

/// Multiplies `tall` (1 or 2) tiles of 16 rows by `wide` (1 or 2) panels of 16 columns over `steps` bf16 tiles of 32 inner elements each,
/// and stores the sums' 16 × 16 tiles one after the other, row tiles outside.
///
/// # Safety
/// The thread's tiles are configured ([`configure`]); what the shape uses of `a` and `b` points to `steps > 0` tiles each, `out` to room
/// for `tall * wide` tiles.
#[inline(always)]
pub(crate) unsafe fn bf16_block(a: [*const u8; 2], tall: usize, b: [*const u8; 2], wide: usize, steps: usize, out: *mut f32) {
    let ahead = Ahead { at: std::ptr::null(), lines: 0 };
    // SAFETY: the caller's promise.
    unsafe {
        match (tall, wide) {
            (1, 1) => bf16_one(a, b, steps, ahead, out.cast()),
            (1, _) => bf16_wide(a, b, steps, ahead, out.cast()),
            (_, 1) => bf16_tall(a, b, steps, ahead, out.cast()),
            (_, _) => bf16_square(a, b, steps, ahead, out.cast()),
        }
    }
}

/// # Safety
/// As [`PackedMatrix::run_item`] on a machine with AMX; panels and rows in range, the first row a multiple of 16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) unsafe fn run(
    matrix: &PackedMatrix,
    panels: Range<usize>,
    acts: ActivationRows<'_>,
    rows: Range<usize>,
    next: &[u8],
    out: Output<'_>,
    scratch: &mut TileScratch,
) {
    let kind = matrix.activation_kind();
    let (tile_rows, steps) = match kind {
        ActivationKind::Int => (INT_TILE_ROWS, matrix.padded_k() / 64),
        ActivationKind::Bf16 => (BF16_TILE_ROWS, matrix.padded_k() / 32),
        // The matrix unit has no f32.
        // SAFETY: the caller's promise.
        ActivationKind::F32 => return unsafe { avx512::run(matrix, panels, acts, rows, out, scratch) },
    };
    if kind == ActivationKind::Int && rows.start == 0 && rows.end <= skinny::ROWS {
        // SAFETY: the caller's promise.
        return unsafe { skinny::run(matrix, panels, acts, rows.end, next, &out) };
    }
    // SAFETY: the machine has AMX.
    unsafe { configure() };
    let sums = scratch.sums.as_shared_ptr();
    let tiles = rows.start / tile_rows..rows.end.div_ceil(tile_rows);
    // SAFETY: row blocks are `steps` tiles apart.
    let tile_at = |tile: usize| unsafe { acts.values().add(tile * steps * TILE) };
    if tiles.len() <= streamed::TILES && panels.clone().all(|p| matrix.panel(p).0 == Form::Int4) {
        let a = std::array::from_fn(|t| tile_at(tiles.start + t.min(tiles.len() - 1)));
        for (i, panel) in panels.enumerate() {
            let (_, data) = matrix.panel(panel);
            let ahead = next.get(i * data.len()..).unwrap_or(data).as_ptr();
            let to = out.panel(panel);
            // SAFETY: whole panels and whole row tiles; `sums` has room for four tiles; this item's elements.
            unsafe {
                streamed::multiply(a, tiles.len(), data, ahead, &mut scratch.expanded, sums.cast());
                for (t, tile) in tiles.clone().enumerate() {
                    let first_row = tile * tile_rows;
                    let valid = (rows.end - first_row).min(tile_rows);
                    let (sums, scales) = (sums.add(t * TILE / 4), matrix.panel_scales(panel));
                    if out.add {
                        put_int::<true>(sums, scales, acts, first_row, valid, &to);
                    } else {
                        put_int::<false>(sums, scales, acts, first_row, valid, &to);
                    }
                }
            }
        }
        return;
    }
    // What this thread will probably read next is fetched evenly over this item's work.
    let mut next = next;
    let blocks = tiles.len().div_ceil(2) * panels.len().div_ceil(2);
    let lines = next.len().div_ceil(64).div_ceil(blocks * steps);
    let mut first = panels.start;
    while first < panels.end {
        let count = (panels.end - first).min(2);
        let mut weights = [std::ptr::null::<u8>(); 2];
        for (i, weights) in weights.iter_mut().enumerate().take(count) {
            let (form, data) = matrix.panel(first + i);
            *weights = if form == Form::Int4 {
                let to = &mut scratch.expanded[i * matrix.padded_k() * PANEL..][..matrix.padded_k() * PANEL];
                avx512::expand(data, to);
                to.as_ptr()
            } else {
                data.as_ptr()
            };
        }
        let mut tile = tiles.start;
        while tile < tiles.end {
            let tall = (tiles.end - tile).min(2);
            let a = [tile_at(tile), tile_at(tile + tall - 1)];
            let ahead = Ahead { at: next.as_ptr(), lines: if next.is_empty() { 0 } else { lines } };
            next = next.get(lines * steps * 64..).unwrap_or(&[]);
            // SAFETY: whole panels and whole row tiles; `sums` has room for four tiles; prefetched addresses are this item's output.
            unsafe {
                // The stores at the end would each wait for a line of a different page; asked for now, they come during the product.
                for row in tile * tile_rows..((tile + tall) * tile_rows).min(rows.end) {
                    let at = out.out.add(row * out.stride + first * PANEL);
                    _mm_prefetch::<_MM_HINT_ET0>(at.cast());
                    _mm_prefetch::<_MM_HINT_ET0>(at.add(PANEL * (count - 1)).cast());
                }
                let to = sums.cast::<u8>();
                match (kind, tall, count) {
                    (ActivationKind::Int, 1, 1) => int_one(a, weights, steps, ahead, to),
                    (ActivationKind::Int, 1, _) => int_wide(a, weights, steps, ahead, to),
                    (ActivationKind::Int, _, 1) => int_tall(a, weights, steps, ahead, to),
                    (ActivationKind::Int, _, _) => int_square(a, weights, steps, ahead, to),
                    (_, 1, 1) => bf16_one(a, weights, steps, ahead, to),
                    (_, 1, _) => bf16_wide(a, weights, steps, ahead, to),
                    (_, _, 1) => bf16_tall(a, weights, steps, ahead, to),
                    (_, _, _) => bf16_square(a, weights, steps, ahead, to),
                }
                for t in 0..tall {
                    let first_row = (tile + t) * tile_rows;
                    let valid = (rows.end - first_row).min(tile_rows);
                    for p in 0..count {
                        let sums = sums.add((t * count + p) * (TILE / 4));
                        let to = out.panel(first + p);
                        match (kind, out.add) {
                            (ActivationKind::Int, false) => {
                                put_int::<false>(sums, matrix.panel_scales(first + p), acts, first_row, valid, &to)
                            }
                            (ActivationKind::Int, true) => {
                                put_int::<true>(sums, matrix.panel_scales(first + p), acts, first_row, valid, &to)
                            }
                            _ => put_bf16(sums, first_row, valid, &to, out.add),
                        }
                    }
                }
            }
            tile += tall;
        }
        first += count;
    }
}

/// Joins the halves: `(256 high + low) * unit * scale + bias`, after taking out what the weights' offset of 128 added. The one place
/// where integer sums become f32.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) fn join(high: __m512i, low: __m512i, row: RowScale, scales: __m512, bias: __m512) -> __m512 {
    let high = _mm512_cvtepi32_ps(_mm512_add_epi32(high, _mm512_set1_epi32(row.high_offset)));
    let low = _mm512_cvtepi32_ps(_mm512_add_epi32(low, _mm512_set1_epi32(row.low_offset)));
    let sum = _mm512_fmadd_ps(high, _mm512_set1_ps(256.0), low);
    _mm512_fmadd_ps(sum, _mm512_mul_ps(scales, _mm512_set1_ps(row.scale)), bias)
}

/// # Safety
/// `sums` is a tile; the rows are this item's.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn put_int<const ADD: bool>(
    sums: *const i32,
    scales: &[f32; PANEL],
    acts: ActivationRows<'_>,
    first_row: usize,
    valid: usize,
    out: &PanelOutput,
) {
    // SAFETY: rows r and r + 8 of the tile; this item's elements.
    unsafe {
        let scales = _mm512_loadu_ps(scales.as_ptr());
        for r in 0..valid {
            let high = _mm512_load_si512(sums.add(r * 16).cast());
            let low = _mm512_load_si512(sums.add((INT_TILE_ROWS + r) * 16).cast());
            out.put::<ADD>(first_row + r, join(high, low, acts.row(first_row + r), scales, out.bias));
        }
    }
}

/// # Safety
/// `sums` is a tile; the rows are this item's.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn put_bf16(sums: *const i32, first_row: usize, valid: usize, out: &PanelOutput, add: bool) {
    for r in 0..valid {
        // SAFETY: row r of the tile, this item's elements.
        unsafe {
            let value = _mm512_add_ps(_mm512_load_ps(sums.add(r * 16).cast()), out.bias);
            if add { out.put::<true>(first_row + r, value) } else { out.put::<false>(first_row + r, value) }
        }
    }
}
