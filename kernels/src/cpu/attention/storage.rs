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
        let element = match spec.dtype {
            KvDtype::F32 => 4usize,
            KvDtype::Bf16 => 2,
        };
        let bytes = [spec.layers, spec.blocks, spec.kv_heads, spec.head_dim, BLOCK, element]
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

    /// Stores the key and value `[head_dim]` of one token for one head. `slot` is `block * 32 + offset`.
    ///
    /// # Safety
    /// `layer`, `slot` and `kv_head` lie within the spec, `k` and `v` have `head_dim` elements, and nobody else reads or writes
    /// this slot of this layer and head at the same time. Other slots may be written at the same time.
    pub unsafe fn write_row(&self, layer: usize, slot: usize, kv_head: usize, k: &[f32], v: &[f32]) {
        let dim = self.spec.head_dim;
        debug_assert!(k.len() == dim && v.len() == dim);
        let (block, offset) = (slot / BLOCK, slot % BLOCK);
        match self.spec.dtype {
            // SAFETY: the contract; indices stay inside a tile of `dim * BLOCK` elements.
            KvDtype::F32 => unsafe {
                let keys = self.keys::<f32>(layer, block, kv_head).add(offset);
                for (d, &x) in k.iter().enumerate() {
                    *keys.add(d * BLOCK) = x;
                }
                let values = self.values::<f32>(layer, block, kv_head).add(offset * dim);
                std::ptr::copy_nonoverlapping(v.as_ptr(), values, dim);
            },
            // SAFETY: as above. Neighbouring slots share words but not elements.
            KvDtype::Bf16 => unsafe {
                let keys = self.keys::<u16>(layer, block, kv_head).cast::<u32>().add(offset);
                for (pair, x) in k.chunks_exact(2).enumerate() {
                    *keys.add(pair * BLOCK) = u32::from(bf16(x[0])) | u32::from(bf16(x[1])) << 16;
                }
                let values = self.values::<u16>(layer, block, kv_head).add((offset / 2) * 2 * dim + offset % 2);
                for (d, &x) in v.iter().enumerate() {
                    *values.add(2 * d) = bf16(x);
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

impl Drop for KvStorage {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length, unmapped once.
        unsafe { libc::munmap(self.base.cast(), self.bytes) };
    }
}

/// Rounds to the nearest bfloat16, ties to even; NaN stays NaN.
#[inline(always)]
pub(super) fn bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
    let nan = (bits >> 16) as u16 | 0x40;
    if bits & 0x7fff_ffff > 0x7f80_0000 { nan } else { rounded }
}

#[cfg(test)]
mod tests {
    use super::*;

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
                        KvDtype::Bf16 => {
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
