//! Memory of the paged key-value cache.
//!
//! `[layer][block][kv_head]` tiles of keys, then values, laid out inside a tile so that the inner loops of attention read whole
//! vectors in order:
//!
//! | dtype | keys of a tile | values of a tile |
//! |---|---|---|
//! | f32 | `[head_dim][32 slots]` | `[32 slots][head_dim]` |
//! | bf16 | `[head_dim / 2][32 slots][2]` | `[32 slots / 2][head_dim][2]` |
//!
//! In bf16 the two factors that a dot instruction adds lie side by side, so sixteen slots (or sixteen dimensions) of two steps are
//! one vector, and sixteen such vectors are the right operand of a matrix tile.

use std::mem::MaybeUninit;

use crate::cpu::elementwise::Elementwise;
use crate::error::KernelError;
use crate::ops::{KvDtype, KvSpec};

/// Tokens per block that tiles are laid out for.
pub const BLOCK: usize = 32;

/// Keys and values of all layers. Pages are zero and take memory only once touched.
///
/// Rows are written and read through `&self` by many threads at once; the `unsafe` methods say what keeps them apart.
pub struct KvStorage {
    spec: KvSpec,
    base: *mut u8,
    bytes: usize,
}

// SAFETY: the memory is plain numbers owned by this value; who may touch which part at a time is the contract of the methods.
unsafe impl Send for KvStorage {}
// SAFETY: as above.
unsafe impl Sync for KvStorage {}

