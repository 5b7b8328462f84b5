//! Activation rows in the form that a linear's kernel multiplies.
//!
//! Each row is converted once and then shared by all tiles of weights. The form depends on what the weights are and on the
//! instruction path:
//!
//! | weights | portable, AVX2 | AVX-512 | AMX |
//! |---|---|---|---|
//! | f32 | f32 | f32 | f32 |
//! | bf16 | f32 | f32 | bf16 tiles |
//! | int | 16-bit, one scale per row | 8-bit, one scale per 64 | two 8-bit halves of 16-bit in tiles, one scale per row |
//!
//! A row's form depends on that row alone, which is what makes results independent of the batch.

#[cfg(target_arch = "x86_64")]
mod avx512;

use half::bf16;

use crate::aligned::AlignedBuf;
use crate::error::KernelError;
use crate::isa::Isa;

/// What a matrix multiplies with; see [`crate::packed::PackedMatrix::activation_kind`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ActivationKind {
    /// Single precision weights.
    F32,
    /// bfloat16 weights.
    Bf16,
    /// 4- or 8-bit weights on an 8-bit grid.
    Int,
}

/// Input features are padded to this many (zeros): one AMX tile of 8-bit values.
pub(crate) const K_PAD: usize = 64;
/// Input features per scale of 8-bit activations, and per partial sum of 16-bit ones.
pub(crate) const GROUP: usize = 64;
/// Rows of an int tile: eight rows' high halves over the same rows' low halves.
pub(crate) const INT_TILE_ROWS: usize = 8;
/// Rows of a bf16 tile.
pub(crate) const BF16_TILE_ROWS: usize = 16;
/// Largest magnitude of a 16-bit activation: 127 * 256 + 127, so that both halves are signed bytes.
const WIDE_MAX: f32 = 32639.0;

/// In every layout, rows from a multiple of this on lie as if they were the first ones.
pub(crate) const ROW_BLOCK: usize = BF16_TILE_ROWS;

/// How a row is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// f32 `[row][stride]`.
    Single,
    /// bf16 `[row / 16][k / 32][row % 16][32]`.
    Bf16Tiles,
    /// i16 `[row][stride]`.
    Wide,
    /// i8 `[row][stride]` with a scale per [`GROUP`].
    Groups,
    /// i8 `[row / 8][k / 64][high 8 rows, low 8 rows][64]`.
    SplitTiles,
}

impl Layout {
    pub(crate) fn of(isa: Isa, kind: ActivationKind) -> Layout {
        match (kind, isa) {
            (ActivationKind::F32, _) => Layout::Single,
            (ActivationKind::Bf16, Isa::Amx) => Layout::Bf16Tiles,
            (ActivationKind::Bf16, _) => Layout::Single,
            (ActivationKind::Int, Isa::Portable | Isa::Avx2) => Layout::Wide,
            (ActivationKind::Int, Isa::Avx512) => Layout::Groups,
            (ActivationKind::Int, Isa::Amx) => Layout::SplitTiles,
        }
    }
}

/// `k` rounded up to whole tiles.
pub(crate) const fn padded(k: usize) -> usize {
    k.next_multiple_of(K_PAD)
}

/// Elements from one row to the next in the row-major layouts. Never a multiple of 4 KiB, at which all rows of a block would
/// compete for one set of the first-level cache.
pub(crate) const fn stride(k: usize) -> usize {
    padded(k) + K_PAD
}

/// Per-row numbers of the integer layouts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowScale {
    /// Real value of one unit.
    pub scale: f32,
    /// −128 × sum of the high halves: takes out what the weights' offset adds to the product.
    pub high_offset: i32,
    /// −128 × sum of the low halves.
    pub low_offset: i32,
}

/// Scratch for the converted rows of one linear, reused from step to step.
pub struct Activations {
    values: AlignedBuf<u8>,
    /// `[row][3]`: scale bits, high offset, low offset.
    rows: AlignedBuf<i32>,
    /// `[row][padded(max_k) / GROUP]` scales.
    group_scales: AlignedBuf<f32>,
    /// `[row][padded(max_k) / GROUP]` −128 × sum of the group.
    group_offsets: AlignedBuf<i32>,
    max_rows: usize,
    max_k: usize,
}