impl KvStorage {
    /// Reserves zeroed address space for `spec`.
    ///
    /// Errors: [`KernelError::Shape`] for a block size other than 32, an odd head or an empty dimension; [`KernelError::Memory`]
    /// when the system refuses.
    pub fn new(spec: KvSpec) -> Result<Self, KernelError> {
        let shape = |detail: String| Err(KernelError::Shape { op: "alloc_kv", detail });
        if spec.block_size != BLOCK {
            return shape(format!("blocks of {} tokens; this backend has blocks of {BLOCK}", spec.block_size));
        }
        if spec.head_dim == 0 || !spec.head_dim.is_multiple_of(2) {
            return shape(format!("head_dim {} is not a positive even number", spec.head_dim));
        }
        if spec.layers == 0 || spec.kv_heads == 0 || spec.blocks == 0 {
            return shape(format!("{} layers, {} blocks, {} key-value heads", spec.layers, spec.blocks, spec.kv_heads));
        }
        if spec.dtype == KvDtype::Fp8 {
            return Err(KernelError::Unsupported("a cache of 8-bit floats is for cards; choose bf16".into()));
        }
        let bytes = [spec.layers, spec.blocks, spec.kv_heads, spec.head_dim, BLOCK, spec.dtype.bytes()]
            .into_iter()
            .try_fold(2usize, usize::checked_mul)
            .filter(|&bytes| isize::try_from(bytes).is_ok());
        let Some(bytes) = bytes else {
            return Err(KernelError::Memory { what: "the key-value cache", bytes: usize::MAX });
        };
        // An anonymous map, not the allocator: its pages are zero without being written, and 64-byte aligned.
        // SAFETY: a fresh private mapping at an address of the system's choice.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(KernelError::Memory { what: "the key-value cache", bytes });
        }
        #[cfg(target_os = "linux")]
        {
            // Attention walks scattered tiles: large pages spare most address translations. Advice only, so a refusal is fine.
            // SAFETY: the range was mapped above.
            unsafe { libc::madvise(base, bytes, libc::MADV_HUGEPAGE) };
        }
        Ok(Self { spec, base: base.cast(), bytes })
    }

    /// The shape it was made for.
    pub fn spec(&self) -> &KvSpec {
        &self.spec
    }

    /// Bytes of address space reserved.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Elements of one tile of keys, and of one of values.
    #[inline(always)]
    fn tile(&self) -> usize {
        BLOCK * self.spec.head_dim
    }

    /// Start of the key tile in elements of `T`; the value tile follows it.
    ///
    /// # Safety
    /// `layer`, `block` and `kv_head` lie within the spec and `T` is the spec's element type.
    #[inline(always)]
    pub(super) unsafe fn keys<T>(&self, layer: usize, block: usize, kv_head: usize) -> *mut T {
        let spec = &self.spec;
        debug_assert!(layer < spec.layers && block < spec.blocks && kv_head < spec.kv_heads);
        let index = (layer * spec.blocks + block) * spec.kv_heads + kv_head;
        // SAFETY: inside the mapping by the contract; every tile starts at a multiple of 128 bytes.
        unsafe { self.base.cast::<T>().add(index * 2 * self.tile()) }
    }

    /// Start of the value tile; see [`KvStorage::keys`].
    ///
    /// # Safety
    /// As [`KvStorage::keys`].
    #[inline(always)]
    pub(super) unsafe fn values<T>(&self, layer: usize, block: usize, kv_head: usize) -> *mut T {
        // SAFETY: the value tile follows the key tile.
        unsafe { self.keys::<T>(layer, block, kv_head).add(self.tile()) }
    }

    /// Stores the keys and values `[count][head_dim]` of consecutive tokens for one head, whose rows lie `stride` floats apart.
    /// `slot` is `block * 32 + offset` of the first one; the others follow in the same block.
    ///
    /// Keys of neighbouring slots share a cache line in every pair of dimensions, so that a token on its own writes to `head_dim / 2`
    /// lines what sixteen together write to as many.
    ///
    /// # Safety
    /// `layer`, the slots and `kv_head` lie within the spec, `slot % 32 + count <= 32`, `k` and `v` are good for the rows, and nobody
    /// else reads or writes these slots of this layer and head at the same time. Other slots may be written at the same time.
    pub unsafe fn write_rows(
        &self,
        rounding: &Elementwise,
        layer: usize,
        slot: usize,
        count: usize,
        kv_head: usize,
        k: *const f32,
        v: *const f32,
        stride: usize,
    ) {
        let dim = self.spec.head_dim;
        let (block, offset) = (slot / BLOCK, slot % BLOCK);
        debug_assert!(offset + count <= BLOCK);
        match self.spec.dtype {
            // SAFETY: the contract; indices stay inside a tile of `dim * BLOCK` elements.
            KvDtype::F32 => unsafe {
                let keys = self.keys::<f32>(layer, block, kv_head).add(offset);
                let values = self.values::<f32>(layer, block, kv_head).add(offset * dim);
                for d in 0..dim {
                    for i in 0..count {
                        *keys.add(d * BLOCK + i) = *k.add(i * stride + d);
                    }
                }
                for i in 0..count {
                    std::ptr::copy_nonoverlapping(v.add(i * stride), values.add(i * dim), dim);
                }
            },
            // SAFETY: as above. Neighbouring slots share words but not elements.
            KvDtype::Bf16 | KvDtype::Fp8 => unsafe {
                let keys = self.keys::<u16>(layer, block, kv_head).cast::<u32>();
                let values = self.values::<u16>(layer, block, kv_head);
                if count == 1 {
                    // Decoding: the way over rounded rows costs more than it saves.
                    let (k, v) = (std::slice::from_raw_parts(k, dim), std::slice::from_raw_parts(v, dim));
                    for (pair, x) in k.chunks_exact(2).enumerate() {
                        *keys.add(pair * BLOCK + offset) = u32::from(bf16(x[0])) | u32::from(bf16(x[1])) << 16;
                    }
                    let values = values.add(offset / 2 * 2 * dim + offset % 2);
                    for (d, &x) in v.iter().enumerate() {
                        *values.add(2 * d) = bf16(x);
                    }
                    return;
                }
                for first in (0..count).step_by(RUN) {
                    let n = RUN.min(count - first);
                    for d in (0..dim).step_by(DIMS) {
                        let width = DIMS.min(dim - d);
                        let at = first * stride + d;
                        let rows = Rounded::new(rounding, k.add(at), stride, n, width);
                        rows.put_keys(n, width, keys.add(d / 2 * BLOCK + offset + first));
                        let rows = Rounded::new(rounding, v.add(at), stride, n, width);
                        rows.put_values(n, width, offset + first, dim, values.add(2 * d));
                    }
                }
            },
        }
    }

    /// Copies block `from` to block `to` in all layers.
    ///
    /// # Safety
    /// Both lie within the spec and nobody touches either at the same time.
    pub unsafe fn copy_block(&self, from: usize, to: usize) {
        if from == to {
            return;
        }
        let bytes = self.spec.block_bytes() / self.spec.layers;
        for layer in 0..self.spec.layers {
            // SAFETY: the contract; a block's heads are contiguous within a layer.
            unsafe {
                let source = self.keys::<u8>(0, 0, 0).add((layer * self.spec.blocks + from) * bytes);
                let target = self.keys::<u8>(0, 0, 0).add((layer * self.spec.blocks + to) * bytes);
                std::ptr::copy_nonoverlapping(source, target, bytes);
            }
        }
    }

    /// Makes everything zero again and gives the memory back to the system.
    pub fn clear(&mut self) {
        #[cfg(target_os = "linux")]
        {
            // SAFETY: the range is our private anonymous mapping, whose dropped pages read as zero; `&mut self` keeps others out.
            if unsafe { libc::madvise(self.base.cast(), self.bytes, libc::MADV_DONTNEED) } == 0 {
                return;
            }
        }
        // SAFETY: the mapping is `bytes` long and ours alone.
        unsafe { std::ptr::write_bytes(self.base, 0, self.bytes) };
    }
}

/// Tokens whose keys and values are rounded, then stored together: the slots of a cache line of keys.
const RUN: usize = 16;
/// Dimensions of them at a time.
const DIMS: usize = 64;

/// Part of some tokens' keys or values. Only the first rows are filled.
#[repr(align(64))]
struct Rounded([MaybeUninit<[u16; DIMS]>; RUN]);

impl Rounded {
    /// # Safety
    /// `x` is good for `n <= RUN` rows of `width <= DIMS`, `stride` apart.
    #[inline(always)]
    unsafe fn new(rounding: &Elementwise, x: *const f32, stride: usize, n: usize, width: usize) -> Self {
        let mut rows = [const { MaybeUninit::uninit() }; RUN];
        for (i, row) in rows.iter_mut().enumerate().take(n) {
            // SAFETY: the contract.
            let x = unsafe { std::slice::from_raw_parts(x.add(i * stride), width) };
            rounding.round_bf16(x, &mut row.write([0; DIMS])[..width]);
        }
        Rounded(rows)
    }

    /// # Safety
    /// `row` was filled.
    #[inline(always)]
    unsafe fn row(&self, row: usize) -> &[u16; DIMS] {
        // SAFETY: the contract.
        unsafe { self.0[row].assume_init_ref() }
    }

    /// Stores `[width / 2][32 slots]` pairs of the first `n` tokens.
    ///
    /// # Safety
    /// They were filled; `keys` points to the first token's slot of the first pair in a key tile; nobody else touches these slots.
    #[inline(always)]
    unsafe fn put_keys(&self, n: usize, width: usize, keys: *mut u32) {
        for pair in 0..width / 2 {
            for i in 0..n {
                // SAFETY: the contract.
                unsafe {
                    let row = self.row(i);
                    *keys.add(pair * BLOCK + i) = u32::from(row[2 * pair]) | u32::from(row[2 * pair + 1]) << 16;
                }
            }
        }
    }

    /// Stores `[32 slots / 2][width][2]` of the first `n` tokens, from slot `offset` on.
    ///
    /// # Safety
    /// They were filled; `values` points to the first of the dimensions in a value tile of `dim`; nobody else touches these slots.
    #[inline(always)]
    unsafe fn put_values(&self, n: usize, width: usize, offset: usize, dim: usize, values: *mut u16) {
        let mut i = 0;
        while i < n {
            let slot = offset + i;
            // SAFETY: the contract; this token's row, the pair of slots that it belongs to, and dimension `d` of it.
            unsafe {
                let (row, pair) = (self.row(i), values.add(slot / 2 * 2 * dim));
                if slot.is_multiple_of(2) && i + 1 < n {
                    for (d, (&a, &b)) in row[..width].iter().zip(self.row(i + 1)).enumerate() {
                        *pair.cast::<u32>().add(d) = u32::from(a) | u32::from(b) << 16;
                    }
                    i += 2;
                } else {
                    for (d, &x) in row[..width].iter().enumerate() {
                        *pair.add(2 * d + slot % 2) = x;
                    }
                    i += 1;
                }
            }
        }
    }
}

impl Drop for KvStorage {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length, unmapped once.
        unsafe { libc::munmap(self.base.cast(), self.bytes) };
    }
}

/// Rounds to the nearest bfloat16, ties to even; NaN stays NaN.
#[inline(always)]
pub(crate) fn bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
    let nan = (bits >> 16) as u16 | 0x40;
    if bits & 0x7fff_ffff > 0x7f80_0000 { nan } else { rounded }
}