impl RowScale {
    fn split(scale: f32, high_sum: i32, low_sum: i32) -> RowScale {
        RowScale { scale, high_offset: high_sum.wrapping_mul(-128), low_offset: low_sum.wrapping_mul(-128) }
    }
}

impl Activations {
    /// Room for `max_rows` rows of up to `max_k` values in any form.
    pub fn new(max_rows: usize, max_k: usize) -> Result<Self, KernelError> {
        const WHAT: &str = "activation scratch";
        let too_big = KernelError::Memory { what: WHAT, bytes: usize::MAX };
        let sizes = || {
            let rows = max_rows.checked_next_multiple_of(BF16_TILE_ROWS)?;
            let stride = max_k.checked_next_multiple_of(K_PAD)?.checked_add(K_PAD)?;
            Some((rows, rows.checked_mul(stride)?.checked_mul(4)?, rows.checked_mul(stride / GROUP)?))
        };
        let (rows, bytes, groups) = sizes().ok_or(too_big)?;
        Ok(Activations {
            values: AlignedBuf::zeroed(bytes, WHAT)?,
            rows: AlignedBuf::zeroed(rows * 3, WHAT)?,
            group_scales: AlignedBuf::zeroed(groups, WHAT)?,
            group_offsets: AlignedBuf::zeroed(groups, WHAT)?,
            max_rows,
            max_k,
        })
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.values.bytes() + self.rows.bytes() + self.group_scales.bytes() + self.group_offsets.bytes()
    }

    /// Rows and input features there is room for.
    pub fn capacity(&self) -> (usize, usize) {
        (self.max_rows, self.max_k)
    }

    /// Converts one row. A row with a value that is not finite becomes one whose products are all NaN in the integer forms.
    ///
    /// # Safety
    /// `row < max_rows`, `x.len() <= max_k`; `isa` runs on this machine; no two threads set the same row, and no thread runs an
    /// item over these activations, at the same time. All rows of one linear are set with the same `isa`, `kind` and length.
    pub unsafe fn set_row(&self, isa: Isa, kind: ActivationKind, row: usize, x: &[f32]) {
        debug_assert!(row < self.max_rows && x.len() <= self.max_k);
        // SAFETY: the caller's promise, passed on.
        unsafe {
            match isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Amx | Isa::Avx512 => self.set_row_avx512(Layout::of(isa, kind), row, x),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => self.set_row_avx2(Layout::of(isa, kind), row, x),
                _ => self.set_row_in(Layout::of(isa, kind), row, x),
            }
        }
    }

    /// The same code compiled for wider vectors, or written for them where the compiler would not find the narrowing packs.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
    unsafe fn set_row_avx512(&self, layout: Layout, row: usize, x: &[f32]) {
        // SAFETY: the caller's promise, passed on; addresses as in `set_split`.
        unsafe {
            match layout {
                Layout::SplitTiles => {
                    let (scale, inverse) = scale_of(x, WIDE_MAX);
                    let (high_sum, low_sum) = avx512::set_split(self.split_row(row, padded(x.len()) / 64), x, inverse);
                    self.put_row(row, RowScale::split(scale, high_sum, low_sum));
                }
                Layout::Groups => self.set_groups(row, x, |out, x, inverse| avx512::set_group(out, x, inverse)),
                layout => self.set_row_in(layout, row, x),
            }
        }
    }

    /// The same code compiled for wider vectors.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn set_row_avx2(&self, layout: Layout, row: usize, x: &[f32]) {
        // SAFETY: the caller's promise, passed on.
        unsafe { self.set_row_in(layout, row, x) }
    }

    #[inline(always)]
    unsafe fn set_row_in(&self, layout: Layout, row: usize, x: &[f32]) {
        // SAFETY: each layout writes only the elements of this row, inside the capacity that the caller promised.
        unsafe {
            match layout {
                Layout::Single => self.set_single(row, x),
                Layout::Bf16Tiles => self.set_bf16(row, x),
                Layout::Wide => self.set_wide(row, x),
                Layout::Groups => self.set_groups(row, x, set_group),
                Layout::SplitTiles => self.set_split(row, x),
            }
        }
    }

    #[inline(always)]
    unsafe fn set_single(&self, row: usize, x: &[f32]) {
        let stride = stride(x.len());
        // SAFETY: rows are `stride` apart and there is room for `max_rows` of them.
        let out = unsafe {
            std::slice::from_raw_parts_mut(self.values.as_shared_ptr().cast::<f32>().add(row * stride), padded(x.len()))
        };
        out[..x.len()].copy_from_slice(x);
        out[x.len()..].fill(0.0);
    }

    #[inline(always)]
    unsafe fn set_bf16(&self, row: usize, x: &[f32]) {
        let tiles = padded(x.len()) / 32;
        let (block, lane) = (row / BF16_TILE_ROWS, row % BF16_TILE_ROWS);
        for tile in 0..tiles {
            // SAFETY: tile (block, tile) is 512 elements, this row's are 32 of them; the last block is inside the padded capacity.
            let out = unsafe {
                let at = ((block * tiles + tile) * BF16_TILE_ROWS + lane) * 32;
                &mut *self.values.as_shared_ptr().cast::<u16>().add(at).cast::<[u16; 32]>()
            };
            let x = x.get(tile * 32..).unwrap_or(&[]);
            if let Some(x) = x.first_chunk::<32>() {
                for (o, v) in out.iter_mut().zip(x) {
                    *o = round_bf16(*v);
                }
            } else {
                out.fill(0);
                for (o, v) in out.iter_mut().zip(x) {
                    *o = bf16::from_f32(*v).to_bits();
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn set_wide(&self, row: usize, x: &[f32]) {
        let (stride, padded) = (stride(x.len()), padded(x.len()));
        let (scale, inverse) = scale_of(x, WIDE_MAX);
        // SAFETY: rows are `stride` apart, group sums of a row are its own.
        let (out, offsets) = unsafe {
            (
                std::slice::from_raw_parts_mut(self.values.as_shared_ptr().cast::<i16>().add(row * stride), padded),
                std::slice::from_raw_parts_mut(self.group_offsets.as_shared_ptr().add(row * (stride / GROUP)), padded / GROUP),
            )
        };
        for (o, v) in out.iter_mut().zip(x) {
            *o = to_int(*v, inverse) as i16;
        }
        out[x.len()..].fill(0);
        for (offset, group) in offsets.iter_mut().zip(out.as_chunks::<GROUP>().0) {
            *offset = -128 * group.iter().map(|v| i32::from(*v)).sum::<i32>();
        }
        // SAFETY: this row's numbers.
        unsafe { self.put_row(row, RowScale { scale, high_offset: 0, low_offset: 0 }) };
    }

    #[inline(always)]
    unsafe fn set_groups(&self, row: usize, x: &[f32], set_group: impl Fn(&mut [i8; GROUP], &[f32], f32) -> i32) {
        let (stride, padded) = (stride(x.len()), padded(x.len()));
        // SAFETY: rows are `stride` apart, group numbers of a row are its own.
        let (out, scales, offsets) = unsafe {
            let at = row * (stride / GROUP);
            (
                std::slice::from_raw_parts_mut(self.values.as_shared_ptr().cast::<i8>().add(row * stride), padded),
                std::slice::from_raw_parts_mut(self.group_scales.as_shared_ptr().add(at), padded / GROUP),
                std::slice::from_raw_parts_mut(self.group_offsets.as_shared_ptr().add(at), padded / GROUP),
            )
        };
        for (g, out) in out.as_chunks_mut::<GROUP>().0.iter_mut().enumerate() {
            let x = &x[(g * GROUP).min(x.len())..((g + 1) * GROUP).min(x.len())];
            let (scale, inverse) = scale_of(x, 127.0);
            scales[g] = scale;
            offsets[g] = -128 * set_group(out, x, inverse);
        }
    }

    /// The row's high halves in its first tile; the low ones come 512 bytes later, the next tile's 1,024.
    ///
    /// # Safety
    /// `row < max_rows`, `tiles` is that of this linear's rows.
    #[inline(always)]
    unsafe fn split_row(&self, row: usize, tiles: usize) -> *mut i8 {
        let (block, lane) = (row / INT_TILE_ROWS, row % INT_TILE_ROWS);
        // SAFETY: tile (block, 0) is 1,024 bytes of the capacity, this row's are 64 in its upper and 64 in its lower half.
        unsafe { self.values.as_shared_ptr().cast::<i8>().add(block * tiles * 1024 + lane * 64) }
    }

    #[inline(always)]
    unsafe fn set_split(&self, row: usize, x: &[f32]) {
        let tiles = padded(x.len()) / 64;
        let (scale, inverse) = scale_of(x, WIDE_MAX);
        let (mut high_sum, mut low_sum) = (0i32, 0i32);
        for tile in 0..tiles {
            // SAFETY: the row's halves in this tile.
            let (high, low) = unsafe {
                let at = self.split_row(row, tiles).add(tile * 1024);
                (&mut *at.cast::<[i8; 64]>(), &mut *at.add(512).cast::<[i8; 64]>())
            };
            let mut wide = [0i32; 64];
            for (w, v) in wide.iter_mut().zip(x.get(tile * 64..).unwrap_or(&[])) {
                *w = to_int(*v, inverse);
            }
            // Balanced halves: a = 256 high + low with low in −128..=127.
            for ((h, l), w) in high.iter_mut().zip(low.iter_mut()).zip(&wide) {
                let top = (w + 128) >> 8;
                let bottom = w - (top << 8);
                // A row with an infinity has sums of any size, and a scale that makes NaN of them.
                high_sum = high_sum.wrapping_add(top);
                low_sum = low_sum.wrapping_add(bottom);
                *h = top as i8;
                *l = bottom as i8;
            }
        }
        // SAFETY: this row's numbers.
        unsafe { self.put_row(row, RowScale::split(scale, high_sum, low_sum)) };
    }

    #[inline(always)]
    unsafe fn put_row(&self, row: usize, numbers: RowScale) {
        // SAFETY: three numbers per row, this row's own.
        unsafe {
            let at = self.rows.as_shared_ptr().add(row * 3);
            *at = numbers.scale.to_bits().cast_signed();
            *at.add(1) = numbers.high_offset;
            *at.add(2) = numbers.low_offset;
        }
    }

    /// The numbers of a row that was set in an integer layout.
    #[inline(always)]
    fn row(&self, row: usize) -> RowScale {
        let [scale, high_offset, low_offset] = self.rows.as_chunks::<3>().0[row];
        RowScale { scale: f32::from_bits(scale.cast_unsigned()), high_offset, low_offset }
    }

    /// The rows from `first` on, a multiple of [`ROW_BLOCK`], which were set with this `isa`, `kind` and length `k`.
    #[inline]
    pub(crate) fn rows_from(&self, isa: Isa, kind: ActivationKind, first: usize, k: usize) -> ActivationRows<'_> {
        debug_assert!(first.is_multiple_of(ROW_BLOCK) && first <= self.max_rows);
        let row_bytes = match Layout::of(isa, kind) {
            Layout::Single => stride(k) * 4,
            Layout::Wide => stride(k) * 2,
            Layout::Groups => stride(k),
            Layout::Bf16Tiles => padded(k) * 2,
            // Both halves.
            Layout::SplitTiles => padded(k) * 2,
        };
        ActivationRows { acts: self, first, values: self.values.as_ptr().wrapping_add(first * row_bytes) }
    }
}

/// Rows of [`Activations`] from one on, which kernels count from 0.
#[derive(Clone, Copy)]
pub(crate) struct ActivationRows<'a> {
    acts: &'a Activations,
    first: usize,
    values: *const u8,
}

impl<'a> ActivationRows<'a> {
    /// The numbers of a row that was set in an integer layout.
    #[inline(always)]
    pub fn row(self, row: usize) -> RowScale {
        self.acts.row(self.first + row)
    }

    /// Start of the values of the first row.
    #[inline(always)]
    pub fn values(self) -> *const u8 {
        self.values
    }

    /// Scales of a row's groups, for rows of `k` values.
    #[inline(always)]
    pub fn group_scales(self, row: usize, k: usize) -> &'a [f32] {
        &self.acts.group_scales[(self.first + row) * (stride(k) / GROUP)..][..padded(k) / GROUP]
    }

    /// −128 × sum of each group of a row.
    #[inline(always)]
    pub fn group_offsets(self, row: usize, k: usize) -> &'a [i32] {
        &self.acts.group_offsets[(self.first + row) * (stride(k) / GROUP)..][..padded(k) / GROUP]
    }
}