#[cfg(test)]
impl KvStorage {
    /// One token.
    ///
    /// # Safety
    /// As [`KvStorage::write_rows`].
    pub(super) unsafe fn write_row(&self, layer: usize, slot: usize, kv_head: usize, k: &[f32], v: &[f32]) {
        let rounding = Elementwise::new(crate::cpu::elementwise::Level::Portable);
        // SAFETY: the contract.
        unsafe { self.write_rows(&rounding, layer, slot, 1, kv_head, k.as_ptr(), v.as_ptr(), 0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::elementwise::Level;
    use crate::random::uniform;

    fn spec(dtype: KvDtype) -> KvSpec {
        KvSpec { layers: 2, blocks: 3, block_size: 32, kv_heads: 2, head_dim: 6, dtype }
    }

    fn row(seed: usize) -> Vec<f32> {
        (0..6).map(|i| (seed * 10 + i) as f32).collect()
    }

    #[test]
    fn a_written_row_lands_where_the_layout_says() {
        for dtype in [KvDtype::F32, KvDtype::Bf16] {
            let storage = KvStorage::new(spec(dtype)).unwrap();
            let (k, v) = (row(1), row(2));
            // SAFETY: indices within the spec, one thread.
            unsafe { storage.write_row(1, 2 * 32 + 5, 1, &k, &v) };
            for d in 0..6 {
                // SAFETY: as above.
                let (key, value) = unsafe {
                    match dtype {
                        KvDtype::F32 => {
                            (*storage.keys::<f32>(1, 2, 1).add(d * 32 + 5), *storage.values::<f32>(1, 2, 1).add(5 * 6 + d))
                        }
                        KvDtype::Bf16 | KvDtype::Fp8 => {
                            let key = *storage.keys::<u16>(1, 2, 1).add((d / 2) * 64 + 5 * 2 + d % 2);
                            let value = *storage.values::<u16>(1, 2, 1).add(2 * 12 + d * 2 + 1);
                            (half::bf16::from_bits(key).to_f32(), half::bf16::from_bits(value).to_f32())
                        }
                    }
                };
                assert_eq!((key, value), (k[d], v[d]), "{dtype:?} {d}");
            }
        }
    }

    #[test]
    fn tokens_written_together_are_the_same_as_one_by_one() {
        for dtype in [KvDtype::F32, KvDtype::Bf16] {
            for dim in [2, 6, 64, 80, 130] {
                let spec = KvSpec { layers: 1, blocks: 1, block_size: 32, kv_heads: 1, head_dim: dim, dtype };
                let stride = dim + 5;
                let x: Vec<f32> = (0..64 * stride as u64).map(|i| uniform(dim as u64, i) as f32 - 0.5).collect();
                let (k, v) = x.split_at(32 * stride);
                for level in [Level::Portable, Level::Avx2, Level::Avx512] {
                    for (first, count) in [(0, 32), (0, 1), (31, 1), (5, 16), (7, 22), (4, 18)] {
                        let [together, apart] = [0; 2].map(|_| KvStorage::new(spec).unwrap());
                        // SAFETY: indices within the spec, one thread; both mappings are `bytes` long.
                        unsafe {
                            let rounding = Elementwise::new(level);
                            together.write_rows(&rounding, 0, first, count, 0, k.as_ptr(), v.as_ptr(), stride);
                            for i in 0..count {
                                let row = i * stride..i * stride + dim;
                                apart.write_row(0, first + i, 0, &k[row.clone()], &v[row]);
                            }
                            let bytes = |s: &KvStorage| std::slice::from_raw_parts(s.base, s.bytes).to_vec();
                            assert!(bytes(&together) == bytes(&apart), "{dtype:?}, {dim}, {level:?}, {first} and {count} more");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_copied_block_is_equal_in_every_layer_and_clearing_makes_zero() {
        for dtype in [KvDtype::F32, KvDtype::Bf16] {
            let mut storage = KvStorage::new(spec(dtype)).unwrap();
            let bytes = storage.spec().block_bytes() / 2;
            let block = |storage: &KvStorage, layer: usize, index: usize| {
                // SAFETY: whole block inside the mapping, one thread.
                unsafe { std::slice::from_raw_parts(storage.base.add((layer * 3 + index) * bytes), bytes) }.to_vec()
            };
            for layer in 0..2 {
                for head in 0..2 {
                    for offset in 0..32 {
                        // SAFETY: indices within the spec, one thread.
                        unsafe { storage.write_row(layer, offset, head, &row(layer + offset + 1), &row(head + 3)) };
                    }
                }
            }
            // SAFETY: as above.
            unsafe { storage.copy_block(0, 2) };
            for layer in 0..2 {
                assert_eq!(block(&storage, layer, 0), block(&storage, layer, 2));
                assert!(block(&storage, layer, 1).iter().all(|&b| b == 0));
                assert!(block(&storage, layer, 2).iter().any(|&b| b != 0));
            }
            storage.clear();
            assert!((0..2).all(|layer| block(&storage, layer, 2).iter().all(|&b| b == 0)));
        }
    }

    #[test]
    fn a_cache_that_cannot_be_is_an_error() {
        let huge = KvSpec { blocks: usize::MAX / 4, ..spec(KvDtype::F32) };
        assert!(matches!(KvStorage::new(huge), Err(KernelError::Memory { .. })));
        let beyond = KvSpec { blocks: 1 << 46, ..spec(KvDtype::F32) };
        assert!(matches!(KvStorage::new(beyond), Err(KernelError::Memory { .. })));
        assert!(matches!(KvStorage::new(KvSpec { head_dim: 7, ..spec(KvDtype::F32) }), Err(KernelError::Shape { .. })));
        assert!(matches!(KvStorage::new(KvSpec { block_size: 16, ..spec(KvDtype::F32) }), Err(KernelError::Shape { .. })));
    }

    #[test]
    fn rounding_to_bf16_agrees_with_half() {
        for i in 0..1_000_000u32 {
            let x = f32::from_bits(i.wrapping_mul(4_294_967));
            assert_eq!(bf16(x), half::bf16::from_f32(x).to_bits(), "{x}");
        }
    }
}