/// `(unit, 1 / unit)` such that the largest magnitude becomes `max`. The unit is NaN when a value is not finite: magnitudes are
/// compared as integers, in which order infinities and NaNs come above every number.
#[inline(always)]
fn scale_of(x: &[f32], max: f32) -> (f32, f32) {
    let largest = f32::from_bits(x.iter().fold(0u32, |a, v| a.max(v.to_bits() & 0x7fff_ffff)));
    if !largest.is_finite() {
        (f32::NAN, 0.0)
    } else if largest < f32::MIN_POSITIVE * 65536.0 {
        // So small that the unit's inverse would overflow: zero.
        (0.0, 0.0)
    } else {
        (largest / max, max / largest)
    }
}

/// Nearest integer, ties to even, for |v * inverse| < 2²²: adding 1.5 · 2²³ leaves the integer in the low bits.
#[inline(always)]
fn to_int(v: f32, inverse: f32) -> i32 {
    const MAGIC: f32 = 12_582_912.0;
    ((v * inverse + MAGIC).to_bits() as i32).wrapping_sub(MAGIC.to_bits() as i32)
}

/// Sets a group of 8-bit values, zeros beyond the end of `x`; returns their sum.
#[inline(always)]
fn set_group(out: &mut [i8; GROUP], x: &[f32], inverse: f32) -> i32 {
    out.fill(0);
    for (o, v) in out.iter_mut().zip(x) {
        *o = to_int(*v, inverse) as i8;
    }
    out.iter().map(|v| i32::from(*v)).sum()
}

/// Round to nearest even without a branch, so that it vectorises; NaN stays NaN by its top mantissa bit.
#[inline(always)]
fn round_bf16(v: f32) -> u16 {
    let bits = v.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
    if bits & 0x7fff_ffff > 0x7f80_0000 { (bits >> 16) as u16 | 0x40 } else { rounded }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::uniform;

    /// Everything that a kernel could read of the converted rows.
    fn bytes(acts: &Activations) -> (&[u8], &[i32], Vec<u32>, &[i32]) {
        (&acts.values, &acts.rows, acts.group_scales.iter().map(|s| s.to_bits()).collect(), &acts.group_offsets)
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn vector_conversions_have_the_bits_of_the_portable_ones() {
        if Isa::detect() < Isa::Avx512 {
            return;
        }
        for k in [1, 15, 16, 17, 63, 64, 65, 200, 576, 1536, 1570] {
            for layout in [Layout::SplitTiles, Layout::Groups] {
                let [mut fast, mut slow] = [0; 2].map(|_| Activations::new(19, k).unwrap());
                // What a former, longer or wilder row left behind must not show.
                fast.values.fill(0x55);
                slow.values.fill(0x55);
                for row in 0..19 {
                    let size = [1.0, 1e-3, 3e20, 0.0][row % 4];
                    let mut x: Vec<f32> = (0..k as u64).map(|i| (uniform(row as u64, i) - 0.5) as f32 * size).collect();
                    // Ties between two integers, on both sides of zero, and the largest values of both signs.
                    x.iter_mut().enumerate().skip(2).step_by(7).for_each(|(i, v)| *v = (i as f32 - 300.5) * size / 32639.0 / 4.0);
                    x[k / 2] = size;
                    x[k / 3] = -size;
                    // SAFETY: one thread, rows and length within the capacity, instructions present.
                    unsafe {
                        fast.set_row_avx512(layout, row, &x);
                        slow.set_row_in(layout, row, &x);
                    }
                }
                assert!(bytes(&fast) == bytes(&slow), "{layout:?}, {k} values");
            }
        }
    }
}
